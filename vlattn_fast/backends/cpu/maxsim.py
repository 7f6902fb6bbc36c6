"""maxsim by csrc/cpu/maxsim.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import unit_stride
from vlattn_fast.backends.inputs import MaxsimBackwardInputs, MaxsimInputs
from vlattn_fast.backends.native import DTYPES, address, kernel, part

_forward, _backward = kernel("maxsim_forward"), kernel("maxsim_backward")
_struct = part("maxsim_forward", "query")


def forward(inputs: MaxsimInputs) -> tuple[Tensor, Tensor]:
    """Returns similarity (A, B), and the indices of the largest products, int32 (A, B, N), if the backward pass needs them."""
    queries, documents = unit_stride(inputs.queries), unit_stride(inputs.documents)
    pairs = queries.shape[0], documents.shape[0]
    similarity = queries.new_empty(pairs, dtype=torch.float32)
    places = queries.new_empty((*pairs, queries.shape[1]) if inputs.saves else 0, dtype=torch.int32)
    masks = [None if mask is None else mask.contiguous() for mask in (inputs.query_mask, inputs.document_mask)]
    _forward(
        dtype=DTYPES[queries.dtype],
        D=queries.shape[2],
        query=_tokens(queries, masks[0]),
        document=_tokens(documents, masks[1]),
        similarity=address(similarity),
        places=address(places if inputs.saves else None),
    )
    return similarity, places


def backward(inputs: MaxsimBackwardInputs) -> tuple[Tensor, Tensor]:
    """Gradients of queries and documents."""
    queries, documents = unit_stride(inputs.queries), unit_stride(inputs.documents)
    grads = queries.new_empty(*queries.shape), documents.new_empty(*documents.shape)
    grad, places = inputs.grad_similarity.to(torch.float32).contiguous(), inputs.places.contiguous()
    _backward(
        dtype=DTYPES[queries.dtype],
        D=queries.shape[2],
        query=_tokens(queries, None),
        document=_tokens(documents, None),
        places=address(places),
        grad_similarity=address(grad),
        grad_query=address(grads[0]),
        grad_document=address(grads[1]),
    )
    return grads


def _tokens(x: Tensor, mask: Tensor | None) -> Any:
    (count, tokens, _), (stride_set, stride_token, _) = x.shape, x.stride()
    sizes = {"count": count, "tokens": tokens, "stride_set": stride_set, "stride_token": stride_token}
    return _struct()(data=address(x), **sizes, mask=address(mask))
