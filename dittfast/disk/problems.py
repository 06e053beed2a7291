"""What goes wrong with files, in one sentence each: the file, what is wrong with it, the remedy.

Every format has errors of its own (a damaged pickle alone can raise a dozen kinds). Readers and
writers of the package go through :func:`reading` and :func:`writing`, which make one kind of them.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# How Rust's libraries say an errno.
_OS_ERROR = re.compile(r"os error (\d+)")
# What PyTorch's writer says when the disk takes no more.
_OF_PYTORCH = ("PytorchStreamWriter", "inline_container", "iostream error")


class FileProblem(ValueError):
    """A file that cannot be used.

    Attributes:
        path: the file.
    """

    def __init__(self, path: str | Path, what: str, remedy: str = ""):
        self.path = Path(path)
        super().__init__(f"{path}: {shown(what, 2000)}" + (f"; {remedy}" if remedy else ""))


def shown(text: object, most: int = 200) -> str:
    """Words that came from a file, for a sentence: one line of so many characters at most, and
    nothing that a terminal would obey."""
    words = " ".join(str(text).split())[:most]
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in words)


def first_words(error: BaseException, most: int = 200) -> str:
    """What an error says, in one short line."""
    text = str(error)
    if isinstance(error, (KeyError, AttributeError, IndexError, RecursionError)) or not text:
        text = f"{type(error).__name__} {text}"
    return shown(text, most)


def _named(error: OSError, path: str | Path) -> OSError:
    """The same error with the file it is about."""
    if error.errno is None or error.filename is not None:
        return error
    return type(error)(error.errno, error.strerror, str(path))


@contextmanager
def reading(path: str | Path, what: str = "it cannot be read", remedy: str = "") -> Iterator[None]:
    """Inside, whatever a reader says about the contents of a file becomes a :class:`FileProblem`.

    Args:
        what: what is wrong with a file of which the reader complains.
        remedy: what to do then.

    Raises:
        FileProblem: the contents are not what the reader wants.
        OSError: the file itself cannot be had (missing, no permission, a broken disk); named.
    """
    try:
        yield
    except FileProblem:
        raise
    except OSError as error:
        if error.errno is None:  # how Pillow speaks of contents
            raise FileProblem(path, f"{what} ({first_words(error)})", remedy) from error
        raise _named(error, path) from error
    except Exception as error:
        raise FileProblem(path, f"{what} ({first_words(error)})", remedy) from error


def _code(error: Exception, path: Path) -> int | None:
    """The errno behind another library's error; None where there is none."""
    match = _OS_ERROR.search(str(error))
    if match:
        return int(match[1])
    # NumPy and PyTorch say neither why nor where.
    silent = isinstance(error, OSError) or any(word in str(error) for word in _OF_PYTORCH)
    if not silent:
        return None
    full = path.parent.is_dir() and shutil.disk_usage(path.parent).free < 1 << 20
    return errno.ENOSPC if full else errno.EIO


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Inside, a writer's error over the disk is an OSError that names the file.

    Raises:
        OSError: the disk is full, or gone.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            if error.filename is not None:
                raise
            raise _named(error, path) from error
        code = _code(error, Path(path))
        if code is None:
            raise
        words = first_words(error, 400) if isinstance(error, OSError) else os.strerror(code)
        raise OSError(code, words, str(path)) from error
