"""From what runs where to the file that dittfast.enable takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dittfast.environment import describe_device, versions
from dittfast.files import write_text
from dittfast.methods.base import Method
from dittfast.mixture import Mixture, Rule
from dittfast.schedule import Schedule

from ..fingerprint import fingerprint
from ..models import execution_device, stock_class, transformers_of
from ..runs.call import call_record
from .prediction import DENSE, Assigned

# The whole model is sparse wherever its rules say so: its own speed was measured.
ALWAYS = Schedule(min_tokens=0)


def mixture_of(
    assigned: Assigned, methods: Sequence[Method], layers: Sequence[str], edges: Sequence[tuple]
) -> Mixture | None:
    """The rules of a choice, as few as say it; None where all is dense attention.

    Args:
        methods: the candidates that the choice counts.
        layers: names of the model's layers, in its order.
        edges: ``(first, end)`` of each band as fractions of a run.
    """
    where: dict[tuple, list[int]] = {}
    for (layer, band), heads in sorted(assigned.items(), key=lambda x: layers.index(x[0].layer)):
        for number in sorted(set(heads) - {DENSE}):
            own = tuple(h for h, n in enumerate(heads) if n == number)
            own = None if len(own) == len(heads) else own
            where.setdefault((number, own, band), []).append(layers.index(layer))
    # Bands that follow each other and say the same are one.
    runs: list[list] = []
    for (number, own, band), at in sorted(
        where.items(), key=lambda x: (x[0][0], x[0][1] or (), x[0][2])
    ):
        last = runs[-1] if runs else None
        if last is not None and last[:3] == [number, own, at] and last[4] == band - 1:
            last[4] = band
        else:
            runs.append([number, own, at, band, band])
    rules = [
        Rule(methods[number], tuple(at), own, _steps(edges, first, last))
        for number, own, at, first, last in runs
    ]
    return Mixture(tuple(rules)) if rules else None


def _steps(edges: Sequence[tuple], first: int, last: int) -> tuple[float, float] | None:
    begin, end = edges[first][0], edges[last][1]
    return None if (begin, end) == (0.0, 1.0) else (begin, end)


def preset_data(
    pipe, model: str, call: dict, mixture: Mixture, schedule: Schedule, tuned: dict
) -> dict:
    """The preset as plain data, of the keys that :func:`dittfast.config.resolve` reads.

    Args:
        model: its name.
        call: that it was tuned for.
        tuned: what is known of it besides: sizes, budget, what was measured.
    """
    models = transformers_of(pipe)
    default = asdict(Schedule())
    planned = {k: v for k, v in asdict(schedule).items() if v != default[k]}
    if isinstance(planned.get("replan_every"), tuple):
        planned["replan_every"] = dict(planned["replan_every"])
    return {
        "rules": [_rule(rule) for rule in mixture.rules],
        "schedule": planned,
        "source": f"dittfast tune, for {' and '.join(tuned['budget'])} on {model}",
        "transformers": sorted({stock_class(type(m)).__name__ for m in models.values()}),
        "tuned": {
            "model": model,
            **tuned,
            "call": call_record(call),
            "device": describe_device(execution_device(pipe)),
            "versions": versions(),
            "fingerprints": {name: fingerprint(m) for name, m in models.items()},
        },
    }


def _rule(rule: Rule) -> dict:
    data = rule.to_dict()
    default = {f.name: f.default for f in dataclasses.fields(rule.method)}
    own = {k: v for k, v in data["options"].items() if v != default[k]}
    del data["options"]
    return data | ({"options": own} if own else {})


def write_preset(path: str | Path, data: dict) -> None:
    """Write a preset's data as YAML."""
    import yaml

    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data):
            return True

    Plain.add_representer(tuple, lambda dumper, x: dumper.represent_list(x))
    write_text(path, yaml.dump(data, Dumper=Plain, sort_keys=False, default_flow_style=None))
