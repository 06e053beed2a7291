"""Wrappers, exchanged transformers and handles around a model, and whose attention runs in it.

What dittfast cannot do right it refuses: then the sentence has to name the cause and a remedy.
"""

from __future__ import annotations

import contextlib
import random
import re

import pytest
import tiny
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, attention_backend
from foreign_backend import backends_of
from patterns import Band

import dittfast
from dittfast import Layout
from dittfast.pipelines.measure.parity import METHODS, TINY, distance

pytestmark = pytest.mark.filterwarnings("ignore")
OPTIONS = dict(backend="cpu", min_tokens=0)
LOCAL = METHODS["local"]
NEAR = 2e-5


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


def flux(height=6, width=10):
    """A model of two layers, and arguments for one grid."""
    torch.manual_seed(0)
    return tiny.flux_transformer(1, 1), tiny.flux_inputs(height, width, batch=1)


def output(model, arguments):
    with torch.no_grad():
        return model(**arguments)[0]


def both(model, arguments, method=LOCAL):
    """The dense and the sparse output, which differ."""
    dense = output(model, arguments)
    with dittfast.enable(model, method, **OPTIONS):
        sparse = output(model, arguments)
    assert distance(sparse, dense) > 1e-3
    return dense, sparse


def near(a, b):
    return distance(a, b) < NEAR


@contextlib.contextmanager
def refused(*words):
    """Allows a refusal, whose sentence must have all of ``words``."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        assert [w for w in words if not re.search(w, str(error))] == [], error


def snapshot(model):
    """What enable may change, by module: the class, the attributes."""
    return {n: (type(m), frozenset(m.__dict__)) for n, m in model.named_modules()}


# Compiled models


def slow(*values, name):
    """Tracing a model takes seconds: one of each kind is in the default run."""
    return pytest.param(*values, marks=pytest.mark.slow, id=name)


@pytest.mark.parametrize(
    "called, wrapped",
    [
        pytest.param(False, True, id="pipeline"),
        slow(False, False, name="transformer"),
        slow(True, True, name="called-pipeline"),
        slow(True, False, name="called-transformer"),
    ],
)
def test_compiled_before_enable(called, wrapped):
    """torch.compile(transformer), then enable: the order of diffusers' documentation."""
    model, arguments = flux()
    dense, sparse = both(model, arguments)
    compiled = torch.compile(model, backend="eager")
    if called:
        assert near(output(compiled, arguments), dense)
    target = compiled
    if wrapped:
        target = tiny.flux_pipeline(double=1, single=1)
        target.transformer = compiled
    with refused("compile"):
        dittfast.enable(target, LOCAL, **OPTIONS)
        with refused("compile"):
            assert near(output(compiled, arguments), sparse)
        assert near(output(model, arguments), sparse)
        dittfast.disable(target)
    assert near(output(compiled, arguments), dense)
    assert torch.equal(output(model, arguments), dense)


@pytest.mark.parametrize("target", [slow("compiled", name="compiled"), slow("inner", name="inner")])
def test_compiled_after_enable_and_disabled(target):
    model, arguments = flux()
    dense, sparse = both(model, arguments)
    dittfast.enable(model, LOCAL, **OPTIONS)
    compiled = torch.compile(model, backend="eager")
    with refused("compile"):
        assert near(output(compiled, arguments), sparse)
    dittfast.disable(compiled if target == "compiled" else model)
    assert near(output(compiled, arguments), dense)
    assert torch.equal(output(model, arguments), dense)


def _compile(model):
    model.compile(backend="eager")


def _compile_blocks(model):
    model.compile_repeated_blocks(backend="eager", fullgraph=True)


@pytest.mark.parametrize(
    "compile_, first",
    [
        slow(_compile_blocks, "compile", name="blocks-first"),
        slow(_compile_blocks, "enable", name="blocks-last"),
        slow(_compile, "compile", name="whole-first"),
        slow(_compile, "enable", name="whole-last"),
    ],
)
def test_compiled_in_place(compile_, first):
    """Sparse, dense after disable, and sparse by another method, whichever came first."""
    model, arguments = flux()
    dense, sparse = both(model, arguments)
    _, band = both(model, arguments, Band())
    if first == "compile":
        compile_(model)
        assert near(output(model, arguments), dense)
    with dittfast.enable(model, LOCAL, **OPTIONS):
        if first == "enable":
            compile_(model)
        assert near(output(model, arguments), sparse)
    assert near(output(model, arguments), dense)
    with dittfast.enable(model, Band(), **OPTIONS):
        assert near(output(model, arguments), band)
    assert near(output(model, arguments), dense)


# forward, called directly


def test_forward_called_directly():
    """Before any ordinary call, after one of another grid, and after disable."""
    model, arguments = flux()
    other = tiny.flux_inputs(10, 6, batch=1)
    dense, sparse = both(model, arguments)
    with torch.no_grad(), dittfast.enable(model, LOCAL, **OPTIONS):
        with refused("forward", r"[Cc]all|model\("):
            assert near(model.forward(**arguments)[0], sparse)
        model(**other)
        with refused("forward", r"[Cc]all|model\("):
            assert near(model.forward(**arguments)[0], sparse)
        assert near(model(**arguments)[0], sparse)
    assert torch.equal(model.forward(**arguments)[0].detach(), dense)


# PEFT


def lora(model):
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("wrapped", [False, True], ids=["model", "pipeline"])
def test_enable_on_a_peft_model(wrapped):
    """Right through the wrapper, or a sentence that names the model inside."""
    model, arguments = flux()
    wrapper = lora(model)
    dense, sparse = both(wrapper.get_base_model(), arguments)
    pipe = wrapper
    if wrapped:
        pipe = tiny.flux_pipeline(double=1, single=1)
        pipe.transformer = wrapper
    with dittfast.enable(pipe, LOCAL, **OPTIONS):
        assert near(output(wrapper, arguments), sparse)
        assert dittfast.describe(pipe).density < 1
    assert torch.equal(output(wrapper, arguments), dense)


def test_the_model_inside_a_peft_model():
    model, arguments = flux()
    wrapper = lora(model)
    dense = output(wrapper, arguments)
    with dittfast.enable(wrapper.get_base_model(), LOCAL, **OPTIONS):
        sparse = output(wrapper, arguments)
    assert distance(sparse, dense) > 1e-3
    assert torch.equal(output(wrapper, arguments), dense)


def test_wrapped_by_peft_after_enable():
    model, arguments = flux()
    dense, sparse = both(model, arguments)
    dittfast.enable(model, LOCAL, **OPTIONS)
    wrapper = lora(model)
    with wrapper.disable_adapter():
        assert near(output(wrapper, arguments), sparse)
    adapted = output(wrapper, arguments)
    dittfast.disable(wrapper.get_base_model())
    with wrapper.disable_adapter():
        assert near(output(wrapper, arguments), dense)
    assert distance(output(wrapper, arguments), adapted) > 1e-3


# Transformers that are exchanged


def test_another_transformer_in_the_pipeline():
    """The handle disables what it enabled, and the new transformer is left alone."""
    pipe, arguments = tiny.flux_pipeline(double=1, single=1), flux()[1]
    old, new = pipe.transformer, flux()[0]
    dense, untouched = output(old, arguments), output(new, arguments)
    before = snapshot(old), snapshot(new)
    with dittfast.enable(pipe, LOCAL, **OPTIONS) as enabled:
        sparse = output(old, arguments)
        pipe.transformer = new
        assert torch.equal(output(new, arguments), untouched)
        with refused(r"transformer", r"enable|exchanged|replaced"):
            assert enabled.describe().method == LOCAL
    assert not torch.equal(sparse, dense)
    assert torch.equal(output(old, arguments), dense)
    assert torch.equal(output(new, arguments), untouched)
    assert (snapshot(old), snapshot(new)) == before


def test_disable_after_another_transformer_came():
    """Undone, or refused with a word about the transformer that left; never half."""
    pipe, arguments = tiny.flux_pipeline(double=1, single=1), flux()[1]
    old, new = pipe.transformer, flux()[0]
    dense, before = output(old, arguments), (snapshot(old), snapshot(new))
    dittfast.enable(pipe, LOCAL, **OPTIONS)
    pipe.transformer = new
    with refused(r"transformer", r"exchanged|replaced|disable"):
        dittfast.disable(pipe)
    with contextlib.suppress(ValueError):  # nothing left to disable
        dittfast.disable(old)
    assert torch.equal(output(old, arguments), dense)
    assert (snapshot(old), snapshot(new)) == before


def test_another_transformer_inside_disable():
    pipe, arguments = tiny.flux_pipeline(double=1, single=1), flux()[1]
    old, new = pipe.transformer, flux()[0]
    dense, untouched = output(old, arguments), output(new, arguments)
    with dittfast.enable(pipe, LOCAL, **OPTIONS):
        sparse = output(old, arguments)
    plain = snapshot(old)
    dittfast.enable(pipe, LOCAL, **OPTIONS)
    with refused(r"transformer"), dittfast.disable(pipe):
        pipe.transformer = new
    assert torch.equal(output(new, arguments), untouched)
    found = output(old, arguments)
    assert torch.equal(found, dense) or torch.equal(found, sparse)
    if torch.equal(found, sparse):
        dittfast.disable(old)
    assert snapshot(old) == plain and torch.equal(output(old, arguments), dense)


# Handles


def state_of(model, arguments, known):
    """Which of the ``known`` outputs the model gives; ``describe`` must say the same."""
    found = output(model, arguments)
    (name,) = [n for n, expected in known.items() if torch.equal(found, expected)] or ["?"]
    try:
        said = dittfast.describe(model).method
    except ValueError:
        assert name == "dense"
    else:
        assert {LOCAL: "local", Band(): "band"}[said] == name
    return name


def outputs_of(model, arguments):
    dense, sparse = both(model, arguments)
    return {"dense": dense, "local": sparse, "band": both(model, arguments, Band())[1]}


def assert_usable(model, arguments, known, plain):
    """Every state still works, ending in the stock model."""
    if state_of(model, arguments, known) != "dense":
        dittfast.disable(model)
    assert snapshot(model) == plain and torch.equal(output(model, arguments), known["dense"])
    with dittfast.enable(model, Band(), **OPTIONS):
        assert state_of(model, arguments, known) == "band"
    assert snapshot(model) == plain and torch.equal(output(model, arguments), known["dense"])


def test_enabled_anew_inside_disable():
    """At the exit there is another method on: it stays, or the first comes back; both work."""
    model, arguments = flux()
    plain, known = snapshot(model), outputs_of(model, arguments)
    dittfast.enable(model, LOCAL, **OPTIONS)
    with refused("enabled", "disable"), dittfast.disable(model):
        dittfast.enable(model, Band(), **OPTIONS)
    assert state_of(model, arguments, known) in ("local", "band")
    assert_usable(model, arguments, known, plain)


@pytest.mark.parametrize("make", ["enable", "disable"])
def test_one_handle_twice(make):
    model, arguments = flux()
    plain, known = snapshot(model), outputs_of(model, arguments)
    handle = dittfast.enable(model, LOCAL, **OPTIONS)
    if make == "disable":
        handle = dittfast.disable(model)
    with handle:
        pass
    with refused("enable"), handle:
        state_of(model, arguments, known)
    assert_usable(model, arguments, known, plain)


def test_handles_left_in_another_order():
    model, arguments = flux()
    plain, known = snapshot(model), outputs_of(model, arguments)
    outer = dittfast.enable(model, LOCAL, **OPTIONS)
    inner = dittfast.disable(model)
    outer.__exit__(None, None, None)  # silent: there is nothing left to disable
    assert state_of(model, arguments, known) == "dense"
    inner.__exit__(None, None, None)
    assert state_of(model, arguments, known) in ("dense", "local")
    assert_usable(model, arguments, known, plain)


def test_handles_at_random():
    """Whatever order handles are made and left in, the model runs what ``describe`` says."""
    model, arguments = flux()
    plain, known = snapshot(model), outputs_of(model, arguments)
    for seed in range(10):
        choose, handles, done = random.Random(seed), [], []
        for _ in range(7):
            action = choose.choice(["local", "band", "disable", "leave", "leave"])
            done.append(action)
            with refused("enable"):
                if action == "leave" and handles:
                    handles[choose.randrange(len(handles))].__exit__(None, None, None)
                elif action == "disable":
                    handles.append(dittfast.disable(model))
                elif action != "leave":
                    method = LOCAL if action == "local" else Band()
                    handles.append(dittfast.enable(model, method, **OPTIONS))
            assert state_of(model, arguments, known) != "?", done
        if state_of(model, arguments, known) != "dense":
            dittfast.disable(model)
        assert snapshot(model) == plain, done


class Mine(Exception):
    pass


def _enable_and_disable(model):
    with dittfast.enable(model, LOCAL, **OPTIONS):
        dittfast.disable(model)
        yield


def _disable_and_enable(model):
    dittfast.enable(model, LOCAL, **OPTIONS)
    with dittfast.disable(model):
        dittfast.enable(model, Band(), **OPTIONS)
        yield


def _guide_and_unguide(model):
    with dittfast.guide(model, heads=[(0, 0)]):
        dittfast.unguide(model)
        yield


def _guide_and_disable(model):
    with dittfast.guide(model, heads=[(0, 0)]):
        dittfast.disable(model)
        yield


def _guide_over_disable(model):
    dittfast.enable(model, LOCAL, **OPTIONS)
    with dittfast.guide(model, heads=[(0, 0)]):
        dittfast.disable(model)
        yield


@pytest.mark.parametrize(
    "inside",
    [
        _enable_and_disable,
        _disable_and_enable,
        _guide_and_unguide,
        _guide_and_disable,
        _guide_over_disable,
    ],
    ids=lambda f: f.__name__.strip("_"),
)
@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
def test_the_work_of_an_exit_is_done_already(inside, fails):
    """Silent where nothing is left to do; the user's own exception is never hidden."""
    model, arguments = flux()
    plain, dense = snapshot(model), output(model, arguments)
    body = contextlib.contextmanager(inside)
    with contextlib.ExitStack() as outside:
        if fails:
            outside.enter_context(pytest.raises(Mine))
        elif inside is _disable_and_enable:
            outside.enter_context(refused("enabled", "disable"))
        with body(model):
            if fails:
                raise Mine
    with contextlib.suppress(ValueError):
        dittfast.disable(model)
    assert snapshot(model) == plain and torch.equal(output(model, arguments), dense)


# guide and refusals


def test_enable_on_a_guided_pipeline():
    """Composed, or refused without a method that nobody asked for."""
    model, arguments = flux()
    plain, dense = snapshot(model), output(model, arguments)
    heads = dict(heads=[(0, 1)], guidance_scale=2.0)
    with dittfast.enable(model, LOCAL, **OPTIONS), dittfast.guide(model, **heads):
        composed = output(model, arguments)
    dittfast.guide(model, **heads)
    guided = output(model, arguments)
    try:
        dittfast.enable(model, LOCAL, **OPTIONS)
    except ValueError as error:
        assert re.search(r"guide", str(error)) and "Dense" not in str(error), error
        assert torch.equal(output(model, arguments), guided)
    else:
        assert near(output(model, arguments), composed)
        dittfast.disable(model)
    with contextlib.suppress(ValueError):
        dittfast.unguide(model)
    assert snapshot(model) == plain and torch.equal(output(model, arguments), dense)


@pytest.mark.parametrize("name", ["kandinsky5", "flux", "z-image", "wan", "cogvideox", "sd3"])
def test_a_refused_guide_leaves_nothing_behind(name):
    """A head that does not exist; and a family that cannot be guided."""
    model, arguments = TINY[name].build()
    plain = snapshot(model)
    with pytest.raises(ValueError):
        dittfast.guide(model, heads=[(0, 99)])
    assert snapshot(model) == plain
    with refused("guid"), dittfast.guide(model, heads=[(0, 0)]):
        model(**arguments)
    assert snapshot(model) == plain


def test_a_refused_enable_leaves_both_transformers_alone():
    """One of two experts is enabled already, or knows no such layer."""
    pipe = tiny.wan_pipeline(two_experts=True)
    dittfast.enable(pipe.transformer_2, LOCAL, **OPTIONS)
    before = snapshot(pipe.transformer), snapshot(pipe.transformer_2)
    for options in ({}, {"dense_layers": [5]}):
        with pytest.raises(ValueError):
            dittfast.enable(pipe, LOCAL, **OPTIONS, **options)
        with pytest.raises(ValueError):
            dittfast.guide(pipe, heads=[(7, 0)])
        assert (snapshot(pipe.transformer), snapshot(pipe.transformer_2)) == before
        if not options:
            dittfast.disable(pipe.transformer_2)
            before = snapshot(pipe.transformer), snapshot(pipe.transformer_2)


# The user's attention backend


@pytest.fixture(params=["flux", "wan"])
def model_and_inputs(request):
    if request.param == "flux":
        return flux()
    return tiny.wan_transformer(), tiny.wan_inputs(3, 12, 20, batch=1)


def self_attention(calls):
    """Calls over the whole sequence; Wan's text has 12 tokens."""
    return [c for c in calls if c[1] != 12]


LAYERS = 2  # self-attention layers of either model


def _set(model):
    model.set_attention_backend("flex")


def _set_and_reset(model):
    """Clears the model's own choice; the process-wide one stays flex."""
    model.set_attention_backend("flex")
    model.reset_attention_backend()


def _set_on_another(model):
    tiny.wan_transformer(1).set_attention_backend("flex")


CHOICES = [_set, _set_and_reset, _set_on_another]


@pytest.mark.parametrize("choose", CHOICES, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.parametrize("first", ["enable", "backend"])
def test_sparse_layers_whatever_the_backend(foreign, model_and_inputs, choose, first):
    """Sparse layers are dittfast's; cross-attention and the dense model are the user's."""
    model, arguments = model_and_inputs
    _, sparse = both(model, arguments)
    if first == "backend":
        choose(model)
    dittfast.enable(model, LOCAL, **OPTIONS)
    if first == "enable":
        choose(model)
    chosen = backends_of(model)
    foreign.clear()
    assert near(output(model, arguments), sparse)
    assert self_attention(foreign) == []
    assert len(foreign) == (LAYERS if hasattr(model, "blocks") else 0)  # Wan's cross-attention
    assert backends_of(model) == chosen
    dittfast.disable(model)
    foreign.clear()
    output(model, arguments)
    assert len(self_attention(foreign)) == LAYERS
    assert backends_of(model) == chosen


def test_dense_steps_run_the_users_backend(foreign, model_and_inputs):
    model, arguments = model_and_inputs
    _set(model)
    foreign.clear()
    dense = output(model, arguments)
    assert len(self_attention(foreign)) == LAYERS
    seen = []
    with dittfast.enable(model, LOCAL, dense_first_steps=2, **OPTIONS):
        for time in (900, 700, 500, 300):
            foreign.clear()
            like = arguments["timestep"]
            found = output(model, {**arguments, "timestep": torch.full_like(like, time)})
            seen.append(len(self_attention(foreign)))
        assert seen == [LAYERS, LAYERS, 0, 0]
        assert distance(found, dense) > 1e-3
    with dittfast.enable(model, LOCAL, dense_layers=["0-1"], **OPTIONS):
        assert torch.equal(output(model, arguments), dense)


def test_dense_layers_run_the_users_backend(foreign, model_and_inputs):
    model, arguments = model_and_inputs
    with dittfast.enable(model, LOCAL, dense_layers=[0], **OPTIONS):
        native = output(model, arguments)
        _set(model)
        foreign.clear()
        assert near(output(model, arguments), native)
        assert len(self_attention(foreign)) == 1


def test_below_min_tokens_the_users_backend_runs(foreign, model_and_inputs):
    model, arguments = model_and_inputs
    _set(model)
    with dittfast.enable(model, LOCAL, backend="cpu", min_tokens=1000):
        foreign.clear()
        output(model, arguments)
        assert len(self_attention(foreign)) == LAYERS


def test_a_backend_for_a_while(foreign, model_and_inputs):
    """diffusers' context manager, around a sparse pass and around a dense one."""
    model, arguments = model_and_inputs
    dense, sparse = both(model, arguments)
    with dittfast.enable(model, LOCAL, **OPTIONS):
        with attention_backend("flex"):
            assert near(output(model, arguments), sparse)
            assert self_attention(foreign) == []
            with dittfast.disable(model):
                assert near(output(model, arguments), dense)
            assert len(self_attention(foreign)) == LAYERS
        assert torch.equal(output(model, arguments), sparse)
    assert torch.equal(output(model, arguments), dense)


def test_native_by_name(foreign, model_and_inputs):
    model, arguments = model_and_inputs
    dense, sparse = both(model, arguments)
    _set(model)
    model.set_attention_backend("native")
    foreign.clear()
    with dittfast.enable(model, LOCAL, **OPTIONS):
        assert torch.equal(output(model, arguments), sparse)
    assert torch.equal(output(model, arguments), dense)
    assert foreign == []


def test_a_failed_pass_gives_the_backend_back(foreign, model_and_inputs):
    model, arguments = model_and_inputs
    _set(model)
    chosen = backends_of(model)
    dittfast.enable(model, LOCAL, **OPTIONS)
    last = [m for n, m in model.named_modules() if n.endswith(("attn.to_v", "attn1.to_v"))][-1]
    hook = last.register_forward_hook(lambda *_: (_ for _ in ()).throw(Mine()))
    with pytest.raises(Mine):
        output(model, arguments)
    hook.remove()
    assert backends_of(model) == chosen
    dittfast.disable(model)
    foreign.clear()
    output(model, arguments)
    assert len(self_attention(foreign)) == LAYERS


def test_guidance_with_the_users_backend(foreign):
    """Weakened layers have to be watched; the others, and the plain pass, are the user's."""
    model, arguments = flux()
    heads = dict(heads=[(1, 0)], guidance_scale=2.0)
    with dittfast.guide(model, **heads):
        native = output(model, arguments)
        _set(model)
        chosen = backends_of(model)
        foreign.clear()
        assert near(output(model, arguments), native)
        assert len(foreign) == 2 * LAYERS - 1
        assert backends_of(model) == chosen


def test_sd3_has_no_backend_to_choose(foreign):
    """Its processor calls PyTorch itself."""
    model, arguments = TINY["sd3"].build()
    dense, sparse = both(model, arguments)
    model.set_attention_backend("flex")
    with dittfast.enable(model, LOCAL, **OPTIONS):
        assert torch.equal(output(model, arguments), sparse)
    assert torch.equal(output(model, arguments), dense)
    assert foreign == []


def test_the_real_flex_attention(monkeypatch):
    monkeypatch.setattr(
        _AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend
    )
    model, arguments = flux()
    _, sparse = both(model, arguments)
    model.set_attention_backend("flex")
    dense = output(model, arguments)
    with dittfast.enable(model, LOCAL, **OPTIONS):
        assert near(output(model, arguments), sparse)
    assert torch.equal(output(model, arguments), dense)


class OwnAttention:
    """A processor that attends without asking anyone."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        return torch.zeros_like(attn.to_q(hidden_states))


def test_no_word_about_backends_where_they_are_not_the_cause():
    model, arguments = flux()
    model.single_transformer_blocks[0].attn.set_processor(OwnAttention())
    with (
        dittfast.enable(model, LOCAL, **OPTIONS),
        pytest.raises(RuntimeError, match="OwnAttention") as error,
    ):
        output(model, arguments)
    assert "attention_backend" not in str(error.value)
    assert re.search(r"dense_layers|processor", str(error.value))
    model, arguments = flux()
    wrong = Layout.image(6, 9, text=5)
    with (
        dittfast.enable(model, LOCAL, layout=wrong, **OPTIONS),
        pytest.raises(RuntimeError, match=r"59 tokens.*layout") as error,
    ):
        output(model, arguments)
    assert "attention_backend" not in str(error.value)
