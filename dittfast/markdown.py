"""Text and tables in Markdown, whatever the text holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape


def as_text(text: str, begins: bool = False) -> str:
    """Text that Markdown shows as it is: no HTML, no link, no picture, no emphasis; in one line.

    Args:
        begins: whether it stands at the beginning of a line or an entry, where ``#`` and ``1.``
            mean something.
    """
    line = escape(" ".join(str(text).split()), quote=False)
    line = re.sub(r"([\\`*~|]|\](?=[(\[:]))", r"\\\1", line)
    # Within a word an underscore is one.
    line = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", line)
    return re.sub(r"^(\d*)([#+=.)-])", r"\1\\\2", line) if begins else line


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of the given cells; pipes and line breaks in them are escaped.

    Raises:
        ValueError: a row of another length than the head.
    """
    lines = [list(head), ["---"] * len(head), *([str(c) for c in row] for row in rows)]
    for line in lines:
        if len(line) != len(head):
            raise ValueError(f"a row has {len(line)} cells, the head {len(head)}: {line}")
    clean = lambda cell: " ".join(cell.replace("|", "\\|").split())  # noqa: E731
    return "\n".join("| " + " | ".join(map(clean, line)) + " |" for line in lines) + "\n"
