"""What tiny random transformers of all families share; the models are in tiny_image, tiny_video.

For ``dittfast parity`` and the tests. They are real diffusers classes. Grids are odd and not
square, texts are padded to a different length in each batch row, and nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

IMAGE = (11, 9)  # tokens
VIDEO = (3, 5, 7)
BATCH, TEXT = 2, 7
HEADS = dict(num_attention_heads=2, attention_head_dim=16)


@dataclass(frozen=True)
class Tiny:
    """One family, or variant of a family.

    Attributes:
        name: of the class in diffusers.
        config: arguments of its constructor.
        inputs: ``(draw, model) -> arguments of forward``; ``draw(*shape)`` is random normal.
        grid: the token grid, ``(frames, height, width)``.
        latents: the argument with latents and where its axes of ``grid`` are (None: it has no
            such axis); None where latents come as packed tokens.
    """

    name: str
    config: dict
    inputs: Callable[..., dict]
    grid: tuple[int, int, int]
    latents: tuple[str, tuple[int | None, int, int]] | None

    def build(self, seed: int = 0) -> tuple[torch.nn.Module, dict]:
        """The model in evaluation mode, and arguments for its forward."""
        import diffusers

        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = getattr(diffusers, self.name)(**self.config).eval()
            _wake(model)
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        return model, {**self.inputs(draw, model), "return_dict": False}


def _wake(model: torch.nn.Module) -> None:
    """Parameters that training starts at zero (gates, position frequencies) do something."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any() and parameter.ndim > 1:
                parameter.normal_(std=0.3)


def text_mask(length: int = TEXT, short: int = 4) -> torch.Tensor:
    """``[BATCH, length]`` int64: the first row is valid throughout, the second one is padded."""
    return (torch.arange(length) < torch.tensor([[length], [length - short]])).long()


def time(value: float) -> torch.Tensor:
    return torch.full((BATCH,), value)
