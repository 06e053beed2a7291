"""enable and disable on real diffusers classes at tiny size."""

import contextvars
import copy
import gc
import importlib.util
import io
import itertools
import logging
import math
import pickle
import weakref

import pytest
import tiny
import torch
from patterns import Band, FirstKeys, Full

import dittfast
from dittfast import Layout, break_even
from dittfast.attention import choose_backend
from dittfast.methods import METHODS
from dittfast.pipelines import layer, models, seam
from dittfast.pipelines.adapter import force_dense, method_parameters

MODELS = {
    "flux": (tiny.flux_transformer, tiny.flux_inputs),
    "wan": (tiny.wan_transformer, tiny.wan_inputs),
}
PIPELINES = {"flux": tiny.flux_pipeline, "wan": tiny.wan_pipeline}


@pytest.fixture(params=MODELS)
def model_and_inputs(request):
    make, inputs = MODELS[request.param]
    torch.manual_seed(0)
    return make(), inputs()


@pytest.fixture(scope="module", params=PIPELINES)
def pipe(request):
    return PIPELINES[request.param]()


def forward(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


def assert_eager_close(a, b, factor=200):
    """Equal but for the rounding that reordering a sum in fp32 costs through a few layers."""
    torch.testing.assert_close(
        a, b, rtol=0, atol=factor * torch.finfo(a.dtype).eps * float(b.detach().abs().max())
    )


def test_full_plan_is_the_stock_model(model_and_inputs):
    model, inputs = model_and_inputs
    stock = forward(model, inputs)
    for backend in ("reference", "cpu"):
        with dittfast.enable(model, Full(), backend=backend):
            assert_eager_close(forward(model, inputs), stock)
        assert torch.equal(forward(model, inputs), stock)


def test_full_plan_has_the_stock_gradients(model_and_inputs):
    model, inputs = model_and_inputs

    def gradients():
        model.zero_grad()
        model(**inputs)[0].square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    stock = gradients()
    with dittfast.enable(model, Full(), backend="reference"):
        sparse = gradients()
    assert stock.keys() == sparse.keys()
    for name, grad in stock.items():
        scale = max(float(grad.abs().max()), 1e-6)
        assert float((sparse[name] - grad).abs().max()) < 1e-3 * scale, name
    again = gradients()
    assert all(torch.equal(again[name], stock[name]) for name in stock)


@pytest.mark.parametrize("method", [Band(), FirstKeys()], ids=lambda m: m.name)
def test_sparse_plan_equals_stock_sdpa_under_the_dense_mask(model_and_inputs, method, monkeypatch):
    """The interception changes nothing but the mask: compare with torch's own masked SDPA."""
    model, inputs = model_and_inputs
    with dittfast.enable(model, method, backend="reference"):
        ours = forward(model, inputs)

    def masked_sdpa(method, layout, q, k, v, plan=None, scale=None, **_):
        plan = plan or method.plan(layout, q, k)
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=plan.to_dense_mask().expand(*q.shape[:2], -1, -1), scale=scale
        )

    monkeypatch.setattr(layer, "method_attention", masked_sdpa)
    with dittfast.enable(model, method):
        theirs = forward(model, inputs)
    stock = forward(model, inputs)
    assert_eager_close(ours, theirs)
    assert float((ours - stock).abs().max()) > 1e-3 * float(stock.abs().max())


def test_disable_restores_bit_for_bit_and_leaves_no_trace(pipe):
    before = tiny.run(pipe)
    classes = {n: type(m) for n, m in pipe.transformer.named_modules()}
    attributes = {n: set(m.__dict__) for n, m in pipe.transformer.named_modules()}
    dittfast.enable(pipe, Band(), backend="reference")
    assert not torch.equal(tiny.run(pipe), before)
    dittfast.disable(pipe)
    assert torch.equal(tiny.run(pipe), before)
    assert classes == {n: type(m) for n, m in pipe.transformer.named_modules()}
    assert attributes == {n: set(m.__dict__) for n, m in pipe.transformer.named_modules()}


def test_context_managers(pipe):
    stock = tiny.run(pipe)
    with dittfast.enable(pipe, Band(), backend="reference") as enabled:
        sparse = tiny.run(pipe)
        assert enabled.describe().method == Band()
        with dittfast.disable(pipe):
            assert torch.equal(tiny.run(pipe), stock)
        assert torch.equal(tiny.run(pipe), sparse)
    assert torch.equal(tiny.run(pipe), stock)
    with pytest.raises(KeyError), dittfast.enable(pipe, Band()):
        raise KeyError("an error inside still disables")
    assert torch.equal(tiny.run(pipe), stock)


def test_two_pipelines_with_different_methods_in_one_process():
    one, two = tiny.flux_pipeline(), tiny.flux_pipeline()
    dittfast.enable(one, Band(width=0), backend="reference")
    alone = tiny.run(one)
    dittfast.enable(two, Band(width=2), backend="reference")
    assert torch.equal(tiny.run(one), alone)
    wide = tiny.run(two)
    assert not torch.equal(alone, wide)
    dittfast.disable(one)
    assert torch.equal(tiny.run(two), wide)


def test_a_second_resolution_gets_its_own_plan(pipe):
    size = dict(height=96, width=64)
    fresh = {}
    for key, change in (("first", {}), ("second", size)):
        with dittfast.enable(pipe, Band(), backend="reference"):
            fresh[key] = tiny.run(pipe, **change)
    with dittfast.enable(pipe, Band(), backend="reference"):
        assert torch.equal(tiny.run(pipe), fresh["first"])
        assert torch.equal(tiny.run(pipe, **size), fresh["second"])
        assert torch.equal(tiny.run(pipe), fresh["first"])


def test_dense_layers(pipe):
    stock = tiny.run(pipe)
    count = len(dittfast.enable(pipe, Band(), backend="reference").describe().layers)
    dittfast.disable(pipe)
    with dittfast.enable(pipe, Band(), backend="reference", dense_layers=[f"0-{count - 1}"]):
        assert torch.equal(tiny.run(pipe), stock)
    with dittfast.enable(pipe, Band(), backend="reference", dense_layers=[-1]) as enabled:
        tiny.run(pipe)
        dense = [x for x in enabled.describe().layers if x.dense]
        assert [x.name for x in dense] == [enabled.describe().layers[-1].name]
        assert "dense_layers" in dense[0].dense


def test_min_tokens_runs_dense_and_says_so(pipe, caplog):
    stock = tiny.run(pipe)
    caplog.set_level(logging.WARNING, logger="dittfast")
    with dittfast.enable(pipe, Band(), min_tokens=1000) as enabled:
        assert torch.equal(tiny.run(pipe), stock)
        description = enabled.describe()
    assert len([r for r in caplog.records if "dense:" in r.message and "1,000" in r.message]) == 1
    assert all("min_tokens 1,000" in x.dense for x in description.layers)
    assert "min_tokens 1,000" in str(description)


@pytest.mark.parametrize("table", ["MEASURED", "ESTIMATED"])
def test_the_break_even_is_the_default(pipe, caplog, monkeypatch, table):
    measured = "local", choose_backend(torch.device("cpu")), "float32"
    key = measured if table == "MEASURED" else ("local", "triton")
    monkeypatch.setattr(break_even, table, {key: 1000})
    caplog.set_level(logging.WARNING, logger="dittfast")
    stock = tiny.run(pipe)
    with dittfast.enable(pipe, "local", window=1) as enabled:
        assert torch.equal(tiny.run(pipe), stock)
        assert all("min_tokens 1,000" in x.dense for x in enabled.describe().layers)
    said = "measured" if table == "MEASURED" else "an estimate"
    assert len([r for r in caplog.records if f"pays on cpu, {said}" in r.message]) == 1
    with dittfast.enable(pipe, "local", window=1, min_tokens=0):
        assert not torch.equal(tiny.run(pipe), stock)


@pytest.fixture
def own_tables():
    """break_even as it is: a fixture of these tests empties the tables of the usual one."""
    spec = importlib.util.spec_from_file_location("dittfast._break_even", break_even.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("multiplies", [False, True], ids=["widened half", "fast half"])
def test_every_method_has_a_break_even(multiplies, own_tables, monkeypatch):
    monkeypatch.setattr(own_tables, "multiplies_half", lambda: multiplies)
    methods = [*(m for m in METHODS if m != "dense"), "own"]
    kinds = torch.float32, torch.float16, torch.bfloat16
    for asked in itertools.product(methods, ("native", "cpu", "triton"), kinds):
        method, backend, dtype = asked
        least, measured = own_tables.min_tokens(*asked), own_tables.is_measured(*asked)
        half = dtype != torch.float32 and backend != "triton"
        # What computes its own output is another model anyway; of two the method inside decides.
        if method in ("own", "linear", "agent", "sla", "mixture_of_heads"):
            assert least == 0
        elif half and multiplies and method in ("radial", "rectified"):
            assert least == math.inf and not measured
        else:
            assert least >= 512
        if backend == "triton" or (half and multiplies):
            assert not measured


def test_a_method_that_never_pays_stays_dense(model_and_inputs, caplog, monkeypatch):
    monkeypatch.setattr(break_even, "FAST_HALF", {"local": math.inf})
    monkeypatch.setattr(break_even, "multiplies_half", lambda: True)
    caplog.set_level(logging.WARNING, logger="dittfast")
    model, inputs = model_and_inputs
    stock = forward(model, inputs)
    with dittfast.enable(model, "local", window=1):
        assert not torch.equal(forward(model, inputs), stock)
    model = model.bfloat16()
    inputs = {
        name: x.bfloat16() if torch.is_tensor(x) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    stock = forward(model, inputs)
    with dittfast.enable(model, "local", window=1) as enabled:
        assert torch.equal(forward(model, inputs), stock)
        assert "below min_tokens inf" in str(enabled.describe())
    assert "dense: in torch.bfloat16 at no length local pays on cpu, an estimate" in caplog.text


def test_describe(pipe):
    enabled = dittfast.enable(pipe, Band(), backend="reference", dense_first_steps=1)
    early = dittfast.describe(pipe)
    assert early.density is None and early.num_tokens is None
    assert "after the first forward pass" in str(early)
    tiny.run(pipe)
    late = enabled.describe()
    state = pipe.transformer._dittfast
    assert late.num_tokens == state.layout.num_tokens
    mask = Band().plan(state.layout).to_dense_mask()
    assert late.density == pytest.approx(float(mask.double().mean()))
    assert "first 1 denoising steps" in str(late)
    data = late.to_dict()
    assert data["method"] == {"name": "band", "width": 1}
    assert len(data["sparse_layers"]) == len(late.layers)
    dittfast.disable(pipe)


def test_deepcopy_is_independent(pipe):
    dittfast.enable(pipe, Band(), backend="reference", dense_first_steps=1)
    sparse = tiny.run(pipe)
    twin = copy.deepcopy(pipe)
    assert torch.equal(tiny.run(twin), sparse)
    assert twin.transformer._dittfast.session.pipe.scheduler is twin.scheduler
    dittfast.disable(pipe)
    assert torch.equal(tiny.run(twin), sparse)
    dittfast.disable(twin)
    assert torch.equal(tiny.run(twin), tiny.run(pipe))


def test_pickled_model_is_the_stock_model(model_and_inputs):
    model, inputs = model_and_inputs
    stock = forward(model, inputs)
    dittfast.enable(model, Band(), backend="reference")
    forward(model, inputs)
    loaded = pickle.load(io.BytesIO(pickle.dumps(model)))
    assert not models.is_swapped(loaded)
    assert torch.equal(forward(loaded, inputs), stock)


def test_save_pretrained_while_enabled(tmp_path, pipe):
    stock = tiny.run(pipe)
    with dittfast.enable(pipe, Band(), backend="reference"):
        tiny.run(pipe)
        pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    # Loaded weights lie elsewhere in memory, which moves the last bit of a matrix product.
    assert_eager_close(tiny.run(loaded), stock)


def test_the_session_does_not_keep_the_pipeline_alive():
    pipe = tiny.flux_pipeline()
    dittfast.enable(pipe, Band())
    alive = weakref.ref(pipe)
    transformer = pipe.transformer
    del pipe
    gc.collect()
    assert alive() is None
    dittfast.disable(transformer)


def test_inference_mode(pipe):
    with torch.inference_mode(), dittfast.enable(pipe, Band(), backend="reference"):
        assert torch.isfinite(tiny.run(pipe)).all()


def test_kontext_reference_images_are_grids():
    model, inputs = tiny.flux_transformer(), dict(tiny.flux_inputs(batch=1))
    reference = inputs["img_ids"][:20].clone()
    reference[:, 0] = 1
    inputs["img_ids"] = torch.cat([inputs["img_ids"], reference[:14]])
    extra = torch.randn(1, 14, 16)
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"], extra], 1)
    with dittfast.enable(model, Full(), backend="reference"):
        forward(model, inputs)
        assert [g.shape for g in model._dittfast.layout.grids] == [(1, 9, 7), (1, 2, 7)]


def test_scaled_position_ids_read_the_same():
    model, inputs = tiny.flux_transformer(), dict(tiny.flux_inputs())
    inputs["img_ids"] = inputs["img_ids"] * 4
    with dittfast.enable(model, Full(), backend="reference"):
        forward(model, inputs)
        assert model._dittfast.layout == Layout.image(9, 7, text=5)


class Stranger(torch.nn.Module):
    """A model dittfast does not know, around a real FLUX transformer's first attention."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attn = tiny.flux_transformer().single_transformer_blocks[0].attn

    def forward(self, hidden_states):
        return self.attn(hidden_states)


def test_an_unknown_family_says_how_to_pass_a_layout():
    model, x = Stranger(), torch.randn(2, 5 + 6 * 4, 32)
    with pytest.raises(ValueError, match=r"no layout reader for Stranger.*layout=Layout"):
        dittfast.enable(model, Band())
    assert not models.is_swapped(model)
    stock = model(x)
    layout = Layout.image(6, 4, text=5)
    for given in (layout, lambda model, arguments: layout):
        with dittfast.enable(model, Full(), layout=given, backend="reference"):
            assert_eager_close(model(x), stock)
        with dittfast.enable(model, Band(width=0), layout=given, backend="reference"):
            assert float((model(x) - stock).abs().max()) > 1e-3
    wrong = Layout.image(6, 4, text=6)
    with (
        dittfast.enable(model, Band(), layout=wrong),
        pytest.raises(RuntimeError, match="30 tokens"),
    ):
        model(x)


def test_bypassing_attention_backend_raises():
    model, inputs = tiny.flux_transformer(), tiny.flux_inputs()

    class Bypass:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return torch.zeros_like(attn.to_q(hidden_states))

    model.single_transformer_blocks[0].attn.set_processor(Bypass())
    dittfast.enable(model, Band(), backend="reference")
    with pytest.raises(RuntimeError, match="set_default_attn_processor"):
        forward(model, inputs)


def test_masks_are_honoured_or_refused():
    model = Stranger()
    layout = Layout.image(6, 4, text=5)
    x = torch.randn(2, layout.num_tokens, 32)
    keys = torch.ones(2, 1, 1, layout.num_tokens, dtype=torch.bool)
    keys[1, ..., 2:5] = False
    stock = model.attn(x, attention_mask=keys)
    model.forward = lambda x, mask: model.attn(x, attention_mask=mask)
    with dittfast.enable(model, Full(), layout=layout, backend="reference"):
        assert_eager_close(model(x, keys), stock)
        square = torch.ones(layout.num_tokens, layout.num_tokens, dtype=torch.bool)
        with pytest.raises(ValueError, match=r"\[29, 29\].*dense_layers"):
            model(x, square)


def test_causal_and_dropout_are_refused():
    layout = Layout.image(4, 4)
    planned = layer.PlannedLayout(Full(), layout, Full().plan(layout))
    run = layer.LayerRun(layer.AttentionCore(Full(), ((planned,),), "reference"))
    q = torch.randn(1, 1, 16, 16)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    with seam.intercept(run):
        with pytest.raises(ValueError, match="causal"):
            sdpa(q, q, q, is_causal=True)
        with pytest.raises(ValueError, match=r"dropout_p=0\.1"):
            sdpa(q, q, q, dropout_p=0.1)


def test_bad_input_changes_nothing(pipe):
    stock = tiny.run(pipe)
    cases = [
        (dict(method="radail"), "radial"),
        (dict(method="radial", decay_facter=0.5), "decay_factor"),
        (dict(method="no_such.yaml"), "no_such.yaml"),
        (dict(method=Band(), backend="tritn"), "triton"),
        (dict(method=Band(), dense_layers=[99]), "99"),
        (dict(method=Band(), dense_first_steps=-1), "-1"),
        (dict(method=3), "int"),
        (dict(method=Band(), layout="16x16"), "str"),
    ]
    for arguments, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            dittfast.enable(pipe, **arguments)
    assert not models.is_swapped(pipe.transformer)
    assert torch.equal(tiny.run(pipe), stock)


def test_enable_twice_and_disable_never(pipe):
    with pytest.raises(ValueError, match="not enabled"):
        dittfast.disable(pipe)
    with pytest.raises(ValueError, match="not enabled"):
        dittfast.describe(pipe)
    with dittfast.enable(pipe, Band()):
        with pytest.raises(ValueError, match="already enabled"):
            dittfast.enable(pipe, Full())
        assert dittfast.describe(pipe).method == Band()


def test_not_a_pipeline():
    with pytest.raises(ValueError, match="expected a diffusers pipeline"):
        dittfast.enable("pipe", Band())


def test_the_class_of_an_enabled_model_makes_stock_ones(tmp_path):
    """from_pretrained, from_config and EMA call type(model)."""
    model, inputs = tiny.flux_transformer(), tiny.flux_inputs()
    stock, kind = forward(model, inputs), type(model)
    with dittfast.enable(model, Band(), backend="reference"):
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert type(loaded) is type(type(model).from_config(model.config)) is kind
        assert torch.equal(forward(loaded.eval(), inputs), stock)
        twin = copy.deepcopy(model)
        assert type(twin) is type(model) is not kind
        assert torch.equal(forward(twin, inputs), forward(model, inputs))


def test_one_of_two_experts_is_enabled_and_both_are_guided():
    pipe = tiny.wan_pipeline()
    pipe.register_modules(transformer_2=tiny.wan_transformer())
    before = {n: type(m) for n, m in pipe.transformer_2.named_modules()}
    dittfast.enable(pipe.transformer, Band(), backend="reference")
    with dittfast.guide(pipe, heads=[(0, 0)]):
        assert all(models.is_swapped(m) for m in (pipe.transformer, pipe.transformer_2))
    assert models.is_swapped(pipe.transformer)
    assert {n: type(m) for n, m in pipe.transformer_2.named_modules()} == before


def test_guided_inside_a_block_of_disable():
    """Leaving the block puts the method beside the guidance."""
    model, inputs = tiny.flux_transformer(), tiny.flux_inputs()
    with dittfast.enable(model, Band(), backend="reference"):
        with dittfast.guide(model, heads=[(0, 0)]):
            both = forward(model, inputs)
        with dittfast.disable(model):
            dittfast.guide(model, heads=[(0, 0)])
        assert torch.equal(forward(model, inputs), both)
        dittfast.unguide(model)


def test_a_method_that_never_ran_is_said(pipe):
    with dittfast.enable(pipe, Band(), backend="reference", dense_first_steps=99) as enabled:
        tiny.run(pipe, num_inference_steps=2)
        assert "did not run" in str(enabled.describe())
        assert "all belong to dense steps" in enabled.describe().did_not_run
    with dittfast.enable(pipe, Band(), backend="reference", dense_first_steps=1) as enabled:
        tiny.run(pipe, num_inference_steps=2)
        assert enabled.describe().did_not_run is None


def test_layers_of_another_length_are_said():
    """A described model whose layers see two sequences: what stays dense is not called sparse."""

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            from diffusers.models.attention_processor import Attention

            self.long = Attention(32, heads=2, dim_head=16)
            self.short = Attention(32, heads=2, dim_head=16)

        def forward(self, x):
            return self.long(x)[:, :5] + self.short(x[:, :5])

    model = Two()
    with dittfast.enable(model, Band(), layout=Layout.image(6, 4, text=5)) as enabled:
        model(torch.randn(1, 29, 32))
        found = {x.name: x.dense for x in enabled.describe().layers}
    assert found == {"long": None, "short": "its sequence has another length than the layout"}


def test_method_parameters_are_reachable():
    pipe = tiny.flux_pipeline()
    dittfast.enable(pipe, "local", window=3, downsample=2, min_tokens=0, backend="reference")
    named = method_parameters(pipe)
    assert len(named) == 4
    assert all(isinstance(p, torch.nn.Parameter) and p.shape == (2, 2) for p in named.values())
    inputs = tiny.flux_inputs(height=8, width=6)
    pipe.transformer(**inputs)[0].square().mean().backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in named.values())


def test_force_dense_overrides_the_steps_but_not_the_layers(model_and_inputs):
    model, inputs = model_and_inputs
    stock = forward(model, inputs)
    with pytest.raises(ValueError, match="not enabled"), force_dense(model):
        pass
    with dittfast.enable(model, Band(), dense_first_steps=1, dense_layers=[0]):
        assert torch.equal(forward(model, inputs), stock)
        with force_dense(model, False):
            sparse = forward(model, inputs)
            with force_dense(model):
                assert torch.equal(forward(model, inputs), stock)
            assert torch.equal(forward(model, inputs), sparse)
    with dittfast.enable(model, Band(), dense_layers=[0]):
        assert torch.equal(forward(model, inputs), sparse)
    assert not torch.equal(sparse, stock)


def test_autocast_reaches_the_replaced_attention():
    """Norms give q and k in fp32 on some devices; autocast lets the stock call mix them with v."""
    layout = Layout.image(5, 7, text=3)
    planned = layer.PlannedLayout(Full(), layout, Full().plan(layout))
    run = layer.LayerRun(layer.AttentionCore(Full(), ((planned,),), "reference"))
    q, k, v = torch.randn(3, 1, 2, layout.num_tokens, 16)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    with torch.autocast("cpu", torch.bfloat16):
        stock = sdpa(q, k, v.bfloat16())
        with seam.intercept(run) as seen:
            ours = sdpa(q, k, v.bfloat16())
    assert seen.reached and ours.dtype == stock.dtype == torch.bfloat16
    assert float((ours - stock).abs().max()) < 0.05 * float(stock.abs().max())


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("local", {"downsample": 10**4}, r"Local\(downsample=10000\) asks for .* parameters"),
        ("linear", {"hidden": 10**6}, r"lower the options that they grow with"),
        (
            "agent",
            {"agents": [1, 10**3, 10**3], "trained": True},
            r"parameters, more than all of \w+ has",
        ),
        ("agent", {"agents": [2**31 - 1] * 3, "trained": True}, r"asks for too much memory"),
    ],
)
def test_what_would_fill_the_memory_is_refused(model_and_inputs, name, options, words):
    """Anybody's preset may say it; nothing is allocated before."""
    model, inputs = model_and_inputs
    stock = forward(model, inputs)
    with pytest.raises(ValueError, match=words) as found:
        dittfast.enable(model, name, **options)
    assert len(str(found.value)) < 300
    assert torch.equal(forward(model, inputs), stock)


def test_passes_leave_nothing_in_the_context_of_the_thread(model_and_inputs):
    """Variables of a context live as long as the thread, and a server's does for weeks."""
    import torch._dynamo.config as dynamo

    model, inputs = model_and_inputs
    limit = dynamo.recompile_limit
    with dittfast.enable(model, Band()):
        forward(model, inputs)
        before = len(contextvars.copy_context())
        for _ in range(3):
            forward(model, inputs)
        assert len(contextvars.copy_context()) == before
    assert dynamo.recompile_limit == limit


def test_parameters_may_be_made_from_values(model_and_inputs):
    class Looks(Band):
        def parameters(self, heads, head_dim):
            return {"x": torch.tensor(torch.arange(3.0).tolist()) + torch.ones(3).sum().item()}

    with dittfast.enable(model_and_inputs[0], Looks()):
        own = method_parameters(model_and_inputs[0])
        assert own and all(x.tolist() == [3, 4, 5] for x in own.values())
