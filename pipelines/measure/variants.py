"""Ways of drawing that are compared with dense attention: from objects or a YAML file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dittfast.config import KINDS, SCHEDULE_FIELDS, check_fits, parse_yaml, resolve, unknown
from dittfast.disk.records import read_text
from dittfast.methods.base import Method
from dittfast.schedule import Schedule

from ..runs.compare import Way

DENSE = "dense"
_LABEL = re.compile(r"[\w+-][\w.+-]*")
_KEYS = ("methods", "pairs", "schedule")
_ENTRY = ("method", "options", "schedule", "source", "models", "transformers")


@dataclass(frozen=True)
class Variant:
    """One way of drawing that is compared with dense attention.

    Args:
        label: its name in tables and folders: letters, digits and ``_.+-``.
        preset: the preset or file that method and schedule were taken from, for tables.
        way: what draws with them where that is more than the method: a trained adapter.

    Raises:
        ValueError: another label, or "dense", which is the arm that all are compared with.
    """

    label: str
    method: Method
    schedule: Schedule = field(default_factory=Schedule)
    backend: str = "auto"
    preset: str | None = field(default=None, compare=False)
    way: Way | None = None

    def __post_init__(self):
        if not _LABEL.fullmatch(self.label):
            raise ValueError(
                f"the label {self.label!r} must consist of letters, digits and _ . + -, so that it "
                "can name a folder"
            )
        if self.label == DENSE:
            raise ValueError(f"the label {DENSE!r} belongs to the arm that all are compared with")

    @property
    def drawn_by(self) -> Method | Way:
        """What draws: the trained adapter, or the method."""
        return self.way or self.method

    def settings(self) -> dict:
        """Plain data, for manifests and tables."""
        trained = {} if self.way is None else {"adapter": self.way.digest()}
        return {
            "method": self.method.to_dict(),
            "schedule": asdict(self.schedule),
            "backend": self.backend,
            **trained,
        }


def check_labels(labels: list[str], pairs=()) -> None:
    """Raise ValueError where a label is used twice, or a pair names an unknown one."""
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(
                f"the label {label!r} is used twice; give each method its own, as LABEL=NAME"
            )
    for label in {x for pair in pairs for x in pair} - set(labels):
        raise ValueError(f"no method is labelled {label!r}; labels: {', '.join(labels)}")
    for number, pair in enumerate(pairs):
        if len(set(pair)) < 2 or set(pair) in map(set, pairs[:number]):
            raise ValueError(
                f"the pair {':'.join(pair)} is named twice, or a label beside itself; give two "
                "different labels, each pair once"
            )


def read_variants(path: str | Path) -> tuple[dict[str, tuple[str, dict]], list[tuple[str, str]]]:
    """``({label: (method, options)}, pairs)`` of a YAML file.

    The file holds ``methods``, a mapping from labels to ``method``, ``options`` and ``schedule``,
    perhaps ``pairs``, a list of two labels each, and a ``schedule`` for all methods. A preset's
    file, with one ``method`` or ``rules`` of its own, counts as one method under the file's name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML of such a form; the nearest known key is named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no config file at {path}")
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{path}: a config file ends in .yaml or .yml")
    data = parse_yaml(read_text(path), str(path))
    if isinstance(data, dict) and ("method" in data or "rules" in data):
        return {path.stem: (str(path), {})}, []
    if not isinstance(data, dict) or not isinstance(data.get("methods"), dict):
        raise ValueError(f"{path} must hold 'methods', a mapping from labels to methods")
    for key in data:
        if key not in _KEYS:
            raise ValueError(f"{path}: {unknown('key', key, _KEYS)}")
    common = data.get("schedule") or {}
    _check_schedule(f"{path}", common)
    pairs = data.get("pairs") or []
    if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
        raise ValueError(f"{path}: 'pairs' must be a list of two labels each, got {pairs!r}")
    variants = {str(label): _entry(path, label, e, common) for label, e in data["methods"].items()}
    return variants, [tuple(map(str, pair)) for pair in pairs]


def _check_schedule(where: str, schedule) -> None:
    if not isinstance(schedule, dict):
        raise ValueError(f"{where}: 'schedule' must be a mapping, got {schedule!r}")
    for key in schedule:
        if key not in SCHEDULE_FIELDS:
            raise ValueError(f"{where}: {unknown('schedule key', key, SCHEDULE_FIELDS)}")


def _entry(path: Path, label, entry, common: dict) -> tuple[str, dict]:
    where = f"{path}: methods: {label}"
    if not isinstance(entry, dict) or not isinstance(entry.get("method"), str):
        raise ValueError(f"{where} must be a mapping with the key 'method'")
    for key in entry:
        if key not in _ENTRY:
            raise ValueError(f"{where}: {unknown('key', key, _ENTRY)}")
    parts = [entry.get(key) or {} for key in ("options", "schedule")]
    if not all(isinstance(p, dict) for p in parts):
        raise ValueError(f"{where}: 'options' and 'schedule' must be mappings")
    _check_schedule(where, parts[1])
    return entry["method"], parts[0] | common | parts[1]


def make_variants(
    chosen: dict[str, tuple[str, dict]],
    options: dict | None = None,
    backend: str = "auto",
    transformers: Iterable[str] = (),
) -> list[Variant]:
    """The methods that labels stand for.

    Args:
        chosen: label -> (method name, preset or YAML file; its options).
        options: further options by name, for all or for one label as ``LABEL.NAME``; they win.
        transformers: classes of the model's transformers, for which presets must be made; empty
            for any.

    Raises:
        ValueError: a preset for other models, an option for a label that is not there, and as
            :func:`dittfast.config.resolve`.
    """
    options = options or {}
    for key in options:
        label = key.rpartition(".")[0]
        if label and label not in chosen:
            raise ValueError(
                f"--set {key}: no method is labelled {label!r}; labels: {', '.join(chosen)}"
            )
    common = {k: v for k, v in options.items() if "." not in k}
    variants = []
    for label, (name, own) in chosen.items():
        check_fits(name, transformers)
        mine = {
            k.rpartition(".")[2]: v for k, v in options.items() if k.rpartition(".")[0] == label
        }
        method, schedule = resolve(name, **(own | common | mine))
        preset = None if name in KINDS else name
        variants.append(Variant(label, method, schedule, backend, preset))
    return variants
