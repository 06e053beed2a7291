"""What each method does to a real run: errors by head, work and seconds, while layers run.

Nothing of a layer outlives its call but numbers, so the memory needed is that of one call of
attention, whatever the length of the run and the number of layers.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from dittfast.attention import method_attention
from dittfast.cache import BytesLRU
from dittfast.measure.timing import clock_for, synchronize
from dittfast.methods.base import Method
from dittfast.methods.memory import Memory
from dittfast.mixture import Assignment, Mixture
from dittfast.schedule import Schedule

from ..adapter import enable
from ..layer import PlannedLayout
from ..measure.method_check import assignment_of
from ..measure.probe import Captured, Recorder
from ..models import execution_device, transformers_of
from ..runs.run import Run, run
from .errors import squares_apart

# Static plans that are kept while a run is recorded; those of a long video are large.
_MOST_KEPT, _MOST_BYTES = 64, 2**30
# Candidates that are timed between two timings of dense attention: a busy machine is now faster,
# now slower, and only seconds of one moment compare.
_BETWEEN = 6
# What a record of one dense run holds.
FORM = {
    "passes": int,
    "calls": [
        {
            "layer": str,
            "step": int,
            "rows": int,
            "heads": int,
            "head_dim": int,
            "size": float,
            "dense_seconds": float,
            "tried": [
                {"error": ([float], None), "seconds": float, "planning": float, "work": float}
            ],
        }
    ],
    "start": [float],
}


def bands(steps: int, count: int) -> list[tuple[int, int]]:
    """``(first, end)`` of at most ``count`` bands of a run's steps, as equal as can be."""
    edges = sorted({round(steps * i / count) for i in range(count + 1)})
    return list(itertools.pairwise(edges))


def middle(band: tuple[int, int]) -> int:
    """The step that stands for a band."""
    return (band[0] + band[1]) // 2


class _Timing:
    """Times attention on the q, k and v of calls that it is told of."""

    def __init__(self, backend: str, device: torch.device):
        self.backend, self.device, self.clock = backend, device, clock_for(device)
        self._kept = BytesLRU(_MOST_KEPT, _MOST_BYTES)

    def now(self) -> float:
        synchronize(self.device)
        return self.clock()

    def dense_seconds(self, call: dict, c: Captured, captured: Captured) -> float:
        """Of PyTorch's attention, for the first batch row."""
        start = self.now()
        F.scaled_dot_product_attention(**call)
        return (self.now() - start) * c.q.shape[0] / captured.q.shape[0]

    def attention(self, method: Method, c: Captured, memory: Memory | None = None):
        """A method's output on captured q, k and v, seconds, those of its planning, and work."""
        device, planned, plans = c.q.device, [], []
        kept = self._kept.get((c.layout, method), lambda: method.keep(c.layout, device))
        method.prepare(c.layout, device)

        def on_plan(plan, heads: int = 1):
            planned.append(self.now())
            plans.append((plan, heads))

        start = self.now()
        out = method_attention(
            method, c.layout, c.q, c.k, c.v, kept=kept, scale=c.scale,
            kv_log_weight=c.kv_log_weight, backend=self.backend, on_plan=on_plan, memory=memory,
        )  # fmt: skip
        seconds = self.now() - start
        counted = PlannedLayout(method, c.layout, kept)
        for plan in plans:
            counted.observe(*plan)
        work = counted.amount(c.q.shape[1], c.q.shape[3]).work
        return out, seconds, planned[0] - start if planned else 0.0, work


class _Turns(_Timing):
    """Times each call both ways: dense attention before and after what a mixture runs there."""

    def __init__(
        self, backend: str, device, assignment: Assignment, total: int, schedule: Schedule
    ):
        super().__init__(backend, device)
        self.assignment, self.total, self.schedule = assignment, total, schedule
        self.dense_layers = schedule.dense_layer_names(list(assignment.heads))
        self.memories: dict[str, Memory] = {}
        self.dense = self.own = 0.0

    def __call__(self, captured: Captured, out: torch.Tensor, call: dict) -> None:
        c = _first_row(captured)
        assigned = self.assignment.at(c.step, self.total)[c.layer]
        if self.schedule.is_dense_step(c.step, self.total) or c.layer in self.dense_layers:
            assigned = None
        memory = self.memories.setdefault(c.layer, Memory(self.schedule.lasting))
        memory.begin(c.step)
        dense = self.dense_seconds(call, c, captured)
        own = None if assigned is None else self.attention(assigned.method, c, memory)[1]
        dense = (dense + self.dense_seconds(call, c, captured)) / 2
        self.dense += dense
        self.own += dense if own is None else own


class _Calls(_Timing):
    """Tries all candidates on each call of attention that it is told of."""

    def __init__(self, methods: Sequence[Method], backend: str, device, told: Callable[[], None]):
        super().__init__(backend, device)
        self.methods, self.told = methods, told
        self.calls: list[dict] = []
        self.starts: list[list[float]] = [[] for _ in methods]

    def __call__(self, captured: Captured, out: torch.Tensor, call: dict) -> None:
        c = _first_row(captured)
        out = out[: c.q.shape[0]]
        first = not self.calls or c.step == self.calls[0]["step"]
        tried: list[dict] = []
        dense = [self.dense_seconds(call, c, captured)]
        for begin in range(0, len(self.methods), _BETWEEN):
            numbers = range(begin, min(begin + _BETWEEN, len(self.methods)))
            own = [self._try(n, c, out, first) for n in numbers]
            dense.append(self.dense_seconds(call, c, captured))
            now = statistics.fmean(dense[-2:])
            tried += [one | {n: one[n] / now for n in ("seconds", "planning")} for one in own]
        usual = statistics.median(dense)
        for one in tried:
            one |= {n: one[n] * usual for n in ("seconds", "planning")}
        self.calls.append(
            {
                "layer": c.layer,
                "step": c.step,
                "rows": captured.q.shape[0],
                "heads": c.q.shape[1],
                "head_dim": c.q.shape[3],
                "size": float(squares_apart(0 * out, out).sum()),
                "dense_seconds": usual,
                "tried": tried,
            }
        )
        self.told()

    def _try(self, number: int, c: Captured, out: torch.Tensor, first: bool) -> dict:
        method = self.methods[number]
        ours, seconds, planning, work = self.attention(method, c)
        if first and c.k.shape[1] > 1:
            self.starts[number].append(self._start(method, c, seconds))
        error = squares_apart(ours, out)
        known = bool(torch.isfinite(error).all())
        return {
            "error": error.tolist() if known else None,
            "seconds": seconds,
            "planning": planning,
            "work": work,
        }

    def _start(self, method: Method, c: Captured, seconds: float) -> float:
        """Seconds of a call that do not grow with its heads, from one for the first keys alone.

        Args:
            seconds: of the same call for all heads, just before.
        """
        groups = c.k.shape[1]
        each = c.q.shape[1] // groups
        weight = c.kv_log_weight
        weight = weight if weight is None else weight[:, :each]
        own = replace(c, q=c.q[:, :each], k=c.k[:, :1], v=c.v[:, :1], kv_log_weight=weight)
        alone = self.attention(method, own)[1]
        return (groups * alone - seconds) / (groups - 1)


def _first_row(c: Captured) -> Captured:
    """The first batch row alone: others may have text of another length."""
    weight = c.kv_log_weight
    weight = weight if weight is None else weight[:1]
    layout = c.layout
    if layout.context_lengths is not None:
        layout = replace(layout, context_lengths=layout.context_lengths[:1])
    return replace(c, q=c.q[:1], k=c.k[:1], v=c.v[:1], kv_log_weight=weight, layout=layout)


@contextlib.contextmanager
def _told(pipe, steps: Iterable[int], told: Callable) -> Iterator[list[torch.nn.Module]]:
    """Inside, ``told`` hears of each call of attention of a dense run's steps; the transformers."""
    models = list(transformers_of(pipe).values())
    with enable(pipe, "dense"):
        for model in models:
            state = model._dittfast
            for name in state.layers:
                state.recorders[name] = Recorder(model, name, frozenset(steps), told)
        yield models


def attention_in_turns(
    pipe, call: dict, seed: int, mixture: Mixture, schedule: Schedule, *, backend: str = "auto"
) -> dict[str, float]:
    """Seconds of all attention of a run: ``dense``, and ``own`` of what a mixture runs instead.

    In one dense run every call is done both ways, one after the other, so that whatever disturbs
    the machine disturbs both. Of a step with several passes the first is taken, and of a batch the
    first row.

    Args:
        schedule: which steps and layers are dense, and how long plans last.

    Raises:
        ValueError: as :func:`dittfast.enable`.
    """
    total = call["num_inference_steps"]
    given = assignment_of(pipe, mixture), total, schedule
    turns = _Turns(backend, execution_device(pipe), *given)
    with _told(pipe, range(total), turns), torch.no_grad():
        run(pipe, call, seed)
    return {"dense": turns.dense, "own": turns.own}


def record(
    pipe,
    call: dict,
    seed: int,
    methods: Sequence[Method],
    steps: Sequence[int],
    *,
    backend: str = "auto",
    on_call: Callable[[], None] = lambda: None,
) -> tuple[Run, dict]:
    """One dense run, in which every method is tried on every layer's q, k and v at some steps.

    Args:
        call: arguments of the pipeline, its prompt among them.
        methods: what is tried; None of their outputs reaches the picture.
        steps: denoising steps, from 0; of a step with several passes the first is taken, and of a
            batch the first row.
        on_call: called after each call of attention.

    Returns:
        The run, whose picture is dense attention's, and numbers of the form :data:`FORM`.

    Raises:
        ValueError: as :func:`dittfast.enable`, or a layer that never attended.
        FloatingPointError: the picture has values that are not finite.
    """
    calls = _Calls(methods, backend, execution_device(pipe), on_call)
    total = call["num_inference_steps"]
    with _told(pipe, steps, calls) as models, torch.no_grad():
        drawn = run(pipe, call, seed)
        passes = sum(model._dittfast.num_passes for model in models)
    return drawn, {
        "passes": max(1, round(passes / total)),
        "calls": calls.calls,
        "start": [statistics.median(x) if x else 0.0 for x in calls.starts],
    }


def check_record(data: dict, methods: Sequence[Method], steps: Sequence[int]) -> None:
    """Raise ValueError where numbers of :data:`FORM` are not of these methods and steps."""
    if len(data["start"]) != len(methods) or data["passes"] < 1 or not data["calls"]:
        raise ValueError("it is the record of another set of methods")
    for one in data["calls"]:
        errors = [x["error"] for x in one["tried"] if x["error"] is not None]
        if len(one["tried"]) != len(methods) or one["step"] not in steps:
            raise ValueError("it is the record of another set of methods or steps")
        if (
            any(len(error) != one["heads"] for error in errors)
            or one["heads"] < 1
            or one["rows"] < 1
        ):
            raise ValueError(f"{one['layer']} was not tried with {one['heads']} heads")
        if not one["size"] > 0:
            raise ValueError(f"the attention of {one['layer']} has the size {one['size']}")
