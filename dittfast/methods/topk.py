"""Block top-k and top-p: each block of queries sees the key blocks that score best."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch

from ..layout import Blocks, Layout
from ..plan import Plan
from .checks import MAX_BLOCK_SIZE, check_choice, check_integer, check_tile, is_number
from .dynamic import ORDERS, DynamicMethod, Partition, Pool, dense_context_rows, match_heads
from .ladder import SHARES, block_for
from .log_linear import top_indices

SCORES = ("subblock", "mean")
DEFAULT_SHARE = 0.2
# Pairs of parts scored together, over all batch rows and heads: bounds memory.
_PAIRS_AT_ONCE = 1 << 22


class _Geometry(NamedTuple):
    partition: Partition  # on the device
    parts: Pool
    topk: torch.Tensor  # [1 or heads, 1] int64
    topp: torch.Tensor | None  # [1 or heads, 1] fp32
    template: Plan


@dataclass(frozen=True)
class TopK(DynamicMethod):
    """Each block of image queries sees the key blocks of the image that score best, and all text.

    Image tokens are put along a space-filling curve and cut into blocks, or cut into tiles. With
    means q̄ and k̄ of the tokens of a block (after RoPE), a query block a scores a key block b of L
    tokens

    - "mean": by ``scale * q̄_a · k̄_b``, what SLA, VSA and Sol-Attn select by. Its share of the
      attention is estimated as ``softmax over b of (score + log L_b)``;
    - "subblock": both blocks are cut into ``sub_block`` parts. The share of b is taken for each
      part of a, ``softmax over b of logsumexp over parts of b of (scale * q̄ · k̄ + log L)``, and
      averaged over the parts of a by their tokens. One part of a block often matters to one part
      of another, which their means do not show.

    Kept are the ``topk`` best, and as many as ``topp`` asks for; every head and batch row chooses
    for itself, and of equals the first are taken. Context tokens (text) see and are seen by
    everything but padding. The choice has no gradient.

    Scores need a value for every pair of parts, a few query blocks at a time; lists have room for
    ``topk`` blocks, with ``topp`` for all of them: ``4 * (tokens / block_size)²`` bytes for each
    head.

    Sources: SLA (arXiv:2509.24006), VSA (arXiv:2505.13389) and Sol-Attn (arXiv:2607.24027) choose
    by means; top-k joined with top-p is SpargeAttention2's. Of these only the choice is here: SLA
    (:class:`SLA`) and VSA add a trained branch, Sol-Attn the means of what was left out.

    Args:
        block_size: tokens in a block, 8 to 256.
        topk: at least 1: key blocks kept; clamped to those there are. A float in (0, 1] is a share
            of them, rounded, at least one block. A tuple has one for each head. None keeps what
            ``topp`` asks for or, without it, a share of 0.2.
        topp: share of the image's attention in [0, 1] that the kept blocks must exceed by
            estimate; a tuple has one for each head; None for none.
        score: "subblock" or "mean".
        sub_block: parts of a block for "subblock", 1 to 16.
        order: "hilbert", "morton" or "raster".
        tile: blocks of (frames, height, width) tokens, at most 256 together, in the place of
            ``block_size`` and ``order``; tiles at a border may be smaller. None for none.

    Raises:
        ValueError: an option out of range; at the plan, a tuple for another number of heads, or a
            layout without a grid.
    """

    name: ClassVar[str] = "topk"

    block_size: int = 64
    topk: int | float | tuple[int | float, ...] | None = None
    topp: float | tuple[float, ...] | None = None
    score: str = "subblock"
    sub_block: int = 4
    order: str = "hilbert"
    tile: tuple[int, int, int] | None = None

    @classmethod
    def ladder(cls, layout: Layout) -> list[dict]:
        return [{"topk": share, "block_size": block_for(layout)} for share in SHARES]

    def __post_init__(self):
        super().__post_init__()
        check_integer("block_size", self.block_size, 8, MAX_BLOCK_SIZE)
        check_integer("sub_block", self.sub_block, 1, 16, "parts of a block")
        object.__setattr__(self, "block_size", int(self.block_size))
        object.__setattr__(self, "sub_block", int(self.sub_block))
        for name in ("topk", "topp"):
            value = getattr(self, name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, name, value)
            if value == ():
                raise ValueError(f"{name} must have a value for each head; got ()")
        for value in _each(self.topk):
            if isinstance(value, float):
                if not 0 < value <= 1:
                    raise ValueError(f"topk as a share must lie in (0, 1]; got {value!r}")
            else:
                check_integer("topk", value, 1, remedy="a float is a share of the blocks")
        for value in _each(self.topp):
            if not is_number(value) or not 0 <= value <= 1:
                raise ValueError(f"topp must lie in [0, 1], a share of the mass; got {value!r}")
        check_choice("score", self.score, SCORES)
        check_choice("order", self.order, ORDERS)
        if self.tile is not None:
            object.__setattr__(self, "tile", check_tile(self.tile))

    def least(self) -> TopK:
        """Without what depends on q and k: how many blocks a share of the attention takes."""
        if self.topp is None:
            return self
        return replace(self, topk=1 if self.topk is None else self.topk, topp=None)

    def num_kept(self, blocks: int) -> tuple[int, ...]:
        """Least number of the image's ``blocks`` that are kept, for all heads or each of them."""
        topk = self.topk
        if topk is None:
            topk = 1 if self.topp is not None else DEFAULT_SHARE
        kept = (round(x * blocks) if isinstance(x, float) else int(x) for x in _each(topk))
        return tuple(min(max(1, x), blocks) for x in kept)

    @property
    def _num_parts(self) -> int:
        return self.sub_block if self.score == "subblock" else 1

    def _make_geometry(self, layout: Layout, device: torch.device) -> _Geometry:
        layout.grid  # noqa: B018 (raises on text-only layouts)
        if self.tile is None:
            size, partition = self.block_size, Partition.of(layout, self.block_size, self.order)
        else:
            size = math.prod(self.tile)
            partition = Partition.of_blocks(layout, layout.tiles(self.tile))
        parts = _parts(partition, self._num_parts, -(-size // self._num_parts))
        blocks = partition.blocks.to(device)
        none = torch.zeros(1, 1, blocks.count, 1, dtype=torch.int32, device=device)
        template = Plan(none, none[..., 0], none[..., 0], blocks, blocks, validate=False)
        topk = torch.tensor(self.num_kept(partition.grid.numel()), device=device)[:, None]
        topp = None
        if self.topp is not None:
            topp = torch.tensor(_each(self.topp), dtype=torch.float32, device=device)[:, None]
        partition = Partition(partition.blocks, *(x.to(device) for x in partition[1:]))
        return _Geometry(partition, parts.to(device), topk, topp, template)

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
        """See :meth:`Method.plan`; only q, k and scale make a difference.

        Raises:
            ValueError: q or k missing or of another length than the layout; options for another
                number of heads.
        """
        self._check(layout, q=q, k=k)
        heads = q.shape[1]
        for name in ("topk", "topp"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != heads:
                raise ValueError(
                    f"{name} has values for {len(value)} heads, q has {heads}; give one for each, "
                    "or one for all of them"
                )
        geometry = self._geometry(layout, q.device)
        partition, padding = geometry.partition, self._padding(layout, geometry.partition, q.device)
        n = partition.grid.numel()
        most = max(self.num_kept(n))
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        queries = geometry.parts.mean(q)
        keys = match_heads(geometry.parts.mean(k), heads)
        step = max(1, _PAIRS_AT_ONCE // (q.shape[0] * heads * n * self._num_parts**2))
        lists, counts = [], []
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            scores, shares = self._scores(queries, keys, geometry.parts.count, rows, scale)
            best, count = _best(scores, shares, geometry.topk, geometry.topp, most)
            chosen, count = _with_context(partition.grid[best], count, padding)
            lists.append(chosen)
            counts.append(count)
        lists, counts = torch.cat(lists, 2), torch.cat(counts, 2)
        fields = dense_context_rows(lists, counts, partition)
        return geometry.template.with_lists(*fields, kv_log_weight=padding.log_weight)

    def _scores(self, queries, keys, counts, rows: slice, scale: float):
        """``(scores, shares) [B, H, r, n]`` of the query blocks ``rows``: to rank by, and to add.

        Args:
            queries, keys: ``[B, H, n * parts, D]`` means. counts: ``[1, 1, n * parts, 1]`` tokens.
        """
        parts = self._num_parts
        own = slice(rows.start * parts, rows.stop * parts)
        logits = queries[:, :, own] @ keys.transpose(-1, -2) * scale
        weights = counts[:, :, :, 0].to(logits).log()[:, :, None]
        if self.score == "mean":
            return logits, torch.softmax(logits + weights, -1)
        logits = (logits + weights).unflatten(-1, (-1, parts)).logsumexp(-1)
        shares = torch.softmax(logits, -1) * counts[:, :, own].to(logits)
        shares = shares.unflatten(2, (-1, parts)).sum(3)
        shares = shares / shares.sum(-1, keepdim=True)
        return shares, shares


def _each(value) -> tuple:
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def _parts(partition: Partition, parts: int, size: int) -> Pool:
    """The image's blocks cut into ``parts`` of ``size`` tokens; some of a short one are empty."""
    starts, lengths = (x.long()[partition.grid][:, None] for x in partition.blocks[:2])
    offset = torch.arange(parts) * size
    held = (lengths - offset).clamp(0, size).flatten()
    starts = torch.where(offset < lengths, starts + offset, starts).flatten()
    blocks = Blocks(starts, held, partition.blocks.order)
    return Pool.of(blocks, torch.arange(held.numel()), size)


def _best(scores, shares, topk, topp, most: int):
    """``(blocks [B, H, r, width], count [B, H, r])``: the first ``count`` blocks are kept.

    Args:
        topk: ``[1 or H, 1]``, at most ``most``. topp: ``[1 or H, 1]`` or None.
    """
    shape = scores.shape[:3]
    if topp is None and topk.numel() == 1:
        return top_indices(scores, most), topk.expand(shape)
    by = scores.argsort(dim=-1, descending=True, stable=True)
    if topp is None:
        return by[..., :most], topk.expand(shape)
    sums = shares.gather(-1, by).cumsum(-1)
    count = (sums <= topp[..., None]).sum(-1) + 1
    return by, torch.maximum(count, topk).clamp_max(scores.shape[-1])


def _with_context(blocks: torch.Tensor, count: torch.Tensor, padding):
    """The first ``count`` blocks of each list and the context blocks in use, rising; their number.

    What a list has room for behind them is 0.
    """
    last = torch.iinfo(torch.int32).max
    slot = torch.arange(blocks.shape[-1], device=blocks.device)
    parts = [blocks.int().masked_fill(slot >= count[..., None], last)]
    if padding.context.shape[-1]:
        slot = torch.arange(padding.context.shape[-1], device=blocks.device)
        context = padding.context.int().masked_fill(slot >= padding.count[:, None], last)
        parts.append(context[:, None, None].expand(*blocks.shape[:3], -1))
        count = count + padding.count[:, None, None]
    lists = torch.cat(parts, -1).sort(-1).values
    return lists.masked_fill(lists == last, 0), count
