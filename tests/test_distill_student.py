"""The student and its teacher: what is trained, what is shared, what is captured."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from distill_run import MAKE, one_thread  # noqa: F401

from dittfast.distill.capture import capture
from dittfast.distill.config import LossWeights, StudentConfig
from dittfast.distill.student import Student, swapped
from dittfast.pipelines.families import tiny as families

INPUTS = {"flux": tiny.flux_inputs, "wan": tiny.wan_inputs}
LOCAL = {"method": "local", "options": {"window": 2, "downsample": 2, "tile": (1, 4, 4)}}


def make(family="flux", separate=False, objectives=None, **options):
    pipe = MAKE[family]()
    config = StudentConfig(**{**LOCAL, **options})
    return Student(pipe, "transformer", config, objectives or LossWeights(), separate)


def arguments(family="flux"):
    return {k: v for k, v in INPUTS[family]().items() if k != "return_dict"}


def disturb(student):
    """Other values for all that is trained."""
    with torch.no_grad():
        for p in student.trainable().values():
            p.add_(0.1 * torch.randn(p.shape))


@pytest.mark.parametrize("family", MAKE)
@pytest.mark.parametrize("trainable", ["attention", "lora", "method", "all"])
def test_trainable_sets(family, trainable):
    student = make(family, trainable=trainable, rank=3)
    names = {n for n, p in student.named_parameters() if p.requires_grad}
    assert len(names) == len(student.trainable())
    assert all(p.requires_grad for p in student.trainable().values())
    layers = student.layers
    own = {f"{layer}.spatial_weight" for layer in layers}
    assert set(student.own) == own
    model = {n for n in student.trainable() if n not in own}
    everything = {n for n, _ in student.transformer.named_parameters()}
    if trainable == "attention":
        expected = {
            f"{layer}.{part}.{kind}"
            for layer in layers
            for part in ("to_q", "to_k", "to_v", "to_out.0")
            for kind in ("weight", "bias")
        } & everything
        assert model == expected and len(expected) == (28 if family == "flux" else 16)
    elif trainable == "lora":
        assert model and all(".lora_A." in n or ".lora_B." in n for n in model)
        if family == "wan":  # cross-attention learns with it
            assert any(".attn2." in n for n in model)
    else:
        assert model == (everything if trainable == "all" else set())
    if trainable != "all":
        frozen = [n for n, p in student.transformer.named_parameters() if not p.requires_grad]
        assert any("ff" in n or "mlp" in n for n in frozen)
        others = [m for m in student.pipe.components.values() if isinstance(m, torch.nn.Module)]
        trained = {id(p) for p in student.trainable().values()}
        loose = [p for m in others for p in m.parameters() if p.requires_grad]
        assert {id(p) for p in loose} <= trained


@pytest.mark.parametrize("family", MAKE)
@pytest.mark.parametrize("trainable", ["attention", "lora", "method", "all"])
@pytest.mark.parametrize("separate", [False, True])
def test_the_teacher_is_the_stock_model_whatever_the_student_learnt(family, trainable, separate):
    stock = MAKE[family]().transformer.requires_grad_(False)
    inputs = arguments(family)
    expected = stock(**inputs, return_dict=False)[0]
    student = make(family, separate, trainable=trainable, rank=3)
    before = student(inputs)[0]
    disturb(student)
    with student.as_teacher():
        prediction, attention, *_ = student(inputs)
    assert torch.equal(prediction, expected)
    assert not prediction.requires_grad and len(attention) == len(student.layers)
    after = student(inputs)[0]
    assert after.requires_grad and not torch.equal(after, before)
    with student.as_teacher():
        assert torch.equal(student(inputs)[0], expected)
    assert torch.equal(student(inputs)[0], after)


def test_frozen_weights_are_shared():
    student = make(trainable="attention")
    model = student.transformer
    trained = set(student.trainable())
    frozen = {n: p.data_ptr() for n, p in model.named_parameters() if n not in trained}
    trained_values = {n: p.data_ptr() for n, p in student.trainable().items()}
    with student.as_teacher():
        assert {n: p.data_ptr() for n, p in model.named_parameters() if n in frozen} == frozen
        other = {n: p.data_ptr() for n, p in student.trainable().items() if n not in student.own}
        assert not set(other.values()) & set(trained_values.values())
    assert {n: p.data_ptr() for n, p in student.trainable().items()} == trained_values
    assert make(trainable="lora")._original == {}


def test_the_teacher_returns_what_it_borrowed_when_a_pass_fails():
    student = make(trainable="attention")
    disturb(student)
    before = student(arguments())[0]
    with pytest.raises(RuntimeError, match="stop"), student.as_teacher():
        raise RuntimeError("stop")
    assert torch.equal(student(arguments())[0], before)


def test_dense_layers_have_nothing_of_the_methods_to_train():
    student = make(schedule={"dense_layers": [0, 3]}, trainable="method")
    assert student.own == [f"{student.layers[i]}.spatial_weight" for i in (1, 2)]
    with pytest.raises(ValueError, match="leaves nothing to train"):
        make(trainable="method", options={"window": 2})
    with pytest.raises(ValueError, match=r"objectives\.attention_layers entry 9"):
        make(objectives=LossWeights(attention_layers=(9,)))
    with pytest.raises(ValueError, match=r"transformer; got 'transformer_2'"):
        Student(MAKE["flux"](), "transformer_2", StudentConfig(**LOCAL), LossWeights())


def attention_by_hand(module, hidden, text, rotary):
    """FLUX's attention before its output projection, written out: [text; image] rows."""
    from diffusers.models.embeddings import apply_rotary_emb

    def heads(x, norm):
        x = x.unflatten(-1, (module.heads, -1)).transpose(1, 2)
        return x if norm is None else norm(x)

    q = heads(module.to_q(hidden), module.norm_q)
    k = heads(module.to_k(hidden), module.norm_k)
    v = heads(module.to_v(hidden), None)
    if text is not None:
        added = (
            heads(module.add_q_proj(text), module.norm_added_q),
            heads(module.add_k_proj(text), module.norm_added_k),
            heads(module.add_v_proj(text), None),
        )
        q, k, v = (torch.cat([a, x], 2) for a, x in zip(added, (q, k, v)))
    q, k = (apply_rotary_emb(x, rotary) for x in (q, k))
    weights = torch.softmax(q.double() @ k.double().transpose(-1, -2) * q.shape[-1] ** -0.5, -1)
    return (weights @ v.double()).transpose(1, 2).flatten(2)


def test_captured_attention_is_the_output_before_its_projection():
    model = tiny.flux_transformer().requires_grad_(False)
    layers = ["transformer_blocks.1.attn", "single_transformer_blocks.0.attn"]
    calls = {}

    def remember(name):
        return lambda module, args, kwargs: calls.update({name: kwargs})

    handles = [
        model.get_submodule(n).register_forward_pre_hook(remember(n), with_kwargs=True)
        for n in layers
    ]
    with capture(model, attention=layers, features=layers[:1]) as captured:
        model(**tiny.flux_inputs())
    for handle in handles:
        handle.remove()
    for name, found in zip(layers, captured.attention_outputs()):
        given = calls[name]
        expected = attention_by_hand(
            model.get_submodule(name),
            given["hidden_states"],
            given.get("encoder_hidden_states"),
            given["image_rotary_emb"],
        )
        if name.startswith("transformer"):  # image rows were projected first
            expected = torch.cat([expected[:, 5:], expected[:, :5]], 1)
        torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=0)
    shapes = sorted(tuple(x.shape) for x in captured.block_outputs())
    assert shapes == [(2, 5, 32), (2, 63, 32)]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", MAKE)
def test_gradients_through_captured_outputs_under_checkpointing(family):
    objectives = LossWeights(features=1.0)
    student = make(family, objectives=objectives)
    inputs = arguments(family)

    def gradients():
        out, attention, features, _ = student(inputs)
        assert len(attention) == len(student.layers)
        loss = sum(x.square().mean() for x in [out, *attention, *features])
        return torch.autograd.grad(loss, list(student.trainable().values()))

    plain = gradients()
    student.transformer.enable_gradient_checkpointing()
    checkpointed = gradients()
    for name, a, b in zip(student.trainable(), plain, checkpointed):
        assert torch.equal(a, b), name
        assert float(a.abs().max()) > 0 or name.endswith("to_k.bias"), name


def test_the_teachers_pipeline(monkeypatch):
    """Pictures of the teacher are the stock pipeline's, with a shared and a separate teacher."""
    expected = tiny.run(MAKE["flux"]())
    for separate in (False, True):
        student = make(separate=separate)
        disturb(student)
        mine = tiny.run(student.pipe)
        with student.teacher_pipeline():
            assert torch.equal(tiny.run(student.pipe), expected)
        assert torch.equal(tiny.run(student.pipe), mine) and not torch.equal(mine, expected)


def test_half_precision_models_train_in_fp32():
    pipe = MAKE["flux"]()
    pipe.transformer.bfloat16()
    stock = copy.deepcopy(pipe.transformer).requires_grad_(False)
    inputs = {
        k: v.bfloat16() if k in ("hidden_states", "encoder_hidden_states", "pooled_projections")
        else v for k, v in arguments().items()
    }  # fmt: skip
    student = Student(pipe, "transformer", StudentConfig(**LOCAL), LossWeights())
    assert {p.dtype for p in student.trainable().values()} == {torch.float32}
    assert student.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        expected = stock(**inputs, return_dict=False)[0]
        with student.as_teacher():
            assert torch.equal(student(inputs)[0], expected)
        student(inputs)[0].float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in student.trainable().values())


def test_swapped_values_count_inside_of_autocast():
    """Which keeps what it casts: a validation draws by student and teacher in one autocast."""
    layer, x = torch.nn.Linear(8, 8, bias=False), torch.randn(2, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = layer(x)
        with swapped(dict(layer.named_parameters()), {"weight": torch.zeros(8, 8)}):
            assert not layer(x).any()
        assert torch.equal(layer(x), before)


class Components:
    """As much of a pipeline as the student needs."""

    def __init__(self, transformer):
        self.transformer = transformer
        self.components = {"transformer": transformer}


TINY = {k: x for k, x in families.TINY.items() if not k.startswith(("z-image", "cosmos3"))}


@pytest.mark.parametrize(
    "name",
    [n if at % 3 == 0 else pytest.param(n, marks=pytest.mark.slow) for at, n in enumerate(TINY)],
)
def test_every_family_has_a_teacher_and_something_to_train(name):
    """All but Z-Image and Cosmos 3, which take lists in the place of hidden_states."""
    stock, inputs = TINY[name].build()
    inputs.pop("return_dict")
    with torch.no_grad():
        expected = stock(**inputs, return_dict=False)[0]
    model, _ = TINY[name].build()
    config = StudentConfig("local", {"window": 1.5}, trainable="attention")
    student = Student(Components(model), "transformer", config, LossWeights())
    names = list(student.trainable())
    for name, p in model.named_parameters():
        inside = name.startswith(tuple(f"{layer}." for layer in student.layers))
        of_text = any(part in name for part in ("add_", "_add_", "txt_", "_t."))
        if p.ndim == 2 and inside:
            assert (name in names) == (not of_text), name
    with torch.no_grad():
        for p in student.trainable().values():
            p.mul_(1.1)
    with student.as_teacher():
        found, teacher, *_ = student(inputs)
    channels = found.shape[1]
    assert torch.equal(found, expected[:, :channels])
    prediction, attention, *_ = student(inputs)
    assert not torch.equal(prediction, found)
    assert len(attention) == len(teacher) == len(student.layers)
    loss = prediction.square().mean() + sum(x.square().mean() for x in attention)
    gradients = torch.autograd.grad(loss, list(student.trainable().values()))
    assert all(g.isfinite().all() for g in gradients)
