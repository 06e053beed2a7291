"""Which of the user's denoising steps a forward pass belongs to.

A step is one of the ``num_inference_steps`` of the pipeline that is running. Its loop goes through
the scheduler's ``timesteps``, from the first one or a later one (image to image), and a scheduler
may have several timesteps in one step.
"""

from __future__ import annotations

import logging
import threading
import weakref

import torch

from .running import running

logger = logging.getLogger(__name__)


def user_step(scheduler, index: int, begin: int = 0) -> tuple[int, int]:
    """``(0-based step, number of steps)`` of the pass at ``scheduler.timesteps[index]``.

    Args:
        scheduler: a diffusers scheduler after ``set_timesteps``.
        index: the timestep that the pass evaluates.
        begin: the timestep that the run began with.

    Second-order schedulers (``order`` 2: Heun, KDPM2) take two timesteps a step, one in the last.
    PNDM's first step takes two, as its second evaluation goes back and corrects the first; with
    its Runge-Kutta start the first steps take four.
    """
    count = len(scheduler.timesteps)
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) == count:
        count -= 1  # the last timestep is the end of the last step: no pass is made there
    start = getattr(scheduler, "prk_timesteps", None)
    if start is not None:
        last = _pndm_step(count - begin - 1, len(start))
        return _pndm_step(index - begin, len(start)), last + 1
    order = getattr(scheduler, "order", 1)
    return index // order - begin // order, -(-count // order) - begin // order


def _pndm_step(call: int, runge_kutta: int) -> int:
    if not runge_kutta:
        return max(call - 1, 0)
    return call // 4 if call < runge_kutta else runge_kutta // 4 + call - runge_kutta


def place_in(timesteps: torch.Tensor, t: torch.Tensor) -> int | None:
    """Which of ``timesteps [N]`` the tensor ``t`` is a view of; None where it is none.

    A loop over a tensor gets views into its memory. Their place there is the number of the
    timestep, known without reading its value, so nothing waits for the device.
    """
    memory = timesteps.untyped_storage().data_ptr()
    if not memory or t.untyped_storage().data_ptr() != memory:
        return None
    if any(n > 1 and stride for n, stride in zip(t.shape, t.stride())):
        return None
    index, rest = divmod(t.storage_offset() - timesteps.storage_offset(), timesteps.stride(0))
    return index if not rest and 0 <= index < len(timesteps) else None


def place_in_own_table(pipe, t: torch.Tensor) -> tuple[int, int] | None:
    """``(row, rows)`` where ``t`` is a row of a table that the pipeline made itself.

    Diffusion forcing gives every frame a timestep of its own and steps copies of its scheduler:
    it loops over a table ``[num_timesteps, frames]``. Its steps are those passes, in which
    different frames may be at different noise levels.
    """
    rows = getattr(pipe, "num_timesteps", None)
    size = t.numel()
    if not isinstance(rows, int) or not size or not t.is_contiguous():
        return None
    row, rest = divmod(t.storage_offset(), size)
    table = t.untyped_storage().nbytes() // t.element_size()
    return (row, rows) if not rest and table == rows * size else None


def first_timestep(scheduler, pipe) -> int | None:
    """Which timestep the run begins with, as scheduler or pipeline tell; None where neither does.

    Image-to-image pipelines mostly tell the scheduler. Those that do not leave the number of
    timesteps that they go through.
    """
    begin = getattr(scheduler, "begin_index", None)
    if begin is None:
        through = getattr(pipe, "num_timesteps", None)
        if isinstance(through, int) and 0 < through <= len(scheduler.timesteps):
            begin = len(scheduler.timesteps) - through
    return begin


def timestep_by_counter(scheduler, first: int) -> int | None:
    """Which timestep a scheduler's own counter is at; None before its first step, or without one.

    Args:
        first: the timestep that the run began with.
    """
    if hasattr(scheduler, "prk_timesteps"):
        return first + scheduler.counter
    return getattr(scheduler, "step_index", None)


class TimestepCounter:
    """Counts steps by the timestep: lower is the next step, equal the same, higher a new run.

    For models without a pipeline, and schedulers that tell nothing. Reading the timestep waits
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


class _Run:
    """What is remembered of one ``set_timesteps``: where its run began, and a counter."""

    def __init__(self):
        self.counter = TimestepCounter()
        self.idle = False  # whether another scheduler is the one that runs
        self.warned = False
        self._begin = self._last = -1

    def by_value(self, timestep) -> int:
        if timestep is None:
            raise ValueError(
                "dense_first_steps and dense_last_steps, rules for some steps and plans that last "
                "need the step of this forward pass, and it has neither a timestep nor a pipeline "
                "whose scheduler tells it; call dittfast.enable on the pipeline"
            )
        return self.counter.read(timestep)

    def begin(self, scheduler, pipe, index: int) -> int:
        """The first timestep of the run that is at ``index`` now."""
        if self._last < 0 or index < self._last:
            told = first_timestep(scheduler, pipe)
            self._begin = told if told is not None and told <= index else index
        self._last = index
        return self._begin


class Steps:
    """Tells the step of each pass, and remembers of every scheduler's run what that takes.

    For any number of threads, whose pipelines share a transformer and have a scheduler each.
    """

    def __init__(self):
        self._runs: dict[int, tuple[weakref.ref, _Run]] = {}
        self._alone = threading.local()

    @property
    def run(self) -> object:
        """What stands for the run that this thread's last pass belonged to: another in each run."""
        return getattr(self._alone, "latest", None)

    def read(self, model: torch.nn.Module, enabled, timestep) -> tuple[int, int | None]:
        """``(0-based step, number of steps)`` of the pass that begins now.

        Its pipeline is the one whose loop calls ``model``, else ``enabled``. The place of the
        loop's timestep among a scheduler's tells the step. Where the loop has no such timestep,
        the scheduler's counter does, and if it has none, the value of the timestep.

        Args:
            model: the transformer that is called.
            enabled: the pipeline or transformer given to ``enable``; None if it is gone.
            timestep: of this pass, falling from step to step: a tensor, a number, or None.

        Returns:
            The number is None where no scheduler runs, so that the timestep alone tells the step.

        Raises:
            ValueError: there is neither a scheduler that tells the step nor a timestep.
        """
        self._alone.latest = None
        loops = running(model)
        pipes = loops.pipelines or [enabled]
        pairs = [(pipe, getattr(pipe, "scheduler", None)) for pipe in pipes]
        pairs += [(None, scheduler) for scheduler in loops.schedulers]
        given = [timestep] if isinstance(timestep, torch.Tensor) else []
        for pipe, scheduler in pairs:
            timesteps = getattr(scheduler, "timesteps", None)
            if not isinstance(timesteps, torch.Tensor) or timesteps.ndim != 1:
                continue
            for t in loops.times + given:
                index = place_in(timesteps, t)
                if index is not None:
                    begin = self._run(timesteps).begin(scheduler, pipe, index)
                    return user_step(scheduler, index, begin)
        for t in loops.times:
            place = place_in_own_table(pipes[0], t)
            if place is not None:
                return place
        pipe = next((pipe for pipe in pipes if pipe is enabled), pipes[0])
        return self._count(pipe, timestep)

    def _run(self, timesteps) -> _Run:
        if timesteps is None:
            if not hasattr(self._alone, "run"):
                self._alone.run = _Run()
            self._alone.latest = self._alone.run
            return self._alone.run
        runs, key = self._runs, id(timesteps)
        of, run = runs.get(key, (lambda: None, None))
        if of() is not timesteps:
            run = _Run()
            runs[key] = weakref.ref(timesteps, lambda _: runs.pop(key, None)), run
        self._alone.latest = run
        return run

    def _count(self, pipe, timestep) -> tuple[int, int | None]:
        """The step by the scheduler's counter, or by the value of the timestep."""
        scheduler = getattr(pipe, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        run = self._run(timesteps)
        if timesteps is None or getattr(scheduler, "num_inference_steps", 0) is None:
            return run.by_value(timestep), None
        first = first_timestep(scheduler, pipe) or 0
        index = timestep_by_counter(scheduler, first)
        if index is None:
            step = run.by_value(timestep)
            if not hasattr(scheduler, "step_index"):
                return step, user_step(scheduler, first, first)[1]
            # No call yet is right in the first step. Where the timestep has changed since,
            # another scheduler is the one that runs.
            index = first
            run.idle |= step > 0
        elif index >= len(timesteps) and not run.idle:
            run.idle, run.counter = True, TimestepCounter()
        if not run.idle:
            return user_step(scheduler, index, run.begin(scheduler, pipe, index))
        step = run.by_value(timestep)
        if step and not run.warned:
            run.warned = True
            logger.warning(
                "steps: %s.scheduler (%s) is not the scheduler that runs, so steps are counted by "
                "the value of the timestep and their number is not known; give the one that runs "
                "to the pipeline (pipe.scheduler = ...)",
                type(pipe).__name__, type(scheduler).__name__,
            )  # fmt: skip
        return step, None
