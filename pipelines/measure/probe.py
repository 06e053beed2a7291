"""What a method does to the q, k and v of a real run: density and mass kept, head by head."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from PIL import Image

from dittfast.attention import attend, computing_call, method_call
from dittfast.layout import Layout
from dittfast.measure.check import computed_amount, detached, mask_rows
from dittfast.measure.draw import kept_mass
from dittfast.methods.base import Method
from dittfast.methods.head_groups import select_heads, split
from dittfast.plan import Plan

from ..adapter import enable
from ..guidance.plain import heads_by_layer
from ..layer import key_log_weight
from ..models import transformers_of
from ..runs.run import run

# Query rows whose attention is computed at once.
_ROWS = 256


@dataclass(frozen=True)
class Captured:
    """The inputs of one attention call of a dense run.

    Attributes:
        step: the denoising step, from 0. layer: the module's name.
        layout: geometry of the N tokens.
        q, k, v: ``[B, H, N, D]``, after norms and rotary embedding.
        scale: of the logits. kv_log_weight: ``[B|1, H|1, N]`` from the model's mask, or None.
        hidden_states: ``[B, N, C]``, what q, k and v were projected from; None where not asked for.
    """

    step: int
    layer: str
    layout: Layout
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    kv_log_weight: torch.Tensor | None = None
    hidden_states: torch.Tensor | None = None


class Recorder:
    """Stands in a layer for every pass: tells of calls of attention, and leaves their output.

    Args:
        steps: the denoising steps whose calls are told of; of a step with several passes the first.
        on_call: called with the inputs, which are the model's own tensors, the layer's output
            ``[B, H, N, D]``, and the call's arguments by name.
        hidden_states: as in :class:`Family`, to be told of what the layer was given, too.
    """

    strict, shortcut = True, None

    def __init__(
        self,
        model: torch.nn.Module,
        layer: str,
        steps: Collection[int],
        on_call: Callable[[Captured, torch.Tensor, dict], None],
        hidden_states: tuple[str, str] | None = None,
    ):
        self.model, self.layer, self.steps, self.on_call = model, layer, steps, on_call
        self.hidden_states = hidden_states
        self.seen: set[int] = set()

    @property
    def layout(self) -> Layout:
        """Of the pass under way."""
        return self.model._dittfast.passes.current.sequences.layout

    @property
    def num_tokens(self) -> int:
        return self.layout.num_tokens

    @property
    def text_before(self) -> int:
        return self.layout.grid_start

    @property
    def text_behind(self) -> int:
        return self.layout.text_behind

    def covers(self, num_tokens: int) -> bool:
        return num_tokens == self.num_tokens

    def __call__(self, out: torch.Tensor, strength, call: dict) -> torch.Tensor:
        state = self.model._dittfast
        step, _ = state.passes.current.step
        if step in self.steps and step not in self.seen:
            self.seen.add(step)
            q, k, v = (call[name].detach() for name in ("query", "key", "value"))
            scale = call.get("scale")
            scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
            token = self.layout.grid_start if state.family.outer_mask else None
            weight = key_log_weight(call.get("attn_mask"), q, token)
            hidden = call.get("hidden_states")
            given = scale, weight, None if hidden is None else hidden.detach()
            self.on_call(Captured(step, self.layer, self.layout, q, k, v, *given), out, call)
        return out


def check_places(
    pipe, call: dict, steps: Sequence[int] = (), layers: Sequence[int] | None = None
) -> None:
    """Raise ValueError for a step or a layer that a run of the pipeline does not have.

    Args:
        pipe: a pipeline, enabled or not, with weights or without.
    """
    total = call["num_inference_steps"]
    for step in steps:
        if not 0 <= step < total:
            raise ValueError(f"steps must lie in 0..{total - 1} for this run, got {step}")
    counts = [len(heads_by_layer(model)) for model in transformers_of(pipe).values()]
    for number in layers or ():
        for count in counts:
            if not -count <= number < count:
                raise ValueError(f"layers must lie in 0..{count - 1} for this model, got {number}")


def capture(
    pipe,
    call: dict,
    *,
    steps: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    hidden_states: bool = False,
) -> list[Captured]:
    """Run a pipeline with dense attention and keep q, k and v of some attention calls.

    Args:
        pipe: a pipeline that dittfast can read, not enabled.
        call: arguments of the pipeline, see :func:`~dittfast.pipelines.runs.call.call_arguments`.
        steps: denoising steps, from 0; default the middle one. Of a step with several passes
            (two-call guidance) the first is kept.
        layers: numbers of self-attention layers in the model's order; negative ones count from
            the end; default all.
        hidden_states: also keep what each layer was given.

    Returns:
        One entry per step and layer, in the order of the run.

    Raises:
        ValueError: a step or layer that does not exist, and as :func:`enable`.
    """
    total = call.get("num_inference_steps")
    if total is None:
        raise ValueError("capture needs num_inference_steps in call")
    steps = [total // 2] if steps is None else list(steps)
    check_places(pipe, call, steps, layers)
    captured: list[Captured] = []

    def keep(c: Captured, out: torch.Tensor, call: dict) -> None:
        hidden = None if c.hidden_states is None else c.hidden_states.clone()
        own = dict(q=c.q.clone(), k=c.k.clone(), v=c.v.clone(), hidden_states=hidden)
        captured.append(replace(c, **own))

    with contextlib.ExitStack() as stack:
        stack.enter_context(enable(pipe, "dense"))
        for model in transformers_of(pipe).values():
            names = list(model._dittfast.layers)
            for number in range(len(names)) if layers is None else layers:
                name = names[number]
                names_of = model._dittfast.family.hidden_states if hidden_states else None
                recorder = Recorder(model, name, steps, keep, names_of)
                model._dittfast.recorders[name] = recorder
        run(pipe, call, seed)
    return captured


@dataclass(frozen=True)
class HeadReport:
    """What one head keeps of one captured call.

    Attributes:
        head: its number; the numbers are means over the batch.
        density: kept fraction of token pairs, of a method with a planner its plan's; None where a
            method keeps no pairs, because it computes its own output.
        work: FLOPs as a fraction of dense attention's.
        mass: share of dense attention's probability that lies on the pairs kept token by token,
            a mean over the grid's query rows. What a method gives back by pooled summaries or a
            correction is not in it. None where no pairs are kept.
        error: ``|out - dense| / |dense|`` of the head's output, over the same rows.
    """

    head: int
    density: float | None
    mass: float | None
    error: float
    work: float | None = None


@dataclass(frozen=True)
class CallReport:
    """What a method does to one captured call.

    Attributes:
        step, layer: as captured. heads: one report a head.
        plan: the plan the method made, or its planner; None where there is none, and of groups of
            heads that have several.
        block_mass: ``[H, nQ, nK]`` dense attention between the plan's blocks, each row adding up
            to 1 over the sequence's own keys, for the first batch row; None without a plan.
    """

    step: int
    layer: str
    heads: tuple[HeadReport, ...]
    plan: Plan | None = field(repr=False)
    block_mass: torch.Tensor | None = field(repr=False)


def measure(method: Method, captured: Captured, backend: str = "auto") -> CallReport:
    """Run ``method`` on captured q, k and v, and compare with dense attention."""
    c, num_heads = captured, captured.q.shape[1]
    heads, last = {}, None
    groups = split(method, num_heads)
    for group in groups:
        own = list(group.heads)
        q, k, v = (select_heads(x, group.heads, num_heads) for x in (c.q, c.k, c.v))
        weight = c.kv_log_weight
        if weight is not None and weight.shape[1] > 1:
            weight = weight[:, own]
        part = replace(c, q=q, k=k, v=v, kv_log_weight=weight)
        last = _measure_heads(group.method, part, backend)
        heads |= {h: replace(x, head=h) for h, x in zip(own, last.heads)}
    reports = tuple(heads[h] for h in range(num_heads))
    plan, mass = (last.plan, last.block_mass) if len(groups) == 1 else (None, None)
    return CallReport(c.step, c.layer, reports, plan, mass)


def _measure_heads(method: Method, c: Captured, backend: str) -> CallReport:
    """The same for heads that run one method."""
    given = {"scale": c.scale, "kv_log_weight": c.kv_log_weight}
    heads, n = c.q.shape[1:3]
    method.prepare(c.layout, c.q.device)
    plan = None
    if method.computes:
        given |= {"backend": backend, "hidden_states": c.hidden_states}
        out, plan = _computed(method, c, **given)
        plans = [plan] if plan is not None and method.parts else []
        amounts = [computed_amount(method, c.layout, c.q, plans)] * heads
        if plan is not None:
            densities = [x.density for x in _plans(plan, heads)]
            amounts = [x._replace(density=d) for x, d in zip(amounts, densities)]
    else:
        plan, near_k, near_v, weight, scale = method_call(method, c.layout, c.q, c.k, c.v, **given)
        out = attend(c.q, near_k, near_v, plan, kv_log_weight=weight, scale=scale, backend=backend)
        shape = heads, c.q.shape[3]
        amounts = [method.amount(c.layout, *shape, x) for x in _plans(plan, heads)]
    is_grid = torch.from_numpy(c.layout.coordinates()[:, 0] >= 0)
    if not is_grid.any():
        is_grid = torch.ones_like(is_grid)
    k, v = (x.repeat_interleave(heads // x.shape[1], 1).double() for x in (c.k, c.v))
    valid = c.layout.kv_log_weight(c.q.device)
    kept, block_mass = torch.zeros(heads, dtype=torch.float64), None
    apart, size = torch.zeros_like(kept), torch.zeros_like(kept)
    if plan is not None:
        row_of, column_of = (_block_of(b, n) for b in (plan.q_blocks, plan.kv_blocks))
        counts = plan.q_blocks.count, plan.kv_blocks.count
        block_mass = torch.zeros(heads, *counts, dtype=torch.float64)
    for tokens in torch.arange(n).split(_ROWS):
        logits = c.q[:, :, tokens].double() @ k.transpose(-1, -2) * c.scale
        for weight in (valid, c.kv_log_weight):
            if weight is not None:
                logits = logits + weight[..., None, :].double()
        shares = torch.softmax(logits, -1)
        dense = shares @ v
        rows = is_grid[tokens].double()
        if plan is not None:
            columns = torch.zeros(heads, len(tokens), plan.kv_blocks.count, dtype=torch.float64)
            columns.index_add_(2, column_of, shares[0].cpu())
            block_mass.index_add_(1, row_of[tokens], columns)
            seen = mask_rows(plan, tokens)[..., :n]
            kept += ((shares * seen).sum(-1).mean(0).cpu() * rows).sum(-1)
        off = (out[:, :, tokens].double() - dense).square().sum((0, 3)).cpu()
        apart += (off * rows).sum(-1)
        size += (dense.square().sum((0, 3)).cpu() * rows).sum(-1)
    if plan is not None:
        block_mass /= plan.q_blocks.lengths.cpu()[:, None]
    mass, error = kept / is_grid.sum(), (apart / size).sqrt()
    reports = tuple(
        HeadReport(
            h,
            amounts[h].density,
            None if plan is None else float(mass[h]),
            float(error[h]),
            amounts[h].work,
        )
        for h in range(heads)
    )
    return CallReport(c.step, c.layer, reports, plan, block_mass)


def _computed(method: Method, c: Captured, **given) -> tuple[torch.Tensor, Plan | None]:
    """The output of a method that computes it itself, and the plan that it ran inside.

    Of a method that is made of another that is the one that attention ran under, in which rows may
    be empty; of others the one of its planner; None without one.
    """
    call, plans = computing_call(method, c.layout, c.q, c.k, c.v, **given), []

    def watched(q, k, v, plan, **options):
        plans.append(detached(plan))
        return call.attend(q, k, v, plan, **options)

    out = method.attention(c.layout, c.q, c.k, c.v, call._replace(attend=watched))
    if method.planner is None:
        return out, None
    if method.parts and len(plans) == 1:
        return out, plans[0]
    asked = {"scale": c.scale, "kv_log_weight": c.kv_log_weight}
    return out, method_call(method.planner, c.layout, c.q, c.k, c.v, **asked).plan


def kept_picture(reports: Sequence[CallReport], title: str = "") -> Image.Image:
    """Kept and dropped attention of every head, a row for each call that has a plan.

    Raises:
        ValueError: no call has one.
    """
    rows, reports = [], [report for report in reports if report.plan is not None]
    if not reports:
        raise ValueError(
            "there is no mask to draw: the method computes its own output, or has a plan for each "
            "group of heads"
        )
    for report in reports:
        plan = report.plan
        mask = plan.to_block_mask()[0].cpu().numpy()
        # Summaries that a method appends are no blocks of the sequence.
        own = plan.kv_blocks.starts.cpu() < plan.num_real_keys
        by = plan.q_blocks.starts.cpu().argsort().numpy()
        columns = plan.kv_blocks.starts.cpu()[own].argsort().numpy()
        row = []
        for head in report.heads:
            kept = mask[min(head.head, len(mask) - 1)][:, own.numpy()]
            mass = report.block_mass[head.head][:, own].numpy()
            label = f"head {head.head}: density {head.density:.2f}, mass {head.mass:.2f}"
            row.append((mass[by][:, columns], kept[by][:, columns], label))
        rows.append(row)
    return kept_mass(rows, title=title, names=[r.layer for r in reports])


def _plans(plan: Plan, heads: int) -> list[Plan]:
    """The plan of each head."""
    if plan.kv_indices.shape[1] == 1:
        return [plan] * heads
    return [plan.select_heads(slice(h, h + 1)) for h in range(heads)]


def _block_of(blocks, n: int) -> torch.Tensor:
    """``[n]``: the block each of the sequence's own tokens is in."""
    starts, lengths = blocks.starts.long().cpu(), blocks.lengths.long().cpu()
    by = torch.argsort(starts)
    block = torch.repeat_interleave(by, lengths[by])
    if blocks.order is None:
        return block[:n]
    by_token = torch.empty_like(block)
    by_token[blocks.order.long().cpu()] = block
    return by_token[:n]
