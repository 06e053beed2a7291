"""From clean latents to what the model is asked: noise, times, targets. No state, no global RNG."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from dittfast.pipelines.families import FAMILIES

KINDS = ("flow", "epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class NoiseProcess:
    """How a pipeline's scheduler mixes data and noise at a time t in 0..1 (1 is pure noise).

    Attributes:
        kind: "flow" (``x = (1 - t) clean + t noise``, target ``noise - clean``), "epsilon"
            (``x = sqrt(a) clean + sqrt(1 - a) noise``, target ``noise``) or "v_prediction"
            (the same x, target ``sqrt(a) noise - sqrt(1 - a) clean``; Salimans & Ho 2022,
            arXiv:2202.00512), or "sample" (flow matching whose model predicts the clean picture:
            :meth:`velocity` turns its answer into what is compared).
        time_scale: what the model is told at t: ``t * time_scale`` for flow, the index of the
            nearest training step below for the others.
        alphas_cumprod: a of each training step; empty for flow and sample.
        noise_scale: the noise's standard deviation.
        smallest_time: that a clean picture is divided by, for "sample".
    """

    kind: str
    time_scale: float = 1.0
    alphas_cumprod: tuple[float, ...] = ()
    noise_scale: float = 1.0
    smallest_time: float = 0.05

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self._is_flow == bool(self.alphas_cumprod):
            raise ValueError(
                "alphas_cumprod is needed for epsilon and v_prediction, and only there"
            )

    @property
    def _is_flow(self) -> bool:
        return self.kind in ("flow", "sample")

    def _index(self, t: torch.Tensor) -> torch.Tensor:
        steps = len(self.alphas_cumprod)
        return (t * steps).long().clamp(0, steps - 1)

    def _factors(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors of data and noise, shaped to multiply ``like``."""
        if self._is_flow:
            pair = 1 - t, self.noise_scale * t
        else:
            a = torch.tensor(self.alphas_cumprod, dtype=torch.float64)
            a = a.to(t.device)[self._index(t)]
            pair = a.sqrt(), (1 - a).sqrt()
        shape = (-1, *[1] * (like.ndim - 1))
        return tuple(x.to(like.dtype).view(shape) for x in pair)

    def noisy(self, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The model's input for ``clean`` and ``noise`` ``[B, ...]`` at times ``t [B]``."""
        data, rest = self._factors(t, clean)
        return data * clean + rest * noise

    def target(self, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the model should predict; for "sample" the velocity of that."""
        if self.kind == "flow":
            return self.noise_scale * noise - clean
        if self.kind == "sample":
            return self.velocity(clean, self.noisy(clean, noise, t), t)
        if self.kind == "epsilon":
            return noise
        data, rest = self._factors(t, clean)
        return data * noise - rest * clean

    def velocity(
        self, prediction: torch.Tensor, noisy: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """A prediction as the scheduler takes it; all kinds but "sample" are that already."""
        if self.kind != "sample":
            return prediction
        t = t.to(noisy.dtype).clamp_min(self.smallest_time).view(-1, *[1] * (noisy.ndim - 1))
        return (noisy - prediction) / t

    def timestep(self, t: torch.Tensor) -> torch.Tensor:
        """``timestep [B]`` as the model's forward takes it."""
        return t * self.time_scale if self._is_flow else self._index(t)


def process_of(pipe, timestep: float, num_train_timesteps: int) -> NoiseProcess:
    """The process that a pipeline and its scheduler were made for.

    Args:
        timestep: what the pipeline passed to its transformer in its first step.

    Raises:
        ValueError: a prediction type that is not supported.
    """
    scheduler, config = pipe.scheduler, pipe.scheduler.config
    clean = {k: v for f in FAMILIES.values() for k, v in f.clean_pipelines.items()}
    smallest_time = clean.get(type(pipe).__name__)
    if smallest_time is not None:
        noise_scale = float(pipe.config.noise_scale)
        return NoiseProcess("sample", 1.0, noise_scale=noise_scale, smallest_time=smallest_time)
    prediction = config.get("prediction_type")
    flow = type(scheduler).__name__.startswith("FlowMatch") or prediction == "flow_prediction"
    if flow:
        # The first step is near t = 1, so the model takes either t itself or training steps.
        return NoiseProcess("flow", 1.0 if timestep <= 2 else float(num_train_timesteps))
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"{type(scheduler).__name__} predicts {prediction!r}; training knows flow matching, "
            "epsilon and v_prediction"
        )
    return NoiseProcess(prediction, 1.0, tuple(scheduler.alphas_cumprod.double().tolist()))


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by a key: the same key gives the same numbers, anywhere."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def sample_times(
    count: int,
    rng: torch.Generator,
    distribution: str = "uniform",
    shift: float = 1.0,
    time_range: tuple[float, float] = (0.0, 1.0),
) -> torch.Tensor:
    """``count`` times ``[B]`` fp32 in ``time_range``.

    Args:
        distribution: "uniform" or "logit_normal".
        shift: above 1 towards noise: ``shift t / (1 + (shift - 1) t)``.
    """
    if distribution == "uniform":
        t = torch.rand(count, generator=rng)
    else:
        t = torch.sigmoid(torch.randn(count, generator=rng))
    t = shift * t / (1 + (shift - 1) * t)
    low, high = time_range
    return low + (high - low) * t


def sample_noise(shape, seed: int, step: int, slot: int) -> torch.Tensor:
    """fp32 noise of one sample, from its place in the run: the slot in the global batch of a step.

    It does not depend on the number of processes or the size of their batches, and there is no
    state to save.
    """
    return torch.randn(shape, generator=generator("noise", seed, step, slot))
