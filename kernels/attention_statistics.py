"""attention_statistics in Triton: mass by key group, entropy, maximum, argmax and received attention; forward and backward.

Shapes: query (B, H, N, D), key (B, Hk, M, D), Hk a divisor of H; mass (B, H, N, G), entropy, maximum, argmax (B, H, N), received
(B, H, M).
Roofline: HBM for short sequences. For long ones a matrix product and an exponential per pair in each of two passes, and about a
dozen instructions per pair for maximum, entropy and argmax (issue-bound at head dimension 64). Backward: four matrix products and
two exponentials per pair, with a gradient of `received` five and three.
Trick: one pass over the keys gives all statistics of a row. The entropy is ln l - sum e x / l with x = logit - maximum and l =
sum e, two terms of one sign. The mass of up to four groups is a sum for each: a multiply-add per pair. That of more groups is a
matrix product with 0s and 1s, with the weights in two halves so that 16-bit products keep 24 bits of them. `received` is
key-major, without atomics, and has the same bits each time. The keys of few queries are split into parts (`keys_of_a_part`):
`_rows_kernel` gives the statistics of each, which `_join_kernel` joins. Measured on an H100: docs/operators.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq, is_cuda

from vlattn_fast.backends.inputs import Attention, AttentionStatisticsBackwardInputs, AttentionStatisticsInputs
from vlattn_fast.kernels import _statistics_backward
from vlattn_fast.kernels._configurations import configuration
from vlattn_fast.kernels._device import on_device
from vlattn_fast.kernels._group_bias import FLOAT_MASK, seeing_queries, seen_keys
from vlattn_fast.kernels._key_groups import as_members, dot_members, few, groups_of, member
from vlattn_fast.kernels._statistics_backward import scores_of
from vlattn_fast.kernels._tiles import (
    LOG2_E,
    Heads,
    MaskPointers,
    Pairs,
    Range,
    aligned,
    below_max,
    block_and_head,
    block_size,
    cdiv,
    edge_block,
    extended,
    head_at,
    head_tile,
    heads_of,
    input_precision,
    key_range,
    keys_at,
    keys_of_a_part,
    launched,
    mask_logits,
    mask_tile,
    masks_and_kind,
    masks_at,
    queries_of_keys,
    row_products,
    steps_of,
    store_tile,
    tile_of,
    within,
)


class Constants(NamedTuple):
    """D: features. WEIGHT: rows are weighted. SPLIT: see `dot_members`. FOLDED: see `below_max`. MASS to RECEIVED: gradients of
    the backward pass. FEW: see `few`."""

    D: int
    BLOCK_D: int
    MASK: int
    KEY_MASK: bool
    CAUSAL: bool
    WEIGHT: bool
    SPLIT: bool
    FOLDED: bool
    PRECISION: str
    MASS: bool = False
    ENTROPY: bool = False
    MAXIMUM: bool = False
    RECEIVED: bool = False
    FEW: int = 0
    ARGMAX: bool = False
    MANY: bool = False
    BLOCK_G: int = 0
    BLOCK_Q: int = 0
    BLOCK_KV: int = 0
    BLOCK_EDGE: int = 0


class Rows(NamedTuple):
    """Statistics of rows: mass (B, H, N, G), the others (B, H, N). For parts of the keys the shapes begin with (B, H, parts)."""

    mass: Tensor
    entropy: Tensor
    maximum: Tensor
    argmax: Tensor
    row_max: Tensor
    mean_x: Tensor


class StatisticsCall(NamedTuple):
    """All kernels of attention_statistics take it, as x. groups: a tensor and its stride of samples. weight: (B, H, N).
    parameter: see `softcapped`; None without a softcap."""

    q: Heads
    k: Heads
    groups: tuple[Tensor, int]
    weight: Tensor
    masks: MaskPointers
    H: int
    GROUP_K: int
    N: int
    M: int
    G: int
    scale_log2: float
    parameter: float | None


@on_device
def forward(inputs: AttentionStatisticsInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """mass (B, H, N, G), entropy, maximum, argmax (B, H, N), received (B, H, M), max_logit (B, H, N) and, for `backward`, row_max
    and mean_x (B, H, N): each row's largest logit, without the scale unless FOLDED, and the mean of logit - largest in base 2.
    Garbage for what `statistics` does not name."""
    attention, num_groups = inputs.attention, inputs.num_groups
    query, key, is_causal = attention.query, attention.key, attention.is_causal
    statistics = inputs.statistics.split()
    rows = query.shape[:3]
    whole = _empty_rows(query, rows, num_groups)
    mass, entropy, maximum, argmax, row_max, mean_x = whole
    received = query.new_empty((*rows[:2], key.shape[2] if "received" in statistics else 0), dtype=torch.float32)
    call = _arguments(inputs)
    facts = _facts(attention, num_groups)
    if maximum.numel() > 0:
        config = configuration("attention_statistics", "rows", **facts)
        # groups beyond a block are computed by other programs, which compute the row again
        block_g = min(32 if query.shape[3] > 128 else 64, block_size(num_groups))
        blocks = max(1, cdiv(num_groups, block_g)) * rows[0] * rows[1]
        keys = 0 if is_causal else keys_of_a_part(blocks, rows[2], key.shape[2], config)
        parts = cdiv(key.shape[2], keys) if keys > 0 else 1
        of_groups = {"FEW": few(num_groups), "MANY": few(num_groups) < num_groups, "BLOCK_G": block_g}
        asked = {"ENTROPY": "entropy" in statistics, "ARGMAX": "argmax" in statistics}
        each_part = whole if keys == 0 else _empty_rows(query, (*rows[:2], parts, rows[2]), num_groups)
        _rows_kernel[(cdiv(rows[2], config["BLOCK_Q"]) * parts * blocks,)](
            **launched(call, config, **asked, **of_groups, BLOCK_EDGE=edge_block(key.shape[2], config["BLOCK_KV"], is_causal)),
            rows=each_part,
            part=None if keys == 0 else keys,
        )
        if keys > 0:
            _join_kernel[(maximum.numel(),)](
                parts=each_part,
                rows=whole,
                number=parts,
                N=rows[2],
                G=num_groups,
                scale_log2=1.0 if call["C"].FOLDED else call["x"].scale_log2,
                **asked,
                BLOCK_PARTS=block_size(parts),
                BLOCK_G=block_g,
                num_warps=1,
                enable_fp_fusion=True,
            )
    if received.numel() > 0:
        config = configuration("attention_statistics", "received", **facts)
        grid = (cdiv(key.shape[2], config["BLOCK_KV"]) * rows[0] * rows[1],)
        edge = edge_block(rows[2], config["BLOCK_Q"], is_causal)
        _received_kernel[grid](
            **launched(call, config, BLOCK_EDGE=edge), p_maximum=maximum, p_row_max=row_max, p_received=received
        )
    max_logit = query.new_empty(0, dtype=torch.float32)
    if "max_logit" in statistics:
        factor = math.log(2.0) * (1.0 if call["C"].FOLDED else call["x"].scale_log2)
        max_logit = torch.where(maximum == 0.0, -torch.inf, row_max * factor)
        max_logit = torch.where(maximum.isnan() & (max_logit != torch.inf), torch.nan, max_logit)
    return mass, entropy, maximum, argmax, received, max_logit, row_max, mean_x


@on_device
def backward(inputs: AttentionStatisticsBackwardInputs) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, row_weight and row_bias; mass, maximum, argmax, row_max and mean_x as `forward` gave them."""
    attention, num_groups, grad_mass = inputs.attention, inputs.num_groups, inputs.grad_mass
    mass, maximum, argmax = inputs.mass, inputs.maximum, inputs.argmax
    # which the operator saves for these kernels
    assert mass is not None and maximum is not None and inputs.row_max is not None and inputs.mean_x is not None
    row_max, mean_x = inputs.row_max.contiguous(), inputs.mean_x.contiguous()
    if attention.key_groups is None or num_groups == 0:
        grad_mass = None
    grads = {"mass": grad_mass, "entropy": inputs.grad_entropy, "maximum": inputs.grad_maximum, "received": inputs.grad_received}
    facts = {**_facts(attention, num_groups), "product": grad_mass is not None and few(num_groups) == 0}
    call, query = _arguments(inputs), attention.query
    call |= {
        "p_grads": tuple(query if x is None else x.contiguous() for x in grads.values()),
        "p_rows": (query if argmax is None else argmax.contiguous(), row_max, maximum.contiguous(), torch.empty_like(row_max)),
        "scale": attention.scale,
        "C": call["C"]._replace(**{name.upper(): x is not None for name, x in grads.items()}, FEW=few(num_groups)),
    }
    grad_q, grad_weight, grad_bias = _statistics_backward.queries(call, facts, mass.contiguous(), mean_x, attention.row_bias)
    grad_k = _statistics_backward.keys(call, facts)
    if inputs.row_weight is None:
        return grad_q, grad_k, None, grad_bias
    return grad_q, grad_k, torch.zeros_like(grad_weight) if inputs.grad_received is None else grad_weight, grad_bias


def _empty_rows(query: Tensor, shape: tuple[int, ...], num_groups: int) -> Rows:
    entropy, maximum, row_max, mean_x = (query.new_empty(shape, dtype=torch.float32) for _ in range(4))
    argmax, mass = query.new_empty(shape, dtype=torch.int64), query.new_empty((*shape, num_groups), dtype=torch.float32)
    return Rows(mass, entropy, maximum, argmax, row_max, mean_x)


def _arguments(inputs: AttentionStatisticsInputs | AttentionStatisticsBackwardInputs) -> dict[str, Any]:
    """The named arguments that all kernels here share. The query stands in for tensors that are absent."""
    attention, num_groups, row_weight = inputs.attention, inputs.num_groups, inputs.row_weight
    key_groups, scale, has_dot = attention.key_groups, attention.scale, attention.score == "dot"
    query, key = aligned(attention.query), aligned(attention.key)
    masks, kind = masks_and_kind(attention, query)
    groups = query if key_groups is None else aligned(key_groups)
    if few(num_groups) > 0:
        groups = as_members(groups, num_groups)
    x = StatisticsCall(
        q=heads_of(query),
        k=heads_of(key),
        groups=(groups, groups.stride(0)),
        weight=query if row_weight is None else row_weight.contiguous(),
        masks=masks,
        H=query.shape[1],
        GROUP_K=query.shape[1] // max(1, key.shape[1]),
        N=query.shape[2],
        M=key.shape[2],
        G=num_groups,
        scale_log2=scale * LOG2_E,
        parameter=None if has_dot else attention.parameter,
    )
    constants = Constants(
        D=query.shape[3],
        BLOCK_D=block_size(query.shape[3]),
        MASK=kind,
        KEY_MASK=attention.key_mask is not None,
        CAUSAL=attention.is_causal,
        WEIGHT=row_weight is not None,
        SPLIT=query.dtype != torch.float32,
        FOLDED=scale <= 0.0 or kind >= FLOAT_MASK.value or not has_dot,
        PRECISION=input_precision(),
    )
    return {"x": x, "C": constants}


def _facts(x: Attention, num_groups: int) -> dict[str, Any]:
    """Returns the metadata of a launch that choose its configuration."""
    (_, _, num_q, size), num_kv, masked = x.query.shape, x.key.shape[2], x.attn_mask is not None
    return {"dtype": x.query.dtype, "N": num_q, "M": num_kv, "size": size, "groups": num_groups, "masked": masked}


@triton.constexpr_function
def _width():
    """A thread's registers hold every WIDTH-th key of its rows, as matrix units lay them out: eight keys to four threads, and
    before sm_90 another eight to another warp. Were it less, sums would go from thread to thread; were it more, there would be
    more of them."""
    return 16 if is_cuda() and not cuda_capability_geq(9) else 8


@triton.jit
def _rows_kernel(x, rows, part, C: tl.constexpr):
    """The statistics of a tile of queries i of one head, by one pass over its keys j, and the largest logit of each row.

    x_ij  = the base-2 logit - max_i, e_ij = 2^x_ij       max_i      = the largest logit, +inf in a fully masked row
    sum_i = sum_j e_ij                                    maximum_i  = 1 / sum_i, argmax_i = the first j with x_ij = 0
    log_i = sum_j e_ij x_ij                               entropy_i  = ln 2 (log2 sum_i - log_i / sum_i)
    mass_ig = sum_j e_ij [j in group g] / sum_i, for all of FEW groups or for MANY: BLOCK_G of them
    When a tile changes max_i, with change = old - new max and alpha = 2^change, the earlier sums become
    sum_i alpha, (log_i + sum_i change) alpha, mass_ig alpha.
    part: how many keys it has, whose statistics these are; None: all. There is one tile of queries then.
    """
    q, k, groups, weight, masks, H, GROUP_K, N, M, G, scale_log2, parameter = x
    blocks_g = tl.maximum(1, tl.cdiv(G, C.BLOCK_G))
    blocks = tl.cdiv(N, C.BLOCK_Q) if part is None else tl.cdiv(M, part)
    i, i_bh, i_b, i_h, i_hk = block_and_head(blocks * blocks_g, H, GROUP_K)
    i_q, i_g = i // blocks_g, i % blocks_g  # neighbours have the same rows, which stay in the cache
    i_rows, first_key = i_bh, 0
    if part is not None:
        i_rows, first_key, i_q = i_bh * blocks + i_q, i_q * part, i_q * 0
    p_k = head_at(k, i_b, i_hk, C.D)
    masks = masks_at(masks, i_b, i_h, M)
    p_groups = groups[0] + i_b * groups[1]
    o_q = i_q * C.BLOCK_Q + tl.arange(0, C.BLOCK_Q)
    o_g = i_g * C.BLOCK_G + tl.arange(0, C.BLOCK_G)
    t_q = head_tile(q, i_b, i_h, o_q, N, C.D, C.BLOCK_D)  # [q,D]
    # WIDTH numbers a row, of every WIDTH-th key each: a thread has some of them, and threads exchange them only after the loop
    WIDTH: tl.constexpr = _width()
    b_best = tl.full([C.BLOCK_Q, WIDTH], float("-inf"), dtype=tl.float32)
    b_first = tl.full([C.BLOCK_Q, WIDTH], -1, dtype=tl.int32)
    b_sum = tl.zeros([C.BLOCK_Q, WIDTH], dtype=tl.float32)
    b_log = b_sum
    b_few = _zeros(C.BLOCK_Q, WIDTH, C.FEW)
    b_mass = tl.zeros([C.BLOCK_Q, C.BLOCK_G], dtype=tl.float32)
    b_max = tl.full([C.BLOCK_Q], float("-inf"), dtype=tl.float32)
    whole, end = key_range(i_q, M, False, C.CAUSAL, C.BLOCK_Q, C.BLOCK_KV)
    if part is not None:
        end = tl.minimum(end, first_key + part)
        whole = tl.minimum(whole, end)
    keys = Range(first_key, whole, whole, end, seen_keys(masks, o_q, N, M, C.MASK))
    for EDGE in tl.static_range(2):
        steps = steps_of(keys, EDGE, C.BLOCK_KV, C)
        for step in range(steps.begin, steps.end, steps.size):
            start, o_kv = keys_at(step, steps, EDGE, C)
            t_k = tile_of(p_k, k.stride_n, o_kv, M if EDGE else None, C.D, C.BLOCK_D)
            b_s = row_products(t_q, t_k, C.D, C.PRECISION)  # [q,kv]
            b_s, _ = scores_of(b_s, parameter, scale_log2, C)
            b_s = mask_tile(b_s, Pairs(masks, start, o_q, o_kv, N, M), C, EDGE)
            b_best, b_first = _best(b_s, b_best, b_first, start, WIDTH, C.ARGMAX)
            b_new = tl.max(b_best, axis=1)
            b_x, b_change = _below_new_max(b_s, b_max, b_new, scale_log2, C.FOLDED, C.ENTROPY)
            b_max = b_new
            b_e, b_alpha = tl.exp2(b_x), tl.exp2(b_change)[:, None]
            b_sum_e, b_sum_log, b_sum_few = _sums(b_e, b_x, p_groups, start, M, WIDTH, C.ENTROPY, C.FEW)
            if C.ENTROPY:  # before sum_i changes: e x becomes e alpha (x + change)
                b_log = (b_log + b_sum * b_change[:, None]) * b_alpha + b_sum_log
            b_sum = b_sum * b_alpha + b_sum_e
            b_few = _rescaled(b_few, b_alpha, b_sum_few)
            if C.MANY:
                b_member = groups_of(p_groups, o_kv, M, G)[:, None] == o_g[None, :]  # [kv,G]
                b_mass = b_mass * b_alpha + dot_members(b_e, b_member, tl.float16, C.SPLIT, C.PRECISION)
    b_sum, b_log = tl.sum(b_sum, axis=1), tl.sum(b_log, axis=1)
    b_empty = b_sum == 0.0
    b_total = tl.where(b_empty, 1.0, b_sum)
    b_inverse = 1.0 / b_total
    o_row = i_rows * N + o_q
    if i_g == 0:  # programs that differ in their groups alone have the same rows: one stores them
        m_row = o_q < N
        if C.ENTROPY:
            b_mean_x = b_log * b_inverse
            b_entropy = 0.6931471805599453 * (tl.log2(b_total) - b_mean_x)
            tl.store(rows.entropy + o_row, tl.where(b_empty, 0.0, b_entropy), mask=m_row)
            tl.store(rows.mean_x + o_row, b_mean_x, mask=m_row)
        if C.ARGMAX:  # the largest of every WIDTH-th key may stand several times in a row: the first of them counts
            b_argmax = tl.where(b_best == b_max[:, None], b_first + tl.arange(0, WIDTH)[None, :], 2147483647)
            b_argmax = tl.where(b_sum > 0.0, tl.min(b_argmax, axis=1), tl.where(b_empty, -1, 0))  # of NaN the first
            tl.store(rows.argmax + o_row, b_argmax.to(tl.int64), mask=m_row)
        tl.store(rows.maximum + o_row, tl.where(b_empty, 0.0, b_inverse), mask=m_row)
        tl.store(rows.row_max + o_row, tl.where(b_empty, float("inf"), b_max), mask=m_row)
    for g in tl.static_range(C.FEW):
        tl.store(rows.mass + o_row * G + g, tl.sum(b_few[g], axis=1) * b_inverse, mask=o_q < N)
    if C.MANY:
        store_tile(rows.mass + i_rows * N * G, G, o_q, o_g, N, G, b_mass * b_inverse[:, None])


@triton.jit
def _join_kernel(
    parts,
    rows,
    number,
    N,
    G,
    scale_log2,
    ENTROPY: tl.constexpr,
    ARGMAX: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """The statistics of a row from those of `number` parts p of its keys, always in the same order.

    largest = max_p row_max_p        change_p = (row_max_p - largest) scale_log2        sum_p = 2^change_p / maximum_p
    total   = sum_p sum_p            mean_x   = sum_p sum_p (mean_x_p + change_p) / total
    mass_g  = sum_p sum_p mass_pg / total, and from these maximum, argmax and entropy as in `_rows_kernel`
    """
    i_n, i_bh, _, _, _ = block_and_head(N, 1, 1)
    i_row = i_bh * N + i_n
    o_part = tl.arange(0, BLOCK_PARTS)
    m_part = o_part < number
    o_row = (i_bh * number + o_part) * N + i_n  # [part]
    b_maximum = tl.load(parts.maximum + o_row, mask=m_part, other=0.0)
    b_row_max = tl.load(parts.row_max + o_row, mask=m_part, other=0.0)
    b_row_max = tl.where(b_maximum == 0.0, float("-inf"), b_row_max)
    largest = tl.max(b_row_max, axis=0)
    b_change = (b_row_max - tl.where(largest == float("-inf"), 0.0, largest)) * scale_log2
    b_change = tl.maximum(b_change, -160.0, propagate_nan=tl.PropagateNan.ALL)  # 2^-160 is 0, and 0 times -160 a number
    b_sum = tl.exp2(b_change) / tl.where(b_maximum == 0.0, 1.0, b_maximum)
    total = tl.sum(b_sum, axis=0)
    is_empty = total == 0.0
    one = tl.where(is_empty, 1.0, total)
    if ENTROPY:
        mean_x = tl.sum(b_sum * (tl.load(parts.mean_x + o_row, mask=m_part, other=0.0) + b_change), axis=0) / one
        tl.store(rows.entropy + i_row, tl.where(is_empty, 0.0, 0.6931471805599453 * (tl.log2(one) - mean_x)))
        tl.store(rows.mean_x + i_row, mean_x)
    if ARGMAX:
        b_argmax = tl.load(parts.argmax + o_row, mask=m_part & (b_row_max == largest), other=9223372036854775807)
        first = tl.min(b_argmax, axis=0)
        tl.store(rows.argmax + i_row, tl.where(total > 0.0, first, tl.where(is_empty, -1, 0)))  # of NaN the first
    tl.store(rows.maximum + i_row, tl.where(is_empty, 0.0, 1.0 / one))
    tl.store(rows.row_max + i_row, tl.where(is_empty, float("inf"), largest))
    for start in range(0, G, BLOCK_G):
        o_g = start + tl.arange(0, BLOCK_G)
        b_mass = tl.zeros([BLOCK_G], dtype=tl.float32)
        for part in range(0, number):
            i_part = (i_bh * number + part) * N + i_n
            b_mass += tl.load(parts.mass + i_part * G + o_g, mask=o_g < G, other=0.0) * tl.sum(
                tl.where(o_part == part, b_sum, 0.0), axis=0
            )
        tl.store(rows.mass + i_row * G + o_g, b_mass / one, mask=o_g < G)


@triton.jit
def _received_kernel(x, p_maximum, p_row_max, p_received, C: tl.constexpr):
    """Received attention of a tile of keys j of one head, by a pass over its queries i.

    P_ij       = 2^(x_ij - row_max_i) maximum_i, with base-2 logits x_ij and both rows from `_rows_kernel`
    received_j = sum_i w_i P_ij; without weights w_i = 1
    """
    q, k, groups, weight, masks, H, GROUP_K, N, M, G, scale_log2, parameter = x
    i_kv, i_bh, i_b, i_h, i_hk = block_and_head(tl.cdiv(M, C.BLOCK_KV), H, GROUP_K)
    p_q = head_at(q, i_b, i_h, C.D)
    masks = masks_at(masks, i_b, i_h, M)
    o_kv = i_kv * C.BLOCK_KV + tl.arange(0, C.BLOCK_KV)
    t_k = head_tile(k, i_b, i_hk, o_kv, M, C.D, C.BLOCK_D)  # [kv,D]
    b_received = tl.zeros([C.BLOCK_KV], dtype=tl.float32)
    seeing = seeing_queries(masks, i_kv * C.BLOCK_KV, N, M, C.BLOCK_KV, C.MASK)
    queries = queries_of_keys(i_kv, seeing, N, C, False)
    for EDGE in tl.static_range(1 if C.CAUSAL else 2):
        b_sum = tl.zeros(
            [C.BLOCK_EDGE if EDGE else C.BLOCK_Q, C.BLOCK_KV], dtype=tl.float32
        )  # summed over its rows once, at the end
        steps = steps_of(queries, EDGE, C.BLOCK_Q, C)
        for start in range(steps.begin, steps.end, steps.size):
            o_q = start + tl.arange(0, C.BLOCK_EDGE if EDGE else C.BLOCK_Q)
            o_row, m_row = i_bh * N + o_q, within(o_q, N if EDGE or C.CAUSAL else None)
            # rows beyond N are the last one again, of weight 0: zeros times an infinite key would be NaN
            o_last = tl.minimum(o_q, N - 1) if EDGE or C.CAUSAL else o_q
            t_q = tile_of(p_q, q.stride_n, o_last, None, C.D, C.BLOCK_D)
            b_s = row_products(t_q, t_k, C.D, C.PRECISION)  # [q,kv]
            b_s, _ = scores_of(b_s, parameter, scale_log2, C)
            if C.MASK != 0 or C.CAUSAL:  # the key padding mask is applied after the loop
                b_s = mask_logits(b_s, Pairs(masks, i_kv * C.BLOCK_KV, o_q, o_kv, N, M), C.MASK, False, C.CAUSAL)
            b_max = tl.load(p_row_max + o_row, mask=m_row, other=float("inf"))
            b_weight = tl.load(p_maximum + o_row, mask=m_row, other=0.0)  # 1 / sum, which makes probabilities of powers
            if C.WEIGHT:
                b_weight *= tl.load(weight + o_row, mask=m_row, other=0.0)
            b_sum += tl.exp2(below_max(b_s, b_max, scale_log2, C.FOLDED)) * b_weight[:, None]
        b_received += tl.sum(b_sum, axis=0)
    if C.KEY_MASK:
        b_received = tl.where(tl.load(masks.p_keys + o_kv, mask=o_kv < M, other=0) != 0, b_received, 0.0)
    tl.store(p_received + i_bh * M + o_kv, b_received, mask=o_kv < M)


@triton.jit
def _best(b_s, b_best, b_first, start, WIDTH: tl.constexpr, ARGMAX: tl.constexpr):
    """[q,WIDTH] after the tile b_s [q,kv] that begins at key `start`: the largest of every WIDTH-th logit, and in which part of
    WIDTH keys it stood first."""
    for part in tl.static_range(b_s.shape[1] // WIDTH):
        b_part = _columns(b_s, part, WIDTH)
        if ARGMAX:
            b_first = tl.where(b_part > b_best, start + part * WIDTH, b_first)
        b_best = tl.maximum(b_best, b_part)
    return b_best, b_first


@triton.jit
def _below_new_max(b_s, b_max, b_new, scale_log2, FOLDED: tl.constexpr, LOG: tl.constexpr):
    """Online softmax, when b_new [q] is the largest logit after the tile b_s [q,kv] and b_max was it before.

    (x = logit - largest in base 2, the change of earlier ones' x). With LOG both stop where 2^x is 0 in float32, so that
    x 2^x is a number.
    """
    b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)  # -inf - -inf is NaN in a row that has no key yet
    b_x = below_max(b_s, b_safe, scale_log2, FOLDED)
    b_change = b_max - b_safe if FOLDED else (b_max - b_safe) * scale_log2
    if LOG:
        b_x = tl.maximum(b_x, -160.0, propagate_nan=tl.PropagateNan.ALL)  # 2^-160 is 0, and 0 times -160 a number
        b_change = tl.maximum(b_change, -160.0)
    return b_x, b_change


@triton.jit
def _sums(b_e, b_x, p_members, start, M, WIDTH: tl.constexpr, LOG: tl.constexpr, FEW: tl.constexpr):
    """Sums [q,WIDTH] of a tile [q,kv] over every WIDTH-th key: of e, of e x with LOG, and a tuple: of e in each of FEW groups.

    Products are added one after another, by multiply-adds, where `tl.sum` would add them two by two.
    """
    b_sum = tl.zeros([b_e.shape[0], WIDTH], dtype=tl.float32)
    b_log = b_sum
    b_few = _zeros(b_e.shape[0], WIDTH, FEW)
    for part in tl.static_range(b_e.shape[1] // WIDTH):
        b_part = _columns(b_e, part, WIDTH)
        o_kv = start + part * WIDTH + tl.arange(0, WIDTH)
        b_sum += b_part
        if LOG:
            b_log += b_part * _columns(b_x, part, WIDTH)
        b_few = _add_members(b_few, b_part, p_members, o_kv, M)
    return b_sum, b_log, b_few


@triton.jit
def _zeros(ROWS: tl.constexpr, WIDTH: tl.constexpr, FEW: tl.constexpr):
    """FEW tiles [ROWS,WIDTH]."""
    b_few = ()
    for _ in tl.static_range(FEW):
        b_few = extended(b_few, tl.zeros([ROWS, WIDTH], dtype=tl.float32))
    return b_few


@triton.jit
def _add_members(b_few, b_part, p_members, o_kv, M):
    """b_few, and of b_part [q,WIDTH] what is in each group."""
    b_new = ()
    for g in tl.static_range(len(b_few)):
        b_new = extended(b_new, b_few[g] + b_part * member(p_members, o_kv, M, g)[None, :])
    return b_new


@triton.jit
def _rescaled(b_few, b_alpha, b_terms):
    """b_few alpha + b_terms, group by group."""
    b_new = ()
    for g in tl.static_range(len(b_few)):
        b_new = extended(b_new, b_few[g] * b_alpha + b_terms[g])
    return b_new


@triton.jit
def _columns(b_x, i: tl.constexpr, WIDTH: tl.constexpr):
    """Columns i WIDTH to (i + 1) WIDTH of b_x [q,kv]. On matrix units it is a choice of each thread's registers: see `_width`."""
    if b_x.shape[1] == WIDTH:
        return b_x
    else:
        # the low and the high half of the columns, again and again: Triton has no slice of a block
        b_low, b_high = tl.split(tl.permute(tl.reshape(b_x, [b_x.shape[0], 2, b_x.shape[1] // 2]), (0, 2, 1)))
        if i * WIDTH < b_low.shape[1]:
            return _columns(b_low, i, WIDTH)
        else:
            return _columns(b_high, i - b_low.shape[1] // WIDTH, WIDTH)
