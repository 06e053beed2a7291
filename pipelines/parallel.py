"""Context parallelism: Ulysses, ring attention and both at once, as diffusers' configuration says.

The interception alone would be wrong there. diffusers recomputes attention in the backward pass,
outside of our layers, has no ring for PyTorch's attention and no gradients for lengths that do not
divide, and a joint model's sequence arrives as [text, image] of rank 0, [text, image] of rank 1 and
so on. So these layers run an attention backend of our own, which is one more entry in diffusers'
registry and replaces none. It exchanges tokens for heads (Ulysses), passes keys around
(``ring.py``), or does one inside the other.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable
from typing import NamedTuple

import torch

from dittfast.attention import method_scale
from dittfast.layout import inverse_permutation
from dittfast.methods.base import Method

from .exchange import (
    Ranks,
    check_shares,
    gather_last,
    heads_for_tokens,
    share_lengths,
    split_heads,
    token_shares,
    tokens_for_heads,
)
from .layer import AttentionCore, LayerRun, PlannedLayout, attend_call
from .ring import Step, ring_attention, ring_steps


class ParallelRun:
    """A layer that attends through our backend: what it runs, and whether it did."""

    def __init__(self, run: LayerRun):
        self.run = run
        self.reached = False


# The layers that are running, innermost last. A list and nothing of a thread's own, which
# torch.compile cannot set: threads that share a process group cannot run layers at once anyway.
_RUNNING: list[ParallelRun] = []


def context_parallel(module: torch.nn.Module):
    """The ContextParallelConfig of a model or an attention module; None where it has none."""
    module = getattr(module, "processor", module)
    parallel = getattr(module, "_parallel_config", None)
    return getattr(parallel, "context_parallel_config", None)


class Place(NamedTuple):
    """Where a process stands: ranks of a ring, each of them ranks that share heads.

    The sequence is cut between all of them; those that share heads hold neighbouring parts.
    """

    ring: Ranks
    ulysses: Ranks
    everybody: Ranks

    @classmethod
    def of(cls, config) -> Place:
        ring, ulysses, both = config._ring_mesh, config._ulysses_mesh, config._flattened_mesh
        ring = Ranks(ring.get_local_rank(), config.ring_degree or 1, ring.get_group())
        ulysses = Ranks(ulysses.get_local_rank(), config.ulysses_degree or 1, ulysses.get_group())
        own = ring.own * ulysses.count + ulysses.own
        return cls(ring, ulysses, Ranks(own, ring.count * ulysses.count, both.get_group()))

    def steps(self, row: PlannedLayout) -> tuple[Step, ...]:
        """What this process does in the ring, made once for each plan."""

        def make():
            shares = token_shares(row.layout, self.everybody.count, row.kept.device)
            count = self.ulysses.count
            joined = [torch.cat(shares[n : n + count]) for n in range(0, len(shares), count)]
            return ring_steps(row.kept, joined, self.ring.own)

        return row.prepared(("ring", self.everybody.count, self.everybody.own), make)


def prepare(model: torch.nn.Module, runs: Iterable[LayerRun]) -> None:
    """Before a pass of a model that may be context-parallel: check, and make what lasts.

    Raises:
        ValueError: what the method or the sequence cannot do between ranks, or the model or a part
            of it is compiled and the pass is to have gradients.
    """
    config = context_parallel(model)
    if config is None:
        return
    if torch.is_grad_enabled() and any(m._compiled_call_impl for m in model.modules()):
        raise ValueError(
            "a compiled model under context parallelism has no gradients, because attention that "
            "communicates does not compile with them; run it under torch.no_grad(), or train "
            "without torch.compile"
        )
    for core in {id(run.core): run.core for run in runs if run.core is not None}.values():
        _prepare_core(core, config)
    _register()


def _prepare_core(core: AttentionCore, config) -> None:
    place = Place.of(config)
    for row in itertools.chain(*core.planned):
        _check(core.method, row, place, config)
        if place.ring.count > 1:
            place.steps(row)


def _check(method: Method, row: PlannedLayout, place: Place, config) -> None:
    """Raise ValueError, with a remedy, where ranks cannot share this."""
    anything = "ulysses_anything" if place.ring.count == 1 else "ring_anything"
    uneven = getattr(config, "ulysses_anything", False) or getattr(config, "ring_anything", False)
    remedy = f"use ContextParallelConfig({anything}=True), or another size"
    if min(place.ring.count, place.ulysses.count) > 1:
        remedy = "take ring_degree or ulysses_degree alone, with ring_anything or ulysses_anything"
    check_shares(row.layout, place.everybody.count, None if uneven else remedy)
    if method.computes or method.adds:
        raise ValueError(
            f"{method.name} computes for all heads and keys of a layer at once, and under context "
            "parallelism ranks share them; keep the layers dense with dense_layers"
        )
    if place.ring.count == 1:
        return
    why = None
    if not method.static:
        why = "chooses key blocks from all of q and k"
    elif row.kept.num_keys != row.num_tokens:
        why = "appends summaries of all keys"
    elif row.kept.tail_lse is not None or row.kept.out_scale is not None:
        why = "adds to what all keys give together"
    if why is not None:
        raise ValueError(
            f"{method.name} {why}, and in ring attention (ring_degree={place.ring.count}) no rank "
            "has them; use ContextParallelConfig(ulysses_degree=...) alone"
        )


def _rows_of_share(run: LayerRun, num_tokens: int, everybody: Ranks):
    """The plans for a sequence of which this process holds so many tokens, and all shares."""
    for rows in run.core.planned:
        lengths = share_lengths(rows[0].layout, everybody.count)
        if lengths[everybody.own] == num_tokens:
            return rows, lengths
    return None, None


def _shared(running: ParallelRun, rows, lengths: list[int], place: Place, call: dict):
    """Attention of this rank's tokens to the whole sequence; all ``[B, n, H, D]``.

    Args:
        rows: the plans of the whole sequence.
        lengths: how many tokens each rank holds.
        call: the arguments of scaled_dot_product_attention by name, but for their order.
    """
    q, k, v = (call[name] for name in ("query", "key", "value"))
    ring, ulysses, everybody = place
    heads = q.shape[2]
    if k.shape[2] != heads:
        raise ValueError(
            f"{heads} query heads and {k.shape[2]} key heads: diffusers has no context parallelism "
            "for grouped-query attention; run the model on one device"
        )
    own = slice(0, heads)
    if ulysses.count > 1:
        sizes = split_heads(heads, ulysses.count)
        own = slice(sum(sizes[: ulysses.own]), sum(sizes[: ulysses.own + 1]))
        near = lengths[ring.own * ulysses.count : (ring.own + 1) * ulysses.count]
        q, k, v = tokens_for_heads(torch.stack([q, k, v]), near, ulysses)
    arrived = torch.cat(token_shares(rows[0].layout, everybody.count, q.device))
    mask = call["attn_mask"]
    if mask is not None:
        if mask.shape[-1] == lengths[everybody.own]:
            mask = gather_last(mask, lengths, everybody)
        mask = mask[..., inverse_permutation(arrived)]
        if mask.ndim == 4 and mask.shape[1] > 1:
            mask = mask[:, own]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    call = call | {"query": q, "key": k, "value": v, "attn_mask": mask}
    if ring.count > 1:
        method, backend = running.run.core.method, running.run.core.backend

        def attend_row(row, q, k, v, weight, scale):
            given = {"heads": own, "kv_log_weight": weight, "backend": backend}
            given["scale"] = method_scale(method, row.layout, q.shape[-1], scale)
            return ring_attention(q, k, v, place.steps(row), ring, **given)

        out = attend_call(running.run, call, rows, attend_row)
    else:
        order = inverse_permutation(arrived)
        call |= {name: call[name][:, :, order] for name in ("query", "key", "value")}
        out = attend_call(running.run, call, tuple(row.of_heads(own) for row in rows))
        out = out[:, :, arrived]
    running.reached = True
    out = out.transpose(1, 2)
    return out if ulysses.count == 1 else heads_for_tokens(out, near, heads, ulysses)


def _attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
    enable_gqa=False, return_lse=False, _parallel_config=None,
):  # fmt: skip
    """diffusers' attention function: ours where the tokens are a share of the layout."""
    given = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal}
    given |= {"scale": scale, "enable_gqa": enable_gqa}
    if _parallel_config is not None and query.shape[1] == key.shape[1]:
        place, running = Place.of(_parallel_config.context_parallel_config), _RUNNING[-1]
        rows, lengths = _rows_of_share(running.run, query.shape[1], place.everybody)
        if rows is not None:
            call = {"query": query, "key": key, "value": value} | given
            return _shared(running, rows, lengths, place, call)
    from diffusers.models.attention_dispatch import _native_attention

    return _native_attention(query, key, value, **given, _parallel_config=_parallel_config)


# Our entry in diffusers' registry. A list and no cached function: torch.compile would trace that.
_BACKENDS: list = []


def _register() -> None:
    """Enter our backend in diffusers' registry, once."""
    if _BACKENDS:
        return
    from diffusers.models.attention_dispatch import (
        AttentionBackendName,
        _AttentionBackendRegistry,
    )

    name = str.__new__(AttentionBackendName, "dittfast")
    name._name_, name._value_ = "DITTFAST", "dittfast"
    _AttentionBackendRegistry.register(name, supports_context_parallel=True)(_attention)
    _BACKENDS.append(name)


@contextlib.contextmanager
def running(module: torch.nn.Module, run: LayerRun):
    """Inside, ``module`` attends through our backend, which runs ``run``."""
    if run.transform is not None:
        raise ValueError(
            "head guidance does not run under context parallelism; call dittfast.unguide(pipe)"
        )
    if run.parameters and torch.is_grad_enabled():
        raise ValueError(
            "trainable parameters of a method get no gradient under context parallelism; train "
            "on one device, or without down-sampled keys"
        )
    if run.core is not None and not torch.compiler.is_compiling():
        _prepare_core(run.core, context_parallel(module))
    _register()
    processor = module.processor
    before, processor._attention_backend = processor._attention_backend, _BACKENDS[0]
    layer = ParallelRun(run)
    _RUNNING.append(layer)
    try:
        yield layer
    finally:
        _RUNNING.pop()
        processor._attention_backend = before
