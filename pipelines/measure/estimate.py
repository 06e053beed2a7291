"""What each method would keep and cost at a published model's real size: computed, not measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from time import perf_counter

import torch

from dittfast.config import resolve
from dittfast.layout import Layout
from dittfast.methods import METHODS
from dittfast.methods.base import Method
from dittfast.plan import Plan

from ..families import FAMILIES
from ..families.published import PublishedModel
from ..models import attention_layers
from .cost import Cost, forward_cost


@dataclass(frozen=True)
class Estimate:
    """One method at one size.

    Attributes:
        method, settings: its name, and the preset or options asked for.
        density: kept fraction of the token pairs in a sparse layer.
        at_least: whether the method may keep more, by what q and k are.
        dense_layers: of the model's self-attention layers.
        attention: FLOPs of all self-attention layers in a sparse step, dense layers included. The
            choice of blocks from q and k is not counted.
        fewer_flops: FLOPs of a dense pass over those of a sparse one.
        plan_bytes: block lists, of one layer; per head where they are chosen from q and k.
        build_seconds: to make the plan, on this machine's CPU.
        problem: why the method cannot run here; the numbers are then 0.
    """

    method: str
    settings: str
    density: float = 0.0
    at_least: bool = False
    dense_layers: int = 0
    attention: float = 0.0
    fewer_flops: float = 0.0
    plan_bytes: int = 0
    build_seconds: float = 0.0
    problem: str | None = None


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
    names = list(attention_layers(model, FAMILIES[card.model]))
    estimates = [
        method_estimate(settings, method, len(schedule.dense_layer_names(names)), layout, cost)
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
    settings: str, method: Method, dense_layers: int, layout: Layout, cost: Cost
) -> Estimate:
    """What ``method`` keeps and costs on ``layout``."""
    start = perf_counter()
    try:
        plan = _plan(method, layout)
    except ValueError as error:
        return Estimate(method.name, settings, problem=str(error))
    seconds = perf_counter() - start
    sparse = plan.flops(cost.head_dim, cost.heads)
    attention = (cost.layers - dense_layers) * sparse + dense_layers * cost.attention / cost.layers
    lists = (plan.kv_indices, plan.kv_num_blocks, plan.kv_num_full_blocks, plan.kv_blocks.order)
    lists = [x for x in (*lists, *plan.q_blocks, *plan.kv_blocks[:2]) if x is not None]
    return Estimate(
        method.name,
        settings,
        density=plan.density,
        at_least=method.least() != method,
        dense_layers=dense_layers,
        attention=attention,
        fewer_flops=cost.speedup(attention / cost.attention),
        plan_bytes=sum(x.element_size() * x.numel() for x in lists),
        build_seconds=seconds,
    )


def _plan(method: Method, layout: Layout) -> Plan:
    """The plan; where it is chosen from q and k, that of random ones, which has as many blocks."""
    if method.static:
        return method.plan(layout)
    method = method.least()
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(1, 1, layout.num_tokens, 16, generator=generator)  # noqa: E731
    with torch.no_grad():
        return method.plan(layout, draw(), draw(), draw())
