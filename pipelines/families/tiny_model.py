"""What the tiny random models of all families share: real diffusers classes, random inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

IMAGE = (11, 9)  # tokens
VIDEO = (3, 5, 7)
BATCH, TEXT = 2, 7
HEADS = dict(num_attention_heads=2, attention_head_dim=16)


class Draw:
    """Makes inputs of one size: ``draw(*shape)`` is random normal.

    Args:
        grid: tokens of the picture or video, ``(frames, height, width)``.
        text: text tokens of the longest prompt.
        device: of what is drawn; on "meta" only shapes are.

    Attributes:
        image: ``(height, width)`` of the grid.
        cells: the same in latent cells, for models with patches of 2 x 2.
    """

    def __init__(self, grid: tuple[int, int, int], text: int, seed: int = 0, device: str = "cpu"):
        self.grid, self.text = grid, text
        self.image = grid[1:]
        self.cells = tuple(2 * n for n in self.image)
        self._device = device
        self._generator = torch.Generator().manual_seed(seed) if device == "cpu" else None

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator, device=self._device)

    def text_mask(self, length: int | None = None, short: int = 4) -> torch.Tensor:
        """``[BATCH, length]`` int64: the first row is valid throughout, the second is padded."""
        length = self.text if length is None else length
        return (torch.arange(length) < torch.tensor([[length], [length - short]])).long()


@dataclass(frozen=True)
class Tiny:
    """One family, or variant of a family.

    Grids are odd and not square, texts are padded to a different length in each batch row, and
    nothing is downloaded.

    Attributes:
        name: of the class in diffusers.
        config: arguments of its constructor.
        inputs: ``(draw, model) -> arguments of forward``, for the :class:`Draw`'s size and any
            model of the class whose patches are as large as the tiny one's.
        grid: the usual token grid, ``(frames, height, width)``.
        latents: the argument with latents and where its axes of ``grid`` are (None: it has no
            such axis); None where latents come as packed tokens.
    """

    name: str
    config: dict
    inputs: Callable[[Draw, torch.nn.Module], dict]
    grid: tuple[int, int, int]
    latents: tuple[str, tuple[int | None, int, int]] | None

    def build(
        self, seed: int = 0, grid: tuple[int, int, int] | None = None
    ) -> tuple[torch.nn.Module, dict]:
        """The model in evaluation mode, and arguments for its forward."""
        import diffusers

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = getattr(diffusers, self.name)(**self.config).eval()
            _wake(model)
        draw = Draw(grid or self.grid, TEXT, seed)
        return model, {**self.inputs(draw, model), "return_dict": False}


def _wake(model: torch.nn.Module) -> None:
    """Parameters that training starts at zero (gates, position frequencies) do something."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any() and parameter.ndim > 1:
                parameter.normal_(std=0.3)


def time(value: float) -> torch.Tensor:
    return torch.full((BATCH,), value)


def image_ids(*images: tuple[int, int], columns: int = 3) -> torch.Tensor:
    """Position ids of images in raster order: number, row, column (, 0)."""
    parts = []
    for number, (height, width) in enumerate(images):
        ids = torch.zeros(height, width, columns)
        ids[..., 0] = number
        ids[..., 1] = torch.arange(height)[:, None]
        ids[..., 2] = torch.arange(width)
        parts.append(ids.view(-1, columns))
    return torch.cat(parts)
