"""``dittfast probe``: what a method keeps of the attention of a real run, head by head."""

from __future__ import annotations

import argparse

from dittfast.files import write_image

from .options import (
    add_method_arguments,
    add_model_argument,
    add_picture_and_numbers,
    check_picture_and_numbers,
    chosen_method,
    parse_options,
    write_json_result,
)
from .values import anything, places, seed, whole

EXAMPLE = """\
examples:
  dittfast probe --method rectified --set block_size=64 --layers 0,3 -o rectified.png
  dittfast probe --method local --set window=8 --model sample-video --step 5 --json local.json
"""
DEFAULT_PROMPT = "a 3d emoji of a lion, blue background"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``dittfast probe``."""
    parser.epilog = EXAMPLE
    add_model_argument(parser)
    add_method_arguments(parser, for_model=True)
    group = parser.add_argument_group("run", "the dense run whose q and k are planned on")
    group.add_argument(
        "--prompt", type=anything, default=DEFAULT_PROMPT, help='(default: "%(default)s")'
    )
    group.add_argument("--steps", type=whole(), metavar="N", help="denoising steps of the run")
    group.add_argument("--step", type=whole(0), metavar="N", help="the step to look at, from 0")
    group.add_argument(
        "--layers", type=places, metavar="N,N", help="self-attention layers (default: all)"
    )
    group.add_argument("--seed", type=seed, default=0, metavar="N", help="(default: 0)")
    add_picture_and_numbers(parser)


def run(args) -> int:
    """Draw the kept and the dropped attention of every head, and print the numbers."""
    check_picture_and_numbers(args)
    asked, options = chosen_method(args), parse_options(args.options)
    if asked is None:
        raise ValueError("the method is missing; add --method rectified, or --config FILE")
    from dittfast.config import check_fits, resolve
    from dittfast.pipelines.runs.call import call_arguments, check_ranges

    check_ranges(prompt=args.prompt, seed=args.seed, num_inference_steps=args.steps)
    options.setdefault("min_tokens", 0)
    method, _ = resolve(asked, **options)
    from dittfast.mixture import Mixture
    from dittfast.pipelines.measure.method_check import assignment_of
    from dittfast.pipelines.measure.probe import capture, check_places, kept_picture, measure
    from dittfast.pipelines.runs import sources
    from dittfast.pipelines.runs.first_frame import with_first_frame
    from dittfast.pipelines.runs.outline import check_run, outline

    from .options import quiet_libraries

    source = sources.find(args.model)
    check_fits(asked, sources.transformer_classes(source).values(), args.any_model)
    pipe = outline(source)
    if pipe is not None:
        given = {"num_inference_steps": args.steps}
        call = check_run(pipe, source, args.prompt, given, method)
        if "num_inference_steps" in call:
            check_places(pipe, call, [] if args.step is None else [args.step], args.layers)
    device = sources.choose_device("auto")
    quiet_libraries()
    pipe = sources.load(source, device, sources.choose_dtype("auto", device))
    pipe.set_progress_bar_config(desc="dense run", disable=None)
    call = call_arguments(pipe, args.prompt, source.settings, num_inference_steps=args.steps)
    call = with_first_frame(pipe, call, source.settings)
    steps = None if args.step is None else [args.step]
    given = {"seed": args.seed, "hidden_states": method.needs_hidden_states}
    captured = capture(pipe, call, steps=steps, layers=args.layers, **given)
    runs = dict.fromkeys((c.layer for c in captured), method)
    if isinstance(method, Mixture):
        there = assignment_of(pipe, method).at(captured[0].step, call["num_inference_steps"])
        runs = {name: there[name].method for name in runs if there[name] is not None}
        captured = [c for c in captured if c.layer in runs]
    if not captured:
        raise ValueError("no rule runs in these layers there; choose others: --layers, --step")
    reports = [measure(runs[c.layer], c) for c in captured]
    data = _numbers(reports, method, source, call, args, captured[0].layout.num_tokens)
    print("\n".join(_lines(reports, data)))
    if args.output is not None:
        write_image(args.output, kept_picture(reports, _title(method, data)))
        print(f"wrote {args.output}")
    write_json_result(args, data)
    return 0


def _mean(values) -> float | None:
    values = list(values)
    return None if None in values else sum(values) / len(values)


_NUMBERS = ("density", "work", "mass", "error")


def _numbers(reports, method, source, call: dict, args, tokens: int) -> dict:
    from dataclasses import asdict

    from dittfast.environment import versions

    heads = [head for report in reports for head in report.heads]
    return {
        "method": method.to_dict(),
        "model": source.name,
        "prompt": args.prompt,
        "seed": args.seed,
        "num_inference_steps": call["num_inference_steps"],
        "tokens": tokens,
        "calls": [
            {"step": r.step, "layer": r.layer, "heads": [asdict(h) for h in r.heads]}
            for r in reports
        ],
        **{name: _mean(getattr(h, name) for h in heads) for name in _NUMBERS},
        "versions": versions(),
    }


def _lines(reports, data: dict) -> list[str]:
    from dittfast.measure.summary import kept, number

    width = max(len(r.layer) for r in reports)
    step = reports[0].step
    lines = [
        f"method    {data['method']['name']}",
        f"run       {data['model']}, step {step} of {data['num_inference_steps']}, "
        f"{data['tokens']:,} tokens",
        f"{'layer':<{width}}  head    density  mass kept  error",
    ]
    for report in reports:
        for head in report.heads:
            lines.append(
                f"{report.layer:<{width}}  {head.head:>4}  "
                f"{kept(head.density, head.work):>9}  {number(head.mass):>9}  "
                f"{head.error:5.3f}"
            )
    lines.append(
        f"{'mean':<{width}}        {kept(data['density'], data['work']):>9}  "
        f"{number(data['mass']):>9}  "
        f"{data['error']:5.3f}"
    )
    lines.append(
        "mass kept: share of dense attention on the kept pairs; error: |out - dense| / |dense|"
    )
    return lines


def _title(method, data: dict) -> str:
    from dittfast.measure.summary import number

    step = data["calls"][0]["step"]
    return (
        f"{method.name} on {data['model']}, step {step} of {data['num_inference_steps']}: "
        f"density {number(data['density'], 2)}, mass kept {number(data['mass'], 2)}"
    )
