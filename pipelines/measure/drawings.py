"""Finished pictures of one arm in a folder, so that a killed evaluation goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dittfast.files import atomic_path, write_image, write_json

from ..runs.prompts import Item
from ..runs.run import Run


def difference_of_settings(wanted: dict, found: dict, prefix: str = "") -> list[str]:
    """What differs, as ``"name: found -> wanted"``, nested names with dots."""
    lines = []
    for key in sorted({*wanted, *found}):
        a, b = found.get(key), wanted.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += difference_of_settings(b, a, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines


class Drawings:
    """A folder of pictures that were all drawn with the same settings.

    ``images/`` holds PNGs (every frame of a video), ``latents/`` the final latents, ``records/``
    one JSON per picture, written last: a picture with a record is complete.

    Args:
        folder: made if it is not there.
        settings: plain data for JSON, everything a picture depends on but prompt and seed.

    Raises:
        ValueError: the folder holds pictures of other settings, or records that are no JSON.
    """

    def __init__(self, folder: str | Path, settings: dict):
        self.folder = Path(folder)
        self.settings = json.loads(json.dumps(settings, allow_nan=False))
        for name in ("images", "latents", "records"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        manifest = self.folder / "settings.json"
        if not manifest.exists():
            write_json(manifest, self.settings)
            return
        # Folders of earlier versions do not say on which attention backend they were drawn.
        found = {"dense_attention": self.settings.get("dense_attention"), **_read_json(manifest)}
        differing = difference_of_settings(self.settings, found)
        if differing:
            raise ValueError(
                f"{self.folder} holds pictures drawn with other settings ({'; '.join(differing)}); "
                "use those settings, or another folder"
            )

    @property
    def images(self) -> Path:
        """The folder that holds nothing but pictures."""
        return self.folder / "images"

    def _record(self, index: int) -> Path:
        return self.folder / "records" / f"{index:05d}.json"

    def record(self, item: Item) -> dict | None:
        """What is known about a finished picture; None where it is not drawn yet.

        Raises:
            ValueError: that number was drawn from another prompt or seed.
        """
        path = self._record(item.index)
        if not path.exists():
            return None
        found = _read_json(path)
        wanted = {"prompt": item.prompt, "seed": item.seed}
        differing = difference_of_settings(wanted, {k: found.get(k) for k in wanted})
        if differing:
            raise ValueError(
                f"picture {item.index} in {self.folder} was drawn for another "
                f"{'; '.join(differing)}; use the same prompts and seeds, or another folder"
            )
        return found

    def missing(self, items: list[Item]) -> list[Item]:
        """The items that are not drawn yet, in order."""
        return [item for item in items if self.record(item) is None]

    def save(self, item: Item, result: Run, facts: dict, latents: bool = True) -> None:
        """Store a picture; it counts once its record is written.

        Args:
            facts: plain data for the record.
            latents: whether to store the final latents.

        Raises:
            OSError: the disk is full, or the folder went away; what was complete stays.
        """
        for name in ("images", "latents", "records"):
            # What a process left that was killed while it wrote this very picture.
            for leftover in (self.folder / name).glob(f".{item.index:05d}*"):
                leftover.unlink(missing_ok=True)
        frames = result.frames
        for number, frame in enumerate(frames):
            name = f"{item.index:05d}" + (f"_{number:03d}" if len(frames) > 1 else "")
            write_image(self.images / f"{name}.png", Image.fromarray(frame))
        if latents and result.latents is not None:
            path = self.folder / "latents" / f"{item.index:05d}.npy"
            with atomic_path(path) as temporary:
                np.save(temporary, result.latents.numpy())
        known = {"prompt": item.prompt, "seed": item.seed, "frames": len(frames)}
        write_json(self._record(item.index), known | facts)

    def frames(self, item: Item) -> np.ndarray:
        """The picture, ``[F, H, W, 3]`` uint8.

        Raises:
            ValueError: a file of it is missing or cannot be read.
        """
        count = (self.record(item) or {}).get("frames", 0)
        names = [f"{item.index:05d}"]
        if count > 1:
            names = [f"{item.index:05d}_{n:03d}" for n in range(count)]
        return np.stack([read_picture(self.images / f"{name}.png") for name in names])

    def latents(self, item: Item) -> torch.Tensor | None:
        """The final latents; None where none were stored."""
        path = self.folder / "latents" / f"{item.index:05d}.npy"
        return torch.from_numpy(np.load(path)) if path.exists() else None


def read_picture(path: Path) -> np.ndarray:
    """``[H, W, 3]`` uint8.

    Raises:
        ValueError: there is no such file, or it is no picture.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is no picture that can be read: {error}") from error


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}; remove it to draw again") from error
