"""What attention would take on a GPU nobody here has: computed from published rates, not measured.

A kernel takes the longer of its arithmetic, at a published rate, and of reading q, k, v and writing
the output once. Planning, and whatever else a layer does, is not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .gpus import Gpu

# bf16; q, k, v and the output.
_BYTES, _TENSORS = 2, 4
NUM_GPUS = (1, 8, 16, 40, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Attention:
    """Dense self-attention of one pass of a model.

    Attributes:
        flops: of all layers.
        tokens, layers, heads, head_dim: of the sequence, and of the model.
    """

    flops: float
    tokens: int
    layers: int
    heads: int
    head_dim: int

    @property
    def values(self) -> float:
        """Bytes of q, k, v and the output in all layers."""
        return _BYTES * _TENSORS * self.tokens * self.heads * self.head_dim * self.layers


@dataclass(frozen=True)
class Seconds:
    """Of one pass: in attention, and in exchanging heads for tokens between GPUs."""

    attention: float
    exchange: float = 0.0

    @property
    def total(self) -> float:
        return self.attention + self.exchange


def break_evens(gpu: Gpu) -> dict[str, dict[str, float]]:
    """For each engine and dense kernel the density below which the engine is faster; may exceed 1.

    For methods with pooled or appended keys it is the work that has to be below.
    """
    found = {
        engine: {name: rate.tflops / dense.tflops for name, dense in gpu.dense.items()}
        for engine, rate in gpu.engines.items()
    }
    return found | {name: {ratio.dense: ratio.value} for name, ratio in gpu.ratios.items()}


def sharing(work: Attention, count: int) -> int:
    """Of ``count`` GPUs in equal groups, how many at most can share the heads of one sample."""
    return math.gcd(work.heads, count)


def not_split_reason(work: Attention, count: int) -> str | None:
    """Why Ulysses cannot share the heads among ``count`` GPUs; None where it can."""
    if work.heads % count == 0:
        return None
    return f"{work.heads} heads do not split over {count} GPUs"


def seconds(work: Attention, gpu: Gpu, tflops: float, part: float = 1.0, count: int = 1) -> Seconds:
    """Seconds of one pass.

    Args:
        tflops: the kernel's rate.
        part: of the dense operations that are computed.
        count: GPUs that share the heads by Ulysses (arXiv:2309.14509).

    Raises:
        ValueError: the heads do not split over so many.
    """
    reason = not_split_reason(work, count)
    if reason is not None:
        raise ValueError(f"{reason}; use a divisor of {work.heads}")
    arithmetic = part * work.flops / count / (tflops * 1e12)
    moving = work.values / count / (gpu.memory * 1e12)
    return Seconds(max(arithmetic, moving), exchange_seconds(work, gpu, count))


def exchange_seconds(work: Attention, gpu: Gpu, count: int) -> float:
    """The all-to-alls of Ulysses: each GPU keeps one part of ``count`` of what it holds.

    The rest goes to the others, over the links of its node and the network at the same time.
    """
    held = work.values / count
    inside = min(count, gpu.per_node) - 1
    by_link = held * inside / count / (gpu.link * 1e9)
    by_network = held * (count - 1 - inside) / count / (gpu.network * 1e9)
    return max(by_link, by_network)
