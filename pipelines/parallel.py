"""Context parallelism: a method inside diffusers' Ulysses attention, forward and backward.

The interception alone would be wrong there. diffusers recomputes attention in the backward pass,
outside of our layers, and a joint model's sequence arrives as [text, image] of rank 0, [text,
image] of rank 1 and so on. So these layers run an attention backend of our own, which is one more
entry in diffusers' registry and replaces none.
"""

from __future__ import annotations

import contextlib
import functools

import torch

from dittfast.layout import Context, Layout

from .layer import LayerRun, attend_call


class ParallelRun:
    """A layer that attends through our backend: what it runs, and whether it did."""

    def __init__(self, run: LayerRun):
        self.run = run
        self.reached = False


# The layers that are running, innermost last. A list and nothing of a thread's own, which
# torch.compile cannot set: threads that share a process group cannot run layers at once anyway.
_RUNNING: list[ParallelRun] = []


def ulysses(module: torch.nn.Module):
    """The context-parallel configuration of an attention module; None where there is none.

    Raises:
        ValueError: ring attention, whose ranks never hold all keys.
    """
    parallel = getattr(module.processor, "_parallel_config", None)
    config = getattr(parallel, "context_parallel_config", None)
    if config is None:
        return None
    if (config.ring_degree or 1) > 1:
        raise ValueError(
            f"ring attention (ring_degree={config.ring_degree}) passes the keys around in parts, "
            "and a block plan needs all of them; use ContextParallelConfig(ulysses_degree=...)"
        )
    return config if (config.ulysses_degree or 1) > 1 else None


def rank_order(layout: Layout, ranks: int, device=None) -> torch.Tensor:
    """``[N]`` int64: where each token of ``layout`` stands after the all-to-all.

    Text and image are split between the ranks one by one, and each rank joins its parts.
    """
    first = layout.segments[0]
    text = first.length if isinstance(first, Context) else 0
    streams = [n for n in (text, layout.num_tokens - text) if n]
    if any(n % ranks for n in streams):
        raise ValueError(
            f"{' and '.join(str(n) for n in streams)} tokens do not divide between {ranks} ranks"
        )
    at = torch.arange(layout.num_tokens, device=device).view(ranks, -1)
    sizes = [n // ranks for n in streams]
    return torch.cat([part.reshape(-1) for part in at.split(sizes, dim=1)])


def _local(running: ParallelRun, q, k, v, mask, scale, config):
    """Attention over the whole sequence with this rank's heads; all ``[B, N, H, D]``."""
    rows = running.run.core.rows_of(q.shape[1])
    if rows is None or q.shape[1] != k.shape[1]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)
        return out.transpose(1, 2)
    order = rank_order(rows[0].layout, config.ulysses_degree, q.device)
    q, k, v = (x[:, order].transpose(1, 2) for x in (q, k, v))
    if mask is not None:
        mask = mask[..., order]
    rank = config._ulysses_mesh.get_local_rank()
    heads = slice(rank * q.shape[1], (rank + 1) * q.shape[1])
    call = {"query": q, "key": k, "value": v, "attn_mask": mask, "scale": scale}
    out = attend_call(running.run, call, heads).transpose(1, 2)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    running.reached = True
    return out[:, back]


def _forward_op(
    ctx, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False,
    return_lse=False, _save_ctx=True, _parallel_config=None,
):  # fmt: skip
    layer, config = _RUNNING[-1], _parallel_config.context_parallel_config
    if _save_ctx:
        ctx.save_for_backward(q, k, v)
        ctx.attention = functools.partial(_local, layer, mask=attn_mask, scale=scale, config=config)
    return _local(layer, q, k, v, attn_mask, scale, config)


def _backward_op(ctx, grad_out, *args, **kwargs):
    leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
    with torch.enable_grad():
        out = ctx.attention(*leaves)
    return torch.autograd.grad(out, leaves, grad_out)


def _attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
    enable_gqa=False, return_lse=False, _parallel_config=None,
):  # fmt: skip
    from diffusers.models.attention_dispatch import _templated_context_parallel_attention

    if _parallel_config is None:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return out.transpose(1, 2)
    return _templated_context_parallel_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse,
        forward_op=_forward_op, backward_op=_backward_op, _parallel_config=_parallel_config,
    )  # fmt: skip


# Our entry in diffusers' registry. A list and no cached function: torch.compile would trace that.
_BACKENDS: list = []


def check_and_register(model: torch.nn.Module) -> None:
    """Before a context-parallel model runs sparse: what torch.compile cannot trace.

    Raises:
        ValueError: the model, or a part of it, is compiled and the pass is to have gradients.
    """
    if torch.is_grad_enabled() and any(m._compiled_call_impl for m in model.modules()):
        raise ValueError(
            "a compiled model under context parallelism has no gradients, because the attention "
            "of diffusers does not compile with them; run it under torch.no_grad(), or train "
            "without torch.compile"
        )
    _register()


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
