"""SCAN's similarity of every image with every caption (Lee et al., ECCV 2018) and DAMSM's (Xu et al., CVPR 2018).

Formula: reference/stacked_cross_attention.py. Bounded memory: streaming/stacked_cross_attention.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlattn_fast import kernels, scores
from vlattn_fast._ground.checks import check_choice, check_device, check_floating, check_number, check_tensor, describe, readable
from vlattn_fast._ground.tensors import cast_by_autocast, compute_dtype, real_tokens, without_autocast
from vlattn_fast.backends import reference
from vlattn_fast.backends.cpu import stacked_cross_attention as cpu
from vlattn_fast.backends.inputs import StackedCrossAttentionBackwardInputs, StackedCrossAttentionInputs
from vlattn_fast.backends.reference.stacked_cross_attention import AGGREGATIONS, DIRECTIONS, FIRST_NORMS
from vlattn_fast.backends.streaming import stacked_cross_attention as streaming
from vlattn_fast.dispatch.call import CallShape, call_shape
from vlattn_fast.dispatch.choice import launcher, planned, selecting
from vlattn_fast.dispatch.operator import Operator
from vlattn_fast.dispatch.table import table
from vlattn_fast.ops._derivatives import Derivatives


def _triton_limits(call: CallShape) -> list[tuple[str, bool]]:
    contexts = call.sizes["regions" if call.flags["direction"] == "t2i" else "words"]
    return [
        ("the Triton kernels compute no score but a dot product", call.flags["score"] != "dot"),
        (
            "the Triton kernels attend to at most 4096 contexts, whose weights of one query they hold in registers",
            contexts > 4096,
        ),
    ]


BACKENDS = table(
    streaming,
    cpu=cpu,
    triton=lambda: kernels.stacked_cross_attention,
    limits={"triton": _triton_limits},
    masks_padding=("cpu",),
    shared_sums={"triton": ("gradient of images", "gradient of captions")},
)


def stacked_cross_attention(
    images: Tensor,
    captions: Tensor,
    caption_lengths: Tensor | None = None,
    image_lengths: Tensor | None = None,
    *,
    direction: str = "t2i",
    first_norm: str | None = "clipped_l2norm",
    smooth: float = 9.0,
    aggregation: str = "logsumexp",
    lambda_lse: float = 6.0,
    score: str | scores.Score = "dot",
    backend: str = "auto",
) -> Tensor:
    """Computes SCAN's similarity of every image with every caption.

    Returns one similarity per pair: how well each word (region) matches the regions (words) that it attends to. Memory is
    bounded: pairs are computed in tiles, no (Bi, Bc, T, R) map is stored, and the backward pass recomputes each tile.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> images = torch.nn.functional.normalize(torch.randn(3, 36, 16), dim=-1)
        >>> captions = torch.nn.functional.normalize(torch.randn(2, 7, 16), dim=-1)
        >>> va.stacked_cross_attention(images, captions, torch.tensor([7, 4])).shape
        torch.Size([3, 2])

    Per pair, with queries q and contexts c (t2i: words attend to regions; i2t: regions attend to words), SCAN eq. 1-8 are:
    s_qc = q . c;  x = s, each context's column normalised over the queries;  alpha = softmax over contexts of smooth * x;
    a_q = sum_c alpha_qc c;  r_q = cos(q, a_q), |q||a_q| clamped at 1e-8;  similarity = r aggregated over the queries.

    Args:
        images: (Bi, R, D) region embeddings, which SCAN normalises before the call; float16, bfloat16, float32, float64.
        captions: (Bc, T, D) word embeddings of the same dtype.
        caption_lengths, image_lengths: int64 (Bc) and (Bi), the number of real tokens, which come first, on the CPU or the
            inputs' device. Default: all are real. Padding has no influence and gradient 0, even if it is NaN. Checking the values
            waits for a GPU that holds them; under torch.compile and in CUDA graphs they are clamped to the valid range instead.
        direction: "t2i" or "i2t".
        first_norm: "softmax"; "l2norm" x / (|x|_2 + 1e-8); "l1norm" x / (|x|_1 + 1e-8); "clipped" leaky_relu(x, 0.1);
            "clipped_l2norm", "clipped_l1norm" both in turn; None.
        smooth: factor in the softmax over contexts, any number.
        aggregation: "logsumexp" = log(sum exp(lambda_lse r)) / lambda_lse; "max" (ties share the gradient); "sum"; "mean".
        lambda_lse: > 0. Only for "logsumexp".
        score: s_qc, with its default scale: "dot", "scaled_dot", "cosine" (0 for a zero vector, whatever eps), or General or
            Hadamard without tanh and sigmoid (General: without any activation), with parameters without heads or of one head. Its
            tensors are differentiable. The cosines r_q remain those of the vectors.
        backend: "auto", "reference", "streaming", "cpu" or "triton"; "triton" supports only "dot".

    Returns:
        similarity (Bi, Bc) in the inputs' dtype, in float32 for float16 and bfloat16 (which are computed in float32). A pair
        with an empty side (length 0) gives 0 and zero gradients for any aggregation. Twice differentiable in both.

    Raises:
        ValueError, TypeError: if an argument is wrong (the message names it), or the requested backend does not support the call.

    Reference: Lee et al., "Stacked Cross Attention for Image-Text Matching", ECCV 2018, eq. 1-8.
    """
    options = direction, first_norm, smooth, aggregation, lambda_lse, score
    backend = planned(_backend, backend, images, captions, caption_lengths, image_lengths, *options)
    caption_lengths, image_lengths = _place(caption_lengths, "caption", captions), _place(image_lengths, "image", images)
    images, captions = cast_by_autocast(images, captions)
    score = scores.resolve(score)
    if backend == "reference":
        sums: dict[str, Any] = {"aggregation": aggregation, "lambda_lse": lambda_lse, "score": score}
        norms: dict[str, Any] = {"direction": direction, "first_norm": first_norm, "smooth": smooth}
        with without_autocast(images):
            return reference.stacked_cross_attention(images, captions, caption_lengths, image_lengths, **norms, **sums)
    images, captions, features = _rows(images, captions, caption_lengths, image_lengths, direction, score, backend)
    smooth, lambda_lse = float(smooth), float(lambda_lse)
    tensors = images, captions, caption_lengths, image_lengths
    inputs = StackedCrossAttentionInputs(*tensors, features, direction, first_norm, smooth, aggregation, lambda_lse, backend)
    return _derivatives.forward(inputs)


def _rows(
    images: Tensor,
    captions: Tensor,
    caption_lengths: Tensor | None,
    image_lengths: Tensor | None,
    direction: str,
    score: scores.Score,
    backend: str,
) -> tuple[Tensor, Tensor, int]:
    """Returns images and captions as a backend takes them, and how many features of the score follow the vectors."""

    def without_padding(images: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
        return _mask_padding(images, image_lengths), _mask_padding(captions, caption_lengths)

    if score.name == "dot":
        return *((images, captions) if BACKENDS[backend].masks_padding else without_padding(images, captions)), 0
    dtype = compute_dtype(images)
    images, captions = (x.to(dtype) for x in without_padding(images, captions))  # padding would reach parameters
    query, context = (captions, images) if direction == "t2i" else (images, captions)
    with without_autocast(images):
        phi, psi = (x[:, 0] for x in score.to(dtype).linear_features(query[:, None], context[:, None]))
    query, context = torch.cat([query, phi], -1), torch.cat([context, psi], -1)
    images, captions = (context, query) if direction == "t2i" else (query, context)
    return *without_padding(images, captions), phi.shape[-1]  # which has features if there is a bias


def damsm_similarity(
    images: Tensor,
    captions: Tensor,
    caption_lengths: Tensor | None = None,
    image_lengths: Tensor | None = None,
    *,
    gamma1: float = 4.0,
    gamma2: float = 5.0,
    backend: str = "auto",
) -> Tensor:
    """Computes AttnGAN's image-text matching score R(image, caption) = log sum_t exp(gamma2 cos(e_t, c_t)).

    The word e_t attends to the regions after two softmaxes, over words and then, times gamma1, over regions. Cost and memory are
    those of stacked_cross_attention: this is gamma2 * stacked_cross_attention(direction="t2i", first_norm="softmax",
    smooth=gamma1, lambda_lse=gamma2), with the same returns and errors.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> va.damsm_similarity(torch.randn(3, 289, 16), torch.randn(2, 7, 16), torch.tensor([7, 4])).shape
        torch.Size([3, 2])

    Args:
        images, captions, caption_lengths, image_lengths, backend: see stacked_cross_attention.
        gamma1: factor in the softmax over regions.
        gamma2: > 0, factor of the cosines. As in the authors' code, R is not divided by gamma2 (eq. 10).

    Returns:
        R (Bi, Bc). A pair with an empty side gives 0.

    Reference: Xu et al., "AttnGAN", CVPR 2018, eq. 7-10.
    """
    check_number("gamma1", gamma1)
    check_number("gamma2", gamma2)
    check_positive("gamma2", gamma2)
    options: dict[str, Any] = {"first_norm": "softmax", "smooth": gamma1, "lambda_lse": gamma2, "backend": backend}
    return gamma2 * stacked_cross_attention(images, captions, caption_lengths, image_lengths, **options)


def _describe(
    images: Tensor,
    captions: Tensor,
    caption_lengths: Tensor | None,
    image_lengths: Tensor | None,
    direction: str,
    first_norm: str | None,
    smooth: float,
    aggregation: str,
    lambda_lse: float,
    score: str | scores.Score,
) -> CallShape:
    """Checks a call except for the values of lengths, and returns its metadata."""
    score = check_options(direction, first_norm, smooth, aggregation, lambda_lse, score)
    check_tensor("images", images, rank=3, shape="(Bi, R, D)")
    check_tensor("captions", captions, rank=3, shape="(Bc, T, D)")
    check_floating(images=images, captions=captions)
    check_device("captions", captions, "images", images)
    if captions.shape[2] != images.shape[2]:
        raise ValueError(f"captions must have images' feature size D = {images.shape[2]}; got {describe(captions)}")
    _check_lengths("caption_lengths", caption_lengths, "captions", captions)
    _check_lengths("image_lengths", image_lengths, "images", images)
    (num_images, regions, features), (num_captions, words, _) = images.shape, captions.shape
    sizes = {"images": num_images, "captions": num_captions, "regions": regions, "words": words, "features": features}
    query, context = (captions, images) if direction == "t2i" else (images, captions)
    score.check(query[:, None], context[:, None])
    flags = {"direction": direction, "first_norm": first_norm, "aggregation": aggregation, "score": score.name}
    return call_shape("stacked_cross_attention", images, sizes, flags)


_backend = selecting(BACKENDS, _describe)


def check_options(direction: Any, first_norm: Any, smooth: Any, aggregation: Any, lambda_lse: Any, score: Any) -> scores.Score:
    """Returns the score. Raises an error unless the options of `stacked_cross_attention` have the documented types and values."""
    check_choice("direction", direction, DIRECTIONS)
    check_choice("first_norm", first_norm, FIRST_NORMS)
    check_number("smooth", smooth)
    check_choice("aggregation", aggregation, AGGREGATIONS)
    check_number("lambda_lse", lambda_lse)
    if aggregation == "logsumexp":
        check_positive("lambda_lse", lambda_lse)
    score = scores.resolve(score)
    if not score.is_linear:
        raise ValueError(
            "score must be a product of features of the queries and of the contexts: 'dot', 'scaled_dot', 'cosine', General "
            f"without an activation, or Hadamard without tanh and sigmoid; got {score!r:.80}"
        )
    return score


def _check_lengths(name: str, lengths: Any, tokens_name: str, tokens: Tensor) -> None:
    if lengths is None:
        return
    check_tensor(name, lengths, rank=1, shape=f"(the number of real tokens of each of {tokens_name})")
    if lengths.dtype != torch.int64:
        raise TypeError(f"{name} must be int64; got {describe(lengths)}")
    if lengths.device.type != "cpu" and lengths.device != tokens.device:
        raise ValueError(f"{name} must be on the CPU or on the device of {tokens_name}, {tokens.device}; got {describe(lengths)}")
    if lengths.shape[0] != tokens.shape[0]:
        raise ValueError(f"{name} must have one entry for each of the {tokens.shape[0]} {tokens_name}; got {describe(lengths)}")


def check_positive(name: str, value: float) -> None:
    """Raises an error unless `value`, which divides a log-sum-exp, is above 0."""
    if value <= 0:
        raise ValueError(f"{name} must be greater than 0, since the log-sum-exp is divided by it; got {value!r}")


def _place(lengths: Tensor | None, name: str, of: Tensor) -> Tensor | None:
    """Returns the lengths of captions or images, on their device. Values are checked if they are available, else clamped."""
    if lengths is None:
        return None
    if lengths.numel() > 0 and readable(lengths):
        low, high = torch.stack(lengths.aminmax()).tolist()  # one transfer
        if low < 0 or high > of.shape[1]:
            raise ValueError(
                f"{name}_lengths must lie in [0, {of.shape[1]}], the rows {name}s have; got values in [{low}, {high}]"
            )
    return lengths.to(of.device).clamp(0, of.shape[1])


def _mask_padding(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Returns (B, L, D) with zeros at padding, so that NaN there reaches no output and no gradient."""
    if lengths is None:
        return x
    return real_tokens(x, torch.arange(x.shape[1], device=x.device) < lengths[:, None])


def _forward_fake(inputs: StackedCrossAttentionInputs) -> Tensor:
    images, captions = inputs.images, inputs.captions
    return images.new_empty(images.shape[0], captions.shape[0], dtype=compute_dtype(images))


_derivatives = Derivatives(
    "stacked_cross_attention",
    (StackedCrossAttentionInputs, StackedCrossAttentionBackwardInputs),
    ("images", "captions"),
    outputs=("similarity",),
    grads={"grad_similarity": "similarity"},
    passes=[launcher(BACKENDS, each) for each in (streaming.forward, streaming.backward, streaming.jvp, streaming.second)],
    fake=_forward_fake,
)

OPERATOR = Operator(stacked_cross_attention, _describe, BACKENDS)
