"""Plans of every kind on each CPU backend, against the dense fp64 oracle."""

import pytest
import torch
from random_plans import (
    VIEWS,
    assert_matches_oracle,
    even_blocks,
    ragged_blocks,
    random_plan,
    random_rule,
    results,
)

from dittfast import Layout, attend, methods
from dittfast.plan import METRICS, Plan, TokenRule
from dittfast.testing import attention_inputs

pytestmark = pytest.mark.usefixtures("nan_empty")
DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
}
BACKENDS = ("cpu", "native")
EACH = pytest.mark.parametrize("backend", BACKENDS)
# The native kernel hands fp64 to the other one.
EACH_DTYPE = pytest.mark.parametrize(
    "backend, dtype",
    [
        pytest.param(backend, dtype, id=f"{backend}-{name}")
        for backend in BACKENDS
        for name, dtype in DTYPES.items()
        if (backend, name) != ("native", "fp64")
    ],
)


@EACH_DTYPE
@pytest.mark.parametrize("num_tokens", [1, 63, 111, 390, 1000])
def test_sizes_and_dtypes(backend, num_tokens, dtype):
    blocks = ragged_blocks(num_tokens, 64, seed=num_tokens)
    assert_matches_oracle(random_plan(blocks, blocks), backend, dtype=dtype, head_dim=32)


@EACH_DTYPE
@pytest.mark.parametrize("size", [1.0, 4.0, 16.0])
def test_input_scales(backend, size, dtype):
    blocks = even_blocks(192, 64)
    plan = random_plan(blocks, blocks, rule=random_rule(192, 192))
    assert_matches_oracle(plan, backend, dtype=dtype, size=size, head_dim=64)


@EACH
@pytest.mark.parametrize("head_dim", [1, 8, 15, 16, 64, 80, 256])
def test_head_dims(backend, head_dim):
    plan = random_plan(ragged_blocks(63, 16, 1), ragged_blocks(70, 32, 2))
    assert_matches_oracle(plan, backend, head_dim=head_dim)


@EACH
@pytest.mark.parametrize("lists", [(1, 1), (2, 1), (1, 3), (2, 3)], ids=str)
@pytest.mark.parametrize("with_rule", [False, True], ids=["full", "partial"])
def test_lists_per_batch_row_and_per_head(backend, lists, with_rule):
    rule = random_rule(111, 111) if with_rule else None
    blocks = ragged_blocks(111, 32, 3)
    assert_matches_oracle(random_plan(blocks, blocks, lists, rule), backend, batch=2, heads=3)


@EACH
@pytest.mark.parametrize("sizes", [(1, 1), (1, 50), (50, 1), (16, 128), (300, 7)], ids=str)
def test_block_sizes(backend, sizes):
    plan = random_plan(ragged_blocks(300, sizes[0], 4), ragged_blocks(200, sizes[1], 5))
    assert_matches_oracle(plan, backend, heads=1)


@EACH
@pytest.mark.parametrize("sides", ["q", "kv", "both"])
def test_orders(backend, sides):
    q_blocks = ragged_blocks(90, 32, 6, shuffle=sides != "kv")
    kv_blocks = ragged_blocks(111, 32, 7, shuffle=sides != "q")
    assert_matches_oracle(random_plan(q_blocks, kv_blocks, (1, 2)), backend)


@EACH
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("frames", [1, 3, 20])
def test_token_rule_anywhere(backend, metric, frames):
    rule = random_rule(90, 130, metric, frames, sink_frames=frames // 3)
    blocks = ragged_blocks(90, 32, 8), ragged_blocks(130, 64, 9, shuffle=True)
    assert_matches_oracle(random_plan(*blocks, rule=rule), backend)


@EACH
def test_rule_of_distances_beyond_what_fp32_counts_exactly(backend):
    # 70000² is no fp32 number, and neighbours in distance lie on both sides of the limit.
    place = torch.arange(0, 70_001, 350, dtype=torch.int32)
    frame = torch.zeros_like(place)
    limit = torch.tensor([35_000], dtype=torch.int32)
    rule = TokenRule("raster", limit, frame, place, frame, place + 1)
    blocks = even_blocks(place.numel(), 32)
    assert_matches_oracle(random_plan(blocks, blocks, rule=rule), backend)


PATTERNS = {
    "radial": (methods.Radial(0.5, 16), Layout.video(5, 6, 7, text=9)),
    "radial paper": (methods.Radial(block_size=16, variant="paper"), Layout.video(9, 5, 6)),
    "local": (methods.Local(3, tile=(1, 4, 8)), Layout.image(21, 30, text=13)),
    "local, large tiles": (methods.Local(4), Layout.image(22, 27, text=9)),
    "local summaries": (methods.Local(4, downsample=3, tile=(1, 4, 4)), Layout.image(14, 16)),
    "local video": (methods.Local(2, frame_window=2, tile=(2, 4, 4)), Layout.video(4, 9, 9)),
    "padded text": (methods.Local(3), Layout.image(9, 12, text=8, text_lengths=[3, 8])),
}


@EACH
@pytest.mark.parametrize("name", PATTERNS)
def test_methods(backend, name):
    method, layout = PATTERNS[name]
    assert_matches_oracle(method.plan(layout), backend, batch=2, head_dim=32)


@EACH
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 3), (2, 3)], ids=str)
@pytest.mark.parametrize("with_rule", [False, True], ids=["full", "partial"])
def test_log_weight(backend, shape, with_rule):
    weight = torch.randn(*shape, 111)
    weight[..., ::7] = -torch.inf
    blocks = ragged_blocks(111, 32, 10, shuffle=True)
    rule = random_rule(111, 111) if with_rule else None
    plan = random_plan(blocks, blocks, rule=rule, kv_log_weight=torch.rand(1, 1, 111))
    assert_matches_oracle(plan, backend, batch=2, heads=3, kv_log_weight=weight)


@EACH_DTYPE
@pytest.mark.parametrize("hidden_by", ["weight", "rule"])
def test_queries_that_see_nothing(backend, hidden_by, dtype):
    blocks = even_blocks(96, 32)
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[0, 1:] = False
    plan, weight = Plan.from_block_mask(mask, blocks, blocks), None
    if hidden_by == "weight":
        weight = torch.zeros(1, 1, 96)
        weight[..., :32] = -torch.inf
    else:
        place = torch.arange(96, dtype=torch.int32)
        frame, never = torch.zeros_like(place), torch.tensor([-1], dtype=torch.int32)
        rule = TokenRule("raster", never, frame, place, frame, place)
        full = torch.tensor([[[0, 3, 3]]], dtype=torch.int32)
        plan = plan.replace(rule=rule, kv_num_full_blocks=full)
    found = assert_matches_oracle(plan, backend, dtype=dtype, kv_log_weight=weight)
    assert bool((found["lse"][:, :, :32] == -torch.inf).all())
    assert float(found["out"][:, :, :32].abs().max()) == 0
    assert float(found["dq"][:, :, :32].abs().max()) == 0


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3)], ids=str)
def test_epilogue(backend, shape, dtype):
    blocks = ragged_blocks(111, 32, 11, shuffle=True)
    plan = random_plan(
        blocks,
        blocks,
        out_scale=torch.rand(*shape, blocks.count) + 0.5,
        out_residual=torch.randn(*shape, blocks.count, 16),
    )
    for epilogue in (plan, plan.replace(out_residual=None), plan.replace(out_scale=None)):
        assert_matches_oracle(epilogue, backend, batch=2, heads=3, dtype=dtype)


@EACH
def test_without_a_gradient_of_lse_and_with_a_negative_scale(backend):
    blocks = even_blocks(96, 32)
    plan = random_plan(blocks, blocks)
    assert_matches_oracle(plan, backend, with_lse=False)
    assert_matches_oracle(plan, backend, scale=-2.0)


@EACH_DTYPE
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strided_inputs(backend, view, dtype):
    blocks = ragged_blocks(63, 16, 14)
    plan = random_plan(blocks, blocks, (2, 2))
    assert_matches_oracle(plan, backend, batch=2, view=view, dtype=dtype)


@EACH
def test_output_keeps_the_memory_order_of_the_queries(backend):
    q, k, v, _ = attention_inputs(2, 3, 40, 16)
    for view in VIEWS.values():
        out = attend(view(q), view(k), view(v), Plan.full(40, block_size=16), backend=backend)
        assert out.stride() == torch.empty_like(view(q)).stride()


@EACH
def test_inputs_are_left_alone(backend):
    blocks = ragged_blocks(63, 16, 15, shuffle=True)
    plan = random_plan(blocks, blocks, kv_log_weight=torch.zeros(1, 1, 63))
    inputs = attention_inputs(1, 2, 63, 16)
    before = [x.clone() for x in inputs]
    results(*inputs, torch.ones(1, 2, 63), plan, backend)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before))
