"""score_attention in Triton, forward and backward: one flash kernel whose score function is chosen at compile time.

Shapes: query (B, H, N, A), key (B, Hk, M, A), value (B, Hv, M, Dv), vector (H, A); out (B, H, N, Dv), lse (B, H, N). Hk and Hv
divide H. A is the number of features, or of hidden units.
Roofline: tensor cores for the dot kinds (2 matrix products). MUFU, with 16 results per clock and SM, for scores over hidden units
(per hidden unit and pair half a result for additive, one for Hadamard in bfloat16).
Trick: tanh(a+b) = 2/(1 + e^-2a e^-2b) - 1, so exponentials are taken once per row and once per key (`_prepare_kernel`), and two
hidden units share one reciprocal. Keys that are left after whole tiles have a smaller tile of their own (`edge_block`). Cosine: a
program first sees whether the clamp acts on any of its pairs. Where not, the scores are plain products with inverse norms.
Few queries, such as a decoder's, leave most SMs without a program: their keys are split into parts (`keys_of_a_part`), which
`_join_kernel` joins. Up to 256 keys of 16 bits fit into registers beside their queries: a program has all of a head
(`_whole_forward_kernel`). Long dot products take cuDNN's forward pass on sm_100, on sm_90 causal ones (_cudnn.py).
The backward passes are in _products_backward.py and _units_backward.py. Under a float mask `_rows_kernel` recomputes rows whose
lse is too large to be rounded. Measured on an H100: docs/developers/kernels.md.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vlattn_fast._ground.named import by_name
from vlattn_fast._ground.score_kinds import KINDS
from vlattn_fast._ground.tensors import empty_gradient, empty_rows_first
from vlattn_fast.backends.inputs import Attention, ScoreAttentionBackwardInputs, ScoreAttentionInputs
from vlattn_fast.kernels import _cudnn, _products_backward, _products_jvp, _units_backward
from vlattn_fast.kernels._boxes import Boxes, boxed_tile, boxes_of, fits, store_box
from vlattn_fast.kernels._configurations import Config, cached_launch, configuration
from vlattn_fast.kernels._device import on_device
from vlattn_fast.kernels._group_bias import (
    FLOAT_MASK,
    GROUP_BIAS,
    GROUP_PRODUCT,
    chosen_rows,
    groups_of_rows,
    groups_of_tile,
    row_bias_of,
    special_groups,
    special_logits,
    tile_at,
)
from vlattn_fast.kernels._products_backward import OwnRows, RowStats, new_rows
from vlattn_fast.kernels._scores import (
    ScoreCall,
    activate,
    head_of,
    inverse_norm,
    keep_layout,
    largest_argument,
    largest_entries,
    masked_logits,
    precomputed_at,
    query_factor,
    sum_units,
    twice_exponential,
    weights_of_rows,
    weights_summed,
)
from vlattn_fast.kernels._tiles import (
    LOG2_E,
    OLD_TRITON,
    OWN_LSE,
    ROW_MULTIPLE,
    Dropout,
    Pairs,
    Range,
    add_products,
    aligned,
    alignment,
    block_and_head,
    block_size,
    cdiv,
    dot,
    edge_block,
    extended,
    head_tile,
    heads_of,
    input_precision,
    is_coarse,
    keep_factor,
    key_range,
    key_tile,
    keys_of_a_part,
    launched,
    load_tile,
    map_of,
    mask_tile,
    masks_and_product,
    natural_lse,
    row_products,
    row_shift,
    rows_and_head,
    steps_of,
    store_sums,
    store_tile,
    tile_of,
    with_bias,
    zero_sums,
)

Shape = tuple[int, ...]


_new_call = by_name(ScoreCall)


class Constants(NamedTuple):
    """EXACT: float32. FAST: bfloat16. A, DV: features of keys and values. GROUP_K, GROUP_V: heads that share a key, a value.

    The others are those of a launch. NEGATIVE: whether the scale is. BY_GRADIENT: the rule. GROUP: heads that share the gradients
    of a key and a value. BLOCK_T: carried rows in one product, MANY: there are more of them; CARRIED: the precision of `dot` over
    them, ROUND: to tf32 before. BLOCK_G: groups whose bias has a gradient.
    """

    SCORE: str
    UNITS: bool
    EXACT: bool
    FAST: bool
    PRECISION: str
    MASK: int
    KEY_MASK: bool
    CAUSAL: bool
    GROUP_K: int
    GROUP_V: int
    A: int
    DV: int
    BLOCK_A: int
    BLOCK_DV: int
    BLOCK_Q: int = 0
    BLOCK_KV: int = 0
    BLOCK_EDGE: int = 0
    BLOCK_T: int = 0
    BLOCK_G: int = 0
    AHEAD: int = 0
    NEGATIVE: bool = False
    BY_GRADIENT: bool = False
    GROUP: int = 1
    MANY: bool = False
    CARRIED: str = ""
    ROUND: bool = False


class Parts(NamedTuple):
    """`number` parts of `keys` keys each, and what `_over_keys` gives for each part: max and sum (B * H, N, parts), and out
    (B * H, parts, N, Dv), in float32."""

    number: int
    keys: int
    max: Tensor
    sum: Tensor
    out: Tensor


@on_device
def forward(inputs: ScoreAttentionInputs) -> tuple[Tensor, Tensor]:
    """out (B, H, N, Dv), laid out (B, N, H, Dv) as SDPA does, and lse (B, H, N)."""
    if (by_cudnn := _cudnn.out_and_lse(inputs)) is not None:
        return by_cudnn
    attention = inputs.attention
    query, vector = attention.query, attention.vector
    batch, heads, num_q, _ = query.shape
    out = empty_rows_first(query, heads, num_q, inputs.value.shape[3])
    lse = query.new_empty(batch, heads, num_q, dtype=torch.float32)
    if batch * heads * num_q == 0:
        return out, lse
    call = arguments(attention, inputs.value, inputs.seed, inputs.dropout_p, multiplied=True)
    x, constants = call["x"], call["C"]
    if vector is None and (config := _products_backward.whole_config("forward_whole", call, attention.row_bias)) is not None:
        keys = cdiv(x.M, 16) * 16
        _whole_forward_kernel[(batch * heads,)](
            **launched(call, config, NEGATIVE=x.scale_log2 < 0.0), p_out=out, p_lse=lse, KEYS=keys
        )
        return out, lse
    config, of_launch = _forward_launch(constants, query.dtype, num_q, x.M, x.scale_log2 < 0.0)
    keys = 0 if constants.CAUSAL else keys_of_a_part(batch * heads, num_q, x.M, config)
    parts = None if keys == 0 else _parts(x, constants, keys)
    boxes = _boxes(call, config, out) if parts is None and "AHEAD" in config else {}
    blocks = cdiv(num_q, config["BLOCK_Q"]) if parts is None else parts.number
    _forward_kernel[(blocks * batch * heads,)](
        x=x, p_u=None if vector is None else vector.contiguous(), p_out=out, p_lse=lse, parts=parts, **boxes, **of_launch
    )
    if parts is not None:
        _join_kernel[(batch * heads * num_q,)](
            p_out=out,
            p_lse=lse,
            parts=parts,
            H=heads,
            N=num_q,
            MASK=constants.MASK,
            DV=constants.DV,
            BLOCK_DV=constants.BLOCK_DV,
            BLOCK_PARTS=block_size(parts.number),
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out, lse


@on_device
def backward(inputs: ScoreAttentionBackwardInputs) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, vector and row_bias."""
    attention = inputs.attention
    options = inputs.seed, inputs.dropout_p
    call = arguments(attention, inputs.value, *options, multiplied=True, backward=True, grad_out=inputs.grad_out)
    x, constants = call["x"], call["C"]
    vector, row_bias, out, lse = attention.vector, attention.row_bias, inputs.out, inputs.lse.contiguous()
    grad_lse = None if inputs.grad_lse is None else inputs.grad_lse.contiguous()
    coarse = None
    of_call = constants, x.q.p.dtype, x.N, x.M
    if vector is None and (config := _products_backward.whole_config("backward_whole", call, row_bias)) is not None:
        grad_q = empty_gradient(x.q.p)
        whole_rows = OwnRows(heads_of(aligned(out)), lse, grad_lse, heads_of(grad_q))
        grad_k, grad_v, _ = _products_backward.keys(call, {**config, "BLOCK_T": 0}, whole_rows)
        assert grad_k is not None and grad_v is not None
        return grad_q, grad_k, grad_v, None, None
    if constants.MASK >= FLOAT_MASK.value:
        coarse = row_statistics(call, _config("forward", *of_call, True), lse, OWN_LSE, pair=True, vector=vector)
    config_q, config_kv = _config("backward_q", *of_call), _config("backward_kv", *of_call)
    if vector is not None:
        of_units = lse, out, coarse, grad_lse, row_bias
        *grads, grad_u, grad_bias = _units_backward.launch(call, config_q, config_kv, vector.contiguous(), *of_units)
        return grads[0], grads[1], grads[2], grad_u.to(vector.dtype), grad_bias
    of_rows = lse, aligned(out), coarse, grad_lse
    grad_q, rows, grad_bias = _products_backward.queries(call, config_q, *of_rows, row_bias=row_bias)
    grad_k, grad_v, _ = _products_backward.keys(call, {**config_kv, "BLOCK_T": 0}, rows)
    assert grad_k is not None and grad_v is not None  # rows have a delta
    return grad_q, grad_k, grad_v, None, grad_bias


@on_device
def jvp(inputs: Any) -> tuple[Tensor, Tensor]:
    """The tangents of out and lse, for scores that are functions of a product."""
    call = arguments(inputs.attention, inputs.value, inputs.seed, inputs.dropout_p, multiplied=True, backward=True)
    x, constants, lse = call["x"], call["C"], inputs.lse.contiguous()
    of_call = constants, x.q.p.dtype, x.N, x.M
    coarse = None
    if constants.MASK >= FLOAT_MASK.value:
        coarse = row_statistics(call, _config("forward", *of_call, True), lse, OWN_LSE, pair=True)
    config, tangents = _config("jvp", *of_call, constants.MASK != 0), _products_jvp.tangents_of(inputs)
    return _products_jvp.launch(call, config, tangents, lse, aligned(inputs.out), coarse)


def arguments(
    attention: Attention,
    value: Tensor,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    multiplied: bool = False,
    backward: bool = False,
    grad_out: Tensor | None = None,
) -> dict[str, Any]:
    """The named arguments that all kernels here and of the backward passes share. The query stands in for absent masks.

    multiplied: a product may add a group bias, which kernels know that take `_over_keys` or those of _products_backward.py.
    backward: with the scale, and the gradient of the output, for which the query stands in if there is none.
    """
    query, key = attention.query, attention.key
    score, parameter, scale = attention.score, attention.parameter, attention.scale
    shapes, strides = (query.shape, key.shape, value.shape), (query.stride(), key.stride(), value.stride())
    (_, heads, num_q, _), (_, _, num_k, _), _ = shapes
    masks, kind, product = masks_and_product(attention, query, multiplied)
    padded, precision = attention.key_mask is not None, input_precision(query.dtype)
    constants, most_aligned = _call_constants(shapes, strides, score, query.dtype, kind, padded, attention.is_causal, precision)
    if not most_aligned or (query.data_ptr() | key.data_ptr() | value.data_ptr()) % most_aligned:
        query, key, value = aligned(query), aligned(key), aligned(value)
        strides = query.stride(), key.stride(), value.stride()
    pre_q = pre_k = query
    if KINDS[score].of != "product":
        pre_q, pre_k = _prepare(query, score, query_factor(score, query.dtype)), _prepare(key, score, 1.0)
    if score == "cosine":
        parameter = math.inf if parameter == 0.0 else min(1.0 / parameter, 3.4e38)
    dropout = None if seed is None else Dropout(seed, dropout_p, int(dropout_p * 2**32))
    q = heads_of(query, strides[0])
    x = _new_call(
        q=q,
        k=heads_of(key, strides[1]),
        v=heads_of(value, strides[2]),
        p_pres=(pre_q, pre_k),
        masks=masks,
        dropout=dropout,
        H=heads,
        N=num_q,
        M=num_k,
        scale_log2=scale * LOG2_E,
        parameter=parameter,
        product=product,
        grad=None if not backward else q if grad_out is None else heads_of(aligned(grad_out)),
        scale=scale if backward else 0.0,
    )
    return {"x": x, "C": constants}


@functools.lru_cache(maxsize=1024)  # a model asks for the same in each of its layers
def _call_constants(
    shapes: tuple[Shape, Shape, Shape],
    strides: tuple[Shape, Shape, Shape],
    score: str,
    dtype: torch.dtype,
    mask: int,
    key_mask: bool,
    causal: bool,
    precision: str,
) -> tuple[Constants, int]:
    """The constants, and the largest `alignment` of query, key and value, 0 where one has to be copied."""
    (_, heads, _, size), shape_k, shape_v = shapes
    alignments = [alignment(shape, stride) for shape, stride in zip(shapes, strides, strict=True)]
    constants = Constants(
        SCORE=score,
        UNITS=KINDS[score].of == "units",
        EXACT=dtype == torch.float32,
        FAST=dtype == torch.bfloat16,
        PRECISION=precision,
        MASK=mask,
        KEY_MASK=key_mask,
        CAUSAL=causal,
        GROUP_K=heads // max(1, shape_k[1]),
        GROUP_V=heads // max(1, shape_v[1]),
        A=size,
        DV=shape_v[3],
        BLOCK_A=block_size(size),
        BLOCK_DV=block_size(shape_v[3]),
    )
    return constants, max(alignments) if all(alignments) else 0


def row_statistics(
    call: dict[str, Any],
    config: Config,
    lse: Tensor | None,
    limit: tl.constexpr,
    pair: bool,
    vector: Tensor | None = None,
    by_gradient: bool = False,
    summed: bool = False,
) -> RowStats:
    """The shift of each row, with `pair` also its total, and on request the row sums of each head's A or relu(A * dA).

    Without `lse` the log-sum-exp is computed; else only where it `is_coarse` by this limit. `call` is of a backward pass.
    """
    query = call["x"].q.p
    shift = new_rows(query)
    stats = RowStats(shift, new_rows(query) if pair else None, None, new_rows(query) if summed else None)
    config = {**config, "BLOCK_Q": min(config["BLOCK_Q"], ROW_MULTIPLE.value)}  # which a forward pass may exceed
    if shift.numel() > 0:
        negative, edge = call["x"].scale_log2 < 0.0, _edge_of_keys(call["x"].M, call["C"], config)
        _rows_kernel[(shift.shape[2] // config["BLOCK_Q"] * shift.shape[0] * shift.shape[1],)](
            **launched(call, config, BY_GRADIENT=by_gradient, NEGATIVE=negative, BLOCK_EDGE=edge),
            p_u=None if vector is None else vector.contiguous(),
            p_lse=lse,
            stats=stats,
            LIMIT=limit.value,
        )
    return stats


def _prepare(x: Tensor, score: str, factor: float) -> Tensor:
    """The part of a score that only depends on the rows of x (B, H, N, A).

    Cosine: 1 / |x|, (B, H, N). Hidden units: (B, H, A + 2, N), with A padded to an even number. `precomputed_at` says how N is
    padded, and what follows the units.
    """
    batch, heads, rows, size = x.shape
    length = rows + -rows % 128
    precomputed = x.new_empty((batch, heads, *(() if score == "cosine" else (size + size % 2 + 2,)), length), dtype=torch.float32)
    if precomputed.numel() > 0:
        grid = (cdiv(length, 32) * batch * heads,)
        _prepare_kernel[grid](
            x=heads_of(x),
            p_pre=precomputed,
            H=heads,
            N=rows,
            A=size,
            factor=factor,
            SCORE=score,
            BLOCK_A=block_size(size),
            BLOCK_N=32,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return precomputed


@cached_launch
def _forward_launch(
    constants: Constants, dtype: torch.dtype, num_q: int, num_k: int, negative: bool
) -> tuple[Config, dict[str, Any]]:
    """The configuration of `_forward_kernel`, and the arguments that all its launches with this metadata share. negative: whether
    the scale is."""
    config = _config("forward", constants, dtype, num_q, num_k)
    edge = _edge_of_keys(num_k, constants, config)
    return config, launched({"C": constants}, config, NEGATIVE=negative, BLOCK_EDGE=edge)


@cached_launch
def _config(kernel: str, constants: Constants, dtype: torch.dtype, num_q: int, num_k: int, masked: bool = False) -> Config:
    """masked: as under an attn_mask. Its tiles have at most ROW_MULTIPLE rows."""
    return configuration(
        "score_attention",
        kernel,
        score=constants.SCORE,
        dtype=dtype,
        N=num_q,
        M=num_k,
        size=max(constants.A, constants.DV),
        masked=masked or constants.MASK % GROUP_BIAS.value != 0,
    )


def _parts(x: ScoreCall, constants: Constants, keys: int) -> Parts:
    """Where `_forward_kernel` leaves what it has of each part of so many keys."""
    like, heads, number = x.q.p, x.q.p.shape[0] * x.H, cdiv(x.M, keys)
    b_max, b_sum = (like.new_empty(heads, x.N, number, dtype=torch.float32) for _ in range(2))
    return Parts(number, keys, b_max, b_sum, like.new_empty(heads, number, x.N, constants.DV, dtype=torch.float32))


def _boxes(call: dict[str, Any], config: Config, out: Tensor) -> dict[str, TensorDescriptor]:
    """Tensor descriptors for `_forward_kernel`, if it computes scores ahead: on sm_90 and newer, in calls of many tokens.

    Descriptors do not know padding among the keys.
    """
    x, constants = call["x"], call["C"]
    tensors = x.q.p, x.k.p, x.v.p
    if not config["AHEAD"] or constants.KEY_MASK or not all(map(fits, tensors)):
        return {}
    q, k, v = tensors
    rows, keys, edge = config["BLOCK_Q"], config["BLOCK_KV"], _edge_of_keys(x.M, constants, config)
    size, size_v = constants.BLOCK_A, constants.BLOCK_DV
    return {
        "boxes_q": boxes_of(q, rows, size),
        "boxes_k": boxes_of(k, keys, size),
        "boxes_k_edge": boxes_of(k, edge, size),
        "boxes_v": boxes_of(v, keys, size_v),
        "boxes_v_edge": boxes_of(v, edge, size_v),
        "boxes_out": boxes_of(out, rows, size_v),
    }


def _edge_of_keys(num_k: int, constants: Constants, config: Config) -> int:
    """The last tile of keys, and those along a causal diagonal. Scores over hidden units have one loop for all tiles."""
    if constants.CAUSAL and not constants.UNITS:
        return min(config["BLOCK_KV"], config["BLOCK_Q"])
    return edge_block(num_k, config["BLOCK_KV"], constants.UNITS)


@triton.jit
def _prepare_kernel(x, p_pre, H, N, factor, A: tl.constexpr, SCORE: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_N: tl.constexpr):
    """The part of a score that depends on one row x_n alone, of queries or keys.

    cosine    pre_n     = 1 / |x_n|, inf for a zero vector
    additive  pre_n[a]  = e^(-2 x_n[a])
    Hadamard  pre_n[a]  = factor x_n[a]
    and of scores over hidden units max_a |x_n[a]| and max_a |x_n[a] - x_0[a]|, by which tiles choose how to compute tanh.
    """
    length = (N + 127) // 128 * 128
    i_n, i_bh, i_b, i_h, _ = block_and_head(tl.cdiv(length, BLOCK_N), H, 1)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_a = tl.arange(0, BLOCK_A)
    b_x = head_tile(x, i_b, i_h, o_n, N, A, BLOCK_A).b.to(tl.float32)  # [n,A]
    if SCORE == "cosine":
        b_norm = tl.sqrt_rn(tl.sum(b_x * b_x, axis=1))  # [n]
        b_inverse = tl.where(b_norm > 0.0, tl.div_rn(1.0, tl.where(b_norm > 0.0, b_norm, 1.0)), float("inf"))
        b_inverse = tl.where(o_n < N, tl.where(b_norm == b_norm, b_inverse, b_norm), 1.0)  # a NaN stays one
        tl.store(p_pre + i_bh * length + o_n, b_inverse)
    else:
        if SCORE == "additive":  # tanh(q + k) takes e^-2q e^-2k: an exponential a row, not one a pair
            b_y = twice_exponential(b_x)
        else:
            b_y = b_x * factor
        m_y = (o_a < (A + 1) // 2 * 2)[None, :]  # an even number of units, since two share a reciprocal
        p_pre = precomputed_at(p_pre, i_bh, N, A, True) + o_n
        tl.store(p_pre[:, None] + o_a.to(tl.int64)[None, :] * length, b_y, mask=m_y)
        b_first = head_tile(x, i_b, i_h, tl.zeros_like(o_n), N, A, BLOCK_A).b.to(tl.float32)  # the head's first row, [n,A]
        p_largest = p_pre + tl.full([], (A + 1) // 2 * 2, tl.int64) * length
        tl.store(p_largest, largest_entries(b_x))
        tl.store(p_largest + length, largest_entries(tl.where((o_n < N)[:, None], b_x - b_first, 0.0)))


@triton.jit
def _forward_kernel(
    x,
    p_u,
    p_out,
    p_lse,
    parts,
    C: tl.constexpr,
    boxes_q=None,
    boxes_k=None,
    boxes_v=None,
    boxes_k_edge=None,
    boxes_v_edge=None,
    boxes_out=None,
):
    """Attention of a tile of queries i of one head, by one pass over its keys j (`_over_keys`).

    x_ij  = scale_log2 score(q_i, k_j), under the masks           max_i = max_j x_ij
    p_ij  = 2^(x_ij - max_i)                                      sum_i = sum_j p_ij
    out_i = sum_j p_ij dropout_ij v_j / sum_i                     lse_i = ln 2 (max_i + log2 sum_i)

    With `Parts` a program takes one part of the keys of the only tile of queries, and leaves max_i, sum_i and out_i sum_i of it.
    boxes: tensor descriptors by which tiles are copied (`_boxes`), one by one, because Triton 3.6 takes none in a tuple.
    """
    H, N = x.H, x.N
    o_d = tl.arange(0, C.BLOCK_DV)
    if parts is not None:
        i_part, i_bh, i_b, i_h, i_hk = block_and_head(parts.number, H, C.GROUP_K)
        o_q = tl.arange(0, C.BLOCK_Q)
        indices = 0, i_bh, i_b, i_h, i_hk
        start, end = i_part * parts.keys, (i_part + 1) * parts.keys
        b_max, b_sum, b_o = _over_keys(x, p_u, indices, True, "out", C, start, end)
        o_row = (i_bh * N + o_q) * parts.number + i_part
        tl.store(parts.max + o_row, b_max, mask=o_q < N)
        tl.store(parts.sum + o_row, b_sum, mask=o_q < N)
        store_sums(parts.out + (i_bh * parts.number + i_part) * N * C.DV, C.DV, o_q, o_d, N, C.DV, b_o)
    else:
        i_q, i_bh, i_b, i_h, i_hk = rows_and_head(tl.cdiv(N, C.BLOCK_Q), H, C.GROUP_K, x.M * (C.A + C.DV), C.CAUSAL)
        o_q = i_q * C.BLOCK_Q + tl.arange(0, C.BLOCK_Q)
        indices = i_q, i_bh, i_b, i_h, i_hk
        boxes = None if boxes_q is None else Boxes(boxes_q, boxes_k, boxes_v, boxes_k_edge, boxes_v_edge)
        b_max, b_sum, b_o = _over_keys(x, p_u, indices, True, "out", C, boxes=boxes)
        b_one = tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]  # a fully masked row is 0 / 1
        b_o = [b / b_one for b in b_o]
        b_lse = natural_lse(b_max, b_sum, C.MASK)
        if boxes is None:
            store_sums(p_out + (i_b * N * H + i_h) * C.DV, H * C.DV, o_q, o_d, N, C.DV, b_o)
        else:
            store_box(boxes_out, i_b, i_h, i_q * C.BLOCK_Q, b_o[0])
        tl.store(p_lse + i_bh * N + o_q, b_lse, mask=o_q < N)


@triton.constexpr_function
def powers_of(number):
    """The powers of two that add up to a number, the largest first."""
    return [1 << i for i in reversed(range(number.bit_length())) if number >> i & 1]


@triton.constexpr_function
def number_of_tiles(keys):
    return len(powers_of(keys))


@triton.constexpr_function
def tile_size(keys, i):
    return powers_of(keys)[i]


@triton.constexpr_function
def tile_start(keys, i):
    return sum(powers_of(keys)[:i])


@triton.jit
def _whole_forward_kernel(x, p_out, p_lse, C: tl.constexpr, KEYS: tl.constexpr):
    """Attention of all queries of one head, as `_forward_kernel` defines it.

    KEYS, a multiple of 16, lie in tiles of powers of two: a program reads them once, and a row has its largest logit before it
    takes powers.
    """
    N, M, scale_log2 = x.N, x.M, x.scale_log2
    TILES: tl.constexpr = number_of_tiles(KEYS)
    _, i_bh, i_b, i_h, i_hk = block_and_head(1, x.H, C.GROUP_K)
    p_q, p_k, p_v, _, _, masks = head_of(x, i_bh, i_b, i_h, i_hk, C)
    o_d = tl.arange(0, C.BLOCK_DV)
    b_keys, b_values = (), ()
    for i in tl.static_range(TILES):
        o_kv = tile_start(KEYS, i) + tl.arange(0, tile_size(KEYS, i))
        t_k = tile_of(p_k, x.k.stride_n, o_kv, M if i == TILES - 1 else None, C.A, C.BLOCK_A)
        t_v = key_tile(p_v, x.v.stride_n, masks.p_keys, o_kv, M if i == TILES - 1 else None, C.DV, C.BLOCK_DV, C.KEY_MASK)
        b_keys, b_values = extended(b_keys, t_k.b), extended(b_values, t_v.b)  # [kv,A], [kv,Dv]
    for start in range(0, N, C.BLOCK_Q):
        o_q = start + tl.arange(0, C.BLOCK_Q)
        b_q = tile_of(p_q, x.q.stride_n, o_q, N, C.A, C.BLOCK_A).b
        b_max = tl.full([C.BLOCK_Q], float("-inf"), dtype=tl.float32)
        b_scores = ()
        for i in tl.static_range(TILES):
            b_x = dot(b_q, tl.trans(b_keys[i]), C.PRECISION)  # [q,kv]
            b_s, b_slope = activate(b_x, None, x.parameter, True, C)
            if i == TILES - 1 or is_masked(C.KEY_MASK, C.CAUSAL, C.MASK):
                o_kv = tile_start(KEYS, i) + tl.arange(0, tile_size(KEYS, i))
                b_s = mask_tile(b_s * scale_log2, Pairs(masks, tile_start(KEYS, i), o_q, o_kv, N, M), C, True)
                b_max = tl.maximum(b_max, tl.max(b_s, axis=1))
            else:
                b_max = tl.maximum(b_max, (tl.min(b_s, axis=1) if C.NEGATIVE else tl.max(b_s, axis=1)) * scale_log2)
            b_scores = extended(b_scores, b_s)
        b_safe = tl.where(b_max == float("-inf"), 0.0, b_max)  # -inf - -inf is NaN in a fully masked row
        b_sum = tl.zeros([C.BLOCK_Q], dtype=tl.float32)
        b_o = tl.zeros([C.BLOCK_Q, C.BLOCK_DV], dtype=tl.float32)
        for i in tl.static_range(TILES):
            if i == TILES - 1 or is_masked(C.KEY_MASK, C.CAUSAL, C.MASK):
                b_p = tl.exp2(b_scores[i] - b_safe[:, None])
            else:
                b_p = tl.exp2(b_scores[i] * scale_log2 - b_safe[:, None])
            b_sum += tl.sum(b_p, axis=1)
            if x.dropout is not None:
                o_kv = tile_start(KEYS, i) + tl.arange(0, tile_size(KEYS, i))
                b_p *= keep_factor(x.dropout, i_bh, o_q, o_kv, N)
            b_o += dot(b_p.to(b_values[i].dtype), b_values[i], C.PRECISION)
        b_o = b_o / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
        store_tile(p_out + (i_b * N * x.H + i_h) * C.DV, x.H * C.DV, o_q, o_d, N, C.DV, b_o)
        tl.store(p_lse + i_bh * N + o_q, natural_lse(b_max, b_sum, C.MASK), mask=o_q < N)


@triton.constexpr_function
def is_masked(key_mask, causal, mask):
    return key_mask or causal or mask != 0


@triton.jit
def _join_kernel(
    p_out, p_lse, parts, H, N, MASK: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_PARTS: tl.constexpr
):
    """Attention of a query i of one head from `Parts` p of its keys, always in the same order.

    max_i = max_p max_ip                      factor_p = 2^(max_ip - max_i)
    sum_i = sum_p factor_p sum_ip             out_i = sum_p factor_p out_ip / sum_i
    """
    i_q, i_bh, i_b, i_h, _ = block_and_head(N, H, 1)
    i_row = i_bh * N + i_q
    o_part, o_16, o_d = tl.arange(0, BLOCK_PARTS), tl.arange(0, 16), tl.arange(0, BLOCK_DV)
    p_max, p_sum = parts.max + i_row * parts.number, parts.sum + i_row * parts.number
    p_parts = parts.out + (i_bh * parts.number * N + i_q) * DV
    b_max = tl.load(p_max + o_part, mask=o_part < parts.number, other=float("-inf"))  # [part]
    b_sum = tl.load(p_sum + o_part, mask=o_part < parts.number, other=0.0)
    largest = tl.max(b_max, axis=0)
    safe = tl.where(largest == float("-inf"), 0.0, largest)  # -inf - -inf is NaN in a fully masked row
    total = tl.sum(b_sum * tl.exp2(b_max - safe), axis=0)
    b_out = tl.zeros([BLOCK_DV], dtype=tl.float32)
    for start in range(0, parts.number, 16):
        b_max_16 = tl.load(p_max + start + o_16, mask=start + o_16 < parts.number, other=float("-inf"))
        b_o = load_tile(p_parts, N * DV, start + o_16, o_d, parts.number, DV)  # [16,Dv]
        b_out += tl.sum(b_o * tl.exp2(b_max_16 - safe)[:, None], axis=0)
    b_out = b_out / tl.where(total == 0.0, 1.0, total)
    tl.store(p_out + ((i_b * N + i_q) * H + i_h) * DV + o_d, b_out.to(p_out.dtype.element_ty), mask=o_d < DV)
    tl.store(p_lse + i_row, natural_lse(largest, total, MASK))


@triton.jit
def _rows_kernel(x, p_u, p_lse, stats, LIMIT: tl.constexpr, C: tl.constexpr):
    """`RowStats` of a tile of queries i of one head: what makes probabilities P_ij of base-2 logits x_ij, and row sums.

    shift_i = max_i + log2 sum_i             where there is no total: P_ij = 2^(x_ij - shift_i)
    shift_i = max_i, total_i = sum_i         where there is one:      P_ij = 2^(x_ij - shift_i) / total_i
    sums_i  = sum_j P_ij, or BY_GRADIENT sum_j relu(P_ij dP_ij) with dP_ij = dO_i v_j
    max_i and sum_i are those of `_forward_kernel`. With p_lse the shift is the caller's log-sum-exp in base 2, and beside a total
    max_i and sum_i replace it only where it `is_coarse`: unless sums are asked for, only blocks with such a row read the keys.
    """
    N = x.N
    PAIR: tl.constexpr = stats.total is not None
    SUMS: tl.constexpr = stats.sums is not None
    WITH_LSE: tl.constexpr = p_lse is not None
    NP = tl.cdiv(N, ROW_MULTIPLE) * ROW_MULTIPLE
    i_q, i_bh, i_b, i_h, i_hk = rows_and_head(NP // C.BLOCK_Q, x.H, C.GROUP_K, x.M * (C.A + C.DV), C.CAUSAL)
    o_q = i_q * C.BLOCK_Q + tl.arange(0, C.BLOCK_Q)
    reads_keys = True
    if WITH_LSE and PAIR:
        m_coarse = is_coarse(tl.load(p_lse + i_bh * N + o_q, mask=o_q < N, other=0.0), LIMIT)
        if C.MASK == GROUP_PRODUCT:  # elsewhere the key-major pass does not divide by a total
            m_coarse = m_coarse & (special_groups(x.product, i_bh, i_q * C.BLOCK_Q, N, C.BLOCK_Q)[0] != 0)
        if not SUMS:
            reads_keys = tl.max(m_coarse.to(tl.int32), axis=0) > 0
    indices = i_q, i_bh, i_b, i_h, i_hk
    SUM: tl.constexpr = "map" if SUMS and C.BY_GRADIENT else ""
    b_max, b_total, b_sums = _over_keys(x, p_u, indices, reads_keys, SUM, C)
    b_one = tl.where(b_total == 0.0, 1.0, b_total)
    b_factor = 1.0 / b_one  # b_sums are sums of 2^(x - max), and become sums of P
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
        tl.store(stats.total + i_bh * NP + o_q, tl.where(o_q < N, b_one, 1.0))
    else:
        b_shift = b_lse if WITH_LSE else b_max + tl.log2(b_one)
    tl.store(stats.shift + i_bh * NP + o_q, tl.where((o_q < N) & (b_shift != float("-inf")), b_shift, float("inf")))
    if SUMS:
        b_sums = (b_sums if C.BY_GRADIENT else b_total) * b_factor
        tl.store(stats.sums + i_bh * NP + o_q, tl.where(o_q < N, b_sums, 0.0))  # an infinite value makes NaN of padding


@triton.jit
def _over_keys(x, p_u, indices, reads_keys, SUM: tl.constexpr, C: tl.constexpr, start_of_part=0, end_of_part=None, boxes=None):
    """The online softmax of a tile of queries: max_i, sum_i, and out_i, which is sum_j p_ij v_j [q,Dv] where SUM is "out", and
    sum_j relu(p_ij dP_ij) where it is "map".

    For each tile of keys j, with x_ij and p_ij as in `_forward_kernel`:
        new_i = max(max_i, max_j x_ij)        alpha_i = 2^(max_i - new_i)        p_ij = 2^(x_ij - new_i)
        sum_i = sum_i alpha_i + sum_j p_ij    out_i   = out_i alpha_i + sum_j p_ij v_j

    indices: of `block_and_head`. AHEAD: away from the edge the products of the next tile are computed before the softmax of this
    one, so that tensor cores work in the meantime. The part of the keys is all of them by default; it starts with a tile.
    """
    N, M, scale_log2, parameter = x.N, x.M, x.scale_log2, x.parameter
    i_q, i_bh, i_b, i_h, i_hk = indices
    p_q, p_k, p_v, p_pre_q, p_pre_k, masks = head_of(x, i_bh, i_b, i_h, i_hk, C)
    o_q = i_q * C.BLOCK_Q + tl.arange(0, C.BLOCK_Q)
    o_a = tl.arange(0, C.BLOCK_A)
    if boxes is None:
        t_q = tile_of(p_q, x.q.stride_n, o_q, N, C.A, C.BLOCK_A)  # [q,A]
    else:
        t_q = boxed_tile(boxes.q, i_b, i_h, i_q * C.BLOCK_Q)
    b_inv_q = inverse_norm(p_pre_q, o_q, C.SCORE)  # [q]
    largest, total, bound = 0.0, 0.0, 0.0
    if C.UNITS:
        p_u += i_h * C.A
        bound = largest_argument(p_q, p_k, p_pre_q, p_pre_k, masks.p_keys, N, M, C)
        largest, total = weights_summed(p_u, o_a, C.A)
    b_weight, clamped = weights_of_rows(b_inv_q, p_pre_k, tl.cdiv(M, 128) * 128, parameter, C.SCORE)
    b_scale = scale_log2 * b_weight  # [q]
    b_max = tl.full([C.BLOCK_Q], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([C.BLOCK_Q], dtype=tl.float32)
    if SUM == "out":
        # over hidden units one unknown number would take 47 registers more (`first_sums`)
        b_out = zero_sums(x.v.p.dtype.element_ty, C.BLOCK_Q, C.DV, C.BLOCK_DV, C.UNITS)
    else:
        b_out = tl.zeros([C.BLOCK_Q], dtype=tl.float32)
    if SUM == "map":
        t_do = head_tile(x.grad, i_b, i_h, o_q, N, C.DV, C.BLOCK_DV)  # [q,Dv]
    # the first tiles lie within the keys and below the diagonal, and no clamp of cosine acts on them; the others are at the edge.
    # Scores over hidden units have one loop for all
    whole, end = key_range(i_q, M, C.UNITS, C.CAUSAL, C.BLOCK_Q, C.BLOCK_KV)
    whole, end = tl.where(reads_keys, whole, 0), tl.where(reads_keys, end, 0)
    whole = tl.where(clamped, 0, whole)
    edge = whole
    if end_of_part is not None:
        end = tl.minimum(end, end_of_part)
        whole = tl.minimum(whole, end)
        edge = tl.maximum(whole, start_of_part)
    special, seen, b_parts = groups_of_rows(x, masks, i_bh, i_q * C.BLOCK_Q, o_q, C.MASK)
    keys = Range(start_of_part, whole, edge, end, seen)
    if C.AHEAD:
        steps = steps_of(keys, False, C.BLOCK_KV, C)
        start = tile_at(steps.begin, steps, C.MASK)
        b_next = _first_products(x, t_q, b_parts, p_k, start, i_b, i_hk, boxes, C)
    for EDGE in tl.static_range(1 if C.UNITS else 0, 2):
        steps = steps_of(keys, EDGE, C.BLOCK_KV, C)
        for step in range(steps.begin, steps.end, steps.size):
            if C.MASK != GROUP_PRODUCT or EDGE or not C.AHEAD:
                start = tile_at(step, steps, C.MASK)
            o_kv = start + tl.arange(0, C.BLOCK_EDGE if EDGE else C.BLOCK_KV)
            if C.UNITS:
                units_q, units_k = (p_q, p_pre_q, o_q, x.q.stride_n, N), (p_k, p_pre_k, o_kv, x.k.stride_n, M)
                b_s = sum_units(units_q, units_k, p_u, bound, largest, total, C)
            else:
                # with AHEAD these are the next keys; the last tile has none, and multiplies its keys twice
                first = start
                if C.AHEAD and not EDGE:
                    first = tile_at(tl.minimum(step + C.BLOCK_KV, steps.end - C.BLOCK_KV), steps, C.MASK)
                o_k = first + tl.arange(0, C.BLOCK_EDGE if EDGE else C.BLOCK_KV)
                if boxes is None:
                    t_k = tile_of(p_k, x.k.stride_n, o_k, M if EDGE else None, C.A, C.BLOCK_A)  # [kv,A]
                else:
                    t_k = boxed_tile(boxes.k_edge if EDGE else boxes.k, i_b, i_hk, first)
                b_inv_k = inverse_norm(p_pre_k, o_kv, C.SCORE)  # [kv]
                b_x = row_products(t_q, t_k, C.A, C.PRECISION)  # [q,kv]
                b_x = with_bias(b_x, b_parts, x, i_b, first, C)
                if C.AHEAD and not EDGE:
                    b_x, b_next = b_next, b_x
                b_s, _ = activate(b_x, (b_inv_q, b_inv_k, b_weight), parameter, EDGE, C)
            pairs = Pairs(masks, start, o_q, o_kv, N, M)
            b_p, b_new, b_alpha = _softmax_of_tile(b_s, b_scale, b_max, pairs, special, EDGE, C)
            b_sum = b_sum * b_alpha + tl.sum(b_p, axis=1)
            if SUM != "":
                if boxes is None:
                    t_v = key_tile(p_v, x.v.stride_n, masks.p_keys, o_kv, M if EDGE else None, C.DV, C.BLOCK_DV, C.KEY_MASK)
                else:
                    t_v = boxed_tile(boxes.v_edge if EDGE else boxes.v, i_b, i_h // C.GROUP_V, start)
            if SUM == "out":
                b_out = _add_values(b_out, b_alpha, b_p, t_v, x.dropout, i_bh, o_q, o_kv, N, C)
            elif SUM == "map":
                b_dp = row_products(t_do, t_v, C.DV, C.PRECISION)  # [q,kv]
                b_out = b_out * b_alpha + tl.sum(map_of(b_p, b_dp, o_kv, M if EDGE else None), axis=1)
            b_max = b_new
            if C.MASK == GROUP_PRODUCT and C.AHEAD and not EDGE:
                start = first
    return b_max, b_sum, b_out


@triton.jit
def _first_products(x, t_q, b_parts, p_k, start, i_b, i_hk, boxes, C: tl.constexpr):
    """The products [q,kv] of the first tile of keys in `_over_keys`, before its loop; with the bias where a product adds it."""
    if boxes is None:
        t_k = tile_of(p_k, x.k.stride_n, start + tl.arange(0, C.BLOCK_KV), x.M, C.A, C.BLOCK_A)
    else:
        t_k = boxed_tile(boxes.k, i_b, i_hk, start)
    return with_bias(dot(t_q.b, tl.trans(t_k.b), C.PRECISION), b_parts, x, i_b, start, C)


@triton.jit
def _add_values(b_out, b_alpha, b_p, t_v, dropout, i_bh, o_q, o_kv, N, C: tl.constexpr):
    """out_i alpha_i + sum_j p_ij v_j of `_over_keys`."""
    if dropout is not None:  # not in sum_i: what is dropped is missing from a row that sums to 1
        b_p *= keep_factor(dropout, i_bh, o_q, o_kv, N)
    b_out = [b * b_alpha[:, None] for b in b_out]
    return add_products(b_out, keep_layout(b_p, C.UNITS, C.PRECISION), t_v, C.DV, C.PRECISION)


@triton.jit
def _softmax_of_tile(b_s, b_scale, b_max, pairs, special, EDGE: tl.constexpr, C: tl.constexpr):
    """p [q,kv], the new maximum [q] and alpha [q] of one step of `_over_keys`, from the scores of the tile. special: of
    `special_groups`."""
    if C.MASK == GROUP_PRODUCT:
        if special != 0:
            b_x = special_logits(b_s, b_scale, pairs, special, False, C.PRECISION)
            b_p, b_new, b_safe = _softmax_under_masks(b_x, b_max, pairs, EDGE, C)
        else:
            if EDGE or C.KEY_MASK:
                b_p, b_new, b_safe = _softmax_under_masks(b_s * b_scale[:, None], b_max, pairs, EDGE, C)
            else:
                b_p, b_new, b_safe = _softmax_of_all(b_s, b_scale, b_max, C.NEGATIVE)
    elif EDGE or C.KEY_MASK or C.MASK % GROUP_BIAS != 0 or (C.EXACT and C.MASK == GROUP_BIAS and OLD_TRITON):
        # the last: Triton 3.6 does not compile `_softmax_under_bias` in float32
        b_p, b_new, b_safe = _softmax_under_masks(b_s * b_scale[:, None], b_max, pairs, EDGE, C)
    elif C.MASK == GROUP_BIAS:
        b_p, b_new, b_safe = _softmax_under_bias(b_s, b_scale, b_max, pairs, C)
    else:
        b_p, b_new, b_safe = _softmax_of_all(b_s, b_scale, b_max, C.NEGATIVE)
    return b_p, b_new, tl.exp2(b_max - b_safe)


@triton.jit
def _softmax_of_all(b_s, b_scale, b_max, NEGATIVE: tl.constexpr):
    """p [q,kv], and the new maximum [q] twice, of a tile without masks."""
    # the maximum first, then one multiply-add per pair; a NEGATIVE scale turns the smallest score into the largest logit
    b_new = tl.maximum(b_max, (tl.min(b_s, axis=1) if NEGATIVE else tl.max(b_s, axis=1)) * b_scale)
    return tl.exp2(b_s * b_scale[:, None] - b_new[:, None]), b_new, b_new


@triton.jit
def _softmax_under_masks(b_logit, b_max, pairs, EDGE: tl.constexpr, C: tl.constexpr):
    """p [q,kv], the new maximum [q], and what stands for it where that is -inf."""
    b_x = masked_logits(b_logit, pairs, EDGE, C)
    b_new = tl.maximum(b_max, tl.max(b_x, axis=1))
    b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)  # -inf - -inf is NaN in a row that has no key yet
    return tl.exp2(b_x - b_safe[:, None]), b_new, b_safe


@triton.jit
def _softmax_under_bias(b_s, b_scale, b_max, pairs, C: tl.constexpr):
    """p [q,kv], the new maximum [q], and what stands for it where that is -inf, of a tile under a group bias alone."""
    masks, start, o_q, o_kv, N, M = pairs
    first, last, changes, masked = groups_of_tile(masks, start, M, o_kv.shape[0], C.MASK)
    if (changes == 0) & (not masked):  # as without masks
        b_bias = row_bias_of(masks, first, o_q, N)
        b_new = tl.maximum(b_max, (tl.min(b_s, axis=1) if C.NEGATIVE else tl.max(b_s, axis=1)) * b_scale + b_bias)
        b_safe = b_new
        b_p = tl.exp2(b_s * b_scale[:, None] - (b_safe - b_bias)[:, None])
    else:
        if (changes == 1) & (not masked):
            b_first, b_last = row_bias_of(masks, first, o_q, N), row_bias_of(masks, last, o_q, N)
            b_x = b_s * b_scale[:, None] + chosen_rows(pairs, first, b_first, b_last, False)
        else:
            b_x = masked_logits(b_s * b_scale[:, None], pairs, False, C)
        b_new = tl.maximum(b_max, tl.max(b_x, axis=1))
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_x - b_safe[:, None])
    return b_p, b_new, b_safe
