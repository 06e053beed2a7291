"""FlashAttention-4's block-sparse attention (flash-attn-4) as a backend. Not run on a GPU yet.

It takes full and partial blocks, and CuTe functions that are compiled into its kernels: the token
rule is its ``mask_mod``, log weights are its ``score_mod``, and the padding of short blocks is the
one that is there, or a ``mask_mod``. They are compiled once for each kind; lists, rules and weights
are arguments.

Its backward pass takes blocks of 128 keys or, on Blackwell, more. Where it cannot run, or gradients
have to be the same in every run, ours does.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from dittfast.plan import METRICS, PlanTensors, block_states, lists_of_mask

from .capabilities import Capabilities, architecture_of
from .epilogue import with_epilogue
from .equal_blocks import Side, in_slots, side, slot_bias, to_slots, to_tokens
from .op import backward_of, define_backend, positive_scale
from .wheels import wheel_reasons

# The release whose signatures these are; earlier ones had others.
LEAST = "4.0.0b36"
_HALF = (torch.float16, torch.bfloat16)
_HOPPER, _BLACKWELL = ("sm_90",), ("sm_100", "sm_103", "sm_110")
_TAKES = dict(devices=("cuda",), dtypes=_HALF, tail=True, slow_start=True)
# Hopper has tiles of 64 or 128 queries and of any multiple of 16 keys; Blackwell computes 256
# queries at once. Padding at most doubles the work where blocks are not smaller than 32.
_ON_HOPPER = dict(architectures=_HOPPER, q_block_sizes=range(16, 129), kv_block_sizes=range(8, 129))
_ON_BLACKWELL = dict(
    architectures=_BLACKWELL, q_block_sizes=range(129, 257), kv_block_sizes=range(65, 257)
)
# Those that our backward pass shares.
_HEAD_DIMS = range(16, 129, 16)
CAPABILITIES = tuple(
    Capabilities(head_dims=_HEAD_DIMS, **_TAKES, **sizes) for sizes in (_ON_HOPPER, _ON_BLACKWELL)
)
# A frame's distance is less.
_FRAMES = 1 << 16


def machine_reasons(asked) -> list[str]:
    """Why FlashAttention-4 cannot be used here; empty where it can. Does not import it."""
    libraries = "nvidia-cutlass-dsl-libs-cu13 or nvidia-cutlass-dsl-libs-cu12"
    wanted = ("flash-attn-4", LEAST), ("nvidia-cutlass-dsl", None), (libraries, None)
    reasons = wheel_reasons("pip install --pre 'flash-attn-4[cu13]'", *wanted)
    if not reasons and "backward" in asked.needs:
        reasons += wheel_reasons("pip install triton", ("triton", None))
    return reasons


class _Problem(NamedTuple):
    """What both passes take besides tensors.

    Attributes:
        queries, keys: None where all stands in slots already.
        state: ``[B|1, H|1, nQ, nK]``, 0 for blocks that are not seen, 1 in part, 2 in full.
        mods: the CuTe functions, and the tensors that they read, by the package's names.
    """

    queries: Side | None
    keys: Side | None
    blocks: tuple[int, int]
    state: torch.Tensor
    mods: dict
    score_mod_bwd: object


def _block_sizes(device: torch.device, t: PlanTensors, backward: bool) -> tuple[int, int]:
    """Tokens of a query block and of a key block that its kernels have tiles for."""
    up = lambda size, step: -(-size // step) * step  # noqa: E731
    if architecture_of(device) in _BLACKWELL:
        return 256, up(t.kv_block_size, 128)
    if backward:
        return 128, 128
    return up(t.q_block_size, 64), up(t.kv_block_size, 16)


def _problem(q, k, t: PlanTensors, backward: bool) -> _Problem:
    blocks = _block_sizes(q.device, t, backward)
    queries, keys = side(t, "q", blocks[0]), side(t, "kv", blocks[1])
    lists = t.kv_indices, t.kv_num_blocks, t.kv_num_full_blocks
    state = block_states(*lists, t.kv_starts.numel())
    bias = slot_bias(t.kv_log_weight, keys, pads=t.metric > 0)
    pads = bias is None and keys is not None and keys.padding is not None
    if pads:  # short blocks are seen in part, and nothing else is
        state = torch.where((t.kv_lengths < blocks[1]) & (state == 2), 1, state)
    read = [] if bias is None else [bias]
    if pads:
        read.append((~keys.padding).int())
    if t.metric:
        limits = t.limits if t.limits.numel() else t.limits.new_zeros(1)
        limits = torch.cat([limits, limits[-1:].expand(_FRAMES - limits.numel())])
        of_queries = (t.q_frame, t.q_place, t.q_frame_last, t.q_place_last)
        read += [in_slots(x, queries) for x in of_queries if x is not None]
        read += [limits, in_slots(t.kv_frame, keys), in_slots(t.kv_place, keys)]
    broadcast = () if bias is None else tuple(int(n > 1) for n in bias.shape[:2])
    metric = METRICS[t.metric - 1] if t.metric else None
    kind = "padding" if pads else metric
    score_mod, score_mod_bwd = _score_mods(broadcast)
    mods = {
        "score_mod": score_mod,
        "mask_mod": kind and _mask_mod(kind, len(broadcast) > 0, t.sink_frames, t.place_bits),
        "aux_tensors": [x.contiguous() for x in read] or None,
    }
    return _Problem(queries, keys, blocks, state, mods, score_mod_bwd)


def _lists(state: torch.Tensor, blocks: tuple[int, int]):
    """The package's lists of the rows of ``state``: of query blocks or, transposed, of keys'."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    partial_blocks, partial = lists_of_mask(state == 1)
    full_blocks, full = lists_of_mask(state == 2)
    return BlockSparseTensorsTorch(partial, partial_blocks, full, full_blocks, block_size=blocks)


def _heads_last(x: torch.Tensor, one: Side | None, is_gradient: bool = False) -> torch.Tensor:
    """``[B, H, tokens, D]`` as ``[B, slots, H, D]``."""
    return to_slots(x, one, is_gradient).transpose(1, 2)


def forward(q, k, v, t: PlanTensors, scale: float):
    """Shapes as in :func:`dittfast.attend`; no epilogue. Returns ``(out, lse)``."""
    q, scale = positive_scale(q, scale)
    from flash_attn.cute.interface import flash_attn_func

    problem = _problem(q, k, t, backward=False)
    queries, keys = problem.queries, problem.keys
    with torch.no_grad():
        out, lse = flash_attn_func(
            _heads_last(q, queries), _heads_last(k, keys), _heads_last(v, keys),
            softmax_scale=scale,
            block_sparse_tensors=_lists(problem.state, problem.blocks),
            return_lse=True,
            **problem.mods,
        )  # fmt: skip
    return tuple(to_tokens(x, queries, q.shape[2]) for x in (out.transpose(1, 2), lse))


_ours = backward_of("triton")


def backward(grad_out, grad_lse, q, k, v, out, lse, t: PlanTensors, scale: float):
    """Gradients of q, k and v."""
    fits = min(t.q_block_size, t.kv_block_size) > 64
    if not fits or torch.are_deterministic_algorithms_enabled():
        return _ours(grad_out, grad_lse, q, k, v, out, lse, t, scale)
    from flash_attn.cute.interface import _flash_attn_bwd

    problem = _problem(q, k, t, backward=True)
    queries, keys = problem.queries, problem.keys
    dq, dk, dv = _flash_attn_bwd(
        _heads_last(q, queries), _heads_last(k, keys), _heads_last(v, keys),
        _heads_last(out, queries), _heads_last(grad_out, queries, is_gradient=True),
        to_slots(lse, queries),
        softmax_scale=scale,
        # From the keys: which queries see them.
        block_sparse_tensors=_lists(problem.state.mT, problem.blocks),
        score_mod_bwd=problem.score_mod_bwd,
        dlse=None if grad_lse is None else to_slots(grad_lse, queries, is_gradient=True),
        **problem.mods,
    )[:3]  # fmt: skip
    dq, dk, dv = (x.transpose(1, 2) for x in (dq, dk, dv))
    return to_tokens(dq, queries, q.shape[2]), *(to_tokens(x, keys, k.shape[2]) for x in (dk, dv))


@functools.cache
def _score_mods(broadcast: tuple[int, ...]):
    """``(score_mod, score_mod_bwd)`` that add the first tensor to logits; None where there is none.

    Args:
        broadcast: whether it differs between batch rows, and between heads.
    """
    if not broadcast:
        return None, None
    import cutlass
    from cutlass import cute
    from flash_attn.cute import utils

    by_batch, by_head = broadcast

    @cute.jit
    def score_mod(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        bias = aux_tensors[0][batch[0] * by_batch, head[0] * by_head, kv_idx[0]]
        return score + utils.scalar_to_ssa(bias, cutlass.Float32)

    @cute.jit
    def score_mod_bwd(grad, score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        return grad

    return score_mod, score_mod_bwd


@functools.cache
def _mask_mod(kind: str, biased: bool, sink_frames: int, place_bits: int):
    """The ``mask_mod`` of partial blocks: "padding", or a token rule as :meth:`TokenRule.keep`.

    Args:
        biased: whether a bias stands before its own tensors.
    """
    import cutlass
    from cutlass import cute
    from flash_attn.cute import utils

    at, frame_bits, low = int(biased), 16, (1 << place_bits) - 1

    # Arithmetic without max, abs or branches, which the compiler and tensors both know.
    @cute.jit
    def padding(q, kv, aux):
        return aux[at][kv] > 0

    @cute.jit
    def free(q_frame, frame):
        """Whether the rule lets a pair be: context, two grids, or a first frame."""
        apart = (q_frame >> frame_bits) != (frame >> frame_bits)
        return (q_frame < 0) | (frame < 0) | apart | ((frame & 0xFFFF) < sink_frames)

    @cute.jit
    def limit_of(limits, q_frame, frame):
        difference = q_frame - frame
        negative = difference >> 31  # 0 or -1
        distance = (difference ^ negative) - negative
        return limits[distance & 0xFFFF]

    @cute.jit
    def disc(q, kv, aux):
        q_frame, q_place, limits = aux[at][q], aux[at + 1][q], aux[at + 2]
        frame, place = aux[at + 3][kv], aux[at + 4][kv]
        dy = (q_place >> place_bits) - (place >> place_bits)
        dx = (q_place & low) - (place & low)
        near = dy * dy + dx * dx <= limit_of(limits, q_frame, frame)
        return free(q_frame, frame) | near

    @cute.jit
    def raster(q, kv, aux):
        q_frame, q_place, limits = aux[at][q], aux[at + 1][q], aux[at + 2]
        frame, place = aux[at + 3][kv], aux[at + 4][kv]
        limit = limit_of(limits, q_frame, frame)
        near = (q_place - place <= limit) & (place - q_place <= limit)
        return free(q_frame, frame) | near

    @cute.jit
    def box(q, kv, aux):
        first_frame, first, last_frame, last = (
            aux[at][q], aux[at + 1][q], aux[at + 2][q], aux[at + 3][q]
        )  # fmt: skip
        frame, place = aux[at + 5][kv], aux[at + 6][kv]
        inside = (first_frame <= frame) & (frame <= last_frame)
        y, x = place >> place_bits, place & low
        inside = inside & ((first >> place_bits) <= y) & (y <= (last >> place_bits))
        inside = inside & ((first & low) <= x) & (x <= (last & low))
        return free(first_frame, frame) | inside

    keeps = {"padding": padding, "disc": disc, "raster": raster, "box": box}[kind]

    @cute.jit
    def mask_mod(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        keep = keeps(q_idx[0], kv_idx[0], aux_tensors)
        return utils.scalar_to_ssa(keep, cutlass.Boolean)

    return mask_mod


attend = define_backend("flash4", *with_epilogue(forward, backward))
