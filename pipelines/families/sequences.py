"""What a layout reader returns, and the geometry that readers of all families share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dittfast.layout import Context, Grid, Layout


@dataclass(frozen=True)
class Sequences:
    """The attention sequences of one forward pass, where it has more than one layout.

    Attributes:
        kinds: one entry per kind of sequence, the main one first (SD3.5 has joint layers and
            image-only layers). An entry holds one layout for the whole batch, or one per batch
            row where rows differ (prompts of different length, images of different size). A call
            of attention is told by the length of its sequence.
    """

    kinds: tuple[tuple[Layout, ...], ...]

    @classmethod
    def of(cls, read: Layout | Sequences) -> Sequences:
        """What a reader returned: a Layout is the only sequence of its pass."""
        return cls(((read,),)) if isinstance(read, Layout) else read

    @property
    def layout(self) -> Layout:
        """The main sequence, of the first batch row."""
        return self.kinds[0][0]

    @property
    def rows_differ(self) -> bool:
        """Whether the main sequence has another layout in some batch row."""
        return len(set(self.kinds[0])) > 1

    def by_length(self) -> tuple[tuple[Layout, ...], ...]:
        """The layouts of each length, the main one first: one, or one per batch row.

        Raises:
            ValueError: two kinds of sequence have one length, so a call cannot be told.
        """
        layouts: dict[int, tuple[Layout, ...]] = {}
        for rows in self.kinds:
            for length in dict.fromkeys(row.num_tokens for row in rows):
                if length in layouts:
                    raise ValueError(
                        f"two kinds of sequence have {length} tokens and cannot be told apart; "
                        "change the text length or the size by one token"
                    )
                same = tuple(row for row in rows if row.num_tokens == length)
                layouts[length] = same[:1] if len(set(same)) == 1 else same
        return tuple(layouts.values())


def joint(*segments: Context | Grid | int) -> Layout:
    """A Layout from grids and context, in sequence order; an int is that many context tokens.

    Neighbouring context becomes one segment, and empty context disappears.
    """
    merged: list[Context | Grid] = []
    for segment in segments:
        if isinstance(segment, int):
            if segment == 0:
                continue
            segment = Context(segment)
        if merged and isinstance(segment, Context) and isinstance(merged[-1], Context):
            merged[-1] = Context(merged[-1].length + segment.length)
        else:
            merged.append(segment)
    return Layout(tuple(merged))


def patches(sizes: Sequence[int], patch: int | Sequence[int]) -> Grid:
    """The grid of latents ``(frames, height, width)`` or ``(height, width)`` cut into patches.

    Args:
        sizes: in latent cells.
        patch: cells of a patch along each axis; one number is for height and width.
    """
    if isinstance(patch, int):
        patch = (patch,) * 2
    sizes = (1,) * (3 - len(sizes)) + tuple(sizes)
    patch = (1,) * (3 - len(patch)) + tuple(patch)
    return Grid(*(n // p for n, p in zip(sizes, patch)))


def grids_from_ids(ids: torch.Tensor, axes: tuple[int, int] = (1, 2)) -> list[Grid]:
    """Grids from position ids ``[N, k]`` (or ``[1, N, k]``); column 0 tells the images apart.

    Only the order of the ids is used, so scaled or shifted positions read the same.

    Raises:
        ValueError: the tokens of an image are not in raster order.
    """
    rows = (ids if ids.ndim == 2 else ids[0]).detach().to("cpu", torch.float64)
    grids = []
    start = 0
    change = (rows[1:, 0] != rows[:-1, 0]).nonzero()[:, 0].tolist()
    for end in [i + 1 for i in change] + [len(rows)]:
        y, x = (rows[start:end, axis] for axis in axes)
        width = int((y == y[0]).sum())
        height = len(y) // width
        raster = len(y) == height * width
        if raster:
            y, x = y.view(height, width), x.view(height, width)
            raster = bool((y == y[:, :1]).all() and (x == x[:1]).all())
        if not raster:
            raise ValueError(
                f"position ids {start}..{end - 1} are not an image in raster order; "
                "pass layout=Layout.image(...) to dittfast.enable"
            )
        grids.append(Grid(1, height, width))
        start = end
    return grids


def last_grid(coordinates: torch.Tensor) -> Grid:
    """The grid that ends a sequence, from the places of its tokens ``[3, N]``: frame, row, column.

    Only their order is used. What stands before the grid (conditioning frames, which begin
    somewhere else in time) is not part of it.

    Raises:
        ValueError: the last tokens are not frames of one size in raster order.
    """
    frame, row, column = coordinates.detach().to("cpu", torch.float64).flip(1)
    same_row = (frame == frame[0]) & (row == row[0])
    width = int(same_row.cumprod(0).sum())
    height = int((frame == frame[0]).cumprod(0).sum()) // width
    size = height * width
    whole = len(frame) // size
    starts = frame[: whole * size].view(whole, size)
    earlier = starts[1:, 0] < starts[:-1, 0]
    frames = 1 + int(earlier.cumprod(0).sum())
    raster = True
    for place, axis in ((frame, 0), (row, 1), (column, 2)):
        view = place[: frames * size].view(frames, height, width)
        first = view[tuple(slice(None) if i == axis else slice(1) for i in range(3))]
        raster &= bool((view == first).all())
    if not raster:
        raise ValueError(
            f"the last {frames * size} places of the video's tokens are not {frames} frames of "
            f"{height} x {width} in raster order; pass layout=Layout.video(...) to dittfast.enable"
        )
    return Grid(frames, height, width)


def text_lengths(mask: torch.Tensor) -> list[int]:
    """Valid tokens in each row of a text mask ``[B, tokens]`` of ones and zeros."""
    return [int(n) for n in mask.detach().bool().sum(1).tolist()]
