#!/usr/bin/env bash
# After one refused add_adapter, a diffusers model takes no adapter any more
#
# Versions: diffusers 0.42.1, peft 0.21.2, torch 2.14.1; seen on 2026-11-29
#
# add_adapter with target modules that match nothing raises, as it should. But the model is marked
# as having PEFT adapters before PEFT has looked for them: the next add_adapter, with a right
# configuration, raises AttributeError (no attribute 'peft_config'). A server that lets its users
# load adapters has to make the model anew.
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

right = LoraConfig(r=2, target_modules=["to_q"])
tiny_flux().add_adapter(right)  # alone, it is taken

model = tiny_flux()
try:
    model.add_adapter(LoraConfig(r=2, target_modules=["no_such_layer"]))
except ValueError as refusal:
    print("refused:", type(refusal).__name__)
else:
    raise AssertionError("the adapter that matches nothing was taken")
try:
    model.add_adapter(right)
except AttributeError as error:
    print("afterwards:", error)
    assert "peft_config" in str(error)
else:
    raise AssertionError("a right adapter is taken after a refused one")
PYTHON
