"""``dittfast tune``: a budget in, a preset with its measured proof out."""

from __future__ import annotations

import argparse

from dittfast.files import check_folder

from .options import (
    CALL,
    add_call_arguments,
    add_json_argument,
    add_model_argument,
    add_pipeline_arguments,
    add_place_arguments,
    add_position_scale,
    check_backend,
    check_json,
    check_loading_options,
    files_read,
    fitted_scale,
    load_pipeline,
    loading,
    on_stage,
    write_json_result,
)
from .values import names, seed, sizes, whole

EXAMPLE = """\
examples:
  dittfast tune --budget "psnr>=30" -o tuned
  dittfast tune --model FOLDER --budget "psnr>=28" --budget "speedup>=1.5" --prompts prompts.txt \\
      --size 512 -o tuned
  dittfast generate "a panda on a green background" --config tuned/preset.yaml -o panda.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``dittfast tune``."""
    parser.epilog = EXAMPLE
    add_model_argument(parser)
    parser.add_argument(
        "--budget",
        action="append",
        default=[],
        metavar="NAME>=X",
        help="psnr>=DB, to dense attention's pictures; distance<=X, relative, of the latents; "
        "speedup>=X, dense seconds over the preset's; repeatable, all hold together",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FOLDER",
        help="gets preset.yaml, report.html and all that was measured; a tuning that was stopped "
        "goes on there",
    )
    what = parser.add_argument_group("prompts")
    what.add_argument(
        "--prompts",
        metavar="FILE",
        help="one prompt a line; every second is held out, the first among those tuned with; a "
        "sample model has its own, of which 2 are tuned with and 4 held out",
    )
    what.add_argument(
        "--held-out",
        metavar="FILE",
        help="prompts that judge alone, one a line; all of --prompts are tuned with then",
    )
    what.add_argument(
        "--seed", type=seed, default=0, metavar="N", help="of the first picture (default: 0)"
    )
    how = parser.add_argument_group("search")
    how.add_argument(
        "--methods", type=names, metavar="NAME,...", help="that may be used (default: all)"
    )
    how.add_argument(
        "--bands",
        type=whole(),
        default=4,
        metavar="N",
        help="parts of the run that get choices of their own, at most its steps (default: 4)",
    )
    how.add_argument(
        "--rounds",
        type=whole(),
        default=4,
        metavar="N",
        help="of solving and drawing, at most (default: 4)",
    )
    how.add_argument(
        "--gpu",
        metavar="NAME",
        help="count the seconds of this GPU, computed from published rates, and not those of this "
        "device: H100, H200 or B200",
    )
    how.add_argument(
        "--no-verify",
        action="store_true",
        help="take what the folder holds even where its SHA-256 differs",
    )
    call = add_call_arguments(parser)
    call.add_argument(
        "--size", type=sizes, metavar="PX", help="height and width, as 512 or 512x768"
    )
    add_position_scale(call)
    add_pipeline_arguments(parser)
    add_place_arguments(parser)
    add_json_argument(parser)


def run(args) -> int:
    """Check all that can be checked, load, tune, and report."""
    from dittfast.pipelines.runs import sources
    from dittfast.pipelines.tune.budget import Budget

    budget = Budget.parse(args.budget)
    if args.output is None:
        raise ValueError("-o FOLDER is missing; say where the preset should go")
    folder = check_folder(args.output)
    check_json(args, {"-o, as preset.yaml,": folder / "preset.yaml"}, files_read(args))
    check_backend(args.backend)
    source = sources.find(args.model)
    task = _task(args, budget, source)
    given = _call(args)

    from dittfast.pipelines.runs.call import call_arguments, check_ranges
    from dittfast.pipelines.runs.first_frame import with_first_frame
    from dittfast.pipelines.runs.outline import check_run, outline
    from dittfast.pipelines.runs.positions import positions_scaled
    from dittfast.pipelines.tune.budget import ImpossibleBudget
    from dittfast.pipelines.tune.tune import tune

    prompt = task.items[0].prompt
    check_ranges(prompt=prompt, seed=args.seed, **given)
    check_loading_options(args, source)
    empty = outline(source)
    if empty is not None:
        call = check_run(empty, source, prompt, given)
        with positions_scaled(empty, fitted_scale(args, source, call)):
            pass  # checks it
    pipe = load_pipeline(args, source)
    pipe.set_progress_bar_config(disable=True)
    call = call_arguments(pipe, prompt, source.settings, **given)
    if "num_inference_steps" not in call:
        raise ValueError(f"{source.name} does not say how many steps it takes; add --steps N")
    call = with_first_frame(pipe, call, source.settings)
    try:
        tuned = tune(
            pipe,
            source,
            call,
            task,
            folder,
            position_scale=fitted_scale(args, source, call),
            backend=args.backend,
            verify=not args.no_verify,
            loading=loading(args).to_dict(),
            on_stage=on_stage(pipe),
        )
    except ImpossibleBudget as error:
        print(f"NOT POSSIBLE: {error}")
        return 1
    _print(tuned)
    write_json_result(args, tuned.found)
    return 0


def _call(args) -> dict:
    """Arguments of the pipeline's call that were given; ``--size`` is height and width."""
    given = {name: getattr(args, name) for name in CALL}
    if args.size is None:
        return given
    if len(args.size) != 1 or args.height or args.width:
        raise ValueError("--size is one size, in the place of --height and --width")
    return given | dict(zip(("height", "width"), args.size[0]))


def _task(args, budget, source):
    """What to tune for: the user's prompts, or those of the sample model."""
    from dittfast.pipelines.runs.prompts import make_items, read_prompts
    from dittfast.pipelines.tune.candidates import tunable
    from dittfast.pipelines.tune.task import Task

    if args.prompts is None:
        own = list(source.settings.get("prompts", []))[:6]
        if len(own) < 2:
            raise ValueError(f"{source.name} brings no prompts; add --prompts FILE, one a line")
        prompts, held_out = own[::3], [x for number, x in enumerate(own) if number % 3]
    else:
        prompts, held_out = read_prompts(args.prompts), []
    if args.held_out is not None:
        held_out = read_prompts(args.held_out)
    elif args.prompts is not None:
        prompts, held_out = prompts[::2], prompts[1::2]
        if not held_out:
            raise ValueError(
                f"{args.prompts} holds one prompt, and none is left to judge by; write more, or "
                "add --held-out FILE"
            )
    items = make_items([*prompts, *held_out], None, args.seed)
    count = len(prompts)
    methods = tunable() if args.methods is None else args.methods
    how = methods, args.bands, args.rounds, args.gpu
    return Task(budget, items[:count], items[count:], *how)


def _print(tuned) -> None:
    from dittfast.pipelines.runs.run import duration

    found = tuned.found
    best = found["best"]
    for place in found["places"]:
        first, end = found["bands"][place["band"]]
        print(f"{place['layer']}, steps {first}-{end - 1}: {'; '.join(place['runs'])}")
    for which, words in (("predicted", "predicted"), ("tuned", "prompts tuned with"),
                         ("held_out", "held-out prompts")):  # fmt: skip
        values = ", ".join(f"{name} {value:.3g}" for name, value in best[which].items())
        print(f"{words}: {values}")
    if best["replan_every"]:
        lasting = ", ".join(f"{n} steps ({name})" for name, n in best["replan_every"].items())
        print(f"plans last {lasting}, which saves {found['planning']['saved']:.3g} s a run")
    if found["gpu"] is not None:
        print(f"the speed is computed for {found['gpu']} from published rates, not measured")
    if best["held_out"]["speedup"] <= 1:
        print("it is NOT FASTER than dense attention here: sparsity does not pay at this size")
    print(f"wrote {tuned.preset} and {tuned.report}, in {duration(tuned.seconds)} in all")
