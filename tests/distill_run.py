"""A small distillation run on the tiny pipelines: its configuration, its model and its data."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
import yaml

from dittfast.distill.config import DistillConfig, load_config
from dittfast.distill.prepare import prepare
from dittfast.pipelines.runs.sources import find, load

PROMPTS = ["a red cat", "a blue dog", "the green car", "a photo of the dog"]
CALLS = {
    "flux": dict(height=64, width=96, num_inference_steps=2, max_sequence_length=12),
    "wan": dict(
        height=48, width=80, num_frames=9, num_inference_steps=2, max_sequence_length=12,
        negative_prompt="a dog", guidance_scale=3.0,
    ),
}  # fmt: skip
MAKE = {"flux": tiny.flux_pipeline, "wan": tiny.wan_pipeline}


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small only wait for a second thread, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps one state in a process; each test may have its own precision."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@cache
def _model(folder: Path, family: str) -> str:
    MAKE[family]().save_pretrained(folder / family)
    return str(folder / family)


def write_config(folder: Path, family: str = "flux", **sections: dict) -> str:
    """A YAML file of a run below ``folder``; ``sections`` change its values."""
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    data = {
        "model": {"path": _model(folder, family)},
        "student": {"method": "local", "options": {"window": 2, "tile": [1, 4, 4]}},
        "data": {
            "folder": str(folder / f"data-{family}"),
            "prompts": str(prompts),
            "count": 6,
            "call": CALLS[family],
            "shard_size": 4,
        },
        "train": {
            "output": str(folder / "run"), "steps": 4, "batch_size": 2, "lr": 1e-3,
            "checkpoint_every": 2,
        },
    }  # fmt: skip
    for name, values in sections.items():
        data[name] = data.get(name, {}) | values
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


def make_config(folder: Path, family: str = "flux", **sections: dict) -> DistillConfig:
    """A run below ``folder`` with its data prepared."""
    config = load_config(write_config(folder, family, **sections))
    if not (Path(config.data.folder) / "data.json").exists():
        source = find(config.model.path)
        prepare(load(source), config.model.component, source, config.data)
    return config
