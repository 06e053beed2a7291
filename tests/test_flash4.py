"""The flash4 backend against an emulator of flash-attn-4's contract. No GPU is here to run it."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import engines
import pytest
import torch
from interpreter import PYTHON
from random_plans import even_blocks, ragged_blocks, random_plan, random_rule, random_tail

from dittfast import attend
from dittfast.attention import not_supported_reasons
from dittfast.kernels import capabilities, flash4_backend, wheels
from dittfast.testing import attention_inputs

VERSION = "4.0.0b36"


class BlockSparseTensorsTorch(NamedTuple):
    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor | None = None
    full_block_idx: torch.Tensor | None = None
    cu_total_m_blocks: torch.Tensor | None = None
    cu_block_idx_offsets: torch.Tensor | None = None
    block_size: tuple[int, int] | None = None
    dq_write_order: torch.Tensor | None = None
    dq_write_order_full: torch.Tensor | None = None
    spt: bool | None = None


def lists_of(counts, indices, shape, rows, columns):
    """``{row: blocks}`` for every batch row and head; what the package checks is checked here."""
    assert counts.dtype == indices.dtype == torch.int32
    assert counts.shape[2:] == (rows,) and indices.shape[2] == rows and indices.shape[3] <= columns
    for dim in (0, 1):
        assert counts.shape[dim] in (1, shape[dim]) and indices.shape[dim] in (1, shape[dim])
    counts, indices = counts.expand(*shape, -1), indices.expand(*shape, -1, -1)
    for at in itertools.product(*map(range, (*shape, rows))):
        listed = indices[at][: counts[at]].tolist()
        assert all(0 <= x < columns for x in listed) and len(set(listed)) == len(listed)
        yield at, listed


def seen_pairs(q, k, tensors, mask_mod, aux_tensors, backward=False):
    """``[B, H, Sq, Sk]`` bool: what full lists show, and partial lists through mask_mod."""
    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    q_size, kv_size = tensors.block_size
    if EMULATED["architecture"] == "sm_90":
        assert q_size % 64 == 0 and (kv_size == 128 if backward else kv_size % 16 == 0)
        assert q_size % 128 == 0 or not backward
        assert kv_size <= 128
    else:
        assert q_size % 256 == 0 and kv_size % 128 == 0
    rows, columns = -(-queries // q_size), -(-keys // kv_size)
    seen = torch.zeros(batch, heads, queries, keys, dtype=torch.bool)
    both = ((tensors.mask_block_cnt, tensors.mask_block_idx, False),
            (tensors.full_block_cnt, tensors.full_block_idx, True))  # fmt: skip
    shape = (batch, heads)
    for counts, indices, full in both:
        size = (columns, rows) if backward else (rows, columns)
        for (b, h, one), listed in lists_of(counts, indices, shape, *size):
            for other in listed:
                row, column = (other, one) if backward else (one, other)
                i = torch.arange(row * q_size, min((row + 1) * q_size, queries))[:, None]
                j = torch.arange(column * kv_size, min((column + 1) * kv_size, keys))
                assert not seen[b, h, i, j].any()
                kept = torch.ones(i.numel(), j.numel(), dtype=torch.bool)
                if not full:
                    kept = mask_mod([b], [h], [i], [j], None, aux_tensors) & kept
                seen[b, h, i, j] = kept
    return seen


def modified(q, k, scale, score_mod, aux_tensors, seen):
    """Logits after score_mod, -inf where nothing is seen: ``[B, H, Sq, Sk]`` fp32."""
    q, k = (x.transpose(1, 2).float() for x in (q, k))
    scores = q @ k.mT * scale
    if score_mod is not None:
        for b, h in itertools.product(*map(range, scores.shape[:2])):
            i, j = torch.arange(scores.shape[2])[:, None], torch.arange(scores.shape[3])
            scores[b, h] = score_mod(
                scores[b, h], [b], [h], q_idx=[i], kv_idx=[j], seqlen_info=None,
                aux_tensors=aux_tensors,
            )  # fmt: skip
    return scores.masked_fill(~seen, -torch.inf)


def flash_attn_func(
    q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
    deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None,
    aux_scalars=None, block_sparse_tensors=None, block_sparse_tensors_bwd=None, return_lse=False,
    gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
):  # fmt: skip
    assert softmax_scale > 0, "the maximum is taken before"
    assert q.shape[2] == k.shape[2] and all(x.stride(-1) == 1 for x in (q, k, v))
    assert q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0
    assert aux_tensors is None or all(x.is_contiguous() for x in aux_tensors)
    seen = seen_pairs(q, k, block_sparse_tensors, mask_mod, aux_tensors)
    logits = modified(q, k, softmax_scale, score_mod, aux_tensors, seen)
    lse = logits.logsumexp(-1)
    p = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    out = (p @ v.transpose(1, 2).float()).to(q.dtype).transpose(1, 2)
    return out, lse if return_lse else None


def _flash_attn_bwd(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
    window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False,
    num_stages_Q=2, num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False,
    AtomLayoutMSdP=2, AtomLayoutNdKV=2, AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None,
    cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
    deterministic=False, dq=None, dk=None, dv=None, score_mod=None, score_mod_bwd=None,
    mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None, dlse=None,
    learnable_sink=None,
):  # fmt: skip
    EMULATED["backward"] += 1
    assert lse.dtype == torch.float32 and out.dtype == dout.dtype == q.dtype
    assert (score_mod is None) == (score_mod_bwd is None)
    seen = seen_pairs(q, k, block_sparse_tensors, mask_mod, aux_tensors, backward=True)
    logits = modified(q, k, softmax_scale, score_mod, aux_tensors, seen)
    p = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    q, k, v, out, dout = (x.transpose(1, 2).float() for x in (q, k, v, out, dout))
    delta = (dout * out).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse[..., None].float()
    ds = p * (dout @ v.mT - delta)
    if score_mod_bwd is not None:
        ds = score_mod_bwd(ds, logits, 0, 0, q_idx=0, kv_idx=0, seqlen_info=None, aux_tensors=())
    ds = ds * softmax_scale
    grads = ds @ k, ds.mT @ q, p.mT @ dout
    return tuple(x.transpose(1, 2).bfloat16() for x in grads)


EMULATED = {"architecture": "sm_90", "backward": 0}


@pytest.fixture
def emulator(monkeypatch):
    """The package, and a GPU in which CPU tensors lie; tells what ran."""
    cute = SimpleNamespace(jit=lambda function: function)
    fake = {
        "cutlass": SimpleNamespace(Float32=torch.float32, Boolean=torch.bool, cute=cute),
        "flash_attn": ModuleType("flash_attn"),
        "flash_attn.cute": SimpleNamespace(
            utils=SimpleNamespace(scalar_to_ssa=lambda x, dtype: x.to(dtype))
        ),
        "flash_attn.cute.interface": SimpleNamespace(
            flash_attn_func=flash_attn_func, _flash_attn_bwd=_flash_attn_bwd
        ),
        "flash_attn.cute.block_sparsity": SimpleNamespace(
            BlockSparseTensorsTorch=BlockSparseTensorsTorch
        ),
    }
    for name, module in fake.items():
        monkeypatch.setitem(sys.modules, name, module)

    def on(architecture):
        monkeypatch.setitem(EMULATED, "architecture", architecture)
        engines.as_on_a_gpu(monkeypatch, flash4_backend, architecture)
        return EMULATED

    made = (flash4_backend._score_mods, flash4_backend._mask_mod)
    for function in made:
        function.cache_clear()
    monkeypatch.setitem(EMULATED, "backward", 0)
    yield on
    for function in made:
        function.cache_clear()


EXACT = engines.FULL_BLOCKS | engines.RULES_AND_WEIGHTS


@pytest.mark.parametrize("name", EXACT)
def test_methods(emulator, name):
    emulator("sm_90")
    engines.assert_exact("flash4", *EXACT[name])


def weight(*shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    return x.masked_fill(x < -1, -torch.inf)


def plans(architecture):
    """Blocks that its own backward pass takes on this architecture, of every kind."""
    q, kv = (128, 128) if architecture == "sm_90" else (256, 128)
    even, shorter = even_blocks(300, q), even_blocks(260, kv)
    odd = ragged_blocks(300, q, 1, shuffle=True), ragged_blocks(260, kv, 2, shuffle=True)
    ends = {"out_scale": torch.rand(1, 2, even.count) + 0.5}
    ends["out_residual"] = torch.randn(1, 1, even.count, 32)
    yield random_plan(even, shorter, (2, 2))
    for seed, metric in enumerate(("disc", "raster", "box")):
        rule = random_rule(300, 260, metric, sink_frames=seed)
        yield random_plan(*odd, (1, 2), rule, seed=seed)
    yield random_plan(*odd, kv_log_weight=weight(1, 2, 260), seed=3)
    rule = random_rule(300, 260)
    yield random_plan(even, shorter, rule=rule, kv_log_weight=weight(2, 1, 260), **ends)
    yield random_plan(*odd, (1, 2), seed=4)
    yield random_plan(even, shorter, (1, 2), **random_tail(even, 32))


@pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])
@pytest.mark.parametrize("number", range(8))
def test_plans_forward_and_backward(emulator, architecture, number):
    ran = emulator(architecture)
    plan = next(itertools.islice(plans(architecture), number, None))
    inputs = attention_inputs(2, 2, 300, 32, 260, torch.bfloat16)[:3]
    engines.assert_gradients("flash4", plan, inputs, with_lse=number < 7)
    assert ran["backward"] == 1


def test_gradients_of_small_blocks_are_ours(emulator):
    """In fp16, which Triton's interpreter multiplies rightly."""
    ran = emulator("sm_90")
    blocks = ragged_blocks(40, 32, 3, shuffle=True)
    plan = random_plan(blocks, blocks, rule=random_rule(40, 40), kv_log_weight=weight(1, 1, 40))
    inputs = attention_inputs(1, 1, 40, 16, dtype=torch.float16)[:3]
    engines.assert_gradients("flash4", plan, inputs, with_lse=True)
    assert ran["backward"] == 0


def test_deterministic_gradients_are_ours(emulator):
    ran = emulator("sm_90")
    blocks = even_blocks(70, 66)
    inputs = attention_inputs(1, 1, 70, 16, dtype=torch.float16)[:3]
    torch.use_deterministic_algorithms(True)
    try:
        engines.assert_gradients("flash4", random_plan(blocks, blocks), inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert ran["backward"] == 0


def test_functions_are_compiled_once_for_each_kind(emulator):
    """The package tells them apart by what they are, and compiles for each."""
    emulator("sm_90")
    for seed in range(3):
        blocks = ragged_blocks(90, 32, seed, shuffle=True)
        rule = random_rule(90, 90, seed=seed)
        plan = random_plan(blocks, blocks, rule=rule, kv_log_weight=weight(1, 1, 90), seed=seed)
        q, k, v, _ = attention_inputs(1, 2, 90, 16, dtype=torch.float16)
        attend(q, k, v, plan, backend="flash4")
    for made in (flash4_backend._score_mods, flash4_backend._mask_mod):
        assert made.cache_info().misses == 1


KNOWN = "it knows the architectures sm_90, sm_100, sm_103, sm_110, not "


@pytest.mark.parametrize(
    "architecture, dim, dtype, blocks, reason",
    [
        ("sm_90", 64, torch.bfloat16, (64, 128), None),
        ("sm_103", 128, torch.float16, (256, 256), None),
        ("sm_80", 64, torch.bfloat16, (128, 128), KNOWN + "sm_80"),
        ("sm_120", 64, torch.bfloat16, (128, 128), KNOWN + "sm_120"),
        ("sm_90", 256, torch.bfloat16, (128, 128), "head dim must be 16 to 128"),
        ("sm_90", 64, torch.float32, (128, 128), "it computes float16, bfloat16, got float32"),
        ("sm_100", 64, torch.float16, (128, 128), "q blocks must be of 129 to 256 tokens"),
    ],
)
def test_which_gpus_and_tensors(monkeypatch, architecture, dim, dtype, blocks, reason):
    monkeypatch.setattr(flash4_backend, "machine_reasons", lambda asked: [])
    monkeypatch.setattr(capabilities, "architecture_of", lambda device: architecture)
    asked = capabilities.Demand(torch.device("cuda"), dtype, dim, *blocks, ("backward",))
    reasons = capabilities.refusals(flash4_backend, asked)
    assert [x[: len(reason)] for x in reasons] == [reason] if reason else reasons == []


WHEELS = {
    "flash-attn-4": VERSION, "nvidia-cutlass-dsl": "4.8.1", "nvidia-cutlass-dsl-libs-cu13": "4.8.1",
    "triton": "3.8.0",
}  # fmt: skip


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, None),
        ({"flash-attn-4": "4.0.0"}, None),
        ({"flash-attn-4": None}, "flash-attn-4 is not installed (pip install --pre "),
        ({"flash-attn-4": "4.0.0b20"}, "flash-attn-4 is 4.0.0b20, and 4.0.0b36 is needed (pip"),
        ({"nvidia-cutlass-dsl": None}, "nvidia-cutlass-dsl is not installed"),
        ({"nvidia-cutlass-dsl-libs-cu13": None}, "nvidia-cutlass-dsl-libs-cu13 or nvidia-cutlass-"),
        ({"triton": None}, "triton is not installed"),
    ],
)
def test_the_wheels(monkeypatch, change, message):
    monkeypatch.setattr(wheels, "installed_version", (WHEELS | change).get)
    asked = capabilities.Demand(torch.device("cuda"), torch.float16, needs=("backward",))
    reasons = flash4_backend.machine_reasons(asked)
    assert [x[: len(message)] for x in reasons] == [message] if message else reasons == []


def test_without_a_gpu_it_says_what_can():
    q = torch.zeros(1, 1, 64, 16, dtype=torch.float16)
    plan = random_plan(even_blocks(64, 32), even_blocks(64, 32))
    (reason,) = not_supported_reasons("flash4", q, q, q, plan)
    assert reason == "it runs on cuda, got tensors on cpu"
    with pytest.raises(ValueError, match=r"flash4 backend cannot run this.*What can: .*'native'"):
        attend(q, q, q, plan, backend="flash4")


def test_a_negative_scale(emulator):
    emulator("sm_90")
    engines.assert_negative_scale("flash4")


@pytest.mark.slow
def test_the_emulator_has_the_signatures_of_the_wheel(tmp_path):
    """Read, not imported: that takes a GPU's libraries."""
    package = engines.wheel(tmp_path, f"flash-attn-4=={VERSION}") / "flash_attn/cute"
    theirs, ours = engines.signatures(package / "interface.py"), engines.signatures(__file__)
    for name in ("flash_attn_func", "_flash_attn_bwd"):
        assert ours[name] == theirs[name]
    lists = package / "block_sparsity.py", __file__
    assert len({str(engines.fields(path, "BlockSparseTensorsTorch")) for path in lists}) == 1


# What flash-attn-4 needs to compile without a GPU, but for PyTorch.
COMPILER = [
    f"flash-attn-4=={VERSION}", *(f"nvidia-cutlass-dsl{x}==4.8.1" for x in (
        "", "-libs-core", "-libs-base", "-libs-cu13")),
    "quack-kernels==0.6.5", "apache-tvm-ffi==0.1.15.post2", "torch-c-dlpack-ext==0.1.5",
    "einops==0.8.2", "cuda-python==13.4.4", "cuda-bindings==13.5.0", "cuda-core==1.2.2",
    "cuda-pathfinder==1.9.1", "protobuf",
]  # fmt: skip


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    """A folder with its wheels, 130 MB to fetch."""
    return engines.wheel(tmp_path_factory.mktemp("compiler"), *COMPILER)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(7))
def test_its_kernels_compile_with_our_functions(compiler, number):
    """For Hopper, forward and backward: every rule, padding, log weights.

    The kernels for Blackwell ask the driver for the GPU while they are compiled.
    """
    root = Path(__file__).resolve().parent.parent
    paths = root, root / "tests", compiler, compiler / "nvidia_cutlass_dsl/dsl_packages"
    wanted = {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "FLASH_ATTENTION_ARCH": "sm_90",
        "CUTE_DSL_ARCH": "sm_90a",
        "FLASH_ATTENTION_NUM_SMS": "132",
    }
    command = [*PYTHON, str(root / "tests/flash4_compile.py"), str(number)]
    done = subprocess.run(
        command, env=os.environ | wanted, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.stdout.strip().endswith("compiled"), done.stderr[-3000:]
