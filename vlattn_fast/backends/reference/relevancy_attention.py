"""Relevancy as the papers write it, with whole maps (Chefer et al., ICCV 2021, eq. 5-6; Huang et al. 2023).

Shapes: query, key (B, H, N, D), value (B, H, N, Dv), carrier and relevancy (B, T, N), Abar (B, N, M).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_choice
from vlattn_fast._ground.tensors import expand_heads, mask_padding, over_sums, product, resolve_scale, scaled_dot_default
from vlattn_fast.backends.reference._softmax import attend, gated, pair_bias_of

RULES = ("gradient", "attention")


def relevancy_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    carrier: Tensor,
    *,
    rule: str = "gradient",
    row_normalize: bool = False,
    residual_weight: Tensor | float | None = None,
    attention_weight: Tensor | float | None = None,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
    sink: Tensor | None = None,
    query_groups: Tensor | None = None,
    key_groups: Tensor | None = None,
    group_bias: Tensor | None = None,
    head_gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes the formula of vlattn_fast.relevancy_attention: (out, carrier).

    In the backward pass the carrier's gradient r becomes r * a + (r * b) Abar.
    """
    check_choice("rule", rule, RULES)
    key, value = (expand_heads(x, query.shape[1]) for x in mask_padding(key_mask, key, value))
    scale = resolve_scale(scale, scaled_dot_default(query.shape[-1]))
    pair_bias = pair_bias_of(group_bias, query_groups, key_groups)
    prob, _ = attend(scale * product(query, key.mT), attn_mask, key_mask, is_causal, softcap, sink, pair_bias)
    out, carrier = _Carry.apply(
        product(prob, value), carrier, prob, value, rule, row_normalize, residual_weight, attention_weight
    )
    return gated(out, head_gate), carrier


def relevancy_step(
    relevancy: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    grad_output: Tensor | None = None,
    *,
    rule: str = "gradient",
    row_normalize: bool = False,
    lse: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
    sink: Tensor | None = None,
    query_groups: Tensor | None = None,
    key_groups: Tensor | None = None,
    group_bias: Tensor | None = None,
) -> Tensor:
    """Computes the formula of vlattn_fast.relevancy_step: relevancy @ Abar, (B, T, N) -> (B, T, M).

    The log-sum-exp is recomputed; `lse` has no effect.
    """
    check_choice("rule", rule, RULES)
    (key,) = (expand_heads(x, query.shape[1]) for x in mask_padding(key_mask, key))
    scale = resolve_scale(scale, scaled_dot_default(query.shape[-1]))
    pair_bias = pair_bias_of(group_bias, query_groups, key_groups)
    prob, _ = attend(scale * product(query, key.mT), attn_mask, key_mask, is_causal, softcap, sink, pair_bias)
    grad_prob = None
    if rule == "gradient":
        if value is None or grad_output is None:
            raise ValueError("value and grad_output must be given for rule='gradient'; got None")
        (value,) = (expand_heads(x, query.shape[1]) for x in mask_padding(key_mask, value))
        grad_prob = product(grad_output, value.mT)
    return product(relevancy.to(prob.dtype), head_mean(prob, grad_prob, row_normalize)).to(relevancy.dtype)


def head_mean(prob: Tensor, grad_prob: Tensor | None, row_normalize: bool) -> Tensor:
    """Abar = mean_h relu(A * dA) (eq. 5), or mean_h A without dA. row_normalize divides each row by its sum."""
    each = prob if grad_prob is None else torch.relu(prob * grad_prob)
    abar = each.mean(1) if each.shape[1] > 0 else each.sum(1)  # 0 without heads
    return over_sums(abar) if row_normalize else abar


class _Carry(torch.autograd.Function):
    """Returns (out, carrier). The backward pass multiplies the carrier's gradient by Abar, so `prob` and `value` have only second
    derivatives; a and b are the weights."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        out: Tensor, carrier: Tensor, prob: Tensor, value: Tensor, rule: str, row_normalize: bool, a: Any, b: Any
    ) -> tuple[Tensor, Tensor]:
        return out.clone(), carrier.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, _, prob, value, ctx.rule, ctx.row_normalize, *weights = inputs
        ctx.save_for_backward(prob, value, *[w if isinstance(w, Tensor) else None for w in weights])
        ctx.weights = [None if isinstance(w, Tensor) else w for w in weights]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, r: Tensor) -> tuple[Any, ...]:
        prob, value, *tensors = ctx.saved_tensors
        a, b = (_factor(x if w is None else w, r) for w, x in zip(ctx.weights, tensors, strict=True))
        grad_prob = product(grad_out, value.mT) if ctx.rule == "gradient" else None
        abar = head_mean(prob, grad_prob, ctx.row_normalize).to(r.dtype)
        return grad_out, r * a + product(r * b, abar), *(None,) * 6

    @staticmethod
    def jvp(ctx: Any, out: Tensor, carrier: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return out.clone(), carrier.clone()


def _factor(weight: Any, r: Tensor) -> Any:
    """A weight for relevancy r (B, T, N)."""
    if weight is None:
        return 1.0
    return weight[:, None].to(r.dtype) if isinstance(weight, Tensor) else weight
