"""--adapter: what training wrote is drawn with, compared and evaluated from the command line."""

import json
import shlex

import numpy as np
import pytest
import torch
from distill_run import CALLS, make_config, one_thread  # noqa: F401 (a fixture)

from dittfast.cli import main
from dittfast.cli.distill import drawing_command
from dittfast.distill.artifacts import load_adapter
from dittfast.distill.trainer import Trainer
from dittfast.pictures import read_picture
from dittfast.pipelines.runs import sources
from dittfast.pipelines.runs.run import run

SMALL = shlex.split("--height 64 --width 96 --steps 2 --max-sequence-length 12 --device cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The configuration of a finished run, and its adapter, which changes the picture."""
    folder, threads = tmp_path_factory.mktemp("trained"), torch.get_num_threads()
    torch.set_num_threads(1)
    settings = {"output": str(folder / "run"), "steps": 2, "lr": 1e-2}
    trainer = Trainer(make_config(folder, train=settings))
    trainer.run()
    torch.set_num_threads(threads)
    return trainer.config, trainer.output / "adapter"


def test_it_draws_what_the_adapter_draws(trained, tmp_path, capsys):
    config, adapter = trained
    command = ["generate", "a red cat", "--model", config.model.path, *SMALL]
    command += ["--adapter", str(adapter), "--compare", "--save-all", "-o", str(tmp_path / "a.png")]
    assert main(command) == 0
    pipe = sources.load(sources.find(config.model.path), "cpu", torch.float32)
    call = CALLS["flux"] | {"prompt": "a red cat"}
    dense = run(pipe, call).frames[0]
    load_adapter(pipe, adapter)
    assert np.array_equal(np.asarray(read_picture(tmp_path / "a.dense.png")), dense)
    drawn = np.asarray(read_picture(tmp_path / "a.adapter.png"))
    assert np.array_equal(drawn, run(pipe, call).frames[0]) and not np.array_equal(drawn, dense)
    data = json.loads((tmp_path / "a.json").read_text())
    assert data["adapter"] == str(adapter) and data["attention"]["method"]["window"] == 2


def test_it_is_evaluated_as_one_more_method(trained, tmp_path, capsys):
    config, adapter = trained
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat")
    command = ["evaluate", "fidelity", "--model", config.model.path, *SMALL, "--prompts"]
    command += [str(prompts), "--adapter", f"mine={adapter}", "-o", str(tmp_path / "eval")]
    assert main([*command, "--json", "-"]) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["methods"]
    assert row["label"] == "mine" and row["did_not_run"] is None and 0 < row["density"] < 1
    assert row["pooled"]["psnr_db"]["mean"] > 0 and len(row["adapter"]) == 16


def test_two_adapters_of_one_label_are_refused(trained, tmp_path, capsys):
    config, adapter = trained
    command = ["evaluate", "fidelity", "--model", config.model.path, *SMALL]
    command += ["--adapter", f"mine={adapter}", "--adapter", f"mine={adapter}/."]
    assert main([*command, "-o", str(tmp_path / "eval")]) == 2
    assert "the label 'mine' is used twice" in capsys.readouterr().err
    assert not (tmp_path / "eval").exists()


def test_training_ends_with_the_command_that_draws(trained):
    config, adapter = trained
    words = shlex.split(drawing_command(config, adapter))
    assert words[:2] == ["dittfast", "generate"]
    assert words[words.index("--adapter") + 1] == str(adapter)
    assert words[words.index("--model") + 1] == config.model.path
