"""What a tuning measures: dense runs and their layers, trials, drawn pictures, seconds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from dittfast.disk.records import digest_of
from dittfast.layout import Layout
from dittfast.measure.metrics import image_tensor, psnr, relative_distance
from dittfast.measure.timing import clock_for, in_turns
from dittfast.methods.base import Method
from dittfast.mixture import Mixture, Rule
from dittfast.schedule import Schedule

from ..adapter import enable
from ..measure.fidelity import Arm, base_settings, draw_missing
from ..measure.latency import attention_seconds
from ..measure.method_check import layer_names
from ..measure.variants import Variant
from ..models import execution_device, transformers_of
from ..runs.prompts import Item
from ..runs.run import Run, run
from ..runs.sources import Source
from .book import Book
from .budget import EQUAL, QUALITIES, ImpossibleBudget
from .candidates import candidates
from .on_gpu import computed, cost_of, gpu_with_rates, run_seconds
from .prediction import Assigned, Prediction, method_of
from .preset import ALWAYS
from .progress import Progress
from .recording import FORM, attention_in_turns, bands, check_record, middle, record
from .seconds import steadied
from .sensitivity import FORM as ANSWERS
from .sensitivity import answers, followed, from_text, to_text
from .task import Task

# Pairs of whole calls that a finished preset is timed with.
_PAIRS = 3
# Dense steps that a step takes in which all candidates are recorded, and one more pass of a trial,
# which reuses the blocks before it: for the time that is left.
_RECORDED, _TRIED = 12, 0.35
# What an attention's timing in turns holds.
_SECONDS = {"dense": float, "own": float}


class Measuring:
    """What one tuning measures on its pipeline; each number once, and kept in its folder."""

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
        trials = self._answering(8 * len(self.layers) * len(self.bands))
        work = (self._recording + trials) * len(task.items) + len(task.held_out) + len(self.bands)
        work += self._answering(16 * len(self.bands)) + 0.5 * task.rounds * drawings
        work += 1.5 * _PAIRS + 4
        self.progress = Progress(work, self._staged(on_stage))

    def _staged(self, on_stage: Callable[[str], None]) -> Callable[[str], None]:
        def staged(name: str) -> None:
            self.book.note_seconds()
            on_stage(name)

        return staged

    @property
    def _recording(self) -> float:
        """Dense runs that are as long as one that is recorded."""
        return 1 + _RECORDED * len(self.bands) / self.total_steps

    def _answering(self, trials: int) -> float:
        """Dense runs that are as long as one with so many trials."""
        return 1 + _TRIED * trials / self.total_steps

    def _arm(self, variant: Variant | None) -> Arm:
        return Arm(self.pipe, self.base, self.folder / "drawn", variant, self.verify)

    def variant(self, label: str, method: Method, schedule: Schedule = ALWAYS) -> Arm:
        return self._arm(Variant(label, method, schedule, self.backend))

    def _which(self, item: Item) -> str:
        return f"prompt {self.task.items.index(item) + 1} of {len(self.task.items)}"

    def _call(self, item: Item) -> dict:
        return self.call | {"prompt": item.prompt}

    def draw(self, name: str, arm: Arm, items: Sequence[Item], work: float = 0.5) -> None:
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
            self.draw("dense attention", self.dense, items, 1)
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
            self.progress.begin(f"recording {self._which(item)}", self._recording)
            drawn, numbers = record(
                self.pipe, self._call(item), item.seed, methods, self.middles,
                backend=self.backend,
            )  # fmt: skip
            self._keep_dense(item, drawn)
            return numbers

        if self.book.has(name):
            self.progress.skip(self._recording)
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
        asked, work = digest_of(words), self._answering(len(trials))
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
            self.draw(f"{reference.name} in steps {first}-{end - 1}", arm, [item], 1)
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
        return {m: statistics.fmean(x) if x else EQUAL for m, x in values.items()}

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
