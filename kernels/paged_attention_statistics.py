"""paged_attention_statistics in Triton: statistics of packed queries over keys in the blocks of a cache.

Shapes: query (T, H, D), key_cache (blocks, Hk, block size, D) of any strides, block_table (R, W), lengths (R), starts (R + 1),
key_groups (R, K); mass (T, H, G), entropy, maximum, max_logit, lse (T, H), received (R, H, M), M = W block size.
Roofline: HBM for decoding, where each key is read once for all query heads that share it, and `received` writes and reads a
float32 for each pair. For prompts a matrix product and an exponential per pair, in each of two passes if `received` is asked for.
Trick: the host reads no value. T tokens of R requests have at most T / BLOCK_T + R tiles of BLOCK_T tokens of one request: so
many programs run for each key head, find their request in `starts`, and those without tokens end at once. The rows of a tile are
the tokens of all query heads that share keys. With few tokens a request (`few`) the keys of a tile are split into parts, and
`_rows_kernel` keeps the logits for `received`, at most four times its size. Part sizes follow from the keys that the tile sees,
so that bits are the same in any table and batch; the table's width says how many parts there may be.
Measured on an H100: docs/operators.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlattn_fast.backends.inputs import PagedAttentionStatisticsInputs
from vlattn_fast.kernels._configurations import Config, configuration
from vlattn_fast.kernels._device import on_device
from vlattn_fast.kernels._key_groups import dot_members
from vlattn_fast.kernels._scores import softcapped
from vlattn_fast.kernels._tiles import FEWEST_KEYS, LOG2_E, block_size, cdiv, dot, input_precision, launched

MOST_GROUPS = 64  # whose masses a program sums; other programs sum the others
MOST_PARTS = 32  # of the keys of few tokens: with eight key heads one request has two programs for each SM


class Constants(NamedTuple):
    """D: features. HEADS: query heads that share a key head, GROUP: a power of two that holds them. SPLIT: see `dot_members`.
    BLOCK_R holds the number of requests + 1. BLOCK_SIZE: keys of a block, by which kernels divide."""

    D: int
    BLOCK_D: int
    BLOCK_SIZE: int
    HEADS: int
    GROUP: int
    BLOCK_R: int
    SPLIT: bool
    WINDOW: bool
    PRECISION: str
    ENTROPY: bool = False
    MASS: bool = False
    MOST_PARTS: int = 0
    FEWEST_KEYS: int = 0
    BLOCK_G: int = 0
    BLOCK_Q: int = 0
    BLOCK_KV: int = 0


class Cache(NamedTuple):
    """key_cache with its strides and the number of blocks, and where each request's keys lie. R requests have W blocks each."""

    p: Tensor
    stride_block: int
    stride_head: int
    stride_place: int
    stride_d: int
    blocks: int
    p_table: Tensor
    stride_table: int
    p_lengths: Tensor
    p_starts: Tensor
    R: int
    W: int


class PagedCall(NamedTuple):
    """The kernels that read keys take it, as x. groups: a tensor, its stride of requests, and K. parameter: see `softcapped`;
    None without."""

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


class Parts(NamedTuple):
    """Sums over `number` parts of the keys that a row sees. rows (3, number, T, H) and its first stride: the largest logit in
    base 2 and, over e = 2^(logit - largest), sum e and sum e (logit - largest). mass (number, T, H, G): sum e of each group. All
    are 0 for a part without keys."""

    number: int
    rows: Tensor
    stride: int
    mass: Tensor


class Rows(NamedTuple):
    """Statistics of rows (T, H), mass (T, H, G). row_max: the largest logit in base 2."""

    mass: Tensor
    entropy: Tensor
    maximum: Tensor
    row_max: Tensor
    max_logit: Tensor
    lse: Tensor


@on_device
def forward(inputs: PagedAttentionStatisticsInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """mass (T, H, G), entropy, maximum (T, H), received (R, H, M), max_logit, lse (T, H); anything for what `statistics` does not
    name."""
    query, asked, groups = inputs.query, inputs.statistics.split(), inputs.num_groups
    (tokens, heads, size), (requests, columns), key_heads = query.shape, inputs.block_table.shape, inputs.key_cache.shape[1]
    room, receives = columns * inputs.key_cache.shape[2], "received" in asked
    empty = tokens * heads == 0 or requests * columns == 0
    new = functools.partial(query.new_zeros if empty else query.new_empty, dtype=torch.float32)
    rows = Rows(new((tokens, heads, groups)), *(new((tokens, heads)) for _ in Rows._fields[1:]))
    received = new((requests, heads, room if receives else 0))
    if empty:
        return rows.mass, rows.entropy, rows.maximum, received, rows.max_logit.fill_(-torch.inf), rows.lse.fill_(-torch.inf)
    call = _arguments(inputs)
    group, few = call["C"].GROUP, tokens <= 4 * requests
    facts = {"dtype": query.dtype, "few": few, "size": size}
    config = _with_group(configuration("paged_attention_statistics", "rows", **facts), group)
    most_parts = MOST_PARTS if few else 1
    parts = _parts(query, min(most_parts, cdiv(room, FEWEST_KEYS)), groups)
    logits = query.new_empty((tokens, heads, room), dtype=torch.float32) if few and receives else None
    blocks_g = max(1, cdiv(groups, MOST_GROUPS))
    tiles = tokens // (config["BLOCK_Q"] // group) + requests
    asks, of_groups = {"ENTROPY": "entropy" in asked}, {"MASS": groups > 0, "BLOCK_G": min(MOST_GROUPS, block_size(groups))}
    _rows_kernel[(tiles * parts.number * blocks_g * key_heads,)](
        **launched(call, config, **asks, **of_groups, MOST_PARTS=most_parts, FEWEST_KEYS=FEWEST_KEYS),
        parts=parts,
        p_logits=logits,
        blocks_g=blocks_g,
    )
    block_parts = block_size(parts.number, 1)
    block_rows = max(1, 256 // block_parts)
    _join_kernel[(cdiv(tokens * heads, block_rows),)](
        parts=parts,
        rows=rows,
        ROWS=tokens * heads,
        G=groups,
        **asks,
        BLOCK_ROWS=block_rows,
        BLOCK_PARTS=block_parts,
        BLOCK_G=block_size(min(groups, 4), 1),
        num_warps=1,
        enable_fp_fusion=True,
    )
    if receives:
        config = _with_group(configuration("paged_attention_statistics", "received", **facts), group)
        _received_kernel[(cdiv(room, config["BLOCK_KV"]) * requests * key_heads,)](
            **launched(call, config), rows=rows, p_logits=logits, p_received=received
        )
    return rows.mass, rows.entropy, rows.maximum, received, rows.max_logit, rows.lse


def _with_group(config: Config, group: int) -> Config:
    """A tile has at least one token, with all query heads that share keys, and as many warps more as rows."""
    times = max(1, group // config["BLOCK_Q"])
    return {**config, "BLOCK_Q": config["BLOCK_Q"] * times, "num_warps": min(config["num_warps"] * times, 16)}


def _parts(query: Tensor, number: int, groups: int) -> Parts:
    tokens, heads, _ = query.shape
    rows = query.new_zeros((3, number, tokens, heads), dtype=torch.float32)
    return Parts(number, rows, number * tokens * heads, query.new_zeros((number, tokens, heads, groups), dtype=torch.float32))


def _arguments(inputs: PagedAttentionStatisticsInputs) -> dict[str, Any]:
    """The named arguments of these kernels. The query stands in for absent groups."""
    query, cache, groups = inputs.query, inputs.key_cache, inputs.key_groups
    query = _rows_in_line(query)
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
        p_table=table,
        stride_table=table.stride(0),
        p_lengths=inputs.lengths.contiguous(),
        p_starts=inputs.query_starts.contiguous(),
        R=table.shape[0],
        W=table.shape[1],
    )
    x = PagedCall(
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
        BLOCK_SIZE=size,
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
def _rows_kernel(x, parts, p_logits, blocks_g, C: tl.constexpr):
    """`Parts` of a tile of tokens of one request, for the query heads that share a key head, by one pass over keys j of a part.

    x_ij  = the base-2 logit - max_i, e_ij = 2^x_ij       max_i  = the largest logit, -inf in a row without keys
    sum_i = sum_j e_ij                                    log_i  = sum_j e_ij x_ij
    mass_ig = sum_j e_ij [j in group g]
    When a tile changes max_i, with change = old - new max and alpha = 2^change, the earlier sums become
    sum_i alpha, (log_i + sum_i change) alpha, mass_ig alpha.
    p_logits: where (T, H, M) of them are stored, -inf for pairs that are not seen, or None.
    """
    p_query, stride_t, stride_h, cache, groups, T, H, Hk, G, window, scale_log2, parameter = x
    number, p_max, stride_parts, p_mass = parts
    i = tl.program_id(0).to(tl.int64)  # offsets are products of these numbers
    i_hk, i_g = i % Hk, i // Hk % blocks_g  # neighbours have the same request
    i_part, i_tile = i // (Hk * blocks_g) % number, i // (Hk * blocks_g * number)
    BLOCK_T: tl.constexpr = C.BLOCK_Q // C.GROUP
    i_r, first, end = _request_of(cache, i_tile, T, BLOCK_T, C)
    ahead, last_key = _positions(cache, i_r, end, BLOCK_T, first, C)
    low = tl.minimum(tl.maximum(_position(first, ahead) - window + 1, 0), last_key) // C.BLOCK_KV * C.BLOCK_KV if C.WINDOW else 0
    keys = tl.cdiv(tl.maximum(tl.cdiv(last_key - low, C.MOST_PARTS), C.FEWEST_KEYS), C.BLOCK_KV) * C.BLOCK_KV
    low += i_part.to(tl.int32) * keys
    last_key = tl.minimum(last_key, low + keys)
    if (first < end) & (low < last_key):
        o_q, o_d = tl.arange(0, C.BLOCK_Q), tl.arange(0, C.BLOCK_D)
        o_t, i_h, m_row = _rows_of(first, end, i_hk, o_q, C)
        b_q = _load_query(p_query, stride_t, stride_h, o_t, i_h, o_d, m_row, C)  # [q,D]
        o_position, o_row = _position(o_t, ahead), o_t * H + i_h
        o_g = i_g * C.BLOCK_G + tl.arange(0, C.BLOCK_G)
        b_max = tl.full([C.BLOCK_Q], float("-inf"), dtype=tl.float32)
        b_sum = tl.zeros([C.BLOCK_Q], dtype=tl.float32)
        b_log = b_sum
        b_mass = tl.zeros([C.BLOCK_Q, C.BLOCK_G], dtype=tl.float32)
        for start in range(low, last_key, C.BLOCK_KV):
            o_kv = start + tl.arange(0, C.BLOCK_KV)
            b_k, m_kv = _load_keys(cache, i_r, i_hk, o_kv, last_key, o_d, C)  # [kv,D]
            b_s = _logits(b_q, b_k, o_position, o_kv, m_kv, window, scale_log2, parameter, C)  # [q,kv]
            if p_logits is not None:
                room = cache.W * C.BLOCK_SIZE
                m_logit = (m_row & (i_g == 0))[:, None] & (o_kv < room)[None, :]
                tl.store(p_logits + o_row[:, None] * room + o_kv[None, :], b_s, mask=m_logit)
            b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
            b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_x, b_change = b_s - b_shift[:, None], b_max - b_shift
            if C.ENTROPY:  # where 2^x is 0 x stays a number, so that x 2^x is one
                b_x = tl.maximum(b_x, -160.0, propagate_nan=tl.PropagateNan.ALL)
                b_change = tl.maximum(b_change, -160.0, propagate_nan=tl.PropagateNan.ALL)
            b_e, b_alpha = tl.exp2(b_x), tl.exp2(b_change)
            b_max = b_new
            if C.ENTROPY:  # before sum_i changes: e x becomes e alpha (x + change)
                b_log = (b_log + b_sum * b_change) * b_alpha + tl.sum(b_e * b_x, axis=1)
            b_sum = b_sum * b_alpha + tl.sum(b_e, axis=1)
            if C.MASS:
                b_group = tl.load(groups[0] + i_r * groups[1] + o_kv, mask=o_kv < groups[2], other=-1)
                b_member = (b_group[:, None] == o_g[None, :]) & (o_g < G)[None, :]  # [kv,G]
                b_mass = b_mass * b_alpha[:, None] + dot_members(b_e, b_member, tl.float16, C.SPLIT, C.PRECISION)
        o_part = i_part * T * H + o_row
        if i_g == 0:  # programs that differ in their groups alone have the same rows: one stores them
            p_sum = p_max + stride_parts
            tl.store(p_max + o_part, b_max, mask=m_row)
            tl.store(p_sum + o_part, b_sum, mask=m_row)
            if C.ENTROPY:
                tl.store(p_sum + stride_parts + o_part, b_log, mask=m_row)
        if C.MASS:
            tl.store(p_mass + o_part[:, None] * G + o_g[None, :], b_mass, mask=m_row[:, None] & (o_g < G)[None, :])


@triton.jit
def _join_kernel(
    parts, rows, ROWS, G, ENTROPY: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_G: tl.constexpr
):
    """The statistics of a tile of rows i from the sums over parts p of their keys.

    row_max_i = max_p max_ip            change_ip = max_ip - row_max_i, alpha_ip = 2^change_ip
    sum_i     = sum_p sum_ip alpha_ip   maximum_i = 1 / sum_i        mass_ig = sum_p mass_ipg alpha_ip / sum_i
    log_i     = sum_p (log_ip + sum_ip change_ip) alpha_ip           entropy_i = ln 2 (log2 sum_i - log_i / sum_i)
    max_logit_i = ln 2 row_max_i        lse_i = max_logit_i + ln 2 log2 sum_i
    """
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_p = tl.arange(0, BLOCK_PARTS)
    m_row = o_row < ROWS
    o_part = o_p.to(tl.int64)[:, None] * ROWS + o_row[None, :]  # [part,row]
    m_part = (o_p < parts.number)[:, None] & m_row[None, :]
    p_sum = parts.rows + parts.stride
    b_part = tl.load(p_sum + o_part, mask=m_part, other=0.0)
    b_part_max = tl.where(b_part == 0.0, float("-inf"), tl.load(parts.rows + o_part, mask=m_part, other=0.0))
    b_max = tl.max(b_part_max, axis=0)
    b_change = b_part_max - tl.where(b_max == float("-inf"), 0.0, b_max)[None, :]
    if ENTROPY:  # 2^-160 is 0, and 0 times -160 a number
        b_change = tl.maximum(b_change, -160.0, propagate_nan=tl.PropagateNan.ALL)
    b_alpha = tl.exp2(b_change)
    b_sum = tl.sum(b_part * b_alpha, axis=0)
    b_empty = b_sum == 0.0
    b_sum = tl.where(b_empty, 1.0, b_sum)
    b_inverse = 1.0 / b_sum
    b_spread = 0.6931471805599453 * tl.log2(b_sum)
    if ENTROPY:
        b_log = tl.load(p_sum + parts.stride + o_part, mask=m_part, other=0.0)
        b_log = tl.sum((b_log + b_part * b_change) * b_alpha, axis=0)
        b_entropy = b_spread - 0.6931471805599453 * (b_log * b_inverse)
        tl.store(rows.entropy + o_row, tl.where(b_empty, 0.0, b_entropy), mask=m_row)
    tl.store(rows.maximum + o_row, tl.where(b_empty, 0.0, b_inverse), mask=m_row)
    tl.store(rows.row_max + o_row, b_max, mask=m_row)
    b_logit = b_max * 0.6931471805599453
    b_logit = tl.where((b_sum != b_sum) & (b_logit != float("inf")), float("nan"), b_logit)  # a maximum loses NaN
    tl.store(rows.max_logit + o_row, b_logit, mask=m_row)
    tl.store(rows.lse + o_row, b_logit + b_spread, mask=m_row)
    for start in range(0, G, BLOCK_G):
        o_g = start + tl.arange(0, BLOCK_G)
        m_mass = m_part[:, :, None] & (o_g < G)[None, None, :]
        b_mass = tl.load(parts.mass + o_part[:, :, None] * G + o_g[None, None, :], mask=m_mass, other=0.0)  # [part,row,G]
        b_mass = tl.sum(b_mass * b_alpha[:, :, None], axis=0) * b_inverse[:, None]
        tl.store(rows.mass + o_row[:, None] * G + o_g[None, :], b_mass, mask=m_row[:, None] & (o_g < G)[None, :])


@triton.jit
def _received_kernel(x, rows, p_logits, p_received, C: tl.constexpr):
    """The attention that a tile of keys j of a request receives in the query heads that share a key head, by a pass over the
    tokens i that see some.

    P_ij       = 2^(x_ij - max_i) maximum_i with base-2 logits x_ij, and both rows from `_join_kernel`; 0 where i does not see j
    received_j = sum_i P_ij
    p_logits: those that `_rows_kernel` has stored. None: they are computed again.
    """
    p_query, stride_t, stride_h, cache, groups, T, H, Hk, G, window, scale_log2, parameter = x
    room = cache.W * C.BLOCK_SIZE
    blocks = tl.cdiv(room, C.BLOCK_KV)
    i = tl.program_id(0).to(tl.int64)
    i_hk, i_kv, i_r = i % Hk, i // Hk % blocks, i // (Hk * blocks)
    BLOCK_T: tl.constexpr = C.BLOCK_Q // C.GROUP
    o_kv = i_kv.to(tl.int32) * C.BLOCK_KV + tl.arange(0, C.BLOCK_KV)
    o_q, o_d = tl.arange(0, C.BLOCK_Q), tl.arange(0, C.BLOCK_D)
    first, end = _tokens_of(cache, i_r, T)
    ahead, last_key = _positions(cache, i_r, end, end - first, first, C)
    begin = tl.maximum(first, i_kv * C.BLOCK_KV - ahead)  # the first token that sees the first key
    if C.WINDOW:
        end = tl.minimum(end, i_kv * C.BLOCK_KV + C.BLOCK_KV - 1 + window - ahead)
    b_sum = tl.zeros([C.BLOCK_Q, C.BLOCK_KV], dtype=tl.float32)  # summed over tokens once, at the end
    if (begin < end) & (i_kv * C.BLOCK_KV < last_key):
        if p_logits is None:
            b_k, m_kv = _load_keys(cache, i_r, i_hk, o_kv, last_key, o_d, C)  # [kv,D]
        else:
            _, m_kv = _blocks_of(cache, i_r, o_kv, last_key, C)
        for start in range(begin, end, BLOCK_T):
            o_t, i_h, m_row = _rows_of(start, end, i_hk, o_q, C)
            o_position, o_row = _position(o_t, ahead), o_t * H + i_h
            m_pair = m_row[:, None] & _seen(o_position, o_kv, m_kv, window, C)
            if p_logits is None:
                b_q = _load_query(p_query, stride_t, stride_h, o_t, i_h, o_d, m_row, C)  # [q,D]
                b_s = _logits(b_q, b_k, o_position, o_kv, m_kv, window, scale_log2, parameter, C)  # [q,kv]
            else:
                m_logit = m_row[:, None] & _stored(o_position, o_kv, room, window, C)
                b_s = tl.load(p_logits + o_row[:, None] * room + o_kv[None, :], mask=m_logit, other=float("-inf"))
            b_max = tl.load(rows.row_max + o_row, mask=m_row, other=0.0)
            b_maximum = tl.load(rows.maximum + o_row, mask=m_row, other=0.0)
            b_p = tl.exp2(b_s - tl.where(b_max == float("-inf"), 0.0, b_max)[:, None]) * b_maximum[:, None]
            b_sum += tl.where(m_pair, b_p, 0.0)
    b_received = tl.sum(tl.reshape(b_sum, [BLOCK_T, C.GROUP, C.BLOCK_KV]), axis=0)
    o_h = tl.arange(0, C.GROUP)
    o_received = (i_r * H + i_hk * C.HEADS + o_h[:, None]) * room + o_kv[None, :]
    tl.store(p_received + o_received, b_received, mask=(o_h < C.HEADS)[:, None] & (o_kv < room)[None, :])


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
def _positions(cache, i_r, end, count, first, C: tl.constexpr):
    """The difference from a token's number to its position, and the key behind the last that a token before `end` sees.

    Numbers of keys have 32 bits: a block's number is a quotient, which takes a function call for 64.
    """
    ahead = tl.load(cache.p_lengths + i_r).to(tl.int64) - tl.load(cache.p_starts + i_r + 1).to(tl.int64)
    room = (cache.W * C.BLOCK_SIZE).to(tl.int64)
    last_key = tl.minimum(tl.minimum(end, first + count) + ahead, room)
    return ahead, tl.maximum(last_key, 0).to(tl.int32)


@triton.jit
def _position(o_t, ahead):
    """The positions of tokens in 32 bits. Lengths that nobody has checked may give any number."""
    return tl.minimum(tl.maximum(o_t + ahead, -1), 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _rows_of(first, end, i_hk, o_q, C: tl.constexpr):
    """The tokens and query heads of a tile's rows, and which rows have one."""
    o_t, o_h = first + o_q // C.GROUP, o_q % C.GROUP
    return o_t, i_hk * C.HEADS + o_h, (o_t < end) & (o_h < C.HEADS)


@triton.jit
def _load_query(p_query, stride_t, stride_h, o_t, i_h, o_d, m_row, C: tl.constexpr):
    offsets = o_t * stride_t + i_h * stride_h
    return tl.load(p_query + offsets[:, None] + o_d[None, :], mask=m_row[:, None] & (o_d < C.D)[None, :], other=0.0)


@triton.jit
def _blocks_of(cache, i_r, o_kv, last_key, C: tl.constexpr):
    """The blocks of a request's keys, 64 bits, and which keys lie below last_key and in a block that the cache has."""
    m_kv = o_kv < last_key
    b_block = tl.load(cache.p_table + i_r * cache.stride_table + o_kv // C.BLOCK_SIZE, mask=m_kv, other=-1)
    return b_block.to(tl.int64), m_kv & (b_block >= 0) & (b_block < cache.blocks)


@triton.jit
def _load_keys(cache, i_r, i_hk, o_kv, last_key, o_d, C: tl.constexpr):
    """[kv,D] of `_blocks_of`, zeros for keys that are in no block, and which are in one."""
    b_block, m_kv = _blocks_of(cache, i_r, o_kv, last_key, C)
    o_place = (o_kv % C.BLOCK_SIZE).to(tl.int64)
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
def _stored(o_position, o_kv, room, window, C: tl.constexpr):
    """Logits [q,kv] in whole vectors of four that `_rows_kernel` has stored: those of `_seen`, and a few of its tiles."""
    m_stored = (o_kv < room)[None, :] & (o_kv[None, :] < ((tl.minimum(o_position, room - 1) + 4) // 4 * 4)[:, None])
    if C.WINDOW:
        m_stored = m_stored & (o_kv[None, :] >= (tl.maximum(o_position - window + 1, 0) // 4 * 4)[:, None])
    return m_stored


@triton.jit
def _logits(b_q, b_k, o_position, o_kv, m_kv, window, scale_log2, parameter, C: tl.constexpr):
    """[q,kv] in base 2; -inf where a query does not see a key."""
    b_s = dot(b_q, tl.trans(b_k), C.PRECISION)
    if parameter is not None:
        b_s, _ = softcapped(b_s, parameter, C)
    return tl.where(_seen(o_position, o_kv, m_kv, window, C), b_s * scale_log2, float("-inf"))
