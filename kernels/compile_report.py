"""Compile every Triton kernel without a GPU, and report what the compilers made of it.

    python -P -m dittfast.kernels.compile_report
    python -P -m dittfast.kernels.compile_report --targets sm_90 --head-dims 128 --dtypes bf16

Prints a table, then one line of JSON, and exits with 1 if a kernel spills registers or needs more
shared memory than its target has. Registers and spilled bytes are those of the binary that a GPU
would run; speed is not measured here and does not follow from them. With the default options this
takes the better part of an hour of one core.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import re
import sys
from dataclasses import asdict, dataclass, fields

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.interpreter import InterpretedFunction

from dittfast.plan import PlanTensors

from . import triton_backend
from .launch_sizes import SHARED_LIMITS, architecture_class

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
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
class Compiled:
    """What one kernel became on one target.

    Attributes:
        spilled_bytes: local memory per thread, which is where spilled registers go.
        shared_bytes, shared_limit: shared memory of a program, and the most its target allows.
        async_loads: whether the main loop copies its tiles to shared memory asynchronously. On
            AMD a tile waits in registers instead, loaded ``num_stages - 1`` steps ahead.
        matrix_unit: wgmma, tcgen05, mma, mfma, or fma where fp32 is computed exactly.
        serialized: the compiler's note that it could not overlap wgmma with other work.
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
    async_loads: bool
    matrix_unit: str
    serialized: bool

    @property
    def fits(self) -> bool:
        return self.spilled_bytes == 0 and self.shared_bytes <= self.shared_limit


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
            compiled = triton.compile(source_of(call), target=target, options=call.config.options())
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


def report(targets, kernels, head_dims, dtypes, features):
    """Yield a :class:`Compiled` for every combination, as they are compiled."""
    for target, head_dim, dtype in itertools.product(targets, head_dims, dtypes):
        gpu = TARGETS[target]
        capability = target if gpu.backend == "hip" else divmod(gpu.arch, 10)
        limit = SHARED_LIMITS[architecture_class(capability)]
        # Features that a kernel ignores make the same code: delta knows no keys.
        measured = {}
        for feature, kernel in itertools.product(features, kernels):
            call = calls_for(head_dim, DTYPES[dtype], FEATURES[feature], capability)[kernel]
            key = kernel, source_of(call).hash()
            if key not in measured:
                measured[key] = measure(*compile_call(call, gpu))
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
                shared_limit=limit,
                **measured[key],
            )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dittfast.kernels.compile_report")
    choices = {
        "targets": (list(TARGETS), ["sm_80", "sm_90", "sm_100", "gfx942"]),
        "kernels": (list(KERNELS), list(KERNELS)),
        "dtypes": (list(DTYPES), ["fp16", "bf16", "fp32"]),
        "features": (list(FEATURES), list(FEATURES)),
    }
    for name, (allowed, default) in choices.items():
        parser.add_argument(
            f"--{name}", nargs="+", choices=allowed, default=default, metavar=name[:-1],
            help=f"of {', '.join(allowed)}; default {' '.join(default)}",
        )  # fmt: skip
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128, 256], metavar="D")
    options = parser.parse_args(arguments)

    columns = [field.name for field in fields(Compiled)]
    widths = [max(len(name), 12 if name == "features" else 0) for name in columns]
    write = sys.stdout.write
    write("  ".join(f"{name:>{w}}" for name, w in zip(columns, widths)) + "\n")
    rows = []
    for row in report(
        options.targets, options.kernels, options.head_dims, options.dtypes, options.features
    ):
        rows.append(row)
        cells = (str(getattr(row, name)) for name in columns)
        write("  ".join(f"{cell:>{w}}" for cell, w in zip(cells, widths)) + "\n")
        sys.stdout.flush()
    summary = {
        "triton": triton.__version__,
        "spilled": sum(row.spilled_bytes > 0 for row in rows),
        "over_shared_limit": sum(row.shared_bytes > row.shared_limit for row in rows),
        "kernels": [asdict(row) for row in rows],
    }
    write(json.dumps(summary) + "\n")
    return 0 if all(row.fits for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
