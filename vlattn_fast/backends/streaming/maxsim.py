"""maxsim in bounded memory with plain PyTorch: products of a tile of query tokens with one document, or with several short ones.

In addition to inputs and result it stores a maximum and its index, per pair of query and document and per query token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import compute_dtype
from vlattn_fast.backends.inputs import MaxsimBackwardInputs, MaxsimInputs, MaxsimJvpInputs, MaxsimSecondInputs
from vlattn_fast.backends.streaming import _tiles


def forward(inputs: MaxsimInputs) -> tuple[Tensor, Tensor]:
    """Returns similarity (A, B), and the indices of the largest products, int32 (A, B, N). Tokens that are not real are zeros."""
    queries, documents, mask = inputs.queries, inputs.documents, inputs.document_mask
    (num_queries, tokens, _), (num_documents, keys, _) = queries.shape, documents.shape
    dtype = compute_dtype(queries)
    largest = queries.new_zeros(num_queries * tokens, num_documents, dtype=dtype)
    places = queries.new_full((num_queries * tokens if inputs.saves else 0, num_documents), -1, dtype=torch.int32)
    rows = queries.flatten(0, 1)
    most = _tiles.tile_elements(queries)
    step_b = max(1, min(num_documents, most // max(1, keys * min(64, len(rows)))))
    step_i = max(1, most // max(1, keys * step_b))
    for first in range(0, num_documents if keys else 0, step_b):
        b = slice(first, first + step_b)
        columns = documents[b].to(dtype).flatten(0, 1).mT
        for start in range(0, len(rows), step_i):
            i = slice(start, start + step_i)
            scores = (rows[i].to(dtype) @ columns).unflatten(1, (-1, keys))
            if mask is not None:
                scores = torch.where(mask[b], scores, -torch.inf)
            if inputs.saves:
                largest[i, b], where = scores.max(-1)
                places[i, b] = where.to(torch.int32)
            else:  # only a maximum takes a quarter of the time
                largest[i, b] = scores.amax(-1)
    counts = torch.full_like(largest, keys > 0, dtype=torch.bool)
    if mask is not None:
        counts = counts & mask.any(1)
    if inputs.query_mask is not None:
        counts = counts & inputs.query_mask.reshape(-1, 1)
    shape = num_queries, tokens, num_documents
    similarity = torch.where(counts, largest, 0.0).view(shape).sum(1)
    return similarity, torch.where(counts, places, -1).view(shape).mT.contiguous() if inputs.saves else places


def backward(inputs: MaxsimBackwardInputs) -> tuple[Tensor, Tensor]:
    """Gradients of queries and documents: each query token exchanges gradients with one token of each document."""
    queries, documents, places = inputs.queries, inputs.documents, inputs.places
    dtype = compute_dtype(queries)
    grad_q, grad_d = (x.new_zeros(x.shape, dtype=dtype) for x in (queries, documents))
    if documents.shape[1] == 0:
        return grad_q.to(queries.dtype), grad_d.to(queries.dtype)
    for b in range(documents.shape[0]):
        counts, place = (places[:, b] >= 0)[..., None], places[:, b].clamp(min=0).long()
        weight = inputs.grad_similarity[:, b, None, None].to(dtype)
        grad_q += torch.where(counts, weight * documents[b].to(dtype)[place], 0.0)
        grad_d[b].index_add_(0, place.flatten(), torch.where(counts, weight * queries.to(dtype), 0.0).flatten(0, 1))
    return grad_q.to(queries.dtype), grad_d.to(queries.dtype)


def jvp(inputs: MaxsimJvpInputs) -> tuple[Tensor]:
    """The tangent of the similarity. Each query token keeps its tokens of the documents."""
    queries, documents, places = inputs.queries, inputs.documents, inputs.places
    tangent = queries.new_zeros(places.shape[:2], dtype=compute_dtype(queries))
    pairs = (inputs.queries_tangent, documents), (queries, inputs.documents_tangent)
    for q, d in pairs:
        if q is None or d is None or d.shape[1] == 0:
            continue
        for b in range(d.shape[0]):
            counts, place = (places[:, b] >= 0)[..., None], places[:, b].clamp(min=0).long()
            tangent[:, b] += torch.where(counts, q.to(tangent.dtype) * d[b].to(tangent.dtype)[place], 0.0).sum((1, 2))
    return (tangent,)


def second(inputs: MaxsimSecondInputs) -> tuple[Tensor, Tensor]:
    """The second derivative: the similarity is linear in either side, so this is `backward` of the tangents."""
    queries, documents = (
        torch.zeros_like(x) if tangent is None else tangent
        for x, tangent in ((inputs.queries, inputs.queries_tangent), (inputs.documents, inputs.documents_tangent))
    )
    return backward(MaxsimBackwardInputs(inputs.grad_similarity, queries, documents, inputs.places, inputs.backend))
