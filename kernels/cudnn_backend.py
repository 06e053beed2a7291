"""cuDNN's block-sparse attention (nvidia-cudnn-frontend) as a backend. Not run on a GPU yet.

It takes full blocks of 64 or 128 tokens and, for each key block, how many tokens at its front
count. So smaller and ragged blocks are padded; token rules and log weights are refused.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import NamedTuple

import torch

from dittfast.plan import PlanTensors, query_blocks

from .capabilities import Capabilities, architecture_of
from .equal_blocks import Side, lists, side, slots_of_tokens
from .op import define_backend
from .tail import sum_rows

# The first release whose signatures these are.
LEAST = (1, 32)
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
    if importlib.util.find_spec("cudnn") is None:
        return [f"nvidia-cudnn-frontend is not installed ({install})"]
    version = importlib.metadata.version("nvidia-cudnn-frontend")
    if tuple(map(int, version.split(".")[:2])) < LEAST:
        least = ".".join(map(str, LEAST))
        return [f"nvidia-cudnn-frontend is {version}, and {least} is needed ({install})"]
    if importlib.util.find_spec("cutlass") is None:
        return [f"nvidia-cutlass-dsl is not installed ({install})"]
    return []


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


def _slots(x: torch.Tensor, one: Side | None) -> torch.Tensor:
    return (x if one is None else x.index_select(2, one.tokens)).contiguous()


def _tokens(x: torch.Tensor, one: Side | None, num_tokens: int) -> torch.Tensor:
    return x if one is None else x.index_select(2, slots_of_tokens(one, num_tokens))


def _softmax(q, k, v, problem: _Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out, lse)`` without the epilogue."""
    import cudnn

    queries, keys, options = problem
    result = cudnn.block_sparse_attention_forward(
        _slots(q, queries), _slots(k, keys), _slots(v, keys),
        # A row that lists nothing has a tail.
        allow_empty_block_nums=True, pack_gqa=False, **options,
    )  # fmt: skip
    parts = result["o_tensor"], result["lse_tensor"]
    return tuple(_tokens(x, queries, q.shape[2]) for x in parts)


def forward(q, k, v, t: PlanTensors, scale: float):
    """Shapes as in :func:`dittfast.attend`. Returns ``(out, lse)``."""
    out, lse = _softmax(q, k, v, _problem(q, k, t, scale))
    if t.out_scale is None and t.out_residual is None:
        return out, lse
    out, blocks = out.float(), query_blocks(t)
    if t.out_scale is not None:
        out = out * t.out_scale.float()[:, :, blocks, None]
    if t.out_residual is not None:
        out = out + t.out_residual.float()[:, :, blocks]
    return out.to(q.dtype), lse


def backward(grad_out, grad_lse, q, k, v, out, lse, t: PlanTensors, scale: float):
    """Gradients of q, k, v and, where the plan has them, of out_scale and out_residual.

    Raises:
        NotImplementedError: lse has a gradient, which cuDNN's backward pass does not take.
    """
    import cudnn

    if grad_lse is not None and bool(grad_lse.any()):
        raise NotImplementedError("the cudnn backend passes no gradient on from lse; use triton's")
    problem = _problem(q, k, t, scale)
    grad_scale = grad_residual = None
    if t.out_scale is not None or t.out_residual is not None:
        out, lse = _softmax(q, k, v, problem)
        blocks, count, wide = query_blocks(t), t.q_starts.numel(), grad_out.float()
        if t.out_residual is not None:
            grad_residual = sum_rows(wide, blocks, count)
        if t.out_scale is not None:
            grad_scale = sum_rows((wide * out).sum(-1, keepdim=True), blocks, count)[..., 0]
            grad_out = (wide * t.out_scale.float()[:, :, blocks, None]).to(q.dtype)
    queries, keys, options = problem
    grad = _slots(grad_out, queries)
    if queries is not None and queries.padding is not None:
        # Padding repeats a token, and its gradient would count twice.
        grad = grad.masked_fill(queries.padding[:, None], 0)
    result = cudnn.block_sparse_attention_backward(
        grad, _slots(q, queries), _slots(k, keys), _slots(v, keys), _slots(out, queries),
        _slots(lse, queries), **options,
    )  # fmt: skip
    dq = _tokens(result["dq_tensor"], queries, q.shape[2])
    dk, dv = (_tokens(result[f"d{x}_tensor"], keys, k.shape[2]) for x in "kv")
    return dq, dk, dv, grad_scale, grad_residual


attend = define_backend("cudnn", forward, backward)
