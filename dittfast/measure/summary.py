"""Means with confidence intervals, and how numbers are written."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

RESAMPLES = 10_000
LEVEL = 0.95


def bootstrap_mean(values: Iterable[float], seed: int = 0) -> dict[str, float | int | None]:
    """The mean with its 95 % percentile-bootstrap interval (Efron 1979), the same at every call.

    Args:
        values: finite numbers, one per prompt.
        seed: of the resampling.

    Returns:
        ``{"mean", "low", "high", "n"}``; without values the first three are None, and with a
        single one there is no interval: low and high are None.

    Raises:
        ValueError: a value that is not finite.
    """
    x = torch.tensor([float(v) for v in values], dtype=torch.float64)
    if not torch.isfinite(x).all():
        raise ValueError("the mean of values that are not finite was asked for")
    n = x.numel()
    summary = {"mean": float(x.mean()) if n else None, "low": None, "high": None, "n": n}
    if n < 2:
        return summary
    draw = torch.Generator().manual_seed(seed)
    means = torch.empty(RESAMPLES, dtype=torch.float64)
    step = max(1, (1 << 22) // n)
    for start in range(0, RESAMPLES, step):
        count = min(step, RESAMPLES - start)
        at = torch.randint(n, (count, n), generator=draw)
        means[start : start + count] = x[at].mean(1)
    tail = (1 - LEVEL) / 2
    ends = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return summary | {"low": float(ends[0]), "high": float(ends[1])}


def interval(estimate: dict, digits: int = 2) -> str:
    """``"31.20 [30.81, 31.66]"``, or ``"-"`` where there is nothing to tell."""
    if estimate["mean"] is None or not math.isfinite(estimate["mean"]):
        return "-"
    text = f"{estimate['mean']:.{digits}f}"
    if estimate["low"] is None:
        return text
    return f"{text} [{estimate['low']:.{digits}f}, {estimate['high']:.{digits}f}]"


def number(value: float | None, digits: int = 3) -> str:
    """A number with ``digits`` decimals, or ``"-"`` for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def kept(density: float | None, work: float | None, digits: int = 3) -> str:
    """The density, or where a method computes its own output its FLOPs as a part of dense."""
    if density is None and work is not None:
        return f"FLOPs {work:.{digits}g}"
    return number(density, digits)
