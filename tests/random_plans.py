"""Random plans of every kind, and the comparison of a backend with the dense fp64 oracle."""

import oracle
import torch

from dittfast.attention import attend
from dittfast.kernels.op import op_tensors
from dittfast.layout import Blocks, make_blocks, split_evenly
from dittfast.plan import Plan, TokenRule
from dittfast.testing import assert_within_budget, attention_inputs

_UNUSED = 1 << 30


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def even_blocks(num_tokens: int, block_size: int) -> Blocks:
    return make_blocks(*split_evenly(0, num_tokens, block_size))


def ragged_blocks(num_tokens: int, block_size: int, seed: int = 0, shuffle=False) -> Blocks:
    """Blocks of 1 to ``block_size`` tokens, listed in random order; ``shuffle`` the tokens too."""
    draw = _generator(seed)
    lengths = [min(block_size, num_tokens)]
    while sum(lengths) < num_tokens:
        length = int(torch.randint(1, block_size + 1, (), generator=draw))
        lengths.append(min(length, num_tokens - sum(lengths)))
    lengths = torch.tensor(lengths)
    starts = lengths.cumsum(0) - lengths
    listed = torch.randperm(len(lengths), generator=draw)
    order = torch.randperm(num_tokens, generator=draw) if shuffle else None
    return make_blocks(starts[listed], lengths[listed], order)


def random_rule(num_queries, num_keys, metric="disc", frames=4, sink_frames=0, seed=0, keeps=True):
    """A TokenRule for tokens scattered over two grids, every tenth context.

    Without ``keeps`` a rule that hides every pair.
    """
    draw = _generator(seed)

    def integers(low, high, n):
        return torch.randint(low, high, (n,), generator=draw, dtype=torch.int32)

    def side(n):
        frame = integers(0, 2, n) << 16 | integers(0, frames, n)
        frame[integers(0, 10, n) == 0] = -1
        x = integers(0, 12, n)
        return frame, integers(0, 12, n) << bits | x if metric != "raster" else x * 10

    bits = 4 if metric == "box" else 16
    limits = integers(-1, 60, frames)
    sides = *side(num_queries), *side(num_keys)
    if not keeps:
        zeros = torch.zeros(num_queries + num_keys, dtype=torch.int32).split(
            [num_queries, num_keys]
        )
        last = zeros[0] - 1 if metric == "box" else None
        return TokenRule(
            metric, limits * 0 - 1, *(x for x in zeros for _ in range(2)), 0, last, last
        )
    if metric != "box":
        return TokenRule(metric, limits, *sides, sink_frames)
    # Boxes of any size, empty ones among them: the last corner may lie before the first.
    code = sides[0]
    last = torch.where(
        code < 0, -1, code + integers(-1, frames, num_queries).clamp_min(-(code & 0xFFFF))
    )
    place = integers(0, 12, num_queries) << bits | integers(0, 12, num_queries)
    return TokenRule(metric, limits[:0], *sides, sink_frames, last.int(), place, bits)


TAILS = ("block", "query", "any")


def random_tail(q_blocks: Blocks, head_dim: int, per="block", lists=((1, 1), (1, 1)), seed=0):
    """The fields of a tail, a quarter of them none; values per block, per query, or shared at will.

    Args:
        lists: (batch, heads) of the log weights, and of the values.
    """
    draw, queries = _generator(seed), int(q_blocks.lengths.sum())
    index, count, logits = None, q_blocks.count, queries
    if per == "block":
        logits = count
    elif per == "query":
        index, count = torch.randperm(queries, generator=draw).int(), queries
    else:  # some values are shared by many queries all over, some are nobody's
        count = 5
        index = torch.randint(0, 4, (queries,), generator=draw, dtype=torch.int32)
    lse = 2 * torch.randn(*lists[0], logits, generator=draw) + 1
    lse[torch.rand(lse.shape, generator=draw) < 0.25] = -torch.inf
    value = torch.randn(*lists[1], count, head_dim, generator=draw)
    return {"tail_lse": lse, "tail_value": value, "tail_index": index}


def op_arguments(q, k, v, plan: Plan, scale: float) -> tuple:
    """What a backend's op is called with."""
    t = plan.tensors()
    return q, k, v, *op_tensors(t), list(t[t._fields.index("metric") :]), scale


def random_plan(
    q_blocks: Blocks, kv_blocks: Blocks, lists=(1, 1), rule=None, density=0.5, seed=0, runs=True,
    **fields,
) -> Plan:  # fmt: skip
    """Random lists in random order, some of them ``runs``. Every row keeps a block.

    With a rule about half of the blocks are partial, so that some queries may see nothing. With a
    tail some rows list nothing.
    """
    draw = _generator(seed)
    shape = (*lists, q_blocks.count, kv_blocks.count)
    # 0: not listed, 1: partial, 2: full.
    state = 2 * (torch.rand(shape, generator=draw) < density).int()
    always = torch.randint(0, shape[-1], (*shape[:-1], 1), generator=draw)
    if "tail_lse" in fields:
        state[torch.rand(shape[:-1], generator=draw) < 0.2] = 0
    else:
        state.scatter_(-1, always, 2)
    if rule is not None:
        state[(torch.rand(shape, generator=draw) < 0.5) & (state == 2)] = 1
    count = (state > 0).sum(-1, dtype=torch.int32)
    # Full blocks first, and each kind in any order.
    indices = torch.argsort(state + torch.rand(shape, generator=draw), dim=-1, descending=True)
    indices = indices.int()[..., : max(1, int(count.max()))].contiguous()
    width = indices.shape[-1]
    indices[torch.arange(width) >= count[..., None]] = _UNUSED
    full = (state == 2).sum(-1, dtype=torch.int32)
    if runs and width < shape[-1]:
        rows = torch.rand(shape[:-1], generator=draw) < 0.2
        length = torch.randint(width + 1, shape[-1] + 1, shape[:-1], generator=draw).int()
        indices[rows] = 0
        count, full = (torch.where(rows, length, x) for x in (count, full))
    return Plan(indices, count, full, q_blocks, kv_blocks, rule=rule, **fields)


# Strides that tensors come with.
VIEWS = {
    "heads last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "slice": lambda x: torch.cat([x, x, x], -1)[..., x.shape[-1] : -x.shape[-1]],
    "column-major": lambda x: x.mT.contiguous().mT,
    "every second token": lambda x: torch.stack([x, x], 3).flatten(2, 3)[:, :, ::2],
}


def results(q, k, v, grad_out, grad_lse, plan: Plan, backend: str, **options) -> dict:
    """out, lse and all gradients of one backend."""
    leaves = {"q": q, "k": k, "v": v} | {name: getattr(plan, name) for name in oracle.ENDS}
    leaves = {n: x.detach().requires_grad_() for n, x in leaves.items() if x is not None}
    ends = {n: x for n, x in leaves.items() if n in oracle.ENDS}
    if ends:
        plan = plan.replace(**ends)
    out, lse = attend(
        leaves["q"], leaves["k"], leaves["v"], plan, backend=backend, return_lse=True, **options
    )
    wanted, given = [out], [grad_out.to(out.dtype)]
    if grad_lse is not None:
        wanted, given = [out, lse], [*given, grad_lse.to(lse.dtype)]
    grads = torch.autograd.grad(wanted, list(leaves.values()), given)
    found = {"out": out.detach(), "lse": lse.detach()}
    return found | {f"d{name}": g for name, g in zip(leaves, grads)}


def eager_results(q, k, v, grad_out, grad_lse, plan: Plan, weight, scale) -> dict:
    """out, lse and gradients of plain attention in the dtype of q; the epilogue left out."""
    mask = oracle.mask(plan)
    if weight is not None:
        mask = mask & torch.isfinite(weight)[..., None, :]
        weight = weight.clamp_min(-1e3)
    leaves = {"q": q, "k": k, "v": v}
    if plan.tail_lse is not None:
        leaves |= {"tail_lse": plan.tail_lse, "tail_value": plan.tail_value}
    leaves = {n: x.detach().to(q.dtype).requires_grad_() for n, x in leaves.items()}
    logits = leaves["q"] @ leaves["k"].transpose(-1, -2) * scale
    if weight is not None:
        logits = logits + weight[..., None, :].to(logits)
    logits, values = logits.masked_fill(~mask, -torch.inf), leaves["v"]
    if plan.tail_lse is not None:
        tail_lse, tail_value = oracle.tails(plan._copy(dict(list(leaves.items())[3:])))
        logits = torch.cat([logits, tail_lse.expand(*logits.shape[:-1], 1)], -1)
    unseen = (logits == -torch.inf).all(-1, keepdim=True)
    logits = logits.masked_fill(unseen, 0)
    p = torch.softmax(logits, -1)
    out = p[..., : v.shape[2]] @ values
    if plan.tail_lse is not None:
        out = out + p[..., -1:] * tail_value
    out = out.masked_fill(unseen, 0)
    lse = torch.logsumexp(logits, -1).masked_fill(unseen[..., 0], 0)
    wanted, given = [out], [grad_out.to(out.dtype)]
    if grad_lse is not None:
        wanted, given = [out, lse], [*given, grad_lse.to(lse.dtype)]
    grads = torch.autograd.grad(wanted, list(leaves.values()), given)
    found = {"out": out.detach(), "lse": lse.detach()}
    return found | {f"d{name}": g for name, g in zip(leaves, grads)}


def assert_matches_oracle(
    plan: Plan, backend: str, *, batch=1, heads=2, head_dim=16, dtype=torch.float32, size=1.0,
    kv_log_weight=None, scale=None, with_lse=True, view=lambda x: x,
) -> dict:  # fmt: skip
    """Assert that a backend is about as near to the fp64 oracle as plain attention in ``dtype``.

    Args:
        size: factor of q and k.
        with_lse: send a gradient through lse too.
        view: applied to q, k, v and the gradient, to make strided ones.
    """
    inputs = attention_inputs(batch, heads, plan.num_queries, head_dim, plan.num_keys, dtype, size)
    grad_lse = None
    if with_lse:
        grad_lse = torch.randn(inputs[3].shape[:3], generator=_generator(1))
    options = {"kv_log_weight": kv_log_weight, "scale": scale}
    exact = oracle.results(*inputs, grad_lse, plan, kv_log_weight, scale)
    actual = results(*(view(x) for x in inputs), grad_lse, plan, backend, **options)
    weight = plan.kv_log_weight
    if kv_log_weight is not None:
        weight = kv_log_weight if weight is None else weight + kv_log_weight
    scale = head_dim**-0.5 if scale is None else scale
    eager = eager_results(*inputs, grad_lse, plan, weight, scale)
    assert actual["out"].dtype == dtype
    assert actual["lse"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    unseen = exact["lse"] == -torch.inf
    assert torch.equal(actual["lse"] == -torch.inf, unseen)
    epilogue = plan.out_scale is not None or plan.out_residual is not None
    for name, value in exact.items():
        found = actual[name]
        if name == "lse":
            found, value = found.masked_fill(unseen, 0), value.masked_fill(unseen, 0)
        if name in eager and not epilogue:
            # Where a row sees one key, dp and delta cancel in eager attention without any error.
            # Gradients of PyTorch's fused attention are a little more wrong than eager ones.
            fused = backend == "cpu" and name in ("dq", "dk", "dv")
            factor = 5 if fused else 4
            assert_within_budget(name, found, value, eager[name], factor, floor=8)
        else:
            # Sums of what eager bounds above.
            limit = 64 * torch.finfo(dtype).eps * float(value.abs().max())
            assert torch.isfinite(found).all(), name
            assert float((found.double() - value).abs().max()) <= limit, name
    return actual
