"""What the text of an option may be, checked as it is read: before anything is loaded or drawn."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence

LARGEST_SEED = 2**63 - 1


def text(given: str) -> str:
    """Any text but an empty one; what an option takes where it says nothing else."""
    if not given.strip():
        raise argparse.ArgumentTypeError(f"must not be empty, got {given!r}; leave it out")
    return given


def anything(given: str) -> str:
    """Any text, the empty one too."""
    return given


def whole(least: int = 1, most: int | None = None) -> Callable[[str], int]:
    """A whole number in ``least..most``, without a bound where ``most`` is None."""

    def parse(given: str) -> int:
        try:
            value = int(given)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {given!r}") from None
        if value < least or (most is not None and value > most):
            allowed = f"be at least {least}" if most is None else f"lie in {least}..{most}"
            raise argparse.ArgumentTypeError(f"must {allowed}, got {value}")
        return value

    return parse


seed = whole(0, LARGEST_SEED)


def number(
    least: float = -math.inf,
    most: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> Callable[[str], float]:
    """A finite number: at least, at most, above and below what is given."""
    bounds = ((least, "at least"), (above, "above"), (most, "at most"), (below, "below"))
    allowed = " and ".join(f"{words} {bound:g}" for bound, words in bounds if math.isfinite(bound))
    allowed = "a finite number" + (f", {allowed}" if allowed else "")

    def parse(given: str) -> float:
        try:
            value = float(given)
        except ValueError:
            value = math.nan
        # Not a chain of its opposites: a NaN has to fail.
        if not (math.isfinite(value) and least <= value <= most and above < value < below):
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {given!r}")
        return value

    return parse


def number_or_fit(given: str) -> float | str:
    """A number above 0, or the word fit."""
    return given if given == "fit" else number(above=0)(given)


def names(given: str) -> list[str]:
    """``"local, topk"`` as ``["local", "topk"]``, each once."""
    listed = given.replace(",", " ").split()
    if not listed:
        raise argparse.ArgumentTypeError(f"must be names such as local,topk, got {given!r}")
    different(listed)
    return listed


def numbers(given: str) -> list[int]:
    """``"0, 4-6"`` as ``[0, 4, 5, 6]``, each number once."""
    listed: list[int] = []
    for item in given.replace(",", " ").split():
        first, dash, last = item.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise argparse.ArgumentTypeError(
                f"must be numbers such as 0,1 or 0-3, got {item!r} in {given!r}"
            )
        low, high = int(first), int(last or first)
        if not low <= high <= LARGEST_SEED or high - low > 100_000:
            raise argparse.ArgumentTypeError(
                f"must be numbers such as 0,1 or rising ranges such as 0-3, got {item!r}"
            )
        listed.extend(range(low, high + 1))
    if not listed:
        raise argparse.ArgumentTypeError(f"must be numbers such as 0,1 or 0-3, got {given!r}")
    different(listed)
    return listed


def places(given: str) -> list[int]:
    """``"0,3,-1"`` as ``[0, 3, -1]``, each number once; negative ones count from the end."""
    try:
        listed = [int(item) for item in given.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers such as 0,3, got {given!r}") from None
    different(listed)
    return listed


def different(values: Sequence) -> None:
    """Refuses a list that names one of its values twice."""
    seen = set()
    for value in values:
        if value in seen:
            raise argparse.ArgumentTypeError(f"must not name {value} twice; name each once")
        seen.add(value)


def sizes(given: str) -> list[tuple[int, int]]:
    """``"256,512x768"`` as ``[(256, 256), (512, 768)]``: height and width of each."""
    pairs = []
    for item in given.split(","):
        height, x, width = item.strip().partition("x")
        if not height.isdigit() or (x and not width.isdigit()):
            raise argparse.ArgumentTypeError(
                f"must be sizes such as 256,512 or 256x384,512x768, got {item!r}"
            )
        pairs.append((int(height), int(width if x else height)))
    return pairs
