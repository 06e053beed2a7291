"""The notebooks in ``examples/``: they run from top to bottom, and within their time."""

import ast
import json
import time
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.ipynb"))


def cells(path):
    """The code of each code cell."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


def test_there_is_one_for_pictures_and_one_for_clips():
    assert [path.stem for path in NOTEBOOKS] == ["image", "video"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_cells_are_plain_python(path):
    for code in cells(path):
        ast.parse(code)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_run(path, tmp_path, monkeypatch):
    """In a new namespace; the processor time of two cores in five minutes."""
    monkeypatch.chdir(tmp_path)
    names, start = {"__name__": "__main__"}, time.process_time()
    for number, code in enumerate(cells(path)):
        exec(compile(code, f"{path.name}, code cell {number}", "exec"), names)
    assert time.process_time() - start < 600
