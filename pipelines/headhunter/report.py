"""What a head search found: numbers, contact sheets and curves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dittfast.disk.records import write_record
from dittfast.environment import versions
from dittfast.measure.charts import Curve, SheetRow, contact_sheet, line_chart
from dittfast.methods.head_guidance import HeadGuidance

from .search import Heads, Round, name_of

SHEET_ROWS, SHEET_COLUMNS = 6, 4


@dataclass(frozen=True)
class Contender:
    """A set of heads that was judged next to others.

    Attributes:
        name: "unguided", "layer 3" or "round 2".
        heads: its ``(layer, head)`` pairs; none for the unguided model.
        search, holdout: its score of every picture, searched with and held out; empty where it
            was not judged.
    """

    name: str
    heads: Heads
    search: tuple[float, ...]
    holdout: tuple[float, ...] = ()


@dataclass(frozen=True)
class HuntResult:
    """What :func:`hunt` found.

    Attributes:
        objective: what was maximised.
        settings: everything a score depends on: model, prompts, seeds, call, guidance.
        rounds: of the search.
        unguided: the pipeline without guidance.
        layers: every whole layer, with the same guidance settings; empty unless asked for.
        found: the set after every round.
    """

    objective: str
    settings: dict
    rounds: tuple[Round, ...]
    unguided: Contender
    layers: tuple[Contender, ...]
    found: tuple[Contender, ...]

    @property
    def best(self) -> Contender:
        """The set after the round that scored highest in the search; unguided if none is better."""
        number = max((r.number for r in self.rounds if r.best_so_far), default=0)
        return self.found[number - 1] if number else self.unguided

    @property
    def best_layer(self) -> Contender | None:
        """The layer that scored highest in the search, so chosen as the heads were."""
        return max(self.layers, key=lambda c: statistics.fmean(c.search), default=None)

    @property
    def guidance(self) -> HeadGuidance:
        """What to hand to :func:`dittfast.guide`.

        Raises:
            ValueError: no set of heads was better than the unguided pipeline.
        """
        if not self.best.heads:
            raise ValueError(
                "no heads were found that raise the objective above the unguided pipeline's "
                f"{statistics.fmean(self.unguided.search):.6g}; try another strength or "
                "guidance_scale"
            )
        return HeadGuidance(self.best.heads, **self.settings["guidance"])

    def to_dict(self) -> dict:
        """Plain data, for JSON; :meth:`HeadGuidance.load` reads the file."""
        groups = {"unguided": [self.unguided], "layers": self.layers, "rounds": self.found}
        report = {
            "objective": self.objective,
            "settings": self.settings,
            "best": self.best.name,
            "best_layer": self.best_layer.name if self.layers else None,
            **{name: [_summary(c) for c in group] for name, group in groups.items()},
            "versions": versions(),
        }
        if self.best.holdout:
            rivals = [self.unguided, *([self.best_layer] if self.layers else [])]
            report["holdout"] = {
                f"best_minus_{rival.name.replace(' ', '_')}": paired(self.best, rival)
                for rival in rivals
                if rival is not self.best
            }
        return {
            "heads": [list(head) for head in self.best.heads],
            **self.settings["guidance"],
            "search": report,
        }

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_dict` as JSON, atomically."""
        write_record(path, self.to_dict())


def _summary(contender: Contender) -> dict:
    means = {
        split: statistics.fmean(scores)
        for split in ("search", "holdout")
        if (scores := getattr(contender, split))
    }
    return {
        "name": contender.name,
        "heads": [list(head) for head in contender.heads],
        "mean": means,
        "scores": {split: list(getattr(contender, split)) for split in means},
    }


def paired(a: Contender, b: Contender) -> dict:
    """How much higher ``a`` scores than ``b`` on the same held-out pictures.

    Returns:
        ``mean`` difference, its ``standard_error`` over the pictures (None for fewer than two),
        ``wins``, the share of pictures where a is higher, and the number of ``pictures``.
    """
    apart = [x - y for x, y in zip(a.holdout, b.holdout)]
    error = statistics.stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else None
    return {
        "mean": statistics.fmean(apart),
        "standard_error": error,
        "wins": sum(d > 0 for d in apart) / len(apart),
        "pictures": len(apart),
    }


def round_sheet(
    pictures: Callable[[Heads, Sequence], Sequence[np.ndarray]],
    samples: Sequence[tuple[str, int]],
    round_: Round,
    unguided: Sequence[float],
    settings: dict,
):
    """A contact sheet: unguided pictures, the set the round ended with, its best candidates.

    Args:
        pictures: ``(heads, samples) -> [H, W, 3]`` uint8 pictures.
        samples: ``(prompt, seed)`` of all that were searched with.
        unguided: their scores without guidance.
    """
    shown = samples[:SHEET_COLUMNS]
    before = tuple(h for h in round_.heads if h not in round_.added)

    def line(mean: float, count: int) -> str:
        gain = mean - statistics.fmean(unguided[:count])
        note = "" if count == len(samples) else f", {count} pictures"
        return f"{mean:.5g} ({gain:+.3g}{note})"

    base = f"{statistics.fmean(unguided):.5g}"
    rows = [SheetRow("unguided", base, pictures((), shown))]
    if len(round_.heads) > 1:
        title = f"all chosen: {name_of(round_.heads)}"
        rows.append(SheetRow(title, line(round_.mean, len(samples)), pictures(round_.heads, shown)))
    for candidate in round_.candidates[:SHEET_ROWS]:
        title = f"{'+ ' if before else ''}{name_of([candidate.head])}"
        title += " (chosen)" if candidate.head in round_.added else ""
        drawn = pictures((*before, candidate.head), shown)
        rows.append(SheetRow(title, line(candidate.mean, candidate.samples), drawn))
    options = settings["guidance"]
    footer = (
        f"{settings['objective']}, mean of {len(samples)} pictures; guidance_scale "
        f"{options['guidance_scale']:g}, strength {options['strength']:g}, rows {options['rows']}"
    )
    columns = [f"{prompt}, seed {seed}" for prompt, seed in shown]
    return contact_sheet(rows, columns, f"HeadHunter, round {round_.number}", footer)


def holdout_sheet(
    pictures: Callable[[Heads, Sequence], Sequence[np.ndarray]],
    samples: Sequence[tuple[str, int]],
    result: HuntResult,
):
    """A contact sheet of held-out pictures: unguided, the best layer, the best set found."""
    shown = samples[:SHEET_COLUMNS]
    rows = []
    for contender in (result.unguided, result.best_layer, result.best):
        if contender is None or any(row.title.startswith(contender.name) for row in rows):
            continue
        title = contender.name if not contender.heads else (
            f"{contender.name}: {name_of(contender.heads)}"
        )  # fmt: skip
        mean = f"{statistics.fmean(contender.holdout):.5g}"
        rows.append(SheetRow(title, mean, pictures(contender.heads, shown)))
    columns = [f"{prompt}, seed {seed}" for prompt, seed in shown]
    footer = f"{result.objective}, mean of {len(samples)} held-out pictures"
    return contact_sheet(rows, columns, "HeadHunter: prompts the search did not see", footer)


def curve(result: HuntResult):
    """The score after each round, searched and held out, next to unguided and the best layer."""
    splits = ["search", *(["holdout"] if result.unguided.holdout else [])]
    names = {"search": "heads, prompts searched with", "holdout": "heads, held-out prompts"}
    curves = []
    for split in splits:
        scores = [getattr(c, split) for c in (result.unguided, *result.found)]
        curves.append(Curve(names[split], tuple(map(statistics.fmean, scores))))
    if result.layers:
        for split in splits:
            mean = statistics.fmean(getattr(result.best_layer, split))
            name = f"best whole layer ({result.best_layer.name.split()[-1]}), {split}"
            curves.append(Curve(name, (mean,), flat=True))
    added = [" ".join(name_of([h]) for h in r.added) for r in result.rounds]
    ticks = ["unguided", *(f"{r.number}: + {a}" for r, a in zip(result.rounds, added))]
    options = result.settings["guidance"]
    footer = (
        f"{result.objective}; guidance_scale {options['guidance_scale']:g}, strength "
        f"{options['strength']:g}; means over {len(result.unguided.search)} pictures"
    )
    if result.unguided.holdout:
        footer += f" searched with and {len(result.unguided.holdout)} held out"
    return line_chart(curves, ticks, "HeadHunter: objective after each round", footer)
