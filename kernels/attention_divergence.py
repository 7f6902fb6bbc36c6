"""attention_divergence in Triton: how far one attention is from another over the same keys; forward and backward.

Shapes: query (B, H, N, D), key (B, Hk, M, D), other_query (B, H', N, D'), other_key (B, H'k, M, D'); divergence (B, H or 1, N).
Roofline: issue-bound. Two matrix products a pair and pass, and about two dozen instructions of f: exponentials, a series.
Trick: attention_statistics gives each row's largest logit and weight, so that a second sweep has logarithms of both weights, in
which small divergences keep their digits. All f are homogeneous: streaming/attention_divergence.py has their one gradient. The
gradient of the other side is that of the first, with sides and `kind` exchanged: a detached side launches nothing. The sums of
A r and A' r' over keys, which gradients need, make D together: js and total variation take a sweep for one of them, others none.
Means over heads are by a second online softmax, over the heads of a tile of pairs. Their backward pass stores A r and log A of
the means for strips of rows, of bounded memory, instead of going over all heads once for each. Not measured on a device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlattn_fast.backends.inputs import Attention, AttentionStatisticsInputs
from vlattn_fast.backends.streaming.attention_divergence import AttentionDivergenceBackwardInputs, AttentionDivergenceInputs
from vlattn_fast.kernels import attention_statistics
from vlattn_fast.kernels._configurations import configuration
from vlattn_fast.kernels._device import on_device
from vlattn_fast.kernels._group_bias import FLOAT_MASK
from vlattn_fast.kernels._scores import reciprocal
from vlattn_fast.kernels._tiles import (
    LOG2_E,
    ROW_MULTIPLE,
    Heads,
    Pairs,
    add_products,
    aligned,
    below_max,
    block_and_head,
    block_size,
    cdiv,
    head_at,
    head_tile,
    heads_of,
    input_precision,
    key_range,
    key_tile,
    launched,
    load_tile,
    mask_logits,
    masks_and_kind,
    masks_at,
    relu,
    row_products,
    store_sums,
    store_tile,
    zero_sums,
)
from vlattn_fast.kernels.congruence_loss import expm1, log1p_by
from vlattn_fast.kernels.congruence_maps import dot_small

_STRIP_BYTES = 1 << 26  # of A r and log A of the heads' mean, for each sample: bits are the same in any batch
_PARTS = 16  # of the keys, of rows of a mean: their heads are in one program
_EXCHANGED = {"kl": "reverse_kl", "reverse_kl": "kl"}
_SHARES = {"kl": 1.0, "reverse_kl": 0.0, "hellinger": 0.5}  # of D, in sum_j A_ij r_ij; that of the other side is the rest of D
_statistics: Any = attention_statistics.forward.__wrapped__  # type: ignore[attr-defined]  # the launchers here have its guard


class Constants(NamedTuple):
    """MEAN: heads are averaged. D: features, FOLDED: see `below_max`; OTHER: those of the other side."""

    KIND: str
    MEAN: bool
    MASK: int
    KEY_MASK: bool
    CAUSAL: bool
    D: int
    BLOCK_D: int
    FOLDED: bool
    OTHER_D: int
    OTHER_BLOCK_D: int
    OTHER_FOLDED: bool
    PRECISION: str
    BLOCK_Q: int = 0
    BLOCK_KV: int = 0


class Side(NamedTuple):
    """One of the two attentions. p_max, p_weight (B, H, N): each row's largest logit and weight, as `_statistics` gives them.

    With p_factors (B, H, N) it is an indexer (kernels/indexer_divergence.py): one map of H heads, whose p_max and p_weight are
    (B, N).
    """

    q: Heads
    k: Heads
    p_max: Tensor
    p_weight: Tensor
    H: int
    GROUP_K: int
    scale_log2: float
    p_factors: Tensor | None = None
    end: None = None


@on_device
def forward(inputs: AttentionDivergenceInputs) -> Tensor:
    """D (B, H, N), or (B, 1, N) of the mean over heads."""
    query, num_k = inputs.query, inputs.key.shape[2]
    rows = query.shape[0], 1 if inputs.head_mean else query.shape[1], query.shape[2]
    if 0 in (*rows, num_k):
        return query.new_zeros(rows, dtype=torch.float32)
    own, other = _sides(inputs)
    if inputs.kind == "reverse_kl":
        return divergences(inputs, other, own, "kl")
    return divergences(inputs, own, other, inputs.kind)


def divergences(
    inputs: AttentionDivergenceInputs | AttentionDivergenceBackwardInputs, own: Side, other: Side, kind: str
) -> Tensor:
    """D (B, H or 1, N) of these sides. There is a query, and a key."""
    query, num_k = inputs.query, inputs.key.shape[2]
    rows = query.shape[0], 1 if inputs.head_mean else query.shape[1], query.shape[2]
    call, config = call_of(inputs, own, other, kind, inputs.beta, "terms")
    parts = min(_PARTS, cdiv(num_k, config["BLOCK_KV"])) if inputs.head_mean else 1
    keys = cdiv(cdiv(num_k, parts), config["BLOCK_KV"]) * config["BLOCK_KV"]
    parts = cdiv(num_k, keys)
    signs = 2 if kind == "total_variation" else 1
    sums = query.new_empty((signs, *rows[:2], parts, rows[2]), dtype=torch.float32)
    grid = (cdiv(rows[2], config["BLOCK_Q"]) * parts * rows[0] * rows[1],)
    _terms_kernel[grid](**launched(call, config), strip=None, p_sums=sums, first=0, rows=rows[2], keys=keys)
    return sums.sum(3).amax(0)


@on_device
def backward(inputs: AttentionDivergenceBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, other_query and other_key; None for a side that needs none."""
    own, other = _sides(inputs)
    made: list[Tensor | None] = [None] * 4
    divergence = None if inputs.head_mean else inputs.divergence
    mean = None if divergence is None or inputs.kind not in _SHARES else _SHARES[inputs.kind] * divergence
    if inputs.need_own:
        made[0], made[1], mean = gradients(inputs, own, other, inputs.kind, inputs.beta, inputs.scale, mean)
    if inputs.need_other:
        exchanged = other, own, _EXCHANGED.get(inputs.kind, inputs.kind), 1.0 - inputs.beta, inputs.other_scale
        rest = None if divergence is None or mean is None else divergence - mean
        made[2:] = gradients(inputs, *exchanged, rest)[:2]
    return tuple(made)


def gradients(
    inputs: AttentionDivergenceBackwardInputs, own: Side, other: Side, kind: str, beta: float, scale: float, known: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Those of query and key of the side `own`, and sum_j A_ij r_ij, which takes a sweep unless it is known."""
    query, key = own.q.p, own.k.p
    grad_q, grad_k = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key))
    if query.numel() == 0 or key.numel() == 0:
        return grad_q, grad_k, known
    (batch, heads, num_q, _), (_, key_heads, num_k, _) = query.shape, key.shape
    mean = inputs.head_mean
    call, config = call_of(inputs, own, other, kind, beta, "backward_q")
    _, config_k = call_of(inputs, own, other, kind, beta, "backward_kv")
    of_means, config_r = call_of(inputs, own, other, kind, beta, "terms")
    rows = rows_of_strips(num_q, num_k) if mean else num_q
    of_rows = query.new_empty((batch, heads, num_q), dtype=torch.float32) if known is None else known.contiguous()
    grads = {"p_grad": inputs.grad.float().contiguous(), "p_mean": of_rows, "factor": scale / heads if mean else scale}
    parts = [grad_k] if rows == num_q else [torch.zeros_like(grad_k, dtype=torch.float32) for _ in range(2)]
    for first in range(0, num_q, rows):
        size = min(rows, num_q - first)
        part: dict[str, Any] = {"strip": None, "first": first, "rows": size}
        if mean:
            strip = query.new_zeros((2, batch, size, num_k), dtype=torch.float32)
            part["strip"] = strip[0], strip[1]
            fill_strip(of_means, config_r, **part)
        grid = (cdiv(size, config["BLOCK_Q"]) * batch * heads,)
        _backward_q_kernel[grid](**launched(call, config), **grads, **part, p_grad_q=grad_q, KNOWN=known is not None)
        grid = (cdiv(num_k, config_k["BLOCK_KV"]) * batch * key_heads,)
        _backward_kv_kernel[grid](**launched(call, config_k), **grads, **part, p_grad_k=parts[-1])
        if len(parts) > 1:
            parts[0] += parts[1]
    return grad_q, parts[0].to(key.dtype), of_rows


def rows_of_strips(num_q: int, num_k: int) -> int:
    return min(num_q, max(1, _STRIP_BYTES // (8 * num_k * ROW_MULTIPLE.value)) * ROW_MULTIPLE.value)


def fill_strip(call: dict[str, Any], config: dict[str, int], strip: tuple[Tensor, ...], first: int, rows: int) -> None:
    """Of `rows` queries from the `first` on, A r of the mean, and log2 A if the strip has two tensors of zeros (B, rows, M)."""
    batch, _, keys = strip[0].shape
    block = config["BLOCK_KV"]
    grid = (cdiv(rows, config["BLOCK_Q"]) * cdiv(keys, block) * batch,)
    _terms_kernel[grid](**launched(call, config), strip=strip, p_sums=None, first=first, rows=rows, keys=block)


def _sides(inputs: AttentionDivergenceInputs | AttentionDivergenceBackwardInputs) -> tuple[Side, Side]:
    own = side_of(inputs, aligned(inputs.query), aligned(inputs.key), inputs.scale)
    return own, side_of(inputs, aligned(inputs.other_query), aligned(inputs.other_key), inputs.other_scale)


def side_of(
    inputs: AttentionDivergenceInputs | AttentionDivergenceBackwardInputs,
    query: Tensor,
    key: Tensor,
    scale: float,
    lse: Tensor | None = None,
) -> Side:
    """A given lse (B, H, N), which has no mask of numbers beside it, stands for the largest logit of a row, whose weight is 1."""
    attention = _masked(inputs)._replace(query=query, key=key, scale=scale)
    heads = query.shape[1]
    if lse is None:
        maximum = AttentionStatisticsInputs(attention, None, num_groups=0, statistics="maximum", backend=inputs.backend)
        _, _, p_weight, _, _, _, p_max, _ = _statistics(maximum)
    else:
        p_max = (lse * LOG2_E if scale <= 0.0 else lse / scale).masked_fill(lse == -torch.inf, torch.inf).contiguous()
        p_weight = torch.ones_like(p_max)
    return Side(heads_of(query), heads_of(key), p_max, p_weight, heads, heads // max(1, key.shape[1]), scale * LOG2_E)


def _masked(inputs: AttentionDivergenceInputs | AttentionDivergenceBackwardInputs) -> Attention:
    """One of the two attentions, with the masks of both."""
    return Attention(inputs.query, inputs.key, None, inputs.attn_mask, inputs.key_mask, is_causal=inputs.is_causal)


def call_of(
    inputs: AttentionDivergenceInputs | AttentionDivergenceBackwardInputs,
    own: Side,
    other: Side,
    kind: str,
    beta: float,
    kernel: str,
) -> tuple[dict[str, Any], dict[str, int]]:
    """The named arguments that all kernels here share, and the configuration of one."""
    query, key = own.q.p, own.k.p
    masks, mask = masks_and_kind(_masked(inputs), inputs.query)
    size, other_size = query.shape[3], other.q.p.shape[3]
    constants = Constants(
        KIND=kind,
        MEAN=inputs.head_mean,
        MASK=mask,
        KEY_MASK=inputs.key_mask is not None,
        CAUSAL=inputs.is_causal,
        D=size,
        BLOCK_D=block_size(size),
        FOLDED=own.scale_log2 <= 0.0 or mask >= FLOAT_MASK.value,
        OTHER_D=other_size,
        OTHER_BLOCK_D=block_size(other_size),
        OTHER_FOLDED=other.scale_log2 <= 0.0 or mask >= FLOAT_MASK.value,
        PRECISION=input_precision(),
    )
    call = {"own": own, "other": other, "masks": masks, "N": query.shape[2], "M": key.shape[2], "beta": beta, "C": constants}
    masked = inputs.attn_mask is not None or inputs.head_mean  # addresses of strips take registers as well
    facts = {"dtype": query.dtype, "size": max(size, other_size), "masked": masked}
    return call, configuration("attention_divergence", kernel, **facts)


@triton.jit
def _terms_kernel(own, other, masks, strip, p_sums, N, M, first, rows, keys, beta, C: tl.constexpr):
    """The sum of f over a part of `keys` keys j, for a tile of queries i of one head or of the heads' mean.

    Total variation has two sums, see `_divergence`.
    With a strip no sums, but A r of the mean for its queries, `rows` from the `first` on, and log2 A if it has two tensors; 0 for
    pairs that no head sees.
    """
    parts = tl.cdiv(M, keys)
    i, i_bh, i_b, i_h, _ = block_and_head(tl.cdiv(rows, C.BLOCK_Q) * parts, 1 if C.MEAN else own.H, 1)
    i_q, i_part = first // C.BLOCK_Q + i // parts, i % parts
    o_q = i_q * C.BLOCK_Q + tl.arange(0, C.BLOCK_Q)
    _, end = key_range(i_q, M, True, C.CAUSAL, C.BLOCK_Q, C.BLOCK_KV)
    end = tl.minimum(end, i_part * keys + keys)
    at_head = masks_at(masks, i_b, i_h, M)
    if not C.MEAN:
        queries = _queries(own, i_b, i_h, o_q, N, C.D, C.BLOCK_D)
        others = _queries(other, i_b, i_h, o_q, N, C.OTHER_D, C.OTHER_BLOCK_D)
    b_sum = tl.zeros([C.BLOCK_Q, C.BLOCK_KV], dtype=tl.float32)  # over its columns once, at the end
    b_negative = tl.zeros([C.BLOCK_Q, C.BLOCK_KV], dtype=tl.float32)
    for start in range(i_part * keys, end, C.BLOCK_KV):
        o_kv = start + tl.arange(0, C.BLOCK_KV)
        if C.MEAN:
            b_a = _log_map(own, masks, i_b, start, o_q, o_kv, N, M, C.D, C.BLOCK_D, C.FOLDED, C)
            b_b = _log_map(other, masks, i_b, start, o_q, o_kv, N, M, C.OTHER_D, C.OTHER_BLOCK_D, C.OTHER_FOLDED, C)
        else:
            t_k = keys_of(own, at_head, i_b, i_h, o_kv, M, C.D, C.BLOCK_D, C.KEY_MASK)
            b_a = _logs(queries, t_k, Pairs(at_head, start, o_q, o_kv, N, M), own.scale_log2, C.D, C.FOLDED, C)
            t_theirs = keys_of(other, at_head, i_b, i_h, o_kv, M, C.OTHER_D, C.OTHER_BLOCK_D, C.KEY_MASK)
            b_b = _logs(others, t_theirs, Pairs(at_head, start, o_q, o_kv, N, M), other.scale_log2, C.OTHER_D, C.OTHER_FOLDED, C)
        if strip is None:
            b_f = _divergence(b_a, b_b, beta, C)
            if C.KIND == "total_variation":
                b_negative += tl.where(b_f > 0.0, 0.0, -b_f)  # NaN stays in both
                b_f = tl.where(b_f < 0.0, 0.0, b_f)
            b_sum += b_f
        else:
            store_tile(strip[0] + i_b * rows * M, M, o_q - first, o_kv, rows, M, _weighted(b_a, b_b, beta, C))
            if len(strip) > 1:
                b_log = tl.where(b_a == float("-inf"), 0.0, b_a)
                store_tile(strip[1] + i_b * rows * M, M, o_q - first, o_kv, rows, M, b_log)
    if strip is None:
        tl.store(p_sums + (i_bh * parts + i_part) * N + o_q, tl.sum(b_sum, axis=1), mask=o_q < N)
        if C.KIND == "total_variation":
            p_negative = p_sums + tl.num_programs(0).to(tl.int64) // tl.cdiv(rows, C.BLOCK_Q) * N
            tl.store(p_negative + (i_bh * parts + i_part) * N + o_q, tl.sum(b_negative, axis=1), mask=o_q < N)


@triton.jit
def _backward_q_kernel(
    own, other, masks, strip, p_grad, p_mean, p_grad_q, N, M, first, rows, beta, factor, C: tl.constexpr, KNOWN: tl.constexpr
):
    """dQ of a tile of queries i of one head, by a sweep over its keys j. Unless mean_i is KNOWN, one before that gives it.

    mean_i = sum_j A_ij r_ij      dS_ij = dD_i (A_ij r_ij - A_ij mean_i)      dq_i = scale sum_j dS_ij k_j
    A mean over H heads has A_h r = (A_h / Abar) Abar r, and 1 / H of that dS. factor: scale, or scale / H.
    """
    i, i_bh, i_b, i_h, _ = block_and_head(tl.cdiv(rows, C.BLOCK_Q), own.H, 1)
    i_q = first // C.BLOCK_Q + i
    o_q = i_q * C.BLOCK_Q + tl.arange(0, C.BLOCK_Q)
    _, end = key_range(i_q, M, True, C.CAUSAL, C.BLOCK_Q, C.BLOCK_KV)
    at_head = masks_at(masks, i_b, i_h, M)
    place = i_b, N, M, first, rows, beta
    queries = _queries(own, i_b, i_h, o_q, N, C.D, C.BLOCK_D)
    others = queries if C.MEAN else _queries(other, i_b, i_h, o_q, N, C.OTHER_D, C.OTHER_BLOCK_D)
    b_sum = tl.zeros([C.BLOCK_Q, C.BLOCK_KV], dtype=tl.float32)
    for start in range(0, 0 if KNOWN else end, C.BLOCK_KV):
        o_kv = start + tl.arange(0, C.BLOCK_KV)
        t_k = keys_of(own, at_head, i_b, i_h, o_kv, M, C.D, C.BLOCK_D, C.KEY_MASK)
        t_theirs = t_k if C.MEAN else keys_of(other, at_head, i_b, i_h, o_kv, M, C.OTHER_D, C.OTHER_BLOCK_D, C.KEY_MASK)
        b_log, b_weighted = _terms(own, other, strip, place, queries, t_k, others, t_theirs, at_head, start, o_q, o_kv, C)
        b_sum += b_weighted
    if KNOWN:
        b_mean = tl.load(p_mean + i_bh * N + o_q, mask=o_q < N, other=0.0)
    else:
        b_mean = tl.sum(b_sum, axis=1)
        tl.store(p_mean + i_bh * N + o_q, b_mean, mask=o_q < N)
    b_grad = tl.load(p_grad + (i_b if C.MEAN else i_bh) * N + o_q, mask=o_q < N, other=0.0) * factor
    b_sums = zero_sums(own.q.p.dtype.element_ty, C.BLOCK_Q, C.D, C.BLOCK_D)
    for start in range(0, end, C.BLOCK_KV):
        o_kv = start + tl.arange(0, C.BLOCK_KV)
        t_k = keys_of(own, at_head, i_b, i_h, o_kv, M, C.D, C.BLOCK_D, C.KEY_MASK)
        t_theirs = t_k if C.MEAN else keys_of(other, at_head, i_b, i_h, o_kv, M, C.OTHER_D, C.OTHER_BLOCK_D, C.KEY_MASK)
        b_log, b_weighted = _terms(own, other, strip, place, queries, t_k, others, t_theirs, at_head, start, o_q, o_kv, C)
        b_ds = (b_weighted - tl.exp2(b_log) * b_mean[:, None]) * b_grad[:, None]
        b_sums = add_small(b_sums, b_ds, t_k, C.D, C.PRECISION)
    store_sums(p_grad_q + i_bh * N * C.D, C.D, o_q, tl.arange(0, C.BLOCK_D), N, C.D, b_sums)


@triton.jit
def _backward_kv_kernel(own, other, masks, strip, p_grad, p_mean, p_grad_k, N, M, first, rows, beta, factor, C: tl.constexpr):
    """dK of a tile of keys j, over `rows` queries i from the `first` on, of the GROUP_K query heads that share it, with dS as in
    `_backward_q_kernel`: dk_j = scale sum_i dS_ij q_i."""
    i_kv, i_bh, i_b, i_hk, _ = block_and_head(tl.cdiv(M, C.BLOCK_KV), own.H // own.GROUP_K, 1)
    o_kv = i_kv * C.BLOCK_KV + tl.arange(0, C.BLOCK_KV)
    t_k = keys_of(own, masks_at(masks, i_b, 0, M), i_b, i_hk * own.GROUP_K, o_kv, M, C.D, C.BLOCK_D, C.KEY_MASK)
    begin = tl.maximum(first, i_kv * C.BLOCK_KV // C.BLOCK_Q * C.BLOCK_Q) if C.CAUSAL else first
    place = i_b, N, M, first, rows, beta
    b_sums = zero_sums(own.q.p.dtype.element_ty, C.BLOCK_KV, C.D, C.BLOCK_D, True)
    for head in range(0, own.GROUP_K):
        i_h = i_hk * own.GROUP_K + head
        at_head = masks_at(masks, i_b, i_h, M)
        t_theirs = t_k if C.MEAN else keys_of(other, at_head, i_b, i_h, o_kv, M, C.OTHER_D, C.OTHER_BLOCK_D, C.KEY_MASK)
        for start in range(begin, first + rows, C.BLOCK_Q):
            o_q = start + tl.arange(0, C.BLOCK_Q)
            queries = _queries(own, i_b, i_h, o_q, N, C.D, C.BLOCK_D)
            others = queries if C.MEAN else _queries(other, i_b, i_h, o_q, N, C.OTHER_D, C.OTHER_BLOCK_D)
            first_key = i_kv * C.BLOCK_KV
            b_log, b_weighted = _terms(own, other, strip, place, queries, t_k, others, t_theirs, at_head, first_key, o_q, o_kv, C)
            o_row = (i_b * own.H + i_h) * N + o_q
            b_mean = tl.load(p_mean + o_row, mask=o_q < N, other=0.0)
            b_grad = tl.load(p_grad + (i_b * N + o_q if C.MEAN else o_row), mask=o_q < N, other=0.0) * factor
            b_ds = (b_weighted - tl.exp2(b_log) * b_mean[:, None]) * b_grad[:, None]
            b_sums = add_small(b_sums, tl.trans(b_ds), queries[0], C.D, C.PRECISION)
    store_sums(p_grad_k + i_bh * M * C.D, C.D, o_kv, tl.arange(0, C.BLOCK_D), M, C.D, b_sums)


@triton.jit
def _queries(side, i_b, i_h, o_q, N, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile of queries [q,D] of one head, and of each row the largest logit and log2 of the largest weight."""
    b_max, b_largest = largest_of(side, (i_b * side.H + i_h) * N + o_q, o_q < N)
    return head_tile(side.q, i_b, i_h, o_q, N, D, BLOCK_D), b_max, b_largest


@triton.jit
def largest_of(side, o_row, m_row):
    """Of rows of a map the largest logit and log2 of the largest weight."""
    b_max = tl.load(side.p_max + o_row, mask=m_row, other=float("inf"))
    b_weight = tl.load(side.p_weight + o_row, mask=m_row, other=1.0)
    return b_max, tl.log2(tl.where(b_weight == 0.0, 1.0, b_weight))  # 0 in a row without keys, whose largest logit is inf


@triton.jit
def keys_of(side, masks, i_b, i_h, o_kv, M, D: tl.constexpr, BLOCK_D: tl.constexpr, KEY_MASK: tl.constexpr):
    """A tile of keys [kv,D] for a query head."""
    p_k = head_at(side.k, i_b, i_h // side.GROUP_K, D)
    return key_tile(p_k, side.k.stride_n, masks.p_keys, o_kv, M, D, BLOCK_D, KEY_MASK)


@triton.jit
def _logs(queries, t_k, pairs, scale_log2, D: tl.constexpr, FOLDED: tl.constexpr, C: tl.constexpr):
    """log2 A [q,kv] of one head, -inf for masked pairs and outside of N x M."""
    t_q, b_max, b_largest = queries
    b_s = row_products(t_q, t_k, D, C.PRECISION)
    if FOLDED:
        b_s *= scale_log2
    b_s = mask_logits(b_s, pairs, C.MASK, C.KEY_MASK, C.CAUSAL)
    return below_max(b_s, b_max, scale_log2, FOLDED) + b_largest[:, None]


@triton.jit
def _log_map(
    side, masks, i_b, start, o_q, o_kv, N, M, D: tl.constexpr, BLOCK_D: tl.constexpr, FOLDED: tl.constexpr, C: tl.constexpr
):
    """log2 A [q,kv] of an indexer, or of the heads' mean."""
    if side.p_factors is None:
        return _log_mean(side, masks, i_b, start, o_q, o_kv, N, M, D, BLOCK_D, FOLDED, C)
    else:
        b_s = index_logits(side, masks_at(masks, i_b, 0, M), i_b, start, o_q, o_kv, N, M, D, BLOCK_D, FOLDED, C)
        b_max, b_largest = largest_of(side, i_b * N + o_q, o_q < N)
        return below_max(b_s, b_max, side.scale_log2, FOLDED) + b_largest[:, None]


@triton.jit
def index_logits(
    side, masks, i_b, start, o_q, o_kv, N, M, D: tl.constexpr, BLOCK_D: tl.constexpr, FOLDED: tl.constexpr, C: tl.constexpr
):
    """Logits [q,kv] of an indexer for `below_max`: sum_h w_h relu(z_h), -inf for masked pairs and outside of N x M."""
    t_k = keys_of(side, masks, i_b, i_b * 0, o_kv, M, D, BLOCK_D, C.KEY_MASK)
    b_s = tl.zeros([o_q.shape[0], o_kv.shape[0]], dtype=tl.float32)
    for h in range(side.H):
        t_q, b_factor = index_queries(side, i_b, i_b * 0 + h, o_q, N, D, BLOCK_D)
        b_s += b_factor[:, None] * relu(row_products(t_q, t_k, D, C.PRECISION))
    if FOLDED:
        b_s *= side.scale_log2
    return mask_logits(b_s, Pairs(masks, start, o_q, o_kv, N, M), C.MASK, C.KEY_MASK, C.CAUSAL)


@triton.jit
def index_queries(side, i_b, i_h, o_q, N, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile of queries [q,D] of one head of an indexer, and the head's factors [q]."""
    b_factor = tl.load(side.p_factors + (i_b * side.H + i_h) * N + o_q, mask=o_q < N, other=0.0).to(tl.float32)
    return head_tile(side.q, i_b, i_h, o_q, N, D, BLOCK_D), b_factor


@triton.jit
def _log_mean(
    side, masks, i_b, start, o_q, o_kv, N, M, D: tl.constexpr, BLOCK_D: tl.constexpr, FOLDED: tl.constexpr, C: tl.constexpr
):
    """log2 of the heads' mean of A [q,kv]; a sum below a largest power of its own, so that no weight underflows."""
    b_high = tl.full([o_q.shape[0], o_kv.shape[0]], -3.0e38, dtype=tl.float32)  # finite: -inf - -inf would be NaN
    b_sum = tl.zeros([o_q.shape[0], o_kv.shape[0]], dtype=tl.float32)
    for h in range(side.H):
        i_h = i_b * 0 + h
        at_head = masks_at(masks, i_b, i_h, M)
        queries = _queries(side, i_b, i_h, o_q, N, D, BLOCK_D)
        t_k = keys_of(side, at_head, i_b, i_h, o_kv, M, D, BLOCK_D, C.KEY_MASK)
        b_log = _logs(queries, t_k, Pairs(at_head, start, o_q, o_kv, N, M), side.scale_log2, D, FOLDED, C)
        b_above = b_log - b_high
        b_less = tl.exp2(-tl.abs(b_above))
        b_sum = tl.where(b_above > 0.0, b_sum * b_less + 1.0, b_sum + b_less)
        b_high = tl.maximum(b_high, b_log)
    empty = b_sum == 0.0
    return tl.where(empty, float("-inf"), b_high + tl.log2(tl.where(empty, 1.0, b_sum / side.H)))


@triton.jit
def _terms(own, other, strip, place, queries, t_k, others, t_theirs, masks, start, o_q, o_kv, C: tl.constexpr):
    """log2 A and A r [q,kv] of one head of `own`."""
    i_b, N, M, first, rows, beta = place
    b_log = _logs(queries, t_k, Pairs(masks, start, o_q, o_kv, N, M), own.scale_log2, C.D, C.FOLDED, C)
    if C.MEAN:
        b_mean = load_tile(strip[1] + i_b * rows * M, M, o_q - first, o_kv, rows, M)
        b_share = tl.exp2(b_log - b_mean)  # A_h / Abar, at most H
        return b_log, b_share * load_tile(strip[0] + i_b * rows * M, M, o_q - first, o_kv, rows, M)
    else:
        b_other = _logs(others, t_theirs, Pairs(masks, start, o_q, o_kv, N, M), other.scale_log2, C.OTHER_D, C.OTHER_FOLDED, C)
        return b_log, _weighted(b_log, b_other, beta, C)


@triton.jit
def add_small(b_sums, b_ds, y, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """b_sums + b_ds y for gradients b_ds of any magnitude, and a tile y."""
    if y.b.dtype == tl.float16:
        return (b_sums[0] + dot_small(b_ds, y.b, PRECISION),)
    else:
        return add_products(b_sums, b_ds, y, SIZE, PRECISION)


@triton.jit
def difference(b_a, b_b):
    """ln p - ln q of a = log2 p and b = log2 q; 0 for masked pairs."""
    masked = (b_a == float("-inf")) | (b_b == float("-inf"))
    return tl.where(masked, 0.0, b_a - b_b) * 0.6931471805599453


@triton.jit
def kl(b_p, b_q, b_d):
    """p (d - 1 + e^-d) for d = ln p - ln q, a power series where that would cancel."""
    b = b_d * -2.505210838544172e-08 + 2.755731922398589e-07  # (-d)^n / (n + 2)!, n from 9 to 0
    b = b * b_d - 2.755731922398589e-06
    b = b * b_d + 2.48015873015873e-05
    b = b * b_d - 0.0001984126984126984
    b = b * b_d + 0.001388888888888889
    b = b * b_d - 0.008333333333333333
    b = b * b_d + 0.041666666666666664
    b = b * b_d - 0.16666666666666666
    b = b * b_d + 0.5
    return tl.where(tl.abs(b_d) < 1.0, b_p * (b_d * b_d * b), b_p * b_d + b_q - b_p)


@triton.jit
def _from_mixture(b_d, beta, PRECISION: tl.constexpr):
    """ln p - ln m and ln q - ln m of the mixture m = beta p + (1 - beta) q, for d = ln p - ln q."""
    b_less = tl.where(b_d >= 0.0, 1.0 - beta, beta)  # the factor of the smaller of p and q; m is the larger one times
    b_x = b_less * expm1(-tl.abs(b_d))  # from -1 to 0
    b_log = log1p_by(b_x, b_x * reciprocal(2.0 + b_x, PRECISION))  # the exponential of this
    return tl.minimum(b_d, 0.0) - b_log, -tl.maximum(b_d, 0.0) - b_log


@triton.jit
def _divergence(b_a, b_b, beta, C: tl.constexpr):
    """f(p, q) of a = log2 p and b = log2 q: no term is negative, so that small divergences keep their digits.

    Of total variation p - q, and 0 for a key with more than half of the weight, whose difference has no digits beside 1. The
    differences of all keys add up to 0, so that its own is what the others leave: the larger of the sums of positive and negative
    terms is the divergence.
    """
    b_d = difference(b_a, b_b)
    b_p, b_q = tl.exp2(b_a), tl.exp2(b_b)
    if C.KIND == "kl":
        return kl(b_p, b_q, b_d)
    elif C.KIND == "js":
        b_m = beta * b_p + (1.0 - beta) * b_q
        b_to, b_from = _from_mixture(b_d, beta, C.PRECISION)
        return beta * kl(b_p, b_m, b_to) + (1.0 - beta) * kl(b_q, b_m, b_from)
    elif C.KIND == "hellinger":
        b_root = tl.exp2(b_a * 0.5) - tl.exp2(b_b * 0.5)
        return b_root * b_root * 0.5
    else:
        return tl.where(b_a > -1.0, 0.0, b_p - b_q)


@triton.jit
def _weighted(b_a, b_b, beta, C: tl.constexpr):
    """p df/dp of a = log2 p and b = log2 q, up to a constant times p, which drops out."""
    b_d = difference(b_a, b_b)
    b_p, b_q = tl.exp2(b_a), tl.exp2(b_b)
    if C.KIND == "kl":
        return b_p * b_d
    elif C.KIND == "reverse_kl":
        return b_p - b_q
    elif C.KIND == "js":
        b_to, _ = _from_mixture(b_d, beta, C.PRECISION)
        return beta * b_p * b_to
    elif C.KIND == "hellinger":
        b_root = tl.exp2(b_a * 0.5)
        return b_root * (b_root - tl.exp2(b_b * 0.5)) * 0.5
    else:
        return tl.where(b_p > b_q, 0.5, tl.where(b_p < b_q, -0.5, 0.0)) * b_p
