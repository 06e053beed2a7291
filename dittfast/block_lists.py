"""The block lists of a plan: which entries count, as a table of blocks, and seen from the keys.

Functions take ``kv_indices [B|1, H|1, nQ, maxK]``, ``kv_num_blocks`` and ``kv_num_full_blocks``
``[B|1, H|1, nQ]`` as :class:`dittfast.plan.Plan` has them, or rows of these.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from .environment import total_memory

# List entries worked on together: bounds memory.
_ENTRIES_AT_ONCE = 1 << 22


def run_lengths(kv_indices: torch.Tensor, kv_num_blocks: torch.Tensor) -> torch.Tensor:
    """``[..., nQ]``: how many key blocks each run covers; 0 for rows that list theirs."""
    return torch.where(kv_num_blocks > kv_indices.shape[-1], kv_num_blocks, 0)


def used_entries(kv_indices: torch.Tensor, kv_num_blocks: torch.Tensor) -> torch.Tensor:
    """Bool like ``kv_indices``: the entries that name a key block; none in the row of a run."""
    width = kv_indices.shape[-1]
    slot = torch.arange(width, device=kv_indices.device)
    return (slot < kv_num_blocks[..., None]) & (kv_num_blocks <= width)[..., None]


def block_states(
    kv_indices: torch.Tensor,
    kv_num_blocks: torch.Tensor,
    kv_num_full_blocks: torch.Tensor,
    num_kv_blocks: int,
) -> torch.Tensor:
    """``[..., nQ, num_kv_blocks]`` int8: 2 where a block is seen in full, 1 in part, 0 unseen."""
    device = kv_indices.device
    slot = torch.arange(kv_indices.shape[-1], device=device)
    kind = torch.where(slot < kv_num_full_blocks[..., None], 2, 1).to(torch.int8)
    # Unused entries fall into a column past the end.
    used = used_entries(kv_indices, kv_num_blocks)
    index = torch.where(used, kv_indices, num_kv_blocks).long()
    shape = *kv_indices.shape[:-1], num_kv_blocks + 1
    state = torch.zeros(shape, dtype=torch.int8, device=device)
    state = state.scatter_(-1, index, kind.expand(index.shape))[..., :-1]
    runs = run_lengths(kv_indices, kv_num_blocks)[..., None]
    return state.masked_fill_(torch.arange(num_kv_blocks, device=device) < runs, 2)


def entry_range(kv_indices: torch.Tensor, listed: torch.Tensor):
    """``(least, greatest, repeated)`` of the first ``listed [B|1, H|1, nQ]`` entries of each row.

    ``repeated`` is the first block listed twice, ``(batch, head, row, block)``, or None. Looks at a
    few rows at a time.
    """
    width = kv_indices.shape[-1]
    rows, counts = kv_indices.detach().cpu().numpy().reshape(-1, width), listed.cpu().numpy()
    counts, slot = counts.reshape(-1, 1), np.arange(width, dtype=np.int32)
    low, high, repeated = 0, 0, None
    for start in range(0, len(rows), max(1, _ENTRIES_AT_ONCE // width)):
        part = slice(start, start + max(1, _ENTRIES_AT_ONCE // width))
        used = slot < counts[part]
        low = min(low, int(rows[part].min(where=used, initial=0)))
        high = max(high, int(rows[part].max(where=used, initial=0)))
        # Unused slots get distinct negative values, so that only real duplicates collide.
        ordered = np.sort(np.where(used, rows[part], np.iinfo(np.int32).min + slot), -1)
        same = ordered[:, 1:] == ordered[:, :-1]
        if repeated is None and same.any():
            row, at = np.argwhere(same)[0]
            place = np.unravel_index(start + row, listed.shape)
            repeated = *(int(x) for x in place), int(ordered[row, at])
    return low, high, repeated


def _check_room(entries: int) -> None:
    """Raise ValueError where lists of so many int32 entries have no room in this machine.

    The system gives memory before it is there, and ends the process that fills it.
    """
    memory = total_memory()
    if memory is not None and entries * 4 > memory:
        raise ValueError(
            f"lists of {entries:,} block pairs take {entries * 4 / 1e9:,.0f} GB, and this machine "
            f"has {memory / 1e9:,.0f} GB; take fewer tokens, or larger blocks"
        )


class ListBuilder:
    """The lists of a plan for all batch rows and heads, from block pairs that come in parts.

    Beside the finished lists there is memory for one part. A row that sees key blocks 0 ... n - 1
    in full is kept as n alone, and becomes a run where n is more than any other row lists.
    """

    def __init__(self, num_q_blocks: int, num_kv_blocks: int):
        self._num_kv_blocks = num_kv_blocks
        self._count = np.zeros(num_q_blocks, dtype=np.int32)
        self._full = np.zeros(num_q_blocks, dtype=np.int32)
        self._listed = np.zeros(num_q_blocks, dtype=np.int32)
        self._parts: list[tuple[int, np.ndarray, np.ndarray]] = []
        self._entries = 0

    def add(self, *pairs: tuple) -> None:
        """All pairs of some rows: ``(rows, cols, full)`` arrays, once or several times.

        Raises:
            ValueError: a block out of range, or a row that has been added before.
        """
        rows, cols = (np.concatenate([np.asarray(p[n]).ravel() for p in pairs]) for n in (0, 1))
        full = np.concatenate([np.broadcast_to(np.asarray(p[2]), np.shape(p[0])) for p in pairs])
        if not rows.size:
            return
        for name, x, count in (
            ("query blocks", rows, self._count.size),
            ("kv_indices", cols, self._num_kv_blocks),
        ):
            if x.min() < 0 or x.max() >= count:
                raise ValueError(f"{name} must lie in 0..{count - 1}, found {x.min()}..{x.max()}")
        first, end = int(rows.min()), int(rows.max()) + 1
        # One integer orders pairs by row, full before partial, then by key block.
        n_k, lines = self._num_kv_blocks, 2 * (end - first)
        dtype = np.int32 if lines * n_k < 1 << 31 else np.int64
        key = (rows - first).astype(dtype)
        key *= 2
        key += ~full.astype(bool)
        key *= n_k
        key += cols.astype(dtype)
        key = np.sort(key)
        edges = np.searchsorted(key, np.arange(lines + 1, dtype=np.int64) * n_k)
        line = key // n_k
        cols = (key - line * n_k).astype(np.int32, copy=False)
        full, count = edges[1::2] - edges[:-1:2], edges[2::2] - edges[:-1:2]
        # Rising and as many as the last one says: then nothing is left out, unless one is repeated.
        last = cols[np.maximum(edges[2::2] - 1, 0)]
        prefix = (count > 0) & (full == count) & (last == count - 1)
        prefix[line[1:][key[1:] == key[:-1]] >> 1] = False
        self._take(first, count, full, np.where(prefix, 0, count))
        if prefix.any():
            cols = cols[~np.repeat(prefix, count)]
        if cols.size:
            self._parts.append((first, np.where(prefix, 0, count), cols))

    def add_runs(self, rows: np.ndarray, length: int) -> None:
        """Rows that see key blocks 0 ... length - 1, all in full."""
        first = int(rows.min()) if rows.size else 0
        count = np.bincount(rows - first) * length
        self._take(first, count, count, np.zeros_like(count))

    def _take(self, first: int, count, full, listed) -> None:
        own = slice(first, first + count.size)
        again = np.flatnonzero((self._count[own] > 0) & (count > 0))
        if again.size:
            raise ValueError(f"query block {first + int(again[0])} was added twice")
        self._entries += int(listed.sum())
        _check_room(self._entries)
        for total, part in ((self._count, count), (self._full, full), (self._listed, listed)):
            total[own] += part.astype(np.int32)

    def lists(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``kv_indices [1, 1, nQ, maxK]``, ``kv_num_blocks`` and ``kv_num_full_blocks``; once."""
        width = max(1, int(self._listed.max()))
        _check_room(self._count.size * width)
        # From the system page by page, as parts are filled in and dropped.
        indices = np.zeros((self._count.size, width), dtype=np.int32)
        slot = np.arange(width, dtype=np.int32)
        for _ in range(len(self._parts)):
            first, listed, cols = self._parts.pop(0)
            indices[first : first + listed.size][slot < listed[:, None]] = cols
        short = np.flatnonzero((self._listed == 0) & (self._count <= width))
        for rows in np.array_split(short, -(-short.size * width // _ENTRIES_AT_ONCE) or 1):
            indices[rows] = np.where(slot < self._count[rows, None], slot, 0)
        return tuple(torch.from_numpy(x)[None, None] for x in (indices, self._count, self._full))


def lists_of_mask(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(kv_indices, kv_num_blocks)`` of a bool mask ``[B|1, H|1, nQ, nK]``.

    Every block is listed: whoever has such a mask may go on to make some of them partial, and
    lists as wide as it take no more room than it does.
    """
    count = mask.sum(-1, dtype=torch.int32)
    width = max(1, int(count.max()))
    indices = torch.argsort((~mask).to(torch.int8), dim=-1, stable=True)[..., :width]
    return indices.int().contiguous(), count


def lists_of_part(
    kv_indices: torch.Tensor,
    kv_num_blocks: torch.Tensor,
    kv_num_full_blocks: torch.Tensor,
    rows: torch.Tensor,
    kept: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The lists of some query blocks over some key blocks, which are numbered anew.

    A row that sees none of these key blocks is empty. Waits for the device.

    Args:
        rows: ``[r]`` int64 query blocks.
        kept: ``[nK]`` bool, the key blocks that are left.

    Returns:
        ``kv_indices [B|1, H|1, r, maxK]``, ``kv_num_blocks`` and ``kv_num_full_blocks``.
    """
    lists = (kv_indices, kv_num_blocks, kv_num_full_blocks)
    indices, count, full = (x.index_select(2, rows) for x in lists)
    before = torch.nn.functional.pad(kept.cumsum(0), (1, 0))  # kept among the first n blocks
    used = used_entries(indices, count)
    indices = torch.where(used, indices, 0).long()  # other entries may be anything
    used = used & kept[indices]
    runs = before[run_lengths(indices, count).long()]
    slot = torch.arange(indices.shape[-1], device=indices.device)
    full = (used & (slot < full[..., None])).sum(-1) + runs
    listed = used.sum(-1)
    width = max(1, int(listed.max()))
    at = torch.argsort((~used).to(torch.int8), dim=-1, stable=True)[..., :width]
    slot = slot[:width]
    numbers = before[indices.gather(-1, at)]
    numbers = torch.where(slot < listed[..., None], numbers, 0)
    numbers = torch.where((slot < runs[..., None]) & (runs <= width)[..., None], slot, numbers)
    return numbers.int(), (listed + runs).int(), full.int()


class Transpose(NamedTuple):
    """For each key block the query blocks that see it: :class:`Plan` seen from the keys.

    One list lies behind the other: pooled keys are seen by all query blocks and others by few, so
    a rectangle of lists would grow with the square of the sequence.

    Attributes:
        q_indices: ``[T]`` int32 query blocks of all batch rows and heads. T is what ``kv_indices``
            has room for, so that nobody waits for a count; entries in no list stand at the end.
        q_first: ``[B|1, H|1, nK]`` int64, where the list of each key block begins.
        q_num_blocks, q_num_full_blocks: ``[B|1, H|1, nK]`` int32, its length and how many of the
            blocks, which come first, are full.
    """

    q_indices: torch.Tensor
    q_first: torch.Tensor
    q_num_blocks: torch.Tensor
    q_num_full_blocks: torch.Tensor

    def rows(self, batch: int, head: int, key_block: int) -> torch.Tensor:
        """The query blocks that see one key block."""
        first = int(self.q_first[batch, head, key_block])
        return self.q_indices[first : first + int(self.q_num_blocks[batch, head, key_block])]


def rows_of_runs(kv_indices: torch.Tensor, kv_num_blocks: torch.Tensor) -> torch.Tensor:
    """``[r]`` int64, the query blocks whose row is a run in some list. Waits for the device."""
    return (run_lengths(kv_indices, kv_num_blocks) > 0).flatten(0, 1).any(0).nonzero()[:, 0]


def transpose_lists(
    kv_indices: torch.Tensor,
    kv_num_blocks: torch.Tensor,
    kv_num_full_blocks: torch.Tensor,
    num_kv_blocks: int,
    run_rows: torch.Tensor | None = None,
) -> Transpose:
    """Invert block lists: which query blocks see each key block, full ones first.

    Example: query block 0 sees [2], 1 sees [0, 2] -> key block 0 is seen by [1], 1 by [], 2 by
    [0, 1]. Deterministic, O(n log n) in the number of list entries, and no atomics later.

    Args:
        run_rows: ``[r]`` int64, a superset of :func:`rows_of_runs`. With it nothing here waits for
            the device; None: looked up.
    """
    if run_rows is None:
        run_rows = rows_of_runs(kv_indices, kv_num_blocks)
    batch, heads, n_q, width = kv_indices.shape
    device, lists = kv_indices.device, batch * heads
    owner = torch.arange(lists, device=device).view(batch, heads, 1, 1) * num_kv_blocks
    # One integer orders pairs by list and key block, full before partial, then by query block.
    key = (owner + kv_indices).mul_(2)
    key += torch.arange(width, device=device) >= kv_num_full_blocks[..., None]
    key.mul_(n_q).add_(torch.arange(n_q, device=device)[:, None])
    end = 2 * lists * num_kv_blocks
    key.masked_fill_(~used_entries(kv_indices, kv_num_blocks), end * n_q)
    if run_rows.numel():
        block = torch.arange(num_kv_blocks, device=device)
        runs = (owner + block) * (2 * n_q) + run_rows[:, None]
        length = run_lengths(kv_indices, kv_num_blocks).index_select(-1, run_rows)
        runs = runs.masked_fill(block >= length[..., None], end * n_q)
        key = torch.cat([key.flatten(), runs.flatten()])
    key = key.flatten().sort().values
    edges = torch.searchsorted(key, torch.arange(end + 1, device=device) * n_q)
    first, full, last = edges[:-1:2], edges[1::2], edges[2::2]
    shape = (batch, heads, num_kv_blocks)
    return Transpose(
        (key % n_q).int(),
        first.reshape(shape),
        (last - first).int().view(shape),
        (full - first).int().view(shape),
    )
