"""maxsim in bounded memory with plain PyTorch: products of a tile of query tokens with one document, or with several short ones.

In addition to inputs and result it stores a maximum and its index, per pair of query and document and per query token.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast._ground.tensors import compute_dtype
from vlattn_fast.backends.inputs import MaxsimBackwardInputs, MaxsimInputs
from vlattn_fast.backends.streaming import _tiles
from vlattn_fast.backends.streaming._forward_mode import Named, gradients, tangents_of


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
    """Gradients of queries and documents."""
    queries, documents, dtype = inputs.queries, inputs.documents, compute_dtype(inputs.queries)
    by_queries, by_documents = (x.new_zeros(x.shape, dtype=dtype) for x in (queries, documents))
    for b in range(documents.shape[0]):
        x = {"queries": queries.to(dtype), "document": documents[b].to(dtype)}
        of_document = gradients(partial(_similarity, inputs.places[:, b]), x, [inputs.grad_similarity[:, b]])
        by_queries += of_document["queries"]
        by_documents[b] = of_document["document"]
    return by_queries.to(queries.dtype), by_documents.to(queries.dtype)


def _similarity(places: Tensor, x: Named) -> list[Tensor]:
    """That of the queries with one document (A), whose token `places` (A, N) each query token keeps; -1 is none."""
    tokens = F.pad(x["document"], (0, 0, 1, 0)).index_select(0, (places + 1).flatten())
    products = (x["queries"] * tokens.view_as(x["queries"])).sum(-1)
    return [torch.where(places >= 0, products, 0.0).sum(1)]


def jvp(inputs: Any) -> tuple[Tensor | None, ...]:
    """The tangent of the similarity. Each query token keeps its tokens of the documents."""

    def similarity(x: MaxsimBackwardInputs) -> list[Tensor]:
        result = x.queries.new_zeros(x.places.shape[:2], dtype=compute_dtype(x.queries))
        for b in range(result.shape[1]):
            tensors = {"queries": x.queries.to(result.dtype), "document": x.documents[b].to(result.dtype)}
            result[:, b] = _similarity(x.places[:, b], tensors)[0]
        return [result]

    return tangents_of(similarity, inputs, MaxsimBackwardInputs, _FIELDS)


def second(inputs: Any) -> tuple[Tensor | None, ...]:
    """The second derivative: the tangents of the gradients of queries and documents."""
    return tangents_of(backward, inputs, MaxsimBackwardInputs, _FIELDS)


_FIELDS = "queries", "documents"
