"""Relevancy as one more cotangent: r <- r * a + (r * b) Abar in the backward pass of attention.

Chefer et al., ICCV 2021, eq. 5-6 in row form; weighted as in Huang et al. 2023. Formula with whole maps:
reference/relevancy_attention.py. O(N) memory: streaming/relevancy_attention.py.
B batch, H heads, N queries, M keys, D head_dim, T carried rows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.checks import (
    FLOAT_DTYPES,
    check_attention,
    check_bool,
    check_choice,
    check_constant,
    check_device,
    check_head_dim,
    check_lse,
    check_masks,
    check_number,
    check_sink,
    check_softcap,
    check_tensor,
    describe,
)
from vlattn_fast._ground.tensors import (
    as_gradient,
    cast_by_autocast,
    compute_dtype,
    empty_rows_first,
    mask_padding,
    resolve_scale,
    rows_first,
    scaled_dot_default,
    weigh_rows,
)
from vlattn_fast.backends.inputs import (
    RelevancyAttentionBackwardInputs,
    RelevancyAttentionInputs,
    RelevancyStepBackwardInputs,
    RelevancyStepInputs,
)
from vlattn_fast.backends.reference.relevancy_attention import RULES
from vlattn_fast.ops import _relevancy_shards
from vlattn_fast.ops._dispatch import Call, choose, gradients, launcher, load, lse_dtype, make_call, table
from vlattn_fast.ops._registration import Saved, as_fake_outputs, define, differentiable, once_differentiable
from vlattn_fast.ops._shards import ATTENTION, MASKS, NO_HEADS, PER_ROW, TOKENS, over_shards
from vlattn_fast.ops._sinks import lse_with_sink, with_sink
from vlattn_fast.ops.score_attention import lse_for_sink
from vlattn_fast.scores import softcapped


def _cuda_limits(call: Call) -> list[tuple[str, bool]]:
    sizes, size = call.sizes, max(call.sizes["head_dim"], call.sizes["value_dim"])
    row = 2 * ((64 if size <= 64 else 128) * call.dtype.itemsize + 16)  # bytes of shared memory, in two tiles
    longest = max(sizes["queries"], sizes["keys"])
    return [
        ("the CUDA C++ kernel takes at most 256 queries and keys", longest > 256),
        ("the CUDA C++ kernel takes a head_dim of at most 128", size > 128),
        (
            "the CUDA C++ kernel takes no more rows than fit into shared memory at this head_dim and dtype",
            -(-longest // 16) * 16 * row > 96 * 1024,
        ),  # every GPU since Ampere has 99 KB
        ("the CUDA C++ kernel takes at most 64 carried rows", sizes["rows"] > 64),
        ("the CUDA C++ kernel has no softcap", call.flags["softcap"]),
        ("the CUDA C++ kernel has no attention sinks", call.flags["sink"]),
    ]


BACKENDS = table("relevancy_attention", cuda=_cuda_limits)
_INPUTS = dict.fromkeys(("query", "key", "value"), ATTENTION) | MASKS
_WEIGHED = {"carrier": NO_HEADS, "residual_weight": TOKENS, "attention_weight": TOKENS}
_STEPS = {"relevancy": NO_HEADS, "grad_output": ATTENTION, "lse": PER_ROW}


@over_shards(_INPUTS | _WEIGHED, [ATTENTION, NO_HEADS], _relevancy_shards.attention)
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
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Self-attention that carries relevancy rows through its backward pass.

    Forward: scaled_dot_product_attention, and the carrier unchanged. Backward: with r the cotangent of the returned carrier, the
    cotangent of `carrier` is r * a + (r * b) @ Abar, where Abar = mean_h relu(A * dA) with dA = grad_out @ value^T
    (rule="gradient", eq. 5), or mean_h A (rule="attention"; rollout is a = b = 0.5). Threaded through every layer,
    `torch.autograd.grad([score, carrier_L], [carrier_0], [1, rows])` gives rows of (I + Abar_L) ... (I + Abar_1) (eq. 6).

    Args:
        query: (B, H, N, D). key: (B, Hkv, N, D). value: (B, Hkv, N, Dv). One floating dtype; Hkv divides H under enable_gqa.
        carrier: (B, T, N) float32 (float64 where query is float64).
        rule: which Abar, "gradient" or "attention".
        row_normalize: divide each row of Abar by its sum; zero rows stay zero.
        residual_weight, attention_weight: a and b, (B, N) or a number, default 1; constants without a gradient.
        attn_mask, key_mask, is_causal, scale, enable_gqa, softcap, sink: as in score_attention; scale defaults to 1/sqrt(D).
        backend: "auto", "reference", "streaming", "cpu", "triton" or "cuda".

    Returns:
        out (B, H, N, Dv) and the carrier (B, T, N).

    Raises:
        ValueError, TypeError: an argument is wrong (it is named), or the backend asked for cannot run the call.

    >>> query, key, value = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    >>> start = torch.zeros(1, 1, 5, requires_grad=True)
    >>> out, carrier = relevancy_attention(query, key, value, start)
    >>> row = torch.zeros(1, 1, 5).index_fill(2, torch.tensor(0), 1.0)
    >>> relevancy, = torch.autograd.grad([out.sum(), carrier], [start], [torch.tensor(1.0), row])
    >>> relevancy.shape
    torch.Size([1, 1, 5])
    """
    checked = query, key, value, carrier, attn_mask, key_mask, sink
    backend = choose(describe_call, BACKENDS, backend, checked, (rule, row_normalize, is_causal, enable_gqa, softcap))
    residual = _weight("residual_weight", residual_weight, carrier)
    attention = _weight("attention_weight", attention_weight, carrier)
    scale = resolve_scale(scale, scaled_dot_default(query.shape[-1]))
    query, key, value = cast_by_autocast(query, key, value)
    if backend == "reference":
        weights = {"residual_weight": residual_weight, "attention_weight": attention_weight}
        options = {"rule": rule, "row_normalize": row_normalize, "scale": scale, "enable_gqa": enable_gqa}
        masks = {"attn_mask": attn_mask, "key_mask": key_mask, "is_causal": is_causal, "softcap": softcap, "sink": sink}
        return load(BACKENDS, backend).relevancy_attention(query, key, value, carrier, **weights, **options, **masks)
    if not BACKENDS[backend].masks_padding:
        key, value = mask_padding(key_mask, key, value)
    score, parameter, scale = softcapped(scale, softcap)
    logit, sink = (None, None) if sink is None else (sink[:, None], sink.detach()[:, None])
    tensors = query, key, value, carrier, residual, attention, attn_mask, key_mask, sink
    out, carrier, lse, behind_sink = _forward_op(
        RelevancyAttentionInputs(*tensors, rule, row_normalize, score, parameter, scale, is_causal, backend)
    )
    if logit is not None:
        out = with_sink(out, lse, logit)
    return out + behind_sink if behind_sink.numel() else out, carrier


def describe_call(
    query: Any, key: Any, value: Any, carrier: Any, attn_mask: Any = None, key_mask: Any = None, *options: Any, **named: Any
) -> Call:
    """Checks the arguments of a public call and returns its `Call`. Ignores options that neither checks nor backends read."""
    if value is None:  # a value that only relevancy_step takes
        raise TypeError("value must be a torch.Tensor (B, Hkv, N, Dv); got None")
    tensors = carrier, query, key, value, None, attn_mask, key_mask
    call = _describe("relevancy_attention", "carrier", *tensors, *options, **named)
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"key must be as long as query ({query.shape[2]}): relevancy_attention is self-attention, relevancy_step takes "
            f"other lengths; got {describe(key)}"
        )
    if carrier.dtype != compute_dtype(query):
        raise TypeError(f"carrier must be {compute_dtype(query)} for {query.dtype} attention; got {describe(carrier)}")
    return call


@over_shards(_INPUTS | _STEPS, [NO_HEADS], _relevancy_shards.step)
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
    backend: str = "auto",
) -> Tensor:
    """relevancy @ Abar by itself, behind any attention: (B, T, N) -> (B, T, M); Abar as in relevancy_attention.

    Args:
        relevancy: (B, T, N) floating point.
        query: (B, H, N, D). key: (B, Hkv, M, D).
        value, grad_output: (B, Hkv, M, Dv) and (B, H, N, Dv), the gradient of the attention's output; for rule="gradient" only.
        lse: (B, H, N) natural log-sum-exp of the attention's rows, as score_attention returns it, with the sink in it; -inf or
            +inf marks a row without visible keys. None = computed anew, as "reference" always does. A detached lse counts as
            computed from query and key in the backward pass, and is computed anew for a sink's gradient.
        rule, row_normalize, attn_mask, key_mask, is_causal, scale, enable_gqa, softcap, sink, backend: as in
            relevancy_attention. The backward pass of "cuda" is that of "streaming".

    Returns:
        (B, T, M) in relevancy's dtype, differentiable in every floating tensor but attn_mask, in O(N) memory. With the result's
        gradient u and w = r^T u / H, the gradient of A is w dA and that of dA is w A where A dA > 0.

    Raises:
        ValueError, TypeError: an argument is wrong (it is named), or the backend asked for cannot run the call.
    """
    checked = relevancy, query, key, value, grad_output, attn_mask, key_mask, sink
    backend = choose(_describe_step, BACKENDS, backend, checked, (rule, row_normalize, is_causal, enable_gqa, softcap))
    if rule == "gradient" and (value is None or grad_output is None):
        raise ValueError("value and grad_output must be given for rule='gradient'; got None")
    check_lse(lse, query)
    scale = resolve_scale(scale, scaled_dot_default(query.shape[-1]))
    query, key, value, grad_output = cast_by_autocast(query, key, value, grad_output)
    if backend == "reference":
        options = {"rule": rule, "row_normalize": row_normalize, "lse": lse, "scale": scale, "enable_gqa": enable_gqa}
        masks = {"attn_mask": attn_mask, "key_mask": key_mask, "is_causal": is_causal, "softcap": softcap, "sink": sink}
        return load(BACKENDS, backend).relevancy_step(relevancy, query, key, value, grad_output, **options, **masks)
    if sink is not None:
        seen = {"attn_mask": attn_mask, "key_mask": key_mask, "is_causal": is_causal, "enable_gqa": enable_gqa}
        lse = lse_for_sink(lse, query, key, sink, scale=scale, softcap=softcap, backend=backend, **seen)
    if not BACKENDS[backend].masks_padding:
        key, value = mask_padding(key_mask, key, value)
    score, parameter, scale = softcapped(scale, softcap)
    tensors = relevancy, query, key, value, grad_output, lse, attn_mask, key_mask
    return _step_op(RelevancyStepInputs(*tensors, rule, row_normalize, score, parameter, scale, is_causal, backend))


def _describe(
    operator: str,
    name: str,
    carrier: Any,
    query: Any,
    key: Any,
    value: Any,
    grad_output: Any,
    attn_mask: Any,
    key_mask: Any,
    sink: Any = None,
    rule: Any = "gradient",
    row_normalize: Any = False,
    is_causal: Any = False,
    enable_gqa: Any = False,
    softcap: Any = None,
    **_: Any,
) -> Call:
    """`describe_call` for both calls; `name` is the carrier's name in the call."""
    if value is None and grad_output is not None:
        raise ValueError("value must be given with grad_output; got None")
    optional = {each: x for each, x in (("value", value), ("grad_output", grad_output)) if x is not None}
    check_attention(query, key, enable_gqa, **optional)
    check_bool(row_normalize=row_normalize)
    check_choice("rule", rule, RULES)
    check_head_dim(query, key)
    check_masks(query, key, attn_mask, key_mask, is_causal)
    check_softcap(softcap)
    check_sink(sink, query)
    check_tensor(name, carrier, rank=3, shape="(B, T, N)")
    check_device(name, carrier, "query", query)
    if carrier.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be floating point; got {describe(carrier)}")
    (batch, _, queries, head_dim), (carrier_batch, carried_rows, carrier_queries) = query.shape, carrier.shape
    if (carrier_batch, carrier_queries) != (batch, queries):
        raise ValueError(f"{name} must have shape (B, T, N) with query's B={batch} and N={queries}; got {describe(carrier)}")
    value_dim = 0 if value is None else value.shape[3]
    sizes = {"queries": queries, "keys": key.shape[2], "head_dim": head_dim, "value_dim": value_dim, "rows": carried_rows}
    flags = {"rule": rule, "row_normalize": row_normalize, "softcap": softcap is not None, "sink": sink is not None}
    return make_call(operator, query, sizes, flags)


_describe_step = partial(_describe, "relevancy_step", "relevancy")


def _weight(name: str, weight: Any, carrier: Tensor) -> Tensor | None:
    """A weight as the operator takes it: None for 1, else broadcastable to (B, N) in the carrier's dtype."""
    if weight is None:
        return None
    if not isinstance(weight, Tensor):
        check_number(name, weight)
        if weight == 1:
            return None
        # a product: torch.compile makes the factor a tensor where the weight varies
        return torch.ones((1, 1), dtype=carrier.dtype, device=carrier.device) * float(weight)
    check_tensor(name, weight)
    check_device(name, weight, "carrier", carrier)
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be floating point; got {describe(weight)}")
    if weight.shape[0:1] != carrier.shape[0:1] or weight.shape[1:] != carrier.shape[2:]:
        raise ValueError(
            f"{name} must be a number or have shape (B, N) = {(carrier.shape[0], carrier.shape[2])}; got {describe(weight)}"
        )
    check_constant(name, weight)
    return weight.to(carrier.dtype)


def _forward(inputs: RelevancyAttentionInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, carrier, lse = load(BACKENDS, inputs.backend).forward(inputs)
    return rows_first(out), carrier.contiguous(), lse.contiguous(), _behind_sink(inputs)


def _forward_fake(inputs: RelevancyAttentionInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, carrier = inputs.query, inputs.carrier
    out = empty_rows_first(query, query.shape[1], query.shape[2], inputs.value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=lse_dtype(BACKENDS[inputs.backend], query))
    return out, carrier.new_empty(carrier.shape), lse, _behind_sink(inputs)


def _behind_sink(inputs: RelevancyAttentionInputs) -> Tensor:
    """Zeros, which the public call adds to the output behind the sink: their gradient is the cotangent there. In 16 bits that of
    the output in front, the cotangent times the share of the keys, is rounded, and where values have a large mean little is left
    of dA. Empty where no dA needs it."""
    query = inputs.query
    if inputs.sink is None or inputs.rule != "gradient" or query.dtype.itemsize != 2:
        return query.new_empty(0)
    return empty_rows_first(query, query.shape[1], query.shape[2], inputs.value.shape[3]).zero_()


def _backward(inputs: RelevancyAttentionBackwardInputs) -> tuple[Tensor, ...]:
    grad_carrier, backend = inputs.grad_carrier, load(BACKENDS, inputs.backend)
    behind_sink = inputs.grad_behind_sink
    # backends know of no sink. Abar of relu(A * dA) has its part from dA, which autograd multiplies by it; that of A has not
    if inputs.sink is not None and grad_carrier is not None and (inputs.rule == "attention" or behind_sink is not None):
        *grads, _ = backend.backward(inputs._replace(grad_carrier=None))
        weighted = weigh_rows(grad_carrier, inputs.attention_weight)
        behind = inputs._replace(grad_out=behind_sink)
        attended = backend.step(behind.step(weighted, lse_with_sink(inputs.lse, inputs.sink)))
        grad_carrier = weigh_rows(grad_carrier, inputs.residual_weight) + attended
    else:
        *grads, grad_carrier = backend.backward(inputs)
    empty, like = inputs.query.new_empty, (inputs.query, inputs.key, inputs.value)
    grads = [empty(0) if grad is None else as_gradient(grad, x) for grad, x in zip(grads, like, strict=True)]
    return *grads, empty(0) if grad_carrier is None else grad_carrier.contiguous()


def _backward_fake(inputs: RelevancyAttentionBackwardInputs) -> tuple[Tensor, ...]:
    query, key, value, grad_carrier = inputs.query, inputs.key, inputs.value, inputs.grad_carrier
    need_inputs = inputs.need_inputs and inputs.grad_out is not None
    grads = [empty_rows_first(x, *x.shape[1:]) if need_inputs else x.new_empty(0) for x in (query, key, value)]
    return *grads, query.new_empty(0) if grad_carrier is None else grad_carrier.new_empty(grad_carrier.shape)


def _step_fake(inputs: RelevancyStepInputs) -> Tensor:
    relevancy = inputs.relevancy
    return relevancy.new_empty(relevancy.shape[0], relevancy.shape[1], inputs.key.shape[2])


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
    "(Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_step_op = define("relevancy_step", RelevancyStepInputs, "Tensor", launcher(BACKENDS, "step"), _step_fake)


_saved = Saved(
    RelevancyAttentionInputs,
    RelevancyAttentionBackwardInputs,
    outputs=("out", "lse"),
    grads=("grad_out", "grad_carrier", "grad_lse", "grad_behind_sink", "need_inputs"),
)


def _setup_context(ctx: Any, inputs: RelevancyAttentionInputs, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    out, _, lse, _ = output
    _saved.save(ctx, inputs, out, lse)
    ctx.set_materialize_grads(False)


def _autograd(
    ctx: Any, grad_out: Tensor | None, grad_carrier: Tensor | None, grad_lse: Tensor | None, grad_behind_sink: Tensor | None
) -> tuple[Tensor | None, ...]:
    *need_any, need_carrier = ctx.needs_input_grad[:4]
    need_inputs = grad_out is not None and any(need_any)
    grad_carrier = grad_carrier if need_carrier else None
    if grad_behind_sink is not None and grad_behind_sink.dim() == 1:  # of the empty tensor
        grad_behind_sink = None
    *grads, cotangent = _backward_op(_saved.inputs(ctx, grad_out, grad_carrier, grad_lse, grad_behind_sink, need_inputs))
    return *(grads if need_inputs else (None,) * 3), None if grad_carrier is None else cotangent


differentiable("relevancy_attention", _autograd, _setup_context)
once_differentiable("relevancy_attention_backward")


def _step_backward_fake(x: RelevancyStepBackwardInputs) -> tuple[Tensor, ...]:
    pair = (x.value, x.grad_output) if x.rule == "gradient" else (None, None)
    inputs = (x.query, x.key, *pair, x.lse if x.need_lse else None) if x.need_inputs else (None,) * 5
    return as_fake_outputs(x.query, (x.relevancy if x.need_relevancy else None, *inputs))


_step_backward_op = define(
    "relevancy_step_backward",
    RelevancyStepBackwardInputs,
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    gradients(BACKENDS, "step_backward"),
    _step_backward_fake,
)
_step_saved = Saved(RelevancyStepInputs, RelevancyStepBackwardInputs, grads=("grad", "need_relevancy", "need_inputs", "need_lse"))


def _step_setup_context(ctx: Any, inputs: RelevancyStepInputs, output: Tensor) -> None:
    _step_saved.save(ctx, inputs)
    ctx.by_gradient = inputs.rule == "gradient"


def _step_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_relevancy, query, key, value, grad_output, need_lse = ctx.needs_input_grad[:6]
    value, grad_output = value and ctx.by_gradient, grad_output and ctx.by_gradient  # rule "attention" reads neither
    needed = need_relevancy, query, key, value, grad_output, need_lse
    grads = _step_backward_op(_step_saved.inputs(ctx, grad, need_relevancy, any(needed[1:]), need_lse))
    return tuple(x if is_needed else None for x, is_needed in zip(grads, needed, strict=True))


differentiable("relevancy_step", _step_autograd, _step_setup_context)
once_differentiable("relevancy_step_backward")
