"""Triton kernels of block-sparse attention: forward, and backward without atomics.

One program owns one tile of queries (forward, dq) or of keys (dkv) and walks that block's list.
Full blocks stand first in a list, so a walk is one loop without and one with the token rule, over
smaller tiles because the rule takes registers. A block longer than a tile is cut into ``PARTS``
tiles; of short blocks a tile packs ``PACK``. Tiles of ragged blocks repeat the block's last row,
and a bias of -inf hides the repeats. Where rows lie one after the other, a tensor descriptor
(``k_tiles`` and the like, from GPUs that copy by them) fetches a walked tile without an address for
each; then rows of the next block stand in the place of repeats, or zeros behind the end.

Prefixes: ``i_`` program ids, ``o_`` offsets, ``b_`` tiles held on chip. Other names are those of
:class:`dittfast.plan.PlanTensors`. The online softmax is FlashAttention-2's (Dao,
arXiv:2307.08691), in base 2 because ``exp2`` is what the hardware has. The backward subtracts
the natural lse from natural logits first: at large logits a change of base loses digits.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Sizes that differ from plan to plan without changing the code: not a reason to compile again.
_SIZES = [
    *("heads", "num_queries", "num_keys", "num_q_blocks", "num_kv_blocks"),
    *("sink_frames", "place_bits"),
    *("num_runs", "num_first", "kv_list_size", "list_b", "list_h", "weight_b", "weight_h"),
    *("scale_b", "scale_h", "residual_b", "residual_h"),
]


@triton.jit
def _program(heads, num_blocks, PARTS: tl.constexpr):
    """``(batch row, head, block, part)`` of this program; neighbours share a head's keys."""
    tile = tl.program_id(0) % (num_blocks * PARTS)
    i_bh = tl.program_id(0) // (num_blocks * PARTS)
    return i_bh // heads, i_bh % heads, tile // PARTS, tile % PARTS


@triton.jit
def _query_program(heads, num_blocks, run_rows, num_runs, num_first, PARTS: tl.constexpr):
    """As :func:`_program`, and whether the program is one of the first.

    Runs are the longest rows by far, so those of all heads begin first, or the last of them would
    keep a few multiprocessors busy when all else is done. The rest stays in order, for its keys.
    """
    if run_rows is None:
        i_b, i_h, i_q, part = _program(heads, num_blocks, PARTS)
        is_first = tl.program_id(0) < 0
    else:
        is_first = tl.program_id(0) < num_first
        tile = tl.program_id(0) - tl.where(is_first, 0, num_first)
        count = tl.where(is_first, num_runs, num_blocks) * PARTS
        i_b, i_h = tile // count // heads, tile // count % heads
        i_q, part = tile % count // PARTS, tile % PARTS
        i_q = tl.where(is_first, tl.load(run_rows + i_q, mask=is_first, other=0).to(tl.int32), i_q)
    return i_b, i_h, i_q, part, is_first


@triton.jit
def _listed(
    step, first, last, indices, num_listed, starts, lengths,
    PARTS: tl.constexpr, PACK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``(block, start, length)`` of tile ``step`` of a walk over list entries first..last-1.

    Scalars, or ``[BLOCK]`` where a tile packs several blocks; length 0 past the end. A loop asks
    for the next tile before it computes with this one: list -> start -> data are dependent loads,
    and so they overlap with arithmetic.
    """
    entry = first + step * PACK // PARTS
    if PACK > 1:
        entry += tl.arange(0, BLOCK) // (BLOCK // PACK)
    if num_listed is None:
        block = tl.load(indices + entry, mask=entry < last, other=0)
    else:
        # A run has no list: entry n is block n.
        block = tl.load(indices + entry, mask=entry < tl.minimum(last, num_listed), other=0)
        block += tl.where(entry < last, tl.where(entry < num_listed, 0, entry), 0)
    length = tl.where(entry < last, tl.load(lengths + block), 0)
    return block, tl.load(starts + block), length


@triton.jit
def _rows(
    step, start, length, order, PARTS: tl.constexpr, PACK: tl.constexpr, BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """``(position, token, inside)`` of a tile's rows."""
    o_row = (step % PARTS) * BLOCK + tl.arange(0, BLOCK) % (BLOCK // PACK)
    position = start + (o_row if EVEN else tl.maximum(tl.minimum(o_row, length - 1), 0))
    token = position if order is None else tl.load(order + position)
    return position, token, o_row < length


@triton.jit
def _span(step, start, length, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """``(first, rows)``: where a tile of a block begins, and how many of its rows the block has."""
    before = (step % PARTS) * BLOCK
    # The bounds change nothing. A number that a loop only hands on from one step to the next but
    # one would keep Triton from pipelining the loop.
    return tl.maximum(start, 0) + before, tl.minimum(length - before, BLOCK)


@triton.jit
def _tile(x, token, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows ``token`` of x ``[n, HEAD_DIM]``, zero from column HEAD_DIM on."""
    o_d = tl.arange(0, BLOCK_D)
    at = x + token.to(tl.int64)[:, None] * stride + o_d[None, :]
    if BLOCK_D == HEAD_DIM:
        return tl.load(at)
    return tl.load(at, mask=o_d[None, :] < HEAD_DIM, other=0.0)


@triton.jit
def _walked_tile(
    x, tiles, i_b, i_h, first, token, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """By descriptor the rows from ``first`` on, or without one the rows ``token``."""
    if tiles is not None:
        return tl.reshape(tiles.load([i_b, i_h, first, 0]), [BLOCK, BLOCK_D])
    else:
        return _tile(x, token, stride, HEAD_DIM, BLOCK_D)


@triton.jit
def _hide_beyond(b_s, rows, BLOCK: tl.constexpr):
    """-inf in the columns behind a block's end, where a descriptor brought other rows.

    Most tiles are whole: the branch saves a fifth of a loop's instructions.
    """
    if rows < BLOCK:
        b_s = tl.where((tl.arange(0, BLOCK) < rows)[None, :], b_s, float("-inf"))
    return b_s


@triton.jit
def _store_tile(
    x, value, token, stride, inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    o_d = tl.arange(0, BLOCK_D)
    at = x + token.to(tl.int64)[:, None] * stride + o_d[None, :]
    mask = inside[:, None] & (o_d[None, :] < HEAD_DIM)
    tl.store(at, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _bias(kv_log_weight, token, inside):
    """What is added to logits: the log weight, and -inf on rows that are not inside."""
    weight = 0.0 if kv_log_weight is None else tl.load(kv_log_weight + token)
    return tl.where(inside, weight, float("-inf"))


@triton.jit
def _keep(
    q_frame, q_place, frame_last, place_last, kv_frame, kv_place, limits, sink_frames, place_bits,
    RULE: tl.constexpr, NUM_LIMITS: tl.constexpr,
):  # fmt: skip
    """``dittfast.plan.TokenRule.keep`` of one tile; one side's are columns, the other's rows."""
    if RULE == 3:
        columns = (1 << place_bits) - 1
        y, x = kv_place >> place_bits, kv_place & columns
        inside = (q_frame <= kv_frame) & (kv_frame <= frame_last)
        inside &= ((q_place >> place_bits) <= y) & (y <= (place_last >> place_bits))
        inside &= ((q_place & columns) <= x) & (x <= (place_last & columns))
    else:
        if RULE == 1:
            dy = (q_place >> 16) - (kv_place >> 16)
            dx = (q_place & 0xFFFF) - (kv_place & 0xFFFF)
            distance = dy * dy + dx * dx
        else:
            distance = tl.abs(q_place - kv_place)
        if NUM_LIMITS == 1:
            limit = tl.load(limits)
        else:
            # Through shared memory: a load per pair would cost registers by the hundred.
            o_limit = tl.arange(0, triton.next_power_of_2(NUM_LIMITS))
            b_limits = tl.load(limits + tl.minimum(o_limit, NUM_LIMITS - 1))
            apart = tl.minimum(tl.abs(q_frame - kv_frame), NUM_LIMITS - 1)
            limit = tl.gather(b_limits, tl.reshape(apart, [apart.numel]), 0)
            limit = tl.reshape(limit, apart.shape)
        inside = distance <= limit
    # Keys that everybody sees get a grid number of their own, and context queries have -1: then
    # one comparison of grid numbers (the upper half) tells all pairs that the rule leaves alone.
    seen = (kv_frame < 0) | ((kv_frame & 0xFFFF) < sink_frames)
    code = tl.where(seen, 0x7FFF0000, kv_frame)
    return inside | (((q_frame ^ code) >> 16) != 0)


@triton.jit
def _corners(q_frame, q_place, q_frame_last, q_place_last, position, RULE: tl.constexpr):
    """Frames and places of some queries, and their last corners where the metric has them."""
    b_frame, b_place = tl.load(q_frame + position), tl.load(q_place + position)
    if RULE == 3:
        return b_frame, b_place, tl.load(q_frame_last + position), tl.load(q_place_last + position)
    return b_frame, b_place, b_frame, b_place


@triton.jit
def _forward_walk(
    acc, b_sum, b_max, b_q, q_position, first, last, k, v, k_tiles, v_tiles, i_b, i_h, scale,
    stride_kn, stride_vn,
    kv_indices, num_listed, kv_starts, kv_lengths, kv_order, kv_log_weight,
    limits, q_frame, q_place, kv_frame, kv_place, q_frame_last, q_place_last, sink_frames,
    place_bits, RULE: tl.constexpr, NUM_LIMITS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, KV_PARTS: tl.constexpr, KV_PACK: tl.constexpr,
    KV_EVEN: tl.constexpr,
):  # fmt: skip
    if RULE:
        b_frame, b_place, b_frame_last, b_place_last = _corners(
            q_frame, q_place, q_frame_last, q_place_last, q_position, RULE
        )
    _, start, length = _listed(
        0, first, last, kv_indices, num_listed, kv_starts, kv_lengths, KV_PARTS, KV_PACK, BLOCK_N
    )
    position, token, inside = _rows(0, start, length, kv_order, KV_PARTS, KV_PACK, BLOCK_N, KV_EVEN)
    tile_first, tile_rows = _span(0, start, length, KV_PARTS, BLOCK_N)
    _, start, length = _listed(
        1, first, last, kv_indices, num_listed, kv_starts, kv_lengths, KV_PARTS, KV_PACK, BLOCK_N
    )
    for step in range(0, tl.cdiv((last - first) * KV_PARTS, KV_PACK)):
        next_first, next_rows = _span(step + 1, start, length, KV_PARTS, BLOCK_N)
        next_position, next_token, next_inside = _rows(
            step + 1, start, length, kv_order, KV_PARTS, KV_PACK, BLOCK_N, KV_EVEN
        )
        _, start, length = _listed(
            step + 2, first, last, kv_indices, num_listed, kv_starts, kv_lengths,
            KV_PARTS, KV_PACK, BLOCK_N,
        )  # fmt: skip
        # [BLOCK_N, BLOCK_D]
        b_k = _walked_tile(
            k, k_tiles, i_b, i_h, tile_first, token, stride_kn, HEAD_DIM, BLOCK_D, BLOCK_N
        )
        # [BLOCK_M, BLOCK_N]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if kv_log_weight is None and not RULE and (KV_EVEN or k_tiles is not None):
            # The first tile of a block has a row at least, so new_max is finite.
            if not KV_EVEN:
                b_s = _hide_beyond(b_s, tile_rows, BLOCK_N)
            new_max = tl.maximum(b_max, tl.max(b_s, 1) * scale)
            b_p = tl.exp2(b_s * scale - new_max[:, None])
            b_shrink = tl.exp2(b_max - new_max)
        else:
            b_s = b_s * scale
            if kv_log_weight is not None or not KV_EVEN:
                b_s += _bias(kv_log_weight, token, inside)[None, :] * LOG2E
            if RULE:
                keep = _keep(
                    b_frame[:, None], b_place[:, None],
                    b_frame_last[:, None], b_place_last[:, None],
                    tl.load(kv_frame + position)[None, :], tl.load(kv_place + position)[None, :],
                    limits, sink_frames, place_bits, RULE, NUM_LIMITS,
                )  # fmt: skip
                b_s = tl.where(keep, b_s, float("-inf"))
            new_max = tl.maximum(b_max, tl.max(b_s, 1))
            # A row that has seen no key yet keeps a finite pivot: -inf - -inf would be NaN.
            pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
            b_p = tl.exp2(b_s - pivot[:, None])
            b_shrink = tl.exp2(b_max - pivot)
        b_max = new_max
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        b_v = _walked_tile(
            v, v_tiles, i_b, i_h, tile_first, token, stride_vn, HEAD_DIM, BLOCK_D, BLOCK_N
        )
        acc = acc * b_shrink[:, None]
        acc = tl.dot(b_p.to(b_v.dtype), b_v, acc, input_precision="ieee")
        position, token, inside = next_position, next_token, next_inside
        tile_first, tile_rows = next_first, next_rows
    return acc, b_sum, b_max


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    q, k, v, k_tiles, v_tiles, out, lse,
    kv_indices, kv_num_blocks, kv_num_full_blocks, q_starts, q_lengths, kv_starts, kv_lengths,
    run_rows, num_runs, num_first, q_order, kv_order, kv_log_weight, out_scale, out_residual,
    limits, q_frame, q_place, kv_frame, kv_place, q_frame_last, q_place_last, place_bits,
    scale, heads, num_queries, num_keys, num_q_blocks, kv_list_size, sink_frames,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
    list_b, list_h, weight_b, weight_h, scale_b, scale_h, residual_b, residual_h,
    METRIC: tl.constexpr, NUM_LIMITS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, Q_PARTS: tl.constexpr, KV_PARTS: tl.constexpr,
    KV_PACK: tl.constexpr, KV_EVEN: tl.constexpr, RULE_BLOCK: tl.constexpr,
    RULE_PARTS: tl.constexpr, RULE_PACK: tl.constexpr,
):  # fmt: skip
    """``out`` and ``lse`` of one tile of queries."""
    i_b, i_h, i_q, part, is_first = _query_program(
        heads, num_q_blocks, run_rows, num_runs, num_first, Q_PARTS
    )
    q += i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh
    k += i_b.to(tl.int64) * stride_kb + i_h.to(tl.int64) * stride_kh
    v += i_b.to(tl.int64) * stride_vb + i_h.to(tl.int64) * stride_vh
    out += i_b.to(tl.int64) * stride_ob + i_h.to(tl.int64) * stride_oh
    lse += (i_b * heads + i_h).to(tl.int64) * num_queries
    if kv_log_weight is not None:
        kv_log_weight += (i_b * weight_b + i_h * weight_h).to(tl.int64) * num_keys
    row = (i_b * list_b + i_h * list_h).to(tl.int64) * num_q_blocks + i_q
    kv_indices += row * kv_list_size
    num_blocks = tl.load(kv_num_blocks + row)
    num_full = tl.load(kv_num_full_blocks + row)
    if run_rows is not None:  # noqa: SIM102 - Triton decides this one when it compiles
        if (num_blocks > kv_list_size) & (is_first == 0):
            return  # one of the first did it
    num_listed = tl.where(num_blocks > kv_list_size, 0, num_blocks)

    start = tl.load(q_starts + i_q)
    q_position, q_token, q_inside = _rows(
        part, start, tl.load(q_lengths + i_q), q_order, Q_PARTS, 1, BLOCK_M, False
    )
    b_q = _tile(q, q_token, stride_qn, HEAD_DIM, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    acc, b_sum, b_max = _forward_walk(
        acc, b_sum, b_max, b_q, q_position, 0, num_full, k, v, k_tiles, v_tiles, i_b, i_h,
        scale * LOG2E, stride_kn, stride_vn,
        kv_indices, num_listed, kv_starts, kv_lengths, kv_order, kv_log_weight,
        limits, q_frame, q_place, kv_frame, kv_place, q_frame_last, q_place_last, sink_frames,
        place_bits,
        0, NUM_LIMITS, HEAD_DIM, BLOCK_D, BLOCK_N, KV_PARTS, KV_PACK, KV_EVEN,
    )  # fmt: skip
    if METRIC:
        acc, b_sum, b_max = _forward_walk(
            acc, b_sum, b_max, b_q, q_position, num_full, num_blocks, k, v, None, None, i_b, i_h,
            scale * LOG2E, stride_kn, stride_vn, kv_indices, num_listed, kv_starts, kv_lengths,
            kv_order,
            kv_log_weight, limits, q_frame, q_place, kv_frame, kv_place, q_frame_last, q_place_last,
            sink_frames, place_bits,
            METRIC, NUM_LIMITS, HEAD_DIM, BLOCK_D, RULE_BLOCK, RULE_PARTS, RULE_PACK, KV_EVEN,
        )  # fmt: skip

    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    acc = acc / b_sum[:, None]
    if out_scale is not None:
        at = (i_b * scale_b + i_h * scale_h).to(tl.int64) * num_q_blocks + i_q
        acc = acc * tl.load(out_scale + at)
    if out_residual is not None:
        at = (i_b * residual_b + i_h * residual_h).to(tl.int64) * num_q_blocks + i_q
        o_d = tl.arange(0, BLOCK_D)
        acc += tl.load(out_residual + at * HEAD_DIM + o_d, mask=o_d < HEAD_DIM, other=0.0)[None, :]
    _store_tile(out, acc, q_token, stride_on, q_inside, HEAD_DIM, BLOCK_D)
    tl.store(lse + q_token, b_max * LN2 + tl.log(b_sum), mask=q_inside)


@triton.jit(do_not_specialize=_SIZES)
def delta_kernel(
    out, do, lse, dlse, delta, row_lse, d_out_scale, d_out_residual,
    q_starts, q_lengths, q_order, out_scale, out_residual,
    heads, num_queries, num_q_blocks,
    stride_ob, stride_oh, stride_on, stride_gb, stride_gh, stride_gn,
    scale_b, scale_h, residual_b, residual_h,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, Q_PARTS: tl.constexpr,
):  # fmt: skip
    """What the backward needs of each query, by *position*, and the epilogue's gradients.

    ``delta = do . (out - out_residual) - dlse``. ``row_lse`` is lse, but +inf where a query sees no
    key, so that ``exp(logit - row_lse)`` is 0 there.
    """
    i_b, i_h, i_q, _ = _program(heads, num_q_blocks, 1)
    out += i_b.to(tl.int64) * stride_ob + i_h.to(tl.int64) * stride_oh
    do += i_b.to(tl.int64) * stride_gb + i_h.to(tl.int64) * stride_gh
    row = (i_b * heads + i_h).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    if out_residual is not None:
        at = (i_b * residual_b + i_h * residual_h).to(tl.int64) * num_q_blocks + i_q
        b_residual = tl.load(out_residual + at * HEAD_DIM + o_d, mask=o_d < HEAD_DIM, other=0.0)
        b_do_sum = tl.zeros([BLOCK_D], dtype=tl.float32)
    delta_sum = 0.0
    start = tl.load(q_starts + i_q)
    length = tl.load(q_lengths + i_q)
    for part in range(0, Q_PARTS):
        position, token, inside = _rows(part, start, length, q_order, Q_PARTS, 1, BLOCK_M, False)
        b_out = _tile(out, token, stride_on, HEAD_DIM, BLOCK_D).to(tl.float32)
        b_do = _tile(do, token, stride_gn, HEAD_DIM, BLOCK_D).to(tl.float32)
        b_do = tl.where(inside[:, None], b_do, 0.0)
        if out_residual is not None:
            b_out -= b_residual[None, :]
            b_do_sum += tl.sum(b_do, 0)
        b_delta = tl.sum(b_out * b_do, 1)
        delta_sum += tl.sum(b_delta)
        if dlse is not None:
            b_delta -= tl.load(dlse + row * num_queries + token)
        b_lse = tl.load(lse + row * num_queries + token)
        b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
        tl.store(delta + row * num_queries + position, b_delta, mask=inside)
        tl.store(row_lse + row * num_queries + position, b_lse, mask=inside)
    at = row * num_q_blocks + i_q
    if out_scale is not None:
        scale_at = (i_b * scale_b + i_h * scale_h).to(tl.int64) * num_q_blocks + i_q
        tl.store(d_out_scale + at, delta_sum / tl.load(out_scale + scale_at))
    if out_residual is not None:
        tl.store(d_out_residual + at * HEAD_DIM + o_d, b_do_sum, mask=o_d < HEAD_DIM)


@triton.jit
def _dq_walk(
    b_dq, b_q, b_do, b_delta, b_row_lse, block_scale, q_position, first, last, k, v,
    k_tiles, v_tiles, i_b, i_h, scale, stride_kn, stride_vn, kv_indices, num_listed, kv_starts,
    kv_lengths, kv_order, kv_log_weight,
    limits, q_frame, q_place, kv_frame, kv_place, q_frame_last, q_place_last, sink_frames,
    place_bits, RULE: tl.constexpr, NUM_LIMITS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, KV_PARTS: tl.constexpr, KV_PACK: tl.constexpr,
    KV_EVEN: tl.constexpr,
):  # fmt: skip
    if RULE:
        b_frame, b_place, b_frame_last, b_place_last = _corners(
            q_frame, q_place, q_frame_last, q_place_last, q_position, RULE
        )
    _, start, length = _listed(
        0, first, last, kv_indices, num_listed, kv_starts, kv_lengths, KV_PARTS, KV_PACK, BLOCK_N
    )
    position, token, inside = _rows(0, start, length, kv_order, KV_PARTS, KV_PACK, BLOCK_N, KV_EVEN)
    tile_first, tile_rows = _span(0, start, length, KV_PARTS, BLOCK_N)
    _, start, length = _listed(
        1, first, last, kv_indices, num_listed, kv_starts, kv_lengths, KV_PARTS, KV_PACK, BLOCK_N
    )
    for step in range(0, tl.cdiv((last - first) * KV_PARTS, KV_PACK)):
        next_first, next_rows = _span(step + 1, start, length, KV_PARTS, BLOCK_N)
        next_position, next_token, next_inside = _rows(
            step + 1, start, length, kv_order, KV_PARTS, KV_PACK, BLOCK_N, KV_EVEN
        )
        _, start, length = _listed(
            step + 2, first, last, kv_indices, num_listed, kv_starts, kv_lengths,
            KV_PARTS, KV_PACK, BLOCK_N,
        )  # fmt: skip
        # [BLOCK_N, BLOCK_D]
        b_k = _walked_tile(
            k, k_tiles, i_b, i_h, tile_first, token, stride_kn, HEAD_DIM, BLOCK_D, BLOCK_N
        )
        b_v = _walked_tile(
            v, v_tiles, i_b, i_h, tile_first, token, stride_vn, HEAD_DIM, BLOCK_D, BLOCK_N
        )
        # [BLOCK_M, BLOCK_N]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        if kv_log_weight is not None or (not KV_EVEN and k_tiles is None):
            b_s += _bias(kv_log_weight, token, inside)[None, :]
        elif not KV_EVEN:
            b_s = _hide_beyond(b_s, tile_rows, BLOCK_N)
        if RULE:
            keep = _keep(
                b_frame[:, None], b_place[:, None], b_frame_last[:, None], b_place_last[:, None],
                tl.load(kv_frame + position)[None, :], tl.load(kv_place + position)[None, :],
                limits, sink_frames, place_bits, RULE, NUM_LIMITS,
            )  # fmt: skip
            b_s = tl.where(keep, b_s, float("-inf"))
        b_p = tl.exp2((b_s - b_row_lse[:, None]) * LOG2E)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_ds = b_p * (b_dp * block_scale - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
        position, token, inside = next_position, next_token, next_inside
        tile_first, tile_rows = next_first, next_rows
    return b_dq


@triton.jit(do_not_specialize=_SIZES)
def dq_kernel(
    q, k, v, k_tiles, v_tiles, do, delta, row_lse, dq,
    kv_indices, kv_num_blocks, kv_num_full_blocks, q_starts, q_lengths, kv_starts, kv_lengths,
    run_rows, num_runs, num_first, q_order, kv_order, kv_log_weight, out_scale,
    limits, q_frame, q_place, kv_frame, kv_place, q_frame_last, q_place_last, place_bits,
    scale, heads, num_queries, num_keys, num_q_blocks, kv_list_size, sink_frames,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_gb, stride_gh, stride_gn,
    list_b, list_h, weight_b, weight_h, scale_b, scale_h,
    METRIC: tl.constexpr, NUM_LIMITS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, Q_PARTS: tl.constexpr, KV_PARTS: tl.constexpr,
    KV_PACK: tl.constexpr, KV_EVEN: tl.constexpr, RULE_BLOCK: tl.constexpr,
    RULE_PARTS: tl.constexpr, RULE_PACK: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries; ``dq`` is contiguous."""
    i_b, i_h, i_q, part, is_first = _query_program(
        heads, num_q_blocks, run_rows, num_runs, num_first, Q_PARTS
    )
    q += i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh
    k += i_b.to(tl.int64) * stride_kb + i_h.to(tl.int64) * stride_kh
    v += i_b.to(tl.int64) * stride_vb + i_h.to(tl.int64) * stride_vh
    do += i_b.to(tl.int64) * stride_gb + i_h.to(tl.int64) * stride_gh
    first_row = (i_b * heads + i_h).to(tl.int64) * num_queries
    if kv_log_weight is not None:
        kv_log_weight += (i_b * weight_b + i_h * weight_h).to(tl.int64) * num_keys
    row = (i_b * list_b + i_h * list_h).to(tl.int64) * num_q_blocks + i_q
    kv_indices += row * kv_list_size
    num_blocks = tl.load(kv_num_blocks + row)
    num_full = tl.load(kv_num_full_blocks + row)
    if run_rows is not None:  # noqa: SIM102 - Triton decides this one when it compiles
        if (num_blocks > kv_list_size) & (is_first == 0):
            return  # one of the first did it
    num_listed = tl.where(num_blocks > kv_list_size, 0, num_blocks)
    block_scale = 1.0
    if out_scale is not None:
        at = (i_b * scale_b + i_h * scale_h).to(tl.int64) * num_q_blocks + i_q
        block_scale = tl.load(out_scale + at)

    start = tl.load(q_starts + i_q)
    q_position, q_token, q_inside = _rows(
        part, start, tl.load(q_lengths + i_q), q_order, Q_PARTS, 1, BLOCK_M, False
    )
    b_q = _tile(q, q_token, stride_qn, HEAD_DIM, BLOCK_D)
    b_do = _tile(do, q_token, stride_gn, HEAD_DIM, BLOCK_D)
    b_delta = tl.load(delta + first_row + q_position)
    b_row_lse = tl.load(row_lse + first_row + q_position)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_dq = _dq_walk(
        b_dq, b_q, b_do, b_delta, b_row_lse, block_scale, q_position, 0, num_full, k, v,
        k_tiles, v_tiles, i_b, i_h, scale, stride_kn, stride_vn, kv_indices, num_listed, kv_starts,
        kv_lengths, kv_order,
        kv_log_weight, limits, q_frame, q_place, kv_frame, kv_place, q_frame_last, q_place_last,
        sink_frames, place_bits,
        0, NUM_LIMITS, HEAD_DIM, BLOCK_D, BLOCK_N, KV_PARTS, KV_PACK, KV_EVEN,
    )  # fmt: skip
    if METRIC:
        b_dq = _dq_walk(
            b_dq, b_q, b_do, b_delta, b_row_lse, block_scale, q_position, num_full, num_blocks,
            k, v, None, None, i_b, i_h, scale, stride_kn, stride_vn, kv_indices, num_listed,
            kv_starts, kv_lengths,
            kv_order, kv_log_weight, limits, q_frame, q_place, kv_frame, kv_place, q_frame_last,
            q_place_last, sink_frames, place_bits,
            METRIC, NUM_LIMITS, HEAD_DIM, BLOCK_D, RULE_BLOCK, RULE_PARTS, RULE_PACK, KV_EVEN,
        )  # fmt: skip
    _store_tile(
        dq + first_row * HEAD_DIM, b_dq * scale, q_token, HEAD_DIM, q_inside, HEAD_DIM, BLOCK_D
    )


@triton.jit
def _dkv_walk(
    b_dk, b_dv, b_k, b_v, b_bias, kv_position, first, last, q, do, q_tiles, do_tiles, i_b, i_h,
    delta, row_lse, out_scale, scale,
    stride_qn, stride_gn, q_indices, q_starts, q_lengths, q_order,
    limits, q_frame, q_place, kv_frame, kv_place, q_frame_last, q_place_last, sink_frames,
    place_bits, RULE: tl.constexpr, NUM_LIMITS: tl.constexpr, BIAS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, Q_PARTS: tl.constexpr,
    Q_PACK: tl.constexpr, Q_EVEN: tl.constexpr,
):  # fmt: skip
    if RULE:
        b_kv_frame = tl.load(kv_frame + kv_position)[:, None]
        b_kv_place = tl.load(kv_place + kv_position)[:, None]
    block, start, length = _listed(
        0, first, last, q_indices, None, q_starts, q_lengths, Q_PARTS, Q_PACK, BLOCK_M
    )
    position, token, inside = _rows(0, start, length, q_order, Q_PARTS, Q_PACK, BLOCK_M, Q_EVEN)
    tile_first, tile_rows = _span(0, start, length, Q_PARTS, BLOCK_M)
    next_block, start, length = _listed(
        1, first, last, q_indices, None, q_starts, q_lengths, Q_PARTS, Q_PACK, BLOCK_M
    )
    if out_scale is not None:
        block_scale = tl.load(out_scale + block)
    for step in range(0, tl.cdiv((last - first) * Q_PARTS, Q_PACK)):
        next_first, next_rows = _span(step + 1, start, length, Q_PARTS, BLOCK_M)
        next_position, next_token, next_inside = _rows(
            step + 1, start, length, q_order, Q_PARTS, Q_PACK, BLOCK_M, Q_EVEN
        )
        if out_scale is not None:
            next_scale = tl.load(out_scale + next_block)
        next_block, start, length = _listed(
            step + 2, first, last, q_indices, None, q_starts, q_lengths, Q_PARTS, Q_PACK, BLOCK_M
        )
        # [BLOCK_M, BLOCK_D]
        b_q = _walked_tile(
            q, q_tiles, i_b, i_h, tile_first, token, stride_qn, HEAD_DIM, BLOCK_D, BLOCK_M
        )
        b_do = _walked_tile(
            do, do_tiles, i_b, i_h, tile_first, token, stride_gn, HEAD_DIM, BLOCK_D, BLOCK_M
        )
        o_row = position
        if q_tiles is not None:
            o_row = tile_first + tl.arange(0, BLOCK_M)
        b_delta = tl.load(delta + o_row)
        b_row_lse = tl.load(row_lse + o_row)
        if not Q_EVEN:
            if q_tiles is None:
                b_row_lse = tl.where(inside, b_row_lse, float("inf"))
            else:
                # Behind the end of the last head is what nobody wrote.
                if tile_rows < BLOCK_M:
                    b_inside = tl.arange(0, BLOCK_M) < tile_rows
                    b_row_lse = tl.where(b_inside, b_row_lse, float("inf"))
                    b_delta = tl.where(b_inside, b_delta, 0.0)
        # [BLOCK_N, BLOCK_M]
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale
        if BIAS:
            b_s += b_bias[:, None]
        if RULE:
            b_frame, b_place, b_frame_last, b_place_last = _corners(
                q_frame, q_place, q_frame_last, q_place_last, position, RULE
            )
            keep = _keep(
                b_frame[None, :], b_place[None, :], b_frame_last[None, :], b_place_last[None, :],
                b_kv_frame, b_kv_place, limits, sink_frames, place_bits, RULE, NUM_LIMITS,
            )  # fmt: skip
            b_s = tl.where(keep, b_s, float("-inf"))
        b_p = tl.exp2((b_s - b_row_lse[None, :]) * LOG2E)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
        if out_scale is None:
            b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
        else:
            b_scale = (tl.zeros([BLOCK_M], dtype=tl.float32) + block_scale)[None, :]
            b_dv = tl.dot((b_p * b_scale).to(b_do.dtype), b_do, b_dv, input_precision="ieee")
            b_dp = b_dp * b_scale
            block_scale = next_scale
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
        position, token, inside = next_position, next_token, next_inside
        tile_first, tile_rows = next_first, next_rows
    return b_dk, b_dv


@triton.jit(do_not_specialize=_SIZES)
def dkv_kernel(
    q, k, v, do, q_tiles, do_tiles, delta, row_lse, dk, dv,
    q_indices, q_first, q_num_blocks, q_num_full_blocks, q_starts, q_lengths,
    kv_starts, kv_lengths, q_order, kv_order, kv_log_weight, out_scale,
    limits, q_frame, q_place, kv_frame, kv_place, q_frame_last, q_place_last, place_bits,
    scale, heads, num_queries, num_keys, num_q_blocks, num_kv_blocks, sink_frames,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_gb, stride_gh, stride_gn,
    list_b, list_h, weight_b, weight_h, scale_b, scale_h,
    METRIC: tl.constexpr, NUM_LIMITS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, Q_PARTS: tl.constexpr, KV_PARTS: tl.constexpr,
    Q_PACK: tl.constexpr, Q_EVEN: tl.constexpr, RULE_BLOCK: tl.constexpr,
    RULE_PARTS: tl.constexpr, RULE_PACK: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values, over the transposed lists; contiguous outputs."""
    i_b, i_h, i_kv, part = _program(heads, num_kv_blocks, KV_PARTS)
    q += i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh
    k += i_b.to(tl.int64) * stride_kb + i_h.to(tl.int64) * stride_kh
    v += i_b.to(tl.int64) * stride_vb + i_h.to(tl.int64) * stride_vh
    do += i_b.to(tl.int64) * stride_gb + i_h.to(tl.int64) * stride_gh
    delta += (i_b * heads + i_h).to(tl.int64) * num_queries
    row_lse += (i_b * heads + i_h).to(tl.int64) * num_queries
    row = (i_b * list_b + i_h * list_h).to(tl.int64) * num_kv_blocks + i_kv
    q_indices += tl.load(q_first + row)
    num_blocks = tl.load(q_num_blocks + row)
    num_full = tl.load(q_num_full_blocks + row)
    if out_scale is not None:
        out_scale += (i_b * scale_b + i_h * scale_h).to(tl.int64) * num_q_blocks

    start = tl.load(kv_starts + i_kv)
    kv_position, kv_token, kv_inside = _rows(
        part, start, tl.load(kv_lengths + i_kv), kv_order, KV_PARTS, 1, BLOCK_N, False
    )
    b_k = _tile(k, kv_token, stride_kn, HEAD_DIM, BLOCK_D)
    b_v = _tile(v, kv_token, stride_vn, HEAD_DIM, BLOCK_D)
    b_bias = None
    # Rows beyond the block are computed and not stored: only a weight needs the bias here.
    BIAS: tl.constexpr = kv_log_weight is not None
    if BIAS:
        kv_log_weight += (i_b * weight_b + i_h * weight_h).to(tl.int64) * num_keys
        b_bias = _bias(kv_log_weight, kv_token, kv_inside)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    b_dk, b_dv = _dkv_walk(
        b_dk, b_dv, b_k, b_v, b_bias, kv_position, 0, num_full, q, do, q_tiles, do_tiles, i_b, i_h,
        delta, row_lse, out_scale, scale, stride_qn, stride_gn, q_indices, q_starts, q_lengths,
        q_order,
        limits, q_frame, q_place, kv_frame, kv_place, q_frame_last, q_place_last, sink_frames,
        place_bits,
        0, NUM_LIMITS, BIAS, HEAD_DIM, BLOCK_D, BLOCK_M, Q_PARTS, Q_PACK, Q_EVEN,
    )  # fmt: skip
    if METRIC:
        b_dk, b_dv = _dkv_walk(
            b_dk, b_dv, b_k, b_v, b_bias, kv_position, num_full, num_blocks, q, do, None, None,
            i_b, i_h, delta, row_lse, out_scale, scale, stride_qn, stride_gn, q_indices, q_starts,
            q_lengths, q_order,
            limits, q_frame, q_place, kv_frame, kv_place, q_frame_last, q_place_last, sink_frames,
        place_bits,
            METRIC, NUM_LIMITS, BIAS, HEAD_DIM, BLOCK_D, RULE_BLOCK, RULE_PARTS, RULE_PACK, Q_EVEN,
        )  # fmt: skip
    first_row = (i_b * heads + i_h).to(tl.int64) * num_keys
    dk += first_row * HEAD_DIM
    dv += first_row * HEAD_DIM
    _store_tile(dk, b_dk * scale, kv_token, HEAD_DIM, kv_inside, HEAD_DIM, BLOCK_D)
    _store_tile(dv, b_dv, kv_token, HEAD_DIM, kv_inside, HEAD_DIM, BLOCK_D)
