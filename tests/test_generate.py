"""Loading pipelines, and runs that are timed and compared, on tiny real pipelines."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from tiny import assert_same_picture, flux_pipeline, wan_pipeline

import dittfast
from dittfast.methods import Dense, Local
from dittfast.pipelines.runs import sources
from dittfast.pipelines.runs.call import call_arguments, check_ranges, size_multiples
from dittfast.pipelines.runs.compare import generate, quality, record
from dittfast.pipelines.runs.run import run
from dittfast.schedule import Schedule

CALL = dict(prompt="a red cat", height=64, width=96, num_inference_steps=3, max_sequence_length=12)
LOCAL = Local(window=3, tile=(1, 4, 4))


@pytest.fixture(scope="module")
def pipe():
    return flux_pipeline()


@pytest.fixture(scope="module")
def video_pipe():
    return wan_pipeline()


def by_hand(pipe, seed=0, **changes):
    """The picture of a stock call, ``[H, W, 3]`` uint8."""
    generator = torch.Generator().manual_seed(seed)
    image = pipe(**CALL | changes, generator=generator, output_type="np").images[0]
    return (image * 255).round().astype(np.uint8)


def test_a_run_is_the_stock_call(pipe):
    result = run(pipe, CALL, seed=3)
    assert np.array_equal(result.frames, by_hand(pipe, 3)[None])
    assert not np.array_equal(result.frames, by_hand(pipe, 4)[None])
    timing = result.timing
    assert len(timing.steps) == 3 and min(timing.steps) > 0 and timing.decode > 0
    parts = timing.prompt + sum(timing.steps) + timing.decode
    assert parts == pytest.approx(timing.total, rel=1e-6)
    assert not pipe.transformer._forward_pre_hooks


def test_a_video_run_has_frames(video_pipe):
    call = dict(
        prompt="a dog", height=48, width=80, num_frames=9, num_inference_steps=2,
        max_sequence_length=12,
    )  # fmt: skip
    result = run(video_pipe, call)
    assert result.frames.shape == (9, 48, 80, 3) and len(result.timing.steps) == 2


def test_hooks_go_when_a_run_fails(pipe):
    with pytest.raises(ValueError):
        run(pipe, CALL | {"max_sequence_length": 10**6})
    assert not pipe.transformer._forward_pre_hooks


def test_pictures_that_are_not_finite_are_refused():
    pipe = flux_pipeline()
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"100.0% .* not finite"):
        run(pipe, CALL)


def test_compare_draws_both_arms_from_one_noise(pipe):
    stages = []
    arms = generate(pipe, CALL, LOCAL, compare=True, runs=2, on_stage=stages.append)
    assert stages == [
        "dense, warm-up", "local, warm-up", "dense, run 1 of 2", "local, run 1 of 2",
        "local, run 2 of 2", "dense, run 2 of 2",
    ]  # fmt: skip
    dense, sparse = arms
    assert [a.name for a in arms] == ["dense", "local"]
    assert np.array_equal(dense.run.frames[0], by_hand(pipe))
    with dittfast.enable(pipe, LOCAL):
        assert np.array_equal(sparse.run.frames[0], by_hand(pipe))
    assert not np.array_equal(dense.run.frames, sparse.run.frames)
    assert [len(a.timings) for a in arms] == [2, 2]
    steps = [s for t in sparse.timings for s in t.steps]
    assert sparse.seconds_per_step == pytest.approx(np.median(steps)) and len(steps) == 6
    assert dense.density == 1.0 and dense.description is None
    assert 0 < sparse.density < 1
    with pytest.raises(ValueError, match="not enabled"):
        dittfast.describe(pipe)


def test_the_warm_up_runs_the_method_whatever_the_schedule(pipe, monkeypatch):
    from dittfast.pipelines.runs import compare as module

    seen = []
    enable = module.enable
    monkeypatch.setattr(
        module, "enable", lambda *a, **k: seen.append(k["schedule"]) or enable(*a, **k)
    )
    schedule = Schedule(dense_first_steps=2, dense_last_steps=1, dense_layers=(0,))
    generate(pipe, CALL, LOCAL, schedule, compare=True)
    warm = dataclasses.replace(schedule, dense_first_steps=0, dense_last_steps=0)
    assert seen == [warm, schedule]


def test_the_schedule_is_followed(pipe):
    everywhere = Schedule(dense_first_steps=3)
    (arm,) = generate(pipe, CALL, LOCAL, everywhere)
    assert np.array_equal(arm.run.frames[0], by_hand(pipe))


def test_a_full_plan_draws_what_dense_attention_draws(pipe):
    dense, planned = generate(pipe, CALL, Dense(block_size=32), compare=True)
    found = quality(dense.run, planned.run)
    assert found["identical"] or found["psnr_db"] > 70


def test_below_min_tokens_everything_is_dense(pipe):
    dense, sparse = generate(pipe, CALL, LOCAL, Schedule(min_tokens=10**6), compare=True)
    assert sparse.density == 1.0
    assert quality(dense.run, sparse.run) == {
        "identical": True,
        "psnr_db": None,
        "ssim": pytest.approx(1),
    }


def test_the_record_is_json_and_true(pipe):
    source = sources.Source("folder", "tiny", "/somewhere")
    arms = generate(pipe, CALL, LOCAL, compare=True, seed=7)
    data = json.loads(json.dumps(record(pipe, source, CALL, 7, arms), allow_nan=False))
    assert data["prompt"] == "a red cat" and data["seed"] == 7 and data["model"] == "tiny"
    assert data["call"] == {k: v for k, v in CALL.items() if k != "prompt"}
    assert data["attention"]["method"]["window"] == 3
    assert data["attention"]["num_tokens"] == 8 * 12 + 12
    assert data["versions"]["torch"] == torch.__version__
    assert data["device"]["type"] == "cpu" and data["dtype"] == "float32"
    ratio = data["dense"]["seconds"] / data["sparse"]["seconds"]
    assert data["dense_over_sparse"]["whole"] == pytest.approx(ratio)
    a, b = (arm.run.frames.astype(float) / 255 for arm in arms)
    expected = -10 * math.log10(((a - b) ** 2).mean())
    assert data["against_dense"]["psnr_db"] == pytest.approx(expected, abs=1e-6)
    (arm,) = generate(pipe, CALL)
    alone = record(pipe, source, CALL, 0, [arm])
    assert alone["attention"] is None and "not warmed up" in alone["measured"]


def test_sizes_the_pipeline_would_round_are_refused(pipe, video_pipe):
    assert size_multiples(pipe) == (8, 8)
    assert size_multiples(video_pipe) == (16, 16)
    assert call_arguments(pipe, "a", height=64, width=72)["width"] == 72
    with pytest.raises(ValueError, match=r"multiple of 8 .* got 60; the nearest is 56 or 64"):
        call_arguments(pipe, "a", height=60)
    with pytest.raises(ValueError, match="got 3; the nearest is 8"):
        call_arguments(pipe, "a", width=3)
    assert call_arguments(video_pipe, "a", num_frames=9)["num_frames"] == 9
    with pytest.raises(ValueError, match=r"multiple of 4 plus 1 .* got 8; the nearest is 9 or 5"):
        call_arguments(video_pipe, "a", num_frames=8)


def test_arguments_come_from_the_user_then_the_sample(pipe):
    settings = {"height": 64, "width": 64, "true_cfg_scale": 3.0, "labels": ["cat"], "prompts": []}
    call = call_arguments(pipe, "a cat", settings, width=96, height=None, guidance_scale=1.5)
    expected = dict(prompt="a cat", height=64, width=96, true_cfg_scale=3.0, guidance_scale=1.5)
    assert call == expected
    with pytest.raises(ValueError, match="FluxPipeline takes no num_frames"):
        call_arguments(pipe, "a cat", num_frames=9)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(prompt=" "), "the prompt is empty"),
        (dict(prompt="a", height=-64), "height must be at least 1, got -64"),
        (dict(prompt="a", num_inference_steps=0), "num_inference_steps must be at least 1, got 0"),
        (dict(prompt="a", guidance_scale=math.nan), "guidance_scale must be a finite number"),
        (dict(prompt="a", seed=-1), r"seed must lie in 0\.\."),
        (dict(prompt="a", seed=2**63), r"seed must lie in 0\.\."),
        (dict(prompt="a", runs=0), "runs must be at least 1, got 0"),
    ],
)
def test_ranges(values, message):
    with pytest.raises(ValueError, match=message):
        check_ranges(**values)


def test_nothing_to_compare(pipe):
    with pytest.raises(ValueError, match="choose a method"):
        generate(pipe, CALL, compare=True)


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny-flux"
    pipe.save_pretrained(path)
    return path


def test_a_folder_is_found_and_loads(pipe, folder):
    source = sources.find(str(folder))
    assert (source.kind, source.name, source.settings) == ("folder", "tiny-flux", {})
    loaded = sources.load(source, "cpu", torch.float32)
    assert_same_picture(run(loaded, CALL).frames[0], by_hand(pipe))
    assert sources.load(source, "cpu", torch.bfloat16).transformer.dtype == torch.bfloat16


def test_a_sample_model_is_found_by_name(folder, monkeypatch):
    (folder / "sample.json").write_text('{"height": 64}')
    monkeypatch.setattr(sources, "sample_models", lambda: {"tiny-flux": folder})
    source = sources.find("tiny-flux")
    assert (source.kind, source.location) == ("sample", str(folder))
    assert source.settings == {"height": 64}
    with pytest.raises(FileNotFoundError, match="Did you mean 'tiny-flux'"):
        sources.find("tiny-fluks")
    (folder / "sample.json").write_text("{")
    with pytest.raises(ValueError, match=r"sample\.json: it is not valid JSON"):
        sources.find("tiny-flux")
    (folder / "sample.json").unlink()


def test_what_is_no_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"without a model_index\.json"):
        sources.find(str(tmp_path))
    (tmp_path / "weights.safetensors").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        sources.find(str(tmp_path / "weights.safetensors"))
    assert sources.find("someone/something").kind == "hub"


@pytest.mark.parametrize("file", ["model_index.json", "vae/diffusion_pytorch_model.safetensors"])
def test_a_damaged_folder_is_an_error_in_one_place(folder, tmp_path, file):
    import shutil

    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    (damaged / file).write_text("{")
    with pytest.raises(ValueError, match=r"could not load the pipeline in .*damaged"):
        sources.load(sources.find(str(damaged)))


def test_a_hub_id_without_a_network(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="hf download someone/something --local-dir"):
        sources.load(sources.find("someone/something"))


def test_devices_and_dtypes():
    cpu = torch.device("cpu")
    assert sources.choose_device("cpu") == cpu
    assert sources.choose_dtype("auto", cpu) == torch.float32
    assert sources.choose_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert sources.choose_dtype("float16", cpu) == torch.float16
    with pytest.raises(ValueError, match="'tpux' is no device"):
        sources.choose_device("tpux")
    with pytest.raises(ValueError, match="there is no device cuda:99 here; found cpu"):
        sources.choose_device("cuda:99")
    with pytest.raises(ValueError, match="dtype must be one of"):
        sources.choose_dtype("int8", cpu)
