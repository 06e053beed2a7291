"""Scaled position ids: what the transformer receives, and that nothing else changes."""

import itertools
import json

import numpy as np
import pytest
import tiny
import torch

import dittfast
from dittfast.cli import main
from dittfast.methods import Local
from dittfast.pipelines.measure import parity
from dittfast.pipelines.runs.compare import generate
from dittfast.pipelines.runs.high_resolution import as_record, generate_high_resolution
from dittfast.pipelines.runs.positions import positions_scaled

CALL = dict(num_inference_steps=2, max_sequence_length=12)
LOCAL = dict(window=3, tile=(1, 4, 4), min_tokens=0)


def grid_ids(height, width, scale):
    """FLUX's ids of a picture, row by row, written out."""
    places = itertools.product(range(height), range(width))
    return torch.tensor([(0.0, row * scale, column * scale) for row, column in places])


def received(pipe):
    """Where the ids of every pass go, seen where the model embeds them."""
    seen = []
    embed = pipe.transformer.pos_embed
    handle = embed.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    return seen, handle


@pytest.fixture(scope="module")
def pipe():
    return tiny.flux_pipeline(double=1, single=1)


@pytest.mark.parametrize("name", ["flux", "flux-kontext", "flux2", "chroma"])
@pytest.mark.parametrize("method", [False, True])
def test_a_model_answers_as_it_does_to_ids_scaled_by_hand(name, method):
    """Rows and columns; which image it is, and FLUX.2's fourth column, stay."""
    model, inputs = parity.TINY[name].build()
    ids = inputs["img_ids"]
    by_hand = ids.double().clone()
    for column in (1, 2):
        by_hand[..., column] = ids[..., column].double() * 0.3
    with torch.no_grad():
        plain = model(**inputs)[0]
        expected = model(**inputs | {"img_ids": by_hand.float()})[0]
        if method:
            dittfast.enable(model, Local(window=100), min_tokens=0)
        with positions_scaled(model, 0.3):
            found = model(**inputs)[0]
        after = model(**inputs)[0]
        if method:
            assert dittfast.describe(model).density == 1
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(after, plain)
    assert not torch.allclose(plain, expected, atol=1e-3)


def test_half_precision_does_not_round_the_positions():
    model, inputs = parity.TINY["flux"].build()
    seen = []
    model.pos_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    half = inputs["img_ids"].to(torch.bfloat16)
    with torch.no_grad(), positions_scaled(model, 1 / 3):
        model(**inputs | {"img_ids": half})
    image = seen[0][-len(half) :]
    assert torch.equal(image[:, 1:], half.float()[:, 1:] * torch.tensor(1 / 3))


def test_both_arms_of_a_comparison_get_them(pipe):
    seen, handle = received(pipe)
    call = dict(prompt="a red cat", height=64, width=96, **CALL)
    method = Local(window=3, tile=(1, 4, 4))
    arms = generate(pipe, call, method, dittfast.Schedule(min_tokens=0), compare=True,
                    position_scale=0.25)  # fmt: skip
    handle.remove()
    text = torch.zeros(12, 3)
    expected = torch.cat([text, grid_ids(8, 12, 0.25)])
    assert len(seen) == 2 * (1 + 2) and all(torch.equal(ids, expected) for ids in seen)
    assert arms[1].density < 1
    stock = generate(pipe, call)[0]
    assert not np.array_equal(stock.run.frames, arms[0].run.frames)


def test_the_scale_can_end_at_a_time(pipe):
    seen, handle = received(pipe)
    times = []
    watch = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: times.append(float(kwargs["timestep"][0])), with_kwargs=True
    )
    call = dict(prompt="a red cat", height=64, width=96) | CALL | {"num_inference_steps": 6}
    generate(pipe, call, position_scale=0.25, position_until=0.6)
    handle.remove()
    watch.remove()
    assert len(times) == 6 and times[0] == 1 and times == sorted(times, reverse=True)
    assert 0 < sum(t > 0.6 for t in times) < 6
    for ids, t in zip(seen, times):
        assert torch.equal(ids[12:], grid_ids(8, 12, 0.25 if t > 0.6 else 1.0))


def test_stages_fit_the_first_ones_positions(pipe):
    seen, handle = received(pipe)
    stages = [(48, 64), (96, 128), (144, 192)]
    done = generate_high_resolution(pipe, "a red cat", stages, call=CALL, strength=0.5,
                                    ntk_factor=1, position_scale="fit", **LOCAL)  # fmt: skip
    handle.remove()
    scales = 1, 1 / 2, 1 / 3
    expected = [grid_ids(h // 8, w // 8, s) for (h, w), s in zip(stages, scales)]
    assert [len(s.run.timing.steps) for s in done] == [2, 1, 1]
    for ids, wanted in zip(seen, [expected[0], *expected]):
        torch.testing.assert_close(ids[12:], wanted)
    assert [row["position_scale"] for row in as_record(done)] == [1, 1 / 2, 1 / 3]
    assert {row["position_until"] for row in as_record(done)} == {0}


def test_one_number_for_all_further_stages(pipe):
    seen, handle = received(pipe)
    for until in (0, 0.99):
        done = generate_high_resolution(pipe, "a red cat", [(48, 64), (96, 128)], call=CALL,
                                        strength=0.5, ntk_factor=1, position_scale=0.4,
                                        position_until=until, **LOCAL)  # fmt: skip
    assert done[1].position_until == 0.99
    handle.remove()
    torch.testing.assert_close(seen.pop()[12:], grid_ids(12, 16, 1))
    seen = seen[:3]
    torch.testing.assert_close(seen[-1][12:], grid_ids(12, 16, 0.4))
    torch.testing.assert_close(seen[0][12:], grid_ids(6, 8, 1))


def test_command(tmp_path, pipe, capsys):
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "sample.json").write_text(json.dumps({"height": 32, "width": 32}))
    common = ["generate", "a red cat", "--model", str(tmp_path / "model"), "--steps", "2",
              "--max-sequence-length", "12"]  # fmt: skip
    one = [*common, "--height", "64", "--width", "64"]
    records = {}
    for name, options in {
        "plain": one,
        "fit": [*one, "--position-scale", "fit"],
        "half": [*one, "--position-scale", "0.5"],
        "until": [*one, "--position-scale", "0.5", "--position-until", "0.99"],
        "stages": [*common, "--stages", "32,64", "--position-scale", "fit", "--ntk-factor", "1"],
    }.items():
        assert main([*options, "-o", str(tmp_path / f"{name}.png")]) == 0, capsys.readouterr()
        records[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert [records[n]["position_scale"] for n in ("plain", "fit", "half")] == [1, 0.5, 0.5]
    assert [s["position_scale"] for s in records["stages"]["stages"]] == [1, 0.5]
    assert [records[n]["position_until"] for n in ("half", "until")] == [0, 0.99]
    assert (tmp_path / "until.png").read_bytes() != (tmp_path / "half.png").read_bytes()
    half, fit, plain = ((tmp_path / f"{n}.png").read_bytes() for n in ("half", "fit", "plain"))
    assert half == fit != plain


def test_refusals(pipe, tmp_path, capsys):
    for wrong in (0, -1, float("nan"), float("inf"), "fit"):
        refused = pytest.raises(ValueError, match="position_scale must be a finite number above 0")
        with refused, positions_scaled(pipe, wrong):
            pass
    refused = pytest.raises(ValueError, match=r"position_until must lie in 0\.\.1")
    with refused, positions_scaled(pipe, 0.5, 1.0):
        pass
    video = tiny.wan_transformer(1)
    refused = pytest.raises(ValueError, match="WanTransformer3DModel makes its positions itself")
    with refused, positions_scaled(video, 0.5):
        pass
    with positions_scaled(video, 1):
        pass
    pipe.save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "-o", str(tmp_path / "a.png")]
    assert main(["generate", "a", *arguments, "--position-until", "0.5"]) == 2
    assert "add --position-scale 0.5, or fit" in capsys.readouterr().err
    assert main(["generate", "a", *arguments, "--position-scale", "fit"]) == 2
    assert "fit needs a sample model" in capsys.readouterr().err
