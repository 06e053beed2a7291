"""Windows of pictures: part of the tokens, with the positions that they have in the whole."""

from __future__ import annotations

import torch

from dittfast.pipelines.families import position_ids_in
from dittfast.pipelines.families.sequences import grids_from_ids

from .loader import Batch


def window(batch: Batch, size: tuple[int, int], rng: torch.Generator) -> Batch:
    """The same window of every picture of a batch, at a place drawn from ``rng``.

    The window's middle is drawn from the whole picture and the window then moved inside, so that
    borders, and what stands there, are seen as often as the middle. A side that is longer than the
    picture's is the picture's.

    Args:
        batch: latents ``[B, N, C]`` in raster order, with position ids among the arguments.
        size: (height, width) in tokens.

    Raises:
        ValueError: the model is given no position ids, or those of more than one picture.
    """
    name = position_ids_in(batch.arguments)
    if name is None:
        raise ValueError(
            "train.crop needs a model that is given its positions as ids; this one makes them "
            "itself, so set train.crop=null"
        )
    ids = batch.arguments[name]
    grids = grids_from_ids(ids)
    if len(grids) != 1 or batch.latents.shape[1] != grids[0].length:
        raise ValueError(
            f"train.crop needs pictures of one grid; these have {len(grids)} grids and "
            f"{batch.latents.shape[1]} tokens, so set train.crop=null"
        )
    whole = grids[0].height, grids[0].width
    size = tuple(min(a, b) for a, b in zip(size, whole))
    middles = (int(torch.randint(side, (), generator=rng)) for side in whole)
    top, left = (min(max(m - b // 2, 0), a - b) for m, a, b in zip(middles, whole, size))
    rows = torch.arange(top, top + size[0])
    columns = torch.arange(left, left + size[1])
    tokens = (rows[:, None] * whole[1] + columns).flatten().to(batch.latents.device)
    arguments = {**batch.arguments, name: ids[..., tokens, :]}
    return Batch(batch.latents[:, tokens], arguments)
