#!/usr/bin/env bash
# ChromaInpaintPipeline cannot run with any ChromaTransformer2DModel
#
# Versions: diffusers 0.42.1, torch 2.14.1; seen on 2026-11-29
#
# The pipeline reads transformer.config.guidance_embeds. Chroma's transformer has no such field
# (ChromaPipeline and ChromaImg2ImgPipeline do not ask for it), so every call ends in
# AttributeError: 'FrozenDict' object has no attribute 'guidance_embeds', after prompt and picture
# have been encoded.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.14.1 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from diffusers import (
    AutoencoderKL, ChromaImg2ImgPipeline, ChromaInpaintPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler,
)

torch.manual_seed(0)
parts = dict(
    scheduler=FlowMatchEulerDiscreteScheduler(),
    vae=AutoencoderKL(
        latent_channels=4, block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2, scaling_factor=1.0, shift_factor=0.0,
    ),
    text_encoder=None,
    tokenizer=None,
    transformer=ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(4, 4, 8), approximator_num_channels=16,
        approximator_hidden_dim=8, approximator_layers=1,
    ),
)
words, seen = torch.randn(1, 4, 8), torch.ones(1, 4)
call = dict(
    prompt_embeds=words, prompt_attention_mask=seen, negative_prompt_embeds=words,
    negative_prompt_attention_mask=seen, image=torch.zeros(1, 3, 32, 32), height=32, width=32,
    num_inference_steps=2, strength=1.0, output_type="latent",
)
latents = ChromaImg2ImgPipeline(**parts)(**call).images
print("ChromaImg2ImgPipeline:", tuple(latents.shape))
try:
    ChromaInpaintPipeline(**parts)(**call, mask_image=torch.ones(1, 1, 32, 32))
except AttributeError as error:
    print("ChromaInpaintPipeline:", error)
    assert "guidance_embeds" in str(error)
else:
    raise AssertionError("it runs now")
PYTHON
