"""Head-perturbation guidance in plain pipelines: an extra, weakened pass at each guided step."""

from __future__ import annotations

import contextlib
import copy
import threading
import weakref
from pathlib import Path
from typing import Any

import torch

from dittfast.methods.dense import Dense
from dittfast.methods.head_guidance import HeadGuidance

from ..adapter import disable, enable
from ..models import Pipeline, attention_layers, family_of, is_swapped, transformers_of
from ..passes import Pass
from ..state import ModelState
from .perturbation import HeadWeakening, head_strengths


class _Here(threading.local):
    def __init__(self):
        self.delta: torch.Tensor | None = None
        self.seen: tuple[weakref.ref, ...] = ()


class GuidanceState:
    """The guidance of one transformer: what it weakens, and each thread's last difference."""

    def __init__(self, weakening: HeadWeakening):
        self.weakening = weakening
        self.config = weakening.config
        self._here = _Here()

    def __deepcopy__(self, memo):
        return GuidanceState(copy.deepcopy(self.weakening, memo))

    def describe(self) -> str:
        heads = len(self.config.heads)
        return f"guided by {heads} weakened heads: one more pass at guided steps"

    def guide(self, model, state: ModelState, done: Pass, arguments: dict, out):
        """The prediction with ``guidance_scale * (cond - weakened)`` added.

        Two-call pipelines run "cond", then "uncond" of the same step: both get the difference, so
        that ``u + d + g ((c + d) - (u + d)) = u + g (c - u) + d`` for any g. Batched pipelines
        stack [uncond, cond]: the weakened pass runs the second half.
        """
        here = self._here
        if state.context == "uncond" or self._is_second_call(model, state, arguments):
            delta, here.delta = here.delta, None
            return out if delta is None else added(out, delta)
        here.delta = None
        if self.config.guidance_scale == 0 or not self.config.is_guided_step(done.step[0]):
            return out
        if state.family.fills_cache(arguments):
            return out
        latents = arguments[state.family.latents]
        batch = len(latents)
        parts = self._num_parts(state, latents)
        prediction = conditional = prediction_of(out)
        if parts > 1:
            size = batch // parts
            rows = slice(size) if state.family.cond_first else slice(batch - size, None)
            kinds = (list, torch.Tensor) if isinstance(latents, list) else (torch.Tensor,)
            arguments = _part(arguments, batch, rows, kinds)
            conditional = prediction[rows]
            if any(len(rows) > 1 for rows in done.sequences.kinds):
                # What was read describes the rows of the whole batch.
                done = state.begin(model, arguments)
        weak = self.weakening.weakened(model, done)
        cached = getattr(model, "is_cache_enabled", False)
        context = model.cache_context("perturbed") if cached else contextlib.nullcontext()
        with state.passes.under_way(weak), context:
            weakened = prediction_of(torch.nn.Module.__call__(model, **arguments))
        done.forget()
        scale = self.config.guidance_scale
        here.delta = delta = each(lambda c, w: scale * (c - w), conditional, weakened)
        if parts > 1:
            delta = torch.cat([delta] * parts) if torch.is_tensor(delta) else delta * parts
        return added(out, delta)

    def _num_parts(self, state: ModelState, latents) -> int:
        """How many predictions of the same latents a pass holds: conditional, unconditional.

        OmniGen has a third, of its reference images alone.
        """
        if state.context is not None:
            return 1
        pipe = state.session.pipe
        guided = getattr(pipe, "do_classifier_free_guidance", None)
        if guided and torch.is_tensor(latents):
            return 2
        # Some pipelines do not say whether they guide. Others drop the other half in part of the
        # steps (cfg_truncation), and say so nowhere. All parts start from the same latents.
        if guided is None:
            scale = getattr(pipe, "guidance_scale", None)
            guided = scale is not None and scale > 1
        for parts in (2, 3) if guided else ():
            size, rest = divmod(len(latents), parts)
            if not rest and all(map(torch.equal, latents[size:], latents[: len(latents) - size])):
                return parts
        return 1

    def _is_second_call(self, model, state: ModelState, arguments: dict) -> bool:
        """Whether a pipeline that names no cache context runs its uncond call now.

        Some image-to-image and reference pipelines do not say which call is which: they pass the
        same latents tensor again with another text.
        """
        if state.session.pipe is model:
            return False
        names = state.family.latents, "encoder_hidden_states"
        tensors = [arguments.get(name) for name in names]
        before, self._here.seen = self._here.seen, ()
        if state.context is not None or not all(torch.is_tensor(x) for x in tensors):
            return False
        if before and before[0]() is tensors[0] and before[1]() is not tensors[1]:
            return True
        self._here.seen = tuple(map(weakref.ref, tensors))
        return False


Prediction = torch.Tensor | list[torch.Tensor]


def prediction_of(out) -> Prediction:
    """What a transformer predicts, in whichever form it was returned: ``[B, ...]`` or a list."""
    if isinstance(out, torch.Tensor):
        return out
    return out[0] if isinstance(out, tuple) else out.sample


def each(function, *predictions: Prediction) -> Prediction:
    if isinstance(predictions[0], torch.Tensor):
        return function(*predictions)
    return [function(*parts) for parts in zip(*predictions)]


def added(out, delta: Prediction):
    """``out`` with ``delta`` added to its prediction, in the form it came in."""
    moved = each(torch.add, prediction_of(out), delta)
    if isinstance(out, torch.Tensor):
        return moved
    return (moved, *out[1:]) if isinstance(out, tuple) else type(out)(sample=moved)


def _part(value, batch: int, rows: slice, kinds: tuple[type, ...], name: str = ""):
    """Some rows of batched forward arguments of these kinds; places ``[N, axes]`` have no batch."""
    if isinstance(value, dict):
        if value and all(isinstance(key, int) for key in value):  # by batch row
            first, end, _ = rows.indices(batch)
            return {key - first: x for key, x in value.items() if first <= key < end}
        return {key: _part(x, batch, rows, kinds, key) for key, x in value.items()}
    if not isinstance(value, kinds) or (torch.is_tensor(value) and value.ndim == 0):
        return value
    is_places = torch.is_tensor(value) and value.ndim == 2 and value.shape[1] in (3, 4)
    return value if len(value) != batch or (is_places and name.endswith("_ids")) else value[rows]


def heads_by_layer(model: torch.nn.Module) -> dict[str, int]:
    """The number of heads of every self-attention layer, in the order of the model."""
    family = model._dittfast.family if is_swapped(model) else family_of(model)
    return {
        name: family.num_heads(module) for name, module in attention_layers(model, family).items()
    }


def head_counts(pipe) -> list[int]:
    """The number of heads in every self-attention layer, in the order of the model."""
    return list(heads_by_layer(next(iter(transformers_of(pipe).values()))).values())


class Guided:
    """What :func:`guide` returns; as a context manager it stops guiding on exit."""

    def __init__(self, guided: list[tuple[torch.nn.Module, GuidanceState]]):
        self._guided = guided
        self._depth = 0

    def __enter__(self) -> Guided:
        self._depth += 1
        return self

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        for model, guidance in self._guided:
            if is_swapped(model) and model._dittfast.guidance is guidance:
                _stop(model)


def _stop(model: torch.nn.Module) -> None:
    """Take the guidance off a transformer, and dittfast with it where that is all there was."""
    model._dittfast.guidance = None
    if model._dittfast.only_guided:
        disable(model)


def guide(pipe: Pipeline, config: HeadGuidance | None = None, **options: Any) -> Guided:
    """Guide a pipeline by weakened heads; composes with a method that is enabled on it.

    Costs one more conditional pass at every guided step, with classifier-free guidance or without.

    Args:
        pipe: a pipeline or transformer, enabled (:func:`dittfast.enable`) or not.
        config: a HeadGuidance, or its fields as ``options``; ``heads`` may be the path of a file
            that :func:`dittfast.hunt` wrote, whose settings hold where no option says otherwise.

    Returns:
        A handle; ``with dittfast.guide(...):`` stops guiding on exit.

    Raises:
        ValueError: a field out of range, a layer or head that does not exist, a pipeline that is
            guided already, or whose unconditional predictions another transformer makes.
    """
    if config is None and isinstance(options.get("heads"), (str, Path)):
        config = HeadGuidance.load(options.pop("heads"), **options)
    elif config is None:
        config = HeadGuidance(**options)
    elif options:
        raise ValueError(f"give a HeadGuidance or its fields, not both; got {sorted(options)} too")
    models = transformers_of(pipe)
    if "unconditional_transformer" in models:
        raise ValueError(
            f"{type(pipe).__name__} makes its unconditional predictions with another transformer, "
            "and guidance would have to add the difference there too, which it does not"
        )
    plain = [model for model in models.values() if not is_swapped(model)]
    guided = []
    for model in models.values():
        if is_swapped(model) and model._dittfast.guidance is not None:
            raise ValueError("this pipeline is guided already; call dittfast.unguide(pipe) first")
        weakening = HeadWeakening(config, head_strengths(heads_by_layer(model), config))
        guided.append((model, GuidanceState(weakening)))
    if len(plain) == len(models):
        enable(pipe, Dense())
    else:
        for model in plain:
            enable(model, Dense())
    for model, guidance in guided:
        model._dittfast.guidance = guidance
        model._dittfast.only_guided = any(model is m for m in plain)
    return Guided(guided)


def unguide(pipe: Pipeline) -> None:
    """Stop guiding; a pipeline that :func:`guide` found plain is plain again, exactly.

    Raises:
        ValueError: the pipeline is not guided.
    """
    models = [m for m in transformers_of(pipe).values() if is_swapped(m)]
    guided = [model for model in models if model._dittfast.guidance is not None]
    if not guided:
        raise ValueError("this pipeline is not guided; there is nothing to undo")
    for model in guided:
        _stop(model)
