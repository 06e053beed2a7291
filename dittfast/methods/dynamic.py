"""What the methods that plan from q and k share: pooled blocks, padding, cached geometry."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch

from ..cache import BytesLRU
from ..layout import Blocks, Layout
from ..plan import to_be_kept
from .base import Method

# What a method keeps of layouts: a server sees many sizes and prompt lengths. The number is far
# above what a pipeline holds, so that bytes are what bounds it.
_MOST_KEPT = 256
_MOST_BYTES = 256 << 20

# Orders of tokens in blocks, the usual one first.
ORDERS = ("hilbert", "morton", "raster")

# Tokens that are gathered at once on a CPU: a megabyte or two of a head.
_PIECE_TOKENS = 8192


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype statistics are taken in: fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(dtype, torch.float32)


class Pool(NamedTuple):
    """Some blocks of a sequence, ready for masked statistics of their tokens.

    Attributes:
        token: ``[n, size]`` int64; slots past the end of a short block repeat its first token.
        short: ``[r]`` int64, the blocks in which some slot does not count.
        outside: ``[b|1, 1, r, size, 1]`` bool, the slots of those that do not.
        count: ``[b|1, 1, n, 1]`` fp32, tokens that count in each block (may be 0).
        span: ``(first, end)`` where the tokens are simply ``first ... end - 1``, else None.
    """

    token: torch.Tensor
    short: torch.Tensor
    outside: torch.Tensor
    count: torch.Tensor
    span: tuple[int, int] | None

    @classmethod
    def of(cls, blocks: Blocks, rows: torch.Tensor, size: int, valid=None) -> Pool:
        """The blocks numbered ``rows``, on the CPU; ``valid [b, num_tokens]`` hides padding."""
        starts, lengths = blocks.starts.long()[rows], blocks.lengths.long()[rows]
        slot = torch.arange(size)
        inside = slot < lengths[:, None]
        token = starts[:, None] + torch.where(inside, slot, 0)
        if blocks.order is not None:
            token = blocks.order.long()[token]
        inside = inside[None] if valid is None else inside & valid[:, token]
        short = (~inside).any(-1).any(0).nonzero()[:, 0]
        outside = ~inside[:, None, short, :, None]
        count = inside.sum(-1)[:, None, :, None].float()
        first = int(token.min())
        tokens = torch.arange(first, first + token.numel()).view_as(token)
        span = None
        if short.numel() == 0 and torch.equal(token, tokens):
            span = (first, first + token.numel())
        return cls(token, short, outside, count, span)

    def to(self, device) -> Pool:
        return Pool(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in self))

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., n, size, D]``: the tokens of each block of ``x [..., N, D]``."""
        if self.span is not None:
            return x[..., slice(*self.span), :].unflatten(-2, self.token.shape)
        return x.index_select(-2, self.token.flatten()).unflatten(-2, self.token.shape)

    def hide(self, tokens: torch.Tensor) -> torch.Tensor:
        """``tokens [B, H, n, size, D]`` with 0, in place, in the slots that do not count."""
        if self.short.numel() == 0:
            return tokens
        kept = tokens.index_select(2, self.short).masked_fill(self.outside, 0)
        return tokens.index_copy_(2, self.short, kept)

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, H, n, D]`` means over the tokens that count, in at least fp32; 0 where none do."""
        if self.span is not None or x.device.type != "cpu":
            total = self.hide(self.gather(x)).sum(-2, dtype=wide_dtype(x.dtype))
            return total / self.count.clamp_min(1)
        total = self._sums(x, self.token)
        if self.short.numel():
            kept = x.index_select(-2, self.token[self.short].flatten())
            kept = kept.unflatten(-2, (-1, self.token.shape[1])).masked_fill(self.outside, 0)
            kept = kept.sum(-2, dtype=total.dtype)
            total = total.index_copy(2, self.short, kept)
        return total / self.count.clamp_min(1)

    @staticmethod
    def _sums(x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """``[..., n, D]`` sums of ``x [..., N, D]`` over ``token [n, size]``.

        Gathered in pieces, whose rows are still in a CPU's cache when they are summed.
        """
        pieces = [
            x.index_select(-2, rows.flatten())
            .unflatten(-2, rows.shape)
            .sum(-2, dtype=wide_dtype(x.dtype))
            for rows in token.split(max(1, _PIECE_TOKENS // token.shape[1]))
        ]
        return torch.cat(pieces, -2)


class Partition(NamedTuple):
    """The blocks of a layout and which of them hold image tokens.

    Attributes:
        blocks: all blocks; none spans two segments.
        grid: ``[n]`` int64, blocks of image tokens.
        context: ``[c]`` int64, blocks of context tokens.
    """

    blocks: Blocks
    grid: torch.Tensor
    context: torch.Tensor

    @classmethod
    def of(cls, layout: Layout, block_size: int, order: str) -> Partition:
        permutation = layout.order(order)
        if torch.equal(permutation, torch.arange(permutation.numel(), dtype=permutation.dtype)):
            permutation = None
        return cls.of_blocks(layout, layout.blocks(block_size, permutation))

    @classmethod
    def of_blocks(cls, layout: Layout, blocks: Blocks) -> Partition:
        """The same of blocks that span no two segments and leave context in its place."""
        # Context tokens keep their places, so a context block starts at its own first token.
        context = torch.zeros(layout.num_tokens, dtype=torch.bool)
        context[torch.from_numpy(layout.coordinates()[:, 0] < 0)] = True
        is_context = context[blocks.starts.long()]
        return cls(blocks, (~is_context).nonzero()[:, 0], is_context.nonzero()[:, 0])


class Padding(NamedTuple):
    """What ``Layout.context_lengths`` means for one partition.

    Attributes:
        log_weight: ``[b, 1, num_tokens]`` fp32 with -inf on padding; None where nothing is padded.
        context: ``[b|1, c]`` int64 context blocks, those that hold valid tokens first.
        count: ``[b|1]`` int64, how many do.
    """

    log_weight: torch.Tensor | None
    context: torch.Tensor
    count: torch.Tensor

    @classmethod
    def of(cls, layout: Layout, partition: Partition, device) -> Padding:
        context, valid = partition.context, layout.valid()
        if valid is None:
            used = torch.ones(1, context.numel(), dtype=torch.bool)
        else:
            # Valid tokens come first in their segment: the first one of a block decides.
            used = valid[:, partition.blocks.starts.long()[context]]
        by = torch.argsort((~used).to(torch.int8), dim=-1, stable=True)
        return cls(layout.kv_log_weight(device), context[by].to(device), used.sum(-1).to(device))


@dataclass(frozen=True)
class DynamicMethod(Method):
    """A method whose plan is made from q and k at every call.

    Everything that depends on the layout alone is computed once per (layout, device) and kept in
    the method object, so hold on to one object per model. At most 256 MB are kept, and what was
    used longest ago is dropped first.
    """

    static: ClassVar[bool] = False

    def __post_init__(self):
        object.__setattr__(self, "_cache", BytesLRU(_MOST_KEPT, _MOST_BYTES))

    def _cached(self, kind: str, layout: Layout, device: torch.device, make: Callable):
        # A text, because torch.compile guards a graph by all keys of a dict unless they are texts.
        key = f"{kind} {layout.key} {device.type}:{device.index}"
        if torch.compiler.is_compiling():
            kept = self._cache.peek(key)
            if kept is None:
                raise RuntimeError(
                    f"{self.name} has nothing prepared for {layout.key}; call "
                    "method.prepare(layout, device) before each pass through compiled code"
                )
            return kept

        def lasting():
            with to_be_kept():
                return make()

        return self._cache.get(key, lasting)

    def prepare(self, layout: Layout, device: torch.device) -> None:
        """See :meth:`Method.prepare`; microseconds where nothing is missing."""
        self._padding(layout, self._geometry(layout, device).partition, device)

    def _geometry(self, layout: Layout, device: torch.device):
        # Text lengths change with every prompt; the geometry does not.
        bare = replace(layout, context_lengths=None)
        return self._cached("geometry", bare, device, lambda: self._make_geometry(bare, device))

    @abstractmethod
    def _make_geometry(self, layout: Layout, device: torch.device):
        """Everything planning needs that depends on the layout alone."""

    def _padding(self, layout: Layout, partition: Partition, device: torch.device) -> Padding:
        make = lambda: Padding.of(layout, partition, device)  # noqa: E731
        return self._cached("padding", layout, device, make)

    def _check(self, layout: Layout, **tensors: torch.Tensor | None) -> None:
        """Raise ValueError where q, k or v are missing or do not fit the layout."""
        self.check_one_value()
        for name, x in tensors.items():
            if x is None:
                raise ValueError(
                    f"{self.name} plans from {', '.join(tensors)}, but {name} is None; "
                    f"call plan(layout, {', '.join(tensors)})"
                )
            if x.ndim != 4 or x.shape[2] != layout.num_tokens:
                raise ValueError(
                    f"{name} must be [B, H, {layout.num_tokens}, D] for this layout, "
                    f"got {list(x.shape)}"
                )
            rows = layout.context_lengths
            if rows is not None and len(rows) not in (1, x.shape[0]):
                raise ValueError(
                    f"the layout has context lengths for {len(rows)} batch rows, "
                    f"{name} has {x.shape[0]}"
                )


def shown_means(pool: Pool, x: torch.Tensor, weight: torch.Tensor | None):
    """Means over the tokens of each block that a log weight does not hide.

    Args:
        x: ``[B, H, N, D]``; hidden tokens may hold anything, also NaN.
        weight: ``[B|1, H|1, N]``, -inf where a token is hidden; None for none.

    Returns:
        ``(means [B, H, n, D], seen [B|1, H|1, n] bool)``: 0 and False where a block has no other
        tokens; seen is None without a weight.
    """
    if weight is None:
        return pool.mean(x), None
    shown = (weight > -torch.inf)[..., None]
    share = pool.mean(shown.to(wide_dtype(x.dtype)))
    means = pool.mean(x.masked_fill(~shown, 0)) / share.clamp_min(1e-9)
    return means, share[..., 0] > 0


def match_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """``[B, Hk, n, D]`` repeated to ``heads`` heads (grouped-query attention)."""
    groups = heads // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, 1)


def dense_context_rows(lists: torch.Tensor, count: torch.Tensor, partition: Partition):
    """Rows for all query blocks, of which those of context see every block of the sequence.

    Weights have to hide the padding.

    Args:
        lists: ``[B, H, n, width]`` int32 key blocks that the image's n blocks see, and how many of
            them count, ``[B, H, n]``.

    Returns:
        What :meth:`Plan.with_lists` takes: lists and counts of all blocks, and which may be runs.
    """
    context, n_q = partition.context, partition.blocks.count
    if context.numel() == 0:
        return lists, count.int(), None
    # A list where there is room for one, else a run.
    batch, heads, _, width = lists.shape
    merged = lists.new_zeros(batch, heads, n_q, width)
    merged[:, :, partition.grid] = lists
    counts = count.new_full((*count.shape[:2], n_q), n_q)
    counts[:, :, partition.grid] = count
    if n_q > width:
        return merged, counts.int(), context
    merged[:, :, context, :n_q] = torch.arange(n_q, dtype=lists.dtype, device=lists.device)
    return merged, counts.int(), None


class ChosenLists:
    """Block lists ``[B, H, nQ, nK]`` int32 and their counts, from a few rows' choice at a time.

    Lists are as wide as there are key blocks: finding a smaller width would wait for the device.
    Rows of context see every block that holds a valid token.
    """

    def __init__(self, partition: Partition, padding: Padding, q: torch.Tensor):
        n, context = partition.blocks.count, padding.context
        self.grid = partition.grid
        self.used = torch.ones(1, 1, 1, n, dtype=torch.bool, device=q.device)
        if context.numel():
            used = torch.zeros(len(padding.count), n, dtype=torch.bool, device=q.device)
            slot = torch.arange(context.shape[1], device=q.device)
            used.scatter_(1, context, slot < padding.count[:, None])
            used[:, self.grid] = True
            self.used = used[:, None, None]
        self.blocks = torch.arange(n, dtype=torch.int32, device=q.device)
        shape = (*q.shape[:2], n)
        self.lists = torch.zeros(*shape, n, dtype=torch.int32, device=q.device)
        self.count = torch.zeros(shape, dtype=torch.int32, device=q.device)
        if partition.context.numel():
            self._put(partition.context, self.used.expand(*q.shape[:2], 1, n))

    def add(self, rows: slice, seen: torch.Tensor) -> None:
        """``seen [B, H, r, grid blocks]`` bool: what the image blocks ``rows`` see of the image."""
        mask = self.used.expand(*seen.shape[:3], -1).clone()
        mask[..., self.grid] = seen
        self._put(self.grid[rows], mask)

    def _put(self, rows: torch.Tensor, mask: torch.Tensor) -> None:
        n = self.blocks.numel()
        place = torch.where(mask, mask.cumsum(-1) - 1, n)
        lists = self.lists.new_zeros(*mask.shape[:3], n + 1)
        lists = lists.scatter_(-1, place, self.blocks.expand(mask.shape))[..., :n]
        count = mask.sum(-1, dtype=torch.int32)
        shape = (*mask.shape[:2], rows.numel())
        self.lists.index_copy_(2, rows, lists.expand(*shape, n))
        self.count.index_copy_(2, rows, count.expand(shape))
