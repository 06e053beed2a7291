"""Which denoising step a forward pass belongs to."""

from __future__ import annotations

import torch


def scheduler_step(scheduler) -> tuple[int, int] | None:
    """``(0-based step, number of steps)`` from a scheduler's own counter; None where it has none.

    The counter moves once per ``scheduler.step``, so batched and two-call guidance, caches that
    skip calls, and two transformers sharing a scheduler all read the same step, without waiting
    for a device. An image-to-image run starts at ``begin_index`` of the full schedule and counts
    as step 0 there.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or not hasattr(scheduler, "step_index"):
        return None
    begin = scheduler.begin_index or 0
    step = scheduler.step_index
    return (begin if step is None else step) - begin, len(timesteps) - begin


class TimestepCounter:
    """Counts steps by the timestep: lower is the next step, equal the same, higher a new run.

    For models without a pipeline, and schedulers without a counter. Reading the timestep waits
    for the device; two runs of a single step each look like one.
    """

    def __init__(self):
        self.last: float | None = None
        self.step = 0

    def read(self, timestep: torch.Tensor | float) -> int:
        """The 0-based step of a forward pass at ``timestep`` (any shape; the largest counts)."""
        now = float(timestep.max()) if isinstance(timestep, torch.Tensor) else float(timestep)
        if self.last is None or now > self.last:
            self.step = 0
        elif now < self.last:
            self.step += 1
        self.last = now
        return self.step


def timestep_step(scheduler, counter: TimestepCounter, timestep) -> tuple[int, int | None]:
    """The step by timestep, and the number of steps where a scheduler knows it."""
    timesteps = getattr(scheduler, "timesteps", None)
    return counter.read(timestep), None if timesteps is None else len(timesteps)
