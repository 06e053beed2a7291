"""``dittfast plan``: draw a method's block mask, with its density and FLOPs."""

from __future__ import annotations

import argparse

from dittfast.files import write_image

from .options import (
    add_method_arguments,
    add_picture_and_numbers,
    check_picture_and_numbers,
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
  dittfast plan --method radial --frames 21 --height 45 --width 80 -o radial.png
  dittfast plan --method local --set window=8 --height 64 --width 64 --text 512 -o local.png

A method that chooses blocks from q and k has no mask of its own: see dittfast probe.
For a published model's real size in frames and pixels see dittfast estimate.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``dittfast plan``."""
    parser.epilog = EXAMPLE
    grid = parser.add_argument_group("layout, in tokens (a FLUX token is 16 pixels wide)")
    grid.add_argument(
        "--frames", type=whole(), default=1, metavar="N", help="(default: 1, an image)"
    )
    grid.add_argument("--height", type=whole(), metavar="N")
    grid.add_argument("--width", type=whole(), metavar="N")
    grid.add_argument(
        "--text", type=whole(0), default=0, metavar="N", help="text tokens (default: 0)"
    )
    where = grid.add_mutually_exclusive_group()
    where.add_argument(
        "--text-first",
        action="store_true",
        default=None,
        help="text before the grid, as in FLUX (the default for images)",
    )
    where.add_argument(
        "--text-last",
        action="store_false",
        dest="text_first",
        help="text after the grid, as in HunyuanVideo (the default for videos)",
    )
    add_method_arguments(parser)
    work = parser.add_argument_group("work")
    work.add_argument("--head-dim", type=whole(), default=128, metavar="N", help="(default: 128)")
    work.add_argument("--heads", type=whole(), default=24, metavar="N", help="(default: 24)")
    add_picture_and_numbers(parser)


def run(args) -> int:
    """Build the plan, print its numbers, and write what was asked for."""
    check_picture_and_numbers(args)
    asked, options = chosen_method(args), parse_options(args.options)
    if asked is None:
        raise ValueError("the method is missing; add --method radial, or --config FILE")
    for name in ("height", "width"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name} is missing; give the grid in tokens")

    from dittfast.config import SCHEDULE_FIELDS, resolve
    from dittfast.layout import Layout

    for name in options:
        if name in SCHEDULE_FIELDS:
            raise ValueError(f"{name} belongs to the schedule; it does not change a plan")
    method, _ = resolve(asked, **options)
    planner = method.planner
    if planner is None or not planner.static:
        if planner is None:
            raise ValueError(
                f"{method.name} computes its own output and has no mask of key blocks; dittfast "
                f"estimate MODEL --method {method.name} says what it costs, dittfast probe how far "
                "it is from dense attention"
            )
        raise ValueError(
            f"{method.name} chooses blocks from q and k at every call, so it has no mask of its "
            f"own; dittfast probe --method {method.name} draws what it does to a model's q and k"
        )
    check_tokens(args.frames * args.height * args.width + args.text)
    text_first = args.frames == 1 if args.text_first is None else args.text_first
    layout = Layout.video(args.frames, args.height, args.width, args.text, text_first)

    from time import perf_counter

    from dittfast.environment import peak_memory, reset_peak_memory

    before = peak_memory("cpu") if reset_peak_memory("cpu") else None
    start = perf_counter()
    plan = planner.plan(layout)
    built = perf_counter() - start
    peak = peak_memory("cpu")
    data = _numbers(plan, method, layout, args)
    data["build_seconds"] = built
    data["build_peak_bytes"] = None if before is None else max(0, peak - before)
    lines = _lines(data, args)
    print("\n".join(lines))
    if args.output is not None:
        from dittfast.measure.draw import block_mask

        title = f"{method.name}, {_grid(layout)}"
        write_image(args.output, block_mask(plan, layout, title=title, lines=_notes(data)))
        print(f"wrote {args.output}")
    write_json_result(args, data)
    return 0


def _numbers(plan, method, layout, args) -> dict:

    from dittfast.environment import versions

    full, listed = (int(x.sum()) for x in (plan.kv_num_full_blocks, plan.kv_num_blocks))
    tensors = [x for x in plan.tensors() if hasattr(x, "element_size")]
    dense = 4.0 * plan.num_queries * plan.num_real_keys * args.head_dim * args.heads
    return {
        "method": method.to_dict(),
        "frames": args.frames,
        "height": args.height,
        "width": args.width,
        "text": args.text,
        "text_first": layout.num_context > 0 and layout.spans()[0][1].length == args.text,
        "tokens": plan.num_queries,
        "keys": plan.num_keys,
        "density": plan.density,
        "flops": dense * method.amount(layout, args.heads, args.head_dim, plan).work,
        "dense_flops": dense,
        "head_dim": args.head_dim,
        "heads": args.heads,
        "blocks": [plan.q_blocks.count, plan.kv_blocks.count],
        "listed_blocks": listed,
        "full_blocks": full,
        "plan_bytes": sum(x.element_size() * x.numel() for x in tensors),
        "versions": versions(),
    }


def _lines(data: dict, args) -> list[str]:
    options = ", ".join(f"{k}={v}" for k, v in data["method"].items() if k != "name")
    partial = data["listed_blocks"] - data["full_blocks"]
    cost = f"{seconds(data['build_seconds'])}, {compact(data['plan_bytes'], 'B')} of lists"
    if data["build_peak_bytes"] is not None:
        cost += f", {compact(data['build_peak_bytes'], 'B')} more memory at the peak"
    return [
        f"method    {data['method']['name']} ({options})",
        f"tokens    {data['tokens']:,}: {data['frames']} x {data['height']} x {data['width']}, "
        f"{data['text']} text",
        f"density   {data['density']:.4f} of token pairs",
        f"FLOPs     {compact(data['flops'])} of {compact(data['dense_flops'])} dense (forward, "
        f"{data['heads']} heads of {data['head_dim']})",
        f"blocks    {data['blocks'][0]} x {data['blocks'][1]}, {data['listed_blocks']:,} listed: "
        f"{data['full_blocks']:,} full, {partial:,} partial",
        f"built in  {cost}",
    ]


def _notes(data: dict) -> list[str]:
    options = [f"{k} = {v}" for k, v in data["method"].items() if k != "name" and v is not None]
    blocks = f"{data['listed_blocks']:,} blocks computed"
    if data["full_blocks"] < data["listed_blocks"]:
        blocks += f", {data['full_blocks']:,} of them full"
    return [
        *options,
        f"density {data['density']:.4f}",
        f"{compact(data['flops'], 'FLOP')} of {compact(data['dense_flops'], 'FLOP')} dense",
        f"({data['heads']} heads of {data['head_dim']}, forward)",
        blocks,
    ]


def _grid(layout) -> str:
    frames, height, width = layout.grid.shape
    size = f"{height} x {width} image" if frames == 1 else f"{frames} x {height} x {width} video"
    text = f" and {layout.num_context} text" if layout.num_context else ""
    return f"{size}{text} tokens"
