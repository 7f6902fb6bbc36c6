"""Blocks of a joint map of text and image: head-mean attention of each block, and the gradients of its queries and keys.

A map (b, S, S) has the blocks LL, LV over VL, VV. Index 0 is text, 1 is image. congruence_loss.py launches these kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vlattn_fast.kernels._tiles import dot, load_tile, load_where, real_tokens, store_tile


@triton.jit
def _entry_of_block(i_r, i_c, xs, n: tl.constexpr, step: tl.constexpr):
    """Entry n of the block with rows i_r and columns i_c. xs has `step` entries for each of LL, VV, LV, VL in this order."""
    first = tl.where(i_c == 0, xs[n], xs[2 * step + n])
    return tl.where(i_r == 0, first, tl.where(i_c == 0, xs[3 * step + n], xs[step + n]))


@triton.jit
def _inputs_of(i_r, i_c, i_b, p_qs, p_ks, strides_q, strides_k):
    """The query and the key of a block at its sample, and their strides of head and row."""
    p_q = _entry_of_block(i_r, i_c, p_qs, 0, 1) + i_b * _entry_of_block(i_r, i_c, strides_q, 0, 3)
    p_k = _entry_of_block(i_r, i_c, p_ks, 0, 1) + i_b * _entry_of_block(i_r, i_c, strides_k, 0, 3)
    return (
        p_q,
        p_k,
        _entry_of_block(i_r, i_c, strides_q, 1, 3),
        _entry_of_block(i_r, i_c, strides_q, 2, 3),
        _entry_of_block(i_r, i_c, strides_k, 1, 3),
        _entry_of_block(i_r, i_c, strides_k, 2, 3),
    )


@triton.jit
def _logits(b_q, b_k, m_kv, scale_log2, PRECISION: tl.constexpr):
    """Base-2 logits [q,kv], -inf at padding."""
    return tl.where(m_kv[None, :], dot(b_q, tl.trans(b_k), PRECISION) * scale_log2, float("-inf"))


@triton.jit
def _max_and_sum(b_s):
    """For each row of logits: the largest, and the sum of exp2(logit - largest); 0 and 1 for a fully masked row."""
    b_max = tl.max(b_s, axis=1)
    b_max = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_sum = tl.sum(tl.exp2(b_s - b_max[:, None]), axis=1)
    return b_max, tl.where(b_sum == 0.0, 1.0, b_sum)


@triton.jit
def _map_tile(
    p_q,
    p_k,
    stride_qh,
    stride_qn,
    stride_kh,
    stride_kn,
    p_row_mask,
    p_mask,
    p_max,
    p_sum,
    p_out,
    p_log,
    o_q,
    start,
    H,
    N,
    M,
    D,
    S,
    scale_log2,
    MASKED: tl.constexpr,
    WHOLE: tl.constexpr,
    LOG: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """The mean over the heads of a tile of one block; with LOG also the base-2 logarithm of the sum over the heads."""
    o_kv = start + tl.arange(0, BLOCK_KV)
    o_d = tl.arange(0, BLOCK_D)
    m_q, m_kv = real_tokens(p_row_mask, o_q, N, MASKED), real_tokens(p_mask, o_kv, M, MASKED)
    b_mean = tl.zeros([BLOCK_Q, BLOCK_KV], dtype=tl.float32)
    b_high = tl.full([BLOCK_Q, BLOCK_KV], -3.0e38, dtype=tl.float32)
    for h in range(H):
        i_h = tl.full([], 0, tl.int64) + h
        b_q = load_where(p_q + i_h * stride_qh, stride_qn, o_q, o_d, m_q, D)  # [q,D]
        b_k = load_where(p_k + i_h * stride_kh, stride_kn, o_kv, o_d, m_kv, D)  # [kv,D]
        b_s = _logits(b_q, b_k, m_kv, scale_log2, PRECISION)
        if WHOLE:
            b_max, b_sum = _max_and_sum(b_s)
        else:
            b_max = tl.load(p_max + i_h * S + o_q, mask=o_q < N, other=0.0)
            b_sum = tl.load(p_sum + i_h * S + o_q, mask=o_q < N, other=1.0)
        b_s -= b_max[:, None]
        if LOG:  # logsumexp over the heads, so that no weight underflows
            b_s -= tl.log2(b_sum)[:, None]
            b_new = tl.maximum(b_high, b_s)
            b_mean = b_mean * tl.exp2(b_high - b_new) + tl.exp2(b_s - b_new)
            b_high = b_new
        else:
            b_mean += tl.exp2(b_s) / b_sum[:, None]
    if LOG:
        # of the sum, not of the mean: where one head has nearly all of it, this is its logarithm to the last bit
        b_log = tl.where(m_kv[None, :], b_high + tl.log2(tl.where(m_kv[None, :], b_mean, 1.0)), 0.0)
        store_tile(p_log, S, o_q, o_kv, N, M, b_log)
        b_mean *= tl.exp2(b_high)
    b_mean /= H
    store_tile(p_out, S, o_q, o_kv, N, M, b_mean)


@triton.jit
def map_kernel(
    p_qs,
    p_ks,
    strides_q,
    strides_k,
    p_text_mask,
    p_image_mask,
    H,
    L,
    V,
    D,
    scale_log2,
    p_max,
    p_sum,
    p_out,
    p_log,
    MASKED: tl.constexpr,
    WHOLE: tl.constexpr,
    LOG: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program per sample, tile of rows and tile of columns. With WHOLE there is one tile of columns per modality."""
    rows_l, columns_l = tl.cdiv(L, BLOCK_Q), tl.cdiv(L, BLOCK_L)
    columns = columns_l + tl.cdiv(V, BLOCK_V)
    i = tl.program_id(0)
    per_sample = columns * (rows_l + tl.cdiv(V, BLOCK_Q))
    i_b = (i // per_sample).to(tl.int64)
    i_q = (i % per_sample) // columns
    i_kv = i % columns
    i_r, i_c = (i_q >= rows_l).to(tl.int32), (i_kv >= columns_l).to(tl.int32)
    S, N = L + V, tl.where(i_r == 0, L, V)
    p_q, p_k, stride_qh, stride_qn, stride_kh, stride_kn = _inputs_of(i_r, i_c, i_b, p_qs, p_ks, strides_q, strides_k)
    o_q = tl.where(i_r == 0, i_q, i_q - rows_l) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    p_row_mask = tl.where(i_r == 0, p_text_mask + i_b * L, p_image_mask + i_b * V)
    first = i_b * S + i_r * L
    p_out += first * S + i_c * L
    p_log += first * S + i_c * L
    if not WHOLE:
        samples = tl.num_programs(0) // per_sample
        offset = (i_c.to(tl.int64) * samples + i_b) * H * S + i_r * L
        p_max += offset
        p_sum += offset
    if i_c == 0:
        _map_tile(
            p_q,
            p_k,
            stride_qh,
            stride_qn,
            stride_kh,
            stride_kn,
            p_row_mask,
            p_text_mask + i_b * L,
            p_max,
            p_sum,
            p_out,
            p_log,
            o_q,
            i_kv * BLOCK_L,
            H,
            N,
            L,
            D,
            S,
            scale_log2,
            MASKED,
            WHOLE,
            LOG,
            PRECISION,
            BLOCK_D,
            BLOCK_Q,
            BLOCK_L,
        )
    else:
        _map_tile(
            p_q,
            p_k,
            stride_qh,
            stride_qn,
            stride_kh,
            stride_kn,
            p_row_mask,
            p_image_mask + i_b * V,
            p_max,
            p_sum,
            p_out,
            p_log,
            o_q,
            (i_kv - columns_l) * BLOCK_V,
            H,
            N,
            V,
            D,
            S,
            scale_log2,
            MASKED,
            WHOLE,
            LOG,
            PRECISION,
            BLOCK_D,
            BLOCK_Q,
            BLOCK_V,
        )


@triton.jit
def statistics_kernel(
    p_qs,
    p_ks,
    strides_q,
    strides_k,
    p_text_mask,
    p_image_mask,
    H,
    L,
    V,
    D,
    scale_log2,
    p_max,
    p_sum,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program per sample, head, modality of the keys, and tile of rows."""
    rows_l = tl.cdiv(L, BLOCK_Q)
    rows = rows_l + tl.cdiv(V, BLOCK_Q)
    i = tl.program_id(0)
    i_q, i_c, i_bh = i % rows, (i // rows) % 2, (i // (2 * rows)).to(tl.int64)
    i_r = (i_q >= rows_l).to(tl.int32)
    S, N, M = L + V, tl.where(i_r == 0, L, V), tl.where(i_c == 0, L, V)
    i_b, i_h = i_bh // H, i_bh % H
    p_q, p_k, stride_qh, stride_qn, stride_kh, stride_kn = _inputs_of(i_r, i_c, i_b, p_qs, p_ks, strides_q, strides_k)
    p_row_mask = tl.where(i_r == 0, p_text_mask + i_b * L, p_image_mask + i_b * V)
    p_mask = tl.where(i_c == 0, p_text_mask + i_b * L, p_image_mask + i_b * V)
    o_q = tl.where(i_r == 0, i_q, i_q - rows_l) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_d = tl.arange(0, BLOCK_D)
    m_q = real_tokens(p_row_mask, o_q, N, MASKED)
    b_q = load_where(p_q + i_h * stride_qh, stride_qn, o_q, o_d, m_q, D)  # [q,D]
    b_max = tl.full([BLOCK_Q], -3.0e38, dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_Q], dtype=tl.float32)
    for start in range(0, M, BLOCK_V):
        o_kv = start + tl.arange(0, BLOCK_V)
        m_kv = real_tokens(p_mask, o_kv, M, MASKED)
        b_k = load_where(p_k + i_h * stride_kh, stride_kn, o_kv, o_d, m_kv, D)  # [kv,D]
        b_s = _logits(b_q, b_k, m_kv, scale_log2, PRECISION)
        b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
        b_sum = b_sum * tl.exp2(b_max - b_new) + tl.sum(tl.exp2(b_s - b_new[:, None]), axis=1)
        b_max = b_new
    samples = tl.num_programs(0) // (2 * rows * H)
    offset = ((i_c.to(tl.int64) * samples + i_b) * H + i_h) * S + i_r * L
    tl.store(p_max + offset + o_q, tl.where(b_sum == 0.0, 0.0, b_max), mask=o_q < N)
    tl.store(p_sum + offset + o_q, tl.where(b_sum == 0.0, 1.0, b_sum), mask=o_q < N)


@triton.jit
def _terms(b_s, b_max, b_sum, p_grad_map, p_grad_log, p_log, o_q, o_kv, N, M, S, LOG: tl.constexpr):
    """The probabilities P of a tile of logits, the gradient of P, and with LOG the gradient of log P (else it is unused)."""
    b_s -= b_max[:, None]
    b_p = tl.exp2(b_s) / b_sum[:, None]
    b_g = load_tile(p_grad_map, S, o_q, o_kv, N, M)
    b_a = b_g
    if LOG:  # the head's share of the sum over the heads, from logarithms that are rounded as those of the sum were
        b_log_p = b_s - tl.log2(b_sum)[:, None]
        b_a = tl.exp2(b_log_p - load_tile(p_log, S, o_q, o_kv, N, M)) * load_tile(p_grad_log, S, o_q, o_kv, N, M)
    return b_p, b_g, b_a


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
def _dot_small(b_a, b_b, PRECISION: tl.constexpr):
    """b_a @ b_b for gradients b_a of any magnitude. In float16, which may overflow, rows are divided by their largest entry."""
    if b_b.dtype == tl.float16:
        b_max = tl.maximum(tl.max(tl.abs(b_a), axis=1), 1e-30)[:, None]
        b_out = dot((b_a / b_max).to(tl.float16), b_b, PRECISION) * b_max
    else:
        b_out = dot(b_a.to(b_b.dtype), b_b, PRECISION)
    return b_out


@triton.jit
def _gradient_tile(
    p_q,
    p_k,
    stride_qn,
    stride_kn,
    p_row_mask,
    p_mask,
    p_grad_map,
    p_grad_log,
    p_log,
    p_max,
    p_sum,
    p_delta,
    p_delta_log,
    p_grad_q,
    p_grad_k,
    start,
    N,
    M,
    D,
    S,
    scale_log2,
    factor,
    MASKED: tl.constexpr,
    WHOLE: tl.constexpr,
    LOG: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """The gradients of a tile of keys of one head, and with WHOLE those of all queries. `factor`: scale times the cotangent."""
    o_kv = start + tl.arange(0, BLOCK_KV)
    o_d = tl.arange(0, BLOCK_D)
    m_kv = real_tokens(p_mask, o_kv, M, MASKED)
    b_k = load_where(p_k, stride_kn, o_kv, o_d, m_kv, D)  # [kv,D]
    b_dk = tl.zeros([BLOCK_KV, BLOCK_D], dtype=tl.float32)
    for first in range(0, N, BLOCK_Q):
        o_q = first + tl.arange(0, BLOCK_Q)
        m_q = real_tokens(p_row_mask, o_q, N, MASKED)
        b_q = load_where(p_q, stride_qn, o_q, o_d, m_q, D)  # [q,D]
        b_s = _logits(b_q, b_k, m_kv, scale_log2, PRECISION)
        if WHOLE:
            b_max, b_sum = _max_and_sum(b_s)
        else:
            b_max = tl.load(p_max + o_q, mask=o_q < N, other=0.0)
            b_sum = tl.load(p_sum + o_q, mask=o_q < N, other=1.0)
        b_p, b_g, b_a = _terms(b_s, b_max, b_sum, p_grad_map, p_grad_log, p_log, o_q, o_kv, N, M, S, LOG)
        if WHOLE:
            b_delta = tl.sum(b_p * b_g, axis=1)
            b_delta_log = tl.sum(b_a, axis=1) if LOG else b_delta
        else:
            b_delta = tl.load(p_delta + o_q, mask=o_q < N, other=0.0)
            b_delta_log = tl.load(p_delta_log + o_q, mask=o_q < N, other=0.0) if LOG else b_delta
        b_ds = _grad_logits(b_p, b_g, b_a, b_delta, b_delta_log, LOG)
        if WHOLE:
            b_dq = _dot_small(b_ds, b_k, PRECISION) * factor
            if MASKED:
                b_dq = tl.where(m_q[:, None], b_dq, 0.0)
            store_tile(p_grad_q, D, o_q, o_d, N, D, b_dq)
        b_dk += _dot_small(tl.trans(b_ds), b_q, PRECISION)
    b_dk *= factor
    if MASKED:
        b_dk = tl.where(m_kv[:, None], b_dk, 0.0)
    store_tile(p_grad_k, D, o_kv, o_d, M, D, b_dk)


@triton.jit
def _gradient_block(i, tiles, H, DIAGONAL: tl.constexpr):
    """A program's tile, sample, head, and the rows and columns (0 text, 1 image) of its block."""
    blocks = 2 if DIAGONAL else 4
    i_block, i_bh = (i // tiles) % blocks, (i // (tiles * blocks)).to(tl.int64)
    i_r, i_c = i_block // 2, i_block % 2
    if DIAGONAL:
        i_r = i_block
    return i % tiles, i_bh // H, i_bh % H, i_r, i_c


@triton.jit
def gradient_kernel(
    p_qs,
    p_ks,
    strides_q,
    strides_k,
    p_text_mask,
    p_image_mask,
    H,
    L,
    V,
    D,
    scale_log2,
    p_grad_map,
    p_grad_log,
    p_log,
    p_max,
    p_sum,
    p_grad_loss,
    p_delta,
    p_delta_log,
    p_grad_qs,
    p_grad_ks,
    scale,
    tiles,
    MASKED: tl.constexpr,
    WHOLE: tl.constexpr,
    LOG: tl.constexpr,
    PRECISION: tl.constexpr,
    DIAGONAL: tl.constexpr,
    UNREAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program per sample, head, block and tile of keys, over all queries.

    With WHOLE it has all keys, and so it also computes the gradient of the queries.
    """
    i_kv, i_b, i_h, i_r, i_c = _gradient_block(tl.program_id(0), tiles, H, DIAGONAL)
    S, N, M = L + V, tl.where(i_r == 0, L, V), tl.where(i_c == 0, L, V)
    p_q, p_k, stride_qh, stride_qn, stride_kh, stride_kn = _inputs_of(i_r, i_c, i_b, p_qs, p_ks, strides_q, strides_k)
    p_q += i_h * stride_qh
    p_k += i_h * stride_kh
    i_bh = i_b * H + i_h
    p_grad_q = _entry_of_block(i_r, i_c, p_grad_qs, 0, 1) + i_bh * N * D
    p_grad_k = _entry_of_block(i_r, i_c, p_grad_ks, 0, 1) + i_bh * M * D
    offset = (i_b * S + i_r * L) * S + i_c * L
    p_grad_map += offset
    p_grad_log += offset
    p_log += offset
    if not WHOLE:
        blocks = 2 if DIAGONAL else 4
        programs = tl.num_programs(0) // (blocks * tiles)
        offset = (i_c.to(tl.int64) * programs + i_bh) * S + i_r * L
        p_max += offset
        p_sum += offset
        p_delta += offset
        p_delta_log += offset
    p_row_mask = tl.where(i_r == 0, p_text_mask + i_b * L, p_image_mask + i_b * V)
    factor = scale * tl.load(p_grad_loss + i_b)
    if 2 * i_r + i_c != UNREAD:
        if i_c == 0:
            if i_kv * BLOCK_L < L:
                _gradient_tile(
                    p_q,
                    p_k,
                    stride_qn,
                    stride_kn,
                    p_row_mask,
                    p_text_mask + i_b * L,
                    p_grad_map,
                    p_grad_log,
                    p_log,
                    p_max,
                    p_sum,
                    p_delta,
                    p_delta_log,
                    p_grad_q,
                    p_grad_k,
                    i_kv * BLOCK_L,
                    N,
                    L,
                    D,
                    S,
                    scale_log2,
                    factor,
                    MASKED,
                    WHOLE,
                    LOG,
                    PRECISION,
                    BLOCK_D,
                    BLOCK_Q,
                    BLOCK_L,
                )
        else:
            if i_kv * BLOCK_V < V:
                _gradient_tile(
                    p_q,
                    p_k,
                    stride_qn,
                    stride_kn,
                    p_row_mask,
                    p_image_mask + i_b * V,
                    p_grad_map,
                    p_grad_log,
                    p_log,
                    p_max,
                    p_sum,
                    p_delta,
                    p_delta_log,
                    p_grad_q,
                    p_grad_k,
                    i_kv * BLOCK_V,
                    N,
                    V,
                    D,
                    S,
                    scale_log2,
                    factor,
                    MASKED,
                    WHOLE,
                    LOG,
                    PRECISION,
                    BLOCK_D,
                    BLOCK_Q,
                    BLOCK_V,
                )


@triton.jit
def gradient_q_kernel(
    p_qs,
    p_ks,
    strides_q,
    strides_k,
    p_text_mask,
    p_image_mask,
    H,
    L,
    V,
    D,
    scale_log2,
    p_grad_map,
    p_grad_log,
    p_log,
    p_max,
    p_sum,
    p_grad_loss,
    p_delta,
    p_delta_log,
    p_grad_qs,
    scale,
    tiles,
    MASKED: tl.constexpr,
    LOG: tl.constexpr,
    PRECISION: tl.constexpr,
    DIAGONAL: tl.constexpr,
    UNREAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """For long rows: one program per sample, head, block and tile of queries.

    It goes over the keys twice. The first time it sums and stores, for each row, probability times gradient and, with LOG, the
    gradients of the logarithms.
    """
    i_q, i_b, i_h, i_r, i_c = _gradient_block(tl.program_id(0), tiles, H, DIAGONAL)
    S, N, M = L + V, tl.where(i_r == 0, L, V), tl.where(i_c == 0, L, V)
    p_q, p_k, stride_qh, stride_qn, stride_kh, stride_kn = _inputs_of(i_r, i_c, i_b, p_qs, p_ks, strides_q, strides_k)
    p_k += i_h * stride_kh
    p_row_mask = tl.where(i_r == 0, p_text_mask + i_b * L, p_image_mask + i_b * V)
    p_mask = tl.where(i_c == 0, p_text_mask + i_b * L, p_image_mask + i_b * V)
    i_bh = i_b * H + i_h
    offset = (i_b * S + i_r * L) * S + i_c * L
    p_grad_map += offset
    p_grad_log += offset
    p_log += offset
    blocks = 2 if DIAGONAL else 4
    programs = tl.num_programs(0) // (blocks * tiles)
    offset = (i_c.to(tl.int64) * programs + i_bh) * S + i_r * L
    if (2 * i_r + i_c != UNREAD) & (i_q * BLOCK_Q < N):
        o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
        o_d = tl.arange(0, BLOCK_D)
        b_max = tl.load(p_max + offset + o_q, mask=o_q < N, other=0.0)
        b_sum = tl.load(p_sum + offset + o_q, mask=o_q < N, other=1.0)
        m_q = real_tokens(p_row_mask, o_q, N, MASKED)
        b_q = load_where(p_q + i_h * stride_qh, stride_qn, o_q, o_d, m_q, D)  # [q,D]
        b_delta = tl.zeros([BLOCK_Q], dtype=tl.float32)
        b_delta_log = tl.zeros([BLOCK_Q], dtype=tl.float32)
        for start in range(0, M, BLOCK_V):
            o_kv = start + tl.arange(0, BLOCK_V)
            m_kv = real_tokens(p_mask, o_kv, M, MASKED)
            b_k = load_where(p_k, stride_kn, o_kv, o_d, m_kv, D)  # [kv,D]
            b_s = _logits(b_q, b_k, m_kv, scale_log2, PRECISION)
            b_p, b_g, b_a = _terms(b_s, b_max, b_sum, p_grad_map, p_grad_log, p_log, o_q, o_kv, N, M, S, LOG)
            b_delta += tl.sum(b_p * b_g, axis=1)
            if LOG:
                b_delta_log += tl.sum(b_a, axis=1)
        tl.store(p_delta + offset + o_q, b_delta, mask=o_q < N)
        if LOG:
            tl.store(p_delta_log + offset + o_q, b_delta_log, mask=o_q < N)
        b_dq = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
        for start in range(0, M, BLOCK_V):
            o_kv = start + tl.arange(0, BLOCK_V)
            m_kv = real_tokens(p_mask, o_kv, M, MASKED)
            b_k = load_where(p_k, stride_kn, o_kv, o_d, m_kv, D)  # [kv,D]
            b_s = _logits(b_q, b_k, m_kv, scale_log2, PRECISION)
            b_p, b_g, b_a = _terms(b_s, b_max, b_sum, p_grad_map, p_grad_log, p_log, o_q, o_kv, N, M, S, LOG)
            b_dq += _dot_small(_grad_logits(b_p, b_g, b_a, b_delta, b_delta_log, LOG), b_k, PRECISION)
        p_grad_q = _entry_of_block(i_r, i_c, p_grad_qs, 0, 1) + i_bh * N * D
        b_dq *= scale * tl.load(p_grad_loss + i_b)
        if MASKED:
            b_dq = tl.where(m_q[:, None], b_dq, 0.0)
        store_tile(p_grad_q, D, o_q, o_d, N, D, b_dq)
