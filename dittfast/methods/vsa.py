"""Video sparse attention: the best cubes of tokens, and a gated coarse term (arXiv:2505.13389)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch

from ..layout import Layout
from ..plan import Plan
from .amount import Amount, dense_flops
from .base import Call, Method
from .checks import check_flag, check_integer, check_tile
from .dynamic import Pool, match_heads, shown_means
from .topk import TopK


class _Coarse(NamedTuple):
    """The blocks of a layout as the tokens of the coarse attention.

    Attributes:
        pool: all blocks, text too. block: ``[N]`` int64, the block of each token.
        plan: dense attention between the blocks.
    """

    pool: Pool
    block: torch.Tensor
    plan: Plan


@dataclass(frozen=True)
class _BestCubes(TopK):
    """Top-k on cubes by their means, whose share of the cubes is rounded up, as published."""

    name: ClassVar[str] = "vsa"

    def num_kept(self, blocks: int) -> tuple[int, ...]:
        topk = self.topk if isinstance(self.topk, tuple) else (self.topk,)
        # 0.2 * 5 is a little more than 1 in floating point: not two cubes for that.
        kept = (math.ceil(x * blocks - 1e-9) if isinstance(x, float) else x for x in topk)
        return tuple(min(max(1, x), blocks) for x in kept)

    def prepare(self, layout: Layout, device: torch.device) -> None:
        super().prepare(layout, device)
        self.coarse(layout, device)

    def coarse(self, layout: Layout, device: torch.device) -> _Coarse:
        """Kept like all that depends on the layout alone."""
        bare = replace(layout, context_lengths=None)
        return self._cached("coarse", bare, device, lambda: self._make_coarse(bare, device))

    def _make_coarse(self, layout: Layout, device: torch.device) -> _Coarse:
        blocks = layout.tiles(self.tile)
        pool = Pool.of(blocks, torch.arange(blocks.count), math.prod(self.tile))
        block = torch.empty(layout.num_tokens, dtype=torch.int64)
        # A slot past the end of a short block repeats one of its tokens.
        block[pool.token] = torch.arange(blocks.count)[:, None].expand(pool.token.shape)
        plan = Plan.full(blocks.count)
        return _Coarse(pool.to(device), block.to(device), plan.to(device))


@dataclass(frozen=True)
class VSA(Method):
    """Each cube of queries sees the cubes that score best, plus attention between cubes by a gate.

    The grid is cut into cubes of tokens, smaller ones at its borders. With the means q̄, k̄, v̄ of
    the tokens of a cube, token i of cube a gets::

        S_ab = scale · q̄_a · k̄_b
        out_i = softmax over the tokens of the topk cubes b of largest S_ab   (fine)
              + gate_i · Σ_b softmax(S_a)_b v̄_b                                (coarse)

    The gate has a value for each channel of each head and is a linear projection of the layer's
    hidden states, ``to_gate_compress``, trained with the model. Without one (``gate=False``, and at
    the start of training, where it is zero) the fine part is all: plain block top-k.
    Every head chooses for itself, of equals the first cubes; the choice has no gradient, the coarse
    term has one. Text is seen by all and sees all; in the coarse term its blocks of as many tokens
    take part as the cubes do. Keys that padding or a mask hides are in no mean.

    Source: VSA, arXiv:2505.13389, and FastVideo's code; with text as in its MiniMax-H3. Its kernel,
    called without a gate, adds the coarse term as if the gate were 1; its models never do that.

    Args:
        topk: cubes kept: at least 1, clamped to those there are; a float in (0, 1] is a share of
            them, rounded up (1 less the published "sparsity"). A tuple has one for each head.
        cube: (frames, height, width) of a cube in tokens, at most 256 together.
        gate: whether the layers have a gate, to be trained or loaded.

    Raises:
        ValueError: an option out of range; a gate of another shape; a layout without a grid.
    """

    name: ClassVar[str] = "vsa"
    for_videos: ClassVar[bool] = True

    topk: int | float | tuple[int | float, ...] = 0.2
    cube: tuple[int, int, int] = (4, 4, 4)
    gate: bool = False

    def __post_init__(self):
        object.__setattr__(self, "cube", check_tile(self.cube, "cube"))
        check_flag("gate", self.gate)
        if self.topk is None:
            raise ValueError("topk must be a number of cubes or a share of them; got None")
        chooser = _BestCubes(topk=self.topk, score="mean", tile=self.cube)
        object.__setattr__(self, "topk", chooser.topk)  # lists are tuples
        object.__setattr__(self, "_chooser", chooser)

    @property
    def needs_hidden_states(self) -> bool:
        return self.gate

    @property
    def planner(self) -> TopK:
        return self._chooser

    def prepare(self, layout: Layout, device: torch.device) -> None:
        self._chooser.prepare(layout, device)

    def geometry(self, layout: Layout, device: torch.device) -> _Coarse:
        return self._chooser.coarse(layout, device)

    def parameters(
        self, heads: int | None, head_dim: int | None, channels: int | None = None
    ) -> dict[str, torch.Tensor]:
        """``gate_weight [H * D, channels]`` and ``gate_bias [H * D]``, zero, fp32; none without."""
        if not self.gate:
            return {}
        why = "the layers do not tell it, and the gate depends on it; gate=False leaves it out"
        for name, value in (("heads", heads), ("head_dim", head_dim), ("channels", channels)):
            check_integer(name, value, 1, remedy=why)
        width = heads * head_dim
        return {"gate_weight": torch.zeros(width, channels), "gate_bias": torch.zeros(width)}

    def attention(
        self,
        layout: Layout,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        call: Call,
        gate: torch.Tensor | None = None,
        **parameters: torch.Tensor,
    ) -> torch.Tensor:
        """See :meth:`Method.attention`.

        Args:
            gate: ``[B, H, N, D]``, in the place of the projected hidden states.
        """
        fine = call.inner(self._chooser, layout, q, k, v)
        gate = self._gate(q, call, gate, parameters)
        if gate is None:
            return fine
        pool, block, plan = call.geometry
        means, hidden = self._means(pool, q, k, v, call.kv_log_weight)
        coarse = call.attend(*means, plan, scale=call.scale, kv_log_weight=hidden)
        return fine + gate * coarse.index_select(2, block)

    def _gate(self, q, call: Call, gate, parameters: dict) -> torch.Tensor | None:
        """``[B, H, N, D]`` in q's dtype; None where there is none."""
        if gate is not None:
            if gate.shape != q.shape:
                raise ValueError(
                    f"gate must be [B, H, N, D] = {list(q.shape)} like q, got {list(gate.shape)}"
                )
            return gate.to(q.dtype)
        if not parameters:
            return None
        weight, bias = (parameters[name].to(q.dtype) for name in ("gate_weight", "gate_bias"))
        width, channels = q.shape[1] * q.shape[3], call.hidden_states.shape[-1]
        if tuple(weight.shape) != (width, channels) or tuple(bias.shape) != (width,):
            raise ValueError(
                f"the gate must be [{width}, {channels}] with a bias [{width}] for {q.shape[1]} "
                f"heads of {q.shape[3]} and hidden states of {channels} channels, got "
                f"{list(weight.shape)} and {list(bias.shape)}"
            )
        projected = torch.nn.functional.linear(call.hidden_states.to(q.dtype), weight, bias)
        return projected.unflatten(-1, (q.shape[1], q.shape[3])).transpose(1, 2)

    @staticmethod
    def _means(pool: Pool, q, k, v, weight):
        """Means of all blocks in the inputs' dtype, and log weights that hide blocks."""
        if weight is not None and weight.shape[1] > 1:
            k, v = match_heads(k, q.shape[1]), match_heads(v, q.shape[1])
        (q_mean, seen), (k_mean, _), (v_mean, _) = (shown_means(pool, x, weight) for x in (q, k, v))
        means = (x.to(q.dtype) for x in (q_mean, k_mean, v_mean))
        if seen is None:
            return means, None
        return means, torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, -torch.inf)

    def formula(
        self,
        layout: Layout,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rows: torch.Tensor,
        call: Call,
        gate: torch.Tensor | None = None,
        **parameters: torch.Tensor,
    ) -> torch.Tensor:
        block, scale = call.geometry.block, call.scale
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        # In fp32, as what is checked: scores may be nearer to each other than that tells apart.
        plan = self._chooser.plan(layout, q.detach().float(), k.detach().float(), scale=scale)
        cubes = plan.to_block_mask().index_select(2, block[rows]).index_select(3, block)
        k, v = match_heads(k, q.shape[1]), match_heads(v, q.shape[1])
        logits = q[:, :, rows] @ k.mT * scale
        if call.kv_log_weight is not None:
            hidden = (call.kv_log_weight == -torch.inf)[..., None]
            logits = logits + call.kv_log_weight[:, :, None].to(logits)
            v = v.masked_fill(hidden, 0)
        out = torch.softmax(logits.masked_fill(~cubes, -torch.inf), -1) @ v
        gate = self._gate(q, call, gate, parameters)
        if gate is None:
            return out
        means, hidden = self._means(call.geometry.pool, q, k, v, call.kv_log_weight)
        q_mean, k_mean, v_mean = means
        scores = q_mean[:, :, block[rows]] @ k_mean.mT * scale
        if hidden is not None:
            scores = scores + hidden[:, :, None].to(scores)
        return out + gate[:, :, rows] * (torch.softmax(scores, -1) @ v_mean)

    def flops(self, layout: Layout, heads: int, head_dim: int) -> float:
        """The gate's projection counts as that of hidden states as wide as all heads together.

        Where cubes are cut off at a border, those kept count with the mean of their sizes.
        """
        fine = self._kept(layout) * dense_flops(layout.num_tokens, heads, head_dim)
        if not self.gate:
            return fine
        coarse = dense_flops(layout.tiles(self.cube).count, heads, head_dim)
        return fine + coarse + 2.0 * layout.num_tokens * (heads * head_dim) ** 2

    def _kept(self, layout: Layout) -> float:
        """Expected density of the fine part."""
        image = layout.num_tokens - layout.num_context
        cubes = sum(math.prod(-(-n // c) for n, c in zip(g.shape, self.cube)) for g in layout.grids)
        kept = self._chooser.num_kept(cubes)
        share = sum(kept) / len(kept) / cubes
        return 1 - (1 - share) * (image / layout.num_tokens) ** 2

    def amount(
        self,
        layout: Layout,
        heads: int | None,
        head_dim: int | None,
        kept: object = None,
        observed: Amount | None = None,
    ) -> Amount:
        """Density of the fine part, FLOPs of all."""
        density = None if observed is None else observed.density
        if density is None:
            density = self._kept(layout)
        if heads is None:
            return Amount(density, None if self.gate else density)
        more = self.flops(layout, heads, head_dim) / dense_flops(layout.num_tokens, heads, head_dim)
        return Amount(density, density + more - self._kept(layout))
