"""What each method does to a real run: errors by head, and seconds, measured while layers run.

Nothing of a layer outlives its call but numbers, so the memory needed is that of one call of
attention, whatever the length of the run and the number of layers.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from dittfast.attention import method_attention
from dittfast.cache import BytesLRU
from dittfast.measure.timing import clock_for, synchronize
from dittfast.methods.base import Method

from ..adapter import enable
from ..measure.probe import Captured, Recorder
from ..models import execution_device, transformers_of
from ..runs.run import Run, run
from .errors import squares_apart
from .sensitivity import LayerSensitivity

# Static plans that are kept while a run is recorded; those of a long video are large.
_MOST_KEPT, _MOST_BYTES = 64, 2**30
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
            "sensitivity": float,
            "tried": [{"error": ([float], None), "seconds": float, "planning": float}],
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


class _Calls:
    """Tries all candidates on each call of attention that it is told of."""

    def __init__(self, methods: Sequence[Method], backend: str, device, told: Callable[[], None]):
        self.methods, self.backend, self.device, self.told = methods, backend, device, told
        self.clock = clock_for(device)
        self.calls: list[dict] = []
        self.starts: list[list[float]] = [[] for _ in methods]
        self._kept = BytesLRU(_MOST_KEPT, _MOST_BYTES)

    def __call__(self, captured: Captured, out: torch.Tensor, call: dict) -> None:
        c = _first_row(captured)
        out = out[: c.q.shape[0]]
        first = not any(x["step"] == c.step for x in self.calls)
        start = self.now()
        F.scaled_dot_product_attention(**call)
        dense_seconds = (self.now() - start) * c.q.shape[0] / captured.q.shape[0]
        tried = []
        for number, method in enumerate(self.methods):
            ours, seconds, planning = self._attention(method, number, c)
            error = squares_apart(ours, out)
            known = bool(torch.isfinite(error).all())
            tried.append(
                {
                    "error": error.tolist() if known else None,
                    "seconds": seconds,
                    "planning": planning,
                }
            )
            if first and c.k.shape[1] > 1:
                self.starts[number].append(self._start(method, number, c, seconds))
        self.calls.append(
            {
                "layer": c.layer,
                "step": c.step,
                "rows": captured.q.shape[0],
                "heads": c.q.shape[1],
                "head_dim": c.q.shape[3],
                "size": float(squares_apart(0 * out, out).sum()),
                "dense_seconds": dense_seconds,
                "tried": tried,
            }
        )
        self.told()

    def _start(self, method: Method, number: int, c: Captured, seconds: float) -> float:
        """Seconds of a call that do not grow with its heads, from one for the first keys alone."""
        groups = c.k.shape[1]
        each = c.q.shape[1] // groups
        weight = c.kv_log_weight
        weight = weight if weight is None else weight[:, :each]
        own = replace(c, q=c.q[:, :each], k=c.k[:, :1], v=c.v[:, :1], kv_log_weight=weight)
        alone = self._attention(method, number, own)[1]
        return (groups * alone - seconds) / (groups - 1)

    def now(self) -> float:
        synchronize(self.device)
        return self.clock()

    def _attention(self, method: Method, number: int, c: Captured):
        """The output of a method on captured q, k and v, its seconds, and those of its planning."""
        device, planned = c.q.device, []
        kept = self._kept.get((c.layout, number), lambda: method.keep(c.layout, device))
        method.prepare(c.layout, device)
        start = self.now()
        out = method_attention(
            method, c.layout, c.q, c.k, c.v, kept=kept, scale=c.scale,
            kv_log_weight=c.kv_log_weight, backend=self.backend,
            on_plan=lambda plan: planned.append(self.now()),
        )  # fmt: skip
        seconds = self.now() - start
        return out, seconds, planned[0] - start if planned else 0.0


def _first_row(c: Captured) -> Captured:
    """The first batch row alone: others may have text of another length."""
    weight = c.kv_log_weight
    weight = weight if weight is None else weight[:1]
    layout = c.layout
    if layout.context_lengths is not None:
        layout = replace(layout, context_lengths=layout.context_lengths[:1])
    return replace(c, q=c.q[:1], k=c.k[:1], v=c.v[:1], kv_log_weight=weight, layout=layout)


def record(
    pipe,
    call: dict,
    seed: int,
    methods: Sequence[Method],
    steps: Sequence[int],
    *,
    strength: float,
    backend: str = "auto",
    on_call: Callable[[], None] = lambda: None,
) -> tuple[Run, dict]:
    """One dense run, in which every method is tried on every layer's q, k and v at some steps.

    At each of these steps the transformer also runs once more for each layer, with noise in that
    layer's attention (:class:`~.sensitivity.LayerSensitivity`).

    Args:
        call: arguments of the pipeline, its prompt among them.
        methods: what is tried; None of their outputs reaches the picture.
        steps: denoising steps, from 0; of a step with several passes the first is taken, and of a
            batch the first row.
        strength: of the noise, relative to the layer's output.
        on_call: called after each call of attention.

    Returns:
        The run, whose picture is dense attention's, and numbers of the form :data:`FORM`.

    Raises:
        ValueError: as :func:`dittfast.enable`, or a layer that never attended.
        FloatingPointError: the picture has values that are not finite.
    """
    models = transformers_of(pipe)
    calls = _Calls(methods, backend, execution_device(pipe), on_call)
    with contextlib.ExitStack() as stack, torch.no_grad():
        stack.enter_context(enable(pipe, "dense"))
        sensitive = []
        for model in models.values():
            state = model._dittfast
            for name in state.layers:
                state.recorders[name] = Recorder(model, name, frozenset(steps), calls)
            state.guidance = LayerSensitivity(steps, strength)
            sensitive.append(state.guidance)
        drawn = run(pipe, call, seed)
        passes = sum(model._dittfast.num_passes for model in models.values())
    found = {key: value for guidance in sensitive for key, value in guidance.found.items()}
    for one in calls.calls:
        one["sensitivity"] = found[one["layer"], one["step"]]
    total = call["num_inference_steps"]
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
