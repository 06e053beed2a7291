"""Before a method's numbers count: is its attention right on this model's own q, k and v?"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from dittfast.attention import choose_backend, method_call
from dittfast.measure.check import WrongResult, check_against_dense, detached
from dittfast.methods.base import Method
from dittfast.plan import Plan
from dittfast.schedule import Schedule

from ..families import FAMILIES
from ..models import attention_layers, transformers_of
from .probe import Captured, capture

_STEPS = 2
# As many layers are looked at, spread over the model: their q, k and v are held at once.
_LAYERS = 8


@dataclass(frozen=True)
class Checked:
    """A method that agreed with dense fp64 attention under its own plan.

    Attributes:
        backend: the one that was checked.
        layers: how many sparse layers, at the last of two denoising steps.
        density: kept fraction of token pairs, mean over those layers.
        work: FLOPs of attention, appended summary tokens included, as a fraction of dense; mean
            over those layers. Without summaries it equals density.
    """

    backend: str
    layers: int
    density: float | None
    work: float | None

    def to_dict(self) -> dict:
        return asdict(self)


def method_plan(method: Method, captured: Captured) -> tuple[Plan, tuple, float]:
    """The plan, ``(q, k, v)`` with summary tokens and the scale that a call gets by ``method``."""
    c = captured
    method.prepare(c.layout, c.q.device)
    call = method_call(
        method, c.layout, c.q, c.k, c.v, scale=c.scale, kv_log_weight=c.kv_log_weight
    )
    plan, weight = detached(call.plan), call.kv_log_weight
    if weight is not None:
        if plan.kv_log_weight is not None:
            weight = weight + plan.kv_log_weight
        plan = plan.replace(kv_log_weight=weight)
    return plan, (c.q, call.k, call.v), call.scale


def layer_names(pipe) -> list[str]:
    """The self-attention layers in the model's order; of several transformers, the first's.

    Raises:
        ValueError: a model family that dittfast cannot read.
    """
    model = next(iter(transformers_of(pipe).values()))
    family = FAMILIES.get(type(model).__name__)
    if family is None:
        raise ValueError(
            f"no layout reader for {type(model).__name__}; known: {', '.join(sorted(FAMILIES))}"
        )
    return list(attention_layers(model, family))


def sparse_layers(pipe, schedule: Schedule) -> list[int]:
    """Numbers of the layers of :func:`layer_names` that a schedule leaves to the method."""
    names = layer_names(pipe)
    dense = schedule.dense_layer_names(names)
    return [number for number, name in enumerate(names) if name not in dense]


def spread(values: list, count: int) -> list:
    """At most ``count`` of the values, the first and the last among them."""
    if len(values) <= count:
        return values
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


@torch.no_grad()
def capture_layers(pipe, call: dict, layers: list[int], seed: int = 0) -> list[Captured]:
    """q, k and v of some layers at the last of two dense steps; at most 8 layers, spread."""
    if not layers:
        return []
    short = call | {"num_inference_steps": _STEPS}
    return capture(pipe, short, steps=[_STEPS - 1], layers=spread(layers, _LAYERS), seed=seed)


@torch.no_grad()
def check_captured(
    method: Method, captured: Sequence[Captured], backend: str = "auto"
) -> tuple[Checked, Plan | None]:
    """Compare ``attend`` with dense fp64 attention under the method's plan; the first plan, too.

    Raises:
        dittfast.measure.check.WrongResult: naming the layer, what differs and by how much.
    """
    if not captured:
        return Checked(backend, 0, None, None), None
    backend = (
        choose_backend(captured[0].q.device, captured[0].q.dtype) if backend == "auto" else backend
    )
    checks = [_check(method, c, backend) for c in captured]
    density, work = (statistics.fmean(x) for x in list(zip(*checks))[:2])
    return Checked(backend, len(checks), density, work), checks[0][2]


def check_method(
    pipe, call: dict, method: Method, schedule: Schedule, backend: str = "auto", seed: int = 0
) -> Checked:
    """Run the pipeline dense for two steps and compare ``attend`` on sparse layers' q, k and v.

    Sampled query rows are compared with attention computed densely in fp64 under the same plan.

    Args:
        call: see :func:`~dittfast.pipelines.runs.call.call_arguments`.

    Raises:
        dittfast.measure.check.WrongResult: naming the layer, what differs and by how much.
    """
    layers = [] if method.dense else sparse_layers(pipe, schedule)
    return check_captured(method, capture_layers(pipe, call, layers, seed), backend)[0]


def _check(method: Method, captured: Captured, backend: str) -> tuple[float, float, Plan]:
    plan, (q, k, v), scale = method_plan(method, captured)
    try:
        check_against_dense(q, k, v, torch.zeros_like(q), plan, scale, backend)
    except WrongResult as error:
        raise WrongResult(f"{method.name}, layer {captured.layer}: {error}") from error
    dim = q.shape[-1]
    work = plan.flops(dim) / (4.0 * plan.num_queries * plan.num_real_keys * dim)
    return plan.density, work, plan
