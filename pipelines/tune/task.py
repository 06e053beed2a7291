"""What a tuning is for: a budget, prompts, methods, and how long it may search."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..runs.prompts import Item
from .budget import Budget
from .candidates import check_methods, tunable
from .on_gpu import gpu_with_rates


@dataclass(frozen=True)
class Task:
    """What to tune for.

    Args:
        budget: what the held-out prompts have to hold.
        items: prompts and seeds that are recorded and drawn.
        held_out: those that judge alone, numbered after the others.
        methods: names of the methods that may be used.
        bands: of steps, each with a choice of its own.
        rounds: of solving and drawing, at most.
        gpu: whose seconds count, computed from published rates; None for this device's own.

    Raises:
        ValueError: no prompts, one that is tuned with and held out, or a count below 1.
    """

    budget: Budget
    items: tuple[Item, ...]
    held_out: tuple[Item, ...]
    methods: tuple[str, ...] = field(default_factory=lambda: tuple(tunable()))
    bands: int = 4
    rounds: int = 4
    gpu: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "methods", tuple(check_methods(self.methods)))
        for name, items in (("to tune with", self.items), ("held out", self.held_out)):
            if not items:
                raise ValueError(f"there are no prompts {name}; give at least one")
        if self.gpu is not None:
            object.__setattr__(self, "gpu", gpu_with_rates(self.gpu).name)
        both = {i.prompt for i in self.items} & {i.prompt for i in self.held_out}
        if both:
            raise ValueError(f"held-out prompts must be new; {min(both)!r} is tuned with, too")
        for name in ("bands", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
