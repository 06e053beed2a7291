"""What a choice of methods will cost and how far its picture will be, from what was recorded.

Seconds add up. So do errors, as vectors: how far a method in one layer and step moves the
transformer's prediction there (:mod:`.sensitivity`), times what a moved prediction of that band of
steps does to the picture. Neither is quite so, because errors are not infinitely small; what was
drawn corrects a factor of each method, of its errors and of its seconds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch

from dittfast.methods.base import Method
from dittfast.methods.dense import Dense
from dittfast.methods.head_groups import Group, HeadGroups, head_words

from .solver import Choice, Problem, front, path, search

# In a choice for the heads of a layer: dense attention.
DENSE = -1
# Ways to settle a layer that are tried in a pass of their own, of those that the errors of
# attention alone leave worth it: in any one band, and in all layers and steps alike.
_MOST_OWN, _MOST_ALIKE = 4, 5


class Place(NamedTuple):
    """A layer in a band of steps."""

    layer: str
    band: int


Heads = tuple[int, ...]
# What every head of every place runs: numbers of candidates, or DENSE.
Assigned = Mapping[Place, Heads]


def method_of(heads: Heads, methods: Sequence[Method]) -> Method:
    """What a layer runs whose heads run these candidates."""
    each = {n: methods[n] if n != DENSE else Dense() for n in set(heads)}
    if len(each) == 1:
        return each[heads[0]]
    groups = [
        Group(tuple(h for h, own in enumerate(heads) if own == n), method)
        for n, method in each.items()
    ]
    return HeadGroups(tuple(sorted(groups, key=lambda group: group.heads)))


class Prediction:
    """Costs and errors of candidates at every place.

    Args:
        methods: the candidates.
        steps: of a run in each band.
        middles: the recorded step of each band.
        records: of :func:`~.recording.record`, one a prompt.
        run_seconds: of a dense run.
        attention_seconds: of its self-attention.
    """

    def __init__(
        self,
        methods: Sequence[Method],
        steps: Sequence[int],
        middles: Sequence[int],
        records: Sequence[dict],
        run_seconds: float,
        attention_seconds: float,
    ):
        self.methods, self.steps = methods, steps
        self.passes = records[0]["passes"]
        self.slowness = dict.fromkeys((x.name for x in methods), 1.0)
        self.factors: dict[str, dict[str, float]] = {}
        by_place: dict[Place, list[dict]] = {}
        band_of = {step: band for band, step in enumerate(middles)}
        for one in (one for record in records for one in record["calls"]):
            by_place.setdefault(Place(one["layer"], band_of[one["step"]]), []).append(one)
        self.heads = {place: calls[0]["heads"] for place, calls in by_place.items()}
        self._rows = {place: calls[0]["rows"] for place, calls in by_place.items()}
        self._errors = {place: _errors(calls, len(methods)) for place, calls in by_place.items()}
        self._time(records, by_place)
        self.run_seconds = run_seconds
        self.rest = max(run_seconds - attention_seconds, 0.0)
        # What was timed while recording, in the seconds of that run.
        dense = sum(self.seconds(place, (DENSE,) * n) for place, n in self.heads.items())
        self._scale = (run_seconds - self.rest) / dense

    def _time(self, records: Sequence[dict], by_place: Mapping[Place, list[dict]]) -> None:
        """Seconds of a call by layer and candidate: medians, for single ones are noisy."""
        self._scale = 1.0
        every = [one for calls in by_place.values() for one in calls]

        def like(calls: list[dict]) -> list[dict]:
            shapes = [(x["heads"], x["head_dim"]) for x in (calls[0], *every)]
            return [x for x, shape in zip(every, shapes[1:]) if shape == shapes[0]]

        self._dense = {
            place: statistics.median(x["dense_seconds"] for x in like(calls))
            for place, calls in by_place.items()
        }
        self._seconds: list[dict[Place, float]] = []
        self._planning: list[float] = []
        self._start: list[float] = []
        for number, method in enumerate(self.methods):
            varies = method.least() != method
            own = {}
            for place, calls in by_place.items():
                alike = calls if varies else like(calls)
                part = [x["tried"][number]["seconds"] / x["dense_seconds"] for x in alike]
                own[place] = statistics.median(part) * self._dense[place]
            self._seconds.append(own)
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

    def seconds(self, place: Place, heads: Heads) -> float:
        """Of all calls of attention at a place in a run; a group of heads is a call of its own."""
        total = 0.0
        for number in set(heads):
            share = heads.count(number) / len(heads)
            if number == DENSE:
                total += share * self._dense[place]
                continue
            whole = self._seconds[number][place]
            start = min(self._start[number], whole)
            own = start + share * (whole - start)
            total += self.slowness[self.methods[number].name] * own
        return self._scale * total * self._calls(place)

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
        return self._scale * sum(
            heads.count(number) / len(heads) * self._planning[number]
            * self._calls(place)
            for place, heads in assigned.items() for number in set(heads) - {DENSE}
        )  # fmt: skip

    def learn_speed(self, assigned: Assigned, speedup: float) -> None:
        """Learn how many times as fast a choice was; each method's seconds take their share.

        Half of it: a few timings of whole calls know no more than what was recorded in every layer.
        """
        parts: dict[str, float] = {}
        for place, heads in assigned.items():
            dense = self.seconds(place, (DENSE,) * len(heads))
            own = self.seconds(place, heads) - dense * heads.count(DENSE) / len(heads)
            for number in set(heads) - {DENSE}:
                name = self.methods[number].name
                share = heads.count(number) / (len(heads) - heads.count(DENSE))
                parts[name] = parts.get(name, 0.0) + own * share
        predicted = sum(parts.values())
        measured = predicted + self.run_seconds / speedup - self.call_seconds(assigned)
        if predicted > 0 and measured > 0:
            for name, part in parts.items():
                self.slowness[name] *= (measured / predicted) ** (0.5 * part / predicted)

    # What is tried in passes of their own.

    def alike(self, number: int) -> Assigned:
        """One candidate in all layers and steps."""
        return {place: (number,) * heads for place, heads in self.heads.items()}

    def attention_error(self, place: Place, heads: Heads) -> float:
        """The relative squared error of a layer's attention; infinite where it is not finite."""
        errors = self._errors[place]
        each = [0.0 if n == DENSE else (errors[n] or [math.inf] * len(heads))[h]
                for h, n in enumerate(heads)]  # fmt: skip
        return sum(each)

    @cached_property
    def usual(self) -> list[int]:
        """Candidates that no other is as fast and as exact as, used in all layers and steps.

        As they were recorded, whatever is learned of their speed later.
        """
        found = [
            Choice(
                self.call_seconds(self.alike(n)),
                sum(self.attention_error(place, h) for place, h in self.alike(n).items()),
                n,
            )
            for n in range(len(self.methods)) if self.is_finite(n)
        ]  # fmt: skip
        return [choice.what for choice in _thinned(front(found), _MOST_ALIKE)]

    def trials(self, place: Place) -> list[Heads]:
        """Ways to settle the heads of a place that are worth a pass; dense attention is none.

        The usual candidates, and what is best in this layer and band: candidates in all heads, and
        mixtures of heads on the way from dense attention to the sparsest.
        """
        count, errors = self.heads[place], self._errors[place]
        numbers = [DENSE, *(n for n, error in enumerate(errors) if error is not None)]
        options = {(n,) * count for n in numbers}
        alone = {n: self.seconds(place, (n,) * count) / count for n in numbers}
        each = [
            [Choice(alone[n], 0.0 if n == DENSE else errors[n][h], n) for n in numbers]
            for h in range(count)
        ]
        mixed = [DENSE] * count
        for head, choice in path(each):
            mixed[head] = choice.what
            options.add(tuple(mixed))
        ways = [
            Choice(self.seconds(place, x), self.attention_error(place, x), x)
            for x in sorted(options)
        ]
        dense = (DENSE,) * count
        own = [c for c in front(ways) if c.what != dense and c.cost < self.seconds(place, dense)]
        usual = [(n,) * count for n in self.usual]
        return list(dict.fromkeys([*usual, *(c.what for c in _thinned(own, _MOST_OWN))]))

    # How far the picture will be.

    def answer(
        self,
        trials: Mapping[Place, Sequence[Heads]],
        grams: Mapping[str, torch.Tensor],
    ) -> None:
        """Take what passes with these trials did.

        Args:
            grams: by measure ``[n, n]`` fp64 for all trials in order, place after place: inner
                products of what each does to the picture.
        """
        self._trials = [(place, heads) for place in self.places for heads in trials[place]]
        self._number = {trial: number for number, trial in enumerate(self._trials)}
        self._grams = dict(grams)
        self.factors = {m: dict.fromkeys(self.slowness, 1.0) for m in grams}

    def _weights(self, measure: str) -> torch.Tensor:
        """``[n]``: what to multiply the vector of each trial by, learned of its methods."""
        factors = self.factors[measure]
        own = [
            [factors[self.methods[n].name] for n in heads if n != DENSE]
            for _, heads in self._trials
        ]
        return torch.tensor([math.sqrt(statistics.fmean(x)) for x in own], dtype=torch.float64)

    def _contributions(self, assigned: Assigned, measure: str) -> dict[tuple[Place, Heads], float]:
        """Squared error of the picture in a measure, by place; the sum is that of the picture."""
        chosen = [(p, h) for p, h in assigned.items() if set(h) != {DENSE}]
        at = torch.tensor([self._number[one] for one in chosen], dtype=torch.long)
        weights = self._weights(measure)[at]
        part = weights * (self._grams[measure][at][:, at] @ weights)
        return dict(zip(chosen, part.tolist()))

    def squared_error(self, assigned: Assigned, measure: str) -> float:
        return max(sum(self._contributions(assigned, measure).values()), 0.0)

    def correct(self, assigned: Assigned, measure: str, drawn: float) -> None:
        """Learn that the squared error of a choice in a measure was ``drawn``.

        Each method's factor moves by its share of the predicted error.
        """
        parts: dict[str, float] = {}
        for (_, heads), part in self._contributions(assigned, measure).items():
            own = [self.methods[n].name for n in heads if n != DENSE]
            for name in own:
                parts[name] = parts.get(name, 0.0) + max(part, 0.0) / len(own)
        shares, predicted = sum(parts.values()), self.squared_error(assigned, measure)
        if not (predicted > 0 and shares > 0 and drawn > 0):
            return
        for name, part in parts.items():
            self.factors[measure][name] *= (drawn / predicted) ** (part / shares)

    def table(self, assigned: Assigned) -> list[dict]:
        """What runs where, what it costs and what it errs, place by place, as plain data.

        The squared error of a place is its share: negative where it undoes what others do.
        """
        parts = {m: self._contributions(assigned, m) for m in self._grams}
        return [
            {
                "layer": place.layer,
                "band": place.band,
                "runs": _words(heads, self.methods),
                "seconds": self.seconds(place, heads),
                "dense_seconds": self.seconds(place, (DENSE,) * len(heads)),
                "squared_error": {m: parts[m].get((place, heads), 0.0) for m in parts},
            }
            for place, heads in assigned.items()
        ]

    # What can be chosen.

    def solve(
        self,
        limits: Mapping[str, float],
        most_seconds: float | None = None,
        starts: Sequence[Assigned] = (),
    ) -> Assigned | None:
        """The fastest choice within limits of error, or the most exact one within a time.

        Args:
            limits: of the squared error, by measure.
            most_seconds: of a whole run. With it the largest of the errors, each relative to its
                limit, is as small as can be; without it none exceeds its limit.
            starts: choices to begin from.

        Returns:
            None where there is none.
        """
        every = [(p, (DENSE,) * n) for p, n in self.heads.items()]
        every += [trial for trial in self._trials]
        at = {trial: number for number, trial in enumerate(every)}
        item = {place: number for number, place in enumerate(self.places)}
        begin, count = len(self.places), len(every)
        grams = torch.zeros(len(limits), count, count, dtype=torch.float64)
        for gram, (measure, limit) in zip(grams, limits.items()):
            weights = self._weights(measure) / math.sqrt(limit)
            gram[begin:, begin:] = weights[:, None] * self._grams[measure] * weights
        problem = Problem(
            torch.tensor([self.seconds(*trial) for trial in every], dtype=torch.float64),
            grams,
            torch.tensor([item[place] for place, _ in every]),
        )
        begins = [torch.tensor([at[p, one[p]] for p in self.places]) for one in starts]
        bound = 1.0 if most_seconds is None else most_seconds - self.rest
        chosen = search(problem, bound, most_seconds is not None, begins)
        return None if chosen is None else dict(every[n] for n in chosen.tolist())

    def fastest(self) -> Assigned:
        """The cheapest trial everywhere."""
        ways: dict[Place, list[Heads]] = {}
        for place, heads in self._trials:
            ways.setdefault(place, [(DENSE,) * len(heads)]).append(heads)
        return {p: min(own, key=lambda h: self.seconds(p, h)) for p, own in ways.items()}


def _thinned(choices: Sequence[Choice], most: int) -> list[Choice]:
    """At most so many of them, the ends among them, as even as can be."""
    if len(choices) <= most:
        return list(choices)
    return [choices[round(i * (len(choices) - 1) / (most - 1))] for i in range(most)]


def _words(heads: Heads, methods: Sequence[Method]) -> list[str]:
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
