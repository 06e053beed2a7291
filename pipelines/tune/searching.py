"""The search of a tuning: solve, draw and correct, until held-out prompts hold the budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dittfast.disk.records import digest_of
from dittfast.mixture import Mixture
from dittfast.schedule import Schedule

from ..measure.fidelity import Arm
from .budget import QUALITIES, Budget, ImpossibleBudget, better, squared, value_of
from .measuring import Measuring
from .prediction import Assigned, Prediction
from .preset import ALWAYS, mixture_of

# dB that are aimed above a bound of quality, for prompts differ; and how near to its bound a
# quality leaves nothing worth another round.
_ABOVE, _NEAR = 0.5, 1.0
# A speed is aimed this much above its bound, for seconds differ, too.
_FASTER = 1.03
# A preset that is so much faster than asked leaves some quality to be had.
_TOO_FAST = 1.07
# What a method's plans may last, and what of a run its planning must take to be worth a try.
_LASTING, _WORTH_LASTING = (4, 2), 0.005
# A speed budget alone leaves quality free; plans may last if that loses no more than this, in dB.
_LOST = 0.1


@dataclass(frozen=True)
class Drawn:
    """A preset that was drawn, with what was predicted and measured of it.

    Attributes:
        predicted: measures, speedup, and work, of dense attention's.
        tuned, held_out: measures, means over prompts; ``held_out`` has ``speedup``, too, where it
            was timed. Empty where the preset was not drawn with these prompts.
    """

    label: str
    mixture: Mixture
    assigned: Assigned
    schedule: Schedule
    predicted: dict
    tuned: dict
    held_out: dict

    def to_dict(self) -> dict:
        words = {"label": self.label, "rules": self.mixture.to_dict()["rules"]}
        measured = {"predicted": self.predicted, "tuned": self.tuned, "held_out": self.held_out}
        return words | {"replan_every": dict(self.schedule.replan_every or ())} | measured


class Search:
    """Looks for the best preset by a prediction, which learns from what is drawn."""

    def __init__(self, measured: Measuring, prediction: Prediction):
        self.measured, self.prediction, self.task = measured, prediction, measured.task

    def search(self) -> tuple[Drawn, list[Drawn]]:
        """Solve, draw and correct until a preset holds; it, and all that were drawn.

        Raises:
            ImpossibleBudget: none does.
        """
        budget, rounds = self.task.budget, []
        bounds = {m: getattr(budget, m) for m in QUALITIES if getattr(budget, m) is not None}
        targets = {m: better(m, bound, _ABOVE) for m, bound in bounds.items()}
        for number in range(self.task.rounds + 1):
            try:
                solve = self._solve if number else self._alike
                assigned = solve(targets)
            except ImpossibleBudget:
                if any(map(self._holds, rounds)):
                    break  # what was drawn is more than what is predicted
                raise
            if assigned is None:
                continue
            mixture = self._mixture(assigned)
            if any(mixture == one.mixture for one in rounds):
                if not targets or any(map(self._holds, rounds)):
                    break
                targets = {m: better(m, x, _ABOVE) for m, x in targets.items()}
                continue
            one = self._round(_label(mixture), mixture, assigned)
            rounds.append(one)
            self._learn(one, targets)
            if number and self._holds(one) and not self._has_room(one, targets):
                break
        held = [one for one in rounds if self._holds(one)]
        if not held:
            raise ImpossibleBudget(self._nearest(rounds))
        if budget.has_quality:
            return min(held, key=lambda one: self.prediction.call_seconds(one.assigned)), rounds
        return max(held, key=lambda one: one.tuned["psnr"]), rounds

    def _alike(self, targets: dict[str, float]) -> Assigned | None:
        """The best of one candidate in all layers and steps, which every preset has to beat.

        None where no candidate is predicted to hold the budget so.
        """
        limits = {m: squared(m, x) for m, x in targets.items()}
        asked = (self.task.budget.speedup or 0.0) * _FASTER
        fitting = []
        for number in self.prediction.usual:
            assigned = self.prediction.alike(number)
            if self.prediction.speedup(assigned) < asked or self.prediction.saved(assigned) <= 0:
                continue
            errors = {
                m: self.prediction.squared_error(assigned, m) for m in (limits or {"psnr": 1.0})
            }
            if all(errors[m] <= limit for m, limit in limits.items()):
                cost = self.prediction.call_seconds(assigned) if limits else errors["psnr"]
                fitting.append((cost, number, assigned))
        return min(fitting)[2] if fitting else None

    def _solve(self, targets: dict[str, float]) -> Assigned:
        limits = {m: squared(m, x) for m, x in targets.items()} or {"psnr": 1.0}
        starts = [self.prediction.alike(number) for number in self.prediction.usual]
        asked = self.task.budget.speedup
        assigned = self.prediction.solve(limits, starts=starts) if targets else None
        if asked is not None and (assigned is None or self.prediction.speedup(assigned) < asked):
            for aim in (_FASTER * asked, asked):
                assigned = self.prediction.solve(limits, self.prediction.run_seconds / aim, starts)
                if assigned is not None:
                    break
            else:
                raise ImpossibleBudget(self._too_fast())
        if self._mixture(assigned) is None:
            fastest = self.prediction.speedup(self.prediction.fastest())
            raise ImpossibleBudget(
                f"within {' and '.join(self.task.budget.words())} no method saves anything in any "
                f"layer, so dense attention is the nearest; the sparsest that there is would be "
                f"predicted {fastest:.2f} times as fast"
            )
        return assigned

    def _mixture(self, assigned: Assigned) -> Mixture | None:
        edges = [
            (a / self.measured.total_steps, b / self.measured.total_steps)
            for a, b in self.measured.bands
        ]
        return mixture_of(assigned, self.prediction.methods, self.measured.layers, edges)

    def _round(self, label: str, mixture: Mixture, assigned: Assigned) -> Drawn:
        """Draw a choice; with held-out prompts only where those it was tuned with hold."""
        budget, arm = self.task.budget, self.measured.variant(label, mixture)
        predicted = {m: self.prediction.squared_error(assigned, m) for m in self.measured.measures}
        predicted = {m: value_of(m, x) for m, x in predicted.items()}
        predicted["work"] = self.prediction.work(assigned)
        predicted["speedup"] = self.prediction.speedup(assigned)
        self.measured.draw(f"{label}, the prompts it is tuned with", arm, self.task.items)
        tuned = self.measured.judge(arm, self.task.items)
        held = {}
        if not budget.lacks(tuned, QUALITIES):
            self.measured.draw(f"{label}, held-out prompts", arm, self.task.held_out)
            held = self.measured.judge(arm, self.task.held_out)
            if budget.speedup is not None and not budget.lacks(held, QUALITIES):
                held["speedup"] = self.measured.speed(self.prediction, assigned, arm)
        return Drawn(label, mixture, assigned, ALWAYS, predicted, tuned, held)

    def _learn(self, one: Drawn, targets: dict[str, float]) -> None:
        """Correct the prediction, and what is aimed at where held-out prompts fell short."""
        self._correct(one.assigned, one.tuned)
        if "speedup" in one.held_out:
            self.prediction.learn_speed(one.assigned, one.held_out["speedup"])
        for measure, target in targets.items() if one.held_out else ():
            if self.task.budget.lacks(one.held_out, [measure]):
                bound = squared(measure, getattr(self.task.budget, measure))
                short = 10 * math.log10(squared(measure, one.held_out[measure]) / bound)
                targets[measure] = better(measure, target, short)

    def _holds(self, one: Drawn) -> bool:
        return bool(one.held_out) and not self.task.budget.lacks(one.held_out)

    def _has_room(self, one: Drawn, targets: dict[str, float]) -> bool:
        """Whether another round may find something better than a preset that holds."""
        if not targets:  # a preset of the speed that is aimed at is the most exact known
            return one.held_out["speedup"] > _TOO_FAST * self.task.budget.speedup
        bounds = {m: squared(m, getattr(self.task.budget, m)) for m in targets}
        held = {m: squared(m, one.held_out[m]) for m in targets}
        return all(10 * math.log10(bounds[m] / held[m]) > _NEAR for m in targets if held[m])

    # What cannot be had.

    def _too_fast(self) -> str:
        share = 1 - self.prediction.rest / self.prediction.run_seconds
        fastest = self.prediction.speedup(self.prediction.fastest())
        return (
            f"speedup>={self.task.budget.speedup:g} cannot be had here: attention is {share:.0%} "
            "of a run, and with the fastest method in every layer and step it would be "
            f"{fastest:.2f} times as fast; that is the nearest possible"
        )

    def _nearest(self, rounds: Sequence[Drawn]) -> str:
        budget = self.task.budget

        def words(one: Drawn) -> str:
            measured = one.held_out or one.tuned
            speed = measured.get("speedup", one.predicted["speedup"])
            which = "held-out prompts" if one.held_out else "the prompts it was tuned with"
            parts = [f"{m} {measured[m]:.4g}" for m in self.measured.measures if m in measured]
            return f"{', '.join(parts)} on {which} at {speed:.2f} times the speed"

        best = max(rounds, key=lambda one: (one.held_out or one.tuned)["psnr"])
        return (
            f"no preset of {len(rounds)} rounds holds {' and '.join(budget.words())}; the nearest "
            f"has {words(best)}. Allow more --rounds, or ask for that"
        )

    # Plans that last.

    def lasting(self, best: Drawn) -> Drawn:
        """The preset with plans that last some steps, method by method, where that loses nothing.

        Prompts tuned with choose how long; the preset stays as it is if held-out ones object.
        """
        spent, chosen = self.prediction.planning(best.assigned), {}
        for name in sorted(spent, key=spent.get, reverse=True):
            if spent[name] < _WORTH_LASTING * self.prediction.call_seconds(best.assigned):
                continue
            for every in _LASTING:
                arm = self._lasting(best, chosen | {name: every})
                self.measured.draw(f"plans of {name} kept for {every} steps", arm, self.task.items)
                if not self._loses(self.measured.judge(arm, self.task.items), best.tuned):
                    chosen[name] = every
                    break
        if not chosen:
            return best
        arm = self._lasting(best, chosen)
        self.measured.draw("plans that last, held-out prompts", arm, self.task.held_out)
        held = self.measured.judge(arm, self.task.held_out)
        if self._loses(held, best.held_out):
            return best
        if "speedup" in best.held_out:
            held["speedup"] = self.measured.speed(self.prediction, best.assigned, arm)
            if self.task.budget.lacks(held):
                return best
        tuned = self.measured.judge(arm, self.task.items)
        schedule = arm.variant.schedule
        return replace(best, label=arm.label, schedule=schedule, tuned=tuned, held_out=held)

    def _lasting(self, best: Drawn, every: dict[str, int]) -> Arm:
        label = "-".join([best.label, *(f"{name}-{n}" for name, n in sorted(every.items()))])
        return self.measured.variant(label, best.mixture, replace(ALWAYS, replan_every=every))

    def _loses(self, measured: dict, before: dict) -> bool:
        budget = self.task.budget
        if not budget.has_quality:
            budget = Budget(psnr=max(before["psnr"] - _LOST, 1.0))
        return bool(budget.lacks(measured, QUALITIES))

    def _correct(self, assigned: Assigned, measured: dict) -> None:
        for measure in self.measured.measures:
            self.prediction.correct(assigned, measure, squared(measure, measured[measure]))


def _label(mixture: Mixture) -> str:
    """A name for what was chosen, the same for the same choice."""
    return f"tuned-{digest_of(mixture.to_dict())[:8]}"
