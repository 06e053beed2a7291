"""Attention methods: each a frozen config that plans which key blocks a query block sees."""

from .base import Method
from .dense import Dense
from .local import Local
from .log_linear import LogLinear
from .neighborhood import Neighborhood
from .radial import Radial
from .rectified import Rectified

METHODS: dict[str, type[Method]] = {
    "dense": Dense,
    "radial": Radial,
    "local": Local,
    "neighborhood": Neighborhood,
    "log_linear": LogLinear,
    "rectified": Rectified,
}

__all__ = [
    *("METHODS", "Method"),
    *("Dense", "Local", "LogLinear", "Neighborhood", "Radial", "Rectified"),
]
