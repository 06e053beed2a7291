"""cuDNN's block-sparse attention (nvidia-cudnn-frontend) as a backend. Not run on a GPU yet.

It takes full blocks of 64 or 128 tokens and, for each key block, how many tokens at its front
count. So smaller and ragged blocks are padded; token rules and log weights are refused.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dittfast.plan import PlanTensors

from .capabilities import Capabilities, architecture_of
from .epilogue import with_epilogue
from .equal_blocks import Side, lists, side, to_slots, to_tokens
from .op import define_backend, positive_scale
from .wheels import wheel_reasons

# The first release whose signatures these are.
LEAST = "1.32.0"
_TAKES = dict(
    partial_blocks=False, kv_log_weight=False, tail=True, slow_start=True,
    # Half of a block of 64 or more: padding at most doubles the work.
    q_block_sizes=range(33, 129), kv_block_sizes=range(33, 129),
)  # fmt: skip
_FORWARD = dict(backward=False, **_TAKES)
_BACKWARD = dict(deterministic=False, **_TAKES)
_HALF = (torch.float16, torch.bfloat16)
_BLACKWELL = ("sm_100", "sm_103")
CAPABILITIES = (
    Capabilities(("cuda",), (torch.bfloat16,), ("sm_90",), range(128, 129), **_BACKWARD),
    Capabilities(("cuda",), (torch.bfloat16,), _BLACKWELL, range(64, 129, 64), **_BACKWARD),
    Capabilities(
        ("cuda",), _HALF, ("sm_90", *_BLACKWELL, "sm_110"), range(64, 129, 32), **_FORWARD
    ),
    Capabilities(("cuda",), _HALF, ("sm_120", "sm_121"), range(128, 129), **_FORWARD),
)


def machine_reasons(asked) -> list[str]:
    """Why cuDNN's package cannot be used here; empty where it can. Does not import it."""
    install = "pip install 'nvidia-cudnn-frontend[cutedsl]'"
    return wheel_reasons(install, ("nvidia-cudnn-frontend", LEAST), ("nvidia-cutlass-dsl", None))


class _Problem(NamedTuple):
    """What the kernels take besides tensors; ``queries`` and ``keys`` None where all stands."""

    queries: Side | None
    keys: Side | None
    options: dict


def _problem(q, k, t: PlanTensors, scale: float) -> _Problem:
    small = max(t.q_block_size, t.kv_block_size) <= 64
    size = 64 if small and architecture_of(q.device) in ("sm_90", "sm_120", "sm_121") else 128
    queries, keys = side(t, "q", size, q.shape[2]), side(t, "kv", size, k.shape[2])
    _, _, count, blocks = lists(t)
    heads = q.shape[:2]
    options = {
        "q2k_block_index": blocks.expand(*heads, -1, -1).contiguous(),
        "q2k_block_nums": count.expand(*heads, -1).contiguous(),
        "block_sizes": None if keys is None or keys.padding is None else t.kv_lengths.int(),
        "sparse_block_size": size,
        "softmax_scale": scale,
    }
    return _Problem(queries, keys, options)


def forward(q, k, v, t: PlanTensors, scale: float):
    """Shapes as in :func:`dittfast.attend`; no epilogue. Returns ``(out, lse)``."""
    q, scale = positive_scale(q, scale)
    import cudnn

    queries, keys, options = _problem(q, k, t, scale)
    result = cudnn.block_sparse_attention_forward(
        to_slots(q, queries), to_slots(k, keys), to_slots(v, keys),
        # A row that lists nothing has a tail.
        allow_empty_block_nums=True, pack_gqa=False, **options,
    )  # fmt: skip
    parts = result["o_tensor"], result["lse_tensor"]
    return tuple(to_tokens(x, queries, q.shape[2]) for x in parts)


def backward(grad_out, grad_lse, q, k, v, out, lse, t: PlanTensors, scale: float):
    """Gradients of q, k and v.

    Raises:
        NotImplementedError: lse has a gradient, which cuDNN's backward pass does not take.
    """
    import cudnn

    if grad_lse is not None and bool(grad_lse.any()):
        raise NotImplementedError("the cudnn backend passes no gradient on from lse; use triton's")
    queries, keys, options = _problem(q, k, t, scale)
    result = cudnn.block_sparse_attention_backward(
        to_slots(grad_out, queries, is_gradient=True),
        *(to_slots(x, one) for x, one in ((q, queries), (k, keys), (v, keys))),
        to_slots(out, queries), to_slots(lse, queries), **options,
    )  # fmt: skip
    dq = to_tokens(result["dq_tensor"], queries, q.shape[2])
    return dq, *(to_tokens(result[f"d{x}_tensor"], keys, k.shape[2]) for x in "kv")


attend = define_backend("cudnn", *with_epilogue(forward, backward))
