"""The Triton kernels against the dense fp64 oracle; in Triton's interpreter without a GPU."""

import oracle
import pytest
import torch
from random_plans import VIEWS, op_arguments, random_tail

from dittfast.attention import attend, not_supported_reasons
from dittfast.kernels import capabilities, triton_backend
from dittfast.kernels.launch_sizes import KernelConfig, LaunchConfig, launch_config
from dittfast.layout import Blocks, Layout, make_blocks, split_evenly
from dittfast.plan import METRICS, Plan, TokenRule
from dittfast.testing import assert_within_budget, attention_inputs, eager_attention

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
block_sparse = pytest.importorskip("dittfast.kernels.block_sparse")
pytestmark = pytest.mark.usefixtures("nan_empty", "quick_interpreter")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def ragged(num_tokens: int, block_size: int, seed: int, shuffled: bool = False) -> Blocks:
    """Blocks of 1 to ``block_size`` tokens, at least one of them whole, in some order of tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [min(block_size, num_tokens)]
    while (left := num_tokens - sum(lengths)) > 0:
        lengths.append(min(left, int(torch.randint(1, block_size + 1, (), generator=generator))))
    ends = torch.tensor(lengths).cumsum(0)
    order = torch.randperm(num_tokens, generator=generator) if shuffled else None
    by = torch.randperm(len(lengths), generator=generator)
    return make_blocks((ends - torch.tensor(lengths))[by], torch.tensor(lengths)[by], order)


def even(num_tokens: int, block_size: int) -> Blocks:
    return make_blocks(*split_evenly(0, num_tokens, block_size))


def random_plan(q_blocks, kv_blocks, lists=(1, 1), seed=0, rule=None, density=0.4, **fields):
    """Random block lists, with partial blocks where there is a rule; every row keeps a block."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*lists, q_blocks.count, kv_blocks.count)
    state = (torch.rand(shape, generator=generator) < density).int() * 2
    state.scatter_(-1, torch.randint(0, shape[-1], (*shape[:-1], 1), generator=generator), 2)
    if rule is not None:
        state -= ((torch.rand(shape, generator=generator) < 0.5) & (state == 2)).int()
    count = (state > 0).sum(-1, dtype=torch.int32)
    by = torch.argsort(state, dim=-1, descending=True, stable=True).int()[..., : int(count.max())]
    # What stands behind the end of a list is not to be read.
    by = torch.where(torch.arange(by.shape[-1]) < count[..., None], by, 1 << 30)
    full = (state == 2).sum(-1, dtype=torch.int32)
    return Plan(by.contiguous(), count, full, q_blocks, kv_blocks, rule=rule, **fields)


def random_rule(metric, num_q, num_k, num_limits, seed=0, sink_frames=0) -> TokenRule:
    """A rule over tokens scattered over two grids of five frames, some of them context."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, n):
        return torch.randint(low, high, (n,), generator=generator, dtype=torch.int32)

    def frames(n):
        frame = draw(0, 2, n) << 16 | draw(0, 5, n)
        return torch.where(draw(0, 10, n) == 0, -1, frame).int()

    def places(n):
        return draw(0, 144, n) if metric == "raster" else draw(0, 12, n) << bits | draw(0, 12, n)

    bits = 4 if metric == "box" else 16
    limits = draw(-1, 60, num_limits)
    where = frames(num_q), places(num_q), frames(num_k), places(num_k)
    if metric != "box":
        return TokenRule(metric, limits, *where, sink_frames)
    last = torch.where(where[0] < 0, -1, where[0] + draw(0, 3, num_q)).int()
    return TokenRule(metric, limits[:0], *where, sink_frames, last, places(num_q), bits)


def run(q, k, v, grads, plan, backend, **options):
    """``{name: value}`` of out, lse and the gradients."""
    leaves = {name: x.detach().requires_grad_() for name, x in (("q", q), ("k", k), ("v", v))}
    for name in ("out_scale", "out_residual"):
        if getattr(plan, name) is not None:
            leaves[name] = getattr(plan, name).detach().to(q.device).requires_grad_()
    plan = plan.replace(**{n: x for n, x in leaves.items() if n.startswith("out_")})
    out, lse = attend(
        *(leaves[n] for n in "qkv"), plan, backend=backend, return_lse=True, **options
    )
    grads = [g.to(x.dtype) for g, x in zip(grads, (out, lse))]
    found = torch.autograd.grad((out, lse), list(leaves.values()), grads)
    named = {"out": out, "lse": lse} | {f"d{name}": g for name, g in zip(leaves, found)}
    return {name: x.detach().cpu() for name, x in named.items()}


def per_row(x, plan):
    """Values per query block, ``[..., nQ, D]``, as values per token."""
    rows = x.new_empty(*x.shape[:-2], plan.num_queries, x.shape[-1])
    for block, (start, length) in enumerate(zip(plan.q_blocks.starts, plan.q_blocks.lengths)):
        at = torch.arange(start, start + length)
        rows[..., at if plan.q_blocks.order is None else plan.q_blocks.order[at].long(), :] = x[
            ..., block : block + 1, :
        ]
    return rows


def run_eager(q, k, v, grads, plan, log_weight, scale):
    """What plain attention makes of the same inputs in their own dtype."""
    mask = oracle.mask(plan)
    shown = torch.ones(1, 1, plan.num_keys) if log_weight is None else torch.isfinite(log_weight)
    dead = ~(mask & shown[..., None, :].bool()).any(-1, keepdim=True)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    weight = None if log_weight is None else log_weight.clamp_min(-1e4)
    out = eager_attention(q, k, v, mask | dead, scale, weight)
    logits = (q @ k.transpose(-1, -2)) * scale
    if weight is not None:
        logits = logits + weight[..., None, :].to(logits)
    lse = torch.logsumexp(logits.masked_fill(~(mask | dead), -torch.inf), -1)
    out = out.masked_fill(dead, 0)
    if plan.out_scale is not None:
        out = out * per_row(plan.out_scale[..., None], plan).to(out)
    if plan.out_residual is not None:
        out = out + per_row(plan.out_residual, plan).to(out)
    grad_out, grad_lse = grads
    grads = grad_out.to(out), grad_lse.masked_fill(dead[..., 0], 0).to(lse)
    found = torch.autograd.grad((out, lse), (q, k, v), grads)
    return {"out": out.detach(), "lse": lse.detach()} | {f"d{n}": g for n, g in zip("qkv", found)}


def check(plan, batch=1, heads=1, head_dim=16, dtype=torch.float32, size=1.0, log_weight=None,
          scale=None, view=lambda x: x):  # fmt: skip
    """Assert that the kernels are about as close to the fp64 oracle as eager attention is."""
    q, k, v, grad_out = attention_inputs(
        batch, heads, plan.num_queries, head_dim, plan.num_keys, dtype, size
    )
    grads = grad_out, torch.randn(grad_out.shape[:3], generator=torch.Generator().manual_seed(9))
    scale = head_dim**-0.5 if scale is None else scale
    total = plan.kv_log_weight
    if log_weight is not None:
        total = log_weight if total is None else total + log_weight
    options = {"kv_log_weight": log_weight, "scale": scale}
    exact = oracle.results(q, k, v, *grads, plan, log_weight, scale)
    if log_weight is not None:
        options["kv_log_weight"] = log_weight.to(DEVICE)
    inputs = (view(x.to(DEVICE)) for x in (q, k, v))
    moved = view(grads[0].to(DEVICE)), grads[1].to(DEVICE)
    actual = run(*inputs, moved, plan.to(DEVICE), "triton", **options)
    eager = run_eager(q, k, v, grads, plan, total, scale)
    assert actual["out"].dtype == dtype and actual["lse"].dtype == torch.float32
    unseen = exact["lse"] == -torch.inf
    assert torch.equal(actual["lse"] == -torch.inf, unseen)
    for values in (exact, actual, eager):
        values["lse"] = values["lse"].masked_fill(unseen, 0)
    for name, value in actual.items():
        # The epilogue's gradients are sums of what bounds the others.
        budget = eager.get(name)
        if budget is None:
            tolerance = 1e-4 if dtype == torch.float32 else 2e-2
            assert float((value - exact[name]).abs().max()) <= tolerance * float(
                exact[name].abs().max()
            ), name
        else:
            # Gradients recompute the probabilities from the log-sum-exp, which eager does not.
            assert_within_budget(name, value, exact[name], budget, factor=8, floor=32)
    return actual


@pytest.mark.parametrize("lists", [(1, 1), (2, 1), (1, 2), (2, 2)], ids=str)
def test_lists_per_batch_row_and_per_head(lists):
    blocks = ragged(50, 32, seed=1)
    check(random_plan(blocks, blocks, lists, seed=2), batch=2, heads=2)


@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_head_dims(head_dim, dtype):
    plan = random_plan(ragged(40, 32, seed=3), ragged(50, 32, seed=4))
    check(plan, head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("size", [1.0, 4.0, 16.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_input_scales(size, dtype):
    blocks = even(128, 64)
    check(random_plan(blocks, blocks, density=0.6), head_dim=64, dtype=dtype, size=size)


@pytest.mark.parametrize(
    "q_size, kv_size, num_tokens",
    [(1, 1, 7), (8, 8, 31), (60, 60, 111), (128, 128, 150), (256, 256, 270), (100, 1, 50),
     *(pytest.param(*x, marks=pytest.mark.slow)
       for x in ((16, 16, 63), (120, 120, 150), (16, 128, 150), (200, 24, 201)))],
)  # fmt: skip
def test_block_sizes(q_size, kv_size, num_tokens):
    plan = random_plan(ragged(num_tokens, q_size, seed=5), ragged(num_tokens, kv_size, seed=6))
    check(plan)


@pytest.mark.parametrize("num_tokens", [63, 111])
def test_dense_plan(num_tokens):
    check(Plan.full(num_tokens, block_size=64))


def test_one_token():
    q, k, v, grad = attention_inputs(1, 1, 1, 16, device=DEVICE)
    found = run(q, k, v, (grad, torch.ones(1, 1, 1)), Plan.full(1).to(DEVICE), "triton")
    logit = (q.double() * k.double()).sum() / 4
    torch.testing.assert_close(found["out"], v.cpu())
    torch.testing.assert_close(found["lse"].double().sum(), logit.cpu())
    torch.testing.assert_close(found["dv"], grad.cpu())
    # out does not depend on q and k; lse does.
    torch.testing.assert_close(found["dq"], k.cpu() / 4, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["dk"], q.cpu() / 4, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [390, 1000])
def test_long_sequences(num_tokens):
    check(Plan.full(num_tokens, block_size=128), head_dim=64)
    blocks = ragged(num_tokens, 128, seed=32, shuffled=True)
    rule = random_rule("disc", num_tokens, num_tokens, 4)
    check(random_plan(blocks, blocks, (1, 2), rule=rule), heads=2, dtype=torch.float16)


def test_more_queries_and_more_keys():
    check(random_plan(ragged(20, 16, seed=7), ragged(100, 32, seed=8)))
    check(random_plan(ragged(100, 32, seed=9), ragged(20, 16, seed=10)))


@pytest.mark.parametrize("sides", ["q", "kv", "both"])
def test_orders(sides):
    q_blocks = ragged(50, 32, seed=11, shuffled=sides != "kv")
    kv_blocks = ragged(63, 32, seed=12, shuffled=sides != "q")
    check(random_plan(q_blocks, kv_blocks))


@pytest.mark.parametrize("num_limits", [1, 3, 5])
@pytest.mark.parametrize("metric", METRICS)
def test_token_rule(metric, num_limits):
    rule = random_rule(metric, 50, 70, num_limits, sink_frames=num_limits // 3)
    blocks = ragged(50, 32, seed=13), ragged(70, 64, seed=14, shuffled=True)
    check(random_plan(*blocks, rule=rule, density=0.7))


def test_token_rule_of_a_video():
    layout = Layout.video(3, 5, 4, text=5)
    blocks = layout.tiles((2, 3, 4))
    rule = TokenRule.from_layout(layout, "disc", [9, 4, -1], blocks.order, sink_frames=1)
    check(random_plan(blocks, blocks, rule=rule, density=0.8))


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, 2)], ids=str)
def test_log_weight(shape):
    weight = torch.randn(*shape, 50, generator=torch.Generator().manual_seed(15))
    weight[..., ::7] = -torch.inf
    blocks = ragged(50, 32, seed=16, shuffled=True)
    check(random_plan(blocks, blocks), batch=2, heads=2, log_weight=weight)


def test_log_weight_of_plan_and_call_add_up():
    plan = random_plan(even(64, 32), even(64, 32), kv_log_weight=torch.rand(1, 1, 64))
    check(plan, log_weight=torch.rand(1, 1, 64))


@pytest.mark.parametrize("partial", [False, True])
def test_queries_that_see_nothing(partial):
    blocks = even(96, 32)
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[0, 1:] = False
    weight = torch.zeros(1, 1, 96)
    weight[..., :32] = -torch.inf
    plan = Plan.from_block_mask(mask, blocks, blocks)
    if partial:
        place = torch.arange(96, dtype=torch.int32)
        frame = torch.zeros_like(place)
        frames = frame, place, frame, place
        rule = TokenRule("raster", torch.tensor([3], dtype=torch.int32), *frames)
        plan = plan.replace(rule=rule, kv_num_full_blocks=torch.zeros(1, 1, 3, dtype=torch.int32))
    found = check(plan, log_weight=weight)
    assert float(found["out"][:, :, :28].abs().max()) == 0
    assert float(found["dq"][:, :, :28].abs().max()) == 0
    assert bool((found["lse"][:, :, :28] == 0).all())  # check() shows -inf as 0


@pytest.mark.parametrize(
    "shape, dtype", [((1, 1), torch.float16), ((2, 2), torch.float32)], ids=str
)
def test_epilogue(shape, dtype):
    blocks = ragged(50, 32, seed=17, shuffled=True)
    draw = torch.Generator().manual_seed(18)
    plan = random_plan(
        blocks,
        blocks,
        out_scale=torch.rand(*shape, blocks.count, generator=draw) + 0.5,
        out_residual=torch.randn(*shape, blocks.count, 48, generator=draw),
    )
    check(plan, batch=2, heads=2, head_dim=48, dtype=dtype)


def test_epilogue_without_a_residual():
    blocks = ragged(50, 32, seed=17, shuffled=True)
    check(random_plan(blocks, blocks, out_scale=torch.rand(1, 1, blocks.count) + 0.5))


def test_everything_at_once():
    rule = random_rule("disc", 40, 63, 4, sink_frames=1)
    weight = torch.randn(2, 1, 63, generator=torch.Generator().manual_seed(19))
    weight[..., 55:] = -torch.inf
    q_blocks = ragged(40, 24, seed=20, shuffled=True)
    plan = random_plan(
        q_blocks,
        ragged(63, 48, seed=21, shuffled=True),
        (2, 2),
        rule=rule,
        out_scale=torch.rand(1, 2, q_blocks.count) + 0.5,
        out_residual=torch.randn(1, 2, q_blocks.count, 80),
    )
    check(plan, batch=2, heads=2, head_dim=80, dtype=torch.float16, log_weight=weight)


@pytest.mark.parametrize("scale, size", [(-2.0, 1.0), (-0.7, 4.0)])
def test_negative_scale(scale, size):
    """Large logits too: the largest product is the smallest logit, and exp would overflow."""
    check(random_plan(even(64, 32), even(64, 32)), scale=scale, size=size)


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_strided_inputs(view):
    blocks = ragged(40, 32, seed=22)
    check(random_plan(blocks, blocks), batch=2, heads=2, view=VIEWS[view])


def test_output_keeps_the_memory_order_of_the_queries():
    q, k, v, _ = attention_inputs(2, 3, 40, 16, device=DEVICE)
    for view in VIEWS.values():
        out = attend(view(q), k, v, Plan.full(40, block_size=32), backend="triton")
        assert out.stride() == torch.empty_like(view(q)).stride()


@pytest.mark.slow
def test_expanded_gradient_and_batch():
    q, k, v, _ = attention_inputs(1, 2, 40, 16, device=DEVICE)
    q = q.requires_grad_()
    plan = Plan.full(40, block_size=16)
    wide = q.expand(3, -1, -1, -1)
    out = attend(wide, k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1), plan, backend="triton")
    (actual,) = torch.autograd.grad(out.sum(), q)
    exact = attend(q.double(), k.double(), v.double(), plan, backend="reference")
    (exact,) = torch.autograd.grad(3 * exact.sum(), q)
    torch.testing.assert_close(actual, exact, rtol=1e-4, atol=1e-5)


def test_grouped_query_attention():
    q, _, _, grad = attention_inputs(1, 4, 40, 16, device=DEVICE)
    k, v, _, _ = attention_inputs(1, 2, 40, 16, device=DEVICE, seed=1)
    blocks = ragged(40, 32, seed=23)
    plan = random_plan(blocks, blocks, (1, 4))
    found = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*leaves, plan, backend=backend)
        found.append((out, *torch.autograd.grad(out, leaves, grad.to(dtype))))
    for actual, exact in zip(*found):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_backward_inverts_the_lists_where_the_caller_did_not():
    blocks = ragged(63, 16, seed=24)
    plan = random_plan(blocks, blocks).to(DEVICE)
    q, k, v, grad = attention_inputs(1, 1, 63, 16, device=DEVICE)
    tensors = plan.tensors()
    assert tensors.q_indices is None
    found = []
    for t in (tensors, tensors._replace(**plan.transpose()._asdict())):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, _ = triton_backend.attend(*leaves, t, 0.25)
        found.append(torch.autograd.grad(out, leaves, grad))
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize(
    "tile, sizes",
    [
        pytest.param((16, 16), (24, 60), marks=pytest.mark.slow),
        ((32, 128), (24, 60)),
        ((32, 128), (60, 24)),
        ((128, 32), (60, 24)),
    ],
)
def test_any_tile_sizes_fit_any_block_sizes(tile, sizes, monkeypatch):
    config = LaunchConfig(*[KernelConfig(*tile, num_warps=4, num_stages=2)] * 4)
    monkeypatch.setattr(triton_backend, "launch_config", lambda *_, **__: config)
    rule = random_rule("raster", 70, 70, 3)
    blocks = ragged(70, sizes[0], seed=25), ragged(70, sizes[1], seed=26)
    check(random_plan(*blocks, rule=rule, density=0.6))


@pytest.mark.skipif(DEVICE == "cuda", reason="sizes of another architecture need not fit a GPU")
@pytest.mark.parametrize(
    "capability, block_size",
    [
        pytest.param((9, 0), 64, marks=pytest.mark.slow),
        pytest.param((10, 0), 24, marks=pytest.mark.slow),
        ("gfx942", 64),
    ],
    ids=str,
)
def test_launch_sizes_of_other_architectures(capability, block_size, monkeypatch):
    assert launch_config(64, torch.float16, capability) != launch_config(64, torch.float16, (8, 0))
    monkeypatch.setattr(triton_backend, "capability_of", lambda device: capability)
    rule = random_rule("disc", 150, 150, 3)
    blocks = ragged(150, block_size, seed=33, shuffled=True)
    check(random_plan(blocks, blocks, rule=rule), head_dim=64, dtype=torch.float16)


@triton.jit
def place_kernel(found, heads, num_blocks, run_rows, num_runs, num_first, PARTS: tl.constexpr):
    i_b, i_h, i_q, part, is_first = block_sparse._query_program(
        heads, num_blocks, run_rows, num_runs, num_first, PARTS
    )
    place = ((i_b * heads + i_h) * num_blocks + i_q) * PARTS + part
    tl.store(found + tl.program_id(0), place * 2 + is_first.to(tl.int32))


def test_programs_of_runs_come_first():
    runs, batch, heads, blocks, parts = torch.tensor([0, 3], device=DEVICE), 2, 3, 5, 2
    first = batch * heads * 2 * parts
    found = torch.full((first + batch * heads * blocks * parts,), -1, device=DEVICE).int()
    place_kernel[(len(found),)](found, heads, blocks, runs, 2, first, parts)
    place, is_first = found.cpu() // 2, found.cpu() % 2
    rows = place.reshape(-1, parts) // parts % blocks
    assert rows[: first // parts].tolist() == [[0, 0], [3, 3]] * batch * heads
    assert is_first.tolist() == [1] * first + [0] * (len(found) - first)
    # All heads have theirs, and the rest is in the order of the sequence.
    assert sorted(place[:first].tolist()) == [
        (head * blocks + row) * parts + part
        for head in range(batch * heads) for row in (0, 3) for part in range(parts)
    ]  # fmt: skip
    assert place[first:].tolist() == list(range(batch * heads * blocks * parts))


def test_runs_are_computed_once(monkeypatch):
    """First, and not again in their turn; also a row that only might be a run."""
    blocks = even(64, 16)
    plan = random_plan(blocks, blocks, density=0.1)
    count, indices = plan.kv_num_blocks.clone(), plan.kv_indices.clone()
    assert indices.shape[-1] < 4
    count[..., 1], indices[..., 1, :] = 4, 0
    plan = plan.replace(kv_indices=indices, kv_num_blocks=count, kv_num_full_blocks=count)
    calls, launch = [], triton_backend.Call.launch
    spy = lambda call: calls.append(call) or launch(call)  # noqa: E731
    monkeypatch.setattr(triton_backend.Call, "launch", spy)
    inputs = [x.to(DEVICE) for x in attention_inputs(1, 2, 64, 16)]
    moved, found = plan.to(DEVICE), []
    known = plan.run_rows()
    assert known.tolist() == [1]
    for rows in (None, known, torch.cat([known, known.new_tensor([2])])):
        object.__setattr__(moved, "_run_rows", None if rows is None else rows.to(DEVICE))
        leaves = [x.clone().requires_grad_() for x in inputs[:3]]
        out = attend(*leaves, moved, backend="triton")
        found.append([out.detach(), *torch.autograd.grad(out, leaves, inputs[3])])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))
    expected = attend(*(x.double() for x in inputs[:3]), moved, backend="reference")
    torch.testing.assert_close(found[1][0].double(), expected, rtol=1e-5, atol=1e-5)
    for kernel in ("forward_kernel", "dq_kernel"):
        grids = [call.grid for call in calls if call.kernel.__name__ == kernel]
        assert grids == [2 * (4 + n) for n in (0, 1, 2)]


def test_lists_of_single_heads_stay_in_order():
    blocks = ragged(150, 32, seed=39)
    plan = random_plan(blocks, blocks, (1, 2), density=0.2)
    t = plan.tensors()._replace(run_rows=torch.tensor([1]))
    q = torch.zeros(1, 2, 150, 16)
    call = triton_backend.forward_call(q, q, q, q, q[..., 0], t, 1.0, (8, 0))
    assert call.grid == 2 * blocks.count and call.arguments["run_rows"] is None


@pytest.fixture
def described(monkeypatch):
    """Descriptors as Hopper takes them; the shapes of those that were made."""
    made, make = [], triton_backend._descriptor

    def spy(x, box):
        made.append((tuple(x.shape), box))
        return make(x, box)

    monkeypatch.setattr(triton_backend, "takes_descriptors", lambda *_: True)
    monkeypatch.setattr(triton_backend, "_descriptor", spy)
    return made


# k and v for the forward pass and for dq, q and the gradient for dk and dv.
DESCRIPTORS = 6


@pytest.mark.parametrize(
    "sizes, dtype", [((128, 128), torch.float16), ((48, 96), torch.float32)], ids=str
)
def test_tiles_by_descriptor(sizes, dtype, described):
    """Short blocks between others and at the end, where rows of the next one come along."""
    blocks = ragged(150, sizes[0], seed=34), ragged(200, sizes[1], seed=35)
    check(random_plan(*blocks, (1, 2)), heads=2, head_dim=48, dtype=dtype)
    assert len(described) == DESCRIPTORS and all(box[-1] == 64 for _, box in described)


@pytest.mark.parametrize("case", ["rule", "weight", "epilogue", "even", "one row behind"])
def test_what_else_goes_with_descriptors(case, described):
    q_blocks, kv_blocks, options, fields = ragged(70, 64, 36), ragged(90, 64, 37), {}, {}
    if case == "rule":
        fields["rule"] = random_rule("disc", 70, 90, 3)
    elif case == "weight":
        options["log_weight"] = torch.randn(1, 1, 90)
    elif case == "epilogue":
        fields["out_scale"] = torch.rand(1, 1, q_blocks.count) + 0.5
        fields["out_residual"] = torch.randn(1, 1, q_blocks.count, 16)
    elif case == "even":
        q_blocks = kv_blocks = even(128, 64)
    else:
        q_blocks = kv_blocks = even(65, 64)
    check(random_plan(q_blocks, kv_blocks, density=0.8, **fields), **options)
    assert len(described) == DESCRIPTORS


@pytest.mark.parametrize("case", ["order", "small blocks", "slice"])
def test_rows_are_gathered_where_no_descriptor_fits(case, described):
    blocks = ragged(70, 8 if case == "small blocks" else 64, 38, shuffled=case == "order")
    # From the third column on: 12 bytes behind an address that a descriptor takes.
    view = (lambda x: torch.cat([x[..., :3], x], -1)[..., 3:]) if case == "slice" else lambda x: x
    check(random_plan(blocks, blocks), view=view)
    # The gradient is contiguous, q is not.
    assert described == []


def test_what_a_descriptor_can_tell():
    x = torch.zeros(2, 3, 8, 16, dtype=torch.float16)
    for good in (
        x,
        x.transpose(1, 2),
        x[:, :, ::2],
        x[:1],
        x[..., 8:],
        x[:1, :1].expand(1, 1, 8, 16),
    ):
        assert triton_backend._describable(good)
    wide = torch.zeros(2, 3, 8, 20, dtype=torch.float16)
    for bad in (x[..., 4:], wide[..., :16], x[:1].expand(2, -1, -1, -1), x[:, :, :1].expand_as(x)):
        assert not triton_backend._describable(bad)
    # An axis of one may have any step: what is told then is one that fits.
    one = triton_backend._descriptor(wide[:1, :1, :1, :16], [1, 1, 16, 16])
    assert one.strides == [16, 16, 16, 1] and one.shape == [1, 1, 1, 16]


def test_runs_are_bit_identical():
    blocks = ragged(63, 32, seed=27)
    plan = random_plan(blocks, blocks).to(DEVICE)
    inputs = attention_inputs(1, 2, 63, 16, dtype=torch.float16, device=DEVICE)
    grads = inputs[3], torch.ones(1, 2, 63, device=DEVICE)
    first, second = (run(*inputs[:3], grads, plan, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_opcheck():
    blocks = ragged(40, 16, seed=28)
    fields = {"out_scale": torch.rand(1, 1, blocks.count) + 0.5}
    plan = random_plan(blocks, blocks, **fields, **random_tail(blocks, 16)).to(DEVICE)
    q, k, v, _ = attention_inputs(1, 1, 40, 16, device=DEVICE)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    plan.transpose()
    args = op_arguments(q, k, v, plan, 0.25)
    torch.library.opcheck(torch.ops.dittfast.attend_triton.default, args)


def test_compiles_in_one_graph():
    blocks = ragged(40, 16, seed=29)
    plan = random_plan(blocks, blocks).to(DEVICE)
    inputs = [x.requires_grad_() for x in attention_inputs(1, 2, 40, 16, device=DEVICE)[:3]]

    def forward(q, k, v):
        return attend(q, k, v, plan, return_lse=True, backend="triton")

    torch._dynamo.reset()
    found = []
    for run_it in (forward, torch.compile(forward, fullgraph=True, backend="aot_eager")):
        out, lse = run_it(*inputs)
        loss = out.square().sum() + lse.sum()
        found.append((out, lse, *torch.autograd.grad(loss, inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize(
    "head_dim, dtype, message",
    [(24, torch.float32, "in steps of 16, got 24; pad"), (64, torch.float64, "got float64"),
     (272, torch.float16, "16 to 256 in steps of 16, got 272. What can: backend='")],
)  # fmt: skip
def test_refuses_what_it_cannot_run(head_dim, dtype, message):
    q = torch.zeros(1, 1, 8, head_dim, dtype=dtype, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        attend(q, q, q, Plan.full(8, block_size=8), backend="triton")


def test_refuses_cpu_tensors_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(triton_backend, "InterpretedFunction", ())
    q = torch.zeros(1, 1, 8, 24)
    reasons = not_supported_reasons("triton", q, q, q, Plan.full(8, block_size=8))
    assert len(reasons) == 2
    assert any("it runs on cuda, got tensors on cpu" in reason for reason in reasons)


def test_refuses_without_triton(monkeypatch):
    monkeypatch.setattr(triton_backend, "block_sparse", None)
    asked = capabilities.Demand(torch.device("cuda"), torch.float32, 16)
    (reason,) = capabilities.refusals(triton_backend, asked)
    assert "pip install triton" in reason


@pytest.mark.usefixtures("interpreted_bfloat16")
@pytest.mark.parametrize("size", [1.0, 16.0])
def test_bfloat16_of_everything(size):
    rule = random_rule("disc", 23, 37, 4, sink_frames=1)
    weight = torch.randn(2, 1, 37, generator=torch.Generator().manual_seed(19))
    weight[..., 30:] = -torch.inf
    blocks = ragged(23, 16, seed=20, shuffled=True), ragged(37, 32, seed=21, shuffled=True)
    plan = random_plan(
        *blocks, (2, 1), rule=rule, out_scale=torch.rand(1, 1, blocks[0].count) + 0.5
    )
    check(plan, 2, 1, 32, torch.bfloat16, size, weight)


@pytest.mark.skipif(DEVICE == "cuda", reason="nothing is interpreted")
def test_bfloat16_is_refused_where_the_interpreter_gets_it_wrong():
    q = torch.zeros(1, 1, 8, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="it computes float16, float32, got bfloat16"):
        attend(q, q, q, Plan.full(8, block_size=8), backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("size", [1.0, 4.0, 16.0])
def test_bfloat16(head_dim, size):
    rule = random_rule("disc", 1000, 1000, 3)
    blocks = ragged(1000, 128, seed=30, shuffled=True), ragged(1000, 128, seed=31)
    plan = random_plan(*blocks, rule=rule)
    check(plan, batch=2, head_dim=head_dim, dtype=torch.bfloat16, size=size)
