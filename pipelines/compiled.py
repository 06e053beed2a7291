"""Attention of a layer as one op of a compiled graph, which looks up what to run when it runs.

Traced, a layer's attention would bring the numbers of its layout into the graph, and torch.compile
would build one for every size, step and method. As an op it brings none: the graph holds q, k, v, a
mask, the method's parameters, hidden states if it asks for them, and a :func:`handle_of` what the
layer runs in the pass under way.
"""

from __future__ import annotations

import contextlib

import torch
from torch.autograd import forward_ad

from .layer import LayerRun, answer, autocast, one_row

_RUN = "_dittfast_run"
_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor[] others, Tensor handle, bool causal, "
    "float? scale, bool grouped"
)
# Whoever replays a CUDA graph runs no Python, and would repeat an earlier pass.
_TAGS = (torch.Tag.cudagraph_unsafe,)


def handle_of(run: LayerRun) -> torch.Tensor:
    """A tensor that stands for ``run`` in a graph; whatever shares its memory leads there.

    So does what autograd saves of it for the backward pass, which keeps ``run`` as long.
    """
    handle = torch.empty(1, dtype=torch.uint8, device="cpu")
    setattr(handle.untyped_storage(), _RUN, run)
    return handle


def _run_of(handle: torch.Tensor) -> LayerRun:
    run = getattr(handle.untyped_storage(), _RUN, None)
    if run is None:
        raise RuntimeError(
            "a tensor that stands for what an attention layer runs was copied on its way to the "
            "backward pass, by hooks on saved tensors for one (save_on_cpu with pinned memory); "
            "leave tensors of one byte where they are"
        )
    return run


def is_served(handle: torch.Tensor | None, call: dict) -> bool:
    """Whether a traced call of scaled_dot_product_attention may become the op.

    What it cannot do is traced through, into a graph that belongs to one layout: forward-mode
    derivatives, dropout, a mask with a gradient, layers without a handle or without tokens.
    """
    mask = call.get("attn_mask")
    return (
        handle is not None
        and ("streams" not in call or call["streams"][0] is not None)
        and not call.get("dropout_p")
        and (mask is None or not mask.requires_grad)
        and forward_ad._current_level < 0
    )


def attention(run: LayerRun, handle: torch.Tensor, call: dict) -> torch.Tensor:
    """What the layer gives for a call of scaled_dot_product_attention, as one node of the graph.

    Args:
        run: as it is while torch.compile traces; of it only the parameters are looked at.
        handle: of what the layer runs, in the pass under way when the graph runs.
        call: the call's arguments by name.
    """
    q, k, v = autocast(call["query"], call["key"], call["value"])
    mask = call.get("attn_mask")
    if mask is not None:
        mask = one_row(mask)  # what was expanded need not be so in the compiler's memory
    streams = [x for x in call.get("streams", ()) if x is not None]
    return _attention(
        q, k, v, mask, [*run.parameters.values(), *streams], handle,
        bool(call.get("is_causal")), call.get("scale"), bool(call.get("enable_gqa")),
    )  # fmt: skip


@torch.library.custom_op(
    "dittfast::layer_attention", mutates_args=(), schema=f"({_CALL}) -> Tensor", tags=_TAGS
)
def _attention(q, k, v, mask, others, handle, *more):
    out = _answered(q, k, v, mask, others, _run_of(handle), *more)
    like = _like(q, v, device="meta")  # a tensor there has strides and no memory
    if out.stride() == like.stride() and not _shares_memory(out, (q, k, v)):
        return out
    return torch.empty_strided(like.shape, like.stride(), dtype=q.dtype, device=q.device).copy_(out)


@_attention.register_fake
def _(q, k, v, *_):
    return _like(q, v)


def _like(q, v, **options):
    """Uninitialised, for an output: in q's order, which a model turns back into rows of tokens."""
    if q.shape[-1] == v.shape[-1]:
        return torch.empty_like(q, **options)
    return q.new_empty((*q.shape[:-1], v.shape[-1]), **options)


def _shares_memory(out: torch.Tensor, inputs: tuple) -> bool:
    mine = out.untyped_storage().data_ptr()
    return any(x.untyped_storage().data_ptr() == mine for x in inputs)


def _answered(q, k, v, mask, others, run, causal, scale, grouped) -> torch.Tensor:
    """As the layer answers outside of a graph; where it means another attention, that."""
    call = {"query": q, "key": k, "value": v, "attn_mask": mask}
    call |= {"is_causal": causal, "scale": scale, "enable_gqa": grouped}
    streams = {}
    if len(others) > len(run.parameters):
        own, *other = others[len(run.parameters) :]
        streams["streams"] = own, other[0] if other else None
    run = run.with_parameters(dict(zip(run.parameters, others)))
    out = answer(run, call | streams, _stock)
    return _stock(**call) if out is None else out


def _stock(query, key, value, attn_mask, **more):
    """PyTorch's attention, which takes a mask in the dtype of autocast only inside of autocast."""
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.to(query.dtype)
    return torch.ops.aten.scaled_dot_product_attention(query, key, value, attn_mask, **more)


@torch.library.custom_op(
    "dittfast::layer_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, bool[] wanted, {_CALL}) -> Tensor[]",
    tags=_TAGS,
)
def _backward(grad_out, wanted, q, k, v, mask, others, handle, *more):
    # Again from the inputs: memory that the forward pass saw belongs to the compiler, which may
    # have filled it with something else, so nothing but them can be kept.
    with _recording():
        inputs = [x.detach() for x in (q, k, v, *others)]
        asked = [x.requires_grad_() for x, is_asked in zip(inputs, wanted) if is_asked]
        q, k, v, *others = inputs
        out = _answered(q, k, v, mask, others, _run_of(handle), *more)
        grads = [None] * len(asked)
        if out.requires_grad:
            grads = torch.autograd.grad(out, asked, grad_out, allow_unused=True)
    return [_contiguous(grad, x) for grad, x in zip(grads, asked)]


@_backward.register_fake
def _(grad_out, wanted, q, k, v, mask, others, *_):
    inputs = zip((q, k, v, *others), wanted)
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x, asked in inputs if asked]


def _contiguous(grad: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    made = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    return made.zero_() if grad is None else made.copy_(grad)


@contextlib.contextmanager
def _recording():
    """Inside an op, autograd records again."""
    key = torch._C.DispatchKey
    off = torch._C._dispatch_tls_local_exclude_set()
    for one in (key.AutogradFunctionality, key.AutogradOther, key.AutogradNestedTensor):
        off = off.remove(one)
    off = off.remove(key.ADInplaceOrView)
    on = torch._C._dispatch_tls_local_include_set().add(key.ADInplaceOrView)
    with torch._C._ForceDispatchKeyGuard(on, off), torch.enable_grad():
        yield


def _save(ctx, inputs, output):
    q, k, v, mask, others, handle, *ctx.more = inputs
    ctx.save_for_backward(q, k, v, mask, handle, *others)


def _differentiate(ctx, grad_out):
    q, k, v, mask, handle, *others = ctx.saved_tensors
    asked = ctx.needs_input_grad
    wanted = [*asked[:3], *asked[4]]
    grads = _backward(grad_out, wanted, q, k, v, mask, others, handle, *ctx.more)
    grads = [grads.pop(0) if is_asked else None for is_asked in wanted]
    return *grads[:3], None, grads[3:], *[None] * (1 + len(ctx.more))


_attention.register_autograd(_differentiate, setup_context=_save)
