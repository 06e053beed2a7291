"""What backends can do, as data. Refusals, the choice of "auto" and every table come from it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dittfast.plan import Plan

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Any size at all.
ANY = range(1, sys.maxsize)


@dataclass(frozen=True)
class Capabilities:
    """What a backend takes on some devices. What it lacks, it refuses; nothing is left out.

    A backend has one or several of these, for what differs between devices and architectures.

    Attributes:
        devices: types of devices, as in ``torch.device.type``; empty: all.
        dtypes: of q, k and v.
        architectures: names like "sm_90" and "gfx942"; empty: all of its devices.
        head_dims, q_block_sizes, kv_block_sizes: which sizes it takes.
        partial_blocks: blocks in which a token rule decides.
        kv_log_weight: log weights of keys, by which keys are hidden, too.
        ragged_blocks: blocks of different lengths, in any order. Without, all blocks but the last
            have the block size and stand one behind the other.
        runs: rows that see the first key blocks without listing them.
        epilogue: ``out_scale`` and ``out_residual``.
        tail: ``tail_lse`` and ``tail_value``, merged around it. So its forward pass has to return
            the lse, and its backward pass to use the ``out`` and ``lse`` that it is given.
        backward: gradients of q, k and v.
        grouped_heads: k and v with fewer heads than q are used as they are; others get copies.
        compile: its op is one node in a graph of ``torch.compile``.
        deterministic: results are bit for bit the same in every run.
        slow_start: the first call compiles or imports for tens of seconds.
    """

    devices: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = FLOATS
    architectures: tuple[str, ...] = ()
    head_dims: range = ANY
    q_block_sizes: range = ANY
    kv_block_sizes: range = ANY
    partial_blocks: bool = True
    kv_log_weight: bool = True
    ragged_blocks: bool = True
    runs: bool = True
    epilogue: bool = True
    tail: bool = False
    backward: bool = True
    grouped_heads: bool = False
    compile: bool = True
    deterministic: bool = True
    slow_start: bool = False


# What the fields that are true or false mean, for tables.
FEATURES = {
    "partial_blocks": "blocks in which a token rule decides",
    "kv_log_weight": "log weights of keys, padding",
    "ragged_blocks": "ragged blocks",
    "runs": "runs: rows that list nothing",
    "epilogue": "epilogue",
    "tail": "a tail for what is not listed",
    "backward": "gradients",
    "grouped_heads": "fewer key heads, without copies",
    "compile": "one node under torch.compile",
    "deterministic": "the same bits in every run",
    "slow_start": "tens of seconds before the first result",
}
# What a plan or a call can need beyond sizes, and what is said where a backend lacks it.
LACKS = {
    "partial_blocks": "it takes full blocks alone, and in some of this plan's a token rule decides",
    "kv_log_weight": "it adds no log weights to keys, and this plan or call has some",
    "ragged_blocks": "its blocks are of one size, and this plan's are ragged",
    "runs": "it walks lists alone, and this plan has runs (rows that list nothing)",
    "epilogue": "it has no epilogue, and this plan has out_scale or out_residual",
    "tail": "it takes no tail, and this plan has tail_lse",
    "backward": "it has no backward pass there, and q, k, v, epilogue or tail needs a gradient",
    "compile": "torch.compile cannot trace it",
    "deterministic": "its gradients differ from run to run, and deterministic ones are asked for",
}


class Demand(NamedTuple):
    """What one call asks of a backend: plain values, so that torch.compile can hold them fixed.

    Sizes are 0 where they are not known yet; ``needs`` are keys of :data:`LACKS`.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int = 0
    q_block_size: int = 0
    kv_block_size: int = 0
    needs: tuple[str, ...] = ()


def demand(
    q, k, v, plan: Plan | None = None, kv_log_weight=None, with_runs: bool = False
) -> Demand:
    """What this call asks for; without a plan, what q, k and v alone do.

    Args:
        kv_log_weight: the call's, on top of the plan's own.
        with_runs: look for runs, too, which waits for the device.
    """
    leaves, weights, q_block, kv_block = [q, k, v], [kv_log_weight], 0, 0
    if plan is not None:
        leaves += [plan.out_scale, plan.out_residual, plan.tail_lse, plan.tail_value]
        weights += [plan.kv_log_weight]
        q_block, kv_block = plan.q_block_size, plan.kv_block_size
    gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves)
    strict = torch.are_deterministic_algorithms_enabled()
    asked = {
        "kv_log_weight": any(x is not None for x in weights),
        "backward": gradient,
        "compile": torch.compiler.is_compiling(),
        "deterministic": gradient and strict,
    }
    if plan is not None:
        asked["runs"] = with_runs and plan.has_runs
        asked["partial_blocks"] = plan.rule is not None
        asked["ragged_blocks"] = plan.q_ragged or plan.kv_ragged
        asked["epilogue"] = plan.out_scale is not None or plan.out_residual is not None
        asked["tail"] = plan.tail_lse is not None
    needs = tuple(name for name in LACKS if asked.get(name))
    return Demand(q.device, q.dtype, q.shape[-1], q_block, kv_block, needs)


def declares(backend) -> bool:
    """Whether a backend has capabilities, and not only ``not_supported_reasons(q, k, v)``."""
    return hasattr(backend, "CAPABILITIES")


def variants_of(backend) -> tuple[Capabilities, ...]:
    """A backend's capabilities."""
    variants = backend.CAPABILITIES
    return variants() if callable(variants) else variants


def refusals(backend, asked: Demand) -> list[str]:
    """Why ``backend`` cannot do what is asked; empty where it can.

    Of several :class:`Capabilities` those speak that lack least.
    """
    reasons = lacking(backend, asked, architecture_of(asked.device))
    if reasons:
        return reasons
    # What the machine lacks is looked for last: it may take a compiler's run.
    machine = getattr(backend, "machine_reasons", None)
    return [] if machine is None else machine(asked)


def lacking(backend, asked: Demand, architecture: str | None) -> list[str]:
    """Why ``backend`` cannot do it on an architecture (None: any), whatever this machine is."""
    variants = variants_of(backend)
    known = tuple(dict.fromkeys(name for one in variants for name in one.architectures))
    found = [_lacks(one, asked, known, architecture) for one in variants]
    return min(found, key=lambda x: (x[0], len(x[1])))[1]


def fitting(backend, asked: Demand) -> Capabilities:
    """The capabilities under which ``backend`` runs what it does not refuse."""
    name = architecture_of(asked.device)
    return next(one for one in variants_of(backend) if not _lacks(one, asked, (), name)[1])


def _lacks(
    one: Capabilities, asked: Demand, known: tuple[str, ...], architecture: str | None
) -> tuple[bool, list[str]]:
    """Whether it is for other devices, and all that it lacks.

    Args:
        known: the architectures of all capabilities of the backend.
    """
    reasons = []
    elsewhere = bool(one.devices) and asked.device.type not in one.devices
    if elsewhere:
        reasons.append(f"it runs on {' and '.join(one.devices)}, got tensors on {asked.device}")
    else:
        named = bool(one.architectures) and architecture is not None
        elsewhere = named and architecture not in one.architectures
        if elsewhere:
            reasons.append(f"it knows the architectures {', '.join(known)}, not {architecture}")
    if asked.dtype not in one.dtypes:
        *names, got = (dtype_name(x) for x in (*one.dtypes, asked.dtype))
        reasons.append(f"it computes {', '.join(names)}, got {got}")
    if asked.head_dim and asked.head_dim not in one.head_dims:
        reasons.append(
            f"head dim must be {span(one.head_dims)}, got {asked.head_dim}"
            + "; pad q, k and v with zeros and pass the unpadded scale"
            * (asked.head_dim < one.head_dims[-1])
        )
    for side in ("q", "kv"):
        sizes, size = getattr(one, f"{side}_block_sizes"), getattr(asked, f"{side}_block_size")
        if size and size not in sizes:
            reasons.append(f"{side} blocks must be of {span(sizes)} tokens, this plan's are {size}")
    reasons += [LACKS[name] for name in asked.needs if not getattr(one, name)]
    return elsewhere, reasons


def architecture_of(device: torch.device) -> str | None:
    """ "sm_90" or "gfx942"; None for what is no GPU, or none of this machine's."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float16`` as ``float16``."""
    return str(dtype).removeprefix("torch.")


def span(sizes: range) -> str:
    """``range(16, 257, 16)`` as ``16 to 256 in steps of 16``."""
    if sizes == ANY:
        return "any"
    if len(sizes) == 1:
        return str(sizes[0])
    if sizes.stop == ANY.stop:
        return f"multiples of {sizes.step}" if sizes.start == sizes.step else f"from {sizes.start}"
    return f"{sizes[0]} to {sizes[-1]}" + (f" in steps of {sizes.step}" if sizes.step > 1 else "")


def described(one: Capabilities) -> dict[str, str]:
    """What a table says of them, by row."""
    facts = {
        "devices": ", ".join(one.devices) or "all",
        "architectures": ", ".join(one.architectures) or "all",
        "dtypes": ", ".join(map(dtype_name, one.dtypes)),
        "head dims": span(one.head_dims),
        "q blocks": span(one.q_block_sizes),
        "kv blocks": span(one.kv_block_sizes),
    }
    return facts | {text: "yes" if getattr(one, x) else "no" for x, text in FEATURES.items()}
