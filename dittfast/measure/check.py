"""Attention on sampled query rows against dense attention, at full length."""

from __future__ import annotations

import torch

from ..attention import attend, computing_call, method_attention, method_call
from ..block_lists import block_states
from ..layout import Layout, inverse_permutation
from ..methods.amount import Amount, mean_amount
from ..methods.base import Method
from ..methods.head_groups import select_heads, split
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
    logits = logits.masked_fill(~mask, -torch.inf)
    at = tokens
    if plan.q_blocks.order is not None:
        at = inverse_permutation(plan.q_blocks.order)[tokens].long()
    row = _block_of(plan.q_blocks.starts, plan.q_blocks.lengths)[at]
    if plan.tail_lse is None:
        out = torch.softmax(logits, -1) @ v
    else:
        per_block = plan.tail_index is None
        index = row if per_block else plan.tail_index[tokens].long()
        tail = plan.tail_lse[:, :, row if per_block else tokens, None].to(logits)
        tail = tail.expand(*logits.shape[:-1], 1)
        p = torch.softmax(torch.cat([logits, tail], -1), -1)
        out = p[..., :-1] @ v + p[..., -1:] * plan.tail_value[:, :, index].to(v)
    if plan.out_scale is not None:
        out = out * plan.out_scale[:, :, row, None].to(out)
    if plan.out_residual is not None:
        out = out + plan.out_residual[:, :, row].to(out)
    return out


def check_attention(
    method: Method,
    layout: Layout,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad_out: torch.Tensor,
    *,
    scale: float | None = None,
    kv_log_weight: torch.Tensor | None = None,
    backend: str = "auto",
    backward: bool = False,
    plan: Plan | None = None,
    hidden_states: torch.Tensor | None = None,
) -> tuple[Amount, Plan | None]:
    """Compare a method on q, k and v with its definition in fp64, on sampled query rows.

    Of a method that plans that is dense attention under its own plan, of one that computes its own
    output its :meth:`~dittfast.methods.base.Method.formula`; of groups of heads, each by itself.

    Args:
        plan: of a method that plans, from the layout alone, where there is one already.
        hidden_states: ``[B, N, C]``, for a method that needs them.

    Returns:
        How much of dense attention it does, and its plan (of the first heads that have one).

    Raises:
        WrongResult: saying what differs, where and by how much.
    """
    amounts, first = [], None
    for group in split(method, q.shape[1]):
        own, mine = group.method, (select_heads(x, group.heads, q.shape[1]) for x in (q, k, v))
        weight = kv_log_weight
        if weight is not None and weight.shape[1] > 1:
            weight = weight[:, list(group.heads)]
        inputs, grad = tuple(mine), grad_out[:, list(group.heads)]
        own.prepare(layout, q.device)
        if own.computes:
            given = {"kv_log_weight": weight, "scale": scale, "backend": backend}
            given["hidden_states"] = hidden_states
            plans = _check_formula(own, layout, inputs, grad, backward, **given)
            amount = computed_amount(own, layout, inputs[0], plans)
        else:
            made, inputs, softmax_scale = method_plan(own, layout, *inputs, scale, weight, plan)
            amount = own.amount(layout, len(group.heads), q.shape[3], made)
            check_against_dense(*inputs, grad, made, softmax_scale, backend, backward)
            first = first or made
        amounts.append((len(group.heads), amount))
    return mean_amount(amounts), first


def method_plan(
    method: Method, layout: Layout, q, k, v, scale=None, kv_log_weight=None, plan=None
) -> tuple[Plan, tuple[torch.Tensor, ...], float]:
    """``(plan, (q, k, v) with summary tokens, scale)`` that attention gets by a planning method.

    The mask's log weights are the plan's own then, and nothing in it carries a gradient.
    """
    given = {"plan": plan, "scale": scale, "kv_log_weight": kv_log_weight}
    call = method_call(method, layout, q, k, v, **given)
    plan, weight = detached(call.plan), call.kv_log_weight
    if weight is not None:
        if plan.kv_log_weight is not None:
            weight = weight + plan.kv_log_weight
        plan = plan.replace(kv_log_weight=weight)
    return plan, (q, call.k, call.v), call.scale


def computed_amount(method: Method, layout: Layout, q: torch.Tensor, plans: list[Plan]) -> Amount:
    """How much a method does that computes its own output; ``plans`` are those it ran under."""
    inner = (part.amount(layout, None, None, plan) for part in method.parts for plan in plans)
    observed, kept = mean_amount((1, amount) for amount in inner), method.keep(layout, q.device)
    return method.amount(layout, q.shape[1], q.shape[3], kept, observed)


def _check_formula(method, layout, inputs, grad_out, backward, **given) -> list[Plan]:
    """Also the plans that the method made from q and k."""
    tokens, plans = _sampled(inputs[0]), []
    sampled = torch.zeros_like(grad_out)
    sampled[:, :, tokens] = grad_out[:, :, tokens]
    sides = []
    for name, dtype in (("method", grad_out.dtype), ("exact", torch.float64), ("eager", None)):
        dtype = dtype or grad_out.dtype
        leaves = [x.detach().to(dtype).requires_grad_(backward) for x in inputs]
        if name == "method":
            watch = lambda plan, heads=1: plans.append(detached(plan))  # noqa: E731
            out = method_attention(method, layout, *leaves, on_plan=watch, **given)
            rows, grad = out[:, :, tokens], sampled
        else:
            # The backend under test need not take fp64.
            call = computing_call(method, layout, *leaves, **given | {"backend": "auto"})
            out = rows = method.formula(layout, *leaves, tokens, call)
            grad = grad_out[:, :, tokens].to(dtype)
        sides.append([rows.detach(), *(torch.autograd.grad(out, leaves, grad) if backward else ())])
    _compare(f"{method.name} disagrees with its formula", sides)
    return plans


def _sampled(q: torch.Tensor) -> torch.Tensor:
    total = q.shape[2]
    draw = torch.Generator().manual_seed(0)
    return torch.randperm(total, generator=draw)[: min(total, _SAMPLED_ROWS)].to(q.device)


def _compare(what: str, sides: list) -> None:
    """Raise WrongResult unless the first of three sides is within the budget of the others."""
    try:
        for name, actual, exact, eager in zip(("out", "dq", "dk", "dv"), *sides):
            assert_within_budget(name, actual, exact, eager, floor=8)
    except AssertionError as error:
        raise WrongResult(f"{what}: {error}") from error


def check_against_dense(
    q, k, v, grad_out, plan: Plan, scale: float, backend: str = "auto", backward: bool = False
) -> None:
    """Compare ``attend`` with a dense fp64 oracle on sampled query rows, at full length.

    With ``backward`` the gradient comes from the sampled rows alone, so that dq, dk and dv can be
    compared in full. Tolerance: a few times the error of plain attention in the same dtype.

    Raises:
        WrongResult: saying what differs, where and by how much.
    """
    tokens = _sampled(q)
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
    _compare("attend disagrees with dense attention", sides)


def detached(plan: Plan) -> Plan:
    """The plan without the graph that its epilogue, tail and weights may hang on."""
    names = ("kv_log_weight", "out_scale", "out_residual", "tail_lse", "tail_value")
    held = {n: x.detach() for n in names if (x := getattr(plan, n)) is not None}
    return plan.replace(**held) if held else plan
