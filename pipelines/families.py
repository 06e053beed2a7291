"""Model families: which modules are self-attention, and where the tokens sit.

A family is one entry of :data:`FAMILIES` and one short reader from the arguments of the
transformer's ``forward`` to a :class:`~dittfast.layout.Layout`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dittfast.layout import Context, Grid, Layout


@dataclass(frozen=True)
class Family:
    """How one transformer class is read.

    Attributes:
        layers: regular expression over module names; full matches are the self-attention layers
            whose sequence the reader describes. Text refiners and cross-attention do not match.
        read: ``(model, arguments of its forward by name) -> Layout``.
        reads_values: names of tensor arguments whose values (not only shapes) ``read`` looks at.
        strict: whether every selected layer must meet the layout's sequence; False where the user
            described an unknown model, whose other layers then stay dense.
    """

    layers: str
    read: Callable[[torch.nn.Module, dict], Layout]
    reads_values: tuple[str, ...] = ()
    strict: bool = True


def bind_arguments(model: torch.nn.Module, args: tuple, kwargs: dict) -> dict:
    """The arguments of ``model.forward`` by name; absent ones are left out."""
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    return {**dict(zip(names, args)), **kwargs}


def grids_from_ids(ids: torch.Tensor, axes: tuple[int, int] = (1, 2)) -> list[Grid]:
    """Grids from position ids ``[N, k]`` (or ``[1, N, k]``); column 0 tells the images apart.

    Only the order of the ids is used, so scaled or shifted positions read the same.

    Raises:
        ValueError: the tokens of an image are not in raster order.
    """
    rows = (ids if ids.ndim == 2 else ids[0]).detach().to("cpu", torch.float64)
    grids = []
    start = 0
    change = (rows[1:, 0] != rows[:-1, 0]).nonzero()[:, 0].tolist()
    for end in [i + 1 for i in change] + [len(rows)]:
        y, x = (rows[start:end, axis] for axis in axes)
        width = int((y == y[0]).sum())
        height = len(y) // width
        raster = len(y) == height * width
        if raster:
            y, x = y.view(height, width), x.view(height, width)
            raster = bool((y == y[:, :1]).all() and (x == x[:1]).all())
        if not raster:
            raise ValueError(
                f"position ids {start}..{end - 1} are not an image in raster order; "
                "pass layout=Layout.image(...) to dittfast.enable"
            )
        grids.append(Grid(1, height, width))
        start = end
    return grids


def _flux(model, arguments: dict) -> Layout:
    # FLUX and Kontext: text first, then the image, then reference images.
    text = arguments["encoder_hidden_states"].shape[1]
    grids = grids_from_ids(arguments["img_ids"])
    return Layout((*((Context(text),) if text else ()), *grids))


def _patched_video(model, arguments: dict) -> Layout:
    # Latents [B, C, F, H, W]; text is cross-attention.
    sizes = arguments["hidden_states"].shape[2:]
    frames, height, width = (n // p for n, p in zip(sizes, model.config.patch_size))
    return Layout.video(frames, height, width)


FAMILIES: dict[str, Family] = {
    "FluxTransformer2DModel": Family(
        r"(single_)?transformer_blocks\.\d+\.attn",
        _flux,
        reads_values=("img_ids",),
    ),
    "WanTransformer3DModel": Family(
        r"blocks\.\d+\.attn1",
        _patched_video,
    ),
}
