"""Tiny random video transformers of every family, and their inputs."""

from __future__ import annotations

import torch

from .tiny_model import BATCH, HEADS, IMAGE, TEXT, VIDEO, Tiny, time


def _wan(draw, model) -> dict:
    return dict(
        hidden_states=draw(BATCH, model.config.in_channels, draw.grid[0], *draw.cells),
        timestep=time(500.0),
        encoder_hidden_states=draw(BATCH, 12, 32),
    )


def _wan_i2v(draw, model) -> dict:
    text = {"encoder_hidden_states": draw(BATCH, 512, 32)}
    return {**_wan(draw, model), **text, "encoder_hidden_states_image": draw(BATCH, 9, 32)}


def _vace(draw, model) -> dict:
    return {**_wan(draw, model), "control_hidden_states": draw(BATCH, 6, draw.grid[0], *draw.cells)}


def _cosmos(draw, model) -> dict:
    return {**_wan(draw, model), "padding_mask": torch.zeros(1, 1, 16, 16)}


def _hunyuan(draw, model) -> dict:
    return dict(
        hidden_states=draw(BATCH, 4, draw.grid[0], *draw.cells),
        timestep=time(500.0),
        encoder_hidden_states=draw(BATCH, draw.text, 32),
        encoder_attention_mask=draw.text_mask(),
        pooled_projections=draw(BATCH, 16),
        guidance=time(6.0),
    )


def _hunyuan15(draw, model) -> dict:
    return dict(
        hidden_states=draw(BATCH, 4, *draw.grid),
        timestep=time(500.0),
        encoder_hidden_states=draw(BATCH, draw.text, 32),
        encoder_attention_mask=draw.text_mask(),
        encoder_hidden_states_2=draw(BATCH, 5, 16),
        encoder_attention_mask_2=draw.text_mask(5, 2),
        image_embeds=draw(BATCH, 3, 16),
    )


def _mochi(draw, model) -> dict:
    return dict(
        hidden_states=draw(BATCH, 4, draw.grid[0], *draw.cells),
        timestep=time(500.0),
        encoder_hidden_states=draw(BATCH, draw.text, 32),
        encoder_attention_mask=draw.text_mask().bool(),
    )


def _cogvideox(draw, model, patch_size_t: int | None = None) -> dict:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    frames, height, width = draw.grid
    inputs = dict(
        hidden_states=draw(BATCH, frames * (patch_size_t or 1), 4, 2 * height, 2 * width),
        encoder_hidden_states=draw(BATCH, draw.text, 32),
        timestep=time(500.0),
    )
    if model.config.use_rotary_positional_embeddings:
        inputs["image_rotary_emb"] = get_3d_rotary_pos_embed(
            16, None, (height, width), frames, grid_type="slice", max_size=(height, width)
        )
    return inputs


def _ltx(draw, model) -> dict:
    frames, height, width = draw.grid
    return dict(
        hidden_states=draw(BATCH, frames * height * width, 8),
        encoder_hidden_states=draw(BATCH, draw.text, 32),
        encoder_attention_mask=draw.text_mask(),
        timestep=time(500.0),
        num_frames=frames,
        height=height,
        width=width,
    )


def _ltx2(draw, model) -> dict:
    audio = 6
    return {
        **_ltx(draw, model),
        "audio_hidden_states": draw(BATCH, audio, 8),
        "audio_encoder_hidden_states": draw(BATCH, draw.text, 32),
        "audio_encoder_attention_mask": draw.text_mask(),
        "audio_num_frames": audio,
        "fps": 24.0,
    }


def _kandinsky5(draw, model) -> dict:
    return dict(
        hidden_states=draw(BATCH, draw.grid[0], *draw.cells, 4),
        encoder_hidden_states=draw(BATCH, draw.text, 32),
        timestep=time(500.0),
        pooled_projections=draw(BATCH, 16),
        visual_rope_pos=[torch.arange(n) for n in draw.grid],
        text_rope_pos=torch.arange(draw.text),
    )


def _allegro(draw, model) -> dict:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    frames, height, width = draw.grid
    *tables, t, y, x = get_3d_rotary_pos_embed_allegro(
        24, ((0, 0), (height, width)), (height, width), frames
    )
    places = torch.cartesian_prod(t.long(), y.long(), x.long()).T
    return dict(
        hidden_states=draw(BATCH, 4, draw.grid[0], *draw.cells),
        encoder_hidden_states=draw(BATCH, 1, draw.text, 32),
        encoder_attention_mask=draw.text_mask(),
        timestep=time(500.0),
        image_rotary_emb=(tables, [axis[None] for axis in places]),
    )


def _latte(draw, model) -> dict:
    return dict(
        hidden_states=draw(BATCH, 4, VIDEO[0], *draw.cells),
        encoder_hidden_states=draw(BATCH, draw.text, 32),
        timestep=time(500.0),
    )


def _wan_animate(draw, model) -> dict:
    return {
        **_wan(draw, model),
        "hidden_states": draw(BATCH, 12, draw.grid[0], *draw.cells),
        "encoder_hidden_states_image": draw(BATCH, 9, 32),
        "pose_hidden_states": draw(BATCH, 4, draw.grid[0] - 1, *draw.cells),
        "face_pixel_values": draw(BATCH, 3, 4 * draw.grid[0] - 7, 16, 16),
    }


def _anyflow(draw, model) -> dict:
    frames, (height, width) = draw.grid[0], draw.cells
    return dict(
        hidden_states=draw(BATCH, frames, 4, height, width),
        timestep=torch.full((BATCH, frames), 500.0),
        r_timestep=torch.full((BATCH, frames), 400.0),
        encoder_hidden_states=draw(BATCH, 12, 32),
    )


def _easyanimate(draw, model) -> dict:
    return dict(
        hidden_states=draw(BATCH, 4, draw.grid[0], *draw.cells),
        timestep=time(500.0),
        encoder_hidden_states=draw(BATCH, draw.text, 32),
        encoder_hidden_states_t5=draw(BATCH, 4, 24),
    )


def _motif(draw, model) -> dict:
    return dict(
        hidden_states=draw(BATCH, 4, draw.grid[0], *draw.cells),
        timestep=time(500.0),
        encoder_hidden_states=draw(BATCH, draw.text, 32),
        encoder_attention_mask=draw.text_mask(),
        image_embeds=draw(BATCH, 3, 16),
    )


def _framepack(draw, model, batch=BATCH) -> dict:
    inputs = {name: x[:batch] for name, x in _hunyuan(draw, model).items()}
    if batch == 1:
        inputs["encoder_attention_mask"] = draw.text_mask()[1:]
    cells = draw.cells
    return {
        **inputs,
        "image_embeds": draw(batch, 3, 16),
        "indices_latents": torch.arange(10, 10 + draw.grid[0]),
        "latents_clean": draw(batch, 4, 2, *cells),
        "indices_latents_clean": torch.tensor([0, 9]),
        "latents_history_2x": draw(batch, 4, 2, *cells),
        "indices_latents_history_2x": torch.arange(7, 9),
        "latents_history_4x": draw(batch, 4, 5, *cells),
        "indices_latents_history_4x": torch.arange(2, 7),
    }


def _helios(draw, model) -> dict:
    cells = draw.cells
    at = lambda *frames: torch.tensor(frames).expand(BATCH, -1)  # noqa: E731
    return {
        **_wan(draw, model),
        "indices_hidden_states": at(*range(10, 10 + draw.grid[0])),
        "indices_latents_history_short": at(0, 9),
        "latents_history_short": draw(BATCH, 4, 2, *cells),
        "indices_latents_history_mid": at(7, 8),
        "latents_history_mid": draw(BATCH, 4, 2, *cells),
        "indices_latents_history_long": at(2, 3, 4, 5, 6),
        "latents_history_long": draw(BATCH, 4, 5, *cells),
    }


def _kandinsky6(draw, model, condition=False) -> dict:
    frames, (height, width) = draw.grid[0], draw.cells
    inputs = dict(
        hidden_states=draw(BATCH, frames + condition, height, width, 4),
        encoder_hidden_states=draw(BATCH, draw.text, 32),
        pooled_projections=draw(BATCH, 16),
        timestep=time(500.0),
        audio_hidden_states=draw(BATCH, 6, 5),
    )
    if condition:
        kinds = torch.zeros(BATCH, frames + 1, dtype=torch.long)
        kinds[:, -1] = 1
        places = [torch.arange(n) for n in draw.grid]
        places[0] = torch.cat([places[0], torch.zeros(1, dtype=torch.long)])
        inputs.update(visual_token_type_ids=kinds, visual_rope_pos=tuple(places))
    return inputs


def _joyimage(draw, model, items=0) -> dict:
    shape = (items, 4, 1, *draw.cells) if items else (4, draw.grid[0], *draw.cells)
    return dict(
        hidden_states=draw(BATCH, *shape),
        timestep=time(500.0),
        encoder_hidden_states=draw(BATCH, draw.text, 32),
    )


_WAN = dict(
    **HEADS, in_channels=4, out_channels=4, text_dim=32, freq_dim=32, ffn_dim=32, num_layers=2,
    rope_max_seq_len=64,
)  # fmt: skip
_HUNYUAN = dict(
    **HEADS, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1,
    num_refiner_layers=1, text_embed_dim=32, pooled_projection_dim=16, rope_axes_dim=(4, 4, 8),
)  # fmt: skip
_COGVIDEOX = dict(
    **HEADS, in_channels=4, out_channels=4, time_embed_dim=16, text_embed_dim=32, num_layers=2,
    sample_width=14, sample_height=10, sample_frames=9, max_text_seq_length=TEXT,
)  # fmt: skip
_LTX = dict(
    **HEADS, in_channels=8, out_channels=8, cross_attention_dim=32, caption_channels=32,
    num_layers=2,
)  # fmt: skip
_WAN_I2V = {**_WAN, "in_channels": 9, "image_dim": 32, "added_kv_proj_dim": 32}
_WAN_VACE = dict(**_WAN, vace_layers=[0], vace_in_channels=6)
_COSMOS = dict(
    **HEADS, in_channels=4, out_channels=4, num_layers=2, mlp_ratio=2.0, text_embed_dim=32,
    adaln_lora_dim=4, max_size=(8, 16, 16),
)  # fmt: skip
_HUNYUAN_VIDEO_I2V = dict(**_HUNYUAN, image_condition_type="token_replace")
_HUNYUAN_VIDEO_15 = dict(
    **HEADS, in_channels=4, out_channels=4, num_layers=2, num_refiner_layers=1, text_embed_dim=32,
    text_embed_2_dim=16, image_embed_dim=16, rope_axes_dim=(4, 4, 8),
)  # fmt: skip
_MOCHI = dict(
    num_attention_heads=2, attention_head_dim=16, num_layers=2, in_channels=4,
    pooled_projection_dim=16, text_embed_dim=32, time_embed_dim=16,
)  # fmt: skip
_COGVIDEOX_15 = {
    **_COGVIDEOX, "sample_frames": 21, "patch_size_t": 2, "patch_bias": False,
    "use_rotary_positional_embeddings": True,
}  # fmt: skip
_LTX2 = dict(
    **_LTX, audio_in_channels=8, audio_out_channels=8, audio_num_attention_heads=2,
    audio_attention_head_dim=8, audio_cross_attention_dim=16,
)  # fmt: skip
_KANDINSKY5 = dict(
    in_visual_dim=4, out_visual_dim=4, in_text_dim=32, in_text_dim2=16, time_dim=16, model_dim=32,
    ff_dim=32, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 4, 8),
)  # fmt: skip
_ALLEGRO = dict(
    num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=2,
    cross_attention_dim=48, caption_channels=32, sample_height=10, sample_width=14, sample_frames=3,
)  # fmt: skip
_LATTE = dict(
    **HEADS, in_channels=4, out_channels=4, num_layers=2, cross_attention_dim=32, sample_size=22,
    patch_size=2, norm_type="ada_norm_single", caption_channels=32, norm_elementwise_affine=False,
    num_embeds_ada_norm=8, attention_bias=True, activation_fn="gelu-approximate",
    video_length=VIDEO[0],
)  # fmt: skip

_WAN_ANIMATE = {
    **_WAN, "in_channels": 12, "latent_channels": 4, "image_dim": 32, "added_kv_proj_dim": 32,
    "motion_encoder_size": 16, "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 8,
    "motion_encoder_channel_sizes": {"4": 4, "8": 4, "16": 4}, "face_encoder_hidden_dim": 8,
    "face_encoder_num_heads": 2, "inject_face_latents_blocks": 2,
}  # fmt: skip
_ANYFLOW = dict(
    **HEADS, in_channels=4, out_channels=4, text_dim=32, freq_dim=32, ffn_dim=32, num_layers=2,
    rope_max_seq_len=64,
)  # fmt: skip
_CONSISID = {**_COGVIDEOX, "use_rotary_positional_embeddings": True}
_EASYANIMATE = dict(
    **HEADS, in_channels=4, out_channels=4, patch_size=2, num_layers=2, mmdit_layers=1,
    time_embed_dim=16, text_embed_dim=32, text_embed_dim_t5=24,
)  # fmt: skip
_MOTIF = dict(
    **HEADS, in_channels=4, out_channels=4, num_layers=1, num_single_layers=2,
    num_decoder_layers=1, mlp_ratio=1.0, text_embed_dim=32, image_embed_dim=16,
    rope_axes_dim=(4, 4, 8), enable_text_cross_attention_dual=True,
    enable_text_cross_attention_single=True,
)  # fmt: skip
_FRAMEPACK = dict(**_HUNYUAN, has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True)
_HELIOS = dict(
    **HEADS, in_channels=4, out_channels=4, text_dim=32, freq_dim=32, ffn_dim=32, num_layers=2,
    rope_dim=(4, 6, 6), is_amplify_history=True,
)  # fmt: skip
_KANDINSKY6 = dict(
    in_visual_dim=4, out_visual_dim=4, in_text_dim=32, in_text_dim2=16, time_dim=16, model_dim=32,
    ff_dim=32, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 4, 8), visual_cond=False,
    in_audio_dim=5, out_audio_dim=5, scale_factor=(1.0, 1.0, 1.0),
    visual_token_type_num_embeddings=2,
)  # fmt: skip
_JOYIMAGE = dict(
    in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=32, mlp_width_ratio=1.0,
    num_layers=2, rope_dim_list=[4, 4, 8],
)  # fmt: skip

_CUBE = ("hidden_states", (2, 3, 4))

TINY_VIDEO: dict[str, Tiny] = {
    "wan": Tiny("WanTransformer3DModel", _WAN, _wan, VIDEO, _CUBE),
    "wan-i2v": Tiny("WanTransformer3DModel", _WAN_I2V, _wan_i2v, VIDEO, _CUBE),
    "wan-vace": Tiny("WanVACETransformer3DModel", _WAN_VACE, _vace, VIDEO, _CUBE),
    "skyreels-v2": Tiny("SkyReelsV2Transformer3DModel", _WAN, _wan, VIDEO, _CUBE),
    "cosmos": Tiny("CosmosTransformer3DModel", _COSMOS, _cosmos, VIDEO, _CUBE),
    "hunyuan-video": Tiny("HunyuanVideoTransformer3DModel", _HUNYUAN, _hunyuan, VIDEO, _CUBE),
    "hunyuan-video-i2v": Tiny(
        "HunyuanVideoTransformer3DModel", _HUNYUAN_VIDEO_I2V, _hunyuan, VIDEO, _CUBE
    ),
    "hunyuan-video-1.5": Tiny(
        "HunyuanVideo15Transformer3DModel", _HUNYUAN_VIDEO_15, _hunyuan15, VIDEO, _CUBE
    ),
    "mochi": Tiny("MochiTransformer3DModel", _MOCHI, _mochi, VIDEO, _CUBE),
    "cogvideox": Tiny(
        "CogVideoXTransformer3DModel", _COGVIDEOX, _cogvideox, VIDEO, ("hidden_states", (1, 3, 4))
    ),
    "cogvideox-1.5": Tiny(
        "CogVideoXTransformer3DModel",
        _COGVIDEOX_15,
        lambda draw, model: _cogvideox(draw, model, patch_size_t=2),
        VIDEO,
        ("hidden_states", (1, 3, 4)),
    ),
    "ltx": Tiny("LTXVideoTransformer3DModel", _LTX, _ltx, VIDEO, None),
    "ltx2": Tiny("LTX2VideoTransformer3DModel", _LTX2, _ltx2, VIDEO, None),
    "kandinsky5": Tiny(
        "Kandinsky5Transformer3DModel",
        _KANDINSKY5,
        _kandinsky5,
        VIDEO,
        ("hidden_states", (1, 2, 3)),
    ),
    "allegro": Tiny("AllegroTransformer3DModel", _ALLEGRO, _allegro, VIDEO, _CUBE),
    "latte": Tiny(
        "LatteTransformer3DModel", _LATTE, _latte, (1, *IMAGE), ("hidden_states", (None, 3, 4))
    ),
    "wan-animate": Tiny("WanAnimateTransformer3DModel", _WAN_ANIMATE, _wan_animate, VIDEO, _CUBE),
    "chronoedit": Tiny("ChronoEditTransformer3DModel", _WAN_I2V, _wan_i2v, VIDEO, _CUBE),
    "anyflow": Tiny(
        "AnyFlowTransformer3DModel", _ANYFLOW, _anyflow, VIDEO, ("hidden_states", (1, 3, 4))
    ),
    "consisid": Tiny(
        "ConsisIDTransformer3DModel", _CONSISID, _cogvideox, VIDEO, ("hidden_states", (1, 3, 4))
    ),
    "easyanimate": Tiny("EasyAnimateTransformer3DModel", _EASYANIMATE, _easyanimate, VIDEO, _CUBE),
    "motif-video": Tiny("MotifVideoTransformer3DModel", _MOTIF, _motif, VIDEO, _CUBE),
    "framepack": Tiny(
        "HunyuanVideoFramepackTransformer3DModel", _FRAMEPACK, _framepack, VIDEO, _CUBE
    ),
    "framepack-alone": Tiny(
        "HunyuanVideoFramepackTransformer3DModel",
        _FRAMEPACK,
        lambda draw, model: _framepack(draw, model, batch=1),
        VIDEO,
        _CUBE,
    ),
    "helios": Tiny("HeliosTransformer3DModel", _HELIOS, _helios, VIDEO, _CUBE),
    "kandinsky6": Tiny(
        "Kandinsky6Transformer3DModel",
        _KANDINSKY6,
        _kandinsky6,
        VIDEO,
        ("hidden_states", (1, 2, 3)),
    ),
    "kandinsky6-i2v": Tiny(
        "Kandinsky6Transformer3DModel",
        _KANDINSKY6,
        lambda draw, model: _kandinsky6(draw, model, condition=True),
        VIDEO,
        ("hidden_states", (1, 2, 3)),
    ),
    "joyimage-edit": Tiny(
        "JoyImageEditTransformer3DModel",
        _JOYIMAGE,
        lambda draw, model: _joyimage(draw, model, items=2),
        (1, *VIDEO[1:]),
        None,
    ),
    "joyimage": Tiny("JoyImageEditTransformer3DModel", _JOYIMAGE, _joyimage, VIDEO, _CUBE),
}
