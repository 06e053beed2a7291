"""Which steps and layers stay dense, and below how many tokens sparse is not worth it."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .methods.checks import check_integer, check_positive
from .methods.memory import Lasting

_RANGE = re.compile(r"(\d+)-(\d+)")
_NUMBER = re.compile(r"-?\d+")
_EVERY = "1 plans in every step"


@dataclass(frozen=True)
class Schedule:
    """Where a method runs; everywhere else attention is dense.

    Attributes:
        dense_first_steps: denoising steps at the start that stay dense.
        dense_last_steps: denoising steps at the end that stay dense.
        dense_layers: self-attention layers that stay dense: indices in the order of the model
            (negative ones count from its end), ranges such as "37-56", or module-name patterns
            such as "single_transformer_blocks.*".
        min_tokens: below this many tokens the whole model stays dense; None is the break-even
            measured for the method and the device, 0 always runs the method.
        replan_every: steps that a plan made from q and k lasts in its layer and guidance branch, at
            least 1; None is 1, or with ``replan_drift`` no number. By method it is a mapping from
            names, such as ``{"topk": 4}``, and 1 for the others. Not used in passes that may be
            differentiated, nor under torch.compile, where each call plans.
        replan_drift: renew such a plan when the means of q or k over 64 tokens have changed by more
            than this, relative to what they were; above 0. It waits for the device.

    Raises:
        ValueError: a negative count, a drift of 0 or less, or a layer entry of another form.
    """

    dense_first_steps: int = 0
    dense_last_steps: int = 0
    dense_layers: tuple[int | str, ...] = ()
    min_tokens: int | None = None
    replan_every: int | Mapping[str, int] | tuple[tuple[str, int], ...] | None = None
    replan_drift: float | None = None

    def __post_init__(self):
        for name in ("dense_first_steps", "dense_last_steps", "min_tokens"):
            value = getattr(self, name)
            if value is None and name == "min_tokens":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")
        if isinstance(self.replan_every, (Mapping, tuple, list)):
            object.__setattr__(self, "replan_every", _by_method(self.replan_every))
        elif self.replan_every is not None:
            check_integer("replan_every", self.replan_every, 1, remedy=_EVERY)
        if self.replan_drift is not None:
            check_positive("replan_drift", self.replan_drift, "0.1 is a change by a tenth")
        layers = self.dense_layers
        if isinstance(layers, (int, str)):
            layers = (layers,)
        listed = isinstance(layers, (tuple, list, set, frozenset, range))
        for entry in layers if listed else [layers]:
            if isinstance(entry, bool) or not isinstance(entry, (int, str)):
                raise ValueError(
                    "dense_layers takes indices, ranges such as '37-56' and name patterns; "
                    f"got {entry!r}"
                )
        object.__setattr__(self, "dense_layers", tuple(layers))

    @property
    def lasting(self) -> Lasting:
        """How long a plan from q and k lasts."""
        every, by_method = self.replan_every, ()
        if isinstance(every, tuple):
            every, by_method = None, every
        if every is None and self.replan_drift is None:
            every = 1
        return Lasting(every, self.replan_drift, by_method)

    def is_dense_step(self, step: int, num_steps: int) -> bool:
        """Whether 0-based denoising ``step`` of ``num_steps`` is dense."""
        return step < self.dense_first_steps or step >= num_steps - self.dense_last_steps

    def dense_layer_names(self, names: list[str]) -> set[str]:
        """Which of the model's self-attention layers (in order) stay dense.

        Raises:
            ValueError: an entry that matches no layer, with the range or names there are.
        """
        return set(matching_layers(self.dense_layers, names))


def _by_method(given) -> tuple[tuple[str, int], ...]:
    """Steps by the name of a method, a mapping or its pairs, in order of the names."""
    pairs = list(given.items() if isinstance(given, Mapping) else given)
    if not pairs or not all(isinstance(x, (tuple, list)) and len(x) == 2 for x in pairs):
        raise ValueError(
            "replan_every must be an integer, or integers by the names of methods, such as "
            f"{{'topk': 4}}; got {given!r}"
        )
    for name, every in pairs:
        check_integer(f"replan_every of {name}", every, 1, remedy=_EVERY)
    return tuple(sorted((str(name), every) for name, every in dict(pairs).items()))


def ranges(entries: Iterable[int | str], count: int, option: str) -> tuple[int, ...]:
    """Numbers and ranges such as "0-3" as numbers below ``count``, in rising order.

    Raises:
        ValueError: an entry outside of 0..count-1, or of another form; the range is named.
    """
    chosen: set[int] = set()
    for entry in entries:
        span = _RANGE.fullmatch(entry) if isinstance(entry, str) else None
        number = isinstance(entry, int) or _NUMBER.fullmatch(entry)
        first, last = (int(span[1]), int(span[2])) if span else (entry, entry)
        if not span:
            first = last = int(entry) if number else -1
        if not 0 <= first <= last < count:
            raise ValueError(f"{option} are 0..{count - 1}, got {entry!r}")
        chosen.update(range(first, last + 1))
    return tuple(sorted(chosen))


def matching_layers(
    entries: Iterable[int | str], names: list[str], option: str = "dense_layers"
) -> list[str]:
    """The layers meant by indices, ranges and name patterns, in the order of the model.

    Args:
        entries: as :attr:`Schedule.dense_layers`.
        names: the model's self-attention layers.
        option: what errors call the entries.

    Raises:
        ValueError: an entry that matches no layer, with the range or names there are.
    """
    chosen: set[str] = set()
    for entry in entries:
        matching = _matching(entry, names)
        if not matching:
            raise ValueError(
                f"{option} entry {entry!r} matches no layer; this model has "
                f"{len(names)} self-attention layers, 0..{len(names) - 1}, "
                f"named {names[0]} ... {names[-1]}"
            )
        chosen.update(matching)
    return [name for name in names if name in chosen]


def _matching(entry: int | str, names: list[str]) -> list[str]:
    if isinstance(entry, int) or _NUMBER.fullmatch(entry):
        entry = int(entry)
        return [names[entry]] if -len(names) <= entry < len(names) else []
    span = _RANGE.fullmatch(entry)
    if span:
        first, last = int(span[1]), int(span[2])
        return names[first : last + 1] if first <= last < len(names) else []
    return [name for name in names if fnmatch.fnmatchcase(name, entry)]
