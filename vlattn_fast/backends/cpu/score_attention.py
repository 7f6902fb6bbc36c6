"""score_attention by csrc/cpu/score_attention.cpp, its tangents by score_attention_jvp.cpp, and its second derivatives by
score_attention_second.cpp."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.score_kinds import in_kernels
from vlattn_fast._ground.tensors import as_dtype, empty_gradient, empty_rows_first, expand_heads, fold_heads, unit_strides
from vlattn_fast.backends import native
from vlattn_fast.backends.cpu._attention import attention, empty_row_bias
from vlattn_fast.backends.inputs import ScoreAttentionBackwardInputs, ScoreAttentionInputs
from vlattn_fast.backends.native import StridedTensor, address, kernel, part, strided

_forward, run_backward = kernel("score_attention_forward"), kernel("score_attention_backward")
_jvp, _second = kernel("score_attention_jvp"), kernel("score_attention_second")
_score, _dropout_struct = part("score_attention_forward", "score"), part("score_attention_forward", "dropout")
relevancy_struct = part("score_attention_backward", "relevancy")


def forward(inputs: ScoreAttentionInputs) -> tuple[Tensor, Tensor]:
    """out (B, H, N, Dv), in memory (B, N, H, Dv) as SDPA's, and lse (B, H, N) float64."""
    return attend(inputs, float32(inputs.vector), _dropout(inputs))


def attend(inputs: Any, vector: Tensor | None = None, dropout: Any = None) -> tuple[Tensor, Tensor]:
    """`forward`, for the inputs of any operator with a query, a key and a value."""
    key, value = same_heads(inputs.key, inputs.value)
    query, key, value = unit_strides(inputs.query, key, value)
    a, _kept = attention(inputs, query, key, value)
    batch, heads, queries, _ = query.shape
    out = empty_rows_first(query, heads, queries, value.shape[3])
    lse = query.new_empty(batch, heads, queries, dtype=torch.float64)
    score = core_score(inputs, vector)
    _forward(a=a, score=score, dropout=dropout or _no_dropout(), out=strided(out), lse=lse.data_ptr())
    return out, lse


def backward(inputs: ScoreAttentionBackwardInputs) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, vector and row_bias."""
    key, value = same_heads(inputs.key, inputs.value)
    query, key, value, out, grad_out = unit_strides(inputs.query, key, value, inputs.out, inputs.grad_out)
    (a, _kept), vector = attention(inputs, query, key, value), float32(inputs.vector)
    grads, grad_vector = new_gradients(query, key, value), None if vector is None else torch.zeros_like(vector)
    grad_query, grad_key, grad_value = grads
    lse, grad_lse, grad_row_bias = inputs.lse.contiguous(), float32(inputs.grad_lse), empty_row_bias(inputs)
    run_backward(
        a=a,
        score=core_score(inputs, vector),
        dropout=_dropout(inputs),
        grad_out=strided(grad_out),
        out=strided(out),
        lse=lse.data_ptr(),
        grad_lse=address(grad_lse),
        grad_query=strided(grad_query),
        grad_key=strided(grad_key),
        grad_value=strided(grad_value),
        grad_vector=address(grad_vector),
        grad_row_bias=address(grad_row_bias),
    )
    if inputs.vector is not None and grad_vector is not None:
        grad_vector = as_dtype(grad_vector, inputs.vector.dtype)
    folded = fold_heads(grad_key, inputs.key.shape[1]), fold_heads(grad_value, inputs.value.shape[1])
    return grad_query, *folded, grad_vector, grad_row_bias


def jvp(inputs: Any) -> tuple[Tensor, Tensor]:
    """The tangents of out and lse (float64) for those of query, key, value and row_bias; dot products."""
    key, value = same_heads(inputs.key, inputs.value)
    by_key, by_value = same_heads(inputs.key_tangent, inputs.value_tangent)
    query, key, value, out = unit_strides(inputs.query, key, value, inputs.out)
    by_query, by_key, by_value = unit_strides(inputs.query_tangent, by_key, by_value)
    (a, _kept), lse, by_row_bias = attention(inputs, query, key, value), inputs.lse.contiguous(), float32(inputs.row_bias_tangent)
    to_out, to_lse = empty_rows_first(query, query.shape[1], query.shape[2], value.shape[3]), torch.empty_like(lse)
    _jvp(
        a=a,
        score=core_score(inputs, None),
        dropout=_dropout(inputs),
        out=strided(out),
        by_query=strided(by_query),
        by_key=strided(by_key),
        by_value=strided(by_value),
        lse=lse.data_ptr(),
        by_row_bias=address(by_row_bias),
        to_out=strided(to_out),
        to_lse=to_lse.data_ptr(),
    )
    return to_out, to_lse


def second(inputs: Any) -> tuple[Tensor | None, ...]:
    """The tangents of out and lse for those of query, key, value and row_bias, or None, and the gradients of their products with
    grad_out and grad_lse by query, key, value, vector (None) and row_bias; with tangents of grad_out and grad_lse, the tangents
    of the backward pass."""
    key, value = same_heads(inputs.key, inputs.value)
    by_key, by_value = same_heads(inputs.key_tangent, inputs.value_tangent)
    query, key, value, grad_out, grad_out_tangent = unit_strides(
        inputs.query, key, value, inputs.grad_out, inputs.grad_out_tangent
    )
    by_query, by_key, by_value = unit_strides(inputs.query_tangent, by_key, by_value)
    (a, _kept), grad_lse, grad_lse_tangent = (
        attention(inputs, query, key, value),
        float32(inputs.grad_lse),
        float32(inputs.grad_lse_tangent),
    )
    to_lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    to_out, to_query, to_key, to_value = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (grad_out, query, key, value)
    )
    if not query.shape[1] * query.shape[2]:  # the kernel runs over heads and queries
        to_key.zero_(), to_value.zero_()
    by_row_bias, to_row_bias = float32(inputs.row_bias_tangent), empty_row_bias(inputs)
    _second(
        a=a,
        score=core_score(inputs, None),
        dropout=_dropout(inputs),
        grad_out=strided(grad_out),
        by_query=strided(by_query),
        by_key=strided(by_key),
        by_value=strided(by_value),
        grad_out_tangent=StridedTensor() if grad_out_tangent is None else strided(grad_out_tangent),
        grad_lse=address(grad_lse),
        grad_lse_tangent=address(grad_lse_tangent),
        to_out=strided(to_out) if inputs.with_jvp else StridedTensor(),
        to_query=strided(to_query),
        to_key=strided(to_key),
        to_value=strided(to_value),
        to_lse=to_lse.data_ptr(),
        by_row_bias=address(by_row_bias),
        to_row_bias=address(to_row_bias),
    )
    folded = fold_heads(to_key, inputs.key.shape[1]), fold_heads(to_value, inputs.value.shape[1])
    rows = (to_out, to_lse) if inputs.with_jvp else (None, None)
    return *rows, to_query, *folded, None, to_row_bias


def float32(x: Tensor | None) -> Tensor | None:
    return None if x is None else as_dtype(x, torch.float32).contiguous()


def core_score(inputs: Any, vector: Tensor | None) -> Any:
    if vector is None:
        return _without_vector(inputs.score, inputs.parameter)
    return _score()(kind=_numbers_of_kinds()[inputs.score], parameter=inputs.parameter, vector=address(vector))


@functools.lru_cache
def _without_vector(kind: str, parameter: float) -> Any:
    return _score()(kind=_numbers_of_kinds()[kind], parameter=parameter)


@functools.cache
def _numbers_of_kinds() -> dict[str, int]:
    """ScoreKind of csrc/cpu/scores.h, by the names that the library gives."""
    lines = native.library.text(native.chosen("score_kinds")).splitlines()
    numbers = {line.split()[0]: number for number, line in enumerate(lines)}
    if missing := set(in_kernels("cpu")) - set(numbers):
        raise RuntimeError(f"{native.library.path} does not fit this vlattn_fast: install it again (it has no {min(missing)})")
    return numbers


def _dropout(inputs: Any) -> Any:
    if inputs.seed is None:
        return _no_dropout()
    return _dropout_struct()(seed=int(inputs.seed), probability=inputs.dropout_p)


@functools.cache
def _no_dropout() -> Any:
    return _dropout_struct()()


def new_gradients(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns uninitialised memory; zeros if there are no queries, since the kernel runs over them."""
    grads = empty_gradient(query), empty_gradient(key), empty_gradient(value)
    if not query.numel():
        for grad in grads:
            grad.zero_()
    return grads


def same_heads(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value with one number of heads. Features of the key may have a head per query head while the value has fewer."""
    key_heads, value_heads = key.shape[1], value.shape[1]
    if key_heads == value_heads:
        return key, value
    heads = max(key_heads, value_heads)
    return expand_heads(key, heads), expand_heads(value, heads)
