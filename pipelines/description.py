"""describe: which layers run which method, how much of it, and what is dense and why."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field

import torch

from dittfast.methods.amount import UNKNOWN, Amount, mean_amount
from dittfast.methods.base import Method
from dittfast.mixture import Mixture, leaves
from dittfast.schedule import Schedule

from .models import Pipeline, attention_backend, exchanged, is_swapped, transformers_of
from .state import ModelState


@dataclass(frozen=True)
class LayerDescription:
    """One self-attention layer.

    Attributes:
        name: of the module.
        dense: why it is dense; None where it is sparse.
        methods: what it runs at some step, in words.
        amount: density and work there, as far as they are known.
    """

    name: str
    dense: str | None = None
    methods: tuple[str, ...] = ()
    amount: Amount = UNKNOWN


@dataclass(frozen=True)
class Description:
    """What runs where. ``str()`` of it is a table for people.

    Attributes:
        method, schedule, backend: as enabled.
        num_tokens: tokens of the last forward pass; None before the first.
        density: kept fraction of token pairs in the sparse layers, averaged over all calls so far
            where the method chooses from q and k at every call. None before the first pass, for
            such a method under torch.compile, which leaves the counting out, and where a layer's
            method computes its own output, which keeps no pairs.
        dense_attention: the attention backend of diffusers on which dense layers and steps run.
        layers: every self-attention layer, and why it is dense.
        notes: what else stays dense.
        num_passes, num_sparse: forward passes so far, and how many of them ran the method.
        num_steps: denoising steps of the last run; None where nothing had to know.
        work: FLOPs of attention in the sparse layers over those of dense attention; None where
            density is, but for methods that compute their own output.
    """

    method: Method
    schedule: Schedule
    backend: str
    num_tokens: int | None
    density: float | None
    dense_attention: str
    layers: tuple[LayerDescription, ...]
    notes: tuple[str, ...] = field(default=())
    num_passes: int = 0
    num_sparse: int = 0
    num_steps: int | None = None
    work: float | None = None

    @property
    def amount(self) -> Amount:
        """Density and work of the sparse layers."""
        return Amount(self.density, self.work)

    @property
    def did_not_run(self) -> str | None:
        """Why the method has run nowhere, in words; None where it ran, or before the first pass."""
        if not self.num_passes:
            return None
        # A later, shorter sequence may be below min_tokens.
        now = [x.dense for x in self.layers if x.dense is None or "min_tokens" in x.dense]
        if self.num_sparse and now:
            return None
        if all(layer.dense for layer in self.layers):
            why = "; ".join(dict.fromkeys(layer.dense for layer in self.layers if layer.dense))
            remedy = "; min_tokens=0 runs it at any size" if "min_tokens" in why else ""
            return f"0 of {len(self.layers)} layers sparse: {why}{remedy}"
        steps = f"0 of {self.num_passes} passes"
        if self.num_steps is not None:
            steps = f"0 of {self.num_steps} denoising steps"
        first, last = self.schedule.dense_first_steps, self.schedule.dense_last_steps
        if isinstance(self.method, Mixture) and not first + last:
            return f"{steps} sparse: they lie in the steps of no rule"
        return (
            f"{steps} sparse: all belong to dense steps (dense_first_steps={first}, "
            f"dense_last_steps={last}); take more steps or keep fewer dense"
        )

    def to_dict(self) -> dict:
        """Plain data, for JSON."""
        return {
            "method": self.method.to_dict(),
            "schedule": asdict(self.schedule),
            "backend": self.backend,
            "dense_attention": self.dense_attention,
            "num_tokens": self.num_tokens,
            "density": self.density,
            "work": self.work,
            "sparse_layers": [x.name for x in self.layers if x.dense is None],
            "dense_layers": {x.name: x.dense for x in self.layers if x.dense is not None},
            **self._by_layer(),
            "notes": list(self.notes),
            "num_passes": self.num_passes,
            "num_sparse_passes": self.num_sparse,
            "did_not_run": self.did_not_run,
        }

    def _by_layer(self) -> dict:
        """What each layer runs, where that differs."""
        if not isinstance(self.method, Mixture):
            return {}
        layers = {
            x.name: {"methods": list(x.methods), **x.amount._asdict()}
            for x in self.layers
            if x.dense is None
        }
        return {"layers": layers}

    def __str__(self) -> str:
        lines = [f"method    {self.method}", f"schedule  {self.schedule}"]
        lines.append(f"backend   {self.backend}; dense layers and steps on {self.dense_attention}")
        if self.num_tokens is None:
            lines.append("tokens    known after the first forward pass")
        else:
            lines.append(f"tokens    {self.num_tokens:,}")
            lines.append(self._amount_line())
        sparse = sum(x.dense is None for x in self.layers)
        ran = "sparse" if self.did_not_run is None or not sparse else "would be sparse"
        lines.append(f"layers    {len(self.layers)} self-attention: {sparse} {ran}")
        if isinstance(self.method, Mixture):
            lines.extend(self._mixture_lines())
        reasons: dict[str, list[str]] = {}
        for layer in self.layers:
            if layer.dense is not None:
                reasons.setdefault(layer.dense, []).append(layer.name)
        for reason, names in reasons.items():
            shown = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
            lines.append(f"          {len(names)} dense: {reason} ({shown})")
        if self.did_not_run is not None:
            lines.append(f"nothing   {self.method.name} did not run: {self.did_not_run}")
        lines.extend(f"note      {note}" for note in self.notes)
        return "\n".join(lines)

    def _amount_line(self) -> str:
        if self.density is None and self.work is not None:
            return f"FLOPs     {self.work:.2%} of dense attention in sparse layers"
        planners = [m.planner for m in leaves(self.method)]
        dynamic = not all(p is None or p.static for p in planners)
        words = "known after the first sparse pass"
        if dynamic:
            words = "chosen from q and k at every call"
        if self.density is not None:
            words = f"{self.density:.1%} of token pairs in sparse layers"
            words += ", mean over calls" if dynamic else ""
        return f"density   {words}"

    def _mixture_lines(self) -> list[str]:
        """Layers that run the same, together."""
        same: dict[tuple, list[str]] = {}
        for layer in self.layers:
            if layer.dense is None:
                same.setdefault((layer.methods, str(layer.amount)), []).append(layer.name)
        lines = []
        for (methods, amount), names in same.items():
            shown = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
            lines.append(f"          {len(names)} {' | '.join(methods)} ({shown}): {amount}")
        return lines


def describe(pipe: Pipeline) -> Description:
    """Which layers run which method, how much of it, and what is dense and why.

    Raises:
        ValueError: dittfast is not enabled on this pipeline.
    """
    models = {n: m for n, m in transformers_of(pipe).items() if is_swapped(m)}
    if not models and exchanged(pipe):
        raise ValueError(
            "the transformer that dittfast was enabled on is no longer in this pipeline, and the "
            "present one is stock; call dittfast.enable(pipe, ...) for it"
        )
    if not models:
        raise ValueError("dittfast is not enabled on this pipeline; call dittfast.enable first")
    layers, notes = [], []
    num_tokens = num_steps = None
    num_passes = num_sparse = 0
    for component, model in models.items():
        state: ModelState = model._dittfast
        prefix = "" if len(models) == 1 else f"{component}."
        if state.layout is not None:
            num_tokens = state.layout.num_tokens
        for name in state.layers:
            layers.append(_describe_layer(state, prefix, name))
        notes.extend(prefix + note for note in other_attention(model, state))
        if state.sequences is not None and state.sequences.rows_differ:
            notes.append(f"{prefix}the batch rows differ in layout; the numbers are the first's")
        num_passes += state.num_passes
        num_sparse += state.num_sparse
        if state.last is not None and state.last.step is not None:
            num_steps = state.last.step[1]
        if state.remembers and state.lasting.keeps:
            notes.append(f"{prefix}{_plans_kept(state)}")
        if state.guidance is not None:
            notes.append(prefix + state.guidance.describe())
    session = state.session
    sparse = [(1, layer.amount) for layer in layers if layer.dense is None]
    amount = mean_amount(sparse)
    notes.extend(dense_steps(session.schedule))
    notes.extend(other_models(pipe))
    return Description(
        session.method,
        session.schedule,
        session.backend,
        num_tokens,
        amount.density,
        ", ".join(sorted({attention_backend(model) for model in models.values()})),
        tuple(layers),
        tuple(notes),
        num_passes,
        num_sparse,
        num_steps,
        amount.work,
    )


def _plans_kept(state: ModelState) -> str:
    """How long plans last, and what came of it."""
    words, tally = state.lasting.words(), state.tally
    return f"plans from q and k last {words}: {tally.made} made, used again {tally.again} times"


def _describe_layer(state: ModelState, prefix: str, name: str) -> LayerDescription:
    why = _why_dense(state, name)
    methods = tuple(str(rule) for rule in state.assignment.rules(name))
    return LayerDescription(prefix + name, why, methods, state.amount(name))


def _why_dense(state: ModelState, name: str) -> str | None:
    if name in state.dense_layers:
        return "dense_layers of the schedule"
    if state.session.method.dense:
        return "the method is dense"
    if not state.assignment.ever(name):
        return "no rule gives it a method"
    # Methods that met this sequence, and were not worth it on so few tokens.
    made = state.assignment.made(name) if state.layout is not None else ()
    known = [method for method in made if method in state.break_even]
    if known and not any(state.last_part(method) for method in known):
        least = min(state.break_even[method] for method in known)
        return f"{state.layout.num_tokens:,} tokens are below min_tokens {least:,}"
    done = state.last
    missed = done is not None and name in done.ran and name not in done.reached
    if missed and done.runs[name].core is not None:
        return "its sequence has another length than the layout"
    return None


def other_attention(model: torch.nn.Module, state: ModelState) -> list[str]:
    """One sentence for each kind of attention that the method does not touch, and why."""
    kinds: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if callable(getattr(module, "processor", None)) and name not in state.layers:
            reasons = (why for names, why in state.family.dense if re.fullmatch(names, name))
            why = next(reasons, "not self-attention over the image or video")
            kinds.setdefault(why, []).append(name)
    return [
        f"{len(names)} other attention modules are dense: {why} ({names[0]}"
        + (f" ... {names[-1]})" if len(names) > 1 else ")")
        for why, names in kinds.items()
    ]


def other_models(pipe) -> list[str]:
    """One sentence for each model with attention over the image that is not a transformer."""
    components = getattr(pipe, "components", None)
    return [
        f"{name} ({type(module).__name__}) is dense: only the transformers are changed"
        for name, module in (components if isinstance(components, dict) else {}).items()
        if name.startswith("controlnet") and isinstance(module, torch.nn.Module)
    ]


def dense_steps(schedule: Schedule) -> list[str]:
    """Which denoising steps are dense, in words."""
    counts = [("first", schedule.dense_first_steps), ("last", schedule.dense_last_steps)]
    return [f"the {which} {n} denoising steps are dense" for which, n in counts if n]
