"""Head-perturbation guidance against its formulas, written with whole attention maps."""

import pytest
import tiny
import torch
from caches import run_of_stock
from patterns import Band

import dittfast
from dittfast import Layout
from dittfast.methods.head_guidance import HeadGuidance, soft_pag
from dittfast.pipelines import layer
from dittfast.pipelines.guidance.plain import guide, unguide

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
        for _ in range(2):  # generations
            assert count_passes(pipe, num_inference_steps=5) == 5 + 2
    pipe = tiny.wan_pipeline()
    with guide(pipe, heads=[(0, 0)], start_step=3):
        for _ in range(2):
            assert count_passes(pipe, num_inference_steps=4) == 2 * 4 + 1


class SkipsOddSteps:
    """A cache that does not call the transformer at every second step, as TeaCache does."""

    def __init__(self, pipe):
        self._pipe, self._model, self._kept = pipe, pipe.transformer, None

    def __getattr__(self, name):
        return getattr(self._model, name)

    def __call__(self, *args, **kwargs):
        if (self._pipe.scheduler.step_index or 0) % 2 == 0:
            self._kept = self._model(*args, **kwargs)
        return self._kept


def test_steps_under_a_cache_that_skips_calls():
    """Dense steps and guided steps are scheduler steps, not calls, in every generation."""
    pipe = tiny.flux_pipeline()
    model, sparse = pipe.transformer, []
    handle = model.register_forward_pre_hook(
        lambda *_: sparse.append(
            model._dittfast.layers["transformer_blocks.0.attn"].core is not None
        )
    )
    with (
        dittfast.enable(pipe, Band(), backend="reference", dense_first_steps=3),
        guide(pipe, heads=[(0, 0)], start_step=3, stop_step=6),
    ):
        pipe.__dict__["transformer"] = SkipsOddSteps(pipe)
        for _ in range(2):
            sparse.clear()
            tiny.run(pipe, num_inference_steps=7)
            # Steps 0, 2, 4 (and once more, weakened) and 6.
            assert sparse == [False, False, True, True, True]
        pipe.__dict__["transformer"] = model
    handle.remove()


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


METHODS = {
    "radial": dict(block_size=8, decay_factor=0.2),
    "local": dict(window=2, tile=(1, 4, 4)),
    "log_linear": dict(block_size=8, topk=2, levels=1),
    "rectified": dict(block_size=8, topk=1, top_p=0.0, neighbors=False),
    "linear": dict(hidden=3),
}


@pytest.mark.parametrize("rows", ["image", "joint", "diagonal"])
@pytest.mark.parametrize("method", METHODS)
def test_every_sparse_method_is_weakened_as_it_runs(method, rows, monkeypatch):
    """``(1 - u) O + u V`` of the method's own output O, in the layer asked for and nowhere else."""
    model, inputs = tiny.flux_transformer(), tiny.flux_inputs()
    attention, calls, text = layer.method_attention, [], 5

    def weakened(method, layout, q, k, v, **options):
        out = attention(method, layout, q, k, v, **options)
        calls.append(1)
        if len(calls) != 2:  # the second layer
            return out
        weak = v.clone()
        if rows == "image":
            weak[:, :, :text] = out[:, :, :text]
        if rows == "diagonal":
            allowed = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
            allowed[text:, text:] = torch.eye(q.shape[2] - text, dtype=torch.bool)
            weak = SDPA(q, k, v, attn_mask=allowed)
            weak[:, :, :text] = out[:, :, :text]
        mixed = out.clone()
        mixed[:, 1] = 0.3 * out[:, 1] + 0.7 * weak[:, 1]
        return mixed

    with dittfast.enable(model, method, min_tokens=0, backend="reference", **METHODS[method]):
        cond = plain(model, inputs)
        with guide(model, heads=[(1, 1)], guidance_scale=2.0, strength=0.7, rows=rows):
            guided = plain(model, inputs)
        monkeypatch.setattr(layer, "method_attention", weakened)
        weak = plain(model, inputs)
        monkeypatch.undo()
    assert len(calls) == 4
    torch.testing.assert_close(guided, cond + 2 * (cond - weak), rtol=0, atol=1e-4)
    assert float((guided - cond).abs().max()) > 1e-2


class BatchedPipeline:
    """A pipeline that runs [uncond, cond] in one batch of two, as SD3's does."""

    do_classifier_free_guidance = True

    def __init__(self, transformer, steps=4):
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.components = {"transformer": transformer}
        self.transformer, self.steps = transformer, steps
        self.scheduler = FlowMatchEulerDiscreteScheduler()

    def __call__(self, inputs, scale=3.0):
        """The prediction that each step hands to the scheduler."""
        self.scheduler.set_timesteps(self.steps)
        latents, seen = inputs["hidden_states"][:1], []
        for t in self.scheduler.timesteps:
            call = inputs | {"hidden_states": torch.cat([latents, latents])}
            with torch.no_grad():
                u, c = self.transformer(**call | {"timestep": t.expand(2) / 1000})[0].chunk(2)
            seen.append(u + scale * (c - u))
            latents = self.scheduler.step(seen[-1], t, latents, return_dict=False)[0]
        return seen


def test_batched_guidance_weakens_the_conditional_half_only():
    """u + g (c - u) + w (c - p) at guided steps, over two generations."""
    model, inputs = tiny.flux_transformer(), tiny.flux_inputs()
    pipe = BatchedPipeline(model)
    start = torch.cat([inputs["hidden_states"][:1]] * 2)
    first = inputs | {"hidden_states": start, "timestep": torch.full((2,), 1.0)}
    u, c = plain(model, first).chunk(2)
    with MapAttention(STRENGTHS, text=5, rows="image"):
        _, weak = plain(model, first).chunk(2)
    options = dict(heads=HEADS, strength=(0.7, 0.4, 1.0), guidance_scale=2.0)
    passes = []
    handle = model.register_forward_pre_hook(lambda *_: passes.append(1))
    with guide(pipe, **options):
        for _ in range(2):
            seen = pipe(inputs)
            torch.testing.assert_close(
                seen[0], u + 3 * (c - u) + 2 * (c - weak), rtol=0, atol=1e-4
            )  # fmt: skip
    assert len(passes) == 2 * 2 * pipe.steps
    passes.clear()
    unguided = pipe(inputs)
    with guide(pipe, start_step=2, stop_step=3, **options):
        for _ in range(2):
            late = pipe(inputs)
            same = [torch.equal(a, b) for a, b in zip(late, unguided)]
            assert same == [True, True, False, False]
    assert len(passes) == pipe.steps + 2 * (pipe.steps + 1)
    handle.remove()


def test_rows_that_differ_in_layout():
    """The weakened pass of a batch has the conditional rows' layout."""
    from dittfast.pipelines.families.sequences import Sequences

    both = (Layout.image(9, 7, text=5), Layout.image(4, 17))  # uncond, cond: 68 tokens each
    read = lambda model, call: Sequences((both[-call["hidden_states"].shape[0] :],))  # noqa: E731
    model, inputs = tiny.flux_transformer(), tiny.flux_inputs()
    pipe = BatchedPipeline(model, steps=1)
    start = torch.cat([inputs["hidden_states"][:1]] * 2)
    first = inputs | {"hidden_states": start, "timestep": torch.full((2,), 1.0)}
    u, c = plain(model, first).chunk(2)
    with MapAttention({0: torch.tensor([1.0, 0.0])}, text=0, rows="image"):
        _, weak = plain(model, first).chunk(2)
    with dittfast.enable(pipe, "dense", layout=read), guide(pipe, heads=[(0, 0)]):
        (seen,) = pipe(inputs)
        torch.testing.assert_close(seen, u + 3 * (c - u) + 3 * (c - weak), rtol=0, atol=1e-4)


def test_two_calls_without_a_cache_context():
    """FLUX image-to-image names no call "uncond"; its second call gets the difference of the first.

    The sampler must see u + g (c - u) + w (c - p), as in text-to-image.
    """
    from diffusers import FluxImg2ImgPipeline

    pipe = FluxImg2ImgPipeline(**tiny.flux_pipeline().components)
    pipe.set_progress_bar_config(disable=True)
    call = dict(
        prompt="a red cat", negative_prompt="a dog", true_cfg_scale=3.0, height=64, width=96,
        image=torch.rand(1, 3, 64, 96), strength=0.5, max_sequence_length=12, output_type="latent",
    )  # fmt: skip

    def predictions(steps=2):
        seen = []
        handle = pipe.transformer.register_forward_hook(lambda m, a, out: seen.append(out[0]))
        pipe(**call, num_inference_steps=steps, generator=torch.Generator().manual_seed(0))
        handle.remove()
        return seen

    cond, uncond = predictions()
    with MapAttention({0: torch.tensor([1.0, 0.0])}, text=12, rows="image"):
        weak, _ = predictions()
    step, seen = pipe.scheduler.step, []
    pipe.scheduler.step = lambda noise, *args, **kwargs: (
        seen.append(noise.clone()), step(noise, *args, **kwargs)
    )[1]  # fmt: skip
    with guide(pipe, heads=[(0, 0)], guidance_scale=2.0):
        assert len(predictions()) == 3
        assert len(predictions(steps=6)) == 3 * 3
    del pipe.scheduler.step
    wanted = uncond + 3 * (cond - uncond) + 2 * (cond - weak)
    torch.testing.assert_close(seen[0], wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("make", [tiny.flux_pipeline, tiny.wan_pipeline], ids=["flux", "wan"])
def test_the_weakened_pass_has_a_block_cache_of_its_own(make):
    """First-block caching keeps the weakened pass apart; where it never skips, nothing changes."""
    from diffusers import FirstBlockCacheConfig

    pipe = make()
    model = pipe.transformer
    with guide(pipe, heads=[(0, 0)]):
        expected = tiny.run(pipe)
    model.enable_cache(FirstBlockCacheConfig(threshold=-1.0))
    run_of_stock(pipe)
    with guide(pipe, heads=[(0, 0)]):
        torch.testing.assert_close(tiny.run(pipe), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(tiny.run(pipe), expected, rtol=0, atol=1e-4)
    model.disable_cache()
    ran = []
    blocks = [m for n, m in model.named_modules() if n.endswith(("attn", "attn1"))]
    model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    handle = blocks[-1].register_forward_pre_hook(lambda *_: ran.append(1))
    with guide(pipe, heads=[(0, 0)], start_step=2):
        skipping = tiny.run(pipe, num_inference_steps=5)
        two_calls = 2 if type(pipe).__name__ == "WanPipeline" else 1
        # Each kind of pass computes its later blocks once, then reuses them.
        assert len(ran) == two_calls + 1
        assert torch.equal(tiny.run(pipe, num_inference_steps=5), skipping)
    handle.remove()
    model.disable_cache()


@pytest.mark.parametrize("backend", ["flex", "_native_math"])
def test_every_attention_backend(backend):
    """flex never calls SDPA: the weakened pass runs natively, the others keep the backend."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    model, inputs = tiny.flux_transformer(), tiny.flux_inputs()
    with guide(model, heads=HEADS):
        expected = plain(model, inputs)
    backend = AttentionBackendName(backend)
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.attn.processor._attention_backend = backend
    with guide(model, heads=HEADS):
        torch.testing.assert_close(plain(model, inputs), expected, rtol=0, atol=1e-4)
    processor = model.transformer_blocks[0].attn.processor
    assert processor._attention_backend is backend


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
