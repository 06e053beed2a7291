"""What a pipeline passes to its transformer, recorded by asking the pipeline itself.

Every pipeline knows best how its prompts become forward arguments. So nothing here encodes a
prompt: the pipeline is called, and the first call of its transformer is looked at. That makes
training work for any pipeline whose transformer takes ``hidden_states`` and ``timestep``.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import torch

from dittfast.pipelines.models import bind_arguments, known_family
from dittfast.pipelines.runs.run import without_rounding_by_one

# Given by the training step, not by the recording.
_INPUTS = ("hidden_states", "timestep")


class _Enough(Exception):
    """Leaves the pipeline after the first call of its transformer."""


@dataclass
class Conditioning:
    """The forward arguments of one sample, but for the noisy latents and the time.

    Attributes:
        own: tensors ``[1, ...]`` that belong to the sample, by argument name; entries of lists
            and tuples as ``name.0``, ``name.1``. ``hidden_states`` is what a pipeline appends to
            the noisy latents' channels, absent where it appends nothing.
        shared: tensors without a batch dimension, such as position ids.
        constants: other arguments, as JSON has them.
        latent_shape: of the noisy latents in ``hidden_states``, ``[1, ...]``.
        timestep: as the pipeline passed it in the recorded call.
    """

    own: dict[str, torch.Tensor] = field(default_factory=dict)
    shared: dict[str, torch.Tensor] = field(default_factory=dict)
    constants: dict[str, object] = field(default_factory=dict)
    latent_shape: tuple[int, ...] = ()
    timestep: float = 0.0


def _flatten(name: str, value):
    """(name, tensor or plain value) of an argument and, for lists of tensors, of its entries."""
    if isinstance(value, (list, tuple)) and any(torch.is_tensor(x) for x in value):
        for index, entry in enumerate(value):
            yield from _flatten(f"{name}.{index}", entry)
    else:
        yield name, value


def unflatten(arguments: dict) -> dict:
    """``name.0``, ``name.1`` back into a tuple under ``name``."""
    result: dict = {}
    for name, value in arguments.items():
        base, dot, index = name.partition(".")
        if dot:
            result.setdefault(base, {})[int(index)] = value
        else:
            result[name] = value
    return {
        name: tuple(value[i] for i in sorted(value)) if isinstance(value, dict) else value
        for name, value in result.items()
    }


def _read(model: torch.nn.Module, args: tuple, kwargs: dict) -> Conditioning:
    arguments = bind_arguments(model, args, kwargs)
    for name in _INPUTS:
        if not torch.is_tensor(arguments.get(name)):
            raise ValueError(
                f"{type(model).__name__} was called without a tensor {name!r}; training knows "
                "transformers that take hidden_states and timestep"
            )
    latents = arguments["hidden_states"]
    batch, channels = latents.shape[:2]
    family = known_family(model)
    noisy = model.config.out_channels if family and family.appended_channels else channels
    # Of a batch for guidance, the row of the prompt.
    row = slice(1) if family and family.cond_first else slice(-1, None)
    conditioning = Conditioning(
        latent_shape=(1, noisy, *latents.shape[2:]), timestep=float(arguments["timestep"].max())
    )
    if noisy < channels:
        conditioning.own["hidden_states"] = latents[row, noisy:].detach().clone()
    for key, argument in arguments.items():
        if key in _INPUTS or key == "return_dict" or argument is None:
            continue
        for name, value in _flatten(key, argument):
            if not torch.is_tensor(value):
                _check_constant(type(model).__name__, name, value)
                if value not in ({}, [], None):
                    conditioning.constants[name] = value
            elif value.ndim and value.shape[0] == batch:
                conditioning.own[name] = value[row].detach().clone()
            else:
                conditioning.shared[name] = value.detach().clone()
    return conditioning


def _check_constant(model: str, name: str, value) -> None:
    entries = value.values() if isinstance(value, dict) else value
    nested = isinstance(value, (dict, list, tuple))
    if nested:
        for entry in entries:
            _check_constant(model, name, entry)
    elif not isinstance(value, (bool, int, float, str, type(None))):
        raise ValueError(
            f"{model} takes {name} as {type(value).__name__}, which cannot be cached for training"
        )


@contextlib.contextmanager
def recording(model: torch.nn.Module, stop: bool = False):
    """Inside, the first call of ``model`` is recorded into the list that the block gets.

    Args:
        stop: leave the pipeline before the model runs; the block must be the pipeline's call.
    """
    calls: list[Conditioning] = []

    def hook(module, args, kwargs):
        if not calls:
            calls.append(_read(module, args, kwargs))
            if stop:
                raise _Enough

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield calls
    except _Enough:
        pass
    finally:
        handle.remove()


@torch.no_grad()
def condition(pipe, model: torch.nn.Module, call: dict) -> Conditioning:
    """What ``pipe(**call)`` would pass to ``model``; nothing is denoised."""
    with recording(model, stop=True) as calls, without_rounding_by_one(pipe):
        pipe(**call, output_type="latent")
    return _only(calls, model)


@torch.no_grad()
def draw(pipe, model: torch.nn.Module, call: dict) -> tuple[torch.Tensor, Conditioning]:
    """Final latents ``[1, ...]`` of ``pipe(**call)``, and what it passed to ``model``."""
    with recording(model) as calls, without_rounding_by_one(pipe):
        out = pipe(**call, output_type="latent")
    conditioning = _only(calls, model)
    latents = out.images if hasattr(out, "images") else out.frames
    if tuple(latents.shape) != conditioning.latent_shape:
        raise ValueError(
            f"{type(pipe).__name__} passes {list(conditioning.latent_shape)} to its transformer "
            f"for latents of {list(latents.shape)}; training knows pipelines whose transformer "
            "gets the noisy latents and nothing beside them"
        )
    return latents.detach(), conditioning


def _only(calls: list[Conditioning], model: torch.nn.Module) -> Conditioning:
    if not calls:
        raise ValueError(
            f"the pipeline never called its {type(model).__name__}; is model.component right?"
        )
    return calls[0]


@torch.no_grad()
def encode(pipe, frames: torch.Tensor, latent_shape: tuple[int, ...]) -> torch.Tensor:
    """Latents of a picture or a clip, normalised and packed as the transformer takes them.

    Args:
        frames: ``[F, H, W, 3]`` uint8; F = 1 for a picture.
        latent_shape: what the transformer takes, ``[1, ...]``.

    Raises:
        ValueError: no arrangement of the latents has that shape.
    """
    vae = getattr(pipe, "vae", None)
    pixels = frames.movedim(-1, 1) / 127.5 - 1  # [F, 3, H, W]
    if vae is None:  # a pixel transformer
        latents = pixels
    else:
        pixels = pixels.to(vae.device, vae.dtype)
        pixels = pixels.movedim(0, 1)[None] if _encodes_video(vae) else pixels
        latents = _normalise(vae, vae.encode(pixels).latent_dist.mode())
    for arranged in _arrangements(pipe, latents):
        if tuple(arranged.shape) == tuple(latent_shape):
            return arranged
    raise ValueError(
        f"frames {list(frames.shape)} become latents {list(latents.shape)}, the transformer "
        f"takes {list(latent_shape)}; check data.call.height, width and num_frames"
    )


def _encodes_video(vae) -> bool:
    return any(isinstance(m, torch.nn.Conv3d) for m in vae.modules())


def _normalise(vae, latents: torch.Tensor) -> torch.Tensor:
    config = vae.config
    mean, std = (config.get(f"latents_{name}") for name in ("mean", "std"))
    if mean is not None and std is not None:
        shape = (1, -1, *[1] * (latents.ndim - 2))
        mean, std = (torch.tensor(x).to(latents).view(shape) for x in (mean, std))
        return (latents - mean) / std
    shift = config.get("shift_factor") or 0.0
    return (latents - shift) * (config.get("scaling_factor") or 1.0)


def _arrangements(pipe, latents: torch.Tensor):
    """The latents as pipelines arrange them: as they are, packed into tokens, frames first."""
    yield latents
    if latents.ndim == 4 and hasattr(pipe, "_pack_latents"):
        yield pipe._pack_latents(latents, *latents.shape)
    if latents.ndim == 5:
        yield latents.transpose(1, 2)
