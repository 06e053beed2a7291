"""Checkpoints as folders that are complete or absent, whatever kills the run."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

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
