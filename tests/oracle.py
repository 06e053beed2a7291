"""Attention under a plan, pair by pair from the plan's raw fields; shares no code with dittfast.

What a Plan says of itself (masks, density, the tensors it hands to a backend) is under test, so
none of it is used here: only the fields that its docstring describes.
"""

import numpy as np
import torch

# What a plan holds that has gradients.
ENDS = ("out_scale", "out_residual", "tail_lse", "tail_value")


def positions(blocks, block):
    start = int(blocks.starts[block])
    return np.arange(start, start + int(blocks.lengths[block]))


def tokens(blocks, at):
    """The tokens that stand at some positions."""
    return at if blocks.order is None else blocks.order.numpy()[at]


def counts(plan):
    """(queries, keys) of a plan."""
    return tuple(int(blocks.lengths.sum()) for blocks in (plan.q_blocks, plan.kv_blocks))


def rule_keeps(rule, q_at, kv_at):
    """TokenRule's docstring for positions that broadcast."""
    q_frame, kv_frame = rule.q_frame.numpy()[q_at], rule.kv_frame.numpy()[kv_at]
    a, b = rule.q_place.numpy()[q_at].astype(np.int64), rule.kv_place.numpy()[kv_at]
    row = 2**rule.place_bits
    if rule.metric == "box":
        frame_last, last = rule.q_frame_last.numpy()[q_at], rule.q_place_last.numpy()[q_at]
        within = (q_frame % 65536 <= kv_frame % 65536) & (kv_frame % 65536 <= frame_last % 65536)
        within &= (a // row <= b // row) & (b // row <= last // row)
        within &= (a % row <= b % row) & (b % row <= last % row)
    else:
        if rule.metric == "raster":
            distance = np.abs(a - b)
        else:
            distance = (a // row - b // row) ** 2 + (a % row - b % row) ** 2
        limits = rule.limits.numpy()
        apart = np.abs(q_frame % 65536 - kv_frame % 65536)
        within = distance <= limits[np.minimum(apart, len(limits) - 1)]
    context = (q_frame < 0) | (kv_frame < 0)
    other_grid = q_frame // 65536 != kv_frame // 65536
    return context | other_grid | (kv_frame % 65536 < rule.sink_frames) | within


def listed(plan, batch, head, row):
    """``[(key block, is full)]`` of one query block."""
    indices = plan.kv_indices[batch, head, row].tolist()
    count = int(plan.kv_num_blocks[batch, head, row])
    if count > len(indices):  # a run
        return [(block, True) for block in range(count)]
    full = int(plan.kv_num_full_blocks[batch, head, row])
    return [(block, slot < full) for slot, block in enumerate(indices[:count])]


def block_mask(plan):
    """Bool ``[B|1, H|1, nQ, nK]``: blocks seen in whole or in part."""
    lists = plan.kv_indices.shape[:3]
    mask = torch.zeros(*lists, len(plan.kv_blocks.starts), dtype=torch.bool)
    for at in np.ndindex(*lists):
        mask[at][[block for block, _ in listed(plan, *at)]] = True
    return mask


def mask(plan):
    """Bool ``[B|1, H|1, num_queries, num_keys]`` in token order: the pairs that a plan keeps."""
    lists = plan.kv_indices.shape[:3]
    kept = np.zeros((*lists[:2], *counts(plan)), dtype=bool)
    for batch, head, row in np.ndindex(*lists):
        q_at = positions(plan.q_blocks, row)
        for block, full in listed(plan, batch, head, row):
            kv_at = positions(plan.kv_blocks, block)
            where = np.ix_(tokens(plan.q_blocks, q_at), tokens(plan.kv_blocks, kv_at))
            keep = full or rule_keeps(plan.rule, q_at[:, None], kv_at)
            kept[batch, head][where] = keep
    return torch.from_numpy(kept)


def row_values(x, blocks):
    """``[..., nQ, D]`` per query block as ``[..., num_queries, D]`` per token."""
    block = np.empty(int(blocks.lengths.sum()), dtype=np.int64)
    for row in range(len(blocks.starts)):
        block[tokens(blocks, positions(blocks, row))] = row
    return x[..., torch.from_numpy(block), :]


def tails(plan):
    """``(lse [..., num_queries, 1], value [..., num_queries, D])`` of each query's tail."""
    lse, value = plan.tail_lse[..., None], plan.tail_value
    if plan.tail_index is not None:
        return lse, value[:, :, plan.tail_index.long()]
    return row_values(lse, plan.q_blocks), row_values(value, plan.q_blocks)


def attention(q, k, v, plan, weight=None, scale=None):
    """``(out, lse)`` in the inputs' dtype, from PyTorch's own functions, for autograd.

    Args:
        weight: the call's ``kv_log_weight``, on top of the plan's.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    for x in (plan.kv_log_weight, weight):
        if x is not None:
            logits = logits + x[:, :, None, :].to(logits)
    logits = torch.where(mask(plan), logits, -torch.inf)
    if plan.tail_lse is not None:
        tail_lse, tail_value = tails(plan)
        logits = torch.cat([logits, tail_lse.to(logits).expand(*logits.shape[:-1], 1)], -1)
    unseen = (logits == -torch.inf).all(-1, keepdim=True)
    logits = logits.masked_fill(unseen, 0)
    lse = torch.logsumexp(logits, -1)
    p = torch.exp(logits - lse[..., None]).masked_fill(unseen, 0)
    out = torch.einsum("bhij,bhjd->bhid", p[..., : v.shape[2]], v)
    if plan.tail_lse is not None:
        out = out + p[..., -1:] * tail_value.to(out)
    if plan.out_scale is not None:
        out = out * row_values(plan.out_scale[..., None].to(out), plan.q_blocks)
    if plan.out_residual is not None:
        out = out + row_values(plan.out_residual.to(out), plan.q_blocks)
    return out, lse.masked_fill(unseen[..., 0], -torch.inf)


def results(q, k, v, grad_out, grad_lse, plan, weight=None, scale=None):
    """``{name: value}`` of out, lse and all gradients, in fp64."""
    leaves = {"q": q, "k": k, "v": v}
    leaves |= {name: getattr(plan, name) for name in ENDS}
    leaves = {n: x.detach().double().requires_grad_() for n, x in leaves.items() if x is not None}
    ends = {n: x for n, x in leaves.items() if n in ENDS}
    plan = plan.replace(**ends) if ends else plan
    out, lse = attention(*(leaves[n] for n in "qkv"), plan, weight, scale)
    # Where a query sees nothing lse is a constant.
    total = (out * grad_out.double()).sum()
    if grad_lse is not None:
        seen = lse != -torch.inf
        total = total + (lse[seen] * grad_lse.double()[seen]).sum()
    grads = torch.autograd.grad(total, list(leaves.values()))
    found = {"out": out.detach(), "lse": lse.detach()}
    return found | {f"d{name}": g for name, g in zip(leaves, grads)}


def pairs(plan, num_real_keys=None):
    """``(density, pairs)``: the kept share of real token pairs, and all that are computed.

    Means over batch rows and heads; keys of log weight -inf are not there. A tail is a pair.
    """
    kept = mask(plan)
    shown = torch.ones(1, 1, kept.shape[-1], dtype=torch.bool)
    if plan.kv_log_weight is not None:
        shown = plan.kv_log_weight != -torch.inf
    seen = (kept & shown[:, :, None]).double()
    real = slice(0, num_real_keys)
    # A mean over what broadcasts: batch rows and heads that share a list or a weight.
    density = seen[..., real].sum((-2, -1)).mean() / (
        kept.shape[-2] * shown[..., real].double().sum(-1).mean()
    )
    tail = 0.0
    if plan.tail_lse is not None:
        tail = float((tails(plan)[0] != -torch.inf).double().sum((-2, -1)).mean())
    return float(density), float(seen.sum((-2, -1)).mean()) + tail
