"""Tiny random models of every family, by name, for ``dittfast parity`` and the tests."""

from __future__ import annotations

from .tiny_image import TINY_IMAGE
from .tiny_model import Tiny
from .tiny_packed import TINY_PACKED
from .tiny_video import TINY_VIDEO

TINY: dict[str, Tiny] = TINY_IMAGE | TINY_VIDEO | TINY_PACKED


def tiny_of(name: str) -> Tiny:
    """The tiny model of a transformer class; of its variants the plainest, which comes first."""
    return next(tiny for tiny in TINY.values() if tiny.name == name)
