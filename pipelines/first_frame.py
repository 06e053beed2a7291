"""The picture that an image-to-video pipeline starts from: a file, or drawn from the prompt."""

from __future__ import annotations

import inspect
import logging
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from . import generate, sources

logger = logging.getLogger(__name__)


def needs_image(pipe) -> bool:
    """Whether the pipeline makes a video from an image that the caller has to give."""
    image = inspect.signature(type(pipe).__call__).parameters.get("image")
    return generate.is_video(pipe) and image is not None and image.default in (image.empty, None)


def read_image(path: str | Path) -> Image.Image:
    """A picture file as RGB, turned as its camera says; what is transparent becomes white.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a picture, or a damaged one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no picture at {path}")
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert("RGBA")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no picture that can be read: {error}") from error
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


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


def _frame_size(pipe, call: dict) -> tuple[int, int]:
    parameters = inspect.signature(type(pipe).__call__).parameters
    sizes = [call.get(name) or parameters[name].default for name in ("height", "width")]
    return sizes[0], sizes[1]


def draw(settings: dict, prompt: str, seed: int, device, dtype) -> tuple[Image.Image, dict]:
    """Draw a first frame with the image model that a sample video model names.

    Args:
        settings: the video model's ``first_frame``: the image ``model``, the ``part`` of the frame
            that its picture fills, and the ``moving_words`` that are not for it.

    Returns:
        The picture, and how it was made, as plain data for JSON.
    """
    source = sources.find(settings["model"])
    still = still_prompt(prompt, settings.get("moving_words", []))
    pipe = sources.load(source, device, dtype)
    pipe.set_progress_bar_config(disable=True)
    call = generate.call_arguments(pipe, still, source.settings)
    picture = Image.fromarray(generate.run(pipe, call, seed).frames[0])
    part = settings.get("part", 1.0)
    made = {"model": source.name, "prompt": still, "seed": seed, "part": part}
    return with_margin(picture, part), made


def add_first_frame(
    pipe, call: dict, settings: dict, *, image=None, seed: int = 0, device="cpu", dtype=None
) -> tuple[dict, dict | None]:
    """The call with the image it needs, and where that came from.

    Args:
        call: see :func:`~dittfast.pipelines.generate.call_arguments`.
        settings: the model's settings; a sample video model's have ``first_frame``.
        image: a picture file of the user's, used instead of a drawn one.
        seed: of a drawn one.

    Returns:
        ``(call, origin)``; the same call and None for a pipeline that takes no image.

    Raises:
        ValueError: an image for a pipeline that takes none, none for one that needs it, or a file
            that is no picture.
        FileNotFoundError: no such file, or the model that would draw the picture is not here.
    """
    if not needs_image(pipe):
        if image is not None:
            raise ValueError(f"{type(pipe).__name__} starts from no image; leave out --image")
        return call, None
    if image is not None:
        picture, origin = read_image(image), {"file": str(image)}
    elif "first_frame" in settings:
        picture, origin = draw(settings["first_frame"], call["prompt"], seed, device, dtype)
    else:
        raise ValueError(
            f"{type(pipe).__name__} animates an image and got none; pass one with --image FILE"
        )
    return call | {"image": fit(picture, *_frame_size(pipe, call))}, origin
