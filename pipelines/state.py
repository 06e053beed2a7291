"""What enable keeps per call and per transformer: the session, layouts read, plans made."""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING

import torch

from dittfast import break_even
from dittfast.layout import Layout
from dittfast.methods.base import Method
from dittfast.schedule import Schedule

from .families import Family
from .families.sequences import Sequences
from .seam import Core, LayerState, Part
from .steps import TimestepCounter, scheduler_step, timestep_step

if TYPE_CHECKING:
    from .guidance import GuidanceState

logger = logging.getLogger(__name__)


class Session:
    """One ``enable`` call: the method, its schedule, and the pipeline whose steps it follows."""

    def __init__(self, pipe, method: Method, schedule: Schedule, backend: str):
        self.method = method
        self.schedule = schedule
        self.backend = backend
        self.counter = TimestepCounter()
        self.forced: bool | None = None
        self._all_dense: int | None = None
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

    def step(self, family: Family, arguments: dict) -> tuple[int, int | None]:
        """The 0-based step of the pass with these forward arguments, and the number of steps."""
        found = scheduler_step(self.scheduler)
        if found is None:
            time = arguments[family.timestep]
            time = -time if family.time_rises else time
            found = timestep_step(self.scheduler, self.counter, time)
        return found

    def is_dense_step(self, family: Family, arguments: dict) -> bool:
        """Whether the pass with these forward arguments belongs to a dense step."""
        if self.forced is not None:
            return self.forced
        if not (self.schedule.dense_first_steps or self.schedule.dense_last_steps):
            return False
        step, total = self.step(family, arguments)
        if total is None:
            if self.schedule.dense_last_steps:
                raise ValueError(
                    f"dense_last_steps={self.schedule.dense_last_steps} needs to know the number "
                    "of steps, which only a pipeline's scheduler does; call dittfast.enable on "
                    "the pipeline"
                )
            total = step + 1
        else:
            self._warn_if_all_dense(total)
        return self.schedule.is_dense_step(step, total)

    def _warn_if_all_dense(self, total: int) -> None:
        """Say, once per number of steps, that the method never runs."""
        first, last = self.schedule.dense_first_steps, self.schedule.dense_last_steps
        if first + last < total or self._all_dense == total:
            return
        self._all_dense = total
        logger.warning(
            "dense: dense_first_steps=%d and dense_last_steps=%d leave none of %d steps to %s, "
            "which changes nothing; take more steps or keep fewer dense",
            first, last, total, self.method.name,
        )  # fmt: skip


class ModelState:
    """State of one transformer: its layers, how its layout is read, and plans made so far."""

    def __init__(self, session: Session, family: Family, layers: dict[str, LayerState]):
        self.session = session
        self.family = family
        self.layers = layers
        names = list(layers)
        self.dense_layers = session.schedule.dense_layer_names(names) if names else set()
        self.cores: dict[tuple[Sequences, torch.device], Core | None] = {}
        self.parts: dict[tuple[Layout, torch.device], Part | None] = {}
        self.sequences: Sequences | None = None
        self.break_even: int | None = None
        self.guidance: GuidanceState | None = None
        self.context: str | None = None
        self._read: tuple | None = None

    @property
    def layout(self) -> Layout | None:
        """The main sequence of the last forward pass."""
        return None if self.sequences is None else self.sequences.layout

    def read_sequences(self, model: torch.nn.Module, arguments: dict) -> Sequences:
        """The sequences of this pass.

        Reading values of a tensor waits for the device, so a family that does is read once per
        tensor: pipelines pass the same position ids at every step.
        """
        sources = [arguments[name] for name in self.family.reads_values]
        shapes = [x.shape for x in arguments.values() if torch.is_tensor(x)]
        versions = [0 if x.is_inference() else x._version for x in sources]
        if sources and self._read is not None:
            tensors, seen = self._read
            if seen == (shapes, versions) and all(a is b for a, b in zip(tensors, sources)):
                return self.sequences
        self._read = None
        found = Sequences.of(self.family.read(model, arguments))
        self._read = sources, (shapes, versions)
        return found

    def core(self, sequences: Sequences, device: torch.device) -> Core | None:
        """What runs on these sequences; None where they stay dense."""
        key = (sequences, device)
        if key not in self.cores:
            _keep_newest(self.cores)
            self.cores[key] = self._make_core(sequences, device)
        return self.cores[key]

    def _make_core(self, sequences: Sequences, device: torch.device) -> Core | None:
        session, family = self.session, self.family
        if session.method.name == "dense":
            # The stock attention, not a plan that lists every block.
            return None
        found = []
        for rows in sequences.by_length():
            parts = tuple(self.part(layout, device) for layout in rows)
            if None not in parts:
                found.append(parts)
        if not found:
            return None
        core = Core(session.method, tuple(found), session.backend, family.strict, family.outer_mask)
        return core

    def part(self, layout: Layout, device: torch.device) -> Part | None:
        """One layout and its plan; None where it stays dense. Static plans are made once."""
        key = (layout, device)
        if key in self.parts:
            return self.parts[key]
        session, method = self.session, self.session.method
        if method.needs_grid:
            layout.grid  # noqa: B018 (raises on a text-only layout)
        least, source = session.schedule.min_tokens, "as asked for"
        if least is None:
            least = break_even.min_tokens(method.name, device.type)
            measured = break_even.is_measured(method.name, device.type)
            source = "measured" if measured else "an estimate"
        self.break_even = least
        part = None
        if layout.num_tokens < least:
            logger.warning(
                "dense: %s tokens are fewer than the %s from which %s pays on %s, %s "
                "(min_tokens=0 runs it anyway)",
                f"{layout.num_tokens:,}", f"{least:,}", method.name, device.type, source,
            )  # fmt: skip
        else:
            plan = method.plan(layout).to(device) if method.static else None
            method.prepare(layout, device)
            part = Part(layout, plan)
        _keep_newest(self.parts)
        self.parts[key] = part
        return part

    def prepare(self, model: torch.nn.Module, arguments: dict) -> None:
        """Decide, before a forward pass, what each layer runs in it."""
        self.sequences = self.read_sequences(model, arguments)
        core = None
        if not self.session.is_dense_step(self.family, arguments):
            core = self.core(self.sequences, device_of(arguments))
        if core is not None and getattr(model, "_parallel_config", None) is not None:
            from . import parallel

            parallel.prepare(model)
        for name, state in self.layers.items():
            state.core = None if name in self.dense_layers else core
            state.ran = state.reached = False

    def check_reached(self) -> None:
        """Raise if no layer of a model that is not strict met its sequence in this pass."""
        ran = [x for x in self.layers.values() if x.core is not None and x.ran]
        if ran and not self.family.strict and not any(state.reached for state in ran):
            raise RuntimeError(
                f"no attention layer saw a sequence of {self.layout.num_tokens} tokens, the length "
                "of its layout, so dittfast had no effect. If the layout was passed to "
                "dittfast.enable, count its text and grid again; if not, an attention backend "
                "that bypasses PyTorch may be set: call transformer.reset_attention_backend()"
            )


def _keep_newest(cache: dict, count: int = 32) -> None:
    """Make room: every new prompt length and size is another entry, and a server runs for long."""
    while len(cache) >= count:
        del cache[next(iter(cache))]


def device_of(arguments) -> torch.device:
    """The device of the first tensor among forward arguments.

    The parameters do not tell it: an offloaded model's are elsewhere until it runs.

    Raises:
        ValueError: there is no tensor.
    """
    values = list(arguments.values()) if isinstance(arguments, dict) else list(arguments)
    while values:
        for value in values:
            if torch.is_tensor(value):
                return value.device
        values = [x for value in values if isinstance(value, (list, tuple)) for x in value]
    raise ValueError("the transformer was called without any tensor")
