"""``dittfast hunt``: search the attention heads that guide a model best."""

from __future__ import annotations

import argparse

from dittfast.files import check_folder

from .adapter import add_adapter_argument, chosen_adapter
from .options import (
    CALL,
    add_call_arguments,
    add_guidance_arguments,
    add_method_arguments,
    add_model_argument,
    add_pipeline_arguments,
    add_place_arguments,
    check_loading_options,
    guidance_options,
    head_list,
    load_pipeline,
    method_and_schedule,
    parse_options,
    preset_of,
)
from .values import numbers, whole

EXAMPLE = """\
examples:
  dittfast hunt --objective colorfulness --true-cfg-scale 1 --steps 8 -o hunt
  dittfast hunt --objective mine.py:score --trust-code --model FOLDER \\
      --prompts prompts.txt -o hunt
  dittfast generate "a panda on a green background" --guide hunt/heads.json -o panda.png
"""
SHOWN = 8  # candidates in a round's table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``dittfast hunt``."""
    parser.epilog = EXAMPLE
    add_model_argument(parser)
    parser.add_argument(
        "-o",
        "--output",
        metavar="FOLDER",
        help="where heads.json, the pictures and the state go; the search goes on from a state "
        "that is there",
    )
    what = parser.add_argument_group("objective")
    what.add_argument(
        "--objective",
        metavar="NAME",
        help="saturation, colorfulness, contrast, sharpness, background, class_probability, clip, "
        "pickscore; or your own (images, prompts) -> scores as module:function or file.py:function",
    )
    what.add_argument(
        "--objective-set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the objective, such as model=classifier.pt2; repeatable",
    )
    what.add_argument(
        "--trust-code",
        action="store_true",
        help="run the code that an objective of your own, or a classifier's file, brings",
    )
    what.add_argument(
        "--prompts",
        metavar="FILE",
        help="one prompt a line; a sample model has its own: the first half to search with, the "
        "second held out",
    )
    what.add_argument(
        "--holdout", metavar="FILE", help="prompts that only judge what was found, one a line"
    )
    what.add_argument("--seeds", type=numbers, default="0", metavar="N,...", help="(default: 0)")
    what.add_argument(
        "--holdout-seeds", type=numbers, metavar="N,...", help="(default: as --seeds)"
    )
    _add_search(parser)
    add_guidance_arguments(parser, heads=False)
    add_method_arguments(parser, "; dense attention without it", for_model=True)
    add_adapter_argument(parser)
    add_call_arguments(parser)
    add_pipeline_arguments(parser)
    add_place_arguments(parser)


def _add_search(parser: argparse.ArgumentParser) -> None:
    how = parser.add_argument_group("search")
    how.add_argument("--rounds", type=whole(), default=3, metavar="R", help="at most (default: 3)")
    how.add_argument(
        "--topk", type=whole(), default=1, metavar="K", help="heads added in a round (default: 1)"
    )
    which = how.add_mutually_exclusive_group()
    which.add_argument(
        "--layers", type=numbers, metavar="N,...", help="search these layers only, such as 2-5"
    )
    which.add_argument("--heads", metavar="L.H,...", help="search these heads only")
    how.add_argument(
        "--screen", type=whole(), metavar="N", help="a first look at every head by N pictures"
    )
    how.add_argument("--keep", type=whole(), metavar="N", help="heads that pass the first look")
    how.add_argument(
        "--all-rounds", action="store_true", help="go on after a round that gains nothing"
    )
    how.add_argument(
        "--compare-layers", action="store_true", help="judge every whole layer as well"
    )
    how.add_argument(
        "--batch-size", type=whole(), default=4, metavar="N", help="pictures at once (default: 4)"
    )
    how.add_argument(
        "--no-verify",
        action="store_true",
        help="take scores in the folder even where their SHA-256 differs",
    )


def run(args) -> int:
    """Check all that can be checked, load, search, and report."""
    from dittfast.pipelines.headhunter.objectives import OBJECTIVES, find_objective
    from dittfast.pipelines.runs import sources

    if args.output is None:
        raise ValueError("-o FOLDER is missing; say where the search may write")
    if args.objective is None:
        raise ValueError(
            f"--objective is missing; built in: {', '.join(OBJECTIVES)}; or module:function"
        )
    folder = check_folder(args.output)
    source = sources.find(args.model)
    adapter = chosen_adapter(args)
    prompts, holdout = _prompts(args, source)
    options = parse_options(args.objective_set)
    if args.objective == "background" and "backgrounds" in source.settings:
        from dittfast.samples.captions import BACKGROUNDS

        options.setdefault("colors", BACKGROUNDS)
    objective = find_objective(args.objective, args.trust_code, **options)
    method, schedule = adapter, None
    if adapter is None:
        method, schedule = method_and_schedule(args, source)
    search = _search(args, holdout)
    given = {name: getattr(args, name) for name in CALL}

    from dittfast.methods.head_guidance import HeadGuidance
    from dittfast.pipelines.description import describe
    from dittfast.pipelines.headhunter.hunt import check_pool, check_samples, hunt
    from dittfast.pipelines.headhunter.search import Policy
    from dittfast.pipelines.runs.call import call_arguments, check_ranges
    from dittfast.pipelines.runs.compare import installed
    from dittfast.pipelines.runs.outline import check_run, outline

    check_ranges(prompt=prompts[0], **given)
    check_loading_options(args, source)
    check_samples(prompts, args.seeds, holdout, args.holdout_seeds)
    if args.holdout_seeds and not holdout:
        raise ValueError("--holdout-seeds has no held-out prompts to draw; add --holdout FILE")
    HeadGuidance(((0, 0),), **guidance_options(args))  # checks them
    policy = Policy(*(search[name] for name in ("rounds", "topk", "screen", "keep")))
    empty = outline(source)
    if empty is not None:
        check_run(empty, source, prompts[0], given, None if adapter else method, schedule)
        check_pool(empty, policy, search["layers"], search["heads"])
    pipe = load_pipeline(args, source, [] if args.method is None else [args.method])
    call = call_arguments(pipe, prompts[0], source.settings, **given)
    call.pop("prompt")
    with installed(pipe, method, schedule, args.backend):
        result = hunt(
            pipe, objective, prompts, call=call, folder=folder, on_round=_print_round, **search
        )
        idle = None if method is None else describe(pipe).did_not_run
    _print_result(result)
    if preset_of(args) is not None:
        print(f"preset {preset_of(args)}")
    if idle is not None:
        print(f"{method.name} DID NOT RUN, the heads were found with dense attention: {idle}")
    print(f"wrote {folder}/heads.json, curve.png and sheets of pictures")
    return 0


def _search(args, holdout: list[str]) -> dict:
    """What the search takes, from the options."""
    return dict(
        seeds=args.seeds,
        rounds=args.rounds,
        topk=args.topk,
        layers=args.layers,
        heads=None if args.heads is None else head_list(args.heads),
        screen=args.screen,
        keep=args.keep,
        min_gain=None if args.all_rounds else 0.0,
        batch_size=args.batch_size,
        holdout=holdout,
        holdout_seeds=args.holdout_seeds,
        compare_layers=args.compare_layers,
        verify=not args.no_verify,
        **guidance_options(args),
    )


def _prompts(args, source) -> tuple[list[str], list[str]]:
    """The prompts to search with, and those held out."""
    from dittfast.pipelines.runs.prompts import read_prompts

    own = source.settings.get("prompts", [])
    half = len(own) // 2
    if args.prompts is None and not own:
        raise ValueError(f"{source.name} brings no prompts; add --prompts FILE, one prompt a line")
    prompts = own[:half] if args.prompts is None else read_prompts(args.prompts)
    if args.holdout is not None:
        return prompts, read_prompts(args.holdout)
    return prompts, own[half:] if args.prompts is None else []


def _print_round(round_) -> None:
    from dittfast.pipelines.headhunter.search import name_of

    print(f"\nround {round_.number}")
    print(f"{'head':<8}{'mean':>12}{'pictures':>10}")
    for candidate in round_.candidates[:SHOWN]:
        mark = "  chosen" if candidate.head in round_.added else ""
        name = name_of([candidate.head])
        print(f"{name:<8}{candidate.mean:>12.6g}{candidate.samples:>10}{mark}")
    if len(round_.candidates) > SHOWN:
        print(f"... and {len(round_.candidates) - SHOWN} more")
    note = "" if round_.best_so_far else ", no better than before"
    print(f"together {name_of(round_.heads)}: {round_.mean:.6g}{note}", flush=True)


def _print_result(result) -> None:
    from statistics import fmean

    from dittfast.pipelines.headhunter.report import paired
    from dittfast.pipelines.headhunter.search import name_of

    held = bool(result.unguided.holdout)
    print(f"\n{'':<14}{'searched':>12}" + (f"{'held out':>12}" if held else "") + "  heads")
    for row in (result.unguided, *result.layers, *result.found):
        means = f"{fmean(row.search):>12.6g}" + (f"{fmean(row.holdout):>12.6g}" if held else "")
        mark = "  *" if row is result.best else ""
        print(f"{row.name:<14}{means}  {name_of(row.heads)}{mark}")
    for rival in (result.unguided, result.best_layer):
        if held and rival is not None and rival is not result.best:
            apart = paired(result.best, rival)
            error = apart["standard_error"]
            print(
                f"{result.best.name} minus {rival.name}, held out: {apart['mean']:+.4g}"
                + ("" if error is None else f" (standard error {error:.2g})")
                + f", higher in {apart['wins']:.0%} of {apart['pictures']} pictures"
            )
