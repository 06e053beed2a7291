"""Fréchet distance between folders of pictures, through clean-fid; nothing is downloaded."""

from __future__ import annotations

import contextlib
import io
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .features import CleanFidExtractor, FeatureNetwork

INCEPTION_DIMS = 2048
_INCEPTION_FILE = "inception-2015-12-05.pt"
# clean-fid takes every file below a folder with one of these endings, in this spelling.
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


def check_pictures(folder: str | Path, mixed_sizes: bool = False) -> tuple[int, set]:
    """Read every picture below a folder once: how many there are, and their ``(width, height)``.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no pictures, some that cannot be read, or without ``mixed_sizes`` more than one
            size; naming them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    # clean-fid passes over hidden files, such as what a killed process did not finish.
    files = sorted(
        p
        for p in folder.rglob("*.*")
        if p.name.rpartition(".")[2] in ENDINGS
        and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    )
    if not files:
        raise ValueError(f"the folder {folder} holds no pictures ({', '.join(ENDINGS[:9])})")
    sizes: dict[tuple[int, int], Path] = {}
    broken = []
    for file in files:
        try:
            if file.suffix == ".npy":
                height, width, channels = np.load(file, mmap_mode="r").shape
                if channels != 3:
                    raise ValueError(f"{channels} channels")
                size = (width, height)
            else:
                with Image.open(file) as image:
                    image.load()
                    size = image.size
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            broken.append(f"{file} ({' '.join(str(error).split())[:80]})")
            continue
        sizes.setdefault(size, file)
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(files)} pictures in {folder} cannot be read: "
            f"{'; '.join(broken[:3])}{' ...' if len(broken) > 3 else ''}; remove or replace them"
        )
    if len(sizes) > 1 and not mixed_sizes:
        some = "; ".join(f"{w} x {h}: {file.name}" for (w, h), file in list(sizes.items())[:3])
        raise ValueError(
            f"{folder} mixes {len(sizes)} sizes ({some}); a set for FID has one size. If it is "
            "meant so, allow it with --mixed-sizes"
        )
    return len(files), set(sizes)


def _check_count(folder: Path, count: int, dims: int, name: str, allow_few: bool) -> None:
    if count > dims or allow_few:
        return
    raise ValueError(
        f"{folder} has {count} pictures, and {name} has {dims} features: with fewer than "
        f"{dims + 1} pictures their covariance is singular and the distance means nothing. Draw "
        f"{dims + 1 - count} more, or insist with --allow-few"
    )


def _inception(reference) -> dict:
    """What clean-fid needs for FID itself, checked to be on the disk; it would download it."""
    import cleanfid

    if not inception_path().is_file():
        raise FileNotFoundError(
            f"Inception's weights are not at {inception_path()}, where clean-fid looks for them. "
            f"Put {_INCEPTION_FILE} there (clean-fid's downloads_helper names its address), or use "
            "--features sample, which is no FID"
        )
    if not isinstance(reference, Reference):
        return {}
    path = _statistics(Path(cleanfid.__file__).parent, reference)
    if not path.is_file():
        raise FileNotFoundError(
            f"the statistics of {reference.name} are not at {path}; fetch "
            f"https://www.cs.cmu.edu/~clean-fid/stats/{path.name} there"
        )
    return {
        "dataset_name": reference.name,
        "dataset_split": reference.split,
        "dataset_res": reference.resolution,
    }


def _own_features(network: FeatureNetwork, reference, device) -> dict:
    """What clean-fid needs for the distance in another network's features."""
    if isinstance(reference, Reference):
        raise ValueError("a dataset's statistics are of Inception; name a folder to compare")
    extractor = CleanFidExtractor(network.to(device))
    return {"custom_feat_extractor": extractor, "custom_fn_resize": extractor.resize}


def frechet(
    folder: str | Path,
    reference: str | Path | Reference,
    network: FeatureNetwork | None = None,
    *,
    allow_few: bool = False,
    mixed_sizes: bool = False,
    batch_size: int = 32,
    device="cpu",
) -> dict:
    """clean-fid's distance between a folder of pictures and another, or a dataset's statistics.

    Args:
        network: a feature network instead of Inception; the result is then no FID and is never
            called one.
        allow_few: go on with fewer pictures than features.
        mixed_sizes: allow pictures of several sizes in a folder.

    Returns:
        Plain data: ``value``, ``is_fid``, what the features are, how many pictures on each side.

    Raises:
        FileNotFoundError: a folder, Inception's weights or a dataset's statistics are not here;
            clean-fid would download them without asking.
        ValueError: as :func:`check_pictures`, or too few pictures.
    """
    from cleanfid import fid

    inception = network is None
    dims = INCEPTION_DIMS if inception else network.dims
    name = "Inception" if inception else network.name
    chosen = _inception(reference) if inception else _own_features(network, reference, device)
    both = (folder,) if isinstance(reference, Reference) else (folder, reference)
    folders = [picture_folder(f) for f in both]
    found = [check_pictures(f, mixed_sizes) for f in folders]
    for at, (count, _) in zip(folders, found):
        _check_count(at, count, dims, name, allow_few)
    # clean-fid prints what only our caller may print.
    with contextlib.redirect_stdout(io.StringIO()):
        value = fid.compute_fid(
            *map(str, folders),
            mode="clean",
            num_workers=0,
            batch_size=batch_size,
            device=torch.device(device),
            use_dataparallel=False,
            verbose=False,
            **chosen,
        )
    return {
        "value": float(value),
        "is_fid": inception,
        "features": name,
        "dims": dims,
        "folder": str(folder),
        "pictures": found[0][0],
        "reference": _name(reference),
        "reference_pictures": found[1][0] if len(found) > 1 else None,
        "sizes": [sorted(map(list, sizes)) for _, sizes in found],
        "too_few": any(count <= dims for count, _ in found),
        "clean_fid": "mode clean",
    }


def _name(reference) -> str:
    if isinstance(reference, Reference):
        return f"{reference.name}:{reference.split}:{reference.resolution}"
    return str(reference)


def _statistics(package: Path, reference: Reference) -> Path:
    name = f"{reference.name}_clean_{reference.split}_{reference.resolution}.npz".lower()
    return package / "stats" / name
