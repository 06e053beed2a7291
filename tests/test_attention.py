"""attend: the reference against the written formulas, and what it does with bad input."""

import re

import numpy as np
import oracle
import pytest
import torch
from random_plans import even_blocks, ragged_blocks, random_plan, random_rule, results

from dittfast import Layout, attend, methods
from dittfast.attention import BACKENDS, choose_backend, method_attention
from dittfast.plan import Plan
from dittfast.testing import assert_within_budget, attention_inputs, eager_attention

# Most of a kernel's time in the interpreter is its patching.
pytestmark = pytest.mark.usefixtures("quick_interpreter")

SIZES = [1, 63, 111, 390]
BLOCKS = even_blocks(8, 4)


def check_reference(plan, batch=2, heads=3, head_dim=8, weight=None, scale=0.3):
    inputs = attention_inputs(
        batch, heads, plan.num_queries, head_dim, plan.num_keys, torch.float64
    )
    leaves = [x.requires_grad_() for x in inputs[:3]]
    epilogue = [x for x in (plan.out_scale, plan.out_residual) if x is not None]
    leaves += [x.requires_grad_() for x in epilogue]
    out, lse = oracle.attention(*leaves[:3], plan, weight, scale)
    found, found_lse = attend(
        *leaves[:3], plan, kv_log_weight=weight, scale=scale, return_lse=True, backend="reference"
    )
    torch.testing.assert_close(found, out)
    torch.testing.assert_close(found_lse, lse)
    seen = lse != -torch.inf
    grads = (
        torch.autograd.grad(
            (a * inputs[3]).sum() + b[seen].square().sum(), leaves, retain_graph=True
        )
        for a, b in ((found, found_lse), (out, lse))
    )
    for actual, expected in zip(*grads):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("num_tokens", SIZES)
def test_reference_is_the_formula(num_tokens):
    blocks = ragged_blocks(num_tokens, 32, 1, shuffle=True)
    rule = random_rule(num_tokens, num_tokens)
    check_reference(random_plan(blocks, blocks, rule=rule), heads=1, batch=1)


@pytest.mark.parametrize("lists", [(1, 1), (2, 1), (1, 3), (2, 3)], ids=str)
def test_reference_takes_lists_weights_and_epilogue_of_any_shape(lists):
    q_blocks = ragged_blocks(30, 8, 2, shuffle=True)
    weight = torch.randn(*lists, 41, dtype=torch.float64)
    weight[..., ::5] = -torch.inf
    fields = {
        "out_scale": torch.rand(*lists, q_blocks.count, dtype=torch.float64) + 0.5,
        "out_residual": torch.randn(*lists, q_blocks.count, 8, dtype=torch.float64),
    }
    fields["kv_log_weight"] = torch.randn(*lists, 41)  # the sum is not rounded to fp32
    plan = random_plan(q_blocks, ragged_blocks(41, 8, 3), lists, random_rule(30, 41), **fields)
    check_reference(plan, weight=weight)


def test_reference_where_a_query_sees_nothing():
    plan = Plan.from_block_mask(torch.eye(2, dtype=torch.bool), BLOCKS, BLOCKS)
    weight = torch.zeros(1, 1, 8)
    weight[..., :4] = -torch.inf
    check_reference(plan, weight=weight)


def test_reference_gradients_by_finite_differences():
    blocks = ragged_blocks(9, 4, 4)
    fields = {"out_scale": torch.rand(1, 1, blocks.count, dtype=torch.float64) + 0.5}
    plan = random_plan(blocks, blocks, (1, 2), random_rule(9, 9), **fields)
    q, k, v, _ = attention_inputs(1, 2, 9, 3, dtype=torch.float64)

    def function(q, k, v, out_scale):
        plan_ = plan.replace(out_scale=out_scale)
        return attend(q, k, v, plan_, return_lse=True, backend="reference")

    leaves = [x.requires_grad_() for x in (q, k, v, plan.out_scale)]
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_full_plan_is_dense_attention(backend, dtype):
    q, k, v, _ = attention_inputs(1, 2, 63, 16, dtype=dtype)
    plan = Plan.full(63, block_size=16)
    out = attend(q, k, v, plan, backend=backend)
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    eager = eager_attention(q, k, v, torch.ones(63, 63, dtype=torch.bool), 0.25)
    assert_within_budget("out", out, exact, eager)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("epilogue", [False, True])
def test_a_rule_that_hides_everything(backend, epilogue):
    """No query sees a key: out is 0, or the residual, lse is -inf and nothing has a gradient."""
    blocks = even_blocks(20, 8)
    fields = {"out_scale": torch.full((1, 1, 3), 2.0), "out_residual": torch.randn(1, 1, 3, 16)}
    fields = {"rule": random_rule(20, 20, keeps=False), **(fields if epilogue else {})}
    rows, cols = np.indices((3, 3)).reshape(2, -1)
    plan = Plan.from_lists(rows, cols, np.zeros(9, dtype=bool), blocks, blocks, **fields)
    found = results(*attention_inputs(1, 2, 20, 16), torch.ones(1, 2, 20), plan, backend)
    expected = torch.zeros(1, 2, 20, 16)
    if epilogue:
        expected = expected + oracle.row_values(plan.out_residual, plan.q_blocks)
    assert torch.equal(found["out"], expected)
    assert bool((found["lse"] == -torch.inf).all())
    assert all(float(found[name].abs().max()) == 0 for name in ("dq", "dk", "dv"))


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_an_empty_batch(backend):
    leaves = [torch.zeros(0, 2, 20, 16, requires_grad=True) for _ in range(3)]
    blocks = even_blocks(20, 8)
    out, lse = attend(*leaves, random_plan(blocks, blocks), return_lse=True, backend=backend)
    assert out.shape == (0, 2, 20, 16) and lse.shape == (0, 2, 20)
    (out.sum() + lse.sum()).backward()
    assert all(x.grad.shape == x.shape for x in leaves)
    run = lambda q: attend(q, q, q, Plan.full(20), backend=backend)  # noqa: E731
    assert torch.func.jvp(run, (leaves[0].detach(),), (leaves[0].detach(),))[1].shape == out.shape


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_grouped_query_attention(backend):
    q, _, _, grad = attention_inputs(2, 6, 63, 16)
    k, v, _, _ = attention_inputs(2, 2, 63, 16, seed=1)
    blocks = ragged_blocks(63, 16, 5)
    plan = random_plan(blocks, blocks, (1, 6))
    mask = oracle.mask(plan)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    wide = leaves[0], *(x.repeat_interleave(3, 1) for x in leaves[1:])
    exact = eager_attention(*wide, mask, 0.25)
    expected = [exact, *torch.autograd.grad(exact, leaves, grad.double())]
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attend(*leaves, plan, backend=backend)
    actual = [out, *torch.autograd.grad(out, leaves, grad)]
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-5)


def test_a_full_plan_with_a_weight_is_not_dense():
    """What the plan hides stays hidden where PyTorch's own attention could run a full plan."""
    q, k, v, _ = attention_inputs(1, 2, 8, 16)
    weight = torch.tensor([0.0, 1, -torch.inf, 2, 0, -torch.inf, 3, 0])[None, None]
    plan = Plan.full(8, block_size=4).replace(kv_log_weight=weight)
    expected, _ = oracle.attention(q.double(), k.double(), v.double(), plan)
    torch.testing.assert_close(attend(q, k, v, plan), expected.float())
    assert not plan.is_dense
    assert Plan.full(8, block_size=4).is_dense


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_what_comes_back(backend):
    q, k, v, _ = attention_inputs(1, 2, 8, 16, dtype=torch.float16)
    plan = Plan.full(8, block_size=4)
    out = attend(q, k, v, plan, backend=backend)
    again, lse = attend(q, k, v, plan, return_lse=True, scale=16**-0.5, backend=backend)
    assert torch.equal(out, again)
    assert out.dtype == torch.float16 and out.shape == q.shape
    assert lse.dtype == torch.float32 and lse.shape == (1, 2, 8)
    logits = q.double() @ k.double().mT / 4
    torch.testing.assert_close(lse.double(), torch.logsumexp(logits, -1), rtol=1e-4, atol=1e-4)


def test_only_what_needs_a_gradient_gets_one():
    q, k, v, _ = attention_inputs(1, 1, 8, 16)
    plan = Plan.full(8, block_size=4)
    assert not attend(q, k, v, plan).requires_grad
    v.requires_grad_()
    attend(q, k, v, plan).sum().backward()
    assert v.grad is not None and q.grad is None


def test_auto_chooses_by_device():
    runs = BACKENDS["native"]().unavailable() is None
    assert choose_backend(torch.device("cpu")) == ("native" if runs else "cpu")
    assert choose_backend(torch.device("cpu"), torch.float64) == "cpu"
    assert choose_backend(torch.device("cuda", 1)) == "triton"
    q, k, v, _ = attention_inputs(1, 1, 30, 16)
    plan = methods.Local(2).plan(Layout.image(5, 6))
    for dtype in (torch.float32, torch.float64):
        name = choose_backend(q.device, dtype)
        inputs = [x.to(dtype) for x in (q, k, v)]
        assert torch.equal(attend(*inputs, plan), attend(*inputs, plan, backend=name))


def test_method_scales_reach_every_backend():
    layout = Layout.image(6, 7)
    q, k, v, _ = attention_inputs(1, 1, 42, 16)
    plan = methods.Local(3).plan(layout)
    expected = eager_attention(q, k, v, plan.to_dense_mask(), 0.7)
    for backend in ("reference", "cpu"):
        out = attend(q, k, v, plan, scale=0.7, backend=backend)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def tensors(q=(1, 2, 8, 16), k=(1, 2, 8, 16), v=None, dtype=torch.float32, k_dtype=None):
    v = k if v is None else v
    return (
        torch.zeros(q, dtype=dtype),
        torch.zeros(k, dtype=k_dtype or dtype),
        torch.zeros(v, dtype=dtype),
    )


PLAN = Plan.full(8, block_size=4)
WEIGHT = torch.zeros(3, 1, 8)
PER_HEAD = random_plan(BLOCKS, BLOCKS, (1, 3))
RESIDUAL = torch.ones(1, 4, 2, 16)
BAD_CALLS = [
    (tensors(q=(2, 8, 16)), PLAN, {}, "q must be [B, H, N, D], got shape [2, 8, 16]"),
    (
        tensors(k_dtype=torch.float64),
        PLAN,
        {},
        "q, k, v must agree in dtype and device: q is torch.float32 on cpu, k is torch.float64",
    ),
    (
        tensors(k=(1, 0, 8, 16)),
        PLAN,
        {},
        "k needs at least one head, token and channel, got shape [1, 0, 8, 16]",
    ),
    (tensors(q=(1, 2, 8, 0)), PLAN, {}, "q needs at least one head, token and channel"),
    (tensors(dtype=torch.int32), PLAN, {}, "needs floating-point tensors, got torch.int32"),
    (
        tensors(v=(1, 2, 8, 8)),
        PLAN,
        {},
        "k and v must have one shape, got [1, 2, 8, 16] and [1, 2, 8, 8]",
    ),
    (tensors(k=(1, 2, 8, 8)), PLAN, {}, "q and k must agree in batch and head dim"),
    (tensors(k=(2, 2, 8, 16)), PLAN, {}, "q and k must agree in batch and head dim"),
    (tensors(q=(1, 3, 8, 16)), PLAN, {}, "3 query heads are no multiple of 2 key heads"),
    (tensors(q=(1, 2, 9, 16)), PLAN, {}, "the plan is for 8 queries and 8 keys, got 9 and 8; "),
    (tensors(k=(1, 2, 7, 16)), PLAN, {}, "the plan is for 8 queries and 8 keys, got 8 and 7; "),
    (
        tensors(),
        PER_HEAD,
        {},
        "kv_indices is for batch 1 and 3 heads, which does not broadcast to batch 1 and 2 heads",
    ),
    (tensors(), PLAN, {"kv_log_weight": WEIGHT}, "kv_log_weight is for batch 3 and 1 heads"),
    (
        tensors(),
        PLAN,
        {"kv_log_weight": WEIGHT[:1, :, :7]},
        "kv_log_weight must be [B|1, H|1, 8], got [1, 1, 7]",
    ),
    (
        tensors(),
        PLAN.replace(out_scale=torch.ones(2, 1, 2)),
        {},
        "out_scale is for batch 2 and 1 heads",
    ),
    (tensors(), PLAN.replace(out_residual=RESIDUAL), {}, "out_residual is for batch 1 and 4 heads"),
    (
        tensors(),
        PLAN.replace(out_residual=RESIDUAL[:, :1, :, :8]),
        {},
        "out_residual has 8 channels, the head dim is 16",
    ),
    (tensors(), PLAN.replace(kv_log_weight=WEIGHT), {}, "plan.kv_log_weight is for batch 3"),
    (
        tensors(),
        PLAN,
        {"backend": "gpu"},
        "backend must be auto, triton, native, cpu, flex, flash4, cudnn, flashinfer, reference; "
        "got 'gpu'",
    ),
]


@pytest.mark.parametrize("inputs, plan, options, message", BAD_CALLS, ids=[c[3] for c in BAD_CALLS])
def test_bad_calls_are_refused(inputs, plan, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        attend(*inputs, plan, **options)


def test_a_named_backend_says_all_that_is_in_its_way(monkeypatch):
    class Stubborn:
        @staticmethod
        def not_supported_reasons(q, k, v):
            return ["it is Monday", "it rains"]

    monkeypatch.setitem(BACKENDS, "stubborn", lambda: Stubborn)
    with pytest.raises(ValueError, match="the stubborn backend cannot run this: it is Monday; it"):
        attend(*tensors(), PLAN, backend="stubborn")


def test_forms_of_results_agree_with_each_other():
    """The helper that the backends' tests compare with: the oracle equals the formula there too."""
    plan = random_plan(BLOCKS, BLOCKS, rule=random_rule(8, 8))
    inputs = attention_inputs(1, 1, 8, 4, dtype=torch.float64)
    found = results(*inputs, None, plan, "reference")
    out, lse = oracle.attention(*inputs[:3], plan, None, 0.5)
    torch.testing.assert_close(found["out"], out)
    torch.testing.assert_close(found["lse"], lse)


@pytest.mark.parametrize(
    "method",
    [
        methods.LogLinear(block_size=16, topk=4, levels=2),
        methods.Rectified(block_size=16, topk=4, top_p=0.3),
        methods.Sol(block_size=16, tail="query"),
    ],
    ids=lambda method: method.name,
)
def test_autocast_does_not_round_the_scores_that_choose_blocks(method):
    """Blocks whose scores are bf16 neighbours: rounded, others would be chosen."""
    layout = Layout.image(40, 40, text=5)
    shape = (1, 2, layout.num_tokens, 32)
    q, k, v = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(3))
    expected = method_attention(method, layout, q, k, v, backend="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        found = method_attention(method, layout, q, k, v, backend="cpu")
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing_inside(backend, dtype):
    """A caller's autocast must not round masks and sums that a backend computes in fp32."""
    layout = Layout.image(21, 23, text=7)
    plan = methods.Local(window=5).plan(layout)
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2, layout.num_tokens, 16)

    def run(autocast: bool):
        inputs = [
            torch.randn(shape, generator=generator.manual_seed(i)).to(dtype).requires_grad_()
            for i in range(3)
        ]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = attend(*inputs, plan, backend=backend)
            return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]

    for a, b in zip(run(False), run(True)):
        assert torch.equal(a, b)
