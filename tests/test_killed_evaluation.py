"""``dittfast evaluate`` killed by SIGKILL wherever it writes, and started again."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from interpreter import PYTHON
from tiny import flux_pipeline

from dittfast import files
from dittfast.disk.processes import host_name
from dittfast.measure.fid import check_pictures
from dittfast.pipelines.measure.drawings import Drawings
from dittfast.pipelines.runs.prompts import Item
from dittfast.pipelines.runs.run import Run, Timing

ROOT = Path(__file__).resolve().parents[1]

# Forks a child per run: the libraries are imported once, and one thread makes forking safe.
CHILDREN = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
torch.set_num_interop_threads(1)
import dittfast.pipelines.measure.fidelity, dittfast.pipelines.measure.variants
import dittfast.measure.tables, accelerate
import diffusers.pipelines.flux.pipeline_flux
from dittfast import break_even, files
from dittfast.cli import main
from dittfast.pipelines.runs import sources
break_even.MEASURED = break_even.ESTIMATED = {}

arguments, output, every, *tasks = json.loads(sys.argv[1]), *sys.argv[2:]
every = int(every)
pipe = sources.load(sources.find(arguments[arguments.index("--model") + 1]), torch.device("cpu"))
sources.load = lambda source, device, dtype: pipe


def run(task, name, kill_at=None):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    count = [0]

    def watched(function, cut):
        def call(*given):
            count[0] += 1
            if count[0] == kill_at:
                if cut:  # half of the file is on the disk
                    os.ftruncate(given[0], os.fstat(given[0]).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*given)
        return call

    if kill_at is not None:
        files.os.fsync = watched(os.fsync, True)
        files.os.replace = watched(os.replace, False)
    os._exit(main(["evaluate", task, *arguments, "-o", f"{output}/{task}/{name}"]))


for task in tasks:
    os.mkdir(f"{output}/{task}")
    assert run(task, "whole") == 0
    kills = 0
    while True:
        # `every` writes are completed before the next kill, so that each run gets further; with 0
        # each point is hit once, and one more run goes on from there.
        name, at = f"killed-{kills}", kills + 1
        if every:
            name, at = "killed", 2 * every + 1 + kills % 2
        status = run(task, name, at)
        if not status:
            break
        assert status == signal.SIGKILL, status
        assert every or run(task, name) == 0, name
        kills += 1
        assert kills < 200
    print(task, kills)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny-flux"
    flux_pipeline().save_pretrained(path)
    return str(path)


def kill(model, tmp_path, every, tasks) -> dict[str, int]:
    """Run each task once whole and once in pieces; how often each was killed."""
    (tmp_path / "prompts.txt").write_text("a red cat\na blue dog\n")
    arguments = [
        *("--model", model, "--prompts", str(tmp_path / "prompts.txt"), "-n", "2"),
        *("-m", "local", "--set", "window=3", "--set", "tile=[1,4,4]", "--set", "min_tokens=0"),
        *("--height", "64", "--width", "96", "--steps", "2", "--max-sequence-length", "12"),
        *("--device", "cpu"),
    ]
    done = subprocess.run(
        [
            *(*PYTHON, "-c", CHILDREN),
            *(json.dumps(arguments), str(tmp_path), str(every), *tasks),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    return {x[0]: int(x[1]) for x in lines if len(x) == 2 and x[0] in tasks}


def pictures(folder):
    files = sorted(p for p in folder.glob("*/images/*") if not p.name.startswith("."))
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def assert_same_pictures(tmp_path, name):
    whole, killed = (pictures(tmp_path / n) for n in ("whole", name))
    assert len(whole) == 4 and killed == whole
    for label in ("dense", "local"):
        images = tmp_path / name / label / "images"
        found = check_pictures(images)
        assert len(found.files) == 2 and found.sizes == {(96, 64)}
        assert not list((tmp_path / name / label).glob("*/.0*")), "leftovers of killed writes"


def assert_same_numbers(tmp_path, name):
    whole, killed = (
        json.loads((tmp_path / n / "fidelity.json").read_text()) for n in ("whole", name)
    )
    for data in (whole, killed):
        del data["drawn_now"], data["sha256"]
        for row in data["methods"]:
            del row["dense_over_method_seconds"]
    assert killed == whole


@pytest.mark.parametrize(
    ("every", "tasks"),
    [
        # draw writes its files by the same functions as fidelity, and fewer of them.
        pytest.param(5, ["fidelity"], id="5", marks=pytest.mark.slow),
        pytest.param(5, ["draw"], id="5-draw", marks=pytest.mark.slow),
        pytest.param(0, ["fidelity", "draw"], id="0", marks=pytest.mark.slow),
    ],
)
def test_killed_runs_go_on_to_the_same_pictures_and_numbers(model, tmp_path, every, tasks):
    """Two prompts, two arms: one run killed again and again after ``every`` writes; or, with 0, one
    for each file, which is cut in half or not put in place."""
    kills = kill(model, tmp_path, every, tasks)
    writes = {"fidelity": 16, "draw": 8}
    for task in tasks:
        assert kills[task] >= (writes[task] // every if every else 2 * writes[task])
        names = [p.name for p in (tmp_path / task).glob("killed*")]
        assert len(names) == (1 if every else kills[task] + 1)
        for name in names:
            assert_same_pictures(tmp_path / task, name)
            if task == "fidelity":
                assert_same_numbers(tmp_path / task, name)


def test_what_a_killed_write_left_goes_when_its_picture_is_drawn_again(tmp_path):
    import numpy as np

    drawings = Drawings(tmp_path, {})
    # Of a process that is gone: its number is larger than any.
    token = f"{files._short(host_name())}-9999999-000000-00000000"
    leftovers = [
        drawings.images / f".00007.{token}.png",
        tmp_path / "records" / f".00007.{token}.json",
    ]
    other = drawings.images / f".00008.{token}.png"
    for path in (*leftovers, other):
        path.write_bytes(b"half")
    run = Run(np.zeros((1, 8, 8, 3), np.uint8), Timing(0, (), 0, 0))
    drawings.save(Item(7, "a cat", 7), run, {})
    assert not any(path.exists() for path in leftovers)
    assert other.exists(), "it goes when its own picture is drawn again"
    found = check_pictures(drawings.images)
    assert len(found.files) == 1 and found.sizes == {(8, 8)}
