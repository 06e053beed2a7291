"""``dittfast evaluate``: a model's pictures and speed against dense attention's."""

from __future__ import annotations

import argparse
import contextlib
import json
from dataclasses import replace
from pathlib import Path

from dittfast.disk.locks import locked
from dittfast.disk.records import read_record, write_record
from dittfast.files import check_output, folder_for, write_text

from .adapter import adapter_variants
from .options import (
    CALL,
    add_any_model_argument,
    add_call_arguments,
    add_json_argument,
    add_model_argument,
    add_pipeline_arguments,
    add_place_arguments,
    check_backend,
    check_json,
    check_loading_options,
    files_read,
    load_pipeline,
    loading,
    on_stage,
    parse_options,
    say,
    shipped,
    write_json_result,
)
from .values import seed, whole

FIDELITY_EXAMPLE = """\
examples:
  dittfast evaluate fidelity -m local8=local -m local16=local --set local16.window=16 \\
      --set min_tokens=0 -o work/eval
  dittfast evaluate fidelity --config evaluations/sample-flux -o work/eval --save work/methods
  dittfast evaluate fidelity -m local/sample-flux -m rectified --pair local-sample-flux:rectified \\
      -n 4 -o work/pairs
"""
LATENCY_EXAMPLE = """\
examples:
  dittfast evaluate latency -m local/sample-flux --pairs 5
  dittfast evaluate latency --model sample-video -m radial --set block_size=32 -o work/eval
"""
DRAW_EXAMPLE = """\
examples:
  dittfast evaluate draw -m local=local/sample-flux -n 256 -o work/many
  accelerate launch -m dittfast evaluate draw -m local=local/sample-flux -n 256 -o work/many
"""
FID_EXAMPLE = """\
examples:
  dittfast evaluate fid work/many/local --against work/many/dense --features sample
  dittfast evaluate fid work/many/local work/many/dense --dataset coco2014:train:256
"""
EXAMPLE = """\
examples:
  dittfast evaluate fidelity -m local/sample-flux -o work/eval
  dittfast evaluate latency -m local/sample-flux --pairs 5
  dittfast evaluate draw -m local=local/sample-flux -n 256 -o work/many
  dittfast evaluate fid work/many/local --against work/many/dense --features sample

dittfast evaluate TASK --help shows a task's options and more examples.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tasks of ``dittfast evaluate`` and their options."""
    parser.epilog = EXAMPLE
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    fidelity = tasks.add_parser(
        "fidelity",
        help="PSNR, SSIM, LPIPS and latent cosine, paired by prompt and seed",
        epilog=FIDELITY_EXAMPLE,
    )
    _add_methods(fidelity)
    _add_prompts(fidelity, "all of the file; 16 of sample-flux")
    fidelity.add_argument(
        "--pair",
        action="append",
        default=[],
        metavar="A:B",
        help="tabulate the difference of two labels, too; repeatable",
    )
    _add_folder(fidelity)
    _add_kernel(fidelity)
    add_call_arguments(fidelity)
    _add_loading(fidelity)

    latency = tasks.add_parser(
        "latency",
        help="seconds end to end and per step, attention's share, Amdahl's ceiling",
        epilog=LATENCY_EXAMPLE,
    )
    _add_methods(latency)
    latency.add_argument("--prompt", metavar="TEXT", help="(default: the first of the sample's)")
    latency.add_argument(
        "--pairs", type=whole(1, 10_000), default=5, metavar="N", help="timed (default: 5)"
    )
    latency.add_argument("--seed", type=seed, default=0, metavar="N", help="(default: 0)")
    _add_folder(latency, required=False)
    _add_kernel(latency)
    add_call_arguments(latency)
    _add_loading(latency)

    draw = tasks.add_parser(
        "draw",
        help="only draw, for FID: dense and every method; on several devices by accelerate",
        epilog=DRAW_EXAMPLE,
    )
    _add_methods(draw)
    _add_prompts(draw, "256; 64 of a sample video model")
    _add_folder(draw)
    _add_kernel(draw)
    add_call_arguments(draw)
    _add_loading(draw)
    _add_fid(tasks)


def _add_loading(parser: argparse.ArgumentParser) -> None:
    add_pipeline_arguments(parser)
    add_place_arguments(parser)


def _add_fid(tasks) -> None:
    fid = tasks.add_parser(
        "fid", help="FID of folders of pictures, through clean-fid", epilog=FID_EXAMPLE
    )
    fid.add_argument(
        "folders", nargs="+", action="several", metavar="FOLDER", help="pictures, or an arm of draw"
    )
    against = fid.add_mutually_exclusive_group(required=True)
    against.add_argument("--against", metavar="FOLDER", help="pictures to compare with")
    against.add_argument(
        "--dataset",
        metavar="NAME:SPLIT:RES",
        help="statistics that clean-fid has here, such as coco2014:train:256",
    )
    fid.add_argument(
        "--features",
        default="inception",
        metavar="NAME",
        help="inception; sample, the feature network of the sample model; or the folder of one "
        "that samples/train_features.py wrote. Only inception gives an FID (default: %(default)s)",
    )
    fid.add_argument(
        "--allow-few", action="store_true", help="go on with no more pictures than features"
    )
    fid.add_argument(
        "--mixed-sizes", action="store_true", help="allow pictures of several sizes in a folder"
    )
    fid.add_argument("--batch-size", type=whole(), default=32, metavar="N", help="(default: 32)")
    fid.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    _add_folder(fid, required=False)


def _add_methods(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    group = parser.add_argument_group("methods")
    group.add_argument(
        "-m",
        "--method",
        action="append",
        default=[],
        metavar="[LABEL=]NAME",
        help="local, radial, ..., or a preset; a label tells two of a kind apart; repeatable",
    )
    group.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="a YAML file with several methods under labels, or with one; shipped: "
        "evaluations/sample-flux; repeatable",
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="[LABEL.]KEY=VALUE",
        dest="options",
        help="an option of every method, or of one; repeatable",
    )
    add_any_model_argument(group)
    group.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[LABEL=]FOLDER",
        help="what dittfast distill trained, as one more method; repeatable",
    )


def _add_prompts(parser: argparse.ArgumentParser, default: str) -> None:
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--prompts",
        metavar="FILE",
        help="one per line, or JSON (strings, COCO captions, VBench); a sample model has its own",
    )
    group.add_argument(
        "-n",
        "--num-prompts",
        type=whole(),
        metavar="N",
        help=f"how many pictures (default: {default})",
    )
    group.add_argument(
        "--seed", type=seed, default=0, metavar="N", help="of the first picture (default: 0)"
    )


def _add_folder(parser: argparse.ArgumentParser, required: bool = True) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "-o",
        "--output",
        required=required,
        metavar="FOLDER",
        help="pictures and results; what it holds already is not drawn again",
    )
    group.add_argument(
        "--no-verify",
        action="store_true",
        help="take what the folder holds even where its SHA-256 differs",
    )
    group.add_argument(
        "--save", metavar="PREFIX", help="write the results as PREFIX.json and PREFIX.md, too"
    )
    add_json_argument(group)


def _add_kernel(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dense-kernel",
        default="auto",
        metavar="NAME",
        help="hold PyTorch's dense attention to math, flash, efficient or cudnn in every arm",
    )


def run(args) -> int:
    """Run the task; 1 if a method's attention is wrong, and then its numbers are not printed."""
    from dittfast.measure.check import WrongResult

    tasks = {"fidelity": _fidelity, "latency": _latency, "draw": _draw, "fid": _fid}
    # The processes of one launch draw into one folder; _draw takes it for them.
    alone = args.output is not None and args.task != "draw"
    folder = contextlib.nullcontext() if args.output is None else folder_for(args.output)
    try:
        with folder:
            _results(args, args.task)
            with locked(args.output, alone):
                return tasks[args.task](args)
    except WrongResult as error:
        print(f"FAILED: {error}\nnothing is measured for a wrong result")
        return 1


def _results(args, name: str) -> list[Path]:
    """Where the results go, checked: prefixes of .json and .md files."""
    prefixes = [] if args.output is None else [Path(args.output) / name]
    if args.save is not None:
        prefixes.append(Path(args.save))
    written = {}
    for option, prefix in zip(("-o", "--save"), prefixes if args.output else [None, *prefixes]):
        for ending in (".json", ".md") if prefix else ():
            written[f"{option}, as {ending},"] = check_output(f"{prefix}{ending}")
    check_json(args, written, files_read(args))
    return prefixes


def _finish(args, data: dict, title: str, tables, prefixes: list[Path]) -> None:
    """Print the tables, and write them with the data."""
    text = "\n".join(table.markdown() for table in tables)
    print(text)
    for prefix in prefixes:
        write_record(f"{prefix}.json", data)
        write_text(f"{prefix}.md", f"# {title}\n\n{text}")
    written = [f"{p}{ending}" for p in prefixes for ending in (".json", ".md")]
    if written:
        print("wrote " + ", ".join(written))
    write_json_result(args, data)


def _variants(args, source):
    """The labelled methods that were asked for, and the pairs of labels."""
    from dittfast.mixture import for_any_model
    from dittfast.pipelines.measure.variants import check_labels, make_variants, read_variants
    from dittfast.pipelines.runs.sources import transformer_classes

    check_backend(args.backend)
    chosen: dict = {}
    labels: list[str] = []
    pairs = [tuple(p.split(":")) for p in getattr(args, "pair", [])]
    for pair in pairs:
        if len(set(pair)) != 2 or len(pair) != 2:
            raise ValueError(f"--pair takes two different labels as A:B, got {':'.join(pair)}")
    for file in args.config:
        from_file, more = read_variants(shipped(file))
        labels += from_file
        chosen |= from_file
        pairs += more
    for text in args.method:
        label, equals, name = text.partition("=")
        name = name if equals else text
        label = label if equals else name.replace("/", "-")
        labels.append(label)
        chosen[label] = (name, {})
    adapters = adapter_variants(args.adapter, args.backend)
    labels += [variant.label for variant in adapters]
    check_labels(labels, pairs)
    options = parse_options(args.options)
    classes = () if args.any_model else transformer_classes(source).values()
    variants = make_variants(chosen, options, args.backend, classes)
    if args.any_model:
        variants = [replace(v, method=for_any_model(v.method)) for v in variants]
    return variants + adapters, pairs


def _items(args, source):
    """What to draw: the user's prompts, or those of the sample model."""
    from dittfast.pipelines.runs.prompts import make_items, read_prompts

    if args.prompts is not None:
        return make_items(read_prompts(args.prompts), args.num_prompts, args.seed)
    if not source.settings.get("prompts"):
        raise ValueError(f"{source.name} has no prompts of its own; add --prompts FILE")
    path = Path(shipped(f"evaluations/{source.name}")).with_suffix(".txt")
    first = read_prompts(path) if path.is_file() else source.settings["prompts"]
    count = len(first) if args.num_prompts is None else args.num_prompts
    # The same picture has the same number whatever the count, so that folders can grow.
    prompts = list(dict.fromkeys([*first, *_known_prompts(source.settings)]))
    return make_items(prompts, count, args.seed)


def _known_prompts(settings: dict) -> list[str]:
    """Every label of a sample model, with backgrounds and motions that move on from one to next."""
    if not {"labels", "backgrounds"} <= set(settings):
        return []
    from dittfast.samples.captions import caption

    labels, colours, motions = (settings.get(k, []) for k in ("labels", "backgrounds", "motions"))
    prompts = []
    for turn in range(len(colours) * max(1, len(motions))):
        for number, label in enumerate(labels):
            colour = colours[(number + turn) % len(colours)]
            if not motions:
                prompts.append(caption(label, colour))
                continue
            # Of 64 clips in a row no two share both background and motion.
            motion = motions[(number + (number + turn) // len(colours)) % len(motions)]
            prompts.append(
                caption(label, colour, f"{{a_label}} {motion} on {{a_colour}} background")
            )
    return prompts


def _load(args, source, variants, device=None):
    """The pipeline, and the arguments of its call."""
    from dittfast.pipelines.measure.fidelity import check_dense_kernel
    from dittfast.pipelines.runs.call import call_arguments, check_ranges
    from dittfast.pipelines.runs.first_frame import with_first_frame
    from dittfast.pipelines.runs.outline import check_run, outline

    given = {name: getattr(args, name) for name in CALL}
    check_ranges(prompt="any", seed=args.seed, **given)
    check_dense_kernel(args.dense_kernel)
    if args.offload == "sequential":
        raise ValueError(
            "--offload sequential leaves nothing of the weights to tell whether pictures that are "
            "there were drawn with them; take --offload group, which needs as little memory"
        )
    check_loading_options(args, source, device)
    empty = outline(source)
    for variant in variants if empty is not None else ():
        check_run(empty, source, "any", given, variant.method, variant.schedule)
    pipe = load_pipeline(args, source, [v.preset or v.method.name for v in variants], device)
    pipe.set_progress_bar_config(disable=True)
    call = call_arguments(pipe, "any", source.settings, **given)
    return pipe, with_first_frame(pipe, call, source.settings)


def _fidelity(args) -> int:
    from dittfast.pipelines.runs import sources

    prefixes = _results(args, "fidelity")
    source = sources.find(args.model)
    variants, pairs = _variants(args, source)
    if not variants:
        raise ValueError("there is no method to compare; add --method local, or --config FILE")
    items = _items(args, source)

    from dittfast.measure.tables import fidelity_tables
    from dittfast.pipelines.measure.fidelity import evaluate_fidelity

    pipe, call = _load(args, source, variants)
    data = evaluate_fidelity(
        pipe,
        source,
        call,
        items,
        variants,
        args.output,
        kernel=args.dense_kernel,
        pairs=pairs,
        verify=not args.no_verify,
        on_stage=on_stage(pipe),
        loading=loading(args).to_dict(),
        progress=_bar,
    )
    _finish(args, data, f"Fidelity of {source.name}", fidelity_tables(data), prefixes)
    return 0


def _latency(args) -> int:
    from dittfast.pipelines.runs import sources

    prefixes = _results(args, "latency")
    source = sources.find(args.model)
    variants, _ = _variants(args, source)
    if not variants:
        raise ValueError("there is no method to time; add --method local, or --config FILE")
    if args.pairs < 1:
        raise ValueError(f"--pairs must be at least 1, got {args.pairs}")
    prompt = args.prompt or next(iter(source.settings.get("prompts", [])), None)
    if prompt is None:
        raise ValueError(f"{source.name} has no prompts of its own; add --prompt TEXT")

    from dittfast.measure.tables import latency_table
    from dittfast.pipelines.measure.latency import latency_settings, measure_latency

    pipe, call = _load(args, source, variants)
    call |= {"prompt": prompt}
    timing = {"pairs": args.pairs, "seed": args.seed, "kernel": args.dense_kernel}
    timing["loading"] = loading(args).to_dict()
    known = {} if args.output is None else _timed_before(prefixes[0], not args.no_verify)
    rows = []
    for variant in variants:
        settings = json.loads(json.dumps(latency_settings(pipe, source, call, variant, **timing)))
        row = known.get(variant.label, {})
        if any(row.get(name) != value for name, value in settings.items()):
            row = measure_latency(pipe, source, call, variant, on_stage=on_stage(pipe), **timing)
            known[variant.label] = row
            if args.output is not None:  # what a kill would lose
                write_record(f"{prefixes[0]}.json", {"task": "latency", "rows": [*known.values()]})
        else:
            say(f"{variant.label} was timed before")
        rows.append(row)
    data = {"task": "latency", "rows": rows}
    _finish(args, data, f"Latency of {source.name}", [latency_table(data)], prefixes)
    return 0


def _timed_before(prefix: Path, verify: bool = True) -> dict[str, dict]:
    """Rows of an earlier latency.json, by label; none where there is no such file."""
    path = Path(f"{prefix}.json")
    if not path.exists():
        return {}
    form = {"rows": [{"label": str, "*": object}], "*": object}
    remedy = "remove it to time again"
    rows = read_record(path, form, verify=verify, remedy=remedy).data["rows"]
    return {row["label"]: row for row in rows}


def _draw(args) -> int:
    from dittfast.pipelines.runs import sources

    _results(args, "draw")
    source = sources.find(args.model)
    variants, _ = _variants(args, source)
    if args.num_prompts is None:
        args.num_prompts = 64 if "motions" in source.settings else 256
    items = _items(args, source)

    from accelerate import PartialState

    from dittfast.pipelines.measure.fidelity import (
        Arm,
        base_settings,
        dense_kernel,
        did_not_run,
        draw_missing,
    )

    state = PartialState(cpu=args.device == "cpu")
    device = state.device if args.device == "auto" or state.num_processes > 1 else None
    pipe, call = _load(args, source, variants, device)
    base = base_settings(pipe, source, call, args.dense_kernel, loading(args).to_dict())
    with locked(args.output, state.is_main_process):
        folder, verify = Path(args.output), not args.no_verify
        arms = [Arm(pipe, base, folder, variant, verify) for variant in (None, *variants)]
        with dense_kernel(args.dense_kernel), state.split_between_processes(items) as mine:
            drawn = draw_missing(arms, call, mine, latents=False, on_stage=on_stage(pipe))
        state.wait_for_everyone()
    if state.is_main_process:
        folders = {arm.label: str(arm.drawings.folder) for arm in arms}
        for label, folder in folders.items():
            print(f"{label}: {len(items)} pictures in {folder}")
        records = {x.label: [x.drawings.record(item) for item in items] for x in arms[1:]}
        idle = {label: did_not_run(rows) for label, rows in records.items()}
        for label, why in idle.items():
            if why is not None:
                print(f"{label} DID NOT RUN, dense attention drew these: {why}")
        facts = {
            "did_not_run": idle,
            "processes": state.num_processes,
            "pictures": len(items),
            "drawn_here": drawn,
        }
        write_json_result(args, base | {"task": "draw", "folders": folders} | facts)
    return 0


def _fid(args) -> int:
    prefixes = _results(args, "fid")

    from dittfast.environment import versions
    from dittfast.measure.features import load_features
    from dittfast.measure.fid import Reference, frechet
    from dittfast.measure.tables import fid_table
    from dittfast.pipelines.runs.sources import choose_device

    device = choose_device(args.device)
    network = None
    if args.features != "inception":
        network = load_features(None if args.features == "sample" else args.features, device)
    reference = args.against if args.dataset is None else Reference.parse(args.dataset)
    rows = [
        frechet(
            folder,
            reference,
            network,
            allow_few=args.allow_few,
            mixed_sizes=args.mixed_sizes,
            batch_size=args.batch_size,
            device=device,
            progress=_bar,
        )
        for folder in args.folders
    ]
    data = {"task": "fid", "rows": rows, "versions": versions()}
    _finish(args, data, "Distances between folders", [fid_table(data)], prefixes)
    return 0


def _bar(values, name: str):
    """``values`` with a bar while they are gone through; none where nobody looks."""
    from tqdm import tqdm

    return tqdm(values, desc=name, disable=None, leave=False, delay=5)
