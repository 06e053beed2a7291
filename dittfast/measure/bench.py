"""Measure attention: right first, then how fast, next to dense and flex_attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

import torch
import torch.nn.functional as F

from ..attention import attend, choose_backend, method_attention, not_supported_reasons
from ..layout import Layout
from ..methods.amount import dense_flops
from ..methods.base import Method
from ..methods.head_groups import by_head, split
from ..methods.memory import Memory
from ..plan import Plan
from ..testing import attention_inputs
from .check import check_against_dense, check_attention, method_plan
from .timing import (
    check_repeats,
    clock_for,
    interleaved_seconds,
    percentiles,
    synchronize,
    with_gradient,
)

# As many query rows as dense attention needs for its full rate: the rest would only take longer.
_DENSE_ROWS = 1024
# Of a method that tells frames apart, where only a number of tokens is given.
_DEFAULT_FRAMES = 16


@dataclass(frozen=True)
class Workload:
    """The attention call to measure: self-attention of random tokens over ``layout``."""

    layout: Layout
    batch: int = 1
    heads: int = 4
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    backward: bool = False
    seed: int = 0

    def __post_init__(self):
        for name in ("batch", "heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def hidden_states(self) -> torch.Tensor:
        """``[batch, tokens, heads * head_dim]``, for methods that look at them."""
        draw = torch.Generator().manual_seed(self.seed + 1)
        shape = self.batch, self.layout.num_tokens, self.heads * self.head_dim
        return torch.randn(shape, generator=draw).to(self.device, self.dtype)

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """``(q, k, v, grad_out)``, each ``[batch, heads, tokens, head_dim]``."""
        return attention_inputs(
            self.batch,
            self.heads,
            self.layout.num_tokens,
            self.head_dim,
            dtype=self.dtype,
            device=self.device,
            seed=self.seed,
        )

    def parameters(self, method: Method) -> dict[str, torch.Tensor]:
        """Initial values of what the method trains in a layer, as a model in this dtype has them.

        With them it computes what it computes once they are trained.
        """
        shape = self.heads, self.head_dim, self.heads * self.head_dim
        values = by_head(method, self.heads).layer_parameters(*shape)
        return {name: value.to(self.device, self.dtype) for name, value in values.items()}


def layout_for(tokens: int, method: Method | None = None, frames: int | None = None) -> Layout:
    """A layout of ``tokens`` tokens with frames as nearly square as they come.

    Without ``frames`` it is an image, or for methods that need a video one of up to 16 frames.

    Raises:
        ValueError: tokens that are no multiple of the frames.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    if frames is None:
        of_frames = method is not None and method.for_videos
        frames = math.gcd(tokens, _DEFAULT_FRAMES) if of_frames else 1
    if frames < 1 or tokens % frames:
        raise ValueError(f"{tokens} tokens do not fill {frames} frames; give height and width")
    area = tokens // frames
    height = next(n for n in range(math.isqrt(area), 0, -1) if area % n == 0)
    return Layout.video(frames, height, area // height)


def bench_attention(
    method: Method,
    work: Workload,
    *,
    repeats: int = 10,
    flex: bool = True,
    backend: str = "auto",
    compare: tuple[str, ...] = (),
    most_seconds: float | None = None,
    brief: bool = False,
    dense_kernels: Mapping[str, Callable[[], AbstractContextManager]] | None = None,
) -> dict:
    """Check, then time dense attention, ``method`` and compiled flex_attention in turns.

    A static method's plan is made before the timing, as in a pipeline, where all layers and steps
    share it; ``plan_seconds`` says how long that took. A dynamic method plans in every timed call.
    Of a method that keeps values from step to step the seconds are a mean over its period.

    Args:
        compare: more backends to check and time with the same plans, where they can run.
        most_seconds: as for :func:`~dittfast.measure.timing.interleaved_seconds`, counted from
            the call; checks and compiling take their share of it.
        brief: take processor time where one CPU thread computes, count the checks as the warm-up,
            and time dense attention on 1,024 of the query rows.
        dense_kernels: more kernels of dense attention to time, by name, each with what holds
            PyTorch to it.

    Returns:
        A row of plain values. ``work`` is the part of dense attention's FLOPs that is computed:
        pooled and appended keys count there, not in ``density``, which is None for a method that
        computes its own output. ``useful_efficiency`` is the median over rounds of (dense seconds
        * density / attend seconds), with work where there is no density: 1 means that every pair
        kept costs what it costs in dense attention. ``flex`` holds seconds, or under ``not_run``
        why there are none; ``others`` has the same for each backend of ``compare``, and
        ``dense_kernels`` for each of those.

    Raises:
        WrongResult: the method's result is wrong; nothing is timed.
        ValueError: options or sizes that do not work, or gradients of a method that has none.
    """
    check_repeats(repeats)
    begin = perf_counter()
    layout = work.layout
    q, k, v, grad_out = work.inputs()
    if work.backward:
        q, k, v = (x.requires_grad_() for x in (q, k, v))
    method = by_head(method, work.heads)
    if work.backward and method.remembers:
        raise ValueError(
            f"{method.name} keeps nothing in passes that may be differentiated, where it is dense "
            "attention; there is no backward pass to measure"
        )
    hidden = work.hidden_states() if method.needs_hidden_states else None
    plan_seconds, kept, planned = _planned(method, layout, q, k, v)
    plan = None if planned is None else planned[0]
    chosen = choose_backend(q.device, q.dtype) if backend == "auto" else backend
    plans = any(group.method.planner is not None for group in split(method, work.heads))
    others = [
        name for name in compare if plans and name != chosen and _may_run(name, q, k, v, planned)
    ]
    for name in (backend, *others):
        options = {"backend": name, "backward": work.backward}
        options["plan"] = plan if method.static else None
        options["hidden_states"] = hidden
        amount, _ = check_attention(method, layout, q, k, v, grad_out, **options)

    dense_rows = min(q.shape[2], _DENSE_ROWS) if brief else q.shape[2]
    dense_q = q.detach()[:, :, :dense_rows].requires_grad_(work.backward)

    def dense():
        return F.scaled_dot_product_attention(dense_q, k, v)

    own = work.parameters(method)

    def sparse(backend):
        given = {"backend": backend, "kept": kept, "hidden_states": hidden}
        return one_period(method, layout, q, k, v, **given, **own)

    functions = {"dense": dense, "attend": partial(sparse, backend)}
    functions |= {name: partial(sparse, name) for name in others}
    flex_arm, flex_row = {}, {"not_run": "not asked for"}
    if flex and planned is None:
        flex_row = {"not_run": "the method has no one plan to give it"}
    elif flex:
        plan, (_, near_k, near_v), scale = planned
        inputs = q.detach(), near_k.detach(), near_v.detach()
        flex_arm, flex_row = _flex_arm(inputs, grad_out, plan, scale, work.backward)
    if work.backward:
        grad = grad_out[:, :, :dense_rows]
        functions["dense"] = with_gradient(functions["dense"], (dense_q, k, v), grad)
        for name in ("attend", *others):
            functions[name] = with_gradient(functions[name], (q, k, v), grad_out)
    functions |= flex_arm
    kernels = {}
    for name, hold in (dense_kernels or {}).items():
        held = _held(functions["dense"], hold)
        kernels[name] = _not_run(held)
        if not kernels[name]:
            functions[f"dense {name}"] = held
    options = {}
    if brief:
        options = {"warmup": 0, "clock": clock_for(work.device)}
    if most_seconds is not None:
        options["most_seconds"] = begin + most_seconds - perf_counter()
    with torch.set_grad_enabled(work.backward):
        seconds = interleaved_seconds(functions, repeats, work.device, **options)
    for name in seconds:
        if name.startswith("dense"):
            seconds[name] = [s * q.shape[2] / dense_rows for s in seconds[name]]
        elif name in ("attend", *others):
            seconds[name] = [s / method.period for s in seconds[name]]
    row = _row(method, work, plan, amount, plan_seconds, seconds, flex_row, chosen, others)
    for name, found in kernels.items():
        if not found:
            found |= {"seconds": percentiles(seconds[f"dense {name}"])}
    return row | ({"dense_kernels": kernels} if kernels else {})


def _held(function: Callable, hold: Callable[[], AbstractContextManager]) -> Callable:
    """``function`` with PyTorch held to one kernel."""

    def run():
        with hold():
            return function()

    return run


def _not_run(function: Callable) -> dict:
    """Under ``not_run`` why it cannot; empty where it can."""
    try:
        function()
    except RuntimeError as error:  # PyTorch has no kernel of this kind for these tensors
        return {"not_run": _reason(error)}
    return {}


def one_period(method: Method, layout: Layout, q, k, v, **given) -> torch.Tensor:
    """Attention at the steps of a run after which the method has done all that it does.

    Args:
        given: as for :func:`~dittfast.attention.method_attention`.
    """
    memory = Memory() if method.remembers else None
    for step in range(method.period):
        if memory is not None:
            memory.begin(step)
        out = method_attention(method, layout, q, k, v, memory=memory, **given)
    return out


def _planned(method: Method, layout: Layout, q, k, v) -> tuple[float, object, tuple | None]:
    """Seconds that planning takes, what is kept of the layout, and :func:`method_plan`'s answer."""
    method.prepare(layout, q.device)
    synchronize(q.device)
    start = perf_counter()
    kept = method.keep(layout, q.device)
    planned = None if method.computes else method_plan(method, layout, q, k, v, plan=kept)
    synchronize(q.device)
    return perf_counter() - start, kept, planned


def _may_run(backend: str, q, k, v, planned: tuple | None) -> bool:
    """Whether a backend takes the plan; of groups of heads that have several, the inputs."""
    plan, (q, k, v), _ = planned or (Plan.full(k.shape[2]), (q, k, v), None)
    return not not_supported_reasons(backend, q, k, v, plan)


def _flex_arm(inputs, grad_out, plan: Plan, scale, backward) -> tuple[dict[str, Callable], dict]:
    """What runs the flex backend under this plan, or under ``not_run`` why nothing does."""
    q, k, v = (x.requires_grad_(backward) for x in inputs)
    reasons = not_supported_reasons("flex", q, k, v, plan)
    if reasons:
        return {}, {"not_run": "; ".join(reasons)}
    run = partial(attend, q, k, v, plan, scale=scale, backend="flex")
    try:
        check_against_dense(q, k, v, grad_out, plan, scale, "flex", backward)
    except Exception as error:  # whatever a compiler throws belongs in the table
        return {}, {"not_run": _reason(error)}
    return {"flex": with_gradient(run, (q, k, v), grad_out) if backward else run}, {}


def _row(
    method, work, plan: Plan | None, amount, plan_seconds, seconds, flex_row, backend, others
) -> dict:
    layout = work.layout
    share = amount.work if amount.density is None else amount.density
    pairs = dense_flops(layout.num_tokens, work.heads, work.head_dim) * work.batch
    dense = pairs * 3.5 if work.backward else pairs
    useful = amount.work * dense
    speedups = [d / s for d, s in zip(seconds["dense"], seconds["attend"])]
    row = {
        "method": method.to_dict(),
        "static": method.static,
        "tokens": layout.num_tokens,
        "grid": list(layout.grid.shape),
        "context": layout.num_context,
        "keys": layout.num_tokens if plan is None else plan.num_keys,
        "batch": work.batch,
        "heads": work.heads,
        "head_dim": work.head_dim,
        "dtype": str(work.dtype).removeprefix("torch."),
        "backward": work.backward,
        "backend": backend,
        "rounds": len(speedups),
        "density": amount.density,
        "work": amount.work,
        "useful_flops": useful,
        "dense_flops": dense,
        "plan_seconds": plan_seconds,
        "dense_seconds": percentiles(seconds["dense"]),
        "attend_seconds": percentiles(seconds["attend"]),
        "speedup": percentiles(speedups),
        "useful_efficiency": percentiles(s * share for s in speedups),
    }
    row["attend_gflops"] = useful / row["attend_seconds"]["p50"] / 1e9
    row["dense_gflops"] = dense / row["dense_seconds"]["p50"] / 1e9

    def compared(name) -> dict:
        ratios = [d / s * share for d, s in zip(seconds["dense"], seconds[name])]
        numbers = {"seconds": percentiles(seconds[name]), "useful_efficiency": percentiles(ratios)}
        return numbers | {"gflops": useful / numbers["seconds"]["p50"] / 1e9}

    if "flex" in seconds:
        flex_row = compared("flex")
    return row | {"flex": flex_row, "others": {name: compared(name) for name in others}}


def _reason(error: BaseException) -> str:
    """The error that a compiler's errors are about, in a line."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def break_even(
    method: Method,
    tokens: list[int],
    work: Workload,
    *,
    repeats: int = 10,
    frames=None,
    backend: str = "auto",
) -> Iterator[dict]:
    """Rows of :func:`bench_attention` without flex, for growing numbers of tokens.

    Args:
        work: its layout is replaced.
    """
    for count in sorted(tokens):
        layout = layout_for(count, method, frames)
        case = replace(work, layout=layout)
        yield bench_attention(method, case, repeats=repeats, flex=False, backend=backend)


def least_faster(rows: list[dict]) -> int | None:
    """Tokens of the smallest row from which on all are faster than dense; None if the last is not.

    A row is faster if the median of its speed-ups is above 1.
    """
    least = None
    for row in sorted(rows, key=lambda r: r["tokens"], reverse=True):
        if row["speedup"]["p50"] <= 1:
            break
        least = row["tokens"]
    return least
