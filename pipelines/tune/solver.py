"""Choices for items, one each, whose costs add up and whose errors are vectors that add up.

Errors of different layers and steps help or cancel each other, so the squared error of a choice is
quadratic, ``x G x`` with the inner products of all errors in G, and no knapsack of independent
items. It is searched: from several starts, changes of one item lower ``error + price * cost``, at
prices that lead to the bound; then changes of one item and of two at once improve the best of what
was found, as long as the bound holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

# Prices of cost, as powers of 10: one that buys the most exact, one that buys the cheapest; how
# often the way to the price that keeps the bound is halved; starts at random; and how many of what
# was found is improved.
_PRICES, _HALVINGS, _RANDOM, _MOST_IMPROVED = (-9.0, 2.0), 10, 4, 6
# Choices whose pairs are all looked at in a round; of more only the best single ones.
_MOST_PAIRS = 1024


class Choice(NamedTuple):
    """One way to settle an item.

    Attributes:
        cost, error: what is minimised, and what is limited.
        what: whatever the caller means by it.
    """

    cost: float
    error: float
    what: Any = None


def hull(choices: Sequence[Choice]) -> list[Choice]:
    """The lower convex hull: from the least error on, ever cheaper at ever less saved by error."""
    kept: list[Choice] = []
    for choice in front(choices):
        while len(kept) > 1 and _rate(kept[-2], kept[-1]) <= _rate(kept[-1], choice):
            kept.pop()
        kept.append(choice)
    return kept


def front(choices: Sequence[Choice]) -> list[Choice]:
    """Those that no other is as cheap and as exact as, from the most exact to the cheapest."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.error, c.cost)):
        if not kept or choice.cost < kept[-1].cost:
            kept.append(choice)
    return kept


def _rate(a: Choice, b: Choice) -> float:
    """What the step from a to b saves for each unit of error."""
    more = b.error - a.error
    return (a.cost - b.cost) / more if more > 0 else float("inf")


def path(items: Sequence[Sequence[Choice]]) -> Iterator[tuple[int, Choice]]:
    """``(item, choice)``: every item at its least error, then the steps that save most first.

    Of every item only the choices on the lower convex hull matter where errors add up (Sinha and
    Zoltners 1979).
    """
    hulls = [hull(choices) for choices in items]
    for number, choices in enumerate(hulls):
        yield number, choices[0]
    steps = [
        (-_rate(a, b), number, at)
        for number, choices in enumerate(hulls)
        for at, (a, b) in enumerate(pairwise(choices))
    ]
    for _, number, at in sorted(steps):
        yield number, hulls[number][at + 1]


class Problem:
    """What can be chosen: all choices of all items in one row, n of them.

    Args:
        cost: ``[n]``, of each choice.
        grams: ``[measures, n, n]``, inner products of the choices' errors, in units of the limit of
            each measure. The error of a selection is the largest of its measures' sums.
        item: ``[n]``, the number of the item that a choice belongs to; each has at least one.
    """

    def __init__(self, cost: torch.Tensor, grams: torch.Tensor, item: torch.Tensor):
        self.cost, self.grams, self.item = cost.double(), grams.double(), item
        self.items = int(item.max()) + 1
        self._own = torch.diagonal(self.grams, dim1=1, dim2=2)

    def error(self, chosen: torch.Tensor) -> float:
        """Of the choices ``[items]``, by their numbers, item by item."""
        return float(self._sums(chosen).max())

    def total(self, chosen: torch.Tensor) -> float:
        """The cost of choices ``[items]``."""
        return float(self.cost[chosen].sum())

    def _sums(self, chosen: torch.Tensor) -> torch.Tensor:
        return self.grams[:, chosen][:, :, chosen].sum((1, 2))

    def changes(self, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[measures, n]`` errors and ``[n]`` costs after a change to each choice."""
        now = chosen[self.item]
        towards = self.grams[:, :, chosen].sum(2)  # of every choice with all that is chosen
        cross = self.grams[:, torch.arange(len(now)), now]
        more = 2 * (towards - towards[:, now]) + self._own - 2 * cross + self._own[:, now]
        total = self.cost[chosen].sum() + self.cost - self.cost[now]
        return self._sums(chosen)[:, None] + more, total

    def pairs(self, chosen: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[len(a), n]`` errors and costs after a change to one of ``a`` and to any other.

        Two of one item are infinitely dear.
        """
        errors, totals = self.changes(chosen)
        now = chosen[self.item]
        g = self.grams
        both = g[:, a] - g[:, now[a]]
        both = 2 * (both - both[:, :, now])
        error = errors[:, a, None] + errors[:, None, :] - self._sums(chosen)[:, None, None] + both
        total = totals[a, None] + totals[None, :] - self.cost[chosen].sum()
        same = self.item[a, None] == self.item[None, :]
        return error.amax(0), total.masked_fill(same, float("inf"))


def search(problem: Problem, bound: float, by_cost: bool, starts: Sequence[torch.Tensor] = ()):
    """The most exact choices of cost up to ``bound``, or the cheapest of error up to it.

    Args:
        by_cost: which of the two is bounded.
        starts: choices ``[items]`` to begin from, besides the most exact of every item, the
            cheapest, and some at random.

    Returns:
        ``[items]`` numbers of choices; None where none keeps the bound that was found.
    """
    within: dict[tuple, float] = {}
    for chosen in _ends(problem, bound, by_cost, starts):
        limited, other = _values(problem, chosen, by_cost)
        if limited <= bound:
            within[tuple(chosen.tolist())] = other
    best = sorted(within, key=within.get)[:_MOST_IMPROVED]
    improved = [_improved(problem, torch.tensor(x), bound, by_cost) for x in best]
    return min(improved, key=lambda x: _values(problem, x, by_cost)[1], default=None)


def _values(problem: Problem, chosen: torch.Tensor, by_cost: bool) -> tuple[float, float]:
    values = problem.total(chosen), problem.error(chosen)
    return values if by_cost else values[::-1]


def _ends(
    problem: Problem, bound: float, by_cost: bool, starts: Sequence[torch.Tensor]
) -> Iterator[torch.Tensor]:
    """Starts, and where single changes lead from them, at prices that lead to the bound."""
    exact, cheap = (_least(problem, x) for x in (problem._own.amax(0), problem.cost))
    draw = torch.Generator().manual_seed(0)
    value = lambda: torch.rand(len(problem.item), generator=draw)  # noqa: E731
    starts = [exact, cheap, *starts, *(_least(problem, value()) for _ in range(_RANDOM))]
    yield from starts
    spread = problem.total(exact) - problem.total(cheap)
    worst = max(map(problem.error, starts))
    if spread <= 0 or worst <= 0:
        return
    for begin in starts:
        low, high = _PRICES  # of the cost, as powers of 10
        for _ in range(_HALVINGS):
            price = (low + high) / 2
            chosen = _descended(problem, begin, 10**price * worst / spread)
            yield chosen
            dear = _values(problem, chosen, by_cost)[0] > bound
            low, high = (price, high) if dear == by_cost else (low, price)


def _least(problem: Problem, value: torch.Tensor) -> torch.Tensor:
    """Of every item the choice with the least value."""
    return torch.stack(
        [
            (problem.item == i).nonzero()[:, 0][value[problem.item == i].argmin()]
            for i in range(problem.items)
        ]
    )


def _descended(problem: Problem, chosen: torch.Tensor, price: float) -> torch.Tensor:
    """Where single changes end that lower ``error + price * cost``."""
    now = problem.error(chosen) + price * problem.total(chosen)
    while True:
        errors, totals = problem.changes(chosen)
        values = errors.amax(0) + price * totals
        best = int(values.argmin())
        if not values[best] < now - 1e-12 * abs(now):
            return chosen
        chosen, now = _changed(problem, chosen, best), float(values[best])


def _changed(problem: Problem, chosen: torch.Tensor, *numbers: int) -> torch.Tensor:
    chosen = chosen.clone()
    for number in numbers:
        chosen[problem.item[number]] = number
    return chosen


def _improved(problem: Problem, chosen: torch.Tensor, bound: float, by_cost: bool) -> torch.Tensor:
    """Change one item, or two, while that lowers what is not bounded and keeps the bound."""
    inf = float("inf")

    def within(errors, totals):
        limited, other = (totals, errors) if by_cost else (errors, totals)
        return other.masked_fill(limited > bound, inf)

    now = _values(problem, chosen, by_cost)[1]
    while True:
        errors, totals = problem.changes(chosen)
        single = within(errors.amax(0), totals)
        best, numbers = float(single.min()), (int(single.argmin()),)
        if not best < now - 1e-12 * abs(now):
            # The changes that are best beside what they cost, with all others.
            order = (errors.amax(0) * totals).argsort()[:_MOST_PAIRS]
            double = within(*problem.pairs(chosen, order))
            at = int(double.argmin())
            best = float(double.flatten()[at])
            numbers = int(order[at // double.shape[1]]), at % double.shape[1]
        if not best < now - 1e-12 * abs(now):
            return chosen
        chosen, now = _changed(problem, chosen, *numbers), best
