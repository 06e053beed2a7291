"""Run a pipeline once and time it."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from dataclasses import dataclass

import numpy as np
import torch

from dittfast.measure.timing import clock_for

from ..models import execution_device, known_family, transformers_of
from .call import SIZES, PicturePerPrompt, accepted
from .needs import log_needs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Timing:
    """Seconds of one run.

    Attributes:
        prompt: until the transformer runs for the first time: text encoding, first noise.
        steps: each denoising step; empty where the pipeline has no ``callback_on_step_end``.
        decode: after the last step: the VAE's decoder.
        total: the whole call.
        busy: the whole call, in processor time where one CPU thread computes; else as total.
    """

    prompt: float
    steps: tuple[float, ...]
    decode: float
    total: float
    busy: float | None = None


@dataclass(frozen=True)
class Run:
    """What one call of a pipeline drew.

    Attributes:
        frames: ``[F, H, W, 3]`` uint8 (F = 1 for an image).
        peak_memory: bytes on a CUDA device; None elsewhere.
        latents: after the last step, as the pipeline holds them, on the CPU in fp32; None where
            the pipeline has no ``callback_on_step_end``.
    """

    frames: np.ndarray
    timing: Timing
    peak_memory: int | None = None
    latents: torch.Tensor | None = None


# Seconds of waiting from which on people want to know.
_WORTH_SAYING = 5


def duration(seconds: float) -> str:
    """``40 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class _Clock:
    """Notes when the transformer first runs, when each step ends, and the last latents.

    Logs what the run needs when its first pass begins, and after the first step the time left.
    """

    def __init__(self, pipe, device: torch.device):
        self.pipe, self.device = pipe, device
        self.first: float | None = None
        self.ends: list[float] = []
        self.latents: torch.Tensor | None = None
        self._hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True)
            for model in transformers_of(pipe).values()
        ]

    def now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def _begin(self, module, args, kwargs):
        if self.first is None:
            log_needs(self.pipe, module, args, kwargs)
            self.first = self.now()

    def step_end(self, pipe, step, timestep, values):
        self.ends.append(self.now())
        self.latents = values.get("latents")
        total = getattr(pipe, "num_timesteps", None)
        if step == 0 and isinstance(total, int) and self.first is not None:
            left = (total - 1) * (self.ends[0] - self.first)
            if left >= _WORTH_SAYING:
                logger.info("the first of %d steps is done; about %s left", total, duration(left))
        return values

    def close(self):
        for hook in self._hooks:
            hook.remove()


def run(pipe, call: dict, seed: int = 0) -> Run:
    """Call a pipeline once, with noise drawn on the CPU from ``seed``, and time it.

    Raises:
        FloatingPointError: the picture has values that are not finite.
    """
    device = execution_device(pipe)
    if isinstance(call.get("image"), PicturePerPrompt):
        call = call | {"image": call["image"](call["prompt"], seed)}
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    clock = _Clock(pipe, device)
    arguments = dict(call, generator=torch.Generator("cpu").manual_seed(seed), output_type="np")
    if "callback_on_step_end" in accepted(pipe):
        arguments["callback_on_step_end"] = clock.step_end
    start, own_clock = clock.now(), clock_for(device)
    busy = own_clock()
    try:
        with without_rounding_by_one(pipe):
            out = pipe(**arguments)
        end, busy = clock.now(), own_clock() - busy
    finally:
        clock.close()
    first = start if clock.first is None else clock.first
    edges = [first, *clock.ends]
    timing = Timing(
        prompt=first - start,
        steps=tuple(b - a for a, b in itertools.pairwise(edges)),
        decode=end - edges[-1] if clock.ends else 0.0,
        total=end - start,
        busy=busy,
    )
    values = np.asarray(out.frames[0] if hasattr(out, "frames") else out.images[:1])
    if not np.isfinite(values).all():
        raise FloatingPointError(
            f"{np.mean(~np.isfinite(values)):.1%} of the picture's values are not finite; this "
            "model overflows in this dtype, so use bfloat16 or float32"
        )
    frames = np.clip(np.rint(values * 255), 0, 255).astype(np.uint8)
    asked = tuple(call.get(name) or size for name, size in zip(SIZES, frames.shape))
    asked = (frames_drawn(pipe, asked[0]), *asked[1:]) if "num_frames" in call else asked
    if frames.shape[:3] != asked:
        logger.warning(
            "%s drew frames x height x width %s, not %s",
            type(pipe).__name__, frames.shape[:3], asked,
        )  # fmt: skip
    memory = torch.cuda.max_memory_allocated(device) if on_cuda else None
    latents = None if clock.latents is None else clock.latents.detach().to("cpu", torch.float32)
    return Run(frames, timing, memory, latents)


def frames_drawn(pipe, asked: int) -> int:
    """Frames that a call for ``asked`` draws.

    Some pipelines round to one more than a multiple of the VAE's temporal factor. With a factor of
    1 that is one more than what was asked for.
    """
    families = map(known_family, transformers_of(pipe).values())
    rounds = any(family is not None and family.rounds_frames for family in families)
    return asked + 1 if rounds and getattr(pipe, "vae_scale_factor_temporal", 0) == 1 else asked


@contextlib.contextmanager
def without_rounding_by_one(pipe):
    """Hold back what such a pipeline says at every call: that it rounds to a multiple of 1."""

    def wanted(message: logging.LogRecord) -> bool:
        return "has to be divisible by 1." not in message.getMessage()

    log = logging.getLogger(type(pipe).__module__)
    log.addFilter(wanted)
    try:
        yield
    finally:
        log.removeFilter(wanted)
