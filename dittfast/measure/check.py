"""Attention on sampled query rows against dense attention, at full length."""

from __future__ import annotations

import torch

from ..attention import attend
from ..block_lists import block_states
from ..layout import inverse_permutation
from ..plan import Plan
from ..testing import assert_within_budget

# Query rows that are compared with the oracle.
_SAMPLED_ROWS = 64


class WrongResult(AssertionError):
    """A result that is to be measured is wrong."""


def mask_rows(plan: Plan, tokens: torch.Tensor) -> torch.Tensor:
    """``[B|1, H|1, n, num_keys]`` bool: rows of :meth:`Plan.to_dense_mask`, one by one.

    Memory is ``O(n * num_keys)``, so that a few rows can be checked at any length.
    """
    t = plan.to("cpu").tensors()
    at = tokens.cpu().long()
    if t.q_order is not None:
        at = inverse_permutation(t.q_order)[at].long()
    row = _block_of(t.q_starts, t.q_lengths)[at]
    lists = (x[:, :, row] for x in (t.kv_indices, t.kv_num_blocks, t.kv_num_full_blocks))
    state = block_states(*lists, t.kv_starts.numel())[..., _block_of(t.kv_starts, t.kv_lengths)]
    mask = state == 2
    if plan.rule is not None:
        rule = plan.to("cpu").rule
        mask |= (state == 1) & rule.keep(at[:, None], torch.arange(plan.num_keys))
    if t.kv_order is not None:
        mask = mask[..., inverse_permutation(t.kv_order).long()]
    return mask.to(plan.device)


def _block_of(starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    by = torch.argsort(starts)
    return torch.repeat_interleave(by, lengths[by].long())


def _oracle_rows(q, k, v, plan: Plan, tokens, mask, scale: float) -> torch.Tensor:
    """Dense attention of some query rows in the dtype of the inputs, written from the formula."""
    logits = q[:, :, tokens] @ k.transpose(-1, -2) * scale
    if plan.kv_log_weight is not None:
        logits = logits + plan.kv_log_weight[..., None, :].to(logits)
    out = torch.softmax(logits.masked_fill(~mask, -torch.inf), -1) @ v
    if plan.out_scale is None and plan.out_residual is None:
        return out
    at = tokens
    if plan.q_blocks.order is not None:
        at = inverse_permutation(plan.q_blocks.order)[tokens].long()
    row = _block_of(plan.q_blocks.starts, plan.q_blocks.lengths)[at]
    if plan.out_scale is not None:
        out = out * plan.out_scale[:, :, row, None].to(out)
    if plan.out_residual is not None:
        out = out + plan.out_residual[:, :, row].to(out)
    return out


def check_against_dense(
    q, k, v, grad_out, plan: Plan, scale: float, backend: str = "auto", backward: bool = False
) -> None:
    """Compare ``attend`` with a dense fp64 oracle on sampled query rows, at full length.

    With ``backward`` the gradient comes from the sampled rows alone, so that dq, dk and dv can be
    compared in full. Tolerance: a few times the error of plain attention in the same dtype.

    Raises:
        WrongResult: saying what differs, where and by how much.
    """
    total = q.shape[2]
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randperm(total, generator=draw)[: min(total, _SAMPLED_ROWS)].to(q.device)
    mask = mask_rows(plan, tokens)
    sampled = torch.zeros_like(grad_out)
    sampled[:, :, tokens] = grad_out[:, :, tokens]
    sides = []
    for name, dtype in (("attend", q.dtype), ("exact", torch.float64), ("eager", q.dtype)):
        leaves = [x.detach().to(dtype).requires_grad_(backward) for x in (q, k, v)]
        if name == "attend":
            out = attend(*leaves, plan, scale=scale, backend=backend)
            grad, rows = sampled, out[:, :, tokens]
        else:
            out = rows = _oracle_rows(*leaves, plan, tokens, mask, scale)
            grad = grad_out[:, :, tokens].to(dtype)
        grads = torch.autograd.grad(out, leaves, grad) if backward else ()
        sides.append([rows.detach(), *grads])
    try:
        for name, actual, exact, eager in zip(("out", "dq", "dk", "dv"), *sides):
            assert_within_budget(name, actual, exact, eager, floor=8)
    except AssertionError as error:
        raise WrongResult(f"attend disagrees with dense attention: {error}") from error


def detached(plan: Plan) -> Plan:
    """The plan without the graph that its epilogue and weights may hang on."""
    names = ("kv_log_weight", "out_scale", "out_residual")
    held = {n: x.detach() for n in names if (x := getattr(plan, n)) is not None}
    return plan.replace(**held) if held else plan
