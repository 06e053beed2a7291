"""Fréchet distance between folders of pictures, through clean-fid; nothing is downloaded."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from dittfast.pictures import open_picture

from .features import CleanFidExtractor, FeatureNetwork

INCEPTION_DIMS = 2048
_INCEPTION_FILE = "inception-2015-12-05.pt"
# What clean-fid takes for pictures, in this spelling, everywhere below a folder.
ENDINGS = (
    "bmp", "jpg", "jpeg", "pgm", "png", "ppm", "tif", "tiff", "webp", "npy", "JPEG", "JPG", "PNG",
)  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """clean-fid's statistics of a known dataset, such as ``("coco2014", "train", "256")``."""

    name: str
    split: str
    resolution: str

    @classmethod
    def parse(cls, text: str) -> Reference:
        """``"NAME:SPLIT:RESOLUTION"``.

        Raises:
            ValueError: anything else.
        """
        parts = text.split(":")
        if len(parts) != 3 or not all(parts):
            raise ValueError(f"a dataset is named NAME:SPLIT:RESOLUTION, got {text!r}")
        return cls(*parts)


def inception_path() -> Path:
    """Where clean-fid keeps Inception's weights."""
    return Path("./" if platform.system() == "Windows" else "/tmp") / _INCEPTION_FILE


def picture_folder(folder: str | Path) -> Path:
    """The folder with nothing but pictures: of an arm of ``dittfast evaluate``, its ``images/``."""
    folder = Path(folder)
    if (folder / "settings.json").is_file() and (folder / "images").is_dir():
        return folder / "images"
    return folder


@dataclass(frozen=True)
class Pictures:
    """The pictures below a folder, each of which could be read.

    Attributes:
        files: in the order of their names.
        sizes: all ``(width, height)`` among them.
        changes: what had to be done to show them as a viewer would, and to how many.
    """

    files: tuple[Path, ...]
    sizes: frozenset[tuple[int, int]]
    changes: dict[str, int] = field(default_factory=dict)


def check_pictures(folder: str | Path, mixed_sizes: bool = False) -> Pictures:
    """Read every picture below a folder once.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no pictures, some that cannot be read, or without ``mixed_sizes`` more than one
            size; naming them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; name one with pictures")
    # Hidden files are what a killed process did not finish.
    files = sorted(
        p
        for p in folder.rglob("*.*")
        if p.name.rpartition(".")[2] in ENDINGS
        and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    )
    if not files:
        raise ValueError(f"the folder {folder} holds no pictures ({', '.join(ENDINGS[:9])})")
    sizes: dict[tuple[int, int], Path] = {}
    changes: Counter[str] = Counter()
    broken = []
    for file in files:
        try:
            picture = open_picture(file)
        except ValueError as error:
            broken.append(str(error))
            continue
        sizes.setdefault(picture.image.size, file)
        changes.update(picture.changes)
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(files)} pictures in {folder} cannot be used: "
            f"{'; '.join(broken[:3])}{' ...' if len(broken) > 3 else ''}; remove or replace them"
        )
    if len(sizes) > 1 and not mixed_sizes:
        some = "; ".join(f"{w} x {h}: {file.name}" for (w, h), file in list(sizes.items())[:3])
        raise ValueError(
            f"{folder} mixes {len(sizes)} sizes ({some}); a set for FID has one size. If it is "
            "meant so, allow it with --mixed-sizes"
        )
    return Pictures(tuple(files), frozenset(sizes), dict(changes))


def drawn_with(folder: str | Path) -> dict | None:
    """The settings that an arm of ``dittfast evaluate`` was drawn with; None for other folders."""
    file = Path(folder) / "settings.json"
    if picture_folder(folder) == Path(folder):
        return None
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}; draw that arm again") from error
    return settings if isinstance(settings, dict) else None


def _check_count(folder: Path, count: int, dims: int, name: str, allow_few: bool) -> None:
    if count > dims or allow_few:
        return
    raise ValueError(
        f"{folder} has {count} pictures, and {name} has {dims} features: with fewer than "
        f"{dims + 1} pictures their covariance is singular and the distance means nothing. Draw "
        f"{dims + 1 - count} more, or insist with --allow-few"
    )


def _check_inception(reference) -> None:
    """Refuse where clean-fid would download weights or statistics, or run another user's."""
    if not inception_path().is_file():
        raise FileNotFoundError(
            f"Inception's weights are not at {inception_path()}, where clean-fid looks for them. "
            f"Put {_INCEPTION_FILE} there (clean-fid's downloads_helper names its address), or use "
            "--features sample, which is no FID"
        )
    owner = inception_path().stat().st_uid
    if hasattr(os, "getuid") and owner not in (0, os.getuid()):
        raise PermissionError(
            f"{inception_path()} belongs to another user (id {owner}), and reading it runs what is "
            "in it; replace it by a file of your own, or use --features sample, which is no FID"
        )
    if isinstance(reference, Reference) and not _statistics(reference).is_file():
        path = _statistics(reference)
        raise FileNotFoundError(
            f"the statistics of {reference.name} are not at {path}; fetch "
            f"https://www.cs.cmu.edu/~clean-fid/stats/{path.name} there"
        )


def _check_request(reference, network: FeatureNetwork | None, batch_size: int) -> None:
    """Raise what can be told before a picture is read."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if network is None:
        _check_inception(reference)
    elif isinstance(reference, Reference):
        raise ValueError("a dataset's statistics are of Inception; name a folder to compare")


def _extractor(network: FeatureNetwork | None, device) -> tuple[Callable, Callable]:
    """What makes features of pictures, and what scales pictures for it; None is Inception."""
    if network is not None:
        extract = CleanFidExtractor(network.to(device))
        return extract, extract.resize
    from cleanfid.features import build_feature_extractor
    from cleanfid.resize import build_resizer

    extractor = build_feature_extractor("clean", torch.device(device), use_dataparallel=False)
    return extractor, build_resizer("clean")


def _known_moments(reference: Reference) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance that clean-fid has of a dataset."""
    with np.load(_statistics(reference)) as moments:
        return moments["mu"], moments["sigma"]


def _moments(files, extract: Callable, resize: Callable, batch_size: int, device, progress):
    """Mean and covariance of the features of pictures, as clean-fid computes them."""
    from cleanfid.fid import get_batch_features

    parts = []
    starts = range(0, len(files), batch_size)
    for start in progress(starts, f"pictures, {batch_size} at a time"):
        some = (np.asarray(open_picture(f).image) for f in files[start : start + batch_size])
        batch = torch.from_numpy(np.stack([resize(x).transpose(2, 0, 1) for x in some]))
        parts.append(get_batch_features(batch.float(), extract, torch.device(device)))
    features = np.concatenate(parts)
    return np.mean(features, axis=0), np.cov(features, rowvar=False)


def frechet(
    folder: str | Path,
    reference: str | Path | Reference,
    network: FeatureNetwork | None = None,
    *,
    allow_few: bool = False,
    mixed_sizes: bool = False,
    batch_size: int = 32,
    device="cpu",
    progress: Callable[[Iterable, str], Iterable] = lambda values, name: values,
) -> dict:
    """clean-fid's distance between a folder of pictures and another, or a dataset's statistics.

    Args:
        network: a feature network instead of Inception; the result is then no FID and is never
            called one.
        allow_few: go on with fewer pictures than features.
        mixed_sizes: allow pictures of several sizes in a folder.
        progress: passes on what is gone through, under a name, and may show how far it is.

    Returns:
        Plain data: ``value``, ``is_fid``, what the features are, how many pictures on each side,
        what had to be done to read them, and the settings that arms were drawn with.

    Raises:
        FileNotFoundError: a folder, Inception's weights or a dataset's statistics are not here;
            clean-fid would download them without asking.
        ValueError: as :func:`check_pictures`, or too few pictures.

    Pictures are read by :func:`dittfast.pictures.open_picture`, resized and compared by clean-fid.
    """
    _check_request(reference, network, batch_size)
    inception = network is None
    dims = INCEPTION_DIMS if inception else network.dims
    name = "Inception" if inception else network.name
    both = (folder,) if isinstance(reference, Reference) else (folder, reference)
    folders = [picture_folder(f) for f in both]
    sets = [check_pictures(f, mixed_sizes) for f in folders]
    for at, pictures in zip(folders, sets):
        _check_count(at, len(pictures.files), dims, name, allow_few)
    extract, resize = _extractor(network, device)
    known = [_known_moments(reference)] if isinstance(reference, Reference) else []
    moments = [
        _moments(p.files, extract, resize, batch_size, device, progress) for p in sets
    ] + known

    from cleanfid.fid import frechet_distance

    settings = [drawn_with(f) for f in both]
    return {
        "value": float(frechet_distance(*moments[0], *moments[1])),
        "is_fid": inception,
        "features": name,
        "dims": dims,
        "folder": str(folder),
        "pictures": len(sets[0].files),
        "reference": _name(reference),
        "reference_pictures": len(sets[1].files) if len(sets) > 1 else None,
        "sizes": [sorted(map(list, pictures.sizes)) for pictures in sets],
        "changes": [pictures.changes for pictures in sets],
        "settings": settings[0],
        "reference_settings": settings[1] if len(settings) > 1 else None,
        "too_few": any(len(pictures.files) <= dims for pictures in sets),
        "clean_fid": "mode clean",
    }


def _name(reference) -> str:
    if isinstance(reference, Reference):
        return f"{reference.name}:{reference.split}:{reference.resolution}"
    return str(reference)


def _statistics(reference: Reference) -> Path:
    import cleanfid

    name = f"{reference.name}_clean_{reference.split}_{reference.resolution}.npz".lower()
    return Path(cleanfid.__file__).parent / "stats" / name
