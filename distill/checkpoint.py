"""Checkpoints: folders that are complete or absent, whatever kills the run, and what is in them."""

from __future__ import annotations

import logging
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dittfast.disk.problems import FileProblem, reading
from dittfast.disk.records import ITSELF, Record, read_record, write_record
from dittfast.disk.tensors import (
    check_finite,
    read_headers,
    read_pickled,
    read_tensors,
    write_pickled,
    write_tensors,
)
from dittfast.files import atomic_folder, remove_folder

from .optim import Average
from .sharding import local, part, sharded_state, whole, whole_state

logger = logging.getLogger(__name__)

PROGRESS = "progress.json"
TRAINABLE, AVERAGE = "trainable.safetensors", "average.safetensors"
OPTIMIZER = "optimizer.pt"
_FORM = {
    "step": int,
    "seconds": float,
    "global_batch": int,
    "seed": int,
    "updates": int,
    "config?": {"*": dict},
    "data?": (int, {"sets": [str], "contents": [(None, str)]}),
}
_COMPLETE = re.compile(r"step-(\d{8})")


def _name(step: int) -> str:
    return f"step-{step:08d}"


class Checkpoints:
    """The checkpoints of a run, oldest first, at most ``keep`` of them.

    A checkpoint is written into a hidden folder and gets its name when all of it is on the disk;
    an old one loses its name before its files go. So every folder named ``step-...`` is whole.

    Args:
        folder: where they lie; made when the first is written. All processes must see it.
        keep: how many stay.
        is_main: whether this process is the one that makes, names and removes folders.
        wait: returns when every process has called it.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        is_main: bool = True,
        wait: Callable[[], None] = lambda: None,
    ):
        self.folder = Path(folder)
        self.keep = keep
        self._is_main = is_main
        self._wait = wait

    def all(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if _COMPLETE.fullmatch(p.name))

    def latest(self) -> Path | None:
        """The newest complete checkpoint; None where there is none."""
        return self.all()[-1] if self.all() else None

    def write(self, step: int, save: Callable[[Path], dict]) -> Path:
        """Write the checkpoint of a step; the processes call this together.

        Args:
            save: writes this process's files into the folder it gets, and returns the progress,
                plain data. The main process's goes into ``progress.json``, with the SHA-256 of all
                files.
        """
        final = self.folder / _name(step)
        if not final.exists():
            if self._is_main:
                self._clean()
                with atomic_folder(final) as part:
                    self._wait()
                    progress = save(part)
                    self._wait()
                    files = [str(p.relative_to(part)) for p in part.rglob("*") if p.is_file()]
                    write_record(part / PROGRESS, progress, files)
                self._rotate()
            else:
                self._wait()
                save(self.folder / f".{final.name}.part")
                self._wait()
        self._wait()
        return final

    def tidy(self, step: int) -> None:
        """Remove what a killed run left behind, and checkpoints that it had no time to rotate.

        The processes call this together, when none of them reads a checkpoint any more.

        Args:
            step: where the run goes on. Checkpoints after it are damaged, or of a run that was
                given up; they would stand in the way of those that are written now.
        """
        self._wait()
        if self._is_main:
            self._clean()
            for later in self.all():
                if later.name > _name(step):
                    logger.warning("removing %s: the run goes on from step %d", later, step)
                    remove_folder(later)
            self._rotate()

    def _rotate(self) -> None:
        for old in self.all()[: -self.keep]:
            remove_folder(old)

    def _clean(self) -> None:
        """Remove what was half written or half removed."""
        if self.folder.is_dir():
            for left in self.folder.glob(".step-*"):
                shutil.rmtree(left)


def read_progress(folder: Path, verify: bool = True) -> Record:
    """What a checkpoint says of itself; all of its files are what was written, or it is refused.

    Raises:
        FileProblem: a file of it is damaged or missing.
    """
    if not (folder / PROGRESS).is_file():
        raise FileProblem(folder / PROGRESS, "it is missing", "this is no checkpoint of a run")
    record = read_record(folder / PROGRESS, _FORM, verify=verify)
    for name in record.sums:
        if name != ITSELF:
            if not (folder / name).is_file():
                raise FileProblem(folder / name, "it is missing")
            record.check(name)
    return record


class RunState:
    """All that a checkpoint holds of a run: weights, averages, optimiser and random generators.

    Args:
        parameters: what is trained, by name.
        average: their averages, or None.
        optimizer, scaler: as accelerate prepared them; the scaler is of fp16, else None.
        rank: of this process; the first one writes what all have in common.
        sharded: whether each process holds a part of the weights.
    """

    def __init__(
        self,
        parameters: dict[str, torch.nn.Parameter],
        average: Average | None,
        optimizer,
        scaler=None,
        *,
        rank: int = 0,
        sharded: bool = False,
    ):
        self.parameters = parameters
        self.average = average
        self.optimizer = optimizer
        self.scaler = scaler
        self.rank = rank
        self.sharded = sharded

    def _whole(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Values of the parameters on the CPU, in their whole shapes."""
        return {n: whole(x, self.parameters[n]).contiguous() for n, x in values.items()}

    def result(self) -> dict[str, torch.Tensor]:
        """What the run leaves: the averages where there are any, on the CPU, whole.

        Of sharded weights all processes call this together.
        """
        return self._whole({**self.parameters, **(self.average.values if self.average else {})})

    def write(self, folder: Path, progress: dict) -> dict:
        """Write this process's files of a checkpoint; of sharded weights all call this together.

        Args:
            progress: plain data.

        Returns:
            The progress that the checkpoint keeps, which :meth:`read` gives back.

        Raises:
            FloatingPointError: a parameter, an average or a value of the optimiser's that is not
                finite.
        """
        main = self.rank == 0
        if main or self.sharded:
            values = self._whole(self.parameters)
            optimizer = self.optimizer.state_dict()
            optimizer = whole_state(optimizer) if self.sharded else optimizer
            averages = {} if self.average is None else self._whole(self.average.values)
        if main:
            kept = {"": values, "the average of ": averages, "the optimiser's ": _flat(optimizer)}
            for whose, tensors in kept.items():
                broken = [name for name, x in tensors.items() if not torch.isfinite(x).all()]
                if broken:
                    raise FloatingPointError(
                        f"step {progress['step']}: {whose}{broken[0]} has values that are not "
                        f"finite; the checkpoints before it are in {folder.parent}"
                    )
            write_tensors(folder / TRAINABLE, values)
            if averages:
                write_tensors(folder / AVERAGE, averages)
            state = {"optimizer": optimizer}
            if self.scaler is not None:
                state["scaler"] = self.scaler.state_dict()
            write_pickled(folder / OPTIMIZER, state)
        write_pickled(folder / f"rng-{self.rank:05d}.pt", rng_state())
        return progress | {"updates": self.average.updates if self.average else 0}

    def read(self, folder: Path, record: Record) -> None:
        """Put a checkpoint back, once all of its files are read and found good.

        Args:
            record: of :func:`read_progress`.

        Raises:
            FileProblem: a file of it is damaged.
            ValueError: it holds other parameters.
        """
        saved = self._read_values(folder / TRAINABLE)
        averaged = None
        if self.average is not None and (folder / AVERAGE).is_file():
            averaged = self._read_values(folder / AVERAGE)
        path = folder / OPTIMIZER
        state = read_pickled(path)
        with reading(path, "it is no state of the optimiser"):
            check_finite(path, _flat(state["optimizer"]))
            optimizer = sharded_state(state["optimizer"], list(self.parameters.values()))
        rng = folder / f"rng-{self.rank:05d}.pt"
        generators = read_pickled(rng) if rng.is_file() else None
        with reading(path, "it is no state of this optimiser"):
            self.optimizer.load_state_dict(optimizer)
            if self.scaler is not None and "scaler" in state:
                self.scaler.load_state_dict(state["scaler"])
        with torch.no_grad():
            for name, p in self.parameters.items():
                local(p).copy_(part(saved[name], p))
            if self.average is not None:
                if averaged is None:
                    logger.warning("%s has no averages; they begin with its weights", folder)
                for name, x in self.average.values.items():
                    x.copy_(part((averaged or saved)[name], self.parameters[name]))
                self.average.updates = record.data["updates"] if averaged else 0
        if generators is not None:
            with reading(rng, "it is no state of random generators"):
                set_rng_state(generators)

    def _read_values(self, path: Path) -> dict[str, torch.Tensor]:
        """Values of all trained parameters, in their whole shapes, finite."""
        if not path.is_file():
            raise FileProblem(path, "it is missing")
        there = {name: header.shape for name, header in read_headers(path).items()}
        wanted = {name: tuple(p.shape) for name, p in self.parameters.items()}
        if there != wanted:
            odd = next(n for n in {**wanted, **there} if there.get(n) != wanted.get(n))
            raise ValueError(
                f"{path} holds other trainable parameters than this run has ({odd} is the first); "
                "go on with the student's settings from before"
            )
        values = read_tensors(path)
        check_finite(path, values)
        return values


def _flat(optimizer: dict) -> dict[str, torch.Tensor]:
    """The floating-point tensors of an optimiser's state."""
    return {
        f"{name} of parameter {index}": x
        for index, values in optimizer["state"].items()
        for name, x in values.items()
        if torch.is_tensor(x) and x.is_floating_point()
    }


def rng_state() -> dict:
    """The state of every random generator of this process, as ``torch.save`` takes it."""
    version, internal, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": (version, internal, gauss),
        "numpy": (kind, torch.from_numpy(keys.copy()), *rest),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict) -> None:
    """Undo what happened to the generators since :func:`rng_state`."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy(), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
