"""A forward pass of one transformer: what each layer runs in it, now and when it is run again.

A pass belongs to the thread that runs it. Gradient checkpointing runs layers again in the backward
pass, after other passes, and perhaps in another thread; then they must run what their own pass
ran. diffusers' checkpointing gets it handed on (:class:`Bound`). PyTorch's keeps an object for each
checkpointed call from its forward to its backward; a pass is noted there, and found there again.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import torch

from .compiled import handle_of
from .families.sequences import Sequences
from .layer import AttentionCore, LayerRun
from .memories import forget

_NOTE = "_dittfast_passes"


class LayerState(threading.local):
    """State of one attention layer: each thread has a ``running`` of its own.

    A thread-local object: torch.compile traces that, with a guard that looks at the thread that
    runs. Attributes are set in ``__init__``: those of the class it would take for constant.

    Attributes:
        name: the module's.
        parameters: the method's trainable parameters of this layer.
        passes: the passes of its transformer.
        running: what the layer runs in the pass that is under way in this thread; None outside.
        handle: stands for ``running`` in compiled code; None where it is as in the stock model.
        last: what it ran in this thread's last pass.
        watching: whether a call of the layer is under way in this thread.
        report: who is told the method's losses in the passes that begin in this thread, as
            :attr:`Call.report`; None for nobody.
    """

    def __init__(
        self,
        name: str = "",
        parameters: dict[str, torch.Tensor] | None = None,
        passes: Passes | None = None,
    ):
        self.name = name
        self.parameters = parameters or {}
        self.passes = passes
        self.running: LayerRun | None = None
        self.handle: torch.Tensor | None = None
        self.last: LayerRun | None = None
        self.watching = False
        self.report: Callable[[str, torch.Tensor], None] | None = None

    @property
    def core(self) -> AttentionCore | None:
        """What answers attention in this thread's pass, or did in its last; None for dense."""
        run = self.running or self.last
        return None if run is None else run.core

    def __deepcopy__(self, memo):
        parameters = copy.deepcopy(self.parameters, memo)
        return LayerState(self.name, parameters, copy.deepcopy(self.passes, memo))


class Pass:
    """What one forward pass runs.

    Attributes:
        sequences: the layouts that were read.
        step: the 0-based denoising step and the number of steps, where somebody needs it.
        device: of its tensors; an offloaded model's parameters are elsewhere until it runs.
        runs: what each selected layer runs, by name. Never changed once the pass is made.
        differentiable: whether a backward pass may come back to it.
        memories: what layers keep from step to step, of its guidance branch; empty where nothing.
        ran, reached: names of layers that did their projections, and that met attention over the
            whole sequence; not filled in by what torch.compile traced.
    """

    def __init__(
        self,
        sequences: Sequences,
        step: tuple[int, int | None] | None,
        device: torch.device,
        layers: dict[str, LayerState],
        runs: dict[str, LayerRun],
        differentiable: bool,
        memories: dict | None = None,
    ):
        self.memories = {} if memories is None else memories
        self.sequences = sequences
        self.step = step
        self.device = device
        self.layers = layers
        self.runs = runs
        self.differentiable = differentiable
        self.ran: set[str] = set()
        self.reached: set[str] = set()

    @functools.cached_property
    def _handles(self) -> dict[str, torch.Tensor]:
        """What stands in compiled code for the runs that differ from the stock model, by name."""
        # Nothing is compiled, or inside of torch.func, where tensors have no memory of their own.
        if "torch._dynamo" not in sys.modules or torch._C._functorch.peek_interpreter_stack():
            return {}
        return {name: handle_of(run) for name, run in self.runs.items() if run.watched is not None}

    def apply(self) -> Callable[[], None]:
        """Let the layers run this pass in this thread; what is returned undoes it."""
        before = [(layer, layer.running, layer.handle) for layer in self.layers.values()]
        for name, layer in self.layers.items():
            layer.running = layer.last = self.runs[name]
            layer.handle = self._handles.get(name)

        def undo():
            for layer, run, handle in before:
                layer.running, layer.handle = run, handle

        return undo

    def changed(self, runs: dict[str, LayerRun]) -> Pass:
        """The pass in which some layers run something else."""
        runs = {**self.runs, **runs}
        own = self.sequences, self.step, self.device, self.layers
        return Pass(*own, runs, self.differentiable, self.memories)

    def forget(self) -> None:
        """At the last step of a run: let go of what its layers kept."""
        if self.step is not None and self.step[1] is not None and self.step[0] + 1 >= self.step[1]:
            forget(self.memories)

    def saw(self, name: str, ran: bool, reached: bool) -> None:
        """What the call of a layer came to."""
        if ran:
            self.ran.add(name)
        if reached:
            self.reached.add(name)


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
    """The passes of one transformer: which is under way in this thread, which is run again."""

    def __init__(self):
        self._here = _Here()

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), Passes())

    @property
    def current(self) -> Pass | None:
        """The pass under way in this thread."""
        return self._here.current

    def enter(self, current: Pass) -> Callable[[], None]:
        """Put ``current`` under way in this thread; what is returned ends it."""
        before, undo = self._here.current, current.apply()
        self._here.current = current

        def leave():
            self._here.current = before
            undo()

        return leave

    @contextlib.contextmanager
    def under_way(self, current: Pass) -> Iterator[None]:
        """Inside, ``current`` is under way in this thread, and its layers run it."""
        leave = self.enter(current)
        try:
            yield
        finally:
            leave()

    def note(self, current: Pass, frame: FrameType) -> None:
        """Let the checkpointed calls around ``frame`` know the pass, if any are."""
        for call in _checkpointed_calls(frame):
            notes = getattr(call, _NOTE, None)
            if notes is None:
                notes = []
                setattr(call, _NOTE, notes)
            if all(current is not noted for _, noted in notes):
                notes.append((self, current))

    def note_current(self, frame: FrameType) -> None:
        """The same for the pass under way, if a backward pass may come back to it."""
        current = self._here.current
        if current is not None and current.differentiable:
            self.note(current, frame)

    def run_again(self) -> tuple[bool, Pass | None]:
        """Whether a checkpointed call is computed again around here, and which pass it belongs to.

        None is a pass in which dittfast was not in the model.
        """
        if not in_backward():
            return False, None
        again = False
        for call in _calls_run_again(sys._getframe(1)):
            again = True
            notes = getattr(call, _NOTE, [])
            mine = [note for note in notes if note[0] is self]
            if mine:
                # One call may run the transformer several times: each takes its turn.
                notes.remove(mine[0])
                notes.append(mine[0])
                return True, mine[0][1]
        return again, None

    def needed(self, name: str) -> LayerRun:
        """What a layer runs that was called outside of any pass: computed again, or refused.

        Raises:
            RuntimeError: nothing tells which pass the call belongs to.
        """
        again, original = self.run_again()
        if again:
            return LayerRun() if original is None else original.runs[name]
        if in_backward():
            raise RuntimeError(
                f"{name} is computed again in a backward pass, and dittfast cannot tell which "
                "forward pass it belongs to. Checkpoint with "
                "transformer.enable_gradient_checkpointing(), or with "
                "torch.utils.checkpoint.checkpoint around parts that are not compiled"
            )
        raise RuntimeError(
            f"{name} was called outside of a forward pass of its transformer, so dittfast does "
            "not know the layout of its tokens. Call the transformer itself, or take dittfast "
            "out first with dittfast.disable"
        )


def in_backward() -> bool:
    """Whether this thread runs a backward pass."""
    return torch._C._current_graph_task_id() != -1


def _checkpoint_file() -> str | None:
    """Where PyTorch's checkpointing is written; None while nobody has imported it."""
    module = sys.modules.get("torch.utils.checkpoint")
    return None if module is None else module.__file__


def _checkpointed_calls(frame: FrameType | None) -> Iterator[object]:
    """What PyTorch keeps for each checkpointed call that ``frame`` runs in, on the way forward."""
    file = _checkpoint_file()
    hooks = None if file is None else torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is not None:  # without a frame of its own: torch.distributed's composable form
        inside = dict(zip(hooks[0].__code__.co_freevars, hooks[0].__closure__ or ()))
        if hooks[0].__code__.co_filename == file and "frame" in inside:
            yield inside["frame"].cell_contents
    while file is not None and frame is not None:
        code = frame.f_code
        if code.co_filename == file:
            if code.co_name == "forward":  # reentrant
                yield frame.f_locals["ctx"]
            elif code.co_name == "checkpoint" and "gen" in frame.f_locals:
                yield frame.f_locals["gen"].gi_frame.f_locals["new_frame"]
        frame = frame.f_back


def _calls_run_again(frame: FrameType | None) -> Iterator[object]:
    """The same objects, where the calls are computed again."""
    file = _checkpoint_file()
    while file is not None and frame is not None:
        code = frame.f_code
        if code.co_filename == file:
            if code.co_name == "backward":  # reentrant
                yield frame.f_locals["ctx"]
            elif code.co_name == "unpack_hook":
                yield frame.f_locals["frame"]
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
