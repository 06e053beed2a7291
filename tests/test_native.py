"""The native CPU backend against the dense fp64 oracle, and against one that reads raw plans."""

import os
import threading

import plan_fuzz
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

from dittfast import Layout, attend, methods
from dittfast.attention import choose_backend, not_supported_reasons
from dittfast.kernels import native
from dittfast.plan import Plan
from dittfast.testing import attention_inputs

pytestmark = pytest.mark.usefixtures("nan_empty")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("name", ["log_linear", "rectified"])
@pytest.mark.parametrize("num_tokens", [390])
def test_methods_that_append_keys_or_an_epilogue(name, num_tokens):
    method = methods.METHODS[name]()
    layout = Layout.image(10, num_tokens // 10, text=7)
    q, k, v, _ = attention_inputs(2, 3, layout.num_tokens, 32)
    plan = method.plan(layout, q, k, v)
    assert_matches_oracle(plan, "native", batch=2, heads=3, head_dim=32)


def test_runs():
    """The first rows see the first key blocks without a list; the others list theirs."""
    blocks = even_blocks(160, 16)
    indices = torch.zeros(1, 1, 10, 2, dtype=torch.int32)
    count = torch.tensor([10, 3, 1, 2, 2, 1, 2, 1, 2, 2], dtype=torch.int32)[None, None]
    listed = [[3, 7], [2, 9], [1, 4], [8, 0], [0, 9], [5, 0], [6, 2], [9, 1]]
    indices[0, 0, 2:] = torch.tensor(listed)
    full = count.clone()
    full[..., 3:5] = 1
    plan = Plan(indices, count, full, blocks, blocks, rule=random_rule(160, 160))
    assert plan.to_block_mask()[0, 0].sum(-1).tolist() == count[0, 0].tolist()
    assert_matches_oracle(plan, "native")


def test_a_nan_is_not_hidden():
    q, k, v, _ = attention_inputs(1, 1, 40, 16)
    k[0, 0, 20] = torch.nan
    plan = Plan.from_block_mask(torch.eye(2, dtype=torch.bool), *[even_blocks(40, 20)] * 2)
    out = attend(q, k, v, plan, backend="native")
    assert bool(out[:, :, :20].isfinite().all()) and bool(out[:, :, 20:].isnan().all())


@pytest.mark.parametrize("lists", [1, 4], ids=["shared lists", "a list per head"])
@pytest.mark.parametrize("weights", [1, 4], ids=["shared weight", "a weight per head"])
def test_grouped_queries(lists, weights):
    """Keys of two heads under queries of four: as with the keys repeated, and without a copy."""
    blocks = ragged_blocks(111, 32, 3)
    plan = random_plan(blocks, blocks, (1, lists), random_rule(111, 111))
    weight = torch.randn(2, weights, 111)
    q, k, v, grad = attention_inputs(2, 4, 111, 16)
    k, v = k[:, ::2], v[:, ::2]
    found = []
    for backend, dtype in (("native", torch.float32), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*leaves, plan, kv_log_weight=weight, backend=backend)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))])
    for ours, exact in zip(*found):
        assert ours.shape == exact.shape
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)


def test_results_do_not_depend_on_the_threads():
    blocks = ragged_blocks(390, 32, 16)
    plan = random_plan(blocks, blocks, rule=random_rule(390, 390))
    inputs = attention_inputs(1, 3, 390, 16)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 3):
            torch.set_num_threads(threads)
            found.append(results(*inputs, torch.ones(1, 3, 390), plan, "native"))
    finally:
        torch.set_num_threads(before)
    for name, first in found[0].items():
        assert all(torch.equal(first, other[name]) for other in found[1:]), name


def test_several_python_threads_at_once():
    blocks = ragged_blocks(390, 32, 16)
    plan = random_plan(blocks, blocks, rule=random_rule(390, 390))
    inputs = [attention_inputs(1, 2, 390, 16, seed=seed)[:3] for seed in range(4)]
    expected = [attend(*x, plan, backend="native") for x in inputs]
    found = [None] * len(inputs)

    def run(i):
        for _ in range(5):
            found[i] = attend(*inputs[i], plan, backend="native")

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_of_a_process_that_has_used_it_can_use_it():
    plan = Plan.full(300, block_size=20)
    q, k, v, _ = attention_inputs(1, 2, 300, 16)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = attend(q, k, v, plan, backend="native", return_lse=True)
        child = os.fork()
        if child == 0:
            found = native.forward(q, k, v, plan.tensors(), 0.25)
            os._exit(0 if all(torch.equal(a, b) for a, b in zip(found, expected)) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(before)


def test_a_block_that_does_not_exist_is_an_error():
    blocks = even_blocks(64, 16)
    plan = Plan.full(64, block_size=16).with_lists(
        torch.full((1, 1, 4, 1), 4, dtype=torch.int32), torch.ones(1, 1, 4, dtype=torch.int32)
    )
    assert blocks.count == 4
    with pytest.raises(RuntimeError, match="lists a block that does not exist"):
        attend(*attention_inputs(1, 1, 64, 16)[:3], plan, backend="native")


def test_refuses_what_it_cannot_run():
    plan = Plan.from_block_mask(torch.eye(2, dtype=torch.bool), *[even_blocks(8, 4)] * 2)
    q = torch.zeros(1, 1, 8, 16, device="meta", dtype=torch.float64)
    assert not_supported_reasons("native", q, q, q, plan) == [
        "it runs on cpu, got tensors on meta",
        "it computes float32, float16, bfloat16, got float64",
    ]
    q = torch.zeros(1, 1, 8, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"native backend cannot run this: .*What can: .*'cpu'"):
        attend(q, q, q, plan, backend="native")
    assert attend(q, q, q, plan).dtype == torch.float64


def test_where_there_is_no_compiler(monkeypatch):
    monkeypatch.setattr(native, "unavailable", lambda: "there is no C compiler; install one")
    plan = Plan.from_block_mask(torch.eye(2, dtype=torch.bool), *[even_blocks(8, 4)] * 2)
    q = torch.zeros(1, 1, 8, 16)
    assert choose_backend(q.device) == "cpu"
    with pytest.raises(ValueError, match=r"no C compiler; install one\. What can: .*'cpu'"):
        attend(q, q, q, plan, backend="native")


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
    inputs = [x.requires_grad_() for x in attention_inputs(1, 2, 40, 16)[:3]]
    arguments = op_arguments(*inputs, plan, 0.25)
    torch.library.opcheck(torch.ops.dittfast.attend_native.default, arguments)


@pytest.mark.parametrize("backend", ["auto", "native"])
def test_compiles_in_one_graph(backend):
    blocks = ragged_blocks(63, 16, 18)
    plan = random_plan(blocks, blocks, rule=random_rule(63, 63))
    inputs = [x.requires_grad_() for x in attention_inputs(1, 2, 63, 16)[:3]]

    def step(q, k, v):
        return attend(q, k, v, plan, return_lse=True, backend=backend)

    def gradients(function):
        out, lse = function(*inputs)
        return torch.autograd.grad(out.square().sum() + lse.sum(), inputs)

    torch._dynamo.reset()
    actual = gradients(torch.compile(step, fullgraph=True, backend="aot_eager"))
    for a, b in zip(actual, gradients(step)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("part", range(4))
def test_random_plans(part):
    """Plans of every kind, against an oracle that reads nothing but the plan's raw fields."""
    for seed in range(10 * part, 10 * (part + 1)):
        plan_fuzz.check(seed)


def test_the_oracle_of_random_plans_agrees_with_the_reference():
    for seed in range(6):
        plan, weight, (batch, heads, _, dim) = plan_fuzz.random_case(plan_fuzz.Draw(seed))
        q, k, v, _ = attention_inputs(
            batch, heads, plan.num_queries, dim, plan.num_keys, torch.float64
        )
        out, lse, blind = plan_fuzz.formula(q, k, v, plan, weight, 0.5)
        options = dict(scale=0.5, kv_log_weight=weight, return_lse=True)
        found, found_lse = attend(q, k, v, plan, backend="reference", **options)
        assert torch.equal(found_lse == -torch.inf, blind)
        torch.testing.assert_close(found, out)
        torch.testing.assert_close(found_lse.masked_fill(blind, 0), lse.masked_fill(blind, 0))
