"""Measure attention: right first, then how fast, next to dense and flex_attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from time import perf_counter

import torch
import torch.nn.functional as F

from .attention import attend, choose_backend
from .block_lists import block_states, run_lengths
from .layout import Layout, inverse_permutation
from .methods.base import Method
from .plan import Plan
from .testing import assert_within_budget, attention_inputs

# Query rows that are compared with the oracle.
_SAMPLED_ROWS = 64
# Methods that tell frames apart: with only a number of tokens given they get a video.
_VIDEO_METHODS = ("radial",)
_DEFAULT_FRAMES = 16


class ParityError(AssertionError):
    """A result that is to be measured is wrong."""


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


def layout_for(tokens: int, method: str = "", frames: int | None = None) -> Layout:
    """A layout of ``tokens`` tokens with frames as nearly square as they come.

    Without ``frames`` it is an image, or for methods that need a video one of up to 16 frames.

    Raises:
        ValueError: tokens that are no multiple of the frames.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    if frames is None:
        frames = math.gcd(tokens, _DEFAULT_FRAMES) if method in _VIDEO_METHODS else 1
    if frames < 1 or tokens % frames:
        raise ValueError(f"{tokens} tokens do not fill {frames} frames; give height and width")
    area = tokens // frames
    height = next(n for n in range(math.isqrt(area), 0, -1) if area % n == 0)
    return Layout.video(frames, height, area // height)


def mask_rows(plan: Plan, tokens: torch.Tensor) -> torch.Tensor:
    """``[B|1, H|1, n, num_keys]`` bool: rows of :meth:`Plan.to_dense_mask`, one by one.

    Memory is ``O(n * num_keys)``, so that a few rows can be checked at any length.
    """
    t = plan.to("cpu").tensors()
    at = tokens.cpu().long()
    if t.q_order is not None:
        at = inverse_permutation(t.q_order)[at].long()
    row = _block_of(t.q_starts, t.q_lengths)[at]
    lists = (x[:, :, row] for x in (t.kv_indices, t.kv_num_blocks, t.kv_num_full_blocks))
    state = block_states(*lists, t.kv_starts.numel())[..., _block_of(t.kv_starts, t.kv_lengths)]
    mask = state == 2
    if plan.rule is not None:
        rule = plan.to("cpu").rule
        mask |= (state == 1) & rule.keep(at[:, None], torch.arange(plan.num_keys))
    if t.kv_order is not None:
        mask = mask[..., inverse_permutation(t.kv_order).long()]
    return mask.to(plan.device)


def _block_of(starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    by = torch.argsort(starts)
    return torch.repeat_interleave(by, lengths[by].long())


def _oracle_rows(q, k, v, plan: Plan, tokens, mask, scale: float) -> torch.Tensor:
    """Dense attention of some query rows in the dtype of the inputs, written from the formula."""
    logits = q[:, :, tokens] @ k.transpose(-1, -2) * scale
    if plan.kv_log_weight is not None:
        logits = logits + plan.kv_log_weight[..., None, :].to(logits)
    out = torch.softmax(logits.masked_fill(~mask, -torch.inf), -1) @ v
    if plan.out_scale is None and plan.out_residual is None:
        return out
    at = tokens
    if plan.q_blocks.order is not None:
        at = inverse_permutation(plan.q_blocks.order)[tokens].long()
    row = _block_of(plan.q_blocks.starts, plan.q_blocks.lengths)[at]
    if plan.out_scale is not None:
        out = out * plan.out_scale[:, :, row, None].to(out)
    if plan.out_residual is not None:
        out = out + plan.out_residual[:, :, row].to(out)
    return out


def check_parity(
    q, k, v, grad_out, plan: Plan, scale: float, backend: str = "auto", backward: bool = False
) -> None:
    """Compare ``attend`` with a dense fp64 oracle on sampled query rows, at full length.

    With ``backward`` the gradient comes from the sampled rows alone, so that dq, dk and dv can be
    compared in full. Tolerance: a few times the error of plain attention in the same dtype.

    Raises:
        ParityError: saying what differs, where and by how much.
    """
    total = q.shape[2]
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randperm(total, generator=draw)[: min(total, _SAMPLED_ROWS)].to(q.device)
    mask = mask_rows(plan, tokens)
    sampled = torch.zeros_like(grad_out)
    sampled[:, :, tokens] = grad_out[:, :, tokens]
    found = []
    for name, dtype in (("attend", q.dtype), ("exact", torch.float64), ("eager", q.dtype)):
        leaves = [x.detach().to(dtype).requires_grad_(backward) for x in (q, k, v)]
        if name == "attend":
            out = attend(*leaves, plan, scale=scale, backend=backend)
            grad, rows = sampled, out[:, :, tokens]
        else:
            out = rows = _oracle_rows(*leaves, plan, tokens, mask, scale)
            grad = grad_out[:, :, tokens].to(dtype)
        grads = torch.autograd.grad(out, leaves, grad) if backward else ()
        found.append([rows.detach(), *grads])
    try:
        for name, actual, exact, eager in zip(("out", "dq", "dk", "dv"), *found):
            assert_within_budget(name, actual, exact, eager, floor=8)
    except AssertionError as error:
        raise ParityError(f"attend disagrees with dense attention: {error}") from error


def detached(plan: Plan) -> Plan:
    """The plan without the graph that its epilogue and weights may hang on."""
    names = ("kv_log_weight", "out_scale", "out_residual")
    held = {n: x.detach() for n in names if (x := getattr(plan, n)) is not None}
    return plan.replace(**held) if held else plan


def synchronize(device) -> None:
    """Wait until the device has finished what it was given."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()


def _check_repeats(repeats: int) -> None:
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")


def interleaved_seconds(
    functions: dict[str, Callable], repeats: int, device, warmup: int = 1
) -> dict[str, list[float]]:
    """Wall-clock seconds of each function in ``repeats`` rounds; every second round backwards.

    Whatever disturbs the machine in a round disturbs all functions in it, so ratios within a
    round are far steadier than the seconds.
    """
    _check_repeats(repeats)
    for function in functions.values():
        for _ in range(warmup):
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(repeats):
        for name in list(functions)[:: 1 if round_ % 2 == 0 else -1]:
            synchronize(device)
            start = perf_counter()
            functions[name]()
            synchronize(device)
            seconds[name].append(perf_counter() - start)
    return seconds


def percentiles(values) -> dict[str, float]:
    """``{"p20", "p50", "p80"}`` of some numbers."""
    x = torch.tensor(list(values), dtype=torch.float64)
    found = torch.quantile(x, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return dict(zip(("p20", "p50", "p80"), found))


def _with_gradient(function: Callable, inputs, grad_out) -> Callable:
    def run():
        out = function()
        torch.autograd.grad(out, inputs, grad_out)

    return run


def bench_attention(
    method: Method, work: Workload, *, repeats: int = 10, flex: bool = True, backend: str = "auto"
) -> dict:
    """Check, then time dense attention, ``method`` and compiled flex_attention in turns.

    A static method's plan is made before the timing, as in a pipeline, where all layers and steps
    share it; ``plan_seconds`` says how long that took. A dynamic method plans in every timed call.

    Returns:
        A row of plain values. ``useful_efficiency`` is the median over rounds of (dense seconds *
        density / attend seconds): 1 means that every pair kept costs what it costs in dense
        attention. ``flex`` holds seconds, or under ``not_run`` why there are none.

    Raises:
        ParityError: the method's result is wrong; nothing is timed.
        ValueError: options or sizes that do not work.
    """
    _check_repeats(repeats)
    layout = work.layout
    q, k, v, grad_out = work.inputs()
    if work.backward:
        q, k, v = (x.requires_grad_() for x in (q, k, v))
    scale = method.scale(layout, work.head_dim)
    scale = work.head_dim**-0.5 if scale is None else scale

    method.prepare(layout, q.device)

    def make_plan() -> Plan:
        if method.static:
            return method.plan(layout).to(q.device)
        return method.plan(layout, q, k, v, scale=scale)

    synchronize(work.device)
    start = perf_counter()
    plan = make_plan()
    synchronize(work.device)
    plan_seconds = perf_counter() - start
    with torch.no_grad():
        inputs = q.detach(), *method.extend(layout, k, v)
    # A plan made from q, k and v may carry gradients to them; here it is held fixed.
    check_parity(*inputs, grad_out, detached(plan), scale, backend, work.backward)

    def dense():
        return F.scaled_dot_product_attention(q, k, v)

    def sparse():
        used = plan if method.static else make_plan()
        return attend(q, *method.extend(layout, k, v), used, scale=scale, backend=backend)

    functions = {"dense": dense, "attend": sparse}
    flex_row = {"not_run": "not asked for"}
    if flex:
        try:
            functions["flex"] = _flex_function(
                *inputs, grad_out, detached(plan), scale, work.backward
            )
            flex_row = {}
        except Exception as error:  # whatever a compiler throws belongs in the table
            flex_row = {"not_run": _reason(error)}
    if work.backward:
        for name in ("dense", "attend"):
            functions[name] = _with_gradient(functions[name], (q, k, v), grad_out)
    with torch.set_grad_enabled(work.backward):
        seconds = interleaved_seconds(functions, repeats, work.device)
    return _row(method, work, plan, plan_seconds, seconds, flex_row, backend)


def _row(method, work: Workload, plan: Plan, plan_seconds, seconds, flex_row, backend) -> dict:
    layout = work.layout
    density = plan.density
    useful = plan.flops(work.head_dim, work.heads, work.batch, work.backward)
    pairs = 4.0 * layout.num_tokens**2 * work.head_dim * work.heads * work.batch
    dense_flops = pairs * 3.5 if work.backward else pairs
    speedups = [d / s for d, s in zip(seconds["dense"], seconds["attend"])]
    row = {
        "method": {"name": method.name, **asdict(method)},
        "static": method.static,
        "tokens": layout.num_tokens,
        "grid": list(layout.grid.shape),
        "context": layout.num_context,
        "keys": plan.num_keys,
        "batch": work.batch,
        "heads": work.heads,
        "head_dim": work.head_dim,
        "dtype": str(work.dtype).removeprefix("torch."),
        "backward": work.backward,
        "backend": choose_backend(torch.device(work.device)) if backend == "auto" else backend,
        "rounds": len(speedups),
        "density": density,
        "useful_flops": useful,
        "dense_flops": dense_flops,
        "plan_seconds": plan_seconds,
        "dense_seconds": percentiles(seconds["dense"]),
        "attend_seconds": percentiles(seconds["attend"]),
        "speedup": percentiles(speedups),
        "useful_efficiency": percentiles(s * density for s in speedups),
    }
    row["attend_gflops"] = useful / row["attend_seconds"]["p50"] / 1e9
    row["dense_gflops"] = dense_flops / row["dense_seconds"]["p50"] / 1e9
    if "flex" in seconds:
        ratios = [d / s * density for d, s in zip(seconds["dense"], seconds["flex"])]
        flex_row = {"seconds": percentiles(seconds["flex"])}
        flex_row["useful_efficiency"] = percentiles(ratios)
        flex_row["gflops"] = useful / flex_row["seconds"]["p50"] / 1e9
    return row | {"flex": flex_row}


def _reason(error: BaseException) -> str:
    """The error that a compiler's errors are about, in a line."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def flex_inputs(q, k, v, plan: Plan):
    """What ``flex_attention`` needs to compute the same: ``(q, k, v, block mask, score_mod)``.

    q, k and v come back in the plan's block order, which flex_attention does not know.

    Raises:
        ValueError: a plan that flex_attention's equal blocks cannot express.
    """
    from torch.nn.attention.flex_attention import BlockMask

    t = plan.tensors()
    for starts, lengths, size in (
        (t.q_starts, t.q_lengths, t.q_block_size),
        (t.kv_starts, t.kv_lengths, t.kv_block_size),
    ):
        at = torch.arange(starts.numel(), device=starts.device) * size
        if not torch.equal(starts.long(), at) or bool((lengths[:-1] != size).any()):
            raise ValueError("flex_attention needs blocks of one size; this plan's are ragged")
    if t.out_scale is not None or t.out_residual is not None:
        raise ValueError("flex_attention has no epilogue")
    if t.q_order is not None:
        q = q[:, :, t.q_order.long()]
    weight = t.kv_log_weight
    if t.kv_order is not None:
        k, v = (x[:, :, t.kv_order.long()] for x in (k, v))
        weight = None if weight is None else weight[..., t.kv_order.long()]
    # flex_attention wants lists as wide as there are key blocks, and indices even in unused slots.
    columns = t.kv_starts.numel()
    listed = F.pad(t.kv_indices, (0, columns - t.kv_indices.shape[-1]))
    slot = torch.arange(columns, dtype=torch.int32, device=listed.device)
    runs = run_lengths(t.kv_indices, t.kv_num_blocks)
    listed = torch.where((runs > 0)[..., None], slot, listed)
    full = t.kv_num_full_blocks
    partial = t.kv_num_blocks - full
    shifted = listed.gather(-1, (slot + full[..., None]).clamp_max_(columns - 1))
    mask = BlockMask.from_kv_blocks(
        partial,
        shifted.where(slot < partial[..., None], 0),
        full,
        listed.where(slot < full[..., None], 0),
        BLOCK_SIZE=(t.q_block_size, t.kv_block_size),
        mask_mod=None if plan.rule is None else _mask_mod(plan.rule),
        seq_lengths=(plan.num_queries, plan.num_keys),
    )
    return q, k, v, mask, None if weight is None else _score_mod(weight)


def _mask_mod(rule) -> Callable:
    def mask_mod(batch, head, q_at, kv_at):
        return rule.keep(q_at, kv_at)

    return mask_mod


def _score_mod(weight: torch.Tensor) -> Callable:
    per_batch, per_head = (int(n > 1) for n in weight.shape[:2])

    def score_mod(score, batch, head, q_at, kv_at):
        return score + weight[batch * per_batch, head * per_head, kv_at]

    return score_mod


def _flex_function(q, k, v, grad_out, plan: Plan, scale: float, backward: bool) -> Callable:
    """Compiled flex_attention on the same plan, run once and compared with attend."""
    from torch.nn.attention.flex_attention import flex_attention

    fq, fk, fv, mask, score_mod = flex_inputs(q, k, v, plan)
    fq, fk, fv = (x.detach().requires_grad_(backward) for x in (fq, fk, fv))
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def run():
        return compiled(fq, fk, fv, score_mod=score_mod, block_mask=mask, scale=scale)

    with torch.set_grad_enabled(backward):
        out = run()
    expected = attend(q, k, v, plan, scale=scale)
    if plan.q_blocks.order is not None:
        expected = expected[:, :, plan.q_blocks.order.long()]
    error = float((out.detach().double() - expected.double()).abs().max())
    limit = 64 * torch.finfo(q.dtype).eps * float(expected.abs().max())
    if not error <= limit:
        raise ParityError(f"its result differs by {error:.2e}, more than {limit:.2e}")
    if not backward:
        return run
    order = plan.q_blocks.order
    grad = grad_out if order is None else grad_out[:, :, order.long()]
    return _with_gradient(run, (fq, fk, fv), grad)


def break_even(
    method: Method, tokens: list[int], work: Workload, *, repeats: int = 10, frames=None
) -> Iterator[dict]:
    """Rows of :func:`bench_attention` without flex, for growing numbers of tokens.

    Args:
        work: its layout is replaced.
    """
    for count in sorted(tokens):
        layout = layout_for(count, method.name, frames)
        yield bench_attention(method, replace(work, layout=layout), repeats=repeats, flex=False)


def least_faster(rows: list[dict]) -> int | None:
    """Tokens of the smallest row from which on all are faster than dense; None if the last is not.

    A row is faster if the median of its speed-ups is above 1.
    """
    found = None
    for row in sorted(rows, key=lambda r: r["tokens"], reverse=True):
        if row["speedup"]["p50"] <= 1:
            break
        found = row["tokens"]
    return found
