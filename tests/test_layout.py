"""Layouts: orders are permutations with locality, blocks and tiles partition, coordinates agree."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dittfast.layout import (
    ORDERS,
    Context,
    Grid,
    Layout,
    inverse_permutation,
    make_blocks,
    split_evenly,
    tile_lengths,
)

side = st.integers(1, 9)
grids = st.builds(Grid, st.integers(1, 4), side, side)
contexts = st.builds(Context, st.integers(1, 20))
layouts = st.builds(Layout, st.lists(st.one_of(grids, contexts), min_size=1, max_size=4))
tiles = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))


def coordinates_by_hand(layout):
    """The definition, token by token."""
    found, number = [], 0
    for segment in layout.segments:
        if isinstance(segment, Context):
            found += [(-1, -1, -1, -1)] * segment.length
        else:
            ranges = (range(n) for n in (segment.frames, segment.height, segment.width))
            found += [(number, *place) for place in itertools.product(*ranges)]
            number += 1
    return np.array(found)


@given(layouts)
def test_coordinates(layout):
    assert np.array_equal(layout.coordinates(), coordinates_by_hand(layout))
    assert layout.num_tokens == len(coordinates_by_hand(layout))
    assert layout.num_context == int((coordinates_by_hand(layout)[:, 0] < 0).sum())


@given(layouts, st.sampled_from(ORDERS), tiles)
def test_orders_are_permutations_within_segments(layout, kind, tile):
    order = layout.order(kind, tile)
    assert order.dtype == torch.int32
    for start, segment in layout.spans():
        part = order[start : start + segment.length]
        whole = torch.arange(start, start + segment.length)
        assert torch.equal(part.sort().values, whole.int())
        if isinstance(segment, Context) or kind == "raster":
            assert torch.equal(part, whole.int())


@given(st.permutations(range(30)))
def test_inverse_permutation(values):
    order = torch.tensor(values, dtype=torch.int32)
    inverse = inverse_permutation(order)
    x = torch.randn(30)
    assert torch.equal(x[order.long()][inverse.long()], x)
    assert torch.equal(order[inverse.long()], torch.arange(30, dtype=torch.int32))


@given(grids, tiles)
def test_tile_order_is_raster_of_tiles_of_raster(grid, tile):
    layout = Layout((grid,))
    place = coordinates_by_hand(layout)[layout.order("tile", tile).numpy(), 1:]
    keys = [(*(p // tile), *p) for p in place]
    assert [tuple(k) for k in keys] == sorted(tuple(k) for k in keys)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 16, 16), (4, 4, 4), (8, 8, 8)], ids=str)
def test_hilbert_walks_in_unit_steps(shape):
    layout = Layout((Grid(*shape),))
    place = coordinates_by_hand(layout)[layout.order("hilbert").numpy(), 1:]
    assert (np.abs(np.diff(place, axis=0)).sum(1) == 1).all()


@given(grids)
def test_hilbert_of_any_size_follows_the_curve_of_the_enclosing_cube(grid):
    """Where no side is 1, tokens come in the order in which the whole cube's curve meets them."""
    if min(grid.shape[1:]) == 1:
        return
    flat = grid.frames == 1
    size = 1 << (max(grid.shape) - 1).bit_length()
    cube = Layout((Grid(1 if flat else size, size, size),))
    walk = coordinates_by_hand(cube)[cube.order("hilbert").numpy(), 1:]
    inside = walk[(walk < np.array(grid.shape)).all(1)]
    layout = Layout((grid,))
    place = coordinates_by_hand(layout)[layout.order("hilbert").numpy(), 1:]
    assert np.array_equal(place, inside)


@given(grids)
def test_morton_interleaves_the_bits(grid):
    layout = Layout((grid,))
    place = coordinates_by_hand(layout)[layout.order("morton").numpy(), 1:]
    axes = [a for a in range(3) if grid.shape[a] > 1] or [2]

    def key(p):
        bits = [str(int(p[a]) >> bit & 1) for bit in reversed(range(4)) for a in axes]
        return int("".join(bits), 2)

    keys = [key(p) for p in place]
    assert keys == sorted(keys)


def check_partition(blocks, layout, block_size):
    starts, lengths = blocks.starts.numpy(), blocks.lengths.numpy()
    assert lengths.min() >= 1 and lengths.max() <= block_size
    assert starts[0] == 0 and starts[-1] + lengths[-1] == layout.num_tokens
    assert np.array_equal(starts[1:], (starts + lengths)[:-1])
    number = np.concatenate([np.full(s.length, i) for i, (_, s) in enumerate(layout.spans())])
    for start, length in zip(starts, lengths):
        assert len(set(number[start : start + length])) == 1, "a block spans two segments"


@given(layouts, st.integers(1, 40))
def test_blocks_partition_every_segment(layout, block_size):
    blocks = layout.blocks(block_size)
    check_partition(blocks, layout, block_size)
    assert blocks.order is None
    assert blocks.count == sum(-(-s.length // block_size) for s in layout.segments)
    order = layout.order("hilbert")
    assert torch.equal(layout.blocks(block_size, order).order, order)


@given(layouts, tiles, st.one_of(st.none(), st.integers(1, 12)))
def test_tiles_hold_the_tokens_of_one_tile_each(layout, tile, context_block):
    blocks = layout.tiles(tile, context_block)
    check_partition(blocks, layout, max(int(np.prod(tile)), context_block or 1))
    order = np.arange(layout.num_tokens) if blocks.order is None else blocks.order.numpy()
    assert (blocks.order is None) == np.array_equal(
        layout.order("tile", tile).numpy(), np.arange(layout.num_tokens)
    )
    place = coordinates_by_hand(layout)
    seen = set()
    for start, length in zip(blocks.starts.tolist(), blocks.lengths.tolist()):
        tokens = place[order[start : start + length]]
        if tokens[0, 0] < 0:
            continue
        corners = {(p[0], *(p[1:] // tile)) for p in tokens}
        assert len(corners) == 1, "a block holds tokens of two tiles"
        seen |= corners
    grids_of = [s for s in layout.segments if isinstance(s, Grid)]
    assert len(seen) == sum(tile_lengths(g, tile).size for g in grids_of)


@given(grids, tiles)
def test_tile_lengths(grid, tile):
    place = coordinates_by_hand(Layout((grid,)))[:, 1:]
    counts = np.zeros([-(-n // b) for n, b in zip(grid.shape, tile)], dtype=int)
    for p in place:
        counts[tuple(p // tile)] += 1
    assert np.array_equal(tile_lengths(grid, tile), counts)


def test_split_evenly_and_make_blocks():
    starts, lengths = split_evenly(5, 11, 4)
    assert starts.tolist() == [5, 9, 13] and lengths.tolist() == [4, 4, 3]
    blocks = make_blocks(starts, lengths, [2, 0, 1])
    assert blocks.count == 3
    assert all(x.dtype == torch.int32 for x in blocks)


def test_image_and_video():
    assert Layout.image(3, 4, text=5).segments == (Context(5), Grid(1, 3, 4))
    assert Layout.image(3, 4, text=5, text_first=False).segments == (Grid(1, 3, 4), Context(5))
    video = Layout.video(2, 3, 4, text=5)
    assert video.segments == (Grid(2, 3, 4), Context(5))
    assert video.num_tokens == 29 and video.num_context == 5
    assert video.grid == Grid(2, 3, 4) and video.grid.tokens_per_frame == 12
    assert video.grid_start == 0 and Layout.image(3, 4, text=5).grid_start == 5
    assert Layout.video(2, 3, 4).segments == (Grid(2, 3, 4),)


def test_layouts_are_values():
    assert Layout.image(3, 4) == Layout.image(3, 4)
    assert len({Layout.image(3, 4), Layout.image(3, 4), Layout.image(4, 3)}) == 2
    with pytest.raises(AttributeError):
        Layout.image(3, 4).segments = ()


@given(layouts, st.integers(1, 3), st.data())
def test_padding(layout, batch, data):
    sizes = [s.length for s in layout.segments if isinstance(s, Context)]
    rows = [tuple(data.draw(st.integers(0, n)) for n in sizes) for _ in range(batch)]
    padded = Layout(layout.segments, rows)
    keep = padded.valid()
    assert keep.shape == (batch, layout.num_tokens)
    for row, lengths in zip(keep, rows):
        remaining = iter(lengths)
        for start, segment in layout.spans():
            part = row[start : start + segment.length]
            valid = next(remaining) if isinstance(segment, Context) else segment.length
            assert part[:valid].all() and not part[valid:].any()
    weight = padded.kv_log_weight()
    assert weight.shape == (batch, 1, layout.num_tokens) and weight.dtype == torch.float32
    assert torch.equal(weight[:, 0] == 0, keep)
    assert torch.equal(weight[:, 0] == -torch.inf, ~keep)


def test_without_padding():
    layout = Layout.image(3, 4, text=5)
    assert layout.valid() is None and layout.kv_log_weight() is None
    padded = layout.with_text_lengths([5, 2])
    assert padded.context_lengths == ((5,), (2,))
    assert padded.with_text_lengths(None) == layout
    assert padded == Layout.image(3, 4, text=5, text_lengths=[5, 2])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Layout(()), "at least one segment"),
        (lambda: Layout((3,)), "a Context or a Grid, got 3"),
        (lambda: Context(0), "Context length must be an integer of at least 1, got 0"),
        (lambda: Grid(1, 2, -3), "Grid width must be an integer of at least 1, got -3"),
        (lambda: Grid(1, 2.5, 3), "Grid height must be .* got 2.5"),
        (lambda: Grid(True, 2, 3), "Grid frames must be .* got True"),
        (lambda: Layout.image(2, 2, text=-1), "text must be an integer of at least 0, got -1"),
        (lambda: Layout.image(2, 2, text_lengths=[1]), "set text= too"),
        (lambda: Layout.image(2, 2, 4, text_lengths=[5]), "row 0: 5 valid tokens .* of 4"),
        (lambda: Layout((Grid(1, 2, 2),), [(1,)]), "row 0 has 1 entries for 0 context segments"),
        (lambda: Layout((Context(4),)).grid, "only 4 context tokens"),
        (lambda: Layout.image(2, 2).order("spiral"), "raster, tile, hilbert, morton, got 'spiral'"),
        (lambda: Layout.image(2, 2).order("tile"), "needs tile="),
        (lambda: Layout.image(2, 2).blocks(0), "block_size must be .* got 0"),
        (lambda: Layout.image(2, 2).tiles((1, 0, 1)), "tile size must be .* got 0"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
