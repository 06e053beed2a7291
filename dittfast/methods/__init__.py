"""Attention methods: each a frozen config that plans attention, or computes it itself."""

from .agent import Agent
from .base import Method
from .dense import Dense
from .linear import Linear
from .local import Local
from .log_linear import LogLinear
from .mixture_of_heads import MixtureOfHeads
from .neighborhood import Neighborhood
from .radial import Radial
from .reattention import Reattention
from .rectified import Rectified
from .sla import SLA
from .sol import Sol
from .topk import TopK
from .vsa import VSA

METHODS: dict[str, type[Method]] = {
    "dense": Dense,
    "radial": Radial,
    "local": Local,
    "neighborhood": Neighborhood,
    "topk": TopK,
    "log_linear": LogLinear,
    "rectified": Rectified,
    "sol": Sol,
    "sla": SLA,
    "vsa": VSA,
    "reattention": Reattention,
    "linear": Linear,
    "agent": Agent,
    "mixture_of_heads": MixtureOfHeads,
}

__all__ = [
    *("METHODS", "Method"),
    *(
        "SLA",
        "Agent",
        "Dense",
        "Linear",
        "Local",
        "LogLinear",
        "MixtureOfHeads",
        "Neighborhood",
        "Radial",
        "Reattention",
        "Rectified",
        "Sol",
        "TopK",
        "VSA",
    ),
]
