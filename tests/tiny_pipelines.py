"""Any diffusers pipeline class around a tiny transformer of its family, without text encoders.

Pipelines, transformers, controlnets and schedulers are diffusers' own. The autoencoder is a
stand-in that makes latents of the right shape, and prompts are given as embeddings.
"""

from __future__ import annotations

import inspect
import re
from types import SimpleNamespace
from typing import NamedTuple

import torch

from dittfast.pipelines.families import FAMILIES
from dittfast.pipelines.measure.parity import TINY


class Encoded(SimpleNamespace):
    def __getitem__(self, index):
        return self.latent_dist


class Decoded(NamedTuple):
    sample: torch.Tensor


class Allows:
    """In place of a safety checker."""

    def __call__(self, *args, **kwargs):
        return True

    def __getattr__(self, name):
        return self if not name.startswith("__") else object.__getattribute__(self, name)


class StandIn(torch.nn.Module):
    dtype, device = torch.float32, torch.device("cpu")


class Connectors(StandIn):
    """In place of LTX-2's text connectors."""

    def forward(self, embeds, mask, **_):
        return embeds, embeds, mask


class AudioVae(StandIn):
    mel_compression_ratio = temporal_compression_ratio = 4
    latents_mean, latents_std = torch.zeros(8), torch.ones(8)
    dtype = torch.float32
    config = SimpleNamespace(sample_rate=16000, mel_hop_length=160, mel_bins=16, latent_channels=2)


class Features(dict):
    """What an image processor returns; as a processor, itself."""

    def __call__(self, *args, **kwargs):
        return self

    def to(self, *args):
        return self


class ImageEncoder(StandIn):
    def forward(self, output_hidden_states):
        return SimpleNamespace(hidden_states=[torch.ones(1, 9, 32)] * 2)


class Vae(StandIn):
    """Latents of zeros in the shape the real one would give, and every name pipelines ask for."""

    temporal_compression_ratio = 4
    use_slicing = use_tiling = False

    def __init__(self, channels: int, factor: int):
        super().__init__()
        self.channels = channels
        self.spatial_compression_ratio = factor
        halvings = factor.bit_length() - 1
        self.temperal_downsample = [False] * (halvings - 2) + [True, True]
        self.bn = SimpleNamespace(
            running_mean=torch.zeros(4 * channels), running_var=torch.ones(4 * channels)
        )
        self.latents_mean, self.latents_std = torch.zeros(channels), torch.ones(channels)
        self.config = SimpleNamespace(
            block_out_channels=(1,) * (halvings + 1), latent_channels=channels, z_dim=channels,
            scaling_factor=1.0, shift_factor=0.0, latents_mean=[0.0] * channels,
            latents_std=[1.0] * channels, scale_factor_spatial=factor, scale_factor_temporal=4,
            temporal_compression_ratio=4, spatial_compression_ratio=factor, sample_size=64,
            invert_scale_latents=False, batch_norm_eps=1e-5, sigma_data=1.0, patch_size=None,
            spatial_compression=factor, temporal_compression=4, temporal_downsample_factor=4,
            encoder_block_out_channels=(1,) * (halvings + 1), in_channels=3,
            out_channels=3, timestep_conditioning=False,
        )  # fmt: skip

    def encode(self, x, **kwargs):
        frames = [(n - 1) // 4 + 1 for n in x.shape[2:-2]]
        size = [n // self.spatial_compression_ratio for n in x.shape[-2:]]
        latents = x.new_zeros(x.shape[0], self.channels, *frames, *size)
        again = lambda *_, **__: latents  # noqa: E731
        spread = SimpleNamespace(sample=again, mode=again, mean=latents, parameters=latents)
        return Encoded(latent_dist=spread, latents=latents)

    def decode(self, latents, **kwargs):
        size = [n * self.spatial_compression_ratio for n in latents.shape[-2:]]
        frames = latents.shape[2:-2]
        return Decoded(latents.new_zeros(latents.shape[0], 3, *frames, *size))

    def enable_tiling(self):
        pass


def family_of_pipeline(cls) -> str | None:
    """The name of the known transformer class among a pipeline's parts."""
    for name, part in inspect.signature(cls.__init__).parameters.items():
        if name.startswith("transformer"):
            words = re.findall(r"\w+", str(part.annotation))
            return next((word for word in words if word in FAMILIES), None)
    return None


def known_pipelines() -> dict[str, str]:
    """Every pipeline class of diffusers with a family, and its transformer's class."""
    import diffusers

    found = {}
    for name in dir(diffusers):
        if not name.endswith("Pipeline"):
            continue
        cls = getattr(diffusers, name)
        if inspect.isclass(cls) and issubclass(cls, diffusers.DiffusionPipeline):
            family = family_of_pipeline(cls)
            if family is not None:
                found[name] = family
    return found


def transformer(family: str, **changes) -> torch.nn.Module:
    import diffusers

    tiny = next(tiny for tiny in TINY.values() if tiny.name == family)
    return getattr(diffusers, family)(**{**tiny.config, **changes}).eval()


def pipeline(name: str, channels: int = 4, factor: int = 8, **parts):
    """A pipeline of this class.

    Args:
        channels: of the latents.
        factor: pixels of a picture's side in one cell of latents.
        parts: arguments of its constructor; others that have no default are None.
    """
    import diffusers

    cls = getattr(diffusers, name)
    given = {}
    for key, part in inspect.signature(cls.__init__).parameters.items():
        if key in parts:
            given[key] = parts[key]
        elif key == "vae":
            given[key] = Vae(channels, factor)
        elif key == "safety_checker":
            given[key] = Allows()
        elif key != "self" and part.default is inspect.Parameter.empty:
            given[key] = None
    pipe = cls(**given)
    pipe.set_progress_bar_config(disable=True)
    return pipe
