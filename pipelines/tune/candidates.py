"""Which methods and options are tried: for every method a few settings, from sparse to dense."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

from dittfast.config import unknown
from dittfast.layout import Layout
from dittfast.methods import METHODS
from dittfast.methods.base import Method

logger = logging.getLogger(__name__)

# A plan that keeps more saves nothing worth an error.
_MOST_DENSITY = 0.9


def tunable() -> list[str]:
    """Methods that can be tried on a model as it is, step by step.

    Those without parameters to be trained, which keep nothing from one step for the next.
    """
    return [name for name, cls in METHODS.items() if not cls.dense and _is_tunable(cls())]


def _is_tunable(method: Method) -> bool:
    if method.remembers or method.needs_hidden_states:
        return False
    return not method.layer_parameters(1, 8)


def check_methods(names: Iterable[str]) -> list[str]:
    """The names, checked.

    Raises:
        ValueError: none, an unknown method, one twice, or one that cannot be tried step by step.
    """
    names, known = list(names), tunable()
    for name in names:
        if name in METHODS and name not in known:
            raise ValueError(
                f"{name} cannot be tuned: it is dense attention, has to be trained first, or keeps "
                "values from step to step. "
                f"Methods: {', '.join(known)}"
            )
        if name not in known:
            raise unknown("method", name, known)
        if names.count(name) > 1:
            raise ValueError(f"the method {name} is named twice; name each once")
    if not names:
        raise ValueError(f"there are no methods to try; name some of {', '.join(known)}")
    return names


def candidates(layout: Layout, names: Iterable[str], device="cpu") -> list[Method]:
    """What is tried on a layout, the sparsest setting of each method first.

    Settings whose plan does not depend on q and k, and that keep nearly all pairs of tokens or the
    same as the one before, are left out.

    Args:
        names: of methods, see :func:`check_methods`.
    """
    found: list[Method] = []
    for name in names:
        densities: list[float] = []
        for options in METHODS[name].ladder(layout):
            try:
                method = METHODS[name](**options)
                kept = method.keep(layout, torch.device(device))
                density = method.amount(layout, None, None, kept).density
            except ValueError as error:
                logger.info("%s %s is not tried: %s", name, options, error)
                continue
            if density is not None:
                if density > _MOST_DENSITY or density in densities:
                    continue
                densities.append(density)
            found.append(method)
    if not found:
        raise ValueError(
            f"no setting of {', '.join(names)} leaves anything out of {layout.num_tokens:,} "
            "tokens; draw larger, or name other methods"
        )
    return found
