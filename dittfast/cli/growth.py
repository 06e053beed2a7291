"""``dittfast bench growth``: how time and memory grow from 4k to 64k tokens."""

from __future__ import annotations

import argparse

from dittfast.files import atomic_path, check_output

from .options import compact, seconds
from .values import whole

EXAMPLE = """\
examples:
  dittfast bench growth --method log_linear --method radial --plot growth.png
  dittfast bench growth --method local --set window=16 --tokens 4096 8192 16384 --json growth.json
"""
TOKENS = (4096, 8192, 16384, 32768, 65536)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this task, next to those all benchmarks share."""
    parser.add_argument(
        "--tokens",
        action="several",
        type=whole(),
        nargs="+",
        default=list(TOKENS),
        metavar="N",
        help=f"lengths to measure (default: {' '.join(map(str, TOKENS))})",
    )
    parser.add_argument(
        "--frame",
        type=whole(),
        nargs=2,
        default=(8, 16),
        metavar=("H", "W"),
        help="tokens of a frame for video methods, whose number of frames grows (default: 8 16)",
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the curves here, as .png or .svg")


def run(args, methods, work) -> dict:
    """Measure, print, and draw."""
    from dittfast.measure.growth import growth

    if args.plot is not None:
        check_output(args.plot, (".png", ".svg"))
        _pyplot()
    rows = []
    for method in methods:
        frame = tuple(args.frame) if method.for_videos else None
        print(f"\n{method!r}")
        print(f"{'tokens':>8}{'density':>18}{'plan':>10}{'memory':>10}{'time':>10}{'dense':>10}")
        result = growth(
            method, args.tokens, work, frame=frame, repeats=args.repeats, on_row=_print_row
        )
        fitted = result["exponents"]
        print(
            "exponents: "
            + ", ".join(f"{k} {'-' if v is None else f'{v:.2f}'}" for k, v in fitted.items())
        )
        rows.append(result)
    if args.plot is not None:
        _draw(args.plot, rows)
        print(f"wrote {args.plot}")
    return {"methods": rows}


def _print_row(row: dict) -> None:
    from dittfast.measure.summary import kept

    dense, memory = row["dense_seconds"], row["call_bytes"]
    print(
        f"{row['tokens']:>8}{kept(row['density'], row['work'], 4):>18}"
        f"{compact(row['plan_bytes'], 'B'):>10}"
        f"{'-' if memory is None else compact(memory, 'B'):>10}"
        f"{seconds(row['seconds']['p50']):>10}"
        f"{'-' if dense is None else seconds(dense['p50']):>10}",
        flush=True,
    )


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("--plot needs matplotlib; pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _draw(path: str, results: list[dict]) -> None:
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2))
    for number, result in enumerate(results):
        rows = result["rows"]
        tokens = [row["tokens"] for row in rows]
        name = result["method"]["name"]
        if result["frame"] is not None:
            name += f", frames of {result['frame'][0]} x {result['frame'][1]}"
        curves = ([row["seconds"]["p50"] for row in rows], [row["plan_bytes"] for row in rows])
        for axis, values, key in zip(axes, curves, ("seconds", "plan_bytes")):
            slope = result["exponents"][key]
            label = name if slope is None else f"{name}: n^{slope:.2f}"
            axis.loglog(tokens, values, "o-", color=f"C{number}", label=label)
    dense = {
        r["tokens"]: r["dense_seconds"]["p50"]
        for result in results
        for r in result["rows"]
        if r["dense_seconds"]
    }
    if dense:
        at = sorted(dense)
        axes[0].loglog(at, [dense[n] for n in at], "k--", label="dense attention")
    tokens = sorted({row["tokens"] for result in results for row in result["rows"]})
    for axis, what in zip(axes, ("seconds: planning and attention", "bytes of the plan")):
        axis.set_xticks(tokens, [f"{n / 1024:g}k" for n in tokens])
        axis.minorticks_off()
        axis.set_xlabel("tokens")
        axis.set_title(what, fontsize=11)
        axis.grid(True, which="both", alpha=0.25)
        axis.legend(fontsize=8)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)
