"""Radial plans against an oracle that paints every frame pair densely."""

import os
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import PYTHON

import dittfast
from dittfast.layout import Context, Grid, Layout
from dittfast.methods import METHODS, Radial, radial
from dittfast.methods.radial import code_half_widths, paper_limits

CODE_VARIANTS = ("wan", "hunyuan", "wan_corrected", "hunyuan_corrected")


def kept_tokens(i, j, tokens, block, decay, sink):
    """The published token rule for frames i, j: ``[tokens, tokens]`` bool."""
    if sink and j == 0:
        return np.ones((tokens, tokens), dtype=bool)
    distance = abs(i - j)
    length = 2 ** tokens.bit_length() / 2 ** distance.bit_length()
    if distance and length < 128 and distance % int(128 / length):
        return np.zeros((tokens, tokens), dtype=bool)
    if distance <= 1:
        return np.ones((tokens, tokens), dtype=bool)
    at = torch.arange(tokens)
    return ((at[:, None] - at).abs() <= max(length * decay, block)).numpy()


def painted_mask(frames, tokens, block, decay, variant):
    """The published block mask of the video's whole blocks, painted frame pair by frame pair."""
    regular = frames * tokens // block
    out = np.zeros((regular, regular), dtype=bool)
    tiles = -(-tokens // block) + variant.endswith("_corrected")
    for i in range(frames):
        for j in range(frames):
            keep = kept_tokens(i, j, tokens, block, decay, variant.startswith("wan"))
            row, col = i * tokens % block, j * tokens % block
            canvas = np.zeros(((tiles + 2) * block,) * 2, dtype=bool)
            canvas[row : row + tokens, col : col + tokens] = keep
            canvas = canvas[: tiles * block, : tiles * block]
            # Rows each column sees, per tile: [row tile, column tile, column].
            seen = canvas.reshape(tiles, block, tiles, block).sum(1)
            density = torch.from_numpy(seen) / block
            high, some = (density > 1 / 3).sum(-1), (density > 0).sum(-1)
            shrunk = (high / some > 0.6).numpy()
            top, left = i * tokens // block, j * tokens // block
            part = out[top : top + tiles, left : left + tiles]
            part |= shrunk[: part.shape[0], : part.shape[1]]
    empty = np.flatnonzero(~out.any(1))
    out[empty, empty] = True
    return out


def whole_mask(layout, block, video):
    """``video`` placed into the mask of the whole sequence; all else is dense."""
    start = layout.grid_start
    before = -(-start // block)
    count = before + -(-(layout.num_tokens - start) // block)
    out = np.ones((count, count), dtype=bool)
    out[before : before + len(video), before : before + len(video)] = video
    return out


def assert_same_blocks(plan, expected):
    actual = plan.to_block_mask()[0, 0].numpy()
    assert actual.shape == expected.shape
    wrong = np.argwhere(actual != expected)
    assert not len(wrong), f"{len(wrong)} blocks differ, first {wrong[0]}"
    assert torch.equal(plan.kv_num_blocks, plan.kv_num_full_blocks)


# frames, tokens per frame, block, decay: lengths that are multiples of the block and not, frames
# shorter than a block, shorter than 128 (where distance 1 may be skipped), bands from B to whole.
CODE_CASES = [
    (1, 256, 64, 1.0),
    (2, 128, 128, 1.0),
    (2, 127, 128, 1.0),
    (8, 64, 64, 1.0),
    (8, 96, 128, 1.0),
    (5, 390, 64, 0.3),
    (4, 1000, 128, 0.2),
    (9, 200, 64, 2.0),
    (16, 63, 64, 1.0),
    (40, 16, 128, 1.0),
    (33, 7, 16, 1.0),
    (20, 1, 8, 1.0),
    (6, 111, 32, 0.95),
    (7, 130, 128, 0.8),
    (12, 48, 96, 1.0),
    (11, 60, 30, 0.5),
    (3, 1, 1, 1.0),
    # Blocks of which exactly a third of the rows see a column.
    (3, 40, 48, 0.3),
    (4, 80, 96, 0.2),
    (6, 128, 192, 0.2),
]


@pytest.mark.parametrize("variant", CODE_VARIANTS)
@pytest.mark.parametrize("frames,tokens,block,decay", CODE_CASES)
def test_code_mask(frames, tokens, block, decay, variant):
    layout = Layout.video(frames, 1, tokens)
    video = painted_mask(frames, tokens, block, decay, variant)
    plan = Radial(decay, block, variant).plan(layout)
    assert_same_blocks(plan, whole_mask(layout, block, video))


@pytest.mark.parametrize("variant", ["wan", "hunyuan", "wan_corrected"])
def test_code_mask_at_480p(variant):
    """Wan at 480p: 30 x 52 tokens a frame, which no block size divides."""
    layout = Layout.video(6, 30, 52, text=226)
    video = painted_mask(6, 1560, 128, 0.2, variant)
    assert_same_blocks(Radial(0.2, 128, variant).plan(layout), whole_mask(layout, 128, video))


@settings(max_examples=120, deadline=None)
@given(
    frames=st.integers(1, 12),
    tokens=st.integers(1, 220),
    block=st.integers(1, 160),
    decay=st.floats(0.01, 4),
    variant=st.sampled_from(CODE_VARIANTS),
    text=st.integers(0, 70),
    text_first=st.booleans(),
)
def test_code_mask_everywhere(frames, tokens, block, decay, variant, text, text_first):
    layout = Layout.video(frames, 1, tokens, text, text_first)
    video = painted_mask(frames, tokens, block, decay, variant)
    plan = Radial(decay, block, variant).plan(layout)
    assert_same_blocks(plan, whole_mask(layout, block, video))


def test_the_corrected_form_keeps_what_a_frame_spills():
    # Frame 1 covers tokens 190..379, which is blocks 2 to 5 of 64; ceil(190 / 64) = 3 are painted.
    published = painted_mask(3, 190, 64, 1.0, "hunyuan")
    corrected = painted_mask(3, 190, 64, 1.0, "hunyuan_corrected")
    assert not published[5, 2] and corrected[5, 2]
    assert not (published & ~corrected).any()


@pytest.mark.parametrize("variant", ["wan", "hunyuan_corrected", "paper"])
def test_planning_in_chunks_has_no_seam(monkeypatch, variant):
    layout = Layout.video(13, 1, 70)
    whole = Radial(block_size=32, variant=variant).plan(layout)
    monkeypatch.setattr(radial, "_AT_ONCE", 60)
    chunked = Radial(block_size=32, variant=variant).plan(layout)
    assert torch.equal(whole.to_dense_mask(), chunked.to_dense_mask())
    assert torch.equal(whole.kv_num_full_blocks, chunked.kv_num_full_blocks)


def test_a_huge_decay_factor_keeps_whole_frames():
    assert (code_half_widths(16, 3000, 64, 1e308) == 2999).all()


def test_band_compares_in_single_precision():
    """2048 - 1e-5 rounds up to 2048 where the published code compares it with integers."""
    decay = (2048 - 1e-5) / 1024
    assert code_half_widths(4, 3000, 64, decay)[2] == 2048
    assert code_half_widths(4, 3000, 64, 2047.9 / 1024)[2] == 2047


def test_thresholds_equal_the_floating_point_ones():
    """3 rows > B and 5 high > 3 seen decide as the published divisions do, ties included."""
    for block in range(1, 257):
        rows = torch.arange(block + 1)
        assert torch.equal(rows / block > 1 / 3, 3 * rows > block)
        assert torch.equal(rows >= block // 3 + 1, 3 * rows > block)
        high = torch.arange(block + 1)[:, None]
        for dtype in (torch.float32, torch.float64):
            ratio = high.to(dtype) / rows[1:].to(dtype)
            assert torch.equal(ratio > 0.6, 5 * high > 3 * rows[1:])


@pytest.mark.parametrize(
    "frames,tokens,decay,variant,density",
    [(30, 3840, 0.95, "hunyuan", 0.275), (30, 3840, 1.0, "paper", 0.41)],
)
def test_published_densities(frames, tokens, decay, variant, density):
    plan = Radial(decay, 128, variant).plan(Layout.video(frames, 48, tokens // 48))
    assert plan.density == pytest.approx(density, abs=0.005)


def test_partition_with_text():
    """Text first gets its own blocks; text last may share a block with the video's tail."""
    first = Radial(block_size=64).plan(Layout.video(3, 10, 10, text=70, text_first=True))
    assert first.q_blocks.starts.tolist() == [0, 64, 70, 134, 198, 262, 326]
    assert first.q_blocks.lengths.tolist() == [64, 6, 64, 64, 64, 64, 44]
    last = Radial(block_size=64).plan(Layout.video(3, 10, 10, text=70))
    assert last.q_blocks.starts.tolist() == [0, 64, 128, 192, 256, 320]
    assert last.q_blocks.lengths[-1] == 50
    for plan, dense in ((first, [0, 1, 6]), (last, [4, 5])):
        mask = plan.to_block_mask()[0, 0]
        assert mask[dense].all() and mask[:, dense].all()


@pytest.mark.parametrize("variant", ["wan", "paper"])
def test_padded_text_is_hidden(variant):
    layout = Layout.video(3, 8, 10, text=20, text_lengths=(20, 3))
    plan = Radial(block_size=32, variant=variant).plan(layout)
    weight = plan.kv_log_weight
    assert weight.shape == (2, 1, 260)
    assert (weight[0] == 0).all() and (weight[1, 0, :243] == 0).all()
    assert torch.isneginf(weight[1, 0, 243:]).all()


@pytest.mark.parametrize("variant", ["wan", "hunyuan_corrected", "paper"])
def test_an_image_is_dense(variant):
    plan = Radial(variant=variant).plan(Layout.image(37, 29, text=11))
    assert plan.density == 1 and plan.to_dense_mask().all()


@pytest.mark.parametrize("variant", ["hunyuan", "paper"])
def test_reference_images_are_context(variant):
    """Equal grids too: only the first is the video."""
    image = Grid(8, 1, 130)
    layout = Layout((Context(5), image, image))
    mask = Radial(block_size=64, variant=variant).plan(layout).to_dense_mask()[0, 0]
    alone = Radial(block_size=64, variant=variant).plan(Layout.video(8, 1, 130)).to_dense_mask()
    whole = 1024  # tokens in whole blocks of the first grid
    assert torch.equal(mask[5 : 5 + whole, 5 : 5 + whole], alone[0, 0, :whole, :whole])
    assert not alone.all()
    for outside in (slice(0, 5), slice(5 + 1040, None)):
        assert mask[outside].all() and mask[:, outside].all()


def equation_4(frames, tokens):
    """``[n, n]`` bool, from the paper, with fractions as fractions."""
    n = frames * tokens
    out = np.zeros((n, n), dtype=bool)
    for i in range(frames):
        for j in range(frames):
            r = int(np.floor(np.log2(max(abs(i - j), 1))))
            for k in range(tokens):
                for m in range(tokens):
                    near = 2**r <= tokens and abs(k - m) + 1 <= tokens / 2**r
                    same = abs(i - j) % int(np.ceil(2**r / tokens)) == 0 and k == m
                    out[i * tokens + k, j * tokens + m] = near or same or j == 0
    return out


@pytest.mark.parametrize("text,text_first", [(0, False), (13, True), (13, False)])
@pytest.mark.parametrize(
    "frames,height,width,block",
    [(1, 3, 5, 4), (2, 3, 5, 4), (9, 3, 7, 8), (9, 3, 7, 32), (33, 1, 3, 8), (20, 1, 1, 4),
     (17, 2, 2, 16), (5, 4, 16, 64), (6, 5, 13, 32), (11, 3, 7, 1)],
)  # fmt: skip
def test_equation_4(frames, height, width, block, text, text_first):
    layout = Layout.video(frames, height, width, text, text_first)
    plan = Radial(block_size=block, variant="paper").plan(layout)
    start, n = layout.grid_start, layout.grid.length
    expected = np.ones((layout.num_tokens,) * 2, dtype=bool)
    expected[start : start + n, start : start + n] = equation_4(frames, height * width)
    actual = plan.to_dense_mask()[0, 0].numpy()
    assert np.array_equal(actual, expected)
    assert plan.density == pytest.approx(expected.mean(), rel=1e-12)
    assert plan.replace(kv_log_weight=None).density == pytest.approx(expected.mean(), rel=1e-12)
    assert_blocks_are_what_they_say(plan, expected)


def assert_blocks_are_what_they_say(plan, expected):
    """Full blocks hold every pair, partial ones some but not all, absent ones none."""
    state = np.zeros((plan.q_blocks.count, plan.kv_blocks.count), dtype=int)
    for row in range(len(state)):
        count = int(plan.kv_num_blocks[0, 0, row])
        listed = plan.kv_indices[0, 0, row, :count].numpy()
        if count > plan.kv_indices.shape[-1]:  # a run
            listed = np.arange(count)
        state[row, listed] = 1
        state[row, listed[: plan.kv_num_full_blocks[0, 0, row]]] = 2
    rows, cols = (b.starts.numpy() for b in (plan.q_blocks, plan.kv_blocks))
    kept = np.add.reduceat(np.add.reduceat(expected.astype(int), rows, 0), cols, 1)
    size = np.outer(plan.q_blocks.lengths.numpy(), plan.kv_blocks.lengths.numpy())
    assert np.array_equal(state == 2, kept == size)
    assert np.array_equal(state == 0, kept == 0)


def test_equation_4_limits_where_s_is_no_multiple_of_the_band():
    # 7 / 2 = 3.5: |k - l| + 1 <= 3.5 is |k - l| <= 2. At 8 frames 2**r > s: every ceil(8/7) = 2nd.
    limits = paper_limits(17, 7)
    assert limits[:4].tolist() == [6, 6, 2, 2]
    assert limits[4:8].tolist() == [0] * 4
    assert limits[8:12].tolist() == [0, -1, 0, -1]
    assert limits[16] == -1  # ceil(16 / 7) = 3


@pytest.mark.parametrize(
    "options,match",
    [
        ({"variant": "wann"}, "'wann'.*did you mean 'wan'"),
        ({"decay_factor": 0}, "decay_factor.*above 0; got 0"),
        ({"decay_factor": float("nan")}, "decay_factor.*finite"),
        ({"block_size": 0}, r"block_size.*1\.\.256; got 0"),
        ({"block_size": 512}, r"1\.\.256; got 512 \(the kernels"),
        ({"block_size": 64.5}, "integer.*64.5"),
        ({"variant": "paper", "decay_factor": 0.5}, "0.5.*Equation 4"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        Radial(**options)


def test_text_alone_cannot_be_planned():
    with pytest.raises(ValueError, match="no grid"):
        Radial().plan(Layout((Context(77),)))


def test_registered():
    assert METHODS["radial"] is Radial and Radial.static and Radial.needs_grid
    assert hash(Radial(0.2)) == hash(Radial(0.2)) and Radial(0.2) != Radial(0.3)


_MEASURE = """
import resource, time
from dittfast import Layout
from dittfast.methods import Radial
Radial().plan(Layout.video(2, 4, 4))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for variant in ("wan", "paper"):
    before, times = peak(), []
    for _ in range(5):
        start = time.process_time()
        Radial(variant=variant).plan(Layout.video(21, 45, 80))
        times.append(time.process_time() - start)
    print(variant, min(times), peak() - before)
"""


@pytest.mark.slow
def test_720p_is_planned_quickly_and_small():
    """21 x 45 x 80 tokens, block 128: under 0.5 s and 300 MB (published code: 104 s).

    Processor time of one thread, because other work on the machine does not count.
    """
    source = str(Path(dittfast.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    command = [*PYTHON, "-c", _MEASURE]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    for line in run.stdout.splitlines():
        seconds, megabytes = line.split()[1:]
        assert float(seconds) < 0.5, line
        assert float(megabytes) < 300, line


def test_half_a_million_tokens():
    start = time.process_time()
    plan = Radial().plan(Layout.video(128, 45, 80))
    assert time.process_time() - start < 15
    assert plan.num_queries == 460_800 and 0.05 < plan.density < 0.15
