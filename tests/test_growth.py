"""Growth: exponents are slopes, rows are checked and complete, and the CLI writes both files."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from PIL import Image

from dittfast.cli import main
from dittfast.layout import Layout
from dittfast.measure import growth as growth_module
from dittfast.measure.bench import Workload
from dittfast.measure.check import WrongResult
from dittfast.measure.growth import exponent, growing_layout, growth
from dittfast.methods import LogLinear, Radial


def test_exponent_is_the_slope_in_log_log_scale():
    tokens = [1024, 2048, 8192]
    assert exponent(tokens, [3.0 * n**1.5 for n in tokens]) == pytest.approx(1.5)
    assert exponent(tokens, [7.0] * 3) == pytest.approx(0)
    assert exponent([1024], [1.0]) is None


def test_layouts_grow_in_area_or_in_frames():
    assert growing_layout(48).grid.shape == (1, 6, 8)
    assert growing_layout(96, (4, 6)).grid.shape == (4, 4, 6)
    with pytest.raises(ValueError, match="100 tokens do not fill frames of 4 x 6"):
        growing_layout(100, (4, 6))


def test_rows_and_exponents():
    seen = []
    work = Workload(Layout.image(1, 1), heads=2, head_dim=16)
    result = growth(LogLinear(topk=2), [512, 384, 1024], work, repeats=1, on_row=seen.append)
    assert [row["tokens"] for row in seen] == [384, 512, 1024]
    assert result["rows"] == seen
    plan = LogLinear(topk=2).plan
    layout = growing_layout(512)
    q, k, v, _ = Workload(layout, heads=2, head_dim=16).inputs()
    assert seen[1]["density"] == pytest.approx(plan(layout, q, k, v).density)
    assert result["exponents"]["plan_bytes"] < 1.5
    assert result["exponents"]["pairs"] == pytest.approx(
        exponent([384, 512, 1024], [row["pairs"] for row in seen])
    )
    assert all(row["dense_seconds"]["p50"] > 0 for row in seen)


def test_memory_of_a_call_is_that_of_its_tensors():
    small = [torch.ones(1 << 12) for _ in range(4096)]  # the C library keeps these 64 MB
    del small
    for n in (1 << 22, 1 << 24):
        found = growth_module._call_bytes(lambda n=n: torch.ones(n).sum(), torch.device("cpu"))
        assert found is None or 0.9 < found / (4 * n) < 1.2


def test_a_wrong_result_is_not_timed(monkeypatch):
    from dittfast.measure import growth as module

    def wrong(*args, **kwargs):
        raise WrongResult("attend disagrees")

    monkeypatch.setattr(module, "check_attention", wrong)
    monkeypatch.setattr(module, "interleaved_seconds", lambda *a: pytest.fail("timed"))
    with pytest.raises(WrongResult):
        growth(Radial(), [256], Workload(Layout.image(1, 1), head_dim=16), frame=(8, 8))


def test_command_writes_curves_and_numbers(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    plot, numbers = tmp_path / "growth.png", tmp_path / "growth.json"
    arguments = "bench growth --method log_linear --method radial --set radial.block_size=32"
    arguments += " --heads 1 --head-dim 16 --tokens 512 1024 --repeats 1"
    assert main([*arguments.split(), "--plot", str(plot), "--json", str(numbers)]) == 0
    data = json.loads(numbers.read_text())
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {numbers}"
    assert [x["method"]["name"] for x in data["methods"]] == ["log_linear", "radial"]
    assert data["methods"][1]["rows"][1]["grid"] == [8, 8, 16]
    with Image.open(plot) as picture:
        assert min(picture.size) > 300
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*arguments.split(), "--plot", str(plot)]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
