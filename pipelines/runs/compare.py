"""Run a pipeline dense and sparse from one seed, and say what was measured and how."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from dittfast.measure.metrics import SSIM_WINDOW, image_tensor, psnr, ssim
from dittfast.measure.timing import in_turns
from dittfast.methods.amount import Amount
from dittfast.methods.base import Method
from dittfast.methods.head_guidance import HeadGuidance
from dittfast.schedule import Schedule

from ..adapter import enable
from ..description import Description, describe
from ..guidance.plain import guide
from .call import check_ranges
from .positions import check_position_scale, positions_scaled
from .run import Run, Timing, run
from .settings import run_settings
from .sources import Source


@dataclass(frozen=True)
class Arm:
    """One way of drawing: its first run's picture, and the timings of all its runs."""

    name: str
    run: Run
    timings: tuple[Timing, ...]
    description: Description | None = None

    @property
    def seconds_per_step(self) -> float | None:
        """The median over the steps of all runs."""
        steps = [s for t in self.timings for s in t.steps]
        return statistics.median(steps) if steps else None

    @property
    def seconds(self) -> float:
        """The median of the whole calls."""
        return statistics.median(t.total for t in self.timings)

    @property
    def did_not_run(self) -> str | None:
        """Why the method of this arm ran nowhere; None where it ran, and for dense attention."""
        return None if self.description is None else self.description.did_not_run

    @property
    def density(self) -> float | None:
        """Kept fraction of token pairs in sparse layers; 1 if there are none, None if it varies."""
        if self.description is None or self.did_not_run is not None:
            return 1.0
        return self.description.density

    @property
    def amount(self) -> Amount:
        """The density, or FLOPs where the method computes its own output."""
        work = 1.0 if self.density == 1 or self.description is None else self.description.work
        return Amount(self.density, work)

    def to_dict(self) -> dict:
        """Plain data, for JSON."""
        return {
            "density": self.density,
            "work": self.amount.work,
            "seconds_per_step": self.seconds_per_step,
            "seconds": self.seconds,
            "runs": [dataclasses.asdict(t) for t in self.timings],
            "peak_memory_bytes": self.run.peak_memory,
        }


class Way(Protocol):
    """What draws otherwise than dense attention and is no method alone: a trained adapter."""

    name: str

    def __call__(self, pipe, schedule: dict) -> contextlib.AbstractContextManager:
        """Inside, the pipeline draws so; ``schedule`` holds fields that win over its own."""

    def digest(self) -> str:
        """Tells it from others of its name."""


def installed(
    pipe,
    method: Method | Way | None,
    schedule: Schedule | None = None,
    backend: str = "auto",
    changes: dict | None = None,
) -> contextlib.AbstractContextManager:
    """Inside, the pipeline draws by a method or way; for None as it is.

    Args:
        changes: fields of the schedule that win.
    """
    if method is None:
        return contextlib.nullcontext()
    if isinstance(method, Method):
        return enable(
            pipe, method, schedule=replace(schedule or Schedule(), **changes or {}), backend=backend
        )
    return method(pipe, changes or {})


_EVERY_STEP = {"dense_first_steps": 0, "dense_last_steps": 0}


def draw(
    pipe,
    call: dict,
    seed: int = 0,
    method: Method | Way | None = None,
    schedule: Schedule | None = None,
    *,
    backend: str = "auto",
    guidance: HeadGuidance | None = None,
    position_scale: float = 1.0,
    position_until: float = 0.0,
    warm_up: bool = False,
) -> tuple[Run, Description | None]:
    """One run with a method or, for None, with dense attention; and what ran where.

    Args:
        method: a method with its ``schedule`` and ``backend``, or a :class:`Way`, which knows its
            own.
        position_scale, position_until: of the image's position ids
            (:func:`~dittfast.pipelines.runs.positions.positions_scaled`).
        warm_up: take one step, and none that the schedule keeps dense, so that the method runs.
    """
    if warm_up:
        call = call | {"num_inference_steps": 1}
    with contextlib.ExitStack() as stack:
        stack.enter_context(positions_scaled(pipe, position_scale, position_until))
        changes = _EVERY_STEP if warm_up else {}
        stack.enter_context(installed(pipe, method, schedule, backend, changes))
        if guidance is not None:
            stack.enter_context(guide(pipe, guidance))
        drawn = run(pipe, call, seed)
        return drawn, None if method is None else describe(pipe)


def generate(
    pipe,
    call: dict,
    method: Method | Way | None = None,
    schedule: Schedule | None = None,
    *,
    guidance: HeadGuidance | None = None,
    position_scale: float = 1.0,
    position_until: float = 0.0,
    backend: str = "auto",
    seed: int = 0,
    compare: bool = False,
    runs: int = 1,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> list[Arm]:
    """Draw with a method or with dense attention, or with both to compare them.

    All runs use the same pipeline, arguments and noise. With ``compare`` each arm is warmed up by
    a run of one step (without the schedule's dense steps, so that the method does run), and the
    timed runs of the arms take turns.

    Args:
        call: see :func:`call_arguments`.
        method: None for dense attention alone; else as :func:`draw`.
        guidance, position_scale, position_until: as :func:`draw`, of every run, dense and sparse.
        runs: timed runs of each arm.
        on_stage: called with the name of what comes next.

    Returns:
        The arms: dense (with ``compare`` or without a method), then the method's.

    Raises:
        ValueError: ``compare`` without a method, a seed or number of runs out of range, a model
            that is given no positions, and as :func:`~dittfast.pipelines.adapter.enable`.
        FloatingPointError: as :func:`run`.
    """
    check_ranges(prompt=call["prompt"], seed=seed, runs=runs)
    check_position_scale(position_scale, position_until)
    if compare and method is None:
        raise ValueError("there is nothing to compare dense attention with; choose a method")
    arms: list[tuple[str, Method | Way | None]] = []
    if compare or method is None:
        arms.append(("dense", None))
    if method is not None:
        arms.append((method.name, method))
    how = {
        "backend": backend,
        "guidance": guidance,
        "position_scale": position_scale,
        "position_until": position_until,
    }
    if compare:
        for name, chosen in arms:
            on_stage(f"{name}, warm-up")
            draw(pipe, call, seed, chosen, schedule, **how, warm_up=True)
    drawn: list[list[tuple[Run, Description | None]]] = [[] for _ in arms]
    for turn, index in in_turns(range(len(arms)), runs):
        name, chosen = arms[index]
        on_stage(name if runs == 1 else f"{name}, run {turn + 1} of {runs}")
        drawn[index].append(draw(pipe, call, seed, chosen, schedule, **how))
    return [
        Arm(name, results[0][0], tuple(r.timing for r, _ in results), results[0][1])
        for (name, _), results in zip(arms, drawn)
    ]


def quality(dense: Run, other: Run) -> dict:
    """PSNR in dB (None if the pictures are identical) and SSIM (None below 11 px) of 8-bit values.

    The PSNR of a video is that of all its frames together; its SSIM is the mean over frames.
    """
    a, b = image_tensor(dense.frames), image_tensor(other.frames)
    identical = np.array_equal(dense.frames, other.frames)
    large = min(dense.frames.shape[1:3]) >= SSIM_WINDOW
    return {
        "identical": identical,
        "psnr_db": None if identical else psnr(a, b),
        "ssim": ssim(a, b) if large else None,
    }


def describe_run(pipe, source: Source, call: dict, seed: int, guidance=None) -> dict:
    """What was asked for, of what and where, as plain data for JSON."""
    guided = None if guidance is None else dataclasses.asdict(guidance)
    own = {"prompt": call["prompt"], "seed": seed, "guidance": guided}
    return run_settings(pipe, source, call) | own


def record(
    pipe,
    source: Source,
    call: dict,
    seed: int,
    arms: list[Arm],
    guidance: HeadGuidance | None = None,
    position_scale: float = 1.0,
    position_until: float = 0.0,
) -> dict:
    """Everything needed to repeat a run and to judge its numbers, as plain data for JSON.

    Where the method ran nowhere, ``did_not_run`` says why, and there are no ratios.
    """
    last = arms[-1]
    data = describe_run(pipe, source, call, seed, guidance)
    data |= {"position_scale": position_scale, "position_until": position_until}
    data["attention"] = None if last.description is None else last.description.to_dict()
    data["did_not_run"] = last.did_not_run
    if len(arms) == 1:
        data["measured"] = f"{len(last.timings)} run(s), the first not warmed up"
        return data | {"timing": last.to_dict()}
    dense, sparse = arms
    data["measured"] = (
        f"{len(sparse.timings)} run(s) of each arm, taking turns, after a warm-up run of 1 step "
        "each; seconds_per_step is the median step, seconds the median whole call"
    )
    per_step = whole = None  # two runs of dense attention have no ratio
    if last.did_not_run is None:
        whole = dense.seconds / sparse.seconds
        if dense.seconds_per_step and sparse.seconds_per_step:
            per_step = dense.seconds_per_step / sparse.seconds_per_step
    return data | {
        "dense": dense.to_dict(),
        "sparse": sparse.to_dict(),
        "dense_over_sparse": {"per_step": per_step, "whole": whole},
        "against_dense": quality(dense.run, sparse.run),
    }
