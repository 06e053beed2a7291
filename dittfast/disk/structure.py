"""Whether plain data from a file has the form that its reader relies on."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping

_WORDS = {
    str: "text",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    dict: "a mapping",
    list: "a list",
    type(None): "null",
}


def check_structure(value: object, wanted: object, where: str = "it") -> None:
    """Compare data with the form wanted.

    Args:
        wanted: a type (``float`` takes integers, too; ``object`` takes anything); ``None``; a tuple
            of alternatives; ``[form]``, a list of such entries; or a mapping of names to forms,
            where ``"name?"`` may be missing and ``"*"`` stands for all names not given.
        where: what errors call the value.

    Raises:
        ValueError: another form, with the place where it differs.
    """
    if isinstance(wanted, tuple):
        _alternative(value, wanted, where)
    elif isinstance(wanted, Mapping):
        _mapping(value, wanted, where)
    elif isinstance(wanted, list):
        if not isinstance(value, list):
            raise _wrong(value, list, where)
        for index, entry in enumerate(value):
            check_structure(entry, wanted[0], f"{where}[{index}]")
    elif wanted is None:
        if value is not None:
            raise _wrong(value, type(None), where)
    elif not _is(value, wanted):
        raise _wrong(value, wanted, where)


def _is(value: object, kind: type) -> bool:
    if kind is object:
        return True
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, kind)


def _alternative(value: object, wanted: tuple, where: str) -> None:
    # The error of the last alternative of the value's own kind says most.
    problem = None
    for choice in wanted:
        try:
            return check_structure(value, choice, where)
        except ValueError as error:
            kind = type(choice) if isinstance(choice, (list, Mapping)) else choice
            if problem is None or (isinstance(kind, type) and isinstance(value, kind)):
                problem = error
    raise problem


def _mapping(value: object, wanted: Mapping, where: str) -> None:
    if not isinstance(value, dict):
        raise _wrong(value, dict, where)
    names = {name.rstrip("?"): form for name, form in wanted.items() if name != "*"}
    for name in wanted:
        if name != "*" and not name.endswith("?") and name not in value:
            raise ValueError(f"{where} has no {name!r}")
    for name, entry in value.items():
        if name not in names and "*" not in wanted:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did it say {near[0]!r}?" if near else ""
            raise ValueError(f"{where} has {name[:40]!r}, which means nothing there{hint}")
        place = name if where == "it" else f"{where}.{name}"
        check_structure(entry, names.get(name, wanted.get("*", object)), place)


def _wrong(value: object, kind: type, where: str) -> ValueError:
    return ValueError(f"{where} must be {_WORDS.get(kind, kind.__name__)}, got {_short(value)}")


def _short(value: object) -> str:
    if isinstance(value, (dict, list)):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
