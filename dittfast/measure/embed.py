"""Pictures inside an HTML page: their bytes in the tag, and always words for those who see none."""

from __future__ import annotations

import base64
import io
from html import escape

import numpy as np
from PIL import Image


def webp_source(frames: np.ndarray, size: int, milliseconds: int = 125) -> str:
    """The ``src`` of an ``<img>``: WebP, animated for several frames.

    Args:
        frames: ``[F, H, W, 3]`` uint8.
        size: pixels the picture is wide, at most.
        milliseconds: each of several frames is shown.
    """
    images = [Image.fromarray(frame) for frame in frames]
    if images[0].width > size:
        scaled = (size, round(images[0].height * size / images[0].width))
        images = [image.resize(scaled, Image.Resampling.LANCZOS) for image in images]
    out = io.BytesIO()
    more = {"save_all": True, "append_images": images[1:], "duration": milliseconds, "loop": 0}
    images[0].save(out, "WEBP", quality=88, **(more if len(images) > 1 else {}))
    return _data("webp", out.getvalue())


def png_source(png: bytes | Image.Image) -> str:
    """The ``src`` of an ``<img>``: PNG, as it is."""
    if isinstance(png, Image.Image):
        out = io.BytesIO()
        png.save(out, "PNG")
        png = out.getvalue()
    return _data("png", png)


def _data(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()


def image_tag(source: str, alt: str) -> str:
    """An ``<img>``, loaded at once: its bytes are here, and one that waits to be scrolled to is
    missing from print.

    Raises:
        ValueError: no words.
    """
    if not alt.strip():
        raise ValueError("a picture needs words for those who cannot see it; got none")
    return f'<img src="{source}" alt="{escape(alt)}">'
