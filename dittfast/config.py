"""From a name, a preset, a YAML file or an object to a method and its schedule; strictly."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import logging
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path

from .disk.problems import first_words
from .disk.records import read_text
from .methods import METHODS
from .methods.base import Method
from .mixture import Mixture, Rule
from .schedule import Schedule

logger = logging.getLogger(__name__)
# Values and letters that aliases may add to a YAML file; a whole preset has a few hundred.
_UNFOLDED = 100_000

# `source` (where the settings come from) and `models` (what they are for) are for the reader;
# `transformers` names the classes of diffusers that the settings are for; `tuned` is what
# `dittfast tune` measured, and of which model.
_KEYS = ("method", "rules", "options", "schedule", "source", "models", "transformers", "tuned")
_RULE_KEYS = ("layers", "heads", "steps", "method", "options")
# What a name may stand for: a mixture is given its rules, and no method by itself.
# Also what is put into METHODS later.
KINDS: Mapping[str, type[Method]] = ChainMap(METHODS, {Mixture.name: Mixture})


def unknown(kind: str, value, known) -> ValueError:
    """The error for an unknown name: says the nearest known one, and all of them."""
    known = sorted(str(k) for k in known)
    near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown {kind} {value!r}.{hint} Known: {', '.join(known)}")


def presets() -> list[str]:
    """Names of the shipped presets, such as "radial/wan2.1"."""
    files = resources.files("dittfast.configs").iterdir()
    return sorted(_preset_name(f.name) for f in files if f.name.endswith(".yaml"))


def _preset_name(file_name: str) -> str:
    """``log_linear_flux.yaml`` -> ``log_linear/flux``: the method's name comes first."""
    stem = file_name[: -len(".yaml")]
    for method in sorted(KINDS, key=len, reverse=True):
        if stem.startswith(method + "_"):
            return f"{method}/{stem[len(method) + 1 :]}"
    return stem


def parse_yaml(text: str, where: str) -> object:
    """Plain data in YAML.

    Raises:
        ValueError: no YAML.
    """
    import yaml

    try:
        _check_aliases(text)
        return yaml.safe_load(text)
    except Exception as error:  # dates and numbers that are none, lists a thousand levels deep
        raise ValueError(f"{where} is not valid YAML ({first_words(error)})") from error


def _check_aliases(text: str) -> None:
    """Raise ValueError where aliases make more of a YAML text than a machine can hold: ten lists
    of which each holds the one before ten times are ten billion values to whoever shows them."""
    import yaml

    sizes, open_ = {}, [(None, 0)]
    for event in yaml.parse(text):
        if isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, 1))
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_.pop()
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1 + len(event.value)
        elif isinstance(event, yaml.AliasEvent):
            anchor, size = None, sizes.get(event.anchor)
            if size is None:
                raise ValueError(f"*{event.anchor} stands for nothing that ends before it")
        else:
            continue
        sizes[anchor] = size
        outer, before = open_.pop()
        open_.append((outer, before + size))
    if open_[0][1] > 10 * len(text) + _UNFOLDED:
        raise ValueError("its aliases unfold to more than files of this kind hold")


def read_mapping(text: str, where: str, known: Iterable[str]) -> dict:
    """A YAML mapping with known keys only.

    Raises:
        ValueError: no YAML, no mapping, or an unknown key (the nearest known one is named).
    """
    data = parse_yaml(text, where)
    if not isinstance(data, dict):
        raise ValueError(f"{where} must hold a mapping with the keys {', '.join(known)}")
    for key in data:
        if key not in known:
            raise _in(where, unknown("key", key, known))
    return data


def _read_yaml(text: str, where: str) -> dict:
    data = read_mapping(text, where, _KEYS)
    if "rules" in data:
        if "method" in data or "options" in data:
            raise ValueError(f"{where} has 'rules', which name their own methods and options")
        data |= {"method": Mixture.name, "options": {"rules": data.pop("rules")}}
        if data.get("tuned") is not None:
            data["options"]["tuned"] = data["tuned"]
    elif "tuned" in data:
        raise ValueError(f"{where} has 'tuned', which belongs to the 'rules' of dittfast tune")
    if "method" not in data:
        raise ValueError(
            f"{where} has no 'method'; add one of {', '.join(METHODS)}, or 'rules' for a mixture"
        )
    meant = data.get("transformers") or []
    if not isinstance(meant, list) or not all(isinstance(name, str) for name in meant):
        raise ValueError(f"{where}: 'transformers' must be a list of class names, got {meant!r}")
    for key in ("options", "schedule"):
        data[key] = data.get(key) or {}
        if not isinstance(data[key], dict):
            raise ValueError(f"{where}: {key!r} must be a mapping, got {data[key]!r}")
    return data


def _in(where: str, error: ValueError) -> ValueError:
    return ValueError(f"{where}: {error}")


def _read(name: str) -> dict:
    """What a method name, a preset or a file says: ``method``, ``options`` and ``schedule``."""
    if name in KINDS:
        return {"method": name, "options": {}, "schedule": {}}
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise FileNotFoundError(f"no YAML file at {name}")
        data = _read_yaml(read_text(path), str(path))
    elif name in presets():
        file = resources.files("dittfast.configs") / (name.replace("/", "_") + ".yaml")
        data = _read_yaml(file.read_text(), f"preset {name}")
    else:
        raise unknown("method or preset", name, [*METHODS, *presets()])
    if not isinstance(data["method"], str):
        raise _in(name, ValueError(f"'method' must be a name, got {data['method']!r}"))
    if data["method"] not in KINDS:
        raise _in(name, unknown("method", data["method"], KINDS))
    for key in data["schedule"]:
        if key not in SCHEDULE_FIELDS:
            raise _in(name, unknown("schedule key", key, SCHEDULE_FIELDS))
    return data


def check_fits(
    method: Method | str | Mapping | Sequence, transformers: Iterable[str], any_model: bool = False
) -> None:
    """Whether the settings meant by ``method`` are for these transformers.

    Args:
        transformers: class names of diffusers, of all transformers of a pipeline.
        any_model: go on with settings for others, with a warning.

    Raises:
        ValueError: a preset or file for other models.
    """
    if not isinstance(method, (str, Path)):
        return
    data = _read(str(method))
    meant = data.get("transformers") or []
    others = [name for name in transformers if meant and name not in meant]
    if not others:
        return
    words = f"{method} is for {' or '.join(meant)}, and this model is {others[0]}"
    if not any_model:
        raise ValueError(
            f"{words}; take the method with options of your own ({data['method']}), or take it "
            "all the same: any_model=True (--any-model)"
        )
    logger.warning("%s; taken all the same", words)


def option_value(text: str, where: str):
    """A value as people type it: ``8``, ``1e-3``, ``[0, 1]``, ``true``, ``null``, ``hilbert``.

    Raises:
        ValueError: no YAML value; the message begins with ``where``.
    """
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: {text!r} is no YAML value") from error
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)  # YAML 1.1 reads 1e-3, without a point, as text
    return value


SCHEDULE_FIELDS = tuple(f.name for f in dataclasses.fields(Schedule))


def method_fields(cls: type[Method]) -> tuple[str, ...]:
    """The option names of a method class."""
    return tuple(f.name for f in dataclasses.fields(cls) if f.init)


def read_rules(rules, where: str = "rules") -> tuple[Rule, ...]:
    """The rules of a mixture, from objects or plain data.

    Args:
        rules: a mapping from layers to what runs there, ``{"transformer_blocks.*": "local"}``, or
            a list of :class:`~dittfast.mixture.Rule` or mappings with the keys ``method``,
            ``options``, ``layers``, ``heads`` and ``steps``. What runs somewhere is a method, its
            name, or a mapping with ``method`` and ``options``.

    Raises:
        ValueError: another form, an unknown key, method or option, or a value out of range; the
            rule is named by its number.
    """
    if isinstance(rules, Mapping):
        rules = [_with_layers(layers, what) for layers, what in rules.items()]
    if isinstance(rules, str) or not isinstance(rules, Sequence) or not rules:
        raise ValueError(f"{where} must be a list of rules or a mapping from layers, got {rules!r}")
    read = []
    for number, rule in enumerate(rules):
        try:
            read.append(rule if isinstance(rule, Rule) else _read_rule(rule))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: rule {number}: {error}") from error
    return tuple(read)


def _with_layers(layers, what) -> dict:
    if isinstance(what, Mapping):
        return {"layers": layers, **what}
    return {"layers": layers, "method": what}


def _read_rule(rule) -> Rule:
    if not isinstance(rule, Mapping) or "method" not in rule:
        raise ValueError(f"it must be a mapping with the key 'method', got {rule!r}")
    for key in rule:
        if key not in _RULE_KEYS:
            raise unknown("key", key, _RULE_KEYS)
    chosen = _read_method(rule["method"], rule.get("options") or {})
    given = {key: rule[key] for key in ("layers", "heads", "steps") if rule.get(key) is not None}
    return Rule(chosen, **given)


def _read_method(method, options=None) -> Method:
    """A method inside another or in a rule, which has no schedule of its own.

    Args:
        method: a method, its name or, without ``options``, a mapping with both.
    """
    if options is None and isinstance(method, Mapping):
        for key in method:
            if key not in ("method", "options"):
                raise unknown("key", key, ("method", "options"))
        method, options = method.get("method"), method.get("options")
    options = options or {}
    if not isinstance(options, Mapping):
        raise ValueError(f"'options' must be a mapping, got {options!r}")
    if isinstance(method, str) and method not in METHODS:
        raise unknown("method", method, METHODS)
    if not isinstance(method, (str, Method)):
        raise ValueError(f"'method' must be a method or its name, got {method!r}")
    for key in options:
        if key in SCHEDULE_FIELDS:
            raise ValueError(f"{key} belongs to the schedule of the whole, not to a part of it")
    return resolve(method, **options)[0]


def resolve(
    method: Method | str | Mapping | Sequence, schedule: Schedule | None = None, **options
) -> tuple[Method, Schedule]:
    """The method and schedule meant by a name, a preset, a YAML file or an object.

    Args:
        method: a :class:`~dittfast.methods.base.Method`, a name in ``METHODS``, a preset such as
            "radial/wan2.1", the path of a ``.yaml`` file with the keys ``method``, ``options`` and
            ``schedule``, or the rules of a mixture (:func:`read_rules`).
        schedule: overrides the preset's.
        options: fields of the method or of :class:`~dittfast.schedule.Schedule`; they win over
            the preset and over ``schedule``.

    Raises:
        ValueError: an unknown name, option or key (the nearest known one is named), or a value
            out of range.
        FileNotFoundError: the YAML file is not there.
    """
    if isinstance(method, (Mapping, list, tuple)):
        method = Mixture(read_rules(method))
    if isinstance(method, Method):
        cls, base, planned = type(method), method, {}
    elif isinstance(method, (str, Path)):
        data = _read(str(method))
        fields, planned = data["options"], data["schedule"]
        cls, base = KINDS[data["method"]], None
    else:
        raise ValueError(
            f"method must be a Method, a name, a YAML path or rules, got {type(method).__name__}"
        )
    known = method_fields(cls)
    given = dict(fields) if base is None else {}
    timing = {}
    for key, value in options.items():
        if key in SCHEDULE_FIELDS:
            timing[key] = value
        else:
            given[key] = value
    for key in given:
        if key not in known:
            raise unknown(f"option of {cls.name!r}", key, [*known, *SCHEDULE_FIELDS])
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    if cls is Mixture and "rules" in given:
        given["rules"] = read_rules(given["rules"])
    for key in cls.takes_methods:
        if given.get(key) is not None:
            try:
                given[key] = _read_method(given[key])
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from error
    chosen = cls(**given) if base is None else dataclasses.replace(base, **given)
    if schedule is None:
        schedule = Schedule(**planned)
    return chosen, dataclasses.replace(schedule, **timing)
