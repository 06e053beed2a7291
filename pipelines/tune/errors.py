"""How far a method's or a plan's attention is from dense attention's, head by head."""

from __future__ import annotations

import torch

from dittfast.attention import attend, method_attention
from dittfast.layout import Layout
from dittfast.methods.base import Method
from dittfast.methods.dense import Dense
from dittfast.plan import Plan


def squares_apart(out: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Squared error of ``out [B, H, N, D]`` by head, ``[H]`` fp64, over batch, tokens, channels."""
    apart = (out.float() - dense.float()).square()
    return apart.sum((0, 2, 3), dtype=torch.float64).cpu()


def head_errors(
    method: Method | Plan,
    layout: Layout,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    dense: torch.Tensor | None = None,
    kv_log_weight: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Relative error of the output of each head: ``|out - dense| / |dense|`` over all its tokens.

    Args:
        method: a method, or a plan of the layout.
        layout: geometry of the sequence, N tokens.
        q: ``[B, H, N, D]``. k, v: ``[B, Hk, N, D]`` with H a multiple of Hk.
        dense: ``[B, H, N, D]``, the output to compare with; dense attention's if None.
        kv_log_weight, scale, backend: as in :func:`dittfast.attend`.

    Returns:
        ``[H]`` fp64.

    Raises:
        ValueError: as :func:`dittfast.attention.method_attention`.
    """
    given = {"kv_log_weight": kv_log_weight, "scale": scale, "backend": backend}
    with torch.no_grad():
        if dense is None:
            dense = method_attention(Dense(), layout, q, k, v, **given)
        if isinstance(method, Plan):
            out = attend(q, k, v, method, **given)
        else:
            out = method_attention(method, layout, q, k, v, **given)
        return (squares_apart(out, dense) / squares_apart(0 * dense, dense)).sqrt()
