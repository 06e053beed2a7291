"""Muon in fp32: momentum whose update is replaced by its nearest orthogonal matrix.

Muon (Jordan et al., 2024) approximates the orthogonal factor with five Newton-Schulz steps.
``torch.optim.Muon`` runs those steps in bf16, which has no fast path on many CPUs; this one stays
in fp32 and handles all matrices of one shape in a single batch. Convolution kernels are treated
as ``[out, in * height * width]`` matrices.
"""

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
    """Muon with Nesterov momentum, its update scaled to the usual size of an AdamW update."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
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
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.view_as(p), alpha=-group["lr"] * scale)
