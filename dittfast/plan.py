"""Which key blocks each query block may see: the data type between methods and kernels."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from .block_lists import (
    ListBuilder,
    Transpose,
    block_states,
    entry_range,
    lists_of_mask,
    lists_of_part,
    rows_of_runs,
    run_lengths,
    transpose_lists,
    used_entries,
)
from .cache import nbytes
from .layout import Blocks, Layout, make_blocks, split_evenly

DISTANCES = ("disc", "raster")
METRICS = (*DISTANCES, "box")
LAST = ("q_frame_last", "q_place_last")
TAIL = ("tail_lse", "tail_value", "tail_index")
# Rows or columns whose squared distances an int32 holds, and half of one the rows.
_MOST_ROWS = 1 << 15
# Token pairs looked at together when a rule is evaluated block by block: bounds memory.
_PAIRS_AT_ONCE = 1 << 24


@contextlib.contextmanager
def to_be_kept():
    """Inside, new tensors belong to no call: none is an inference tensor or one of torch.func's.

    For what is computed from the layout alone and used again, perhaps to train. torch.compile
    traces through.
    """
    if torch.compiler.is_compiling():
        yield
        return
    with torch.inference_mode(False), torch._C._DisableFuncTorch():
        yield


def _plain(x: torch.Tensor) -> torch.Tensor:
    """Integers as they are below torch.func's transforms: they have no derivative."""
    if not torch.compiler.is_compiling():
        while torch._C._functorch.is_functorch_wrapped_tensor(x):
            x = torch._C._functorch.get_unwrapped(x)
    return x


@dataclass(frozen=True, eq=False)
class TokenRule:
    """Which token pairs of a *partial* block are kept.

    A pair is kept if either token is context, or the tokens lie in different grids, or the key
    lies in one of the first ``sink_frames`` frames of its grid, or

    - "disc", "raster": ``distance(query, key) <= limits[|frame difference|]``, where ``distance``
      is ``dy² + dx²`` for "disc" and ``|raster index difference|`` inside a frame for "raster";
    - "box": frame, row and column of the key each lie between those of the query's first and last
      corner, both included. Frames, rows and columns may be numbered in any order.

    Attributes:
        metric: "disc", "raster" or "box".
        limits: ``[frames]`` int32; -1 keeps nothing at that frame distance. Empty for "box".
        sink_frames: leading frames every query sees.
        q_frame, kv_frame: ``[num positions]`` int32, ``grid << 16 | frame``; -1 for context.
        q_place, kv_place: ``[num positions]`` int32, ``y << place_bits | x`` for "disc" and "box",
            the raster index for "raster". For "box" ``q_frame`` and ``q_place`` are those of the
            first corner. All are in block order (position, not token).
        q_frame_last, q_place_last: ``[num queries]`` int32, the last corner for "box"; None
            otherwise.
        place_bits: low bits of a place that hold the column; 16 for "disc".
    """

    metric: str
    limits: torch.Tensor
    q_frame: torch.Tensor
    q_place: torch.Tensor
    kv_frame: torch.Tensor
    kv_place: torch.Tensor
    sink_frames: int = 0
    q_frame_last: torch.Tensor | None = None
    q_place_last: torch.Tensor | None = None
    place_bits: int = 16

    @classmethod
    def from_layout(
        cls,
        layout: Layout,
        metric: str,
        limits,
        order: torch.Tensor | None = None,
        sink_frames: int = 0,
        extra_keys: int = 0,
    ) -> TokenRule:
        """The rule for self-attention over ``layout`` and ``extra_keys`` keys without a place.

        Raises:
            ValueError: no metric that is a distance, or a grid too large for it.
        """
        if metric not in DISTANCES:
            raise ValueError(f"metric must be one of {', '.join(DISTANCES)}, got {metric!r}")
        for grid in layout.grids:
            if metric == "disc" and max(grid.height, grid.width) > _MOST_ROWS:
                raise ValueError(
                    f"a grid of {grid.height} x {grid.width} tokens is too large for distances in "
                    f"the plane: at most {_MOST_ROWS} rows and as many columns"
                )
        at = torch.from_numpy(layout.coordinates())
        if order is not None:
            at = at[order.long()]
        grid, frame, y, x = at.unbind(1)
        code = torch.where(grid < 0, -1, grid << 16 | frame).int()
        if metric == "disc":
            place = y << 16 | x
        else:
            widths = torch.tensor([g.width for g in layout.grids] or [1], dtype=torch.int32)
            place = y * widths[grid.clamp_min(0)] + x
        place = torch.where(grid < 0, 0, place).int()
        extra = torch.full((extra_keys,), -1, dtype=torch.int32)
        return cls(
            metric,
            torch.as_tensor(limits, dtype=torch.int32),
            code,
            place,
            torch.cat([code, extra]),
            torch.cat([place, extra * 0]),
            sink_frames,
        )

    def keep(self, q_positions: torch.Tensor, kv_positions: torch.Tensor) -> torch.Tensor:
        """Bool, broadcast over ``q_positions`` and ``kv_positions`` (integer tensors)."""
        q_frame, kv_frame = self.q_frame[q_positions], self.kv_frame[kv_positions]
        q_place, kv_place = self.q_place[q_positions], self.kv_place[kv_positions]
        free = (q_frame < 0) | (kv_frame < 0) | (q_frame >> 16 != kv_frame >> 16)
        free = free | ((kv_frame & 0xFFFF) < self.sink_frames)
        if self.metric == "box":
            frame_last, place_last = self.q_frame_last[q_positions], self.q_place_last[q_positions]
            inside = (q_frame <= kv_frame) & (kv_frame <= frame_last)
            y, x = self.row_and_column(kv_place)
            for key, first, last in zip(
                (y, x), self.row_and_column(q_place), self.row_and_column(place_last)
            ):
                inside = inside & (first <= key) & (key <= last)
            return free | inside
        if self.metric == "disc":
            (q_y, q_x), (y, x) = self.row_and_column(q_place), self.row_and_column(kv_place)
            distance = (q_y - y) ** 2 + (q_x - x) ** 2
        else:
            distance = (q_place - kv_place).abs()
        apart = (q_frame - kv_frame).abs().clamp_max(self.limits.numel() - 1)
        return free | (distance <= self.limits[apart.long()])

    def at(self, q_positions: torch.Tensor, kv_positions: torch.Tensor) -> TokenRule:
        """The rule between these positions, ``[n]`` integers, which are numbered anew."""
        queries, keys = ("q_frame", "q_place", *LAST), ("kv_frame", "kv_place")
        chosen = {name: getattr(self, name) for name in (*queries, *keys)}
        for name, x in chosen.items():
            if x is not None:
                chosen[name] = x[q_positions if name in queries else kv_positions]
        return dataclasses.replace(self, **chosen)

    def row_and_column(self, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a place of the metrics "disc" and "box" is made of."""
        return place >> self.place_bits, place & (1 << self.place_bits) - 1


class PlanTensors(NamedTuple):
    """A plan as the flat arguments every backend op takes. Shapes as in :class:`Plan`."""

    kv_indices: torch.Tensor
    kv_num_blocks: torch.Tensor
    kv_num_full_blocks: torch.Tensor
    q_starts: torch.Tensor
    q_lengths: torch.Tensor
    kv_starts: torch.Tensor
    kv_lengths: torch.Tensor
    q_order: torch.Tensor | None
    kv_order: torch.Tensor | None
    kv_log_weight: torch.Tensor | None
    out_scale: torch.Tensor | None
    out_residual: torch.Tensor | None
    tail_lse: torch.Tensor | None
    tail_value: torch.Tensor | None
    tail_index: torch.Tensor | None
    limits: torch.Tensor | None
    q_frame: torch.Tensor | None
    q_place: torch.Tensor | None
    kv_frame: torch.Tensor | None
    kv_place: torch.Tensor | None
    q_frame_last: torch.Tensor | None
    q_place_last: torch.Tensor | None
    q_indices: torch.Tensor | None
    q_first: torch.Tensor | None
    q_num_blocks: torch.Tensor | None
    q_num_full_blocks: torch.Tensor | None
    worklist: torch.Tensor | None  # a backend's own; see Plan.worklist
    run_rows: torch.Tensor | None  # [r] int64 rows that may be runs; None: not known
    metric: int  # 0: no rule, 1: disc, 2: raster, 3: box
    sink_frames: int
    place_bits: int
    q_block_size: int
    kv_block_size: int
    q_ragged: int = 1
    kv_ragged: int = 1
    wants_lse: int = 1  # 0: nobody looks at lse, here or in the backward pass


def for_training(value):
    """``value`` without inference tensors: plans are kept, and training may meet them later.

    Takes tensors, blocks and rules, and leaves anything else as it is.
    """
    if isinstance(value, torch.Tensor):
        if not value.is_inference():
            return value
        with torch.inference_mode(False):
            return value.clone()
    if isinstance(value, Blocks):
        changed = [for_training(x) for x in value]
        return value if all(a is b for a, b in zip(changed, value)) else Blocks(*changed)
    if isinstance(value, TokenRule):
        changed = {name: for_training(x) for name, x in vars(value).items()}
        same = all(x is getattr(value, name) for name, x in changed.items())
        return value if same else TokenRule(**changed)
    return value


def _range_error(name: str, x: torch.Tensor, low: int, high: int) -> str | None:
    if x.numel() and (int(x.min()) < low or int(x.max()) > high):
        return f"{name} must lie in {low}..{high}, found {int(x.min())}..{int(x.max())}"
    return None


# What a plan reads off its tensors when it is made.
_READ_ONCE = (
    *("num_queries", "num_keys", "q_block_size", "kv_block_size", "q_ragged", "kv_ragged"),
    "is_dense",
)


@dataclass(frozen=True, eq=False)
class Plan:
    """A block-sparse attention pattern, in the words of PyTorch's BlockMask. Frozen, validated.

    Attributes:
        kv_indices: ``[B|1, H|1, nQ, maxK]`` int32. Key blocks each query block sees, full blocks
            before partial ones; entries from ``kv_num_blocks`` on are ignored.
        kv_num_blocks: ``[B|1, H|1, nQ]`` int32. How many entries of ``kv_indices`` count. More than
            maxK stands for a *run*: key blocks ``0 ... kv_num_blocks - 1``, all full, with zeros in
            ``kv_indices``. So a few rows that see everything do not make every list as wide.
        kv_num_full_blocks: same shape. How many of those are full; the rest apply ``rule``.
        q_blocks, kv_blocks: the partitions (:class:`~dittfast.layout.Blocks`). Every query stands
            in exactly one block; a key stands in at most one.
        rule: which pairs of a partial block are kept.
        kv_log_weight: ``[B|1, H|1, num_keys]`` fp32 added to the scaled logits: the log of how
            many tokens a key stands for; -inf hides it.
        out_scale: ``[B|1, H|1, nQ]``, positive, and out_residual: ``[B|1, H|1, nQ, D]``: the
            epilogue ``out = out_scale * softmax(...) v + out_residual``, per query block.
        tail_lse: ``[B|1, H|1, nQ]`` fp32, and tail_value: ``[B|1, H|1, nQ, D]``: the *tail*, one
            key more in the softmax of every query of a block, whose logit is ``tail_lse`` (natural
            log; -inf for none) and whose value is ``tail_value``. It stands for what is not listed
            and is part of lse; the epilogue comes after it. A row with a tail may list nothing.
        tail_index: ``[num_queries]`` int32 where the tail differs from query to query: each query's
            row of ``tail_value [B|1, H|1, nT, D]``, with ``tail_lse [B|1, H|1, num_queries]``, both
            in token order. None: both are per query block.
        num_real_keys: keys that are tokens of the sequence; later ones are appended summaries,
            which count as work but not towards ``density``.
        num_partial_pairs: token pairs ``rule`` keeps in all partial blocks together, for a
            planner that knows the number and hides no key of those blocks. None: counted, pair
            by pair, when ``density`` or ``flops`` is first asked for.
        q_ragged, kv_ragged: whether a partition is more than blocks of one size, one behind the
            other, of which the last may be shorter; no fields.
        is_dense: whether every query sees every key and nothing is weighted, so that dense
            attention gives the same; not a field, and False for plans made from q and k.

    Raises:
        ValueError: an index out of range or listed twice, a query block that sees nothing, a
            partition with holes, inconsistent shapes. The message names the value and the place.
    """

    kv_indices: torch.Tensor
    kv_num_blocks: torch.Tensor
    kv_num_full_blocks: torch.Tensor
    q_blocks: Blocks
    kv_blocks: Blocks
    rule: TokenRule | None = None
    kv_log_weight: torch.Tensor | None = None
    out_scale: torch.Tensor | None = None
    out_residual: torch.Tensor | None = None
    tail_lse: torch.Tensor | None = None
    tail_value: torch.Tensor | None = None
    tail_index: torch.Tensor | None = None
    num_real_keys: int | None = None
    num_partial_pairs: int | None = None
    validate: dataclasses.InitVar[bool] = True

    def __post_init__(self, validate: bool):
        set_ = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        for field in dataclasses.fields(self):
            set_(field.name, for_training(getattr(self, field.name)))
        for blocks, side in ((self.q_blocks, "q"), (self.kv_blocks, "kv")):
            # Plain values, read once: later use must not synchronise with a device.
            total, size, ragged = _covered(blocks, side)
            set_(f"num_{'queries' if side == 'q' else 'keys'}", total)
            set_(f"{side}_block_size", size)
            set_(f"{side}_ragged", ragged)
        for name in ("kv_indices", "kv_num_blocks", "kv_num_full_blocks"):
            set_(name, _plain(getattr(self, name)))
        if self.tail_index is not None:
            set_("tail_index", _plain(self.tail_index))
        if self.num_real_keys is None:
            set_("num_real_keys", self.num_keys)
        set_("_transpose", None)
        set_("_worklists", {})
        set_("_run_rows", None)
        if validate:
            with to_be_kept():  # reads values, which torch.func's tensors do not have
                self._validate()
        added = self.kv_log_weight, self.out_scale, self.out_residual, self.tail_lse
        bare = all(x is None for x in added)
        least = int(self.kv_num_full_blocks.min()) if bare else 0
        set_("is_dense", least == self.kv_blocks.count)

    @classmethod
    def from_lists(
        cls,
        rows: torch.Tensor,
        cols: torch.Tensor,
        full: torch.Tensor,
        q_blocks: Blocks,
        kv_blocks: Blocks,
        **fields: Any,
    ) -> Plan:
        """A plan for every batch row and head from a list of block pairs, in any order.

        Args:
            rows, cols: integer arrays of equal length: the visible (query block, key block) pairs.
            full: bool array: whether every token pair of the block pair is kept.
        """
        lists = ListBuilder(q_blocks.count, kv_blocks.count)
        lists.add((rows, cols, full))
        return cls(*lists.lists(), q_blocks, kv_blocks, **fields)

    @classmethod
    def from_block_mask(
        cls, mask: torch.Tensor, q_blocks: Blocks, kv_blocks: Blocks, **fields: Any
    ) -> Plan:
        """A plan of full blocks from a bool mask ``[(B|1), (H|1), nQ, nK]``."""
        while mask.ndim < 4:
            mask = mask[None]
        indices, count = lists_of_mask(mask)
        return cls(indices, count, count.clone(), q_blocks, kv_blocks, **fields)

    @classmethod
    def full(
        cls, num_queries: int, num_keys: int | None = None, block_size: int = 128, **fields: Any
    ) -> Plan:
        """Dense attention as a plan: every query block sees every key block."""
        blocks = [
            make_blocks(*split_evenly(0, n, block_size))
            for n in (num_queries, num_keys or num_queries)
        ]
        lists = ListBuilder(*(x.count for x in blocks))
        lists.add_runs(np.arange(blocks[0].count), blocks[1].count)
        return cls(*lists.lists(), *blocks, **fields)

    def _validate(self) -> None:
        shape = tuple(self.kv_indices.shape)
        n_q, n_k = self.q_blocks.count, self.kv_blocks.count
        errors = []
        if len(shape) != 4 or shape[2] != n_q:
            raise ValueError(f"kv_indices must be [B|1, H|1, {n_q}, maxK], got {list(shape)}")
        for name in ("kv_num_blocks", "kv_num_full_blocks"):
            if tuple(getattr(self, name).shape) != shape[:3]:
                raise ValueError(
                    f"{name} must be {list(shape[:3])} like kv_indices, "
                    f"got {list(getattr(self, name).shape)}"
                )
        for name in ("kv_indices", "kv_num_blocks", "kv_num_full_blocks"):
            if getattr(self, name).dtype != torch.int32:
                raise ValueError(f"{name} must be int32, got {getattr(self, name).dtype}")
        # Only zeros mark a run: a count that is merely wrong does not pass for one.
        longer = self.kv_num_blocks > shape[3]
        is_run = longer & (self.kv_num_blocks <= n_k)
        is_run[longer] &= ~(self.kv_indices[longer] != 0).any(-1)
        runs = torch.where(is_run, self.kv_num_blocks, 0)
        listed = torch.where(runs > 0, 1, self.kv_num_blocks)
        errors.append(_range_error("kv_num_blocks", listed, 0, shape[3]))
        if bool(((runs > 0) & (self.kv_num_full_blocks < runs)).any()):
            errors.append("all blocks of a run must be full")
        if self.tail_lse is None and bool((self.kv_num_blocks < 1).any()):
            b, h, row = (int(x) for x in (self.kv_num_blocks < 1).nonzero()[0])
            errors.append(
                f"query block {row} (batch {b}, head {h}) sees no key block; "
                "every row must keep at least one key, or have a tail"
            )
        if bool((self.kv_num_full_blocks > self.kv_num_blocks).any()):
            errors.append("kv_num_full_blocks exceeds kv_num_blocks")
        if bool((self.kv_num_full_blocks < 0).any()):
            least = int(self.kv_num_full_blocks.min())
            errors.append(f"kv_num_full_blocks must be at least 0, found {least}")
        if self.rule is None and bool((self.kv_num_full_blocks < self.kv_num_blocks).any()):
            errors.append("partial blocks need a rule; list them as full, or give rule=TokenRule")
        low, high, repeated = entry_range(self.kv_indices, listed)
        if low < 0 or high >= n_k:
            errors.append(f"kv_indices must lie in 0..{n_k - 1}, found {low}..{high}")
        if repeated is not None:
            b, h, row, block = repeated
            errors.append(f"query block {row} (batch {b}, head {h}) lists key block {block} twice")
        errors.append(self._shape_error("kv_log_weight", (self.num_keys,)))
        errors.append(self._shape_error("out_scale", (n_q,)))
        if self.out_residual is not None:
            errors.append(self._shape_error("out_residual", (n_q, self.out_residual.shape[-1])))
        if self.out_scale is not None and not bool((self.out_scale > 0).all()):
            errors.append(f"out_scale must be positive, found {float(self.out_scale.min())}")
        errors += self._tail_errors()
        if not 0 < self.num_real_keys <= self.num_keys:
            errors.append(f"num_real_keys must lie in 1..{self.num_keys}, got {self.num_real_keys}")
        errors = [e for e in errors if e]
        if errors:
            raise ValueError("invalid Plan: " + "; ".join(errors))

    def _tail_errors(self) -> list[str | None]:
        lse, value, index = self.tail_lse, self.tail_value, self.tail_index
        if (lse is None) != (value is None) or (lse is None and index is not None):
            given = [n for n in TAIL if getattr(self, n) is not None]
            return [f"tail_lse and tail_value belong together, got {' and '.join(given)} alone"]
        if lse is None:
            return []
        errors, rows, logits = [], self.q_blocks.count, self.q_blocks.count
        if index is not None:
            rows, logits = value.shape[2] if value.ndim > 2 else 0, self.num_queries
            if tuple(index.shape) != (self.num_queries,) or index.dtype != torch.int32:
                got = f"{list(index.shape)} {index.dtype}"
                errors.append(f"tail_index must be [{self.num_queries}] int32, got {got}")
            errors.append(_range_error("tail_index", index, 0, rows - 1))
        errors.append(self._shape_error("tail_lse", (logits,)))
        errors.append(self._shape_error("tail_value", (rows, value.shape[-1])))
        if lse.dtype not in (torch.float32, torch.float64):
            errors.append(f"tail_lse must be float32 or float64, got {lse.dtype}")
        if not value.dtype.is_floating_point:
            errors.append(f"tail_value must be of a floating-point dtype, got {value.dtype}")
        wrong = lse[torch.isnan(lse) | (lse == torch.inf)]
        if wrong.numel():
            errors.append(f"tail_lse must be finite, or -inf for no tail, found {float(wrong[0])}")
        if not bool(torch.isfinite(value).all()):
            worst = float(value[~torch.isfinite(value)][0])
            errors.append(f"tail_value must be finite, also where tail_lse is -inf, found {worst}")
        return errors

    def _shape_error(self, name: str, tail: tuple[int, ...]) -> str | None:
        x = getattr(self, name)
        if x is None or (x.ndim == 2 + len(tail) and tuple(x.shape[2:]) == tail):
            return None
        return f"{name} must be [B|1, H|1, {', '.join(map(str, tail))}], got {list(x.shape)}"

    @property
    def device(self) -> torch.device:
        return self.kv_indices.device

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors, with the transposed lists and work lists made so far."""
        return nbytes(vars(self))

    def to(self, device: torch.device | str) -> Plan:
        """The same plan on ``device``; itself where it is there already."""
        device = torch.device(device)
        if device == self.device or (device.type == self.device.type and device.index is None):
            return self
        if self.device.type == "cpu":
            self.run_rows()  # now, where it waits for no device
        move = lambda x: x.to(device) if isinstance(x, (torch.Tensor, Blocks)) else x  # noqa: E731
        fields = {f.name: move(getattr(self, f.name)) for f in dataclasses.fields(self)}
        if self.rule is not None:
            rule = {f.name: move(getattr(self.rule, f.name)) for f in dataclasses.fields(TokenRule)}
            fields["rule"] = TokenRule(**rule)
        moved = Plan(**fields, validate=False)
        if self._run_rows is not None:
            object.__setattr__(moved, "_run_rows", self._run_rows.to(device))
        return moved

    def replace(self, **changes: Any) -> Plan:
        """A validated copy with some fields changed."""
        if not changes.keys() <= {"out_scale", "out_residual", *TAIL, "num_real_keys"}:
            changes.setdefault("num_partial_pairs", None)
        return dataclasses.replace(self, validate=True, **changes)

    def with_lists(
        self,
        kv_indices: torch.Tensor,
        kv_num_blocks: torch.Tensor,
        run_rows: torch.Tensor | None = None,
        **fields: torch.Tensor | None,
    ) -> Plan:
        """This partition with other lists, all of them full blocks; *not* validated.

        For methods that make lists at every call: nothing is checked and nothing waits for a
        device, here and later. ``fields`` may set ``kv_log_weight``, ``out_scale``,
        ``out_residual`` and the tail. :meth:`replace` validates the result.

        Args:
            run_rows: ``[r]`` int64, every row that may be a run; None where none is. Gradients
                miss a run that is not among them.
        """
        if run_rows is None:
            run_rows = kv_indices.new_empty(0, dtype=torch.int64)
        count = _plain(kv_num_blocks)
        lists = {"kv_indices": _plain(kv_indices), "kv_num_blocks": count}
        lists["kv_num_full_blocks"] = count
        # Whether it is dense is not looked at: that would wait for the device.
        none = {"rule": None, "num_partial_pairs": None, "is_dense": False, "_run_rows": run_rows}
        return self._copy(lists | none | fields)

    def only_rows(self, rows: torch.Tensor) -> Plan:
        """The plan in which the other query blocks list nothing, and so cost nothing.

        What attention gives for their queries is for the caller to replace: 0, or what a tail and
        an epilogue make of that. Nothing is checked, so ``torch.compile`` can trace it.

        Args:
            rows: ``[B|1, H|1, nQ]`` bool, the query blocks that are computed.
        """
        shape = torch.broadcast_shapes(rows.shape, self.kv_num_blocks.shape)
        lists = {"kv_indices": self.kv_indices.expand(*shape, -1)}
        for name in ("kv_num_blocks", "kv_num_full_blocks"):
            lists[name] = getattr(self, name).expand(shape).masked_fill(~rows, 0)
        return self._copy({**lists, "num_partial_pairs": None, "is_dense": False})

    def select_heads(self, heads: slice) -> Plan:
        """The plan of some heads, for context parallelism, where a rank holds a slice of them.

        Itself where all heads are alike. Nothing is checked, so ``torch.compile`` can trace it.
        """
        names = ("kv_indices", "kv_num_blocks", "kv_num_full_blocks")
        names += ("kv_log_weight", "out_scale", "out_residual", "tail_lse", "tail_value")
        given = {name: getattr(self, name) for name in names}
        per_head = {n: x[:, heads] for n, x in given.items() if x is not None and x.shape[1] > 1}
        return self._copy(per_head) if per_head else self

    def part(self, queries: torch.Tensor, keys: torch.Tensor) -> Plan:
        """This pattern between some of its queries and some of its keys, in the order given.

        The parts over keys that share none are this plan: their outputs, merged by lse, are its
        output. A query may see no key of a part, so it is not validated; there attention gives 0
        and lse -inf. Waits for the device.

        Args:
            queries, keys: ``[n]`` int64 tokens, none twice.

        Raises:
            ValueError: a plan with an epilogue, a tail or summaries, which are of all keys.
        """
        if self.num_real_keys != self.num_keys:
            more = self.num_keys - self.num_real_keys
            raise ValueError(f"a plan with {more} summaries has no parts: they are of all keys")
        for name in ("out_scale", "out_residual", "tail_lse"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"a plan with {name} has no parts: it belongs to all keys of a query together"
                )
        q_blocks, rows, q_at = _blocks_of_part(self.q_blocks, queries)
        kv_blocks, kept, kv_at = _blocks_of_part(self.kv_blocks, keys)
        lists = lists_of_part(*self._lists, rows.nonzero()[:, 0], kept)
        rule, weight = self.rule, self.kv_log_weight
        if rule is not None:
            rule = rule.at(q_at, kv_at)
        if weight is not None:
            weight = weight[..., keys]
        return Plan(*lists, q_blocks, kv_blocks, rule, kv_log_weight=weight, validate=False)

    def keys_seen(self, queries: torch.Tensor) -> torch.Tensor:
        """``[num_keys]`` bool: keys in blocks that the blocks of these queries see, in any head.

        Args:
            queries: ``[n]`` int64 tokens.
        """
        rows = _blocks_of_part(self.q_blocks, queries)[1].nonzero()[:, 0]
        indices, count = (x.index_select(2, rows) for x in self._lists[:2])
        block = torch.arange(self.kv_blocks.count, device=self.device)
        seen = block < run_lengths(indices, count).max()
        seen[indices[used_entries(indices, count)].long()] = True
        return seen[_block_of_token(*self.kv_blocks, self.num_keys)]

    def _copy(self, changes: dict) -> Plan:
        """Unchecked, and without what was computed from the lists: names with an underscore."""
        plan = object.__new__(Plan)
        # Field by field: Dynamo of PyTorch 2.9 traces no __dict__ of a frozen dataclass.
        names = [*(field.name for field in dataclasses.fields(self)), *_READ_ONCE]
        made = {"_transpose": None, "_worklists": {}, "_run_rows": self._run_rows}
        values = {name: getattr(self, name) for name in names} | made | changes
        for name, value in values.items():
            object.__setattr__(plan, name, value)
        return plan

    def tensors(
        self, kv_log_weight: torch.Tensor | None = None, backend: str | None = None
    ) -> PlanTensors:
        """The arguments of a backend op; ``kv_log_weight`` is added to the plan's own.

        The transposed lists are included once :meth:`transpose` has been called, and ``backend``'s
        work list once :meth:`worklist` has.
        """
        weight = self.kv_log_weight
        if kv_log_weight is not None:
            weight = kv_log_weight if weight is None else weight + kv_log_weight
        back = self._transpose or (None,) * len(Transpose._fields)
        rule = self.rule
        return PlanTensors(
            self.kv_indices,
            self.kv_num_blocks,
            self.kv_num_full_blocks,
            self.q_blocks.starts,
            self.q_blocks.lengths,
            self.kv_blocks.starts,
            self.kv_blocks.lengths,
            self.q_blocks.order,
            self.kv_blocks.order,
            weight,
            self.out_scale,
            self.out_residual,
            *(getattr(self, name) for name in TAIL),
            *((None,) * 7 if rule is None else (rule.limits, rule.q_frame, rule.q_place)),
            *(() if rule is None else (rule.kv_frame, rule.kv_place)),
            *(() if rule is None else (rule.q_frame_last, rule.q_place_last)),
            *back,
            self._worklists.get(backend),
            self._run_rows,
            0 if rule is None else 1 + METRICS.index(rule.metric),
            0 if rule is None else rule.sink_frames,
            0 if rule is None else rule.place_bits,
            self.q_block_size,
            self.kv_block_size,
            int(self.q_ragged),
            int(self.kv_ragged),
        )

    def transpose(self) -> Transpose:
        """For each key block the query blocks that see it, full ones first; computed once."""
        if self._transpose is None:
            with torch.inference_mode(False):
                lists = transpose_lists(*self._lists, self.kv_blocks.count, self._run_rows)
            object.__setattr__(self, "_transpose", lists)
        return self._transpose

    def run_rows(self) -> torch.Tensor:
        """``[r]`` int64, every row that is a run, or may be one.

        Looked up once where nobody said it when the plan was made; that waits for the device.
        """
        if self._run_rows is None:
            with torch.inference_mode(False):
                rows = rows_of_runs(self.kv_indices, self.kv_num_blocks)
            object.__setattr__(self, "_run_rows", rows)
        return self._run_rows

    def worklist(self, backend: str, make: Callable[[PlanTensors], torch.Tensor]) -> torch.Tensor:
        """How ``backend`` goes about this plan, an int32 tensor from ``make``; computed once."""
        if backend not in self._worklists:
            with torch.inference_mode(False):
                self._worklists[backend] = make(self.tensors())
        return self._worklists[backend]

    def to_block_mask(self) -> torch.Tensor:
        """``[B|1, H|1, nQ, nK]`` bool: True where a block is visible, wholly or partly."""
        return block_states(*self._lists, self.kv_blocks.count) > 0

    def to_dense_mask(self) -> torch.Tensor:
        """``[B|1, H|1, num_queries, num_keys]`` bool in *token* order; memory is quadratic.

        For tests, pictures and the reference backend. Keys hidden by ``kv_log_weight`` still
        show as kept: the weight is added to the logits, it is not part of the pattern.
        """
        return dense_mask(self.tensors(), self.num_queries, self.num_keys)

    @property
    def _lists(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.kv_indices, self.kv_num_blocks, self.kv_num_full_blocks

    @property
    def has_runs(self) -> bool:
        """Whether some row is a run. Waits for the device."""
        return bool((run_lengths(self.kv_indices, self.kv_num_blocks) > 0).any())

    def _used(self) -> torch.Tensor:
        return used_entries(self.kv_indices, self.kv_num_blocks)

    def _key_counts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """1 for every key position that is there: (of the real tokens, of all keys), fp64."""
        weight = self.kv_log_weight
        shown = torch.ones(1, 1, self.num_keys, dtype=torch.float64, device=self.device)
        if weight is not None:
            shown = torch.isfinite(weight).double()
        position = torch.arange(self.num_keys, device=self.device)
        token = position if self.kv_blocks.order is None else self.kv_blocks.order.long()
        shown = shown[..., token]
        return shown * (token < self.num_real_keys), shown

    def _full_pairs(self, keys: torch.Tensor) -> torch.Tensor:
        """Pairs in full blocks, a mean over batch rows and heads; ``keys`` as `_key_counts`."""
        used = self._used()
        slot = torch.arange(used.shape[-1], device=self.device)
        used = used & (slot < self.kv_num_full_blocks[..., None])
        # Visible keys per key block, for each batch row and head the weight tells apart.
        edges = torch.nn.functional.pad(keys.cumsum(-1), (1, 0))
        starts = self.kv_blocks.starts.long()
        per_block = edges[..., starts + self.kv_blocks.lengths] - edges[..., starts]
        shape = torch.broadcast_shapes(self.kv_indices.shape[:2], per_block.shape[:2])
        per_block = per_block.expand(*shape, -1)
        index = self.kv_indices.expand(*shape, -1, -1).long()
        seen = torch.where(used, index, 0)
        weights = torch.gather(per_block[:, :, None].expand(*shape, index.shape[2], -1), 3, seen)
        runs = run_lengths(self.kv_indices, self.kv_num_blocks).expand(*shape, -1).long()
        before = torch.nn.functional.pad(per_block.cumsum(-1), (1, 0))
        rows = ((weights * used).sum(-1) + before.gather(-1, runs)) * self.q_blocks.lengths
        return rows.sum() / (shape[0] * shape[1])

    def listed_density(self) -> torch.Tensor:
        """:attr:`density` as a 0-d fp64 tensor, without waiting for the device.

        Counts full blocks only, which are all a method that plans from q and k makes.
        """
        real = self._key_counts()[0]
        return self._full_pairs(real) / (self.num_queries * real.sum(-1).mean())

    def listed_work(self) -> torch.Tensor:
        """The same of all pairs computed, those with summaries and tails among them."""
        real, shown = self._key_counts()
        pairs = self._full_pairs(shown) + self._num_tails()
        return pairs / (self.num_queries * real.sum(-1).mean())

    @cached_property
    def _pairs(self) -> tuple[float, float]:
        """Mean over batch rows and heads of (real token pairs kept, all pairs computed)."""
        real, shown = self._key_counts()
        totals = [float(self._full_pairs(keys)) for keys in (real, shown)]
        totals[1] += float(self._num_tails())
        used = self._used()
        full = torch.arange(used.shape[-1], device=self.device)
        full = full < self.kv_num_full_blocks[..., None]
        if self.num_partial_pairs is not None:
            return totals[0] + self.num_partial_pairs, totals[1] + self.num_partial_pairs
        partial = (used & ~full).nonzero()
        if self.rule is not None and partial.numel():
            lists = self.kv_indices.shape[:2]
            for n, keys in enumerate((real, shown)):
                for dim in (0, 1):
                    if lists[dim] == 1:
                        keys = keys.mean(dim, keepdim=True)
                keys = keys.expand(*lists, -1)
                step = max(1, _PAIRS_AT_ONCE // (self.q_block_size * self.kv_block_size))
                for chunk in partial.split(step):
                    b, h, row, at = chunk.unbind(1)
                    col = self.kv_indices[b, h, row, at].long()
                    keep, kv_at = self._partial_keep(row, col)
                    shown_here = keys[b[:, None], h[:, None], kv_at]
                    totals[n] += float((keep.sum(1) * shown_here).sum()) / (lists[0] * lists[1])
        return totals[0], totals[1]

    def _num_tails(self) -> torch.Tensor | float:
        """How many queries have a tail; a mean over batch rows and heads."""
        if self.tail_lse is None:
            return 0.0
        there = torch.isfinite(self.tail_lse).double()
        if self.tail_index is None:
            there = there * self.q_blocks.lengths
        return there.sum(-1).mean()

    def _partial_keep(self, rows: torch.Tensor, cols: torch.Tensor):
        """Kept pairs ``[n, q_block, kv_block]`` of partial blocks and their key positions."""
        q_at, q_in = block_positions(
            self.q_blocks.starts, self.q_blocks.lengths, rows, self.q_block_size
        )
        kv_at, kv_in = block_positions(
            self.kv_blocks.starts, self.kv_blocks.lengths, cols, self.kv_block_size
        )
        keep = self.rule.keep(q_at[:, :, None], kv_at[:, None, :])
        return keep & q_in[:, :, None] & kv_in[:, None, :], kv_at

    @property
    def density(self) -> float:
        """Kept fraction of the real token pairs, averaged over batch rows and heads.

        Appended summaries and tails are no tokens of the sequence and keys hidden by -inf are not
        there at all: none counts, in the numerator or the denominator.
        """
        real = float(self.num_real_keys)
        if self.kv_log_weight is not None:
            real = float(
                torch.isfinite(self.kv_log_weight[..., : self.num_real_keys])
                .double()
                .sum(-1)
                .mean()
            )
        return self._pairs[0] / (self.num_queries * real)

    def flops(self, head_dim: int, heads: int = 1, batch: int = 1, backward: bool = False) -> float:
        """Useful floating-point operations: 2 matrix products forward, 5 more backward.

        Counts every pair the softmax sees, appended summaries and tails included; block padding
        and the softmax itself are not useful work and do not count.
        """
        products = 7 if backward else 2
        return 2.0 * products * self._pairs[1] * head_dim * heads * batch

    def __repr__(self) -> str:
        return (
            f"Plan({self.num_queries} queries x {self.num_keys} keys, "
            f"{self.q_blocks.count} x {self.kv_blocks.count} blocks, lists "
            f"[{self.kv_indices.shape[0]}, {self.kv_indices.shape[1]}])"
        )


def _covered(blocks: Blocks, side: str) -> tuple[int, int, bool]:
    """Positions a partition covers, its block size, and whether it is ragged.

    Raises:
        ValueError: positions are not 0..n-1 without overlap.
    """
    starts, lengths = blocks.starts.long().cpu(), blocks.lengths.long().cpu()
    if starts.numel() == 0 or starts.shape != lengths.shape or int(lengths.min()) < 1:
        raise ValueError(f"{side} blocks need equally many starts and lengths, all lengths >= 1")
    by = torch.argsort(starts)
    ends = (starts + lengths)[by]
    if int(starts[by][0]) != 0 or not torch.equal(starts[by][1:], ends[:-1]):
        raise ValueError(f"{side} blocks must cover positions 0..n-1 once each, without holes")
    total = int(ends[-1])
    if blocks.order is not None:
        seen = torch.sort(blocks.order.long().cpu()).values
        if not torch.equal(seen, torch.arange(total)):
            raise ValueError(f"{side} order must be a permutation of 0..{total - 1}")
    size = int(lengths.max())
    ragged = not torch.equal(starts, torch.arange(starts.numel()) * size)
    return total, size, ragged


def block_positions(starts, lengths, blocks: torch.Tensor, block_size: int):
    """``[n, block_size]`` positions of some blocks and which of them exist (others repeat)."""
    offset = torch.arange(block_size, device=starts.device)
    inside = offset < lengths[blocks][:, None]
    return starts[blocks].long()[:, None] + torch.where(inside, offset, 0), inside


def query_blocks(t: PlanTensors, num_queries: int | None = None) -> torch.Tensor:
    """``[num_queries]`` int64: the query block of each token. Waits for the device where None."""
    return _block_of_token(t.q_starts, t.q_lengths, t.q_order, num_queries)


def _block_of_token(starts, lengths, order, num_tokens: int | None = None) -> torch.Tensor:
    """``[num_tokens]`` int64: the block of each token. Waits for the device where None."""
    by = torch.argsort(starts)
    block = torch.repeat_interleave(by, lengths[by].long(), output_size=num_tokens)
    if order is None:
        return block
    return torch.empty_like(block).index_copy_(0, order.long(), block)


def _blocks_of_part(blocks: Blocks, tokens: torch.Tensor):
    """What is left of a partition of some tokens, ``[n]`` int64, which are numbered anew.

    Returns:
        The blocks that are left, ``[blocks]`` bool which those are, and ``[n]`` the old positions.
    """
    total = int(blocks.lengths.sum())
    number = torch.full((total,), -1, dtype=torch.int64, device=tokens.device)
    number[tokens] = torch.arange(len(tokens), device=tokens.device)
    number = number if blocks.order is None else number[blocks.order.long()]
    inside = number >= 0
    before = torch.nn.functional.pad(inside.cumsum(0), (1, 0))
    starts = blocks.starts.long()
    first, last = before[starts], before[starts + blocks.lengths]
    kept, positions = last > first, inside.nonzero()[:, 0]
    order = number[positions].int()
    if torch.equal(order, torch.arange(len(order), dtype=order.dtype, device=order.device)):
        order = None
    return Blocks(first[kept].int(), (last - first)[kept].int(), order), kept, positions


def token_rule(t: PlanTensors) -> TokenRule | None:
    """The plan's rule from the op's arguments."""
    if not t.metric:
        return None
    places = t.q_frame, t.q_place, t.kv_frame, t.kv_place
    last = t.q_frame_last, t.q_place_last
    return TokenRule(METRICS[t.metric - 1], t.limits, *places, t.sink_frames, *last, t.place_bits)


def dense_mask(t: PlanTensors, num_queries: int, num_keys: int) -> torch.Tensor:
    """:meth:`Plan.to_dense_mask` from the op's arguments."""
    device = t.kv_indices.device
    q_start = torch.argsort(t.q_starts)
    # Positions are covered in order of block starts, whatever order the blocks are listed in.
    q_block = torch.repeat_interleave(q_start, t.q_lengths[q_start].long())
    kv_start = torch.argsort(t.kv_starts)
    kv_block = torch.repeat_interleave(kv_start, t.kv_lengths[kv_start].long())
    lists = t.kv_indices, t.kv_num_blocks, t.kv_num_full_blocks
    state = block_states(*lists, t.kv_starts.numel())[..., q_block, :][..., kv_block]
    mask = state == 2
    rule = token_rule(t)
    if rule is not None:
        q_at = torch.arange(num_queries, device=device)[:, None]
        mask = mask | (state == 1) & rule.keep(q_at, torch.arange(num_keys, device=device))
    for dim, order in ((-2, t.q_order), (-1, t.kv_order)):
        if order is not None:
            inverse = torch.empty_like(order, dtype=torch.long)
            inverse[order.long()] = torch.arange(order.numel(), device=device)
            mask = mask.index_select(dim, inverse)
    return mask
