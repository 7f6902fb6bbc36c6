"""relevancy_attention and relevancy_step by csrc/cuda/relevancy_attention.cu: short sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import as_dtype, empty_gradient, empty_rows_first, unit_stride, unit_strides, weigh_rows
from vlattn_fast.backends.cuda._shared_library import MASKS, kernel, masks
from vlattn_fast.backends.inputs import RelevancyAttentionBackwardInputs, RelevancyAttentionInputs, RelevancyStepInputs
from vlattn_fast.backends.native import DTYPES, Fields

_WEIGHT = Fields("pointer data, integer stride_b stride_n")
_FIELDS = Fields(
    "int32 dtype, size B H key_heads N M T, size32 D DV, tensor query key value, masks masks, single scale, "
    "tensor out, pointer lse, flag by_gradient, tensor grad_out grad_query grad_key grad_value, pointer relevancy, "
    "weight residual_weight attention_weight, flag residual, pointer r_abar row_sums rows",
    masks=MASKS,
    weight=_WEIGHT,
)
_CARRIED = 4  # rows of r in a launch: MAX_CARRIED
_forward = kernel("relevancy_attention", _FIELDS)
_backward = kernel("relevancy_attention_backward", _FIELDS)
_step = kernel("relevancy_step", _FIELDS)


def forward(inputs: RelevancyAttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, H, N, Dv), a copy of the carrier (B, T, N), lse (B, H, N)."""
    query, key, value = unit_strides(inputs.query, inputs.key, inputs.value)
    seen, _kept = masks(inputs, query, key)
    batch, heads, queries, _ = query.shape
    out = empty_rows_first(query, heads, queries, value.shape[3])
    lse = query.new_empty(batch, heads, queries, dtype=torch.float32)
    _forward(query, **_attention(query, key, value), masks=seen, scale=inputs.scale, out=out, lse=lse)
    return out, inputs.carrier.clone(), lse


def backward(inputs: RelevancyAttentionBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, the carrier's cotangent r * a + (r * b) Abar, and None for row_bias; None where nothing is
    needed."""
    query, grad_out, grad_carrier = inputs.query, inputs.grad_out, inputs.grad_carrier
    direct = None
    heads = query.shape[1]
    if grad_carrier is not None and (heads == 0 or (grad_out is None and inputs.rule == "gradient")):  # Abar is zero
        direct = weigh_rows(grad_carrier, inputs.residual_weight).clone()
        grad_carrier = None
    grads: dict[str, Tensor] = {}
    if inputs.need_inputs and grad_out is not None:
        tensors = {"grad_query": query, "grad_key": inputs.key, "grad_value": inputs.value}
        grads = {name: empty_gradient(x) for name, x in tensors.items()}
    elif grad_carrier is None:
        return None, None, None, direct, None
    # a rounded lse would be half of the error in float32, and all of it where a float mask brings logits far from zero
    masked = inputs.attn_mask is not None and inputs.attn_mask.dtype != torch.bool
    lse = None if query.dtype == torch.float32 or masked else inputs.lse
    weights = inputs.residual_weight, inputs.attention_weight
    named = {"out": unit_stride(inputs.out), "residual": True, **grads}
    r_abar = _run_backward(_backward, inputs, grad_carrier, grad_out, inputs.value, lse, weights, **named)
    return grads.get("grad_query"), grads.get("grad_key"), grads.get("grad_value"), r_abar if direct is None else direct, None


def step(inputs: RelevancyStepInputs) -> Tensor:
    """relevancy @ Abar, (B, T, N) -> (B, T, M).

    `lse` may count keys that are not here. Under a float mask, rows whose lse is too large to be rounded are normalised over the
    keys that are here.
    """
    value, grad_output = (None, None) if inputs.rule == "attention" else (inputs.value, inputs.grad_output)
    r_abar = _run_backward(_step, inputs, inputs.relevancy, grad_output, value, inputs.lse)
    assert r_abar is not None
    return as_dtype(r_abar, inputs.relevancy.dtype)


def _run_backward(
    run: Any,
    inputs: RelevancyAttentionBackwardInputs | RelevancyStepInputs,
    relevancy: Tensor | None,
    grad_out: Tensor | None,
    value: Tensor | None,
    lse: Tensor | None,
    weights: tuple[Tensor | None, Tensor | None] = (None, None),
    **named: Any,
) -> Tensor | None:
    """r * a + (r * b) Abar where there is r, `relevancy`; the first term where `residual` is named. weights: a and b."""
    f32 = torch.float32
    grad_out, query, key, value = unit_strides(grad_out, inputs.query, inputs.key, value)
    lse, r = (None if x is None else as_dtype(x, f32).contiguous() for x in (lse, relevancy))
    a, b = (None if x is None else as_dtype(x, f32) for x in weights)
    (batch, heads, queries, _), (_, key_heads, keys, _) = query.shape, key.shape
    rows = query.new_empty(3, batch, heads, queries, dtype=f32)
    how = {"scale": inputs.scale, "by_gradient": inputs.rule == "gradient", "grad_out": grad_out, "lse": lse, "rows": rows}

    def launch(**members: Any) -> None:
        seen, _kept = masks(inputs, query, key)
        run(query, **_attention(query, key, value), masks=seen, **how, **members)

    if r is None:
        launch(**named)
        return None
    if inputs.row_normalize:
        row_sums = query.new_empty(batch, heads, queries, dtype=f32)
        launch(row_sums=row_sums)
        sums = row_sums.sum(1) / heads
        inverse = torch.where(sums < torch.finfo(f32).tiny, 0.0, 1.0 / sums)  # the reciprocal of a subnormal number overflows
        b = inverse if b is None else b * inverse
    sums_of_heads = []
    for some in r.split(_CARRIED, 1):
        shares = r.new_empty(batch, key_heads, some.shape[1], keys)
        carrier = {"T": some.shape[1], "relevancy": some.contiguous(), "r_abar": shares}
        launch(**carrier, residual_weight=_weight(a), attention_weight=_weight(b), **named)
        sums_of_heads.append(shares[:, 0] if key_heads == 1 else shares.sum(1))
        named = {"residual": named.get("residual", False)}  # the first launch has made the gradients
    return sums_of_heads[0] if len(sums_of_heads) == 1 else torch.cat(sums_of_heads, 1)


def _attention(query: Tensor, key: Tensor, value: Tensor | None) -> dict[str, Any]:
    (batch, heads, queries, head_dim), (_, key_heads, keys, _) = query.shape, key.shape
    sizes = {"B": batch, "H": heads, "key_heads": key_heads, "N": queries, "M": keys, "D": head_dim}
    value_dim = 0 if value is None else value.shape[3]
    return {"dtype": DTYPES[query.dtype], **sizes, "DV": value_dim, "query": query, "key": key, "value": value}


def _weight(x: Tensor | None) -> tuple[Any, ...]:
    """RowWeight of (B, N) or (1, 1)."""
    if x is None:
        return _WEIGHT.values()
    batch, row = (0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return _WEIGHT.values(data=x, stride_b=batch, stride_n=row)
