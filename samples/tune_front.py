"""Tuned presets beside every uniform setting of every method: one table, one plot.

    python samples/tune_front.py --model sample-flux --size 512 --position-scale fit --steps 6 \\
        --speedups 1.5,2 -o work/front --save docs/tune-flux

Tunes for each speed, then draws every setting that the tuner tried in all layers and all steps of
the same held-out prompts. Goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path

import torch

from dittfast.environment import versions
from dittfast.files import write_json
from dittfast.mixture import Mixture, Rule
from dittfast.pipelines.measure.fidelity import draw_missing
from dittfast.pipelines.runs import sources
from dittfast.pipelines.runs.call import call_arguments
from dittfast.pipelines.runs.first_frame import with_first_frame
from dittfast.pipelines.runs.positions import positions_scaled
from dittfast.pipelines.runs.prompts import make_items
from dittfast.pipelines.tune.budget import Budget
from dittfast.pipelines.tune.candidates import candidates, tunable
from dittfast.pipelines.tune.tune import Task, Tuner, tune, uniform_label


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="sample-flux")
    parser.add_argument("--size", type=int, help="height and width (default: the model's)")
    parser.add_argument("--position-scale", type=float, default=1.0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--true-cfg-scale", type=float)
    parser.add_argument("--prompts", type=int, nargs=2, default=(2, 3), help="tuned with, held out")
    parser.add_argument("--bands", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--budgets", nargs="+", default=["speedup>=1.5", "speedup>=2"])
    parser.add_argument("--methods", nargs="+", default=tunable())
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--save", type=Path, help="write the numbers as PREFIX.json")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    source = sources.find(args.model)
    pipe = sources.load(source, "cpu", torch.float32)
    pipe.set_progress_bar_config(disable=True)
    given = {"height": args.size, "width": args.size, "num_inference_steps": args.steps}
    given["true_cfg_scale"] = args.true_cfg_scale
    call = call_arguments(pipe, "any", source.settings, **given)
    call = with_first_frame(pipe, call, source.settings)
    tuned_with, held = args.prompts
    items = make_items(source.settings["prompts"][: tuned_with + held])
    loading = {"position_scale": args.position_scale}
    rows = []
    for words in args.budgets:
        budget = Budget.parse(words.split(","))
        task = Task(
            budget, items[:tuned_with], items[tuned_with:], tuple(args.methods), args.bands,
            args.rounds,
        )  # fmt: skip
        done = tune(
            pipe, source, call, task, args.output, position_scale=args.position_scale,
            on_stage=lambda name: print(name, flush=True),
        )  # fmt: skip
        name = words.translate(str.maketrans("", "", ">=<"))
        shutil.copy(done.preset, args.output / f"preset-{name}.yaml")
        rows.append({"budget": words, **done.found})
        print(words, done.found["best"]["held_out"], flush=True)
        save(args, {"tuned": rows})
    with positions_scaled(pipe, args.position_scale):
        tuner = Tuner(pipe, source, call, task, args.output, loading=loading)
        uniform = [row for method in candidates(tuner.read_layout(), args.methods)
                   for row in uniform_row(tuner, method)]  # fmt: skip
    save(args, {"tuned": rows, "uniform": uniform, "versions": versions(), "call": given})


def uniform_row(tuner: Tuner, method):
    """One method in all layers and steps, on the held-out prompts."""
    arm = tuner.variant(uniform_label(method), Mixture((Rule(method),)))
    print(method.words(), flush=True)
    draw_missing([arm], tuner.call, tuner.task.held_out)
    records = [arm.drawings.record(item) for item in tuner.task.held_out]
    dense = [tuner.dense.drawings.record(item)["busy"] for item in tuner.task.held_out]
    yield {
        "method": method.to_dict(),
        "speedup": statistics.median(d / r["busy"] for d, r in zip(dense, records)),
        "seconds": [r["busy"] for r in records],
        "dense_seconds": dense,
        "density": records[0]["attention"]["density"],
        **tuner.judge(arm, tuner.task.held_out),
    }


def save(args, data: dict) -> None:
    write_json(args.output / "front.json", data)
    if args.save is not None:
        write_json(args.save.with_suffix(".json"), data)


if __name__ == "__main__":
    main()
