"""What an adapter's files hold, and whether that is all of what they promise.

Everything is known from ``adapter.json`` and the headers of the safetensors files, so a file that
does not fit is refused before a value is read or anything is allocated.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dittfast.config import KINDS, presets, resolve
from dittfast.disk.inside import path_inside
from dittfast.disk.problems import FileProblem, reading
from dittfast.disk.records import Record, read_json, read_record, read_text
from dittfast.disk.structure import check_structure
from dittfast.disk.tensors import Header, check_finite, read_headers, read_tensors
from dittfast.methods.base import Method
from dittfast.mixture import Assignment
from dittfast.pipelines.fingerprint import base_parameters
from dittfast.pipelines.models import attention_layers, family_of, head_shape
from dittfast.schedule import Schedule

from .lora import ADAPTER, lora_shapes

FORMAT = 2
# Format 1 wrote a method's own parameters without OWN before their names.
READABLE = (1, 2)
DESCRIPTION = "adapter.json"
CARD = "README.md"
WEIGHTS = "attention.safetensors"
# The name that pipe.load_lora_weights looks for.
LORA = "pytorch_lora_weights.safetensors"
# Before the names of the method's own parameters, lest one named "weight" be taken for the model's.
OWN = "method."
# VSA's gates in FastVideo's checkpoints.
_GATE = re.compile(r"(.*)\.to_gate_compress\.(weight|bias)")
AGAIN = "get the adapter's files again from where they came"
CHANGED = f"{AGAIN}, or pass verify=False if the change was meant"
# Method and schedule in the card, as Python shows them.
_SHOWN = re.compile(r"^\| (method|schedule) \| `(\w+)\((.*)\)` \|$", re.MULTILINE)

_FORM = {
    "format": int,
    "dittfast": str,
    "base": {
        "model": str,
        "component": str,
        "fingerprint": {"class": str, "shapes": str, "values": {"*": [float]}},
    },
    "method": str,
    "options": dict,
    "preset": str,
    "schedule": dict,
    "trainable": str,
    "lora": (None, {"rank": int, "alpha": float, "targets": [str]}),
    "config": dict,
    "run": dict,
}


@dataclass
class Weights:
    """An adapter's tensors, by the names of what they belong to.

    Attributes:
        own: the method's parameters, by layer and field, such as "blocks.0.attn.spatial_weight".
        lora: the LoRA's, by their names in the model.
        plain: the model's own, by their names in the stock model.
    """

    own: dict = field(default_factory=dict)
    lora: dict = field(default_factory=dict)
    plain: dict = field(default_factory=dict)

    def items(self) -> list[tuple[str, object]]:
        return [*self.own.items(), *self.lora.items(), *self.plain.items()]


def read_description(folder: str | Path, verify: bool = True) -> Record:
    """The description of an adapter folder, and the digests of the files beside it.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: another version wrote it, or it is damaged.
    """
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no adapter: there is no {DESCRIPTION} in it")
    record = read_record(path, {"format": int, "*": object}, verify=verify, remedy=CHANGED)
    if record.data["format"] not in READABLE:
        raise FileProblem(
            path,
            f"it has format {record.data['format']}, this version reads "
            f"{' and '.join(map(str, READABLE))}",
            "a newer dittfast wrote it: pip install -U dittfast",
        )
    with reading(path, "it is no description of an adapter", AGAIN):
        check_structure(record.data, _FORM)
    return record


def method_of(
    record: Record, instead: tuple[Method, Schedule] | None = None
) -> tuple[Method, Schedule]:
    """The method that an adapter was trained with, and its schedule.

    Args:
        instead: what it is where the adapter does not tell.

    Raises:
        ValueError: it names none, or a file alone: an adapter brings no files of methods.
    """
    data = record.data
    with reading(record.path, "its method cannot be had", AGAIN):
        told = told_method(record)
        if told is None and instead is not None:
            return instead
        if told is None:
            given = {"method": data["preset"], **data["options"]}
            words = ", ".join(f"{name}={value!r}" for name, value in given.items())[:300]
            raise FileProblem(
                record.path,
                f"it names {data['preset']!r}, which is no method or preset here, and no "
                f"{CARD} beside it tells the method's options",
                f"if that is a file that you have, pass it: load_adapter(..., {words})",
            )
        # Sizes are checked by the method; what it allocates for them is not.
        with torch.device("meta"):
            return resolve(told[0], **told[1])


def told_method(record: Record) -> tuple[Method | str, dict] | None:
    """Method and options, as :func:`resolve` takes them; None where the adapter does not tell."""
    data = record.data
    if data["preset"] in KINDS or data["preset"] in presets():
        return data["preset"], {"min_tokens": 0, **data["schedule"], **data["options"]}
    # Earlier versions: an adapter trained with a YAML file of the user's named that file. It may
    # lie anywhere and hold anything by now; the card tells what was in it.
    classes = {"method": KINDS.get(data["method"]), "schedule": Schedule}
    card = path_inside(record.path.parent, CARD)
    if classes["method"] is None or not card.is_file():
        return None
    shown = {what: (name, fields) for what, name, fields in _SHOWN.findall(read_text(card))}
    if any(shown.get(what, ("",))[0] != cls.__name__ for what, cls in classes.items()):
        return None
    with reading(card, "it does not tell the method's options", AGAIN), torch.device("meta"):
        method, schedule = (cls(**_literals(shown[what][1])) for what, cls in classes.items())
    return method, vars(schedule)


def _literals(fields: str) -> dict:
    """``name=value, ...`` as Python shows the fields of a dataclass; plain values alone."""
    call = ast.parse(f"dict({fields})", mode="eval").body
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}


def own_shapes(method: Method, model: torch.nn.Module) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of a method's parameters in each layer of a model; nothing is allocated.

    Raises:
        ValueError: no machine could hold them, or the method does not fit the model's layers.
    """
    family = family_of(model)
    layers = attention_layers(model, family)
    shapes = {n: (*head_shape(family, m), family.hidden_width(m)) for n, m in layers.items()}
    assignment = Assignment(method, {name: heads for name, (heads, *_) in shapes.items()})
    return {layer: assignment.parameter_shapes(layer, *shapes[layer][1:]) for layer in shapes}


def promised(record: Record, model: torch.nn.Module, method: Method, schedule: Schedule) -> Weights:
    """The shapes of all tensors that an adapter must bring for a model; None where unknown.

    Args:
        method, schedule: the adapter's own.
    """
    data = record.data
    layers = list(attention_layers(model, family_of(model)))
    with reading(record.path, "it does not fit the model"):
        dense = schedule.dense_layer_names(layers)
    weights = Weights()
    with reading(record.path, "its method's options are impossible", AGAIN):
        shapes = own_shapes(method, model)
    weights.own = {
        f"{layer}.{name}": shape
        for layer, own in shapes.items()
        if layer not in dense
        for name, shape in own.items()
    }
    parameters = base_parameters(model)
    if data["trainable"] == "attention":
        weights.plain = {n: tuple(parameters[n].shape) for n in stock_weights(model, layers)}
    elif data["trainable"] == "all":
        weights.plain = {name: tuple(p.shape) for name, p in parameters.items()}
    elif data["trainable"] not in ("lora", "method"):
        raise FileProblem(record.path, f"trainable is {data['trainable']!r}", AGAIN)
    lora = data["lora"]
    if (lora is not None) != (data["trainable"] == "lora"):
        raise FileProblem(record.path, "lora and trainable contradict each other", AGAIN)
    if lora is not None:
        rank, alpha, targets = lora["rank"], lora["alpha"], lora["targets"]
        # By their ratio the LoRA's product is multiplied, in fp32 at most.
        if not targets or rank < 1 or not 0 < alpha / rank < torch.finfo(torch.float32).max:
            raise FileProblem(record.path, f"rank {rank} and alpha {alpha} on {targets}", AGAIN)
        weights.lora = lora_shapes(model, lora["rank"], lora["targets"])
    return weights


def stock_weights(model: torch.nn.Module, layers: Iterable[str]) -> list[str]:
    """Names in the stock model of the to_q, to_k, to_v and to_out parameters of some layers."""
    names = family_of(model).projection_weights(model, list(layers))
    return [name.replace(".base_layer.", ".") for name in names]


def read_folder(record: Record, headers: bool = False) -> Weights:
    """The tensors of an adapter folder, or their headers alone.

    Raises:
        FileProblem: a file is damaged, was changed, or holds values that are not finite.
        FileNotFoundError: a file that the adapter needs is missing.
    """
    folder, data = record.path.parent, record.data
    weights = Weights()
    for name in (WEIGHTS, LORA):
        path = folder / name
        if not path.is_file():
            if name in record.sums or (name == LORA and data["lora"] is not None):
                raise FileNotFoundError(f"{path} is missing; {AGAIN}")
            continue
        if headers:
            tensors = read_headers(path, AGAIN)
        else:
            tensors = read_tensors(record.check(name, CHANGED), remedy=AGAIN)
            check_finite(path, tensors, AGAIN)
        for key, x in tensors.items():
            _put(weights, key, x, data, name == LORA)
    return weights


def _put(weights: Weights, key: str, x, data: dict, lora: bool) -> None:
    if lora:
        key = key.removeprefix(f"{data['base']['component']}.")
        weights.lora[re.sub(r"\.(lora_[AB])\.", rf".\1.{ADAPTER}.", key)] = x
    elif key.startswith(OWN):
        weights.own[key.removeprefix(OWN)] = x
    else:
        weights.plain[key] = x


def read_file(path: Path, headers: bool = False) -> dict:
    """The tensors of a file in the layout of published checkpoints, or their headers.

    CLEAR's and FastVideo's: ``...attn.to_q.weight`` and ``...attn.processor.spatial_weight``, with
    or without a leading ``transformer.``. Of the index of a checkpoint in several files, which
    diffusers names ``...safetensors.index.json``, those of all of them.
    """
    found = {}
    for part in _files_of(path):
        tensors = read_headers(part, AGAIN) if headers else read_tensors(part, remedy=AGAIN)
        if not headers:
            check_finite(part, tensors, AGAIN)
        found |= {_plain_name(name): _square(name, x) for name, x in tensors.items()}
    return found


def _files_of(path: Path) -> list[Path]:
    """The files beside an index that it names; of anything else the file itself."""
    if not path.name.endswith(".index.json"):
        return [path]
    index = read_json(path, {"weight_map": {"*": str}, "*": object}, AGAIN)
    names = sorted(set(index["weight_map"].values()))
    for name in names:  # files of the hub's cache are links, which path_inside refuses
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise FileProblem(path, f"it names {name!r}, which is no file beside it", AGAIN)
    if not names:
        raise FileProblem(path, "it names no file", AGAIN)
    return [path.parent / name for name in names]


def _plain_name(name: str) -> str:
    name = re.sub(r"^(module\.)?(transformer\.)?", "", name)
    return name.replace(".processor.spatial_weight", ".spatial_weight")


def _square(name: str, x):
    """CLEAR's spatial weights are ``[1, 1, 1, s, 1, s, 1]``."""
    if not name.endswith("spatial_weight"):
        return x
    count = torch.Size(x.shape).numel()
    side = round(count**0.5)
    if side * side != count:
        raise ValueError(f"{name} has {count} values, which is no square")
    return Header(x.dtype, (side, side)) if isinstance(x, Header) else x.reshape(side, side)


def gates_in(names: Iterable[str]) -> list[str]:
    """Those names that are of VSA's gates, as FastVideo's checkpoints have them."""
    return [name for name in names if _GATE.fullmatch(name)]


def place_gates(path: Path, tensors: dict, model: torch.nn.Module) -> dict:
    """The same with the gates under the names that they have here, in their layers.

    FastVideo writes ``blocks.0.to_gate_compress.weight``, for a block or for the attention in it.

    Raises:
        FileProblem: a gate of something that has no self-attention, or several.
    """
    layers, placed = list(attention_layers(model, family_of(model))), {}
    for name, x in tensors.items():
        match = _GATE.fullmatch(name)
        if match is not None:
            owner, kind = match.groups()
            own = [n for n in layers if n == owner or n.startswith(f"{owner}.")]
            if len(own) != 1:
                raise FileProblem(
                    path,
                    f"{name} has no place: {owner} has {len(own)} layers of self-attention in "
                    f"{type(model).__name__}",
                    "load it into the model that it was trained for",
                )
            name = f"{own[0]}.gate_{kind}"
        placed[name] = x
    return placed


def sort_out(tensors: dict, model: torch.nn.Module, own: Iterable[str]) -> Weights:
    """What belongs to the method and what to the model, of names that do not say it.

    Args:
        own: names of the method's parameters.
    """
    in_model, own = base_parameters(model), set(own)
    weights = Weights()
    for name, x in tensors.items():
        mine = name not in in_model and name.rpartition(".")[2] in own
        (weights.own if mine else weights.plain)[name] = x
    return weights


def check_promise(path: Path, headers: Weights, wanted: Weights, model: torch.nn.Module) -> None:
    """Compare headers with what must be there.

    Raises:
        FileProblem: a tensor that is missing or that nothing asks for, another shape, or no
            floating-point dtype.
    """
    parameters = base_parameters(model)
    have, want = dict(headers.items()), dict(wanted.items())
    for name in have:
        if name not in want:
            what = "is not described in adapter.json"
            if name in headers.plain and name not in parameters:
                what = f"has no place: {type(model).__name__} has no parameter {name}"
            raise FileProblem(path, f"{name} {what}", AGAIN)
    for name, header in have.items():
        if not header.is_floating:
            raise FileProblem(path, f"{name} has dtype {header.dtype}, weights are floats", AGAIN)
        if want[name] is not None and tuple(want[name]) != header.shape:
            whose = "the model's" if name in headers.plain else "the one promised"
            raise FileProblem(
                path, f"{name} is {list(header.shape)}, {whose} is {list(want[name])}", AGAIN
            )
    missing = [name for name in want if name not in have]
    if missing:
        raise FileProblem(
            path,
            f"{len(missing)} of {len(want)} tensors are missing ({missing[0]} is the first)",
            AGAIN,
        )


def read_weights(path: str | Path, verify: bool = True) -> dict[str, torch.Tensor]:
    """Trained parameters of an adapter folder or a weights file, by their names in the model.

    The method's own parameters have :data:`OWN` before the name of their layer, but in a file.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: it is damaged, or holds values that are not finite.
    """
    path = Path(path)
    if path.is_file():
        with reading(path, "it is no file of weights", AGAIN):
            return read_file(path)
    weights = read_folder(read_description(path, verify))
    return {OWN + name: x for name, x in weights.own.items()} | weights.lora | weights.plain
