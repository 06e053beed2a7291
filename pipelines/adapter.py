"""enable and disable: put a method into a diffusers pipeline and take it out again."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from dittfast.config import resolve, unknown
from dittfast.layout import Layout
from dittfast.methods.base import Method
from dittfast.schedule import Schedule

from .families import FAMILIES, Family, bind_arguments
from .families.sequences import Sequences
from .seam import LayerState, is_swapped, restore, stock_class, swap
from .state import ModelState, Session

if TYPE_CHECKING:
    from .description import Description

logger = logging.getLogger(__name__)

LayoutReader = Callable[[torch.nn.Module, dict], Layout | Sequences]


def _forward(self, *args, **kwargs):
    state = self._dittfast
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "torch.compile is tracing a transformer on which dittfast is enabled. Compile it with "
            "pipe.transformer.compile() or pipe.transformer.compile_repeated_blocks(), which "
            "leave the reading of layout and step outside the graph"
        )
    state.prepare(self, bind_arguments(self, args, kwargs))
    out = torch.nn.Module.__call__(self, *args, **kwargs)
    state.check_reached()
    if state.guidance is not None:
        out = state.guidance.guide(self, state, bind_arguments(self, args, kwargs), out)
    return out


@contextlib.contextmanager
def _cache_context(self, name: str, **fields):
    """The model's own cache_context; remembers which pass ("cond", "uncond") is running."""
    state = self._dittfast
    before, state.context = state.context, name
    try:
        with stock_class(type(self)).cache_context(self, name, **fields):
            yield
    finally:
        state.context = before


def _unwrap(module):
    """The module inside torch.compile's wrapper."""
    return getattr(module, "_orig_mod", module)


def transformers_of(pipe) -> dict[str, torch.nn.Module]:
    """The diffusion transformers of a pipeline, or the model itself, by component name."""
    if isinstance(pipe, torch.nn.Module):
        return {"transformer": _unwrap(pipe)}
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise ValueError(
            f"expected a diffusers pipeline or a transformer, got {type(pipe).__name__}"
        )
    found = {
        name: _unwrap(module)
        for name, module in components.items()
        if isinstance(module, torch.nn.Module) and re.fullmatch(r"transformer(_\d+)?", name)
    }
    if not found:
        raise ValueError(f"{type(pipe).__name__} has no transformer; dittfast needs a DiT pipeline")
    return found


def family_of(model: torch.nn.Module, layout: Layout | LayoutReader | None = None) -> Family:
    """How a model is read: as its class is known, or by the layout given.

    Raises:
        ValueError: an unknown class without a layout, or a layout that is neither a Layout nor a
            function.
    """
    name = stock_class(type(model)).__name__
    known = FAMILIES.get(name)
    if layout is None:
        if known is None:
            raise ValueError(
                f"no layout reader for {name}; known: {', '.join(sorted(FAMILIES))}. Pass "
                "layout=Layout.image(height, width, text=...) in tokens, or a function "
                "(model, forward_arguments) -> Layout"
            )
        return known
    if not isinstance(layout, Layout) and not callable(layout):
        raise ValueError(f"layout must be a Layout or a function, got {type(layout).__name__}")
    read = (lambda model, arguments: layout) if isinstance(layout, Layout) else layout
    if known:
        return dataclasses.replace(known, read=read, reads_values=())
    return Family(".*", read, strict=False)


def attention_layers(model: torch.nn.Module, family: Family) -> dict[str, torch.nn.Module]:
    """The self-attention modules of a model, in its own order."""
    return {
        name: module
        for name, module in model.named_modules()
        if callable(getattr(module, "processor", None))
        and re.fullmatch(family.layers, name)
        and not getattr(module, "is_cross_attention", False)
    }


class Enabled:
    """What :func:`enable` returns; as a context manager it disables on exit."""

    def __init__(self, pipe):
        self._pipe = pipe

    def __enter__(self):
        return self

    def __exit__(self, *error):
        disable(self._pipe)

    def describe(self) -> Description:
        from .description import describe

        return describe(self._pipe)


class Disabled:
    """What :func:`disable` returns; as a context manager it enables again on exit."""

    def __init__(self, pipe, undone: dict):
        self._pipe = pipe
        self._undone = undone

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for name, model in transformers_of(self._pipe).items():
            _install(model, self._undone[name])


def _install(model: torch.nn.Module, state: ModelState) -> None:
    for name, module in attention_layers(model, state.family).items():
        swap(module, state.layers[name])
    methods = {"__call__": _forward}
    if hasattr(model, "cache_context"):
        methods["cache_context"] = _cache_context
    swap(model, state, **methods)


def enable(
    pipe,
    method: Method | str,
    *,
    schedule: Schedule | None = None,
    backend: str = "auto",
    layout: Layout | LayoutReader | None = None,
    **options,
) -> Enabled:
    """Make a pipeline's self-attention sparse. Checks everything first; changes nothing on error.

    The stock processors stay: their projections, norms, RoPE and output run as before, and only
    the attention call inside them is replaced.

    Args:
        pipe: a diffusers pipeline (all its transformers share one step counter), or a transformer.
        method: a Method, a name such as "radial", a preset such as "radial/wan2.1", or a path to
            a YAML file.
        schedule: which steps and layers stay dense.
        backend: as in :func:`dittfast.attend`.
        layout: for a model family that dittfast cannot read: a Layout, or a function
            ``(model, forward arguments by name) -> Layout``.
        options: fields of the method or of the schedule.

    Returns:
        A handle; ``with dittfast.enable(...):`` disables on exit.

    Raises:
        ValueError: an unknown method, option or model family, a pipeline that is enabled already,
            or a layer of the schedule that the model does not have.
    """
    method, schedule = resolve(method, schedule, **options)
    from dittfast.attention import BACKENDS

    from .description import other_models

    if backend != "auto" and backend not in BACKENDS:
        raise unknown("backend", backend, ["auto", *BACKENDS])
    models = transformers_of(pipe)
    session = Session(pipe, method, schedule, backend)
    states = {}
    for name, model in models.items():
        if is_swapped(model):
            raise ValueError(
                "dittfast is already enabled on this pipeline with "
                f"{model._dittfast.session.method}; call dittfast.disable(pipe) first"
            )
        family = family_of(model, layout)
        layers = attention_layers(model, family)
        if not layers:
            raise ValueError(
                f"{type(model).__name__} has no self-attention layer that dittfast knows"
            )
        layer_states = {n: LayerState(_layer_parameters(method, m)) for n, m in layers.items()}
        states[name] = ModelState(session, family, layer_states)
    for name, model in models.items():
        _install(model, states[name])
        _log(name, model, states[name])
    for sentence in other_models(pipe):
        logger.info(sentence)
    return Enabled(pipe)


def _log(component: str, model: torch.nn.Module, state: ModelState) -> None:
    """One line: how many layers run the method, what is dense and why."""
    from .description import dense_steps, other_attention

    session, total = state.session, len(state.layers)
    dense = [*dense_steps(session.schedule), *other_attention(model, state)]
    if state.dense_layers:
        dense.insert(0, f"{len(state.dense_layers)} layers are dense by dense_layers")
    logger.info(
        "%s: %s in %d of %d self-attention layers%s",
        component,
        session.method,
        total - len(state.dense_layers),
        total,
        "".join(f"; {sentence}" for sentence in dense),
    )


def _layer_parameters(method: Method, module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    like = next(module.parameters(), None)
    device = None if like is None else like.device
    return {
        name: torch.nn.Parameter(value.to(device)) for name, value in method.parameters().items()
    }


def disable(pipe) -> Disabled:
    """Restore a pipeline to exactly what it was before :func:`enable`.

    Returns:
        A handle; ``with dittfast.disable(pipe):`` enables again on exit.

    Raises:
        ValueError: the pipeline was never enabled.
    """
    models = transformers_of(pipe)
    if not any(is_swapped(model) for model in models.values()):
        raise ValueError("dittfast is not enabled on this pipeline; there is nothing to disable")
    undone = {}
    for name, model in models.items():
        if not is_swapped(model):
            continue
        undone[name] = model._dittfast
        for module in attention_layers(model, model._dittfast.family).values():
            restore(module)
        restore(model)
    return Disabled(pipe, undone)


@contextlib.contextmanager
def force_dense(pipe, dense: bool = True):
    """Inside, every pass of an enabled pipeline is dense (or none is), whatever its schedule says.

    For training, where a pass belongs to no denoising step. Layers that the schedule keeps dense
    stay dense.

    Raises:
        ValueError: dittfast is not enabled on this pipeline.
    """
    models = [m for m in transformers_of(pipe).values() if is_swapped(m)]
    if not models:
        raise ValueError("dittfast is not enabled on this pipeline; call dittfast.enable first")
    session = models[0]._dittfast.session
    before, session.forced = session.forced, dense
    try:
        yield
    finally:
        session.forced = before


def method_parameters(pipe) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters the enabled method added, by component, layer and name."""
    return {
        f"{component}.{layer}.{name}": parameter
        for component, model in transformers_of(pipe).items()
        if is_swapped(model)
        for layer, state in model._dittfast.layers.items()
        for name, parameter in state.parameters.items()
    }
