"""Files of a folder that came from somebody else: nothing outside it is read."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from .problems import FileProblem


def path_inside(folder: str | Path, *names: str) -> Path:
    """``folder/name/name...``, if that is a file or folder in it, and no link on the way.

    Args:
        names: one each of the folders on the way and of the file; they may come from a file.

    Raises:
        FileProblem: a name that leads elsewhere, a link, or something that is no regular file.
    """
    path = Path(folder)
    for name in names:
        plain = isinstance(name, str) and name not in ("", ".", "..") and "\0" not in name
        if not plain or any(mark in name for mark in ("/", "\\", ":")):
            raise FileProblem(folder, f"{name!r} is not the name of something in it")
        path = path / name
        _check_kind(path)
    return path


def check_files_inside(folder: str | Path) -> None:
    """Every file in a folder lies there; a folder in it may be a link, say to another disk.

    For folders that are written to: a write goes through a link, into whose file it may be.

    Raises:
        FileProblem: a link, or something that is neither a file nor a folder.
    """
    places = [os.fspath(folder)]
    while places:
        with contextlib.suppress(OSError), os.scandir(places.pop()) as entries:
            for entry in entries:  # which know their kind without a call of the system for each
                if entry.is_dir(follow_symlinks=False):
                    places.append(entry.path)
                elif not entry.is_file(follow_symlinks=False) and not entry.is_dir():
                    _check_kind(Path(entry.path))


def _check_kind(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        raise FileProblem(path, "it is a link; what belongs to a folder lies in it")
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise FileProblem(path, "it is neither a file nor a folder")
