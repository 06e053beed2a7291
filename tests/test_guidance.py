"""Head-perturbation guidance against its formulas, written with whole attention maps."""

import pytest
import tiny
import torch
from dittfast.pipelines.guidance import guide, unguide
from patterns import Band

import dittfast
from dittfast import Layout
from dittfast.methods.head_guidance import HeadGuidance, soft_pag

SDPA = torch.nn.functional.scaled_dot_product_attention


def weakened_map(attention, text, strengths, rows):
    """``A'`` of every head, ``[B, H, N, N]``, from A; text tokens come first."""
    n = attention.shape[-1]
    eye = torch.eye(n, dtype=attention.dtype)
    if rows == "diagonal":
        allowed = torch.ones(n, n, dtype=torch.bool)
        allowed[text:, text:] = torch.eye(n - text, dtype=torch.bool)
        weak = attention * allowed
        weak = weak / weak.sum(-1, keepdim=True)
    else:
        weak = eye.expand_as(attention).clone()
        if rows == "image":
            weak[..., :text, :] = attention[..., :text, :]
    u = strengths.view(1, -1, 1, 1)
    return (1 - u) * attention + u * weak


class MapAttention(torch.overrides.TorchFunctionMode):
    """Self-attention of the tiny transformers with whole maps, kept by ``mask`` if there is one.

    ``strengths`` weakens heads by the number of the attention call.
    """

    def __init__(self, strengths, text, rows, mask=None):
        super().__init__()
        self.strengths, self.text, self.rows, self.mask = strengths, text, rows, mask
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not SDPA:
            return func(*args, **kwargs)
        call = {**dict(zip(("query", "key", "value"), args)), **kwargs}
        q, k, v = call["query"], call["key"], call["value"]
        # Text encoders and cross-attention pass by.
        if q.shape[-1] != 16 or q.shape[-2] != k.shape[-2]:
            return func(*args, **kwargs)
        logits = q @ k.mT * q.shape[-1] ** -0.5
        if self.mask is not None:
            logits = logits.masked_fill(~self.mask, -torch.inf)
        attention = torch.softmax(logits, -1)
        if self.calls in self.strengths:
            attention = weakened_map(attention, self.text, self.strengths[self.calls], self.rows)
        self.calls += 1
        return attention @ v


def plain(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


HEADS = ((0, 1), (2, 0), (-1, 1))
STRENGTHS = {0: torch.tensor([0.0, 0.7]), 2: torch.tensor([0.4, 0.0]), 3: torch.tensor([0.0, 1.0])}


@pytest.mark.parametrize("rows", ["image", "joint", "diagonal"])
def test_formula_on_flux(rows):
    model, inputs = tiny.flux_transformer(), tiny.flux_inputs()
    cond = plain(model, inputs)
    with MapAttention(STRENGTHS, text=5, rows=rows):
        weak = plain(model, inputs)
    expected = cond + 2.5 * (cond - weak)
    with guide(model, heads=HEADS, guidance_scale=2.5, strength=(0.7, 0.4, 1.0), rows=rows):
        guided = plain(model, inputs)
    torch.testing.assert_close(guided, expected, rtol=0, atol=1e-4)
    assert float((guided - cond).abs().max()) > 1e-2
    assert torch.equal(plain(model, inputs), cond)


def test_formula_on_wan_where_all_tokens_are_image():
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    cond = plain(model, inputs)
    with MapAttention({1: torch.tensor([1.0, 0.0])}, text=0, rows="joint"):
        weak = plain(model, inputs)
    for rows in ("image", "joint"):
        with guide(model, heads=[("blocks.1.attn1", 0)], rows=rows):
            torch.testing.assert_close(
                plain(model, inputs), cond + 3 * (cond - weak), rtol=0, atol=1e-4
            )


def record_predictions(pipe, **call):
    """Per forward pass: (name of the cache context or None, prediction)."""
    seen = []
    model = pipe.transformer
    handle = model.register_forward_hook(lambda m, a, out: seen.append(out[0].clone()))
    latents = tiny.run(pipe, **call)
    handle.remove()
    return seen, latents


def test_classifier_free_guidance_in_two_calls():
    """One Wan step: the sampler must see u + g (c - u) + w (c - p)."""
    pipe = tiny.wan_pipeline()
    (cond, uncond), _ = record_predictions(pipe, num_inference_steps=1)
    with MapAttention({0: torch.tensor([1.0, 1.0])}, text=0, rows="joint"):
        (weak, _), _ = record_predictions(pipe, num_inference_steps=1)
    g, w = 3.0, 2.0
    wanted = uncond + g * (cond - uncond) + w * (cond - weak)
    seen = {}
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda noise, *args, **kwargs: (
        seen.setdefault("noise", noise.clone()), step(noise, *args, **kwargs)
    )[1]  # fmt: skip
    with guide(pipe, heads=[(0, 0), (0, 1)], guidance_scale=w):
        tiny.run(pipe, num_inference_steps=1)
    del pipe.scheduler.step
    torch.testing.assert_close(seen["noise"], wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("make", [tiny.flux_pipeline, tiny.wan_pipeline], ids=["flux", "wan"])
def test_zero_scale_and_zero_strength_change_nothing(make):
    pipe = make()
    stock = tiny.run(pipe)
    with guide(pipe, heads=[(0, 0)], guidance_scale=0.0):
        assert torch.equal(tiny.run(pipe), stock)
    with guide(pipe, heads=[(0, 0)], strength=0.0):
        assert torch.equal(tiny.run(pipe), stock)
    with guide(pipe, heads=[(0, 0)]):
        assert not torch.equal(tiny.run(pipe), stock)
    assert torch.equal(tiny.run(pipe), stock)


def count_passes(pipe, **call):
    passes = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: passes.append(1))
    tiny.run(pipe, **call)
    handle.remove()
    return len(passes)


def test_step_range_costs_one_pass_a_guided_step():
    pipe = tiny.flux_pipeline()
    with guide(pipe, heads=[(0, 0)], start_step=1, stop_step=3):
        assert count_passes(pipe, num_inference_steps=5) == 5 + 2
    pipe = tiny.wan_pipeline()
    with guide(pipe, heads=[(0, 0)], start_step=3):
        assert count_passes(pipe, num_inference_steps=4) == 2 * 4 + 1


def test_composes_with_a_sparse_method():
    """The weakened pass leans away from the *sparse* output, in the sparse model."""
    model, inputs = tiny.flux_transformer(), tiny.flux_inputs()
    layout = Layout.image(9, 7, text=5)
    mask = Band().plan(layout).to_dense_mask()

    with MapAttention({}, 5, "joint", mask):
        cond = plain(model, inputs)
    with MapAttention({1: torch.tensor([1.0, 0.0])}, 5, "joint", mask):
        weak = plain(model, inputs)
    with dittfast.enable(model, Band(), backend="reference"):
        with guide(model, heads=[(1, 0)], guidance_scale=2.0, rows="joint"):
            guided = plain(model, inputs)
            assert "1 weakened heads" in str(dittfast.describe(model))
        torch.testing.assert_close(plain(model, inputs), cond, rtol=0, atol=1e-4)
    torch.testing.assert_close(guided, cond + 2 * (cond - weak), rtol=0, atol=1e-4)


def test_an_attention_backend_that_bypasses_sdpa():
    """flex never calls SDPA: the weakened pass runs natively, the others keep the backend."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    model, inputs = tiny.flux_transformer(), tiny.flux_inputs()
    with guide(model, heads=HEADS):
        expected = plain(model, inputs)
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.attn.processor._attention_backend = AttentionBackendName.FLEX
    with guide(model, heads=HEADS):
        torch.testing.assert_close(plain(model, inputs), expected, rtol=0, atol=1e-4)
    processor = model.transformer_blocks[0].attn.processor
    assert processor._attention_backend is AttentionBackendName.FLEX


def test_soft_pag_function():
    out, v = torch.randn(2, 2, 3, 9, 4, dtype=torch.float64)
    layout = Layout.image(2, 3, text=3, text_first=False)
    mixed = soft_pag(out, v, 0.25, heads=[0, 2], rows=layout)
    expected = out.clone()
    for head in (0, 2):
        expected[:, head, :6] = 0.75 * out[:, head, :6] + 0.25 * v[:, head, :6]
    torch.testing.assert_close(mixed, expected)
    strengths = torch.tensor([0.0, 0.5, 1.0])
    by_head = soft_pag(out, v, strengths)
    torch.testing.assert_close(by_head[:, 1], (out[:, 1] + v[:, 1]) / 2)
    assert torch.equal(by_head[:, 0], out[:, 0]) and torch.equal(by_head[:, 2], v[:, 2])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(heads=[]), "empty"),
        (dict(heads=[(0, 0), (0, 0)]), "twice"),
        (dict(heads=[(0, 0)], strength=1.5), r"1\.5"),
        (dict(heads=[(0, 0)], strength=(0.5, 0.5)), "2 strengths for 1 heads"),
        (dict(heads=[(0, 0)], rows="images"), "'image'"),
        (dict(heads=[(0, 0)], start_step=-1), "-1"),
        (dict(heads=[(0, 0)], start_step=4, stop_step=2), "stop_step"),
        (dict(heads=[(9, 0)]), r"layer 9 does not exist.*0\.\.3"),
        (dict(heads=[("blocks.0", 0)]), "blocks.0"),
        (dict(heads=[(0, 2)]), r"head 2 of .* does not exist.*0\.\.1"),
    ],
)
def test_bad_input_leaves_the_pipeline_plain(options, message):
    model = tiny.flux_transformer()
    with pytest.raises(ValueError, match=message):
        guide(model, **options)
    with pytest.raises(ValueError, match="not guided"):
        unguide(model)
    with pytest.raises(ValueError, match="not enabled"):
        dittfast.disable(model)


def test_guiding_twice():
    model = tiny.flux_transformer()
    guide(model, HeadGuidance(heads=((0, 0),)))
    with pytest.raises(ValueError, match="guided already"):
        guide(model, heads=[(0, 1)])
    unguide(model)
