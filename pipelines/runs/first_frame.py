"""The picture that an image-to-video pipeline starts from: a file, or drawn from the prompt."""

from __future__ import annotations

import inspect
import logging
import re

import numpy as np
from PIL import Image, ImageOps

from ..models import execution_device, transformers_of
from . import sources
from .call import PicturePerPrompt, call_arguments, needs_image
from .run import run

logger = logging.getLogger(__name__)

# Pictures that are kept; evaluations come back to the same few prompts with every method.
_MOST_KEPT = 64


def fit(picture: Image.Image, height: int, width: int) -> Image.Image:
    """The picture at another size, its edges cut off where its shape differs."""
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def with_margin(picture: Image.Image, part: float) -> Image.Image:
    """The picture shrunk to ``part`` of its size, with its edge pixels continued around it."""
    size = [max(1, round(part * n)) for n in picture.size]
    small = np.asarray(picture.resize(size, Image.Resampling.LANCZOS))
    missing = [(full - n) for full, n in zip(picture.size[::-1], size[::-1])]
    margins = [(n // 2, n - n // 2) for n in missing]
    return Image.fromarray(np.pad(small, [*margins, (0, 0)], mode="edge"))


def still_prompt(prompt: str, moving_words: list[str]) -> str:
    """The prompt without its words of motion: what the first frame shows.

    ``"a red apple moves right on a blue background"`` -> ``"a red apple on a blue background"``.
    """
    longest_first = sorted(moving_words, key=len, reverse=True)
    pattern = r",?\s*\b(?:" + "|".join(map(re.escape, longest_first)) + r")\b"
    still = re.sub(pattern, "", prompt, flags=re.IGNORECASE) if longest_first else prompt
    return still.strip(" ,") or prompt


class FirstFrame:
    """Draws the first frames of a sample video model with an image model, one per prompt and seed.

    It stands in a call as its ``image``; :func:`~dittfast.pipelines.runs.run.run` asks it for the
    picture of the prompt and seed at hand.

    Args:
        settings: the video model's ``first_frame``: the image ``model``, the folder ``within``
            which it is looked for, the ``part`` of the frame that its picture fills, and the
            ``moving_words`` that are not for it.
        height, width: of the frame, in pixels.

    Raises:
        FileNotFoundError, ValueError: the image model is not here, or could not be loaded.
    """

    def __init__(self, settings: dict, height: int, width: int, device="cpu", dtype=None):
        self.source = sources.find_named_by(settings["model"], settings["within"])
        self.part = settings.get("part", 1.0)
        self.moving_words = settings.get("moving_words", [])
        self.size = height, width
        self._pipe = sources.load(self.source, device, dtype)
        self._pipe.set_progress_bar_config(disable=True)
        self._drawn: dict[tuple[str, int], Image.Image] = {}

    def __call__(self, prompt: str, seed: int) -> Image.Image:
        """The first frame; the latest are kept, so that compared runs share them."""
        if (prompt, seed) not in self._drawn:
            logger.info("drawing the first frame with %s", self.source.name)
            still = still_prompt(prompt, self.moving_words)
            call = call_arguments(self._pipe, still, self.source.settings)
            picture = Image.fromarray(run(self._pipe, call, seed).frames[0])
            if len(self._drawn) == _MOST_KEPT:
                self._drawn.pop(next(iter(self._drawn)))
            self._drawn[prompt, seed] = fit(with_margin(picture, self.part), *self.size)
        return self._drawn[prompt, seed]

    def to_dict(self) -> dict:
        """How the frames are made, as plain data for JSON."""
        return {"model": self.source.name, "part": self.part, "moving_words": self.moving_words}


def with_first_frame(pipe, call: dict, settings: dict | None = None) -> dict:
    """The call with the picture that an image-to-video pipeline starts from; else as it was.

    A given picture is cut to the size of the video. Without one, a sample video model's settings
    say how a :class:`FirstFrame` draws it for each prompt.

    Raises:
        ValueError: there is neither.
        FileNotFoundError, ValueError: as :class:`FirstFrame`.
    """
    if not needs_image(pipe) or isinstance(call.get("image"), PicturePerPrompt):
        return call
    parameters = inspect.signature(type(pipe).__call__).parameters
    size = [call.get(name) or parameters[name].default for name in ("height", "width")]
    if "image" in call:
        image = fit(call["image"], *size)
    elif "first_frame" in (settings or {}):
        model = next(iter(transformers_of(pipe).values()))
        image = FirstFrame(settings["first_frame"], *size, execution_device(pipe), model.dtype)
    else:
        raise ValueError(
            f"{type(pipe).__name__} animates an image and got none; pass one with --image FILE"
        )
    return call | {"image": image}
