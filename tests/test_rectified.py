"""Rectified attention against an oracle of explicit loops, and its published code's errors."""

import math

import pytest
import torch

from dittfast import functional
from dittfast.attention import attend, method_attention
from dittfast.config import resolve
from dittfast.layout import Context, Grid, Layout
from dittfast.methods.rectified import Rectified, neighbor_blocks
from dittfast.schedule import Schedule
from dittfast.testing import assert_within_budget, attention_inputs

BACKENDS = ["reference", "cpu"]


def blocks_of(layout, method):
    """Image blocks and context tokens, as lists of token numbers."""
    order, image, text = layout.order(method.order).tolist(), [], []
    for start, segment in layout.spans():
        tokens = order[start : start + segment.length]
        if isinstance(segment, Grid):
            size = method.block_size
            image += [tokens[i : i + size] for i in range(0, len(tokens), size)]
        else:
            text += tokens
    return image, text


def near(layout, first, second):
    """Whether two blocks hold tokens of one grid at most one step apart."""
    place = layout.coordinates().astype(int)
    step = abs(place[first][:, None] - place[second])
    return bool(((step[..., 0] == 0) & (step[..., 1:].max(-1) <= 1)).any())


def select(shares, method, layout, image, size):
    """Blocks each query block sees: top-k and top-p of the shares, and the neighbours."""
    seen = []
    for n, row in enumerate(shares.tolist()):
        ranked = sorted(range(len(row)), key=lambda m: (-row[m], m))
        total, count = 0.0, 1
        for m in ranked:
            total += row[m]
            count += total <= method.top_p
        kept = set(ranked[: max(count, method.num_kept(layout))])
        if method.neighbors:
            kept |= {m for m in range(size) if near(layout, image[n], image[m])}
        seen.append({m for m in kept if m < size})
    return seen


def attend_to(q, k, v, scale):
    """``softmax(scale * q kᵀ) v``: by the formula in fp64, else as PyTorch computes it.

    PyTorch's fused attention rounds more than eager softmax does, up to 9 times in gradients at
    large logits; a fused kernel is compared with a fused kernel.
    """
    if q.dtype == torch.float64:
        return torch.softmax(q @ k.T * scale, -1) @ v
    q, k, v = (x[None, None] for x in (q, k, v))
    fused = torch.nn.functional.scaled_dot_product_attention
    return fused(q, k, v, scale=scale)[0, 0]


def oracle_head(q, k, v, layout, method, valid, choice=None, scale=None):
    """``(out [N, D], choice)`` of one batch row and head; choice = (seen, rectified) per block."""
    image, text = blocks_of(layout, method)
    words, size = [t for t in text if t in valid], len(image)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mean = lambda x: torch.stack([x[block].mean(0) for block in image])  # noqa: E731
    off = lambda x: torch.stack(  # noqa: E731
        [(x[block] - x[block].mean(0)).abs().mean(0) for block in image]
    )
    q_mean, k_mean, v_mean = mean(q), mean(k), mean(v)
    logits = torch.cat([q_mean @ k_mean.T, q_mean @ k[words].T], 1) * scale
    tokens = [len(block) for block in image] + [1] * len(words)
    top = logits.max(1, keepdim=True).values.detach()
    weights = (logits - top).exp() * torch.tensor(tokens).to(q)
    shares = weights / weights.sum(1, keepdim=True)
    if text:
        shares = torch.cat([shares[:, :size], shares[:, size:].sum(1, keepdim=True)], 1)
    if choice is None:
        seen = select(shares.detach(), method, layout, image, size)
        gain = (q_mean @ k_mean.T).abs()
        error = (off(q) @ k_mean.T).abs() + (q_mean @ off(k).T).abs()
        choice = seen, (gain > error).tolist()
    seen, trusted = choice
    out = torch.zeros_like(q)
    for n, block in enumerate(image):
        keys = [t for m in sorted(seen[n]) for t in image[m]] + words
        sparse = attend_to(q[block], k[keys], v[keys], scale)
        if method.rectify:
            moved = [m for m in range(size) if m not in seen[n] and trusted[n][m]]
            kept = [m for m in range(shares.shape[1]) if m not in moved]
            sparse = shares[n, kept].sum() * sparse + shares[n, moved] @ v_mean[moved]
        out = out.index_add(0, torch.tensor(block), sparse)
    if text:
        keys = [t for block in image for t in block] + words
        dense = attend_to(q[text], k[keys], v[keys], scale)
        out = out.index_add(0, torch.tensor(text), dense)
    return out, choice


def oracle(q, k, v, layout, method, choice=None, scale=None):
    valid, rows, found = layout.valid(), [], {}
    for b in range(q.shape[0]):
        shown = range(layout.num_tokens) if valid is None else valid[b].nonzero()[:, 0].tolist()
        heads = []
        for h in range(q.shape[1]):
            known = None if choice is None else choice[b, h]
            out, found[b, h] = oracle_head(
                q[b, h], k[b, h], v[b, h], layout, method, set(shown), known, scale
            )
            heads.append(out)
        rows.append(torch.stack(heads))
    return torch.stack(rows), found


def leaves(*tensors, dtype=None):
    return [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]


def with_grads(function, q, k, v, grad):
    out, *rest = function(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad.to(out.dtype))], rest


def run(method, layout, q, k, v, backend="reference", scale=None):
    plan = method.plan(layout, q, k, v, scale=scale).replace()
    return attend(q, k, v, plan, backend=backend, scale=scale)


def blocky_inputs(layout, method, batch=1, heads=1, head_dim=32, dtype=torch.float32, scale=1.0):
    """Inputs whose blocks differ in their means, so that some estimates can be trusted."""
    q, k, v, grad = attention_inputs(batch, heads, layout.num_tokens, head_dim, scale=scale)
    for x in (q, k):
        x *= 0.5
        for block in blocks_of(layout, method)[0]:
            x[:, :, block] += 0.6 * scale * torch.randn(batch, heads, 1, head_dim)
    return [x.to(dtype) for x in (q, k, v, grad)]


def check(method, layout, batch=1, heads=1, head_dim=32, dtype=torch.float32, scale=1.0,
          backend="reference", judge=assert_within_budget):  # fmt: skip
    q, k, v, grad = blocky_inputs(layout, method, batch, heads, head_dim, dtype, scale)
    if layout.context_lengths is not None:
        grad = grad * layout.valid()[:, None, :, None]
    exact, (choice,) = with_grads(
        lambda *x: oracle(*x, layout, method), *leaves(q, k, v, dtype=torch.float64), grad
    )
    eager, _ = with_grads(lambda *x: oracle(*x, layout, method, choice), *leaves(q, k, v), grad)
    ours, _ = with_grads(
        lambda *x: (run(method, layout, *x, backend=backend),), *leaves(q, k, v), grad
    )
    for name, *values in zip(("out", "dq", "dk", "dv"), ours, exact, eager):
        judge(name, *values)
    return choice


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_precision_throughout(backend):
    """No constant, such as the log of a count, is rounded to single precision."""
    layout = Layout.image(9, 10, text=21)
    method = Rectified(block_size=16, topk=2, neighbors=False)
    q, k, v, _ = blocky_inputs(layout, method, dtype=torch.float64)
    expected, _ = oracle(q, k, v, layout, method)
    found = run(method, layout, q, k, v, backend)
    assert float((found - expected).abs().max()) < 1e-13 * float(expected.abs().max())


def test_what_the_call_hides_comes_on_top_of_padding():
    """A mask of the call hides two words; the layout's padding stays hidden in the shares too."""
    layout = Layout.image(9, 10, text=21, text_lengths=[15])
    method = Rectified(block_size=16, topk=2, neighbors=False)
    q, k, v, _ = blocky_inputs(layout, method, dtype=torch.float64)
    start = next(at for at, segment in layout.spans() if isinstance(segment, Context))
    hidden = torch.zeros(1, 1, layout.num_tokens)
    hidden[..., [start + 3, start + 4]] = -torch.inf
    valid = set(layout.valid()[0].nonzero()[:, 0].tolist()) - {start + 3, start + 4}
    expected, _ = oracle_head(q[0, 0], k[0, 0], v[0, 0], layout, method, valid)
    plan = method.plan(layout, q, k, v, kv_log_weight=hidden)
    found = attend(q, k, v, plan, kv_log_weight=hidden, backend="reference")[0, 0]
    seen = layout.valid()[0]
    torch.testing.assert_close(found[seen], expected[seen])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "layout, options",
    [
        (Layout.image(1, 63), dict(block_size=8, topk=2)),
        (Layout.image(3, 37), dict(block_size=16, topk=2, order="raster", top_p=0)),
        (Layout.image(15, 26), dict(block_size=16, topk=3, neighbors=False)),
        (Layout.image(25, 40), dict(block_size=128, drop=0.75, top_p=0.1)),
        (Layout.video(5, 7, 9), dict(block_size=16, topk=2, order="morton", neighbors=False)),
        (Layout.video(3, 8, 8, text=21), dict(block_size=16, topk=3, neighbors=False, top_p=0)),
        (Layout.image(9, 10, text=21), dict(block_size=16, topk=2, neighbors=False, top_p=0.05)),
        (
            Layout((Grid(1, 7, 9), Context(5), Grid(1, 4, 5), Context(11))),
            dict(block_size=8, topk=2),
        ),
    ],
)
def test_any_length_matches_the_oracle(layout, options, backend):
    check(Rectified(**options), layout, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0])
@pytest.mark.parametrize(
    "dtype, head_dim", [(torch.float32, 128), (torch.float16, 64), (torch.bfloat16, 32)]
)
def test_dtypes_head_dims_and_scales(dtype, head_dim, scale, backend):
    method = Rectified(block_size=16, topk=2, top_p=0.05, neighbors=False)
    layout = Layout.image(9, 10, text=21, text_lengths=[21, 5])
    check(method, layout, 2, 2, head_dim, dtype, scale, backend)


def test_the_test_inputs_contain_both_kinds_of_dropped_block():
    method = Rectified(block_size=16, topk=2, top_p=0.05, neighbors=False)
    choice = check(method, Layout.image(9, 10, text=21))
    seen, trusted = choice[0, 0]
    dropped = [trusted[n][m] for n in range(6) for m in range(6) if m not in seen[n]]
    assert any(dropped) and not all(dropped)


@pytest.mark.parametrize("text_first", [True, False])
def test_padded_text_of_different_length_per_sample(text_first):
    layout = Layout.image(9, 10, text=21, text_first=text_first, text_lengths=[21, 5])
    check(Rectified(block_size=16, topk=2, neighbors=False, top_p=0), layout, batch=2)


def test_sample_without_any_valid_text():
    layout = Layout.image(9, 10, text=21, text_lengths=[0])
    check(Rectified(block_size=16, topk=2, neighbors=False), layout)


def test_padding_tokens_change_neither_plan_nor_output():
    layout = Layout.image(9, 10, text=21, text_lengths=[21, 5])
    method = Rectified(block_size=16, topk=2, neighbors=False)
    q, k, v, _ = attention_inputs(2, 2, layout.num_tokens, 32)
    valid = layout.valid()[:, None, :, None]
    other = [torch.where(valid, x, 1e4) for x in (q, k, v)]
    before, after = run(method, layout, q, k, v), run(method, layout, *other)
    assert torch.equal(before * valid, after * valid)
    broken = method.plan(layout, *(torch.where(valid, x, torch.nan) for x in (q, k, v)))
    plan = method.plan(layout, q, k, v)
    assert torch.equal(broken.out_scale, plan.out_scale)
    assert torch.equal(broken.kv_indices, plan.kv_indices)


def test_text_boundary_inside_a_block():
    layout = Layout.image(9, 10, text=21)
    plan = Rectified(block_size=16, topk=2).plan(layout, *torch.randn(3, 1, 1, 111, 32))
    starts, lengths = plan.q_blocks.starts.tolist(), plan.q_blocks.lengths.tolist()
    assert (starts[1], lengths[1]) == (16, 5) and (starts[2], lengths[2]) == (21, 16)


def test_half_precision_statistics_do_not_overflow():
    """Sums over 128 tokens and their products exceed 65504; means and fp32 do not."""
    layout = Layout.image(16, 32)
    method = Rectified(topk=1, neighbors=False, top_p=0)
    q, k, v, _ = blocky_inputs(layout, method, 1, 2, 64, scale=300.0)
    q, k, v = q.half(), k.half(), v.half()
    assert not torch.isfinite((128 * q.mean(2)) @ (128 * k.mean(2)).mT).all()
    scale = 1e-5
    plan = method.plan(layout, q, k, v, scale=scale).replace()
    assert torch.isfinite(plan.out_scale).all() and torch.isfinite(plan.out_residual).all()
    exact, choice = oracle(q.double(), k.double(), v.double(), layout, method, scale=scale)
    assert any(any(row) for row in choice[0, 0][1])
    ours = attend(q, k, v, plan, backend="reference", scale=scale)
    torch.testing.assert_close(ours.double(), exact, rtol=2e-3, atol=2e-3)


def test_weights_add_up_to_one():
    layout = Layout.video(3, 8, 9, text=21)
    method = Rectified(block_size=16, topk=2, top_p=0, neighbors=False)
    q, k, _, _ = blocky_inputs(layout, method, 1, 2)
    v = torch.full_like(q, 3.0)
    assert float(method.plan(layout, q, k, v).out_scale.min()) < 0.95
    torch.testing.assert_close(run(method, layout, q, k, v), v, rtol=1e-5, atol=0)


def test_text_queries_are_dense_and_unscaled():
    layout = Layout.image(9, 10, text=21)
    plan = Rectified(block_size=16, topk=1, neighbors=False).plan(
        layout, *(torch.randn(3, 1, 2, 111, 32) + 0.3)
    )
    assert bool(plan.to_dense_mask()[:, :, :21].all())
    assert bool((plan.out_scale[..., :2] == 1).all())
    assert bool((plan.out_residual[..., :2, :] == 0).all())


@pytest.mark.parametrize("options", [dict(topk=100), dict(topk=1, top_p=1.0)])
def test_keeping_every_block_is_dense_attention(options):
    layout = Layout.image(15, 26, text=9)
    q, k, v, _ = attention_inputs(1, 2, layout.num_tokens, 32)
    out = run(Rectified(block_size=16, **options), layout, q, k, v)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5)


def test_text_takes_a_topk_slot():
    layout = Layout.image(8, 12, text=8, text_first=True)
    q, k, v, _ = attention_inputs(1, 1, 104, 32)
    q, k = q.abs(), k.clone()
    k[:, :, :8] = 5  # all attention goes to text
    method = Rectified(block_size=16, topk=2, top_p=0, neighbors=False)
    plan = method.plan(layout, q, k, v)
    assert bool((plan.kv_num_blocks[..., 1:] == 2).all())  # one image block, one of text


def test_without_rectification_there_is_no_epilogue():
    layout = Layout.image(15, 26)
    method = Rectified(block_size=16, topk=3, rectify=False)
    plan = method.plan(layout, *torch.randn(2, 1, 1, 390, 32))
    assert plan.out_scale is None and plan.out_residual is None
    check(method, layout)


def test_rectification_is_nearer_to_dense_than_dropping():
    layout = Layout.image(24, 24)
    errors = []
    for on in (True, False):
        method = Rectified(block_size=16, topk=4, top_p=0, neighbors=False, rectify=on)
        torch.manual_seed(0)
        q, k, v, _ = blocky_inputs(layout, method, 1, 4, scale=0.7)
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v + 1)
        errors.append(float((run(method, layout, q, k, v + 1) - dense).norm()))
    assert errors[0] < 0.8 * errors[1]


def test_the_softmax_scale_enters_the_shares():
    layout, method = Layout.image(15, 26), Rectified(block_size=16, topk=2, neighbors=False)
    q, k, v, _ = blocky_inputs(layout, method)
    out = run(method, layout, q, k, v, scale=0.5)
    exact, _ = oracle(*(x.double() for x in (q, k, v)), layout, method, scale=0.5)
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)


def test_a_mask_the_layout_does_not_know_enters_the_shares():
    """Pipelines hide padded text by an attention mask; the plan must not count it."""
    q, k, v, _ = attention_inputs(2, 2, 111, 32)
    method = Rectified(block_size=16, topk=2, neighbors=False)
    layout = Layout.image(9, 10, text=21, text_lengths=[21, 5])
    weight, bare = layout.kv_log_weight(), layout.with_text_lengths(None)
    known = method_attention(method, layout, q, k, v, backend="reference")
    masked = method_attention(method, bare, q, k, v, backend="reference", kv_log_weight=weight)
    torch.testing.assert_close(masked, known)
    unaware = method.plan(bare, q, k, v)
    assert not torch.allclose(unaware.out_scale[1], method.plan(layout, q, k, v).out_scale[1])


@pytest.mark.slow
def test_prepared_planning_is_traced_in_one_graph():
    layout = Layout.image(9, 10, text=21, text_lengths=[5])
    method = Rectified(block_size=16, topk=2)
    q, k, v = leaves(*attention_inputs(1, 2, 111, 32)[:3])
    call = lambda *x: method_attention(method, layout, *x, backend="reference")  # noqa: E731
    method.prepare(layout, q.device)
    out = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v)
    for ours, eager in zip(
        torch.autograd.grad(out.square().sum(), (q, k, v)),
        torch.autograd.grad(call(q, k, v).square().sum(), (q, k, v)),
    ):
        torch.testing.assert_close(ours, eager)


def test_training_after_inference_mode():
    layout, method = (
        Layout.image(9, 10, text=21, text_lengths=[5]),
        Rectified(block_size=16, topk=2),
    )
    q, k, v = leaves(*attention_inputs(1, 2, 111, 32)[:3])
    with torch.inference_mode():
        before = run(method, layout, q, k, v)
    after = run(method, layout, q, k, v)
    grads = torch.autograd.grad(after.sum(), (q, k, v))
    assert torch.equal(before, after) and all(torch.isfinite(g).all() for g in grads)


def test_two_resolutions_with_one_method():
    method = Rectified(block_size=16, topk=2)
    for layout in (Layout.image(10, 11), Layout.image(12, 9), Layout.image(10, 11)):
        inputs = attention_inputs(1, 1, layout.num_tokens, 32)[:3]
        fresh = run(Rectified(block_size=16, topk=2), layout, *inputs)
        assert torch.equal(run(method, layout, *inputs), fresh)


def test_several_query_heads_per_key_head():
    layout, method = Layout.image(9, 10, text=21), Rectified(block_size=16, topk=2)
    q, *_ = attention_inputs(1, 4, 111, 32)
    _, k, v, _ = attention_inputs(1, 2, 111, 32, seed=1)
    repeated = (x.repeat_interleave(2, 1) for x in (k, v))
    torch.testing.assert_close(
        run(method, layout, q, k, v), run(method, layout, q, *repeated), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    "layout",
    [
        Layout.video(3, 5, 7),
        Layout.image(1, 30),
        Layout((Grid(2, 4, 4), Context(3), Grid(1, 3, 5))),
    ],
    ids=["video", "line", "two grids"],
)
@pytest.mark.parametrize("order", ["hilbert", "raster"])
def test_neighbor_blocks_by_brute_force(layout, order):
    image, _ = blocks_of(layout, Rectified(block_size=8, order=order))
    block = torch.full((layout.num_tokens,), -1)
    for n, tokens in enumerate(image):
        block[tokens] = n
    expected = [[near(layout, a, b) for b in image] for a in image]
    assert neighbor_blocks(layout, block, len(image)).tolist() == expected


def test_first_frame_blocks_are_those_of_the_first_frame():
    # The first blocks of a curve through the video hold little of its first frame.
    layout = Layout.video(8, 8, 8, text=5)
    method = Rectified(block_size=16, topk=1, top_p=0, neighbors=False, first_frame=True)
    image, _ = blocks_of(layout, method)
    first = [n for n, tokens in enumerate(image) if any(t < 64 for t in tokens)]
    q = torch.randn(3, 1, 1, layout.num_tokens, 32)
    mask = method.plan(layout, *q).to_block_mask()[0, 0]
    assert len(first) > 4 and first != list(range(len(first)))
    assert bool(mask[first][:, first].all())
    others = [n for n in range(len(image)) if n not in first]
    assert int(mask[others][:, : len(image)].sum(1).max()) == 1


@pytest.mark.parametrize(
    "tokens, options, kept",
    [
        (12800, dict(drop=0.8), 20),
        (12800, dict(drop=0.9), 10),
        (12799, dict(drop=0), 99),
        (12799, dict(drop=0, round_up=True), 100),
        (300, dict(drop=0.9), 1),
        (12800, dict(), 20),
        (12800, dict(topk=7), 7),
    ],
)
def test_number_of_kept_blocks(tokens, options, kept):
    assert Rectified(**options).num_kept(Layout.image(1, tokens)) == kept


def test_equal_shares_are_broken_by_place():
    layout = Layout.image(15, 26)
    method = Rectified(block_size=16, topk=3, top_p=0, neighbors=False)
    plan = method.plan(layout, *torch.ones(3, 1, 1, 390, 32))
    assert plan.to_block_mask()[0, 0, :, :3].all() and bool((plan.kv_num_blocks == 3).all())


def test_density_counts_what_is_seen():
    layout = Layout.image(1, 64, text=16, text_lengths=[4])
    q = torch.randn(3, 1, 1, 80, 32)
    method = Rectified(block_size=16, topk=1, top_p=0, neighbors=False, order="raster")
    plan = method.plan(layout, *q)
    image_blocks = int(plan.kv_num_blocks[..., 1:].sum()) - 4
    expected = (image_blocks * 16 * 16 + 64 * 4 + 16 * 68) / (80 * 68)
    assert plan.density == pytest.approx(expected)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(block_size=4), ("block_size", "8..256", "4")),
        (dict(topk=0), ("topk", "0")),
        (dict(drop=1.0), ("drop", "[0, 1)", "1.0")),
        (dict(drop=-0.1), ("drop", "-0.1")),
        (dict(topk=3, drop=0.5), ("topk", "drop", "not both")),
        (dict(top_p=1.5), ("top_p", "[0, 1]", "1.5")),
        (dict(top_p=math.nan), ("top_p", "nan")),
        (dict(order="tile"), ("order", "hilbert", "tile")),
    ],
)
def test_bad_options_name_value_and_range(options, words):
    with pytest.raises(ValueError) as error:
        Rectified(**options)
    assert all(word in str(error.value) for word in words)


def test_bad_inputs():
    method, x = Rectified(), torch.randn(1, 1, 100, 32)
    with pytest.raises(ValueError, match="v is None"):
        method.plan(Layout.image(10, 10), x, x)
    with pytest.raises(ValueError, match=r"k must be \[B, H, 100, D\]"):
        method.plan(Layout.image(10, 10), x, x[:, :, :90], x)
    with pytest.raises(ValueError, match="no grid"):
        method.plan(Layout((Context(100),)), x, x, x)


@pytest.mark.parametrize(
    "preset, drop, dense_steps, dense_layers",
    [
        ("flux", 0.9, 0, ("37-56",)),
        ("hunyuan", 0.8, 0, ()),
        ("wan2.1", 0.75, 5, ("0-1",)),
        ("wan2.2", 0.85, 3, ("0-1",)),
        ("cogvideox", 0.85, 5, ()),
    ],
)
def test_presets_are_the_published_settings(preset, drop, dense_steps, dense_layers):
    method, schedule = resolve(f"rectified/{preset}")
    assert method == Rectified(drop=drop, round_up=preset == "wan2.1")
    assert schedule == Schedule(dense_first_steps=dense_steps, dense_layers=dense_layers)


def test_as_a_function():
    layout = Layout.image(9, 10, text=21)
    q, k, v, _ = attention_inputs(1, 2, 111, 32)
    options = dict(block_size=16, topk=2, top_p=0.1, order="morton", neighbors=False)
    out = functional.rectified_attention(q, k, v, layout, **options, backend="reference")
    assert torch.equal(out, run(Rectified(**options), layout, q, k, v))
