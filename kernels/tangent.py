"""The forward-mode derivative of attention under a plan, in plain PyTorch, for every backend.

With ``p`` the probabilities and ``s`` the logits of one query, dots for tangents::

    ds  = scale (dq kᵀ + q dkᵀ)     dlse = Σ p ds     dout = Σ p (ds v + dv) - dlse out

A tail is one key more, whose logit and value have tangents of their own.

All of these are sums over keys once the log-sum-exp is known, so pairs of blocks are gathered and
added in any portion that fits in memory. About three times the multiplications of the forward.
"""

from __future__ import annotations

import torch

from dittfast.plan import PlanTensors, block_positions, query_blocks, token_rule

# Values gathered or computed at once: bounds memory.
_VALUES = 1 << 24


def tangents(
    given, q, k, v, lse, t: PlanTensors, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(d out, d lse)`` in at least fp32.

    Args:
        given: tangents of q, k, v and, or None, of out_scale, out_residual and the tail.
        lse: of the forward; -inf where a query sees nothing, whose derivatives are 0.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    given = (None if x is None else x.to(dtype) for x in given)
    dq, dk, dv, d_scale, d_residual, d_tail_lse, d_tail_value = given
    q, k, v = (x.to(dtype) for x in (q, k, v))
    # Once a pair of blocks is there, [dq, q] and [k, dk] give ds in one product.
    queries, keys = torch.cat([dq, q], -1), torch.cat([k, dk], -1)
    lse = lse.to(dtype).masked_fill(lse == -torch.inf, 0)
    # out, its derivative and, in one last column, that of lse; by token.
    width = v.shape[-1]
    sums = q.new_zeros(*q.shape[:3], 2 * width + 1)
    weight = None if t.kv_log_weight is None else t.kv_log_weight.expand(*q.shape[:2], -1)
    lists = t.kv_indices.shape[:2]
    for batch, head in torch.cartesian_prod(*(torch.arange(n) for n in lists)).tolist():
        own = tuple(
            slice(None) if n == 1 else slice(at, at + 1) for n, at in zip(lists, (batch, head))
        )
        inputs = (x if x is None else x[own] for x in (queries, keys, v, dv, lse, weight, sums))
        _add_list(*inputs, t, (batch, head), scale)
    out, d_out, d_lse = sums[..., :width], sums[..., width:-1], sums[..., -1:]
    row = query_blocks(t, q.shape[2])
    if t.tail_lse is not None:
        index, tail_lse = row, t.tail_lse.to(dtype)
        if t.tail_index is None:
            tail_lse, d_tail_lse = (x.index_select(2, row) for x in (tail_lse, d_tail_lse))
        else:
            index = t.tail_index.long()
        value = t.tail_value.to(dtype).index_select(2, index)
        p = (tail_lse - lse).exp()[..., None]
        p_ds = p * d_tail_lse[..., None]
        out = out + p * value
        d_out = d_out + p_ds * value + p * d_tail_value.index_select(2, index)
        d_lse = d_lse + p_ds
    d_out = d_out - d_lse * out
    if t.out_scale is not None:
        per_row = lambda x: x.to(dtype).index_select(2, row)[..., None]  # noqa: E731
        d_out = d_out * per_row(t.out_scale) + out * per_row(d_scale)
    if d_residual is not None:
        d_out = d_out + d_residual.index_select(2, row)
    return d_out, d_lse[..., 0]


def _add_list(queries, keys, v, dv, lse, weight, sums, t: PlanTensors, at, scale: float) -> None:
    """Add what the block pairs of one list give to ``sums``, in place."""
    width = v.shape[-1]
    rule = token_rule(t)
    indices, count, full = (x[at] for x in (t.kv_indices, t.kv_num_blocks, t.kv_num_full_blocks))
    is_run = count > indices.shape[-1]
    per_pair = t.kv_block_size * (4 * width + 3 * t.q_block_size) * v.shape[0] * v.shape[1]
    most = max(1, _VALUES // per_pair)
    # Rows of like length together: little is padded.
    by = torch.argsort(count, descending=True)
    longest = count[by].tolist()
    first = 0
    while first < len(longest):
        size = longest[first]
        if not size:  # rows that list nothing
            break
        rows = by[first : first + max(1, most // size)]
        first += rows.numel()
        for start in range(0, size, most):
            slot = torch.arange(start, min(size, start + most), device=by.device)
            listed = indices[rows].index_select(1, slot.clamp_max(indices.shape[-1] - 1))
            block = torch.where(is_run[rows, None], slot, listed)
            used = slot < count[rows, None]
            q_at, q_in = block_positions(t.q_starts, t.q_lengths, rows, t.q_block_size)
            block = torch.where(used, block, 0).flatten().long()
            kv_at, kv_in = block_positions(t.kv_starts, t.kv_lengths, block, t.kv_block_size)
            spread = lambda x: x.repeat_interleave(t.kv_block_size, 1)[:, None]  # noqa: E731
            kv_at, kv_in = (x.view(rows.numel(), -1) for x in (kv_at, kv_in))
            keep = kv_in[:, None] & spread(used)
            if rule is not None:
                whole = spread(slot < full[rows, None])
                keep = keep & (whole | rule.keep(q_at[:, :, None], kv_at[:, None]))
            q_token = q_at if t.q_order is None else t.q_order.long()[q_at]
            kv_token = kv_at if t.kv_order is None else t.kv_order.long()[kv_at]
            near_q, near_k = queries[:, :, q_token], keys[:, :, kv_token]
            logits = near_q[..., width:] @ near_k[..., :width].mT * scale
            if weight is not None:
                logits = logits + weight[:, :, kv_token][..., None, :].to(logits)
            logits = (logits - lse[:, :, q_token][..., None]).masked_fill(~keep, -torch.inf)
            p = logits.exp()
            p_ds = p * (near_q @ near_k.mT * scale)
            near_v, near_dv = v[:, :, kv_token], dv[:, :, kv_token]
            added = [p @ near_v, p_ds @ near_v + p @ near_dv, p_ds.sum(-1, keepdim=True)]
            # Slots past the end of a short block repeat a query: they must add nothing.
            added = torch.cat(added, -1).masked_fill(~q_in[..., None], 0)
            sums.index_add_(2, q_token.flatten(), added.flatten(2, 3))
