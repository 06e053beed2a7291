"""Sol-Attn: blocks above a threshold, and the rest as one pooled key (arXiv:2607.24027)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch

from ..layout import Layout
from ..plan import Plan
from .checks import MAX_BLOCK_SIZE, check_choice, check_integer, is_number
from .dynamic import (
    ORDERS,
    ChosenLists,
    DynamicMethod,
    Partition,
    Pool,
    match_heads,
    shown_means,
    wide_dtype,
)
from .ladder import block_for

TAILS = ("block", "query", "none")
# Scores at once, over all batch rows and heads: bounds memory.
_SCORES_AT_ONCE = 1 << 22
# Least variance of a row's scores, those of the published kernel, which counts in powers of 2.
_LEAST_VARIANCE = 1e-6 * math.log(2) ** 2


class _Geometry(NamedTuple):
    partition: Partition  # on the device
    image: Pool  # blocks of image tokens
    every: Pool  # all blocks
    slot: torch.Tensor  # [N] int64, each token's place in `image`; text stands behind its end
    template: Plan


class _Keys(NamedTuple):
    """Statistics of the key blocks, at least fp32, with as many heads as q.

    Attributes:
        mean: ``[B, H, n, D]`` of each image block. value: likewise, of v; None without a tail.
        log_count: ``[B|1, H|1, n]``, the log of its tokens; -inf where all are hidden.
        centre, variance: ``[B, H, 1, D]`` over the means of all blocks, text too.
    """

    mean: torch.Tensor
    value: torch.Tensor | None
    log_count: torch.Tensor
    centre: torch.Tensor
    variance: torch.Tensor


@dataclass(frozen=True)
class Sol(DynamicMethod):
    """Blocks whose score stands out are seen exactly, all others together as one pooled key.

    The score of a query block a and a key block b is that of their means, with the keys centred::

        S_ab = scale · q̄_a · (k̄_b - mean of all k̄)

    A row's scores have about the variance ``scale² Σ q̄_ac² var_c`` (var over all k̄, per channel).
    Exact are the blocks with S above ``tau`` times its root, the blocks before and behind the own
    one, and all text. What is left enters the softmax of each query by the blocks' means of v::

        tail="block"   logit S_ab + log(tokens of b), as published: the same for all queries in a
        tail="query"   logit scale · q_i · k̄_b + log(tokens of b): each query's own, and nearer

    Context queries (text) are dense. Differentiable in q, k and v with the choice held fixed. A
    log weight of the call counts in the tail, too; keys it hides are in no mean.

    Source: Sol-Attn, arXiv:2607.24027, and its reference code. Text is what its code calls sinks.

    Args:
        tau: the threshold, in standard deviations of a row's scores, at least 0. More of them is
            sparser; infinity keeps neighbours and text alone.
        tail: "block" (as published), "query", which costs a product of all queries with the means
            of all blocks, or "none", which drops the rest.
        block_size: tokens in a block, 8 to 256.
        order: "raster" (as published), "hilbert" or "morton": the order of tokens in blocks.

    Raises:
        ValueError: an option out of range; a layout without a grid.
    """

    name: ClassVar[str] = "sol"

    tau: float = 1.0
    tail: str = "block"
    block_size: int = 64
    order: str = "raster"

    @classmethod
    def ladder(cls, layout: Layout) -> list[dict]:
        return [{"tau": tau, "block_size": block_for(layout)} for tau in (2.0, 1.5, 1.0, 0.5)]

    def __post_init__(self):
        super().__post_init__()
        if not is_number(self.tau) or not self.tau >= 0:
            got = f"got {self.tau!r} (1 is published; more is sparser)"
            raise ValueError(f"tau must be a number of standard deviations, at least 0; {got}")
        check_choice("tail", self.tail, TAILS)
        check_integer("block_size", self.block_size, 8, MAX_BLOCK_SIZE)
        object.__setattr__(self, "block_size", int(self.block_size))
        check_choice("order", self.order, ORDERS)

    def least(self) -> Sol:
        """Neighbours alone: what is above the threshold depends on q and k."""
        return replace(self, tau=math.inf)

    def _make_geometry(self, layout: Layout, device: torch.device) -> _Geometry:
        layout.grid  # noqa: B018 (raises on text-only layouts)
        partition = Partition.of(layout, self.block_size, self.order)
        blocks, grid = partition.blocks, partition.grid
        image = Pool.of(blocks, grid, self.block_size)
        every = Pool.of(blocks, torch.arange(blocks.count), self.block_size)
        slot = torch.full((layout.num_tokens,), image.token.numel())
        # A slot past the end of a short block repeats a token, and gives the same for it.
        slot[image.token.flatten()] = torch.arange(image.token.numel())
        blocks = blocks.to(device)
        none = torch.zeros(1, 1, blocks.count, 1, dtype=torch.int32, device=device)
        template = Plan(none, none[..., 0], none[..., 0], blocks, blocks, validate=False)
        return _Geometry(
            Partition(partition.blocks, *(x.to(device) for x in partition[1:])),
            image.to(device),
            every.to(device),
            slot.to(device),
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
        """See :meth:`Method.plan`. Without a tail, v may be left out.

        The plan's tail carries gradients to q, k and v.

        Raises:
            ValueError: q, k or v missing or of another length than the layout.
        """
        given = {"q": q, "k": k} if self.tail == "none" else {"q": q, "k": k, "v": v}
        self._check(layout, **given)
        geometry = self._geometry(layout, q.device)
        padding = self._padding(layout, geometry.partition, q.device)
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        weight = padding.log_weight
        if kv_log_weight is not None:
            weight = kv_log_weight if weight is None else weight + kv_log_weight
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.tail != "none"):
            q_mean = geometry.image.mean(q)
            keys = self._key_statistics(k, v, geometry, weight, q.shape[1])
        grid, n = geometry.partition.grid, geometry.image.token.shape[0]
        per_row = n * (self.block_size if self.tail == "query" else 1)
        step = max(1, _SCORES_AT_ONCE // (q.shape[0] * q.shape[1] * per_row))
        lists, logits, values = ChosenLists(geometry.partition, padding, q), [], []
        for start in range(0, n, step):
            rows = slice(start, start + step)
            means = q_mean[:, :, rows]
            scores = means @ (keys.mean - keys.centre).transpose(-1, -2) * scale
            with torch.no_grad():
                variance = (means.square() * keys.variance).sum(-1, keepdim=True) * scale**2
                limit = float(self.tau) * (variance + _LEAST_VARIANCE).sqrt()
                near = (grid[rows, None] - grid).abs() <= 1
                seen = (scores > limit) | near
                lists.add(rows, seen)
            if self.tail == "query":
                tokens = q.index_select(2, geometry.image.token[rows].flatten()).to(q_mean.dtype)
                scores = tokens @ keys.mean.transpose(-1, -2) * scale
                seen = seen.repeat_interleave(self.block_size, 2)
            if self.tail != "none":
                logit, value = _pooled(scores + keys.log_count[:, :, None], seen, keys.value)
                logits.append(logit)
                values.append(value)
        fields = {"kv_log_weight": padding.log_weight}
        if logits:
            tail = torch.cat(logits, 2), torch.cat(values, 2)
            fields |= self._tail(*tail, q, keys.centre, scale, geometry)
        return geometry.template.with_lists(lists.lists, lists.count, **fields)

    def _key_statistics(self, k, v, geometry: _Geometry, weight, heads: int) -> _Keys:
        image, every = geometry.image, geometry.every
        dtype = wide_dtype(k.dtype)
        if weight is not None and weight.shape[1] > 1:
            k, v = match_heads(k, heads), None if v is None else match_heads(v, heads)
        means, seen = shown_means(every, k, weight)
        mean = means.index_select(2, geometry.partition.grid)
        if weight is None:
            value = None if self.tail == "none" else image.mean(v)
            log_count = image.count[..., 0].to(dtype).log()
        else:
            factor = weight.to(dtype).exp()[..., None]
            total = image.mean(factor)
            value = None
            if self.tail != "none":
                sums = image.mean(v.masked_fill(factor == 0, 0).to(dtype) * factor)
                value = sums / total.clamp_min(1e-30)
            log_count = (total * image.count).log()[..., 0]
        if seen is None:
            centre, variance = means.mean(2, keepdim=True), means.var(2, False, keepdim=True)
        else:
            alive = seen[..., None].to(dtype)
            count = alive.sum(2, keepdim=True).clamp_min(1)
            centre = (means * alive).sum(2, keepdim=True) / count
            variance = ((means - centre).square() * alive).sum(2, keepdim=True) / count
        spread = (x if x is None else match_heads(x, heads) for x in (mean, value))
        return _Keys(
            *spread, log_count, match_heads(centre, heads), match_heads(variance, heads).detach()
        )

    def _tail(self, logit, value, q, centre, scale: float, geometry: _Geometry) -> dict:
        """The plan's fields. Text has no tail.

        Args:
            logit, value: ``[B, H, n]`` and ``[B, H, n, D]``, or per slot of all image blocks.
        """
        logit = torch.nn.functional.pad(logit, (0, 1), value=-torch.inf)
        value = torch.nn.functional.pad(value, (0, 0, 0, 1))
        if self.tail == "query":
            index = geometry.slot
            logit = logit.index_select(2, index)
        else:
            # The scores are of centred keys, and attend's logits are not.
            index = geometry.slot // self.block_size
            moved = (q.to(centre.dtype) @ centre.transpose(-1, -2))[..., 0] * scale
            logit = logit.index_select(2, index) + moved
        return {"tail_lse": logit, "tail_value": value, "tail_index": index.int()}


def _pooled(logits: torch.Tensor, seen: torch.Tensor, value: torch.Tensor):
    """One key for all key blocks that are not seen: ``(logit [B, H, r], value [B, H, r, D])``.

    Args:
        logits: ``[B, H, r, n]``, -inf where a block has no tokens. seen: bool, the same shape.
        value: ``[B, H, n, D]``.
    """
    logits = logits.masked_fill(seen, -torch.inf)
    nothing = (logits == -torch.inf).all(-1, keepdim=True)
    # Not a row of -inf, whose derivative would be NaN.
    logits = logits.masked_fill(nothing, 0)
    total = logits.logsumexp(-1, keepdim=True)
    shares = (logits - total).exp().masked_fill(nothing, 0)
    return total.masked_fill(nothing, -torch.inf)[..., 0], shares @ value
