"""One picture file to RGB as a viewer shows it: any mode, any orientation, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

# Formats whose 32-bit integer mode "I" holds 16-bit values from 0 to 65,535.
_SIXTEEN_BIT = ("PNG", "PPM")


class ReadPicture(NamedTuple):
    """A picture in RGB, and what was done to it that its pixels alone do not say."""

    image: Image.Image
    changes: tuple[str, ...] = ()


def open_picture(path: str | Path) -> ReadPicture:
    """A picture file, or an ``.npy`` with ``[H, W, 3]`` uint8, in 8-bit RGB.

    It is turned as its camera says (EXIF), what is transparent is put on white, 16-bit grey is
    scaled to 8 bits, palettes and other colour models become RGB.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no picture, a damaged or an animated one, or values whose range nobody knows
            (32-bit integers, floats); the file is named, and what to do.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no picture at {path}")
    if path.suffix.lower() == ".npy":
        return ReadPicture(_from_array(path))
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            frames = getattr(file, "n_frames", 1)
            # Cameras put previews behind the picture in their MPO files.
            if frames > 1 and file.format != "MPO":
                raise ValueError(
                    f"it is animated ({frames} frames); save the frame that is meant as a picture"
                )
            changes = (
                ["turned by its EXIF orientation"] if file.getexif().get(0x0112, 1) != 1 else []
            )
            picture = ImageOps.exif_transpose(file)
            mode, known = picture.mode, file.format in _SIXTEEN_BIT
            if mode.startswith("I;16") or (mode == "I" and known):
                changes.append("16-bit grey scaled to 8 bits")
                values = np.asarray(picture).astype(np.uint32)
                picture = Image.fromarray(((values + 128) // 257).astype(np.uint8))
            elif mode in ("I", "F"):
                raise ValueError(
                    f"its pixels are {'32-bit integers' if mode == 'I' else 'floats'}, whose range "
                    "the file does not tell; save it with 8 or 16 bits a channel"
                )
            elif picture.has_transparency_data:
                changes.append("transparent parts put on white")
                picture = on_white(picture)
            elif mode not in ("RGB", "L"):
                changes.append(f"{mode} converted to RGB")
            return ReadPicture(picture.convert("RGB"), tuple(changes))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no picture that can be read: {_plain(error, path)}") from error


def read_picture(path: str | Path) -> Image.Image:
    """The picture of :func:`open_picture` alone."""
    return open_picture(path).image


def on_white(picture: Image.Image) -> Image.Image:
    """The picture in RGB, with white behind what is transparent."""
    from PIL import Image

    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def _from_array(path: Path) -> Image.Image:
    from PIL import Image

    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is no array that can be read: {_plain(error, path)}") from error
    if values.dtype != np.uint8 or values.ndim != 3 or values.shape[-1] != 3 or not values.size:
        raise ValueError(
            f"{path} holds {values.dtype} {list(values.shape)}; a picture is uint8 [height, width, "
            "3] with values from 0 to 255"
        )
    return Image.fromarray(values)


def _plain(error: BaseException, path: Path) -> str:
    """The error in one line, without the path that the message names already."""
    text = " ".join(str(error).split()).replace(f" {str(path)!r}", "")
    return text[:200] or type(error).__name__
