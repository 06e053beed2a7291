#!/usr/bin/env bash
# A Wan LoRA loses the norms and other whole weights that it was trained with
#
# Versions: diffusers 0.42.1, peft 0.21.2, torch 2.14.1; seen on 2026-11-29
#
# Files for Wan in ComfyUI's layout hold, beside low-rank pairs, differences of whole weights: ".diff"
# of the norms of queries and keys, of the patch embedding, of feed-forward layers. diffusers takes
# them for zeros and drops them: with differences of 1 everywhere load_lora_weights gives the output
# that it gives without them, bit for bit, and nothing is printed. Few-step LoRAs that were trained
# with such differences draw other pictures than where they were made.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.14.1 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 peft==0.21.2 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import io
import logging

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

said = io.StringIO()
for name in ("diffusers", "peft"):
    logging.getLogger(name).addHandler(logging.StreamHandler(said))


def output(differences):
    """Of a tiny Wan with one low-rank pair and these differences of whole weights."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=16, ffn_dim=16, num_layers=1, cross_attn_norm=True, rope_max_seq_len=32,
    ).eval()
    inputs = dict(
        hidden_states=torch.randn(1, 4, 1, 8, 8), encoder_hidden_states=torch.randn(1, 3, 8),
        timestep=torch.tensor([500]),
    )
    low_rank = {
        "blocks.0.self_attn.q.lora_down.weight": torch.randn(2, 24),
        "blocks.0.self_attn.q.lora_up.weight": torch.randn(24, 2),
    }
    file = {f"diffusion_model.{name}": x for name, x in (low_rank | differences).items()}
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    pipe.load_lora_weights(file)
    with torch.no_grad():
        return transformer(**inputs).sample


alone = output({})
shapes = {
    "blocks.0.self_attn.norm_q.diff": (24,),
    "blocks.0.norm3.diff": (24,),
    "patch_embedding.diff": (24, 4, 1, 2, 2),
    "blocks.0.ffn.0.diff": (16, 24),
}
for name, shape in shapes.items():
    same = torch.equal(output({name: torch.ones(shape)}), alone)
    print(f"{name} of ones: the output is {'that without it' if same else 'another one'}")
    assert same
print(f"what was logged meanwhile: {said.getvalue().strip() or 'nothing'}")
assert not said.getvalue().strip()
PYTHON
