"""How much of dense attention a method does: the pairs it keeps, or the FLOPs it computes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Amount(NamedTuple):
    """What a method does next to dense attention.

    Attributes:
        density: kept fraction of token pairs; None where that means nothing, because the method
            computes its own output, and where it is not known yet.
        work: FLOPs of its matrix products over those of dense attention, summary tokens included;
            None where it is not known yet.
    """

    density: float | None
    work: float | None

    def __str__(self) -> str:
        if self.density is not None:
            return f"density {self.density:.3f}"
        if self.work is not None:
            return f"FLOPs {self.work:.3g} of dense"
        return "density differs by call"


UNKNOWN = Amount(None, None)


def mean_amount(amounts: Iterable[tuple[float, Amount]]) -> Amount:
    """The mean of weighted amounts; None where a part of it has none, or there are none."""
    amounts = list(amounts)
    total = sum(weight for weight, _ in amounts)

    def mean(values):
        known = total > 0 and None not in values
        return sum(w * x for (w, _), x in zip(amounts, values)) / total if known else None

    return Amount(*(mean([a[i] for _, a in amounts]) for i in (0, 1)))


def dense_flops(tokens: int, heads: int, head_dim: int) -> float:
    """FLOPs of dense attention over one sample, forward."""
    return 4.0 * tokens**2 * head_dim * heads
