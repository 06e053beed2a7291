"""The tail of a plan, around any backend: what a query does not list, as one key more.

The backend runs without it. Of a softmax over two sets of keys, each part is known from its own
output and log-sum-exp (FlashAttention, arXiv:2205.14135), so merging them afterwards is exact::

    lse = logaddexp(lse, tail_lse)    share = exp(tail_lse - lse)    out += share (tail_value - out)

With this lse and out in place of its own, a backend's backward pass gives the gradients of q, k and
v as they are: it takes probabilities from lse, and from out the sum ``delta`` over all keys.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dittfast.plan import TAIL, PlanTensors, query_blocks

from . import epilogue
from .epilogue import sum_rows

# Values computed at once: bounds memory.
_VALUES = 1 << 26


def with_tail(forward: Callable, backward: Callable) -> tuple[Callable, Callable]:
    """A backend's two functions for plans that may have a tail.

    Args:
        forward: as in :func:`dittfast.register_backend`; it sees plans without a tail.
        backward: likewise. It has to use the ``out`` and ``lse`` that it is given.

    Returns:
        The same functions; ``backward`` also gives the gradients of tail_lse and tail_value, or
        None for each. Where there is a tail the epilogue is applied here, because it comes after.
    """

    def merged(q, k, v, t: PlanTensors, scale: float):
        out, lse = forward(q, k, v, _bare(t), scale)
        return merge(out, lse, t)

    def forward_with(q, k, v, t: PlanTensors, scale: float):
        if t.tail_lse is None:
            return forward(q, k, v, t, scale)
        out, lse = merged(q, k, v, t, scale)
        return epilogue.apply(out, t).to(out.dtype), lse

    def backward_with(grad_out, grad_lse, q, k, v, out, lse, t: PlanTensors, scale: float):
        if t.tail_lse is None:
            return *backward(grad_out, grad_lse, q, k, v, out, lse, t, scale), None, None
        grad_scale = grad_residual = None
        if epilogue.has_epilogue(t):
            # Undoing the epilogue would lose what rounding, or a large residual, has taken.
            out, lse = merged(q, k, v, t, scale)
            grad_out, grad_scale, grad_residual = epilogue.gradients(grad_out, out, t)
            grad_out = grad_out.to(q.dtype)
        grads = backward(grad_out, grad_lse, q, k, v, out, lse, _bare(t), scale)
        ends = gradients(grad_out, grad_lse, out, lse, t)
        return *grads[:3], grad_scale, grad_residual, *ends

    return forward_with, backward_with


def merge(out, lse, t: PlanTensors) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out, lse)`` of a softmax over the listed keys with the plan's tail as one key more.

    Args:
        out: ``[B, H, N, D]``. lse: ``[B, H, N]``; -inf where a query sees nothing, with out 0.
    """
    index = _index(t, out)
    merged, total = torch.empty_like(out), torch.empty_like(lse)
    for heads in _portions(out):
        tail_lse, value = _tail(t, heads, index, lse.dtype)
        total[:, heads] = torch.logaddexp(lse[:, heads], tail_lse)
        share = _share(tail_lse, total[:, heads])
        merged[:, heads] = out[:, heads].to(lse).lerp(value.expand(out[:, heads].shape), share)
    return merged, total


def gradients(grad_out, grad_lse, out, lse, t: PlanTensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of tail_lse ``[B, H, nQ|N]`` and tail_value ``[B, H, nQ|nT, D]``; no atomics.

    Args:
        grad_out, grad_lse, out, lse: of what :func:`merge` gave; grad_lse may be None.
    """
    index, count = _index(t, out), t.tail_value.shape[2]
    logits, values = [], []
    for heads in _portions(out):
        tail_lse, value = _tail(t, heads, index, lse.dtype)
        share = _share(tail_lse, lse[:, heads])
        grad = grad_out[:, heads].to(lse)
        logit = (grad * (value - out[:, heads])).sum(-1, keepdim=True)
        if grad_lse is not None:
            logit = logit + grad_lse[:, heads, :, None]
        logit = logit * share
        logits.append(sum_rows(logit, index, count) if t.tail_index is None else logit)
        values.append(sum_rows(grad * share, index, count))
    return torch.cat(logits, 1)[..., 0], torch.cat(values, 1)


def _bare(t: PlanTensors) -> PlanTensors:
    return t._replace(**dict.fromkeys((*TAIL, *epilogue.EPILOGUE)))


def _index(t: PlanTensors, out: torch.Tensor) -> torch.Tensor:
    return query_blocks(t, out.shape[2]) if t.tail_index is None else t.tail_index.long()


def _portions(out: torch.Tensor) -> list[slice]:
    """Heads that are merged together."""
    batch, heads, rows, width = out.shape
    step = max(1, _VALUES // (batch * rows * width))
    return [slice(start, start + step) for start in range(0, heads, step)]


def _tail(t: PlanTensors, heads: slice, index: torch.Tensor, dtype: torch.dtype):
    """``(lse [B|1, h|1, N], value [B|1, h|1, N, D])`` of each query's tail, in ``dtype``."""
    both = t.tail_lse, t.tail_value
    lse, value = ((x if x.shape[1] == 1 else x[:, heads]).to(dtype) for x in both)
    if t.tail_index is None:
        lse = lse.index_select(2, index)
    return lse, value.index_select(2, index)


def _share(tail_lse: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """``[B, H, N, 1]``: the tail's part of each softmax; 0 where a query has neither."""
    return torch.exp(tail_lse - lse.masked_fill(lse == -torch.inf, 0))[..., None]
