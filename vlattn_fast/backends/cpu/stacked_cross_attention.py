"""stacked_cross_attention by csrc/cpu/stacked_cross_attention.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import unit_stride
from vlattn_fast.backends.inputs import StackedCrossAttentionBackwardInputs, StackedCrossAttentionInputs
from vlattn_fast.backends.native import DTYPES, kernel, pointer
from vlattn_fast.backends.reference.stacked_cross_attention import split_norm

_FIELDS = "=5q 2d 12q 2q 2q 2q"
_run_forward = kernel("stacked_cross_attention_forward", _FIELDS)
_run_backward = kernel("stacked_cross_attention_backward", _FIELDS)
_NORMS = {None: 0, "softmax": 1, "l2norm": 2, "l1norm": 3}  # Norm of the kernel
_AGGREGATIONS = ("logsumexp", "max", "sum", "mean")  # Aggregation of the kernel


def forward(inputs: StackedCrossAttentionInputs) -> Tensor:
    """similarity (Bi, Bc). Padding may hold anything."""
    images, captions = inputs.images, inputs.captions
    similarity = images.new_empty(images.shape[0], captions.shape[0], dtype=torch.float32)
    _call(_run_forward, inputs, similarity, None, None, None)
    return similarity


def backward(inputs: StackedCrossAttentionBackwardInputs) -> tuple[Tensor, Tensor]:
    """Gradients of images and captions."""
    images, captions = inputs.images, inputs.captions
    grads = images.new_empty(*images.shape), captions.new_empty(*captions.shape)
    _call(_run_backward, inputs, None, inputs.grad_similarity.float(), *grads)
    return grads


def _call(
    run: Any,
    inputs: StackedCrossAttentionInputs | StackedCrossAttentionBackwardInputs,
    similarity: Tensor | None,
    grad_similarity: Tensor | None,
    grad_images: Tensor | None,
    grad_captions: Tensor | None,
) -> None:
    """Packs StackedCrossAttention of csrc/cpu/, in which the queries' side comes first, and runs the kernel."""
    images, captions = inputs.images, inputs.captions
    image_lengths, caption_lengths = inputs.image_lengths, inputs.caption_lengths
    aggregation, smooth, lambda_lse = inputs.aggregation, inputs.smooth, inputs.lambda_lse
    clips, norm = split_norm(inputs.first_norm)
    pairs = similarity if similarity is not None else grad_similarity
    assert pairs is not None
    strides = pairs.stride()
    sides, grads = [(images, image_lengths), (captions, caption_lengths)], [pointer(grad_images), pointer(grad_captions)]
    if inputs.direction == "t2i":  # the captions ask
        sides, grads, strides = sides[::-1], grads[::-1], strides[::-1]
    # kept until the call is over
    sets = [(unit_stride(x), None if lengths is None else lengths.contiguous()) for x, lengths in sides]
    run(
        *(DTYPES[images.dtype], images.shape[2], _NORMS[norm], clips, _AGGREGATIONS.index(aggregation), smooth, lambda_lse),
        *(field for x, lengths in sets for field in (x.data_ptr(), *x.shape[:2], *x.stride()[:2], pointer(lengths))),
        *(pointer(similarity), pointer(grad_similarity), *strides, *grads),
    )
