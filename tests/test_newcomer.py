"""CONTRIBUTING.md names the files that a new method, family, backend or objective touches.

Those that are here are the witnesses: no other file of the code mentions them.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import cache

import pytest
from test_architecture import ROOT, tracked_files

from dittfast.attention import BACKENDS
from dittfast.methods import METHODS
from dittfast.pipelines.families import FAMILIES
from dittfast.pipelines.headhunter.objectives import OBJECTIVES

CODE = ("dittfast", "kernels", "pipelines", "distill")


def named_files(title: str) -> set[str]:
    """The files below ``Files:`` in a section of CONTRIBUTING.md; NAME stands for any name."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]
    paragraph = re.search(r"^Files: (.*?)(?:\n\n|\Z)", section, re.MULTILINE | re.DOTALL)[1]
    return set(re.findall(r"`([\w/]+\.py)`", paragraph))


def words_of(node: ast.AST) -> list[str]:
    """What a piece of code calls by name, or spells as a whole string."""
    if isinstance(node, ast.alias):
        return node.name.split(".")
    fields = {ast.Name: "id", ast.Attribute: "attr", ast.ClassDef: "name"}
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").split(".")
    return [getattr(node, fields[type(node)])] if type(node) in fields else []


@cache
def mentions() -> dict[str, set[str]]:
    """Word -> files of the code that mention it."""
    found = defaultdict(set)
    for path in tracked_files(".py"):
        if path.split("/")[0] in CODE:
            for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
                for word in words_of(node):
                    found[word].add(path)
    return found


def is_named(path: str, allowed: set[str]) -> bool:
    patterns = [name.replace("NAME", r"\w+") for name in allowed]
    return any(re.fullmatch(pattern, path) for pattern in patterns)


# The models that a benchmark builds, and the method whose published checkpoints are read.
BEYOND = {
    "pipelines/measure/overhead.py": {"FluxTransformer2DModel", "WanTransformer3DModel"},
    "distill/artifacts.py": {"vsa"},
    "dittfast/cli/gpu_day.py": {"radial", "topk"},  # what is timed unless told
}
# Names that are words of other things as well, and methods that parts of other things are made of.
WORDS, PARTS = {"topk"}, {"local", "linear", "dense"}
WITNESSES = {
    "Adding a method": [
        [cls.__name__] if name in WORDS else [name, cls.__name__]
        for name, cls in METHODS.items()
        if name not in PARTS
    ],
    "Adding a model family": [[name] for name in FAMILIES],
    "Adding a kernel": [["reference_backend"]],
    "Adding an objective": [[cls.__name__] for cls in OBJECTIVES.values()],
}


@pytest.mark.parametrize("title", WITNESSES)
def test_newcomers_touch_the_named_files_and_no_other(title):
    allowed, seen = named_files(title), set()
    for words in WITNESSES[title]:
        touched = set().union(*(mentions()[word] for word in words))
        assert touched, words
        touched -= {f for f, names in BEYOND.items() if names & set(words)}
        other = {path for path in touched if not is_named(path, allowed)}
        assert not other, f"{words[0]} is mentioned in {sorted(other)}, not named in {title!r}"
        seen |= touched
    # A file that no witness needs is named in vain; readers are functions with names of their own.
    idle = {n for n in allowed if "NAME" not in n and n not in seen}
    assert not idle - {f"pipelines/families/{name}.py" for name in ("image", "video", "packed")}
    assert all((ROOT / name).exists() for name in allowed if "NAME" not in name)


def test_models_are_known_in_their_folder_alone():
    """Neither a transformer, nor its attention or its pipelines are named anywhere else."""
    import diffusers

    classes = re.compile(r"\w+Transformer\dDModel|(?!Diffusion|Modular)\w+Pipeline|\w+Attention")
    public = set(dir(diffusers))  # named, and not imported
    known = {word for word in mentions() if classes.fullmatch(word) and word in public}
    known |= {family.rotary[0] for family in FAMILIES.values() if family.rotary}
    newer = {"PRXPixelPipeline"} - public
    assert known >= {"FluxTransformer2DModel", "PRXPixelPipeline", "WanAttention"} - newer
    for word in known:
        for path in mentions()[word]:
            ours = path.startswith("pipelines/families/")
            assert ours or word in BEYOND.get(path, ()), f"{path} knows {word}"


def test_the_witnesses_are_there():
    assert "reference" in BACKENDS and len(WITNESSES["Adding a method"]) >= 3
    for name in set(words for entry in WITNESSES["Adding a model family"] for words in entry):
        assert mentions()[name] & {
            "pipelines/families/tiny_image.py",
            "pipelines/families/tiny_video.py",
            "pipelines/families/tiny_packed.py",
        }, f"{name} has no tiny model"
