"""Head-perturbation guidance in plain pipelines: an extra, weakened pass at each guided step."""

from __future__ import annotations

import contextlib
import weakref
from pathlib import Path

import torch

from dittfast.methods.dense import Dense
from dittfast.methods.head_guidance import HeadGuidance

from .adapter import attention_layers, disable, enable, family_of, transformers_of
from .seam import Perturbation, is_swapped
from .state import ModelState


class GuidanceState:
    """The guidance of one transformer: strengths per layer, and the last guided difference."""

    def __init__(self, config: HeadGuidance, strengths: dict[str, torch.Tensor], implicit: bool):
        self.config = config
        self.strengths = strengths
        # Whether guide() enabled the pipeline itself, so that unguide() has to disable it.
        self.implicit = implicit
        self.delta: torch.Tensor | None = None
        self._perturbations: dict = {}
        self._last: tuple[weakref.ref, ...] = ()

    def guide(self, model, state: ModelState, arguments: dict, out):
        """The prediction with ``guidance_scale * (cond - weakened)`` added.

        Two-call pipelines run "cond", then "uncond" of the same step: both get the difference, so
        that ``u + d + g ((c + d) - (u + d)) = u + g (c - u) + d`` for any g. Batched pipelines
        stack [uncond, cond]: the weakened pass runs the second half.
        """
        if state.context == "uncond" or self._is_second_call(model, state, arguments):
            delta, self.delta = self.delta, None
            return out if delta is None else _add(out, delta)
        self.delta = None
        step, _ = state.session.step(state.family, arguments)
        if self.config.guidance_scale == 0 or not self.config.is_guided_step(step):
            return out
        if not torch.is_tensor(arguments.get("hidden_states")):
            raise ValueError(
                f"{type(model).__name__} takes no hidden_states [B, ...], so guidance cannot tell "
                "its batch; guidance does not support it"
            )
        batch = arguments["hidden_states"].shape[0]
        batched = state.context is None and getattr(
            state.session.pipe, "do_classifier_free_guidance", False
        )
        prediction = _tensor(out)
        conditional = prediction
        if batched:
            arguments = _second_half(arguments, batch)
            conditional = prediction[batch // 2 :]
            if any(len(rows) > 1 for rows in state.sequences.kinds):
                # What was read describes the rows of the whole batch.
                state.prepare(model, arguments)
        with perturbed(model, state, self):
            weakened = _tensor(torch.nn.Module.__call__(model, **arguments))
        delta = self.config.guidance_scale * (conditional - weakened)
        self.delta = delta
        return _add(out, torch.cat([delta, delta]) if batched else delta)

    def _is_second_call(self, model, state: ModelState, arguments: dict) -> bool:
        """Whether a pipeline that names no cache context runs its uncond call now.

        Some image-to-image and reference pipelines do not say which call is which: they pass the
        same latents tensor again with another text.
        """
        if state.session.pipe is model:
            return False
        tensors = [arguments.get(name) for name in ("hidden_states", "encoder_hidden_states")]
        before, self._last = self._last, ()
        if state.context is not None or not all(torch.is_tensor(x) for x in tensors):
            return False
        if before and before[0]() is tensors[0] and before[1]() is not tensors[1]:
            return True
        self._last = tuple(map(weakref.ref, tensors))
        return False


@contextlib.contextmanager
def perturbed(model: torch.nn.Module, state: ModelState, guidance: GuidanceState):
    """Inside, the chosen heads of ``model`` are weakened.

    Raises:
        ValueError: prompts of different length in one batch, whose image tokens differ in place.
    """
    if state.sequences.rows_differ:
        raise ValueError(
            "guidance needs prompts of one length in a batch, and this model lays out each row by "
            "its own; run the prompts one at a time"
        )
    key = state.layout
    if key not in guidance._perturbations:
        guidance._perturbations[key] = Perturbation(guidance.config.rows, key)
    device = next(model.parameters()).device
    changed = [state.layers[name] for name in guidance.strengths]
    cached = getattr(model, "is_cache_enabled", False)
    context = model.cache_context("perturbed") if cached else contextlib.nullcontext()
    try:
        for name, layer in zip(guidance.strengths, changed):
            layer.strength = guidance.strengths[name] = guidance.strengths[name].to(device)
            layer.perturbation = guidance._perturbations[key]
        with context:
            yield
    finally:
        for layer in changed:
            layer.perturbation = layer.strength = None


def _tensor(out) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out.sample


def _add(out, delta: torch.Tensor):
    moved = _tensor(out) + delta
    return (moved, *out[1:]) if isinstance(out, tuple) else type(out)(sample=moved)


def _second_half(value, batch: int, name: str = ""):
    """The conditional half of batched forward arguments; position ids have no batch."""
    if isinstance(value, dict):
        return {key: _second_half(x, batch, key) for key, x in value.items()}
    batched = torch.is_tensor(value) and value.ndim > 0 and value.shape[0] == batch
    return value[batch // 2 :] if batched and not name.endswith("_ids") else value


def head_counts(pipe) -> list[int]:
    """The number of heads in every self-attention layer, in the order of the model."""
    model = next(iter(transformers_of(pipe).values()))
    family = model._dittfast.family if is_swapped(model) else family_of(model)
    return [module.heads for module in attention_layers(model, family).values()]


def head_strengths(state: ModelState, model, config: HeadGuidance) -> dict[str, torch.Tensor]:
    """``[H]`` strengths by layer name.

    Raises:
        ValueError: a layer or a head that the model does not have; all that exist are said.
    """
    names = list(state.layers)
    found: dict[str, torch.Tensor] = {}
    for (layer, head), strength in zip(config.heads, config.strengths):
        if isinstance(layer, int) and -len(names) <= layer < len(names):
            name = names[layer]
        elif layer in state.layers:
            name = layer
        else:
            raise ValueError(
                f"layer {layer!r} does not exist; this model has {len(names)} self-attention "
                f"layers, 0..{len(names) - 1}, named {names[0]} ... {names[-1]}"
            )
        num_heads = model.get_submodule(name).heads
        if not 0 <= head < num_heads:
            raise ValueError(
                f"head {head} of {name} does not exist; its heads are 0..{num_heads - 1}"
            )
        found.setdefault(name, torch.zeros(num_heads))[head] = strength
    return found


class Guided:
    """What :func:`guide` returns; as a context manager it stops guiding on exit."""

    def __init__(self, pipe):
        self._pipe = pipe

    def __enter__(self):
        return self

    def __exit__(self, *error):
        unguide(self._pipe)


def guide(pipe, config: HeadGuidance | None = None, **options) -> Guided:
    """Guide a pipeline by weakened heads; composes with a method that is enabled on it.

    Costs one more conditional pass at every guided step, with classifier-free guidance or without.

    Args:
        pipe: a pipeline or transformer, enabled (:func:`dittfast.enable`, call it first) or not.
        config: a HeadGuidance, or its fields as ``options``; ``heads`` may be the path of a file
            that :func:`dittfast.hunt` wrote, whose settings hold where no option says otherwise.

    Returns:
        A handle; ``with dittfast.guide(...):`` stops guiding on exit.

    Raises:
        ValueError: a field out of range, a layer or head that does not exist, a pipeline that is
            guided already.
    """
    if config is None and isinstance(options.get("heads"), (str, Path)):
        config = HeadGuidance.load(options.pop("heads"), **options)
    elif config is None:
        config = HeadGuidance(**options)
    elif options:
        raise ValueError(f"give a HeadGuidance or its fields, not both; got {sorted(options)} too")
    models = transformers_of(pipe)
    implicit = not any(is_swapped(model) for model in models.values())
    if implicit:
        enable(pipe, Dense())
    try:
        found = {}
        for name, model in models.items():
            state: ModelState = model._dittfast
            if state.guidance is not None:
                raise ValueError(
                    "this pipeline is guided already; call dittfast.unguide(pipe) first"
                )
            strengths = head_strengths(state, model, config)
            found[name] = GuidanceState(config, strengths, implicit)
    except ValueError:
        if implicit:
            disable(pipe)
        raise
    for name, model in models.items():
        model._dittfast.guidance = found[name]
    return Guided(pipe)


def unguide(pipe) -> None:
    """Stop guiding; a pipeline that :func:`guide` found plain is plain again, exactly.

    Raises:
        ValueError: the pipeline is not guided.
    """
    states = [m._dittfast for m in transformers_of(pipe).values() if is_swapped(m)]
    guided = [state for state in states if state.guidance is not None]
    if not guided:
        raise ValueError("this pipeline is not guided; there is nothing to undo")
    implicit = guided[0].guidance.implicit
    for state in guided:
        state.guidance = None
    if implicit:
        disable(pipe)
