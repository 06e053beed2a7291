"""What a layer keeps from step to step of one run: plans, and what its method wants to keep."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch

from ..layout import Layout
from ..plan import Plan
from .base import Method
from .dynamic import wide_dtype

# Tokens whose mean stands for them where drift is measured.
_POOLED = 64


@dataclass(frozen=True)
class Lasting:
    """How long a plan that was made from q and k may be used again.

    Attributes:
        every: steps from one renewal to the next; None where drift alone decides.
        drift: relative change of the pooled q or k that renews the plan; None for none.
        by_method: ``(name, every)`` of methods whose plans last otherwise.
    """

    every: int | None = 1
    drift: float | None = None
    by_method: tuple[tuple[str, int], ...] = ()

    @property
    def keeps(self) -> bool:
        """Whether any plan may be used again."""
        return self.every != 1 or any(every != 1 for _, every in self.by_method)

    def check(self, names: Collection[str]) -> None:
        """Raise ValueError for a method that is not one of ``names``, those that run."""
        for name, _ in self.by_method:
            if name not in names:
                raise ValueError(
                    f"replan_every names {name!r}, which plans nothing here; what does is "
                    f"{', '.join(sorted(names)) or 'nothing'}"
                )

    def words(self) -> str:
        """How long plans last, such as "4 steps (topk) or a drift of 0.1"."""
        until = [f"{every} steps ({name})" for name, every in self.by_method]
        until += [f"{self.every} steps"] if self.every is not None and not until else []
        return " or ".join(until + ([] if self.drift is None else [f"a drift of {self.drift:g}"]))


@dataclass
class _Held:
    """A plan, what it was made for, and the pooled q and k of that moment."""

    made_for: tuple
    step: int
    plan: Plan
    pooled: tuple[torch.Tensor, torch.Tensor] | None


class Tally:
    """How many plans were made, and how often one was used again; for any number of threads."""

    def __init__(self):
        self.made = self.again = 0
        self._lock = threading.Lock()

    def count(self, made: int = 0, again: int = 0) -> None:
        with self._lock:
            self.made += made
            self.again += again


class Memory:
    """What one layer keeps from step to step of a run, in one guidance branch.

    A layer asks in the same order in every pass, so the n-th question of a pass is answered by the
    n-th plan, if it was made for the same method, layout and tensors of that shape; and likewise
    what methods keep themselves.

    Attributes:
        step: of the pass under way.
    """

    def __init__(self, lasting: Lasting | None = None, tally: Tally | None = None):
        self.lasting = Lasting() if lasting is None else lasting
        self.tally = Tally() if tally is None else tally
        self.step = 0
        self._held: list[_Held] = []
        self._values: list[tuple[Any, dict[str, Any]]] = []
        self._asked = self._opened = 0
        self._weakened: Memory | None = None

    def begin(self, step: int) -> None:
        """A pass at ``step`` begins."""
        self.step, self._asked, self._opened = step, 0, 0

    def clear(self) -> None:
        """Let go of everything: the run has ended. What a last pass ran may be held on to."""
        for _, values in self._values:
            values.clear()
        self._values.clear()
        self._held.clear()
        if self._weakened is not None:
            self._weakened.clear()

    def weakened(self) -> Memory:
        """Of the same layer in the pass in which guidance weakens heads."""
        if self._weakened is None:
            self._weakened = Memory(self.lasting, self.tally)
        self._weakened.begin(self.step)
        return self._weakened

    def plan(
        self,
        method: Method,
        layout: Layout,
        q: torch.Tensor,
        k: torch.Tensor,
        make: Callable[[], Plan],
    ) -> Plan:
        """The plan of this question: an earlier step's while that lasts, else from ``make()``."""
        made_for = method, layout, q.shape, k.shape, q.dtype, q.device
        number, self._asked = self._asked, self._asked + 1
        held = self._held[number] if number < len(self._held) else None
        pooled = None if self.lasting.drift is None else (_pool(q), _pool(k))
        if held is not None and held.made_for == made_for and self._lasts(held, pooled):
            self.tally.count(again=1)
            return held.plan
        made = _Held(made_for, self.step, make(), pooled)
        self.tally.count(made=1)
        self._held[number : number + 1] = [made]
        return made.plan

    def values(self, made_for: Any) -> dict[str, Any]:
        """What the method that asks keeps itself, by names of its own; gone when the run ends.

        Args:
            made_for: what has to be the same for values to be used again: the method, its layout,
                shapes. Where it is not, the values are empty again.
        """
        number, self._opened = self._opened, self._opened + 1
        if number < len(self._values) and self._values[number][0] == made_for:
            return self._values[number][1]
        values: dict[str, Any] = {}
        self._values[number : number + 1] = [(made_for, values)]
        return values

    def _lasts(self, held: _Held, pooled) -> bool:
        age, lasting = self.step - held.step, self.lasting
        every = dict(lasting.by_method).get(held.made_for[0].name, lasting.every)
        if age < 1 or (every is not None and age >= every):
            return False
        return lasting.drift is None or all(
            _change(old, new) <= lasting.drift for old, new in zip(held.pooled, pooled)
        )


def _pool(x: torch.Tensor) -> torch.Tensor:
    """Means of 64 tokens of ``x [B, H, N, D]`` each, in at least fp32."""
    with torch.no_grad():
        parts = x.split(_POOLED, 2)
        return torch.stack([part.mean(2, dtype=wide_dtype(x.dtype)) for part in parts], 2)


def _change(old: torch.Tensor, new: torch.Tensor) -> float:
    """``|new - old| / |old|`` over all values; it waits for the device."""
    return float((new - old).norm() / old.norm().clamp_min(torch.finfo(old.dtype).tiny))
