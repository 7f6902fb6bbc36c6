"""The backward pass of scores that are functions of a product q k^T, for score_attention and relevancy_attention.

Two passes, no atomics. The query-major one comes first: it computes dQ and what the key-major pass needs of each row (`Rows`).
The key-major one computes dK, dV and, where rows r (B, T, N) are carried along, r Abar (B, T, M): that is a sum over queries, and
this pass owns its keys and has P and dP in registers anyway. Tiles lie [kv,q] there, so that P and dS enter the next product
without leaving registers.
In float32 the rounding of lse and out would cost half a digit. The sums of P and dS, which should be 1 and 0, undo it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlattn_fast._ground.tensors import as_dtype, empty_gradient, fold_heads
from vlattn_fast.kernels._configurations import Config
from vlattn_fast.kernels._scores import (
    activate,
    lengthened,
    norm_backward,
    precomputed_at,
    row_norm_and_bound,
    sum_unclamped,
    times_slope,
    weights_of_rows,
)
from vlattn_fast.kernels._tiles import (
    ROWS,
    add_mask,
    block_and_head,
    cdiv,
    dot,
    edge_block,
    keep_factor,
    key_range,
    load_keys,
    load_rows,
    mask_tile,
    padded_rows,
    query_range,
    real_tokens,
    relu,
    round_tf32,
    row_shift,
    rows_at,
    store_tile,
    strides,
)


class Rows(NamedTuple):
    """What the key-major pass needs of each row, (B, H, N) float32 with N padded, so that it loads them without a mask.

    P = exp2(logit - shift) / total; without `total` that is 1. The shift is in base 2, and infinite for fully masked rows and for
    padding: P is 0 there. delta = sum(dO * O), less the gradient of the log-sum-exp. sums: the row sums of each head's Abar.
    """

    shift: Tensor
    total: Tensor | None = None
    delta: Tensor | None = None
    sums: Tensor | None = None


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
    coarse: Rows | None,
    grad_lse: Tensor | None = None,
    by_gradient: bool = False,
    summed: bool = False,
) -> tuple[Tensor, Rows]:
    """dQ, and the rows for `keys`.

    call: named arguments of a launch, as score_attention describes them. coarse: under a float mask, shift and total of each row.
    summed: also the row sums, of A or, where `by_gradient`, of relu(A * dA).
    """
    query = call["p_q"]
    batch, heads, num_q, _ = query.shape
    grad_q, delta, sums = empty_gradient(query), new_rows(query), new_rows(query) if summed else None
    shift = new_rows(query) if coarse is None else coarse.shift
    total = coarse.total if coarse is not None else new_rows(query) if call["EXACT"] else None
    if shift.numel() > 0:
        _backward_q_kernel[(padded_rows(num_q) // config["BLOCK_Q"] * batch * heads,)](
            **call,
            p_out=out,
            p_lse=lse,
            p_grad_lse=lse if grad_lse is None else grad_lse,
            p_shift=shift,
            p_delta=delta,
            p_total=shift if total is None else total,
            p_sums=shift if sums is None else sums,
            p_grad_q=grad_q,
            stride_ob=out.stride(0),
            stride_oh=out.stride(1),
            stride_on=out.stride(2),
            **strides("dq", grad_q.stride()),
            LSE=grad_lse is not None,
            BY_GRADIENT=by_gradient,
            SUMS=summed,
            BLOCK_EDGE=edge_block(call["M"], config["BLOCK_KV"], call["CAUSAL"]),
            **config,
        )
    return grad_q, Rows(shift, total, delta, sums)


def keys(
    call: dict[str, Any],
    config: Config,
    rows: Rows,
    relevancy: Tensor | None = None,
    factor: float = 1.0,
    by_gradient: bool = False,
    key_heads: int = 1,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dK and dV where the rows have a delta; factor * sum over heads of r Abar, (B, T, M), where there is a relevancy r.

    r is (B, T, N) with N padded. config has BLOCK_T, 0 without r. A program takes `key_heads` heads, one where there are
    gradients.
    """
    query, key, value = call["p_q"], call["p_k"], call["p_v"]
    (batch, heads, num_q, _), num_kv = query.shape, key.shape[2]
    num_t = 0 if relevancy is None else relevancy.shape[1]
    heads_kv = key.shape[1]
    grad_k = grad_v = r_abar = None
    if rows.delta is not None:
        grad_k, grad_v = empty_key_gradients(key, value)
        heads_kv = grad_k.shape[1]
    parts = heads_kv // key_heads
    if relevancy is not None:
        r_abar = query.new_empty((batch, max(1, parts), num_t, num_kv), dtype=torch.float32)
    if batch * heads * num_q * num_kv == 0:
        for x in (grad_k, grad_v, r_abar):
            if x is not None:
                x.zero_()
    else:
        exact_t = query.dtype == torch.float32 or call["PRECISION"] == "widen"
        precision = call["PRECISION"] if exact_t else "tf32"
        blocks = cdiv(num_kv, config["BLOCK_KV"]) * (cdiv(num_t, config["BLOCK_T"]) if num_t > 0 else 1)
        _backward_kv_kernel[(blocks * batch * parts,)](
            **call,
            p_shift=rows.shift,
            p_total=rows.shift if rows.total is None else rows.total,
            p_delta=rows.shift if rows.delta is None else rows.delta,
            p_r=query if relevancy is None else relevancy,
            p_grad_k=query if grad_k is None else grad_k,
            p_grad_v=query if grad_v is None else grad_v,
            p_r_abar=query if r_abar is None else r_abar,
            **strides("dk", (query if grad_k is None else grad_k).stride()),
            **strides("dv", (query if grad_v is None else grad_v).stride()),
            GROUP=heads // heads_kv,
            KEY_HEADS=key_heads,
            T=num_t,
            factor=factor,
            TOTAL=rows.total is not None,
            GRADS=grad_k is not None,
            BY_GRADIENT=by_gradient,
            PRECISION_T=precision,
            ROUND=query.dtype != torch.float32 or precision == "tf32",
            BLOCK_EDGE=edge_block(num_q, config["BLOCK_Q"], call["CAUSAL"]),
            **config,
        )
    if grad_k is not None and grad_v is not None:
        grad_k, grad_v = heads_summed(grad_k, key, grad_v, value)
    return grad_k, grad_v, None if r_abar is None else r_abar[:, 0] if r_abar.shape[1] == 1 else r_abar.sum(1)


@triton.jit
def _backward_q_kernel(
    p_q,
    p_k,
    p_v,
    p_pre_q,
    p_pre_k,
    p_mask,
    p_key_mask,
    p_seed,
    p_grad,
    p_out,
    p_lse,
    p_grad_lse,
    p_shift,
    p_delta,
    p_total,
    p_sums,
    p_grad_q,
    H,
    GROUP_K: tl.constexpr,
    GROUP_V: tl.constexpr,
    N,
    M,
    A: tl.constexpr,
    DV: tl.constexpr,
    scale,
    scale_log2,
    parameter,
    dropout_p,
    threshold,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_mb,
    stride_mh,
    stride_mn,
    stride_mm,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_ob,
    stride_oh,
    stride_on,
    stride_dqb,
    stride_dqh,
    stride_dqn,
    SCORE: tl.constexpr,
    MASK: tl.constexpr,
    KEY_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    EXACT: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    LSE: tl.constexpr,
    BY_GRADIENT: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_EDGE: tl.constexpr,
):
    """dQ and delta; the shift in base 2, or under a float mask read from p_shift; in float32 also the total.

    SUMS: the row sums of this head's Abar.
    """
    HALF: tl.constexpr = SCORE == "cosine" and p_q.dtype.element_ty == tl.float16
    NP = tl.cdiv(N, ROWS) * ROWS
    i_q, i_bh, i_b, i_h, i_hk = block_and_head(NP // BLOCK_Q, H, GROUP_K)
    if CAUSAL:
        i_q = NP // BLOCK_Q - 1 - i_q  # the longest rows first
    p_k = rows_at(p_k, i_b * stride_kb + i_hk * stride_kh, A)
    p_v = rows_at(p_v, i_b * stride_vb + (i_h // GROUP_V) * stride_vh, DV)
    p_mask += i_b * stride_mb + i_h * stride_mh
    p_key_mask += i_b * M
    p_pre_q = precomputed_at(p_pre_q, i_bh, N, A, False)
    p_pre_k = precomputed_at(p_pre_k, i_b * (H // GROUP_K) + i_hk, M, A, False)
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_a = tl.arange(0, BLOCK_A)
    o_d = tl.arange(0, BLOCK_DV)
    b_do = load_rows(rows_at(p_grad, i_b * stride_gb + i_h * stride_gh, DV), stride_gn, o_q, o_d, N, DV)  # [q,Dv]
    b_out = load_rows(rows_at(p_out, i_b * stride_ob + i_h * stride_oh, DV), stride_on, o_q, o_d, N, DV)  # [q,Dv]
    b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), axis=1)
    if LSE:
        b_grad_lse = tl.load(p_grad_lse + i_bh * N + o_q, mask=o_q < N, other=0.0).to(tl.float32)
        b_delta -= b_grad_lse
    b_q = load_rows(rows_at(p_q, i_b * stride_qb + i_h * stride_qh, A), stride_qn, o_q, o_a, N, A)  # [q,A]
    b_row, _ = row_norm_and_bound(b_q, p_pre_q, o_q, SCORE)
    b_weight, clamped = weights_of_rows(b_row, p_pre_k, tl.cdiv(M, 128) * 128, parameter, SCORE, HALF)
    b_scale = scale_log2 * b_weight
    if MASK == 2:
        b_shift = tl.load(p_shift + i_bh * NP + o_q)
    else:
        b_shift = row_shift(p_lse + i_bh * N, o_q, N)
    b_dq = tl.zeros([BLOCK_Q, BLOCK_A], dtype=tl.float32)
    b_total = tl.zeros([BLOCK_Q], dtype=tl.float32)
    b_sums = tl.zeros([BLOCK_Q], dtype=tl.float32)
    b_along = tl.zeros([BLOCK_Q], dtype=tl.float32)
    if EXACT:
        # sum(dS) would be 0 (with LSE its gradient) without the rounding of `out` in delta: the rest corrects delta, and dQ
        # through sum(P slope K)
        b_rest = tl.zeros([BLOCK_Q], dtype=tl.float32)
        b_mean = tl.zeros([BLOCK_Q, BLOCK_A], dtype=tl.float32)
        b_mean_along = tl.zeros([BLOCK_Q], dtype=tl.float32)
    whole, end = key_range(i_q, M, False, CAUSAL, BLOCK_Q, BLOCK_KV)
    whole = tl.where(clamped, 0, whole)
    for EDGE in tl.static_range(2):
        for start in range(whole if EDGE else 0, end if EDGE else whole, BLOCK_EDGE if EDGE else BLOCK_KV):
            o_kv = start + tl.arange(0, BLOCK_EDGE if EDGE else BLOCK_KV)
            b_k = load_keys(p_k, stride_kn, p_key_mask, o_kv, o_a, M if EDGE else None, A, KEY_MASK)  # [kv,A]
            b_v = load_keys(p_v, stride_vn, p_key_mask, o_kv, o_d, M if EDGE else None, DV, KEY_MASK)  # [kv,Dv]
            b_column, _ = row_norm_and_bound(b_k, p_pre_k, o_kv, SCORE)
            b_x = dot(b_q, tl.trans(b_k), PRECISION)  # [q,kv]
            b_s, b_slope = activate(b_x, b_row, b_column, b_weight, parameter, SCORE, EDGE, FAST, PRECISION)
            b_logit = mask_tile(
                b_s * b_scale[:, None], p_mask, stride_mn, stride_mm, p_key_mask, o_q, o_kv, N, M, MASK, KEY_MASK, CAUSAL, EDGE
            )
            b_p = tl.exp2(b_logit - b_shift[:, None])
            b_dp = dot(b_do, tl.trans(b_v), PRECISION)  # [q,kv]
            if DROPOUT:
                b_dp *= keep_factor(p_seed, dropout_p, threshold, i_bh, o_q, o_kv, N)
            if EXACT or (SUMS and not BY_GRADIENT):
                b_total += tl.sum(b_p, axis=1)
            if SUMS and BY_GRADIENT:
                b_sums += tl.sum(relu(b_p * b_dp), axis=1)
            b_ds = b_p * (b_dp - b_delta[:, None])
            if EXACT:
                b_rest += tl.sum(b_ds, axis=1)
            if SCORE == "cosine":
                if EDGE:
                    b_along += sum_unclamped(b_ds * b_s, b_row, b_column, parameter)
                b_ds = times_slope(b_ds, b_row, b_column, b_weight, parameter, EDGE, HALF)
                b_k = lengthened(b_k, b_column, EDGE)
                if EXACT:
                    if EDGE:
                        b_mean_along += sum_unclamped(b_p * b_s, b_row, b_column, parameter)
                    b_p = times_slope(b_p, b_row, b_column, b_weight, parameter, EDGE, False)
            elif SCORE != "dot":
                b_ds *= b_slope
                b_p *= b_slope
            b_dq += dot(b_ds.to(b_k.dtype), b_k, PRECISION)
            if EXACT:
                b_mean += dot(b_p, b_k, PRECISION)
        if SCORE == "cosine" and not EDGE:  # without a clamp sum_j dS_ij S_ij is q_i dQ_i
            b_along = tl.sum(b_q.to(tl.float32) * b_dq, axis=1)
            if EXACT:
                b_mean_along = tl.sum(b_q * b_mean, axis=1)
    if EXACT:
        b_total = tl.where((o_q < N) & (b_total > 0.0), b_total, 1.0)
        b_rest = tl.where(o_q < N, b_rest / b_total, 0.0)  # NaN in the mask of the last row reaches padding
        if LSE:
            b_rest -= b_grad_lse
        b_delta += b_rest
        b_dq -= b_rest[:, None] * b_mean
        b_along -= b_rest * b_mean_along
        if not BY_GRADIENT:
            b_sums = b_total
        b_one = b_total
        tl.store(p_total + i_bh * NP + o_q, b_total)
    else:
        if not BY_GRADIENT:
            b_sums = b_total
        b_one = tl.load(p_total + i_bh * NP + o_q) if MASK == 2 else 1.0
    if EXACT or MASK == 2:
        b_dq /= b_one[:, None]
        b_along /= b_one
        b_sums /= b_one
    if SCORE == "cosine":
        b_dq = b_dq * b_weight[:, None] - norm_backward(b_q, b_row, b_along * b_weight)
    if MASK != 2:
        tl.store(p_shift + i_bh * NP + o_q, b_shift)
    if SUMS:
        tl.store(p_sums + i_bh * NP + o_q, b_sums)
    tl.store(p_delta + i_bh * NP + o_q, b_delta)
    store_tile(p_grad_q + i_b * stride_dqb + i_h * stride_dqh, stride_dqn, o_q, o_a, N, A, b_dq * scale)


@triton.jit
def _backward_kv_kernel(
    p_q,
    p_k,
    p_v,
    p_pre_q,
    p_pre_k,
    p_mask,
    p_key_mask,
    p_seed,
    p_grad,
    p_shift,
    p_total,
    p_delta,
    p_r,
    p_grad_k,
    p_grad_v,
    p_r_abar,
    H,
    GROUP_K: tl.constexpr,
    GROUP_V: tl.constexpr,
    N,
    M,
    A: tl.constexpr,
    DV: tl.constexpr,
    scale,
    scale_log2,
    parameter,
    dropout_p,
    threshold,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_mb,
    stride_mh,
    stride_mn,
    stride_mm,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_dkb,
    stride_dkh,
    stride_dkn,
    stride_dvb,
    stride_dvh,
    stride_dvn,
    GROUP: tl.constexpr,
    KEY_HEADS,
    T,
    factor,
    SCORE: tl.constexpr,
    MASK: tl.constexpr,
    KEY_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    EXACT: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    TOTAL: tl.constexpr,
    GRADS: tl.constexpr,
    BY_GRADIENT: tl.constexpr,
    PRECISION_T: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_EDGE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """For one tile of keys in KEY_HEADS heads: with GRADS dK and dV, of one head then; r Abar of BLOCK_T rows of r (0: none).

    GROUP query heads share a head of dK and dV.
    """
    HALF: tl.constexpr = SCORE == "cosine" and p_q.dtype.element_ty == tl.float16
    num_kv = tl.cdiv(M, BLOCK_KV)
    num_t = tl.cdiv(T, BLOCK_T) if BLOCK_T > 0 else 1
    i_block, i_bp, i_b, i_p, i_all = block_and_head(num_kv * num_t, H // (GROUP * KEY_HEADS), 1)
    i_kv = i_block % num_kv
    o_kv = i_kv * BLOCK_KV + tl.arange(0, BLOCK_KV)
    o_t = (i_block // num_kv) * BLOCK_T + tl.arange(0, BLOCK_T if BLOCK_T > 0 else 1)
    o_a = tl.arange(0, BLOCK_A)
    o_d = tl.arange(0, BLOCK_DV)
    NP = tl.cdiv(N, ROWS) * ROWS
    p_r += i_b * T * NP
    # rows beyond N have P = 0, and keys are rows of the tiles below: those of padding are dropped at the end, without masks
    m_kv = o_kv < M
    m_key = real_tokens(p_key_mask + i_b * M, o_kv, M, KEY_MASK)
    if GRADS:
        b_dk = tl.zeros([BLOCK_KV, BLOCK_A], dtype=tl.float32)
        b_dv = tl.zeros([BLOCK_KV, BLOCK_DV], dtype=tl.float32)
        b_along = tl.zeros([BLOCK_KV], dtype=tl.float32)
    if BLOCK_T == 1:
        b_r_abar = tl.zeros([BLOCK_KV], dtype=tl.float32)
    elif BLOCK_T > 1:
        b_r_abar = tl.zeros([BLOCK_KV, BLOCK_T], dtype=tl.float32)
    whole, end, edge, edge_end = query_range(i_kv, N, CAUSAL, BLOCK_Q, BLOCK_KV)
    for i in range(KEY_HEADS):
        i_hkv = i_p * KEY_HEADS + i
        i_hk = i_hkv if GROUP == GROUP_K else i_hkv * GROUP // GROUP_K
        i_hv = i_hkv if GROUP == GROUP_V else i_hkv * GROUP // GROUP_V
        b_k = load_rows(rows_at(p_k, i_b * stride_kb + i_hk * stride_kh, A), stride_kn, o_kv, o_a, M, A)  # [kv,A]
        if GRADS or BY_GRADIENT:
            b_v = load_rows(rows_at(p_v, i_b * stride_vb + i_hv * stride_vh, DV), stride_vn, o_kv, o_d, M, DV)  # [kv,Dv]
        b_row, _ = row_norm_and_bound(b_k, precomputed_at(p_pre_k, i_b * (H // GROUP_K) + i_hk, M, A, False), o_kv, SCORE)
        p_columns = precomputed_at(p_pre_q, i_b * H + i_hkv * GROUP, N, A, False)
        b_weight, clamped = weights_of_rows(b_row, p_columns, GROUP * tl.cdiv(N, 128) * 128, parameter, SCORE, HALF)
        b_scale = scale_log2 * b_weight
        for EDGE in tl.static_range(2):
            first = tl.where(clamped, tl.minimum(whole, edge), edge) if EDGE else whole
            last = tl.where(clamped, N, edge_end) if EDGE else tl.where(clamped, whole, end)
            num_q = tl.cdiv(last - first, BLOCK_EDGE if EDGE else BLOCK_Q)
            for j in range(GROUP * num_q):  # one loop over tiles and query heads of this key head: nested loops spill
                i_h = i_hkv if GROUP == 1 else i_hkv * GROUP + j // num_q
                i_bh = i_b * H + i_h
                i_q = j if GROUP == 1 else j % num_q
                o_q = first + (i_q * BLOCK_EDGE + tl.arange(0, BLOCK_EDGE) if EDGE else i_q * BLOCK_Q + tl.arange(0, BLOCK_Q))
                b_q = load_rows(
                    rows_at(p_q, i_b * stride_qb + i_h * stride_qh, A), stride_qn, o_q, o_a, N if EDGE or CAUSAL else None, A
                )  # [q,A]
                b_column, _ = row_norm_and_bound(b_q, precomputed_at(p_pre_q, i_bh, N, A, False), o_q, SCORE)
                b_x = dot(b_k, tl.trans(b_q), PRECISION)  # [kv,q]
                b_s, b_slope = activate(b_x, b_row, b_column, b_weight, parameter, SCORE, EDGE, FAST, PRECISION)
                b_logit = b_s * b_scale[:, None]
                if MASK != 0:
                    p_mask_h = p_mask + i_b * stride_mb + i_h * stride_mh
                    b_logit = add_mask(b_logit, p_mask_h, stride_mm, stride_mn, o_kv, o_q, M, N, MASK)
                if CAUSAL and EDGE:
                    b_logit = tl.where(o_kv[:, None] <= tl.minimum(o_q, N - 1)[None, :], b_logit, float("-inf"))
                b_p = tl.exp2(b_logit - tl.load(p_shift + i_bh * NP + o_q)[None, :])
                if TOTAL:
                    b_p *= tl.div_rn(1.0, tl.load(p_total + i_bh * NP + o_q))[None, :]
                if GRADS or BY_GRADIENT:
                    b_do = load_rows(
                        rows_at(p_grad, i_b * stride_gb + i_h * stride_gh, DV),
                        stride_gn,
                        o_q,
                        o_d,
                        N if EDGE or CAUSAL else None,
                        DV,
                    )  # [q,Dv]
                    b_dp = dot(b_v, tl.trans(b_do), PRECISION)  # [kv,q]
                if BLOCK_T > 0:
                    b_map = relu(b_p * b_dp) if BY_GRADIENT else b_p
                    if BLOCK_T == 1:
                        b_r = tl.load(p_r + o_q)
                        b_r_abar += tl.sum(b_map * b_r[None, :], axis=1)
                    else:
                        o_r = o_t[None, :].to(tl.int64) * NP + o_q[:, None]
                        b_r = tl.load(p_r + o_r, mask=(o_t < T)[None, :], other=0.0)  # [q,T]
                        if ROUND:
                            b_map, b_r = round_tf32(b_map), round_tf32(b_r)
                        b_r_abar += dot(b_map, b_r, PRECISION_T)
                if GRADS:
                    b_kept = b_p
                    if DROPOUT:
                        b_factor = tl.trans(keep_factor(p_seed, dropout_p, threshold, i_bh, o_q, o_kv, N))
                        b_kept = b_p * b_factor
                        b_dp *= b_factor
                    b_dv += dot(b_kept.to(b_do.dtype), b_do, PRECISION)
                    b_ds = b_p * (b_dp - tl.load(p_delta + i_bh * NP + o_q)[None, :])
                    if SCORE == "cosine":
                        if EDGE:
                            b_along += sum_unclamped(b_ds * b_s, b_row, b_column, parameter)
                        b_ds = times_slope(b_ds, b_row, b_column, b_weight, parameter, EDGE, HALF)
                        b_q = lengthened(b_q, b_column, EDGE)
                    elif SCORE != "dot":
                        b_ds *= b_slope
                    b_dk += dot(b_ds.to(b_q.dtype), b_q, PRECISION)
            if GRADS and SCORE == "cosine" and not EDGE:
                b_along = tl.sum(b_k.to(tl.float32) * b_dk, axis=1)
        if GRADS and SCORE == "cosine":
            b_dk = b_dk * b_weight[:, None] - norm_backward(b_k, b_row, b_along * b_weight)
    if GRADS:
        p_grad_k += i_b * stride_dkb + i_p * stride_dkh
        p_grad_v += i_b * stride_dvb + i_p * stride_dvh
        store_tile(p_grad_k, stride_dkn, o_kv, o_a, M, A, tl.where(m_key[:, None], b_dk * scale, 0.0))
        store_tile(p_grad_v, stride_dvn, o_kv, o_d, M, DV, tl.where(m_key[:, None], b_dv, 0.0))
    if BLOCK_T == 1:
        tl.store(p_r_abar + i_bp * M + o_kv, tl.where(m_key, b_r_abar * factor, 0.0), mask=m_kv)
    elif BLOCK_T > 1:
        offsets = (i_bp * T + o_t[None, :]) * M + o_kv[:, None]
        b_r_abar = tl.where(m_key[:, None], b_r_abar * factor, 0.0)
        tl.store(p_r_abar + offsets, b_r_abar, mask=m_kv[:, None] & (o_t < T)[None, :])
