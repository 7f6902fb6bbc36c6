"""stacked_cross_attention in Triton: every query row attends to every context set, chunk by chunk; forward and backward.

Shapes: images (Bi, R, D), captions (Bc, T, D); similarity (Bi, Bc). A chunk has X context sets of M rows and Y query sets. The L
real rows of the query sets are packed one after the other, so padding costs nothing. The maps of a chunk are (L, X * M), those of
alpha (L, X, M), row-major with M padded to a multiple of 16, so that 16-bit elements are loaded 16 bytes at a time.
Roofline: tensor cores for 16-bit inputs, FP32 issue for float32 (per map element 2 products over D forward, 3 or 4 backward).
Trick: only the products over D are large. They are tiled over the rows of all pairs at once, not pair by pair: a program of
`_attend_kernel` combines one context set with rows of many query sets. alpha is float32, as in the formula. It is split into
16-bit parts whose sum it is, so that the tensor cores multiply it with 16-bit contexts without loss. The attended vectors exist
only in registers. Their Gram form would cancel in float32, so it is taken in float64, for the gradients of float32 inputs. Maps
live for one chunk. There are no atomics. Not yet measured on a GPU.

Files, in the order of the formula: _stacked_inputs (options, sets, chunks), _stacked_products (scores), _stacked_weights (alpha),
_stacked_cosines (cosines, similarity), _stacked_gradients (gradients of the maps).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlattn_fast.backends.inputs import StackedCrossAttentionBackwardInputs, StackedCrossAttentionInputs
from vlattn_fast.kernels._device import on_device
from vlattn_fast.kernels._stacked_cosines import aggregate, attended_cosines
from vlattn_fast.kernels._stacked_gradients import Attended, gradient_maps
from vlattn_fast.kernels._stacked_inputs import EPS, Contexts, Options, Queries, chunks, sides
from vlattn_fast.kernels._stacked_products import add_product, products
from vlattn_fast.kernels._stacked_weights import weight_parts, weights, weights_and_parts


@on_device
def forward(inputs: StackedCrossAttentionInputs) -> Tensor:
    """similarity (Bi, Bc) float32. Rows beyond the lengths must be zero; the public call zeroes them."""
    images, captions = inputs.images, inputs.captions
    similarity = images.new_empty((images.shape[0], captions.shape[0]), dtype=torch.float32)
    if images.shape[1] == 0 or captions.shape[1] == 0:
        return similarity.zero_()
    query, context = sides(inputs)
    by_context = similarity if inputs.direction == "t2i" else similarity.mT
    options = Options.of(inputs)
    for x, tiles_y in chunks(context, query):
        contexts = Contexts(context, x)
        for y in tiles_y:
            queries = Queries(query, y)
            scores = products(queries, contexts)
            parts = weight_parts(scores, queries, contexts, options)
            cosine, _ = attended_cosines(parts, queries, contexts)
            aggregate(cosine, queries, contexts, options, by_context[x, y])
    return similarity


@on_device
def backward(inputs: StackedCrossAttentionBackwardInputs) -> tuple[Tensor, Tensor]:
    """Gradients of images and captions.

    With W = grad_score + diag(grad_dot) (alpha - 1/m): grad_q = W C + grad_dot mean(C) + diag(by_norm_q) q and
    grad_C = W^T q + sum_q grad_dot q / m + U C, where by_norm is the gradient of a norm over that norm and
    U = alpha^T diag(by_norm_a) alpha is summed over the query sets. Terms cancel where a is short or close to q: for float32
    inputs all maps behind alpha, and the small products a C^T = alpha C C^T and U C, are float64, and a is not formed.
    """
    images, captions, direction = inputs.images, inputs.captions, inputs.direction
    query, context = sides(inputs)
    grad_q, grad_c = (torch.zeros_like(rows, dtype=torch.float32) for rows, _ in (query, context))
    grad = inputs.grad_similarity.float() if direction == "t2i" else inputs.grad_similarity.float().mT
    options = Options.of(inputs)
    attend, dtype = (_attend_in_float64, torch.float64) if images.dtype == torch.float32 else (_attend, torch.float32)
    for x, tiles_y in chunks(context, query) if images.shape[1] > 0 and captions.shape[1] > 0 else ():
        contexts = Contexts(context, x, dtype)
        grad_mean, grad_gram = torch.zeros_like(contexts.mean), torch.zeros_like(contexts.gram)
        grad_rows = grad_c[x].view(len(contexts.rows), -1)
        for y in tiles_y:
            queries = Queries(query, y, dtype)
            scores = products(queries, contexts)
            attention = attend(scores, queries, contexts, options)
            by_set = attention.alpha.transpose(0, 1)  # (X, L, M)
            w, v, grad_dot, by_norm_q = gradient_maps(scores, attention, grad[x, y], queries, contexts, options)
            del scores, attention
            grad_packed = (grad_dot.mT @ contexts.mean + by_norm_q.sum(0)[:, None] * queries.wide).float()
            add_product(w, contexts.rows, queries.total, grad_packed, inner=False)
            add_product(w.mT, queries.rows, queries.total, grad_rows, inner=True)
            grad_gram += v.permute(1, 2, 0) @ by_set
            grad_mean += grad_dot @ queries.wide
            grad_q[y] += queries.unpack(grad_packed).view_as(grad_q[y])
        grad_c[x] += grad_gram @ contexts.wide + (grad_mean * contexts.share)[:, None]
    grad_q, grad_c = grad_q.to(images.dtype), grad_c.to(images.dtype)
    return (grad_c, grad_q) if direction == "t2i" else (grad_q, grad_c)


def _attend(scores: Tensor, queries: Queries, contexts: Contexts, options: Options) -> Attended:
    """The attention of 16-bit inputs, whose attended vectors are formed in registers."""
    alpha, parts = weights_and_parts(scores, queries, contexts, options)
    along = alpha.transpose(0, 1) @ contexts.gram
    return Attended(alpha, along, *attended_cosines(parts, queries, contexts))


def _attend_in_float64(scores: Tensor, queries: Queries, contexts: Contexts, options: Options) -> Attended:
    """The attention of float32 inputs. |a|^2 = alpha C C^T alpha^T and q . a = (alpha - 1/m) s + q . mean(C)."""
    alpha = weights(scores, queries, contexts, options, torch.float64)
    by_set = alpha.transpose(0, 1)  # (X, L, M)
    along = by_set @ contexts.gram
    norm_a = (by_set * along).sum(2).clamp_(min=0.0).sqrt_()  # rounding may give a negative number
    score = scores.view(-1, contexts.sets, contexts.size).transpose(0, 1)
    dot = ((by_set - contexts.share[..., None]) * score).sum(2) + contexts.mean @ queries.wide.mT
    cosine = dot / (queries.norms * norm_a).clamp_(min=EPS.value)
    return Attended(alpha, along, cosine, norm_a)
