"""Run a pipeline dense and sparse from one seed, and say what was measured and how."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import itertools
import logging
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from dittfast.environment import describe_device, versions
from dittfast.measure.metrics import SSIM_WINDOW, image_tensor, psnr, ssim
from dittfast.methods.base import Method
from dittfast.methods.head_guidance import HeadGuidance
from dittfast.schedule import Schedule

from .adapter import enable, transformers_of
from .description import Description, describe
from .first_frame import FirstFrame, fit
from .guidance import guide
from .sources import Source

logger = logging.getLogger(__name__)


_SIZES = ("num_frames", "height", "width")
_COUNTS = (*_SIZES, "num_inference_steps", "max_sequence_length", "runs", "fps")
_SCALES = ("guidance_scale", "true_cfg_scale")


@dataclass(frozen=True)
class Timing:
    """Seconds of one run.

    Attributes:
        prompt: until the transformer runs for the first time: text encoding, first noise.
        steps: each denoising step; empty where the pipeline has no ``callback_on_step_end``.
        decode: after the last step: the VAE's decoder.
        total: the whole call.
    """

    prompt: float
    steps: tuple[float, ...]
    decode: float
    total: float


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


def accepted(pipe) -> list[str]:
    """Names of the arguments that calling the pipeline takes."""
    return list(inspect.signature(type(pipe).__call__).parameters)[1:]


def is_video(pipe) -> bool:
    return "num_frames" in accepted(pipe)


def needs_image(pipe) -> bool:
    """Whether the pipeline makes a video from an image that the caller has to give."""
    image = inspect.signature(type(pipe).__call__).parameters.get("image")
    if image is None or not is_video(pipe):
        return False
    return image.default is image.empty or "ImageToVideo" in type(pipe).__name__


def size_multiples(pipe) -> tuple[int, int]:
    """Height and width must be multiples of these, in pixels; (1, 1) where nothing is known.

    A pipeline that packs latents itself (FLUX, Qwen-Image) tells its image processor the packed
    size; in all others the transformer cuts latents into patches.
    """
    processor = getattr(pipe, "image_processor", None) or getattr(pipe, "video_processor", None)
    scale = getattr(getattr(processor, "config", None), "vae_scale_factor", None)
    if scale is None:
        return 1, 1
    patch = 1
    if not hasattr(pipe, "_pack_latents"):
        model = next(iter(transformers_of(pipe).values()))
        patch = getattr(model.config, "patch_size", None) or 1
    height, width = (patch, patch) if isinstance(patch, int) else tuple(patch)[-2:]
    return scale * height, scale * width


def check_ranges(**values) -> None:
    """Check what can be judged without the pipeline; None is skipped.

    Args:
        values: ``prompt``, ``seed``, counts, sizes and guidance scales, by name.

    Raises:
        ValueError: an empty prompt or a number out of range.
    """
    if not (values.get("prompt") or "").strip():
        raise ValueError("the prompt is empty; describe the picture, such as 'a red apple'")
    for name, value in values.items():
        if value is None:
            continue
        if name == "seed" and not 0 <= value < 2**63:
            raise ValueError(f"seed must lie in 0..{2**63 - 1}, got {value}")
        if name in _COUNTS and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
        if name in _SCALES and not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}")


def call_arguments(pipe, prompt: str, settings: dict | None = None, **given) -> dict:
    """The arguments to call ``pipe`` with: what the user gave, then the sample's own settings.

    Args:
        settings: a sample model's settings; keys that are no arguments of the pipeline are left.
        given: arguments by name; None where the user gave none.

        An ``image`` is cut to the size of a video. A sample video model without one gets a
        :class:`~dittfast.pipelines.first_frame.FirstFrame`, which draws it for each prompt.

    Raises:
        ValueError: as :func:`check_ranges`, an argument that the pipeline does not take, a size
            that the pipeline would silently round, or no image where the pipeline needs one.
    """
    names = accepted(pipe)
    given = {k: v for k, v in given.items() if v is not None}
    for name in given:
        if name not in names:
            raise ValueError(
                f"{type(pipe).__name__} takes no {name}; leave out --{name.replace('_', '-')}"
            )
    call = {k: v for k, v in (settings or {}).items() if k in names} | given
    call["prompt"] = prompt
    check_ranges(**call)
    for name, multiple in zip(("height", "width"), size_multiples(pipe)):
        _check_multiple(pipe, call, name, multiple, 0)
    temporal = getattr(pipe, "vae_scale_factor_temporal", None)
    if isinstance(temporal, int) and temporal > 1:
        _check_multiple(pipe, call, "num_frames", temporal, 1)
    elif temporal == 1 and "image" in names:
        # It will draw one frame more (see frames_drawn), and AutoencoderKLWan encodes one frame
        # and then four at a time. Without an image to encode every number is right.
        _check_multiple(pipe, call, "num_frames", 4, 0)
    if needs_image(pipe):
        call["image"] = _first_frame(pipe, call, settings or {})
    return call


def _first_frame(pipe, call: dict, settings: dict):
    parameters = inspect.signature(type(pipe).__call__).parameters
    size = [call.get(name) or parameters[name].default for name in ("height", "width")]
    if "image" in call:
        return fit(call["image"], *size)
    if "first_frame" in settings:
        model = next(iter(transformers_of(pipe).values()))
        return FirstFrame(settings["first_frame"], *size, model.device, model.dtype)
    raise ValueError(
        f"{type(pipe).__name__} animates an image and got none; pass one with --image FILE"
    )


def call_record(call: dict) -> dict:
    """The arguments of a call without its prompt, as plain data for JSON."""
    plain = {k: v for k, v in call.items() if k not in ("prompt", "image")}
    image = call.get("image")
    if isinstance(image, FirstFrame):
        plain["first_frame"] = image.to_dict()
    elif image is not None:
        plain["first_frame"] = {"sha256": hashlib.sha256(image.tobytes()).hexdigest()}
    return plain


def _check_multiple(pipe, call: dict, name: str, multiple: int, remainder: int) -> None:
    value = call.get(name)
    if value is None or value % multiple == remainder % multiple:
        return
    below = (value - remainder) // multiple * multiple + remainder
    near = sorted({n for n in (below, below + multiple) if n >= 1}, key=lambda n: abs(n - value))
    rule = f"a multiple of {multiple}" + (f" plus {remainder}" if remainder else "")
    raise ValueError(
        f"{name} must be {rule} for {type(pipe).__name__}, got {value}; "
        f"the nearest is {' or '.join(map(str, near))}"
    )


class _Clock:
    """Notes when the transformer first runs, when each step ends, and the last latents."""

    def __init__(self, pipe, device: torch.device):
        self.device = device
        self.first: float | None = None
        self.ends: list[float] = []
        self.latents: torch.Tensor | None = None
        self._hooks = [
            model.register_forward_pre_hook(self._begin) for model in transformers_of(pipe).values()
        ]

    def now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def _begin(self, module, arguments):
        if self.first is None:
            self.first = self.now()

    def step_end(self, pipe, step, timestep, values):
        self.ends.append(self.now())
        self.latents = values.get("latents")
        return values

    def close(self):
        for hook in self._hooks:
            hook.remove()


def run(pipe, call: dict, seed: int = 0) -> Run:
    """Call a pipeline once, with noise drawn on the CPU from ``seed``, and time it.

    Raises:
        FloatingPointError: the picture has values that are not finite.
    """
    device = next(iter(transformers_of(pipe).values())).device
    if isinstance(call.get("image"), FirstFrame):
        call = call | {"image": call["image"](call["prompt"], seed)}
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    clock = _Clock(pipe, device)
    arguments = dict(call, generator=torch.Generator("cpu").manual_seed(seed), output_type="np")
    if "callback_on_step_end" in accepted(pipe):
        arguments["callback_on_step_end"] = clock.step_end
    start = clock.now()
    try:
        with without_rounding_by_one(pipe):
            out = pipe(**arguments)
        end = clock.now()
    finally:
        clock.close()
    first = start if clock.first is None else clock.first
    edges = [first, *clock.ends]
    timing = Timing(
        prompt=first - start,
        steps=tuple(b - a for a, b in itertools.pairwise(edges)),
        decode=end - edges[-1] if clock.ends else 0.0,
        total=end - start,
    )
    values = np.asarray(out.frames[0] if hasattr(out, "frames") else out.images[:1])
    if not np.isfinite(values).all():
        raise FloatingPointError(
            f"{np.mean(~np.isfinite(values)):.1%} of the picture's values are not finite; this "
            "model overflows in this dtype, so use bfloat16 or float32"
        )
    frames = np.clip(np.rint(values * 255), 0, 255).astype(np.uint8)
    asked = tuple(call.get(name) or size for name, size in zip(_SIZES, frames.shape))
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

    diffusers' Wan pipelines round to one more than a multiple of the VAE's temporal factor. With a
    factor of 1 that is one more than what was asked for.
    """
    rounds = type(pipe).__name__.startswith("Wan")
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


@dataclass(frozen=True)
class Arm:
    """One way of drawing: its first run's picture, and the timings of all its runs."""

    name: str
    run: Run
    timings: tuple[Timing, ...]
    description: Description | None = None

    @property
    def seconds_per_step(self) -> float | None:
        """The median over the steps of all runs."""
        steps = [s for t in self.timings for s in t.steps]
        return statistics.median(steps) if steps else None

    @property
    def seconds(self) -> float:
        """The median of the whole calls."""
        return statistics.median(t.total for t in self.timings)

    @property
    def density(self) -> float | None:
        """Kept fraction of token pairs in sparse layers; 1 if there are none, None if it varies."""
        if self.description is None or all(x.dense for x in self.description.layers):
            return 1.0
        return self.description.density

    def to_dict(self) -> dict:
        """Plain data, for JSON."""
        return {
            "density": self.density,
            "seconds_per_step": self.seconds_per_step,
            "seconds": self.seconds,
            "runs": [dataclasses.asdict(t) for t in self.timings],
            "peak_memory_bytes": self.run.peak_memory,
        }


def _draw(pipe, call, seed, method, schedule, backend, guidance) -> tuple[Run, Description | None]:
    with contextlib.ExitStack() as stack:
        if method is not None:
            stack.enter_context(enable(pipe, method, schedule=schedule, backend=backend))
        if guidance is not None:
            stack.enter_context(guide(pipe, guidance))
        drawn = run(pipe, call, seed)
        return drawn, None if method is None else describe(pipe)


def generate(
    pipe,
    call: dict,
    method: Method | None = None,
    schedule: Schedule | None = None,
    *,
    guidance: HeadGuidance | None = None,
    backend: str = "auto",
    seed: int = 0,
    compare: bool = False,
    runs: int = 1,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> list[Arm]:
    """Draw with a method or with dense attention, or with both to compare them.

    All runs use the same pipeline, arguments and noise. With ``compare`` each arm is warmed up by
    a run of one step (without the schedule's dense steps, so that the method does run), and the
    timed runs of the arms take turns.

    Args:
        call: see :func:`call_arguments`.
        method: None for dense attention alone.
        guidance: of every run, dense and sparse.
        runs: timed runs of each arm.
        on_stage: called with the name of what comes next.

    Returns:
        The arms: dense (with ``compare`` or without a method), then the method's.

    Raises:
        ValueError: ``compare`` without a method, a seed or number of runs out of range, and as
            :func:`~dittfast.pipelines.adapter.enable`.
        FloatingPointError: as :func:`run`.
    """
    check_ranges(prompt=call["prompt"], seed=seed, runs=runs)
    if compare and method is None:
        raise ValueError("there is nothing to compare dense attention with; choose a method")
    arms: list[tuple[str, Method | None]] = []
    if compare or method is None:
        arms.append(("dense", None))
    if method is not None:
        arms.append((method.name, method))
    schedule = schedule or Schedule()
    if compare:
        warm_up = dataclasses.replace(schedule, dense_first_steps=0, dense_last_steps=0)
        for name, chosen in arms:
            on_stage(f"{name}, warm-up")
            _draw(pipe, call | {"num_inference_steps": 1}, seed, chosen, warm_up, backend, guidance)
    drawn: list[list[tuple[Run, Description | None]]] = [[] for _ in arms]
    for turn in range(runs):
        for index in range(len(arms)) if turn % 2 == 0 else reversed(range(len(arms))):
            name, chosen = arms[index]
            on_stage(name if runs == 1 else f"{name}, run {turn + 1} of {runs}")
            drawn[index].append(_draw(pipe, call, seed, chosen, schedule, backend, guidance))
    return [
        Arm(name, results[0][0], tuple(r.timing for r, _ in results), results[0][1])
        for (name, _), results in zip(arms, drawn)
    ]


def quality(dense: Run, other: Run) -> dict:
    """PSNR in dB (None if the pictures are identical) and SSIM (None below 11 px) of 8-bit values.

    The PSNR of a video is that of all its frames together; its SSIM is the mean over frames.
    """
    a, b = image_tensor(dense.frames), image_tensor(other.frames)
    identical = np.array_equal(dense.frames, other.frames)
    large = min(dense.frames.shape[1:3]) >= SSIM_WINDOW
    return {
        "identical": identical,
        "psnr_db": None if identical else psnr(a, b),
        "ssim": ssim(a, b) if large else None,
    }


def describe_run(pipe, source: Source, call: dict, seed: int, guidance=None) -> dict:
    """What was asked for, of what and where, as plain data for JSON."""
    model = next(iter(transformers_of(pipe).values()))
    return {
        "prompt": call["prompt"],
        "model": source.name,
        "pipeline": type(pipe).__name__,
        "call": call_record(call),
        "seed": seed,
        "guidance": None if guidance is None else dataclasses.asdict(guidance),
        "versions": versions(),
        "device": describe_device(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def record(
    pipe,
    source: Source,
    call: dict,
    seed: int,
    arms: list[Arm],
    guidance: HeadGuidance | None = None,
) -> dict:
    """Everything needed to repeat a run and to judge its numbers, as plain data for JSON."""
    last = arms[-1]
    data = describe_run(pipe, source, call, seed, guidance)
    data["attention"] = None if last.description is None else last.description.to_dict()
    if len(arms) == 1:
        data["measured"] = f"{len(last.timings)} run(s), the first not warmed up"
        return data | {"timing": last.to_dict()}
    dense, sparse = arms
    data["measured"] = (
        f"{len(sparse.timings)} run(s) of each arm, taking turns, after a warm-up run of 1 step "
        "each; seconds_per_step is the median step, seconds the median whole call"
    )
    per_step = None
    if dense.seconds_per_step and sparse.seconds_per_step:
        per_step = dense.seconds_per_step / sparse.seconds_per_step
    return data | {
        "dense": dense.to_dict(),
        "sparse": sparse.to_dict(),
        "dense_over_sparse": {"per_step": per_step, "whole": dense.seconds / sparse.seconds},
        "against_dense": quality(dense.run, sparse.run),
    }
