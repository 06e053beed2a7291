"""``dittfast bench overhead``: what enabling dittfast costs where nothing is left out."""

from __future__ import annotations

import argparse

from .options import attention_words, seconds
from .values import whole

EXAMPLE = """\
examples:
  dittfast bench overhead
  dittfast bench overhead --model wan --heads 2 --tokens 2048 --repeats 24 --json overhead.json
"""
ARM_NAMES = {
    "enabled": "enabled, dense",
    "full_plan": "enabled, full plan",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this task, next to those all benchmarks share."""
    parser.add_argument(
        "--model",
        action="append",
        metavar="NAME",
        help="flux or wan, random weights; repeatable (default: both)",
    )
    parser.add_argument("--tokens", type=whole(), default=4096, metavar="N", help="(default: 4096)")
    parser.add_argument("--layers", type=whole(), default=12, metavar="N", help="(default: 12)")


def run(args, methods, work) -> dict:
    """Check, measure and print."""
    from dittfast.pipelines.measure.overhead import MODELS, measure_overhead

    rows = []
    for name in args.model or list(MODELS):
        row = measure_overhead(
            name, work, tokens=args.tokens, layers=args.layers, repeats=args.repeats
        )
        rows.append(row)
        _print(row)
    return {"rows": rows}


def _print(row: dict) -> None:
    print(f"\n{row['model']}, {row['layers']} layers, {attention_words(row)}")
    worst = max(row["error"].values())
    print(f"outputs agree: {worst:.1e} of the largest, eager noise {row['noise']:.1e}")
    print(f"{'':<20}{'p50':>10}{'overhead':>10}{'p20':>8}{'p80':>8}")
    print(f"{'stock':<20}{seconds(row['seconds']['stock']['p50']):>10}")
    for arm, overhead in row["overhead"].items():
        cells = "".join(f"{overhead[p]:>+{w}.1%}" for p, w in (("p50", 10), ("p20", 8), ("p80", 8)))
        print(f"{ARM_NAMES[arm]:<20}{seconds(row['seconds'][arm]['p50']):>10}{cells}")
    print(f"medians of {row['pairs']} pairs with the stock model, one after the other", flush=True)
