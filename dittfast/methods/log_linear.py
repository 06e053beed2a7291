"""Log-linear sparse attention: hierarchical top-k and pooled tokens (LLSA, arXiv:2512.16615)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from ..layout import Layout, make_blocks, split_evenly
from ..plan import Plan, to_be_kept
from .checks import MAX_BLOCK_SIZE, check_choice, check_flag, check_integer, each
from .dynamic import (
    DynamicMethod,
    Partition,
    Pool,
    dense_context_rows,
    match_heads,
    wide_dtype,
)

ORDERS = ("morton", "hilbert", "raster")


class _Geometry(NamedTuple):
    partition: Partition  # on the device
    pool: Pool
    sizes: tuple[int, ...]  # pooled tokens at levels 1, 2, ..., levels
    first_group: tuple[int, ...]  # key block where each level's pooled tokens begin
    log_weight: torch.Tensor  # [1, 1, num_keys] fp64
    template: Plan


@dataclass(frozen=True)
class LogLinear(DynamicMethod):
    """Each block of queries sees its best key blocks in full and everything else in summary.

    Image tokens are put in a locality order and cut into blocks of ``block_size``. Level l of the
    hierarchy is the mean of ``block_size`` neighbours on level l - 1 (level 0 is the tokens).
    The coarsest level is scored in full; below it a query block scores only the children of the
    ``topk`` blocks its parent chose. One softmax then covers, for each query block, the tokens of
    the ``topk`` blocks chosen on level 1 and, where ``enrich`` is on, *all* children of the
    parent's choice on every level between, and the whole coarsest level, each pooled key weighted
    by the number of tokens it stands for (``kv_log_weight``). As published, a chosen block still
    counts in the summaries above it. Time and memory grow as N log N.

    Context tokens (text) are outside the hierarchy and seen by every query. Top-k choices have no
    gradient; pooled keys and values pass theirs to the tokens they average.

    Source: Zhou et al., "Trainable Log-linear Sparse Attention for Efficient Diffusion
    Transformers", arXiv:2512.16615. Any length, any top-k: the last block of a level may be short
    and its mean and weight use its true count.

    Args:
        block_size: tokens in a block and blocks in a block of the next level, 8 to 256.
        topk: blocks chosen on each level, at least 1; clamped to the blocks there are. A list
            has a number for each head.
        levels: levels of pooling, at least 1, or "auto": the largest L with
            ``block_size ** (L + 1)`` at most the number of image tokens (the paper's rule).
        order: "morton" (the paper), "hilbert" or "raster".
        enrich: False leaves the pooled keys out (plain hierarchical top-k, for comparison).
        text_queries: "dense": context queries see every token, in time and in the lists for the
            backward linear in their number times N. "sparse": they choose blocks as image queries
            do.

    Raises:
        ValueError: an option out of range; a layout without a grid, or too small for ``levels``.
    """

    name: ClassVar[str] = "log_linear"
    per_head: ClassVar[tuple[str, ...]] = ("topk",)

    block_size: int = 16
    topk: int | tuple[int, ...] = 8
    levels: int | str = 2
    order: str = "morton"
    enrich: bool = True
    text_queries: str = "dense"

    @classmethod
    def ladder(cls, layout: Layout) -> list[dict]:
        return [{"topk": topk} for topk in (4, 8, 16, 32)]

    def __post_init__(self):
        super().__post_init__()
        check_integer("block_size", self.block_size, 8, MAX_BLOCK_SIZE)
        for topk in each(self.topk):
            check_integer("topk", topk, 1)
        if self.levels != "auto":
            check_integer("levels", self.levels, 1, remedy='or "auto", from the length')
            object.__setattr__(self, "levels", int(self.levels))
        object.__setattr__(self, "block_size", int(self.block_size))
        if not isinstance(self.topk, tuple):
            object.__setattr__(self, "topk", int(self.topk))
        check_choice("order", self.order, ORDERS)
        check_flag("enrich", self.enrich)
        check_choice("text_queries", self.text_queries, ("dense", "sparse"))

    def num_levels(self, layout: Layout) -> int:
        """Levels of pooling for this layout.

        Raises:
            ValueError: the coarsest of ``levels`` would be a single token (one level is always
                possible), or the layout has no grid.
        """
        layout.grid  # noqa: B018 (raises on text-only layouts)
        tokens = layout.num_tokens - layout.num_context
        most = 1
        while self.block_size ** (most + 1) < tokens:
            most += 1
        if self.levels == "auto":
            levels = 1
            while self.block_size ** (levels + 2) <= tokens:
                levels += 1
            return levels
        if self.levels > most:
            raise ValueError(
                f"log_linear: levels={self.levels} with block_size={self.block_size} needs more "
                f"than {self.block_size}^{self.levels} image tokens, this layout has {tokens}; "
                f'use levels from 1 to {most}, or levels="auto"'
            )
        return self.levels

    def _make_geometry(self, layout: Layout, device: torch.device) -> _Geometry:
        levels = self.num_levels(layout)
        partition = Partition.of(layout, self.block_size, self.order)
        pool = Pool.of(partition.blocks, partition.grid, self.block_size)
        starts, lengths = [partition.blocks.starts], [partition.blocks.lengths]
        total, first_group, sizes = layout.num_tokens, [], []
        weights = [torch.zeros(total, dtype=torch.float64)]
        count, group = pool.count[0, 0], partition.blocks.count
        for level in range(levels if self.enrich else 0):
            if level:
                count = _group_sum(count, self.block_size)
            sizes.append(count.shape[0])
            first_group.append(group)
            # Siblings stand next to each other: one group of them is one key block.
            start, length = split_evenly(total, count.shape[0], self.block_size)
            starts.append(torch.from_numpy(start))
            lengths.append(torch.from_numpy(length))
            weights.append(count[:, 0].double().log())
            group, total = group + len(start), total + count.shape[0]
        order = partition.blocks.order
        if order is not None:
            extra = torch.arange(order.numel(), total, dtype=order.dtype)
            order = torch.cat([order, extra])
        kv_blocks = make_blocks(torch.cat(starts), torch.cat(lengths), order).to(device)
        q_blocks = partition.blocks.to(device)
        none = torch.zeros(1, 1, q_blocks.count, 1, dtype=torch.int32, device=device)
        template = Plan(
            none, none[..., 0], none[..., 0], q_blocks, kv_blocks,
            num_real_keys=layout.num_tokens, validate=False,
        )  # fmt: skip
        weight = torch.cat(weights)[None, None].to(device)
        partition = Partition(partition.blocks, *(x.to(device) for x in partition[1:]))
        return _Geometry(
            partition, pool.to(device), tuple(sizes), tuple(first_group), weight, template
        )

    def _pyramid(self, x: torch.Tensor, pool: Pool, levels: int) -> list[torch.Tensor]:
        """Means on levels 1, 2, ..., ``[B, H, n_l, D]``, in at least fp32."""
        means, count = [pool.mean(x)], pool.count
        for _ in range(levels - 1):
            total = _group_sum(means[-1] * count, self.block_size)
            count = _group_sum(count, self.block_size)
            means.append(total / count.clamp_min(1))
        return means

    @torch.no_grad()
    def plan(
        self,
        layout: Layout,
        q: torch.Tensor | None = None,
        k: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
        scale: float | None = None,
        kv_log_weight: torch.Tensor | None = None,
    ) -> Plan:
        """See :meth:`Method.plan`; only q and k make a difference.

        Raises:
            ValueError: q or k missing or of another length than the layout; more levels than the
                layout supports.
        """
        self._check(layout, q=q, k=k)
        levels = self.num_levels(layout)
        geometry = self._geometry(layout, q.device)
        padding = self._padding(layout, geometry.partition, q.device)
        grid, context = geometry.partition.grid, geometry.partition.context
        keys = [match_heads(x, q.shape[1]) for x in self._pyramid(k, geometry.pool, levels)]
        chosen = self._choose(self._pyramid(q, geometry.pool, levels), keys)
        lists, count = self._lists(chosen, geometry, padding)
        count = count[:, None, None].expand(-1, q.shape[1], lists.shape[2])
        if context.numel() == 0 or self.text_queries == "dense":
            rows = dense_context_rows(lists, count, geometry.partition)
            return self._finish(geometry, padding, q.dtype, *rows)
        pool = self._context_pool(layout, geometry, q.device)
        chosen = self._choose(self._pyramid(q, pool, levels), keys)
        context_lists, context_count = self._lists(chosen, geometry, padding)
        batch, heads, _, width = lists.shape
        n_q, width = geometry.partition.blocks.count, max(width, context_lists.shape[-1])
        merged = lists.new_zeros(batch, heads, n_q, width)
        merged[:, :, grid, : lists.shape[-1]] = lists
        merged[:, :, context, : context_lists.shape[-1]] = context_lists
        counts = count.new_zeros(*count.shape[:2], n_q)
        counts[:, :, grid] = count
        counts[:, :, context] = context_count[:, None, None]
        return self._finish(geometry, padding, q.dtype, merged, counts)

    def prepare(self, layout: Layout, device: torch.device) -> None:
        super().prepare(layout, device)
        if layout.num_context and self.text_queries == "sparse":
            self._context_pool(layout, self._geometry(layout, device), device)

    def _context_pool(self, layout: Layout, geometry: _Geometry, device: torch.device) -> Pool:
        def make() -> Pool:
            rows = geometry.partition.context.cpu()
            return Pool.of(geometry.partition.blocks, rows, self.block_size, layout.valid()).to(
                device
            )

        return self._cached("context", layout, device, make)

    def _finish(self, geometry: _Geometry, padding, dtype, lists, count, run_rows=None) -> Plan:
        count = count.expand(lists.shape[:3]).int()
        with to_be_kept():
            weight = geometry.log_weight.to(wide_dtype(dtype))
            if padding.log_weight is not None:
                extra = weight[..., padding.log_weight.shape[-1] :]
                extra = extra.expand(len(padding.log_weight), 1, -1)
                weight = torch.cat([padding.log_weight, extra], -1)
        if not self.enrich and padding.log_weight is None:
            weight = None
        return geometry.template.with_lists(lists, count, run_rows, kv_log_weight=weight)

    def _choose(self, queries: list[torch.Tensor], keys: list[torch.Tensor]) -> list[torch.Tensor]:
        """Hierarchical top-k: ``[B, H, query blocks, topk]`` chosen key blocks of each level."""
        chosen = [top_indices(queries[-1] @ keys[-1].transpose(-1, -2), self.topk)]
        offset = torch.arange(self.block_size, device=keys[0].device)
        for query, key in zip(reversed(queries[:-1]), reversed(keys[:-1])):
            parents, n = chosen[0], key.shape[2]
            rows = _groups(query, self.block_size)  # [B, H, parents, size, D]
            children = (parents[..., None] * self.block_size + offset).flatten(3)
            families = _groups(key, self.block_size).flatten(3)
            children_of = take_rows(families, parents).view(*children.shape, key.shape[-1])
            scores = rows @ children_of.transpose(-1, -2)
            scores.masked_fill_((children >= n)[..., None, :], -torch.inf)
            # There are always enough children: all parents but the last have block_size of them.
            best = top_indices(scores, min(self.topk, n))
            picked = children[..., None, :].expand(*best.shape[:-1], -1).gather(-1, best)
            # Scores that overflowed to -inf tie with absent children; never point past the end.
            picked = picked.clamp_max(n - 1)
            chosen.insert(0, picked.flatten(2, 3)[:, :, : query.shape[2]])
        return chosen

    def _lists(self, chosen: list[torch.Tensor], geometry: _Geometry, padding):
        """Key blocks ``[B, H, n, width]`` int32 of n query blocks and how many count, ``[b]``."""
        batch, heads, n = chosen[0].shape[:3]
        spread = lambda x: x.expand(batch, heads, n, -1)  # noqa: E731
        parts = [geometry.partition.grid[chosen[0]]]
        if self.enrich:
            reach = 1
            for first, picked in zip(geometry.first_group, chosen[1:]):
                reach *= self.block_size
                parts.append(first + picked.repeat_interleave(reach, 2)[:, :, :n])
            groups = -(-geometry.sizes[-1] // self.block_size)
            first = geometry.first_group[-1]
            parts.append(spread(torch.arange(first, first + groups, device=chosen[0].device)))
        seen = sum(x.shape[-1] for x in parts)
        parts.append(spread(padding.context[:, None, None]))
        return torch.cat([x.int() for x in parts], -1), padding.count + seen

    def extend(
        self, layout: Layout, k: torch.Tensor, v: torch.Tensor, **parameters: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v ``[B, H, N + extra, D]``: the means of every level appended, differentiably.

        Raises:
            ValueError: k or v of another length than the layout; more levels than it supports.
        """
        self._check(layout, k=k, v=v)
        levels = self.num_levels(layout)
        if not self.enrich:
            return k, v
        pool = self._geometry(layout, k.device).pool
        k, v = (
            torch.cat([x, *(m.to(x.dtype) for m in self._pyramid(x, pool, levels))], 2)
            for x in (k, v)
        )
        return k, v


def _groups(x: torch.Tensor, size: int) -> torch.Tensor:
    """``[..., n, D]`` to ``[..., ceil(n / size), size, D]``, zeros behind the end."""
    x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[-2] % size))
    return x.unflatten(-2, (-1, size))


def _group_sum(x: torch.Tensor, size: int) -> torch.Tensor:
    return _groups(x, size).sum(-2)


def take_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``x[b, h, rows[b, h, ...]]``: rows ``[B, H, ..., D]`` of ``x [B, H, n, D]``."""
    batch, heads, n, _ = x.shape
    first = torch.arange(0, batch * heads * n, n, device=x.device)
    first = first.view(batch, heads, *(1,) * (rows.ndim - 2))
    return x.flatten(0, 2)[rows + first]


def top_indices(scores: torch.Tensor, k: int) -> torch.Tensor:
    """``[..., min(k, n)]`` places of the largest of n scores, rising; of equals, the first ones.

    torch.topk leaves the choice among equals open. One integer key holds the score and, in its
    low half, the place, so no two are equal.
    """
    n = scores.shape[-1]
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0: no negative zero
    bits = bits ^ (bits >> 31 & 0x7FFFFFFF)
    key = bits.long() << 32 | torch.arange(n - 1, -1, -1, device=scores.device)
    best = key.topk(min(k, n), -1, sorted=False).values & 0xFFFFFFFF
    return (n - 1 - best).sort(-1).values
