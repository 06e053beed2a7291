"""The scripts that train the sample image model: layout, optimiser and captions."""

import io
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

SCRIPTS = Path(__file__).parents[1] / "samples"


@pytest.fixture
def scripts(monkeypatch):
    """The scripts import each other by plain name, as they do when run."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    pytest.importorskip("tokenizers")
    before = set(sys.modules)
    import captions
    import flux_model
    import large_pictures
    import text_encoders
    import vector_art

    yield {
        "captions": captions,
        "flux_model": flux_model,
        "large_pictures": large_pictures,
        "text_encoders": text_encoders,
        "vector_art": vector_art,
    }
    for name in set(sys.modules) - before:
        if (
            getattr(sys.modules[name], "__file__", None)
            and SCRIPTS in Path(sys.modules[name].__file__).parents
        ):
            del sys.modules[name]


def test_tokens_are_laid_out_as_the_pipeline_does(scripts):
    flux_model = scripts["flux_model"]
    latents = torch.randn(2, 8, 64, 64)
    packed = flux_model.pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 8, 64, 64))
    assert torch.equal(flux_model.unpack(packed), latents)
    ids = FluxPipeline._prepare_latent_image_ids(1, 32, 32, "cpu", torch.float32)
    assert torch.equal(flux_model.image_ids(256), ids)


def test_small_pictures_cover_the_same_positions(scripts):
    flux_model = scripts["flux_model"]
    full = flux_model.image_ids(256).view(32, 32, 3)
    for size in (64, 128):
        side = size // 8
        n = 32 // side
        centres = full.view(side, n, side, n, 3).mean((1, 3))
        assert torch.allclose(flux_model.image_ids(size).view(side, side, 3), centres)


def test_every_caption_fits_the_tokenizer(scripts):
    captions, text_encoders = scripts["captions"], scripts["text_encoders"]
    tokenizer = text_encoders.build_tokenizer(captions.tokenizer_corpus(["zebra"]))
    rng = random.Random(0)
    texts = [
        captions.random_caption(label, colour, rng)
        for label in captions.LABELS
        for colour in captions.BACKGROUNDS
    ]
    tokens = text_encoders.tokenize(tokenizer, texts)
    assert tokens.shape == (len(texts), text_encoders.MAX_LENGTH)
    assert (tokens == tokenizer.eos_token_id).sum(-1).min() == 1
    assert (tokens != tokenizer.unk_token_id).all()


def test_sixty_four_labels_on_eight_backgrounds(scripts):
    captions = scripts["captions"]
    assert len(captions.LABELS) == 64
    assert len(captions.BACKGROUNDS) == 8
    assert captions.caption("owl", "red") == "a 3d emoji of an owl, red background"


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_every_background_is_as_frequent_and_captions_are_fixed(scripts, count):
    vector_art, captions = scripts["vector_art"], scripts["captions"]
    planned = list(vector_art.plan(count, seed=3))
    assert planned == list(vector_art.plan(count, seed=3)) != list(vector_art.plan(count, seed=4))
    assert len({name for name, *_ in planned}) == 64 * count
    for label in captions.LABELS:
        assert len({colour for _, x, colour, _ in planned if x == label}) == count
    colours = [colour for _, _, colour, _ in planned]
    assert {colours.count(colour) for colour in captions.BACKGROUNDS} == {8 * count}
    assert all(colour in text or colour == "white" for _, _, colour, text in planned)


def test_pictures_are_composed_and_kept(scripts, monkeypatch, tmp_path):
    """A half transparent picture next to the formula; a second run keeps what is there."""
    from dittfast.distill.pictures import find_pictures

    vector_art, captions = scripts["vector_art"], scripts["captions"]
    rgba = np.random.default_rng(0).integers(0, 256, (24, 24, 4), np.uint8)
    stored = io.BytesIO()
    Image.fromarray(rgba).save(stored, "PNG")
    files = dict.fromkeys(captions.LABELS, stored.getvalue())
    monkeypatch.setattr(vector_art, "files_of_labels", lambda packages, style: files)
    kept = tmp_path / "00-white.png"
    Image.new("RGB", (24, 24), "red").save(kept)
    vector_art.build(None, tmp_path, "3d", 24, 2, 0)
    found = find_pictures(tmp_path)
    assert len(found) == 128 and {p.path for p in found} >= {kept}
    assert np.asarray(Image.open(kept))[0, 0].tolist() == [255, 0, 0]
    name, _, colour, text = list(vector_art.plan(2, 0))[77]
    assert next(p.caption for p in found if p.path.name == name) == text
    alpha = rgba[..., 3:].astype(np.float64) / 255
    exact = alpha * rgba[..., :3] + (1 - alpha) * np.array(captions.BACKGROUNDS[colour])
    assert np.abs(np.asarray(Image.open(tmp_path / name)) - exact).max() <= 0.51


def test_a_drawing_fills_the_size_it_is_asked_for(scripts):
    pytest.importorskip("skia")
    svg = (
        b'<svg width="4" height="4" viewBox="0 0 4 4" xmlns="http://www.w3.org/2000/svg">'
        b'<rect x="1" y="0" width="2" height="3" fill="#ff8000" fill-opacity="0.5"/></svg>'
    )
    drawn = scripts["vector_art"].draw_svg(svg, 64)
    alpha = np.zeros((64, 64))
    alpha[:48, 16:48] = 0.5
    assert np.abs(drawn[..., 3] / 255 - alpha).max() < 0.01
    assert np.abs(drawn[20, 30, :3].astype(int) - [255, 128, 0]).max() <= 2


def test_sharpness_is_the_mean_of_the_strongest_gradients(scripts):
    """Of 200 x 200 px a column of one edge is 0.5 %: a step of 90 there, of 10 elsewhere."""
    luma = np.zeros((201, 201), np.uint8)
    luma[:, 100:] = 90
    luma[:, 150:] = 100
    sharpness = scripts["large_pictures"].sharpness(Image.fromarray(luma).convert("RGB"))
    assert sharpness == pytest.approx(90)
    luma[:, 120:] += 30
    half = scripts["large_pictures"].sharpness(Image.fromarray(np.rot90(luma)).convert("RGB"))
    assert half == pytest.approx(90)
