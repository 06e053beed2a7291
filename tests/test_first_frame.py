"""The picture that an image-to-video pipeline starts from, in Python and on the command line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import flux_pipeline, wan_image_pipeline, wan_pipeline

import dittfast
from dittfast.cli import main
from dittfast.methods import Local
from dittfast.pictures import read_picture
from dittfast.pipelines.runs.call import call_arguments, call_record, needs_image
from dittfast.pipelines.runs.first_frame import (
    FirstFrame,
    fit,
    still_prompt,
    with_first_frame,
    with_margin,
)
from dittfast.pipelines.runs.run import run
from dittfast.pipelines.runs.sources import find

CALL = dict(
    height=48, width=80, num_frames=5, num_inference_steps=2, max_sequence_length=12,
    guidance_scale=1.0,
)  # fmt: skip
IMAGE_CALL = dict(height=64, width=96, num_inference_steps=2, max_sequence_length=12)
WORDS = ["moves right", "moves", "is moving"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of an image model and of a video model that starts from its pictures."""
    folder = tmp_path_factory.mktemp("models")
    flux_pipeline().save_pretrained(folder / "video" / "image")
    (folder / "video" / "image" / "sample.json").write_text(json.dumps(IMAGE_CALL))
    wan_image_pipeline().save_pretrained(folder / "video")
    settings = {"model": "image", "part": 0.5, "moving_words": WORDS}
    (folder / "video" / "sample.json").write_text(json.dumps(CALL | {"first_frame": settings}))
    return folder


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (120, 100, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def still(seed=0, prompt="a red cat"):
    """The first frame by hand: drawn, shrunk to half, its edges continued, cut to 80 x 48."""
    out = flux_pipeline()(
        prompt, generator=torch.Generator().manual_seed(seed), output_type="np", **IMAGE_CALL
    )
    drawn = Image.fromarray((out.images[0] * 255).round().astype(np.uint8))
    small = np.asarray(drawn.resize((48, 32), Image.Resampling.LANCZOS))
    rows, columns = np.arange(64).clip(16, 47) - 16, np.arange(96).clip(24, 71) - 24
    page = Image.fromarray(small[rows][:, columns])
    # 80 : 48 is 5 : 3, so of the 64 rows 57.6 are kept.
    return np.asarray(page.resize((80, 48), Image.Resampling.LANCZOS, box=(0, 3.2, 96, 60.8)))


def clip(image, seed=0, **options):
    """What the stock pipeline makes of a first frame: [5, 48, 80, 3] uint8."""
    pipe = wan_image_pipeline()
    if options:
        dittfast.enable(pipe, **options)
    out = pipe(
        Image.fromarray(np.asarray(image)), "a red cat moves right", output_type="np",
        generator=torch.Generator().manual_seed(seed), **CALL,
    )  # fmt: skip
    return np.clip(np.rint(out.frames[0] * 255), 0, 255).astype(np.uint8)


def test_which_pipelines_need_an_image():
    assert needs_image(wan_image_pipeline())
    assert not needs_image(wan_pipeline()) and not needs_image(flux_pipeline())


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("a red cat moves right on a blue background", "a red cat on a blue background"),
        ("a cat, blue background, is moving", "a cat, blue background"),
        ("A cat Moves Right, blue background", "A cat, blue background"),
        ("a cat that removes a hat", "a cat that removes a hat"),
        ("moves", "moves"),
    ],
)
def test_words_of_motion_go(prompt, expected):
    assert still_prompt(prompt, WORDS) == expected
    assert still_prompt(prompt, []) == prompt


def test_a_margin_continues_the_edges():
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30], pixels[:, 30:] = 200, 50
    found = np.asarray(with_margin(Image.fromarray(pixels), 0.5))
    assert found.shape == (40, 60, 3)
    assert (found[:, :22] == 200).all() and (found[:, 38:] == 50).all()
    same = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    assert np.array_equal(np.asarray(with_margin(Image.fromarray(same), 1.0)), same)


def test_a_picture_of_another_shape_is_cut(picture):
    whole = np.asarray(read_picture(picture))
    assert whole.shape == (120, 100, 3)
    assert np.array_equal(np.asarray(fit(read_picture(picture), 120, 60)), whole[:, 20:80])


def test_first_frames_are_drawn_from_the_prompt(models):
    settings = find(str(models / "video")).settings
    pipe = wan_image_pipeline()
    call = with_first_frame(pipe, call_arguments(pipe, "any", settings), settings)
    painter = call["image"]
    assert isinstance(painter, FirstFrame)
    for seed in (3, 4):
        assert np.array_equal(np.asarray(painter("a red cat moves right", seed)), still(seed))
    assert painter("a red cat", 4) is painter("a red cat", 4)
    recorded = call_record({"prompt": "a", "image": painter, "height": 48})
    made = {"model": "image", "part": 0.5, "moving_words": WORDS}
    assert recorded == {"height": 48, "first_frame": made}


def test_a_run_asks_for_the_first_frame_of_its_prompt(models):
    settings = find(str(models / "video")).settings
    pipe = wan_image_pipeline()
    call = with_first_frame(pipe, call_arguments(pipe, "any", settings), settings)
    call |= {"prompt": "a red cat moves right"}
    assert np.array_equal(run(pipe, call, 4).frames, clip(still(4), 4))


def test_images_are_asked_for_and_refused(picture):
    image = read_picture(picture)
    with pytest.raises(ValueError, match="animates an image and got none; pass one with --image"):
        with_first_frame(wan_image_pipeline(), {})
    with pytest.raises(ValueError, match="WanPipeline takes no image; leave out --image"):
        call_arguments(wan_pipeline(), "a", image=image)
    call = with_first_frame(wan_image_pipeline(), {"height": 64, "width": 32, "image": image})
    assert call["image"].size == (32, 64)
    assert len(call_record(call)["first_frame"]["sha256"]) == 64
    assert "image" not in with_first_frame(wan_pipeline(), call_arguments(wan_pipeline(), "a"))


def test_a_head_search_makes_no_first_frames():
    class Drawn:
        def __call__(self, prompt, seed):
            pytest.fail("drew a first frame")

        def to_dict(self):
            return {}

    with pytest.raises(ValueError, match="pass one picture as the call's image"):
        dittfast.hunt(wan_image_pipeline(), lambda images: images, ["a"], call={"image": Drawn()})


def generate(models, out, *arguments):
    base = ["generate", "a red cat moves right", "--model", str(models / "video")]
    return main([*base, "--device", "cpu", "-o", str(out), *arguments])


def test_one_prompt_gives_a_clip(models, tmp_path):
    assert generate(models, tmp_path / "a.png", "--numbered") == 0
    names = [f"a.{n:03}.png" for n in range(5)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names, "a.json"]
    frames = np.stack([np.asarray(Image.open(tmp_path / name)) for name in names])
    assert np.abs(frames.astype(int) - clip(still())).max() <= 1  # saved and loaded: last bits
    data = json.loads((tmp_path / "a.json").read_text())
    assert data["files"] == names
    assert data["call"]["first_frame"]["model"] == "image" and "image" not in data["call"]


def test_a_clip_of_a_given_picture_compared(models, picture, tmp_path, capsys):
    import imageio.v3 as iio

    method = ["--method", "local", "--set", "window=3", "--set", "tile=[1,4,4]"]
    more = ["--image", str(picture), *method, "--compare", "--save-all", "--fps", "8"]
    assert generate(models, tmp_path / "a.mp4", *more) == 0
    data = json.loads((tmp_path / "a.json").read_text())
    assert data["image"] == str(picture) and "sha256" in data["call"]["first_frame"]
    assert data["files"] == ["a.mp4", "a.dense.mp4", "a.local.mp4", "a.difference.mp4"]
    first = fit(read_picture(picture), 48, 80)
    dense = clip(first).astype(float)
    sparse = clip(first, method=Local(window=3, tile=(1, 4, 4)), min_tokens=0).astype(float)
    expected = 10 * np.log10(255**2 / ((dense - sparse) ** 2).mean())
    assert data["against_dense"]["psnr_db"] == pytest.approx(expected, abs=1e-6)
    assert 0 < data["sparse"]["density"] < 1
    written = iio.imread(tmp_path / "a.dense.mp4", plugin="FFMPEG").astype(float)
    assert written.shape == (5, 48, 80, 3)
    # H.264 loses some, more so on noise.
    assert np.abs(written - dense).mean() < np.abs(written - dense[::-1]).mean()
    page = iio.imread(tmp_path / "a.mp4", plugin="FFMPEG")
    assert len(page) == 5 and page.shape[2] > 3 * 80
    assert iio.immeta(tmp_path / "a.mp4", plugin="FFMPEG")["fps"] == 8


def test_a_gif(models, picture, tmp_path):
    assert generate(models, tmp_path / "a.gif", "--image", str(picture)) == 0
    with Image.open(tmp_path / "a.gif") as found:
        assert found.n_frames == 5 and found.size == (80, 48)


def test_mistakes_are_told_in_one_line(models, tmp_path, capsys):
    assert generate(models, tmp_path / "a.mp4", "--image", str(tmp_path / "none.png")) == 2
    assert "no picture at" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
