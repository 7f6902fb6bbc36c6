"""score_attention by csrc/cpu/score_attention.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import as_dtype, empty_gradient, empty_rows_first, expand_heads, fold_heads, unit_strides
from vlattn_fast.backends.cpu._attention import FIELDS, fields, masks
from vlattn_fast.backends.inputs import ScoreAttentionBackwardInputs, ScoreAttentionInputs
from vlattn_fast.backends.native import kernel, pointer, rows

_DOT_KINDS = ("dot", "dot_relu", "dot_leaky_relu", "dot_tanh", "dot_sigmoid")
_KINDS = (*_DOT_KINDS, "cosine", "additive", "hadamard_tanh", "hadamard_sigmoid")  # ScoreKind of csrc/cpu/scores.h
SCORE = "q d q q d"  # Score and Dropout
BACKWARD = f"={FIELDS} {SCORE} 8q 3q 12q q 6q"  # Backward of csrc/cpu/backward_tile.h
_forward = kernel("score_attention_forward", f"={FIELDS} {SCORE} 4q q")
_backward = kernel("score_attention_backward", BACKWARD)
NO_RELEVANCY = (0, 0, 0, 0, 0, 0)


def forward(inputs: ScoreAttentionInputs) -> tuple[Tensor, Tensor]:
    """out (B, H, N, Dv), in memory (B, N, H, Dv) as SDPA's, and lse (B, H, N) float64."""
    key, value = _same_heads(inputs.key, inputs.value)
    query, key, value = unit_strides(inputs.query, key, value)
    seen = masks(inputs.attn_mask, inputs.key_mask, inputs.is_causal, query, key)
    vector = None if inputs.vector is None else inputs.vector.float().contiguous()
    score, parameter, seed, dropout_p = inputs.score, inputs.parameter, inputs.seed, inputs.dropout_p
    scale = inputs.scale
    batch, heads, queries, _ = query.shape
    out = empty_rows_first(query, heads, queries, value.shape[3])
    lse = query.new_empty(batch, heads, queries, dtype=torch.float64)
    _forward(
        *fields(query, key, value, seen, scale),
        *(_KINDS.index(score), parameter, pointer(vector)),
        *(0 if seed is None else int(seed), dropout_p),
        *rows(out),
        lse.data_ptr(),
    )
    return out, lse


def backward(inputs: ScoreAttentionBackwardInputs) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and vector."""
    num_key_heads, num_value_heads = inputs.key.shape[1], inputs.value.shape[1]
    key, value = _same_heads(inputs.key, inputs.value)
    query, key, value, out, grad_out = unit_strides(inputs.query, key, value, inputs.out, inputs.grad_out)
    seen = masks(inputs.attn_mask, inputs.key_mask, inputs.is_causal, query, key)
    score, parameter, seed, dropout_p = inputs.score, inputs.parameter, inputs.seed, inputs.dropout_p
    scale = inputs.scale
    vector, weights = inputs.vector, None if inputs.vector is None else inputs.vector.float().contiguous()
    grads = [new_gradient(x, query) for x in (query, key, value)]
    grad_vector = None if weights is None else torch.zeros_like(weights)
    lse, grad_lse = inputs.lse.contiguous(), None if inputs.grad_lse is None else inputs.grad_lse.float().contiguous()
    _backward(
        *fields(query, key, value, seen, scale),
        *(_KINDS.index(score), parameter, pointer(weights)),
        *(0 if seed is None else int(seed), dropout_p),
        *(*rows(grad_out), *rows(out), lse.data_ptr(), 0, pointer(grad_lse)),
        *(*rows(grads[0]), *rows(grads[1]), *rows(grads[2]), pointer(grad_vector)),
        *NO_RELEVANCY,
    )
    grad_q, grad_k, grad_v = grads
    if vector is not None and grad_vector is not None:
        grad_vector = as_dtype(grad_vector, vector.dtype)
    return grad_q, fold_heads(grad_k, num_key_heads), fold_heads(grad_v, num_value_heads), grad_vector


def new_gradient(x: Tensor, query: Tensor) -> Tensor:
    """Uninitialised, for the gradient of `x`; zero where there are no queries, since the kernel runs over them."""
    grad = empty_gradient(x)
    return grad if query.numel() else grad.zero_()


def _same_heads(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value with one number of heads. Features of the key may have a head per query head where the value has fewer."""
    key_heads, value_heads = key.shape[1], value.shape[1]
    if key_heads == value_heads:
        return key, value
    heads = max(key_heads, value_heads)
    return expand_heads(key, heads), expand_heads(value, heads)
