"""Makes a backend's forward and backward functions into torch.library custom ops."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Optional

import torch

from dittfast.plan import PlanTensors

# The op takes the plan's tensors as one list: the schema stays short and a field added to
# PlanTensors does not change it.
_NUM_TENSORS = PlanTensors._fields.index("metric")
_SCALE = PlanTensors._fields.index("out_scale")
_RESIDUAL = PlanTensors._fields.index("out_residual")


def empty_outputs(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised ``(out, lse)``; ``out`` has q's memory order, so a strided view stays one."""
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty_like(q), torch.empty(q.shape[:-1], dtype=lse_dtype, device=q.device)


def define_backend(name: str, forward: Callable, backward: Callable) -> Callable:
    """Register ``dittfast::attend_{name}`` and its backward; return the differentiable function.

    Args:
        forward: ``(q, k, v, PlanTensors, scale) -> (out, lse)``.
        backward: ``(grad_out, grad_lse, q, k, v, out, lse, PlanTensors, scale) -> (dq, dk, dv,
            d out_scale or None, d out_residual or None)``.

    Returns:
        ``(q, k, v, PlanTensors, scale) -> (out, lse)``.
    """

    @torch.library.custom_op(f"dittfast::attend_{name}", mutates_args=())
    def op(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        tensors: Sequence[Optional[torch.Tensor]],  # noqa: UP045 (custom_op reads it)
        out_scale: Optional[torch.Tensor],  # noqa: UP045
        out_residual: Optional[torch.Tensor],  # noqa: UP045
        sizes: Sequence[int],
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        t = _plan_tensors(tensors, out_scale, out_residual, sizes)
        with own_precision(q):
            out, lse = forward(q, k, v, t, scale)
        like, _ = empty_outputs(q)
        if out.stride() != like.stride():
            out = like.copy_(out)
        return out, lse

    @op.register_fake
    def _(q, k, v, tensors, out_scale, out_residual, sizes, scale):
        return empty_outputs(q)

    @torch.library.custom_op(f"dittfast::attend_{name}_backward", mutates_args=())
    def backward_op(
        grad_out: torch.Tensor,
        grad_lse: Optional[torch.Tensor],  # noqa: UP045
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        tensors: Sequence[Optional[torch.Tensor]],  # noqa: UP045
        out_scale: Optional[torch.Tensor],  # noqa: UP045
        out_residual: Optional[torch.Tensor],  # noqa: UP045
        sizes: Sequence[int],
        scale: float,
    ) -> list[torch.Tensor]:
        t = _plan_tensors(tensors, out_scale, out_residual, sizes)
        with own_precision(q):
            grads = backward(grad_out, grad_lse, q, k, v, out, lse, t, scale)
        inputs = [x for x in (q, k, v, out_scale, out_residual) if x is not None]
        return [
            _reduce(g, x).contiguous() for g, x in zip([g for g in grads if g is not None], inputs)
        ]

    @backward_op.register_fake
    def _(grad_out, grad_lse, q, k, v, out, lse, tensors, out_scale, out_residual, sizes, scale):
        inputs = [x for x in (q, k, v, out_scale, out_residual) if x is not None]
        return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]

    def setup_context(ctx, inputs, output):
        q, k, v, tensors, out_scale, out_residual, sizes, scale = inputs
        ctx.save_for_backward(q, k, v, *output, out_scale, out_residual, *tensors)
        ctx.sizes, ctx.scale = sizes, scale

    def run_backward(ctx, grad_out, grad_lse):
        q, k, v, out, lse, out_scale, out_residual, *tensors = ctx.saved_tensors
        grads = backward_op(
            grad_out, grad_lse, q, k, v, out, lse, tensors, out_scale, out_residual,
            ctx.sizes, ctx.scale,
        )  # fmt: skip
        dq, dk, dv, *rest = grads
        d_scale = rest.pop(0) if out_scale is not None else None
        d_residual = rest.pop(0) if out_residual is not None else None
        return dq, dk, dv, None, d_scale, d_residual, None, None

    op.register_autograd(run_backward, setup_context=setup_context)

    def call(q, k, v, t: PlanTensors, scale: float):
        tensors = list(t[:_NUM_TENSORS])
        tensors[_SCALE] = tensors[_RESIDUAL] = None
        return op(q, k, v, tensors, t.out_scale, t.out_residual, list(t[_NUM_TENSORS:]), scale)

    return call


def own_precision(x: torch.Tensor):
    """Inside, autocast is off: it would round what is computed in fp32, masks and scores too."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta has no autocast
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def _plan_tensors(tensors, out_scale, out_residual, sizes) -> PlanTensors:
    t = PlanTensors(*tensors, *sizes)
    return t._replace(out_scale=out_scale, out_residual=out_residual)


def _reduce(grad: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Sum over batch and head dimensions that ``like`` broadcasts."""
    return grad.sum_to_size(like.shape).to(like.dtype)
