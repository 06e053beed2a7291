"""What a choice of methods will cost and how far its picture will be, from what was recorded.

An error of attention reaches the picture in proportion: the relative squared error of a head's
output, times its layer's sensitivity, times what its band of steps does to the picture. Errors of
different layers, heads and bands add up as if they were independent. They are not quite, nor are
they the noise that the sensitivities were measured with, so every method has a factor that is
corrected by what was drawn.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dittfast.methods.base import Method
from dittfast.methods.head_groups import head_words

from .solver import Choice, path

# In a choice for the heads of a layer: dense attention.
DENSE = -1


class Place(NamedTuple):
    """A layer in a band of steps."""

    layer: str
    band: int


# What every head of every place runs: numbers of candidates, or DENSE.
Assigned = Mapping[Place, tuple[int, ...]]


class Prediction:
    """Costs and errors of candidates at every place.

    Args:
        methods: the candidates.
        steps: of a run in each band.
        middles: the recorded step of each band.
        records: of :func:`~.recording.record`, one a prompt.
        reach: by measure, for each band: what a relative squared error of the predictions in it
            does to that measure's squared error.
        run_seconds: of a dense run.
    """

    def __init__(
        self,
        methods: Sequence[Method],
        steps: Sequence[int],
        middles: Sequence[int],
        records: Sequence[dict],
        reach: Mapping[str, Sequence[float]],
        run_seconds: float,
    ):
        self.methods, self.steps, self.reach = methods, steps, reach
        self.passes = records[0]["passes"]
        self.factors = {m: dict.fromkeys({x.name for x in methods}, 1.0) for m in reach}
        self.slowness = 1.0
        by_place: dict[Place, list[dict]] = {}
        band_of = {step: band for band, step in enumerate(middles)}
        for one in (one for record in records for one in record["calls"]):
            by_place.setdefault(Place(one["layer"], band_of[one["step"]]), []).append(one)
        self.heads = {place: calls[0]["heads"] for place, calls in by_place.items()}
        self._rows = {place: calls[0]["rows"] for place, calls in by_place.items()}
        self._errors = {place: _errors(calls, len(methods)) for place, calls in by_place.items()}
        self._weight = {
            place: statistics.fmean(one["sensitivity"] for one in calls)
            for place, calls in by_place.items()
        }
        self._time(records, by_place)
        dense = sum(self.seconds(place, (DENSE,) * n) for place, n in self.heads.items())
        self.run_seconds = run_seconds
        self.rest = max(run_seconds - dense, 0.0)

    def _time(self, records: Sequence[dict], by_place: Mapping[Place, list[dict]]) -> None:
        """Seconds of a call by layer and candidate: medians, for single ones are noisy."""
        calls_of: dict[str, list[dict]] = {}
        for place, calls in by_place.items():
            calls_of.setdefault(place.layer, []).extend(calls)
        self._dense = {
            layer: statistics.median(one["dense_seconds"] for one in calls)
            for layer, calls in calls_of.items()
        }
        self._seconds: list[dict[Place, float]] = []
        self._planning: list[float] = []
        self._start: list[float] = []
        every = [one for calls in by_place.values() for one in calls]
        for number, method in enumerate(self.methods):
            seconds = [one["tried"][number]["seconds"] for one in every]
            varies = method.least() != method
            self._seconds.append(
                {
                    place: statistics.median(
                        [one["tried"][number]["seconds"] for one in calls] if varies else seconds
                    )
                    for place, calls in by_place.items()
                }
            )
            self._planning.append(statistics.median(x["tried"][number]["planning"] for x in every))
            start = statistics.median(record["start"][number] for record in records)
            self._start.append(max(start, 0.0))

    @property
    def places(self) -> list[Place]:
        return list(self.heads)

    def is_finite(self, number: int) -> bool:
        """Whether a candidate gave finite values wherever it was tried."""
        return all(errors[number] is not None for errors in self._errors.values())

    # What a choice costs.

    def seconds(self, place: Place, heads: tuple[int, ...]) -> float:
        """Of all calls of attention at a place in a run; a group of heads is a call of its own."""
        total = 0.0
        for number in set(heads):
            share = heads.count(number) / len(heads)
            if number == DENSE:
                total += share * self._dense[place.layer]
                continue
            whole = self._seconds[number][place]
            start = min(self._start[number], whole)
            total += self.slowness * (start + share * (whole - start))
        return total * self._calls(place)

    def _calls(self, place: Place) -> int:
        """Calls of attention at a place in a run, each row of a batch counted as one."""
        return self.steps[place.band] * self.passes * self._rows[place]

    def call_seconds(self, assigned: Assigned) -> float:
        """Of a whole run."""
        return self.rest + sum(self.seconds(place, heads) for place, heads in assigned.items())

    def speedup(self, assigned: Assigned) -> float:
        return self.run_seconds / self.call_seconds(assigned)

    def planning(self, assigned: Assigned) -> float:
        """Seconds of a run that go into plans made from q and k."""
        return sum(
            heads.count(number) / len(heads) * self._planning[number]
            * self._calls(place)
            for place, heads in assigned.items() for number in set(heads) - {DENSE}
        )  # fmt: skip

    def learn_speed(self, assigned: Assigned, speedup: float) -> None:
        """Learn how many times as fast a choice was: calls that are not dense take their share."""
        dense = sum(
            heads.count(DENSE) / len(heads) * self.seconds(place, (DENSE,) * len(heads))
            for place, heads in assigned.items()
        )
        predicted = self.call_seconds(assigned) - self.rest - dense
        measured = self.run_seconds / speedup - self.rest - dense
        if predicted > 0 and measured > 0:
            self.slowness *= measured / predicted

    # How far the picture will be.

    def _error(self, place: Place, head: int, number: int, measure: str) -> float:
        if number == DENSE:
            return 0.0
        factor = self.factors[measure][self.methods[number].name]
        error = self._errors[place][number]
        if error is None:
            return math.inf
        return factor * self._weight[place] * self.reach[measure][place.band] * error[head]

    def contributions(self, assigned: Assigned, measure: str) -> dict[str, float]:
        """Squared error of the picture in a measure, by method."""
        parts: dict[str, float] = {}
        for place, heads in assigned.items():
            for head, number in enumerate(heads):
                if number != DENSE:
                    name = self.methods[number].name
                    more = self._error(place, head, number, measure)
                    parts[name] = parts.get(name, 0.0) + more
        return parts

    def squared_error(self, assigned: Assigned, measure: str) -> float:
        return sum(self.contributions(assigned, measure).values())

    def correct(self, assigned: Assigned, measure: str, drawn: float) -> None:
        """Learn that the squared error of a choice in a measure was ``drawn``.

        Each method's factor moves by its share of the predicted error.
        """
        parts = self.contributions(assigned, measure)
        total = sum(parts.values())
        if not (0 < total < math.inf and drawn > 0):
            return
        for name, part in parts.items():
            self.factors[measure][name] *= (drawn / total) ** (part / total)

    def table(self, assigned: Assigned) -> list[dict]:
        """What runs where, what it costs and what it errs, place by place, as plain data."""
        return [
            {
                "layer": place.layer,
                "band": place.band,
                "runs": _words(heads, self.methods),
                "seconds": self.seconds(place, heads),
                "dense_seconds": self.seconds(place, (DENSE,) * len(heads)),
                "sensitivity": self._weight[place],
                "squared_error": {
                    m: sum(self._error(place, h, n, m) for h, n in enumerate(heads))
                    for m in self.reach
                },
            }
            for place, heads in assigned.items()
        ]

    # What can be chosen.

    def choices(self, place: Place, limits: Mapping[str, float]) -> list[Choice]:
        """Ways to settle the heads of a place: all alike, and mixtures worth their calls.

        Args:
            limits: of the squared error by measure. Errors of choices are relative to them, so
                that those of a whole run may add up to 1.
        """
        heads = self.heads[place]
        numbers = [DENSE, *(n for n, e in enumerate(self._errors[place]) if e is not None)]
        error = {
            (head, n): max(self._error(place, head, n, m) / limit for m, limit in limits.items())
            for head in range(heads) for n in numbers
        }  # fmt: skip
        options = {(n,) * heads for n in numbers}
        alone = {n: self.seconds(place, (n,) * heads) / heads for n in numbers}
        mixed = [DENSE] * heads
        each = [[Choice(alone[n], error[h, n], n) for n in numbers] for h in range(heads)]
        for head, choice in path(each):
            mixed[head] = choice.what
            options.add(tuple(mixed))
        return [
            Choice(
                self.seconds(place, option),
                sum(error[head, n] for head, n in enumerate(option)),
                option,
            )
            for option in sorted(options)
        ]


def _words(heads: tuple[int, ...], methods: Sequence[Method]) -> list[str]:
    """What the heads of a place run: each method, and which heads where not all do."""
    lines = []
    for number in sorted(set(heads)):
        own = tuple(head for head, n in enumerate(heads) if n == number)
        words = "dense" if number == DENSE else methods[number].words()
        lines.append(words if len(own) == len(heads) else f"{words} in heads {head_words(own)}")
    return lines


def _errors(calls: Sequence[dict], count: int) -> list[list[float] | None]:
    """The mean relative squared error by candidate and head; None where one was not finite."""
    found: list[list[float] | None] = []
    for number in range(count):
        each = [(one["tried"][number]["error"], one["size"]) for one in calls]
        if any(error is None for error, _ in each):
            found.append(None)
            continue
        by_head = zip(*([x / size for x in error] for error, size in each))
        found.append([statistics.fmean(values) for values in by_head])
    return found
