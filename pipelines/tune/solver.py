"""A knapsack with several choices for each item: the cheapest ones whose errors add up to a limit.

Of every item only the choices on the lower convex hull of (error, cost) matter to the relaxed
problem (Sinha and Zoltners 1979), and steps along the hulls, taken in the order of what they save
for each unit of error, solve it for every limit at once. What is left of the limit is filled with
any single changes that still fit. The result is at most one step of one item above the optimum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple


class Choice(NamedTuple):
    """One way to settle an item.

    Attributes:
        cost, error: what is minimised, and what is limited; they add up over items.
        what: whatever the caller means by it.
    """

    cost: float
    error: float
    what: Any = None


def hull(choices: Sequence[Choice]) -> list[Choice]:
    """The lower convex hull: from the least error on, ever cheaper at ever less saved by error."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.error, c.cost)):
        if kept and choice.cost >= kept[-1].cost:
            continue
        while len(kept) > 1 and _rate(kept[-2], kept[-1]) <= _rate(kept[-1], choice):
            kept.pop()
        kept.append(choice)
    return kept


def _rate(a: Choice, b: Choice) -> float:
    """What the step from a to b saves for each unit of error."""
    more = b.error - a.error
    return (a.cost - b.cost) / more if more > 0 else float("inf")


def path(items: Sequence[Sequence[Choice]]) -> Iterator[tuple[int, Choice]]:
    """``(item, choice)``: every item at its least error, then the steps that save most first."""
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


def cheapest(items: Sequence[Sequence[Choice]], most_error: float) -> list[Choice] | None:
    """A choice for every item, of nearly the least total cost with errors up to ``most_error``.

    Returns:
        The choices; None where even the most exact ones err more.
    """
    chosen: list[Choice | None] = [None] * len(items)
    spent, blocked = 0.0, set()
    for number, choice in path(items):
        before = chosen[number]
        more = choice.error - (0.0 if before is None else before.error)
        if before is not None and (number in blocked or spent + more > most_error):
            blocked.add(number)  # what comes after it errs more still
            continue
        chosen[number], spent = choice, spent + more
    if spent > most_error:
        return None
    return _filled(items, chosen, most_error)


def _filled(items, chosen: list[Choice], most_error: float) -> list[Choice]:
    """Take single changes that fit, those that save most first, until there are none."""
    while True:
        spent = sum(c.error for c in chosen)
        fitting = [
            (choice.cost - chosen[number].cost, number, at)
            for number, choices in enumerate(items)
            for at, choice in enumerate(choices)
            if choice.cost < chosen[number].cost
            and spent - chosen[number].error + choice.error <= most_error
        ]
        if not fitting:
            return chosen
        _, number, at = min(fitting)
        chosen[number] = items[number][at]


def most_exact(items: Sequence[Sequence[Choice]], most_cost: float) -> list[Choice] | None:
    """A choice for every item, of nearly the least total error with costs up to ``most_cost``.

    Returns:
        The choices; None where even the cheapest ones cost more.
    """
    turned = [[Choice(c.error, c.cost, c) for c in choices] for choices in items]
    chosen = cheapest(turned, most_cost)
    return None if chosen is None else [c.what for c in chosen]
