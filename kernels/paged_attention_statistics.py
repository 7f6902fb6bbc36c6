"""paged_attention_statistics in Triton: statistics of packed queries over keys in the blocks of a cache.

Shapes: query (T, H, D), key_cache (blocks, Hk, block size, D) of any strides, block_table (R, W), lengths (R), starts (R + 1),
key_groups (R, K); mass (T, H, G), entropy, maximum, max_logit (T, H), received (R, H, M), M = W block size.
Roofline: HBM for decoding, where a program reads each key once for all query heads that share it. For prompts a matrix product
and an exponential per pair, in each of two passes if `received` is asked for.
Trick: the host reads no value. T tokens of R requests have at most T / BLOCK_T + R tiles of BLOCK_T tokens of one request: so
many programs run for each key head, find their request in `starts`, and those without tokens end at once. The rows of a tile are
the tokens of all query heads that share keys. Measured on an H100: docs/operators.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlattn_fast.backends.inputs import PagedAttentionStatisticsInputs
from vlattn_fast.kernels._configurations import configuration
from vlattn_fast.kernels._device import on_device
from vlattn_fast.kernels._key_groups import dot_members
from vlattn_fast.kernels._scores import softcapped
from vlattn_fast.kernels._tiles import LOG2_E, block_size, cdiv, dot, input_precision, launched

MOST_GROUPS = 64  # whose masses a program sums; other programs sum the others


class Constants(NamedTuple):
    """D: features. HEADS: query heads that share a key head, GROUP: a power of two that holds them. SPLIT: see `dot_members`.
    BLOCK_R holds the number of requests + 1."""

    D: int
    BLOCK_D: int
    HEADS: int
    GROUP: int
    BLOCK_R: int
    SPLIT: bool
    WINDOW: bool
    PRECISION: str


class Cache(NamedTuple):
    """key_cache with its strides and the number of blocks, and where each request's keys lie. R requests have W blocks each."""

    p: Tensor
    stride_block: int
    stride_head: int
    stride_place: int
    stride_d: int
    blocks: int
    block_size: int
    p_table: Tensor
    stride_table: int
    p_lengths: Tensor
    p_starts: Tensor
    R: int
    W: int


class Call(NamedTuple):
    """Both kernels take it, as x. groups: a tensor, its stride of requests, and K. parameter: see `softcapped`; None without."""

    p_query: Tensor
    stride_t: int
    stride_h: int
    cache: Cache
    groups: tuple[Tensor, int, int]
    T: int
    H: int
    Hk: int
    G: int
    window: int
    scale_log2: float
    parameter: float | None


@on_device
def forward(inputs: PagedAttentionStatisticsInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """mass (T, H, G), entropy, maximum (T, H), received (R, H, M), max_logit, lse (T, H); anything for what `statistics` does not
    name."""
    query, cache, asked = inputs.query, inputs.key_cache, inputs.statistics.split()
    (tokens, heads, _), (requests, columns), size = query.shape, inputs.block_table.shape, cache.shape[2]
    per_row = tokens, heads
    mass = query.new_zeros((*per_row, inputs.num_groups), dtype=torch.float32)
    entropy, maximum = (query.new_zeros(per_row, dtype=torch.float32) for _ in range(2))
    row_max = query.new_full(per_row, -torch.inf, dtype=torch.float32)  # in base 2
    receives = "received" in asked
    received = query.new_zeros((requests, heads, columns * size if receives else 0), dtype=torch.float32)
    if tokens * heads > 0 and requests * columns > 0:
        call = _arguments(inputs)
        group = call["C"].GROUP
        facts = {"dtype": query.dtype, "few": tokens <= 4 * requests, "size": query.shape[2]}
        config = configuration("paged_attention_statistics", "rows", **facts)
        config = {**config, "BLOCK_Q": max(config["BLOCK_Q"], group)}
        blocks_g = max(1, cdiv(inputs.num_groups, MOST_GROUPS))
        tiles = tokens // (config["BLOCK_Q"] // group) + requests
        _rows_kernel[(tiles * blocks_g * cache.shape[1],)](
            **launched(call),
            p_mass=mass,
            p_rows=(entropy, maximum, row_max),
            tiles=tiles,
            blocks_g=blocks_g,
            ENTROPY="entropy" in asked,
            MASS=inputs.num_groups > 0,
            BLOCK_G=min(MOST_GROUPS, block_size(inputs.num_groups)),
            **config,
        )
        if receives:
            config = configuration("paged_attention_statistics", "received", **facts)
            grid = (cdiv(columns * size, config["BLOCK_KV"]) * requests * heads,)
            _received_kernel[grid](**launched(call), p_maximum=maximum, p_row_max=row_max, p_received=received, **config)
    max_logit = row_max * math.log(2.0)
    max_logit = torch.where(maximum.isnan() & (max_logit != torch.inf), torch.nan, max_logit)
    lse = torch.where(torch.isneginf(max_logit), max_logit, max_logit - maximum.log())
    return mass, entropy, maximum, received, max_logit, lse


def _arguments(inputs: PagedAttentionStatisticsInputs) -> dict[str, Any]:
    """The named arguments of both kernels. The query stands in for absent groups."""
    query, cache, groups = inputs.query, inputs.key_cache, inputs.key_groups
    query = query if query.stride(-1) == 1 or query.shape[-1] <= 1 else query.contiguous()
    blocks, key_heads, size, head_dim = cache.shape
    stride_block, stride_head, stride_place, stride_d = cache.stride()
    table = _rows_in_line(inputs.block_table)
    groups = None if groups is None else _rows_in_line(groups)
    of_cache = Cache(
        p=cache,
        stride_block=stride_block,
        stride_head=stride_head,
        stride_place=stride_place,
        stride_d=stride_d,
        blocks=blocks,
        block_size=size,
        p_table=table,
        stride_table=table.stride(0),
        p_lengths=inputs.lengths.contiguous(),
        p_starts=inputs.query_starts.contiguous(),
        R=table.shape[0],
        W=table.shape[1],
    )
    x = Call(
        p_query=query,
        stride_t=query.stride(0),
        stride_h=query.stride(1),
        cache=of_cache,
        groups=(query, 0, 0) if groups is None else (groups, groups.stride(0), groups.shape[1]),
        T=query.shape[0],
        H=query.shape[1],
        Hk=key_heads,
        G=inputs.num_groups,
        window=inputs.window,
        scale_log2=inputs.scale * LOG2_E,
        parameter=None if inputs.score == "dot" else inputs.parameter,
    )
    heads = query.shape[1] // key_heads
    constants = Constants(
        D=head_dim,
        BLOCK_D=block_size(head_dim),
        HEADS=heads,
        GROUP=block_size(heads, 1),
        BLOCK_R=block_size(inputs.lengths.shape[0] + 1, 2),
        SPLIT=query.dtype != torch.float32,
        WINDOW=inputs.window > 0,
        PRECISION=input_precision(),
    )
    return {"x": x, "C": constants}


def _rows_in_line(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def _rows_kernel(
    x,
    p_mass,
    p_rows,
    tiles,
    blocks_g,
    ENTROPY: tl.constexpr,
    MASS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    C: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """The statistics of a tile of tokens of one request, for the query heads that share a key head, by one pass over the keys j.

    x_ij  = the base-2 logit - max_i, e_ij = 2^x_ij       max_i      = the largest logit, -inf in a row without keys
    sum_i = sum_j e_ij                                    maximum_i  = 1 / sum_i
    log_i = sum_j e_ij x_ij                               entropy_i  = ln 2 (log2 sum_i - log_i / sum_i)
    mass_ig = sum_j e_ij [j in group g] / sum_i
    When a tile changes max_i, with change = old - new max and alpha = 2^change, the earlier sums become
    sum_i alpha, (log_i + sum_i change) alpha, mass_ig alpha.
    """
    p_query, stride_t, stride_h, cache, groups, T, H, Hk, G, window, scale_log2, parameter = x
    i = tl.program_id(0).to(tl.int64)  # offsets are products of these numbers
    i_hk, i_g = i % Hk, i // Hk % blocks_g  # neighbours have the same request
    i_tile = i // (Hk * blocks_g)
    BLOCK_T: tl.constexpr = BLOCK_Q // C.GROUP
    i_r, first, end = _request_of(cache, i_tile, T, BLOCK_T, C)
    if first < end:
        ahead, last_key = _positions(cache, i_r, end, BLOCK_T, first)
        o_q, o_d = tl.arange(0, BLOCK_Q), tl.arange(0, C.BLOCK_D)
        o_t, i_h = first + o_q // C.GROUP, i_hk * C.HEADS + o_q % C.GROUP
        m_row = (o_t < end) & (o_q % C.GROUP < C.HEADS)
        b_q = _load_query(p_query, stride_t, stride_h, o_t, i_h, o_d, m_row, C)  # [q,D]
        o_position = _position(o_t, ahead)
        o_g = i_g * BLOCK_G + tl.arange(0, BLOCK_G)
        b_max = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
        b_sum = tl.zeros([BLOCK_Q], dtype=tl.float32)
        b_log = b_sum
        b_mass = tl.zeros([BLOCK_Q, BLOCK_G], dtype=tl.float32)
        low = tl.maximum(_position(first, ahead) - window + 1, 0) // BLOCK_KV * BLOCK_KV if C.WINDOW else 0
        for start in range(low, last_key, BLOCK_KV):
            o_kv = start + tl.arange(0, BLOCK_KV)
            b_k, m_kv = _load_keys(cache, i_r, i_hk, o_kv, last_key, o_d, C)  # [kv,D]
            b_s = _logits(b_q, b_k, o_position, o_kv, m_kv, window, scale_log2, parameter, C)  # [q,kv]
            b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
            b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_x, b_change = b_s - b_shift[:, None], b_max - b_shift
            if ENTROPY:  # where 2^x is 0 x stays a number, so that x 2^x is one
                b_x = tl.maximum(b_x, -160.0, propagate_nan=tl.PropagateNan.ALL)
                b_change = tl.maximum(b_change, -160.0, propagate_nan=tl.PropagateNan.ALL)
            b_e, b_alpha = tl.exp2(b_x), tl.exp2(b_change)
            b_max = b_new
            if ENTROPY:  # before sum_i changes: e x becomes e alpha (x + change)
                b_log = (b_log + b_sum * b_change) * b_alpha + tl.sum(b_e * b_x, axis=1)
            b_sum = b_sum * b_alpha + tl.sum(b_e, axis=1)
            if MASS:
                b_group = tl.load(groups[0] + i_r * groups[1] + o_kv, mask=o_kv < groups[2], other=-1)
                b_member = (b_group[:, None] == o_g[None, :]) & (o_g < G)[None, :]  # [kv,G]
                b_mass = b_mass * b_alpha[:, None] + dot_members(b_e, b_member, tl.float16, C.SPLIT, C.PRECISION)
        b_empty = b_sum == 0.0
        b_total = tl.where(b_empty, 1.0, b_sum)
        b_inverse = 1.0 / b_total
        o_row = o_t * H + i_h
        if i_g == 0:  # programs that differ in their groups alone have the same rows: one stores them
            if ENTROPY:
                b_entropy = 0.6931471805599453 * (tl.log2(b_total) - b_log * b_inverse)
                tl.store(p_rows[0] + o_row, tl.where(b_empty, 0.0, b_entropy), mask=m_row)
            tl.store(p_rows[1] + o_row, tl.where(b_empty, 0.0, b_inverse), mask=m_row)
            tl.store(p_rows[2] + o_row, b_max, mask=m_row)
        if MASS:
            m_mass = m_row[:, None] & (o_g < G)[None, :]
            tl.store(p_mass + o_row[:, None] * G + o_g[None, :], b_mass * b_inverse[:, None], mask=m_mass)


@triton.jit
def _received_kernel(x, p_maximum, p_row_max, p_received, C: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr):
    """The attention that a tile of keys j of a request receives in one query head, by a pass over the tokens i that see some.

    P_ij       = 2^(x_ij - max_i) maximum_i with base-2 logits x_ij, and both rows from `_rows_kernel`; 0 where i does not see j
    received_j = sum_i P_ij
    """
    p_query, stride_t, stride_h, cache, groups, T, H, Hk, G, window, scale_log2, parameter = x
    room = cache.W * cache.block_size
    blocks = tl.cdiv(room, BLOCK_KV)
    i = tl.program_id(0).to(tl.int64)
    i_h, i_kv, i_r = i % H, i // H % blocks, i // (H * blocks)  # heads that share keys are neighbours
    o_kv = i_kv.to(tl.int32) * BLOCK_KV + tl.arange(0, BLOCK_KV)
    o_d = tl.arange(0, C.BLOCK_D)
    first, end = _tokens_of(cache, i_r, T)
    ahead, last_key = _positions(cache, i_r, end, end - first, first)
    begin = tl.maximum(first, i_kv * BLOCK_KV - ahead)  # the first token that sees the first key
    if C.WINDOW:
        end = tl.minimum(end, i_kv * BLOCK_KV + BLOCK_KV - 1 + window - ahead)
    b_received = tl.zeros([BLOCK_KV], dtype=tl.float32)
    if (begin < end) & (i_kv * BLOCK_KV < last_key):
        b_k, m_kv = _load_keys(cache, i_r, i_h // C.HEADS, o_kv, last_key, o_d, C)  # [kv,D]
        for start in range(begin, end, BLOCK_Q):
            o_t = start + tl.arange(0, BLOCK_Q)
            m_row = o_t < end
            b_q = _load_query(p_query, stride_t, stride_h, o_t, i_h, o_d, m_row, C)  # [q,D]
            o_position = _position(o_t, ahead)
            b_s = _logits(b_q, b_k, o_position, o_kv, m_kv, window, scale_log2, parameter, C)  # [q,kv]
            b_max = tl.load(p_row_max + o_t * H + i_h, mask=m_row, other=0.0)
            b_maximum = tl.load(p_maximum + o_t * H + i_h, mask=m_row, other=0.0)
            b_p = tl.exp2(b_s - tl.where(b_max == float("-inf"), 0.0, b_max)[:, None]) * b_maximum[:, None]
            m_pair = m_row[:, None] & _seen(o_position, o_kv, m_kv, window, C)
            b_received += tl.sum(tl.where(m_pair, b_p, 0.0), axis=0)
    tl.store(p_received + (i_r * H + i_h) * room + o_kv, b_received, mask=o_kv < room)


@triton.jit
def _tokens_of(cache, i_r, T):
    """The first token of a request and the one behind its last, 64 bits."""
    first = tl.maximum(tl.load(cache.p_starts + i_r).to(tl.int64), 0)
    return first, tl.minimum(tl.load(cache.p_starts + i_r + 1).to(tl.int64), T)


@triton.jit
def _request_of(cache, i_tile, T, BLOCK_T: tl.constexpr, C: tl.constexpr):
    """The request of a tile, and the tokens of the tile, at most BLOCK_T: none where the first is not below the second number.

    Tiles are counted so that request r begins with tile starts[r] / BLOCK_T + r: no request before it needs more.
    """
    o_r = tl.arange(0, C.BLOCK_R)
    b_start = tl.load(cache.p_starts + o_r, mask=o_r < cache.R, other=0)
    m_begun = (o_r < cache.R) & (b_start // BLOCK_T + o_r <= i_tile)
    i_r = tl.maximum(tl.sum(m_begun.to(tl.int64), axis=0) - 1, 0)
    begin, end = _tokens_of(cache, i_r, T)
    first = begin + (i_tile - begin // BLOCK_T - i_r) * BLOCK_T
    return i_r, first, tl.minimum(end, first + BLOCK_T)


@triton.jit
def _positions(cache, i_r, end, count, first):
    """The difference from a token's number to its position, and the key behind the last that a token before `end` sees.

    Numbers of keys have 32 bits: a block's number is a quotient, which takes a function call for 64.
    """
    ahead = tl.load(cache.p_lengths + i_r).to(tl.int64) - tl.load(cache.p_starts + i_r + 1).to(tl.int64)
    room = (cache.W * cache.block_size).to(tl.int64)
    last_key = tl.minimum(tl.minimum(end, first + count) + ahead, room)
    return ahead, tl.maximum(last_key, 0).to(tl.int32)


@triton.jit
def _position(o_t, ahead):
    """The positions of tokens in 32 bits. Lengths that nobody has checked may give any number."""
    return tl.minimum(tl.maximum(o_t + ahead, -1), 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _load_query(p_query, stride_t, stride_h, o_t, i_h, o_d, m_row, C: tl.constexpr):
    offsets = o_t * stride_t + i_h * stride_h
    return tl.load(p_query + offsets[:, None] + o_d[None, :], mask=m_row[:, None] & (o_d < C.D)[None, :], other=0.0)


@triton.jit
def _load_keys(cache, i_r, i_hk, o_kv, last_key, o_d, C: tl.constexpr):
    """[kv,D] of a request's keys below last_key, zeros for others, and which of them lie in a block that the cache has."""
    m_kv = o_kv < last_key
    b_block = tl.load(cache.p_table + i_r * cache.stride_table + o_kv // cache.block_size, mask=m_kv, other=-1).to(tl.int64)
    m_kv = m_kv & (b_block >= 0) & (b_block < cache.blocks)
    o_place = (o_kv % cache.block_size).to(tl.int64)
    offsets = b_block * cache.stride_block + i_hk * cache.stride_head + o_place * cache.stride_place
    m_key = m_kv[:, None] & (o_d < C.D)[None, :]
    return tl.load(cache.p + offsets[:, None] + o_d.to(tl.int64)[None, :] * cache.stride_d, mask=m_key, other=0.0), m_kv


@triton.jit
def _seen(o_position, o_kv, m_kv, window, C: tl.constexpr):
    m_seen = m_kv[None, :] & (o_kv[None, :] <= o_position[:, None])
    if C.WINDOW:
        m_seen = m_seen & (o_kv[None, :] > o_position[:, None] - window)
    return m_seen


@triton.jit
def _logits(b_q, b_k, o_position, o_kv, m_kv, window, scale_log2, parameter, C: tl.constexpr):
    """[q,kv] in base 2; -inf where a query does not see a key."""
    b_s = dot(b_q, tl.trans(b_k), C.PRECISION)
    if parameter is not None:
        b_s, _ = softcapped(b_s, parameter, C)
    return tl.where(_seen(o_position, o_kv, m_kv, window, C), b_s * scale_log2, float("-inf"))
