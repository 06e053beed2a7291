"""Radial attention (Li et al. 2025, arXiv:2506.19852): less of a frame the further away it is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from ..layout import Blocks, Layout, make_blocks, split_evenly
from ..plan import ListBuilder, Plan, TokenRule
from .base import Method
from .checks import check_block_size, check_choice, check_positive, each
from .ladder import block_for
from .pairs import Pairs, chunks, close_pairs, expand_ranges, product, sorted_unique

VARIANTS = ("wan", "hunyuan", "paper", "wan_corrected", "hunyuan_corrected")

# The published frame skip compares with 128 whatever the block size.
_SKIP_BELOW = 128
# Frame pairs (times tiles) worked on together: bounds memory, not the result.
_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class Radial(Method):
    """Static block-sparse attention whose spatial band halves with every doubling of distance.

    With s tokens per frame, two frames D apart and ``g = floor(log2 D) + 1``:

    - "wan", "hunyuan": the block mask of the published code in its latest form (earlier revisions
      kept half a frame at distance 1 for Wan, the first one the sink for both). Frames at most one
      apart see each other fully; otherwise ``|k - l| <= max(decay_factor * L, block_size)`` for
      the raster indices k, l inside the frames, with ``L = 2 ** (bit_length(s) - g)``. Where
      L < 128 only every ``128 / L``-th frame distance is kept (distance 1 too). "wan" also keeps
      all of frame 0 as keys. A block is listed, and then listed whole, if more than 0.6 of its
      columns that see anything see more than a third of its rows, counted for each pair of frames
      alone. Rows and columns that a frame spills beyond ``ceil(s / block_size)`` blocks are lost,
      as published.
    - "wan_corrected", "hunyuan_corrected": the same rule with those spilled blocks kept.
    - "paper": Equation 4 of the paper, exact for every token pair, with frame 0 as a sink. With
      ``r = floor(log2 max(D, 1))`` a pair is kept if ``2**r <= s and |k - l| + 1 <= s / 2**r`` or
      ``D % ceil(2**r / s) == 0 and k == l``. It has no decay factor.

    One mask serves all heads and samples. Context tokens and grids after the first see everything
    and are seen by everything; padding text is hidden. An image is one frame at distance 0, so it
    comes out dense.

    The published code works only where the video's length is a multiple of the block size. Here
    any size works. Tokens before the video are cut into blocks of their own; from the video's
    first token on, blocks have ``block_size`` tokens to the end of the sequence (the last may be
    shorter), so the block with the video's tail may hold text as well. Every block that is not
    wholly video is dense in both directions: the published rule for text, from block
    ``floor(n_video / block_size)`` on. A row that would see nothing keeps its own block. "paper"
    needs no such rule: blocks never span two segments and blocks cut by the pattern are masked
    token by token.

    Args:
        decay_factor: factor of the band's half-width, above 0; 1.0 for "paper". A list has
            one for each head.
        block_size: tokens in a block, 1 to 256.
        variant: "wan", "hunyuan", "paper", "wan_corrected" or "hunyuan_corrected".

    Raises:
        ValueError: an option out of range; a layout without a grid.
    """

    name: ClassVar[str] = "radial"
    for_videos: ClassVar[bool] = True
    per_head: ClassVar[tuple[str, ...]] = ("decay_factor",)

    decay_factor: float | tuple[float, ...] = 1.0
    block_size: int = 128
    variant: str = "wan"

    @classmethod
    def ladder(cls, layout: Layout) -> list[dict]:
        if layout.grid.frames < 2:
            return []  # one frame sees itself in full
        size = block_for(layout)
        return [{"decay_factor": x, "block_size": size} for x in (0.25, 0.5, 1.0, 2.0)]

    def __post_init__(self):
        check_choice("variant", self.variant, VARIANTS)
        for factor in each(self.decay_factor):
            check_positive("decay_factor", factor, "published settings lie in 0.2..1")
        check_block_size(self.block_size)
        if self.variant == "paper" and any(x != 1 for x in each(self.decay_factor)):
            raise ValueError(
                f"decay_factor must be 1 for variant 'paper', got {self.decay_factor!r}: Equation "
                "4 has none (use variant 'wan' or 'hunyuan' to set it)"
            )

    def plan(
        self, layout: Layout, q: torch.Tensor | None = None, k: torch.Tensor | None = None
    ) -> Plan:
        self.check_one_value()
        return self._paper_plan(layout) if self.variant == "paper" else self._code_plan(layout)

    def _code_plan(self, layout: Layout) -> Plan:
        grid, size = layout.grid, self.block_size
        blocks, first = _blocks_from_video(layout, size)
        regular = grid.length // size
        parts = _code_pairs(
            grid.frames,
            grid.tokens_per_frame,
            size,
            self.decay_factor,
            sink=self.variant.startswith("wan"),
            spill=self.variant.endswith("_corrected"),
        )
        lists = ListBuilder(blocks.count, blocks.count)
        outside = _see_everything(lists, blocks.count, first, first + regular)
        for rows, cols in parts:
            lists.add((rows + first, cols + first, True), _columns(rows + first, outside))
        weight = layout.kv_log_weight()
        return Plan(*lists.lists(), blocks, blocks, kv_log_weight=weight)

    def _paper_plan(self, layout: Layout) -> Plan:
        grid = layout.grid
        limits = paper_limits(grid.frames, grid.tokens_per_frame)
        return banded_plan(layout, limits, self.block_size, sink_frames=1)


def banded_plan(layout: Layout, limits: np.ndarray, block_size: int, sink_frames: int = 0) -> Plan:
    """Tokens of the main grid see those at most ``limits[D]`` from their own place in raster order.

    All other tokens see everything and are seen by everything.

    Args:
        limits: ``[frames]`` int64, by the distance D of the frames; -1 keeps nothing.
        sink_frames: first frames that all see: 0 or 1.
    """
    grid = layout.grid
    # Uniform blocks list fewer than blocks that end with each frame: up to 60 % fewer for
    # frames near the block size, at most 2 % more on the longest 720p videos.
    blocks = layout.blocks(block_size)
    first = int(np.searchsorted(blocks.starts.numpy(), layout.grid_start))
    last = first + -(-grid.length // block_size)
    lengths = blocks.lengths.numpy()[first:last].astype(np.int64)
    partial = banded_pairs(grid.frames, grid.tokens_per_frame, limits, sink_frames)
    lists = ListBuilder(blocks.count, blocks.count)
    outside = _see_everything(lists, blocks.count, first, last)
    for rows, cols, full in _banded_blocks(
        grid.frames, grid.tokens_per_frame, block_size, limits, sink_frames
    ):
        partial -= int((lengths[rows[full]] * lengths[cols[full]]).sum())
        lists.add((rows + first, cols + first, full), _columns(rows + first, outside))
    return Plan(
        *lists.lists(),
        blocks,
        blocks,
        rule=TokenRule.from_layout(layout, "raster", limits, sink_frames=sink_frames),
        kv_log_weight=layout.kv_log_weight(),
        num_partial_pairs=partial,
    )


def _see_everything(lists: ListBuilder, count: int, low: int, high: int) -> np.ndarray:
    """Blocks outside ``low ... high - 1``, entered as rows that see all ``count`` blocks."""
    blocks = np.arange(count)
    outside = blocks[(blocks < low) | (blocks >= high)]
    lists.add_runs(outside, count)
    return outside


def _columns(rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    """Full pairs of every row from the least to the greatest of ``rows`` with all ``columns``."""
    own = np.arange(rows.min(), rows.max() + 1) if rows.size else rows
    return *product(own, columns), True


def _blocks_from_video(layout: Layout, block_size: int) -> tuple[Blocks, int]:
    """The partition of the published variants and the number of the video's first block."""
    start = layout.grid_start
    before = split_evenly(0, start, block_size)
    after = split_evenly(start, layout.num_tokens - start, block_size)
    starts, lengths = (np.concatenate(x) for x in zip(before, after))
    return make_blocks(starts, lengths), before[0].size


def code_half_widths(frames: int, tokens_per_frame: int, block_size: int, decay_factor: float):
    """``[frames]`` int64: largest ``|k - l|`` the published code keeps at a distance; -1 for none.

    A frame that is kept whole has ``tokens_per_frame - 1``.
    """
    whole = tokens_per_frame - 1
    power = 1 << tokens_per_frame.bit_length()
    widths = np.full(frames, whole, dtype=np.int64)
    for distance in range(1, frames):
        length = power / (1 << distance.bit_length())
        if length < _SKIP_BELOW and distance % int(_SKIP_BELOW / length):
            widths[distance] = -1
        elif distance > 1:
            # The published comparison of integers with this number rounds it to fp32.
            band = np.float32(min(max(length * decay_factor, block_size), 2 * tokens_per_frame))
            widths[distance] = min(int(band), whole)
    return widths


def paper_limits(frames: int, tokens_per_frame: int) -> np.ndarray:
    """``[frames]`` int64: largest ``|k - l|`` Equation 4 keeps at a frame distance; -1 for none."""
    limits = np.empty(frames, dtype=np.int64)
    for distance in range(frames):
        power = 1 << max(distance, 1).bit_length() - 1
        if power <= tokens_per_frame:
            limits[distance] = tokens_per_frame // power - 1
        else:
            limits[distance] = -1 if distance % -(-power // tokens_per_frame) else 0
    return limits


def banded_pairs(frames: int, tokens_per_frame: int, limits: np.ndarray, sink_frames: int) -> int:
    """Token pairs of a video that :func:`banded_plan` keeps."""
    per_frame_pair = np.where(limits < 0, 0, close_pairs(tokens_per_frame, limits))
    # Frame pairs at each distance, but for those whose key is the sink.
    times = 2 * (frames - np.arange(frames)) - sink_frames
    times[0] = frames - sink_frames
    return int((times * per_frame_pair).sum()) + sink_frames * frames * tokens_per_frame**2


def _code_tiles(
    i: np.ndarray, j: np.ndarray, width: np.ndarray, tokens: int, block: int, tiles: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For pairs of frames: query tiles, the first key tile that each lists, and how many follow.

    In tile t of a frame pair, column l sees the rows of the tile (frame indices ``top..bottom``)
    inside ``l - width .. l + width``. The columns that see any row, and those that see at least
    ``least`` rows, are two nested intervals; only the first and the last tile that meet the
    inner one can fail the test. So the tiles of a row are one range, found without a loop.

    Args:
        i, j, width: ``[pairs, 1]``: frame of the queries, frame of the keys, half of the band.
    """
    tile = np.arange(tiles)
    # rho > 1/3 and ratio > 0.6 in exact integers; fp32 and fp64 agree with them for every block
    # size up to 256, ties included (1/3 and 3/5 round like the constants).
    least = block // 3 + 1
    q_offset, kv_offset = i * tokens % block, j * tokens % block
    top = np.maximum(0, tile * block - q_offset)
    bottom = np.minimum(tokens, (tile + 1) * block - q_offset) - 1
    outer = np.maximum(0, top - width), np.minimum(tokens - 1, bottom + width)
    inner = (
        np.maximum(0, top - width + least - 1),
        np.minimum(tokens - 1, bottom + width - least + 1),
    )
    some = (bottom - top + 1 >= least) & (inner[0] <= inner[1])

    def passes(at):
        left = np.maximum(0, at * block - kv_offset)
        right = np.minimum(tokens, (at + 1) * block - kv_offset) - 1
        seen, high = (np.minimum(right, hi) - np.maximum(left, lo) + 1 for lo, hi in (outer, inner))
        return 5 * high > 3 * seen

    first = (inner[0] + kv_offset) // block
    last = np.minimum((inner[1] + kv_offset) // block, tiles - 1)
    some &= first <= last
    first, last = first + ~passes(first), last - ~passes(last)
    q_tile = (i * tokens // block + tile)[some]
    kv_tile = (j * tokens // block + first)[some]
    return q_tile, kv_tile, (last - first + 1)[some]


def _code_pairs(
    frames: int, tokens: int, block: int, decay_factor: float, sink: bool, spill: bool
) -> Iterator[Pairs]:
    """Listed blocks among the ``frames * tokens // block`` whole blocks, whole rows at a time."""
    regular = frames * tokens // block
    tiles = -(-tokens // block) + spill
    widths = code_half_widths(frames, tokens, block, decay_factor)
    done, open_keys = 0, np.empty(0, dtype=np.int64)
    for chunk in chunks(np.full(frames, frames * tiles), _AT_ONCE):
        queries = np.arange(frames)[chunk]
        width = widths[np.abs(queries[:, None] - np.arange(frames))]
        if sink:
            width[:, 0] = tokens - 1
        row, j = np.nonzero(width >= 0)
        q_tile, kv_tile, count = _code_tiles(
            queries[row][:, None], j[:, None], width[row, j][:, None], tokens, block, tiles
        )
        owner, cols = expand_ranges(kv_tile, count)
        rows = q_tile[owner]
        inside = (rows < regular) & (cols < regular)
        keys = rows[inside] * regular + cols[inside]
        keys = sorted_unique(np.concatenate([open_keys, keys]))
        # Later frames may add to the block that this chunk's last frame shares with the next.
        before, done = done, regular if chunk.stop == frames else chunk.stop * tokens // block
        keys, open_keys = np.split(keys, [np.searchsorted(keys, done * regular)])
        rows, cols = np.divmod(keys, max(regular, 1))
        lonely = before + np.flatnonzero(np.bincount(rows - before, minlength=done - before) == 0)
        yield np.concatenate([rows, lonely]), np.concatenate([cols, lonely])


def _banded_blocks(frames: int, tokens: int, block: int, limits: np.ndarray, sink_frames: int):
    """``(rows, cols, full)`` of the blocks in which ``|k - l| <= limits[D]`` keeps a token pair.

    Whole rows at a time. The video is cut at block and frame borders into pieces of one frame and
    one block each. Two pieces see each other wholly, partly or not at all by interval arithmetic,
    and a block is full if all its pairs of pieces are.
    """
    total = frames * tokens
    # Half the bytes, and twice as fast, wherever tokens can be numbered so.
    number = np.int32 if 2 * total < 1 << 31 else np.int64
    starts = np.union1d(np.arange(0, total, block), np.arange(0, total, tokens)).astype(number)
    ends = np.append(starts[1:], number(total))
    frame, owner = starts // number(tokens), starts // number(block)
    low, high = starts - frame * number(tokens), ends - frame * number(tokens) - 1
    count = -(-total // block)
    pieces = np.bincount(owner, minlength=count)
    limits = limits.astype(number)
    key_frames = np.arange(frames, dtype=number)
    both = math.lcm(block, tokens)
    bounds = np.concatenate([[0], np.cumsum(pieces)])

    def piece_of(token):
        """Borders up to a token; those of blocks and of frames meet every ``both`` tokens."""
        return token // number(block) + token // number(tokens) - token // number(both)

    for chunk in chunks(pieces * frames, _AT_ONCE):
        top = chunk.start
        piece = np.arange(bounds[top], bounds[chunk.stop], dtype=number)
        limit = limits[np.abs(frame[piece][:, None] - key_frames)]
        limit[:, :sink_frames] = tokens - 1
        at, j = np.nonzero(limit >= 0)
        piece, limit, begin = piece[at], limit[at, j], key_frames[j] * number(tokens)
        first = piece_of(begin + np.maximum(0, low[piece] - limit))
        last = piece_of(begin + np.minimum(tokens - 1, high[piece] + limit))
        pair, other = expand_ranges(first, last - first + 1)
        piece, limit = piece[pair], limit[pair]
        wholly = np.maximum(high[piece] - low[other], high[other] - low[piece]) <= limit
        wide = np.int32 if (chunk.stop - top) * count < 1 << 30 else np.int64
        keys = (owner[piece] - number(top)).astype(wide) * wide(count) + owner[other]
        keys = keys * wide(2) + wholly
        # Stable: what comes out of a piece is in order already.
        keys.sort(kind="stable")
        same = keys >> 1
        begins = np.flatnonzero(np.concatenate([[True], same[1:] != same[:-1]]))
        wholly = np.add.reduceat(keys & 1, begins)
        rows, cols = np.divmod(same[begins], wide(count))
        yield rows + top, cols, wholly == pieces[rows + top] * pieces[cols]
