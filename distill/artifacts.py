"""What a run leaves: weights, their description and a model card; and putting them back."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch

import dittfast
from dittfast.config import resolve
from dittfast.files import write_json, write_text
from dittfast.methods.base import Method
from dittfast.pipelines.adapter import disable, enable
from dittfast.pipelines.fingerprint import difference
from dittfast.pipelines.models import is_swapped, transformers_of

from .config import DistillConfig
from .model_card import model_card
from .student import ADAPTER, Student, add_lora, component_of, remove_lora

FORMAT = 2
# Format 1 wrote a method's own parameters without OWN before their names.
_READABLE = (1, 2)
DESCRIPTION = "adapter.json"
WEIGHTS = "attention.safetensors"
# The name that pipe.load_lora_weights looks for.
LORA = "pytorch_lora_weights.safetensors"
# Before the names of the method's own parameters, lest one named "weight" be taken for the model's.
OWN = "method."
_CLEAR_NAME = re.compile(r"clear_local_(\d+)(?:_down_(\d+))?")


def save_adapter(
    folder: Path,
    student: Student,
    values: dict[str, torch.Tensor],
    config: DistillConfig,
    base: str,
    fingerprint: dict,
    facts: dict,
) -> None:
    """Write the student's trained parameters as an adapter folder, atomically.

    Args:
        values: of the trained parameters, on the CPU.
        base: name of the base model.
        fingerprint: of the base model, which :func:`load_adapter` checks.
        facts: what the run measured; plain data.
    """
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    weights, lora = {}, {}
    dtype = student.dtype
    for name, value in values.items():
        if f".{ADAPTER}." in name:
            lora[f"{student.component}.{name.replace(f'.{ADAPTER}.', '.')}"] = value.to(dtype)
        elif name in student.own:
            weights[OWN + name] = value
        else:
            weights[name] = value.to(dtype)
    settings = config.student
    alpha = settings.rank if settings.alpha is None else settings.alpha
    method, schedule = settings.resolved()
    description = {
        "format": FORMAT,
        "dittfast": dittfast.__version__,
        "base": {"model": base, "component": student.component, "fingerprint": fingerprint},
        "method": method.name,
        "options": settings.options,
        "preset": settings.method,
        "schedule": settings.schedule,
        "trainable": settings.trainable,
        "lora": {"rank": settings.rank, "alpha": alpha, "targets": list(settings.targets)}
        if lora
        else None,
        "config": config.to_dict(),
        "run": facts,
    }
    if weights:
        _save(part / WEIGHTS, weights, {})
    if lora:
        _save(part / LORA, lora, _lora_metadata(student, description["lora"]))
    write_json(part / DESCRIPTION, description)
    write_text(part / "README.md", model_card(description, repr(method), repr(schedule)))
    gone = folder.with_name(f".{folder.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    if folder.exists():
        os.rename(folder, gone)
    os.rename(part, folder)
    shutil.rmtree(gone, ignore_errors=True)


def _save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt", **metadata})


def _lora_metadata(student: Student, lora: dict) -> dict[str, str]:
    """diffusers reads rank and alpha from here; without it alpha would be taken for the rank."""
    fields = {"r": lora["rank"], "lora_alpha": lora["alpha"], "target_modules": lora["targets"]}
    prefixed = {f"{student.component}.{name}": value for name, value in fields.items()}
    return {"lora_adapter_metadata": json.dumps(prefixed, sort_keys=True)}


def read_description(folder: str | Path) -> dict:
    """The description of an adapter folder.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: another version wrote it.
    """
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no adapter: there is no {DESCRIPTION} in it")
    description = json.loads(path.read_text(encoding="utf-8"))
    if description.get("format") not in _READABLE:
        raise ValueError(
            f"{path} has format {description.get('format')}, this version reads "
            f"{' and '.join(map(str, _READABLE))}"
        )
    return description


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Trained parameters by their names in the model, of an adapter folder or a weights file.

    The method's own parameters have :data:`OWN` before the name of their layer, but in what
    format 1 and CLEAR wrote.

    A file may have the layout of CLEAR's published checkpoints: ``...attn.to_q.weight`` and
    ``...attn.processor.spatial_weight``, with or without a leading ``transformer.``.
    """
    from safetensors.torch import load_file

    path = Path(path)
    if path.is_file():
        return {_plain_name(name): _plain_value(name, x) for name, x in load_file(path).items()}
    component = read_description(path)["base"]["component"]
    weights = {}
    if (path / WEIGHTS).is_file():
        weights |= load_file(path / WEIGHTS)
    if (path / LORA).is_file():
        for name, x in load_file(path / LORA).items():
            name = name.removeprefix(f"{component}.")
            weights[re.sub(r"\.(lora_[AB])\.", rf".\1.{ADAPTER}.", name)] = x
    return weights


def _plain_name(name: str) -> str:
    name = re.sub(r"^(module\.)?(transformer\.)?", "", name)
    return name.replace(".processor.spatial_weight", ".spatial_weight")


def _plain_value(name: str, x: torch.Tensor) -> torch.Tensor:
    if not name.endswith("spatial_weight"):
        return x
    side = round(x.numel() ** 0.5)
    return x.reshape(side, side)


@dataclass
class _Loaded:
    """What an adapter changed in a transformer; kept on it until :func:`unload_adapter`.

    Attributes:
        original: the model's parameters that were overwritten, on the CPU.
        lora: the LoRA's parameters and settings; None where there is none.
        merged: base weights from before a merge, on the CPU; None while unmerged.
    """

    component: str
    original: dict[str, torch.Tensor] = field(default_factory=dict)
    lora: tuple[dict[str, torch.Tensor], dict] | None = None
    merged: dict[str, torch.Tensor] | None = None


def _loaded_in(pipe) -> tuple[torch.nn.Module, _Loaded]:
    for model in transformers_of(pipe).values():
        if hasattr(model, "_dittfast_adapter"):
            return model, model._dittfast_adapter
    raise ValueError("no adapter of dittfast is loaded in this pipeline; call load_adapter first")


def load_adapter(
    pipe,
    path: str | Path,
    *,
    method: Method | str | None = None,
    component: str = "transformer",
    any_base: bool = False,
    backend: str = "auto",
    **options,
) -> None:
    """Put a trained method and its weights into a pipeline. Changes nothing if it must refuse.

    Args:
        pipe: a diffusers pipeline, or a transformer.
        path: an adapter folder, or a ``.safetensors`` file in the layout of CLEAR's published
            checkpoints (arXiv:2412.16112).
        method, options: as in :func:`dittfast.enable`, in the place of the adapter's own. Needed
            for a file whose name does not say it (``clear_local_8_down_4`` does).
        component: of a file; a folder knows its own.
        any_base: load it into another base model than it was trained on.
        backend: as in :func:`dittfast.attend`.

    Raises:
        ValueError: the base model is another one, or parameters are missing or of other shapes.
        FileNotFoundError: no adapter there.
    """
    path = Path(path)
    schedule, lora, expected = {}, None, None
    if path.is_dir():
        description = read_description(path)
        component, expected = description["base"]["component"], description["base"]["fingerprint"]
        lora, schedule = description["lora"], description["schedule"]
        if method is None:
            method, options = description["preset"], {**description["options"], **options}
    elif not path.is_file():
        raise FileNotFoundError(f"there is no adapter at {path}")
    weights = read_weights(path)
    if method is None:
        method, options = "local", {**_clear_options(path), **options}
    model = component_of(pipe, component)
    if hasattr(model, "_dittfast_adapter"):
        raise ValueError(
            "this pipeline has an adapter of dittfast; call unload_adapter(pipe) first"
        )
    if expected is not None and not any_base:
        wrong = difference(expected, model)
        if wrong:
            raise ValueError(
                f"{path} was trained on {description['base']['model']}, and this is another "
                f"model: {wrong}. any_base=True loads it all the same"
            )
    chosen, timing = resolve(method, **{"min_tokens": 0, **schedule, **options})
    own, adapters, plain = _sorted(weights, model, chosen)
    _check(path, model, plain)
    enable(pipe, chosen, schedule=timing, backend=backend)
    try:
        _set_own(path, model, own)
        if adapters:
            _put_lora(model, adapters, lora)
    except BaseException:
        disable(pipe)
        raise
    loaded = _Loaded(component, lora=(adapters, lora) if adapters else None)
    loaded.original = _set(model, plain)
    model._dittfast_adapter = loaded


def _sorted(weights: dict[str, torch.Tensor], model: torch.nn.Module, method: Method):
    """Weights of the method (by layer and name), of a LoRA, and of the model itself."""
    own, adapters, plain = {}, {}, {}
    in_model = {name for name, _ in model.named_parameters()}
    for name, x in weights.items():
        if name.startswith(OWN):
            own[name.removeprefix(OWN)] = x
        elif f".{ADAPTER}." in name:
            adapters[name] = x
        elif name not in in_model and name.rpartition(".")[2] in method.parameters():
            own[name] = x
        else:
            plain[name] = x
    return own, adapters, plain


def _clear_options(path: Path) -> dict:
    found = _CLEAR_NAME.search(path.stem)
    if not found:
        raise ValueError(
            f"{path.name} does not say which method its weights belong to; pass method='local', "
            "window=..., and downsample=... where it has one"
        )
    window, down = found.groups()
    return {"window": int(window)} | ({"downsample": int(down)} if down else {})


def _check(path: Path, model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, x in weights.items():
        if name not in parameters:
            raise ValueError(f"{path}: {type(model).__name__} has no parameter {name}")
        if parameters[name].shape != x.shape:
            raise ValueError(
                f"{path}: {name} is {list(x.shape)}, the model's is {list(parameters[name].shape)}"
            )


@torch.no_grad()
def _set(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy values into parameters; the values from before, on the CPU."""
    before = {}
    for name, x in weights.items():
        p = model.get_parameter(name)
        before[name] = p.detach().cpu().clone()
        p.copy_(x)
    return before


def _put_lora(model: torch.nn.Module, values: dict[str, torch.Tensor], lora: dict) -> None:
    add_lora(model, lora["rank"], lora["alpha"], lora["targets"])
    try:
        _check(Path(LORA), model, values)
        _set(model, values)
    except BaseException:
        remove_lora(model)
        raise
    for name in values:
        model.get_parameter(name).requires_grad_(False)


@torch.no_grad()
def _set_own(path: Path, model: torch.nn.Module, own: dict[str, torch.Tensor]) -> None:
    layers = model._dittfast.layers
    for name, x in own.items():
        layer, _, field_name = name.rpartition(".")
        p = layers[layer].parameters.get(field_name) if layer in layers else None
        if p is None or p.shape != x.shape:
            raise ValueError(
                f"{path}: {name} {list(x.shape)} does not fit {model._dittfast.session.method}"
            )
        p.copy_(x)


def merge(pipe) -> None:
    """Fold a loaded LoRA into the weights: no extra products, and nothing of PEFT is left.

    Weights that an adapter replaced are in their place already. :func:`unmerge` takes it back, to
    the bit.

    Raises:
        ValueError: no adapter is loaded, it is merged already, or other LoRAs are loaded.
    """
    model, loaded = _loaded_in(pipe)
    if loaded.merged is not None:
        raise ValueError("the adapter is merged already")
    if loaded.lora is None:
        loaded.merged = {}
        return
    others = sorted(set(model.peft_config) - {ADAPTER})
    if others:
        raise ValueError(f"other LoRAs are loaded ({', '.join(others)}); unload them first")
    before = {}
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "merge"):
            before[f"{name}.weight"] = module.base_layer.weight.detach().cpu().clone()
            module.merge(safe_merge=True, adapter_names=[ADAPTER])
    model.unload_lora()
    loaded.merged = before


def unmerge(pipe) -> None:
    """Undo :func:`merge`, to the bit.

    Raises:
        ValueError: nothing is merged.
    """
    model, loaded = _loaded_in(pipe)
    if loaded.merged is None:
        raise ValueError("the adapter is not merged; there is nothing to undo")
    _set(model, loaded.merged)
    loaded.merged = None
    if loaded.lora is not None:
        _put_lora(model, *loaded.lora)


def unload_adapter(pipe) -> None:
    """Take an adapter and its method out again; the weights are what they were, to the bit.

    Raises:
        ValueError: no adapter is loaded.
    """
    model, loaded = _loaded_in(pipe)
    if loaded.merged is not None:
        _set(model, loaded.merged)
    elif loaded.lora is not None:
        remove_lora(model)
    _set(model, loaded.original)
    del model._dittfast_adapter
    if is_swapped(model):
        disable(pipe)
