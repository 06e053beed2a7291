"""Seconds on a GPU that is not here, in the place of recorded ones: from published rates."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dittfast.layout import Layout
from dittfast.measure.gpus import Gpu, gpu_of
from dittfast.measure.roofline import Attention, seconds
from dittfast.methods.base import Method

from ..families.sequences import Sequences
from ..measure.cost import Cost, forward_cost
from ..measure.estimate import method_estimate
from .preset import ALWAYS


def gpu_with_rates(name: str) -> Gpu:
    """The GPU of that name.

    Raises:
        ValueError: an unknown one, or one without published rates of dense attention and of an
            engine that walks block lists.
    """
    gpu = gpu_of(name)
    if gpu.best is None or not gpu.engines:
        raise ValueError(
            f"nobody published how fast attention under block lists is on {gpu.name}; take a GPU "
            "with such rates (dittfast estimate --gpu NAME prints them), or tune on the device"
        )
    return gpu


def computed(
    records: Sequence[dict],
    methods: Sequence[Method],
    layout: Layout,
    cost: Cost,
    gpu: Gpu,
) -> list[dict]:
    """Records of the form of :data:`~.recording.FORM` with the GPU's seconds; errors stay.

    Planning is not counted. A method that no engine with a published rate runs is left out, as
    if it were not finite.
    """
    heads = {"layer": cost.heads}
    estimates = [method_estimate(m.name, m, ALWAYS, heads, layout, cost) for m in methods]
    rates = [_rate(one.refused.get(gpu.architecture), gpu) for one in estimates]

    def on_gpu(one: dict) -> dict:
        tokens, width = layout.num_tokens, one["heads"] * one["head_dim"]
        work = Attention(4.0 * tokens**2 * width, tokens, 1, one["heads"], one["head_dim"])
        tried = [
            x | {"planning": 0.0}
            | ({"error": None} if rate is None else
               {"seconds": seconds(work, gpu, rate, x["work"]).attention})
            for x, rate in zip(one["tried"], rates)
        ]  # fmt: skip
        dense = seconds(work, gpu, gpu.best[1].tflops).attention
        return one | {"dense_seconds": dense, "tried": tried}

    return [
        record | {"calls": [on_gpu(x) for x in record["calls"]], "start": [0.0] * len(methods)}
        for record in records
    ]


def _rate(refused: dict[str, str] | None, gpu: Gpu) -> float | None:
    """Of the fastest engine that takes the plans; None of a method that has none."""
    if refused is None:
        return None
    able = [rate.tflops for name, rate in gpu.engines.items() if name not in refused]
    return max(able, default=None)


def run_seconds(records: Sequence[dict], steps: int, cost: Cost, gpu: Gpu) -> tuple[float, float]:
    """Of a dense run and of its attention, text encoders and decoder left out.

    What is no attention that a method replaces takes the GPU's peak.

    Args:
        records: with the GPU's seconds. steps: of a run.
    """
    first = records[0]
    step = first["calls"][0]["step"]
    passes = steps * first["passes"]
    calls = [x for x in first["calls"] if x["step"] == step]
    attention = passes * sum(x["dense_seconds"] * x["rows"] for x in calls)
    rest = (cost.linear + cost.other_attention) * calls[0]["rows"] / (gpu.peak_tflops * 1e12)
    return attention + passes * rest, attention


def cost_of(model: torch.nn.Module, sequences: Sequences) -> Cost:
    """FLOPs of one pass of a model over what it read."""
    return forward_cost(model, sequences, sequences.layout.num_context)
