#!/usr/bin/env bash
# set_attention_backend on one model changes others, and reset_attention_backend does not undo it
#
# Versions: diffusers 0.42.1, torch 2.14.1, CPU; seen on 2026-11-29
#
# Two models that were never told a backend call scaled_dot_product_attention. After
# first.set_attention_backend('flex') neither the second model nor one made later calls it any
# more, and after first.reset_attention_backend() still none of the three does: the setter also
# sets the default of the whole process, the reset clears only what the model's own processors
# hold. (set_attention_backend('native') afterwards brings it back.)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.14.1 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from diffusers import FluxTransformer2DModel

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

stock = torch.nn.functional.scaled_dot_product_attention
calls = []


def counted(*args, **kwargs):
    calls.append(1)
    return stock(*args, **kwargs)


torch.nn.functional.scaled_dot_product_attention = counted


def calls_of(model):
    calls.clear()
    with torch.no_grad():
        model(**inputs)
    return len(calls)


first, second = tiny_flux(), tiny_flux()
before = calls_of(first), calls_of(second)
first.set_attention_backend("flex")
told = calls_of(second)
first.reset_attention_backend()
after = calls_of(first), calls_of(second), calls_of(tiny_flux())
first.set_attention_backend("native")
again = calls_of(second)
print(f"calls of PyTorch's function: before {before}, second model {told}, after the reset {after}, native {again}")
assert before == (2, 2) and told == 0 and after == (0, 0, 0) and again == 2
PYTHON
