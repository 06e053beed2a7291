"""Published models at real size: tokens, parameters and FLOPs against known figures."""

import dataclasses
import functools
import json
from importlib import resources

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dittfast import Layout
from dittfast.cli import main
from dittfast.config import presets, resolve
from dittfast.pipelines.families import FAMILIES
from dittfast.pipelines.families.published import PublishedModel, published_model, published_models
from dittfast.pipelines.families.sequences import Sequences
from dittfast.pipelines.families.tiny import tiny_of
from dittfast.pipelines.families.tiny_model import BATCH, TEXT, Draw
from dittfast.pipelines.measure.cost import Cost, forward_cost
from dittfast.pipelines.measure.estimate import default_settings, estimate, method_estimate
from dittfast.pipelines.measure.parity import output
from dittfast.schedule import Schedule

pytestmark = pytest.mark.filterwarnings("ignore")

# Published: billions of parameters, and (frames, height, width) in pixels -> tokens of the grid.
KNOWN = {
    "flux.1-dev": (11.9, {(1, 1024, 1024): 4096, (1, 2048, 2048): 16384, (1, 4096, 4096): 65536}),
    "sd3.5-large": (8.06, {(1, 1024, 1024): 4096, (1, 768, 1344): 4032}),
    "qwen-image": (20.4, {(1, 1328, 1328): 6889, (1, 928, 1664): 6032}),
    "wan2.1-14b": (14.3, {(81, 480, 832): 32760, (81, 720, 1280): 75600, (161, 720, 1280): 147600}),
    "wan2.2-a14b": (14.3, {(81, 480, 832): 32760, (81, 720, 1280): 75600}),
    "hunyuanvideo": (12.8, {(129, 720, 1280): 118800, (509, 720, 1280): 460800}),
    "mochi-1": (10.0, {(163, 480, 848): 44520}),
    "cogvideox-5b": (5.57, {(49, 480, 720): 17550}),
    "ltx-video": (1.92, {(161, 512, 704): 7392}),
}


def test_there_is_a_known_figure_for_every_model():
    assert set(KNOWN) == set(published_models())
    assert not {published_model(name).model for name in KNOWN} & set(UNLEARNED)


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_tokens_and_flops(name):
    card = published_model(name)
    model = card.build()
    assert all(x.device.type == "meta" for x in model.parameters())
    billions, sizes = KNOWN[name]
    count = sum(x.numel() for x in model.parameters())
    assert count / 1e9 == pytest.approx(billions, rel=0.005)
    assert (card.num_frames, card.height, card.width) in sizes
    for size, tokens in sizes.items():
        sequences = card.sequences(model, *size, card.text)
        layout = sequences.layout
        assert layout.grid.length == tokens
        assert layout.num_context in (0, card.text)
        cost = forward_cost(model, sequences, card.text)
        n = layout.num_tokens
        inner = cost.heads * cost.head_dim
        assert cost.attention == cost.layers * 4.0 * n * n * inner
        assert cost.linear < 2.05 * count * n  # no weight is used more than once a token
    # The usual ratio of weights that see every token.
    assert cost.linear > 0.5 * count * tokens


def whole_text(draw, length=None, short=0):
    """A mask without padding: what a model skips of a padded prompt depends on the prompt."""
    return torch.ones(BATCH, length or draw.text, dtype=torch.int64)


UNKNOWN = {
    "HiDreamImageTransformer2DModel": "so what it costs is unknown",  # experts take their share
    "LatteTransformer3DModel": "neither the sequence nor its pictures",  # frames are batch rows
    "MiniMaxH3Transformer3DModel": "neither the sequence nor its pictures",  # no batch
    "Cosmos3OmniTransformer": "neither the sequence nor its pictures",  # no batch
    "WanAnimateTransformer3DModel": "neither the sequence nor its pictures",  # poses, faces
    "AnyFlowTransformer3DModel": "neither the sequence nor its pictures",  # a time for each frame
    "HunyuanDiT2DModel": "lacks or never runs",  # pools its text by a function
}
# There is no published model of these, and their tiny ones do not teach what they cost.
UNLEARNED = {
    "BriaFibo2Transformer2DModel": "torch's counter does not get through its resampler",
    "NucleusMoEImageTransformer2DModel": "its experts are no linear layers",
    "QwenImage21Transformer2DModel": "what stands before the image attends in calls of its own",
    "ChronoEditTransformer3DModel": "its text has one length, not the one asked for",
    "EasyAnimateTransformer3DModel": "it has two texts",
    "MotifVideoTransformer3DModel": "its cross-attention sees part of what its layers see",
    "HunyuanVideoFramepackTransformer3DModel": "it sees earlier frames in coarser cells",
    "HeliosTransformer3DModel": "it sees earlier frames in coarser cells",
}
FAST = (
    "Flux2Transformer2DModel",  # reference images; the rest of the image models is in "slow"
    "CogView4Transformer2DModel",  # one feed-forward for text and image
    "PRXTransformer2DModel",  # q, k and v in one matrix
    "WanTransformer3DModel",
    "Kandinsky5Transformer3DModel",  # names of its own
    "HiDreamImageTransformer2DModel",
    "LatteTransformer3DModel",
)


@pytest.mark.parametrize(
    "name",
    [
        n if n in FAST else pytest.param(n, marks=pytest.mark.slow)
        for n in FAMILIES
        if n not in UNLEARNED
    ],
)
def test_flops_are_those_that_torch_counts(name, monkeypatch):
    """At a third size than the two of the tiny model that cost is learned from."""
    monkeypatch.setattr(Draw, "text_mask", whole_text)
    frames = tiny_of(name).grid[0]
    grid = (1, 8, 13) if frames == 1 else (2, 4, 8)
    model, inputs = tiny_of(name).build(grid=(1, 7, 7) if name.startswith("DiT") else grid)
    sequences = Sequences.of(FAMILIES[name].read(model, inputs))
    if name in UNKNOWN:
        with pytest.raises(ValueError, match=UNKNOWN[name]):
            forward_cost(model, sequences, TEXT)
        return
    if name.startswith(("CogView4", "GlmImage")):
        del inputs["attention_mask"]  # its m mᵀ is a product of matrices, too
    # The counter knows matrix products, but no fused attention of the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output(model, inputs)
    cost = forward_cost(model, sequences, TEXT)
    assert cost.total == pytest.approx(counter.get_total_flops() / BATCH, rel=2e-3)


def disc_pairs(height, width, window):
    """Token pairs within the circle, counted one offset at a time."""
    return sum(
        (height - abs(dy)) * (width - abs(dx))
        for dy in range(1 - height, height)
        for dx in range(1 - width, width)
        if dy * dy + dx * dx < window * window
    )


def test_estimates_at_real_size():
    found = estimate(published_model("flux.1-dev"), methods=["local/flux", "rectified/flux"])
    local, rectified = found.methods
    n, grid = 4096 + 512, 4096
    pairs = disc_pairs(64, 64, 16) + 2 * 512 * grid + 512 * 512
    assert local.density == pytest.approx(pairs / n**2)
    assert local.attention == pytest.approx(57 * 4 * pairs * 128 * 24)
    assert local.fewer_flops == pytest.approx(
        found.cost.total / (found.cost.total - found.cost.attention + local.attention)
    )
    # Three of the image's 32 key blocks are a tenth; text takes one of the three, as published.
    image = grid * (2 * 128 + 512)
    assert rectified.at_least and rectified.dense_layers == 20
    assert rectified.density == pytest.approx((image + 512 * n) / n**2)
    assert rectified.attention == pytest.approx(
        37 * 4 * (image + 512 * n) * 128 * 24 + 20 / 57 * found.cost.attention
    )
    # Lists of 36 blocks, the text rows' width, and three small arrays of the partition.
    assert rectified.plan_bytes == pytest.approx(36 * 36 * 4, rel=8)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["tokens"] == n and data["ceiling"] == pytest.approx(found.cost.speedup(0))


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_every_method_at_every_usual_size(name):
    card = published_model(name)
    for frames, height, width in KNOWN[name][1]:
        found = estimate(card, frames, height, width)
        for x in found.methods:
            assert x.problem is None
            assert 0 < (x.work if x.density is None else x.density) <= 1
            assert x.plan_bytes < 3e8
            assert 1 <= x.fewer_flops <= found.cost.speedup(0)


USUAL = {
    "local/sample-flux": Layout.image(32, 32, text=24),
    "topk/sample-flux": Layout.image(32, 32, text=24),
    "log_linear/pixel-dit": Layout.image(128, 128),
    "rectified/cogvideox": Layout.video(11, 48, 80, text=226, text_first=True),
    "rectified/cogvideox-i2v": Layout.video(11, 48, 80, text=226, text_first=True),
    "rectified/wan2.2-ti2v": Layout.video(31, 22, 40),
    "rectified/wan2.1-i2v": Layout.video(21, 45, 80),
    "radial/wan2.1": Layout.video(18, 48, 80),
    "radial/wan2.1-fusionx": Layout.video(18, 48, 80),
    "radial/wan2.1-lightx2v": Layout.video(18, 48, 80),
    "radial/wan2.1-long": Layout.video(41, 48, 80),
    "radial/wan2.2": Layout.video(20, 48, 80),
    "radial/hunyuan": Layout.video(30, 48, 80, text=256),
    "radial/hunyuan-long": Layout.video(128, 45, 80, text=256),
    "radial/mochi": Layout.video(28, 30, 53, text=256),
    "sol/wan2.1": Layout.video(21, 45, 80),
    "vsa/wan2.1": Layout.video(21, 30, 52),
    "reattention/cogvideox": Layout.video(13, 30, 45, text=226, text_first=True),
    "reattention/pixart": Layout.image(64, 64),
    "reattention/hunyuan-dit": Layout.image(64, 64),
    "rectified/wan2.1": Layout.video(21, 45, 80),
    "rectified/wan2.2": Layout.video(21, 45, 80),
    "rectified/hunyuan": Layout.video(33, 45, 80, text=256),
    "rectified/flux": Layout.image(256, 256, text=512),
    "local/flux": Layout.image(128, 128, text=512),
    "local/flux-wide": Layout.image(128, 128, text=512),
    "local/flux-narrow": Layout.image(128, 128, text=512),
    "neighborhood/flux": Layout.image(256, 256, text=512),
    "neighborhood/hunyuan": Layout.video(30, 48, 80, text=256),
    "neighborhood/cosmos": Layout.video(16, 44, 80),
    "linear/sample-flux": Layout.image(32, 32, text=24),
    "sla/sample-flux": Layout.image(32, 32, text=24),
    "agent/sample-flux": Layout.image(32, 32, text=24),
    "mixture_of_heads/sample-flux": Layout.image(32, 32, text=24),
    "local/sd3.5": Layout.image(64, 64, text=333, text_first=False),
}
# Kept fraction of token pairs where the papers or their code state one for this layout.
STATED = {
    "radial/hunyuan": 0.275,
    "radial/hunyuan-long": 0.117,
    "neighborhood/flux": 0.10,
    "neighborhood/hunyuan": 0.09,
    "neighborhood/cosmos": 0.44,
}
LONG = ("radial/hunyuan-long", "radial/wan2.1-long", "rectified/hunyuan")  # half a minute each


@functools.cache
def planned(method, layout):
    cost = Cost(1.0, 1.0, 0.0, 1, 2, 64)
    return method_estimate("", method, Schedule(), {"layer": 2}, layout, cost)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in presets()],
)
def test_every_preset_plans_on_the_layout_it_was_published_for(name):
    method, schedule = resolve(name)
    layout = USUAL[name]
    found = planned(method, layout)
    assert found.problem is None
    assert 0 < (found.work if found.density is None else found.density) < 1
    if name in STATED:
        assert found.density == pytest.approx(STATED[name], abs=0.02)
    if name.startswith("rectified"):
        least = (1 - method.drop) * layout.grid.length / layout.num_tokens
        assert (
            least * 0.85 < found.density < least + 2 * layout.num_context / layout.num_tokens + 0.02
        )
    assert 0 <= schedule.dense_first_steps <= 15


def test_presets_and_models_name_each_other():
    assert set(USUAL) == set(presets())
    for name in published_models():
        card = published_model(name)
        assert set(card.presets) <= set(presets())
        settings = default_settings(card)
        assert {resolve(x)[0].name for x in settings} >= {"radial", "local", "rectified"}
    folder = resources.files("dittfast.configs")
    for name in presets():
        text = (folder / (name.replace("/", "_") + ".yaml")).read_text()
        assert text.startswith("# ") and "models:" in text


def test_sizes_a_model_cannot_make():
    wan, flux = published_model("wan2.1-14b"), published_model("flux.1-dev")
    with pytest.raises(ValueError, match=r"1 \+ 4 n frames, got 80; use 77 or 81"):
        wan.grid(80, 480, 832)
    with pytest.raises(ValueError, match=r"multiple of 16 pixels, got 100; use 96 or 112"):
        wan.grid(81, 100, 832)
    with pytest.raises(ValueError, match="makes images, got 5 frames"):
        flux.grid(5, 1024, 1024)
    with pytest.raises(ValueError, match=r"'wan'.*Did you mean 'wan2"):
        published_model("wan")
    assert isinstance(wan, PublishedModel)
    other = dataclasses.replace(wan, config={**wan.config, "patch_size": [1, 4, 4]})
    with pytest.raises(ValueError, match=r"makes \(3, 15, 26\) tokens of latents"):
        other.sequences(other.build(), 9, 480, 832, 512)


def test_command(capsys, tmp_path):
    size = ["--height", "480", "--width", "832", "--num-frames", "81"]
    path = tmp_path / "plan.json"
    asked = ["estimate", "wan2.1-14b", *size, "--method", "local", "--set", "window=4"]
    assert main([*asked, "--json", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "32,760: 21 x 30 x 52, 0 text" in shown
    assert shown.startswith("Computed, not measured")
    data = json.loads(path.read_text())
    (local,) = data["methods"]
    assert local["density"] == pytest.approx(disc_pairs(30, 52, 4) / (30 * 52) ** 2)
    assert data["cost"]["attention_share"] == pytest.approx(0.527, abs=0.02)
    assert main(["estimate"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in published_models())
    for wrong, message in [
        (["estimate", "wann"], "Did you mean"),
        (["estimate", "wan2.1-14b", "--set", "window=4"], "needs a method"),
        (["plan", "--height", "4", "--method", "local"], "--width is missing; give"),
    ]:
        assert main(wrong) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "old, new",
    [
        ("--model list", "estimate"),
        ("--model wan2.1-14b --height 720", "estimate wan2.1-14b --height 720"),
        ("--text 7 --model=flux.1-dev", "estimate flux.1-dev --text 7"),
        ("--method local --probe --layers 0", "probe --method local --layers 0"),
        ("--probe sample-video --method local", "probe --model sample-video --method local"),
        ("--method local --height 4", "plan --method local --height 4"),
    ],
)
def test_old_spellings_of_plan(capsys, old, new):
    from dittfast.cli import _modern

    assert _modern(["plan", *old.split()]) == new.split()
    hint = capsys.readouterr().err
    assert ("is now `dittfast" in hint) == (new.split()[0] != "plan")


def test_an_old_spelling_runs(capsys):
    assert main(["plan", "--model", "list"]) == 0
    shown = capsys.readouterr()
    assert "wan2.1-14b" in shown.out
    assert shown.err.startswith("dittfast: `dittfast plan --model` is now `dittfast estimate`")


def test_unknown_keys_are_named(monkeypatch, tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "mine.yaml").write_text("modle: X\n")
    monkeypatch.setattr("dittfast.pipelines.families.published.resources.files", lambda _: tmp_path)
    with pytest.raises(ValueError, match=r"'modle'.*'model'"):
        published_model("mine")
