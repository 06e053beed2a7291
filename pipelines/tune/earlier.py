"""Blocks of a transformer before a changed layer, which need not run again: what they gave."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch

# Outputs that are kept; those of a large model's first blocks alone may be as many.
_MOST_BYTES = 2**30


class Earlier:
    """What each block of a transformer gave in one pass, in the order in which they ran.

    A block is an entry of an outermost ``ModuleList``. Those from the first that was called twice,
    is compiled, gave something else than tensors, or would not fit beside the others, are left out.

    Args:
        model: the transformer. run: runs the pass.
    """

    def __init__(self, model: torch.nn.Module, run: Callable[[], object]):
        self._blocks = dict(_blocks(model))
        self._given: list[tuple[str, object]] = []
        left, whole = _MOST_BYTES, True

        def keep(name: str, out) -> None:
            nonlocal left, whole
            left -= _size(out) or _MOST_BYTES
            compiled = self._blocks[name]._compiled_call_impl is not None
            whole = whole and left >= 0 and not compiled and name not in dict(self._given)
            if whole:
                self._given.append((name, _copy(out)))

        with contextlib.ExitStack() as stack:
            for name, block in self._blocks.items():
                hook = block.register_forward_hook(lambda *x, name=name: keep(name, x[-1]))
                stack.callback(hook.remove)
            run()

    @contextlib.contextmanager
    def reused(self, layers: Iterable[str]) -> Iterator[None]:
        """Inside, blocks that ran before all that hold one of ``layers`` give what they gave."""
        layers = tuple(layers)
        with contextlib.ExitStack() as stack:
            for name, out in self._given:
                if any(layer.startswith(name + ".") for layer in layers):
                    break
                block = self._blocks[name]
                stack.callback(_set_forward, block, block.__dict__.get("forward"))
                _set_forward(block, lambda *args, out=out, **kwargs: _copy(out))
            yield


def _set_forward(block: torch.nn.Module, forward: Callable | None) -> None:
    if forward is None:
        block.__dict__.pop("forward", None)
    else:
        block.__dict__["forward"] = forward


def _blocks(module: torch.nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.nn.Module]]:
    for name, child in module.named_children():
        if isinstance(module, torch.nn.ModuleList):
            yield prefix + name, child
        else:
            yield from _blocks(child, f"{prefix}{name}.")


def _copy(out):
    """Tensors of their own: what runs later may write into what it is given."""
    return out.clone() if isinstance(out, torch.Tensor) else tuple(x.clone() for x in out)


def _size(out) -> int | None:
    """Bytes of a tensor or a tuple of them; None for anything else."""
    parts = out if isinstance(out, tuple) else (out,)
    if not parts or not all(isinstance(x, torch.Tensor) for x in parts):
        return None
    return sum(x.numel() * x.element_size() for x in parts)
