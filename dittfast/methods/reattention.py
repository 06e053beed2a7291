"""Re-ttention: local attention, and how it differs from all of it some steps ago (2505.22918)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from ..layout import Layout
from ..plan import Plan
from .amount import UNKNOWN, Amount, dense_flops
from .base import Call, Kept, Method
from .checks import check_choice, check_integer, is_number
from .dense import Dense
from .dynamic import match_heads, wide_dtype
from .local import Local
from .radial import banded_plan

MASKS = ("band", "disc")
_BLOCK_SIZE = 64


class _Plans(NamedTuple):
    local: Plan
    whole: Plan


@dataclass(frozen=True)
class _Band(Method):
    """Tokens see those of every frame whose number in the frame is near, and all text.

    Args:
        density: share of a frame that is seen.
    """

    name: ClassVar[str] = "band"

    density: float

    def plan(
        self, layout: Layout, q: torch.Tensor | None = None, k: torch.Tensor | None = None
    ) -> Plan:
        half = int(self.density * layout.grid.tokens_per_frame) // 2
        limits = np.full(layout.grid.frames, half, dtype=np.int64)
        return banded_plan(layout, limits, _BLOCK_SIZE)


@dataclass(frozen=True)
class _Disc(Method):
    """Tokens see a circle of every frame, and all text; arguments as of :class:`_Band`."""

    name: ClassVar[str] = "disc"

    density: float

    def plan(
        self, layout: Layout, q: torch.Tensor | None = None, k: torch.Tensor | None = None
    ) -> Plan:
        return Local(math.sqrt(self.density * layout.grid.tokens_per_frame / math.pi)).plan(layout)


@dataclass(frozen=True)
class Reattention(Method):
    """Local attention, corrected by what it lacked of dense attention when that was last computed.

    Every ``every`` steps of a run dense attention is computed, and so is what a local mask gives::

        at a refresh   out = dense     ρ = exp(lse_mask - lse_dense)     R = dense - ρ · local
        t steps later  out = min(1, ρ + growth · (t - 1)) · local + R

    ρ, for each query, is the mask's part of the softmax: above 1 by rounding alone, and cut there.
    Each layer keeps ρ and R, as large as q, for each guidance branch until the run ends; other
    sizes, batches and layouts refresh. Text queries see everything, so they stay exact.

    Outside of a pipeline's run, where no scheduler tells the steps, and in passes that may be
    differentiated nothing is kept: then this is dense attention. There is nothing to train.

    Source: Re-ttention, arXiv:2505.22918, which keeps R behind the output projection and lets ρ
    pass 1. The steps that it computes densely before are ``dense_first_steps`` of the schedule.

    Args:
        density: share of each frame that the mask keeps for a token, above 0, at most 1.
        mask: "band" keeps the tokens whose number in their frame is near (as published), "disc"
            a circle of as many.
        every: steps from one refresh to the next, at least 1.
        growth: what each step after the next adds to ρ, in [0, 1].

    Raises:
        ValueError: an option out of range; a layout without a grid.
    """

    name: ClassVar[str] = "reattention"
    remembers: ClassVar[bool] = True

    density: float = 0.03125
    mask: str = "band"
    every: int = 5
    growth: float = 0.04

    def __post_init__(self):
        for name, low in (("density", "(0"), ("growth", "[0")):
            x = getattr(self, name)
            if not is_number(x) or not 0 <= x <= 1 or (x == 0 and name == "density"):
                raise ValueError(f"{name} must be a number in {low}, 1]; got {x!r}")
        check_choice("mask", self.mask, MASKS)
        check_integer("every", self.every, 1)
        object.__setattr__(self, "every", int(self.every))

    @property
    def planner(self) -> Method:
        return (_Band if self.mask == "band" else _Disc)(self.density)

    @property
    def period(self) -> int:
        return self.every

    def geometry(self, layout: Layout, device: torch.device) -> _Plans:
        whole = Dense(_BLOCK_SIZE).plan(layout)
        return _Plans(self.planner.plan(layout).to(device), whole.to(device))

    def attention(
        self,
        layout: Layout,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        call: Call,
    ) -> torch.Tensor:
        if torch.compiler.is_compiling():
            raise ValueError(
                "reattention keeps values from step to step, which compiled code cannot; leave the "
                "transformer uncompiled"
            )
        plans, given = call.geometry, {"scale": call.scale, "kv_log_weight": call.kv_log_weight}
        if call.memory is None:
            return call.attend(q, k, v, plans.whole, **given)
        kept = call.memory.values((self, layout, q.shape, k.shape, q.dtype, q.device))
        local, lse = call.attend(q, k, v, plans.local, return_lse=True, **given)
        age = call.memory.step - kept["step"] if kept else 0
        if 1 <= age < self.every:
            share = (kept["share"] + self.growth * (age - 1)).clamp_max(1)[..., None]
            return (share * local + kept["rest"]).to(q.dtype)
        whole, all_lse = call.attend(q, k, v, plans.whole, return_lse=True, **given)
        with torch.no_grad():
            # Of a query that sees nothing at all there is nothing to share.
            share = (lse - all_lse).exp().nan_to_num(1).clamp_max(1)
            rest = whole - share[..., None] * local
            kept.update(step=call.memory.step, share=share, rest=rest.to(q.dtype))
        return whole

    def formula(
        self,
        layout: Layout,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rows: torch.Tensor,
        call: Call,
    ) -> torch.Tensor:
        """Of a refresh."""
        k, v = match_heads(k, q.shape[1]), match_heads(v, q.shape[1])
        scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
        logits = (q[:, :, rows] @ k.mT * scale).to(wide_dtype(q.dtype))
        if call.kv_log_weight is not None:
            logits = logits + call.kv_log_weight[:, :, None]
        return torch.softmax(logits, -1).to(v.dtype) @ v

    def flops(self, layout: Layout, heads: int, head_dim: int) -> float:
        """A mean over the steps from one refresh to the next."""
        return self._flops(self.planner.plan(layout), heads, head_dim)

    def _flops(self, local: Plan, heads: int, head_dim: int) -> float:
        dense = dense_flops(local.num_queries, heads, head_dim)
        return local.flops(head_dim, heads) + dense / self.every

    def amount(
        self,
        layout: Layout,
        heads: int | None,
        head_dim: int | None,
        kept: Any = None,
        observed: Amount | None = None,
    ) -> Amount:
        """See :meth:`Method.amount`; ``kept`` may be the plan of the mask alone."""
        if heads is None:
            return UNKNOWN
        local = kept.geometry.local if isinstance(kept, Kept) else kept
        if local is None:
            local = self.planner.plan(layout)
        dense = dense_flops(layout.num_tokens, heads, head_dim)
        return Amount(None, self._flops(local, heads, head_dim) / dense)
