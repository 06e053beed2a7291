"""The cudnn backend against an emulator of the package's contract. No GPU is here to run it."""

import itertools
import sys
from types import SimpleNamespace

import engines
import pytest
import torch
from random_plans import (
    assert_matches_oracle,
    even_blocks,
    ragged_blocks,
    random_plan,
    random_rule,
    random_tail,
)

from dittfast import Layout, attend, methods
from dittfast.attention import not_supported_reasons
from dittfast.kernels import capabilities, cudnn_backend, wheels
from dittfast.plan import Plan

VERSION = "1.32.0"


def _logits(q, k, index, nums, sizes, block, scale):
    """Scaled logits, -inf where the lists hide a pair; what the package checks is checked here."""
    heads, queries, keys = q.shape[:2], q.shape[2], k.shape[2]
    assert q.shape[:2] == k.shape[:2] and all(x.is_contiguous() for x in (q, k))
    assert block in (64, 128) and (block == 128 or queries % 64 == 0)
    rows, columns = -(-queries // block), -(-keys // block)
    assert index.dtype == nums.dtype == torch.int32
    assert index.shape[:3] == nums.shape == (*heads, rows) and index.shape[3] >= 1
    assert sizes is None or (sizes.dtype == torch.int32 and sizes.shape == (columns,))
    seen = torch.zeros(*heads, queries, keys, dtype=torch.bool)
    for at in itertools.product(*map(range, nums.shape)):
        for column in index[at][: nums[at]].tolist():
            assert 0 <= column < columns
            start = column * block
            end = start + (block if sizes is None else int(sizes[column]))
            seen[at[0], at[1], at[2] * block : (at[2] + 1) * block, start:end] = True
    return (q.float() @ k.float().mT * scale).masked_fill(~seen, -torch.inf)


def emulated_forward(
    q_tensor, k_tensor, v_tensor, q2k_block_index, block_sparse_num=None, block_sizes=None,
    q2k_block_nums=None, *, sparse_block_size=None, allow_empty_block_nums=False,
    softmax_scale=None, pack_gqa=None, layout="bhsd", kv_splits=1, use_clc=None,
):  # fmt: skip
    assert softmax_scale > 0, "the maximum is taken before"
    assert allow_empty_block_nums or bool((q2k_block_nums > 0).all())
    lists = q2k_block_index, q2k_block_nums, block_sizes
    logits = _logits(q_tensor, k_tensor, *lists, sparse_block_size, softmax_scale)
    lse = logits.logsumexp(-1)
    p = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    return {"o_tensor": (p @ v_tensor.float()).to(q_tensor.dtype), "lse_tensor": lse}


def emulated_backward(
    do_tensor, q_tensor, k_tensor, v_tensor, o_tensor, lse_tensor, q2k_block_index,
    block_sparse_num=None, block_sizes=None, q2k_block_nums=None, *, softmax_scale=None,
    dq_tensor=None, dk_tensor=None, dv_tensor=None, bucket_size_blocks=None,
    sparse_block_size=None, layout="bhsd",
):  # fmt: skip
    lists = q2k_block_index, q2k_block_nums, block_sizes
    logits = _logits(q_tensor, k_tensor, *lists, sparse_block_size, softmax_scale)
    assert lse_tensor.dtype == torch.float32 and o_tensor.dtype == do_tensor.dtype == q_tensor.dtype
    p = torch.exp(logits - lse_tensor.masked_fill(lse_tensor == -torch.inf, 0)[..., None])
    q, k, v, o, do = (x.float() for x in (q_tensor, k_tensor, v_tensor, o_tensor, do_tensor))
    ds = p * (do @ v.mT - (do * o).sum(-1, keepdim=True)) * softmax_scale
    grads = {"dq_tensor": ds @ k, "dk_tensor": ds.mT @ q, "dv_tensor": p.mT @ do}
    return {name: x.to(q_tensor.dtype) for name, x in grads.items()}


@pytest.fixture
def emulator(monkeypatch):
    """The package, and an H100 in which CPU tensors lie."""
    package = SimpleNamespace(
        block_sparse_attention_forward=emulated_forward,
        block_sparse_attention_backward=emulated_backward,
    )
    monkeypatch.setitem(sys.modules, "cudnn", package)
    engines.as_on_a_gpu(monkeypatch, cudnn_backend, "sm_90")


ENDS = {"out_scale": torch.rand(1, 2, 4) + 0.5, "out_residual": torch.randn(1, 1, 4, 128)}
PLANS = {
    "blocks of 64": lambda: random_plan(even_blocks(200, 64), even_blocks(200, 64)),
    "blocks of 128": lambda: random_plan(even_blocks(300, 128), even_blocks(256, 128), (2, 2)),
    "ragged": lambda: random_plan(
        ragged_blocks(200, 60, 1, shuffle=True), ragged_blocks(170, 50, 2, shuffle=True), (1, 2)
    ),
    "epilogue": lambda: random_plan(even_blocks(200, 64), even_blocks(100, 50), **ENDS),
}


@pytest.mark.parametrize("name", PLANS)
def test_plans_forward_and_backward(emulator, name):
    assert_matches_oracle(
        PLANS[name](), "cudnn", batch=2, head_dim=128, dtype=torch.bfloat16, with_lse=False
    )


def test_a_tail(emulator):
    """Merged around it; the gradients of q, k and v are those of all keys."""
    blocks = even_blocks(200, 64)
    plan = random_plan(blocks, even_blocks(100, 50), **random_tail(blocks, 128))
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 2, n, 128, generator=draw).bfloat16() for n in (200, 100, 100)]
    engines.assert_gradients("cudnn", plan, inputs)


@pytest.mark.parametrize("name", engines.FULL_BLOCKS)
def test_methods(emulator, name):
    engines.assert_exact("cudnn", *engines.FULL_BLOCKS[name])


@pytest.mark.parametrize("name", engines.RULES_AND_WEIGHTS)
def test_methods_that_it_cannot_run(emulator, name):
    engines.assert_refused("cudnn", name)


def test_what_it_does_not_take_is_said_and_who_does(emulator):
    q = torch.zeros(1, 1, 90, 64, dtype=torch.float16)
    local = methods.Local(window=3, tile=(1, 8, 8)).plan(Layout.image(9, 10))
    with pytest.raises(ValueError, match=r"takes full blocks alone.*What can: .*'flex'"):
        attend(q, q, q, local, backend="cudnn")
    blocks = even_blocks(90, 64)
    weighted = random_plan(blocks, blocks, kv_log_weight=torch.zeros(1, 1, 90))
    with pytest.raises(ValueError, match=r"adds no log weights to keys.*What can: .*'flex'"):
        attend(q, q, q, weighted, backend="cudnn")
    plan = random_plan(blocks, blocks)
    leaf = q.clone().requires_grad_()
    reasons = not_supported_reasons("cudnn", leaf, q, q, plan)
    assert len(reasons) == 1
    small = random_plan(even_blocks(90, 16), blocks)
    (reason,) = not_supported_reasons("cudnn", q, q, q, small)
    assert reason == "q blocks must be of 33 to 128 tokens, this plan's are 16"
    assert not_supported_reasons("cudnn", q, q, q, plan) == []
    rule = random_plan(blocks, blocks, rule=random_rule(90, 90))
    assert not_supported_reasons("cudnn", q, q, q, rule)


def test_a_gradient_of_lse_is_refused(emulator):
    blocks = even_blocks(90, 64)
    leaf = torch.randn(1, 1, 90, 128, dtype=torch.bfloat16, requires_grad=True)
    plan = random_plan(blocks, blocks)
    _, lse = attend(leaf, leaf, leaf, plan, backend="cudnn", return_lse=True)
    with pytest.raises(NotImplementedError, match="no gradient on from lse; use triton's"):
        lse.sum().backward()


@pytest.mark.parametrize(
    "architecture, dim, dtype, backward, takes",
    [
        ("sm_90", 96, torch.float16, False, True),
        ("sm_90", 128, torch.bfloat16, True, True),
        ("sm_90", 128, torch.float16, True, False),
        ("sm_90", 64, torch.bfloat16, True, False),
        ("sm_100", 64, torch.bfloat16, True, True),
        ("sm_110", 64, torch.bfloat16, True, False),
        ("sm_120", 128, torch.bfloat16, False, True),
        ("sm_120", 64, torch.bfloat16, False, False),
        ("sm_80", 128, torch.float16, False, False),
        ("sm_90", 128, torch.float32, False, False),
    ],
)
def test_which_gpus_and_tensors(monkeypatch, architecture, dim, dtype, backward, takes):
    monkeypatch.setattr(cudnn_backend, "machine_reasons", lambda asked: [])
    monkeypatch.setattr(capabilities, "architecture_of", lambda device: architecture)
    needs = ("backward",) if backward else ()
    asked = capabilities.Demand(torch.device("cuda"), dtype, dim, 128, 128, needs)
    assert (capabilities.refusals(cudnn_backend, asked) == []) == takes


@pytest.mark.parametrize(
    "version, cutlass, message",
    [
        (None, "4.8.1", "nvidia-cudnn-frontend is not installed (pip install"),
        ("1.14.1", "4.8.1", "nvidia-cudnn-frontend is 1.14.1, and 1.32.0 is needed"),
        ("1.32.0", None, "nvidia-cutlass-dsl is not installed"),
        ("1.40.2", "4.8.1", None),
    ],
)
def test_the_wheel(monkeypatch, version, cutlass, message):
    there = {"nvidia-cudnn-frontend": version, "nvidia-cutlass-dsl": cutlass}
    monkeypatch.setattr(wheels, "installed_version", there.get)
    reasons = cudnn_backend.machine_reasons(None)
    assert [x[: len(message)] for x in reasons] == [message] if message else reasons == []


def test_a_negative_scale(emulator):
    engines.assert_negative_scale("cudnn")


@pytest.mark.slow
def test_the_emulator_has_the_signatures_of_the_wheel(tmp_path):
    """Read, not imported: that takes a GPU's libraries."""
    package = engines.wheel(tmp_path, f"nvidia-cudnn-frontend=={VERSION}") / "cudnn"
    theirs = engines.signatures(package / "block_sparse_attention/api.py")
    ours = engines.signatures(__file__)
    for name in ("forward", "backward"):
        assert ours[f"emulated_{name}"] == theirs[f"block_sparse_attention_{name}"]


def test_full_blocks_are_listed_for_every_head(emulator):
    """Broadcast lists are written out, as the package wants them."""
    plan = Plan.full(128, block_size=64)
    q = torch.randn(2, 3, 128, 64).half()
    options = cudnn_backend._problem(q, q, plan.tensors(), 1.0).options
    assert options["q2k_block_index"].shape == (2, 3, 2, 2) and options["block_sizes"] is None
    assert options["q2k_block_nums"].tolist() == [[[2, 2]] * 3] * 2
