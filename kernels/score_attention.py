"""score_attention in Triton, forward and backward: one flash kernel whose score function is chosen at compile time.

Shapes: query (B, H, N, A), key (B, Hk, M, A), value (B, Hv, M, Dv), vector (H, A); out (B, H, N, Dv), lse (B, H, N). Hk and Hv
divide H. A is the number of features, or of hidden units.
Roofline: tensor cores for the dot kinds (2 matrix products forward; 7 backward, in two passes). MUFU, with 16 results per clock
and SM, for scores over hidden units (per hidden unit and pair 0.5 results forward and 3 backward for additive).
Trick: tanh(a+b) = 2/(1 + e^-2a e^-2b) - 1, so exponentials are taken once per row and once per key (`_prepare_kernel`), and two
hidden units share one reciprocal. The backward pass is query-major for the query and key-major for the rest. It uses no atomics
and gives the same bits each time. The gradient of hidden units is summed with rows and units in registers, so that threads
exchange nothing.
Exactness: in float32 the query-major pass first sums P and P dP, which undoes the rounding of lse and out. Under a float mask
`_rows_kernel` recomputes rows whose lse is too large to be rounded. Not yet measured on a GPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from vlattn_fast.kernels import _units_backward
from vlattn_fast.kernels._device import configured, on_device
from vlattn_fast.kernels._scores import (
    activate,
    keep_layout,
    largest_magnitude,
    norm_backward,
    precomputed_at,
    row_norm_and_bound,
    slope_for_unit_rows,
    sum_units,
)
from vlattn_fast.kernels._tiles import (
    LOG2_E,
    OWN_LSE,
    ROWS,
    aligned,
    block_and_head,
    block_size,
    dot,
    input_precision,
    is_coarse,
    keep_factor,
    key_range,
    load_keys,
    load_rows,
    mask_arguments,
    mask_logits,
    natural_lse,
    padded_rows,
    real_tokens,
    row_shift,
    rows_at,
    store_tile,
)

UNIT_KINDS = ("additive", "hadamard_tanh", "hadamard_sigmoid")


@on_device
def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    vector: Tensor | None,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    score: str,
    parameter: float,
    scale: float,
    dropout_p: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """out (B, H, N, Dv), laid out (B, N, H, Dv) as SDPA does, and lse (B, H, N)."""
    batch, heads, num_q, _ = query.shape
    out = _rows_first(query, heads, num_q, value.shape[3])
    lse = query.new_empty((batch, heads, num_q), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    tensors, numbers, constants = _arguments(
        query, key, value, vector, attn_mask, key_mask, seed, score, parameter, scale, dropout_p, is_causal
    )
    config = _config("forward", score, query, value, attn_mask is not None)
    grid = (triton.cdiv(num_q, config["BLOCK_Q"]) * batch * heads,)
    _forward_kernel[grid](*tensors, out, lse, *numbers, **constants, UNITS=score in UNIT_KINDS, NEGATIVE=scale < 0.0, **config)
    return out, lse


@on_device
def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    vector: Tensor | None,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    score: str,
    parameter: float,
    scale: float,
    dropout_p: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and vector."""
    batch, heads, num_q, size = query.shape
    num_kv, heads_kv = key.shape[2], max(key.shape[1], value.shape[1])
    tensors, numbers, constants = _arguments(
        query, key, value, vector, attn_mask, key_mask, seed, score, parameter, scale, dropout_p, is_causal
    )
    grad_q = _rows_first(query, heads, num_q, size)
    # with weights per head the key can have more heads than the value: both gradients get as many heads, and are summed here
    grad_k, grad_v = (
        _rows_first(x, heads_kv, num_kv, x.shape[3], x.dtype if x.shape[1] == heads_kv else torch.float32) for x in (key, value)
    )
    grad_out, lse = aligned(grad_out), lse.contiguous()
    units = score in UNIT_KINDS
    # probabilities are exp2(base-2 logit - shift), in float32 and under a float mask over total; N is padded in these three
    shift, total, delta = (lse.new_empty((batch, heads, padded_rows(num_q))) for _ in range(3))
    if lse.numel() > 0:
        out = out.transpose(1, 2).contiguous()  # (B,N,H,Dv), as forward lays it out
        if constants["MASK"] == 2:
            config = _config("forward", score, query, value, True)
            grid = (padded_rows(num_q) // config["BLOCK_Q"] * batch * heads,)
            _rows_kernel[grid](*tensors, lse, shift, total, *numbers, **constants, UNITS=units, **config)
    rows = (lse, shift, delta, total, out, lse if grad_lse is None else grad_lse.contiguous())
    numbers = (*numbers, *grad_out.stride()[:3], scale)
    config_q, config_kv = (_config(name, score, query, value, attn_mask is not None) for name in ("backward_q", "backward_kv"))
    grads, tensors = (grad_q, grad_k, grad_v), (*tensors, grad_out)
    grad_u = None
    if units:
        grad_u = _units_backward.launch(tensors, rows, grads, numbers, constants, config_q, config_kv)
    else:
        _launch_backward((*tensors[:3], *tensors[4:]), rows, grads, numbers, constants, config_q, config_kv)
    grad_k, grad_v = (
        grad if grad.shape[1] == x.shape[1] else grad.unflatten(1, (x.shape[1], -1)).sum(2).to(x.dtype)
        for grad, x in ((grad_k, key), (grad_v, value))
    )
    return grad_q, grad_k, grad_v, None if grad_u is None or vector is None else grad_u.to(vector.dtype)


def _launch_backward(
    tensors: tuple[Tensor, ...],
    rows: tuple[Tensor, ...],
    grads: tuple[Tensor, Tensor, Tensor],
    numbers: tuple[Any, ...],
    constants: dict[str, Any],
    config_q: dict[str, int],
    config_kv: dict[str, int],
) -> None:
    (batch, heads, num_q, _), (_, heads_kv, num_kv, _) = grads[0].shape, grads[1].shape
    lse, shift, delta, total, out, grad_lse = rows
    if lse.numel() > 0:
        grid = (padded_rows(num_q) // config_q["BLOCK_Q"] * batch * heads,)
        _backward_q_kernel[grid](
            *tensors,
            lse,
            shift,
            delta,
            total,
            out,
            grad_lse,
            grads[0],
            *numbers,
            **constants,
            LSE=grad_lse is not lse,
            **config_q,
        )
    if grads[1].numel() + grads[2].numel() > 0:
        grid = (triton.cdiv(num_kv, config_kv["BLOCK_KV"]) * batch * heads_kv,)
        more = heads_kv, heads // heads_kv
        _backward_kv_kernel[grid](*tensors, shift, delta, total, *grads[1:], *numbers, *more, **constants, **config_kv)


def _rows_first(like: Tensor, heads: int, rows: int, size: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised (B, heads, rows, size) tensor laid out (B, rows, heads, size), as the kernels write it."""
    return like.new_empty((like.shape[0], rows, heads, size), dtype=dtype or like.dtype).transpose(1, 2)


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    vector: Tensor | None,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    score: str,
    parameter: float,
    scale: float,
    dropout_p: float,
    is_causal: bool,
) -> tuple[tuple[Tensor, ...], tuple[Any, ...], dict[str, Any]]:
    """The arguments that all kernels here share: tensors, then sizes and strides in elements, then constants.

    The query stands in for tensors that are absent.
    """
    batch, heads, num_q, size = query.shape
    query, key, value = aligned(query), aligned(key), aligned(value)
    masks, strides_mask, mask_constants = mask_arguments(attn_mask, key_mask, query, key.shape[2])
    precision, units = input_precision(), score in UNIT_KINDS
    pre_q = pre_k = query
    if units or score == "cosine":
        # logistic(y) = 1 / (1 + 2^(y * factor)); where y is a product, the query carries the factor
        factor = {"hadamard_tanh": -2.0 * LOG2_E, "hadamard_sigmoid": -LOG2_E}.get(score, 1.0)
        pre_q, pre_k = _prepare(query, score, factor), _prepare(key, score, 1.0)
    if score == "cosine":
        parameter = math.inf if parameter == 0.0 else min(1.0 / parameter, 3.4e38)
    tensors = (
        query,
        key,
        value,
        query if vector is None else vector.contiguous(),
        pre_q,
        pre_k,
        *masks,
        query if seed is None else seed,
    )
    numbers = (
        heads,
        heads // max(1, key.shape[1]),
        heads // max(1, value.shape[1]),
        num_q,
        key.shape[2],
        size,
        value.shape[3],
        scale * LOG2_E,
        parameter,
        dropout_p,
        int(dropout_p * 2**32),
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *strides_mask,
    )
    constants = {
        "SCORE": score,
        **mask_constants,
        "CAUSAL": is_causal,
        "DROPOUT": dropout_p > 0.0,
        "EXACT": query.dtype == torch.float32,
        "FAST": query.dtype == torch.bfloat16,
        "PRECISION": precision,
        "BLOCK_A": block_size(size),
        "BLOCK_DV": block_size(value.shape[3]),
    }
    return tensors, numbers, constants


def _prepare(x: Tensor, score: str, factor: float) -> Tensor:
    """What a score needs of the rows of x (B, H, N, A) alone.

    Cosine: 1 / |x|, (B, H, N). Hidden units: (B, H, A, N) with A padded to an even number. `precomputed_at` says how N is padded.
    """
    batch, heads, rows, size = x.shape
    length = rows + -rows % 128
    precomputed = x.new_empty((batch, heads, *(() if score == "cosine" else (size + size % 2,)), length), dtype=torch.float32)
    if precomputed.numel() > 0:
        grid = (triton.cdiv(length, 32) * batch * heads,)
        _prepare_kernel[grid](
            x,
            precomputed,
            heads,
            rows,
            size,
            *x.stride()[:3],
            factor,
            SCORE=score,
            BLOCK_A=block_size(size),
            BLOCK_N=32,
            num_warps=4,
        )
    return precomputed


def _config(kernel: str, score: str, query: Tensor, value: Tensor, masked: bool) -> dict[str, int]:
    """Tile sizes by kernel, score, feature size and dtype.

    Not measured. They are the largest of those tried that compile for sm_90 without spills into 99 KB of shared memory. Short
    sequences take 64 rows, since 128 would be padding, and so do tiles of attn_mask.
    """
    size, wide, kv = block_size(max(query.shape[3], value.shape[3])), query.dtype == torch.float32, kernel == "backward_kv"
    plain = score == "dot" and not masked
    if score in UNIT_KINDS:
        if wide or size > 128:
            tile = (32, 16, 4, 1) if size <= 64 else (32, 16, 8, 1)
        else:
            # the backward pass holds a hidden unit of 32 keys in a thread
            tile = (64, 64, 8, 1) if kv and size > 64 else (64, 64, 4, 1) if kv else (64, 32, 4, 1)
    elif wide:
        tile = (32, 32, 8, 1) if size <= 64 else (16, 32, 4, 1) if size <= 128 else (16, 16, 4, 1)
    elif kernel == "forward":
        rows = 128 if query.shape[2] > 512 and size <= 128 and not masked else 64
        keys = 32 if size > 128 or (masked and size > 64) else 64
        tile = (rows, keys, rows // 16, 1 if masked or size > 128 else 3 if size <= 64 else 2)
    elif size > 128:
        tile = (32, 32, 4, 1)
    elif kv:
        tile = (64, 64, 4, 2) if size <= 64 and score != "cosine" and not masked else (32, 64, 4, 2)
    else:
        tile = (64, 64, 4, 3 if plain else 2) if size <= 64 and score != "cosine" else (64, 32, 4, 2)
    assert score not in UNIT_KINDS or tile[3] == 1, "sums over hidden units take one stage"
    config = dict(zip(("BLOCK_Q", "BLOCK_KV", "num_warps", "num_stages"), tile, strict=True))
    return configured(config, "score_attention", kernel, score, query.dtype, query.shape[2], value.shape[2], size, masked)


@triton.jit
def _prepare_kernel(
    p_x,
    p_pre,
    H,
    N,
    A: tl.constexpr,
    stride_b,
    stride_h,
    stride_n,
    factor,
    SCORE: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    length = (N + 127) // 128 * 128
    i_n, i_bh, i_b, i_h, _ = block_and_head(tl.cdiv(length, BLOCK_N), H, 1)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_a = tl.arange(0, BLOCK_A)
    b_x = load_rows(rows_at(p_x, i_b * stride_b + i_h * stride_h, A), stride_n, o_n, o_a, N, A).to(tl.float32)  # [n,A]
    if SCORE == "cosine":
        b_norm = tl.sqrt_rn(tl.sum(b_x * b_x, axis=1))
        b_inverse = tl.where(b_norm > 0.0, tl.div_rn(1.0, tl.where(b_norm > 0.0, b_norm, 1.0)), float("inf"))
        b_inverse = tl.where(o_n < N, tl.where(b_norm == b_norm, b_inverse, b_norm), 1.0)
        tl.store(p_pre + i_bh * length + o_n, b_inverse)
    else:
        if SCORE == "additive":
            # e^-2x = 2^n e^rest: a rounded large exponent would show where terms cancel; `largest_magnitude` reports the clamp
            b_y = tl.clamp(b_x, -22.0, 22.0) * -2.0
            b_power = tl.floor(b_y * 1.4426950408889634 + 0.5)
            b_rest = (b_y - b_power * 0.693145751953125) - b_power * 1.42860682030941723212e-6
            b_y = tl.exp2(b_rest * 1.4426950408889634) * tl.exp2(b_power)
        else:
            b_y = b_x * factor
        m_y = (o_a < (A + 1) // 2 * 2)[None, :]
        tl.store(precomputed_at(p_pre, i_bh, N, A, True) + o_a.to(tl.int64)[None, :] * length + o_n[:, None], b_y, mask=m_y)


@triton.jit
def _forward_kernel(
    p_q,
    p_k,
    p_v,
    p_u,
    p_pre_q,
    p_pre_k,
    p_mask,
    p_key_mask,
    p_seed,
    p_out,
    p_lse,
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
    SCORE: tl.constexpr,
    UNITS: tl.constexpr,
    MASK: tl.constexpr,
    KEY_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    EXACT: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    NEGATIVE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    i_q, i_bh, i_b, i_h, i_hk = block_and_head(tl.cdiv(N, BLOCK_Q), H, GROUP_K)
    p_q = rows_at(p_q, i_b * stride_qb + i_h * stride_qh, A)
    p_k = rows_at(p_k, i_b * stride_kb + i_hk * stride_kh, A)
    p_v = rows_at(p_v, i_b * stride_vb + (i_h // GROUP_V) * stride_vh, DV)
    p_mask += i_b * stride_mb + i_h * stride_mh
    p_key_mask += i_b * M
    p_u += i_h * A
    p_pre_q, p_pre_k = (
        precomputed_at(p_pre_q, i_bh, N, A, UNITS),
        precomputed_at(p_pre_k, i_b * (H // GROUP_K) + i_hk, M, A, UNITS),
    )
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_a = tl.arange(0, BLOCK_A)
    o_d = tl.arange(0, BLOCK_DV)
    b_q = load_rows(p_q, stride_qn, o_q, o_a, N, A)  # [q,A]
    b_row, bound_q = row_norm_and_bound(b_q, p_pre_q, o_q, SCORE)
    b_max = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_Q], dtype=tl.float32)
    b_o = tl.zeros([BLOCK_Q, BLOCK_DV], dtype=tl.float32)
    # the first tiles of keys are visible to every row of the block and need no masks; masked calls have one loop for all tiles
    SPLIT: tl.constexpr = MASK == 0 and not KEY_MASK and not UNITS
    whole, end = key_range(i_q, M, MASK, KEY_MASK or UNITS, CAUSAL, BLOCK_Q, BLOCK_KV)
    for EDGE in tl.static_range(0 if SPLIT else 1, 2):
        for start in range(whole if EDGE else 0, end if EDGE else whole, BLOCK_KV):
            o_kv = start + tl.arange(0, BLOCK_KV)
            b_k = load_rows(p_k, stride_kn, o_kv, o_a, M, A)  # [kv,A]
            if UNITS:
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
                    bound_q + largest_magnitude(b_k, SCORE),
                    SCORE,
                    EXACT,
                    FAST,
                    PRECISION,
                )
            else:
                b_column, _ = row_norm_and_bound(b_k, p_pre_k, o_kv, SCORE)
                b_x = dot(b_q, tl.trans(b_k), PRECISION)  # [q,kv]
                b_s, _ = activate(b_x, b_row, b_column, parameter, SCORE, FAST, PRECISION)
            if EDGE:
                b_s *= scale_log2
                b_masked = mask_logits(
                    tl.zeros_like(b_s) if UNITS and MASK != 0 else b_s,
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
                b_s = b_s + keep_layout(b_masked, UNITS, PRECISION) if UNITS and MASK != 0 else b_masked
                b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
                b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
                b_p = tl.exp2(b_s - b_safe[:, None])
            else:
                # the maximum first, then one multiply-add per pair
                b_safe = tl.maximum(b_max, (tl.min(b_s, axis=1) if NEGATIVE else tl.max(b_s, axis=1)) * scale_log2)
                b_new = b_safe
                b_p = tl.exp2(b_s * scale_log2 - b_safe[:, None])
            b_alpha = tl.exp2(b_max - b_safe)
            b_sum = b_sum * b_alpha + tl.sum(b_p, axis=1)
            if DROPOUT:
                b_p *= keep_factor(p_seed, dropout_p, threshold, i_bh, o_q, o_kv, N)
            b_v = load_keys(p_v, stride_vn, p_key_mask, o_kv, o_d, M, DV, KEY_MASK)  # [kv,Dv]
            b_o = b_o * b_alpha[:, None] + dot(keep_layout(b_p, UNITS, PRECISION).to(b_v.dtype), b_v, PRECISION)
            b_max = b_new
    empty = b_sum == 0.0
    b_o = b_o / tl.where(empty, 1.0, b_sum)[:, None]
    b_lse = natural_lse(b_max, b_sum, MASK)
    store_tile(p_out + (i_b * N * H + i_h) * DV, H * DV, o_q, o_d, N, DV, b_o)
    tl.store(p_lse + i_bh * N + o_q, b_lse, mask=o_q < N)


@triton.jit
def _rows_kernel(
    p_q,
    p_k,
    p_v,
    p_u,
    p_pre_q,
    p_pre_k,
    p_mask,
    p_key_mask,
    p_seed,
    p_lse,
    p_shift,
    p_total,
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
    SCORE: tl.constexpr,
    UNITS: tl.constexpr,
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
    """For each row two numbers with P = exp2(base-2 logit - shift) / total, for the backward pass under a float mask.

    They are the lse and 1. Where the lse `is_coarse` they are the largest logit and the sum of exp2(logit - largest). The keys
    are read only by blocks that have such a row.
    """
    NP = tl.cdiv(N, ROWS) * ROWS
    i_q, i_bh, i_b, i_h, i_hk = block_and_head(NP // BLOCK_Q, H, GROUP_K)
    p_q = rows_at(p_q, i_b * stride_qb + i_h * stride_qh, A)
    p_k = rows_at(p_k, i_b * stride_kb + i_hk * stride_kh, A)
    p_mask += i_b * stride_mb + i_h * stride_mh
    p_key_mask += i_b * M
    p_u += i_h * A
    p_pre_q, p_pre_k = (
        precomputed_at(p_pre_q, i_bh, N, A, UNITS),
        precomputed_at(p_pre_k, i_b * (H // GROUP_K) + i_hk, M, A, UNITS),
    )
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_a = tl.arange(0, BLOCK_A)
    b_q = load_rows(p_q, stride_qn, o_q, o_a, N, A)  # [q,A]
    b_row, bound_q = row_norm_and_bound(b_q, p_pre_q, o_q, SCORE)
    m_coarse = is_coarse(tl.load(p_lse + i_bh * N + o_q, mask=o_q < N, other=0.0), OWN_LSE)
    b_max = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_Q], dtype=tl.float32)
    whole, end = key_range(i_q, M, MASK, KEY_MASK or UNITS, CAUSAL, BLOCK_Q, BLOCK_KV)
    for start in range(0, tl.where(tl.max(m_coarse.to(tl.int32), axis=0) > 0, end, 0), BLOCK_KV):
        o_kv = start + tl.arange(0, BLOCK_KV)
        b_k = load_rows(p_k, stride_kn, o_kv, o_a, M, A)  # [kv,A]
        b_column, bound_k = row_norm_and_bound(b_k, p_pre_k, o_kv, SCORE)
        if UNITS:
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
        else:
            b_x = dot(b_q, tl.trans(b_k), PRECISION)  # [q,kv]
            b_s, b_slope = activate(b_x, b_row, b_column, parameter, SCORE, FAST, PRECISION)
        b_s *= scale_log2
        b_masked = mask_logits(
            tl.zeros_like(b_s) if UNITS else b_s,
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
        b_s = b_s + keep_layout(b_masked, UNITS, PRECISION) if UNITS else b_masked
        b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp2(b_max - b_safe) + tl.sum(tl.exp2(b_s - b_safe[:, None]), axis=1)
        b_max = b_new
    empty = b_sum == 0.0
    b_max = tl.where(empty, float("inf"), b_max)
    b_sum = tl.where(empty, 1.0, b_sum)
    tl.store(p_shift + i_bh * NP + o_q, tl.where(m_coarse, b_max, row_shift(p_lse + i_bh * N, o_q, N)))
    tl.store(p_total + i_bh * NP + o_q, tl.where(m_coarse, b_sum, 1.0))


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
    p_lse,
    p_shift,
    p_delta,
    p_total,
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
    p_pre_q, p_pre_k = (
        precomputed_at(p_pre_q, i_bh, N, A, False),
        precomputed_at(p_pre_k, i_b * (H // GROUP_K) + i_hk, M, A, False),
    )
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_a = tl.arange(0, BLOCK_A)
    o_d = tl.arange(0, BLOCK_DV)
    b_q = load_rows(p_q, stride_qn, o_q, o_a, N, A)  # [q,A]
    b_do = load_rows(rows_at(p_grad, i_b * stride_gb + i_h * stride_gh, DV), stride_gn, o_q, o_d, N, DV)  # [q,Dv]
    b_out = load_rows(p_out + (i_b * N * H + i_h) * DV, H * DV, o_q, o_d, N, DV)  # [q,Dv]
    b_row, _ = row_norm_and_bound(b_q, p_pre_q, o_q, SCORE)
    b_weight = tl.minimum(b_row, parameter)
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
    b_along = tl.zeros([BLOCK_Q], dtype=tl.float32)
    SPLIT: tl.constexpr = MASK == 0 and not KEY_MASK
    whole, end = key_range(i_q, M, MASK, KEY_MASK, CAUSAL, BLOCK_Q, BLOCK_KV)
    # EXACT: a rounded lse and out would cost float32 gradients half a digit, so a first sweep sums P and P dP
    for SWEEP in tl.static_range(0 if EXACT else 1, 2):
        for EDGE in tl.static_range(0 if SPLIT else 1, 2):
            for start in range(whole if EDGE else 0, end if EDGE else whole, BLOCK_KV):
                o_kv = start + tl.arange(0, BLOCK_KV)
                b_k = load_keys(p_k, stride_kn, p_key_mask, o_kv, o_a, M, A, KEY_MASK)  # [kv,A]
                b_v = load_keys(p_v, stride_vn, p_key_mask, o_kv, o_d, M, DV, KEY_MASK)  # [kv,Dv]
                b_column, _ = row_norm_and_bound(b_k, p_pre_k, o_kv, SCORE)
                b_x = dot(b_q, tl.trans(b_k), PRECISION)  # [q,kv]
                b_s, b_slope = activate(b_x, b_row, b_column, parameter, SCORE, FAST, PRECISION)
                b_logit = b_s * scale_log2
                if EDGE:
                    b_logit = mask_logits(
                        b_logit, p_mask, stride_mn, stride_mm, p_key_mask, o_q, o_kv, N, M, MASK, KEY_MASK, CAUSAL
                    )
                b_p = tl.exp2(b_logit - b_shift[:, None])
                b_dp = dot(b_do, tl.trans(b_v), PRECISION)  # [q,kv]
                if DROPOUT:
                    b_dp *= keep_factor(p_seed, dropout_p, threshold, i_bh, o_q, o_kv, N)
                if SWEEP == 0:
                    b_total += tl.sum(b_p, axis=1)
                    b_mean += tl.sum(b_p * b_dp, axis=1)
                else:
                    b_ds = b_p * (b_dp - b_delta[:, None]) * scale
                    if SCORE == "cosine":
                        m_free = b_row[:, None] * b_column[None, :] <= parameter
                        b_along += tl.sum(tl.where(m_free, b_ds * b_s, 0.0), axis=1)
                        b_slope = slope_for_unit_rows(b_slope, b_weight, b_column, b_k.dtype)
                    if SCORE != "dot":
                        b_ds *= b_slope
                    b_dq += dot(b_ds.to(b_k.dtype), b_k, PRECISION)
        if SWEEP == 0:
            b_total = tl.where(b_total == 0.0, 1.0, b_total)
            b_delta = b_mean / b_total - b_grad_lse
    if SCORE == "cosine":
        b_dq = b_dq * b_weight[:, None] - norm_backward(b_q, b_row, b_along)
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
    p_pre_q,
    p_pre_k,
    p_mask,
    p_key_mask,
    p_seed,
    p_grad,
    p_shift,
    p_delta,
    p_total,
    p_grad_k,
    p_grad_v,
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
    p_pre_k = precomputed_at(p_pre_k, i_b * (H // GROUP_K) + i_hk, M, A, False)
    o_kv = i_kv * BLOCK_KV + tl.arange(0, BLOCK_KV)
    o_a = tl.arange(0, BLOCK_A)
    o_d = tl.arange(0, BLOCK_DV)
    b_k = load_rows(p_k, stride_kn, o_kv, o_a, M, A)  # [kv,A]
    b_v = load_rows(p_v, stride_vn, o_kv, o_d, M, DV)  # [kv,Dv]
    b_row, _ = row_norm_and_bound(b_k, p_pre_k, o_kv, SCORE)
    b_weight = tl.minimum(b_row, parameter)
    b_dk = tl.zeros([BLOCK_KV, BLOCK_A], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_KV, BLOCK_DV], dtype=tl.float32)
    b_along = tl.zeros([BLOCK_KV], dtype=tl.float32)
    # rows from `whole` on see every key of this block. Rows beyond N have P = 0, keys beyond M are not stored, and what padding
    # gets is dropped at the end, since keys are rows of these tiles: no masks
    SPLIT: tl.constexpr = MASK == 0
    begin = (i_kv * BLOCK_KV) // BLOCK_Q * BLOCK_Q if CAUSAL else 0
    whole = begin
    if SPLIT and CAUSAL:
        whole = tl.minimum(tl.cdiv((i_kv + 1) * BLOCK_KV - 1, BLOCK_Q) * BLOCK_Q, tl.cdiv(N, BLOCK_Q) * BLOCK_Q)
    for i_g in range(0, GROUP):
        i_h = i_hkv * GROUP + i_g
        i_bh = i_b * H + i_h
        p_q_h = rows_at(p_q, i_b * stride_qb + i_h * stride_qh, A)
        p_grad_h = rows_at(p_grad, i_b * stride_gb + i_h * stride_gh, DV)
        p_mask_h = p_mask + i_b * stride_mb + i_h * stride_mh
        p_pre_h = precomputed_at(p_pre_q, i_bh, N, A, False)
        for EDGE in tl.static_range(0 if SPLIT else 1, 2 if CAUSAL or not SPLIT else 1):
            for start in range(begin if EDGE else whole, whole if SPLIT and EDGE else N, BLOCK_Q):
                o_q = start + tl.arange(0, BLOCK_Q)
                b_q = load_rows(p_q_h, stride_qn, o_q, o_a, N, A)  # [q,A]
                b_do = load_rows(p_grad_h, stride_gn, o_q, o_d, N, DV)  # [q,Dv]
                b_column, _ = row_norm_and_bound(b_q, p_pre_h, o_q, SCORE)
                b_x = dot(b_k, tl.trans(b_q), PRECISION)  # [kv,q]
                b_s, b_slope = activate(b_x, b_row, b_column, parameter, SCORE, FAST, PRECISION)
                b_logit = b_s * scale_log2
                if EDGE:
                    b_logit = mask_logits(
                        b_logit, p_mask_h, stride_mm, stride_mn, p_key_mask, o_kv, o_q, M, N, MASK, False, False
                    )
                    if CAUSAL:
                        b_logit = tl.where(o_kv[:, None] <= o_q[None, :], b_logit, float("-inf"))
                b_p = tl.exp2(b_logit - tl.load(p_shift + i_bh * NP + o_q)[None, :])
                if EXACT or MASK == 2:
                    b_p /= tl.load(p_total + i_bh * NP + o_q)[None, :]
                b_dp = dot(b_v, tl.trans(b_do), PRECISION)  # [kv,q]
                b_kept = b_p
                if DROPOUT:
                    b_factor = tl.trans(keep_factor(p_seed, dropout_p, threshold, i_bh, o_q, o_kv, N))
                    b_kept = b_p * b_factor
                    b_dp *= b_factor
                b_dv += dot(b_kept.to(b_do.dtype), b_do, PRECISION)
                b_ds = b_p * (b_dp - tl.load(p_delta + i_bh * NP + o_q)[None, :]) * scale
                if SCORE == "cosine":
                    b_along += tl.sum(tl.where(b_row[:, None] * b_column[None, :] <= parameter, b_ds * b_s, 0.0), axis=1)
                    b_slope = slope_for_unit_rows(b_slope, b_weight, b_column, b_q.dtype)
                if SCORE != "dot":
                    b_ds *= b_slope
                b_dk += dot(b_ds.to(b_q.dtype), b_q, PRECISION)
    if SCORE == "cosine":
        b_dk = b_dk * b_weight[:, None] - norm_backward(b_k, b_row, b_along)
    if KEY_MASK:
        m_real = real_tokens(p_key_mask, o_kv, M, True)[:, None]
        b_dk, b_dv = tl.where(m_real, b_dk, 0.0), tl.where(m_real, b_dv, 0.0)
    i_row = i_b * M * HEADS_KV + i_hkv
    store_tile(p_grad_k + i_row * A, HEADS_KV * A, o_kv, o_a, M, A, b_dk)
    store_tile(p_grad_v + i_row * DV, HEADS_KV * DV, o_kv, o_d, M, DV, b_dv)
