"""A plan's epilogue, ``out_scale * out + out_residual``, around backends that have none."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dittfast.plan import PlanTensors, query_blocks

EPILOGUE = ("out_scale", "out_residual")


def with_epilogue(forward: Callable, backward: Callable) -> tuple[Callable, Callable]:
    """A backend's two functions for plans that may have an epilogue.

    Args:
        forward, backward: as in :func:`dittfast.register_backend`; they see plans without one, and
            of the gradients ``backward`` returns the first three count.
    """

    def forward_with(q, k, v, t: PlanTensors, scale: float):
        out, lse = forward(q, k, v, without(t), scale)
        return apply(out, t).to(q.dtype), lse

    def backward_with(grad_out, grad_lse, q, k, v, out, lse, t: PlanTensors, scale: float):
        ends = None, None
        if has_epilogue(t):
            # Undoing it would lose what rounding, or a large residual, has taken.
            out, lse = forward(q, k, v, without(t), scale)
            grad_out, *ends = gradients(grad_out, out, t)
            grad_out = grad_out.to(q.dtype)
        grads = backward(grad_out, grad_lse, q, k, v, out, lse, without(t), scale)
        return *grads[:3], *ends

    return forward_with, backward_with


def has_epilogue(t: PlanTensors) -> bool:
    """Whether there is anything to do after attention."""
    return t.out_scale is not None or t.out_residual is not None


def without(t: PlanTensors) -> PlanTensors:
    """The plan of attention alone."""
    return t._replace(**dict.fromkeys(EPILOGUE))


def apply(out: torch.Tensor, t: PlanTensors) -> torch.Tensor:
    """``out_scale * out + out_residual``, at least in fp32, where the plan has them."""
    if not has_epilogue(t):
        return out
    out, blocks = _wide(out), query_blocks(t, out.shape[2])
    if t.out_scale is not None:
        out = out * t.out_scale.to(out)[:, :, blocks, None]
    if t.out_residual is not None:
        out = out + t.out_residual.to(out)[:, :, blocks]
    return out


def gradients(grad_out: torch.Tensor, out: torch.Tensor, t: PlanTensors) -> tuple:
    """Gradients, at least in fp32, of ``out [B, H, N, D]``, of out_scale and of out_residual.

    The last two per query block, None where the plan has none; ``out`` is that of attention alone.
    """
    grad, blocks, count = _wide(grad_out), query_blocks(t, out.shape[2]), t.q_starts.numel()
    grad_scale = grad_residual = None
    if t.out_residual is not None:
        grad_residual = sum_rows(grad, blocks, count)
    if t.out_scale is not None:
        dot = (grad * out).sum(-1, keepdim=True)
        grad_scale = sum_rows(dot, blocks, count)[..., 0]
        grad = grad * t.out_scale.to(grad)[:, :, blocks, None]
    return grad, grad_scale, grad_residual


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sum_rows(x: torch.Tensor, row: torch.Tensor, count: int) -> torch.Tensor:
    """``[B, H, count, D]``: the sums of ``x [B, H, N, D]`` over tokens of equal ``row [N]``.

    In the same order in every run.
    """
    if x.device.type == "cpu":
        return x.new_zeros(*x.shape[:2], count, x.shape[3]).index_add_(2, row, x)
    return sum_segments(x, row, count)


def sum_segments(x: torch.Tensor, row: torch.Tensor, count: int) -> torch.Tensor:
    """:func:`sum_rows` where index_add_ uses atomics."""
    by = torch.argsort(row, stable=True)
    edges = torch.searchsorted(row[by], torch.arange(count + 1, device=row.device))
    flat = x.permute(2, 0, 1, 3).flatten(1).index_select(0, by)
    sums = torch.segment_reduce(flat, "sum", offsets=edges, axis=0, unsafe=True, initial=0)
    return sums.view(count, *x.shape[:2], x.shape[3]).permute(1, 2, 0, 3)
