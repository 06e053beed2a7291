"""Which pipeline a forward pass belongs to, read from the Python frames it was called through.

Several pipelines may share one transformer, each with a scheduler of its own, and nothing in the
arguments of a pass says whose it is. The loop that makes the pass does.
"""

from __future__ import annotations

import inspect
import sys
from types import FrameType, FunctionType, MethodType, NoneType
from typing import NamedTuple

import torch

_OWN = f"{__package__}."
# Before Python 3.13 a function's frame keeps the copy of its variables that it gave, while it runs.
_COPIES = sys.version_info < (3, 13)
# Types of most variables, which are neither pipelines nor schedulers.
_PLAIN = frozenset(
    {NoneType, bool, int, float, str, list, tuple, dict, set, FunctionType, MethodType}
    | {torch.Tensor, torch.dtype, torch.device, torch.Size, torch.Generator, type}
)


class Running(NamedTuple):
    """What the frames around a pass hold, nearest first.

    Attributes:
        pipelines: objects with a scheduler that hold the transformer, of the nearest frame that
            has any: the one whose method runs, or all that are its local variables.
        schedulers: schedulers that are local variables on the way there.
        times: tensors named ``t`` on the way there, as diffusers' loops call the timestep.
    """

    pipelines: list
    schedulers: list
    times: list[torch.Tensor]


def running_pipeline(model: torch.nn.Module) -> object | None:
    """The pipeline whose loop calls ``model`` right now in this thread; None outside of any."""
    pipelines = running(model).pipelines
    return pipelines[0] if pipelines else None


def running(model: torch.nn.Module) -> Running:
    """Look outward from the caller, in this thread.

    A pipeline is any object with a ``scheduler`` that has ``timesteps``, and with ``model``, or a
    wrapper that the call came through, among its attributes or ``components``. Nothing is found
    while torch.compile traces. No frame keeps a variable alive for having been looked at.
    """
    loops = Running([], [], [])
    if torch.compiler.is_compiling():
        return loops
    called, owner = [model], None
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__", "").startswith(_OWN):
        frame = frame.f_back  # our own, which know the pipeline that was enabled
    while frame is not None:
        first = _look(frame, called, loops, only_times=owner is not None)
        if owner is not None and first is not owner:
            break
        if loops.pipelines:
            if first is None or loops.times:
                break
            owner = first  # the loop may stand in another method of it, further out
        if callable(first):
            called.append(first)
        frame = frame.f_back
    return loops


def _look(frame: FrameType, called: list, loops: Running, only_times: bool) -> object:
    """Enter what one frame holds into ``loops``; returns its first argument, mostly ``self``."""
    code, variables = frame.f_code, frame.f_locals
    name = code.co_varnames[0] if code.co_argcount else None
    first = variables.get(name)
    if isinstance(t := variables.get("t"), torch.Tensor):
        loops.times.append(t)
    if not only_times:
        if type(first) not in _PLAIN:
            _sort(first, called, loops)
        if not (loops.pipelines and name == "self"):  # a pipeline's own method: it runs
            for value in variables.values():
                if type(value) not in _PLAIN:
                    _sort(value, called, loops)
    if _COPIES and code.co_flags & inspect.CO_OPTIMIZED and sys.getrefcount(variables) <= 3:
        # Nobody in that function called locals() and holds the copy: of the three references one
        # is the frame's, one ours, and one getrefcount's.
        variables.clear()
    return first


def _sort(value, called: list, loops: Running) -> None:
    """Enter ``value`` if it is a scheduler, or a pipeline that holds what was called."""
    if isinstance(value, (torch.Tensor, type)):
        return
    try:
        parts = value.__dict__
    except Exception:  # it has none, or is a stranger's proxy without a target
        return
    if isinstance(parts.get("timesteps"), torch.Tensor) and hasattr(value, "step"):
        loops.schedulers.append(value)
    elif "scheduler" in parts or hasattr(type(value), "components"):
        known = any(value is pipeline for pipeline in loops.pipelines)
        if not known and _is_pipeline(value, parts, called):
            loops.pipelines.append(value)


def _is_pipeline(value, parts: dict, called: list) -> bool:
    if not hasattr(getattr(value, "scheduler", None), "timesteps"):
        return False
    if _holds(parts, called) or _holds(parts.get("_modules"), called):
        return True
    return _holds(getattr(value, "components", None), called)


def _holds(parts, called: list) -> bool:
    return isinstance(parts, dict) and any(part is x for part in parts.values() for x in called)
