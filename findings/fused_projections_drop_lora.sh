#!/usr/bin/env bash
# fuse_qkv_projections takes a loaded LoRA away, without an error
#
# Versions: diffusers 0.42.1, peft 0.21.2, torch 2.14.1; seen on 2026-11-29
#
# A LoRA on to_q, to_k and to_v of a Flux transformer changes its output. After
# fuse_qkv_projections the output is, bit for bit, that of the model without the LoRA: the fused
# layer is made from the base weights, and from then on the layers that carry the adapter are not
# called. The adapter still counts as active. (To keep it, fuse the LoRA into the weights first.)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.14.1 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 peft==0.21.2 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig

torch.manual_seed(0)


def tiny_flux():
    return FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    ).eval()


inputs = dict(
    hidden_states=torch.randn(1, 16, 4), encoder_hidden_states=torch.randn(1, 3, 8),
    pooled_projections=torch.randn(1, 8), timestep=torch.tensor([0.5]),
    img_ids=torch.rand(16, 3), txt_ids=torch.zeros(3, 3),
)

model = tiny_flux()
with torch.no_grad():
    base = model(**inputs).sample
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    adapted = model(**inputs).sample
    model.fuse_qkv_projections()
    fused = model(**inputs).sample
print(f"LoRA changes the output by {(adapted - base).abs().max():.3f}, after fusing by {(fused - base).abs().max():.3f}")
print("active adapters after fusing:", model.active_adapters())
assert (adapted - base).abs().max() > 1e-3
assert torch.equal(fused, base) and model.active_adapters() == ["default"]
PYTHON
