"""``dittfast bench``: measure speed, after checking that the results agree."""

from __future__ import annotations

import argparse
from time import perf_counter

from . import gpu_day, growth, kernels, overhead
from .options import (
    BACKEND_NAMES,
    add_json_argument,
    attention_words,
    check_backend,
    check_json,
    check_tokens,
    parse_options,
    seconds,
    write_json_result,
)
from .values import seed, whole

ATTENTION_EXAMPLE = """\
examples:
  dittfast bench attention --method local --set window=16 --height 64 --width 64
  dittfast bench attention --method radial --method local --tokens 16384 --json attention.json
  dittfast bench attention --method radial --frames 21 --height 30 --width 52 --heads 12 --no-flex
  dittfast bench attention --method local --tokens 4096 --table
"""
BREAK_EVEN_EXAMPLE = """\
examples:
  dittfast bench break-even --method local
  dittfast bench break-even --method radial --set block_size=64 --frames 16 --tokens 4096 16384
"""
EXAMPLE = """\
examples:
  dittfast bench attention --method local --set window=16 --height 64 --width 64
  dittfast bench break-even --method local
  dittfast bench growth --method log_linear --method radial --plot growth.png
  dittfast bench overhead --model wan --heads 2
  dittfast bench gpu --json gpu.json
  dittfast bench kernels --static --targets sm_90

dittfast bench TASK --help shows a task's options and more examples. The numbers are written as JSON
where --json says so.
"""
# Of a table, whatever its rows; the last ones may begin a round shortly before.
TABLE_SECONDS = 480
TOKENS = (256, 512, 1024, 2048, 4096, 8192, 16384)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``dittfast bench``."""
    parser.epilog = EXAMPLE
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    attention = tasks.add_parser(
        "attention",
        help="dense attention, a method and flex_attention in turns, at one size",
        epilog=ATTENTION_EXAMPLE,
    )
    _add_common(attention)
    size = attention.add_argument_group("size, in tokens")
    size.add_argument("--tokens", type=whole(), metavar="N", help="a grid of N tokens is chosen")
    size.add_argument("--frames", type=whole(), metavar="N", help="(default: 1; 16 for radial)")
    size.add_argument("--height", type=whole(), metavar="N")
    size.add_argument("--width", type=whole(), metavar="N")
    size.add_argument("--text", type=whole(0), default=0, metavar="N", help="(default: 0)")
    attention.add_argument(
        "--flex",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="time compiled flex_attention too (default: yes)",
    )
    attention.add_argument(
        "--table",
        action="store_true",
        help="float32 and bfloat16, forward and with backward, in processor time of one thread; "
        f"rounds end early, so that all rows together take {TABLE_SECONDS // 60} minutes or so",
    )
    even = tasks.add_parser(
        "break-even",
        help="the number of tokens from which a method is faster than dense",
        epilog=BREAK_EVEN_EXAMPLE,
    )
    _add_common(even)
    even.add_argument(
        "--tokens",
        action="several",
        type=whole(),
        nargs="+",
        default=list(TOKENS),
        metavar="N",
        help=f"numbers of tokens to try (default: {' '.join(map(str, TOKENS))})",
    )
    even.add_argument("--frames", type=whole(), metavar="N", help="(default: 1; 16 for radial)")
    for task in (attention, even):
        task.add_argument("--backend", default="auto", help=BACKEND_NAMES)
    grows = tasks.add_parser(
        "growth", help="time and plan memory over the number of tokens", epilog=growth.EXAMPLE
    )
    _add_common(grows)
    growth.add_arguments(grows)
    day = tasks.add_parser(
        "gpu", help="all engines at all lengths on a GPU, in minutes", epilog=gpu_day.EXAMPLE
    )
    _add_methods(day, required=False, default=f" (default: {', '.join(gpu_day.METHODS)})")
    _add_work(day, head_dim=False)
    gpu_day.add_arguments(day)
    code = tasks.add_parser(
        "kernels", help="our Triton kernels as machine code, without a GPU", epilog=kernels.EXAMPLE
    )
    kernels.add_arguments(code)
    over = tasks.add_parser(
        "overhead",
        help="what enabling costs a model that leaves nothing out",
        epilog=overhead.EXAMPLE,
    )
    _add_work(over)
    overhead.add_arguments(over)


def _add_common(parser: argparse.ArgumentParser) -> None:
    _add_methods(parser, required=True)
    _add_work(parser).add_argument(
        "--backward", action="store_true", help="time forward and backward together"
    )


def _add_methods(parser: argparse.ArgumentParser, required: bool, default: str = "") -> None:
    parser.add_argument(
        "-m",
        "--method",
        action="append",
        required=required,
        metavar="NAME",
        help="radial, local, ... or a preset; repeatable" + default,
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="options",
        help="an option of the method, or of one of several as NAME.KEY=VALUE; repeatable",
    )


def _add_work(parser: argparse.ArgumentParser, head_dim: bool = True):
    work = parser.add_argument_group("work")
    if head_dim:
        work.add_argument("--head-dim", type=whole(), default=64, metavar="N", help="(default: 64)")
    work.add_argument("--heads", type=whole(), default=4, metavar="N", help="(default: 4)")
    work.add_argument("--batch", type=whole(), default=1, metavar="N", help="(default: 1)")
    work.add_argument("--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16"))
    work.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    work.add_argument(
        "--repeats", type=whole(1, 100_000), default=10, metavar="N", help="rounds (default: 10)"
    )
    work.add_argument("--seed", type=seed, default=0, metavar="N", help="(default: 0)")
    add_json_argument(parser)
    return work


def run(args) -> int:
    """Check and measure; 1 if a result is wrong, and then no speed is printed."""
    if args.task == "kernels":
        return kernels.run(args)
    check_json(args, {"--plot": getattr(args, "plot", None)})

    from dittfast.environment import describe_device, versions
    from dittfast.measure.check import WrongResult

    check_backend(getattr(args, "backend", "auto"))
    methods = _methods(args) if "method" in args else []
    work = _workload(args)
    tokens = args.tokens if isinstance(args.tokens, list) else [args.tokens or 0]
    check_tokens(max(tokens), _bytes_of_token(work), work.device)
    data = {"task": args.task, "device": describe_device(work.device), "versions": versions()}
    print(f"{data['device']['name']}, {_details(data)}")
    try:
        data |= TASKS[args.task](args, methods, work)
    except WrongResult as error:
        print(f"FAILED: {error}\nno speed is shown for a wrong result")
        return 1
    write_json_result(args, data)
    return 0


def _details(data: dict) -> str:
    about = {k: v for k, v in data["device"].items() if k not in ("name", "type")}
    about |= {name: data["versions"].get(name) for name in ("torch", "triton")}
    return ", ".join(f"{k} {v or 'none'}" for k, v in about.items())


def _methods(args) -> list:
    """Each method with its own options: those for all, and those given as NAME.KEY."""
    from dittfast.config import SCHEDULE_FIELDS, resolve

    options, names = parse_options(args.options), args.method or []
    known = set(names)
    for key in options:
        if not names:
            raise ValueError(f"--set {key}: no --method is given")
        name = key.rpartition(".")[0]
        if name and name not in known:
            raise ValueError(f"--set {key}: no --method {name} is given")
        if key.rpartition(".")[2] in SCHEDULE_FIELDS:
            raise ValueError(f"{key} belongs to the schedule; it does not change one attention")
    methods = []
    for name in names:
        common = {k: v for k, v in options.items() if "." not in k}
        own = {k.rpartition(".")[2]: v for k, v in options.items() if k.rpartition(".")[0] == name}
        methods.append(resolve(name, **(common | own))[0])
    return methods


def _workload(args):
    import torch

    from dittfast.layout import Layout
    from dittfast.measure.bench import Workload
    from dittfast.pipelines.runs.sources import choose_device

    device = str(choose_device(args.device))
    dtype = args.dtype
    if dtype == "auto":
        dtype = "float32" if torch.device(device).type == "cpu" else "bfloat16"
    return Workload(
        Layout.image(1, 1),
        args.batch,
        args.heads,
        max(args.head_dims) if "head_dims" in args else args.head_dim,
        getattr(torch, dtype),
        device,
        getattr(args, "backward", False),
        args.seed,
    )


def _bytes_of_token(work) -> int:
    """Of q, k, v and the output, and with backward of their gradients."""
    each = work.batch * work.heads * work.head_dim * work.dtype.itemsize
    return 100 + each * (8 if work.backward else 4)


def _layout(args, work, method):
    from dittfast.layout import Layout
    from dittfast.measure.bench import layout_for

    sides = args.height, args.width
    if (args.tokens is None) == (None in sides) or (args.tokens is not None and any(sides)):
        raise ValueError("give the size as --tokens, or as --height and --width")
    if args.tokens is None:
        frames = args.frames or 1
        check_tokens(
            frames * args.height * args.width + args.text, _bytes_of_token(work), work.device
        )
        return Layout.video(frames, *sides, args.text, frames == 1)
    if args.text:
        raise ValueError("--text needs --height and --width: --tokens counts the grid alone")
    return layout_for(args.tokens, method, args.frames)


def _attention(args, methods, work) -> dict:
    from dataclasses import replace

    import torch

    from dittfast.measure.bench import bench_attention

    if args.table and (args.dtype != "auto" or args.backward):
        given = "--backward" if args.backward else f"--dtype {args.dtype}"
        raise ValueError(
            f"--table runs both dtypes, forward and with backward, and {given} one of them; leave "
            "out --table, or that"
        )
    cases = [(m, replace(work, layout=_layout(args, work, m))) for m in methods]
    options = dict(repeats=args.repeats, flex=args.flex, backend=args.backend)
    if args.backend == "auto" and work.device == "cpu":
        options["compare"] = ("native", "cpu")
    if args.table:
        kinds = [(d, b) for d in (torch.float32, torch.bfloat16) for b in (False, True)]
        cases = [(m, replace(w, dtype=d, backward=b)) for m, w in cases for d, b in kinds]
        options["brief"] = True
        end = perf_counter() + TABLE_SECONDS
    rows, threads = [], torch.get_num_threads()
    try:
        torch.set_num_threads(1 if args.table else threads)
        for number, (method, case) in enumerate(cases):
            if args.table:
                options["most_seconds"] = (end - perf_counter()) / (len(cases) - number)
            row = bench_attention(method, case, **options)
            rows.append(row)
            _print_attention(row)
    finally:
        torch.set_num_threads(threads)
    if args.table:
        _print_table(rows)
    return {"rows": rows}


def _print_table(rows: list[dict]) -> None:
    from dittfast.measure.summary import number

    columns = ("method", "pass", "dtype", "density", "work", "dense s", "native", "cpu", "flex")
    print(f"\n{'efficiency by backend':>72}")
    print("{:<26}{:<9}{:<10}{:>8}{:>7}{:>9}{:>9}{:>7}{:>7}".format(*columns))
    for row in rows:
        by_backend = {row["backend"]: row, **row["others"], "flex": row["flex"]}
        cells = (
            f"{by_backend[n]['useful_efficiency']['p50']:.2f}"
            if "useful_efficiency" in by_backend.get(n, {})
            else "-"
            for n in columns[6:]
        )
        options = row["method"]
        window = options.get("window")
        name = options["name"] + (f" {window:g}" if isinstance(window, (int, float)) else "")
        print(
            f"{name:<26}{'both' if row['backward'] else 'forward':<9}{row['dtype']:<10}"
            f"{number(row['density']):>8}{row['work']:>7.3f}{row['dense_seconds']['p50']:>9.3g}"
            "{:>9}{:>7}{:>7}".format(*cells)
        )


def _print_attention(row: dict) -> None:
    options = ", ".join(f"{k}={v}" for k, v in row["method"].items() if k != "name")
    what = "forward and backward" if row["backward"] else "forward"
    print(f"\n{row['method']['name']} ({options})")
    print(f"{attention_words(row)}, {what}")
    planned = "kept" if row["static"] else "in every call"
    density = "" if row["density"] is None else f"density {row['density']:.4f}, "
    agrees = "dense fp64 attention" if density else "the method's formula in fp64"
    print(
        f"{density}work {row['work']:.4f}, "
        f"plan {seconds(row['plan_seconds'])} ({planned}); results agree with {agrees}"
    )
    head = ("", "p20", "p50", "p80", "useful GFLOP/s", "efficiency", "speed-up")
    print("{:<16}{:>9}{:>9}{:>9}{:>16}{:>12}{:>10}".format(*head))
    lines = [("dense", row["dense_seconds"], row["dense_gflops"], 1.0, 1.0)]
    lines.append(
        (
            f"attend {row['backend']}",
            row["attend_seconds"],
            row["attend_gflops"],
            row["useful_efficiency"]["p50"],
            row["speedup"]["p50"],
        )
    )
    flex = row["flex"]
    compared = {f"attend {name}": numbers for name, numbers in row["others"].items()}
    if "seconds" in flex:
        compared["flex_attention"] = flex
    for name, numbers in compared.items():
        efficiency = numbers["useful_efficiency"]["p50"]
        speedup = efficiency / (row["work"] if row["density"] is None else row["density"])
        lines.append((name, numbers["seconds"], numbers["gflops"], efficiency, speedup))
    for name, times, gflops, efficiency, speedup in lines:
        cells = [f"{1e3 * times[p]:.4g} ms" for p in ("p20", "p50", "p80")]
        print(
            f"{name:<16}"
            + "".join(f"{c:>9}" for c in cells)
            + f"{gflops:>16.1f}{efficiency:>12.3f}{speedup:>10.2f}"
        )
    if "not_run" in flex:
        print(f"flex_attention  not run: {flex['not_run']}")
    print(
        f"median of {row['rounds']} rounds; efficiency = dense time x "
        f"{'density' if density else 'work'} / attend time, "
        f"p20 {row['useful_efficiency']['p20']:.3f}, p80 {row['useful_efficiency']['p80']:.3f}"
    )


def _break_even(args, methods, work) -> dict:
    from dittfast.measure.bench import break_even, least_faster
    from dittfast.measure.summary import kept

    for method in methods:
        if method.name == "dense":
            raise ValueError(
                "--method dense is what the others are compared with; name one of them, such as "
                "--method local"
            )
    results = []
    for method in methods:
        print(f"\n{method!r}")
        print(f"{'tokens':>8}{'density':>14}{'dense':>11}{'attend':>11}{'speed-up':>10}")
        rows = []
        options = dict(repeats=args.repeats, frames=args.frames, backend=args.backend)
        for row in break_even(method, args.tokens, work, **options):
            rows.append(row)
            times = (seconds(row[f"{name}_seconds"]["p50"]) for name in ("dense", "attend"))
            cells = "".join(f"{t:>11}" for t in times)
            speedup = row["speedup"]["p50"]
            share = kept(row["density"], row["work"], 4)
            print(f"{row['tokens']:>8}{share:>14}{cells}{speedup:>10.2f}")
        least = least_faster(rows)
        print("not faster at the largest size" if least is None else f"faster from {least:,}")
        results.append({"method": method.name, "min_tokens": least, "rows": rows})
    return {"methods": results}


TASKS = {
    "attention": _attention,
    "break-even": _break_even,
    "growth": growth.run,
    "gpu": gpu_day.run,
    "overhead": overhead.run,
}
