"""Tuned presets beside every uniform setting of every method: one table, one plot.

    python samples/tune_front.py --model sample-flux --size 512 --position-scale 0.5 --steps 4 \\
        --budgets "speedup>=1.5" "speedup>=1.8" -o work/front --save docs/tune-flux

Tunes for each budget, then draws every setting that the tuner tried in all layers and all steps of
the first held-out prompt; those that no other clearly beats also with a dense first step, and with
plans that last. What is near a preset's speed and still not beaten draws all held-out prompts, and
takes turns with dense attention and the presets. Goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from dittfast.config import resolve
from dittfast.disk.records import digest_of
from dittfast.environment import describe_device, versions
from dittfast.files import atomic_path, write_json
from dittfast.measure.metrics import relative_distance
from dittfast.measure.plots import COLORS, MARKERS
from dittfast.methods.base import Method
from dittfast.mixture import Mixture, Rule
from dittfast.pipelines.measure.fidelity import draw_missing
from dittfast.pipelines.runs import sources
from dittfast.pipelines.runs.call import call_arguments, call_record
from dittfast.pipelines.runs.compare import draw, quality
from dittfast.pipelines.runs.first_frame import with_first_frame
from dittfast.pipelines.runs.positions import positions_scaled
from dittfast.pipelines.runs.prompts import Item, make_items, read_prompts
from dittfast.pipelines.tune.budget import Budget
from dittfast.pipelines.tune.candidates import tunable
from dittfast.pipelines.tune.measuring import Measuring
from dittfast.pipelines.tune.prediction import Prediction
from dittfast.pipelines.tune.preset import ALWAYS
from dittfast.pipelines.tune.solver import Choice, hull
from dittfast.pipelines.tune.task import Task
from dittfast.pipelines.tune.tune import tune
from dittfast.schedule import Schedule

# How a setting's speed is told: by whole calls in turns, with attention in turns call by call, and
# as dense attention's work over its own.
WAYS = ("timed", "by_call", "by_work")
# Numbers and seeds of fresh prompts begin here, behind those of all others.
_FRESH = 1000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="sample-flux")
    parser.add_argument("--size", type=int, help="height and width (default: the model's)")
    parser.add_argument("--position-scale", type=float, default=1.0)
    parser.add_argument("--frames", type=int, help="of a video")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--true-cfg-scale", type=float)
    parser.add_argument("--prompts", type=int, nargs=2, default=(2, 3), help="tuned with, held out")
    parser.add_argument(
        "--alternate", action="store_true", help="hold every second prompt out, not the last ones"
    )
    parser.add_argument("--bands", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--timings", type=int, default=5, help="rounds of the front's timing")
    parser.add_argument("--budgets", nargs="+", default=["speedup>=1.5", "speedup>=2"])
    parser.add_argument("--methods", nargs="+", default=tunable())
    parser.add_argument(
        "--also", type=int, nargs="*", default=[], help="sizes at which the first preset is tried"
    )
    parser.add_argument(
        "--fresh", type=Path, metavar="FILE", help="prompts that neither tuned nor chose anything"
    )
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--save", type=Path, help="write PREFIX.json and PREFIX.png")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    source = sources.find(args.model)
    pipe = sources.load(source, "cpu", torch.float32)
    pipe.set_progress_bar_config(disable=True)
    given = {"height": args.size, "width": args.size, "num_inference_steps": args.steps}
    given |= {"true_cfg_scale": args.true_cfg_scale, "num_frames": args.frames}
    call = call_arguments(pipe, "any", source.settings, **given)
    call = with_first_frame(pipe, call, source.settings)
    tuned_with, held = args.prompts
    items = make_items(source.settings["prompts"][: tuned_with + held])
    own, others = items[:tuned_with], items[tuned_with:]
    if args.alternate:
        own, others = items[::2], items[1::2]
    loading = {"position_scale": args.position_scale}
    rows = []
    for words in args.budgets:
        task = Task(
            Budget.parse(words.split(",")), own, others, tuple(args.methods), args.bands,
            args.rounds,
        )  # fmt: skip
        path = args.output / f"tuned-{plain(words)}.json"
        if not path.exists():
            done = tune(
                pipe, source, call, task, args.output, position_scale=args.position_scale,
                on_stage=lambda name: print(name, flush=True),
            )  # fmt: skip
            shutil.copy(done.preset, args.output / f"preset-{plain(words)}.yaml")
            write_json(path, {"budget": words, "seconds": done.seconds, **done.found})
        rows.append(json.loads(path.read_text(encoding="utf-8")))
        print(words, rows[-1]["best"]["held_out"], flush=True)
    sizes = []
    for size in args.also:
        scale = args.position_scale * args.size / size
        resized = call | {"height": size, "width": size}
        preset = args.output / f"preset-{plain(args.budgets[0])}.yaml"
        path = args.output / f"also-{size}.json"
        if not path.exists():
            write_json(path, elsewhere(pipe, resized, preset, others, scale))
        sizes.append(json.loads(path.read_text(encoding="utf-8")))
    with positions_scaled(pipe, args.position_scale):
        measured = Measuring(pipe, source, call, task, args.output, loading=loading)
        prediction = measured.prediction()
        layout, methods = measured.layout, prediction.methods
        speeds = [row["best"]["held_out"]["speedup"] for row in rows]
        uniform = opponents(measured, prediction, speeds)
        arms = {"dense": measured.dense}
        for row in uniform:
            if row["pictures"] == held:
                arms[row["label"]] = uniform_arm(measured, row.pop("opponent"))
            row.pop("opponent", None)
        for row, words in zip(rows, args.budgets):
            preset = resolve(str(args.output / f"preset-{plain(words)}.yaml"))
            arms[row["best"]["label"]] = measured.variant(row["best"]["label"], *preset)
            for one in row["rounds"]:
                known = row["best"]["label"].startswith(one["label"])  # but for how plans last
                if len(one["rules"]) > 1 and one["held_out"] and not known:
                    arms[one["label"]] = measured.variant(one["label"], resolve(one["rules"])[0])
        by_call = {n: measured.speedup(arm) for n, arm in arms.items() if n != "dense"}
        speeds = timed_in_turns(measured, arms, args.timings)
        judged = [] if args.fresh is None else fresh_items(args.fresh)
        fresh = judged_on(measured, arms, judged) if judged else {}
        found = [one for row in rows for one in (row["best"], *row["rounds"])]
        for one in [*uniform, *found]:
            if one["label"] in speeds:
                one |= {"timed": speeds[one["label"]], "by_call": by_call[one["label"]]}
                if fresh:
                    one["fresh"] = fresh[one["label"]]
                one["by_work"] = 1 / (one["work"] if "work" in one else one["predicted"]["work"])
    unchanged = [row for row in uniform if not is_changed(row)]
    facts = {
        "model": args.model,
        "tokens": layout.num_tokens,
        "call": call_record(call) | {"position_scale": args.position_scale},
        "prompts": {"tuned_with": len(own), "held_out": held, "fresh": len(judged)},
        "bands": args.bands,
        "device": describe_device("cpu"),
        "versions": versions(),
        "settings": len(methods),
        "timings": args.timings,
        "tuned": [
            row
            | {f"beside_{way}": against(row["best"], uniform, way) for way in WAYS}
            | {f"beside_plain_{way}": against(row["best"], unchanged, way) for way in WAYS}
            for row in rows
        ],
        "uniform": uniform,
        "other_sizes": sizes,
    }
    write_json(args.output / "front.json", facts)
    if args.save is not None:
        write_json(args.save.with_suffix(".json"), facts)
        with atomic_path(args.save.with_suffix(".png")) as temporary:
            plot(facts).savefig(temporary, dpi=130)


class Opponent(NamedTuple):
    """A setting in all layers, and in all steps but dense ones that it begins with.

    Attributes:
        every: steps that a plan made from q and k lasts.
    """

    method: Method
    first: int = 0
    every: int = 1

    @property
    def schedule(self) -> Schedule:
        every = None if self.every == 1 else self.every
        return replace(ALWAYS, dense_first_steps=self.first, replan_every=every)

    @property
    def words(self) -> str:
        more = (
            ["", "first step dense"][self.first],
            ["", f"plans last {self.every} steps"][self.every > 1],
        )
        return ", ".join([self.method.words(), *filter(None, more)])

    @property
    def label(self) -> str:
        label = f"all-{self.method.name}-{digest_of(self.method.to_dict())[:8]}"
        return label + "-first" * self.first + (f"-every-{self.every}" if self.every > 1 else "")


def opponents(measured: Measuring, prediction: Prediction, speeds: list[float]) -> list[dict]:
    """Every setting by one picture; those that may be near a preset's speed by all of them.

    Settings that no other clearly beats are also tried with a dense first step, and with plans
    that last. Which to try is told by speeds from the recorded calls.
    """
    few, every = measured.task.held_out[:1], measured.task.held_out

    def drawn(one: Opponent, items) -> dict:
        return uniform_row(measured, one, items, predicted(prediction, one, measured.total_steps))

    rows = [drawn(Opponent(method), few) for method in prediction.methods]
    for row in unbeaten(rows, 0.9 * min(speeds), 10.0):
        method = row["opponent"].method
        rows.append(drawn(Opponent(method, first=1), few))
        if not method.static:
            rows.append(drawn(Opponent(method, every=measured.total_steps), few))
    low, high = 0.92 * min(speeds), max(speeds) / 0.92
    plain = [row for row in rows if not is_changed(row)]
    near = [*unbeaten(rows, low, high), *unbeaten(plain, low, high)]
    return [drawn(x["opponent"], every) if x in near else x for x in rows]


def predicted(prediction: Prediction, one: Opponent, total: int) -> dict[str, float]:
    """The speed of a setting, by the recorded seconds of its calls, and its work."""
    alike = prediction.alike(prediction.methods.index(one.method))
    attention = prediction.call_seconds(alike) - prediction.rest
    if one.every > 1:
        attention -= sum(prediction.planning(alike).values()) * (1 - 1 / total)
    dense, share = prediction.run_seconds - prediction.rest, one.first / total
    seconds = prediction.rest + share * dense + (1 - share) * attention
    work = share + (1 - share) * prediction.work(alike)
    return {"predicted": prediction.run_seconds / seconds, "work": work}


def elsewhere(pipe, call: dict, preset: Path, items, scale: float) -> dict:
    """A preset in runs of another size: its pictures against dense attention's, and its speed."""
    rows = []
    for item in items:
        own = call | {"prompt": item.prompt}
        dense, _ = draw(pipe, own, item.seed, position_scale=scale)
        method, schedule = resolve(str(preset))
        tuned, _ = draw(pipe, own, item.seed, method, schedule, position_scale=scale)
        measured = quality(dense, tuned) | {"speedup": dense.timing.busy / tuned.timing.busy}
        rows.append(measured | {"distance": relative_distance(dense.latents, tuned.latents)})
    means = {m: statistics.fmean(row[m] for row in rows) for m in ("psnr_db", "distance")}
    return (
        {"height": call["height"], "pictures": len(rows), "position_scale": scale}
        | means
        | {"speedup": statistics.median(row["speedup"] for row in rows)}
    )


def plain(words: str) -> str:
    """A budget as a part of a file's name."""
    return words.translate(str.maketrans("", "", ">=<"))


def timed_in_turns(measured: Measuring, arms: dict, rounds: int) -> dict[str, float]:
    """Dense seconds over those of each arm, medians over rounds in which all took turns.

    On a busy machine a tenth is noise from one minute to the next, and less within a round.
    """
    item, every = measured.task.held_out[0], []
    for number in range(rounds):
        path = measured.folder / f"timed-{digest_of(sorted(arms))[:8]}-{number}.json"
        if not path.exists():
            names = list(arms)[:: 1 if number % 2 == 0 else -1]
            call = measured.call | {"prompt": item.prompt}
            write_json(path, {n: arms[n].draw(call, item.seed)[0].timing.busy for n in names})
        every.append(json.loads(path.read_text(encoding="utf-8")))
    return {n: statistics.median(x["dense"] / x[n] for x in every) for n in arms if n != "dense"}


def fresh_items(prompts: Path) -> list[Item]:
    """The prompts of a file, with numbers and seeds that no others have."""
    items = make_items(read_prompts(prompts), seed=_FRESH)
    return [replace(item, index=_FRESH + item.index) for item in items]


def judged_on(measured: Measuring, arms: dict, items: list[Item]) -> dict[str, dict]:
    """Quality of all arms but dense attention."""
    draw_missing(list(arms.values()), measured.call, items)
    return {n: measured.judge(arm, items) for n, arm in arms.items() if n != "dense"}


def unbeaten(rows: list[dict], low: float, high: float) -> list[dict]:
    """Those of such a speed that no other clearly beats."""

    def beats(x, y):
        return x["psnr"] > y["psnr"] + 0.3 and x["predicted"] >= 0.99 * y["predicted"]

    near = [y for y in rows if low <= y["predicted"] <= high]
    return [y for y in near if not any(beats(x, y) for x in rows)]


def against(best: dict, uniform: list[dict], way: str) -> dict:
    """A tuned preset beside uniform settings at its speed, and at its quality.

    At its speed: on the convex hull of the settings, in seconds and decibels, as if there were
    settings between them. The fastest of all is not extended.
    """
    found, timed = best["held_out"], [x for x in uniform if way in x]
    ends = [hull([Choice(1 / x[way], sign * x[m]) for x in timed])
            for m, sign in (("psnr", -1), ("distance", 1))]  # fmt: skip
    seconds, decibels = [x.cost for x in ends[0][::-1]], [-x.error for x in ends[0][::-1]]
    slow, distances = [x.cost for x in ends[1][::-1]], [x.error for x in ends[1][::-1]]
    here = 1 / best[way]
    alike = between(here, seconds, decibels), between(here, slow, distances)
    return {
        "uniform_psnr": alike[0],
        "uniform_distance": alike[1],
        "decibels_better": None if alike[0] is None else found["psnr"] - alike[0],
        "distance_ratio": None if alike[1] is None else found["distance"] / alike[1],
        "times_faster": times(between(found["psnr"], decibels, seconds), here),
    }


def times(uniform: float | None, own: float) -> float | None:
    return None if uniform is None else uniform / own


def between(x: float, xs: list[float], ys: list[float]) -> float | None:
    """On the lines between points in rising order; None outside of them."""
    for (a, b), (c, d) in zip(zip(xs, ys), zip(xs[1:], ys[1:])):
        if a <= x <= c:
            return b + (d - b) * (x - a) / (c - a)
    return None


def uniform_arm(measured: Measuring, one: Opponent):
    return measured.variant(one.label, Mixture((Rule(one.method),)), one.schedule)


def uniform_row(measured: Measuring, one: Opponent, items, cost: dict[str, float]) -> dict:
    """A setting in all layers, on held-out prompts, with what :func:`predicted` says of it."""
    arm = uniform_arm(measured, one)
    print(one.words, flush=True)
    draw_missing([arm], measured.call, items)
    records = [arm.drawings.record(item) for item in items]
    return {
        "opponent": one,
        "label": one.label,
        "method": one.method.to_dict(),
        "dense_first_steps": one.first,
        "replan_every": one.every,
        "words": one.words,
        "pictures": len(items),
        **cost,
        "density": records[0]["attention"]["density"],
        **measured.judge(arm, items),
    }


def plot(data: dict, way: str = "by_call"):
    """Speed and PSNR of all settings in all layers, and of the tuned presets."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 5), layout="constrained")
    axes, uniform = figure.add_subplot(), data["uniform"]
    for number, name in enumerate(dict.fromkeys(x["method"]["name"] for x in uniform)):
        color, again = number % len(COLORS), number // len(COLORS)
        look = {"color": COLORS[color], "marker": MARKERS[(color + again) % len(MARKERS)]}
        look["ls"] = ""
        own = [x for x in uniform if x["method"]["name"] == name]
        few = [(x["predicted"], x["psnr"]) for x in own if way not in x]
        if few:
            axes.plot(*zip(*few), ms=4, alpha=0.3, **look)
        for more, fill in ((False, None), (True, "white")):
            timed = [(x[way], x["psnr"]) for x in own if way in x and is_changed(x) == more]
            if timed:
                axes.plot(*zip(*timed), ms=7, mfc=fill, **look)
        axes.plot([], [], ms=6, label=name, **look)
    ends = hull([Choice(1 / x[way], -x["psnr"]) for x in uniform if way in x])
    line = [(1 / (a.cost + t * (b.cost - a.cost)), -a.error - t * (b.error - a.error))
            for a, b in pairwise(ends) for t in (i / 20 for i in range(21))]  # fmt: skip
    axes.plot(*zip(*line), color="grey", lw=1, label="best of single settings")
    best = sorted((x["best"][way], x["best"]["held_out"]["psnr"]) for x in data["tuned"])
    axes.plot(*zip(*best), color="black", marker="*", ms=15, lw=1, label="tuned presets")
    grey = {"ls": "", "marker": "o", "color": "grey"}
    changed = "first step dense,\nor plans that last"
    axes.plot([], [], mfc="white", label=changed, **grey)
    axes.plot([], [], ms=4, alpha=0.4, label="one picture; speed predicted", **grey)
    how = {"timed": "whole calls in turns", "by_call": "attention in turns, call by call"}[way]
    axes.set_xlabel(f"dense seconds / seconds of processor time, {how}")
    axes.set_ylabel("PSNR to dense, dB, held-out prompts")
    axes.set_title(f"{data['model']}, {data['tokens']:,} tokens: one setting everywhere, and tuned")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="upper right")
    return figure


def is_changed(row: dict) -> bool:
    """Whether a setting has more than its method."""
    return row["dense_first_steps"] > 0 or row["replan_every"] > 1


if __name__ == "__main__":
    main()
