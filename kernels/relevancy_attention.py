"""relevancy_attention in Triton: a flash backward pass that also gives r Abar, and r Abar alone behind any attention.

Shapes: query (B, H, N, D), key (B, Hk, M, D), value (B, Hk, M, Dv), relevancy r (B, T, N) -> r Abar (B, T, M). Hk divides H.
Roofline: tensor cores, 7 matrix products in the two passes of the backward and 2 in r Abar alone (rule "gradient"). There the
exponentials (MUFU) take as long at D = 64. r Abar within the backward pass adds a maximum and two multiply-adds per pair.
Trick: r Abar is a sum over queries. The key-major pass owns its keys and has P and dP in registers anyway. Tiles lie [kv,q]
there, so that P and dS enter the next product, and r Abar is summed, without leaving registers.
Order: the query-major pass comes first. It computes what the key-major pass needs of each row: delta = sum(dO * O), the row sum
of Abar, and in float32 the sum of exp(logit - lse), which undoes the rounding of lse.
No atomics: there is one partial sum of r Abar per key head, and they are added in order. Not yet measured on a GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from vlattn_fast.kernels import attention_map, score_attention
from vlattn_fast.kernels._device import configured, on_device
from vlattn_fast.kernels._tiles import (
    CALLER_LSE,
    LOG2_E,
    OWN_LSE,
    ROWS,
    aligned,
    block_and_head,
    block_size,
    dot,
    input_precision,
    is_coarse,
    key_range,
    load_keys,
    load_rows,
    mask_arguments,
    mask_logits,
    pad_rows,
    padded_rows,
    relu,
    round_tf32,
    row_shift,
    rows_at,
    store_tile,
)

from vlattn_fast._tensors import weigh_rows

MAX_T = 64  # rows of r in one program


@on_device
def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    carrier: Tensor,
    residual_weight: Tensor | None,
    attention_weight: Tensor | None,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    rule: str,
    row_normalize: bool,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, H, N, Dv), a copy of the carrier (B, T, N), lse (B, H, N)."""
    out, lse = score_attention.forward(query, key, value, None, attn_mask, key_mask, None, "dot", 0.0, scale, 0.0, is_causal)
    return out, carrier.clone(), lse


@on_device
def backward(
    grad_out: Tensor | None,
    grad_carrier: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    residual_weight: Tensor | None,
    attention_weight: Tensor | None,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    rule: str,
    row_normalize: bool,
    scale: float,
    is_causal: bool,
    need_inputs: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key and value, and the carrier's cotangent r * a + (r * b) Abar; None where nothing is needed."""
    grads: tuple[Tensor | None, ...] = (None, None, None)
    weighted_r = r_abar = None
    if grad_carrier is not None and (grad_out is not None or rule == "attention"):
        weighted_r = weigh_rows(grad_carrier, attention_weight)
    if need_inputs and grad_out is not None:
        launch = _describe(query, key, value, grad_out, attn_mask, key_mask, rule, scale, is_causal)
        beside = None if weighted_r is None or weighted_r.shape[1] > MAX_T else weighted_r
        grad_q, rows, sums = _backward_q(launch, out, lse.contiguous(), beside is not None and row_normalize)
        grad_k, grad_v, r_abar = _backward_kv(launch, rows, beside, sums)
        grads = (grad_q, grad_k, grad_v)
    if weighted_r is not None and r_abar is None:
        # in float32 the rounding of lse is half of the error of r Abar, and under float masks it shows: step recomputes the sums
        exact = query.dtype == torch.float32 or (attn_mask is not None and attn_mask.dtype != torch.bool)
        known_lse = None if exact else lse
        r_abar = step(
            weighted_r, query, key, value, grad_out, known_lse, attn_mask, key_mask, rule, row_normalize, scale, is_causal
        )
    if grad_carrier is None:
        return grads[0], grads[1], grads[2], None
    residual = weigh_rows(grad_carrier, residual_weight)
    return grads[0], grads[1], grads[2], residual.clone() if r_abar is None else residual + r_abar


@on_device
def step(
    relevancy: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    grad_output: Tensor | None,
    lse: Tensor | None,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    rule: str,
    row_normalize: bool,
    scale: float,
    is_causal: bool,
) -> Tensor:
    """relevancy @ Abar, (B, T, N) -> (B, T, M).

    Up to MAX_T rows are multiplied while Abar is computed. More would compute it again for each MAX_T of them: it is stored then,
    for as many samples at once as `_stored_maps` says.

    `lse` may count keys that are not here: probabilities are exp(logit - lse). Under a float mask, rows whose lse `is_coarse` are
    normalised over the keys that are here.
    """
    if rule == "attention":
        value = grad_output = None
    samples = _stored_maps(relevancy, query, key)
    if samples > 0:
        result = relevancy.new_empty((*relevancy.shape[:2], key.shape[2]), dtype=torch.float32)
        for start in range(0, query.shape[0], samples):
            b = slice(start, start + samples)
            abar = attention_map.forward(
                query[b],
                key[b],
                None if value is None else value[b],
                None if grad_output is None else grad_output[b],
                None if lse is None else lse[b],
                attn_mask[b] if attn_mask is not None and attn_mask.ndim == 4 and attn_mask.shape[0] > 1 else attn_mask,
                None if key_mask is None else key_mask[b],
                rule,
                "mean",
                row_normalize,
                scale,
                is_causal,
            )
            torch.bmm(relevancy[b].to(torch.float32), abar, out=result[b])
        return result.to(relevancy.dtype)
    launch = _describe(query, key, value, grad_output, attn_mask, key_mask, rule, scale, is_causal)
    lse = None if lse is None else lse.to(torch.float32).contiguous()
    if lse is None or row_normalize or launch.float_mask:
        rows, sums = _statistics(launch, lse, row_normalize)
    else:
        rows, sums = _RowStatistics(pad_rows(torch.where(lse == -torch.inf, torch.inf, lse * LOG2_E), torch.inf)), None
    r_abar = _backward_kv(launch, rows, relevancy, sums)[2]
    assert r_abar is not None  # relevancy was there
    return r_abar.to(relevancy.dtype)


def _stored_maps(relevancy: Tensor, query: Tensor, key: Tensor) -> int:
    """Of how many samples `step` stores Abar (N, M) at once; 0 for few rows, and where not even one is small enough.

    Together they have no more elements than the queries or the result, or 2^22: memory stays linear in the sequence's length.
    """
    (batch, heads, num_q, size), num_kv, num_t = query.shape, key.shape[2], relevancy.shape[1]
    if num_t <= MAX_T or min(batch, heads, num_q, size, num_kv) == 0:
        return 0
    return max(1 << 22, query.numel(), batch * num_t * num_kv) // (num_q * num_kv)


class _Launch(NamedTuple):
    """The arguments that all kernels here share: tensors, sizes and strides in elements, constants.

    The query stands in for tensors that are absent.
    """

    tensors: tuple[Tensor, ...]  # query, key, value, grad_out, attn_mask, key_mask
    numbers: tuple[Any, ...]
    constants: dict[str, Any]
    scale: float

    @property
    def empty(self) -> bool:
        query, key = self.tensors[:2]
        return query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] == 0

    @property
    def float_mask(self) -> bool:
        return self.constants["MASK"] == 2

    def or_query(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(self.tensors[0] if x is None else x for x in tensors)

    def new_row(self) -> Tensor:
        """(B,H,N), N padded"""
        batch, heads, num_q = self.tensors[0].shape[:3]
        return self.tensors[0].new_empty((batch, heads, padded_rows(num_q)), dtype=torch.float32)


class _RowStatistics(NamedTuple):
    """What the key-major kernel needs of each row, (B, H, N) float32 with N padded, so that it loads them without a mask.

    P = exp2(logit - shift) / total; without `total` that is 1. The shift is in base 2, and infinite for fully masked rows and for
    padding: P is 0 there. delta = sum(dO * O).
    """

    shift: Tensor
    total: Tensor | None = None
    delta: Tensor | None = None


def _describe(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    grad_out: Tensor | None,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    rule: str,
    scale: float,
    is_causal: bool,
) -> _Launch:
    query, key = aligned(query), aligned(key)
    value, grad_out = (query if x is None else aligned(x) for x in (value, grad_out))
    heads, num_q, size = query.shape[1:]
    masks, strides_mask, mask_constants = mask_arguments(attn_mask, key_mask, query, key.shape[2])
    numbers = (
        heads,
        heads // max(1, key.shape[1]),
        num_q,
        key.shape[2],
        size,
        value.shape[3],
        scale * LOG2_E,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *grad_out.stride()[:3],
        *strides_mask,
    )
    constants = {
        **mask_constants,
        "CAUSAL": is_causal,
        "BY_GRADIENT": rule == "gradient",
        "PRECISION": input_precision(),
        "BLOCK_D": block_size(size),
        "BLOCK_DV": block_size(value.shape[3]),
    }
    return _Launch((query, key, value, grad_out, *masks), numbers, constants, scale)


def _statistics(
    launch: _Launch, lse: Tensor | None, summed: bool, limit: tl.constexpr = CALLER_LSE
) -> tuple[_RowStatistics, Tensor | None]:
    """The rows, and on request the row sums of each head's A or relu(A * dA).

    Without `lse` the log-sum-exp is computed.
    """
    query = launch.tensors[0]
    pair = launch.float_mask or (lse is None and query.dtype == torch.float32)
    shift = launch.new_row()
    total, sums = (launch.new_row() if needed else None for needed in (pair, summed))
    if not launch.empty:
        config = _config("statistics", launch)
        _statistics_kernel[(padded_rows(query.shape[2]) // config["BLOCK_Q"] * query.shape[0] * query.shape[1],)](
            *launch.tensors,
            *launch.or_query(lse, shift, total, sums),
            *launch.numbers,
            **launch.constants,
            PAIR=pair,
            WITH_LSE=lse is not None,
            LIMIT=limit.value,
            SUMS=summed,
            **config,
        )
    return _RowStatistics(shift, total), sums


def _backward_q(launch: _Launch, out: Tensor, lse: Tensor, summed: bool) -> tuple[Tensor, _RowStatistics, Tensor | None]:
    """The gradient of the query, and the rows as `_statistics` returns them, with delta."""
    query = launch.tensors[0]
    batch, heads, num_q, size = query.shape
    grad_q = query.new_empty(batch, num_q, heads, size).transpose(1, 2)
    exact = query.dtype == torch.float32
    shift, delta = launch.new_row(), launch.new_row()
    total, sums = (launch.new_row() if needed else None for needed in (exact, summed))
    if launch.float_mask:
        rows, _ = _statistics(launch, lse, False, OWN_LSE)
        lse = shift = rows.shift
        total = rows.total
    if launch.empty:
        grad_q.zero_()
    else:
        out, config = aligned(out), _config("backward_q", launch)
        _backward_q_kernel[(padded_rows(num_q) // config["BLOCK_Q"] * batch * heads,)](
            *launch.tensors,
            out,
            *launch.or_query(lse, delta, shift, total, sums),
            grad_q,
            *launch.numbers,
            *out.stride()[:3],
            launch.scale,
            **launch.constants,
            EXACT=exact,
            SUMS=summed,
            **config,
        )
    return grad_q, _RowStatistics(shift, total, delta), sums


def _backward_kv(
    launch: _Launch, rows: _RowStatistics, relevancy: Tensor | None, sums: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of key and value where the rows have a delta; r Abar (B, T, M) where there is a relevancy.

    `sums` are the row sums that Abar is divided by.
    """
    num_t = 0 if relevancy is None else relevancy.shape[1]
    query, key, value = launch.tensors[:3]
    batch, num_heads, num_kv = query.shape[0], query.shape[1], key.shape[2]
    grad_k = grad_v = r_abar = None
    if rows.delta is not None:
        grad_k, grad_v = (x.new_empty(batch, num_kv, *x.shape[1:4:2]).transpose(1, 2) for x in (key, value))
    # a program takes one key head. With many rows of r it takes all of them, so that the partial sums stay O(B H N)
    key_heads = max(1, key.shape[1]) if num_t > MAX_T else 1
    parts = key.shape[1] // key_heads
    if relevancy is not None:
        r_abar = query.new_empty((batch, max(1, parts), num_t, num_kv), dtype=torch.float32)
    if launch.empty:
        for x in (grad_k, grad_v, r_abar):
            if x is not None:
                x.zero_()
    elif rows.delta is not None or num_t > 0:
        factor = 1.0 / num_heads
        block_t = 0 if num_t == 0 else 1 if num_t == 1 else min(MAX_T, block_size(num_t))
        weighted_r = query
        if relevancy is not None:
            weighted_r = pad_rows(relevancy.to(torch.float32))
        if sums is not None:
            total, factor = sums.sum(1, keepdim=True), 1.0
            weighted_r = weighted_r / torch.where(total == 0.0, 1.0, total)  # where the sum is 0, so is the row of Abar
        config = _config("backward_kv", launch, block_t)
        precision = input_precision() if query.dtype == torch.float32 or input_precision() == "widen" else "tf32"
        blocks = triton.cdiv(num_kv, config["BLOCK_KV"]) * max(1, triton.cdiv(num_t, MAX_T))
        _backward_kv_kernel[(blocks * batch * parts,)](
            *launch.tensors,
            *launch.or_query(*rows, weighted_r, grad_k, grad_v, r_abar),
            *launch.numbers,
            key_heads,
            launch.scale,
            num_t,
            factor,
            **launch.constants,
            EXACT=rows.total is not None,
            GRADS=rows.delta is not None,
            BLOCK_T=block_t,
            PRECISION_T=precision,
            ROUND=query.dtype != torch.float32 or precision == "tf32",
            **config,
        )
    return grad_k, grad_v, None if r_abar is None else r_abar[:, 0] if r_abar.shape[1] == 1 else r_abar.sum(1)


def _config(kernel: str, launch: _Launch, block_t: int = 0) -> dict[str, int]:
    """Tile sizes by kernel, dtype, head dimensions, masks and rows of r.

    Not measured. They are the largest of those tried that compile for sm_90 without spills and within 99 KB of shared memory.
    """
    query, key, value = launch.tensors[:3]
    size = max(query.shape[3], value.shape[3])
    plain = launch.constants["MASK"] == 0
    if query.dtype == torch.float32:
        block_q, block_kv, warps, stages = (32, 32, 8, 1) if size <= 64 else (16, 16, 8, 1)
    elif size > 128:
        block_q, block_kv, warps, stages = (32, 32, 4, 1) if block_t <= 16 else (16, 32, 4, 1)
    elif kernel == "backward_kv" and size > 64:
        block_q, block_kv, warps, stages = (32, 64, 4, 2) if plain and block_t <= 1 else (16, 64, 4, 2)
    elif kernel == "backward_kv":
        block_q, block_kv, warps, stages = (64, 128, 8, 2) if plain and block_t <= 16 else (32, 128, 8, 2)
    else:
        block_q, block_kv, warps, stages = (64, 64, 4, 2) if size <= 64 else (64, 32, 4, 2)
    config = {"BLOCK_Q": block_q, "BLOCK_KV": block_kv, "num_warps": warps, "num_stages": stages}
    lengths = query.shape[2], key.shape[2]
    return configured(config, "relevancy_attention", kernel, query.dtype, *lengths, size, block_t, not plain)


@triton.jit
def _statistics_kernel(
    p_q,
    p_k,
    p_v,
    p_do,
    p_mask,
    p_key_mask,
    p_lse,
    p_shift,
    p_total,
    p_sums,
    H,
    GROUP: tl.constexpr,
    N,
    M,
    D: tl.constexpr,
    DV: tl.constexpr,
    scale_log2,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_mb,
    stride_mh,
    stride_mn,
    stride_mm,
    MASK: tl.constexpr,
    KEY_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    BY_GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr,
    PAIR: tl.constexpr,
    WITH_LSE: tl.constexpr,
    LIMIT: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """The log-sum-exp of each row; with PAIR a base-2 shift and a sum, as `_RowStatistics` says.

    WITH_LSE: the log-sum-exp is there, and is computed only where it `is_coarse`. SUMS: also the row sums of this head's share of
    Abar.
    """
    NP = tl.cdiv(N, ROWS) * ROWS
    i_q, i_bh, i_b, i_h, i_hk = block_and_head(NP // BLOCK_Q, H, GROUP)
    if CAUSAL:
        i_q = NP // BLOCK_Q - 1 - i_q  # the longest rows first
    p_k = rows_at(p_k, i_b * stride_kb + i_hk * stride_kh, D)
    p_v = rows_at(p_v, i_b * stride_vb + i_hk * stride_vh, DV)
    p_mask += i_b * stride_mb + i_h * stride_mh
    p_key_mask += i_b * M
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    b_q = load_rows(rows_at(p_q, i_b * stride_qb + i_h * stride_qh, D), stride_qn, o_q, o_d, N, D)  # [q,D]
    if SUMS and BY_GRADIENT:
        b_do = load_rows(rows_at(p_do, i_b * stride_gb + i_h * stride_gh, DV), stride_gn, o_q, o_dv, N, DV)  # [q,Dv]
    b_max = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    b_total = tl.zeros([BLOCK_Q], dtype=tl.float32)
    b_sums = tl.zeros([BLOCK_Q], dtype=tl.float32)
    full, end = key_range(i_q, M, MASK, False, CAUSAL, BLOCK_Q, BLOCK_KV)
    if WITH_LSE and PAIR:
        m_coarse = is_coarse(tl.load(p_lse + i_bh * N + o_q, mask=o_q < N, other=0.0), LIMIT)
        if not SUMS:
            end = tl.where(tl.max(m_coarse.to(tl.int32), axis=0) > 0, end, 0)
    for PART in tl.static_range(1 if MASK != 0 else 0, 2):
        for start in range(0 if PART == 0 else full, full if PART == 0 else end, BLOCK_KV):
            o_kv = start + tl.arange(0, BLOCK_KV)
            b_k = load_rows(p_k, stride_kn, o_kv, o_d, M, D)  # [kv,D]
            b_s = dot(b_q, tl.trans(b_k), PRECISION) * scale_log2  # [q,kv]
            b_s = _mask_padding(b_s, p_mask, stride_mn, stride_mm, p_key_mask, o_q, o_kv, N, M, MASK, KEY_MASK, CAUSAL, PART)
            b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
            b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_alpha = tl.exp2(b_max - b_safe)
            b_p = tl.exp2(b_s - b_safe[:, None])
            b_total = b_total * b_alpha + tl.sum(b_p, axis=1)
            if SUMS and BY_GRADIENT:
                b_v = load_keys(p_v, stride_vn, p_key_mask, o_kv, o_dv, M, DV, KEY_MASK)  # [kv,Dv]
                b_dp = dot(b_do, tl.trans(b_v), PRECISION)
                b_sums = b_sums * b_alpha + tl.sum(relu(b_p * b_dp), axis=1)
            b_max = b_new
    m_q = o_q < N
    empty = b_total == 0.0
    b_one = tl.where(empty, 1.0, b_total)
    b_weight = 1.0 / b_one
    b_shift = b_max
    if WITH_LSE:
        b_lse = row_shift(p_lse + i_bh * N, o_q, N)
        if PAIR:
            b_shift = tl.where(m_coarse, b_max, b_lse)
            b_one = tl.where(m_coarse, b_one, 1.0)
            b_weight = tl.where(m_coarse, b_weight, tl.exp2(b_max - b_lse))
        else:
            b_weight = tl.exp2(b_max - b_lse)  # of the sums over the keys that are here
    if PAIR:
        tl.store(p_total + i_bh * NP + o_q, b_one)
    else:
        b_shift = b_lse if WITH_LSE else b_max + tl.log2(b_one)
    tl.store(p_shift + i_bh * NP + o_q, tl.where(m_q & (b_shift != float("-inf")), b_shift, float("inf")))
    if SUMS:
        tl.store(p_sums + i_bh * NP + o_q, (b_sums if BY_GRADIENT else b_total) * b_weight)


@triton.jit
def _backward_q_kernel(
    p_q,
    p_k,
    p_v,
    p_do,
    p_mask,
    p_key_mask,
    p_out,
    p_lse,
    p_delta,
    p_shift,
    p_total,
    p_sums,
    p_dq,
    H,
    GROUP: tl.constexpr,
    N,
    M,
    D: tl.constexpr,
    DV: tl.constexpr,
    scale_log2,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_mb,
    stride_mh,
    stride_mn,
    stride_mm,
    stride_ob,
    stride_oh,
    stride_on,
    scale,
    MASK: tl.constexpr,
    KEY_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    BY_GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """dQ and delta.

    EXACT: also the total that gives P better than a rounded lse. SUMS: as in `_statistics_kernel`. Under a float mask p_lse and
    p_total come as shift and total, as `_RowStatistics` has them.
    """
    NP = tl.cdiv(N, ROWS) * ROWS
    i_q, i_bh, i_b, i_h, i_hk = block_and_head(NP // BLOCK_Q, H, GROUP)
    if CAUSAL:
        i_q = NP // BLOCK_Q - 1 - i_q  # the longest rows first
    p_k = rows_at(p_k, i_b * stride_kb + i_hk * stride_kh, D)
    p_v = rows_at(p_v, i_b * stride_vb + i_hk * stride_vh, DV)
    p_mask += i_b * stride_mb + i_h * stride_mh
    p_key_mask += i_b * M
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    b_do = load_rows(rows_at(p_do, i_b * stride_gb + i_h * stride_gh, DV), stride_gn, o_q, o_dv, N, DV)  # [q,Dv]
    b_o = load_rows(rows_at(p_out, i_b * stride_ob + i_h * stride_oh, DV), stride_on, o_q, o_dv, N, DV)  # [q,Dv]
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), axis=1)
    b_q = load_rows(rows_at(p_q, i_b * stride_qb + i_h * stride_qh, D), stride_qn, o_q, o_d, N, D)  # [q,D]
    if MASK == 2:
        b_shift = tl.load(p_lse + i_bh * NP + o_q)
    else:
        b_shift = row_shift(p_lse + i_bh * N, o_q, N)
    b_dq = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
    b_total = tl.zeros([BLOCK_Q], dtype=tl.float32)
    if EXACT:
        # sum(dS) would be 0 without the rounding of `out` in delta: the rest corrects delta, and dQ through sum(P K)
        b_rest = tl.zeros([BLOCK_Q], dtype=tl.float32)
        b_mean = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
    b_sums = tl.zeros([BLOCK_Q], dtype=tl.float32)
    full, end = key_range(i_q, M, MASK, False, CAUSAL, BLOCK_Q, BLOCK_KV)
    if MASK == 2:
        b_weight = 1.0 / tl.load(p_total + i_bh * NP + o_q)
    for PART in tl.static_range(1 if MASK != 0 else 0, 2):
        for start in range(0 if PART == 0 else full, full if PART == 0 else end, BLOCK_KV):
            o_kv = start + tl.arange(0, BLOCK_KV)
            b_k = load_keys(p_k, stride_kn, p_key_mask, o_kv, o_d, M, D, KEY_MASK)  # [kv,D]
            b_v = load_keys(p_v, stride_vn, p_key_mask, o_kv, o_dv, M, DV, KEY_MASK)  # [kv,Dv]
            b_s = dot(b_q, tl.trans(b_k), PRECISION) * scale_log2  # [q,kv]
            b_s = _mask_padding(b_s, p_mask, stride_mn, stride_mm, p_key_mask, o_q, o_kv, N, M, MASK, KEY_MASK, CAUSAL, PART)
            b_p = tl.exp2(b_s - b_shift[:, None])
            if MASK == 2:
                b_p *= b_weight[:, None]
            b_dp = dot(b_do, tl.trans(b_v), PRECISION)
            if EXACT or (SUMS and not BY_GRADIENT):
                b_total += tl.sum(b_p, axis=1)
            if SUMS and BY_GRADIENT:
                b_sums += tl.sum(relu(b_p * b_dp), axis=1)
            b_ds = b_p * (b_dp - b_delta[:, None])
            b_dq += dot(b_ds.to(b_k.dtype), b_k, PRECISION)
            if EXACT:
                b_rest += tl.sum(b_ds, axis=1)
                b_mean += dot(b_p, b_k, PRECISION)
    if not BY_GRADIENT:
        b_sums = b_total
    if EXACT:
        b_total = tl.where(b_total > 0.0, b_total, 1.0)
        b_rest /= b_total
        b_delta += b_rest
        b_dq = (b_dq - b_rest[:, None] * b_mean) / b_total[:, None]
        b_sums /= b_total
        tl.store(p_total + i_bh * NP + o_q, b_total / b_weight if MASK == 2 else b_total)
    if MASK != 2:
        tl.store(p_shift + i_bh * NP + o_q, b_shift)
    if SUMS:
        tl.store(p_sums + i_bh * NP + o_q, b_sums)
    tl.store(p_delta + i_bh * NP + o_q, b_delta)
    store_tile(p_dq + (i_b * N * H + i_h) * D, H * D, o_q, o_d, N, D, b_dq * scale)


@triton.jit
def _backward_kv_kernel(
    p_q,
    p_k,
    p_v,
    p_do,
    p_mask,
    p_key_mask,
    p_shift,
    p_total,
    p_delta,
    p_r,
    p_dk,
    p_dv,
    p_r_abar,
    H,
    GROUP: tl.constexpr,
    N,
    M,
    D: tl.constexpr,
    DV: tl.constexpr,
    scale_log2,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_mb,
    stride_mh,
    stride_mn,
    stride_mm,
    KEY_HEADS,
    scale,
    T,
    factor,
    MASK: tl.constexpr,
    KEY_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    BY_GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    GRADS: tl.constexpr,
    PRECISION_T: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """For one tile of keys in KEY_HEADS heads: with GRADS dK and dV, of one head then; r Abar of BLOCK_T rows of r (0: none)."""
    num_kv = tl.cdiv(M, BLOCK_KV)
    num_t = tl.cdiv(T, BLOCK_T) if BLOCK_T > 0 else 1
    i_block, i_bp, i_b, i_p, _ = block_and_head(num_kv * num_t, H // (GROUP * KEY_HEADS), 1)
    i_kv = i_block % num_kv
    o_kv = i_kv * BLOCK_KV + tl.arange(0, BLOCK_KV)
    o_t = (i_block // num_kv) * BLOCK_T + tl.arange(0, BLOCK_T if BLOCK_T > 0 else 1)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    NP = tl.cdiv(N, ROWS) * ROWS
    p_r += i_b * T * NP
    m_kv = o_kv < M
    if KEY_MASK:
        # keys are rows of the tiles below: those of padding are dropped at the end
        m_key = tl.load(p_key_mask + i_b * M + o_kv, mask=m_kv, other=0) != 0
    else:
        m_key = m_kv
    if GRADS:
        b_dk = tl.zeros([BLOCK_KV, BLOCK_D], dtype=tl.float32)
        b_dv = tl.zeros([BLOCK_KV, BLOCK_DV], dtype=tl.float32)
    if BLOCK_T == 1:
        b_r_abar = tl.zeros([BLOCK_KV], dtype=tl.float32)
    elif BLOCK_T > 1:
        b_r_abar = tl.zeros([BLOCK_KV, BLOCK_T], dtype=tl.float32)
    # causal: queries before `begin` see none of these keys, those from `full` on see all of them
    begin = (i_kv * BLOCK_KV) // BLOCK_Q * BLOCK_Q if CAUSAL else 0
    full = tl.minimum(N, tl.cdiv((i_kv + 1) * BLOCK_KV - 1, BLOCK_Q) * BLOCK_Q) if CAUSAL and MASK == 0 else N
    for i in range(KEY_HEADS):
        i_hk = i_p * KEY_HEADS + i
        b_k = load_rows(rows_at(p_k, i_b * stride_kb + i_hk * stride_kh, D), stride_kn, o_kv, o_d, M, D)  # [kv,D]
        if GRADS or BY_GRADIENT:
            b_v = load_rows(rows_at(p_v, i_b * stride_vb + i_hk * stride_vh, DV), stride_vn, o_kv, o_dv, M, DV)  # [kv,Dv]
        for PART in tl.static_range(0 if CAUSAL or MASK != 0 else 1, 1 if MASK != 0 else 2):
            first = full if CAUSAL and PART == 1 else begin
            num_q = tl.cdiv((full if PART == 0 else N) - first, BLOCK_Q)
            for j in range(GROUP * num_q):  # one loop over tiles and query heads of this key head: nested loops spill
                i_h = i_hk if GROUP == 1 else i_hk * GROUP + j // num_q
                i_bh = i_b * H + i_h
                o_q = first + (j if GROUP == 1 else j % num_q) * BLOCK_Q + tl.arange(0, BLOCK_Q)
                b_q = load_rows(rows_at(p_q, i_b * stride_qb + i_h * stride_qh, D), stride_qn, o_q, o_d, N, D)  # [q,D]
                b_s = dot(b_k, tl.trans(b_q), PRECISION) * scale_log2  # [kv,q]
                if MASK != 0:
                    b_s = mask_logits(
                        b_s,
                        p_mask + i_b * stride_mb + i_h * stride_mh,
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
                if CAUSAL and PART == 0:
                    b_s = tl.where(o_kv[:, None] <= o_q[None, :], b_s, float("-inf"))
                b_p = tl.exp2(b_s - tl.load(p_shift + i_bh * NP + o_q)[None, :])
                if EXACT:
                    b_p = tl.div_rn(b_p, tl.load(p_total + i_bh * NP + o_q)[None, :])
                if GRADS or BY_GRADIENT:
                    b_do = load_rows(rows_at(p_do, i_b * stride_gb + i_h * stride_gh, DV), stride_gn, o_q, o_dv, N, DV)  # [q,Dv]
                    b_dp = dot(b_v, tl.trans(b_do), PRECISION)
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
                    b_dv += dot(b_p.to(b_do.dtype), b_do, PRECISION)
                    b_ds = b_p * (b_dp - tl.load(p_delta + i_bh * NP + o_q)[None, :])
                    b_dk += dot(b_ds.to(b_q.dtype), b_q, PRECISION)
    if GRADS:
        Hk = H // GROUP
        store_tile(p_dk + (i_b * M * Hk + i_p) * D, Hk * D, o_kv, o_d, M, D, tl.where(m_key[:, None], b_dk * scale, 0.0))
        store_tile(p_dv + (i_b * M * Hk + i_p) * DV, Hk * DV, o_kv, o_dv, M, DV, tl.where(m_key[:, None], b_dv, 0.0))
    if BLOCK_T == 1:
        tl.store(p_r_abar + i_bp * M + o_kv, tl.where(m_key, b_r_abar * factor, 0.0), mask=m_kv)
    elif BLOCK_T > 1:
        offsets = (i_bp * T + o_t[None, :]) * M + o_kv[:, None]
        b_r_abar = tl.where(m_key[:, None], b_r_abar * factor, 0.0)
        tl.store(p_r_abar + offsets, b_r_abar, mask=m_kv[:, None] & (o_t < T)[None, :])


@triton.jit
def _mask_padding(
    b_s,
    p_mask,
    stride_mask_q,
    stride_mask_kv,
    p_key_mask,
    o_q,
    o_kv,
    N,
    M,
    MASK: tl.constexpr,
    KEY_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    PART: tl.constexpr,
):
    """Base-2 logits [q,kv] with masked pairs at -inf. Tiles of PART 0 lie within the map and below its diagonal."""
    if PART == 1:
        b_s = mask_logits(b_s, p_mask, stride_mask_q, stride_mask_kv, p_key_mask, o_q, o_kv, N, M, MASK, KEY_MASK, CAUSAL)
    elif KEY_MASK:
        b_s = tl.where((tl.load(p_key_mask + o_kv) != 0)[None, :], b_s, float("-inf"))
    return b_s
