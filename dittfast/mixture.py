"""Mixtures: which method runs in which layers, heads and denoising steps of a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, ClassVar, NamedTuple

import torch

from .disk.problems import first_words
from .disk.structure import check_structure
from .layout import Layout
from .methods.base import Method
from .methods.dense import Dense
from .methods.head_groups import Group, HeadGroups, by_head, head_words
from .plan import Plan
from .schedule import matching_layers, ranges

Step = int | float | None
_FINGERPRINT = {"class": str, "shapes": str, "values": {"*": [float]}}
_TUNED = {"model": str, "fingerprints": {"*": _FINGERPRINT}, "sizes": [[int]], "*": object}


@dataclass(frozen=True)
class Rule:
    """A method, and where it runs.

    Attributes:
        method: what runs there; :class:`dittfast.methods.Dense` is dense attention.
        layers: self-attention layers, as :attr:`dittfast.Schedule.dense_layers`: indices in the
            order of the model, ranges such as "3-7", or module-name patterns.
        heads: of those layers, numbers and ranges such as "0-3"; None for all.
        steps: ``(first, end)``, the denoising steps from the first up to the end, which is left
            out. Whole numbers count steps, negative ones from the end of the run; where one of the
            two is a float, both are fractions of the run, in 0..1. None is an open side.

    Raises:
        ValueError: an entry of another form, or a band without a step.
    """

    method: Method
    layers: tuple[int | str, ...] = ("*",)
    heads: tuple[int | str, ...] | None = None
    steps: tuple[Step, Step] | None = None

    def __post_init__(self):
        if not isinstance(self.method, Method) or isinstance(self.method, Mixture):
            raise ValueError(f"the method of a rule must be a Method, got {self.method!r}")
        for name in ("layers", "heads"):
            given = getattr(self, name)
            if given is None and name == "heads":
                continue
            entries = (given,) if isinstance(given, (int, str)) else tuple(given)
            for entry in entries:
                if isinstance(entry, bool) or not isinstance(entry, (int, str)):
                    raise ValueError(
                        f"{name} takes numbers and ranges such as '0-3', got {entry!r}"
                    )
            if not entries:
                raise ValueError(f"{name} is empty, so the rule holds nowhere; leave it out")
            object.__setattr__(self, name, entries)
        if self.steps is not None:
            object.__setattr__(self, "steps", _band(self.steps))

    def to_dict(self) -> dict:
        """Plain data, which :func:`dittfast.config.resolve` reads."""
        options = self.method.to_dict()
        data: dict[str, Any] = {"layers": list(self.layers)}
        for name in ("heads", "steps"):
            if getattr(self, name) is not None:
                data[name] = list(getattr(self, name))
        return data | {"method": options.pop("name"), "options": options}

    def __str__(self) -> str:
        where = [", ".join(map(str, self.layers))]
        if self.heads is not None:
            where.append(f"heads {', '.join(map(str, self.heads))}")
        if self.steps is not None:
            where.append(f"steps {band_words(self.steps)}")
        return f"{self.method.words()} in {', '.join(where)}"


def _band(steps) -> tuple[Step, Step]:
    """A band of steps, checked."""
    numbers = isinstance(steps, Sequence) and not isinstance(steps, str) and len(steps) == 2
    if not numbers or not all(_is_number(x) or x is None for x in steps):
        raise ValueError(f"steps must be (first, end), numbers or fractions or None, got {steps!r}")
    first, end = steps
    if any(isinstance(x, float) for x in (first, end)):
        first, end = 0.0 if first is None else float(first), 1.0 if end is None else float(end)
        if not 0 <= first < end <= 1:
            raise ValueError(
                f"steps as fractions must be 0 <= first < end <= 1, got {steps!r}; whole numbers "
                "count steps"
            )
        return first, end
    same_side = first is not None and end is not None and (first < 0) == (end < 0)
    if (same_side and first >= end) or end == 0 or (first is None and end is None):
        raise ValueError(f"steps {steps!r} hold no step, or all; (first, end) leaves the end out")
    return first, end


def _is_number(x) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def band_words(steps: tuple[Step, Step]) -> str:
    """A band of steps in words."""
    first, end = steps
    if isinstance(first, float):
        return f"{first:.0%} to {end:.0%} of the run"
    if end is None:
        return f"from {first} on"
    if end < 0 or (first or 0) < 0:
        return f"from {first or 0} up to {end}, which is left out"
    return str(end - 1) if end - 1 == (first or 0) else f"{first or 0}-{end - 1}"


def in_band(steps: tuple[Step, Step], step: int, total: int | None) -> bool:
    """Whether 0-based ``step`` of ``total`` lies in a band.

    Raises:
        ValueError: the band is measured from the end, which nobody knows.
    """
    first, end = steps
    if isinstance(first, float) or (first or 0) < 0 or (end or 0) < 0:
        if total is None:
            raise ValueError(
                f"steps {list(steps)} need to know the number of steps, which only the scheduler "
                "of the running pipeline does; run the transformer inside a pipeline, or give "
                "whole numbers from 0"
            )
        if isinstance(first, float):
            return first <= step / total < end
        first, end = (x + total if x is not None and x < 0 else x for x in (first, end))
    return (first is None or step >= first) and (end is None or step < end)


def _may_meet(a: tuple[Step, Step] | None, b: tuple[Step, Step] | None) -> bool:
    """Whether two bands share a step in every run: what can be told before one."""
    if a is None or b is None:
        return True
    numbers = [x for x in (*a, *b) if x is not None]
    if len({(type(x), x < 0) for x in numbers}) > 1:
        return False  # the number of steps tells: Assignment.at refuses it then
    (a, b), (c, d) = (
        (-math.inf if first is None else first, math.inf if end is None else end)
        for first, end in (a, b)
    )
    return max(a, c) < min(b, d)


@dataclass(frozen=True)
class Mixture(Method):
    """Methods by layer, head and step: rules, of which dense attention is one.

    What no rule names is dense. Two rules that meet in a layer, head and step are refused, and so
    is one that matches nothing.

    Args:
        rules: a :class:`Rule` each.
        tuned: of a preset that ``dittfast tune`` wrote, the model and the sizes it is for, as its
            file has them: :func:`dittfast.enable` refuses another model and warns of another size.
            None for any.

    Raises:
        ValueError: no rules.
    """

    name: ClassVar[str] = "mixture"
    needs_grid: ClassVar[bool] = False

    rules: tuple[Rule, ...] = ()
    tuned: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self):
        rules = tuple(self.rules)
        if not rules or not all(isinstance(rule, Rule) for rule in rules):
            raise ValueError(f"a mixture needs rules, got {self.rules!r}")
        object.__setattr__(self, "rules", rules)
        if self.tuned is not None:
            check_structure(self.tuned, _TUNED, "tuned")

    @property
    def parts(self) -> tuple[Method, ...]:
        return tuple(rule.method for rule in self.rules)

    @property
    def needs_hidden_states(self) -> bool:
        return any(method.needs_hidden_states for method in self.parts)

    def plan(
        self,
        layout: Layout,
        q: torch.Tensor | None = None,
        k: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
        scale: float | None = None,
        kv_log_weight: torch.Tensor | None = None,
    ) -> Plan:
        raise ValueError(
            "a mixture plans nothing itself: its rules name the layers of a model. Give it to "
            "dittfast.enable, or plan with one of its methods"
        )

    def to_dict(self) -> dict:
        return {"name": self.name, "rules": [rule.to_dict() for rule in self.rules]}

    def words(self) -> str:
        return " | ".join(map(str, self.rules))

    def __str__(self) -> str:
        return f"mixture: {self.words()}"


def for_any_model(method: Method) -> Method:
    """The method without the model that it was tuned for, if it was."""
    return replace(method, tuned=None) if isinstance(method, Mixture) else method


class Assigned(NamedTuple):
    """What one layer runs: a method, and what the names of its parameters begin with."""

    method: Method
    key: str = ""


@dataclass(frozen=True)
class _Entry:
    number: int
    heads: tuple[int, ...] | None
    steps: tuple[Step, Step] | None
    method: Method

    @property
    def key(self) -> str:
        return f"rule{self.number}_"


@dataclass
class Assignment:
    """What each layer of one model runs, at every step.

    Args:
        method: a method for all layers, or a mixture.
        heads: the number of heads of each self-attention layer by its name, in the order of the
            model; None where a layer does not tell.

    Raises:
        ValueError: a rule that names a layer or head that is not there, or matches nothing; two
            rules that meet.
    """

    method: Method
    heads: Mapping[str, int | None]
    _entries: dict[str, tuple[_Entry, ...]] = field(init=False)
    _made: dict = field(init=False, default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.method, Mixture):
            self._entries = {n: (_Entry(0, None, None, self.method),) for n in self.heads}
            return
        entries_of: dict[str, list[_Entry]] = {name: [] for name in self.heads}
        for number, rule in enumerate(self.method.rules):
            where = f"rule {number} ({rule.method.name}): "
            try:
                for name in matching_layers(rule.layers, list(self.heads), "layers"):
                    heads = self._heads_of(rule, name)
                    entries_of[name].append(_Entry(number, heads, rule.steps, rule.method))
            except ValueError as error:
                raise ValueError(f"{where}{error}") from error
        for name, entries in entries_of.items():
            for a, b in combinations(entries, 2):
                if _may_meet(a.steps, b.steps):
                    _refuse_meeting(name, a, b)
        self._entries = {name: tuple(entries) for name, entries in entries_of.items()}

    def _heads_of(self, rule: Rule, name: str) -> tuple[int, ...] | None:
        if rule.heads is None:
            return None
        count = self.heads[name]
        if count is None:
            raise ValueError(f"{name} does not tell its number of heads, so none can be chosen")
        chosen = ranges(rule.heads, count, f"heads of {name}")
        return None if len(chosen) == count else chosen

    @property
    def needs_steps(self) -> bool:
        """Whether the step of a pass decides what runs."""
        return any(e.steps is not None for entries in self._entries.values() for e in entries)

    def at(self, step: int | None = None, total: int | None = None) -> dict[str, Assigned | None]:
        """What each layer runs at a step; None where it is dense attention.

        Args:
            step: 0-based; None where no rule has a band of steps, or for rules without one alone.

        Raises:
            ValueError: two rules that meet at this step.
        """
        if not self.needs_steps:
            step = total = None
        if (step, total) not in self._made:
            if len(self._made) > 1024:  # runs of many lengths
                self._made.clear()
            self._made[step, total] = {
                name: self._assigned(name, [e for e in entries if _holds(e, step, total)])
                for name, entries in self._entries.items()
            }
        return self._made[step, total]

    def _assigned(self, name: str, entries: list[_Entry]) -> Assigned | None:
        for a, b in combinations(entries, 2):
            _refuse_meeting(name, a, b)
        heads = self.heads[name]
        entries = [e for e in entries if not e.method.dense]
        if not entries:
            return None
        if entries[0].heads is None:
            key = entries[0].key if isinstance(self.method, Mixture) else ""
            return Assigned(by_head(entries[0].method, heads), key)
        groups = [Group(e.heads, by_head(e.method, len(e.heads)), e.key) for e in entries]
        taken = {head for group in groups for head in group.heads}
        rest = tuple(head for head in range(heads) if head not in taken)
        if rest:
            groups.append(Group(rest, Dense(), "dense_"))
        return Assigned(HeadGroups(tuple(sorted(groups, key=lambda g: g.heads))))

    def rules(self, name: str) -> tuple[str, ...]:
        """What a layer runs at some step, in words: method, and which heads and steps."""
        return tuple(
            e.method.words()
            + (f" in heads {head_words(e.heads)}" if e.heads is not None else "")
            + (f" in steps {band_words(e.steps)}" if e.steps is not None else "")
            for e in self._entries[name]
            if not e.method.dense
        )

    def made(self, name: str) -> tuple[Method, ...]:
        """The methods that a layer has been assigned so far."""
        assigned_all = (assigned[name] for assigned in list(self._made.values()))
        return tuple(dict.fromkeys(x.method for x in assigned_all if x is not None))

    def ever(self, name: str) -> tuple[Group, ...]:
        """All that a layer runs at any step, a group for each rule; dense attention is left out.

        A layer that does not tell its heads has one group, whose heads are None.
        """
        count, mixed = self.heads[name], isinstance(self.method, Mixture)
        every = None if count is None else tuple(range(count))
        groups = []
        for e in self._entries[name]:
            heads = every if e.heads is None else e.heads
            method = by_head(e.method, None if heads is None else len(heads))
            if not method.dense:
                groups.append(Group(heads, method, e.key if mixed else ""))
        return tuple(groups)

    def parameters(
        self, name: str, head_dim: int | None, channels: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Initial values of the trainable parameters of a layer, of all that it ever runs.

        Args:
            head_dim: channels of a head. channels: of the layer's hidden states.
        """
        return {
            group.key + own: value
            for group in self.ever(name)
            for own, value in group.method.layer_parameters(
                None if group.heads is None else len(group.heads), head_dim, channels
            ).items()
        }

    def parameter_shapes(
        self, name: str, head_dim: int | None, channels: int | None = None
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of :meth:`parameters`; nothing is allocated, but for methods that look at values.

        Raises:
            ValueError: no machine could hold them, or the method does not fit the layer.
        """
        try:
            with torch.device("meta"):
                values = self.parameters(name, head_dim, channels)
        except (RuntimeError, TypeError) as error:
            if "meta" in str(error):  # where there are none
                values = self.parameters(name, head_dim, channels)
                return {own: tuple(value.shape) for own, value in values.items()}
            # Sizes beyond 64 bits.
            words = f"{self.method.words()} asks for too much memory"
            raise ValueError(f"{words}: {first_words(error)}") from error
        return {own: tuple(value.shape) for own, value in values.items()}


def _holds(entry: _Entry, step: int | None, total: int | None) -> bool:
    if entry.steps is None or step is None:
        return entry.steps is None
    return in_band(entry.steps, step, total)


def _refuse_meeting(name: str, a: _Entry, b: _Entry) -> None:
    """Raise ValueError where two rules that hold at one step share heads of a layer."""
    shared = None
    if a.heads is not None and b.heads is not None:
        shared = tuple(head for head in a.heads if head in b.heads)
        if not shared:
            return
    heads = shared or a.heads or b.heads
    where = f" in heads {head_words(heads)}" if heads else ""
    raise ValueError(
        f"rules {a.number} ({a.method.name}) and {b.number} ({b.method.name}) meet in layer {name}"
        f"{where}; give each layer, head and step to one rule"
    )


def leaves(method: Method) -> Iterable[Method]:
    """The methods that a mixture or group of heads is made of; the method itself otherwise."""
    if not method.parts:
        yield method
    for part in method.parts:
        yield from leaves(part)
