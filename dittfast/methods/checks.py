"""Checks of method options: every error names the value, the allowed range and the remedy."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from numbers import Integral, Real

MAX_BLOCK_SIZE = 256  # the most queries or keys the kernels take in one block
_MOST = 2**31 - 1  # what an int32 holds: no option means more of anything
_LARGEST = 3.4e38  # what fp32 holds


def check_integer(name: str, value, low: int, high: int | None = None, remedy: str = "") -> None:
    """Raise ValueError unless ``value`` is an integer in ``low..high`` (2^31 - 1 where None)."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or not low <= value <= (_MOST if high is None else high):
        small = high is None and not (whole and value > _MOST)
        allowed = f"at least {low}" if small else f"{low}..{high or _MOST}"
        raise ValueError(f"{name} must be an integer, {allowed}; got {value!r}{_then(remedy)}")


def is_number(value) -> bool:
    """Whether ``value`` is a number that fp32 holds, or an infinity; True and False are none."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    return number and (abs(value) <= _LARGEST or value in (math.inf, -math.inf))


def check_flag(name: str, value, where: str = "") -> None:
    """Raise ValueError unless ``value`` is True or False; a word such as "false" would be true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False{where}; got {value!r}")


def check_positive(name: str, value, remedy: str = "") -> None:
    """Raise ValueError unless ``value`` is a finite number above 0."""
    if not is_number(value) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be a finite number above 0; got {value!r}{_then(remedy)}")


def check_choice(name: str, value, choices: Iterable[str]) -> None:
    """Raise ValueError, with the nearest choice, unless ``value`` is one of ``choices``."""
    choices = list(choices)
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, 1)
        hint = f"did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}{_then(hint)}")


def check_block_size(value, name: str = "block_size") -> None:
    """Raise ValueError unless the kernels can take blocks of ``value`` tokens."""
    remedy = f"the kernels hold at most {MAX_BLOCK_SIZE} tokens of a block; 64 and 128 run best"
    check_integer(name, value, 1, MAX_BLOCK_SIZE, remedy)


def check_tile(value, name: str = "tile") -> tuple[int, int, int]:
    """Tokens of a block as ``(frames, height, width)``.

    Raises:
        ValueError: not three sides of at least 1, or more tokens than the kernels take.
    """
    tile = tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(tile) != 3:
        raise ValueError(f"{name} must be (frames, height, width); got {value!r}")
    for side in tile:
        check_integer(f"each side of {name}", side, 1)
    check_integer(f"tokens in a {name}", math.prod(tile), 1, MAX_BLOCK_SIZE)
    return tuple(int(side) for side in tile)


def each(value) -> tuple:
    """The values of an option that may be a list with one for each head."""
    return value if isinstance(value, tuple) else (value,)


def _then(remedy: str) -> str:
    return f" ({remedy})" if remedy else ""
