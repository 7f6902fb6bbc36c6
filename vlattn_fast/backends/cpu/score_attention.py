"""score_attention by csrc/cpu/score_attention.cpp, and its second derivatives by csrc/cpu/score_attention_second.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import as_dtype, empty_gradient, empty_rows_first, expand_heads, fold_heads, unit_strides
from vlattn_fast.backends.cpu._attention import ATTENTION, attention, empty_row_bias
from vlattn_fast.backends.inputs import ScoreAttentionBackwardInputs, ScoreAttentionInputs, ScoreAttentionSecondInputs
from vlattn_fast.backends.native import Fields, kernel

_DOT_KINDS = ("dot", "dot_relu", "dot_leaky_relu", "dot_tanh", "dot_sigmoid", "dot_softcap")
_KINDS = (*_DOT_KINDS, "cosine", "additive", "hadamard_tanh", "hadamard_sigmoid")  # ScoreKind of csrc/cpu/scores.h
SCORE = Fields("integer kind, number parameter, pointer vector")
_DROPOUT = Fields("integer seed, number probability")
RELEVANCY = Fields("pointer rows, integer T is_gradient row_normalize, pointer direct result")
_NO_DROPOUT = _DROPOUT.values()
_STRUCTS = {"attention": ATTENTION, "score": SCORE, "dropout": _DROPOUT, "relevancy": RELEVANCY}
_FORWARD = "attention a, score score, dropout dropout, tensor out, pointer lse"
_BACKWARD = (
    "attention a, score score, dropout dropout, tensor grad_out out, pointer lse, integer lse_source, pointer grad_lse, "
    "tensor grad_query grad_key grad_value, pointer grad_vector grad_row_bias, relevancy relevancy"
)
_SECOND = (
    "attention a, score score, dropout dropout, tensor grad_out by_query by_key by_value, pointer grad_lse, "
    "tensor to_out to_query to_key to_value, pointer to_lse by_row_bias to_row_bias"
)
_forward = kernel("score_attention_forward", Fields(_FORWARD, **_STRUCTS))
run_backward = kernel("score_attention_backward", Fields(_BACKWARD, **_STRUCTS))
_second = kernel("score_attention_second", Fields(_SECOND, **_STRUCTS))


def forward(inputs: ScoreAttentionInputs) -> tuple[Tensor, Tensor]:
    """out (B, H, N, Dv), in memory (B, N, H, Dv) as SDPA's, and lse (B, H, N) float64."""
    key, value = _same_heads(inputs.key, inputs.value)
    query, key, value = unit_strides(inputs.query, key, value)
    (a, _kept), vector = attention(inputs, query, key, value), float32(inputs.vector)
    batch, heads, queries, _ = query.shape
    out = empty_rows_first(query, heads, queries, value.shape[3])
    lse = query.new_empty(batch, heads, queries, dtype=torch.float64)
    score, dropout = core_score(inputs, vector), _dropout(inputs)
    _forward(a=a, score=score, dropout=dropout, out=out, lse=lse)
    return out, lse


def backward(inputs: ScoreAttentionBackwardInputs) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, vector and row_bias."""
    key, value = _same_heads(inputs.key, inputs.value)
    query, key, value, out, grad_out = unit_strides(inputs.query, key, value, inputs.out, inputs.grad_out)
    (a, _kept), vector = attention(inputs, query, key, value), float32(inputs.vector)
    grads, grad_vector = new_gradients(query, key, value), None if vector is None else torch.zeros_like(vector)
    lse, grad_lse = inputs.lse.contiguous(), float32(inputs.grad_lse)
    score, dropout = core_score(inputs, vector), _dropout(inputs)
    lses = {"lse": lse, "grad_lse": grad_lse}
    more = {"grad_vector": grad_vector, "grad_row_bias": empty_row_bias(inputs)}
    run_backward(a=a, score=score, dropout=dropout, grad_out=grad_out, out=out, **lses, **grads, **more)
    if inputs.vector is not None and grad_vector is not None:
        grad_vector = as_dtype(grad_vector, inputs.vector.dtype)
    grad_key, grad_value = grads["grad_key"], grads["grad_value"]
    folded = fold_heads(grad_key, inputs.key.shape[1]), fold_heads(grad_value, inputs.value.shape[1])
    return grads["grad_query"], *folded, grad_vector, more["grad_row_bias"]


def second(inputs: ScoreAttentionSecondInputs) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of grad_out, grad_lse, query, key, value and row_bias from those of the gradients of query, key, value and
    row_bias."""
    key, value = _same_heads(inputs.key, inputs.value)
    by_key, by_value = _same_heads(inputs.by_key, inputs.by_value)
    query, key, value, grad_out = unit_strides(inputs.query, key, value, inputs.grad_out)
    by_query, by_key, by_value = unit_strides(inputs.by_query, by_key, by_value)
    (a, _kept), grad_lse = attention(inputs, query, key, value), float32(inputs.grad_lse)
    to_lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    to_out, to_query, to_key, to_value = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (grad_out, query, key, value)
    )
    if not query.shape[1] * query.shape[2]:  # the kernel runs over heads and queries
        to_key.zero_(), to_value.zero_()
    seen = {"by_query": by_query, "by_key": by_key, "by_value": by_value, "grad_out": grad_out, "grad_lse": grad_lse}
    made = {"to_out": to_out, "to_query": to_query, "to_key": to_key, "to_value": to_value, "to_lse": to_lse}
    biases = {"by_row_bias": float32(inputs.by_row_bias), "to_row_bias": empty_row_bias(inputs)}
    _second(a=a, score=core_score(inputs, None), dropout=_dropout(inputs), **seen, **made, **biases)
    folded = fold_heads(to_key, inputs.key.shape[1]), fold_heads(to_value, inputs.value.shape[1])
    to_lse_or_none = None if inputs.grad_lse is None else as_dtype(to_lse, inputs.grad_lse.dtype)
    return to_out, to_lse_or_none, to_query, *folded, biases["to_row_bias"]


def float32(x: Tensor | None) -> Tensor | None:
    return None if x is None else as_dtype(x, torch.float32).contiguous()


def core_score(inputs: Any, vector: Tensor | None) -> Any:
    """Score of the kernels."""
    return SCORE.values(kind=_KINDS.index(inputs.score), parameter=inputs.parameter, vector=vector)


def _dropout(inputs: ScoreAttentionInputs | ScoreAttentionBackwardInputs | ScoreAttentionSecondInputs) -> Any:
    """Dropout of the kernels."""
    return _NO_DROPOUT if inputs.seed is None else _DROPOUT.values(seed=int(inputs.seed), probability=inputs.dropout_p)


def new_gradients(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Tensor]:
    """Uninitialised, by their names in the kernel; zero where there are no queries, since the kernel runs over them."""
    grads = {"grad_query": empty_gradient(query), "grad_key": empty_gradient(key), "grad_value": empty_gradient(value)}
    return grads if query.numel() else {name: grad.zero_() for name, grad in grads.items()}


def _same_heads(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value with one number of heads. Features of the key may have a head per query head where the value has fewer."""
    key_heads, value_heads = key.shape[1], value.shape[1]
    if key_heads == value_heads:
        return key, value
    heads = max(key_heads, value_heads)
    return expand_heads(key, heads), expand_heads(value, heads)
