"""Every model family on real diffusers classes at tiny size: parity, positions, refusals."""

import dataclasses
import inspect
import logging

import diffusers
import pytest
import torch
from patterns import Band
from torch.overrides import TorchFunctionMode

import dittfast
from dittfast import Layout
from dittfast.layout import Context, Grid
from dittfast.pipelines import layer, state
from dittfast.pipelines.families import FAMILIES
from dittfast.pipelines.families.sequences import Sequences, joint, last_grid, patches
from dittfast.pipelines.families.tiny_image import TINY_IMAGE
from dittfast.pipelines.families.tiny_packed import TINY_PACKED
from dittfast.pipelines.families.tiny_video import TINY_VIDEO
from dittfast.pipelines.measure import parity
from dittfast.pipelines.measure.parity import (
    CHECKPOINTED,
    COLUMNS,
    COMPILED,
    METHODS,
    TINY,
    Full,
)
from dittfast.pipelines.models import attention_layers, bind_arguments

pytestmark = pytest.mark.filterwarnings("ignore")


def read(model, inputs) -> Sequences:
    return Sequences.of(
        FAMILIES[type(model).__name__].read(model, bind_arguments(model, (), inputs))
    )


def test_every_family_has_a_tiny_model():
    """Also those whose classes the installed diffusers lacks."""
    every = TINY_IMAGE | TINY_VIDEO | TINY_PACKED
    assert {tiny.name for tiny in every.values()} == set(FAMILIES) and TINY.items() <= every.items()


SAMPLE = ("wan", "cosmos3", "flux", "prx", "lumina2")
# By default every family runs these, and a few run every method: the others go the same ways.
# tests/test_guidance_families.py guides a third of them by default, and all where it is slow.
EVERYWHERE = ("full", "local", CHECKPOINTED)


def check_parity(name, columns):
    cells = list(parity.check(name, TINY[name], columns))
    assert [cell.method for cell in cells] == list(columns)
    assert not [cell for cell in cells if not cell.ok]
    assert cells[0].density == 1 and cells[0].change == 0


@pytest.mark.parametrize("name", TINY)
def test_parity(name):
    check_parity(name, COLUMNS if name in SAMPLE else EVERYWHERE)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_parity_of_every_method(name):
    check_parity(name, COLUMNS)


@pytest.mark.parametrize(
    "name", [n if n == "cosmos3" else pytest.param(n, marks=pytest.mark.slow) for n in TINY]
)
def test_parity_under_compile(name):
    (cell,) = parity.check(name, TINY[name], [COMPILED])
    assert cell.ok, cell.problem


def test_checkpointing_that_a_class_does_not_have():
    (cell,) = parity.check("hunyuan-dit", TINY["hunyuan-dit"], [CHECKPOINTED])
    assert cell.absent and parity.text_of(cell) == "-"


class Calls(TorchFunctionMode):
    """Records q and k of every scaled_dot_product_attention inside the selected layers."""

    def __init__(self, model, family):
        super().__init__()
        self.layers = attention_layers(model, family)
        self.found = []
        self.inside = None

    def __enter__(self):
        enter = lambda name: lambda *_: setattr(self, "inside", name)  # noqa: E731
        leave = lambda *_: setattr(self, "inside", None)  # noqa: E731
        self.hooks = [m.register_forward_pre_hook(enter(n)) for n, m in self.layers.items()]
        self.hooks += [m.register_forward_hook(leave) for m in self.layers.values()]
        return super().__enter__()

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and self.inside:
            call = {**dict(zip(("query", "key"), args)), **kwargs}
            self.found.append((self.inside, call["query"].detach(), call["key"].detach()))
        return func(*args, **kwargs)


def attention_calls(model, inputs):
    """``[(layer, q, k)]`` of one stock forward pass."""
    with Calls(model, FAMILIES[type(model).__name__]) as calls:
        parity.output(model, inputs)
    return calls.found


def changed_cell(tiny, inputs, place):
    """The inputs with the latents of one token changed, in the first batch row."""
    name, axes = tiny.latents
    latents = inputs[name]
    row = latents[0].clone()
    at = [slice(None)] * row.ndim
    for axis, index, count in zip(axes, place, tiny.grid):
        if axis is not None:
            axis -= not isinstance(latents, list)
            cells = row.shape[axis] // count
            at[axis] = slice(index * cells, (index + 1) * cells)
    row[tuple(at)] += 1
    changed = [row, *latents[1:]]
    return {**inputs, name: changed if isinstance(latents, list) else torch.stack(changed)}


def moved(before, after) -> list[int]:
    """Tokens of the first batch row whose key changed (text of PRX has no queries)."""
    change = (before - after).abs().amax((1, 3))
    return (change[change.amax(1).argmax()] > 1e-5).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("name", [name for name, tiny in TINY.items() if tiny.latents])
def test_a_changed_latent_moves_the_token_that_the_layout_names(name):
    """The oracle is the model: which key of its first attention moves with a latent cell."""
    tiny = TINY[name]
    model, inputs = tiny.build()
    sequences = read(model, inputs)
    by_length = {rows[0].num_tokens: rows[0] for rows in sequences.by_length()}
    covered = lambda inputs: [  # noqa: E731
        call for call in attention_calls(model, inputs) if call[2].shape[2] in by_length
    ]
    stock = covered(inputs)
    frames, height, width = tiny.grid
    places = [(0, 0, 0), (0, 0, width - 1), (frames - 1, height - 2, 1), (frames // 2, 2, 5)]
    for place in places:
        calls = covered(changed_cell(tiny, inputs, place))
        at = torch.from_numpy(by_length[stock[0][2].shape[2]].coordinates())
        expected = (at == torch.tensor([0, *place])).all(1).nonzero()[:, 0].tolist()
        assert len(expected) == 1
        assert moved(stock[0][2], calls[0][2]) == expected
        # Where refiners mixed the image before the main layers, all of the image has moved.
        main = next(i for i, c in enumerate(stock) if c[2].shape[2] == sequences.layout.num_tokens)
        if stock[main][2].shape[2] != stock[0][2].shape[2]:
            image = torch.from_numpy(sequences.layout.coordinates())[:, 0] == 0
            inside = moved(stock[main][2], calls[main][2])
            assert set(image.nonzero()[:, 0].tolist()) <= set(inside)
            text = torch.from_numpy(sequences.layout.coordinates())[: sequences.layout.grid_start]
            assert not set(range(len(text))) & set(inside)


def displacement_spread(q, k, first, shape) -> float:
    """How much ``q_i k_j`` of equal tokens varies among pairs with one displacement.

    Rotary attention of equal tokens depends on where they stand to each other alone, so this is
    rounding, unless ``shape`` is not how the model placed them.
    """
    frames, height, width = shape
    n = frames * height * width
    q, k = (x[0, :, first : first + n].double() for x in (q, k))
    scores = torch.einsum("hid,hjd->ij", q, k)
    f, y, x = (torch.as_tensor(c) for c in torch.unravel_index(torch.arange(n), shape))
    key = (f[:, None] * frames + f) * 4 * height * width
    key = key + (y[:, None] - y + height) * 2 * width + (x[:, None] - x + width)
    _, group = key.flatten().unique(return_inverse=True)
    flat = scores.flatten()
    mean = torch.zeros(int(group.max()) + 1, dtype=flat.dtype)
    mean = mean.scatter_reduce(0, group, flat, "mean", include_self=False)
    return float((flat - mean[group]).abs().max() / (flat - flat.mean()).abs().max())


@pytest.mark.parametrize("name", [name for name, tiny in TINY.items() if not tiny.latents])
def test_rotary_positions_are_those_of_the_layout(name):
    """Packed latents have no shape: the oracle is the model's own rotary embedding."""
    model, inputs = TINY[name].build()
    inputs["hidden_states"] = torch.ones_like(inputs["hidden_states"])
    by_length = {rows[0].num_tokens: rows[0] for rows in read(model, inputs).by_length()}
    calls = [(q, k) for _, q, k in attention_calls(model, inputs) if k.shape[2] in by_length]
    q, k = calls[0]
    layout = by_length[k.shape[2]]
    if q.shape[2] < k.shape[2]:  # text does not ask, and stands in front or behind
        missing = k.shape[2] - q.shape[2]
        front = missing if layout.grid_start >= missing else 0
        q = torch.nn.functional.pad(q, (0, 0, front, missing - front))
    grids = [(start, s.shape) for start, s in layout.spans() if isinstance(s, Grid)]
    assert grids[0][1] == TINY[name].grid
    for start, (frames, height, width) in grids:
        # LTX's highest frequencies leave few digits of an fp32 angle.
        right = displacement_spread(q, k, start, (frames, height, width))
        assert right < 0.02
        assert displacement_spread(q, k, start, (frames, width, height)) > 20 * right + 0.01
    start, shape = grids[0]
    if start:
        assert displacement_spread(q, k, start - 1, shape) > 20 * right + 0.01


@pytest.mark.parametrize(
    "name", ["lumina2", "mochi", "sd3.5", "z-image-two-sizes", "hunyuan-video-1.5", "cogview4"]
)
def test_gradients_where_sequences_or_masks_are_special(name):
    model, inputs = TINY[name].build()

    def gradients():
        model.zero_grad()
        out = model(**inputs)[0]
        sum(x.square().mean() for x in (out if isinstance(out, list) else [out])).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    stock = gradients()
    with dittfast.enable(model, Full(), backend="cpu", min_tokens=0):
        ours = gradients()
    assert stock.keys() == ours.keys()
    for key, grad in stock.items():
        scale = max(float(grad.abs().max()), 1e-5)
        assert float((ours[key] - grad).abs().max()) < 2e-3 * scale, key


def test_the_grid_at_the_end_of_places():
    """LTX's condition pipeline gives places of pixels and no size: conditions, then the video."""

    def places(frames, height, width, start=0.0):
        t, y, x = torch.meshgrid(*map(torch.arange, (frames, height, width)), indexing="ij")
        return torch.stack([start + 8.0 * t, 32.0 * y, 32.0 * x]).view(3, -1)

    video = places(3, 4, 5)
    for before in ([], [places(1, 4, 5)], [places(1, 4, 5, 16.0), places(2, 4, 5, 8.0)]):
        assert last_grid(torch.cat([*before, video], 1)) == Grid(3, 4, 5)
    assert last_grid(places(1, 1, 1)) == Grid(1, 1, 1)
    assert last_grid(places(2, 1, 3)) == Grid(2, 1, 3)
    with pytest.raises(ValueError, match=r"3 frames of 4 x 5 .*layout=Layout\.video"):
        last_grid(video[:, [1, 0, *range(2, 60)]])
    model, inputs = TINY["ltx"].build()
    stock = parity.output(model, inputs)
    coords = places(*(inputs.pop(name) for name in ("num_frames", "height", "width")))
    inputs["video_coords"] = (coords / 8)[None].expand(len(inputs["hidden_states"]), -1, -1)
    given = parity.output(model, inputs)
    with dittfast.enable(model, Full(), backend="cpu", min_tokens=0) as enabled:
        assert parity.distance(parity.output(model, inputs), given) < 2e-5
        assert enabled.describe().num_tokens == coords.shape[1] != len(stock)


def test_batch_rows_with_texts_of_different_length():
    """Each row of a ragged batch gets what it gets alone."""
    model, inputs = TINY["lumina2"].build()
    with dittfast.enable(model, METHODS["local"], backend="cpu", min_tokens=0) as enabled:
        both = model(**inputs)[0]
        assert model._dittfast.sequences.rows_differ
        assert "batch rows differ" in str(enabled.describe())
        for row in range(2):
            length = int(inputs["encoder_attention_mask"][row].sum())
            alone = {k: v[row : row + 1] for k, v in inputs.items() if torch.is_tensor(v)}
            for key in ("encoder_hidden_states", "encoder_attention_mask"):
                alone[key] = alone[key][:, :length]
            found = model(**alone, return_dict=False)[0]
            torch.testing.assert_close(found, both[row : row + 1], rtol=1e-4, atol=1e-5)


def test_hunyuan_video_15_builds_no_square_mask(monkeypatch):
    model, inputs = TINY["hunyuan-video-1.5"].build()
    seen = []
    original = layer.key_log_weight

    def spy(mask, q, token=None):
        seen.append(mask)
        return original(mask, q, token)

    monkeypatch.setattr(layer, "key_log_weight", spy)
    with dittfast.enable(model, METHODS["radial"], backend="reference", min_tokens=0):
        parity.output(model, inputs)
    assert len(seen) == 2
    tokens = read(model, inputs).layout.num_tokens
    for mask in seen:
        assert mask.shape[-2:] == (tokens, tokens)
        assert mask.untyped_storage().nbytes() == 2 * tokens  # one byte for each key of each row


def test_conditioning_frames_are_context():
    model, inputs = TINY["ltx"].build()
    inputs["hidden_states"] = torch.randn(2, 105 + 12, 8)
    inputs["video_coords"] = torch.rand(2, 3, 105 + 12)
    assert read(model, inputs).layout.segments == (Context(12), Grid(3, 5, 7))
    stock = parity.output(model, inputs)
    with dittfast.enable(model, Full(), backend="cpu", min_tokens=0):
        assert parity.distance(parity.output(model, inputs), stock) < 1e-5
    model, inputs = TINY["ltx2"].build()
    inputs["hidden_states"] = torch.randn(2, 105 + 12, 8)
    assert read(model, inputs).layout.segments == (Grid(3, 5, 7), Context(12))


def test_square_hidream_has_no_padding():
    model, inputs = TINY["hidream"].build()
    assert read(model, inputs).layout.segments == (Grid(1, 11, 9), Context(45 + 7 + 10))
    inputs["hidden_states"] = torch.randn(2, 4, 20, 20)
    assert read(model, inputs).layout.segments == (Grid(1, 10, 10), Context(17))
    stock = parity.output(model, inputs)
    with dittfast.enable(model, Full(), backend="cpu", min_tokens=0):
        assert parity.distance(parity.output(model, inputs), stock) < 1e-5


def test_layered_shapes_of_qwen():
    model, inputs = TINY["qwen-image"].build()
    assert read(model, {**inputs, "img_shapes": [(1, 11, 9)] * 2}).layout == Layout.image(
        11, 9, text=7
    )


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("flux2", {"kv_cache_mode": "extract", "num_ref_tokens": 24}, "kv_cache_mode='extract'"),
        ("kandinsky5", {"sparse_params": {"to_fractal": False}}, "NABLA"),
        ("z-image", {"x": [[torch.randn(4, 1, 8, 8)]] * 2}, r"Omni.*layout="),
    ],
)
def test_what_cannot_work_says_why_and_what_to_do(name, changes, message):
    model, inputs = TINY[name].build()
    with (
        dittfast.enable(model, METHODS["local"], min_tokens=0),
        pytest.raises(ValueError, match=message),
    ):
        model(**{**inputs, **changes})
    assert parity.output(model, inputs).isfinite().all()


def test_causal_video_is_refused():
    tiny = TINY["skyreels-v2"]
    tiny = dataclasses.replace(tiny, config={**tiny.config, "num_frame_per_block": 3})
    model, inputs = tiny.build()
    with (
        dittfast.enable(model, METHODS["radial"], min_tokens=0),
        pytest.raises(ValueError, match=r"num_frame_per_block = 3.*checkpoint"),
    ):
        model(**inputs)


def test_a_mask_between_video_tokens_is_refused():
    model, inputs = TINY["ltx2"].build()
    if "video_self_attention_mask" not in inspect.signature(model.forward).parameters:
        pytest.skip(f"diffusers {diffusers.__version__} passes no such mask")
    mask = torch.ones(2, 105, 105)
    with (
        dittfast.enable(model, METHODS["radial"], min_tokens=0),
        pytest.raises(ValueError, match=r"\[2, 2, 105, 105\].*dense_layers"),
    ):
        model(**inputs, video_self_attention_mask=mask)


def test_spatio_temporal_guidance_skips_layers():
    tiny = TINY["ltx2"]
    tiny = dataclasses.replace(tiny, config={**tiny.config, "perturbed_attn": True})
    model, inputs = tiny.build()
    inputs["spatio_temporal_guidance_blocks"] = [0]
    inputs["perturbation_mask"] = torch.zeros(2)
    stock = parity.output(model, inputs)
    with dittfast.enable(model, Full(), backend="cpu", min_tokens=0):
        assert parity.distance(parity.output(model, inputs), stock) < 1e-5


@pytest.mark.parametrize(
    "name, reasons",
    [
        ("hunyuan-video", ["1 other attention modules are dense: refines text alone"]),
        ("wan-i2v", ["2 other attention modules are dense: cross-attention"]),
        ("latte", ["one place over time", "cross-attention"]),
        ("ltx2", ["audio, a short sequence", "8 other attention modules are dense: cross"]),
        ("z-image", ["context_refiner.0.attention"]),
        ("sd3.5", []),
    ],
)
def test_what_is_dense_is_said_and_logged(name, reasons, caplog):
    model, _ = TINY[name].build()
    caplog.set_level(logging.INFO, logger="dittfast")
    with dittfast.enable(model, Band(), dense_layers=[0], dense_first_steps=2) as enabled:
        text = str(enabled.describe())
    logged = caplog.records[-1].getMessage()
    assert "1 layers are dense by dense_layers" in logged
    for reason in [*reasons, "first 2 denoising steps"]:
        assert reason in text
        assert reason in logged
    if not reasons:
        assert "other attention" not in text


def test_sequences_told_by_length():
    a, b = Layout.image(4, 4), Layout.image(4, 4, text=3)
    other = Layout((Context(2), Grid(1, 4, 4), Context(1)))
    assert Sequences.of(a).by_length() == ((a,),)
    assert Sequences(((b, b), (a,))).by_length() == ((b,), (a,))
    assert Sequences(((b, other), (a, a))).by_length() == ((b, other), (a,))
    assert Sequences(((a, b),)).by_length() == ((a,), (b,))
    with pytest.raises(ValueError, match="19 tokens"):
        Sequences(((b,), (other,))).by_length()
    assert joint(2, 0, 3, Grid(1, 2, 2), 0) == Layout((Context(5), Grid(1, 2, 2)))
    assert patches((9, 8), 2) == Grid(1, 4, 4)


def test_caches_of_a_long_running_server_are_bounded(monkeypatch):
    monkeypatch.setattr(state, "_MOST_KEPT", 32)
    model, inputs = TINY["cogview4"].build()
    del inputs["attention_mask"]
    with dittfast.enable(model, METHODS["local"], backend="cpu", min_tokens=0):
        for text in range(1, 40):
            states = torch.randn(2, text, 32)
            model._dittfast.begin(model, {**inputs, "encoder_hidden_states": states})
        assert len(model._dittfast.parts) == len(model._dittfast.cores) == 32


def test_parity_sees_what_is_wrong(monkeypatch):
    wan = TINY["wan"]
    wrong = dataclasses.replace(
        FAMILIES["WanTransformer3DModel"], read=lambda model, arguments: Layout.video(3, 5, 6)
    )
    monkeypatch.setitem(FAMILIES, "WanTransformer3DModel", wrong)
    (cell,) = parity.check("wan", wan, ["full"])
    assert not cell.ok and "90 tokens" in cell.problem
    monkeypatch.undo()

    def halved(*args, **kwargs):
        return original(*args, **kwargs) * (1 + 1e-3 * (kwargs["backend"] == "cpu"))

    original = layer.method_attention
    monkeypatch.setattr(layer, "method_attention", halved)
    (cell,) = parity.check("wan", wan, ["radial"])
    assert not cell.ok and "differs by" in cell.problem
    monkeypatch.undo()
    monkeypatch.setitem(METHODS, "local", Band(width=100))
    cells = list(parity.check("wan", wan, ["local"]))
    assert cells[0].ok and cells[0].density == 1
    with pytest.raises(ValueError, match=r"'wann'.*Did you mean 'wan'"):
        next(parity.matrix(["wann"]))
