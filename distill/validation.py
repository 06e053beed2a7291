"""The student's pictures next to the teacher's, from the same noise, and how far apart they are."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np

from dittfast.files import write_image
from dittfast.pipelines.runs.call import call_arguments
from dittfast.pipelines.runs.compare import quality
from dittfast.pipelines.runs.first_frame import with_first_frame
from dittfast.pipelines.runs.run import Run, run
from dittfast.pipelines.runs.sources import Source

from .config import DistillConfig
from .prepare import check_call


class Validation:
    """Draws fixed prompts with fixed seeds.

    Args:
        pipe: the pipeline that the student is part of.
        source: where it came from; a sample model brings its own call.
        config: the run's.

    Raises:
        ValueError: an argument that the pipeline does not take.
    """

    def __init__(self, pipe, source: Source, config: DistillConfig):
        self.pipe = pipe
        self.folder = Path(config.train.output) / "validation"
        self.seed = config.validation.seed
        check_call(pipe, config.validation.call, "validation.call")
        given = config.data.call | config.validation.call
        prompts = config.validation.prompts
        self.calls = [
            with_first_frame(
                pipe, call_arguments(pipe, p, source.settings, **given), source.settings
            )
            for p in prompts
        ]
        self._teacher: list[Run] | None = None

    def draw(self) -> list[Run]:
        """One picture of each prompt with the weights of the moment."""
        self.pipe.set_progress_bar_config(disable=True)
        return [run(self.pipe, call, self.seed + i) for i, call in enumerate(self.calls)]

    def measure(self, step: int, as_teacher, write: bool = True) -> dict[str, float]:
        """Mean PSNR (dB) and SSIM to the teacher's pictures; writes a sheet of both.

        Args:
            as_teacher: a context manager in which the pipeline is the teacher.
            write: whether this process writes the sheet.
        """
        if self._teacher is None:
            with as_teacher():
                self._teacher = self.draw()
        student = self.draw()
        qualities = [quality(a, b) for a, b in zip(self._teacher, student)]
        if write:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_image(self.folder / f"step-{step:08d}.png", _sheet(self._teacher, student))
        # Equal pictures have no finite PSNR; 8-bit values cannot be nearer than this otherwise.
        values = {"psnr_db": [100.0 if x["identical"] else x["psnr_db"] for x in qualities]}
        if all(x["ssim"] is not None for x in qualities):
            values["ssim"] = [x["ssim"] for x in qualities]
        return {name: statistics.fmean(numbers) for name, numbers in values.items()}


def _sheet(teacher: list[Run], student: list[Run]):
    """The teacher's pictures above the student's; of a clip its middle frame."""
    from PIL import Image

    rows = [[r.frames[len(r.frames) // 2] for r in runs] for runs in (teacher, student)]
    return Image.fromarray(np.concatenate([np.concatenate(row, 1) for row in rows], 0))
