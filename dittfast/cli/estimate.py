"""``dittfast estimate``: every method at a published model's real size, computed."""

from __future__ import annotations

import argparse
import math

from .options import (
    add_json_argument,
    add_method_arguments,
    check_json,
    check_tokens,
    chosen_method,
    compact,
    parse_options,
    seconds,
    write_json_result,
)
from .values import whole

EXAMPLE = """\
examples:
  dittfast estimate
  dittfast estimate wan2.1-14b --height 720 --width 1280 --num-frames 81
  dittfast estimate flux.1-dev --method local --set window=16
"""


# Of a token, where a method with long lists is planned.
_BYTES = 4000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``dittfast estimate``."""
    parser.epilog = EXAMPLE
    parser.add_argument(
        "model", nargs="?", metavar="NAME", help="such as wan2.1-14b; without it, all are listed"
    )
    size = parser.add_argument_group("size", "without these the model's usual ones")
    size.add_argument("--num-frames", type=whole(), metavar="N", help="frames of the video")
    size.add_argument("--height", type=whole(), metavar="PX")
    size.add_argument("--width", type=whole(), metavar="PX")
    size.add_argument("--text", type=whole(), metavar="N", help="text tokens")
    add_method_arguments(parser, for_model=True)
    out = parser.add_argument_group("output")
    add_json_argument(out)


def run(args) -> int:
    """Print the table of a published model."""
    check_json(args)
    from dittfast.config import check_fits
    from dittfast.pipelines.families.published import published_model, published_models

    if args.model is None:
        for name in published_models():
            print(f"{name.ljust(14)}  {published_model(name).source}")
        return 0
    asked, options = chosen_method(args), parse_options(args.options)
    if options and asked is None:
        raise ValueError("--set needs a method: add --method radial, or --config FILE")
    card = published_model(args.model)
    if asked is not None:
        check_fits(asked, [card.model], args.any_model)

    size = (
        getattr(args, name) or getattr(card, name) for name in ("num_frames", "height", "width")
    )
    check_tokens(math.prod(card.grid(*size)) + (args.text or card.text), _BYTES)

    from dittfast.environment import versions
    from dittfast.pipelines.measure.estimate import estimate

    model = estimate(
        card,
        args.num_frames,
        args.height,
        args.width,
        args.text,
        [] if asked is None else [asked],
        **options,
    )
    print("\n".join(_lines(model)))
    write_json_result(args, model.to_dict() | {"versions": versions()})
    return 0


def _lines(model) -> list[str]:
    from dittfast.measure.summary import kept

    layout, cost = model.layout, model.cost
    frames, height, width = layout.grid.shape
    video = f"{model.num_frames} frames, " if model.num_frames > 1 else ""
    rows = [
        ["method", "settings", "density", "attention", "FLOPs of a pass", "lists", "planned in"]
    ]
    dense = ["dense", "", "1", compact(cost.attention), compact(cost.total), "", ""]
    rows.append(dense)
    for x in model.methods:
        if x.problem is not None:
            rows.append([x.method, x.settings, f"cannot run: {x.problem}"])
            continue
        settings = x.settings
        if x.dense_layers:
            settings += f" ({x.dense_layers} layers dense)"
        rows.append(
            [
                x.method,
                settings,
                f"{'at least ' if x.at_least else ''}{kept(x.density, x.work)}",
                compact(x.attention),
                f"{compact(cost.total / x.fewer_flops)}, "
                f"{'at most ' if x.at_least else ''}{x.fewer_flops:.2f} x fewer",
                compact(x.plan_bytes, "B"),
                seconds(x.build_seconds),
            ]
        )
    widths = [max(len(row[i]) for row in rows if len(row) > 3) for i in range(len(rows[0]))]
    table = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows
    ]
    return [
        "Computed, not measured: FLOPs are no seconds.",
        f"model     {model.name} ({model.model}), {model.parameters / 1e9:.3g} billion parameters",
        f"size      {video}{model.height} x {model.width} pixels",
        f"tokens    {layout.num_tokens:,}: {frames} x {height} x {width}, "
        f"{layout.num_context} text",
        f"one pass  {compact(cost.total, 'FLOP')}: {cost.attention_share:.1%} in {cost.layers} "
        f"self-attention layers ({cost.heads} heads of {cost.head_dim}), "
        f"{cost.other_attention / cost.total:.1%} in other attention",
        f"ceiling   {cost.speedup(0):.2f} x fewer FLOPs, if self-attention cost nothing (Amdahl)",
        "",
        *table,
    ]
