"""Block top-k against its definition, written head by head and block by block in fp64."""

import pytest
import torch
from random_plans import assert_matches_oracle

from dittfast import Layout, functional
from dittfast.attention import method_attention
from dittfast.layout import Context, Grid
from dittfast.methods import METHODS, TopK, topk
from dittfast.testing import assert_within_budget, attention_inputs, eager_attention


def image_blocks(layout, method):
    """Lists of tokens: the blocks of every grid, along the curve."""
    order = layout.order(method.order).tolist()
    blocks = []
    for start, segment in layout.spans():
        if isinstance(segment, Grid):
            held = order[start : start + segment.length]
            blocks += [
                held[n : n + method.block_size] for n in range(0, len(held), method.block_size)
            ]
    return blocks


def parts_of(block, method):
    if method.score == "mean":
        return [block]
    size = -(-method.block_size // method.sub_block)
    return [block[n : n + size] for n in range(0, len(block), size)]


def scored(q, k, blocks, method, scale):
    """``(score, share) [n, n]`` of one head, q and k ``[N, D]`` fp64."""
    parts = [(number, part) for number, b in enumerate(blocks) for part in parts_of(b, method)]
    owner = torch.tensor([number for number, _ in parts])
    length = torch.tensor([len(part) for _, part in parts], dtype=torch.float64)
    q_mean, k_mean = (torch.stack([x[part].mean(0) for _, part in parts]) for x in (q, k))
    logits = scale * q_mean @ k_mean.T
    of = [owner == number for number in range(len(blocks))]
    per_part = torch.stack([(logits[:, b] + length[b].log()).logsumexp(1) for b in of], 1)
    per_part = torch.softmax(per_part, 1) * length[:, None]
    share = torch.stack([per_part[b].sum(0) / length[b].sum() for b in of])
    return (logits if method.score == "mean" else share), share


def of_head(value, head):
    return value[head] if isinstance(value, tuple) else value


def chosen(score, share, method, head):
    """Block numbers one query block keeps, and how near the closest decision was."""
    n = len(score)
    least = of_head(method.topk, head)
    if least is None:
        least = 1 if method.topp is not None else 0.2
    least = max(1, round(least * n)) if isinstance(least, float) else min(least, n)
    best = sorted(range(n), key=lambda b: (-float(score[b]), b))
    count, mass, near = least, 0.0, 1.0
    if method.topp is not None:
        needed = 0
        while needed < n:
            mass += float(share[best[needed]])
            needed += 1
            near = min(near, abs(mass - of_head(method.topp, head)))
            if mass > of_head(method.topp, head):
                break
        count = max(least, needed)
    if count < n:
        near = min(near, float(score[best[count - 1]] - score[best[count]]))
    return best[:count], near


class Undecided(AssertionError):
    """Scores are so near that rounding decides between them."""


def expected_mask(layout, method, q, k, scale, undecided=1e-7):
    """``[B, H, N, N]`` bool by definition, padding left in."""
    batch, heads, n = q.shape[:3]
    blocks = image_blocks(layout, method)
    is_text = torch.from_numpy(layout.coordinates()[:, 0] < 0)
    mask = torch.zeros(batch, heads, n, n, dtype=torch.bool)
    mask[..., is_text, :] = True
    mask[..., is_text] = True
    for b in range(batch):
        for h in range(heads):
            own = h * k.shape[1] // heads
            score, share = scored(q[b, h].double(), k[b, own].double(), blocks, method, scale)
            for number, block in enumerate(blocks):
                kept, near = chosen(score[number], share[number], method, h)
                if near <= undecided:
                    raise Undecided("the inputs leave the choice to rounding")
                for other in kept:
                    mask[b, h, torch.tensor(block)[:, None], blocks[other]] = True
    return mask


LAYOUTS = {
    "ragged image": Layout.image(9, 13, text=7),
    "video, text behind": Layout.video(3, 5, 9, text=5, text_first=False),
    "several grids": Layout((Grid(1, 7, 9), Context(4), Grid(2, 4, 6))),
    "padded": Layout.image(8, 11, text=20, text_lengths=(3, 20)),
    "line": Layout.image(1, 111),
}
OPTIONS = {
    "means": dict(topk=2, score="mean"),
    "parts": dict(topk=3),
    "uneven parts": dict(topk=2, sub_block=3),
    "more parts than a short block has": dict(topk=2, sub_block=8),
    "share of the blocks": dict(topk=0.3),
    "default": dict(),
    "mass": dict(topp=0.5),
    "mass by means": dict(topp=0.4, score="mean", order="raster"),
    "both": dict(topk=2, topp=0.3, order="morton"),
    "heads": dict(topk=(1, 2, 5, 0.5)),
    "heads, mass": dict(topk=(1, 1, 3, 1), topp=(0.1, 0.5, 0.0, 0.9)),
}


def shown(plan, layout):
    """What a plan shows of the keys that are no padding, ``[B, H, N, N]``."""
    mask = plan.to_dense_mask()
    valid = layout.valid()
    return mask if valid is None else mask & valid[:, None, None]


# Every option on the two layouts that have most to go wrong, a few on the others.
CASES = [
    (name, options)
    for name in LAYOUTS
    for options in OPTIONS
    if name in ("ragged image", "padded") or options in ("means", "uneven parts", "both")
]


@pytest.mark.parametrize("name, options", CASES)
def test_the_definition(name, options):
    layout, method = LAYOUTS[name], TopK(block_size=16, **OPTIONS[options])
    q, k, _, _ = attention_inputs(2, 4, layout.num_tokens, 32)
    k, scale = 2 * k[:, :2], 0.3
    plan = method.plan(layout, q, k, scale=scale).replace()  # validates it
    expected = expected_mask(layout, method, q, k, scale)
    valid = layout.valid()
    if valid is not None:
        expected &= valid[:, None, None]
    assert torch.equal(shown(plan, layout), expected)
    assert torch.equal(plan.kv_num_blocks, plan.kv_num_full_blocks)


@pytest.mark.parametrize("backend", ["cpu", "native"])
@pytest.mark.parametrize("options", ["parts", "both"])
def test_attention_and_gradients(backend, options):
    """Forward, lse and every gradient under the plan; the oracle reads the plan's raw fields."""
    layout, method = LAYOUTS["ragged image"], TopK(block_size=16, **OPTIONS[options])
    q, k, _, _ = attention_inputs(2, 4, layout.num_tokens, 32)
    assert_matches_oracle(method.plan(layout, q, k), backend, batch=2, heads=4, head_dim=32)


def test_the_function_is_the_definition():
    layout = LAYOUTS["padded"]
    q, k, v, grad = attention_inputs(2, 4, layout.num_tokens, 32)
    k, v = k[:, :2], v[:, :2]
    mask = expected_mask(layout, TopK(16, 2, 0.3), q, k, 0.2) & layout.valid()[:, None, None]
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        wide = [leaves[0], *(x.repeat_interleave(2, 1) for x in leaves[1:])]
        out = eager_attention(*wide, mask, 0.2)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = functional.topk_attention(*leaves, layout, 16, 2, 0.3, scale=0.2)
    ours = out.detach(), *torch.autograd.grad(out, leaves, grad)
    for name, a, eager, exact in zip(("out", "dq", "dk", "dv"), ours, *results):
        assert_within_budget(name, a, exact, eager)


def test_a_sequence_needs_no_layout():
    q, k, v, _ = attention_inputs(1, 2, 100, 32)
    out = functional.topk_attention(q, k, v, block_size=16, topk=2)
    layout = Layout.image(1, 100)
    assert torch.equal(out, functional.topk_attention(q, k, v, layout, block_size=16, topk=2))


def test_keeping_every_block_is_dense_attention():
    layout = LAYOUTS["padded"]
    q, k, v, _ = attention_inputs(2, 2, layout.num_tokens, 32)
    mask = layout.valid()[:, None, None]
    exact = eager_attention(q.double(), k.double(), v.double(), mask, 32**-0.5)
    eager = eager_attention(q, k, v, mask, 32**-0.5)
    for method in (TopK(16, 1000), TopK(16, 1.0), TopK(16, topp=1.0)):
        assert method.plan(layout, q, k).density == 1
        assert_within_budget("out", method_attention(method, layout, q, k, v), exact, eager)


def clustered(layout, block_size, generator):
    """q and k in which each block holds four kinds of tokens that look for four different blocks.

    A mean over the block has a quarter of each, which says little of what it looks for.
    """
    n, width, own = layout.num_tokens, 32, block_size // 4
    kinds = torch.randn(n // own, width, generator=generator)
    kinds = torch.nn.functional.normalize(kinds, dim=-1) * 7
    wanted = torch.randperm(n // own, generator=generator)
    q, k = (x.repeat_interleave(own, 0) for x in (kinds[wanted], kinds))
    noise = torch.randn(2, n, width, generator=generator) * 0.3
    return (q + noise[0])[None, None], (k + noise[1])[None, None]


def kept_mass(plan, q, k, scale):
    shares = torch.softmax(q.double() @ k.double().mT * scale, -1)
    return float((shares * plan.to_dense_mask()).sum(-1).mean())


def test_parts_keep_more_of_the_attention_than_means():
    """At the same density, on tokens of several kinds in a block."""
    layout, generator = Layout.image(1, 1024), torch.Generator().manual_seed(0)
    q, k = clustered(layout, 32, generator)
    kept = {}
    for score in topk.SCORES:
        plan = TopK(32, 4, score=score, order="raster").plan(layout, q, k)
        assert plan.density == pytest.approx(4 / 32)
        kept[score] = kept_mass(plan, q, k, 32**-0.5)
    assert kept["subblock"] > kept["mean"] + 0.3


def test_equal_scores_are_broken_by_place():
    layout = Layout.image(15, 26)
    for options in (dict(topk=3), dict(topk=3, topp=0.0)):
        plan = TopK(16, **options).plan(layout, *torch.ones(2, 1, 1, 390, 32))
        assert plan.to_block_mask()[0, 0, :, :3].all() and bool((plan.kv_num_blocks == 3).all())


@pytest.mark.parametrize("options", ["parts", "both"])
def test_a_few_blocks_at_a_time_choose_the_same(options, monkeypatch):
    layout, method = LAYOUTS["several grids"], TopK(block_size=16, **OPTIONS[options])
    q, k, _, _ = attention_inputs(1, 4, layout.num_tokens, 32)
    whole = method.plan(layout, q, k).to_block_mask()
    monkeypatch.setattr(topk, "_PAIRS_AT_ONCE", 1)
    assert torch.equal(method.plan(layout, q, k).to_block_mask(), whole)


def test_lists_have_room_for_what_is_kept():
    layout = Layout.image(64, 64, text=64)
    q, k, _, _ = attention_inputs(1, 1, layout.num_tokens, 16)
    plan = TopK(64, 3).plan(layout, q, k)
    assert plan.kv_indices.shape == (1, 1, 65, 4)  # and text, whose row is a run
    assert int(plan.kv_num_blocks[0, 0, 0]) == 65 and bool((plan.kv_num_blocks[..., 1:] == 4).all())
    assert TopK(64, topp=0.5).plan(layout, q, k).kv_indices.shape == (1, 1, 65, 65)


def test_half_precision_statistics_do_not_overflow():
    layout = Layout.image(8, 16)
    q, k, _, _ = attention_inputs(1, 2, 128, 32)
    q, k = (q * 200).half(), (k * 200).half()
    wide = TopK(16, 2).plan(layout, q.double(), k.double())
    assert torch.equal(TopK(16, 2).plan(layout, q, k).to_block_mask(), wide.to_block_mask())


def test_padding_and_its_values_do_not_matter():
    layout, method = LAYOUTS["padded"], TopK(16, 2, 0.3)
    q, k, v, _ = attention_inputs(2, 2, layout.num_tokens, 32)
    out = method_attention(method, layout, q, k, v)
    padding = ~layout.valid()
    for x in (k, v):
        x.masked_fill_(padding[:, None, :, None], 7.0)
    again = method_attention(method, layout, q, k, v)
    assert torch.equal(out[:1, :, 20:], again[:1, :, 20:])


@pytest.mark.slow
def test_prepared_planning_is_traced_in_one_graph():
    layout = Layout.image(6, 11, text=9, text_lengths=[4])
    q, k, v, _ = attention_inputs(1, 2, layout.num_tokens, 32)
    for options in (dict(topk=2), dict(topk=(1, 2), topp=0.4)):
        method = TopK(block_size=8, **options)
        expected = method_attention(method, layout, q, k, v, backend="cpu")
        method.prepare(layout, q.device)
        call = lambda q, k, v: method_attention(method, layout, q, k, v, backend="cpu")  # noqa: B023, E731
        torch._dynamo.reset()
        out = torch.compile(call, fullgraph=True, backend="eager")(q, k, v)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(block_size=7), "block_size must be an integer, 8..256; got 7"),
        (dict(sub_block=0), "sub_block must be an integer, 1..16; got 0"),
        (dict(topk=0), "topk must be an integer, at least 1; got 0 .a float is a share"),
        (dict(topk=1.5), r"topk as a share must lie in \(0, 1\]; got 1.5"),
        (dict(topk=(2, 0)), "topk must be an integer, at least 1; got 0"),
        (dict(topk=()), r"topk must have a value for each head; got \(\)"),
        (dict(topp=1.5), r"topp must lie in \[0, 1\], a share of the mass; got 1.5"),
        (dict(topp=True), "topp must lie in"),
        (dict(score="mode"), "score must be one of subblock, mean; got 'mode'"),
        (dict(order="snake"), "order must be one of hilbert, morton, raster"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TopK(**options)


def test_bad_inputs_are_named():
    q = torch.zeros(1, 2, 30, 16)
    with pytest.raises(ValueError, match="topk has values for 3 heads, q has 2"):
        TopK(topk=(1, 2, 3)).plan(Layout.image(5, 6), q, q)
    with pytest.raises(ValueError, match=r"k must be \[B, H, 30, D\]"):
        TopK().plan(Layout.image(5, 6), q, q[:, :, :20])
    with pytest.raises(ValueError, match="topk plans from q, k, but k is None"):
        TopK().plan(Layout.image(5, 6), q)
    with pytest.raises(ValueError, match="no grid"):
        TopK().plan(Layout((Context(30),)), q, q)


def test_estimates_plan_the_least():
    assert TopK(topk=3, topp=0.9).least() == TopK(topk=3)
    assert TopK(topp=0.9).least() == TopK(topk=1) and TopK(topk=3).least() == TopK(topk=3)
    assert METHODS["topk"] is TopK and not TopK.static
