"""What a run would train, and how much memory it would take, without loading weights."""

from __future__ import annotations

import math

import torch

from dittfast.pipelines.families import Family
from dittfast.pipelines.families.published import published_model, published_models
from dittfast.pipelines.families.sequences import Sequences
from dittfast.pipelines.models import attention_layers, family_of
from dittfast.pipelines.runs.sources import Source, choose_dtype, find

from .adapter_files import own_shapes
from .config import DistillConfig, StudentConfig
from .loader import Dataset
from .lora import ADAPTER, add_lora

# Bytes that an optimiser keeps for each trained value; Prodigy has two more tensors than AdamW,
# Muon one less for a matrix.
_STATE_BYTES = {"adamw": 8, "muon": 4, "prodigy": 16}
# Saved values of one transformer layer for each token and channel, without the attention matrix,
# in 16 bits: Korthikanti et al. 2022, arXiv:2205.05198, section 4.1.
_SAVED_BYTES = 34


def empty_model(source: Source, component: str) -> torch.nn.Module:
    """The transformer of a source on the meta device: shapes without values.

    Where the hub cannot be reached, some published models are known by the package itself.

    Raises:
        ValueError: the source has no such component, or no configuration of it.
    """
    import diffusers

    local = source.kind != "hub"
    try:
        index = diffusers.DiffusionPipeline.load_config(source.location, local_files_only=local)
    except OSError as error:
        known = _shipped_model(source.name) if component == "transformer" else None
        if known is not None:
            return known
        raise ValueError(f"could not read the configuration of {source.name}: {error}") from error
    _, name = index.get(component) or (None, None)
    if name is None:
        raise ValueError(f"model.component: {source.name} has no {component!r}")
    cls = getattr(diffusers, name)
    config = cls.load_config(source.location, subfolder=component, local_files_only=local)
    with torch.device("meta"):
        return cls.from_config(config)


def _shipped_model(hub_id: str) -> torch.nn.Module | None:
    cards = (published_model(name) for name in published_models())
    matching = [card for card in cards if card.source.split(",")[0] == hub_id]
    return matching[0].build() if matching else None


def memory_needs(config: DistillConfig) -> dict:
    """Parameter counts and bytes of one process, as plain data.

    Returns:
        ``parameters`` (total, trained), ``bytes`` by purpose with their ``total``, and ``notes``
        on what is not in it.
    """
    source, student, train = find(config.model.path), config.student, config.train
    model = empty_model(source, config.model.component)
    total = sum(p.numel() for p in model.parameters())
    family = family_of(model)
    layers = list(attention_layers(model, family))
    base, added = _trained(student, model, family, layers)
    trained = base + added
    # The device of the run may be another; a name says what "auto" would mean here.
    size = choose_dtype(config.model.dtype, torch.device("cpu")).itemsize
    shared = config.objectives.needs_teacher and not config.model.separate_teacher
    bytes_of = {
        "frozen weights": (total - base) * size,
        "trained weights": trained * 4,
        "gradients": trained * 4,
        f"{train.optimizer} states": trained * _STATE_BYTES[train.optimizer],
        "averaged weights": trained * 4 if train.ema is not None else 0,
        "teacher": base * 4 if shared else total * size * config.model.separate_teacher,
    }
    notes = ["VAE and text encoders are loaded too; on the device only where validation is on"]
    tokens = _tokens(config, model, family)
    if tokens is None:
        notes.append("activations are not in it: the training set is not prepared yet")
    else:
        wide = family.query_width(model.get_submodule(layers[0])) * tokens * train.batch_size
        blocks = len(layers)
        saved = 2 * blocks + _SAVED_BYTES if train.gradient_checkpointing else blocks * _SAVED_BYTES
        bytes_of["activations, roughly"] = int(wide * max(size, 2) / 2 * saved)
    bytes_of["total"] = sum(bytes_of.values())
    return {
        "parameters": {"model": total, "trained": trained},
        "bytes": bytes_of,
        "notes": notes,
        "tokens": tokens,
    }


def _trained(student: StudentConfig, model, family: Family, layers: list[str]) -> tuple[int, int]:
    """Trained parameters: the model's own, and those that the student adds to it."""
    method, schedule = student.resolved()
    dense = schedule.dense_layer_names(layers)
    shapes = own_shapes(method, model)
    added = sum(math.prod(x) for n in layers if n not in dense for x in shapes[n].values())
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    if student.trainable == "attention":
        return sum(sizes[name] for name in family.projection_weights(model, layers)), added
    if student.trainable == "all":
        return sum(sizes.values()), added
    if student.trainable == "lora":
        with torch.device("meta"):
            add_lora(model, student.rank, student.alpha, student.targets)
        added += sum(p.numel() for n, p in model.named_parameters() if f".{ADAPTER}." in n)
    return 0, added


def _tokens(config: DistillConfig, model, family) -> int | None:
    """Tokens of the prepared set; None where there is none."""
    try:
        dataset = Dataset(config.data.folder)
    except (FileNotFoundError, ValueError):
        return None
    batch = dataset.batch([0])
    arguments = dict(batch.arguments, hidden_states=batch.latents)
    return Sequences.of(family.read(model, arguments)).layout.num_tokens
