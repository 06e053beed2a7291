"""The oracle as a backend: `backend="reference"`."""

from __future__ import annotations

from .capabilities import Capabilities
from .op import define_backend
from .reference import backward, forward

CAPABILITIES = (Capabilities(tail=True),)
attend = define_backend("reference", forward, backward, twice=True, own_tail=True)
