"""Runs and sets that are damaged, changed or shared: named, gone back from, refused, made anew."""

import dataclasses
import json
import logging
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from distill_run import fresh_accelerate, make_config, one_thread, write_config  # noqa: F401
from PIL import Image
from safetensors.torch import load_file, save_file

from dittfast.disk.locks import LOCK, FolderInUse, Owner
from dittfast.disk.problems import FileProblem
from dittfast.disk.processes import host_name, start_of
from dittfast.distill.adapter_files import read_weights
from dittfast.distill.config import load_config
from dittfast.distill.loader import Dataset
from dittfast.distill.prepare import prepare
from dittfast.distill.trainer import Trainer, train
from dittfast.pipelines.runs.sources import find, load

LORA = {"trainable": "lora", "rank": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trust")


@pytest.fixture(scope="module")
def finished(folder):
    """A run of three steps with a checkpoint of each, and averages."""
    settings = {"output": str(folder / "run"), "steps": 3, "checkpoint_every": 1, "ema": 0.5}
    config = make_config(folder, student=LORA, train=settings | {"keep": 3})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(config)
    torch.set_num_threads(threads)
    return config


@pytest.fixture
def copy(finished, tmp_path):
    """The run's folder again, to be damaged, and its configuration."""
    shutil.copytree(finished.train.output, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    moved = dataclasses.replace(finished.train, output=str(tmp_path / "run"))
    return dataclasses.replace(finished, train=moved)


def changed(config, section, **values):
    part = dataclasses.replace(getattr(config, section), **values)
    return dataclasses.replace(config, **{section: part})


def checkpoint(config, step):
    return Path(config.train.output) / "checkpoints" / f"step-{step:08d}"


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def same_adapter(a, b):
    a, b = (read_weights(Path(c.train.output) / "adapter") for c in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


FILES = (
    "trainable.safetensors",
    "average.safetensors",
    "optimizer.pt",
    "rng-00000.pt",
    "progress.json",
)


@pytest.mark.parametrize("name", FILES[::2])
def test_a_damaged_newest_checkpoint_is_named_and_gone_back_from(copy, finished, name, caplog):
    flip(checkpoint(copy, 3) / name)
    with pytest.raises(FileProblem, match=f"step-00000003.{name}"):
        Trainer(copy, str(checkpoint(copy, 3)))
    with caplog.at_level(logging.WARNING):
        train(copy, "latest")
    assert f"step-00000003/{name}" in caplog.text and "going back to step-00000002" in caplog.text
    assert same_adapter(copy, finished)


def test_where_no_checkpoint_is_whole_the_run_does_not_start(copy):
    for step, name in zip((1, 2, 3), FILES):
        (checkpoint(copy, step) / name).unlink()
    with pytest.raises(FileProblem, match=r"step-00000001/trainable.safetensors: it is missing"):
        Trainer(copy, "latest")


def test_averages_are_looked_at_like_weights(copy):
    """In a checkpoint without checksums, as earlier versions wrote them."""
    for step in (1, 2):
        shutil.rmtree(checkpoint(copy, step))
    path = checkpoint(copy, 3)
    progress = json.loads((path / "progress.json").read_text())
    del progress["sha256"]
    (path / "progress.json").write_text(json.dumps(progress))
    Trainer(copy, "latest")
    averages = load_file(path / "average.safetensors")
    name = next(iter(averages))
    averages[name].view(-1)[0] = torch.nan
    save_file(averages, path / "average.safetensors")
    with pytest.raises(FileProblem, match=r"average.safetensors: .* not finite"):
        Trainer(copy, "latest")


def test_another_training_is_refused_and_changes_are_said(copy, caplog):
    cases = {
        r"student.rank: 2 -> 8": changed(copy, "student", rank=8),
        r"student.method: 'local' -> 'radial'.*student.start": changed(
            copy, "student", method="radial", options={}
        ),
        r"student.options.window: 2 -> 3": changed(
            copy, "student", options={"window": 3, "tile": [1, 4, 4]}
        ),
        r"train.optimizer: 'adamw' -> 'muon'": changed(copy, "train", optimizer="muon"),
    }
    for message, other in cases.items():
        with pytest.raises(ValueError, match=message) as found:
            Trainer(other, "latest")
        assert "\n" not in str(found.value)
    with caplog.at_level(logging.WARNING):
        Trainer(changed(copy, "train", lr=5e-4, steps=4), "latest")
    assert "train.lr: 0.001 -> 0.0005; train.steps: 3 -> 4" in caplog.text
    other = dataclasses.replace(copy.data, folder=copy.data.folder + "-other", seed=5)
    source = find(copy.model.path)
    prepare(load(source), "transformer", source, other)
    with pytest.raises(ValueError, match="trained on another training set"):
        Trainer(dataclasses.replace(copy, data=other), "latest")


def test_checkpoints_of_another_future_go(copy, caplog):
    """Gone back by hand: what was written after that step is not mixed with what comes now."""
    with caplog.at_level(logging.WARNING):
        train(copy, str(checkpoint(copy, 1)))
    assert "removing" in caplog.text and "step-00000003" in caplog.text


def test_an_output_in_use_is_left_alone(copy):
    """By process 1, which lives as long as the machine."""
    owner = Owner(host_name(), 1, start_of(1), "then", "dittfast distill")
    (Path(copy.train.output) / LOCK).write_text(json.dumps(dataclasses.asdict(owner)))
    with pytest.raises(FolderInUse, match="in use by process 1 "):
        Trainer(copy, "latest")
    with pytest.raises(FolderInUse):
        Trainer(copy)
    (Path(copy.data.folder) / LOCK).write_text(json.dumps(dataclasses.asdict(owner)))
    try:
        with pytest.raises(FolderInUse):
            source = find(copy.model.path)
            prepare(load(source), "transformer", source, copy.data)
    finally:
        (Path(copy.data.folder) / LOCK).unlink()


def test_a_full_disk_is_one_line(copy, capsys, folder):
    from dittfast.cli import main

    arguments = ["distill", write_config(folder, student=LORA, train=copy.to_dict()["train"])]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        assert main([*arguments, "--resume", "latest", "train.steps=4"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("dittfast: error: [Errno") and "step-00000004" in error
    assert not (Path(copy.train.output) / LOCK).exists()


def test_what_the_optimiser_spoilt_is_said(copy):
    trainer = Trainer(copy, "latest")
    next(iter(trainer.parameters.values())).data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"is not finite any more.*step-00000003"):
        trainer._guard({"gradient": float("nan")})
    for values in trainer.optimizer.state_dict()["state"].values():
        values["exp_avg"].fill_(torch.inf)
    next(iter(trainer.parameters.values())).data.fill_(0)
    with pytest.raises(FloatingPointError, match="the optimiser's exp_avg of parameter 0"):
        trainer.state.write(Path(copy.train.output), {"step": 9})


# Sets.


@pytest.fixture
def pictures(folder, tmp_path):
    """Three pictures, two in a shard, and the set made of them."""
    (tmp_path / "p").mkdir()
    for n, name in enumerate("abc"):
        picture = Image.new("RGB", (96, 64), (200, 40 * n, 0))
        picture.save(tmp_path / "p" / f"{name}.png", compress_level=0)
        (tmp_path / "p" / f"{name}.txt").write_text("a red cat")
    data = {"pictures": str(tmp_path / "p"), "prompts": [], "count": None, "shard_size": 2}
    data["folder"] = str(tmp_path / "set")
    config = load_config(write_config(folder, data=data))
    source = find(config.model.path)
    pipe = load(source)

    def make():
        prepare(pipe, "transformer", source, config.data)
        return {p.name: p.read_bytes() for p in (tmp_path / "set").iterdir()}

    return tmp_path / "p", tmp_path / "set", make


def test_replaced_pictures_are_noticed(pictures, caplog):
    folder, made, make = pictures
    before = make()
    assert make() == before
    contents = Dataset(made).contents
    # Another picture under its own name, of the same size.
    picture = np.array(Image.open(folder / "a.png"))
    times = folder.joinpath("a.png").stat()
    Image.fromarray(255 - picture).save(folder / "a.png", compress_level=0)
    assert folder.joinpath("a.png").stat().st_size == times.st_size
    os.utime(folder / "a.png", ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    with caplog.at_level(logging.WARNING):
        after = make()
    assert "shard-00000.safetensors is made again: a.png was replaced" in caplog.text
    assert after["shard-00000.safetensors"] != before["shard-00000.safetensors"]
    assert after["shard-00001.safetensors"] == before["shard-00001.safetensors"]
    assert Dataset(made).contents != contents
    # Touched, but the same: the record learns the new time, and nothing is made again.
    os.utime(folder / "c.png")
    caplog.clear()
    again = make()
    assert again["shard-00001.safetensors"] == after["shard-00001.safetensors"]
    assert again["shard-00001.json"] != after["shard-00001.json"] and not caplog.text


def test_damaged_shards_are_refused_and_made_again(pictures, caplog):
    _, made, make = pictures
    before = make()
    flip(made / "shard-00001.safetensors")
    dataset = Dataset(made)
    dataset.sample(0)
    with pytest.raises(FileProblem, match=r"shard-00001.*SHA-256.*prepare again: it makes"):
        dataset.sample(2)
    assert Dataset(made, verify=False).sample(2)
    make()
    assert "shard-00001.safetensors: it was changed or damaged" in caplog.text
    assert {p.name: p.read_bytes() for p in made.iterdir()} == before


def test_sets_of_earlier_versions_are_believed_by_their_times(pictures, caplog):
    folder, made, make = pictures
    before = make()
    for path in made.glob("*.json"):
        if path.name != "data.json":
            path.unlink()
    manifest = json.loads((made / "data.json").read_text())
    del manifest["records"], manifest["sha256"]
    (made / "data.json").write_text(json.dumps(manifest))
    assert len(Dataset(made)) == 3 and Dataset(made).contents is None
    assert make()["shard-00000.safetensors"] == before["shard-00000.safetensors"]
    assert not (made / "shard-00000.json").exists()
    later = (made / "shard-00000.safetensors").stat().st_mtime + 5
    Image.new("RGB", (96, 64), "blue").save(folder / "b.png")
    os.utime(folder / "b.png", (later, later))
    assert make()["shard-00000.safetensors"] != before["shard-00000.safetensors"]
    assert (made / "shard-00000.json").exists() and "b.png is newer" in caplog.text
