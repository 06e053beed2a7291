"""The CPU backend: block-sparse attention as a few large dense calls in plain PyTorch.

:mod:`dittfast.kernels.cpu_worklist` cuts the plan into dense problems. For each of them keys and
values are gathered, PyTorch's fused CPU attention runs, forward or backward, and the pieces of a
row are merged by their log-sum-exp. No pair outside the listed blocks is computed.

Memory beyond inputs, outputs and the work list: fp32 copies of half-precision inputs, one gathered
slice of keys and one of values (at most as large as k and v) and 2^23 bias values. Nothing grows
with queries times keys. Half precision is computed in fp32, which is also many times faster on
CPUs without half-precision matrix units. Results are the same in every run.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dittfast.plan import METRICS, PlanTensors, token_rule

from .capabilities import Capabilities
from .cpu_worklist import Call, Worklist, coordinates, make_worklist, squared_limits
from .op import define_backend

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

CAPABILITIES = (Capabilities(("cpu",), tail=True),)
# Bias values of one call: bounds memory.
_BIAS_VALUES = 1 << 23
# Keys of a piece: gathered ones should still be in the cache when they are used.
_MOST_KEYS = 4096
# Hides a key. Finite, so that a piece of a row that sees nothing gives no NaN before it is merged
# with weight zero; below _UNSEEN a log-sum-exp means that the row saw nothing at all.
_HIDDEN = -(2.0**120)
_UNSEEN = -(2.0**98)
# Makes half a unit beyond the limit of the token rule as good as -inf. A power of two: exact.
_STEEP = 2.0**100
# Frames of queries whose limits are spread over the keys once instead of in every call.
_FEW_CODES = 8


class _Rule:
    """The token rule as a matrix product.

    ``limit - distance²`` is a sum of products of a few numbers of the query and a few of the key.
    All are integers (and one half) small enough to be exact in the type chosen here, so one thin
    product gives the sign for every pair without a look at each.
    """

    def __init__(self, t: PlanTensors, rows: torch.Tensor, dtype: torch.dtype):
        q_frame, q_place = t.q_frame, t.q_place
        if rows.numel():
            q_frame, q_place = q_frame[rows], q_place[rows]
        q_at, kv_at = coordinates(t, q_place), coordinates(t, t.kv_place)
        centre = kv_at.amax(0) // 2
        q_at = (q_at - centre).masked_fill_((q_frame < 0)[:, None], 0)
        kv_at = (kv_at - centre).masked_fill_((t.kv_frame < 0)[:, None], 0)
        reach = int(torch.maximum(q_at.abs().max(), kv_at.abs().max()))
        always = 16 * reach * reach + 16
        exact = torch.float32 if always < 1 << 23 and dtype != torch.float64 else torch.float64
        self.dtype = dtype
        q_codes, self.q_code = torch.unique(q_frame, return_inverse=True)
        kv_codes, self.kv_code = torch.unique(t.kv_frame, return_inverse=True)
        limits = squared_limits(t).clamp_max_(always)
        apart = (q_codes[:, None] - kv_codes).abs().clamp_max_(limits.numel() - 1)
        free = (q_codes[:, None] < 0) | (kv_codes < 0)
        free |= q_codes[:, None] >> 16 != kv_codes >> 16
        free |= (kv_codes & 0xFFFF) < t.sink_frames
        limits = limits[apart.long()].masked_fill_(free, always)
        limits = (limits.to(exact) + 0.5).mul_(_STEEP)
        q_at, kv_at = q_at.to(exact), kv_at.to(exact)
        placed = (q_frame >= 0)[:, None].to(exact)
        left = torch.cat([2 * q_at, -(q_at * q_at).sum(1, keepdim=True), -placed], 1)
        square = (kv_at * kv_at).sum(1, keepdim=True)
        right = torch.cat([kv_at, torch.ones_like(square), square], 1).t().mul(_STEEP)
        self.few = q_codes.numel() <= _FEW_CODES
        if self.few:
            one_hot = F.one_hot(self.q_code, q_codes.numel()).to(exact)
            left = torch.cat([one_hot, left], 1)
            right = torch.cat([limits[:, self.kv_code], right])
        self.limits, self.left, self.right = limits, left, right.contiguous()

    def bias(self, start: int, shape: tuple[int, int], keys: torch.Tensor) -> torch.Tensor:
        """``[count, rows, K]``: 0 where a pair is kept, hugely negative elsewhere.

        Args:
            start: first row.
            shape: ``(count, rows)``.
            keys: ``[count, K]`` key positions.
        """
        end = start + shape[0] * shape[1]
        index = keys.reshape(-1)
        left, right = self.left[start:end], self.right.index_select(1, index)
        if not self.few:
            codes, code = torch.unique(self.q_code[start:end], return_inverse=True)
            limits = self.limits[codes].index_select(1, self.kv_code.index_select(0, index))
            left = torch.cat([F.one_hot(code, codes.numel()).to(left.dtype), left], 1)
            right = torch.cat([limits, right])
        if shape[0] == 1:
            bias = torch.mm(left, right)[None].clamp_max_(0)
        else:
            right = right.unflatten(1, keys.shape).transpose(0, 1)
            bias = torch.bmm(left.unflatten(0, shape), right).clamp_max_(0)
        return bias if bias.dtype == self.dtype else bias.clamp_min_(_HIDDEN).to(self.dtype)


class _Boxes:
    """The token rule "box", compared pair by pair: it is no sum of products."""

    def __init__(self, t: PlanTensors, rows: torch.Tensor, dtype: torch.dtype):
        self.keep, self.dtype = token_rule(t).keep, dtype
        self.rows = rows if rows.numel() else torch.arange(t.q_frame.numel())

    def bias(self, start: int, shape: tuple[int, int], keys: torch.Tensor) -> torch.Tensor:
        """See :meth:`_Rule.bias`."""
        rows = self.rows[start : start + shape[0] * shape[1]].unflatten(0, shape)
        keep = self.keep(rows[:, :, None], keys[:, None])
        return torch.zeros(keep.shape, dtype=self.dtype).masked_fill_(~keep, _HIDDEN)


class _Lists(NamedTuple):
    """One list of the plan and the batch rows and heads that follow it."""

    batch: int
    head: int
    shared: tuple[bool, bool]

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """The part ``[heads, ...]`` of ``x [B, H, ...]``; a view where B and H can be merged."""
        if all(self.shared):
            return x.flatten(0, 1)
        if self.shared[0]:
            return x[:, self.head]
        if self.shared[1]:
            return x[self.batch]
        return x[self.batch, self.head][None]


class _Piece(NamedTuple):
    """Part of a call small enough for its bias: ``count`` problems of ``rows`` by ``K``.

    ``keys`` are token indices ``[count, K]``; ``run`` is the first of them where they are
    consecutive. ``bias`` is ``[count, heads|1, rows|1, K]`` or None. ``scattered`` are the rows
    where they are not consecutive; then ``count`` is 1.
    """

    start: int
    rows: int
    keys: torch.Tensor
    run: int | None
    bias: torch.Tensor | None
    scattered: torch.Tensor | None

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """``[count, heads, rows, ...]`` of per-row values ``x [heads, N, ...]``.

        A view, unless the rows are scattered.
        """
        if self.scattered is not None:
            if x.stride(0) > x.stride(1):
                return x.index_select(1, self.scattered)[None]
            # Rows first in memory: whole rows are copied at once.
            return x.transpose(0, 1).index_select(0, self.scattered).transpose(0, 1)[None]
        count = len(self.keys)
        x = x.narrow(1, self.start, count * self.rows)
        return x[None] if count == 1 else x.unflatten(1, (count, self.rows)).transpose(0, 1)


def _add_keys(x: torch.Tensor, piece: _Piece, values: torch.Tensor) -> None:
    """Add ``values [count, heads, K, D]`` to ``x [heads, N, D]``, in place; one after the other."""
    if piece.run is not None:
        x.narrow(1, piece.run, piece.keys.shape[1]).add_(values[0])
    else:
        x.index_add_(1, piece.keys.reshape(-1), values.transpose(0, 1).flatten(1, 2))


class _Problem:
    """Inputs in the compute type, queries in row order, and the loop over the work list."""

    def __init__(self, q, k, v, t: PlanTensors):
        self.t = t
        self.work = Worklist.unpack(make_worklist(t) if t.worklist is None else t.worklist)
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        rows, self.scattered = self.work.rows.long(), self.work.scattered.long()
        self.tokens = t.q_order.long() if t.q_order is not None else None
        if rows.numel():
            self.tokens = rows if self.tokens is None else self.tokens[rows]
        self.kv_order = None if t.kv_order is None else t.kv_order.long()
        self.rule = None
        if t.metric:
            kind = _Boxes if METRICS[t.metric - 1] == "box" else _Rule
            self.rule = kind(t, rows, self.dtype)
        self.q = self.by_row(q)
        self.k, self.v = (x.to(self.dtype).contiguous() for x in (k, v))
        self.buffers = [torch.empty(0, dtype=self.dtype), torch.empty(0, dtype=self.dtype)]
        self.weight = t.kv_log_weight
        if self.weight is not None:
            self.weight = self.weight.to(self.dtype).clamp_min(_HIDDEN)
            if self.weight.shape[:2] != (1, 1):
                self.weight = self.weight.expand(*q.shape[:2], -1)

    def by_row(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, H, N, D]`` in the compute type, in row order."""
        x = x.to(self.dtype)
        return x.contiguous() if self.tokens is None else x.index_select(2, self.tokens)

    def by_token(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Undo :meth:`by_row`."""
        if self.tokens is not None:
            # Rows first, as new_rows() has them in memory: whole rows are copied at once.
            x = x.permute(2, 0, 1, 3)
            x = torch.empty_like(x).index_copy_(0, self.tokens, x).permute(1, 2, 0, 3)
        return x.to(dtype)

    def new_rows(self) -> torch.Tensor:
        """Zeros like ``q``, in memory as the fused op lays out its results."""
        batch, heads, rows, width = self.q.shape
        return torch.zeros(rows, batch, heads, width, dtype=self.dtype).permute(1, 2, 0, 3)

    def by_list(self) -> Iterator[tuple[_Lists, Iterator[_Piece]]]:
        """The lists of the plan, each with its pieces of work."""
        batch, heads = self.t.kv_indices.shape[:2]
        at = 0
        for (b, h), group in groupby(self.work.calls, key=lambda call: (call.batch, call.head)):
            lists, calls = _Lists(b, h, (batch == 1, heads == 1)), list(group)
            sizes = [call.count * call.keys for call in calls]
            positions = self.work.positions[at : at + sum(sizes)].long()
            at += sum(sizes)
            yield lists, self._pieces(lists, calls, positions.split(sizes))

    def _pieces(self, lists: _Lists, calls: list[Call], positions) -> Iterator[_Piece]:
        weight = self.weight
        if weight is not None:
            weight = weight[0] if weight.shape[:2] == (1, 1) else lists.of(weight)
        heads = 1 if weight is None else len(weight)
        for call, keys in zip(calls, positions):
            keys = keys.view(call.count, call.keys)
            most = _BIAS_VALUES // (heads * call.count * call.rows)
            most = max(1, min(most, _MOST_KEYS))
            for part in keys.split(most, 1):
                yield self._piece(call, part, weight)

    def _piece(self, call: Call, positions: torch.Tensor, weight) -> _Piece:
        tokens, bias, run = positions, None, None
        if self.kv_order is not None:
            tokens = self.kv_order[positions]
        elif call.count == 1:
            first, last = int(tokens[0, 0]), int(tokens[0, -1])
            # Lists need not rise: 0, 5, 2 has the ends of a run and is none.
            if last - first == tokens.numel() - 1 and bool((tokens.diff() == 1).all()):
                run = first
        if call.partial:
            bias = self.rule.bias(call.start, (call.count, call.rows), positions)[:, None]
        if weight is not None:
            part = weight.index_select(1, tokens.reshape(-1)).unflatten(1, tokens.shape)
            part = part.transpose(0, 1)[:, :, None]
            bias = part if bias is None else bias + part
        rows = self.scattered.narrow(0, call.start, call.rows) if call.scattered else None
        return _Piece(call.start, call.rows, tokens, run, bias, rows)

    def gather(self, x: torch.Tensor, piece: _Piece, buffer: int) -> torch.Tensor:
        """``[count, heads, K, D]`` of ``x [heads, N, D]``."""
        if piece.run is not None:
            return x.narrow(1, piece.run, piece.keys.shape[1])[None]
        index = piece.keys.reshape(-1)
        shape = x.shape[0], index.numel(), x.shape[2]
        size = shape[0] * shape[1] * shape[2]
        if self.buffers[buffer].numel() < size:
            self.buffers[buffer] = torch.empty(size, dtype=self.dtype)
        out = self.buffers[buffer][:size].view(shape)
        torch.index_select(x, 1, index, out=out)
        if len(piece.keys) == 1:
            return out[None]
        return out.unflatten(1, piece.keys.shape).transpose(0, 1)

    def attend(self, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """``(out, lse)`` in row order, without the epilogue."""
        out = self.new_rows()
        lse = torch.full(self.q.shape[:3], -torch.inf, dtype=self.dtype)
        for lists, pieces in self.by_list():
            q, k, v = (lists.of(x) for x in (self.q, self.k, self.v))
            out_l, lse_l = lists.of(out), lists.of(lse)
            for piece in pieces:
                near_k, near_v = self.gather(k, piece, 0), self.gather(v, piece, 1)
                part, part_lse = _flash(
                    piece.of(q), near_k, near_v, attn_mask=piece.bias, scale=scale
                )
                before, share = piece.of(lse_l), piece.of(out_l)
                share.lerp_(part, torch.sigmoid(part_lse - before)[..., None])
                before.copy_(torch.logaddexp(before, part_lse))
                if piece.scattered is not None:
                    rows = piece.scattered
                    lse_l.index_copy_(1, rows, before[0])
                    out_l.transpose(0, 1).index_copy_(0, rows, share[0].transpose(0, 1))
        unseen = lse < _UNSEEN
        out.masked_fill_(unseen[..., None], 0)
        return out, lse.masked_fill_(unseen, -torch.inf)

    def gradients(self, grad, out, lse, scale: float):
        """``(dq in row order, dk, dv)``; ``out`` without the epilogue."""
        dq, dk, dv = self.new_rows(), torch.zeros_like(self.k), torch.zeros_like(self.v)
        inputs = grad, self.q, self.k, self.v, out, lse, dq, dk, dv
        for lists, pieces in self.by_list():
            grad_l, q, k, v, out_l, lse_l, dq_l, dk_l, dv_l = (lists.of(x) for x in inputs)
            for piece in pieces:
                near_k, near_v = self.gather(k, piece, 0), self.gather(v, piece, 1)
                parts = _flash_backward(
                    piece.of(grad_l), piece.of(q), near_k, near_v, piece.of(out_l),
                    piece.of(lse_l), 0.0, False, attn_mask=piece.bias, scale=scale,
                )  # fmt: skip
                if piece.scattered is None:
                    piece.of(dq_l).add_(parts[0])
                else:
                    add = parts[0][0].transpose(0, 1)
                    dq_l.transpose(0, 1).index_add_(0, piece.scattered, add)
                _add_keys(dk_l, piece, parts[1])
                _add_keys(dv_l, piece, parts[2])
        return dq, dk, dv

    def block_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Per-block values ``[B|1, H|1, nQ, D]`` as rows."""
        return x.to(self.dtype).index_select(2, self._row_blocks())

    def sum_rows(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of rows ``[B, H, N, D]`` over each block."""
        out = x.new_zeros(*x.shape[:2], self.work.blocks.numel(), x.shape[3])
        return out.index_add_(2, self._row_blocks(), x)

    def _row_blocks(self) -> torch.Tensor:
        blocks = self.work.blocks.long()
        return torch.repeat_interleave(blocks, self.t.q_lengths[blocks].long())


def forward(q, k, v, t: PlanTensors, scale: float):
    """Shapes as in :func:`dittfast.attend`. Returns ``(out, lse)``."""
    problem = _Problem(q, k, v, t)
    out, lse = problem.attend(scale)
    if t.out_scale is not None:
        out *= problem.block_rows(t.out_scale[..., None])
    if t.out_residual is not None:
        out += problem.block_rows(t.out_residual)
    lse = problem.by_token(lse[..., None], lse.dtype)[..., 0]
    return problem.by_token(out, q.dtype), lse


def backward(grad_out, grad_lse, q, k, v, out, lse, t: PlanTensors, scale: float):
    """Gradients of q, k, v and, where the plan has them, of out_scale and out_residual."""
    problem = _Problem(q, k, v, t)
    grad = problem.by_row(grad_out)
    grad_scale = grad_residual = None
    if t.out_scale is None and t.out_residual is None:
        raw, lse = problem.by_row(out), problem.by_row(lse[..., None])[..., 0]
    else:
        # Undoing the epilogue would lose what rounding, or a large residual, has taken.
        raw, lse = problem.attend(scale)
    if t.out_residual is not None:
        grad_residual = problem.sum_rows(grad)
    if t.out_scale is not None:
        grad_scale = problem.sum_rows((grad * raw).sum(-1, keepdim=True))[..., 0]
        grad = grad * problem.block_rows(t.out_scale[..., None])
    # Rows that saw nothing: every logit is far below any finite number put here.
    lse = lse.masked_fill(lse == -torch.inf, 0)
    width = q.shape[-1]
    if grad_lse is not None and bool(grad_lse.any()):
        # The fused op subtracts sum(grad * out) where lse's gradient has to be added: one more
        # column, zero in q, k and v, carries it there.
        problem.q, problem.k, problem.v = (
            F.pad(x, (0, 1)) for x in (problem.q, problem.k, problem.v)
        )
        grad = torch.cat([grad, problem.by_row(grad_lse[..., None])], -1)
        raw = F.pad(raw, (0, 1), value=-1.0)
    dq, dk, dv = problem.gradients(grad, raw, lse, scale)
    dq, dk, dv = (x[..., :width] for x in (dq, dk, dv))
    dq = problem.by_token(dq, q.dtype)
    return dq, dk.to(k.dtype), dv.to(v.dtype), grad_scale, grad_residual


attend = define_backend("cpu", forward, backward)
