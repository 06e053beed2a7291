"""Finished pictures of one arm in a folder, so that a killed evaluation goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dittfast.disk.problems import FileProblem, reading
from dittfast.disk.records import Record, read_record, write_record
from dittfast.disk.tensors import read_array, write_array
from dittfast.files import write_image
from dittfast.measure.comparable import difference_of_settings
from dittfast.pictures import read_picture

from ..runs.prompts import Item
from ..runs.run import Run

_RECORD = {"prompt": str, "seed": int, "frames": int, "*": object}


def _image(index: int, number: int, count: int) -> str:
    """The file of a frame."""
    return f"images/{index:05d}" + (f"_{number:03d}" if count > 1 else "") + ".png"


def _latents(index: int) -> str:
    return f"latents/{index:05d}.npy"


def keep_settings(
    manifest: Path, settings: dict, what: str, verify: bool = True, since: dict | None = None
) -> None:
    """Write what the results in a folder depend on, or compare it with what is written there.

    Args:
        manifest: a record in that folder.
        settings: plain data, as JSON gives it back.
        what: words for the results, such as "pictures drawn".
        since: what counts where an earlier version did not write it.

    Raises:
        ValueError: the folder holds results of other settings.
    """
    if not manifest.exists():
        write_record(manifest, settings)
        return
    remedy = "remove it to begin again"
    earlier = (since or {}) | read_record(manifest, dict, verify=verify, remedy=remedy).data
    differing = difference_of_settings(settings, earlier)
    if differing:
        raise ValueError(
            f"{manifest.parent} holds {what} with other settings ({'; '.join(differing)}); "
            "use those settings, or another folder"
        )


class Drawings:
    """A folder of pictures that were all drawn with the same settings.

    ``images/`` holds PNGs (every frame of a video), ``latents/`` the final latents, ``records/``
    one JSON per picture, written last: a picture with a record is complete.

    Args:
        folder: made if it is not there.
        settings: plain data for JSON, everything a picture depends on but prompt and seed.
        verify: compare files with the SHA-256 that was written with them.

    Raises:
        ValueError: the folder holds pictures of other settings, or records that are no JSON.
    """

    def __init__(self, folder: str | Path, settings: dict, verify: bool = True):
        self.folder = Path(folder)
        self._verify = verify
        self.settings = json.loads(json.dumps(settings, allow_nan=False))
        for name in ("images", "latents", "records"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        # Folders of earlier versions do not say on which attention backend they were drawn.
        since = {"dense_attention": self.settings.get("dense_attention")}
        keep_settings(self.folder / "settings.json", self.settings, "pictures drawn", verify, since)

    @property
    def images(self) -> Path:
        """The folder that holds nothing but pictures."""
        return self.folder / "images"

    def _record(self, index: int) -> Path:
        return self.folder / "records" / f"{index:05d}.json"

    def _read(self, path: Path, form: object = dict) -> Record:
        return read_record(path, form, verify=self._verify, remedy="remove it to draw again")

    def _check(self, item: Item, name: str) -> Path:
        """A file of a finished picture, once it is what its record says.

        Raises:
            FileProblem: it was changed or damaged.
        """
        record = self._read(self._record(item.index), _RECORD)
        return record.check(f"../{name}", f"remove {record.path} to draw it again")

    def record(self, item: Item) -> dict | None:
        """What is known about a finished picture; None where it is not drawn yet.

        Raises:
            ValueError: that number was drawn from another prompt or seed.
        """
        path = self._record(item.index)
        if not path.exists():
            return None
        stored = self._read(path, _RECORD).data
        wanted = {"prompt": item.prompt, "seed": item.seed}
        differing = difference_of_settings(wanted, {k: stored.get(k) for k in wanted})
        if differing:
            raise ValueError(
                f"picture {item.index} in {self.folder} was drawn for another "
                f"{'; '.join(differing)}; use the same prompts and seeds, or another folder"
            )
        return stored

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
        frames = result.frames
        files = [_image(item.index, number, len(frames)) for number in range(len(frames))]
        for name, frame in zip(files, frames):
            write_image(self.folder / name, Image.fromarray(frame))
        if latents and result.latents is not None:
            files.append(_latents(item.index))
            write_array(self.folder / files[-1], result.latents.numpy())
        known = {"prompt": item.prompt, "seed": item.seed, "frames": len(frames)}
        files = [f"../{name}" for name in files]
        write_record(self._record(item.index), known | facts, files)

    def frames(self, item: Item) -> np.ndarray:
        """The picture, ``[F, H, W, 3]`` uint8.

        Raises:
            ValueError: a file of it is missing or cannot be read.
        """
        count = (self.record(item) or {"frames": 1})["frames"]
        drawn = []
        for number in range(max(count, 1)):
            path = self.folder / _image(item.index, number, count)
            if self._record(item.index).exists():
                self._check(item, path.relative_to(self.folder).as_posix())
            if not path.is_file():
                raise FileProblem(path, "there is no such picture", "draw that arm again")
            drawn.append(np.asarray(read_picture(path)))
        with reading(path, "its frames differ in size"):
            return np.stack(drawn)

    def latents(self, item: Item) -> torch.Tensor | None:
        """The final latents; None where none were stored."""
        path = self.folder / _latents(item.index)
        if not path.exists():
            return None
        if self._record(item.index).exists():
            self._check(item, _latents(item.index))
        return torch.from_numpy(read_array(path))
