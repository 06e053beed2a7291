"""The block lists of a plan: which entries count, as a table of blocks, and seen from the keys.

Functions take ``kv_indices [B|1, H|1, nQ, maxK]``, ``kv_num_blocks`` and ``kv_num_full_blocks``
``[B|1, H|1, nQ]`` as :class:`dittfast.plan.Plan` has them, or rows of these.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


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


class Transpose(NamedTuple):
    """For each key block the query blocks that see it: :class:`Plan` seen from the keys.

    One list lies behind the other: pooled keys are seen by all query blocks and others by few, so
    a rectangle of lists would grow with the square of the sequence.

    Attributes:
        q_indices: ``[T]`` int32 query blocks, T the listed blocks of all batch rows and heads.
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


def transpose_lists(kv_indices, kv_num_blocks, kv_num_full_blocks, num_kv_blocks: int) -> Transpose:
    """Invert block lists: which query blocks see each key block, full ones first.

    Example: query block 0 sees [2], 1 sees [0, 2] -> key block 0 is seen by [1], 1 by [], 2 by
    [0, 1]. Deterministic, O(n log n) in the number of listed blocks, and no atomics later.
    """
    batch, heads, n_q, width = kv_indices.shape
    device = kv_indices.device
    slot = torch.arange(width, device=device)
    used = used_entries(kv_indices, kv_num_blocks)
    partial = slot >= kv_num_full_blocks[..., None]
    lists, rows = batch * heads, torch.arange(n_q, device=device)[:, None]
    owner = torch.arange(lists, device=device).view(batch, heads, 1, 1)
    cell = owner * num_kv_blocks + kv_indices
    cell, row, partial = (x.expand(kv_indices.shape)[used] for x in (cell, rows, partial))
    runs = run_lengths(kv_indices, kv_num_blocks)
    at = runs.nonzero(as_tuple=True)
    length = runs[at].long()
    block = torch.arange(int(length.sum()), device=device)
    block -= torch.repeat_interleave(length.cumsum(0) - length, length)
    list_ = torch.repeat_interleave(at[0] * heads + at[1], length)
    cell = torch.cat([cell, list_ * num_kv_blocks + block])
    row = torch.cat([row, torch.repeat_interleave(at[2], length)])
    partial = torch.cat([partial, torch.zeros_like(block, dtype=torch.bool)])
    by = torch.argsort((cell * 2 + partial) * n_q + row)
    cell, row, partial = cell[by], row[by], partial[by]
    count = torch.bincount(cell, minlength=lists * num_kv_blocks)
    full = torch.bincount(cell[~partial], minlength=lists * num_kv_blocks)
    shape = (batch, heads, num_kv_blocks)
    first = (count.cumsum(0) - count).view(shape)
    return Transpose(row.int(), first, count.int().view(shape), full.int().view(shape))
