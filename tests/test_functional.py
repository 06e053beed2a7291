"""The plain functions against dense fp64 attention written from the formulas."""

import importlib.util
import math
from functools import partial

import pytest
import torch

from dittfast import functional
from dittfast.layout import Layout
from dittfast.methods import METHODS, Dense, Local, Radial
from dittfast.testing import assert_within_budget, attention_inputs, eager_attention


def _backend(name):
    missing = importlib.util.find_spec(f"dittfast.kernels.{name}") is None
    return pytest.param(name, marks=[pytest.mark.skip(f"no {name} backend yet")] * missing)


BACKENDS = ["reference", _backend("cpu")]


def circle(layout, window):
    """``[N, N]`` bool: ``dy² + dx² < window²`` between image tokens, all else visible."""
    start, (_, height, width) = layout.grid_start, layout.grid.shape
    y, x = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    mask = torch.ones(layout.num_tokens, layout.num_tokens, dtype=torch.bool)
    image = slice(start, start + layout.grid.length)
    mask[image, image] = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 < window**2
    return mask


def equation_4(layout):
    """``[N, N]`` bool: the radial paper's mask of the video with its sink, text visible."""
    start, s = layout.grid_start, layout.grid.tokens_per_frame
    n = layout.grid.length
    frame, place = torch.arange(n) // s, torch.arange(n) % s
    apart = (frame[:, None] - frame).abs()
    band = 2.0 ** torch.floor(torch.log2(apart.clamp_min(1).double()))
    near = (band <= s) & ((place[:, None] - place).abs() + 1 <= s / band)
    same = (apart % torch.ceil(band / s).long() == 0) & (place[:, None] == place)
    mask = torch.ones(layout.num_tokens, layout.num_tokens, dtype=torch.bool)
    mask[start : start + n, start : start + n] = near | same | (frame == 0)
    return mask


def hidden_text(layout, keys):
    """``[batch, 1, keys]``: -inf on padding text; None where there is none."""
    if layout.context_lengths is None:
        return None
    weight = torch.zeros(len(layout.context_lengths), 1, keys, dtype=torch.float64)
    first = 0 if layout.grid_start else layout.grid.length
    for row, (length,) in enumerate(layout.context_lengths):
        weight[row, :, first + length : first + layout.num_context] = -torch.inf
    return weight


def with_summaries(x, layout, weight):
    """x and a weighted sum of every patch, as one product with a matrix of weights."""
    height, width = layout.grid.shape[1:]
    c = weight.shape[0]
    rows = []
    for top in range(0, height, c):
        for left in range(0, width, c):
            h, w = min(c, height - top), min(c, width - left)
            row = torch.nn.functional.pad(
                weight[:h, :w] * (c * c / (h * w)),
                (left, width - left - w, top, height - top - h),
            )
            rows.append(row.flatten())
    image = x[:, :, layout.grid_start : layout.grid_start + layout.grid.length]
    return torch.cat([x, torch.stack(rows).to(x.dtype) @ image], 2)


def run(call, tensors, grad_out):
    """Output and gradients of ``call(*tensors)``."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = call(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad_out)


def compare(function, dense, tensors, grad_out, dtype):
    """``function`` within the error budget that ``dense`` earns in ``dtype``."""
    wide = [x.double() for x in tensors]
    exact = run(dense, wide, grad_out.double())
    eager = run(dense, tensors, grad_out)
    actual = run(function, tensors, grad_out)
    assert actual[0].dtype == dtype
    names = ("out", "dq", "dk", "dv", "d spatial_weight")
    # The gradients of PyTorch's fused CPU attention, which the cpu backend runs, are up to 9 times
    # as wrong as eager attention's: it recomputes the probabilities from the log-sum-exp.
    for name, a, x, e in zip(names, actual, exact, eager):
        assert_within_budget(name, a, x, e, factor=10)


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "layout,window",
    [
        (Layout.image(13, 9, text=11, text_lengths=(11, 4)), 2.5),
        (Layout.image(13, 9, text=11, text_first=False, text_lengths=(1, 7)), 8),
        (Layout.image(23, 11), 8),
        (Layout.image(23, 11, text=20), 1),
        (Layout.image(1, 1, text=3), 8),
        (Layout.image(20, 19, text=10), 100),
    ],
)
def test_local(layout, window, dtype, backend):
    q, k, v, grad = attention_inputs(2, 2, layout.num_tokens, 32, dtype=dtype)
    mask, weight = circle(layout, window), hidden_text(layout, layout.num_tokens)
    compare(
        lambda q, k, v: functional.local_attention(q, k, v, layout, window, backend=backend),
        lambda q, k, v: eager_attention(q, k, v, mask, 32**-0.5, weight),
        (q, k, v),
        grad,
        dtype,
    )


def summaries_case(layout, downsample, dtype, scale=1.0):
    """``(function, dense, tensors, grad_out)`` for down-sampled keys with uneven weights."""
    n = layout.num_tokens
    q, k, v, grad = attention_inputs(2, 2, n, 32, dtype=dtype, scale=scale)
    exact = torch.promote_types(dtype, torch.float32)
    spatial = torch.rand(downsample, downsample, dtype=exact) / downsample**2
    image = torch.ones(n, dtype=torch.bool)
    text = 0 if layout.grid_start else layout.grid.length
    image[text : text + layout.num_context] = False
    extra = -(-layout.grid.height // downsample) * -(-layout.grid.width // downsample)
    mask = torch.cat([circle(layout, 3), image[:, None].expand(-1, extra)], 1)
    weight = hidden_text(layout, n + extra)

    def dense(q, k, v, spatial):
        k, v = (with_summaries(x, layout, spatial) for x in (k, v))
        return eager_attention(q, k, v, mask, 32**-0.5, weight)

    def function(q, k, v, spatial, backend="reference"):
        return functional.local_attention(
            q, k, v, layout, 3, downsample, spatial_weight=spatial, backend=backend
        )

    return function, dense, (q, k, v, spatial), grad


SUMMARY_LAYOUTS = [
    Layout.image(12, 16, text=11, text_lengths=(11, 4)),
    Layout.image(13, 9, text=11, text_first=False, text_lengths=(1, 7)),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("downsample", [2, 4])
@pytest.mark.parametrize("layout", SUMMARY_LAYOUTS)
def test_local_with_summaries(layout, downsample, dtype, backend):
    function, dense, tensors, grad = summaries_case(layout, downsample, dtype)
    compare(partial(function, backend=backend), dense, tensors, grad, dtype)


@pytest.mark.parametrize("scale", [1, 4, 16])
@pytest.mark.parametrize("layout", SUMMARY_LAYOUTS)
def test_local_with_summaries_exactly(layout, scale):
    """In fp64, where no rounding hides a wrong term; 1/3² is no fp32 number."""
    function, dense, tensors, grad = summaries_case(layout, 3, torch.float64, scale)
    for actual, expected in zip(run(function, tensors, grad), run(dense, tensors, grad)):
        # Rounding grows with the logits.
        error, largest = (x.abs().max() for x in (actual - expected, expected))
        assert float(error) < 1e-13 * scale**2 * float(largest)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "layout",
    [
        Layout.video(9, 5, 7, text=13, text_lengths=(13, 2)),
        Layout.video(9, 5, 7, text=13, text_first=True, text_lengths=(1, 5)),
        Layout.video(6, 5, 13),
    ],
)
def test_radial_equation_4(layout, dtype, backend):
    q, k, v, grad = attention_inputs(2, 2, layout.num_tokens, 64, dtype=dtype)
    mask, weight = equation_4(layout), hidden_text(layout, layout.num_tokens)
    assert not mask.all()
    compare(
        lambda q, k, v: functional.radial_attention(
            q, k, v, layout, block_size=32, variant="paper", backend=backend
        ),
        lambda q, k, v: eager_attention(q, k, v, mask, 64**-0.5, weight),
        (q, k, v),
        grad,
        dtype,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", ["wan", "hunyuan"])
def test_radial_block_mask(variant, backend):
    """Lists hold whole blocks, so the block mask says which tokens attend; text mid-block."""
    layout = Layout.video(12, 5, 10, text=13, text_lengths=(13, 2))
    n = layout.num_tokens
    mask = Radial(1.0, 16, variant).plan(layout).to_block_mask()[0, 0]
    assert not mask.all()
    mask = mask.repeat_interleave(16, 0).repeat_interleave(16, 1)[:n, :n]
    q, k, v, grad = attention_inputs(2, 2, n, 32)
    weight = hidden_text(layout, n)
    compare(
        lambda q, k, v: functional.radial_attention(
            q, k, v, layout, 1.0, 16, variant, backend=backend
        ),
        lambda q, k, v: eager_attention(q, k, v, mask, 32**-0.5, weight),
        (q, k, v),
        grad,
        torch.float32,
    )


@pytest.mark.parametrize("call", [functional.local_attention, functional.radial_attention])
def test_lse_and_scale(call):
    layout = Layout.image(6, 7, text=3)
    q, k, v, _ = attention_inputs(1, 2, layout.num_tokens, 16, dtype=torch.float64)
    out, lse = call(q, k, v, layout, scale=0.5, return_lse=True, backend="reference")
    if call is functional.radial_attention:  # one frame is dense
        torch.testing.assert_close(lse, torch.logsumexp(0.5 * q @ k.mT, -1))
    else:
        logits = (0.5 * q @ k.mT).masked_fill(~circle(layout, 8), -torch.inf)
        torch.testing.assert_close(lse, torch.logsumexp(logits, -1))
    assert out.shape == q.shape


def test_proportional_scale_reaches_the_logits():
    layout = Layout.image(6, 7, text=3)
    q, k, v, _ = attention_inputs(1, 2, layout.num_tokens, 16, dtype=torch.float64)
    factor = Local(8, proportional=True).scale(layout, 16)
    assert factor != 16**-0.5
    actual = functional.local_attention(q, k, v, layout, proportional=True, backend="reference")
    expected = eager_attention(q, k, v, circle(layout, 8), factor)
    torch.testing.assert_close(actual, expected)
    # A model's own scale keeps its meaning: the factor by which tokens outgrew training is applied.
    actual = functional.local_attention(
        q, k, v, layout, proportional=True, scale=0.1, backend="reference"
    )
    growth = math.sqrt(math.log(layout.num_tokens) / math.log(4096 + 512))
    expected = eager_attention(q, k, v, circle(layout, 8), 0.1 * growth)
    torch.testing.assert_close(actual, expected)


def test_grouped_query_heads():
    layout = Layout.image(6, 8, text=3)
    q, *_ = attention_inputs(1, 4, layout.num_tokens, 16, dtype=torch.float64)
    _, k, v, _ = attention_inputs(1, 2, layout.num_tokens, 16, dtype=torch.float64, seed=1)
    actual = functional.local_attention(q, k, v, layout, 3, 2, backend="reference")
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    expected = functional.local_attention(q, k, v, layout, 3, 2, backend="reference")
    torch.testing.assert_close(actual, expected)


def test_dense_is_dense():
    layout = Layout.video(3, 4, 5, text=7, text_lengths=(7, 2))
    plan = Dense(block_size=16).plan(layout)
    assert plan.density == 1 and plan.to_dense_mask().all()
    assert torch.isneginf(plan.kv_log_weight[1, 0, 62:]).all()
    assert METHODS["dense"] is Dense and not Dense.needs_grid
    with pytest.raises(ValueError, match=r"block_size.*1\.\.256; got 0"):
        Dense(block_size=0)


@pytest.mark.parametrize("call", [functional.local_attention, functional.radial_attention])
def test_wrong_lengths_are_named(call):
    layout = Layout.image(6, 7, text=3)
    tokens_before_heads = torch.randn(1, 45, 2, 16)
    with pytest.raises(ValueError, match=r"45 tokens, got q with 2 .*\[B, H, N, D\]"):
        call(*[tokens_before_heads] * 3, layout, backend="reference")
    x = torch.randn(1, 2, 45, 16)
    with pytest.raises(ValueError, match="45 tokens, got q with 45 and k with 44"):
        call(x, x[:, :, :44], x[:, :, :44], layout, backend="reference")
    with pytest.raises(ValueError, match="batch"):
        padded = layout.with_text_lengths((1, 2, 3))
        call(*[torch.randn(2, 2, 45, 16)] * 3, padded, backend="reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_soft_pag_is_the_map_leant_to_identity(dtype):
    """``((1 - u) A + u I) v`` from A v, with gradients, against whole maps in fp64."""
    q, k, v = torch.randn(3, 2, 3, 111, 32).to(dtype).double()
    layout = Layout.image(9, 11, text=12)
    strength = torch.tensor([0.0, 0.35, 1.0])
    attention = torch.softmax(q @ k.mT * 32**-0.5, -1)
    u = strength.double().view(1, 3, 1, 1).repeat(1, 1, 111, 1)
    u[:, :, :12] = 0  # text rows are left alone
    identity = torch.eye(111, dtype=torch.float64)
    v = v.requires_grad_()
    expected = ((1 - u) * attention + u * identity) @ v
    ours = v.detach().to(dtype).requires_grad_()
    out = functional.soft_pag((attention @ ours.double()).to(dtype), ours, strength, rows=layout)
    assert out.dtype == dtype
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (out.double() * weight).sum().backward()
    bound = 8 * torch.finfo(dtype).eps
    with torch.no_grad():
        assert float((out - expected).abs().max()) <= bound * float(v.abs().max())
    assert float((ours.grad - v.grad).abs().max()) <= bound * float(v.grad.abs().max())


def test_soft_pag_takes_its_strength_in_double_precision():
    out, v = torch.randn(2, 1, 2, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(
        functional.soft_pag(out, v, 0.3), 0.7 * out + 0.3 * v, rtol=1e-14, atol=1e-14
    )


def test_every_method_is_a_documented_function():
    assert set(functional.__all__) == {
        "radial_attention", "local_attention", "log_linear_attention", "rectified_attention",
        "agent_attention", "linear_attention", "neighborhood_attention", "topk_attention",
        "sla_attention", "soft_pag", "sol_attention",
        "video_sparse_attention", "reattention", "mixture_of_heads_attention",
    }  # fmt: skip
    for name in functional.__all__:
        text = getattr(functional, name).__doc__
        assert all(part in text for part in ("arXiv", "Args:", "Returns:", "Raises:")), name
