"""Plans for engines whose blocks are all of one size: padded blocks, and lists with every block.

Engines count blocks by their place: block ``b`` is slots ``b * size ... (b + 1) * size - 1``. A
*slot* holds the token of one position, or is padding behind the end of a short block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dittfast.plan import PlanTensors, block_positions, run_lengths


class Side(NamedTuple):
    """Queries or keys as slots.

    Attributes:
        positions: ``[slots]`` int64, the position in each slot; that of some other slot in padding.
        tokens: ``[slots]`` int64, likewise the token.
        padding: ``[slots]`` bool; None where there is none.
    """

    positions: torch.Tensor
    tokens: torch.Tensor
    padding: torch.Tensor | None


def side(t: PlanTensors, name: str, size: int, whole_of: int = 0) -> Side | None:
    """The slots of one side ("q" or "kv") in blocks of ``size``; None where they are its tokens.

    Without padding the last block may end before its last slot.

    Args:
        whole_of: how many tokens there are, if all blocks shall have all their slots.
    """
    starts, lengths, order = (getattr(t, f"{name}_{x}") for x in ("starts", "lengths", "order"))
    even = not getattr(t, f"{name}_ragged") and getattr(t, f"{name}_block_size") == size
    if even and not whole_of % size:
        if order is None:
            return None
        return Side(torch.arange(order.numel(), device=order.device), order.long(), None)
    blocks = torch.arange(starts.numel(), device=starts.device)
    positions, inside = (x.flatten() for x in block_positions(starts, lengths, blocks, size))
    return Side(positions, positions if order is None else order[positions].long(), ~inside)


def slots_of_tokens(one: Side, num_tokens: int) -> torch.Tensor:
    """``[num_tokens]`` int64, the slot of each token."""
    tokens = one.tokens
    if one.padding is not None:  # padding goes into a place past the end
        tokens = torch.where(one.padding, num_tokens, tokens)
    slots = torch.arange(tokens.numel(), device=tokens.device)
    return slots.new_empty(num_tokens + 1).index_copy_(0, tokens, slots)[:-1]


def to_slots(x: torch.Tensor, one: Side | None, is_gradient: bool = False) -> torch.Tensor:
    """``[B, H, tokens, ...]`` as ``[B, H, slots, ...]``, contiguous.

    Args:
        is_gradient: zeros in padding: what is there repeats a token, and would count twice.
    """
    if one is None:
        return x.contiguous()
    slots = x.index_select(2, one.tokens)
    if is_gradient and one.padding is not None:
        padding = one.padding.view(-1, *(1,) * (x.ndim - 3))
        slots = slots.masked_fill(padding, 0)
    return slots


def to_tokens(x: torch.Tensor, one: Side | None, num_tokens: int) -> torch.Tensor:
    """``[B, H, slots, ...]`` as ``[B, H, tokens, ...]``."""
    return x if one is None else x.index_select(2, slots_of_tokens(one, num_tokens))


def in_slots(x: torch.Tensor | None, one: Side | None) -> torch.Tensor | None:
    """``[positions]`` as ``[slots]``."""
    return x if x is None or one is None else x[one.positions]


def slot_bias(
    weight: torch.Tensor | None, keys: Side | None, pads: bool = True
) -> torch.Tensor | None:
    """``[B|1, H|1, slots]`` fp32: log weights of keys, and -inf in padding; None for neither.

    Args:
        weight: ``[B|1, H|1, tokens]``.
        pads: whether padding alone is worth a bias.
    """
    bias = None if weight is None else weight.float()
    if bias is not None and keys is not None:
        bias = bias[..., keys.tokens]
    if keys is not None and keys.padding is not None and (pads or bias is not None):
        hidden = torch.zeros(keys.padding.shape, device=keys.padding.device)
        hidden = hidden.masked_fill(keys.padding, -torch.inf)
        bias = hidden[None, None] if bias is None else bias + hidden
    return None if bias is None else bias.contiguous()


class Lists(NamedTuple):
    """Key blocks of each query block, in part and in full, in lists with room for every block.

    Attributes:
        partial, full: ``[B|1, H|1, nQ]`` int32, how many there are.
        partial_blocks, full_blocks: ``[B|1, H|1, nQ, nK]`` int32, those first; a block that exists
            in every other place.
    """

    partial: torch.Tensor
    partial_blocks: torch.Tensor
    full: torch.Tensor
    full_blocks: torch.Tensor


def lists(t: PlanTensors) -> Lists:
    """The plan's lists. Memory grows with query blocks times key blocks."""
    columns = t.kv_starts.numel()
    width = t.kv_indices.shape[-1]
    slot = torch.arange(columns, dtype=torch.int32, device=t.kv_indices.device)
    listed = torch.nn.functional.pad(t.kv_indices, (0, columns - width))
    runs = run_lengths(t.kv_indices, t.kv_num_blocks)
    listed = torch.where((runs > 0)[..., None], slot, listed)
    full, partial = t.kv_num_full_blocks, t.kv_num_blocks - t.kv_num_full_blocks
    shifted = listed.gather(-1, (slot + full[..., None]).clamp_max(columns - 1).long())
    return Lists(
        partial,
        shifted.where(slot < partial[..., None], 0),
        full,
        listed.where(slot < full[..., None], 0),
    )
