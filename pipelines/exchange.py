"""How ranks share a sequence, and what they send each other of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed._functional_collectives as collectives

from dittfast.layout import Context, Layout


class Ranks(NamedTuple):
    """The processes that share something, and which of them this is."""

    own: int
    count: int
    group: torch.distributed.ProcessGroup


def _streams(layout: Layout) -> list[int]:
    """Tokens of what diffusers splits one by one: text before the grid, and all the rest."""
    first = layout.segments[0]
    text = first.length if isinstance(first, Context) else 0
    return [n for n in (text, layout.num_tokens - text) if n]


def share_lengths(layout: Layout, ranks: int) -> list[int]:
    """How many tokens each rank holds."""
    streams = _streams(layout)
    return [sum(n // ranks + (rank < n % ranks) for n in streams) for rank in range(ranks)]


def token_shares(layout: Layout, ranks: int, device=None) -> list[torch.Tensor]:
    """For each rank ``[n]`` int64, the tokens that it holds, in the order in which it has them.

    Text and image are split between the ranks one by one, and each rank joins its parts.
    """
    tokens = torch.arange(layout.num_tokens, device=device)
    parts = [stream.tensor_split(ranks) for stream in tokens.split(_streams(layout))]
    return [torch.cat(own) for own in zip(*parts)]


def check_shares(layout: Layout, ranks: int, uneven: str | None) -> None:
    """Raise ValueError where diffusers cannot split a sequence between so many ranks.

    Args:
        uneven: None where shares may differ; else what allows that.
    """
    for n in _streams(layout):
        if n < ranks:
            raise ValueError(f"{n} tokens cannot be shared by {ranks} ranks; use fewer of them")
    if uneven is not None and any(n % ranks for n in _streams(layout)):
        lengths = " and ".join(str(n) for n in _streams(layout))
        raise ValueError(f"{lengths} tokens do not divide between {ranks} ranks; {uneven}")


def send_flat(pieces: Sequence[torch.Tensor], numels: Sequence[int], ranks: Ranks) -> torch.Tensor:
    """``[sum(numels)]``: what the ranks sent here, one behind the other; may still be on its way.

    Differentiable, if all ranks differentiate it.

    Args:
        pieces: for each rank a tensor of any shape.
        numels: how many values come from each rank.
    """
    flat = torch.cat([piece.flatten() for piece in pieces])
    sizes = [piece.numel() for piece in pieces]
    return collectives.all_to_all_single_autograd(flat, list(numels), sizes, ranks.group)


def send(
    pieces: Sequence[torch.Tensor], shapes: Sequence[tuple[int, ...]], ranks: Ranks
) -> list[torch.Tensor]:
    """The tensors, of these shapes, that the ranks sent here; arguments as :func:`send_flat`."""
    numels = [math.prod(shape) for shape in shapes]
    arrived = send_flat(pieces, numels, ranks).split(numels)
    return [part.view(shape) for part, shape in zip(arrived, shapes)]


def split_heads(heads: int, ranks: int) -> list[int]:
    """How many heads each rank gets.

    Raises:
        ValueError: there are fewer heads than ranks.
    """
    if heads < ranks:
        raise ValueError(
            f"{heads} heads cannot be shared by {ranks} ranks; use a smaller ulysses_degree"
        )
    return [heads // ranks + (rank < heads % ranks) for rank in range(ranks)]


def tokens_for_heads(x: torch.Tensor, lengths: list[int], ranks: Ranks) -> torch.Tensor:
    """``[..., n, H, D]`` of this rank's tokens to ``[..., N, h, D]`` of its heads: Ulysses.

    Args:
        lengths: how many tokens each rank holds; N together.
    """
    *lead, _, heads, dim = x.shape
    sizes = split_heads(heads, ranks.count)
    shapes = [(*lead, n, sizes[ranks.own], dim) for n in lengths]
    return torch.cat(send(x.split(sizes, -2), shapes, ranks), -3)


def heads_for_tokens(x: torch.Tensor, lengths: list[int], heads: int, ranks: Ranks) -> torch.Tensor:
    """``[..., N, h, D]`` back to ``[..., n, H, D]``: undoes :func:`tokens_for_heads`."""
    *lead, _, _, dim = x.shape
    shapes = [(*lead, lengths[ranks.own], h, dim) for h in split_heads(heads, ranks.count)]
    return torch.cat(send(x.split(lengths, -3), shapes, ranks), -2)


def gather_last(x: torch.Tensor, lengths: list[int], ranks: Ranks) -> torch.Tensor:
    """``[..., n]`` of this rank to ``[..., N]`` of all."""
    wire = x.to(torch.uint8) if x.dtype == torch.bool else x
    shapes = [(*x.shape[:-1], n) for n in lengths]
    return torch.cat(send([wire] * ranks.count, shapes, ranks), -1).to(x.dtype)
