"""Adapters of tiny models with random values, written without training."""

import torch
from tiny import flux_pipeline

from dittfast.distill.artifacts import save_adapter
from dittfast.distill.config import (
    DataConfig,
    DistillConfig,
    ModelConfig,
    StudentConfig,
    TrainConfig,
)
from dittfast.distill.student import Student
from dittfast.pipelines.fingerprint import fingerprint

OPTIONS = {"window": 2, "downsample": 2, "tile": [1, 4, 4]}


def named(method):
    """A method's name and options, as configurations have them."""
    options = method.to_dict()
    return options.pop("name"), options


FACTS = dict(
    steps=1, seconds=1.0, samples=1, global_batch=1, seed=0, last_step=None, validation=None,
    validation_before=None,
)  # fmt: skip


def make_adapter(
    folder, kind, values=lambda shape: 0.1 * torch.randn(shape), method=("local", OPTIONS), **sizes
):
    """An adapter of one kind ("attention", "lora", "method") for tiny.flux_pipeline().

    Args:
        values: tensors by shape.
        method: its name and options.
        sizes: of the pipeline.
    """
    pipe = flux_pipeline(**sizes)
    base = fingerprint(pipe.transformer)
    student = StudentConfig(*method, trainable=kind, rank=3, alpha=6.0)
    config = DistillConfig(ModelConfig("tiny"), student, DataConfig("data"), TrainConfig("out", 1))
    made = Student(pipe, "transformer", student, config.objectives)
    torch.manual_seed(1)
    trained = {name: values(p.shape) for name, p in made.trainable().items()}
    save_adapter(folder, made, trained, config, "tiny", base, FACTS)
    return folder
