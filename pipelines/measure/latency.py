"""How long a pipeline takes with a method and with dense attention, and what could be gained."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from dittfast.environment import peak_memory, reset_peak_memory
from dittfast.measure.timing import in_turns, percentiles, synchronize

from ..description import Description
from ..families import FAMILIES
from ..fingerprint import weights_digest
from ..models import attention_layers, execution_device, stock_class, transformers_of
from ..runs.compare import draw, quality
from ..runs.run import Run
from ..runs.settings import run_settings
from ..runs.sources import Source
from .fidelity import dense_kernel
from .method_check import Checked, check_method
from .variants import Variant


class _Timed(TorchFunctionMode):
    """Adds up the seconds of scaled_dot_product_attention inside self-attention modules."""

    def __init__(self, device: torch.device, clock: Callable[[], float]):
        super().__init__()
        self.device, self.clock = device, clock
        self.inside = False
        self.seconds = 0.0
        self.calls = 0

    def now(self) -> float:
        synchronize(self.device)
        return self.clock()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention or not self.inside:
            return func(*args, **(kwargs or {}))
        start = self.now()
        out = func(*args, **(kwargs or {}))
        self.seconds += self.now() - start
        self.calls += 1
        return out


class AttentionSeconds:
    """Seconds inside the self-attention modules of a run, and of dense attention in them.

    Attributes:
        modules: the modules' calls in all: projections, norms, attention.
        attention: of a dense run, the calls of attention alone.
        calls: how many of them.
    """

    def __init__(self):
        self.modules = 0.0
        self.attention = 0.0
        self.calls = 0


@contextlib.contextmanager
def attention_seconds(
    pipe, clock: Callable[[], float] = time.perf_counter
) -> Iterator[AttentionSeconds]:
    """Time the self-attention of what runs inside. It waits for the device around every call.

    Use it in a run of its own: waiting slows an accelerator down.
    """
    models = transformers_of(pipe)
    device = next(iter(models.values())).device
    spent, mode, began = AttentionSeconds(), _Timed(device, clock), [0.0]

    def enter(module, args):
        mode.inside = True
        began[0] = mode.now()

    def leave(module, args, out):
        spent.modules += mode.now() - began[0]
        mode.inside = False

    with contextlib.ExitStack() as stack:
        for model in models.values():
            family = FAMILIES[stock_class(type(model)).__name__]
            for module in attention_layers(model, family).values():
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        with mode:
            yield spent
    spent.attention, spent.calls = mode.seconds, mode.calls


def amdahl(share: float, density: float | None = None) -> float:
    """How many times as fast a run can become whose attention is ``share`` of its time.

    Args:
        density: of the attention that remains; None for an attention that costs nothing.

    Returns:
        ``1 / (1 - share + share * density)``; infinite for a share of 1 that vanishes.

    Raises:
        ValueError: a share or density outside 0..1.
    """
    for name, value in (("share", share), ("density", density)):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in 0..1, got {value}")
    rest = 1 - share + share * (density or 0.0)
    return float("inf") if rest == 0 else 1 / rest


def latency_settings(
    pipe,
    source: Source,
    call: dict,
    variant: Variant,
    *,
    pairs: int,
    seed: int,
    kernel: str,
    loading: dict | None = None,
) -> dict:
    """What a row of :func:`measure_latency` is of, as plain data; equal for a row to use again."""
    loaded = {"loading": loading} if loading else {}
    return loaded | {
        "task": "latency",
        "label": variant.label,
        **variant.settings(),
        **run_settings(pipe, source, call),
        "weights": weights_digest(pipe.components),
        "prompt": call["prompt"],
        "seed": seed,
        "dense_kernel": kernel,
        "pairs": pairs,
    }


class _Arms:
    """Dense attention and a method, drawn from one call and seed in turns."""

    def __init__(self, pipe, call: dict, seed: int, variant: Variant):
        self.pipe, self.call, self.seed, self.variant = pipe, call, seed, variant
        self.device = execution_device(pipe)
        self.runs: dict[str, list[Run]] = {"dense": [], "method": []}
        self.memory: dict[str, int | None] = {}
        self.shares: dict[str, dict] = {}
        self.description: Description | None = None

    def draw(self, arm: str) -> Run:
        v = self.variant
        method = None if arm == "dense" else v.drawn_by
        run, description = draw(
            self.pipe, self.call, self.seed, method, v.schedule, backend=v.backend
        )
        self.description = description or self.description
        return run

    def time(self, pairs: int, on_stage: Callable[[str], None]) -> str | None:
        """Time whole calls in turns after a warm-up of each; why not, if the method is idle."""
        for arm in self.runs:
            on_stage(f"{arm}, warm-up")
            self.draw(arm)
        if self.description.did_not_run is not None:
            return self.description.did_not_run
        for turn, arm in in_turns(self.runs, pairs):
            on_stage(f"{arm}, pair {turn + 1} of {pairs}")
            reset_peak_memory(self.device)
            result = self.draw(arm)
            peak = peak_memory(self.device)
            self.memory[arm] = None if peak is None else max(peak, self.memory.get(arm) or 0)
            self.runs[arm].append(result)
        return None

    def share(self, on_stage: Callable[[str], None]) -> None:
        """Attention's share of a run of each arm."""
        for arm in self.runs:
            on_stage(f"{arm}, share of attention")
            with attention_seconds(self.pipe) as spent:
                total = self.draw(arm).timing.total
            self.shares[arm] = {"modules": spent.modules / total}
            if arm == "dense":
                self.shares[arm] |= {"attention": spent.attention / total, "calls": spent.calls}


def measure_latency(
    pipe,
    source: Source,
    call: dict,
    variant: Variant,
    *,
    pairs: int = 5,
    seed: int = 0,
    kernel: str = "auto",
    on_stage: Callable[[str], None] = lambda stage: None,
    loading: dict | None = None,
) -> dict:
    """Check the method, then time whole calls, dense and sparse in turns, after a warm-up of each.

    The share of attention comes from one further run of each arm that waits for the device
    around every attention call.

    Args:
        call: see :func:`~dittfast.pipelines.runs.call.call_arguments`.
        pairs: of timed calls.
        loading: what was put into the pipeline, as plain data.

    Returns:
        Plain data; ``end_to_end`` and ``per_step`` always stand together. Of a method that does
        not run at these settings nothing is timed: ``did_not_run`` says why.

    Raises:
        dittfast.measure.check.WrongResult: the method's attention is wrong; nothing is timed.
        ValueError: fewer than one pair, or as :func:`~dittfast.pipelines.adapter.enable`.
    """
    if pairs < 1:
        raise ValueError(f"pairs must be at least 1, got {pairs}")
    settings = latency_settings(
        pipe, source, call, variant, pairs=pairs, seed=seed, kernel=kernel, loading=loading
    )
    arms = _Arms(pipe, call, seed, variant)
    with dense_kernel(kernel):
        on_stage("checking the method's attention")
        checked = check_method(pipe, call, variant.method, variant.schedule, variant.backend, seed)
        idle = arms.time(pairs, on_stage)
        if idle is None:
            arms.share(on_stage)
    row = settings | {
        "preset": variant.preset,
        "did_not_run": idle,
        "parity": checked.to_dict(),
        "attention": arms.description.to_dict(),
    }
    return row if idle else row | _numbers(arms, checked)


def _numbers(arms: _Arms, checked: Checked) -> dict:
    dense, sparse = arms.runs["dense"], arms.runs["method"]

    def step(result: Run) -> float | None:
        return statistics.median(result.timing.steps) if result.timing.steps else None

    whole = [a.timing.total / b.timing.total for a, b in zip(dense, sparse)]
    stepwise = None
    if all(step(r) for r in (*dense, *sparse)):
        stepwise = percentiles(step(a) / step(b) for a, b in zip(dense, sparse))
    share = arms.shares["dense"]["attention"]
    ceiling = amdahl(min(share, 1.0))
    return {
        "seconds": {
            name: {
                "whole": percentiles(r.timing.total for r in results),
                "step": percentiles(s for r in results for s in r.timing.steps)
                if stepwise
                else None,
                "prompt": percentiles(r.timing.prompt for r in results),
                "decode": percentiles(r.timing.decode for r in results),
            }
            for name, results in arms.runs.items()
        },
        "end_to_end": percentiles(whole),
        "per_step": stepwise,
        "runs": {name: [asdict(r.timing) for r in results] for name, results in arms.runs.items()},
        "share": arms.shares,
        "ceiling": None if ceiling == float("inf") else ceiling,
        "ceiling_at_density": None
        if checked.density is None and checked.work is None
        else amdahl(
            min(share, 1.0), min(checked.work if checked.density is None else checked.density, 1.0)
        ),
        "peak_memory_bytes": arms.memory,
        "against_dense": quality(dense[0], sparse[0]),
    }
