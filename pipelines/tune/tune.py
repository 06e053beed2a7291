"""Tuning: a budget in, a preset with its proof out."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dittfast.disk.locks import locked
from dittfast.disk.records import write_record
from dittfast.files import write_text
from dittfast.measure.report import html_report, read_results

from ..measure.fidelity import evaluate_fidelity
from ..runs.positions import positions_scaled
from ..runs.sources import Source
from .measuring import Measuring
from .prediction import Prediction
from .preset import preset_data, write_preset
from .report import summary_tables
from .searching import Drawn, Search
from .task import Task


@dataclass(frozen=True)
class Tuned:
    """A finished tuning: the preset's file and data, and all that was found on the way.

    Attributes:
        seconds: on the wall, of all tunings in this folder up to its end.
    """

    preset: Path
    data: dict
    found: dict
    report: Path
    seconds: float


def tune(
    pipe,
    source: Source,
    call: dict,
    task: Task,
    folder: str | Path,
    *,
    position_scale: float = 1.0,
    kernel: str = "auto",
    backend: str = "auto",
    verify: bool = True,
    loading: dict | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Tuned:
    """Find the cheapest methods for layers, heads and steps within a budget, and prove them.

    Everything measured is written down as it is measured: called again with the same arguments, a
    killed tuning goes on where it was and ends with the same preset.

    Args:
        pipe: a pipeline that dittfast can read, not enabled.
        call: see :func:`~dittfast.pipelines.runs.call.call_arguments`; its prompt is replaced.
        folder: gets preset.yaml, its report, and all that was measured.
        position_scale: of position ids in all runs
            (:func:`~dittfast.pipelines.runs.positions.positions_scaled`).
        kernel: of PyTorch's dense attention, as in
            :func:`~dittfast.pipelines.measure.fidelity.dense_kernel`.
        backend: as in :func:`dittfast.attend`.
        verify: compare what is there with its SHA-256.
        loading: what was put into the pipeline, as plain data.

    Raises:
        ImpossibleBudget: the budget cannot be held.
        ValueError: a folder of another tuning, or as :func:`dittfast.enable`.
        FloatingPointError: a picture has values that are not finite.
        OSError: something could not be written; what was measured before stays.
    """
    folder = Path(folder)
    loaded = (loading or {}) | {"position_scale": position_scale}
    with locked(folder), positions_scaled(pipe, position_scale):
        given = (kernel, backend, verify, loaded, on_stage)
        measured = Measuring(pipe, source, call, task, folder, *given)
        prediction = measured.prediction()
        search = Search(measured, prediction)
        best, rounds = search.search()
        best = search.lasting(best)
        return _finish(measured, prediction, best, rounds)


def _finish(measured: Measuring, prediction: Prediction, best: Drawn, rounds: list[Drawn]) -> Tuned:
    """Time the preset, check it, and write it with its report."""
    drawn = measured.folder / "drawn"
    arm = measured.variant(best.label, best.mixture, best.schedule)
    best.held_out.setdefault("speedup", measured.speed(prediction, best.assigned, arm))
    calls = measured.whole_calls(arm) if measured.task.gpu is None else []
    measured.progress.begin("checking attention, and the report", 1)
    results = evaluate_fidelity(
        measured.pipe, measured.source, measured.call, measured.task.held_out, [arm.variant],
        drawn, kernel=measured.kernel, verify=measured.verify, loading=measured.loading,
    )  # fmt: skip
    write_record(drawn / "fidelity.json", results)
    planning, total = prediction.planning(best.assigned), measured.total_steps
    every = dict(best.schedule.replan_every or ())
    made = {name: math.ceil(total / every.get(name, 1)) / total for name in planning}
    found = {
        "budget": measured.task.budget.words(),
        "best": best.to_dict(),
        "rounds": [one.to_dict() for one in rounds],
        "planning": {
            "seconds": sum(planning.values()),
            "saved": sum(planning[name] * (1 - made[name]) for name in planning),
        },
        "gpu": measured.task.gpu,
        "whole_calls": calls,
        "run_seconds": prediction.run_seconds,
        "attention_share": 1 - prediction.rest / prediction.run_seconds,
        "candidates": [method.to_dict() for method in prediction.methods],
        "places": prediction.table(best.assigned),
        "factors": prediction.factors,
        "bands": [list(band) for band in measured.bands],
    }
    write_record(measured.folder / "tune.json", found)
    report = measured.folder / "report.html"
    plots = importlib.util.find_spec("matplotlib") is not None
    page = html_report(
        drawn, read_results(drawn, measured.verify), plots=plots, more=summary_tables(found)
    )
    write_text(report, page)
    data = preset_data(
        measured.pipe, measured.source.name, measured.call, best.mixture, best.schedule,
        {
            "budget": found["budget"],
            "sizes": [list(measured.layout.grid.shape)],
            "position_scale": measured.loading["position_scale"],
            "held_out": {"prompts": len(measured.task.held_out), **best.held_out},
            "report": report.name,
            **({} if measured.task.gpu is None else {"speed_computed_for": measured.task.gpu}),
        },
    )  # fmt: skip
    path = measured.folder / "preset.yaml"
    write_preset(path, data)
    measured.book.note_seconds()
    return Tuned(path, data, found, report, measured.book.seconds)
