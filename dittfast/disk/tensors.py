"""Tensors in files: safetensors, PyTorch's own format without code, and NumPy arrays."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dittfast.files import atomic_path

from .problems import FileProblem, reading

_BROKEN = "it is damaged or incomplete"


class Header(NamedTuple):
    """What a safetensors file says of a tensor: ``dtype`` such as "BF16", and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def is_floating(self) -> bool:
        """Whether its values are numbers with a sign and a fraction, each in bytes of its own."""
        return self.dtype in ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def _open(path: Path):
    from safetensors import safe_open

    with open(path, "rb"):  # safetensors calls a file without permission missing
        return safe_open(path, "pt")


def write_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, atomically."""
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file(dict(tensors), temporary, metadata={"format": "pt", **(metadata or {})})


def read_headers(path: str | Path, remedy: str = "") -> dict[str, Header]:
    """Dtype and shape of every tensor of a safetensors file; reads no values.

    Raises:
        FileProblem: it is damaged: its size does not fit what it says.
        OSError: it cannot be had.
    """
    path = Path(path)
    with reading(path, _BROKEN, remedy), _open(path) as file:
        headers = {}
        for name in file.keys():  # noqa: SIM118 - the file itself is no mapping
            part = file.get_slice(name)
            headers[name] = Header(part.get_dtype(), tuple(part.get_shape()))
        return headers


def read_tensors(
    path: str | Path, names: Iterable[str] | None = None, remedy: str = ""
) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file on the CPU; all of them, or those of ``names``.

    Raises:
        FileProblem: it is damaged, or has no such tensor.
        OSError: it cannot be had.
    """
    path = Path(path)
    with reading(path, _BROKEN, remedy), _open(path) as file:
        return {name: file.get_tensor(name) for name in (names or file.keys())}


def check_finite(path: str | Path, tensors: Mapping[str, torch.Tensor], remedy: str = "") -> None:
    """Raise FileProblem where a tensor holds a NaN or an infinity."""
    for name, x in tensors.items():
        # PyTorch asks no 8-bit numbers whether they are finite.
        if not torch.isfinite(x if x.element_size() > 1 else x.float()).all():
            raise FileProblem(path, f"{name} holds values that are not finite", remedy)


def write_pickled(path: str | Path, state: object) -> None:
    """Write plain data and tensors in PyTorch's own format, atomically."""
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def read_pickled(path: str | Path, remedy: str = "") -> object:
    """What :func:`write_pickled` wrote, on the CPU. No code in the file can run.

    Raises:
        FileProblem: it is damaged, compressed, or holds more than plain data and tensors.
        OSError: it cannot be had.
    """
    with reading(path, _BROKEN, remedy):
        with zipfile.ZipFile(path) as parts:
            for part in parts.infolist():  # a few compressed bytes would fill the memory
                if part.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"{part.filename} is compressed, as PyTorch writes nothing")
        return torch.load(path, map_location="cpu", weights_only=True)


def write_array(path: str | Path, array: np.ndarray) -> None:
    """Write a .npy file, atomically."""
    with atomic_path(path) as temporary:
        np.save(temporary, array)


def read_array(path: str | Path, remedy: str = "") -> np.ndarray:
    """A numeric array of a .npy file; what it claims beyond its own size is not allocated.

    Raises:
        FileProblem: it is damaged, or holds objects.
        OSError: it cannot be had.
    """
    with reading(path, _BROKEN, remedy):
        array = np.array(np.load(path, mmap_mode="r", allow_pickle=False))
        if array.dtype.kind not in "biuf":
            raise ValueError(f"its values are {array.dtype}, not numbers")
        return array
