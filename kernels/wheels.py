"""What engines in packages of their own lack on this machine: a package, or a newer one."""

from __future__ import annotations

import importlib.metadata
import re


def installed_version(distribution: str) -> str | None:
    """The version of a package as pip knows it; None where there is none. Imports nothing."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def wheel_reasons(install: str, *wanted: tuple[str, str | None]) -> list[str]:
    """Why an engine cannot be used: the first package that is missing or too old.

    Args:
        install: the command that helps.
        wanted: packages, each with the least version or None; "a or b" where one of two will do.
    """
    for names, least in wanted:
        found = [(name, installed_version(name)) for name in names.split(" or ")]
        version = next((version for _, version in found if version is not None), None)
        if version is None:
            return [f"{names} is not installed ({install})"]
        if least is not None and _order(version) < _order(least):
            return [f"{names} is {version}, and {least} is needed ({install})"]
    return []


def _order(version: str) -> tuple:
    """Of two versions the newer has the larger one: 4.0.0b35, 4.0.0b36, 4.0.0rc1, 4.0.0, 4.0.1."""
    release, kind, number = re.match(r"([\d.]*\d)(?:\.?(a|b|rc|dev)(\d+))?", version).groups()
    numbers = [int(n) for n in release.split(".")]
    return (*numbers, *(0,) * (4 - len(numbers))), kind or "z", int(number or 0)
