"""Mixture of heads: every token takes some of the heads, weighted (MoH, arXiv:2410.11842)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch

from ..layout import Layout
from ..plan import Plan, block_positions, query_blocks
from .amount import UNKNOWN, Amount, dense_flops
from .base import Call, Kept, Method
from .checks import check_choice, check_integer
from .dense import Dense
from .dynamic import wide_dtype
from .head_groups import value_lists
from .log_linear import top_indices

ROUTES = ("block", "token")
LOAD_BALANCE = "load_balance"
# What the names of the inner method's parameters begin with.
_INNER = "inner_"
_NAMES = ("shared_router", "routed_router", "level_router")
_DENSE = Dense()
# Size of the first weights of the routed heads: enough to tell tokens apart.
_START = 0.02


class Count(NamedTuple):
    """Heads of a layer: always on, to choose from, and how many of those each token takes."""

    shared: int
    routed: int
    chosen: int


@dataclass(frozen=True)
class MixtureOfHeads(Method):
    """Heads as experts: some are always on, of the others each token takes those it scores best.

    With the token's hidden state x, the H heads' outputs under the ``inner`` method, the first S of
    them shared and the other E routed::

        g_i = 2 a₁ S softmax(W_s x)_i                      shared heads
        g_i = 2 a₂ K p_i / (sum of the K largest p)        routed heads among the K, else 0
        p = softmax(W_r x)          (a₁, a₂) = softmax(W_h x)          out_i = g_i · head_i

    and without shared heads g = K p / sum alone, without a. Gradients go through g, not through the
    choice. W_s and W_h start at zero, so that heads that are on start with weight 1, and W_r small.
    Which heads are left out is learned: untrained, it is no approximation. The load-balance loss
    ``E² mean_i(P_i f_i)``, with the mean P of p over tokens and the share f of tokens that take a
    head, is handed to whoever trains; padding counts in neither.

    Query blocks that do not take a head are not computed in it. Tokens choose one by one in the
    paper, so nearly every block of 64 or 128 holds one that takes the head, and only FLOPs on
    paper are saved. So by default all tokens of a query block of the inner method's plan choose
    together, by the sum of their p, and keep weights of their own; ``route="token"`` is the
    paper's, and computes a block where any of its tokens takes the head. Keys and values are
    computed for all heads. An inner method without a plan (``linear``) is computed in full.

    Source: MoH (Jin et al. 2024, arXiv:2410.11842), with the factors 2, S and K of its code.

    Args:
        inner: what the heads run: a method, its name, or a mapping with ``method`` and ``options``.
            No mixture, and no option with a list of values for groups of heads.
        shared: at least 0: heads that are always on, from the first on; they leave at least one. A
            float below 1 is a share of the heads, rounded.
        routed: at least 1: how many of the others each token takes, up to all. A float in (0, 1] is
            a share of them, rounded, at least one head.
        route: "block" or "token", who chooses.

    Raises:
        ValueError: an option out of range, or an inner method that is a mixture itself or has
            values for each head; with a layer, more heads than it has.
    """

    name: ClassVar[str] = "mixture_of_heads"
    needs_grid: ClassVar[bool] = False
    needs_hidden_states: ClassVar[bool] = True
    takes_methods: ClassVar[tuple[str, ...]] = ("inner",)
    needs_training: ClassVar[bool] = True
    losses: ClassVar[tuple[str, ...]] = (LOAD_BALANCE,)

    inner: Method = _DENSE
    shared: int | float = 0.25
    routed: int | float = 0.5
    route: str = "block"

    def __post_init__(self):
        if not isinstance(self.inner, Method):
            raise ValueError(f"inner must be a method, got {self.inner!r}")
        if (self.inner.computes and self.inner.parts) or value_lists(self.inner):
            raise ValueError(
                f"inner must be one method with one value for all heads in every option, got "
                f"{self.inner.words()}; heads that differ belong into rules of their own"
            )
        if isinstance(self.shared, float):
            if not 0 <= self.shared < 1:
                raise ValueError(f"shared as a share must lie in [0, 1); got {self.shared!r}")
        else:
            check_integer("shared", self.shared, 0, remedy="a float is a share of the heads")
        if isinstance(self.routed, float):
            if not 0 < self.routed <= 1:
                raise ValueError(f"routed as a share must lie in (0, 1]; got {self.routed!r}")
        else:
            check_integer("routed", self.routed, 1, remedy="a float is a share of the heads")
        check_choice("route", self.route, ROUTES)

    @property
    def parts(self) -> tuple[Method, ...]:
        return (self.inner,)

    @property
    def planner(self) -> Method | None:
        return self.inner.planner

    @property
    def for_videos(self) -> bool:
        return self.inner.for_videos

    def words(self) -> str:
        words = f"MixtureOfHeads(inner={self.inner.words()}, shared={self.shared}, "
        return words + f"routed={self.routed}" + (", route='token')" if self.by_token else ")")

    def to_dict(self) -> dict:
        options = self.inner.to_dict()
        inner = {"method": options.pop("name"), "options": options}
        given = {"shared": self.shared, "routed": self.routed, "route": self.route}
        return {"name": self.name, "inner": inner, **given}

    @property
    def by_token(self) -> bool:
        return self.route == "token"

    def count(self, heads: int | None) -> Count:
        """How many of a layer's heads are shared, routed and chosen.

        Raises:
            ValueError: the layer has too few, or does not tell how many.
        """
        check_integer("heads", heads, 1, remedy="the layers do not tell their heads")
        shared = self.shared
        shared = round(shared * heads) if isinstance(shared, float) else int(shared)
        if shared >= heads:
            raise ValueError(
                f"shared={self.shared} leaves none of the layer's {heads} heads to choose from; "
                f"take 0..{heads - 1}, or {self.inner.name} alone"
            )
        routed = heads - shared
        if isinstance(self.routed, float):
            return Count(shared, routed, max(1, round(self.routed * routed)))
        if self.routed > routed:
            raise ValueError(
                f"routed={self.routed} heads cannot be chosen from {routed}, which {shared} shared "
                f"ones leave of {heads}; take 1..{routed}"
            )
        return Count(shared, routed, int(self.routed))

    def parameters(
        self, heads: int | None, head_dim: int | None, channels: int | None = None
    ) -> dict[str, torch.Tensor]:
        """W_s ``[S, C]``, W_r ``[E, C]`` and W_h ``[2, C]``, fp32, and what the inner method has.

        W_s and W_h are absent without shared heads.
        """
        count = self.count(heads)
        check_integer(
            "channels", channels, 1, remedy="the layers do not tell those of their hidden states"
        )
        # Orthogonal rows, the same everywhere: those of a cosine transform.
        at = (torch.arange(channels) + 0.5) / channels
        waves = torch.cos(math.pi * torch.arange(1, count.routed + 1)[:, None] * at)
        found = {"routed_router": _START * waves}
        if count.shared:
            found["shared_router"] = torch.zeros(count.shared, channels)
            found["level_router"] = torch.zeros(2, channels)
        inner = self.inner.layer_parameters(heads, head_dim, channels)
        return found | {_INNER + name: x for name, x in inner.items()}

    def attention(
        self,
        layout: Layout,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        call: Call,
        **parameters: torch.Tensor,
    ) -> torch.Tensor:
        count, router, own = self._split(parameters, q, call.hidden_states)
        scores = _scores(router, call.hidden_states)
        if self.inner.computes:
            chosen = _chosen(scores, count.chosen)
            out = call.inner(self.inner, layout, q, k, v, kept=call.geometry, **own)
        else:
            made = call.planned(self.inner, layout, q, k, v, kept=call.geometry, **own)
            chosen, rows = self._route(scores, count, made.plan, call.kv_log_weight)
            plan = made.plan.only_rows(rows)
            if not self.inner.static:
                call.observe(plan)
            given = {"kv_log_weight": made.kv_log_weight, "scale": made.scale}
            out = call.attend(q, made.k, made.v, plan, **given)
            if self.inner.adds:
                out = out + self._added(layout, q, k, v, made.plan, call, own)
        if call.report is not None:
            call.report(LOAD_BALANCE, load_balance(scores, chosen, call.kv_log_weight))
        gates = _gates(router, scores, chosen, call.hidden_states, count)
        return out * gates.mT[..., None].to(out.dtype)

    def formula(
        self,
        layout: Layout,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rows: torch.Tensor,
        call: Call,
        **parameters: torch.Tensor,
    ) -> torch.Tensor:
        """All heads in full, and then the gates."""
        count, router, own = self._split(parameters, q, call.hidden_states)
        scores = _scores(router, call.hidden_states)
        if self.inner.computes:
            inner = call._replace(geometry=call.geometry.geometry)
            chosen = _chosen(scores, count.chosen)
            out = self.inner.formula(layout, q, k, v, rows, inner, **own)
        else:
            made = call.planned(self.inner, layout, q, k, v, kept=call.geometry, **own)
            chosen, _ = self._route(scores, count, made.plan, call.kv_log_weight)
            given = {"kv_log_weight": made.kv_log_weight, "scale": made.scale}
            out = call.attend(q, made.k, made.v, made.plan, **given)
            if self.inner.adds:
                out = out + self._added(layout, q, k, v, made.plan, call, own)
            out = out[:, :, rows]
        gates = _gates(router, scores, chosen, call.hidden_states, count)
        return out * gates.mT[:, :, rows, None].to(out.dtype)

    def _added(self, layout, q, k, v, plan: Plan, call: Call, parameters: dict):
        """What the inner method adds to attention under its plan."""
        weight = call.kv_log_weight
        more = self.inner.added(layout, q, k, v, plan, weight, **parameters)
        return 0 if more is None else more

    def _split(self, parameters: dict, q: torch.Tensor, hidden_states: torch.Tensor):
        """``(Count, router in at least fp32, the inner method's parameters)``.

        Raises:
            ValueError: a router that is incomplete, or for other heads or hidden states.
        """
        heads, head_dim, channels = q.shape[1], q.shape[3], hidden_states.shape[2]
        count = self.count(heads)
        own = {n.removeprefix(_INNER): x for n, x in parameters.items() if n.startswith(_INNER)}
        router = {name: x for name, x in parameters.items() if not name.startswith(_INNER)}
        if not router:
            router = self.parameters(heads, head_dim, channels)
            router = {name: x.to(q.device) for name, x in router.items() if name in _NAMES}
        wanted = {"routed_router": count.routed}
        if count.shared:
            wanted |= {"shared_router": count.shared, "level_router": 2}
        if router.keys() != wanted.keys():
            raise ValueError(
                f"the router must have {', '.join(sorted(wanted))}, got "
                f"{', '.join(sorted(router))}; {count.shared} of {heads} heads are shared"
            )
        for name, rows in wanted.items():
            if tuple(router[name].shape) != (rows, channels):
                raise ValueError(
                    f"{name} is {list(router[name].shape)}, and {count.shared} shared and "
                    f"{count.routed} routed heads with hidden states of {channels} channels need "
                    f"{[rows, channels]}; it belongs to another layer or other options"
                )
        wide = wide_dtype(hidden_states.dtype)
        return count, {name: x.to(wide) for name, x in router.items()}, own

    def _route(
        self,
        scores: torch.Tensor,
        count: Count,
        plan: Plan,
        kv_log_weight: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``(chosen [B, N, E], rows [B, H, nQ])``: what tokens take, and what is computed."""
        t = plan.tensors()
        blocks = torch.arange(t.q_starts.numel(), device=scores.device)
        token, inside = block_positions(t.q_starts, t.q_lengths, blocks, t.q_block_size)
        if t.q_order is not None:
            token = t.q_order.long()[token]
        if self.by_token:
            chosen = _chosen(scores, count.chosen)
            taken = (chosen[:, token] & inside[..., None]).any(2)
        else:
            valid = _valid(scores, kv_log_weight)
            counted = inside[..., None] & valid[:, token, None]
            taken = _chosen(scores[:, token].masked_fill(~counted, 0).sum(2), count.chosen)
            chosen = taken[:, query_blocks(t, scores.shape[1])]
        always = taken.new_ones(*taken.shape[:2], count.shared)
        return chosen, torch.cat([always, taken], -1).mT

    def amount(
        self,
        layout: Layout,
        heads: int | None,
        head_dim: int | None,
        kept: Any = None,
        observed: Amount | None = None,
    ) -> Amount:
        """See :meth:`Method.amount`. Of a plan from the layout alone: as if no block were computed
        in vain, or with ``route="token"`` as if all were."""
        if heads is None:
            return UNKNOWN
        count, mine = self.count(heads), None if kept is None else kept.geometry
        density, work = self.inner.amount(layout, heads, head_dim, mine, observed)
        if isinstance(mine, Plan) and not self.by_token:
            share = (count.shared + count.chosen) / heads
            density, work = density * share, work * share
        if work is None:
            return UNKNOWN
        tokens, width = layout.num_tokens, heads * head_dim
        router = 2.0 * tokens * width * (heads + (2 if count.shared else 0))
        return Amount(density, work + router / dense_flops(tokens, heads, head_dim))

    def flops(self, layout: Layout, heads: int, head_dim: int) -> float:
        kept = Kept(None, self.geometry(layout, torch.device("cpu")))
        work = self.amount(layout, heads, head_dim, kept).work
        if work is None:
            raise ValueError(f"what {self.inner.name} costs depends on q and k")
        return work * dense_flops(layout.num_tokens, heads, head_dim)

    def geometry(self, layout: Layout, device: torch.device) -> Any:
        return self.inner.keep(layout, device)

    def prepare(self, layout: Layout, device: torch.device) -> None:
        self.inner.prepare(layout, device)

    def least(self) -> MixtureOfHeads:
        inner = self.inner.least()
        return self if inner == self.inner else replace(self, inner=inner)


def _scores(router: Mapping[str, torch.Tensor], hidden_states: torch.Tensor) -> torch.Tensor:
    """p ``[B, N, E]`` in at least fp32."""
    weight = router["routed_router"]
    return torch.softmax(hidden_states.to(weight.dtype) @ weight.mT, -1)


def _chosen(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Bool, which of the last axis are the ``count`` largest; of equals the first."""
    best = top_indices(scores.detach(), count)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)


def _valid(scores: torch.Tensor, kv_log_weight: torch.Tensor | None) -> torch.Tensor:
    """``[B|1, N]`` bool, False on padding."""
    if kv_log_weight is None:
        return torch.ones(1, scores.shape[1], dtype=torch.bool, device=scores.device)
    return (kv_log_weight != -torch.inf).any(1)


def _gates(
    router: Mapping[str, torch.Tensor],
    scores: torch.Tensor,
    chosen: torch.Tensor,
    hidden_states: torch.Tensor,
    count: Count,
) -> torch.Tensor:
    """g ``[B, N, H]`` in at least fp32."""
    taken = scores.masked_fill(~chosen, 0)
    total = taken.sum(-1, keepdim=True).clamp_min(torch.finfo(taken.dtype).tiny)
    routed = count.chosen * taken / total
    if not count.shared:
        return routed
    x = hidden_states.to(scores.dtype)
    shared = count.shared * torch.softmax(x @ router["shared_router"].mT, -1)
    level = 2 * torch.softmax(x @ router["level_router"].mT, -1)
    return torch.cat([level[..., :1] * shared, level[..., 1:] * routed], -1)


def load_balance(
    scores: torch.Tensor, chosen: torch.Tensor, kv_log_weight: torch.Tensor | None = None
) -> torch.Tensor:
    """``E² mean_i(P_i f_i)``: K where all heads are taken alike, up to E K where they are not.

    Args:
        scores: p ``[B, N, E]``. chosen: bool, which heads each token takes.
        kv_log_weight: ``[B|1, H|1, N]``; tokens that it hides do not count.
    """
    valid = _valid(scores, kv_log_weight).expand(scores.shape[:2])[..., None]
    tokens = valid.sum().clamp_min(1)
    mean = scores.masked_fill(~valid, 0).sum((0, 1)) / tokens
    share = (chosen & valid).sum((0, 1)).to(mean) / tokens
    return scores.shape[-1] ** 2 * (mean * share).mean()
