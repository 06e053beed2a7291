"""Local plans against the circle's formula over every token pair."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dittfast.layout import Context, Grid, Layout
from dittfast.methods import METHODS, Local


def places(layout):
    """Per token: None for context, else (grid number, t, y, x)."""
    out, number = [], 0
    for segment in layout.segments:
        if isinstance(segment, Context):
            out += [None] * segment.length
        else:
            axes = (range(n) for n in segment.shape)
            out += [(number, *at) for at in itertools.product(*axes)]
            number += 1
    return out


def circle(layout, window, frame_window=None):
    """``[N, N]`` bool, pair by pair."""
    at = places(layout)
    out = np.ones((len(at), len(at)), dtype=bool)
    for i, q in enumerate(at):
        for j, k in enumerate(at):
            if q is None or k is None or q[0] != k[0]:
                continue
            near = (q[2] - k[2]) ** 2 + (q[3] - k[3]) ** 2 < window**2
            out[i, j] = near and (frame_window is None or abs(q[1] - k[1]) < frame_window)
    return out


def assert_exact(plan, expected):
    """The tokens kept, and that no full block is listed as partial or absent one as listed."""
    assert np.array_equal(plan.to_dense_mask()[0, 0].numpy(), expected)
    real = expected[:, : plan.num_real_keys]
    assert plan.density == pytest.approx(real.mean(), rel=1e-12)
    # The pair count the planner gives equals the one counted block by block.
    counted = plan.replace(kv_log_weight=None)
    assert counted.num_partial_pairs is None
    assert counted.density == pytest.approx(plan.density, rel=1e-12)
    assert counted.flops(64) == pytest.approx(plan.flops(64), rel=1e-12)
    order = [x.order if x.order is not None else torch.arange(n) for x, n in (
        (plan.q_blocks, plan.num_queries), (plan.kv_blocks, plan.num_keys))]  # fmt: skip
    moved = expected[order[0].numpy()][:, order[1].numpy()].astype(int)
    rows, cols = (b.starts.numpy() for b in (plan.q_blocks, plan.kv_blocks))
    kept = np.add.reduceat(np.add.reduceat(moved, rows, 0), cols, 1)
    size = np.outer(plan.q_blocks.lengths.numpy(), plan.kv_blocks.lengths.numpy())
    assert np.array_equal(plan.to_block_mask()[0, 0].numpy(), kept > 0)
    assert np.array_equal(plan.kv_num_full_blocks[0, 0].numpy(), (kept == size).sum(1))


@pytest.mark.parametrize("text,text_first", [(0, True), (21, True), (21, False)])
@pytest.mark.parametrize("height,width", [(1, 1), (13, 9), (23, 11), (1, 40), (16, 32)])
def test_circle(height, width, text, text_first):
    layout = Layout.image(height, width, text, text_first)
    tiles = (None, (1, 4, 8), (1, 3, 5), (1, 8, 16), (1, 1, 1))
    # Radii on both sides of integer distances: sqrt(5) reaches (1, 1) and (2, 0), not (2, 1).
    windows = (1, 2.5, 8, math.sqrt(5) - 1e-9, 1000)
    for window, tile in zip(windows, tiles):
        expected = circle(layout, window)
        for chosen in {tile, None}:
            assert_exact(Local(window, tile=chosen).plan(layout), expected)


@pytest.mark.parametrize("window,keys", [(1, 1), (8, 193), (16, 793), (32, 3205)])
def test_published_key_counts(window, keys):
    """CLEAR counts 193, 793 and 3205 keys for its three radii."""
    plan = Local(window).plan(Layout.image(80, 80))
    middle = 40 * 80 + 40
    block = next(
        n for n in range(plan.q_blocks.count) if middle in _tokens(plan.q_blocks, n).tolist()
    )
    at = int(plan.q_blocks.starts[block]) + _tokens(plan.q_blocks, block).tolist().index(middle)
    seen = 0
    for slot in range(int(plan.kv_num_blocks[0, 0, block])):
        key_block = int(plan.kv_indices[0, 0, block, slot])
        start, length = (int(x[key_block]) for x in (plan.kv_blocks.starts, plan.kv_blocks.lengths))
        keep = plan.rule.keep(torch.tensor([at]), torch.arange(start, start + length))
        seen += int(keep.sum())
    assert seen == keys


def _tokens(blocks, n):
    start, length = int(blocks.starts[n]), int(blocks.lengths[n])
    return blocks.order[start : start + length]


@pytest.mark.parametrize("frame_window", [None, 1, 2, 9])
@pytest.mark.parametrize("tile", [None, (2, 4, 4), (3, 2, 5)])
def test_video(frame_window, tile):
    layout = Layout.video(5, 9, 11, text=6)
    plan = Local(3, frame_window=frame_window, tile=tile).plan(layout)
    assert_exact(plan, circle(layout, 3, frame_window))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 14), st.integers(1, 14)),
    text=st.integers(0, 9),
    text_first=st.booleans(),
    window=st.floats(0.1, 20),
    frame_window=st.none() | st.integers(1, 5),
    tile=st.none() | st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
)
def test_circle_everywhere(shape, text, text_first, window, frame_window, tile):
    layout = Layout.video(*shape, text, text_first)
    plan = Local(window, tile=tile, frame_window=frame_window).plan(layout)
    assert_exact(plan, circle(layout, window, frame_window))


def test_several_grids():
    """Each grid is local in itself and whole to the others, also to one of the same shape."""
    image = Grid(1, 9, 12)
    layout = Layout((image, Context(5), image, Grid(3, 4, 7)))
    assert_exact(Local(3, tile=(1, 4, 4)).plan(layout), circle(layout, 3))


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize(
    "height,width,downsample", [(8, 12, 2), (8, 12, 4), (13, 9, 4), (31, 17, 4), (5, 7, 5)]
)
def test_downsampled_keys(height, width, downsample, text_first):
    """Image queries see every summary, text queries none."""
    layout = Layout.image(height, width, 10, text_first)
    plan = Local(4, downsample).plan(layout)
    extra = math.ceil(height / downsample) * math.ceil(width / downsample)
    image = np.array([at is not None for at in places(layout)])
    summaries = np.repeat(image[:, None], extra, 1)
    assert_exact(plan, np.concatenate([circle(layout, 4), summaries], 1))
    assert plan.num_real_keys == layout.num_tokens and plan.num_keys == layout.num_tokens + extra


def test_reference_images_get_no_summaries():
    image = Grid(1, 6, 6)
    layout = Layout((image, image))
    summaries = np.repeat(np.arange(72)[:, None] < 36, 9, 1)
    expected = np.concatenate([circle(layout, 3), summaries], 1)
    assert_exact(Local(3, 2, tile=(1, 2, 2)).plan(layout), expected)


def patch_sums(x, layout, weight):
    """CLEAR's down-sampling as a loop; border patches weigh what exists by c² / n."""
    grid, c = layout.grid, weight.shape[0]
    tokens = x[:, :, layout.grid_start :][:, :, : grid.length].unflatten(2, grid.shape)
    out = []
    for t in range(grid.frames):
        for y in range(0, grid.height, c):
            for col in range(0, grid.width, c):
                patch = tokens[:, :, t, y : y + c, col : col + c]
                rows, cols = patch.shape[2:4]
                share = weight[:rows, :cols] * (c * c / (rows * cols))
                out.append((patch * share[..., None]).sum((2, 3)))
    return torch.cat([x, torch.stack(out, 2)], 2)


@pytest.mark.parametrize("c", [2, 4])
@pytest.mark.parametrize(
    "layout",
    [Layout.image(8, 12, 5), Layout.image(13, 9, 5, False), Layout.video(3, 5, 6, 4)],
)
def test_extend(layout, c):
    """Values and gradients of the summaries, with trained (uneven) weights."""
    shape = (2, 3, layout.num_tokens, 8)
    k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(c, c, dtype=torch.float64, requires_grad=True)
    actual = Local(4, c).extend(layout, k, v, weight)
    expected = [patch_sums(x, layout, weight) for x in (k, v)]
    grads = [torch.randn_like(x) for x in expected]
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e)
    inputs = (k, v, weight)
    for a, e in zip(
        torch.autograd.grad(actual, inputs, grads), torch.autograd.grad(expected, inputs, grads)
    ):
        torch.testing.assert_close(a, e)


def test_extend_is_traced_whole():
    method, layout = Local(4, 4), Layout.image(6, 5)
    k, weight = torch.randn(1, 2, 30, 4), torch.randn(4, 4)
    compiled = torch.compile(
        lambda k, w: method.extend(layout, k, k, w)[0], fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(compiled(k, weight), method.extend(layout, k, k, weight)[0])


def test_initial_summaries_are_means_at_borders_too():
    method, layout = Local(4, 4), Layout.image(6, 5)
    weight = method.parameters()["spatial_weight"]
    assert weight.shape == (4, 4) and (weight == 1 / 16).all()
    k = torch.randn(1, 2, 30, 4)
    extended, _ = method.extend(layout, k, k)
    grid = k.unflatten(2, (6, 5))
    torch.testing.assert_close(extended[:, :, 30], grid[:, :, :4, :4].mean((2, 3)))
    torch.testing.assert_close(extended[:, :, 33], grid[:, :, 4:, 4:].mean((2, 3)))


def test_extend_keeps_the_dtype_and_sums_in_the_wider_one():
    k = torch.randn(1, 1, 64, 16).to(torch.bfloat16)
    extended, _ = Local(4, 8).extend(Layout.image(8, 8), k, k)
    assert extended.dtype == torch.bfloat16
    exact = k.double().mean(2)
    assert (extended[:, :, 64].double() - exact).abs().max() <= exact.abs().max() * 2**-8


def test_without_downsampling_nothing_is_appended():
    k = torch.randn(1, 1, 6, 4)
    method = Local(4)
    assert method.parameters() == {}
    assert all(x is k for x in method.extend(Layout.image(2, 3), k, k))


def test_padded_text_is_hidden():
    layout = Layout.image(6, 7, text=9, text_lengths=(9, 2))
    weight = Local(3, 2).plan(layout).kv_log_weight
    assert weight.shape == (2, 1, 9 + 42 + 12)
    hidden = torch.isneginf(weight[:, 0])
    assert (
        hidden[1, 2:9].all() and hidden.sum() == 7 and (weight[~torch.isneginf(weight)] == 0).all()
    )


def test_proportional_scale():
    """CLEAR: sqrt(log_4608(n) / d), with 10 n where keys are down-sampled; 1/sqrt(d) at 4608."""
    at_training_size = Layout.image(64, 64, text=512)
    assert Local(8, proportional=True).scale(at_training_size, 64) == pytest.approx(1 / 8)
    large = Layout.image(256, 256, text=512)
    expected = math.sqrt(math.log(66048, 4608) / 128)
    assert Local(8, proportional=True).scale(large, 128) == pytest.approx(expected)
    expected = math.sqrt(math.log(660480, 4608) / 128)
    assert Local(8, 4, proportional=True).scale(large, 128) == pytest.approx(expected)
    assert Local(8).scale(large, 128) is None


def test_plan_grows_with_the_image_not_with_its_square():
    listed = [int(Local(16).plan(Layout.image(n, n)).kv_num_blocks.sum()) for n in (128, 256, 512)]
    assert listed[1] / listed[0] < 4.4 and listed[2] / listed[1] < 4.2


def test_few_blocks_are_partial_for_a_wide_window():
    plan = Local(32).plan(Layout.image(128, 128))
    useful = plan.density * plan.num_queries * plan.num_keys
    blocks = int(plan.kv_num_blocks.sum()) * plan.q_block_size * plan.kv_block_size
    assert useful / blocks > 0.5


@pytest.mark.parametrize(
    "options,match",
    [
        ({"window": 0}, "window.*above 0; got 0.*radius"),
        ({"window": -3.5}, "-3.5"),
        ({"window": math.inf}, "finite"),
        ({"downsample": 1}, "downsample.*at least 2; got 1"),
        ({"downsample": 2.5}, "integer.*2.5"),
        ({"frame_window": 0}, "frame_window.*at least 1; got 0"),
        ({"tile": (1, 8)}, "frames, height, width"),
        ({"tile": (1, 0, 8)}, "tile.*got 0"),
        ({"tile": (1, 32, 16)}, r"tile.*1\.\.256; got 512"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        Local(**options)


def test_bad_layouts():
    with pytest.raises(ValueError, match="no grid"):
        Local().plan(Layout((Context(77),)))
    k = torch.randn(1, 1, 15, 4)
    for call in (
        lambda: Local(8, 4).plan(Layout.image(3, 5)),
        lambda: Local(8, 4).extend(Layout.image(3, 5), k, k),
    ):
        with pytest.raises(ValueError, match=r"at most 3 on a grid of 3 x 5 tokens, got 4"):
            call()
    with pytest.raises(ValueError, match=r"must be \[2, 2\].*got \[3, 3\]"):
        Local(8, 2).extend(Layout.image(3, 5), k, k, torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"must be \[B, H, 15, D\]"):
        Local(8, 2).extend(Layout.image(3, 5), k[:, :, :14], k)
    with pytest.raises(ValueError, match="downsample is None"):
        Local(8).extend(Layout.image(3, 5), k, k, torch.ones(2, 2))


def test_registered():
    assert METHODS["local"] is Local and Local.static and Local.needs_grid
    assert hash(Local(4, tile=[1, 4, 4])) == hash(Local(4, tile=(1, 4, 4)))


def test_proportional_scale_of_another_training_size():
    layout = Layout.image(64, 64, text=24)
    factor = math.log(4120) / math.log(1048)
    assert Local(8, proportional=1048).scale(layout, 64) == pytest.approx((factor / 64) ** 0.5)
    with pytest.raises(ValueError, match=r"proportional.*4608"):
        Local(8, proportional=1)
