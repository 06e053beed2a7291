"""Stages of growing size against the same steps by hand with diffusers' own pipelines."""

import json
import math

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import dittfast
from dittfast.cli import main
from dittfast.methods import Local
from dittfast.pipelines.guidance.plain import guide
from dittfast.pipelines.runs.high_resolution import generate_high_resolution

STAGES = [(48, 64), (96, 128)]
CALL = dict(num_inference_steps=3, max_sequence_length=12, guidance_scale=3.5)
LOCAL = dict(window=3, tile=(1, 4, 4), min_tokens=0)


@pytest.fixture(scope="module")
def pipe():
    return tiny.flux_pipeline(double=1, single=1)


def pixels(images):
    return np.clip(np.rint(np.asarray(images[0]) * 255), 0, 255).astype(np.uint8)


def draw(pipe, height, width, seed, **more):
    generator = torch.Generator().manual_seed(seed)
    return pixels(pipe("a red cat", height=height, width=width, generator=generator,
                       output_type="np", **CALL | more).images)  # fmt: skip


def by_hand(pipe, strength, theta=1.0, later=None, **method):
    """Both stages with stock pipelines."""
    from diffusers import FluxImg2ImgPipeline

    small = draw(pipe, *STAGES[0], seed=5)
    image = Image.fromarray(small).resize((128, 96), Image.Resampling.LANCZOS)
    larger = FluxImg2ImgPipeline(**pipe.components)
    larger.set_progress_bar_config(disable=True)
    pipe.transformer.pos_embed.theta *= theta
    if method:
        dittfast.enable(larger, "local", **method)
        pipe.vae.to(memory_format=torch.channels_last)
    large = draw(larger, *STAGES[1], seed=6, image=image, strength=strength, **later or {})
    if method:
        dittfast.disable(larger)
        pipe.vae.to(memory_format=torch.contiguous_format)
    pipe.transformer.pos_embed.theta /= theta
    return small, large


def test_each_stage_is_img2img_with_the_method_in_place(pipe):
    tokens = 6 * 8 + 12
    expected = by_hand(pipe, 0.5, 10.0, **LOCAL, proportional=tokens)
    seen = []
    done = generate_high_resolution(pipe, "a red cat", STAGES, call=CALL, seed=5, strength=0.5,
                                    on_stage=seen.append, **LOCAL)  # fmt: skip
    assert [np.array_equal(s.run.frames[0], e) for s, e in zip(done, expected)] == [True] * 2
    assert seen == ["64 x 48", "128 x 96"]
    assert [s.num_tokens for s in done] == [tokens, 12 * 16 + 12]
    assert [len(s.run.timing.steps) for s in done] == [3, 2]  # ceil(3 * 0.5)
    method = done[1].description.method
    assert done[0].description is None and method.proportional == tokens
    scale = method.scale(dittfast.Layout.image(12, 16, text=12), 16)
    assert scale == pytest.approx(math.sqrt(math.log(204) / math.log(tokens) / 16))
    plain = by_hand(pipe, 0.5, 10.0, **LOCAL)
    unscaled = generate_high_resolution(pipe, "a red cat", STAGES, call=CALL, seed=5,
                                        method=Local(window=3, tile=(1, 4, 4)), min_tokens=0,
                                        proportional=False, strength=0.5)  # fmt: skip
    assert np.array_equal(unscaled[1].run.frames[0], plain[1])
    assert not np.array_equal(plain[1], expected[1])


def test_without_a_method_it_is_stock_img2img(pipe):
    before = tiny.run(pipe)
    done = generate_high_resolution(
        pipe, "a red cat", STAGES, call=CALL, seed=5, method=None, strength=0.4, ntk_factor=1
    )
    expected = by_hand(pipe, 0.4)
    assert [np.array_equal(s.run.frames[0], e) for s, e in zip(done, expected)] == [True] * 2
    assert done[1].description is None and done[1].image.size == (128, 96)
    assert torch.equal(tiny.run(pipe), before)


def test_convolutions_are_by_pixel_in_stages_with_a_method(pipe):
    weight, seen = pipe.vae.decoder.conv_in.weight, []
    before = weight.detach().clone()
    by_pixel = lambda: weight.is_contiguous(memory_format=torch.channels_last)  # noqa: E731
    hook = pipe.vae.decoder.conv_in.register_forward_hook(lambda *_: seen.append(by_pixel()))
    for method in ("local", None):
        how = LOCAL if method else {}
        generate_high_resolution(pipe, "a red cat", STAGES, call=CALL, method=method, **how)
    hook.remove()
    assert seen == [False, True, False, False]
    assert weight.is_contiguous() and torch.equal(weight, before)


def test_an_enabled_method_runs_in_every_stage(pipe):
    def stages(**options):
        return generate_high_resolution(pipe, "a red cat", STAGES, call=CALL, **options)

    with dittfast.enable(pipe, "local", dense_first_steps=1, **LOCAL):
        done = stages(method=None)
        small = draw(pipe, *STAGES[0], seed=0)
        with pytest.raises(ValueError, match="method=None"):
            stages()
    assert np.array_equal(done[0].run.frames[0], small)
    assert done[1].description.method.window == 3


def test_guidance_in_every_stage(pipe):
    guidance = dittfast.HeadGuidance(heads=((0, 0),))
    done = generate_high_resolution(
        pipe, "a red cat", STAGES, call=CALL, seed=5, method=None, ntk_factor=1, guidance=guidance
    )
    with guide(pipe, guidance):
        small = draw(pipe, *STAGES[0], seed=5)
    assert np.array_equal(done[0].run.frames[0], small)
    unguided = generate_high_resolution(
        pipe, "a red cat", STAGES, call=CALL, seed=5, method=None, ntk_factor=1
    )
    assert not np.array_equal(done[1].run.frames, unguided[1].run.frames)


def test_an_error_leaves_the_pipeline_as_it_was(pipe, monkeypatch):
    theta = pipe.transformer.pos_embed.theta
    calls = []

    def failing(*arguments, **options):
        calls.append(pipe.transformer.pos_embed.theta)
        raise KeyboardInterrupt

    monkeypatch.setattr("diffusers.FluxImg2ImgPipeline.prepare_latents", failing)
    with pytest.raises(KeyboardInterrupt):
        generate_high_resolution(pipe, "a red cat", STAGES, call=CALL, **LOCAL)
    assert calls == [10 * theta] and pipe.transformer.pos_embed.theta == theta
    with pytest.raises(ValueError, match="not enabled"):
        dittfast.disable(pipe)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(stages=[(48, 64)]), "at least two"),
        (dict(stages=[(48, 64), (48, 64)]), "larger than the one before"),
        (dict(stages=[(48, 64), (96, 96)]), "shape"),
        (dict(stages=[(48, 64), (96, 130)]), "multiple of"),
        (dict(strength=0.0), r"strength.*0\.0"),
        (dict(strength=[0.5, 0.5]), "2 strengths for 2 stages"),
        (dict(compare=True, method=None), "nothing to compare"),
        (dict(compare=True, runs=0), "runs must be at least 1"),
        (dict(call=dict(height=48)), "call holds height"),
        (dict(ntk_factor=0), "ntk_factor"),
        (dict(method="locl"), "local"),
        (dict(windw=3), "window"),
        (dict(prompt=" "), "prompt is empty"),
        (dict(call=dict(steps=3)), "steps"),
        (dict(method=None, window=3), "no method"),
    ],
)
def test_bad_input(pipe, options, message, monkeypatch):
    monkeypatch.setattr(type(pipe), "encode_prompt", lambda *a, **k: pytest.fail("it drew"))
    arguments = dict(prompt="a red cat", stages=STAGES, call=CALL) | options
    with pytest.raises(ValueError, match=message):
        generate_high_resolution(pipe, **arguments)


def test_videos_are_refused():
    with pytest.raises(ValueError, match="videos"):
        generate_high_resolution(tiny.wan_pipeline(), "a red cat", STAGES)


def test_the_command_line(pipe, tmp_path, capsys):
    pipe.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    out.mkdir()
    arguments = [
        "generate", "a red cat", "--model", str(tmp_path / "model"), "-o", str(out / "a.png"),
        "--stages", "48x64,96x128", "--steps", "3", "--max-sequence-length", "12", "--seed", "5",
        "--guidance-scale", "3.5", "--device", "cpu", "--strength", "0.5",
    ]  # fmt: skip
    method = ["--method", "local", "--set", "window=3", "--set", "tile=[1,4,4]"]
    assert main([*arguments, *method, "--set", "min_tokens=0", "--save-all"]) == 0
    done = generate_high_resolution(
        pipe, "a red cat", STAGES, call=CALL, seed=5, strength=0.5, **LOCAL
    )
    # The reloaded weights lie elsewhere in memory, which moves sums by a rounding or two.
    drawn = np.asarray(Image.open(out / "a.png")).astype(int)
    assert np.abs(drawn - done[1].run.frames[0]).max() <= 1
    assert np.array_equal(np.asarray(Image.open(out / "a.stage-1.png")), done[0].run.frames[0])
    data = json.loads((out / "a.json").read_text())
    assert [s["steps"] for s in data["stages"]] == [3, 2]
    density = data["stages"][1]["attention"]["density"]
    assert f"density {density:.3f}" in capsys.readouterr().out
    for extra in (["--compare"], ["--height", "64"], ["--stages", "a"]):
        assert main([*arguments, *extra]) == 2
    assert main([*arguments[:6], "--strength", "0.5"]) == 2
    assert "--stages" in capsys.readouterr().err


def test_the_command_line_compares_the_last_stage(pipe, tmp_path, capsys):
    """Dense attention and the method from one picture and noise; the sample's own settings."""
    pipe.save_pretrained(tmp_path / "model")
    later = {"guidance_scale": 1.0, "num_inference_steps": 2}
    own = {
        "stages": {"strength": 0.5, "ntk_factor": 1.0, "later_call": later},
        "max_sequence_length": 12,
    }
    (tmp_path / "model" / "sample.json").write_text(json.dumps(own))
    arguments = [
        "generate", "a red cat", "--model", str(tmp_path / "model"), "-o", str(tmp_path / "a.png"),
        "--stages", "48x64,96x128", "--steps", "3", "--seed", "5", "--device", "cpu",
        "--method", "local", "--set", "window=3", "--set", "tile=[1,4,4]", "--compare",
        "--save-all",
    ]  # fmt: skip
    assert main(arguments) == 0
    later = {"guidance_scale": 1.0}  # --steps was given and stays
    small, dense = by_hand(pipe, 0.5, later=later)
    _, local = by_hand(pipe, 0.5, later=later, **LOCAL, proportional=6 * 8 + 12)
    for name, wanted in (("stage-1", small), ("dense", dense), ("local", local)):
        drawn = np.asarray(Image.open(tmp_path / f"a.{name}.png")).astype(int)
        assert np.abs(drawn - wanted).max() <= 1
    assert np.abs(dense.astype(int) - local).max() > 5
    data = json.loads((tmp_path / "a.json").read_text())
    assert [s["strength"] for s in data["stages"]] == [None, 0.5]
    assert data["dense"]["density"] == 1 and 0 < data["sparse"]["density"] < 1
    ratio = data["dense_over_sparse"]["per_step"]
    assert f"{ratio:.2f}x a step" in capsys.readouterr().out
    assert Image.open(tmp_path / "a.png").width > 3 * 128
