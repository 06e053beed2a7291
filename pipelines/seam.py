"""Where dittfast enters a model: scaled_dot_product_attention inside attention *modules*.

Each selected attention module gets a subclass of its own class whose ``__call__`` watches for
``scaled_dot_product_attention``. The model's processor keeps its projections, norms, RoPE and
output; only the attention call inside is replaced. Undoing it restores the class, so a disabled
model is the model it was.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import functools

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from dittfast.attention import method_attention
from dittfast.layout import Context, Layout
from dittfast.methods.base import Method
from dittfast.methods.head_guidance import soft_pag
from dittfast.methods.local import Local
from dittfast.plan import Plan

_SDPA = F.scaled_dot_product_attention
_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class Part:
    """One layout and its plan, None for methods that make it from q and k at every call.

    Of those the density is averaged over the calls so far.
    """

    def __init__(self, layout: Layout, plan: Plan | None):
        self.layout = layout
        self.plan = plan
        self.num_tokens = layout.num_tokens
        self.calls = 0
        self._heads: dict[tuple[int, int], Part] = {}
        self._density: torch.Tensor | float = 0.0

    def observe(self, plan: Plan) -> None:
        """Count the density of a plan that was made from q and k."""
        self._density = self._density + plan.listed_density().detach()
        self.calls += 1

    @property
    def density(self) -> float | None:
        """Kept fraction of token pairs: the plan's, or the mean over calls; None before any."""
        if self.plan is not None:
            return self.plan.density
        return float(self._density) / self.calls if self.calls else None

    def of_heads(self, heads: slice) -> Part:
        """The part with the plan of some heads; kept, as a plan keeps what backends prepare."""
        plan = None if self.plan is None else self.plan.select_heads(heads)
        if plan is self.plan:
            return self
        if torch.compiler.is_compiling():
            return Part(self.layout, plan)
        key = heads.start, heads.stop
        return self._heads.setdefault(key, Part(self.layout, plan))


class Core:
    """What replaces dense attention in one forward pass; shared by the layers that run it.

    Args:
        parts: for each length of sequence one Part for the whole batch, or one per batch row; the
            main sequence first.
        strict: whether a layer that never attends over one of these sequences is an error.
        outer_mask: whether an N x N mask is known to be m mᵀ, with all grid tokens valid.
    """

    def __init__(
        self,
        method: Method,
        parts: tuple[tuple[Part, ...], ...],
        backend: str,
        strict: bool = True,
        outer_mask: bool = False,
    ):
        self.method = method
        self.parts = parts
        self.backend = backend
        self.strict = strict
        self.outer_mask = outer_mask

    @property
    def main(self) -> Part:
        return self.parts[0][0]

    @property
    def num_tokens(self) -> int:
        return self.main.num_tokens

    @property
    def lead(self) -> int:
        """Tokens before the grid."""
        return self.main.layout.grid_start

    def at(self, num_tokens) -> tuple[Part, ...] | None:
        """The parts for a sequence of this length; None where no layout has it."""
        for rows in self.parts:
            if num_tokens == rows[0].num_tokens:
                return rows
        return None


class Perturbation:
    """SoftPAG in one layout: heads lean towards a map in which every token sees itself alone.

    ``rows`` says where: "image" (the grids' tokens), "joint" (all tokens), or "diagonal" (image
    tokens see themselves and the text; text tokens are left alone).
    """

    def __init__(self, rows: str, layout: Layout):
        self.rows = rows
        self.layout = layout
        self.strict = True
        self.outer_mask = False
        self.num_tokens = layout.num_tokens
        self.weak = Local(window=1) if rows == "diagonal" else None
        self.plan = self.weak.plan(layout) if self.weak else None

    @property
    def lead(self) -> int:
        """Tokens before the grid."""
        return self.layout.grid_start

    def at(self, num_tokens) -> bool:
        """Whether a sequence of this length is the weakened one."""
        return num_tokens == self.num_tokens

    def __call__(self, out: torch.Tensor, strength: torch.Tensor, call: dict) -> torch.Tensor:
        q, k, v = call["query"], call["key"], call["value"]
        if self.weak is not None:
            weak = method_attention(
                self.weak,
                self.layout,
                q,
                k,
                v,
                plan=self.plan,
                kv_log_weight=key_log_weight(call.get("attn_mask"), q),
                scale=call.get("scale"),
            )
            return soft_pag(out, weak, strength, rows=self.layout)
        if v.shape[1] != out.shape[1]:
            v = v.repeat_interleave(out.shape[1] // v.shape[1], 1)
        return soft_pag(out, v, strength, rows=self.layout if self.rows == "image" else None)


class LayerState:
    """State of one attention layer.

    The same Python shape in every layer, with what varies in tensors: anything else would make
    ``torch.compile`` build one graph per block.

    Attributes:
        core: what runs instead of dense attention; None while this layer is dense.
        perturbation: what weakens heads in the extra pass of head guidance; None outside it.
        strength: ``[H]``, how far each head is weakened; None where no head is.
        parameters: the method's trainable parameters of this layer.
        ran: whether the last call did its projections; caches skip them.
        reached: whether the last call met scaled_dot_product_attention on the whole sequence.
    """

    def __init__(self, parameters: dict[str, torch.Tensor] | None = None):
        self.core: Core | None = None
        self.perturbation: Perturbation | None = None
        self.strength: torch.Tensor | None = None
        self.parameters = parameters or {}
        self.ran = False
        self.reached = False

    @property
    def running(self) -> Core | Perturbation | None:
        """What this layer does differently from the stock model now; None for nothing."""
        return self.core or self.perturbation


class intercept(TorchFunctionMode):
    """Inside, ``state.core`` answers scaled_dot_product_attention over its layout's tokens."""

    def __init__(self, state: LayerState):
        super().__init__()
        self.state = state
        self.outer_mask = state.running.outer_mask
        state.ran = state.reached = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is _SDPA:
            call = {**dict(zip(_SDPA_ARGUMENTS, args)), **kwargs}
            running, missing = self.state.running, call["key"].shape[-2] - call["query"].shape[-2]
            if (missing == 0 or missing == running.lead) and running.at(call["key"].shape[-2]):
                if missing == 0:
                    return self._answer(func, args, kwargs, call)
                # Text that is seen and does not look (PRX): rows of zeros ask for it, in vain.
                call["query"] = F.pad(call["query"], (0, 0, missing, 0))
                return self._answer(func, (), call, call)[..., missing:, :]
        elif func is F.linear:
            if not torch.compiler.is_compiling():
                self.state.ran = True
        elif self.outer_mask and func in _OUTER:
            return _without_outer_product(func, args, kwargs)
        return func(*args, **kwargs)

    def _answer(self, func, args, kwargs, call):
        state = self.state
        if not torch.compiler.is_compiling():
            state.reached = True
        out = func(*args, **kwargs) if state.core is None else attend_call(state, call)
        if state.perturbation is not None:
            out = state.perturbation(out, state.strength, call)
        return out


_OUTER = (torch.Tensor.repeat, torch.Tensor.__and__)


def _without_outer_product(func, args, kwargs):
    """HunyuanVideo 1.5 builds m mᵀ in every layer: 10 GB at 100,000 tokens. Keep m, expanded.

    Its rows are only read back by :func:`key_log_weight`, for grid tokens, where both agree.
    """
    mask = args[0]
    if mask.dtype == torch.bool and mask.ndim == 4:
        if func is torch.Tensor.repeat and args[1:] == (1, 1, mask.shape[-1], 1):
            return mask.expand(-1, -1, mask.shape[-1], -1)
        if func is torch.Tensor.__and__ and mask.stride(-2) == 0:
            return mask
    return func(*args, **kwargs)


def attend_call(state: LayerState, call: dict, heads: slice | None = None) -> torch.Tensor:
    """Answer a call of scaled_dot_product_attention by ``state.core``.

    Args:
        call: its arguments by name.
        heads: which of the layer's heads q, k and v hold, where ranks share them.
    """
    core = state.core
    if call.get("is_causal"):
        raise ValueError(
            f"{core.method.name} cannot run a causal attention layer; keep it dense with "
            "dense_layers"
        )
    if call.get("dropout_p"):
        raise ValueError(
            f"{core.method.name} has no attention dropout, got dropout_p={call['dropout_p']}; "
            "set the model's attention dropout to 0"
        )
    q, k, v, mask = (call.get(name) for name in ("query", "key", "value", "attn_mask"))
    if torch.is_autocast_enabled(q.device.type):
        # As autocast does for the stock call.
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) for x in (q, k, v))
    rows = core.at(q.shape[-2])
    if heads is not None:
        rows = tuple(part.of_heads(heads) for part in rows)
    token = rows[0].layout.grid_start if core.outer_mask else None
    weight = key_log_weight(mask, q, token)
    scale = call.get("scale")
    if len(rows) == 1:
        out = _attend_part(state, rows[0], q, k, v, weight, scale)
    else:
        if len(rows) != q.shape[0]:
            raise ValueError(
                f"this pass describes {len(rows)} batch rows that differ, and attention got "
                f"{q.shape[0]}; run the prompts one at a time"
            )
        pick = lambda x, b: x if x is None or x.shape[0] == 1 else x[b : b + 1]  # noqa: E731
        out = torch.cat(
            [
                _attend_part(state, part, *(pick(x, b) for x in (q, k, v, weight)), scale)
                for b, part in enumerate(rows)
            ]
        )
    if core.outer_mask and mask is not None and mask.dtype != torch.bool:
        out = _restore_context(out, call, rows[0].layout)
    return out


def _attend_part(state, part: Part, q, k, v, weight, scale) -> torch.Tensor:
    return method_attention(
        state.core.method,
        part.layout,
        q,
        k,
        v,
        plan=part.plan,
        kv_log_weight=weight,
        scale=scale,
        backend=state.core.backend,
        on_plan=part.observe,
        **state.parameters,
    )


def _restore_context(out: torch.Tensor, call: dict, layout: Layout) -> torch.Tensor:
    """Context rows as the model has them: an added m mᵀ is another bias for padding's queries."""
    q, k, v, mask = (call[name] for name in ("query", "key", "value", "attn_mask"))
    out = out.clone()
    for start, segment in layout.spans():
        if isinstance(segment, Context):
            rows = slice(start, start + segment.length)
            out[:, :, rows] = _SDPA(
                q[:, :, rows], k, v, attn_mask=mask[:, :, rows], scale=call.get("scale")
            )
    return out


def key_log_weight(
    mask: torch.Tensor | None, q: torch.Tensor, token: int | None = None
) -> torch.Tensor | None:
    """An attention mask over keys ``[B|1, (H|1), 1, N]`` as log weights ``[B|1, H|1, N]``.

    Args:
        token: of an N x N mask, the query whose row is that of all grid tokens; None if there is
            no such query.

    Raises:
        ValueError: the mask differs between queries, which a block plan would drop.
    """
    if mask is None:
        return None
    shape = tuple(mask.shape)
    if mask.ndim == 3:
        mask = mask[:, None]
    elif mask.ndim == 2:
        mask = mask[None, None]
    if mask.shape[-2] != 1 and token is None:
        raise ValueError(
            f"this layer passes an attention mask of shape {list(shape)} that may differ between "
            "queries; only masks over keys can be combined with a plan. Keep the layer dense "
            "with dense_layers"
        )
    mask = mask[:, :, 0 if mask.shape[-2] == 1 else token]
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)
    return mask.float()


def _call(self, *args, **kwargs):
    state = self._dittfast
    if state.running is None:
        return torch.nn.Module.__call__(self, *args, **kwargs)
    # Module.__call__ by name, not super(): Dynamo refuses the latter on classes that diffusers
    # allows in the graph.
    with _backend(self, state), intercept(state):
        out = torch.nn.Module.__call__(self, *args, **kwargs)
    check_reached(state, self)
    return out


@contextlib.contextmanager
def _set_backend(processor, backend):
    before = processor._attention_backend
    processor._attention_backend = backend
    try:
        yield
    finally:
        processor._attention_backend = before


def native_backend():
    """The one of diffusers' attention backends that calls scaled_dot_product_attention."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    return AttentionBackendName.NATIVE


def _backend(module: torch.nn.Module, state: LayerState):
    """The attention backend of diffusers that the layer needs now."""
    processor = module.processor
    if getattr(processor, "_parallel_config", None) is not None:
        from . import parallel

        if parallel.ulysses(module) is not None:
            return parallel.running(module, state)
    if state.perturbation is None or not hasattr(processor, "_attention_backend"):
        return contextlib.nullcontext()
    # In a perturbed pass the layer runs the native backend, the one that can be watched.
    return _set_backend(processor, native_backend())


def check_reached(state: LayerState, module: torch.nn.Module) -> None:
    """Raise if the call of ``module`` that just ended attended somewhere we did not see."""
    if torch.compiler.is_compiling() or state.reached or not state.ran:
        return
    if not state.running.strict:
        return
    raise RuntimeError(
        f"{type(module).__name__} computed attention without scaled_dot_product_attention over "
        f"the {state.running.num_tokens} tokens of its layout, so dittfast had no effect. An "
        "attention backend that bypasses it may be set: call "
        "transformer.reset_attention_backend(). If the sequence has another length, pass layout="
    )


def _deepcopy(self, memo):
    twin = type(self).__new__(type(self))
    memo[id(self)] = twin
    twin.__dict__ = copy.deepcopy(self.__dict__, memo)
    return twin


def _reduce(self, protocol):
    """Pickle as the stock class: what loads the file need not have dittfast."""
    state = {k: v for k, v in self.__dict__.items() if k != "_dittfast"}
    return copyreg._reconstructor, (stock_class(type(self)), object, None), state


@functools.cache
def _subclass(cls: type, methods: tuple) -> type:
    fields = {
        **dict(methods),
        "__deepcopy__": _deepcopy,
        "__reduce_ex__": _reduce,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "_dittfast_stock": cls,
    }
    return type(cls.__name__, (cls,), fields)


def stock_class(cls: type) -> type:
    """The class a swapped class was made from; the class itself where it was not swapped."""
    return getattr(cls, "_dittfast_stock", cls)


def is_swapped(module: torch.nn.Module) -> bool:
    return hasattr(type(module), "_dittfast_stock")


def swap(module: torch.nn.Module, state, **methods) -> None:
    """Put ``state`` on ``module`` and override ``methods``; :func:`restore` undoes it.

    Without ``methods`` the module becomes a watched attention layer.
    """
    module._dittfast = state
    methods = methods or {"__call__": _call}
    module.__class__ = _subclass(type(module), tuple(methods.items()))


def restore(module: torch.nn.Module) -> None:
    """Undo :func:`swap`."""
    module.__class__ = stock_class(type(module))
    del module._dittfast
