"""Random plans of every kind under the native kernel, forward and backward, against dense fp64.

    python tests/plan_fuzz.py --seed 0 --count 3000

The oracle reads nothing but the plan's raw fields. Each seed is one plan; progress names the seed
from which to go on. With sanitizers (GCC):

    CC="gcc -g -fsanitize=address,undefined -fno-sanitize-recover=undefined" ASAN_OPTIONS=detect_leaks=0 \\
    LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" \\
    python tests/plan_fuzz.py --seed 0 --count 3000
"""  # noqa: E501

import argparse

import torch
from random_plans import (
    TAILS,
    VIEWS,
    even_blocks,
    ragged_blocks,
    random_plan,
    random_rule,
    random_tail,
)

from dittfast import attend
from dittfast.attention import not_supported_reasons
from dittfast.plan import METRICS, Plan, TokenRule

DTYPES = torch.float32, torch.float16, torch.bfloat16
ENDS = "out_scale", "out_residual", "tail_lse", "tail_value"


# ---- the oracle ----


def visible(plan: Plan, batch: int, head: int) -> torch.Tensor:
    """``[num_queries, num_keys]`` bool, as Plan and TokenRule document it."""
    at = batch % plan.kv_indices.shape[0], head % plan.kv_indices.shape[1]
    indices, count = plan.kv_indices[at].tolist(), plan.kv_num_blocks[at].tolist()
    full = plan.kv_num_full_blocks[at].tolist()
    sides = []
    for blocks, total in ((plan.q_blocks, plan.num_queries), (plan.kv_blocks, plan.num_keys)):
        order = torch.arange(total) if blocks.order is None else blocks.order.long()
        spans = zip(blocks.starts.tolist(), blocks.lengths.tolist())
        sides.append((order, [slice(start, start + length) for start, length in spans]))
    (q_order, q_spans), (kv_order, kv_spans) = sides
    kept = _kept(plan.rule) if plan.rule is not None else None
    placed = torch.zeros(plan.num_queries, plan.num_keys, dtype=torch.bool)
    for row, queries in enumerate(q_spans):
        run = count[row] > len(indices[row])
        for slot in range(count[row]):
            keys = kv_spans[slot if run else indices[row][slot]]
            whole = run or slot < full[row]
            placed[queries, keys] = True if whole else kept[queries, keys]
    mask = torch.zeros_like(placed)
    mask[q_order[:, None], kv_order] = placed
    return mask


def _kept(rule: TokenRule) -> torch.Tensor:
    q_frame, kv_frame = rule.q_frame.long()[:, None], rule.kv_frame.long()
    q_place, kv_place = rule.q_place.long()[:, None], rule.kv_place.long()
    free = (q_frame == -1) | (kv_frame == -1) | (q_frame // 65536 != kv_frame // 65536)
    free = free | (kv_frame % 65536 < rule.sink_frames)
    if rule.metric == "box":
        row, last = 2**rule.place_bits, rule.q_place_last.long()[:, None]
        inside = (q_frame <= kv_frame) & (kv_frame <= rule.q_frame_last.long()[:, None])
        for part in (lambda x: x // row, lambda x: x % row):
            inside &= (part(q_place) <= part(kv_place)) & (part(kv_place) <= part(last))
        return free | inside
    distance = (q_place - kv_place).abs()
    if rule.metric == "disc":
        dy, dx = q_place // 65536 - kv_place // 65536, q_place % 65536 - kv_place % 65536
        distance = dy * dy + dx * dx
    apart = (q_frame - kv_frame).abs().clamp_max(rule.limits.numel() - 1)
    return free | (distance <= rule.limits.long()[apart])


def formula(q, k, v, plan: Plan, weight, scale: float):
    """Dense ``(out, lse, blind)`` under the plan, k and v with fewer heads allowed.

    ``blind [B, H, num_queries]`` says which queries see nothing.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    batch, heads = q.shape[:2]
    mask = torch.stack(
        [torch.stack([visible(plan, b, h) for h in range(heads)]) for b in range(batch)]
    )
    logits = q @ k.mT * scale
    for x in (plan.kv_log_weight, weight):
        if x is not None:
            mask = mask & (x > -torch.inf)[:, :, None]
            logits = logits + x.double().clamp_min(-1e4)[:, :, None]
    blind = ~mask.any(-1)
    block = torch.empty(plan.num_queries, dtype=torch.long)
    for n, (start, length) in enumerate(zip(*(x.tolist() for x in plan.q_blocks[:2]))):
        at = torch.arange(start, start + length)
        block[at if plan.q_blocks.order is None else plan.q_blocks.order[at].long()] = n
    logits = logits.masked_fill(~mask, -torch.inf)
    if plan.tail_lse is not None:
        index, tail = block, plan.tail_lse.double()
        if plan.tail_index is None:
            tail = tail[:, :, block]
        else:
            index = plan.tail_index.long()
        tail = tail.expand(batch, heads, -1)
        logits = torch.cat([logits, tail[..., None]], -1)
        blind = blind & (tail == -torch.inf)
    logits = logits.masked_fill(blind[..., None], 0)
    p = torch.softmax(logits, -1)
    out = p[..., : v.shape[2]] @ v
    if plan.tail_lse is not None:
        out = out + p[..., -1:] * plan.tail_value.double()[:, :, index]
    out = out.masked_fill(blind[..., None], 0)
    if plan.out_scale is not None:
        out = out * plan.out_scale.double()[:, :, block, None]
    if plan.out_residual is not None:
        out = out + plan.out_residual.double()[:, :, block]
    return out, torch.logsumexp(logits, -1), blind


# ---- the plans ----


def _neighbours_rule(n_q: int, n_k: int, width: int, limits: torch.Tensor, frames: int, metric):
    """Tokens in raster order, so that a block is a small region and boxes around it decide."""

    def side(n):
        area = -(-n // frames)
        at = torch.arange(n, dtype=torch.int32)
        within = at % area
        frame = at // area
        y, x = within // width, within % width
        return frame, within if metric == "raster" else y << 16 | x

    if metric != "box":
        return TokenRule(metric, limits, *side(n_q), *side(n_k))
    # Around each query as far as the limit of its own frame says, and over all frames.
    (frame, place), reach = side(n_q), limits[0]
    y, x = place >> 16, place & 0xFFFF
    first = (y - reach).clamp_min(0) << 16 | (x - reach).clamp_min(0)
    last = frame.new_tensor(frames).expand(n_q), y + reach << 16 | x + reach
    return TokenRule(metric, limits[:0], frame * 0, first, *side(n_k), 0, *last)


class Draw:
    """What a seed draws, one after the other."""

    def __init__(self, seed: int):
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)

    def upto(self, n: int) -> int:
        return int(torch.randint(1, n + 1, (), generator=self.generator))

    def maybe(self, make):
        return make() if self.upto(2) == 1 else None

    def choice(self, *values):
        return values[self.upto(len(values)) - 1]


def _scattered(draw: Draw):
    """Blocks and rule where neighbours in a block have nothing to do with each other."""
    n_q, n_k, seed = draw.upto(70), draw.upto(70), draw.upto(10**6)
    q_blocks = ragged_blocks(n_q, draw.upto(40), seed, shuffle=draw.upto(2) == 1)
    kv_blocks = ragged_blocks(n_k, draw.upto(40), seed + 1, shuffle=draw.upto(2) == 1)
    frames = draw.upto(4)
    options = dict(frames=frames, sink_frames=draw.upto(frames + 1) - 1, seed=seed)
    rule = draw.maybe(lambda: random_rule(n_q, n_k, draw.choice(*METRICS), **options))
    return q_blocks, kv_blocks, rule, seed


def _neighbours(draw: Draw):
    """Blocks of neighbours and a rule that is mostly decided by the box around some of them.

    With enough keys for several chunks that are decided, undecided or both.
    """
    n_q, n_k = draw.upto(150), draw.upto(450)
    blocks = (even_blocks(n, draw.choice(8, 20, 64, 128, 300)) for n in (n_q, n_k))
    frames, metric = draw.choice(1, 1, 2), draw.choice(*METRICS)
    width = draw.choice(4, 8, 16, 25)
    # Squares are reached exactly, straight up and sideways.
    radius = torch.tensor([draw.upto(12) for _ in range(frames)], dtype=torch.int32)
    limits = {"disc": radius * radius, "raster": radius * 15, "box": radius}[metric]
    rule = _neighbours_rule(n_q, n_k, width, limits, frames, metric)
    return *blocks, rule, draw.upto(10**6)


def random_case(draw: Draw):
    """A plan, its call's weight and the shapes of q and k."""
    batch, kv_heads, groups, dim = draw.upto(2), draw.upto(2), draw.upto(2), draw.upto(40)
    heads = kv_heads * groups

    def broadcast():
        return (1 if draw.upto(2) == 1 else batch), (1 if draw.upto(2) == 1 else heads)

    q_blocks, kv_blocks, rule, seed = draw.choice(_scattered, _neighbours)(draw)
    n_k = int(kv_blocks.lengths.sum())

    def normal(*shape):
        return torch.randn(*broadcast(), *shape, generator=draw.generator)

    def weight():
        x = normal(n_k)
        return x.masked_fill(torch.rand(x.shape, generator=draw.generator) < 0.3, -torch.inf)

    fields = {
        "kv_log_weight": draw.maybe(weight),
        "out_scale": draw.maybe(lambda: normal(q_blocks.count).abs() + 0.5),
        "out_residual": draw.maybe(lambda: normal(q_blocks.count, dim)),
    }
    if draw.upto(3) == 1:
        lists = broadcast(), broadcast()
        fields |= random_tail(q_blocks, dim, draw.choice(*TAILS), lists, draw.upto(10**6))
    plan = random_plan(
        q_blocks, kv_blocks, broadcast(), rule, draw.upto(10) / 10, seed,
        **{name: x for name, x in fields.items() if x is not None},
    )  # fmt: skip
    return plan, draw.maybe(weight), (batch, heads, kv_heads, dim)


def check(seed: int, backend: str = "native") -> None:
    """Make the plan of this seed and compare; AssertionError names what differs.

    Gradients too, unless the backend has none.
    """
    draw = Draw(seed)
    plan, weight, (batch, heads, kv_heads, dim) = random_case(draw)
    dtype = DTYPES[seed % 3]
    scale = [dim**-0.5, -0.3, 1.0][seed % 7 % 3]

    def tensor(heads, n):
        x = torch.randn(batch, heads, n, dim, generator=draw.generator).to(dtype)
        return list(VIEWS.values())[seed % 4](x)

    inputs = [tensor(heads, plan.num_queries), *(tensor(kv_heads, plan.num_keys) for _ in "kv")]
    grad = tensor(heads, plan.num_queries)
    grad_lse = torch.randn(batch, heads, plan.num_queries, generator=draw.generator)

    wanted = [x.detach().requires_grad_() for x in inputs]
    differentiable = not not_supported_reasons(backend, *wanted, plan)

    def run(function, cast):
        leaves = [x.to(cast).requires_grad_(differentiable) for x in inputs]
        fields = {name: getattr(plan, name) for name in ENDS}
        fields = {n: x.clone() for n, x in fields.items() if x is not None}
        fields = {n: x.requires_grad_(differentiable) for n, x in fields.items()}
        out, lse, blind = function(*leaves, plan.replace(**fields) if fields else plan)
        if not differentiable:
            return out, lse.masked_fill(blind, -torch.inf)
        total = (out * grad).sum() + (lse.masked_fill(blind, 0) * grad_lse).sum()
        grads = torch.autograd.grad(total, [*leaves, *fields.values()])
        return out.detach(), lse.detach().masked_fill(blind, -torch.inf), *grads

    def ours(q, k, v, plan):
        options = dict(scale=scale, return_lse=True, backend=backend)
        out, lse = attend(q, k, v, plan, kv_log_weight=weight, **options)
        return out, lse, lse == -torch.inf

    found = run(ours, dtype)
    exact = run(lambda *x: formula(*x, weight, scale), torch.float64)
    # A gradient is a sum over many rows of products that each carry the rounding of `out`.
    limit = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    names = "out", "lse", "dq", "dk", "dv", *("d epilogue",) * 4
    for name, a, b in zip(names, found, exact):
        if name == "lse":
            assert torch.equal(a == -torch.inf, b == -torch.inf), f"seed {seed}: other lse of -inf"
            a, b = (x.masked_fill(x == -torch.inf, 0) for x in (a, b))
        worst = float((a.double() - b.double()).abs().max())
        # Those of the scale and of tail_lse are sums over thousands of numbers, rows of a block
        # times head dim.
        limits = limit * max(1.0, float(b.abs().max())) * (4 if name == "d epilogue" else 1)
        assert worst <= limits, (
            f"seed {seed}: {name} differs by {worst:.2e}, more than {limits:.2e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the first plan")
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--backend", default="native", help="flex compiles most plans anew")
    args = parser.parse_args()
    for seed in range(args.seed, args.seed + args.count):
        check(seed, args.backend)
        if (seed + 1 - args.seed) % 100 == 0:
            print(f"{seed + 1 - args.seed} plans agree; go on with --seed {seed + 1}", flush=True)
    print(f"seeds {args.seed} to {args.seed + args.count - 1} agree")


if __name__ == "__main__":
    main()
