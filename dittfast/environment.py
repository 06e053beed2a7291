"""What this program runs on: versions and devices, for records and bug reports."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import sys

PACKAGES = ("torch", "triton", "diffusers", "transformers")


def versions() -> dict[str, str | None]:
    """Versions of dittfast, Python and the packages it stands on; None where one is missing."""
    from . import __version__

    known: dict[str, str | None] = {"dittfast": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        loaded = getattr(sys.modules.get(name), "__version__", None)
        if loaded is not None:  # torch's own knows its build, such as 2.14.1+cu130
            known[name] = str(loaded)
            continue
        try:
            known[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            known[name] = None
    return known


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [x.split(":", 1)[1].strip() for x in file if x.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def describe_device(device) -> dict:
    """Type and name of a ``torch.device``, and what its speed depends on."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        at = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": at.name,
            "capability": f"{at.major}.{at.minor}",
            "memory_gib": round(at.total_memory / 2**30, 1),
        }
    if device.type == "cpu":
        return {"type": "cpu", "name": cpu_name(), "threads": torch.get_num_threads()}
    return {"type": device.type, "name": device.type}


def devices() -> list:
    """The ``torch.device`` of the CPU and of every accelerator that can be used here."""
    import torch

    usable = [torch.device("cpu")]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        usable += [torch.device(kind, i) for i in range(torch.accelerator.device_count())]
    return usable


def total_memory(device="cpu") -> int | None:
    """Bytes that a device has in all; None where nobody knows."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu":
        return None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def reset_peak_memory(device) -> bool:
    """Begin a new peak for :func:`peak_memory`; False where the system cannot."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def give_back_memory() -> None:
    """Let the C library give the system what it keeps of freed memory, where it can (glibc)."""
    import ctypes

    with contextlib.suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory(device) -> int | None:
    """Most bytes in use since :func:`reset_peak_memory`: on a CUDA device those of tensors, on a
    CPU all resident bytes of the process; None where nobody knows."""
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if kind != "cpu":
        return None
    try:
        with open("/proc/self/status") as file:
            kibibytes = [int(x.split()[1]) for x in file if x.startswith("VmHWM:")]
    except OSError:
        kibibytes = []
    return kibibytes[0] * 1024 if kibibytes else None
