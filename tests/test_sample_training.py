"""The scripts that train the sample image model: layout, optimiser and captions."""

import random
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

SCRIPTS = Path(__file__).parents[1] / "samples"


@pytest.fixture
def scripts(monkeypatch):
    """The scripts import each other by plain name, as they do when run."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    pytest.importorskip("tokenizers")
    before = set(sys.modules)
    import captions
    import flux_model
    import text_encoders

    yield {
        "captions": captions,
        "flux_model": flux_model,
        "text_encoders": text_encoders,
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
