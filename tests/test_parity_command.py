"""``dittfast parity`` and the table it wrote into docs/."""

import json
import re
from pathlib import Path

from dittfast.cli import main
from dittfast.pipelines.families import FAMILIES
from dittfast.pipelines.families.others import OTHERS
from dittfast.pipelines.families.tiny_image import TINY_IMAGE
from dittfast.pipelines.families.tiny_packed import TINY_PACKED
from dittfast.pipelines.families.tiny_video import TINY_VIDEO
from dittfast.pipelines.measure.parity import COLUMNS

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_prints_and_writes_the_matrix(capsys, tmp_path):
    table, numbers = tmp_path / "table.md", tmp_path / "cells.json"
    chosen = ["--family", "wan", "--family", "mochi", "--method", "full", "--method", "radial"]
    files = ["--markdown", str(table), "--json", str(numbers)]
    assert main(["parity", *chosen, *files]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^model +full +radial$", shown, re.MULTILINE)
    assert re.search(r"^wan +1\.00 +0\.57$", shown, re.MULTILINE)
    assert "4 of 4 cells are good" in shown
    assert "| wan | `WanTransformer3DModel` | 1.00 | 0.57 |" in table.read_text()
    cells = json.loads(numbers.read_text())["cells"]
    assert [(c["family"], c["method"]) for c in cells] == [
        ("wan", "full"), ("wan", "radial"), ("mochi", "full"), ("mochi", "radial"),
    ]  # fmt: skip


def test_a_bad_cell_fails_the_command(capsys, monkeypatch):
    monkeypatch.setattr("dittfast.pipelines.measure.parity.distance", lambda a, b: 1.0)
    monkeypatch.setattr("dittfast.pipelines.measure.parity.eager_noise", lambda *_: 1e-7)
    assert main(["parity", "--family", "wan", "--method", "radial"]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"^wan +FAILED$", shown, re.MULTILINE)
    assert "FAILED wan under radial: differs by 1.0e+00" in shown
    assert "0 of 1 cells are good" in shown
    assert main(["parity", "--family", "wann"]) == 2
    assert "Did you mean" in capsys.readouterr().err


def test_the_table_in_docs_is_complete_and_good():
    text = (DOCS / "families.md").read_text()
    rows = re.findall(r"^\| (\S+) \| `(\w+)` \| (.*) \|$", text, re.MULTILINE)
    every = TINY_IMAGE | TINY_VIDEO | TINY_PACKED  # also what the installed diffusers lacks
    assert [(name, cls) for name, cls, _ in rows] == [(n, t.name) for n, t in every.items()]
    for _, _, cells in rows:
        assert len(cells.split(" | ")) == len(COLUMNS)
        assert "FAILED" not in cells
    assert all(f"| {name} |" in text or f" {name} |" in text for name in COLUMNS)


def test_every_class_of_diffusers_is_in_docs():
    text = (DOCS / "families.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\w -]+) \| .+ \|$", text, re.MULTILINE))
    assert rows == dict.fromkeys(FAMILIES, "read") | {n: x.kind for n, x in OTHERS.items()}
