"""Plans stay linear: rows that see everything are runs, lists are made part by part and in bounds.

The oracle of a list reads the raw fields of a plan and shares no code with it.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import PYTHON
from random_plans import assert_matches_oracle, even_blocks
from torch.utils._python_dispatch import TorchDispatchMode

import dittfast
from dittfast import attend
from dittfast.block_lists import ListBuilder
from dittfast.layout import Layout
from dittfast.methods import Dense, Local, Radial, Rectified, local, radial, rectified
from dittfast.methods.pairs import chunks
from dittfast.plan import Plan, TokenRule


def seen_blocks(plan, row, batch=0, head=0):
    """``{key block: is it full}`` of one row, from the fields alone."""
    at = batch, head, row
    count, full = int(plan.kv_num_blocks[at]), int(plan.kv_num_full_blocks[at])
    width = plan.kv_indices.shape[-1]
    listed = range(count) if count > width else plan.kv_indices[at][:count].tolist()
    return {block: slot < full for slot, block in enumerate(listed)}


def states(plan, batch=0, head=0):
    """``[nQ, nK]``: 2 full, 1 partial, 0 not seen."""
    out = np.zeros((plan.q_blocks.count, plan.kv_blocks.count), dtype=int)
    for row in range(len(out)):
        for block, full in seen_blocks(plan, row, batch, head).items():
            out[row, block] = 1 + full
    return out


@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 30), st.integers(1, 4))
def test_lists_from_parts(seed, n_q, n_k, parts):
    draw = np.random.default_rng(seed)
    state = draw.choice(3, (n_q, n_k), p=(0.7, 0.1, 0.2))
    for row in draw.choice(n_q, n_q // 3, replace=False):
        state[row] = 2 * (np.arange(n_k) < draw.integers(0, n_k + 1))
    lists, owner = ListBuilder(n_q, n_k), draw.integers(0, parts, n_q)
    for part in range(parts):
        rows, cols = np.nonzero((state > 0) & (owner == part)[:, None])
        by = draw.permutation(rows.size)
        rows, cols = rows[by], cols[by]
        half = rows.size // 2
        pieces = [
            (rows[s], cols[s], state[rows[s], cols[s]] == 2)
            for s in (slice(0, half), slice(half, None))
        ]
        lists.add(*pieces)
    indices, count, full = lists.lists()
    prefix = [set(np.flatnonzero(r)) == set(range((r > 0).sum())) and (r != 1).all() for r in state]
    longest = max([int((r > 0).sum()) for r, p in zip(state, prefix) if not p], default=0)
    assert indices.shape == (1, 1, n_q, max(1, longest))
    assert all(x.dtype == torch.int32 for x in (indices, count, full))
    for row in range(n_q):
        number, whole = int(count[0, 0, row]), int(full[0, 0, row])
        run = number > indices.shape[-1]
        listed = list(range(number)) if run else indices[0, 0, row, :number].tolist()
        assert listed[:whole] == np.flatnonzero(state[row] == 2).tolist()
        assert listed[whole:] == np.flatnonzero(state[row] == 1).tolist()
        if run:
            assert not indices[0, 0, row].any()


def test_lists_refuse_what_they_cannot_hold():
    lists = ListBuilder(5, 4)
    lists.add(([1, 2], [0, 3], True))
    for pairs, message in [
        (([2], [1], True), "query block 2 was added twice"),
        (([5], [1], True), r"query blocks must lie in 0\.\.4, found 5\.\.5"),
        (([3, 3], [1, -1], True), r"kv_indices must lie in 0\.\.3, found -1\.\.1"),
    ]:
        with pytest.raises(ValueError, match=message):
            lists.add(pairs)
    blocks = even_blocks(16, 4)
    with pytest.raises(ValueError, match=r"query block 1 .* lists key block 0 twice"):
        Plan.from_lists([0, 1, 1, 1, 2, 3], [0, 0, 0, 1, 2, 3], True, blocks, blocks)


def test_dense_plans_are_linear():
    plan = Dense(block_size=16).plan(Layout.image(512, 512, text=3))
    assert plan.q_blocks.count == 16385 and plan.nbytes < 1 << 20 and plan.is_dense
    assert plan.density == 1
    assert (states(Plan.full(70, 111, block_size=16)) == 2).all()


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize(
    "method",
    [Local(3, tile=(1, 4, 4)), Local(3, 4, tile=(1, 4, 4)), Radial(block_size=16),
     Radial(block_size=16, variant="hunyuan")],
    ids=["local", "downsampled", "wan", "hunyuan"],
)  # fmt: skip
def test_text_and_odd_tails_widen_no_list(method, text_first):
    """The lists are as wide as those of the same grid without text, but for the text's blocks."""
    shape = (1, 37, 43) if method.name == "local" else (23, 7, 11)
    alone = method.plan(Layout.video(*shape))
    plan = method.plan(Layout.video(*shape, 39, text_first))
    text = plan.q_blocks.count - alone.q_blocks.count
    assert plan.kv_indices.shape[-1] <= alone.kv_indices.shape[-1] + text + 2
    assert plan.kv_indices.shape[-1] < plan.q_blocks.count // 2
    runs = (plan.kv_num_blocks > plan.kv_indices.shape[-1])[0, 0]
    assert runs.any() and (plan.kv_num_blocks[0, 0, runs] >= plan.q_blocks.count).all()
    full = states(plan)
    assert (full[runs.numpy(), : plan.q_blocks.count] == 2).all()
    # The text's rows are among them; what stands between text and video is dense for "wan".
    tokens = torch.arange(39) + (0 if text_first else plan.num_queries - 39)
    order = plan.q_blocks.order
    order = torch.arange(plan.num_queries) if order is None else order
    block = torch.repeat_interleave(torch.arange(plan.q_blocks.count), plan.q_blocks.lengths.long())
    rows = block[torch.isin(order, tokens.to(order.dtype))]
    assert runs[rows].all()


@settings(max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 11)),
    text=st.integers(0, 20),
    text_first=st.booleans(),
    at_once=st.integers(1, 400),
    method=st.sampled_from(
        [Local(2.5, tile=(2, 2, 3)), Local(2, tile=(1, 3, 2), frame_window=2), Radial(0.5, 8),
         Radial(block_size=8, variant="hunyuan_corrected"), Radial(block_size=8, variant="paper"),
         Radial(block_size=37, variant="paper")]
    ),
)  # fmt: skip
def test_parts_have_no_seam(shape, text, text_first, at_once, method):
    layout = Layout.video(*shape, text, text_first)
    whole = method.plan(layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "_AT_ONCE", at_once)
        patch.setattr(radial, "_AT_ONCE", at_once)
        parts = method.plan(layout)
    assert np.array_equal(states(whole), states(parts))
    assert parts.num_partial_pairs == whole.num_partial_pairs
    assert parts.density == pytest.approx(whole.density, rel=1e-12)


def test_chunks():
    assert list(chunks(np.array([2, 2, 9, 1]), 4)) == [slice(0, 2), slice(2, 3), slice(3, 4)]
    assert list(chunks(np.array([], dtype=int), 4)) == []
    assert list(chunks(np.array([0, 0, 3]), 0)) == [slice(0, 2), slice(2, 3)]


def test_rectified_in_parts_has_no_seam(monkeypatch):
    layout = Layout.image(9, 13, text=21, text_lengths=[21, 5])
    method = Rectified(block_size=8, topk=2, neighbors=False, top_p=0.1)
    q, k, v = torch.randn(3, 2, 2, layout.num_tokens, 16, requires_grad=True)

    def outcome():
        plan = method.plan(layout, q, k, v)
        total = (plan.out_residual**2).sum() + plan.out_scale.sum()
        return plan, torch.autograd.grad(total, (q, k, v), allow_unused=True)

    plan, grads = outcome()
    monkeypatch.setattr(rectified, "_PAIRS_AT_ONCE", 2 * 2 * 15 * 4)
    parts, part_grads = outcome()
    assert torch.equal(plan.kv_indices, parts.kv_indices)
    assert torch.equal(plan.kv_num_blocks, parts.kv_num_blocks)
    for ours, theirs in zip((parts.out_scale, *part_grads), (plan.out_scale, *grads)):
        torch.testing.assert_close(ours, theirs)


class _Largest(TorchDispatchMode):
    """Bytes of the largest tensor made that is not a list of blocks."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.dtype != torch.int32:
                self.bytes = max(self.bytes, x.nbytes)
        return out


def test_rectified_needs_memory_for_a_few_rows(monkeypatch):
    """Beside the lists themselves nothing is as large as they are."""
    monkeypatch.setattr(rectified, "_PAIRS_AT_ONCE", 1 << 16)
    method, layout = Rectified(block_size=8), Layout.image(64, 64)
    q = torch.randn(1, 2, layout.num_tokens, 8)
    method.prepare(layout, q.device)
    with torch.no_grad(), _Largest() as largest:
        plan = method.plan(layout, q, q, q)
    assert plan.kv_indices.nbytes == 2 * 512**2 * 4
    assert largest.bytes <= 8 * (1 << 16)


PLANS = [
    Local(2, tile=(1, 2, 4)).plan(Layout.image(7, 13, text=5, text_lengths=[3])),
    Radial(block_size=16, variant="hunyuan").plan(Layout.video(9, 3, 7, text=11)),
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("plan", PLANS, ids=["local", "hunyuan"])
def test_kernels_agree_on_them(plan, backend):
    assert bool((plan.kv_num_blocks > plan.kv_indices.shape[-1]).any())
    assert_matches_oracle(plan, backend)


@pytest.mark.usefixtures("quick_interpreter")
@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS, ids=["local", "hunyuan"])
def test_triton_agrees_on_them(plan):
    assert_matches_oracle(plan, "triton")


@pytest.mark.parametrize("plan", PLANS, ids=["local", "hunyuan"])
def test_transposed_lists_of_them(plan):
    back, state = plan.transpose(), states(plan)
    for block in range(plan.kv_blocks.count):
        rows, full = back.rows(0, 0, block).tolist(), int(back.q_num_full_blocks[0, 0, block])
        assert rows[:full] == np.flatnonzero(state[:, block] == 2).tolist()
        assert rows[full:] == np.flatnonzero(state[:, block] == 1).tolist()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "method",
    [Local(2), Local(2, 3), Radial(block_size=16), Radial(block_size=16, variant="paper"),
     Dense(16)],
    ids=["local", "downsampled", "radial", "paper", "dense"],
)  # fmt: skip
def test_plans_made_in_inference_mode_can_train(method, backend):
    layout = Layout.video(3, 7, 9, text=11, text_lengths=[4])
    q, k, v = torch.randn(3, 1, 1, layout.num_tokens, 16)
    with torch.inference_mode():
        plan = method.plan(layout)
        before = attend(q, *method.extend(layout, k, v), plan, backend=backend)
        plan.transpose()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attend(q, *method.extend(layout, k, v), plan, backend=backend)
    assert torch.equal(out, before)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(torch.isfinite(g).all() for g in grads)
    tensors = [x for x in plan.tensors(backend=backend) if isinstance(x, torch.Tensor)]
    assert len(tensors) > 8 and not any(x.is_inference() for x in tensors)


def test_any_plan_made_in_inference_mode_can_train():
    """Also one that somebody else's method made by hand, weights, order and rule included."""
    layout = Layout.image(5, 7)
    with torch.inference_mode():
        blocks = layout.tiles((1, 2, 3))
        rule = TokenRule.from_layout(layout, "disc", [4], blocks.order)
        lists = torch.zeros(1, 1, blocks.count, 1, dtype=torch.int32)
        one = torch.ones(1, 1, blocks.count, dtype=torch.int32)
        weight = torch.zeros(1, 1, 35)
        plan = Plan(lists, one, 0 * one, blocks, blocks, rule=rule, kv_log_weight=weight)
    tensors = [x for x in plan.tensors() if isinstance(x, torch.Tensor)]
    assert len(tensors) == 15 and not any(x.is_inference() for x in tensors)
    assert torch.equal(plan.rule.q_place, TokenRule.from_layout(layout, "disc", [4]).q_place[
        layout.tiles((1, 2, 3)).order.long()])  # fmt: skip


# name, method, layout, most MB of plan; all in at most 10 s of processor time and 1 GB.
_MEASURE = """
import time
from dittfast import Layout
from dittfast.methods import Dense, Local, Radial
cases = [
    ("flux-8192", Local(), Layout.image(512, 512, text=512), 7),
    ("flux-16384", Local(), Layout.image(1024, 1024, text=512), 27),
    ("minute-720p", Radial(variant="hunyuan"), Layout.video(241, 45, 80, text=256), 20),
    ("minute-720p-local", Local(frame_window=4), Layout.video(241, 45, 80, text=256), 27),
    ("dense", Dense(), Layout.video(2401, 30, 52, text=512), 2),
    ("ten-minutes-480p", Radial(), Layout.video(2401, 30, 52, text=512), 65),
]
for name, method, layout, most in cases:
    method.plan(Layout.video(2, 8, 8, text=3))
    start = time.process_time()
    size = method.plan(layout).nbytes >> 20
    seconds = time.process_time() - start
    status = open("/proc/self/status").read()
    peak = int(status.split("VmHWM:")[1].split()[0]) >> 10
    print(name, size, most, seconds, peak)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_the_largest_pictures_and_videos_are_planned_quickly_and_small():
    source = str(Path(dittfast.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    command = [*PYTHON, "-c", _MEASURE]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    lines = run.stdout.splitlines()
    assert len(lines) == 6
    for line in lines:
        size, most, seconds, peak = (float(x) for x in line.split()[1:])
        assert size <= most and seconds < 10 and peak < 1024, line
