"""attend: one block-sparse attention, forward and backward, on every backend."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch.autograd import forward_ad

from .layout import Layout
from .methods.base import Call, Kept, Method
from .methods.head_groups import by_head
from .methods.memory import Memory
from .plan import Plan, to_be_kept

if TYPE_CHECKING:
    from .kernels.capabilities import Capabilities, Demand

logger = logging.getLogger(__name__)


# A backend has `attend` and `CAPABILITIES` (kernels/capabilities.py), a tuple or a function that
# returns one. It may have `machine_reasons(demand)`, why this machine lets it down, and
# `make_worklist`, if it prepares itself for a plan. Loaded on first use, by import statements
# because Dynamo traces those (and not importlib).
def _triton():
    from .kernels import triton_backend

    return triton_backend


def _native():
    from .kernels import native

    return native


def _cpu():
    from .kernels import cpu

    return cpu


def _reference():
    from .kernels import reference_backend

    return reference_backend


def _flex():
    from .kernels import flex

    return flex


def _cudnn():
    from .kernels import cudnn_backend

    return cudnn_backend


def _flash4():
    from .kernels import flash4_backend, triton_backend  # noqa: F401 (some of its gradients)

    return flash4_backend


def _flashinfer():
    from .kernels import flashinfer_backend, triton_backend  # noqa: F401 (its gradients)

    return flashinfer_backend


BACKENDS = {
    "triton": _triton,
    "native": _native,
    "cpu": _cpu,
    "flex": _flex,
    "flash4": _flash4,
    "cudnn": _cudnn,
    "flashinfer": _flashinfer,
    "reference": _reference,
}
# What "auto" tries on each type of device, the fastest first.
PREFERRED = {"cuda": ("triton", "flex"), "cpu": ("native", "cpu")}
_ELSEWHERE = ("cpu",)


def register_backend(
    name: str,
    forward: Callable,
    backward: Callable | None = None,
    *,
    capabilities: Capabilities | tuple[Capabilities, ...],
    machine_reasons: Callable[[Demand], list[str]] | None = None,
    make_worklist: Callable | None = None,
) -> None:
    """Make ``backend=name`` run your kernel, everywhere that a backend can be named.

    Args:
        name: an identifier that no backend of dittfast has. Your own is replaced.
        forward: ``(q, k, v, PlanTensors, scale) -> (out, lse)``; shapes as in :func:`attend`.
        backward: ``(grad_out, grad_lse, q, k, v, out, lse, PlanTensors, scale) -> (dq, dk, dv,
            d out_scale or None, d out_residual or None)``; None where there is none.
        capabilities: what it takes. What it lacks is refused before ``forward`` is called.
        machine_reasons: why it cannot run what is asked *here*: a package or a compiler is missing.
        make_worklist: ``(PlanTensors) -> int32 tensor``, called once per plan; ``forward`` finds it
            in ``PlanTensors.worklist``.

    Raises:
        ValueError: the name, or a promised backward pass that is not given.
    """
    from .kernels import op
    from .kernels.capabilities import Capabilities

    if name in _OURS or not name.isidentifier():
        raise ValueError(f"name must be an identifier and none of {', '.join(_OURS)}; got {name!r}")
    if isinstance(capabilities, Capabilities):
        capabilities = (capabilities,)
    if backward is None and any(one.backward for one in capabilities):
        raise ValueError(f"{name} promises a backward pass: give backward, or backward=False in it")
    given = {"machine_reasons": machine_reasons, "make_worklist": make_worklist}
    backend = SimpleNamespace(
        attend=op.define_backend(name, forward, backward),
        CAPABILITIES=tuple(capabilities),
        **{key: function for key, function in given.items() if function is not None},
    )
    BACKENDS[name] = lambda: backend


_OURS = ("auto", *BACKENDS)


def not_supported_reasons(name: str, q, k, v, plan: Plan, kv_log_weight=None) -> list[str]:
    """Why the backend cannot run this call of :func:`attend`; empty where it can."""
    from .kernels.capabilities import declares

    backend = BACKENDS[name]()
    if not declares(backend):
        return backend.not_supported_reasons(q, k, v)
    return list(_refusals(name, *_demand((name,), q, k, v, plan, kv_log_weight)))


def reasons_on(
    architecture: str, head_dim: int, dtype: torch.dtype, plan: Plan, kv_log_weight=None
) -> dict[str, str]:
    """For every backend of GPUs that cannot run a plan on an architecture, forward: why.

    Whatever this machine is and lacks.

    Args:
        architecture: such as "sm_90" and "gfx942".
    """
    from .kernels.capabilities import declares, demand, lacking

    q, k = (torch.empty(1, 1, n, head_dim, dtype=dtype, device="meta")
            for n in (plan.num_queries, plan.num_keys))  # fmt: skip
    asked = demand(q, k, k, plan, kv_log_weight, with_runs=True)
    asked = asked._replace(device=torch.device("cuda"))
    backends = {name: load() for name, load in BACKENDS.items()}
    found = {
        name: "; ".join(lacking(backend, asked, architecture))
        for name, backend in backends.items()
        if declares(backend)
    }
    return {name: reason for name, reason in found.items() if reason}


def _demand(names: tuple[str, ...], q, k, v, plan: Plan, kv_log_weight) -> Demand:
    """What a call asks of these backends."""
    from .kernels.capabilities import demand

    return demand(q, k, v, plan, kv_log_weight, with_runs=_some_take_no_runs(names))


def _some_take_no_runs(names: tuple[str, ...]) -> bool:
    from .kernels.capabilities import declares, variants_of

    backends = (BACKENDS[name]() for name in names)
    return any(not x.runs for one in backends if declares(one) for x in variants_of(one))


def _refusals(name: str, *asked) -> tuple[str, ...]:
    from .kernels.capabilities import Demand, declares, refusals

    backend = BACKENDS[name]()
    return tuple(refusals(backend, Demand(*asked))) if declares(backend) else ()


def _shares_heads(name: str, *asked) -> bool:
    """Whether k and v with fewer heads than q go to the backend without copies."""
    from .kernels.capabilities import Demand, declares, fitting

    backend = BACKENDS[name]()
    if not declares(backend):
        return getattr(backend, "GROUPED_HEADS", False)
    return fitting(backend, Demand(*asked)).grouped_heads


def choose_backend(device: torch.device, dtype: torch.dtype = torch.float32, *more: object) -> str:
    """The backend that ``backend="auto"`` runs for tensors of ``dtype`` on ``device``.

    Args:
        more: the other fields of a :class:`~dittfast.kernels.capabilities.Demand`, where they are
            known: head dim, block sizes, what the plan and the call need.
    """
    preferred = PREFERRED.get(device.type, _ELSEWHERE)
    able = (name for name in preferred if not _refusals(name, device, dtype, *more))
    # Where none can, the first one says why.
    return next(able, preferred[0])


# What torch.compiler.assume_constant_result does, without its import of all of torch._dynamo:
# Dynamo calls these instead of tracing them.
for _function in (_refusals, _shares_heads, _some_take_no_runs, choose_backend):
    _function._dynamo_marked_constant = True


def _refuse(name: str, reasons: list[str], q, k, v, plan: Plan, kv_log_weight) -> None:
    able = [
        repr(other)
        for other in BACKENDS
        if other != name and not not_supported_reasons(other, q, k, v, plan, kv_log_weight)
    ]
    remedy = f". What can: backend={' or '.join(able)}" if able else ""
    raise ValueError(f"the {name} backend cannot run this: " + "; ".join(reasons) + remedy)


def check_tensors(q, k, v) -> None:
    """Raise ValueError where q, k, v do not fit each other."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be [B, H, N, D], got shape {list(x.shape)}")
        if 0 in x.shape[1:]:
            raise ValueError(
                f"{name} needs at least one head, token and channel, got shape {list(x.shape)}"
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"q, k, v must agree in dtype and device: q is {q.dtype} on {q.device}, "
                f"{name} is {x.dtype} on {x.device}"
            )
    if not q.dtype.is_floating_point:
        raise ValueError(f"attention needs floating-point tensors, got {q.dtype}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {list(k.shape)} and {list(v.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q and k must agree in batch and head dim, got {list(q.shape)} and {list(k.shape)}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key heads")


def check_inputs(q, k, v, plan: Plan, kv_log_weight=None) -> None:
    """Raise ValueError where q, k, v do not fit each other or the plan."""
    check_tensors(q, k, v)
    if q.shape[2] != plan.num_queries or k.shape[2] != plan.num_keys:
        raise ValueError(
            f"the plan is for {plan.num_queries} queries and {plan.num_keys} keys, got "
            f"{q.shape[2]} and {k.shape[2]}; build a plan for this size"
        )
    per_list = {"kv_indices": plan.kv_indices, "out_scale": plan.out_scale}
    per_list |= {"out_residual": plan.out_residual, "plan.kv_log_weight": plan.kv_log_weight}
    per_list |= {"tail_lse": plan.tail_lse, "tail_value": plan.tail_value}
    per_list["kv_log_weight"] = kv_log_weight
    for name, x in per_list.items():
        if x is not None and any(n not in (1, size) for n, size in zip(x.shape[:2], q.shape[:2])):
            raise ValueError(
                f"{name} is for batch {x.shape[0]} and {x.shape[1]} heads, which does not "
                f"broadcast to batch {q.shape[0]} and {q.shape[1]} heads"
            )
    for name in ("out_residual", "tail_value"):
        x = per_list[name]
        if x is not None and x.shape[3] != q.shape[3]:
            raise ValueError(f"{name} has {x.shape[3]} channels, the head dim is {q.shape[3]}")
    if kv_log_weight is not None and kv_log_weight.shape[2:] != (plan.num_keys,):
        raise ValueError(
            f"kv_log_weight must be [B|1, H|1, {plan.num_keys}], got {list(kv_log_weight.shape)}"
        )
    for name in ("plan.kv_log_weight", "kv_log_weight"):
        x = per_list[name]
        if x is None:
            continue
        if (x.requires_grad and torch.is_grad_enabled()) or _has_tangent(x):
            raise ValueError(
                f"{name} carries a derivative, which attend does not pass on; give {name}.detach()"
            )


def _has_tangent(x: torch.Tensor) -> bool:
    """Whether ``x`` carries a forward-mode derivative (torch.func.jvp, forward_ad)."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(x).tangent is not None


@overload
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan,
    *,
    kv_log_weight: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> torch.Tensor: ...


@overload
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan,
    *,
    kv_log_weight: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]: ...


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan,
    *,
    kv_log_weight: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
):
    """Attention restricted to ``plan``: ``softmax(scale * q kᵀ + kv_log_weight) v``.

    Differentiable in q, k and v, and in the plan's ``out_scale``, ``out_residual``, ``tail_lse``
    and ``tail_value``, backwards and in forward mode (``torch.func.jvp``,
    ``torch.autograd.forward_ad``); works under ``torch.compile(fullgraph=True)``.

    Args:
        q: ``[B, H, Nq, D]``, any strides.
        k, v: ``[B, Hk, Nk, D]`` with H a multiple of Hk (grouped-query attention).
        plan: which key blocks each query block sees, for Nq queries and Nk keys.
        kv_log_weight: ``[B|1, H|1, Nk]`` fp32 added to the logits, on top of the plan's own; -inf
            hides a key. A query left without any key gets output 0 and lse -inf.
        scale: default ``1/sqrt(D)``.
        return_lse: also return the natural-log sum of exponentials of the logits.
        backend: "auto" picks by device, and PyTorch's own attention where the plan leaves nothing
            out. A backend named here runs or raises; nothing falls back.

    Returns:
        ``out [B, H, Nq, D]`` in q's dtype, or ``(out, lse [B, H, Nq] fp32)``.

    Raises:
        ValueError: an unknown backend, shapes that do not fit each other or the plan, a log weight
            with a derivative of its own, or a named backend that cannot run these inputs (all
            reasons are listed).
        NotImplementedError: under ``torch.vmap``, and when a derivative is differentiated again;
            the reference backend allows ``backward`` of ``backward``.
    """
    check_inputs(q, k, v, plan, kv_log_weight)
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be auto, {', '.join(BACKENDS)}; got {backend!r}")
    names = PREFERRED.get(q.device.type, _ELSEWHERE) if backend == "auto" else (backend,)
    asked = _demand(names, q, k, v, plan, kv_log_weight)
    name = choose_backend(*asked) if backend == "auto" else backend
    reasons = not_supported_reasons(name, q, k, v, plan, kv_log_weight)
    if reasons:
        _refuse(name, reasons, q, k, v, plan, kv_log_weight)
    implementation = BACKENDS[name]()
    groups = q.shape[1] // k.shape[1]
    is_plain = kv_log_weight is None and not return_lse and not any(map(_has_tangent, (q, k, v)))
    dense = backend == "auto" and plan.is_dense and is_plain
    if groups > 1 and (dense or not _shares_heads(name, *asked)):
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if dense:
        # Not F.scaled_dot_product_attention, which the adapter watches and brings here.
        return torch.ops.aten.scaled_dot_product_attention(q, k, v, scale=scale)
    plan = plan.to(q.device)
    if kv_log_weight is not None:  # what the plan adds to it is not rounded below q
        kv_log_weight = kv_log_weight.to(torch.promote_types(q.dtype, torch.float32))
    if not torch.compiler.is_compiling():
        needs_grad = q.requires_grad or k.requires_grad or v.requires_grad
        with to_be_kept():
            if hasattr(implementation, "make_worklist"):
                plan.worklist(name, implementation.make_worklist)
            elif needs_grad and torch.is_grad_enabled():
                plan.transpose()
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    t = plan.tensors(kv_log_weight, name)
    wants_lse = return_lse or forward_ad._current_level >= 0
    if not wants_lse and not {"backward", "tail"}.intersection(asked.needs):
        t = t._replace(wants_lse=0)
    out, lse = implementation.attend(q, k, v, t, scale)
    return (out, lse) if return_lse else out


class MethodCall(NamedTuple):
    """What :func:`attend` gets where a method runs: see :func:`method_call`."""

    plan: Plan
    k: torch.Tensor
    v: torch.Tensor
    kv_log_weight: torch.Tensor | None
    scale: float


def check_layout(layout: Layout, q: torch.Tensor, k: torch.Tensor) -> None:
    """Raise ValueError where q and k are not over the layout's tokens."""
    if q.shape[-2] != layout.num_tokens or k.shape[-2] != layout.num_tokens:
        raise ValueError(
            f"the layout describes {layout.num_tokens} tokens, got q with {q.shape[-2]} and k with "
            f"{k.shape[-2]}; check its text length and grid (q, k, v are [B, H, N, D])"
        )


def method_scale(
    method: Method, layout: Layout, head_dim: int, scale: float | None = None
) -> float:
    """The scale of a method's logits where the model asks for ``scale``; None: ``1/sqrt(D)``."""
    usual, own = head_dim**-0.5, method.scale(layout, head_dim)
    scale = usual if scale is None else scale
    # What a model asks for stays, times the factor by which the method departs from 1/sqrt(D).
    return scale if own is None else scale * (own / usual)


def method_call(
    method: Method,
    layout: Layout,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    plan: Plan | None = None,
    kv_log_weight: torch.Tensor | None = None,
    scale: float | None = None,
    memory: Memory | None = None,
    **parameters: torch.Tensor,
) -> MethodCall:
    """A method applied to q, k and v over ``layout``: everything but the attention itself.

    Args:
        q, k, v: ``[B, H, N, D]`` with N the tokens of the layout.
        plan: what :meth:`Method.keep` gave of the layout; made here if None.
        kv_log_weight: ``[B|1, H|1, N]`` fp32 for the sequence's own keys; -inf hides a key.
        scale: default ``1/sqrt(D)``. A method that departs from that (proportional attention)
            departs from any scale by the same factor.
        memory: where a plan from q and k may be kept for the next steps; not while torch.compile
            traces.
        parameters: the method's trainable parameters; missing ones take their initial values.

    Returns:
        The plan; k and v ``[B, H, N + extra, D]`` with the method's summary tokens; the log weights
        of those keys; and the scale.

    Raises:
        ValueError: N is not the layout's length.
    """
    check_layout(layout, q, k)
    scale = method_scale(method, layout, q.shape[-1], scale)
    from .kernels.op import own_precision

    with own_precision(q):  # the scores that choose blocks are fp32
        if plan is None:
            plan = method.keep(layout, q.device)
        if plan is None:
            given = {"scale": scale, "kv_log_weight": kv_log_weight}
            make = partial(method.plan, layout, q, k, v, **given)
            keeps = memory is not None and not torch.compiler.is_compiling()
            plan = memory.plan(method, layout, q, k, make) if keeps else make()
        k, v = method.extend(layout, k, v, **parameters)
    extra = k.shape[-2] - layout.num_tokens
    if kv_log_weight is not None and extra:
        kv_log_weight = torch.nn.functional.pad(kv_log_weight, (0, extra))
    return MethodCall(plan, k, v, kv_log_weight, scale)


def method_attention(
    method: Method,
    layout: Layout,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    kept: Plan | Kept | None = None,
    kv_log_weight: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    on_plan: Callable[[Plan], None] | None = None,
    memory: Memory | None = None,
    hidden_states: torch.Tensor | None = None,
    report: Callable[[str, torch.Tensor], None] | None = None,
    **parameters: torch.Tensor,
):
    """Self-attention over ``layout`` by ``method``, whether it plans or computes its own output.

    Args:
        q, k, v: ``[B, H, N, D]`` with N the tokens of the layout.
        kept: what ``method.keep(layout, device)`` gave; made here if None.
        kv_log_weight, scale, memory, parameters: as in :func:`method_call`.
        on_plan: called with a plan that is made from q and k; not while torch.compile traces.
        hidden_states: ``[B, N, C]``, what q, k and v were projected from, for a method that
            ``needs_hidden_states``; others do not look at it.
        report: called with name and value of each of ``method.losses``.

    Returns and raises: as :func:`attend` and :func:`method_call`; ValueError also where the lse of
    a method is asked for that is no softmax, and for hidden states that are needed and missing, or
    of other batch rows or tokens.
    """
    method = by_head(method, q.shape[1])
    if method.computes:
        if return_lse:
            raise ValueError(f"{method.name} computes its own output, which has no lse")
        given = {"kv_log_weight": kv_log_weight, "scale": scale, "backend": backend}
        given |= {"on_plan": on_plan, "memory": memory, "hidden_states": hidden_states}
        given["report"] = report
        call = computing_call(method, layout, q, k, v, kept, **given)
        from .kernels.op import own_precision

        with own_precision(q):
            return method.attention(layout, q, k, v, call, **parameters)
    if return_lse and method.adds:
        raise ValueError(f"{method.name} adds to the output of its softmax, and the sum has no lse")
    given = {"plan": kept, "kv_log_weight": kv_log_weight, "scale": scale, "memory": memory}
    plan, far_k, far_v, weight, scale = method_call(method, layout, q, k, v, **given, **parameters)
    if on_plan is not None and not method.static and not torch.compiler.is_compiling():
        with to_be_kept():
            on_plan(plan)
    given = {"scale": scale, "return_lse": return_lse, "backend": backend}
    out = attend(q, far_k, far_v, plan, kv_log_weight=weight, **given)
    if not method.adds:
        return out
    from .kernels.op import own_precision

    padding = plan.kv_log_weight
    if padding is not None:
        kv_log_weight = padding if kv_log_weight is None else padding + kv_log_weight
    with own_precision(q):
        more = method.added(layout, q, k, v, plan, kv_log_weight, **parameters)
    return out if more is None else out + more


def computing_call(
    method: Method,
    layout: Layout,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kept: Kept | None = None,
    kv_log_weight: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    on_plan: Callable[[Plan], None] | None = None,
    memory: Memory | None = None,
    hidden_states: torch.Tensor | None = None,
    report: Callable[[str, torch.Tensor], None] | None = None,
) -> Call:
    """What a method that computes its own output is called with; arguments as above.

    Raises:
        ValueError: q, k and v fit neither each other nor the layout, or hidden states that are
            needed are missing or do not fit them.
    """
    check_tensors(q, k, v)
    check_layout(layout, q, k)
    if not method.needs_hidden_states:
        hidden_states = None
    else:
        _check_hidden_states(method, hidden_states, q)
    if kept is None:
        kept = method.keep(layout, q.device)
    weight = kept.padding
    if weight is not None and weight.shape[0] not in (1, q.shape[0]):
        raise ValueError(
            f"the layout has context lengths for {weight.shape[0]} batch rows, q has {q.shape[0]}"
        )
    if kv_log_weight is not None:
        weight = kv_log_weight if weight is None else weight + kv_log_weight

    def inner(method, layout, q, k, v, kept=None, heads=None, **parameters):
        own = weight
        if heads is not None and own is not None and own.shape[1] > 1:
            own = own[:, heads]
        given = {"kv_log_weight": own, "scale": scale, "backend": backend, "memory": memory}
        given["on_plan"] = on_plan if on_plan is None else partial(on_plan, heads=q.shape[1])
        given |= {"hidden_states": hidden_states, "report": report}
        return method_attention(method, layout, q, k, v, kept=kept, **given, **parameters)

    def planned(method, layout, q, k, v, kept=None, **parameters):
        given = {"kv_log_weight": weight, "scale": scale, "memory": memory}
        return method_call(method, layout, q, k, v, plan=kept, **given, **parameters)

    def observe(plan):
        if on_plan is not None and not torch.compiler.is_compiling():
            with to_be_kept():
                on_plan(plan)

    run, losses = partial(attend, backend=backend), report if method.losses else None
    return Call(
        scale, weight, kept.geometry, run, inner, planned, observe, losses, memory, hidden_states
    )


def _check_hidden_states(method: Method, hidden_states: torch.Tensor | None, q) -> None:
    if hidden_states is None:
        raise ValueError(
            f"{method.name} needs the layer's hidden states; give hidden_states [B, N, C], what q, "
            "k and v were projected from"
        )
    shape = list(hidden_states.shape)
    if len(shape) != 3 or shape[:2] != [q.shape[0], q.shape[2]]:
        raise ValueError(
            f"hidden_states must be [B, N, C] = [{q.shape[0]}, {q.shape[2]}, channels] like q, got "
            f"{shape}"
        )
