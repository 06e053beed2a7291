"""`sla` against its formula, written densely in fp64: a softmax here, a linear mean there."""

import pytest
import tiny
import torch
from formula import attention_by

import dittfast
from dittfast import Layout, Plan, functional
from dittfast.attention import method_attention
from dittfast.config import resolve
from dittfast.layout import Context, Grid
from dittfast.methods import (
    METHODS,
    SLA,
    Dense,
    Linear,
    Local,
    LogLinear,
    Radial,
    Rectified,
    Sol,
    TopK,
    sla,
)
from dittfast.mixture import Rule
from dittfast.pipelines.adapter import method_parameters
from dittfast.testing import assert_within_budget, attention_inputs

# What is inside, on which layout: plans made once and from q and k, per head and for all, with
# partial blocks and without, with runs, with tokens in another order, with ragged blocks.
CASES = {
    "top-k": (TopK(16, topk=2), Layout.image(13, 8, text=7, text_lengths=[3, 7])),
    "top-k in a row": (TopK(16, topk=2, score="mean", order="raster"), Layout.image(1, 111)),
    "partial blocks": (Local(window=3, tile=(1, 4, 4)), Layout.image(9, 13, text=12)),
    "runs": (
        Radial(block_size=8, decay_factor=0.2),
        Layout.video(6, 5, 7, text=9, text_first=False, text_lengths=[9, 2]),
    ),
    "two grids": (
        TopK(8, topk=(3), score="mean"),
        Layout((Context(9), Grid(1, 9, 4), Grid(1, 3, 5))),
    ),
    "everything listed": (TopK(16, topk=100), Layout.image(9, 7)),
}


def block_mask(plan):
    """``[B|1, H|1, N, N]`` bool in token order: pairs whose key block the query block lists."""
    listed = plan.to_block_mask()

    def numbered(blocks):
        block = torch.empty(int((blocks.starts + blocks.lengths).max()), dtype=torch.int64)
        for n, (start, length) in enumerate(zip(blocks.starts.tolist(), blocks.lengths.tolist())):
            at = torch.arange(start, start + length)
            block[at if blocks.order is None else blocks.order[at].long()] = n
        return block

    return listed[:, :, numbered(plan.q_blocks)][..., numbered(plan.kv_blocks)]


def feature(kind, x):
    e = lambda x: torch.exp(x - x.amax(-1, keepdim=True))  # noqa: E731
    if kind == "softmax":
        return e(x) / e(x).sum(-1, keepdim=True)
    return torch.where(x > 0, x + 1, torch.exp(x)) if kind == "elu" else x.clamp_min(0)


def dense(plan, kind, q, k, v, projection, scale, weight=None):
    """The softmax over the plan's pairs, and the projected linear mean over the unlisted blocks."""
    own = torch.zeros(1, 1, k.shape[2]).to(q)
    for more in (plan.kv_log_weight, weight):
        own = own if more is None else own + more.to(q)
    seen, listed = plan.to_dense_mask(), block_mask(plan)
    return under_masks(seen, listed, own, kind, q, k, v, projection, scale)


def under_masks(seen, listed, weight, kind, q, k, v, projection, scale):
    """:func:`dense` with masks ``[.., N, N]`` and the log weights of keys ``[B|1, 1, N]``."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    logits = (q @ k.mT * scale + weight[:, :, None]).masked_fill(~seen, -torch.inf)
    rest = ~listed * weight.exp()[:, :, None]
    shares = feature(kind, q) @ feature(kind, k).mT * rest
    linear = shares @ v / (shares.sum(-1, keepdim=True) + 1e-5)
    return torch.softmax(logits, -1) @ v + linear @ projection


def both(method, layout, heads=4, kv_heads=4, dim=8, scale=1.0, dtype=torch.float32, **options):
    """Output and every gradient: ours, the formula's in fp64 and the formula's in ``dtype``."""
    q, k, v, grad = attention_inputs(2, heads, layout.num_tokens, dim, scale=scale, dtype=dtype)
    k, v = k[:, :kv_heads], v[:, :kv_heads]
    draw = torch.Generator().manual_seed(3)
    projection = torch.randn(heads, dim, dim, generator=draw).to(dtype)
    plan = method.plan(layout, q, k, v)  # the choice is that of the dtype under test
    found = []
    for name, wide in (("ours", dtype), ("exact", torch.float64), ("eager", dtype)):
        leaves = [x.detach().to(wide).requires_grad_() for x in (q, k, v, projection)]
        if name == "ours":
            given = {"projection": leaves[3]} | options
            out = method_attention(method, layout, *leaves[:3], **given)
        else:
            out = dense(plan, method.features, *leaves, dim**-0.5)
        grads = torch.autograd.grad(out, leaves, grad.to(wide))
        found.append([out.detach(), *grads])
    return list(zip(["out", "dq", "dk", "dv", "d projection"], *found))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("features", sla.FEATURES)
def test_output_and_gradients(case, features, nan_empty):
    sparse, layout = CASES[case]
    for name, *sides in both(SLA(sparse, features), layout):
        assert_within_budget(name, *sides, factor=8, floor=16)


@pytest.mark.parametrize("backend", ["native", "cpu", "reference"])
@pytest.mark.parametrize("case", ["top-k", "runs"])
def test_backends_and_grouped_queries(backend, case):
    sparse, layout = CASES[case]
    for name, *sides in both(SLA(sparse), layout, kv_heads=2, backend=backend):
        assert_within_budget(name, *sides, factor=8, floor=16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_dtypes_and_scales(dtype, scale):
    sparse, layout = CASES["top-k"]
    floor = 1000 if dtype == torch.float64 else 16  # nothing is more exact to compare with
    for name, *sides in both(SLA(sparse), layout, 2, 2, scale=scale, dtype=dtype):
        assert_within_budget(name, *sides, factor=8, floor=floor)


@pytest.mark.parametrize("case", CASES)
def test_an_untrained_branch_changes_nothing(case):
    """Not a bit, with a projection of zeros and without one; and the zeros have a gradient."""
    sparse, layout = CASES[case]
    method = SLA(sparse)
    q, k, v, grad = attention_inputs(2, 2, layout.num_tokens, 8)
    expected = method_attention(sparse, layout, q, k, v)
    own = {n: x.requires_grad_() for n, x in method.parameters(2, 8).items()}
    out = method_attention(method, layout, q, k, v, **own)
    assert torch.equal(out, expected)
    assert torch.equal(method_attention(method, layout, q, k, v), expected)
    out.backward(grad)
    learns = float(own["projection"].grad.abs().max()) > 0
    assert learns == (case != "everything listed")


def test_a_mask_over_keys_counts_as_padding_does():
    layout, method = Layout.image(6, 7, text=5), SLA(TopK(8, topk=2))
    q, k, v, _ = attention_inputs(2, 2, layout.num_tokens, 8)
    projection = torch.randn(2, 8, 8)
    weight = torch.zeros(2, 1, layout.num_tokens)
    weight[0, 0, 3:5] = -torch.inf
    masked = method_attention(method, layout, q, k, v, kv_log_weight=weight, projection=projection)
    padded = Layout.image(6, 7, text=5, text_lengths=[3, 5])
    assert torch.equal(masked, method_attention(method, padded, q, k, v, projection=projection))
    # Weights of image keys, and hidden ones, which may hold anything.
    weight = torch.zeros(1, 2, layout.num_tokens)
    weight[0, 0, 9:13], weight[0, 1, 20:30] = 0.7, -torch.inf
    plan = method.plan(layout, q, k, v, kv_log_weight=weight)
    expected = dense(plan, "softmax", q, k, v, projection, 8**-0.5, weight)
    found = method_attention(method, layout, q, k, v, kv_log_weight=weight, projection=projection)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    branch = lambda k, v: method.added(layout, q, k, v, plan, weight, projection)  # noqa: E731
    clean = branch(k, v)
    k, v = k.clone(), v.clone()
    k[:, 1, 20:30], v[:, 1, 20:30] = torch.nan, torch.inf
    assert torch.equal(branch(k, v), clean)


def test_few_heads_at_a_time_change_nothing(monkeypatch):
    sparse, layout = CASES["top-k"]
    whole = both(SLA(sparse), layout)
    monkeypatch.setattr(sla, "_AT_ONCE", 1)
    for (name, ours, *_), (_, again, *_) in zip(whole, both(SLA(sparse), layout)):
        torch.testing.assert_close(again, ours, msg=name)


def test_a_branch_of_few_keys_is_exact():
    """One unlisted block of 500: what all sums less the listed ones would lose in fp32."""
    blocks = Layout.image(1, 4000).blocks(8)
    mask = torch.ones(500, 500, dtype=torch.bool)
    mask[:, 123] = False
    plan = Plan.from_block_mask(mask, blocks, blocks)
    q, k, v, _ = attention_inputs(1, 1, 4000, 8)
    method, eye = SLA(TopK(8)), torch.eye(8)[None]
    found = method.added(Layout.image(1, 4000), q, k, v, plan, None, eye)
    rows, few = slice(123 * 8, 124 * 8), (x.double() for x in (q, k, v))
    q, k, v = few
    shares = torch.softmax(q, -1) @ torch.softmax(k[:, :, rows], -1).mT
    expected = shares @ v[:, :, rows] / (shares.sum(-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_work_is_that_of_its_products():
    """Counted by PyTorch itself, but for the sparse part."""
    from torch.utils.flop_counter import FlopCounterMode

    layout, sparse = Layout.image(16, 16), TopK(16, topk=4)
    method = SLA(sparse)
    q, k, v, _ = attention_inputs(1, 4, 256, 8)
    plan = method.plan(layout, q, k, v)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        method.added(layout, q, k, v, plan, None, **method.parameters(4, 8))
    amount, inside = (m.amount(layout, 4, 8, plan) for m in (method, sparse))
    assert amount.density == inside.density == 0.25
    more = counted.get_total_flops() / (4 * 256**2 * 8 * 4)
    assert amount.work == pytest.approx(inside.work + more)


def test_compiled_whole_without_a_break():
    sparse, layout = CASES["top-k"]
    method = SLA(sparse)
    q, k, v, _ = attention_inputs(2, 2, layout.num_tokens, 8)
    method.prepare(layout, q.device)
    own = {"projection": torch.randn(2, 8, 8)}
    run = lambda q, k, v: method_attention(method, layout, q, k, v, **own)  # noqa: E731
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    try:
        found = compiled(q, k, v)
    except torch._dynamo.exc.InternalTorchDynamoError as error:
        if torch.__version__ >= (2, 10) or "example_value" not in str(error):
            raise
        pytest.skip("PyTorch 2.9 loses a size while it traces the lists of a method in a method")
    torch.testing.assert_close(found, run(q, k, v))


@pytest.mark.parametrize(
    "sparse, words",
    [
        (Linear(), r"sparse cannot be Linear\(\): its output is no attention under one plan"),
        (SLA(), r"sparse cannot be SLA\(TopK\(\)\): its output is no attention under one plan"),
        (Dense(), r"sparse cannot be Dense\(\): it leaves nothing out"),
        (Local(window=(3, 4)), "it has a plan for each head; name heads in rules"),
        ("topk", "sparse must be a method, got 'topk'"),
    ],
)
def test_what_cannot_be_inside(sparse, words):
    with pytest.raises(ValueError, match=words):
        SLA(sparse)


@pytest.mark.parametrize(
    "sparse, what",
    [
        (Sol(block_size=16), "a tail"),
        (Rectified(16, topk=2), "a correction"),
        (LogLinear(16, topk=2, levels=1), "summary tokens"),
        (Local(window=3, downsample=2), "summary tokens"),
    ],
)
def test_plans_that_pool_what_they_leave_out_are_refused(sparse, what):
    q, k, v, _ = attention_inputs(1, 2, 64, 8)
    words = rf"around {type(sparse).__name__}\(.*its plan has {what} .* count twice"
    with pytest.raises(ValueError, match=words):
        functional.sla_attention(q, k, v, Layout.image(8, 8), sparse)
    off = {"tail": "none", "rectify": False, "enrich": False, "downsample": None}
    mine = {n: x for n, x in off.items() if hasattr(sparse, n)}
    method = SLA(resolve(sparse, **mine)[0])
    method_attention(method, Layout.image(8, 8), q, k, v, **method.parameters(2, 8))


def test_bad_input():
    q, k, v, _ = attention_inputs(1, 2, 64, 8)
    with pytest.raises(ValueError, match=r"projection must be \[2, 8, 8\] for 2 heads of 8, got"):
        functional.sla_attention(q, k, v, projection=torch.zeros(4, 8, 8))
    with pytest.raises(ValueError, match="adds to the output of its softmax"):
        method_attention(SLA(), Layout.image(8, 8), q, k, v, return_lse=True)
    with pytest.raises(ValueError, match="do not tell their heads"):
        SLA().parameters(None, None)
    with pytest.raises(ValueError, match=r"features must be one of softmax, elu, relu"):
        SLA(features="exp")


def test_options_that_are_methods(tmp_path):
    """Names, mappings and objects in Python, YAML and rules; records hold them again."""
    method = SLA(Local(window=4), "elu")
    inside = {"method": "local", "options": {"window": 4}}
    assert resolve("sla", sparse=inside, features="elu")[0] == method
    assert resolve("sla", sparse="radial")[0] == SLA(Radial())
    assert resolve("sla", sparse=Local(window=4), features="elu")[0] == method
    path = tmp_path / "s.yaml"
    path.write_text(
        "method: sla\noptions: {sparse: {method: local, options: {window: 4}}, features: elu}\n"
    )
    assert resolve(str(path))[0] == method
    again = method.to_dict()
    assert resolve(again.pop("name"), **again)[0] == method
    (rule,) = resolve([Rule(method, layers="0").to_dict()])[0].rules
    assert rule.method == method
    for wrong, words in (
        ({"sparse": "locl"}, "sparse: unknown method 'locl'.*'local'"),
        ({"sparse": {"method": "local", "option": {}}}, "sparse: unknown key 'option'"),
        ({"sparse": {"method": "local", "options": {"windw": 1}}}, "sparse: unknown option of"),
        ({"sparse": {"method": "local", "options": {"min_tokens": 1}}}, "belongs to the schedule"),
        ({"sparse": 3}, "sparse: 'method' must be a method or its name, got 3"),
    ):
        with pytest.raises(ValueError, match=words):
            resolve("sla", **wrong)


def test_registered():
    assert METHODS["sla"] is SLA and not SLA.computes and SLA.adds
    assert not SLA().static and SLA(Local()).static and SLA(Radial()).for_videos


# In a model.


def test_enabled_it_is_its_formula_in_every_layer():
    """Stock projections and output around the dense formula, put in the place of PyTorch's call."""
    pipe = tiny.flux_pipeline()
    stock, sparse = tiny.run(pipe), Local(window=2, tile=(1, 2, 2))
    with dittfast.enable(pipe, sparse, min_tokens=0):
        alone, density = tiny.run(pipe), dittfast.describe(pipe).density
    with dittfast.enable(pipe, "sla", min_tokens=0, sparse=sparse) as enabled:
        assert torch.equal(tiny.run(pipe), alone)
        parameters = method_parameters(pipe)
        assert len(parameters) == len(enabled.describe().layers)
        with torch.no_grad():
            for n, p in enumerate(parameters.values()):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(n)))
        found = tiny.run(pipe)
        described, layout = enabled.describe(), pipe.transformer._dittfast.layout
        own = {n: layer.parameters["projection"].detach().clone()
               for n, layer in pipe.transformer._dittfast.layers.items()}  # fmt: skip
    assert described.density == density and described.work > density
    assert torch.equal(tiny.run(pipe), stock)

    plan = sparse.plan(layout)

    def formula(projection, q, k, v):
        return dense(plan, "softmax", q, k, v, projection.double(), q.shape[-1] ** -0.5)

    with attention_by(pipe.transformer, own, formula):
        torch.testing.assert_close(tiny.run(pipe), found, rtol=1e-4, atol=1e-4)
    assert float((found - alone).abs().max()) > 1e-3


def test_processor_equals_enable():
    pipe = tiny.flux_pipeline()
    inside = {"method": "topk", "options": {"block_size": 8, "topk": 2}}
    with dittfast.enable(pipe, "topk", min_tokens=0, **inside["options"]):
        expected = tiny.run(pipe)
    processor = dittfast.SLAAttnProcessor(heads=2, head_dim=16, sparse=inside)
    pipe.transformer.set_attn_processor(processor)
    torch.testing.assert_close(tiny.run(pipe), expected)
    with torch.no_grad():
        processor.parameters["projection"].add_(0.5)
    assert not torch.allclose(tiny.run(pipe), expected, atol=1e-3)
