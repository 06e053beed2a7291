"""A sample model as a diffusers pipeline that can be called with a prompt alone."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

from . import sources
from .call import PicturePerPrompt, accepted, needs_image
from .first_frame import with_first_frame
from .run import without_rounding_by_one


def sample(name: str = "sample-flux", device: str = "auto", dtype: str = "auto") -> Any:
    """A sample model's pipeline, ready to call.

    It is the diffusers pipeline of that model with other defaults: whatever a call leaves out is
    as the model was trained, size, steps, guidance and text length. ``pipe.call_defaults`` holds
    these. A video model that starts from a picture draws it from the prompt unless it is given
    ``image``, with the seed of ``generator``, or one drawn from PyTorch's own; it takes the prompt
    first, too.

    ``dittfast.sample("sample-flux")("a panda on a blue background").images[0]`` is a picture.

    Args:
        name: "sample-flux", "sample-video", or a folder that one of them was exported to.
        device: "auto" takes an accelerator where there is one.
        dtype: "auto" is bfloat16 there and float32 on a CPU.

    Raises:
        FileNotFoundError: no such model.
        ValueError: a model that is no sample model, a device that is not here, or a wrong dtype.
    """
    source = sources.find(name)
    if not source.settings:
        raise ValueError(
            f"{name} is no sample model; these are {', '.join(sources.sample_models())}. Load any "
            "other with diffusers' from_pretrained"
        )
    where = sources.choose_device(device)
    pipe = sources.load(source, where, sources.choose_dtype(dtype, where))
    return _with_defaults(pipe, source.settings)


def _with_defaults(pipe, settings: dict):
    """The pipeline, its class replaced by a subclass whose calls begin with the settings."""
    cls = type(pipe)
    signature = inspect.signature(cls.__call__)
    first_frames: dict[tuple, PicturePerPrompt] = {}

    @functools.wraps(cls.__call__)
    def call(self, *args, **given):
        bound = signature.bind_partial(self, *args, **given).arguments
        values = self.call_defaults | dict(list(bound.items())[1:])
        if isinstance(values.get("image"), str):  # the first argument where a picture is needed
            values |= {"prompt": values["image"], "image": None}
        if needs_image(self) and values.get("image") is None:
            values["image"] = _first_frame(self, values, settings, first_frames)
        with without_rounding_by_one(self):
            return cls.__call__(self, **values)

    pipe.__class__ = type(
        cls.__name__,
        (cls,),
        {"__call__": call, "__module__": cls.__module__, "__doc__": cls.__doc__},
    )
    pipe.call_defaults = {name: settings[name] for name in accepted(pipe) if name in settings}
    return pipe


def _first_frame(pipe, values: dict, settings: dict, kept: dict):
    """The picture that a clip starts from, drawn from its prompt by the sample image model."""
    prompt, generator = values.get("prompt"), values.get("generator")
    if not isinstance(prompt, str) or isinstance(generator, (list, tuple)):
        raise ValueError(
            f"{type(pipe).__name__} starts from a picture, which is drawn from one prompt with one "
            "generator; for several, or for embeddings, pass image"
        )
    key = values.get("height"), values.get("width"), pipe.device, pipe.dtype
    if key not in kept:
        without = {name: value for name, value in values.items() if name != "image"}
        kept[key] = with_first_frame(pipe, without, settings)["image"]
    if generator is None:
        seed = int(torch.randint(2**31, ()))
    else:
        seed = generator.initial_seed() % 2**63
    return kept[key](prompt, seed)
