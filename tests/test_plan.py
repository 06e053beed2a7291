"""Plans: lists, masks, transposes, density and FLOPs against brute force; bad plans are refused."""

import dataclasses
import re

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_plans import even_blocks, ragged_blocks, random_plan, random_rule

from dittfast import methods
from dittfast.layout import Layout, make_blocks
from dittfast.plan import DISTANCES, METRICS, Plan, TokenRule, transpose_lists

seeds = st.integers(0, 10_000)


@st.composite
def plans(draw, with_weight=False):
    """Random plans: ragged, ordered, with and without a rule, per batch row and head."""
    seed = draw(seeds)
    q_blocks = ragged_blocks(
        draw(st.integers(1, 40)), draw(st.integers(1, 9)), seed, draw(st.booleans())
    )
    kv_blocks = ragged_blocks(
        draw(st.integers(1, 40)), draw(st.integers(1, 9)), seed + 1, draw(st.booleans())
    )
    num_q, num_k = int(q_blocks.lengths.sum()), int(kv_blocks.lengths.sum())
    rule = None
    if draw(st.booleans()):
        rule = random_rule(
            num_q, num_k, draw(st.sampled_from(METRICS)), 3, draw(st.integers(0, 1)), seed
        )
    lists = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 3)]))
    fields = {}
    if with_weight and draw(st.booleans()):
        weight = torch.randn(draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 3])), num_k)
        weight[torch.rand(weight.shape) < 0.3] = -torch.inf
        weight[..., 0] = 0
        fields["kv_log_weight"] = weight
    if with_weight:
        fields["num_real_keys"] = draw(st.integers(1, num_k))
    density = draw(st.floats(0.05, 1))
    return random_plan(q_blocks, kv_blocks, lists, rule, density, seed, **fields)


@given(plans())
def test_dense_mask(plan):
    assert torch.equal(plan.to_dense_mask(), oracle.mask(plan))


@given(plans())
def test_block_mask_and_back(plan):
    mask = plan.to_block_mask()
    assert torch.equal(mask, oracle.block_mask(plan))
    again = Plan.from_block_mask(mask, plan.q_blocks, plan.kv_blocks)
    assert torch.equal(again.to_block_mask(), mask)
    assert torch.equal(again.kv_num_full_blocks, again.kv_num_blocks)


@given(plans())
def test_transpose(plan):
    t = plan.transpose()
    lists = plan.kv_indices.shape[:2]
    assert t.q_num_blocks.shape == (*lists, plan.kv_blocks.count)
    assert plan.transpose() is t
    for b, h in np.ndindex(*lists):
        for col in range(plan.kv_blocks.count):
            full, partial = [], []
            for row in range(plan.q_blocks.count):
                used = dict(oracle.listed(plan, b, h, row))
                if col in used:
                    (full if used[col] else partial).append(row)
            assert t.rows(b, h, col).tolist() == full + partial
            assert int(t.q_num_full_blocks[b, h, col]) == len(full)


@given(plans())
def test_transposing_twice_gives_the_lists_back(plan):
    count = plan.q_blocks.count
    once = transpose_lists(
        plan.kv_indices, plan.kv_num_blocks, plan.kv_num_full_blocks, plan.kv_blocks.count
    )
    shape = once.q_num_blocks.shape
    lists = torch.zeros(*shape, count, dtype=torch.int32)
    for at in np.ndindex(*shape):
        rows = once.rows(*at)
        lists[at][: len(rows)] = rows
    twice = transpose_lists(lists, once.q_num_blocks, once.q_num_full_blocks, count)
    assert torch.equal(twice.q_num_blocks, plan.kv_num_blocks)
    assert torch.equal(twice.q_num_full_blocks, plan.kv_num_full_blocks)
    for b, h, row in np.ndindex(*plan.kv_indices.shape[:3]):
        by_kind = sorted(oracle.listed(plan, b, h, row), key=lambda x: (not x[1], x[0]))
        assert twice.rows(b, h, row).tolist() == [block for block, _ in by_kind]


def test_transpose_of_a_key_that_all_see_is_linear():
    """Summaries that everybody sees, beside keys that few see: no rectangle of lists."""
    n = 512
    lists = torch.stack([torch.zeros(n), torch.arange(n)], 1).int()
    lists = torch.where(lists[:, 1:] == 0, torch.tensor([[0, 1]]), lists).int()[None, None]
    count = torch.full((1, 1, n), 2, dtype=torch.int32)
    t = transpose_lists(lists, count, count, n)
    assert sum(x.numel() for x in t) <= 6 * n
    assert t.rows(0, 0, 0).tolist() == list(range(n)) and t.rows(0, 0, 7).tolist() == [7]


@given(plans(with_weight=True))
def test_density_and_flops(plan):
    density, pairs = oracle.pairs(plan, plan.num_real_keys)
    assert plan.density == pytest.approx(density)
    assert plan.flops(64, heads=3, batch=2) == pytest.approx(4 * 64 * 6 * pairs)
    assert plan.flops(64, backward=True) == pytest.approx(14 * 64 * pairs)


@settings(max_examples=10)
@given(seeds)
def test_a_planner_may_count_partial_pairs_itself(seed):
    blocks = ragged_blocks(40, 8, seed)
    plan = random_plan(blocks, blocks, rule=random_rule(40, 40, seed=seed), seed=seed)
    only_full = oracle.mask(plan.replace(rule=random_rule(40, 40, seed=seed, keeps=False)))
    partial = int((oracle.mask(plan) & ~only_full).sum())
    assert plan.replace(num_partial_pairs=partial).density == pytest.approx(plan.density)
    assert plan.replace(num_partial_pairs=partial + 16).density == pytest.approx(
        plan.density + 0.01
    )


@given(seeds, st.integers(1, 12), st.integers(1, 12))
def test_from_lists_sorts_full_blocks_first(seed, n_q, n_k):
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand(n_q, n_k, generator=draw) < 0.5
    mask[torch.arange(n_q), torch.randint(0, n_k, (n_q,), generator=draw)] = True
    full = torch.rand(n_q, n_k, generator=draw) < 0.5
    rows, cols = mask.nonzero(as_tuple=True)
    by = torch.randperm(rows.numel(), generator=draw)
    q_blocks, kv_blocks = even_blocks(4 * n_q, 4), even_blocks(4 * n_k, 4)
    rule = random_rule(4 * n_q, 4 * n_k)
    plan = Plan.from_lists(rows[by], cols[by], full[rows, cols][by], q_blocks, kv_blocks, rule=rule)
    assert torch.equal(plan.to_block_mask()[0, 0], mask)
    for row in range(n_q):
        count, whole = (int(x[0, 0, row]) for x in (plan.kv_num_blocks, plan.kv_num_full_blocks))
        listed = plan.kv_indices[0, 0, row, :count].tolist()
        if count > plan.kv_indices.shape[-1]:  # a run
            listed = list(range(count))
        assert listed[:whole] == (mask & full)[row].nonzero()[:, 0].tolist()
        assert listed[whole:] == (mask & ~full)[row].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("num_queries, num_keys", [(1, 1), (63, 390), (390, 63), (1000, 1000)])
def test_full_plan(num_queries, num_keys):
    plan = Plan.full(num_queries, num_keys, block_size=64)
    assert plan.density == 1
    assert plan.flops(8) == 4 * 8 * num_queries * num_keys
    assert bool(plan.to_dense_mask().all())


@given(seeds, st.sampled_from(METRICS), st.integers(1, 5), st.integers(0, 2))
def test_rule(seed, metric, frames, sink_frames):
    rule = random_rule(15, 17, metric, frames, sink_frames, seed)
    kept = rule.keep(torch.arange(15)[:, None], torch.arange(17))
    assert kept.tolist() == oracle.rule_keeps(rule, np.arange(15)[:, None], np.arange(17)).tolist()


@pytest.mark.parametrize("metric", DISTANCES)
def test_rule_from_layout(metric):
    layout = Layout.video(3, 4, 5, text=3)
    order = layout.order("hilbert")
    rule = TokenRule.from_layout(layout, metric, [6, 2, -1], order, sink_frames=1, extra_keys=2)
    place = layout.coordinates()[order.numpy()]
    kept = rule.keep(torch.arange(63)[:, None], torch.arange(65))
    assert bool(kept[:, 63:].all())
    for i, (gi, ti, yi, xi) in enumerate(place.tolist()):
        for j, (gj, tj, yj, xj) in enumerate(place.tolist()):
            distance = (yi - yj) ** 2 + (xi - xj) ** 2
            if metric == "raster":
                distance = abs(yi * 5 + xi - yj * 5 - xj)
            expected = gi < 0 or gj < 0 or tj == 0 or distance <= [6, 2, -1][abs(ti - tj)]
            assert bool(kept[i, j]) == expected


def test_plans_are_frozen_and_replace_validates():
    plan = Plan.full(10, block_size=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.num_real_keys = 3
    assert plan.replace(num_real_keys=4).num_real_keys == 4
    with pytest.raises(ValueError, match=r"num_real_keys must lie in 1\.\.10, got 11"):
        plan.replace(num_real_keys=11)


def test_a_plan_that_is_moved_knows_its_runs():
    """Looking for them later would wait for the device."""
    plan = methods.Local(window=2).plan(Layout.image(64, 64, text=5))
    assert plan.has_runs
    moved = plan.to("cpu:0")  # a device by another name is moved to
    assert moved is not plan
    assert moved.tensors().run_rows.tolist() == plan.run_rows().tolist() != []


def test_moving_to_the_same_device_changes_nothing():
    plan = Plan.full(10, block_size=4)
    assert plan.to("cpu") is plan and plan.to(torch.device("cpu")) is plan


def test_select_heads():
    blocks = ragged_blocks(40, 8)
    fields = {
        "kv_log_weight": torch.randn(1, 4, 40),
        "out_scale": torch.rand(2, 1, blocks.count) + 1,
        "out_residual": torch.randn(1, 4, blocks.count, 8),
    }
    plan = random_plan(blocks, blocks, (2, 4), random_rule(40, 40), **fields)
    part = plan.select_heads(slice(1, 3))
    assert torch.equal(part.to_dense_mask(), plan.to_dense_mask()[:, 1:3])
    assert torch.equal(part.kv_log_weight, plan.kv_log_weight[:, 1:3])
    assert torch.equal(part.out_residual, plan.out_residual[:, 1:3])
    assert part.out_scale is plan.out_scale


@given(plans(with_weight=True), st.integers(1, 3), seeds)
@settings(max_examples=40, deadline=None)
def test_parts(plan, count, seed):
    """A part has the pairs of its tokens; those over all keys have all pairs of their queries."""
    plan = plan.replace(num_real_keys=plan.num_keys)
    draw, weight = torch.Generator().manual_seed(seed), plan.kv_log_weight
    queries, keys = (torch.randperm(n, generator=draw) for n in oracle.counts(plan))
    queries = queries[: 1 + seed % len(queries)]
    whole, total = oracle.mask(plan)[:, :, queries], 0
    for own in keys.tensor_split(count):
        if not len(own):
            continue
        part = plan.part(queries, own)
        assert torch.equal(oracle.mask(part), whole[..., own])
        assert torch.equal(part.to_dense_mask(), whole[..., own])
        assert weight is None or torch.equal(part.kv_log_weight, weight[..., own])
        total += part.flops(1)
    shown = whole if weight is None else whole & weight.isfinite()[:, :, None]
    assert total == pytest.approx(4 * float(shown.sum((-1, -2)).double().mean()))


@given(plans(), seeds)
@settings(max_examples=30, deadline=None)
def test_keys_seen(plan, seed):
    queries = torch.randperm(plan.num_queries, generator=torch.Generator().manual_seed(seed))
    queries = queries[: 1 + seed % len(queries)]
    expected = torch.zeros(plan.num_keys, dtype=torch.bool)
    lists = oracle.block_mask(plan)
    for row in range(plan.q_blocks.count):
        own = oracle.tokens(plan.q_blocks, oracle.positions(plan.q_blocks, row))
        if np.isin(own, queries).any():
            for block in np.flatnonzero(lists[:, :, row].any((0, 1))):
                at = oracle.positions(plan.kv_blocks, block)
                expected[oracle.tokens(plan.kv_blocks, at)] = True
    assert torch.equal(plan.keys_seen(queries), expected)


def test_a_plan_that_ends_in_more_than_a_softmax_has_no_parts():
    blocks, tokens = even_blocks(8, 4), torch.arange(8)
    plan = random_plan(blocks, blocks, out_scale=torch.ones(1, 1, 2))
    with pytest.raises(ValueError, match="a plan with out_scale has no parts"):
        plan.part(tokens, tokens)
    with pytest.raises(ValueError, match="a plan with 2 summaries has no parts"):
        random_plan(blocks, blocks, num_real_keys=6).part(tokens, tokens)


def test_worklists_are_made_once_per_backend():
    plan, made = Plan.full(10, block_size=4), []

    def make(tensors):
        made.append(tensors)
        return torch.arange(3)

    assert plan.tensors(backend="some").worklist is None
    first = plan.worklist("some", make)
    assert plan.worklist("some", make) is first and len(made) == 1
    assert plan.tensors(backend="some").worklist is first
    assert plan.tensors(backend="other").worklist is None and plan.tensors().worklist is None


def test_tensors_adds_log_weights_and_carries_the_transpose():
    blocks = even_blocks(12, 4)
    plan = random_plan(blocks, blocks, kv_log_weight=torch.ones(1, 1, 12))
    assert plan.tensors().q_indices is None
    assert torch.equal(
        plan.tensors(torch.ones(2, 1, 12)).kv_log_weight, torch.full((2, 1, 12), 2.0)
    )
    plan.transpose()
    assert plan.tensors().q_indices is plan.transpose().q_indices


BLOCKS = even_blocks(12, 4)


def make(
    indices=((0, 1), (1, 2), (2, 0)), count=(2, 2, 2), full=None, q=BLOCKS, kv=BLOCKS, **fields
):
    indices, count = (torch.tensor(x, dtype=torch.int32)[None, None] for x in (indices, count))
    full = count.clone() if full is None else torch.tensor(full, dtype=torch.int32)[None, None]
    return Plan(indices, count, full, q, kv, **fields)


RULE = random_rule(12, 12)
LONG = torch.zeros(1, 1, 3, 1, dtype=torch.int64)
ONES = torch.ones(1, 1, 3, dtype=torch.int32)
COVER = "blocks must cover positions 0..n-1 once each, without holes"
BAD_PLANS = [
    (dict(indices=((0, 1), (1, 3), (2, 0))), "kv_indices must lie in 0..2, found 0..3"),
    (dict(indices=((0, 1), (1, -1), (2, 0))), "kv_indices must lie in 0..2, found -1..2"),
    (
        dict(indices=((0, 1), (2, 2), (2, 0))),
        "query block 1 (batch 0, head 0) lists key block 2 twice",
    ),
    (dict(count=(2, 0, 2)), "query block 1 (batch 0, head 0) sees no key block"),
    (dict(count=(2, 3, 2)), "kv_num_blocks must lie in 0..2, found 2..3"),
    (dict(count=(2, -1, 2)), "kv_num_blocks must lie in 0..2, found -1..2"),
    (dict(full=(2, 3, 2)), "kv_num_full_blocks exceeds kv_num_blocks"),
    (dict(full=(2, -1, 2), rule=RULE), "kv_num_full_blocks must be at least 0, found -1"),
    (dict(full=(2, 1, 2)), "partial blocks need a rule"),
    (
        dict(indices=((0, 1), (1, 2)), count=(2, 2)),
        "kv_indices must be [B|1, H|1, 3, maxK], got [1, 1, 2, 2]",
    ),
    (dict(count=(2, 2)), "kv_num_blocks must be [1, 1, 3] like kv_indices, got [1, 1, 2]"),
    (
        dict(kv_log_weight=torch.zeros(1, 1, 11)),
        "kv_log_weight must be [B|1, H|1, 12], got [1, 1, 11]",
    ),
    (dict(out_scale=torch.ones(1, 3)), "out_scale must be [B|1, H|1, 3], got [1, 3]"),
    (dict(out_scale=torch.tensor([[[1.0, 0, 1]]])), "out_scale must be positive, found 0.0"),
    (
        dict(out_residual=torch.ones(1, 1, 2, 8)),
        "out_residual must be [B|1, H|1, 3, 8], got [1, 1, 2, 8]",
    ),
    (dict(num_real_keys=13), "num_real_keys must lie in 1..12, got 13"),
    (dict(q=make_blocks([0, 4, 9], [4, 4, 3])), "q " + COVER),
    (dict(kv=make_blocks([0, 3, 7], [4, 4, 4])), "kv " + COVER),
    (dict(q=make_blocks([1, 5, 9], [4, 4, 4])), "q " + COVER),
    (dict(q=make_blocks([0, 4, 4], [4, 0, 8])), "all lengths >= 1"),
    (dict(q=make_blocks([0, 4, 8], [4, 8])), "equally many starts and lengths"),
    (
        dict(kv=make_blocks([0, 4, 8], [4] * 3, [0, 0, *range(2, 12)])),
        "kv order must be a permutation of 0..11",
    ),
]


@pytest.mark.parametrize("fields, message", BAD_PLANS, ids=[m for _, m in BAD_PLANS])
def test_bad_plans_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**fields)


def test_lists_must_be_int32():
    with pytest.raises(ValueError, match=r"kv_indices must be int32, got torch\.int64"):
        Plan(LONG, ONES, ONES, BLOCKS, BLOCKS)


def test_every_fault_is_named_at_once():
    with pytest.raises(ValueError, match=r"lists key block 0 twice; .*num_real_keys"):
        make(((0, 0), (1, 2), (2, 0)), num_real_keys=0)


def test_unused_slots_may_hold_anything():
    plan = make(((0, 99), (1, 1), (2, -7)), count=(1, 1, 1))
    assert torch.equal(plan.to_block_mask()[0, 0], torch.eye(3, dtype=torch.bool))


def test_bad_metric():
    with pytest.raises(ValueError, match="metric must be one of disc, raster, got 'square'"):
        TokenRule.from_layout(Layout.image(2, 2), "square", [1])
