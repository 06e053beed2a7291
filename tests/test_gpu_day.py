"""``dittfast bench gpu``, rehearsed on a CPU: what is written, and when it stops."""

import json

import pytest
import torch

from dittfast import Layout, methods
from dittfast.cli import gpu_day as command
from dittfast.cli import main
from dittfast.cli.options import shipped
from dittfast.kernels import launch_timing
from dittfast.measure import gpu_day
from dittfast.measure.bench import Workload
from dittfast.pipelines.measure.variants import make_variants, read_variants

ASK = ["bench", "gpu", "--device", "cpu", "--tokens", "256", "--head-dims", "16", "--heads", "1",
       "--repeats", "1", "--no-tests"]  # fmt: skip


def test_rehearsal(tmp_path, capsys):
    """Rows of engines that are there beside dense kernels; those that are not say so."""
    out = tmp_path / "gpu.json"
    assert main([*ASK, "--engines", "native", "cudnn", "--json", str(out)]) == 0
    data = json.loads(out.read_text())
    assert data["task"] == "gpu" and data["skipped"] == 0 and len(data["rows"]) == 2 * 3 * 2
    for row in data["rows"]:
        if row["backend"] == "cudnn":
            assert "it runs on cuda, got tensors on cpu" in row["not_run"]
            continue
        assert row["attend_seconds"]["p50"] > 0 and 0 < row["density"] <= 1
        assert row["dense_kernels"]["flash"]["seconds"]["p50"] > 0
        assert "RuntimeError" in row["dense_kernels"]["cudnn"]["not_run"]
    assert {(r["backward"], r["head_dim"], r["tokens"]) for r in data["rows"]} == {
        (False, 16, 256), (True, 16, 256),
    }  # fmt: skip
    shown = capsys.readouterr().out
    assert "native, radial, 256 tokens, head dim 16, forward" in shown and "not run: " in shown


def test_methods_of_ones_own(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    given = ["--method", "local", "--method", "topk", "--set", "local.window=3"]
    assert main([*ASK, "--engines", "cudnn", *given, "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["method"]["name"] for row in rows] == ["local", "topk"] * 2
    assert rows[0]["method"]["window"] == 3
    assert main([*ASK, "--set", "window=3"]) == 2
    assert "--set window: no --method is given" in capsys.readouterr().err


def test_the_methods_that_are_shipped():
    chosen, _ = read_variants(shipped(command._METHODS))
    assert tuple(x.method.name for x in make_variants(chosen)) == command.METHODS


class Clock:
    """Every look at it takes a second."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


def case(engine, tokens=64):
    return gpu_day.Case(engine, methods.Local(2), Workload(Layout.image(8, tokens // 8), heads=1))


def test_rows_are_not_begun_when_the_time_is_over(monkeypatch):
    """Nor where the longest row of the kind would not fit; and a failure is a row."""
    clock = Clock()
    ran = []

    def bench(method, work, *, backend, most_seconds, **_):
        ran.append((backend, most_seconds))
        clock.now += 20.0 if backend == "long" else 1.0
        if backend == "broken":
            raise RuntimeError("no kernel image")
        return {"row": len(ran)}

    monkeypatch.setattr(gpu_day, "bench_attention", bench)
    todo = [case(name) for name in ("quick", "broken", "long", "quick", "long", "quick")]
    budget = gpu_day.Budget(50.0, clock)
    rows = [row for _, row in gpu_day.measure(todo, budget, 1, {})]
    assert [name for name, _ in ran] == ["quick", "broken", "long", "quick", "quick"]
    assert rows[1]["not_run"] == "RuntimeError: no kernel image" and rows[1]["backend"] == "broken"
    assert rows[4]["not_run"] == "the time was over" and budget.left > 0
    assert all(0 < most < 50 for _, most in ran)
    budget = gpu_day.Budget(0.5, clock)
    assert all("not_run" in row for _, row in gpu_day.measure(todo, budget, 1, {}))


def test_the_file_is_whole_after_every_row(tmp_path, monkeypatch):
    out, sizes = tmp_path / "gpu.json", []

    def bench(method, work, **_):
        sizes.append(len(json.loads(out.read_text())["rows"]))
        if len(sizes) == 4:
            raise KeyboardInterrupt
        raise ValueError("not today")

    monkeypatch.setattr(gpu_day, "bench_attention", bench)
    main([*ASK, "--engines", "native", "--json", str(out)])
    assert sizes == [0, 1, 2, 3] and len(json.loads(out.read_text())["rows"]) == 3


def test_what_the_tests_on_a_gpu_say(monkeypatch):
    """None is here, so they are skipped; a time that is too short ends them."""

    class Done:
        stdout, stderr, returncode = "..\n6 skipped in 1.00s\n", "", 0

    asked = {}
    monkeypatch.setattr(command.subprocess, "run", lambda given, **more: asked.update(more) or Done)
    assert command._gpu_tests(60.0) == {"summary": "6 skipped in 1.00s", "passed": True}
    assert asked["timeout"] == 60.0 and (asked["cwd"] / "tests").is_dir()

    def late(given, **more):
        raise command.subprocess.TimeoutExpired(given, more["timeout"])

    monkeypatch.setattr(command.subprocess, "run", late)
    assert command._gpu_tests(2.0) == {"summary": "stopped after 2 s", "passed": None}


def test_launch_sizes_are_timed_and_sorted():
    """In Triton's interpreter: every size gives the same result, and one that fails is a row."""
    layout = Layout.image(4, 8)
    plan = methods.Radial(block_size=16).plan(layout)
    q, k, v = (torch.randn(1, 1, 32, 16) for _ in range(3))
    times = iter(range(100, 0, -1))
    calls = []

    def seconds_of(function):
        calls.append(function)
        if len(calls) == 2:
            raise RuntimeError("out of shared memory")
        if len(calls) < 4:
            function()
        return float(next(times))

    left = iter([True] * 9 + [False])
    found = launch_timing.timed(q, k, v, plan, seconds_of, lambda: next(left))
    assert [len(found[name]) for name in launch_timing.KERNELS] == [9, 0, 0]
    rows = found["forward"]
    assert [row.get("seconds") for row in rows] == [*range(93, 101), None]
    assert rows[-2]["usual"] and sum(row["usual"] for row in rows) == 1
    assert rows[-1]["not_run"] == "RuntimeError: out of shared memory"


@pytest.mark.parametrize("name", launch_timing.KERNELS)
def test_candidates_fit_a_tile(name):
    usual = launch_timing.launch_config(64, torch.float16, (9, 0))
    usual = getattr(usual, name)
    found = list(launch_timing.candidates(usual))
    assert found[0] == usual and len(set(found)) == len(found) > 20
    assert all(x.rule_tile <= min(x.block_m, x.block_n) or x == usual for x in found)
