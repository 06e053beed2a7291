"""Compiles native.c on first use and loads it; a cache folder keeps the library.

As torch.compile and Triton do, with whatever C compiler there is. The file's name is a hash of the
source, the command and everything the compiler predefines for it, which tells its version and the
instruction set of this CPU: another compiler or another machine with the same home gets a library
of its own. Loading runs code, so the folder must belong to the user and be closed to others.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("native.c")
_COMPILERS = ("cc", "gcc", "clang", "c++", "g++", "clang++")
_REMEDY = "install gcc or clang, or name a C compiler in CC"
# Longer than the slowest machine needs; a compiler that waits for something forever is not one.
_TIMEOUT_SECONDS = 300


class Library(NamedTuple):
    """The loaded kernel and how it came about.

    Attributes:
        handle: the loaded library.
        compiler: the command, without its options.
        instructions: the vector instructions it uses.
        folder: where it is kept, or None if it had to be built for this process alone.
    """

    handle: ctypes.CDLL
    compiler: str
    instructions: str
    folder: Path | None


class BuildError(Exception):
    """Why there is no library, and the remedy."""


@functools.cache
def library() -> Library | BuildError:
    """The kernel, or why there is none, which is logged as well; decided once in a process."""
    try:
        return _find_or_build()
    except BuildError as error:
        logger.warning(
            "the native CPU kernel cannot run, so attention on CPUs takes the slower 'cpu' "
            "backend: %s",
            error,
        )
        return error


def _find_or_build() -> Library:
    if os.name != "posix":
        raise BuildError(f"it needs a POSIX system (Linux, macOS), this is {platform.system()}")
    try:
        folder, trouble = _cache_folder(), None
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        folder, trouble = None, error
    failures = []
    for compiler in _compilers():
        command = [*compiler, *_flags()]
        try:
            name = f"native-{_fingerprint(command)}.so"
            if folder is not None:
                try:
                    return _loaded(_cached(command, folder / name), compiler, folder)
                except OSError as error:
                    trouble = error
            library = _temporary(command, name, compiler)
        except (BuildError, OSError) as error:
            failures.append(f"{shlex.join(compiler)}: {error}")
            continue
        logger.warning(
            "the native CPU kernel is compiled anew by every process, because its cache folder "
            "cannot be used: %s; set XDG_CACHE_HOME to a folder that only you can write",
            trouble,
        )
        return library
    if not failures:
        raise BuildError(f"no C compiler was found ({', '.join(_COMPILERS)}); {_REMEDY}")
    raise BuildError(f"no C compiler works ({'; '.join(failures)}); {_REMEDY}")


def _compilers() -> Iterator[list[str]]:
    """Commands of the compilers that are there, the user's choice first."""
    named = [shlex.split(os.environ.get(name, "")) for name in ("CC", "CXX")]
    seen = set()
    for command in [*named, *([name] for name in _COMPILERS)]:
        path = shutil.which(command[0]) if command else None
        if path is not None and (path, *command[1:]) not in seen:
            seen.add((path, *command[1:]))
            yield [path, *command[1:]]


def _flags() -> list[str]:
    machine = platform.machine().lower()
    arch = []
    if machine in ("x86_64", "amd64", "i686"):
        arch = ["-march=native"]
    elif machine in ("aarch64", "arm64"):
        arch = ["-mcpu=native"]
    # Not -ffast-math: -inf and NaN have to mean what they mean.
    math = ["-fno-math-errno", "-fno-trapping-math"]
    return [
        "-O3",
        *arch,
        *math,
        "-std=gnu11",
        "-fPIC",
        "-shared",
        "-pthread",
        "-fvisibility=hidden",
    ]


def _run(command: list[str], text: bytes | None = None) -> bytes:
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, timeout=_TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise BuildError(f"it did not end within {_TIMEOUT_SECONDS} s") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").split("\n")
        errors = [line for line in said if "error" in line.lower()] or said
        raise BuildError(f"exit code {done.returncode}, {' '.join(' '.join(errors).split())[:300]}")
    return done.stdout


def _fingerprint(command: list[str]) -> str:
    predefined = _run([*command, "-x", "c", "-dM", "-E", "-"], b"")
    parts = SOURCE.read_bytes(), "\0".join(command).encode(), predefined
    return hashlib.sha256(b"\0\0".join(parts)).hexdigest()[:32]


def _cache_folder() -> Path:
    """The user's own cache folder, made if need be; OSError if others could write there."""
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not root.is_absolute():
        root = Path.home() / ".cache"
    folder = root / "dittfast"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.geteuid():
        raise OSError(f"{folder} belongs to user {status.st_uid}, not to {os.geteuid()}")
    if status.st_mode & 0o022:
        raise OSError(f"{folder} can be written by others (mode {status.st_mode & 0o777:o})")
    return folder


def _build(command: list[str], target: Path) -> None:
    """Compile to ``target``, which appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as temporary:
        made = Path(temporary) / target.name
        _run([*command, "-x", "c", str(SOURCE), "-o", str(made), "-lm"])
        os.replace(made, target)


def _cached(command: list[str], target: Path) -> ctypes.CDLL:
    """The library at ``target``, compiled if it is missing or cannot be loaded."""
    if target.exists():
        try:
            return ctypes.CDLL(str(target))
        except OSError as error:
            logger.warning("%s cannot be loaded and is compiled again: %s", target, error)
    _build(command, target)
    return ctypes.CDLL(str(target))


def _temporary(command: list[str], name: str, compiler: list[str]) -> Library:
    with tempfile.TemporaryDirectory(prefix="dittfast-") as folder:
        _build(command, Path(folder) / name)
        # Loaded, it no longer needs its file.
        return _loaded(ctypes.CDLL(str(Path(folder) / name)), compiler, None)


def _loaded(handle: ctypes.CDLL, compiler: list[str], folder: Path | None) -> Library:
    handle.dittfast_instructions.restype = ctypes.c_char_p
    instructions = handle.dittfast_instructions().decode()
    return Library(handle, shlex.join(compiler), instructions, folder)
