"""Lists of prompts: text files, COCO captions, VBench lists."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from dittfast.disk.problems import reading
from dittfast.disk.records import parse_json, read_text


@dataclass(frozen=True)
class Item:
    """One picture to draw: its number, prompt and seed."""

    index: int
    prompt: str
    seed: int


# More is a slip of the finger, and its list would fill the memory.
_MOST_PICTURES = 10_000_000

# Names that lists in use give to the text of an entry, first choice first.
_KEYS = ("prompt", "prompt_en", "caption", "text")


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a file: one per line of a text file, or a JSON list.

    JSON may hold strings, mappings with ``prompt``, ``prompt_en`` (VBench), ``caption`` or
    ``text``, or COCO's mapping with ``annotations``. In text files empty lines and lines that
    begin with ``#`` do not count.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8, not JSON of such a form, or no prompt in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no prompts file at {path}; it holds one prompt per line")
    text = read_text(path)
    if path.suffix.lower() == ".json":
        prompts = _from_json(path, text)
    else:
        lines = (line.strip() for line in text.splitlines())
        prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one per line")
    return prompts


def _from_json(path: Path, text: str) -> list[str]:
    with reading(path, "it is not valid JSON"):
        data = parse_json(text)
    if isinstance(data, dict):
        data = data.get("annotations", data.get("prompts"))
    if not isinstance(data, list):
        raise ValueError(f"{path}: expected a list of prompts, or COCO's 'annotations'")
    prompts = []
    for number, entry in enumerate(data):
        if isinstance(entry, dict):
            entry = next((entry[key] for key in _KEYS if key in entry), None)
        if not isinstance(entry, str) or not entry.strip():
            raise ValueError(
                f"{path}: entry {number} has no text under {', '.join(_KEYS)}: {str(entry)[:80]}"
            )
        prompts.append(" ".join(entry.split()))
    return prompts


def make_items(prompts: list[str], count: int | None = None, seed: int = 0) -> list[Item]:
    """``count`` pictures (default: one per prompt); picture i has seed ``seed + i``.

    With more pictures than prompts the prompts are used again, with new seeds.

    Raises:
        ValueError: no prompts, or a count out of range.
    """
    if not prompts:
        raise ValueError("there are no prompts")
    if count is not None and count < 1:
        raise ValueError(f"the number of pictures must be at least 1, got {count}")
    if count is not None and count > _MOST_PICTURES:
        raise ValueError(
            f"the number of pictures must be at most {_MOST_PICTURES:,}, got {count:,}"
        )
    number = len(prompts) if count is None else count
    drawn = itertools.islice(itertools.cycle(prompts), number)
    return [Item(index, prompt, seed + index) for index, prompt in enumerate(drawn)]
