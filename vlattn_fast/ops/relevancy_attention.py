"""Relevancy as one more cotangent: r <- r * a + (r * b) Abar in the backward pass of attention.

Chefer et al., ICCV 2021, eq. 5-6 in row form; weighted as in Huang et al. 2023. Formula with whole maps:
reference/relevancy_attention.py. O(N) memory: streaming/relevancy_attention.py.
B batch, H heads, N queries, M keys, D head_dim, T relevancy vectors per sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlattn_fast import kernels
from vlattn_fast._ground.checks import (
    FLOAT_DTYPES,
    check_attention,
    check_bool,
    check_choice,
    check_constant,
    check_device,
    check_head_dim,
    check_number,
    check_tensor,
    describe,
    is_dtensor,
)
from vlattn_fast._ground.tensors import as_fake_outputs, as_gradient, compute_dtype, empty_rows_first, weigh_rows
from vlattn_fast.backends import reference
from vlattn_fast.backends.cpu import relevancy_attention as cpu
from vlattn_fast.backends.cuda import relevancy_attention as cuda
from vlattn_fast.backends.inputs import RelevancyAttentionBackwardInputs, RelevancyAttentionInputs, named
from vlattn_fast.backends.reference.relevancy_attention import RULES
from vlattn_fast.backends.streaming import relevancy_attention as streaming
from vlattn_fast.dispatch import choice
from vlattn_fast.dispatch.call import AttentionArguments, CallShape, call_shape
from vlattn_fast.dispatch.choice import load, planned
from vlattn_fast.dispatch.operator import Operator
from vlattn_fast.dispatch.table import lse_dtype, table
from vlattn_fast.ops import _relevancy_shards
from vlattn_fast.ops._documents import Ids, over_documents
from vlattn_fast.ops._groups import check_head_gate, gated
from vlattn_fast.ops._registration import Saved, define, differentiable
from vlattn_fast.ops._shards import over_shards
from vlattn_fast.ops._sinks import lse_with_sink, with_sink
from vlattn_fast.ops._stages import DotPlan, attention_of, by_formula, cast, check_logits, logit_flags, make_plan, without_padding
from vlattn_fast.ops.score_attention import DERIVATIVES


def _cuda_limits(call: CallShape) -> list[tuple[str, bool]]:
    sizes, flags, kernel = call.sizes, call.flags, "the CUDA C++ kernel"
    return [
        (f"{kernel} takes more than 256 queries and keys", sizes["queries"] <= 256),
        (f"{kernel} needs a compute capability of 9.0 (Hopper)", call.capability not in ((9, 0), None)),
        (f"{kernel} takes float16 and bfloat16", call.dtype.itemsize != 2),
        (f"{kernel} takes a head_dim of at most 128", sizes["head_dim"] > 128),
        (
            f"{kernel} takes one head_dim for queries and values, a multiple of 8",
            sizes["head_dim"] != sizes["value_dim"] or sizes["head_dim"] % 8 != 0,
        ),
        (f"{kernel} takes one relevancy vector per sample", sizes["rows"] > 1),
        (f"{kernel} takes rule='gradient' without row_normalize", flags["rule"] != "gradient" or flags["row_normalize"]),
        (f"{kernel} takes no mask but the causal one", flags["masked"]),
        (f"{kernel} has no softcap", flags["softcap"]),
        (f"{kernel} has no attention sinks", flags["sink"]),
    ]


BACKENDS = table(
    streaming,
    cpu=cpu,
    triton=lambda: kernels.relevancy_attention,
    cuda=cuda,
    limits={"cuda": _cuda_limits},
    shared_sums={"cuda": ("gradient of carrier",)},
)
_OUTPUTS = ["bhqd", "btq"]


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
    document_ids: Ids = None,
    cu_seqlens: Ids = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Computes self-attention whose backward pass carries relevancy.

    Returns the attention's output and the unchanged carrier. Memory is O(N) per head: no map is stored. The backward pass adds
    one product per tile to that of attention.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> query, key, value = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
        >>> start = torch.zeros(1, 1, 5, requires_grad=True)
        >>> out, carrier = va.relevancy_attention(query, key, value, start)
        >>> explained = torch.zeros(1, 1, 5).index_fill(2, torch.tensor(0), 1.0)
        >>> relevancy, = torch.autograd.grad([out.sum(), carrier], [start], [torch.tensor(1.0), explained])
        >>> relevancy.shape
        torch.Size([1, 1, 5])

    The carrier is a tensor whose gradient is the relevancy r. Forward, the operator is scaled_dot_product_attention. Backward,
    the gradient of `carrier` is r * a + (r * b) @ Abar, with Abar = mean_h relu(A * dA) and dA = grad_out @ value^T for
    rule="gradient" (eq. 5), or Abar = mean_h A for rule="attention" (rollout is a = b = 0.5). If you thread the carrier through
    every layer, `torch.autograd.grad([score, carrier_L], [carrier_0], [1, explained])` gives rows of (I + Abar_L) ... (I +
    Abar_1) (eq. 6).

    Args:
        query: (B, H, N, D).
        key: (B, Hkv, N, D). Hkv = H, or a divisor of H with enable_gqa.
        value: (B, Hkv, N, Dv). query, key and value share a floating dtype.
        carrier: (B, T, N) float32 (float64 if query is float64), for T relevancy vectors per sample.
        rule: which Abar, "gradient" or "attention".
        row_normalize: divide each row of Abar by its sum; zero rows stay zero.
        residual_weight, attention_weight: a and b, (B, N) or a number; they get no gradient. Default: 1.
        attn_mask, key_mask, is_causal, scale, enable_gqa, softcap, sink, query_groups, key_groups, group_bias, head_gate:
            see score_attention. scale defaults to 1/sqrt(D).
        document_ids, cu_seqlens: see score_attention; no pair, since queries are keys.
        backend: "auto", "reference", "streaming", "cpu", "triton" or "cuda".

    Returns:
        out (B, H, N, Dv) and the carrier (B, T, N).

    Raises:
        ValueError, TypeError: if an argument is wrong (the message names it), or the requested backend does not support the call.

    References: Chefer et al., ICCV 2021; the weights a and b: Huang et al. 2023.
    """
    if document_ids is not None or cu_seqlens is not None or getattr(query, "is_nested", False):
        return over_documents(relevancy_attention, locals(), _OUTPUTS)
    if is_dtensor(query):
        return over_shards(relevancy_attention, locals(), _OUTPUTS, _relevancy_shards.attention)
    groups = query_groups, key_groups, group_bias
    x = AttentionArguments(query, key, attn_mask, key_mask, is_causal, scale, enable_gqa, softcap, sink, *groups, backend)
    plan = planned(_plan, x, value, carrier, rule, row_normalize, residual_weight, attention_weight, head_gate)
    x, value = cast(x, value)
    if plan.backend == "reference":
        weighted = {"residual_weight": residual_weight, "attention_weight": attention_weight, "head_gate": head_gate}
        options = {"value": value, "carrier": carrier, "rule": rule, "row_normalize": row_normalize, **weighted}
        return by_formula(reference.relevancy_attention, x, plan.scale, **options)
    x, value = without_padding(x, plan, value)
    weights = _weight(residual_weight, carrier), _weight(attention_weight, carrier)
    logit = None if sink is None else sink[:, None]
    tensors = attention_of(x, plan), value, carrier, *weights, logit
    return _finish(_forward_op(RelevancyAttentionInputs(*tensors, rule, row_normalize, plan.backend)), sink, head_gate)


def _describe(
    x: AttentionArguments, value: Tensor, carrier: Tensor, rule: str, row_normalize: bool, head_gate: Tensor | None
) -> CallShape:
    """Checks a call except for its weights, and returns its metadata."""
    if value is None:  # which only relevancy_step supports
        raise TypeError("value must be a torch.Tensor (B, Hkv, N, Dv); got None")
    check_abar(x, rule, row_normalize, {"value": value})
    check_carried("carrier", carrier, x.query)
    check_head_gate(head_gate, x.query)
    if x.key.shape[2] != x.query.shape[2]:
        raise ValueError(
            f"key must be as long as query ({x.query.shape[2]}): relevancy_attention is self-attention, relevancy_step supports "
            f"other lengths; got {describe(x.key)}"
        )
    if carrier.dtype != compute_dtype(x.query):
        raise TypeError(f"carrier must be {compute_dtype(x.query)} for {x.query.dtype} attention; got {describe(carrier)}")
    return call_shape("relevancy_attention", x.query, sizes_of(x, value, carrier), flags_of(x, rule, row_normalize))


def check_abar(x: AttentionArguments, rule: str, row_normalize: bool, tensors: dict[str, Any]) -> None:
    """Raises unless the arguments of Abar fit, including those of relevancy_step. tensors: value and grad_output, if given."""
    check_attention(x.query, x.key, x.enable_gqa, **tensors)
    check_bool(row_normalize=row_normalize)
    check_choice("rule", rule, RULES)
    check_head_dim(x.query, x.key)
    check_logits(x)


def check_carried(name: str, carrier: Any, query: Tensor) -> None:
    check_tensor(name, carrier, rank=3, shape="(B, T, N)")
    check_device(name, carrier, "query", query)
    if carrier.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be floating point; got {describe(carrier)}")
    (batch, _, queries, _), (carrier_batch, _, carrier_queries) = query.shape, carrier.shape
    if (carrier_batch, carrier_queries) != (batch, queries):
        raise ValueError(f"{name} must have shape (B, T, N) with query's B={batch} and N={queries}; got {describe(carrier)}")


def sizes_of(x: AttentionArguments, value: Tensor | None, carrier: Tensor) -> dict[str, int]:
    value_dim, (_, _, queries, head_dim) = 0 if value is None else value.shape[3], x.query.shape
    return {"queries": queries, "keys": x.key.shape[2], "head_dim": head_dim, "value_dim": value_dim, "rows": carrier.shape[1]}


def flags_of(x: AttentionArguments, rule: str, row_normalize: bool) -> dict[str, Any]:
    masked = x.attn_mask is not None or x.key_mask is not None
    return {"rule": rule, "row_normalize": row_normalize, "masked": masked, **logit_flags(x)}


def _plan(
    x: AttentionArguments,
    value: Tensor,
    carrier: Tensor,
    rule: str,
    row_normalize: bool,
    residual_weight: Tensor | float | None,
    attention_weight: Tensor | float | None,
    head_gate: Tensor | None,
) -> DotPlan:
    backend = choice.select(BACKENDS, _describe(x, value, carrier, rule, row_normalize, head_gate), x.backend)
    _check_weight("residual_weight", residual_weight, carrier)
    _check_weight("attention_weight", attention_weight, carrier)
    return make_plan(BACKENDS, backend, x.query, x.scale, x.softcap)


def _check_weight(name: str, weight: Any, carrier: Tensor) -> None:
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        check_number(name, weight)
        return
    check_tensor(name, weight)
    check_device(name, weight, "carrier", carrier)
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be floating point; got {describe(weight)}")
    if weight.shape[0:1] != carrier.shape[0:1] or weight.shape[1:] != carrier.shape[2:]:
        raise ValueError(
            f"{name} must be a number or have shape (B, N) = {(carrier.shape[0], carrier.shape[2])}; got {describe(weight)}"
        )
    check_constant(name, weight)


def _weight(weight: Any, carrier: Tensor) -> Tensor | None:
    """Returns a weight as the operator takes it: None for 1, else broadcastable to (B, N) in the carrier's dtype."""
    if weight is None or isinstance(weight, Tensor):
        return None if weight is None else weight.to(carrier.dtype)
    if weight == 1:
        return None
    # a product: torch.compile makes the factor a tensor if the weight varies
    return torch.ones((1, 1), dtype=carrier.dtype, device=carrier.device) * float(weight)


Rows = tuple[Tensor, Tensor, Tensor, Tensor | None]  # out, the carrier, lse, `_behind_sink`


def _finish(rows: Rows, sink: Tensor | None, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the output with a sink and the gates of heads, and the carrier."""
    out, carrier, lse, behind_sink = rows
    if sink is not None:
        out = with_sink(out, lse, sink[:, None])
    out = out if behind_sink is None or not behind_sink.numel() else out + behind_sink
    return out if gate is None else gated(out, gate), carrier


def _forward(inputs: RelevancyAttentionInputs) -> Rows:
    out, lse = load(BACKENDS, inputs.backend).forward(inputs)
    return out, inputs.carrier.clone(memory_format=torch.contiguous_format), lse, _behind_sink(inputs)


def _forward_fake(inputs: RelevancyAttentionInputs) -> Rows:
    query, carrier = inputs.attention.query, inputs.carrier
    out = empty_rows_first(query, query.shape[1], query.shape[2], inputs.value.shape[3])
    lse, behind_sink = query.new_empty(query.shape[:3], dtype=lse_dtype(BACKENDS[inputs.backend], query)), _behind_sink(inputs)
    return out, carrier.new_empty(carrier.shape), lse, behind_sink


def _behind_sink(inputs: RelevancyAttentionInputs) -> Tensor | None:
    """Returns zeros, which the public call adds to the output after the sink: their gradient is that of the output there. In 16
    bits the gradient before the sink, which is multiplied by the share of the keys, is rounded, and if values have a large mean
    little is left of dA. None if no dA needs it."""
    query = inputs.attention.query
    if inputs.sink is None or inputs.rule != "gradient" or query.dtype.itemsize != 2:
        return None
    return empty_rows_first(query, query.shape[1], query.shape[2], inputs.value.shape[3]).zero_()


def _backward(inputs: RelevancyAttentionBackwardInputs) -> tuple[Tensor | None, ...]:
    grad_carrier, backend = inputs.grad_carrier, load(BACKENDS, inputs.backend)
    behind_sink = inputs.grad_behind_sink
    # backends ignore the sink. In relu(A * dA) autograd has multiplied dA by the share of the keys; A does not have that factor
    if inputs.sink is not None and grad_carrier is not None and (inputs.rule == "attention" or behind_sink is not None):
        *grads, _, grad_row_bias = backend.backward(inputs._replace(grad_carrier=None))
        weighted = weigh_rows(grad_carrier, inputs.attention_weight)
        after = inputs._replace(grad_out=behind_sink)
        attended = backend.step(after.step(weighted, lse_with_sink(inputs.lse, inputs.sink)))
        grad_carrier = weigh_rows(grad_carrier, inputs.residual_weight) + attended
    else:
        *grads, grad_carrier, grad_row_bias = backend.backward(inputs)
    like = inputs.attention.query, inputs.attention.key, inputs.value
    grads = [None if grad is None else as_gradient(grad, x) for grad, x in zip(grads, like, strict=True)]
    return *grads, *[None if x is None else x.contiguous() for x in (grad_carrier, grad_row_bias)]


def _backward_fake(inputs: RelevancyAttentionBackwardInputs) -> tuple[Tensor | None, ...]:
    query, key, value = inputs.attention.query, inputs.attention.key, inputs.value
    need_inputs = inputs.need_inputs and inputs.grad_out is not None
    grads = [empty_rows_first(x, *x.shape[1:]) if need_inputs else None for x in (query, key, value)]
    return *grads, *as_fake_outputs((inputs.grad_carrier, inputs.attention.row_bias if need_inputs else None))


_forward_op = define(
    "relevancy_attention",
    RelevancyAttentionInputs,
    "(Tensor out, Tensor carrier_out, Tensor lse, Tensor behind_sink)",
    _forward,
    _forward_fake,
)
_backward_op = define(
    "relevancy_attention_backward",
    RelevancyAttentionBackwardInputs,
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


_saved = Saved(
    RelevancyAttentionInputs,
    RelevancyAttentionBackwardInputs,
    outputs=("out", "lse"),
    grads=("grad_out", "grad_carrier", "grad_lse", "grad_behind_sink", "need_inputs"),
)


def _setup_context(ctx: Any, inputs: RelevancyAttentionInputs, output: Rows) -> None:
    out, _, lse, _ = output
    _saved.save(ctx, inputs, out, lse)


def _autograd(
    ctx: Any, grad_out: Tensor | None, grad_carrier: Tensor | None, grad_lse: Tensor | None, grad_behind_sink: Tensor | None
) -> dict[str, Tensor]:
    needed = _saved.needed(ctx)
    need_inputs = grad_out is not None and not needed.isdisjoint(("query", "key", "value", "row_bias"))
    grad_carrier = grad_carrier if "carrier" in needed else None
    if grad_behind_sink is not None and grad_behind_sink.dim() == 1:  # of the empty tensor
        grad_behind_sink = None
    incoming = grad_out, grad_carrier, grad_lse, grad_behind_sink, need_inputs
    grads = dict(zip(("query", "key", "value", "carrier", "row_bias"), _backward_op(_saved.inputs(ctx, *incoming)), strict=True))
    carrier = grads.pop("carrier")
    by_field = grads if need_inputs else {}
    return by_field if grad_carrier is None else by_field | {"carrier": carrier}


def named_attention(x: dict[str, Any]) -> dict[str, Any]:
    """The inputs of the attention without its carrier, by name, for the derivatives of score_attention."""
    backend = "streaming" if x["backend"] == "cuda" else x["backend"]  # which has no backward pass of attention alone
    return x | {"seed": None, "dropout_p": 0.0, "backend": backend}


def _jvp(inputs: RelevancyAttentionInputs, tangents: Mapping[str, Any], outputs: Rows) -> tuple[Tensor | None, ...]:
    """The carrier is passed through: its backward pass is a rule, and no transpose of this."""
    out, _, lse, behind_sink = outputs
    u = {field: tangents[field] for field in DERIVATIVES.fields}
    rows: tuple[Tensor, ...] = torch.zeros_like(out), torch.zeros_like(lse)
    if any(x is not None for x in u.values()):
        rows = DERIVATIVES.tangents_of_outputs(named_attention(named(inputs) | {"out": out, "lse": lse}), u)
    carrier = torch.zeros_like(inputs.carrier) if tangents["carrier"] is None else tangents["carrier"].clone()
    return rows[0], carrier, rows[1], None if behind_sink is None else torch.zeros_like(behind_sink)


differentiable("relevancy_attention", _autograd, _setup_context, _jvp)

OPERATOR = Operator(relevancy_attention, _describe, BACKENDS)
