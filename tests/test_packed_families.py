"""Packed sequences, kept keys and silent text, and the classes of diffusers that have no reader."""

import dataclasses

import diffusers
import pytest
import torch
from patterns import Band

import dittfast
from dittfast import Layout
from dittfast.layout import Context, Grid
from dittfast.pipelines.families import FAMILIES, tiny_image, tiny_packed
from dittfast.pipelines.families.others import OTHERS, transformer_classes
from dittfast.pipelines.families.sequences import Sequences
from dittfast.pipelines.families.tiny_model import TEXT, Draw
from dittfast.pipelines.guidance.plain import GuidanceState
from dittfast.pipelines.layer import LayerRun, _silent_context, answer, key_log_weight
from dittfast.pipelines.measure import parity
from dittfast.pipelines.measure.parity import METHODS, TINY, Full
from dittfast.pipelines.models import attention_layers, transformers_of
from dittfast.pipelines.state import ModelState

pytestmark = pytest.mark.filterwarnings("ignore")


def test_every_transformer_class_of_diffusers_has_an_answer():
    """A class that a new diffusers brings is not known here: give it a reader, or say why not."""
    classes = set(transformer_classes())
    assert len(classes) >= 27
    assert not classes - set(FAMILIES) - set(OTHERS)
    assert not set(FAMILIES) & set(OTHERS)
    if diffusers.__version__.startswith("0.42."):
        assert classes == set(FAMILIES) | set(OTHERS)
        assert len(FAMILIES) >= 55


@pytest.mark.parametrize("name", OTHERS)
def test_a_class_without_reader_says_why(name):
    if not hasattr(diffusers, name):
        pytest.skip(f"newer than diffusers {diffusers.__version__}")
    model = torch.nn.Module()
    model.__class__ = getattr(diffusers, name)
    with pytest.raises(ValueError) as error:
        dittfast.enable(model, Band())
    assert OTHERS[name].why in str(error.value)
    with pytest.raises(ValueError) as described:
        dittfast.enable(model, Band(), layout=Layout.image(4, 4))
    assert (OTHERS[name].why in str(described.value)) == OTHERS[name].never
    assert ("layout=" in str(error.value)) != OTHERS[name].never


def test_linear_attention_is_refused_by_that_name():
    model = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=8, sample_size=8,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"SanaTransformer2DModel cannot .* linear attention"):
        dittfast.enable(model, Band())


def needs(*names):
    """Skips where the installed diffusers has no class for one of these families."""
    absent = [name for name in names if name not in TINY]
    return pytest.mark.skipif(bool(absent), reason=f"newer than this diffusers: {absent}")


def drawn(out, tokens):
    return out[:, -tokens:]


@needs("ideogram4")
@pytest.mark.parametrize("method", ["full", "local"])
def test_padding_in_front_of_a_text_is_not_seen(method):
    """Ideogram 4: the image of a padded row is what it is without its padding."""
    model, inputs = TINY["ideogram4"].build()
    draw = Draw(TINY["ideogram4"].grid, TEXT, seed=1)
    inputs = tiny_packed._ideogram4(draw, model, lengths=(7, 3)) | {"return_dict": False}
    tokens = 99
    with torch.no_grad():
        stock = drawn(model(**inputs)[0], tokens)
        with dittfast.enable(model, METHODS[method], backend="cpu", min_tokens=0) as enabled:
            found = drawn(model(**inputs)[0], tokens)
            alone = {
                n: x[1:, 4:] for n, x in inputs.items() if n not in ("timestep", "return_dict")
            }
            alone = drawn(
                model(**alone, timestep=inputs["timestep"][1:], return_dict=False)[0], tokens
            )
            assert (enabled.describe().density == 1) == (method == "full")
    torch.testing.assert_close(found[1:], alone, rtol=1e-4, atol=1e-5)
    if method == "full":
        torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-5)


@needs("ideogram4")
def test_several_images_in_a_row_are_refused():
    model, inputs = TINY["ideogram4"].build()
    segments = inputs["segment_ids"].clone()
    segments[:, -9:] = 2
    with (
        dittfast.enable(model, METHODS["local"], min_tokens=0),
        pytest.raises(ValueError, match="one image, in one segment"),
    ):
        model(**{**inputs, "segment_ids": segments})


def test_keys_of_images_to_edit_that_are_kept():
    """GLM-Image: a pass of the image to edit first, whose keys later passes see."""
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

    model, inputs = TINY["glm-image"].build()
    del inputs["attention_mask"]  # the pipeline passes none

    def edited(guide=None):
        caches = GlmImageKVCache(num_layers=2)
        with torch.no_grad():
            for mode in ("write", "read", "skip"):
                caches.set_mode(mode)
                text = inputs["encoder_hidden_states"]
                text = text[:, :0] if mode == "write" else text
                arguments = {**inputs, "encoder_hidden_states": text, "kv_caches": caches}
                if mode == "write":
                    arguments = {
                        n: x[:1] if torch.is_tensor(x) else x for n, x in arguments.items()
                    }
                yield model(**arguments)[0]
                assert caches[0].k_caches[0].shape[1] == 99

    stock = list(edited())
    with dittfast.enable(model, Full(), backend="cpu", min_tokens=0):
        lengths = []
        for ours, theirs in zip(edited(), stock):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
            lengths.append(model._dittfast.layout.num_tokens)
        assert lengths == [99, 2 * 99 + 7, 99 + 7]
    with dittfast.enable(model, METHODS["local"], backend="cpu", min_tokens=0) as enabled:
        _, ours, _ = edited()
        assert parity.distance(ours, stock[1]) > 1e-3
        assert 0 < enabled.describe().density < 1
    with dittfast.guide(model, heads=[(0, 0)]):
        first, ours, _ = edited()  # no pass is made twice to fill the cache
        assert torch.equal(first, stock[0])
        assert parity.distance(ours, stock[1]) > 1e-3


@needs("qwen-image-2.1-edit")
def test_keys_of_text_and_references_that_are_kept():
    """Qwen-Image 2.1: the first step keeps the keys of what stands before the image."""
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    model, inputs = TINY["qwen-image-2.1-edit"].build()
    tokens = 80

    def steps():
        cache = QwenImage21KVCache(len(model.transformer_blocks))
        with torch.no_grad():
            for mode in ("extract", "cached"):
                latents = inputs["hidden_states"].clone()
                latents[:, -tokens:] *= 1.0 if mode == "extract" else 0.5
                arguments = {**inputs, "hidden_states": latents}
                out = model(**arguments, kv_cache=cache, kv_cache_mode=mode)[0]
                yield drawn(out, tokens)

    stock = list(steps())
    with dittfast.enable(model, Full(), backend="cpu", min_tokens=0) as enabled:
        for ours, theirs in zip(steps(), stock):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert enabled.describe().num_tokens == 5 + 8 + tokens
    with dittfast.enable(model, METHODS["local"], backend="cpu", min_tokens=0):
        for ours, theirs in zip(steps(), stock):
            assert parity.distance(ours, theirs) > 1e-4


@needs("qwen-image-2.1")
def test_flex_attention_of_qwen_is_refused():
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21FlexAttnProcessor

    model, inputs = TINY["qwen-image-2.1"].build()
    for block in model.transformer_blocks:
        block.attn.set_processor(QwenImage21FlexAttnProcessor())
    with (
        dittfast.enable(model, METHODS["local"], min_tokens=0),
        pytest.raises(ValueError, match=r"QwenImage21FlexAttnProcessor.*put QwenImage21Attn"),
    ):
        model(**inputs)


def read(name, **changes):
    model, inputs = TINY[name].build()
    found = FAMILIES[type(model).__name__].read(model, {**inputs, **changes})
    return Sequences.of(found).layout


@needs("minimax-h3", "cosmos3", "kandinsky6-i2v")
def test_sequences_with_sound_and_references():
    assert read("minimax-h3").segments == (Context(7 + 6 + 6), Grid(3, 5, 7))
    assert read("cosmos3").segments == (Context(7), Grid(3, 5, 7), Context(4))
    assert read("kandinsky6-i2v").segments == (Grid(3, 5, 7), Context(35))
    # Earlier frames: 5 in cells of 4 x 8 x 8, 2 in 2 x 4 x 4, 2 in 1 x 2 x 2.
    assert read("helios").segments == (Context(2 * 2 * 2 + 3 * 4 + 2 * 5 * 7), Grid(3, 5, 7))
    assert read("framepack-alone").segments[2] == Context(3 + 3)  # without its padding
    last = TINY["minimax-h3"].build()[1]["video_indices"][:-1]
    with pytest.raises(ValueError, match=r"video ends the sequence.*layout="):
        read("minimax-h3", video_indices=last)


@needs("joyimage-edit", "flux3")
def test_items_of_an_edited_image():
    assert read("joyimage-edit").segments == (Grid(1, 5, 7), Grid(1, 5, 7), Context(7))
    assert read("flux3").segments == (Context(7), Grid(1, 11, 9), Grid(1, 4, 6), Grid(1, 3, 5))


@pytest.mark.parametrize(
    "name, changes",
    [
        pytest.param(
            "bria-fibo-2",
            [{"context_latents": [torch.zeros(2, 4, n, 4)]} for n in (4, 6)],
            marks=needs("bria-fibo-2"),
        ),
        pytest.param(
            "qwen-image-2.1",
            [{"img_shapes": [[(1, *n)]] * 2} for n in ((8, 10), (10, 8))],
            marks=needs("qwen-image-2.1"),
        ),
    ],
)
def test_what_lists_hold_is_read_again(name, changes):
    """Values of tensors are read once; images of another size beside them are not overlooked."""
    model, inputs = TINY[name].build()
    with dittfast.enable(model, METHODS["local"], min_tokens=0), torch.no_grad():
        found = []
        for change in changes:
            model(**{**inputs, **change})
            found.append(model._dittfast.layout)
    assert found[0] != found[1]


class Where:
    def __init__(self, before, behind):
        self.text_before, self.text_behind = before, behind


def test_text_that_does_not_ask():
    assert _silent_context(Where(5, 0), 0) == (0, 0)
    assert _silent_context(Where(5, 0), 5) == (5, 0)
    assert _silent_context(Where(5, 0), 3) == (3, 0)
    assert _silent_context(Where(0, 4), 4) == (0, 4)
    assert _silent_context(Where(0, 4), 3) is None
    assert _silent_context(Where(5, 0), 6) is None
    assert _silent_context(Where(5, 2), -1) is None
    assert Layout((Context(2), Grid(1, 2, 2), Context(3), Context(1))).text_behind == 4
    assert Layout((Grid(1, 2, 2), Context(3), Grid(1, 2, 2))).text_behind == 0


@pytest.mark.parametrize("front", [True, False])
@pytest.mark.parametrize("rows", ["one", "expanded", "each its own", "numbers"])
def test_masks_of_silent_text_in_a_weakened_layer(rows, front):
    """A mask has a row for each query that there is, or one that holds for all."""

    class Weak:
        hidden_states = None
        num_tokens, text_before, text_behind = 12, 3 * front, 3 * (not front)

        def covers(self, num_tokens):
            return num_tokens == 12

        def __call__(self, out, strength, call):
            return out * 2

    q, k, v = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8)
    mask = torch.rand(1, 1, 9, 12) < 0.7
    mask[..., 0] = True
    mask = {"one": mask[:, :, :1], "expanded": mask[:, :, :1].expand(1, 2, 9, 12)}.get(rows, mask)
    mask = torch.randn(1, 1, 9, 12) if rows == "numbers" else mask
    sdpa = torch.nn.functional.scaled_dot_product_attention
    call = {"query": q, "key": k, "value": v, "attn_mask": mask}
    found = answer(LayerRun(transform=Weak()), call, sdpa)
    torch.testing.assert_close(found, 2 * sdpa(q, k, v, mask))


def test_a_mask_over_keys_that_was_expanded_over_queries():
    q = torch.zeros(2, 2, 6, 4)
    keys = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])[:, None, None]
    weight = key_log_weight(keys.expand(-1, 2, 6, -1), q)
    torch.testing.assert_close(weight, key_log_weight(keys, q).expand(-1, 2, -1))
    with pytest.raises(ValueError, match="may differ between queries"):
        key_log_weight(keys.repeat(1, 2, 6, 1), q)


def test_attention_that_calls_itself_cross_attention():
    """OmniGen's attention over its own tokens is built like cross-attention."""
    model, _ = TINY["omnigen"].build()
    assert all(layer.self_attn.is_cross_attention for layer in model.layers)
    family = FAMILIES["OmniGenTransformer2DModel"]
    assert list(attention_layers(model, family)) == ["layers.0.self_attn", "layers.1.self_attn"]


class Pipe:
    def __init__(self, components, **fields):
        self.components = components
        self.__dict__.update(fields)


@needs("ideogram4")
def test_a_transformer_for_unconditional_predictions():
    model, _ = TINY["ideogram4"].build()
    other, _ = TINY["ideogram4"].build(seed=1)
    pipe = Pipe({"transformer": model, "unconditional_transformer": other})
    assert transformers_of(pipe) == {"transformer": model, "unconditional_transformer": other}
    with dittfast.enable(pipe, METHODS["local"], min_tokens=0) as enabled:
        assert len(enabled.describe().layers) == 4
    with pytest.raises(ValueError, match="another transformer"):
        dittfast.guide(pipe, heads=[(0, 0)])


@pytest.mark.parametrize(
    "fields, batch, parts",
    [
        (dict(do_classifier_free_guidance=True), [0, 1], 2),
        (dict(do_classifier_free_guidance=False), [0, 0], 1),
        (dict(guidance_scale=3.0), [0, 0], 2),
        (dict(guidance_scale=3.0), [0, 1, 0, 1], 2),
        (dict(guidance_scale=3.0), [0, 0, 0], 3),
        (dict(guidance_scale=3.0), [0, 1, 0, 1, 0, 1], 3),
        (dict(guidance_scale=3.0), [0, 1], 1),
        (dict(guidance_scale=1.0), [0, 0], 1),
        (dict(guidance_scale=None), [0, 0], 1),
        ({}, [0, 0], 1),
    ],
)
def test_parts_of_a_guided_batch(fields, batch, parts):
    """Some pipelines do not say that they guide, and OmniGen makes three predictions."""
    model, _ = TINY["omnigen"].build()
    pipe = Pipe({"transformer": model}, **fields)
    with dittfast.enable(pipe, METHODS["local"], min_tokens=0):
        state: ModelState = model._dittfast
        latents = torch.tensor(batch).float()[:, None]
        assert GuidanceState._num_parts(None, state, latents) == parts


def test_guided_thirds_of_a_batch():
    """All three of OmniGen's predictions move by the conditional one's difference."""
    model, inputs = TINY["omnigen"].build()
    rows = torch.tensor([0, 1, 1])
    three = {
        n: x[rows] if torch.is_tensor(x) else x for n, x in inputs.items() if n != "hidden_states"
    }
    three["hidden_states"] = inputs["hidden_states"][:1].expand(3, -1, -1, -1)
    three["input_image_sizes"] = {0: [[1, 5]], 2: [[3, 7]]}  # by batch row
    three["input_img_latents"] = [*inputs["input_img_latents"], torch.ones(1, 4, 4, 4)]
    pipe = Pipe({"transformer": model}, guidance_scale=2.0, transformer=model)
    with torch.no_grad():
        stock = model(**three)[0]
        with dittfast.guide(pipe, heads=[(0, 0)], guidance_scale=1.0):
            moved = model(**three)[0] - stock
    assert float(moved[0].abs().max()) > 1e-4
    torch.testing.assert_close(moved[1:], moved[:1].expand(2, -1, -1, -1), rtol=1e-3, atol=1e-5)


@needs("bria-fibo-2", "bria-fibo-2-edit")
def test_two_amounts_of_gist():
    """Bria Fibo 2: where a prompt gets fewer gist tokens, they stand behind and are padded."""
    first = read("bria-fibo-2").segments
    assert first == (Grid(1, 11, 9), Context(8))
    assert read("bria-fibo-2-edit").segments == (
        Context(8), Grid(1, 11, 9), Grid(1, 4, 6), Grid(1, 3, 5),
    )  # fmt: skip
    tiny = TINY["bria-fibo-2"]
    even = dataclasses.replace(
        tiny, inputs=lambda draw, model: tiny_image._bria_fibo2(draw, model, False)
    )
    model, inputs = even.build()
    found = FAMILIES[tiny.name].read(model, inputs)
    assert found.layout.segments == (Context(8), Grid(1, 11, 9))
    assert found.kinds[1] == (Layout.image(11, 9),)
