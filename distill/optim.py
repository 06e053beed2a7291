"""Optimisers, learning rates and averaged weights."""

from __future__ import annotations

import math

import torch

from .config import TrainConfig
from .muon import Muon, is_block_matrix
from .sharding import is_sharded, local


def make_optimizer(
    config: TrainConfig, named: dict[str, torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimiser of a run.

    Args:
        named: the trained parameters by name.

    Raises:
        ValueError: Prodigy is asked for and not installed.
    """
    parameters = list(named.values())
    # One fused call for all parameters would mix sharded ones with whole ones.
    mixed = len({is_sharded(p) for p in parameters}) > 1
    options = dict(lr=config.lr, betas=tuple(config.betas), weight_decay=config.weight_decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, foreach=False if mixed else None, **options)
    if config.optimizer == "muon":
        matrices = [p for name, p in named.items() if is_block_matrix(name, p)]
        others = [p for name, p in named.items() if not is_block_matrix(name, p)]
        groups = [{"params": matrices}, {"params": others, "orthogonal": False}]
        return Muon([group for group in groups if group["params"]], **options)
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise ValueError(
            "train.optimizer=prodigy needs its package: pip install prodigyopt; or use "
            "train.optimizer=adamw train.lr=1e-4"
        ) from error
    return Prodigy(parameters, **options)


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of 0-based optimiser step ``step``: warm-up, then the schedule."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    length = max(1, config.steps - config.warmup_steps)
    done = min(1.0, (step - config.warmup_steps) / length)
    factors = {
        "constant": 1.0,
        "linear": 1 - done,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
    }
    return config.lr * factors[config.lr_schedule]


class Average:
    """An exponential moving average of parameters: fp32, ``decay = min(d, (1 + n) / (10 + n))``.

    Args:
        parameters: by name; the averages start at their values. Of sharded ones this process
            averages its part.
        decay: d.
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], decay: float):
        self.decay = decay
        self.updates = 0
        self.values = {name: local(p).float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        """Take the parameters' present values in."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(
            list(self.values.values()),
            [local(parameters[name]).float() for name in self.values],
            1 - decay,
        )
