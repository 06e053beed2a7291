"""What a run will need, known when its first pass begins: tokens and memory."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch

from ..families import FAMILIES
from ..families.sequences import Sequences
from ..models import bind_arguments, is_swapped, stock_class

logger = logging.getLogger(__name__)

# Values of a token that a block holds at once, in units of the model's width: the hidden state and
# its normed copy, q, k, v and the output, and a feed-forward layer four times as wide, before and
# after its activation.
_WIDTHS = 14


@dataclass(frozen=True)
class Needs:
    """What a pass of the transformer works on, and the memory that it takes.

    Attributes:
        tokens: of a sequence; None for a family that is not known.
        batch: sequences in a pass (two where guidance is batched).
        weights: bytes of all parameters and buffers of the pipeline.
        activations: bytes of a pass, roughly; the decoder's come on top, after the last step.
        plan: bytes of the block lists made so far; 0 for dense attention.
    """

    tokens: int | None
    batch: int
    weights: int
    activations: int | None
    plan: int

    def __str__(self) -> str:
        parts = [f"weights {_size(self.weights)}"]
        if self.activations is not None:
            parts.append(f"activations of a pass about {_size(self.activations)}")
        if self.plan:
            parts.append(f"plan {_size(self.plan)}")
        tokens = "tokens not known" if self.tokens is None else f"{self.tokens:,} tokens"
        times = f" x {self.batch}" if self.batch > 1 else ""
        return f"{tokens}{times}; memory: {', '.join(parts)}; decoding comes on top"


def log_needs(pipe, model: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    """Log, for information, what the pass that begins with these arguments needs."""
    if logger.isEnabledFor(logging.INFO):
        logger.info("%s", needs_of_pass(pipe, model, args, kwargs))


def needs_of_pass(pipe, model: torch.nn.Module, args: tuple, kwargs: dict) -> Needs:
    """The needs of a pass that begins with these arguments of the transformer's forward."""
    arguments = bind_arguments(model, args, kwargs)
    family = FAMILIES.get(stock_class(type(model)).__name__)
    layout = None
    if is_swapped(model):
        layout = model._dittfast.layout
    elif family is not None:
        layout = Sequences.of(family.read(model, arguments)).layout
    hidden = next(x for x in arguments.values() if torch.is_tensor(x) and x.is_floating_point())
    batch = hidden.shape[0]
    width = _width(model)
    activations = None
    if layout is not None and width is not None:
        activations = batch * layout.num_tokens * width * _WIDTHS * hidden.element_size()
    return Needs(
        None if layout is None else layout.num_tokens,
        batch,
        _weights(pipe),
        activations,
        model._dittfast.cores.nbytes if is_swapped(model) else 0,
    )


def _width(model: torch.nn.Module) -> int | None:
    """Channels of a token inside the model."""
    config = getattr(model, "config", {})
    heads, size = config.get("num_attention_heads"), config.get("attention_head_dim")
    if isinstance(heads, int) and isinstance(size, int):
        return heads * size
    width = config.get("hidden_size") or config.get("dim")
    return width if isinstance(width, int) else None


def _weights(pipe) -> int:
    components = getattr(pipe, "components", {"transformer": pipe})
    modules = [x for x in components.values() if isinstance(x, torch.nn.Module)]
    tensors = {id(x): x for m in modules for x in (*m.parameters(), *m.buffers())}
    return sum(math.prod(x.shape) * x.element_size() for x in tensors.values())


def _size(count: float) -> str:
    for factor, unit in ((1e9, "GB"), (1e6, "MB")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"
