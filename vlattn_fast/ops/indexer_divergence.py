"""Divergence of an indexer of sparse attention from the attention whose keys it chooses, row by row: its training loss.

Formula: reference/indexer_divergence.py. Bounded memory: streaming/indexer_divergence.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast import kernels
from vlattn_fast._ground.checks import (
    check_bool,
    check_device,
    check_floating,
    check_integer,
    check_lse,
    check_masks,
    check_tensor,
    describe,
)
from vlattn_fast._ground.tensors import blocks_of_keys, cast_by_autocast, compute_dtype, mask_padding, without_autocast
from vlattn_fast.backends import reference
from vlattn_fast.backends.cpu import indexer_divergence as cpu
from vlattn_fast.backends.streaming import indexer_divergence as streaming
from vlattn_fast.backends.streaming.indexer_divergence import FIELDS, IndexerDivergenceBackwardInputs, IndexerDivergenceInputs
from vlattn_fast.dispatch.call import AttentionArguments, CallShape, call_shape
from vlattn_fast.dispatch.choice import launcher, planned
from vlattn_fast.dispatch.operator import Operator
from vlattn_fast.dispatch.table import table
from vlattn_fast.ops._derivatives import Derivatives
from vlattn_fast.ops._documents import Ids, over_documents
from vlattn_fast.ops._stages import planning
from vlattn_fast.ops.attention_divergence import check_key


def _triton_limits(call: CallShape) -> list[tuple[str, bool]]:
    return [
        ("Triton kernels take no attn_mask of numbers with teacher_lse", call.flags["lse_of_numbers"]),
        ("Triton kernels take a key_block of 1", call.sizes["key_block"] > 1),
        ("Triton kernels take a head_dim of index_query of at most 256", call.sizes["index_dim"] > 256),
    ]


def _cpu_limits(call: CallShape) -> list[tuple[str, bool]]:
    return [
        ("C++ kernels take a key_block of 1", call.sizes["key_block"] > 1),
        ("C++ kernels take no attn_mask of numbers with teacher_lse", call.flags["lse_of_numbers"]),
    ]


_LIMITS = {"cpu": _cpu_limits, "triton": _triton_limits}
BACKENDS = table(streaming, cpu=cpu, triton=lambda: kernels.indexer_divergence, limits=_LIMITS)
_SHAPES = {
    "query": "(B, H, N, D)",
    "key": "(B, Hkv, M, D)",
    "index_query": "(B, Hi, N, Di)",
    "index_key": "(B, ceil(M / key_block), Di)",
    "index_weights": "(B, Hi, N)",
}


def indexer_divergence(
    query: Tensor,
    key: Tensor,
    index_query: Tensor,
    index_key: Tensor,
    index_weights: Tensor,
    *,
    topk_indices: Tensor | None = None,
    teacher_lse: Tensor | None = None,
    key_block: int = 1,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    document_ids: Ids = None,
    cu_seqlens: Ids = None,
    backend: str = "auto",
) -> Tensor:
    """Computes how far an indexer of sparse attention is from the attention whose keys it chooses: D_i = KL(mean_h A_h || A').

    Returns one number per query, the training loss of DeepSeek sparse attention's lightning indexer. No map is stored: memory in
    addition to inputs and output is O(N + M) per head, and the backward pass recomputes both maps. The gradients of a detached
    query and key cost nothing there.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> query, key = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8)
        >>> index_query, index_key, index_weights = torch.randn(2, 3, 7, 5), torch.randn(2, 7, 5), torch.rand(2, 3, 7)
        >>> va.indexer_divergence(query, key, index_query, index_key, index_weights, is_causal=True).shape
        torch.Size([2, 7])

    A_h = softmax(scale q_h k_h^T + mask) of each head, and A'_ij = softmax_j(sum_h w_ih relu(q'_ih . k'_j) + mask). With
    key_block > 1 both are maps of blocks of keys: A_h is summed over the keys of each, and A' has one score for it.

    Args:
        query, key: (B, H, N, D) and (B, Hkv, M, D), Hkv = H, or a divisor of H with enable_gqa; float16, bfloat16, float32,
            float64. Usually detached: only the indexer learns.
        index_query, index_key, index_weights: q' (B, Hi, N, Di), k' (B, M, Di) and w (B, Hi, N), of the same dtype. Factors, such
            as 1/sqrt(Di), belong to the weights.
        topk_indices: int64 or int32 (B, N, K), the keys of each query over which both softmaxes run, such as those that sparse
            attention took; a key counts once. Indices outside [0, M), e.g. -1, mean no key. Default: all keys. With key_block > 1
            they are the indices of blocks.
        teacher_lse: (B, H, N), float32 or float64, each row's log-sum-exp of the scaled and masked scores of
            query and key, as the model's attention returns it: A_h is then exp(score - teacher_lse), without a second softmax.
            It must be over the same keys: of sparse attention if there are topk_indices. Rows without keys have -inf. A detached
            one is a constant: query and key have no gradient through their softmax then. Rows of which it has lost its digits,
            beyond 2^14 in float32, such as those of masks of -1e9, take their own softmax.
        key_block: how many keys in a row share an index key, as where keys are compressed; index_key is (B, ceil(M / key_block),
            Di). A block without a visible key is masked. Of a mask of numbers A' has the largest in a block.
        attn_mask, key_mask, is_causal, enable_gqa: of both sides, as in score_attention; attn_mask broadcasts to (B, 1, N, M).
        document_ids, cu_seqlens: see score_attention. key_block must be 1.
        scale: multiplies the scores of query and key. Default: 1/sqrt(D).
        backend: "auto", "reference", "streaming", "cpu" or "triton".

    Returns:
        D (B, N) in nats, float32 (float64 for float64 input). 0 for a query without a visible key. Small divergences keep their
        digits. Twice differentiable in all tensors but topk_indices.

    Raises:
        ValueError, TypeError: if an argument is wrong (the message names it), or the requested backend does not support the call.
    """
    if document_ids is not None or cu_seqlens is not None or getattr(query, "is_nested", False):
        if key_block != 1:
            raise ValueError(f"key_block must be 1 for packed documents, whose blocks would have keys of two; got {key_block!r}")
        return over_documents(indexer_divergence, locals(), ["bq"])
    x = AttentionArguments(query, key, attn_mask, key_mask, is_causal, scale, enable_gqa, backend=backend)
    plan = planned(_plan, x, index_query, index_key, index_weights, topk_indices, teacher_lse, key_block)
    key_block = min(key_block, max(key.shape[2], 1))  # a row of a map is padded to whole blocks
    query, key, index_query, index_key, index_weights = cast_by_autocast(query, key, index_query, index_key, index_weights)
    if plan.backend == "reference":
        masks: dict[str, Any] = {"topk_indices": topk_indices, "attn_mask": attn_mask, "key_mask": key_mask}
        masks |= {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        masks |= {"teacher_lse": teacher_lse, "key_block": key_block}
        with without_autocast(query):
            return reference.indexer_divergence(query, key, index_query, index_key, index_weights, **masks)
    (key,), blocks = mask_padding(key_mask, key), key_mask
    if key_mask is not None and key_block > 1:
        blocks = blocks_of_keys(key_mask, key_block, False).any(-1)
    (index_key,) = mask_padding(blocks, index_key[:, None])
    lse = None if teacher_lse is None else teacher_lse.to(compute_dtype(query))
    tensors = query, key, lse, index_query, index_key[:, 0], index_weights, topk_indices, attn_mask, key_mask
    divergence: Tensor = _derivatives.forward(IndexerDivergenceInputs(*tensors, is_causal, plan.scale, key_block, plan.backend))
    return divergence


def _describe(
    x: AttentionArguments,
    index_query: Tensor,
    index_key: Tensor,
    index_weights: Tensor,
    topk_indices: Tensor | None,
    teacher_lse: Tensor | None,
    key_block: int,
) -> CallShape:
    """Checks a call except for its scale, and returns its metadata."""
    check_bool(enable_gqa=x.enable_gqa)
    check_integer("key_block", key_block, low=1)
    query, key = x.query, x.key
    tensors = dict(zip(_SHAPES, (query, key, index_query, index_key, index_weights), strict=True))
    for name, tensor in tensors.items():
        legend = _SHAPES[name]
        check_tensor(name, tensor, rank=legend.count(",") + 1, shape=legend)
    check_floating(**tensors)
    check_key("key", key, "query", query, x.enable_gqa)
    if query.shape[1] == 0:
        raise ValueError(f"query must have at least one head to reduce; got {describe(query)}")
    (batch, _, queries, _), keys, (_, heads, _, dim) = query.shape, key.shape[2], index_query.shape
    shapes = (batch, heads, queries, dim), (batch, -(-keys // key_block), dim), (batch, heads, queries)
    _check_index({name: (tensors[name], shape) for name, shape in zip(FIELDS[3:], shapes, strict=True)}, query)
    if topk_indices is not None:
        _check_indices(topk_indices, query)
    check_lse(teacher_lse, query, "teacher_lse")
    check_masks(query[:, :1], key, x.attn_mask, x.key_mask, x.is_causal)
    sizes = {"queries": queries, "keys": keys, "head_dim": query.shape[3]}
    sizes |= {"index_heads": heads, "index_dim": dim, "key_block": key_block}
    has_numbers = x.attn_mask is not None and x.attn_mask.dtype != torch.bool  # a row's log-sum-exp may lose its digits
    flags = {"lse_of_numbers": has_numbers and teacher_lse is not None}
    return call_shape("indexer_divergence", query, sizes, flags)


_plan = planning(BACKENDS, _describe)


def _check_index(shapes: dict[str, tuple[Tensor, tuple[int, ...]]], query: Tensor) -> None:
    for name, (index, shape) in shapes.items():
        check_device(name, index, "query", query)
        if index.shape != shape:
            raise ValueError(f"{name} must have shape {_SHAPES[name]} = {shape}; got {describe(index)}")


def _check_indices(topk_indices: Any, query: Tensor) -> None:
    check_tensor("topk_indices", topk_indices, rank=3, shape="(B, N, K)")
    if topk_indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"topk_indices must be int64 or int32; got {describe(topk_indices)}")
    check_device("topk_indices", topk_indices, "query", query)
    if topk_indices.shape[:2] != (query.shape[0], query.shape[2]):
        raise ValueError(f"topk_indices must have query's B and N; got {describe(topk_indices)} for {describe(query)}")


def _forward_fake(inputs: Any) -> Tensor:
    query = inputs.query
    return query.new_empty(query.shape[0], query.shape[2], dtype=compute_dtype(query))


_launched = launcher(BACKENDS, streaming.backward)


def _backward(inputs: IndexerDivergenceBackwardInputs) -> tuple[Tensor | None, ...]:
    """No kernel has the gradients of an attention with a given log-sum-exp, and Triton none of one with chosen keys."""
    chosen = inputs.topk_indices is not None and inputs.backend == "triton"
    if 0 in (inputs.query.shape[0], inputs.query.shape[2], inputs.key.shape[2]):
        return streaming.backward(inputs)
    if not inputs.need_attention or (inputs.teacher_lse is None and not chosen):
        return _launched(inputs)
    made = streaming.backward(inputs._replace(need_index=False))
    return *made[:3], *(_launched(inputs._replace(need_attention=False))[3:] if inputs.need_index else made[3:])


_derivatives = Derivatives(
    "indexer_divergence",
    (IndexerDivergenceInputs, IndexerDivergenceBackwardInputs),
    FIELDS,
    outputs=("divergence",),
    grads={"grad": "divergence"},
    passes=(
        launcher(BACKENDS, streaming.forward),
        _backward,
        *[launcher(BACKENDS, f) for f in (streaming.jvp, streaming.second)],
    ),
    fake=_forward_fake,
    needs={"need_attention": FIELDS[:3], "need_index": FIELDS[3:]},
)

OPERATOR = Operator(indexer_divergence, _describe, BACKENDS)
