"""All that is worth measuring in a few minutes on a GPU: rows until the time is over."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from time import perf_counter

from ..methods.base import Method
from .bench import Workload, bench_attention, layout_for
from .timing import interleaved_seconds, percentiles


@dataclass
class Budget:
    """Seconds of wall-clock time from now on, and how long what is done in them takes.

    Attributes:
        seconds: in all.
        clock: tells the time.
    """

    seconds: float
    clock: Callable[[], float] = perf_counter
    longest: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        self.begin = self.clock()

    @property
    def left(self) -> float:
        """Seconds that are left, below 0 when it is over."""
        return self.begin + self.seconds - self.clock()

    def allows(self, kind: str) -> bool:
        """Whether one more of a kind fits, by the longest so far."""
        return self.left > self.longest.get(kind, 0.0)

    def spend(self, kind: str, begin: float) -> float:
        """Note that one of a kind took from ``begin`` until now; the seconds."""
        taken = self.clock() - begin
        self.longest[kind] = max(taken, self.longest.get(kind, 0.0))
        return taken


@dataclass(frozen=True)
class Case:
    """One row to measure."""

    engine: str
    method: Method
    work: Workload

    @property
    def label(self) -> str:
        """What it is, in words."""
        passes = "both passes" if self.work.backward else "forward"
        return (
            f"{self.engine}, {self.method.name}, {self.work.layout.num_tokens:,} tokens, "
            f"head dim {self.work.head_dim}, {passes}"
        )


def cases(
    engines: Iterable[str],
    methods: Iterable[Method],
    tokens: Iterable[int],
    head_dims: Iterable[int],
    work: Workload,
) -> list[Case]:
    """Every row; those that matter most come first: forward before both, short before long."""
    engines, methods = list(engines), list(methods)
    found = []
    for backward, count, head_dim in itertools.product((False, True), tokens, head_dims):
        for method, engine in itertools.product(methods, engines):
            layout = layout_for(count, method)
            own = replace(work, layout=layout, head_dim=head_dim, backward=backward)
            found.append(Case(engine, method, own))
    return found


def measure(
    todo: list[Case], budget: Budget, repeats: int, dense_kernels: dict
) -> Iterator[tuple[Case, dict]]:
    """Each case with its row, or under ``not_run`` why it has none.

    What an engine cannot do, or what its compiler throws, is a row, too, and the next one follows.
    A case that would take longer than is left is not begun.
    """
    for case in todo:
        kind = f"{case.engine} {case.work.backward}"
        if not budget.allows(kind):
            yield case, _not_run(case, "the time was over")
            continue
        begin = budget.clock()
        try:
            row = bench_attention(
                case.method, case.work, repeats=repeats, flex=False, backend=case.engine,
                dense_kernels=dense_kernels, most_seconds=budget.left,
            )  # fmt: skip
        except Exception as error:  # a refusal, a wrong result, a compiler, no memory
            row = _not_run(case, f"{type(error).__name__}: {' '.join(str(error).split())}"[:300])
        budget.spend(kind, begin)
        yield case, row


def _not_run(case: Case, reason: str) -> dict:
    work = case.work
    return {
        "method": case.method.to_dict(),
        "backend": case.engine,
        "tokens": work.layout.num_tokens,
        "head_dim": work.head_dim,
        "backward": work.backward,
        "not_run": reason,
    }


def seconds_of(function: Callable, device: str, repeats: int = 5) -> float:
    """The median of a few runs after one that compiles."""
    times = interleaved_seconds({"it": function}, repeats, device)["it"]
    return percentiles(times)["p50"]
