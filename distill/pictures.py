"""Pictures and clips with captions from a folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
VIDEOS = (".mp4", ".gif", ".webm", ".mov")


@dataclass(frozen=True)
class Picture:
    """A file and its caption."""

    path: Path
    caption: str


def find_pictures(folder: str | Path) -> list[Picture]:
    """Pictures and clips below ``folder``, in the order of their names.

    Captions stand in ``metadata.jsonl`` (lines ``{"file_name": ..., "text": ...}``, as Hugging
    Face datasets have them) or in a ``.txt`` file beside each picture.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: an empty folder, or a picture without a caption.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} with pictures")
    captions = {}
    metadata = folder / "metadata.jsonl"
    if metadata.is_file():
        for line in metadata.read_text(encoding="utf-8").splitlines():
            if line.strip():
                row = json.loads(line)
                captions[row["file_name"]] = row["text"]
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in IMAGES + VIDEOS:
            continue
        text = captions.get(path.relative_to(folder).as_posix())
        beside = path.with_suffix(".txt")
        if text is None and beside.is_file():
            text = beside.read_text(encoding="utf-8").strip()
        if text is None:
            raise ValueError(
                f"{path} has no caption; write it into {beside.name} beside it, or into "
                f'{metadata} as a line {{"file_name": ..., "text": ...}}'
            )
        found.append(Picture(path, text))
    if not found:
        raise ValueError(f"{folder} holds no picture ({', '.join(IMAGES + VIDEOS)})")
    return found


def read_frames(path: Path, height: int, width: int, num_frames: int = 1) -> np.ndarray:
    """``[num_frames, height, width, 3]`` uint8: scaled to cover the size, the middle cut out.

    A longer clip gives its first ``num_frames`` frames.

    Raises:
        ValueError: a clip with fewer frames.
    """
    from PIL import Image

    if path.suffix.lower() in VIDEOS:
        import imageio.v3 as iio

        frames = []
        for frame in iio.imiter(path):
            frames.append(Image.fromarray(np.asarray(frame)[..., :3]))
            if len(frames) == num_frames:
                break
    else:
        frames = [Image.open(path).convert("RGB")]
    if len(frames) < num_frames:
        raise ValueError(f"{path} has {len(frames)} frames, data.call.num_frames is {num_frames}")
    return np.stack([np.asarray(_cover(frame, height, width)) for frame in frames])


def _cover(image, height: int, width: int):
    from PIL import Image

    scale = max(height / image.height, width / image.width)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
