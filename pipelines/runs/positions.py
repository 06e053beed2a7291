"""Position ids scaled on their way into a transformer, for pictures of another size.

Position interpolation (Chen et al. 2023, arXiv:2306.15595) in two dimensions: a picture s times as
large as those a model was trained on, its rows and columns counted in steps of 1 / s, spans the
positions that the model knows.
"""

from __future__ import annotations

import contextlib
import math

import torch

from ..models import bind_arguments, known_family, stock_class, transformers_of

_ROW_AND_COLUMN = (1, 2)


def scaled(ids: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """Position ids with their rows and columns times ``scale``.

    Args:
        ids: ``[..., N, k]``, k of at least 3: which image, row, column, and what else a model has.
        scale: a number, or a tensor of one.

    Returns:
        fp32, also of integers and of half precision, which could not hold the fractions.
    """
    result = ids.to(torch.float32, copy=True)
    result[..., _ROW_AND_COLUMN] *= scale
    return result


@contextlib.contextmanager
def positions_scaled(pipe, scale: float, until: float = 0.0):
    """Inside, the pipeline's transformers get their image's position ids times ``scale``.

    Rows and columns are scaled, text is left where it is. Layouts stay what they are, for their
    readers look at the order of the ids alone, so this composes with any method.

    Args:
        pipe: a diffusers pipeline, or a transformer.
        scale: 1 changes nothing; 0.25 fits a picture four times as large into the positions of
            the small one.
        until: only in passes with a time above this: 1 is pure noise, and at 0 all passes scale.

    Raises:
        ValueError: a scale that is not positive, a time outside 0..1, or a model that is given no
            position ids.
    """
    check_position_scale(scale, until)
    if scale == 1:
        yield
        return
    models = transformers_of(pipe).values()
    for model in models:
        family = known_family(model)
        if family is None or family.position_ids is None:
            raise ValueError(
                f"{stock_class(type(model)).__name__} makes its positions itself, or takes none "
                "that dittfast knows, so they cannot be scaled; use position_scale=1"
            )

    def hook(model, args, kwargs):
        arguments, family = bind_arguments(model, args, kwargs), known_family(model)
        # Not a branch: looking at the time would make the host wait for the device.
        noisy = arguments[family.timestep].flatten()[0] > until
        ids = arguments[family.position_ids]
        arguments[family.position_ids] = scaled(ids, torch.where(noisy, scale, 1.0))
        return (), arguments

    handles = [model.register_forward_pre_hook(hook, with_kwargs=True) for model in models]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_position_scale(scale: float, until: float = 0.0) -> None:
    """Raise ValueError unless ``scale`` is a finite number above 0 and ``until`` lies in 0..1."""
    if not 0 <= until < 1:
        raise ValueError(
            f"position_until must lie in 0..1, 1 excluded, got {until!r}; 0 scales at all times"
        )
    if isinstance(scale, str) or not (math.isfinite(scale) and scale > 0):
        raise ValueError(
            f"position_scale must be a finite number above 0, got {scale!r}; 0.25 fits 1,024 px "
            "into the positions of 256 px, 1 changes nothing"
        )
