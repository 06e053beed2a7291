"""What the page asks for: draws dense and sparse, and looks at the attention, one job at a time.

Knows nothing of Gradio: :mod:`page` shows what is made here.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from PIL import Image

from dittfast.config import check_fits, resolve
from dittfast.measure.draw import block_mask
from dittfast.methods.base import Method
from dittfast.methods.head_groups import value_lists
from dittfast.mixture import Mixture
from dittfast.pictures import read_picture

from ..measure.probe import capture, kept_picture, measure
from ..models import attention_layers, family_of, stock_class, transformers_of
from ..runs import sources
from ..runs.call import call_arguments, check_ranges
from ..runs.compare import Arm, generate, record
from ..runs.first_frame import with_first_frame

# What is kept of the attention is computed against all pairs, in fp64.
MOST_TOKENS = 16_384


class Cancelled(Exception):
    """The job was cancelled."""


class Job:
    """A request under way: says how far it is, and may be cancelled from another thread.

    Args:
        on_progress: called with the share that is done, 0 to 1, and what is being done.
    """

    def __init__(self, on_progress: Callable[[float, str], None] = lambda share, words: None):
        self.on_progress = on_progress
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Stop before the transformer's next pass."""
        self._cancelled.set()

    def check(self) -> None:
        """Raise :class:`Cancelled` if it is."""
        if self._cancelled.is_set():
            raise Cancelled("cancelled; nothing was kept")


@dataclass(frozen=True)
class Request:
    """What to draw.

    Attributes:
        model: a sample model, a folder or a hub id.
        method: a name or preset; ``options`` are fields of it or of its schedule.
        call: arguments of the pipeline by name; None where the model's own hold. ``image`` is the
            path of a picture.
        look: whether to look at the attention, too, which takes up to one more dense run;
            at denoising ``step`` and self-attention ``layer``, both from 0, by default the middle.
    """

    model: str
    prompt: str
    method: str
    options: dict = field(default_factory=dict)
    call: dict = field(default_factory=dict)
    seed: int = 0
    look: bool = True
    step: int | None = None
    layer: int | None = None


@dataclass(frozen=True)
class Look:
    """What a method does to one call of attention.

    Attributes:
        step, layer: where; the module's name.
        tokens: of the sequence.
        mask: the plan's block mask. kept: dense attention by kept and dropped blocks.
        density, mass, error: means over the heads, see
            :class:`~dittfast.pipelines.measure.probe.HeadReport`.
    """

    step: int
    layer: str
    tokens: int
    mask: Image.Image
    kept: Image.Image
    density: float
    mass: float
    error: float


@dataclass(frozen=True)
class Result:
    """Dense and sparse, the record of the run as for JSON, and the look or why there is none."""

    dense: Arm
    sparse: Arm
    record: dict
    look: Look | None = None
    no_look: str | None = None


class Studio:
    """Draws what it is asked to, one job at a time; keeps the last model loaded.

    Args:
        device, dtype, backend: as the command line's ``--device``, ``--dtype``, ``--backend``.

    Raises:
        ValueError: no such device, dtype or backend.
    """

    def __init__(self, device: str = "auto", dtype: str = "auto", backend: str = "auto"):
        from dittfast.attention import BACKENDS
        from dittfast.config import unknown

        if backend != "auto" and backend not in BACKENDS:
            raise unknown("backend", backend, ["auto", *BACKENDS])
        self.device = sources.choose_device(device)
        self.dtype = sources.choose_dtype(dtype, self.device)
        self.backend = backend
        self._one_at_a_time = threading.Lock()
        self._loaded: tuple[sources.Source, object] | None = None

    def draw(self, request: Request, job: Job | None = None) -> Result:
        """Draw dense and with the method, from one seed; wait for the job before.

        Raises:
            Cancelled: the job was cancelled; the pipeline is then as it was.
            ValueError, OSError, FloatingPointError: as ``dittfast generate --compare``.
        """
        job = job or Job()
        with self._one_at_a_time:
            job.check()
            return self._draw(request, job)

    def _draw(self, request: Request, job: Job) -> Result:
        call, image = dict(request.call), request.call.get("image")
        numbers = {k: v for k, v in call.items() if k != "image"}
        check_ranges(prompt=request.prompt, seed=request.seed, **numbers)
        if image is not None:
            call["image"] = read_picture(image)
        source = sources.find(request.model.strip())
        method, schedule = resolve(request.method, **request.options)
        if method.dense:
            raise ValueError("dense is what a method is compared with; choose another method")
        pipe = self._load(source, job)
        classes = [stock_class(type(model)).__name__ for model in transformers_of(pipe).values()]
        check_fits(request.method, classes)
        call = call_arguments(pipe, request.prompt, source.settings, **call)
        call = with_first_frame(pipe, call, source.settings)
        steps = _steps(pipe, call)
        at = _place(pipe, steps, request) if request.look else None
        look = no_look = None
        with _progress(pipe, steps, at, job) as progress:
            dense, sparse = generate(
                pipe,
                call,
                method,
                schedule,
                backend=self.backend,
                seed=request.seed,
                compare=True,
                on_stage=progress.stage,
            )
            data = record(pipe, source, call, request.seed, [dense, sparse])
            if at is not None:
                no_look = _no_mask(method) or _too_long(sparse.description.num_tokens)
            if at is not None and no_look is None:
                progress.stage("attention", last_step=at[0])
                look = self._look(pipe, call | {"num_inference_steps": steps}, method, at, request)
        return Result(dense, sparse, data, look, no_look)

    def _load(self, source: sources.Source, job: Job):
        if self._loaded is None or self._loaded[0] != source:
            job.on_progress(0.0, f"loading {source.name}")
            self._loaded = None  # two models need not fit into memory
            pipe = sources.load(source, self.device, self.dtype)
            pipe.set_progress_bar_config(disable=True)
            self._loaded = source, pipe
        return self._loaded[1]

    def _look(
        self, pipe, call: dict, method: Method, at: tuple[int, int], request: Request
    ) -> Look:
        step, layer = at
        given = {"seed": request.seed, "hidden_states": method.needs_hidden_states}
        captured, *_ = capture(pipe, call, steps=[step], layers=[layer], **given)
        report = measure(method, captured, self.backend)
        density, mass, error = (
            sum(getattr(head, name) for head in report.heads) / len(report.heads)
            for name in ("density", "mass", "error")
        )
        where = f"{report.layer}, step {step + 1} of {call['num_inference_steps']}"
        by_head = report.plan.kv_indices.shape[1] > 1
        mask = block_mask(
            report.plan,
            captured.layout,
            title=f"{method.name}, {where}" + (", head 0" if by_head else ""),
            lines=[f"density {report.heads[0].density:.4f}"],
            legend_below=True,
            size=420,
        )
        kept = kept_picture([report], f"{method.name}: {mass:.0%} of the attention kept")
        tokens = captured.layout.num_tokens
        return Look(step, report.layer, tokens, mask, kept, density, mass, error)


def _no_mask(method: Method) -> str | None:
    if method.planner is not None and not value_lists(method) and not isinstance(method, Mixture):
        return None
    return (
        f"{method.name} has no one mask of key blocks: it computes its own output, or differs by "
        "head, layer or step. What ran where says how much it computes."
    )


def _too_long(tokens: int | None) -> str | None:
    if tokens is None or tokens <= MOST_TOKENS:
        return None
    return (
        f"What is kept of the attention is shown for up to {MOST_TOKENS:,} tokens, and this has "
        f"{tokens:,}: draw a smaller picture, or turn it off."
    )


def _steps(pipe, call: dict) -> int:
    default = inspect.signature(type(pipe).__call__).parameters.get("num_inference_steps")
    return call.get("num_inference_steps") or getattr(default, "default", 1)


def _place(pipe, steps: int, request: Request) -> tuple[int, int]:
    """Step and layer to look at, checked before anything is drawn; by default the middle."""
    model = next(iter(transformers_of(pipe).values()))
    place = []
    layers = len(attention_layers(model, family_of(model)))
    for name, count, asked in (("step", steps, request.step), ("layer", layers, request.layer)):
        if asked is not None and not 0 <= asked < count:
            raise ValueError(
                f"the {name} to look at must lie in 0..{count - 1} here, got {asked}; an empty "
                "field is the middle one"
            )
        place.append(count // 2 if asked is None else asked)
    return place[0], place[1]


class _Progress:
    """Counts the transformer's passes, says how far the job is, and stops one that is cancelled.

    The warm-up runs, of one step each, tell how many passes a step has.
    """

    def __init__(self, pipe, steps: int, at: tuple[int, int] | None, job: Job):
        self.pipe, self.steps, self.job = pipe, steps, job
        self.total = 2 + 2 * steps + (0 if at is None else at[0] + 1)
        self.before, self.this, self.name = 0, 0, ""
        self.passes, self.passes_per_step = 0, 1
        self.last_step: int | None = None

    def stage(self, name: str, last_step: int | None = None) -> None:
        """What comes next; its steps after ``last_step`` are of no use."""
        if "warm-up" in self.name:
            self.passes_per_step = max(1, self.passes)
        self.before += self.this
        self.this = 1 if "warm-up" in name else self.steps if last_step is None else last_step + 1
        self.name, self.passes, self.last_step = name, 0, last_step
        self.say(0)

    def one_pass(self, *_) -> None:
        """Before every pass of the transformer."""
        self.job.check()
        step = self.passes // self.passes_per_step
        if self.last_step is not None and step > self.last_step and hasattr(self.pipe, "interrupt"):
            self.pipe._interrupt = True  # the loop goes on without the transformer
        self.passes += 1
        self.say(min(step, self.this - 1))

    def say(self, step: int) -> None:
        words = self.name
        if "warm-up" not in words:
            words += f", step {step + 1} of {self.steps}"
        self.job.on_progress(min(1.0, (self.before + step) / self.total), words)


@contextlib.contextmanager
def _progress(pipe, steps: int, at: tuple[int, int] | None, job: Job):
    progress = _Progress(pipe, steps, at, job)
    hooks = [
        model.register_forward_pre_hook(progress.one_pass)
        for model in transformers_of(pipe).values()
    ]
    try:
        yield progress
    except BaseException:
        # What was cut off in the middle of a call may have left a model on the device.
        if hasattr(pipe, "maybe_free_model_hooks"):
            pipe.maybe_free_model_hooks()
        raise
    finally:
        for hook in hooks:
            hook.remove()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
