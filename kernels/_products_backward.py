"""The backward pass of scores that are functions of a product q k^T, for score_attention and relevancy_attention.

Two passes, no atomics. The query-major one comes first: it computes dQ and, for the key-major pass, `RowStats`. The key-major
one computes dK, dV and, where rows r (B, T, N) are carried along, r Abar (B, T, M): that is a sum over queries, and
this pass owns its keys and has P and dP in registers anyway. Tiles lie [kv,q] there, so that P and dS enter the next product
without leaving registers.
Up to 256 keys fit into one tile, in 16 bits. Then the key-major pass is the only one: it has all terms of dQ, too.
In float32 the rounding of lse and out would cost half a digit. The sums of P and dS, which should be 1 and 0, undo it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlattn_fast._ground.tensors import as_dtype, empty_gradient, fold_heads
from vlattn_fast.kernels._configurations import Config, cached_launch, configuration
from vlattn_fast.kernels._group_bias import (
    FLOAT_MASK,
    GROUP_BIAS,
    GROUP_PRODUCT,
    add_group_sums,
    add_sums_of_all_groups,
    gradient_blocks,
    groups_of_rows,
    groups_of_tile,
    members_of,
    parts_of,
    seeing_queries_of_product,
    seen_tiles,
    special_groups,
    store_group_sums,
    store_sums_of_product,
    tile_at,
)
from vlattn_fast.kernels._scores import (
    activate,
    along_norms,
    head_of,
    inverse_norm,
    lengthened,
    precomputed_at,
    reciprocal,
    through_score,
    weights_of_rows,
)
from vlattn_fast.kernels._tiles import (
    FEATURES,
    ROW_MULTIPLE,
    Heads,
    Pairs,
    Range,
    Tile,
    add_products,
    block_and_head,
    cdiv,
    dot,
    edge_block,
    extended,
    first_sums,
    groups_of_heads,
    has_wgmma,
    head_at,
    head_tile,
    heads_in_turn,
    heads_of,
    keep_factor,
    key_range,
    key_tile,
    keys_at,
    launched,
    map_of,
    masks_at,
    padded_rows,
    part_of,
    power_tile,
    queries_of_keys,
    real_tokens,
    round_tf32,
    row_products,
    row_shift,
    rows_and_head,
    rows_of,
    rows_times_sums,
    seeing_queries_of_heads,
    steps_of,
    store_head,
    tile_of,
    wide,
    with_bias,
    within,
    zero_sums,
)


class RowStats(NamedTuple):
    """Numbers of each row for the key-major pass, (B, H, N) float32 with N padded, so that it loads them without a mask.

    P = exp2(logit - shift) / total; without `total` that is 1. The shift is in base 2, and infinite for fully masked rows and for
    padding: P is 0 there. delta = sum(dO * O), less the gradient of the log-sum-exp. sums: the row sums of each head's Abar.
    """

    shift: Tensor
    total: Tensor | None = None
    delta: Tensor | None = None
    sums: Tensor | None = None


class OwnRows(NamedTuple):
    """In place of `RowStats`, for programs that have all keys: what they make the numbers of rows from, which is the output, the
    log-sum-exp (B, H, N) and its gradient; and dQ, which they write. All are None for other programs."""

    out: Heads | None = None
    lse: Tensor | None = None
    grad_lse: Tensor | None = None
    grad_q: Heads | None = None
    end: None = None


class _Tiles(NamedTuple):
    """Tiles of queries for one loop over them and the heads that share a key head: its first step and its end; the query from
    which tiles are numbered; how many each head has, and the number of its first one."""

    begin: Any
    end: Any
    first: Any
    of_head: Any
    number: Any


def new_rows(like: Tensor) -> Tensor:
    """(B, H, padded N) float32 for `like` (B, H, N, ...)."""
    return like.new_empty((*like.shape[:2], padded_rows(like.shape[2])), dtype=torch.float32)


def empty_key_gradients(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised, and of equally many heads: with weights per head the key can have more of them than the value. Those of the
    one that has fewer are in float32, and `heads_summed` adds them."""
    heads = max(key.shape[1], value.shape[1])
    return empty_gradient(key, heads), empty_gradient(value, heads)


def heads_summed(grad_k: Tensor, key: Tensor, grad_v: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of as many heads as key and value have."""
    return as_dtype(fold_heads(grad_k, key.shape[1]), key.dtype), as_dtype(fold_heads(grad_v, value.shape[1]), value.dtype)


def queries(
    call: dict[str, Any],
    config: Config,
    lse: Tensor,
    out: Tensor,
    coarse: RowStats | None,
    grad_lse: Tensor | None = None,
    by_gradient: bool = False,
    summed: bool = False,
    row_bias: Tensor | None = None,
) -> tuple[Tensor, RowStats, Tensor | None]:
    """dQ, the rows for `keys`, and the gradient of row_bias.

    call: named arguments of a launch, as score_attention describes them. coarse: under a float mask, shift and total of each row.
    summed: also the row sums, of A or, where `by_gradient`, of relu(A * dA).
    """
    query = call["x"].q.p
    batch, heads, num_q, _ = query.shape
    grad_q = empty_gradient(query)
    shift = new_rows(query) if coarse is None else coarse.shift
    total = coarse.total if coarse is not None else new_rows(query) if call["C"].EXACT else None
    stats = RowStats(shift, total, new_rows(query), new_rows(query) if summed else None)
    edge = edge_block(call["x"].M, config["BLOCK_KV"], call["C"].CAUSAL)
    grad_bias, blocks = gradient_blocks(row_bias, call["C"].MASK)
    for p_grad_bias, first_group, block_g in blocks if shift.numel() > 0 else ():
        _backward_q_kernel[(padded_rows(num_q) // config["BLOCK_Q"] * batch * heads,)](
            **launched(call, config, BY_GRADIENT=by_gradient, BLOCK_G=block_g, BLOCK_EDGE=edge),
            out=heads_of(out),
            p_lse=lse,
            p_grad_lse=grad_lse,
            stats=stats,
            grad_q=heads_of(grad_q),
            p_grad_bias=p_grad_bias,
            first_group=first_group,
        )
    return grad_q, stats, grad_bias


def whole_config(kernel: str, call: dict[str, Any], row_bias: Tensor | None, block_t: int = 0) -> Config | None:
    """The configuration of a kernel whose programs have all keys of a head, or None where others run in its place.

    Samples and heads have no say: results have the same bits in any batch.
    """
    x, constants = call["x"], call["C"]
    if row_bias is not None or constants.MASK >= FLOAT_MASK.value or constants.SCORE == "cosine":
        return None
    config = _whole_config(kernel, x.q.p.dtype, x.N, x.M, max(constants.BLOCK_A, constants.BLOCK_DV), block_t)
    return config if config and 0 < x.M <= config.get("BLOCK_KV", x.M) else None


@cached_launch
def _whole_config(kernel: str, dtype: torch.dtype, num_q: int, num_k: int, size: int, block_t: int) -> Config:
    return configuration("score_attention", kernel, dtype=dtype, N=num_q, M=num_k, size=size, block_t=block_t)


def keys(
    call: dict[str, Any],
    config: Config,
    rows: RowStats | OwnRows,
    relevancy: Tensor | None = None,
    factor: float = 1.0,
    by_gradient: bool = False,
    key_heads: int = 1,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dK and dV where the rows have a delta or are `OwnRows`; factor * sum over heads of r Abar, (B, T, M), where there is a
    relevancy r.

    r is (B, T, N) with N padded. config has BLOCK_T, 0 without r. A program takes `key_heads` heads, one where there are
    gradients.
    """
    x = call["x"]
    query, key, value = x.q.p, x.k.p, x.v.p
    (batch, heads, num_q, _), num_kv = query.shape, key.shape[2]
    num_t = 0 if relevancy is None else relevancy.shape[1]
    heads_kv = key.shape[1]
    grad_k = grad_v = r_abar = None
    block_edge = edge_block(num_q, config["BLOCK_Q"], call["C"].CAUSAL)
    own = OwnRows()
    if isinstance(rows, OwnRows):
        assert rows.lse is not None
        own, rows, block_edge = rows, RowStats(rows.lse, delta=rows.lse), config["BLOCK_Q"]
    if rows.delta is not None:
        grad_k, grad_v = empty_key_gradients(key, value)
        heads_kv = grad_k.shape[1]
    parts = heads_kv // key_heads
    if relevancy is not None:
        r_abar = query.new_empty((batch, max(1, parts), num_t, num_kv), dtype=torch.float32)
    if batch * heads * num_q * num_kv == 0:
        for empty in (grad_k, grad_v, r_abar):
            if empty is not None:
                empty.zero_()
    else:
        blocks = cdiv(num_kv, config["BLOCK_KV"]) * (cdiv(num_t, config["BLOCK_T"]) if num_t > 0 else 1)
        _backward_kv_kernel[(blocks * batch * parts,)](
            **launched(call, config, GROUP=heads // heads_kv, BY_GRADIENT=by_gradient, BLOCK_EDGE=block_edge),
            stats=RowStats(rows.shift, rows.total, rows.delta),
            own=own,
            p_r=relevancy,
            grad_k=None if grad_k is None else heads_of(grad_k),
            grad_v=None if grad_v is None else heads_of(grad_v),
            p_r_abar=None if num_t == 0 else r_abar,
            KEY_HEADS=key_heads,
            T=num_t,
            factor=factor,
        )
    if grad_k is not None and grad_v is not None:
        grad_k, grad_v = heads_summed(grad_k, key, grad_v, value)
    return grad_k, grad_v, None if r_abar is None else r_abar[:, 0] if r_abar.shape[1] == 1 else r_abar.sum(1)


@triton.jit
def _backward_q_kernel(x, out, p_lse, p_grad_lse, stats, grad_q, p_grad_bias, first_group, C: tl.constexpr):
    """dQ of a tile of queries i of one head, and the `RowStats` that the key-major pass takes.

    x_ij    = scale_log2 score(q_i k_j), under the masks         P_ij  = 2^(x_ij - shift_i), shift = log2(e) lse
    dP_ij   = dropout_ij dO_i v_j                                dS_ij = P_ij (dP_ij - delta_i)
    delta_i = sum_d dO_id out_id - dlse_i                        dq_i  = scale sum_j dS_ij score'(q_i k_j) k_j
    sums_i  = sum_j P_ij, or BY_GRADIENT sum_j relu(P_ij dP_ij)
    dbias_ig = sum_j dS_ij [j in group g], of BLOCK_G groups
    Under a float mask the shift comes from `stats`, with a total by which all sums over P are divided. In float32 (EXACT) sum_j P
    is such a total, too, and `_without_rounding` corrects delta and dQ. Cosine's gradient has a second term: `along_norms`.
    """
    q, k, v, grad = x.q, x.k, x.v, x.grad
    H, N, M, scale_log2, parameter = x.H, x.N, x.M, x.scale_log2, x.parameter
    SUMS: tl.constexpr = stats.sums is not None
    HALF: tl.constexpr = C.SCORE == "cosine" and q.p.dtype.element_ty == tl.float16
    APART: tl.constexpr = wide(q.p.dtype.element_ty, C.BLOCK_A)  # b_mean beside dQ would take too many registers
    NP = tl.cdiv(N, ROW_MULTIPLE) * ROW_MULTIPLE
    i_q, i_bh, i_b, i_h, i_hk = rows_and_head(NP // C.BLOCK_Q, H, C.GROUP_K, M * (C.A + C.DV), C.CAUSAL)
    p_q, p_k, p_v, p_pre_q, p_pre_k, masks = head_of(x, i_bh, i_b, i_h, i_hk, C)
    o_q = i_q * C.BLOCK_Q + tl.arange(0, C.BLOCK_Q)
    o_a = tl.arange(0, C.BLOCK_A)
    t_do = head_tile(grad, i_b, i_h, o_q, N, C.DV, C.BLOCK_DV)  # [q,Dv]
    b_out = head_tile(out, i_b, i_h, o_q, N, C.DV, C.BLOCK_DV).b  # [q,Dv]
    b_grad_lse = grad_of_lse(p_grad_lse, i_bh, o_q, N)
    b_delta = delta_of(t_do.b, b_out, b_grad_lse)
    t_q = tile_of(p_q, q.stride_n, o_q, N, C.A, C.BLOCK_A)  # [q,A]
    b_inv_q = inverse_norm(p_pre_q, o_q, C.SCORE)  # [q]
    b_weight, clamped = weights_of_rows(b_inv_q, p_pre_k, tl.cdiv(M, 128) * 128, parameter, C.SCORE, HALF)
    b_scale = scale_log2 * b_weight  # [q]
    b_shift = _row_shift(stats, p_lse, i_bh, i_bh * NP, o_q, N, C)
    b_dq = zero_sums(q.p.dtype.element_ty, C.BLOCK_Q, C.A, C.BLOCK_A)
    b_total = tl.zeros([C.BLOCK_Q], dtype=tl.float32)
    b_sums = tl.zeros([C.BLOCK_Q], dtype=tl.float32)
    b_along = tl.zeros([C.BLOCK_Q], dtype=tl.float32)
    b_bias, b_mean_bias = _first_bias(q.p.dtype.element_ty, C)
    if C.EXACT:
        b_rest = tl.zeros([C.BLOCK_Q], dtype=tl.float32)
        b_mean = b_dq
        b_mean_along = tl.zeros([C.BLOCK_Q], dtype=tl.float32)
    # tiles at the edge take masks and cosine's clamp; where it acts on some pair of the block, all of them do
    whole, end = key_range(i_q, M, False, C.CAUSAL, C.BLOCK_Q, C.BLOCK_KV)
    whole = tl.where(clamped, 0, whole)
    special, seen, b_parts = groups_of_rows(x, masks, i_bh, i_q * C.BLOCK_Q, o_q, C.MASK)
    keys = Range(0, whole, whole, end, seen)
    if APART:
        rows = t_q, b_scale, b_shift, b_inv_q, b_weight
        BLOCK: tl.constexpr = 32 if C.BLOCK_KV > 32 else C.BLOCK_KV  # of 64 whole keys sm_80 would have 144 KB in shared memory
        b_mean_along = _store_mean(x, grad_q, rows, p_k, p_pre_k, masks, seen, i_q, i_b, i_h, C, BLOCK)
    for EDGE in tl.static_range(2):
        steps = steps_of(keys, EDGE, C.BLOCK_KV, C)
        for step in range(steps.begin, steps.end, steps.size):
            start, o_kv = keys_at(step, steps, EDGE, C)
            t_k = key_tile(p_k, k.stride_n, masks.p_keys, o_kv, M if EDGE else None, C.A, C.BLOCK_A, C.KEY_MASK)  # [kv,A]
            t_v = key_tile(p_v, v.stride_n, masks.p_keys, o_kv, M if EDGE else None, C.DV, C.BLOCK_DV, C.KEY_MASK)  # [kv,Dv]
            norms = b_inv_q, inverse_norm(p_pre_k, o_kv, C.SCORE), b_weight
            b_x = row_products(t_q, t_k, C.A, C.PRECISION)  # [q,kv]
            b_x = with_bias(b_x, b_parts, x, i_b, start, C)
            of_tile = groups_of_tile(masks, start, M, o_kv.shape[0], C.MASK)
            b_s, b_slope = activate(b_x, norms, parameter, EDGE, C)
            pairs = Pairs(masks, start, o_q, o_kv, N, M)
            b_p = power_tile(b_s, b_scale, b_shift, pairs, special, of_tile, C, EDGE)
            b_dp = row_products(t_do, t_v, C.DV, C.PRECISION)  # [q,kv]
            if x.dropout is not None:
                b_dp *= keep_factor(x.dropout, i_bh, o_q, o_kv, N)
            b_total, b_sums = _add_row_sums(b_total, b_sums, b_p, b_dp, o_kv, M if EDGE else None, SUMS, C.BY_GRADIENT, C.EXACT)
            b_ds = b_p * (b_dp - b_delta[:, None])
            if C.EXACT:
                b_rest += tl.sum(b_ds, axis=1)  # before the slope: it is the softmax whose rows sum to 0
            if C.BLOCK_G > 0:
                b_bias, b_mean_bias = _add_bias(
                    b_bias, b_mean_bias, b_ds, b_p, x.product, masks, of_tile, i_b, start, o_kv, M, first_group, C
                )
            b_ds, b_along = through_score(b_ds, b_along, b_s, b_slope, norms, parameter, C.SCORE, EDGE, HALF)
            t_k = lengthened(t_k, norms, HALF and EDGE)
            b_dq = add_products(b_dq, b_ds, t_k, C.A, C.PRECISION)
            if C.EXACT and not APART:
                b_p, b_mean_along = through_score(b_p, b_mean_along, b_s, b_slope, norms, parameter, C.SCORE, EDGE)
                b_mean = add_products(b_mean, b_p, in_bfloat16(t_k), C.A, C.PRECISION)
        if C.SCORE == "cosine" and not EDGE:  # without a clamp sum_j dS_ij S_ij is q_i dQ_i
            b_along = rows_times_sums(t_q, b_dq, C.A)
            if C.EXACT and not APART:
                b_mean_along = rows_times_sums(t_q, b_mean, C.A)
    if not C.BY_GRADIENT:
        b_sums = b_total  # before a fully masked row gets a total of 1
    if C.EXACT:
        m_row = (o_q < N) & (b_total > 0.0)
        b_total = tl.where(m_row, b_total, 1.0)  # a fully masked row is 0 / 1
        b_rest = tl.where(o_q < N, b_rest / b_total, 0.0)  # NaN in the mask of the last row reaches padding
        b_rest -= b_grad_lse
        b_delta += b_rest
        b_factor = b_rest
        if APART:
            b_factor *= b_total
            b_mean = _stored_mean(head_tile(grad_q, i_b, i_h, o_q, N, C.A, C.BLOCK_A), len(b_dq), C.A)
        b_dq, b_along = _without_rounding(b_dq, b_along, b_mean, b_mean_along, b_factor)
        if C.BLOCK_G > 0:
            b_bias -= b_rest[:, None] * b_mean_bias
        tl.store(stats.total + i_bh * NP + o_q, b_total)
    elif C.MASK >= FLOAT_MASK:
        b_total = tl.load(stats.total + i_bh * NP + o_q)
    b_dq, b_along, b_sums, b_bias = _over_total(b_dq, b_along, b_sums, b_bias, b_total, special, C, C.BLOCK_G > 0)
    if C.SCORE == "cosine":
        b_dq = along_norms(b_dq, b_weight, t_q, b_inv_q, b_along, C.A)
    _store_stats(stats, i_bh * NP, o_q, N, b_shift, b_sums, b_delta, C)
    store_head(grad_q, i_b, i_h, o_q, o_a, N, C.A, [b * x.scale for b in b_dq])
    if C.BLOCK_G > 0:
        if C.MASK == GROUP_PRODUCT:
            indices = i_q, i_bh, i_b, i_h, i_hk
            b_bias = _finite_bias(b_bias, b_total, x, stats, indices, special, C)
            store_sums_of_product(p_grad_bias, masks, i_bh, i_q * C.BLOCK_Q, N, b_bias)
        else:
            store_group_sums(p_grad_bias, masks, i_bh, o_q, N, first_group, b_bias)


@triton.jit
def _first_bias(dtype: tl.constexpr, C: tl.constexpr):
    """What `_add_bias` adds to."""
    b_bias, b_mean_bias = 0, 0  # nothing: Triton 3.6 returns no None
    if C.BLOCK_G > 0:
        b_bias = tl.zeros([C.BLOCK_Q, C.BLOCK_G], dtype=tl.float32)
        b_mean_bias = b_bias
        if C.MASK == GROUP_PRODUCT:
            b_bias = first_sums(dtype, C.BLOCK_Q, C.BLOCK_G)
    return b_bias, b_mean_bias


@triton.jit
def _row_shift(stats, p_lse, i_bh, first, o_q, N, C: tl.constexpr):
    """The shift of each row [q]; `first`: the head's first row in `stats`."""
    if C.MASK >= FLOAT_MASK:  # there lse may be so large that its rounding shows (`is_coarse`)
        b_shift = tl.load(stats.shift + first + o_q)
    else:
        b_shift = row_shift(p_lse + i_bh * N, o_q, N)
    return b_shift


@triton.jit
def _store_stats(stats, first, o_q, N, b_shift, b_sums, b_delta, C: tl.constexpr):
    """All but the total; `first`: the head's first row in `stats`."""
    if C.MASK < FLOAT_MASK:
        tl.store(stats.shift + first + o_q, b_shift)
    if stats.sums is not None:
        tl.store(stats.sums + first + o_q, tl.where(o_q < N, b_sums, 0.0))  # an infinite value makes NaN of padding
    tl.store(stats.delta + first + o_q, b_delta)


@triton.jit
def _stored_mean(t_mean, PARTS: tl.constexpr, A: tl.constexpr):
    """What `_store_mean` has left in the place of the gradient."""
    b_mean = ()
    for i in tl.static_range(PARTS):
        b_mean = extended(b_mean, part_of(t_mean, i * FEATURES, A))
    return b_mean


@triton.jit
def _add_bias(b_bias, b_mean_bias, b_ds, b_p, product, masks, of_tile, i_b, start, o_kv, M, first_group, C: tl.constexpr):
    """The sums [q,BLOCK_G] of dS, and with EXACT of P, over the keys of each group, after one more tile."""
    if C.MASK == GROUP_PRODUCT:
        b_member = members_of(product, i_b, start, M, o_kv.shape[0])  # [kv,slot]
        b_bias += dot(b_ds.to(b_member.dtype), b_member, C.PRECISION)
    else:
        b_bias = add_group_sums(b_bias, b_ds, masks, of_tile, o_kv, M, first_group)
        if C.EXACT:
            b_mean_bias = add_group_sums(b_mean_bias, b_p, masks, of_tile, o_kv, M, first_group)
    return b_bias, b_mean_bias


@triton.jit
def _over_total(b_dq, b_along, b_sums, b_bias, b_total, special, C: tl.constexpr, BIAS: tl.constexpr):
    """Sums over P of `_backward_q_kernel`, divided by the total of P where it may be other than 1."""
    if C.MASK == GROUP_PRODUCT:
        if special != 0:  # else the total is 1
            b_dq = [b / b_total[:, None] for b in b_dq]
            b_sums /= b_total
            if BIAS:
                b_bias /= b_total[:, None]
    elif C.EXACT or C.MASK >= FLOAT_MASK:
        b_dq = [b / b_total[:, None] for b in b_dq]
        b_along /= b_total
        b_sums /= b_total
        if BIAS:
            b_bias /= b_total[:, None]
    return b_dq, b_along, b_sums, b_bias


@triton.jit
def _finite_bias(b_bias, b_total, x, stats, indices, special, C: tl.constexpr):
    """The gradient of the bias [q,BLOCK_G], with the rows made anew of which a product with members made NaN."""
    i_q, i_bh, i_b, i_h, i_hk = indices
    m_bad = tl.sum(b_bias * 0.0, axis=1) != 0.0  # what is not finite makes NaN
    if tl.max(m_bad.to(tl.int32), axis=0) > 0:
        b_again = _group_sums(x, stats, i_q, i_bh, i_b, i_h, i_hk, special, C)
        b_bias = tl.where(m_bad[:, None], b_again / b_total[:, None], b_bias)
    return b_bias


@triton.jit
def _group_sums(x, stats, i_q, i_bh, i_b, i_h, i_hk, special, C: tl.constexpr):
    """total_i dbias_ig [q,BLOCK_G] of `_backward_q_kernel`, where some dS is not finite: a product has 0 times infinity, NaN."""
    N, M = x.N, x.M
    NP = tl.cdiv(N, ROW_MULTIPLE) * ROW_MULTIPLE
    p_q, p_k, p_v, _, _, masks = head_of(x, i_bh, i_b, i_h, i_hk, C)
    o_q = i_q * C.BLOCK_Q + tl.arange(0, C.BLOCK_Q)
    t_q = tile_of(p_q, x.q.stride_n, o_q, N, C.A, C.BLOCK_A)
    t_do = head_tile(x.grad, i_b, i_h, o_q, N, C.DV, C.BLOCK_DV)
    b_shift, b_delta = tl.load(stats.shift + i_bh * NP + o_q), tl.load(stats.delta + i_bh * NP + o_q)
    b_scale = tl.full([C.BLOCK_Q], 1.0, dtype=tl.float32) * x.scale_log2
    b_parts = parts_of(x.product, i_bh, i_q * C.BLOCK_Q, N, C.BLOCK_Q)
    b_sums = tl.zeros([C.BLOCK_Q, C.BLOCK_G], dtype=tl.float32)
    _, end = key_range(i_q, M, True, C.CAUSAL, C.BLOCK_Q, C.BLOCK_KV)
    for start in range(0, end, C.BLOCK_KV):
        o_kv = start + tl.arange(0, C.BLOCK_KV)
        t_k = key_tile(p_k, x.k.stride_n, masks.p_keys, o_kv, M, C.A, C.BLOCK_A, C.KEY_MASK)
        t_v = key_tile(p_v, x.v.stride_n, masks.p_keys, o_kv, M, C.DV, C.BLOCK_DV, C.KEY_MASK)
        b_x = row_products(t_q, t_k, C.A, C.PRECISION)
        b_x = with_bias(b_x, b_parts, x, i_b, start, C)
        b_p = power_tile(b_x, b_scale, b_shift, Pairs(masks, start, o_q, o_kv, N, M), special, None, C, True)
        b_dp = row_products(t_do, t_v, C.DV, C.PRECISION)
        if x.dropout is not None:
            b_dp *= keep_factor(x.dropout, i_bh, o_q, o_kv, N)
        b_sums = add_sums_of_all_groups(b_sums, b_p * (b_dp - b_delta[:, None]), masks, o_kv, M)
    return b_sums


@triton.jit
def _store_mean(x, grad_q, rows, p_k, p_pre_k, masks, seen, i_q, i_b, i_h, C: tl.constexpr, BLOCK_KV: tl.constexpr):
    """Stores `b_mean` of `_without_rounding`, over the sum of P, in the place of dQ, and returns b_mean_along over it.

    Scores are made of bfloat16, too: P errs by 2^-9 of a logit, and in float32 by 2^-24, the size of b_rest. An error that all
    keys of a row share falls out of the quotient. P is at most 1, which a large logit's error could exceed.
    """
    t_q, b_scale, b_shift, b_inv_q, b_weight = rows
    o_q, o_a = t_q.o_row, tl.arange(0, C.BLOCK_A)
    t_q = in_bfloat16(t_q)
    b_mean = zero_sums(tl.bfloat16, C.BLOCK_Q, C.A, C.BLOCK_A)
    b_total = tl.zeros([C.BLOCK_Q], dtype=tl.float32)
    b_along = tl.zeros([C.BLOCK_Q], dtype=tl.float32)
    _, end = key_range(i_q, x.M, True, C.CAUSAL, C.BLOCK_Q, BLOCK_KV)
    steps = seen_tiles(seen, 0, end, BLOCK_KV, C.MASK)
    for step in range(steps.begin, steps.end, BLOCK_KV):
        start = tile_at(step, steps, C.MASK)
        o_kv = start + tl.arange(0, BLOCK_KV)
        t_k = in_bfloat16(key_tile(p_k, x.k.stride_n, masks.p_keys, o_kv, x.M, C.A, C.BLOCK_A, C.KEY_MASK))
        norms = b_inv_q, inverse_norm(p_pre_k, o_kv, C.SCORE), b_weight
        b_x = row_products(t_q, t_k, C.A, C.PRECISION)
        b_s, b_slope = activate(b_x, norms, x.parameter, True, C)
        b_p = power_tile(b_s, b_scale, b_shift, Pairs(masks, start, o_q, o_kv, x.N, x.M), 0, None, C, True)
        b_p = tl.minimum(b_p, 1.0, propagate_nan=tl.PropagateNan.ALL)
        b_total += tl.sum(b_p, axis=1)
        b_p, b_along = through_score(b_p, b_along, b_s, b_slope, norms, x.parameter, C.SCORE, True)
        b_mean = add_products(b_mean, b_p, t_k, C.A, C.PRECISION)
    b_total = tl.where(b_total > 0.0, b_total, 1.0)
    store_head(grad_q, i_b, i_h, o_q, o_a, x.N, C.A, [b / b_total[:, None] for b in b_mean])
    tl.debug_barrier()  # other threads load it
    return b_along / b_total


@triton.jit
def in_bfloat16(t):
    """A tile [x,SIZE] in bfloat16, which is never `wide`."""
    return Tile(t.b.to(tl.bfloat16), t.p, t.stride, t.o_row, t.m_row)


@triton.jit
def delta_of(b_do, b_out, b_grad_lse):
    """sum_d dO_id out_id - dlse_i of rows [q]."""
    return tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), axis=1) - b_grad_lse


@triton.jit
def grad_of_lse(p_grad_lse, i_bh, o_q, N):
    """The gradient of the log-sum-exp of rows [q], 0 where there is none."""
    if p_grad_lse is None:
        return tl.zeros(o_q.shape, dtype=tl.float32)
    else:
        return tl.load(p_grad_lse + i_bh * N + o_q, mask=o_q < N, other=0.0).to(tl.float32)


@triton.jit
def _add_row_sums(b_total, b_sums, b_p, b_dp, o_kv, M, SUMS: tl.constexpr, BY_GRADIENT: tl.constexpr, EXACT: tl.constexpr):
    """b_total and sum_j P_ij, in float32 or where these are the row SUMS; b_sums and sum_j relu(P_ij dP_ij), where those are."""
    if EXACT or (SUMS and not BY_GRADIENT):
        b_total += tl.sum(b_p, axis=1)
    if SUMS and BY_GRADIENT:
        b_sums += tl.sum(map_of(b_p, b_dp, o_kv, M), axis=1)
    return b_total, b_sums


@triton.jit
def _without_rounding(b_dq, b_along, b_mean, b_mean_along, b_rest):
    """Sums over dS = P (dP - delta) as a delta larger by b_rest makes them: less b_rest times the same sums over P.

    The rows of dS sum to 0, or to the gradient of the log-sum-exp, when delta is exact. It is not, since it is made of the
    rounded `out`. `b_rest` is what they sum to instead, known only after the loop; so the loop also sums P slope k_j, `b_mean`,
    of numbers in bfloat16: b_rest is a rounding error, of which 8 bits do.
    """
    b_exact = ()
    for i in tl.static_range(len(b_dq)):
        b_exact = extended(b_exact, b_dq[i] - b_rest[:, None] * b_mean[i])
    return b_exact, b_along - b_rest * b_mean_along


@triton.jit
def _backward_kv_kernel(x, stats, own, p_r, grad_k, grad_v, p_r_abar, KEY_HEADS, T, factor, C: tl.constexpr):
    """dK and dV of a tile of keys j, over the GROUP query heads that share it; r Abar of BLOCK_T rows of r (0: none).

    P_ij  = 2^(x_ij - shift_i) / total_i           dv_j = sum_i dropout_ij P_ij dO_i
    dP_ij = dropout_ij dO_i v_j                    dk_j = scale sum_i dS_ij score'(q_i k_j) q_i
    dS_ij = P_ij (dP_ij - delta_i)                 r_abar_tj = factor sum_i r_ti E_ij, E = P or BY_GRADIENT relu(P dP)
    shift, total and delta are those of `RowStats`, x_ij that of `_backward_q_kernel`. Tiles are [kv,q]. r Abar is summed over
    KEY_HEADS heads; gradients are there for one. With `OwnRows` the tile has all keys: dQ is there, too, and
    shift and delta are computed as `_backward_q_kernel` computes them.
    """
    N, M, parameter = x.N, x.M, x.parameter
    GRADS: tl.constexpr = grad_k is not None
    WHOLE: tl.constexpr = own.grad_q is not None
    HALF: tl.constexpr = C.SCORE == "cosine" and x.q.p.dtype.element_ty == tl.float16
    APART: tl.constexpr = GRADS and x.q.p.dtype.element_ty == tl.float32 and (C.A > 192 or C.DV > 192) and has_wgmma()
    i_kv, o_kv, o_t, i_bp, i_b, i_p = _keys_and_rows(x, KEY_HEADS, T, C)
    o_a, o_d = tl.arange(0, C.BLOCK_A), tl.arange(0, C.BLOCK_DV)
    # rows beyond N have P = 0, and keys are rows of the tiles below: those of padding are dropped at the end, without masks
    m_key = real_tokens(x.masks.p_keys + i_b * M, o_kv, M, C.KEY_MASK)
    b_dk, b_dv, b_along = _zero_gradients(x, C, WHOLE or C.BLOCK_T > 1)
    b_r_abar = zero_carried(C.BLOCK_KV, C.BLOCK_T)
    for i in range(KEY_HEADS):
        i_hkv = i_p * KEY_HEADS + i
        seeing, of_tile, b_member = _groups_of_keys(x, i_b, i_hkv * C.GROUP, i_kv * C.BLOCK_KV, C.GROUP, C, C.BLOCK_KV)
        rows = Range(N, N, 0, N, seeing) if WHOLE else queries_of_keys(i_kv, seeing, N, C)
        t_k, t_v = _keys_and_values(x, i_b, i_hkv, o_kv, m_key, WHOLE, C)  # [kv,A], [kv,Dv]
        b_inv_k, b_weight, clamped = _weights_of_keys(x, i_b, i_hkv, o_kv, HALF, C)  # [kv]
        # under a causal mask the tiles at the edge come before the whole ones; where cosine's clamp acts, all are at the edge
        # LOOP 0 has all, or 1 has dV and 2 the rest: two sums of wgmma's 64 rows and 256 features would be 256 numbers a thread,
        # and ptxas would serialise the products
        for LOOP in tl.static_range(1 if APART else 0, 3 if APART else 1):
            for EDGE in tl.static_range(1 if WHOLE else 0, 2):
                tiles = _tiles_of_queries(rows, clamped, N, EDGE, C, C.BLOCK_EDGE if EDGE else C.BLOCK_Q)
                # one loop over tiles and query heads of this key head: nested loops spill
                for j in range(tiles.begin, tiles.end):
                    i_h, i_bh, row, o_q, o_row = _queries(x, j, tiles, i_b, i_hkv, EDGE, C, C.BLOCK_EDGE if EDGE else C.BLOCK_Q)
                    t_q = head_tile(x.q, i_b, i_h, o_row, None, C.A, C.BLOCK_A)  # [q,A]
                    norms = b_inv_k, inverse_norm(precomputed_at(x.p_pres[0], i_bh, N, C.A, False), o_row, C.SCORE), b_weight
                    b_x, special = _with_bias(row_products(t_k, t_q, C.A, C.PRECISION), b_member, x, i_bh, row, C)
                    b_s, b_slope = activate(b_x, norms, parameter, EDGE, C)
                    pairs = Pairs(x.masks, i_kv * C.BLOCK_KV, o_row, o_kv, N, M)
                    b_p = _probabilities(b_s, b_weight, x, stats, own.lse, i_b, i_h, o_q, pairs, special, of_tile, C, EDGE)
                    if GRADS or C.BY_GRADIENT:
                        t_do = head_tile(x.grad, i_b, i_h, o_q, N if EDGE or C.CAUSAL else None, C.DV, C.BLOCK_DV)  # [q,Dv]
                        b_dp = row_products(t_v, t_do, C.DV, C.PRECISION)  # [kv,q]
                    if C.BLOCK_T > 0 and LOOP != 1:
                        b_map = map_of(b_p, b_dp, o_q, N if EDGE or C.CAUSAL else None) if C.BY_GRADIENT else b_p
                        b_r_abar = add_carried(b_r_abar, b_map, p_r, i_b, o_q, o_t, T, x, C)
                    if GRADS:
                        b_dropped_p, b_dp = dropped(b_p, b_dp, x, i_bh, o_q, o_kv)
                        if LOOP != 2:
                            b_dv = add_products(b_dv, b_dropped_p, t_do, C.DV, C.PRECISION)
                        if LOOP != 1:
                            b_delta = _deltas(x, stats, own.out, own.grad_lse, i_bh, i_b, i_h, o_q, o_row, C)  # [q]
                            b_ds = _gradients_of_logits(b_p, b_dp, b_delta, m_key, WHOLE)
                            b_ds, b_along = through_score(b_ds, b_along, b_s, b_slope, norms, parameter, C.SCORE, EDGE, HALF)
                            t_q = lengthened(t_q, norms, HALF and EDGE)
                            b_dk = add_products(b_dk, b_ds, t_q, C.A, C.PRECISION)
                            _store_query_gradients(own.grad_q, t_k.b, b_ds, x, i_b, i_h, o_q, C)
                if GRADS and C.SCORE == "cosine" and not EDGE and LOOP != 1:  # as in `_backward_q_kernel`
                    b_along = rows_times_sums(t_k, b_dk, C.A)
            if GRADS and LOOP != 2:  # registers are free then
                store_head(grad_v, i_b, i_p, o_kv, o_d, M, C.DV, [tl.where(m_key[:, None], b, 0.0) for b in b_dv])
        if GRADS and C.SCORE == "cosine":
            b_dk = along_norms(b_dk, b_weight, t_k, b_inv_k, b_along, C.A)
    if GRADS:
        store_head(grad_k, i_b, i_p, o_kv, o_a, M, C.A, [tl.where(m_key[:, None], b * x.scale, 0.0) for b in b_dk])
    store_carried(p_r_abar, b_r_abar, factor, i_bp, o_t, T, o_kv, m_key, M)


@triton.jit
def _keys_and_rows(x, KEY_HEADS, T, C: tl.constexpr):
    """A program's block of keys, its number and the keys; its rows of r; and its heads, as `block_and_head` has them."""
    num_kv = tl.cdiv(x.M, C.BLOCK_KV)
    num_t = tl.cdiv(T, C.BLOCK_T) if C.BLOCK_T > 0 else 1
    if C.CAUSAL:  # most queries see the first keys
        elements = x.N * (KEY_HEADS * C.GROUP * (C.A + C.DV))
        i_block, i_bp, i_b, i_p, _ = heads_in_turn(num_kv * num_t, x.H // (KEY_HEADS * C.GROUP), 1, elements)
    else:
        i_block, i_bp, i_b, i_p, _ = block_and_head(num_kv * num_t, x.H // (KEY_HEADS * C.GROUP), 1)
    i_kv = i_block % num_kv
    o_kv = i_kv * C.BLOCK_KV + tl.arange(0, C.BLOCK_KV)
    o_t = (i_block // num_kv) * C.BLOCK_T + tl.arange(0, C.BLOCK_T if C.BLOCK_T > 0 else 1)
    return i_kv, o_kv, o_t, i_bp, i_b, i_p


@triton.jit
def _zero_gradients(x, C: tl.constexpr, MORE: tl.constexpr):
    """Zeros for the sums of dK and dV, and for cosine's along the norms. MORE: dQ or carried rows have products, too."""
    # beside those Triton 3.9, too, makes copies of the one number (`first_sums`)
    b_dk = zero_sums(x.q.p.dtype.element_ty, C.BLOCK_KV, C.A, C.BLOCK_A, MORE)
    b_dv = zero_sums(x.q.p.dtype.element_ty, C.BLOCK_KV, C.DV, C.BLOCK_DV, MORE)
    return b_dk, b_dv, tl.zeros([C.BLOCK_KV], dtype=tl.float32)


@triton.jit
def _heads_of_keys(i_hkv, C: tl.constexpr):
    """The head of keys and that of values which the i_hkv-th GROUP query heads share."""
    i_hk = i_hkv if C.GROUP == C.GROUP_K else i_hkv * C.GROUP // C.GROUP_K
    i_hv = i_hkv if C.GROUP == C.GROUP_V else i_hkv * C.GROUP // C.GROUP_V
    return i_hk, i_hv


@triton.jit
def _keys_and_values(x, i_b, i_hkv, o_kv, m_key, WHOLE: tl.constexpr, C: tl.constexpr):
    """Where keys and values of the i_hkv-th GROUP query heads lie, and their tiles. WHOLE: padding is zeros, for dQ is a sum over
    the keys."""
    i_hk, i_hv = _heads_of_keys(i_hkv, C)
    m_row = m_key if WHOLE else within(o_kv, x.M)
    t_k = rows_of(head_at(x.k, i_b, i_hk, C.A), x.k.stride_n, o_kv, m_row, C.A, C.BLOCK_A)
    return t_k, rows_of(head_at(x.v, i_b, i_hv, C.DV), x.v.stride_n, o_kv, m_row, C.DV, C.BLOCK_DV)


@triton.jit
def _groups_of_keys(x, i_b, first_head, start, HEADS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """Beside a group bias: the queries that see some of BLOCK keys in some of HEADS heads, `groups_of_heads`, `members_of`."""
    of_tile = 0, 0, 0, False
    b_member = 0
    if C.MASK == GROUP_PRODUCT:
        of_sample = masks_at(x.masks, i_b, first_head, x.M)
        seeing = seeing_queries_of_product(of_sample, x.product, i_b * x.H + first_head, HEADS, start, x.N, x.M, BLOCK)
        b_member = members_of(x.product, i_b, start, x.M, BLOCK)  # [kv,slot]
    else:
        seeing = seeing_queries_of_heads(x.masks, i_b, first_head, HEADS, start, x.N, x.M, BLOCK, C.MASK)
        of_tile = groups_of_heads(x.masks, i_b, first_head, HEADS, start, x.M, BLOCK, C.MASK)
    return seeing, of_tile, b_member


@triton.jit
def _weights_of_keys(x, i_b, i_hkv, o_kv, HALF: tl.constexpr, C: tl.constexpr):
    """For cosine 1 / |k_j| of a tile of keys, and their `weights_of_rows` beside the queries of GROUP heads."""
    i_hk, _ = _heads_of_keys(i_hkv, C)
    b_inv_k = inverse_norm(precomputed_at(x.p_pres[1], i_b * (x.H // C.GROUP_K) + i_hk, x.M, C.A, False), o_kv, C.SCORE)  # [kv]
    p_inv_q = precomputed_at(x.p_pres[0], i_b * x.H + i_hkv * C.GROUP, x.N, C.A, False)
    b_weight, clamped = weights_of_rows(b_inv_k, p_inv_q, tl.cdiv(x.N, 128) * C.GROUP * 128, x.parameter, C.SCORE, HALF)
    return b_inv_k, b_weight, clamped


@triton.jit
def _tiles_of_queries(of, clamped, N, EDGE: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """The tiles of BLOCK queries of a `Range` that see a tile of keys, those at its EDGE or the whole ones."""
    first = tl.where(clamped, tl.minimum(of.begin, of.edge), of.edge) if EDGE else of.begin
    last = tl.where(clamped, N, of.edge_end) if EDGE else tl.where(clamped, of.begin, of.end)
    steps = seen_tiles(of.seen, first, last, BLOCK, C.MASK)
    first, last = steps.begin, steps.end
    of_head = tl.cdiv(last - first, BLOCK)
    number = 0
    if C.MASK == GROUP_PRODUCT:  # tiles are numbered from the first query on, else their addresses are computed anew
        number, first = (first // BLOCK).to(tl.int64), 0
    begin = number if C.GROUP == 1 else 0
    return _Tiles(begin, begin + of_head * C.GROUP, first, of_head, number)


@triton.jit
def _queries(x, j, tiles, i_b, i_hkv, EDGE: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """The head of the j-th tile, its number in all samples, the tile's first query, all its queries, and the rows to read."""
    i_h = i_hkv if C.GROUP == 1 else i_hkv * C.GROUP + j // tiles.of_head
    i_q = j if C.GROUP == 1 else tiles.number + j % tiles.of_head
    o_q = tiles.first + (i_q * BLOCK + tl.arange(0, BLOCK))
    # rows beyond N are the last one again, with P = 0: zeros times an infinite key would be NaN
    return i_h, i_b * x.H + i_h, tiles.first + i_q * BLOCK, o_q, tl.minimum(o_q, x.N - 1) if EDGE or C.CAUSAL else o_q


@triton.jit
def _with_bias(b_x, b_member, x, i_bh, row, C: tl.constexpr):
    """q k of the queries from `row` on, and where a product adds it their bias over the scale; and `special_groups`."""
    special = 0
    if C.MASK == GROUP_PRODUCT:
        special = special_groups(x.product, i_bh, row, x.N, b_x.shape[1])[0]
        b_x += dot(b_member, tl.trans(parts_of(x.product, i_bh, row, x.N, b_x.shape[1])), C.PRECISION)
    return b_x, special


@triton.jit
def _probabilities(b_s, b_weight, x, stats, p_lse, i_b, i_h, o_q, pairs, special, groups, C: tl.constexpr, EDGE: tl.constexpr):
    """P_ij = 2^(x_ij - shift_i) / total_i of scores [kv,q]. p_lse: that of `OwnRows`. pairs, special, groups:
    of `power_tile`."""
    i_bh = i_b * x.H + i_h
    row = i_bh * (tl.cdiv(x.N, ROW_MULTIPLE) * ROW_MULTIPLE)
    if p_lse is None:
        b_shift = tl.load(stats.shift + row + o_q)  # [q]
    else:
        b_shift = row_shift(p_lse + i_bh * x.N, o_q, x.N)
    p_total = stats.total + row if stats.total is not None else 0
    b_p = power_tile(b_s, x.scale_log2 * b_weight, b_shift, pairs, special, groups, C, EDGE, (i_b, i_h, p_total, o_q))
    if C.MASK == GROUP_PRODUCT:
        pass
    elif C.MASK >= GROUP_BIAS and not C.EXACT:
        b_p *= reciprocal(tl.load(stats.total + row + o_q), C.PRECISION)[None, :]
    elif stats.total is not None:  # one division a query, not one a pair
        b_p *= tl.div_rn(1.0, tl.load(stats.total + row + o_q))[None, :]
    return b_p


@triton.jit
def _deltas(x, stats, out, p_grad_lse, i_bh, i_b, i_h, o_q, o_row, C: tl.constexpr):
    """delta_i [q] of `RowStats`, or where there is the out of `OwnRows` computed from it."""
    if out is None:
        return tl.load(stats.delta + i_bh * (tl.cdiv(x.N, ROW_MULTIPLE) * ROW_MULTIPLE) + o_q)
    else:
        # dO by another address than products read it by: Triton has one buffer for a tile that not only products read, and copies
        # the next tile there while a product reads this one
        b_do = head_tile(x.grad, i_b, i_h, o_row, None, C.DV, C.BLOCK_DV).b  # [q,Dv]
        b_out = head_tile(out, i_b, i_h, o_row, None, C.DV, C.BLOCK_DV).b
        return tl.where(o_q < x.N, delta_of(b_do, b_out, grad_of_lse(p_grad_lse, i_bh, o_row, x.N)), 0.0)


@triton.jit
def _gradients_of_logits(b_p, b_dp, b_delta, m_key, WHOLE: tl.constexpr):
    """dS [kv,q]. WHOLE: of keys of zeros, padding, it is 0, where P may be infinite."""
    if WHOLE:
        b_p = tl.where(m_key[:, None], b_p, 0.0)
    return b_p * (b_dp - b_delta[None, :])


@triton.jit
def _store_query_gradients(grad_q, b_k, b_ds, x, i_b, i_h, o_q, C: tl.constexpr):
    """dQ of a tile of queries where the tile of keys is all of them. It is [A,q] first: wgmma takes no fewer than 64 rows."""
    if grad_q is not None:
        b_dq = dot(tl.trans(b_k), b_ds.to(b_k.dtype), C.PRECISION)
        store_head(grad_q, i_b, i_h, o_q, tl.arange(0, C.BLOCK_A), x.N, C.A, (tl.trans(b_dq) * x.scale,))


@triton.jit
def dropped(b_p, b_dp, x, i_bh, o_q, o_kv):
    """dropout_ij P_ij, which dV takes, and dropout_ij dP_ij [kv,q]; P itself stays in dS."""
    if x.dropout is None:
        return b_p, b_dp
    else:
        b_factor = tl.trans(keep_factor(x.dropout, i_bh, o_q, o_kv, x.N))
        return b_p * b_factor, b_dp * b_factor


@triton.jit
def zero_carried(BLOCK_KV: tl.constexpr, BLOCK_T: tl.constexpr):
    """Zeros for the sums of r Abar: [kv,T], or [kv] of one row."""
    if BLOCK_T <= 1:
        return tl.zeros([BLOCK_KV], dtype=tl.float32)
    else:
        return tl.zeros([BLOCK_KV, BLOCK_T], dtype=tl.float32)


@triton.jit
def add_carried(b_r_abar, b_map, p_r, i_b, o_q, o_t, T, x, C: tl.constexpr):
    """b_r_abar and sum_i r_ti E_ij of a tile b_map [kv,q] of E."""
    p_r += i_b * T * (tl.cdiv(x.N, ROW_MULTIPLE) * ROW_MULTIPLE)
    if o_t.shape[0] == 1:
        b_r = tl.load(p_r + o_q)  # [q]
        b_r_abar += tl.sum(b_map * b_r[None, :], axis=1)
    else:
        o_r = o_t[None, :].to(tl.int64) * (tl.cdiv(x.N, ROW_MULTIPLE) * ROW_MULTIPLE) + o_q[:, None]
        b_r = tl.load(p_r + o_r, mask=(o_t < T)[None, :], other=0.0)  # [q,T]
        if x.q.p.dtype.element_ty != tl.float32 or C.PRECISION == "tf32":  # what a matrix unit would cut off
            b_map, b_r = round_tf32(b_map), round_tf32(b_r)
        b_r_abar += dot(b_map, b_r, "tf32" if C.PRECISION == "ieee" else C.PRECISION)
    return b_r_abar


@triton.jit
def store_carried(p_r_abar, b_r_abar, factor, i_bp, o_t, T, o_kv, m_key, M):
    """r Abar of a tile of keys, and 0 for padding; nothing without rows of r."""
    m_kv = o_kv < M
    if p_r_abar is None:
        pass
    elif o_t.shape[0] == 1:
        tl.store(p_r_abar + i_bp * M + o_kv, tl.where(m_key, b_r_abar * factor, 0.0), mask=m_kv)
    else:
        offsets = (i_bp * T + o_t[None, :]) * M + o_kv[:, None]
        b_r_abar = tl.where(m_key[:, None], b_r_abar * factor, 0.0)
        tl.store(p_r_abar + offsets, b_r_abar, mask=m_kv[:, None] & (o_t < T)[None, :])
