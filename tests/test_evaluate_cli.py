"""``dittfast evaluate`` and ``dittfast report`` from the command line, on a tiny pipeline."""

import json
import os
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from interpreter import PYTHON
from PIL import Image
from tiny import flux_pipeline

from dittfast.cli import main
from dittfast.disk.records import read_record

SMALL = [
    *("--height", "64", "--width", "96", "--steps", "2", "--max-sequence-length", "12"),
    *("--device", "cpu", "--json", "-"),
]
SPARSE = [
    *("-m", "near=local", "-m", "far=local", "--set", "tile=[1,4,4]", "--set", "near.window=3"),
    *("--set", "far.window=5", "--set", "min_tokens=0"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny-flux"
    flux_pipeline().save_pretrained(path)
    return ["--model", str(path)]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red cat\na blue dog\n")
    return ["--prompts", str(path)]


def last_json(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_fidelity_then_report(model, prompts, tmp_path, capsys):
    folder = tmp_path / "eval"
    command = ["evaluate", "fidelity", *model, *prompts, *SPARSE, *SMALL, "-o", str(folder)]
    command += ["--pair", "near:far", "--save", str(tmp_path / "table")]
    assert main(command) == 0
    data = last_json(capsys)
    assert [m["method"]["window"] for m in data["methods"]] == [3, 5]
    for path in (folder / "fidelity.json", tmp_path / "table.json"):
        assert read_record(path).data == data
    assert "| near | " in (tmp_path / "table.md").read_text()
    near, far = (m["density"] for m in data["methods"])
    assert near < far and data["pairs"][0]["a"] == "near"
    (layer, *_) = data["structure"]
    assert sum(layer["space"][0]) == pytest.approx(1) == sum(layer["space_uniform"])
    assert Image.open(folder / "near" / "mask.png").width > 300
    assert main(command) == 0
    assert last_json(capsys)["drawn_now"] == 0
    assert main(["report", str(folder), "--no-plots"]) == 0
    assert "near: block mask" in (folder / "report.html").read_text()


def test_latency_is_kept(model, tmp_path, capsys):
    command = ["evaluate", "latency", *model, *SMALL, "-m", "local", "--set", "window=3"]
    command += ["--set", "min_tokens=0", "--prompt", "a red cat", "--pairs", "1"]
    assert main([*command, "-o", str(tmp_path)]) == 0
    (row,) = last_json(capsys)["rows"]
    assert row["end_to_end"]["p50"] > 0 and row["parity"]["layers"] == 4
    assert "ceiling" in (tmp_path / "latency.md").read_text()
    # What was timed is not timed again; a second method is, and one with other options.
    assert main([*command, "-m", "far=local", "--set", "far.window=5", "-o", str(tmp_path)]) == 0
    first, second = last_json(capsys)["rows"]
    assert first == row and second["method"]["window"] == 5
    assert main([*command, "--set", "local.window=4", "-o", str(tmp_path)]) == 0
    (other,) = last_json(capsys)["rows"]
    assert other["method"]["window"] == 4 and other["runs"] != row["runs"]
    assert json.loads((tmp_path / "latency.json").read_text())["rows"] == [other]
    (tmp_path / "latency.json").write_text("[]")
    assert main([*command, "-o", str(tmp_path)]) == 2
    assert "latency.json: it is not what is read here" in capsys.readouterr().err


def test_a_method_that_did_not_run_has_no_numbers(model, prompts, tmp_path, capsys):
    """All steps dense, in every output; and the same method where it runs."""
    folder = ["-o", str(tmp_path)]
    method = ["-m", "idle=local", "-m", "runs=local", "--set", "tile=[1,4,4]"]
    method += ["--set", "window=3", "--set", "min_tokens=0", "--set", "idle.dense_first_steps=2"]
    fidelity = ["evaluate", "fidelity", *model, *prompts, *SMALL, *method, *folder]
    assert main(fidelity) == 0
    idle, runs = last_json(capsys)["methods"]
    why = "0 of 2 denoising steps sparse: all belong to dense steps (dense_first_steps=2"
    assert idle["did_not_run"].startswith(why) and runs["did_not_run"] is None
    assert idle["dense_over_method_seconds"] is None and runs["dense_over_method_seconds"]
    assert idle["pooled"]["identical"] == 2
    timed = ["evaluate", "latency", *model, *SMALL, *method, *folder, "--pairs", "1"]
    assert main([*timed, "--prompt", "a red cat"]) == 0
    idle, runs = last_json(capsys)["rows"]
    assert idle["did_not_run"].startswith(why) and runs["did_not_run"] is None
    assert "end_to_end" not in idle and "seconds" not in idle and runs["end_to_end"]["p50"] > 0
    for name in ("fidelity.md", "latency.md"):
        (row,) = [x for x in (tmp_path / name).read_text().splitlines() if x[:8] == "| idle |"]
        assert "did not run" in row
    assert main(["report", str(tmp_path), "--no-plots"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert '<p role="alert"><strong>idle did not run: 0 of 2 denoising steps' in page
    assert page.count(">did not run<") == 4, "in the overview twice, and in both tables"
    # Other steps: what was timed does not stand beside the pictures.
    longer = ["3" if old == "--steps" else word for old, word in zip(["", *timed], timed)]
    assert main([*longer, "--prompt", "a red cat"]) == 0
    capsys.readouterr()
    assert main(["report", str(tmp_path), "--no-plots"]) == 0
    overview, *_ = (tmp_path / "report.md").read_text().split("\n## ")[1:]
    assert "other settings" in overview
    assert "speed of runs was measured with call.num_inference_steps: 2 -> 3" in unescape(overview)


def test_a_wrong_method_gets_no_numbers(model, capsys, monkeypatch):
    from dittfast.measure import check

    right = check.attend
    monkeypatch.setattr(check, "attend", lambda *a, **k: right(*a, **k) + 1)
    command = ["evaluate", "latency", *model, *SMALL, "-m", "local", "--set", "min_tokens=0"]
    assert main([*command, "--prompt", "a red cat"]) == 1
    out = capsys.readouterr().err  # standard output is left to the JSON
    assert "\nFAILED: local, layer" in out and "end to end" not in out


def test_draw_for_fid_goes_on(model, prompts, tmp_path, capsys):
    command = ["evaluate", "draw", *model, *prompts, *SMALL, "-m", "local", "--set", "window=3"]
    command += ["--set", "min_tokens=0", "-o", str(tmp_path / "many")]
    idle = ["-m", "idle=local", "--set", "idle.dense_last_steps=2"]
    assert main([*command, *idle, "-n", "1"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["drawn_here"] == 3
    assert "idle DID NOT RUN, dense attention drew these: 0 of 2" in shown.err
    assert "local DID NOT" not in shown
    assert main([*command, "-n", "3"]) == 0
    data = last_json(capsys)
    assert data["drawn_here"] == 4 and data["processes"] == 1
    for label in ("dense", "local"):
        pictures = sorted((tmp_path / "many" / label / "images").iterdir())
        assert len(pictures) == 3
        # Picture 2 has prompt 0 again with another seed.
        first, _, third = (np.asarray(Image.open(p)) for p in pictures)
        assert not np.array_equal(first, third)
    assert not list((tmp_path / "many").glob("*/latents/*"))


@pytest.mark.slow
def test_two_processes_share_the_drawing(model, prompts, tmp_path):
    """Gloo, as ``accelerate launch`` starts them: each picture once, and the same pictures."""
    root = str(Path(__file__).resolve().parents[1])
    command = ["-m", "dittfast", "evaluate", "draw", *model, *prompts, *SMALL, "-m", "local"]
    command += ["--set", "window=3", "--set", "min_tokens=0", "-n", "5"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, start in (("one", []), ("two", launch)):
        done = subprocess.run(
            [*PYTHON, *start, *command, "-o", str(tmp_path / name)],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": root, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
            timeout=1800,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        last = json.loads(done.stdout.splitlines()[-1])
        assert last["processes"] == 1 + bool(start) and last["pictures"] == 5
    assert done.stdout.count("5 pictures in") == 2, "only one process reports"
    whole, shared = (
        {
            str(p.relative_to(tmp_path / n)): p.read_bytes()
            for p in (tmp_path / n).glob("*/images/*")
        }
        for n in ("one", "two")
    )
    assert len(whole) == 10 and shared == whole


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["fidelity", "-o", "x", "--prompts", "p.txt"], "there is no method to compare"),
        (
            ["fidelity", "-m", "local", "-o", "x", "--prompts", "no.txt"],
            "no prompts file at no.txt",
        ),
        (["fidelity", "-m", "local", "-m", "local=radial", "-o", "x"], "'local' is used twice"),
        (
            ["fidelity", "-m", "local", "-o", "x", "--pair", "local"],
            "--pair takes two different labels",
        ),
        (["fidelity", "-m", "local", "-o", "x", "--set", "b.window=3"], "labelled 'b'"),
        (["fidelity", "-m", "locl", "-o", "x"], "Did you mean 'local'"),
        (["fidelity", "--config", "no.yaml", "-o", "x"], "no config file at no.yaml"),
        (["fidelity", "-m", "local", "-o", "file"], "file is a file"),
        (["fid", "x", "--dataset", "coco"], "NAME:SPLIT:RESOLUTION"),
        (["fid", "x", "--against", "y", "--features", "none"], "no feature network in none"),
        (["fidelity", "-m", "local", "-o", "x", "--backend", "fast"], "unknown backend 'fast'"),
    ],
)
def test_bad_input_is_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a cat")
    (tmp_path / "file").write_text("")
    assert main(["evaluate", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_shipped_evaluations_can_be_read():
    from dittfast.cli.options import shipped
    from dittfast.methods import METHODS
    from dittfast.pipelines.measure.variants import check_labels, make_variants, read_variants
    from dittfast.pipelines.runs.prompts import read_prompts

    path = shipped("evaluations/sample-flux")
    for name, left_out in (
        ("sample-flux", {"radial", "dense"}),
        ("sample-flux-density", {"radial", "dense"}),
        ("sample-video-density", {"dense"}),
    ):
        chosen, pairs = read_variants(shipped(f"evaluations/{name}"))
        check_labels(list(chosen), pairs)
        assert {v.method.name for v in make_variants(chosen)} == set(METHODS) - left_out, name
    chosen, _ = read_variants(shipped("evaluations/sample-video-long"))
    assert [v.method.name for v in make_variants(chosen)] == ["radial", "radial"]
    prompts = read_prompts(path.replace(".yaml", ".txt"))
    assert len(set(prompts)) == 16


def items(settings, count=None):
    import argparse

    from dittfast.cli.evaluate import _items
    from dittfast.pipelines.runs.sources import Source

    args = argparse.Namespace(prompts=None, num_prompts=count, seed=3)
    return _items(args, Source("folder", "mine", "mine", settings))


def test_a_samples_prompts_keep_their_numbers_whatever_the_count():
    known = {
        "prompts": ["a cat on white"],
        "labels": ["cat", "owl"],
        "backgrounds": ["red", "blue"],
    }
    assert [i.prompt for i in items(known)] == ["a cat on white"]
    many = items(known, 7)
    assert [i.prompt for i in many] == [
        "a cat on white",
        "a 3d emoji of a cat, red background",
        "a 3d emoji of an owl, blue background",
        "a 3d emoji of a cat, blue background",
        "a 3d emoji of an owl, red background",
        "a cat on white",
        "a 3d emoji of a cat, red background",
    ]
    assert [i.seed for i in many] == list(range(3, 10))
    assert items(known, 3) == many[:3]
    with pytest.raises(ValueError, match=r"mine has no prompts of its own; add --prompts FILE"):
        items({})


def test_a_video_samples_prompts_move():
    colours, motions = ["red", "blue", "pink"], ["grows", "spins"]
    known = {"prompts": ["a cat grows on a red background"], "labels": ["cat", "owl"]}
    known |= {"backgrounds": colours, "motions": motions}
    prompts = [i.prompt for i in items(known, 12)]
    assert len(set(prompts)) == 12 == 2 * len(colours) * len(motions)
    assert prompts[1] == "an owl spins on a blue background"
