"""`agent` against its formula, written densely in fp64 from the paper."""

import itertools
import logging
import math

import pytest
import tiny
import torch
import torch.nn.functional as F
from formula import attention_by

import dittfast
from dittfast import Layout, functional
from dittfast.attention import method_attention
from dittfast.layout import Context, Grid
from dittfast.measure.growth import exponent, growing_layout
from dittfast.methods import METHODS, SLA, Agent, Linear, Local
from dittfast.pipelines.adapter import method_parameters
from dittfast.testing import assert_within_budget, attention_inputs

LAYOUTS = {
    "two tokens": Layout.image(2, 1),
    "a row": Layout.image(1, 63),
    "text in front, padded": Layout.image(13, 8, text=7, text_lengths=[3, 7]),
    "text behind a video": Layout.video(3, 5, 7, text=6, text_first=False, text_lengths=[6, 0]),
    "a reference image": Layout((Context(9), Grid(1, 9, 4), Grid(1, 3, 5))),
    "390": Layout.video(3, 10, 13),
}
METHOD = dict(agents=(2, 3, 4), text_agents=2, sharpness=0.4, shortcut=0.1)


def agents_of(method, layout, q, valid):
    """``[(agents [B, H, m, D], alive [B, m], grid number)]``, one for each segment."""
    found, number = [], 0
    most = (1,) * (3 - len(method.agents)) + tuple(method.agents)
    for start, segment in layout.spans():
        part = slice(start, start + segment.length)
        own, shown = q[:, :, part] * valid[:, None, part, None], valid[:, part]
        if isinstance(segment, Grid):
            size = [min(a, n) for a, n in zip(most, segment.shape)]
            x = own.unflatten(2, segment.shape).movedim(-1, 2).flatten(0, 1)
            pooled = F.adaptive_avg_pool3d(x, size).unflatten(0, q.shape[:2])
            share = F.adaptive_avg_pool3d(shown.unflatten(1, segment.shape)[:, None], size)
            share = share.flatten(1)
            mean = pooled.flatten(3).mT / share.clamp_min(1e-30)[:, None, :, None]
            found.append((mean, share > 0, number))
            number += 1
        else:
            count = min(method.text_agents, segment.length)
            mean, alive = [], torch.zeros(len(own), count, dtype=torch.bool)
            for b, row in enumerate(own):
                rows = [row[:, :0]] * count
                tokens = shown[b].nonzero()[:, 0].tolist() if count else []
                for i, token in enumerate(tokens):
                    agent = i * count // len(tokens)
                    rows[agent] = torch.cat([rows[agent], row[:, token : token + 1]], 1)
                    alive[b, agent] = True
                empty = row[:, :1].mean(1) * 0
                mean.append(torch.stack([x.mean(1) if x.shape[1] else empty for x in rows], 1)
                            if count else row[:, :0])  # fmt: skip
            found.append((torch.stack(mean), alive, None))
    return found


def biases_of(method, layout, bias, number):
    """``[H, m, N]``: one grid's agents at all tokens, zero at those that are not its own."""
    most = (1,) * (3 - len(method.agents)) + tuple(method.agents)
    grid = layout.grids[number]
    size = [min(a, n) for a, n in zip(most, grid.shape)]
    bias = bias.unflatten(1, most)
    for axis, (own, whole) in enumerate(zip(size, most)):
        nearest = [math.floor((i + 0.5) * whole / own) for i in range(own)]
        bias = bias.index_select(1 + axis, torch.tensor(nearest))
    bias = bias.flatten(1, 3)
    frames, rows, columns, plane = bias.split((7, 7, 7, 49), -1)
    line = lambda x, n: F.interpolate(x, size=n, mode="linear")  # noqa: E731
    t, y, x = grid.shape
    plane = F.interpolate(plane.unflatten(-1, (7, 7)), size=(y, x), mode="bilinear")
    whole = line(frames, t)[..., :, None, None] + line(rows, y)[..., None, :, None]
    whole = whole + line(columns, x)[..., None, None, :] + plane[:, :, None]
    starts = [start for start, s in layout.spans() if isinstance(s, Grid)]
    out = bias.new_zeros(*bias.shape[:2], layout.num_tokens)
    out[..., starts[number] : starts[number] + grid.length] = whole.flatten(2)
    return out


def dense(method, layout, q, k, v, parameters, valid, scale=None):
    """Both softmaxes over all pairs at once, and the convolution."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) * valid[:, None, :, None] for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    parts = agents_of(method, layout, q, valid)
    agents = torch.cat([p[0] for p in parts], 2)
    alive = torch.cat([p[1] for p in parts], 1)
    gather, spread = agents @ k.mT * scale, q @ agents.mT * scale**method.sharpness
    local = method.shortcut * v
    if parameters:
        none = lambda p: q.new_zeros(q.shape[1], p[0].shape[2], q.shape[2])  # noqa: E731
        each = [
            torch.cat([none(p) if p[2] is None else biases_of(method, layout, bias, p[2])
                       for p in parts], 1)
            for bias in (parameters["gather_bias"], parameters["spread_bias"])
        ]  # fmt: skip
        gather, spread = gather + each[0], spread + each[1].mT
        kernel, local = parameters["kernel"], []
        for start, segment in layout.spans():
            own = v[:, :, start : start + segment.length]
            if isinstance(segment, Context):
                local.append(own * kernel[:, None, :, 1, 1])
                continue
            _, rows, columns = segment.shape
            own = F.pad(own.unflatten(2, segment.shape), (0, 0, 1, 1, 1, 1))
            local.append(
                sum(own[:, :, :, dy : dy + rows, dx : dx + columns]
                    * kernel[:, None, None, None, :, dy, dx]
                    for dy, dx in itertools.product(range(3), repeat=2)).flatten(2, 4)
            )  # fmt: skip
        local = torch.cat(local, 2)
    gather = gather.masked_fill(valid[:, None, None] == 0, -torch.inf)
    spread = spread.masked_fill(~alive[:, None, None], -torch.inf)
    return torch.softmax(spread, -1) @ (torch.softmax(gather, -1) @ v) + local


def trained(method, heads, head_dim, dtype=torch.float32):
    """Parameters away from where they start."""
    draw = torch.Generator().manual_seed(3)
    noise = lambda x: 0.5 * torch.randn(x.shape, generator=draw)  # noqa: E731
    return {n: (x + noise(x)).to(dtype) for n, x in method.parameters(heads, head_dim).items()}


def both(method, layout, heads=4, kv_heads=4, dim=8, scale=1.0, dtype=torch.float32, **options):
    """Output and every gradient: ours, the formula's in fp64 and the formula's in ``dtype``."""
    q, k, v, grad = attention_inputs(2, heads, layout.num_tokens, dim, scale=scale, dtype=dtype)
    k, v = k[:, :kv_heads], v[:, :kv_heads]
    parameters = trained(method, heads, dim, dtype)
    valid = layout.valid()
    valid = torch.ones(2, layout.num_tokens) if valid is None else valid.expand(2, -1)
    found = []
    for name, wide in (("ours", dtype), ("exact", torch.float64), ("eager", dtype)):
        leaves = [x.detach().to(wide).requires_grad_() for x in (q, k, v)]
        own = {n: x.detach().to(wide).requires_grad_() for n, x in parameters.items()}
        if name == "ours":
            out = method_attention(method, layout, *leaves, **own, **options)
        else:
            out = dense(method, layout, *leaves, own, valid.to(wide))
        grads = torch.autograd.grad(out, [*leaves, *own.values()], grad.to(wide))
        found.append([out.detach(), *grads])
    return list(zip(["out", "dq", "dk", "dv", *parameters], *found))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("learns", [False, True], ids=["training-free", "trained"])
def test_output_and_gradients(layout, learns, nan_empty):
    for name, *sides in both(Agent(**METHOD, trained=learns), layout):
        assert_within_budget(name, *sides, factor=8, floor=16)


@pytest.mark.parametrize("backend", ["native", "cpu", "reference"])
@pytest.mark.parametrize("learns", [False, True], ids=["training-free", "trained"])
def test_backends_and_grouped_queries(backend, learns):
    layout, method = LAYOUTS["text in front, padded"], Agent(**METHOD, trained=learns)
    for name, *sides in both(method, layout, kv_heads=2, backend=backend):
        assert_within_budget(name, *sides, factor=8, floor=16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0])
def test_dtypes_and_scales(dtype, scale):
    method, layout = Agent(**METHOD, trained=True), LAYOUTS["390"]
    floor = 1000 if dtype == torch.float64 else 16  # nothing is more exact to compare with
    for name, *sides in both(method, layout, 2, 2, scale=scale, dtype=dtype):
        assert_within_budget(name, *sides, factor=8, floor=floor)


@pytest.mark.parametrize("learns", [False, True], ids=["training-free", "trained"])
def test_its_own_formula_is_the_same(learns):
    """What evaluations compare with, for some rows."""
    from dittfast.attention import computing_call

    method, layout = Agent(**METHOD, trained=learns), LAYOUTS["text in front, padded"]
    q, k, v, _ = attention_inputs(2, 4, layout.num_tokens, 8, dtype=torch.float64)
    k, v, rows = k[:, :2], v[:, :2], torch.tensor([0, 30, 110])
    own = trained(method, 4, 8, torch.float64)
    call = computing_call(method, layout, q, k, v, scale=0.5)
    found = method.formula(layout, q, k, v, rows, call, **own)
    expected = dense(method, layout, q, k, v, own, layout.valid().double(), scale=0.5)
    torch.testing.assert_close(found, expected[:, :, rows])


@pytest.mark.parametrize("learns", [False, True], ids=["training-free", "trained"])
def test_hidden_tokens_may_hold_anything(learns):
    method, layout = Agent(**METHOD, trained=learns), LAYOUTS["text in front, padded"]
    own = trained(method, 2, 8)
    q, k, v, _ = attention_inputs(2, 2, layout.num_tokens, 8)
    clean = method_attention(method, layout, q, k, v, **own)
    hidden = ~layout.valid()
    k, v = k.clone(), v.clone()
    k.transpose(1, 2)[hidden] = torch.nan
    v.transpose(1, 2)[hidden] = torch.inf
    assert torch.equal(method_attention(method, layout, q, k, v, **own), clean)
    q = q.clone()
    q.transpose(1, 2)[hidden] = torch.nan  # rows that nobody reads
    out = method_attention(method, layout, q, k, v, **own)
    assert torch.equal(out.transpose(1, 2)[~hidden], clean.transpose(1, 2)[~hidden])


def test_a_mask_over_keys_counts_as_padding_does():
    layout, method = Layout.image(6, 7, text=5), Agent(**METHOD)
    q, k, v, _ = attention_inputs(2, 2, layout.num_tokens, 8)
    weight = torch.zeros(2, 1, layout.num_tokens)
    weight[0, 0, 3:5] = -torch.inf
    masked = method_attention(method, layout, q, k, v, kv_log_weight=weight)
    padded = Layout.image(6, 7, text=5, text_lengths=[3, 5])
    assert torch.equal(masked, method_attention(method, padded, q, k, v))
    # Image tokens and heads of their own, against the formula.
    weight = torch.zeros(1, 2, layout.num_tokens)
    weight[0, 0, 9:13] = weight[0, 1, 40:] = -torch.inf
    masked = method_attention(method, layout, q, k, v, kv_log_weight=weight)
    for head in (0, 1):
        mine = [x[:, head : head + 1] for x in (q, k, v)]
        valid = torch.isfinite(weight[:, head]).float().expand(2, -1)
        expected = dense(method, layout, *mine, {}, valid)
        torch.testing.assert_close(masked[:, head : head + 1], expected)
    nothing = torch.full((1, 1, layout.num_tokens), -torch.inf)
    out = method_attention(method, layout, q, k, v, kv_log_weight=nothing)
    assert torch.equal(out, torch.zeros_like(out))


def test_training_starts_from_the_training_free_form():
    """And every parameter has a gradient from there."""
    layout, method = LAYOUTS["text in front, padded"], Agent(**METHOD, trained=True)
    q, k, v, grad = attention_inputs(2, 2, layout.num_tokens, 8)
    own = {n: x.requires_grad_() for n, x in method.parameters(2, 8).items()}
    out = method_attention(method, layout, q, k, v, **own)
    torch.testing.assert_close(out, method_attention(Agent(**METHOD), layout, q, k, v))
    out.backward(grad)
    assert all(float(x.grad.abs().max()) > 0 for x in own.values())


def test_as_many_agents_as_tokens_pool_nothing():
    """Then the agents are the queries themselves."""
    layout, method = Layout.image(5, 7), Agent(agents=7, sharpness=1, shortcut=0)
    q, k, v, _ = attention_inputs(1, 2, 35, 8)
    inner = F.scaled_dot_product_attention(q, k, v)
    expected = F.scaled_dot_product_attention(q, q, inner)
    torch.testing.assert_close(method_attention(method, layout, q, k, v), expected)


@pytest.mark.parametrize("learns", [False, True], ids=["training-free", "trained"])
def test_flops_are_those_of_its_products(learns):
    """Counted by PyTorch itself."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    layout = Layout((Context(5), Grid(3, 10, 13), Grid(1, 2, 9)))
    method = Agent(agents=(2, 3, 4), text_agents=2, trained=learns)
    q, k, v, _ = attention_inputs(1, 4, layout.num_tokens, 8)
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counted,
        torch.no_grad(),
    ):
        method_attention(method, layout, q, k, v, **method.parameters(4, 8))
    assert method.flops(layout, 4, 8) == counted.get_total_flops()
    assert method.amount(layout, 4, 8).density is None


def test_compiled_whole_without_a_break():
    layout, method = LAYOUTS["text in front, padded"], Agent(**METHOD, trained=True)
    parameters = trained(method, 2, 8)
    q, k, v, _ = attention_inputs(2, 2, layout.num_tokens, 8)
    kept = method.keep(layout, q.device)
    run = lambda q, k, v: method_attention(method, layout, q, k, v, kept=kept, **parameters)  # noqa: E731
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), run(q, k, v))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(agents=0), "agents along frames must be an integer, at least 1; got 0"),
        (dict(agents=(4, 0)), "agents along columns must be an integer, at least 1; got 0"),
        (dict(agents=(1, 2, 3, 4)), "agents must have 1 to 3 entries"),
        (dict(text_agents=-1), "text_agents must be an integer, at least 0; got -1"),
        (dict(sharpness=0), "sharpness must be a finite number above 0; got 0"),
        (dict(shortcut=-0.1), "shortcut must be a finite number, at least 0"),
        (dict(shortcut=math.inf), "shortcut must be a finite number"),
        (dict(trained=1), "trained must be True or False; got 1"),
    ],
)
def test_bad_options(arguments, words):
    with pytest.raises(ValueError, match=words):
        Agent(**arguments)


def test_bad_parameters():
    layout, method = LAYOUTS["390"], Agent(**METHOD, trained=True)
    q, k, v, _ = attention_inputs(1, 2, 390, 8)
    with pytest.raises(ValueError, match=r"gather_bias must be \[2, 24, 70\] for 2 heads of 8"):
        method_attention(method, layout, q, k, v, **method.parameters(4, 8))
    own = method.parameters(2, 8)
    del own["kernel"]
    with pytest.raises(ValueError, match="lack kernel; give all of them, or none"):
        method_attention(method, layout, q, k, v, **own)
    with pytest.raises(ValueError, match="no lse"):
        method_attention(method, layout, q, k, v, return_lse=True)
    with pytest.raises(ValueError, match=r"do not tell their heads.*trained=False"):
        method.parameters(None, None)
    text = Layout((Context(390),))
    with pytest.raises(ValueError, match="no grid"):
        method_attention(method, text, q, k, v)
    with pytest.raises(ValueError, match="describes 390 tokens"):
        functional.agent_attention(q[:, :, 1:], k, v, layout)


def test_functional_takes_parameters():
    layout, method = LAYOUTS["390"], Agent((2, 4, 4), trained=True)
    q, k, v, _ = attention_inputs(1, 2, 390, 8)
    assert torch.equal(
        functional.agent_attention(q, k, v, layout, 5, 3, sharpness=1.0, shortcut=0.0),
        method_attention(Agent(5, 3, 1.0, 0.0), layout, q, k, v),
    )
    own = trained(method, 2, 8)
    out = functional.agent_attention(q, k, v, layout, (2, 4, 4), parameters=own)
    assert torch.equal(out, method_attention(method, layout, q, k, v, **own))


@pytest.mark.parametrize(
    "method",
    [Agent(), Agent(agents=7, trained=True), Linear(hidden=8), SLA(Local(window=4))],
    ids=["agent", "trained", "linear", "sla"],
)
def test_the_work_of_a_call_is_linear(method):
    """Counted at the published range; docs/growth-linear.json has seconds and memory, measured."""
    tokens = [4096, 16384, 65536]
    layouts = [growing_layout(n) for n in tokens]
    plans = [None if method.computes else method.keep(x, "cpu") for x in layouts]
    works = [method.amount(x, 1, 64, p).work * n**2 for x, n, p in zip(layouts, tokens, plans)]
    assert exponent(tokens, works) < 1.02


def test_registered():
    assert METHODS["agent"] is Agent and Agent.computes and Agent.needs_grid


# In a model.


def test_enabled_it_is_its_formula_in_every_layer():
    """Stock projections and output around the dense formula, put in the place of PyTorch's call."""
    pipe = tiny.flux_pipeline()
    stock = tiny.run(pipe)
    options = dict(agents=(2, 2), text_agents=3, trained=True)
    with dittfast.enable(pipe, "agent", min_tokens=0, **options) as enabled:
        parameters = method_parameters(pipe)
        assert len(parameters) == 3 * len(enabled.describe().layers)
        with torch.no_grad():
            for n, p in enumerate(parameters.values()):
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(n)))
        found = tiny.run(pipe)
        described, layout = enabled.describe(), pipe.transformer._dittfast.layout
        own = {n: {k: x.detach().clone() for k, x in layer.parameters.items()}
               for n, layer in pipe.transformer._dittfast.layers.items()}  # fmt: skip
    assert described.density is None and described.work > 0
    assert torch.equal(tiny.run(pipe), stock)

    method = Agent(**options)

    def formula(parameters, q, k, v):
        mine = {n: x.double() for n, x in parameters.items()}
        return dense(method, layout, q, k, v, mine, torch.ones(len(q), q.shape[2]).double())

    with attention_by(pipe.transformer, own, formula):
        torch.testing.assert_close(tiny.run(pipe), found, rtol=1e-4, atol=1e-4)
    assert float((found - stock).abs().max()) > 1e-3


def test_processor_equals_enable():
    pipe = tiny.flux_pipeline()
    with dittfast.enable(pipe, "agent", min_tokens=0, agents=(2, 2)):
        expected = tiny.run(pipe)
    options = dict(heads=2, head_dim=16, agents=(2, 2), trained=True)
    processor = dittfast.AgentAttnProcessor(**options)
    pipe.transformer.set_attn_processor(processor)
    torch.testing.assert_close(tiny.run(pipe), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        processor.parameters["kernel"].add_(0.5)
    assert not torch.allclose(tiny.run(pipe), expected, atol=1e-3)


def test_what_is_untrained_is_said_once(caplog):
    caplog.set_level(logging.WARNING, logger="dittfast")
    model, inputs = tiny.flux_transformer(), tiny.flux_inputs()
    said = lambda: [r.message for r in caplog.records if "untrained" in r.message]  # noqa: E731

    def draw():
        with torch.no_grad():
            model(**inputs)

    cases = [
        (["linear"], "linear"),
        (["linear", {"hidden": 0}], "linear"),
        (["agent", {"trained": True}], "agent"),
        ([{"0": "local", "1": {"method": "linear"}}], "linear"),
        (["agent"], None),
        (["sla", {"sparse": "local"}], None),
    ]
    for (method, *options), name in cases:
        caplog.clear()
        with dittfast.enable(model, method, min_tokens=0, **(options[0] if options else {})):
            draw()
            draw()
        assert len(said()) == (name is not None), method
        assert name is None or f"untrained: {name} is meant" in said()[0]
        assert name is None or "dittfast.load_adapter" in said()[0]
    caplog.clear()
    with dittfast.enable(model, "linear", min_tokens=0):
        with torch.no_grad():
            for p in method_parameters(model).values():
                p.add_(0.1)
        draw()
    with dittfast.enable(model, "linear", min_tokens=0):
        model(**inputs)  # a training pass
        draw()
    assert not said()
