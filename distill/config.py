"""The configuration of a distillation run: YAML to frozen dataclasses, strictly."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from dittfast.config import parse_yaml, resolve, unknown
from dittfast.disk.records import read_text
from dittfast.methods.base import Method
from dittfast.methods.checks import check_choice, check_integer, check_positive
from dittfast.schedule import Schedule

TRAINABLE = ("attention", "lora", "method", "all")


def _check_weight(name: str, value) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")


def _check_fraction(name: str, value, remedy: str) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} must lie in 0..1, 1 excluded; got {value!r} ({remedy})")


def _check_part(name: str, time_range, crop) -> None:
    """Times that lie in 0..1, and a window of whole tokens."""
    low, high = time_range
    if not 0 <= low < high <= 1:
        raise ValueError(
            f"{name}.time_range must be (low, high) with 0 <= low < high <= 1, got {low}, {high}"
        )
    for side in crop or ():
        check_integer(f"each of {name}.crop", side, 1)


@dataclass(frozen=True)
class ModelConfig:
    """The pipeline that is teacher and base of the student.

    Attributes:
        path: a sample model, a diffusers folder or a hub id.
        component: the transformer to train; "transformer_2" is Wan 2.2's second expert.
        dtype: of the frozen weights: auto, float32, float16 or bfloat16.
        separate_teacher: keep a whole second transformer for the teacher. Without it the teacher
            borrows the student's frozen weights, and only what is trained is kept twice.
    """

    path: str
    component: str = "transformer"
    dtype: str = "auto"
    separate_teacher: bool = False

    def __post_init__(self):
        check_choice("model.dtype", self.dtype, ("auto", "float32", "float16", "bfloat16"))


@dataclass(frozen=True)
class StudentConfig:
    """What the student does differently, and which of its parameters learn.

    Attributes:
        method: a method or preset, as in :func:`dittfast.enable`.
        options: the method's options.
        schedule: ``dense_layers`` and ``min_tokens`` (0 by default: train sparse at any size);
            dense steps mean nothing in training, but are used in validation.
        trainable: "attention" (to_q, to_k, to_v, to_out of the self-attention layers and the
            method's parameters), "lora" (and the method's parameters), "method" or "all".
        rank, alpha, targets, dropout: of the LoRA; alpha None is the rank. Targets are module
            names within attention, or any that PEFT understands.
        start: folder of an adapter to start from; None starts from the teacher.
    """

    method: str = "dense"
    options: dict = field(default_factory=dict)
    schedule: dict = field(default_factory=dict)
    trainable: str = "attention"
    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    dropout: float = 0.0
    start: str | None = None

    def __post_init__(self):
        check_choice("student.trainable", self.trainable, TRAINABLE)
        check_integer("student.rank", self.rank, 1)
        if self.alpha is not None:
            check_positive("student.alpha", self.alpha)
        _check_fraction("student.dropout", self.dropout, "it is the LoRA's")
        self.resolved()

    def resolved(self) -> tuple[Method, Schedule]:
        """The method and the schedule."""
        schedule = {"min_tokens": 0, **self.schedule}
        return resolve(self.method, **self.options, **schedule)


@dataclass(frozen=True)
class MixedSet:
    """What a run takes from one of ``data.mix``.

    Attributes:
        share: how many batches for one of the run's own set.
        time_range, crop: ``train.time_range`` and ``train.crop`` for this set; None takes those.
    """

    share: float
    time_range: tuple[float, float] | None = None
    crop: tuple[int, int] | None = None


@dataclass(frozen=True)
class DataConfig:
    """Cached latents and prompt embeddings, and what ``dittfast distill prepare`` makes them from.

    Attributes:
        folder: where the shards lie.
        prompts: for which the teacher draws; one that ends in .txt is a file with a prompt on
            each line.
        pictures: a folder of pictures or videos with captions, instead of ``prompts``.
        count: how many samples; None for one of each prompt or picture. More than that repeats
            prompts with new seeds.
        call: arguments of the pipeline's call, over the sample model's own.
        position_scale: the transformer's position ids times this, in the set and in validation;
            0.25 fits pictures of four times the side into the positions that the model knows.
        mix: folders of further sets of the same model, and how many batches are taken from each
            for one of this set's, ``{data/small: 0.5}``; or a mapping of :class:`MixedSet`'s
            fields, ``{data/small: {share: 0.5, time_range: [0.6, 1]}}``.
        seed: sample i is drawn from seed + i.
        shard_size: samples in one file.
    """

    folder: str
    prompts: tuple[str, ...] = ()
    pictures: str | None = None
    count: int | None = None
    call: dict = field(default_factory=dict)
    position_scale: float = 1.0
    mix: dict = field(default_factory=dict)
    seed: int = 0
    shard_size: int = 16

    def __post_init__(self):
        check_positive("data.position_scale", self.position_scale)
        object.__setattr__(self, "mix", {k: _mixed_set(k, x) for k, x in self.mix.items()})
        if self.prompts and self.pictures:
            raise ValueError(
                "data.prompts and data.pictures are both given; the samples come from one of them"
            )
        if self.count is not None:
            check_integer("data.count", self.count, 1)
        check_integer("data.seed", self.seed, 0)
        check_integer("data.shard_size", self.shard_size, 1)


@dataclass(frozen=True)
class LossWeights:
    """Weights of the losses, and the layers that two of them look at.

    Attributes:
        denoising: the pipeline's own loss on the data (flow matching, noise or v).
        prediction: MSE to the teacher's prediction.
        attention: MSE to the teacher's attention outputs, before the output projection.
        attention_layers: as ``dense_layers`` of a schedule: indices, ranges, name patterns.
        features: 1 - cosine to the teacher's block outputs, token by token (after REPA,
            arXiv:2410.06940, with the dense teacher in the place of the image encoder).
        feature_layers: the same kind of list; the block around each self-attention layer.
        load_balance: of ``mixture_of_heads``, whose heads shall be taken alike; 0.01 in its paper.
    """

    denoising: float = 1.0
    prediction: float = 0.5
    attention: float = 0.5
    attention_layers: tuple[int | str, ...] = ("*",)
    features: float = 0.0
    feature_layers: tuple[int | str, ...] = ("*",)
    load_balance: float = 0.0

    def __post_init__(self):
        for name in ("denoising", "prediction", "attention", "features", "load_balance"):
            _check_weight(f"objectives.{name}", getattr(self, name))
        if not (self.denoising or self.needs_teacher):
            raise ValueError("all objectives have weight 0; give one of them a weight")

    @property
    def reported(self) -> list[str]:
        """The losses with a weight that the method itself reports."""
        return ["load_balance"] if self.load_balance else []

    @property
    def needs_teacher(self) -> bool:
        return bool(self.prediction or self.attention or self.features)


@dataclass(frozen=True)
class TrainConfig:
    """The run itself.

    Attributes:
        output: folder of checkpoints, metrics and the finished adapter.
        steps: optimiser steps.
        batch_size: samples of one process in one pass. A step sees
            ``batch_size * accumulation * processes`` samples.
        seed: of the order of the data, the noise and the times; with one global batch they do
            not depend on the number of processes.
        mixed_precision: no, bf16 or fp16.
        optimizer: adamw; muon (Jordan et al. 2024) for the matrices inside the blocks, with AdamW
            at the same rate for the rest; or prodigy (Mishchenko & Defazio 2023,
            arXiv:2306.06101; needs ``pip install prodigyopt``, use lr 1).
        lr_schedule: constant, linear or cosine (both fall to 0), after ``warmup_steps``.
        clip: largest norm of the gradient; None for no limit.
        ema: decay of averaged weights, warmed up; None for none.
        time_distribution: uniform or logit_normal (arXiv:2403.03206), then
            ``t -> shift t / (1 + (shift - 1) t)`` and into ``time_range``; 1 is pure noise. Noise
            s times as strong has the ratio of data and noise that a shift of s has.
        time_range: Wan 2.2's experts each train on their own part, and sets of ``data.mix`` may.
        crop: (height, width) in tokens of the window that a batch shows of its pictures, at a place
            from the seed and with the positions of that place; null for whole pictures. Of models
            that are given position ids.
        drop_prompt: fraction of samples with the negative prompt, for guidance without a prompt.
        checkpoint_every, keep: steps between checkpoints, and how many of them stay.
        trackers: tensorboard, wandb; metrics.jsonl is always written.
        verify: compare checkpoints, shards and the adapter in ``student.start`` with the SHA-256
            that was written with them.
    """

    output: str
    steps: int
    batch_size: int = 1
    accumulation: int = 1
    seed: int = 0
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-2
    lr_schedule: str = "constant"
    warmup_steps: int = 0
    clip: float | None = 1.0
    ema: float | None = None
    time_distribution: str = "uniform"
    time_shift: float = 1.0
    time_range: tuple[float, float] = (0.0, 1.0)
    crop: tuple[int, int] | None = None
    drop_prompt: float = 0.0
    checkpoint_every: int = 500
    keep: int = 2
    trackers: tuple[str, ...] = ()
    verify: bool = True

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulation", "checkpoint_every", "keep"):
            check_integer(f"train.{name}", getattr(self, name), 1)
        for name in ("seed", "warmup_steps"):
            check_integer(f"train.{name}", getattr(self, name), 0)
        for name in ("lr", "time_shift"):
            check_positive(f"train.{name}", getattr(self, name))
        _check_part("train", self.time_range, self.crop)
        if self.clip is not None:
            check_positive("train.clip", self.clip, "null for no limit")
        if self.ema is not None:
            _check_fraction("train.ema", self.ema, "null for no averaged weights")
        _check_fraction("train.drop_prompt", self.drop_prompt, "0.1 is usual")
        _check_weight("train.weight_decay", self.weight_decay)
        for beta in self.betas:
            _check_fraction("each of train.betas", beta, "0.9 and 0.999 are usual")
        check_choice("train.mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        check_choice("train.optimizer", self.optimizer, ("adamw", "muon", "prodigy"))
        check_choice("train.lr_schedule", self.lr_schedule, ("constant", "linear", "cosine"))
        check_choice("train.time_distribution", self.time_distribution, ("uniform", "logit_normal"))
        for tracker in self.trackers:
            check_choice("each of train.trackers", tracker, ("tensorboard", "wandb"))


@dataclass(frozen=True)
class ValidationConfig:
    """Pictures of the student and the teacher from the same noise, every so many steps.

    Attributes:
        every: steps between validations, the first before training; 0 for none.
        prompts: what to draw.
        call: arguments of the pipeline's call, over those of the data.
        seed: the first picture's; each further one counts up.
    """

    every: int = 0
    prompts: tuple[str, ...] = ()
    call: dict = field(default_factory=dict)
    seed: int = 1000

    def __post_init__(self):
        check_integer("validation.every", self.every, 0)
        check_integer("validation.seed", self.seed, 0)
        if self.every and not self.prompts:
            raise ValueError("validation.every is set, but validation.prompts is empty")


@dataclass(frozen=True)
class DistillConfig:
    """A whole run, as one YAML file holds it."""

    model: ModelConfig
    student: StudentConfig
    data: DataConfig
    train: TrainConfig
    objectives: LossWeights = field(default_factory=LossWeights)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def to_dict(self) -> dict:
        """Plain data, as YAML and JSON take it."""
        return _plain(dataclasses.asdict(self))


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    return [_plain(x) for x in value] if isinstance(value, (tuple, list)) else value


def shipped() -> dict[str, object]:
    """The recipes that come with the package, by name."""
    folder = resources.files("dittfast.configs") / "distill"
    return {f.name[: -len(".yaml")]: f for f in folder.iterdir() if f.name.endswith(".yaml")}


def load_config(name: str, overrides: list[str] | tuple[str, ...] = ()) -> DistillConfig:
    """The configuration in a YAML file or a shipped recipe, with dotted overrides.

    Args:
        name: path of a ``.yaml`` file, or the name of a shipped recipe such as "clear_flux".
        overrides: such as ``["train.lr=1e-4", "data.call.height=512"]``; values are YAML.

    Raises:
        ValueError: an unknown key (the nearest is named), a value of the wrong type or out of
            range, each with its dotted name.
        FileNotFoundError: no such file.
    """
    if Path(name).suffix in (".yaml", ".yml"):
        if not Path(name).is_file():
            raise FileNotFoundError(f"no YAML file at {name}")
        text = read_text(name)
    elif name in shipped():
        text = shipped()[name].read_text(encoding="utf-8")
    else:
        raise unknown("recipe (a file ends in .yaml)", name, shipped())
    data = parse_yaml(text, name)
    if not isinstance(data, dict):
        raise ValueError(f"{name} must hold a mapping with the keys model, student, data, train")
    names = [override.partition("=")[0].strip() for override in overrides]
    for key, override in zip(names, overrides):
        if names.count(key) > 1:
            raise ValueError(f"{key} is given twice; give it once")
        _override(data, override)
    return _build(DistillConfig, data, "")


def _override(data: dict, text: str) -> None:
    path, equals, value = text.partition("=")
    *parents, last = path.strip().split(".")
    if not equals or not last or not all(parents):
        raise ValueError(f"an override is KEY.KEY=VALUE, such as train.lr=1e-4; got {text!r}")
    parsed = parse_yaml(value, f"{path}={value}")
    for depth, key in enumerate(parents):
        if data.get(key) is None:
            data[key] = {}
        data = data[key]
        if not isinstance(data, dict):
            raise ValueError(f"{'.'.join(parents[: depth + 1])} is a value; it has no {last!r}")
    data[last] = parsed


def _build(cls, data, where: str):
    """A dataclass from a mapping; nested ones too."""
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be a mapping, got {data!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    prefix = f"{where}." if where else ""
    for key in data:
        if key not in fields:
            raise unknown("key", f"{prefix}{key}", [prefix + name for name in fields])
    for name, f in fields.items():
        needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if needed and name not in data:
            raise ValueError(f"{prefix}{name} is missing")
    return cls(**{key: _value(hints[key], x, prefix + key) for key, x in data.items()})


def _mixed_set(folder: str, value) -> MixedSet:
    """One of ``data.mix``: its share alone, or a mapping with more."""
    where = f"data.mix.{folder}"
    if not isinstance(value, (dict, MixedSet)):
        value = {"share": value}
    part = value if isinstance(value, MixedSet) else _build(MixedSet, value, where)
    check_positive(f"{where}.share", part.share)
    _check_part(where, part.time_range or (0.0, 1.0), part.crop)
    return part


def _value(hint, value, where: str):
    """``value`` as the type ``hint`` says; numbers that YAML 1.1 reads as text included."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, {} if value is None else value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value is None and types.NoneType in arguments:
            return None
        kinds = [kind for kind in arguments if kind is not types.NoneType]
        if value in ("", None):
            raise _wrong(where, hint, value)
        exact = [kind for kind in kinds if type(value) is kind]
        return _value((exact or kinds)[0], value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            value = [value]
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise ValueError(f"{where} must have {len(arguments)} values, got {value!r}")
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_value(kind, x, where) for kind, x in zip(kinds, value))
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-4, without a point, as text
        except ValueError:
            raise _wrong(where, hint, value) from None
    if hint is dict and value is None:
        return {}
    if type(value) is not hint:
        raise _wrong(where, hint, value)
    odd = [key for key in value if not isinstance(key, str)] if hint is dict else []
    if odd:
        raise ValueError(f"{where} must have names as keys, got {odd[0]!r}")
    return value


def _wrong(where: str, hint, value) -> ValueError:
    words = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    wanted = words.get(hint, "a mapping" if hint is dict else str(hint))
    hint = ""
    if wanted == "text" and isinstance(value, bool):
        hint = "; YAML reads a bare no, yes, on or off as true or false, so put it in quotes"
    return ValueError(f"{where} must be {wanted}, got {value!r}{hint}")
