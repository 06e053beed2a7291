"""Which passes of a run are dense, for every pipeline class with a family and every scheduler.

One row is one run. ``flags`` is written by hand, a letter a pass of the transformer (one letter
for the conditional and unconditional call of a step): D dense, s sparse. The first 2 of the user's
``num_inference_steps`` are dense and the last 1, whatever the pipeline makes of that number.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import diffusers
import pytest
import tiny
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from tiny_pipelines import (
    AudioVae,
    Connectors,
    Features,
    ImageEncoder,
    family_of_pipeline,
    known_pipelines,
    pipeline,
    transformer,
)

import dittfast
from dittfast.methods.base import Method
from dittfast.pipelines.models import transformers_of
from dittfast.plan import Plan


@dataclass(frozen=True)
class Seen(Method):
    """Dense attention through a plan that is made at every sparse call, which is noted."""

    name: ClassVar[str] = "seen"
    needs_grid: ClassVar[bool] = False
    static: ClassVar[bool] = False

    flags: list = field(default_factory=list, hash=False, compare=False)

    def plan(self, layout, q=None, k=None, v=None, **_):
        self.flags[-1] = "s"
        weight = layout.kv_log_weight()
        return Plan.full(layout.num_tokens, block_size=64, kv_log_weight=weight)


def record(pipe, call: Callable, calls: int = 1, **options) -> str:
    """Run ``call`` with dittfast enabled on ``pipe``: a letter for each step's passes.

    Args:
        calls: passes of one step, which must agree.
    """
    method = Seen()
    models = {id(m): m for m in transformers_of(pipe).values()}
    hooks = [
        m.register_forward_pre_hook(lambda *_: method.flags.append("D")) for m in models.values()
    ]
    options = options or dict(dense_first_steps=2, dense_last_steps=1)
    try:
        with dittfast.enable(pipe, method, backend="reference", min_tokens=0, **options):
            call()
    finally:
        for hook in hooks:
            hook.remove()
    return collapsed(method.flags, calls)


def collapsed(flags: list, calls: int) -> str:
    steps = [set(flags[at : at + calls]) for at in range(0, len(flags), calls)]
    assert all(len(step) == 1 for step in steps), "".join(flags)
    return "".join(step.pop() for step in steps)


@dataclass(frozen=True)
class Row:
    """One run of one pipeline class.

    Attributes:
        pipeline: the class.
        flags: the passes, written by hand.
        call: arguments beside the family's own.
        scheduler: makes the scheduler.
        calls: passes of one step.
        config, channels, factor: of the tiny transformer, its latents and the autoencoder.
        attributes: set on the pipeline.
        parts: ``transformer -> other components``.
        options: of enable.
        quick: whether the row runs by default; the others are slow tests.
        note: tells rows of a class apart.
    """

    pipeline: str
    flags: str
    call: dict = field(default_factory=dict)
    scheduler: Callable = FlowMatchEulerDiscreteScheduler
    calls: int = 1
    config: dict = field(default_factory=dict)
    channels: int = 4
    factor: int = 8
    attributes: dict = field(default_factory=dict)
    parts: Callable[[torch.nn.Module], dict] = lambda transformer: {}
    quick: bool = False
    options: dict = field(default_factory=dict)
    note: str = ""

    @property
    def id(self) -> str:
        return "-".join(filter(None, [self.pipeline.removesuffix("Pipeline"), self.note]))


def text(width: int, length: int = 7) -> torch.Tensor:
    return torch.ones(1, length, width)


def mask(length: int = 7) -> torch.Tensor:
    return torch.ones(1, length, dtype=torch.long)


def picture(size: int = 64) -> torch.Tensor:
    return torch.zeros(1, 3, size, size)


def clip(frames: int = 9, size: int = 64) -> list:
    from PIL import Image

    return [Image.new("RGB", (size, size), (20 * i, 90, 50)) for i in range(frames)]


SIZE = dict(height=64, width=64, output_type="latent")
VIDEO = dict(**SIZE, num_frames=9)
FLUX = dict(**SIZE, prompt_embeds=text(32), pooled_prompt_embeds=torch.ones(1, 32))
NEGATIVE = dict(negative_prompt_embeds=text(32))
MASKED = dict(prompt_embeds=text(32), prompt_attention_mask=mask())
MASKED2 = dict(**MASKED, negative_prompt_embeds=text(32), negative_prompt_attention_mask=mask())
QWEN = dict(**SIZE, prompt_embeds=text(32), prompt_embeds_mask=mask())
SD3 = dict(**FLUX, negative_prompt_embeds=text(32), negative_pooled_prompt_embeds=torch.ones(1, 32))
WAN = dict(**VIDEO, prompt_embeds=text(32), **NEGATIVE)

# What the pipelines of a family are called with.
CALLS = {
    "FluxTransformer2DModel": FLUX,
    "Flux2Transformer2DModel": dict(**SIZE, prompt_embeds=text(32)),
    "ChromaTransformer2DModel": dict(
        **SIZE, prompt_embeds=text(32), prompt_attention_mask=mask().bool(), guidance_scale=1.0
    ),
    "SD3Transformer2DModel": SD3,
    "QwenImageTransformer2DModel": QWEN,
    "HunyuanImageTransformer2DModel": dict(
        **SIZE,
        prompt_embeds=text(32),
        prompt_embeds_mask=mask(),
        prompt_embeds_2=text(16, 5),
        prompt_embeds_mask_2=mask(5),
    ),
    "ZImageTransformer2DModel": dict(
        **SIZE, prompt_embeds=[torch.ones(7, 16)], negative_prompt_embeds=[torch.ones(7, 16)]
    ),
    "Lumina2Transformer2DModel": dict(**SIZE, **MASKED2),
    "AuraFlowTransformer2DModel": dict(**SIZE, **MASKED2),
    "CogView4Transformer2DModel": dict(
        **SIZE, prompt_embeds=text(32, 16), negative_prompt_embeds=text(32, 16)
    ),
    "HiDreamImageTransformer2DModel": dict(
        **SIZE,
        prompt_embeds_t5=text(16),
        prompt_embeds_llama3=torch.ones(2, 1, 7, 16),
        pooled_prompt_embeds=torch.ones(1, 16),
        guidance_scale=1.0,
    ),
    "PixArtTransformer2DModel": dict(
        **SIZE, **MASKED2, negative_prompt=None, use_resolution_binning=False
    ),
    "DiTTransformer2DModel": dict(class_labels=[1], output_type="np"),
    "PRXTransformer2DModel": dict(**SIZE, **MASKED2, use_resolution_binning=False),
    "WanTransformer3DModel": WAN,
    "WanVACETransformer3DModel": WAN,
    "SkyReelsV2Transformer3DModel": WAN,
    "CosmosTransformer3DModel": WAN,
    "HunyuanVideoTransformer3DModel": dict(
        **VIDEO, **MASKED, pooled_prompt_embeds=torch.ones(1, 16)
    ),
    "HunyuanVideo15Transformer3DModel": dict(
        **VIDEO,
        prompt_embeds=text(32),
        prompt_embeds_mask=mask(),
        prompt_embeds_2=text(16, 5),
        prompt_embeds_mask_2=mask(5),
    ),
    "MochiTransformer3DModel": dict(**VIDEO, **MASKED2),
    "CogVideoXTransformer3DModel": dict(**VIDEO, prompt_embeds=text(32), **NEGATIVE),
    "LTXVideoTransformer3DModel": dict(**VIDEO, **MASKED2),
    "LTX2VideoTransformer3DModel": dict(
        **VIDEO,
        **MASKED2,
        guidance_scale=1.0,
        stg_scale=0.0,
        modality_scale=1.0,
        audio_guidance_scale=1.0,
        audio_modality_scale=1.0,
    ),
    "Kandinsky5Transformer3DModel": dict(
        **VIDEO,
        prompt_embeds_qwen=text(32),
        prompt_embeds_clip=torch.ones(1, 16),
        prompt_cu_seqlens=torch.tensor([0, 7], dtype=torch.int32),
        negative_prompt_embeds_qwen=text(32),
        negative_prompt_embeds_clip=torch.ones(1, 16),
        negative_prompt_cu_seqlens=torch.tensor([0, 7], dtype=torch.int32),
    ),
    "AllegroTransformer3DModel": dict(**VIDEO, **MASKED2, negative_prompt=None),
    "LatteTransformer3DModel": dict(
        **SIZE, prompt_embeds=text(32), **NEGATIVE, negative_prompt=None, video_length=3
    ),
    "OvisImageTransformer2DModel": dict(
        **SIZE, prompt_embeds=text(32), **NEGATIVE, negative_prompt=None
    ),
    "BriaTransformer2DModel": dict(**SIZE, prompt_embeds=text(32), **NEGATIVE),
    "BriaFibo2Transformer2DModel": dict(
        **SIZE,
        prompt_embeds=torch.ones(1, 2, 7, 24),
        prompt_embeds_mask=mask().bool(),
        negative_prompt_embeds=torch.ones(1, 2, 7, 24),
        negative_prompt_embeds_mask=mask().bool(),
    ),
    "Krea2Transformer2DModel": dict(
        **SIZE,
        prompt_embeds=torch.ones(1, 7, 3, 24),
        prompt_embeds_mask=mask().bool(),
        negative_prompt_embeds=torch.ones(1, 7, 3, 24),
        negative_prompt_embeds_mask=mask().bool(),
    ),
    "ErnieImageTransformer2DModel": dict(
        **SIZE, prompt_embeds=[torch.ones(7, 24)], negative_prompt_embeds=[torch.ones(5, 24)]
    ),
    "CogView3PlusTransformer2DModel": dict(**SIZE, prompt_embeds=text(32), **NEGATIVE),
    "GlmImageTransformer2DModel": dict(
        **SIZE,
        prompt_embeds=text(32),
        **NEGATIVE,
        prior_token_ids=torch.zeros(1, 16, dtype=torch.long),
    ),
    "HunyuanDiT2DModel": dict(
        **SIZE,
        prompt_embeds=text(16),
        prompt_attention_mask=mask(),
        prompt_embeds_2=text(16, 5),
        prompt_attention_mask_2=mask(5),
        negative_prompt_embeds=text(16),
        negative_prompt_attention_mask=mask(),
        negative_prompt_embeds_2=text(16, 5),
        negative_prompt_attention_mask_2=mask(5),
        use_resolution_binning=False,
    ),
    "LuminaNextDiT2DModel": dict(**SIZE, **MASKED2),
    "NucleusMoEImageTransformer2DModel": dict(
        **QWEN, **NEGATIVE, negative_prompt_embeds_mask=mask()
    ),
    "JoyImageEditTransformer3DModel": dict(**QWEN, **NEGATIVE, negative_prompt_embeds_mask=mask()),
    "ChronoEditTransformer3DModel": dict(
        **SIZE,
        image=picture(),
        prompt_embeds=text(32, 512),
        negative_prompt_embeds=text(32, 512),
    ),
    "AnyFlowTransformer3DModel": dict(**VIDEO, prompt_embeds=text(32)),
    "EasyAnimateTransformer3DModel": dict(**VIDEO, **MASKED2),
    "MotifVideoTransformer3DModel": dict(**VIDEO, **MASKED),
    "HeliosTransformer3DModel": dict(WAN, num_frames=33),
    "Kandinsky6Transformer3DModel": dict(
        **VIDEO,
        prompt_embeds=text(32),
        pooled_prompt_embeds=torch.ones(1, 16),
        **NEGATIVE,
        negative_pooled_prompt_embeds=torch.ones(1, 16),
        sample_audio=False,
    ),
}

SIX, SIX_STEPS = "DDsssD", dict(num_inference_steps=6)
TEN_AT_SIX = dict(num_inference_steps=10, strength=0.6)
# The layer that these pipelines perturb cannot be sparse: its masks differ between queries.
PERTURBED = dict(dense_layers="transformer_blocks.1.*")
FILL = dict(image=picture(), mask_image=torch.ones(1, 1, 64, 64))


def karras(name: str, **options) -> Callable:
    return lambda: getattr(diffusers, name)(**options)


def second_expert(first) -> dict:
    return dict(transformer_2=copy.deepcopy(first), boundary_ratio=0.9)


def unguided(transformer) -> dict:
    return dict(guider=diffusers.ClassifierFreeGuidance(guidance_scale=1.0))


def control(name: str, **options) -> Callable:
    make = getattr(diffusers, name).from_transformer
    return lambda transformer: dict(controlnet=make(transformer, num_layers=1, **options).eval())


def reads_text(transformer) -> dict:
    return dict(text_encoder=tiny.t5_encoder(), tokenizer=tiny.tokenizer("t5"))


def sees_images(transformer) -> dict:
    return dict(image_processor=Features(), image_encoder=ImageEncoder())


def ltx2(transformer) -> dict:
    return dict(connectors=Connectors(), audio_vae=AudioVae())


HEADS = dict(attention_head_dim=16, num_attention_heads=2)
FLUX_CONTROL = dict(num_single_layers=1, **HEADS)


def flow_unipc():
    return UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )


def row(name: str, flags: str = SIX, **fields) -> Row:
    fields["call"] = {**SIX_STEPS, **fields.get("call", {})}
    return Row(name, flags, **fields)


def dit(flags: str = SIX, **fields) -> Row:
    return row(
        "DiTPipeline", flags, config=dict(num_embeds_ada_norm=1000, out_channels=4), **fields
    )


ROWS = [
    # Images.
    row("FluxPipeline", quick=True),
    row("FluxImg2ImgPipeline", call=dict(TEN_AT_SIX, image=picture()), quick=True),
    row("FluxInpaintPipeline", call=dict(TEN_AT_SIX, **FILL)),
    row(
        "FluxControlPipeline",
        call=dict(control_image=picture()),
        config=dict(in_channels=32, out_channels=16),
    ),
    row(
        "FluxControlImg2ImgPipeline",
        call=dict(TEN_AT_SIX, image=picture(), control_image=picture()),
        config=dict(in_channels=32, out_channels=16),
    ),
    row(
        "FluxControlInpaintPipeline",
        call=dict(TEN_AT_SIX, control_image=picture(), **FILL),
        config=dict(in_channels=32, out_channels=16),
    ),
    row(
        "FluxControlNetPipeline",
        call=dict(control_image=picture()),
        parts=control("FluxControlNetModel", **FLUX_CONTROL),
    ),
    row(
        "FluxControlNetImg2ImgPipeline",
        call=dict(TEN_AT_SIX, image=picture(), control_image=picture()),
        parts=control("FluxControlNetModel", **FLUX_CONTROL),
    ),
    row(
        "FluxControlNetInpaintPipeline",
        call=dict(TEN_AT_SIX, control_image=picture(), **FILL),
        parts=control("FluxControlNetModel", **FLUX_CONTROL),
    ),
    row(
        "FluxFillPipeline",
        call=dict(TEN_AT_SIX, **FILL),
        config=dict(in_channels=288, out_channels=16),
    ),
    row("FluxKontextPipeline", call=dict(image=picture(), max_area=64 * 64, _auto_resize=False)),
    row(
        "FluxKontextInpaintPipeline",
        call=dict(TEN_AT_SIX, max_area=64 * 64, _auto_resize=False, **FILL),
    ),
    row("Flux2Pipeline"),
    row("Flux2KleinPipeline", call=dict(NEGATIVE), calls=2),
    row("Flux2KleinInpaintPipeline", call=dict(TEN_AT_SIX, **FILL, **NEGATIVE), calls=2),
    row("Flux2KleinKVPipeline"),
    row("ChromaPipeline"),
    row("ChromaImg2ImgPipeline", call=dict(TEN_AT_SIX, image=picture())),
    row("StableDiffusion3Pipeline", quick=True),
    row(
        "StableDiffusion3Pipeline",
        "DDDDssssssD",
        scheduler=FlowMatchHeunDiscreteScheduler,
        note="heun",
        quick=True,
    ),
    row(
        "StableDiffusion3Img2ImgPipeline",
        "DDDDssssssD",
        scheduler=FlowMatchHeunDiscreteScheduler,
        call=dict(TEN_AT_SIX, image=picture()),
        note="heun",
    ),
    row("StableDiffusion3Img2ImgPipeline", call=dict(TEN_AT_SIX, image=picture())),
    row(
        "StableDiffusion3InpaintPipeline",
        call=dict(TEN_AT_SIX, **FILL),
        channels=16,
        config=dict(in_channels=16, out_channels=16),
    ),
    row("StableDiffusion3PAGPipeline", options=PERTURBED),
    row(
        "StableDiffusion3PAGImg2ImgPipeline",
        options=PERTURBED,
        call=dict(TEN_AT_SIX, image=picture()),
    ),
    row(
        "StableDiffusion3ControlNetPipeline",
        call=dict(control_image=picture()),
        parts=control("SD3ControlNetModel", num_extra_conditioning_channels=0),
    ),
    row(
        "StableDiffusion3ControlNetInpaintingPipeline",
        call=dict(control_image=picture(), control_mask=torch.ones(1, 1, 64, 64)),
        parts=control("SD3ControlNetModel"),
    ),
    row(
        "QwenImageControlNetPipeline",
        call=dict(control_image=picture()),
        parts=control("QwenImageControlNetModel", **HEADS),
    ),
    row(
        "QwenImageControlNetInpaintPipeline",
        call=dict(control_image=picture(), control_mask=torch.ones(1, 1, 64, 64)),
        parts=control("QwenImageControlNetModel", extra_condition_channels=4, **HEADS),
    ),
    row("QwenImagePipeline"),
    row("QwenImageImg2ImgPipeline", call=dict(TEN_AT_SIX, image=picture())),
    row("QwenImageInpaintPipeline", call=dict(TEN_AT_SIX, **FILL)),
    row(
        "QwenImageEditPipeline",
        factor=64,
        call=dict(image=clip(1, 1024)[0], height=1024, width=1024),
    ),
    row(
        "QwenImageEditPlusPipeline",
        factor=64,
        call=dict(image=clip(1, 1024)[0], height=1024, width=1024),
    ),
    row(
        "QwenImageEditInpaintPipeline",
        factor=64,
        call=dict(
            TEN_AT_SIX,
            image=clip(1, 1024)[0],
            height=1024,
            width=1024,
            mask_image=torch.ones(1, 1, 1024, 1024),
        ),
    ),
    row(
        "QwenImageLayeredPipeline",
        factor=64,
        parts=reads_text,
        call=dict(image=clip(1, 1024)[0], prompt="a red cat", output_type="np"),
    ),
    row("HunyuanImagePipeline"),
    row(
        "HunyuanImageRefinerPipeline",
        call=dict(image=picture()),
        config=dict(in_channels=16, out_channels=8, patch_size=(1, 1, 1), rope_axes_dim=(4, 4, 8)),
    ),
    row("ZImagePipeline", quick=True),
    row("ZImageImg2ImgPipeline", call=dict(TEN_AT_SIX, image=picture())),
    row("ZImageInpaintPipeline", call=dict(TEN_AT_SIX, **FILL)),
    row("Lumina2Pipeline", calls=2),
    row("AuraFlowPipeline"),
    row("CogView4Pipeline", calls=2),
    row(
        "CogView4ControlPipeline",
        calls=2,
        call=dict(control_image=picture()),
        config=dict(in_channels=8),
    ),
    row("HiDreamImagePipeline", attributes=dict(default_sample_size=8)),
    row("PixArtAlphaPipeline", scheduler=karras("DPMSolverMultistepScheduler")),
    row("PixArtSigmaPipeline", scheduler=karras("DPMSolverMultistepScheduler")),
    row("PixArtSigmaPAGPipeline", scheduler=karras("DPMSolverMultistepScheduler")),
    row("PRXPipeline"),
    row("PRXPixelPipeline", config=dict(in_channels=3)),
    row("OvisImagePipeline", calls=2, config=dict(out_channels=16)),
    row("BriaPipeline"),
    row("BriaFibo2Pipeline", calls=2),
    row("Krea2Pipeline", calls=2),
    row("ErnieImagePipeline"),
    row("CogView3PlusPipeline", scheduler=karras("CogVideoXDDIMScheduler")),
    row("GlmImagePipeline", calls=2),
    row(
        "HunyuanDiTPipeline",
        scheduler=karras("DDPMScheduler"),
        parts=lambda transformer: dict(feature_extractor=Features()),
    ),
    row("LuminaPipeline"),
    row("NucleusMoEImagePipeline", calls=2),
    row("JoyImageEditPipeline", calls=2),
    # Videos.
    row("ChronoEditPipeline", calls=2, parts=sees_images, config=dict(in_channels=12)),
    row("AnyFlowPipeline", scheduler=karras("FlowMapEulerDiscreteScheduler")),
    row("EasyAnimatePipeline"),
    row("MotifVideoPipeline", parts=unguided, config=dict(in_channels=9)),
    row("HeliosPipeline", calls=2, scheduler=karras("HeliosScheduler", stages=1)),
    row("Kandinsky6TI2VAPipeline", calls=2),
    row("WanPipeline", calls=2, channels=16, quick=True),
    row(
        "WanImageToVideoPipeline", calls=2, call=dict(image=picture()), config=dict(in_channels=12)
    ),
    row(
        "WanImageToVideoPipeline",
        calls=2,
        config=dict(in_channels=12),
        call=dict(image=picture()),
        parts=second_expert,
        note="two-experts",
        quick=True,
    ),
    row(
        "WanVideoToVideoPipeline",
        calls=2,
        scheduler=flow_unipc,
        call=dict(num_frames=..., video=clip(), **TEN_AT_SIX),
        quick=True,
    ),
    row("LucyEditPipeline", calls=2, call=dict(video=clip()), config=dict(in_channels=8)),
    row("WanVACEPipeline", calls=2, config=dict(vace_in_channels=72)),
    row("SkyReelsV2Pipeline", calls=2, scheduler=flow_unipc),
    row(
        "SkyReelsV2ImageToVideoPipeline",
        calls=2,
        scheduler=flow_unipc,
        parts=sees_images,
        call=dict(
            image=picture(), prompt_embeds=text(32, 512), negative_prompt_embeds=text(32, 512)
        ),
        config=dict(in_channels=12, image_dim=32, added_kv_proj_dim=32),
    ),
    row(
        "SkyReelsV2DiffusionForcingPipeline",
        calls=2,
        scheduler=flow_unipc,
        call=dict(base_num_frames=9),
        quick=True,
    ),
    row(
        "SkyReelsV2DiffusionForcingPipeline",
        "DDsssssssD",
        calls=2,
        scheduler=flow_unipc,
        call=dict(base_num_frames=9, ar_step=2),
        note="async",
        quick=True,
    ),
    # Two windows of a long video are two runs.
    row(
        "SkyReelsV2DiffusionForcingPipeline",
        SIX + SIX,
        calls=2,
        scheduler=flow_unipc,
        call=dict(num_frames=17, base_num_frames=9, overlap_history=1),
        note="long",
    ),
    row(
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        calls=2,
        scheduler=flow_unipc,
        call=dict(image=picture()),
    ),
    row(
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        calls=2,
        scheduler=flow_unipc,
        call=dict(video=clip(), num_frames=17, base_num_frames=17, overlap_history=5),
    ),
    row("Cosmos2TextToImagePipeline", calls=2),
    row(
        "Cosmos2VideoToWorldPipeline",
        calls=2,
        call=dict(image=picture()),
        config=dict(in_channels=5),
    ),
    row("CosmosTextToWorldPipeline", calls=2, scheduler=karras("EDMEulerScheduler")),
    row(
        "CosmosVideoToWorldPipeline",
        calls=2,
        scheduler=karras("EDMEulerScheduler"),
        call=dict(image=picture()),
        config=dict(in_channels=5),
    ),
    row("Cosmos2_5_PredictBasePipeline", calls=2, scheduler=flow_unipc, config=dict(in_channels=5)),
    row("HunyuanVideoPipeline"),
    row(
        "HunyuanVideoImageToVideoPipeline",
        call=dict(image=picture()),
        config=dict(image_condition_type="token_replace"),
    ),
    row(
        "HunyuanSkyreelsImageToVideoPipeline",
        call=dict(image=picture()),
        config=dict(in_channels=8),
    ),
    row("HunyuanVideo15Pipeline", parts=unguided, config=dict(in_channels=9)),
    row("MochiPipeline"),
    row("CogVideoXPipeline", scheduler=karras("CogVideoXDPMScheduler"), quick=True),
    row(
        "CogVideoXImageToVideoPipeline",
        scheduler=karras("CogVideoXDPMScheduler"),
        call=dict(image=picture()),
        config=dict(in_channels=8),
    ),
    row(
        "CogVideoXVideoToVideoPipeline",
        scheduler=karras("CogVideoXDDIMScheduler"),
        call=dict(TEN_AT_SIX, video=clip()),
        quick=True,
    ),
    row(
        "CogVideoXFunControlPipeline",
        scheduler=karras("DDIMScheduler"),
        call=dict(control_video=clip()),
        config=dict(in_channels=8),
    ),
    row("LTXPipeline", channels=8),
    row("LTXImageToVideoPipeline", channels=8, call=dict(image=picture())),
    row(
        "LTXConditionPipeline",
        channels=8,
        call=dict(num_inference_steps=10, denoise_strength=0.6, video=clip()),
    ),
    # This pipeline leaves out the last of the steps it is asked for.
    row(
        "LTXI2VLongMultiPromptPipeline",
        "DDsss",
        channels=8,
        parts=reads_text,
        call=dict(prompt="a red cat"),
    ),
    row("LTX2Pipeline", calls=2, channels=8, parts=ltx2),
    row(
        "LTX2ImageToVideoPipeline",
        channels=8,
        calls=2,
        parts=ltx2,
        call=dict(image=picture(), image_crf=0),
    ),
    row("LTX2ConditionPipeline", calls=2, channels=8, parts=ltx2),
    row("LTX2InContextPipeline", calls=2, channels=8, parts=ltx2),
    row("LTX2HDRPipeline", channels=8, parts=ltx2),
    row("Kandinsky5T2VPipeline", calls=2),
    row("Kandinsky5T2IPipeline", calls=2, attributes=dict(resolutions=[(64, 64)])),
    row("Kandinsky5I2VPipeline", calls=2, call=dict(image=picture())),
    row(
        "Kandinsky5I2IPipeline",
        calls=2,
        attributes=dict(resolutions=[(64, 64)]),
        call=dict(image=clip(1)[0]),
        config=dict(visual_cond=True),
    ),
    row("AllegroPipeline", scheduler=karras("DDIMScheduler")),
    row("LattePipeline", scheduler=karras("DDIMScheduler"), config=dict(out_channels=8)),
    # Every kind of scheduler, in the pipelines that take them.
    dit(scheduler=karras("DDIMScheduler"), note="ddim", quick=True),
    dit(scheduler=karras("DDPMScheduler"), note="ddpm"),
    # PNDM's second call goes back to the first step and corrects it.
    dit("DDDsssD", scheduler=karras("PNDMScheduler", skip_prk_steps=True), note="plms", quick=True),
    # Its Runge-Kutta start takes four calls in each of the first three steps.
    dit("DDDDDDDDssssssD", scheduler=karras("PNDMScheduler"), note="prk", quick=True),
    dit("DDDDssssssD", scheduler=karras("HeunDiscreteScheduler"), note="heun", quick=True),
    dit("DDDDssssssD", scheduler=karras("KDPM2DiscreteScheduler"), note="kdpm2"),
    dit("DDDDssssssD", scheduler=karras("KDPM2AncestralDiscreteScheduler"), note="kdpm2-a"),
    *(
        dit(scheduler=karras(f"{name}Scheduler"), note=name)
        for name in (
            "DPMSolverMultistep",
            "DPMSolverSinglestep",
            "UniPCMultistep",
            "DEISMultistep",
            "EulerDiscrete",
            "EulerAncestralDiscrete",
            "LMSDiscrete",
            "LCM",
            "TCD",
            "IPNDM",
            "SASolver",
        )
    ),
]


def dense_and_sparse(row: Row) -> str:
    family = family_of_pipeline(getattr(diffusers, row.pipeline))
    model = transformer(family, **row.config)
    parts = {"transformer": model, "scheduler": row.scheduler(), **row.parts(model)}
    pipe = pipeline(row.pipeline, row.channels, row.factor, **parts)
    for name, value in row.attributes.items():
        setattr(pipe, name, value)
    taken = inspect.signature(type(pipe).__call__).parameters
    call = {**CALLS[family], **row.call}
    call = {name: x for name, x in call.items() if name in taken and x is not ...}
    if "prompt" in taken:
        call.setdefault("prompt", None)
    options = dict(dense_first_steps=2, dense_last_steps=1, **row.options)
    return record(pipe, lambda: pipe(**call), row.calls, **options)


# Classes without a row, and why. Their loops are those of a class that has one.
UNBUILT = {
    "BriaFiboEditPipeline": "takes no prompt embeddings; the loop of BriaFibo",
    "BriaFiboPipeline": "takes no prompt embeddings; a batch of two, as in Bria",
    "ChromaInpaintPipeline": "asks its transformer for guidance_embeds, which Chroma's has not",
    "Cosmos2_5_TransferPipeline": "needs a controlnet; the loop of Cosmos2_5_PredictBase",
    "Cosmos3OmniPipeline": "takes no prompt embeddings; two calls of one loop, as in Wan",
    "EasyAnimateControlPipeline": "more channels; the loop of EasyAnimate",
    "EasyAnimateInpaintPipeline": "more channels; the loop of EasyAnimate",
    "HeliosPyramidPipeline": "grows its latents in stages, each of which is a run of its own",
    "HunyuanDiTControlNetPipeline": "needs a controlnet; the loop of HunyuanDiT",
    "HunyuanDiTPAGPipeline": "the loop of HunyuanDiT",
    "HunyuanVideoFramepackPipeline": "needs a vision tower; each section is a run of its own",
    "Ideogram4Pipeline": "takes no prompt embeddings; two transformers, one loop",
    "JoyImageEditPlusPipeline": "needs reference images; the loop of JoyImageEdit",
    "LongCatImageEditPipeline": "needs a vision tower; the loop of OvisImage",
    "LongCatImagePipeline": "fails with prompt embeddings; the loop of OvisImage",
    "MotifVideoImage2VideoPipeline": "needs a vision tower; the loop of MotifVideo",
    "QwenImage21Pipeline": "needs a vision tower's processor; the loop of QwenImage",
    "OmniGenPipeline": "takes no prompt embeddings; a batch of two or three in one loop",
    "WanAnimatePipeline": "needs a vision tower; each segment is a run of its own",
    "HunyuanVideo15ImageToVideoPipeline": "needs a vision tower; the loop of HunyuanVideo15",
    "LTX2DFRPipeline": "needs keyframe embeddings and a second stage with fixed sigmas",
    "LTX2DFRTemporalRefinePipeline": "refines what LTX2DFR made",
    "VisualClozeGenerationPipeline": "needs text encoders for grids of tasks; the loop of Flux",
    "VisualClozePipeline": "VisualClozeGeneration and FluxFill, one after the other",
    "ZImageControlNetInpaintPipeline": "needs a controlnet; the loop of ZImage",
    "ZImageControlNetPipeline": "needs a controlnet; the loop of ZImage",
    "ZImageOmniPipeline": "refused: several images and captions in one sequence",
}


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(x, id=x.id, marks=() if x.quick else pytest.mark.slow)
        for x in ROWS
        if x.pipeline in dir(diffusers)  # older versions have fewer
    ],
)
def test_dense_first_and_last_steps(row):
    assert dense_and_sparse(row) == row.flags


def test_a_method_that_never_runs_is_told_in_the_users_steps(caplog):
    """Three steps of a second-order scheduler are five calls, all of them dense."""
    steps = dit(
        "DDDDD", scheduler=karras("HeunDiscreteScheduler"), call=dict(num_inference_steps=3)
    )
    assert dense_and_sparse(steps) == steps.flags
    assert [r.message for r in caplog.records if "leave none of 3 steps to seen" in r.message]


@pytest.mark.slow
def test_every_pipeline_with_a_family_has_a_row():
    known, rows = set(known_pipelines()), {row.pipeline for row in ROWS}
    assert not known - rows - set(UNBUILT)
    assert not rows & set(UNBUILT) and not set(UNBUILT) - known
