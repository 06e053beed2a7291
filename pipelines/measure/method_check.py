"""Before a method's numbers count: is its attention right on this model's own q, k and v?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from dittfast.attention import choose_backend
from dittfast.measure.check import WrongResult, check_attention
from dittfast.methods.amount import mean_amount
from dittfast.methods.base import Method
from dittfast.methods.head_groups import select_heads
from dittfast.mixture import Assignment
from dittfast.plan import Plan
from dittfast.schedule import Schedule

from ..families import FAMILIES
from ..models import attention_layers, head_shape, transformers_of
from .probe import Captured, capture

_STEPS = 2
# As many layers are looked at, spread over the model: their q, k and v are held at once.
_LAYERS = 8


@dataclass(frozen=True)
class Checked:
    """A method that agreed with its definition in fp64.

    Attributes:
        backend: the one that was checked.
        layers: how many sparse layers, at the last of two denoising steps.
        density: kept fraction of token pairs, mean over those layers; None where a layer's method
            computes its own output.
        work: FLOPs of attention, appended summary tokens included, as a fraction of dense; mean
            over those layers. Without summaries it equals density.
    """

    backend: str
    layers: int
    density: float | None
    work: float | None

    def to_dict(self) -> dict:
        return asdict(self)


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


def assignment_of(pipe, method: Method) -> Assignment:
    """What each layer of :func:`layer_names` runs under a method or mixture.

    Raises:
        ValueError: rules that do not fit the model.
    """
    model = next(iter(transformers_of(pipe).values()))
    family = FAMILIES[type(model).__name__]
    layers = attention_layers(model, family)
    return Assignment(method, {name: head_shape(family, m)[0] for name, m in layers.items()})


def sparse_layers(pipe, method: Method, schedule: Schedule) -> list[int]:
    """Numbers of the layers of :func:`layer_names` that a method runs in at some step."""
    names = layer_names(pipe)
    dense, assignment = schedule.dense_layer_names(names), assignment_of(pipe, method)
    return [n for n, name in enumerate(names) if name not in dense and assignment.ever(name)]


def spread(values: list, count: int) -> list:
    """At most ``count`` of the values, the first and the last among them."""
    if len(values) <= count:
        return values
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


@torch.no_grad()
def capture_layers(
    pipe, call: dict, layers: list[int], seed: int = 0, hidden_states: bool = False
) -> list[Captured]:
    """q, k and v of some layers at the last of two dense steps; at most 8 layers, spread."""
    if not layers:
        return []
    short = call | {"num_inference_steps": _STEPS}
    given = {"layers": spread(layers, _LAYERS), "seed": seed, "hidden_states": hidden_states}
    return capture(pipe, short, steps=[_STEPS - 1], **given)


@torch.no_grad()
def check_captured(
    assignment: Assignment, captured: Sequence[Captured], backend: str = "auto"
) -> tuple[Checked, Plan | None]:
    """Compare what each captured layer runs with its definition in fp64; the first plan, too.

    Raises:
        dittfast.measure.check.WrongResult: naming the layer, what differs and by how much.
    """
    if not captured:
        return Checked(backend, 0, None, None), None
    backend = (
        choose_backend(captured[0].q.device, captured[0].q.dtype) if backend == "auto" else backend
    )
    checks = [x for c in captured for x in _check(assignment, c, backend)]
    amount = mean_amount((heads, amount) for heads, amount, _ in checks)
    plan = next((plan for _, _, plan in checks if plan is not None), None)
    return Checked(backend, len(captured), *amount), plan


def check_method(
    pipe, call: dict, method: Method, schedule: Schedule, backend: str = "auto", seed: int = 0
) -> Checked:
    """Run the pipeline dense for two steps and check the method on sparse layers' q, k and v.

    Sampled query rows are compared with attention computed densely in fp64 under the same plan, or
    with the method's formula where it computes its output itself.

    Args:
        call: see :func:`~dittfast.pipelines.runs.call.call_arguments`.

    Raises:
        dittfast.measure.check.WrongResult: naming the layer, what differs and by how much.
    """
    layers = sparse_layers(pipe, method, schedule)
    captured = capture_layers(pipe, call, layers, seed, method.needs_hidden_states)
    return check_captured(assignment_of(pipe, method), captured, backend)[0]


def _check(assignment: Assignment, c: Captured, backend: str) -> Iterator[tuple]:
    """``(heads, amount, plan)`` of all that a layer runs at some step."""
    for group in assignment.ever(c.layer):
        q, k, v = (select_heads(x, group.heads, c.q.shape[1]) for x in (c.q, c.k, c.v))
        weight = c.kv_log_weight
        if weight is not None and weight.shape[1] > 1:
            weight = weight[:, list(group.heads)]
        given = {"scale": c.scale, "kv_log_weight": weight, "backend": backend}
        given["hidden_states"] = c.hidden_states
        try:
            zeros = torch.zeros_like(q)
            checked = check_attention(group.method, c.layout, q, k, v, zeros, **given)
        except WrongResult as error:
            raise WrongResult(f"{group.method.name}, layer {c.layer}: {error}") from error
        yield len(group.heads), *checked
