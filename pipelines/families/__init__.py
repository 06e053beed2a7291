"""Model families: which modules are self-attention, and where the tokens sit.

A family is one entry of :data:`FAMILIES` and one short reader from the arguments of the
transformer's ``forward`` to a :class:`~dittfast.layout.Layout`. All that the rest of dittfast
knows about the model it takes from the entry, :class:`Family`.
"""

from __future__ import annotations

from . import image, packed, rotary, video
from .family import Family

CROSS = "cross-attention: its keys are another sequence"
TEXT = "refines text alone, a short sequence without a grid"
_CROSS2 = ((r".*\.attn2", CROSS),)
_JOINT = r"(single_)?transformer_blocks\.\d+\.attn"

FAMILIES: dict[str, Family] = {
    # Images.
    "FluxTransformer2DModel": Family(
        _JOINT,
        image.flux,
        reads_values=("img_ids",),
        position_ids="img_ids",
        rotary=("FluxAttention", rotary.text_and_image),
    ),
    "Flux2Transformer2DModel": Family(
        _JOINT,
        image.flux2,
        reads_values=("img_ids",),
        position_ids="img_ids",
        # The single blocks have q, k, v and an MLP in one matrix.
        projections=r"to_(q|k|v|qkv_mlp_proj)|to_out(\.0)?",
    ),
    "ChromaTransformer2DModel": Family(
        _JOINT,
        image.flux,
        reads_values=("img_ids",),
        outer_mask=True,
        position_ids="img_ids",
        rotary=("FluxAttention", rotary.text_and_image),
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
        r"(double|single)_stream_blocks\.\d+\.block\.attn1",
        image.hidream,
        timestep="timesteps",
        hidden_states=("norm_hidden_states", "norm_encoder_hidden_states"),
    ),
    "PixArtTransformer2DModel": Family(
        r"transformer_blocks\.\d+\.attn1", image.image, dense=_CROSS2
    ),
    "DiTTransformer2DModel": Family(r"transformer_blocks\.\d+\.attn1", image.image),
    "PRXTransformer2DModel": Family(
        r"blocks\.\d+\.attention",
        image.text_then_image,
        projections=r"img_qkv_proj|to_out\.0",
        clean_pipelines={"PRXPixelPipeline": 0.05},
    ),
    "LongCatImageTransformer2DModel": Family(
        _JOINT, image.flux, reads_values=("img_ids",), position_ids="img_ids"
    ),
    "OvisImageTransformer2DModel": Family(
        _JOINT, image.flux, reads_values=("img_ids",), position_ids="img_ids"
    ),
    "BriaTransformer2DModel": Family(
        _JOINT, image.flux, reads_values=("img_ids",), position_ids="img_ids"
    ),
    "BriaFiboTransformer2DModel": Family(
        _JOINT, image.flux, reads_values=("img_ids",), position_ids="img_ids"
    ),
    "BriaFibo2Transformer2DModel": Family(
        r"(layers|noise_refiner)\.\d+\.attention",
        image.bria_fibo2,
        reads_values=("encoder_attention_mask",),
        dense=(
            (r"layers\..*\.cross_attention|perceiver\..*\.cross_attention", CROSS),
            (r"perceiver\..*\.self_attention", TEXT),
        ),
        width="to_q.out_features",
    ),
    "Flux3Transformer2DModel": Family(
        r"mode_blocks\.image\.\d+\.attn|single_transformer_blocks\.\d+\.attn",
        image.flux3,
        reads_values=("img_ids", "image_cond_ids"),
        dense=(
            (r"txt_mode_blocks\..*", TEXT),
            (r"mode_blocks\.image_cond\..*", "sees the reference images alone"),
        ),
        position_ids="img_ids",
    ),
    "Krea2Transformer2DModel": Family(
        r"transformer_blocks\.\d+\.attn",
        image.krea2,
        reads_values=("position_ids",),
        heads="num_heads",
        dense=((r"text_fusion\..*", TEXT),),
        width="hidden_size",
        projections=r"to_(q|k|v|gate)|to_out\.0",
    ),
    "ErnieImageTransformer2DModel": Family(r"layers\.\d+\.self_attention", image.ernie_image),
    "CogView3PlusTransformer2DModel": Family(
        r"transformer_blocks\.\d+\.attn1", image.text_then_image
    ),
    "GlmImageTransformer2DModel": Family(
        r"transformer_blocks\.\d+\.attn1",
        image.glm_image,
        outer_mask=True,
        fills_cache=image.glm_keeps_keys,
    ),
    "HunyuanDiT2DModel": Family(r"blocks\.\d+\.attn1", image.image, dense=_CROSS2),
    "LuminaNextDiT2DModel": Family(
        r"layers\.\d+\.attn1", image.image, dense=_CROSS2, cond_first=True, time_rises=True
    ),
    "NucleusMoEImageTransformer2DModel": Family(r"transformer_blocks\.\d+\.attn", image.nucleus),
    "OmniGenTransformer2DModel": Family(
        r"layers\.\d+\.self_attn", image.omnigen, outer_mask=True, cond_first=True, time_rises=True
    ),
    # Packed sequences.
    "QwenImage21Transformer2DModel": Family(
        r"transformer_blocks\.\d+\.attn", packed.qwen21, reads_values=("img_mask",)
    ),
    "Ideogram4Transformer2DModel": Family(
        r"layers\.\d+\.attention",
        packed.ideogram4,
        reads_values=("indicator", "segment_ids", "position_ids"),
        heads="num_heads",
        outer_mask=True,
        time_rises=True,
        width="hidden_size",
    ),
    "MiniMaxH3Transformer3DModel": Family(
        r"transformer_blocks\.\d+\.attn",
        packed.minimax_h3,
        reads_values=("position_ids", "video_indices"),
        dense=((r"token_refiner\..*", TEXT),),
    ),
    "Cosmos3OmniTransformer": Family(
        r"layers\.\d+\.self_attn",
        packed.cosmos3,
        heads="num_attention_heads",
        latents="vision_tokens",
        timestep="vision_timesteps",
        width="add_q_proj.out_features",
        projections=r"add_(q|k|v)_proj|to_add_out",
        hidden_states=("gen_seq", "und_seq"),
    ),
    "JoyImageEditPlusTransformer3DModel": Family(
        r"double_blocks\.\d+\.attn",
        packed.joyimage_plus,
        width="img_attn_proj.out_features",
        projections=r"img_attn_(qkv|proj)",
    ),
    # Videos.
    "WanTransformer3DModel": Family(
        r"blocks\.\d+\.attn1",
        video.video,
        dense=_CROSS2,
        appended_channels=True,
        rotary=("WanAttention", rotary.video),
        rounds_frames=True,
    ),
    "WanVACETransformer3DModel": Family(
        r"(vace_)?blocks\.\d+\.attn1",
        video.video,
        dense=_CROSS2,
        rotary=("WanAttention", rotary.video),
        rounds_frames=True,
    ),
    "SkyReelsV2Transformer3DModel": Family(
        r"blocks\.\d+\.attn1", video.skyreels, dense=_CROSS2, rounds_frames=True
    ),
    "WanAnimateTransformer3DModel": Family(
        r"blocks\.\d+\.attn1",
        video.video,
        dense=((r".*\.attn2|face_adapter\..*", CROSS),),
        appended_channels=True,
        rounds_frames=True,
    ),
    "ChronoEditTransformer3DModel": Family(
        r"blocks\.\d+\.attn1",
        video.video,
        dense=_CROSS2,
        appended_channels=True,
        rounds_frames=True,
    ),
    "AnyFlowTransformer3DModel": Family(
        r"blocks\.\d+\.attn1", video.anyflow, dense=_CROSS2, rounds_frames=True
    ),
    "ConsisIDTransformer3DModel": Family(r"transformer_blocks\.\d+\.attn1", video.cogvideox),
    "EasyAnimateTransformer3DModel": Family(r"transformer_blocks\.\d+\.attn1", video.easyanimate),
    "MotifVideoTransformer3DModel": Family(
        _JOINT, video.motif, dense=((r".*\.cross_attn", CROSS),), appended_channels=True
    ),
    "HunyuanVideoFramepackTransformer3DModel": Family(
        _JOINT,
        video.framepack,
        reads_values=("encoder_attention_mask",),
        dense=((r"context_embedder\..*", TEXT),),
    ),
    "HeliosTransformer3DModel": Family(r"blocks\.\d+\.attn1", video.helios, dense=_CROSS2),
    "Kandinsky6Transformer3DModel": Family(
        r"visual_transformer_blocks\.\d+\.video_dec_block\.self_attention",
        video.kandinsky6,
        reads_values=("visual_token_type_ids",),
        heads="num_heads",
        dense=(
            (r"visual_transformer_blocks\..*cross_attention", CROSS),
            (r".*\.audio_dec_block\.self_attention", "audio, a short sequence without a grid"),
            (r"(video|audio)_text_transformer_blocks\..*", TEXT),
        ),
        width="to_query.out_features",
        projections=r"to_(query|key|value)|out_layer",
        rounds_frames=True,
    ),
    "JoyImageEditTransformer3DModel": Family(
        r"double_blocks\.\d+\.attn",
        video.joyimage,
        width="img_attn_proj.out_features",
        projections=r"img_attn_(qkv|proj)",
    ),
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
        shortcut=video.hunyuan_video15_mask,
    ),
    "MochiTransformer3DModel": Family(
        r"transformer_blocks\.\d+\.attn1",
        video.mochi,
        reads_values=("encoder_attention_mask",),
        hidden_states=None,  # its text is of another width, and goes without padding
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
        width="to_query.out_features",
        projections=r"to_(query|key|value)|out_layer",
        rounds_frames=True,
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


def rotary_reader(attention: str):
    """The reader of a rotary embedding for attention modules of this class; None without one."""
    readers = dict(family.rotary for family in FAMILIES.values() if family.rotary is not None)
    return readers.get(attention)


def position_ids_in(arguments) -> str | None:
    """Which of a transformer's arguments, by name, are the image's position ids; None without."""
    names = (family.position_ids for family in FAMILIES.values())
    return next((name for name in names if name in arguments), None)
