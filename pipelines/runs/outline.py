"""A pipeline without weights: what a run would refuse is refused before any are read."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path

import torch

from dittfast.methods.base import Method
from dittfast.methods.head_guidance import HeadGuidance
from dittfast.schedule import Schedule

from ..adapter import enable
from ..guidance.plain import guide
from .call import call_arguments
from .sources import Source

logger = logging.getLogger(__name__)


def outline(source: Source):
    """The pipeline in a folder with its models on the meta device: their shapes, no memory.

    Text encoders, tokenizers and schedulers are left out. None where that cannot be had: for a hub
    id, whose files are elsewhere, and for a folder that only loading it whole can judge.
    """
    if source.kind == "hub":
        return None
    import diffusers

    folder = Path(source.location)
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        cls = getattr(diffusers, index["_class_name"])
        parts = {name: None for name, kind in index.items() if isinstance(kind, list)}
        for name in parts:
            if index[name][0] == "diffusers" and name != "scheduler":
                model = getattr(diffusers, index[name][1])
                with torch.device("meta"):
                    parts[name] = model.from_config(model.load_config(folder / name))
        return cls(**parts)
    except Exception as error:  # whatever the classes of diffusers make of a damaged folder
        logger.debug("%s has no outline: %s", source.name, error)
        return None


def check_run(
    pipe,
    source: Source,
    prompt: str,
    given: dict,
    method: Method | None = None,
    schedule: Schedule | None = None,
    guidance: HeadGuidance | None = None,
) -> dict:
    """Refuse now what a run would refuse once its pipeline is loaded.

    Args:
        pipe: the :func:`outline` of the source; left as it is.
        given: arguments of the call by name, None where nobody gave one.
        method, schedule, guidance: what :func:`dittfast.enable` and :func:`dittfast.guide` take.

    Returns:
        The arguments of its call.

    Raises:
        ValueError: an argument that the pipeline does not take, a size that it would round, a
            model, layer or head that the method or the guidance cannot have.
    """
    call = call_arguments(pipe, prompt, source.settings, **given)
    with contextlib.ExitStack() as stack:
        if method is not None:
            stack.enter_context(enable(pipe, method, schedule=schedule))
        if guidance is not None:
            stack.enter_context(guide(pipe, guidance))
    return call
