"""Neighborhood attention with strides and dilation (Hassani et al. 2025, arXiv:2504.16922)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from ..layout import Context, Grid, Layout, make_blocks, split_evenly
from ..plan import ListBuilder, Plan, TokenRule
from .base import Method
from .checks import check_flag, check_integer, check_tile
from .ladder import radii
from .pairs import chunks, expand_ranges, product

AXES = ("frames", "rows", "columns")
# Pairs of blocks worked on together: bounds memory, not the result.
_AT_ONCE = 1 << 20
# Tokens of a block: cut along strides, and otherwise. Larger ones compute faster and waste more
# where a window cuts them.
_MOST_TOKENS = 128
_TILE_TOKENS = 64
# Stride groups of fewer tokens than this are no blocks worth having: a GPU multiplies 16 rows.
_LEAST_TOKENS = 16


@dataclass(frozen=True)
class Neighborhood(Method):
    """Each image token sees a window of exactly ``window`` tokens around it, and all text.

    Axes (frames, rows, columns) are independent: a key is seen if each axis sees it. On an axis of
    n tokens with window k, stride s and dilation d, tokens see their own residue class modulo d
    alone, as if it were an axis of m tokens. With j the place in it::

        leader c = min(s * (j // s) + s // 2, m - 1)     first = clamp(c - k // 2, 0, m - k)
        seen: the k places from first on

    So windows are shifted inside at the borders and not cut off, an even one reaches one token
    further back than ahead, and the s queries of a stride group share the window of their leader.
    A causal axis has ``c = min(s * (j // s) + s - 1, m - 1)`` and sees the places above ``c - k``
    up to j itself. Context tokens see and are seen by everything but padding. In a layout with
    several grids each has its own neighbourhoods and is fully visible to the others.

    Blocks follow the stride where it is above 1 on some axis and its groups hold at least 16
    tokens (an axis without a window counts whole, one with stride 1 as one token): then every
    block is seen in full or not at all. Elsewhere blocks that a window cuts are masked token by
    token. Dilated tokens stand in blocks of their residue class.

    Args:
        window: at least 1 per axis: tokens seen. One number is for rows and columns, where all
            frames are seen; a tuple is for the last axes of (frames, rows, columns), None in it
            sees the whole axis. No more than the axis has, divided by dilation.
        stride: at least 1 per axis, at most the window: neighbouring queries that share one. One
            number is for every axis with a window.
        dilation: at least 1 per axis: distance of the tokens seen, as ``stride``.
        causal: whether tokens see none behind themselves; one for all axes with a window, or one
            per axis.
        tile: tokens of a block as (frames, height, width), at most 256 together; None chooses.
            It changes the speed, not the result.

    Raises:
        ValueError: an option out of range; at the plan, a layout without a grid, or a window
            larger than an axis.
    """

    name: ClassVar[str] = "neighborhood"

    window: int | tuple[int | None, ...] = 16
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False
    tile: tuple[int, int, int] | None = None

    @classmethod
    def ladder(cls, layout: Layout) -> list[dict]:
        windows = dict.fromkeys(max(2, round(2 * radius)) for radius in radii(layout))
        return [{"window": window} for window in windows]

    def __post_init__(self):
        for name in ("window", "stride", "dilation", "causal"):
            value = getattr(self, name)
            if isinstance(value, (tuple, list)):
                object.__setattr__(self, name, tuple(value))
                if not 1 <= len(value) <= 3:
                    raise ValueError(
                        f"{name} must have 1 to 3 entries, the last of ({', '.join(AXES)}); "
                        f"got {value!r}"
                    )
        if self.tile is not None:
            object.__setattr__(self, "tile", check_tile(self.tile))
        options = zip(AXES, *map(self._per_axis, ("window", "stride", "dilation", "causal")))
        for axis, window, stride, dilation, causal in options:
            check_flag("causal", causal, f" on {axis}")
            if window is not None:
                check_integer(f"window on {axis}", window, 1, remedy="None sees the whole axis")
            most = window or 1
            remedy = "at most the window" if window else "1, for there is no window on this axis"
            check_integer(f"stride on {axis}", stride, 1, most, remedy)
            check_integer(
                f"dilation on {axis}", dilation, 1, None if window else 1, "1 sees neighbours"
            )

    def _per_axis(self, name: str) -> tuple:
        """An option for frames, rows and columns; where it says nothing, what changes nothing."""
        value, neutral = getattr(self, name), {"window": None, "causal": False}.get(name, 1)
        if isinstance(value, tuple):
            return (neutral,) * (3 - len(value)) + value
        if name == "window":
            return None, value, value
        windows = self._per_axis("window")
        return tuple(neutral if window is None else value for window in windows)

    def plan(
        self, layout: Layout, q: torch.Tensor | None = None, k: torch.Tensor | None = None
    ) -> Plan:
        layout.grid  # noqa: B018 (raises on text-only layouts)
        tiled = {
            start: _Tiled.of(self._axes(grid), self.tile)
            for start, grid in layout.spans()
            if isinstance(grid, Grid)
        }
        sides = _Side.of(layout, tiled, 0), _Side.of(layout, tiled, 1)
        lists, partial = _lists(layout, tiled, *sides)
        indices, count, full = lists.lists()
        rule = None
        if not torch.equal(count, full):
            rule = _rule(layout, tiled, *sides)
        return Plan(
            indices,
            count,
            full,
            *(side.blocks() for side in sides),
            rule=rule,
            kv_log_weight=layout.kv_log_weight(),
            num_partial_pairs=None if rule is None else partial,
        )

    def _axes(self, grid: Grid) -> tuple[_Axis, ...]:
        """What is seen along each axis of a grid; raises where a window does not fit."""
        options = zip(
            grid.shape, AXES, *map(self._per_axis, ("window", "stride", "dilation", "causal"))
        )
        axes = []
        for size, name, window, stride, dilation, causal in options:
            if window is None or (size == 1 and not isinstance(self.window, tuple)):
                axes.append(_Axis(size, size, 1, 1, causal))
                continue
            if window * dilation > size:
                raise ValueError(
                    f"window on {name} must be 1..{size // dilation} on a grid of "
                    f"{' x '.join(map(str, grid.shape))} tokens (frames, rows, columns)"
                    f"{f' with dilation {dilation}' if dilation > 1 else ''}; got {window} (None "
                    "in a tuple sees the whole axis)"
                )
            axes.append(_Axis(size, window, stride, dilation, causal))
        return tuple(axes)


class _Axis(NamedTuple):
    """One axis of a grid and how it is seen."""

    size: int
    window: int
    stride: int
    dilation: int
    causal: bool

    @property
    def whole(self) -> bool:
        return self.window == self.size and not self.causal

    def intervals(self) -> tuple[np.ndarray, ...]:
        """``(coordinate, first, last, edges)`` by *place*: residue classes one after the other.

        ``coordinate [n]`` is what stands at a place; the query there sees the places ``first ...
        last``, which both never fall. Classes begin at the places ``edges``.
        """
        residue = np.arange(self.dilation)
        sizes = (self.size - residue + self.dilation - 1) // self.dilation
        edges = np.cumsum(sizes) - sizes
        residue, begin, m = (np.repeat(x, sizes) for x in (residue, edges, sizes))
        j = np.arange(self.size) - begin
        group = self.stride * (j // self.stride)
        if self.causal:
            leader = np.minimum(group + self.stride - 1, m - 1)
            first, last = np.maximum(leader - self.window + 1, 0), j
        else:
            leader = np.minimum(group + self.stride // 2, m - 1)
            first = np.clip(leader - self.window // 2, 0, m - self.window)
            last = first + self.window - 1
        return residue + j * self.dilation, begin + first, begin + last, edges


def _cut(edges: np.ndarray, size: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of pieces that end at every edge and hold at most ``most`` places."""
    lengths = np.diff(np.append(edges, size))
    parts = -(-lengths // most)
    owner, part = expand_ranges(np.zeros_like(parts), parts)
    width = -(-lengths // parts)[owner]
    starts = edges[owner] + part * width
    return starts, np.minimum(width, (edges + lengths)[owner] - starts)


class _Pieces(NamedTuple):
    """One axis cut into pieces, of queries and of keys.

    Query piece p sees the key pieces ``seen[0][p] ... seen[1][p]``, and those of them from
    ``full[0][p]`` to ``full[1][p]`` with all its queries in full.
    """

    places: tuple[np.ndarray, ...]  # coordinate, first and last of _Axis.intervals
    starts: tuple[np.ndarray, np.ndarray]
    lengths: tuple[np.ndarray, np.ndarray]
    seen: tuple[np.ndarray, np.ndarray]
    full: tuple[np.ndarray, np.ndarray]

    @classmethod
    def of(cls, places, edges: tuple[np.ndarray, np.ndarray], most: int) -> _Pieces:
        _, first, last = places
        (q_starts, q_lengths), (starts, lengths) = (_cut(x, first.size, most) for x in edges)
        ends, q_last = starts + lengths - 1, q_starts + q_lengths - 1
        at = lambda x: np.searchsorted(starts, x, "right") - 1  # noqa: E731
        seen = at(first[q_starts]), at(last[q_last])
        full = (
            np.searchsorted(starts, first[q_last]),
            np.searchsorted(ends, last[q_starts], "right") - 1,
        )
        return cls(places, (q_starts, starts), (q_lengths, lengths), seen, full)

    def kept_pairs(self) -> int:
        _, first, last = self.places
        return int((last - first + 1).sum())

    def full_pairs(self) -> int:
        sums = np.append(0, np.cumsum(self.lengths[1]))
        low, high = self.full
        return int((self.lengths[0] * (sums[np.maximum(high + 1, low)] - sums[low])).sum())


class _Tiled(NamedTuple):
    """A grid cut into blocks of queries and of keys: products of the pieces of its axes."""

    axes: tuple[_Pieces, _Pieces, _Pieces]

    @classmethod
    def of(cls, axes: tuple[_Axis, ...], tile: tuple[int, int, int] | None) -> _Tiled:
        *places, classes = zip(*(axis.intervals() for axis in axes))
        places = list(zip(*places))
        edges = [(x, x) for x in classes]
        if tile is None and any(axis.stride > 1 and not axis.whole for axis in axes):
            aligned = [_window_edges(*x) for x in places]
            sizes = [x[0].size for x in places]
            mean = math.prod(n / len(q) for n, (q, _) in zip(sizes, aligned))
            if mean >= _LEAST_TOKENS:
                edges = aligned
                tile = _shrunk(
                    [int(np.diff(np.append(q, n)).max()) for n, (q, _) in zip(sizes, edges)]
                )
        tile = tile or _grown(axes)
        return cls(tuple(_Pieces.of(*x) for x in zip(places, edges, tile)))

    def order(self, side: int) -> tuple[np.ndarray, np.ndarray]:
        """``(token, lengths)``: tokens of the grid block after block, and tokens per block."""
        shape = [x.places[0].size for x in self.axes]
        piece = [np.repeat(np.arange(x.lengths[side].size), x.lengths[side]) for x in self.axes]
        place = np.unravel_index(np.arange(math.prod(shape)), shape)
        inside = [p for p in reversed(place)]
        outside = [x[p] for x, p in zip(reversed(piece), inside)]
        by = np.lexsort((*inside, *outside))
        coordinates = (x.places[0][p] for x, p in zip(self.axes, place))
        token = np.ravel_multi_index(tuple(coordinates), shape)[by]
        t, y, x = (axis.lengths[side] for axis in self.axes)
        return token, (t[:, None, None] * y[:, None] * x).reshape(-1)

    def places(self, tokens: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """``(own, first seen, last seen)`` of some tokens along each axis, as places."""
        shape = [x.places[0].size for x in self.axes]
        for axis, coordinate in zip(self.axes, np.unravel_index(tokens, shape)):
            order, first, last = axis.places
            at = np.empty_like(order)
            at[order] = np.arange(order.size)
            at = at[coordinate]
            yield at, first[at], last[at]

    def partial_pairs(self) -> int:
        """Token pairs kept in blocks that are seen in part."""
        kept = math.prod(axis.kept_pairs() for axis in self.axes)
        return kept - math.prod(axis.full_pairs() for axis in self.axes)

    def pairs(self, others: int) -> Iterator[tuple[np.ndarray, ...]]:
        """``(own, rows, cols, full)``: pairs of blocks, of a few query blocks ``own`` at a time.

        ``others`` blocks more of each row are made by the caller.
        """
        shape, keys = zip(*((x.lengths[0].size, x.lengths[1].size) for x in self.axes))
        t, y, x = (axis.seen[1] - axis.seen[0] + 1 for axis in self.axes)
        count = (t[:, None, None] * y[:, None] * x).reshape(-1)
        for chunk in chunks(count + others, _AT_ONCE):
            own = np.arange(chunk.start, chunk.stop)
            owner, rest = expand_ranges(np.zeros_like(own), count[chunk])
            rows = own[owner]
            at = np.unravel_index(rows, shape)
            cols, full, step = np.zeros_like(rows), np.ones(rows.size, dtype=bool), 1
            for axis, piece, size in zip(reversed(self.axes), reversed(at), reversed(keys)):
                first, last = (bound[piece] for bound in axis.seen)
                rest, key = np.divmod(rest, last - first + 1)
                key += first
                full &= (axis.full[0][piece] <= key) & (key <= axis.full[1][piece])
                cols += key * step
                step *= size
            yield own, rows, cols, full


def _window_edges(_, first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places where windows change from one query to the next, and where a window begins or ends."""
    changes = (np.diff(first) != 0) | (np.diff(last) != 0)
    queries = np.append(0, 1 + np.flatnonzero(changes))
    keys = np.union1d(np.append(first, 0), last + 1)
    return queries, keys[keys < first.size]


def _shrunk(tile: list[int]) -> list[int]:
    """A tile of at most ``_MOST_TOKENS`` tokens, halved along its longest side."""
    while math.prod(tile) > _MOST_TOKENS:
        longest = tile.index(max(tile))
        tile[longest] = -(-tile[longest] // 2)
    return tile


def _grown(axes: tuple[_Axis, ...]) -> list[int]:
    """A tile of at most ``_TILE_TOKENS`` tokens, longest where windows are."""
    tile, most = [1, 1, 1], [-(-axis.size // axis.dilation) for axis in axes]
    while 2 * math.prod(tile) <= _TILE_TOKENS:
        room = [n for n in range(3) if tile[n] < most[n]]
        if not room:
            break
        tile[min(room, key=lambda n: tile[n] / axes[n].window)] *= 2
    return tile


class _Side(NamedTuple):
    """The queries or the keys of a layout in blocks, segment after segment."""

    starts: np.ndarray
    lengths: np.ndarray
    order: np.ndarray
    first: dict[int, int]  # the first block of the segment that begins at a token

    @classmethod
    def of(cls, layout: Layout, tiled: dict[int, _Tiled], side: int) -> _Side:
        grids = {start: grid.order(side) for start, grid in tiled.items()}
        # Longer blocks of text would have the kernels take longer tiles everywhere.
        longest = max(int(lengths.max()) for _, lengths in grids.values())
        lengths, order, first, count = [], [], {}, 0
        for start, segment in layout.spans():
            if start in grids:
                token, length = grids[start]
            else:
                token = np.arange(segment.length)
                length = split_evenly(0, segment.length, longest)[1]
            first[start] = count
            count += length.size
            lengths.append(length)
            order.append(start + token)
        lengths = np.concatenate(lengths)
        return cls(np.cumsum(lengths) - lengths, lengths, np.concatenate(order), first)

    def blocks(self):
        identity = np.array_equal(self.order, np.arange(self.order.size))
        return make_blocks(self.starts, self.lengths, None if identity else self.order)


def _lists(layout: Layout, tiled: dict[int, _Tiled], queries: _Side, keys: _Side):
    """The lists, and how many token pairs of partial blocks are kept."""
    every, num_keys = np.arange(queries.lengths.size), keys.lengths.size
    lists, partial = ListBuilder(every.size, num_keys), 0
    q_ends, kv_ends = ([*x.first.values(), x.lengths.size] for x in (queries, keys))
    for number, (start, segment) in enumerate(layout.spans()):
        first, kv_first = q_ends[number], kv_ends[number]
        if isinstance(segment, Context):
            lists.add_runs(every[first : q_ends[number + 1]], num_keys)
            continue
        others = np.delete(np.arange(num_keys), slice(kv_first, kv_ends[number + 1]))
        partial += tiled[start].partial_pairs()
        for own, rows, cols, full in tiled[start].pairs(others.size):
            pairs = rows + first, cols + kv_first, full
            lists.add(pairs, (*product(own + first, others), True))
    return lists, partial


def _rule(layout: Layout, tiled: dict[int, _Tiled], queries: _Side, keys: _Side) -> TokenRule:
    """Which pairs of a block that a window cuts are kept. Raises where a grid is too large."""
    bits = max((max(grid.width for grid in layout.grids) - 1).bit_length(), 1)
    for grid in layout.grids:
        if (grid.height - 1).bit_length() + bits > 31 or grid.frames > 1 << 16:
            raise ValueError(
                f"a grid of {' x '.join(map(str, grid.shape))} tokens is too large for windows "
                f"that are told token by token: at most 65536 frames, and 2**31 in a frame"
            )
    corners = np.full((3, layout.num_tokens), -1), np.zeros((3, layout.num_tokens), dtype=np.int64)
    for number, (start, grid) in enumerate(tiled.items()):
        span = slice(start, start + math.prod(x.places[0].size for x in grid.axes))
        t, y, x = (np.stack(place) for place in grid.places(np.arange(span.stop - span.start)))
        corners[0][:, span] = number << 16 | t
        corners[1][:, span] = y << bits | x
    own, first, last = zip(*(torch.from_numpy(x.astype(np.int32)) for x in corners))
    q_order, kv_order = (torch.from_numpy(side.order) for side in (queries, keys))
    return TokenRule(
        "box",
        torch.empty(0, dtype=torch.int32),
        *(x[q_order] for x in first),
        *(x[kv_order] for x in own),
        0,
        *(x[q_order] for x in last),
        bits,
    )
