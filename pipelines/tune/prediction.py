"""What a choice of methods will cost and how far its picture will be, from what was recorded.

Seconds add up. So do errors, as vectors: how far a method in one layer and step moves the
transformer's prediction there (:mod:`.sensitivity`), times what a moved prediction of that band of
steps does to the picture. Neither is quite so, because errors are not infinitely small; what was
drawn corrects a factor of errors, and one of each method's seconds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from dittfast.methods.base import Method
from dittfast.methods.dense import Dense
from dittfast.methods.head_groups import Group, HeadGroups, head_words

from .solver import Choice, Problem, front, path, search

# In a choice for the heads of a layer: dense attention.
DENSE = -1
# Ways to settle a layer that are tried in a pass of their own, of those that the errors of
# attention alone leave worth it; candidates that are tried in all layers at once, and how many of
# these are tried in each layer, too.
_MOST_OWN, _MOST_ALIKE, _MOST_USUAL = 4, 16, 5
# A candidate is left out if another one is faster at so much less of squared error: what errors of
# attention do to a picture differs by as much.
_CLEARLY = 2.0


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
        records: of :func:`~.recording.record`, one a prompt, :func:`~.seconds.steadied`.
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
        self._weight = [1.0] * len(methods)
        self.slowness = dict.fromkeys((x.name for x in methods), 1.0)
        self.factors: dict[str, float] = {}
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
        """Seconds of a call by layer and candidate."""
        self._scale = 1.0
        numbers, mean = range(len(self.methods)), statistics.fmean
        self._dense = {
            place: mean(x["dense_seconds"] for x in calls) for place, calls in by_place.items()
        }
        tried = {place: [x["tried"] for x in calls] for place, calls in by_place.items()}
        self._seconds: list[dict[Place, float]] = [
            {place: mean(x[n]["seconds"] for x in own) for place, own in tried.items()}
            for n in numbers
        ]
        self._planning: list[float] = [
            mean(x[n]["planning"] for own in tried.values() for x in own) for n in numbers
        ]
        self._start: list[float] = [mean(record["start"][n] for record in records) for n in numbers]
        self._work: list[dict[Place, float]] = [
            {place: mean(x[n]["work"] for x in own) for place, own in tried.items()}
            for n in numbers
        ]

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

    def work(self, assigned: Assigned) -> float:
        """The products of attention in a run, of those of dense attention; planning is not in it.

        As recorded for all heads of a layer, so of a method whose heads differ a mean of them.
        """
        parts = [
            (self._calls(place), 1.0 if n == DENSE else self._work[n][place])
            for place, heads in assigned.items() for n in heads
        ]  # fmt: skip
        return sum(calls * own for calls, own in parts) / sum(calls for calls, _ in parts)

    def saved(self, assigned: Assigned) -> float:
        """Seconds less of a run's attention than dense attention takes; 0 if nothing is."""
        dense = sum(self.seconds(place, (DENSE,) * n) for place, n in self.heads.items())
        own = sum(self.seconds(place, heads) for place, heads in assigned.items())
        return dense - own if own < (1 - 1e-9) * dense else 0.0

    def planning(self, assigned: Assigned) -> dict[str, float]:
        """Seconds of a run that go into plans made from q and k, by method."""
        spent: dict[str, float] = {}
        for place, heads in assigned.items():
            for number in set(heads) - {DENSE}:
                share = self._scale * heads.count(number) / len(heads) * self._calls(place)
                name = self.methods[number].name
                spent[name] = spent.get(name, 0.0) + share * self._planning[number]
        return {name: seconds for name, seconds in spent.items() if seconds > 0}

    def learn_speed(self, assigned: Assigned, speedup: float) -> None:
        """Learn how many times as fast a choice was; each method's seconds take their share."""
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
                self.slowness[name] *= (measured / predicted) ** (part / predicted)

    # What is tried in passes of their own.

    def alike(self, number: int) -> Assigned:
        """One candidate in all layers and steps."""
        return {place: (number,) * heads for place, heads in self.heads.items()}

    def attention_error(self, place: Place, heads: Heads) -> float:
        """The relative squared error of a layer's attention; infinite where it is not finite.

        Weighed by what the candidate does to the picture, once that is known.
        """
        return sum(self._head_error(place, head, n) for head, n in enumerate(heads))

    def _head_error(self, place: Place, head: int, number: int) -> float:
        if number == DENSE:
            return 0.0
        errors = self._errors[place][number]
        return math.inf if errors is None else self._weight[number] * errors[head]

    def worth(self) -> list[int]:
        """Candidates that no other is clearly as fast and as exact as, the most exact first."""
        found = [
            Choice(
                self.call_seconds(self.alike(n)),
                sum(self.attention_error(place, h) for place, h in self.alike(n).items()),
                n,
            )
            for n in range(len(self.methods)) if self.is_finite(n)
        ]  # fmt: skip
        kept = [
            x for x in sorted(found, key=lambda c: -c.cost)
            if not any(y.cost < x.cost and y.error * _CLEARLY < x.error for y in found)
        ]  # fmt: skip
        return [choice.what for choice in _thinned(kept, _MOST_ALIKE)]

    def settle(self, errors: Mapping[str, Mapping[int, float]]) -> None:
        """Take what candidates of :meth:`worth` do in all layers at once.

        Those that no other is as fast and as exact as are tried in each layer, too.

        Args:
            errors: by measure, squared errors of the picture by number of the candidate.
        """
        self.usual = self.usual_of(errors["psnr"])
        self._weigh(errors["psnr"])

    def usual_of(self, errors: Mapping[int, float]) -> list[int]:
        """Of candidates those that no other is as fast and as exact as, the most exact first."""
        found = [Choice(self.call_seconds(self.alike(n)), x, n) for n, x in errors.items()]
        return [choice.what for choice in _thinned(front(found), _MOST_USUAL)]

    def _weigh(self, errors: Mapping[int, float]) -> None:
        """What an error of attention does to a picture: methods differ by factors.

        Candidates that were not drawn everywhere are like others of their method, or like all.
        """
        self._weight = [1.0] * len(self.methods)
        known: dict[int, float] = {}
        for number, error in errors.items():
            attention = sum(self.attention_error(p, h) for p, h in self.alike(number).items())
            if attention > 0 and error > 0:
                known[number] = error / attention
        for number, method in enumerate(self.methods):
            alike = [x for n, x in known.items() if self.methods[n].name == method.name]
            others = alike or list(known.values()) or [1.0]
            self._weight[number] = known.get(number, statistics.geometric_mean(others))

    def trials(self, place: Place) -> list[Heads]:
        """Ways to settle the heads of a place that are worth a pass; dense attention is none.

        The usual candidates, and what is best in this layer and band: candidates in all heads, and
        mixtures of heads on the way from dense attention to the sparsest.
        """
        count = self.heads[place]
        numbers = [DENSE, *(n for n, e in enumerate(self._errors[place]) if e is not None)]
        options = {(n,) * count for n in numbers}
        alone = {n: self.seconds(place, (n,) * count) / count for n in numbers}
        each = [
            [Choice(alone[n], self._head_error(place, head, n), n) for n in numbers]
            for head in range(count)
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
        self.factors = dict.fromkeys(grams, 1.0)

    def _contributions(self, assigned: Assigned, measure: str) -> dict[tuple[Place, Heads], float]:
        """Squared error of the picture in a measure, by place; the sum is that of the picture."""
        chosen = [(p, h) for p, h in assigned.items() if set(h) != {DENSE}]
        at = torch.tensor([self._number[one] for one in chosen], dtype=torch.long)
        part = self.factors[measure] * self._grams[measure][at][:, at].sum(1)
        return dict(zip(chosen, part.tolist()))

    def squared_error(self, assigned: Assigned, measure: str) -> float:
        return max(sum(self._contributions(assigned, measure).values()), 0.0)

    def correct(self, assigned: Assigned, measure: str, drawn: float) -> None:
        """Learn that the squared error of a choice in a measure was ``drawn``.

        One factor for all: errors are not so small that they are linear, but those of choices at
        one speed are alike, and their order holds.
        """
        predicted = self.squared_error(assigned, measure)
        if predicted > 0 and drawn > 0:
            self.factors[measure] *= drawn / predicted

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
            gram[begin:, begin:] = self.factors[measure] / limit * self._grams[measure]
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
    """At most so many of them, in order of cost: the ends, and of the others the least crowded."""
    kept = list(choices)
    while len(kept) > most:
        room = [abs(a.cost - b.cost) for a, b in zip(kept, kept[2:])]
        del kept[1 + room.index(min(room))]
    return kept


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
