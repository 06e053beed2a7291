"""Local circular attention (CLEAR, Liu et al. 2024, arXiv:2412.16112) on tiles of the grid."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from ..layout import Blocks, Context, Grid, Layout, split_evenly, tile_lengths
from ..plan import ListBuilder, Plan, TokenRule
from .base import Method
from .checks import check_integer, check_positive, check_tile, each
from .ladder import radii
from .pairs import chunks, close_pairs, expand_ranges, product

# Pairs of blocks worked on together: bounds memory, not the result.
_AT_ONCE = 1 << 20
# Tokens at which CLEAR's proportional scale equals the usual one: 64 * 64 of image, 512 of text.
_TRAINED_TOKENS = 4608


@dataclass(frozen=True)
class Local(Method):
    """Each image token sees the tokens in a circle around it, and all text.

    A query at row y, column x sees the keys with ``dy² + dx² < window²`` (strict, cut off at the
    borders), exactly, for every token pair. Context tokens see and are seen by everything but
    padding. All frames of a video share the spatial circle, or those with
    ``|dt| < frame_window``. In a layout with several grids each grid is local in itself and fully
    visible to the others.

    With ``downsample=c``, :meth:`extend` appends one key and value for every c x c patch of the
    first grid: ``sum_ab w[a, b] k[c*i + a, c*j + b]``, the same w for v, after RoPE. Queries of
    the first grid see all of them, other queries (text) none. w is trainable, one per layer,
    shared by the heads, and starts at 1/c². CLEAR needs sides divisible by c; here a patch cut
    off at the border uses the weights of its n existing tokens times ``c² / n``, so that it
    stays a mean of them at the start. Where c divides the sides this is CLEAR.

    Args:
        window: the circle's radius in tokens, above 0. 1 leaves only the token itself. A list has
            one for each head.
        downsample: side c of a patch, from 2 to the shorter side of the grid; None for none.
        tile: tokens of a block as (frames, height, width), at most 256 together; None chooses.
            It changes the speed, not the result.
        frame_window: frames nearer than this are visible, at least 1; None for all.
        proportional: scale the logits by ``sqrt(log(n) / log(4608) / head_dim)`` for n tokens,
            text included (10 n with ``downsample``, as published), to keep attention as sharp on
            images larger than the training size as on it. A number, at least 2, stands for 4608,
            the tokens of FLUX at 1024 px, where a model was trained on sequences of another
            length.

    Raises:
        ValueError: an option out of range; a layout without a grid.
    """

    name: ClassVar[str] = "local"
    per_head: ClassVar[tuple[str, ...]] = ("window",)

    window: float | tuple[float, ...] = 8
    downsample: int | None = None
    tile: tuple[int, int, int] | None = None
    frame_window: int | None = None
    proportional: bool | int = False

    @classmethod
    def ladder(cls, layout: Layout) -> list[dict]:
        windows = dict.fromkeys(max(1.5, round(radius, 1)) for radius in radii(layout))
        return [{"window": window} for window in windows]

    def __post_init__(self):
        for window in each(self.window):
            check_positive("window", window, "it is the radius in tokens; CLEAR uses 8, 16, 32")
        if self.downsample is not None:
            check_integer("downsample", self.downsample, 2, remedy="None for none; CLEAR uses 4")
        if self.frame_window is not None:
            check_integer("frame_window", self.frame_window, 1, remedy="None for all frames")
        if not isinstance(self.proportional, bool):
            remedy = "the tokens of the training size, or True for CLEAR's 4608"
            check_integer("proportional", self.proportional, 2, remedy=remedy)
        if self.tile is not None:
            object.__setattr__(self, "tile", check_tile(self.tile))

    def plan(
        self, layout: Layout, q: torch.Tensor | None = None, k: torch.Tensor | None = None
    ) -> Plan:
        self.check_one_value()
        tile = self.tile or self._default_tile(layout.grid)
        blocks = layout.tiles(tile)
        extra = self._patches(layout)
        kv_blocks = _append_blocks(blocks, layout.num_tokens, extra, math.prod(tile))
        limits = self._limits(layout)
        lists, partial = self._lists(layout, tile, blocks.count, kv_blocks.count, limits)
        weight = layout.kv_log_weight()
        if weight is not None:
            weight = F.pad(weight, (0, extra))
        rule = TokenRule.from_layout(layout, "disc", limits, blocks.order, extra_keys=extra)
        return Plan(
            *lists.lists(),
            blocks,
            kv_blocks,
            rule=rule,
            kv_log_weight=weight,
            num_real_keys=layout.num_tokens,
            num_partial_pairs=partial,
        )

    def extend(
        self,
        layout: Layout,
        k: torch.Tensor,
        v: torch.Tensor,
        spatial_weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v ``[B, H, N + extra, D]``; ``extra`` patches follow in raster order.

        Args:
            spatial_weight: ``[c, c]``; default :meth:`parameters`. Patches are summed in at least
                fp32 and returned in k's dtype. Differentiable.
        """
        if self.downsample is None:
            if spatial_weight is not None:
                raise ValueError("spatial_weight given, but downsample is None; set downsample=c")
            return k, v
        c = self.downsample
        self._patches(layout)
        if k.shape[2] != layout.num_tokens or v.shape[2] != layout.num_tokens:
            raise ValueError(
                f"k and v must be [B, H, {layout.num_tokens}, D] for this layout, "
                f"got {list(k.shape)} and {list(v.shape)}"
            )
        if spatial_weight is None:
            wide = torch.promote_types(k.dtype, torch.float32)
            spatial_weight = torch.full((c, c), c**-2.0, dtype=wide, device=k.device)
        if tuple(spatial_weight.shape) != (c, c):
            raise ValueError(
                f"spatial_weight must be [{c}, {c}] for downsample={c}, "
                f"got {list(spatial_weight.shape)}"
            )
        k, v = (torch.cat([x, _patch_sums(x, layout, spatial_weight)], 2) for x in (k, v))
        return k, v

    def parameters(
        self, heads: int | None = None, head_dim: int | None = None
    ) -> dict[str, torch.Tensor]:
        """``spatial_weight [c, c]`` fp32 at 1/c² where ``downsample=c``; nothing otherwise."""
        if self.downsample is None:
            return {}
        c = self.downsample
        return {"spatial_weight": torch.full((c, c), c**-2.0)}

    def scale(self, layout: Layout, head_dim: int) -> float | None:
        if not self.proportional:
            return None
        tokens = layout.num_tokens * (1 if self.downsample is None else 10)
        trained = _TRAINED_TOKENS if self.proportional is True else self.proportional
        return math.sqrt(math.log(tokens) / math.log(trained) / head_dim)

    def _default_tile(self, grid: Grid) -> tuple[int, int, int]:
        # Small squares waste least of their neighbours on a circle; larger blocks compute faster.
        # Frames that share the circle fill a block without widening the square.
        if grid.frames > 1 and (self.frame_window is None or self.frame_window >= 8):
            # Every block lists its place in all frames: in minutes of video deeper ones save much.
            return (4 if grid.frames >= 512 and self.frame_window is None else 2), 8, 8
        return (1, 8, 8) if self.window < 16 else (1, 8, 16)

    def _limits(self, layout: Layout) -> np.ndarray:
        frames = max(g.frames for g in layout.grids)
        farthest = max((g.height - 1) ** 2 + (g.width - 1) ** 2 for g in layout.grids)
        # dy² + dx² is an integer: below window² means at most ceil(window²) - 1.
        window = min(self.window, 1 + farthest)
        limits = np.full(frames, min(math.ceil(window**2) - 1, farthest), dtype=np.int64)
        if self.frame_window is not None:
            limits[self.frame_window :] = -1
        return limits

    def _patches(self, layout: Layout) -> int:
        """Number of summary keys. Raises where a patch is larger than the grid."""
        c, grid = self.downsample, layout.grid
        if c is None:
            return 0
        if c > min(grid.height, grid.width):
            raise ValueError(
                f"downsample must be at most {min(grid.height, grid.width)} on a grid of "
                f"{grid.height} x {grid.width} tokens, got {c}; use a smaller patch or None"
            )
        return grid.frames * -(-grid.height // c) * -(-grid.width // c)

    def _lists(self, layout: Layout, tile, num_blocks: int, num_kv_blocks: int, limits):
        """The lists, and how many token pairs of partial blocks are kept."""
        every, summaries = np.arange(num_blocks), np.arange(num_blocks, num_kv_blocks)
        lists, first, partial = ListBuilder(num_blocks, num_kv_blocks), 0, 0
        for start, segment in layout.spans():
            if isinstance(segment, Context):
                count = -(-segment.length // math.prod(tile))
                lists.add_runs(every[first : first + count], num_blocks)
            else:
                lengths = tile_lengths(segment, tile).reshape(-1)
                count = lengths.size
                others = np.delete(every, every[first : first + count])
                if start == layout.grid_start:
                    others = np.concatenate([others, summaries])
                partial += _kept_pairs(segment, limits)
                for own, rows, cols, full in _tile_pairs(segment, tile, limits, others.size):
                    partial -= int((lengths[rows[full]] * lengths[cols[full]]).sum())
                    pairs = rows + first, cols + first, full
                    lists.add(pairs, (*product(own + first, others), True))
            first += count
        return lists, partial


def _append_blocks(blocks: Blocks, start: int, extra: int, block_size: int) -> Blocks:
    """``blocks`` followed by blocks of the ``extra`` keys from token ``start`` on."""
    if not extra:
        return blocks
    starts, lengths = (torch.from_numpy(x).int() for x in split_evenly(start, extra, block_size))
    order = blocks.order
    if order is not None:
        order = torch.cat([order, torch.arange(start, start + extra, dtype=torch.int32)])
    return Blocks(torch.cat([blocks.starts, starts]), torch.cat([blocks.lengths, lengths]), order)


def _patch_sums(x: torch.Tensor, layout: Layout, weight: torch.Tensor) -> torch.Tensor:
    """Weighted sums ``[B, H, patches, D]`` over the main grid's patches of ``x [B, H, N, D]``."""
    grid, c = layout.grid, weight.shape[0]
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    tokens = x.narrow(2, layout.grid_start, grid.length).unflatten(2, grid.shape).to(wide)
    tokens = F.pad(tokens, (0, 0, 0, -grid.width % c, 0, -grid.height % c))
    patches = tokens.unflatten(4, (-1, c)).unflatten(3, (-1, c))
    sums = torch.einsum("zhtiajbd,ab->zhtijd", patches, weight.to(wide))
    if grid.height % c or grid.width % c:
        at = torch.arange(max(sums.shape[3:5]), device=x.device)
        rows, cols = ((n - c * at[: -(-n // c)]).clamp_max(c) for n in grid.shape[1:])
        sums = sums * (c * c / (rows[:, None] * cols).to(wide))[..., None]
    return sums.flatten(2, 4).to(x.dtype)


def _tile_pairs(
    grid: Grid, tile: tuple[int, int, int], limits: np.ndarray, others: int
) -> Iterator[tuple[np.ndarray, ...]]:
    """Pairs of a grid's tiles that hold a visible token pair: ``(own, rows, cols, full)``.

    A few whole rows ``own`` at a time; ``others`` blocks more of each row are made by the caller.
    ``limits`` is one value up to some frame distance and -1 beyond, so space and time separate.
    A pair of tiles is full if its farthest tokens see each other, absent if its nearest do not.
    """
    limit, frames = int(limits[0]), int((limits >= 0).sum())
    reach = math.isqrt(limit)
    t, y, x = (
        _axis_pairs(n, b, r) for n, b, r in zip(grid.shape, tile, (frames - 1, reach, reach))
    )
    lines, columns = (-(-n // b) for n, b in zip(grid.shape[1:], tile[1:]))
    for line in chunks(y.count * x.query.size + columns * others, _AT_ONCE):
        near_y = y.rows(line)
        at_y, at_x = np.nonzero(near_y.near[:, None] ** 2 + x.near**2 <= limit)
        full = near_y.far[at_y] ** 2 + x.far[at_x] ** 2 <= limit
        rows = near_y.query[at_y] * columns + x.query[at_x]
        cols = near_y.key[at_y] * columns + x.key[at_x]
        own = np.arange(line.start * columns, line.stop * columns)
        per_frame = lines * columns
        for frame in chunks(t.count * rows.size + own.size * others, _AT_ONCE):
            near_t = t.rows(frame)
            yield (
                (np.arange(frame.start, frame.stop)[:, None] * per_frame + own).reshape(-1),
                (near_t.query[:, None] * per_frame + rows).reshape(-1),
                (near_t.key[:, None] * per_frame + cols).reshape(-1),
                ((near_t.far < frames)[:, None] & full).reshape(-1),
            )


def _kept_pairs(grid: Grid, limits: np.ndarray) -> int:
    """Token pairs of a grid within the limits."""
    limit, frames = int(limits[0]), int((limits >= 0).sum())
    height = min(grid.height - 1, math.isqrt(limit))
    in_frame = 0
    for dy in range(-height, height + 1):
        width = min(grid.width - 1, math.isqrt(limit - dy * dy))
        in_frame += (grid.height - abs(dy)) * close_pairs(grid.width, width)
    return in_frame * close_pairs(grid.frames, min(frames, grid.frames) - 1)


@dataclass(frozen=True)
class _AxisPairs:
    """Tiles along one axis that come within reach, and the extreme distances of their tokens.

    Sorted by ``query``, each of which has ``count[query]`` of them.
    """

    query: np.ndarray
    key: np.ndarray
    near: np.ndarray
    far: np.ndarray
    count: np.ndarray

    def rows(self, queries: slice) -> _AxisPairs:
        """The pairs of some queries, which keep their numbers."""
        ends = np.concatenate([[0], np.cumsum(self.count)])
        part = slice(ends[queries.start], ends[queries.stop])
        fields = (self.query, self.key, self.near, self.far)
        return _AxisPairs(*(x[part] for x in fields), self.count[queries])


def _axis_pairs(size: int, tile: int, reach: int) -> _AxisPairs:
    starts, lengths = split_evenly(0, size, tile)
    ends = starts + lengths - 1
    first = np.maximum(0, starts - reach) // tile
    last = np.minimum(size - 1, ends + reach) // tile
    query, key = expand_ranges(first, last - first + 1)
    near = np.maximum(0, np.maximum(starts[key] - ends[query], starts[query] - ends[key]))
    far = np.maximum(ends[key] - starts[query], ends[query] - starts[key])
    return _AxisPairs(query, key, near, far, last - first + 1)
