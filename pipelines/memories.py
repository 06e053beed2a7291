"""What the layers of a transformer keep over a run, by guidance branch, for one thread."""

from __future__ import annotations

from collections import Counter

from dittfast.methods.memory import Lasting, Memory, Tally


class Memories:
    """What layers keep from step to step, for the run that is under way in one thread.

    A branch is a pass that comes again in every step: the conditional one, the unconditional one, a
    scheduler's second evaluation. Pipelines that name their passes tell them apart, and otherwise
    their place in the step does. When another run begins, after an interrupted one too, nothing of
    the last is left.
    """

    def __init__(self):
        self._run: object = None
        self._step = -1
        self._passes: Counter = Counter()
        self._branches: dict[tuple, dict[str, Memory]] = {}

    def begin(self, run: object, step: int, context: str | None) -> dict[str, Memory]:
        """A pass begins; what its layers keep, by name, to be filled with :func:`memory_of`.

        Args:
            run: stands for the run; another object in each.
            step: 0-based.
            context: how the pipeline names the pass; None where it does not.
        """
        if run is not self._run or step < self._step:
            for branch in self._branches.values():
                forget(branch)
            self._branches.clear()
            self._run = run
        if step != self._step:
            self._passes.clear()
            self._step = step
        branch = context, self._passes[context]
        self._passes[context] += 1
        return self._branches.setdefault(branch, {})


def forget(branch: dict[str, Memory]) -> None:
    """Let go of what the layers of a branch keep."""
    for memory in branch.values():
        memory.clear()
    branch.clear()


def memory_of(branch: dict[str, Memory], layer: str, step: int, lasting: Lasting, tally: Tally):
    """The memory of a layer in a branch, for a pass at ``step``."""
    if layer not in branch:
        branch[layer] = Memory(lasting, tally)
    branch[layer].begin(step)
    return branch[layer]
