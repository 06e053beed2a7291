"""Rectified sparse attention: top blocks, and block means of the rest (arXiv:2511.19835)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar, NamedTuple

import torch

from ..layout import Grid, Layout
from ..plan import Plan
from .checks import MAX_BLOCK_SIZE, check_choice, check_flag, check_integer, each, is_number
from .dynamic import ORDERS, ChosenLists, DynamicMethod, Partition, Pool, match_heads
from .ladder import SHARES, block_for

DEFAULT_DROP = 0.8
# Elements of fp32 workspace for the deviation statistics.
_WORKSPACE = 1 << 26
# Pairs of blocks scored together, over all batch rows and heads: bounds memory.
_PAIRS_AT_ONCE = 1 << 22


class _Geometry(NamedTuple):
    partition: Partition  # on the device
    pool: Pool
    context_tokens: torch.Tensor
    always: torch.Tensor | None  # [n, n] bool, image block pairs kept whatever the scores
    template: Plan


@dataclass(frozen=True)
class Rectified(DynamicMethod):
    """Block top-k whose softmax mass is corrected by the block means of what it drops.

    Image tokens are put along a space-filling curve and cut into blocks. Block means of q and k
    give each block pair a share P of the attention; text keys are not pooled but scored one by
    one ("isolated pooling"), so that P has the weight of every token right. A query block n sees
    the blocks of largest P (at least ``topk`` of them, and enough for ``top_p``; text counts as
    one candidate), the blocks next to it in the image, and all text. Of the others, those whose
    estimate is trustworthy (gain ``|q̄·k̄|`` above error
    ``|mean|q - q̄|·k̄| + |q̄·mean|k - k̄||``) enter by their mean value::

        out = R · softmax(seen keys) v + Σ P · mean(v)     R = 1 - (the ΣP of that sum)

    Context queries (text) are dense. Differentiable in q, k and v with the selection held fixed.

    Source: Rectified SpaAttn, arXiv:2511.19835, and its code, which the error is taken from: means
    of absolute deviations meet signed means in it, so it is an estimate and no bound. Statistics
    are fp32 means, so half precision cannot overflow; a short block counts its true tokens.

    Args:
        block_size: tokens in a block, 8 to 256.
        topk: at least 1: key blocks of image tokens each query block keeps, or more; clamped to
            those there are. Give this or ``drop``. Lists have a value for each head, here and for
            ``drop`` and ``top_p``.
        drop: share of the image's key blocks to drop, in [0, 1):
            ``topk = max(1, floor((1 - drop) · blocks))``. Default 0.8.
        top_p: blocks are kept until their P, in falling order, sums to more than this; in [0, 1].
        order: "hilbert", "morton" or "raster".
        neighbors: keep key blocks that hold a spatial neighbour (26 in a video, 8 in an image) of
            a token of the query block.
        first_frame: keep all pairs of blocks that hold tokens of a first frame.
        round_up: count a short last block in ``drop`` (the Wan 2.1 code does; others leave it).
        rectify: False drops the correction: plain block top-k, for comparison.

    Raises:
        ValueError: an option out of range, or both ``topk`` and ``drop``; a layout without a grid.
    """

    name: ClassVar[str] = "rectified"
    per_head: ClassVar[tuple[str, ...]] = ("topk", "drop", "top_p")

    block_size: int = 128
    topk: int | tuple[int, ...] | None = None
    drop: float | tuple[float, ...] | None = None
    top_p: float | tuple[float, ...] = 0.3
    order: str = "hilbert"
    neighbors: bool = True
    first_frame: bool = False
    round_up: bool = False
    rectify: bool = True

    @classmethod
    def ladder(cls, layout: Layout) -> list[dict]:
        plain = {"block_size": block_for(layout), "top_p": 0.0, "neighbors": False}
        return [{"drop": 1 - share, **plain} for share in SHARES]

    def __post_init__(self):
        super().__post_init__()
        check_integer("block_size", self.block_size, 8, MAX_BLOCK_SIZE)
        for topk in each(self.topk) if self.topk is not None else ():
            check_integer("topk", topk, 1)
        if self.topk is not None and not isinstance(self.topk, tuple):
            object.__setattr__(self, "topk", int(self.topk))
        object.__setattr__(self, "block_size", int(self.block_size))
        if self.topk is not None and self.drop is not None:
            raise ValueError(f"give topk or drop, not both; got topk={self.topk}, drop={self.drop}")
        for drop in each(self.drop) if self.drop is not None else ():
            if not is_number(drop) or not 0 <= drop < 1:
                raise ValueError(f"drop must lie in [0, 1), 0 drops nothing; got {drop!r}")
        for top_p in each(self.top_p):
            if not is_number(top_p) or not 0 <= top_p <= 1:
                raise ValueError(f"top_p must lie in [0, 1], a share of the mass; got {top_p!r}")
        check_choice("order", self.order, ORDERS)
        for name in ("neighbors", "first_frame", "round_up", "rectify"):
            check_flag(name, getattr(self, name))

    def least(self) -> Rectified:
        """The best blocks alone: neighbours and probable blocks depend on q and k."""
        return replace(self, neighbors=False, top_p=0.0)

    def num_kept(self, layout: Layout) -> int:
        """Least number of key blocks of image tokens that a query block keeps by its scores."""
        if self.topk is not None:
            return self.topk
        tokens = layout.num_tokens - layout.num_context
        blocks = -(-tokens // self.block_size) if self.round_up else tokens // self.block_size
        drop = DEFAULT_DROP if self.drop is None else self.drop
        # 1 - 0.8 is a little less than 0.2 in floating point: do not lose a block to that.
        return max(1, int((1 - drop) * blocks + 1e-9))

    def _make_geometry(self, layout: Layout, device: torch.device) -> _Geometry:
        layout.grid  # noqa: B018 (raises on text-only layouts)
        partition = Partition.of(layout, self.block_size, self.order)
        pool = Pool.of(partition.blocks, partition.grid, self.block_size)
        at = torch.from_numpy(layout.coordinates())
        always = None
        if self.neighbors or self.first_frame:
            n = partition.grid.numel()
            # A slot past the end of a short block repeats one of its tokens.
            block = torch.full((layout.num_tokens,), -1)
            block[pool.token] = torch.arange(n)[:, None].expand(pool.token.shape)
            always = torch.zeros(n, n, dtype=torch.bool)
            if self.neighbors:
                always |= neighbor_blocks(layout, block, n)
            if self.first_frame:
                first = torch.zeros(n, dtype=torch.bool)
                first[block[at[:, 1] == 0]] = True
                always |= first[:, None] & first
            always = always.to(device)
        blocks = partition.blocks.to(device)
        none = torch.zeros(1, 1, blocks.count, 1, dtype=torch.int32, device=device)
        template = Plan(none, none[..., 0], none[..., 0], blocks, blocks, validate=False)
        return _Geometry(
            Partition(partition.blocks, *(x.to(device) for x in partition[1:])),
            pool.to(device),
            (at[:, 0] < 0).nonzero()[:, 0].to(device),
            always,
            template,
        )

    def plan(
        self,
        layout: Layout,
        q: torch.Tensor | None = None,
        k: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
        scale: float | None = None,
        kv_log_weight: torch.Tensor | None = None,
    ) -> Plan:
        """See :meth:`Method.plan`. Without ``rectify``, v may be left out.

        ``out_scale`` and ``out_residual`` of the plan carry gradients to q, k and v.

        Raises:
            ValueError: q, k or v missing or of another length than the layout.
        """
        needed = {"q": q, "k": k, "v": v} if self.rectify else {"q": q, "k": k}
        self._check(layout, **needed)
        geometry = self._geometry(layout, q.device)
        pool, padding = geometry.pool, self._padding(layout, geometry.partition, q.device)
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        weight = padding.log_weight
        if kv_log_weight is not None:
            weight = kv_log_weight if weight is None else weight + kv_log_weight
        q_mean, k_mean_own = pool.mean(q), pool.mean(k)
        k_mean = match_heads(k_mean_own, q.shape[1])
        words = _text_keys(k, geometry.context_tokens, weight, q_mean)
        v_mean = q_off = k_off = None
        if self.rectify:
            v_mean = match_heads(pool.mean(v), q.shape[1])
            with torch.no_grad():
                q_off = mean_deviation(q, q_mean, pool)
                k_off = match_heads(mean_deviation(k, k_mean_own, pool), q.shape[1])
        n, topk = pool.token.shape[0], self.num_kept(layout)
        step = max(1, _PAIRS_AT_ONCE // (q.shape[0] * q.shape[1] * n))
        log_counts = pool.count[..., 0].to(q_mean).log()
        lists, kept, residual = ChosenLists(geometry.partition, padding, q), [], []
        for start in range(0, n, step):
            rows = slice(start, start + step)
            means = q_mean[:, :, rows]
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.rectify):
                logits = means @ k_mean.transpose(-1, -2) * scale + log_counts
                shares, scores = isolated_shares(logits, means, words, scale)
            with torch.no_grad():
                seen = self._select(shares, scores, topk, n)
                if geometry.always is not None:
                    seen |= geometry.always[rows]
                lists.add(rows, seen)
            if self.rectify:
                with torch.no_grad():
                    gain = (means @ k_mean.transpose(-1, -2)).abs_()
                    error = (q_off[:, :, rows] @ k_mean.transpose(-1, -2)).abs_()
                    error += (means @ k_off.transpose(-1, -2)).abs_()
                    moved = ~seen & (gain > error)
                kept.append((shares[..., :n] * ~moved).sum(-1) + shares[..., n:].sum(-1))
                residual.append((shares[..., :n] * moved) @ v_mean)
        fields = {"kv_log_weight": padding.log_weight, "out_scale": None, "out_residual": None}
        if self.rectify:
            fields |= _epilogue(geometry.partition, torch.cat(kept, 2), torch.cat(residual, 2))
        return geometry.template.with_lists(lists.lists, lists.count, **fields)

    def _select(self, shares, scores, topk: int, n: int) -> torch.Tensor:
        """``[B, H, n, n]`` bool: the pairs that top-k or top-p keep; of equals, the first ones."""
        # Ranked by score: shares that underflow to 0 would all look alike.
        by = scores.argsort(dim=-1, descending=True, stable=True)
        sums = shares.gather(-1, by).cumsum(-1)
        count = (sums <= self.top_p).sum(-1, keepdim=True) + 1
        keep = torch.arange(shares.shape[-1], device=shares.device) < count.clamp_min(topk)
        return torch.zeros_like(keep).scatter_(-1, by, keep)[..., :n]


def _text_keys(k, text, log_weight, like):
    """``(keys [B, H, t, D], log weights [B|1, H|1, t] or None)`` of the text, or None without any.

    Args:
        k: ``[B, Hk, N, D]``. text: ``[t]`` indices of the context tokens.
        log_weight: ``[B|1, H|1, N]``, -inf on padding, or None.
        like: a tensor ``[B, H, ...]`` in the dtype wanted.
    """
    if text.numel() == 0:
        return None
    keys = match_heads(k.index_select(2, text).to(like.dtype), like.shape[1])
    if log_weight is not None:
        log_weight = log_weight.index_select(-1, text)
        # Padding may hold anything, also NaN.
        keys = keys.masked_fill((log_weight == -torch.inf)[..., None], 0)
    return keys, log_weight


def isolated_shares(logits, q_mean, words, scale: float):
    """Attention shares of the image blocks and, in one last column, of all text together.

    Args:
        logits: ``[B, H, r, n]``, image block scores plus the log of the keys' token counts.
        q_mean: ``[B, H, r, D]``, the means of r query blocks.
        words: text keys and their log weights; None without text: then there is no last column.

    Returns:
        ``(shares, scores)``, both ``[B, H, r, n + 1]`` (or n): rows of shares add up to 1 and are
        proportional to exp(scores); scores carry no gradient.
    """
    if words is None:
        return torch.softmax(logits, -1), logits.detach()
    keys, log_weight = words
    words = q_mean @ keys.transpose(-1, -2) * scale
    if log_weight is not None:
        words = words + log_weight[:, :, None]
    shares = torch.softmax(torch.cat([logits, words], -1), -1)
    n = logits.shape[-1]
    shares = torch.cat([shares[..., :n], shares[..., n:].sum(-1, keepdim=True)], -1)
    total = words.detach().logsumexp(-1, keepdim=True)
    return shares, torch.cat([logits.detach(), total], -1)


def mean_deviation(x: torch.Tensor, mean: torch.Tensor, pool: Pool) -> torch.Tensor:
    """``[B, H, n, D]``: mean over each block of ``|x - mean|``, in the dtype of ``mean``."""
    step = max(1, _WORKSPACE // (x.shape[0] * pool.token.numel() * x.shape[-1]))
    parts = []
    for heads, centre in zip(x.detach().split(step, 1), mean.detach().split(step, 1)):
        off = pool.hide((pool.gather(heads) - centre[..., None, :]).abs_())
        parts.append(off.sum(-2) / pool.count)
    return torch.cat(parts, 1)


def neighbor_blocks(layout: Layout, block: torch.Tensor, n: int) -> torch.Tensor:
    """``[n, n]`` bool: pairs of image blocks that hold tokens at most one step apart.

    A step changes frame, row and column by at most 1. Symmetric; every block is its own
    neighbour. ``block [num_tokens]`` is the block of each token.
    """
    pairs = torch.arange(n) * (n + 1)
    for start, segment in layout.spans():
        if not isinstance(segment, Grid):
            continue
        volume = block[start : start + segment.length].view(segment.shape)
        for step in product((-1, 0, 1), repeat=3):
            if step <= (0, 0, 0):
                continue
            here, there = volume, volume
            for dim, d in enumerate(step):
                size = segment.shape[dim] - abs(d)
                here = here.narrow(dim, max(0, -d), max(0, size))
                there = there.narrow(dim, max(0, d), max(0, size))
            pairs = torch.cat([pairs, (here * n + there).flatten()]).unique()
    near = torch.zeros(n, n, dtype=torch.bool)
    near.view(-1)[pairs] = True
    return near | near.T


def _epilogue(partition: Partition, kept: torch.Tensor, residual: torch.Tensor) -> dict:
    """Scale and residual of every query block: 1 and 0 for those of context."""
    rows = partition.blocks.count
    scale = kept.new_ones(*kept.shape[:2], rows).index_copy(2, partition.grid, kept)
    empty = residual.new_zeros(*residual.shape[:2], rows, residual.shape[-1])
    return {"out_scale": scale, "out_residual": empty.index_copy(2, partition.grid, residual)}
