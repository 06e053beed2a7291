"""LoRA files in the layouts that people have: kohya's, ComfyUI's and lightx2v's, alone and sparse.

The oracle is the same model with ``up @ down`` added to its weights by hand.
"""

import copy

import hub
import pytest
import tiny
import torch
from patterns import Band
from safetensors.torch import save_file

import dittfast
from dittfast.pipelines.measure import parity
from dittfast.pipelines.measure.parity import TINY, Full, distance

pytestmark = pytest.mark.filterwarnings("ignore")
LAYOUTS = {
    "flux-kohya": ("FluxPipeline", hub.flux_kohya),
    "wan-comfyui": ("WanPipeline", hub.wan_comfyui),
    "wan-lightx2v": ("WanPipeline", hub.wan_lightx2v),
    "wan-kohya": ("WanPipeline", hub.wan_kohya),
    "qwen-kohya": ("QwenImagePipeline", hub.qwen_kohya),
    "qwen-lightx2v": ("QwenImagePipeline", hub.qwen_lightx2v),
}
INPUTS = {
    "FluxPipeline": tiny.flux_inputs,
    "WanPipeline": tiny.wan_inputs,
    "QwenImagePipeline": lambda: TINY["qwen-image"].build()[1],
}


def merged(model, added):
    """The model with the LoRA folded in by hand."""
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, delta in added.items():
            parameters[name].add_(delta)
    return model


# By default one of each kind: fused q, k, v with alphas, and biases.
QUICK = ("flux-kohya", "wan-lightx2v")


@pytest.mark.parametrize(
    "layout", [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in LAYOUTS]
)
def test_a_lora_file_is_the_sum_it_stands_for(layout, tmp_path):
    import diffusers

    name, write = LAYOUTS[layout]
    pipe = hub.build(getattr(diffusers, name), "tiny")
    file, added = write(pipe.transformer)
    save_file({k: v.contiguous() for k, v in file.items()}, tmp_path / "some.safetensors")
    inputs = INPUTS[name]()
    expected = merged(pipe.transformer, added)
    plain = parity.output(pipe.transformer, inputs)
    pipe.load_lora_weights(str(tmp_path / "some.safetensors"))
    dense = parity.output(expected, inputs)
    assert distance(parity.output(pipe.transformer, inputs), dense) < 2e-5
    assert distance(dense, plain) > 1e-3
    with dittfast.enable(pipe, Full(), min_tokens=0):
        assert distance(parity.output(pipe.transformer, inputs), dense) < 2e-5
    with dittfast.enable(expected, Band(), backend="reference", min_tokens=0):
        sparse = parity.output(expected, inputs)
    assert distance(sparse, dense) > 1e-3
    with dittfast.enable(pipe, Band(), backend="cpu", min_tokens=0):
        assert distance(parity.output(pipe.transformer, inputs), sparse) < 2e-5
        pipe.unload_lora_weights()
    assert torch.equal(parity.output(pipe.transformer, inputs), plain)


@pytest.mark.slow
def test_each_expert_has_its_own_lora(tmp_path):
    pipe = tiny.wan_pipeline(two_experts=True)
    before = [parity.output(m, tiny.wan_inputs()) for m in (pipe.transformer, pipe.transformer_2)]
    file, added = hub.wan_comfyui(pipe.transformer_2)
    save_file(file, tmp_path / "low.safetensors")
    expected = parity.output(merged(pipe.transformer_2, added), tiny.wan_inputs())
    pipe.load_lora_weights(
        str(tmp_path / "low.safetensors"), adapter_name="low", load_into_transformer_2=True
    )
    with dittfast.enable(pipe, Full(), min_tokens=0):
        first, second = (
            parity.output(m, tiny.wan_inputs()) for m in (pipe.transformer, pipe.transformer_2)
        )
    assert distance(first, before[0]) < 2e-5
    assert distance(second, expected) < 2e-5 < 1e-3 < distance(second, before[1])


def loaded(folder, file, tmp_path):
    """The model of a folder with a LoRA in it, as the command line puts it in."""
    from dittfast.pipelines.runs.loading import Loading, Lora, load_with
    from dittfast.pipelines.runs.sources import find

    save_file({k: v.contiguous() for k, v in file.items()}, tmp_path / "some.safetensors")
    how = Loading((Lora(str(tmp_path / "some.safetensors")),))
    return load_with(find(str(folder)), "cpu", torch.float32, how).transformer


def test_what_diffusers_leaves_of_a_lora_is_said_and_what_it_leaves_empty_is_nothing(
    tmp_path, caplog
):
    """Biases of some layers alone, and trained norms, as distilled Wan LoRAs have them."""
    pipe = tiny.wan_pipeline()
    pipe.save_pretrained(tmp_path / "wan")
    file, added = hub.wan_lightx2v(pipe.transformer)
    last = f"blocks.{len(pipe.transformer.blocks) - 1}."
    file = {k: v for k, v in file.items() if not (last in k and k.endswith(".diff_b"))}
    added = {k: v for k, v in added.items() if not (last in k and k.endswith(".bias"))}
    expected = parity.output(merged(pipe.transformer, added), tiny.wan_inputs())
    model = loaded(tmp_path / "wan", file, tmp_path)
    assert distance(parity.output(model, tiny.wan_inputs()), expected) < 2e-5
    assert "leaves out" not in caplog.text  # the norms in it are zeros
    norm = "diffusion_model.blocks.0.self_attn.norm_q.diff"
    model = loaded(tmp_path / "wan", file | {norm: torch.ones_like(file[norm])}, tmp_path)
    assert distance(parity.output(model, tiny.wan_inputs()), expected) < 2e-5
    assert f"leaves out 1 whole weights that it changes ({norm} ...)" in caplog.text
