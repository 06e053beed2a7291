"""FlashInfer's attention over blocks of any size as a backend. Not run on a GPU yet.

``VariableBlockSparseAttentionWrapper`` takes one mask of blocks for each head, so every plan of
full blocks without log weights goes through as it is. It runs FlashAttention-3's kernel on Hopper
and FlashAttention-2's elsewhere, plans on the host in every call, and writes block lists out by
token, which is what :data:`_ENTRIES` bounds. It has no backward pass: gradients are ours.
"""

from __future__ import annotations

import math

import torch

from dittfast.plan import PlanTensors, block_states

from .capabilities import Capabilities
from .epilogue import with_epilogue
from .op import backward_of, define_backend, positive_scale
from .wheels import wheel_reasons

# The first release whose signatures these are.
LEAST = "0.7.4"
_TAKES = dict(
    devices=("cuda",),
    dtypes=(torch.float16, torch.bfloat16),
    architectures=tuple(f"sm_{n}" for n in (80, 86, 87, 89, 90, 100, 103, 120, 121)),
    partial_blocks=False, kv_log_weight=False, tail=True, slow_start=True,
)  # fmt: skip
CAPABILITIES = (
    Capabilities(head_dims=range(64, 129, 64), **_TAKES),
    Capabilities(head_dims=range(256, 257), **_TAKES),
)
_WORKSPACE = 128 << 20  # bytes, as its documentation recommends
# Listed keys of all query blocks and heads that are planned at once, about 24 bytes each.
_ENTRIES = 1 << 27
_MOST = (1 << 31) - 1  # that its int32 offsets can count


def machine_reasons(asked) -> list[str]:
    """Why FlashInfer cannot be used here; empty where it can. Does not import it."""
    reasons = wheel_reasons("pip install flashinfer-python", ("flashinfer-python", LEAST))
    if not reasons and "backward" in asked.needs:
        reasons += wheel_reasons("pip install triton", ("triton", None))
    return reasons


def forward(q, k, v, t: PlanTensors, scale: float):
    """Shapes as in :func:`dittfast.attend`; no epilogue. Returns ``(out, lse)``.

    Raises:
        ValueError: one head's query blocks list more keys than it can count.
    """
    q, scale = positive_scale(q, scale)
    q_rows, kv_rows = torch.argsort(t.q_starts), torch.argsort(t.kv_starts)
    lists = t.kv_indices, t.kv_num_blocks, t.kv_num_full_blocks
    seen = block_states(*lists, t.kv_starts.numel()) > 0
    # It counts blocks by where they stand.
    seen = seen[..., q_rows, :][..., kv_rows].expand(*q.shape[:2], -1, -1).flatten(0, 1)
    lengths = t.q_lengths[q_rows].int(), t.kv_lengths[kv_rows].int()
    # A row without a key is given one, and loses it afterwards.
    unseen = ~seen.any(-1)
    if bool(unseen.any()):
        seen = seen.clone()
        seen[..., 0] |= unseen
    entries = (seen.sum(1) * lengths[1]).sum(-1)
    most = int(entries.max())
    if most > _MOST:
        raise ValueError(
            f"the flashinfer backend writes a plan's lists out by token, {most:,} of one head, "
            f"and counts to {_MOST:,}; use larger blocks, or backend='triton'"
        )
    heads = [
        _in_order(x, order).flatten(0, 1)
        for x, order in ((q, t.q_order), (k, t.kv_order), (v, t.kv_order))
    ]
    step = max(1, _ENTRIES // most)
    parts = [
        _run(*(x[start : start + step] for x in (*heads, seen)), lengths, scale)
        for start in range(0, seen.shape[0], step)
    ]
    out, lse = (torch.cat(x).unflatten(0, q.shape[:2]) for x in zip(*parts))
    blocks = torch.repeat_interleave(lengths[0].long(), output_size=q.shape[2])
    hidden = unseen.unflatten(0, q.shape[:2])[..., blocks]
    out, lse = out.masked_fill(hidden[..., None], 0), lse.masked_fill(hidden, -torch.inf)
    return _by_token(out, t.q_order), _by_token(lse, t.q_order)


def _run(q, k, v, seen, lengths, scale: float):
    """``(out [H, N, D], lse [H, N])`` of some heads ``[H, N, D]`` with blocks in order."""
    import flashinfer

    count, _, dim = q.shape
    workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.VariableBlockSparseAttentionWrapper(workspace)
    rows, columns = (x.expand(count, -1).contiguous() for x in lengths)
    types = {"q_data_type": q.dtype, "kv_data_type": k.dtype}
    wrapper.plan(seen, rows, columns, count, count, dim, sm_scale=scale, **types)
    out, lse = wrapper.run(q, k, v, return_lse=True)
    return out, lse * math.log(2)  # its logarithm has base 2


def _in_order(x: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    return (x if order is None else x.index_select(2, order.long())).contiguous()


def _by_token(x: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    return x if order is None else torch.empty_like(x).index_copy_(2, order.long(), x)


attend = define_backend("flashinfer", *with_epilogue(forward, backward_of("triton")))
