"""relevancy_attention and relevancy_step by csrc/cuda/relevancy_attention.cu, for short sequences, and the backward pass of
relevancy_attention by csrc/cuda/relevancy_attention_long.cu, for long ones on sm_90. Their forward pass is FlashAttention-2, as
torch has it: it returns the log-sum-exp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import (
    as_dtype,
    empty_gradient,
    empty_rows_first,
    expand_heads,
    rows_first,
    unit_stride,
    unit_strides,
    weigh_rows,
)
from vlattn_fast.backends.cuda._shared_library import causal_mask, kernel, masks_of, part
from vlattn_fast.backends.inputs import RelevancyAttentionBackwardInputs, RelevancyAttentionInputs, RelevancyStepInputs
from vlattn_fast.backends.native import DTYPES, address, strided

SHORT = 256  # tokens of the kernels for short sequences, at most: MAX_ROWS
_CARRIED = 4  # rows of r in a launch: MAX_CARRIED
_QUERIES, _FEATURES = 64, 128  # of a tile of the kernel for long sequences
_forward = kernel("relevancy_attention")
_backward = kernel("relevancy_attention_backward")
_step = kernel("relevancy_step")
_long = kernel("relevancy_attention_long")
_row_weight = part("relevancy_attention", "residual_weight")


def forward(inputs: RelevancyAttentionInputs) -> tuple[Tensor, Tensor]:
    """out (B, H, N, Dv), lse (B, H, N)."""
    x = inputs.attention
    query, key, value = unit_strides(x.query, x.key, inputs.value)
    batch, heads, queries, _ = query.shape
    if queries > SHORT:
        aten, shared = torch.ops.aten, (expand_heads(key, heads), expand_heads(value, heads))
        attend = aten._scaled_dot_product_flash_attention if query.is_cuda else aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = attend(query, *shared, 0.0, x.is_causal, scale=x.scale)[:2]
        return rows_first(out), lse.contiguous()
    masks, _kept = masks_of(x)
    out = empty_rows_first(query, heads, queries, value.shape[3])
    lse = query.new_empty(batch, heads, queries, dtype=torch.float32)
    rows = {"scale": x.scale, "out": strided(out), "lse": address(lse)}
    _forward(query, **_attention(query, key, value), masks=masks, **rows)
    return out, lse


def backward(inputs: RelevancyAttentionBackwardInputs) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, the carrier's cotangent r * a + (r * b) Abar, and None for row_bias; None where nothing is
    needed."""
    x, grad_out, grad_carrier = inputs.attention, inputs.grad_out, inputs.grad_carrier
    direct = None
    heads = x.query.shape[1]
    if grad_carrier is not None and (heads == 0 or (grad_out is None and inputs.rule == "gradient")):  # Abar is zero
        direct = weigh_rows(grad_carrier, inputs.residual_weight).clone()
        grad_carrier = None
    grads: tuple[Tensor | None, ...] = (None, None, None)
    if x.query.shape[2] > SHORT and grad_out is not None and heads > 0:
        return _long_backward(inputs, grad_out, grad_carrier, direct)
    if inputs.need_inputs and grad_out is not None:
        grads = empty_gradient(x.query), empty_gradient(x.key), empty_gradient(inputs.value)
    elif grad_carrier is None:
        return None, None, None, direct, None
    # a rounded lse would be half of the error in float32, and all of it if a float mask makes logits large
    masked = x.attn_mask is not None and x.attn_mask.dtype != torch.bool
    lse = None if x.query.dtype == torch.float32 or masked else inputs.lse
    weights = inputs.residual_weight, inputs.attention_weight
    out = unit_stride(inputs.out)
    grad_members = dict(zip(("grad_query", "grad_key", "grad_value"), map(strided, grads), strict=True))
    row_members = {"out": strided(out), "residual": True, **grad_members}
    r_abar = _run_backward(_backward, inputs, grad_carrier, grad_out, inputs.value, lse, weights, **row_members)
    return *grads, r_abar if direct is None else direct, None


def _long_backward(
    inputs: RelevancyAttentionBackwardInputs, grad_out: Tensor, grad_carrier: Tensor | None, direct: Tensor | None
) -> tuple[Tensor | None, ...]:
    """`backward` of long sequences. All gradients come from one kernel, so each is computed."""
    x, f32 = inputs.attention, torch.float32
    query, key, value, out, grad_out = map(_pieces, (x.query, x.key, inputs.value, inputs.out, grad_out))
    (batch, heads, queries, _), key_heads = query.shape, key.shape[1]
    tiles = -(-queries // _QUERIES)
    grads = empty_gradient(query), empty_gradient(key), empty_gradient(value)
    r = None if grad_carrier is None else as_dtype(grad_carrier, f32).contiguous()
    shares = query.new_empty(batch, key_heads, 0 if r is None else r.shape[1], queries, dtype=f32)
    lse = inputs.lse.contiguous()
    weights = [None if y is None else as_dtype(y, f32) for y in (inputs.residual_weight, inputs.attention_weight)]
    rows = query.new_empty(3, batch, heads, tiles * _QUERIES, dtype=f32)
    sums = query.new_empty(batch, heads, tiles, _QUERIES * _FEATURES, dtype=f32)
    turns = query.new_empty(batch * heads * tiles + 1, dtype=torch.int32)
    members: dict[str, Any] = {"T": shares.shape[2], "relevancy": address(r), "r_abar": address(shares), "rows": address(rows)}
    members |= {"sums": address(sums), "turns": address(turns), "lse": address(lse), "residual": True, "by_gradient": True}
    members |= dict(zip(("residual_weight", "attention_weight"), map(_weight, weights), strict=True))
    members |= dict(zip(("grad_query", "grad_key", "grad_value"), map(strided, grads), strict=True))
    members |= {"out": strided(out), "grad_out": strided(grad_out), "scale": x.scale}
    _long(query, **_attention(query, key, value), masks=causal_mask(x.is_causal), **members)
    needed = grads if inputs.need_inputs else (None, None, None)
    return *needed, direct if r is None else shares.sum(1), None


def _pieces(x: Tensor) -> Tensor:
    """`x` (B, H, N, D), copied unless its rows begin at multiples of 16 bytes."""
    steps = [step for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    fits = x.stride(-1) == 1 and all(step % 8 == 0 for step in steps) and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


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
    **row_members: Any,
) -> Tensor | None:
    """Returns r * a + (r * b) Abar if there is r, `relevancy`; the first term with `residual`. weights: a and b. row_members:
    members of the struct."""
    f32 = torch.float32
    grad_out, query, key, value = unit_strides(grad_out, inputs.attention.query, inputs.attention.key, value)
    lse, r = (None if x is None else as_dtype(x, f32).contiguous() for x in (lse, relevancy))
    a, b = (None if x is None else as_dtype(x, f32) for x in weights)
    (batch, heads, queries, _), (_, key_heads, keys, _) = query.shape, key.shape
    rows = query.new_empty(3, batch, heads, queries, dtype=f32)
    shared = {"scale": inputs.attention.scale, "by_gradient": inputs.rule == "gradient", "grad_out": strided(grad_out)}
    shared |= {"lse": address(lse), "rows": address(rows)}

    def launch(**members: Any) -> None:
        masks, _kept = masks_of(inputs.attention)
        run(query, **_attention(query, key, value), masks=masks, **shared, **members)

    if r is None:
        launch(**row_members)
        return None
    if inputs.row_normalize:
        row_sums = query.new_empty(batch, heads, queries, dtype=f32)
        launch(row_sums=address(row_sums))
        sums = row_sums.sum(1) / heads
        inverse = torch.where(sums < torch.finfo(f32).tiny, 0.0, 1.0 / sums)  # the reciprocal of a subnormal number overflows
        b = inverse if b is None else b * inverse
    sums_of_heads = []
    for some in r.split(_CARRIED, 1):
        shares = r.new_empty(batch, key_heads, some.shape[1], keys)
        some = some.contiguous()
        carrier = {"T": some.shape[1], "relevancy": address(some), "r_abar": address(shares)}
        launch(**carrier, residual_weight=_weight(a), attention_weight=_weight(b), **row_members)
        sums_of_heads.append(shares[:, 0] if key_heads == 1 else shares.sum(1))
        row_members = {"residual": row_members.get("residual", False)}  # the first launch has made the gradients
    return sums_of_heads[0] if len(sums_of_heads) == 1 else torch.cat(sums_of_heads, 1)


def _attention(query: Tensor, key: Tensor, value: Tensor | None) -> dict[str, Any]:
    (batch, heads, queries, head_dim), (_, key_heads, keys, _) = query.shape, key.shape
    sizes = {"B": batch, "H": heads, "key_heads": key_heads, "N": queries, "M": keys, "D": head_dim}
    sizes |= {"DV": 0 if value is None else value.shape[3]}
    return {"dtype": DTYPES[query.dtype], **sizes, "query": strided(query), "key": strided(key), "value": strided(value)}


def _weight(x: Tensor | None) -> Any:
    """Of (B, N) or (1, 1)."""
    if x is None:
        return _row_weight()()
    batch, row = (0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return _row_weight()(data=address(x), stride_b=batch, stride_n=row)
