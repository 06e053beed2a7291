"""Adapters: back in one call, refused on another model, merged and taken out to the bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from distill_run import make_config, one_thread  # noqa: F401
from safetensors.torch import load_file, save_file
from tiny import flux_pipeline, run

import dittfast
from dittfast.distill.adapter_files import read_weights
from dittfast.distill.student import swapped
from dittfast.distill.trainer import Trainer
from dittfast.methods import Local, Radial
from dittfast.pipelines.adapter import method_parameters
from dittfast.pipelines.models import is_swapped
from dittfast.pipelines.runs.sources import find, load

KINDS = {
    "attention": {"trainable": "attention"},
    "lora": {"trainable": "lora", "rank": 3, "alpha": 6},
    "method": {"trainable": "method"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module", params=KINDS)
def trained(request, folder):
    """A finished run, and what its student draws."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    student = {"options": {"window": 2, "downsample": 2, "tile": [1, 4, 4]}, **KINDS[request.param]}
    settings = {"output": str(folder / request.param), "steps": 2, "lr": 1e-2, "ema": 0.5}
    trainer = Trainer(make_config(folder, student=student, train=settings))
    trainer.run()
    with swapped(trainer.parameters, dict(trainer.average.values)):
        picture = run(trainer.pipe)
    torch.set_num_threads(threads)
    return trainer, picture


def fresh(trainer):
    pipe = load(trainer.source)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def values(pipe):
    return {n: x.clone() for n, x in pipe.transformer.state_dict().items()}


def test_an_adapter_brings_everything_back(trained):
    trainer, picture = trained
    pipe = fresh(trainer)
    before, dense = values(pipe), run(pipe)
    path = trainer.output / "adapter"
    dittfast.load_adapter(pipe, path)
    torch.testing.assert_close(run(pipe), picture, rtol=1e-5, atol=1e-5)
    assert float((picture - dense).abs().max()) > 1e-3
    description = dittfast.describe(pipe)
    assert description.method == Local(window=2, downsample=2, tile=(1, 4, 4))
    with pytest.raises(ValueError, match="unload_adapter"):
        dittfast.load_adapter(pipe, path)
    loaded = run(pipe)
    dittfast.merge(pipe)
    torch.testing.assert_close(run(pipe), loaded, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name in pipe.transformer.state_dict())
    with pytest.raises(ValueError, match="merged already"):
        dittfast.merge(pipe)
    dittfast.unmerge(pipe)
    assert torch.equal(run(pipe), loaded)
    with pytest.raises(ValueError, match="not merged"):
        dittfast.unmerge(pipe)
    dittfast.merge(pipe)
    dittfast.unload_adapter(pipe)
    after = values(pipe)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert torch.equal(run(pipe), dense)
    dittfast.load_adapter(pipe, path)
    assert torch.equal(run(pipe), loaded)
    dittfast.unload_adapter(pipe)
    assert torch.equal(run(pipe), dense)
    with pytest.raises(ValueError, match="no adapter"):
        dittfast.merge(pipe)


def test_another_base_is_refused_and_left_alone(trained):
    trainer, _ = trained
    path = trainer.output / "adapter"
    pipe = fresh(trainer)
    with torch.no_grad():
        for p in pipe.transformer.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    before = values(pipe)
    with pytest.raises(ValueError, match=r"trained on flux, and this is another.*other values"):
        dittfast.load_adapter(pipe, path)
    wider = flux_pipeline(heads=4)
    with pytest.raises(ValueError, match="other shapes"):
        dittfast.load_adapter(wider, path)
    assert not is_swapped(pipe.transformer) and not is_swapped(wider.transformer)
    assert all(torch.equal(x, before[n]) for n, x in values(pipe).items())
    dittfast.load_adapter(pipe, path, any_base=True)
    assert is_swapped(pipe.transformer)


def test_the_same_base_in_another_dtype_is_accepted(trained):
    trainer, _ = trained
    pipe = fresh(trainer)
    pipe.transformer.bfloat16()
    dittfast.load_adapter(pipe, trainer.output / "adapter")
    assert is_swapped(pipe.transformer)


def test_files_of_an_adapter(trained):
    trainer, _ = trained
    path = trainer.output / "adapter"
    names = {p.name for p in path.iterdir()}
    kind = trainer.config.student.trainable
    lora = {"pytorch_lora_weights.safetensors"} if kind == "lora" else set()
    assert names == {"adapter.json", "README.md", "attention.safetensors", *lora}
    own = trainer.student.own
    wanted = {f"method.{n}" if n in own else n: x for n, x in trainer.average.values.items()}
    found = read_weights(path)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[n], wanted[n]) for n in found)
    card = (path / "README.md").read_text()
    assert card.startswith("---\nbase_model: flux\n")
    for fact in ("Local(window=2", "2 of 2 samples, seed 0", "adamw, lr 0.01", "denoising 1"):
        assert fact in card, fact
    assert ("LoRA of rank 3, alpha 6" in card) == (kind == "lora")
    description = json.loads((path / "adapter.json").read_text())
    assert description["config"] == trainer.config.to_dict()
    assert description["run"]["steps"] == 2


def test_adapters_of_the_first_format_load(trained, tmp_path):
    """They have no mark before the names of the method's own parameters."""
    trainer, picture = trained
    path = shutil.copytree(trainer.output / "adapter", tmp_path / "old")
    weights = load_file(path / "attention.safetensors")
    old = {name.removeprefix("method."): x for name, x in weights.items()}
    assert old.keys() != weights.keys()
    save_file(old, path / "attention.safetensors")
    description = json.loads((path / "adapter.json").read_text())
    del description["sha256"]
    (path / "adapter.json").write_text(json.dumps(description | {"format": 1}))
    pipe = fresh(trainer)
    dittfast.load_adapter(pipe, path)
    torch.testing.assert_close(run(pipe), picture, rtol=1e-5, atol=1e-5)
    (path / "adapter.json").write_text(json.dumps(description | {"format": 3}))
    with pytest.raises(ValueError, match="has format 3, this version reads 1 and 2"):
        dittfast.load_adapter(fresh(trainer), path)


@dataclass(frozen=True)
class Weighted(Local):
    """Local attention with one more parameter, of a name that projections have, too."""

    def parameters(self, heads, head_dim):
        return super().parameters(heads, head_dim) | {"weight": torch.ones(1)}

    def extend(self, layout, k, v, weight=None, **parameters):
        return super().extend(layout, k, v, **parameters)


def test_a_methods_weight_does_not_claim_the_models(trained):
    trainer, picture = trained
    pipe = fresh(trainer)
    method = Weighted(window=2, downsample=2, tile=(1, 4, 4))
    dittfast.load_adapter(pipe, trainer.output / "adapter", method=method)
    torch.testing.assert_close(run(pipe), picture, rtol=1e-5, atol=1e-5)


def test_diffusers_loads_the_lora(folder, trained):
    """Without dittfast: the same LoRA, alpha included, on dense attention."""
    trainer, _ = trained
    if trainer.config.student.trainable != "lora":
        pytest.skip("the adapter is no LoRA")
    pipe = fresh(trainer)
    pipe.load_lora_weights(trainer.output / "adapter")
    theirs = run(pipe)
    ours = fresh(trainer)
    dittfast.load_adapter(ours, trainer.output / "adapter")
    with dittfast.disable(ours):
        torch.testing.assert_close(run(ours), theirs, rtol=1e-5, atol=1e-5)


def clear_checkpoint(pipe, prefix="", down=2):
    """A file laid out as CLEAR's published ones."""
    weights = {}
    for name, x in pipe.transformer.state_dict().items():
        if ".attn.to_" in name and "to_add_out" not in name:
            weights[prefix + name] = x + 0.1
    for layer in ("transformer_blocks.0", "single_transformer_blocks.1"):
        name = f"{prefix}{layer}.attn.processor.spatial_weight"
        weights[name] = torch.rand(1, 1, 1, down, 1, down, 1)
    return {n: x.contiguous() for n, x in weights.items()}


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_clears_checkpoints_load(tmp_path, prefix):
    pipe = flux_pipeline()
    before, dense = values(pipe), run(pipe)
    weights = clear_checkpoint(pipe, prefix)
    path = tmp_path / "clear_local_3_down_2.safetensors"
    save_file(weights, path)
    dittfast.load_adapter(pipe, path)
    assert dittfast.describe(pipe).method == Local(window=3, downsample=2)
    own = method_parameters(pipe)
    for name, x in weights.items():
        name = name.removeprefix("transformer.")
        if name.endswith("spatial_weight"):
            found = own["transformer." + name.replace("processor.", "")]
            assert torch.equal(found, x.reshape(2, 2))
        else:
            assert torch.equal(pipe.transformer.get_parameter(name), x)
    untouched = own["transformer.transformer_blocks.1.attn.spatial_weight"]
    assert torch.equal(untouched, torch.full((2, 2), 0.25))
    assert not torch.equal(run(pipe), dense)
    dittfast.unload_adapter(pipe)
    assert all(torch.equal(x, before[n]) for n, x in values(pipe).items())


def test_files_that_do_not_fit_change_nothing(tmp_path):
    pipe = flux_pipeline()
    before = values(pipe)
    weights = clear_checkpoint(pipe)
    path = tmp_path / "mine.safetensors"

    def refuse(message, contents=weights, error=ValueError, **options):
        save_file(contents, path)
        with pytest.raises(error, match=message):
            dittfast.load_adapter(pipe, path, **options)
        assert not is_swapped(pipe.transformer)
        assert all(torch.equal(x, before[n]) for n, x in values(pipe).items())

    refuse("method='local'")
    refuse(r"spatial_weight \[2, 2\] does not fit", method="local", window=3, downsample=4)
    refuse("has no parameter", method=Radial())
    name = "transformer_blocks.0.attn.to_q.weight"
    wrong = weights | {name: torch.zeros(3, 3)}
    refuse(r"to_q.weight is \[3, 3\]", wrong, method="local", downsample=2)
    refuse("no parameter blocks", {"blocks.9.to_q.weight": torch.zeros(1)}, method="local")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        dittfast.load_adapter(pipe, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"adapter\.json"):
        dittfast.load_adapter(pipe, tmp_path)


def test_a_second_stage_starts_from_an_adapter(folder, trained):
    trainer, _ = trained
    student = {**trainer.config.to_dict()["student"], "start": str(trainer.output / "adapter")}
    output = folder / f"second-{trainer.config.student.trainable}"
    second = Trainer(make_config(folder, student=student, train={"output": str(output)}))
    expected = load_weights(trainer.output / "adapter")
    assert all(torch.equal(p, expected[n]) for n, p in second.parameters.items())
    stock = fresh(trainer).transformer
    for name, x in second.student._original.items():
        assert torch.equal(x, stock.get_parameter(name)), name


def load_weights(path: Path):
    found = {}
    for file in path.glob("*.safetensors"):
        for name, x in load_file(file).items():
            name = name.replace("lora_A.", "lora_A.dittfast.").replace(
                "lora_B.", "lora_B.dittfast."
            )
            found[name.removeprefix("transformer.").removeprefix("method.")] = x
    return found


def test_sources_are_found(trained):
    trainer, _ = trained
    assert find(trainer.config.model.path).name == "flux"
