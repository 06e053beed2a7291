"""Tiny random diffusers models and pipelines, offline; real classes, real file formats."""

from __future__ import annotations

import copy
import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

_WORDS = "a an the of on in red blue green cat dog car moves left right video photo"


def tokenizer(kind: str, max_length: int = 32):
    """A word-level tokenizer with CLIP's or T5's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>"] if kind == "clip" else ["<pad>", "</s>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *_WORDS.split()])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("</s>", vocabulary["</s>"])]
    template = "$A </s>"
    extra = {}
    if kind == "clip":
        template, ends, extra = "<s> $A </s>", [("<s>", 0), *ends], {"bos_token": "<s>"}
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_max_length=max_length,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        **extra,
    )


def clip_text_encoder(projection: bool = False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=37, num_hidden_layers=1,
        num_attention_heads=4, projection_dim=32, bos_token_id=0, eos_token_id=2, pad_token_id=1,
        max_position_embeddings=32,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5_encoder():
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def flux_transformer(double: int = 2, single: int = 2, heads: int = 2, head_dim: int = 16):
    from diffusers import FluxTransformer2DModel

    rope = {16: (4, 4, 8), 32: (4, 14, 14), 64: (8, 28, 28)}[head_dim]
    return FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=double, num_single_layers=single,
        attention_head_dim=head_dim, num_attention_heads=heads, joint_attention_dim=32,
        pooled_projection_dim=32, axes_dims_rope=rope, guidance_embeds=True,
    ).eval()  # fmt: skip


def wan_transformer(layers: int = 2, in_channels: int = 16):
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16,
        in_channels=in_channels, out_channels=16, text_dim=32, freq_dim=32, ffn_dim=32,
        num_layers=layers, rope_max_seq_len=64,
    ).eval()  # fmt: skip


def image_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 4), layers_per_block=1, latent_channels=4, norm_num_groups=1,
        use_quant_conv=False, use_post_quant_conv=False, sample_size=32, shift_factor=0.06,
        scaling_factor=1.5, mid_block_add_attention=False,
    ).eval()  # fmt: skip


def sd3_pipeline():
    """A StableDiffusion3Pipeline, 8 px of image a token; guidance runs as a batch of two."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    torch.manual_seed(0)
    pipe = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=clip_text_encoder(projection=True),
        text_encoder_2=clip_text_encoder(projection=True),
        text_encoder_3=t5_encoder(),
        tokenizer=tokenizer("clip"),
        tokenizer_2=tokenizer("clip"),
        tokenizer_3=tokenizer("t5"),
        transformer=SD3Transformer2DModel(
            sample_size=32, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
            num_attention_heads=2, attention_head_dim=16, joint_attention_dim=32,
            caption_projection_dim=32, pooled_projection_dim=64, pos_embed_max_size=32,
        ).eval(),
        vae=image_vae(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux_pipeline(**options):
    """A FluxPipeline: 8 px of image a token, so height=64, width=96 is 8 x 12 tokens."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    torch.manual_seed(0)
    vae = image_vae()
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=clip_text_encoder(),
        text_encoder_2=t5_encoder(),
        tokenizer=tokenizer("clip"),
        tokenizer_2=tokenizer("t5"),
        transformer=flux_transformer(**options),
        vae=vae,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan_pipeline(two_experts: bool = False):
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline

    torch.manual_seed(0)
    pipe = WanPipeline(
        transformer=wan_transformer(),
        transformer_2=wan_transformer() if two_experts else None,
        boundary_ratio=0.5 if two_experts else None,
        vae=AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            temperal_downsample=[False, True, True],
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=t5_encoder(),
        tokenizer=tokenizer("t5"),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan_image_pipeline():
    """A WanImageToVideoPipeline without an image encoder; sizes are multiples of 16 px."""
    from diffusers import WanImageToVideoPipeline

    parts = wan_pipeline().components
    torch.manual_seed(1)
    pipe = WanImageToVideoPipeline(
        transformer=wan_transformer(in_channels=36),
        **{name: parts[name] for name in ("vae", "scheduler", "text_encoder", "tokenizer")},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_same_picture(found, expected):
    """uint8, but for the last step: weights from a file lie elsewhere in memory, and PyTorch 2.9
    then sums in another order."""
    np.testing.assert_allclose(found.astype(int), expected.astype(int), rtol=0, atol=1)


def run(pipe, seed: int = 0, **changes) -> torch.Tensor:
    """Final latents of a short run: ``[1, tokens, C]`` (FLUX), ``[1, C, F, H, W]`` (Wan) ..."""
    call = dict(prompt="a red cat", num_inference_steps=3, max_sequence_length=12)
    if type(pipe).__name__ == "WanPipeline":
        call |= dict(negative_prompt="a dog", height=48, width=80, num_frames=9, guidance_scale=3.0)
    elif type(pipe).__name__ == "StableDiffusion3Pipeline":
        call |= dict(negative_prompt="a dog", height=64, width=96, guidance_scale=3.0)
    else:
        call |= dict(height=64, width=96, guidance_scale=3.5)
    call |= changes
    generator = torch.Generator().manual_seed(seed)
    out = pipe(**call, generator=generator, output_type="latent")
    return out.images if hasattr(out, "images") else out.frames


def twin(pipe):
    """A pipeline of the same models with a scheduler and tokenizers of its own, for another thread.

    A fast tokenizer keeps the padding of the call that it is in, also for a call beside it.
    """
    own = {name: copy.deepcopy(x) for name, x in pipe.components.items() if "tokenizer" in name}
    other = type(pipe)(**{**pipe.components, **own, "scheduler": type(pipe.scheduler)()})
    other.set_progress_bar_config(disable=True)
    return other


def in_threads(*calls) -> list:
    """What functions without arguments give, each in a thread of its own."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [job.result() for job in [pool.submit(call) for call in calls]]


@functools.cache
def flux_inputs(height: int = 9, width: int = 7, text: int = 5, batch: int = 2, seed: int = 0):
    """Forward arguments of :func:`flux_transformer`."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    ids = torch.zeros(height, width, 3)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)
    return dict(
        hidden_states=draw(batch, height * width, 16),
        encoder_hidden_states=draw(batch, text, 32),
        pooled_projections=draw(batch, 32),
        timestep=torch.full((batch,), 0.5),
        img_ids=ids.view(-1, 3),
        txt_ids=torch.zeros(text, 3),
        guidance=torch.full((batch,), 3.5),
        return_dict=False,
    )


@functools.cache
def wan_inputs(frames: int = 3, height: int = 10, width: int = 14, batch: int = 2, seed: int = 0):
    """Forward arguments of :func:`wan_transformer`; sizes in latent cells."""
    generator = torch.Generator().manual_seed(seed)
    return dict(
        hidden_states=torch.randn(batch, 16, frames, height, width, generator=generator),
        timestep=torch.full((batch,), 500),
        encoder_hidden_states=torch.randn(batch, 12, 32, generator=generator),
        return_dict=False,
    )


def gradients(model, inputs) -> list[torch.Tensor]:
    """Those of the enabled method's parameters and of the model's, as far as there are any."""
    from dittfast.pipelines.adapter import method_parameters

    own = method_parameters(model).values()
    model.zero_grad()
    for p in own:
        p.grad = None
    model(**inputs)[0].square().mean().backward()
    return [p.grad.clone() for p in (*own, *model.parameters()) if p.grad is not None]
