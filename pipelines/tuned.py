"""Presets that were tuned for one model: whether this is it, and whether the size is theirs."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from dittfast.layout import Layout
from dittfast.methods.base import Method
from dittfast.mixture import Mixture

from .fingerprint import difference

logger = logging.getLogger(__name__)


class TunedSizes:
    """The sizes that a preset was tuned for; says once where another one is drawn.

    Args:
        sizes: frames, rows and columns of the token grid.
    """

    def __init__(self, sizes: list[list[int]]):
        self.sizes = [tuple(size) for size in sizes]
        self._told: set[tuple] = set()

    def check(self, layout: Layout) -> None:
        size = layout.grid.shape if layout.grids else ()
        if size in self.sizes or size in self._told:
            return
        self._told.add(size)
        logger.warning(
            "the preset was tuned for %s tokens, and this pass has %s: what was measured of it "
            "does not hold here; tune one for this size, or judge the pictures yourself",
            " or ".join(" x ".join(map(str, size)) for size in self.sizes),
            " x ".join(map(str, size)) or "no grid",
        )


def check_tuned(
    method: Method, models: Mapping[str, torch.nn.Module], any_model: bool = False
) -> TunedSizes | None:
    """Whether a preset that was tuned for one model is put into that model.

    Args:
        method: a method; only a mixture that was read from a tuned preset is looked at.
        models: the transformers by component; of one without weights class and shapes count.
        any_model: go on with another model, with a warning.

    Returns:
        The sizes it was tuned for; None of what was not tuned.

    Raises:
        ValueError: another model; the message says in what it differs.
    """
    tuned = method.tuned if isinstance(method, Mixture) else None
    if tuned is None:
        return None
    known = tuned["fingerprints"]
    for component, model in models.items():
        wrong = f"there was no {component}"
        if component in known:
            is_empty = any(p.is_meta for p in model.parameters())
            expected = known[component] | ({"values": {}} if is_empty else {})
            wrong = difference(expected, model)
        if not wrong:
            continue
        words = f"the preset was tuned for {tuned['model']}, and this is another model: {wrong}"
        if not any_model:
            raise ValueError(
                f"{words}. Tune one for this model with dittfast tune, or take it all the same: "
                "any_model=True (--any-model)"
            )
        logger.warning("%s; taken all the same", words)
    return TunedSizes(tuned["sizes"])
