"""stacked_cross_attention by csrc/cpu/stacked_cross_attention.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import unit_stride
from vlattn_fast.backends.inputs import StackedCrossAttentionBackwardInputs, StackedCrossAttentionInputs
from vlattn_fast.backends.native import DTYPES, Fields, kernel
from vlattn_fast.backends.reference.stacked_cross_attention import split_norm

_SETS = Fields("pointer data, integer count rows stride_set stride_row, pointer lengths")
_FIELDS = Fields(
    "integer dtype D norm clips aggregation, number smooth lambda_lse, sets query context, pointer similarity grad_similarity, "
    "integer stride_y stride_x, pointer grad_query grad_context",
    sets=_SETS,
)
_run_forward = kernel("stacked_cross_attention_forward", _FIELDS)
_run_backward = kernel("stacked_cross_attention_backward", _FIELDS)
_NORMS = {None: 0, "softmax": 1, "l2norm": 2, "l1norm": 3}  # Norm of the kernel
_AGGREGATIONS = ("logsumexp", "max", "sum", "mean")  # Aggregation of the kernel


def forward(inputs: StackedCrossAttentionInputs) -> Tensor:
    """similarity (Bi, Bc). Padding may hold anything."""
    images, captions = inputs.images, inputs.captions
    similarity = images.new_empty(images.shape[0], captions.shape[0], dtype=torch.float32)
    _call(_run_forward, inputs, similarity, (None, None), similarity=similarity)
    return similarity


def backward(inputs: StackedCrossAttentionBackwardInputs) -> tuple[Tensor, Tensor]:
    """Gradients of images and captions."""
    images, captions = inputs.images, inputs.captions
    grads = images.new_empty(*images.shape), captions.new_empty(*captions.shape)
    grad_similarity = inputs.grad_similarity.float()
    _call(_run_backward, inputs, grad_similarity, grads, grad_similarity=grad_similarity)
    return grads


def _call(
    run: Any,
    inputs: StackedCrossAttentionInputs | StackedCrossAttentionBackwardInputs,
    pairs: Tensor,
    grads: tuple[Tensor | None, Tensor | None],
    **named: Any,
) -> None:
    """Runs the kernel, for which the side that asks comes first. pairs (Bi, Bc); grads: of images and captions."""
    clips, norm = split_norm(inputs.first_norm)
    tensors, lengths = (inputs.images, inputs.captions), (inputs.image_lengths, inputs.caption_lengths)
    # kept until the call is over
    kept = [(unit_stride(x), None if n is None else n.contiguous()) for x, n in zip(tensors, lengths, strict=True)]
    sides = list(zip((_set(*one) for one in kept), pairs.stride(), grads, strict=True))
    if inputs.direction == "t2i":  # the captions ask
        sides.reverse()
    (query, stride_y, grad_query), (context, stride_x, grad_context) = sides
    aggregation = {"aggregation": _AGGREGATIONS.index(inputs.aggregation), "lambda_lse": inputs.lambda_lse}
    how = {"norm": _NORMS[norm], "clips": clips, "smooth": inputs.smooth, **aggregation}
    named |= {"stride_y": stride_y, "stride_x": stride_x, "grad_query": grad_query, "grad_context": grad_context}
    run(dtype=DTYPES[inputs.images.dtype], D=inputs.images.shape[2], **how, query=query, context=context, **named)


def _set(x: Tensor, lengths: Tensor | None) -> tuple[Any, ...]:
    (count, rows, _), (stride_set, stride_row, _) = x.shape, x.stride()
    return _SETS.values(data=x, count=count, rows=rows, stride_set=stride_set, stride_row=stride_row, lengths=lengths)
