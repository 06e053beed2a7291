"""How far a tuning is: what comes next, and how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..runs.run import duration


class Progress:
    """Says what comes next and how long the rest will take, in units of dense runs."""

    def __init__(self, total: float, on_stage: Callable[[str], None]):
        self.total, self.on_stage = total, on_stage
        self.begun, self.done, self.running = time.perf_counter(), 0.0, 0.0

    def begin(self, name: str, work: float) -> None:
        self.done, self.running = self.done + self.running, work
        left = ""
        if self.done:
            rest = max(self.total - self.done, work)
            left = f", about {duration(rest * (time.perf_counter() - self.begun) / self.done)} left"
        self.on_stage(name + left)

    def skip(self, work: float) -> None:
        """What an earlier, killed tuning has done already."""
        self.total -= work
