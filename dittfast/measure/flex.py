"""The same plan under PyTorch's flex_attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..attention import attend
from ..block_lists import run_lengths
from ..plan import Plan
from .check import WrongResult
from .timing import with_gradient


def flex_inputs(q, k, v, plan: Plan):
    """What ``flex_attention`` needs to compute the same: ``(q, k, v, block mask, score_mod)``.

    q, k and v come back in the plan's block order, which flex_attention does not know.

    Raises:
        ValueError: a plan that flex_attention's equal blocks cannot express.
    """
    from torch.nn.attention.flex_attention import BlockMask

    t = plan.tensors()
    for starts, lengths, size in (
        (t.q_starts, t.q_lengths, t.q_block_size),
        (t.kv_starts, t.kv_lengths, t.kv_block_size),
    ):
        at = torch.arange(starts.numel(), device=starts.device) * size
        if not torch.equal(starts.long(), at) or bool((lengths[:-1] != size).any()):
            raise ValueError("flex_attention needs blocks of one size; this plan's are ragged")
    if t.out_scale is not None or t.out_residual is not None:
        raise ValueError("flex_attention has no epilogue")
    if t.tail_lse is not None:
        raise ValueError("flex_attention takes no tail")
    if t.q_order is not None:
        q = q[:, :, t.q_order.long()]
    weight = t.kv_log_weight
    if t.kv_order is not None:
        k, v = (x[:, :, t.kv_order.long()] for x in (k, v))
        weight = None if weight is None else weight[..., t.kv_order.long()]
    # flex_attention wants lists as wide as there are key blocks, and indices even in unused slots.
    columns = t.kv_starts.numel()
    listed = F.pad(t.kv_indices, (0, columns - t.kv_indices.shape[-1]))
    slot = torch.arange(columns, dtype=torch.int32, device=listed.device)
    runs = run_lengths(t.kv_indices, t.kv_num_blocks)
    listed = torch.where((runs > 0)[..., None], slot, listed)
    full = t.kv_num_full_blocks
    partial = t.kv_num_blocks - full
    shifted = listed.gather(-1, (slot + full[..., None]).clamp_max_(columns - 1))
    mask = BlockMask.from_kv_blocks(
        partial,
        shifted.where(slot < partial[..., None], 0),
        full,
        listed.where(slot < full[..., None], 0),
        BLOCK_SIZE=(t.q_block_size, t.kv_block_size),
        mask_mod=None if plan.rule is None else _mask_mod(plan.rule),
        seq_lengths=(plan.num_queries, plan.num_keys),
    )
    return q, k, v, mask, None if weight is None else _score_mod(weight)


def _mask_mod(rule) -> Callable:
    def mask_mod(batch, head, q_at, kv_at):
        return rule.keep(q_at, kv_at)

    return mask_mod


def _score_mod(weight: torch.Tensor) -> Callable:
    per_batch, per_head = (int(n > 1) for n in weight.shape[:2])

    def score_mod(score, batch, head, q_at, kv_at):
        return score + weight[batch * per_batch, head * per_head, kv_at]

    return score_mod


def flex_function(q, k, v, grad_out, plan: Plan, scale: float, backward: bool) -> Callable:
    """Compiled flex_attention on the same plan, run once and compared with attend."""
    from torch.nn.attention.flex_attention import flex_attention

    fq, fk, fv, mask, score_mod = flex_inputs(q, k, v, plan)
    fq, fk, fv = (x.detach().requires_grad_(backward) for x in (fq, fk, fv))
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def run():
        return compiled(fq, fk, fv, score_mod=score_mod, block_mask=mask, scale=scale)

    with torch.set_grad_enabled(backward):
        out = run()
    expected = attend(q, k, v, plan, scale=scale)
    if plan.q_blocks.order is not None:
        expected = expected[:, :, plan.q_blocks.order.long()]
    error = float((out.detach().double() - expected.double()).abs().max())
    limit = 64 * torch.finfo(q.dtype).eps * float(expected.abs().max())
    if not error <= limit:
        raise WrongResult(f"its result differs by {error:.2e}, more than {limit:.2e}")
    if not backward:
        return run
    order = plan.q_blocks.order
    grad = grad_out if order is None else grad_out[:, :, order.long()]
    return with_gradient(run, (fq, fk, fv), grad)
