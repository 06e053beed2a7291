"""``dittfast bench kernels --static``: our Triton kernels as machine code, without a GPU."""

from __future__ import annotations

import argparse

from .options import add_json_argument, check_json, write_json_result
from .values import whole

EXAMPLE = """\
examples:
  dittfast bench kernels --static --targets sm_90 --kernels forward dkv
  dittfast bench kernels --static --dtypes fp16 bf16 fp32 --head-dims 64 128 256 --json kernels.json

The last line of the output is the same as JSON. Exits with 1 if a kernel spills registers or does
not fit its target. Each kernel takes a few seconds to compile.
"""
# As kernels/compile_report.py names them; a test compares.
TARGETS = (
    *("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"),
    *("gfx942", "gfx1100"),
)
KERNELS = ("forward", "delta", "dq", "dkv")
DTYPES = ("fp16", "bf16", "fp32")
FEATURES = (
    *("plain", "ragged", "general", "rule", "video_rule", "local", "raster", "box"),
    "small_blocks",
)
_COLUMNS = (
    "{:<8}{:<8}{:>4} {:<5}{:<13}{:>9}{:>3}{:>3}{:>5}{:>6}{:>7}{:>4} {:<8}{:>7}{:>7}{:>6}{:>6}{:>6}"
)
_HEADS = (
    *("target", "kernel", "dim", "type", "features", "tile", "w", "st", "regs", "spill"),
    *("shared", "SM", "matrix", "count", "instr", "async", "peak", "apart"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this task, which shares none with those that measure."""
    parser.add_argument(
        "--static", action="store_true",
        help="read the compiled code; nothing else is there: times are measured by bench gpu",
    )  # fmt: skip
    for name, known, default in (
        ("targets", TARGETS, TARGETS),
        ("kernels", KERNELS, KERNELS),
        ("dtypes", DTYPES, ("bf16",)),
        ("features", FEATURES, ("plain", "rule")),
    ):
        parser.add_argument(
            f"--{name}", action="several", nargs="+", choices=known, default=list(default),
            metavar="NAME", help=f"of {', '.join(known)} (default: {' '.join(default)})",
        )  # fmt: skip
    parser.add_argument(
        "--head-dims", action="several", type=whole(16, 256), nargs="+", default=[64, 128],
        metavar="N", help="(default: 64 128)",
    )  # fmt: skip
    add_json_argument(parser)


def run(args) -> int:
    """Compile, and print what came out; 1 if something spills or does not fit."""
    import json
    from dataclasses import asdict

    check_json(args)
    if not args.static:
        raise ValueError(
            "bench kernels needs --static, which compiles and reads the kernels without a GPU; "
            "dittfast bench gpu times them on one"
        )
    from dittfast.environment import versions
    from dittfast.kernels import compile_report

    refused = {name: reason for name in args.targets if (reason := compile_report.refusal(name))}
    for name, reason in refused.items():
        print(f"{name:<8}refused: {reason}")
    print(_COLUMNS.format(*_HEADS))
    targets, rows = [name for name in args.targets if name not in refused], []
    wanted = args.kernels, args.head_dims, args.dtypes, args.features
    for row in compile_report.report(targets, *wanted):
        rows.append(row)
        print("\n".join(_lines(row)), flush=True)
    data = {
        "task": "kernels",
        "versions": versions(),
        "spilled": sum(row.spilled_bytes > 0 for row in rows),
        "do_not_fit": sum(row.blocks == 0 for row in rows),
        "refused": refused,
        "kernels": [asdict(row) for row in rows],
    }
    write_json_result(args, data)
    if args.json != "-":
        print(json.dumps(data, allow_nan=False))
    return 0 if all(row.fits for row in rows) else 1


def _lines(row) -> list[str]:
    """A line for each loop; one for a kernel that has none."""
    first = (row.target, row.kernel, row.head_dim, row.dtype, row.features)
    sizes = row.num_warps, row.num_stages, row.registers, row.spilled_bytes, row.shared_bytes
    lines = []
    for loop in row.loops or (None,):
        about = (row.tile, *sizes, row.blocks, row.matrix_unit)
        cells = ("-",) * 5
        if loop is not None:
            about = (loop.tile, *about[1:])
            counts = (loop.matrix, loop.instructions, loop.async_loads)
            cells = (*(f"{n:.0f}" for n in counts), f"{loop.of_peak:.2f}")
            cells = (*cells, f"{loop.of_peak_apart:.2f}")
        lines.append(_COLUMNS.format(*first, *about, *cells))
    return lines
