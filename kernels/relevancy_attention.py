"""relevancy_attention in Triton: a flash backward pass that also gives r Abar, and only r Abar for any attention.

Shapes: query (B, H, N, D), key (B, Hk, M, D), value (B, Hk, M, Dv), relevancy r (B, T, N) -> r Abar (B, T, M). Hk divides H.
Roofline: tensor cores, 7 matrix products in the two passes of the backward, 5 in the one of few tokens, and 2 in only r Abar
(rule "gradient"). There the exponentials (MUFU) take as long at D = 64. r Abar within the backward pass adds a maximum and two
multiply-adds per pair.
The kernels are those of score_attention's backward pass (_products_backward.py), which carry rows of r along, and its
`_rows_kernel`; one row without gradients has a kernel here. There is one partial sum of r Abar per key head, or per head of that
one row, and they are added in order: no atomics. Measured on an H100: docs/operators.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlattn_fast._ground.tensors import as_dtype, empty_gradient, weigh_rows
from vlattn_fast.backends.inputs import (
    AttentionMapBackwardInputs,
    AttentionMapInputs,
    RelevancyAttentionBackwardInputs,
    RelevancyAttentionInputs,
    RelevancyStepBackwardInputs,
    RelevancyStepInputs,
    named,
    schema_of,
)
from vlattn_fast.kernels import _products_backward, _units_backward, attention_map, score_attention
from vlattn_fast.kernels._configurations import Config
from vlattn_fast.kernels._device import on_device
from vlattn_fast.kernels._group_bias import GROUP_BIAS, seeing_queries
from vlattn_fast.kernels._map_backward import MAX_T, Launch, MapGradient, config_of, describe, gradients, statistics, sums
from vlattn_fast.kernels._products_backward import OwnRows, RowStats, keys, queries
from vlattn_fast.kernels._scores import activate_all, head_of
from vlattn_fast.kernels._tiles import (
    OWN_LSE,
    ROW_MULTIPLE,
    Pairs,
    add_mask,
    aligned,
    block_and_head,
    block_size,
    cdiv,
    edge_block,
    head_at,
    heads_of,
    launched,
    pad_rows,
    real_tokens,
    relu,
    row_products,
    tile_of,
)


def forward(inputs: RelevancyAttentionInputs) -> tuple[Tensor, Tensor]:
    """out (B, H, N, Dv), lse (B, H, N)."""
    return score_attention.forward(inputs.without_carrier())


@on_device
def backward(inputs: RelevancyAttentionBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of query, key and value, the carrier's cotangent r * a + (r * b) Abar, and the gradient of row_bias; None for
    those not needed."""
    x, grad_out, grad_carrier, row_normalize = inputs.attention, inputs.grad_out, inputs.grad_carrier, inputs.row_normalize
    grads: tuple[Tensor | None, ...] = (None, None, None)
    weighted_r = r_abar = grad_bias = None
    if grad_carrier is not None and (grad_out is not None or inputs.rule == "attention"):
        weighted_r = weigh_rows(grad_carrier, inputs.attention_weight)
    if inputs.need_inputs and grad_out is not None:
        launch = describe(x, inputs.value, inputs.rule, grad_out)
        fused_r = None if weighted_r is None or weighted_r.shape[1] > MAX_T else weighted_r  # more rows go through `step`
        summed = fused_r is not None and row_normalize
        lse, out = inputs.lse.contiguous(), aligned(inputs.out)
        grad_lse = None if inputs.grad_lse is None else inputs.grad_lse.contiguous()
        whole = (
            None if summed else _products_backward.whole_config("backward_whole", launch.call, launch.row_bias, _block_t(fused_r))
        )
        if whole is not None:
            grad_q = empty_gradient(x.query)
            grad_k, grad_v, r_abar = _keys(launch, OwnRows(heads_of(out), lse, grad_lse, heads_of(grad_q)), fused_r, whole)
        else:
            coarse = statistics(launch, lse, limit=OWN_LSE) if launch.float_mask else None
            of_rows = lse, out, coarse, grad_lse, launch.by_gradient, summed
            grad_q, rows, grad_bias = queries(launch.call, config_of("backward_q", launch), *of_rows, launch.row_bias)
            grad_k, grad_v, r_abar = _keys(launch, rows, fused_r)
        grads = (grad_q, grad_k, grad_v)
    if weighted_r is not None and r_abar is None:
        # in float32 the rounding of lse is half of the error of r Abar, and under float masks it shows: step recomputes the sums
        float_mask = x.attn_mask is not None and x.attn_mask.dtype != torch.bool
        rounding_shows = x.query.dtype == torch.float32 or float_mask or x.row_bias is not None
        r_abar = step(inputs.step(weighted_r, lse=None if rounding_shows else inputs.lse))
    if grad_carrier is None:
        return *grads, None, grad_bias
    residual = weigh_rows(grad_carrier, inputs.residual_weight)
    return *grads, residual.clone() if r_abar is None else residual + r_abar, grad_bias


@on_device
def step(inputs: RelevancyStepInputs) -> Tensor:
    """relevancy @ Abar, (B, T, N) -> (B, T, M), of any core score.

    Up to MAX_T rows are multiplied while Abar is computed. More would compute it again for each MAX_T of them. So then Abar is
    stored, for as many samples at once as `_stored_maps` says.

    `lse` may count keys that are not here: probabilities are exp(logit - lse). Under a float mask, rows whose lse `is_coarse` are
    normalised over the keys that are here.
    """
    if inputs.rule == "attention":
        inputs = inputs._replace(value=None, grad_output=None)
    relevancy, query, key = inputs.relevancy, inputs.attention.query, inputs.attention.key
    samples = _stored_maps(relevancy, query, key)
    if samples > 0:
        result = relevancy.new_empty((*relevancy.shape[:2], key.shape[2]), dtype=torch.float32)
        for start in range(0, query.shape[0], samples):
            b = slice(start, start + samples)
            torch.bmm(relevancy[b].to(torch.float32), attention_map.forward(_map_inputs(inputs, b)), out=result[b])
        return result.to(relevancy.dtype)
    launch = describe(inputs.attention, inputs.value, inputs.rule, inputs.grad_output)
    r_abar = _keys(launch, statistics(launch, inputs.lse, inputs.row_normalize), relevancy)[2]
    assert r_abar is not None  # since relevancy is not
    return as_dtype(r_abar, relevancy.dtype)


@on_device
def step_backward(inputs: RelevancyStepBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of relevancy, query, key, value, grad_output, lse and row_bias; None for those not needed.

    With u the gradient of the result, that of relevancy is u Abar^T and that of Abar is r^T u. Where `step` stores maps, so does
    this.
    """
    if inputs.rule == "attention":
        inputs = inputs._replace(value=None, grad_output=None)
    query = inputs.attention.query
    samples = _stored_maps(inputs.relevancy, query, inputs.attention.key)
    if samples > 0:
        return _step_backward_by_maps(inputs, samples)
    launch = describe(inputs.attention, inputs.value, inputs.rule, inputs.grad_output)
    rows, num_t = statistics(launch, inputs.lse), inputs.relevancy.shape[1]
    r, u = pad_rows(inputs.relevancy.to(torch.float32)), inputs.grad.to(torch.float32)
    divisor = torch.full_like(r[:, :1, :1], max(1, query.shape[1]))
    # the gradient of relevancy comes from a launch of its own, or from that of delta
    of_delta = inputs.need_relevancy and inputs.need_inputs and num_t <= MAX_T and not inputs.row_normalize
    by_relevancy: Tensor | None = None
    if inputs.row_normalize:
        # the gradient of a row's sum is the same for all its keys: one more row of r, beside a u of ones
        u = torch.cat([u, torch.ones_like(u[:, :1])], 1)
        by_relevancy, total = _times_maps(launch, rows, u).split([num_t, 1], 1)
        divisor = torch.where(total < torch.finfo(torch.float32).tiny, 1.0, total)
        r = torch.cat([r, (r * by_relevancy).sum(1, keepdim=True) / -divisor], 1)
    elif inputs.need_relevancy and not of_delta:
        by_relevancy = _times_maps(launch, rows, u)
    grads: tuple[Tensor | None, ...] = (None,) * 6
    if inputs.need_inputs:
        w = MapGradient(r=(r / divisor).mT.contiguous(), u=u.mT.contiguous(), T=u.shape[1])
        each_head, delta = sums(launch, rows, w, u.contiguous() if of_delta else None, deltas=True)
        by_relevancy = each_head.sum(1) if of_delta else by_relevancy
        grads = gradients(launch, rows, w, delta, inputs.lse if inputs.need_lse else None)
    if by_relevancy is None or not inputs.need_relevancy:
        return None, *grads
    return (by_relevancy / divisor)[..., : query.shape[2]].to(inputs.relevancy.dtype), *grads


def _times_maps(launch: Launch, rows: RowStats, u: Tensor) -> Tensor:
    """u E^T, (B, T, N), summed over the heads' maps E."""
    parts = [part.contiguous() for part in u.split(MAX_T, 1)]
    return torch.cat([sums(launch, rows, MapGradient(T=part.shape[1]), part)[0].sum(1) for part in parts], 1)


def _step_backward_by_maps(inputs: RelevancyStepBackwardInputs, samples: int) -> tuple[Tensor | None, ...]:
    parts = []
    for start in range(0, inputs.relevancy.shape[0], samples):
        b = slice(start, start + samples)
        of_map = _map_inputs(inputs, b)
        r, u = inputs.relevancy[b].to(torch.float32), inputs.grad[b].to(torch.float32)
        by_relevancy: Tensor | None = None
        grads: tuple[Tensor | None, ...] = (None,) * 6
        if inputs.need_relevancy:
            by_relevancy = torch.bmm(u, attention_map.forward(of_map).mT).to(inputs.relevancy.dtype)
        if inputs.need_inputs:
            of_grad = AttentionMapBackwardInputs(grad=torch.bmm(r.mT, u), need_lse=inputs.need_lse, **of_map._asdict())
            grads = attention_map.backward(of_grad)
        parts.append((by_relevancy, *grads))
    return tuple(None if one[0] is None else torch.cat(one) for one in zip(*parts, strict=True))


def _map_inputs(inputs: RelevancyStepInputs | RelevancyStepBackwardInputs, b: slice) -> AttentionMapInputs:
    """Those of the map of the samples b."""
    x = named(inputs) | {"head_reduction": "mean"}
    batched = {"query", "key", "value", "grad_output", "lse", "key_mask", "row_bias", "key_groups"}
    if (mask := inputs.attention.attn_mask) is not None and mask.ndim == 4 and mask.shape[0] > 1:
        batched.add("attn_mask")
    x |= {name: x[name][b] for name in batched if x[name] is not None}
    made: AttentionMapInputs = schema_of(AttentionMapInputs).from_named(x)
    return made


def _stored_maps(relevancy: Tensor, query: Tensor, key: Tensor) -> int:
    """The number of samples whose Abar (N, M) `step` stores at once; 0 for few rows, and if a single map is too large.

    Together the maps have at most as many elements as the queries or the result, or 2^22: memory stays linear in the length.
    """
    (batch, heads, num_q, size), num_kv, num_t = query.shape, key.shape[2], relevancy.shape[1]
    if num_t <= MAX_T or min(batch, heads, num_q, size, num_kv) == 0:
        return 0
    return max(1 << 22, query.numel(), batch * num_t * num_kv) // (num_q * num_kv)


def _block_t(relevancy: Tensor | None) -> int:
    """How many rows of r a program carries."""
    num_t = 0 if relevancy is None else relevancy.shape[1]
    return num_t if num_t <= 1 else min(MAX_T, block_size(num_t))


def _keys(
    launch: Launch, rows: RowStats | OwnRows, relevancy: Tensor | None, config: Config | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The kernel that takes keys block by block: gradients of key and value, and r Abar, each None where it is not computed. r is
    divided by the number of heads, or by the row sums of Abar. config: where a program takes all keys."""
    query, key = launch.call["x"].q.p, launch.call["x"].k.p
    num_t, block_t = 0 if relevancy is None else relevancy.shape[1], _block_t(relevancy)
    factor, weighted_r = 1.0 / query.shape[1] if query.shape[1] > 0 else 1.0, None
    # with many rows of r a program takes all heads, so that the partial sums stay O(B H N)
    together = num_t > MAX_T
    if relevancy is not None:
        weighted_r = pad_rows(as_dtype(relevancy, torch.float32))
        if isinstance(rows, RowStats) and rows.sums is not None:
            total, factor = rows.sums.sum(1, keepdim=True), 1.0
            # where the sum is 0, so is the row of Abar; over a subnormal number r overflows, and times 0 it would be NaN
            weighted_r = weighted_r / torch.where(total < torch.finfo(torch.float32).tiny, 1.0, total)
        if launch.vector is not None:
            assert isinstance(rows, RowStats)
            config = {**config_of("step_units", launch, block_t), "BLOCK_T": block_t}
            of_r = weighted_r, factor, launch.by_gradient, max(1, query.shape[1]) if together else 1
            return None, None, _units_backward.carry(launch.call, config, launch.vector, rows, *of_r)
        if num_t == 1 and isinstance(rows, RowStats) and rows.delta is None and launch.pairs > 0:
            return None, None, _one_row(launch, rows, weighted_r, factor)
    key_heads = max(1, key.shape[1]) if together else 1
    config = {**(config or config_of("backward_kv", launch, block_t)), "BLOCK_T": block_t}
    return keys(launch.call, config, rows, weighted_r, factor, launch.by_gradient, key_heads)


def _one_row(launch: Launch, rows: RowStats, r: Tensor, factor: float) -> Tensor:
    """factor * sum over heads of r Abar, (B, 1, M), for one row r (B, 1, padded N)."""
    x, config = launch.call["x"], config_of("step", launch)
    batch, heads = x.q.p.shape[:2]
    each_head = x.q.p.new_empty((batch, heads, x.M), dtype=torch.float32)
    edge = edge_block(x.N, config["BLOCK_Q"], launch.call["C"].CAUSAL)
    _step_kernel[(cdiv(x.M, config["BLOCK_KV"]) * batch * heads,)](
        **launched(launch.call, config, BY_GRADIENT=launch.by_gradient, BLOCK_EDGE=edge),
        stats=rows,
        p_r=r,
        p_each_head=each_head,
        factor=factor,
    )
    return each_head.sum(1, keepdim=True)


@triton.jit
def _step_kernel(x, stats, p_r, p_each_head, factor, C: tl.constexpr):
    """r Abar of a tile of keys j of one head, for one row r, by a pass over its queries i.

    P_ij  = 2^(x_ij - shift_i) / total_i           r_abar_j = factor sum_i r_i E_ij, E = P or BY_GRADIENT relu(P dP)
    dP_ij = dO_i v_j                               shift and total are those of `RowStats`, x_ij that of `_backward_q_kernel`,
                                                   whose score is any function of a product

    Tiles are [q,kv]: so a thread has few rows, whose shift and r it loads. It adds up tiles of r_i E_ij, and rows at the end.
    """
    N, M = x.N, x.M
    i_kv, i_bh, i_b, i_h, i_hk = block_and_head(tl.cdiv(M, C.BLOCK_KV), x.H, C.GROUP_K)
    p_q, p_k, p_v, p_pre_q, p_pre_k, masks = head_of(x, i_bh, i_b, i_h, i_hk, C)
    o_kv = i_kv * C.BLOCK_KV + tl.arange(0, C.BLOCK_KV)
    t_k = tile_of(p_k, x.k.stride_n, o_kv, M, C.A, C.BLOCK_A)  # [kv,A]
    t_v = t_k
    if C.BY_GRADIENT:
        t_v = tile_of(p_v, x.v.stride_n, o_kv, M, C.DV, C.BLOCK_DV)  # [kv,Dv]
    NP = tl.cdiv(N, ROW_MULTIPLE) * ROW_MULTIPLE
    rows = p_q, head_at(x.grad, i_b, i_h, C.DV), p_pre_q, i_bh * NP, p_r + i_b * NP
    keys_of = i_kv * C.BLOCK_KV, o_kv, t_k, t_v, p_pre_k, masks
    # causal: queries before `first` see none of these keys, and from `whole` on all of them
    first, whole, end = 0, 0, N
    if C.CAUSAL:
        first = i_kv * C.BLOCK_KV // C.BLOCK_Q * C.BLOCK_Q
        whole = tl.minimum(N, tl.cdiv((i_kv + 1) * C.BLOCK_KV - 1, C.BLOCK_Q) * C.BLOCK_Q)
    if C.MASK >= GROUP_BIAS:
        first_q, end_q, _, _ = seeing_queries(masks, i_kv * C.BLOCK_KV, N, M, C.BLOCK_KV, C.MASK)
        first_q = first_q // C.BLOCK_Q * C.BLOCK_Q
        first, whole = tl.maximum(first, first_q), tl.maximum(whole, first_q)
        end = tl.minimum(N, tl.cdiv(end_q, C.BLOCK_Q) * C.BLOCK_Q)
    tiles = (end - whole) // C.BLOCK_Q  # away from the edge
    if C.MASK >= GROUP_BIAS:
        tiles = tl.maximum(tiles, 0)
    length = tiles * C.BLOCK_Q
    b_r_abar = tl.zeros([C.BLOCK_KV], dtype=tl.float32)
    for EDGE in tl.static_range(0, 2):
        b_sum = tl.zeros([C.BLOCK_EDGE if EDGE else C.BLOCK_Q, C.BLOCK_KV], dtype=tl.float32)
        # at the edge `start` goes over the queries as if those away from it were not there
        for start in range(
            first if EDGE else whole, end - length if EDGE else whole + length, C.BLOCK_EDGE if EDGE else C.BLOCK_Q
        ):
            i_start = tl.where(start < whole, start, start + length) if EDGE else start
            b_x, b_dp = _products(x, rows, keys_of, i_start, EDGE, C, C.BLOCK_EDGE if EDGE else C.BLOCK_Q)
            b_sum = _add_tile(b_sum, b_x, b_dp, x, stats, rows, keys_of, i_start, EDGE, C)
        b_r_abar += tl.sum(b_sum, axis=0)
    m_key = real_tokens(masks.p_keys, o_kv, M, C.KEY_MASK)
    tl.store(p_each_head + i_bh * M + o_kv, tl.where(m_key, b_r_abar * factor, 0.0), mask=o_kv < M)


@triton.jit
def _products(x, rows, keys_of, start, EDGE: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """q_i k_j and BY_GRADIENT dP_ij, [q,kv], of the BLOCK queries from `start` on. At the EDGE the last row stands for those
    beyond it: zeros times an infinite key would be NaN."""
    p_q, p_do, _, _, _ = rows
    _, _, t_k, t_v, _, _ = keys_of
    o_row = start + tl.arange(0, BLOCK)
    if EDGE:
        o_row = tl.minimum(o_row, x.N - 1)
    t_q = tile_of(p_q, x.q.stride_n, o_row, None, C.A, C.BLOCK_A)
    b_x = row_products(t_q, t_k, C.A, C.PRECISION)
    b_dp = b_x
    if C.BY_GRADIENT:
        t_do = tile_of(p_do, x.grad.stride_n, o_row, None, C.DV, C.BLOCK_DV)
        b_dp = row_products(t_do, t_v, C.DV, C.PRECISION)
    return b_x, b_dp


@triton.jit
def _add_tile(b_sum, b_x, b_dp, x, stats, rows, keys_of, start, EDGE: tl.constexpr, C: tl.constexpr):
    """b_sum [q,kv] and r_i E_ij of the `_products` of the queries from `start` on. Keys of padding are dropped at the end."""
    _, _, p_pre_q, o_head, p_r = rows
    start_kv, o_kv, _, _, p_pre_k, masks = keys_of
    o_q = start + tl.arange(0, b_x.shape[0])
    o_row = tl.minimum(o_q, x.N - 1) if EDGE else o_q
    b_s = activate_all(b_x, p_pre_q, p_pre_k, o_row, o_kv, x.parameter, C)
    b_logit = add_mask(b_s * x.scale_log2, Pairs(masks, start_kv, o_q, o_kv, x.N, x.M), C.MASK)
    if C.CAUSAL and EDGE:
        b_logit = tl.where(o_kv[None, :] <= o_row[:, None], b_logit, float("-inf"))
    b_map = tl.exp2(b_logit - tl.load(stats.shift + o_head + o_q)[:, None])
    b_r = tl.load(p_r + o_q)
    if stats.total is not None:  # one division a query, not one a pair
        b_r = tl.div_rn(b_r, tl.load(stats.total + o_head + o_q))
    if C.BY_GRADIENT:
        b_map = relu(b_map * b_dp)
        if EDGE:  # dP of a row beyond N is NaN or infinite beside such a value
            b_map = tl.where((o_q < x.N)[:, None], b_map, 0.0)
    return b_sum + b_map * b_r[:, None]
