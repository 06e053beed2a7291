"""What a run was: model, call, device and versions, as plain data for records."""

from __future__ import annotations

from dittfast.environment import describe_device, versions

from ..models import attention_backend, execution_device, transformers_of
from .call import call_record
from .sources import Source


def run_settings(pipe, source: Source, call: dict) -> dict:
    """All that a picture depends on but its prompt, seed, method and weights.

    ``dense_attention`` is the user's attention backend in diffusers, on which dense arms, dense
    steps and dense layers run.
    """
    model = next(iter(transformers_of(pipe).values()))
    return {
        "model": source.name,
        "pipeline": type(pipe).__name__,
        "call": call_record(call),
        "device": describe_device(execution_device(pipe)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "dense_attention": attention_backend(model),
        "versions": versions(),
    }
