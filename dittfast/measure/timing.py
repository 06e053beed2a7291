"""Seconds of functions that run in turns, and what to say about them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from time import perf_counter, process_time
from typing import TypeVar

import torch

_T = TypeVar("_T")


def synchronize(device) -> None:
    """Wait until the device has finished what it was given."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()


def clock_for(device) -> Callable[[], float]:
    """Processor time where one CPU thread computes, so that what else runs there does not count."""
    alone = torch.device(device).type == "cpu" and torch.get_num_threads() == 1
    return process_time if alone else perf_counter


def check_repeats(repeats: int) -> None:
    """ValueError for a number of repeats that measures nothing."""
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")


def in_turns(names: Iterable[_T], rounds: int) -> Iterator[tuple[int, _T]]:
    """``(round, name)``: every name once a round, in every second round backwards.

    Whatever disturbs the machine in a round disturbs all in it, so ratios within a round are far
    steadier than the seconds.
    """
    names = list(names)
    for round_ in range(rounds):
        for name in names[:: 1 if round_ % 2 == 0 else -1]:
            yield round_, name


def interleaved_seconds(
    functions: dict[str, Callable],
    repeats: int,
    device,
    warmup: int = 1,
    most_seconds: float | None = None,
    clock: Callable[[], float] = perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each function in ``repeats`` rounds, :func:`in_turns`.

    No round begins after ``most_seconds`` of wall-clock time, but two always run where ``repeats``
    allows it.
    """
    check_repeats(repeats)
    for function in functions.values():
        for _ in range(warmup):
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    end = math.inf if most_seconds is None else perf_counter() + most_seconds
    for round_, name in in_turns(functions, repeats):
        begins = all(len(times) == round_ for times in seconds.values())
        if begins and round_ > 1 and perf_counter() > end:
            break
        synchronize(device)
        start = clock()
        functions[name]()
        synchronize(device)
        seconds[name].append(clock() - start)
    return seconds


def percentiles(values) -> dict[str, float]:
    """``{"p20", "p50", "p80"}`` of some numbers."""
    x = torch.tensor(list(values), dtype=torch.float64)
    quantiles = torch.quantile(x, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return dict(zip(("p20", "p50", "p80"), quantiles))


def with_gradient(function: Callable, inputs, grad_out) -> Callable:
    """``function`` and the gradient of its result, thrown away."""

    def run():
        out = function()
        torch.autograd.grad(out, inputs, grad_out)

    return run
