"""Published models at their real size, without weights: configuration, text length, usual size."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib import resources

import torch

from dittfast.config import read_mapping, unknown

from . import FAMILIES
from .sequences import Sequences
from .tiny_model import Draw


@dataclass(frozen=True)
class PublishedModel:
    """One file of ``configs/models``.

    Attributes:
        name: of the file.
        source: where the configuration was published.
        model: the class in diffusers.
        config: arguments of its constructor.
        token: frames and pixels (height, width) of one token. The first frame of a video is a
            token of its own.
        text: text tokens by default.
        num_frames, height, width: the usual size, in frames and pixels.
        presets: published settings for this model.
    """

    name: str
    source: str
    model: str
    config: dict
    token: tuple[int, int, int]
    text: int
    height: int
    width: int
    num_frames: int = 1
    presets: tuple[str, ...] = ()

    def build(self) -> torch.nn.Module:
        """The transformer on the meta device: shapes, no memory."""
        # One class loads the package of all of diffusers' transformers, and that PEFT where it is
        # installed; there is no smaller door to it.
        import diffusers

        with torch.device("meta"):
            return getattr(diffusers, self.model)(**self.config).eval()

    def grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Tokens of a size in frames and pixels.

        Raises:
            ValueError: a size that the model cannot make; the nearest ones are named.
        """
        frames = self.token[0]
        if frames == 1 and num_frames != 1:
            raise ValueError(f"{self.name} makes images, got {num_frames} frames; use 1")
        if num_frames < 1 or (num_frames - 1) % frames:
            below = max(1, (num_frames - 1) // frames * frames + 1)
            raise ValueError(
                f"{self.name} makes 1 + {frames} n frames, got {num_frames}; use {below} or "
                f"{below + frames}"
            )
        for axis, pixels, side in zip(("height", "width"), (height, width), self.token[1:]):
            if pixels < side or pixels % side:
                below = max(side, pixels // side * side)
                raise ValueError(
                    f"{axis} of {self.name} must be a multiple of {side} pixels, got {pixels}; "
                    f"use {below} or {below + side}"
                )
        return 1 + (num_frames - 1) // frames, height // self.token[1], width // self.token[2]

    def sequences(
        self, model: torch.nn.Module, num_frames: int, height: int, width: int, text: int
    ) -> Sequences:
        """The sequences of a forward pass, by the family's own reader.

        Raises:
            ValueError: a size that the model cannot make, or patches that the inputs of the
                family's tiny model are not written for.
        """
        grid = self.grid(num_frames, height, width)
        if text < 1:
            raise ValueError(
                f"text tokens of {self.name} must be at least 1, got {text}; it takes {self.text}"
            )
        from .tiny import tiny_of  # takes diffusers with it

        arguments = tiny_of(self.model).inputs(Draw(grid, text, device="meta"), model)
        sequences = Sequences.of(FAMILIES[self.model].read(model, arguments))
        made = sequences.layout.grid.shape
        if made != grid:
            raise ValueError(
                f"configs/models/{self.name}.yaml: {self.model} makes {made} tokens of latents for "
                f"{grid}: its patches are larger or smaller than the tiny model's, whose inputs "
                "must ask model.config for them"
            )
        return sequences


def published_models() -> list[str]:
    """Names of the models in ``configs/models``."""
    folder = resources.files("dittfast.configs") / "models"
    return sorted(f.name[: -len(".yaml")] for f in folder.iterdir() if f.name.endswith(".yaml"))


def published_model(name: str) -> PublishedModel:
    """The published model of that name.

    Raises:
        ValueError: an unknown name, or a file with an unknown or missing key.
    """
    if name not in published_models():
        raise unknown("model", name, published_models())
    file = resources.files("dittfast.configs") / "models" / f"{name}.yaml"
    known = [f.name for f in dataclasses.fields(PublishedModel) if f.name != "name"]
    data = read_mapping(file.read_text(), f"configs/models/{name}.yaml", known)
    for key in ("token", "presets"):
        data[key] = tuple(data.get(key, ()))
    card = PublishedModel(name=name, **data)
    if card.model not in FAMILIES:
        raise unknown(f"model class in configs/models/{name}.yaml", card.model, FAMILIES)
    return card
