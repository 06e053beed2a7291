"""`linear` against its formula, written densely in fp64 from the paper."""

import copy

import pytest
import tiny
import torch
import torch.nn.functional as F
from formula import attention_by

import dittfast
from dittfast import Layout, functional
from dittfast.attention import method_attention
from dittfast.methods import METHODS, Linear, linear
from dittfast.pipelines.adapter import method_parameters
from dittfast.testing import assert_within_budget, attention_inputs

LAYOUTS = {
    "one token": Layout.image(1, 1),
    "63": Layout.image(9, 7),
    "text in front, padded": Layout.image(13, 8, text=7, text_lengths=[3, 7]),
    "text behind a video": Layout.video(3, 5, 7, text=6, text_first=False, text_lengths=[6, 1]),
    "390": Layout.video(3, 10, 13),
}


def feature_map(x, parameters, which):
    """elu(x + F(x)) + 1 as the paper writes it, head by head."""
    if not parameters:
        return F.elu(x) + 1
    get = lambda name: parameters[f"{which}_{name}"].to(x)  # noqa: E731
    heads = []
    for h in range(x.shape[1]):
        inside = x[:, h] @ get("in")[h] + get("in_bias")[h]
        centred = inside - inside.mean(-1, keepdim=True)
        inside = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        inside = inside * get("norm")[h] + get("norm_bias")[h]
        inside = torch.where(inside > 0, inside, 0.01 * inside)
        heads.append(x[:, h] + inside @ get("out")[h] + get("out_bias")[h])
    return F.elu(torch.stack(heads, 1)) + 1


def dense(q, k, v, parameters, valid):
    """All pairs at once: shares of the keys that count, over their sum and 1e-4."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    pairs = feature_map(q, parameters, "q") @ feature_map(k, parameters, "k").mT
    pairs = pairs * valid[:, None, None]
    count = valid.sum(-1)[:, None, None, None]
    return (pairs / count) @ v / ((pairs / count).sum(-1, keepdim=True) + 1e-4)


def trained(method, heads, head_dim, dtype=torch.float32):
    """Parameters away from where they start."""
    draw = torch.Generator().manual_seed(3)
    noise = lambda x: 0.3 * torch.randn(x.shape, generator=draw)  # noqa: E731
    found = {n: x + noise(x) for n, x in method.parameters(heads, head_dim).items()}
    return {n: x.to(dtype).requires_grad_() for n, x in found.items()}


def both(layout, parameters, heads=4, kv_heads=4, dim=8, scale=1.0, dtype=torch.float32):
    """Output and every gradient: ours, the formula's in fp64 and the formula's in ``dtype``."""
    q, k, v, grad = attention_inputs(2, heads, layout.num_tokens, dim, scale=scale, dtype=dtype)
    k, v = k[:, :kv_heads], v[:, :kv_heads]
    valid = layout.valid()
    valid = torch.ones(1, layout.num_tokens) if valid is None else valid
    found = []
    for name, wide in (("ours", dtype), ("exact", torch.float64), ("eager", dtype)):
        leaves = [x.detach().to(wide).requires_grad_() for x in (q, k, v)]
        own = {n: x.detach().to(wide).requires_grad_() for n, x in parameters.items()}
        if name == "ours":
            out = functional.linear_attention(*leaves, layout, parameters=own)
        else:
            out = dense(*leaves, own, valid.to(wide))
        grads = torch.autograd.grad(out, [*leaves, *own.values()], grad.to(wide))
        found.append([out.detach(), *grads])
    return ["out", "dq", "dk", "dv", *parameters], *found


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("hidden", [0, 3, None])
def test_output_and_gradients(layout, hidden, nan_empty):
    method = Linear(hidden=hidden)
    for name, *sides in zip(*both(layout, trained(method, 4, 8))):
        assert_within_budget(name, *sides, factor=8, floor=16)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("hidden", [0, 5])
def test_grouped_queries(kv_heads, hidden):
    layout = LAYOUTS["text in front, padded"]
    parameters = trained(Linear(hidden=hidden), 4, 8)
    for name, *sides in zip(*both(layout, parameters, kv_heads=kv_heads)):
        assert_within_budget(name, *sides, factor=8, floor=16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0])
def test_dtypes_and_scales(dtype, scale):
    layout = LAYOUTS["63"]
    parameters = {n: x.to(dtype) for n, x in trained(Linear(hidden=3), 2, 8).items()}
    floor = 1000 if dtype == torch.float64 else 16  # nothing is more exact to compare with
    for name, *sides in zip(*both(layout, parameters, 2, 2, scale=scale, dtype=dtype)):
        assert_within_budget(name, *sides, factor=8, floor=floor)


def test_hidden_keys_may_hold_anything():
    layout = LAYOUTS["text in front, padded"]
    q, k, v, _ = attention_inputs(2, 2, layout.num_tokens, 8)
    clean = functional.linear_attention(q, k, v, layout)
    hidden = ~layout.valid()
    k, v = k.clone(), v.clone()
    k.transpose(1, 2)[hidden] = torch.nan
    v.transpose(1, 2)[hidden] = torch.inf
    assert torch.equal(functional.linear_attention(q, k, v, layout), clean)


def test_a_mask_over_keys_counts_as_padding_does():
    layout = Layout.image(6, 7, text=5)
    q, k, v, _ = attention_inputs(2, 2, layout.num_tokens, 8)
    weight = torch.zeros(2, 1, layout.num_tokens)
    weight[0, 0, 3:5] = -torch.inf
    masked = method_attention(Linear(), layout, q, k, v, kv_log_weight=weight)
    padded = Layout.image(6, 7, text=5, text_lengths=[3, 5])
    assert torch.equal(masked, functional.linear_attention(q, k, v, padded))
    nothing = torch.full((1, 1, layout.num_tokens), -torch.inf)
    out = method_attention(Linear(), layout, q, k, v, kv_log_weight=nothing)
    assert torch.equal(out, torch.zeros_like(out))


def test_it_starts_without_its_map():
    """The last layer of F is zero at the start, and has a gradient from there."""
    layout = LAYOUTS["63"]
    q, k, v, grad = attention_inputs(1, 2, 63, 8)
    own = {n: x.requires_grad_() for n, x in Linear().parameters(2, 8).items()}
    out = functional.linear_attention(q, k, v, layout, parameters=own)
    assert torch.equal(out, functional.linear_attention(q, k, v, layout))
    out.backward(grad)
    assert own["q_out"].grad.abs().min() > 0 and own["k_out_bias"].grad.abs().min() > 0


def test_chunks_change_nothing(monkeypatch):
    layout = LAYOUTS["390"]
    parameters = trained(Linear(hidden=3), 2, 8)
    whole = both(layout, parameters, 2, 2)[1]
    monkeypatch.setitem(linear._AT_ONCE, "cpu", 2 * 2 * 8 * 37)
    for name, a, b in zip(["out", "dq", "dk", "dv", *parameters], whole, both(
        layout, parameters, 2, 2
    )[1]):  # fmt: skip
        torch.testing.assert_close(a, b, msg=name)


def test_flops_are_those_of_its_products():
    """Counted by PyTorch itself, but for the products with a vector."""
    from torch.utils.flop_counter import FlopCounterMode

    layout, method = LAYOUTS["390"], Linear(hidden=3)
    q, k, v, _ = attention_inputs(1, 4, 390, 8)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        method_attention(method, layout, q, k, v, **method.parameters(4, 8))
    normalise = 2 * 390 * 4 * 8
    assert method.flops(layout, 4, 8) == counted.get_total_flops() + normalise
    assert method.amount(layout, 4, 8).density is None


def test_compiled_whole_without_a_break():
    layout, method = LAYOUTS["text in front, padded"], Linear(hidden=3)
    parameters = {n: x.detach() for n, x in trained(method, 2, 8).items()}
    q, k, v, _ = attention_inputs(2, 2, layout.num_tokens, 8)
    kept = method.keep(layout, q.device)
    run = lambda q, k, v: method_attention(method, layout, q, k, v, kept=kept, **parameters)  # noqa: E731
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), run(q, k, v))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(hidden=-1), "hidden must be an integer, at least 0; got -1"),
        (dict(hidden=2.5), "hidden must be an integer"),
    ],
)
def test_bad_options(arguments, words):
    with pytest.raises(ValueError, match=words):
        Linear(**arguments)


def test_bad_parameters():
    layout = LAYOUTS["63"]
    q, k, v, _ = attention_inputs(1, 2, 63, 8)
    own = Linear(hidden=3).parameters(4, 8)
    with pytest.raises(ValueError, match="for 4 heads of 8, q has 2 of 8"):
        functional.linear_attention(q, k, v, layout, parameters=own)
    own = Linear(hidden=3).parameters(2, 8)
    del own["k_norm"]
    with pytest.raises(ValueError, match="lacks k_norm"):
        functional.linear_attention(q, k, v, layout, parameters=own)
    with pytest.raises(ValueError, match="no lse"):
        method_attention(Linear(), layout, q, k, v, return_lse=True)
    with pytest.raises(ValueError, match="has no plan of key blocks"):
        Linear().plan(layout)
    with pytest.raises(ValueError, match=r"do not tell their heads.*hidden=0"):
        Linear().parameters(None, None)
    with pytest.raises(ValueError, match="describes 63 tokens"):
        functional.linear_attention(q[:, :, 1:], k, v, layout)


def test_registered():
    assert METHODS["linear"] is Linear and Linear.computes and not Linear.needs_grid


# In a model.


def test_enabled_it_is_its_formula_in_every_layer(monkeypatch):
    """Stock projections and output around the dense formula, put in the place of PyTorch's call."""
    pipe = tiny.flux_pipeline()
    stock = tiny.run(pipe)
    with dittfast.enable(pipe, "linear", min_tokens=0, hidden=3) as enabled:
        parameters = method_parameters(pipe)
        assert len(parameters) == 12 * len(enabled.describe().layers)
        with torch.no_grad():
            for p in parameters.values():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        found = tiny.run(pipe)
        described = enabled.describe()
        own = {n: {k: x.detach().clone() for k, x in layer.parameters.items()}
               for n, layer in pipe.transformer._dittfast.layers.items()}  # fmt: skip
    assert described.density is None and 0 < described.work < 1
    assert "FLOPs" in str(described) and "density" not in str(described)
    assert torch.equal(tiny.run(pipe), stock)

    def formula(parameters, q, k, v):
        return dense(q, k, v, parameters, torch.ones(1, q.shape[2]))

    with attention_by(pipe.transformer, own, formula):
        torch.testing.assert_close(tiny.run(pipe), found, rtol=1e-4, atol=1e-4)
    assert float((found - stock).abs().max()) > 1e-3


def test_parameters_have_the_models_dtype_and_go_with_disable():
    model = tiny.flux_transformer().bfloat16()
    before = set(model.state_dict())
    with dittfast.enable(model, "linear", min_tokens=0):
        parameters = method_parameters(model)
        assert {p.dtype for p in parameters.values()} == {torch.bfloat16}
        assert parameters["transformer.transformer_blocks.0.attn.q_in"].shape == (2, 16, 16)
        assert set(model.state_dict()) == before
    assert method_parameters(model) == {} and set(model.state_dict()) == before


def test_gradient_checkpointing_and_copies():
    model, inputs = tiny.flux_transformer(), tiny.flux_inputs()

    with dittfast.enable(model, "linear", min_tokens=0, hidden=3):
        plain = tiny.gradients(model, inputs)
        twin = copy.deepcopy(model)
        model.enable_gradient_checkpointing()
        again = tiny.gradients(model, inputs)
        assert len(plain) == len(again) > 12
        for a, b in zip(plain, again):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        for a, b in zip(plain, tiny.gradients(twin, inputs)):
            assert torch.equal(a, b)


def test_processor_equals_enable():
    pipe = tiny.flux_pipeline()
    with dittfast.enable(pipe, "linear", min_tokens=0, hidden=0):
        expected = tiny.run(pipe)
    processor = dittfast.LinearAttnProcessor(heads=2, head_dim=16)
    assert processor.parameters["q_in"].shape == (2, 16, 16)
    pipe.transformer.set_attn_processor(processor)
    torch.testing.assert_close(tiny.run(pipe), expected)
    with torch.no_grad():
        processor.parameters["q_out"].add_(0.5)
    assert not torch.allclose(tiny.run(pipe), expected, atol=1e-3)


@pytest.mark.slow
def test_time_and_memory_are_linear():
    """4,096 to 65,536 tokens on a CPU: processor time and the peak of what is allocated."""
    import time
    from statistics import median

    from dittfast.measure.growth import exponent

    tokens, seconds = [4096, 16384, 65536], []
    for n in tokens:
        q, k, v, _ = attention_inputs(1, 4, n, 64)
        layout, times = Layout.image(64, n // 64), []
        with torch.no_grad():
            for _ in range(3):
                start = time.process_time()
                functional.linear_attention(q, k, v, layout)
                times.append(time.process_time() - start)
        seconds.append(median(times))
    assert exponent(tokens, seconds) < 1.15
