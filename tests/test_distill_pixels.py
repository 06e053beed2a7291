"""LLSA's two stages on a pixel transformer: the shipped recipes, at a size for a CPU."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from distill_run import fresh_accelerate, one_thread  # noqa: F401
from PIL import Image

import dittfast
from dittfast.distill.config import load_config
from dittfast.distill.loader import Dataset
from dittfast.distill.prepare import prepare
from dittfast.distill.trainer import train
from dittfast.pipelines.runs.call import call_arguments
from dittfast.pipelines.runs.run import run
from dittfast.pipelines.runs.sources import find, load

SCRIPTS = Path(__file__).parents[1] / "samples"


@pytest.fixture(scope="module")
def script():
    """samples/pixel_dit.py; the scripts import each other by plain name, as they do when run."""
    if not hasattr(diffusers, "PRXPixelPipeline"):
        pytest.skip("the installed diffusers has no PRXPixelPipeline")
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module("pixel_dit")
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture
def folders(tmp_path, script):
    """Two untrained pipelines with the same weights, and pictures: discs of two colours."""
    captions = ["a red disc", "a blue disc"]
    for size, scale in ((8, 1.0), (16, 2.0)):
        pipe = script.build(layers=2, heads=1, noise_scale=scale, captions=captions)
        script.save(pipe, tmp_path / f"pixel-{size}", size, captions)
    y, x = np.mgrid[:32, :32] - 15.5
    for index, text in enumerate(captions):
        picture = np.full((32, 32, 3), 255, np.uint8)
        picture[y * y + x * x < 120] = (220, 30, 30) if index == 0 else (30, 30, 220)
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{index}.png")
        (tmp_path / "pictures" / f"{index}.txt").write_text(text)
    return tmp_path


def stage(number, size, folder, *overrides):
    """The recipe's configuration, small."""
    small = [
        f"model.path={folder}/pixel-{size}",
        f"data.folder={folder}/data-{size}",
        f"data.pictures={folder}/pictures",
        f"data.call.height={size}",
        f"data.call.width={size}",
        f"train.output={folder}/stage{number}",
        "train.steps=20",
        "train.batch_size=4",
        "train.mixed_precision='no'",
        "train.warmup_steps=0",
        "train.lr=2e-3",
        "train.ema=0.5",
    ]
    return load_config(f"llsa_pixel_stage{number}", [*small, *overrides])


def run_stage(config) -> list[float]:
    """Prepare and train; the loss of each step."""
    source = find(config.model.path)
    prepare(load(source), config.model.component, source, config.data)
    train(config)
    lines = (Path(config.train.output) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["denoising"] for line in lines]


def test_two_stages(folders):
    first = stage(1, 8, folders)
    losses = run_stage(first)
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    smaller = ["student.options.topk=2", "student.options.levels=1"]
    second = stage(2, 16, folders, f"student.start={folders}/stage1/adapter", *smaller)
    assert np.mean(run_stage(second)[:5]) < 2 * np.mean(losses[:5])
    data = Dataset(second.data.folder)
    assert data.process.kind == "sample" and data.process.noise_scale == 2.0
    pixels = data.sample(0)["latents"]
    assert pixels.shape == (1, 3, 16, 16) and float(pixels.min()) < -0.7
    pipe = load(find(second.model.path))
    dittfast.load_adapter(pipe, folders / "stage2" / "adapter")
    assert dittfast.describe(pipe).method.name == "log_linear"
    call = call_arguments(pipe, "a red disc", find(second.model.path).settings)
    assert run(pipe, call).frames.shape == (1, 16, 16, 3)


def test_pixels_are_their_own_latents(folders):
    config = stage(1, 8, folders)
    source = find(config.model.path)
    prepare(load(source), config.model.component, source, config.data)
    found = Dataset(config.data.folder).sample(1)["latents"][0]
    with Image.open(folders / "pictures" / "1.png") as picture:
        small = np.asarray(picture.resize((8, 8), Image.Resampling.LANCZOS))
    expected = torch.from_numpy(small.copy()).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(found, expected)
