"""Runs: rows that see key blocks 0 ... n - 1 without a list. They act as rows that list them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_plans import assert_matches_oracle, even_blocks, ragged_blocks, random_plan, random_rule

from dittfast import Layout, attend
from dittfast.measure import check, draw
from dittfast.methods import LogLinear
from dittfast.plan import Plan
from dittfast.testing import attention_inputs

# Most of a kernel's time in the interpreter is its patching.
pytestmark = pytest.mark.usefixtures("quick_interpreter")


def with_runs(rule=False, lists=(1, 2), seed=0, block_size=16, sizes=(111, 143), **fields):
    """``(plan with runs, the same plan with every block listed)``; ragged blocks by default."""
    q_blocks = ragged_blocks(sizes[0], block_size, seed, shuffle=True)
    kv_blocks = ragged_blocks(sizes[1], block_size, seed + 1, shuffle=seed % 2 == 0)
    rule = random_rule(*sizes, seed=seed) if rule else None
    plan = random_plan(q_blocks, kv_blocks, lists, rule, 0.2, seed, runs=False, **fields)
    width = plan.kv_indices.shape[-1]
    n_k = kv_blocks.count
    assert width < n_k - 1
    state = np.random.default_rng(seed)
    indices, count, full = (
        x.clone() for x in (plan.kv_indices, plan.kv_num_blocks, plan.kv_num_full_blocks)
    )
    listed = torch.nn.functional.pad(indices, (0, n_k - width))
    for b, h in np.ndindex(*lists):
        for row in state.choice(q_blocks.count, min(3, q_blocks.count), replace=False):
            length = int(state.integers(width + 1, n_k + 1))
            indices[b, h, row] = 0
            listed[b, h, row] = torch.arange(n_k)
            count[b, h, row] = full[b, h, row] = length
    change = dict(kv_num_blocks=count, kv_num_full_blocks=full)
    return plan.replace(kv_indices=indices, **change), plan.replace(kv_indices=listed, **change)


@given(st.integers(0, 1000), st.booleans(), st.sampled_from([(1, 1), (2, 3)]))
def test_everything_a_plan_says_is_what_the_listed_plan_says(seed, rule, lists):
    weight = torch.randn(1, 1, 143)
    weight[..., 3:40] = -torch.inf
    plan, listed = with_runs(rule, lists, seed, kv_log_weight=weight, num_real_keys=130)
    assert torch.equal(plan.to_block_mask(), listed.to_block_mask())
    assert torch.equal(plan.to_dense_mask(), listed.to_dense_mask())
    assert plan.density == pytest.approx(listed.density, rel=1e-12)
    assert plan.flops(64) == pytest.approx(listed.flops(64), rel=1e-12)
    total = int(plan.transpose().q_num_blocks.sum())
    for ours, theirs in zip(plan.transpose(), listed.transpose()):
        assert torch.equal(ours[:total], theirs[:total])
    tokens = torch.arange(0, 111, 7)
    assert torch.equal(check.mask_rows(plan, tokens), check.mask_rows(listed, tokens))
    for ours, theirs in zip(draw._shares(plan, 0, 0, 99), draw._shares(listed, 0, 0, 99)):
        assert np.array_equal(ours, theirs)
    one = slice(lists[1] - 1, lists[1])
    assert torch.equal(plan.select_heads(one).to_block_mask(), plan.to_block_mask()[:, one])


@pytest.mark.parametrize(
    "backend", ["cpu", "reference", pytest.param("triton", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("rule", [False, True])
# Several blocks a tile, several tiles a block.
@pytest.mark.parametrize("block_size", [pytest.param(8, marks=pytest.mark.slow), 40])
def test_backends_forward_and_backward(backend, rule, block_size, nan_empty):
    sizes = (63, 111) if block_size == 8 else (63, 300)
    plan, _ = with_runs(rule, (1, 2), 3, block_size, sizes)
    assert_matches_oracle(plan, backend)


def test_wrong_runs_are_named():
    blocks = even_blocks(160, 16)
    zeros = torch.zeros(1, 1, 10, 2, dtype=torch.int32)
    count = torch.ones(1, 1, 10, dtype=torch.int32)

    def plan(indices=zeros, full=None, **changed):
        count_ = count.clone()
        for row, value in changed.items():
            count_[0, 0, int(row[1:])] = value
        return Plan(indices, count_, count_ if full is None else full, blocks, blocks)

    assert int(plan(r4=10).to_block_mask()[0, 0, 4].sum()) == 10
    for wrong, message in [
        (dict(r4=11), "kv_num_blocks must lie in 0..2, found 1..11"),
        (
            dict(r4=3, indices=zeros + torch.tensor([0, 1], dtype=torch.int32)),
            "must lie in 0..2, found 1..3",
        ),
        (dict(r4=3, full=count), "all blocks of a run must be full"),
    ]:
        with pytest.raises(ValueError, match=message):
            plan(**wrong)


def text_layout(n):
    return Layout.image(n, n, text=64, text_first=False)


def test_log_linear_with_dense_text_is_linear_in_memory():
    """Lists, transposed lists and the CPU's work list, all that depends on the plan."""
    sizes, found = [1024, 16384], []
    for n in sizes:
        layout = text_layout(math.isqrt(n))
        q, k = torch.randn(2, 1, 1, layout.num_tokens, 16)
        plan = LogLinear(levels="auto").plan(layout, q, k)
        lists = plan.nbytes
        plan.transpose()
        found.append((lists, plan.nbytes, plan.worklist("cpu", _worklist).numel()))
    for small, large in zip(*found):
        assert math.log(large / small) / math.log(sizes[1] / sizes[0]) < 1.25


def _worklist(tensors):
    from dittfast.kernels.cpu_worklist import make_worklist

    return make_worklist(tensors)


@pytest.mark.parametrize(
    "backend", ["cpu", "reference", pytest.param("triton", marks=pytest.mark.slow)]
)
def test_dense_text_rows_of_log_linear_see_every_token(backend):
    layout = Layout.image(10, 12, text=12, text_first=False, text_lengths=[12, 5])
    q, k, v, grad = attention_inputs(2, 1, layout.num_tokens, 16)
    method = LogLinear(block_size=8, topk=2)
    plan = method.plan(layout, q, k)
    assert plan.kv_indices.shape[-1] < plan.q_blocks.count
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = attend(q, *method.extend(layout, k, v), plan, backend=backend)
    rows = slice(120, 132)
    valid = torch.ones(2, 1, 1, 132, dtype=torch.bool)
    valid[1, ..., 125:] = False
    dense = torch.nn.functional.scaled_dot_product_attention(q[:, :, rows], k, v, valid)
    torch.testing.assert_close(out[:, :, rows], dense, rtol=1e-4, atol=1e-5)
    text = torch.zeros_like(grad)
    text[:, :, rows] = grad[:, :, rows]
    ours = torch.autograd.grad(out, (q, k, v), text)
    theirs = torch.autograd.grad(dense, (q, k, v), grad[:, :, rows])
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
