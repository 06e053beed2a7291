"""The training set: what is recorded, how it is written, in which order it is read."""

from __future__ import annotations

import dataclasses
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from distill_run import CALLS, MAKE, make_config, one_thread, write_config  # noqa: F401
from PIL import Image

from dittfast.distill import prepare as preparing
from dittfast.distill.conditioning import condition, draw, encode, unflatten
from dittfast.distill.config import DataConfig, load_config
from dittfast.distill.loader import Batch, Dataset, Prefetch, global_batches, mixed_batches
from dittfast.distill.noise import generator
from dittfast.distill.pictures import find_pictures, read_frames
from dittfast.distill.prepare import plan_items, prepare
from dittfast.distill.windows import window
from dittfast.files import save_video
from dittfast.pipelines.runs.sources import find, load


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distill-data")


@pytest.fixture(scope="module", params=MAKE)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(family):
    return MAKE[family]()


def seen_by_transformer(pipe, call):
    """Every forward call of the transformer, and the final latents, seen from outside."""
    calls, forward = [], pipe.transformer.forward

    def spy(*args, **kwargs):
        calls.append(kwargs)
        return forward(*args, **kwargs)

    pipe.transformer.forward = spy
    try:
        out = pipe(**call, generator=torch.Generator().manual_seed(3), output_type="latent")
    finally:
        del pipe.transformer.forward
    return calls, out.images if hasattr(out, "images") else out.frames


def test_records_what_the_pipeline_passes(pipe, family):
    call = CALLS[family] | {"prompt": "a red cat"}
    calls, latents = seen_by_transformer(pipe, call)
    generator = torch.Generator().manual_seed(3)
    drawn, found = draw(pipe, pipe.transformer, call | {"generator": generator})
    assert torch.equal(drawn, latents)
    expected = {k: v for k, v in calls[0].items() if torch.is_tensor(v)}
    assert found.latent_shape == expected.pop("hidden_states").shape
    assert found.timestep == float(expected.pop("timestep")[0])
    assert {*found.own, *found.shared} == {*expected}
    for name, x in {**found.own, **found.shared}.items():
        assert torch.equal(x, expected[name]), name
    assert set(found.shared) == ({"img_ids", "txt_ids"} if family == "flux" else set())
    assert pipe.transformer._forward_pre_hooks == {}


def test_conditioning_alone_denoises_nothing(pipe, family, monkeypatch):
    call = CALLS[family] | {"prompt": "a blue dog"}
    calls, _ = seen_by_transformer(pipe, call)
    monkeypatch.setattr(pipe.transformer, "forward", None)
    found = condition(pipe, pipe.transformer, call)
    for name, x in found.own.items():
        assert torch.equal(x, calls[0][name]), name
    assert pipe.transformer._forward_pre_hooks == {}


def test_batched_guidance_gives_the_prompts_half():
    class Model(torch.nn.Module):
        def forward(self, hidden_states, timestep, encoder_hidden_states, rotary, scale=None):
            return hidden_states

    model = Model()
    text = torch.stack([torch.zeros(4, 3), torch.ones(4, 3)])
    rotary = (torch.rand(5, 2), torch.rand(5, 2))

    def pipe(**call):
        model(torch.zeros(2, 5, 3), torch.tensor(999), text, rotary, scale={"a": [1, 2.0]})

    found = condition(pipe, model, {})
    assert torch.equal(found.own["encoder_hidden_states"], text[1:])
    assert found.constants == {"scale": {"a": [1, 2.0]}} and found.latent_shape == (1, 5, 3)
    again = unflatten({**found.constants, **found.shared, **found.own})
    assert all(torch.equal(a, b) for a, b in zip(again["rotary"], rotary))


def test_pipelines_that_cannot_be_cached_are_refused():
    class Model(torch.nn.Module):
        def forward(self, hidden_states, timestep, extra=None):
            return hidden_states

    model, x, t = Model(), torch.zeros(1, 5, 3), torch.tensor(1.0)
    with pytest.raises(ValueError, match="extra as function"):
        condition(lambda **call: model(x, t, extra=lambda: 0), model, {})
    with pytest.raises(ValueError, match="'timestep'"):
        condition(lambda **call: model(x, 1.0), model, {})
    with pytest.raises(ValueError, match="never called its Model"):
        condition(lambda **call: None, model, {})


def test_encode_is_what_the_pipeline_decodes(pipe, family):
    """Oracle: the pipeline's own decoding, on latents that the encoder made."""
    height, width = 64, 96
    frames = 9 if family == "wan" else 1
    y, x = np.mgrid[:height, :width]
    picture = np.stack([x * 2, y * 3, x + y], -1).clip(0, 255).astype(np.uint8)
    pixels = torch.from_numpy(picture)[None].repeat(frames, 1, 1, 1)
    call = CALLS[family] | {"prompt": "a cat", "height": height, "width": width}
    shape = condition(pipe, pipe.transformer, call).latent_shape
    latents = encode(pipe, pixels, shape)
    assert latents.shape == shape
    signal = pixels.movedim(-1, 1).float() / 127.5 - 1
    vae, config = pipe.vae, pipe.vae.config
    if family == "wan":
        raw = vae.encode(signal.movedim(0, 1)[None]).latent_dist.mode()
        mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in
                     (config.latents_mean, config.latents_std))  # fmt: skip
        torch.testing.assert_close(latents * std + mean, raw)
    else:
        raw = vae.encode(signal).latent_dist.mode()
        back = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
        torch.testing.assert_close(back / config.scaling_factor + config.shift_factor, raw)
    with pytest.raises(ValueError, match=r"data\.call\.height"):
        encode(pipe, pixels[:, :32], shape)


def test_prepared_set_holds_the_teachers_latents(folder, family):
    config = make_config(folder, family)
    dataset = Dataset(config.data.folder)
    assert len(dataset) == 6 and len(set(dataset.shapes)) == 1
    assert dataset.process.kind == "flow"
    assert dataset.process.time_scale == (1000.0 if family == "wan" else 1.0)
    pipe = load(find(config.model.path))
    call = CALLS[family] | {"prompt": dataset.manifest["prompts"][5]}
    drawn, found = draw(
        pipe, pipe.transformer, call | {"generator": torch.Generator().manual_seed(5)}
    )
    negative = condition(pipe, pipe.transformer, call | {"prompt": call.get("negative_prompt", "")})
    batch = dataset.batch([5, 2], [False, True])
    close = {"rtol": 1e-5, "atol": 1e-5}  # two copies of a model may lie differently in memory
    torch.testing.assert_close(batch.latents[:1], drawn.float(), **close)
    for name, x in found.own.items():
        torch.testing.assert_close(batch.arguments[name][:1], x, **close)
        torch.testing.assert_close(batch.arguments[name][1:], negative.own[name], **close)
    for name, x in found.shared.items():
        assert torch.equal(batch.arguments[name], x), name


def test_prepare_goes_on_where_it_stopped_and_in_any_number_of_processes(folder, tmp_path):
    config = make_config(folder)
    source = find(config.model.path)
    pipe = load(source)
    whole = tmp_path / "whole"
    prepare(pipe, "transformer", source, dataclasses.replace(config.data, folder=str(whole)))

    class Stopped(BaseException):
        pass

    partly = dataclasses.replace(config.data, folder=str(tmp_path / "partly"))
    sample, left = preparing._sample, [5]

    def stop(*args):
        left[0] -= 1
        if left[0] < 0:
            raise Stopped
        return sample(*args)

    preparing._sample = stop
    try:
        with pytest.raises(Stopped):
            prepare(pipe, "transformer", source, partly)
    finally:
        preparing._sample = sample
    names = sorted(p.name for p in Path(partly.folder).iterdir())
    files = ["negative.json", "negative.safetensors", "shard-00000.json"]
    assert names == ["data.json", *files, "shard-00000.safetensors"]
    with pytest.raises(ValueError, match=r"2 of 6 files.*shard-00001"):
        Dataset(partly.folder)
    prepare(pipe, "transformer", source, partly)
    split = dataclasses.replace(config.data, folder=str(tmp_path / "split"))
    for index in (1, 0):
        prepare(pipe, "transformer", source, split, index, 2)
    for other in (partly, split):
        for file in whole.iterdir():
            assert (Path(other.folder) / file.name).read_bytes() == file.read_bytes(), file.name
    changed = dataclasses.replace(split, seed=7)
    with pytest.raises(ValueError, match=r"another training set \(different: seeds\)"):
        prepare(pipe, "transformer", source, changed)
    # A set of an earlier version, whose manifest lacks a field of the noise process.
    manifest = json.loads((whole / "data.json").read_text())
    del manifest["process"]["noise_scale"], manifest["sha256"]
    (whole / "data.json").write_text(json.dumps(manifest))
    prepare(pipe, "transformer", source, dataclasses.replace(config.data, folder=str(whole)))
    assert Dataset(whole).process.noise_scale == 1.0


def test_prepare_from_pictures(folder, tmp_path):
    pictures = tmp_path / "pictures"
    (pictures / "more").mkdir(parents=True)
    for name, colour, size in (("b.png", "red", (200, 100)), ("more/a.jpg", "blue", (96, 64))):
        Image.new("RGB", size, colour).save(pictures / name)
    (pictures / "b.txt").write_text("a red cat\n")
    row = {"file_name": "more/a.jpg", "text": "a blue dog"}
    (pictures / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    assert [p.caption for p in find_pictures(pictures)] == ["a red cat", "a blue dog"]
    data = {
        "pictures": str(pictures),
        "prompts": [],
        "count": None,
        "folder": str(tmp_path / "d"),
    }
    config = load_config(write_config(folder, data=data))
    pipe = MAKE["flux"]()
    prepare(pipe, "transformer", find(config.model.path), config.data)
    dataset = Dataset(config.data.folder)
    frames = torch.from_numpy(read_frames(pictures / "more/a.jpg", 64, 96))
    expected = encode(pipe, frames, (1, 96, 16))
    assert dataset.manifest["from"] == "pictures"
    assert torch.equal(dataset.batch([1]).latents, expected)
    (pictures / "b.txt").unlink()
    with pytest.raises(ValueError, match=r"b\.png has no caption.*b\.txt"):
        find_pictures(pictures)


def test_a_clip_is_animated_from_its_own_first_frame(tmp_path):
    """Image to video: the condition behind the noisy channels is the sample's, prompt or not."""
    import tiny

    clips = tmp_path / "clips"
    clips.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        frames = np.repeat(rng.integers(0, 255, (1, 3, 5, 3), dtype=np.uint8), 12, 0)
        frames = frames.repeat(16, 1).repeat(16, 2) // (1 + np.arange(12).reshape(-1, 1, 1, 1))
        save_video(clips / f"{i}.gif", frames.astype(np.uint8))
        (clips / f"{i}.txt").write_text("a red car moves left")
    tiny.wan_image_pipeline().save_pretrained(tmp_path / "model")
    source = find(str(tmp_path / "model"))
    pipe = load(source)
    call = dict(height=48, width=80, num_frames=9, max_sequence_length=12, guidance_scale=3.0)
    config = DataConfig(str(tmp_path / "data"), pictures=str(clips), call=call)
    prepare(pipe, "transformer", source, config)
    batch = Dataset(config.folder).batch([0, 2], [False, True])
    assert batch.latents.shape == (2, 16, 3, 6, 10)
    for row, index in enumerate((0, 2)):
        frames = read_frames(clips / f"{index}.gif", 48, 80, 9)
        calls, _ = seen_by_transformer(
            pipe, call | {"prompt": "a red car moves left", "image": Image.fromarray(frames[0]),
                          "negative_prompt": "", "num_inference_steps": 1},
        )  # fmt: skip
        seen = calls[0]["hidden_states"]
        assert seen.shape[1] == 36
        torch.testing.assert_close(batch.arguments["hidden_states"][row : row + 1], seen[:, 16:])
        text = calls[row]["encoder_hidden_states"]  # the prompt's pass comes first
        torch.testing.assert_close(batch.arguments["encoder_hidden_states"][row : row + 1], text)
        expected = encode(pipe, torch.from_numpy(frames), (1, 16, 3, 6, 10))
        torch.testing.assert_close(batch.latents[row : row + 1], expected)
    assert not torch.equal(*batch.arguments["hidden_states"].split(1))
    wrong = DataConfig(str(tmp_path / "no"), pictures=str(clips), call={"hight": 48})
    with pytest.raises(ValueError, match=r"data\.call\.hight.*'data\.call\.height'"):
        prepare(pipe, "transformer", source, wrong)
    no_size = DataConfig(str(tmp_path / "no"), pictures=str(clips), call={"height": 48})
    with pytest.raises(ValueError, match=r"data\.call needs height and width"):
        prepare(pipe, "transformer", source, no_size)


def test_pictures_cover_the_size_and_are_cut_in_the_middle(tmp_path):
    wide = np.zeros((50, 200, 3), np.uint8)
    wide[:, 75:125] = 255
    Image.fromarray(wide).save(tmp_path / "a.png")
    frames = read_frames(tmp_path / "a.png", 50, 50)
    assert frames.shape == (1, 50, 50, 3) and (frames == 255).all()
    assert read_frames(tmp_path / "a.png", 100, 30).shape == (1, 100, 30, 3)
    with pytest.raises(ValueError, match=r"1 frames, .*num_frames is 5"):
        read_frames(tmp_path / "a.png", 50, 50, 5)
    from dittfast.files import save_video

    clip = np.random.default_rng(0).integers(0, 255, (6, 32, 48, 3), dtype=np.uint8)
    save_video(tmp_path / "a.mp4", clip)
    assert read_frames(tmp_path / "a.mp4", 32, 32, 5).shape == (5, 32, 32, 3)


def test_items(tmp_path):
    config = load_config(write_config(tmp_path)).data
    assert [i.prompt for i in plan_items(config)][4:] == ["a red cat", "a blue dog"]
    assert [i.seed for i in plan_items(dataclasses.replace(config, seed=9))] == list(range(9, 15))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        plan_items(dataclasses.replace(config, prompts=("nowhere.txt",)))
    with pytest.raises(ValueError, match="nothing to prepare"):
        plan_items(dataclasses.replace(config, prompts=()))
    listed = dataclasses.replace(config, prompts=("a", "b.txt"), count=None)
    assert [i.prompt for i in plan_items(listed)] == ["a", "b.txt"]
    Path(config.prompts[0]).write_text("\n")
    with pytest.raises(ValueError, match="no prompt"):
        plan_items(config)


def test_no_set():
    with pytest.raises(FileNotFoundError, match="dittfast distill prepare"):
        Dataset("nowhere")


def test_order():
    shapes = ["wide"] * 7 + ["tall"] * 5
    first = list(islice(global_batches(shapes, 2, seed=1), 60))
    assert list(islice(global_batches(shapes, 2, seed=1), 60)) == first
    assert list(islice(global_batches(shapes, 2, seed=2), 60)) != first
    assert list(islice(global_batches(shapes, 2, seed=1), 40, 60)) == first[40:]
    assert all(len({shapes[i] for i in batch}) == 1 for batch in first)
    counts = np.bincount([i for batch in first for i in batch], minlength=12)
    assert counts.min() >= 9 and counts.max() <= 11  # 10 epochs
    epoch = [i for batch in islice(global_batches(["a"] * 12, 4, seed=0), 3) for i in batch]
    assert sorted(epoch) == list(range(12)) and epoch != sorted(epoch)
    small = list(islice(global_batches(["a"] * 3, 8, seed=0), 3))
    assert all(len(batch) == 8 for batch in small)


def test_sets_take_turns_by_their_shares():
    sets = [["a"] * 5, ["b"] * 7, ["c"] * 3]
    batches = list(islice(mixed_batches(sets, [1.0, 2.0, 0.5], 2, seed=4), 70))
    which = [chosen for chosen, _ in batches]
    assert [which.count(i) for i in range(3)] == [20, 40, 10]
    assert [which[:35].count(i) for i in range(3)] == [10, 20, 5]
    for i, shapes in enumerate(sets):
        own = [indices for chosen, indices in batches if chosen == i]
        assert own == list(islice(global_batches(shapes, 2, seed=4), len(own)))


def test_a_prepared_set_has_scaled_positions(folder, tmp_path):
    config = make_config(folder)
    scaled = dataclasses.replace(config.data, folder=str(tmp_path), position_scale=0.25, count=2)
    prepare(MAKE["flux"](), "transformer", find(config.model.path), scaled)
    plain, found = (Dataset(x).shared()["img_ids"] for x in (config.data.folder, tmp_path))
    rows = torch.arange(8.0).repeat_interleave(12) / 4
    columns = torch.arange(12.0).repeat(8) / 4
    assert torch.equal(found, torch.stack([0 * rows, rows, columns], 1))
    assert torch.equal(plain[:, 1:], 4 * found[:, 1:])
    other = dataclasses.replace(scaled, position_scale=0.5)
    with pytest.raises(ValueError, match=r"another training set .*position_scale"):
        prepare(MAKE["flux"](), "transformer", find(config.model.path), other)


@pytest.mark.parametrize("size", [(3, 5), (1, 1), (7, 9), (20, 4)])
def test_a_window_holds_the_tokens_of_its_positions(size):
    height, width = 7, 9
    latents = torch.arange(2.0 * height * width).view(2, -1, 1)
    rows, columns = torch.meshgrid(torch.arange(7.0), torch.arange(9.0), indexing="ij")
    ids = torch.stack([0 * rows, 0.5 * rows, 0.5 * columns], -1).view(-1, 3)
    batch = Batch(latents, {"img_ids": ids, "txt_ids": torch.zeros(4, 3)})
    seen = torch.zeros(height, width)
    for turn in range(300):
        found = window(batch, size, generator("place", turn))
        h, w = min(size[0], height), min(size[1], width)
        place = 2 * found.arguments["img_ids"][:, 1:]
        top, left = place[0].tolist()
        expected = [(top + i, left + j) for i in range(h) for j in range(w)]
        assert place.tolist() == [list(x) for x in expected]
        tokens = [int(row * width + column) for row, column in expected]
        assert found.latents[0, :, 0].tolist() == tokens
        assert found.latents[1, :, 0].tolist() == [x + height * width for x in tokens]
        seen[int(top) : int(top) + h, int(left) : int(left) + w] += 1
    assert found.arguments["txt_ids"] is batch.arguments["txt_ids"]
    assert seen.min() > 0.3 * seen.median()  # corners and borders are not forgotten


def test_windows_need_one_picture_with_positions():
    latents = torch.zeros(1, 6, 1)
    with pytest.raises(ValueError, match=r"makes them itself, so set train\.crop=null"):
        window(Batch(latents, {}), (2, 2), generator(0))
    ids = torch.tensor([(i, 0, j) for i in (0.0, 1.0) for j in range(3)])
    with pytest.raises(ValueError, match="these have 2 grids and 6 tokens"):
        window(Batch(latents, {"img_ids": ids}), (2, 2), generator(0))


def test_prefetch_keeps_the_order():
    batches = Prefetch(lambda i: i * i, first=3)
    assert [next(batches) for _ in range(4)] == [9, 16, 25, 36]
    batches.close()

    def broken(i):
        raise ValueError("no shard")

    batches = Prefetch(broken, first=0)
    with pytest.raises(ValueError, match="no shard"):
        next(batches)
    batches.close()
