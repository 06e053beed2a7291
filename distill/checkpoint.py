"""Checkpoints: folders that are complete or absent, whatever kills the run, and what is in them."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dittfast.files import write_json

from .optim import Average
from .sharding import local, part, sharded_state, whole, whole_state

_COMPLETE = re.compile(r"step-(\d{8})")


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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

    def write(self, step: int, save: Callable[[Path], None]) -> Path:
        """Write the checkpoint of a step; the processes call this together.

        Args:
            save: writes this process's files into the folder it gets; the main process's first.
        """
        final = self.folder / _name(step)
        part = self.folder / f".{_name(step)}.part"
        if not final.exists():
            if self._is_main:
                self._clean()
                part.mkdir(parents=True)
            self._wait()
            save(part)
            self._wait()
            if self._is_main:
                for file in sorted(p for p in part.rglob("*") if p.is_file()):
                    with open(file, "rb+") as handle:
                        os.fsync(handle.fileno())
                _sync_folder(part)
                os.rename(part, final)
                _sync_folder(self.folder)
                self._rotate()
        self._wait()
        return final

    def tidy(self) -> None:
        """Remove what a killed run left behind, and checkpoints that it had no time to rotate.

        The processes call this together, when none of them reads a checkpoint any more.
        """
        self._wait()
        if self._is_main:
            self._clean()
            self._rotate()

    def _rotate(self) -> None:
        for old in self.all()[: -self.keep]:
            gone = old.with_name(f".{old.name}.gone")
            os.rename(old, gone)
            shutil.rmtree(gone)

    def _clean(self) -> None:
        """Remove what was half written or half removed."""
        if self.folder.is_dir():
            for left in self.folder.glob(".step-*"):
                shutil.rmtree(left)


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

    def write(self, folder: Path, progress: dict) -> None:
        """Write this process's files of a checkpoint; of sharded weights all call this together.

        Args:
            progress: plain data that :meth:`read` gives back.

        Raises:
            FloatingPointError: a parameter that is not finite.
        """
        from safetensors.torch import save_file

        main = self.rank == 0
        if main or self.sharded:
            values = self._whole(self.parameters)
            optimizer = self.optimizer.state_dict()
            optimizer = whole_state(optimizer) if self.sharded else optimizer
            averages = {} if self.average is None else self._whole(self.average.values)
        if main:
            broken = [name for name, p in values.items() if not torch.isfinite(p).all()]
            if broken:
                raise FloatingPointError(
                    f"step {progress['step']}: {broken[0]} has values that are not finite; the "
                    f"checkpoints before it are in {folder.parent}"
                )
            save_file(values, folder / "trainable.safetensors")
            if averages:
                save_file(averages, folder / "average.safetensors")
            state = {"optimizer": optimizer}
            if self.scaler is not None:
                state["scaler"] = self.scaler.state_dict()
            torch.save(state, folder / "optimizer.pt")
            updates = self.average.updates if self.average else 0
            write_json(folder / "progress.json", progress | {"updates": updates})
        torch.save(rng_state(), folder / f"rng-{self.rank:05d}.pt")

    def read(self, folder: Path, expected: dict) -> dict:
        """Put a checkpoint back; its progress.

        Args:
            expected: what its progress must say, lest the order of the data change.

        Raises:
            ValueError: it says something else, or holds other parameters.
        """
        from safetensors.torch import load_file

        progress = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        for name, value in expected.items():
            if progress[name] != value:
                raise ValueError(
                    f"{folder} was written with {name} {progress[name]}, this run has {value}; the "
                    "order of its data would change"
                )
        saved = load_file(folder / "trainable.safetensors")
        if saved.keys() != self.parameters.keys():
            raise ValueError(f"{folder} holds other trainable parameters than this run has")
        with torch.no_grad():
            for name, p in self.parameters.items():
                local(p).copy_(part(saved[name], p))
        if self.average is not None:
            averaged = load_file(folder / "average.safetensors")
            for name, x in self.average.values.items():
                x.copy_(part(averaged[name], self.parameters[name]))
            self.average.updates = progress["updates"]
        state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        optimizer = sharded_state(state["optimizer"], list(self.parameters.values()))
        self.optimizer.load_state_dict(optimizer)
        if self.scaler is not None and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])
        rng = folder / f"rng-{self.rank:05d}.pt"
        if rng.is_file():
            set_rng_state(torch.load(rng, weights_only=True))
        return progress


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
