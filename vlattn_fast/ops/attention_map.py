"""One (B, N, M) map for all heads of an attention layer: A, or relu(A * dA) (Chefer et al., ICCV 2021, eq. 5).

Formula: reference/attention_map.py. Heads reduced while streaming: streaming/attention_map.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from vlattn_fast import kernels
from vlattn_fast._ground.checks import check_attention, check_bool, check_choice, check_head_dim, check_lse, describe, is_dtensor
from vlattn_fast._ground.tensors import compute_dtype, over_sums
from vlattn_fast.backends import reference
from vlattn_fast.backends.cpu import attention_map as cpu
from vlattn_fast.backends.inputs import AttentionMapBackwardInputs, AttentionMapInputs
from vlattn_fast.backends.reference.attention_map import HEAD_REDUCTIONS, RULES
from vlattn_fast.backends.streaming import attention_map as streaming
from vlattn_fast.dispatch.call import AttentionArguments, CallShape, call_shape
from vlattn_fast.dispatch.choice import gradients, launcher, planned
from vlattn_fast.dispatch.operator import Operator
from vlattn_fast.dispatch.table import table
from vlattn_fast.ops._derivatives import Derivatives
from vlattn_fast.ops._shards import Local, Shards, over_shards
from vlattn_fast.ops._stages import attention_of, by_formula, cast, check_logits, logit_flags, planning, without_padding
from vlattn_fast.ops.score_attention import lse_for_sink

BACKENDS = table(
    streaming, cpu=cpu, triton=lambda: kernels.attention_map, shared_sums={"cpu": ("gradient of key", "gradient of value")}
)


def _on_shards(call: Callable[..., Tensor], shards: Shards, x: Local) -> Tensor:
    """The map of this process's heads, reduced over the processes and then normalised."""
    check_bool(row_normalize=x["row_normalize"])
    if not shards.by_heads:
        return call(**x)
    shards.check_heads()
    abar = call(**{**x, "row_normalize": False})
    if x["head_reduction"] == "mean":
        abar = shards.over_heads(abar * shards.share)
    else:
        abar = shards.over_heads(abar, x["head_reduction"])
    return over_sums(abar) if x["row_normalize"] else abar


def attention_map(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    grad_output: Tensor | None = None,
    *,
    rule: str = "attention",
    head_reduction: str = "mean",
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
    backend: str = "auto",
) -> Tensor:
    """Computes one attention map for all heads: reduce_h A_hij, or reduce_h relu(A_hij dA_hij) with dA = dO V^T.

    A = softmax(scale * q k^T + mask). Memory is that of the result, O(B N M) for any number of heads, and the backward pass needs
    O(N) in addition to the map's gradient. Passing `lse` saves a pass over the keys on a GPU. If you only need the product of
    relevancy with the map, relevancy_step does not store the map at all.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 4, 7, 8)
        >>> abar = va.attention_map(query, key)
        >>> abar.shape, torch.allclose(abar.sum(-1), torch.ones(1, 5))
        (torch.Size([1, 5, 7]), True)

    Args:
        query: (B, H, N, D) float16, bfloat16, float32 or float64, H >= 1.
        key: (B, Hkv, M, D), Hkv = H, or a divisor of H with enable_gqa.
        value: (B, Hkv, M, Dv). Only for rule="gradient".
        grad_output: (B, H, N, Dv), the gradient of the explained score with respect to the attention's output A V. Only for
            rule="gradient".
        rule: "attention" (A) or "gradient" (relu(A * dA), clamped per head before the heads are reduced).
        head_reduction: "mean", "max" or "min" over the heads.
        row_normalize: divide each row of the reduced map by its sum; zero rows stay zero.
        attn_mask, key_mask, is_causal, scale, enable_gqa, softcap, sink, query_groups, key_groups, group_bias: see
            score_attention. scale defaults to 1/sqrt(D).
        lse: (B, H, N), the attention's natural log-sum-exp that score_attention returns, including the sink; -inf or +inf marks a
            query without visible keys. Default: computed anew, which "reference" always does. A detached lse counts as computed
            from query and key in the backward pass, and is computed anew for a sink's gradient.
        backend: "auto", "reference", "streaming", "cpu" or "triton".

    Returns:
        Abar (B, N, M) float32 (float64 for float64 input): probabilities, or for "gradient" the explained score's units. The
        row of a query without a visible key is zero. Twice differentiable, in every floating tensor except attn_mask.

    Raises:
        ValueError, TypeError: if an argument is wrong (the message names it), or the requested backend does not support the call.
        RuntimeError: in a third derivative.

    Reference: the head mean of rule="gradient" is Abar of Chefer et al., "Generic Attention-Model Explainability", ICCV 2021, eq.
    5.
    """
    if is_dtensor(query):
        return over_shards(attention_map, locals(), ["bqk"], _on_shards)
    groups = query_groups, key_groups, group_bias
    x = AttentionArguments(query, key, attn_mask, key_mask, is_causal, scale, enable_gqa, softcap, sink, *groups, backend)
    plan = planned(_plan, x, value, grad_output, rule, head_reduction, row_normalize, lse)
    if plan.backend == "reference":
        rules = {"rule": rule, "head_reduction": head_reduction, "row_normalize": row_normalize}
        formula = reference.attention_map
        return by_formula(formula, x, plan.scale, value=value, grad_output=grad_output, lse=lse, **rules)
    lse = lse_for_sink(x, lse, plan)
    x, value, grad_output = cast(x, value, grad_output)
    x, value = without_padding(x, plan, value)
    tensors = attention_of(x, plan), value, grad_output, lse
    return _derivatives.forward(AttentionMapInputs(*tensors, rule, head_reduction, row_normalize, plan.backend))


def _describe(
    x: AttentionArguments,
    value: Tensor | None,
    grad_output: Tensor | None,
    rule: str,
    head_reduction: str,
    row_normalize: bool,
    lse: Tensor | None,
) -> CallShape:
    """Checks a call, and returns its metadata."""
    check_choice("rule", rule, RULES)
    check_choice("head_reduction", head_reduction, HEAD_REDUCTIONS)
    check_bool(row_normalize=row_normalize)
    check_attention(x.query, x.key, x.enable_gqa, **_tensors_of_rule(rule, value, grad_output))
    if x.query.shape[1] == 0:
        raise ValueError(f"query must have at least one head to reduce; got {describe(x.query)}")
    check_head_dim(x.query, x.key)
    check_lse(lse, x.query)
    check_logits(x)
    (_, _, queries, head_dim), keys, value_dim = x.query.shape, x.key.shape[2], 0 if value is None else value.shape[3]
    sizes = {"queries": queries, "keys": keys, "head_dim": head_dim, "value_dim": value_dim}
    flags = {"rule": rule, "head_reduction": head_reduction, "row_normalize": row_normalize}
    return call_shape("attention_map", x.query, sizes, {**flags, **logit_flags(x)})


def _tensors_of_rule(rule: str, value: Tensor | None, grad_output: Tensor | None) -> dict[str, Any]:
    """Returns value and grad_output, which one rule needs and the other does not take."""
    optional = {"value": value, "grad_output": grad_output}
    for name, tensor in optional.items():
        if rule == "gradient" and tensor is None:
            raise ValueError(f"{name} must be given for rule='gradient'; got None")
        if rule == "attention" and tensor is not None:
            raise ValueError(f"{name} must not be given for rule='attention', which does not use it; got {describe(tensor)}")
    return optional if rule == "gradient" else {}


_plan = planning(BACKENDS, _describe)


def _forward_fake(inputs: AttentionMapInputs) -> Tensor:
    query, key = inputs.attention.query, inputs.attention.key
    return query.new_empty(query.shape[0], query.shape[2], key.shape[2], dtype=compute_dtype(query))


_derivatives = Derivatives(
    "attention_map",
    (AttentionMapInputs, AttentionMapBackwardInputs),
    streaming.FIELDS,
    outputs=("map",),
    grads={"grad": "map"},
    passes=(
        launcher(BACKENDS, streaming.forward),
        *[gradients(BACKENDS, each) for each in (streaming.backward, streaming.jvp, streaming.second)],
    ),
    fake=_forward_fake,
    needs={"need_lse": ("lse",)},
)

OPERATOR = Operator(attention_map, _describe, BACKENDS)
