"""Sample models that are called with a prompt alone, against stock diffusers told everything."""

import inspect
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, WanImageToVideoPipeline
from PIL import Image
from tiny import flux_pipeline, wan_image_pipeline, wan_pipeline

import dittfast
from dittfast.pipelines.runs.call import call_arguments
from dittfast.pipelines.runs.first_frame import FirstFrame
from dittfast.pipelines.runs.run import run
from dittfast.pipelines.runs.sources import find

PROMPT = "a red cat moves right"
IMAGE = dict(height=64, width=96, num_inference_steps=2, max_sequence_length=12)
VIDEO = dict(
    height=48, width=80, num_frames=5, num_inference_steps=2, max_sequence_length=12,
    guidance_scale=1.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of an image model and of a video model that starts from its pictures."""
    folder = tmp_path_factory.mktemp("models")
    flux_pipeline().save_pretrained(folder / "image")
    (folder / "image" / "sample.json").write_text(json.dumps(IMAGE | {"labels": ["cat"]}))
    wan_image_pipeline().save_pretrained(folder / "video")
    shutil.copytree(folder / "image", folder / "video" / "image")  # nothing else is followed
    first = {"model": "image", "part": 0.5, "moving_words": ["moves right"]}
    (folder / "video" / "sample.json").write_text(json.dumps(VIDEO | {"first_frame": first}))
    wan_pipeline().save_pretrained(folder / "other")
    return folder


def noise(seed=3):
    return torch.Generator().manual_seed(seed)


def test_what_a_call_leaves_out_is_as_the_model_was_trained(models):
    pipe = dittfast.sample(str(models / "image"), device="cpu")
    stock = DiffusionPipeline.from_pretrained(models / "image", dtype=torch.float32)
    assert isinstance(pipe, FluxPipeline) and pipe.dtype == torch.float32
    assert inspect.signature(pipe.__call__) == inspect.signature(stock.__call__)
    assert pipe.call_defaults == IMAGE

    def drawn(pipe, *args, **call):
        return pipe(*args, generator=noise(), output_type="np", **call).images

    assert np.array_equal(drawn(pipe, PROMPT), drawn(stock, PROMPT, **IMAGE))
    other = {"height": 32, "num_inference_steps": 3}
    assert np.array_equal(drawn(pipe, PROMPT, **other), drawn(stock, PROMPT, **IMAGE | other))
    with dittfast.enable(stock, "local", window=2, min_tokens=0):
        local = drawn(stock, PROMPT, **IMAGE)
    with dittfast.enable(pipe, "local", window=2, min_tokens=0):
        assert np.array_equal(drawn(pipe, PROMPT), local)
    assert not np.array_equal(drawn(pipe, PROMPT), local)


def test_stages_begin_with_the_same_defaults(models):
    pipes = (
        dittfast.sample(str(models / "image"), device="cpu"),
        DiffusionPipeline.from_pretrained(models / "image", dtype=torch.float32),
    )
    stages = [(64, 96), (128, 192)]
    told = {name: IMAGE[name] for name in ("num_inference_steps", "max_sequence_length")}
    one, two = (
        dittfast.generate_high_resolution(pipe, PROMPT, stages, call=call, window=2, min_tokens=0)
        for pipe, call in zip(pipes, ({}, told))
    )
    for a, b in zip(one, two):
        assert np.array_equal(a.run.frames, b.run.frames)


def test_a_clip_starts_from_a_picture_of_its_prompt(models):
    """The picture has the generator's seed, or one from PyTorch's own numbers."""
    pipe = dittfast.sample(str(models / "video"), device="cpu")
    stock = DiffusionPipeline.from_pretrained(models / "video", dtype=torch.float32)
    assert isinstance(pipe, WanImageToVideoPipeline)
    settings = find(str(models / "video")).settings
    first = FirstFrame(settings["first_frame"], VIDEO["height"], VIDEO["width"])
    call = call_arguments(stock, PROMPT, settings)
    for _ in range(2):  # the second time with the same image model
        clip = pipe(PROMPT, generator=noise(), output_type="np").frames[0]
        wanted = run(stock, call | {"image": first}, seed=3).frames
        assert np.array_equal(np.rint(clip * 255).astype(np.uint8), wanted)
    given = Image.new("RGB", (80, 48), "red")
    clip = pipe(given, PROMPT, generator=noise(), output_type="np").frames[0]
    wanted = run(stock, call | {"image": given}, seed=3).frames
    assert np.array_equal(np.rint(clip * 255).astype(np.uint8), wanted)
    clips = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        clips.append(pipe(PROMPT, output_type="np").frames[0])
    assert np.array_equal(clips[0], clips[1]) and not np.array_equal(clips[0], clips[2])
    with pytest.raises(ValueError, match=r"one prompt.*pass image"):
        pipe(prompt=[PROMPT, PROMPT])


def test_what_is_no_sample_model_is_refused(models):
    with pytest.raises(ValueError, match="no sample model; these are sample-flux, sample-"):
        dittfast.sample("black-forest-labs/FLUX.1-dev")
    with pytest.raises(ValueError, match="no sample model"):
        dittfast.sample(str(models / "other"))
    with pytest.raises(FileNotFoundError, match="Did you mean 'sample-flux'"):
        dittfast.sample("sample-flx")
    with pytest.raises(ValueError, match="no device xpu"):
        dittfast.sample("sample-flux", device="xpu")
