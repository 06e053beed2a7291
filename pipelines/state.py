"""What enable keeps: the session of a call; the layers, plans and passes of a transformer."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import logging
import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch

from dittfast import break_even
from dittfast.attention import choose_backend
from dittfast.cache import BytesLRU
from dittfast.layout import Layout
from dittfast.methods.amount import Amount, mean_amount
from dittfast.methods.base import Method
from dittfast.methods.memory import Memory, Tally
from dittfast.mixture import Assignment, leaves
from dittfast.plan import to_be_kept
from dittfast.schedule import Schedule

from .families import Family
from .families.sequences import Sequences
from .layer import AttentionCore, LayerRun, PlannedLayout
from .memories import Memories, memory_of
from .models import bind_arguments
from .passes import Bound, LayerState, Pass, Passes, in_backward, is_differentiable
from .seam import put_back
from .steps import Steps
from .tuned import TunedSizes

logger = logging.getLogger(__name__)

# Plans that a transformer keeps. One of a long video is hundreds of megabytes; a server of pictures
# sees many sizes and prompt lengths.
_MOST_KEPT, _MOST_BYTES = 256, 2**30
# Graphs that torch.compile may make of one function.
_MOST_GRAPHS = 64


class _Forced(threading.local):
    dense: bool | None = None


class Session:
    """One ``enable`` call: the method, its schedule, and the pipeline whose steps it follows.

    ``sizes`` are those that its preset was tuned for; None where it was not tuned.
    """

    def __init__(
        self,
        pipe,
        method: Method,
        schedule: Schedule,
        backend: str,
        sizes: TunedSizes | None = None,
    ):
        self.method = method
        self.schedule = schedule
        self.backend = backend
        self.sizes = sizes
        self.steps = Steps()
        self._forced = _Forced()
        self._all_dense: int | None = None
        self._pipe = weakref.ref(pipe)

    def __deepcopy__(self, memo):
        # A copied pipeline gets a session that follows the copy; a copied model alone keeps
        # following the pipeline it came from.
        pipe = self._pipe()
        twin = Session(self, self.method, self.schedule, self.backend, self.sizes)
        memo[id(self)] = twin
        twin._pipe = weakref.ref(memo.get(id(pipe), pipe)) if pipe is not None else self._pipe
        return twin

    @property
    def forced(self) -> bool | None:
        """Whether every pass of this thread is dense, or none; None leaves it to the schedule."""
        return self._forced.dense

    @forced.setter
    def forced(self, dense: bool | None):
        self._forced.dense = dense

    @property
    def pipe(self):
        """The pipeline (or transformer) that was enabled; None once it is gone."""
        return self._pipe()

    def step(self, model, family: Family, arguments: dict) -> tuple[int, int | None]:
        """The 0-based step of the pass with these forward arguments, and the number of steps.

        The user's steps, of the pipeline whose loop calls ``model``.
        """
        time = arguments.get(family.timestep)
        if family.time_rises and time is not None:
            time = -time
        return self.steps.read(model, self._pipe(), time)

    @property
    def needs_steps(self) -> bool:
        """Whether the step of a pass decides if it is dense."""
        schedule = self.schedule
        return self.forced is None and bool(schedule.dense_first_steps or schedule.dense_last_steps)

    def is_dense_step(self, step: int, total: int | None) -> bool:
        """Whether a step, of so many, is dense.

        Raises:
            ValueError: the last steps are to be dense, and nothing tells how many there are.
        """
        if total is None:
            if self.schedule.dense_last_steps:
                raise ValueError(
                    f"dense_last_steps={self.schedule.dense_last_steps} needs to know the number "
                    "of steps, which only the scheduler of the running pipeline does; run the "
                    "transformer inside a pipeline, with the scheduler that steps as its scheduler"
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


def _shapes(value):
    """What a reader may see of an argument without reading a tensor: shapes, and whole numbers."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, (list, tuple)):
        return tuple(map(_shapes, value))
    return value if isinstance(value, int) else None


class Guidance(Protocol):
    """What can be put into :attr:`ModelState.guidance`."""

    def guide(self, model: torch.nn.Module, state: ModelState, done: Pass, arguments: dict, out):
        """The guided prediction, in the form of ``out``, after a pass that gave ``out``."""

    def describe(self) -> str:
        """What it does, in a sentence without a full stop."""


class Weakening(Protocol):
    """What can be put into :attr:`ModelState.weakening`."""

    def weakened(self, model: torch.nn.Module, current: Pass) -> Pass:
        """The pass with the chosen heads weakened."""


class _Here(threading.local):
    """What a transformer keeps for one thread.

    Attributes:
        context: the name of the pipeline's pass ("cond", "uncond"), where it gives one.
        weakening: what weakens heads in the passes under way.
        read: position ids (weakly) with their versions and shapes, and the sequences read.
        memories: what layers keep over the run under way.
    """

    def __init__(self):
        self.context: str | None = None
        self.weakening: Weakening | None = None
        self.read: tuple[list[weakref.ref], tuple, Sequences] | None = None
        self.memories = Memories()


class ModelState:
    """State of one transformer: its layers, how its layout is read, and plans made so far.

    Attributes:
        session: the ``enable`` call it belongs to.
        family: how the model is read.
        layers: state of each selected attention layer, by name.
        passes: the passes of the transformer.
        dense_layers: names of layers that the schedule keeps dense.
        recorders: transforms that stand in layers for every pass, by name.
        guidance: what guides the predictions; None where nothing does.
        only_guided: whether guidance alone put dittfast into the transformer.
        below: the state of a transformer that was only guided before its method came.
        shapes: heads of each selected layer and the channels of one, None where it does not tell.
        assignment: what each layer runs at each step.
        last: the last pass of any thread; None before the first.
        num_passes, num_sparse: how many passes there were, and how many ran the method.
        lasting: how long plans from q and k last.
        tally: how many of them were made, and how often one was used again.
    """

    def __init__(
        self,
        session: Session,
        family: Family,
        parameters: dict[str, dict],
        shapes: dict[str, tuple[int | None, int | None]],
        assignment: Assignment,
    ):
        self.session = session
        self.family = family
        self.shapes = shapes
        self.assignment = assignment
        self.passes = Passes()
        self.layers = {name: LayerState(name, own, self.passes) for name, own in parameters.items()}
        names = list(self.layers)
        self.dense_layers = session.schedule.dense_layer_names(names) if names else set()
        self.recorders: dict = {}
        self.guidance: Guidance | None = None
        self.only_guided = False
        self.below: ModelState | None = None
        self.last: Pass | None = None
        self.num_passes = self.num_sparse = 0
        self.lasting, self.tally = session.schedule.lasting, Tally()
        parts = list(leaves(session.method))
        self.lasting.check({p.planner.name for p in parts if p.planner is not None})
        self.remembers = any(part.remembers for part in parts) or (
            self.lasting.keeps
            and any(p.planner is not None and not p.planner.static for p in parts)
        )
        self.break_even: dict[Method, float] = {}
        self._asked_for_training = False
        self._sparse_calls: collections.Counter = collections.Counter()
        # By method, sequences (or layout), device, dtype: every prompt length and size is an entry.
        self.cores = BytesLRU(_MOST_KEPT, _MOST_BYTES)
        self.parts = BytesLRU(_MOST_KEPT, _MOST_BYTES)
        self._here = _Here()
        self._counting = threading.Lock()
        self._untraced = _untraced()

    def __deepcopy__(self, memo):
        twin = memo[id(self)] = ModelState.__new__(ModelState)
        session = copy.deepcopy(self.session, memo)
        twin.__init__(session, self.family, {}, self.shapes, self.assignment)
        twin.passes = copy.deepcopy(self.passes, memo)
        twin.layers = copy.deepcopy(self.layers, memo)
        twin.dense_layers = set(self.dense_layers)
        twin.guidance = copy.deepcopy(self.guidance, memo)
        twin.only_guided = self.only_guided
        return twin

    @property
    def sparse_layers(self) -> list[str]:
        """Names of the layers that run a method at some step."""
        ever = self.assignment.ever
        return [name for name in self.layers if name not in self.dense_layers and ever(name)]

    @property
    def sequences(self) -> Sequences | None:
        """What the last forward pass attended over."""
        return None if self.last is None else self.last.sequences

    @property
    def layout(self) -> Layout | None:
        """The main sequence of the last forward pass."""
        return None if self.last is None else self.last.sequences.layout

    @property
    def context(self) -> str | None:
        """Which pass of a step the pipeline runs in this thread ("cond", "uncond"), if it says."""
        return self._here.context

    @context.setter
    def context(self, name: str | None):
        self._here.context = name

    @property
    def weakening(self) -> Weakening | None:
        """What weakens heads in this thread's passes; None where nothing does."""
        return self._here.weakening

    @weakening.setter
    def weakening(self, weakening: Weakening | None):
        self._here.weakening = weakening

    # A pass.

    def run(self, model: torch.nn.Module, call: Callable, args: tuple, kwargs: dict):
        """One call of the transformer: ``call(model, *args, **kwargs)`` as a pass, guided or not.

        Not traced by torch.compile, which then starts at the model's own forward.
        """
        return self._untraced.run(self, model, call, args, kwargs)

    def begin(self, model: torch.nn.Module, arguments: dict, stock: bool = False) -> Pass:
        """Decide, before a forward pass, what each layer runs in it.

        Args:
            stock: whether all layers run the stock attention, whatever the schedule says.
        """
        sequences, device = self.read_sequences(model, arguments), device_of(arguments)
        if self.session.sizes is not None:
            self.session.sizes.check(sequences.layout)
        step, dense = None, stock or bool(self.session.forced)
        differentiable = is_differentiable(arguments)
        remembers = self.remembers and not differentiable and not stock
        remembers = remembers and self.session.forced is None
        by_step = self.session.needs_steps or self.assignment.needs_steps or remembers
        if by_step or self.guidance is not None or self.recorders:
            step = self.session.step(model, self.family, arguments)
        if self.session.needs_steps and not stock:
            dense = self.session.is_dense_step(*step)
        memories = None
        if remembers and step[1] is not None:  # a run, with a scheduler that ends it
            memories = self._here.memories.begin(self.session.steps.run, step[0], self.context)
        runs = dict.fromkeys(self.layers, LayerRun())
        if not dense:
            runs = self._sparse_runs(step, sequences, device, dtype_of(arguments), memories)
        is_sparse = any(run.core is not None for run in runs.values())
        if is_sparse and getattr(model, "_parallel_config", None) is not None:
            from . import parallel

            parallel.prepare(model, runs.values())
        for name, recorder in self.recorders.items():
            runs[name] = runs[name].changed(recorder)
        current = Pass(sequences, step, device, self.layers, runs, differentiable, memories)
        if self.weakening is not None:
            current = self.weakening.weakened(model, current)
        if differentiable:
            self.passes.note(current, sys._getframe())
            self._asked_for_training = True  # whoever trains knows
        elif is_sparse and not self._asked_for_training:
            self._warn_if_untrained(model, runs)
        with self._counting:
            self.last = current
            self.num_passes += 1
            self.num_sparse += is_sparse
            if is_sparse:
                self._sparse_calls.update((n, r.core.method) for n, r in runs.items() if r.core)
        return current

    def _warn_if_untrained(self, model: torch.nn.Module, runs: dict[str, LayerRun]) -> None:
        """Say, once, that a method that is meant to be trained runs as it was made."""
        for name, run in runs.items():
            methods = () if run.core is None else leaves(run.core.method)
            needing = [method.name for method in methods if method.needs_training]
            if not needing:
                continue
            self._asked_for_training = True
            own = self.layers[name].parameters
            initial = self.assignment.parameters(name, self.shapes[name][1])
            as_made = all(torch.equal(own[n], x.to(own[n])) for n, x in initial.items())
            if as_made and not hasattr(model, "_dittfast_adapter"):
                logger.warning(
                    "untrained: %s is meant to run with trained parameters, and these are as they "
                    "were made; load an adapter (dittfast.load_adapter), or train one (dittfast "
                    "distill)",
                    needing[0],
                )
            return

    def _sparse_runs(
        self, step, sequences: Sequences, device, dtype, memories: dict[str, Memory] | None
    ) -> dict[str, LayerRun]:
        """What each layer runs in a pass that is not dense."""
        cores: dict[int, AttentionCore | None] = {}
        runs = {}
        for name, assigned in self.assignment.at(*(step or (None, None))).items():
            if assigned is None or name in self.dense_layers:
                runs[name] = LayerRun()
                continue
            method = assigned.method
            if id(method) not in cores:
                cores[id(method)] = self.core(method, sequences, device, dtype)
            key, memory = assigned.key, None
            if memories is not None:
                memory = memory_of(memories, name, step[0], self.lasting, self.tally)
            layer = self.layers[name]
            own = {n.removeprefix(key): x for n, x in layer.parameters.items() if n.startswith(key)}
            given = {"parameters": own, "memory": memory, "report": layer.report}
            runs[name] = LayerRun(cores[id(method)], **given)
        return runs

    def checkpointing(self, model: torch.nn.Module, function: Callable) -> Callable:
        """``function`` of gradient checkpointing, whose parts run again as in the present pass."""
        current = self.passes.current
        if current is None:
            return function

        def checkpoint(part, *args, **kwargs):
            return function(Bound(part, lambda: self._again(model, current)), *args, **kwargs)

        return checkpoint

    @contextlib.contextmanager
    def _again(self, model: torch.nn.Module, current: Pass):
        if self.passes.current is current:
            yield
            return
        with put_back(model, self.layers), self.passes.under_way(current):
            yield

    # What a pass needs.

    def read_sequences(self, model: torch.nn.Module, arguments: dict) -> Sequences:
        """The sequences of this pass.

        Reading values of a tensor waits for the device, so a family that does is read once per
        tensor: pipelines pass the same position ids at every step.
        """
        given = (arguments.get(name) for name in self.family.reads_values)
        sources = [x for x in given if torch.is_tensor(x)]
        shapes = [_shapes(x) for x in arguments.values()]
        state = shapes, [0 if x.is_inference() else x._version for x in sources]
        if sources and self._here.read is not None:
            tensors, seen, sequences = self._here.read
            if seen == state and all(a() is b for a, b in zip(tensors, sources)):
                return sequences
        with to_be_kept():  # values, which torch.func's tensors do not have
            sequences = Sequences.of(self.family.read(model, arguments))
        self._here.read = [weakref.ref(x) for x in sources], state, sequences
        return sequences

    def core(
        self, method: Method, sequences: Sequences, device: torch.device, dtype: torch.dtype
    ) -> AttentionCore | None:
        """What runs ``method`` on these sequences in ``dtype``; None where they stay dense."""
        make = lambda: self._make_core(method, sequences, device, dtype)  # noqa: E731
        core = self.cores.get((method, sequences, device, dtype), make)
        if core is not None:
            for rows in core.planned:
                for planned in rows:
                    # Its own cache may have dropped what a compiled pass cannot make.
                    core.method.prepare(planned.layout, device)
        return core

    def _make_core(
        self, method: Method, sequences: Sequences, device: torch.device, dtype: torch.dtype
    ) -> AttentionCore | None:
        session, family = self.session, self.family
        planned = []
        for rows in sequences.by_length():
            parts = tuple(self.part(method, layout, device, dtype) for layout in rows)
            if None not in parts:
                planned.append(parts)
        if not planned:
            return None
        return AttentionCore(
            method,
            tuple(planned),
            session.backend,
            family.strict,
            family.outer_mask,
            family.shortcut,
            family.hidden_states,
        )

    def part(
        self, method: Method, layout: Layout, device: torch.device, dtype: torch.dtype
    ) -> PlannedLayout | None:
        """One layout and its plan; None where it stays dense. Static plans are made once."""
        make = lambda: self._make_part(method, layout, device, dtype)  # noqa: E731
        return self.parts.get((method, layout, device, dtype), make)

    def last_part(self, method: Method) -> PlannedLayout | None:
        """What a method has on the main sequence of the last pass; None where it stayed dense."""
        keys = [k for k in self.parts if k[0] == method and k[1] == self.layout]
        return self.parts.peek(keys[-1]) if keys else None

    def amount(self, name: str) -> Amount:
        """Density and work of a layer on the last sequence, a mean over the passes it ran in."""
        shape, amounts = self.shapes[name], []
        for method in self.assignment.made(name):
            part, calls = self.last_part(method), self._sparse_calls[name, method]
            if part is not None and calls:
                amounts.append((calls, part.amount(*shape)))
        return mean_amount(amounts)

    def _make_part(
        self, method: Method, layout: Layout, device: torch.device, dtype: torch.dtype
    ) -> PlannedLayout | None:
        session = self.session
        if method.needs_grid or any(part.needs_grid for part in leaves(method)):
            layout.grid  # noqa: B018 (raises on a text-only layout)
        least, source = session.schedule.min_tokens, "as asked for"
        if least is None:
            backend = session.backend
            backend = choose_backend(device, dtype) if backend == "auto" else backend
            # Of groups of heads, the one that pays last decides.
            names = [part.name for part in leaves(method)]
            least = max(break_even.min_tokens(name, backend, dtype) for name in names)
            measured = all(break_even.is_measured(name, backend, dtype) for name in names)
            source = "measured" if measured else "an estimate"
        self.break_even[method] = least
        if layout.num_tokens < least:
            why = f"{layout.num_tokens:,} tokens are fewer than the {least:,} from which "
            why = f"in {dtype} at no length " if least == math.inf else why
            logger.warning(
                "dense: %s%s pays on %s, %s (min_tokens=0 runs it anyway)",
                why, method.name, device.type, source,
            )  # fmt: skip
            return None
        return PlannedLayout(method, layout, method.keep(layout, device))

    def _check_reached(self, current: Pass) -> None:
        """Raise if no layer of a model that is not strict met its sequence in this pass."""
        if self.family.strict or current.reached:
            return
        if any(current.runs[name].core is not None for name in current.ran):
            raise RuntimeError(
                f"no attention layer saw a sequence of {current.sequences.layout.num_tokens} "
                "tokens, the length of its layout, so dittfast had no effect. If the layout was "
                "passed to dittfast.enable, count its text and grid again"
            )


def _run(state: ModelState, model, call: Callable, args: tuple, kwargs: dict):
    with _room_for_graphs():
        current, leave = state._untraced.begin(state, model, args, kwargs)
        try:
            out = call(model, *args, **kwargs)
        finally:
            leave()
        return state._untraced.end(state, model, current, args, kwargs, out)


@contextlib.contextmanager
def _room_for_graphs() -> Iterator[None]:
    """Inside, and in this thread, torch.compile does not give up at the eighth graph of a function.

    Sizes, steps and methods share graphs (:mod:`.compiled`). But all of diffusers' repeated blocks
    are one function to torch.compile, which needs most of the eight for the stock model, and again
    for layers that dittfast answers and for those with other parameters.
    """
    dynamo, before = sys.modules.get("torch._dynamo"), {}
    for name in ("recompile_limit", "accumulated_recompile_limit") if dynamo else ():
        limit = getattr(dynamo.config, name)
        if limit < _MOST_GRAPHS:
            before[name] = limit
            # Each config.patch of PyTorch 2.14 leaves a variable in the thread's context for ever.
            setattr(dynamo.config, name, _MOST_GRAPHS)
    try:
        yield
    finally:
        for name, limit in before.items():
            setattr(dynamo.config, name, limit)


def _begin(state: ModelState, model, args: tuple, kwargs: dict):
    again, current = state.passes.run_again()
    if current is None:
        current = state.begin(model, bind_arguments(model, args, kwargs), stock=again)
    elif state.guidance is not None:
        raise RuntimeError(
            "a checkpoint around the whole transformer cannot run guidance again in the backward "
            "pass; checkpoint with transformer.enable_gradient_checkpointing()"
        )
    return current, state.passes.enter(current)


def _end(state: ModelState, model, current: Pass, args: tuple, kwargs: dict, out):
    state._check_reached(current)
    if state.guidance is not None and state.weakening is None and not in_backward():
        arguments = bind_arguments(model, args, kwargs)
        out = state.guidance.guide(model, state, current, arguments, out)
    current.forget()
    return out


class _Untraced(NamedTuple):
    run: Callable
    begin: Callable
    end: Callable


@functools.cache
def _untraced() -> _Untraced:
    """The parts of a pass that torch.compile leaves alone; it still compiles what ``run`` calls.

    Not decorators: those import the compiler, which ``import dittfast`` does without.
    """
    reason = (
        "dittfast reads layout and step outside of the graph. For a graph without a break compile "
        "with pipe.transformer.compile() or pipe.transformer.compile_repeated_blocks()"
    )
    return _Untraced(
        torch.compiler.disable(_run, recursive=False, reason=reason),
        torch.compiler.disable(_begin),
        torch.compiler.disable(_end),
    )


def device_of(arguments) -> torch.device:
    """The device of the first tensor among forward arguments.

    The parameters do not tell it: an offloaded model's are elsewhere until it runs.

    Raises:
        ValueError: there is no tensor.
    """
    for value in _tensors(arguments):
        return value.device
    raise ValueError("the transformer was called without any tensor")


def dtype_of(arguments) -> torch.dtype:
    """What attention will compute in: autocast's dtype, or that of the first such argument."""
    device = device_of(arguments).type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    dtypes = (x.dtype for x in _tensors(arguments) if x.is_floating_point())
    return next(dtypes, torch.get_default_dtype())


def _tensors(arguments) -> Iterator[torch.Tensor]:
    """The tensors among arguments, those in lists and tuples after the others."""
    values = list(arguments.values()) if isinstance(arguments, dict) else list(arguments)
    while values:
        yield from (value for value in values if torch.is_tensor(value))
        values = [x for value in values if isinstance(value, (list, tuple)) for x in value]
