"""Cuts a plan into few, large, dense attention problems: how the CPU backend goes about its work.

PyTorch's fused CPU attention needs twice as long per pair with 16 query rows as with 512. So
neighbouring query blocks share a problem wherever they see the same keys: the keys that *all*
blocks of a group of up to 1,024 rows see in full are attended by the whole group at once; what is
left goes to the two halves of the group, and so on down to single blocks. Partial blocks follow.
Blocks that see alike need not be neighbours: the same place in several frames of a video sees the
same far frames. Where lists are long, groups of any blocks are therefore tried first, grown one
block at a time around what they have in common.
Before that, keys of a partial block that no query or every query of the block can see are told
apart by the bounding box of the queries, so that the plan's key blocks may be coarse.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from dittfast.plan import METRICS, PlanTensors, block_states, token_rule

# Rows that share a problem: more of them do not make it faster.
_GROUP_ROWS = 1024
# A group takes its common keys only if they are worth one more merge of its rows.
_LEAST_SHARED_KEYS = 96
# Share of all pairs below which lists have too little in common for groups of distant blocks.
_LEAST_COMMON_SHARE = 0.25
# How often such groups are looked for. The second time finds a tenth of what the first did.
_SCATTERED_ROUNDS = 2
# Multiplications a round may take: bounds its time.
_MOST_COMPARED = 1 << 32
# Problems of fewer pairs than this share a call.
_PAIRS_WORTH_A_CALL = 1 << 17
# Cells of a table of query blocks by keys: bounds memory.
_TABLE_CELLS = 1 << 22
# A block over more frames than this is not cut down to the keys its queries can see.
_MOST_FRAMES = 8


class Call(NamedTuple):
    """``count`` dense problems of one size, on neighbouring rows.

    Attributes:
        batch, head: which list of the plan.
        start: first row; problem ``i`` has the queries ``start + i * rows ...``. If ``scattered``,
            the rows are those at this place of :attr:`Worklist.scattered`.
        rows: queries of each problem.
        count: problems.
        keys: key positions of each problem, ``[count * keys]`` of :attr:`Worklist.positions`.
        partial: whether the token rule applies.
        scattered: whether the rows are not neighbours; then ``count`` is 1.
    """

    batch: int
    head: int
    start: int
    rows: int
    count: int
    keys: int
    partial: int = 0
    scattered: int = 0


class Worklist(NamedTuple):
    """All calls of a plan, and the order of query rows in which they are contiguous.

    Attributes:
        blocks: ``[nQ]`` int32. Query blocks by row: those that see alike are neighbours.
        rows: ``[num_queries]`` int32, the position that each row holds; empty if the same.
        calls: together they cover every visible token pair of every list exactly once.
        positions: int32 key positions, call after call.
        scattered: int32 rows of the calls whose rows are not neighbours.
    """

    blocks: torch.Tensor
    rows: torch.Tensor
    calls: list[Call]
    positions: torch.Tensor
    scattered: torch.Tensor

    def pack(self) -> torch.Tensor:
        """One int32 tensor, which can be an argument of an op."""
        parts = self.blocks, self.rows, self.scattered
        sizes = [*(part.numel() for part in parts), len(self.calls)]
        calls = torch.tensor(self.calls, dtype=torch.int32).flatten()
        header = torch.tensor(sizes, dtype=torch.int32)
        return torch.cat([header, *parts, calls, self.positions])

    @classmethod
    def unpack(cls, x: torch.Tensor) -> Worklist:
        *sizes, calls = x[:4].tolist()
        sizes = [4, *sizes, calls * len(Call._fields)]
        _, blocks, rows, scattered, table, positions = x.split([*sizes, x.numel() - sum(sizes)])
        calls = [Call(*row) for row in table.view(-1, len(Call._fields)).tolist()]
        return cls(blocks, rows, calls, positions, scattered)


def make_worklist(t: PlanTensors) -> torch.Tensor:
    """The packed :class:`Worklist` of a plan."""
    rows = _arrange(t)
    none = torch.empty(0, dtype=torch.int64)
    calls, positions, scattered, at = [], [none], [none], 0
    for batch in range(t.kv_indices.shape[0]):
        for head in range(t.kv_indices.shape[1]):
            for call, keys, own_rows in _list_calls(t, rows, batch, head):
                if own_rows is not None:
                    call = call._replace(start=at, scattered=1)
                    at += own_rows.numel()
                    scattered.append(own_rows)
                calls.append(call)
                positions.append(keys)
    held = torch.empty(0, dtype=torch.int32) if rows.positions is None else rows.positions.int()
    positions, scattered = torch.cat(positions).int(), torch.cat(scattered).int()
    return Worklist(rows.blocks.int(), held, calls, positions, scattered).pack()


class _Rows(NamedTuple):
    """Row order: ``blocks [nQ]``, their first row and length, and the position each row holds."""

    blocks: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    positions: torch.Tensor | None


def expand(starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """``starts[0], starts[0] + 1, ... (lengths[0] of them), starts[1], ...``"""
    before = torch.cumsum(lengths, 0) - lengths
    return torch.repeat_interleave(starts - before, lengths) + torch.arange(int(lengths.sum()))


def _arrange(t: PlanTensors) -> _Rows:
    """Rows by position, or along a space-filling curve where the token rule gives places."""
    starts, lengths = t.q_starts.long(), t.q_lengths.long()
    blocks = torch.argsort(starts)
    if t.metric and METRICS[t.metric - 1] != "raster":
        y, x = coordinates(t, t.q_place[starts]).unbind(-1)
        curve = torch.zeros_like(y)
        for bit in range(15):
            curve |= (y >> bit & 1) << 2 * bit + 1 | (x >> bit & 1) << 2 * bit
        key = t.q_frame[starts].long() + 1 << 30 | curve
        blocks = blocks[torch.argsort(key[blocks], stable=True)]
    starts, lengths = starts[blocks], lengths[blocks]
    positions = expand(starts, lengths)
    if torch.equal(positions, torch.arange(positions.numel())):
        return _Rows(blocks, starts, lengths, None)
    return _Rows(blocks, torch.cumsum(lengths, 0) - lengths, lengths, positions)


def _list_calls(
    t: PlanTensors, rows: _Rows, batch: int, head: int
) -> Iterator[tuple[Call, torch.Tensor, torch.Tensor | None]]:
    """Calls of one list, each with its key positions and, if they are not neighbours, its rows."""
    listed = t.kv_indices, t.kv_num_blocks, t.kv_num_full_blocks
    listed = [x[batch, head][rows.blocks] for x in listed]
    lists, num_listed, num_full = listed
    slot = torch.arange(lists.shape[1])
    is_partial = (slot < num_listed[:, None]) & (slot >= num_full[:, None])
    kv_starts, kv_lengths = t.kv_starts.long(), t.kv_lengths.long()
    num_blocks = kv_starts.numel()
    # With a rule the table tells single keys apart, without one it has a column per key block.
    by_key = bool(t.metric) and bool(is_partial.any())
    if by_key:
        by = torch.argsort(kv_starts)
        block_of = torch.repeat_interleave(by, kv_lengths[by])
        boxes = _boxes(t, rows)
    columns = block_of.numel() if by_key else num_blocks
    span = 1 << max(0, (_GROUP_ROWS // t.q_block_size).bit_length() - 1)
    step = max(1, _TABLE_CELLS // (span * columns)) * span
    for first in range(0, lists.shape[0], step):
        part = slice(first, first + step)
        starts, lengths = rows.starts[part], rows.lengths[part]
        members = starts.numel()
        seen = block_states(*(x[part] for x in listed), num_blocks) == 2
        if by_key:
            seen = seen.index_select(1, block_of)
            row, at = is_partial[part].nonzero(as_tuple=True)
            block = lists[part][row, at].long()
            row = torch.repeat_interleave(row, kv_lengths[block])
            key = expand(kv_starts[block], kv_lengths[block])
            some, every = _classify(t, boxes, row + first, key)
            seen[row[every], key[every]] = True
            some &= ~every
            partial = row[some], key[some]
        weight = None if by_key else kv_lengths
        if members == lists.shape[0]:
            for group, column in _alike(seen, span, weight):
                key = column if by_key else expand(kv_starts[column], kv_lengths[column])
                own_rows = expand(starts[group], lengths[group])
                call = Call(batch, head, 0, own_rows.numel(), 1, key.numel())
                yield call, key, own_rows
        for size, group, column in _shared(seen, span, weight):
            last = torch.arange(size, members + size, size).clamp_max_(members) - 1
            group_rows = (starts + lengths)[last] - starts[::size]
            key = column
            if not by_key:
                key = expand(kv_starts[column], kv_lengths[column])
                group = torch.repeat_interleave(group, kv_lengths[column])
            yield from _calls(batch, head, starts[::size], group_rows, group, key, 0)
        if by_key:
            yield from _calls(batch, head, starts, lengths, *partial, 1)


def _alike(seen: torch.Tensor, span: int, weight: torch.Tensor | None):
    """Take groups of ``span`` blocks, neighbours or not, with many columns in common.

    A group grows from the block that has most left by the block that shares most of what its
    members have in common. Yields ``(blocks, columns)`` and clears these cells of ``seen``.

    Args:
        seen, weight: as for :func:`_shared`.
    """
    members, columns = seen.shape
    if span == 1 or members * seen.numel() > _MOST_COMPARED:
        return
    weight = torch.ones(columns) if weight is None else weight.float()
    cells = seen.float()
    if torch.mv(cells, weight).mean() < _LEAST_COMMON_SHARE * weight.sum():
        return
    for _ in range(_SCATTERED_ROUNDS):
        taken = torch.zeros(members)
        for _ in range(members // span):
            blocks, common = [], weight
            for _ in range(span):
                best = int((torch.mv(cells, common) + taken).argmax())
                blocks.append(best)
                common = common * cells[best]
                taken[best] = -torch.inf
            if common.sum() >= _LEAST_SHARED_KEYS:
                group, shared = torch.tensor(blocks).sort().values, common.nonzero()[:, 0]
                cells[group[:, None], shared] = 0
                seen[group[:, None], shared] = False
                yield group, shared


def _shared(seen: torch.Tensor, span: int, weight: torch.Tensor | None):
    """Distribute ``seen [blocks, columns]`` over groups of ``span, span / 2, ... 1`` blocks.

    Every True cell goes to the largest group whose members all have it, if that group gets
    enough keys. Yields ``(size, group, column)`` for each size, sorted by group.

    Args:
        weight: ``[columns]`` keys that a column stands for; None: one each.
    """
    members, columns = seen.shape
    # Rows past the end see everything: they must not narrow what real ones have in common.
    common = torch.ones(-(-members // span) * span, columns, dtype=torch.bool)
    common[:members] = seen
    sizes = [1]
    while sizes[-1] < span:
        sizes.append(2 * sizes[-1])
    pyramid = [common]
    for _ in sizes[1:]:
        pyramid.append(pyramid[-1][0::2] & pyramid[-1][1::2])
    taken, above = torch.zeros_like(pyramid[-1]), len(sizes) - 1
    for level in range(len(sizes) - 1, -1, -1):
        taken = taken.repeat_interleave(1 << above - level, 0)
        above = level
        own = pyramid[level] & ~taken
        own[-(-members >> level) :] = False
        if level:
            keys = own.sum(1) if weight is None else torch.mv(own.double(), weight.double())
            own &= (keys >= _LEAST_SHARED_KEYS)[:, None]
            taken |= own
        yield sizes[level], *own.nonzero(as_tuple=True)


def _calls(batch, head, starts, rows, group, key, partial: int):
    """Calls on neighbouring rows from (group, key position) pairs sorted by group."""
    counts = torch.bincount(group, minlength=starts.numel())
    ends = torch.cumsum(counts, 0).tolist()
    counts, starts, rows = counts.tolist(), starts.tolist(), rows.tolist()
    at = 0
    while at < len(counts):
        size, num_rows = counts[at], rows[at]
        if not size:
            at += 1
            continue
        together = at + max(1, _PAIRS_WORTH_A_CALL // (num_rows * size))
        end = at + 1
        while end < min(together, len(counts)) and (counts[end], rows[end]) == (size, num_rows):
            end += 1
        call = Call(batch, head, starts[at], num_rows, end - at, size, partial)
        yield call, key[ends[at] - size : ends[end - 1]], None
        at = end


class _Boxes(NamedTuple):
    """Bounding boxes of the queries of each block, context left out.

    ``low`` and ``high`` ``[nQ, 1 or 2]``: least and greatest coordinates, for "box" ``[nQ, 3]``
    those of first corners, with the frame code behind. ``frames`` ``[nQ, 2]``: least and greatest
    frame code. ``context``: the block has context queries. ``empty``: it has nothing else.
    ``last``: ``low`` and ``high`` of last corners.
    """

    low: torch.Tensor
    high: torch.Tensor
    frames: torch.Tensor
    context: torch.Tensor
    empty: torch.Tensor
    last: tuple[torch.Tensor, torch.Tensor] | None = None


def coordinates(t: PlanTensors, place: torch.Tensor) -> torch.Tensor:
    """``[..., 1]`` raster index for "raster", ``[..., 2]`` (row, column) otherwise; int64."""
    place = place.long()
    if METRICS[t.metric - 1] == "raster":
        return place[..., None]
    return torch.stack(token_rule(t).row_and_column(place), -1)


def squared_limits(t: PlanTensors) -> torch.Tensor:
    """``limits`` to compare with squared distances; int64, -1 where nothing is kept."""
    limits = t.limits.long()
    if METRICS[t.metric - 1] == "raster":
        limits = torch.where(limits < 0, -1, limits * limits)
    return limits


def _boxes(t: PlanTensors, rows: _Rows) -> _Boxes:
    count = rows.blocks.numel()
    block = torch.repeat_interleave(torch.arange(count), rows.lengths)

    def held(x: torch.Tensor) -> torch.Tensor:
        return x if rows.positions is None else x[rows.positions]

    frame = held(t.q_frame).long()
    placed = frame >= 0

    def extremes(frame: torch.Tensor, place: torch.Tensor):
        """Least and greatest (coordinates, frame code) of the queries of each block."""
        values = torch.cat([coordinates(t, held(place)), frame[:, None]], 1)
        index = block[placed][:, None].expand(-1, values.shape[1])
        low = torch.zeros(count, values.shape[1], dtype=torch.int64)
        return tuple(
            low.scatter_reduce(0, index, values[placed], bound, include_self=False)
            for bound in ("amin", "amax")
        )

    low, high = extremes(frame, t.q_place)
    context = torch.zeros(count, dtype=torch.bool).index_fill_(0, block[~placed], True)
    empty = torch.ones(count, dtype=torch.bool).index_fill_(0, block[placed], False)
    frames = torch.stack([low[:, -1], high[:, -1]], 1)
    if METRICS[t.metric - 1] == "box":
        last = extremes(held(t.q_frame_last).long(), t.q_place_last)
        return _Boxes(low, high, frames, context, empty, last)
    return _Boxes(low[:, :-1], high[:, :-1], frames, context, empty)


def _classify(t: PlanTensors, boxes: _Boxes, block: torch.Tensor, key: torch.Tensor):
    """For pairs of a query block and a key: may some query see it; do all of them?

    ``some`` is never False where a query sees the key, ``every`` never True where one does not.
    """
    place, frame = coordinates(t, t.kv_place[key]), t.kv_frame[key].long()
    if boxes.last is not None:
        return _classify_boxes(t, boxes, block, torch.cat([place, frame[:, None]], 1))
    low, high = boxes.low[block], boxes.high[block]
    near = torch.maximum(low - place, place - high).clamp_min_(0)
    far = torch.maximum((place - low).abs_(), (place - high).abs_())
    near, far = (near * near).sum(1), (far * far).sum(1)
    first, last = boxes.frames[block].unbind(1)
    limits = squared_limits(t)
    least, most = None, None
    frames = 1 + int((boxes.frames[:, 1] - boxes.frames[:, 0]).clamp_max(_MOST_FRAMES - 1).max())
    for step in range(frames):
        apart = (torch.minimum(first + step, last) - frame).abs()
        limit = limits[apart.clamp_max_(limits.numel() - 1)]
        least = limit if least is None else torch.minimum(least, limit)
        most = limit if most is None else torch.maximum(most, limit)
    free = (frame < 0) | (first >> 16 != frame >> 16) | ((frame & 0xFFFF) < t.sink_frames)
    some, every = (near <= most) | free, (far <= least) | free
    # Blocks over several grids or many frames stay as they are.
    mixed = (first >> 16 != last >> 16) | (last - first >= _MOST_FRAMES)
    empty = boxes.empty[block]
    return some | mixed | boxes.context[block] | empty, every & ~mixed | empty


def _classify_boxes(t: PlanTensors, boxes: _Boxes, block: torch.Tensor, place: torch.Tensor):
    """:func:`_classify` for the metric "box"; ``place [n, 3]`` of keys: row, column, frame code."""
    low, high = boxes.low[block], boxes.high[block]
    last_low, last_high = (x[block] for x in boxes.last)
    frame, (first, last) = place[:, 2], boxes.frames[block].unbind(1)
    free = (frame < 0) | ((frame & 0xFFFF) < t.sink_frames)
    free |= (frame >> 16 < first >> 16) | (frame >> 16 > last >> 16)
    some = ((low <= place) & (place <= last_high)).all(1) | free
    every = ((high <= place) & (place <= last_low)).all(1) | free
    mixed = first >> 16 != last >> 16
    empty = boxes.empty[block]
    return some | mixed | boxes.context[block] | empty, every & ~mixed | empty
