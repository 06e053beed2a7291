"""A linear branch over what a sparse method leaves out (SLA, arXiv:2509.24006)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ..block_lists import run_lengths, used_entries
from ..layout import Blocks, Layout
from ..plan import Plan, block_positions
from .amount import Amount, dense_flops
from .base import Method
from .checks import check_choice, check_integer
from .dynamic import match_heads, wide_dtype
from .head_groups import value_lists
from .linear import features as elu_features
from .linear import key_weights
from .topk import TopK

FEATURES = ("softmax", "elu", "relu")
# Added to a query's similarity with what was left out, lest it divides by nothing.
_EPSILON = 1e-5
# Values of the blocks' sums held at once: bounds memory, not the result.
_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class SLA(Method):
    """A sparse method, and linear attention over the key blocks that it does not list.

    Query block a lists the key blocks of a set S_a; U_a are the tokens of all the others. With
    features f and a D x D projection P for each head::

        out_i = softmax over S_a + P · [f(q_i) · Σ_U f(k_j) v_jᵀ] / [f(q_i) · Σ_U f(k_j) + 1e-5]

    P is trainable and starts at zero, so that untrained this is the sparse method. The sums over U
    are those over all blocks less the listed ones, so time and memory grow with the tokens and the
    lists. Of a block that is seen in part nothing is in U. A hidden key (padding, a mask) is in no
    sum, and the log weight of a key weighs it in them.

    A plan that pools what it leaves out itself (by a tail, summary tokens or a correction) is
    refused: it would count twice.

    Source: SLA, arXiv:2509.24006, whose P is shared by the heads of a layer. It skips the blocks
    that matter least; here they are in U.

    Args:
        sparse: the sparse method, which plans: a method, its name, or a mapping with ``method``
            and ``options``. None is :class:`TopK` with its defaults, SLA's own choice.
        features: "softmax" (over the channels, as published), "elu" (plus 1) or "relu".

    Raises:
        ValueError: an option out of range, a method that computes its own output, that is dense,
            or that has a value for each head; at the plan, one that pools what it leaves out.
    """

    name: ClassVar[str] = "sla"
    takes_methods: ClassVar[tuple[str, ...]] = ("sparse",)

    sparse: Method | None = None
    features: str = "softmax"

    def __post_init__(self):
        check_choice("features", self.features, FEATURES)
        inner = TopK() if self.sparse is None else self.sparse
        if not isinstance(inner, Method):
            raise ValueError(f"sparse must be a method, got {inner!r}")
        why = None
        if inner.computes or inner.adds:
            why = "its output is no attention under one plan of key blocks"
        elif inner.dense:
            why = "it leaves nothing out"
        elif value_lists(inner):
            why = "it has a plan for each head; name heads in rules of a mixture, each with its own"
        if why is not None:
            raise ValueError(f"sparse cannot be {inner.words()}: {why}")
        # One object, because it may keep what depends on the layout alone.
        object.__setattr__(self, "_inner", inner)

    # What kind of method this is, the one inside it says.

    @property
    def static(self) -> bool:
        return self._inner.static

    @property
    def needs_grid(self) -> bool:
        return self._inner.needs_grid

    @property
    def for_videos(self) -> bool:
        return self._inner.for_videos

    @property
    def parts(self) -> tuple[Method, ...]:
        return (self._inner,)

    def plan(
        self,
        layout: Layout,
        q: torch.Tensor | None = None,
        k: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
        scale: float | None = None,
        kv_log_weight: torch.Tensor | None = None,
    ) -> Plan:
        """See :meth:`Method.plan`: the plan of the sparse method.

        Raises:
            ValueError: it pools what it leaves out.
        """
        if self.static:
            plan = self._inner.plan(layout)
            plan.run_rows()  # now, where it waits for no device
        else:
            given = {"scale": scale, "kv_log_weight": kv_log_weight}
            plan = self._inner.plan(layout, q, k, v, **given)
        pooled = [
            what
            for what, there in (
                ("a tail", plan.tail_lse is not None),
                ("a correction", plan.out_scale is not None or plan.out_residual is not None),
                ("summary tokens", plan.num_keys != plan.num_real_keys),
            )
            if there
        ]
        if pooled:
            raise ValueError(
                f"sla cannot be put around {self._inner.words()}: its plan has {pooled[0]} for "
                "what it leaves out, which would count twice; turn that off in its options"
            )
        return plan

    def prepare(self, layout: Layout, device: torch.device) -> None:
        self._inner.prepare(layout, device)

    def least(self) -> SLA:
        return replace(self, sparse=self._inner.least())

    def scale(self, layout: Layout, head_dim: int) -> float | None:
        return self._inner.scale(layout, head_dim)

    def words(self) -> str:
        features = f", features={self.features!r}" if self.features != FEATURES[0] else ""
        return f"SLA({self._inner.words()}{features})"

    def to_dict(self) -> dict:
        sparse = None
        if self.sparse is not None:
            options = self.sparse.to_dict()
            sparse = {"method": options.pop("name"), "options": options}
        return {"name": self.name, "sparse": sparse, "features": self.features}

    def parameters(self, heads: int | None, head_dim: int | None) -> dict[str, torch.Tensor]:
        """``projection [H, D, D]``, fp32, of the linear branch: zero at the start."""
        why = "the layers do not tell their heads, which the projection depends on"
        check_integer("heads", heads, 1, remedy=why)
        check_integer("head_dim", head_dim, 1, remedy=why)
        return {"projection": torch.zeros(heads, head_dim, head_dim)}

    def amount(
        self,
        layout: Layout,
        heads: int | None,
        head_dim: int | None,
        kept: Any = None,
        observed: Amount | None = None,
    ) -> Amount:
        """See :meth:`Method.amount`: the density of the sparse part, the work of both."""
        density, work = self._inner.amount(layout, heads, head_dim, kept, observed)
        if work is None or head_dim is None:
            return Amount(density, None)
        products = (head_dim + 1) ** 2 + head_dim * (head_dim + 1) + head_dim**2
        branch = 2.0 * layout.num_tokens * products
        return Amount(density, work + branch / dense_flops(layout.num_tokens, 1, head_dim))

    def added(
        self,
        layout: Layout,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: Plan,
        kv_log_weight: torch.Tensor | None,
        projection: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """See :meth:`Method.added`; None without a projection."""
        if projection is None:
            return None
        heads, head_dim = q.shape[1], q.shape[3]
        if list(projection.shape) != [heads, head_dim, head_dim]:
            raise ValueError(
                f"the projection must be {[heads, head_dim, head_dim]} for {heads} heads of "
                f"{head_dim}, got {list(projection.shape)}"
            )
        weight = key_weights(kv_log_weight, q)
        k, v = match_heads(k, heads), match_heads(v, heads)
        rest = _Rest(plan, self.features)
        each = q.shape[0] * plan.kv_blocks.count * (head_dim + 1) ** 2
        step, outs = max(1, _AT_ONCE // each), []
        for start in range(0, heads, step):
            own = slice(start, start + step)
            weights = weight if weight.shape[1] == 1 else weight[:, own]
            out = rest.attention(*(x[:, own] for x in (q, k, v)), weights, own)
            outs.append((out @ projection[own].to(out)).to(q.dtype))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


class _Rest:
    """Linear attention of each query block over the key blocks that a plan does not list."""

    def __init__(self, plan: Plan, features: str):
        self.plan = plan
        self.features = features
        self.q_token, _ = _tokens(plan.q_blocks, plan.q_block_size)
        self.k_token, self.k_inside = _tokens(plan.kv_blocks, plan.kv_block_size)
        # Where each token stands in blocks that are filled up; those that fill one up repeat its
        # first, and give the same for it.
        slots = self.q_token.flatten()
        self.slot = torch.empty_like(slots[: plan.num_queries]).scatter_(
            0, slots, torch.arange(slots.numel(), device=slots.device)
        )

    def attention(self, q, k, v, weight: torch.Tensor, heads: slice) -> torch.Tensor:
        """``[B, h, N, D]`` in at least fp32, for some heads of the layer.

        Args:
            q, k, v: ``[B, h, N, D]``. weight: ``[B|1, h|1, N]``, 0 for hidden keys.
            heads: which they are.
        """
        wide = wide_dtype(q.dtype)
        sums = self._left_out(self._block_sums(k, v, weight.to(wide)), heads)
        left = sums[..., -1, -1] > 0.5  # how many keys
        queries = self._features(_blocked(q, self.q_token).to(wide))
        found = queries @ sums[..., :-1, :].to(wide)
        out = found[..., :-1] / (found[..., -1:] + _EPSILON)
        out = out.masked_fill(~left[..., None, None], 0)
        return out.flatten(2, 3).index_select(2, self.slot)

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        if self.features == "softmax":
            return torch.softmax(x, -1)
        return elu_features(x, None) if self.features == "elu" else F.relu(x)

    def _block_sums(self, k, v, weight: torch.Tensor) -> torch.Tensor:
        """``[B, h, blocks, D + 1, D + 1]`` fp64: ``Σ f(k) vᵀ`` of each key block.

        A channel of ones behind the features and behind v makes the last row and column: the sums
        of f(k), and in the corner the number of keys. Sums of all less sums of some need fp64.
        """
        weight = _blocked(weight[..., None], self.k_token)
        shown = self.k_inside[..., None] & (weight > 0)
        keys = _blocked(k, self.k_token).to(weight)
        keys = self._features(keys.masked_fill(~shown, 0)) * weight
        keys = F.pad(keys, (0, 1), value=1.0).masked_fill(~shown, 0)
        values = _blocked(v, self.k_token).to(weight).masked_fill(~shown, 0)
        return (keys.mT @ F.pad(values, (0, 1), value=1.0)).double()

    def _left_out(self, sums: torch.Tensor, heads: slice) -> torch.Tensor:
        """``[B, h, query blocks, ...]``: all block sums less those that each query block lists."""
        batch, count, blocks = sums.shape[:3]
        plan, table = self.plan, sums.flatten(3)
        given = plan.kv_indices, plan.kv_num_blocks
        lists, num = (self._of(x, batch, count, heads) for x in given)
        first = torch.arange(batch * count, device=sums.device).view(batch, count, 1, 1) * blocks
        used = used_entries(lists, num)
        index = torch.where(used, lists.long(), 0) + first
        listed = F.embedding_bag(
            index.flatten(0, 2),
            table.flatten(0, 2),
            mode="sum",
            per_sample_weights=used.flatten(0, 2).to(table),
        ).view(batch, count, -1, table.shape[-1])
        rows = plan.run_rows()
        if rows.numel():  # they see the first blocks, and list none
            length = run_lengths(lists, num).index_select(-1, rows)
            inside = torch.arange(blocks, device=rows.device) < length[..., None]
            runs = listed.index_select(2, rows) + inside.to(table) @ table
            listed = listed.index_copy(2, rows, runs)
        return (table.sum(2, keepdim=True) - listed).unflatten(-1, sums.shape[3:])

    @staticmethod
    def _of(lists: torch.Tensor, batch: int, count: int, heads: slice) -> torch.Tensor:
        """A plan's lists, one for each batch row and each of some heads."""
        lists = lists if lists.shape[1] == 1 else lists[:, heads]
        return lists.expand(batch, count, *lists.shape[2:])


def _tokens(blocks: Blocks, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``[n, size]``: the tokens of each block, and which of them are no repetition."""
    every = torch.arange(blocks.count, device=blocks.starts.device)
    at, inside = block_positions(blocks.starts, blocks.lengths, every, size)
    return at if blocks.order is None else blocks.order.long()[at], inside


def _blocked(x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """``[B, h, n, size, D]``: ``x [B, h, N, D]`` block by block."""
    return x.index_select(2, token.flatten()).unflatten(2, token.shape)
