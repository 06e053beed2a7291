"""Which process wrote a file, and whether it still runs."""

from __future__ import annotations

import contextlib
import os
import socket
from functools import cache
from pathlib import Path


@cache
def host_name() -> str:
    """This machine, with its space of process ids where the system has several (containers)."""
    space = ""
    with contextlib.suppress(OSError):
        space = " " + os.readlink("/proc/self/ns/pid")
    return socket.gethostname() + space


def start_of(pid: int) -> str | None:
    """When a process of this machine began, in the machine's own words; None where there is none.

    Where the system does not tell, the words are empty for every process that runs.
    """
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            # The name of the program stands in brackets and may hold anything.
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            return None
        return None if fields[0] in "ZX" else f"{boot} {fields[19]}"
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except OSError:
        pass  # it is somebody else's
    return ""
