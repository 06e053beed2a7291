"""One writer in a folder: an advisory lock that says who holds it, and that no death outlives."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .inside import check_files_inside
from .problems import writing
from .processes import host_name, start_of

LOCK = ".dittfast.lock"


class FolderInUse(ValueError):
    """Another process writes into the folder."""


@dataclass(frozen=True)
class Owner:
    """A process that holds a folder.

    Attributes:
        host, pid, start: the process; a later one with the same id has another start.
        since: when it took the folder.
        command: how it was started.
    """

    host: str
    pid: int
    start: str
    since: str = ""
    command: str = ""

    @classmethod
    def this(cls) -> Owner:
        """The running process."""
        words = [os.path.basename(sys.argv[0]), *sys.argv[1:3]]
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(host_name(), os.getpid(), start_of(os.getpid()) or "", since, " ".join(words))

    def is_same(self, other: Owner) -> bool:
        return (self.host, self.pid, self.start) == (other.host, other.pid, other.start)

    @property
    def may_live(self) -> bool:
        """Whether it still runs; of another machine that cannot be known."""
        return self.host != host_name() or start_of(self.pid) == self.start


def _owner(text: str) -> Owner | None:
    """The owner in a lock file; None in an empty one, or one whose writer died over it."""
    try:
        owner = Owner(**json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return None
    kinds = [(owner.pid, int), (owner.host, str), (owner.start, str)]
    return owner if all(isinstance(value, kind) for value, kind in kinds) else None


@contextlib.contextmanager
def _guarded(path: Path) -> Iterator[int]:
    """The lock file, open; processes are in here one at a time, and never for long."""
    try:
        import fcntl
    except ImportError:  # Windows
        fcntl = None
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                with contextlib.suppress(OSError):  # a file system that cannot
                    fcntl.flock(handle, fcntl.LOCK_EX)
            # Who was in here before may have removed the file.
            if _is_at(handle, path):
                yield handle
                return
        finally:
            os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


class FolderLock:
    """Takes a folder for this process, until :meth:`release`, or until the process ends.

    A lock whose process died on this machine is taken over. The same process may take a folder
    twice: the lock keeps processes apart, not threads.

    Args:
        folder: it must be there.

    Raises:
        FolderInUse: another process holds it; the message says which.
        FileProblem: a file in the folder is a link, or no regular file.
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: str | Path):
        check_files_inside(folder)
        self._path = Path(folder) / LOCK
        self._mine = Owner.this()
        with writing(self._path), _guarded(self._path) as handle:
            there = _owner(os.read(handle, 1 << 16).decode(errors="replace"))
            if there is not None and there.is_same(self._mine):
                self.release = lambda: None  # who took it first gives it back
                return
            if there is not None and there.may_live:
                raise FolderInUse(_in_use(self._path, there))
            os.ftruncate(handle, 0)
            os.lseek(handle, 0, os.SEEK_SET)
            os.write(handle, json.dumps(dataclasses.asdict(self._mine)).encode())
        # Also when whoever took it forgets to give it back, and at the end of the process.
        self.release = weakref.finalize(self, _release, self._path, self._mine)


def _release(path: Path, mine: Owner) -> None:
    if os.getpid() != mine.pid or not path.exists():
        return  # a fork's copy of the lock, or a folder that is gone
    with contextlib.suppress(OSError), _guarded(path) as handle:
        there = _owner(os.read(handle, 1 << 16).decode(errors="replace"))
        if there is None or there.is_same(mine):
            path.unlink()


def _in_use(path: Path, owner: Owner) -> str:
    here = owner.host == host_name()
    words = f"{path.parent} is in use by process {owner.pid} on {owner.host.split(' ')[0]}"
    words += f" since {owner.since} ({owner.command})"
    if here:
        return f"{words}; wait for it to end, or name another folder"
    return (
        f"{words}, which cannot be seen from here; wait for it to end, name another folder, or "
        f"remove {path} if that process is gone"
    )


@contextlib.contextmanager
def locked(folder: str | Path, is_main: bool = True) -> Iterator[None]:
    """Inside, the folder is this process's alone. It is made if it is not there.

    Args:
        is_main: False does nothing: of the processes of one launch the first holds the folder for
            all, and leaves when the others are done.

    Raises:
        As :class:`FolderLock`.
    """
    if not is_main:
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder)
    try:
        yield
    finally:
        lock.release()
