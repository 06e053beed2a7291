"""What is put into a pipeline when it is loaded, on tiny real pipelines; and what a run needs."""

import logging

import numpy as np
import pytest
import torch
from tiny import flux_pipeline, wan_pipeline

from dittfast.cli import main
from dittfast.pipelines.runs import loading, sources
from dittfast.pipelines.runs.call import call_arguments
from dittfast.pipelines.runs.loading import Loading, Lora, check_loading, load_with, parameter_count
from dittfast.pipelines.runs.needs import needs_of_pass
from dittfast.pipelines.runs.run import duration, run

CALL = dict(prompt="a red cat", height=64, width=96, num_inference_steps=2, max_sequence_length=12)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny-flux"
    flux_pipeline().save_pretrained(path)
    return sources.find(str(path))


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA of rank 2 on two layers, in diffusers' layout."""
    from safetensors.torch import save_file

    model, draw = flux_pipeline().transformer, torch.Generator().manual_seed(0)
    values = {}
    for name in ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_v"):
        layer = model.get_submodule(name)
        for part, shape in (("A", (2, layer.in_features)), ("B", (layer.out_features, 2))):
            values[f"transformer.{name}.lora_{part}.weight"] = torch.randn(shape, generator=draw)
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    save_file(values, path)
    return path, values


def loaded(source, **how):
    how = Loading(**how)
    check_loading(how, source, CPU)
    return load_with(source, "cpu", torch.float32, how)


def test_a_lora_adds_its_product_by_its_scale(source, lora):
    path, values = lora
    pipe = loaded(source, loras=(Lora.parse(f"{path}:0.5"), Lora.parse(f"{path}:-0.25")))
    by_hand = flux_pipeline()
    for name in {key.rpartition(".lora_")[0] for key in values}:
        a, b = (values[f"{name}.lora_{part}.weight"] for part in "AB")
        layer = by_hand.transformer.get_submodule(name.removeprefix("transformer."))
        with torch.no_grad():
            layer.weight += (0.5 - 0.25) * b @ a
    found, expected = run(pipe, CALL).latents, run(by_hand, CALL).latents
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, run(flux_pipeline(), CALL).latents, atol=1e-2)


def test_a_lora_of_another_model_is_refused(source, lora, tmp_path):
    from safetensors.torch import save_file

    _, values = lora
    other = tmp_path / "other.safetensors"
    save_file({k.replace("attn", "no_such"): v for k, v in values.items()}, other)
    with pytest.raises(ValueError, match=r"other\.safetensors (cannot be put into|holds no layer)"):
        loaded(source, loras=(Lora.parse(str(other)),))


def test_weights_in_eight_bits_still_draw(source):
    stock = run(flux_pipeline(), CALL).latents
    for kind in ("int8", "fp8"):
        found = run(loaded(source, quantize=kind), CALL).latents
        apart = ((found - stock).norm() / stock.norm()).item()
        assert 0 < apart < 0.2, kind


def test_the_rest_is_diffusers_own(source, monkeypatch):
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    before = registry.get_active_backend()[0]
    pipe = loaded(source, vae_tiling=True, attention_backend="_native_math")
    assert pipe.vae.use_tiling
    kinds = {str(p._attention_backend.value) for p in pipe.transformer.attn_processors.values()}
    assert kinds == {"_native_math"} and registry.get_active_backend()[0] is before
    asked = []
    for name in (
        "enable_model_cpu_offload",
        "enable_group_offload",
        "enable_sequential_cpu_offload",
    ):
        monkeypatch.setattr(pipe, name, lambda *a, _n=name, **k: asked.append((_n, a, k)))
    for name in loading.OFFLOADS:
        loading._place(pipe, name, torch.device("cuda"))
    model, group, sequential = asked
    assert model == ("enable_model_cpu_offload", (), {"device": torch.device("cuda")})
    assert group[0] == "enable_group_offload" and group[2]["offload_type"] == "leaf_level"
    assert sequential[0] == "enable_sequential_cpu_offload"


def test_packages_that_are_missing_are_named(source, monkeypatch, tmp_path):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    for kind, package in (("int8", "torchao"), ("bnb-nf4", "bitsandbytes"), ("gguf:a", "gguf")):
        with pytest.raises(
            ValueError, match=rf"needs the package {package}.*pip install {package}"
        ):
            check_loading(Loading(quantize=kind), source, CPU)
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: "here")
    with pytest.raises(ValueError, match="runs on CUDA devices, not on cpu"):
        check_loading(Loading(quantize="bnb-int8"), source, CPU)
    (tmp_path / "a.gguf").write_bytes(b"GGML")
    with pytest.raises(ValueError, match="does not begin with GGUF"):
        check_loading(Loading(quantize=f"gguf:{tmp_path / 'a.gguf'}"), source, CPU)
    with pytest.raises(ValueError, match=r"a file for each of transformer, as gguf:FILE; got 0"):
        check_loading(Loading(quantize="gguf"), source, CPU)


def test_weights_are_counted_before_they_are_loaded(source):
    pipe = flux_pipeline()
    modules = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    # Tied embeddings of a text encoder are stored once.
    expected = sum(
        len({p.data_ptr(): p for p in m.parameters()})
        and sum({p.data_ptr(): p.numel() for p in m.parameters()}.values())
        for m in modules
    )
    assert parameter_count(source) == pytest.approx(expected, rel=0.02)


class Live(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of tensors that live inside, at most."""

    def __init__(self):
        super().__init__()
        self.seen, self.now, self.most = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        import weakref

        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                memory = x.untyped_storage()
                key, size = memory._cdata, memory.nbytes()
                if key not in self.seen:
                    self.seen.add(key)
                    self.now += size
                    weakref.finalize(memory, self._gone, key, size)
        self.most = max(self.most, self.now)
        return out

    def _gone(self, key, size):
        self.seen.discard(key)
        self.now -= size


def test_needs_are_those_of_the_pass(caplog):
    for pipe, call in (
        (flux_pipeline(), CALL | {"height": 256, "width": 256}),
        (wan_pipeline(), {"prompt": "a", "height": 64, "width": 64, "num_frames": 5,
                          "num_inference_steps": 1, "max_sequence_length": 12}),
    ):  # fmt: skip
        found = {}

        def before(model, args, kwargs, pipe=pipe, found=found):
            if "live" in found:  # the pass without a prompt
                return
            found["needs"] = needs_of_pass(pipe, model, args, kwargs)
            found["live"] = Live()
            found["live"].__enter__()

        def after(model, args, kwargs, out, found=found):
            if "most" not in found:
                found["live"].__exit__(None, None, None)
                found["most"] = found["live"].most

        hooks = [
            pipe.transformer.register_forward_pre_hook(before, with_kwargs=True),
            pipe.transformer.register_forward_hook(after, with_kwargs=True),
        ]
        with caplog.at_level(logging.INFO, "dittfast"):
            run(pipe, call | {"num_inference_steps": 1})
        for hook in hooks:
            hook.remove()
        needs = found["needs"]
        weights = sum(
            p.numel() * p.element_size()
            for m in pipe.components.values()
            if isinstance(m, torch.nn.Module)
            for p in (*m.parameters(), *m.buffers())
        )
        assert needs.weights == pytest.approx(weights, rel=0.05)
        assert needs.activations / 3 < found["most"] < 3 * needs.activations
    assert f"{needs.tokens:,} tokens" in caplog.text and "memory: weights" in caplog.text


def test_a_second_guidance_that_does_nothing_is_said(caplog):
    pipe = wan_pipeline()
    given = {"guidance_scale": 1.0, "guidance_scale_2": 4.0, "height": 48, "width": 80}
    call_arguments(pipe, "a", num_frames=5, **given)
    assert "guidance_scale_2 4 does nothing" in caplog.text
    caplog.clear()
    call_arguments(pipe, "a", num_frames=5, **given | {"guidance_scale": 3.0})
    assert not caplog.text
    with pytest.raises(ValueError, match="FluxPipeline takes no guidance_scale_2"):
        call_arguments(flux_pipeline(), "a", guidance_scale_2=3.0)


def test_durations():
    assert [duration(x) for x in (7, 99, 600, 5399, 9000)] == [
        "7 s", "99 s", "10 min", "90 min", "2.5 h",
    ]  # fmt: skip


def test_generate_takes_them_and_records_them(source, lora, tmp_path, capsys):
    import json

    path, _ = lora
    small = ["--height", "64", "--width", "96", "--steps", "2", "--device", "cpu"]
    small += ["--max-sequence-length", "12"]
    command = ["generate", "a red cat", "--model", source.location, *small]
    command += ["-o", str(tmp_path / "a.png"), "--lora", f"{path}:0.5", "--vae-tiling"]
    assert main([*command, "--json", "-"]) == 0
    shown = capsys.readouterr()
    data = json.loads(shown.out.splitlines()[-1])
    lora = {"path": str(path), "scale": 0.5, "component": "transformer"}
    assert data["loading"] == {"loras": [lora], "vae_tiling": True}
    assert "108 tokens; memory: weights" in shown.err and "parameters" in shown.err
    expected = run(loaded(source, loras=(Lora(str(path), 0.5),), vae_tiling=True), CALL).frames
    from dittfast.pictures import read_picture

    assert np.array_equal(np.asarray(read_picture(tmp_path / "a.png")), expected[0])


def test_an_outline_is_the_pipeline_without_its_weights(tmp_path):
    from dittfast.methods import Local
    from dittfast.methods.head_guidance import HeadGuidance
    from dittfast.pipelines.guidance.plain import head_counts
    from dittfast.pipelines.models import is_swapped
    from dittfast.pipelines.runs.call import size_multiples
    from dittfast.pipelines.runs.outline import check_run, outline
    from dittfast.pipelines.runs.sources import Source, find
    from dittfast.schedule import Schedule

    pipe = flux_pipeline()
    pipe.save_pretrained(tmp_path / "flux")
    source = find(str(tmp_path / "flux"))
    empty = outline(source)
    assert type(empty) is type(pipe) and empty.transformer.device.type == "meta"
    assert size_multiples(empty) == size_multiples(pipe)
    assert head_counts(empty) == head_counts(pipe)
    run = {"method": Local(), "guidance": HeadGuidance(((0, 1),))}
    call = check_run(empty, source, "a red cat", {"height": 64}, **run)
    assert call == {"prompt": "a red cat", "height": 64} and not is_swapped(empty.transformer)
    for wrong, words in (
        ({"schedule": Schedule(dense_layers=(99,))}, "99"),
        ({"guidance": HeadGuidance(((0, 99),))}, "head 99"),
    ):
        with pytest.raises(ValueError, match=words):
            check_run(empty, source, "a red cat", {}, **run | wrong)
        assert not is_swapped(empty.transformer)
    assert outline(Source("hub", "a/b", "a/b")) is None
    (tmp_path / "flux" / "transformer" / "config.json").write_text("{")
    assert outline(source) is None
