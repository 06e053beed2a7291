"""What a head search maximises: a score for each picture, higher is better.

An objective is a callable ``(images [B, 3, H, W] in 0..1, prompts) -> B scores``, or one that takes
the images alone.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dittfast.measure.features import load_features, prompt_probability

Objective = Callable[..., torch.Tensor]
# sRGB of colour words, for prompts that ask for a background.
COLORS = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "grey": (128, 128, 128),
    "red": (220, 40, 40),
    "orange": (250, 150, 40),
    "yellow": (250, 220, 60),
    "green": (60, 170, 70),
    "blue": (60, 110, 220),
    "purple": (130, 70, 180),
    "pink": (245, 160, 195),
    "brown": (130, 85, 45),
}


def _luma(images: torch.Tensor) -> torch.Tensor:
    """``[B, H, W]``, the weights of ITU-R BT.601."""
    return torch.einsum("bchw,c->bhw", images, images.new_tensor([0.299, 0.587, 0.114]))


@dataclass(frozen=True)
class Saturation:
    """Mean of (max - min) / max over the three colours, 0 for grey and 1 for pure colours."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        high, low = images.amax(1), images.amin(1)
        return ((high - low) / high.clamp_min(1e-6)).mean((1, 2))


@dataclass(frozen=True)
class Colorfulness:
    """Hasler and Suesstrunk's colourfulness (2003), of values in 0..1."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        red, green, blue = images.unbind(1)
        opponents = torch.stack([red - green, (red + green) / 2 - blue], 1).flatten(2)
        spread = opponents.var(2, correction=0).sum(1).sqrt()
        return spread + 0.3 * opponents.mean(2).square().sum(1).sqrt()


@dataclass(frozen=True)
class Contrast:
    """Standard deviation of the luma (RMS contrast)."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return _luma(images).flatten(1).std(1, correction=0)


@dataclass(frozen=True)
class Sharpness:
    """Variance of the luma's 4-neighbour Laplacian; high for fine edges, and for noise too."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        kernel = images.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]]).view(1, 1, 3, 3)
        edges = F.conv2d(_luma(images)[:, None], kernel)
        return edges.flatten(1).var(1, correction=0)


@dataclass(frozen=True)
class Background:
    """How close the rim of the picture is to the background colour that the prompt asks for.

    1 minus the mean distance of the rim's pixels in RGB, over the largest possible one: 1 is the
    colour itself. The colour is the word before "background", else the prompt's last colour word.

    Args:
        colors: sRGB in 0..255 by colour word.
        rim: width of the rim as a fraction of the shorter side.

    Raises:
        ValueError: at the call, a prompt that names none of the colours.
    """

    colors: Mapping[str, tuple[int, int, int]] = field(default_factory=lambda: dict(COLORS))
    rim: float = 0.06

    def __post_init__(self):
        if not 0 < self.rim <= 0.5:
            raise ValueError(f"rim must lie in 0..0.5 (exclusive of 0), got {self.rim!r}")

    def wanted(self, prompt: str) -> tuple[int, int, int]:
        """The colour that a prompt asks for."""
        words = re.findall(r"[a-z]+", prompt.lower())
        for word, after in itertools.pairwise(words):
            if after == "background" and word in self.colors:
                return self.colors[word]
        named = [word for word in words if word in self.colors]
        if not named:
            raise ValueError(
                f"the prompt {prompt!r} names no background colour; known: {', '.join(self.colors)}"
            )
        return self.colors[named[-1]]

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        height, width = images.shape[-2:]
        wide = max(1, round(self.rim * min(height, width)))
        rim = torch.ones(height, width, dtype=torch.bool, device=images.device)
        rim[wide : height - wide, wide : width - wide] = False
        wanted = images.new_tensor([self.wanted(p) for p in prompts]) / 255
        return 1 - (images[:, :, rim] - wanted[..., None]).norm(dim=1).mean(1) / 3**0.5


@dataclass(frozen=True)
class ClassProbability:
    """The probability that a classifier gives to a class.

    Without arguments the classifier is the feature network that comes with the package, which knows
    the sample model's pictures, and the class what the prompt names: label times background.

    Args:
        model: a classifier ``[B, 3, size, size] -> logits [B, classes]``, as a TorchScript file
            (``torch.jit.save``) or an exported program (``torch.export.save``, .pt2); it must
            take any number of pictures. Such a file is a program.
        index: the wanted class: one for all prompts, or by prompt.
        size: side of the pictures it takes.
        mean, std: of its normalisation; the defaults are ImageNet's.
        trust_code: run the program in ``model``.

    Raises:
        ValueError: no such file, one that is not trusted or cannot be loaded, or only one of
            ``model`` and ``index``; at the call, a class that the classifier does not have, or a
            prompt without one.
    """

    model: str | None = None
    index: int | Mapping[str, int] | None = None
    size: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    trust_code: bool = field(default=False, repr=False)

    def __post_init__(self):
        if (self.model is None) != (self.index is None):
            raise ValueError(
                "class_probability needs both model and index, or neither for the sample model's "
                f"own classifier; got model={self.model!r}, index={self.index!r}"
            )
        if self.model is None:
            object.__setattr__(self, "_network", load_features())
            return
        path = Path(self.model)
        if not path.is_file():
            raise ValueError(f"there is no classifier file at {path}")
        if not self.trust_code:
            raise ValueError(f"{path} is a program, {_UNTRUSTED}")
        try:
            if path.suffix == ".pt2":
                network = torch.export.load(path).module()
            else:
                network = torch.jit.load(path, map_location="cpu").eval()
        except Exception as error:  # each format raises its own
            raise ValueError(
                f"{path} is neither TorchScript (torch.jit.save) nor an exported program "
                f"(torch.export.save, .pt2): {str(error).splitlines()[0][:160]}"
            ) from error
        object.__setattr__(self, "_network", network)

    def _class(self, prompt: str) -> int:
        if isinstance(self.index, int):
            return self.index
        if prompt not in self.index:
            raise ValueError(f"index has no class for the prompt {prompt!r}")
        return self.index[prompt]

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        network = self._network.to(images.device)
        if self.model is None:
            return prompt_probability(network, images.float(), prompts)
        x = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.std))
        probability = network((x - mean) / std).float().softmax(-1)
        wanted = torch.tensor([self._class(p) for p in prompts], device=images.device)
        if not ((wanted >= 0) & (wanted < probability.shape[1])).all():
            raise ValueError(
                f"index must lie in 0..{probability.shape[1] - 1} for this classifier, "
                f"got {wanted.tolist()}"
            )
        return probability.gather(1, wanted[:, None])[:, 0]


@dataclass(frozen=True)
class ClipScore:
    """Agreement of picture and prompt by a CLIP model: cosine times the model's logit scale.

    PickScore (arXiv:2305.01569) is such a model with weights of its own.

    Args:
        folder: where the model and its processor lie, as ``save_pretrained`` wrote them.

    Raises:
        ValueError: no such folder, or one without config.json and weights.
    """

    folder: str

    def __post_init__(self):
        folder = Path(self.folder)
        weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
        if not (folder / "config.json").is_file() or not weights:
            raise ValueError(
                f"{folder} holds no CLIP model: it needs config.json, the weights and the "
                "processor's files. Fetch one first, such as: hf download "
                "yuvalkirstain/PickScore_v1 --local-dir FOLDER"
            )
        from transformers import AutoProcessor, CLIPModel

        model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
        object.__setattr__(self, "_model", model)
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        object.__setattr__(self, "_processor", processor)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        model = self._model.to(images.device)
        pictures = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        inputs = self._processor(
            text=list(prompts), images=list(pictures), return_tensors="pt", padding=True,
            truncation=True,
        ).to(images.device)  # fmt: skip
        # Some tokenizers give more than CLIP takes.
        given = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        out = model(**given)
        image, text = (F.normalize(x, dim=-1) for x in (out.image_embeds, out.text_embeds))
        return (image * text).sum(-1) * model.logit_scale.exp()


OBJECTIVES: dict[str, type] = {
    "saturation": Saturation,
    "colorfulness": Colorfulness,
    "contrast": Contrast,
    "sharpness": Sharpness,
    "background": Background,
    "class_probability": ClassProbability,
    "clip": ClipScore,
    "pickscore": ClipScore,
}


_UNTRUSTED = (
    "which could do anything that you can; read it, or know who wrote it, and allow it with "
    "--trust-code (trust_code=True)"
)


def find_objective(name: str, trust_code: bool = False, /, **options) -> Objective:
    """A built-in objective by name, or ``module:function``, or ``file.py:function``.

    Args:
        trust_code: run the code of a module, a file, or a classifier of one's own.
        options: fields of a built-in objective.

    Raises:
        ValueError: no such objective (the nearest is named), module, function or option; code
            that is not trusted.
    """
    if name in OBJECTIVES:
        known = [f.name for f in fields(OBJECTIVES[name])]
        for key in options:
            if key not in known:
                raise ValueError(
                    f"the objective {name} has no option {key!r}; "
                    f"{'it has ' + ', '.join(known) if known else 'it has none'}"
                )
        if "trust_code" in known:
            options.setdefault("trust_code", trust_code)
        try:
            return OBJECTIVES[name](**options)
        except TypeError as error:
            raise ValueError(f"the objective {name} needs {', '.join(known)}") from error
    module, colon, function = name.rpartition(":")
    if not colon:
        near = difflib.get_close_matches(name, OBJECTIVES, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"no objective {name!r}.{hint} Built in: {', '.join(OBJECTIVES)}; your own is "
            "module:function or file.py:function"
        )
    if options:
        raise ValueError(f"{name} is your own function; it takes no options, got {list(options)}")
    if not trust_code:
        raise ValueError(f"{name} names code, {_UNTRUSTED}")
    try:
        return getattr(_module(module), function)
    except (ImportError, OSError) as error:
        raise ValueError(f"could not import {module!r} for the objective: {error}") from error
    except AttributeError as error:
        raise ValueError(f"{module} has no function {function!r}") from error


def _module(name: str):
    if not name.endswith(".py"):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def describe_objective(objective: Objective) -> str:
    """A built-in objective with its options, or where another one was defined."""
    if isinstance(objective, ClassProbability) and objective.model is None:
        return f"ClassProbability({objective._network.name})"
    if type(objective) in OBJECTIVES.values():
        return repr(objective)
    named = objective if hasattr(objective, "__qualname__") else type(objective)
    return f"{named.__module__}:{named.__qualname__}"


def evaluate(objective: Objective, images: torch.Tensor, prompts: Sequence[str]) -> np.ndarray:
    """The scores ``[B]`` fp64 of pictures ``[B, 3, H, W]``, whatever the objective returns them as.

    Raises:
        ValueError: not one score a picture.
    """
    try:
        required = [
            p for p in inspect.signature(objective).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
        ]  # fmt: skip
        alone = len(required) == 1
    except (TypeError, ValueError):  # some C functions have no signature
        alone = True
    scores = objective(images) if alone else objective(images, list(prompts))
    if isinstance(scores, torch.Tensor):
        scores = scores.detach().double().cpu().numpy()
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape != (len(images),):
        raise ValueError(
            f"the objective {describe_objective(objective)} returned shape {list(scores.shape)} "
            f"for {len(images)} pictures; it must return one number for each, [{len(images)}]"
        )
    return scores
