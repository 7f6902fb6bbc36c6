"""MaxSim, or late interaction: the similarity of every query with every document (ColBERT, ColPali).

Formula: reference/maxsim.py. Bounded memory: streaming/maxsim.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast import kernels
from vlattn_fast._ground.checks import check_device, check_floating, check_tensor, describe, is_differentiated
from vlattn_fast._ground.tensors import cast_by_autocast, compute_dtype, real_tokens, without_autocast
from vlattn_fast.backends import reference
from vlattn_fast.backends.cpu import maxsim as cpu
from vlattn_fast.backends.inputs import MaxsimBackwardInputs, MaxsimInputs
from vlattn_fast.backends.streaming import maxsim as streaming
from vlattn_fast.dispatch.call import CallShape, call_shape
from vlattn_fast.dispatch.choice import launcher, load, planned, selecting
from vlattn_fast.dispatch.operator import Operator
from vlattn_fast.dispatch.table import table
from vlattn_fast.ops._derivatives import Derivatives

BACKENDS = table(streaming, cpu=cpu, triton=lambda: kernels.maxsim)


def maxsim(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Computes late interaction of every query with every document: sum_i max_j q_i . d_j over real tokens.

    Returns one similarity per pair. The products (A, B, N, M) are never stored; if a gradient is needed, the forward pass stores
    the index of each largest product, one int32 per pair and query token.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> queries, documents = torch.randn(3, 8, 16), torch.randn(5, 40, 16)
        >>> va.maxsim(queries, documents).shape
        torch.Size([3, 5])

    Args:
        queries: (A, N, D) token embeddings, which the papers normalise before the call; float16, bfloat16, float32, float64.
        documents: (B, M, D) of the same dtype.
        query_mask, document_mask: bool (A, N) and (B, M), True = a real token. Default: all are real. Other tokens have no
            influence and gradient 0, even if they are NaN.
        backend: "auto", "reference", "streaming", "cpu" or "triton".

    Returns:
        similarity (A, B) in the inputs' dtype, in float32 for float16 and bfloat16. A pair with an empty side gives 0 and zero
        gradients. Twice differentiable, in both; the gradient of a maximum goes to the first token that has it.

    Raises:
        ValueError, TypeError: if an argument is wrong (the message names it), or the requested backend does not support the call.

    References: Khattab and Zaharia, "ColBERT", SIGIR 2020, eq. 3; Faysse et al., "ColPali", ICLR 2025, eq. 1, with image patches
    as a document's tokens.
    """
    backend = planned(_backend, backend, queries, documents, query_mask, document_mask)
    queries, documents = cast_by_autocast(queries, documents)
    if backend == "reference":
        with without_autocast(queries):
            return reference.maxsim(queries, documents, query_mask, document_mask)
    if not BACKENDS[backend].masks_padding:
        queries, documents = real_tokens(queries, query_mask), real_tokens(documents, document_mask)
    saves = is_differentiated(queries, documents)
    similarity, _ = _derivatives.forward(MaxsimInputs(queries, documents, query_mask, document_mask, saves, backend))
    return similarity


def _describe(queries: Tensor, documents: Tensor, query_mask: Tensor | None, document_mask: Tensor | None) -> CallShape:
    """Checks a call, and returns its metadata."""
    check_tensor("queries", queries, rank=3, shape="(A, N, D)")
    check_tensor("documents", documents, rank=3, shape="(B, M, D)")
    check_floating(queries=queries, documents=documents)
    check_device("documents", documents, "queries", queries)
    if documents.shape[2] != queries.shape[2]:
        raise ValueError(f"documents must have queries' feature size D = {queries.shape[2]}; got {describe(documents)}")
    for name, mask, tokens_name, tokens in (
        ("query_mask", query_mask, "queries", queries),
        ("document_mask", document_mask, "documents", documents),
    ):
        if mask is not None:
            check_tensor(name, mask, rank=2, shape=f"(B, L) of {tokens_name}")
            if mask.dtype != torch.bool:
                raise TypeError(f"{name} must be bool (True = a real token); got {describe(mask)}")
            if mask.shape != tokens.shape[:2]:
                raise ValueError(f"{name} must have shape {tuple(tokens.shape[:2])}, a flag for each token; got {describe(mask)}")
            check_device(name, mask, tokens_name, tokens)
    (num_queries, query_tokens, features), (num_documents, keys, _) = queries.shape, documents.shape
    sizes = {"queries": num_queries, "tokens": query_tokens, "documents": num_documents, "keys": keys, "head_dim": features}
    return call_shape("maxsim", queries, sizes, {})


_backend = selecting(BACKENDS, _describe)


def _forward(inputs: MaxsimInputs) -> tuple[Tensor, Tensor]:
    similarity, places = load(BACKENDS, inputs.backend).forward(inputs)
    return similarity, places if inputs.saves else inputs.queries.new_empty(0, dtype=torch.int32)


def _forward_fake(inputs: Any) -> tuple[Tensor, Tensor]:
    queries, pairs = inputs.queries, (inputs.queries.shape[0], inputs.documents.shape[0])
    places = (*pairs, queries.shape[1]) if getattr(inputs, "saves", False) else (0,)
    return queries.new_empty(pairs, dtype=compute_dtype(queries)), queries.new_empty(places, dtype=torch.int32)


_derivatives = Derivatives(
    "maxsim",
    (MaxsimInputs, MaxsimBackwardInputs),
    ("queries", "documents"),
    outputs=("similarity", "places"),
    grads={"grad_similarity": "similarity"},
    passes=(_forward, *[launcher(BACKENDS, each) for each in (streaming.backward, streaming.jvp, streaming.second)]),
    fake=_forward_fake,
)

OPERATOR = Operator(maxsim, _describe, BACKENDS)
