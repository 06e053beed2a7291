#!/usr/bin/env bash
# torch.library.custom_op: forward-mode derivatives are zero or absent, without an error
#
# Versions: torch 2.14.1, CPU; seen on 2026-11-29
#
# An operator made with torch.library.custom_op and register_autograd has a backward and no
# forward-mode formula. An autograd.Function without a jvp raises when it meets a dual number. The
# custom operator does not: torch.func.jvp returns a tangent of zero for the square of 3 (right:
# 6), and inside forward_ad.dual_level the tangent is gone. Losses that differentiate forward
# through a model (MeanFlow, continuous-time consistency) then train on a wrong target.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch.autograd import forward_ad


@torch.library.custom_op("findings::square", mutates_args=())
def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


def keep(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


square.register_autograd(lambda ctx, grad: 2 * ctx.saved_tensors[0] * grad, setup_context=keep)

x = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
(backward,) = torch.autograd.grad(square(x), x)
at = x.detach()
_, tangent = torch.func.jvp(square, (at,), (torch.ones_like(at),))
with forward_ad.dual_level():
    dual = forward_ad.unpack_dual(square(forward_ad.make_dual(at, torch.ones_like(at))))
print(f"backward {backward.item()}, jvp {tangent.item()}, dual tangent {dual.tangent}")
assert backward.item() == 6 and tangent.item() == 0 and dual.tangent is None
PYTHON
