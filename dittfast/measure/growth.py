"""How time and memory of a method grow with the number of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from ..cache import nbytes
from ..environment import give_back_memory, peak_memory, reset_peak_memory
from ..layout import Layout
from ..methods.base import Method
from ..methods.head_groups import by_head
from .bench import Workload, one_period
from .check import check_attention
from .timing import clock_for, interleaved_seconds, percentiles, synchronize

# Longest sequence on which plain dense attention is timed beside the method.
_DENSE_TOKENS = 16384


def growing_layout(tokens: int, frame: tuple[int, int] | None = None) -> Layout:
    """An image of ``tokens`` tokens, or a video of that many in frames of fixed size.

    Raises:
        ValueError: tokens that do not fill frames.
    """
    if frame is None:
        height = next(n for n in range(math.isqrt(tokens), 0, -1) if tokens % n == 0)
        return Layout.image(height, tokens // height)
    if tokens % math.prod(frame):
        raise ValueError(f"{tokens} tokens do not fill frames of {frame[0]} x {frame[1]}")
    return Layout.video(tokens // math.prod(frame), *frame)


def exponent(tokens: Sequence[int], values: Sequence[float]) -> float | None:
    """The least-squares slope of log(values) over log(tokens).

    None for fewer than two sizes, or a value of 0.
    """
    if len(tokens) < 2 or not all(values):
        return None
    x, y = (torch.tensor(v, dtype=torch.float64).log() for v in (tokens, values))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def growth(
    method: Method,
    tokens: Sequence[int],
    work: Workload,
    *,
    frame: tuple[int, int] | None = None,
    repeats: int = 3,
    on_row: Callable[[dict], None] = lambda row: None,
) -> dict:
    """Time ``method`` at growing lengths, and fit exponents.

    A row's seconds cover everything a new layout costs: planning (for a static method building the
    plan, once) and attention; processor time where one CPU thread computes. Results are checked
    against a dense fp64 oracle on sampled rows before a row is timed. Up to 16,384 tokens dense
    attention is timed in the same rounds.

    Args:
        tokens: lengths of the sequence. frame: rows and columns of a frame, None for one image.
        work: its layout is replaced. on_row: called with each row as it is ready.

    Returns:
        ``{"method", "frame", "rows", "exponents"}``, plain values. ``exponents`` are slopes in
        log-log scale of the median ``seconds``, of ``plan_bytes`` (what is kept of the layout;
        None where that is nothing), of ``call_bytes`` (by how much memory in use rises at most in
        a call; None where that is not known) and of the ``pairs`` computed, or of as many FLOPs.

    Raises:
        WrongResult: a result is wrong. ValueError: lengths that do not work.
    """
    rows = []
    for count in sorted(tokens):
        case = replace(work, layout=growing_layout(count, frame))
        row = _row(method, case, repeats)
        rows.append(row)
        on_row(row)
    counts = [row["tokens"] for row in rows]
    fitted = {
        "seconds": exponent(counts, [row["seconds"]["p50"] for row in rows]),
        "plan_bytes": exponent(counts, [row["plan_bytes"] for row in rows]),
        "call_bytes": exponent(counts, [row["call_bytes"] for row in rows]),
        "pairs": exponent(counts, [row["pairs"] for row in rows]),
    }
    return {
        "method": method.to_dict(),
        "frame": frame,
        "heads": work.heads,
        "head_dim": work.head_dim,
        "rows": rows,
        "exponents": fitted,
    }


@torch.no_grad()
def _row(method: Method, work: Workload, repeats: int) -> dict:
    layout = work.layout
    q, k, v, grad_out = work.inputs()
    method.prepare(layout, q.device)
    hidden = work.hidden_states() if method.needs_hidden_states else None
    amount, plan = check_attention(method, layout, q, k, v, grad_out, hidden_states=hidden)
    own = work.parameters(method) | {"hidden_states": hidden}
    functions = {"attend": partial(one_period, method, layout, q, k, v, **own)}
    if layout.num_tokens <= _DENSE_TOKENS:
        dense = torch.nn.functional.scaled_dot_product_attention
        functions["dense"] = partial(dense, q, k, v)
    call_bytes = _call_bytes(functions["attend"], q.device)
    # The check was the warm-up.
    times = interleaved_seconds(functions, repeats, q.device, warmup=0, clock=clock_for(q.device))
    kept = by_head(method, work.heads).keep(layout, q.device) if plan is None else plan
    return {
        "tokens": layout.num_tokens,
        "grid": list(layout.grid.shape),
        "density": amount.density,
        "work": amount.work,
        "pairs": amount.work * float(layout.num_tokens) ** 2,
        "plan_bytes": nbytes(kept),
        "seconds": percentiles(s / method.period for s in times["attend"]),
        "call_bytes": call_bytes,
        "dense_seconds": percentiles(times["dense"]) if "dense" in times else None,
        "rounds": repeats,
    }


def _call_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """By how much the memory in use rises at most in a call; None where nobody knows."""
    give_back_memory()  # of earlier calls: a peak in it would not be seen
    if not reset_peak_memory(device):
        return None
    before = peak_memory(device)
    call()
    synchronize(device)
    peak = peak_memory(device)
    return None if before is None or peak is None else max(0, peak - before)
