"""Picks launch sizes by timing them on the GPU that is here.

Nothing is changed: what is faster is printed by ``dittfast bench gpu``, and whoever adds it to the
table of ``launch_sizes.py`` checks it against the other dtypes and for spills
(``dittfast bench kernels --static``).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch

from dittfast.plan import Plan

from . import triton_backend
from .launch_sizes import KernelConfig, LaunchConfig, launch_config

KERNELS = ("forward", "dq", "dkv")
_TILES = (32, 64, 128)
_WARPS, _STAGES = (4, 8), (2, 3, 4)


def candidates(usual: KernelConfig) -> Iterator[KernelConfig]:
    """Launch sizes worth a try beside the usual ones, which come first."""
    yield usual
    for m, n, warps, stages in itertools.product(_TILES, _TILES, _WARPS, _STAGES):
        one = usual._replace(block_m=m, block_n=n, num_warps=warps, num_stages=stages)
        if m * n <= 128 * 128 and one != usual:
            yield one._replace(rule_tile=min(one.rule_tile, m, n))


def timed(
    q, k, v, plan: Plan, seconds_of: Callable[[Callable], float], goes_on: Callable[[], bool]
) -> dict[str, list[dict]]:
    """For each kernel the launch sizes that were tried and their seconds, the fastest first.

    Args:
        q, k, v: ``[B, H, N, D]`` on the device that is asked about.
        seconds_of: times a function; what it raises is a size that does not fit.
        goes_on: whether there is time for another one.
    """
    t, scale = plan.to(q.device).tensors(), q.shape[3] ** -0.5
    t = t._replace(**plan.to(q.device).transpose()._asdict())
    capability = triton_backend.capability_of(q.device)
    usual = launch_config(q.shape[3], q.dtype, capability)
    out, lse = triton_backend.forward(q, k, v, t, scale)
    grads = *(torch.empty_like(x) for x in (q, k, v)), None, None
    given = torch.ones_like(out), None, q, k, v, out, lse, grads, t, scale, capability
    found: dict[str, list[dict]] = {name: [] for name in KERNELS}
    # Delta first: the other two of the backward pass read it.
    triton_backend.backward_calls(*given)[0].launch()

    def launch(name: str, config: LaunchConfig):
        if name == "forward":
            call = triton_backend.forward_call(q, k, v, out, lse, t, scale, capability, config)
            return call.launch
        delta, *calls = triton_backend.backward_calls(*given, config)
        delta.launch()
        return calls[KERNELS.index(name) - 1].launch

    for name in KERNELS:
        for one in candidates(getattr(usual, name)):
            if not goes_on():
                return _sorted(found)
            row = {"sizes": one._asdict(), "usual": one == getattr(usual, name)}
            try:
                row["seconds"] = seconds_of(launch(name, usual._replace(**{name: one})))
            except Exception as error:  # out of shared memory, or whatever a compiler says
                row["not_run"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
            found[name].append(row)
    return _sorted(found)


def _sorted(found: dict[str, list[dict]]) -> dict[str, list[dict]]:
    by_time = lambda row: row.get("seconds", float("inf"))  # noqa: E731
    return {name: sorted(rows, key=by_time) for name, rows in found.items()}
