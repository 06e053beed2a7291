"""``dittfast parity``: does every model family agree with itself under every method?"""

from __future__ import annotations

import argparse

from dittfast.files import check_output, write_text

from .options import add_json_argument, check_json, write_json_result

EXAMPLE = """\
Runs each family of the installed diffusers as a tiny random model, on the CPU, in a minute or two:
the stock model, a plan that keeps everything, each method on the native, cpu and reference
backends, guidance and gradient checkpointing; with --method compiled torch.compile, which takes
minutes.

examples:
  dittfast parity
  dittfast parity --family wan --family mochi --method radial --method compiled
"""

LEGEND = """\
A number is the density of a good cell: the kept fraction of the token pairs of a sequence of about
100 tokens, a mean over layers where a method chooses from q and k. A good cell means: where the
plan keeps everything (1.00) the output is the stock model's, and elsewhere the CPU backends give
what the reference backend gives, both within the noise of eager attention; a plan that leaves
something out changes the output; and after dittfast.disable the output is bit for bit the stock
model's. A number with an F is the FLOPs, as a fraction of dense attention's, of a method that
computes its own output; its good cell agrees with its formula. "guided" says the same of
dittfast.guide with one weakened head: equal beside stock attention and beside the full plan,
another output than the model's, and gone without a trace. "checkpointed": under local, the
gradients with diffusers' gradient checkpointing are those without ("-": the class has none, or the
stock model's gradients change with it). "compiled", run where it is asked for: a pass under local
that torch.compile traced, graph breaks allowed, gives what it gives eagerly."""

CLASSES = """## Every transformer class of diffusers

A class that is not read is refused by `dittfast.enable` with the reason given here. Where a
geometry could be described, `layout=` still takes it; linear and flex attention cannot be made
sparse."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``dittfast parity``."""
    parser.epilog = EXAMPLE
    parser.add_argument(
        "--family", action="append", default=[], metavar="NAME", help="only this one; repeatable"
    )
    parser.add_argument(
        "--method", action="append", default=[], metavar="NAME", help="only this one; repeatable"
    )
    parser.add_argument("--markdown", metavar="FILE", help="write the table here, as Markdown")
    add_json_argument(parser)


def run(args) -> int:
    """Print the matrix; 1 if a cell is bad."""
    if args.markdown is not None:
        check_output(args.markdown, (".md",))
    check_json(args, {"--markdown": args.markdown})

    import warnings
    from dataclasses import asdict
    from itertools import groupby

    from dittfast.environment import versions
    from dittfast.pipelines.measure.parity import COLUMNS, TINY, matrix, text_of

    checked = matrix(args.family, args.method)
    width = max(len(name) for name in TINY)
    cells, rows = [], []
    head = ["model".ljust(width), *(args.method or COLUMNS)]
    print("  ".join(x.ljust(10) for x in head).rstrip())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tiny models are allowed to be odd
        for name, group in groupby(checked, lambda cell: cell.family):
            group = list(group)
            texts = [text_of(cell) for cell in group]
            print("  ".join(x.ljust(10) for x in [name.ljust(width), *texts]).rstrip(), flush=True)
            cells += group
            rows.append([name, f"`{TINY[name].name}`", *texts])
    bad = [cell for cell in cells if not cell.ok]
    print("\n" + LEGEND)
    for cell in bad:
        print(f"FAILED {cell.family} under {cell.method}: {cell.problem}")
    print(f"{len(cells) - len(bad)} of {len(cells)} cells are good")
    if args.markdown is not None:
        head = ["model", "class", *(args.method or COLUMNS)]
        write_text(args.markdown, _markdown(head, rows))
        print(f"wrote {args.markdown}")
    data = {"cells": [asdict(cell) for cell in cells], "versions": versions()}
    write_json_result(args, data)
    return 1 if bad else 0


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    from dittfast.environment import versions

    used = ", ".join(f"{name} {versions()[name]}" for name in ("diffusers", "torch"))
    lines = [
        "# Model families",
        "",
        f"Written by `dittfast parity --markdown docs/families.md` with {used}.",
        "",
        LEGEND,
        "",
        *_table(head, rows),
        "",
        CLASSES,
        "",
        *_table(["class", "answer", "models, or why not"], _verdicts()),
        "",
    ]
    return "\n".join(lines)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]


def _verdicts() -> list[list[str]]:
    """What dittfast answers to each transformer class of the installed diffusers."""
    from dittfast.pipelines.families import FAMILIES
    from dittfast.pipelines.families.others import OTHERS, transformer_classes
    from dittfast.pipelines.measure.parity import TINY

    rows = []
    for name in transformer_classes():
        if name in FAMILIES:
            models = ", ".join(model for model, tiny in TINY.items() if tiny.name == name)
            rows.append([f"`{name}`", "read", models])
        elif name in OTHERS:
            rows.append([f"`{name}`", OTHERS[name].kind, OTHERS[name].why])
        else:
            rows.append([f"`{name}`", "unknown", "newer than this dittfast; pass `layout=`"])
    return rows
