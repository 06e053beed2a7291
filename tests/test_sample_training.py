"""The scripts that train the sample image model: layout, optimiser and captions."""

import importlib
import io
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

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
    names = (
        *("captions", "flux_model", "large_pictures", "text_encoders", "vector_art"),
        *("clips", "distill_results", "quality_table", "whole_pictures"),
    )
    yield {name: importlib.import_module(name) for name in names}
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


@pytest.mark.parametrize("seen, count", [(1, 6), (4, 8), (2, 64)])
def test_held_out_pictures_are_none_that_training_shows(scripts, seen, count):
    chosen = scripts["whole_pictures"].unseen(1024, seen, count)
    assert len({label for _, label, *_ in chosen}) == len(chosen) == count
    assert not {name for name, *_ in chosen} & {
        name for name, *_ in scripts["vector_art"].plan(seen, 0)
    }


def test_as_many_steps_as_fit_into_the_time(scripts, monkeypatch, tmp_path):
    """The second and third step cost 4 and 6 processor seconds, the first 100: 20 in 100 s."""
    results, calls = scripts["distill_results"], []

    def train(config, resume):
        calls.append((config.train.steps, resume))
        folder = Path(config.train.output)
        (folder / f"checkpoints/step-{config.train.steps:08d}").mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        rows = [{"step": n + 1, "cpu_seconds": x} for n, x in enumerate((100, 4, 6))]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr(results, "train", train)
    how = "whole_sample", [], tmp_path / "run"
    assert results.steps_within(*how, seconds=100) == 20
    assert results.steps_within(*how, seconds=1) == 3
    assert results.train_to(*how, 20).name == "step-00000020"
    assert results.train_to(*how, 20).is_dir()
    assert calls == [(3, None), (20, "latest")]


def test_a_longer_clip_is_the_same_motion_in_smaller_steps(scripts, tmp_path):
    rgba = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 4), np.uint8)
    np.savez(tmp_path / "emoji.npz", labelled=rgba, others=rgba[:2])
    clips = scripts["clips"].Clips(tmp_path / "emoji.npz", others=False)
    short = clips.one("car", "green", "grows")
    assert short.shape == (3, 9, 128, 128)
    assert torch.allclose(clips.one("car", "green", "grows", 33)[:, ::4], short, atol=1e-5)
    slow = clips.one("car", "green", "moves right", 17)  # 4 px in two frames
    for frame in range(8):  # before it comes to the border
        assert torch.allclose(slow[:, frame + 1], slow[:, frame].roll(2, -1), atol=1e-3)


def test_the_table_by_hand(scripts, tmp_path):
    """Two pictures of 512 px: features that are known, and what follows from the definition."""
    quality = scripts["quality_table"]
    rng = np.random.default_rng(0)
    args = SimpleNamespace(output=tmp_path, packages=None, emoji=None, count=64)
    task = quality.Task(args, "pictures", 512)
    features = {}

    def write(at, arm, number, seconds=1.0):
        features[at.size, arm, number] = rng.normal(size=(1, 64))
        path = at.record(arm, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {"features": features[at.size, arm, number].tolist(), "cpu_seconds": seconds}
        row |= {"density": 0.1, "work": 0.1, "peak_bytes": number, "sharpness": 30.0 + number}
        path.write_text(json.dumps(row))

    for number in range(64):
        write(task.best, "art", number)
    for number in range(2):
        write(task.best, "dense", number)
        write(task.best, "other-seed", number)
        write(task, "art", number)
        write(task, "dense", number, 8.0)
        write(task, "local", number, 2.0 + 2 * number)
    assert task.best.folder.name == "pictures-256-large"

    def root(pairs):
        return np.sqrt(np.mean([np.mean((features[a] - features[b]) ** 2) for a, b in pairs]))

    one = root([((256, "art", i), (256, "art", j)) for i in range(64) for j in range(i)])
    row = quality.rows_of(task, task)["local"]
    to_art = root([((512, "local", n), (512, "art", n)) for n in range(2)])
    assert row["to_art"] == pytest.approx(to_art / one)
    parts = [
        root([((512, "local", n), (512, "art", n))]) / root([((512, "dense", n), (512, "art", n))])
        for n in range(2)
    ]
    assert row["to_art_of_dense"] == pytest.approx(np.sqrt(parts[0] * parts[1]))
    to_best = root([((512, "local", n), (256, "dense", n)) for n in range(2)])
    assert row["to_best"] == pytest.approx(to_best / one)
    assert row["times_as_fast"] == 3 and row["cpu_seconds"] == 3  # of 4 and 2; of 2 and 4
    assert row["peak_bytes"] == 1 and row["sharpness"] == 30.5
    between = root([((256, "dense", n), (256, "other-seed", n)) for n in range(2)])
    assert quality.floor_of(task)["between_seeds"] == pytest.approx(between / one)


def test_clips_of_two_lengths_are_compared_at_the_same_times(scripts):
    short = [[float(n)] for n in range(9)]
    long = [[n / 4] for n in range(33)]
    assert scripts["quality_table"].apart(short, long) == 0
    assert scripts["quality_table"].apart(long, [[x + 2.0] for (x,) in short]) == 4


def test_prompts_keep_their_numbers_and_show_every_motion(scripts):
    quality, motions = scripts["quality_table"], list(scripts["clips"].MOTIONS)
    assert len(set(quality.items(512))) == 512
    assert quality.items(20)[:5] == quality.items(5)
    assert {motion for *_, motion in quality.items(16, motions)} == set(motions)
