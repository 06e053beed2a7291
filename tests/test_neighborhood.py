"""Neighborhood plans against the windows' formula over every token pair."""

import itertools
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_plans import assert_matches_oracle
from test_local import assert_exact, places

from dittfast import attend
from dittfast.functional import neighborhood_attention
from dittfast.layout import Context, Grid, Layout
from dittfast.methods import METHODS, Neighborhood
from dittfast.testing import assert_within_budget, attention_inputs, eager_attention


def seen_on_axis(n, window, stride, dilation, causal):
    """``[n, n]`` bool, one query after the other."""
    out = np.zeros((n, n), dtype=bool)
    for i in range(n):
        own = [key for key in range(n) if key % dilation == i % dilation]
        j, m = own.index(i), len(own)
        if causal:
            leader = min(stride * (j // stride) + stride - 1, m - 1)
            window_of = range(max(0, leader - window + 1), j + 1)
        else:
            leader = min(stride * (j // stride) + stride // 2, m - 1)
            first = min(max(leader - window // 2, 0), m - window)
            window_of = range(first, first + window)
        out[i, [own[key] for key in window_of]] = True
    return out


def windows(layout, *options):
    """``[N, N]`` bool. ``options``: window, stride, dilation and causal, each for three axes."""
    at = places(layout)
    number = np.array([-1 if place is None else place[0] for place in at])
    out = np.ones((len(at), len(at)), dtype=bool)
    for n, grid in enumerate(layout.grids):
        own = np.flatnonzero(number == n)
        for axis, (size, k, s, d, causal) in enumerate(zip(grid.shape, *options)):
            seen = seen_on_axis(size, k or size, s, d, causal)
            coordinate = np.array([at[token][1 + axis] for token in own])
            out[np.ix_(own, own)] &= seen[np.ix_(coordinate, coordinate)]
    return out


def check(layout, window, stride=(1, 1, 1), dilation=(1, 1, 1), causal=(False,) * 3, tile=None):
    """The plan of options for three axes is the formula; returns it."""
    plan = Neighborhood(window, stride, dilation, causal, tile).plan(layout)
    assert_exact(plan, windows(layout, window, stride, dilation, causal))
    return plan


def axis_options(n):
    """Every (window, stride, dilation, causal) of an axis of n tokens."""
    for window, dilation in itertools.product(range(1, n + 1), repeat=2):
        if window * dilation <= n:
            for stride, causal in itertools.product(range(1, window + 1), (False, True)):
                yield window, stride, dilation, causal


def test_every_option_of_one_axis():
    for n in (1, 2, 5, 9):
        for window, stride, dilation, causal in axis_options(n):
            plan = Neighborhood((window,), (stride,), (dilation,), (causal,)).plan(
                Layout.image(1, n)
            )
            expected = seen_on_axis(n, window, stride, dilation, causal)
            assert np.array_equal(plan.to_dense_mask()[0, 0].numpy(), expected)


@pytest.mark.parametrize("tile", [None, (1, 2, 3), (2, 4, 4)])
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_windows_everywhere(tile, data):
    shape = [data.draw(st.integers(1, most)) for most in (4, 9, 11)]
    options = [data.draw(st.sampled_from(list(axis_options(n)))) for n in shape]
    text = data.draw(st.integers(0, 9))
    layout = Layout.video(*shape, text, data.draw(st.booleans()))
    check(layout, *zip(*options), tile=tile)


def test_several_grids():
    """Each grid has windows of its own and is whole to the others, also to one of its shape."""
    image = Grid(1, 9, 12)
    layout = Layout((image, Context(5), image, Grid(3, 8, 7)))
    check(layout, (None, 5, 4), (1, 3, 1), (1, 1, 1), (False, False, True))
    check(layout, (None, 4, 4), (1, 4, 4))


def test_one_number_is_for_rows_and_columns():
    layout = Layout.video(3, 9, 8, text=4)
    one, three = Neighborhood(4, 2, 2, True), Neighborhood((None, 4, 4), (1, 2, 2), (1, 2, 2))
    causal = Neighborhood((None, 4, 4), (1, 2, 2), (1, 2, 2), (False, True, True))
    kept = [method.plan(layout).to_dense_mask() for method in (one, three, causal)]
    assert torch.equal(kept[0], kept[2]) and not torch.equal(kept[0], kept[1])
    two = Neighborhood((4, 4), 2, 2, (True, True)).plan(layout).to_dense_mask()
    assert torch.equal(two, kept[0])
    # An axis of one token has no window, where one number stands for all of them.
    line = Layout.image(1, 30)
    assert torch.equal(
        Neighborhood(5).plan(line).to_dense_mask(),
        Neighborhood((5,)).plan(line).to_dense_mask(),
    )


def test_a_window_is_shifted_and_not_cut_off():
    """By hand: 7 tokens, window 4. Two to the left, one to the right, always four."""
    kept = Neighborhood((4,)).plan(Layout.image(1, 7)).to_dense_mask()[0, 0]
    rows = [row.nonzero()[:, 0].tolist() for row in kept]
    assert rows[0] == rows[1] == rows[2] == [0, 1, 2, 3]
    assert rows[3] == [1, 2, 3, 4] and rows[4] == [2, 3, 4, 5]
    assert rows[5] == rows[6] == [3, 4, 5, 6]


STRIDED = {
    "blocked": (Layout.image(24, 24), (None, 8, 8), (1, 8, 8)),
    "half": (Layout.image(32, 48, text=10), (None, 16, 16), (1, 8, 8)),
    "windows that are no multiple": (Layout.image(40, 40), (None, 18, 15), (1, 7, 5)),
    "ragged": (Layout.image(45, 37), (None, 16, 12), (1, 4, 6)),
    "Hunyuan, made small": (Layout.video(15, 24, 40, text=9), (9, 12, 12), (8, 4, 4)),
    "Cosmos, made small": (Layout.video(4, 22, 40), (None, 16, 24), (1, 4, 8)),
    "small strides, all frames": (Layout.video(6, 12, 12), (None, 4, 4), (1, 2, 2)),
    "frame by frame": (Layout.video(6, 16, 16), (3, 8, 8), (1, 4, 4)),
    "one axis": (Layout.image(1, 400), (None, None, 100), (1, 1, 20)),
    "dilated": (Layout.image(24, 24), (None, 8, 8), (1, 4, 4), (1, 2, 2)),
    "causal in time": (
        Layout.video(6, 16, 16), (None, 8, 8), (1, 4, 4), (1, 1, 1), (True, False, False),
    ),
    "several grids": (
        Layout((Grid(1, 24, 24), Context(7), Grid(1, 19, 33))), (None, 12, 12), (1, 4, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STRIDED)
def test_strided_windows_cut_no_block(name):
    layout, *options = STRIDED[name]
    plan = Neighborhood(*options).plan(layout)
    assert torch.equal(plan.kv_num_blocks, plan.kv_num_full_blocks) and plan.rule is None
    assert plan.q_blocks.lengths.max() <= 128 and plan.kv_blocks.lengths.max() <= 128
    if layout.num_tokens < 1000:
        *_, dilation, causal = (*options, *((1, 1, 1), (False,) * 3)[len(options) - 2 :])
        assert_exact(plan, windows(layout, *options[:2], dilation, causal))
    # Without strides the same windows do.
    assert Neighborhood(options[0]).plan(layout).rule is not None


def test_dilated_tokens_stand_with_their_residue_class():
    plan = Neighborhood(4, dilation=3).plan(Layout.image(12, 15))
    for blocks in (plan.q_blocks, plan.kv_blocks):
        for start, length in zip(blocks.starts.tolist(), blocks.lengths.tolist()):
            rows, columns = np.divmod(blocks.order[start : start + length].numpy(), 15)
            assert len(set(rows % 3)) == 1 and len(set(columns % 3)) == 1


def test_padded_text_is_hidden():
    layout = Layout.image(6, 7, text=9, text_lengths=(9, 2))
    plan = Neighborhood(3).plan(layout)
    hidden = torch.isneginf(plan.kv_log_weight[:, 0])
    assert hidden[1, 2:9].all() and hidden.sum() == 7
    q, k, v, _ = attention_inputs(2, 2, layout.num_tokens, 32)
    mask = torch.from_numpy(windows(layout, (None, 3, 3), (1,) * 3, (1,) * 3, (False,) * 3))
    mask = mask & ~hidden[:, None, None]
    exact = eager_attention(q.double(), k.double(), v.double(), mask, 32**-0.5)
    eager = eager_attention(q, k, v, mask, 32**-0.5)
    for backend in ("cpu", "native", "reference"):
        assert_within_budget("out", attend(q, k, v, plan, backend=backend), exact, eager)


@pytest.mark.parametrize("backend", ["cpu", "native"])
@pytest.mark.parametrize(
    "layout, options",
    [
        (Layout.image(13, 17, text=7), (5,)),
        (Layout.video(5, 9, 8, text=3), ((3, 4, 4), (2, 1, 2), (1, 2, 1), (True, False, False))),
        (Layout.image(16, 16, text=20), (8, 4)),
        (Layout((Grid(1, 9, 12), Context(5), Grid(2, 6, 7))), (4, 1, 1, True)),
    ],
    ids=str,
)
def test_attention_and_gradients(backend, layout, options):
    """Forward, lse and every gradient; the oracle reads the plan's raw fields."""
    plan = Neighborhood(*options).plan(layout)
    assert_matches_oracle(plan, backend, batch=2, heads=2, head_dim=32)


def test_the_function_is_the_formula():
    layout = Layout.video(3, 7, 8, text=4)
    q, k, v, grad = attention_inputs(2, 4, layout.num_tokens, 32)
    k, v = k[:, :2], v[:, :2]  # grouped heads
    options = (2, 4, 5), (1, 2, 1), (1, 1, 1), (False, False, True)
    mask = torch.from_numpy(windows(layout, *options))
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        wide = [leaves[0], *(x.repeat_interleave(2, 1) for x in leaves[1:])]
        out = eager_attention(*wide, mask, 0.3)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = neighborhood_attention(*leaves, layout, *options, scale=0.3)
    ours = out.detach(), *torch.autograd.grad(out, leaves, grad)
    for name, a, eager, exact in zip(("out", "dq", "dk", "dv"), ours, *results):
        assert_within_budget(name, a, exact, eager)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Neighborhood(0), "window on rows must be an integer, at least 1; got 0"),
        (lambda: Neighborhood((3, 2.5)), "window on columns .*; got 2.5"),
        (lambda: Neighborhood((1, 2, 3, 4)), "window must have 1 to 3 entries"),
        (lambda: Neighborhood(()), "window must have 1 to 3 entries"),
        (lambda: Neighborhood(8, 9), r"stride on rows must be an integer, 1..8; got 9"),
        (lambda: Neighborhood((8, 4), (8, 8)), r"stride on columns .* 1..4; got 8"),
        (lambda: Neighborhood(8, (2, 1, 1)), "stride on frames .* 1..1; got 2 .*no window on this"),
        (lambda: Neighborhood(8, dilation=0), "dilation on rows .* at least 1; got 0"),
        (lambda: Neighborhood(8, dilation=(2, 1, 1)), "dilation on frames .* 1..1; got 2"),
        (lambda: Neighborhood(8, causal=1), "causal must be True or False on rows; got 1"),
        (lambda: Neighborhood(8, tile=(1, 8)), "tile must be"),
        (lambda: Neighborhood(8, tile=(1, 32, 9)), "tokens in a tile .* 1..256; got 288"),
        (
            lambda: Neighborhood(8).plan(Layout.image(7, 20)),
            r"window on rows must be 1..7 on a grid of 1 x 7 x 20 tokens .*; got 8 \(None",
        ),
        (
            lambda: Neighborhood(5, dilation=4).plan(Layout.image(20, 19)),
            "window on columns must be 1..4 .* with dilation 4; got 5",
        ),
        (lambda: Neighborhood((4, 3, 3)).plan(Layout.image(9, 9)), "window on frames must be 1..1"),
        (lambda: Neighborhood(3).plan(Layout((Context(9),))), "no grid"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_it_is_listed_and_hashable():
    assert METHODS["neighborhood"] is Neighborhood and Neighborhood.static
    assert Neighborhood([4, 4], [2, 2]) == Neighborhood((4, 4), (2, 2))
    assert len({Neighborhood((4, 4)), Neighborhood((4, 4)), Neighborhood(4)}) == 2


LARGE = {
    "image": (lambda n: Layout.image(math.isqrt(n), math.isqrt(n)), (16,)),
    "strided": (lambda n: Layout.image(math.isqrt(n), math.isqrt(n), text=64), (16, 8)),
    "line": (lambda n: Layout.image(1, n), (64,)),
}


@pytest.mark.parametrize("name", LARGE)
def test_plans_grow_with_the_tokens_not_with_their_square(name):
    make, options = LARGE[name]
    method, sizes = Neighborhood(*options), (1 << 12, 1 << 14, 1 << 16)
    plans = [method.plan(make(n)) for n in sizes]
    growth = math.log(plans[-1].nbytes / plans[0].nbytes) / math.log(sizes[-1] / sizes[0])
    assert growth <= 1.05
    start = time.process_time()
    layout = Layout.image(1, 1 << 17) if name == "line" else Layout.image(256, 512)
    method.plan(layout)
    assert time.process_time() - start < 8


@pytest.mark.slow
def test_natten_itself_sees_the_same(tmp_path):
    """Every option of small grids in one to three dimensions, installed from the index."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    install += ["--no-build-isolation", "--target", str(tmp_path), "natten==0.21.7"]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"NATTEN cannot be installed: {done.stderr[-500:]}")
    worker = Path(__file__).with_name("natten_worker.py")
    command = [sys.executable, str(worker), str(tmp_path), "9", "4x4", "2x3x3"]
    environment = {**os.environ, "PYTHONPATH": str(worker.parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    # NATTEN's attention over all of a causal axis does not run on a CPU.
    assert "995 agree, 9 do not run in NATTEN" in done.stdout
