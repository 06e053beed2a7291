#!/usr/bin/env bash
# Gradient checkpointing takes the text mask out of half of Chroma's blocks
#
# Versions: diffusers 0.42.1, torch 2.14.1; seen on 2026-11-29
#
# ChromaTransformer2DModel gives attention_mask to its double and to its single blocks. With
# enable_gradient_checkpointing() the single blocks are called without it: padding tokens of the text
# are attended to, the output changes, and so do the gradients, without an error. Checkpointing is
# meant to save memory and to change nothing. Without a mask both ways agree to the last digits.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.14.1 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from diffusers import ChromaTransformer2DModel

torch.manual_seed(0)
model = ChromaTransformer2DModel(
    in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=8, axes_dims_rope=(4, 4, 8), approximator_num_channels=16,
    approximator_hidden_dim=8, approximator_layers=1,
)
inputs = dict(
    hidden_states=torch.randn(1, 16, 16), encoder_hidden_states=torch.randn(1, 4, 8),
    timestep=torch.tensor([0.5]), img_ids=torch.rand(16, 3), txt_ids=torch.zeros(4, 3),
)
padded = torch.tensor([[True] * 2 + [False] * 2 + [True] * 16])  # two of four text tokens, the image


def run(mask, checkpointing):
    model.enable_gradient_checkpointing() if checkpointing else model.disable_gradient_checkpointing()
    model.zero_grad()
    out = model(**inputs, attention_mask=mask).sample
    out.square().sum().backward()
    return out.detach(), model.x_embedder.weight.grad.clone()


def apart(mask):
    (out, grad), (again, again_grad) = run(mask, False), run(mask, True)
    return ((again - out).norm() / out.norm()).item(), ((again_grad - grad).norm() / grad.norm()).item()


with_mask, without = apart(padded), apart(None)
print("with a mask: output {:.1e}, gradient {:.1e} apart".format(*with_mask))
print("without:     output {:.1e}, gradient {:.1e} apart".format(*without))
assert max(without) < 1e-5 and min(with_mask) > 1e-3
PYTHON
