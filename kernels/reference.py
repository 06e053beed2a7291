"""The oracle: plan-masked attention written densely. The specification of every other backend.

Quadratic in memory, any float dtype, any device. Half precision is computed in fp32.
"""

from __future__ import annotations

import torch

from dittfast.plan import PlanTensors, dense_mask, query_blocks


def _rows(x: torch.Tensor, t: PlanTensors) -> torch.Tensor:
    """Per-query-block values ``[..., nQ, D]`` to per-token values ``[..., num_queries, D]``."""
    return x.index_select(-2, query_blocks(t))


def _blocks(x: torch.Tensor, t: PlanTensors) -> torch.Tensor:
    """The sum of per-token values ``[..., num_queries, D]`` over each query block."""
    out = x.new_zeros(*x.shape[:-2], t.q_starts.numel(), x.shape[-1])
    return out.index_add_(-2, query_blocks(t), x)


def _tail(t: PlanTensors, like: torch.Tensor):
    """``(lse [..., num_queries, 1], value [..., num_queries, D], index)`` of each token's tail."""
    lse, value = t.tail_lse[..., None].to(like), t.tail_value.to(like)
    if t.tail_index is None:
        return _rows(lse, t), _rows(value, t), query_blocks(t)
    index = t.tail_index.long()
    return lse, value.index_select(-2, index), index


def _probabilities(q, k, t: PlanTensors, scale: float):
    """``(p, lse)``; rows that see nothing get p = 0 and lse = -inf. A tail has the last column."""
    logits = torch.matmul(q, k.transpose(-1, -2)) * scale
    if t.kv_log_weight is not None:
        logits = logits + t.kv_log_weight[..., None, :].to(logits)
    logits = logits.masked_fill(~dense_mask(t, q.shape[-2], k.shape[-2]), -torch.inf)
    if t.tail_lse is not None:
        tail = _tail(t, logits)[0].expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, tail], -1)
    lse = torch.logsumexp(logits, -1)
    finite = lse.masked_fill(lse == -torch.inf, 0)
    return torch.exp(logits - finite[..., None]), lse


def _wide(*tensors: torch.Tensor) -> list[torch.Tensor]:
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return [x.to(dtype) for x in tensors]


def _weighted(p, v, t: PlanTensors):
    """The sum of all values, weighted with ``p``."""
    out = torch.matmul(p[..., : v.shape[-2]], v)
    return out if t.tail_lse is None else out + p[..., -1:] * _tail(t, v)[1]


def forward(q, k, v, t: PlanTensors, scale: float):
    """Shapes as in :func:`dittfast.attend`. Returns ``(out, lse)``."""
    wide_q, wide_k, wide_v = _wide(q, k, v)
    p, lse = _probabilities(wide_q, wide_k, t, scale)
    out = _weighted(p, wide_v, t)
    if t.out_scale is not None:
        out = out * _rows(t.out_scale[..., None].to(out), t)
    if t.out_residual is not None:
        out = out + _rows(t.out_residual.to(out), t)
    return out.to(q.dtype), lse


def backward(grad_out, grad_lse, q, k, v, out, lse, t: PlanTensors, scale: float):
    """Gradients of q, k, v and, where the plan has them, of its epilogue and its tail."""
    wide_q, wide_k, wide_v, grad = _wide(q, k, v, grad_out)
    p, _ = _probabilities(wide_q, wide_k, t, scale)
    raw = _weighted(p, wide_v, t)
    grad_scale = grad_residual = grad_tail_lse = grad_tail_value = None
    if t.out_residual is not None:
        grad_residual = _blocks(grad, t)
    if t.out_scale is not None:
        grad_scale = _blocks((grad * raw).sum(-1, keepdim=True), t)[..., 0]
        grad = grad * _rows(t.out_scale[..., None].to(grad), t)
    delta = (grad * raw).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse.to(delta)
    if t.tail_lse is not None:
        _, value, index = _tail(t, grad)
        p, p_tail = p[..., :-1], p[..., -1:]
        ds_tail = p_tail * ((grad * value).sum(-1) - delta)[..., None]
        grad_tail_lse = (ds_tail if t.tail_index is not None else _blocks(ds_tail, t))[..., 0]
        grad_tail_value = grad.new_zeros(*grad.shape[:2], *t.tail_value.shape[2:])
        grad_tail_value = grad_tail_value.index_add_(-2, index, p_tail * grad)
    grad_v = torch.matmul(p.transpose(-1, -2), grad)
    ds = p * (torch.matmul(grad, wide_v.transpose(-1, -2)) - delta[..., None]) * scale
    grad_q = torch.matmul(ds, wide_k)
    grad_k = torch.matmul(ds.transpose(-1, -2), wide_q)
    grads = grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)
    return *grads, grad_scale, grad_residual, grad_tail_lse, grad_tail_value
