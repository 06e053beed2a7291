"""Fidelity against dense attention: numbers by hand from the stored pictures, and resuming."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import flux_pipeline, wan_pipeline

import dittfast
from dittfast.markdown import markdown_table
from dittfast.measure.check import WrongResult
from dittfast.measure.metrics import cosine, temporal_consistency
from dittfast.measure.perceptual import load_lpips, missing_for_lpips
from dittfast.measure.summary import bootstrap_mean, interval
from dittfast.measure.tables import fidelity_tables
from dittfast.methods import Linear, Local, LogLinear, Radial, Rectified
from dittfast.mixture import Mixture, Rule
from dittfast.pipelines.fingerprint import weights_digest
from dittfast.pipelines.measure import fidelity
from dittfast.pipelines.measure.drawings import Drawings
from dittfast.pipelines.measure.fidelity import dense_kernel, draw_missing, evaluate_fidelity
from dittfast.pipelines.measure.method_check import check_method
from dittfast.pipelines.measure.variants import Variant, make_variants, read_variants
from dittfast.pipelines.runs import compare
from dittfast.pipelines.runs.prompts import Item, make_items, read_prompts
from dittfast.pipelines.runs.sources import Source
from dittfast.schedule import Schedule

CALL = dict(prompt="", height=64, width=96, num_inference_steps=2, max_sequence_length=12)
ITEMS = make_items(["a red cat", "a blue dog", "a green car"])
ALWAYS = Schedule(min_tokens=0)
LOCAL = Variant("local3", Local(window=3, tile=(1, 4, 4)), ALWAYS)
TOP = Variant("top-k", Rectified(block_size=16, topk=2, top_p=0, rectify=False), ALWAYS)
SOURCE = Source("folder", "tiny", "tiny")


@pytest.fixture(scope="module")
def pipe():
    return flux_pipeline()


@pytest.fixture(scope="module")
def evaluated(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    pairs = [("local3", "top-k")]
    return folder, evaluate_fidelity(pipe, SOURCE, CALL, ITEMS, [LOCAL, TOP], folder, pairs=pairs)


def png(folder, label, index):
    return np.asarray(Image.open(folder / label / "images" / f"{index:05d}.png")).astype(float)


def ssim_by_hand(a, b):
    """Of two PNGs as floats ``[H, W, C]``, with SciPy's Gaussian of the same 11 x 11 window."""
    from scipy.ndimage import gaussian_filter

    def mean(x):
        blurred = gaussian_filter(x, (1.5, 1.5, 0), truncate=3.5)
        return blurred[5:-5, 5:-5]  # where the window fits

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * ma * mb + c1) * (2 * cov + c2)
    return np.mean(top / ((ma**2 + mb**2 + c1) * (va + vb + c2)))


def test_numbers_by_hand_from_the_files(pipe, evaluated):
    folder, data = evaluated
    apart = []
    for row in data["methods"]:
        for index, found in enumerate(row["pictures"]):
            a, b = png(folder, "dense", index), png(folder, row["label"], index)
            assert found["psnr_db"] == pytest.approx(
                10 * math.log10(255**2 / np.mean((a - b) ** 2))
            )
            assert found["ssim"] == pytest.approx(ssim_by_hand(a, b), abs=1e-9)
            x, y = (
                np.load(folder / label / "latents" / f"{index:05d}.npy").astype(float).ravel()
                for label in ("dense", row["label"])
            )
            by_hand = x @ y / np.sqrt((x @ x) * (y @ y))
            assert found["latent_cosine"] == pytest.approx(by_hand, abs=1e-12)
            assert found["lpips"] is None and found["temporal_error"] is None
        values = [f["psnr_db"] for f in row["pictures"]]
        assert row["pooled"]["psnr_db"]["mean"] == pytest.approx(np.mean(values))
        apart.append(np.array(values))
    difference = data["pairs"][0]["a_minus_b"]["psnr_db"]["mean"]
    assert difference == pytest.approx((apart[0] - apart[1]).mean())
    assert data["lpips"] == missing_for_lpips()
    # The stored pictures are the stock pipeline's and those of a plainly enabled one.
    generator = torch.Generator().manual_seed(ITEMS[1].seed)
    call = CALL | {"prompt": ITEMS[1].prompt}
    image = pipe(**call, generator=generator, output_type="np").images[0]
    assert np.array_equal(png(folder, "dense", 1), (image * 255).round())
    with dittfast.enable(pipe, LOCAL.method):
        image = pipe(**call, generator=generator.manual_seed(1), output_type="np").images[0]
        density = dittfast.describe(pipe).density
    assert np.array_equal(png(folder, "local3", 1), (image * 255).round())
    assert data["methods"][0]["density"] == density
    assert data["methods"][0]["checked"]["density"] == pytest.approx(density)


def test_tables_hold_every_method_and_setting(evaluated):
    _, data = evaluated
    json.dumps(data, allow_nan=False)
    main, pairs = fidelity_tables(data)
    text = main.markdown() + pairs.markdown()
    assert [row[0] for row in main.rows] == ["local3", "top-k"]
    for words in ("window=3", "rectify=False", "weights " + data["weights"], "local3 - top-k"):
        assert words in text
    assert "LPIPS" not in main.head and "PSNR, dB" in main.head


class Killed(Exception):
    pass


def test_a_killed_evaluation_goes_on_and_finds_the_same(pipe, evaluated, tmp_path, monkeypatch):
    _, whole = evaluated
    run, calls = compare.run, []

    def dies(pipe, call, seed=0):
        calls.append(call["num_inference_steps"])
        if calls.count(2) == 3:
            raise Killed
        return run(pipe, call, seed)

    arguments = (pipe, SOURCE, CALL, ITEMS, [LOCAL, TOP], tmp_path)
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(compare, "run", dies)
        evaluate_fidelity(*arguments)
    kept = list(tmp_path.glob("*/records/*.json"))
    assert len(kept) == 2
    # What was cut off before its record is drawn again.
    (tmp_path / "dense" / "images" / "00001.png").write_bytes(b"half")
    resumed = evaluate_fidelity(*arguments)
    assert resumed["drawn_now"] == 7
    for a, b in zip(whole["methods"], resumed["methods"]):
        assert (a["pictures"], a["pooled"]) == (b["pictures"], b["pooled"])
    # Pictures of two sessions make no ratio of seconds: prompt 0 lacks a method of the first.
    assert all(m["dense_over_method_seconds"]["pairs"] >= 2 for m in resumed["methods"])
    again = evaluate_fidelity(*arguments)
    assert again["drawn_now"] == 0 and again["methods"] == resumed["methods"]


def test_other_settings_are_refused(pipe, evaluated):
    folder, _ = evaluated
    other = CALL | {"num_inference_steps": 3}
    with pytest.raises(ValueError, match=r"call.num_inference_steps: 2 -> 3.*another folder"):
        evaluate_fidelity(pipe, SOURCE, other, ITEMS, [LOCAL], folder)
    wide = dataclasses.replace(LOCAL, method=Local(window=4, tile=(1, 4, 4)))
    with pytest.raises(ValueError, match=r"attention.method.window: 3 -> 4"):
        evaluate_fidelity(pipe, SOURCE, CALL, ITEMS, [wide], folder)
    moved = [dataclasses.replace(ITEMS[0], seed=5)]
    with pytest.raises(ValueError, match=r"seed: 0 -> 5"):
        evaluate_fidelity(pipe, SOURCE, CALL, moved, [LOCAL], folder)
    retrained = flux_pipeline()
    with torch.no_grad():
        retrained.transformer.proj_out.weight.mul_(1.01)
    weights = [weights_digest(x.components) for x in (pipe, flux_pipeline(), retrained)]
    assert weights[0] == weights[1] != weights[2]
    with pytest.raises(ValueError, match="weights: "):
        evaluate_fidelity(retrained, SOURCE, CALL, ITEMS, [LOCAL], folder)


def test_a_method_that_equals_dense_is_identical(pipe, tmp_path):
    stays = Variant("stays", Local(window=3), Schedule(dense_first_steps=2))
    data = evaluate_fidelity(pipe, SOURCE, CALL, ITEMS[:2], [stays], tmp_path)
    (row,) = data["methods"]
    assert row["pooled"]["identical"] == 2 and row["pooled"]["psnr_db"]["mean"] is None
    assert row["pooled"]["ssim"]["mean"] == pytest.approx(1)
    assert "2 of 2" in fidelity_tables(data)[0].markdown()


def test_a_full_disk_keeps_what_was_drawn(pipe, tmp_path, monkeypatch):
    from dittfast.pipelines.measure import drawings

    write, written = drawings.write_record, []

    def full(path, *args):
        written.append(path)
        if "records" in str(path) and len(written) > 3:
            raise OSError(28, "No space left on device", str(path))
        write(path, *args)

    monkeypatch.setattr(drawings, "write_record", full)
    base = fidelity.base_settings(pipe, SOURCE, CALL, "auto")
    arms = [fidelity.Arm(pipe, base, tmp_path, v) for v in (None, LOCAL)]
    with pytest.raises(OSError, match=r"No space left.*1 pictures drawn before it are kept"):
        draw_missing(arms, CALL, ITEMS)
    assert len(list(tmp_path.glob("*/records/*.json"))) == 1


def test_stored_pictures_that_cannot_be_read_are_named(pipe, evaluated, tmp_path):
    folder = shutil.copytree(evaluated[0], tmp_path / "copy")
    (folder / "dense" / "images" / "00002.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"00002\.png: it was changed.*to draw it again"):
        evaluate_fidelity(pipe, SOURCE, CALL, ITEMS, [LOCAL], folder)
    (folder / "dense" / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json: it is not valid JSON"):
        evaluate_fidelity(pipe, SOURCE, CALL, ITEMS, [LOCAL], folder)


def test_a_video_has_temporal_numbers(tmp_path):
    pipe = wan_pipeline()
    call = dict(
        prompt="", height=48, width=80, num_frames=9, num_inference_steps=2, max_sequence_length=12
    )
    banded = Variant("radial", Radial(block_size=16, decay_factor=0.1), ALWAYS)
    data = evaluate_fidelity(pipe, SOURCE, call, ITEMS[:1], [banded], tmp_path)
    (found,) = data["methods"][0]["pictures"]
    clips = [
        np.stack(
            [
                np.asarray(Image.open(p)).astype(float)
                for p in sorted((tmp_path / label / "images").glob("00000_*.png"))
            ]
        )
        for label in ("dense", "radial")
    ]
    a, b = (np.diff(clip, axis=0) for clip in clips)
    assert a.shape == (8, 48, 80, 3)
    assert found["temporal_error"] == pytest.approx(np.sqrt(((b - a) ** 2).sum() / (a**2).sum()))
    assert found["motion_ratio"] == pytest.approx(np.abs(b).mean() / np.abs(a).mean())


@pytest.mark.parametrize(
    "method",
    [
        Local(window=3, tile=(1, 4, 4)),
        LogLinear(block_size=8, topk=2, levels=1),
        Rectified(block_size=16, topk=1, top_p=0),
        Linear(hidden=3),
        Mixture((Rule(Local(window=3), "1"), Rule(Linear(hidden=0), "2-3", heads=(1,)))),
    ],
    ids=lambda m: m.name,
)
def test_methods_are_checked_on_the_models_own_attention(pipe, method):
    call = CALL | {"prompt": "a red cat"}
    checked = check_method(pipe, call, method, Schedule(dense_layers=(0,)), "cpu")
    assert checked.backend == "cpu" and checked.layers == 3
    if method.name in ("linear", "mixture"):
        assert checked.density is None and 0 < checked.work < 1
        return
    assert 0 < checked.density < 1
    if method.name == "log_linear":
        # 12 pooled keys for each query of 108 tokens come on top of the token pairs.
        assert checked.work > checked.density
    else:
        assert checked.work == pytest.approx(checked.density)


def test_parity_looks_at_layers_all_over_the_model():
    from dittfast.pipelines.measure.method_check import spread

    assert spread(list(range(6)), 8) == list(range(6))
    found = spread(list(range(57)), 8)
    assert len(set(found)) == 8 and (found[0], found[-1]) == (0, 56)


def test_a_wrong_method_is_not_drawn(pipe, tmp_path, monkeypatch):
    from dittfast.measure import check

    right = check.attend
    monkeypatch.setattr(check, "attend", lambda *a, **k: right(*a, **k) * 1.01)
    with pytest.raises(WrongResult, match=r"local, layer transformer_blocks.0.attn: attend"):
        evaluate_fidelity(pipe, SOURCE, CALL, ITEMS, [LOCAL], tmp_path)
    assert not list(tmp_path.glob("*/records/*.json"))


@pytest.mark.parametrize("label", ["", "a b", "../x", ".hidden", "dense", "a/b"])
def test_labels_name_folders(label):
    with pytest.raises(ValueError, match="label"):
        Variant(label, Local())


def test_bad_evaluations(pipe, tmp_path):
    def run(variants, pairs=(), kernel="auto"):
        evaluate_fidelity(pipe, SOURCE, CALL, ITEMS, variants, tmp_path, pairs=pairs, kernel=kernel)

    with pytest.raises(ValueError, match="no method to compare"):
        run([])
    with pytest.raises(ValueError, match="'local3' is used twice"):
        run([LOCAL, LOCAL])
    with pytest.raises(ValueError, match="no method is labelled 'x'; labels: local3"):
        run([LOCAL], [("local3", "x")])
    with pytest.raises(ValueError, match="dense_kernel must be one of auto, math"):
        run([LOCAL], kernel="fast")


def test_variants_from_yaml_and_options(tmp_path):
    file = tmp_path / "many.yaml"
    file.write_text(
        "methods:\n"
        "  wide: {method: local, options: {window: 9}, schedule: {dense_first_steps: 1}}\n"
        "  best: {method: rectified, options: {block_size: 32}}\n"
        "pairs: [[wide, best]]\n"
    )
    chosen, pairs = read_variants(file)
    assert pairs == [("wide", "best")]
    wide, best = make_variants(chosen, {"min_tokens": 0, "best.topk": 3, "wide.window": 7}, "cpu")
    assert wide == Variant("wide", Local(window=7), Schedule(1, min_tokens=0), "cpu")
    assert best.method == Rectified(block_size=32, topk=3)
    single = tmp_path / "one.yaml"
    single.write_text("method: local\noptions: {window: 5}\n")
    assert make_variants(read_variants(single)[0]) == [
        Variant("one", Local(window=5), preset=str(single))
    ]
    with pytest.raises(ValueError, match="no method is labelled 'wde'; labels: wide, best"):
        make_variants(chosen, {"wde.window": 3})
    for text, words in (
        ("methods: {a: {method: local, option: {}}}", "unknown key 'option'. Did you mean"),
        ("methods: {a: {}}", "with the key 'method'"),
        ("methods: {a: {method: local, schedule: {window: 2}}}", "unknown schedule key 'window'"),
        ("methods: {}\npairs: [a]", "two labels each"),
        ("method_s: {}", "must hold 'methods'"),
        ("a: [", "not valid YAML"),
    ):
        single.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_variants(single)
    with pytest.raises(FileNotFoundError, match="no config file"):
        read_variants(tmp_path / "none.yaml")


def test_the_dense_kernel_holds_in_every_arm(pipe, monkeypatch, tmp_path):
    allowed = []
    run = compare.run

    def seen(*arguments):
        on = torch.backends.cuda
        allowed.append((on.math_sdp_enabled(), on.flash_sdp_enabled()))
        return run(*arguments)

    monkeypatch.setattr(compare, "run", seen)
    evaluate_fidelity(pipe, SOURCE, CALL, ITEMS[:1], [LOCAL], tmp_path, kernel="math")
    assert set(allowed) == {(True, False)} and len(allowed) == 4
    with dense_kernel("auto"):
        assert torch.backends.cuda.flash_sdp_enabled()


def test_prompts_of_every_form(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("# mine\n\n a red cat \na dog\n")
    assert read_prompts(text) == ["a red cat", "a dog"]
    data = tmp_path / "a.json"
    for value in (
        ["a red cat", "a dog"],
        [{"prompt_en": "a red cat", "dimension": []}, {"prompt": "a dog"}],
        {"annotations": [{"id": 1, "caption": "a red\ncat"}, {"caption": "a dog"}]},
    ):
        data.write_text(json.dumps(value))
        assert read_prompts(data) == ["a red cat", "a dog"]
    with pytest.raises(FileNotFoundError, match="no prompts file at"):
        read_prompts(tmp_path / "b.txt")
    for content, words in (("[1]", "entry 0"), ("{}", "expected a list"), ("{", "not valid JSON")):
        data.write_text(content)
        with pytest.raises(ValueError, match=words):
            read_prompts(data)
    text.write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(text)
    text.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_prompts(text)


def test_items_have_their_own_seeds():
    items = make_items(["a", "b"], 3, seed=10)
    assert items == [Item(0, "a", 10), Item(1, "b", 11), Item(2, "a", 12)]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        make_items(["a"], 0)


def test_drawings_count_when_their_record_is_there(tmp_path):
    store = Drawings(tmp_path / "a", {"x": 1})
    assert store.missing(ITEMS) == ITEMS
    assert json.loads((tmp_path / "a" / "settings.json").read_text())["x"] == 1


def test_lpips_is_never_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert missing_for_lpips()
    with pytest.raises(ValueError, match="LPIPS cannot be computed"):
        load_lpips()


def test_bootstrap_against_the_normal_approximation():
    x = np.random.default_rng(1).normal(5, 2, 400)
    found = bootstrap_mean(x)
    assert found["mean"] == pytest.approx(x.mean()) and found["n"] == 400
    half = 1.96 * x.std() / 20
    assert found["low"] == pytest.approx(x.mean() - half, abs=0.15 * half)
    assert found["high"] == pytest.approx(x.mean() + half, abs=0.15 * half)
    assert found == bootstrap_mean(x)
    assert bootstrap_mean([]) == {"mean": None, "low": None, "high": None, "n": 0}
    assert bootstrap_mean([2.0])["low"] is None
    assert interval(bootstrap_mean([2.0])) == "2.00" and interval(bootstrap_mean([])) == "-"
    with pytest.raises(ValueError, match="not finite"):
        bootstrap_mean([1, math.inf])


def test_cosine_and_temporal_consistency():
    a = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    b = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
    assert cosine(a, b) == pytest.approx(9 / 25)
    assert cosine(a, -a) == pytest.approx(-1)
    with pytest.raises(ValueError, match="zeros"):
        cosine(a, a * 0)
    still = torch.ones(3, 1, 2, 2)
    assert temporal_consistency(still, still)["temporal_error"] is None
    moving = still * torch.tensor([0.0, 1.0, 3.0]).view(3, 1, 1, 1)
    found = temporal_consistency(moving, moving * 2 + 7)
    assert found == {"temporal_error": pytest.approx(1), "motion_ratio": pytest.approx(2)}
    with pytest.raises(ValueError, match="2 frames or more"):
        temporal_consistency(still[:1], still[:1])


def test_markdown_cells_are_escaped():
    assert markdown_table(["a"], [["x|y\nz"]]) == "| a |\n| --- |\n| x\\|y z |\n"
    with pytest.raises(ValueError, match="a row has 1 cells, the head 2"):
        markdown_table(["a", "b"], [["x"]])
