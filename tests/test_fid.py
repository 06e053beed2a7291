"""Distances through clean-fid: by hand, named for what they are, and refused where meaningless."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dittfast.cli import main
from dittfast.measure import fid
from dittfast.measure.features import (
    CleanFidExtractor,
    FeatureNetwork,
    load_features,
    prompt_probability,
    save_features,
)
from dittfast.measure.fid import Reference, check_pictures, frechet, picture_folder

LABELS, COLOURS = ("heart", "blue heart", "cat"), ("red", "blue")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return FeatureNetwork(
        LABELS, COLOURS, {"cat": ("kitten",)}, size=32, dims=8, name="tiny"
    ).eval()


def fill(folder, count, size=(40, 36), seed=0, offset=0):
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    for number in range(count):
        pixels = draw.integers(0, 200, (size[1], size[0], 3)) + offset
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:03d}.png")
    return folder


def by_hand(network, folders):
    """|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½), the root from eigenvalues."""
    moments = []
    for folder in folders:
        rows = []
        for path in sorted(folder.glob("*.png")):
            image = Image.open(path).resize((32, 32), Image.Resampling.BILINEAR)
            pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None].float() / 255
            with torch.no_grad():
                rows.append(network.features(pixels)[0].double().numpy())
        rows = np.array(rows)
        moments.append((rows.mean(0), np.cov(rows, rowvar=False)))
    (m1, c1), (m2, c2) = moments
    root = np.sqrt(np.linalg.eigvals(c1 @ c2).astype(complex)).real.sum()
    return ((m1 - m2) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * root


def test_the_distance_is_the_formulas(network, tmp_path):
    a, b = fill(tmp_path / "a", 30), fill(tmp_path / "b", 25, seed=1, offset=50)
    found = frechet(a, b, network)
    assert found["value"] == pytest.approx(by_hand(network, (a, b)), rel=1e-3)
    assert not found["is_fid"] and found["features"] == "tiny" and found["dims"] == 8
    assert (found["pictures"], found["reference_pictures"]) == (30, 25)
    assert frechet(a, a, network)["value"] == pytest.approx(0, abs=1e-4 * found["value"])


def test_clean_fid_called_directly_agrees(network, tmp_path):
    from cleanfid.fid import compute_fid

    a, b = fill(tmp_path / "a", 20), fill(tmp_path / "b", 20, seed=2, offset=20)
    extractor = CleanFidExtractor(network)
    direct = compute_fid(
        str(a), str(b), custom_feat_extractor=extractor, custom_fn_resize=extractor.resize,
        num_workers=0, device=torch.device("cpu"), use_dataparallel=False, verbose=False,
    )  # fmt: skip
    assert frechet(a, b, network)["value"] == pytest.approx(float(direct))


def test_too_few_pictures_are_refused_with_the_number_needed(network, tmp_path):
    a, b = fill(tmp_path / "a", 9), fill(tmp_path / "b", 8, seed=1)
    with pytest.raises(ValueError, match=r"b has 8 pictures.*8 features.*Draw 1 more.*allow-few"):
        frechet(a, b, network)
    assert frechet(a, b, network, allow_few=True)["too_few"]


def test_folders_are_read_before_anything_is_computed(network, tmp_path):
    a = fill(tmp_path / "a", 10)
    with pytest.raises(FileNotFoundError, match=r"no folder .*none"):
        frechet(a, tmp_path / "none", network)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no pictures"):
        frechet(a, tmp_path / "empty", network)
    mixed = fill(tmp_path / "mixed", 10)
    Image.new("RGB", (20, 20)).save(mixed / "small.png")
    with pytest.raises(ValueError, match=r"mixes 2 sizes \(40 x 36: 000.png; 20 x 20: small.png\)"):
        check_pictures(mixed)
    found = check_pictures(mixed, mixed_sizes=True)
    assert len(found.files) == 11 and found.sizes == {(40, 36), (20, 20)}
    broken = fill(tmp_path / "broken", 10)
    (broken / "003.png").write_bytes((broken / "003.png").read_bytes()[:200])
    (broken / "x.jpg").write_text("text")
    with pytest.raises(ValueError, match=r"2 of 11 pictures .* cannot be used: .*003.png"):
        frechet(a, broken, network)


def test_an_arm_stands_for_its_pictures(tmp_path):
    arm = tmp_path / "arm"
    fill(arm / "images", 2)
    assert picture_folder(arm) == arm
    (arm / "settings.json").write_text("{}")
    assert picture_folder(arm) == arm / "images"


def test_inception_is_never_downloaded(tmp_path, monkeypatch):
    import urllib.request

    monkeypatch.setattr(urllib.request, "urlopen", lambda *a: pytest.fail("asked the network"))
    monkeypatch.setattr(fid, "inception_path", lambda: tmp_path / "inception.pt")
    a = fill(tmp_path / "a", 3)
    with pytest.raises(FileNotFoundError, match="Inception's weights are not at"):
        frechet(a, a)
    (tmp_path / "inception.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"3 pictures, and Inception has 2048 features.*2046 more"):
        frechet(a, a)
    with pytest.raises(FileNotFoundError, match="the statistics of nothing are not at"):
        frechet(a, Reference("nothing", "train", "256"), allow_few=True)
    with pytest.raises(ValueError, match="NAME:SPLIT:RESOLUTION, got 'coco'"):
        Reference.parse("coco")


def test_a_network_is_saved_and_loaded(network, tmp_path):
    save_features(network, tmp_path / "net", {"steps": 1})
    loaded = load_features(tmp_path / "net")
    images = torch.rand(3, 3, 50, 50)
    with torch.no_grad():
        assert torch.allclose(loaded.features(images), network.features(images), atol=2e-2)
    assert (loaded.labels, loaded.backgrounds, loaded.synonyms) == (
        LABELS, COLOURS, {"cat": ("kitten",)},
    )  # fmt: skip
    (tmp_path / "net" / "features.json").write_text("{}")
    with pytest.raises(ValueError, match=r"features\.json: it is not what is read here"):
        load_features(tmp_path / "net")
    with pytest.raises(FileNotFoundError, match=r"features.json is missing"):
        load_features(tmp_path)


@pytest.mark.parametrize(
    "prompt, named",
    [
        ("a blue heart on a red background", (1, 0)),
        ("a 3d emoji of a heart, blue background", (0, 1)),
        ("a blue heart", (1, None)),
        ("two kittens on blue", (2, 1)),
        ("concatenate", (None, None)),
    ],
)
def test_prompts_name_labels_and_backgrounds(network, prompt, named):
    assert network.named_in(prompt) == named


def test_prompt_probability_is_a_product(network):
    images = torch.rand(2, 3, 32, 32)
    label, colour = (torch.softmax(x, -1).detach() for x in network(images))
    found = prompt_probability(network, images, ["a cat, red background", "a blue heart"])
    assert found[0] == pytest.approx(float(label[0, 2] * colour[0, 0]))
    assert found[1] == pytest.approx(float(label[1, 1]))
    with pytest.raises(ValueError, match="names no label that tiny knows"):
        prompt_probability(network, images[:1], ["a dog"])
    with pytest.raises(ValueError, match="2 pictures and 1 prompts"):
        prompt_probability(network, images, ["a cat"])


def test_the_command_names_the_features(network, tmp_path, capsys):
    from cleanfid.fid import compute_fid

    save_features(network, tmp_path / "net", {})
    a, b = fill(tmp_path / "a", 12), fill(tmp_path / "b", 12, seed=4)
    features = ["--features", str(tmp_path / "net"), "--device", "cpu", "--json", "-"]
    assert main(["evaluate", "fid", str(a), str(b), "--against", str(b), *features]) == 0
    out, said = capsys.readouterr()
    assert "Fréchet distance of tiny (not Inception, so not FID; clean-fid)" in said
    rows = json.loads(out)["rows"]
    assert [r["pictures"] for r in rows] == [12, 12] and rows[1]["value"] < rows[0]["value"]
    extractor = CleanFidExtractor(load_features(tmp_path / "net"))
    direct = compute_fid(
        str(a), str(b), custom_feat_extractor=extractor, custom_fn_resize=extractor.resize,
        num_workers=0, device=torch.device("cpu"), use_dataparallel=False, verbose=False,
    )  # fmt: skip
    assert rows[0]["value"] == pytest.approx(float(direct), rel=1e-5)
    assert main(["evaluate", "fid", str(a), "--against", str(tmp_path / "c"), *features]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_the_shipped_network_knows_the_samples_art():
    """Flat colours are all that is here of the art: the backgrounds at least must be right."""
    network = load_features()
    from dittfast.samples.captions import BACKGROUNDS, LABELS

    assert network.labels == tuple(LABELS) and network.backgrounds == tuple(BACKGROUNDS)
    colours = torch.tensor(list(BACKGROUNDS.values())).float() / 255
    with torch.no_grad():
        _, found = network(colours[:, :, None, None].expand(-1, -1, 64, 64))
    assert (found.argmax(-1) == torch.arange(len(colours))).float().mean() >= 0.75
    assert not network.training and network.dims == 64
