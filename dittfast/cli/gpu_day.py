"""``dittfast bench gpu``: everything that is worth measuring on a GPU, in nine minutes at most."""

from __future__ import annotations

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path

from .values import number, whole

EXAMPLE = """\
examples:
  dittfast bench gpu --json gpu.json
  dittfast bench gpu --seconds 240 --tokens 16384 65536 --engines triton flex --json gpu.json
  dittfast bench gpu --method local/flux --method radial --set radial.block_size=64
  dittfast bench gpu --device cpu --engines native cpu --tokens 256 --head-dims 16 --seconds 30

Offline, from a checkout. The JSON is whole after every row; what the time did not suffice for is in
it, by name. Engines that are not installed are rows that say so.
"""
TOKENS = (4096, 16384, 65536, 131072)
HEAD_DIMS = (64, 128)
ENGINES = ("triton", "flex", "flash4", "cudnn", "flashinfer")
SECONDS = 520
_METHODS = "evaluations/gpu-day"
# What that file holds; a test compares.
METHODS = ("radial", "topk", "local")
# Of the time, for tests and launch sizes.
_TESTS, _SIZES = 0.2, 0.25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this task, next to those all benchmarks share."""
    parser.set_defaults(heads=8, repeats=5)
    parser.add_argument(
        "--seconds", type=number(1), default=SECONDS, metavar="S",
        help=f"of wall-clock time; rows that would go beyond are not begun (default: {SECONDS})",
    )  # fmt: skip
    for name, kind, default in (("tokens", whole(), TOKENS), ("head-dims", whole(), HEAD_DIMS)):
        parser.add_argument(
            f"--{name}", action="several", type=kind, nargs="+", default=list(default),
            metavar="N", help=f"(default: {' '.join(map(str, default))})",
        )  # fmt: skip
    parser.add_argument(
        "--engines", action="several", nargs="+", default=list(ENGINES), metavar="NAME",
        help=f"backends to time (default: {' '.join(ENGINES)})",
    )  # fmt: skip
    parser.add_argument(
        "--tests", action=argparse.BooleanOptionalAction, default=True,
        help="run the tests that need a GPU first (default: yes)",
    )  # fmt: skip


def run(args, methods, work) -> dict:
    """Test, pick launch sizes, measure; what was found is written after every step.

    Args:
        methods: what to time; without any those of the file that is shipped for this.
    """
    from dittfast.measure.gpu_day import Budget, cases, measure
    from dittfast.pipelines.measure.fidelity import dense_kernel
    from dittfast.pipelines.measure.variants import make_variants, read_variants

    from .options import check_backend, shipped

    for name in args.engines:
        check_backend(name)
    budget = Budget(args.seconds)
    data: dict = {"seconds": args.seconds, "tests": None, "launch_sizes": {}, "rows": []}
    if args.tests:
        data["tests"] = _gpu_tests(budget.left * _TESTS)
        print(f"tests  {data['tests']['summary']}")
    if not methods:
        chosen, _ = read_variants(shipped(_METHODS))
        methods = [variant.method for variant in make_variants(chosen)]
    planned = next((m for m in methods if m.static and not m.computes), None)
    if "triton" in args.engines and work.device != "cpu":
        if planned is None:
            print("sizes  not timed: none of the methods plans from the layout alone")
        else:
            _launch_sizes(args, planned, work, budget, data)
    _save(args, work, data)
    todo = cases(args.engines, methods, args.tokens, args.head_dims, work)
    kernels = {name: partial(dense_kernel, name) for name in ("flash", "cudnn")}
    print(f"{'':<68}{'density':>9}{'flash':>10}{'cudnn':>10}{'engine':>10}{'gain':>7}")
    for case, row in measure(todo, budget, args.repeats, kernels):
        data["rows"].append(row)
        print(_line(case.label, row), flush=True)
        _save(args, work, data)
    skipped = [x for x in data["rows"] if x.get("not_run") == "the time was over"]
    data["skipped"] = len(skipped)
    print(f"{len(data['rows'])} rows, {len(skipped)} of them not begun: the time was over")
    return data


def _gpu_tests(seconds: float) -> dict:
    """What the tests that need a GPU say, from a checkout, for so many seconds at most."""
    import dittfast

    folder = Path(dittfast.__file__).resolve().parent.parent / "tests"
    if not folder.is_dir():
        return {"summary": "not run: no tests beside the package; use a checkout", "passed": None}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(folder / "test_triton.py")]
    try:
        done = subprocess.run(
            command, cwd=folder.parent, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return {"summary": f"stopped after {seconds:.0f} s", "passed": None}
    lines = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()
    return {"summary": lines[-1], "passed": done.returncode == 0}


def _launch_sizes(args, method, work, budget, data: dict) -> None:
    """Time launch sizes of our kernels under a method's plan; print what beats the table's."""
    from dataclasses import replace

    from dittfast.kernels.launch_timing import timed
    from dittfast.measure.bench import layout_for
    from dittfast.measure.gpu_day import seconds_of

    end = budget.left * (1 - _SIZES)
    for number_, head_dim in enumerate(args.head_dims, 1):
        stop = budget.left - (budget.left - end) * number_ / len(args.head_dims)
        layout = layout_for(min(16384, max(args.tokens)), method)
        q, k, v, _ = replace(work, layout=layout, head_dim=head_dim).inputs()
        plan = method.plan(layout)
        time = partial(seconds_of, device=work.device)
        found = timed(q, k, v, plan, time, lambda stop=stop: budget.left > stop)
        data["launch_sizes"][str(head_dim)] = found
        for kernel, rows in found.items():
            usual = next((x["seconds"] for x in rows if x["usual"] and "seconds" in x), None)
            if usual is not None:
                best = rows[0]
                gain = usual / best["seconds"]
                print(f"sizes  head dim {head_dim}, {kernel}: {gain:.2f} x with {best['sizes']}")


def _line(label: str, row: dict) -> str:
    if "not_run" in row:
        return f"{label:<68}  not run: {row['not_run']}"
    dense = [row["dense_kernels"][name].get("seconds") for name in ("flash", "cudnn")]
    cells = ["-" if x is None else f"{1e3 * x['p50']:.3g} ms" for x in dense]
    best = min([x["p50"] for x in dense if x is not None] + [row["dense_seconds"]["p50"]])
    own = row["attend_seconds"]["p50"]
    cells += [f"{1e3 * own:.3g} ms", f"{best / own:.2f}"]
    return (
        f"{label:<68}{row['density']:>9.3f}{cells[0]:>10}{cells[1]:>10}{cells[2]:>10}{cells[3]:>7}"
    )


def _save(args, work, data: dict) -> None:
    """What there is so far; the file is whole at any time."""
    if args.json in (None, "-"):
        return
    from dittfast.environment import describe_device, versions
    from dittfast.files import write_json

    about = {"task": args.task, "device": describe_device(work.device), "versions": versions()}
    write_json(args.json, about | data)
