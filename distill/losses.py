"""The losses of distillation: pure functions of predictions, targets and captured outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def denoising_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error in fp32 between a prediction and its target, over all values.

    The target is what the noise process says: ``noise - clean`` for flow matching (Lipman et al.
    2022, arXiv:2210.02747), the noise, or v.
    """
    _check(prediction, target)
    return F.mse_loss(prediction.float(), target.float())


def prediction_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared error in fp32 to the teacher's prediction; no gradient to the teacher."""
    _check(student, teacher)
    return F.mse_loss(student.float(), teacher.detach().float())


def attention_loss(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Mean over layers of the mean squared error of attention outputs (CLEAR, arXiv:2412.16112).

    Args:
        student, teacher: one tensor for each layer, before the output projection, text rows
            included. No gradient to the teacher.
    """
    _check_layers(student, teacher)
    return torch.stack([prediction_loss(s, t) for s, t in zip(student, teacher)]).mean()


def feature_loss(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean over layers and tokens of ``1 - cos`` of block outputs ``[B, N, C]``.

    Representation alignment (REPA, Yu et al. 2024, arXiv:2410.06940), with the dense teacher in
    the place of the image encoder: the same width, so without a projection.
    """
    _check_layers(student, teacher)
    losses = []
    for s, t in zip(student, teacher):
        _check(s, t)
        losses.append(1 - F.cosine_similarity(s.float(), t.detach().float(), dim=-1).mean())
    return torch.stack(losses).mean()


def layer_mean(values: Sequence[torch.Tensor], name: str) -> torch.Tensor:
    """Mean over layers of what their methods reported as the loss ``name``.

    The load balance of MoH (arXiv:2410.11842) is one.

    Raises:
        ValueError: no layer reported it.
    """
    if not values:
        raise ValueError(
            f"no layer reported a loss {name!r}: the method did not run, or its layers are "
            "compiled, where such losses have no gradient; train without torch.compile"
        )
    return torch.stack(list(values)).float().mean()


def weighted_sum(losses: dict[str, torch.Tensor], weights: dict[str, float]) -> torch.Tensor:
    """``sum_i weights[i] * losses[i]``."""
    total = [weights[name] * loss for name, loss in losses.items()]
    return torch.stack(total).sum()


def _check(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"the shapes differ: {list(a.shape)} and {list(b.shape)}")


def _check_layers(student: Sequence, teacher: Sequence) -> None:
    if len(student) != len(teacher) or not student:
        raise ValueError(
            f"student and teacher must give the same layers, at least one; got {len(student)} "
            f"and {len(teacher)}"
        )
