"""The flashinfer backend against an emulator of its package's contract, without a GPU."""

import math
import sys
from types import SimpleNamespace
from typing import ClassVar

import engines
import pytest
import torch
from random_plans import even_blocks, ragged_blocks, random_plan, random_rule, random_tail

from dittfast import attend
from dittfast.attention import not_supported_reasons
from dittfast.kernels import capabilities, flashinfer_backend, wheels
from dittfast.testing import attention_inputs

VERSION = "0.7.4"


class VariableBlockSparseAttentionWrapper:
    """What the package does, densely: heads first, no batch, a mask of blocks for each head."""

    planned: ClassVar[list[int]] = []

    def __init__(self, float_workspace_buffer, backend="auto"):
        assert float_workspace_buffer.dtype == torch.uint8

    def plan(
        self, block_mask_map, block_row_sz, block_col_sz, num_qo_heads, num_kv_heads, head_dim,
        causal=False, pos_encoding_mode="NONE", use_fp16_qk_reduction=False, logits_soft_cap=None,
        sm_scale=None, rope_scale=None, rope_theta=None, non_blocking=True, q_data_type="float16",
        kv_data_type=None, q_scale=None, k_scale=None, v_scale=None,
    ):  # fmt: skip
        assert sm_scale > 0, "the maximum is taken before"
        heads, rows, columns = block_mask_map.shape
        assert block_mask_map.dtype == torch.bool and heads == num_kv_heads == num_qo_heads
        assert block_row_sz.shape == (heads, rows) and block_col_sz.shape == (heads, columns)
        assert block_row_sz.dtype == block_col_sz.dtype == torch.int32
        assert block_mask_map.any(-1).all(), "a row without keys is not described"
        self.planned.append(int((block_mask_map * block_col_sz[:, None]).sum()))
        self.seen = torch.stack(
            [
                mask.repeat_interleave(height, 0).repeat_interleave(width, 1)
                for mask, height, width in zip(block_mask_map, block_row_sz, block_col_sz)
            ]
        )
        self.scale, self.dtype, self.dim = sm_scale, q_data_type, head_dim

    def run(self, q, k, v, out=None, lse=None, return_lse=False, enable_pdl=None):
        assert q.dtype == k.dtype == self.dtype and q.shape[-1] == self.dim
        assert self.seen.shape == (q.shape[0], q.shape[1], k.shape[1])
        logits = (q.float() @ k.float().mT * self.scale).masked_fill(~self.seen, -torch.inf)
        out = (logits.softmax(-1) @ v.float()).to(q.dtype)
        return (out, logits.logsumexp(-1) / math.log(2)) if return_lse else out


@pytest.fixture
def emulator(monkeypatch):
    """The package, and an H100 in which CPU tensors lie; the numbers of keys that were listed."""
    wrapper = VariableBlockSparseAttentionWrapper
    monkeypatch.setattr(wrapper, "planned", [])
    package = SimpleNamespace(VariableBlockSparseAttentionWrapper=wrapper)
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    engines.as_on_a_gpu(monkeypatch, flashinfer_backend, "sm_90")
    monkeypatch.setattr(flashinfer_backend, "_WORKSPACE", 16)
    return wrapper


@pytest.mark.parametrize("name", engines.FULL_BLOCKS)
def test_methods(emulator, name):
    engines.assert_exact("flashinfer", *engines.FULL_BLOCKS[name])


@pytest.mark.parametrize("name", engines.RULES_AND_WEIGHTS)
def test_methods_that_it_cannot_run(emulator, name):
    engines.assert_refused("flashinfer", name)


EVEN = even_blocks(90, 32)
ENDS = {"out_scale": torch.rand(1, 2, 3) + 0.5, "out_residual": torch.randn(1, 1, 3, 64)}
PLANS = {
    "lists per head": lambda: random_plan(EVEN, even_blocks(70, 16), (2, 2)),
    "ragged": lambda: random_plan(
        ragged_blocks(90, 20, 1, shuffle=True), ragged_blocks(70, 30, 2, shuffle=True), (1, 2)
    ),
    "epilogue": lambda: random_plan(EVEN, even_blocks(70, 50), **ENDS),
    "a tail": lambda: random_plan(EVEN, even_blocks(70, 50), (1, 2), **random_tail(EVEN, 64)),
}


@pytest.mark.parametrize("name", PLANS)
def test_plans(emulator, name):
    plan = PLANS[name]()
    q, k, v, _ = attention_inputs(2, 2, 90, 64, 70, torch.float16)
    found = attend(q, k, v, plan, backend="flashinfer", return_lse=True)
    wide = (x.double() for x in (q, k, v))
    exact = attend(*wide, plan, backend="reference", return_lse=True)
    for ours, expected in zip(found, exact):
        assert torch.equal(ours == -torch.inf, expected == -torch.inf)
        ours, expected = (x.double().nan_to_num(neginf=0) for x in (ours, expected))
        torch.testing.assert_close(ours, expected, rtol=2e-3, atol=2e-3)


def test_gradients_are_ours(emulator):
    """In fp16, which Triton's interpreter multiplies rightly."""
    sides = ragged_blocks(40, 20, 1, shuffle=True), ragged_blocks(30, 16, 2, shuffle=True)
    plan = random_plan(*sides, out_scale=torch.rand(1, 1, sides[0].count) + 0.5)
    inputs = attention_inputs(1, 1, 40, 64, 30, torch.float16)[:3]
    engines.assert_gradients("flashinfer", plan, inputs, with_lse=True)


def test_heads_are_planned_in_portions(emulator, monkeypatch):
    """No more keys are listed at once than fit into memory."""
    plan = PLANS["lists per head"]()
    q, k, v, _ = attention_inputs(2, 2, 90, 64, 70, torch.float16)
    whole = attend(q, k, v, plan, backend="flashinfer")
    (entries,) = emulator.planned
    most = max(3 * 70, entries // 3)
    monkeypatch.setattr(flashinfer_backend, "_ENTRIES", most)
    parts = attend(q, k, v, plan, backend="flashinfer")
    assert torch.equal(parts, whole)
    assert len(emulator.planned) > 2 and max(emulator.planned[1:]) <= most
    monkeypatch.setattr(flashinfer_backend, "_MOST", 10)
    with pytest.raises(ValueError, match=r"of one head, and counts to 10; use larger blocks, or"):
        attend(q, k, v, plan, backend="flashinfer")


@pytest.mark.parametrize(
    "architecture, dim, reason",
    [
        ("sm_90", 64, None),
        ("sm_100", 256, None),
        ("sm_80", 128, None),
        ("sm_75", 64, "it knows the architectures sm_80,"),
        ("sm_90", 96, "head dim must be 64 to 128 in steps of 64, got 96"),
    ],
)
def test_which_gpus_and_tensors(monkeypatch, architecture, dim, reason):
    monkeypatch.setattr(flashinfer_backend, "machine_reasons", lambda asked: [])
    monkeypatch.setattr(capabilities, "architecture_of", lambda device: architecture)
    asked = capabilities.Demand(torch.device("cuda"), torch.float16, dim, 17, 300, ("backward",))
    reasons = capabilities.refusals(flashinfer_backend, asked)
    assert [x[: len(reason)] for x in reasons] == [reason] if reason else reasons == []


@pytest.mark.parametrize(
    "versions, message",
    [
        ({"flashinfer-python": "0.7.4", "triton": "3.8.0"}, None),
        ({"flashinfer-python": "0.7.4.post1", "triton": "3.8.0"}, None),
        ({"flashinfer-python": "0.8.0rc1", "triton": "3.8.0"}, None),
        ({}, "flashinfer-python is not installed (pip install"),
        ({"flashinfer-python": "0.6.18"}, "flashinfer-python is 0.6.18, and 0.7.4 is needed"),
        ({"flashinfer-python": "0.7.4rc1"}, "flashinfer-python is 0.7.4rc1, and 0.7.4 is needed"),
        ({"flashinfer-python": "0.7.4"}, "triton is not installed"),
    ],
)
def test_the_wheels(monkeypatch, versions, message):
    monkeypatch.setattr(wheels, "installed_version", versions.get)
    asked = capabilities.Demand(torch.device("cuda"), torch.float16, needs=("backward",))
    reasons = flashinfer_backend.machine_reasons(asked)
    assert [x[: len(message)] for x in reasons] == [message] if message else reasons == []


def test_without_a_gpu_it_says_what_can():
    q = torch.zeros(1, 1, 90, 64, dtype=torch.float16)
    plan = random_plan(EVEN, EVEN, rule=random_rule(90, 90))
    reasons = not_supported_reasons("flashinfer", q, q, q, plan)
    assert reasons[0] == "it runs on cuda, got tensors on cpu" and len(reasons) == 2
    with pytest.raises(ValueError, match=r"What can: .*'native'"):
        attend(q, q, q, plan, backend="flashinfer")


def test_a_negative_scale(emulator):
    engines.assert_negative_scale("flashinfer")


@pytest.mark.slow
def test_the_emulator_has_the_signatures_of_the_wheel(tmp_path):
    """Read, not imported: that takes a GPU's libraries."""
    package = engines.wheel(tmp_path, f"flashinfer-python=={VERSION}") / "flashinfer"
    theirs, ours = engines.signatures(package / "sparse.py"), engines.signatures(__file__)
    for name in ("__init__", "plan", "run"):
        name = f"VariableBlockSparseAttentionWrapper.{name}"
        assert ours[name] == theirs[name]
