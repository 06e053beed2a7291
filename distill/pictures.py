"""Pictures and clips with captions from a folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dittfast.pictures import on_white, read_picture

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
        ValueError: an empty folder, a picture without a caption, or captions that cannot be read;
            naming file and line.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} with pictures")
    metadata = folder / "metadata.jsonl"
    captions = _metadata(metadata) if metadata.is_file() else {}
    pictures = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in IMAGES + VIDEOS:
            continue
        text = captions.get(path.relative_to(folder).as_posix())
        beside = path.with_suffix(".txt")
        if text is None and beside.is_file():
            text = _text(beside).strip()
        if text is None:
            raise ValueError(
                f"{path} has no caption; write it into {beside.name} beside it, or into "
                f'{metadata} as a line {{"file_name": ..., "text": ...}}'
            )
        pictures.append(Picture(path, text))
    if not pictures:
        raise ValueError(f"{folder} holds no picture ({', '.join(IMAGES + VIDEOS)})")
    return pictures


def _text(path: Path) -> str:
    """A UTF-8 text file, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason}); save it so") from error


def _metadata(path: Path) -> dict[str, str]:
    """Captions by file name.

    Raises:
        ValueError: a line that is no such entry, or a file named twice; naming the line.
    """
    captions: dict[str, str] = {}
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: no JSON ({error}): {line[:60]}") from error
        if not isinstance(row, dict):
            raise ValueError(f'{where}: expected {{"file_name": ..., "text": ...}}: {line[:60]}')
        for key in ("file_name", "text"):
            if not isinstance(row.get(key), str):
                problem = f"is {row[key]!r}" if key in row else f"is not among {', '.join(row)}"
                raise ValueError(f"{where}: {key!r} must be one text, and {problem[:80]}")
        if row["file_name"] in captions:
            raise ValueError(f"{where}: {row['file_name']} has a caption already")
        if not (path.parent / row["file_name"]).is_file():
            raise ValueError(f"{where}: there is no file {path.parent / row['file_name']}")
        captions[row["file_name"]] = row["text"]
    return captions


def read_frames(path: Path, height: int, width: int, num_frames: int = 1) -> np.ndarray:
    """``[num_frames, height, width, 3]`` uint8: scaled to cover the size, the middle cut out.

    A longer clip gives its first ``num_frames`` frames.

    Raises:
        ValueError: a damaged file, or a clip with fewer frames.
    """
    is_clip = path.suffix.lower() in VIDEOS
    frames = _clip(path, num_frames) if is_clip else [read_picture(path)]
    if len(frames) < num_frames:
        raise ValueError(f"{path} has {len(frames)} frames, data.call.num_frames is {num_frames}")
    return np.stack([np.asarray(_cover(frame, height, width)) for frame in frames])


def _clip(path: Path, most: int) -> list:
    """The first frames of a clip, as pictures."""
    import imageio.v3 as iio
    from PIL import Image

    frames = []
    try:
        for frame in iio.imiter(path):
            frames.append(on_white(Image.fromarray(np.asarray(frame))))
            if len(frames) == most:
                break
    except Exception as error:  # each reader of clips raises its own
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{path} is no clip that can be read: {reason}") from error
    return frames


def _cover(image, height: int, width: int):
    from PIL import Image

    scale = max(height / image.height, width / image.width)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
