"""Makes a backend's forward and backward functions into torch.library ops with derivatives.

``torch.library.custom_op`` would do for the gradient, but it drops forward-mode tangents without a
word, and its first call imports torch.compile's compiler, which takes seconds. So each op is
defined with an autograd kernel of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.library import Library

from dittfast.plan import PlanTensors

from .tail import with_tail
from .tangent import tangents

# The op takes the plan's tensors as one list: the schema stays short and a field added to
# PlanTensors does not change it.
_NUM_TENSORS = PlanTensors._fields.index("metric")
# The plan's tensors that have derivatives: arguments of their own, called ``ends`` below.
_ENDS = ("out_scale", "out_residual", "tail_lse", "tail_value")
_PLAN = f"Tensor?[] tensors, {', '.join(f'Tensor? {x}' for x in _ENDS)}, int[] sizes, float scale"
_QKV = "Tensor q, Tensor k, Tensor v"
_GIVEN = 3 + len(_ENDS)
_TANGENTS = ", ".join([f"Tensor d{x}" for x in "qkv"] + [f"Tensor? d_{x}" for x in _ENDS])

# What PyTorch has registered, by name; ops exist as long as their Library does.
_LIBRARIES: dict[str, Library] = {}

_NO_VMAP = (
    "attend has no vmap rule: it is batched itself. Put the mapped dimension into the batch of q, "
    "k and v (x.flatten(0, 1)), or call it once per element"
)
_NO_SECOND = (
    "attend has no second derivative on the {} backend. Differentiate once, or detach what attend "
    "gave (gradients and tangents); backend='reference' has it, dense and so for small sizes"
)


def empty_outputs(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised ``(out, lse)``; ``out`` has q's memory order, so a strided view stays one."""
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty_like(q), torch.empty(q.shape[:-1], dtype=lse_dtype, device=q.device)


def define_backend(
    name: str,
    forward: Callable,
    backward: Callable | None,
    twice: bool = False,
    own_tail: bool = False,
) -> Callable:
    """Register ``dittfast::attend_{name}`` and its derivatives; return the function to call.

    The function works under torch.compile, autograd and torch.func.grad, and in forward mode
    (torch.func.jvp, torch.autograd.forward_ad), whose derivative :mod:`.tangent` computes for all
    backends. What it cannot do, it refuses: vmap, and derivatives of derivatives.

    Args:
        forward: ``(q, k, v, PlanTensors, scale) -> (out, lse)``.
        backward: ``(grad_out, grad_lse, q, k, v, out, lse, PlanTensors, scale) -> (dq, dk, dv,
            d out_scale or None, d out_residual or None)``; None where there is none.
        twice: whether ``backward`` is made of differentiable PyTorch functions of its inputs, so
            that it can be differentiated itself.
        own_tail: whether the two functions know a plan's tail, and ``backward`` gives its two
            gradients after the others. Otherwise :mod:`.tail` merges it around them.

    Returns:
        ``(q, k, v, PlanTensors, scale) -> (out, lse)``.
    """
    if name in _LIBRARIES:  # a notebook's cell, run again
        _LIBRARIES.pop(name)._destroy()
    library = _LIBRARIES[name] = Library("dittfast", "FRAGMENT")
    full = f"attend_{name}"
    backward = backward or _no_backward(name)
    if not own_tail:
        forward, backward = with_tail(forward, backward)
    run, run_backward = _run(forward), _run_backward(backward)
    op = _define(library, full, f"({_QKV}, {_PLAN}) -> (Tensor, Tensor)", run, _fake)
    backward_op = _define(
        library,
        f"{full}_backward",
        f"(Tensor grad_out, Tensor? grad_lse, {_QKV}, Tensor out, Tensor lse, {_PLAN}) -> Tensor[]",
        run_backward,
        _fake_backward,
    )
    tangent_op = _define(
        library,
        f"{full}_tangent",
        f"({_TANGENTS}, {_QKV}, Tensor lse, {_PLAN}) -> (Tensor, Tensor)",
        _run_tangent,
        _fake_tangent,
    )
    attend, last = _attend_function(op, backward_op, tangent_op), _last_function(name)

    def autograd(*inputs):
        return _apply(attend, *inputs)

    def autograd_backward(*inputs):
        # Traced for a graph, or run by backward(), it stays one op.
        if twice and (torch.is_grad_enabled() or in_forward_mode()):
            return run_backward(*inputs)
        return list(_apply(last, backward_op, *inputs))

    def autograd_tangent(*inputs):
        return _apply(last, tangent_op, *inputs)

    library.impl(full, autograd, "Autograd")
    library.impl(f"{full}_backward", autograd_backward, "Autograd")
    library.impl(f"{full}_tangent", autograd_tangent, "Autograd")

    def call(q, k, v, t: PlanTensors, scale: float):
        tensors, *ends = op_tensors(t)
        return op(q, k, v, tensors, *ends, list(t[_NUM_TENSORS:]), scale)

    return call


def _define(library: Library, full: str, schema: str, run: Callable, fake: Callable):
    """One op without derivatives: its schema, what it runs, and its shapes."""
    library.define(full + schema)
    library.impl(full, run, "CompositeExplicitAutograd")
    for key in ("FuncTorchBatched", "Batched"):  # torch.func.vmap, is_grads_batched
        library.impl(full, _refuse_vmap, key)
    torch.library.register_fake(f"dittfast::{full}", fake, lib=library)
    return getattr(torch.ops.dittfast, full).default


def op_tensors(t: PlanTensors) -> tuple:
    """The arguments of an op that are made of a plan's tensors: one list, and the ends."""
    ends = [getattr(t, name) for name in _ENDS]
    return list(t._replace(**dict.fromkeys(_ENDS))[:_NUM_TENSORS]), *ends


def _run(forward: Callable) -> Callable:
    def run(q, k, v, tensors, *more):
        if not q.numel():  # an empty batch: backends need not survive it
            return empty_outputs(q)
        t, scale = _plan_tensors(tensors, *more)
        with own_precision(q):
            out, lse = forward(q, k, v, t, scale)
        # A tensor on "meta" has strides and no memory.
        if out.stride() != torch.empty_like(q, device="meta").stride():
            out = torch.empty_like(q).copy_(out)
        return out, lse

    return run


def _fake(q, *_):
    return empty_outputs(q)


def _run_backward(backward: Callable) -> Callable:
    def run(grad_out, grad_lse, q, k, v, out, lse, tensors, *more):
        inputs = [x for x in (q, k, v, *_ends(more)) if x is not None]
        if not q.numel():
            return [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
        t, scale = _plan_tensors(tensors, *more)
        with own_precision(q):
            grads = backward(grad_out, grad_lse, q, k, v, out, lse, t, scale)
        grads = [g for g in grads if g is not None]
        return [_reduce(g, x).contiguous() for g, x in zip(grads, inputs)]

    return run


def _no_backward(name: str) -> Callable:
    def backward(*_):
        raise NotImplementedError(f"the {name} backend has no backward pass")

    return backward


def positive_scale(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """``(q, scale)`` of the same logits, for kernels that take their maximum before they scale."""
    return (-q, -scale) if scale < 0 else (q, scale)


def backward_of(name: str) -> Callable:
    """The backward pass of another backend, by its op, which whoever loads both has registered.

    Backends do not import each other. For :func:`define_backend`, where an engine has none.
    """

    def backward(grad_out, grad_lse, q, k, v, out, lse, t: PlanTensors, scale: float):
        op = getattr(torch.ops.dittfast, f"attend_{name}_backward").default
        given = *op_tensors(t), list(t[_NUM_TENSORS:]), scale
        return op(grad_out, grad_lse, q, k, v, out, lse, *given)

    return backward


def _fake_backward(grad_out, grad_lse, q, k, v, out, lse, tensors, *more):
    inputs = [x for x in (q, k, v, *_ends(more)) if x is not None]
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]


def _run_tangent(*inputs):
    given, (q, k, v, lse, tensors, *more) = inputs[:_GIVEN], inputs[_GIVEN:]
    if not q.numel():
        return empty_outputs(q)
    t, scale = _plan_tensors(tensors, *more)
    with own_precision(q):
        d_out, d_lse = tangents(given, q, k, v, lse, t, scale)
    return torch.empty_like(q).copy_(d_out), d_lse.to(lse.dtype)


def _fake_tangent(*inputs):
    return empty_outputs(inputs[_GIVEN])


def _attend_function(op, backward_op, tangent_op) -> type:
    """The autograd function of a backend's ``op``, whose derivatives are the other two ops."""

    class Attend(_SingleLevelFunction):
        @staticmethod
        def forward(*inputs):
            return _below_autograd(op, inputs)

        @staticmethod
        def setup_context(ctx, inputs, output):
            q, k, v, tensors, *ends, sizes, scale = inputs
            ctx.save_for_backward(q, k, v, *output, *ends, *tensors)
            ctx.save_for_forward(q, k, v, output[1], *ends, *tensors)
            ctx.sizes, ctx.scale = sizes, scale

        @staticmethod
        def backward(ctx, grad_out, grad_lse):
            q, k, v, out, lse, *saved = ctx.saved_tensors
            ends, tensors = saved[: len(_ENDS)], saved[len(_ENDS) :]
            inputs = q, k, v, out, lse, tensors, *ends, ctx.sizes, ctx.scale
            dq, dk, dv, *rest = backward_op(grad_out, grad_lse, *inputs)
            d_ends = [None if x is None else rest.pop(0) for x in ends]
            return dq, dk, dv, None, *d_ends, None, None

        @staticmethod
        def jvp(ctx, dq, dk, dv, _, *given):
            q, k, v, lse, *saved = ctx.saved_tensors
            ends, tensors = saved[: len(_ENDS)], saved[len(_ENDS) :]
            inputs = q, k, v, lse, tensors, *ends, ctx.sizes, ctx.scale
            return tangent_op(dq, dk, dv, *given[: len(_ENDS)], *inputs)

    return Attend


def _last_function(name: str) -> type:
    """The autograd function of a backend's derivatives, which have none themselves."""

    class Derivative(_SingleLevelFunction):
        @staticmethod
        def forward(derivative, *inputs):
            return tuple(_below_autograd(derivative, inputs))

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, *_):
            raise NotImplementedError(_NO_SECOND.format(name))

        jvp = backward

    return Derivative


def _apply(function, *inputs):
    """Run an autograd function at the level of torch.func that the dispatcher has come to."""
    functorch = torch._C._functorch
    before = functorch.get_single_level_autograd_function_allowed()
    functorch.set_single_level_autograd_function_allowed(True)
    try:
        return function.apply(*inputs)
    finally:
        functorch.set_single_level_autograd_function_allowed(before)


def _below_autograd(op, inputs):
    """Call ``op`` without this level's autograd; levels of torch.func below keep theirs."""
    with (
        torch.enable_grad(),
        forward_ad._set_fwd_grad_enabled(True),
        torch._C._AutoDispatchBelowADInplaceOrView(),
    ):
        return op(*inputs)


def in_forward_mode() -> bool:
    """Whether tensors may carry forward-mode tangents here (torch.func.jvp, forward_ad)."""
    return forward_ad._current_level >= 0


def _refuse_vmap(*_):
    raise NotImplementedError(_NO_VMAP)


def own_precision(x: torch.Tensor):
    """Inside, autocast is off: it would round what is computed in fp32, masks and scores too."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta has no autocast
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def _ends(more) -> tuple:
    """Of an op's arguments from the ends on, the ends."""
    return tuple(more[: len(_ENDS)])


def _plan_tensors(tensors, *more) -> tuple[PlanTensors, float]:
    *ends, sizes, scale = more
    return PlanTensors(*tensors, *sizes)._replace(**dict(zip(_ENDS, ends))), scale


def _reduce(grad: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Sum over batch and head dimensions that ``like`` broadcasts."""
    return grad.sum_to_size(like.shape).to(like.dtype)
