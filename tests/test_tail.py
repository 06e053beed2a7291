"""The tail of a plan: one key more for what a query does not list. Oracle: dense fp64 attention."""

import re

import oracle
import pytest
import torch
from random_plans import (
    TAILS,
    assert_matches_oracle,
    even_blocks,
    ragged_blocks,
    random_plan,
    random_rule,
    random_tail,
    results,
)
from test_waits import watched

import dittfast
from dittfast import Capabilities, Plan, attend
from dittfast.attention import BACKENDS, not_supported_reasons
from dittfast.kernels import epilogue, tail
from dittfast.kernels.capabilities import LACKS
from dittfast.measure.check import check_against_dense, detached
from dittfast.testing import attention_inputs

pytestmark = pytest.mark.usefixtures("nan_empty")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def tailed(per="block", lists=(1, 1), shared=((1, 1), (1, 1)), dim=16, n=(111, 130), **fields):
    blocks = ragged_blocks(n[0], 24, 3, shuffle=True), ragged_blocks(n[1], 32, 4, shuffle=True)
    fields |= random_tail(blocks[0], dim, per, shared, 5)
    return random_plan(*blocks, lists, random_rule(*n), seed=6, **fields)


@pytest.mark.parametrize(
    "backend, per",
    [*((name, per) for name in ("reference", "cpu", "native") for per in TAILS), ("triton", "any")],
)
def test_every_backend(backend, per):
    small = {"n": (20, 30)} if backend == "triton" else {}
    plan = tailed(per, (2, 2), ((2, 1), (1, 2)), **small)
    assert bool((plan.kv_num_blocks == 0).any())
    dtype = torch.float64 if backend in ("reference", "cpu") else torch.float32
    found = assert_matches_oracle(plan, backend, batch=2, dtype=dtype)
    assert bool((found["lse"] == -torch.inf).any()) and set(found) >= {"dtail_lse", "dtail_value"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["cpu", "native"])
@pytest.mark.parametrize("size", [1.0, 4.0])
def test_precision(backend, dtype, size):
    assert_matches_oracle(tailed(), backend, dtype=DTYPES[dtype], size=size)


@pytest.mark.parametrize("backend", ["reference", "cpu", "native"])
def test_the_epilogue_comes_after_it(backend):
    blocks = ragged_blocks(111, 24, 3, shuffle=True)
    fields = {
        "out_scale": torch.rand(1, 2, blocks.count) + 0.5,
        "out_residual": 10 * torch.randn(2, 1, blocks.count, 16),
    }
    for left_out in (None, *fields):
        plan = tailed(**{**fields, left_out: None} if left_out else fields)
        assert_matches_oracle(plan, backend, batch=2)


@pytest.mark.parametrize("backend", ["reference", "cpu", "native"])
def test_nothing_but_tails(backend):
    blocks, n = even_blocks(40, 8), torch.zeros(1, 1, 5, dtype=torch.int32)
    ends = {"tail_lse": torch.randn(1, 1, 5), "tail_value": torch.randn(1, 1, 5, 16)}
    plan = Plan(n[..., None], n, n, blocks, blocks, **ends)
    q, k, v, grad = attention_inputs(1, 2, 40, 16)
    found = results(q, k, v, grad, torch.ones(1, 2, 40), plan, backend)
    block = torch.arange(40) // 8
    assert torch.equal(found["out"], plan.tail_value[:, :, block].expand(1, 2, 40, 16))
    assert torch.equal(found["lse"], plan.tail_lse[:, :, block].expand(1, 2, 40))
    assert not any(bool(found[name].any()) for name in ("dq", "dk", "dv"))
    torch.testing.assert_close(found["dtail_value"], grad.view(1, 2, 5, 8, 16).sum((1, 3))[:, None])
    torch.testing.assert_close(found["dtail_lse"], torch.full((1, 1, 5), 16.0))


def test_a_tail_is_the_key_that_it_stands_for():
    """One key more, seen by every query, whose logit does not depend on the query."""
    blocks = ragged_blocks(60, 16, 1)
    mask = torch.rand(blocks.count, blocks.count) < 0.5
    mask[:, 0] = True
    q, k, v, _ = attention_inputs(1, 2, 60, 16, dtype=torch.float64)
    q[..., 0], k[..., 0] = 1, 0
    value, lse = torch.randn(1, 2, 1, 16, dtype=torch.float64), 1.5
    more = torch.zeros(1, 2, 1, 16, dtype=torch.float64)
    more[..., 0] = lse / 0.25
    longer = blocks._replace(
        starts=torch.cat([blocks.starts, torch.tensor([60], dtype=torch.int32)]),
        lengths=torch.cat([blocks.lengths, torch.tensor([1], dtype=torch.int32)]),
    )
    seen = torch.nn.functional.pad(mask, (0, 1), value=True)
    keyed = Plan.from_block_mask(seen, blocks, longer)
    expected = attend(q, torch.cat([k, more], 2), torch.cat([v, value], 2), keyed)
    count = blocks.count
    ends = {"tail_lse": torch.full((1, 1, count), lse), "tail_value": value.expand(1, 2, count, 16)}
    plan = Plan.from_block_mask(mask, blocks, blocks, **ends)
    torch.testing.assert_close(attend(q, k, v, plan), expected)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_grouped_queries(backend):
    plan = tailed("query", (1, 4), ((2, 4), (2, 4)))
    q, k, v, grad = attention_inputs(2, 4, 111, 16, 130)
    k, v = k[:, ::2], v[:, ::2]
    found = results(q, k, v, grad, grad[..., 0], plan, backend)
    wide = [x.double() for x in (q, *(x.repeat_interleave(2, 1) for x in (k, v)))]
    exact = oracle.results(*wide, grad, grad[..., 0], plan)
    for name in ("dk", "dv"):
        exact[name] = exact[name].unflatten(1, (2, 2)).sum(2)
    for name, value in exact.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=1e-5)


def test_in_portions(monkeypatch):
    monkeypatch.setattr(tail, "_VALUES", 2 * 111 * 16)
    assert_matches_oracle(tailed("any", (2, 3), ((1, 3), (2, 1))), "cpu", batch=2, heads=3)


@pytest.mark.parametrize("count", [1, 7, 200])
def test_sums_without_atomics_are_those_of_index_add(count):
    row = torch.randint(0, count, (300,))
    x = torch.randn(2, 3, 300, 5, dtype=torch.float64)
    found = epilogue.sum_segments(x, row, count)
    torch.testing.assert_close(found, epilogue.sum_rows(x, row, count))


@pytest.mark.parametrize("per", TAILS)
def test_merging_does_not_wait_for_a_device(per, monkeypatch):
    """What is put around a backend on a GPU."""
    for module in (tail, epilogue):
        monkeypatch.setattr(module, "sum_rows", epilogue.sum_segments)
    plan = tailed(per)
    n = plan.q_blocks.count
    plan = plan.replace(out_scale=torch.ones(1, 1, n), out_residual=torch.ones(1, 1, n, 16))
    q, k, v, grad = attention_inputs(1, 2, 111, 16, 130)
    t, lse = plan.tensors(), torch.zeros(1, 2, 111)
    run = tail.with_tail(lambda *_: (q, lse), lambda *_: (q, k, v, None, None))
    with watched() as found:
        out = run[0](q, k, v, t, 1.0)
        grads = run[1](grad, lse, q, k, v, *out, t, 1.0)
    assert not found and len(grads) == 7


@pytest.mark.parametrize("backend", ["reference", "cpu", "native"])
def test_forward_mode(backend):
    """Against central differences in fp64 of the oracle."""
    plan = tailed("any", (2, 1), ((1, 2), (2, 1)), n=(23, 37))
    x = [*attention_inputs(2, 2, 23, 16, 37, torch.float64)[:3]]
    x += [plan.tail_lse.double(), plan.tail_value.double()]
    direction = [torch.randn_like(a) for a in x]
    hidden = plan.tail_lse == -torch.inf
    direction[3][hidden] = 0

    def on(function, dtype):
        def run(q, k, v, tail_lse, tail_value):
            ends = {"tail_lse": tail_lse, "tail_value": tail_value}
            out, lse = function(*(a.to(dtype) for a in (q, k, v)), plan._copy(ends))
            return out.double(), lse.masked_fill(lse == -torch.inf, 0).double()

        return run

    ours = on(lambda *a: attend(*a, backend=backend, return_lse=True),
              torch.float32 if backend == "native" else torch.float64)  # fmt: skip
    _, found = torch.func.jvp(ours, tuple(x), tuple(direction))
    exact, step = on(oracle.attention, torch.float64), 1e-5
    sides = [exact(*(a + s * b for a, b in zip(x, direction))) for s in (step, -step)]
    tolerance = 1e-4 if backend == "native" else 1e-7
    for ours, above, below in zip(found, *sides):
        expected = (above - below) / (2 * step)
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
        assert float(expected.abs().max()) > 0.1


def test_second_derivatives_of_the_reference():
    plan = tailed(n=(23, 37))
    x = [*attention_inputs(1, 1, 23, 16, 37, torch.float64)[:3], plan.tail_value.double()]

    def run(function):
        leaves = [a.clone().requires_grad_() for a in x]
        changed = plan._copy({"tail_value": leaves[3]})
        first = torch.autograd.grad(function(*leaves[:3], changed).square().sum(), leaves[0],
                                    create_graph=True)[0]  # fmt: skip
        return torch.autograd.grad(first.square().sum(), leaves)

    ours = run(lambda *given: attend(*given, backend="reference"))
    for a, b in zip(ours, run(lambda *given: oracle.attention(*given)[0])):
        torch.testing.assert_close(a, b)


def test_compiles_in_one_graph():
    plan = tailed("query", n=(40, 50))
    leaves = [*attention_inputs(1, 2, 40, 16, 50)[:3], plan.tail_lse, plan.tail_value]
    leaves = [x.requires_grad_() for x in leaves]
    lists = plan.kv_indices, plan.kv_num_blocks

    def step(q, k, v, tail_lse, tail_value):
        ends = {"tail_lse": tail_lse, "tail_value": tail_value}
        out, lse = attend(q, k, v, plan.with_lists(*lists, **ends), return_lse=True)
        return out.square().sum() + lse.masked_fill(lse == -torch.inf, 0).sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*leaves), leaves)
    for a, b in zip(found, torch.autograd.grad(step(*leaves), leaves)):
        torch.testing.assert_close(a, b)


BLOCKS = even_blocks(12, 4)
LSE, VALUE = torch.zeros(1, 1, 3), torch.zeros(1, 1, 3, 8)
INDEX = torch.zeros(12, dtype=torch.int32)
BAD = [
    (dict(tail_lse=LSE), "tail_lse and tail_value belong together, got tail_lse alone"),
    (dict(tail_value=VALUE), "belong together, got tail_value alone"),
    (dict(tail_index=INDEX), "belong together, got tail_index alone"),
    (
        dict(tail_lse=LSE[..., :2], tail_value=VALUE),
        "tail_lse must be [B|1, H|1, 3], got [1, 1, 2]",
    ),
    (dict(tail_lse=LSE[0], tail_value=VALUE), "tail_lse must be [B|1, H|1, 3], got [1, 3]"),
    (
        dict(tail_lse=LSE, tail_value=VALUE[:, :, :2]),
        "tail_value must be [B|1, H|1, 3, 8], got [1, 1, 2, 8]",
    ),
    (dict(tail_lse=LSE, tail_value=LSE), "tail_value must be [B|1, H|1, 3, 3], got [1, 1, 3]"),
    (
        dict(tail_lse=LSE.half(), tail_value=VALUE),
        "tail_lse must be float32 or float64, got torch.float16",
    ),
    (
        dict(tail_lse=LSE, tail_value=VALUE.long()),
        "tail_value must be of a floating-point dtype, got torch.int64",
    ),
    (dict(tail_lse=LSE + torch.nan, tail_value=VALUE), "or -inf for no tail, found nan"),
    (dict(tail_lse=LSE + torch.inf, tail_value=VALUE), "or -inf for no tail, found inf"),
    (
        dict(tail_lse=LSE - torch.inf, tail_value=VALUE + torch.inf),
        "tail_value must be finite, also where tail_lse is -inf, found inf",
    ),
    (
        dict(tail_lse=LSE, tail_value=VALUE, tail_index=INDEX[:3]),
        "tail_index must be [12] int32, got [3] torch.int32",
    ),
    (
        dict(tail_lse=LSE, tail_value=VALUE, tail_index=INDEX.long()),
        "tail_index must be [12] int32, got [12] torch.int64",
    ),
    (
        dict(tail_lse=LSE, tail_value=VALUE, tail_index=INDEX + 3),
        "tail_index must lie in 0..2, found 3..3",
    ),
    (
        dict(tail_lse=LSE, tail_value=VALUE, tail_index=INDEX),
        "tail_lse must be [B|1, H|1, 12], got [1, 1, 3]",
    ),
]


@pytest.mark.parametrize("fields, message", BAD, ids=[message for _, message in BAD])
def test_bad_tails_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Plan.from_block_mask(torch.eye(3, dtype=torch.bool), BLOCKS, BLOCKS, **fields)


def test_what_does_not_fit_the_call_is_refused():
    q = torch.zeros(1, 2, 12, 16)
    plan = Plan.full(12, block_size=4, tail_lse=LSE, tail_value=VALUE)
    with pytest.raises(ValueError, match="tail_value has 8 channels, the head dim is 16"):
        attend(q, q, q, plan)
    for name, x in (("tail_lse", LSE.expand(1, 3, 3)), ("tail_value", VALUE.expand(1, 3, 3, 8))):
        with pytest.raises(ValueError, match=f"{name} is for batch 1 and 3 heads"):
            attend(q[..., :8], q[..., :8], q[..., :8], plan.replace(**{name: x}))


def test_a_row_may_list_nothing_only_with_a_tail():
    mask = torch.zeros(3, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="must keep at least one key, or have a tail"):
        Plan.from_block_mask(mask, BLOCKS, BLOCKS)
    plan = Plan.from_block_mask(mask, BLOCKS, BLOCKS, tail_lse=LSE, tail_value=VALUE)
    assert plan.density == 0 and plan.flops(8) == 2 * 2 * 12 * 8
    with pytest.raises(ValueError, match="must keep at least one key, or have a tail"):
        plan.replace(tail_lse=None, tail_value=None)


@pytest.mark.parametrize("per", TAILS)
def test_what_a_plan_says_of_itself(per):
    plan = tailed(per, (2, 2), ((2, 1), (1, 2)))
    density, pairs = oracle.pairs(plan)
    assert plan.density == pytest.approx(density) and plan.flops(1) == pytest.approx(4 * pairs)
    assert plan.listed_density() is not None and not plan.is_dense
    bare = plan._copy(dict.fromkeys(("tail_lse", "tail_value", "tail_index")))
    assert bare.flops(1) < plan.flops(1)
    assert bare.nbytes == plan.nbytes - sum(
        x.nbytes for x in (plan.tail_lse, plan.tail_value, plan.tail_index) if x is not None
    )
    part = plan.select_heads(slice(1, 2))
    assert part.tail_lse is plan.tail_lse and part.tail_index is plan.tail_index
    assert torch.equal(part.tail_value, plan.tail_value[:, 1:])
    full = Plan.full(12, block_size=4)
    assert full.is_dense and not full.replace(tail_lse=LSE, tail_value=VALUE).is_dense
    graph = plan._copy({"tail_lse": plan.tail_lse.clone().requires_grad_() * 2})
    assert not detached(graph).tail_lse.requires_grad
    assert detached(graph).num_partial_pairs == plan.num_partial_pairs


@pytest.mark.parametrize("per", TAILS)
def test_checks_on_sampled_rows_know_it(per, monkeypatch):
    monkeypatch.setattr("dittfast.measure.check._SAMPLED_ROWS", 40)
    plan = tailed(per, (1, 2), ((1, 2), (1, 1)))
    # A query that sees nothing is none of a benchmark's.
    plan = plan.replace(tail_lse=plan.tail_lse.clamp_min(-3))
    q, k, v, grad = attention_inputs(1, 2, 111, 16, 130)
    check_against_dense(q, k, v, grad, plan, 0.25, backward=True)


def test_a_backend_without_tails_refuses_it(monkeypatch):
    def forward(q, k, v, t, scale):
        return torch.ones_like(q), q.new_zeros(q.shape[:3])

    q = torch.zeros(1, 1, 12, 8)
    plan = Plan.full(12, block_size=4, tail_lse=LSE, tail_value=VALUE + 3)
    monkeypatch.setattr("dittfast.attention.BACKENDS", dict(BACKENDS))
    takes = Capabilities(("cpu",), backward=False)
    dittfast.register_backend("theirs", forward, capabilities=takes)
    assert not_supported_reasons("theirs", q, q, q, plan) == [LACKS["tail"]]
    with pytest.raises(ValueError, match=r"takes no tail.*What can: backend='"):
        attend(q, q, q, plan, backend="theirs")
    # Merged around it: two keys of equal weight.
    takes = Capabilities(("cpu",), backward=False, tail=True)
    dittfast.register_backend("theirs", forward, capabilities=takes)
    assert torch.equal(attend(q, q, q, plan, backend="theirs"), torch.full_like(q, 2))
