"""Students whose methods have parameters by heads, and mixtures: trained, stored, or refused."""

import shutil

import pytest
import tiny
import torch
from distill_run import fresh_accelerate, make_config, one_thread  # noqa: F401
from safetensors.torch import load_file, save_file
from tiny import run

import dittfast
from dittfast.distill.losses import layer_mean
from dittfast.distill.student import swapped
from dittfast.distill.trainer import Trainer
from dittfast.methods import Linear
from dittfast.pipelines.adapter import method_parameters
from dittfast.pipelines.models import is_swapped
from dittfast.pipelines.runs.sources import load

STUDENTS = {
    "linear": {"method": "linear", "options": {"hidden": 3}},
    "sla": {
        "method": "sla",
        "options": {"sparse": {"method": "local", "options": {"window": 2, "tile": [1, 2, 2]}}},
    },
    "mixture": {
        "method": "mixture",
        "options": {
            "rules": [
                {"layers": "transformer_blocks.*", "method": "local",
                 "options": {"window": 2, "downsample": 2}},
                {"layers": "single*", "heads": [0], "method": "linear", "options": {"hidden": 3}},
            ]
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", STUDENTS)
def test_trained_stored_and_loaded(tmp_path, kind):
    student = STUDENTS[kind] | {"trainable": "attention"}
    settings = {"output": str(tmp_path / "run"), "steps": 2, "lr": 1e-2}
    trainer = Trainer(make_config(tmp_path, student=student, train=settings))
    own = method_parameters(trainer.pipe)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in own.values())
    trainer.run()
    values = trainer.average.values if trainer.average else {}
    with swapped(trainer.parameters, dict(values)):
        picture = run(trainer.pipe)
    learnt = {n: p for n, p in own.items() if n.endswith(("_out", "projection"))}
    assert learnt and all(float(p.abs().max()) > 0 for p in learnt.values())

    pipe = load(trainer.source)
    dense = run(pipe)
    dittfast.load_adapter(pipe, tmp_path / "run/adapter")
    torch.testing.assert_close(run(pipe), picture, rtol=1e-5, atol=1e-5)
    assert len(method_parameters(pipe)) == len(own)
    dittfast.unload_adapter(pipe)
    assert torch.equal(run(pipe), dense)

    short = shutil.copytree(tmp_path / "run/adapter", tmp_path / "short")
    tensors = load_file(short / "attention.safetensors")
    name = next(n for n in tensors if n.endswith(("q_norm", "projection")))
    changes = (
        (lambda: tensors.pop(name), "tensors are missing"),
        (lambda: tensors.update({name: torch.ones(1, 7)}), "is \\[1, 7\\], the one promised"),
    )
    for change, words in changes:
        change()
        save_file(tensors, short / "attention.safetensors")
        with pytest.raises(ValueError, match=words):
            dittfast.load_adapter(pipe, short, verify=False)
        assert not is_swapped(pipe.transformer)


def test_heads_are_balanced_and_the_router_is_stored(tmp_path):
    """With one of two heads to take, weights are 1: only the load balance moves the router."""
    options = {"inner": {"method": "dense", "options": {"block_size": 16}}, "shared": 0}
    student = {"method": "mixture_of_heads", "options": options | {"routed": 1}}
    student["trainable"] = "attention"
    settings = {"output": str(tmp_path / "run"), "steps": 2, "lr": 1e-2, "ema": None}
    settings |= {"gradient_checkpointing": True, "weight_decay": 0.0}
    given = {"student": student, "train": settings}
    balanced = {"denoising": 1.0, "prediction": 0.5, "attention": 0.5, "load_balance": 0.5}
    trainer = Trainer(make_config(tmp_path, objectives=balanced, **given))
    own = method_parameters(trainer.pipe)
    before = {name: p.detach().clone() for name, p in own.items()}
    assert {p.shape for p in own.values()} == {(2, 32)} and len(own) == 4
    trainer.run()
    assert 1 <= trainer.last["load_balance"] <= 2
    assert all(not torch.equal(p, before[name]) for name, p in own.items())
    picture = run(trainer.pipe)
    layers = trainer.student.transformer._dittfast.layers.values()
    assert all(layer.report is None for layer in layers)

    pipe = load(trainer.source)
    dense = run(pipe)
    dittfast.load_adapter(pipe, tmp_path / "run/adapter")
    torch.testing.assert_close(run(pipe), picture, rtol=1e-5, atol=1e-5)
    dittfast.unload_adapter(pipe)
    assert torch.equal(run(pipe), dense)

    wider = tiny.flux_transformer(heads=4)
    with pytest.raises(ValueError, match="another model"):
        dittfast.load_adapter(wider, tmp_path / "run/adapter")
    with pytest.raises(ValueError, match=r"\[2, 32\], the one promised is \[4, 64\]"):
        dittfast.load_adapter(wider, tmp_path / "run/adapter", any_base=True)
    assert not is_swapped(wider)


def test_a_loss_that_no_method_reports(tmp_path):
    balanced = {"denoising": 1.0, "prediction": 0.0, "attention": 0.0, "load_balance": 0.01}
    with pytest.raises(ValueError, match=r"objectives\.load_balance has a weight, and Local"):
        Trainer(make_config(tmp_path, objectives=balanced))
    with pytest.raises(ValueError, match=r"objectives\.load_balance must be"):
        make_config(tmp_path, objectives=balanced | {"load_balance": -1.0})
    with pytest.raises(ValueError, match="no layer reported a loss 'load_balance'"):
        layer_mean([], "load_balance")


def test_rules_for_some_steps_are_not_trained(tmp_path):
    rules = [{"method": "local", "steps": [0, 2]}]
    student = {"method": "mixture", "options": {"rules": rules}}
    with pytest.raises(ValueError, match="rules for some denoising steps cannot be trained"):
        Trainer(make_config(tmp_path, student=student))


def test_what_a_run_would_train_is_known_before_it(tmp_path):
    from dittfast.distill.memory import memory_needs

    config = make_config(tmp_path, student=STUDENTS["linear"] | {"trainable": "method"})
    each = sum(x.numel() for x in Linear(hidden=3).parameters(2, 16).values())
    assert memory_needs(config)["parameters"]["trained"] == 4 * each
