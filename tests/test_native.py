"""The native CPU backend against the dense fp64 oracle, and against one that reads raw plans."""

import os
import threading

import pytest
import torch
from parity import (
    VIEWS,
    assert_parity,
    even_blocks,
    ragged_blocks,
    random_plan,
    random_rule,
    results,
)

from dittfast import Layout, attend, methods
from dittfast.kernels import native
from dittfast.plan import METRICS, Plan, TokenRule
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
    assert_parity(plan, "native", batch=2, heads=3, head_dim=32)


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
    assert_parity(plan, "native")


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
    q = torch.zeros(1, 1, 8, 16, device="meta", dtype=torch.float64)
    assert native.not_supported_reasons(q, q, q) == [
        "it needs CPU tensors, got meta",
        "it computes float32, float16, bfloat16, got float64; backend='cpu' computes float64",
    ]
    plan = Plan.from_block_mask(torch.eye(2, dtype=torch.bool), *[even_blocks(8, 4)] * 2)
    q = torch.zeros(1, 1, 8, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="the native backend cannot run this: it computes"):
        attend(q, q, q, plan, backend="native")
    assert attend(q, q, q, plan).dtype == torch.float64


@pytest.mark.parametrize("with_epilogue", [False, True])
def test_opcheck(with_epilogue):
    blocks = ragged_blocks(40, 16, 17)
    fields = {}
    if with_epilogue:
        fields = {
            "out_scale": torch.rand(1, 1, blocks.count) + 0.5,
            "out_residual": torch.rand(1, 2, blocks.count, 16),
        }
    t = random_plan(blocks, blocks, rule=random_rule(40, 40), **fields).tensors()
    number = t._fields.index("metric")
    tensors = list(t._replace(out_scale=None, out_residual=None)[:number])
    inputs = [x.requires_grad_() for x in attention_inputs(1, 2, 40, 16)[:3]]
    arguments = *inputs, tensors, t.out_scale, t.out_residual, list(t[number:]), 0.25
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


# ---- plans of every kind, against an oracle that reads nothing but the plan's raw fields ----


def _visible(plan: Plan, batch: int, head: int) -> torch.Tensor:
    """``[num_queries, num_keys]`` bool, token by token, as Plan and TokenRule document it."""
    rule, n_q, n_k = plan.rule, plan.num_queries, plan.num_keys
    at = batch % plan.kv_indices.shape[0], head % plan.kv_indices.shape[1]
    indices, count = plan.kv_indices[at].tolist(), plan.kv_num_blocks[at].tolist()
    full = plan.kv_num_full_blocks[at].tolist()
    sides = []
    for blocks, total in ((plan.q_blocks, n_q), (plan.kv_blocks, n_k)):
        order = list(range(total)) if blocks.order is None else blocks.order.tolist()
        spans = zip(blocks.starts.tolist(), blocks.lengths.tolist())
        sides.append((order, [range(start, start + length) for start, length in spans]))
    (q_order, q_spans), (kv_order, kv_spans) = sides
    mask = torch.zeros(n_q, n_k, dtype=torch.bool)
    for row, queries in enumerate(q_spans):
        run = count[row] > len(indices[row])
        for slot in range(count[row]):
            keys = kv_spans[slot if run else indices[row][slot]]
            for i in queries:
                for j in keys:
                    seen = run or slot < full[row] or _kept(rule, i, j)
                    mask[q_order[i], kv_order[j]] = seen
    return mask


def _kept(rule: TokenRule, i: int, j: int) -> bool:
    q_frame, kv_frame = int(rule.q_frame[i]), int(rule.kv_frame[j])
    if q_frame == -1 or kv_frame == -1 or q_frame // 65536 != kv_frame // 65536:
        return True
    if kv_frame % 65536 < rule.sink_frames:
        return True
    q_place, kv_place = int(rule.q_place[i]), int(rule.kv_place[j])
    distance = abs(q_place - kv_place)
    if rule.metric == "disc":
        dy, dx = q_place // 65536 - kv_place // 65536, q_place % 65536 - kv_place % 65536
        distance = dy * dy + dx * dx
    apart = min(abs(q_frame - kv_frame), rule.limits.numel() - 1)
    return distance <= int(rule.limits[apart])


def _formula(q, k, v, plan: Plan, weight, scale: float):
    """Dense fp64 attention ``(out, lse)`` under the plan, k and v with fewer heads allowed."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    batch, heads = q.shape[:2]
    mask = torch.stack(
        [torch.stack([_visible(plan, b, h) for h in range(heads)]) for b in range(batch)]
    )
    logits = q @ k.mT * scale
    for x in (plan.kv_log_weight, weight):
        if x is not None:
            mask = mask & (x > -torch.inf)[:, :, None]
            logits = logits + x.double().clamp_min(-1e4)[:, :, None]
    blind = ~mask.any(-1)
    logits = logits.masked_fill(~mask, -torch.inf).masked_fill(blind[..., None], 0)
    out = (torch.softmax(logits, -1) @ v).masked_fill(blind[..., None], 0)
    block = torch.empty(plan.num_queries, dtype=torch.long)
    for n, (start, length) in enumerate(zip(*(x.tolist() for x in plan.q_blocks[:2]))):
        at = torch.arange(start, start + length)
        block[at if plan.q_blocks.order is None else plan.q_blocks.order[at].long()] = n
    if plan.out_scale is not None:
        out = out * plan.out_scale.double()[:, :, block, None]
    if plan.out_residual is not None:
        out = out + plan.out_residual.double()[:, :, block]
    return out, torch.logsumexp(logits, -1), blind


def _some_plan(draw):
    """A plan, its call's weight and the shapes of q and k, all drawn."""

    def upto(n):
        return int(torch.randint(1, n + 1, (), generator=draw))

    def maybe(make):
        return make() if upto(2) == 1 else None

    batch, kv_heads, groups, dim = upto(2), upto(2), upto(2), upto(40)
    heads = kv_heads * groups

    def broadcast():
        return (1 if upto(2) == 1 else batch), (1 if upto(2) == 1 else heads)

    n_q, n_k, seed = upto(70), upto(70), upto(10**6)
    q_blocks = ragged_blocks(n_q, upto(40), seed, shuffle=upto(2) == 1)
    kv_blocks = ragged_blocks(n_k, upto(40), seed + 1, shuffle=upto(2) == 1)
    frames = upto(4)
    options = dict(frames=frames, sink_frames=upto(frames + 1) - 1, seed=seed)
    rule = maybe(lambda: random_rule(n_q, n_k, METRICS[upto(2) - 1], **options))

    def weight():
        x = torch.randn(*broadcast(), n_k, generator=draw)
        return x.masked_fill(torch.rand(x.shape, generator=draw) < 0.3, -torch.inf)

    fields = {
        "kv_log_weight": maybe(weight),
        "out_scale": maybe(lambda: torch.rand(*broadcast(), q_blocks.count, generator=draw) + 0.5),
        "out_residual": maybe(
            lambda: torch.randn(*broadcast(), q_blocks.count, dim, generator=draw)
        ),
    }
    plan = random_plan(
        q_blocks, kv_blocks, broadcast(), rule, upto(10) / 10, seed,
        **{name: x for name, x in fields.items() if x is not None},
    )  # fmt: skip
    width = plan.kv_indices.shape[3]
    if width < kv_blocks.count:
        # Some rows become runs, longer than every list.
        row = torch.rand(plan.kv_num_blocks.shape, generator=draw) < 0.2
        length = kv_blocks.count - upto(kv_blocks.count - width) + 1
        counts = plan.kv_num_blocks.masked_fill(row, length)
        full = torch.where(row, length, plan.kv_num_full_blocks)
        indices = plan.kv_indices.masked_fill(row[..., None], 0)
        plan = plan.replace(kv_indices=indices, kv_num_blocks=counts, kv_num_full_blocks=full)
    return plan, maybe(weight), (batch, heads, kv_heads, dim)


def _check_random_plan(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    plan, weight, (batch, heads, kv_heads, dim) = _some_plan(draw)
    dtype = list(DTYPES.values())[seed % 3]
    scale = [dim**-0.5, -0.3, 1.0][seed % 7 % 3]

    def tensor(heads, n):
        x = torch.randn(batch, heads, n, dim, generator=draw).to(dtype)
        return list(VIEWS.values())[seed % 4](x)

    inputs = [tensor(heads, plan.num_queries), *(tensor(kv_heads, plan.num_keys) for _ in "kv")]
    grad = tensor(heads, plan.num_queries)
    grad_lse = torch.randn(batch, heads, plan.num_queries, generator=draw)

    def run(function, cast):
        leaves = [x.to(cast).requires_grad_() for x in inputs]
        fields = {"out_scale": plan.out_scale, "out_residual": plan.out_residual}
        fields = {n: x.clone().requires_grad_() for n, x in fields.items() if x is not None}
        out, lse, blind = function(*leaves, plan.replace(**fields) if fields else plan)
        total = (out * grad).sum() + (lse.masked_fill(blind, 0) * grad_lse).sum()
        grads = torch.autograd.grad(total, [*leaves, *fields.values()])
        return out.detach(), lse.detach().masked_fill(blind, -torch.inf), *grads

    def ours(q, k, v, plan):
        options = dict(scale=scale, return_lse=True, backend="native")
        out, lse = attend(q, k, v, plan, kv_log_weight=weight, **options)
        return out, lse, lse == -torch.inf

    found = run(ours, dtype)
    exact = run(lambda *x: _formula(*x, weight, scale), torch.float64)
    # A gradient is a sum over up to 70 rows of products that each carry the rounding of `out`.
    limit = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    names = "out", "lse", "dq", "dk", "dv", "d epilogue", "d epilogue"
    for name, a, b in zip(names, found, exact):
        if name == "lse":
            assert torch.equal(a == -torch.inf, b == -torch.inf), seed
            a, b = (x.masked_fill(x == -torch.inf, 0) for x in (a, b))
        worst = float((a.double() - b.double()).abs().max())
        assert worst <= limit * max(1.0, float(b.abs().max())), (seed, name, worst)


@pytest.mark.parametrize("part", range(4))
def test_random_plans(part):
    for seed in range(15 * part, 15 * (part + 1)):
        _check_random_plan(seed)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(30))
def test_three_thousand_random_plans(part):
    for seed in range(100 * (part + 1), 100 * (part + 2)):
        _check_random_plan(seed)
