"""What one attention layer runs in one pass, and how it answers a call of attention."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from dittfast.attention import method_attention
from dittfast.layout import Context, Layout
from dittfast.methods.amount import Amount
from dittfast.methods.base import Kept, Method
from dittfast.methods.memory import Memory
from dittfast.plan import Plan

# Not F.scaled_dot_product_attention, which is watched.
_SDPA = torch.ops.aten.scaled_dot_product_attention


class PlannedLayout:
    """One layout and what its method keeps of it (:meth:`Method.keep`): mostly its plan.

    Of methods that plan from q and k at every call the amount is averaged over the calls so far.
    """

    def __init__(self, method: Method, layout: Layout, kept: Plan | Kept | None):
        self.method = method
        self.layout = layout
        self.kept = kept
        self.num_tokens = layout.num_tokens
        self.calls = 0
        self._prepared: dict[tuple, Any] = {}
        self._sums: torch.Tensor | float = 0.0
        self._counting = threading.Lock()

    def observe(self, plan: Plan, heads: int = 1) -> None:
        """Count density and work of a plan that was made from q and k, for so many heads."""
        density = plan.listed_density()
        plain = plan.num_keys == plan.num_real_keys and plan.tail_lse is None
        work = density if plain else plan.listed_work()
        with self._counting:
            self._sums = self._sums + heads * torch.stack([density, work]).detach()
            self.calls += heads

    def amount(self, heads: int | None, head_dim: int | None) -> Amount:
        """Density and work, of the plan or the mean over calls, in a layer with such heads."""
        observed = None
        if self.calls:
            observed = Amount(*(self._sums / self.calls).tolist())
        return self.method.amount(self.layout, heads, head_dim, self.kept, observed)

    def of_heads(self, heads: slice) -> PlannedLayout:
        """The same for some heads; kept, as a plan keeps what backends prepare."""
        if not isinstance(self.kept, Plan):
            return self
        plan = self.kept.select_heads(heads)
        if plan is self.kept:
            return self
        if torch.compiler.is_compiling():  # which traces no lock that is made
            part = object.__new__(PlannedLayout)
            part.__dict__.update(self.__dict__ | {"kept": plan})
            return part
        key = "heads", heads.start, heads.stop
        return self.prepared(key, lambda: PlannedLayout(self.method, self.layout, plan))

    def prepared(self, key: tuple, make: Callable[[], Any]) -> Any:
        """What ``make`` gave for this key when it was first asked for."""
        if key not in self._prepared:
            self._prepared.setdefault(key, make())
        return self._prepared[key]

    def __deepcopy__(self, memo):
        return PlannedLayout(self.method, self.layout, copy.deepcopy(self.kept, memo))


class Watched(Protocol):
    """What makes a layer differ from the stock model: an :class:`AttentionCore` or a Transform."""

    @property
    def strict(self) -> bool:
        """Whether a layer that never attends over one of these sequences is an error."""

    @property
    def shortcut(self) -> Callable[[Callable, tuple, dict], torch.Tensor | None] | None:
        """What answers some other calls of PyTorch, as in :class:`Family`; None where nothing."""

    @property
    def hidden_states(self) -> tuple[str, str] | None:
        """As in :class:`Family`, where a call is to bring the hidden states; None where not."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the main sequence."""

    @property
    def text_before(self) -> int:
        """Tokens before its grid."""

    @property
    def text_behind(self) -> int:
        """Context tokens behind its last grid."""

    def covers(self, num_tokens: int) -> bool:
        """Whether a call of attention over this many tokens is meant."""


class Transform(Watched, Protocol):
    """Sees a call of attention, and gives the layer's output in the place of ``out``."""

    def __call__(
        self, out: torch.Tensor, strength: torch.Tensor | None, call: dict
    ) -> torch.Tensor:
        """``out [B, H, N, D]``; ``strength [H]``; the call's arguments by name.

        Among them are the layer's ``hidden_states [B, N, C]``, if it asks for them.
        """


class AttentionCore:
    """What replaces dense attention in one forward pass; shared by the layers that run it.

    Args:
        planned: for each length of sequence one entry for the whole batch, or one per batch row;
            the main sequence first.
        strict, shortcut: as in :class:`Watched`.
        outer_mask: whether an N x N mask is known to be m mᵀ, with all grid tokens valid.
        hidden_states: as in :class:`Family`; looked at where the method needs them.
    """

    def __init__(
        self,
        method: Method,
        planned: tuple[tuple[PlannedLayout, ...], ...],
        backend: str,
        strict: bool = True,
        outer_mask: bool = False,
        shortcut: Callable[[Callable, tuple, dict], torch.Tensor | None] | None = None,
        hidden_states: tuple[str, str] | None = ("hidden_states", "encoder_hidden_states"),
    ):
        self.method = method
        self.hidden_states = hidden_states if method.needs_hidden_states else None
        self.planned = planned
        self.backend = backend
        self.strict = strict
        self.outer_mask = outer_mask
        self.shortcut = shortcut
        # Numbers, because Dynamo does not look into a layout's properties.
        main = planned[0][0].layout
        self.num_tokens = main.num_tokens
        self.text_before, self.text_behind = main.grid_start, main.text_behind

    def rows_of(self, num_tokens) -> tuple[PlannedLayout, ...] | None:
        """The plans for a sequence of this length; None where no layout has it."""
        for rows in self.planned:
            if num_tokens == rows[0].num_tokens:
                return rows
        return None

    def covers(self, num_tokens) -> bool:
        return self.rows_of(num_tokens) is not None


class LayerRun:
    """What one layer runs in one pass; never changed once it is made.

    The same Python shape in every layer, with what varies in tensors: anything else would make
    ``torch.compile`` build one graph per block.

    Attributes:
        core: what runs instead of dense attention; None where the layer is dense.
        parameters: the trainable parameters of the layer that its method has.
        memory: what the layer keeps from step to step of the run; None where it keeps nothing.
        report: who is told the method's losses, as :attr:`Call.report`; not while torch.compile
            traces.
        transform: what changes the output of attention; None where nothing does.
        strength: ``[H]``, how far each head is weakened; None where no head is.
    """

    def __init__(
        self,
        core: AttentionCore | None = None,
        transform: Transform | None = None,
        strength: torch.Tensor | None = None,
        parameters: dict[str, torch.Tensor] | None = None,
        memory: Memory | None = None,
        report: Callable[[str, torch.Tensor], None] | None = None,
    ):
        self.core = core
        self.report = report
        self.memory = memory
        self.parameters = parameters or {}
        self.transform = transform
        self.strength = strength

    def changed(self, transform: Transform, strength: torch.Tensor | None = None) -> LayerRun:
        """The same with another transform."""
        return LayerRun(self.core, transform, strength, self.parameters, self.memory, self.report)

    def with_parameters(self, parameters: dict[str, torch.Tensor]) -> LayerRun:
        """The same with these in the place of its parameters, and with nobody told of losses.

        Inside an op losses have no gradient; who wants them says that there are none.
        """
        return LayerRun(self.core, self.transform, self.strength, parameters, self.memory)

    def weakened(self) -> LayerRun:
        """The same in the pass in which guidance weakens heads, which keeps plans of its own."""
        if self.memory is None:
            return self
        memory = self.memory.weakened()
        own = self.core, self.transform, self.strength, self.parameters
        return LayerRun(*own, memory, self.report)

    @property
    def watched(self) -> Watched | None:
        """What the layer does differently from the stock model; None for nothing."""
        return self.core if self.core is not None else self.transform


def answer(run: LayerRun, call: dict, stock: Callable[..., torch.Tensor]) -> torch.Tensor | None:
    """What a layer gives for a call of scaled_dot_product_attention.

    Args:
        call: its arguments by name, and the layer's ``streams`` where it asks for hidden states.
        stock: PyTorch's attention, for a layer that keeps it and weakens heads after it.

    Returns:
        ``[B, H, Nq, D]``; None where another attention is meant than that over the layout's tokens.

    Raises:
        ValueError: as :func:`attend_call`.
    """
    watched = run.watched
    streams = call.get("streams")
    call = {name: x for name, x in call.items() if name != "streams"}
    asking, tokens = call["query"].shape[-2], call["key"].shape[-2]
    silent = _silent_context(watched, tokens - asking)
    if silent is None or not watched.covers(tokens):
        return None
    if silent != (0, 0):
        # Text that is seen and does not look: rows of zeros ask for it, in vain.
        call["query"] = F.pad(call["query"], (0, 0, *silent))
        if call.get("attn_mask") is not None:
            call["attn_mask"] = _with_rows(call["attn_mask"], silent)
    # All of it in one dtype: what weakens heads computes beside the stock call.
    qkv = "query", "key", "value"
    call |= zip(qkv, autocast(*(call[name] for name in qkv)))
    given = call
    if streams is not None:
        given = {**call, "hidden_states": hidden_sequence(streams, watched, tokens)}
    out = stock(**call) if run.core is None else attend_call(run, given)
    if run.transform is not None:
        out = run.transform(out, run.strength, given)
    return out if silent == (0, 0) else out[..., silent[0] : silent[0] + asking, :]


def _with_rows(mask: torch.Tensor, silent: tuple[int, int]) -> torch.Tensor:
    """An attention mask with rows for silent context, which may see everything."""
    mask = one_row(mask) if mask.ndim > 1 else mask
    if mask.ndim < 2 or mask.shape[-2] == 1:
        return mask
    return F.pad(mask, (0, 0, *silent), value=float(mask.dtype == torch.bool))


def _silent_context(watched: Watched, missing: int) -> tuple[int, int] | None:
    """Of tokens that have keys and no queries, how many stand before the others and behind.

    None where they are not context at one end, so that the call is another attention than meant.
    """
    if 0 <= missing <= watched.text_before:
        return missing, 0
    return (0, missing) if missing == watched.text_behind else None


def autocast(q: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
    """The tensors as autocast gives them to the stock call; as they are outside of autocast."""
    if not torch.is_autocast_enabled(q.device.type):
        return [q, *others]
    dtype = torch.get_autocast_dtype(q.device.type)
    return [x.to(dtype) for x in (q, *others)]


def attend_call(
    run: LayerRun,
    call: dict,
    rows: tuple[PlannedLayout, ...] | None = None,
    attend_row: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """Answer a call of scaled_dot_product_attention by the core of ``run``.

    Args:
        call: its arguments by name, and the hidden states where the method needs them.
        rows: the plans, where ranks share the sequence; else those for the length of q.
        attend_row: ``(row, q, k, v, kv_log_weight, scale)``, what computes attention where no rank
            has all keys; else the method does.

    Raises:
        ValueError: a causal call, attention dropout, a mask that differs between queries, or batch
            rows other than the pass describes.
    """
    core, parameters = run.core, run.parameters
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
    q, k, v = autocast(call["query"], call["key"], call["value"])
    parameters = {n: x if x.device == q.device else x.to(q.device) for n, x in parameters.items()}
    if rows is None:
        rows = core.rows_of(q.shape[-2])
    token = rows[0].layout.grid_start if core.outer_mask else None
    mask = call.get("attn_mask")
    weight = key_log_weight(mask, q, token)
    scale = call.get("scale")

    report = None if torch.compiler.is_compiling() else run.report

    def answer_row(row, q, k, v, weight, hidden_states):
        if attend_row is not None:
            return attend_row(row, q, k, v, weight, scale)
        given = row, q, k, v, weight, hidden_states, scale, report
        return _attend_planned(core, parameters, run.memory, *given)

    out = by_rows(rows, answer_row, q, k, v, weight, call.get("hidden_states"))
    if core.outer_mask and mask is not None and mask.dtype != torch.bool and mask.shape[-2] != 1:
        out = _restore_context(out, call, rows[0].layout)
    return out


def by_rows(rows: tuple, answer: Callable, q: torch.Tensor, *others) -> torch.Tensor:
    """``answer(row, q, *others)`` for the whole batch, or for each batch row with its own ``row``.

    Args:
        rows: one entry for the batch, or one per batch row.
        others: tensors ``[B|1, ...]``, or None.

    Raises:
        ValueError: q has another number of batch rows.
    """
    if len(rows) == 1:
        return answer(rows[0], q, *others)
    if len(rows) != q.shape[0]:
        raise ValueError(
            f"this pass describes {len(rows)} batch rows that differ, and attention got "
            f"{q.shape[0]}; run the prompts one at a time"
        )
    pick = lambda x, b: x if x is None or x.shape[0] == 1 else x[b : b + 1]  # noqa: E731
    parts = [answer(row, *(pick(x, b) for x in (q, *others))) for b, row in enumerate(rows)]
    return torch.cat(parts)


def _attend_planned(
    core, parameters, memory, planned: PlannedLayout, q, k, v, weight, hidden_states, scale, report
):
    return method_attention(
        core.method,
        planned.layout,
        q,
        k,
        v,
        kept=planned.kept,
        kv_log_weight=weight,
        scale=scale,
        backend=core.backend,
        on_plan=planned.observe,
        memory=memory,
        hidden_states=hidden_states,
        report=report,
        **parameters,
    )


def hidden_sequence(given: tuple, watched: Watched, num_tokens: int) -> torch.Tensor:
    """``[B, N, C]``: what a layer was given, in the order of a sequence of so many tokens.

    Args:
        given: the layer's own tokens and those of its other stream, or None, each ``[B, n, C]``.
        watched: says how many tokens stand before the grid; the other stream does, or behind it.

    Raises:
        ValueError: together they are not the sequence, or differ in their channels.
    """
    own, other = given
    if own is not None and own.shape[1] == num_tokens:
        return own
    if own is not None and other is not None and own.shape[1] + other.shape[1] == num_tokens:
        if own.shape[2] != other.shape[2]:
            raise ValueError(
                f"the hidden states of the layer's two streams have {own.shape[2]} and "
                f"{other.shape[2]} channels, so they are no single sequence; a method that needs "
                "them cannot run here: keep the layer dense with dense_layers"
            )
        before = other.shape[1] == watched.text_before
        behind = watched.text_before == 0 or other.shape[1] == watched.text_behind
        if before != behind:
            return torch.cat([other, own] if before else [own, other], 1)
    sizes = " and ".join(str(x.shape[1]) for x in given if x is not None) or "none"
    raise ValueError(
        f"attention is over {num_tokens} tokens and the layer was given hidden states of {sizes}, "
        "so they cannot be told apart; a method that needs them cannot run here: keep the layer "
        "dense with dense_layers"
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


def one_row(mask: torch.Tensor) -> torch.Tensor:
    """An attention mask ``[..., N, N]`` of one row that was expanded, as ``[..., 1, N]``."""
    return mask[..., :1, :] if mask.shape[-2] != 1 and mask.stride(-2) == 0 else mask


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
    mask = one_row(mask)
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
