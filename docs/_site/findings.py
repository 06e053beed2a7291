"""The findings page: what each findings/*.sh says in its first comment block."""

from __future__ import annotations

from html import escape
from pathlib import Path

INTRODUCTION = """\
# Findings

Surprises about other people's software that were met on the way. Each is a script that shows it
again: it stands alone, prints what it sees, and is not part of the tests. What is said here was
seen with the versions that each names.
"""


def header(path: Path) -> tuple[str, list[str]]:
    """Title and paragraphs of a script's first comment block.

    Raises:
        ValueError: there is none.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    if lines and lines[0].startswith("#!"):
        lines = lines[1:]
    comment = []
    for line in lines:
        if not line.startswith("#"):
            if comment:
                break
            continue
        comment.append(line.lstrip("#").strip())
    paragraphs = [" ".join(p.split("\n")) for p in "\n".join(comment[1:]).split("\n\n")]
    paragraphs = [p.strip() for p in paragraphs if p.strip()]
    if not comment or not comment[0] or not paragraphs:
        raise ValueError(
            f"{path} must begin with a comment block: a title, then versions and what is seen"
        )
    return comment[0].rstrip("."), paragraphs


def findings_page(folder: Path) -> str:
    """The page as Markdown."""
    parts = [INTRODUCTION]
    for path in sorted(folder.glob("*.sh")):
        title, paragraphs = header(path)
        link = f"[{path.name}](files/findings/{path.name})"
        words = "\n\n".join(escape(p, quote=False) for p in paragraphs)
        parts.append(f"## {escape(title, quote=False)}\n\n{words}\n\nShown by {link}.\n")
    if len(parts) == 1:
        parts.append("None is written down yet.\n")
    return "\n".join(parts)
