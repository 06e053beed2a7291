"""Tiny random image transformers of every family, and their inputs."""

from __future__ import annotations

import math

import torch

from .tiny_model import BATCH, HEADS, IMAGE, TEXT, Tiny, image_ids, time

_REFERENCES = ((4, 6), (3, 5))


def _flux(draw, model, references=()) -> dict:
    ids = image_ids(draw.image, *references)
    return dict(
        hidden_states=draw(BATCH, len(ids), 16),
        encoder_hidden_states=draw(BATCH, draw.text, 32),
        pooled_projections=draw(BATCH, 32),
        timestep=time(0.5),
        img_ids=ids,
        txt_ids=torch.zeros(draw.text, 3),
        guidance=time(3.5),
    )


def _flux2(draw, model) -> dict:
    ids = image_ids(draw.image, *_REFERENCES, columns=4)
    text = torch.zeros(draw.text, 4)
    text[:, 3] = torch.arange(draw.text)
    return dict(
        hidden_states=draw(BATCH, len(ids), 16),
        encoder_hidden_states=draw(BATCH, draw.text, 32),
        timestep=time(0.5),
        img_ids=ids.expand(BATCH, -1, -1),
        txt_ids=text.expand(BATCH, -1, -1),
        guidance=time(3.5),
    )


def _chroma(draw, model, dtype=torch.bool) -> dict:
    inputs = _flux(draw, model)
    del inputs["pooled_projections"], inputs["guidance"]
    image = torch.ones(BATCH, inputs["hidden_states"].shape[1], dtype=dtype)
    return {**inputs, "attention_mask": torch.cat([draw.text_mask().to(dtype), image], 1)}


def _sd3(draw, model) -> dict:
    return dict(
        hidden_states=draw(BATCH, 4, *draw.cells),
        encoder_hidden_states=draw(BATCH, draw.text, 32),
        pooled_projections=draw(BATCH, 32),
        timestep=time(500.0),
    )


def _qwen(draw, model, references=()) -> dict:
    images = (draw.image, *references)
    shapes = [(1, *image) for image in images]
    return dict(
        hidden_states=draw(BATCH, sum(h * w for h, w in images), 16),
        encoder_hidden_states=draw(BATCH, draw.text, 32),
        encoder_hidden_states_mask=draw.text_mask().bool(),
        timestep=time(0.5),
        img_shapes=[shapes] * BATCH,
    )


def _hunyuan_image(draw, model) -> dict:
    return dict(
        hidden_states=draw(BATCH, 4, *draw.image),
        encoder_hidden_states=draw(BATCH, draw.text, 32),
        encoder_attention_mask=draw.text_mask(),
        encoder_hidden_states_2=draw(BATCH, 5, 16),
        encoder_attention_mask_2=draw.text_mask(5, 5),
        timestep=time(500.0),
    )


def _z_image(draw, model, second=None) -> dict:
    return dict(
        x=[draw(4, 1, 2 * h, 2 * w) for h, w in (draw.image, second or draw.image)],
        t=time(0.5),
        cap_feats=[draw(draw.text, 16), draw(40, 16)],
    )


def _lumina2(draw, model) -> dict:
    return dict(
        hidden_states=draw(BATCH, 4, *draw.cells),
        encoder_hidden_states=draw(BATCH, draw.text, 32),
        encoder_attention_mask=draw.text_mask(),
        timestep=time(0.5),
    )


def _auraflow(draw, model) -> dict:
    return dict(
        hidden_states=draw(BATCH, 4, *draw.cells),
        encoder_hidden_states=draw(BATCH, draw.text, 32),
        timestep=time(0.5),
    )


def _cogview4(draw, model) -> dict:
    size = torch.tensor([draw.cells], dtype=torch.float32).expand(BATCH, -1)
    return dict(
        hidden_states=draw(BATCH, 4, *draw.cells),
        encoder_hidden_states=draw(BATCH, draw.text, 32),
        timestep=time(500.0),
        original_size=size,
        target_size=size,
        crop_coords=torch.zeros(BATCH, 2),
        attention_mask=draw.text_mask(),
    )


def _hidream(draw, model) -> dict:
    return dict(
        hidden_states=draw(BATCH, 4, *draw.cells),
        encoder_hidden_states_t5=draw(BATCH, draw.text, 16),
        encoder_hidden_states_llama3=draw(2, BATCH, 5, 16),
        pooled_embeds=draw(BATCH, 16),
        timesteps=time(500.0),
    )


def _pixart(draw, model) -> dict:
    return dict(
        hidden_states=draw(BATCH, 4, *draw.cells),
        encoder_hidden_states=draw(BATCH, draw.text, 32),
        encoder_attention_mask=draw.text_mask(),
        timestep=time(500.0),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )


def _dit(draw, model) -> dict:
    return dict(
        hidden_states=draw(BATCH, 4, *draw.cells),
        timestep=time(500.0),
        class_labels=torch.tensor([1, 3]),
    )


def _prx(draw, model) -> dict:
    return dict(
        hidden_states=draw(BATCH, 4, *draw.cells),
        timestep=time(0.5),
        encoder_hidden_states=draw(BATCH, draw.text, 32),
        attention_mask=draw.text_mask().bool(),
    )


def _longcat(draw, model, references=()) -> dict:
    inputs = _flux(draw, model, references)
    del inputs["pooled_projections"], inputs["guidance"]
    return inputs


def _bria_fibo(draw, model) -> dict:
    layers = model.config.num_layers + model.config.num_single_layers
    text = [draw(BATCH, draw.text, 24) for _ in range(layers)]
    inputs = _longcat(draw, model, _REFERENCES)
    images = torch.ones(BATCH, inputs["hidden_states"].shape[1])
    mask = torch.cat([draw.text_mask(), images], 1).bool()[:, None, None]
    return {
        **inputs,
        "text_encoder_layers": text,
        "joint_attention_kwargs": {"attention_mask": mask},
    }


def _bria_fibo2(draw, model, padded=True, images=()) -> dict:
    return dict(
        hidden_states=draw(BATCH, 4, *draw.cells),
        timestep=time(0.5),
        encoder_hidden_states=draw(BATCH, 2, draw.text, 24),
        encoder_attention_mask=draw.text_mask().bool() if padded else None,
        context_latents=[draw(BATCH, 4, 2 * h, 2 * w) for h, w in images],
    )


def _flux3(draw, model) -> dict:
    ids = image_ids(draw.image, *_REFERENCES, columns=4)
    ids = ids[:, [3, 1, 2, 0]]  # the last column tells the images apart
    count = math.prod(draw.image)
    return dict(
        hidden_states=draw(BATCH, count, 16),
        encoder_hidden_states=draw(BATCH, draw.text, 32),
        timestep=time(0.5),
        img_ids=ids[:count],
        txt_ids=torch.arange(draw.text)[:, None].float() * torch.tensor([0.0, 0.0, 0.0, 1.0]),
        image_cond_hidden_states=draw(BATCH, len(ids) - count, 16),
        image_cond_ids=-ids[count:],
    )


def _krea2(draw, model) -> dict:
    return dict(
        hidden_states=draw(BATCH, math.prod(draw.image), 16),
        encoder_hidden_states=draw(BATCH, draw.text, 3, 24),
        timestep=time(0.5),
        position_ids=torch.cat([torch.zeros(draw.text, 3), image_ids(draw.image)]),
        encoder_attention_mask=draw.text_mask().bool(),
    )


def _ernie(draw, model) -> dict:
    return dict(
        hidden_states=draw(BATCH, 4, *draw.cells),
        timestep=time(500.0),
        text_bth=draw(BATCH, draw.text, 24),
        text_lens=draw.text_mask().sum(1),
    )


def _cogview3(draw, model) -> dict:
    inputs = _cogview4(draw, model)
    del inputs["attention_mask"]
    return inputs


def _glm(draw, model) -> dict:
    inputs = _cogview4(draw, model)
    del inputs["original_size"]
    tokens = math.prod(draw.image)
    return {
        **inputs,
        "prior_token_id": torch.arange(tokens).expand(BATCH, -1) % 8,
        "prior_token_drop": torch.zeros(BATCH, tokens, dtype=torch.bool),
    }


def _hunyuan_dit(draw, model) -> dict:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    return dict(
        hidden_states=draw(BATCH, 4, *draw.cells),
        timestep=time(500.0),
        encoder_hidden_states=draw(BATCH, draw.text, 16),
        text_embedding_mask=draw.text_mask(),
        encoder_hidden_states_t5=draw(BATCH, 5, 16),
        text_embedding_mask_t5=draw.text_mask(5, 2),
        image_meta_size=torch.full((BATCH, 6), 22.0),
        style=torch.zeros(BATCH, dtype=torch.long),
        image_rotary_emb=get_2d_rotary_pos_embed(
            16, ((0, 0), draw.image), draw.image, use_real=True, output_type="pt"
        ),
    )


def _lumina_next(draw, model) -> dict:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return dict(
        hidden_states=draw(BATCH, 4, *draw.cells),
        timestep=time(0.5),
        encoder_hidden_states=draw(BATCH, draw.text, 32),
        encoder_mask=draw.text_mask(),
        image_rotary_emb=get_2d_rotary_pos_embed_lumina(16, *draw.image),
        cross_attention_kwargs={},
    )


def _nucleus(draw, model) -> dict:
    with torch.no_grad():  # diffusers leaves the experts' weights as the memory was
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.copy_(0.3 * draw(*parameter.shape))
    inputs = _qwen(draw, model)
    return inputs


def _omnigen(draw, model) -> dict:
    """The second row's text is padded in front, and the first one's holds an image."""
    tokens, image = draw.text + 1, math.prod(draw.image)
    sees = torch.ones(BATCH, tokens + image, tokens + image)
    sees[:, :tokens] = torch.tril(sees[:, :tokens])
    sees[0, 1:5, 1:5] = 1
    padding = draw.text_mask().flip(1) == 0
    sees[:, :, : draw.text].masked_fill_(padding[:, None], 0)
    sees[:, : draw.text].masked_fill_(padding[..., None], 1)
    places = torch.arange(tokens + image).expand(BATCH, -1) - padding.sum(1, keepdim=True)
    return dict(
        hidden_states=draw(BATCH, 4, *draw.cells),
        timestep=time(0.5),
        input_ids=torch.arange(draw.text).expand(BATCH, -1).clone(),
        input_img_latents=[draw(1, 4, 4, 4)],
        input_image_sizes={0: [[1, 5]]},
        attention_mask=sees,
        position_ids=places.clamp(min=0),
    )


_FLUX = dict(**HEADS, in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=32)
_FLUX1 = dict(**_FLUX, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True)
_CHROMA = dict(
    **_FLUX, axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=16,
    approximator_layers=1,
)  # fmt: skip
_SD3 = dict(
    **HEADS, sample_size=32, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
    joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32,
    pos_embed_max_size=24,
)  # fmt: skip
_QWEN = dict(
    **HEADS, in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=32,
    axes_dims_rope=(4, 4, 8),
)  # fmt: skip
_Z_IMAGE = dict(
    in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
    axes_dims=[4, 4, 8], axes_lens=[128, 32, 32],
)  # fmt: skip
_FLUX2 = dict(**_FLUX, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4))
_SD35 = dict(**_SD3, dual_attention_layers=(0,), qk_norm="rms_norm")
_QWEN_IMAGE_EDIT = dict(**_QWEN, zero_cond_t=True)
_HUNYUAN_IMAGE = dict(
    **HEADS, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1,
    num_refiner_layers=1, patch_size=(1, 1), text_embed_dim=32, text_embed_2_dim=16,
    rope_axes_dim=(8, 8),
)  # fmt: skip
_LUMINA2 = dict(
    sample_size=32, patch_size=2, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1,
    num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 4, 8), axes_lens=(32,
    32, 32), cap_feat_dim=32,
)  # fmt: skip
_AURAFLOW = dict(
    **HEADS, sample_size=32, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1,
    num_single_dit_layers=1, joint_attention_dim=32, caption_projection_dim=32,
    pos_embed_max_size=256,
)  # fmt: skip
_COGVIEW4 = dict(
    **HEADS, patch_size=2, in_channels=4, out_channels=4, num_layers=2, text_embed_dim=32,
    time_embed_dim=16, condition_dim=16, rope_axes_dim=(16, 16),
)  # fmt: skip
_HIDREAM = dict(
    **HEADS, patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1,
    caption_channels=[16, 16], text_emb_dim=16, num_routed_experts=2, num_activated_experts=1,
    axes_dims_rope=(4, 4, 8), max_resolution=(24, 24), llama_layers=[0, 1],
)  # fmt: skip
_PIXART = dict(
    **HEADS, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=32, sample_size=32,
    caption_channels=32,
)  # fmt: skip
_DIT = dict(**HEADS, in_channels=4, num_layers=2, sample_size=20, num_embeds_ada_norm=8)
_PRX = dict(
    in_channels=4, context_in_dim=32, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2,
    axes_dim=[8, 8],
)  # fmt: skip

_LONGCAT = dict(**_FLUX, axes_dims_rope=(4, 4, 8))
_BRIA_FIBO = dict(**_LONGCAT, text_encoder_dim=24)
_BRIA_FIBO2 = dict(
    in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=24,
    injection_layer_ids=(1,), perceiver_num_layers=1, min_num_gist_tokens=4, max_num_gist_tokens=8,
    gist_step=2, gist_min_text_len=2, gist_max_text_len=8, axes_dims=(4, 4, 8),
    axes_lens=(32, 32, 32),
)  # fmt: skip
_FLUX3 = dict(
    **_FLUX, cond_in_channels=16, axes_dims_rope=(4, 4, 4, 4), timestep_channels=32,
)  # fmt: skip
_KREA2 = dict(
    **HEADS, in_channels=16, num_layers=2, num_key_value_heads=1, intermediate_size=32,
    timestep_embed_dim=16, text_hidden_dim=24, num_text_layers=3, text_num_attention_heads=2,
    text_num_key_value_heads=2, text_intermediate_size=16, num_layerwise_text_blocks=1,
    num_refiner_text_blocks=1, axes_dims_rope=(4, 4, 8),
)  # fmt: skip
_ERNIE = dict(
    hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=32, in_channels=4,
    out_channels=4, patch_size=2, text_in_dim=24, rope_axes_dim=(4, 4, 8),
)  # fmt: skip
_COGVIEW3 = dict(
    **HEADS, in_channels=4, out_channels=4, num_layers=2, text_embed_dim=32, time_embed_dim=16,
    condition_dim=16, pos_embed_max_size=16, sample_size=16,
)  # fmt: skip
_GLM = dict(
    **HEADS, in_channels=4, out_channels=4, num_layers=2, text_embed_dim=32, time_embed_dim=16,
    condition_dim=16, prior_vq_quantizer_codebook_size=8,
)  # fmt: skip
_HUNYUAN_DIT = dict(
    **HEADS, in_channels=4, patch_size=2, sample_size=22, hidden_size=32, num_layers=4,
    mlp_ratio=1.0, cross_attention_dim=16, cross_attention_dim_t5=16, pooled_projection_dim=16,
    text_len=TEXT, text_len_t5=5,
)  # fmt: skip
_LUMINA_NEXT = dict(
    sample_size=22, hidden_size=32, num_layers=2, num_attention_heads=2, num_kv_heads=1,
    multiple_of=16, cross_attention_dim=32,
)  # fmt: skip
_NUCLEUS = dict(
    **HEADS, in_channels=16, out_channels=4, num_layers=2, num_key_value_heads=1,
    joint_attention_dim=32, axes_dims_rope=(4, 4, 8), mlp_ratio=8.0, num_experts=2,
    dense_moe_strategy="leave_first_block_dense", moe_intermediate_dim=16, capacity_factors=1.0,
)  # fmt: skip
_OMNIGEN = dict(
    hidden_size=32, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32,
    num_layers=2, pad_token_id=0, vocab_size=16, pos_embed_max_size=24, time_step_dim=16,
    rope_scaling={"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
)  # fmt: skip

_SQUARE = ("hidden_states", (None, 2, 3))
_IMAGE = (1, *IMAGE)

TINY_IMAGE: dict[str, Tiny] = {
    "flux": Tiny("FluxTransformer2DModel", _FLUX1, _flux, _IMAGE, None),
    "flux-kontext": Tiny(
        "FluxTransformer2DModel",
        _FLUX1,
        lambda draw, model: _flux(draw, model, _REFERENCES),
        _IMAGE,
        None,
    ),
    "flux2": Tiny("Flux2Transformer2DModel", _FLUX2, _flux2, _IMAGE, None),
    "chroma": Tiny("ChromaTransformer2DModel", _CHROMA, _chroma, _IMAGE, None),
    "chroma-float-mask": Tiny(
        "ChromaTransformer2DModel",
        _CHROMA,
        lambda draw, model: _chroma(draw, model, torch.float32),
        _IMAGE,
        None,
    ),
    "sd3": Tiny("SD3Transformer2DModel", _SD3, _sd3, _IMAGE, _SQUARE),
    "sd3.5": Tiny("SD3Transformer2DModel", _SD35, _sd3, _IMAGE, _SQUARE),
    "qwen-image": Tiny("QwenImageTransformer2DModel", _QWEN, _qwen, _IMAGE, None),
    "qwen-image-edit": Tiny(
        "QwenImageTransformer2DModel",
        _QWEN_IMAGE_EDIT,
        lambda draw, model: _qwen(draw, model, _REFERENCES),
        _IMAGE,
        None,
    ),
    "hunyuan-image": Tiny(
        "HunyuanImageTransformer2DModel", _HUNYUAN_IMAGE, _hunyuan_image, _IMAGE, _SQUARE
    ),
    "z-image": Tiny("ZImageTransformer2DModel", _Z_IMAGE, _z_image, _IMAGE, ("x", (1, 2, 3))),
    "z-image-two-sizes": Tiny(
        "ZImageTransformer2DModel",
        _Z_IMAGE,
        lambda draw, model: _z_image(draw, model, second=(5, 8)),
        _IMAGE,
        ("x", (1, 2, 3)),
    ),
    "lumina2": Tiny("Lumina2Transformer2DModel", _LUMINA2, _lumina2, _IMAGE, _SQUARE),
    "auraflow": Tiny("AuraFlowTransformer2DModel", _AURAFLOW, _auraflow, _IMAGE, _SQUARE),
    "cogview4": Tiny("CogView4Transformer2DModel", _COGVIEW4, _cogview4, _IMAGE, _SQUARE),
    "hidream": Tiny("HiDreamImageTransformer2DModel", _HIDREAM, _hidream, _IMAGE, _SQUARE),
    "pixart": Tiny("PixArtTransformer2DModel", _PIXART, _pixart, _IMAGE, _SQUARE),
    "dit": Tiny("DiTTransformer2DModel", _DIT, _dit, (1, 10, 10), _SQUARE),
    "prx": Tiny("PRXTransformer2DModel", _PRX, _prx, _IMAGE, _SQUARE),
    "longcat-image": Tiny("LongCatImageTransformer2DModel", _LONGCAT, _longcat, _IMAGE, None),
    "longcat-image-edit": Tiny(
        "LongCatImageTransformer2DModel",
        _LONGCAT,
        lambda draw, model: _longcat(draw, model, _REFERENCES[:1]),
        _IMAGE,
        None,
    ),
    "ovis-image": Tiny("OvisImageTransformer2DModel", _LONGCAT, _longcat, _IMAGE, None),
    "bria": Tiny("BriaTransformer2DModel", _LONGCAT, _longcat, _IMAGE, None),
    "bria-fibo": Tiny("BriaFiboTransformer2DModel", _BRIA_FIBO, _bria_fibo, _IMAGE, None),
    "bria-fibo-2": Tiny("BriaFibo2Transformer2DModel", _BRIA_FIBO2, _bria_fibo2, _IMAGE, _SQUARE),
    "bria-fibo-2-edit": Tiny(
        "BriaFibo2Transformer2DModel",
        _BRIA_FIBO2,
        lambda draw, model: _bria_fibo2(draw, model, False, _REFERENCES),
        _IMAGE,
        _SQUARE,
    ),
    "flux3": Tiny("Flux3Transformer2DModel", _FLUX3, _flux3, _IMAGE, None),
    "krea2": Tiny("Krea2Transformer2DModel", _KREA2, _krea2, _IMAGE, None),
    "ernie-image": Tiny("ErnieImageTransformer2DModel", _ERNIE, _ernie, _IMAGE, _SQUARE),
    "cogview3-plus": Tiny("CogView3PlusTransformer2DModel", _COGVIEW3, _cogview3, _IMAGE, _SQUARE),
    "glm-image": Tiny("GlmImageTransformer2DModel", _GLM, _glm, _IMAGE, _SQUARE),
    "hunyuan-dit": Tiny("HunyuanDiT2DModel", _HUNYUAN_DIT, _hunyuan_dit, _IMAGE, _SQUARE),
    "lumina-next": Tiny("LuminaNextDiT2DModel", _LUMINA_NEXT, _lumina_next, _IMAGE, _SQUARE),
    "nucleus-moe": Tiny("NucleusMoEImageTransformer2DModel", _NUCLEUS, _nucleus, _IMAGE, None),
    "omnigen": Tiny("OmniGenTransformer2DModel", _OMNIGEN, _omnigen, _IMAGE, _SQUARE),
}
