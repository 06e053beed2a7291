"""Block-sparse attention on a GPU: the launchers of the Triton kernels."""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch

from dittfast.plan import PlanTensors, transpose_lists

from .capabilities import Capabilities
from .launch_sizes import (
    ARCHITECTURES,
    KernelConfig,
    LaunchConfig,
    launch_config,
    takes_descriptors,
)
from .op import define_backend, empty_outputs, positive_scale

try:
    import triton
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction
    from triton.tools.tensor_descriptor import TensorDescriptor

    from . import block_sparse
except ImportError:  # Triton has no wheels for macOS and Windows; machine_reasons says so.
    block_sparse = None

MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Call(NamedTuple):
    """One kernel launch: what runs, over how many programs, on what."""

    kernel: object
    grid: int
    arguments: dict
    config: KernelConfig

    def options(self) -> dict[str, int]:
        """Compiler options of this launch."""
        return self.config.options(has_rule=self.arguments["METRIC"] > 0)

    def launch(self) -> None:
        arguments = {name: self.arguments[name] for name in self.kernel.arg_names}
        self.kernel[(self.grid,)](**arguments, **self.options())


def capability_of(device: torch.device):
    """The compute capability, as :func:`launch_config` takes it."""
    if device.type != "cuda":
        return (8, 0)
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return torch.cuda.get_device_capability(device)


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    """x, copied only where a row is not consecutive in memory (as in an expanded gradient)."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(letter: str, x: torch.Tensor) -> dict[str, int]:
    return {f"stride_{letter}{dim}": n for dim, n in zip("bhn", x.stride())}


def _broadcast(name: str, x: torch.Tensor | None) -> dict[str, int]:
    """Steps per batch row and head, in rows of ``x [B|1, H|1, ...]``; 0 where it broadcasts."""
    batch, heads = (1, 1) if x is None else x.shape[:2]
    return {f"{name}_b": heads if batch > 1 else 0, f"{name}_h": 1 if heads > 1 else 0}


def _owned(block_size: int, tile: int) -> tuple[int, int]:
    """``(tile, parts)``: tiles that together cover one block of the side a program owns."""
    tile = min(tile, max(16, triton.next_power_of_2(block_size)))
    return tile, math.ceil(block_size / tile)


def _walked(block_size: int, tile: int) -> tuple[int, int]:
    """``(parts, pack)``: tiles per block or blocks per tile of the side that is walked."""
    return math.ceil(block_size / tile), max(1, tile // triton.next_power_of_2(block_size))


def _walk(side: str, block_size: int, count: int, total: int, tile: int, rule_tile: int) -> dict:
    """How a kernel walks the blocks of ``side``; EVEN where every tile is full of tokens."""
    parts, pack = _walked(block_size, tile)
    rule_tile = min(tile, rule_tile)
    rule_parts, rule_pack = _walked(block_size, rule_tile)
    return {
        f"{side}_PARTS": parts,
        f"{side}_PACK": pack,
        f"{side}_EVEN": block_size % tile == 0 and count * block_size == total,
        **dict(RULE_BLOCK=rule_tile, RULE_PARTS=rule_parts, RULE_PACK=rule_pack),
    }


def _common(q, k, v, t: PlanTensors, scale: float) -> dict:
    """Every argument the kernels share, by name."""
    fp32 = lambda x: None if x is None else x.float()  # noqa: E731
    names = "kv_log_weight", "out_scale", "out_residual"
    t = t._replace(**{name: fp32(getattr(t, name)) for name in names})
    tensors = {
        name: x if x is None else x.contiguous()
        for name, x in t._asdict().items()
        if not isinstance(x, int)
    }
    return {
        **tensors,
        **dict(q=q, k=k, v=v, scale=scale, heads=q.shape[1]),
        **dict(sink_frames=t.sink_frames, place_bits=t.place_bits),
        **dict(num_queries=q.shape[2], num_keys=k.shape[2]),
        **dict(num_q_blocks=t.q_starts.numel(), num_kv_blocks=t.kv_starts.numel()),
        **dict(kv_list_size=t.kv_indices.shape[3], METRIC=t.metric),
        **dict(NUM_LIMITS=0 if t.limits is None else t.limits.numel()),
        **dict(HEAD_DIM=q.shape[3], BLOCK_D=triton.next_power_of_2(q.shape[3])),
        **_strides("q", q),
        **_strides("k", k),
        **_strides("v", v),
        **_broadcast("weight", t.kv_log_weight),
        **_broadcast("scale", t.out_scale),
        **_broadcast("residual", t.out_residual),
    }


def _describable(x: torch.Tensor) -> bool:
    """Whether a descriptor can tell where x lies: address and steps are multiples of 16 bytes."""
    steps = [n * x.element_size() for n, size in zip(x.stride()[:3], x.shape) if size > 1]
    return x.data_ptr() % 16 == 0 and all(n > 0 and n % 16 == 0 for n in steps)


def _tiles(names: tuple[str, str], values: dict, order, pack: int, tile: int, wanted: bool) -> dict:
    """Descriptors of what a kernel walks, or None where it gathers rows by their numbers."""
    tensors = [values[name] for name in names]
    if not wanted or order is not None or pack > 1 or not all(map(_describable, tensors)):
        return {f"{name}_tiles": None for name in names}
    box = [1, 1, tile, values["BLOCK_D"]]
    return {f"{name}_tiles": _descriptor(x, box) for name, x in zip(names, tensors)}


def _descriptor(x: torch.Tensor, box: list[int]):
    # The step of an axis of one may be anything, and a descriptor wants multiples of 16 bytes.
    steps = [n if size > 1 else x.shape[3] for n, size in zip(x.stride(), x.shape)]
    return TensorDescriptor(x, list(x.shape), [*steps[:3], 1], box)


def _by_query(
    kernel, values: dict, t: PlanTensors, config: KernelConfig, descriptors: bool
) -> Call:
    """A launch of a kernel that owns queries and walks lists of keys."""
    block_m, q_parts = _owned(t.q_block_size, config.block_m)
    sizes = t.kv_block_size, values["num_kv_blocks"], values["num_keys"]
    walk = _walk("KV", *sizes, config.block_n, config.rule_tile)
    values = {
        **values,
        **_broadcast("list", t.kv_indices),
        **walk,
        **_tiles(("k", "v"), values, t.kv_order, walk["KV_PACK"], config.block_n, descriptors),
        **dict(BLOCK_M=block_m, BLOCK_N=config.block_n, Q_PARTS=q_parts),
    }
    heads = values["q"].shape[0] * values["heads"]
    # A list that all heads share: which of its rows are runs, each head's programs know at once.
    shared = t.run_rows is not None and t.run_rows.numel() and t.kv_indices.shape[:2] == (1, 1)
    num_runs = t.run_rows.numel() if shared else 0
    num_first = heads * num_runs * q_parts
    values |= dict(run_rows=t.run_rows if shared else None, num_runs=num_runs, num_first=num_first)
    return Call(kernel, heads * values["num_q_blocks"] * q_parts + num_first, values, config)


def forward_call(
    q, k, v, out, lse, t: PlanTensors, scale: float, capability, config: LaunchConfig | None = None
) -> Call:
    """The forward's launch; ``config`` instead of the device's launch sizes, to compare them."""
    values = {**_common(q, k, v, t, scale), **dict(out=out, lse=lse), **_strides("o", out)}
    config = config or launch_config(q.shape[3], q.dtype, capability)
    descriptors = takes_descriptors(capability, q.dtype, "forward")
    return _by_query(block_sparse.forward_kernel, values, t, config.forward, descriptors)


def _by_row(q: torch.Tensor, tile: int) -> torch.Tensor:
    """A number for each query, not set; a tile that begins at the last one may be read whole."""
    count = q.shape[:3].numel()
    return torch.empty(count + tile, dtype=torch.float32, device=q.device)[:count].view(q.shape[:3])


def backward_calls(
    grad_out, grad_lse, q, k, v, out, lse, grads, t: PlanTensors, scale: float, capability,
    config: LaunchConfig | None = None,
) -> list[Call]:  # fmt: skip
    """The backward's launches, in order.

    Args:
        config: instead of the device's launch sizes, to compare them.
        grads: contiguous ``(dq, dk, dv, d out_scale or None, d out_residual or None)`` to fill,
            the last two fp32 per batch row, head and query block.
    """
    dq, dk, dv, d_out_scale, d_out_residual = grads
    config = config or launch_config(q.shape[3], q.dtype, capability)
    values = {
        **_common(q, k, v, t, scale),
        **dict(out=out, lse=lse, do=grad_out, dlse=grad_lse, dq=dq, dk=dk, dv=dv),
        **dict(d_out_scale=d_out_scale, d_out_residual=d_out_residual),
        **dict(delta=_by_row(q, config.dkv.block_m), row_lse=_by_row(q, config.dkv.block_m)),
        **_strides("o", out),
        **_strides("g", grad_out),
    }
    batch_heads = q.shape[0] * q.shape[1]
    block_m, q_parts = _owned(t.q_block_size, config.delta.block_m)
    delta = {**values, **dict(BLOCK_M=block_m, Q_PARTS=q_parts)}
    programs = batch_heads * values["num_q_blocks"]
    delta = Call(block_sparse.delta_kernel, programs, delta, config.delta)

    block_n, kv_parts = _owned(t.kv_block_size, config.dkv.block_n)
    sizes = t.q_block_size, values["num_q_blocks"], values["num_queries"]
    walk = _walk("Q", *sizes, config.dkv.block_m, config.dkv.rule_tile)
    descriptors = takes_descriptors(capability, q.dtype, "dkv")
    dkv = {
        **values,
        **_broadcast("list", t.q_first),
        **walk,
        **_tiles(("q", "do"), values, t.q_order, walk["Q_PACK"], config.dkv.block_m, descriptors),
        **dict(BLOCK_M=config.dkv.block_m, BLOCK_N=block_n, KV_PARTS=kv_parts),
    }
    programs = batch_heads * values["num_kv_blocks"] * kv_parts
    dkv = Call(block_sparse.dkv_kernel, programs, dkv, config.dkv)
    descriptors = takes_descriptors(capability, q.dtype, "dq")
    dq = _by_query(block_sparse.dq_kernel, values, t, config.dq, descriptors)
    return [delta, dq, dkv]


def _on(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def forward(q, k, v, t: PlanTensors, scale: float):
    """Shapes as in :func:`dittfast.attend`. Returns ``(out, lse)``."""
    out, lse = empty_outputs(q)
    if out.stride(-1) != 1:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # The walk over full blocks takes the maximum before it scales.
    q, scale = positive_scale(q, scale)
    with _on(q.device):
        q, k, v = (_unit_stride(x) for x in (q, k, v))
        forward_call(q, k, v, out, lse, t, scale, capability_of(q.device)).launch()
    return out, lse


def backward(grad_out, grad_lse, q, k, v, out, lse, t: PlanTensors, scale: float):
    """Gradients of q, k, v and, where the plan has them, of out_scale and out_residual."""
    if t.q_indices is None:
        lists = t.kv_indices, t.kv_num_blocks, t.kv_num_full_blocks
        back = transpose_lists(*lists, t.kv_starts.numel(), t.run_rows)
        t = t._replace(**back._asdict())
    blocks = (*q.shape[:2], t.q_starts.numel())
    like = dict(device=q.device, dtype=torch.float32)
    grads = (
        *(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)),
        None if t.out_scale is None else torch.empty(blocks, **like),
        None if t.out_residual is None else torch.empty(*blocks, q.shape[3], **like),
    )
    with _on(q.device):
        q, k, v, out, grad_out = (_unit_stride(x) for x in (q, k, v, out, grad_out))
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        capability = capability_of(q.device)
        for call in backward_calls(
            grad_out, grad_lse, q, k, v, out, lse.contiguous(), grads, t, scale, capability
        ):
            call.launch()
    return grads


attend = define_backend("triton", forward, backward)


def _interprets_bfloat16() -> bool:
    """Whether the interpreter's matrix product knows bfloat16: 1 times 1 is 1."""
    array = interpreter.np.array  # asked while torch.compile traces, when PyTorch's have no memory
    one = interpreter.TensorHandle(array([[0x3F80]], "uint16"), tl.bfloat16)
    zero = interpreter.TensorHandle(array([[0]], "float32"), tl.float32)
    return interpreter.interpreter_builder.create_dot(one, one, zero, 0, 0).data.item() == 1


def CAPABILITIES() -> tuple[Capabilities, ...]:
    """On GPUs, and on CPUs where Triton interprets its kernels."""
    sizes = range(16, MAX_HEAD_DIM + 1, 16)
    on_gpus = Capabilities(("cuda",), DTYPES, ARCHITECTURES, sizes, tail=True)
    if block_sparse is None or not isinstance(block_sparse.forward_kernel, InterpretedFunction):
        return (on_gpus,)
    # The interpreter may multiply the bits of bfloat16 as integers.
    dtypes = DTYPES if _interprets_bfloat16() else (torch.float16, torch.float32)
    return on_gpus, Capabilities(("cpu",), dtypes, head_dims=sizes, tail=True)


def machine_reasons(asked) -> list[str]:
    """Why Triton cannot run on this machine; empty where it can."""
    if block_sparse is None:
        return ["Triton is not installed (pip install triton, Linux only)"]
    return []
