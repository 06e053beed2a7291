"""What a preset may cost in quality or must gain in speed: parsed strictly, and judged."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dittfast.config import unknown

# name -> (the sign that it takes, what values are allowed, and the check of them)
_KINDS = {
    "psnr": (">=", "above 0 and at most 100 dB", lambda x: 0 < x <= 100),
    "speedup": (">=", "above 1, times dense attention", lambda x: x > 1),
    "distance": ("<=", "above 0 and below 1, relative to the latents", lambda x: 0 < x < 1),
}
_FORM = re.compile(r"\s*(\w+)\s*(>=|<=|==|=|>|<)\s*(\S+)\s*")
# What a preset is drawn for: the measures in which it may differ from dense attention.
QUALITIES = ("psnr", "distance")
# dB that stand for pictures without a difference; 8 bits cannot show as many.
EQUAL = 120.0


class ImpossibleBudget(ValueError):
    """No preset holds the budget; the message says which is nearest."""


@dataclass(frozen=True)
class Budget:
    """Bounds on a preset, each a mean over prompts; None where there is none.

    Attributes:
        psnr: least PSNR of pictures to dense attention's, in dB.
        distance: most of ``|x - dense| / |dense|`` of the final latents.
        speedup: least seconds of dense attention's whole call over the preset's.
    """

    psnr: float | None = None
    distance: float | None = None
    speedup: float | None = None

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Budget:
        """``["psnr>=30", "speedup>=1.5"]``.

        Raises:
            ValueError: none, another form, a measure given twice, the wrong sign or range.
        """
        given: dict[str, float] = {}
        for text in texts:
            name, value = _parse(text)
            if name in given:
                raise ValueError(
                    f"the budget has {name} twice, {name}{_KINDS[name][0]}{given[name]:g} and "
                    f"{text!r}; give each measure once"
                )
            given[name] = value
        if not given:
            raise ValueError("there is no budget; give one, such as psnr>=30 or speedup>=1.5")
        return cls(**given)

    @property
    def has_quality(self) -> bool:
        return any(getattr(self, name) is not None for name in QUALITIES)

    def words(self) -> list[str]:
        """As :meth:`parse` reads it."""
        values = {name: getattr(self, name) for name in _KINDS}
        return [f"{n}{_KINDS[n][0]}{x:g}" for n, x in values.items() if x is not None]

    def lacks(self, measured: Mapping[str, float], names: Iterable[str] = _KINDS) -> list[str]:
        """The bounds that ``measured`` does not hold, in words; empty where it holds all.

        What was not measured is not held.
        """
        lines = []
        for name in names:
            bound = getattr(self, name)
            if bound is None:
                continue
            if name not in measured:
                lines.append(f"{name} was not measured")
                continue
            sign, value = _KINDS[name][0], measured[name]
            held = value >= bound if sign == ">=" else value <= bound
            if not held:
                lines.append(f"{name} {value:.4g}, not {sign} {bound:g}")
        return lines


def _parse(text: str) -> tuple[str, float]:
    match = _FORM.fullmatch(text)
    if match is None:
        raise ValueError(f"a budget is written NAME>=NUMBER, such as psnr>=30, got {text!r}")
    name, sign, number = match.groups()
    if name not in _KINDS:
        raise unknown("budget", name, _KINDS)
    wanted, allowed, holds = _KINDS[name]
    if sign != wanted:
        raise ValueError(f"{name} takes {wanted}, got {text!r}; write {name}{wanted}{number}")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and holds(value)):
        raise ValueError(f"{name} must be {allowed}, got {number!r}")
    return name, value


def squared(measure: str, value: float) -> float:
    """The squared error that a measure stands for."""
    return 10 ** (-value / 10) if measure == "psnr" else value**2


def value_of(measure: str, error: float) -> float:
    """What a measure is at a squared error."""
    if measure == "distance":
        return math.sqrt(error)
    return -10 * math.log10(error) if error > 0 else EQUAL


def better(measure: str, value: float, decibels: float) -> float:
    """A value of a measure whose squared error is lower by so much."""
    return value_of(measure, squared(measure, value) * 10 ** (-decibels / 10))
