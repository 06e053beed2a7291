"""What calling a pipeline takes: its arguments, checked before anything runs."""

from __future__ import annotations

import hashlib
import inspect
import logging
import math
from typing import Protocol, runtime_checkable

from PIL import Image

from dittfast.environment import total_memory

from ..models import transformers_of

logger = logging.getLogger(__name__)

SIZES = ("num_frames", "height", "width")
_COUNTS = (*SIZES, "num_inference_steps", "max_sequence_length", "runs", "fps")
_SCALES = ("guidance_scale", "guidance_scale_2", "true_cfg_scale")
# More than these is a slip of the finger, and would take memory before anybody noticed.
_MOST = {"num_inference_steps": 100_000, "runs": 10_000, "fps": 1_000}
# Bytes of a pixel in the picture that a pipeline returns: three floats.
_PIXEL_BYTES = 12
# Bytes of a text token, at least: an embedding of 1,024 in 16 bits.
_TOKEN_BYTES = 2_048


@runtime_checkable
class PicturePerPrompt(Protocol):
    """Stands in a call as its ``image`` where every prompt and seed has a picture of its own."""

    def __call__(self, prompt: str, seed: int) -> Image.Image: ...

    def to_dict(self) -> dict: ...


def accepted(pipe) -> list[str]:
    """Names of the arguments that calling the pipeline takes."""
    return list(inspect.signature(type(pipe).__call__).parameters)[1:]


def is_video(pipe) -> bool:
    return "num_frames" in accepted(pipe)


def needs_image(pipe) -> bool:
    """Whether the pipeline makes a video from an image that the caller has to give."""
    image = inspect.signature(type(pipe).__call__).parameters.get("image")
    if image is None or not is_video(pipe):
        return False
    return image.default is image.empty or "ImageToVideo" in type(pipe).__name__


def size_multiples(pipe) -> tuple[int, int]:
    """Height and width must be multiples of these, in pixels; (1, 1) where nothing is known.

    A pipeline that packs latents itself (FLUX, Qwen-Image) tells its image processor the packed
    size; in all others the transformer cuts latents into patches.
    """
    processor = getattr(pipe, "image_processor", None) or getattr(pipe, "video_processor", None)
    scale = getattr(getattr(processor, "config", None), "vae_scale_factor", None)
    if scale is None:
        return 1, 1
    patch = 1
    if not hasattr(pipe, "_pack_latents"):
        model = next(iter(transformers_of(pipe).values()))
        patch = getattr(model.config, "patch_size", None) or 1
    height, width = (patch, patch) if isinstance(patch, int) else tuple(patch)[-2:]
    return scale * height, scale * width


def check_ranges(**values) -> None:
    """Check what can be judged without the pipeline; None is skipped.

    Args:
        values: ``prompt``, ``seed``, counts, sizes and guidance scales, by name.

    Raises:
        ValueError: an empty prompt or a number out of range.
    """
    if not (values.get("prompt") or "").strip():
        raise ValueError("the prompt is empty; describe the picture, such as 'a red apple'")
    for name, value in values.items():
        if value is None:
            continue
        if name == "seed" and not 0 <= value < 2**63:
            raise ValueError(f"seed must lie in 0..{2**63 - 1}, got {value}")
        if name in _COUNTS and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
        if name in _MOST and value > _MOST[name]:
            raise ValueError(f"{name} must be at most {_MOST[name]:,}, got {value:,}")
        if name in _SCALES and not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}")
    _check_memory(values)


def call_arguments(pipe, prompt: str, settings: dict | None = None, **given) -> dict:
    """The arguments to call ``pipe`` with: what the user gave, then the sample's own settings.

    Args:
        settings: a sample model's settings; keys that are no arguments of the pipeline are left.
        given: arguments by name; None where the user gave none. An image is left as it is;
            :func:`~dittfast.pipelines.runs.first_frame.with_first_frame` makes it ready.

    Raises:
        ValueError: as :func:`check_ranges`, an argument that the pipeline does not take, or a size
            that the pipeline would silently round.
    """
    names = accepted(pipe)
    given = {k: v for k, v in given.items() if v is not None}
    for name in given:
        if name not in names:
            raise ValueError(
                f"{type(pipe).__name__} takes no {name}; leave out --{name.replace('_', '-')}"
            )
    call = {k: v for k, v in (settings or {}).items() if k in names} | given
    call["prompt"] = prompt
    check_ranges(**call)
    second, first = call.get("guidance_scale_2"), call.get("guidance_scale")
    if second is not None and second > 1 and first is not None and first <= 1:
        logger.warning(
            "guidance_scale_2 %g does nothing: %s guides neither expert where guidance_scale is "
            "%g; take a guidance_scale above 1",
            second, type(pipe).__name__, first,
        )  # fmt: skip
    for name, multiple in zip(("height", "width"), size_multiples(pipe)):
        _check_multiple(pipe, call, name, multiple, 0)
    temporal = getattr(pipe, "vae_scale_factor_temporal", None)
    if isinstance(temporal, int) and temporal > 1:
        _check_multiple(pipe, call, "num_frames", temporal, 1)
    elif temporal == 1 and "image" in names:
        # It will draw one frame more (see frames_drawn), and AutoencoderKLWan encodes one frame
        # and then four at a time. Without an image to encode every number is right.
        _check_multiple(pipe, call, "num_frames", 4, 0)
    return call


def _check_memory(values: dict) -> None:
    """Refuse what this machine can never hold, whatever the model."""
    memory = total_memory()
    if memory is None:
        return
    size = {name: values.get(name) or 1 for name in SIZES}
    pixels = math.prod(size.values())
    if pixels * _PIXEL_BYTES > memory:
        words = " x ".join(f"{name} {n:,}" for name, n in size.items() if n > 1)
        raise ValueError(
            f"{words} is {pixels:,} pixels: the picture alone takes "
            f"{pixels * _PIXEL_BYTES / 1e9:,.0f} GB, and this machine has {memory / 1e9:,.0f} GB; "
            "draw it smaller"
        )
    text = values.get("max_sequence_length") or 0
    if text * _TOKEN_BYTES > memory:
        raise ValueError(
            f"max_sequence_length {text:,} takes {text * _TOKEN_BYTES / 1e9:,.0f} GB for the text "
            f"alone, and this machine has {memory / 1e9:,.0f} GB; 512 is what most models know"
        )


def call_record(call: dict) -> dict:
    """The arguments of a call without its prompt, as plain data for JSON."""
    plain = {k: v for k, v in call.items() if k not in ("prompt", "image")}
    image = call.get("image")
    if isinstance(image, PicturePerPrompt):
        plain["first_frame"] = image.to_dict()
    elif image is not None:
        plain["first_frame"] = {"sha256": hashlib.sha256(image.tobytes()).hexdigest()}
    return plain


def _check_multiple(pipe, call: dict, name: str, multiple: int, remainder: int) -> None:
    value = call.get(name)
    if value is None or value % multiple == remainder % multiple:
        return
    below = (value - remainder) // multiple * multiple + remainder
    near = sorted({n for n in (below, below + multiple) if n >= 1}, key=lambda n: abs(n - value))
    rule = f"a multiple of {multiple}" + (f" plus {remainder}" if remainder else "")
    raise ValueError(
        f"{name} must be {rule} for {type(pipe).__name__}, got {value}; "
        f"the nearest is {' or '.join(map(str, near))}"
    )
