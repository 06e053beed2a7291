"""The configuration of a run: strict, typed, overridable; and the dry run."""

from __future__ import annotations

import json

import pytest
import yaml
from distill_run import write_config

from dittfast.cli import main
from dittfast.distill.config import load_config, shipped
from dittfast.methods import Local


def minimal(tmp_path, **changes):
    data = {
        "model": {"path": "sample-flux"},
        "student": {"method": "local"},
        "data": {"folder": "data"},
        "train": {"output": "run", "steps": 3},
    }
    for name, value in changes.items():
        data[name] = data.get(name, {}) | value if isinstance(value, dict) else value
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


def test_overrides_and_types(tmp_path):
    path = minimal(tmp_path, student={"method": "local", "options": {"window": 3}})
    config = load_config(
        path,
        [
            "train.lr=1e-4",
            "train.clip=null",
            "train.betas=[0.8, 0.9]",
            "train.trackers=tensorboard",
            "data.call.height=128",
            "student.options.downsample=2",
            "student.alpha=8",
            "validation.prompts=[a, b]",
            "objectives.attention_layers=[0, '2-3']",
        ],
    )
    assert config.train.lr == 1e-4 and config.train.clip is None
    assert config.train.betas == (0.8, 0.9) and config.train.trackers == ("tensorboard",)
    assert config.data.call == {"height": 128}
    assert config.student.resolved()[0] == Local(window=3, downsample=2)
    assert config.student.resolved()[1].min_tokens == 0
    assert config.student.alpha == 8.0 and isinstance(config.student.alpha, float)
    assert config.validation.prompts == ("a", "b")
    assert config.objectives.attention_layers == (0, "2-3")
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(config.to_dict()))
    assert load_config(str(again)) == config


@pytest.mark.parametrize(
    "changes, overrides, message",
    [
        ({"train": {"stepz": 3}}, [], r"'train\.stepz'.*'train\.steps'"),
        ({"trian": {}}, [], r"'trian'.*'train'"),
        ({"train": 5}, [], "train must be a mapping, got 5"),
        ({"student": {"method": "local", "options": {1: 2}}}, [], "must have names as keys, got 1"),
        ({}, ["train.lr=fast"], "train.lr must be a number, got 'fast'"),
        ({}, ["train.steps=1.5"], "train.steps must be an integer, got 1.5"),
        ({}, ["train.steps=true"], "train.steps must be an integer, got True"),
        ({}, ["train.mixed_precision=no"], "mixed_precision must be text, got False; YAML reads"),
        ({}, ["train.steps=0"], "train.steps must be an integer, at least 1; got 0"),
        ({}, ["train.gradient_checkpointing=1"], "true or false, got 1"),
        ({}, ["train.lr=0"], "train.lr must be a finite number above 0"),
        ({}, ["train.ema=1.0"], r"train.ema must lie in 0..1.*got 1.0"),
        ({}, ["train.time_range=[0.5, 0.2]"], "low < high"),
        ({}, ["train.time_range=[0.5]"], "must have 2 values"),
        ({}, ["data.mix={a/b: 0}"], r"data\.mix\.a/b\.share must be a finite number above 0"),
        ({}, ["data.mix={a/b: yes}"], r"data\.mix\.a/b\.share must be a number, got True"),
        ({}, ["data.mix={a/b: {}}"], r"data\.mix\.a/b\.share is missing"),
        ({}, ["data.mix={a/b: {share: 1, tme_range: [0, 1]}}"], r"Did you mean .*a/b\.time_range"),
        ({}, ["data.mix={a/b: {share: 1, time_range: [1, 0]}}"], "low < high.*got 1.0, 0.0"),
        ({}, ["data.mix={a/b: {share: 1, crop: [0, 1]}}"], r"each of data\.mix\.a/b\.crop.*got 0"),
        ({}, ["train.optimizer=adam"], "did you mean 'adamw'"),
        ({}, ["train.trackers=[tensorbord]"], "did you mean 'tensorboard'"),
        ({}, ["student.trainable=atention"], "did you mean 'attention'"),
        ({}, ["student.options.windo=3"], "windo.*'window'"),
        ({}, ["student.schedule.dense_layer=[0]"], "dense_layer"),
        ({}, ["student.rank=0"], "student.rank"),
        ({}, ["objectives.denoising=-1"], "objectives.denoising"),
        ({"objectives": dict(denoising=0, prediction=0, attention=0)}, [], "weight 0"),
        ({"data": {"prompts": "a", "pictures": "b"}}, [], "both given"),
        ({"validation": {"every": 5}}, [], "validation.prompts is empty"),
        ({}, ["train"], "KEY.KEY=VALUE"),
        ({}, ["train..lr=1"], "KEY.KEY=VALUE"),
        ({}, ["train.lr.a=1"], "no 'a'|must be a mapping|must be a number"),
        ({}, ["train.lr=[1"], "train.lr=.1 is not valid YAML"),
    ],
)
def test_bad_values_are_named(tmp_path, changes, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(minimal(tmp_path, **changes), overrides)


def test_missing_files_and_keys(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: x}\n")
    with pytest.raises(ValueError, match="student is missing"):
        load_config(str(path))
    path.write_text("- 1\n")
    with pytest.raises(ValueError, match="mapping"):
        load_config(str(path))
    path.write_text("a: [\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_config(str(path))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_config(str(tmp_path / "nowhere.yaml"))
    with pytest.raises(ValueError, match=r"clear_flx.*'clear_flux'"):
        load_config("clear_flx")


@pytest.mark.parametrize("name", sorted(shipped()))
def test_shipped_recipes_are_valid(name):
    config = load_config(name)
    config.student.resolved()
    assert config.train.output == f"runs/{name}"


def test_recipes_of_published_models_can_be_tried_without_the_hub(monkeypatch):
    """Oracle: CLEAR trains q, k, v and out of 57 layers; the single blocks have no out."""
    import diffusers

    from dittfast.distill.memory import memory_needs

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", offline)
    found = memory_needs(load_config("clear_flux"))["parameters"]
    assert found["trained"] == (57 * 3 + 19) * (3072 * 3072 + 3072)
    assert 11.8e9 < found["model"] < 12e9
    with pytest.raises(ValueError, match="no network"):
        memory_needs(load_config("clear_flux", ["model.path=nobody/nothing"]))


def test_dry_run_counts_what_training_would_train(tmp_path, capsys):
    path = write_config(tmp_path, student={"options": {"window": 2, "downsample": 2}})

    numbers = tmp_path / "numbers.json"

    def dry(*words):
        assert main(["distill", path, "--dry-run", *words, "--json", str(numbers)]) == 0
        shown = capsys.readouterr().out.splitlines()
        end = shown.index("")
        return yaml.safe_load("\n".join(shown[:end])), json.loads(numbers.read_text())

    shown, found = dry("train.lr=2e-4")
    assert shown["train"]["lr"] == 2e-4
    # Width 32: q, k, v and out with bias in two double layers, no out in two single ones, and 2 x 2
    # weights in each of the four.
    assert found["parameters"]["trained"] == 14 * (32 * 32 + 32) + 4 * 4
    assert found["bytes"]["adamw states"] == 8 * found["parameters"]["trained"]
    assert found["bytes"]["total"] == sum(v for k, v in found["bytes"].items() if k != "total")
    _, found = dry("student.trainable=lora", "student.rank=4", "student.schedule.dense_layers=[0]")
    assert found["parameters"]["trained"] == 14 * 4 * (32 + 32) + 3 * 4
    assert dry("student.trainable=method")[1]["parameters"]["trained"] == 16
    found = dry("student.trainable=all")[1]
    assert found["parameters"]["trained"] == found["parameters"]["model"] + 16


def test_command_line_errors(tmp_path, capsys):
    path = write_config(tmp_path)
    assert main(["distill"]) == 2 and "configuration is missing" in capsys.readouterr().err
    assert main(["distill", path, "train.stps=3"]) == 2
    assert "Did you mean 'train.steps'" in capsys.readouterr().err
    assert main(["distill", path]) == 2
    assert "dittfast distill prepare" in capsys.readouterr().err
    assert main(["distill", path, "--dry", "--dray-run"]) == 2
    assert "did you mean --dry-run" in capsys.readouterr().err
    assert main(["distill", "--list"]) == 0
    assert "clear_flux" in capsys.readouterr().out.split()
