"""Layout readers of rotary embeddings, for processors that see nothing else of a model.

Each takes the cosines and sines, ``[tokens, D]`` behind axes of length 1, and the number of text
tokens where the attention module is given text beside the image.
"""

from __future__ import annotations

import torch

from dittfast.layout import Context, Grid, Layout


def _rows(rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """``[tokens, 2, D]``: the cosines and sines of every token."""
    cos, sin = (x.detach().reshape(-1, x.shape[-1]).float() for x in rotary)
    return torch.stack([cos, sin], 1)


def _first_change(columns: torch.Tensor) -> int:
    """Tokens before the first that differs from token 0; all of them if none does."""
    differs = (columns != columns[:1]).flatten(1).any(1)
    return int(differs.int().argmax()) if bool(differs.any()) else len(columns)


def _raster(rows: torch.Tensor, height: int, width: int, of_x: torch.Tensor) -> bool:
    """Whether the columns ``of_x`` depend on the grid column alone, the others on the row."""
    if rows.shape[0] != height * width:
        return False
    grid = rows.view(height, width, *rows.shape[1:])
    x, y = grid[..., of_x], grid[..., ~of_x]
    return bool((x == x[:1]).all() and (y == y[:, :1]).all())


def text_and_image(rotary, text: int | None) -> Layout:
    """FLUX: text tokens all at position 0, then one image in raster order.

    Args:
        text: text tokens in front; None counts them (the first image token is at 0, too).

    Raises:
        ValueError: the tokens are not one image, as with reference images.
    """
    rows = _rows(rotary)
    if text is None:
        text = _first_change(rows) - 1
    image = rows[text:]
    # Neighbours in a row differ in the x columns only; the first change elsewhere ends the row.
    moved = (image[:1] != image[1:2]).flatten(0, 1).any(0) if len(image) > 1 else None
    width = len(image) if moved is None else _first_change(image[..., ~moved])
    height = len(image) // width
    if moved is not None and not _raster(image, height, width, moved):
        raise ValueError("the rotary embedding is not that of text followed by one image")
    return Layout((*((Context(text),) if text else ()), Grid(1, height, width)))


def video(rotary, text: int | None = None) -> Layout:
    """Wan: one video in raster order; rotary columns are [frame | row | column].

    Raises:
        ValueError: the tokens are not one video in raster order.
    """
    rows = _rows(rotary)
    row_dim = 2 * (rows.shape[-1] // 6)  # as many for the columns, the rest for the frames
    frame_dim = rows.shape[-1] - 2 * row_dim
    per_frame = _first_change(rows[..., :frame_dim])
    width = _first_change(rows[:per_frame, :, : frame_dim + row_dim])
    frames, height = len(rows) // per_frame, per_frame // width
    if frames * height * width != len(rows):
        raise ValueError("the rotary embedding is not that of one video in raster order")
    return Layout.video(frames, height, width)
