"""Where each token of an attention sequence sits: text, registers, frames, rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

MAX_TOKENS = 2**31 - 1  # positions are int32
ORDERS = ("raster", "tile", "hilbert", "morton")


def _positive(name: str, value: int, least: int = 1) -> int:
    if isinstance(value, bool) or int(value) != value or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)


@dataclass(frozen=True)
class Context:
    """``length`` tokens without a place: text, registers, image-prompt tokens."""

    length: int

    def __post_init__(self):
        _positive("Context length", self.length)


@dataclass(frozen=True)
class Grid:
    """``frames * height * width`` tokens in raster order (width fastest)."""

    frames: int
    height: int
    width: int

    def __post_init__(self):
        for name in ("frames", "height", "width"):
            _positive(f"Grid {name}", getattr(self, name))

    @property
    def tokens_per_frame(self) -> int:
        return self.height * self.width

    @property
    def length(self) -> int:
        return self.frames * self.height * self.width

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.frames, self.height, self.width


class Blocks(NamedTuple):
    """A partition of a sequence into blocks of consecutive *positions*.

    Position ``p`` holds token ``order[p]`` (token ``p`` where ``order`` is None). Block ``b``
    covers positions ``starts[b] ... starts[b] + lengths[b] - 1``.

    Attributes:
        starts: ``[n]`` int32. First position of each block.
        lengths: ``[n]`` int32. Tokens in each block, from 1 to the block size.
        order: ``[num_tokens]`` int32, or None for the sequence as it is.
    """

    starts: torch.Tensor
    lengths: torch.Tensor
    order: torch.Tensor | None = None

    @property
    def count(self) -> int:
        return self.starts.numel()

    def to(self, device) -> Blocks:
        return Blocks(*(None if x is None else x.to(device) for x in self))


def split_evenly(start: int, length: int, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of consecutive blocks of ``block_size``; the last may be shorter."""
    starts = np.arange(start, start + length, block_size, dtype=np.int64)
    return starts, np.minimum(block_size, start + length - starts)


def make_blocks(starts, lengths, order=None) -> Blocks:
    """Blocks on the CPU from array-likes."""
    as_int32 = lambda x: torch.from_numpy(np.ascontiguousarray(x, dtype=np.int32))  # noqa: E731
    return Blocks(as_int32(starts), as_int32(lengths), None if order is None else as_int32(order))


def inverse_permutation(order: torch.Tensor) -> torch.Tensor:
    """The permutation that undoes ``order``: ``x[order][inverse_permutation(order)] == x``."""
    inverse = torch.empty_like(order)
    inverse[order.long()] = torch.arange(order.numel(), dtype=order.dtype, device=order.device)
    return inverse


@dataclass(frozen=True)
class Layout:
    """The geometry of one attention sequence; frozen, hashable, without tensors.

    Attributes:
        segments: context tokens and grids, in sequence order. Context tokens see everything and
            are seen by everything, unless they are padding. Several grids are allowed (reference
            images).
        context_lengths: per batch row, the number of valid tokens in each context segment (valid
            tokens come first in their segment); None where nothing is padded.
    """

    segments: tuple[Context | Grid, ...]
    context_lengths: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self):
        object.__setattr__(self, "segments", tuple(self.segments))
        if not self.segments:
            raise ValueError("a Layout needs at least one segment, got none")
        for segment in self.segments:
            if not isinstance(segment, (Context, Grid)):
                raise ValueError(f"a segment is a Context or a Grid, got {segment!r}")
        if self.num_tokens > MAX_TOKENS:
            raise ValueError(
                f"a sequence has at most {MAX_TOKENS:,} tokens, got {self.num_tokens:,}; take fewer"
            )
        if self.context_lengths is None:
            return
        rows = tuple(tuple(int(n) for n in row) for row in self.context_lengths)
        object.__setattr__(self, "context_lengths", rows)
        sizes = [s.length for s in self.segments if isinstance(s, Context)]
        for index, row in enumerate(rows):
            if len(row) != len(sizes):
                raise ValueError(
                    f"context_lengths row {index} has {len(row)} entries for {len(sizes)} "
                    "context segments; give one length per segment"
                )
            for length, size in zip(row, sizes):
                if not 0 <= length <= size:
                    raise ValueError(
                        f"context_lengths row {index}: {length} valid tokens in a segment of {size}"
                    )

    @classmethod
    def image(
        cls,
        height: int,
        width: int,
        text: int = 0,
        text_first: bool = True,
        text_lengths: Sequence[int] | None = None,
    ) -> Layout:
        """An image of ``height * width`` tokens beside ``text`` context tokens.

        Args:
            height, width: image size in tokens (not pixels).
            text: context tokens in the same sequence; 0 where text is cross-attention.
            text_first: FLUX and CogVideoX put text first, SD3 and HunyuanVideo last.
            text_lengths: valid text tokens per batch row, where text is padded.
        """
        return cls.video(1, height, width, text, text_first, text_lengths)

    @classmethod
    def video(
        cls,
        frames: int,
        height: int,
        width: int,
        text: int = 0,
        text_first: bool = False,
        text_lengths: Sequence[int] | None = None,
    ) -> Layout:
        """A video of ``frames * height * width`` latent tokens; see :meth:`image`."""
        grid = Grid(frames, height, width)
        if _positive("text", text, 0) == 0:
            if text_lengths is not None:
                raise ValueError("text_lengths given for a layout without text; set text= too")
            return cls((grid,))
        segments = (Context(text), grid) if text_first else (grid, Context(text))
        rows = None if text_lengths is None else tuple((int(n),) for n in text_lengths)
        return cls(segments, rows)

    def with_text_lengths(self, text_lengths: Sequence[int] | None) -> Layout:
        """The same geometry with ``text_lengths[b]`` valid context tokens in batch row ``b``."""
        if text_lengths is None:
            return replace(self, context_lengths=None)
        return replace(self, context_lengths=tuple((int(n),) for n in text_lengths))

    @property
    def key(self) -> str:
        """A short text, the same for equal layouts and different for others."""
        parts = [
            f"{s.length}" if isinstance(s, Context) else f"{s.frames}x{s.height}x{s.width}"
            for s in self.segments
        ]
        rows = self.context_lengths
        if rows is not None:
            parts += ["valid", *("+".join([f"{n}" for n in row]) for row in rows)]
        return ",".join(parts)

    @property
    def num_tokens(self) -> int:
        return sum(s.length for s in self.segments)

    @property
    def num_context(self) -> int:
        return sum(s.length for s in self.segments if isinstance(s, Context))

    @property
    def grids(self) -> tuple[Grid, ...]:
        return tuple(s for s in self.segments if isinstance(s, Grid))

    @property
    def grid(self) -> Grid:
        """The main (first) grid. Raises ValueError on a text-only layout."""
        if not self.grids:
            raise ValueError(
                f"this layout has no grid, only {self.num_context} context tokens; "
                "the method needs an image or a video. Leave text-only layers dense."
            )
        return self.grids[0]

    @property
    def grid_start(self) -> int:
        """First token of the main grid. Raises ValueError on a text-only layout."""
        main = self.segments.index(self.grid)
        return sum(s.length for s in self.segments[:main])

    @property
    def text_behind(self) -> int:
        """Context tokens behind the last grid. Raises ValueError on a text-only layout."""
        last = max(i for i, s in enumerate(self.segments) if s in self.grids)
        return sum(s.length for s in self.segments[last + 1 :])

    def spans(self) -> list[tuple[int, Context | Grid]]:
        """``(first token, segment)`` for every segment, in sequence order."""
        start, pairs = 0, []
        for segment in self.segments:
            pairs.append((start, segment))
            start += segment.length
        return pairs

    def coordinates(self) -> np.ndarray:
        """``[num_tokens, 4]`` int32: grid number, frame, row, column; -1 for context tokens."""
        out = np.full((self.num_tokens, 4), -1, dtype=np.int32)
        number = 0
        for start, segment in self.spans():
            if isinstance(segment, Grid):
                place = np.unravel_index(np.arange(segment.length), segment.shape)
                out[start : start + segment.length] = np.stack(
                    [np.full(segment.length, number), *place], axis=1
                )
                number += 1
        return out

    def valid(self) -> torch.Tensor | None:
        """``[batch, num_tokens]`` bool, False on padding; None where nothing is padded."""
        if self.context_lengths is None:
            return None
        keep = torch.ones(len(self.context_lengths), self.num_tokens, dtype=torch.bool)
        for row, lengths in enumerate(self.context_lengths):
            remaining = iter(lengths)
            for start, segment in self.spans():
                if isinstance(segment, Context):
                    keep[row, start + next(remaining) : start + segment.length] = False
        return keep

    def kv_log_weight(self, device: torch.device | str | None = None) -> torch.Tensor | None:
        """``[batch, 1, num_tokens]`` fp32: 0, and -inf on padding; None where nothing is padded."""
        valid = self.valid()
        if valid is None:
            return None
        weight = torch.zeros(valid.shape, dtype=torch.float32).masked_fill(~valid, -torch.inf)
        return weight[:, None].to(device)

    def order(self, kind: str = "raster", tile: tuple[int, int, int] | None = None) -> torch.Tensor:
        """A permutation that puts nearby tokens of each grid next to each other.

        Args:
            kind: "raster" (as the model has it), "tile" (raster of tiles, raster inside each),
                "hilbert" or "morton". Any grid size works: curves run over the enclosing power
                of two and skip what lies outside. Context tokens keep their places.
            tile: (frames, height, width) of a tile, for "tile".

        Returns:
            ``[num_tokens]`` int32; position ``p`` holds token ``order[p]``. Undo it with
            :func:`inverse_permutation`.
        """
        if kind not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {kind!r}")
        parts = []
        for start, segment in self.spans():
            inside = np.arange(segment.length)
            if isinstance(segment, Grid) and kind != "raster":
                inside = _grid_order(segment, kind, tile)
            parts.append(start + inside)
        return torch.from_numpy(np.concatenate(parts).astype(np.int32))

    def blocks(self, block_size: int, order: torch.Tensor | None = None) -> Blocks:
        """Blocks of ``block_size`` consecutive positions that never span two segments."""
        block_size = _positive("block_size", block_size)
        parts = [split_evenly(start, s.length, block_size) for start, s in self.spans()]
        starts, lengths = (np.concatenate(x) for x in zip(*parts))
        return make_blocks(starts, lengths, order)

    def tiles(self, tile: tuple[int, int, int], context_block: int | None = None) -> Blocks:
        """One block per (frames, height, width) tile of each grid, ragged at the edges.

        Context segments are cut into blocks of ``context_block`` tokens (default: a tile's size).
        """
        tile = tuple(_positive("tile size", n) for n in tile)
        context_block = context_block or int(np.prod(tile))
        starts, lengths = [], []
        for start, segment in self.spans():
            if isinstance(segment, Context):
                first, length = split_evenly(start, segment.length, context_block)
            else:
                length = tile_lengths(segment, tile).reshape(-1)
                first = start + np.cumsum(length) - length
            starts.append(first)
            lengths.append(length)
        order = self.order("tile", tile)
        identity = torch.equal(order, torch.arange(order.numel(), dtype=order.dtype))
        return make_blocks(
            np.concatenate(starts), np.concatenate(lengths), None if identity else order
        )


def tile_lengths(grid: Grid, tile: tuple[int, int, int]) -> np.ndarray:
    """Tokens in each tile, ``[frame tiles, row tiles, column tiles]``."""
    t, y, x = (split_evenly(0, n, b)[1] for n, b in zip(grid.shape, tile))
    return t[:, None, None] * y[None, :, None] * x[None, None, :]


def _grid_order(grid: Grid, kind: str, tile: tuple[int, int, int] | None) -> np.ndarray:
    t, y, x = (c.astype(np.int64) for c in np.unravel_index(np.arange(grid.length), grid.shape))
    if kind == "tile":
        if tile is None:
            raise ValueError('order "tile" needs tile=(frames, height, width)')
        bt, by, bx = tile
        return np.lexsort((x, y, t, x // bx, y // by, t // bt))
    bits = max(1, max(n - 1 for n in grid.shape).bit_length())
    # A flat axis would only stretch the curve: leave it out.
    axes = [c for c, n in zip((t, y, x), grid.shape) if n > 1] or [x]
    if kind == "hilbert":
        axes = _hilbert_axes(axes, bits)
    return np.argsort(_interleave(axes, bits), kind="stable")


def _interleave(axes: list[np.ndarray], bits: int) -> np.ndarray:
    key = np.zeros_like(axes[0])
    for bit in reversed(range(bits)):
        for axis in axes:
            key = key << 1 | axis >> bit & 1
    return key


def _hilbert_axes(axes: list[np.ndarray], bits: int) -> list[np.ndarray]:
    """Coordinates to the transposed Hilbert index (Skilling, AIP Conf. Proc. 707, 2004)."""
    axes = [a.copy() for a in axes]
    for bit in reversed(range(1, bits)):
        high, low = 1 << bit, (1 << bit) - 1
        for i in range(len(axes)):
            swap = np.where(axes[i] & high, 0, (axes[0] ^ axes[i]) & low)
            axes[0] ^= np.where(axes[i] & high, low, 0) ^ swap
            if i:
                axes[i] ^= swap
    for i in range(1, len(axes)):
        axes[i] ^= axes[i - 1]
    flip = np.zeros_like(axes[0])
    for bit in reversed(range(1, bits)):
        flip ^= np.where(axes[-1] & (1 << bit), (1 << bit) - 1, 0)
    return [a ^ flip for a in axes]
