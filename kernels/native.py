"""The native CPU backend: hands the plan's tensors to native.c as they are.

No work list, no gathered keys, no mask and no copy of the heads that grouped queries share. Memory
beyond inputs and outputs: an fp32 copy of what half-precision calls return, and a few hundred KB
per thread. Results are the same in every run and for every number of threads.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_double, c_int64, c_void_p

import torch

from dittfast.plan import PlanTensors, query_blocks, transpose_lists

from .capabilities import Capabilities
from .native_build import BuildError, library
from .op import define_backend, empty_outputs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CAPABILITIES = (Capabilities(("cpu",), DTYPES, grouped_heads=True, tail=True),)
_STATUS = {
    1: "there is not enough memory for its threads",
    2: "the plan lists a block that does not exist; Plan.replace() validates one",
}


# The structures of native.c, field by field.
class _Rows(Structure):
    _fields_ = [("data", c_void_p), *((n, c_int64) for n in ("batch", "head", "row", "column"))]


class _Values(Structure):
    _fields_ = [("data", c_void_p), ("batch", c_int64), ("head", c_int64)]


_SIDE = ("starts", "lengths", "order", "frame", "place", "frame_last", "place_last")


class _Side(Structure):
    _fields_ = [
        *((name, c_void_p) for name in _SIDE),
        ("blocks", c_int64),
    ]


class _Lists(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("indices", "count", "full", "first")),
        *((name, c_int64) for name in ("width", "batch", "head")),
    ]


_SIZES = ("backward", "batch", "own_heads", "q_heads_per_own", "q_heads_per_walked", "dim")
_SIZES += ("dtype", "threads", "metric", "num_limits", "sink_frames", "place_bits", "keys_own")


class _Problem(Structure):
    _fields_ = [
        *((name, c_int64) for name in _SIZES),
        ("scale", c_double),
        ("limits", c_void_p),
        *((name, _Side) for name in ("own", "walked")),
        ("lists", _Lists),
        *((name, _Rows) for name in ("x", "y", "a", "b", "out")),
        *((name, _Values) for name in ("own_bias", "walked_bias", "grad_lse", "delta")),
        *((name, _Values) for name in ("out_scale", "out_residual")),
        *((name, _Rows) for name in ("dx", "dy")),
        ("per_query", c_void_p),
        ("num_own", c_int64),
        ("pairs", POINTER(c_int64)),
    ]


def unavailable() -> str | None:
    """Why the kernel cannot run on this machine, with the remedy; None where it can.

    The first call of a process looks for the library and may compile it.
    """
    built = library()
    return str(built) if isinstance(built, BuildError) else None


def machine_reasons(asked) -> list[str]:
    """Why the native backend cannot run on this machine; empty if it can."""
    reason = unavailable()
    return [] if reason is None else [reason]


class _Call:
    """One call of the kernel under a plan: its arguments, and what has to live as long."""

    def __init__(self, q, k, t: PlanTensors, scale: float):
        self.t, self.alive = t, []
        self.groups = q.shape[1] // k.shape[1]
        self.problem = _Problem(
            batch=q.shape[0],
            dim=q.shape[3],
            dtype=DTYPES.index(q.dtype),
            threads=torch.get_num_threads(),
            metric=t.metric,
            num_limits=0 if t.limits is None else t.limits.numel(),
            sink_frames=t.sink_frames,
            place_bits=t.place_bits,
            scale=scale,
            limits=self.pointer(t.limits, torch.int32),
        )

    def pointer(self, x: torch.Tensor | None, dtype: torch.dtype) -> int | None:
        if x is None:
            return None
        x = x.to(dtype).contiguous()
        self.alive.append(x)
        return x.data_ptr()

    def rows(self, x: torch.Tensor) -> _Rows:
        self.alive.append(x)
        return _Rows(x.data_ptr(), *x.stride())

    def values(self, x: torch.Tensor | None) -> _Values:
        """``[B|1, H|1, ...]``, broadcast over batch rows and heads."""
        if x is None:
            return _Values()
        return _Values(self.pointer(x, torch.float32), *_steps(x, x[0, 0].numel()))

    def side(self, name: str) -> _Side:
        t = self.t
        # Keys have no last corner.
        parts = (getattr(t, f"{name}_{part}", None) for part in _SIDE)
        count = getattr(t, f"{name}_starts").numel()
        return _Side(*(self.pointer(x, torch.int32) for x in parts), count)

    def lists(self, indices, count, full, first=None) -> _Lists:
        width = 0 if first is not None else indices.shape[3]
        tables = (self.pointer(x, torch.int32) for x in (indices, count, full))
        return _Lists(*tables, self.pointer(first, torch.int64), width, *_steps(count, 1))

    def by_query(self, q, k, v) -> None:
        """Queries own: the forward pass and dq."""
        t, p = self.t, self.problem
        p.own, p.walked = self.side("q"), self.side("kv")
        p.lists = self.lists(t.kv_indices, t.kv_num_blocks, t.kv_num_full_blocks)
        p.x, p.a, p.b = (self.rows(x) for x in (q, k, v))
        p.own_heads, p.q_heads_per_own, p.q_heads_per_walked = q.shape[1], 1, self.groups
        p.walked_bias = self.values(t.kv_log_weight)

    def by_key(self, q, k, v, grad) -> None:
        """Keys own: dk and dv."""
        t, p = self.t, self.problem
        p.own, p.walked, p.keys_own = self.side("kv"), self.side("q"), 1
        p.lists = self.lists(t.q_indices, t.q_num_blocks, t.q_num_full_blocks, t.q_first)
        p.x, p.y, p.a, p.b = (self.rows(x) for x in (k, v, q, grad))
        p.own_heads, p.q_heads_per_own, p.q_heads_per_walked = k.shape[1], self.groups, 1
        p.own_bias = self.values(t.kv_log_weight)

    def run(self) -> None:
        built = library()
        if isinstance(built, BuildError):
            raise built
        attend = built.handle.dittfast_attend
        attend.argtypes, attend.restype = [POINTER(_Problem)], ctypes.c_int
        status = attend(byref(self.problem))
        if status:
            raise RuntimeError(f"the native backend stopped: {_STATUS[status]}")


def _steps(x: torch.Tensor, size: int) -> tuple[int, int]:
    """Steps per batch row and head of ``x [B|1, H|1, ...]`` with ``size`` values in each."""
    batch, heads = x.shape[:2]
    return heads * size if batch > 1 else 0, size if heads > 1 else 0


def forward(q, k, v, t: PlanTensors, scale: float):
    """Shapes as in :func:`dittfast.attend`. Returns ``(out, lse)``."""
    out, lse = _forward(q, k, v, t, scale)
    return out.to(q.dtype), lse


def computed_pairs(q, k, v, t: PlanTensors) -> int:
    """How many pairs of queries and keys the forward pass computes, those it then hides included.

    Sums over batch rows and heads; shapes as in :func:`dittfast.attend`.
    """
    pairs = c_int64(0)
    _forward(q, k, v, t, 1.0, pairs)
    return pairs.value


def _forward(q, k, v, t: PlanTensors, scale: float, pairs: c_int64 | None = None):
    _, lse = empty_outputs(q)
    out = torch.empty_like(q, dtype=torch.float32)
    call = _Call(q, k, t, scale)
    call.by_query(q, k, v)
    p = call.problem
    p.dx, p.per_query, p.num_own = call.rows(out), call.pointer(lse, torch.float32), q.shape[2]
    p.out_scale, p.out_residual = call.values(t.out_scale), call.values(t.out_residual)
    if pairs is not None:
        p.pairs = ctypes.pointer(pairs)
    call.run()
    return out, lse


def backward(grad_out, grad_lse, q, k, v, out, lse, t: PlanTensors, scale: float):
    """Gradients of q, k, v and, where the plan has them, of out_scale and out_residual."""
    if t.q_indices is None:
        lists = t.kv_indices, t.kv_num_blocks, t.kv_num_full_blocks
        t = t._replace(**transpose_lists(*lists, t.kv_starts.numel())._asdict())
    kind = q.dtype
    grad_scale = grad_residual = None
    if t.out_scale is not None or t.out_residual is not None:
        # Undoing the epilogue would lose what rounding, or a large residual, has taken.
        out, lse = _forward(q, k, v, t._replace(out_scale=None, out_residual=None), scale)
        q, k, v, grad_out = (x.float() for x in (q, k, v, grad_out))
        blocks = query_blocks(t)
        if t.out_residual is not None:
            grad_residual = _block_sums(grad_out, blocks, t)
        if t.out_scale is not None:
            grad_scale = _block_sums((grad_out * out).sum(-1, keepdim=True), blocks, t)[..., 0]
            grad_out = grad_out * t.out_scale.float()[:, :, blocks, None]
    delta = torch.empty_like(lse)
    # A query that saw nothing gets a weight of exp(-inf).
    bias = -lse.masked_fill(lse == -torch.inf, torch.inf)
    dq, dk, dv = (torch.empty_like(x, dtype=torch.float32) for x in (q, k, v))
    call = _Call(q, k, t, scale)
    call.by_query(q, k, v)
    p = call.problem
    p.backward, p.y, p.out, p.dx = 1, call.rows(grad_out), call.rows(out), call.rows(dq)
    p.own_bias, p.grad_lse = call.values(bias), call.values(grad_lse)
    p.per_query, p.num_own = call.pointer(delta, torch.float32), q.shape[2]
    call.run()
    call = _Call(q, k, t, scale)
    call.by_key(q, k, v, grad_out)
    p = call.problem
    p.backward, p.dx, p.dy = 1, call.rows(dk), call.rows(dv)
    p.walked_bias, p.grad_lse = call.values(bias), call.values(grad_lse)
    p.delta = call.values(delta)
    call.run()
    return dq.to(kind), dk.to(kind), dv.to(kind), grad_scale, grad_residual


def _block_sums(x: torch.Tensor, blocks: torch.Tensor, t: PlanTensors) -> torch.Tensor:
    """The sum of ``x [B, H, num_queries, D]`` over each query block."""
    out = x.new_zeros(*x.shape[:2], t.q_starts.numel(), x.shape[3])
    return out.index_add_(2, blocks, x)


attend = define_backend("native", forward, backward)
