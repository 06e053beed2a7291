"""The flex backend: what it hands to flex_attention, and compiled flex_attention itself.

Compiling takes many seconds a graph, and gradients need a GPU. So most tests put an emulator in
place of the compiled function: it computes densely what its lists, mask_mod and score_mod say.
"""

import itertools
from types import SimpleNamespace

import flex_fuzz
import pytest
import torch
from random_plans import (
    VIEWS,
    assert_matches_oracle,
    even_blocks,
    ragged_blocks,
    random_plan,
    random_rule,
)

from dittfast import Capabilities, Layout, attend, methods
from dittfast.attention import choose_backend, method_call, not_supported_reasons
from dittfast.kernels import capabilities, equal_blocks, flex
from dittfast.layout import make_blocks
from dittfast.measure import bench
from dittfast.plan import TAIL, Plan
from dittfast.testing import attention_inputs, eager_attention


def mask_of(block_mask, shape):
    """What a BlockMask lets through, its lists first of all: mask_mod counts in partial blocks."""
    height, width = block_mask.BLOCK_SIZE
    zero = torch.tensor(0)
    mask = torch.zeros(*block_mask.kv_indices.shape[:2], *shape, dtype=torch.bool)
    for b, h, row in itertools.product(*(range(n) for n in block_mask.kv_num_blocks.shape)):
        rows = torch.arange(row * height, min((row + 1) * height, shape[0]))[:, None]
        full = block_mask.full_kv_indices[b, h, row, : block_mask.full_kv_num_blocks[b, h, row]]
        partial = block_mask.kv_indices[b, h, row, : block_mask.kv_num_blocks[b, h, row]]
        assert not set(full.tolist()) & set(partial.tolist())
        for col in full.tolist() + partial.tolist():
            cols = torch.arange(col * width, min((col + 1) * width, shape[1]))
            whole = col in full.tolist()
            mask[b, h, rows, cols] = whole or block_mask.mask_mod(zero, zero, rows, cols)
    return mask


def emulated(q, k, v, score_mod, block_mask, scale, enable_gqa, kernel_options, return_aux):
    """flex_attention by its documentation, in fp32."""
    assert enable_gqa == (q.shape[1] != k.shape[1])
    dtype, groups = q.dtype, q.shape[1] // k.shape[1]
    q, k, v = (x.float() for x in (q, k, v))
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    assert block_mask.seq_lengths == (q.shape[2], k.shape[2])
    logits = q @ k.mT * scale
    if score_mod is not None:
        b, h, i, j = (torch.arange(n) for n in logits.shape)
        places = b[:, None, None, None], h[:, None, None], i[:, None], j
        logits = score_mod(logits, *places)
    logits = logits.masked_fill(~mask_of(block_mask, logits.shape[2:]), -torch.inf)
    lse = logits.logsumexp(-1)
    p = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    out = (p @ v).to(dtype)
    if return_aux is None:
        return out
    from torch.nn.attention.flex_attention import AuxOutput

    return out, AuxOutput(lse=lse)


@pytest.fixture
def emulator(monkeypatch):
    """The forms that were asked for; the emulator runs them."""
    forms = []

    def compiled(form):
        forms.append(form)
        return flex._traced(form, emulated)

    monkeypatch.setattr(flex, "_compiled", compiled)
    return forms


@pytest.fixture
def as_on_a_gpu(emulator, monkeypatch):
    """lse and gradients from flex_attention itself, as it has them on GPUs."""
    both = Capabilities(("cpu",), flex._DTYPES, **flex._BOTH)
    monkeypatch.setattr(flex, "CAPABILITIES", (both,))
    monkeypatch.setattr(flex, "_tells_lse", lambda device: True)
    return emulator


def weight_of(*shape):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    weight[..., ::5] = -torch.inf
    return weight


PLANS = {
    "even": lambda: random_plan(even_blocks(122, 32), even_blocks(64, 16)),
    "per head, ragged": lambda: random_plan(
        ragged_blocks(63, 20, 1, shuffle=True), ragged_blocks(90, 33, 2, shuffle=True), (2, 2)
    ),
    "rule": lambda: random_plan(
        even_blocks(128, 64), even_blocks(111, 32), (1, 2), random_rule(128, 111, sink_frames=1)
    ),
    "rule, ragged": lambda: random_plan(
        ragged_blocks(70, 16, 3, shuffle=True),
        ragged_blocks(85, 12, 4),
        rule=random_rule(70, 85, "raster", frames=3),
    ),
    "everything": lambda: random_plan(
        ragged_blocks(40, 9, 5, shuffle=True),
        ragged_blocks(50, 16, 6, shuffle=True),
        (2, 2),
        random_rule(40, 50, sink_frames=2),
        kv_log_weight=weight_of(2, 1, 50),
        out_scale=torch.rand(1, 2, ragged_blocks(40, 9, 5).count) + 0.5,
        out_residual=torch.randn(2, 1, ragged_blocks(40, 9, 5).count, 16),
    ),
    "tail": lambda: random_plan(
        ragged_blocks(40, 9, 5, shuffle=True),
        ragged_blocks(50, 16, 6),
        rule=random_rule(40, 50),
        out_scale=torch.rand(1, 2, ragged_blocks(40, 9, 5).count) + 0.5,
        tail_lse=torch.randn(2, 2, ragged_blocks(40, 9, 5).count),
        tail_value=torch.randn(1, 2, ragged_blocks(40, 9, 5).count, 16),
    ),
    "large blocks": lambda: random_plan(even_blocks(290, 140), even_blocks(300, 150)),
    "nothing is seen": lambda: random_plan(
        even_blocks(20, 8), even_blocks(20, 8), rule=random_rule(20, 20, keeps=False), density=0
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_plans_forward_and_backward(as_on_a_gpu, name, dtype):
    assert_matches_oracle(PLANS[name](), "flex", batch=2, dtype=dtype)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("size", [1.0, 16.0])
def test_lse_where_flex_attention_has_none(emulator, name, size):
    """Found by two more passes; in bf16 too it is that of the given numbers."""
    plan = PLANS[name]()
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, _ = attention_inputs(2, 2, plan.num_queries, 16, plan.num_keys, dtype, size)
        weight = weight_of(1, 2, plan.num_keys)
        options = {"kv_log_weight": weight, "return_lse": True}
        _, lse = attend(q, k, v, plan, backend="flex", **options)
        wide = (x.double() for x in (q, k, v))
        _, expected = attend(*wide, plan, backend="reference", **options)
        unseen = expected == -torch.inf
        assert torch.equal(lse == -torch.inf, unseen)
        lse, expected = (x.double().masked_fill(unseen, 0) for x in (lse, expected))
        torch.testing.assert_close(lse, expected, rtol=1e-6, atol=1e-5)


def test_two_more_passes_only_where_lse_is_wanted(emulator):
    plan = PLANS["rule"]()
    q, k, v, _ = attention_inputs(1, 2, 128, 16, 111)
    out = attend(q, k, v, plan, backend="flex")
    assert len(emulator) == 1
    assert torch.equal(out, attend(q, k, v, plan, backend="flex", return_lse=True)[0])
    assert len(emulator) == 4
    # Forward mode needs it, and runs where there is no backward pass.
    run = lambda v: attend(q, k, v, plan, backend="flex")  # noqa: E731
    tangent = torch.func.jvp(run, (v,), (v,))[1]
    torch.testing.assert_close(tangent, out)


@pytest.mark.parametrize("lists", [1, 4], ids=["shared lists", "a list per head"])
def test_grouped_queries(as_on_a_gpu, lists):
    blocks = ragged_blocks(111, 32, 3)
    plan = random_plan(blocks, blocks, (1, lists), random_rule(111, 111))
    q, k, v, grad = attention_inputs(2, 4, 111, 16)
    k, v = k[:, ::2], v[:, ::2]
    found = []
    for backend, dtype in (("flex", torch.float32), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*leaves, plan, kv_log_weight=weight_of(2, 4, 111), backend=backend)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))])
    for ours, exact in zip(*found):
        assert ours.shape == exact.shape
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)
    assert all(form.grouped for form in as_on_a_gpu)


METHODS = {
    "radial": (methods.Radial(block_size=16), Layout.video(5, 4, 6, text=7)),
    "local": (methods.Local(window=3, tile=(1, 4, 4)), Layout.image(9, 10, text=5)),
    "local, down-sampled": (methods.Local(window=3, downsample=2), Layout.image(9, 10)),
    "log_linear": (methods.LogLinear(block_size=8, topk=2), Layout.image(9, 10, text=5)),
    "rectified": (methods.Rectified(block_size=16, topk=2), Layout.image(9, 10, text=5)),
    "neighborhood": (methods.Neighborhood(window=3), Layout.image(9, 10, text=5)),
    "topk": (methods.TopK(block_size=16, topk=2), Layout.image(9, 10, text=5)),
    "sol": (methods.Sol(block_size=16, tau=0.5), Layout.image(9, 10, text=5)),
    "sol, a tail per query": (methods.Sol(block_size=16, tail="query"), Layout.image(9, 10)),
    "padded text": (
        methods.Local(window=3),
        Layout.image(9, 10, text=12, text_lengths=[12, 4]),
    ),
}


def check_method(name, dtype):
    method, layout = METHODS[name]
    q, k, v, _ = attention_inputs(2, 2, layout.num_tokens, 32, dtype=dtype)
    plan, near_k, near_v, weight, scale = method_call(method, layout, q, k, v)
    options = dict(kv_log_weight=weight, scale=scale)
    found = attend(q, near_k, near_v, plan, backend="flex", **options)
    wide = [x.double() for x in (q, near_k, near_v)]
    exact = attend(*wide, plan, backend="reference", **options)
    plain = plan.replace(**dict.fromkeys(("out_scale", "out_residual", *TAIL)))
    eager = eager_attention(q, near_k, near_v, plain.to_dense_mask(), scale, plan.kv_log_weight)
    raw = attend(*wide, plain, backend="reference", **options)
    floor = float((eager.double() - raw).abs().max())
    assert float((found.double() - exact).abs().max()) <= 16 * floor + 1e-6


@pytest.mark.parametrize("name", METHODS)
def test_methods(emulator, name):
    check_method(name, torch.float32)


def test_what_it_cannot_do_is_said():
    q = torch.zeros(1, 1, 32, 16)
    plan = random_plan(even_blocks(32, 16), even_blocks(32, 16))
    assert not_supported_reasons("flex", q, q, q, plan) == flex.machine_reasons(
        capabilities.demand(q, q, q, plan)
    )
    leaf = q.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"no backward pass there.*What can: .*'native'"):
        attend(leaf, q, q, plan, backend="flex")
    asked = capabilities.Demand(torch.device("cuda"), torch.float16, 8)
    (reason,) = capabilities.refusals(flex, asked)
    assert reason.startswith("head dim must be from 16, got 8; pad q, k and v")


def test_auto_takes_it_on_gpus_that_our_kernels_do_not_know(monkeypatch):
    for architecture, expected in (("sm_90", "triton"), ("sm_75", "flex"), ("gfx1100", "flex")):
        monkeypatch.setattr(capabilities, "architecture_of", lambda device, a=architecture: a)
        assert choose_backend(torch.device("cuda"), torch.float16, 64) == expected


@pytest.mark.parametrize("missing", ["compiler", "AVX2"])
def test_where_it_cannot_be_compiled(monkeypatch, missing):
    if missing == "compiler":
        monkeypatch.setattr(flex.shutil, "which", lambda name: None)
    else:
        monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: False)
    q = torch.zeros(1, 1, 32, 16)
    with pytest.raises(ValueError, match=f"flex_attention needs a .*{missing}"):
        attend(q, q, q, Plan.full(32, block_size=16), backend="flex")


FLASH = [
    # architecture, blocks, head dim, dtype, whether the kernel is FlashAttention-4's
    ("sm_90", 128, 64, torch.bfloat16, True),
    ("sm_90", 64, 64, torch.bfloat16, False),
    ("sm_90", 128, 64, torch.float32, False),
    ("sm_90", 128, 256, torch.bfloat16, False),
    ("sm_80", 128, 64, torch.bfloat16, False),
    ("sm_120", 128, 64, torch.bfloat16, False),
    ("sm_100", 128, 128, torch.float16, False),
    ("sm_100", 256, 128, torch.float16, True),
    ("sm_103", 256, 60, torch.float16, False),
]


@pytest.mark.parametrize("architecture, blocks, dim, dtype, expected", FLASH)
def test_flash_attention_4_where_gpu_and_plan_allow(
    monkeypatch, architecture, blocks, dim, dtype, expected
):
    monkeypatch.setattr(flex, "architecture_of", lambda device: architecture)
    monkeypatch.setattr(flex, "_flash_installed", lambda: True)
    q = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(1, 1, 2 * blocks, dim))
    assert flex._takes_flash(q, (blocks, blocks), backward=False) == expected
    assert flex._takes_flash(q, (blocks, blocks), backward=True) == expected
    torch.use_deterministic_algorithms(True)
    try:
        assert not flex._takes_flash(q, (blocks, blocks), backward=True)
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(flex, "_flash_installed", lambda: False)
    assert not flex._takes_flash(q, (blocks, blocks), backward=False)
    assert not flex._takes_flash(torch.zeros(1, 1, 1, 64).half(), (256, 256), backward=False)


def test_the_options_of_kernels(as_on_a_gpu, monkeypatch):
    """No GPU is here to take them: FlashAttention-4, and tiles that divide small blocks."""
    tiles = {"bwd_BLOCK_M1": 16, "bwd_BLOCK_N1": 16, "bwd_BLOCK_M2": 16, "bwd_BLOCK_N2": 16}
    leaf = torch.zeros(1, 1, 256, 16, requires_grad=True)
    for flash, block_size, expected in (
        (True, 128, {"BACKEND": "FLASH"}),
        (False, 128, {}),
        (False, 9, tiles),
    ):
        monkeypatch.setattr(flex, "_takes_flash", lambda *_, f=flash, **__: f)
        attend(
            leaf, leaf, leaf, Plan.full(256, block_size=block_size), backend="flex"
        ).sum().backward()
        assert [dict(form.options) for form in as_on_a_gpu[-2:]] == [expected] * 2


def test_lists_that_differ_need_no_other_form(emulator):
    """Also rules, weights, permutations, epilogues and numbers of tokens."""
    for seed in range(12):
        tokens = 75 + 5 * seed
        blocks = ragged_blocks(tokens, 16, seed, shuffle=seed % 2 == 0)
        count = blocks.count
        if not 9 <= count <= 16:
            continue
        fields = {"out_scale": torch.rand(1, 1, count) + 0.5} if seed % 3 == 0 else {}
        weight = torch.randn(1, 1, tokens) if seed % 4 else None
        rule = random_rule(tokens, tokens, seed=seed)
        plan = random_plan(blocks, blocks, rule=rule, seed=seed, runs=seed % 5 == 0, **fields)
        q, k, v, _ = attention_inputs(1, 2, tokens, 16)
        attend(q, k, v, plan, kv_log_weight=weight, backend="flex")
    assert len(emulator) > 3 and len(set(emulator)) == 1


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strided_tensors_and_nothing_written_on_them(emulator, view):
    plan = PLANS["even"]()
    q, k, v, _ = attention_inputs(2, 2, 122, 16, 64)
    expected = attend(q, k, v, plan, backend="flex")
    given = [view(x) for x in (q, k, v)]
    known = [set(vars(x)) for x in given]
    lists = vars(plan.kv_num_full_blocks).copy()
    out = attend(*given, plan, backend="flex")
    torch.testing.assert_close(out, expected)
    # Marks for torch.compile would make other graphs of the caller's.
    assert [set(vars(x)) for x in given] == known and vars(plan.kv_num_full_blocks) == lists


@pytest.mark.slow
def test_compiled_once():
    """One graph for all plans of a form, whatever their lists, rules, weights and lengths."""
    flex_fuzz.forget_graphs()
    before = flex_fuzz.graphs()
    for seed in range(5):
        flex_fuzz.compare(seed, torch.float32, "disc", lse=False)
    assert flex_fuzz.graphs() - before == 1


@pytest.mark.slow
@pytest.mark.parametrize("form", flex_fuzz.FORMS)
def test_a_thousand_plans(form):
    """125 plans each, of one form: three graphs, one for the output and two for lse."""
    flex_fuzz.forget_graphs()
    before = flex_fuzz.graphs()
    for seed in range(flex_fuzz.PLANS):
        flex_fuzz.check(form, seed)
    assert flex_fuzz.graphs() - before == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_methods_compiled(name, dtype):
    torch._dynamo.reset()
    check_method(name, dtype)


def test_it_is_never_run_uncompiled():
    """flex_attention would return dense attention without a word."""
    plan = random_plan(even_blocks(32, 16), even_blocks(32, 16), density=0)
    q = torch.zeros(1, 1, 32, 16)
    message = "looks at no block list, and torch.compile is off"
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match=message):
        attend(q, q, q, plan, backend="flex")


def test_slots():
    """Blocks of 3 and 2 tokens, shuffled, in blocks of 4."""
    order = torch.tensor([4, 0, 3, 1, 2])
    blocks = make_blocks(torch.tensor([2, 0]), torch.tensor([3, 2]), order)
    plan = Plan.from_block_mask(torch.ones(2, 2, dtype=torch.bool), blocks, blocks)
    one = equal_blocks.side(plan.tensors(), "q", 4)
    assert one.tokens[~one.padding].tolist() == [3, 1, 2, 4, 0]
    assert one.padding.tolist() == [False] * 3 + [True] + [False] * 2 + [True] * 2
    assert equal_blocks.slots_of_tokens(one, 5).tolist() == [5, 1, 2, 0, 4]
    even = Plan.full(10, block_size=4).tensors()
    assert equal_blocks.side(even, "kv", 4) is None
    assert equal_blocks.side(even, "kv", 4, whole_of=10).padding.sum() == 2


def test_lists_hold_runs_and_both_kinds_of_blocks():
    blocks = even_blocks(160, 16)
    plan = random_plan(blocks, blocks, (1, 2), random_rule(160, 160), density=0.3)
    assert plan.has_runs
    for t in (plan.tensors(), plan.tensors()._replace(worklist=flex.make_worklist(plan.tensors()))):
        found = flex.unpacked(t)
        state = torch.zeros(1, 2, 10, 10, dtype=torch.int)
        for value, count, listed in ((1, *found[:2]), (2, *found[2:])):
            for at in itertools.product(*map(range, count.shape)):
                state[at][listed[at][: count[at]].long()] += value
        from dittfast.block_lists import block_states

        lists = plan.kv_indices, plan.kv_num_blocks, plan.kv_num_full_blocks
        assert torch.equal(state.to(torch.int8), block_states(*lists, 10))


def test_bench_times_it_beside_attend(emulator):
    work = bench.Workload(Layout.image(16, 16), head_dim=16)
    method = methods.Local(5, tile=(1, 8, 8))
    row = bench.bench_attention(method, work, repeats=1)
    assert row["flex"]["seconds"]["p50"] > 0, row["flex"]
    backward = bench.Workload(Layout.image(16, 16), head_dim=16, backward=True)
    row = bench.bench_attention(method, backward, repeats=1)
    assert "no backward pass" in row["flex"]["not_run"]
