"""Model families: which modules are self-attention, and where the tokens sit.

A family is one entry of :data:`FAMILIES` and one short reader from the arguments of the
transformer's ``forward`` to a :class:`~dittfast.layout.Layout`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dittfast.layout import Layout

from . import image, video
from .sequences import Sequences


@dataclass(frozen=True)
class Family:
    """How one transformer class is read.

    Attributes:
        layers: regular expression over module names; full matches are the self-attention layers
            whose sequence the reader describes. Text refiners and cross-attention do not match.
        read: ``(model, arguments of its forward by name) -> Layout``, or Sequences where batch
            rows or layers differ.
        reads_values: names of tensor arguments whose values (not only shapes) ``read`` looks at,
            where they are given.
        strict: whether every selected layer must meet the layout's sequence; False where layers
            may be skipped, or where the user described an unknown model, whose other layers then
            stay dense.
        dense: ``(regular expression over module names, why)`` of other attention that stays dense.
        outer_mask: whether the model turns a mask m over keys into an N x N mask m mᵀ. All
            tokens of a grid are valid.
        latents: the argument with the latents: a tensor ``[B, ...]``, or a list of B tensors.
        cond_first: whether the pipeline's batch for classifier-free guidance is [conditional,
            unconditional] (most are the other way around).
        heads: the attribute of an attention module that holds its number of heads.
        timestep: the argument with the timestep.
        time_rises: whether that grows over the steps (most count down).
    """

    layers: str
    read: Callable[[torch.nn.Module, dict], Layout | Sequences]
    reads_values: tuple[str, ...] = ()
    strict: bool = True
    dense: tuple[tuple[str, str], ...] = ()
    outer_mask: bool = False
    latents: str = "hidden_states"
    cond_first: bool = False
    heads: str = "heads"
    timestep: str = "timestep"
    time_rises: bool = False

    def num_heads(self, module: torch.nn.Module) -> int:
        """The number of heads of an attention module.

        Raises:
            ValueError: a module of an unknown model that does not tell.
        """
        found = getattr(module, self.heads, None)
        if not isinstance(found, int):
            raise ValueError(
                f"{type(module).__name__} has no number of heads in .{self.heads}, so its heads "
                "cannot be chosen; guidance needs a model family that dittfast knows"
            )
        return found


CROSS = "cross-attention: its keys are another sequence"
TEXT = "refines text alone, a short sequence without a grid"
_CROSS2 = ((r".*\.attn2", CROSS),)
_JOINT = r"(single_)?transformer_blocks\.\d+\.attn"

FAMILIES: dict[str, Family] = {
    # Images.
    "FluxTransformer2DModel": Family(_JOINT, image.flux, reads_values=("img_ids",)),
    "Flux2Transformer2DModel": Family(_JOINT, image.flux2, reads_values=("img_ids",)),
    "ChromaTransformer2DModel": Family(
        _JOINT, image.flux, reads_values=("img_ids",), outer_mask=True
    ),
    "SD3Transformer2DModel": Family(r"transformer_blocks\.\d+\.attn2?", image.sd3),
    "QwenImageTransformer2DModel": Family(r"transformer_blocks\.\d+\.attn", image.qwen),
    "HunyuanImageTransformer2DModel": Family(
        _JOINT, image.hunyuan_image, dense=((r"context_embedder\..*", TEXT),)
    ),
    "ZImageTransformer2DModel": Family(
        r"(layers|noise_refiner)\.\d+\.attention",
        image.z_image,
        dense=((r"context_refiner\..*", TEXT),),
        latents="x",
        cond_first=True,
        timestep="t",
        time_rises=True,
    ),
    "Lumina2Transformer2DModel": Family(
        r"(layers|noise_refiner)\.\d+\.attn",
        image.lumina2,
        reads_values=("encoder_attention_mask",),
        dense=((r"context_refiner\..*", TEXT),),
        time_rises=True,
    ),
    "AuraFlowTransformer2DModel": Family(
        r"(joint|single)_transformer_blocks\.\d+\.attn", image.auraflow
    ),
    "CogView4Transformer2DModel": Family(
        r"transformer_blocks\.\d+\.attn1", image.text_then_image, outer_mask=True
    ),
    "HiDreamImageTransformer2DModel": Family(
        r"(double|single)_stream_blocks\.\d+\.block\.attn1", image.hidream, timestep="timesteps"
    ),
    "PixArtTransformer2DModel": Family(
        r"transformer_blocks\.\d+\.attn1", image.image, dense=_CROSS2
    ),
    "DiTTransformer2DModel": Family(r"transformer_blocks\.\d+\.attn1", image.image),
    "PRXTransformer2DModel": Family(r"blocks\.\d+\.attention", image.text_then_image),
    # Videos.
    "WanTransformer3DModel": Family(r"blocks\.\d+\.attn1", video.video, dense=_CROSS2),
    "WanVACETransformer3DModel": Family(r"(vace_)?blocks\.\d+\.attn1", video.video, dense=_CROSS2),
    "SkyReelsV2Transformer3DModel": Family(r"blocks\.\d+\.attn1", video.skyreels, dense=_CROSS2),
    "CosmosTransformer3DModel": Family(
        r"transformer_blocks\.\d+\.attn1", video.video, dense=_CROSS2
    ),
    "HunyuanVideoTransformer3DModel": Family(
        _JOINT, video.hunyuan_video, dense=((r"context_embedder\..*", TEXT),)
    ),
    "HunyuanVideo15Transformer3DModel": Family(
        r"transformer_blocks\.\d+\.attn",
        video.hunyuan_video15,
        dense=((r"context_embedder\..*", TEXT),),
        outer_mask=True,
    ),
    "MochiTransformer3DModel": Family(
        r"transformer_blocks\.\d+\.attn1",
        video.mochi,
        reads_values=("encoder_attention_mask",),
    ),
    "CogVideoXTransformer3DModel": Family(r"transformer_blocks\.\d+\.attn1", video.cogvideox),
    "LTXVideoTransformer3DModel": Family(
        r"transformer_blocks\.\d+\.attn1",
        video.ltx,
        reads_values=("video_coords",),
        dense=_CROSS2,
    ),
    "LTX2VideoTransformer3DModel": Family(
        r"transformer_blocks\.\d+\.attn1",
        video.ltx2,
        strict=False,  # its spatio-temporal guidance skips the attention of chosen blocks
        dense=(
            (r".*\.(audio_)?attn2|.*\.(audio_to_video|video_to_audio)_attn", CROSS),
            (r".*\.audio_attn1", "audio, a short sequence without a grid"),
        ),
    ),
    "Kandinsky5Transformer3DModel": Family(
        r"visual_transformer_blocks\.\d+\.self_attention",
        video.kandinsky5,
        heads="num_heads",
        dense=(
            (r"visual_transformer_blocks\..*\.cross_attention", CROSS),
            (r"text_transformer_blocks\..*", TEXT),
        ),
    ),
    "AllegroTransformer3DModel": Family(
        r"transformer_blocks\.\d+\.attn1", video.allegro, dense=_CROSS2
    ),
    "LatteTransformer3DModel": Family(
        r"transformer_blocks\.\d+\.attn1",
        image.image,
        dense=(
            (r"transformer_blocks\..*\.attn2", CROSS),
            (r"temporal_transformer_blocks\..*", "one place over time, not an image"),
        ),
    ),
}
