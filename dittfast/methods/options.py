"""The options of a method, from its dataclass: defaults and types of the fields, words of Args."""

from __future__ import annotations

import dataclasses
import inspect
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """One option of a method.

    Attributes:
        name, default: of the field.
        type: as annotated, in words.
        meaning: what the docstring says, the range of values among it.
    """

    name: str
    default: object
    type: str
    meaning: str


def descriptions(cls: type, section: str = "Args") -> dict[str, str]:
    """What a class's docstring says below ``Args:``, by name.

    Raises:
        ValueError: the class has no docstring with such a section.
    """
    match = re.search(rf"^{section}:\n((?:    .*\n|\n)+)", f"{inspect.getdoc(cls)}\n", re.MULTILINE)
    if match is None:
        raise ValueError(f"{cls.__name__} has no {section!r} in its docstring")
    entries = re.findall(r"^    (\w[\w, ]*): ((?:.+\n(?:     .*\n)*))", match[1], re.MULTILINE)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


def options_of(cls: type) -> list[Option]:
    """The options of a method class, in order.

    Raises:
        ValueError: an option that its docstring does not describe.
    """
    fields = [field for field in dataclasses.fields(cls) if field.init]
    if not fields:
        return []
    words = descriptions(cls)
    missing = [field.name for field in fields if field.name not in words]
    if missing:
        raise ValueError(f"{cls.__name__} does not describe {', '.join(missing)} in its docstring")
    return [
        Option(f.name, f.default, str(f.type).replace(" | ", " or "), words[f.name]) for f in fields
    ]
