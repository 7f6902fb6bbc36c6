"""relevancy @ Abar by itself: relevancy_attention's step in the backward pass, for any attention.

Formula: reference/relevancy_attention.py. O(N) memory: streaming/relevancy_attention.py. The backends are those of
relevancy_attention without CUDA C++, in the same modules.
"""

from __future__ import annotations

from torch import Tensor

from vlattn_fast._ground.checks import check_lse, is_dtensor
from vlattn_fast._ground.tensors import as_fake_outputs
from vlattn_fast.backends import reference
from vlattn_fast.backends.inputs import RelevancyStepBackwardInputs, RelevancyStepInputs, named
from vlattn_fast.backends.streaming import relevancy_attention as streaming
from vlattn_fast.backends.streaming.relevancy_attention import FIELDS
from vlattn_fast.dispatch import choice
from vlattn_fast.dispatch.call import AttentionArguments, CallShape, call_shape
from vlattn_fast.dispatch.choice import gradients, launcher, planned
from vlattn_fast.dispatch.operator import Operator
from vlattn_fast.ops import _relevancy_shards, relevancy_attention
from vlattn_fast.ops._derivatives import Derivatives
from vlattn_fast.ops._documents import Ids, over_documents
from vlattn_fast.ops._shards import over_shards
from vlattn_fast.ops._stages import DotPlan, attention_of, by_formula, cast, make_plan, without_padding
from vlattn_fast.ops.relevancy_attention import check_abar, check_carried, flags_of, sizes_of
from vlattn_fast.ops.score_attention import lse_for_sink

BACKENDS = {name: backend for name, backend in relevancy_attention.BACKENDS.items() if name != "cuda"}


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
    document_ids: Ids = None,
    cu_seqlens: Ids = None,
    backend: str = "auto",
) -> Tensor:
    """Computes relevancy @ Abar for attention that has already run: (B, T, N) -> (B, T, M). Abar is that of relevancy_attention.

    Use it if your attention is not relevancy_attention. Memory is O(N): Abar is never stored, and the backward pass recomputes
    it. Passing `lse` saves a pass over the keys.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> query, key, value, grad_output = (torch.randn(1, 2, 5, 8) for _ in range(4))
        >>> va.relevancy_step(torch.eye(5)[None], query, key, value, grad_output).shape  # the whole Abar, one row per query
        torch.Size([1, 5, 5])

    Args:
        relevancy: (B, T, N) floating point, T relevancy vectors per sample.
        query: (B, H, N, D).
        key: (B, Hkv, M, D).
        value, grad_output: (B, Hkv, M, Dv) and (B, H, N, Dv), the gradient of the attention's output. Only for rule="gradient".
        lse: (B, H, N), the attention's natural log-sum-exp that score_attention returns, including the sink; -inf or +inf marks a
            query without visible keys. Default: computed anew, which "reference" always does. A detached lse counts as computed
            from query and key in the backward pass, and is computed anew for a sink's gradient.
        rule, row_normalize, attn_mask, key_mask, is_causal, scale, enable_gqa, softcap, sink, query_groups, key_groups,
            group_bias, document_ids, cu_seqlens, backend: see relevancy_attention. There is no "cuda".

    Returns:
        (B, T, M) in relevancy's dtype, twice differentiable in every floating tensor except attn_mask. With the result's
        gradient u and w = r^T u / H, the gradient of A is w dA and that of dA is w A where A dA > 0.

    Raises:
        ValueError, TypeError: if an argument is wrong (the message names it), or the requested backend does not support the call.

    Reference: Chefer et al., ICCV 2021, eq. 5 and 6, without the identity.
    """
    if document_ids is not None or cu_seqlens is not None or getattr(query, "is_nested", False):
        return over_documents(relevancy_step, locals(), ["btk"])
    if is_dtensor(query):
        return over_shards(relevancy_step, locals(), ["btk"], _relevancy_shards.step)
    groups = query_groups, key_groups, group_bias
    x = AttentionArguments(query, key, attn_mask, key_mask, is_causal, scale, enable_gqa, softcap, sink, *groups, backend)
    plan = planned(_plan, x, relevancy, value, grad_output, rule, row_normalize, lse)
    x, value, grad_output = cast(x, value, grad_output)
    if plan.backend == "reference":
        options = {"value": value, "grad_output": grad_output, "rule": rule, "row_normalize": row_normalize, "lse": lse}
        return by_formula(reference.relevancy_step, x, plan.scale, relevancy=relevancy, **options)
    if rule == "attention":  # which uses neither
        value = grad_output = None
    lse = lse_for_sink(x, lse, plan)
    x, value = without_padding(x, plan, value)
    tensors = relevancy, attention_of(x, plan), value, grad_output, lse
    return DERIVATIVES.forward(RelevancyStepInputs(*tensors, rule, row_normalize, plan.backend))


def _describe(
    x: AttentionArguments, relevancy: Tensor, value: Tensor | None, grad_output: Tensor | None, rule: str, row_normalize: bool
) -> CallShape:
    """Checks a call except for the tensors that its rule needs, and its log-sum-exp, and returns its metadata."""
    if value is None and grad_output is not None:
        raise ValueError("value must be given with grad_output; got None")
    optional = {"value": value, "grad_output": grad_output}
    check_abar(x, rule, row_normalize, {name: tensor for name, tensor in optional.items() if tensor is not None})
    check_carried("relevancy", relevancy, x.query)
    return call_shape("relevancy_step", x.query, sizes_of(x, value, relevancy), flags_of(x, rule, row_normalize))


def _plan(
    x: AttentionArguments,
    relevancy: Tensor,
    value: Tensor | None,
    grad_output: Tensor | None,
    rule: str,
    row_normalize: bool,
    lse: Tensor | None,
) -> DotPlan:
    backend = choice.select(BACKENDS, _describe(x, relevancy, value, grad_output, rule, row_normalize), x.backend)
    if rule == "gradient" and (value is None or grad_output is None):
        raise ValueError("value and grad_output must be given for rule='gradient'; got None")
    check_lse(lse, x.query)
    return make_plan(BACKENDS, backend, x.query, x.scale, x.softcap)


def _forward_fake(inputs: RelevancyStepInputs) -> Tensor:
    relevancy = inputs.relevancy
    return relevancy.new_empty(relevancy.shape[0], relevancy.shape[1], inputs.attention.key.shape[2])


def _backward_fake(inputs: RelevancyStepBackwardInputs) -> tuple[Tensor | None, ...]:
    needs = dict.fromkeys(FIELDS, inputs.need_inputs) | {"relevancy": inputs.need_relevancy}
    needs["lse"] &= inputs.need_lse
    needs |= dict.fromkeys(("value", "grad_output"), inputs.need_inputs and inputs.rule == "gradient")
    x = named(inputs)
    return as_fake_outputs([x[field] if needs[field] else None for field in FIELDS])


DERIVATIVES = Derivatives(
    "relevancy_step",
    (RelevancyStepInputs, RelevancyStepBackwardInputs),
    FIELDS,
    outputs=("relevancy_out",),
    grads={"grad": "relevancy_out"},
    passes=(
        launcher(BACKENDS, streaming.step),
        *[gradients(BACKENDS, each) for each in (streaming.step_backward, streaming.jvp, streaming.second)],
    ),
    fake=_forward_fake,
    fake_backward=_backward_fake,
    needs={"need_relevancy": FIELDS[:1], "need_inputs": FIELDS[1:], "need_lse": ("lse",)},
)

_CPU = BACKENDS["cpu"]._replace(shared_sums=("gradient of key", "gradient of value"))  # abar_backward, as attention_map's
OPERATOR = Operator(relevancy_step, _describe, {**BACKENDS, "cpu": _CPU})
