"""What each method would keep and cost at a published model's real size: computed, not measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from time import perf_counter

import torch

from dittfast.attention import MethodCall, method_call, reasons_on
from dittfast.config import resolve
from dittfast.layout import Layout
from dittfast.measure.gpus import GPUS
from dittfast.methods import METHODS
from dittfast.methods.amount import Amount, mean_amount
from dittfast.methods.base import Kept, Method
from dittfast.methods.head_groups import split
from dittfast.mixture import Assignment
from dittfast.plan import Plan
from dittfast.schedule import Schedule

from ..families import FAMILIES
from ..families.published import PublishedModel
from ..models import attention_layers
from .cost import Cost, forward_cost


@dataclass(frozen=True)
class Estimate:
    """One method at one size.

    Attributes:
        method, settings: its name, and the preset or options asked for.
        density: kept fraction of the token pairs in a sparse layer; None of a method that computes
            its own output.
        work: FLOPs of attention in a sparse layer, as a fraction of dense.
        at_least: whether the method may keep more, by what q and k are.
        dense_layers: of the model's self-attention layers.
        attention: FLOPs of all self-attention layers in a sparse step, dense layers included. The
            choice of blocks from q and k is not counted.
        fewer_flops: FLOPs of a dense pass over those of a sparse one.
        plan_bytes: block lists, of one layer; per head where they are chosen from q and k.
        build_seconds: to make the plan, on this machine's CPU.
        problem: why the method cannot run here; the numbers are then 0.
        refused: by architecture and backend, why it takes no such plans in bf16; empty of a method
            that computes its own output.
    """

    method: str
    settings: str
    density: float | None = 0.0
    at_least: bool = False
    dense_layers: int = 0
    attention: float = 0.0
    fewer_flops: float = 0.0
    plan_bytes: int = 0
    build_seconds: float = 0.0
    problem: str | None = None
    work: float = 0.0
    refused: dict[str, dict[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelEstimate:
    """A published model at one size, and what every method does there."""

    name: str
    model: str
    parameters: int
    num_frames: int
    height: int
    width: int
    layout: Layout
    cost: Cost
    methods: list[Estimate] = field(default_factory=list)

    def to_dict(self) -> dict:
        """Plain data, for JSON."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        grid = self.layout.grid
        data |= {
            "tokens": self.layout.num_tokens,
            "grid": grid.shape,
            "context": self.layout.num_context,
            "cost": asdict(self.cost) | {"attention_share": self.cost.attention_share},
            "ceiling": self.cost.speedup(0),
            "methods": [asdict(x) for x in self.methods],
        }
        del data["layout"]
        return data


def estimate(
    card: PublishedModel,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    text: int | None = None,
    methods: Iterable[str] = (),
    **options,
) -> ModelEstimate:
    """Tokens, FLOPs and plans of ``card`` at a size; its usual size where none is given.

    Args:
        num_frames, height, width: frames and pixels.
        text: text tokens.
        methods: names, presets or YAML files; by default every method, with the settings
            published for this model where there are any.
        options: of the method, where there is one.

    Raises:
        ValueError: a size the model cannot make, an unknown method or option.
    """
    num_frames = card.num_frames if num_frames is None else num_frames
    height, width = height or card.height, width or card.width
    text = card.text if text is None else text
    chosen = [(x, resolve(x, **options)) for x in list(methods) or default_settings(card)]
    card.grid(num_frames, height, width)
    model = card.build()
    sequences = card.sequences(model, num_frames, height, width, text)
    layout, cost = sequences.layout, forward_cost(model, sequences, text)
    heads = {name: cost.heads for name in attention_layers(model, FAMILIES[card.model])}
    estimates = [
        method_estimate(settings, method, schedule, heads, layout, cost)
        for settings, (method, schedule) in chosen
    ]
    parameters = sum(x.numel() for x in model.parameters())
    return ModelEstimate(
        card.name, card.model, parameters, num_frames, height, width, layout, cost, estimates
    )


def default_settings(card: PublishedModel) -> list[str]:
    """For every method the presets published for this model, or the method with its defaults."""
    published = {name.split("/")[0] for name in card.presets}
    return [*card.presets, *(name for name in METHODS if name not in published | {"dense"})]


def method_estimate(
    settings: str,
    method: Method,
    schedule: Schedule,
    heads: dict[str, int],
    layout: Layout,
    cost: Cost,
) -> Estimate:
    """What ``method`` keeps and costs on ``layout``, in steps that no schedule keeps dense.

    Args:
        heads: of every self-attention layer by name. A mixture counts each layer by what its rules
            give it, and of rules for some steps the mean.
    """
    start = perf_counter()
    amounts: dict[Method, Amount] = {}
    calls: list[MethodCall] = []
    try:
        assignment = Assignment(method, heads)
        dense = schedule.dense_layer_names(list(heads))
        layers, least, size = [], False, 0
        for name, count in heads.items():
            groups = [] if name in dense else assignment.ever(name)
            parts = []
            for group in groups:
                for own in split(group.method, len(group.heads)):
                    if own.method not in amounts:
                        amounts[own.method], call = _amount(own.method, layout, cost)
                        size += 0 if call is None else _list_bytes(call.plan)
                        calls += [] if call is None else [call]
                    least |= own.method.least() != own.method
                    parts.append((len(own.heads), amounts[own.method]))
            if groups:
                rest = max(0, count - sum(weight for weight, _ in parts))
                layers.append(mean_amount([*parts, *([(rest, Amount(1.0, 1.0))] if rest else [])]))
    except ValueError as error:
        return Estimate(method.name, settings, problem=str(error))
    seconds = perf_counter() - start
    amount = mean_amount((1, x) for x in layers) if layers else Amount(1.0, 1.0)
    each = cost.attention / cost.layers
    attention = each * (amount.work * len(layers) + cost.layers - len(layers))
    return Estimate(
        method.name,
        settings,
        density=amount.density,
        work=amount.work,
        at_least=least,
        dense_layers=cost.layers - len(layers),
        attention=attention,
        fewer_flops=cost.speedup(attention / cost.attention),
        plan_bytes=size,
        build_seconds=seconds,
        refused=_refused(calls, cost.head_dim),
    )


def _refused(calls: list[MethodCall], head_dim: int) -> dict[str, dict[str, str]]:
    """By architecture, the backends that cannot run all of these, and why."""
    found = {}
    for architecture in dict.fromkeys(gpu.architecture for gpu in GPUS.values() if calls):
        found[architecture] = reasons = {}
        for call in calls:
            asked = architecture, head_dim, torch.bfloat16, call.plan, call.kv_log_weight
            reasons |= reasons_on(*asked)
    return found


def _amount(method: Method, layout: Layout, cost: Cost) -> tuple[Amount, MethodCall | None]:
    """Of a planning method, from its plan; that of random q and k has as many blocks."""
    if method.computes:
        call = None
        for part in method.parts:
            _, call = _amount(part, layout, cost)
        kept = None if call is None else Kept(None, call.plan)
        return method.amount(layout, cost.heads, cost.head_dim, kept), None
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(1, 1, layout.num_tokens, 16, generator=generator)  # noqa: E731
    with torch.no_grad():
        call = method_call(method.least(), layout, draw(), draw(), draw())
    return method.amount(layout, cost.heads, cost.head_dim, call.plan), call


def _list_bytes(plan: Plan) -> int:
    lists = (plan.kv_indices, plan.kv_num_blocks, plan.kv_num_full_blocks, plan.kv_blocks.order)
    lists = [x for x in (*lists, *plan.q_blocks, *plan.kv_blocks[:2]) if x is not None]
    return sum(x.element_size() * x.numel() for x in lists)
