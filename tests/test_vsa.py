"""`vsa` against its formula, cube by cube and query by query in fp64."""

import json
import math

import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import dittfast
from dittfast import functional
from dittfast.attention import method_attention
from dittfast.disk.tensors import read_tensors
from dittfast.layout import Context, Grid, Layout
from dittfast.methods import VSA, TopK
from dittfast.pipelines.runs import sources
from dittfast.testing import assert_within_budget, attention_inputs


def blocks_of(layout, cube):
    """``[(tokens, is text)]``: cubes in raster order, and text in pieces of as many tokens."""
    blocks = []
    for start, segment in layout.spans():
        if not isinstance(segment, Grid):
            whole = range(start, start + segment.length)
            pieces = range(0, segment.length, math.prod(cube))
            blocks += [(list(whole[i : i + math.prod(cube)]), True) for i in pieces]
            continue
        cubes = {}
        for t in range(segment.frames):
            for y in range(segment.height):
                for x in range(segment.width):
                    at = t // cube[0], y // cube[1], x // cube[2]
                    token = start + (t * segment.height + y) * segment.width + x
                    cubes.setdefault(at, []).append(token)
        blocks += [(cubes[at], False) for at in sorted(cubes)]
    return blocks


def oracle_head(q, k, v, gate, blocks, kept, weight, choice, scale):
    """``(out [N, D], choice)`` of one batch row and head; ``weight [N]`` natural log."""
    live = [[t for t in tokens if weight[t] > -math.inf] for tokens, _ in blocks]
    alive = [b for b, tokens in enumerate(live) if tokens]
    mean = lambda x, b: x[live[b]].mean(0)  # noqa: E731
    cubes = [b for b, (_, text) in enumerate(blocks) if not text]
    k_mean, v_mean = ({b: mean(x, b) for b in alive} for x in (k, v))
    out, chosen = [None] * len(q), {} if choice is None else choice
    for a, (rows, text) in enumerate(blocks):
        if a not in alive:  # padding: anything
            for i in rows:
                out[i] = 0 * q[0] + math.nan
            continue
        score = {b: scale * mean(q, a) @ k_mean[b] for b in alive}
        if choice is None:
            by = {b: float(score[b].detach()) if b in score else -math.inf for b in cubes}
            best = sorted(cubes, key=lambda b: (-by[b], b))[:kept]
            chosen[a] = [b for b in alive if text or blocks[b][1] or b in best]
        share = torch.softmax(torch.stack([score[b] for b in alive]), 0)
        coarse = share @ torch.stack([v_mean[b] for b in alive])
        tokens = [t for b in chosen[a] for t in live[b]]
        for i in rows:
            logits = scale * k[tokens] @ q[i] + weight[tokens]
            out[i] = torch.softmax(logits, 0) @ v[tokens] + gate[i] * coarse
    return torch.stack(out), chosen


def oracle(q, k, v, gate, layout, method, weight, choice=None, scale=None):
    """``(out, choice)`` in the inputs' dtype; k and v may have fewer heads."""
    groups, blocks = q.shape[1] // k.shape[1], blocks_of(layout, method.cube)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    n = sum(not text for _, text in blocks)
    kept = method.topk if isinstance(method.topk, int) else math.ceil(method.topk * n - 1e-9)
    heads, found = [], {}
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            own, at = weight[b % len(weight), h % weight.shape[1]].to(q), (b, h // groups)
            known = None if choice is None else choice[b, h]
            args = q[b, h], k[at], v[at], gate[b, h], blocks, min(kept, n)
            head, found[b, h] = oracle_head(*args, own, known, scale)
            heads.append(head)
    return torch.stack(heads).unflatten(0, q.shape[:2]), found


def hidden(layout):
    weight = torch.zeros(len(layout.context_lengths or [0]), 1, layout.num_tokens)
    if layout.context_lengths is not None:
        weight[~layout.valid()[:, None]] = -math.inf
    return weight


def check(
    method, layout, batch=1, heads=2, head_dim=8, dtype=torch.float32, size=1.0, backend="cpu",
    groups=1, kv_log_weight=None, scale=None, judge=assert_within_budget,
):  # fmt: skip
    """Output and every gradient against the formula in fp64; what it chose."""
    inputs = attention_inputs(batch, heads, layout.num_tokens, head_dim, dtype=dtype, scale=size)
    q, k, v, grad = inputs
    k, v = k[:, ::groups], v[:, ::groups]
    gate = torch.randn(q.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    weight = hidden(layout) if kv_log_weight is None else hidden(layout) + kv_log_weight
    dead = (weight == -math.inf).expand(batch, heads, -1)  # nobody looks at their output
    given = {"kv_log_weight": kv_log_weight, "scale": scale, "backend": backend}

    def run(function, kind):
        leaves = [x.to(kind).requires_grad_() for x in (q, k, v, gate)]
        out, choice = function(*leaves)
        out = out.masked_fill(dead[..., None], 0)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(kind))], choice

    def ours(q, k, v, gate):
        return method_attention(method, layout, q, k, v, gate=gate, **given), None

    told = lambda known: lambda *x: oracle(*x, layout, method, weight, known, scale)  # noqa: E731
    exact, choice = run(told(None), torch.float64)
    eager, _ = run(told(choice), dtype)
    found, _ = run(ours, dtype)
    for name, *sides in zip(("out", "dq", "dk", "dv", "dgate"), found, exact, eager):
        judge(name, *sides, **({"floor": 16} if judge is assert_within_budget else {}))
    return choice


LAYOUTS = {
    "cubes of many sizes": Layout.video(3, 4, 7),
    "image": Layout.image(7, 9),
    "text first, padded": Layout.image(6, 9, text=11, text_lengths=[11, 4]),
    "text behind, a row without any": Layout.video(3, 4, 4, text=9, text_lengths=[0, 9]),
    "several grids": Layout((Grid(1, 5, 7), Context(5), Grid(1, 2, 4))),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_is_its_formula(name):
    layout = LAYOUTS[name]
    method = VSA(topk=2, cube=(2, 2, 3) if layout.grid.frames > 1 else (1, 3, 4))
    choice = check(method, layout, 2, 1, dtype=torch.float64, scale=0.5)
    count = len(blocks_of(layout, method.cube))
    seen = [len(row) for head in choice.values() for row in head.values()]
    assert min(seen) < count - 2
    assert len({tuple(row) for head in choice.values() for row in head.values()}) > 2


@pytest.mark.parametrize("backend", ["native", "cpu", "reference", "triton"])
def test_every_backend_with_fewer_key_heads(backend):
    layout, topk, heads = Layout.image(5, 7, text=3, text_lengths=[1]), 3, 4
    if backend == "triton":  # interpreted
        layout, topk, heads = Layout.image(4, 3, text=2, text_lengths=[1]), 1, 2
    check(VSA(topk, (1, 2, 3)), layout, 1, heads, 16, size=2.0, backend=backend, groups=2)


@pytest.mark.slow
def test_flex_with_its_gate():
    """Without gradients, which flex_attention has none of on a CPU."""
    layout = Layout.video(2, 4, 6, text=3)
    q, k, v, gate = attention_inputs(1, 2, layout.num_tokens, 16)
    method = VSA(3, (2, 2, 2))
    with torch.no_grad():
        found = method_attention(method, layout, q, k, v, gate=gate, backend="flex")
        wide = [x.double() for x in (q, k, v, gate)]
        expected, _ = oracle(*wide, layout, method, hidden(layout))
    torch.testing.assert_close(found, expected.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    check(VSA(0.4, (2, 2, 2)), Layout.video(3, 4, 5), dtype=dtype)


@pytest.mark.parametrize("per_head", [1, 2])
def test_log_weights_of_the_call(per_head):
    """Hidden keys are in no mean, and a cube without any other is not there."""
    layout = Layout.image(6, 9, text=4, text_lengths=[2, 4])
    weight = torch.randn(2, per_head, layout.num_tokens, generator=torch.Generator().manual_seed(1))
    at = torch.arange(54)
    first = (at // 9 < 2) & (at % 9 < 3)
    weight[:, :, 4:][..., first] = -math.inf
    weight[0, :, 45] = -math.inf
    # All cubes, for hidden keys make no difference to the choice.
    method = VSA(1.0, (1, 2, 3))
    check(method, layout, 2, dtype=torch.float64, kv_log_weight=weight)


def test_what_padding_holds_makes_no_difference():
    layout = Layout.image(6, 9, text=12, text_lengths=[3])
    q, k, v, gate = attention_inputs(1, 2, layout.num_tokens, 8)
    valid = layout.valid()[0]
    run = lambda *qkv: functional.video_sparse_attention(*qkv, layout, 3, (1, 3, 3), gate=gate)  # noqa: E731
    clean = run(q, k, v)
    worse = [x.clone() for x in (q, k, v)]
    for x in worse:
        x[:, :, ~valid] = 1e4
    assert torch.equal(run(*worse)[:, :, valid], clean[:, :, valid])


def test_without_a_gate_it_is_topk_on_cubes():
    layout = Layout.video(5, 6, 7, text=4)
    q, k, v, _ = attention_inputs(1, 2, layout.num_tokens, 16)
    method = VSA(topk=5, cube=(2, 3, 2))
    expected = functional.topk_attention(q, k, v, layout, topk=5, score="mean", tile=(2, 3, 2))
    assert torch.equal(method_attention(method, layout, q, k, v), expected)
    zero = torch.zeros_like(q)
    assert torch.equal(functional.video_sparse_attention(q, k, v, layout, 5, (2, 3, 2), gate=zero),
                       expected)  # fmt: skip
    everything = functional.video_sparse_attention(q, k, v, layout, 1.0)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(everything, dense)


def test_the_gate_is_a_projection_of_the_hidden_states():
    layout, method = Layout.video(3, 4, 5), VSA(topk=2, cube=(2, 2, 2), gate=True)
    q, k, v, _ = attention_inputs(2, 3, 60, 8)
    draw = torch.Generator().manual_seed(2)
    states = torch.randn(2, 60, 20, generator=draw)
    own = method.parameters(3, 8, 20)
    assert {n: tuple(x.shape) for n, x in own.items()} == {
        "gate_weight": (24, 20),
        "gate_bias": (24,),
    }
    run = lambda own: method_attention(method, layout, q, k, v, hidden_states=states, **own)  # noqa: E731
    fine = functional.video_sparse_attention(q, k, v, layout, 2, (2, 2, 2))
    assert torch.equal(run(own), fine)
    own = {n: torch.randn(x.shape, generator=draw).requires_grad_() for n, x in own.items()}
    gate = torch.empty_like(q)
    for h in range(3):
        rows = slice(8 * h, 8 * h + 8)
        gate[:, h] = states @ own["gate_weight"][rows].T + own["gate_bias"][rows]
    expected = functional.video_sparse_attention(q, k, v, layout, 2, (2, 2, 2), gate=gate)
    torch.testing.assert_close(run(own), expected)
    assert all(x.abs().max() > 0 for x in torch.autograd.grad(run(own).sum(), own.values()))


@pytest.mark.parametrize("topk, kept", [(0.2, 1), (0.21, 2), (1.0, 5), (1, 1), (9, 5)])
def test_a_share_of_the_cubes_is_rounded_up(topk, kept):
    layout = Layout.video(4, 4, 20)
    method = VSA(topk)
    q, k, _, _ = attention_inputs(1, 1, layout.num_tokens, 8)
    plan = method.planner.plan(layout, q, k)
    assert bool((plan.kv_num_blocks == kept).all())
    amount = method.amount(layout, 2, 8)
    assert amount.density == pytest.approx(kept / 5) == plan.density


def test_amount_counts_the_coarse_part_and_the_projection():
    layout = Layout.video(8, 8, 8, text=64)
    fine, gated = VSA(2), VSA(2, gate=True)
    assert fine.amount(layout, 2, 8).work == fine.amount(layout, 2, 8).density
    whole = layout.num_tokens
    expected = (512 * (2 * 64 + 64) + 64 * whole) / whole**2
    assert fine.amount(layout, 2, 8).density == pytest.approx(expected)
    more = gated.flops(layout, 2, 8) - fine.flops(layout, 2, 8)
    assert more == 4 * 9 * 9 * 16 + 2 * whole * 16 * 16  # between nine blocks; a linear layer
    assert gated.amount(layout, 2, 8).work == pytest.approx(expected + more / (4 * whole**2 * 16))
    assert gated.amount(layout, None, None).work is None


@pytest.mark.slow
def test_compiled_whole_without_a_break():
    layout, method = LAYOUTS["text first, padded"], VSA(2, (1, 3, 4), gate=True)
    q, k, v, _ = attention_inputs(2, 2, layout.num_tokens, 8)
    states = torch.randn(2, layout.num_tokens, 12)
    own = {n: torch.randn_like(x) for n, x in method.parameters(2, 8, 12).items()}
    kept = method.keep(layout, q.device)
    method.prepare(layout, q.device)

    def run(q, k, v):
        given = dict(kept=kept, hidden_states=states, backend="cpu")
        return method_attention(method, layout, q, k, v, **given, **own)

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), run(q, k, v))


BAD = [
    (dict(topk=0), "topk must be an integer, at least 1; got 0"),
    (dict(topk=1.5), r"topk as a share must lie in \(0, 1\]; got 1.5"),
    (dict(topk=None), "topk must be a number of cubes or a share of them; got None"),
    (dict(cube=(4, 4)), r"cube must be \(frames, height, width\); got \(4, 4\)"),
    (dict(cube=4), r"cube must be \(frames, height, width\); got 4"),
    (dict(cube=(0, 4, 4)), "each side of cube must be an integer, at least 1; got 0"),
    (dict(cube=(8, 8, 8)), r"tokens in a cube must be an integer, 1\.\.256; got 512"),
    (dict(gate=1), "gate must be True or False; got 1"),
]


@pytest.mark.parametrize("options, message", BAD, ids=[str(options) for options, _ in BAD])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        VSA(**options)


def test_bad_inputs():
    layout = Layout.video(2, 4, 4)
    q = torch.zeros(1, 2, 32, 8)
    with pytest.raises(ValueError, match=r"gate must be \[B, H, N, D\] = \[1, 2, 32, 8\] like q"):
        functional.video_sparse_attention(q, q, q, layout, gate=q[..., :4])
    method, states = VSA(gate=True), torch.zeros(1, 32, 12)
    own = method.parameters(2, 8, 20)
    with pytest.raises(ValueError, match=r"gate must be \[16, 12\] with a bias \[16\] for 2 heads"):
        method_attention(method, layout, q, q, q, hidden_states=states, **own)
    with pytest.raises(ValueError, match="needs the layer's hidden states"):
        method_attention(method, layout, q, q, q, **own)
    with pytest.raises(ValueError, match=r"channels must be an integer.*gate=False leaves it out"):
        method.parameters(2, 8, None)
    with pytest.raises(ValueError, match="grid"):
        functional.video_sparse_attention(q, q, q, Layout((Context(32),)))
    with pytest.raises(ValueError, match="topk has values for 3 heads, q has 2"):
        method_attention(VSA(topk=(1, 2, 3)), layout, q, q, q)
    assert TopK(tile=[1, 2, 2]).tile == (1, 2, 2)
    with pytest.raises(ValueError, match=r"tokens in a tile must be an integer, 1\.\.256; got 300"):
        TopK(tile=(3, 10, 10))


# In a model.

IN_MODEL = VSA(topk=2, cube=(1, 2, 3), gate=True)


def wan():
    """A tiny Wan, its inputs, and random gates for each layer."""
    torch.manual_seed(0)
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs(frames=2, height=8, width=8, batch=1)
    layers = ("blocks.0.attn1", "blocks.1.attn1")
    draw = torch.Generator().manual_seed(3)
    gates = {name: (torch.randn(32, 32, generator=draw), torch.randn(32, generator=draw))
             for name in layers}  # fmt: skip
    return model, inputs, gates


@torch.no_grad()
def directly(model, inputs, gates, method):
    """Stock projections and output around the formula, put in the place of PyTorch's call."""
    layout, inside = Layout.video(2, 4, 4), []

    def by_formula(query, key, value, **_):
        states, (weight, bias) = inside[-1]
        gate = (states @ weight.T + bias).view(1, 32, 2, 16).transpose(1, 2)
        wide = [x.double() for x in (query, key, value, gate)]
        return oracle(*wide, layout, method, hidden(layout))[0].to(query)

    def enter(name):
        def hook(module, args, kwargs):
            inside.append((args[0] if args else kwargs["hidden_states"], gates[name]))
            F.scaled_dot_product_attention = by_formula

        return hook

    def leave(*_):
        F.scaled_dot_product_attention = stock

    stock = F.scaled_dot_product_attention
    for name in gates:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(enter(name), with_kwargs=True)
        module.register_forward_hook(leave, always_call=True)
    return model(**inputs)[0]


def test_enabled_it_is_its_formula_in_every_layer():
    model, inputs, gates = wan()
    with torch.no_grad(), dittfast.enable(model, IN_MODEL, min_tokens=0) as enabled:
        fine = model(**inputs)[0]
        for name, values in gates.items():
            own = model._dittfast.layers[name].parameters
            assert torch.equal(own["gate_weight"], torch.zeros(32, 32))
            own["gate_weight"].copy_(values[0]), own["gate_bias"].copy_(values[1])
        found, described = model(**inputs)[0], enabled.describe()
    assert described.density == pytest.approx(2 / 8, abs=0.1) and described.work > described.density
    assert float((found - fine).abs().max()) > 1e-2
    expected = directly(model, inputs, gates, IN_MODEL)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def fastvideo(model, gates, path, **changes):
    """A file as FastVideo writes it: the stock weights, and gates of blocks or of attention."""
    weights = {n: x + 0.1 for n, x in model.state_dict().items()}
    for block, (weight, bias) in enumerate(gates.values()):
        owner = f"blocks.{block}" + (".attn1" if block else "")
        weights |= {f"{owner}.to_gate_compress.weight": weight}
        weights |= {f"{owner}.to_gate_compress.bias": bias}
    save_file({n: x.contiguous() for n, x in (weights | changes).items()}, path)


def test_checkpoints_of_fastvideo_load_with_their_gates(tmp_path):
    model, inputs, gates = wan()
    stock = {n: x.clone() for n, x in model.state_dict().items()}
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    fastvideo(model, gates, path)
    with torch.no_grad():
        plain = model(**inputs)[0]
        dittfast.load_adapter(model, path, topk=2, cube=(1, 2, 3))
        assert dittfast.describe(model).method == IN_MODEL
        found = model(**inputs)[0]
        dittfast.unload_adapter(model)
        assert torch.equal(model(**inputs)[0], plain)
    model.load_state_dict({n: x + 0.1 for n, x in stock.items()})
    expected = directly(model, inputs, gates, IN_MODEL)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_in_several_files_is_one(tmp_path):
    model, _, gates = wan()
    whole = tmp_path / "whole.safetensors"
    fastvideo(model, gates, whole)
    tensors, index = read_tensors(whole), tmp_path / "model.safetensors.index.json"
    halves = {"a.safetensors": sorted(tensors)[::2], "b.safetensors": sorted(tensors)[1::2]}
    for file, names in halves.items():
        save_file({name: tensors[name] for name in names}, tmp_path / file)
    write = lambda named: index.write_text(json.dumps({"metadata": {}, "weight_map": named}))  # noqa: E731
    named = {name: file for file, names in halves.items() for name in names}
    write(named)
    loaded = []
    for path in (whole, index):
        dittfast.load_adapter(model, path, topk=2, cube=(1, 2, 3))
        layers = model._dittfast.layers.values()
        own = [x.clone() for layer in layers for x in layer.parameters.values()]
        loaded.append(own + [x.clone() for x in model.state_dict().values()])
        dittfast.unload_adapter(model)
    assert len(loaded[0]) > 20 and all(map(torch.equal, *loaded))
    for file in ("../whole.safetensors", "/etc/passwd", "c.safetensors"):
        write(named | {"blocks.0.to_gate_compress.bias": file})
        with pytest.raises((ValueError, OSError), match=r"is no file beside it|c\.safetensors"):
            dittfast.load_adapter(model, index)
    write({})
    with pytest.raises(ValueError, match="it names no file"):
        dittfast.load_adapter(model, index)


def test_gates_are_never_dropped_and_fit_or_are_refused(tmp_path):
    model, _, gates = wan()
    path = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    path.parent.mkdir()
    gate = "blocks.0.to_gate_compress.weight"
    fastvideo(model, gates, path)

    def refused(words, **options):
        with pytest.raises(ValueError, match=words):
            dittfast.load_adapter(model, path, **options)
        assert not hasattr(model, "_dittfast")

    first = r"4 weights of VSA's gates \(blocks.0.to_gate_compress.bias is the first\), which "
    dropped = first + "{} would drop.*gate=True"
    refused(dropped.format(r"Local\(.*\)"), method="local", window=2)
    refused(dropped.format(r"VSA\(\)"), method="vsa")
    with pytest.raises(ValueError, match=first + "diffusers would leave out"):
        sources.load(sources.Source("folder", "mine", str(tmp_path)))
    fastvideo(model, gates, path, **{gate: torch.zeros(32, 16)})
    refused(r"blocks.0.attn1.gate_weight \[32, 16\] does not fit .*, which wants \[32, 32\]")
    fastvideo(model, gates, path, **{"head.to_gate_compress.weight": torch.zeros(2, 2)})
    refused("head.to_gate_compress.weight has no place: head has 0 layers of self-attention")
    fastvideo(model, gates, path, **{gate: torch.full((32, 32), math.nan)})
    refused("holds values that are not finite")
