"""Pictures larger than a model was trained for: SDEdit in stages with local attention.

CLEAR's recipe (Liu et al. 2024, arXiv:2412.16112) on SDEdit (Meng et al. 2021, arXiv:2108.01073).
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from dittfast.config import resolve
from dittfast.methods.base import Method
from dittfast.methods.head_guidance import HeadGuidance
from dittfast.methods.local import Local
from dittfast.schedule import Schedule

from ..adapter import enable
from ..description import Description, describe
from ..guidance.plain import guide
from ..models import HasComponents, is_swapped, transformers_of
from .call import accepted, call_arguments, check_ranges, is_video
from .compare import Arm, generate
from .positions import check_position_scale, positions_scaled
from .run import Run, run


@dataclass(frozen=True)
class Stage:
    """One stage: its picture (``run.frames [1, H, W, 3]``), and what ran in it.

    Attributes:
        strength: how much noise was put on the picture before; None for the first stage.
        num_tokens: of the transformer's sequence.
        position_scale, position_until: what the position ids were multiplied by, and the time at
            which that ended.
        description: of the sparse method; None for the first stage and without a method.
        arms: dense attention and the method, where they were compared.
    """

    run: Run
    strength: float | None
    num_tokens: int | None
    position_scale: float = 1.0
    position_until: float = 0.0
    description: Description | None = None
    arms: tuple[Arm, ...] = ()

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(self.run.frames[0])


@contextlib.contextmanager
def rope_theta_scaled(pipe, factor: float):
    """Inside, the base of FLUX's rotary embedding is ``factor`` times as large (NTK scaling).

    Raises:
        ValueError: a factor that is not positive, or a model whose embedding has no such base.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"ntk_factor must be a finite number above 0, got {factor!r}")
    embeddings = [getattr(m, "pos_embed", None) for m in transformers_of(pipe).values()]
    if factor != 1 and not all(hasattr(e, "theta") for e in embeddings):
        names = ", ".join(type(m).__name__ for m in transformers_of(pipe).values())
        raise ValueError(f"{names} has no pos_embed.theta to scale; use ntk_factor=1")
    before = [getattr(e, "theta", None) for e in embeddings]
    try:
        if factor != 1:
            for embedding, theta in zip(embeddings, before):
                embedding.theta = theta * factor
        yield
    finally:
        if factor != 1:
            for embedding, theta in zip(embeddings, before):
                embedding.theta = theta


@contextlib.contextmanager
def convolutions_by_pixel(pipe) -> Iterator[None]:
    """Inside, a VAE on a CPU has its weights channels-last: a quarter less time.

    Pictures differ by rounding, so stages without a method do without it: they are diffusers' own.
    """
    vae = getattr(pipe, "vae", None)
    if not isinstance(vae, torch.nn.Module) or vae.device.type != "cpu":
        yield
        return
    vae.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        vae.to(memory_format=torch.contiguous_format)


def image_to_image(pipe):
    """The image-to-image pipeline of the same family, made of the same components.

    Raises:
        ValueError: diffusers has none for this pipeline.
    """
    from diffusers import AutoPipelineForImage2Image

    try:
        made = AutoPipelineForImage2Image.from_pipe(pipe)
    except ValueError as error:
        raise ValueError(
            f"diffusers has no image-to-image pipeline for {type(pipe).__name__}, which stages "
            f"need: {error}"
        ) from error
    made.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return made


def _strengths(strength: float | Sequence[float], stages: int) -> list[float]:
    given = [strength] * (stages - 1) if isinstance(strength, (int, float)) else list(strength)
    if len(given) != stages - 1:
        raise ValueError(
            f"{len(given)} strengths for {stages} stages; give one for each stage after the first"
        )
    for value in given:
        if not 0 < value <= 1:
            raise ValueError(f"strength must lie in 0..1 and above 0, got {value!r}")
    return given


def _position_scale(given: float | str, first: tuple[int, int], stage: tuple[int, int]) -> float:
    if given != "fit":
        check_position_scale(given)
        return given
    return first[0] / stage[0]


def check_stages(stages: Sequence[tuple[int, int]]) -> None:
    """Raise ValueError unless there are two sizes or more that rise and keep their shape."""
    if len(stages) < 2:
        raise ValueError(f"stages needs at least two sizes (height, width), got {list(stages)}")
    for (height, width), (taller, wider) in itertools.pairwise(stages):
        if taller <= height or wider <= width:
            raise ValueError(
                f"each stage must be larger than the one before; {taller} x {wider} follows "
                f"{height} x {width}"
            )
        if abs(taller / height - wider / width) > 0.05 * taller / height:
            raise ValueError(
                f"stages must keep the picture's shape; from {height} x {width} to {taller} x "
                f"{wider} (height x width) it would be stretched"
            )


@contextlib.contextmanager
def _running(pipe, method, guidance: HeadGuidance | None, **how) -> Iterator[None]:
    """Inside, the pipeline runs ``method`` (None: as it is) and is guided."""
    with contextlib.ExitStack() as stack:
        if method is not None:
            stack.enter_context(enable(pipe, method, **how))
        if guidance is not None:
            stack.enter_context(guide(pipe, guidance))
        yield


def _calls(pipe, larger, prompt: str, stages, call: dict, later: dict) -> list[dict]:
    """The arguments of each stage's call, checked against the pipeline that takes them."""
    for name in {"prompt", "height", "width", "image", "strength"} & {*call, *later}:
        raise ValueError(f"call holds {name}, which the stages set themselves; leave it out")
    own = getattr(pipe, "call_defaults", None)  # of dittfast.sample
    given = [call, *[call | later] * (len(stages) - 1)]
    calls = [
        call_arguments(pipe, prompt, own, height=h, width=w, **arguments)
        for (h, w), arguments in zip(stages, given)
    ]
    for arguments in calls[1:]:
        for name in set(arguments) - set(accepted(larger)):
            raise ValueError(f"{type(larger).__name__} takes no {name}; leave it out")
    return calls


def _is_enabled(pipe) -> bool:
    return any(is_swapped(m) for m in transformers_of(pipe).values())


def _chosen(
    pipe, method: Method | str | None, schedule: Schedule | None, options: dict
) -> tuple[Method | None, Schedule | None]:
    """The method of the stages after the first; None for what the pipeline runs by itself."""
    if method is None:
        if options or schedule:
            raise ValueError(f"there is no method for the options {sorted(options)}")
        return None, None
    if _is_enabled(pipe):
        raise ValueError(
            "dittfast is enabled on this pipeline already; pass method=None to run the stages "
            "with it, or call dittfast.disable(pipe) first"
        )
    return resolve(method, schedule, **options)


@dataclass(frozen=True)
class _Enlarging:
    """How the stages after the first are drawn.

    Attributes:
        pipe: the image-to-image pipeline.
        method: None for what the pipeline runs by itself.
        enabled: whether that is a method.
    """

    pipe: HasComponents
    method: Method | None
    schedule: Schedule | None
    backend: str
    enabled: bool
    guidance: HeadGuidance | None
    ntk_factor: float
    position_until: float

    def draw(self, arguments: dict, scale: float, seed: int) -> Stage:
        method, how = self.method, {"schedule": self.schedule, "backend": self.backend}
        if method is None:
            method, how = None if self.enabled else "dense", {}
        with (
            convolutions_by_pixel(None if self.method is None else self.pipe),
            rope_theta_scaled(self.pipe, self.ntk_factor),
            positions_scaled(self.pipe, scale, self.position_until),
            _running(self.pipe, method, self.guidance, **how),
        ):
            drawn = run(self.pipe, arguments, seed)
            description = describe(self.pipe)
        sparse = description if self.enabled or self.method is not None else None
        return self._stage(drawn, arguments, description.num_tokens, scale, sparse)

    def compare(self, arguments: dict, scale: float, seed: int, runs: int, on_stage) -> Stage:
        """The stage with dense attention, too."""
        with convolutions_by_pixel(self.pipe), rope_theta_scaled(self.pipe, self.ntk_factor):
            arms = generate(
                self.pipe, arguments, self.method, self.schedule, guidance=self.guidance,
                position_scale=scale, position_until=self.position_until,
                backend=self.backend, seed=seed, compare=True, runs=runs, on_stage=on_stage,
            )  # fmt: skip
        sparse = arms[-1].description
        return self._stage(arms[-1].run, arguments, sparse.num_tokens, scale, sparse, tuple(arms))

    def _stage(self, drawn, arguments, tokens, scale, description, arms=()) -> Stage:
        until = self.position_until
        return Stage(drawn, arguments["strength"], tokens, scale, until, description, arms)


def generate_high_resolution(
    pipe: HasComponents,
    prompt: str,
    stages: Sequence[tuple[int, int]],
    *,
    call: dict | None = None,
    later_call: dict | None = None,
    strength: float | Sequence[float] = 0.7,
    method: Method | str | None = "local",
    schedule: Schedule | None = None,
    proportional: bool = True,
    ntk_factor: float = 10.0,
    position_scale: float | Literal["fit"] = 1.0,
    position_until: float = 0.0,
    guidance: HeadGuidance | None = None,
    backend: str = "auto",
    seed: int = 0,
    compare: bool = False,
    runs: int = 1,
    on_stage: Callable[[str], None] = lambda stage: None,
    **options: Any,
) -> list[Stage]:
    """Draw small, then enlarge, put noise on and denoise again, stage after stage.

    The first stage runs the pipeline as it is. Each later one enlarges the picture in pixels,
    encodes it, adds noise up to ``strength`` and denoises it with the pipeline's image-to-image
    variant, with the method in place.

    Args:
        pipe: a text-to-image pipeline. A method that is enabled on it runs in all stages; pass
            ``method=None`` then.
        stages: (height, width) in pixels, each larger than the one before; the first at the size
            the model was trained for.
        call: the other arguments of the pipeline's call, such as num_inference_steps.
        later_call: arguments over those in the stages after the first, such as true_cfg_scale=1,
            which halves their work.
        strength: above 0, to 1, where nothing but the prompt is kept; one for all stages after
            the first, or one for each.
        method, schedule, options: as :func:`dittfast.enable`; of the stages after the first.
        proportional: sharpen local attention for the longer sequence by CLEAR's proportional
            scale, with the first stage's number of tokens as its reference length (CLEAR's is
            4,608), unless the method has one of its own.
        ntk_factor: the base of FLUX's rotary embedding times this in the stages after the first;
            10 as in CLEAR, 1 to leave it.
        position_scale: the position ids of the image times this in those stages; "fit" makes each
            stage span the first one's positions
            (:func:`~dittfast.pipelines.runs.positions.positions_scaled`; take ntk_factor=1 then).
        position_until: they are scaled while the time is above this.
        guidance: weakened heads that guide every stage.
        seed: stage n draws its noise from ``seed + n``.
        compare, runs: draw the last stage with dense attention, too, from the same picture and
            noise (:func:`~dittfast.pipelines.runs.compare.generate`).
        on_stage: called with the name of what comes next.

    Returns:
        The stages; ``[-1].image`` is the result.

    Raises:
        ValueError: sizes, strengths or options out of range, a pipeline for video or without an
            image-to-image variant, and as :func:`dittfast.enable`.
        FloatingPointError: a picture with values that are not finite.
    """
    stages = [(int(height), int(width)) for height, width in stages]
    check_stages(stages)
    strengths = _strengths(strength, len(stages))
    check_ranges(prompt=prompt, seed=seed, runs=runs)
    if is_video(pipe):
        raise ValueError(f"{type(pipe).__name__} draws videos; stages are for pictures")
    chosen, schedule = _chosen(pipe, method, schedule, options)
    if compare and chosen is None:
        raise ValueError("there is nothing to compare dense attention with; choose a method")
    larger = image_to_image(pipe)
    calls = _calls(pipe, larger, prompt, stages, call or {}, later_call or {})
    scales = [_position_scale(position_scale, stages[0], stage) for stage in stages[1:]]
    with rope_theta_scaled(pipe, ntk_factor), positions_scaled(pipe, scales[-1], position_until):
        pass  # checks them

    enabled = _is_enabled(pipe)
    on_stage(f"{stages[0][1]} x {stages[0][0]}")
    with _running(pipe, None if enabled else "dense", guidance):
        first = run(pipe, calls[0], seed)
        tokens = describe(pipe).num_tokens
    done = [Stage(first, None, tokens)]
    if proportional and isinstance(chosen, Local) and not chosen.proportional:
        chosen = replace(chosen, proportional=tokens)
    enlarging = _Enlarging(
        larger, chosen, schedule, backend, enabled, guidance, ntk_factor, position_until
    )
    for number, (arguments, value, scale) in enumerate(zip(calls[1:], strengths, scales), 1):
        height, width = stages[number]
        name = f"{width} x {height}"
        on_stage(name)
        picture = done[-1].image.resize((width, height), Image.Resampling.LANCZOS)
        arguments |= {"image": picture, "strength": value}
        if compare and number == len(calls) - 1:
            told = lambda arm, name=name: on_stage(f"{name}, {arm}")  # noqa: E731
            done.append(enlarging.compare(arguments, scale, seed + number, runs, told))
        else:
            done.append(enlarging.draw(arguments, scale, seed + number))
    return done


def as_record(stages: Sequence[Stage]) -> list[dict]:
    """What ran in each stage, as plain data for JSON."""
    return [
        {
            "height": int(np.shape(stage.run.frames)[1]),
            "width": int(np.shape(stage.run.frames)[2]),
            "strength": stage.strength,
            "steps": len(stage.run.timing.steps),
            "num_tokens": stage.num_tokens,
            "position_scale": stage.position_scale,
            "position_until": stage.position_until,
            "seconds": stage.run.timing.total,
            "attention": None if stage.description is None else stage.description.to_dict(),
        }
        for stage in stages
    ]
