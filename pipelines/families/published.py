"""Published models at their real size, without weights: configuration, text length, usual size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources

import torch

from dittfast.config import read_mapping, unknown
from dittfast.layout import Grid, Layout

from . import FAMILIES
from .sequences import Sequences


@dataclass(frozen=True)
class PublishedModel:
    """One file of ``configs/models``.

    Attributes:
        name: of the file.
        source: where the configuration was published.
        model: the class in diffusers.
        config: arguments of its constructor.
        vae: frames and pixels (height, width) of one latent cell. The first frame of a video is a
            latent frame of its own.
        text: text tokens by default.
        num_frames, height, width: the usual size, in frames and pixels.
        presets: published settings for this model.
    """

    name: str
    source: str
    model: str
    config: dict
    vae: tuple[int, int, int]
    text: int
    height: int
    width: int
    num_frames: int = 1
    presets: tuple[str, ...] = ()

    def build(self) -> torch.nn.Module:
        """The transformer on the meta device: shapes, no memory."""
        import diffusers

        with torch.device("meta"):
            return getattr(diffusers, self.model)(**self.config).eval()

    def latents(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent cells of a size in frames and pixels.

        Raises:
            ValueError: a size that the model cannot make; the nearest ones are named.
        """
        cells = 1 + (num_frames - 1) // self.vae[0]
        if self.vae[0] == 1 and num_frames != 1:
            raise ValueError(f"{self.name} makes images, got {num_frames} frames; use 1")
        if num_frames < 1 or (num_frames - 1) % self.vae[0]:
            below = max(1, (cells - 1) * self.vae[0] + 1)
            raise ValueError(
                f"{self.name} makes 1 + {self.vae[0]} n frames, got {num_frames}; use {below} or "
                f"{below + self.vae[0]}"
            )
        side = PIXELS[self.model](self)
        for axis, pixels in (("height", height), ("width", width)):
            if pixels < side or pixels % side:
                below = max(side, pixels // side * side)
                raise ValueError(
                    f"{axis} of {self.name} must be a multiple of {side} pixels, got {pixels}; "
                    f"use {below} or {below + side}"
                )
        return cells, height // self.vae[1], width // self.vae[2]

    def layout(
        self, model: torch.nn.Module, num_frames: int, height: int, width: int, text: int
    ) -> Layout:
        """The layout of a forward pass, by the family's own reader."""
        arguments = ARGUMENTS[self.model](model, self.latents(num_frames, height, width), text)
        return Sequences.of(FAMILIES[self.model].read(model, arguments)).layout


def _meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


def _flux(model, cells, text) -> dict:
    height, width = cells[1] // 2, cells[2] // 2
    ids = torch.zeros(height, width, 3)
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)
    return {"encoder_hidden_states": _meta(1, text, 1), "img_ids": ids.view(-1, 3)}


def _qwen(model, cells, text) -> dict:
    shape = (1, cells[1] // 2, cells[2] // 2)
    return {"encoder_hidden_states": _meta(1, text, 1), "img_shapes": [[shape]]}


def _image(model, cells, text) -> dict:
    return {"encoder_hidden_states": _meta(1, text, 1), "hidden_states": _meta(1, 1, *cells[1:])}


def _video(model, cells, text) -> dict:
    return {
        "encoder_hidden_states": _meta(1, text, 1),
        "encoder_attention_mask": torch.ones(1, text),
        "hidden_states": _meta(1, 1, *cells),
    }


def _frames_first(model, cells, text) -> dict:
    latents = _meta(1, cells[0], 1, *cells[1:])
    return {"encoder_hidden_states": _meta(1, text, 1), "hidden_states": latents}


def _packed(model, cells, text) -> dict:
    sizes = dict(zip(("num_frames", "height", "width"), cells))
    return {"hidden_states": _meta(1, Grid(*cells).length, 1), **sizes}


# What the pipelines of these classes pass to the transformer, as far as readers look at it.
ARGUMENTS: dict[str, Callable[..., dict]] = {
    "FluxTransformer2DModel": _flux,
    "QwenImageTransformer2DModel": _qwen,
    "SD3Transformer2DModel": _image,
    "WanTransformer3DModel": _video,
    "HunyuanVideoTransformer3DModel": _video,
    "MochiTransformer3DModel": _video,
    "CogVideoXTransformer3DModel": _frames_first,
    "LTXVideoTransformer3DModel": _packed,
}


def _patch(card: PublishedModel) -> int:
    patch = card.config["patch_size"]
    return card.vae[1] * (patch if isinstance(patch, int) else patch[-1])


# Pixels along the side of a token.
PIXELS: dict[str, Callable[[PublishedModel], int]] = {
    name: (lambda card: 2 * card.vae[1]) if arguments in (_flux, _qwen) else _patch
    for name, arguments in ARGUMENTS.items()
}


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
    for key in ("vae", "presets"):
        data[key] = tuple(data.get(key, ()))
    card = PublishedModel(name=name, **data)
    if card.model not in ARGUMENTS:
        raise unknown(f"model class in configs/models/{name}.yaml", card.model, ARGUMENTS)
    return card
