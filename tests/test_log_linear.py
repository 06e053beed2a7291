"""LLSA against an oracle of explicit loops, and the silent errors of its published code."""

import math
from itertools import chain

import pytest
import torch

from dittfast import functional
from dittfast.attention import attend, method_attention
from dittfast.layout import Context, Grid, Layout
from dittfast.methods.log_linear import LogLinear, top_indices
from dittfast.testing import assert_within_budget, attention_inputs

BACKENDS = ["reference", "cpu"]


def line(n):
    return Layout.image(1, n)


def morton_tokens(grid, first):
    """Token numbers of one grid in Z-order, x lowest; axes of length 1 do not take part."""

    def key(token):
        y, x = divmod(token, grid.width)
        t, y = divmod(y, grid.height)
        axes = [c for c, n in zip((x, y, t), grid.shape[::-1]) if n > 1]
        return sum((c >> bit & 1) << bit * len(axes) + i for i, c in enumerate(axes)
                   for bit in range(20))  # fmt: skip

    return [first + token for token in sorted(range(grid.length), key=key)]


def split(tokens, size):
    return [tokens[i : i + size] for i in range(0, len(tokens), size)]


def flat(groups):
    return list(chain.from_iterable(groups))


def tree_of(groups, branching, levels):
    """``tree[l][i]``: tokens under node i of level l (from 1)."""
    tree = {1: groups}
    for level in range(2, levels + 1):
        tree[level] = [flat(group) for group in split(tree[level - 1], branching)]
    return tree


def choose(q, k, queries, keys, method, levels):
    """Chosen nodes ``chosen[l][i]`` from the definition, in the inputs' dtype."""
    branching, chosen = method.block_size, {}
    mean = lambda x, node: x[node].mean(0) if node else x[0] * 0  # noqa: E731
    for level in range(levels, 0, -1):
        means = torch.stack([mean(k.detach(), node) for node in keys[level]])
        chosen[level] = []
        for i, node in enumerate(queries[level]):
            candidates = list(range(len(keys[level])))
            if level < levels:
                parents = chosen[level + 1][i // branching]
                candidates = [c for c in candidates if c // branching in parents]
            scores = (means[candidates] @ mean(q.detach(), node)).tolist()
            best = [c for _, c in sorted(zip((-x for x in scores), candidates))]
            chosen[level].append(best[: method.topk])
    return chosen


def attend_to(q, k, v, scale, weight=0.0):
    """``softmax(scale * q kᵀ + weight) v``: by the formula in fp64, else as PyTorch computes it.

    PyTorch's fused attention rounds more than eager softmax does, up to 9 times in gradients at
    large logits; a fused kernel is compared with a fused kernel.
    """
    weight = torch.as_tensor(weight, dtype=q.dtype).expand(len(q), len(k))
    if q.dtype == torch.float64:
        return torch.softmax(q @ k.T * scale + weight, -1) @ v
    q, k, v, weight = (x[None, None] for x in (q, k, v, weight))
    fused = torch.nn.functional.scaled_dot_product_attention
    return fused(q, k, v, attn_mask=weight, scale=scale)[0, 0]


def oracle_head(q, k, v, layout, method, levels, valid, selection=None):
    """``(out [N, D], selection)`` of one batch row and head; ``valid`` lists visible context."""
    size, image, text = method.block_size, [], []
    for start, segment in layout.spans():
        tokens = list(range(start, start + segment.length))
        if isinstance(segment, Grid):
            image += split(morton_tokens(segment, start), size)
        else:
            text += split(tokens, size)
    keys = tree_of(image, size, levels)
    shown = [[t for t in block if t in valid] for block in text]
    rows = [(image, keys)]
    if method.text_queries == "sparse" and text:
        rows.append((text, tree_of(shown, size, levels)))
    if selection is None:
        selection = [choose(q, k, queries, keys, method, levels) for _, queries in rows]
    scale, out = q.shape[-1] ** -0.5, torch.zeros_like(q)
    context = flat(shown)
    pooled = {
        level: [torch.stack([x[n].mean(0) for n in nodes]) for x in (k, v)]
        for level, nodes in keys.items()
    }
    for (blocks, _), chosen in zip(rows, selection):
        for i, block in enumerate(blocks):
            tokens = flat(image[c] for c in chosen[1][i]) + context
            wide_k, wide_v, weight = [k[tokens]], [v[tokens]], [0.0] * len(tokens)
            for level in range(1, levels + 1) if method.enrich else ():
                nodes = range(len(keys[level]))
                if level < levels:
                    parents = chosen[level + 1][i // size**level]
                    nodes = [c for c in nodes if c // size in parents]
                wide_k.append(pooled[level][0][list(nodes)])
                wide_v.append(pooled[level][1][list(nodes)])
                weight += [math.log(len(keys[level][c])) for c in nodes]
            seen = attend_to(q[block], torch.cat(wide_k), torch.cat(wide_v), scale, weight)
            out = out.index_add(0, torch.tensor(block), seen)
    if method.text_queries == "dense" and text:
        tokens = flat(image) + context
        dense = attend_to(q[flat(text)], k[tokens], v[tokens], scale)
        out = out.index_add(0, torch.tensor(flat(text)), dense)
    return out, selection


def oracle(q, k, v, layout, method, selection=None):
    levels = method.num_levels(layout)
    valid = layout.valid()
    rows, found = [], {}
    for b in range(q.shape[0]):
        shown = range(layout.num_tokens) if valid is None else valid[b].nonzero()[:, 0].tolist()
        heads = []
        for h in range(q.shape[1]):
            known = None if selection is None else selection[b, h]
            out, found[b, h] = oracle_head(
                q[b, h], k[b, h], v[b, h], layout, method, levels, set(shown), known
            )
            heads.append(out)
        rows.append(torch.stack(heads))
    return torch.stack(rows), found


def leaves(*tensors, dtype=None):
    return [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]


def with_grads(function, q, k, v, grad):
    out, *rest = function(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad.to(out.dtype))], rest


def run(method, layout, q, k, v, backend="reference"):
    plan = method.plan(layout, q, k)
    return attend(q, *method.extend(layout, k, v), plan.replace(), backend=backend)


def check(method, layout, batch=1, heads=1, head_dim=32, dtype=torch.float32, scale=1.0,
          backend="reference", judge=assert_within_budget):  # fmt: skip
    q, k, v, grad = attention_inputs(
        batch, heads, layout.num_tokens, head_dim, dtype=dtype, scale=scale
    )
    if layout.context_lengths is not None:
        grad = grad * layout.valid()[:, None, :, None]
    exact, (selection,) = with_grads(
        lambda *x: oracle(*x, layout, method), *leaves(q, k, v, dtype=torch.float64), grad
    )
    eager, _ = with_grads(lambda *x: oracle(*x, layout, method, selection), *leaves(q, k, v), grad)
    ours, _ = with_grads(
        lambda *x: (run(method, layout, *x, backend=backend),), *leaves(q, k, v), grad
    )
    for name, *values in zip(("out", "dq", "dk", "dv"), ours, exact, eager):
        judge(name, *values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "n, options",
    [
        (16, dict(levels=1)),
        (63, dict(levels=1)),
        (63, dict(block_size=8, topk=2, levels=1)),
        (111, dict(block_size=8, topk=3, levels=2)),
        (390, dict(topk=3, levels=2)),
        (600, dict(block_size=8, topk=2, levels=3)),
        (1000, dict(block_size=10, topk=4, levels=2)),
        (1000, dict(topk=5, levels="auto", order="raster")),
    ],
)
def test_any_length_matches_the_oracle(n, options, backend):
    check(LogLinear(**options), line(n), backend=backend)


def test_text_lists_that_just_fit():
    """8 image blocks and 1 of text: lists of the image are exactly as wide as those of text."""
    layout, method = Layout.image(8, 8, text=5), LogLinear(block_size=8, topk=7, levels=1)
    plan = method.plan(layout, *torch.randn(2, 1, 1, layout.num_tokens, 32))
    assert plan.kv_indices.shape[-1] == plan.q_blocks.count == 9
    check(method, layout)


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_precision_throughout(backend):
    """No constant, such as the log of a count, is rounded to single precision."""
    layout = Layout.image(9, 10, text=21, text_lengths=[5])
    method = LogLinear(block_size=8, topk=3, levels=2)
    q, k, v, _ = attention_inputs(1, 2, layout.num_tokens, 32, dtype=torch.float64)
    expected, _ = oracle(q, k, v, layout, method)
    found = run(method, layout, q, k, v, backend)
    assert float((found - expected).abs().max()) < 1e-13 * float(expected.abs().max())


def test_a_single_token_attends_to_itself():
    q, k, v, grad = leaves(*attention_inputs(1, 1, 1, 32))
    out = run(LogLinear(levels=1), line(1), q, k, v)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
    torch.testing.assert_close(out, v)
    torch.testing.assert_close(dv, grad)
    assert float(dq.abs().max()) < 1e-5 and float(dk.abs().max()) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0])
@pytest.mark.parametrize(
    "dtype, head_dim", [(torch.float32, 128), (torch.float16, 64), (torch.bfloat16, 32)]
)
def test_dtypes_head_dims_and_scales(dtype, head_dim, scale, backend):
    method = LogLinear(block_size=8, topk=3, levels=2)
    check(method, line(111), 2, 2, head_dim, dtype, scale, backend)


@pytest.mark.parametrize(
    "layout",
    [
        Layout.image(11, 13),
        Layout.video(3, 5, 7),
        Layout.image(9, 10, text=21, text_first=True),
        Layout((Grid(1, 7, 9), Context(5), Grid(1, 4, 5), Context(11))),
    ],
    ids=["image", "video", "text first", "two grids, two contexts"],
)
def test_orders_and_segments(layout):
    check(LogLinear(block_size=8, topk=3, levels=2), layout)


@pytest.mark.parametrize("text_queries", ["dense", "sparse"])
@pytest.mark.parametrize("text_first", [True, False])
def test_padded_text_of_different_length_per_sample(text_queries, text_first):
    layout = Layout.image(9, 10, text=21, text_first=text_first, text_lengths=[21, 5])
    check(LogLinear(block_size=8, topk=2, levels=2, text_queries=text_queries), layout, batch=2)


def test_sample_without_any_valid_text():
    layout = Layout.image(9, 10, text=21, text_lengths=[0])
    check(LogLinear(block_size=8, topk=2, levels=2), layout)


def test_padding_tokens_change_nothing():
    layout = Layout.image(9, 10, text=21, text_lengths=[21, 5])
    method = LogLinear(block_size=8, topk=2, levels=2, text_queries="sparse")
    q, k, v, _ = attention_inputs(2, 2, layout.num_tokens, 32)
    valid = layout.valid()[:, None, :, None]
    before = run(method, layout, q, k, v)
    after = run(method, layout, *(torch.where(valid, x, 1e4) for x in (q, k, v)))
    assert torch.equal(before * valid, after * valid)


def test_text_boundary_inside_a_block():
    # 21 tokens of text: the image begins in the middle of what would be the third block of 8.
    layout = Layout.image(9, 10, text=21)
    plan = LogLinear(block_size=8, topk=2).plan(layout, *torch.randn(2, 1, 1, 111, 32))
    starts, lengths = plan.q_blocks.starts.tolist(), plan.q_blocks.lengths.tolist()
    assert (starts[2], lengths[2]) == (16, 5) and (starts[3], lengths[3]) == (21, 8)


@pytest.mark.parametrize("topk", [1, 5, 6, 7])
def test_topk_that_is_no_multiple_of_four(topk):
    method = LogLinear(block_size=8, topk=topk, levels=2)
    check(method, line(390))
    plan = method.plan(line(390), *torch.randn(2, 1, 1, 390, 32))
    fine = plan.to_dense_mask()[..., :390].sum(-1).unique()
    assert int(fine.max()) == 8 * topk


def test_one_level_at_1536_tokens_with_six_blocks():
    check(LogLinear(topk=6, levels=1), line(1536))


@pytest.mark.parametrize("levels", [1, 2])
def test_topk_larger_than_the_number_of_candidates(levels):
    method = LogLinear(block_size=8, topk=50, levels=levels)
    check(method, line(111))
    plan = method.plan(line(111), *torch.randn(2, 1, 1, 111, 32))
    assert plan.density == 1


@pytest.mark.parametrize("n, levels", [(512, 1), (4096, 2)])
def test_no_coarse_key_is_lost_to_rounding(n, levels):
    # Published loops round the 32 or 16 coarse keys down to a multiple of 64: none are left.
    method = LogLinear(levels=levels, topk=2)
    plan = method.plan(line(n), *torch.randn(2, 1, 1, n, 16)).replace()
    coarse = n // 16**levels
    assert bool(plan.to_dense_mask()[..., -coarse:].all())
    assert plan.kv_log_weight[0, 0, -coarse:].tolist() == pytest.approx(
        [math.log(16**levels)] * coarse
    )


def test_one_level_gradient_of_the_coarse_path():
    """Keys no query chose are reached through their mean alone; its weight counts in dk and dv."""
    method, layout = LogLinear(topk=1, levels=1), line(512)
    q, k, v, grad = leaves(*attention_inputs(1, 1, 512, 32))
    plan = method.plan(layout, q, k)
    unseen = ~plan.to_dense_mask()[0, 0, :, :512].any(0)
    assert int(unseen.sum()) >= 16
    dk, dv = torch.autograd.grad(run(method, layout, q, k, v), (k, v), grad)
    wide = leaves(q, k, v, dtype=torch.float64)
    exact = torch.autograd.grad(oracle(*wide, layout, method)[0], wide[1:], grad.double())
    for ours, right in zip((dk, dv), exact):
        ours, right = ours[0, 0, unseen].double(), right[0, 0, unseen]
        assert float((ours * right).sum() / (right * right).sum()) == pytest.approx(1, abs=1e-4)


def test_keys_and_values_of_different_strides():
    method, layout = LogLinear(block_size=8, topk=3), line(111)
    q, k, v, _ = attention_inputs(2, 3, 111, 32)
    strided = [q.transpose(1, 2).contiguous().transpose(1, 2), k, v.mT.contiguous().mT]
    torch.testing.assert_close(run(method, layout, *strided), run(method, layout, q, k, v))


def test_pooled_sums_are_not_taken_in_half_precision():
    # 256 tokens near 300 add up to more than fp16 holds; bf16 sums lose the small part.
    layout, method = line(512), LogLinear(topk=2, levels=1)
    for dtype in (torch.float16, torch.bfloat16):
        x = (300 + torch.randn(1, 1, 512, 16)).to(dtype)
        pooled, _ = method.extend(layout, x, x)
        exact = x[0, 0].double().view(32, 16, 16).mean(1)
        error = (pooled[0, 0, 512:].double() - exact).abs().max()
        assert error <= 300 * torch.finfo(dtype).eps


@pytest.mark.slow
@pytest.mark.parametrize("text_queries", ["dense", "sparse"])
def test_prepared_planning_is_traced_in_one_graph(text_queries):
    layout = Layout.image(9, 10, text=21, text_lengths=[5])
    method = LogLinear(block_size=8, topk=2, text_queries=text_queries)
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
    layout, method = Layout.image(9, 10, text=21, text_lengths=[5]), LogLinear(block_size=8, topk=2)
    q, k, v = leaves(*attention_inputs(1, 2, 111, 32)[:3])
    with torch.inference_mode():
        before = run(method, layout, q, k, v)
    after = run(method, layout, q, k, v)
    grads = torch.autograd.grad(after.sum(), (q, k, v))
    assert torch.equal(before, after) and all(torch.isfinite(g).all() for g in grads)


def test_two_resolutions_with_one_method():
    method = LogLinear(block_size=8, topk=3)
    layouts = [Layout.image(10, 11), Layout.image(12, 9), Layout.image(10, 11)]
    for layout in layouts:
        inputs = attention_inputs(1, 1, layout.num_tokens, 32)[:3]
        torch.testing.assert_close(
            run(method, layout, *inputs),
            run(LogLinear(block_size=8, topk=3), layout, *inputs),
            rtol=0,
            atol=0,
        )


def test_text_lengths_share_one_geometry():
    method = LogLinear(block_size=8, topk=2, text_queries="sparse")
    q, k, _, _ = attention_inputs(1, 1, 111, 32)
    for n in range(1, 22):
        layout = Layout.image(9, 10, text=21, text_lengths=[n])
        method.plan(layout, q, k)
    kinds = [key.split()[0] for key in method._cache]
    assert kinds.count("geometry") == 1 and kinds.count("padding") == 21


def test_several_query_heads_per_key_head():
    method, layout = LogLinear(block_size=8, topk=3), line(111)
    q, *_ = attention_inputs(1, 4, 111, 32)
    _, k, v, _ = attention_inputs(1, 2, 111, 32, seed=1)
    repeated = (x.repeat_interleave(2, 1) for x in (k, v))
    torch.testing.assert_close(
        run(method, layout, q, k, v), run(method, layout, q, *repeated), rtol=0, atol=0
    )


def test_without_enrichment_and_all_blocks_chosen_it_is_dense_attention():
    q, k, v, _ = attention_inputs(1, 2, 390, 32)
    out = run(LogLinear(topk=100, levels=2, enrich=False), line(390), q, k, v)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5)


def test_without_enrichment_it_matches_the_oracle():
    check(LogLinear(block_size=8, topk=2, enrich=False), line(390))


def test_flops_count_summaries_and_density_does_not():
    layout = line(1024)
    q, k, _, _ = attention_inputs(1, 1, 1024, 32)
    plan = LogLinear(topk=2, levels=2).plan(layout, q, k)
    assert plan.density == pytest.approx(2 * 16 / 1024)
    keys = 2 * 16 + 2 * 16 + 4
    assert plan.flops(32) == 4 * 1024 * keys * 32


def test_equal_scores_are_broken_by_place():
    method, layout = LogLinear(block_size=8, topk=3), line(390)
    same = torch.ones(1, 1, 390, 32)
    plan = method.plan(layout, same, same).replace()
    assert bool((plan.to_dense_mask()[0, 0, :, :390].nonzero()[:, 1] < 24).all())


def test_top_indices_is_a_stable_sort():
    x = torch.randint(-3, 4, (50, 40)).float() / 2
    x[0, :5] = torch.tensor([-0.0, 0.0, -torch.inf, torch.inf, -0.0])
    for k in (1, 7, 40, 60):
        expected = x.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(top_indices(x, k), expected.sort(-1).values)


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_broken_inputs_never_point_outside(value):
    layout, method = line(390), LogLinear(block_size=8, topk=3)
    plan = method.plan(layout, *torch.full((2, 1, 1, 390, 32), value))
    assert 0 <= int(plan.kv_indices.min()) <= int(plan.kv_indices.max()) < plan.kv_blocks.count


def test_plan_memory_grows_like_n_log_n():
    method, sizes, entries = LogLinear(levels="auto"), [4096, 65536], []
    for n in sizes:
        q = torch.randn(1, 1, n, 16)
        entries.append(method.plan(line(n), q, q).kv_indices.numel())
    assert math.log(entries[1] / entries[0]) / math.log(sizes[1] / sizes[0]) < 1.2


def test_text_queries_do_not_widen_the_lists():
    layout = Layout.image(64, 64, text=32)
    q = torch.randn(1, 1, layout.num_tokens, 16)
    for rows in ("dense", "sparse"):
        assert LogLinear(text_queries=rows).plan(layout, q, q).kv_indices.shape[-1] < 30


def test_auto_levels_follow_the_paper():
    method = LogLinear(levels="auto")
    expected = {100: 1, 4095: 1, 4096: 2, 65535: 2, 65536: 3}
    assert {n: method.num_levels(line(n)) for n in expected} == expected


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(block_size=4), ("block_size", "8..256", "4")),
        (dict(topk=0), ("topk", "at least 1", "0")),
        (dict(topk=2.5), ("topk", "2.5")),
        (dict(levels=0), ("levels", "auto", "0")),
        (dict(levels="many"), ("levels", "many")),
        (dict(order="spiral"), ("order", "morton", "spiral")),
        (dict(text_queries="none"), ("text_queries", "sparse", "none")),
    ],
)
def test_bad_options_name_value_and_range(options, words):
    with pytest.raises(ValueError) as error:
        LogLinear(**options)
    assert all(word in str(error.value) for word in words)


def test_grid_too_small_for_the_levels():
    x = torch.randn(1, 1, 256, 32)
    words = r"levels=2 .* more than 16\^2 .* has 256.* from 1 to 1"
    for call in (lambda m: m.plan(line(256), x, x), lambda m: m.extend(line(256), x, x)):
        with pytest.raises(ValueError, match=words):
            call(LogLinear(levels=2))


def test_bad_inputs():
    method, x = LogLinear(levels=1), torch.randn(1, 1, 100, 32)
    with pytest.raises(ValueError, match="k is None"):
        method.plan(line(100), x)
    with pytest.raises(ValueError, match=r"q must be \[B, H, 99, D\]"):
        method.plan(line(99), x, x)
    with pytest.raises(ValueError, match="no grid"):
        method.plan(Layout((Context(100),)), x, x)
    padded = Layout.image(8, 10, text=20, text_lengths=[3, 4, 5])
    with pytest.raises(ValueError, match="3 batch rows"):
        method.plan(padded, x, x)


def test_as_a_function():
    q, k, v, _ = attention_inputs(1, 2, 111, 32)
    out = functional.log_linear_attention(q, k, v, block_size=8, topk=3, backend="reference")
    assert torch.equal(out, run(LogLinear(block_size=8, topk=3), line(111), q, k, v))
    layout = Layout.image(9, 10, text=21)
    out = functional.log_linear_attention(
        q, k, v, layout, 8, 3, 2, order="hilbert", text_queries="sparse", backend="reference"
    )
    method = LogLinear(8, 3, 2, "hilbert", text_queries="sparse")
    assert torch.equal(out, run(method, layout, q, k, v))


def test_impossible_levels_are_refused_at_once():
    """Without working out how many tokens they need: 16 to the power of a billion."""
    with pytest.raises(
        ValueError, match=r"needs more than 16\^1000000000 image tokens, this layout has 99; use"
    ):
        LogLinear(levels=10**9).num_levels(Layout.image(9, 11))
