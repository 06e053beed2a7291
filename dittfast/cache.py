"""A cache that forgets what was used longest ago, bounded in number and in bytes."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from typing import Any

import torch


def nbytes(value: Any) -> int:
    """Bytes of all tensors in ``value``, each counted once.

    Looks into tuples, lists, dicts, dataclasses and whatever has ``__dict__`` (plans keep what is
    made of them later there, and it counts). Anything without tensors is 0.
    """
    return sum(x.numel() * x.element_size() for x in _tensors(value, set()))


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if id(value) in seen or isinstance(value, (str, bytes, int, float, type)):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
        return
    if isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, (tuple, list)):
        parts = value
    else:
        parts = list(getattr(value, "__dict__", {}).values())
        if dataclasses.is_dataclass(value):  # one with slots has no __dict__
            parts += [getattr(value, f.name) for f in dataclasses.fields(value)]
    for part in parts:
        yield from _tensors(part, seen)


class BytesLRU:
    """At most ``max_items`` values of at most ``max_bytes`` together; oldest use goes first.

    The newest value stays whatever its size, because it is about to be used. Sizes are taken anew
    at every insertion: a plan grows when its transposed lists are made. Safe with threads: two that
    ask for one key get the same object, made once, and nobody waits while another key is made.

    Args:
        max_items: values kept, at least 1.
        max_bytes: bytes kept, above 0.
        size: bytes of a value; default :func:`nbytes`.

    Raises:
        ValueError: a bound that is not positive.
    """

    def __init__(self, max_items: int, max_bytes: int, size: Callable[[Any], int] = nbytes):
        for name, bound in (("max_items", max_items), ("max_bytes", max_bytes)):
            if bound < 1:
                raise ValueError(f"{name} must be at least 1, got {bound!r}")
        self.max_items, self.max_bytes, self._size = max_items, max_bytes, size
        # Two dicts: torch.compile, which may look into the first, guards nothing that use changes.
        self._values: dict[Hashable, Any] = {}
        self._used: dict[Hashable, None] = {}
        self._making: dict[Hashable, Future] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of ``key``, from ``make()`` where it is not held.

        What ``make`` raises is raised, also in threads that waited for it, and nothing is kept.
        ``make`` may ask for other keys, not for its own.
        """
        with self._lock:
            if key in self._values:
                self._touch(key)
                return self._values[key]
            pending = self._making.get(key)
            if pending is None:
                mine = self._making[key] = Future()
        if pending is not None:
            return pending.result()
        try:
            value = make()
        except BaseException as error:
            with self._lock:
                del self._making[key]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._making[key]
            self._values[key] = value
            self._touch(key)
            self._make_room(key)
        mine.set_result(value)
        return value

    def peek(self, key: Hashable) -> Any | None:
        """The value of ``key`` or None; no lock and no mark of use, so torch.compile can trace it.

        Give string keys there: the graph is then guarded by its own entry and by no other.
        """
        return self._values.get(key)

    def __iter__(self) -> Iterator[Hashable]:
        """All keys, longest unused first, as they are now."""
        with self._lock:
            return iter(list(self._used))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        with self._lock:
            return sum(self._size(value) for value in self._values.values())

    def clear(self) -> None:
        with self._lock:
            self._values.clear()
            self._used.clear()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def __deepcopy__(self, memo) -> BytesLRU:
        # A copied pipeline fills its own; locks cannot be copied.
        return BytesLRU(self.max_items, self.max_bytes, self._size)

    def __reduce__(self):
        return BytesLRU, (self.max_items, self.max_bytes, self._size)

    def _touch(self, key: Hashable) -> None:
        self._used.pop(key, None)
        self._used[key] = None

    def _make_room(self, newest: Hashable) -> None:
        sizes = {key: self._size(value) for key, value in self._values.items()}
        held = sum(sizes.values())
        for key in list(self._used):
            if key == newest or (len(self._values) <= self.max_items and held <= self.max_bytes):
                return
            held -= sizes[key]
            del self._values[key], self._used[key]
