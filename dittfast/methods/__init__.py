"""Attention methods: each a frozen config that plans which key blocks a query block sees."""

from .base import Method
from .dense import Dense
from .local import Local
from .radial import Radial

METHODS: dict[str, type[Method]] = {"dense": Dense, "radial": Radial, "local": Local}

__all__ = ["METHODS", "Method", "Dense", "Radial", "Local"]
