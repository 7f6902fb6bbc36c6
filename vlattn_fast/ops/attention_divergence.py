"""Divergence of two attentions over the same keys, row by row: distillation, indexers of sparse attention, policies.

Formula: reference/attention_divergence.py. Bounded memory: streaming/attention_divergence.py.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlattn_fast import kernels
from vlattn_fast._ground.checks import (
    check_bool,
    check_choice,
    check_device,
    check_floating,
    check_masks,
    check_number,
    check_tensor,
    describe,
)
from vlattn_fast._ground.tensors import (
    cast_by_autocast,
    compute_dtype,
    mask_padding,
    resolve_scale,
    scaled_dot_default,
    without_autocast,
)
from vlattn_fast.backends import reference
from vlattn_fast.backends.cpu import attention_divergence as cpu
from vlattn_fast.backends.reference.attention_divergence import KINDS
from vlattn_fast.backends.streaming import attention_divergence as streaming
from vlattn_fast.backends.streaming.attention_divergence import (
    FIELDS,
    AttentionDivergenceBackwardInputs,
    AttentionDivergenceInputs,
)
from vlattn_fast.dispatch.call import AttentionArguments, CallShape, call_shape
from vlattn_fast.dispatch.choice import launcher, planned
from vlattn_fast.dispatch.operator import Operator
from vlattn_fast.dispatch.table import table
from vlattn_fast.ops._derivatives import Derivatives
from vlattn_fast.ops._documents import Ids, over_documents
from vlattn_fast.ops._stages import planning


def _triton_limits(call: CallShape) -> list[tuple[str, bool]]:
    return [("Triton kernels take a head_dim of other_query of at most 256", call.sizes["other_dim"] > 256)]


BACKENDS = table(
    streaming,
    cpu=cpu,
    triton=lambda: kernels.attention_divergence,
    limits={"triton": _triton_limits},
    saves={"triton": ("divergence",)},
)


def attention_divergence(
    query: Tensor,
    key: Tensor,
    other_query: Tensor,
    other_key: Tensor,
    *,
    kind: str = "kl",
    beta: float = 0.5,
    head_mean: bool = False,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    other_scale: float | None = None,
    enable_gqa: bool = False,
    document_ids: Ids = None,
    cu_seqlens: Ids = None,
    backend: str = "auto",
) -> Tensor:
    """Computes how far one attention is from another over the same keys, for each query: D_i = sum_j f(A_ij, A'_ij).

    Returns one number per head and query. No map is stored: memory in addition to inputs and output is O(N + M) per head, and the
    backward pass recomputes both maps. A side without a gradient costs nothing there.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> query, key = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8)
        >>> teacher = torch.randn(2, 4, 7, 16), torch.randn(2, 4, 7, 16)
        >>> va.attention_divergence(query, key, *teacher, is_causal=True).shape
        torch.Size([2, 4, 7])
        >>> student = torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)  # of other heads
        >>> va.attention_divergence(*student, *teacher, kind="js", head_mean=True).shape
        torch.Size([2, 1, 7])

    With A = softmax(scale q k^T + mask), A' = softmax(other_scale q' k'^T + mask), or their means over the heads:

    - "kl": sum_j A log(A / A'); "reverse_kl": sum_j A' log(A' / A).
    - "js": beta KL(A || M) + (1 - beta) KL(A' || M), M = beta A + (1 - beta) A' (Lin, 1991; beta 0.5 is Jensen-Shannon).
    - "hellinger": 1 - sum_j sqrt(A A'), the square of Hellinger's distance.
    - "total_variation": sum_j |A - A'| / 2.

    Args:
        query, key: (B, H, N, D) and (B, Hkv, M, D), Hkv = H, or a divisor of H with enable_gqa; float16, bfloat16, float32,
            float64.
        other_query, other_key: (B, H', N, D') and (B, H'kv, M, D') of the same dtype; H' = H unless head_mean.
        kind: "kl", "reverse_kl", "js", "hellinger" or "total_variation".
        beta: between 0 and 1; only for "js".
        head_mean: compares the means of the heads' attention.
        attn_mask, key_mask, is_causal, enable_gqa: of both, as in score_attention; attn_mask broadcasts to (B, H, N, M), and to
            (B, 1, N, M) if H' is not H. Masked pairs count on neither side.
        document_ids, cu_seqlens: see score_attention.
        scale, other_scale: multiply the scores. Default: 1/sqrt(D) and 1/sqrt(D').
        backend: "auto", "reference", "streaming", "cpu" or "triton".

    Returns:
        D (B, H, N), or (B, 1, N) with head_mean, in nats for "kl", "reverse_kl" and "js"; float32 (float64 for float64 input). 0
        for a query without a visible key. Small divergences keep their digits. Twice differentiable in all queries and keys; the
        gradient of "total_variation" is 0 where both weights are equal.

    Raises:
        ValueError, TypeError: if an argument is wrong (the message names it), or the requested backend does not support the call.
    """
    if document_ids is not None or cu_seqlens is not None or getattr(query, "is_nested", False):
        return over_documents(attention_divergence, locals(), ["bhq"])
    x = AttentionArguments(query, key, attn_mask, key_mask, is_causal, scale, enable_gqa, backend=backend)
    plan = planned(_plan, x, other_query, other_key, kind, beta, head_mean)
    query, key, other_query, other_key = cast_by_autocast(query, key, other_query, other_key)
    if plan.backend == "reference":
        options: dict[str, Any] = {"kind": kind, "beta": beta, "head_mean": head_mean, "scale": scale, "other_scale": other_scale}
        masks: dict[str, Any] = {"attn_mask": attn_mask, "key_mask": key_mask, "is_causal": is_causal, "enable_gqa": enable_gqa}
        with without_autocast(query):
            return reference.attention_divergence(query, key, other_query, other_key, **options, **masks)
    key, other_key = mask_padding(key_mask, key, other_key)
    tensors = query, key, other_query, other_key, attn_mask, key_mask
    scales = plan.scale, resolve_scale(other_scale, scaled_dot_default(other_query.shape[3]), "other_scale")
    inputs = AttentionDivergenceInputs(*tensors, kind, float(beta), head_mean, is_causal, *scales, plan.backend)
    divergence: Tensor = _derivatives.forward(inputs)
    return divergence


def _describe(
    x: AttentionArguments, other_query: Tensor, other_key: Tensor, kind: str, beta: float, head_mean: bool
) -> CallShape:
    """Checks a call except for its scales, and returns its metadata."""
    check_kind(kind, beta)
    check_bool(head_mean=head_mean, enable_gqa=x.enable_gqa)
    query, key, other = x.query, x.key, other_query
    tensors = dict(zip(FIELDS, (query, key, other_query, other_key), strict=True))
    for name, tensor in tensors.items():
        check_tensor(name, tensor, rank=4, shape="(B, H, M, D)" if "key" in name else "(B, H, N, D)")
    check_floating(**tensors)
    check_key("key", key, "query", query, x.enable_gqa)
    check_key("other_key", other_key, "other_query", other, x.enable_gqa)
    check_device("other_query", other, "query", query)
    if other.shape[0] != query.shape[0] or other.shape[2] != query.shape[2]:
        raise ValueError(f"other_query must have query's B and N; got {describe(other)} for {describe(query)}")
    if other_key.shape[2] != key.shape[2]:
        raise ValueError(f"other_key must have as many keys as key, {key.shape[2]}; got {describe(other_key)}")
    if other.shape[1] != query.shape[1] and not head_mean:
        raise ValueError(f"other_query must have query's {query.shape[1]} heads unless head_mean=True; got {describe(other)}")
    if head_mean and 0 in (query.shape[1], other.shape[1]):
        raise ValueError(f"query must have at least one head to reduce; got {describe(query)} and {describe(other)}")
    check_masks(query if other.shape[1] == query.shape[1] else query[:, :1], key, x.attn_mask, x.key_mask, x.is_causal)
    sizes = {"queries": query.shape[2], "keys": key.shape[2], "head_dim": query.shape[3], "other_dim": other.shape[3]}
    return call_shape("attention_divergence", query, sizes, {"kind": kind, "head_mean": head_mean})


_plan = planning(BACKENDS, _describe)


def check_kind(kind: Any, beta: Any) -> None:
    check_choice("kind", kind, KINDS)
    check_number("beta", beta)
    if not 0 < beta < 1:
        raise ValueError(f"beta must be between 0 and 1; got {beta!r}")


def check_key(name: str, key: Tensor, of: str, query: Tensor, enable_gqa: bool) -> None:
    check_device(name, key, of, query)
    (batch, heads, _, dim), (key_batch, key_heads, _, key_dim) = query.shape, key.shape
    shares = enable_gqa and key_heads > 0 and heads % key_heads == 0
    if (key_batch, key_dim) != (batch, dim) or not (shares or key_heads == heads):
        how = "a divisor of H heads" if enable_gqa else "H heads (fewer with enable_gqa=True)"
        raise ValueError(f"{name} must have {of}'s B and D, and {how}; got {describe(key)} for {describe(query)}")


def _forward_fake(inputs: Any) -> Tensor:
    query = inputs.query
    return query.new_empty(query.shape[0], 1 if inputs.head_mean else query.shape[1], query.shape[2], dtype=compute_dtype(query))


def _setup_context(ctx: Any, inputs: AttentionDivergenceInputs, output: Tensor) -> None:
    _derivatives.saved.save(ctx, inputs, output if BACKENDS[inputs.backend].saves else None)


_derivatives = Derivatives(
    "attention_divergence",
    (AttentionDivergenceInputs, AttentionDivergenceBackwardInputs),
    FIELDS,
    outputs=("divergence",),
    grads={"grad": "divergence"},
    passes=[launcher(BACKENDS, each) for each in (streaming.forward, streaming.backward, streaming.jvp, streaming.second)],
    fake=_forward_fake,
    needs={"need_own": FIELDS[:2], "need_other": FIELDS[2:]},
    setup_context=_setup_context,
)

OPERATOR = Operator(attention_divergence, _describe, BACKENDS)
