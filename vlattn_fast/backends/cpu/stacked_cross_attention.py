"""stacked_cross_attention by csrc/cpu/stacked_cross_attention.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import unit_stride
from vlattn_fast.backends.inputs import StackedCrossAttentionBackwardInputs, StackedCrossAttentionInputs
from vlattn_fast.backends.native import DTYPES, address, kernel, part
from vlattn_fast.backends.reference.stacked_cross_attention import split_norm

_run_forward, _run_backward = kernel("stacked_cross_attention_forward"), kernel("stacked_cross_attention_backward")
_struct = part("stacked_cross_attention_forward", "query")
_NORMS = {None: 0, "softmax": 1, "l2norm": 2, "l1norm": 3}  # Norm of the kernel
_AGGREGATIONS = ("logsumexp", "max", "sum", "mean")  # Aggregation of the kernel


def forward(inputs: StackedCrossAttentionInputs) -> Tensor:
    """similarity (Bi, Bc). Padding may hold anything."""
    images, captions = inputs.images, inputs.captions
    similarity = images.new_empty(images.shape[0], captions.shape[0], dtype=torch.float32)
    _call(_run_forward, inputs, similarity, (None, None), similarity=address(similarity))
    return similarity


def backward(inputs: StackedCrossAttentionBackwardInputs) -> tuple[Tensor, Tensor]:
    """Gradients of images and captions."""
    images, captions = inputs.images, inputs.captions
    grads = images.new_empty(*images.shape), captions.new_empty(*captions.shape)
    grad_similarity = inputs.grad_similarity.float()
    _call(_run_backward, inputs, grad_similarity, grads, grad_similarity=address(grad_similarity))
    return grads


def _call(
    run: Any,
    inputs: StackedCrossAttentionInputs | StackedCrossAttentionBackwardInputs,
    pairs: Tensor,
    grads: tuple[Tensor | None, Tensor | None],
    **pair_members: Any,
) -> None:
    """Runs the kernel, for which the side that asks comes first. pairs (Bi, Bc); grads: of images and captions. pair_members: the
    member that has their address."""
    clips, norm = split_norm(inputs.first_norm)
    tensors, lengths = (inputs.images, inputs.captions), (inputs.image_lengths, inputs.caption_lengths)
    # must live until the call is over
    tensors_and_lengths = [(unit_stride(x), None if n is None else n.contiguous()) for x, n in zip(tensors, lengths, strict=True)]
    sides = list(zip((_set(*one) for one in tensors_and_lengths), pairs.stride(), grads, strict=True))
    if inputs.direction == "t2i":  # the captions ask
        sides.reverse()
    (query, stride_y, grad_query), (context, stride_x, grad_context) = sides
    run(
        dtype=DTYPES[inputs.images.dtype],
        D=inputs.images.shape[2] - inputs.features,
        F=inputs.features,
        norm=_NORMS[norm],
        clips=clips,
        aggregation=_AGGREGATIONS.index(inputs.aggregation),
        smooth=inputs.smooth,
        lambda_lse=inputs.lambda_lse,
        query=query,
        context=context,
        stride_y=stride_y,
        stride_x=stride_x,
        grad_query=address(grad_query),
        grad_context=address(grad_context),
        **pair_members,
    )


def _set(x: Tensor, lengths: Tensor | None) -> Any:
    (count, rows, _), (stride_set, stride_row, _) = x.shape, x.stride()
    sizes = {"count": count, "rows": rows, "stride_set": stride_set, "stride_row": stride_row}
    return _struct()(data=address(x), **sizes, lengths=address(lengths))
