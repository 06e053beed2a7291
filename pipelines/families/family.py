"""`Family`: all that is known about one transformer class."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter

import torch

from dittfast.layout import Layout

from .sequences import Sequences


@dataclass(frozen=True)
class Family:
    """How one transformer class is read, and what else its models and pipelines differ in.

    Only the first two must be given; the defaults are those of most models.

    Attributes:
        layers: regular expression over module names; full matches are the self-attention layers
            whose sequence the reader describes. Text refiners and cross-attention do not match.
        read: ``(model, arguments of its forward by name) -> Layout``, or Sequences where batch
            rows or layers differ.
        reads_values: names of tensor arguments whose values (not only shapes) ``read`` looks at,
            where they are given.
        strict: whether every selected layer must meet the layout's sequence; False where layers
            may be skipped, or where the user described an unknown model, whose other layers then
            stay dense.
        dense: ``(regular expression over module names, why)`` of other attention that stays dense.
        outer_mask: whether the model turns a mask m over keys into an N x N mask m mᵀ. All
            tokens of a grid are valid.
        shortcut: ``(func, args, kwargs) -> tensor or None``: answers calls of PyTorch inside the
            attention layers that build such a mask; None leaves a call to PyTorch.
        latents: the argument with the latents: a tensor ``[B, ...]``, or a list of B tensors.
        appended_channels: whether pipelines append channels that stay the same to the noisy
            latents (a first frame and a mask), so that more come in than go out.
        cond_first: whether the pipeline's batch for classifier-free guidance is [conditional,
            unconditional] (most are the other way around).
        timestep: the argument with the timestep.
        time_rises: whether that grows over the steps (most count down).
        fills_cache: whether a pass with these arguments only keeps its keys for later ones.
        position_ids: the argument with the image's position ids ``[..., N, k]``, k of at least 3:
            which image, row, column; None where the model makes its positions itself.
        heads: the attribute of an attention module that holds its number of heads.
        width: the attribute with the channels of its queries, dotted where it lies deeper.
        hidden_states: which arguments of its attention modules are projected to q, k and v: the
            layer's own tokens, and those of the other stream where a layer has two (the layout
            tells whether they stand in front or behind); None where its layers do not attend to
            these, one after the other.
        projections: regular expression over module names inside an attention module; full matches
            make q, k, v and the output of the layer's own tokens (not those of a text stream).
        rotary: ``(class of its attention modules, reader)``, where a rotary embedding tells the
            layout to a processor: ``reader(cosines and sines, text tokens or None) -> Layout``.
        rounds_frames: whether its video pipelines round the number of frames to one more than a
            multiple of the VAE's temporal factor.
        clean_pipelines: pipelines whose model predicts the clean picture, and the smallest time
            that they divide by to make a velocity of it.
    """

    layers: str
    read: Callable[[torch.nn.Module, dict], Layout | Sequences]
    reads_values: tuple[str, ...] = ()
    strict: bool = True
    dense: tuple[tuple[str, str], ...] = ()
    outer_mask: bool = False
    shortcut: Callable[[Callable, tuple, dict], torch.Tensor | None] | None = None
    latents: str = "hidden_states"
    appended_channels: bool = False
    cond_first: bool = False
    timestep: str = "timestep"
    time_rises: bool = False
    fills_cache: Callable[[dict], bool] = lambda arguments: False
    position_ids: str | None = None
    heads: str = "heads"
    width: str = "inner_dim"
    hidden_states: tuple[str, str] | None = ("hidden_states", "encoder_hidden_states")
    projections: str = r"to_(q|k|v)|to_out(\.0)?"
    rotary: tuple[str, Callable[[tuple, int | None], Layout]] | None = None
    rounds_frames: bool = False
    clean_pipelines: Mapping[str, float] = field(default_factory=dict)

    def num_heads(self, module: torch.nn.Module) -> int:
        """The number of heads of an attention module.

        Raises:
            ValueError: a module of an unknown model that does not tell.
        """
        heads = getattr(module, self.heads, None)
        if not isinstance(heads, int):
            raise ValueError(
                f"{type(module).__name__} has no number of heads in .{self.heads}, so its heads "
                "cannot be chosen; guidance needs a model family that dittfast knows"
            )
        return heads

    def query_width(self, module: torch.nn.Module) -> int:
        """Channels of the queries of an attention module: heads times their dimension."""
        return attrgetter(self.width)(module)

    def hidden_width(self, module: torch.nn.Module) -> int | None:
        """Channels of the hidden states of an attention module; None where it does not tell."""
        for name, inner in module.named_modules():
            if re.fullmatch(self.projections, name) and hasattr(inner, "in_features"):
                return inner.in_features
        return None

    def projection_weights(self, model: torch.nn.Module, layers: list[str]) -> list[str]:
        """Names of the parameters that project q, k, v and the output in these layers.

        PEFT's base layers count as what they stand for; its adapters do not.
        """
        inside = tuple(f"{layer}." for layer in layers)
        pattern = re.compile(rf"({self.projections})(\.base_layer)?\.(weight|bias)")
        return [
            name
            for name, _ in model.named_parameters()
            if any(
                name.startswith(layer) and pattern.fullmatch(name.removeprefix(layer))
                for layer in inside
            )
        ]
