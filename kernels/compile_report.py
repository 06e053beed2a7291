"""Compile every Triton kernel without a GPU, and read what the compilers made of it.

``dittfast bench kernels --static`` prints it. Registers, spills and instructions are those of the
binary that a GPU would run. Speed is not measured here: what is said of it is how many cycles the
instructions of an inner loop need at least (``multiprocessors.py``).
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from dittfast.plan import PlanTensors

from . import machine_code, triton_backend
from .launch_sizes import architecture_class, not_supported_reason
from .multiprocessors import MULTIPROCESSORS, Multiprocessor

TARGETS = {
    "sm_75": GPUTarget("cuda", 75, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
KERNELS = ("forward", "delta", "dq", "dkv")
POINTERS = {
    **{dtype: name for name, dtype in DTYPES.items()},
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Feature:
    """Which of a plan's optional parts a compiled variant has; each is a different kernel."""

    block_size: int = 128
    ragged: bool = False
    order: bool = False
    weight: bool = False
    epilogue: bool = False
    metric: int = 0
    num_limits: int = 1


_ALL = dict(ragged=True, order=True, weight=True, epilogue=True)
FEATURES = {
    "plain": Feature(),
    "ragged": Feature(ragged=True),
    "general": Feature(**_ALL),
    "rule": Feature(**_ALL, metric=1),
    "video_rule": Feature(**_ALL, metric=1, num_limits=21),
    "local": Feature(ragged=True, order=True, metric=1),
    "raster": Feature(ragged=True, order=True, metric=2, num_limits=21),
    "box": Feature(**_ALL, metric=3, num_limits=0),
    "small_blocks": Feature(16, **_ALL),
}


@dataclass(frozen=True)
class Loop:
    """An inner loop of a kernel in machine code.

    Attributes:
        walk: which blocks it walks, full ones or those under a token rule.
        tile: queries x keys of one step.
        steps: of one pass; more than 1 where the compiler unrolled it.
        instructions: of a warp in one step, and among them those of the matrix unit,
            asynchronous loads to shared memory, and exponentials and their like.
        cycles: that a step of one block keeps each unit of a multiprocessor busy at least.
        of_peak: matrix cycles over those of the busiest unit, the most that the instructions allow
            where the warps of a multiprocessor keep all units busy at once.
        of_peak_apart: over the matrix cycles and the next busiest's, one after the other.
    """

    walk: str
    tile: str
    steps: int
    instructions: float
    matrix: float
    async_loads: float
    special: float
    cycles: dict[str, float]
    of_peak: float
    of_peak_apart: float


@dataclass(frozen=True)
class Compiled:
    """What one kernel became on one target.

    Attributes:
        spilled_bytes: local memory per thread, which is where spilled registers go.
        shared_bytes, shared_limit: shared memory of a program, and the most its target allows.
        blocks: programs that a multiprocessor runs side by side.
        async_loads: whether the main loop copies its tiles to shared memory asynchronously. On
            AMD a tile waits in registers instead, loaded ``num_stages - 1`` steps ahead.
        matrix_unit: wgmma, tcgen05, mma, mfma, or fma where fp32 is computed exactly.
        serialized: the compiler's note that it could not overlap wgmma with other work.
        loops: over full blocks, and over partial ones where there is a rule; none in delta.
    """

    target: str
    kernel: str
    head_dim: int
    dtype: str
    features: str
    tile: str
    num_warps: int
    num_stages: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    shared_limit: int
    blocks: int
    async_loads: bool
    matrix_unit: str
    serialized: bool
    loops: tuple[Loop, ...]

    @property
    def fits(self) -> bool:
        return self.spilled_bytes == 0 and self.blocks > 0


def calls_for(head_dim: int, dtype: torch.dtype, feature: Feature, capability) -> dict:
    """``{kernel name: Call}`` as the launchers make them, on tensors without storage."""
    n = 32 * feature.block_size
    blocks = n // feature.block_size
    num_tokens = n - 1 if feature.ragged else n

    def ints(*shape):
        return torch.empty(shape, dtype=torch.int32, device="meta")

    def floats(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    lists = ints(1, 1, blocks, blocks), ints(1, 1, blocks), ints(1, 1, blocks)
    given = dict(
        zip(("kv_indices", "kv_num_blocks", "kv_num_full_blocks"), lists),
        **dict(zip(("q_indices", "q_num_blocks", "q_num_full_blocks"), lists)),
        **dict(q_first=torch.empty(1, 1, blocks, dtype=torch.int64, device="meta")),
        **dict.fromkeys(("q_starts", "q_lengths", "kv_starts", "kv_lengths"), ints(blocks)),
        **dict(q_block_size=feature.block_size, kv_block_size=feature.block_size),
        **dict(metric=feature.metric, sink_frames=0, place_bits=16),
    )
    if feature.ragged:  # text is a short block, and its rows are runs
        given["run_rows"] = torch.empty(4, dtype=torch.int64, device="meta")
    if feature.order:
        given |= dict.fromkeys(("q_order", "kv_order"), ints(num_tokens))
    if feature.weight:
        given["kv_log_weight"] = floats(1, 1, num_tokens)
    if feature.epilogue:
        given["out_scale"] = floats(1, 1, blocks)
        given["out_residual"] = floats(1, 1, blocks, head_dim)
    if feature.metric:
        given["limits"] = ints(feature.num_limits)
        names = ("q_frame", "q_place", "kv_frame", "kv_place", "q_frame_last", "q_place_last")
        given |= dict.fromkeys(names, ints(num_tokens))
    t = PlanTensors(**(dict.fromkeys(PlanTensors._fields) | given))
    q = floats(2, 4, num_tokens, head_dim, dtype=dtype)
    lse = floats(2, 4, num_tokens)
    grads = (q, q, q, *((lse, lse) if feature.epilogue else (None, None)))
    scale = head_dim**-0.5
    forward = triton_backend.forward_call(q, q, q, q, lse, t, scale, capability)
    backward = triton_backend.backward_calls(q, lse, q, q, q, q, lse, grads, t, scale, capability)
    return dict(zip(KERNELS, [forward, *backward]))


def source_of(call) -> ASTSource:
    """What Triton compiles at this launch: the types and alignments of its arguments."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(call.kernel.params):
        value = call.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, TensorDescriptor):
            box = POINTERS[value.base.dtype] + str(list(value.block_shape))
            signature[parameter.name] = f"tensordesc<{box}>"
        elif isinstance(value, torch.Tensor):
            # The allocator aligns to far more than the 16 bytes a vector load needs.
            signature[parameter.name] = "*" + POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(call.kernel, signature, constants, attributes)


def compile_call(call, target: GPUTarget):
    """``(compiled kernel, what the assembler said)``."""
    if isinstance(call.kernel, InterpretedFunction):
        raise RuntimeError("TRITON_INTERPRET is set: unset it to compile kernels")
    log = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope():
        triton.knobs.compilation.always_compile = True
        triton.knobs.nvidia.dump_ptxas_log = True
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(source_of(call), target=target, options=call.options())
    return compiled, log.getvalue()


def loops(ttgir: str) -> list[str]:
    """The bodies of the innermost loops of a kernel in Triton's GPU dialect."""
    return re.findall(r"^( *)[^\n]*= scf\.for [^\n]*\{\n(.*?)\n\1\}", ttgir, re.M | re.S)


def has_async_loads(ttgir: str) -> bool:
    """Whether no loop that multiplies matrices loads a 2-D tile through registers."""
    bodies = [body for _, body in loops(ttgir) if re.search(r"dot|_mma", body)]
    tile = r"tensor<\d+x\d+x!tt\.ptr"
    return bool(bodies) and all(
        re.search(r"ttg\.async_copy_global_to_local [^\n]*" + tile, body)
        and not re.search(r"= tt\.load [^\n]*" + tile, body)
        for body in bodies
    )


def matrix_unit(assembly: str) -> str:
    for name, pattern in (
        ("tcgen05", r"tcgen05\.mma"),
        ("wgmma", r"wgmma\.mma_async"),
        ("mma", r"mma\.sync"),
        ("mfma", r"v_mfma"),
    ):
        if re.search(pattern, assembly):
            return name
    return "fma"


# Matrix products of one step.
_PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}


def inner_loops(
    kernel: str, call, code: list, unit: str, num_warps: int, one: Multiprocessor
) -> tuple[Loop, ...]:
    """The loops of a kernel over blocks, as machine code.

    Raises:
        RuntimeError: the code has other loops than the kernel; nothing true can be said of them.
    """
    if kernel not in _PRODUCTS:
        return ()
    sizes = [call.arguments["BLOCK_M"], call.arguments["BLOCK_N"]]
    walked = 0 if kernel == "dkv" else 1
    walks = {"full": sizes}
    if call.arguments["METRIC"]:
        small = list(sizes)
        small[walked] = call.arguments["RULE_BLOCK"]
        walks["partial"] = small
    exact = unit == "fma"
    multiplies = (lambda x: x.flops) if exact else (lambda x: x.is_matrix)
    bodies = machine_code.matrix_loops(code, multiplies)
    if len(bodies) != len(walks):
        raise RuntimeError(f"{kernel}: {len(bodies)} loops in machine code, {len(walks)} expected")
    found = []
    for (walk, tile), body in zip(walks.items(), bodies):
        flops = _PRODUCTS[kernel] * 2 * tile[0] * tile[1] * call.arguments["BLOCK_D"]
        done = [x.flops for x in body if multiplies(x)]
        # What tcgen05 multiplies is told by a descriptor; Triton does not unroll around it.
        steps = 1 if None in done else round(sum(done) * num_warps / flops)
        if steps < 1:
            raise RuntimeError(
                f"{kernel}: a loop of {sum(done) * num_warps} operations, not {flops}"
            )
        n = machine_code.counted(body)
        cycles = one.cycles(body, num_warps, steps * flops, half=not exact)
        apart = cycles["matrix"] + max(v for k, v in cycles.items() if k != "matrix")
        found.append(
            Loop(
                walk=walk,
                tile="x".join(map(str, tile)),
                steps=steps,
                **{k: n[k] / steps for k in ("instructions", "matrix", "async_loads", "special")},
                cycles={name: value / steps for name, value in cycles.items()},
                of_peak=cycles["matrix"] / max(cycles.values()),
                of_peak_apart=cycles["matrix"] / (max(cycles.values()) if exact else apart),
            )
        )
    return tuple(found)


def measure(compiled, log: str) -> dict:
    """Registers, spilled bytes, shared memory, loads and matrix unit of a compiled kernel."""
    row = {
        "shared_bytes": compiled.metadata.shared,
        "async_loads": has_async_loads(compiled.asm["ttgir"]),
        "serialized": "wgmma.mma_async instructions are serialized" in log,
    }
    if "ptx" in compiled.asm:
        spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log)
        registers = re.search(r"Used (\d+) registers", log)
        row["matrix_unit"] = matrix_unit(compiled.asm["ptx"])
        row["registers"] = int(registers[1])
        row["spilled_bytes"] = max(int(n) for n in spills.groups())
        return row
    assembly = compiled.asm["amdgcn"]
    value = lambda name: int(re.search(rf"\.{name}: +(\d+)", assembly)[1])  # noqa: E731
    row["matrix_unit"] = matrix_unit(assembly)
    row["registers"] = value("vgpr_count")
    row["spilled_bytes"] = max(value("private_segment_fixed_size"), 4 * value("vgpr_spill_count"))
    return row


def instructions(compiled) -> list[machine_code.Instruction]:
    """Those of the binary."""
    if "cubin" in compiled.asm:
        return machine_code.read_sass(machine_code.disassemble(compiled.asm["cubin"]))
    return machine_code.read_amdgcn(compiled.asm["amdgcn"])


def _measured(kernel: str, call, gpu: GPUTarget, one: Multiprocessor) -> dict:
    compiled, log = compile_call(call, gpu)
    row, metadata = measure(compiled, log), compiled.metadata
    columns = getattr(metadata, "tmem_size", 0)
    warps = metadata.num_warps
    row["blocks"] = one.blocks_at_once(warps, row["registers"], row["shared_bytes"], columns)
    code = instructions(compiled)
    return row | {"loops": inner_loops(kernel, call, code, row["matrix_unit"], warps, one)}


def capability_of(target: str):
    """The compute capability of a target, as :func:`launch_config` takes it."""
    gpu = TARGETS[target]
    return target if gpu.backend == "hip" else divmod(gpu.arch, 10)


def refusal(target: str) -> str | None:
    """Why a target has no kernels; None where it has."""
    return not_supported_reason(capability_of(target))


def report(targets, kernels, head_dims, dtypes, features):
    """Yield a :class:`Compiled` for every combination, as they are compiled.

    Raises:
        ValueError: a target that is refused.
    """
    for target, head_dim, dtype in itertools.product(targets, head_dims, dtypes):
        gpu, capability = TARGETS[target], capability_of(target)
        architecture_class(capability)
        one = MULTIPROCESSORS[target]
        # Features that a kernel ignores make the same code: delta knows no keys.
        measured = {}
        for feature, kernel in itertools.product(features, kernels):
            call = calls_for(head_dim, DTYPES[dtype], FEATURES[feature], capability)[kernel]
            key = kernel, source_of(call).hash()
            if key not in measured:
                measured[key] = _measured(kernel, call, gpu, one)
            sizes = [call.arguments.get(f"BLOCK_{x}") for x in "MN"]
            yield Compiled(
                target=target,
                kernel=kernel,
                head_dim=head_dim,
                dtype=dtype,
                features=feature,
                tile="x".join(str(n) for n in sizes if n),
                num_warps=call.config.num_warps,
                num_stages=call.config.num_stages,
                shared_limit=one.shared_per_block,
                **measured[key],
            )
