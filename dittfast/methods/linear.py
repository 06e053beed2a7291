"""Normalised linear attention with a trainable feature map (LinFusion, arXiv:2409.02097)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from ..layout import Layout
from .base import Call, Method
from .checks import check_integer
from .dynamic import match_heads, wide_dtype

# Added to a query's mean similarity, lest it divides by nothing.
_EPSILON = 1e-4
_PARTS = ("in", "in_bias", "norm", "norm_bias", "out", "out_bias")
_NAMES = tuple(f"{x}_{part}" for x in "qk" for part in _PARTS)
# Values of features held at once, over batch and heads: bounds memory, not the result. A CPU is
# faster with what its cache holds.
_AT_ONCE = {"cpu": 1 << 19}
_AT_ONCE_ELSEWHERE = 1 << 22


@dataclass(frozen=True)
class Linear(Method):
    """Attention without a softmax: every token sees all others through one D x D matrix per head.

    With positive features ``f`` the sums over the n keys are the same for every query, so time and
    memory grow with n and not with its square::

        out_i = f(q_i) · (Σ f(k_j) v_jᵀ / n) / (f(q_i) · Σ f(k_j) / n + 1e-4)
        f(x) = elu(x + F(x)) + 1            F(x) = W₂ leaky_relu(layer_norm(W₁ x + b₁)) + b₂

    F is trainable, for q and k of each head; W₂ and b₂ start at zero, and the model's own
    projections stay, so that training starts from the pretrained model's q, k and v. A hidden key
    (padding, a mask) is in neither sum nor n. Text and image are one sequence. Untrained, this is
    no approximation of softmax attention: use it with an adapter.

    Source: LinFusion (arXiv:2409.02097), whose F works on the hidden states before the projections
    and on all heads together; here it works on what a DiT's attention gets, after norms and RoPE.

    Args:
        hidden: width of F for each head, at least 0; None is the head dim, 0 leaves F out.

    Raises:
        ValueError: a width out of range.
    """

    name: ClassVar[str] = "linear"
    needs_grid: ClassVar[bool] = False
    needs_training: ClassVar[bool] = True

    hidden: int | None = None

    def __post_init__(self):
        if self.hidden is not None:
            check_integer("hidden", self.hidden, 0, remedy="None for the head dim, 0 for none")

    def parameters(self, heads: int | None, head_dim: int | None) -> dict[str, torch.Tensor]:
        """W₁, b₁, the norm's weight and bias, W₂ and b₂ for q and k: ``[H, ...]``, fp32.

        W₁ starts as the identity, cut to its shape; W₂ and b₂ at zero.
        """
        if self.hidden == 0:
            return {}
        why = "the layers do not tell their heads, which F depends on; hidden=0 leaves it out"
        check_integer("heads", heads, 1, remedy=why)
        check_integer("head_dim", head_dim, 1, remedy=why)
        width = self.hidden or head_dim
        values = (
            torch.eye(head_dim, width).repeat(heads, 1, 1),
            torch.zeros(heads, width),
            torch.ones(heads, width),
            torch.zeros(heads, width),
            torch.zeros(heads, width, head_dim),
            torch.zeros(heads, head_dim),
        )
        return {name: value.clone() for name, value in zip(_NAMES, (*values, *values))}

    def attention(
        self,
        layout: Layout,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        call: Call,
        **parameters: torch.Tensor,
    ) -> torch.Tensor:
        q_map, k_map = _maps(parameters, q)
        if k_map is not None:  # one for each query head
            k, v = match_heads(k, q.shape[1]), match_heads(v, q.shape[1])
        weight = key_weights(call.kv_log_weight, k)
        sums, mean, count = 0.0, 0.0, 0.0
        for part in _chunks(k):
            keys, values = features(k[:, :, part], k_map), v[:, :, part].to(weight.dtype)
            own = weight[:, :, part, None]
            hidden = own == 0  # padding may hold anything, also NaN
            keys = keys.masked_fill(hidden, 0) * own
            sums = sums + keys.mT @ values.masked_fill(hidden, 0)
            mean = mean + keys.sum(-2, keepdim=True)
            count = count + own.sum(-2, keepdim=True)
        count = count.clamp_min(torch.finfo(weight.dtype).tiny)
        sums, mean = match_heads(sums / count, q.shape[1]), match_heads(mean / count, q.shape[1])
        outs = []
        for part in _chunks(q):
            queries = features(q[:, :, part], q_map)
            similar = (queries * mean).sum(-1, keepdim=True) + _EPSILON
            outs.append((queries @ sums / similar).to(q.dtype))
        return outs[0] if len(outs) == 1 else torch.cat(outs, -2)

    def formula(
        self,
        layout: Layout,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rows: torch.Tensor,
        call: Call,
        **parameters: torch.Tensor,
    ) -> torch.Tensor:
        k, v = match_heads(k, q.shape[1]), match_heads(v, q.shape[1])
        q_map, k_map = _maps(parameters, q)
        pairs = features(q[:, :, rows], q_map) @ features(k, k_map).mT
        weight = key_weights(call.kv_log_weight, k)[:, :, None]
        shares = pairs * weight / weight.sum(-1, keepdim=True)
        return (shares @ v.to(shares) / (shares.sum(-1, keepdim=True) + _EPSILON)).to(q.dtype)

    def flops(self, layout: Layout, heads: int, head_dim: int) -> float:
        width = head_dim if self.hidden is None else self.hidden
        sums, maps = 4 * head_dim**2 + 2 * head_dim, 8 * head_dim * width
        return float(layout.num_tokens) * heads * (sums + maps)


def _maps(parameters: dict, q: torch.Tensor) -> tuple[dict | None, dict | None]:
    """The feature maps of q and k in at least fp32; None where there are none."""
    if not parameters:
        return None, None
    wide = wide_dtype(q.dtype)
    missing = [n for n in _NAMES if n not in parameters]
    if missing:
        raise ValueError(f"the feature map lacks {', '.join(missing)}; give all of it, or none")
    heads, head_dim = parameters["q_in"].shape[:2]
    if (heads, head_dim) != (q.shape[1], q.shape[3]):
        raise ValueError(
            f"the feature map is for {heads} heads of {head_dim}, q has {q.shape[1]} of "
            f"{q.shape[3]}"
        )
    mine = {name: x.to(wide) for name, x in parameters.items()}
    return tuple({n.removeprefix(f"{x}_"): y for n, y in mine.items() if n[0] == x} for x in "qk")


def features(x: torch.Tensor, own: dict[str, torch.Tensor] | None) -> torch.Tensor:
    """``elu(x + F(x)) + 1`` of ``x [B, H, n, D]`` in at least fp32; ``own`` holds F or is None."""
    x = x.to(wide_dtype(x.dtype))
    if own is not None:
        inside = x @ own["in"] + own["in_bias"][:, None]
        inside = F.layer_norm(inside, inside.shape[-1:])
        inside = F.leaky_relu(inside * own["norm"][:, None] + own["norm_bias"][:, None])
        x = x + (inside @ own["out"] + own["out_bias"][:, None])
    return F.elu(x) + 1


def key_weights(kv_log_weight: torch.Tensor | None, k: torch.Tensor) -> torch.Tensor:
    """``[B|1, H|1, N]``: how much each key counts; 0 where it is hidden."""
    wide = wide_dtype(k.dtype)
    if kv_log_weight is None:
        return torch.ones(1, 1, k.shape[2], dtype=wide, device=k.device)
    weight = kv_log_weight.to(wide).exp()
    if weight.shape[1] not in (1, k.shape[1]):  # grouped queries share their keys' weights
        weight = weight[:, :: weight.shape[1] // k.shape[1]]
    return weight


def _chunks(x: torch.Tensor) -> Iterator[slice]:
    """Tokens of ``x [B, H, n, D]`` a few at a time."""
    most = _AT_ONCE.get(x.device.type, _AT_ONCE_ELSEWHERE)
    step = max(1, most // max(1, x.shape[0] * x.shape[1] * x.shape[3]))
    return (slice(start, start + step) for start in range(0, x.shape[2], step))
