"""Whether a tag is the version of the package, and CHANGELOG.md has a dated section for it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def problems(tag: str, root: Path = ROOT) -> list[str]:
    """What speaks against releasing ``tag``, a sentence each."""
    text = (root / "dittfast" / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]
    sentences = []
    if tag != f"v{version}":
        sentences.append(f"the tag is {tag}, and dittfast/__init__.py says {version}")
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## {re.escape(version)}, \d{{4}}-\d\d-\d\d$", changes, re.MULTILINE):
        sentences.append(f"CHANGELOG.md has no section '## {version}, YYYY-MM-DD'")
    return sentences


if __name__ == "__main__":
    sys.exit("\n".join(problems(sys.argv[1])) or 0)
