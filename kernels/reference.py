"""The oracle: plan-masked attention written densely. The specification of every other backend.

Quadratic in memory, any float dtype, any device. Half precision is computed in fp32.
"""

from __future__ import annotations

import torch

from dittfast.plan import PlanTensors, dense_mask


def _rows(x: torch.Tensor, t: PlanTensors) -> torch.Tensor:
    """Per-query-block values ``[..., nQ, D]`` to per-token values ``[..., num_queries, D]``."""
    by = torch.argsort(t.q_starts)
    rows = x[..., torch.repeat_interleave(by, t.q_lengths[by].long()), :]
    if t.q_order is not None:
        rows = torch.empty_like(rows).index_copy_(-2, t.q_order.long(), rows)
    return rows


def _blocks(x: torch.Tensor, t: PlanTensors) -> torch.Tensor:
    """The sum of per-token values ``[..., num_queries, D]`` over each query block."""
    if t.q_order is not None:
        x = x.index_select(-2, t.q_order.long())
    by = torch.argsort(t.q_starts)
    block = torch.repeat_interleave(by, t.q_lengths[by].long())
    out = x.new_zeros(*x.shape[:-2], t.q_starts.numel(), x.shape[-1])
    return out.index_add_(-2, block, x)


def _probabilities(q, k, t: PlanTensors, scale: float):
    """``(p, lse)``; rows that see nothing get p = 0 and lse = -inf."""
    logits = torch.matmul(q, k.transpose(-1, -2)) * scale
    if t.kv_log_weight is not None:
        logits = logits + t.kv_log_weight[..., None, :].to(logits)
    logits = logits.masked_fill(~dense_mask(t, q.shape[-2], k.shape[-2]), -torch.inf)
    lse = torch.logsumexp(logits, -1)
    finite = lse.masked_fill(lse == -torch.inf, 0)
    return torch.exp(logits - finite[..., None]), lse


def _wide(*tensors: torch.Tensor) -> list[torch.Tensor]:
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return [x.to(dtype) for x in tensors]


def forward(q, k, v, t: PlanTensors, scale: float):
    """Shapes as in :func:`dittfast.attend`. Returns ``(out, lse)``."""
    wide_q, wide_k, wide_v = _wide(q, k, v)
    p, lse = _probabilities(wide_q, wide_k, t, scale)
    out = torch.matmul(p, wide_v)
    if t.out_scale is not None:
        out = out * _rows(t.out_scale[..., None].to(out), t)
    if t.out_residual is not None:
        out = out + _rows(t.out_residual.to(out), t)
    return out.to(q.dtype), lse


def backward(grad_out, grad_lse, q, k, v, out, lse, t: PlanTensors, scale: float):
    """Gradients of q, k, v and, where the plan has them, of out_scale and out_residual."""
    wide_q, wide_k, wide_v, grad = _wide(q, k, v, grad_out)
    p, _ = _probabilities(wide_q, wide_k, t, scale)
    raw = torch.matmul(p, wide_v)
    grad_scale = grad_residual = None
    if t.out_residual is not None:
        grad_residual = _blocks(grad, t)
    if t.out_scale is not None:
        grad_scale = _blocks((grad * raw).sum(-1, keepdim=True), t)[..., 0]
        grad = grad * _rows(t.out_scale[..., None].to(grad), t)
    delta = (grad * raw).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse.to(delta)
    grad_v = torch.matmul(p.transpose(-1, -2), grad)
    ds = p * (torch.matmul(grad, wide_v.transpose(-1, -2)) - delta[..., None]) * scale
    grad_q = torch.matmul(ds, wide_k)
    grad_k = torch.matmul(ds.transpose(-1, -2), wide_q)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_scale, grad_residual
