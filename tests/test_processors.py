"""set_attn_processor with dittfast's processors, against enable and against stock."""

import copy

import pytest
import tiny
import torch

import dittfast
from dittfast import Layout
from dittfast.pipelines.families import rotary
from dittfast.pipelines.guidance.plain import guide
from dittfast.pipelines.processors import (
    HeadGuidanceAttnProcessor,
    LocalAttnProcessor,
    LogLinearAttnProcessor,
    NeighborhoodAttnProcessor,
    RadialAttnProcessor,
    RectifiedAttnProcessor,
    SolAttnProcessor,
    TopKAttnProcessor,
    VSAAttnProcessor,
)

CASES = {
    "flux-local": (tiny.flux_pipeline, LocalAttnProcessor, "local", dict(window=3)),
    "flux-radial": (tiny.flux_pipeline, RadialAttnProcessor, "radial", dict(block_size=16)),
    "wan-local": (tiny.wan_pipeline, LocalAttnProcessor, "local", dict(window=2)),
    "wan-radial": (tiny.wan_pipeline, RadialAttnProcessor, "radial", dict(block_size=4)),
    "flux-neighborhood": (
        tiny.flux_pipeline,
        NeighborhoodAttnProcessor,
        "neighborhood",
        dict(window=(3, 4), stride=(1, 2)),
    ),
    "flux-topk": (
        tiny.flux_pipeline,
        TopKAttnProcessor,
        "topk",
        dict(block_size=8, topk=(1, 2), topp=0.3),
    ),
    "flux-log_linear": (
        tiny.flux_pipeline,
        LogLinearAttnProcessor,
        "log_linear",
        dict(block_size=8, topk=2, levels=1),
    ),
    "wan-sol": (tiny.wan_pipeline, SolAttnProcessor, "sol", dict(block_size=8, tail="query")),
    "wan-vsa": (tiny.wan_pipeline, VSAAttnProcessor, "vsa", dict(topk=(1, 2), cube=(1, 2, 3))),
    "wan-rectified": (
        tiny.wan_pipeline,
        RectifiedAttnProcessor,
        "rectified",
        dict(block_size=8, topk=1, top_p=0.0, neighbors=False),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_enable(case):
    make, processor, name, options = CASES[case]
    pipe = make()
    stock = tiny.run(pipe)
    with dittfast.enable(pipe, name, min_tokens=0, **options):
        expected = tiny.run(pipe)
    before = pipe.transformer.attn_processors
    pipe.transformer.set_attn_processor(processor(**options))
    assert torch.equal(tiny.run(pipe), expected)
    size = dict(height=96, width=64)
    resized = tiny.run(pipe, **size)
    pipe.transformer.set_attn_processor(dict(before))
    assert torch.equal(tiny.run(pipe), stock)
    with dittfast.enable(pipe, name, min_tokens=0, **options):
        assert torch.equal(tiny.run(pipe, **size), resized)


def test_one_processor_per_layer_and_deepcopy():
    pipe = tiny.flux_pipeline()
    names = pipe.transformer.attn_processors
    pipe.transformer.set_attn_processor({n: LocalAttnProcessor(window=3) for n in names})
    sparse = tiny.run(pipe)
    twin = copy.deepcopy(pipe)
    assert torch.equal(tiny.run(twin), sparse)


def test_min_tokens_and_explicit_layout():
    pipe = tiny.flux_pipeline()
    stock = tiny.run(pipe)
    pipe.transformer.set_attn_processor(LocalAttnProcessor(window=2, min_tokens=10_000))
    assert torch.equal(tiny.run(pipe), stock)
    pipe.transformer.set_attn_processor(LocalAttnProcessor(window=2))
    sparse = tiny.run(pipe)
    layout = Layout.image(8, 12, text=12)
    pipe.transformer.set_attn_processor(LocalAttnProcessor(window=2, layout=layout))
    assert torch.equal(tiny.run(pipe), sparse)


def test_unreadable_layout_asks_for_one():
    model, inputs = tiny.flux_transformer(), dict(tiny.flux_inputs(batch=1))
    inputs["img_ids"] = torch.cat([inputs["img_ids"], inputs["img_ids"][:14] + 1])
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"], torch.randn(1, 14, 16)], 1)
    model.set_attn_processor(LocalAttnProcessor(window=3))
    with pytest.raises(ValueError, match=r"cannot read the layout.*layout=Layout"):
        model(**inputs)


def test_an_attention_class_without_a_stock_processor_is_refused():
    from diffusers.models.attention_processor import Attention

    attn = Attention(query_dim=16, heads=1, dim_head=16, processor=LocalAttnProcessor(window=3))
    with pytest.raises(ValueError, match=r"dittfast\.enable"):
        attn(torch.randn(1, 4, 16))


def test_unknown_option_names_the_nearest():
    with pytest.raises(ValueError, match="'window'"):
        LocalAttnProcessor(windw=3)


@pytest.mark.parametrize("rows", ["image", "joint", "diagonal"])
@pytest.mark.parametrize("passes", [1, 2, 3])
def test_weakened_heads_equal_guide(rows, passes):
    """The last part of the batch is weakened, and c + w (c - p) is what guide computes."""
    model, inputs = tiny.flux_transformer(), tiny.flux_inputs(batch=1)
    with torch.no_grad():
        stock = model(**inputs)[0]
        with guide(model, heads=[(1, 0), (3, 0)], strength=0.6, guidance_scale=2.0, rows=rows):
            expected = model(**inputs)[0]
        before = model.attn_processors
        weak = HeadGuidanceAttnProcessor([0], 0.6, rows, passes=passes)
        names = (
            "transformer_blocks.1.attn.processor",
            "single_transformer_blocks.1.attn.processor",
        )
        model.set_attn_processor({**before, **dict.fromkeys(names, weak)})
        batch = {
            k: torch.cat([v] * passes) if torch.is_tensor(v) and not k.endswith("_ids") else v
            for k, v in inputs.items()
        }
        *others, p = model(**batch)[0].chunk(passes)
        for other in others:
            torch.testing.assert_close(other, stock, rtol=0, atol=1e-5)
        torch.testing.assert_close(stock + 2 * (stock - p), expected, rtol=0, atol=1e-4)
        weak.active = False
        assert torch.equal(model(**inputs)[0], stock)
        model.set_attn_processor(before)
        assert torch.equal(model(**inputs)[0], stock)


def test_weakened_heads_on_wan_leave_cross_attention_alone():
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs()
    with torch.no_grad():
        stock = model(**inputs)[0]
        with guide(model, heads=[(0, 1), (1, 1)], guidance_scale=1.0):
            expected = model(**inputs)[0]
        model.set_attn_processor(HeadGuidanceAttnProcessor([1]))
        torch.testing.assert_close(2 * stock - model(**inputs)[0], expected, rtol=0, atol=1e-4)


def test_weakened_heads_under_another_attention_backend():
    from diffusers.models.attention_dispatch import AttentionBackendName

    model, inputs = tiny.flux_transformer(), tiny.flux_inputs(batch=1)
    weak = HeadGuidanceAttnProcessor([0, 1], (0.5, 1.0))
    model.set_attn_processor(weak)
    with torch.no_grad():
        expected = model(**inputs)[0]
        weak._attention_backend = AttentionBackendName.FLEX
        assert torch.equal(model(**inputs)[0], expected)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(heads=[]), "empty"),
        (dict(heads=[1, 1]), "twice"),
        (dict(heads=[1], strength=-0.5), r"0\.\.1.*-0\.5"),
        (dict(heads=[1], strength=[0.5, 0.5]), "2 strengths for 1 heads"),
        (dict(heads=[1], rows="images"), "'image'"),
        (dict(heads=[1], passes=0), "passes"),
        (dict(heads=[2]), r"head 2 does not exist; heads are 0\.\.1"),
        (dict(heads=[1], passes=2), r"batch of 1 .* passes=2"),
    ],
)
def test_bad_weakened_heads(options, message):
    model = tiny.flux_transformer()
    with pytest.raises(ValueError, match=message):
        model.set_attn_processor(HeadGuidanceAttnProcessor(**options))
        model(**tiny.flux_inputs(batch=1))


@pytest.mark.parametrize("text", [0, 1, 7])
@pytest.mark.parametrize("height, width", [(1, 8), (9, 7), (2, 2), (5, 12)])
def test_image_layout_from_rotary(height, width, text):
    model = tiny.flux_transformer()
    ids = torch.cat([torch.zeros(text, 3), tiny.flux_inputs(height, width)["img_ids"]])
    expected = Layout.image(height, width, text=text)
    embedding = model.pos_embed(ids)
    assert rotary.text_and_image(embedding, text) == expected
    assert rotary.text_and_image(embedding, None) == expected


@pytest.mark.parametrize("size", [(3, 10, 14), (1, 10, 14), (4, 4, 8), (2, 2, 2)])
def test_video_layout_from_rotary(size):
    model = tiny.wan_transformer()
    embedding = model.rope(torch.zeros(1, 16, *size))
    frames, height, width = size
    assert rotary.video(embedding) == Layout.video(frames, height // 2, width // 2)
