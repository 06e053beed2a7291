"""Every method as a plain function of q, k, v, for people without diffusers.

Nothing is cached: each call plans anew. To plan once, keep ``plan = method.plan(layout)`` and call
:func:`dittfast.attend` with it. TopK, LogLinear, Rectified, Sol and VSA plan from q and k, so at
every call; keep the method, which remembers what depends on the layout alone, and call
``method_attention`` with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch

from .attention import method_attention
from .layout import Layout
from .methods import (
    SLA,
    VSA,
    Agent,
    Dense,
    Linear,
    Local,
    LogLinear,
    MixtureOfHeads,
    Neighborhood,
    Radial,
    Reattention,
    Rectified,
    Sol,
    TopK,
)
from .methods.base import Method
from .methods.head_guidance import soft_pag
from .methods.memory import Memory

__all__ = [
    "agent_attention",
    "linear_attention",
    "local_attention",
    "log_linear_attention",
    "mixture_of_heads_attention",
    "neighborhood_attention",
    "radial_attention",
    "reattention",
    "rectified_attention",
    "sla_attention",
    "soft_pag",
    "sol_attention",
    "topk_attention",
    "video_sparse_attention",
]


# A tensor, or with return_lse the pair (out, lse). `Any` lets a type checker take it as either.
Attended: TypeAlias = torch.Tensor | Any


def _attend(
    method: Method,
    layout: Layout,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    backend: str,
    scale: float | None,
    return_lse: bool,
    **parameters: torch.Tensor | None,
) -> Attended:
    """The one body of the functions below; parameters that are None are the method's own."""
    given = {name: x for name, x in parameters.items() if x is not None}
    return method_attention(
        method, layout, *qkv, scale=scale, return_lse=return_lse, backend=backend, **given
    )


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
) -> Attended:
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
    return _attend(method, layout, (q, k, v), backend, scale, return_lse)


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
    proportional: bool | int = False,
    backend: str = "auto",
    scale: float | None = None,
    return_lse: bool = False,
) -> Attended:
    """Local circular attention (CLEAR, arXiv:2412.16112): ``dy² + dx² < window²``, and all text.

    Args:
        q, k, v: ``[B, H, N, D]`` after RoPE and norms, N the layout's tokens; k and v may have
            fewer heads (grouped-query attention).
        layout: where the N tokens sit.
        window, downsample, tile, frame_window, proportional: see :class:`dittfast.methods.Local`.
        spatial_weight: ``[c, c]`` weights of the down-sampled keys, for ``downsample=c``; default
            1/c², a plain mean.
        backend, return_lse: see :func:`dittfast.attend`.
        scale: default ``1/sqrt(D)``; times the proportional factor where that is asked for.

    Returns:
        ``out [B, H, N, D]`` in q's dtype, or ``(out, lse [B, H, N] fp32)``. Differentiable in
        q, k, v and spatial_weight.

    Raises:
        ValueError: an option out of range, or tensors that do not fit the layout.
    """
    method = Local(window, downsample, tile, frame_window, proportional)
    return _attend(
        method, layout, (q, k, v), backend, scale, return_lse, spatial_weight=spatial_weight
    )


def neighborhood_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    window: int | tuple[int | None, ...] = 16,
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
    *,
    tile: tuple[int, int, int] | None = None,
    backend: str = "auto",
    scale: float | None = None,
    return_lse: bool = False,
) -> Attended:
    """Neighborhood attention (arXiv:2504.16922): windows with strides and dilation, and all text.

    Args:
        q, k, v: ``[B, H, N, D]`` after RoPE and norms, N the layout's tokens; k and v may have
            fewer heads (grouped-query attention).
        layout: where the N tokens sit.
        window, stride, dilation, causal, tile: see :class:`dittfast.methods.Neighborhood`.
        backend, scale, return_lse: see :func:`dittfast.attend`.

    Returns:
        ``out [B, H, N, D]`` in q's dtype, or ``(out, lse [B, H, N] fp32)``. Differentiable in
        q, k and v.

    Raises:
        ValueError: an option out of range, a window larger than a grid, or tensors that do not
            fit the layout.
    """
    method = Neighborhood(window, stride, dilation, causal, tile)
    return _attend(method, layout, (q, k, v), backend, scale, return_lse)


def topk_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout | None = None,
    block_size: int = 64,
    topk: int | float | tuple[int | float, ...] | None = None,
    topp: float | tuple[float, ...] | None = None,
    *,
    score: str = "subblock",
    sub_block: int = 4,
    order: str = "hilbert",
    tile: tuple[int, int, int] | None = None,
    backend: str = "auto",
    scale: float | None = None,
    return_lse: bool = False,
) -> Attended:
    """Block top-k and top-p (SLA, arXiv:2509.24006, without its linear branch), and all text.

    Args:
        q, k, v: ``[B, H, N, D]`` after RoPE and norms; k and v may have fewer heads
            (grouped-query attention).
        layout: where the N tokens sit; None for a one-dimensional sequence as it is.
        block_size, topk, topp, score, sub_block, order, tile: see :class:`dittfast.methods.TopK`.
        backend, scale, return_lse: see :func:`dittfast.attend`.

    Returns:
        ``out [B, H, N, D]`` in q's dtype, or ``(out, lse [B, H, N] fp32)``. Differentiable in
        q, k and v, with the choice of blocks held fixed.

    Raises:
        ValueError: an option out of range, or tensors that do not fit the layout.
    """
    method = TopK(block_size, topk, topp, score, sub_block, order, tile)
    if layout is None:
        layout = Layout.image(1, q.shape[-2])
    return _attend(method, layout, (q, k, v), backend, scale, return_lse)


def log_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout | None = None,
    block_size: int = 16,
    topk: int = 8,
    levels: int | str = 2,
    *,
    order: str = "morton",
    enrich: bool = True,
    text_queries: str = "dense",
    backend: str = "auto",
    scale: float | None = None,
    return_lse: bool = False,
) -> Attended:
    """Log-linear sparse attention (LLSA, arXiv:2512.16615): top blocks, and means of the rest.

    Args:
        q, k, v: ``[B, H, N, D]`` after RoPE and norms; k and v may have fewer heads
            (grouped-query attention).
        layout: where the N tokens sit; None for a one-dimensional sequence as it is.
        block_size, topk, levels, order, enrich, text_queries: see
            :class:`dittfast.methods.LogLinear`.
        backend, scale, return_lse: see :func:`dittfast.attend`.

    Returns:
        ``out [B, H, N, D]`` in q's dtype, or ``(out, lse [B, H, N] fp32)``. Differentiable in
        q, k and v, with the choice of blocks held fixed.

    Raises:
        ValueError: an option out of range, more levels than N supports, or tensors that do not
            fit the layout.
    """
    method = LogLinear(block_size, topk, levels, order, enrich, text_queries)
    if layout is None:
        layout = Layout.image(1, q.shape[-2])
    return _attend(method, layout, (q, k, v), backend, scale, return_lse)


def rectified_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    block_size: int = 128,
    topk: int | None = None,
    top_p: float = 0.3,
    order: str = "hilbert",
    *,
    drop: float | None = None,
    neighbors: bool = True,
    first_frame: bool = False,
    round_up: bool = False,
    rectify: bool = True,
    backend: str = "auto",
    scale: float | None = None,
    return_lse: bool = False,
) -> Attended:
    """Rectified SpaAttn (arXiv:2511.19835): top blocks, corrected by the means of the others.

    Args:
        q, k, v: ``[B, H, N, D]`` after RoPE and norms, N the layout's tokens; k and v may have
            fewer heads (grouped-query attention).
        layout: where the N tokens sit.
        topk: key blocks each query block keeps at least; None keeps ``1 - drop`` of them.
        drop: share of key blocks to drop, default 0.8; give this or ``topk``.
        block_size, top_p, order, neighbors, first_frame, round_up, rectify: see
            :class:`dittfast.methods.Rectified`.
        backend, scale: see :func:`dittfast.attend`.
        return_lse: also return the lse of the sparse softmax alone, which the correction is not
            part of.

    Returns:
        ``out [B, H, N, D]`` in q's dtype, or ``(out, lse [B, H, N] fp32)``. Differentiable in
        q, k and v, with the choice of blocks held fixed.

    Raises:
        ValueError: an option out of range, or tensors that do not fit the layout.
    """
    method = Rectified(
        block_size, topk, drop, top_p, order, neighbors, first_frame, round_up, rectify
    )
    return _attend(method, layout, (q, k, v), backend, scale, return_lse)


def sol_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout | None = None,
    tau: float = 1.0,
    tail: str = "block",
    *,
    block_size: int = 64,
    order: str = "raster",
    backend: str = "auto",
    scale: float | None = None,
    return_lse: bool = False,
) -> Attended:
    """Sol-Attn (arXiv:2607.24027): blocks above a threshold, and the rest as one pooled key.

    Args:
        q, k, v: ``[B, H, N, D]`` after RoPE and norms; k and v may have fewer heads
            (grouped-query attention).
        layout: where the N tokens sit; None for a one-dimensional sequence as it is.
        tau, tail, block_size, order: see :class:`dittfast.methods.Sol`.
        backend, scale: see :func:`dittfast.attend`.
        return_lse: also return the lse, which the tail is part of.

    Returns:
        ``out [B, H, N, D]`` in q's dtype, or ``(out, lse [B, H, N] fp32)``. Differentiable in
        q, k and v, with the choice of blocks held fixed.

    Raises:
        ValueError: an option out of range, or tensors that do not fit the layout.
    """
    method = Sol(tau, tail, block_size, order)
    if layout is None:
        layout = Layout.image(1, q.shape[-2])
    return _attend(method, layout, (q, k, v), backend, scale, return_lse)


def video_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    topk: int | float | tuple[int | float, ...] = 0.2,
    cube: tuple[int, int, int] = (4, 4, 4),
    *,
    gate: torch.Tensor | None = None,
    backend: str = "auto",
    scale: float | None = None,
) -> torch.Tensor:
    """Video sparse attention (VSA, arXiv:2505.13389): the best cubes, and a gated coarse term.

    Args:
        q, k, v: ``[B, H, N, D]`` after RoPE and norms, N the layout's tokens; k and v may have
            fewer heads (grouped-query attention).
        layout: where the N tokens sit.
        topk, cube: see :class:`dittfast.methods.VSA`.
        gate: ``[B, H, N, D]``, how much of the attention between cubes each token adds; None for
            nothing of it.
        backend, scale: see :func:`dittfast.attend`.

    Returns:
        ``out [B, H, N, D]`` in q's dtype. Differentiable in q, k, v and gate, with the choice of
        cubes held fixed.

    Raises:
        ValueError: an option out of range, or tensors that do not fit the layout or each other.
    """
    method = VSA(topk, cube)
    return _attend(method, layout, (q, k, v), backend, scale, False, gate=gate)


def reattention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    memory: Memory | None,
    density: float = 0.03125,
    mask: str = "band",
    every: int = 5,
    growth: float = 0.04,
    *,
    backend: str = "auto",
    scale: float | None = None,
) -> torch.Tensor:
    """Re-ttention (arXiv:2505.22918): local attention, corrected by statistics of earlier steps.

    Args:
        q, k, v: ``[B, H, N, D]`` after RoPE and norms, N the layout's tokens; k and v may have
            fewer heads (grouped-query attention).
        layout: where the N tokens sit.
        memory: what is kept from step to step: a :class:`~dittfast.methods.memory.Memory` for each
            layer and guidance branch, whose ``begin(step)`` was called before this step's pass.
            Where it holds what belongs to another layout, shape or dtype, this step refreshes it.
            None keeps nothing: dense attention.
        density, mask, every, growth: see :class:`dittfast.methods.Reattention`.
        backend, scale: see :func:`dittfast.attend`.

    Returns:
        ``out [B, H, N, D]`` in q's dtype. Differentiable in q, k and v, with what earlier steps
        left held fixed.

    Raises:
        ValueError: an option out of range, or tensors that do not fit the layout.
    """
    method = Reattention(density, mask, every, growth)
    given = {"memory": memory, "backend": backend, "scale": scale}
    return method_attention(method, layout, q, k, v, **given)


def sla_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout | None = None,
    sparse: Method | None = None,
    features: str = "softmax",
    *,
    projection: torch.Tensor | None = None,
    backend: str = "auto",
    scale: float | None = None,
) -> torch.Tensor:
    """SLA (arXiv:2509.24006): a sparse method, and linear attention over what it leaves out.

    Args:
        q, k, v: ``[B, H, N, D]`` after RoPE and norms; k and v may have fewer heads
            (grouped-query attention).
        layout: where the N tokens sit; None for a one-dimensional sequence as it is.
        sparse, features: see :class:`dittfast.methods.SLA`.
        projection: ``[H, D, D]``, of the linear branch; None leaves the branch out, as at its
            initial values.
        backend, scale: see :func:`dittfast.attend`.

    Returns:
        ``out [B, H, N, D]`` in q's dtype. Differentiable in q, k, v and projection, with the
        choice of blocks held fixed.

    Raises:
        ValueError: an option out of range, a method that cannot be inside, tensors that do not fit
            the layout, or a projection for other heads.
    """
    method = SLA(sparse, features)
    if layout is None:
        layout = Layout.image(1, q.shape[-2])
    return _attend(
        method, layout, (q, k, v), backend, scale, return_lse=False, projection=projection
    )


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout | None = None,
    *,
    parameters: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Normalised linear attention (LinFusion, arXiv:2409.02097): no softmax, linear in N.

    Args:
        q, k, v: ``[B, H, N, D]`` after RoPE and norms; k and v may have fewer heads
            (grouped-query attention).
        layout: where the N tokens sit, for its padding alone; None for none.
        parameters: the feature map, as :meth:`dittfast.methods.Linear.parameters` names it; None
            leaves it out, as at its initial values.

    Returns:
        ``out [B, H, N, D]`` in q's dtype. Differentiable in q, k, v and parameters.

    Raises:
        ValueError: tensors that do not fit the layout or each other, or a map of other heads.
    """
    if layout is None:
        layout = Layout.image(1, q.shape[-2])
    return method_attention(Linear(), layout, q, k, v, **(parameters or {}))


def agent_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    agents: int | tuple[int, ...] = (4, 16, 16),
    text_agents: int = 16,
    *,
    sharpness: float = 0.3,
    shortcut: float = 0.075,
    parameters: Mapping[str, torch.Tensor] | None = None,
    backend: str = "auto",
    scale: float | None = None,
) -> torch.Tensor:
    """Agent attention (arXiv:2312.08874): a few pooled queries between queries and keys.

    Args:
        q, k, v: ``[B, H, N, D]`` after RoPE and norms, N the layout's tokens; k and v may have
            fewer heads (grouped-query attention).
        layout: where the N tokens sit.
        agents, text_agents, sharpness, shortcut: see :class:`dittfast.methods.Agent`.
        parameters: biases and kernel of the trained form, as
            :meth:`dittfast.methods.Agent.parameters` names them; None for the training-free form.
        backend, scale: see :func:`dittfast.attend`.

    Returns:
        ``out [B, H, N, D]`` in q's dtype. Differentiable in q, k, v and parameters.

    Raises:
        ValueError: an option out of range, tensors that do not fit the layout or each other, or
            parameters for other heads or agents.
    """
    method = Agent(agents, text_agents, sharpness, shortcut, trained=bool(parameters))
    return method_attention(
        method, layout, q, k, v, scale=scale, backend=backend, **(parameters or {})
    )


def mixture_of_heads_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    hidden_states: torch.Tensor,
    layout: Layout | None = None,
    inner: Method | None = None,
    shared: int | float = 0.25,
    routed: int | float = 0.5,
    *,
    route: str = "block",
    parameters: Mapping[str, torch.Tensor] | None = None,
    backend: str = "auto",
    scale: float | None = None,
    return_loss: bool = False,
) -> Attended:
    """Mixture of heads (MoH, arXiv:2410.11842): every token takes some of the heads, weighted.

    Args:
        q, k, v: ``[B, H, N, D]`` after RoPE and norms; k and v may have fewer heads
            (grouped-query attention).
        hidden_states: ``[B, N, C]``, what q, k and v were projected from; the router reads it.
        layout: where the N tokens sit; None for a one-dimensional sequence as it is.
        inner: the method that the heads run; None for dense attention.
        shared, routed, route: see :class:`dittfast.methods.MixtureOfHeads`.
        parameters: the router, and what ``inner`` has with "inner_" before its name, as
            :meth:`dittfast.methods.MixtureOfHeads.parameters` names them; None for initial values.
        backend, scale: see :func:`dittfast.attend`.
        return_loss: also return the load-balance loss, 0-d.

    Returns:
        ``out [B, H, N, D]`` in q's dtype, or ``(out, loss)``. Differentiable in q, k, v,
        hidden_states and parameters, with the choice of heads held fixed.

    Raises:
        ValueError: an option out of range, tensors that do not fit the layout or each other, or a
            router for other heads or channels.
    """
    method = MixtureOfHeads(Dense() if inner is None else inner, shared, routed, route)
    if layout is None:
        layout = Layout.image(1, q.shape[-2])
    losses: dict[str, torch.Tensor] = {}
    given = {"scale": scale, "backend": backend, "hidden_states": hidden_states}
    out = method_attention(
        method, layout, q, k, v, report=losses.__setitem__, **given, **(parameters or {})
    )
    return (out, losses[method.losses[0]]) if return_loss else out
