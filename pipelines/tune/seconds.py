"""Seconds of calls from many timings, of which every single one is noisy."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from dittfast.methods.base import Method


def steadied(records: Sequence[dict], methods: Sequence[Method]) -> list[dict]:
    """Records of the form of :data:`~.recording.FORM`, with seconds that many calls agree on.

    Where one of many noisy timings is believed, a search finds the one that was lucky. So dense
    attention takes the median of calls of its shape, and a candidate beside it what it takes of
    dense seconds of the same moment: for planning the median, and for the rest its work at the
    median rate of all its calls. The start of a call is the median of all settings of a method.
    """
    every = [one for record in records for one in record["calls"]]
    dense = _medians(every, _shape, lambda one: one["dense_seconds"])
    planning, rate, start = [], [], {}
    for number, method in enumerate(methods):
        tried = [(one["tried"][number], one["dense_seconds"]) for one in every]
        planning.append(statistics.median(x["planning"] / d for x, d in tried))
        rates = [(x["seconds"] - x["planning"]) / d / x["work"] for x, d in tried]
        rate.append(statistics.median(rates))
        start.setdefault(method.name, []).extend(record["start"][number] for record in records)

    def steady(one: dict) -> dict:
        own = dense[_shape(one)]
        tried = [
            x | {"planning": own * p, "seconds": own * (p + r * x["work"])}
            for x, p, r in zip(one["tried"], planning, rate)
        ]
        return one | {"dense_seconds": own, "tried": tried}

    starts = [max(statistics.median(start[method.name]), 0.0) for method in methods]
    return [r | {"calls": [steady(x) for x in r["calls"]], "start": starts} for r in records]


def _shape(one: dict) -> tuple[int, int]:
    return one["heads"], one["head_dim"]


def _medians(calls: Sequence[dict], key: Callable, value: Callable) -> dict:
    groups: dict = {}
    for one in calls:
        groups.setdefault(key(one), []).append(value(one))
    return {name: statistics.median(values) for name, values in groups.items()}
