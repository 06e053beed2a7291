"""What several subcommands share: groups of options, what they mean, and how numbers look."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from dittfast.files import check_output

from .values import anything, number, number_or_fit, whole

# Paths, or None, by what names them on the command line; and the same in pairs.
Written = dict[str, "str | Path | None"]
Read = Iterable[tuple[str, Path]]
# Arguments of the pipeline's call that have an option of the same name.
CALL = (
    "height", "width", "num_frames", "num_inference_steps", "guidance_scale", "guidance_scale_2",
    "true_cfg_scale", "negative_prompt", "max_sequence_length",
)  # fmt: skip

# Written out, so that --help needs no torch.
BACKEND_NAMES = "auto, triton, native, cpu, flex, flash4, cudnn, flashinfer or reference"


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """``--model``."""
    parser.add_argument(
        "--model",
        default="sample-flux",
        metavar="NAME",
        help="a sample model, a diffusers folder or a hub id (default: %(default)s)",
    )


def add_call_arguments(parser: argparse.ArgumentParser):
    """What the pipeline's call takes; the group, for more."""
    call = parser.add_argument_group("picture", "without these the model's own defaults hold")
    call.add_argument("--height", type=whole(), metavar="PX")
    call.add_argument("--width", type=whole(), metavar="PX")
    call.add_argument("--num-frames", type=whole(), metavar="N", help="of a video")
    call.add_argument("--num-inference-steps", "--steps", type=whole(), metavar="N")
    call.add_argument("--guidance-scale", type=number(least=0), metavar="X")
    call.add_argument(
        "--guidance-scale-2",
        type=number(least=0),
        metavar="X",
        help="of the second expert of Wan 2.2",
    )
    call.add_argument("--true-cfg-scale", type=number(least=0), metavar="X")
    call.add_argument("--negative-prompt", type=anything, metavar="TEXT")
    call.add_argument("--max-sequence-length", type=whole(), metavar="N", help="text tokens")
    return call


def add_position_scale(group) -> None:
    """``--position-scale``."""
    group.add_argument(
        "--position-scale",
        type=number_or_fit,
        metavar="X",
        help="multiply the image's position ids (of FLUX and its relatives): 0.25 fits 1,024 px "
        "into the positions of 256 px; fit does that for the size that a sample model was trained "
        "for, or with --stages for the first stage (default: 1)",
    )


def fitted_scale(args, source, call: dict) -> float:
    """The position scale of a picture that is drawn in one go.

    Raises:
        ValueError: "fit" for a model whose own size nobody has told.
    """
    if args.position_scale != "fit":
        return 1.0 if args.position_scale is None else args.position_scale
    if "height" not in source.settings:
        raise ValueError(
            f"--position-scale fit needs a sample model, which knows its size; for {source.name} "
            "give the number: the trained side / the side that is drawn"
        )
    return source.settings["height"] / call["height"]


def add_pipeline_arguments(parser: argparse.ArgumentParser) -> None:
    """``--lora`` and what else :func:`load_pipeline` puts into the pipeline."""
    group = parser.add_argument_group("the pipeline")
    group.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="a LoRA of diffusers, kohya, ComfyUI or lightx2v as .safetensors; repeatable",
    )
    group.add_argument(
        "--lora-2",
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="one for the second expert of Wan 2.2; repeatable",
    )
    group.add_argument(
        "--offload",
        choices=("model", "group", "sequential"),
        help="keep weights in the CPU's memory until they are needed: whole models, single layers "
        "copied ahead, or single layers (least memory, slowest)",
    )
    group.add_argument(
        "--quantize",
        metavar="KIND",
        help="the transformer's weights: int8 (torchao), fp8, bnb-int8, bnb-nf4 (bitsandbytes), or "
        "gguf:FILE[,FILE]",
    )
    group.add_argument("--vae-tiling", action="store_true", help="decode in tiles: less memory")
    group.add_argument("--compile", action="store_true", help="torch.compile the transformer")
    group.add_argument(
        "--attention-backend",
        metavar="NAME",
        help="of diffusers, for all dense attention: native, flash, sage, flex ...",
    )
    parser.set_defaults(says=("dittfast.pipelines.runs.needs",))


def loading(args):
    """The :class:`~dittfast.pipelines.runs.loading.Loading` that the options name."""
    from dittfast.pipelines.runs.loading import Loading, Lora

    loras = [Lora.parse(text) for text in args.lora]
    loras += [Lora.parse(text, "transformer_2") for text in args.lora_2]
    return Loading(
        tuple(loras),
        args.offload,
        args.quantize,
        args.vae_tiling,
        args.compile,
        args.attention_backend,
    )


def check_loading_options(args, source, device=None):
    """The device and the ``Loading`` that the options name, checked without loading anything."""
    from dittfast.pipelines.runs import sources
    from dittfast.pipelines.runs.loading import check_loading

    device = sources.choose_device(args.device) if device is None else device
    how = loading(args)
    check_loading(how, source, device)
    return device, how


def load_pipeline(args, source, named=(), device=None):
    """The pipeline that the options name, loaded; checks first all that can be.

    Args:
        named: methods, presets and files that were asked for; those of other models are refused.
        device: in the place of ``--device``.
    """
    from dittfast.config import check_fits
    from dittfast.pipelines.models import stock_class, transformers_of
    from dittfast.pipelines.runs import sources
    from dittfast.pipelines.runs.loading import load_with, parameter_count

    device, how = check_loading_options(args, source, device)
    dtype = sources.choose_dtype(args.dtype, device)
    quiet_libraries()
    count = parameter_count(source)
    size = ""
    if count is not None:
        size = f": {compact(count)} parameters, {compact(count * dtype.itemsize, 'B')}"
    say(f"loading {source.name} on {device} in {str(dtype).removeprefix('torch.')}{size}")
    pipe = load_with(source, device, dtype, how)
    if source.kind == "hub":  # a folder was asked before
        classes = [stock_class(type(m)).__name__ for m in transformers_of(pipe).values()]
        for name in named:
            check_fits(name, classes, args.any_model)
    return pipe


def add_place_arguments(parser: argparse.ArgumentParser) -> None:
    """``--device``, ``--dtype`` and ``--backend``."""
    where = parser.add_argument_group("where it runs")
    where.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    where.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "float16", "bfloat16"),
        help="auto: bfloat16 on accelerators, float32 on CPUs",
    )
    where.add_argument(
        "--backend",
        default="auto",
        metavar="NAME",
        help=BACKEND_NAMES,
    )


def add_guidance_arguments(parser: argparse.ArgumentParser, heads: bool = True) -> None:
    """``--guide...``; with ``heads`` also those that name the heads."""
    group = parser.add_argument_group(
        "guidance by weakened heads", "one more pass of the transformer at every guided step"
    )
    if heads:
        either = group.add_mutually_exclusive_group()
        either.add_argument("--guide", metavar="FILE", help="heads.json, as dittfast hunt wrote it")
        either.add_argument(
            "--guide-heads", metavar="L.H,...", help="heads by layer and number, such as 3.1,5.0"
        )
    group.add_argument("--guide-scale", type=number(), metavar="W", help="(default: 3)")
    group.add_argument(
        "--guide-strength",
        type=number(0, 1),
        metavar="U",
        help="how far heads are weakened, 0 to 1 (1)",
    )
    group.add_argument(
        "--guide-rows", metavar="ROWS", help="which tokens: image, joint or diagonal (image)"
    )
    group.add_argument(
        "--guide-steps", metavar="A:B", help="guide steps A up to, not including, B (all)"
    )


def head_list(text: str) -> tuple[tuple[int, int], ...]:
    """``"3.1, 5.0"`` as ``((3, 1), (5, 0))``.

    Raises:
        ValueError: anything else.
    """
    heads = []
    for item in text.replace(",", " ").split():
        layer, dot, head = item.partition(".")
        if not (dot and layer.lstrip("-").isdigit() and head.isdigit()):
            raise ValueError(f"heads are written LAYER.HEAD, such as 3.1,5.0; got {item!r}")
        heads.append((int(layer), int(head)))
    if not heads:
        raise ValueError(f"no heads in {text!r}; name them as LAYER.HEAD, such as 3.1,5.0")
    return tuple(heads)


def guidance_options(args) -> dict:
    """The fields of HeadGuidance that the options name, without the heads.

    Raises:
        ValueError: ``--guide-steps`` that is no range.
    """
    given = {
        "guidance_scale": args.guide_scale,
        "strength": args.guide_strength,
        "rows": args.guide_rows,
    }
    if args.guide_steps is not None:
        start, colon, stop = args.guide_steps.partition(":")
        if not colon or not (start or "0").isdigit() or not (stop or "0").isdigit():
            raise ValueError(f"--guide-steps takes A:B, such as 2:10; got {args.guide_steps!r}")
        given["start_step"] = int(start or 0)
        given["stop_step"] = int(stop) if stop else None
        if stop and int(stop) <= int(start or 0):
            raise ValueError(f"--guide-steps {args.guide_steps} holds no step; take A below B")
    return {name: value for name, value in given.items() if value is not None}


def guidance(args):
    """The :class:`dittfast.HeadGuidance` that was asked for, or None.

    Raises:
        ValueError: settings without heads, or a value out of range.
        FileNotFoundError: no such file with heads.
    """
    options = guidance_options(args)
    if args.guide is None and args.guide_heads is None:
        if options:
            raise ValueError(
                "the guidance has no heads to weaken; add --guide heads.json, or "
                "--guide-heads 3.1,5.0"
            )
        return None
    from dittfast.methods.head_guidance import HeadGuidance

    if args.guide is not None:
        return HeadGuidance.load(args.guide, **options)
    return HeadGuidance(head_list(args.guide_heads), **options)


def say(words: str) -> None:
    """A line for people, on stderr."""
    print(words, file=sys.stderr, flush=True)


def add_method_arguments(
    parser: argparse.ArgumentParser, otherwise: str = "", for_model: bool = False
) -> None:
    """``--method``, ``--config`` and ``--set``; with ``for_model`` also ``--any-model``.

    Args:
        otherwise: says what holds without them.
    """
    group = parser.add_argument_group("attention")
    either = group.add_mutually_exclusive_group(required=False)
    either.add_argument(
        "-m",
        "--method",
        metavar="NAME",
        help=f"a method such as radial or local, or a preset such as radial/wan2.1{otherwise}",
    )
    either.add_argument(
        "--config", metavar="FILE", help="a YAML file with method, options, schedule"
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="options",
        help="an option of the method or its schedule, such as window=8; repeatable",
    )
    if for_model:
        add_any_model_argument(group)


def add_any_model_argument(group) -> None:
    """``--any-model``."""
    group.add_argument(
        "--any-model", action="store_true", help="take a preset that is for other models, too"
    )


def add_picture_and_numbers(parser: argparse.ArgumentParser) -> None:
    """Where a picture and its numbers are written."""
    out = parser.add_argument_group("output")
    out.add_argument("-o", "--output", metavar="FILE", help="write the picture here, as .png")
    add_json_argument(out)


def check_picture_and_numbers(args) -> None:
    """Raise now rather than after the work if a file cannot be written; see ``check_output``."""
    if args.output is not None:
        check_output(args.output, (".png",))
    check_json(args, {"-o": args.output}, files_read(args))


def chosen_method(args) -> str | None:
    """What ``dittfast.config.resolve`` takes for the method, or None.

    Raises:
        ValueError: a config file without a YAML ending.
        FileNotFoundError: no such config file.
    """
    if args.config is None:
        return args.method
    path = Path(args.config)
    if not path.is_file():
        raise FileNotFoundError(f"no config file at {path}")
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{path}: a config file ends in .yaml or .yml")
    return str(path)


def method_and_schedule(args, source):
    """The method and schedule that were asked for; (None, None) for dense attention.

    Raises:
        ValueError: options without a method, or as :func:`dittfast.config.resolve`.
    """
    asked, options = chosen_method(args), parse_options(args.options)
    check_backend(args.backend)
    if asked is None:
        if options:
            raise ValueError("--set needs a method; add --method local, or --config FILE")
        if args.backend != "auto" and args.adapter is None:
            raise ValueError(
                f"--backend {args.backend} runs a method, and there is none; add --method local, "
                "or leave it out"
            )
        return None, None
    from dittfast.config import check_fits, resolve
    from dittfast.mixture import for_any_model
    from dittfast.pipelines.runs.sources import transformer_classes

    method, schedule = resolve(asked, **options)
    check_fits(asked, transformer_classes(source).values(), args.any_model)
    return (for_any_model(method) if args.any_model else method), schedule


def check_backend(name: str) -> None:
    """Raise ValueError, with the nearest name, unless there is such a backend."""
    from dittfast.attention import BACKENDS
    from dittfast.config import unknown

    if name != "auto" and name not in BACKENDS:
        raise unknown("backend", name, ["auto", *BACKENDS])


def preset_of(args) -> str | None:
    """The preset or file that method and schedule come from; None for a method's own name."""
    from dittfast.config import KINDS

    asked = chosen_method(args)
    return None if asked in KINDS else asked


def add_json_argument(parser) -> None:
    """``--json``: the one way to what machines read."""
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write the numbers as JSON; - for standard output, which then holds nothing else",
    )


def files_read(args) -> list[tuple[str, Path]]:
    """The files that options name to be read, with the option."""
    paths = []
    for name in ("method", "config", "image", "guide", "prompts", "holdout", "lora", "lora_2"):
        given = getattr(args, name, None) or []
        for path in [given] if isinstance(given, str) else given:
            if name.startswith("lora") and not Path(path).is_file():
                path = path.rpartition(":")[0]
            if Path(path).is_file():
                paths.append((f"--{name.replace('_', '-')}", Path(path)))
    return paths


def check_json(args, written: Written | None = None, read: Read = ()) -> None:
    """Check the file of ``--json`` before work that would be lost.

    Args:
        written, read: the other files of the command, as :func:`check_apart`.
    """
    own = None if args.json == "-" else args.json
    check_apart({**(written or {}), "--json": own}, read)
    if own is not None:
        check_output(own)


def check_apart(written: Written, read: Read = ()) -> None:
    """Refuse a file that two results would be written to, or that is read and would be lost.

    Args:
        written, read: paths by what names them on the command line.

    Raises:
        ValueError: one file for two purposes.
    """
    places: dict[tuple, str] = {}
    for name, path in written.items():
        if path is None:
            continue
        other = places.setdefault(_place(path), name)
        if other != name:
            raise ValueError(f"{other} and {name} both write {path}; give each a file of its own")
    for name, path in read:
        writer = places.get(_place(path))
        if writer is not None:
            raise ValueError(
                f"{writer} would write over {path}, which {name} reads; name another file"
            )


def _place(path: str | Path) -> tuple:
    """The same for two names of one file."""
    try:
        entry = os.stat(path)
    except OSError:
        return (os.path.realpath(path),)
    return entry.st_dev, entry.st_ino


def write_json_result(args, data) -> None:
    """Write ``data`` where ``--json`` says; nothing without it."""
    import json

    from dittfast.files import write_json

    if args.json == "-":
        print(json.dumps(data, allow_nan=False), file=args.json_stream)
    elif args.json is not None:
        write_json(args.json, data)
        print(f"wrote {args.json}")


def on_stage(pipe):
    """Says what comes next: as the name of the pipeline's bar, or in a line where there is none."""

    def stage(name: str) -> None:
        pipe.set_progress_bar_config(desc=name, disable=None, leave=False)
        if not sys.stderr.isatty():
            say(name)

    return stage


# Bytes that planning takes for a token at least: coordinates, orders, lists.
_PLANNED_BYTES = 100


def check_tokens(count: int, each: int = _PLANNED_BYTES, device="cpu") -> None:
    """Refuse, before anything is allocated, what a device has no memory for.

    Args:
        each: bytes that are needed for a token, at least.

    Raises:
        ValueError: too many tokens.
    """
    from dittfast.environment import total_memory
    from dittfast.layout import MAX_TOKENS

    memory = total_memory(device)
    most = MAX_TOKENS if memory is None else min(MAX_TOKENS, memory // each)
    if count > most:
        size = "" if memory is None else f" of the {compact(memory, 'B')} of {device}"
        raise ValueError(
            f"{count:,} tokens take {compact(count * each, 'B')} at least{size}; the limit here is "
            f"{most:,} tokens, take fewer"
        )


def parse_options(pairs: list[str]) -> dict:
    """``["window=8", "dense_layers=[0, 1]"]`` as names and YAML values.

    Raises:
        ValueError: no ``=``, an empty name, a name given twice, or a value that is no YAML.
    """
    from dittfast.config import option_value

    options: dict = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ValueError(f"--set takes KEY=VALUE, such as --set window=8; got {pair!r}")
        if key in options:
            raise ValueError(f"--set gives {key} twice")
        options[key] = option_value(text, f"--set {key}")
    return options


def compact(value: float, unit: str = "") -> str:
    """``1.23e12`` as ``1.23 T``."""
    for factor, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {letter}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def seconds(value: float) -> str:
    """Seconds with three digits: ``0.0123 s``, ``1.23 s``, ``123 s``."""
    return f"{value:.0f} s" if value >= 100 else f"{value:.3g} s"


def attention_words(row: dict) -> str:
    """What a row of a benchmark ran: tokens, grid, batch, heads and dtype."""
    grid = " x ".join(map(str, row["grid"]))
    return (
        f"{row['tokens']:,} tokens ({grid}, {row['context']} text), batch {row['batch']}, "
        f"{row['heads']} heads of {row['head_dim']}, {row['dtype']}"
    )


def quiet_libraries() -> None:
    """One bar, ours: no bars for reading files of which most take no time."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def shipped(file: str) -> str:
    """The path of a config file; ``evaluations/NAME`` is one that comes with the package."""
    from importlib import resources

    folder, slash, name = file.partition("/")
    if Path(file).suffix or folder != "evaluations" or not slash:
        return file
    return str(resources.files("dittfast.configs") / folder / f"{name}.yaml")
