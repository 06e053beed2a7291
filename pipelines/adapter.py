"""enable, disable, describe: put a method into a diffusers pipeline and take it out again."""

from __future__ import annotations

import contextlib
import logging
import re
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import torch

from dittfast.break_even import min_tokens as measured_break_even
from dittfast.config import resolve, unknown
from dittfast.layout import Layout
from dittfast.methods.base import Method
from dittfast.schedule import Schedule

from .families import FAMILIES, Family, bind_arguments
from .seam import Core, LayerState, is_swapped, restore, stock_class, swap
from .steps import TimestepCounter, scheduler_step, timestep_step

if TYPE_CHECKING:
    from .guidance import GuidanceState

logger = logging.getLogger(__name__)

LayoutReader = Callable[[torch.nn.Module, dict], Layout]


class Session:
    """One ``enable`` call: the method, its schedule, and the pipeline whose steps it follows."""

    def __init__(self, pipe, method: Method, schedule: Schedule, backend: str):
        self.method = method
        self.schedule = schedule
        self.backend = backend
        self.counter = TimestepCounter()
        self._pipe = weakref.ref(pipe)

    def __deepcopy__(self, memo):
        # A copied pipeline gets a session that follows the copy; a copied model alone keeps
        # following the pipeline it came from.
        pipe = self._pipe()
        twin = Session.__new__(Session)
        twin.__dict__.update(self.__dict__)
        twin.counter = TimestepCounter()
        twin._pipe = weakref.ref(memo.get(id(pipe), pipe)) if pipe is not None else self._pipe
        return twin

    @property
    def scheduler(self):
        return getattr(self._pipe(), "scheduler", None)

    @property
    def pipe(self):
        """The pipeline (or transformer) this session was enabled on; None once it is gone."""
        return self._pipe()

    def step(self, arguments: dict) -> tuple[int, int | None]:
        """The 0-based step of the pass with these forward arguments, and the number of steps."""
        found = scheduler_step(self.scheduler)
        if found is None:
            found = timestep_step(self.scheduler, self.counter, arguments["timestep"])
        return found

    def is_dense_step(self, arguments: dict) -> bool:
        """Whether the pass with these forward arguments belongs to a dense step."""
        if not (self.schedule.dense_first_steps or self.schedule.dense_last_steps):
            return False
        step, total = self.step(arguments)
        if total is None:
            if self.schedule.dense_last_steps:
                raise ValueError(
                    f"dense_last_steps={self.schedule.dense_last_steps} needs to know the number "
                    "of steps, which only a pipeline's scheduler does; call dittfast.enable on "
                    "the pipeline"
                )
            total = step + 1
        return self.schedule.is_dense_step(step, total)


class ModelState:
    """State of one transformer: its layers, how its layout is read, and plans made so far."""

    def __init__(self, session: Session, family: Family, layers: dict[str, LayerState]):
        self.session = session
        self.family = family
        self.layers = layers
        names = list(layers)
        self.dense_layers = session.schedule.dense_layer_names(names) if names else set()
        self.cores: dict[tuple[Layout, torch.device], Core | None] = {}
        self.layout: Layout | None = None
        self.break_even: int | None = None
        self.guidance: GuidanceState | None = None
        self.context: str | None = None
        self._read: tuple | None = None

    def read_layout(self, model: torch.nn.Module, arguments: dict) -> Layout:
        """The layout of this pass.

        Reading values of a tensor waits for the device, so a family that does is read once per
        tensor: pipelines pass the same position ids at every step.
        """
        sources = [arguments[name] for name in self.family.reads_values]
        shapes = [x.shape for x in arguments.values() if torch.is_tensor(x)]
        versions = [0 if x.is_inference() else x._version for x in sources]
        if sources and self._read is not None:
            tensors, seen = self._read
            if seen == (shapes, versions) and all(a is b for a, b in zip(tensors, sources)):
                return self.layout
        self._read = sources, (shapes, versions)
        return self.family.read(model, arguments)

    def core(self, layout: Layout, device: torch.device) -> Core | None:
        """What runs on this layout; None where it stays dense. Static plans are made once."""
        key = (layout, device)
        if key in self.cores:
            return self.cores[key]
        session, method = self.session, self.session.method
        if method.name == "dense":
            # The stock attention, not a plan that lists every block.
            return None
        if method.needs_grid:
            layout.grid  # noqa: B018 (raises on a text-only layout)
        least = session.schedule.min_tokens
        if least is None:
            least = measured_break_even(method.name, device.type)
        self.break_even = least
        core = None
        if layout.num_tokens < least:
            logger.warning(
                "dense: %s tokens are fewer than the %s from which %s pays on %s "
                "(min_tokens=0 runs it anyway)",
                f"{layout.num_tokens:,}", f"{least:,}", method.name, device.type,
            )  # fmt: skip
        else:
            plan = method.plan(layout).to(device) if method.static else None
            method.prepare(layout, device)
            core = Core(method, layout, plan, session.backend, self.family.strict)
        self.cores[key] = core
        return core

    def prepare(self, model: torch.nn.Module, arguments: dict) -> None:
        """Decide, before a forward pass, what each layer runs in it."""
        self.layout = layout = self.read_layout(model, arguments)
        core = None
        if not self.session.is_dense_step(arguments):
            hidden = arguments["hidden_states"]
            core = self.core(layout, hidden.device)
        for name, state in self.layers.items():
            state.core = None if name in self.dense_layers else core

    def check_reached(self) -> None:
        """Raise if no layer of a hand-described model met its sequence in this pass."""
        running = [state for state in self.layers.values() if state.core is not None]
        if running and not self.family.strict and not any(state.reached for state in running):
            raise RuntimeError(
                f"no attention layer saw a sequence of {self.layout.num_tokens} tokens, the length "
                "of the layout passed to dittfast.enable; count its text and grid again"
            )


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


def _family(model: torch.nn.Module, layout: Layout | LayoutReader | None) -> Family:
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
        return Family(known.layers, read)
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
        family = _family(model, layout)
        layers = attention_layers(model, family)
        if not layers:
            raise ValueError(
                f"{type(model).__name__} has no self-attention layer that dittfast knows"
            )
        layer_states = {n: LayerState(_layer_parameters(method, m)) for n, m in layers.items()}
        states[name] = ModelState(session, family, layer_states)
    for name, model in models.items():
        _install(model, states[name])
    return Enabled(pipe)


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


def method_parameters(pipe) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters the enabled method added, by component, layer and name."""
    return {
        f"{component}.{layer}.{name}": parameter
        for component, model in transformers_of(pipe).items()
        if is_swapped(model)
        for layer, state in model._dittfast.layers.items()
        for name, parameter in state.parameters.items()
    }


@dataclass(frozen=True)
class LayerDescription:
    """One self-attention layer: its name, and why it is dense (None where it is sparse)."""

    name: str
    dense: str | None = None


@dataclass(frozen=True)
class Description:
    """What runs where. ``str()`` of it is a table for people.

    Attributes:
        method, schedule, backend: as enabled.
        num_tokens: tokens of the last forward pass; None before the first.
        density: kept fraction of token pairs in the sparse layers, averaged over all calls so far
            where the method chooses from q and k at every call. None before the first pass, and
            for such a method under torch.compile, which leaves the counting out.
        layers: every self-attention layer, and why it is dense.
        notes: what else stays dense.
    """

    method: Method
    schedule: Schedule
    backend: str
    num_tokens: int | None
    density: float | None
    layers: tuple[LayerDescription, ...]
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict:
        """Plain data, for JSON."""
        return {
            "method": {"name": self.method.name, **asdict(self.method)},
            "schedule": asdict(self.schedule),
            "backend": self.backend,
            "num_tokens": self.num_tokens,
            "density": self.density,
            "sparse_layers": [x.name for x in self.layers if x.dense is None],
            "dense_layers": {x.name: x.dense for x in self.layers if x.dense is not None},
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [f"method    {self.method}", f"schedule  {self.schedule}"]
        lines.append(f"backend   {self.backend}")
        if self.num_tokens is None:
            lines.append("tokens    known after the first forward pass")
        else:
            lines.append(f"tokens    {self.num_tokens:,}")
            density = "chosen from q and k at every call"
            if self.density is not None:
                density = f"{self.density:.1%} of token pairs in sparse layers"
                density += "" if self.method.static else ", mean over calls"
            lines.append(f"density   {density}")
        sparse = sum(x.dense is None for x in self.layers)
        lines.append(f"layers    {len(self.layers)} self-attention: {sparse} sparse")
        reasons: dict[str, list[str]] = {}
        for layer in self.layers:
            if layer.dense is not None:
                reasons.setdefault(layer.dense, []).append(layer.name)
        for reason, names in reasons.items():
            shown = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
            lines.append(f"          {len(names)} dense: {reason} ({shown})")
        lines.extend(f"note      {note}" for note in self.notes)
        return "\n".join(lines)


def describe(pipe) -> Description:
    """Which layers run which method, at what density, and what is dense and why.

    Raises:
        ValueError: dittfast is not enabled on this pipeline.
    """
    models = {n: m for n, m in transformers_of(pipe).items() if is_swapped(m)}
    if not models:
        raise ValueError("dittfast is not enabled on this pipeline; call dittfast.enable first")
    layers, notes = [], []
    num_tokens = density = None
    for component, model in models.items():
        state: ModelState = model._dittfast
        prefix = "" if len(models) == 1 else f"{component}."
        core = None
        if state.layout is not None:
            num_tokens = state.layout.num_tokens
            core = next((c for (at, _), c in state.cores.items() if at == state.layout), None)
        dense = state.session.method.name == "dense"
        small = num_tokens is not None and state.cores and core is None
        if core is not None:
            density = core.density
        for name in state.layers:
            reason = None
            if name in state.dense_layers:
                reason = "dense_layers of the schedule"
            elif dense:
                reason = "the method is dense"
            elif small:
                reason = f"{num_tokens:,} tokens are below min_tokens {state.break_even:,}"
            layers.append(LayerDescription(prefix + name, reason))
        modules = [m for m in model.modules() if callable(getattr(m, "processor", None))]
        if len(modules) > len(state.layers):
            notes.append(
                f"{prefix}{len(modules) - len(state.layers)} other attention modules "
                "(cross-attention, text refiners) are dense"
            )
        schedule = state.session.schedule
        if state.guidance is not None:
            heads = len(state.guidance.config.heads)
            notes.append(f"{prefix}guided by {heads} weakened heads: one more pass at guided steps")
    for which in ("first", "last"):
        steps = getattr(schedule, f"dense_{which}_steps")
        if steps:
            notes.append(f"the {which} {steps} denoising steps are dense")
    session = state.session
    return Description(
        session.method, schedule, session.backend, num_tokens, density, tuple(layers), tuple(notes)
    )
