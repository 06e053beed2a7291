"""Objectives of a head search against their formulas."""

import colorsys
import subprocess

import numpy as np
import pytest
import tiny
import torch
from interpreter import PYTHON

from dittfast.measure.features import load_features
from dittfast.pipelines.headhunter.objectives import (
    OBJECTIVES,
    Background,
    ClassProbability,
    ClipScore,
    Colorfulness,
    Contrast,
    Saturation,
    Sharpness,
    describe_objective,
    evaluate,
    find_objective,
)


@pytest.fixture
def images():
    return torch.rand(3, 3, 13, 17)


def test_saturation_is_that_of_hsv(images):
    wanted = [
        np.mean([colorsys.rgb_to_hsv(*pixel)[1] for pixel in image.flatten(1).T.tolist()])
        for image in images
    ]
    assert Saturation()(images).tolist() == pytest.approx(wanted, rel=1e-5)
    assert float(Saturation()(torch.zeros(1, 3, 4, 4))) == 0


def test_colorfulness(images):
    for image, score in zip(images.double().numpy(), Colorfulness()(images.double())):
        red, green, blue = image
        rg, yb = red - green, (red + green) / 2 - blue
        wanted = np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())
        assert float(score) == pytest.approx(wanted)
    gray = torch.rand(1, 1, 8, 8).expand(1, 3, 8, 8)
    assert float(Colorfulness()(gray)) == pytest.approx(0, abs=1e-6)


def test_contrast_and_sharpness(images):
    for image, contrast, sharp in zip(images.numpy(), Contrast()(images), Sharpness()(images)):
        luma = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
        assert float(contrast) == pytest.approx(luma.std(), rel=1e-5)
        edges = [
            luma[y - 1, x] + luma[y + 1, x] + luma[y, x - 1] + luma[y, x + 1] - 4 * luma[y, x]
            for y in range(1, 12)
            for x in range(1, 16)
        ]
        assert float(sharp) == pytest.approx(np.var(edges), rel=1e-4)


def test_background_is_the_rim_next_to_the_colour_asked_for():
    colors = {"red": (255, 0, 0), "blue": (0, 0, 255)}
    objective = Background(colors, rim=0.1)
    images = torch.zeros(2, 3, 20, 30)
    images[:, 2] = 1
    images[:, :, 2:-2, 2:-2] = 0.5
    scores = objective(images, ["a red heart, blue background", "a ball on red"])
    assert scores.tolist() == pytest.approx([1.0, 1 - (2 / 3) ** 0.5])
    assert objective.wanted("blue background, a red and red ball") == (0, 0, 255)
    with pytest.raises(ValueError, match=r"'a cat' names no background colour.*red, blue"):
        objective.wanted("a cat")
    with pytest.raises(ValueError, match=r"rim.*0\.7"):
        Background(rim=0.7)


class Classifier(torch.nn.Module):
    """Two classes from the mean of each colour."""

    def forward(self, x):
        return x.mean((2, 3))[:, :2] * 3


@pytest.mark.parametrize("kind", ["torchscript", "exported"])
def test_class_probability(images, tmp_path, kind):
    example = torch.zeros(3, 3, 8, 8)
    if kind == "torchscript":
        path = tmp_path / "classifier.pt"
        torch.jit.trace(Classifier(), example).save(path)
    else:
        path = tmp_path / "classifier.pt2"
        any_batch = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(Classifier(), (example,), dynamic_shapes=any_batch)
        torch.export.save(program, path)
    objective = ClassProbability(str(path), {"a cat": 1, "a dog": 0}, size=8, trust_code=True)
    prompts = ["a cat", "a dog", "a cat"]
    small = torch.nn.functional.interpolate(images, (8, 8), mode="bilinear", antialias=True)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    logits = ((small - mean) / std).mean((2, 3))[:, :2] * 3
    wanted = logits.softmax(-1)[torch.arange(3), torch.tensor([1, 0, 1])]
    torch.testing.assert_close(objective(images, prompts), wanted)
    assert "classifier" in describe_objective(objective)
    with pytest.raises(ValueError, match="no class for the prompt 'a bird'"):
        objective(images[:1], ["a bird"])
    with pytest.raises(ValueError, match=r"0\.\.1.*\[2, 2, 2\]"):
        ClassProbability(str(path), 2, size=8, trust_code=True)(images, prompts)


def test_class_probability_of_the_feature_network(images):
    network = load_features()
    label, colour = network.labels[3], network.backgrounds[2]
    objective = find_objective("class_probability")
    prompts = [f"a 3d emoji of a {label}, {colour} background"] * 2 + [f"a {label}"]
    labels, colours = (x.softmax(-1) for x in network(images))
    wanted = labels[:, 3] * torch.stack([colours[0, 2], colours[1, 2], torch.tensor(1.0)])
    torch.testing.assert_close(objective(images, prompts), wanted)
    assert network.name in describe_objective(objective)
    with pytest.raises(ValueError, match="both model and index, or neither"):
        find_objective("class_probability", index=3)


def test_a_classifier_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="no classifier file"):
        ClassProbability(str(tmp_path / "none.pt"), 0)
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match="neither TorchScript"):
        ClassProbability(str(tmp_path / "text.pt"), 0, trust_code=True)


@pytest.fixture
def clip_folder(tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    text = dict(vocab_size=64, hidden_size=32, intermediate_size=37, num_hidden_layers=1,
                num_attention_heads=4, bos_token_id=0, eos_token_id=2, pad_token_id=1,
                max_position_embeddings=32)  # fmt: skip
    vision = dict(hidden_size=32, intermediate_size=37, num_hidden_layers=1, image_size=16,
                  num_attention_heads=4, patch_size=8)  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    CLIPModel(config).save_pretrained(tmp_path)
    size = dict(shortest_edge=16)
    pictures = CLIPImageProcessor(size=size, crop_size=dict(height=16, width=16))
    CLIPProcessor(pictures, tiny.tokenizer("clip")).save_pretrained(tmp_path)
    return tmp_path


def test_clip_score_is_the_cosine(clip_folder):
    from transformers import CLIPModel, CLIPProcessor

    images = torch.rand(2, 3, 24, 24).mul(255).round() / 255
    prompts = ["a red cat", "the blue dog on the left"]
    scores = evaluate(ClipScore(str(clip_folder)), images, prompts)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    processor = CLIPProcessor.from_pretrained(clip_folder)
    for image, prompt, score in zip(images, prompts, scores):
        picture = (image.permute(1, 2, 0) * 255).round().byte().numpy()
        inputs = processor(text=[prompt], images=[picture], return_tensors="pt")
        inputs.pop("token_type_ids", None)  # CLIP has no use for them
        with torch.no_grad():
            wanted = model(**inputs).logits_per_image[0, 0]
        assert score == pytest.approx(float(wanted), rel=1e-4)


def test_clip_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name in ("clip", "pickscore"):
        with pytest.raises(ValueError, match=r"holds no CLIP model.*hf download"):
            find_objective(name, folder=str(tmp_path))


def mine(images):
    return [float(image.mean()) for image in images]


def test_own_functions(tmp_path, monkeypatch, images):
    path = tmp_path / "my_scores.py"
    path.write_text("def dark(images, prompts):\n    return -images.mean((1, 2, 3))\n")
    dark = find_objective(f"{path}:dark", True)
    scores = evaluate(dark, images, ["a"] * 3)
    assert scores.dtype == np.float64 and (scores < 0).all()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_objective("my_scores:dark", True)(images, []).tolist() == pytest.approx(
        scores.tolist()
    )
    assert describe_objective(dark) == "my_scores:dark"
    assert evaluate(mine, images, ["a"] * 3) == pytest.approx(images.mean((1, 2, 3)).numpy())


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("sharpnes", {}, "'sharpness'"),
        ("sharpness", dict(rim=1), "no option 'rim'.*has none"),
        ("background", dict(color=1), "'color'.*colors, rim"),
        ("clip", {}, "needs folder"),
        ("no_such_module:f", {}, "no_such_module"),
        ("none.py:f", {}, "none.py"),
        ("json:f", {}, "json has no function 'f'"),
        ("json:loads", dict(a=1), "no options"),
    ],
)
def test_objectives_that_do_not_exist(name, options, message):
    with pytest.raises(ValueError, match=message):
        find_objective(name, True, **options)


def test_the_command_line_lists_them_all():
    out = subprocess.run(
        [*PYTHON, "-m", "dittfast", "hunt", "--help"],
        capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(__import__("pathlib").Path(__file__).parents[1])},
    ).stdout  # fmt: skip
    assert all(name in out for name in OBJECTIVES)
