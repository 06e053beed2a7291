"""JSON files: read strictly, and written with the SHA-256 of themselves and of files beside them.

A record is a JSON mapping with one more key, ``sha256``: the digest of each file that belongs to
it, by name, and of the record itself. Files of earlier versions have none and are believed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from dittfast.files import write_json

from .problems import FileProblem, reading
from .structure import check_structure

SUMS = "sha256"
# The record's own entry among the digests.
ITSELF = "record"
_DIGEST = re.compile(r"[0-9a-f]{64}")
# Nothing that we write holds larger numbers, and larger ones stop conversions elsewhere.
_MOST = 2**63
DAMAGED = "it was changed or damaged after it was written (its SHA-256 differs)"


def sha256(path: str | Path) -> str:
    """The hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def digest_of(data: object) -> str:
    """The hexadecimal digest of plain data; of equal data always the same."""
    text = json.dumps(data, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _integer(text: str) -> int:
    value = int(text) if len(text) <= 20 else _MOST
    if abs(value) >= _MOST:
        raise ValueError(f"the number {text[:20]}... is too large")
    return value


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _no_number(text: str):
    raise ValueError(f"{text} is no JSON")


def parse_json(text: str) -> object:
    """``json.loads``, but a NaN, an infinity or a number beyond 64 bits is an error."""
    return json.loads(text, parse_int=_integer, parse_float=_number, parse_constant=_no_number)


def read_text(path: str | Path, remedy: str = "") -> str:
    """A UTF-8 text file, with or without the mark that some editors put in front.

    Raises:
        FileProblem: it is not UTF-8.
        OSError: it cannot be had.
    """
    with reading(path, "it is not UTF-8 text", remedy):
        return Path(path).read_text(encoding="utf-8-sig")


def read_json(path: str | Path, wanted: object = object, remedy: str = "") -> object:
    """A JSON file of the form ``wanted``, as :func:`~.structure.check_structure` has it.

    Raises:
        FileProblem: it is no JSON, or of another form.
        OSError: it cannot be had.
    """
    text = read_text(path, remedy)
    with reading(path, "it is not valid JSON", remedy):
        value = parse_json(text)
    with reading(path, "it is not what is read here", remedy):
        check_structure(value, wanted)
    return value


@dataclass(frozen=True)
class Record:
    """A record that was read.

    Attributes:
        path: of the JSON file.
        data: what it holds, without the digests.
        sums: digest by file name; empty for files of earlier versions.
        verify: whether the digests count.
    """

    path: Path
    data: dict
    sums: dict[str, str] = field(default_factory=dict)
    verify: bool = True

    def check(self, name: str, remedy: str = "") -> Path:
        """The path of a file beside the record, once its digest agrees.

        Raises:
            FileProblem: it is not the file that was written.
            OSError: it cannot be had.
        """
        path = Path(os.path.normpath(self.path.parent / name))
        if not self.verify or not self.sums:
            return path
        if name not in self.sums:
            raise FileProblem(path, f"{self.path.name} beside it does not list it", remedy)
        with reading(path):
            digest = sha256(path)
        if digest != self.sums[name]:
            raise FileProblem(path, DAMAGED, remedy)
        return path


def with_sums(data: dict, folder: Path, files: Iterable[str] = ()) -> dict:
    """``data`` with the digests that make it a record of a folder."""
    plain = json.loads(json.dumps(data, allow_nan=False))
    sums = {name: sha256(folder / name) for name in sorted(files)}
    return {**plain, SUMS: {**sums, ITSELF: digest_of([plain, sums])}}


def write_record(path: str | Path, data: dict, files: Iterable[str] = ()) -> None:
    """Write ``data`` as JSON with the digests of itself and of files beside it, atomically.

    Args:
        files: their names; they lie in the folder of ``path`` or below it.
    """
    path = Path(path)
    write_json(path, with_sums(data, path.parent, files))


def read_record(
    path: str | Path, wanted: object = dict, *, verify: bool = True, remedy: str = ""
) -> Record:
    """A record; its own digest is checked, those of its files when they are asked for.

    Args:
        wanted: the form of its data, as :func:`~.structure.check_structure` has it.
        verify: False believes whatever is there.

    Raises:
        FileProblem: it is damaged, no JSON, or of another form.
        OSError: it cannot be had.
    """
    path = Path(path)
    data = read_json(path, dict, remedy)
    sums = data.pop(SUMS, None)
    with reading(path, "it is not what is read here", remedy):
        if sums is not None:
            check_structure(sums, {"*": str}, SUMS)
        if verify:
            _check_sums(path, data, sums, remedy)
        check_structure(data, wanted)
    return Record(path, data, sums or {}, verify)


def _check_sums(path: Path, data: dict, sums: dict | None, remedy: str) -> None:
    if sums is None:
        # A damaged name of the digests must not make the record one of an earlier version.
        if any(
            isinstance(x, dict) and _DIGEST.fullmatch(str(x.get(ITSELF))) for x in data.values()
        ):
            raise FileProblem(path, DAMAGED, remedy)
        return
    others = {name: digest for name, digest in sums.items() if name != ITSELF}
    if sums.get(ITSELF) != digest_of([data, others]):
        raise FileProblem(path, DAMAGED, remedy)
