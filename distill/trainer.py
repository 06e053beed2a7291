"""The training loop: accelerate, losses, checkpoints, resume, validation."""

from __future__ import annotations

import itertools
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dittfast.disk.locks import FolderLock
from dittfast.disk.problems import FileProblem, first_words, writing
from dittfast.disk.records import parse_json, read_text
from dittfast.disk.structure import check_structure
from dittfast.files import write_json, write_text
from dittfast.pipelines.adapter import force_dense
from dittfast.pipelines.fingerprint import difference
from dittfast.pipelines.runs.positions import positions_scaled
from dittfast.pipelines.runs.sources import choose_dtype, find, load

from .adapter_files import OWN, read_weights
from .artifacts import save_adapter
from .checkpoint import PROGRESS, Checkpoints, RunState, read_progress
from .config import DistillConfig
from .launch import make_accelerator, wants_shards
from .loader import Batch, Dataset, Prefetch, mixed_batches
from .losses import (
    attention_loss,
    denoising_loss,
    feature_loss,
    layer_mean,
    prediction_loss,
    weighted_sum,
)
from .noise import generator, sample_noise, sample_times
from .optim import Average, learning_rate, make_optimizer
from .resume import check_resume, run_facts
from .sharding import local, whole
from .student import Student, component_of, swapped
from .validation import Validation
from .windows import window

logger = logging.getLogger(__name__)


@dataclass
class Micro:
    """What one process sees in one forward pass: a batch, its noise and its times."""

    batch: Batch
    noise: torch.Tensor
    t: torch.Tensor


class Trainer:
    """One run of a configuration.

    Args:
        config: the run.
        resume: "latest" or the folder of a checkpoint; None starts a new run.

    Raises:
        ValueError: the configuration does not fit the model, the data or this machine; the output
            folder holds a run and ``resume`` is None, or another process's run; the checkpoint is
            damaged, or of another training.
        FileNotFoundError: no data, or nothing to resume from.
    """

    def __init__(self, config: DistillConfig, resume: str | None = None):
        self.config = config
        self.output = Path(config.train.output)
        self.accelerator = make_accelerator(config)
        self.sharded = wants_shards(self.accelerator, config)
        self.checkpoints = Checkpoints(
            self.output / "checkpoints",
            config.train.keep,
            self.accelerator.is_main_process,
            self.accelerator.wait_for_everyone,
        )
        self._lock = None
        if self.output.is_dir():  # a new run takes it when it begins
            self._take_output()
        start = self._start(resume)
        train, mixed = config.train, config.data.mix
        self.sets = [Dataset(x, train.verify) for x in (config.data.folder, *mixed)]
        self.dataset = self.sets[0]
        self.parts = [  # the times and the window of each set
            (train.time_range, train.crop),
            *((m.time_range or train.time_range, m.crop or train.crop) for m in mixed.values()),
        ]
        self.process = self.dataset.process
        torch.manual_seed(config.train.seed + self.accelerator.process_index)
        self._load_models()
        if self.sharded:
            self.student.shard(self.accelerator.device)
        self.parameters = self.student.trainable()
        self.average = None
        if config.train.ema is not None:
            self.average = Average(self.parameters, config.train.ema)
        optimizer = make_optimizer(config.train, self.parameters)
        # The module that adds up the processes' gradients.
        self._reducing = self.student.transformer
        if self.sharded:
            self.model, self.optimizer = self.student, self.accelerator.prepare_optimizer(optimizer)
        else:
            self.model, self.optimizer = self.accelerator.prepare(self.student, optimizer)
            self._reducing = self.model
        self.state = RunState(
            self.parameters,
            self.average,
            self.optimizer,
            self.accelerator.scaler,
            rank=self.accelerator.process_index,
            sharded=self.sharded,
        )
        self.step = 0
        self.seconds = 0.0
        self.last: dict[str, float] = {}
        if start:
            self._restore(start)

    def _take_output(self) -> None:
        """Keep other processes out of the output folder; of a launch the first one does."""
        if self.accelerator.is_main_process and self._lock is None:
            self.output.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.output)

    def _start(self, resume: str | None) -> list[Path]:
        """The checkpoints to start from, the best first; none for a new run."""
        there = self.checkpoints.all()[::-1]
        if resume is None:
            if there:
                raise ValueError(
                    f"{self.output} holds a run with {there[0].name}; go on with --resume latest, "
                    "or name another train.output"
                )
            return []
        if resume != "latest":
            if not (Path(resume) / PROGRESS).is_file():
                raise FileNotFoundError(
                    f"{resume} is no checkpoint of a run; name one in {self.output}, or latest"
                )
            return [Path(resume)]
        if not there and not self.output.is_dir():
            raise FileNotFoundError(
                f"there is no run in {self.output} to resume; leave out --resume to begin one"
            )
        return there  # none where the run was killed before its first checkpoint

    def _load_models(self) -> None:
        config, device = self.config, self.accelerator.device
        self.source = find(config.model.path)
        dtype = choose_dtype(config.model.dtype, device)
        mixed = config.train.mixed_precision
        if dtype != torch.float32 and mixed == "no":
            raise ValueError(
                f"model.dtype is {str(dtype).removeprefix('torch.')}, but what is trained is "
                "float32; set train.mixed_precision=bf16, or model.dtype=float32"
            )
        # Text encoders and the VAE are needed for validation alone.
        self.pipe = load(self.source, device if config.validation.every else "cpu", dtype)
        component_of(self.pipe, config.model.component).to(device)
        self.student = Student(
            self.pipe,
            config.model.component,
            config.student,
            config.objectives,
            config.model.separate_teacher,
        )
        for dataset in self.sets:
            if dataset.process != self.process:
                raise ValueError(
                    f"the set in {dataset.folder} was made for another noise process than the one "
                    f"in {config.data.folder}; prepare both with one scheduler"
                )
            wrong = difference(dataset.manifest["fingerprint"], self.student.transformer)
            if wrong:
                raise ValueError(
                    f"the set in {dataset.folder} was made with another model than "
                    f"{config.model.path}: {wrong}"
                )
        if config.student.start is not None:
            self._start_weights(config.student.start)
        if config.train.gradient_checkpointing:
            self.student.transformer.enable_gradient_checkpointing()
        self.validation = None
        if config.validation.every:
            self.validation = Validation(self.pipe, self.source, config)

    def _start_weights(self, folder: str) -> None:
        verify = self.config.train.verify
        weights = {name.removeprefix(OWN): x for name, x in read_weights(folder, verify).items()}
        own = self.student.trainable()
        starting = {name: weights[name] for name in own if name in weights}
        if not starting:
            raise ValueError(
                f"student.start={folder} holds no parameter that student.trainable="
                f"{self.config.student.trainable} trains"
            )
        with torch.no_grad():
            for name, value in starting.items():
                own[name].copy_(value)
        logger.info("%d of %d parameters start from %s", len(starting), len(own), folder)

    @property
    def global_batch(self) -> int:
        """Samples of one optimiser step."""
        train = self.config.train
        return train.batch_size * train.accumulation * self.accelerator.num_processes

    def _micros(self, step: int) -> list[Micro]:
        """This process's part of a step. Everything random follows from the seed and the step."""
        train, rank = self.config.train, self.accelerator.process_index
        which, indices = next(self._order)
        count = len(indices)
        time_range, crop = self.parts[which]
        t = sample_times(
            count,
            generator("times", train.seed, step),
            train.time_distribution,
            train.time_shift,
            time_range,
        )
        chance = torch.rand(count, generator=generator("drop", train.seed, step))
        dropped = (chance < train.drop_prompt).tolist()
        micros = []
        for index in range(train.accumulation):
            first = (index * self.accelerator.num_processes + rank) * train.batch_size
            slots = range(first, first + train.batch_size)
            batch = self.sets[which].batch([indices[s] for s in slots], [dropped[s] for s in slots])
            if crop is not None:
                # One place for all processes, so that it depends on the step alone.
                place = generator("window", train.seed, step, index)
                batch = window(batch, crop, place)
            shape = batch.latents.shape[1:]
            noise = [sample_noise(shape, train.seed, step, s) for s in slots]
            micros.append(Micro(batch, torch.stack(noise), t[first : first + train.batch_size]))
        return micros

    def losses(self, micro: Micro) -> dict[str, torch.Tensor]:
        """The losses that have a weight, by name."""
        device, weights = self.accelerator.device, self.config.objectives
        batch = micro.batch.to(device)
        noise, t = micro.noise.to(device), micro.t.to(device)
        hidden_states = noisy = self.process.noisy(batch.latents, noise, t)
        appended = batch.arguments.get("hidden_states")
        if appended is not None:
            hidden_states = torch.cat([hidden_states, appended.to(hidden_states)], 1)
        arguments = dict(
            batch.arguments, hidden_states=hidden_states, timestep=self.process.timestep(t)
        )
        if self.config.train.mixed_precision == "no":
            arguments = _to_float32(arguments)
        else:
            arguments["hidden_states"] = arguments["hidden_states"].to(self.student.dtype)
        teacher = None
        if weights.needs_teacher:
            # First, because checkpointed blocks run again in the backward pass, as set up last.
            with self.student.as_teacher():
                teacher = self._pass(arguments)
        with force_dense(self.pipe, False):
            prediction, attention, features, reported = self._pass(arguments)
        prediction = self.process.velocity(prediction, noisy, t)
        losses = {}
        if weights.denoising:
            target = self.process.target(batch.latents, noise, t)
            losses["denoising"] = denoising_loss(prediction, target)
        if weights.prediction:
            wanted = self.process.velocity(teacher[0], noisy, t)
            losses["prediction"] = prediction_loss(prediction, wanted)
        if weights.attention:
            losses["attention"] = attention_loss(attention, teacher[1])
        if weights.features:
            losses["features"] = feature_loss(features, teacher[2])
        for name in weights.reported:
            losses[name] = layer_mean(reported[name], name)
        return losses

    def _pass(self, arguments: dict):
        if not self.sharded:
            return self.model(arguments)
        with self.accelerator.autocast():  # accelerate puts this into a model it prepared
            return self.model(arguments)

    def _sync_gradients(self, sync: bool) -> None:
        """Before a backward pass of sharded weights: whether the processes add their gradients."""
        if self.sharded:
            self._reducing.set_requires_gradient_sync(sync)

    def _average_gradients(self) -> None:
        """Of parameters that belong to the method: those are in no shard."""
        for name in self.student.own if self.sharded else ():
            p = self.parameters[name]
            p.grad = self.accelerator.reduce(p.grad, "mean")

    def _train_step(self, micros: list[Micro]) -> dict[str, float]:
        train = self.config.train
        weights = vars(self.config.objectives)
        rate = learning_rate(self.step, train)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums = None
        for micro in micros:
            with self.accelerator.accumulate(self._reducing):
                losses = self.losses(micro)
                total = weighted_sum(losses, weights)
                self._sync_gradients(self.accelerator.sync_gradients)
                self.accelerator.backward(total)
                values = torch.stack([total, *losses.values()]).detach().double()
                sums = values if sums is None else sums + values
                if self.accelerator.sync_gradients:
                    self._average_gradients()
                    means = self.accelerator.reduce(sums / len(micros), "mean").tolist()
                    metrics = dict(zip(["loss", *losses], means))
                    self._guard(metrics)
                    limit = float("inf") if train.clip is None else train.clip
                    norm = self.accelerator.clip_grad_norm_(self.parameters.values(), limit)
                    norm = float(whole(norm))
                    scaler = self.accelerator.scaler
                    # A gradient that overflows in fp16 is skipped and tried with a smaller scale.
                    if scaler is None or scaler.get_scale() < 1:
                        self._guard({"gradient": norm})
                    self.optimizer.step()
                    self.optimizer.zero_grad()
        self.step += 1
        if self.average is not None:
            self.average.update(self.parameters)
        return metrics | {"lr": rate, "gradient_norm": norm}

    def _guard(self, values: dict[str, float]) -> None:
        """Stop before a step that would ruin the weights.

        Raises:
            FloatingPointError: a value that is not finite.
        """
        # The named losses before their sum.
        wrong = [name for name in reversed(values) if not np.isfinite(values[name])]
        if not wrong:
            return
        last = self.checkpoints.latest()
        kept = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
        spoilt = [n for n, p in self.parameters.items() if not torch.isfinite(local(p)).all()]
        state = f"{spoilt[0]} is not finite any more" if spoilt else "its weights are unharmed"
        raise FloatingPointError(
            f"step {self.step}: {', '.join(x for x in wrong if x != 'loss')} is not finite, so the "
            f"run stops; {state}; {kept}. Try a lower train.lr, train.clip, or bf16 in the place "
            "of fp16"
        )

    def run(self) -> dict[str, float]:
        """Train to the last step and write the adapter; the last step's values.

        Raises:
            FloatingPointError: a loss or the gradient is not finite.
        """
        train, main = self.config.train, self.accelerator.is_main_process
        if self._lock is None and main:
            self._take_output()
            self._start(None)  # another process may have been here meanwhile
        if main:
            write_json(self.output / "config.json", self.config.to_dict())
            self._rewind_metrics()
        self.checkpoints.tidy(self.step)
        self.accelerator.init_trackers("dittfast")
        order = mixed_batches(
            [dataset.shapes for dataset in self.sets],
            [1.0, *(mixed.share for mixed in self.config.data.mix.values())],
            self.global_batch,
            train.seed,
        )
        self._order = itertools.islice(order, self.step, None)
        batches = Prefetch(self._micros, self.step)
        bar = tqdm(total=train.steps, initial=self.step, desc="distilling", disable=not main)
        try:
            if self.validation is not None and self.step == 0:
                self._validate()
            while self.step < train.steps:
                began, spent = time.perf_counter(), time.process_time()
                values = self._train_step(next(batches))
                values["seconds"] = time.perf_counter() - began
                # Of all threads; what else runs on the machine does not stretch it.
                values["cpu_seconds"] = time.process_time() - spent
                self.seconds += values["seconds"]
                self._log(values)
                self.last = values
                bar.update()
                bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
                due = self.validation is not None and not self.step % self.config.validation.every
                if due or (self.validation is not None and self.step == train.steps):
                    self._validate()
                if not self.step % train.checkpoint_every or self.step == train.steps:
                    self.save()
            self._export()
        finally:
            batches.close()
            bar.close()
            self.accelerator.end_training()
            if self._lock is not None:
                self._lock.release()
                self._lock = None
        return self.last

    def _log(self, values: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            path = self.output / "metrics.jsonl"
            with writing(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, **values}) + "\n")
        self.accelerator.log(values, self.step)

    def metrics(self) -> list[dict]:
        """What was logged so far."""
        path = self.output / "metrics.jsonl"
        lines = read_text(path).splitlines() if path.is_file() else []
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                row = parse_json(line)
                check_structure(row, {"step": int, "*": object})
            except (ValueError, RecursionError):
                if number < len(lines):  # else the run was killed while it wrote this line
                    logger.warning("%s: line %d is damaged and left out", path, number)
                continue
            rows.append(row)
        return rows

    def _rewind_metrics(self) -> None:
        """Drop what was logged after the checkpoint that this run starts from."""
        path = self.output / "metrics.jsonl"
        if path.is_file():
            kept = [row for row in self.metrics() if self.step and row["step"] <= self.step]
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))

    def _validate(self) -> None:
        """Pictures by the main process; the others wait, or draw too where they hold shards."""
        main = self.accelerator.is_main_process
        if main or self.sharded:
            averaged = dict(self.average.values) if self.average is not None else {}
            with (
                self.accelerator.autocast(),
                swapped(self.parameters, averaged),
                positions_scaled(self.pipe, self.config.data.position_scale),
            ):
                values = self.validation.measure(self.step, self.student.teacher_pipeline, main)
            if main:
                self._log({f"validation/{name}": x for name, x in values.items()})
        self.accelerator.wait_for_everyone()

    def save(self) -> Path:
        """Write a checkpoint of the present step."""
        progress = {"step": self.step, "seconds": self.seconds, **self._run_facts()}
        return self.checkpoints.write(self.step, lambda folder: self.state.write(folder, progress))

    def _run_facts(self) -> dict:
        """What a checkpoint must have in common with the run that goes on from it."""
        return run_facts(self.config, self.sets, self.global_batch)

    def _restore(self, checkpoints: list[Path]) -> None:
        """Go on from the first of some checkpoints that is whole."""
        for folder, older in itertools.zip_longest(checkpoints, checkpoints[1:]):
            try:
                self._restore_from(folder)
                return
            except FileProblem as problem:
                if older is None:
                    raise
                logger.warning("%s; going back to %s", first_words(problem, 400), older.name)

    def _restore_from(self, folder: Path) -> None:
        record = read_progress(folder, self.config.train.verify)
        changes = check_resume(folder, record.data, self._run_facts())
        self.state.read(folder, record)
        self.step, self.seconds = record.data["step"], record.data["seconds"]
        if changes and self.accelerator.is_main_process:
            logger.warning("%s: going on with changes: %s", folder.name, "; ".join(changes))

    def _export(self) -> None:
        main = self.accelerator.is_main_process
        if main or self.sharded:
            values = self.state.result()
        if main:
            rows = [row for row in self.metrics() if "validation/psnr_db" in row]
            save_adapter(
                self.output / "adapter",
                self.student,
                values,
                self.config,
                base=self.source.name,
                fingerprint=self.dataset.manifest["fingerprint"],
                facts={
                    "steps": self.step,
                    "seconds": round(self.seconds, 1),
                    "samples": len(self.dataset),
                    "global_batch": self.global_batch,
                    "seed": self.config.train.seed,
                    "last_step": self.last,
                    "validation": rows[-1] if rows else None,
                    "validation_before": rows[0] if rows else None,
                },
            )
        self.accelerator.wait_for_everyone()


def _to_float32(value):
    """Floating tensors in fp32, also in tuples and mappings."""
    if torch.is_tensor(value):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _to_float32(x) for name, x in value.items()}
    return tuple(_to_float32(x) for x in value) if isinstance(value, tuple) else value


def train(config: DistillConfig, resume: str | None = None) -> dict[str, float]:
    """Run a configuration to its end; the last step's values. As :class:`Trainer`."""
    return Trainer(config, resume).run()
