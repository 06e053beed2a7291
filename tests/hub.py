"""Stand-ins for what documents load: the hub's pipelines at tiny size, LoRA files of each layout.

Classes are diffusers' own. Calls are made small, so that a program runs as it stands in a document.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace

import tiny
import torch
from PIL import Image
from tiny_pipelines import pipeline, transformer

import dittfast

SMALL_VIDEO = dict(height=48, width=80, num_frames=9)
_VIDEO_LATENTS = dict(height=64, width=64, num_frames=9, output_type="latent")
# Pipelines without text encoders: what their prompt is exchanged for.
EMBEDDED = {
    "HunyuanVideoPipeline": dict(
        _VIDEO_LATENTS,
        prompt_embeds=torch.ones(1, 7, 32),
        prompt_attention_mask=torch.ones(1, 7, dtype=torch.long),
        pooled_prompt_embeds=torch.ones(1, 16),
    ),
    "QwenImagePipeline": dict(
        height=64,
        width=64,
        output_type="latent",
        prompt_embeds=torch.ones(1, 7, 32),
        prompt_embeds_mask=torch.ones(1, 7, dtype=torch.long),
    ),
}
SMALL = {
    "FluxPipeline": dict(height=64, width=96, max_sequence_length=12),
    "FluxImg2ImgPipeline": dict(height=128, width=192, max_sequence_length=12),
    "WanPipeline": dict(SMALL_VIDEO, max_sequence_length=12),
    "WanImageToVideoPipeline": dict(SMALL_VIDEO, max_sequence_length=12),
    **EMBEDDED,
}
_FAMILY = {
    "HunyuanVideoPipeline": "HunyuanVideoTransformer3DModel",
    "QwenImagePipeline": "QwenImageTransformer2DModel",
}
FLUX = dict(double=2, single=11, heads=4)  # as many layers and heads as documents name
WAN_LAYERS = 3  # one more than any preset keeps dense
MOST_STEPS = 13  # one more than any preset keeps dense


def build(cls, name):
    """A tiny pipeline of a class, as for a name on the hub."""
    if cls.__name__ in _FAMILY:
        from diffusers import FlowMatchEulerDiscreteScheduler

        torch.manual_seed(0)
        model = transformer(_FAMILY[cls.__name__])
        return pipeline(
            cls.__name__, transformer=model, scheduler=FlowMatchEulerDiscreteScheduler()
        )
    if cls.__name__ == "FluxPipeline":
        return tiny.flux_pipeline(**FLUX)
    if cls.__name__ == "WanPipeline":
        pipe = tiny.wan_pipeline(two_experts="Wan2.2" in str(name))
    else:
        pipe = tiny.wan_image_pipeline()
    for component in ("transformer", "transformer_2"):
        model = getattr(pipe, component, None)
        if model is not None:
            deep = tiny.wan_transformer(WAN_LAYERS, model.config.in_channels)
            pipe.register_modules(**{component: deep})
    return pipe


class Ran(list):
    """What ``describe`` said after every call of a pipeline that dittfast was enabled on."""


def stand_in(monkeypatch) -> Ran:
    """Make ``from_pretrained`` and calls of pipelines small, and every method run at any size."""
    import diffusers

    ran = Ran()
    real_load = diffusers.DiffusionPipeline.from_pretrained.__func__

    def load(cls, name, **options):
        if Path(str(name)).is_dir():
            return real_load(cls, name, **options)
        return build(cls, name)

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", classmethod(load))
    monkeypatch.setattr(diffusers.DiffusionPipeline, "to", lambda self, *where, **_: self)
    offload = diffusers.DiffusionPipeline.enable_model_cpu_offload
    monkeypatch.setattr(
        diffusers.DiffusionPipeline,
        "enable_model_cpu_offload",
        lambda self, **where: offload(self, **{"device": "cpu"} | where),
    )
    enable = dittfast.enable
    monkeypatch.setitem(
        vars(dittfast), "enable", lambda *a, **options: enable(*a, **{"min_tokens": 0} | options)
    )
    for name, small in SMALL.items():
        cls = getattr(diffusers, name)
        monkeypatch.setattr(cls, "__call__", _small(cls.__call__, name, small, ran))
    return ran


def _small(call, name: str, small: dict, ran: Ran):
    def called(self, *args, **options):
        prompt = {"QwenImagePipeline": ("prompt", "negative_prompt", "true_cfg_scale")}
        if name in EMBEDDED:
            args, options = (
                (),
                {k: v for k, v in options.items() if k not in prompt.get(name, ("prompt",))},
            )
        steps = min(options.get("num_inference_steps", 3), MOST_STEPS)
        out = call(self, *args, **options | small | {"num_inference_steps": steps})
        with contextlib.suppress(ValueError):  # not enabled
            ran.append(dittfast.describe(self))
        if name in EMBEDDED:  # latents: no VAE to draw with
            pictures = [Image.new("RGB", (64, 64), (20 * n, 90, 50)) for n in range(9)]
            return SimpleNamespace(images=pictures[:1], frames=[pictures])
        return out

    # Whoever asks for the arguments of a call gets those of the real one.
    called.__wrapped__ = call
    return called


def low_rank(shape, seed: int = 0, rank: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """``down [rank, in]`` and ``up [out, rank]`` for a weight ``[out, in]``."""
    draw = torch.Generator().manual_seed(seed)
    out, into = shape
    return (
        torch.randn(rank, into, generator=draw),
        0.1 * torch.randn(out, rank, generator=draw),
    )


def flux_kohya(model) -> tuple[dict, dict]:
    """(the file, parameter -> what it adds) in the layout of kohya's sd-scripts: one q, k, v."""
    file, added = {}, {}
    for number, block in enumerate(model.transformer_blocks):
        width = block.attn.to_q.weight.shape[0]
        down, up = low_rank((3 * width, width), number)
        name = f"lora_unet_double_blocks_{number}_img_attn_qkv"
        file |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(1.0),
        }
        for part, rows in zip("qkv", (up @ down / 2).split(width)):
            added[f"transformer_blocks.{number}.attn.to_{part}.weight"] = rows
    return file, added


# Layers of a block of Wan: as the original code calls them, and as diffusers does.
_WAN_LAYERS = {
    **{
        f"{theirs}.{part}": f"{ours}.{name}"
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for part, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
    },
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}


def _wan(model, name: str, down: str, up: str, extra: str = "") -> tuple[dict, dict]:
    """Args: ``extra`` is "alpha", "bias" or nothing."""
    file, added = {}, {}
    for number, block in enumerate(model.blocks):
        for seed, (theirs, ours) in enumerate(_WAN_LAYERS.items()):
            weight = block.get_submodule(ours).weight
            a, b = low_rank(weight.shape, 100 * number + seed)
            layer = f"blocks.{number}.{theirs}"
            key = name.format(layer if "." in name else layer.replace(".", "_"))
            file |= {f"{key}.{down}.weight": a, f"{key}.{up}.weight": b}
            if extra == "alpha":
                file[f"{key}.alpha"] = torch.tensor(1.0)
            added[f"blocks.{number}.{ours}.weight"] = b @ a / (2 if extra == "alpha" else 1)
            if extra == "bias":
                file[f"{key}.diff_b"] = added[f"blocks.{number}.{ours}.bias"] = 0.1 * b[:, 0]
    return file, added


def wan_comfyui(model):
    """As ComfyUI names Wan's layers."""
    return _wan(model, "diffusion_model.{}", "lora_A", "lora_B")


def wan_lightx2v(model):
    """As lightx2v writes them: down and up, with biases, and norms that diffusers leaves out."""
    file, added = _wan(model, "diffusion_model.{}", "lora_down", "lora_up", "bias")
    for number, block in enumerate(model.blocks):
        zeros = torch.zeros_like(block.attn1.norm_q.weight)
        file[f"diffusion_model.blocks.{number}.self_attn.norm_q.diff"] = zeros
    return file, added


def wan_kohya(model):
    """As kohya's musubi-tuner writes them."""
    return _wan(model, "lora_unet_{}", "lora_down", "lora_up", "alpha")


def _qwen(model, name: str) -> tuple[dict, dict]:
    file, added = {}, {}
    for number, block in enumerate(model.transformer_blocks):
        for seed, part in enumerate(("to_q", "to_k", "to_v")):
            a, b = low_rank(block.attn.get_submodule(part).weight.shape, 10 * number + seed)
            key = name.format(number=number, part=part)
            file |= {
                f"{key}.lora_down.weight": a,
                f"{key}.lora_up.weight": b,
                f"{key}.alpha": torch.tensor(1.0),
            }
            added[f"transformer_blocks.{number}.attn.{part}.weight"] = b @ a / 2
    return file, added


def qwen_kohya(model):
    """As kohya's musubi-tuner writes them."""
    return _qwen(model, "lora_unet_transformer_blocks_{number}_attn_{part}")


def qwen_lightx2v(model):
    """As lightx2v's few-step LoRAs have them."""
    return _qwen(model, "transformer_blocks.{number}.attn.{part}")


def write_loras(folder: Path) -> None:
    """The files that recipes name, for the tiny models."""
    from safetensors.torch import save_file

    flux = tiny.flux_transformer(**FLUX)
    wan = tiny.wan_transformer(WAN_LAYERS)
    qwen = transformer("QwenImageTransformer2DModel")
    files = {
        "style": flux_kohya(flux),
        "lightx2v": wan_lightx2v(wan),
        "high": wan_comfyui(wan),
        "low": wan_comfyui(wan),
        "qwen": qwen_kohya(qwen),
    }
    for name, (file, _) in files.items():
        save_file({k: v.contiguous() for k, v in file.items()}, folder / f"{name}.safetensors")
