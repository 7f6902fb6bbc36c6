"""relevancy @ Abar through a linear recurrence: the gated delta rule, Mamba, RetNet, linear attention, RWKV.

Formula: reference/recurrent_step.py. O(N) memory: streaming/recurrent_step.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from vlattn_fast._ground.checks import (
    FLOAT_DTYPES,
    check_bool,
    check_choice,
    check_device,
    check_floating,
    check_head_dim,
    check_tensor,
    describe,
)
from vlattn_fast._ground.tensors import as_fake_outputs, as_outputs, cast_by_autocast, without_autocast
from vlattn_fast.backends import reference
from vlattn_fast.backends.cpu import recurrent_step as cpu
from vlattn_fast.backends.reference.recurrent_step import heads_of
from vlattn_fast.backends.reference.relevancy_attention import RULES
from vlattn_fast.backends.streaming import recurrent_step as streaming
from vlattn_fast.backends.streaming.recurrent_step import DIFFERENTIABLE, RecurrentStepBackwardInputs, RecurrentStepInputs
from vlattn_fast.dispatch.call import CallShape, call_shape
from vlattn_fast.dispatch.choice import launcher, planned, selecting
from vlattn_fast.dispatch.operator import Operator
from vlattn_fast.dispatch.table import table
from vlattn_fast.ops._derivatives import Derivatives
from vlattn_fast.ops._documents import Ids, over_documents
from vlattn_fast.ops.relevancy_attention import check_carried

BACKENDS = table(streaming, cpu=cpu)


def recurrent_step(
    relevancy: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    grad_output: Tensor | None = None,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    diagonal: Tensor | None = None,
    rule: str = "gradient",
    row_normalize: bool = False,
    document_ids: Ids = None,
    cu_seqlens: Ids = None,
    backend: str = "auto",
) -> Tensor:
    """Computes relevancy @ Abar through a linear recurrence: (B, T, N) -> (B, T, N). relevancy_step does the same for attention.

    Supports the gated delta rule (Qwen3-Next, Kimi), Mamba, RetNet, lightning attention and RWKV. Memory is O(N) and time O(N^2);
    the backward pass computes the map again, a tile at a time.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> query, key = torch.randn(2, 1, 2, 64, 8).softmax(-1)
        >>> value, grad_output = torch.randn(2, 1, 4, 64, 16)
        >>> gates = {"log_decay": -torch.rand(1, 4, 64), "beta": torch.rand(1, 4, 64)}
        >>> va.recurrent_step(torch.rand(1, 3, 64), query, key, value, grad_output, **gates).shape
        torch.Size([1, 3, 64])

    With its queries, keys and gates held fixed, a recurrence is a map of values, o_t = sum_{s <= t} A_ts v_s, with one number
    A_ts per head: `vlattn_fast.reference.recurrent_map`. With a_t = exp(log_decay_t) its state is

            S_t = diag(a_t) S_{t-1} + k_t v_t^T                    without beta: Mamba, RetNet, lightning attention, RWKV-4
            S_t = (I - beta_t k_t k_t^T) diag(a_t) S_{t-1} + beta_t k_t v_t^T      with beta: the gated delta rule
            o_t = S_t^T q_t + d_t v_t

    Abar = mean_h relu(A * dA) with dA_ts = grad_output_t . v_s, or for rule "attention" the mean over the heads of |A|, each row
    divided by its sum, since A has signs and rows of any sum.

    Args:
        relevancy: (B, T, N) floating point.
        query, key: (B, Hq, N, Dk) and (B, Hk, N, Dk), as they enter the recurrence: scaled and normalised. Hq and Hk divide H.
        value: (B, H, N, Dv), needed for rule "gradient".
        grad_output: (B, H, N, Dv), the gradient of the recurrence's output, needed for rule "gradient".
        log_decay: (B, H, N), or (B, H, N, Dk) for a gate per key feature; -inf forgets. Default: 0, no decay.
        beta: (B, H, N). Default: no delta rule. A token has no influence if its beta is 0 (without the delta rule, if its key is
            0).
        diagonal: (B, H, N), the d_t above. Default: 0.
        rule: "gradient" or "attention".
        document_ids, cu_seqlens: see score_attention; one for all tokens, no pair.
        row_normalize: divide each row of Abar by its sum; zero rows stay zero.
        backend: "auto", "reference", "streaming" or "cpu". "cpu" uses the backward pass of "streaming".

    Returns:
        (B, T, N) in relevancy's dtype, twice differentiable in every floating tensor, also in forward mode. Gates may have
        another floating dtype than query. Sums are in float32, in float64 for float64.

    Raises:
        ValueError, TypeError: if an argument is wrong (the message names it), or the requested backend does not support the call.

    Reference: the map is that of Zimerman, Ali, Wolf, ICLR 2025, section 3; its extension to the delta rule is our reading.
    """
    if document_ids is not None or cu_seqlens is not None or getattr(query, "is_nested", False):
        return over_documents(recurrent_step, locals(), ["btq"])
    gates = log_decay, beta, diagonal
    backend = planned(_backend, backend, relevancy, query, key, value, grad_output, *gates, rule, row_normalize)
    if rule == "attention":  # which uses neither
        value = grad_output = None
    query, key, value, grad_output = cast_by_autocast(query, key, value, grad_output)
    tensors = relevancy, query, key, value, grad_output
    if backend == "reference":
        options: dict[str, Any] = {"log_decay": log_decay, "beta": beta, "diagonal": diagonal, "rule": rule}
        with without_autocast(query):
            return reference.recurrent_step(*tensors, row_normalize=row_normalize, **options)
    num_heads = heads_of(query, key, value, *gates)
    return _derivatives.forward(RecurrentStepInputs(*tensors, *gates, num_heads, rule, row_normalize, backend))


def _describe(
    relevancy: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    grad_output: Tensor | None,
    log_decay: Tensor | None,
    beta: Tensor | None,
    diagonal: Tensor | None,
    rule: str,
    row_normalize: bool,
) -> CallShape:
    """Checks a call, and returns its metadata."""
    check_choice("rule", rule, RULES)
    check_bool(row_normalize=row_normalize)
    check_tensor("query", query, rank=4, shape="(B, Hq, N, Dk)")
    check_tensor("key", key, rank=4, shape="(B, Hk, N, Dk)")
    values = _not_none(value=value, grad_output=grad_output)
    for name, each in values.items():
        check_tensor(name, each, rank=4, shape="(B, H, N, Dv)")
    check_floating(query=query, key=key, **values)
    if rule == "gradient" and len(values) < 2:
        raise ValueError("value and grad_output must be given for rule='gradient'; got None")
    gates = _not_none(log_decay=log_decay, beta=beta, diagonal=diagonal)
    _check_gates(gates, query)
    _check_sizes(query, key, {**values, **gates})
    if value is not None and grad_output is not None and value.shape != grad_output.shape:
        raise ValueError(f"grad_output must have value's shape {tuple(value.shape)}; got {describe(grad_output)}")
    check_carried("relevancy", relevancy, query)
    value_dim, (_, _, length, head_dim) = 0 if value is None else value.shape[3], query.shape
    sizes = {"queries": length, "head_dim": head_dim, "value_dim": value_dim, "rows": relevancy.shape[1]}
    return call_shape("recurrent_step", query, sizes, {"rule": rule, "row_normalize": row_normalize})


_backend = selecting(BACKENDS, _describe)


def _not_none(**named: Tensor | None) -> dict[str, Tensor]:
    return {name: each for name, each in named.items() if each is not None}


def _check_gates(gates: dict[str, Tensor], query: Tensor) -> None:
    for name, gate in gates.items():
        check_tensor(name, gate)
        check_device(name, gate, "query", query)
        if gate.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name} must be floating point; got {describe(gate)}")
        is_decay = name == "log_decay"
        if gate.dim() != 3 and not (is_decay and gate.dim() == 4):
            raise ValueError(f"{name} must have shape (B, H, N){' or (B, H, N, Dk)' * is_decay}; got {describe(gate)}")
        if gate.dim() == 4 and gate.shape[3] != query.shape[3]:
            raise ValueError(f"{name} must have a number for each of the {query.shape[3]} key features; got {describe(gate)}")


def _check_sizes(query: Tensor, key: Tensor, others: dict[str, Tensor]) -> None:
    """Raises unless key fits query, and `others` have (B, H, N) with H divisible by the heads of query and key."""
    check_head_dim(query, key)
    batch, _, length, _ = query.shape
    if key.shape[0] != batch or key.shape[2] != length:
        raise ValueError(f"key must have query's batch size {batch} and length {length}; got {describe(key)}")
    num_heads = heads_of(query, key, *others.values())
    for name, tensor in (("query", query), ("key", key)):
        heads = tensor.shape[1]
        if heads != num_heads and (heads == 0 or num_heads % heads):
            raise ValueError(f"{name}'s number of heads must divide the call's {num_heads}; got {describe(tensor)}")
    for name, tensor in others.items():
        if tuple(tensor.shape[:3]) != (batch, num_heads, length):
            raise ValueError(f"{name} must begin with the sizes (B, H, N) = {(batch, num_heads, length)}; got {describe(tensor)}")


def _forward_fake(inputs: RecurrentStepInputs) -> Tensor:
    return inputs.relevancy.new_empty(inputs.relevancy.shape)


def _gradients(of_streaming: Callable[..., Any]) -> Callable[[Any], tuple[Tensor | None, ...]]:
    """As `launcher`, in the layout of `as_outputs`."""
    run = launcher(BACKENDS, of_streaming)
    return lambda inputs: as_outputs(run(inputs))


def _backward_fake(x: RecurrentStepBackwardInputs) -> tuple[Tensor | None, ...]:
    pair = (x.value, x.grad_output) if x.rule == "gradient" else (None, None)
    inputs = (x.query, x.key, *pair, x.log_decay, x.beta, x.diagonal) if x.need_inputs else (None,) * 7
    return as_fake_outputs((x.relevancy if x.need_relevancy else None, *inputs))


_derivatives = Derivatives(
    "recurrent_step",
    (RecurrentStepInputs, RecurrentStepBackwardInputs),
    DIFFERENTIABLE,
    outputs=("result",),
    grads={"grad": "result"},
    passes=(
        launcher(BACKENDS, streaming.forward),
        *[_gradients(each) for each in (streaming.backward, streaming.jvp, streaming.second)],
    ),
    fake=_forward_fake,
    fake_backward=_backward_fake,
    needs={"need_relevancy": DIFFERENTIABLE[:1], "need_inputs": DIFFERENTIABLE[1:]},
)

OPERATOR = Operator(recurrent_step, _describe, BACKENDS)
