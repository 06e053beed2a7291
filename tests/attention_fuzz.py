"""Random layouts, methods, dtypes and backends against dense fp64 attention written from formulas.

The oracles share no code with the package: pairs are painted token by token, attention is PyTorch's
own softmax in fp64. Compared are the output, the log-sum-exp and all gradients; budgets are what
plain attention in the same dtype earns on the same inputs.

    python tests/attention_fuzz.py --seed 0 --count 10000 --state fuzz.json

With --state it goes on where it stopped. A case is told by its seed, its number and the methods
drawn from: --start 123 --count 1 runs it again. It ends with a table of what was covered.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import random
import sys
import traceback
from pathlib import Path

import torch

if not torch.cuda.is_available():
    # Must be set before the first kernel module is imported.
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import oracle
import random_plans
import test_agent
import test_functional
import test_linear
import test_local
import test_log_linear
import test_mixture_of_heads
import test_neighborhood
import test_radial
import test_reattention
import test_rectified
import test_sla
import test_sol
import test_topk
import test_vsa

from dittfast.attention import attend, method_attention
from dittfast.files import write_json
from dittfast.layout import Context, Grid, Layout
from dittfast.methods import (
    SLA,
    VSA,
    Agent,
    Dense,
    Linear,
    Local,
    LogLinear,
    Neighborhood,
    Radial,
    Reattention,
    Rectified,
    Sol,
    TopK,
)
from dittfast.methods.reattention import MASKS
from dittfast.methods.sla import FEATURES
from dittfast.methods.topk import ORDERS, SCORES
from dittfast.plan import METRICS
from dittfast.testing import assert_within_budget, attention_inputs

KINDS = {
    "plan": 35,
    "dense": 4,
    "local": 20,
    "radial": 15,
    "neighborhood": 15,
    "log_linear": 8,
    "rectified": 7,
    "sol": 7,
    "topk": 10,
    "linear": 8,
    "vsa": 7,
    "sla": 8,
    "agent": 8,
    "reattention": 8,
    "mixture_of_heads": 8,
}
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
BACKENDS = {"native": 45, "cpu": 40, "reference": 14, "triton": 1}


class Refused(Exception):
    """The backend does not take such tensors, and says so; or the case has no one answer."""


def weighted(draw: random.Random, choices: dict[str, int]) -> str:
    return draw.choices(list(choices), list(choices.values()))[0]


def random_layout(draw: random.Random, video: bool = False, most: int = 150) -> Layout:
    """Text in front, behind or not at all, padded or not; one grid or several."""
    frames = draw.choice((1, 1, 2, 3, 5)) if not video else draw.choice((1, 2, 4, 7, 11))
    side = max(1, int((most / frames) ** 0.5))
    height, width = draw.randint(1, side), draw.randint(1, side)
    text = draw.choice((0, 1, 5, 21))
    lengths = None
    if text and draw.random() < 0.4:
        lengths = [draw.randint(0, text) for _ in range(draw.choice((1, 2)))]
    if not video and draw.random() < 0.15:
        more = Grid(1, draw.randint(1, 6), draw.randint(1, 6))
        return Layout((Grid(frames, height, width), Context(max(text, 1)), more))
    first = draw.random() < 0.5
    return Layout.video(frames, height, width, text, first).with_text_lengths(lengths)


def shape_of(layout: Layout) -> str:
    kind = "video" if any(g.frames > 1 for g in layout.grids) else "image"
    words = [kind] + ["several grids"] * (len(layout.grids) > 1)
    words += ["padded text"] if layout.context_lengths else ["text"] * (layout.num_context > 0)
    return ", ".join(words)


def hidden(layout: Layout):
    """``[batch, 1, N]``: -inf on padding, from the layout's description; None without."""
    if layout.context_lengths is None:
        return None
    weight = torch.zeros(len(layout.context_lengths), 1, layout.num_tokens, dtype=torch.float64)
    for row, lengths in enumerate(layout.context_lengths):
        at, number = 0, 0
        for segment in layout.segments:
            size = segment.length
            if isinstance(segment, Context):
                weight[row, :, at + lengths[number] : at + size] = -torch.inf
                number += 1
            at += size
    return weight


def on_grid(layout: Layout) -> torch.Tensor:
    """``[N]`` bool: which tokens are no text."""
    parts = [torch.full((s.length,), not isinstance(s, Context)) for s in layout.segments]
    return torch.cat(parts)


def dense(q, k, v, mask, weight, scale):
    """``(out, lse)`` of masked attention by its formula; rows that see nothing give 0 and -inf."""
    logits = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    if weight is not None:
        logits = logits + weight[:, :, None].to(logits)
    logits = logits.masked_fill(~mask, -torch.inf)
    unseen = (logits == -torch.inf).all(-1)
    logits = logits.masked_fill(unseen[..., None], 0)
    lse = torch.logsumexp(logits, -1)
    p = torch.exp(logits - lse[..., None]).masked_fill(unseen[..., None], 0)
    return torch.einsum("bhij,bhjd->bhid", p, v), lse.masked_fill(unseen, -torch.inf)


def with_gradients(call, tensors, grad_out, grad_lse):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = call(*leaves)
    seen = lse != -torch.inf
    total = (out * grad_out.to(out)).sum() + (lse[seen] * grad_lse.to(lse)[seen]).sum()
    found = [out.detach(), lse.detach().masked_fill(~seen, 0), seen]
    return found + list(torch.autograd.grad(total, leaves))


def compare(method, layout, mask, case):
    """A method's plan, run, against dense attention under a painted mask.

    Args:
        mask: ``[N, N]``, or for a method that chooses a function of q and k, ``[B, H, N, N]``.
    """
    batch = len(layout.context_lengths or (0,))
    q, k, v, grad = attention_inputs(
        batch, 2, layout.num_tokens, case["head_dim"], dtype=case["dtype"], scale=case["size"]
    )
    grad_lse = torch.randn(q.shape[:3])
    scale = case["head_dim"] ** -0.5
    mask, weight = torch.as_tensor(mask(q, k) if callable(mask) else mask), hidden(layout)
    plan = method.plan(layout) if method.static else method.plan(layout, q, k)

    def ours(q, k, v):
        more_k, more_v = method.extend(layout, k, v, **method.parameters(2, case["head_dim"]))
        return attend(q, more_k, more_v, plan, backend=case["backend"], return_lse=True)

    def theirs(q, k, v):
        if getattr(method, "downsample", None):
            side = method.downsample
            even = torch.full((side, side), 1 / side**2).to(q)  # fp32 parameters
            k, v = (test_functional.with_summaries(x, layout, even) for x in (k, v))
        count = k.shape[2] - layout.num_tokens
        # Text does not see the summaries.
        more = on_grid(layout)[:, None].expand(*mask.shape[:-1], count)
        wide = torch.cat([mask, more], -1)
        more = None if weight is None else torch.nn.functional.pad(weight, (0, count))
        return dense(q, k, v, wide, more, scale)

    tensors = (q, k, v)
    exact = with_gradients(theirs, [x.double() for x in tensors], grad, grad_lse)
    eager = with_gradients(theirs, tensors, grad, grad_lse)
    found = with_gradients(ours, tensors, grad, grad_lse)
    assert torch.equal(found[2], exact[2]), "rows that see nothing"
    recomputed = float(exact[1].abs().max()) * case["size"]
    for name, at in (("out", 0), ("lse", 1)):
        judge(name, found[at], exact[at], eager[at])
    for name, at in (("dq", 3), ("dk", 4), ("dv", 5)):
        judge(name, found[at], exact[at], eager[at], recomputed)


def judge(name, found, exact, eager, recomputed=0.0):
    """Within what plain attention of that dtype earns; of fp64, as near as fp64 itself can tell.

    The cpu backend runs PyTorch's fused attention, whose gradients are up to 14 times as wrong as
    eager attention's. Gradients that are zero, those of a lone key's logit, are zero but for the
    rounding of fp32 sums.

    Args:
        recomputed: of gradients, the largest lse times the size of q and k. Flash attention makes
            its probabilities anew from an lse in fp32, whose rounding they carry.
    """
    assert torch.isfinite(found).all(), f"{name} is not finite"
    largest = float(exact.abs().max())
    error = float((found.double() - exact).abs().max())
    if found.dtype == torch.float64:
        assert error <= 1e-12 * max(1.0, largest), f"{name}: {error:.3g} apart"
    elif error > max(1e-5 * (largest == 0), 4 * torch.finfo(torch.float32).eps * recomputed):
        assert_within_budget(name, found, exact, eager, factor=20, floor=16)


def judge_of(case):
    """:func:`judge` for an attention that gives no lse."""
    lse = 5 * case["size"] ** 2  # logits of normal values are hardly larger

    def judged(name, *values):
        judge(name, *values, lse * case["size"] if name.endswith(("dq", "dk", "dv")) else 0.0)

    return judged


def plan_case(draw, case):
    blocks = draw.choice((4, 16, 33))
    queries, keys = draw.randint(1, 120), draw.randint(1, 120)
    seed = draw.randrange(10**6)
    make = draw.choice((random_plans.even_blocks, random_plans.ragged_blocks))
    rule = None
    if draw.random() < 0.5:
        rule = random_plans.random_rule(queries, keys, draw.choice(METRICS), seed=seed)
    lists = draw.choice(((1, 1), (1, 2), (2, 1), (2, 2)))
    q_blocks, tail = make(queries, blocks), {}
    if draw.random() < 0.3:
        per, shared = draw.choice(random_plans.TAILS), (lists, draw.choice(((1, 1), lists)))
        tail = random_plans.random_tail(q_blocks, case["head_dim"], per, shared, seed)
    plan = random_plans.random_plan(
        q_blocks, make(keys, blocks), lists, rule, draw.random(), seed, **tail
    )
    batch = max(lists[0], draw.choice((1, 2)))
    weight = None
    if draw.random() < 0.4:
        weight = torch.randn(batch, 1, keys)
        weight[..., torch.rand(keys) < 0.2] = -torch.inf
    case["layout"] = "plan with a rule" if rule else "plan"
    case["layout"] += ", tails" * bool(tail)
    scale = draw.choice((None, 0.3))
    d, dtype = case["head_dim"], case["dtype"]
    inputs = attention_inputs(batch, 2, queries, d, keys, dtype, case["size"])
    grad_lse = torch.randn(inputs[3].shape[:3]) if draw.random() < 0.7 else None
    exact = oracle.results(*inputs, grad_lse, plan, weight, scale)
    chosen = {"kv_log_weight": weight, "scale": scale}
    found = random_plans.results(*inputs, grad_lse, plan, case["backend"], **chosen)
    eager = random_plans.eager_results(*inputs, grad_lse, plan, weight, scale or d**-0.5)
    unseen = exact["lse"] == -torch.inf
    assert torch.equal(found["lse"] == -torch.inf, unseen), "rows that see nothing"
    recomputed = float(exact["lse"].masked_fill(unseen, 0).abs().max()) * case["size"]
    for name, value in exact.items():
        values = found[name], value, eager[name]
        if name == "lse":
            values = [x.masked_fill(unseen, 0) for x in values]
        slack = recomputed if name in ("dq", "dk", "dv") else 0.0
        if name == "dtail_lse":  # sums that cancel where out, rounded to dtype, is the tail alone
            slack = 16 * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
        judge(name, *values, slack)


def local_case(draw, case):
    layout = random_layout(draw)
    downsample = None
    if len(layout.grids) == 1 and layout.grid.frames == 1 and draw.random() < 0.3:
        downsample = min(draw.choice((2, 3)), *layout.grid.shape[1:])
        downsample = downsample if downsample > 1 else None
    method = Local(
        window=draw.choice((0.5, 1, 2.5, 3, 6, 1000)),
        downsample=downsample,
        tile=draw.choice((None, (1, 4, 4), (2, 3, 5))),
        frame_window=draw.choice((None, 1, 2)),
    )
    case["layout"] = shape_of(layout)
    compare(method, layout, test_local.circle(layout, method.window, method.frame_window), case)


def dense_case(draw, case):
    layout = random_layout(draw)
    case["layout"] = shape_of(layout)
    everything = torch.ones(layout.num_tokens, layout.num_tokens, dtype=torch.bool)
    compare(Dense(draw.choice((8, 16, 128))), layout, everything, case)


def radial_case(draw, case):
    layout = random_layout(draw, video=True)
    case["layout"] = shape_of(layout)
    variant = draw.choice((*test_radial.CODE_VARIANTS, "paper"))
    block, decay = draw.choice((8, 16, 30)), draw.choice((0.3, 1.0, 2.0))
    if variant == "paper":
        mask = test_functional.equation_4(layout)
        return compare(Radial(1.0, block, variant), layout, mask, case)
    grid = layout.grid
    video = test_radial.painted_mask(grid.frames, grid.tokens_per_frame, block, decay, variant)
    blocks = test_radial.whole_mask(layout, block, video)
    return compare(Radial(decay, block, variant), layout, painted(layout, blocks, block), case)


def neighborhood_case(draw, case):
    layout = random_layout(draw, video=draw.random() < 0.5)
    case["layout"] = shape_of(layout)
    sizes = [min(sides) for sides in zip(*(grid.shape for grid in layout.grids))]
    options = [draw.choice(list(test_neighborhood.axis_options(n))) for n in sizes]
    options = tuple(zip(*options))
    method = Neighborhood(*options, tile=draw.choice((None, (1, 4, 4), (2, 3, 5))))
    compare(method, layout, test_neighborhood.windows(layout, *options), case)


def painted(layout, blocks, block):
    """A mask of blocks as one of tokens; blocks begin anew where the video does."""
    start, n = layout.grid_start, layout.num_tokens
    at = np.arange(n)
    before = -(-start // block)
    number = np.where(at < start, at // block, before + (at - start) // block)
    return blocks[number][:, number]


def log_linear_case(draw, case):
    layout = random_layout(draw, most=100)
    case["layout"] = shape_of(layout)
    block_size = draw.choice((8, 16))
    # The coarsest level has more than one token, but for the first.
    most = 2 if min(grid.length for grid in layout.grids) > block_size**2 else 1
    method = LogLinear(
        block_size=block_size,
        topk=draw.randint(1, 5),
        levels=draw.choice((1, most, "auto")),
        enrich=draw.random() < 0.7,
        text_queries=draw.choice(("dense", "sparse")),
    )
    dynamic(test_log_linear.check, method, layout, case)


def rectified_case(draw, case):
    layout = random_layout(draw, most=100)
    case["layout"] = shape_of(layout)
    method = Rectified(
        block_size=draw.choice((8, 16)), topk=draw.randint(1, 4), neighbors=draw.random() < 0.5
    )
    dynamic(test_rectified.check, method, layout, case)


def sol_case(draw, case):
    layout = random_layout(draw, most=100)
    case["layout"] = shape_of(layout)
    method = Sol(
        tau=draw.choice((0, 0.5, 1, 2)),
        tail=draw.choice(("block", "query", "none")),
        block_size=draw.choice((8, 16)),
        order=draw.choice(("raster", "hilbert", "morton")),
    )
    dynamic(test_sol.check, method, layout, case)


def random_topk(draw):
    return TopK(
        block_size=draw.choice((8, 16)),
        topk=draw.choice((None, 1, 3, 0.3, 1000, (1, 4))),
        topp=draw.choice((None, None, 0.5, 0.9, (0.2, 0.7))),
        score=draw.choice(SCORES),
        sub_block=draw.choice((1, 3, 4, 16)),
        order=draw.choice(ORDERS),
    )


def topk_mask(layout, method):
    """What it shows, from q and k; what is nearer than fp32 can tell is chosen either way."""
    return lambda q, k: test_topk.expected_mask(
        layout, method, q, k, q.shape[-1] ** -0.5, undecided=1e-5
    )


def topk_case(draw, case):
    layout, method = random_layout(draw, most=100), random_topk(draw)
    case["layout"] = shape_of(layout)
    only_wide(case)
    compare(method, layout, topk_mask(layout, method), case)


def sla_case(draw, case):
    layout, inner = random_layout(draw, most=100), random_topk(draw)
    case["layout"] = shape_of(layout)
    only_wide(case)
    method, dim, dtype = SLA(inner, draw.choice(FEATURES)), case["head_dim"], case["dtype"]
    weight = hidden(layout)
    weight = torch.zeros(1, 1, layout.num_tokens) if weight is None else weight
    shape = len(weight), 2, layout.num_tokens, dim
    *tensors, grad = attention_inputs(*shape, dtype=dtype, scale=case["size"])
    mask = topk_mask(layout, inner)(*tensors[:2])
    tensors.append(torch.randn(2, dim, dim).to(dtype))
    found = []

    def ours(q, k, v, projection):
        own = {"projection": projection, "backend": case["backend"]}
        return method_attention(method, layout, q, k, v, **own)

    def formula(*given):
        masks = mask, mask, weight.to(given[0])
        return test_sla.under_masks(*masks, method.features, *given, dim**-0.5)

    for call, kind in (ours, dtype), (formula, torch.float64), (formula, dtype):
        leaves = [x.to(kind).requires_grad_() for x in tensors]
        out = call(*leaves)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(kind))])
    for name, *values in zip(("out", "dq", "dk", "dv", "d projection"), *found):
        judge_of(case)(name, *values)


def agent_case(draw, case):
    layout = random_layout(draw)
    case["layout"] = shape_of(layout)
    method = Agent(
        agents=tuple(draw.randint(1, 4) for _ in range(draw.randint(1, 3))),
        text_agents=draw.randint(0, 3),
        sharpness=draw.choice((0.2, 0.5, 1)),
        shortcut=draw.choice((0, 0.1, 1)),
        trained=draw.random() < 0.5,
    )
    options = dict(dtype=case["dtype"], backend=case["backend"])
    for name, *values in test_agent.both(
        method, layout, 2, 2, case["head_dim"], case["size"], **options
    ):
        judge(name, *values)


def reattention_case(draw, case):
    layout = random_layout(draw, most=100)
    case["layout"] = shape_of(layout)
    only_wide(case)  # what one step keeps, the next one multiplies
    method = Reattention(
        density=draw.choice((0.05, 0.3, 1)),
        mask=draw.choice(MASKS),
        every=draw.randint(1, 4),
        growth=draw.choice((0, 0.1, 0.5)),
    )
    steps = sorted(draw.sample(range(8), 3))
    options = (case[name] for name in ("head_dim", "dtype", "size", "backend"))
    test_reattention.check(method, layout, steps, *options, judge_of(case))


def mixture_of_heads_case(draw, case):
    layout, kind = random_layout(draw, most=100), draw.choice(("dense", "local", "topk"))
    case["layout"] = shape_of(layout)
    only_wide(case)
    if kind == "topk":
        inner = random_topk(draw)
        inner = dataclasses.replace(inner, topk=3, topp=None)  # lists have a value for each head
        mask = topk_mask(layout, inner)
    elif kind == "local":
        inner = Local(window=draw.choice((1, 2.5, 6)), tile=draw.choice((None, (1, 4, 4))))
        mask = test_local.circle(layout, inner.window, None)
    else:
        inner, mask = Dense(draw.choice((8, 16))), torch.ones(1, 1, dtype=torch.bool)
    shared = draw.randint(0, 2)
    names, sides = test_mixture_of_heads.case(
        layout,
        inner,
        shared,
        draw.randint(1, 4 - shared),
        draw.choice(("block", "token")),
        heads=4,
        kv_heads=draw.choice((2, 4)),
        **{name: case[name] for name in ("backend", "dtype", "head_dim", "size")},
        painted=mask if callable(mask) else lambda q, k: mask,
        undecided=1e-5,
    )
    for name, *values in zip(names, *sides):
        judge_of(case)(name, *values)


def linear_case(draw, case):
    layout = random_layout(draw)
    case |= {"layout": shape_of(layout), "backend": "none"}  # plain PyTorch
    method, dtype = Linear(hidden=draw.choice((0, 3, None))), case["dtype"]
    own = {n: x.to(dtype) for n, x in test_linear.trained(method, 2, case["head_dim"]).items()}
    found = test_linear.both(layout, own, 2, 2, case["head_dim"], case["size"], dtype)
    for name, *values in zip(*found):
        judge(name, *values)


def vsa_case(draw, case):
    layout = random_layout(draw, most=100)
    case["layout"] = shape_of(layout)
    method = VSA(
        topk=draw.choice((1, 2, 3, 0.1, 0.5, 1.0)),
        cube=(draw.randint(1, 3), draw.randint(1, 4), draw.randint(1, 4)),
    )
    dynamic(test_vsa.check, method, layout, case)


def only_wide(case):
    """Choices that rounding could turn are none that fp32 settles: half precision is left out."""
    if case["dtype"] not in (torch.float32, torch.float64):
        case["dtype"] = torch.float32


def dynamic(check, method, layout, case):
    """A method that chooses, by the check of its own tests."""
    only_wide(case)
    batch = len(layout.context_lengths or (0,))
    check(
        method,
        layout,
        batch,
        1,
        case["head_dim"],
        case["dtype"],
        case["size"],
        backend=case["backend"],
        judge=judge_of(case),
    )


CASES = {
    "plan": plan_case,
    "local": local_case,
    "radial": radial_case,
    "neighborhood": neighborhood_case,
    "log_linear": log_linear_case,
    "rectified": rectified_case,
    "sol": sol_case,
    "topk": topk_case,
    "linear": linear_case,
    "vsa": vsa_case,
    "dense": dense_case,
    "sla": sla_case,
    "agent": agent_case,
    "reattention": reattention_case,
    "mixture_of_heads": mixture_of_heads_case,
}


def run_case(seed: int, number: int, methods: list[str] | None = None) -> dict:
    """One case; what it covered.

    Args:
        methods: to draw from; None for all.

    Raises:
        AssertionError: a wrong result.
        Refused: the backend does not take it, or rounding decides.
    """
    draw = random.Random(f"{seed} {number}")
    torch.manual_seed(draw.randrange(2**31))
    kind = weighted(draw, {name: KINDS[name] for name in methods or KINDS})
    case = {
        "method": kind,
        "backend": weighted(draw, BACKENDS),
        "dtype": DTYPES[draw.choice(list(DTYPES))],
        "head_dim": draw.choice((16, 32, 64)),
        "size": draw.choice((1.0, 1.0, 4.0)),
    }
    if case["backend"] == "triton" and case["dtype"] != torch.float32:
        case["dtype"] = torch.float32  # its interpreter
    try:
        CASES[kind](draw, case)
    except test_topk.Undecided as error:
        raise Refused(str(error)) from error
    except ValueError as error:
        if "backend" in str(error) or case["backend"] in str(error):
            raise Refused(str(error)) from error
        raise
    return case


def table(counts: collections.Counter) -> str:
    """Cases by method and backend, by dtype, and by layout, in Markdown."""
    parts = []
    for rows, columns in (("method", "backend"), ("method", "dtype"), ("method", "layout")):
        by = collections.Counter()
        for key, count in counts.items():
            about = dict(pair.split("=", 1) for pair in key.split("; "))
            by[about[rows], about[columns]] += count
        names = sorted({column for _, column in by})
        lines = [f"| {rows} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for row in sorted({row for row, _ in by}):
            lines.append(f"| {row} | " + " | ".join(str(by[row, name]) for name in names) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--state", type=Path, help="JSON to go on from, and to write to")
    parser.add_argument("--method", choices=KINDS, action="append", help="these alone; repeatable")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    state = {"seed": options.seed, "next": options.start, "wrong": [], "refused": 0, "counts": {}}
    if options.state and options.state.exists():
        state = json.loads(options.state.read_text())
    counts = collections.Counter(state["counts"])
    for number in range(state["next"], options.start + options.count):
        try:
            case = run_case(state["seed"], number, options.method)
            case["dtype"] = str(case["dtype"]).removeprefix("torch.")
            names = ("method", "backend", "dtype", "layout")
            counts["; ".join(f"{name}={case[name]}" for name in names)] += 1
        except Refused:
            state["refused"] += 1
        except Exception:
            state["wrong"].append(number)
            print(f"seed {state['seed']}, case {number}:", file=sys.stderr)
            traceback.print_exc()
        state |= {"next": number + 1, "counts": dict(counts)}
        if options.state and (number % 20 == 19 or number == options.start + options.count - 1):
            write_json(options.state, state)
    done = state["next"] - options.start
    print(table(counts))
    print(f"\n{done} cases of seed {state['seed']}: {len(state['wrong'])} wrong")
    print(f"{state['refused']} refused or left to rounding; wrong: {state['wrong'][:20]}")
    return bool(state["wrong"])


if __name__ == "__main__":
    sys.exit(main())
