"""The oracle as a backend: `backend="reference"`."""

from __future__ import annotations

from .op import define_backend
from .reference import backward, forward

attend = define_backend("reference", forward, backward, twice=True)


def not_supported_reasons(q, k, v) -> list[str]:
    """The oracle runs everything that fits in memory."""
    return []
