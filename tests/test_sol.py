"""Sol-Attn against its formula, block by block and query by query in fp64."""

import math

import pytest
import torch

from dittfast import functional
from dittfast.attention import attend, method_attention
from dittfast.config import resolve
from dittfast.layout import Context, Grid, Layout
from dittfast.methods import Sol
from dittfast.testing import assert_within_budget, attention_inputs


def blocks_of(layout, method):
    """``[(tokens, is text)]``: blocks in the order of the sequence, none over two segments."""
    order, blocks = layout.order(method.order).tolist(), []
    for start, segment in layout.spans():
        tokens = order[start : start + segment.length]
        cut = range(0, len(tokens), method.block_size)
        text = not isinstance(segment, Grid)
        blocks += [(tokens[i : i + method.block_size], text) for i in cut]
    return blocks


def oracle_head(q, k, v, blocks, method, weight, choice, scale):
    """``(out [N, D], lse [N], choice)`` of one batch row and head; ``weight [N]`` natural log."""
    live = [[t for t in tokens if weight[t] > -math.inf] for tokens, _ in blocks]
    alive = [b for b, tokens in enumerate(live) if tokens]
    k_mean = {b: k[live[b]].mean(0) for b in alive}
    mu = torch.stack([k_mean[b] for b in alive]).mean(0)
    var = torch.stack([(k_mean[b] - mu) ** 2 for b in alive]).mean(0)
    centred, out, lse = k - mu, [None] * len(q), [None] * len(q)
    chosen = {} if choice is None else choice
    for a, (rows, text) in enumerate(blocks):
        q_mean = q[rows].mean(0)
        score = {b: scale * q_mean @ (k_mean[b] - mu) for b in alive}
        if choice is None:
            limit = method.tau * (scale**2 * (q_mean**2 @ var) + 1e-6 * math.log(2) ** 2).sqrt()
            chosen[a] = [
                b for b in alive
                if text or blocks[b][1] or abs(a - b) <= 1 or bool(score[b] > limit)
            ]  # fmt: skip
        tokens = [t for b in chosen[a] for t in live[b]]
        for i in rows:
            logits = [scale * centred[tokens] @ q[i] + weight[tokens]]
            values = [v[tokens]]
            for b in alive:
                if b in chosen[a] or method.tail == "none":
                    continue
                share = weight[live[b]].exp()
                own = scale * q[i] @ (k_mean[b] - mu) if method.tail == "query" else score[b]
                logits.append((own + share.sum().log())[None])
                values.append((share @ v[live[b]] / share.sum())[None])
            logits, values = torch.cat(logits), torch.cat(values)
            out[i] = torch.softmax(logits, 0) @ values
            # attend's logits are of the keys as they are.
            lse[i] = logits.logsumexp(0) + scale * q[i] @ mu
    return torch.stack(out), torch.stack(lse), chosen


def oracle(q, k, v, layout, method, weight, choice=None, scale=None):
    """``(out, lse, choice)`` in the inputs' dtype; k and v may have fewer heads."""
    groups, blocks = q.shape[1] // k.shape[1], blocks_of(layout, method)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads, found = [], {}
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            known = None if choice is None else choice[b, h]
            own = weight[b % len(weight), h % weight.shape[1]].to(q)
            at = b, h // groups
            *head, found[b, h] = oracle_head(
                q[b, h], k[at], v[at], blocks, method, own, known, scale
            )
            heads.append(head)
    out, lse = (torch.stack(x).unflatten(0, q.shape[:2]) for x in zip(*heads))
    return out, lse, found


def hidden(layout):
    weight = torch.zeros(len(layout.context_lengths or [0]), 1, layout.num_tokens)
    if layout.context_lengths is not None:
        weight[~layout.valid()[:, None]] = -math.inf
    return weight


def check(
    method, layout, batch=1, heads=2, head_dim=8, dtype=torch.float32, size=1.0, backend="cpu",
    groups=1, kv_log_weight=None, scale=None, judge=assert_within_budget,
):  # fmt: skip
    """out, lse and gradients against the formula in fp64, under the plan's own choice of blocks."""
    q, k, v, grad = attention_inputs(batch, heads, layout.num_tokens, head_dim, dtype=dtype,
                                     scale=size)  # fmt: skip
    k, v = k[:, ::groups], v[:, ::groups]
    grad_lse = torch.randn(q.shape[:3], generator=torch.Generator().manual_seed(4))
    weight = hidden(layout)
    if kv_log_weight is not None:
        weight = weight + kv_log_weight

    def run(function, kind):
        leaves = [x.to(kind).requires_grad_() for x in (q, k, v)]
        out, lse, *rest = function(*leaves)
        grads = torch.autograd.grad((out, lse), leaves, (grad.to(out), grad_lse.to(lse)))
        return [out.detach(), lse.detach(), *grads], rest

    def ours(q, k, v):
        options = dict(kv_log_weight=kv_log_weight, scale=scale, backend=backend, return_lse=True)
        return method_attention(method, layout, q, k, v, **options)

    exact, (choice,) = run(
        lambda *x: oracle(*x, layout, method, weight, scale=scale), torch.float64
    )
    eager, _ = run(lambda *x: oracle(*x, layout, method, weight, choice, scale), dtype)
    found, _ = run(ours, dtype)
    for name, *values in zip(("out", "lse", "dq", "dk", "dv"), found, exact, eager):
        judge(name, *values, **({"floor": 16} if judge is assert_within_budget else {}))
    return choice


LAYOUTS = {
    "image": Layout.image(5, 9),
    "text first, padded": Layout.image(4, 10, text=11, text_lengths=[11, 4]),
    "video, padded behind": Layout.video(3, 3, 5, text=9).with_text_lengths([0, 9]),
    "several grids": Layout((Grid(1, 5, 7), Context(5), Grid(1, 2, 4))),
}


@pytest.mark.parametrize("tail", ["block", "query", "none"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_is_its_formula(name, tail):
    layout = LAYOUTS[name]
    choice = check(Sol(0.5, tail, block_size=8), layout, 2, 1, dtype=torch.float64, scale=0.5)
    count = len(blocks_of(layout, Sol(block_size=8)))
    seen = [len(row) for head in choice.values() for row in head.values()]
    assert min(seen) < count - 2 and len(set(seen)) > 2


@pytest.mark.parametrize("backend", ["native", "cpu", "reference"])
@pytest.mark.parametrize("tail", ["block", "query"])
def test_every_backend_with_fewer_key_heads(backend, tail):
    layout = Layout.image(5, 7, text=3, text_lengths=[1])
    check(Sol(0.7, tail, 8, "hilbert"), layout, 1, 4, 16, size=2.0, backend=backend, groups=2)


@pytest.mark.parametrize("tail", ["block", "query"])
@pytest.mark.parametrize("per_head", [1, 2])
@pytest.mark.slow
def test_log_weights_of_the_call(tail, per_head):
    """Weights count in the tail, hidden keys in no mean: some blocks are hidden altogether."""
    layout = Layout.image(6, 9, text=4, text_lengths=[2, 4])
    weight = torch.randn(2, per_head, layout.num_tokens, generator=torch.Generator().manual_seed(1))
    weight[..., 20:37] = -math.inf
    weight[0, :, 45] = -math.inf
    check(Sol(0.8, tail, 8), layout, 2, dtype=torch.float64, kv_log_weight=weight)


def test_what_padding_holds_makes_no_difference():
    layout = Layout.image(6, 9, text=12, text_lengths=[3])
    q, k, v, _ = attention_inputs(1, 2, layout.num_tokens, 8)
    for tail in ("block", "query"):
        method = Sol(tail=tail, block_size=8)
        plan = method.plan(layout, q, k, v)
        worse = [x.clone() for x in (k, v)]
        for x in worse:
            x[:, :, 3:12] = torch.nan
        again = method.plan(layout, q, *worse)
        for name in ("kv_indices", "kv_num_blocks", "tail_lse", "tail_value"):
            assert torch.equal(getattr(plan, name), getattr(again, name)), name


def test_thresholds():
    layout = Layout.image(8, 16, text=5)
    q, k, v, _ = attention_inputs(1, 2, layout.num_tokens, 16, scale=3)
    plans = [Sol(tau, block_size=8).plan(layout, q, k, v) for tau in (0, 0.5, 1, 2, math.inf)]
    densities = [plan.density for plan in plans]
    assert densities == sorted(densities, reverse=True) and len(set(densities)) == 5
    assert Sol(2.5, block_size=8).least() == Sol(math.inf, block_size=8)
    # Neighbours and text alone: three of 16 blocks, two at either end.
    image = (2 * 2 + 14 * 3) * 8 * 8
    assert plans[-1].density == pytest.approx((image + 5 * 133 + 128 * 5) / 133**2)
    for plan in plans:
        plan.replace()  # validates
    everything = Sol(math.inf, block_size=64).plan(layout, q, k, v)
    assert everything.density == 1 and bool((everything.tail_lse == -math.inf).all())
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attend(q, k, v, everything), dense)


def clustered(layout, head_dim, seed):
    """Keys near the centre of their region, queries scattered around theirs."""
    draw = torch.Generator().manual_seed(seed)
    rows, columns = layout.grid.shape[1:]
    at = torch.arange(layout.num_tokens)
    region = at // columns * 4 // rows * 4 + at % columns * 4 // columns
    scattered = torch.tensor([1.5, 0.3, 0.3])[:, None, None]
    centres = torch.randn(3, 16, head_dim, generator=draw)[:, region]
    own = torch.randn(3, layout.num_tokens, head_dim, generator=draw)
    return (centres + scattered * own)[:, None, None].double()


@pytest.mark.parametrize("seed", range(2))
def test_the_tail_per_query_errs_less_at_equal_density(seed):
    layout = Layout.image(32, 32)
    q, k, v = clustered(layout, 32, seed)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    error, density = {}, {}
    for tail in ("none", "block", "query"):
        method = Sol(1.0, tail, 16, "morton")
        plan = method.plan(layout, q, k, v)
        density[tail] = plan.density
        out = attend(q, k, v, plan, backend="reference")
        error[tail] = float((out - dense).norm() / dense.norm())
    assert len(set(density.values())) == 1 and density["query"] < 0.5
    assert 4 * error["query"] < error["block"] < error["none"]


def test_scores_in_portions_have_no_seam(monkeypatch):
    layout = Layout.image(9, 13, text=21, text_lengths=[21, 5])
    q, k, v = torch.randn(3, 2, 2, layout.num_tokens, 16, requires_grad=True)
    for tail in ("block", "query"):
        method, found = Sol(tail=tail, block_size=8), []
        for most in (1 << 22, 2 * 2 * 15 * 32):
            monkeypatch.setattr("dittfast.methods.sol._SCORES_AT_ONCE", most)
            out = method_attention(method, layout, q, k, v, backend="cpu")
            found.append([out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))])
        for a, b in zip(*found):
            torch.testing.assert_close(a, b)


def test_no_array_of_tokens_by_tokens():
    """The largest tensor made while planning has at most as many values as tokens times blocks."""
    from test_plan_size import _Largest

    layout = Layout.image(48, 64)
    q = torch.randn(1, 1, layout.num_tokens, 8)
    for tail in ("block", "query"):
        method = Sol(tail=tail)
        method.prepare(layout, q.device)
        with torch.no_grad(), _Largest() as largest:
            method.plan(layout, q, q, q)
        assert largest.bytes <= 4 * layout.num_tokens * 48


def test_functional_and_presets():
    layout = Layout.image(6, 8, text=5)
    q, k, v, _ = attention_inputs(1, 2, layout.num_tokens, 16)
    for tail in ("block", "query"):
        expected = method_attention(Sol(0.5, tail, 8, "morton"), layout, q, k, v)
        options = dict(tau=0.5, tail=tail, block_size=8, order="morton")
        assert torch.equal(functional.sol_attention(q, k, v, layout, **options), expected)
    line = functional.sol_attention(q, k, v, block_size=8)
    method = Sol(block_size=8)
    assert torch.equal(line, method_attention(method, Layout.image(1, 53), q, k, v))
    method, _ = resolve("sol/wan2.1")
    assert method == Sol(tau=1.0, tail="block", block_size=64)


BAD = [
    (dict(tau="much"), "tau must be a number of standard deviations, at least 0; got 'much'"),
    (dict(tau=math.nan), "got nan"),
    (dict(tau=-0.1), "got -0.1"),
    (dict(tau=True), "got True"),
    (dict(tail="rows"), "tail must be one of block, query, none; got 'rows'"),
    (dict(block_size=4), r"block_size must be an integer, 8\.\.256; got 4"),
    (dict(order="snake"), "order must be one of hilbert, morton, raster; got 'snake'"),
]


@pytest.mark.parametrize("options, message", BAD, ids=[str(options) for options, _ in BAD])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Sol(**options)


def test_bad_inputs():
    layout = Layout.image(4, 8)
    q = torch.zeros(1, 1, 32, 8)
    with pytest.raises(ValueError, match="sol plans from q, k, v, but v is None"):
        Sol().plan(layout, q, q)
    assert Sol(tail="none").plan(layout, q, q).tail_lse is None
    with pytest.raises(ValueError, match=r"k must be \[B, H, 32, D\] for this layout"):
        Sol().plan(layout, q, q[:, :, 1:], q)
    with pytest.raises(ValueError, match="grid"):
        Sol().plan(Layout((Context(5),)), q[:, :, :5], q[:, :, :5], q[:, :, :5])
