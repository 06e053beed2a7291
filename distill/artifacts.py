"""What a run leaves: weights, their description and a model card; and putting them back."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import dittfast
from dittfast.config import KINDS, presets, resolve
from dittfast.disk.problems import FileProblem, reading, shown
from dittfast.disk.records import write_record
from dittfast.disk.tensors import write_tensors
from dittfast.files import atomic_folder, write_text
from dittfast.methods.base import Method
from dittfast.pipelines.adapter import disable, enable
from dittfast.pipelines.fingerprint import base_parameters, difference
from dittfast.pipelines.models import (
    Pipeline,
    attention_layers,
    family_of,
    is_swapped,
    transformers_of,
)
from dittfast.schedule import Schedule

from .adapter_files import (
    AGAIN,
    CARD,
    DESCRIPTION,
    FORMAT,
    LORA,
    OWN,
    WEIGHTS,
    Weights,
    check_promise,
    gates_in,
    method_of,
    own_shapes,
    place_gates,
    promised,
    read_description,
    read_file,
    read_folder,
    sort_out,
    stock_weights,
    told_method,
)
from .bases import (
    check_base,
    check_has_lora,
    check_mergeable,
    check_not_added,
    check_not_fused,
)
from .config import DistillConfig
from .lora import ADAPTER, add_lora, compute_dtype, has_lora, lora_layers, remove_lora
from .model_card import model_card
from .student import Student, component_of

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

    Raises:
        FloatingPointError: a value that is not finite; nothing is written.
    """
    broken = [name for name, value in values.items() if not torch.isfinite(value).all()]
    if broken:
        raise FloatingPointError(
            f"{broken[0]} holds values that are not finite, so no adapter is written to {folder}; "
            "go on from an earlier checkpoint with a lower train.lr"
        )
    weights, lora = _by_file(student, values)
    description = _describe(student, config, base, fingerprint, facts, with_lora=bool(lora))
    method, schedule = config.student.resolved()
    with atomic_folder(folder) as part:
        if weights:
            write_tensors(part / WEIGHTS, weights)
        if lora:
            write_tensors(part / LORA, lora, _lora_metadata(student, description["lora"]))
        write_text(part / CARD, model_card(description, repr(method), repr(schedule)))
        written = [name for name, there in ((WEIGHTS, weights), (LORA, lora)) if there]
        write_record(part / DESCRIPTION, description, written)


def _by_file(student: Student, values: dict[str, torch.Tensor]) -> tuple[dict, dict]:
    """The tensors of the weights' file and of the LoRA's, by the names they have there."""
    weights, lora = {}, {}
    for name, value in values.items():
        if f".{ADAPTER}." in name:
            stock = f"{student.component}.{name.replace(f'.{ADAPTER}.', '.')}"
            lora[stock] = value.to(student.dtype)
        elif name in student.own:
            weights[OWN + name] = value
        else:
            weights[name] = value.to(student.dtype)
    return weights, lora


def _describe(student, config, base: str, fingerprint: dict, facts: dict, with_lora: bool) -> dict:
    """What adapter.json says."""
    settings = config.student
    alpha = settings.rank if settings.alpha is None else settings.alpha
    lora = {"rank": settings.rank, "alpha": alpha, "targets": list(settings.targets)}
    method, schedule = settings.resolved()
    preset, options, timing = _portable(settings, method, schedule)
    return {
        "format": FORMAT,
        "dittfast": dittfast.__version__,
        "base": {"model": base, "component": student.component, "fingerprint": fingerprint},
        "method": method.name,
        "options": options,
        "preset": preset,
        "schedule": timing,
        "trainable": settings.trainable,
        "lora": lora if with_lora else None,
        "config": config.to_dict(),
        "run": facts,
    }


def _portable(settings, method: Method, schedule) -> tuple[str, dict, dict]:
    """Name, options and schedule by which a method is found without files of this machine."""
    if settings.method in KINDS or settings.method in presets():
        return settings.method, settings.options, settings.schedule
    fields = method.to_dict()
    return fields.pop("name"), fields, dataclasses.asdict(schedule)


def _lora_metadata(student: Student, lora: dict) -> dict[str, str]:
    """diffusers reads rank and alpha from here; without it alpha would be taken for the rank."""
    fields = {"r": lora["rank"], "lora_alpha": lora["alpha"], "target_modules": lora["targets"]}
    fields |= {"rank_pattern": {}, "alpha_pattern": {}}  # diffusers 0.38 asks for them
    prefixed = {f"{student.component}.{name}": value for name, value in fields.items()}
    return {"lora_adapter_metadata": json.dumps(prefixed, sort_keys=True)}


@dataclass
class _Loaded:
    """What an adapter changed in a transformer; kept on it until :func:`unload_adapter`.

    Attributes:
        original: the model's parameters that were overwritten, on the CPU.
        lora: the LoRA's parameters and settings; None where there is none.
        layers: PEFT's layers that it was put in, by name: others may take them out of the model.
        trainable: which parameters asked for gradients before, by name.
        watch: the hook that refuses passes without the LoRA; None where there is none.
        merged: base weights from before a merge, on the CPU; None while unmerged.
    """

    original: dict[str, torch.Tensor] = field(default_factory=dict)
    lora: tuple[dict[str, torch.Tensor], dict] | None = None
    layers: dict[str, torch.nn.Module] = field(default_factory=dict)
    trainable: dict[str, bool] = field(default_factory=dict)
    watch: object = None
    merged: dict[str, torch.Tensor] | None = None


def _loaded_in(pipe) -> tuple[torch.nn.Module, _Loaded]:
    for model in transformers_of(pipe).values():
        if hasattr(model, "_dittfast_adapter"):
            return model, model._dittfast_adapter
    raise ValueError("no adapter of dittfast is loaded in this pipeline; call load_adapter first")


def load_adapter(
    pipe: Pipeline,
    path: str | Path,
    *,
    method: Method | str | None = None,
    component: str = "transformer",
    any_base: bool = False,
    verify: bool = True,
    backend: str = "auto",
    **options: Any,
) -> None:
    """Put a trained method and its weights into a pipeline. Changes nothing if it must refuse.

    Args:
        pipe: a diffusers pipeline, or a transformer.
        path: an adapter folder, or a ``.safetensors`` file in the layout of CLEAR's published
            checkpoints (arXiv:2412.16112), or of FastVideo's with VSA's gates
            (``to_gate_compress``); of a checkpoint in several files its ``.index.json``.
        method, options: as in :func:`dittfast.enable`, in the place of the adapter's own. Needed
            for a file that says it neither by its name (``clear_local_8_down_4`` does) nor by
            gates, which are VSA's.
        component: of a file; a folder knows its own.
        any_base: load it into another base model than it was trained on.
        verify: compare a folder's files with the SHA-256 that was written with them.
        backend: as in :func:`dittfast.attend`.

    The base may be quantised (a LoRA then stays beside it), kept in a smaller dtype by
    ``enable_layerwise_casting``, offloaded as a whole or in groups, or hold other LoRAs. It is
    refused where the adapter's values would be lost.

    Raises:
        ValueError: the base model is another one or cannot take the adapter; tensors are damaged,
            missing, of other shapes, or not finite.
        FileNotFoundError: no adapter there, or files of it are missing.
    """
    path = Path(path)
    record = read_description(path, verify) if path.is_dir() else None
    if record is None and not path.is_file():
        raise FileNotFoundError(f"there is no adapter at {path}")
    model = _free_base(pipe, record, component)
    if record is not None and not any_base:
        base = record.data["base"]
        wrong = difference(base["fingerprint"], model)
        if wrong:
            raise ValueError(
                f"{path} was trained on {shown(base['model'])}, and this is another model: "
                f"{shown(wrong)}. "
                "any_base=True loads it all the same"
            )
    chosen, schedule = _chosen(path, record, model, method, options)
    # All from headers; values are read when all of it fits.
    weights = _fitting(path, record, model, chosen, schedule)
    check_base(model, weights.plain, [*weights.plain, *weights.lora])
    lora = None if record is None else record.data["lora"]
    with contextlib.ExitStack() as undo:
        enable(pipe, chosen, schedule=schedule, backend=backend)
        undo.callback(disable, pipe)
        model._dittfast_adapter = _put_in(path, model, weights, lora, undo)
        undo.pop_all()


def _chosen(path: Path, record, model, method, options: dict) -> tuple[Method, Schedule]:
    """The method that an adapter runs with: the user's, else the adapter's own."""
    timing = {} if record is None else record.data["schedule"]
    if method is None and record is None:
        method, own = _told_by_file(path)
        options = {**own, **options}
    elif method is None:
        with reading(record.path, "its method's options are impossible", AGAIN):
            own_shapes(method_of(record)[0], model)
        method, own = told_method(record)
        options = {**own, **options}
    return resolve(method, **{"min_tokens": 0, **timing, **options})


def _free_base(pipe, record, component: str) -> torch.nn.Module:
    """The transformer that takes an adapter; it has none yet.

    Raises:
        ValueError: there is no such transformer, or an adapter is in it.
    """
    if record is None:
        model = component_of(pipe, component)
    else:
        with reading(record.path, "it does not fit"):
            model = component_of(pipe, record.data["base"]["component"])
    if hasattr(model, "_dittfast_adapter"):
        raise ValueError(
            "this pipeline has an adapter of dittfast; call unload_adapter(pipe) first"
        )
    if has_lora(model):
        raise ValueError(
            f"this pipeline has a LoRA named {ADAPTER!r}, the name that adapters of dittfast take; "
            "unload it, or load it under another adapter_name"
        )
    return model


def _put_in(path: Path, model, weights: Weights, lora, undo: contextlib.ExitStack) -> _Loaded:
    """Put an adapter's values into an enabled transformer; ``undo`` learns how to take them out."""
    loaded = _Loaded()
    loaded.trainable = {n: p.requires_grad for n, p in base_parameters(model).items()}
    undo.callback(_ask_for_gradients, model, loaded.trainable)
    _set_own(path, model, weights.own)
    if weights.lora:
        loaded.lora = weights.lora, lora
        loaded.layers = _put_lora(model, *loaded.lora)
        undo.callback(remove_lora, model)
        loaded.watch = model.register_forward_pre_hook(_HasLora(model, loaded))
        undo.callback(loaded.watch.remove)
    loaded.original = _values(model, weights.plain)
    undo.callback(_set, model, loaded.original)
    _set(model, weights.plain)
    return loaded


def _fitting(
    path: Path, record, model: torch.nn.Module, method: Method, schedule: Schedule
) -> Weights:
    """An adapter's tensors, read once their headers are all that they should be."""
    shapes = own_shapes(method, model)
    names = {name for own in shapes.values() for name in own}

    def sort(weights: Weights, own) -> Weights:
        if record is not None and record.data["format"] != 1:
            return weights
        sorted_ = sort_out(place_gates(path, weights.plain, model), model, own)
        return Weights(sorted_.own, weights.lora, sorted_.plain)

    if record is None:
        with reading(path, "it is no file of weights"):
            held = read_file(path, headers=True)
        dropped = [] if "gate_weight" in names else gates_in(held)
        if dropped:
            raise FileProblem(
                path,
                f"it holds {len(dropped)} weights of VSA's gates ({dropped[0]} is the first), "
                f"which {method.words()} would drop",
                'load it with method="vsa", gate=True',
            )
        headers = sort(Weights(plain=held), names)
        layers = list(attention_layers(model, family_of(model)))
        parameters = base_parameters(model)
        wanted = Weights(
            plain={n: tuple(parameters[n].shape) for n in stock_weights(model, layers)}
        )
        wanted.plain |= {n: tuple(p.shape) for n, p in parameters.items() if n in headers.plain}
        # Which layers have parameters of the method's, the file alone can say.
        wanted.own = {name: header.shape for name, header in headers.own.items()}
    else:
        headers = read_folder(record, headers=True)
        trained = method_of(record, (method, schedule))
        its = own_shapes(trained[0], model)
        own = {name for layer in its.values() for name in layer}
        headers = sort(headers, own)
        wanted = promised(record, model, *trained)
    check_promise(path, headers, wanted, model)
    for name, header in headers.own.items():
        layer, _, field_name = name.rpartition(".")
        wanted_shape = shapes.get(layer, {}).get(field_name)
        if wanted_shape != header.shape:
            asked = "" if wanted_shape is None else f", which wants {list(wanted_shape)}"
            raise FileProblem(path, f"{name} {list(header.shape)} does not fit {method}{asked}")
    if record is None:
        with reading(path, "it is no file of weights"):
            values = sort(Weights(plain=read_file(path)), names)
    else:
        values = sort(read_folder(record), own)
    _check_range(path, values, model)
    return values


def _check_range(path: Path, weights: Weights, model: torch.nn.Module) -> None:
    """Raise FileProblem where a value, finite in the file, is not in the model's own dtype."""
    parameters, used = base_parameters(model), compute_dtype(model) or model.dtype
    wanted = {name: parameters[name].dtype for name in weights.plain}
    wanted |= dict.fromkeys(weights.lora, used) | dict.fromkeys(weights.own, torch.float32)
    for name, x in weights.items():
        if not torch.isfinite(x.to(wanted[name]).float()).all():
            raise FileProblem(
                path,
                f"{name} holds values that {wanted[name]} has no room for",
                "load the model in the dtype that it was trained in, such as torch_dtype=bfloat16",
            )


class _HasLora:
    """A forward pre-hook: refuses passes that would leave the LoRA out."""

    def __init__(self, model: torch.nn.Module, loaded: _Loaded):
        self._loaded = loaded
        self._fusible = [m for m in model.modules() if hasattr(m, "fused_projections")]

    def __call__(self, model: torch.nn.Module, args) -> None:
        what = "the loaded adapter cannot be used"
        if any([layer.fused_projections for layer in self._fusible]):
            check_not_fused(model, what)
        if self._loaded.merged is None and not has_lora(model):
            check_has_lora(model, self._loaded.layers, what)


def _ask_for_gradients(model: torch.nn.Module, wanted: Mapping[str, bool]) -> None:
    for name, p in base_parameters(model).items():
        if name in wanted and p.requires_grad != wanted[name]:
            p.requires_grad_(wanted[name])


def _told_by_file(path: Path) -> tuple[str, dict]:
    """Method and options that a file tells: by its gates, or by its name where it is CLEAR's."""
    match = _CLEAR_NAME.search(path.stem)
    if match:
        window, down = match.groups()
        return "local", {"window": int(window)} | ({"downsample": int(down)} if down else {})
    with reading(path, "it is no file of weights"):
        if gates_in(read_file(path, headers=True)):
            return "vsa", {"gate": True}
    raise ValueError(
        f"{path.name} does not say which method its weights belong to; pass method='local', "
        "window=..., and downsample=... where it has one"
    )


def _values(model: torch.nn.Module, names) -> dict[str, torch.Tensor]:
    """Values of parameters by their names in the stock model, on the CPU."""
    parameters = base_parameters(model)
    return {name: parameters[name].detach().cpu().clone() for name in names}


@torch.no_grad()
def _set(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy values into parameters, by their names in the stock model.

    Where weights are kept in a smaller dtype than they are used in, they are rounded as the
    model's own were.
    """
    parameters, dtype = base_parameters(model), compute_dtype(model)
    for name, x in weights.items():
        p = parameters[name]
        p.copy_(x if dtype is None or x.dtype == p.dtype else x.to(dtype))


@torch.no_grad()
def _put_lora(
    model: torch.nn.Module, values: dict[str, torch.Tensor], lora: dict
) -> dict[str, torch.nn.Module]:
    """Put a LoRA in; the layers that hold it."""
    add_lora(model, lora["rank"], lora["alpha"], lora["targets"])
    try:
        parameters = dict(model.named_parameters())
        mine = {name for name in parameters if f".{ADAPTER}." in name}
        if mine != values.keys():
            odd = sorted(mine ^ values.keys())[0]
            raise ValueError(f"PEFT and the adapter disagree about {odd}; is PEFT another version?")
        for name, x in values.items():
            if parameters[name].shape != x.shape:
                raise ValueError(
                    f"{name} is {list(x.shape)}, PEFT wants {list(parameters[name].shape)}"
                )
        for name, x in values.items():
            parameters[name].copy_(x)
            parameters[name].requires_grad_(False)
    except BaseException:
        remove_lora(model)
        raise
    return lora_layers(model)


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


def merge(pipe: Pipeline) -> None:
    """Fold a loaded LoRA into the weights: no extra products, and nothing of PEFT is left.

    Weights that an adapter replaced are in their place already. :func:`unmerge` takes it back, to
    the bit.

    Raises:
        ValueError: no adapter is loaded, it is merged already, other LoRAs are loaded, or the
            weights are quantised or kept in 8 bits.
    """
    model, loaded = _loaded_in(pipe)
    if loaded.merged is not None:
        raise ValueError("the adapter is merged already")
    if loaded.lora is None:
        loaded.merged = {}
        return
    check_not_added(model, loaded.layers, "the adapter cannot be merged")
    check_has_lora(model, loaded.layers, "the adapter cannot be merged")
    others = sorted(set(model.peft_config) - {ADAPTER})
    if others:
        raise ValueError(
            f"other LoRAs are loaded ({', '.join(others)}); take them out first: "
            f"pipe.delete_adapters({others})"
        )
    layers = lora_layers(model)
    check_mergeable(model, layers.values())
    before = {}
    try:
        for name, module in layers.items():
            before[f"{name}.weight"] = module.base_layer.weight.detach().cpu().clone()
            module.merge(safe_merge=True, adapter_names=[ADAPTER])
    except BaseException:
        for module in layers.values():
            if module.merged:
                module.unmerge()
        _set(model, before)
        raise
    model.unload_lora()
    loaded.merged, loaded.layers = before, {}


def unmerge(pipe: Pipeline) -> None:
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
        loaded.layers = _put_lora(model, *loaded.lora)


def unload_adapter(pipe: Pipeline) -> None:
    """Take an adapter and its method out again; the weights are what they were, to the bit.

    Raises:
        ValueError: no adapter is loaded, projections were fused with its weights in them, or
            diffusers' ``fuse_lora`` added its LoRA to the weights, for good where
            ``unload_lora_weights`` followed.
    """
    model, loaded = _loaded_in(pipe)
    check_not_fused(model, "the adapter cannot be taken out")
    check_not_added(model, loaded.layers, "the adapter cannot be taken out")
    if loaded.merged is not None:
        _set(model, loaded.merged)
    elif loaded.lora is not None and has_lora(model):
        remove_lora(model)
    _set(model, loaded.original)
    if loaded.watch is not None:
        loaded.watch.remove()
    _ask_for_gradients(model, loaded.trainable)
    del model._dittfast_adapter
    if is_swapped(model):
        disable(pipe)
