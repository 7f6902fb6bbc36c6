"""maxsim by csrc/cpu/maxsim.cpp."""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import unit_stride
from vlattn_fast.backends.inputs import MaxsimBackwardInputs, MaxsimInputs
from vlattn_fast.backends.native import DTYPES, Struct, address, each, kernel


class Tokens(Struct):
    __slots__ = ()
    _fields_ = (("data", c_void_p), *each(c_int64, "count tokens stride_set stride_token"), ("mask", c_void_p))


class Maxsim(Struct):
    __slots__ = ()
    _fields_ = (
        *each(c_int64, "dtype D"),
        *each(Tokens, "query document"),
        *each(c_void_p, "similarity places grad_similarity grad_query grad_document"),
    )


_forward = kernel("maxsim_forward", Maxsim)
_backward = kernel("maxsim_backward", Maxsim)


def forward(inputs: MaxsimInputs) -> tuple[Tensor, Tensor]:
    """Returns similarity (A, B), and the indices of the largest products, int32 (A, B, N), if the backward pass needs them."""
    queries, documents = unit_stride(inputs.queries), unit_stride(inputs.documents)
    pairs = queries.shape[0], documents.shape[0]
    similarity = queries.new_empty(pairs, dtype=torch.float32)
    places = queries.new_empty((*pairs, queries.shape[1]) if inputs.saves else 0, dtype=torch.int32)
    masks = [None if mask is None else mask.contiguous() for mask in (inputs.query_mask, inputs.document_mask)]
    call = _call(queries, documents, *masks)
    call.similarity, call.places = address(similarity), address(places if inputs.saves else None)
    _forward(call)
    return similarity, places


def backward(inputs: MaxsimBackwardInputs) -> tuple[Tensor, Tensor]:
    """Gradients of queries and documents."""
    queries, documents = unit_stride(inputs.queries), unit_stride(inputs.documents)
    grads = queries.new_empty(*queries.shape), documents.new_empty(*documents.shape)
    grad, places = inputs.grad_similarity.to(torch.float32).contiguous(), inputs.places.contiguous()
    call = _call(queries, documents)
    call.places, call.grad_similarity = address(places), address(grad)
    call.grad_query, call.grad_document = map(address, grads)
    _backward(call)
    return grads


def _call(queries: Tensor, documents: Tensor, query_mask: Tensor | None = None, document_mask: Tensor | None = None) -> Maxsim:
    sides = {"query": _tokens(queries, query_mask), "document": _tokens(documents, document_mask)}
    return Maxsim(dtype=DTYPES[queries.dtype], D=queries.shape[2], **sides)


def _tokens(x: Tensor, mask: Tensor | None) -> Tokens:
    (count, tokens, _), (stride_set, stride_token, _) = x.shape, x.stride()
    sizes = {"count": count, "tokens": tokens, "stride_set": stride_set, "stride_token": stride_token}
    return Tokens(data=address(x), **sizes, mask=address(mask))
