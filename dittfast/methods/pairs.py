"""Lists of (query block, key block) pairs, built without a blocks-by-blocks array."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

Pairs = tuple[np.ndarray, np.ndarray]


def expand_ranges(first: np.ndarray, count: np.ndarray) -> Pairs:
    """``(owner, member)``: every integer of the ranges ``first[n] ... first[n] + count[n] - 1``.

    Example: ``expand_ranges([5, 9], [2, 1])`` is ``([0, 0, 1], [5, 6, 9])``.
    """
    count = np.maximum(count, 0)
    owner = np.repeat(np.arange(count.size), count)
    offset = np.arange(owner.size) - (np.cumsum(count) - count)[owner]
    return owner, first[owner] + offset


def product(rows: np.ndarray, cols: np.ndarray) -> Pairs:
    """Every row with every column."""
    return np.repeat(rows, cols.size), np.tile(cols, rows.size)


def chunks(cost: np.ndarray, most: int) -> Iterator[slice]:
    """Consecutive slices of the items, each of total cost ``most`` or less where one item allows.

    Example: ``chunks([2, 2, 9, 1], 4)`` gives ``0:2, 2:3, 3:4``.
    """
    ends = np.cumsum(cost)
    start = 0
    while start < ends.size:
        before = ends[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + most, "right")))
        yield slice(start, end)
        start = end


def sorted_unique(keys: np.ndarray) -> np.ndarray:
    """``np.unique`` by sorting: NumPy's hash table is several times slower on block numbers."""
    keys = np.sort(keys)
    return keys[np.concatenate([[True], keys[1:] != keys[:-1]])] if keys.size else keys


def close_pairs(length: int, limit):
    """How many ordered pairs of ``0 ... length - 1`` are at most ``limit`` (below length) apart."""
    return length * (2 * limit + 1) - limit * (limit + 1)
