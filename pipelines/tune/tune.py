"""Tuning: record, predict, solve, draw, correct, until held-out prompts hold the budget."""

from __future__ import annotations

import importlib.util
import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from dittfast.disk.locks import locked
from dittfast.disk.records import digest_of, write_record
from dittfast.files import write_text
from dittfast.layout import Layout
from dittfast.measure.metrics import image_tensor, psnr, relative_distance
from dittfast.measure.report import html_report, read_results
from dittfast.measure.timing import clock_for, in_turns
from dittfast.methods.base import Method
from dittfast.mixture import Mixture, Rule
from dittfast.schedule import Schedule

from ..adapter import enable
from ..measure.fidelity import Arm, base_settings, draw_missing, evaluate_fidelity
from ..measure.latency import attention_seconds
from ..measure.method_check import layer_names
from ..measure.variants import Variant
from ..models import execution_device, transformers_of
from ..runs.positions import positions_scaled
from ..runs.prompts import Item
from ..runs.run import Run, duration, run
from ..runs.sources import Source
from .book import Book
from .budget import QUALITIES, Budget
from .candidates import candidates, check_methods, tunable
from .on_gpu import computed, cost_of, gpu_with_rates, run_seconds
from .prediction import Assigned, Prediction, method_of
from .preset import ALWAYS, mixture_of, preset_data, write_preset
from .recording import FORM, attention_in_turns, bands, check_record, middle, record
from .report import summary_tables
from .seconds import steadied
from .sensitivity import FORM as ANSWERS
from .sensitivity import answers, followed, from_text, to_text

logger = logging.getLogger(__name__)

# dB that are aimed above a bound of quality, for prompts differ; and how near to its bound a
# quality leaves nothing worth another round.
_ABOVE, _NEAR = 0.5, 1.0
# A speed is aimed this much above its bound, for seconds differ, too.
_FASTER = 1.03
# A preset that is so much faster than asked leaves some quality to be had.
_TOO_FAST = 1.07
# What a method's plans may last, and what of a run its planning must take to be worth a try.
_LASTING, _WORTH_LASTING = (4, 2), 0.005
# A speed budget alone leaves quality free; plans may last if that loses no more than this, in dB.
_LOST = 0.1
# Pairs of whole calls that a finished preset is timed with.
_PAIRS = 3
# What an attention's timing in turns holds.
_SECONDS = {"dense": float, "own": float}
# dB that stand for pictures without a difference; 8 bits cannot show as many.
_EQUAL = 120.0


class ImpossibleBudget(ValueError):
    """No preset holds the budget; the message says which is nearest."""


@dataclass(frozen=True)
class Task:
    """What to tune for.

    Args:
        budget: what the held-out prompts have to hold.
        items: prompts and seeds that are recorded and drawn.
        held_out: those that judge alone, numbered after the others.
        methods: names of the methods that may be used.
        bands: of steps, each with a choice of its own.
        rounds: of solving and drawing, at most.
        gpu: whose seconds count, computed from published rates; None for this device's own.

    Raises:
        ValueError: no prompts, one that is tuned with and held out, or a count below 1.
    """

    budget: Budget
    items: tuple[Item, ...]
    held_out: tuple[Item, ...]
    methods: tuple[str, ...] = field(default_factory=lambda: tuple(tunable()))
    bands: int = 4
    rounds: int = 4
    gpu: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "methods", tuple(check_methods(self.methods)))
        for name, items in (("to tune with", self.items), ("held out", self.held_out)):
            if not items:
                raise ValueError(f"there are no prompts {name}; give at least one")
        if self.gpu is not None:
            object.__setattr__(self, "gpu", gpu_with_rates(self.gpu).name)
        both = {i.prompt for i in self.items} & {i.prompt for i in self.held_out}
        if both:
            raise ValueError(f"held-out prompts must be new; {min(both)!r} is tuned with, too")
        for name in ("bands", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Drawn:
    """A preset that was drawn, with what was predicted and measured of it.

    Attributes:
        tuned, held_out: measures, means over prompts; ``held_out`` has ``speedup``, too, where it
            was timed. Empty where the preset was not drawn with these prompts.
    """

    label: str
    mixture: Mixture
    assigned: Assigned
    schedule: Schedule
    predicted: dict
    tuned: dict
    held_out: dict

    def to_dict(self) -> dict:
        words = {"label": self.label, "rules": self.mixture.to_dict()["rules"]}
        measured = {"predicted": self.predicted, "tuned": self.tuned, "held_out": self.held_out}
        return words | {"replan_every": dict(self.schedule.replan_every or ())} | measured


@dataclass(frozen=True)
class Tuned:
    """A finished tuning: the preset's file and data, and all that was found on the way.

    Attributes:
        seconds: on the wall, of all tunings in this folder up to its end.
    """

    preset: Path
    data: dict
    found: dict
    report: Path
    seconds: float


class _Progress:
    """Says what comes next and how long the rest will take, in units of dense runs."""

    def __init__(self, total: float, on_stage: Callable[[str], None]):
        self.total, self.on_stage = total, on_stage
        self.begun, self.done, self.running = time.perf_counter(), 0.0, 0.0

    def begin(self, name: str, work: float) -> None:
        self.done, self.running = self.done + self.running, work
        left = ""
        if self.done:
            rest = max(self.total - self.done, work)
            left = f", about {duration(rest * (time.perf_counter() - self.begun) / self.done)} left"
        self.on_stage(name + left)

    def skip(self, work: float) -> None:
        """What an earlier, killed tuning has done already."""
        self.total -= work


class Tuner:
    """One tuning: its pipeline, its folder, and what is known so far."""

    def __init__(
        self,
        pipe,
        source: Source,
        call: dict,
        task: Task,
        folder: Path,
        kernel: str = "auto",
        backend: str = "auto",
        verify: bool = True,
        loading: dict | None = None,
        on_stage: Callable[[str], None] = lambda stage: None,
    ):
        self.pipe, self.source, self.call, self.task = pipe, source, call, task
        self.folder, self.kernel, self.backend, self.verify = folder, kernel, backend, verify
        self.loading = loading
        self.base = base_settings(pipe, source, call, kernel, loading)
        # Not the budget: another one in the same folder needs nothing to be recorded again.
        own = {"items": [asdict(item) for item in task.items], "methods": task.methods}
        own |= {"bands": task.bands, "backend": backend}
        self.book = Book(folder, self.base | {"task": own}, verify)
        self.total_steps = call["num_inference_steps"]
        self.bands = bands(self.total_steps, task.bands)
        self.middles = [middle(band) for band in self.bands]
        self.layers = layer_names(pipe)
        self.dense = self._arm(None)
        self.measures = list(QUALITIES)
        drawings = len(task.items) + len(task.held_out)
        # Records, trials in every layer and band, one followed in each band, timing.
        trials = len(self.layers) * len(self.bands) * 8 / self.total_steps
        work = (4 + trials) * len(task.items) + len(task.held_out) + len(self.bands)
        work += 0.5 * task.rounds * drawings + 4
        self.progress = _Progress(work, self._staged(on_stage))

    def _staged(self, on_stage: Callable[[str], None]) -> Callable[[str], None]:
        def staged(name: str) -> None:
            self.book.note_seconds()
            on_stage(name)

        return staged

    def _arm(self, variant: Variant | None) -> Arm:
        return Arm(self.pipe, self.base, self.folder / "drawn", variant, self.verify)

    def variant(self, label: str, method: Method, schedule: Schedule = ALWAYS) -> Arm:
        return self._arm(Variant(label, method, schedule, self.backend))

    def _which(self, item: Item) -> str:
        return f"prompt {self.task.items.index(item) + 1} of {len(self.task.items)}"

    def _call(self, item: Item) -> dict:
        return self.call | {"prompt": item.prompt}

    def _draw(self, name: str, arm: Arm, items: Sequence[Item], work: float = 0.5) -> None:
        missing = arm.drawings.missing(list(items))
        self.progress.skip(work * (len(items) - len(missing)))
        if missing:
            self.progress.begin(name, work * len(missing))
            draw_missing([arm], self.call, missing)

    # What is measured before anything is solved.

    def read_layout(self) -> Layout:
        """The layout of a pass, from a run of one step, which also warms the pipeline up."""
        item = self.task.items[0]
        with enable(self.pipe, "dense"):
            run(self.pipe, self._call(item) | {"num_inference_steps": 1}, item.seed)
            models = transformers_of(self.pipe).values()
            ran = next(m for m in models if m._dittfast.layout is not None)
            self.ran, self.sequences = ran, ran._dittfast.sequences
        return self.sequences.layout

    def prediction(self) -> Prediction:
        """Record dense runs and where errors lead, and make a prediction of them."""
        self.layout = self.read_layout()
        methods = candidates(self.layout, self.task.methods, execution_device(self.pipe))
        records = [self._record(item, methods) for item in self.task.items]
        for items in (self.task.items, self.task.held_out):
            self._draw("dense attention", self.dense, items, 1)
        if self.dense.drawings.latents(self.task.items[0]) is None:
            self.measures.remove("distance")
            if self.task.budget.distance is not None:
                raise ValueError(
                    f"{type(self.pipe).__name__} hands out no latents, of which a distance is "
                    "taken; give a budget of psnr"
                )
        if self.task.gpu is None:
            seconds = self._dense_seconds()
            seconds, records = (seconds["run"], seconds["attention"]), steadied(records, methods)
        else:
            gpu, cost = gpu_with_rates(self.task.gpu), cost_of(self.ran, self.sequences)
            records = computed(records, methods, self.layout, cost, gpu)
            seconds = run_seconds(records, self.total_steps, cost, gpu)
        steps = [end - first for first, end in self.bands]
        prediction = Prediction(methods, steps, self.middles, records, *seconds)
        self._answer(prediction)
        return prediction

    def _dense_seconds(self) -> dict:
        """Of a dense run, and of the attention in it."""
        item, name, work = self.task.items[0], "dense-seconds", 1

        def make() -> dict:
            self.progress.begin("timing dense attention", work)
            clock = clock_for(execution_device(self.pipe))
            with attention_seconds(self.pipe, clock) as spent:
                drawn = run(self.pipe, self._call(item), item.seed)
            return {"run": drawn.timing.busy, "attention": spent.attention}

        if self.book.has(name):
            self.progress.skip(work)
        return self.book.once(name, {"run": float, "attention": float}, make)

    def _record(self, item: Item, methods: list[Method]) -> dict:
        name = f"recorded-{item.index:05d}"

        def make() -> dict:
            self.progress.begin(f"recording {self._which(item)}", 4)
            drawn, numbers = record(
                self.pipe, self._call(item), item.seed, methods, self.middles,
                backend=self.backend,
            )  # fmt: skip
            self._keep_dense(item, drawn)
            return numbers

        if self.book.has(name):
            self.progress.skip(4)
        return self.book.once(
            name, FORM, make, lambda data: check_record(data, methods, self.middles)
        )

    def _keep_dense(self, item: Item, drawn: Run) -> None:
        """The picture of a run that was dense, whatever was tried on the way."""
        if self.dense.drawings.record(item) is None:
            facts = {"session": "recorded", "seconds": drawn.timing.total, "busy": None}
            facts |= {"steps": [], "peak_memory_bytes": None, "attention": None}
            self.dense.drawings.save(item, drawn, facts)

    def _answer(self, prediction: Prediction) -> None:
        """Ask how predictions answer to trials, and follow one a band to the picture."""
        worth = prediction.worth()
        if not worth:
            raise ImpossibleBudget("no method gives finite values in all layers of this model")
        methods, first = prediction.methods, self.task.items[0]
        layers = [name for name, _ in prediction.places]
        everywhere = [
            (step, dict.fromkeys(layers, methods[n])) for n in worth for step in self.middles
        ]  # fmt: skip
        answered = self._answers(first, everywhere).unflatten(0, (len(worth), -1))
        reference = prediction.usual_of(dict(zip(worth, answered.square().sum((1, 2)).tolist())))
        reference = reference[len(reference) // 2]
        ends, drawn = answered[worth.index(reference)], self._followed(methods[reference])
        band = list(range(len(self.bands)))
        alike = {
            m: {n: float(followed([own], band, ends, drawn[m]).sum())
                for n, own in zip(worth, answered)}
            for m in self.measures
        }  # fmt: skip
        prediction.settle(alike)
        trials = {place: prediction.trials(place) for place in prediction.places}
        asked = [
            (self.middles[place.band], {place.layer: method_of(heads, methods)})
            for place in prediction.places for heads in trials[place]
        ]  # fmt: skip
        vectors = [self._answers(item, asked) for item in self.task.items]
        band = [place.band for place in prediction.places for _ in trials[place]]
        grams = {m: followed(vectors, band, ends, drawn[m]) for m in self.measures}
        prediction.answer(trials, grams)

    def _answers(self, item: Item, trials: list[tuple[int, dict[str, Method]]]) -> torch.Tensor:
        """``[n, width]`` fp64: how the predictions of a prompt answer to trials."""
        words = [[step, {n: m.to_dict() for n, m in own.items()}] for step, own in trials]
        asked, work = digest_of(words), 1 + len(trials) / self.total_steps
        name = f"answers-{item.index:05d}-{asked[:8]}"

        def make() -> dict:
            passes = f"one pass for each of {len(trials)} trials"
            self.progress.begin(f"{passes}, {self._which(item)}", work)
            given = self.pipe, self._call(item), item.seed, trials
            found = answers(*given, backend=self.backend)
            return {"asked": asked, "vectors": [to_text(x) for x in found]}

        def check(data: dict) -> None:
            if data["asked"] != asked or len(data["vectors"]) != len(trials):
                raise ValueError("it holds the answers to other trials")

        if self.book.has(name):
            self.progress.skip(work)
        data = self.book.once(name, ANSWERS, make, check)
        return torch.stack([from_text(text) for text in data["vectors"]])

    def _followed(self, reference: Method) -> dict[str, torch.Tensor]:
        """By measure ``[bands, bands]``: what a method in all layers of a band does to a picture.

        Inner products, whose diagonal are squared errors.
        """
        item, moved = self.task.items[0], {m: [] for m in self.measures}
        dense = self.dense.drawings
        for number, (first, end) in enumerate(self.bands):
            mixture = Mixture((Rule(reference, steps=(first, end)),))
            arm = self.variant(f"band-{number}-{digest_of(reference.to_dict())[:8]}", mixture)
            self._draw(f"{reference.name} in steps {first}-{end - 1}", arm, [item], 1)
            frames = [image_tensor(x.drawings.frames(item)) for x in (arm, self.dense)]
            difference = (frames[0].double() - frames[1].double()).flatten()
            moved["psnr"].append(difference / math.sqrt(difference.numel()))
            if "distance" in moved:
                own, usual = (x.latents(item).double() for x in (arm.drawings, dense))
                moved["distance"].append((own - usual).flatten() / usual.norm())
        found = {m: torch.stack(x) for m, x in moved.items()}
        return {m: x @ x.T for m, x in found.items()}

    # Drawing and judging.

    def judge(self, arm: Arm, items: Sequence[Item]) -> dict[str, float]:
        """Means over stored pictures: PSNR of those that differ from dense, and distance."""
        values: dict[str, list[float]] = {m: [] for m in self.measures}
        for item in items:
            frames = (a.drawings.frames(item) for a in (self.dense, arm))
            value = psnr(*map(image_tensor, frames))
            if math.isfinite(value):
                values["psnr"].append(value)
            if "distance" in values:
                latents = (a.drawings.latents(item) for a in (self.dense, arm))
                values["distance"].append(relative_distance(*latents))
        return {m: statistics.fmean(x) if x else _EQUAL for m, x in values.items()}

    def _correct(self, prediction: Prediction, assigned: Assigned, measured: dict) -> None:
        for measure in self.measures:
            prediction.correct(assigned, measure, _squared(measure, measured[measure]))

    def speed(self, prediction: Prediction, assigned: Assigned, arm: Arm) -> float:
        """Dense seconds over a preset's: timed here, or computed for the GPU that was named."""
        return self.speedup(arm) if self.task.gpu is None else prediction.speedup(assigned)

    def speedup(self, arm: Arm) -> float:
        """Dense seconds over a preset's: attention in turns, call by call, and the rest alike."""
        item, name = self.task.held_out[0], f"speed-{arm.label}"
        variant = arm.variant

        def make() -> dict:
            self.progress.begin(f"timing {arm.label}", 2)
            given = variant.method, variant.schedule
            return attention_in_turns(
                self.pipe, self._call(item), item.seed, *given, backend=self.backend
            )

        found, dense = self.book.once(name, _SECONDS, make), self._dense_seconds()
        own = dense["attention"] * found["own"] / found["dense"]
        return dense["run"] / (dense["run"] - dense["attention"] + own)

    def whole_calls(self, arm: Arm) -> list[float]:
        """Dense seconds over a preset's, of whole calls in turns, pair by pair."""
        item, name = self.task.held_out[0], f"calls-{arm.label}"

        def make() -> dict:
            self.progress.begin(f"timing whole calls of {arm.label}", 1.5 * _PAIRS)
            seconds: dict[str, list[float]] = {"dense": [], "sparse": []}
            arms = {"dense": self.dense, "sparse": arm}
            for _, which in in_turns(arms, _PAIRS):
                drawn, _ = arms[which].draw(self._call(item), item.seed)
                seconds[which].append(drawn.timing.busy)
            return {"seconds": seconds}

        found = self.book.once(name, {"seconds": {"*": [float]}}, make)["seconds"]
        return [a / b for a, b in zip(found["dense"], found["sparse"])]

    # Search.

    def search(self, prediction: Prediction) -> tuple[Drawn, list[Drawn]]:
        """Solve, draw and correct until a preset holds; it, and all that were drawn.

        Raises:
            ImpossibleBudget: none does.
        """
        budget, rounds = self.task.budget, []
        bounds = {m: getattr(budget, m) for m in QUALITIES if getattr(budget, m) is not None}
        targets = {m: _better(m, bound, _ABOVE) for m, bound in bounds.items()}
        for number in range(self.task.rounds + 1):
            try:
                solve = self._solve if number else self._alike
                assigned = solve(prediction, targets)
            except ImpossibleBudget:
                if any(map(self._holds, rounds)):
                    break  # what was drawn is more than what is predicted
                raise
            if assigned is None:
                continue
            mixture = self._mixture(prediction, assigned)
            if any(mixture == one.mixture for one in rounds):
                if not targets or any(map(self._holds, rounds)):
                    break
                targets = {m: _better(m, x, _ABOVE) for m, x in targets.items()}
                continue
            one = self._round(prediction, _label(mixture), mixture, assigned)
            rounds.append(one)
            self._learn(prediction, one, targets)
            if number and self._holds(one) and not self._has_room(one, targets):
                break
        held = [one for one in rounds if self._holds(one)]
        if not held:
            raise ImpossibleBudget(self._nearest(rounds))
        if budget.has_quality:
            return min(held, key=lambda one: prediction.call_seconds(one.assigned)), rounds
        return max(held, key=lambda one: one.tuned["psnr"]), rounds

    def _alike(self, prediction: Prediction, targets: dict[str, float]) -> Assigned | None:
        """The best of one candidate in all layers and steps, which every preset has to beat.

        None where no candidate is predicted to hold the budget so.
        """
        limits = {m: _squared(m, x) for m, x in targets.items()}
        asked = (self.task.budget.speedup or 0.0) * _FASTER
        fitting = []
        for number in prediction.usual:
            assigned = prediction.alike(number)
            if prediction.speedup(assigned) < asked or prediction.saved(assigned) <= 0:
                continue
            errors = {m: prediction.squared_error(assigned, m) for m in (limits or {"psnr": 1.0})}
            if all(errors[m] <= limit for m, limit in limits.items()):
                cost = prediction.call_seconds(assigned) if limits else errors["psnr"]
                fitting.append((cost, number, assigned))
        return min(fitting)[2] if fitting else None

    def _solve(self, prediction: Prediction, targets: dict[str, float]) -> Assigned:
        limits = {m: _squared(m, x) for m, x in targets.items()} or {"psnr": 1.0}
        starts = [prediction.alike(number) for number in prediction.usual]
        asked = self.task.budget.speedup
        assigned = prediction.solve(limits, starts=starts) if targets else None
        if asked is not None and (assigned is None or prediction.speedup(assigned) < asked):
            for aim in (_FASTER * asked, asked):
                assigned = prediction.solve(limits, prediction.run_seconds / aim, starts)
                if assigned is not None:
                    break
            else:
                raise ImpossibleBudget(self._too_fast(prediction))
        if self._mixture(prediction, assigned) is None:
            fastest = prediction.speedup(prediction.fastest())
            raise ImpossibleBudget(
                f"within {' and '.join(self.task.budget.words())} no method saves anything in any "
                f"layer, so dense attention is the nearest; the sparsest that there is would be "
                f"predicted {fastest:.2f} times as fast"
            )
        return assigned

    def _mixture(self, prediction: Prediction, assigned: Assigned) -> Mixture | None:
        edges = [(a / self.total_steps, b / self.total_steps) for a, b in self.bands]
        return mixture_of(assigned, prediction.methods, self.layers, edges)

    def _round(self, prediction, label: str, mixture: Mixture, assigned: Assigned) -> Drawn:
        """Draw a choice; with held-out prompts only where those it was tuned with hold."""
        budget, arm = self.task.budget, self.variant(label, mixture)
        predicted = {m: prediction.squared_error(assigned, m) for m in self.measures}
        predicted = {m: _value(m, x) for m, x in predicted.items()}
        predicted["speedup"] = prediction.speedup(assigned)
        self._draw(f"{label}, the prompts it is tuned with", arm, self.task.items)
        tuned = self.judge(arm, self.task.items)
        held = {}
        if not budget.lacks(tuned, QUALITIES):
            self._draw(f"{label}, held-out prompts", arm, self.task.held_out)
            held = self.judge(arm, self.task.held_out)
            if budget.speedup is not None and not budget.lacks(held, QUALITIES):
                held["speedup"] = self.speed(prediction, assigned, arm)
        return Drawn(label, mixture, assigned, ALWAYS, predicted, tuned, held)

    def _learn(self, prediction: Prediction, one: Drawn, targets: dict[str, float]) -> None:
        """Correct the prediction, and what is aimed at where held-out prompts fell short."""
        self._correct(prediction, one.assigned, one.tuned)
        if "speedup" in one.held_out:
            prediction.learn_speed(one.assigned, one.held_out["speedup"])
        for measure, target in targets.items() if one.held_out else ():
            if self.task.budget.lacks(one.held_out, [measure]):
                bound = _squared(measure, getattr(self.task.budget, measure))
                short = 10 * math.log10(_squared(measure, one.held_out[measure]) / bound)
                targets[measure] = _better(measure, target, short)

    def _holds(self, one: Drawn) -> bool:
        return bool(one.held_out) and not self.task.budget.lacks(one.held_out)

    def _has_room(self, one: Drawn, targets: dict[str, float]) -> bool:
        """Whether another round may find something better than a preset that holds."""
        if not targets:  # a preset of the speed that is aimed at is the most exact known
            return one.held_out["speedup"] > _TOO_FAST * self.task.budget.speedup
        bounds = {m: _squared(m, getattr(self.task.budget, m)) for m in targets}
        held = {m: _squared(m, one.held_out[m]) for m in targets}
        return all(10 * math.log10(bounds[m] / held[m]) > _NEAR for m in targets if held[m])

    # What cannot be had.

    def _too_fast(self, prediction: Prediction) -> str:
        share = 1 - prediction.rest / prediction.run_seconds
        return (
            f"speedup>={self.task.budget.speedup:g} cannot be had here: attention is {share:.0%} "
            "of a run, and with the fastest method in every layer and step it would be "
            f"{prediction.speedup(prediction.fastest()):.2f} times as fast; that is the nearest "
            "possible"
        )

    def _nearest(self, rounds: Sequence[Drawn]) -> str:
        budget = self.task.budget

        def words(one: Drawn) -> str:
            measured = one.held_out or one.tuned
            speed = measured.get("speedup", one.predicted["speedup"])
            which = "held-out prompts" if one.held_out else "the prompts it was tuned with"
            parts = [f"{m} {measured[m]:.4g}" for m in self.measures if m in measured]
            return f"{', '.join(parts)} on {which} at {speed:.2f} times the speed"

        best = max(rounds, key=lambda one: (one.held_out or one.tuned)["psnr"])
        return (
            f"no preset of {len(rounds)} rounds holds {' and '.join(budget.words())}; the nearest "
            f"has {words(best)}. Allow more --rounds, or ask for that"
        )

    # Plans that last.

    def lasting(self, prediction: Prediction, best: Drawn) -> Drawn:
        """The preset with plans that last some steps, method by method, where that loses nothing.

        Prompts tuned with choose how long; the preset stays as it is if held-out ones object.
        """
        spent, chosen = prediction.planning(best.assigned), {}
        for name in sorted(spent, key=spent.get, reverse=True):
            if spent[name] < _WORTH_LASTING * prediction.call_seconds(best.assigned):
                continue
            for every in _LASTING:
                arm = self._lasting(best, chosen | {name: every})
                self._draw(f"plans of {name} kept for {every} steps", arm, self.task.items)
                if not self._loses(self.judge(arm, self.task.items), best.tuned):
                    chosen[name] = every
                    break
        if not chosen:
            return best
        arm = self._lasting(best, chosen)
        self._draw("plans that last, held-out prompts", arm, self.task.held_out)
        held = self.judge(arm, self.task.held_out)
        if self._loses(held, best.held_out):
            return best
        if "speedup" in best.held_out:
            held["speedup"] = self.speed(prediction, best.assigned, arm)
            if self.task.budget.lacks(held):
                return best
        tuned = self.judge(arm, self.task.items)
        schedule = arm.variant.schedule
        return replace(best, label=arm.label, schedule=schedule, tuned=tuned, held_out=held)

    def _lasting(self, best: Drawn, every: dict[str, int]) -> Arm:
        label = "-".join([best.label, *(f"{name}-{n}" for name, n in sorted(every.items()))])
        return self.variant(label, best.mixture, replace(ALWAYS, replan_every=every))

    def _loses(self, measured: dict, before: dict) -> bool:
        budget = self.task.budget
        if not budget.has_quality:
            budget = Budget(psnr=max(before["psnr"] - _LOST, 1.0))
        return bool(budget.lacks(measured, QUALITIES))


def _label(mixture: Mixture) -> str:
    """A name for what was chosen, the same for the same choice."""
    return f"tuned-{digest_of(mixture.to_dict())[:8]}"


def uniform_label(method: Method) -> str:
    """A name for a method in all layers and steps."""
    return f"all-{method.name}-{digest_of(method.to_dict())[:8]}"


def _squared(measure: str, value: float) -> float:
    """The squared error that a measure stands for."""
    return 10 ** (-value / 10) if measure == "psnr" else value**2


def _value(measure: str, squared: float) -> float:
    if measure == "distance":
        return math.sqrt(squared)
    return -10 * math.log10(squared) if squared > 0 else _EQUAL


def _better(measure: str, value: float, decibels: float) -> float:
    """A value of a measure whose squared error is lower by so much."""
    return _value(measure, _squared(measure, value) * 10 ** (-decibels / 10))


def tune(
    pipe,
    source: Source,
    call: dict,
    task: Task,
    folder: str | Path,
    *,
    position_scale: float = 1.0,
    kernel: str = "auto",
    backend: str = "auto",
    verify: bool = True,
    loading: dict | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Tuned:
    """Find the cheapest methods for layers, heads and steps within a budget, and prove them.

    Everything measured is written down as it is measured: called again with the same arguments, a
    killed tuning goes on where it was and ends with the same preset.

    Args:
        pipe: a pipeline that dittfast can read, not enabled.
        call: see :func:`~dittfast.pipelines.runs.call.call_arguments`; its prompt is replaced.
        folder: gets preset.yaml, its report, and all that was measured.
        position_scale: of position ids in all runs
            (:func:`~dittfast.pipelines.runs.positions.positions_scaled`).
        kernel: of PyTorch's dense attention, as in
            :func:`~dittfast.pipelines.measure.fidelity.dense_kernel`.
        backend: as in :func:`dittfast.attend`.
        verify: compare what is there with its SHA-256.
        loading: what was put into the pipeline, as plain data.

    Raises:
        ImpossibleBudget: the budget cannot be held.
        ValueError: a folder of another tuning, or as :func:`dittfast.enable`.
        FloatingPointError: a picture has values that are not finite.
        OSError: something could not be written; what was measured before stays.
    """
    folder = Path(folder)
    loaded = (loading or {}) | {"position_scale": position_scale}
    with locked(folder), positions_scaled(pipe, position_scale):
        given = (kernel, backend, verify, loaded, on_stage)
        tuner = Tuner(pipe, source, call, task, folder, *given)
        prediction = tuner.prediction()
        best, rounds = tuner.search(prediction)
        best = tuner.lasting(prediction, best)
        return _finish(tuner, prediction, best, rounds)


def _finish(tuner: Tuner, prediction: Prediction, best: Drawn, rounds: list[Drawn]) -> Tuned:
    """Time the preset, check it, and write it with its report."""
    arm = tuner.variant(best.label, best.mixture, best.schedule)
    best.held_out.setdefault("speedup", tuner.speed(prediction, best.assigned, arm))
    calls = tuner.whole_calls(arm) if tuner.task.gpu is None else []
    tuner.progress.begin("checking attention, and the report", 1)
    results = evaluate_fidelity(
        tuner.pipe, tuner.source, tuner.call, tuner.task.held_out, [arm.variant],
        tuner.folder / "drawn", kernel=tuner.kernel, verify=tuner.verify, loading=tuner.loading,
    )  # fmt: skip
    write_record(tuner.folder / "drawn" / "fidelity.json", results)
    planning, total = prediction.planning(best.assigned), tuner.total_steps
    every = dict(best.schedule.replan_every or ())
    made = {name: math.ceil(total / every.get(name, 1)) / total for name in planning}
    found = {
        "budget": tuner.task.budget.words(),
        "best": best.to_dict(),
        "rounds": [one.to_dict() for one in rounds],
        "planning": {
            "seconds": sum(planning.values()),
            "saved": sum(planning[name] * (1 - made[name]) for name in planning),
        },
        "gpu": tuner.task.gpu,
        "whole_calls": calls,
        "run_seconds": prediction.run_seconds,
        "attention_share": 1 - prediction.rest / prediction.run_seconds,
        "candidates": [method.to_dict() for method in prediction.methods],
        "places": prediction.table(best.assigned),
        "factors": prediction.factors,
        "bands": [list(band) for band in tuner.bands],
    }
    write_record(tuner.folder / "tune.json", found)
    report = tuner.folder / "report.html"
    plots = importlib.util.find_spec("matplotlib") is not None
    page = html_report(
        tuner.folder / "drawn", read_results(tuner.folder / "drawn", tuner.verify),
        plots=plots, more=summary_tables(found),
    )  # fmt: skip
    write_text(report, page)
    data = preset_data(
        tuner.pipe, tuner.source.name, tuner.call, best.mixture, best.schedule,
        {
            "budget": found["budget"],
            "sizes": [list(tuner.layout.grid.shape)],
            "position_scale": tuner.loading["position_scale"],
            "held_out": {"prompts": len(tuner.task.held_out), **best.held_out},
            "report": report.name,
            **({} if tuner.task.gpu is None else {"speed_computed_for": tuner.task.gpu}),
        },
    )  # fmt: skip
    path = tuner.folder / "preset.yaml"
    write_preset(path, data)
    tuner.book.note_seconds()
    return Tuned(path, data, found, report, tuner.book.seconds)
