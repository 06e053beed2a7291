"""Every method as a plain function of q, k, v, for people without diffusers.

Nothing is cached: each call plans anew. To plan once, keep ``plan = method.plan(layout)`` and call
:func:`dittfast.attend` with it.
"""

from __future__ import annotations

import torch

from .attention import method_attention
from .layout import Layout
from .methods import Local, Radial


def radial_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    decay_factor: float = 1.0,
    block_size: int = 128,
    variant: str = "wan",
    *,
    backend: str = "auto",
    scale: float | None = None,
    return_lse: bool = False,
):
    """Radial attention (arXiv:2506.19852): frames see less of each other the further apart.

    Args:
        q, k, v: ``[B, H, N, D]`` after RoPE and norms, N the layout's tokens; k and v may have
            fewer heads (grouped-query attention).
        layout: where the N tokens sit; its first grid is the video.
        decay_factor, block_size, variant: see :class:`dittfast.methods.Radial`.
        backend, scale, return_lse: see :func:`dittfast.attend`.

    Returns:
        ``out [B, H, N, D]`` in q's dtype, or ``(out, lse [B, H, N] fp32)``. Differentiable in
        q, k and v.

    Raises:
        ValueError: an option out of range, or tensors that do not fit the layout.
    """
    method = Radial(decay_factor, block_size, variant)
    return method_attention(
        method, layout, q, k, v, scale=scale, return_lse=return_lse, backend=backend
    )


def local_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    window: float = 8,
    downsample: int | None = None,
    *,
    spatial_weight: torch.Tensor | None = None,
    tile: tuple[int, int, int] | None = None,
    frame_window: int | None = None,
    proportional: bool = False,
    backend: str = "auto",
    scale: float | None = None,
    return_lse: bool = False,
):
    """Local circular attention (CLEAR, arXiv:2412.16112): ``dy² + dx² < window²``, and all text.

    Args:
        q, k, v: ``[B, H, N, D]`` after RoPE and norms, N the layout's tokens; k and v may have
            fewer heads (grouped-query attention).
        layout: where the N tokens sit.
        window, downsample, tile, frame_window, proportional: see :class:`dittfast.methods.Local`.
        spatial_weight: ``[c, c]`` weights of the down-sampled keys, for ``downsample=c``; default
            1/c², a plain mean.
        backend, return_lse: see :func:`dittfast.attend`.
        scale: default ``1/sqrt(D)``, or the proportional scale where that is asked for.

    Returns:
        ``out [B, H, N, D]`` in q's dtype, or ``(out, lse [B, H, N] fp32)``. Differentiable in
        q, k, v and spatial_weight.

    Raises:
        ValueError: an option out of range, or tensors that do not fit the layout.
    """
    method = Local(window, downsample, tile, frame_window, proportional)
    parameters = {} if spatial_weight is None else {"spatial_weight": spatial_weight}
    return method_attention(
        method, layout, q, k, v, scale=scale, return_lse=return_lse, backend=backend, **parameters
    )
