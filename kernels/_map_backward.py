"""The way back through Abar, the map of all heads, for relevancy_step and attention_map.

With w the gradient of a head's map E = relu(P dP): that of P is w dP where E > 0, and that of dP = dO V^T is w P there. For rule
"attention" E is P. Three passes, no atomics, and no tile outlives its turn. The first goes over the keys of each row for
sums of E: from them follow the gradient of relevancy and each row's delta = sum(w E). The second gives dQ and the gradient of dO;
the third, over the queries of each key, dK and dV. w holds the part that all heads have in common, as the sum of a row of Abar.
Roofline: tensor cores, 10 matrix products (rule "attention": 5), and one more in each pass over more than one carried row. Not
yet measured on a GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlattn_fast.backends.inputs import Attention
from vlattn_fast.kernels import score_attention
from vlattn_fast.kernels._configurations import Config, cached_launch, configuration
from vlattn_fast.kernels._group_bias import (
    FLOAT_MASK,
    GROUP_BIAS,
    add_group_sums,
    gradient_blocks,
    groups_of_tile,
    store_group_sums,
)
from vlattn_fast.kernels._products_backward import RowStats
from vlattn_fast.kernels._scores import activate, head_of, times_activation
from vlattn_fast.kernels._tiles import (
    CALLER_LSE,
    LOG2_E,
    ROW_MULTIPLE,
    Pairs,
    add_products,
    block_and_head,
    block_size,
    cdiv,
    dot,
    edge_block,
    head_tile,
    heads_of,
    key_tile,
    keys_at,
    keys_of_queries,
    launched,
    map_of,
    mask_logits,
    mask_tile,
    masks_at,
    pad_rows,
    padded_rows,
    queries_of_keys,
    real_tokens,
    relu,
    round_tf32,
    row_products,
    rows_and_head,
    seeing_queries_of_heads,
    steps_of,
    store_head,
    store_tile,
    tile_of,
    within,
    zero_sums,
)

MAX_T = 64  # carried rows in one product
BITS = tl.constexpr(32)  # heads in a word of `MapGradient.taken`


class MapGradient(NamedTuple):
    """w: a map (B, N, M), or r u^T of T columns r (B, padded N, T) and u (B, M, T), all float32 and contiguous.

    taken: (B, words, N, M) int32, a bit a head: whether w is the gradient of its map. None: it is that of every head's.
    """

    map: Tensor | None = None
    r: Tensor | None = None
    u: Tensor | None = None
    T: int = 0
    taken: Tensor | None = None


class Launch(NamedTuple):
    """The named arguments of a launch, from score_attention.arguments, and whether the rule is "gradient"."""

    call: dict[str, Any]
    by_gradient: bool
    row_bias: Tensor | None
    vector: Tensor | None

    @property
    def float_mask(self) -> bool:
        return self.call["C"].MASK >= FLOAT_MASK.value

    @property
    def pairs(self) -> int:
        x = self.call["x"]
        return x.q.p.shape[0] * x.H * x.N * x.M


def describe(x: Attention, value: Tensor | None, rule: str, grad_out: Tensor | None) -> Launch:
    call = score_attention.arguments(x, x.query if value is None else value, backward=True, grad_out=grad_out)
    return Launch(call, rule == "gradient", x.row_bias, None if x.vector is None else x.vector.contiguous())


def config_of(kernel: str, launch: Launch, block_t: int = 0) -> Config:
    x, constants = launch.call["x"], launch.call["C"]
    return _config(kernel, constants, x.q.p.dtype, x.N, x.M, block_t)


@cached_launch
def _config(
    kernel: str, constants: score_attention.Constants, dtype: torch.dtype, num_q: int, num_k: int, block_t: int
) -> Config:
    return configuration(
        "relevancy_attention",
        kernel,
        dtype=dtype,
        N=num_q,
        M=num_k,
        size=max(constants.A, constants.DV),
        block_t=block_t,
        masked=constants.MASK % GROUP_BIAS.value != 0,
        score=constants.SCORE,
    )


def statistics(launch: Launch, lse: Tensor | None, summed: bool = False, limit: tl.constexpr = CALLER_LSE) -> RowStats:
    """The statistics of rows, for their probabilities; with `summed` also the row sums of each head's part of Abar.

    They are exp(logit - lse) where there is an lse (B, H, N), which may count keys that are not here. Under a float mask, rows
    whose lse `is_coarse` are normalised over the keys that are here.
    """
    lse = None if lse is None else lse.to(torch.float32).contiguous()
    if lse is not None and not (summed or launch.float_mask):
        return RowStats(pad_rows(torch.where(lse == -torch.inf, torch.inf, lse * LOG2_E), torch.inf))
    pair = launch.float_mask or (lse is None and launch.call["C"].EXACT)
    config = config_of("statistics", launch)
    return score_attention.row_statistics(
        launch.call, config, lse, limit, pair, launch.vector, by_gradient=launch.by_gradient, summed=summed
    )


def sums(launch: Launch, rows: RowStats, w: MapGradient, u: Tensor | None = None, deltas: bool = False) -> tuple[Tensor, Tensor]:
    """Each head's products u E^T, (B, H, T, N), with at most MAX_T rows u (B, T, M), which w has as columns, and its `deltas`,
    sums of w E over the keys, (B, H, N); zeros where they are not asked for. N is padded.

    The terms of a delta are those from which `gradients` subtracts it: where a row has one key, nothing is left.
    """
    query = launch.call["x"].q.p
    shape = *query.shape[:2], padded_rows(query.shape[2])
    u_map = query.new_zeros((*shape[:2], 0 if u is None else w.T, shape[2]), dtype=torch.float32)
    delta = query.new_zeros(shape, dtype=torch.float32)
    if launch.pairs > 0 and (w.map is not None or w.T > 0):
        config, arguments = _arguments("map_backward_rows", launch, rows, w)
        _map_backward_rows_kernel[(shape[2] // config["BLOCK_Q"] * shape[0] * shape[1],)](
            **arguments, p_u=u, p_u_map=u_map, p_delta=delta if deltas else None
        )
    return u_map, delta


def gradients(
    launch: Launch, rows: RowStats, w: MapGradient, delta: Tensor, lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Those of query, key, value, grad_output (None for both where the rule is "attention"), lse and row_bias.

    lse: None where it counts as computed from query and key; else P = exp(logit - lse) has a gradient by each. delta: the sums of
    w E of each row, (B, H, N), N padded.
    """
    x = launch.call["x"]
    batch, heads, num_q, _ = x.q.p.shape
    heads_kv, num_kv = x.k.p.shape[1:3]
    grad_q, grad_k = (torch.zeros_like(side.p, memory_format=torch.contiguous_format) for side in (x.q, x.k))
    grad_v = grad_do = None
    if launch.by_gradient:
        grad_v, grad_do = (torch.zeros_like(side.p, memory_format=torch.contiguous_format) for side in (x.v, x.grad))
    grad_bias, blocks = gradient_blocks(launch.row_bias)
    if launch.pairs > 0 and (w.map is not None or w.T > 0):
        scaled, unit = _in_units(w, x.q.p)
        rows = rows._replace(delta=None if lse is not None else delta if unit is None else delta / unit)
        for p_grad_bias, first_group, block_g in blocks:
            config, arguments = _arguments("map_backward_q", launch, rows, scaled, block_g)
            _map_backward_q_kernel[(padded_rows(num_q) // config["BLOCK_Q"] * batch * heads,)](
                **arguments,
                grad_q=heads_of(grad_q),
                grad_do=None if grad_do is None else heads_of(grad_do),
                p_unit=unit,
                p_grad_bias=p_grad_bias,
                first_group=first_group,
            )
        config, arguments = _arguments("map_backward_kv", launch, rows, scaled)
        _map_backward_kv_kernel[(cdiv(num_kv, config["BLOCK_KV"]) * batch * heads_kv,)](
            **arguments, grad_k=heads_of(grad_k), grad_v=None if grad_v is None else heads_of(grad_v), p_unit=unit
        )
    grad_lse = None if lse is None else -delta[..., :num_q].to(lse.dtype)
    return grad_q, grad_k, grad_v, grad_do, grad_lse, grad_bias


def _in_units(w: MapGradient, like: Tensor) -> tuple[MapGradient, Tensor | None]:
    """w / unit and the unit, (1,), for float16, which would round w P to 0 where w is small; else w and None."""
    if like.dtype != torch.float16:
        return w, None
    unit = like.new_ones(1, dtype=torch.float32)
    for x in (w.map, w.r, w.u):
        if x is not None:
            unit = unit * x.abs().amax()
    unit = torch.where((unit > 0) & unit.isfinite(), unit, 1.0)
    unit = torch.ldexp(torch.ones_like(unit), torch.frexp(unit).exponent)  # a power of two: nothing is rounded
    return w._replace(map=None if w.map is None else w.map / unit, r=None if w.r is None else w.r / unit), unit


def taken(launch: Launch, rows: RowStats, head_reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    """Which heads' maps are the largest ("max") or smallest of all, as `MapGradient` says, how many of them, and this map, both
    (B, N, M). One kernel computes and compares them: maps of equal heads are equal to the bit."""
    query, num_kv = launch.call["x"].q.p, launch.call["x"].M
    batch, heads, num_q, _ = query.shape
    words = cdiv(heads, BITS.value)
    bits = query.new_zeros((batch, words, num_q, num_kv), dtype=torch.int32)
    counts, maps = (torch.zeros_like(bits, dtype=torch.float32) for _ in range(2))
    if bits.numel() > 0:
        config, arguments = _arguments("map_taken", launch, rows, None)
        _map_taken_kernel[(cdiv(num_q, config["BLOCK_Q"]) * cdiv(num_kv, config["BLOCK_KV"]) * batch * words,)](
            **arguments, p_bits=bits, p_counts=counts, p_maps=maps, LEAST=head_reduction == "min"
        )
    result = maps.amin(1, keepdim=True) if head_reduction == "min" else maps.amax(1, keepdim=True)
    if words > 1:
        bits, counts = (torch.where(maps == result, x, 0) for x in (bits, counts))
    return bits, counts.sum(1), result[:, 0]


def _arguments(
    kernel: str, launch: Launch, rows: RowStats, w: MapGradient | None, block_g: int = 0
) -> tuple[Config, dict[str, Any]]:
    """The configuration of a launch, and the named arguments that all kernels here share."""
    num_t, x, constants = 0 if w is None else w.T, launch.call["x"], launch.call["C"]
    block_t = num_t if num_t <= 1 else min(MAX_T, block_size(num_t))
    precision = constants.PRECISION if constants.EXACT or constants.PRECISION == "widen" else "tf32"
    config = config_of(kernel, launch, block_t)
    of_loop = (x.N, config["BLOCK_Q"]) if kernel == "map_backward_kv" else (x.M, config["BLOCK_KV"])
    call = launched(
        launch.call,
        config,
        BY_GRADIENT=launch.by_gradient,
        BLOCK_EDGE=edge_block(*of_loop, constants.CAUSAL),
        BLOCK_T=block_t,
        BLOCK_G=block_g,
        MANY=num_t > MAX_T,
        CARRIED=precision,
        ROUND=not constants.EXACT or precision == "tf32",
    )
    return config, {**call, "stats": rows._replace(sums=None), "w": w}


@triton.jit
def _load_tile(p, offsets, mask, T):
    """float32 or int32 numbers of the loop's next tile, 0 where the mask is not. T is any number that is not negative.

    The branch is always taken. It keeps the compiler from copying the numbers to shared memory ahead of time: there rows lie one
    below another, and the lanes of a product's layout meet in a few banks. On sm_90 maps took three times as many wavefronts so.
    """
    b = tl.zeros(offsets.shape, dtype=p.dtype.element_ty)
    if T >= 0:
        b = tl.load(p + offsets, mask=mask, other=0)
    return b


@triton.jit
def _carried(p, o, o_t, stride, stride_t, size, T, SAME: tl.constexpr):
    """[x,T] of T columns or rows, or [x] of one. size: see `within`. SAME: all tiles of the loop have the same."""
    if o_t.shape[0] == 1:
        return tl.load(p + o, mask=within(o, size), other=0.0)
    else:
        offsets = o[:, None].to(tl.int64) * stride + o_t[None, :].to(tl.int64) * stride_t
        m = within(o, size)[:, None] & (o_t < T)[None, :]
        return tl.load(p + offsets, mask=m, other=0.0) if SAME else _load_tile(p, offsets, m, T)


@triton.jit
def _times_carried(b_x, b_y, C: tl.constexpr):
    """b_x b_y^T [x,y] of tiles of `_carried`."""
    if len(b_x.shape) == 1:
        return b_x[:, None] * b_y[None, :]
    else:
        if C.ROUND:
            b_x, b_y = round_tf32(b_x), round_tf32(b_y)
        return dot(b_x, tl.trans(b_y), C.CARRIED)


@triton.jit
def _add_carried(b_sums, b_map, b_u, C: tl.constexpr):
    """b_sums and b_map b_u, of b_map [q,kv] and b_u [kv,T], or [kv] of one row."""
    if len(b_u.shape) == 1:
        b_sums += tl.sum(b_map * b_u[None, :], axis=1)
    else:
        if C.ROUND:
            b_map, b_u = round_tf32(b_map), round_tf32(b_u)
        b_sums += dot(b_map, b_u, C.CARRIED)
    return b_sums


@triton.jit
def _carried_products(w, i_b, o_t, o_q, o_kv, N, M, KEY_MAJOR: tl.constexpr, C: tl.constexpr):
    """r u^T of the columns o_t, [q,kv] or KEY_MAJOR [kv,q]."""
    NP = tl.cdiv(N, ROW_MULTIPLE) * ROW_MULTIPLE
    b_r = _carried(w.r + i_b * NP * w.T, o_q, o_t, w.T, 1, None, w.T, not KEY_MAJOR)
    b_u = _carried(w.u + i_b * M * w.T, o_kv, o_t, w.T, 1, M, w.T, KEY_MAJOR)
    if KEY_MAJOR:
        return _times_carried(b_u, b_r, C)
    else:
        return _times_carried(b_r, b_u, C)


@triton.jit
def _gradient_of_map(w, i_b, i_h, o_q, o_kv, x, KEY_MAJOR: tl.constexpr, C: tl.constexpr):
    """w of a head, [q,kv] or KEY_MAJOR [kv,q]; 0 beyond N x M."""
    H, N, M = x.H, x.N, x.M
    if w.map is None:
        o_t = tl.arange(0, C.BLOCK_T)
        b_w = _carried_products(w, i_b, o_t, o_q, o_kv, N, M, KEY_MAJOR, C)
        if C.MANY:
            for start in range(C.BLOCK_T, w.T, C.BLOCK_T):
                b_w += _carried_products(w, i_b, start + o_t, o_q, o_kv, N, M, KEY_MAJOR, C)
    else:
        if KEY_MAJOR:
            o_pair = o_q.to(tl.int64)[None, :] * M + o_kv[:, None]
            m_pair = (o_kv < M)[:, None] & (o_q < N)[None, :]
        else:
            o_pair = o_q.to(tl.int64)[:, None] * M + o_kv[None, :]
            m_pair = (o_q < N)[:, None] & (o_kv < M)[None, :]
        b_w = _load_tile(w.map + i_b * N * M, o_pair, m_pair, w.T)
        # "max" and "min": the heads that do not have the largest or smallest map have no gradient
        if w.taken is not None:
            p_word = w.taken + (i_b * tl.cdiv(H, BITS) + i_h // BITS) * N * M
            b_word = _load_tile(p_word, o_pair, m_pair, w.T)
            b_w = tl.where(((b_word >> (i_h % BITS).to(tl.int32)) & 1) != 0, b_w, 0.0)
    return b_w


@triton.jit
def _rounded_product(b_x, b_y, EXACT: tl.constexpr):
    """x y; if EXACT rounded as the terms of a delta are, from which the compiler else subtracts delta before it rounds."""
    return tl.fma(b_x, b_y, 0.0) if EXACT else b_x * b_y


@triton.jit
def row_numbers(stats, o_row):
    """The shift and 1 / total of rows."""
    b_inverse = tl.full(o_row.shape, 1.0, dtype=tl.float32)
    if stats.total is not None:  # one division a row, not one a pair
        b_inverse = tl.div_rn(1.0, tl.load(stats.total + o_row))
    return tl.load(stats.shift + o_row), b_inverse


@triton.jit
def _probabilities(t_q, t_k, b_shift, b_inverse, masks, start, o_q, o_kv, x, EDGE: tl.constexpr, C: tl.constexpr):
    """P [q,kv], and the slopes that `times_activation` takes."""
    b_x = row_products(t_q, t_k, C.A, C.PRECISION)
    b_s, b_slope = activate(b_x, None, x.parameter, EDGE, C)
    b_logit = mask_tile(b_s * x.scale_log2, Pairs(masks, start, o_q, o_kv, x.N, x.M), C, EDGE)
    return tl.exp2(b_logit - b_shift[:, None]) * b_inverse[:, None], b_slope


@triton.jit
def _tile_of_queries(x, stats, C: tl.constexpr):
    """A program's tile: its indices, its head's keys, values and masks, the queries, dO where the rule is "gradient" (else the
    queries again), and what makes probabilities of logits."""
    N = x.N
    NP = tl.cdiv(N, ROW_MULTIPLE) * ROW_MULTIPLE
    i_q, i_bh, i_b, i_h, i_hk = rows_and_head(NP // C.BLOCK_Q, x.H, C.GROUP_K, x.M * (C.A + C.DV), C.CAUSAL)
    p_q, p_k, p_v, _, _, masks = head_of(x, i_bh, i_b, i_h, i_hk, C)
    o_q = i_q * C.BLOCK_Q + tl.arange(0, C.BLOCK_Q)
    t_q = tile_of(p_q, x.q.stride_n, o_q, N, C.A, C.BLOCK_A)  # [q,A]
    t_do = t_q
    if C.BY_GRADIENT:
        t_do = head_tile(x.grad, i_b, i_h, o_q, N, C.DV, C.BLOCK_DV)  # [q,Dv]
    b_shift, b_inverse = row_numbers(stats, i_bh * NP + o_q)
    return (i_q, i_bh, i_b, i_h, i_hk), p_k, p_v, masks, o_q, t_q, t_do, b_shift, b_inverse


@triton.jit
def _map_backward_rows_kernel(x, stats, w, p_u, p_u_map, p_delta, C: tl.constexpr):
    """Sums over the keys j of the map E of one head, for a tile of its queries i.

    P_ij  = 2^(x_ij - shift_i) / total_i        dP_ij     = dO_i v_j
    E_ij  = relu(P_ij dP_ij), or P_ij           u_map_ti  = sum_j E_ij u_tj, where there are rows u
    w_ij  = sum_t r_it u_jt, or a map           delta_i   = sum_j w_ij E_ij, where deltas are asked for
    """
    N, M = x.N, x.M
    ONE: tl.constexpr = C.BLOCK_T <= 1
    NP = tl.cdiv(N, ROW_MULTIPLE) * ROW_MULTIPLE
    indices, p_k, p_v, masks, o_q, t_q, t_do, b_shift, b_inverse = _tile_of_queries(x, stats, C)
    i_q, i_bh, i_b, i_h, _ = indices
    o_t = tl.arange(0, C.BLOCK_T if C.BLOCK_T > 0 else 1)
    b_delta = tl.zeros([C.BLOCK_Q], dtype=tl.float32)
    b_u_map = tl.zeros([C.BLOCK_Q], dtype=tl.float32) if ONE else tl.zeros([C.BLOCK_Q, C.BLOCK_T], dtype=tl.float32)
    keys = keys_of_queries(i_q, o_q, masks, N, M, C)
    for EDGE in tl.static_range(2):
        steps = steps_of(keys, EDGE, C.BLOCK_KV, C)
        for step in range(steps.begin, steps.end, steps.size):
            start, o_kv = keys_at(step, steps, EDGE, C)
            t_k = tile_of(p_k, x.k.stride_n, o_kv, M if EDGE else None, C.A, C.BLOCK_A)  # [kv,A]
            b_map, b_slope = _probabilities(t_q, t_k, b_shift, b_inverse, masks, start, o_q, o_kv, x, EDGE, C)
            if C.BY_GRADIENT:
                t_v = key_tile(p_v, x.v.stride_n, masks.p_keys, o_kv, M if EDGE else None, C.DV, C.BLOCK_DV, C.KEY_MASK)
                b_map = map_of(b_map, row_products(t_do, t_v, C.DV, C.PRECISION), o_kv, M if EDGE else None)
            if p_delta is not None:
                b_delta += tl.sum(b_map * _gradient_of_map(w, i_b, i_h, o_q, o_kv, x, False, C), axis=1)
            if p_u is not None:
                # rows, not columns: a product over keys reads its operand with the keys of a row side by side
                b_u = _carried(p_u + i_b * M * w.T, o_kv, o_t, 1, M, M if EDGE else None, w.T, False)  # [kv,T]
                b_u_map = _add_carried(b_u_map, b_map, b_u, C)
    if p_delta is not None:
        tl.store(p_delta + i_bh * NP + o_q, tl.where(o_q < N, b_delta, 0.0))  # an infinite value makes NaN of padding
    if p_u is not None:
        if ONE:
            tl.store(p_u_map + i_bh * NP + o_q, tl.where(o_q < N, b_u_map, 0.0))
        else:
            offsets = (i_bh * w.T + o_t[None, :]) * NP + o_q[:, None]
            tl.store(p_u_map + offsets, tl.where((o_q < N)[:, None], b_u_map, 0.0), mask=(o_t < w.T)[None, :])


@triton.jit
def _map_backward_q_kernel(x, stats, w, grad_q, grad_do, p_unit, p_grad_bias, first_group, C: tl.constexpr):
    """dQ and the gradient of dO, for a tile of queries i of one head, from w, the gradient of its map E.

    w'_ij = w_ij where P_ij dP_ij > 0, else 0 (rule "attention": w_ij)
    ddo_i = sum_j w'_ij P_ij v_j
    dS_ij = P_ij (w'_ij dP_ij - delta_i)        rule "attention": P_ij (w_ij - delta_i)
    dq_i  = scale sum_j dS_ij score'(q_i k_j) k_j
    dbias_ig = sum_j dS_ij [j in group g], of BLOCK_G groups
    delta is that of `_map_backward_rows_kernel`, and 0 where P comes from the caller's log-sum-exp, which then has a gradient.
    In float16 w comes in units of p_unit, which the results are multiplied by.
    """
    N, M = x.N, x.M
    NP = tl.cdiv(N, ROW_MULTIPLE) * ROW_MULTIPLE
    indices, p_k, p_v, masks, o_q, t_q, t_do, b_shift, b_inverse = _tile_of_queries(x, stats, C)
    i_q, i_bh, i_b, i_h, _ = indices
    o_a = tl.arange(0, C.BLOCK_A)
    o_d = tl.arange(0, C.BLOCK_DV)
    b_dq = zero_sums(x.q.p.dtype.element_ty, C.BLOCK_Q, C.A, C.BLOCK_A)
    if C.BY_GRADIENT:
        b_ddo = zero_sums(x.q.p.dtype.element_ty, C.BLOCK_Q, C.DV, C.BLOCK_DV)
    if stats.delta is not None:
        b_delta = tl.load(stats.delta + i_bh * NP + o_q)
    if C.BLOCK_G > 0:
        b_bias = tl.zeros([C.BLOCK_Q, C.BLOCK_G], dtype=tl.float32)
    keys = keys_of_queries(i_q, o_q, masks, N, M, C)
    for EDGE in tl.static_range(2):
        steps = steps_of(keys, EDGE, C.BLOCK_KV, C)
        for step in range(steps.begin, steps.end, steps.size):
            start, o_kv = keys_at(step, steps, EDGE, C)
            t_k = key_tile(p_k, x.k.stride_n, masks.p_keys, o_kv, M if EDGE else None, C.A, C.BLOCK_A, C.KEY_MASK)  # [kv,A]
            b_p, b_slope = _probabilities(t_q, t_k, b_shift, b_inverse, masks, start, o_q, o_kv, x, EDGE, C)  # [q,kv]
            b_w = _gradient_of_map(w, i_b, i_h, o_q, o_kv, x, False, C)
            if C.BY_GRADIENT:
                t_v = key_tile(p_v, x.v.stride_n, masks.p_keys, o_kv, M if EDGE else None, C.DV, C.BLOCK_DV, C.KEY_MASK)
                b_dp = row_products(t_do, t_v, C.DV, C.PRECISION)  # [q,kv]
                b_w = tl.where(b_p * b_dp > 0.0, b_w, 0.0)  # w', by the product: where it underflows, E is 0
                b_ddo = add_products(b_ddo, b_w * b_p, t_v, C.DV, C.PRECISION)
                b_w = _rounded_product(b_w, b_dp, C.EXACT)
            if stats.delta is not None:
                b_w -= b_delta[:, None]
            b_ds = b_p * b_w
            if C.BLOCK_G > 0:
                b_bias = add_group_sums(
                    b_bias, b_ds, masks, groups_of_tile(masks, start, M, o_kv.shape[0], C.MASK), o_kv, M, first_group
                )
            if C.SCORE != "dot":  # a softcap
                b_ds = times_activation(b_ds, b_slope, C.SCORE)
            b_dq = add_products(b_dq, b_ds, t_k, C.A, C.PRECISION)
    unit = 1.0 if p_unit is None else tl.load(p_unit)
    store_head(grad_q, i_b, i_h, o_q, o_a, N, C.A, [b * (x.scale * unit) for b in b_dq])
    if C.BY_GRADIENT:
        store_head(grad_do, i_b, i_h, o_q, o_d, N, C.DV, [b * unit for b in b_ddo])
    if C.BLOCK_G > 0:
        store_group_sums(p_grad_bias, masks, i_bh, o_q, N, first_group, b_bias * unit)


@triton.jit
def _map_backward_kv_kernel(x, stats, w, grad_k, grad_v, p_unit, C: tl.constexpr):
    """dK and dV of a tile of keys j, over all queries i of the GROUP_K query heads that share it. Tiles are [kv,q].

    dv_j = sum_i w'_ij P_ij dO_i
    dk_j = scale sum_i dS_ij score'(q_i k_j) q_i, with w' and dS as in `_map_backward_q_kernel`
    """
    H, N, M = x.H, x.N, x.M
    i_kv, _, i_b, i_hk, _ = block_and_head(tl.cdiv(M, C.BLOCK_KV), H // C.GROUP_K, 1)
    NP = tl.cdiv(N, ROW_MULTIPLE) * ROW_MULTIPLE
    o_kv = i_kv * C.BLOCK_KV + tl.arange(0, C.BLOCK_KV)
    o_a = tl.arange(0, C.BLOCK_A)
    o_d = tl.arange(0, C.BLOCK_DV)
    # rows beyond N have P = 0, and keys are rows of the tiles below: those of padding are dropped at the end, without masks
    m_key = real_tokens(x.masks.p_keys + i_b * M, o_kv, M, C.KEY_MASK)
    t_k = head_tile(x.k, i_b, i_hk, o_kv, M, C.A, C.BLOCK_A)  # [kv,A]
    b_dk = zero_sums(x.q.p.dtype.element_ty, C.BLOCK_KV, C.A, C.BLOCK_A)
    if C.BY_GRADIENT:
        t_v = head_tile(x.v, i_b, i_hk, o_kv, M, C.DV, C.BLOCK_DV)  # [kv,Dv]
        b_dv = zero_sums(x.q.p.dtype.element_ty, C.BLOCK_KV, C.DV, C.BLOCK_DV)
    seeing = seeing_queries_of_heads(x.masks, i_b, i_hk * C.GROUP_K, C.GROUP_K, i_kv * C.BLOCK_KV, N, M, C.BLOCK_KV, C.MASK)
    queries = queries_of_keys(i_kv, seeing, N, C)
    for EDGE in tl.static_range(2):
        steps = steps_of(queries, EDGE, C.BLOCK_Q, C)
        first, last = steps.begin, steps.end
        num_q = tl.cdiv(last - first, C.BLOCK_EDGE if EDGE else C.BLOCK_Q)
        for j in range(num_q * C.GROUP_K):  # one loop over tiles and query heads of this key head: nested loops spill
            i_h = i_hk if C.GROUP_K == 1 else i_hk * C.GROUP_K + j // num_q
            i_q = j if C.GROUP_K == 1 else j % num_q
            o_q = first + (i_q * C.BLOCK_EDGE + tl.arange(0, C.BLOCK_EDGE) if EDGE else i_q * C.BLOCK_Q + tl.arange(0, C.BLOCK_Q))
            # rows beyond N are the last one again, with P = 0: zeros times an infinite key would be NaN
            o_row = tl.minimum(o_q, N - 1) if EDGE or C.CAUSAL else o_q
            t_q = head_tile(x.q, i_b, i_h, o_row, None, C.A, C.BLOCK_A)  # [q,A]
            b_s, b_slope = activate(row_products(t_k, t_q, C.A, C.PRECISION), None, x.parameter, EDGE, C)
            pairs = Pairs(masks_at(x.masks, i_b, i_h, M), i_kv * C.BLOCK_KV, o_row, o_kv, N, M)
            b_logit = mask_tile(b_s * x.scale_log2, pairs, C, EDGE, True)  # [kv,q]
            b_shift, b_inverse = row_numbers(stats, (i_b * H + i_h) * NP + o_q)
            b_p = tl.exp2(b_logit - b_shift[None, :]) * b_inverse[None, :]
            b_w = _gradient_of_map(w, i_b, i_h, o_q, o_kv, x, True, C)
            if C.BY_GRADIENT:
                t_do = head_tile(x.grad, i_b, i_h, o_q, N if EDGE or C.CAUSAL else None, C.DV, C.BLOCK_DV)  # [q,Dv]
                b_dp = row_products(t_v, t_do, C.DV, C.PRECISION)
                b_w = tl.where(b_p * b_dp > 0.0, b_w, 0.0)  # w', by the product: where it underflows, E is 0
                b_dv = add_products(b_dv, b_w * b_p, t_do, C.DV, C.PRECISION)
                b_w = _rounded_product(b_w, b_dp, C.EXACT)
            if stats.delta is not None:
                b_w -= tl.load(stats.delta + (i_b * H + i_h) * NP + o_q)[None, :]
            b_ds = b_p * b_w
            if C.SCORE != "dot":  # a softcap
                b_ds = times_activation(b_ds, b_slope, C.SCORE)
            b_dk = add_products(b_dk, b_ds, t_q, C.A, C.PRECISION)
    unit = 1.0 if p_unit is None else tl.load(p_unit)
    b_dk = [tl.where(m_key[:, None], b * (x.scale * unit), 0.0) for b in b_dk]
    store_head(grad_k, i_b, i_hk, o_kv, o_a, M, C.A, b_dk)
    if C.BY_GRADIENT:
        store_head(grad_v, i_b, i_hk, o_kv, o_d, M, C.DV, [tl.where(m_key[:, None], b * unit, 0.0) for b in b_dv])


@triton.jit
def _map_taken_kernel(x, stats, w, p_bits, p_counts, p_maps, LEAST: tl.constexpr, C: tl.constexpr):
    """For a tile of pairs ij and up to BITS heads h, with E_hij as in `_map_backward_rows_kernel`:

    map_ij   = max_h E_hij, or the LEAST of them
    bits_ij  = sum_h 2^h where E_hij = map_ij, else 0
    count_ij = the number of these bits
    """
    H, N, M = x.H, x.N, x.M
    num_q, num_kv, words = tl.cdiv(N, C.BLOCK_Q), tl.cdiv(M, C.BLOCK_KV), tl.cdiv(H, BITS)
    i = tl.program_id(0).to(tl.int64)
    i_bw = i // (num_q * num_kv)
    i_b, i_w = i_bw // words, i_bw % words
    i_q, i_kv = ((i // num_kv) % num_q).to(tl.int32), (i % num_kv).to(tl.int32)
    NP = tl.cdiv(N, ROW_MULTIPLE) * ROW_MULTIPLE
    o_q = i_q * C.BLOCK_Q + tl.arange(0, C.BLOCK_Q)
    o_kv = i_kv * C.BLOCK_KV + tl.arange(0, C.BLOCK_KV)
    b_most = tl.full([C.BLOCK_Q, C.BLOCK_KV], float("inf") if LEAST else float("-inf"), dtype=tl.float32)
    b_bits = tl.zeros([C.BLOCK_Q, C.BLOCK_KV], dtype=tl.int32)
    b_count = tl.zeros([C.BLOCK_Q, C.BLOCK_KV], dtype=tl.float32)
    for h in range(0, tl.minimum(BITS, H - i_w * BITS).to(tl.int32)):
        i_h = i_w * BITS + h
        i_bh = i_b * H + i_h
        pairs = Pairs(masks_at(x.masks, i_b, i_h, M), i_kv * C.BLOCK_KV, o_q, o_kv, N, M)
        t_q = head_tile(x.q, i_b, i_h, o_q, N, C.A, C.BLOCK_A)
        t_k = head_tile(x.k, i_b, i_h // C.GROUP_K, o_kv, M, C.A, C.BLOCK_A)
        b_x = row_products(t_q, t_k, C.A, C.PRECISION)
        b_s, b_slope = activate(b_x, None, x.parameter, False, C)
        b_logit = mask_logits(b_s * x.scale_log2, pairs, C.MASK, C.KEY_MASK, C.CAUSAL)
        b_shift, b_inverse = row_numbers(stats, i_bh * NP + tl.minimum(o_q, NP - 1))  # a tile may be larger than the padding
        b_map = tl.exp2(b_logit - b_shift[:, None]) * b_inverse[:, None]
        if C.BY_GRADIENT:
            t_do = head_tile(x.grad, i_b, i_h, o_q, N, C.DV, C.BLOCK_DV)
            t_v = head_tile(x.v, i_b, i_h // C.GROUP_V, o_kv, M, C.DV, C.BLOCK_DV)
            b_dp = row_products(t_do, t_v, C.DV, C.PRECISION)
            b_map = relu(b_map * b_dp)
        # a larger map begins anew with its bit alone, an equal one adds its bit; NaN is neither
        b_new = (b_map < b_most) if LEAST else (b_map > b_most)
        b_same = b_map == b_most
        b_bit = tl.full([C.BLOCK_Q, C.BLOCK_KV], 1, dtype=tl.int32) << h
        b_bits = tl.where(b_new, b_bit, tl.where(b_same, b_bits | b_bit, b_bits))
        b_count = tl.where(b_new, 1.0, tl.where(b_same, b_count + 1.0, b_count))
        b_most = tl.where(b_new, b_map, b_most)
    p_bits += i_bw * N * M
    store_tile(p_bits, M, o_q, o_kv, N, M, b_bits)
    store_tile(p_counts + i_bw * N * M, M, o_q, o_kv, N, M, b_count)
    store_tile(p_maps + i_bw * N * M, M, o_q, o_kv, N, M, b_most)
