"""enable and disable: put a method into a diffusers pipeline and take it out again."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dittfast.config import check_fits, resolve, unknown
from dittfast.layout import Layout
from dittfast.methods.base import Method
from dittfast.mixture import Assignment, Rule
from dittfast.schedule import Schedule

from .description import Description, dense_steps, describe, other_attention, other_models
from .families import Family
from .models import (
    LayoutReader,
    Pipeline,
    attention_layers,
    exchanged,
    family_of,
    head_shape,
    is_swapped,
    own_dtype,
    stock_class,
    transformers_of,
)
from .seam import restore, swap
from .state import ModelState, Session
from .tuned import check_tuned

logger = logging.getLogger(__name__)
# Parameters that a method may have though the model has none: tiny ones are for tests.
_SMALL = 2**24


def _call(self, *args, **kwargs):
    state = self.__dict__.get("_dittfast")
    if state is None:  # a bound method that somebody kept from before disable
        return torch.nn.Module.__call__(self, *args, **kwargs)
    return state.run(self, torch.nn.Module.__call__, args, kwargs)


def _make_forward(cls: type):
    stock = cls.forward  # the function: Dynamo refuses classes that diffusers allows in the graph

    @functools.wraps(stock)
    def forward(self, *args, **kwargs):
        state = self.__dict__.get("_dittfast")
        if state is None or state.passes.current is not None:
            return stock(self, *args, **kwargs)
        return state.run(self, stock, args, kwargs)

    return forward


def _checkpointing(self):
    """What gradient checkpointing calls: the user's function, which then knows the pass."""
    function = self.__dict__.get("_gradient_checkpointing_func")
    state = self.__dict__.get("_dittfast")
    if function is None or state is None or torch.compiler.is_compiling():
        return function
    return state.checkpointing(self, function)


def _set_checkpointing(self, function):
    self.__dict__["_gradient_checkpointing_func"] = function


_CHECKPOINTING = property(_checkpointing, _set_checkpointing)


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


def _install(model: torch.nn.Module, state: ModelState) -> None:
    for name, layer in state.layers.items():
        swap(model.get_submodule(name), layer)
    members = {"__call__": _call, "forward": _make_forward}
    members["_gradient_checkpointing_func"] = _CHECKPOINTING
    if hasattr(model, "cache_context"):
        members["cache_context"] = _cache_context
    swap(model, state, **members)


def _join(model: torch.nn.Module, state: ModelState) -> None:
    """Install a state, beside the guidance of a transformer that is only guided."""
    if is_swapped(model):
        below = model._dittfast
        state.guidance, state.below = below.guidance, below
        _uninstall(model)
    _install(model, state)


def _uninstall(model: torch.nn.Module) -> None:
    layers = list(model._dittfast.layers.values())
    for module in model.modules():
        if any(module.__dict__.get("_dittfast") is layer for layer in layers):
            restore(module)
    restore(model)


class _Handle:
    """What holds a set of transformers and their states, in use as a context manager or not.

    Leaving the outermost ``with`` undoes what entering it did, as far as it still stands.
    """

    def __init__(self, pipe, states: dict[str, tuple[torch.nn.Module, ModelState]]):
        self._pipe = pipe
        self._states = states
        self._depth = 0

    def _check(self, what: str) -> None:
        """Raise ValueError where a transformer is enabled by somebody else's call."""
        for model, state in self._states.values():
            other = model._dittfast if is_swapped(model) else None
            if other is not None and other is not state and not other.only_guided:
                raise ValueError(
                    f"{what}: dittfast has been enabled on this pipeline by another call, with "
                    f"{model._dittfast.session.method}; call dittfast.disable(pipe) first"
                )

    def _put_in(self) -> None:
        for model, state in self._states.values():
            if not is_swapped(model) or model._dittfast.only_guided:
                _join(model, state)

    def _take_out(self) -> None:
        for model, state in self._states.values():
            if is_swapped(model) and model._dittfast is state:
                _uninstall(model)
                if state.below is not None and state.guidance is state.below.guidance:
                    _install(model, state.below)  # guided before the method came, and still


class Enabled(_Handle):
    """What :func:`enable` returns; as a context manager it disables on exit."""

    def __enter__(self) -> Enabled:
        if not self._depth:
            self._check("this handle cannot enable again")
            self._put_in()
        self._depth += 1
        return self

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._take_out()

    def describe(self) -> Description:
        return describe(self._pipe)


class Disabled(_Handle):
    """What :func:`disable` returns; as a context manager it enables again on exit."""

    def __enter__(self) -> Disabled:
        if not self._depth:
            self._check("this handle cannot disable again")
            self._take_out()
        self._depth += 1
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        if error is None:
            self._check("cannot enable again what `with dittfast.disable(...)` took out")
        mine = list(transformers_of(self._pipe).values())
        for model, state in self._states.values():
            is_free = not is_swapped(model) or model._dittfast.only_guided
            if is_free and any(model is m for m in mine):
                _join(model, state)


def enable(
    pipe: Pipeline,
    method: Method | str | Mapping[int | str, Any] | Sequence[Rule | Mapping[str, Any]],
    *,
    schedule: Schedule | None = None,
    backend: str = "auto",
    layout: Layout | LayoutReader | None = None,
    any_model: bool = False,
    **options: Any,
) -> Enabled:
    """Make a pipeline's self-attention sparse. Checks everything first; changes nothing on error.

    The stock processors stay: their projections, norms, RoPE and output run as before, and only
    the attention call inside them is replaced.

    Args:
        pipe: a diffusers pipeline (all its transformers share one step counter), or a transformer.
        method: a Method, a name such as "radial", a preset such as "radial/wan2.1", or a path to
            a YAML file. For a mixture, a mapping from layers to methods, or a list of
            :class:`~dittfast.mixture.Rule`: layers, heads and steps that no rule names are dense.
        schedule: which steps and layers stay dense, whatever the rules say.
        backend: as in :func:`dittfast.attend`.
        layout: for a model family that dittfast cannot read: a Layout, or a function
            ``(model, forward arguments by name) -> Layout``.
        any_model: take a preset that is for another model, or was tuned for one, with a warning.
        options: fields of the method or of the schedule.

    Returns:
        A handle; ``with dittfast.enable(...):`` disables on exit.

    Raises:
        ValueError: an unknown method, option or model family, a preset for other models, a
            pipeline that is enabled already, a layer or head of the schedule or a rule that the
            model does not have, or rules that meet.
    """
    from dittfast.attention import BACKENDS

    named, (method, schedule) = method, resolve(method, schedule, **options)

    if backend != "auto" and backend not in BACKENDS:
        raise unknown("backend", backend, ["auto", *BACKENDS])
    models = transformers_of(pipe)
    check_fits(named, [stock_class(type(model)).__name__ for model in models.values()], any_model)
    sizes = check_tuned(method, models, any_model)
    owner = models["transformer"] if isinstance(pipe, torch.nn.Module) else pipe
    session = Session(owner, method, schedule, backend, sizes)
    states = {}
    for name, model in models.items():
        below = model._dittfast if is_swapped(model) else None
        if below is not None and not below.only_guided:
            raise ValueError(
                "dittfast is already enabled on this pipeline with "
                f"{below.session.method}; call dittfast.disable(pipe) first"
            )
        family = family_of(model, layout)
        layers = attention_layers(model, family)
        if not layers:
            raise ValueError(
                f"{type(model).__name__} has no self-attention layer that dittfast knows"
            )
        dtype = own_dtype(model)
        shapes = {n: head_shape(family, m) for n, m in layers.items()}
        assignment = Assignment(method, {n: heads for n, (heads, _) in shapes.items()})
        _check_hidden_states(model, family, assignment)
        about = {n: (n, shapes[n][1], family.hidden_width(m)) for n, m in layers.items()}
        _check_own_size(model, method, [assignment.parameter_shapes(*x) for x in about.values()])
        own = {n: _on(layers[n], dtype, assignment.parameters(*x)) for n, x in about.items()}
        state = ModelState(session, family, own, shapes, assignment)
        states[name] = model, state
    for name, (model, state) in states.items():
        _join(model, state)
        _log(name, model, state)
    _remember(pipe, models.values())
    for sentence in other_models(pipe):
        logger.info(sentence)
    return Enabled(pipe, states)


def _check_own_size(model: torch.nn.Module, method: Method, layers: list[dict]) -> None:
    """Raise ValueError where a method, say of a stranger's preset, would fill the memory.

    Args:
        layers: the shapes of the parameters that each layer gets.
    """
    asked = sum(math.prod(shape) for own in layers for shape in own.values())
    held = sum(p.numel() for p in model.parameters())
    if asked > held + _SMALL:
        raise ValueError(
            f"{method.words()} asks for {asked:,} parameters, more than all of "
            f"{type(model).__name__} has ({held:,}); lower the options that they grow with"
        )


def _check_hidden_states(model: torch.nn.Module, family: Family, assignment: Assignment) -> None:
    """Raise ValueError where a method needs hidden states that the model's layers do not tell."""
    if family.hidden_states is not None:
        return
    ever = (group.method for name in assignment.heads for group in assignment.ever(name))
    needy = [method.name for method in ever if method.needs_hidden_states]
    if needy:
        raise ValueError(
            f"{needy[0]} needs the hidden states of every token in one tensor, and the attention "
            f"layers of {stock_class(type(model)).__name__} do not have them; take another method"
        )


def _remember(pipe, models) -> None:
    """Note on the pipeline which transformers it enabled: they may be exchanged later."""
    if not isinstance(pipe, torch.nn.Module) and hasattr(pipe, "__dict__"):
        kept = [ref for ref in pipe.__dict__.get("_dittfast_enabled", ()) if ref() is not None]
        pipe.__dict__["_dittfast_enabled"] = kept + [weakref.ref(model) for model in models]


def _log(component: str, model: torch.nn.Module, state: ModelState) -> None:
    """One line: how many layers run the method, what is dense and why."""
    session, total = state.session, len(state.layers)
    sparse = len(state.sparse_layers)
    dense = [*dense_steps(session.schedule), *other_attention(model, state)]
    if state.dense_layers:
        dense.insert(0, f"{len(state.dense_layers)} layers are dense by dense_layers")
    logger.info(
        "%s: %s in %d of %d self-attention layers%s",
        component,
        session.method,
        sparse,
        total,
        "".join(f"; {sentence}" for sentence in dense),
    )


def _on(
    module: torch.nn.Module, dtype: torch.dtype, values: dict[str, torch.Tensor]
) -> dict[str, torch.nn.Parameter]:
    """Parameters of a method's in a layer, on the device of the layer's own."""
    like = next(module.parameters(), None)
    device = None if like is None else like.device
    return {name: torch.nn.Parameter(value.to(device, dtype)) for name, value in values.items()}


def disable(pipe: Pipeline) -> Disabled:
    """Restore a pipeline to exactly what it was before :func:`enable`.

    Returns:
        A handle; ``with dittfast.disable(pipe):`` enables again on exit.

    Raises:
        ValueError: the pipeline was never enabled.
    """
    gone = exchanged(pipe)
    models = transformers_of(pipe)
    states = {name: (m, m._dittfast) for name, m in models.items() if is_swapped(m)}
    if not states and not gone:
        raise ValueError("dittfast is not enabled on this pipeline; there is nothing to disable")
    for model in gone + [model for model, _ in states.values()]:
        _uninstall(model)
    if not isinstance(pipe, torch.nn.Module):
        getattr(pipe, "__dict__", {}).pop("_dittfast_enabled", None)
    return Disabled(pipe, states)


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
