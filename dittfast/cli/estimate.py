"""``dittfast estimate``: every method at a published model's real size, computed."""

from __future__ import annotations

import argparse
import math

from dittfast.files import check_output, write_text

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
  dittfast estimate wan2.1-14b --gpu H100 --gpus 8
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
    gpu = parser.add_argument_group("seconds, computed from published rates")
    gpu.add_argument("--gpu", metavar="NAME", help="such as H100, B200 or 'RTX 5090'")
    gpu.add_argument(
        "--gpus", type=whole(), default=1, metavar="N", help="that share the heads by Ulysses"
    )
    out = parser.add_argument_group("output")
    out.add_argument(
        "--markdown", metavar="FILE", help="only write a page of all GPUs and models, here"
    )
    add_json_argument(out)


def run(args) -> int:
    """Print the table of a published model."""
    check_json(args)
    from dittfast.config import check_fits
    from dittfast.measure.gpus import gpu_of
    from dittfast.pipelines.families.published import published_model, published_models

    if args.markdown is not None:
        from dittfast.pipelines.measure.scaling import scaling_markdown

        check_output(args.markdown, (".md",))
        write_text(args.markdown, scaling_markdown())
        print(f"wrote {args.markdown}")
        return 0
    gpu = None if args.gpu is None else gpu_of(args.gpu)
    if gpu is None and args.gpus != 1:
        raise ValueError(f"--gpus {args.gpus} needs a GPU: add --gpu H100")
    if args.model is None and gpu is not None:
        print("\n".join(_break_even_lines(gpu)))
        return 0
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
    data = model.to_dict() | {"versions": versions()}
    lines = _lines(model)
    if gpu is not None:
        data["gpu"], more = _on_gpu(model, gpu, args.gpus)
        lines += more
    print("\n".join(lines))
    write_json_result(args, data)
    return 0


def _break_even_lines(gpu) -> list[str]:
    """From which density a plan pays on a GPU."""
    from dittfast.measure.roofline import break_evens

    lines = [f"{gpu.name}: computed from published rates, not measured"]
    for engine, by_dense in break_evens(gpu).items():
        told = ", ".join(f"{value:.2f} against {name}" for name, value in by_dense.items())
        lines.append(f"{engine.ljust(10)}  pays below a density of {told}")
    if len(lines) == 1:
        lines.append("nobody published rates of an engine that walks block lists there")
    return lines


def _on_gpu(model, gpu, count: int) -> tuple[dict, list[str]]:
    """Seconds of a pass on ``count`` GPUs, as data and as lines."""
    from dittfast.measure.roofline import break_evens
    from dittfast.measure.roofline import seconds as on_gpu
    from dittfast.pipelines.measure.scaling import attention_of, dense_words, sparse_seconds

    work = attention_of(model)
    kernel = "its peak" if gpu.best is None else gpu.best[0]
    tflops = gpu.peak_tflops if gpu.best is None else gpu.best[1].tflops
    dense = on_gpu(work, gpu, tflops, 1.0, count)
    refusals = {x.settings: x.refused for x in model.methods}
    found = {x.settings: sparse_seconds(model, x, gpu, count) for x in model.methods}
    data = {
        "name": gpu.name,
        "gpus": count,
        "dense_kernel": kernel,
        "dense_seconds": dense.attention,
        "exchange_seconds": dense.exchange,
        "break_even": break_evens(gpu),
        "methods": found,
    }
    lines = ["", *_break_even_lines(gpu)]
    lines.append(
        f"seconds of attention in a pass on {count} GPU{'s' * (count > 1)}"
        + ", the exchange of heads included" * (count > 1)
    )
    lines.append(f"{'dense'.ljust(24)}  {dense_words(work, gpu, count)} with {kernel}")
    for settings, by_engine in found.items():
        told = ", ".join(f"{name} {value:.3g}" for name, value in by_engine.items())
        lines.append(f"{settings.ljust(24)}  {told or 'no published rate'}")
        refused = refusals[settings].get(gpu.architecture, {})
        for name in gpu.engines:
            if name in refused:
                lines.append(f"{''.ljust(24)}  {name} refuses: {refused[name]}")
    return data, lines


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
