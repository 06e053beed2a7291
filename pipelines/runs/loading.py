"""How a pipeline is loaded and what is put into it: LoRAs, quantisation, offload, compilation."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from ..models import transformers_of
from . import sources
from .sources import Source

logger = logging.getLogger(__name__)

OFFLOADS = ("model", "group", "sequential")
# name -> (what it is in diffusers, the package that does it).
QUANTIZATIONS = {
    "int8": ("torchao", "torchao"),
    "fp8": ("layerwise casting", None),
    "bnb-int8": ("bitsandbytes", "bitsandbytes"),
    "bnb-nf4": ("bitsandbytes", "bitsandbytes"),
    "gguf": ("gguf", "gguf"),
}


@dataclass(frozen=True)
class Lora:
    """A LoRA file, how strongly it counts, and the transformer that it is for."""

    path: str
    scale: float = 1.0
    component: str = "transformer"

    @classmethod
    def parse(cls, text: str, component: str = "transformer") -> Lora:
        """``FILE`` or ``FILE:SCALE``."""
        path, colon, scale = text.rpartition(":")
        if colon and not Path(text).is_file():
            try:
                return cls(path, float(scale), component)
            except ValueError:
                pass
        return cls(text, 1.0, component)


@dataclass(frozen=True)
class Loading:
    """What is done to a pipeline beside reading it; the fields are the options of that name.

    Attributes:
        loras: LoRA files in the layouts that diffusers reads (its own, kohya, ComfyUI, lightx2v).
        offload: "model", "group" or "sequential": where weights wait until they are needed.
        quantize: "int8" (torchao), "fp8" (weights stored so, cast layer by layer), "bnb-int8",
            "bnb-nf4", or "gguf:FILE" with a file for each transformer, separated by commas.
    """

    loras: tuple[Lora, ...] = ()
    offload: str | None = None
    quantize: str | None = None
    vae_tiling: bool = False
    compile: bool = False
    attention_backend: str | None = None

    def to_dict(self) -> dict:
        """What differs from a plain load, as plain data for records."""
        plain = dataclasses.asdict(self) | {"loras": [dataclasses.asdict(x) for x in self.loras]}
        return {name: value for name, value in plain.items() if value}


def check_loading(how: Loading, source: Source, device: torch.device) -> None:
    """All that can be checked before anything is loaded.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind, a package that is missing, an unknown name, or what
            does not work on this device; with the remedy.
    """
    known = sources.transformer_classes(source)
    for lora in how.loras:
        _check_lora(lora, source, known)
    if how.loras and importlib.util.find_spec("peft") is None:
        raise ValueError("--lora needs the package peft, and it is not installed; pip install peft")
    if how.offload is not None:
        if how.offload not in OFFLOADS:
            raise ValueError(f"offload must be one of {', '.join(OFFLOADS)}, got {how.offload!r}")
        if device.type == "cpu":
            raise ValueError(
                f"--offload {how.offload} keeps weights in the memory of the CPU until an "
                "accelerator needs them, and this run is on the CPU; leave it out"
            )
    if how.quantize is not None:
        _check_quantize(how.quantize, source, known, device)
    if how.attention_backend is not None:
        from diffusers.models.attention_dispatch import AttentionBackendName

        from dittfast.config import unknown

        known = [name.value for name in AttentionBackendName]
        if how.attention_backend not in known:
            raise unknown("attention backend of diffusers", how.attention_backend, known)


def load_with(source: Source, device, dtype, how: Loading):
    """The pipeline of a source on a device, with all of ``how`` in it.

    Raises:
        ValueError: as :func:`~dittfast.pipelines.runs.sources.load`; a LoRA that is for another
            model, a VAE that cannot tile, a backend of attention that does not run here.
    """
    pipe = sources.load(source, None, dtype, **_quantized(how, source, dtype))
    models = transformers_of(pipe)
    for number, lora in enumerate(how.loras):
        _put_lora(pipe, lora, f"lora{number}")
    if len(how.loras) > 0:
        _set_scales(models, how.loras)
    if how.attention_backend is not None:
        _set_backend(models, how.attention_backend)
    if how.vae_tiling:
        if not hasattr(getattr(pipe, "vae", None), "enable_tiling"):
            raise ValueError(
                f"{type(pipe).__name__} has no VAE that works in tiles; leave out --vae-tiling"
            )
        pipe.vae.enable_tiling()
    if how.quantize == "fp8":
        for model in models.values():
            model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    _place(pipe, how.offload, torch.device(device))
    if how.compile:
        for model in models.values():
            (model.compile_repeated_blocks if _repeats(model) else model.compile)()
    return pipe


def _repeats(model) -> bool:
    return bool(getattr(model, "_repeated_blocks", None))


def _place(pipe, offload: str | None, device: torch.device) -> None:
    if offload is None:
        pipe.to(device)
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        # On CUDA the next group is copied while the last one computes.
        pipe.enable_group_offload(
            device, offload_type="leaf_level", use_stream=device.type == "cuda"
        )


def _check_lora(lora: Lora, source: Source, known: dict[str, str]) -> None:
    path = Path(lora.path)
    if not path.is_file():
        raise FileNotFoundError(f"no LoRA at {lora.path}; name a .safetensors file, or FILE:SCALE")
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path}: a LoRA is read from .safetensors only, for other files can hold code; "
            "convert it, or ask its author for one"
        )
    if not abs(lora.scale) < 100:
        raise ValueError(f"the scale of {path} must lie between -100 and 100, got {lora.scale}")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no safetensors file that can be read: {error}") from error
    if not any("lora" in name.lower() for name in names):
        raise ValueError(
            f"{path} holds no LoRA: none of its {len(names)} tensors is named one "
            f"({', '.join(names[:3])} ...)"
        )
    if known and lora.component not in known:
        raise ValueError(
            f"{source.name} has no {lora.component}, only {', '.join(known)}; leave out --lora-2"
        )


def _put_lora(pipe, lora: Lora, name: str) -> None:
    """Load a LoRA into its transformer; refused where nothing in it is for this model."""
    path = Path(lora.path)
    more = {} if lora.component == "transformer" else {"load_into_transformer_2": True}
    if not hasattr(pipe, "load_lora_weights"):
        raise ValueError(f"{type(pipe).__name__} takes no LoRA; leave out --lora")
    try:
        pipe.load_lora_weights(
            str(path.parent),
            weight_name=path.name,
            adapter_name=name,
            local_files_only=True,
            # Else biases that only some layers have are left without values in the others.
            low_cpu_mem_usage=False,
            **more,
        )
    except Exception as error:  # each layout has its own way to fail
        reason = " ".join(str(error).split())[:240]
        raise ValueError(f"{path} cannot be put into {type(pipe).__name__}: {reason}") from error
    model = transformers_of(pipe)[lora.component]
    if name not in getattr(model, "peft_config", {}):
        raise ValueError(
            f"{path} holds no layer of {lora.component} ({type(model).__name__}); it is for "
            "another model"
        )
    lost = _left_out(path)
    if lost:
        logger.warning(
            "%s: diffusers leaves out %d whole weights that it changes (%s ...), so the model is "
            "not quite what the LoRA was trained to make of it", path, len(lost), lost[0],
        )  # fmt: skip


def _left_out(path: Path) -> list[str]:
    """Differences of whole weights in a LoRA file that are not zero: no layout of diffusers has a
    place for them, and it drops them without a word."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        names = list(file.keys())
        names = [n for n in names if n.endswith(".diff") or (n.endswith(".diff_b") and "norm" in n)]
        return [name for name in names if file.get_tensor(name).count_nonzero()]


def _set_scales(models: dict, loras) -> None:
    for component, model in models.items():
        mine = [(f"lora{n}", x.scale) for n, x in enumerate(loras) if x.component == component]
        if mine:
            names, scales = zip(*mine)
            model.set_adapters(list(names), list(scales))


def _set_backend(models: dict, name: str) -> None:
    """The models' attention backend; diffusers' setter changes the default of the process, too."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    before = registry.get_active_backend()[0]
    try:
        for model in models.values():
            model.set_attention_backend(name)
    except (ImportError, RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the attention backend {name} does not run here: {reason}") from error
    finally:
        registry.set_active_backend(before)


def _files_of(quantize: str) -> tuple[str, list[str]]:
    """``"gguf:a,b"`` as ``("gguf", ["a", "b"])``."""
    kind, _, rest = quantize.partition(":")
    return kind, [x for x in rest.split(",") if x]


def _check_quantize(
    quantize: str, source: Source, known: dict[str, str], device: torch.device
) -> None:
    kind, files = _files_of(quantize)
    if kind not in QUANTIZATIONS:
        from dittfast.config import unknown

        raise unknown("quantisation", kind, QUANTIZATIONS)
    library, package = QUANTIZATIONS[kind]
    if package is not None and importlib.util.find_spec(package) is None:
        raise ValueError(
            f"--quantize {kind} needs the package {package}, and it is not installed; "
            f"pip install {package}"
        )
    if library == "bitsandbytes" and device.type != "cuda":
        raise ValueError(f"--quantize {kind} runs on CUDA devices, not on {device}; use int8")
    if kind != "gguf":
        if files:
            raise ValueError(f"--quantize {kind} takes no file, got {quantize!r}")
        return
    for name in files:
        if not Path(name).is_file():
            raise FileNotFoundError(f"no GGUF file at {name}")
        with open(name, "rb") as file:
            begins = file.read(4)
        if begins != b"GGUF":
            raise ValueError(f"{name} is no GGUF file: it does not begin with GGUF")
    if not known:
        raise ValueError(
            f"--quantize gguf needs the model's folder for its configuration; fetch {source.name} "
            "and name the folder"
        )
    if len(files) != len(known):
        raise ValueError(
            f"--quantize gguf takes a file for each of {', '.join(known)}, as gguf:FILE"
            f"{',FILE' * (len(known) - 1)}; got {len(files)}"
        )


def _quantized(how: Loading, source: Source, dtype) -> dict:
    """What ``from_pretrained`` takes for it."""
    if how.quantize in (None, "fp8"):
        return {}
    import diffusers

    kind, files = _files_of(how.quantize)
    components = sources.transformer_classes(source) or {"transformer": None}
    if kind == "gguf":
        return {
            name: getattr(diffusers, cls).from_single_file(
                file,
                config=source.location,
                subfolder=name,
                quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=dtype),
                torch_dtype=dtype,
            )
            for (name, cls), file in zip(components.items(), files)
        }
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        config = diffusers.TorchAoConfig(Int8WeightOnlyConfig())
    elif kind == "bnb-int8":
        config = diffusers.BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = diffusers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    mapping = dict.fromkeys(components, config)
    return {"quantization_config": diffusers.PipelineQuantizationConfig(quant_mapping=mapping)}


def parameter_count(source: Source) -> int | None:
    """Weights in the safetensors files of a folder, by their headers; None where it has none."""
    files = sorted(Path(source.location).glob("*/*.safetensors")) if source.kind != "hub" else []
    total = 0
    for path in files:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size:
                return None  # damaged; loading says so
            try:
                header = json.loads(file.read(size))
            except ValueError:
                return None
        for name, entry in header.items():
            if name != "__metadata__":
                count = 1
                for n in entry["shape"]:
                    count *= n
                total += count
    return total or None
