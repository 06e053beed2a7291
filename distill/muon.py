"""Muon in fp32: momentum whose update is replaced by its nearest orthogonal matrix.

Muon (Jordan et al., 2024) approximates the orthogonal factor with five Newton-Schulz steps.
``torch.optim.Muon`` runs those steps in bf16, which has no fast path on many CPUs; this one stays
in fp32 and handles all matrices of one shape in a single batch. Convolution kernels are treated
as ``[out, in * height * width]`` matrices.
"""

from __future__ import annotations

import re

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices, steps=5):
    """[N, rows, columns] -> the same shape with all singular values near 1."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, its update scaled to the usual size of an AdamW update.

    Args:
        params: matrices and convolution kernels; or groups of parameters, in which a group with
            ``orthogonal=False`` gets AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101).
        lr: of both.
        betas, eps: AdamW's.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8):
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, betas=betas, eps=eps)
        super().__init__(params, {**defaults, "orthogonal": True})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                p.mul_(1 - group["lr"] * group["weight_decay"])
            (self._muon if group["orthogonal"] else self._adam)(group, parameters)
        return loss

    def _muon(self, group, parameters):
        by_shape = {}
        for p in parameters:
            state = self.state[p]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 1 - group["momentum"])
            update = p.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
            by_shape.setdefault(tuple(update.shape), []).append((p, update))
        for shape, items in by_shape.items():
            updates = orthogonalise(torch.stack([u for _, u in items]))
            scale = 0.2 * max(shape) ** 0.5
            for (p, _), update in zip(items, updates):
                p.add_(update.view_as(p), alpha=-group["lr"] * scale)

    def _adam(self, group, parameters):
        first, second = group["betas"]
        for p in parameters:
            state = self.state[p]
            if "step" not in state:
                state.update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
            state["step"] += 1
            state["mean"].lerp_(p.grad, 1 - first)
            state["square"].mul_(second).addcmul_(p.grad, p.grad, value=1 - second)
            size = (state["square"] / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
            rate = group["lr"] / (1 - first ** state["step"])
            p.addcdiv_(state["mean"], size, value=-rate)


def is_block_matrix(name: str, p: torch.Tensor) -> bool:
    """Whether a transformer's parameter is a matrix inside one of its blocks: what Muon is for."""
    return p.ndim == 2 and re.search(r"(^|\.)\d+\.", name) is not None
