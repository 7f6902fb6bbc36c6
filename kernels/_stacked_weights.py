"""stacked_cross_attention in Triton: the weights alpha from the scores, through clipping, first norm and softmax."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlattn_fast.kernels._stacked_inputs import EPS, Contexts, Options, Queries, padded, pair
from vlattn_fast.kernels._stacked_products import parts_of, store_parts
from vlattn_fast.kernels._tiles import block_size, load_tile, store_tile


def weight_parts(scores: Tensor, queries: Queries, contexts: Contexts, options: Options) -> Tensor:
    """alpha as numbers of the inputs' dtype that sum to it, (parts, L, X, M), M padded."""
    if queries.rows.dtype == torch.float32:
        alpha = _new_alpha(queries, contexts, torch.float32)
        _launch(scores, queries, contexts, options, alpha, alpha[None], keep=True, split=False)
        return alpha[None]
    parts = _new_parts(queries, contexts)
    _launch(scores, queries, contexts, options, scores, parts, keep=False, split=True)  # no kernel writes to scores
    return parts


def weights(scores: Tensor, queries: Queries, contexts: Contexts, options: Options, dtype: torch.dtype) -> Tensor:
    """alpha (L, X, M) in `dtype`."""
    alpha = _new_alpha(queries, contexts, dtype)
    _launch(scores, queries, contexts, options, alpha, alpha[None], keep=True, split=False)
    return alpha[..., : contexts.size]


def weights_and_parts(scores: Tensor, queries: Queries, contexts: Contexts, options: Options) -> tuple[Tensor, Tensor]:
    """`weights` in float32 and `weight_parts` of 16-bit inputs."""
    alpha, parts = _new_alpha(queries, contexts, torch.float32), _new_parts(queries, contexts)
    _launch(scores, queries, contexts, options, alpha, parts, keep=True, split=True)
    return alpha[..., : contexts.size], parts


def _new_alpha(queries: Queries, contexts: Contexts, dtype: torch.dtype) -> Tensor:
    return queries.new_map(len(queries.rows), contexts.sets, padded(contexts.size), dtype=dtype)


def _new_parts(queries: Queries, contexts: Contexts) -> Tensor:
    dtype = queries.rows.dtype
    return queries.new_map(parts_of(dtype)[0], len(queries.rows), contexts.sets, padded(contexts.size), dtype=dtype)


def _launch(
    scores: Tensor, queries: Queries, contexts: Contexts, options: Options, alpha: Tensor, parts: Tensor, keep: bool, split: bool
) -> None:
    """Writes alpha with `keep`, and its parts with `split`. Both have the strides of `parts`."""
    _weights_kernel[(queries.sets * contexts.sets,)](
        p_s=scores,
        p_alpha=alpha,
        p_parts=parts,
        p_start=queries.start,
        p_lengths=contexts.lengths,
        X=contexts.sets,
        M=contexts.size,
        stride_row=scores.stride(0),
        stride_part=parts.stride(0),
        stride_alpha_row=parts.stride(1),
        stride_alpha_x=parts.stride(2),
        smooth=options.smooth,
        factor=parts_of(queries.rows.dtype)[1],
        NORM=options.norm,
        CLIP=options.clips,
        PARTS=len(parts) if split else 0,
        KEEP=keep,
        **map_configuration(contexts.size, 2048),
    )


def map_configuration(size: int, elements: int) -> dict[str, int]:
    """Rows of whole contexts, `elements` in all. Not measured: few enough for the registers of sm_90."""
    block = block_size(size)
    return {"BLOCK_Q": max(1, min(64, elements // block)), "BLOCK_KV": block, "num_warps": 4 if block <= 1024 else 8}


@triton.jit
def _weights_kernel(
    p_s,
    p_alpha,
    p_parts,
    p_start,
    p_lengths,
    X,
    M,
    stride_row,
    stride_part,
    stride_alpha_row,
    stride_alpha_x,
    smooth,
    factor,
    NORM: tl.constexpr,
    CLIP: tl.constexpr,
    PARTS: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """The softmax over the contexts of the normalised scores of one pair."""
    i_x, _, begin, end, num = pair(p_start, p_lengths, X)
    o_kv = tl.arange(0, BLOCK_KV)
    p_s += i_x * M
    dtype: tl.constexpr = p_alpha.dtype.element_ty
    b_shift, b_norm = columns(p_s, stride_row, begin, end, o_kv, num, dtype, NORM, CLIP, BLOCK_Q, BLOCK_KV)
    for n in range(begin, end, BLOCK_Q):
        o_q = n + tl.arange(0, BLOCK_Q)
        b_s = load_tile(p_s, stride_row, o_q, o_kv, end, num).to(dtype)  # [q,kv]
        b_x = smooth * normal(b_s, b_shift, b_norm, NORM, CLIP)
        b_x = tl.where((o_kv < num)[None, :], b_x, float("-inf"))
        b_max = tl.max(b_x, axis=1)
        b_p = tl.exp(b_x - tl.where(b_max == float("-inf"), 0.0, b_max)[:, None])
        b_sum = tl.sum(b_p, axis=1)
        b_p = b_p / tl.where(b_sum > 0.0, b_sum, 1.0)[:, None]
        if KEEP:
            store_tile(p_alpha + i_x * stride_alpha_x, stride_alpha_row, o_q, o_kv, end, stride_alpha_x, b_p)
        if PARTS > 0:
            p = p_parts + i_x * stride_alpha_x
            store_parts(p, stride_part, stride_alpha_row, o_q, o_kv, end, stride_alpha_x, b_p * factor, PARTS)


@triton.jit
def clip(b_s, CLIP: tl.constexpr):
    if CLIP:
        b_s = tl.where(b_s >= 0.0, b_s, 0.1 * b_s)
    return b_s


@triton.jit
def columns(
    p_s,
    stride_row,
    begin,
    end,
    o_kv,
    num,
    dtype: tl.constexpr,
    NORM: tl.constexpr,
    CLIP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """The arguments b_shift and b_norm of `normal`, [kv] each: the maximum and the sum of exponentials, or 0 and the norm."""
    b_shift = tl.full([BLOCK_KV], float("-inf") if NORM == "softmax" else 0.0, dtype=dtype)
    b_sum = tl.zeros([BLOCK_KV], dtype=dtype)
    if NORM != "none":
        for n in range(begin, end, BLOCK_Q):
            o_q = n + tl.arange(0, BLOCK_Q)
            b_x = clip(load_tile(p_s, stride_row, o_q, o_kv, end, num).to(dtype), CLIP)
            if NORM == "softmax":
                b_x = tl.where((o_q < end)[:, None], b_x, float("-inf"))
                b_new = tl.maximum(b_shift, tl.max(b_x, axis=0))
                b_sum = b_sum * tl.exp(b_shift - b_new) + tl.sum(tl.exp(b_x - b_new[None, :]), axis=0)
                b_shift = b_new
            elif NORM == "l1norm":
                b_sum += tl.sum(tl.abs(b_x), axis=0)
            else:
                b_sum += tl.sum(b_x * b_x, axis=0)
    return b_shift, tl.sqrt(b_sum) if NORM == "l2norm" else b_sum


@triton.jit
def normal(b_s, b_shift, b_norm, NORM: tl.constexpr, CLIP: tl.constexpr):
    """Scores [q,kv] after clipping and the first norm."""
    b_x = clip(b_s, CLIP)
    if NORM == "softmax":
        b_x = tl.exp(b_x - b_shift[None, :]) / b_norm[None, :]
    elif NORM != "none":
        b_x = b_x / (b_norm + EPS)[None, :]
    return b_x
