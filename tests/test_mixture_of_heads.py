"""`mixture_of_heads` against its formula, head by head and token by token, in fp64."""

from __future__ import annotations

import pytest
import tiny
import torch
import torch.nn.functional as F
from formula import attention_by
from test_linear import dense as linear_formula
from test_topk import Undecided

import dittfast
from dittfast import Layout, functional
from dittfast.attention import attend, method_attention
from dittfast.config import resolve
from dittfast.measure.bench import Workload, bench_attention
from dittfast.methods import (
    METHODS,
    SLA,
    Dense,
    Linear,
    Local,
    MixtureOfHeads,
    Rectified,
    Sol,
    TopK,
)
from dittfast.methods.mixture_of_heads import load_balance
from dittfast.pipelines.adapter import method_parameters
from dittfast.pipelines.measure import method_check, probe
from dittfast.pipelines.measure.cost import Cost
from dittfast.pipelines.measure.estimate import method_estimate
from dittfast.schedule import Schedule
from dittfast.testing import assert_within_budget, attention_inputs

LAYOUTS = {
    "one token": Layout.image(1, 1),
    "63": Layout.image(9, 7),
    "padded text in front": Layout.image(13, 8, text=7, text_lengths=[3, 7]),
    "text behind a video": Layout.video(3, 5, 7, text=6, text_first=False, text_lengths=[6, 1]),
}
CHANNELS = 12


def router(method, heads, channels=CHANNELS, seed=5):
    """Parameters away from where they start: tokens choose differently."""
    draw = torch.Generator().manual_seed(seed)
    own = method.parameters(heads, 8, channels)
    return {n: x + 0.7 * torch.randn(x.shape, generator=draw) for n, x in own.items()}


def blocks_of(plan):
    """Tokens of each query block."""
    starts, lengths, order = (x.tolist() if x is not None else None for x in plan.q_blocks)
    places = [range(s, s + n) for s, n in zip(starts, lengths)]
    return [list(at) if order is None else [order[i] for i in at] for at in places]


def taken(scores, count, groups, valid, undecided=0.0):
    """Which heads each token takes: groups of tokens choose together, by the sum of the valid.

    Raises:
        Undecided: two sums are as near as ``undecided``, or nearer.
    """
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    for b in range(scores.shape[0]):
        for tokens in groups:
            own = [i for i in tokens if valid[b, i]]
            total = scores[b, own].sum(0).tolist() if own else [0.0] * scores.shape[2]
            best = sorted(range(len(total)), key=lambda e: (-total[e], e))
            apart = total[best[count - 1]] - total[best[count]] if count < len(total) else 1.0
            if own and undecided and apart <= undecided * len(own):
                raise Undecided("rounding decides which heads a token takes")
            best = best[:count]
            for i in tokens:
                chosen[b, i, best] = True
    return chosen


def gates_of(x, own, shared, count, chosen):
    """[B, N, H] as the paper writes it, with its code's factors."""
    p = torch.softmax(x @ own["routed_router"].mT, -1)
    kept = p * chosen
    routed = count * kept / kept.sum(-1, keepdim=True)
    if not shared:
        return routed
    level = 2 * torch.softmax(x @ own["level_router"].mT, -1)
    always = shared * torch.softmax(x @ own["shared_router"].mT, -1)
    return torch.cat([level[..., :1] * always, level[..., 1:] * routed], -1)


def oracle(q, k, v, x, own, mask, shared, count, groups, valid, undecided=0.0):
    """All heads in full under ``mask [.., N, N]``, then the gates; and the load-balance loss."""
    each = q.shape[1] // k.shape[1]
    k, v = (y.repeat_interleave(each, 1) for y in (k, v))
    logits = (q @ k.mT) * q.shape[-1] ** -0.5
    heads = torch.softmax(logits.masked_fill(~mask, -torch.inf), -1) @ v
    p = torch.softmax(x @ own["routed_router"].mT, -1)
    chosen = taken(p.detach(), count, groups, valid, undecided)
    out = heads * gates_of(x, own, shared, count, chosen).permute(0, 2, 1)[..., None]
    real = valid[..., None].to(p) / valid.sum()
    experts = p.shape[-1]
    loss = experts * ((p * real).sum((0, 1)) * (chosen * real).sum((0, 1))).sum()
    return out, loss


INNER = {
    "dense": Dense(block_size=16),
    "local": Local(window=3, tile=(1, 4, 4)),
    "topk": TopK(block_size=8, topk=2, order="hilbert"),
}


def case(
    layout,
    inner,
    shared=1,
    count=2,
    route="block",
    heads=5,
    kv_heads=5,
    backend="auto",
    dtype=torch.float32,
    head_dim=8,
    size=1.0,
    painted=None,
    undecided=0.0,
):
    """Output, loss and all gradients: ours, in fp64, and eager in ``dtype``.

    Args:
        painted: what the inner method shows, ``[.., N, N]`` from q and k; None asks its plan.
        undecided: see :func:`taken`.
    """
    method = MixtureOfHeads(inner, shared, count, route)
    batch, n = 2, layout.num_tokens
    q, k, v, grad = attention_inputs(batch, heads, n, head_dim, dtype=dtype, scale=size)
    k, v = k[:, :kv_heads], v[:, :kv_heads]
    x = torch.randn(batch, n, CHANNELS, generator=torch.Generator().manual_seed(2)).to(dtype)
    own = {name: w.to(dtype) for name, w in router(method, heads).items()}
    valid = layout.valid()
    valid = torch.ones(1, n, dtype=torch.bool) if valid is None else valid
    valid = valid.expand(batch, n)
    plan = inner.plan(layout) if inner.static else inner.plan(layout, q, k, v)
    mask = plan.to_dense_mask() if painted is None else torch.as_tensor(painted(q, k))
    mask = mask & valid[:, None, None]
    groups = [[i] for i in range(n)] if route == "token" else blocks_of(plan)
    found = []
    for name, wide in (("ours", dtype), ("exact", torch.float64), ("eager", dtype)):
        leaves = [y.detach().to(wide).requires_grad_() for y in (q, k, v, x)]
        weights = {m: w.detach().to(wide).requires_grad_() for m, w in own.items()}
        if name == "ours":
            out, loss = functional.mixture_of_heads_attention(
                *leaves, layout, inner, shared, count, route=route, parameters=weights,
                backend=backend, return_loss=True,
            )  # fmt: skip
        else:
            given = shared, count, groups, valid, undecided
            out, loss = oracle(*leaves, weights, mask, *given)
        # Padding's queries are free to give anything.
        out = out.masked_fill(~valid[:, None, :, None], 0)
        total = (out * grad.to(wide)).sum() + 3 * loss
        grads = torch.autograd.grad(total, [*leaves, *weights.values()])
        found.append([out.detach(), loss.detach(), *grads])
    return ["out", "loss", "dq", "dk", "dv", "dx", *own], found


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
@pytest.mark.parametrize("route", ["block", "token"])
def test_output_and_gradients(layout, inner, route, nan_empty):
    if not layout.grid and inner.needs_grid:
        pytest.skip("needs a grid")
    names, sides = case(layout, inner, route=route)
    for name, *values in zip(names, *sides):
        assert_within_budget(name, *values, factor=8, floor=16)


@pytest.mark.parametrize("backend", ["reference", "cpu", "native"])
@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_backends_and_grouped_queries(backend, inner):
    layout = LAYOUTS["padded text in front"]
    given = {"shared": 0, "count": 2, "heads": 4, "kv_heads": 2}
    names, sides = case(layout, inner, backend=backend, **given)
    for name, *values in zip(names, *sides):
        assert_within_budget(name, *values, factor=8, floor=16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    names, sides = case(LAYOUTS["63"], INNER["dense"], dtype=dtype)
    for name, *values in zip(names, *sides):
        assert_within_budget(name, *values, factor=8, floor=16)


def test_around_a_method_that_computes_its_own_output():
    layout, method = LAYOUTS["padded text in front"], MixtureOfHeads(Linear(hidden=0), 1, 1)
    q, k, v, _ = attention_inputs(2, 3, layout.num_tokens, 8)
    x = torch.randn(2, layout.num_tokens, CHANNELS)
    own = router(method, 3)
    out = method_attention(method, layout, q, k, v, hidden_states=x, **own)
    p = torch.softmax(x @ own["routed_router"].mT, -1)
    each = [[i] for i in range(layout.num_tokens)]  # it has no blocks, so tokens choose
    gates = gates_of(x, own, 1, 1, taken(p, 1, each, torch.ones(2, layout.num_tokens)))
    exact = linear_formula(q, k, v, {}, layout.valid().float()) * gates.mT[..., None]
    torch.testing.assert_close(out, exact, rtol=1e-4, atol=1e-5)
    inside = MixtureOfHeads(Linear(hidden=3), 1, 1).parameters(3, 8, CHANNELS)
    assert "inner_q_out" in inside and inside["level_router"].shape == (2, CHANNELS)


@pytest.mark.parametrize(
    "inner",
    [Sol(block_size=16), Rectified(block_size=16, topk=2), SLA(TopK(block_size=8, topk=2))],
    ids=lambda m: m.name,
)
def test_what_is_added_to_a_softmax_goes_with_its_head(inner):
    """What a method adds to rows that list nothing is left out with them."""
    layout, method = LAYOUTS["63"], MixtureOfHeads(inner, 1, 1)
    q, k, v, _ = attention_inputs(2, 3, 63, 8)
    x = torch.randn(2, 63, CHANNELS, generator=torch.Generator().manual_seed(1))
    own = router(method, 3)
    out = method_attention(method, layout, q, k, v, hidden_states=x, **own)
    inside = {n.removeprefix("inner_"): w for n, w in own.items() if n.startswith("inner_")}
    assert bool(inside) == inner.adds
    whole = method_attention(inner, layout, q, k, v, **inside)
    p = torch.softmax(x @ own["routed_router"].mT, -1)
    groups = blocks_of(inner.plan(layout, q, k, v))
    chosen = taken(p, 1, groups, torch.ones(2, 63))
    gates = gates_of(x, own, 1, 1, chosen).mT[..., None]
    torch.testing.assert_close(out, whole * gates, rtol=1e-4, atol=1e-5)
    assert (out == 0).all(-1).any() and not chosen.all()


# What is skipped.


def watched(method, layout, heads, **given):
    """The plan under which attention ran."""
    from dittfast.attention import computing_call

    q, k, v, _ = attention_inputs(2, heads, layout.num_tokens, 8)
    x = torch.randn(2, layout.num_tokens, CHANNELS, generator=torch.Generator().manual_seed(2))
    call, plans = computing_call(method, layout, q, k, v, hidden_states=x), []

    def keep(*tensors, **options):
        plans.append(tensors[3])
        return call.attend(*tensors, **options)

    own = router(method, heads)
    method.attention(layout, q, k, v, call._replace(attend=keep), **own)
    (plan,) = plans
    return plan, x, own


@pytest.mark.parametrize("route", ["block", "token"])
def test_rows_that_nobody_takes_list_nothing(route):
    layout, inner = Layout.image(12, 12, text=5), Local(window=3, tile=(1, 2, 2))
    method = MixtureOfHeads(inner, 1, 1, route)
    plan, x, own = watched(method, layout, 5)
    whole = inner.plan(layout)
    p = torch.softmax(x @ own["routed_router"].mT, -1)
    blocks = blocks_of(whole)
    groups = blocks if route == "block" else [[i] for i in range(layout.num_tokens)]
    chosen = taken(p, 1, groups, torch.ones(2, layout.num_tokens))
    rows = torch.stack([chosen[:, tokens].any(1) for tokens in blocks], -1)
    counts = whole.kv_num_blocks.expand(2, 1, -1)
    assert torch.equal(plan.kv_num_blocks[:, :1], counts)
    assert torch.equal(plan.kv_num_blocks[:, 1:], counts * rows)
    full = whole.kv_num_full_blocks.expand(2, 1, -1)
    assert torch.equal(plan.kv_num_full_blocks[:, 1:], full * rows)
    listed = float((plan.kv_num_blocks > 0).float().mean())
    assert listed == pytest.approx(2 / 5) if route == "block" else 2 / 5 < listed < 1
    if route == "block":
        amount = method.amount(layout, 5, 8, method.keep(layout, torch.device("cpu")))
        assert amount.density == pytest.approx(whole.density * 2 / 5)
        routers = 2 * layout.num_tokens * 40 * 7 / (4 * layout.num_tokens**2 * 40)
        assert amount.work == pytest.approx(amount.density + routers)
        flops = method.flops(layout, 5, 8)
        assert flops == pytest.approx(amount.work * 4 * layout.num_tokens**2 * 40)


@pytest.mark.parametrize(
    "backend",
    ["reference", "cpu", "native", pytest.param("triton", marks=pytest.mark.slow)],
)
def test_rows_of_a_plan_alone(backend, nan_empty, quick_interpreter):
    """Other rows give 0 and lse -inf, and gradients as if they were not there."""
    layout = Layout.image(9, 7, text=5)
    whole = Local(window=3, tile=(1, 4, 4)).plan(layout)
    rows = torch.rand(2, 3, whole.q_blocks.count, generator=torch.Generator().manual_seed(0)) < 0.6
    assert not rows.all() and rows.any()
    plan = whole.only_rows(rows)
    q, k, v, grad = attention_inputs(2, 3, 68, 16)
    leaves = [y.requires_grad_() for y in (q, k, v)]
    kept = torch.zeros(2, 3, 68, dtype=torch.bool)
    for number, tokens in enumerate(blocks_of(whole)):
        kept[:, :, tokens] = rows[:, :, number, None]

    def run(plan, backend):
        out, lse = attend(*leaves, plan, backend=backend, return_lse=True)
        seen = torch.where(kept, lse, 0)
        grads = torch.autograd.grad((out * grad * kept[..., None]).sum() + seen.sum(), leaves)
        return out.detach(), lse.detach(), grads

    out, lse, grads = run(plan, backend)
    exact, exact_lse, exact_grads = run(whole, "reference")
    assert (out[~kept] == 0).all() and (lse[~kept] == -torch.inf).all()
    torch.testing.assert_close(out[kept], exact[kept], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse[kept], exact_lse[kept], rtol=1e-5, atol=1e-6)
    for a, b in zip(grads, exact_grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert plan.density == pytest.approx(float(plan.to_dense_mask().double().mean()))


def test_runs_are_skipped_too():
    layout = Layout.image(20, 20)
    plan, *_ = watched(MixtureOfHeads(Dense(block_size=16), 1, 1), layout, 4)
    assert Dense(block_size=16).plan(layout).has_runs
    assert set(plan.kv_num_blocks.unique().tolist()) == {0, 25}
    assert float((plan.kv_num_blocks > 0).float().mean()) == 0.5
    assert not plan.is_dense


# Counts, starts, losses.


def test_counts():
    count = lambda *options, heads: tuple(MixtureOfHeads(Dense(), *options).count(heads))  # noqa: E731
    assert count(heads=24) == (6, 18, 9)
    assert count(8, 3, heads=16) == (8, 8, 3)
    assert count(0, 1.0, heads=4) == (0, 4, 4)
    assert count(0.0, 0.01, heads=4) == (0, 4, 1)
    assert count(heads=1) == (0, 1, 1)


def test_it_starts_with_weight_one_for_heads_that_are_on():
    layout = Layout.image(8, 8)
    q, k, v, grad = attention_inputs(1, 4, 64, 8)
    x = torch.randn(1, 64, CHANNELS)
    everything = MixtureOfHeads(Dense(), 0, 4)
    own = {n: torch.zeros_like(w) for n, w in everything.parameters(4, 8, CHANNELS).items()}
    whole = F.scaled_dot_product_attention(q, k, v)
    out = method_attention(everything, layout, q, k, v, hidden_states=x, **own)
    torch.testing.assert_close(out, whole)
    out = functional.mixture_of_heads_attention(q, k, v, x, layout, shared=1, routed=2)
    on = out[:, :, :, 0] != 0
    assert on[:, 0].all() and (on.sum(1) == 3).all()
    torch.testing.assert_close(out[:, :1], whole[:, :1])
    names = MixtureOfHeads(Dense(), 1, 2).parameters(4, 8, CHANNELS)
    own = {n: w.requires_grad_() for n, w in names.items()}
    given = {"shared": 1, "routed": 2, "parameters": own}
    functional.mixture_of_heads_attention(q, k, v, x, layout, **given).backward(grad)
    assert all(
        w.grad.any() for n, w in own.items() if n != "shared_router"
    )  # of one head: always 1


def test_load_balance():
    even = torch.full((1, 12, 4), 0.25)
    turns = torch.eye(4, dtype=torch.bool).repeat(3, 1)[None]
    assert float(load_balance(even, turns)) == pytest.approx(1)
    first = torch.zeros(1, 12, 4, dtype=torch.bool)
    first[..., 0] = True
    sure = first.float()
    assert float(load_balance(sure, first)) == pytest.approx(4)
    hidden = torch.zeros(1, 1, 12)
    hidden[..., 4:] = -torch.inf
    sure[:, 4:] = torch.nan
    assert float(load_balance(sure, turns, hidden)) == pytest.approx(1)


def test_padding_may_hold_anything():
    layout = LAYOUTS["padded text in front"]
    q, k, v, _ = attention_inputs(2, 4, layout.num_tokens, 8)
    x = torch.randn(2, layout.num_tokens, CHANNELS)
    given = {"layout": layout, "inner": Local(window=3), "return_loss": True}
    clean, loss = functional.mixture_of_heads_attention(q, k, v, x, **given)
    valid, dirty = layout.valid(), x.clone()
    dirty[~valid] = torch.nan
    out, same = functional.mixture_of_heads_attention(q, k, v, dirty, **given)
    assert torch.equal(loss, same)
    assert torch.equal(out.transpose(1, 2)[valid], clean.transpose(1, 2)[valid])


# Bad input.


@pytest.mark.parametrize(
    "options, words",
    [
        ({"shared": -1}, "shared must be an integer, at least 0; got -1"),
        ({"shared": 1.0}, r"shared as a share must lie in \[0, 1\); got 1.0"),
        ({"routed": 0}, "routed must be an integer, at least 1; got 0"),
        ({"routed": 1.5}, r"routed as a share must lie in \(0, 1\]; got 1.5"),
        ({"route": "tokens"}, "route must be one of block, token; got 'tokens'.*did you mean"),
        ({"inner": "dense"}, "inner must be a method, got 'dense'"),
        ({"inner": Local(window=(1, 2))}, "one value for all heads in every option"),
        ({"inner": MixtureOfHeads()}, "inner must be one method"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        MixtureOfHeads(**options)


def test_bad_sizes():
    q, k, v, _ = attention_inputs(1, 4, 63, 8)
    x = torch.randn(1, 63, CHANNELS)
    layout = LAYOUTS["63"]
    run = lambda method, **own: method_attention(  # noqa: E731
        method, layout, q, k, v, hidden_states=x, **own
    )
    with pytest.raises(ValueError, match=r"shared=4 leaves none of the layer's 4 heads.*0\.\.3"):
        run(MixtureOfHeads(shared=4))
    with pytest.raises(ValueError, match=r"routed=3 heads cannot be chosen from 2.*take 1\.\.2"):
        run(MixtureOfHeads(shared=2, routed=3))
    method = MixtureOfHeads(shared=1, routed=1)
    other = method.parameters(6, 8, CHANNELS)
    with pytest.raises(ValueError, match=r"routed_router is \[5, 12\].*need \[3, 12\]"):
        run(method, **other)
    with pytest.raises(ValueError, match=r"routed_router is \[3, 7\].*need \[3, 12\]"):
        run(method, **method.parameters(4, 8, 7))
    with pytest.raises(ValueError, match="must have level_router, routed_router, shared_router"):
        run(method, **MixtureOfHeads(shared=0, routed=1).parameters(4, 8, CHANNELS))
    with pytest.raises(ValueError, match="needs the layer's hidden states"):
        method_attention(method, layout, q, k, v)
    with pytest.raises(ValueError, match="layers do not tell their heads"):
        method.parameters(None, None, None)
    with pytest.raises(ValueError, match="those of their hidden states"):
        method.parameters(4, 8, None)
    with pytest.raises(ValueError, match="computes its output itself"):
        method.plan(layout)


def test_from_plain_data():
    assert METHODS["mixture_of_heads"] is MixtureOfHeads and MixtureOfHeads.computes
    inner = {"method": "local", "options": {"window": 4, "tile": [1, 4, 4]}}
    method, _ = resolve("mixture_of_heads", inner=inner, shared=2, routed=3)
    assert method == MixtureOfHeads(Local(window=4, tile=(1, 4, 4)), 2, 3)
    assert resolve("mixture_of_heads", inner="topk")[0].inner == TopK()
    again = method.to_dict()
    assert resolve(again.pop("name"), **again)[0] == method
    for bad, words in (
        ({"method": "locl"}, "inner: unknown method 'locl'. Did you mean 'local'"),
        ({"method": "local", "layers": "*"}, "inner: unknown key 'layers'"),
        ({"method": "local", "options": {"windw": 4}}, "inner: unknown option .*'windw'"),
        (7, "inner: 'method' must be a method or its name, got 7"),
    ):
        with pytest.raises(ValueError, match=words):
            resolve("mixture_of_heads", inner=bad)


# In models.


def what_layers_are_given(model, names) -> dict:
    """By layer, as it is called: the hidden states of its streams, text in front."""
    given = {}

    def enter(name):
        def hook(module, args, kwargs):
            called = {**dict(zip(("hidden_states", "encoder_hidden_states"), args)), **kwargs}
            text = called.get("encoder_hidden_states")
            streams = [called["hidden_states"]] if text is None else [text, called["hidden_states"]]
            given[name] = torch.cat(streams, 1).double()

        return hook

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(enter(name), with_kwargs=True)
    return given


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_enabled_it_is_its_formula_in_every_layer(family):
    if family == "flux":
        model, inputs = tiny.flux_transformer(heads=4), tiny.flux_inputs()
        shared, count = 1, 2
    else:
        model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
        shared, count = 0, 1
    method = MixtureOfHeads(Dense(block_size=16), shared, count)
    with torch.no_grad():
        stock = model(**inputs)[0]
        with dittfast.enable(model, method, min_tokens=0) as enabled:
            for n, p in enumerate(method_parameters(model).values()):
                p.add_(0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(n)))
            found = model(**inputs)[0]
            layout, described = model._dittfast.layout, enabled.describe()
            layers = model._dittfast.layers
            own = {n: dict(layer.parameters) for n, layer in layers.items()}
        assert torch.equal(model(**inputs)[0], stock)
        blocks = blocks_of(Dense(block_size=16).plan(layout))
        given, n = what_layers_are_given(model, own), layout.num_tokens
        mask = torch.ones(n, n, dtype=torch.bool)

        def formula(name, q, k, v):
            weights = {m: w.double() for m, w in own[name].items()}
            valid = torch.ones(q.shape[0], n, dtype=torch.bool)
            return oracle(q, k, v, given[name], weights, mask, shared, count, blocks, valid)[0]

        with attention_by(model, {name: name for name in own}, formula):
            torch.testing.assert_close(model(**inputs)[0], found, rtol=1e-4, atol=1e-4)
    assert float((found - stock).abs().max()) > 1e-3
    share = 3 / 4 if shared else 1 / 2
    assert described.density == pytest.approx(share) and described.work > share


def test_checkpointing_compiling_and_the_processor():
    model, inputs = tiny.flux_transformer(1, 1, heads=4), tiny.flux_inputs()
    options = {"inner": Local(window=3, tile=(1, 4, 4)), "shared": 1, "routed": 2}

    with dittfast.enable(model, "mixture_of_heads", min_tokens=0, **options):
        plain = tiny.gradients(model, inputs)
        model.enable_gradient_checkpointing()
        for a, b in zip(plain, tiny.gradients(model, inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        model.disable_gradient_checkpointing()
        with torch.no_grad():
            expected = model(**inputs)[0]
            torch._dynamo.reset()
            model.compile(backend="eager", fullgraph=True)
            torch.testing.assert_close(model(**inputs)[0], expected)
            model._compiled_call_impl = None
            torch._dynamo.reset()
    given = {"heads": 4, "head_dim": 16, "channels": 64}
    processor = dittfast.MixtureOfHeadsAttnProcessor(**given, **options)
    assert processor.parameters["routed_router"].shape == (3, 64)
    model.set_attn_processor(processor)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)[0], expected)


def test_heads_of_a_rule(tmp_path):
    """Among the heads that a rule names; their parameters go by its number."""
    model, inputs = tiny.flux_transformer(heads=4), tiny.flux_inputs()
    method = MixtureOfHeads(Dense(), 0, 1)
    rules = [{"layers": "single*", "heads": ["1-3"], "method": method}]
    with dittfast.enable(model, rules, min_tokens=0), torch.no_grad():
        own = method_parameters(model)
        assert {p.shape for p in own.values()} == {(3, 64)} and len(own) == 2
        assert all("rule0_routed_router" in name for name in own)
        model(**inputs)
    with pytest.raises(ValueError, match=r"shared=4 leaves none of the layer's 4 heads"):
        dittfast.enable(model, "mixture_of_heads", shared=4)


# In tools.

PLANNING = [Local(window=3), TopK(block_size=8, topk=2)]


def test_probed_and_checked_on_a_real_run():
    pipe = tiny.flux_pipeline(heads=4)
    method = MixtureOfHeads(Local(window=2, tile=(1, 4, 4)), 1, 1)
    call = dict(prompt="a red cat", height=64, width=96, num_inference_steps=2)
    call |= dict(max_sequence_length=12, output_type="latent")
    layers = [0, 3]
    captured = probe.capture(pipe, call, steps=[1], layers=layers, hidden_states=True)
    for c in captured:
        assert c.hidden_states.shape == (1, c.layout.num_tokens, 64)
        report = probe.measure(method, c)
        whole = probe.measure(method.inner, c)
        assert report.heads[0].density == pytest.approx(whole.heads[0].density)
        total = sum(head.density for head in report.heads)
        assert total == pytest.approx(2 * whole.heads[0].density)
        assert all(a.mass <= b.mass + 1e-9 for a, b in zip(report.heads, whole.heads))
        assert probe.kept_picture([report]).size[0] > 100
    assignment = method_check.assignment_of(pipe, method)
    checked, _ = method_check.check_captured(assignment, captured)
    assert checked.layers == 2 and checked.density == pytest.approx(whole.heads[0].density / 2)
    with pytest.raises(ValueError, match="needs the layer's hidden states"):
        probe.measure(method, probe.capture(pipe, call, steps=[1], layers=[0])[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "inner",
    [Local(window=3), TopK(block_size=8, topk=2)],
    ids=lambda m: m.name,
)
def test_benched(inner):
    method = MixtureOfHeads(inner, 1, 1)
    row = bench_attention(method, Workload(Layout.image(16, 16), heads=4, head_dim=8), repeats=1)
    alone = bench_attention(inner, Workload(Layout.image(16, 16), heads=4, head_dim=8), repeats=1)
    assert row["density"] == pytest.approx(alone["density"] / 2, rel=0.02)
    assert row["work"] > row["density"] and row["flex"].keys() == {"not_run"}


@pytest.mark.parametrize(
    "inner", [Local(window=3), TopK(block_size=8, topk=2)], ids=lambda m: m.name
)
def test_estimated(inner):
    layout, cost = Layout.image(32, 32, text=5), Cost(1.0, 1.0, 0.0, 1, 8, 64)
    run = lambda method: method_estimate("", method, Schedule(), {"layer": 8}, layout, cost)  # noqa: E731
    found, alone = run(MixtureOfHeads(inner, 2, 2)), run(inner)
    assert found.problem is None and found.density == pytest.approx(alone.density / 2)
    assert alone.work / 2 < found.work < alone.work
    assert run(MixtureOfHeads(Linear(), 2, 2)).work > run(Linear()).work
