"""HeadHunter's greedy search (Ahn et al. 2025, arXiv:2506.10978), and the file it resumes from.

Nothing here draws: a score is whatever the caller's function says about a set of heads.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dittfast.disk.records import read_record, write_record
from dittfast.files import check_output
from dittfast.methods.checks import check_integer

Head = tuple[int, int]
Heads = tuple[Head, ...]
# The scores of the first ``count`` samples under a set of heads; None for all samples.
Score = Callable[[Heads, int | None], Sequence[float]]


def name_of(heads: Iterable[Head]) -> str:
    """``((3, 1), (5, 0))`` as "3.1 5.0"; "unguided" for no heads. The order does not matter."""
    return " ".join(f"{layer}.{head}" for layer, head in sorted(heads)) or "unguided"


@dataclass(frozen=True)
class Candidate:
    """One head that was tried on top of those chosen before.

    Attributes:
        head: ``(layer, head)``.
        mean: mean score of the samples it was judged by.
        samples: how many those were; fewer than all for a head that the screening left out.
    """

    head: Head
    mean: float
    samples: int


@dataclass(frozen=True)
class Round:
    """One round: every candidate, best first, and the set it ended with.

    Attributes:
        number: 1 for the first.
        candidates: all heads tried; those judged by all samples come first.
        added: the heads this round put into the set.
        heads: the set after the round, in the order of choice.
        scores: of every sample under ``heads``, judged together.
        best_so_far: whether the set beats all earlier ones and the unguided model.
    """

    number: int
    candidates: tuple[Candidate, ...]
    added: Heads
    heads: Heads
    scores: tuple[float, ...]
    best_so_far: bool

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)


@dataclass(frozen=True)
class Policy:
    """How the greedy search goes.

    Args:
        rounds: the most rounds R.
        topk: heads added in each round. They are judged one at a time, then all together.
        screen: judge every candidate by this many samples first, and only the ``keep`` best of
            them by all; None judges all by all.
        keep: how many candidates pass the screening.
        min_gain: stop after a round whose set is no better than the best set so far (the unguided
            model at first) by more than this; None always runs all rounds, as the paper does.

    Raises:
        ValueError: a value out of range, ``screen`` without ``keep`` or the other way round.
    """

    rounds: int = 3
    topk: int = 1
    screen: int | None = None
    keep: int | None = None
    min_gain: float | None = 0.0

    def __post_init__(self):
        check_integer("rounds", self.rounds, 1)
        check_integer("topk", self.topk, 1, remedy="the heads added in a round")
        if (self.screen is None) != (self.keep is None):
            raise ValueError(
                f"screen={self.screen} and keep={self.keep} belong together: screen is how many "
                "samples a first look takes, keep how many heads pass it"
            )
        if self.screen is not None:
            check_integer("screen", self.screen, 1)
            check_integer("keep", self.keep, self.topk, remedy="at least topk heads must pass")
        if self.min_gain is not None and not math.isfinite(self.min_gain):
            raise ValueError(f"min_gain must be a finite number or None, got {self.min_gain!r}")


def greedy(
    score: Score,
    pool: Sequence[Head],
    policy: Policy,
    on_round: Callable[[Round], None] = lambda round_: None,
) -> list[Round]:
    """HeadHunter's search: each round adds the heads that score best beside those chosen before.

    Args:
        score: scores of a set of heads, higher is better. It is called with ``()``, the unguided
            model, first.
        pool: the candidates; equal scores go to the earlier one.
        on_round: called after each round.

    Returns:
        The rounds; the last one may be worse than an earlier one (``best_so_far``).
    """
    pool, chosen, rounds = list(pool), (), []
    best = statistics.fmean(score((), None))
    for number in range(1, policy.rounds + 1):
        if not pool:
            break
        candidates = _tried(score, chosen, pool, policy)
        added = tuple(c.head for c in candidates[: policy.topk])
        chosen = chosen + added
        pool = [head for head in pool if head not in added]
        scores = tuple(score(chosen, None))
        gain = statistics.fmean(scores) - best
        round_ = Round(number, tuple(candidates), added, chosen, scores, gain > 0)
        rounds.append(round_)
        on_round(round_)
        if policy.min_gain is not None and gain <= policy.min_gain:
            break
        best += max(gain, 0.0)
    return rounds


def _tried(score: Score, chosen: Heads, pool: list[Head], policy: Policy) -> list[Candidate]:
    """Every head of the pool on top of ``chosen``, best first."""

    def judge(heads: Sequence[Head], count: int | None) -> list[Candidate]:
        judged = []
        for head in heads:
            scores = score((*chosen, head), count)
            judged.append(Candidate(head, statistics.fmean(scores), len(scores)))
        return sorted(judged, key=lambda c: -c.mean)

    if policy.screen is None or policy.keep >= len(pool):
        return judge(pool, None)
    first = judge(pool, policy.screen)
    finalists = judge([c.head for c in first[: policy.keep]], None)
    return finalists + first[policy.keep :]


def calls(policy: Policy, pool: int, samples: int) -> int:
    """The most pictures the search draws, the unguided ones included; for a progress bar."""
    total = samples
    for _ in range(policy.rounds):
        if pool <= 0:
            break
        if policy.screen is None or policy.keep >= pool:
            total += pool * samples
        else:
            first = min(policy.screen, samples)
            total += pool * first + policy.keep * (samples - first)
        # A single added head was judged as a candidate already.
        total += samples if min(policy.topk, pool) > 1 else 0
        pool -= policy.topk
    return total


_FORM = {"settings": dict, "scores": {"*": {"*": [float]}}}


class ScoreBook:
    """Scores of head sets, by sample, in a file that is replaced whole after every entry.

    Args:
        settings: everything that a score depends on, as plain data.
        path: the file; None keeps the scores in memory. If it exists its scores are taken over.
        verify: compare it with its SHA-256.

    Raises:
        ValueError: the file belongs to a search with other settings (the first that differs is
            named), is damaged, or is no such file.
    """

    def __init__(self, settings: dict, path: Path | None = None, verify: bool = True):
        self._verify = verify
        # What JSON makes of tuples, so that a file compares equal with what it was written from.
        self.settings = json.loads(json.dumps(settings))
        self.path = None if path is None else check_output(path, (".json",))
        self._scores: dict[str, dict[str, list[float]]] = {}
        if path is not None and path.is_file():
            self._scores = self._read(path)

    def _read(self, path: Path) -> dict:
        remedy = "remove it, or use another folder"
        data = read_record(path, _FORM, verify=self._verify, remedy=remedy).data
        theirs, scores = data["settings"], data["scores"]
        difference = first_difference(theirs, self.settings)
        if difference:
            where, before, now = difference
            raise ValueError(
                f"{path} belongs to a search with {where} = {before!r}, and now it is {now!r}. "
                "Scores of the two cannot be compared: use another folder, or the same settings"
            )
        return scores

    def get(self, split: str, heads: Heads) -> list[float]:
        """The scores known so far, those of the first samples."""
        return self._scores.get(split, {}).get(name_of(heads), [])

    def extend(self, split: str, heads: Heads, scores: Sequence[float]) -> None:
        """Add the scores of the samples that follow those known."""
        self._scores.setdefault(split, {}).setdefault(name_of(heads), []).extend(scores)
        if self.path is not None:
            write_record(self.path, {"settings": self.settings, "scores": self._scores})


def first_difference(a, b, where: str = "") -> tuple[str, object, object] | None:
    """Where two pieces of JSON data differ first, and the two values there."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            deeper = first_difference(a.get(key), b.get(key), f"{where}.{key}" if where else key)
            if deeper:
                return deeper
        return None
    return None if a == b else (where, a, b)
