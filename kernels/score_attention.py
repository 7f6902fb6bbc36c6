"""score_attention in Triton, forward and backward: one flash kernel whose score function is chosen at compile time.

Shapes: query (B, H, N, A), key (B, Hk, M, A), value (B, Hv, M, Dv), vector (H, A); out (B, H, N, Dv), lse (B, H, N). Hk and Hv
divide H. A is the number of features, or of hidden units.
Roofline: tensor cores for the dot kinds (2 matrix products). MUFU, with 16 results per clock and SM, for scores over hidden units
(per hidden unit and pair half a result for additive, one for Hadamard in bfloat16).
Trick: tanh(a+b) = 2/(1 + e^-2a e^-2b) - 1, so exponentials are taken once per row and once per key (`_prepare_kernel`), and two
hidden units share one reciprocal. Keys that are left after whole tiles have a smaller tile of their own (`edge_block`). Cosine: a
program first sees whether the clamp acts on any of its pairs. Where not, the scores are plain products with inverse norms.
The backward passes are in _products_backward.py and _units_backward.py. Under a float mask `_rows_kernel` recomputes rows whose
lse is too large to be rounded. Not yet measured on a GPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlattn_fast._ground.tensors import empty_rows_first
from vlattn_fast.backends.inputs import ScoreAttentionBackwardInputs, ScoreAttentionInputs
from vlattn_fast.kernels import _products_backward, _units_backward
from vlattn_fast.kernels._configurations import UNIT_KINDS, Config, configuration
from vlattn_fast.kernels._device import on_device
from vlattn_fast.kernels._products_backward import Rows, new_rows
from vlattn_fast.kernels._scores import (
    activate,
    keep_layout,
    largest_magnitude,
    precomputed_at,
    row_norm_and_bound,
    sum_units,
    twice_exponential,
    weights_of_rows,
    weights_summed,
)
from vlattn_fast.kernels._tiles import (
    LOG2_E,
    OWN_LSE,
    ROWS,
    aligned,
    alignment,
    block_and_head,
    block_size,
    cdiv,
    dot,
    edge_block,
    input_precision,
    is_coarse,
    keep_factor,
    key_range,
    load_keys,
    load_rows,
    mask_arguments,
    mask_tile,
    natural_lse,
    relu,
    row_shift,
    rows_at,
    store_tile,
    strides,
)

Shape = tuple[int, ...]


@on_device
def forward(inputs: ScoreAttentionInputs) -> tuple[Tensor, Tensor]:
    """out (B, H, N, Dv), laid out (B, N, H, Dv) as SDPA does, and lse (B, H, N)."""
    query, vector = inputs.query, inputs.vector
    batch, heads, num_q, _ = query.shape
    out = empty_rows_first(query, heads, num_q, inputs.value.shape[3])
    lse = query.new_empty(batch, heads, num_q, dtype=torch.float32)
    if batch * heads * num_q == 0:
        return out, lse
    call = arguments(inputs)
    config = _config("forward", call)
    _forward_kernel[(cdiv(num_q, config["BLOCK_Q"]) * batch * heads,)](
        **call,
        p_u=call["p_q"] if vector is None else vector.contiguous(),
        p_out=out,
        p_lse=lse,
        UNITS=inputs.score in UNIT_KINDS,
        NEGATIVE=inputs.scale < 0.0,
        BLOCK_EDGE=_edge_of_keys(call, config),
        **config,
    )
    return out, lse


@on_device
def backward(inputs: ScoreAttentionBackwardInputs) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and vector."""
    call = with_gradient(arguments(inputs), inputs.grad_out, inputs.scale)
    vector, out, lse = inputs.vector, inputs.out, inputs.lse.contiguous()
    grad_lse = None if inputs.grad_lse is None else inputs.grad_lse.contiguous()
    coarse = None
    if call["MASK"] == 2:
        coarse = row_statistics(call, _config("forward", call), lse, OWN_LSE, pair=True, vector=vector)
    config_q, config_kv = _config("backward_q", call), _config("backward_kv", call)
    if vector is not None:
        *grads, grad_u = _units_backward.launch(call, config_q, config_kv, vector.contiguous(), lse, out, coarse, grad_lse)
        return grads[0], grads[1], grads[2], grad_u.to(vector.dtype)
    grad_q, rows = _products_backward.queries(call, config_q, lse, aligned(out), coarse, grad_lse)
    grad_k, grad_v, _ = _products_backward.keys(call, {**config_kv, "BLOCK_T": 0}, rows)
    assert grad_k is not None and grad_v is not None  # rows have a delta
    return grad_q, grad_k, grad_v, None


def arguments(inputs: ScoreAttentionInputs | ScoreAttentionBackwardInputs) -> dict[str, Any]:
    """The named arguments that all kernels here and of the backward passes share. The query stands in for what is absent."""
    query, key, value, seed = inputs.query, inputs.key, inputs.value, inputs.seed
    score, parameter = inputs.score, inputs.parameter
    sizes, most_aligned = _sizes(query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride())
    if not most_aligned or (query.data_ptr() | key.data_ptr() | value.data_ptr()) % most_aligned:
        query, key, value = aligned(query), aligned(key), aligned(value)
        sizes, _ = _sizes(query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride())
    masks, mask_constants = mask_arguments(inputs.attn_mask, inputs.key_mask, query, key.shape[2])
    pre_q = pre_k = query
    if score in UNIT_KINDS or score == "cosine":
        # where y is a product, the query carries the factor of 1 / (1 + 2^(factor y)), or in bfloat16 of tanh(factor y)
        fast = query.dtype == torch.bfloat16
        factor = {"hadamard_tanh": 1.0 if fast else -2.0 * LOG2_E, "hadamard_sigmoid": 0.5 if fast else -LOG2_E}.get(score, 1.0)
        pre_q, pre_k = _prepare(query, score, factor), _prepare(key, score, 1.0)
    if score == "cosine":
        parameter = math.inf if parameter == 0.0 else min(1.0 / parameter, 3.4e38)
    return {
        "p_q": query,
        "p_k": key,
        "p_v": value,
        "p_pre_q": pre_q,
        "p_pre_k": pre_k,
        **masks,
        "p_seed": query if seed is None else seed,
        **sizes,
        **_options(query.dtype, score, parameter, inputs.scale, inputs.dropout_p, inputs.is_causal),
        **mask_constants,
        "PRECISION": input_precision(query.dtype),
    }


@functools.lru_cache(maxsize=1024)
def _sizes(
    shape_q: Shape, stride_q: Shape, shape_k: Shape, stride_k: Shape, shape_v: Shape, stride_v: Shape
) -> tuple[Mapping[str, int], int]:
    """Arguments of a launch, and the largest `alignment` of the three tensors, 0 where one has to be copied.

    They are cached, and so are those of `_options`: a model asks for the same in each of its layers.
    """
    heads = shape_q[1]
    alignments = alignment(shape_q, stride_q), alignment(shape_k, stride_k), alignment(shape_v, stride_v)
    sizes = {
        "H": heads,
        "GROUP_K": heads // max(1, shape_k[1]),
        "GROUP_V": heads // max(1, shape_v[1]),
        "N": shape_q[2],
        "M": shape_k[2],
        "A": shape_q[3],
        "DV": shape_v[3],
        **strides("q", stride_q),
        **strides("k", stride_k),
        **strides("v", stride_v),
        "BLOCK_A": block_size(shape_q[3]),
        "BLOCK_DV": block_size(shape_v[3]),
    }
    return sizes, max(alignments) if all(alignments) else 0


@functools.lru_cache(maxsize=1024)
def _options(
    dtype: torch.dtype, score: str, parameter: float, scale: float, dropout_p: float, is_causal: bool
) -> Mapping[str, Any]:
    return {
        "scale_log2": scale * LOG2_E,
        "parameter": parameter,
        "dropout_p": dropout_p,
        "threshold": int(dropout_p * 2**32),
        "SCORE": score,
        "CAUSAL": is_causal,
        "DROPOUT": dropout_p > 0.0,
        "EXACT": dtype == torch.float32,
        "FAST": dtype == torch.bfloat16,
    }


def with_gradient(call: dict[str, Any], grad_out: Tensor | None, scale: float) -> dict[str, Any]:
    """`arguments` with the gradient and the scale, which a backward pass also reads."""
    grad_out = call["p_q"] if grad_out is None else aligned(grad_out)
    return {**call, "p_grad": grad_out, **strides("g", grad_out.stride()), "scale": scale}


def row_statistics(
    call: dict[str, Any],
    config: Config,
    lse: Tensor | None,
    limit: tl.constexpr,
    pair: bool,
    vector: Tensor | None = None,
    by_gradient: bool = False,
    summed: bool = False,
) -> Rows:
    """The shift of each row, with `pair` also its total, and on request the row sums of each head's A or relu(A * dA).

    Without `lse` the log-sum-exp is computed; else only where it `is_coarse` by this limit. `call` is `with_gradient`.
    """
    query = call["p_q"]
    shift, total, sums = new_rows(query), new_rows(query) if pair else None, new_rows(query) if summed else None
    config = {**config, "BLOCK_Q": min(config["BLOCK_Q"], ROWS.value)}  # which a forward pass may exceed
    if shift.numel() > 0:
        _rows_kernel[(shift.shape[2] // config["BLOCK_Q"] * shift.shape[0] * shift.shape[1],)](
            **call,
            p_u=query if vector is None else vector.contiguous(),
            p_lse=query if lse is None else lse,
            p_shift=shift,
            p_total=shift if total is None else total,
            p_sums=shift if sums is None else sums,
            UNITS=vector is not None,
            PAIR=pair,
            WITH_LSE=lse is not None,
            LIMIT=limit.value,
            BY_GRADIENT=by_gradient,
            SUMS=summed,
            BLOCK_EDGE=_edge_of_keys(call, config),
            **config,
        )
    return Rows(shift, total, None, sums)


def _prepare(x: Tensor, score: str, factor: float) -> Tensor:
    """The part of a score that depends on the rows of x (B, H, N, A) alone.

    Cosine: 1 / |x|, (B, H, N). Hidden units: (B, H, A, N) with A padded to an even number. `precomputed_at` says how N is padded.
    """
    batch, heads, rows, size = x.shape
    length = rows + -rows % 128
    precomputed = x.new_empty((batch, heads, *(() if score == "cosine" else (size + size % 2,)), length), dtype=torch.float32)
    if precomputed.numel() > 0:
        grid = (cdiv(length, 32) * batch * heads,)
        _prepare_kernel[grid](
            p_x=x,
            p_pre=precomputed,
            H=heads,
            N=rows,
            A=size,
            stride_b=x.stride(0),
            stride_h=x.stride(1),
            stride_n=x.stride(2),
            factor=factor,
            SCORE=score,
            BLOCK_A=block_size(size),
            BLOCK_N=32,
            num_warps=4,
        )
    return precomputed


def _config(kernel: str, call: dict[str, Any]) -> Config:
    return configuration(
        "score_attention",
        kernel,
        score=call["SCORE"],
        dtype=call["p_q"].dtype,
        N=call["N"],
        M=call["M"],
        size=max(call["BLOCK_A"], call["BLOCK_DV"]),
        masked=call["MASK"] != 0,
    )


def _edge_of_keys(call: Mapping[str, Any], config: Config) -> int:
    """The last tile of keys. Scores over hidden units have one loop for all tiles."""
    return edge_block(call["M"], config["BLOCK_KV"], call["CAUSAL"] or call["SCORE"] in UNIT_KINDS)


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
            b_y = twice_exponential(b_x)
        else:
            b_y = b_x * factor
        m_y = (o_a < (A + 1) // 2 * 2)[None, :]
        tl.store(precomputed_at(p_pre, i_bh, N, A, True) + o_a.to(tl.int64)[None, :] * length + o_n[:, None], b_y, mask=m_y)


@triton.jit
def _forward_kernel(
    p_q,
    p_k,
    p_v,
    p_pre_q,
    p_pre_k,
    p_mask,
    p_key_mask,
    p_seed,
    p_u,
    p_out,
    p_lse,
    H,
    GROUP_K: tl.constexpr,
    GROUP_V: tl.constexpr,
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
    BLOCK_EDGE: tl.constexpr,
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
    largest, total = 0.0, 0.0
    if UNITS:
        largest, total = weights_summed(p_u, o_a, A)
    b_weight, clamped = weights_of_rows(b_row, p_pre_k, tl.cdiv(M, 128) * 128, parameter, SCORE)
    b_scale = scale_log2 * b_weight
    b_max = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_Q], dtype=tl.float32)
    b_o = tl.zeros([BLOCK_Q, BLOCK_DV], dtype=tl.float32)
    # the first tiles lie within the keys and below the diagonal, and no clamp of cosine acts on them; the others are at the edge.
    # Scores over hidden units have one loop for all
    whole, end = key_range(i_q, M, UNITS, CAUSAL, BLOCK_Q, BLOCK_KV)
    whole = tl.where(clamped, 0, whole)
    for EDGE in tl.static_range(1 if UNITS else 0, 2):
        for start in range(whole if EDGE else 0, end if EDGE else whole, BLOCK_EDGE if EDGE else BLOCK_KV):
            o_kv = start + tl.arange(0, BLOCK_EDGE if EDGE else BLOCK_KV)
            b_k = load_rows(p_k, stride_kn, o_kv, o_a, M if EDGE else None, A)  # [kv,A]
            if UNITS:
                of_q, of_k = (p_q, p_pre_q, o_q, stride_qn, N), (p_k, p_pre_k, o_kv, stride_kn, M)
                bound = bound_q + largest_magnitude(b_k, SCORE)
                b_s = sum_units(of_q, of_k, p_u, A, bound, largest, total, SCORE, EXACT, FAST, PRECISION)
            else:
                b_column, _ = row_norm_and_bound(b_k, p_pre_k, o_kv, SCORE)
                b_x = dot(b_q, tl.trans(b_k), PRECISION)  # [q,kv]
                b_s, _ = activate(b_x, b_row, b_column, b_weight, parameter, SCORE, EDGE, FAST, PRECISION)
            if EDGE or KEY_MASK or MASK != 0:
                b_s *= b_scale[:, None]
                b_masked = mask_tile(
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
                    EDGE,
                )
                b_s = b_s + keep_layout(b_masked, UNITS, PRECISION) if UNITS and MASK != 0 else b_masked
                b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
                b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
                b_p = tl.exp2(b_s - b_safe[:, None])
            else:
                # the maximum first, then one multiply-add per pair
                b_safe = tl.maximum(b_max, (tl.min(b_s, axis=1) if NEGATIVE else tl.max(b_s, axis=1)) * b_scale)
                b_new = b_safe
                b_p = tl.exp2(b_s * b_scale[:, None] - b_safe[:, None])
            b_alpha = tl.exp2(b_max - b_safe)
            b_sum = b_sum * b_alpha + tl.sum(b_p, axis=1)
            if DROPOUT:
                b_p *= keep_factor(p_seed, dropout_p, threshold, i_bh, o_q, o_kv, N)
            b_v = load_keys(p_v, stride_vn, p_key_mask, o_kv, o_d, M if EDGE else None, DV, KEY_MASK)  # [kv,Dv]
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
    p_pre_q,
    p_pre_k,
    p_mask,
    p_key_mask,
    p_seed,
    p_grad,
    p_u,
    p_lse,
    p_shift,
    p_total,
    p_sums,
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
    UNITS: tl.constexpr,
    PAIR: tl.constexpr,
    WITH_LSE: tl.constexpr,
    LIMIT: tl.constexpr,
    BY_GRADIENT: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_EDGE: tl.constexpr,
):
    """The log-sum-exp of each row; with PAIR a base-2 shift and a sum, as `Rows` says. SUMS: the row sums of this head's Abar.

    WITH_LSE: the log-sum-exp is there, and with PAIR it is computed only where it `is_coarse`: unless sums are wanted, the keys
    are read only by blocks that have such a row.
    """
    NP = tl.cdiv(N, ROWS) * ROWS
    i_q, i_bh, i_b, i_h, i_hk = block_and_head(NP // BLOCK_Q, H, GROUP_K)
    if CAUSAL:
        i_q = NP // BLOCK_Q - 1 - i_q  # the longest rows first
    p_q = rows_at(p_q, i_b * stride_qb + i_h * stride_qh, A)
    p_k = rows_at(p_k, i_b * stride_kb + i_hk * stride_kh, A)
    p_v = rows_at(p_v, i_b * stride_vb + (i_h // GROUP_V) * stride_vh, DV)
    p_mask += i_b * stride_mb + i_h * stride_mh
    p_key_mask += i_b * M
    p_u += i_h * A
    p_pre_q = precomputed_at(p_pre_q, i_bh, N, A, UNITS)
    p_pre_k = precomputed_at(p_pre_k, i_b * (H // GROUP_K) + i_hk, M, A, UNITS)
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_a = tl.arange(0, BLOCK_A)
    o_d = tl.arange(0, BLOCK_DV)
    b_q = load_rows(p_q, stride_qn, o_q, o_a, N, A)  # [q,A]
    if SUMS and BY_GRADIENT:
        b_do = load_rows(rows_at(p_grad, i_b * stride_gb + i_h * stride_gh, DV), stride_gn, o_q, o_d, N, DV)  # [q,Dv]
    b_row, bound_q = row_norm_and_bound(b_q, p_pre_q, o_q, SCORE)
    largest, total = 0.0, 0.0
    if UNITS:
        largest, total = weights_summed(p_u, o_a, A)
    b_weight, clamped = weights_of_rows(b_row, p_pre_k, tl.cdiv(M, 128) * 128, parameter, SCORE)
    b_scale = scale_log2 * b_weight
    b_max = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    b_total = tl.zeros([BLOCK_Q], dtype=tl.float32)
    b_sums = tl.zeros([BLOCK_Q], dtype=tl.float32)
    whole, end = key_range(i_q, M, UNITS, CAUSAL, BLOCK_Q, BLOCK_KV)
    if WITH_LSE and PAIR:
        m_coarse = is_coarse(tl.load(p_lse + i_bh * N + o_q, mask=o_q < N, other=0.0), LIMIT)
        if not SUMS:
            some = tl.max(m_coarse.to(tl.int32), axis=0) > 0
            whole, end = tl.where(some, whole, 0), tl.where(some, end, 0)
    whole = tl.where(clamped, 0, whole)
    for EDGE in tl.static_range(1 if UNITS else 0, 2):
        for start in range(whole if EDGE else 0, end if EDGE else whole, BLOCK_EDGE if EDGE else BLOCK_KV):
            o_kv = start + tl.arange(0, BLOCK_EDGE if EDGE else BLOCK_KV)
            b_k = load_rows(p_k, stride_kn, o_kv, o_a, M if EDGE else None, A)  # [kv,A]
            b_column, bound_k = row_norm_and_bound(b_k, p_pre_k, o_kv, SCORE)
            if UNITS:
                of_q, of_k = (p_q, p_pre_q, o_q, stride_qn, N), (p_k, p_pre_k, o_kv, stride_kn, M)
                b_s = sum_units(of_q, of_k, p_u, A, bound_q + bound_k, largest, total, SCORE, EXACT, FAST, PRECISION)
            else:
                b_x = dot(b_q, tl.trans(b_k), PRECISION)  # [q,kv]
                b_s, _ = activate(b_x, b_row, b_column, b_weight, parameter, SCORE, EDGE, FAST, PRECISION)
            b_s *= b_scale[:, None]
            b_masked = mask_tile(
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
                EDGE,
            )
            b_s = b_s + keep_layout(b_masked, UNITS, PRECISION) if UNITS else b_masked
            b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
            b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_alpha = tl.exp2(b_max - b_safe)
            b_p = tl.exp2(b_s - b_safe[:, None])
            b_total = b_total * b_alpha + tl.sum(b_p, axis=1)
            if SUMS and BY_GRADIENT:
                b_v = load_keys(p_v, stride_vn, p_key_mask, o_kv, o_d, M if EDGE else None, DV, KEY_MASK)  # [kv,Dv]
                b_dp = dot(b_do, tl.trans(b_v), PRECISION)
                b_sums = b_sums * b_alpha + tl.sum(relu(b_p * b_dp), axis=1)
            b_max = b_new
    empty = b_total == 0.0
    b_one = tl.where(empty, 1.0, b_total)
    b_factor = 1.0 / b_one  # of the sums
    b_shift = b_max
    if WITH_LSE:
        b_lse = row_shift(p_lse + i_bh * N, o_q, N)
        if PAIR:
            b_shift = tl.where(m_coarse, b_max, b_lse)
            b_one = tl.where(m_coarse, b_one, 1.0)
            b_factor = tl.where(m_coarse, b_factor, tl.exp2(b_max - b_lse))
        else:
            b_factor = tl.exp2(b_max - b_lse)  # the log-sum-exp may count keys that are not here
    if PAIR:
        tl.store(p_total + i_bh * NP + o_q, tl.where(o_q < N, b_one, 1.0))
    else:
        b_shift = b_lse if WITH_LSE else b_max + tl.log2(b_one)
    tl.store(p_shift + i_bh * NP + o_q, tl.where((o_q < N) & (b_shift != float("-inf")), b_shift, float("inf")))
    if SUMS:
        tl.store(p_sums + i_bh * NP + o_q, (b_sums if BY_GRADIENT else b_total) * b_factor)
