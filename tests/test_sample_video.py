"""The scripts that train the sample video model: clips, VAE, training, export."""

import argparse
import importlib
import json
import math
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline

from dittfast.pipelines.runs import sources
from dittfast.pipelines.runs.call import call_arguments
from dittfast.pipelines.runs.first_frame import still_prompt
from dittfast.pipelines.runs.run import run

SCRIPTS = Path(__file__).parents[1] / "samples"
NAMES = (
    *("captions", "clips", "wan_vae", "wan_model", "text_encoders"),
    *("train_wan", "train_wan_vae", "export_wan"),
)


@pytest.fixture(scope="module")
def scripts():
    """The scripts import each other by plain name, as they do when run."""
    pytest.importorskip("tokenizers")
    before = set(sys.modules)
    sys.path.insert(0, str(SCRIPTS))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    sys.path.remove(str(SCRIPTS))
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and SCRIPTS in Path(file).parents:
            del sys.modules[name]


@pytest.fixture(scope="module")
def data(scripts, tmp_path_factory):
    """Pictures as emoji_data.py writes them: shaded bodies with a head on the upper right."""
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    body, head = (x**2 + y**2) < 0.45, ((x - 0.5) ** 2 + (y + 0.5) ** 2) < 0.08
    pictures = []
    for number in range(72):
        colour = 0.5 + 0.3 * np.sin(number + np.arange(3))
        picture = np.zeros((64, 64, 4))
        picture[..., :3] = 255 * np.clip(colour * (1 - 0.2 * y[..., None]), 0, 1)
        picture[head, :3] = 255 * (1 - colour)
        picture[..., 3] = 255 * (body | head)
        pictures.append(picture.astype(np.uint8))
    file = tmp_path_factory.mktemp("data") / "emoji.npz"
    np.savez(file, labelled=np.stack(pictures[:64]), others=np.stack(pictures[64:]))
    return file


@pytest.fixture(scope="module")
def source(scripts, data):
    return scripts.clips.Clips(data)


def masses(clip):
    """How far each pixel of [3, F, H, W] is from the background colour in its corner."""
    return (clip - clip[:, :, :1, :1]).abs().sum(0).double()


def centres(clip):
    """Centroid of the object in each frame, in px: x [F], y [F]."""
    weight = (masses(clip) > 0.1).double()
    total = weight.sum((1, 2))
    place = torch.arange(clip.shape[-1], dtype=torch.float64)
    return (weight.sum(1) * place).sum(1) / total, (weight.sum(2) * place).sum(1) / total


def object_stays_inside(clip):
    mass = masses(clip)
    return max(mass[..., 0, :].max(), mass[..., -1, :].max(), mass[..., -1].max()) < 0.1


@pytest.mark.parametrize(
    "motion, x, y",
    [("moves right", 4, 0), ("moves left", -4, 0), ("moves up", 0, -4), ("moves down", 0, 4)],
)
def test_an_object_moves_where_the_caption_says(source, motion, x, y):
    clip = source.one("cat", "blue", motion)[:, :6]
    assert object_stays_inside(clip)
    found_x, found_y = centres(clip)
    frames = torch.arange(6)
    assert torch.allclose(found_x - found_x[0], x * frames.double(), atol=0.05)
    assert torch.allclose(found_y - found_y[0], y * frames.double(), atol=0.05)


def test_an_object_grows_and_shrinks(source):
    for motion, last in (("grows", 1.6), ("shrinks", 0.55)):
        clip = source.one("cat", "black", motion)
        area = (masses(clip) > 0.1).double().sum((1, 2))
        sides = (area / area[0]).sqrt()
        assert torch.allclose(sides, torch.linspace(1, last, 9).double(), atol=0.04)
        x, y = centres(clip)
        assert max((x - x[0]).abs().max(), (y - y[0]).abs().max()) < 3


def test_an_object_spins_half_a_turn_clockwise(source):
    clip = source.one("cat", "red", "spins")
    assert (clip[:, 8] - clip[:, 0].flip(-1, -2)).abs().mean() < 0.01
    # A quarter turn, clockwise on the screen, sends the upper right to the lower right.
    assert (clip[:, 4] - clip[:, 0].rot90(-1, (-2, -1))).abs().mean() < 0.01


def test_an_object_bounces_twice(source):
    x, y = centres(source.one("cat", "white", "bounces"))
    assert torch.allclose(x, x[:1], atol=0.05)
    hops = -4.0 * torch.tensor([0, 4, 6, 4, 0, 4, 6, 4, 0]).double()
    assert torch.allclose(y - y[0], hops, atol=0.05)


def test_the_background_is_the_one_asked_for(scripts, source):
    for name, colour in scripts.captions.BACKGROUNDS.items():
        corner = (source.one("cat", name, "moves right")[:, :, 0, 0] + 1) * 127.5
        assert torch.allclose(corner, torch.tensor(colour).float()[:, None], atol=0.5)


def test_batches_repeat_and_motions_come_by_their_shares(scripts, source):
    def draw(frames=None):
        rng = torch.Generator().manual_seed(5)
        return source.batch(8, rng, random.Random(5), frames)

    clips, texts = draw()
    again, same = draw()
    assert torch.equal(clips, again) and texts == same
    assert clips.shape == (8, 3, 9, 128, 128) and clips.abs().max() <= 1
    chosen = torch.tensor([[0, 3], [1, 7]]).repeat(4, 1)
    some, _ = draw(chosen)
    assert torch.allclose(some[:2], torch.stack([clips[0, :, [0, 3]], clips[1, :, [1, 7]]]))
    words, shares = scripts.clips.MOTIONS.items(), scripts.clips.SHARES
    rng = torch.Generator().manual_seed(6)
    _, texts = source.batch(
        sum(shares.values()), rng, random.Random(6), chosen[:1, :1].expand(13, 1), 16
    )
    found = [next(m for m, other in words if any(w in t for w in (m, *other))) for t in texts]
    assert {m: found.count(m) for m in shares} == shares


def test_captions_fit_the_tokenizer_and_lose_their_motion(scripts):
    clips, encoders = scripts.clips, scripts.text_encoders
    tokenizer = encoders.build_tokenizer(clips.tokenizer_corpus(), vocab_size=1024)
    rng, words = random.Random(0), clips.motion_words()
    texts = []
    for label in scripts.captions.LABELS:
        for motion in clips.MOTIONS:
            text = clips.random_caption(label, rng.choice(["red", "white"]), motion, rng)
            assert any(w in text for w in (motion, *clips.MOTIONS[motion]))
            still = still_prompt(text, words)
            assert not any(w in still for w in words) and "  " not in still
            texts.append(text)
    ids, mask = scripts.wan_model.tokenize(tokenizer, texts)
    assert ids.shape == (len(texts), encoders.MAX_LENGTH)
    assert (ids == tokenizer.eos_token_id).sum(-1).min() == 1
    assert (ids != tokenizer.unk_token_id).all()
    assert torch.equal(mask.bool(), ids != tokenizer.pad_token_id)
    asked = clips.caption("red apple", "blue", "moves right")
    assert asked == "a red apple moves right on a blue background"
    assert still_prompt(asked, words) == "a red apple on a blue background"


@pytest.fixture(scope="module")
def vae(scripts, source):
    seen, _ = source.batch(16, torch.Generator().manual_seed(0), random.Random(0))
    return scripts.wan_vae.build_vae(*scripts.wan_vae.principal_components(seen))


@torch.no_grad()
def test_the_computed_vae_restores_clips(scripts, source, vae, tmp_path):
    vae.save_pretrained(tmp_path)
    loaded = AutoencoderKLWan.from_pretrained(tmp_path).eval()
    clip = source.batch(2, torch.Generator().manual_seed(1), random.Random(1))[0][:, :, :5]
    latents = loaded.encode(clip).latent_dist.mean
    assert latents.shape == (2, 12, 5, 32, 32)
    error = ((loaded.decode(latents).sample - clip) / 2).square().mean()
    assert -10 * math.log10(error) > 30


@torch.no_grad()
def test_the_codec_is_the_vae(scripts, source, vae):
    codec = scripts.wan_vae.Codec(vae)
    clip = source.batch(2, torch.Generator().manual_seed(1), random.Random(1))[0][:, :, :5]
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    latents = codec.encode(clip)
    assert torch.allclose(latents, vae.encode(clip).latent_dist.mean / std, atol=1e-3)
    assert torch.equal(codec.decode(latents), vae.decode(latents * std).sample)


@torch.no_grad()
def test_a_widened_decoder_computes_the_same(scripts, vae):
    wide = scripts.wan_vae.widen(vae, 48)
    assert wide.decoder.conv_in.out_channels == 48
    latents = torch.randn(1, 12, 3, 8, 10, generator=torch.Generator().manual_seed(0))
    expected = vae.decode(latents).sample
    assert torch.allclose(wide.decode(latents).sample, expected, atol=1e-5)
    clip = torch.rand(1, 3, 2, 16, 16) * 2 - 1
    assert torch.equal(wide.encode(clip).latent_dist.mean, vae.encode(clip).latent_dist.mean)


@pytest.fixture(scope="module")
def decoder_run(scripts, data, vae, tmp_path_factory):
    """Makes runs of the decoder's training, for a video model of one block."""
    folder = tmp_path_factory.mktemp("decoder")
    patch = pytest.MonkeyPatch()
    patch.setattr(scripts.wan_model, "LAYERS", 1)
    patch.setattr(scripts.train_wan_vae, "HELD_OUT", 2)
    corpus = scripts.clips.tokenizer_corpus()
    tokenizer = scripts.text_encoders.build_tokenizer(corpus, vocab_size=1024)
    torch.manual_seed(0)
    model = scripts.wan_model.SampleWan(len(tokenizer))
    for part, name in (
        (model.transformer, "transformer"),
        (model.text_encoder, "text_encoder"),
        (tokenizer, "tokenizer"),
        (vae, "vae"),
    ):
        part.save_pretrained(folder / "model" / name)

    def make(name):
        given = ["--data", data, "--model", folder / "model", "--out", folder / name]
        given += ["--clips", 4, "--batch", 4, "--steps", 1000, "--lr", 5e-3]
        (folder / name).mkdir(exist_ok=True)
        for clips in made:  # the clips are the same for every run: each has a seed of its own
            if not (folder / name / clips.name).exists():
                shutil.copy(clips, folder / name)
        args = scripts.train_wan_vae.make_parser().parse_args([*map(str, given)])
        run = scripts.train_wan_vae.Run(args)
        made[:] = [folder / name / "train.pt", folder / name / "held-out.pt"]
        return run

    made = []
    yield make
    patch.undo()


@pytest.mark.slow
def test_training_the_decoder_restores_more_and_leaves_latents_alone(scripts, vae, decoder_run):
    run = decoder_run("whole")
    assert len(run.pairs[0]) == 4 and len(run.held_out[0]) == 2
    for _ in range(25):
        run.train_step()
    run.write()
    facts = json.loads((run.args.out / "training.json").read_text())
    before, after = facts["held_out_psnr_db"]
    assert after > before + 0.2 and facts["clips"] == 4
    for name in ("encoder", "quant_conv", "post_quant_conv"):
        kept, found = (getattr(x, name).state_dict() for x in (vae, run.vae))
        assert all(torch.equal(kept[key], found[key]) for key in kept)
    # Training decodes frames one by one; so does the saved VAE, which knows of no shortcut.
    written = AutoencoderKLWan.from_pretrained(run.args.out, torch_dtype=torch.float32).eval()
    latents = run.pairs[0][:1, :, :3].float() * run.codec.std
    with torch.no_grad():
        clip = written.decode(latents).sample[0].transpose(0, 1)
        alone = scripts.train_wan_vae.decode_frames(run.vae, latents[0].transpose(0, 1))
    assert torch.allclose(clip, alone.clamp(-1, 1), atol=5e-3)  # it is kept in fp16


@pytest.mark.slow
def test_a_resumed_decoder_run_is_the_same_run(decoder_run):
    whole, half = decoder_run("four"), decoder_run("two")
    for _ in range(4):
        whole.train_step()
    half.train_step(), half.train_step(), half.save()
    again = decoder_run("two")
    again.train_step(), again.train_step()
    assert again.step == 4 and again.losses == whole.losses
    for found, expected in zip(again.vae.parameters(), whole.vae.parameters()):
        assert torch.equal(found, expected)


def test_a_trained_decoder_goes_into_an_exported_model(scripts, training, decoder_run, tmp_path):
    trained = training("run")
    trained.save()
    old, out = tmp_path / "old", tmp_path / "new"
    scripts.export_wan.save(argparse.Namespace(run=tmp_path / "run", vae=tmp_path / "vae", out=old))
    decoder = decoder_run("short")
    decoder.train_step(), decoder.write()
    scripts.export_wan.replace_decoder(argparse.Namespace(model=old, vae=decoder.args.out, out=out))
    source = sources.find(str(out))
    assert source.settings["training"]["decoder"]["clips"] == 4
    pipe = sources.load(source, "cpu", torch.float32)
    for found, expected in zip(pipe.vae.parameters(), decoder.vae.parameters()):
        assert torch.equal(found, expected.half().float())
    for found, expected in zip(pipe.transformer.parameters(), trained.average):
        assert torch.equal(found, expected.half().float())


@torch.no_grad()
def test_the_condition_is_the_pipelines(scripts, source, vae):
    codec = scripts.wan_vae.Codec(vae)
    first = source.one("cat", "blue", "grows")[None, :, :1]
    pipe = WanImageToVideoPipeline(None, None, vae, None)
    _, expected = pipe.prepare_latents(first[:, :, 0], 1, 12, 128, 128, 9, torch.float32, "cpu")
    grey = codec.encode(torch.zeros(1, 3, 1, 4, 4))
    found = scripts.wan_model.condition_on(codec.encode(first), grey, 9)
    assert found.shape == expected.shape == (1, 13, 9, 32, 32)
    assert torch.allclose(found, expected, atol=1e-3)


def test_chosen_frames_and_small_ones_keep_their_places(scripts):
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    latents = torch.zeros(2, 25, 9, 32, 32)
    stock = [x.view(9, 16, 16, 64) for x in WanRotaryPosEmbed(64, (1, 2, 2), 128)(latents)]
    rope = scripts.wan_model.ChosenRope(64, (1, 2, 2), 128)
    for found, expected in zip(rope(latents), stock):
        assert torch.equal(found.view(9, 16, 16, 64), expected)
    rope.chosen.frames = chosen = torch.tensor([[0, 2, 7], [0, 1, 8]])
    for found, expected in zip(rope(latents[:, :, :3]), stock):
        rows = torch.stack([expected[i] for i in chosen])
        assert torch.allclose(found.view(2, 3, 16, 16, 64), rows.float(), atol=1e-5)
    # Half the size: the mean angle of the full rows that a row covers.
    cos, _ = rope(latents[:, :, :3, :16, :16])
    frequencies = 10000.0 ** (-torch.arange(0, 20, 2) / 20)
    rows = cos.view(2, 3, 8, 8, 64)[0, 0, :, 0, 24:44:2]
    covered = torch.arange(16.0).view(8, 2).mean(1)
    assert torch.allclose(rows, torch.outer(covered, frequencies).cos(), atol=1e-5)


def test_loss_weighs_what_moves(scripts):
    clean = torch.zeros(1, 12, 2, 2, 4)
    clean[:, :, 1, 0] = 1
    weights = scripts.train_wan.loss_weights(clean)
    assert weights.mean() == pytest.approx(1)
    first, moving, still = weights[0, 0, 0, 0, 0], weights[0, 0, 1, 0, 0], weights[0, 0, 1, 1, 0]
    assert moving / still == pytest.approx(4) and first / still == pytest.approx(0.25)


@pytest.fixture
def training(scripts, data, vae, tmp_path, monkeypatch):
    """Makes runs of a model of one block."""
    monkeypatch.setattr(scripts.wan_model, "LAYERS", 1)
    vae.save_pretrained(tmp_path / "vae")

    corpus = scripts.clips.tokenizer_corpus()
    tokenizer = scripts.text_encoders.build_tokenizer(corpus, vocab_size=1024)

    def make(name):
        parser = scripts.train_wan.make_parser()
        folder = tmp_path / name
        # Two tokenizers fitted on the same texts need not number their tokens alike.
        tokenizer.save_pretrained(folder / "tokenizer")
        given = ["--data", data, "--vae", tmp_path / "vae", "--out", folder, "--threads", 2]
        args = parser.parse_args([*map(str, given), "--stages", "32:2:8:4:2e-3"])
        return scripts.train_wan.Run(args)

    return make


def step(run, times):
    for _ in range(times):
        run.train_step(32, 2, 1000, 8, 1e-2)


def loss_of_one_batch(run):
    """The loss of always the same clips, noise and times."""
    rng = torch.Generator().manual_seed(3)
    frames = torch.tensor([[0, 4]]).expand(16, -1)
    clips, texts = run.clips.batch(16, rng, random.Random(3), frames, 32)
    clean = run.codec.encode(clips)
    noise, t = torch.randn(clean.shape, generator=rng), torch.linspace(0.3, 1, 16)
    found = run.tokenizer(texts, padding="max_length", max_length=24, return_tensors="pt")
    return run.gradients(frames, clean, noise, t, found.input_ids, found.attention_mask)[0]


def test_training_lowers_the_loss(training):
    run = training("a")
    before = loss_of_one_batch(run)
    step(run, 25)
    after = loss_of_one_batch(run)
    assert after < 0.8 * before, (before, after)


def test_a_resumed_run_is_the_same_run(training):
    whole = training("whole")
    step(whole, 6)
    half = training("half")
    step(half, 3)
    half.save()
    again = training("half")
    again.load()
    step(again, 3)
    assert again.losses == whole.losses and again.step == whole.step == 6
    for found, expected in zip(again.model.parameters(), whole.model.parameters()):
        assert torch.equal(found, expected)
    for found, expected in zip(again.average, whole.average):
        assert torch.equal(found, expected)


def test_a_run_can_start_from_an_exported_model(scripts, training, data, tmp_path):
    trained = training("old")
    step(trained, 1)
    trained.save()
    out = tmp_path / "exported"
    scripts.export_wan.save(argparse.Namespace(run=tmp_path / "old", vae=tmp_path / "vae", out=out))
    given = ["--data", data, "--vae", out / "vae", "--out", tmp_path / "new", "--start", out]
    parser = scripts.train_wan.make_parser()
    (tmp_path / "new").mkdir()
    args = parser.parse_args([*map(str, given), "--stages", "32:2:8:4:2e-3", "--threads", "2"])
    new = scripts.train_wan.Run(args)
    assert new.step == 0 and new.tokenizer.get_vocab() == trained.tokenizer.get_vocab()
    for found, start in zip(new.average, trained.average):
        assert torch.equal(found, start.half().float())


def test_the_exported_folder_is_the_trained_model(scripts, training, tmp_path, caplog):
    trained = training("run")
    step(trained, 1)
    trained.save()
    out = tmp_path / "sample-video"
    scripts.export_wan.save(argparse.Namespace(run=tmp_path / "run", vae=tmp_path / "vae", out=out))
    source = sources.find(str(out))
    assert len(source.settings["prompts"]) == 8 and (out / "NOTICE").is_file()
    tokens = 9 * (source.settings["height"] // 8) * (source.settings["width"] // 8)
    assert tokens == 2304
    pipe = sources.load(source, "cpu", torch.float32)
    assert type(pipe) is WanImageToVideoPipeline and pipe.image_encoder is None
    for found, expected in zip(pipe.transformer.parameters(), trained.average):
        assert torch.equal(found, expected.half().float())

    from PIL import Image

    small = dict(height=32, width=48, num_inference_steps=1)
    call = call_arguments(pipe, "a cat moves up", source.settings, **small)
    drawn = run(pipe, call | {"image": Image.new("RGB", (48, 32), "red")})
    assert drawn.frames.shape == (9, 32, 48, 3)
    assert not any("frames" in message for message in caplog.messages)  # of rounding their number
    with pytest.raises(ValueError, match=r"multiple of 4 .* got 9; the nearest is 8"):
        call_arguments(pipe, "a cat", source.settings, num_frames=9)
