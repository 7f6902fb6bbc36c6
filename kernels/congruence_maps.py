"""Blocks of a joint map of text and image: head-mean attention of each block, and the gradients of its queries and keys.

A map (b, S, S) has the blocks LL, LV over VL, VV. Index 0 is text, 1 is image: i_r is that of a block's rows, i_c that of its
columns. congruence_loss.py launches these kernels. Their qs and ks are the `Heads` of LL, VV, LV, VL in this order, p_masks the
masks of text and image. Where p_log is None no logarithms are needed.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from vlattn_fast.kernels._tiles import Heads, dot, load_tile, load_where, real_tokens, store_tile


class Constants(NamedTuple):
    """WHOLE: a tile holds whole rows of a head. Gradients are those of the first BLOCKS of LL, VV, LV, VL, without the block
    2 i_r + i_c = UNREAD."""

    MASKED: bool
    WHOLE: bool
    PRECISION: str
    BLOCK_D: int
    BLOCK_Q: int
    BLOCK_L: int
    BLOCK_V: int
    BLOCKS: int = 4
    UNREAD: int = -1


class Stats(NamedTuple):
    """Numbers of each row, (2, b, H, S) over the keys of the text and of the image, with their stride of these two: the largest
    base-2 logit, the sum of exp2(logit - largest); in the backward pass the sum of probability times gradient, and with
    logarithms that of their gradients."""

    stride: int
    p_max: Tensor
    p_sum: Tensor
    p_delta: Tensor | None = None
    p_delta_log: Tensor | None = None


class Gradients(NamedTuple):
    """At the map and at its logarithm, and that logarithm, (b, S, S). p_loss (b) is the cotangent, which they lack."""

    p_map: Tensor
    p_log: Tensor | None
    p_log_map: Tensor | None
    p_loss: Tensor


@triton.jit
def _entry(i_r, i_c, ll, vv, lv, vl):
    # a choice of values at run time: a tuple has no index that is not constant
    return tl.where(i_r == 0, tl.where(i_c == 0, ll, lv), tl.where(i_c == 0, vl, vv))


@triton.jit
def _rows_of(i_r, i_c, i_b, i_h, xs):
    """The `Heads` of a block, at its sample and head."""
    ll, vv, lv, vl = xs
    stride_b = _entry(i_r, i_c, ll.stride_b, vv.stride_b, lv.stride_b, vl.stride_b)
    stride_h = _entry(i_r, i_c, ll.stride_h, vv.stride_h, lv.stride_h, vl.stride_h)
    stride_n = _entry(i_r, i_c, ll.stride_n, vv.stride_n, lv.stride_n, vl.stride_n)
    return Heads(_entry(i_r, i_c, ll.p, vv.p, lv.p, vl.p) + i_b * stride_b + i_h * stride_h, stride_b, stride_h, stride_n)


@triton.jit
def _tokens(i, i_b, p_masks, L, V):
    """The mask of text or image at a sample, and the number of tokens."""
    return tl.where(i == 0, p_masks[0] + i_b * L, p_masks[1] + i_b * V), tl.where(i == 0, L, V)


@triton.jit
def _logits(b_q, b_k, m_kv, scale_log2, PRECISION: tl.constexpr):
    """Base-2 logits [q,kv], -inf at padding of keys. Those of padding of queries may be NaN: zeros times infinity."""
    return tl.where(m_kv[None, :], dot(b_q, tl.trans(b_k), PRECISION) * scale_log2, float("-inf"))


@triton.jit
def _keys_and_logits(b_q, k, p_mask, start, M, D, scale_log2, C: tl.constexpr, BLOCK_KV: tl.constexpr):
    """The offsets of a tile of keys, the keys [kv,D], and their `_logits`."""
    o_kv = start + tl.arange(0, BLOCK_KV)
    m_kv = real_tokens(p_mask, o_kv, M, C.MASKED)
    b_k = load_where(k.p, k.stride_n, o_kv, tl.arange(0, C.BLOCK_D), m_kv, D)
    return o_kv, b_k, _logits(b_q, b_k, m_kv, scale_log2, C.PRECISION)


@triton.jit
def _max_and_sum(b_s, stats, offset, o_q, N, WHOLE: tl.constexpr):
    """For each row of logits: the largest, and the sum of exp2(logit - largest); 0 and 1 for a fully masked row."""
    if WHOLE:
        b_max = tl.max(b_s, axis=1)
        b_max = tl.where(b_max == float("-inf"), 0.0, b_max)  # -inf - -inf would be NaN
        b_sum = tl.sum(tl.exp2(b_s - b_max[:, None]), axis=1)
        b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    else:
        b_max = tl.load(stats.p_max + offset + o_q, mask=o_q < N, other=0.0)
        b_sum = tl.load(stats.p_sum + offset + o_q, mask=o_q < N, other=1.0)
    return b_max, b_sum


@triton.jit
def _map_tile(q, k, masks, stats, offset, p_map, p_log, o_q, start, sizes, scale_log2, C: tl.constexpr, BLOCK_KV: tl.constexpr):
    """A tile of one block of the map, and with p_log of its logarithm: see `map_kernel`.

    masks: of rows and columns. offset: where the first head's rows begin in `stats`. sizes: H, N, M, D and S.
    """
    H, N, M, D, S = sizes
    o_kv = start + tl.arange(0, BLOCK_KV)
    o_d = tl.arange(0, C.BLOCK_D)
    m_q, m_kv = real_tokens(masks[0], o_q, N, C.MASKED), real_tokens(masks[1], o_kv, M, C.MASKED)
    b_mean = tl.zeros([o_q.shape[0], BLOCK_KV], dtype=tl.float32)
    b_high = tl.full([o_q.shape[0], BLOCK_KV], -3.0e38, dtype=tl.float32)  # the largest log2 P of the heads so far
    for h in range(H):
        i_h = tl.full([], 0, tl.int64) + h
        b_q = load_where(q.p + i_h * q.stride_h, q.stride_n, o_q, o_d, m_q, D)  # [q,D]
        b_k = load_where(k.p + i_h * k.stride_h, k.stride_n, o_kv, o_d, m_kv, D)  # [kv,D]
        b_s = _logits(b_q, b_k, m_kv, scale_log2, C.PRECISION)  # [q,kv]
        b_max, b_sum = _max_and_sum(b_s, stats, offset + i_h * S, o_q, N, C.WHOLE)
        b_s -= b_max[:, None]
        if p_log is not None:  # logsumexp over the heads, so that no weight underflows
            b_s -= tl.log2(b_sum)[:, None]  # log2 P
            b_new = tl.maximum(b_high, b_s)
            b_mean = b_mean * tl.exp2(b_high - b_new) + tl.exp2(b_s - b_new)
            b_high = b_new
        else:
            b_mean += tl.exp2(b_s) / b_sum[:, None]
    if p_log is not None:
        # of the sum, not of the mean: where one head has nearly all of it, this is its logarithm to the last bit
        b_log = tl.where(m_kv[None, :], b_high + tl.log2(tl.where(m_kv[None, :], b_mean, 1.0)), 0.0)
        store_tile(p_log, S, o_q, o_kv, N, M, b_log)
        b_mean *= tl.exp2(b_high)
    b_mean /= H
    if C.MASKED:  # rows of padding may be NaN: see `_logits`
        b_mean = tl.where(m_q[:, None], b_mean, 0.0)
    store_tile(p_map, S, o_q, o_kv, N, M, b_mean)


@triton.jit
def map_kernel(qs, ks, p_masks, stats, p_map, p_log, H, L, V, D, scale_log2, C: tl.constexpr):
    """The map of a sample: one program per tile of rows and tile of columns, with the heads h in a loop (`_map_tile`).

    x_hij  = scale_log2 q_hi k_hj of the block in which row i and column j lie, -inf at padding of columns
    P_hij  = 2^(x_hij - max_hi) / sum_hi, with max and sum over the columns of one modality
    map_ij = sum_h P_hij / H
    log_ij = log2 sum_h P_hij, where p_log is there: by a second online softmax, over the heads
    Whole rows have one tile of columns per modality, which has max and sum; else `statistics_kernel` gives them.
    """
    rows_l, columns_l = tl.cdiv(L, C.BLOCK_Q), tl.cdiv(L, C.BLOCK_L)
    columns = columns_l + tl.cdiv(V, C.BLOCK_V)
    i = tl.program_id(0)
    per_sample = columns * (rows_l + tl.cdiv(V, C.BLOCK_Q))
    i_b = (i // per_sample).to(tl.int64)
    i_q, i_kv = (i % per_sample) // columns, i % columns
    i_r, i_c = (i_q >= rows_l).to(tl.int32), (i_kv >= columns_l).to(tl.int32)
    q, k = _rows_of(i_r, i_c, i_b, 0, qs), _rows_of(i_r, i_c, i_b, 0, ks)
    p_row_mask, N = _tokens(i_r, i_b, p_masks, L, V)
    o_q = tl.where(i_r == 0, i_q, i_q - rows_l) * C.BLOCK_Q + tl.arange(0, C.BLOCK_Q)
    S = L + V
    first = i_b * S + i_r * L
    p_map += first * S + i_c * L
    if p_log is not None:
        p_log += first * S + i_c * L
    offset = 0
    if not C.WHOLE:
        offset = i_c.to(tl.int64) * stats.stride + i_b * H * S + i_r * L
    # a branch each, since the tiles of text and image differ in size
    if i_c == 0:
        masks_l, sizes_l = (p_row_mask, p_masks[0] + i_b * L), (H, N, L, D, S)
        _map_tile(q, k, masks_l, stats, offset, p_map, p_log, o_q, i_kv * C.BLOCK_L, sizes_l, scale_log2, C, C.BLOCK_L)
    else:
        masks_v, sizes_v = (p_row_mask, p_masks[1] + i_b * V), (H, N, V, D, S)
        start = (i_kv - columns_l) * C.BLOCK_V
        _map_tile(q, k, masks_v, stats, offset, p_map, p_log, o_q, start, sizes_v, scale_log2, C, C.BLOCK_V)


@triton.jit
def statistics_kernel(qs, ks, p_masks, stats, H, L, V, D, scale_log2, C: tl.constexpr):
    """max_i and sum_i of rows i of one head over the keys j of one modality, by an online softmax:

    max_i = max_j x_ij, sum_i = sum_j 2^(x_ij - max_i), with x as in `map_kernel`; 0 and 1 in a fully masked row
    One program per sample, head, modality of the keys, and tile of rows.
    """
    rows_l = tl.cdiv(L, C.BLOCK_Q)
    rows = rows_l + tl.cdiv(V, C.BLOCK_Q)
    i = tl.program_id(0)
    i_q, i_c, i_bh = i % rows, (i // rows) % 2, (i // (2 * rows)).to(tl.int64)
    i_r = (i_q >= rows_l).to(tl.int32)
    i_b, i_h = i_bh // H, i_bh % H
    q, k = _rows_of(i_r, i_c, i_b, i_h, qs), _rows_of(i_r, i_c, i_b, i_h, ks)
    p_row_mask, N = _tokens(i_r, i_b, p_masks, L, V)
    p_mask, M = _tokens(i_c, i_b, p_masks, L, V)
    o_q = tl.where(i_r == 0, i_q, i_q - rows_l) * C.BLOCK_Q + tl.arange(0, C.BLOCK_Q)
    o_d = tl.arange(0, C.BLOCK_D)
    b_q = load_where(q.p, q.stride_n, o_q, o_d, real_tokens(p_row_mask, o_q, N, C.MASKED), D)  # [q,D]
    b_max = tl.full([C.BLOCK_Q], -3.0e38, dtype=tl.float32)  # finite: -inf - -inf would be NaN in a fully masked row
    b_sum = tl.zeros([C.BLOCK_Q], dtype=tl.float32)
    for start in range(0, M, C.BLOCK_V):
        _, _, b_s = _keys_and_logits(b_q, k, p_mask, start, M, D, scale_log2, C, C.BLOCK_V)
        b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
        b_sum = b_sum * tl.exp2(b_max - b_new) + tl.sum(tl.exp2(b_s - b_new[:, None]), axis=1)
        b_max = b_new
    offset = i_c.to(tl.int64) * stats.stride + i_bh * (L + V) + i_r * L
    tl.store(stats.p_max + offset + o_q, tl.where(b_sum == 0.0, 0.0, b_max), mask=o_q < N)
    tl.store(stats.p_sum + offset + o_q, tl.where(b_sum == 0.0, 1.0, b_sum), mask=o_q < N)


@triton.jit
def _terms(b_s, b_max, b_sum, grads, first, o_q, o_kv, N, M, S):
    """The probabilities P of a tile of logits, the gradient of P, and that of log P (without logarithms it is unused).

    first: where the block begins in a map.
    """
    b_s -= b_max[:, None]
    b_p = tl.exp2(b_s) / b_sum[:, None]
    b_g = load_tile(grads.p_map + first, S, o_q, o_kv, N, M)
    b_a = b_g  # unused without logarithms
    if grads.p_log is not None:
        # the head's share of the sum over the heads, from logarithms that are rounded as those of the sum were
        b_log_p = b_s - tl.log2(b_sum)[:, None]
        b_share = tl.exp2(b_log_p - load_tile(grads.p_log_map + first, S, o_q, o_kv, N, M))
        b_a = b_share * load_tile(grads.p_log + first, S, o_q, o_kv, N, M)
    return b_p, b_g, b_a


@triton.jit
def _deltas(b_p, b_g, b_a, stats, offset, o_q, N, LOG: tl.constexpr, WHOLE: tl.constexpr):
    """For each row [q] of `_terms` p, g, a: the sums of p g and of a, or what `gradient_q_kernel` has stored of them."""
    if WHOLE:
        b_delta = tl.sum(b_p * b_g, axis=1)
        b_delta_log = tl.sum(b_a, axis=1) if LOG else b_delta
    else:
        b_delta = tl.load(stats.p_delta + offset + o_q, mask=o_q < N, other=0.0)
        b_delta_log = tl.load(stats.p_delta_log + offset + o_q, mask=o_q < N, other=0.0) if LOG else b_delta
    return b_delta, b_delta_log


@triton.jit
def _grad_logits(b_p, b_g, b_a, b_delta, b_delta_log, LOG: tl.constexpr):
    """The gradient of the logits from `_terms` p, g, a, and the sums of p g and of a over each row.

    A saturated row has p = 1 at one key. There g - sum p g is exactly 0 and must not be rounded together with a: g is thousands
    of times larger where logits are in the thousands.
    """
    b_ds = b_p * (b_g - b_delta[:, None])
    if LOG:
        b_ds += b_a - b_p * b_delta_log[:, None]
    return b_ds


@triton.jit
def dot_small(b_a, b_b, PRECISION: tl.constexpr):
    """b_a @ b_b for gradients b_a of any magnitude. In float16, which may overflow, rows are divided by their largest entry."""
    if b_b.dtype == tl.float16:
        b_max = tl.maximum(tl.max(tl.abs(b_a), axis=1), 1e-30)[:, None]  # a row of zeros is divided by no zero
        b_out = dot((b_a / b_max).to(tl.float16), b_b, PRECISION) * b_max
    else:
        b_out = dot(b_a.to(b_b.dtype), b_b, PRECISION)
    return b_out


@triton.jit
def _gradient_tile(q, k, masks, grads, first, stats, offset, outs, start, sizes, scales, C: tl.constexpr, BLOCK_KV: tl.constexpr):
    """The gradients of a tile of keys of one head, and of whole rows those of all queries.

    first, offset: where the block begins in a map, and the rows in `stats`. outs: the gradients of query and key. sizes: N, M, D
    and S. scales: that of the logits, and scale times the cotangent.
    """
    N, M, D, S = sizes
    scale_log2, factor = scales
    LOG: tl.constexpr = grads.p_log is not None
    o_kv = start + tl.arange(0, BLOCK_KV)
    o_d = tl.arange(0, C.BLOCK_D)
    m_kv = real_tokens(masks[1], o_kv, M, C.MASKED)
    b_k = load_where(k.p, k.stride_n, o_kv, o_d, m_kv, D)  # [kv,D]
    b_dk = tl.zeros([BLOCK_KV, C.BLOCK_D], dtype=tl.float32)
    for begin in range(0, N, C.BLOCK_Q):
        o_q = begin + tl.arange(0, C.BLOCK_Q)
        m_q = real_tokens(masks[0], o_q, N, C.MASKED)
        b_q = load_where(q.p, q.stride_n, o_q, o_d, m_q, D)  # [q,D], zeros in padding: NaN times its gradients of 0 would be NaN
        b_s = _logits(b_q, b_k, m_kv, scale_log2, C.PRECISION)  # [q,kv]
        b_max, b_sum = _max_and_sum(b_s, stats, offset, o_q, N, C.WHOLE)
        b_p, b_g, b_a = _terms(b_s, b_max, b_sum, grads, first, o_q, o_kv, N, M, S)
        b_delta, b_delta_log = _deltas(b_p, b_g, b_a, stats, offset, o_q, N, LOG, C.WHOLE)
        b_ds = tl.where(m_q[:, None], _grad_logits(b_p, b_g, b_a, b_delta, b_delta_log, LOG), 0.0)
        if C.WHOLE:  # one tile has all keys of these queries: their gradient is complete
            b_dq = dot_small(b_ds, b_k, C.PRECISION) * factor
            if C.MASKED:
                b_dq = tl.where(m_q[:, None], b_dq, 0.0)
            store_tile(outs[0], D, o_q, o_d, N, D, b_dq)
        b_dk += dot_small(tl.trans(b_ds), b_q, C.PRECISION)
    b_dk *= factor
    if C.MASKED:
        b_dk = tl.where(m_kv[:, None], b_dk, 0.0)
    store_tile(outs[1], D, o_kv, o_d, M, D, b_dk)


@triton.jit
def _gradient_block(qs, ks, p_masks, tiles, H, L, V, C: tl.constexpr):
    """A program's tile, its block, sample and head, and the block's query, key, masks and sizes."""
    i = tl.program_id(0)
    i_block, i_bh = (i // tiles) % C.BLOCKS, (i // (tiles * C.BLOCKS)).to(tl.int64)
    i_r, i_c = i_block // 2, i_block % 2
    if C.BLOCKS == 2:
        i_r = i_block
    i_b, i_h = i_bh // H, i_bh % H
    p_row_mask, N = _tokens(i_r, i_b, p_masks, L, V)
    p_mask, M = _tokens(i_c, i_b, p_masks, L, V)
    q, k = _rows_of(i_r, i_c, i_b, i_h, qs), _rows_of(i_r, i_c, i_b, i_h, ks)
    return i % tiles, i_r, i_c, i_b, i_bh, q, k, p_row_mask, p_mask, N, M


@triton.jit
def _gradient_offsets(i_r, i_c, i_b, i_bh, stats, L, S, C: tl.constexpr):
    """Where a block begins in a map, and where its rows begin in `stats`."""
    offset = 0
    if not C.WHOLE:
        offset = i_c.to(tl.int64) * stats.stride + i_bh * S + i_r * L
    return (i_b * S + i_r * L) * S + i_c * L, offset


@triton.jit
def gradient_kernel(qs, ks, p_masks, stats, grads, p_grad_qs, p_grad_ks, H, L, V, D, scale_log2, scale, tiles, C: tl.constexpr):
    """dK of a tile of keys j, over all queries i of a block of one head; with whole rows, of which it has all keys, also dQ.

    g_ij    = the gradient at the map, a_ij = that at log P_ij: the gradient at the map's logarithm times P_ij / sum_h P_hij
    delta_i = sum_j P_ij g_ij, delta_log_i = sum_j a_ij
    dS_ij   = P_ij (g_ij - delta_i) + a_ij - P_ij delta_log_i
    dk_j    = scale dloss sum_i dS_ij q_i           dq_i = scale dloss sum_j dS_ij k_j
    One program per sample, head, block and tile of keys.
    """
    i_kv, i_r, i_c, i_b, i_bh, q, k, p_row_mask, p_mask, N, M = _gradient_block(qs, ks, p_masks, tiles, H, L, V, C)
    S = L + V
    first, offset = _gradient_offsets(i_r, i_c, i_b, i_bh, stats, L, S, C)
    p_grad_q = _entry(i_r, i_c, p_grad_qs[0], p_grad_qs[1], p_grad_qs[2], p_grad_qs[3]) + i_bh * N * D
    p_grad_k = _entry(i_r, i_c, p_grad_ks[0], p_grad_ks[1], p_grad_ks[2], p_grad_ks[3]) + i_bh * M * D
    outs, scales = (p_grad_q, p_grad_k), (scale_log2, scale * tl.load(grads.p_loss + i_b))
    if 2 * i_r + i_c != C.UNREAD:
        if i_c == 0:
            start_l, masks_l, sizes_l = i_kv * C.BLOCK_L, (p_row_mask, p_masks[0] + i_b * L), (N, L, D, S)
            if start_l < L:
                _gradient_tile(q, k, masks_l, grads, first, stats, offset, outs, start_l, sizes_l, scales, C, C.BLOCK_L)
        else:
            start_v, masks_v, sizes_v = i_kv * C.BLOCK_V, (p_row_mask, p_masks[1] + i_b * V), (N, V, D, S)
            if start_v < V:
                _gradient_tile(q, k, masks_v, grads, first, stats, offset, outs, start_v, sizes_v, scales, C, C.BLOCK_V)


@triton.jit
def gradient_q_kernel(qs, ks, p_masks, stats, grads, p_grad_qs, H, L, V, D, scale_log2, scale, tiles, C: tl.constexpr):
    """dQ of a tile of queries of long rows, by two passes over the keys of a block of one head.

    The first gives delta_i and delta_log_i of `gradient_kernel`, which reads them from `stats`; the second
    dq_i = scale dloss sum_j dS_ij k_j, with dS as there. One program per sample, head, block and tile of queries.
    """
    i_q, i_r, i_c, i_b, i_bh, q, k, p_row_mask, p_mask, N, M = _gradient_block(qs, ks, p_masks, tiles, H, L, V, C)
    LOG: tl.constexpr = grads.p_log is not None
    S = L + V
    first, offset = _gradient_offsets(i_r, i_c, i_b, i_bh, stats, L, S, C)
    if (2 * i_r + i_c != C.UNREAD) & (i_q * C.BLOCK_Q < N):
        o_q = i_q * C.BLOCK_Q + tl.arange(0, C.BLOCK_Q)
        o_d = tl.arange(0, C.BLOCK_D)
        b_max, b_sum = _max_and_sum(None, stats, offset, o_q, N, C.WHOLE)
        m_q = real_tokens(p_row_mask, o_q, N, C.MASKED)
        b_q = load_where(q.p, q.stride_n, o_q, o_d, m_q, D)  # [q,D]
        b_delta = tl.zeros([C.BLOCK_Q], dtype=tl.float32)
        b_delta_log = tl.zeros([C.BLOCK_Q], dtype=tl.float32)
        for start in range(0, M, C.BLOCK_V):
            o_kv, _, b_s = _keys_and_logits(b_q, k, p_mask, start, M, D, scale_log2, C, C.BLOCK_V)
            b_p, b_g, b_a = _terms(b_s, b_max, b_sum, grads, first, o_q, o_kv, N, M, S)
            b_delta += tl.sum(b_p * b_g, axis=1)
            if LOG:
                b_delta_log += tl.sum(b_a, axis=1)
        tl.store(stats.p_delta + offset + o_q, b_delta, mask=o_q < N)
        if LOG:
            tl.store(stats.p_delta_log + offset + o_q, b_delta_log, mask=o_q < N)
        b_dq = tl.zeros([C.BLOCK_Q, C.BLOCK_D], dtype=tl.float32)
        for start in range(0, M, C.BLOCK_V):
            o_kv, b_k, b_s = _keys_and_logits(b_q, k, p_mask, start, M, D, scale_log2, C, C.BLOCK_V)
            b_p, b_g, b_a = _terms(b_s, b_max, b_sum, grads, first, o_q, o_kv, N, M, S)
            b_dq += dot_small(_grad_logits(b_p, b_g, b_a, b_delta, b_delta_log, LOG), b_k, C.PRECISION)
        p_grad_q = _entry(i_r, i_c, p_grad_qs[0], p_grad_qs[1], p_grad_qs[2], p_grad_qs[3]) + i_bh * N * D
        b_dq *= scale * tl.load(grads.p_loss + i_b)
        if C.MASKED:
            b_dq = tl.where(m_q[:, None], b_dq, 0.0)
        store_tile(p_grad_q, D, o_q, o_d, N, D, b_dq)
