"""The cudnn backend against an emulator of the package's contract. No GPU is here to run it."""

import ast
import importlib.metadata
import itertools
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

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
from dittfast.kernels import capabilities, cudnn_backend
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
    monkeypatch.setattr(cudnn_backend, "machine_reasons", lambda asked: [])
    here = tuple(replace(x, devices=("cpu",)) for x in cudnn_backend.CAPABILITIES)
    monkeypatch.setattr(cudnn_backend, "CAPABILITIES", here)
    for module in (cudnn_backend, capabilities):
        monkeypatch.setattr(module, "architecture_of", lambda device: "sm_90")


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
    q, k, v = (torch.randn(1, 2, n, 128, generator=draw).bfloat16() for n in (200, 100, 100))
    found = []
    for backend, dtype in (("cudnn", torch.bfloat16), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*leaves, plan, backend=backend)
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    for ours, exact in zip(*found):
        assert float((ours.double() - exact).abs().max()) <= 0.02 * float(exact.abs().max())


METHODS = {
    "radial": (methods.Radial(block_size=64), Layout.video(5, 6, 7, text=7)),
    "rectified": (methods.Rectified(block_size=64, topk=2), Layout.image(15, 16, text=5)),
    "topk": (methods.TopK(block_size=64, topk=2), Layout.image(15, 16, text=5)),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods(emulator, name):
    method, layout = METHODS[name]
    draw = torch.Generator().manual_seed(0)
    shape = 1, 2, layout.num_tokens, 64
    q, k, v = (torch.randn(shape, generator=draw).half() for _ in range(3))
    plan = method.plan(layout) if method.static else method.plan(layout, q, k, v)
    out = attend(q, k, v, plan, backend="cudnn")
    exact = attend(*(x.double() for x in (q, k, v)), plan, backend="reference")
    assert float((out.double() - exact).abs().max()) <= 2e-3 * float(exact.abs().max())


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
        (None, True, "nvidia-cudnn-frontend is not installed (pip install"),
        ("1.14.1", True, "nvidia-cudnn-frontend is 1.14.1, and 1.32 is needed"),
        ("1.32.0", False, "nvidia-cutlass-dsl is not installed"),
        ("1.40.2", True, None),
    ],
)
def test_the_wheel(monkeypatch, version, cutlass, message):
    there = {"cudnn": version is not None, "cutlass": cutlass}
    find = lambda name: object() if there[name] else None  # noqa: E731
    monkeypatch.setattr(cudnn_backend.importlib.util, "find_spec", find)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    reasons = cudnn_backend.machine_reasons(None)
    assert [x[: len(message)] for x in reasons] == [message] if message else reasons == []


def parameters(function: ast.FunctionDef) -> list[tuple[str, str | None]]:
    """Names in order, keyword-only ones after "*", each with its default."""
    given = function.args
    defaults = [None] * (len(given.args) - len(given.defaults)) + given.defaults
    pairs = [*zip(given.args, defaults), (ast.arg("*"), None)]
    pairs += zip(given.kwonlyargs, given.kw_defaults)
    return [(x.arg, None if default is None else ast.unparse(default)) for x, default in pairs]


@pytest.mark.slow
def test_the_emulator_has_the_signatures_of_the_wheel(tmp_path):
    """Read, not imported: that takes a GPU's libraries."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path)]
    subprocess.run([*install, f"nvidia-cudnn-frontend=={VERSION}"], check=True, timeout=600)
    source = (tmp_path / "cudnn/block_sparse_attention/api.py").read_text(encoding="utf-8")
    theirs = {n.name: n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)}
    with open(__file__, encoding="utf-8") as file:
        ours = {n.name: n for n in ast.parse(file.read()).body if isinstance(n, ast.FunctionDef)}
    for name in ("forward", "backward"):
        theirs_of_it = parameters(theirs[f"block_sparse_attention_{name}"])
        assert parameters(ours[f"emulated_{name}"]) == theirs_of_it


def test_full_blocks_are_listed_for_every_head(emulator):
    """Broadcast lists are written out, as the package wants them."""
    plan = Plan.full(128, block_size=64)
    q = torch.randn(2, 3, 128, 64).half()
    options = cudnn_backend._problem(q, q, plan.tensors(), 1.0).options
    assert options["q2k_block_index"].shape == (2, 3, 2, 2) and options["block_sizes"] is None
    assert options["q2k_block_nums"].tolist() == [[[2, 2]] * 3] * 2
