"""attention_map in Triton: one (B, N, M) map for all heads, A or relu(A * dA), reduced over the heads in registers.

Shapes: query (B, H, N, D), key (B, Hk, M, D), value (B, Hk, M, Dv), grad_output (B, H, N, Dv), Hk a divisor of H; map (B, N, M)
float32.
Roofline: HBM for short sequences (each input once, the map once). For long ones two exponentials (MUFU) and two matrix products
per pair and head, three for the gradient rule.
Trick: the heads are the inner loop, so no map of one head exists. Padding and the causal mask are the same in all heads and are
applied once, to the reduced tile. Where a tile holds whole rows, which have at most 256 keys, one kernel does everything. So it
does where the caller has the log-sum-exp of the rows and there is no float mask. Otherwise a first kernel stores the maximum and
1/sum of each row. It does not store their logarithm, which would be rounded. A fully masked row has the maximum +inf, so that
exp2(s - max) is 0 without a test. Measured on an H100: docs/operators/attention_map.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlattn_fast.backends.inputs import AttentionMapBackwardInputs, AttentionMapInputs
from vlattn_fast.kernels._configurations import configuration
from vlattn_fast.kernels._device import on_device
from vlattn_fast.kernels._group_bias import FLOAT_MASK, GROUP_BIAS, sees_tile
from vlattn_fast.kernels._map_backward import MapGradient, config_of, describe, gradients, row_numbers, statistics, sums, taken
from vlattn_fast.kernels._scores import head_of, masked_logits, scores_of_tile, softcapped
from vlattn_fast.kernels._tiles import (
    CALLER_LSE,
    LOG2_E,
    ROW_MULTIPLE,
    Pairs,
    aligned,
    aligned_step,
    below_max,
    block_and_head,
    block_size,
    cdiv,
    edge_block,
    head_at,
    head_tile,
    heads_of,
    input_precision,
    keys_at,
    keys_of_queries,
    launched,
    mask_logits,
    mask_tile,
    masks_and_kind,
    masks_at,
    real_tokens,
    relu,
    row_products,
    row_shift,
    rows_at,
    steps_of,
    store_tile,
    tile_of,
)


class Constants(NamedTuple):
    """FOLDED: see `below_max`."""

    D: int
    BLOCK_D: int
    MASK: int
    KEY_MASK: bool
    CAUSAL: bool
    FOLDED: bool
    PRECISION: str
    DV: int = 0
    GRADIENT: bool = False
    REDUCTION: str = ""
    NORMALIZE: bool = False
    ONE_TILE: bool = False
    SOURCE: str = ""
    BLOCK_DV: int = 0
    BLOCK_Q: int = 0
    BLOCK_KV: int = 0
    BLOCK_EDGE: int = 0


@on_device
def forward(inputs: AttentionMapInputs) -> Tensor:
    """Abar (B, N, M) float32, of any core score: of one that the operator lacks, the mean of all heads.

    Probabilities are exp(logit - lse) where there is an lse (B, H, N), which may count keys that are not here. Under a float
    mask, rows whose lse `is_coarse` are normalised over the keys that are here.
    """
    attention, value, grad_output, lse = inputs.attention, inputs.value, inputs.grad_output, inputs.lse
    query, key, scale, is_causal = attention.query, attention.key, attention.scale, attention.is_causal
    batch, heads, num_q, size = query.shape
    num_kv = key.shape[2]
    abar = query.new_empty((batch, num_q, num_kv), dtype=torch.float32)
    if abar.numel() == 0:
        return abar
    if attention.score not in ("dot", "dot_softcap"):
        return _of_scores(inputs, abar)
    query, key = aligned(query), aligned(key)
    gradient = inputs.rule == "gradient"
    value = aligned(value) if gradient and value is not None else key
    grad_output = aligned(grad_output) if gradient and grad_output is not None else query
    size_v = value.shape[3] if gradient else 0
    masks, kind = masks_and_kind(attention, query)
    constants = Constants(
        D=size,
        BLOCK_D=block_size(size),
        MASK=kind,
        KEY_MASK=attention.key_mask is not None,
        CAUSAL=is_causal,
        FOLDED=scale <= 0.0 or kind >= FLOAT_MASK.value or attention.score != "dot",
        PRECISION=input_precision(),
    )
    x = heads_of(query), heads_of(key), masks, heads, heads // key.shape[1], num_q, num_kv, scale * LOG2_E, None
    call = {"x": x, "parameter": None if attention.score == "dot" else attention.parameter, "C": constants}
    facts = {"rule": inputs.rule, "dtype": query.dtype, "N": num_q, "M": num_kv}
    masked = attention.attn_mask is not None
    config = configuration("attention_map", "map", **facts, size=max(size, size_v), masked=masked)
    one_tile, float_mask = num_kv <= config["BLOCK_KV"], kind >= FLOAT_MASK.value
    if lse is None:
        rows = "tile" if one_tile else "statistics"
    else:  # float32 maps and float masks would show the rounding of the lse
        rows = "statistics" if float_mask or query.dtype == torch.float32 else "lse"
    row_max = row_inverse = abar  # placeholders where the kernel does not read them
    if rows == "statistics" and (lse is None or float_mask):
        row_max, row_inverse = (query.new_empty((batch, heads, num_q), dtype=torch.float32) for _ in range(2))
        rows_config = configuration("attention_map", "rows", **facts, size=size, masked=masked)
        _rows_kernel[(cdiv(num_q, rows_config["BLOCK_Q"]) * batch * heads,)](
            **launched(call, rows_config, BLOCK_EDGE=edge_block(num_kv, rows_config["BLOCK_KV"], is_causal)),
            p_max=row_max,
            p_inverse=row_inverse,
        )
    if rows == "statistics" and lse is not None:
        known = (row_max, row_inverse) if float_mask else None
        row_max, row_inverse = _rows_by_lse(lse, 1.0 / LOG2_E if constants.FOLDED else scale, known)
    lse = lse.to(torch.float32).contiguous() if rows == "lse" and lse is not None else abar
    grid = (cdiv(num_q, config["BLOCK_Q"]) * cdiv(num_kv, config["BLOCK_KV"]) * batch,)
    _map_kernel[grid](
        **launched(
            call,
            config,
            DV=size_v,
            GRADIENT=gradient,
            REDUCTION=inputs.head_reduction,
            NORMALIZE=inputs.row_normalize,
            ONE_TILE=one_tile,
            SOURCE=rows,
            BLOCK_DV=block_size(size_v),
        ),
        v=heads_of(value),
        grad=heads_of(grad_output),
        p_lse=lse,
        p_max=row_max,
        p_inverse=row_inverse,
        p_map=abar,
    )
    if inputs.row_normalize and not one_tile:
        total = abar.sum(-1, keepdim=True)
        abar.div_(torch.where(total == 0, 1.0, total))
    return abar


def _of_scores(inputs: AttentionMapInputs, abar: Tensor) -> Tensor:
    """Writes the mean of the heads' maps to abar, for scores that the operator does not have."""
    assert inputs.head_reduction == "mean" and not inputs.row_normalize, "core_map asks for no other"
    launch = describe(inputs.attention, inputs.value, inputs.rule, inputs.grad_output)
    config = config_of("map_of_scores", launch)
    batch, num_q, num_kv = abar.shape
    _map_of_scores_kernel[(cdiv(num_q, config["BLOCK_Q"]) * cdiv(num_kv, config["BLOCK_KV"]) * batch,)](
        **launched(launch.call, config, BY_GRADIENT=launch.by_gradient),
        p_u=launch.vector,
        stats=statistics(launch, inputs.lse),
        p_map=abar,
    )
    return abar


@on_device
def backward(inputs: AttentionMapBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, grad_output, lse and row_bias from that of Abar (B, N, M); None for those without one.

    The map itself takes the parts that all heads have in common: the division of a row by its sum, and for "max" and "min" how
    many heads share a gradient.
    """
    launch = describe(inputs.attention, inputs.value, inputs.rule, inputs.grad_output)
    rows = statistics(launch, inputs.lse)
    grad, bits = inputs.grad.to(torch.float32), None
    abar, count = grad, torch.full_like(grad[:, :1, :1], inputs.attention.query.shape[1])
    if inputs.head_reduction != "mean":
        bits, count, abar = taken(launch, rows, inputs.head_reduction)
    elif inputs.row_normalize:
        fields = {name: getattr(inputs, name) for name in AttentionMapInputs._fields}
        abar = forward(AttentionMapInputs(**fields)._replace(row_normalize=False))
    if inputs.row_normalize:
        total = abar.sum(-1, keepdim=True)
        total = torch.where(total < torch.finfo(torch.float32).tiny, 1.0, total)
        grad = (grad - (grad * abar).sum(-1, keepdim=True) / total) / total
    w = MapGradient(map=(grad / count).contiguous(), taken=bits)
    _, delta = sums(launch, rows, w, deltas=True)
    return gradients(launch, rows, w, delta, inputs.lse if inputs.need_lse else None)


def _rows_by_lse(lse: Tensor, unit: float, known: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """The maximum of each row, in the unit that logits have in the tile, and the factor of exp(logit - maximum), from which the
    map computes probabilities exp(logit - lse).

    The maximum is `known` from the keys, with the factor of rows whose lse `is_coarse`. Otherwise it is the lse in float32, and
    the factor holds what was rounded away: logits and maximum cancel, and float32 maps would show it.
    """
    wide = lse.double()
    row_max = (wide / unit).float() if known is None else known[0]
    inverse = torch.exp(row_max.double() * unit - wide).float()
    if known is not None:
        inverse = torch.where(wide.abs() >= CALLER_LSE.value, known[1], inverse)
    empty = wide.isinf() | row_max.isinf()
    return torch.where(empty, torch.inf, row_max), torch.where(empty, 0.0, inverse)


@triton.jit
def _rows_kernel(x, parameter, p_max, p_inverse, C: tl.constexpr):
    """The numbers that make probabilities of logits, for a tile of queries i of one head, by an online softmax over the keys j.

    x_ij      = scale_log2 q_i k_j, or scale_log2 tanh(parameter q_i k_j), under the masks
    max_i     = max_j x_ij, +inf in a fully masked row
    inverse_i = 1 / sum_j 2^(x_ij - max_i)
    Unless FOLDED, x and max lack the factor scale_log2, which `below_max` multiplies in. The logarithm of the sum is not stored:
    it would be rounded.
    """
    q, k, masks, H, GROUP_K, N, M, scale_log2, _behind = x
    i_q, i_bh, i_b, i_h, i_hk = block_and_head(tl.cdiv(N, C.BLOCK_Q), H, GROUP_K)
    p_k = head_at(k, i_b, i_hk, C.D)
    masks = masks_at(masks, i_b, i_h, M)
    o_q = i_q * C.BLOCK_Q + tl.arange(0, C.BLOCK_Q)
    t_q = head_tile(q, i_b, i_h, o_q, N, C.D, C.BLOCK_D)  # [q,D]
    b_max = tl.full([C.BLOCK_Q], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([C.BLOCK_Q], dtype=tl.float32)
    keys = keys_of_queries(i_q, o_q, masks, N, M, C)
    for EDGE in tl.static_range(2):
        steps = steps_of(keys, EDGE, C.BLOCK_KV, C)
        for step in range(steps.begin, steps.end, steps.size):
            start, o_kv = keys_at(step, steps, EDGE, C)
            t_k = tile_of(p_k, k.stride_n, o_kv, M if EDGE else None, C.D, C.BLOCK_D)
            b_s = row_products(t_q, t_k, C.D, C.PRECISION)  # [q,kv]
            if parameter is not None:
                b_s, _ = softcapped(b_s, parameter, C)
            if C.FOLDED:  # a mask is added to logits, and not to bare products
                b_s *= scale_log2
            b_s = mask_tile(b_s, Pairs(masks, start, o_q, o_kv, N, M), C, EDGE)
            b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
            b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)  # -inf - -inf is NaN in a row that has no key yet
            b_alpha = tl.exp2(b_max - b_safe if C.FOLDED else (b_max - b_safe) * scale_log2)
            b_sum = b_sum * b_alpha + tl.sum(tl.exp2(below_max(b_s, b_safe, scale_log2, C.FOLDED)), axis=1)
            b_max = b_new
    empty = b_sum == 0.0
    o_row = i_bh * N + o_q
    tl.store(p_max + o_row, tl.where(empty, float("inf"), b_max), mask=o_q < N)
    tl.store(p_inverse + o_row, 1.0 / tl.where(empty, 1.0, b_sum), mask=o_q < N)


@triton.jit
def _seeing_heads(masks, start, o_q, heads, N, M, BLOCK: tl.constexpr, MASK: tl.constexpr):
    """The heads in which queries o_q may see something of the tile of BLOCK keys that begins at `start`: the first one, and the
    end of them. heads: how many there are."""
    end_h = tl.full([], 0, tl.int32)
    first_h = end_h + heads
    for h in range(0, heads):
        if sees_tile(masks_at(masks, 0, tl.full([], 0, tl.int64) + h, 0), start, o_q, N, M, BLOCK, MASK):
            first_h, end_h = tl.minimum(first_h, h), h + 1
    return first_h, end_h


@triton.jit
def _map_kernel(x, parameter, v, grad, p_lse, p_max, p_inverse, p_map, C: tl.constexpr):
    """One tile of pairs ij of the map, with the heads h in the loop.

    A_hij  = 2^(x_hij - max_hi) inverse_hi, or 2^(x_hij - log2(e) lse_hi), with x, max and inverse as in `_rows_kernel`
    E_hij  = A_hij, or with GRADIENT relu(A_hij dO_hi v_hj)
    map_ij = the mean, maximum or minimum of E_hij over h; with NORMALIZE over its sum over j
    SOURCE: whence max and inverse come. "tile": the tile, which holds whole rows. "statistics": memory. "lse": there is an lse.
    Neighbouring programs share query rows, and those of one batch share all keys, so both stay in the cache.
    """
    q, k, masks, H, GROUP_K, N, M, scale_log2, _behind = x
    num_q, num_kv = tl.cdiv(N, C.BLOCK_Q), tl.cdiv(M, C.BLOCK_KV)
    i = tl.program_id(0).to(tl.int64)
    i_b = i // (num_q * num_kv)
    i_q = ((i // num_kv) % num_q).to(tl.int32)
    i_kv = (i % num_kv).to(tl.int32)
    # a head's rows begin `step` further than those of the head before
    p_q, step_q = rows_at(q.p, i_b * q.stride_b, C.D), aligned_step(q.stride_h, C.D)
    p_k, step_k = rows_at(k.p, i_b * k.stride_b, C.D), aligned_step(k.stride_h, C.D)
    p_v, step_v = rows_at(v.p, i_b * v.stride_b, C.DV), aligned_step(v.stride_h, C.DV)
    p_grad, step_g = rows_at(grad.p, i_b * grad.stride_b, C.DV), aligned_step(grad.stride_h, C.DV)
    masks = masks_at(masks, i_b, 0, M)
    o_q = i_q * C.BLOCK_Q + tl.arange(0, C.BLOCK_Q)
    o_kv = i_kv * C.BLOCK_KV + tl.arange(0, C.BLOCK_KV)
    KEYS: tl.constexpr = C.SOURCE == "tile"  # else masks that are the same in all heads are applied after the loop
    first_h, end_h = 0, H
    if C.CAUSAL:  # all is 0 above the diagonal
        end_h = tl.where(i_kv * C.BLOCK_KV < (i_q + 1) * C.BLOCK_Q, H, 0)
    if C.MASK >= GROUP_BIAS:
        first_h, end_h = _seeing_heads(masks, i_kv * C.BLOCK_KV, o_q, end_h, N, M, C.BLOCK_KV, C.MASK)
    # a maximum may begin with 0, since no map has less, and so may the minimum where a head is left out
    least = tl.where(first_h + H - end_h > 0, 0.0, float("inf")) if C.REDUCTION == "min" else 0.0
    b_map = tl.full([C.BLOCK_Q, C.BLOCK_KV], least, dtype=tl.float32)
    for h in range(first_h, end_h):
        i_h = tl.full([], 0, dtype=tl.int64) + h  # 64 bits, as offsets are products of it
        i_hk = i_h // GROUP_K
        t_q = tile_of(p_q + i_h * step_q, q.stride_n, o_q, N, C.D, C.BLOCK_D)  # [q,D]
        t_k = tile_of(p_k + i_hk * step_k, k.stride_n, o_kv, M, C.D, C.BLOCK_D)
        b_s = row_products(t_q, t_k, C.D, C.PRECISION)  # [q,kv]
        if parameter is not None:
            b_s, _ = softcapped(b_s, parameter, C)
        if C.FOLDED or C.SOURCE == "lse":
            b_s *= scale_log2
        if C.MASK != 0 or KEYS:  # `masks` is at the sample already
            pairs = Pairs(masks_at(masks, 0, i_h, 0), i_kv * C.BLOCK_KV, o_q, o_kv, N, M)
            b_s = mask_logits(b_s, pairs, C.MASK, C.KEY_MASK and KEYS, C.CAUSAL and KEYS)
        b_p, b_inverse = _powers(b_s, (p_lse, p_max, p_inverse), (i_b * H + i_h) * N, o_q, N, scale_log2, C)
        if C.GRADIENT:
            t_do = tile_of(p_grad + i_h * step_g, grad.stride_n, o_q, N, C.DV, C.BLOCK_DV)  # [q,Dv]
            t_v = tile_of(p_v + i_hk * step_v, v.stride_n, o_kv, M, C.DV, C.BLOCK_DV)
            b_p = relu(b_p * row_products(t_do, t_v, C.DV, C.PRECISION))
        b_head = b_p if C.SOURCE == "lse" else b_p * b_inverse[:, None]  # after relu: a row has one factor, which is positive
        if C.REDUCTION == "mean":
            b_map += b_head
        elif C.REDUCTION == "max":
            b_map = tl.maximum(b_map, b_head, propagate_nan=tl.PropagateNan.ALL)
        else:
            b_map = tl.minimum(b_map, b_head, propagate_nan=tl.PropagateNan.ALL)
    # once for all heads, and over what NaN or infinity in padding has made of the map
    if C.KEY_MASK:
        b_map = tl.where((tl.load(masks.p_keys + o_kv, mask=o_kv < M, other=0) != 0)[None, :], b_map, 0.0)
    if C.CAUSAL:
        b_map = tl.where(o_kv[None, :] <= o_q[:, None], b_map, 0.0)
    if C.NORMALIZE and C.ONE_TILE:
        b_map = tl.where((o_kv < M)[None, :], b_map, 0.0)  # an infinite gradient times the zeros beyond M is NaN
        b_total = tl.sum(b_map, axis=1)
        b_map /= tl.where(b_total == 0.0, 1.0, b_total)[:, None]
    elif C.REDUCTION == "mean" and not C.NORMALIZE:  # a row over its sum has no H
        b_map /= H
    store_tile(p_map + i_b * N * M, M, o_q, o_kv, N, M, b_map)


@triton.jit
def _map_of_scores_kernel(x, p_u, stats, p_map, C: tl.constexpr):
    """One tile of pairs ij of the map of any score, with the heads h in the loop, as in `_map_kernel`.

    P_hij  = 2^(x_hij - shift_hi) / total_hi, of `RowStats`        dP_hij = dO_hi v_hj
    map_ij = the mean over h of P_hij, or BY_GRADIENT of relu(P_hij dP_hij)
    """
    H, N, M = x.H, x.N, x.M
    num_q, num_kv = tl.cdiv(N, C.BLOCK_Q), tl.cdiv(M, C.BLOCK_KV)
    i = tl.program_id(0).to(tl.int64)
    i_b = i // (num_q * num_kv)
    i_q, i_kv = ((i // num_kv) % num_q).to(tl.int32), (i % num_kv).to(tl.int32)
    NP = tl.cdiv(N, ROW_MULTIPLE) * ROW_MULTIPLE
    o_q = i_q * C.BLOCK_Q + tl.arange(0, C.BLOCK_Q)
    o_kv = i_kv * C.BLOCK_KV + tl.arange(0, C.BLOCK_KV)
    b_map = tl.zeros([C.BLOCK_Q, C.BLOCK_KV], dtype=tl.float32)
    end_h = H
    if C.CAUSAL:  # all is 0 above the diagonal
        end_h = tl.where(i_kv * C.BLOCK_KV < (i_q + 1) * C.BLOCK_Q, H, 0)
    for h in range(0, end_h):
        i_h = tl.full([], 0, dtype=tl.int64) + h  # 64 bits, as offsets are products of it
        i_bh = i_b * H + i_h
        head = head_of(x, i_bh, i_b, i_h, i_h // C.GROUP_K, C)
        _, _, p_v, _, _, masks = head
        p_head = p_u + i_h * C.A if C.UNITS else p_u
        b_s = scores_of_tile(x, head, p_head, o_q, o_kv, C)
        b_logit = masked_logits(b_s * x.scale_log2, Pairs(masks, i_kv * C.BLOCK_KV, o_q, o_kv, N, M), True, C)
        b_shift, b_inverse = row_numbers(stats, i_bh * NP + o_q)
        b_p = tl.exp2(b_logit - b_shift[:, None]) * b_inverse[:, None]
        if C.BY_GRADIENT:
            t_do = head_tile(x.grad, i_b, i_h, o_q, N, C.DV, C.BLOCK_DV)
            t_v = tile_of(p_v, x.v.stride_n, o_kv, M, C.DV, C.BLOCK_DV)
            b_p = relu(b_p * row_products(t_do, t_v, C.DV, C.PRECISION))
        b_map += b_p
    # over what NaN or infinity in padding has made of the map
    b_map = tl.where(real_tokens(x.masks.p_keys + i_b * M, o_kv, M, C.KEY_MASK)[None, :], b_map / H, 0.0)
    store_tile(p_map + i_b * N * M, M, o_q, o_kv, N, M, b_map)


@triton.jit
def _powers(b_s, p_rows, row, o_q, N, scale_log2, C: tl.constexpr):
    """2^(logit - max) [q,kv], and the factor of each row [q] that makes probabilities of it, 1 where SOURCE is "lse".

    p_rows: lse, max and inverse of rows; row: the head's first. A fully masked row has max = +inf, so that its powers are 0.
    """
    p_lse, p_max, p_inverse = p_rows
    o_row = row + o_q
    if C.SOURCE == "lse":
        b_p = tl.exp2(b_s - row_shift(p_lse + row, o_q, N)[:, None])
        b_inverse = tl.full(o_q.shape, 1.0, dtype=tl.float32)
    elif C.SOURCE == "tile":
        b_max = tl.max(b_s, axis=1)
        b_max = tl.where(b_max == float("-inf"), float("inf"), b_max)  # so that 2^(-inf - max) is 0, and not NaN
        b_p = tl.exp2(below_max(b_s, b_max, scale_log2, C.FOLDED))
        b_sum = tl.sum(b_p, axis=1)
        b_inverse = 1.0 / tl.where(b_sum == 0.0, 1.0, b_sum)
    else:
        b_max = tl.load(p_max + o_row, mask=o_q < N, other=float("inf"))
        b_p = tl.exp2(below_max(b_s, b_max, scale_log2, C.FOLDED))
        b_inverse = tl.load(p_inverse + o_row, mask=o_q < N, other=0.0)
    return b_p, b_inverse
