"""A forward pass of one transformer: what each layer runs in it, now and when it is run again.

A pass belongs to the thread that runs it. Gradient checkpointing runs layers again in the backward
pass, after other passes, and perhaps in another thread; then they must run what their own pass
ran. diffusers' checkpointing gets it handed on (:meth:`Pass.bound`). Of PyTorch's, the tensors that
a checkpointed function was called with tell: they live until it has run again, so no other pass
can have had the same ones (:meth:`Passes.remember`).
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import torch
import torch.utils.checkpoint
from torch.multiprocessing.reductions import StorageWeakRef

from .families.sequences import Sequences
from .layer import LayerRun, LayerState

_CHECKPOINT_FILE = torch.utils.checkpoint.__file__
# Functions of that file whose frames hold a checkpointed function's arguments, and under which
# names: on the way forward, and when it is run again (non-reentrant and reentrant).
_FORWARD = {"checkpoint": ("args", "kwargs")}
_AGAIN = {"recompute_fn": ("args", "kwargs"), "backward": ("detached_inputs",)}


class Pass:
    """What one forward pass runs.

    Attributes:
        sequences: the layouts that were read.
        step: the 0-based denoising step and the number of steps, where somebody needs it.
        runs: what each selected layer runs, by name. Never changed once the pass is made.
        differentiable: whether a backward pass may come back to it.
        ran, reached: names of layers that did their projections, and that met attention over the
            whole sequence; not filled in by what torch.compile traced.
    """

    def __init__(
        self,
        sequences: Sequences,
        step: tuple[int, int | None] | None,
        layers: dict[str, LayerState],
        runs: dict[str, LayerRun],
        differentiable: bool,
    ):
        self.sequences = sequences
        self.step = step
        self.layers = layers
        self.runs = runs
        self.differentiable = differentiable
        self.ran: set[str] = set()
        self.reached: set[str] = set()

    def apply(self) -> list[tuple[LayerState, LayerRun | None]]:
        """Let the layers run this pass in this thread; what they ran before."""
        before = [(layer, layer.running) for layer in self.layers.values()]
        for name, layer in self.layers.items():
            layer.running = layer.last = self.runs[name]
        return before

    def changed(self, runs: dict[str, LayerRun]) -> Pass:
        """The pass in which some layers run something else."""
        runs = {**self.runs, **runs}
        return Pass(self.sequences, self.step, self.layers, runs, self.differentiable)

    def note(self, name: str, ran: bool, reached: bool) -> None:
        """What the call of a layer came to."""
        if ran:
            self.ran.add(name)
        if reached:
            self.reached.add(name)

    def same_as(self, other: Pass) -> bool:
        """Whether every layer runs the same in both."""
        return all(
            a.core is b.core and a.transform is b.transform and a.strength is b.strength
            for a, b in zip(self.runs.values(), other.runs.values())
        )


class Bound:
    """A part of the transformer that runs as in one pass, whenever it is called."""

    def __init__(self, module: Callable, running: Callable[[], contextlib.AbstractContextManager]):
        self._module = module
        self._running = running

    def __call__(self, *args, **kwargs):
        with self._running():
            return self._module(*args, **kwargs)

    def __getattr__(self, name: str):
        return getattr(self._module, name)


class _Here(threading.local):
    def __init__(self):
        self.current: Pass | None = None


class Passes:
    """The passes of one transformer: which is under way in this thread, and which may come back."""

    def __init__(self):
        self._here = _Here()
        self._remembered: dict[tuple, tuple[list[StorageWeakRef], list[Pass]]] = {}
        self._lock = threading.Lock()

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), Passes())

    @property
    def current(self) -> Pass | None:
        """The pass under way in this thread."""
        return self._here.current

    def enter(self, current: Pass) -> Callable[[], None]:
        """Put ``current`` under way in this thread; what is returned ends it."""
        before, layers = self._here.current, current.apply()
        self._here.current = current

        def leave():
            self._here.current = before
            for layer, run in layers:
                layer.running = run

        return leave

    @contextlib.contextmanager
    def under_way(self, current: Pass) -> Iterator[None]:
        """Inside, ``current`` is under way in this thread, and its layers run it."""
        leave = self.enter(current)
        try:
            yield
        finally:
            leave()

    def remember(self, current: Pass, frame: FrameType) -> None:
        """Note with which tensors the checkpointed functions around ``frame`` were called."""
        for key, storages in _calls(frame, _FORWARD):
            with self._lock:
                _, passes = self._remembered.setdefault(key, (storages, []))
                passes[:] = [p for p in passes if not p.same_as(current)] + [current]

    def forget_finished(self) -> None:
        """Drop the notes whose tensors are gone: their backward pass is over."""
        with self._lock:
            for key, (storages, _) in list(self._remembered.items()):
                if any(storage.expired() for storage in storages):
                    del self._remembered[key]

    def run_again(self) -> Pass | None:
        """The pass that the backward pass under way computes again; None where none is known.

        Raises:
            RuntimeError: two different passes had the very same tensors.
        """
        if not in_backward():
            return None
        for key, _ in _calls(sys._getframe(1), _AGAIN):
            with self._lock:
                _, passes = self._remembered.get(key, (None, []))
            if len(passes) > 1:
                raise RuntimeError(
                    "a checkpointed part of the transformer is computed again, and two passes "
                    "that ran different methods or steps had the very same input tensors. Give "
                    "each pass tensors of its own (.clone()), or checkpoint with "
                    "transformer.enable_gradient_checkpointing()"
                )
            if passes:
                return passes[0]
        return None

    def needed(self, name: str) -> LayerRun:
        """What a layer runs that was called outside of any pass: computed again, or refused.

        Raises:
            RuntimeError: nothing tells which pass the call belongs to.
        """
        found = self.run_again()
        if found is not None:
            return found.runs[name]
        if in_backward():
            raise RuntimeError(
                f"{name} is computed again in a backward pass, and dittfast cannot tell which "
                "forward pass it belongs to. Checkpoint with "
                "transformer.enable_gradient_checkpointing(), or hand the pass's own tensors to "
                "torch.utils.checkpoint.checkpoint as arguments; torch.compile and hooks that "
                "move saved tensors need the former"
            )
        raise RuntimeError(
            f"{name} was called outside of a forward pass of its transformer, so dittfast does "
            "not know the layout of its tokens. Call the transformer itself, or take dittfast "
            "out first with dittfast.disable"
        )


def in_backward() -> bool:
    """Whether this thread runs a backward pass."""
    return torch._C._current_graph_task_id() != -1


def _calls(
    frame: FrameType | None, functions: dict[str, tuple[str, ...]]
) -> Iterator[tuple[tuple, list[StorageWeakRef]]]:
    """For each frame of checkpointing from ``frame`` outward: its tensors as a key, and weakly."""
    while frame is not None:
        code = frame.f_code
        if code.co_name in functions and code.co_filename == _CHECKPOINT_FILE:
            found = frame.f_locals
            tensors = list(_tensors([found.get(name) for name in functions[code.co_name]]))
            storages = [StorageWeakRef(x.untyped_storage()) for x in tensors]
            if tensors:
                at = zip(storages, tensors)
                yield tuple((s.cdata, x.storage_offset(), x.shape) for s, x in at), storages
        frame = frame.f_back


def _tensors(value) -> Iterator[torch.Tensor]:
    """The tensors in nested arguments, in their order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for x in value:
            yield from _tensors(x)
    elif isinstance(value, dict):
        for x in value.values():
            yield from _tensors(x)


def is_differentiable(arguments: dict) -> bool:
    """Whether a backward pass may come back to a forward pass with these arguments."""
    if torch.is_inference_mode_enabled():
        return False
    return torch.is_grad_enabled() or any(x.requires_grad for x in _tensors(arguments))
