"""The backward pass of scores that sum over hidden units, for score_attention: additive, Hadamard with tanh or sigmoid."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from vlattn_fast.kernels._products_backward import Rows, heads_summed, new_rows, rows_first
from vlattn_fast.kernels._scores import keep_layout, precomputed_at, row_norm_and_bound, sum_units, units_backward
from vlattn_fast.kernels._tiles import (
    ROWS,
    block_and_head,
    dot,
    keep_factor,
    key_range,
    load_keys,
    load_rows,
    mask_logits,
    padded_rows,
    real_tokens,
    row_shift,
    rows_at,
    store_tile,
)


def launch(
    call: dict[str, Any],
    config_q: dict[str, int],
    config_kv: dict[str, int],
    vector: Tensor,
    lse: Tensor,
    out: Tensor,
    coarse: Rows | None,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and vector, the last in float32."""
    query, key, value = call["p_q"], call["p_k"], call["p_v"]
    (batch, heads, num_q, size), num_kv = query.shape, key.shape[2]
    heads_kv = max(key.shape[1], value.shape[1])
    grad_q = rows_first(query, heads, num_q, size)
    grad_k, grad_v = (
        rows_first(x, heads_kv, num_kv, x.shape[3], x.dtype if x.shape[1] == heads_kv else torch.float32) for x in (key, value)
    )
    blocks_q, blocks_kv = padded_rows(num_q) // config_q["BLOCK_Q"], triton.cdiv(num_kv, config_kv["BLOCK_KV"])
    grad_u = vector.new_empty((batch, heads, blocks_kv, size), dtype=torch.float32)
    programs = (blocks_q * batch * heads, config_q), (blocks_kv * batch * heads_kv, config_kv)
    scratch = grad_u.new_empty(max(number * config["BLOCK_Q"] * config["BLOCK_KV"] for number, config in programs))
    shift, delta, total = new_rows(query), new_rows(query), new_rows(query)
    if coarse is not None:
        assert coarse.total is not None
        shift, total = coarse.shift, coarse.total
    rows = {"p_shift": shift, "p_delta": delta, "p_total": total}
    if lse.numel() > 0:
        _backward_q_kernel[(blocks_q * batch * heads,)](
            **call,
            **rows,
            p_u=vector,
            p_lse=lse,
            p_scratch=scratch,
            p_out=out.transpose(1, 2).contiguous(),  # (B,N,H,Dv), as forward lays it out
            p_grad_lse=lse if grad_lse is None else grad_lse,
            p_grad_q=grad_q,
            LSE=grad_lse is not None,
            **config_q,
        )
    if grad_k.numel() + grad_v.numel() > 0:
        _backward_kv_kernel[(blocks_kv * batch * heads_kv,)](
            **call,
            **rows,
            p_u=vector,
            p_scratch=scratch,
            p_grad_k=grad_k,
            p_grad_v=grad_v,
            p_grad_u=grad_u,
            HEADS_KV=heads_kv,
            GROUP=heads // heads_kv,
            **config_kv,
        )
    return grad_q, *heads_summed(grad_k, key, grad_v, value), grad_u.sum((0, 2))


@triton.jit
def _backward_q_kernel(
    p_q,
    p_k,
    p_v,
    p_u,
    p_pre_q,
    p_pre_k,
    p_mask,
    p_key_mask,
    p_seed,
    p_grad,
    p_lse,
    p_shift,
    p_delta,
    p_total,
    p_scratch,
    p_out,
    p_grad_lse,
    p_grad_q,
    H,
    GROUP_K,
    GROUP_V,
    N,
    M,
    A: tl.constexpr,
    DV: tl.constexpr,
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
    scale,
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
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    NP = tl.cdiv(N, ROWS) * ROWS
    i_q, i_bh, i_b, i_h, i_hk = block_and_head(NP // BLOCK_Q, H, GROUP_K)
    p_q = rows_at(p_q, i_b * stride_qb + i_h * stride_qh, A)
    p_k = rows_at(p_k, i_b * stride_kb + i_hk * stride_kh, A)
    p_v = rows_at(p_v, i_b * stride_vb + (i_h // GROUP_V) * stride_vh, DV)
    p_mask += i_b * stride_mb + i_h * stride_mh
    p_key_mask += i_b * M
    p_u += i_h * A
    p_scratch += tl.program_id(0).to(tl.int64) * (BLOCK_Q * BLOCK_KV)
    p_pre_q, p_pre_k = (
        precomputed_at(p_pre_q, i_bh, N, A, True),
        precomputed_at(p_pre_k, i_b * (H // GROUP_K) + i_hk, M, A, True),
    )
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_a = tl.arange(0, BLOCK_A)
    o_d = tl.arange(0, BLOCK_DV)
    b_q = load_rows(p_q, stride_qn, o_q, o_a, N, A)  # [q,A]
    b_do = load_rows(rows_at(p_grad, i_b * stride_gb + i_h * stride_gh, DV), stride_gn, o_q, o_d, N, DV)  # [q,Dv]
    b_out = load_rows(p_out + (i_b * N * H + i_h) * DV, H * DV, o_q, o_d, N, DV)  # [q,Dv]
    _, bound_q = row_norm_and_bound(b_q, p_pre_q, o_q, SCORE)
    if MASK == 2:
        b_shift = tl.load(p_shift + i_bh * NP + o_q)
    else:
        b_shift = row_shift(p_lse + i_bh * N, o_q, N)
        tl.store(p_shift + i_bh * NP + o_q, b_shift)
    b_grad_lse = tl.zeros([BLOCK_Q], dtype=tl.float32)
    if LSE:
        b_grad_lse = tl.load(p_grad_lse + i_bh * N + o_q, mask=o_q < N, other=0.0).to(tl.float32)
    b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), axis=1) - b_grad_lse
    b_dq = tl.zeros([BLOCK_Q, BLOCK_A], dtype=tl.float32)
    b_total = tl.zeros([BLOCK_Q], dtype=tl.float32)
    b_mean = tl.zeros([BLOCK_Q], dtype=tl.float32)
    _, end = key_range(i_q, M, True, CAUSAL, BLOCK_Q, BLOCK_KV)
    # EXACT: a rounded lse and out would cost float32 gradients half a digit, so a first sweep sums P and P dP
    for SWEEP in tl.static_range(0 if EXACT else 1, 2):
        for start in range(0, end, BLOCK_KV):
            o_kv = start + tl.arange(0, BLOCK_KV)
            b_k = load_keys(p_k, stride_kn, p_key_mask, o_kv, o_a, M, A, KEY_MASK)  # [kv,A]
            b_v = load_keys(p_v, stride_vn, p_key_mask, o_kv, o_d, M, DV, KEY_MASK)  # [kv,Dv]
            _, bound_k = row_norm_and_bound(b_k, p_pre_k, o_kv, SCORE)
            b_s = sum_units(
                p_q,
                p_k,
                p_pre_q,
                p_pre_k,
                p_u,
                o_q,
                o_kv,
                stride_qn,
                stride_kn,
                N,
                M,
                A,
                bound_q + bound_k,
                SCORE,
                EXACT,
                FAST,
                PRECISION,
            )
            b_logit = b_s * scale_log2
            b_masked = mask_logits(
                tl.zeros_like(b_logit) if MASK != 0 else b_logit,
                p_mask,
                stride_mn,
                stride_mm,
                p_key_mask,
                o_q,
                o_kv,
                N,
                M,
                MASK,
                KEY_MASK,
                CAUSAL,
            )
            b_logit = b_logit + keep_layout(b_masked, True, PRECISION) if MASK != 0 else b_masked
            b_p = tl.exp2(b_logit - b_shift[:, None])
            b_dp = dot(b_do, tl.trans(b_v), PRECISION)  # [q,kv]
            if DROPOUT:
                b_dp *= keep_factor(p_seed, dropout_p, threshold, i_bh, o_q, o_kv, N)
            if SWEEP == 0:
                b_total += tl.sum(b_p, axis=1)
                b_mean += tl.sum(b_p * b_dp, axis=1)
            else:
                b_ds = b_p * (b_dp - b_delta[:, None]) * scale
                b_dq, _ = units_backward(
                    b_dq,
                    b_dq,
                    b_ds,
                    b_q,
                    p_scratch,
                    p_k,
                    stride_kn,
                    o_a,
                    start,
                    M,
                    A,
                    SCORE,
                    FAST,
                    False,
                    PRECISION,
                    BLOCK_Q,
                    BLOCK_KV,
                )
        if SWEEP == 0:
            b_total = tl.where(b_total == 0.0, 1.0, b_total)
            b_delta = b_mean / b_total - b_grad_lse
    b_dq *= tl.load(p_u + o_a, mask=o_a < A, other=0.0).to(tl.float32)[None, :]
    if EXACT:
        b_dq /= b_total[:, None]
        tl.store(p_total + i_bh * NP + o_q, b_total)
    elif MASK == 2:
        b_dq /= tl.load(p_total + i_bh * NP + o_q)[:, None]
    tl.store(p_delta + i_bh * NP + o_q, b_delta)
    store_tile(p_grad_q + (i_b * N * H + i_h) * A, H * A, o_q, o_a, N, A, b_dq)


@triton.jit
def _backward_kv_kernel(
    p_q,
    p_k,
    p_v,
    p_u,
    p_pre_q,
    p_pre_k,
    p_mask,
    p_key_mask,
    p_seed,
    p_grad,
    p_shift,
    p_delta,
    p_total,
    p_scratch,
    p_grad_k,
    p_grad_v,
    p_grad_u,
    H,
    GROUP_K,
    GROUP_V,
    N,
    M,
    A: tl.constexpr,
    DV: tl.constexpr,
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
    scale,
    HEADS_KV,
    GROUP,
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
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    # tiles are [kv,q], so that they are the left operand of the products with dO and q
    NP = tl.cdiv(N, ROWS) * ROWS
    num_kv = tl.cdiv(M, BLOCK_KV)
    i_kv, _, i_b, i_hkv, _ = block_and_head(num_kv, HEADS_KV, 1)
    i_hk = i_hkv * GROUP // GROUP_K
    p_k = rows_at(p_k, i_b * stride_kb + i_hk * stride_kh, A)
    p_v = rows_at(p_v, i_b * stride_vb + (i_hkv * GROUP // GROUP_V) * stride_vh, DV)
    p_key_mask += i_b * M
    p_scratch += tl.program_id(0).to(tl.int64) * (BLOCK_Q * BLOCK_KV)
    p_pre_k = precomputed_at(p_pre_k, i_b * (H // GROUP_K) + i_hk, M, A, True)
    o_kv = i_kv * BLOCK_KV + tl.arange(0, BLOCK_KV)
    o_a = tl.arange(0, BLOCK_A)
    o_d = tl.arange(0, BLOCK_DV)
    b_k = load_rows(p_k, stride_kn, o_kv, o_a, M, A)  # [kv,A]
    b_v = load_rows(p_v, stride_vn, o_kv, o_d, M, DV)  # [kv,Dv]
    _, bound_k = row_norm_and_bound(b_k, p_pre_k, o_kv, SCORE)
    b_dk = tl.zeros([BLOCK_KV, BLOCK_A], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_KV, BLOCK_DV], dtype=tl.float32)
    # rows beyond N have P = 0, keys beyond M are not stored, and what padding gets is dropped at the end, since keys are rows of
    # these tiles: no masks
    begin = (i_kv * BLOCK_KV) // BLOCK_Q * BLOCK_Q if CAUSAL else 0
    for i_g in range(0, GROUP):
        i_h = i_hkv * GROUP + i_g
        i_bh = i_b * H + i_h
        p_q_h = rows_at(p_q, i_b * stride_qb + i_h * stride_qh, A)
        p_grad_h = rows_at(p_grad, i_b * stride_gb + i_h * stride_gh, DV)
        p_mask_h = p_mask + i_b * stride_mb + i_h * stride_mh
        p_u_h = p_u + i_h * A
        p_pre_h = precomputed_at(p_pre_q, i_bh, N, A, True)
        b_units = tl.zeros([BLOCK_KV, BLOCK_A], dtype=tl.float32)
        b_du = tl.zeros([BLOCK_KV, BLOCK_A], dtype=tl.float32)
        for start in range(begin, N, BLOCK_Q):
            o_q = start + tl.arange(0, BLOCK_Q)
            b_q = load_rows(p_q_h, stride_qn, o_q, o_a, N, A)  # [q,A]
            b_do = load_rows(p_grad_h, stride_gn, o_q, o_d, N, DV)  # [q,Dv]
            _, bound_q = row_norm_and_bound(b_q, p_pre_h, o_q, SCORE)
            b_s = sum_units(
                p_k,
                p_q_h,
                p_pre_k,
                p_pre_h,
                p_u_h,
                o_kv,
                o_q,
                stride_kn,
                stride_qn,
                M,
                N,
                A,
                bound_q + bound_k,
                SCORE,
                EXACT,
                FAST,
                PRECISION,
            )
            b_logit = b_s * scale_log2
            b_masked = mask_logits(
                tl.zeros_like(b_logit) if MASK != 0 else b_logit,
                p_mask_h,
                stride_mm,
                stride_mn,
                p_key_mask,
                o_kv,
                o_q,
                M,
                N,
                MASK,
                False,
                False,
            )
            if CAUSAL:
                b_masked = tl.where(o_kv[:, None] <= o_q[None, :], b_masked, float("-inf"))
            b_logit = b_logit + keep_layout(b_masked, True, PRECISION) if MASK != 0 else b_masked
            b_p = tl.exp2(b_logit - tl.load(p_shift + i_bh * NP + o_q)[None, :])
            if EXACT or MASK == 2:
                b_p /= tl.load(p_total + i_bh * NP + o_q)[None, :]
            b_dp = dot(b_v, tl.trans(b_do), PRECISION)  # [kv,q]
            b_kept = b_p
            if DROPOUT:
                b_factor = tl.trans(keep_factor(p_seed, dropout_p, threshold, i_bh, o_q, o_kv, N))
                b_kept = b_p * b_factor
                b_dp *= b_factor
            b_dv += dot(keep_layout(b_kept, True, PRECISION).to(b_do.dtype), b_do, PRECISION)
            b_ds = b_p * (b_dp - tl.load(p_delta + i_bh * NP + o_q)[None, :]) * scale
            b_units, b_du = units_backward(
                b_units,
                b_du,
                b_ds,
                b_k,
                p_scratch,
                p_q_h,
                stride_qn,
                o_a,
                start,
                N,
                A,
                SCORE,
                FAST,
                True,
                PRECISION,
                BLOCK_KV,
                BLOCK_Q,
            )
        b_dk += b_units * tl.load(p_u_h + o_a, mask=o_a < A, other=0.0).to(tl.float32)[None, :]
        if KEY_MASK:
            b_du = tl.where(real_tokens(p_key_mask, o_kv, M, True)[:, None], b_du, 0.0)
        tl.store(p_grad_u + (i_bh * num_kv + i_kv) * A + o_a, tl.sum(b_du, axis=0), mask=o_a < A)
    if KEY_MASK:
        m_real = real_tokens(p_key_mask, o_kv, M, True)[:, None]
        b_dk, b_dv = tl.where(m_real, b_dk, 0.0), tl.where(m_real, b_dv, 0.0)
    i_row = i_b * M * HEADS_KV + i_hkv
    store_tile(p_grad_k + i_row * A, HEADS_KV * A, o_kv, o_a, M, A, b_dk)
    store_tile(p_grad_v + i_row * DV, HEADS_KV * DV, o_kv, o_d, M, DV, b_dv)
