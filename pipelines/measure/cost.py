"""What a forward pass costs, computed from module shapes: FLOPs of matrix products.

How many tokens each linear layer and each attention sees is learned from the family's tiny model,
which runs twice; the shapes come from the model in question, on the meta device.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ..families import FAMILIES, Family
from ..families.sequences import Sequences
from ..families.tiny import tiny_of
from ..families.tiny_model import BATCH, TEXT, Tiny
from .parity import output


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


def _keys(name: str) -> tuple[str, str]:
    """Under what a module of a block is noted, and under what it is looked up where that is absent.

    The first block may do more than the others, which are one: ``blocks.3.attn1`` is
    ``blocks.*.attn1``, or else ``blocks.0.attn1``.
    """
    first, later = (re.sub(r"\.\d+(?=\.|$)", by, name, count=1) for by in (".0", ".*"))
    return (first, later) if name == first else (later, first)


def _noted(notes: dict[str, list], name: str, family: str) -> list:
    """What was noted of a module of this name, or of its like in another block.

    Raises:
        ValueError: there is none.
    """
    for key in _keys(name):
        if key in notes:
            return notes[key]
    raise ValueError(
        f"{family} has a module {name} that its tiny model lacks or never runs, so its cost is "
        "unknown"
    )


class _Lengths(TorchFunctionMode):
    """Rows in each call of each matrix module, and the lengths of each attention module's calls.

    By :func:`_keys`; of the blocks after the first, the last one's count.
    """

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.rows: dict[str, list[int]] = {}
        self.calls: dict[str, list[tuple[int, int]]] = {}
        self.inside: str | None = None
        self.hooks = []
        for name, module in model.named_modules():
            if isinstance(module, _MATRICES):
                self.hooks.append(module.register_forward_hook(self._matrix(_keys(name)[0])))
            if callable(getattr(module, "processor", None)):
                self.hooks.append(module.register_forward_pre_hook(self._enter(_keys(name)[0])))
                self.hooks.append(module.register_forward_hook(self._leave))

    def _matrix(self, key):
        last = None

        def record(module, args, out):
            nonlocal last
            if module is not last:
                self.rows[key], last = [], module
            linear = isinstance(module, torch.nn.Linear)
            self.rows[key].append(out.numel() // out.shape[-1 if linear else 1])

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


def _lengths(sequences: Sequences, text: int) -> dict[str, int]:
    """The lengths that modules see, by what they are."""
    lengths = {f"sequence {i}": rows[0].num_tokens for i, rows in enumerate(sequences.kinds)}
    grids = sequences.layout.num_tokens - sequences.layout.num_context
    return lengths | {"grids": grids, "text": text, "sample": 1}


class _Learned:
    """What the modules of a family see, from its tiny model at two sizes.

    Attributes:
        rows: for each matrix module the kind of length, or a number, of each call.
        calls: for each attention module the same of queries and keys; empty where it has none.
    """

    def __init__(self, family: str):
        tiny = tiny_of(family)
        frames = tiny.grid[0]
        # The second is square: DiT knows no other size.
        sizes = tiny.grid, (1, 8, 8) if frames == 1 else (frames - 1, 6, 6)
        one, other = (self._run(tiny, size) for size in sizes)
        self._kinds = {(one[1][kind], other[1][kind]): kind for kind in reversed(one[1])}
        self._family = family
        self.rows = {
            key: self._kinds_of(key, rows, other[0].rows.get(key, []))
            for key, rows in one[0].rows.items()
        }
        self.calls = {
            key: self._kinds_of(key, calls[0], other[0].calls[key][0]) if calls else []
            for key, calls in one[0].calls.items()
        }

    def _run(self, tiny: Tiny, grid: tuple[int, int, int]) -> tuple[_Lengths, dict[str, int]]:
        model, inputs = tiny.build(grid=grid)
        with _Lengths(model) as seen:
            output(model, inputs)
        seen.rows = {key: [n / BATCH for n in rows] for key, rows in seen.rows.items()}
        return seen, _lengths(Sequences.of(FAMILIES[tiny.name].read(model, inputs)), TEXT)

    def _kinds_of(self, key: str, one: Sequence, other: Sequence) -> list[str | float]:
        """What has the lengths ``one`` at the first size and ``other`` at the second."""
        # A length that stays is that of registers, or of pooled tokens.
        kinds = [self._kinds.get(pair, min(pair)) for pair in zip(one, other)]
        known = all(isinstance(kind, str) or a == b for kind, a, b in zip(kinds, one, other))
        if known and len(one) == len(other):
            return kinds
        raise ValueError(
            f"{self._family}.{key} sees {list(one)} tokens at one size and {list(other)} at "
            "another, neither the sequence nor its pictures, so what it costs is unknown"
        )


def forward_cost(model: torch.nn.Module, sequences: Sequences, text: int) -> Cost:
    """The cost of a forward pass over ``sequences`` with ``text`` text tokens.

    Args:
        model: any transformer of a known family, on any device, meta included. It does not run.

    Raises:
        ValueError: what some module costs cannot be learned from the family's tiny model.
    """
    family_name = type(model).__name__
    family: Family = FAMILIES[family_name]
    learned = _Learned(family_name)
    lengths = _lengths(sequences, text)
    real = lambda kind: lengths[kind] if isinstance(kind, str) else kind  # noqa: E731
    linear = attention = other = 0.0
    layers, heads, width = 0, 0, 0
    for name, module in model.named_modules():
        if isinstance(module, _MATRICES):
            rows = _noted(learned.rows, name, family_name)
            linear += sum(2 * module.weight.numel() * real(kind) for kind in rows)
        if callable(getattr(module, "processor", None)):
            tokens = [real(kind) for kind in _noted(learned.calls, name, family_name)]
            flops = 4.0 * math.prod(tokens) * family.query_width(module) if tokens else 0.0
            if re.fullmatch(family.layers, name):
                attention += flops
                layers, heads = layers + 1, family.num_heads(module)
                width = family.query_width(module)
            else:
                other += flops
    return Cost(linear, attention, other, layers, heads, width // heads)
