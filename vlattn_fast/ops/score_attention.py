"""softmax(scale * score(q, k) + mask) v for the score functions of vlattn_fast.scores (Cao et al., COLING 2022, Table 1).

Formula: reference/score_attention.py. O(N) memory: streaming/score_attention.py. Features and core scores: scores/.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlattn_fast import scores
from vlattn_fast._ground.checks import (
    autocasts,
    check_attention,
    check_bool,
    check_number,
    describe,
    is_differentiated,
    is_dtensor,
    is_jit_traced,
    is_transformed,
    varies,
)
from vlattn_fast._ground.tensors import (
    as_dtype,
    as_fake_outputs,
    as_gradient,
    cast_by_autocast,
    cast_finite,
    compute_dtype,
    empty_rows_first,
    mask_padding,
    resolve_scale,
    without_autocast,
)
from vlattn_fast.backends import reference
from vlattn_fast.backends.inputs import Attention, ScoreAttentionBackwardInputs, ScoreAttentionInputs
from vlattn_fast.backends.sdpa import score_attention as sdpa
from vlattn_fast.backends.streaming import score_attention as streaming
from vlattn_fast.dispatch import choice
from vlattn_fast.dispatch.call import AttentionArguments, CallShape, call_shape
from vlattn_fast.dispatch.choice import gradients, launcher, load, planned
from vlattn_fast.dispatch.operator import Operator
from vlattn_fast.dispatch.table import lse_dtype
from vlattn_fast.ops._derivatives import Derivatives
from vlattn_fast.ops._documents import Ids, over_documents
from vlattn_fast.ops._groups import check_head_gate, gated, group_bias_inputs
from vlattn_fast.ops._score_attention_backends import BACKENDS
from vlattn_fast.ops._shards import Local, Shards, over_shards
from vlattn_fast.ops._sinks import lse_with_sink, with_sink
from vlattn_fast.ops._stages import DotPlan, by_formula, check_logits, logit_flags


def _on_shards(call: Callable[..., Any], shards: Shards, x: Local) -> Any:
    if scores.resolve(x["score"]).parameters:
        raise ValueError(f"score must have no parameters if query is a DTensor; got {describe(x['score'])}")
    check_number("dropout_p", x["dropout_p"])
    if x["dropout_p"] != 0:
        raise ValueError(f"dropout_p must be 0 if query is a DTensor, since each process draws its own; got {x['dropout_p']}")
    return call(**x)


_OUTPUTS = ["bhqd", "bhq"]


def score_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score: str | scores.Score = "scaled_dot",
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    softcap: float | None = None,
    sink: Tensor | None = None,
    query_groups: Tensor | None = None,
    key_groups: Tensor | None = None,
    group_bias: Tensor | None = None,
    head_gate: Tensor | None = None,
    document_ids: Ids = None,
    cu_seqlens: Ids = None,
    backend: str = "auto",
) -> Any:
    """Computes attention with any score function: out_i = sum_j softmax_j(scale * score(q_i, k_j) + mask_ij) v_j.

    Returns the output and, if you ask for it, the log-sum-exp. Time is O(N M); memory in addition to inputs and output is
    O(N + M) per head, since no map is stored, and the backward pass recomputes it. Only backend "reference" stores the map.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> query, key, value = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
        >>> additive = va.scores.Additive(torch.randn(8))
        >>> va.score_attention(query, key, value, score=additive).shape
        torch.Size([1, 2, 5, 8])

    Args:
        query: (B, H, N, Dq) float16, bfloat16, float32 or float64.
        key: (B, Hkv, M, Dk). Hkv = H, or a divisor of H with enable_gqa.
        value: (B, Hkv, M, Dv).
        score: "dot", "scaled_dot", "cosine", or an object of vlattn_fast.scores. Its tensors are differentiable.
        attn_mask: bool (True = may attend) or float (added), broadcastable to (B, H, N, M); gets no gradient.
        key_mask: bool (B, M), True = a real token. Masked keys and values have no influence and gradient 0, even if they are NaN.
        is_causal: query i attends to keys j <= i (top left, like SDPA). Masks combine.
        scale: multiplies the finished score, after an activation. Default: 1/sqrt(D) for "scaled_dot", else 1.
        dropout_p: probability in [0, 1) of dropping an attention weight; drawn from torch's generator at each call.
        enable_gqa: query heads share key heads, if Hkv is less than H.
        return_lse: also return the natural log-sum-exp of each query's logits.
        softcap: replaces the scaled score s by softcap * tanh(s / softcap), before the masks. Only for "dot" and "scaled_dot".
        sink: (H,), one more logit in each head's softmax, whose probability goes to no value; differentiable.
        query_groups, key_groups: int64 (N) or (B, N), and (M) or (B, M), the group of each token; -1 = no group, whose pairs get
            no bias. Out-of-range indices raise ValueError on a CPU. On a GPU and in traced code they mean "no group".
        group_bias: (H, Gq, Gk) or (B, H, Gq, Gk) floating point, added to the logits of each pair of groups; -inf masks a pair.
            Its gradient is sum A (dA - sum_j A dA) over the pairs.
        head_gate: (H,) or (B, H), multiplies the output of each head; differentiable.
        document_ids: int64 or int32 (N) or (B, N), for packed sequences: the document of each token, which attends to its own
            only. They must not fall; of other keys than queries, a pair (of queries, of keys). Nested tensors need none.
        cu_seqlens: the same for a batch of 1: int32 (documents + 1), where documents begin, and N; or a pair. Their values are
            read, so on a GPU the call waits for the device unless these lie on the CPU.
        backend: "auto", "reference", "streaming", "sdpa" (torch's own attention), "cpu", "triton" or "cuda".

    Returns:
        out (B, H, N, Dv), or (out, lse) with lse (B, H, N) float32 (float64 for float64 input). A query without a visible key
        gets zeros, lse -inf (or the sink) and zero gradients. Twice differentiable, in reverse and forward mode and by
        torch.func, except with backend "sdpa", since torch's fused kernels have only first gradients.

    Raises:
        ValueError, TypeError: if an argument is wrong (the message names it), or the requested backend does not support the call.

    Reference: Cao et al., COLING 2022, Table 1.
    """
    if document_ids is not None or cu_seqlens is not None or getattr(query, "is_nested", False):
        return over_documents(score_attention, locals(), _OUTPUTS)
    if is_dtensor(query):
        return over_shards(score_attention, locals(), _OUTPUTS, _on_shards)
    groups = query_groups, key_groups, group_bias
    x = AttentionArguments(query, key, attn_mask, key_mask, is_causal, scale, enable_gqa, softcap, sink, *groups, backend)
    plan = planned(_plan, x, value, score, dropout_p, return_lse, head_gate)
    if plan.backend == "reference":
        options = {"value": value, "score": score, "dropout_p": dropout_p, "return_lse": return_lse, "head_gate": head_gate}
        return by_formula(reference.score_attention, x, plan.scale, **options)
    if plan.direct is not None:
        attention = Attention(query, key, None, attn_mask, key_mask, None, None, *plan.direct)
        out, _ = DERIVATIVES.forward(ScoreAttentionInputs(attention, value, None, None, 0.0, plan.backend))
        return out
    features = _features(x, value, score, dropout_p, plan)
    return _finish(x, return_lse, head_gate, plan, features, _run(x, plan, features))


class Plan(NamedTuple):
    """How a call runs. `softcapped`: kind, parameter and scale of the core score with a softcap. `packs`: see `_packs`. `direct`:
    core score and causal flag if the operator takes the tensors of the call as they are and gives its output; else None."""

    backend: str
    masks_padding: bool
    scale: float
    softcapped: tuple[str, float, float] | None
    packs: bool
    direct: tuple[str, float, float, bool] | None


class Features(NamedTuple):
    """The operator's inputs, with the factors of the kernel's products, and what `_finish` needs. `logit`: the sink, (H, 1).
    `packs`: whether the query heads of a key head are queries of one head here."""

    inputs: ScoreAttentionInputs
    logit: Tensor | None
    core: scores.Core
    out_dtype: torch.dtype
    packs: bool


def _checked(x: AttentionArguments, value: Tensor, score: Any, head_gate: Tensor | None) -> scores.Score:
    """Returns the score of a call, whose tensors and options fit it and one another."""
    resolved = scores.resolve(score)
    check_attention(x.query, x.key, x.enable_gqa, value=value)
    check_logits(x)
    check_head_gate(head_gate, x.query)
    if x.softcap is not None and not resolved.is_plain:
        found = f"{x.softcap} for {resolved!r:.80}"
        raise ValueError(f"softcap must be None for scores other than 'dot' and 'scaled_dot'; got {found}")
    resolved.check(x.query, x.key)
    return resolved


def _describe(
    x: AttentionArguments, value: Tensor, score: Any, dropout_p: float, return_lse: bool, head_gate: Tensor | None
) -> CallShape:
    """Checks a call, and returns its metadata."""
    check_bool(return_lse=return_lse)
    check_number("dropout_p", dropout_p, low=0.0, high=1.0, open_high=True)
    score = _checked(x, value, score, head_gate)
    (batch, heads, queries, head_dim), (_, _, keys, key_dim) = x.query.shape, x.key.shape
    features = score.features(head_dim, key_dim)
    sizes = {"batch": batch, "heads": heads, "queries": queries, "keys": keys, "head_dim": head_dim}
    sizes |= {"value_dim": value.shape[3], "features": 0 if features is None else features}
    flags = {
        "score": score.kind,
        "series": features is None,
        "dot_product": score.is_dot_product,
        "dropout": dropout_p > 0.0,
        "return_lse": return_lse,
        **logit_flags(x),
        "attn_mask": x.attn_mask is not None,
        "key_mask": x.key_mask is not None,
        "is_causal": x.is_causal,
        "backward_in_16_bit": _multiplies_16_bits(x.query) and torch.is_grad_enabled(),
        "positive_scale": resolve_scale(x.scale, score.default_scale(head_dim)) > 0.0,
        "varying_scale": x.scale is not None and varies(x.scale),
        "transformed": is_transformed(),
    }
    return call_shape("score_attention", x.query, sizes, flags)


def _multiplies_16_bits(query: Tensor) -> bool:
    return query.dtype.itemsize == 2 or (query.dtype == torch.float32 and autocasts(query))


def _plan(x: AttentionArguments, value: Tensor, score: Any, dropout_p: float, return_lse: bool, head_gate: Tensor | None) -> Plan:
    backend = choice.select(BACKENDS, _describe(x, value, score, dropout_p, return_lse, head_gate), x.backend)
    score, masks_padding, packs = scores.resolve(score), BACKENDS[backend].masks_padding, _packs(x, value)
    scale = score.default_scale(x.query.shape[-1]) if x.scale is None else float(x.scale)
    softcapped = None if x.softcap is None else scores.softcapped(scale, x.softcap)
    direct, tensors = None, (x.sink, x.group_bias, head_gate)  # to compute before the operator, or after it
    computes_more = dropout_p > 0.0 or return_lse or autocasts(x.query) or any([each is not None for each in tensors])
    if score.is_plain and (masks_padding or x.key_mask is None) and not (backend == "sdpa" or packs or computes_more):
        direct = *(("dot", 0.0, scale) if softcapped is None else softcapped), x.is_causal
    return Plan(backend, masks_padding, scale, softcapped, packs, direct)


def _packs(x: AttentionArguments, value: Tensor) -> bool:
    """Returns whether the query heads that share a key head may be treated as more queries of one head, if the features of the
    keys share heads like the keys.

    Few queries, such as a decoder's, do not fill a tile of a kernel, which would load the keys once for each of them.
    """
    shares = value.shape[1] < x.query.shape[1] and 0 < x.query.shape[2] < 16
    alike = x.sink is None and not x.is_causal
    mask = x.attn_mask
    return shares and alike and (mask is None or (mask.shape[-2:-1] == (1,) and mask.shape[-3:-2] in ((), (1,))))


def _features(x: AttentionArguments, value: Tensor, score: str | scores.Score, dropout_p: float, plan: Plan) -> Features:
    score = scores.resolve(score)
    key, value = (x.key, value) if x.key_mask is None else _without_padding(x, value, plan, score)
    core = score.core(x.query, key)
    query, key, vector = core.query, core.key, core.vector
    if autocasts(query):
        query, key, vector, value = cast_by_autocast(query, key, vector, value)
    out_dtype = value.dtype
    logit = None if x.sink is None else as_dtype(x.sink, compute_dtype(query))[:, None]
    if core.keeps_dtype:
        query, key, vector, value = core.query, core.key, core.vector, as_dtype(value, core.query.dtype)
    packs = plan.packs and vector is None and key.shape[1] == value.shape[1]
    row_bias, key_groups = group_bias_inputs(x.query, x.query_groups, x.key_groups, x.group_bias)
    if packs:
        query, row_bias = _packed(query, key), _packed(row_bias, key)
    seed = torch.randint(0, 2**62, (), device=query.device) if dropout_p > 0.0 else None
    sink = None if logit is None else (logit - plan.scale * core.offset).detach()  # for the core score, which lacks the offset
    kind = (core.kind, core.parameter, plan.scale) if plan.softcapped is None else plan.softcapped
    attention = Attention(query, key, vector, x.attn_mask, x.key_mask, row_bias, key_groups, *kind, x.is_causal)
    inputs = ScoreAttentionInputs(attention, value, seed, sink, float(dropout_p), plan.backend)
    return Features(inputs, logit, core, out_dtype, packs)


def _packed(x: Any, key: Tensor) -> Any:
    """The query heads that share a head of the key as queries of one head."""
    return None if x is None else x.unflatten(1, (key.shape[1], -1)).flatten(2, 3)


def _without_padding(x: AttentionArguments, value: Tensor, plan: Plan, score: scores.Score) -> tuple[Tensor, Tensor]:
    """Returns key and value, with neutral values at padding unless the backend's kernels mask it."""
    key = x.key
    if not plan.masks_padding:
        (value,) = mask_padding(x.key_mask, value)
    if not (plan.masks_padding and score.is_plain):  # features of padding would reach parameters
        (key,) = mask_padding(x.key_mask, key, fill=score.masked_key)
    return key, value


Computes = Callable[[ScoreAttentionInputs], tuple[Tensor, Tensor]]


def score_attention_by(operator: Computes, query: Tensor, key: Tensor, value: Tensor, **masks: Any) -> Tensor:
    """Runs `score_attention` of these tensors and masks with another operator, such as one with a backward pass of its own."""
    x, options = AttentionArguments(query, key, **masks), {"value": value, "score": "scaled_dot", "dropout_p": 0.0}
    if is_dtensor(query):
        by_operator = functools.partial(score_attention_by, operator)
        shared: Tensor = over_shards(by_operator, x._asdict() | options, _OUTPUTS, _on_shards)
        return shared
    plan = planned(_plan, x, value, "scaled_dot", 0.0, False, None)
    features = _features(x, value, "scaled_dot", 0.0, plan)
    output: Tensor = _finish(x, False, None, plan, features, _run(x, plan, features, operator))
    return output


def _run(x: AttentionArguments, plan: Plan, features: Features, operator: Computes | None = None) -> tuple[Tensor, Any]:
    """Returns out and lse; torch's own attention has no lse."""
    inputs = features.inputs
    if plan.backend == "sdpa":
        with without_autocast(inputs.value):  # casts are done, and features of a series stay float32
            return sdpa.attention(inputs.attention, inputs.value), None
    out, lse = DERIVATIVES.forward(inputs) if operator is None else operator(inputs)
    return out, lse


def _finish(
    x: AttentionArguments, return_lse: bool, head_gate: Tensor | None, plan: Plan, features: Features, rows: tuple[Tensor, Any]
) -> Any:
    (out, lse), offset, logit = rows, features.core.offset, features.logit
    if features.packs:
        queries = -1, x.query.shape[2]
        out = out.unflatten(2, queries).flatten(1, 2)
        lse = None if lse is None else lse.unflatten(2, queries).flatten(1, 2)
    if (logit is not None or return_lse) and (isinstance(offset, Tensor) or offset != 0.0):
        lse = torch.where(torch.isneginf(lse), lse, lse + plan.scale * offset)  # no gradient from a row without keys
    if logit is not None:  # after the offset: as part of the sink it would have a gradient of 1 minus the keys' share of 1
        out, lse = with_sink(out, lse, logit), lse_with_sink(lse, logit)
    out = as_dtype(out, features.out_dtype)
    out = out if head_gate is None else gated(out, head_gate)
    if logit is None and isinstance(offset, Tensor) and (offset.requires_grad or is_jit_traced()):
        # the offset cancels in the softmax: its gradient is zero, not None (a product with 0 would give NaN for Inf)
        never = torch.zeros((), dtype=torch.bool, device=out.device)
        out = out + torch.where(never, offset.sum(), 0.0).to(out.dtype)
    if not return_lse:
        return out
    is_wide = x.attn_mask is not None and x.attn_mask.dtype == torch.float64  # only then may a finite lse exceed float32
    return out, (cast_finite if is_wide else as_dtype)(lse, compute_dtype(out))


def lse_of(query: Tensor, key: Tensor, **options: Any) -> Tensor:
    """Returns only the log-sum-exp (B, H, N), of a "dot" score with the scale among the options."""
    _, lse = score_attention(query, key, key[..., :1], score="dot", return_lse=True, **options)
    return lse


def attention_lse(x: AttentionArguments, plan: DotPlan, sink: Tensor | None = None) -> Tensor:
    """Returns the log-sum-exp (B, H, N) of the attention of another operator's call, with this sink."""
    return attention_with_lse(x._replace(sink=sink), plan, x.key[..., :1])[1]


def attention_with_lse(x: AttentionArguments, plan: DotPlan, value: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the output (B, H, N, Dv) of these values, and the log-sum-exp, of the attention of another operator's call."""
    options = x._asdict() | {"scale": plan.scale, "backend": plan.backend}
    if x.group_bias is None:  # which the groups of keys of attention_statistics need not have
        del options["key_groups"]
    out: tuple[Tensor, Tensor] = score_attention(value=value, score="dot", return_lse=True, **options)
    return out


def lse_for_sink(x: AttentionArguments, lse: Tensor | None, plan: DotPlan) -> Tensor | None:
    """Returns the caller's log-sum-exp, or a new one if a sink needs it: for its value, or for its gradient."""
    sink = x.sink
    if sink is None or (lse is not None and (lse.requires_grad or not is_differentiated(sink))):
        return lse
    return attention_lse(x, plan, sink)


def _forward_fake(inputs: ScoreAttentionInputs) -> tuple[Tensor, Tensor]:
    query = inputs.attention.query
    out = empty_rows_first(query, query.shape[1], query.shape[2], inputs.value.shape[3])
    return out, query.new_empty(query.shape[:3], dtype=lse_dtype(BACKENDS[inputs.backend], query))


def _backward(inputs: ScoreAttentionBackwardInputs) -> tuple[Tensor | None, ...]:
    x, value = inputs.attention, inputs.value
    if x.query.shape[1] == 0:  # no kernel handles keys that no query head shares
        grad_q, grad_k, grad_v = (torch.zeros_like(each) for each in (x.query, x.key, value))
        grad_vector, grad_row_bias = (None if each is None else torch.zeros_like(each) for each in (x.vector, x.row_bias))
    else:
        grad_q, grad_k, grad_v, grad_vector, grad_row_bias = load(BACKENDS, inputs.backend).backward(inputs)
    grads = as_gradient(grad_q, x.query), as_gradient(grad_k, x.key), as_gradient(grad_v, value)
    return *grads, grad_vector, grad_row_bias


def _backward_fake(inputs: ScoreAttentionBackwardInputs) -> tuple[Tensor | None, ...]:
    x = inputs.attention
    grads = [empty_rows_first(each, *each.shape[1:]) for each in (x.query, x.key, inputs.value)]
    return *grads, *as_fake_outputs((x.vector, x.row_bias))


def _of_kind(of_streaming: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    """Like `gradients`; kernels take dot products, and streaming any score."""
    run = gradients(BACKENDS, of_streaming)
    return lambda inputs: run(inputs if inputs.attention.score == "dot" else inputs._replace(backend="streaming"))


_run_jvp, _run_second = _of_kind(streaming.jvp), _of_kind(streaming.second)


def _tangents(inputs: Any) -> dict[str, Tensor]:
    """Zeros for the tangents that kernels take, where they are None."""
    of = {"query": inputs.attention.query, "key": inputs.attention.key, "value": inputs.value}
    missing = {f"{field}_tangent": x for field, x in of.items() if getattr(inputs, f"{field}_tangent") is None}
    return {field: torch.zeros_like(x) for field, x in missing.items()}


def _jvp(inputs: Any) -> tuple[Tensor, Tensor]:
    out, lse = _run_jvp(inputs._replace(**_tangents(inputs)))
    return out, as_dtype(lse, inputs.lse.dtype)


def _second(inputs: Any) -> tuple[Tensor | None, ...]:
    empty = torch.isneginf(inputs.lse)  # rows without a key, which have no gradient even of NaN
    rows = (
        ("grad_out", empty[..., None]),
        ("grad_out_tangent", empty[..., None]),
        ("grad_lse", empty),
        ("grad_lse_tangent", empty),
    )
    incoming = {name: (x, where) for name, where in rows if (x := getattr(inputs, name)) is not None}
    grads = {name: torch.where(where, 0.0, x) for name, (x, where) in incoming.items()}
    out, lse, *by_fields = _run_second(inputs._replace(**_tangents(inputs), **grads))
    return out, None if lse is None else as_dtype(lse, inputs.lse.dtype), *by_fields


DERIVATIVES = Derivatives(
    "score_attention",
    (ScoreAttentionInputs, ScoreAttentionBackwardInputs),
    ("query", "key", "value", "vector", "row_bias"),
    outputs=("out", "lse"),
    grads={"grad_out": "out", "grad_lse": "lse"},
    passes=(launcher(BACKENDS, streaming.forward), _backward, _jvp, _second),
    fake=_forward_fake,
    fake_backward=_backward_fake,
    one_sweep=True,
)

OPERATOR = Operator(score_attention, _describe, BACKENDS)
