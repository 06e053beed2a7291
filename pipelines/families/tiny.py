"""Tiny random models of every family, by name, for ``dittfast parity`` and the tests."""

from __future__ import annotations

import diffusers

from .tiny_image import TINY_IMAGE
from .tiny_model import Tiny
from .tiny_packed import TINY_PACKED
from .tiny_video import TINY_VIDEO

# To ask the package for a class would import it.
_NAMES = frozenset(dir(diffusers))
# Those whose classes the installed diffusers has.
TINY: dict[str, Tiny] = {
    name: tiny
    for name, tiny in (TINY_IMAGE | TINY_VIDEO | TINY_PACKED).items()
    if tiny.name in _NAMES
}


def tiny_of(name: str) -> Tiny:
    """The tiny model of a transformer class; of its variants the plainest, which comes first.

    Raises:
        ValueError: there is none, or the installed diffusers has no such class.
    """
    for tiny in TINY.values():
        if tiny.name == name:
            return tiny
    raise ValueError(
        f"diffusers {diffusers.__version__} has no {name} that is known here; "
        "pip install -U diffusers"
    )
