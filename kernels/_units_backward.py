"""The backward pass of scores that sum over hidden units: additive, Hadamard with tanh or sigmoid; and relevancy through them.

Roofline: instructions, and MUFU (16 results per clock and SM). For each hidden unit and pair additive takes half a reciprocal for
the score and half a one for its slope.
One pass over the pairs. A program owns the keys of a head, or a range of them where heads are few, and takes them in blocks;
keys that are left after whole blocks have a smaller one. For each block it walks over the queries in tiles. The scores of a
tile and their gradients are computed as in the forward pass. The gradients then go through scratch memory, since Triton cannot
index registers, and are taken anew query by query: a thread holds one hidden unit of a group of keys, so that sums over keys
stay within threads, and sums over queries in registers. The sums of dQ lie in memory, which stays in the cache and which the
next head of a program uses again. No two programs write the same number, and all are added in a fixed order: no atomics, and
the same bits each time. Not yet measured on a GPU.
Exactness: in float32 `_units_rows_kernel` first sums P and P dP, which undoes the rounding of lse and out.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlattn_fast._ground.tensors import empty_gradient, multiprocessors
from vlattn_fast.kernels._configurations import Config
from vlattn_fast.kernels._group_bias import (
    FLOAT_MASK,
    add_group_sums,
    gradient_blocks,
    groups_of_tile,
    seeing_queries,
    seen_keys,
    seen_tiles,
    store_group_sums,
    tile_at,
)
from vlattn_fast.kernels._products_backward import (
    RowStats,
    add_carried,
    dropped,
    empty_key_gradients,
    grad_of_lse,
    heads_summed,
    new_rows,
    store_carried,
    zero_carried,
)
from vlattn_fast.kernels._scores import (
    add_masks,
    head_of,
    keep_layout,
    largest_argument,
    one_a_thread,
    precomputed_at,
    sum_of_rest,
    sum_units,
    units_backward,
    units_factors,
    weights_summed,
)
from vlattn_fast.kernels._tiles import (
    ROW_MULTIPLE,
    Pairs,
    block_and_head,
    cdiv,
    dot,
    edge_block,
    head_at,
    head_tile,
    heads_of,
    keep_factor,
    key_range,
    key_tile,
    launched,
    load_tile,
    map_of,
    mask_logits,
    masks_at,
    padded_rows,
    real_tokens,
    row_shift,
    store_head,
    store_tile,
    tile_of,
)

PROGRAMS = 2  # for each multiprocessor, as many as their registers allow
LARGEST = 2**28  # numbers in the sums of dQ of all programs


class _Keys(NamedTuple):
    """A block of keys: the sample; the head, what is precomputed of it, and the sample's mask; the number of the block, its keys
    and their values [kv,Dv]; where a thread's units lie, of which keys, and which [k,gA]; and offsets for `units_backward`."""

    i_b: Any
    p: Any
    p_pre: Any
    p_mask: Any
    i_kv: Any
    o_kv: Any
    b_v: Any
    p_units: Any
    o_keys: Any
    o_units: Any
    offsets: Any


def launch(
    call: dict[str, Any],
    config_q: Config,
    config_kv: Config,
    vector: Tensor,
    lse: Tensor,
    out: Tensor,
    coarse: RowStats | None,
    grad_lse: Tensor | None,
    row_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value, vector and row_bias, the last two in float32.

    `config_q` is that of the rows, `config_kv` that of the pairs.
    """
    assert config_kv["num_stages"] == 1, "a tile's gradients are read back from memory: stages would read them ahead"
    query, key, value = call["x"].q.p, call["x"].k.p, call["x"].v.p
    (batch, heads, num_q, size), num_kv = query.shape, key.shape[2]
    grad_q = empty_gradient(query)
    grad_k, grad_v = empty_key_gradients(key, value)
    heads_kv = grad_k.shape[1]
    blocks_q, blocks_kv = padded_rows(num_q) // config_q["BLOCK_Q"], cdiv(num_kv, config_kv["BLOCK_KV"])
    coarse = RowStats(new_rows(query), new_rows(query) if call["C"].EXACT else None) if coarse is None else coarse
    stats = coarse._replace(delta=new_rows(query))
    grad_bias, blocks = gradient_blocks(row_bias)
    for p_grad_bias, first_group, block_g in blocks if lse.numel() > 0 else ():
        _units_rows_kernel[(blocks_q * batch * heads,)](
            **launched(call, config_q, BLOCK_G=block_g),
            p_u=vector,
            p_lse=lse,
            p_out=out.transpose(1, 2).contiguous(),  # (B,N,H,Dv), as forward lays it out
            p_grad_lse=grad_lse,
            stats=stats,
            p_grad_bias=p_grad_bias,
            first_group=first_group,
        )
    grad_u = vector.new_empty((batch, heads, blocks_kv, size), dtype=torch.float32)
    if batch * heads_kv > 0:
        group = heads // heads_kv
        of_head = group * padded_rows(num_q) * size
        most = min(PROGRAMS * multiprocessors(query.device), max(1, LARGEST // max(1, of_head)))
        ranges, length = _key_ranges(batch * heads_kv, blocks_kv, of_head, most)
        programs = min(batch * heads_kv * ranges, most)
        of_ranges = (batch, heads, ranges) if ranges > 1 else (programs, group)
        sums = grad_u.new_empty((*of_ranges, padded_rows(num_q), size))
        edge = edge_block(num_kv, config_kv["BLOCK_KV"], False)  # also under a causal mask: a block of keys has its own tiles
        _units_backward_kernel[(programs,)](
            **launched(call, config_kv, BLOCK_EDGE=edge),
            p_u=vector,
            stats=stats,
            p_scratch=grad_u.new_empty(programs * config_kv["BLOCK_Q"] * config_kv["BLOCK_KV"]),
            p_sums=sums,
            grads=(heads_of(grad_q), heads_of(grad_k), heads_of(grad_v), grad_u),
            parts=(heads_kv, group, ranges, length, batch * heads_kv * ranges),
            PARTIAL=ranges > 1,
            GROUPS=_groups(call["C"].BLOCK_A, config_kv, edge),
        )
        if ranges > 1:
            grad_q.copy_(sums.sum(2)[:, :, :num_q])
    return grad_q, *heads_summed(grad_k, key, grad_v, value), grad_u.sum((0, 2)), grad_bias


def carry(
    call: dict[str, Any],
    config: Config,
    vector: Tensor,
    rows: RowStats,
    relevancy: Tensor,
    factor: float,
    by_gradient: bool,
    together: int,
) -> Tensor:
    """factor * sum over heads of r Abar, (B, T, M), for rows r (B, T, N) with N padded. config has BLOCK_T.

    A program takes so many heads `together`.
    """
    x, num_t = call["x"], relevancy.shape[1]
    batch, heads, num_q, _ = x.q.p.shape
    if batch * heads * num_q * x.M * num_t == 0:
        return relevancy.new_zeros(batch, num_t, x.M)
    r_abar = relevancy.new_empty(batch, heads // together, num_t, x.M)
    _units_step_kernel[(cdiv(x.M, config["BLOCK_KV"]) * cdiv(num_t, config["BLOCK_T"]) * batch * (heads // together),)](
        **launched(call, config, BY_GRADIENT=by_gradient),
        p_u=vector,
        stats=RowStats(rows.shift, rows.total),
        p_r=relevancy,
        p_r_abar=r_abar,
        HEADS=together,
        T=num_t,
        factor=factor,
    )
    return r_abar.sum(1)


def _key_ranges(heads: int, blocks: int, sums: int, programs: int) -> tuple[int, int]:
    """Into how many ranges the keys of each head are divided, and the blocks of a range.

    As many as make the rounds of so many programs over all of them shortest, and few, since each has its own `sums` numbers.
    """
    best, least = (1, blocks), math.inf
    for ranges in range(1, min(blocks, 4 * programs // heads, LARGEST // max(1, heads * sums)) + 1):
        length = cdiv(blocks, ranges)
        rounds = cdiv(heads * cdiv(blocks, length), programs)
        if rounds * length < least:
            best, least = (cdiv(blocks, length), length), rounds * length
    return best


def _groups(units: int, config: Config, edge: int) -> int:
    """The number of groups of keys: one for each thread that a unit has. Each group takes two of a tile's queries at a time."""
    return max(1, min(32 * config["num_warps"] // units, edge, config["BLOCK_Q"] // 2))


@triton.jit
def _units_rows_kernel(x, p_u, p_lse, p_out, p_grad_lse, stats, p_grad_bias, first_group, C: tl.constexpr):
    """`RowStats` of a tile of queries i of one head.

    shift_i = log2(e) lse_i; under a float mask it is there, with its total
    delta_i = sum_d dO_id out_id - dlse_i
    in float32 instead, since lse and out are rounded, by a pass over the keys j (`_exact_rows`):
    total_i = sum_j P_ij,  delta_i = sum_j P_ij dP_ij / total_i - dlse_i
    By a pass over the keys, with BLOCK_G groups g:
    dbias_ig = sum_j P_ij (dP_ij - delta_i) [j in group g] / total_i
    """
    H, N, grad = x.H, x.N, x.grad
    NP = tl.cdiv(N, ROW_MULTIPLE) * ROW_MULTIPLE
    i_q, i_bh, i_b, i_h, i_hk = block_and_head(NP // C.BLOCK_Q, H, C.GROUP_K)
    head = head_of(x, i_bh, i_b, i_h, i_hk, C)
    p_u += i_h * C.A
    o_q = i_q * C.BLOCK_Q + tl.arange(0, C.BLOCK_Q)
    o_a = tl.arange(0, C.BLOCK_A)
    b_do = head_tile(grad, i_b, i_h, o_q, N, C.DV, C.BLOCK_DV).b  # [q,Dv]
    b_out = tile_of(p_out + (i_b * N * H + i_h) * C.DV, H * C.DV, o_q, N, C.DV, C.BLOCK_DV).b  # [q,Dv]
    if C.MASK >= FLOAT_MASK:
        b_shift = tl.load(stats.shift + i_bh * NP + o_q)
    else:
        b_shift = row_shift(p_lse + i_bh * N, o_q, N)
        tl.store(stats.shift + i_bh * NP + o_q, b_shift)
    b_grad_lse = grad_of_lse(p_grad_lse, i_bh, o_q, N)
    b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), axis=1) - b_grad_lse
    if C.EXACT:
        b_total, b_mean = _exact_rows(x, head, p_u, o_a, i_q, i_bh, b_do, b_shift, C)
        b_total = tl.where(b_total == 0.0, 1.0, b_total)
        b_delta = b_mean / b_total - b_grad_lse
        tl.store(stats.total + i_bh * NP + o_q, b_total)
    tl.store(stats.delta + i_bh * NP + o_q, b_delta)
    if C.BLOCK_G > 0:
        if not C.EXACT:
            b_total = tl.load(stats.total + i_bh * NP + o_q)  # of `is_coarse` rows
        of_groups = b_delta, first_group
        b_bias = _sums_by_group(x, head, p_u, o_a, i_q, i_bh, b_do, b_shift, of_groups, C)
        store_group_sums(p_grad_bias, x.masks, i_bh, o_q, N, first_group, b_bias / b_total[:, None])


@triton.jit
def _exact_rows(x, head, p_u, o_a, i_q, i_bh, b_do, b_shift, C: tl.constexpr):
    """sum_j P_ij and sum_j P_ij dP_ij of a tile of queries, [q]. head: of `head_of`."""
    b_total = tl.zeros([C.BLOCK_Q], dtype=tl.float32)
    b_mean = tl.zeros([C.BLOCK_Q], dtype=tl.float32)
    of_units, steps = _keys_of_rows(x, head, p_u, o_a, i_q, C)
    for step in range(steps.begin, steps.end, steps.size):
        start = tile_at(step, steps, C.MASK)
        o_kv = start + tl.arange(0, C.BLOCK_KV)
        b_p, b_dp = _tile_of_rows(x, head, of_units, i_q, i_bh, start, o_kv, b_do, b_shift, C)
        b_total += tl.sum(b_p, axis=1)
        b_mean += tl.sum(b_p * b_dp, axis=1)
    return b_total, b_mean


@triton.jit
def _sums_by_group(x, head, p_u, o_a, i_q, i_bh, b_do, b_shift, of_groups, C: tl.constexpr):
    """sum_j P_ij (dP_ij - delta_i) over the keys of each of BLOCK_G groups, [q,BLOCK_G]. of_groups: delta, the first group."""
    b_delta, first_group = of_groups
    _, _, _, _, _, masks = head
    b_sums = tl.zeros([C.BLOCK_Q, C.BLOCK_G], dtype=tl.float32)
    of_units, steps = _keys_of_rows(x, head, p_u, o_a, i_q, C)
    for step in range(steps.begin, steps.end, steps.size):
        start = tile_at(step, steps, C.MASK)
        o_kv = start + tl.arange(0, C.BLOCK_KV)
        b_p, b_dp = _tile_of_rows(x, head, of_units, i_q, i_bh, start, o_kv, b_do, b_shift, C)
        of_tile = groups_of_tile(masks, start, x.M, C.BLOCK_KV, C.MASK)
        b_sums = add_group_sums(b_sums, b_p * (b_dp - b_delta[:, None]), masks, of_tile, o_kv, x.M, first_group)
    return b_sums


@triton.jit
def _keys_of_rows(x, head, p_u, o_a, i_q, C: tl.constexpr):
    """For a pass over the keys of a tile of queries: (the vector, `largest_argument`, `weights_summed`), `seen_tiles`."""
    p_q, p_k, _, p_pre_q, p_pre_k, masks = head
    bound = largest_argument(p_q, p_k, p_pre_q, p_pre_k, masks.p_keys, x.N, x.M, C)
    largest, total = weights_summed(p_u, o_a, C.A)
    _, end = key_range(i_q, x.M, True, C.CAUSAL, C.BLOCK_Q, C.BLOCK_KV)
    seen = seen_keys(masks, i_q * C.BLOCK_Q + tl.arange(0, C.BLOCK_Q), x.N, x.M, C.MASK)
    return (p_u, bound, largest, total), seen_tiles(seen, 0, end, C.BLOCK_KV, C.MASK)


@triton.jit
def _tile_of_rows(x, head, of_units, i_q, i_bh, start, o_kv, b_do, b_shift, C: tl.constexpr):
    """P and dP of a tile [q,kv]. of_units: of `_keys_of_rows`."""
    q, k, v, N, M = x.q, x.k, x.v, x.N, x.M
    p_q, p_k, p_v, p_pre_q, p_pre_k, masks = head
    p_u, bound, largest, total = of_units
    o_q = i_q * C.BLOCK_Q + tl.arange(0, C.BLOCK_Q)
    b_v = key_tile(p_v, v.stride_n, masks.p_keys, o_kv, M, C.DV, C.BLOCK_DV, C.KEY_MASK).b  # [kv,Dv]
    of_q, of_k = (p_q, p_pre_q, o_q, q.stride_n, N), (p_k, p_pre_k, o_kv, k.stride_n, M)
    b_s = sum_units(of_q, of_k, p_u, bound, largest, total, C)  # [q,kv]
    b_logit = _masked(b_s * x.scale_log2, Pairs(masks, start, o_q, o_kv, N, M), False, C)
    b_p = tl.exp2(b_logit - b_shift[:, None])
    b_dp = dot(b_do, tl.trans(b_v), C.PRECISION)  # [q,kv]
    if x.dropout is not None:
        b_dp *= keep_factor(x.dropout, i_bh, o_q, o_kv, N)
    return b_p, b_dp


@triton.jit
def _masked(b_logit, pairs, KEY_MAJOR: tl.constexpr, C: tl.constexpr):
    """Logits [q,kv] under the masks, or KEY_MAJOR [kv,q] without that of padding.

    An attn_mask is applied to zeros, and then added: see `keep_layout`.
    """
    b_masked = tl.zeros_like(b_logit) if C.MASK != 0 else b_logit
    b_masked = mask_logits(b_masked, pairs, C.MASK, C.KEY_MASK and not KEY_MAJOR, C.CAUSAL, KEY_MAJOR)
    return add_masks(b_logit, b_masked, C) if C.MASK != 0 else b_masked


@triton.jit
def _units_backward_kernel(
    x, p_u, stats, p_scratch, p_sums, grads, parts, PARTIAL: tl.constexpr, GROUPS: tl.constexpr, C: tl.constexpr
):
    """dQ, dK, dV and du, by one pass over the pairs. Tiles are [kv,q], so that they are the left operand of the product with dO.

    s_ij  = sum_a u_a g(y_ija), with y = q_ia + k_ja (additive) or q_ia k_ja (Hadamard), and g = tanh or the logistic function
    P_ij  = 2^(scale_log2 s_ij - shift_i) / total_i       dv_j  = sum_i dropout_ij P_ij dO_i
    dP_ij = dropout_ij dO_i v_j                           du_a  = sum_ij dS_ij g(y_ija)
    dS_ij = scale P_ij (dP_ij - delta_i)                  dk_ja = u_a sum_i dS_ij g'(y_ija) dy/dk, dq_ia = the same over j
    A program takes ranges of keys of a head, one after another: parts says how many, and PARTIAL that a head has several. Then
    dQ stays a sum for each range. `units_backward` sums du, dk and dq; u and the factors of g' are multiplied in at the end.
    """
    k, v, masks, H, N, M = x.k, x.v, x.masks, x.H, x.N, x.M
    grad_q, grad_k, grad_v, p_grad_u = grads
    HEADS_KV, GROUP, RANGES, RANGE, PARTS = parts
    NP = tl.cdiv(N, ROW_MULTIPLE) * ROW_MULTIPLE
    i_program = tl.program_id(0).to(tl.int64)
    p_scratch += i_program * (C.BLOCK_Q * C.BLOCK_KV)
    o_a = tl.arange(0, C.BLOCK_A)
    # a thread holds one unit a of one group g of keys: [k,gA] has key g * len(k) + k in column g * BLOCK_A + a
    o_unit = one_a_thread(o_a, C.PRECISION)
    o_ga = tl.arange(0, GROUPS * C.BLOCK_A)
    o_unit_k = one_a_thread(o_ga % C.BLOCK_A, C.PRECISION)[None, :]
    o_g = tl.arange(0, GROUPS)
    # as many programs as run at once take one part after another, since each has scratch memory and sums of its own
    for i_work in range(i_program, PARTS, tl.num_programs(0)):
        i_part = tl.full([], i_work, tl.int64)
        i_range = (i_part % RANGES).to(tl.int32)
        i_b, i_hkv = i_part // RANGES // HEADS_KV, i_part // RANGES % HEADS_KV
        i_hk = i_hkv * GROUP // C.GROUP_K
        p_k_h = head_at(k, i_b, i_hk, C.A)
        p_v_h = head_at(v, i_b, i_hkv * GROUP // C.GROUP_V, C.DV)
        p_key_mask = masks.p_keys + i_b * M
        p_pre_k_h = precomputed_at(x.p_pres[1], i_b * (H // C.GROUP_K) + i_hk, M, C.A, True)
        # the sums of dQ, of all heads that share this one's keys
        sums = NP.to(tl.int64) * C.A
        step = sums * RANGES if PARTIAL else sums
        p_first = p_sums + (((i_b * H + i_hkv * GROUP) * RANGES + i_range) * sums if PARTIAL else i_program * GROUP * sums)
        _begin_sums(p_first, step, GROUP, N, C)
        first, last = i_range * RANGE, tl.minimum((i_range + 1) * RANGE, tl.cdiv(M, C.BLOCK_KV))
        whole = M // C.BLOCK_KV if C.BLOCK_EDGE < C.BLOCK_KV else last
        for EDGE in tl.static_range(2 if C.BLOCK_EDGE < C.BLOCK_KV else 1):
            for i_kv in range(tl.maximum(first, whole) if EDGE else first, last if EDGE else tl.minimum(last, whole)):
                o_kv = i_kv * C.BLOCK_KV + tl.arange(0, C.BLOCK_EDGE if EDGE else C.BLOCK_KV)
                o_k = tl.arange(0, o_kv.shape[0] // GROUPS)
                b_v = key_tile(p_v_h, v.stride_n, p_key_mask, o_kv, M, C.DV, C.BLOCK_DV, C.KEY_MASK).b  # [kv,Dv]
                o_kg = i_kv * C.BLOCK_KV + (o_ga // C.BLOCK_A)[None, :] * o_k.shape[0] + o_k[:, None]  # [k,gA]
                p_unit_k = p_k_h + o_kg.to(tl.int64) * k.stride_n + o_unit_k
                b_dk = tl.zeros([o_k.shape[0], GROUPS, C.BLOCK_A], dtype=tl.float32)
                b_dv = tl.zeros([o_kv.shape[0], C.BLOCK_DV], dtype=tl.float32)
                keys = _Keys(i_b, p_k_h, p_pre_k_h, p_key_mask, i_kv, o_kv, b_v, p_unit_k, o_kg, o_unit_k, (o_k, o_g, o_unit))
                for i_g in range(0, GROUP):
                    memory = p_scratch, p_first + i_g * step, p_grad_u
                    i_h = i_hkv * GROUP + i_g
                    b_dk, b_dv = _over_queries((b_dk, b_dv), keys, x, p_u, stats, i_h, memory, C)
                _store_keys(grad_k, grad_v, i_hkv, b_dk, b_dv, keys, M, C)
        _end_sums(p_first, step, p_u, grad_q, i_b, i_hkv, GROUP, N, PARTIAL, C)


@triton.jit
def _over_queries(sums, keys, x, p_u, stats, i_h, memory, C: tl.constexpr):
    """b_dk, b_dv and what the queries of a head add to them: their sums over i. memory: the program's scratch memory, the head's
    sums of dQ, which it adds to, and du of all blocks of keys, of which it writes one."""
    q, grad, N, M = x.q, x.grad, x.N, x.M
    b_dk, b_dv = sums
    p_scratch, p_sums, p_grad_u = memory
    o_a = tl.arange(0, C.BLOCK_A)
    i_bh = keys.i_b * x.H + i_h
    p_q_h = head_at(q, keys.i_b, i_h, C.A)
    p_grad_h = head_at(grad, keys.i_b, i_h, C.DV)
    masks_h = masks_at(x.masks, keys.i_b, i_h, M)
    p_u_h = p_u + i_h * C.A
    largest, total = weights_summed(p_u_h, o_a, C.A)
    p_pre_q_h = precomputed_at(x.p_pres[0], i_bh, N, C.A, True)
    bound = largest_argument(p_q_h, keys.p, p_pre_q_h, keys.p_pre, keys.p_mask, N, M, C)
    b_units, b_du = tl.zeros_like(b_dk), tl.zeros([b_dk.shape[1], C.BLOCK_A], dtype=tl.float32)
    b_sum = tl.zeros([b_dv.shape[0]], dtype=tl.float32)
    begin = (keys.i_kv * C.BLOCK_KV) // C.BLOCK_Q * C.BLOCK_Q if C.CAUSAL else 0  # queries before it see none of these keys
    steps = seen_tiles(seeing_queries(masks_h, keys.i_kv * C.BLOCK_KV, N, M, b_dv.shape[0], C.MASK), begin, N, C.BLOCK_Q, C.MASK)
    for start in range(steps.begin, steps.end, steps.size):
        o_q = start + tl.arange(0, C.BLOCK_Q)
        b_do = tile_of(p_grad_h, grad.stride_n, o_q, N, C.DV, C.BLOCK_DV).b  # [q,Dv]
        of_k, of_q = (keys.p, keys.p_pre, keys.o_kv, x.k.stride_n, M), (p_q_h, p_pre_q_h, o_q, q.stride_n, N)
        b_s = sum_units(of_k, of_q, p_u_h, bound, largest, total, C)  # [kv,q]
        b_logit = _masked(b_s * x.scale_log2, Pairs(masks_h, keys.i_kv * C.BLOCK_KV, o_q, keys.o_kv, N, M), True, C)
        b_dv, b_ds = _through_softmax(b_dv, b_logit, keys.b_v, b_do, x, stats, keys.p_mask, i_bh, o_q, keys.o_kv, C)
        b_sum += sum_of_rest(b_ds, bound, C)
        _share_tile(p_scratch, b_ds, C.BLOCK_KV)
        p_dq = p_sums + tl.full([], start, tl.int64) * C.A
        p_q_tile = p_q_h + tl.full([], start, tl.int64) * q.stride_n
        queries = p_q_tile, q.stride_n, p_dq, tl.minimum(C.BLOCK_Q, N - start)
        units_k = keys.p_units, real_tokens(keys.p_mask, keys.o_keys, M, C.KEY_MASK) & (keys.o_units < C.A)
        b_units, b_du = units_backward(b_units, b_du, units_k, queries, p_scratch, keys.offsets, bound, C.BLOCK_KV, C)
    # every query head has its u: the sums over a head's queries get it, not each pair
    FACTOR_K, _, FACTOR_U, FACTOR_SUM = units_factors(C.SCORE, C.EXACT, C.FAST)
    b_u = tl.load(p_u_h + o_a, mask=o_a < C.A, other=0.0).to(tl.float32)
    b_dk += b_units * (b_u * FACTOR_K)[None, None, :]
    b_grad_u = tl.sum(b_du, axis=0) * FACTOR_U + tl.sum(b_sum, axis=0) * FACTOR_SUM
    tl.store(p_grad_u + (i_bh * tl.cdiv(M, C.BLOCK_KV) + keys.i_kv) * C.A + o_a, b_grad_u, mask=o_a < C.A)
    return b_dk, b_dv


@triton.jit
def _store_keys(grad_k, grad_v, i_hkv, b_dk, b_dv, keys, M, C: tl.constexpr):
    """dK and dV of a block. Scores of padding are those of whatever stands there: its gradients are dropped."""
    if C.KEY_MASK:
        b_dv = tl.where(real_tokens(keys.p_mask, keys.o_kv, M, True)[:, None], b_dv, 0.0)
    p_grad_k = grad_k.p + keys.i_b * grad_k.stride_b + i_hkv * grad_k.stride_h
    p_unit_k = p_grad_k + keys.o_keys.to(tl.int64) * grad_k.stride_n + keys.o_units
    b_dk = tl.reshape(b_dk, keys.o_keys.shape)
    if C.KEY_MASK:
        b_dk = tl.where(real_tokens(keys.p_mask, keys.o_keys, M, True), b_dk, 0.0)
    tl.store(p_unit_k, b_dk.to(grad_k.p.dtype.element_ty), mask=(keys.o_keys < M) & (keys.o_units < C.A))
    store_head(grad_v, keys.i_b, i_hkv, keys.o_kv, tl.arange(0, C.BLOCK_DV), M, C.DV, (b_dv,))


@triton.jit
def _begin_sums(p_first, step, GROUP, N, C: tl.constexpr):
    """Zeros in memory for the sums of dQ of GROUP heads."""
    NP = tl.cdiv(N, ROW_MULTIPLE) * ROW_MULTIPLE
    o_a = tl.arange(0, C.BLOCK_A)
    tl.debug_barrier()  # the last head's sums have been read
    for i_g in range(0, GROUP):
        for start in range(0, N, C.BLOCK_Q):
            b_zero = tl.zeros([C.BLOCK_Q, C.BLOCK_A], dtype=tl.float32)
            store_tile(p_first + i_g * step, C.A, start + tl.arange(0, C.BLOCK_Q), o_a, NP, C.A, b_zero)


@triton.jit
def _end_sums(p_first, step, p_u, grad_q, i_b, i_hkv, GROUP, N, PARTIAL: tl.constexpr, C: tl.constexpr):
    """dQ of GROUP heads from the sums, or PARTIAL sums that the host adds. Here they get the factors u and FACTOR_Q."""
    _, FACTOR_Q, _, _ = units_factors(C.SCORE, C.EXACT, C.FAST)
    o_a = tl.arange(0, C.BLOCK_A)
    tl.debug_barrier()  # the sums are in memory
    for i_g in range(0, GROUP):
        i_h = i_hkv * GROUP + i_g
        b_u = tl.load(p_u + i_h * C.A + o_a, mask=o_a < C.A, other=0.0).to(tl.float32)
        for start in range(0, N, C.BLOCK_Q):
            o_q = start + tl.arange(0, C.BLOCK_Q)
            b_dq = load_tile(p_first + i_g * step, C.A, o_q, o_a, N, C.A) * (b_u * FACTOR_Q)[None, :]  # [q,A]
            if PARTIAL:
                store_tile(p_first + i_g * step, C.A, o_q, o_a, N, C.A, b_dq)
            else:
                store_head(grad_q, i_b, i_h, o_q, o_a, N, C.A, (b_dq,))


@triton.jit
def _through_softmax(b_dv, b_logit, b_v, b_do, x, stats, p_key_mask, i_bh, o_q, o_kv, C: tl.constexpr):
    """b_dv [kv,Dv] and what a tile of logits [kv,q] adds to it; and dS [kv,q], times the scale."""
    N, M = x.N, x.M
    row = i_bh * (tl.cdiv(N, ROW_MULTIPLE) * ROW_MULTIPLE)
    b_p = _probabilities(b_logit, x, stats, i_bh, o_q, C)
    b_dp = dot(b_v, tl.trans(b_do), C.PRECISION)  # [kv,q]
    b_dropped_p, b_dp = dropped(b_p, b_dp, x, i_bh, o_q, o_kv)
    b_dv += dot(keep_layout(b_dropped_p, True, C.PRECISION).to(b_do.dtype), b_do, C.PRECISION)
    b_ds = b_p * (b_dp - tl.load(stats.delta + row + o_q)[None, :]) * x.scale
    m_pair = real_tokens(p_key_mask, o_kv, M, C.KEY_MASK)[:, None] & (o_q < N)[None, :]
    return b_dv, tl.where(m_pair, b_ds, 0.0)  # of padding P is 0, but dP may be infinite


@triton.jit
def _probabilities(b_logit, x, stats, i_bh, o_q, C: tl.constexpr):
    """P of a tile of logits [kv,q]."""
    row = i_bh * (tl.cdiv(x.N, ROW_MULTIPLE) * ROW_MULTIPLE)
    b_p = tl.exp2(b_logit - tl.load(stats.shift + row + o_q)[None, :])
    if stats.total is not None:  # else the shift is a log-sum-exp
        b_p /= tl.load(stats.total + row + o_q)[None, :]
    return b_p


@triton.jit
def _units_step_kernel(x, p_u, stats, p_r, p_r_abar, HEADS, T, factor, C: tl.constexpr):
    """r Abar of a tile of keys j and BLOCK_T rows of r, of HEADS heads, by a pass over their queries i. Tiles are [kv,q].

    r_abar_tj = factor sum_i r_ti E_ij, E = P or BY_GRADIENT relu(P dP), with P and dP as in `_units_backward_kernel`
    """
    N, M, grad = x.N, x.M, x.grad
    num_kv = tl.cdiv(M, C.BLOCK_KV)
    i_block, i_bp, i_b, i_p, _ = block_and_head(num_kv * tl.cdiv(T, C.BLOCK_T), x.H // HEADS, 1)
    i_kv = i_block % num_kv
    o_kv = i_kv * C.BLOCK_KV + tl.arange(0, C.BLOCK_KV)
    o_t = (i_block // num_kv) * C.BLOCK_T + tl.arange(0, C.BLOCK_T)
    o_a = tl.arange(0, C.BLOCK_A)
    m_key = real_tokens(x.masks.p_keys + i_b * M, o_kv, M, C.KEY_MASK)
    begin = (i_kv * C.BLOCK_KV) // C.BLOCK_Q * C.BLOCK_Q if C.CAUSAL else 0  # queries before it see none of these keys
    b_r_abar = zero_carried(C.BLOCK_KV, C.BLOCK_T)
    for i in range(HEADS):
        i_h = i_p * HEADS + i
        i_bh = i_b * x.H + i_h
        p_q, p_k, p_v, p_pre_q, p_pre_k, masks = head_of(x, i_bh, i_b, i_h, i_h // C.GROUP_K, C)
        bound = largest_argument(p_q, p_k, p_pre_q, p_pre_k, masks.p_keys, N, M, C)
        largest, total = weights_summed(p_u + i_h * C.A, o_a, C.A)
        if C.BY_GRADIENT:
            b_v = tile_of(p_v, x.v.stride_n, o_kv, M, C.DV, C.BLOCK_DV).b  # [kv,Dv]
            p_grad = head_at(grad, i_b, i_h, C.DV)
        seeing = seeing_queries(masks, i_kv * C.BLOCK_KV, N, M, C.BLOCK_KV, C.MASK)
        steps = seen_tiles(seeing, begin, N, C.BLOCK_Q, C.MASK)
        for start in range(steps.begin, steps.end, steps.size):
            o_q = start + tl.arange(0, C.BLOCK_Q)
            of_k, of_q = (p_k, p_pre_k, o_kv, x.k.stride_n, M), (p_q, p_pre_q, o_q, x.q.stride_n, N)
            b_s = sum_units(of_k, of_q, p_u + i_h * C.A, bound, largest, total, C)  # [kv,q]
            b_logit = _masked(b_s * x.scale_log2, Pairs(masks, i_kv * C.BLOCK_KV, o_q, o_kv, N, M), True, C)
            b_map = _probabilities(b_logit, x, stats, i_bh, o_q, C)
            if C.BY_GRADIENT:
                b_do = tile_of(p_grad, grad.stride_n, o_q, N, C.DV, C.BLOCK_DV).b  # [q,Dv]
                b_map = map_of(b_map, dot(b_v, tl.trans(b_do), C.PRECISION), o_q, N)
            b_r_abar = add_carried(b_r_abar, keep_layout(b_map, True, C.PRECISION), p_r, i_b, o_q, o_t, T, x, C)
    store_carried(p_r_abar, b_r_abar, factor, i_bp, o_t, T, o_kv, m_key, M)


@triton.jit
def _share_tile(p_scratch, b_x, BLOCK_KV: tl.constexpr):
    """Writes a tile [kv,q] to the program's scratch memory as [q,kv], where all its threads can then read all of it."""
    tl.debug_barrier()  # the last tile has been read
    o_x = tl.arange(0, b_x.shape[1])[None, :] * BLOCK_KV + tl.arange(0, b_x.shape[0])[:, None]
    tl.store(p_scratch + o_x, b_x)
    tl.debug_barrier()
