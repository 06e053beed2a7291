"""Where a model comes from: an installed sample, a folder on disk or the Hugging Face hub."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from dittfast.disk.problems import reading
from dittfast.disk.records import read_json
from dittfast.disk.tensors import read_headers

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# What a sample model's folder may say; "*" goes to the pipeline's call where it takes it.
_SETTINGS = {
    "prompts?": [str],
    "negative_prompt?": (None, str),
    **dict.fromkeys(("height?", "width?", "num_frames?", "num_inference_steps?"), int),
    "max_sequence_length?": int,
    **dict.fromkeys(("guidance_scale?", "true_cfg_scale?"), float),
    "labels?": [str],
    "backgrounds?": [str],
    "motions?": [str],
    "first_frame?": {"model": str, "part?": float, "moving_words?": [str]},
    "stages?": {
        **dict.fromkeys(("strength?", "ntk_factor?"), float),
        "proportional?": bool,
        "later_call?": {"*": (None, bool, float)},
    },
    "training?": object,
    "*": (None, bool, float),
}
DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Source:
    """A pipeline that can be loaded.

    Attributes:
        kind: "sample", "folder" or "hub".
        name: what people call it: the sample's name, the folder's, the hub id.
        location: what ``from_pretrained`` takes.
        settings: for a sample model (also one in a folder) the call it was made for, and sample
            prompts; empty for any other.
    """

    kind: str
    name: str
    location: str
    settings: dict = field(default_factory=dict)


def sample_models() -> dict[str, Path]:
    """Folders of the sample models that are installed, by name."""
    folder = Path(str(resources.files("dittfast.samples"))) / "models"
    return {f.parent.name: f.parent for f in sorted(folder.glob("*/model_index.json"))}


def find(model: str) -> Source:
    """What ``model`` names: a sample model, else a folder, else an id on the hub.

    Raises:
        FileNotFoundError: neither a sample model nor a folder, and no hub id by its form.
        ValueError: a file, or a folder without a diffusers pipeline in it.
    """
    samples = sample_models()
    if model in samples:
        return Source("sample", model, str(samples[model]), _settings(samples[model]))
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ValueError(
                f"{model} is a folder without a model_index.json, so not a diffusers pipeline; "
                "name the folder that save_pretrained wrote"
            )
        return Source("folder", path.resolve().name, str(path), _settings(path))
    if path.exists():
        raise ValueError(f"{model} is a file; name the folder of a diffusers pipeline")
    if _HUB_ID.fullmatch(model):
        return Source("hub", model, model)
    near = difflib.get_close_matches(model, samples, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise FileNotFoundError(
        f"no model {model!r}.{hint} Sample models here: {', '.join(samples) or 'none'}. A folder "
        "with a diffusers pipeline, or a hub id such as black-forest-labs/FLUX.1-dev, works too"
    )


def _settings(folder: Path) -> dict:
    file = folder / "sample.json"
    if not file.is_file():
        return {}
    settings = read_json(file, _SETTINGS)
    if "first_frame" in settings:
        settings["first_frame"]["within"] = str(folder)
    return settings


def find_named_by(model: str, folder: str | Path) -> Source:
    """The model that a model's folder names in its ``sample.json``: what the folder itself brings,
    or an installed sample. Nothing else is read or fetched because a folder says so.

    Raises:
        ValueError: it names anything else.
    """
    folder = Path(folder).resolve()
    inside = (folder / model).resolve()
    if model not in sample_models():
        if folder not in inside.parents or not inside.is_dir():
            raise ValueError(
                f"{folder / 'sample.json'} names the model {model!r}, which is neither an "
                "installed sample model nor a folder inside that one, so it is not used unasked; "
                "pass the first frame yourself with --image FILE"
            )
        model = str(inside)
    return find(model)


def choose_device(device: str = "auto"):
    """The ``torch.device`` meant by "auto" (the accelerator if there is one), "cpu", "cuda:1" ...

    Raises:
        ValueError: not a device, or one that is not here.
    """
    import torch

    from dittfast.environment import devices

    here = devices()
    if device == "auto":
        return here[1] if len(here) > 1 else here[0]
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"{device!r} is no device; use auto, cpu, cuda, cuda:1 ...") from error
    if not any(x.type == wanted.type and wanted.index in (None, x.index or 0) for x in here):
        raise ValueError(f"there is no device {device} here; found {', '.join(map(str, here))}")
    return wanted


def choose_dtype(dtype: str, device):
    """The ``torch.dtype`` meant by a name; "auto" is bfloat16 on accelerators, float32 on CPUs."""
    import torch

    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, dtype)


def transformer_classes(source: Source) -> dict[str, str]:
    """The classes of a pipeline's transformers by component, from its folder; none for a hub id.

    Raises:
        ValueError: a model_index.json that is no such file.
    """
    if source.kind == "hub":
        return {}
    file = Path(source.location) / "model_index.json"
    index = read_json(file, dict, "save the pipeline again with save_pretrained")
    named = {k: v for k, v in index.items() if re.fullmatch(r"transformer(_\d+)?", k)}
    with reading(file, "it is no model_index.json of diffusers"):
        return {k: str(v[1]) for k, v in named.items() if v[0] is not None}


def load(source: Source, device="cpu", dtype=None, **more):
    """The ``DiffusionPipeline`` of a source, on a device; None leaves it where it was loaded.

    Args:
        more: further arguments of ``from_pretrained``.

    Raises:
        ValueError: it could not be loaded; the message says why, and for a hub id what to do
            without a network; or diffusers would leave out a part of it that changes its pictures.
    """
    import diffusers

    _refuse_gates(source)
    version = tuple(int(x) for x in diffusers.__version__.split(".")[:2])
    options = {"dtype" if version >= (0, 42) else "torch_dtype": dtype}
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            source.location, local_files_only=source.kind != "hub", **options, **more
        )
    except Exception as error:  # each loader raises its own: OSError, KeyError, SafetensorError ...
        if source.kind == "hub":
            raise ValueError(
                f"could not load {source.name}: there is no folder of that name here, and the "
                f"Hugging Face hub did not deliver it ({_root_cause(error)}). Without a network, "
                f"fetch it elsewhere (hf download {source.name} --local-dir FOLDER) and pass that "
                "folder as the model"
            ) from error
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"could not load the pipeline in {source.location}: {type(error).__name__}: {reason}"
        ) from error
    return pipe if device is None else pipe.to(device)


def _refuse_gates(source: Source) -> None:
    """Raise ValueError where a transformer was trained with VSA's gates, which diffusers drops."""
    if source.kind == "hub":
        return
    for path in sorted(Path(source.location).glob("transformer*/*.safetensors")):
        gates = [name for name in read_headers(path) if ".to_gate_compress." in f".{name}"]
        if gates:
            raise ValueError(
                f"{path} holds {len(gates)} weights of VSA's gates ({gates[0]} is the first), "
                "which diffusers would leave out; load the model that it was trained from, and "
                "this file with --adapter, or dittfast.load_adapter"
            )


def _root_cause(error: BaseException) -> str:
    """The first error of a chain, in one short line."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
