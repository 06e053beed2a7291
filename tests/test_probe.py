"""Captured q, k and v are the model's own; mass, density and error are those of the formula."""

from __future__ import annotations

import pytest
import tiny
import torch
import torch.nn.functional as F

import dittfast
from dittfast import Layout
from dittfast.attention import method_attention, method_call
from dittfast.methods import VSA, Local, LogLinear, Reattention, Rectified
from dittfast.pipelines.measure import probe

CALL = {
    "prompt": "a red cat", "height": 64, "width": 96, "num_inference_steps": 2,
    "max_sequence_length": 12,
}  # fmt: skip


@pytest.fixture(scope="module")
def captured():
    pipe = tiny.flux_pipeline()
    before = type(pipe.transformer)
    found = probe.capture(pipe, CALL, steps=[0, 1], layers=[0, -1])
    assert type(pipe.transformer) is before
    return found


def test_captures_the_steps_and_layers_asked_for(captured):
    assert [(c.step, c.layer) for c in captured] == [
        (step, name)
        for step in (0, 1)
        for name in ("transformer_blocks.0.attn", "single_transformer_blocks.1.attn")
    ]
    for c in captured:
        assert c.q.shape[2] == c.layout.num_tokens
        assert c.scale == pytest.approx(c.q.shape[-1] ** -0.5)
    assert not torch.equal(captured[0].q, captured[2].q)  # another step, another latent


def test_captured_tensors_give_the_layers_own_output():
    pipe = tiny.flux_pipeline()
    layer = pipe.transformer.transformer_blocks[0].attn
    seen = []
    stock = F.scaled_dot_product_attention

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is stock:
                seen.append(out)
            return out

    def before(*_):
        layer.watch = Watch()
        layer.watch.__enter__()

    hooks = [
        layer.register_forward_pre_hook(before),
        layer.register_forward_hook(lambda *_: layer.watch.__exit__(None, None, None)),
    ]
    found = probe.capture(pipe, CALL, steps=[1], layers=[0])
    for hook in hooks:
        hook.remove()
    (c,) = found
    out = stock(c.q, c.k, c.v)
    torch.testing.assert_close(out, seen[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [VSA(topk=3, cube=(1, 4, 4)), Reattention(0.2)])
def test_draws_the_planner_of_a_method_that_computes(captured, method):
    c = captured[0]
    plan = method_call(method.planner, c.layout, c.q, c.k, c.v).plan
    report, planned = probe.measure(method, c), probe.measure(method.planner, c)
    for head, same in zip(report.heads, planned.heads):
        assert (head.density, head.mass) == (same.density, same.mass)
        assert head.work == method.amount(c.layout, 2, 16).work
    dense = F.scaled_dot_product_attention(c.q, c.k, c.v)
    assert torch.equal(report.plan.to_block_mask(), plan.to_block_mask())
    if method.remembers:  # a refresh
        assert max(head.error for head in report.heads) < 1e-5
    else:
        expected = method_attention(method, c.layout, c.q, c.k, c.v)
        grid = c.layout.coordinates()[:, 0] >= 0
        error = (expected - dense)[0, 0, grid].norm() / dense[0, 0, grid].norm()
        assert report.heads[0].error == pytest.approx(float(error), rel=1e-4)
    assert probe.kept_picture([report]).size == probe.kept_picture([planned]).size


@pytest.mark.parametrize(
    "method", [Local(window=2), LogLinear(block_size=8, topk=1), Rectified(block_size=8, topk=2)]
)
def test_measures_what_the_formula_says(captured, method):
    c = captured[0]
    report = probe.measure(method, c)
    plan = report.plan
    n = c.layout.num_tokens
    shares = torch.softmax(c.q.double() @ c.k.double().transpose(-1, -2) * c.scale, -1)
    mask = plan.to_dense_mask()[..., :n].expand_as(shares)
    grid = torch.from_numpy(c.layout.coordinates()[:, 0] >= 0)
    mass = (shares * mask).sum(-1)[..., grid].mean((0, 2))
    density = mask.double().mean((0, 2, 3))
    assert [h.mass for h in report.heads] == pytest.approx(mass.tolist())
    assert [h.density for h in report.heads] == pytest.approx(density.tolist())
    assert min(h.error for h in report.heads) > 0 and max(h.error for h in report.heads) < 2
    per_row = report.block_mass.sum(-1)
    torch.testing.assert_close(per_row, torch.ones_like(per_row))
    # The mass of a block pair, by the dense matrix.
    rows = probe._block_of(plan.q_blocks, n) == 1
    columns = probe._block_of(plan.kv_blocks, n) == 2
    expected = shares[0][:, rows][:, :, columns].sum(-1).mean(-1)
    torch.testing.assert_close(report.block_mass[:, 1, 2], expected)


def test_dense_keeps_everything(captured):
    report = probe.measure(Local(window=100), captured[1])
    for head in report.heads:
        assert head.density == pytest.approx(1) and head.mass == pytest.approx(1)
        assert head.error < 1e-5


def test_refuses_steps_and_layers_that_do_not_exist():
    pipe = tiny.flux_pipeline()
    with pytest.raises(ValueError, match=r"steps must lie in 0\.\.1 .* got 2"):
        probe.capture(pipe, CALL, steps=[2])
    with pytest.raises(ValueError, match=r"layers must lie in 0\.\.3 .* got 4"):
        probe.capture(pipe, CALL, layers=[4])
    with pytest.raises(ValueError, match="not enabled"):
        dittfast.disable(pipe)


def test_dynamic_density_is_the_mean_over_calls():
    pipe = tiny.flux_pipeline()
    method = Rectified(block_size=8, topk=1, top_p=0.1, neighbors=False)
    seen = []
    with dittfast.enable(pipe, method, min_tokens=0) as enabled:
        assert enabled.describe().density is None
        pipe(**CALL, output_type="latent")
        parts = pipe.transformer._dittfast.parts
        part = parts.peek(next(iter(parts)))
        q = torch.randn(1, 2, part.num_tokens, 16)
        plan = method.plan(part.layout, q, q, q)
        before = enabled.describe().density
        calls = part.calls
        assert calls == 2 * 4  # steps x layers
        part.observe(plan)
        assert enabled.describe().density == pytest.approx(
            (before * calls + plan.density) / (calls + 1)
        )
        seen.append(str(enabled.describe()))
    assert "mean over calls" in seen[0] and 0 < before < 1


def test_listed_density_is_density():
    layout = Layout.image(9, 13, text=9, text_lengths=(4, 9))
    q, k, v = (torch.randn(2, 2, layout.num_tokens, 16) for _ in range(3))
    for method in (LogLinear(block_size=8, topk=1), Rectified(block_size=8, topk=1)):
        plan = method.plan(layout, q, k, v)
        assert float(plan.listed_density()) == pytest.approx(plan.density)
