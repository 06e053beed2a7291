"""The CPU backend against the dense fp64 oracle."""

import numpy as np
import pytest
import torch
from random_plans import (
    assert_matches_oracle,
    even_blocks,
    op_arguments,
    ragged_blocks,
    random_plan,
    random_rule,
    random_tail,
    results,
)

from dittfast import Layout, attend
from dittfast.attention import not_supported_reasons
from dittfast.kernels import cpu, cpu_worklist
from dittfast.kernels.cpu_worklist import Worklist, make_worklist
from dittfast.layout import make_blocks
from dittfast.plan import Plan, TokenRule, dense_mask
from dittfast.testing import attention_inputs

pytestmark = pytest.mark.usefixtures("nan_empty")


def test_an_order_whose_ends_look_like_a_run_of_tokens():
    # The first block holds tokens 0, 5, 6, 3 and not 0, 1, 2, 3.
    order = torch.tensor([0, 5, 6, 3, 1, 2, 4, 7])
    kv_blocks = even_blocks(8, 4)._replace(order=order.int())
    mask = torch.tensor([[True, False]])
    assert_matches_oracle(Plan.from_block_mask(mask, even_blocks(16, 16), kv_blocks), "cpu")


def test_a_block_over_more_frames_than_are_looked_at():
    """Blocks of 12 frames; a key of the twelfth is seen by the last frames of its block alone."""
    layout = Layout.video(24, 1, 2)
    rule = TokenRule.from_layout(layout, "disc", [1, 1, -1])
    blocks = layout.blocks(24)
    assert cpu_worklist._MOST_FRAMES < 12
    rows, cols = np.indices((2, 2)).reshape(2, -1)
    partial = np.zeros(4, dtype=bool)
    assert_matches_oracle(Plan.from_lists(rows, cols, partial, blocks, blocks, rule=rule), "cpu")


def test_lists_that_do_not_rise():
    """Key blocks 0, 5, 2 of one key each: the ends of a run, and none."""
    one = lambda *rows: torch.tensor([[rows]], dtype=torch.int32)  # noqa: E731
    blocks = even_blocks(6, 1)
    lists, count = one(*([0, 5, 2],) * 6), one(*(3,) * 6)
    assert_matches_oracle(Plan(lists, count, count, blocks, blocks), "cpu")
    # Blocks of two keys, listed back to front: 4 5, 0 1, 2 3, 6 7.
    kv_blocks = make_blocks([4, 0, 2, 6], [2, 2, 2, 2])
    plan = Plan(one([0, 1, 2, 3]), one(4), one(4), even_blocks(8, 8), kv_blocks)
    assert_matches_oracle(plan, "cpu")


def test_log_weights_of_plan_and_call_add_up():
    blocks = even_blocks(96, 32)
    plan = random_plan(blocks, blocks, kv_log_weight=torch.rand(1, 1, 96))
    assert_matches_oracle(plan, "cpu", kv_log_weight=torch.rand(1, 1, 96))


def test_everything_at_once():
    q_blocks = ragged_blocks(130, 24, 12, shuffle=True)
    weight = torch.randn(2, 1, 150)
    weight[..., 140:] = -torch.inf
    plan = random_plan(
        q_blocks,
        ragged_blocks(150, 48, 13, shuffle=True),
        (2, 3),
        random_rule(130, 150, sink_frames=1),
        out_scale=torch.rand(1, 3, q_blocks.count) + 0.5,
        out_residual=torch.randn(2, 1, q_blocks.count, 20),
    )
    assert_matches_oracle(plan, "cpu", batch=2, heads=3, head_dim=20, kv_log_weight=weight)


@pytest.mark.parametrize("threads", [1, 2])
def test_runs_are_bit_identical(threads):
    blocks = ragged_blocks(390, 32, 16)
    plan = random_plan(blocks, blocks, rule=random_rule(390, 390))
    inputs = attention_inputs(1, 3, 390, 16)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, second = (results(*inputs, torch.ones(1, 3, 390), plan, "cpu") for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(first[name], second[name]) for name in first)


def _arguments(plan):
    q, k, v, _ = attention_inputs(1, 2, plan.num_queries, 16, plan.num_keys)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    return op_arguments(q, k, v, plan, 0.25)


@pytest.mark.parametrize("with_ends", [False, True])
def test_opcheck(with_ends):
    blocks = ragged_blocks(40, 16, 17)
    fields = {}
    if with_ends:
        fields = {
            "out_scale": torch.rand(1, 1, blocks.count) + 0.5,
            "out_residual": torch.rand(1, 2, blocks.count, 16),
            **random_tail(blocks, 16, "any"),
        }
    plan = random_plan(blocks, blocks, rule=random_rule(40, 40), **fields)
    torch.library.opcheck(torch.ops.dittfast.attend_cpu.default, _arguments(plan))


@pytest.mark.parametrize("prepared", [False, True])
def test_compiles_in_one_graph(prepared):
    blocks = ragged_blocks(63, 16, 18)
    plan = random_plan(blocks, blocks, rule=random_rule(63, 63))
    inputs = [x.requires_grad_() for x in attention_inputs(1, 2, 63, 16)[:3]]

    def step(q, k, v):
        return attend(q, k, v, plan, return_lse=True, backend="cpu")

    def gradients(function):
        out, lse = function(*inputs)
        return torch.autograd.grad(out.square().sum() + lse.sum(), inputs)

    if prepared:
        plan.worklist("cpu", make_worklist)
    torch._dynamo.reset()
    actual = gradients(torch.compile(step, fullgraph=True, backend="aot_eager"))
    for a, b in zip(actual, gradients(step)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("lists", [(1, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("with_rule", [False, True], ids=["full", "partial"])
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_worklist_covers_every_pair_once(lists, with_rule, cut, monkeypatch):
    # Small bounds, so that tables are cut and groups are formed at this size.
    if cut:
        monkeypatch.setattr(cpu_worklist, "_TABLE_CELLS", 4000)
    monkeypatch.setattr(cpu_worklist, "_GROUP_ROWS", 128)
    monkeypatch.setattr(cpu_worklist, "_LEAST_SHARED_KEYS", 8)
    rule = random_rule(390, 300, frames=2) if with_rule else None
    q_blocks, kv_blocks = ragged_blocks(390, 16, 19), ragged_blocks(300, 32, 20, shuffle=True)
    plan = random_plan(q_blocks, kv_blocks, lists, rule, density=0.8)
    t = plan.tensors()
    work = Worklist.unpack(make_worklist(t))
    rows = work.rows.long() if work.rows.numel() else torch.arange(390)
    times = torch.zeros(*lists, 390, 300, dtype=torch.int64)
    at, sizes = 0, set()
    for call in work.calls:
        keys = work.positions[at : at + call.count * call.keys].view(call.count, -1).long()
        at += keys.numel()
        sizes.add(call.rows)
        for i, columns in enumerate(keys):
            if call.scattered:
                queries = rows[work.scattered[call.start :][: call.rows].long()]
            else:
                queries = rows[call.start + i * call.rows :][: call.rows]
            kept = torch.ones(queries.numel(), columns.numel(), dtype=torch.int64)
            if call.partial:
                kept = rule.keep(queries[:, None], columns[None]).long()
            times[call.batch, call.head, queries[:, None], columns] += kept
    assert at == work.positions.numel()
    assert max(sizes) > 32  # blocks were grouped
    assert cut or with_rule or any(call.scattered for call in work.calls)
    mask = dense_mask(t._replace(q_order=None, kv_order=None), 390, 300)
    assert torch.equal(times, mask.long())


def frames_plan(frames, places):
    """Block ``(frame, place)`` sees the same place and its neighbours in every frame."""
    place = torch.arange(frames * places) % places
    apart = (place[:, None] - place).abs()
    blocks = even_blocks(frames * places * 12, 12)
    return Plan.from_block_mask(apart <= 1, blocks, blocks)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_blocks_far_apart_share_a_call(weighted, monkeypatch):
    monkeypatch.setattr(cpu_worklist, "_GROUP_ROWS", 64)
    monkeypatch.setattr(cpu_worklist, "_LEAST_SHARED_KEYS", 8)
    plan = frames_plan(8, 6)
    calls = Worklist.unpack(make_worklist(plan.tensors())).calls
    scattered = sum(call.rows * call.count * call.keys for call in calls if call.scattered)
    assert scattered > 0.9 * plan.density * plan.num_queries**2
    weight = None
    if weighted:
        weight = torch.randn(2, 3, plan.num_keys, generator=torch.Generator().manual_seed(0))
    assert_matches_oracle(plan, "cpu", batch=2, heads=3, kv_log_weight=weight)


def test_bias_is_bounded(monkeypatch):
    monkeypatch.setattr(cpu, "_BIAS_VALUES", 1000)
    blocks = ragged_blocks(200, 64, 21)
    assert_matches_oracle(random_plan(blocks, blocks, rule=random_rule(200, 200)), "cpu")


def test_refuses_what_it_cannot_run():
    q = torch.zeros(1, 1, 8, 16, device="meta", dtype=torch.float8_e4m3fn)
    assert not_supported_reasons("cpu", q, q, q, Plan.full(8, block_size=4)) == [
        "it runs on cpu, got tensors on meta",
        "it computes float64, float32, float16, bfloat16, got float8_e4m3fn",
    ]
    with pytest.raises(ValueError, match="the cpu backend cannot run this: it runs on cpu, got"):
        attend(q, q, q, Plan.full(8, block_size=8), backend="cpu")
