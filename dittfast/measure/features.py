"""A small feature network: classifies the sample model's pictures, and gives features for FID."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ..disk.problems import reading
from ..disk.records import read_record, write_record
from ..disk.tensors import check_finite, read_headers, read_tensors, write_tensors

SHIPPED = "sample-features"
_WIDTHS = (24, 48, 64, 96, 96)
_FORM = {
    "labels": [str],
    "backgrounds": [str],
    "synonyms?": {"*": [str]},
    "size?": int,
    "dims?": int,
    "name?": str,
    "training?": object,
}


class FeatureNetwork(nn.Module):
    """A convolutional classifier of labels and background colours.

    Its features are no Inception features: distances in them compare pictures of the sample
    model's kind with each other, and with nothing that is published.

    Args:
        labels: names of the objects.
        backgrounds: names of the background colours.
        synonyms: other names of labels.
        size: pixels of the squares it looks at; other pictures are scaled.
        dims: number of features.
        name: what results call it.
    """

    def __init__(
        self,
        labels: Sequence[str],
        backgrounds: Sequence[str],
        synonyms: Mapping[str, Sequence[str]] | None = None,
        size: int = 64,
        dims: int = 64,
        name: str = SHIPPED,
    ):
        super().__init__()
        self.labels, self.backgrounds = tuple(labels), tuple(backgrounds)
        self.synonyms = {k: tuple(v) for k, v in (synonyms or {}).items()}
        self.size, self.dims, self.name = size, dims, name
        layers: list[nn.Module] = []
        before = 3
        for number, width in enumerate(_WIDTHS):
            layers += [
                nn.Conv2d(before, width, 3, stride=2 if number else 1, padding=1),
                nn.GroupNorm(8, width),
                nn.SiLU(),
            ]
            before = width
        self.trunk = nn.Sequential(*layers)
        self.project = nn.Linear(before * 4, dims)
        self.label_head = nn.Linear(dims, len(self.labels))
        self.background_head = nn.Linear(dims, len(self.backgrounds))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """``[B, dims]`` for pictures ``[B, 3, H, W]`` in 0..1; differentiable."""
        if images.shape[-2:] != (self.size, self.size):
            # Antialiased, so that a large picture looks like a small one of the same scene.
            images = F.interpolate(
                images, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False
            )
        x = self.trunk(images * 2 - 1)
        return self.project(F.adaptive_avg_pool2d(x, 2).flatten(1))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of labels and of backgrounds."""
        features = self.features(images)
        return self.label_head(features), self.background_head(features)

    def named_in(self, prompt: str) -> tuple[int | None, int | None]:
        """Indices of the label and the background that a prompt names; None where it names none.

        The longest label wins. The background is the colour word before "background", else the
        last colour word that is not part of the label.
        """
        text = " ".join(re.findall(r"[a-z0-9]+", prompt.lower()))
        names = {label.lower(): i for i, label in enumerate(self.labels)}
        for label, others in self.synonyms.items():
            names |= {other.lower(): names[label.lower()] for other in others}
        candidates = [n for n in names if re.search(rf"\b{re.escape(n)}s?\b", text)]
        label = max(candidates, key=len, default=None)
        rest = text if label is None else re.sub(rf"\b{re.escape(label)}s?\b", " ", text, count=1)
        words = rest.split()
        colours = {name.lower(): i for i, name in enumerate(self.backgrounds)}
        before = [a for a, b in itertools.pairwise(words) if b == "background" and a in colours]
        named = before or [w for w in words if w in colours]
        return (
            None if label is None else names[label],
            colours[named[-1]] if named else None,
        )


@torch.no_grad()
def prompt_probability(
    network: FeatureNetwork, images: torch.Tensor, prompts: Sequence[str]
) -> torch.Tensor:
    """``[B]``: the probability that each picture shows what its prompt names.

    The label's probability times the background's; a prompt that names only one counts that one.

    Args:
        images: ``[B, 3, H, W]`` in 0..1.

    Raises:
        ValueError: a prompt that names neither a label nor a background, or another number of
            prompts than pictures.
    """
    if len(images) != len(prompts):
        raise ValueError(f"there are {len(images)} pictures and {len(prompts)} prompts")
    logits = network(images)
    score = torch.ones(len(images), device=images.device)
    for row, prompt in enumerate(prompts):
        named = network.named_in(prompt)
        if named == (None, None):
            raise ValueError(
                f"the prompt {prompt!r} names no label that {network.name} knows, such as "
                f"{', '.join(network.labels[:5])}"
            )
        for index, head_logits in zip(named, logits):
            if index is not None:
                score[row] *= torch.softmax(head_logits[row].float(), -1)[index]
    return score


def save_features(network: FeatureNetwork, folder: str | Path, facts: dict) -> None:
    """Write the weights in fp16 and, as JSON, what they are for; ``facts`` says how they came."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.half().contiguous() for k, v in network.state_dict().items()}
    write_tensors(folder / "model.safetensors", weights)
    about = {k: getattr(network, k) for k in ("name", "size", "dims", "labels", "backgrounds")}
    about["synonyms"] = network.synonyms
    write_record(folder / "features.json", about | {"training": facts}, ["model.safetensors"])


def load_features(folder: str | Path | None = None, device="cpu") -> FeatureNetwork:
    """The network in a folder that ``samples/train_features.py`` wrote; without one, the shipped.

    Raises:
        FileNotFoundError: no such network.
        ValueError: files that are no such network.
    """
    if folder is None:
        folder = resources.files("dittfast.samples") / "models" / SHIPPED
    folder = Path(str(folder))
    for name in ("features.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"no feature network in {folder}: {name} is missing; samples/train_features.py "
                "writes both files"
            )
    remedy = "samples/train_features.py writes such files; or use --features sample"
    record = read_record(folder / "features.json", _FORM, remedy=remedy)
    path = record.check("model.safetensors", remedy)
    about = {k: v for k, v in record.data.items() if k != "training"}
    with reading(folder / "features.json", "it describes no feature network", remedy):
        with torch.device("meta"):  # sizes are taken from the file; none is allocated for them
            network = FeatureNetwork(**about)
        wanted = {name: tuple(x.shape) for name, x in network.state_dict().items()}
        there = {name: header.shape for name, header in read_headers(path, remedy).items()}
        if there != wanted:
            raise ValueError("its weights have other names or shapes")
    weights = read_tensors(path, remedy=remedy)
    check_finite(path, weights, remedy)
    network.load_state_dict({k: v.float() for k, v in weights.items()}, assign=True)
    return network.to(device).eval().requires_grad_(False)


class CleanFidExtractor:
    """The network as clean-fid's ``custom_feat_extractor``; :meth:`resize` is its resizer."""

    def __init__(self, network: FeatureNetwork):
        self.network = network

    def resize(self, image: np.ndarray) -> np.ndarray:
        """``[size, size, 3]`` float32 in 0..255 of a uint8 picture ``[H, W, 3]``."""
        side = (self.network.size, self.network.size)
        scaled = Image.fromarray(image).resize(side, Image.Resampling.BILINEAR)
        return np.asarray(scaled, dtype=np.float32)

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        return self.network.features(batch.float() / 255)
