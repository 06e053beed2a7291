"""Ring attention under a static plan: keys come by in parts, and lse merges what they give.

Every rank keeps its queries. In step ``i`` it gets keys and values from the rank ``i`` places
before it, and of these only the blocks that its queries see, which the plan tells both: a plan that
keeps little sends little. What each part gives is merged by its lse; in the backward pass the parts
come by again, and the gradients of keys and values go back where they came from.

Ring attention: Liu, Zaharia and Abbeel, https://arxiv.org/abs/2310.01889.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from dittfast.attention import attend
from dittfast.plan import Plan

from .exchange import Ranks, send_flat


class Step(NamedTuple):
    """What one rank does in one step of the ring.

    Attributes:
        offset: keys come from the rank so many places before, and go to the one as far behind.
        gives: ``[g]`` int64, which of its own keys the rank sends.
        takes: ``[n]`` int64, the tokens whose keys it gets.
        plan: of its queries and those keys; None where it gets none.
    """

    offset: int
    gives: torch.Tensor
    takes: torch.Tensor
    plan: Plan | None


def ring_steps(plan: Plan, shares: list[torch.Tensor], rank: int) -> tuple[Step, ...]:
    """The steps of one rank; those in which no rank gets any keys are left out, on every rank.

    Args:
        plan: of the whole sequence.
        shares: for each rank ``[n]`` int64, its tokens.

    Raises:
        ValueError: as :meth:`Plan.part`.
    """
    ranks = len(shares)
    seen = [plan.keys_seen(own) for own in shares]

    def wanted(by: int, of: int) -> torch.Tensor:
        return seen[by % ranks][shares[of % ranks]].nonzero()[:, 0]

    steps = []
    for offset in range(ranks):
        if not any(wanted(source + offset, source).numel() for source in range(ranks)):
            continue
        source = (rank - offset) % ranks
        takes = shares[source][wanted(rank, source)]
        part = plan.part(shares[rank], takes) if takes.numel() else None
        steps.append(Step(offset, wanted(rank + offset, rank), takes, part))
    return tuple(steps)


class Ring(NamedTuple):
    """Attention of one layer on one rank of a ring."""

    steps: tuple[Step, ...]
    ranks: Ranks
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor]]  # (step, q, k, v) -> (out, lse)

    def shift(self, x: torch.Tensor, by: int, shape: tuple[int, ...]) -> torch.Tensor:
        """``x`` to the rank ``by`` places behind, for a tensor from the one as far before."""
        if by == 0:
            return x
        own, count, _ = self.ranks
        pieces = [x.new_empty(0)] * count
        numels = [0] * count
        pieces[(own + by) % count] = x
        numels[(own - by) % count] = math.prod(shape)
        return send_flat(pieces, numels, self.ranks).view(shape)

    def visits(self, kv: torch.Tensor) -> Iterator[tuple[Step, torch.Tensor]]:
        """Each step with its keys and values ``[2, B, H, n, D]``; the next are on their way."""

        def fetch(step: Step) -> torch.Tensor:
            shape = (*kv.shape[:3], len(step.takes), kv.shape[4])
            return self.shift(kv.index_select(3, step.gives), step.offset, shape)

        coming = fetch(self.steps[0])
        for n, step in enumerate(self.steps):
            here = coming
            if n + 1 < len(self.steps):
                coming = fetch(self.steps[n + 1])
            yield step, here


def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    steps: tuple[Step, ...],
    ranks: Ranks,
    *,
    heads: slice = slice(None),
    kv_log_weight: torch.Tensor | None = None,
    scale: float,
    backend: str = "auto",
) -> torch.Tensor:
    """What :func:`dittfast.attend` gives for this rank's queries, ``[B, H, n, D]`` in q's dtype.

    Differentiable in q, k and v, if all ranks differentiate it.

    Args:
        q, k, v: ``[B, H, n, D]`` of this rank's tokens.
        steps: from :func:`ring_steps`.
        heads: which heads of the plan these are.
        kv_log_weight: ``[B|1, H|1, N]`` for all tokens of the sequence.
    """

    def attend_part(step: Step, q, k, v):
        weight = None if kv_log_weight is None else kv_log_weight[..., step.takes]
        given = {"kv_log_weight": weight, "scale": scale, "backend": backend}
        return attend(q, k, v, step.plan.select_heads(heads), return_lse=True, **given)

    ring = Ring(steps, ranks, attend_part)
    if torch.is_grad_enabled():
        return _RingAttention.apply(q, k, v, ring)
    return _merged(q, k, v, ring)[0]


def _share(lse: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """``[..., 1]``: the weight of a part in the whole; 0 where it sees nothing."""
    return (lse - total.clamp_min(torch.finfo(total.dtype).min)).exp()[..., None]


def _merged(q, k, v, ring: Ring) -> tuple[torch.Tensor, torch.Tensor]:
    """``out`` in q's dtype and ``lse``, of all parts together."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(q.shape, dtype=wide, device=q.device)
    lse = torch.full(q.shape[:-1], -torch.inf, dtype=wide, device=q.device)
    for step, (k_part, v_part) in ring.visits(torch.stack([k, v])):
        if step.plan is None:
            continue
        more, more_lse = ring.attend(step, q, k_part, v_part)
        total = torch.logaddexp(lse, more_lse)
        out = out * _share(lse, total) + more * _share(more_lse, total)
        lse = total
    return out.to(q.dtype), lse


class _RingAttention(torch.autograd.Function):
    """One node on every rank, so that all of them communicate in the same order."""

    @staticmethod
    def forward(ctx, q, k, v, ring: Ring):
        out, lse = _merged(q, k, v, ring)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring = ring
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, out, lse = ctx.saved_tensors
        ring: Ring = ctx.ring
        kv = torch.stack([k, v])
        grad_q, grad_kv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, kv))
        for step, part in ring.visits(kv):
            back = torch.zeros_like(part)
            if step.plan is not None:
                leaves = [x.detach().requires_grad_() for x in (q, *part)]
                with torch.enable_grad():
                    more, more_lse = ring.attend(step, *leaves)
                # By the rule of the merge: d out / d more is the share, d out / d more_lse the
                # share times how far this part's output lies from the whole.
                grad = grad_out * _share(more_lse.detach(), lse)
                grads = grad.to(more.dtype), (grad * (more.detach() - out)).sum(-1).to(more_lse)
                own, *back = torch.autograd.grad((more, more_lse), leaves, grads)
                grad_q += own
                back = torch.stack(back)
            shape = (*kv.shape[:3], len(step.gives), kv.shape[4])
            grad_kv.index_add_(3, step.gives, ring.shift(back, -step.offset, shape).to(lse.dtype))
        return grad_q.to(q.dtype), *grad_kv.to(k.dtype), None
