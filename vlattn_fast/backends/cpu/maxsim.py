"""maxsim by csrc/cpu/maxsim.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import unit_stride
from vlattn_fast.backends.inputs import MaxsimBackwardInputs, MaxsimInputs
from vlattn_fast.backends.native import DTYPES, Fields, kernel

_TOKENS = Fields("pointer data, integer count tokens stride_set stride_token, pointer mask")
_FIELDS = Fields(
    "integer dtype D, tokens query document, pointer similarity places grad_similarity grad_query grad_document", tokens=_TOKENS
)
_forward = kernel("maxsim_forward", _FIELDS)
_backward = kernel("maxsim_backward", _FIELDS)


def forward(inputs: MaxsimInputs) -> tuple[Tensor, Tensor]:
    """similarity (A, B), and the places of the largest products, int32 (A, B, N), where the backward pass needs them."""
    queries, documents = unit_stride(inputs.queries), unit_stride(inputs.documents)
    pairs = queries.shape[0], documents.shape[0]
    similarity = queries.new_empty(pairs, dtype=torch.float32)
    places = queries.new_empty((*pairs, queries.shape[1]) if inputs.saves else 0, dtype=torch.int32)
    masks = [None if mask is None else mask.contiguous() for mask in (inputs.query_mask, inputs.document_mask)]
    sides = {"query": _tokens(queries, masks[0]), "document": _tokens(documents, masks[1])}
    how = {"dtype": DTYPES[queries.dtype], "D": queries.shape[2], **sides}
    _forward(**how, similarity=similarity, places=places if inputs.saves else None)
    return similarity, places


def backward(inputs: MaxsimBackwardInputs) -> tuple[Tensor, Tensor]:
    """Gradients of queries and documents."""
    queries, documents = unit_stride(inputs.queries), unit_stride(inputs.documents)
    grads = queries.new_empty(*queries.shape), documents.new_empty(*documents.shape)
    sides = {"query": _tokens(queries, None), "document": _tokens(documents, None)}
    how = {"dtype": DTYPES[queries.dtype], "D": queries.shape[2], **sides}
    grad, places = inputs.grad_similarity.to(torch.float32).contiguous(), inputs.places.contiguous()
    _backward(**how, places=places, grad_similarity=grad, grad_query=grads[0], grad_document=grads[1])
    return grads


def _tokens(x: Tensor, mask: Tensor | None) -> tuple[Any, ...]:
    (count, tokens, _), (stride_set, stride_token, _) = x.shape, x.stride()
    return _TOKENS.values(data=x, count=count, tokens=tokens, stride_set=stride_set, stride_token=stride_token, mask=mask)
