"""What a forward pass costs, computed from module shapes: FLOPs of matrix products.

How many tokens each linear layer and each attention sees is learned from the family's tiny model,
which runs once; the shapes come from the model in question, on the meta device.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from dittfast.layout import Layout

from ..families import FAMILIES, Family
from ..families.sequences import Sequences
from .parity import TINY, output


@dataclass(frozen=True)
class Cost:
    """FLOPs of one forward pass of one sample. Norms, activations and softmax are not counted.

    Attributes:
        linear: linear layers and patch embeddings.
        attention: the self-attention that a method replaces, dense: ``4 N² D`` a layer.
        other_attention: cross-attention and refiners.
        layers, heads, head_dim: of the self-attention.
    """

    linear: float
    attention: float
    other_attention: float
    layers: int
    heads: int
    head_dim: int

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.other_attention

    @property
    def attention_share(self) -> float:
        """Of all FLOPs, those a method can save."""
        return self.attention / self.total

    def speedup(self, kept: float) -> float:
        """How many times fewer FLOPs with a fraction ``kept`` of the attention; 0: the ceiling."""
        return 1 / (1 - self.attention_share * (1 - kept))


_MATRICES = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


def _key(name: str) -> str:
    """Module names of all blocks as one: ``blocks.3.attn1`` -> ``blocks.*.attn1``."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


class _Lengths(TorchFunctionMode):
    """Rows that each matrix module sees, and the lengths of each attention module's calls."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.rows: dict[str, int] = {}
        self.calls: dict[str, list[tuple[int, int]]] = {}
        self.inside: str | None = None
        self.hooks = []
        for name, module in model.named_modules():
            if isinstance(module, _MATRICES):
                self.hooks.append(module.register_forward_hook(self._matrix(_key(name))))
            if callable(getattr(module, "processor", None)):
                self.hooks.append(module.register_forward_pre_hook(self._enter(_key(name))))
                self.hooks.append(module.register_forward_hook(self._leave))

    def _matrix(self, key):
        def record(module, args, out):
            linear = isinstance(module, torch.nn.Linear)
            self.rows[key] = out.numel() // out.shape[-1 if linear else 1]

        return record

    def _enter(self, key):
        def record(module, args):
            self.inside = key
            self.calls[key] = []

        return record

    def _leave(self, module, args, out):
        self.inside = None

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.inside is not None:
            call = {**dict(zip(("query", "key"), args)), **kwargs}
            self.calls[self.inside].append((call["query"].shape[-2], call["key"].shape[-2]))
        return func(*args, **kwargs)


def _lengths(layout: Layout, text: int) -> dict[str, int]:
    """The lengths that modules see, by what they are."""
    return {"sequence": layout.num_tokens, "grid": layout.grid.length, "text": text, "sample": 1}


def _tiny_lengths(family: str) -> tuple[_Lengths, dict[int, str]]:
    """What the modules of a family's tiny model see, and what each length is."""
    name = next(name for name, tiny in TINY.items() if tiny.name == family)
    model, inputs = TINY[name].build()
    batch = inputs["encoder_hidden_states"].shape[0]
    with _Lengths(model) as seen:
        output(model, inputs)
    seen.rows = {key: rows / batch for key, rows in seen.rows.items()}
    layout = Sequences.of(FAMILIES[family].read(model, inputs)).layout
    lengths = _lengths(layout, inputs["encoder_hidden_states"].shape[1])
    return seen, {length: kind for kind, length in reversed(lengths.items())}


def forward_cost(model: torch.nn.Module, layout: Layout, text: int) -> Cost:
    """The cost of a forward pass over ``layout`` with ``text`` text tokens.

    Args:
        model: any transformer of a known family, on any device, meta included. It does not run.

    Raises:
        ValueError: the tiny model of the family has no module of some name.
    """
    family_name = type(model).__name__
    family: Family = FAMILIES[family_name]
    seen, kinds = _tiny_lengths(family_name)
    lengths = _lengths(layout, text)
    # A length of the tiny model that is none of these (registers, pooled tokens) stays what it is.
    real = lambda length: lengths[kinds[length]] if length in kinds else length  # noqa: E731
    linear = attention = other = 0.0
    layers, width = 0, (0, 0)
    for name, module in model.named_modules():
        key = _key(name)
        if isinstance(module, _MATRICES):
            if key not in seen.rows:
                raise ValueError(
                    f"{family_name} has a module {name} that its tiny model lacks or never runs, "
                    "so its cost is unknown"
                )
            linear += 2 * module.weight.numel() * real(seen.rows[key])
        if callable(getattr(module, "processor", None)):
            features = module.to_q.out_features
            flops = sum(4.0 * real(q) * real(k) * features for q, k in seen.calls[key][:1])
            if re.fullmatch(family.layers, name):
                attention += flops
                layers, width = layers + 1, (module.heads, features // module.heads)
            else:
                other += flops
    return Cost(linear, attention, other, layers, *width)
