"""score_attention by csrc/cpu/score_attention.cpp, its tangents by score_attention_jvp.cpp, and its second derivatives by
score_attention_second.cpp."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.score_kinds import in_kernels
from vlattn_fast._ground.tensors import as_dtype, empty_gradient, empty_rows_first, fold_heads, unit_strides
from vlattn_fast.backends import native
from vlattn_fast.backends.cpu._attention import attention, empty_row_bias, float32, readable
from vlattn_fast.backends.inputs import Attention, ScoreAttentionBackwardInputs, ScoreAttentionInputs
from vlattn_fast.backends.native import StridedTensor, address, kernel, part, strided

_forward, run_backward = kernel("score_attention_forward"), kernel("score_attention_backward")
_jvp, _second = kernel("score_attention_jvp"), kernel("score_attention_second")
_score, _dropout_struct = part("score_attention_forward", "score"), part("score_attention_forward", "dropout")
relevancy_struct = part("score_attention_backward", "relevancy")


def forward(inputs: ScoreAttentionInputs) -> tuple[Tensor, Tensor]:
    x, value = inputs.attention, inputs.value
    return attend(x, value) if inputs.seed is None else attend(x, value, **_dropout(inputs))


def attend(x: Attention, value: Tensor, **dropout: Any) -> tuple[Tensor, Tensor]:
    """out (B, H, N, Dv), in memory (B, N, H, Dv) as SDPA's, and lse (B, H, N) float64."""
    x, value = readable(x, value)
    a, _kept = attention(x, value)
    batch, heads, queries, _ = x.query.shape
    out = empty_rows_first(x.query, heads, queries, value.shape[3])
    lse = x.query.new_empty(batch, heads, queries, dtype=torch.float64)
    _forward(a=a, score=core_score(x), out=strided(out), lse=lse.data_ptr(), **dropout)
    return out, lse


def backward(inputs: ScoreAttentionBackwardInputs) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, vector and row_bias."""
    original = inputs.attention
    x, value = readable(original, inputs.value)
    out, grad_out = unit_strides(inputs.out, inputs.grad_out)
    a, _kept = attention(x, value)
    grad_vector = None if x.vector is None else torch.zeros_like(x.vector)
    grad_query, grad_key, grad_value = new_gradients(x, value)
    lse, grad_lse, grad_row_bias = inputs.lse.contiguous(), float32(inputs.grad_lse), empty_row_bias(x)
    run_backward(
        a=a,
        score=core_score(x),
        grad_out=strided(grad_out),
        out=strided(out),
        lse=lse.data_ptr(),
        grad_lse=address(grad_lse),
        grad_query=strided(grad_query),
        grad_key=strided(grad_key),
        grad_value=strided(grad_value),
        grad_vector=address(grad_vector),
        grad_row_bias=address(grad_row_bias),
        **_dropout(inputs),
    )
    if original.vector is not None and grad_vector is not None:
        grad_vector = as_dtype(grad_vector, original.vector.dtype)
    folded = fold_heads(grad_key, original.key.shape[1]), fold_heads(grad_value, inputs.value.shape[1])
    return grad_query, *folded, grad_vector, grad_row_bias


def jvp(inputs: Any) -> tuple[Tensor, Tensor]:
    """The tangents of out and lse (float64) for those of query, key, value and row_bias; dot products."""
    x, value = readable(inputs.attention, inputs.value)
    tangents, by_value = readable(x._replace(query=inputs.query_tangent, key=inputs.key_tangent), inputs.value_tangent)
    (a, _kept), lse, by_row_bias = attention(x, value), inputs.lse.contiguous(), float32(inputs.row_bias_tangent)
    by_query, by_key, by_value, out = unit_strides(tangents.query, tangents.key, by_value, inputs.out)
    to_out, to_lse = empty_rows_first(out, *out.shape[1:]), torch.empty_like(lse)
    _jvp(
        a=a,
        score=core_score(x),
        out=strided(out),
        by_query=strided(by_query),
        by_key=strided(by_key),
        by_value=strided(by_value),
        lse=lse.data_ptr(),
        by_row_bias=address(by_row_bias),
        to_out=strided(to_out),
        to_lse=to_lse.data_ptr(),
        **_dropout(inputs),
    )
    return to_out, to_lse


def second(inputs: Any) -> tuple[Tensor | None, ...]:
    """The tangents of out and lse for those of query, key, value and row_bias, or None, and the gradients of their products with
    grad_out and grad_lse by query, key, value, vector (None) and row_bias; with tangents of grad_out and grad_lse, the tangents
    of the backward pass."""
    x, value = readable(inputs.attention, inputs.value)
    tangents, by_value = readable(x._replace(query=inputs.query_tangent, key=inputs.key_tangent), inputs.value_tangent)
    by_query, by_key, by_value = unit_strides(tangents.query, tangents.key, by_value)
    grad_out, grad_out_tangent = unit_strides(inputs.grad_out, inputs.grad_out_tangent)
    (a, _kept), by_row_bias = attention(x, value), float32(inputs.row_bias_tangent)
    grad_lse, grad_lse_tangent = float32(inputs.grad_lse), float32(inputs.grad_lse_tangent)
    to_lse = x.query.new_empty(x.query.shape[:3], dtype=torch.float32)
    to_out, to_query, to_key, to_value = (
        torch.empty_like(each, memory_format=torch.contiguous_format) for each in (grad_out, x.query, x.key, value)
    )
    if not x.query.shape[1] * x.query.shape[2]:  # the kernel runs over heads and queries
        to_key.zero_(), to_value.zero_()
    to_row_bias = empty_row_bias(x)
    _second(
        a=a,
        score=core_score(x),
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
        **_dropout(inputs),
    )
    folded = fold_heads(to_key, inputs.attention.key.shape[1]), fold_heads(to_value, inputs.value.shape[1])
    rows = (to_out, to_lse) if inputs.with_jvp else (None, None)
    return *rows, to_query, *folded, None, to_row_bias


def core_score(x: Attention) -> Any:
    if x.vector is None:
        return plain_score(x.score, x.parameter)
    return _score()(kind=_numbers_of_kinds()[x.score], parameter=x.parameter, vector=address(x.vector))


@functools.lru_cache
def plain_score(kind: str, parameter: float) -> Any:
    return _score()(kind=_numbers_of_kinds()[kind], parameter=parameter)


@functools.cache
def _numbers_of_kinds() -> dict[str, int]:
    """ScoreKind of csrc/cpu/scores.h, by the names that the library gives."""
    lines = native.library.text(native.chosen("score_kinds")).splitlines()
    numbers = {line.split()[0]: number for number, line in enumerate(lines)}
    if missing := set(in_kernels("cpu")) - set(numbers):
        raise RuntimeError(f"{native.library.path} does not fit this vlattn_fast: install it again (it has no {min(missing)})")
    return numbers


def _dropout(inputs: Any) -> dict[str, Any]:
    """The member of a kernel with dropout."""
    return {} if inputs.seed is None else {"dropout": _dropout_struct()(seed=int(inputs.seed), probability=inputs.dropout_p)}


def new_gradients(x: Attention, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns uninitialised memory; zeros if there are no queries, since the kernel runs over them."""
    grads = empty_gradient(x.query), empty_gradient(x.key), empty_gradient(value)
    if not x.query.numel():
        for grad in grads:
            grad.zero_()
    return grads
