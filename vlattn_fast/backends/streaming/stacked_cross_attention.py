"""stacked_cross_attention in bounded memory with plain PyTorch: each tile is some context sets with some query sets, batched.

The attended vector a_q = sum_c alpha_qc c is needed in cos(q, a_q) only. Where a set has fewer contexts than features, a_q is
never formed: <q, a_q> = sum_c alpha_qc s_qc and |a_q|^2 = alpha G alpha^T, with the Gram matrix G = C C^T. That saves about half
of the products. Both sums cancel where a_q is short, and would be less accurate than the plain formula. Two things prevent it:
G and all maps are float64, which costs little beside the products over features; and the uniform part of alpha, which cancels
where the contexts lie around zero, is taken by their mean: <q, a_q> = <q, mean> + sum_c (alpha_qc - 1/m) s_qc.
The backward pass recomputes each tile; only the inputs are saved. The gradient of a cosine is what is left of two vectors along q
and a, which cancel where features have a large part in common. So products over features take the rows less the contexts' mean in
the inputs' dtype, and the coefficients of that mean are summed in the dtype of the maps, where they cancel without loss.

If scores are products of features, and not of the vectors, these follow the vectors in each row. The scores' gradients then go to
the features, and those of <q, a_q> to the vectors.

Shapes: a tile has x context sets of m contexts and y query sets of n queries; maps are (x, y, n, m).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast._ground.tensors import compute_dtype, real_tokens
from vlattn_fast.backends.inputs import StackedCrossAttentionBackwardInputs, StackedCrossAttentionInputs
from vlattn_fast.backends.reference.stacked_cross_attention import split_norm
from vlattn_fast.backends.streaming import _tiles
from vlattn_fast.backends.streaming._forward_mode import tangents_of

EPS = 1e-8  # of SCAN's norms and cosine
_Inputs = StackedCrossAttentionInputs | StackedCrossAttentionBackwardInputs


def forward(inputs: StackedCrossAttentionInputs) -> Tensor:
    """similarity (Bi, Bc). Rows beyond the lengths are zero; the public call writes the zeros."""
    images, captions, direction = inputs.images, inputs.captions, inputs.direction
    similarity = images.new_zeros(images.shape[0], captions.shape[0], dtype=compute_dtype(images))
    query, context = _sides(inputs)
    by_context = similarity if direction == "t2i" else similarity.mT
    for x, tiles_y in _tile_pairs(query.rows, context.rows):
        contexts = _Contexts(context, x)
        for y in tiles_y:
            by_context[x, y] = _Tile(inputs, query, y, contexts).similarity().to(similarity.dtype)
    return similarity


def backward(inputs: StackedCrossAttentionBackwardInputs) -> tuple[Tensor, Tensor]:
    """Gradients of images and captions."""
    images, grad_similarity, direction = inputs.images, inputs.grad_similarity, inputs.direction
    query, context = _sides(inputs)
    grad = grad_similarity if direction == "t2i" else grad_similarity.mT  # (context sets, query sets)
    dtype = compute_dtype(images)
    grad_q, grad_c = (side.rows.new_zeros(side.rows.shape, dtype=dtype) for side in (query, context))
    for x, tiles_y in _tile_pairs(query.rows, context.rows):
        contexts = _Contexts(context, x)
        for y in tiles_y:
            grad_q[y] += _Tile(inputs, query, y, contexts).backward(grad[x, y])
        grad_c[x] = contexts.backward()
    grad_q, grad_c = grad_q.to(images.dtype), grad_c.to(images.dtype)
    return (grad_c, grad_q) if direction == "t2i" else (grad_q, grad_c)


def jvp(inputs: Any) -> tuple[Tensor, ...]:
    """The tangent of the similarity."""
    return tangents_of(lambda x: (forward(x),), _filled(inputs), StackedCrossAttentionInputs, _FIELDS)


def second(inputs: Any) -> tuple[Tensor, ...]:
    """The second derivative: the tangents of the gradients of images and captions."""
    made = tangents_of(backward, _filled(inputs), StackedCrossAttentionBackwardInputs, _FIELDS)
    return tuple([real_tokens(x, mask) for x, mask in zip(made, _real(inputs), strict=True)])


_FIELDS = "images", "captions"


def _filled(inputs: Any) -> Any:
    """Inputs with zeros in rows beyond the lengths: other backends take anything there."""
    for name, mask in zip(_FIELDS, _real(inputs), strict=True):
        for each in (name, f"{name}_tangent"):
            x = getattr(inputs, each)
            inputs = inputs if x is None else inputs._replace(**{each: real_tokens(x, mask)})
    return inputs


def _real(inputs: Any) -> list[Tensor | None]:
    """bool (Bi, R) and (Bc, T): the rows within the lengths."""
    sides = (inputs.images, inputs.image_lengths), (inputs.captions, inputs.caption_lengths)
    return [None if n is None else torch.arange(x.shape[1], device=x.device) < n[:, None] for x, n in sides]


@dataclass(frozen=True)
class _Side:
    """Images or captions: rows (B, L, D + F) of vectors and `num_features`, of which the first lengths (B) are real."""

    rows: Tensor
    num_features: int
    lengths: Tensor | None

    def tile(self, i: slice) -> tuple[Tensor, Tensor]:
        """The vectors (i, L, D) and the features (i, L, F)."""
        rows, size = self.rows[i].to(compute_dtype(self.rows)), self.rows.shape[2] - self.num_features
        return rows[..., :size], rows[..., size:]

    def masks(self, i: slice) -> tuple[Tensor | None, Tensor | None]:
        """bool (i, L), True = real, and (i), True = not empty. Row 0 of an empty set, a zero vector, counts as real so that
        nothing becomes NaN; the similarity of the set is set to 0 later."""
        if self.lengths is None:
            return None, None
        lengths = self.lengths[i]
        return torch.arange(self.rows.shape[1], device=lengths.device) < lengths.clamp(min=1)[:, None], lengths > 0


def _sides(inputs: _Inputs) -> tuple[_Side, _Side]:
    """The side of the queries and the side of the contexts."""
    image = _Side(inputs.images, inputs.features, inputs.image_lengths)
    caption = _Side(inputs.captions, inputs.features, inputs.caption_lengths)
    return (caption, image) if inputs.direction == "t2i" else (image, caption)


def _tile_pairs(query: Tensor, context: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Slices of the context sets, each with all slices of the query sets. The maps of a tile, its rows of either side and its
    Gram matrices have at most `tile_elements` elements each, or those of one pair where that is more."""
    (num_y, n, size), (num_x, m, _) = query.shape, context.shape
    if n == 0 or m == 0:
        return
    m += 1  # the mean
    most = _tiles.tile_elements(query)
    step_x = max(1, min(num_x, most // (m * max(m, n, size))))
    step_y = max(1, most // (n * max(step_x * m, size)))
    tiles_y = [slice(y, min(y + step_y, num_y)) for y in range(0, num_y, step_y)]
    for x in range(0, num_x, step_x):
        yield slice(x, min(x + step_x, num_x)), tiles_y


class _Contexts:
    """The context sets x and their gradient, to which the tiles add."""

    def __init__(self, side: _Side, x: slice) -> None:
        vectors, self.features = side.tile(x)
        self.grad_features = torch.zeros_like(self.features)
        self.size = vectors.shape[1]
        self.mask, self.filled = side.masks(x)
        self.dtype = vectors.dtype if vectors.device.type == "mps" else torch.float64  # of the maps; mps has no float64
        wide = vectors.to(self.dtype)
        real = wide.new_full((1, 1), self.size) if self.mask is None else self.mask.sum(1, keepdim=True).to(self.dtype)
        self.share = real.reciprocal()[..., None]  # 1/m: (1, 1, 1) or (x, 1, 1)
        self.gram = self.grad_gram = None
        if vectors.shape[1] < vectors.shape[2]:
            self.gram = wide @ wide.mT
            self.grad_gram = torch.zeros_like(self.gram)
            vectors = torch.cat([vectors, (wide * self.share).sum(1, keepdim=True).to(vectors.dtype)], dim=1)
        self.norm = torch.linalg.vector_norm(wide, dim=-1)  # (x, m)
        self.vectors = vectors  # (x, m, D); with a Gram matrix (x, m + 1, D), where row m is the mean
        self.common = (wide * self.share).sum(1).mean(0).to(vectors.dtype)  # (D)
        self.less_common = vectors - self.common
        self.grad_vectors = torch.zeros_like(vectors)  # but for the part along `common`,
        self.grad_common = self.share.new_zeros(vectors.shape[:2])  # of which these are the coefficients

    def backward(self) -> Tensor:
        """The gradient of the context sets (x, m, D + F)."""
        grad = self.grad_vectors + self.grad_common[..., None] * self.common
        if self.grad_gram is not None:
            grad, grad_mean = grad[:, : self.size], grad[:, self.size :]
            grad = grad + self.grad_gram @ self.vectors[:, : self.size].to(self.dtype) + grad_mean * self.share
        return torch.cat([grad.to(self.vectors.dtype), self.grad_features], dim=-1)


class _Tile:
    """The forward pass of some context sets with the query sets y, and what the backward pass needs of it."""

    def __init__(self, inputs: _Inputs, side: _Side, y: slice, contexts: _Contexts) -> None:
        self.inputs, self.contexts = inputs, contexts
        (query, self.features), (self.mask, self.filled) = side.tile(y), side.masks(y)
        self.query = query
        self.has_features = side.num_features > 0
        if not self.has_features or contexts.gram is not None:
            products = self._products(query, contexts.vectors)
            self.product = products[..., : contexts.size].contiguous()  # q . c
        self.score = self._products(self.features, contexts.features) if self.has_features else self.product
        self.normal, self.column_norm = _normalize(inputs, self.score, self.mask)
        logits = inputs.smooth * self.normal
        if contexts.mask is not None:
            logits = logits.masked_fill(~contexts.mask[:, None, None, :], -torch.inf)
        self.alpha = torch.softmax(logits, dim=-1)
        if contexts.gram is None:
            self.attended = self._times(self.alpha, contexts.vectors)  # a
            dot = (query.to(contexts.dtype) * self.attended).sum(-1)
            self.norm_a = torch.linalg.vector_norm(self.attended, dim=-1)
        else:
            self.attended = self._times(self.alpha, contexts.gram)  # C a
            dot = products[..., contexts.size] + ((self.alpha - contexts.share[..., None]) * self.product).sum(-1)
            squared = (self.alpha * self.attended).sum(-1)
            positive = squared > 0  # rounding may leave less; a tangent of the root at 0 would be NaN
            self.norm_a = torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)
        self.dot = dot
        self.norm_q = torch.linalg.vector_norm(query, dim=-1).to(contexts.dtype)
        self.length = self.norm_q * self.norm_a
        self.cosine = dot / self.length.clamp(min=EPS)

    def similarity(self) -> Tensor:
        """(x, y)."""
        return self._zero_where_empty(_aggregate(self.inputs, self.cosine, self.mask))

    def backward(self, grad: Tensor) -> Tensor:
        """The gradient of the query sets (y, n, D + F) from that of the similarity (x, y). Adds to that of the contexts."""
        contexts, query, alpha = self.contexts, self.query.to(self.contexts.dtype), self.alpha
        grad = self._zero_where_empty(grad.to(contexts.dtype))
        grad_cosine = grad[..., None] * _aggregate_backward(self.inputs, self.cosine, self.mask)
        grad_dot = grad_cosine / self.length.clamp(min=EPS)
        grad_length = torch.where(self.length >= EPS, -grad_dot * self.cosine, 0.0)
        by_norm_q = _ratio((grad_length * self.norm_a).sum(0), self.norm_q)[..., None]
        by_norm_a = _ratio(grad_length * self.norm_q, self.norm_a)[..., None]
        grad_dot = grad_dot[..., None]
        grad_query = by_norm_q * query
        if contexts.grad_gram is None:
            grad_query = grad_query + (grad_dot * self.attended).sum(0)
            grad_attended = grad_dot * query + by_norm_a * self.attended
            grad_alpha = self._times(grad_attended, contexts.vectors.mT)
            contexts.grad_vectors += self._outer(alpha, grad_attended, contexts.vectors.dtype)
            direct = None
        else:
            grad_alpha = grad_dot * self.product + by_norm_a * self.attended
            contexts.grad_gram += self._outer(alpha * by_norm_a, alpha, contexts.dtype)
            direct = grad_dot * (alpha - contexts.share[..., None])
            if contexts.mask is not None:
                direct = direct.masked_fill(~contexts.mask[:, None, None, :], 0.0)
        grad_normal = self.inputs.smooth * alpha * self._less_mean(grad_alpha, grad_dot)
        grad_score = _normalize_backward(self.inputs, grad_normal, self.score, self.normal, self.column_norm)
        by_features = torch.zeros_like(self.features)
        if self.has_features:
            flat = self._rows_of(grad_score)
            contexts.grad_features += (flat.mT @ self.features.flatten(0, 1)).view_as(contexts.features)
            by_features = (flat @ contexts.features.flatten(0, 1)).view_as(self.features)
            if direct is None:
                return torch.cat([grad_query.to(self.query.dtype), by_features], dim=-1)
            grad_score = torch.zeros_like(grad_score)  # of the products of vectors, which are no scores
        if direct is not None:
            grad_score = torch.cat([grad_score + direct, grad_dot], dim=-1)
        flat = self._rows_of(grad_score)
        # the queries may not have it: of few contexts the mean is not near 0 either
        common = contexts.common
        shared = self.query.mean((0, 1)) @ common > 0.5 * common.square().sum()
        rest = (self.query - torch.where(shared, common, 0.0)).flatten(0, 1)
        contexts.grad_vectors += (flat.mT @ rest).view_as(contexts.vectors)
        contexts.grad_common += torch.where(shared, grad_score.sum((1, 2)), 0.0)
        grad_query = grad_query + grad_score.sum((0, 3))[..., None] * contexts.common
        grad_query = (grad_query + (flat @ contexts.less_common.flatten(0, 1)).view_as(query)).to(self.query.dtype)
        return torch.cat([grad_query, by_features], dim=-1)

    def _products(self, query: Tensor, context: Tensor) -> Tensor:
        """(x, y, n, k) of the rows of query sets (y, n, D) and of context sets (x, k, D), in the dtype of maps."""
        product = (query.flatten(0, 1) @ context.flatten(0, 1).mT).view(*query.shape[:2], *context.shape[:2])
        return product.permute(2, 0, 1, 3).to(self.contexts.dtype)

    def _rows_of(self, x: Tensor) -> Tensor:
        """(y n, x k) of a map (x, y, n, k), in the dtype of the vectors."""
        return x.permute(1, 2, 0, 3).to(self.query.dtype).reshape(x.shape[1] * x.shape[2], -1)

    def _less_mean(self, grad_alpha: Tensor, grad_dot: Tensor) -> Tensor:
        """grad_alpha (x, y, n, m) less sum_c alpha grad_alpha, as the softmax's backward takes it.

        The sum is <a, gradient of a>: 0, as a cosine does not change with the length of a, but where the clamp acts. What
        rounding adds is taken off each context in proportion to its length. So a zero context has none of it: its column of
        scores is divided by a norm of 0 + EPS, which would make 1e8 times as much of it.
        """
        mean = torch.where(self.length >= EPS, 0.0, grad_dot[..., 0] * self.dot)
        rounding = (self.alpha * grad_alpha).sum(-1) - mean
        norm = self.contexts.norm  # (x, m)
        share = _ratio(rounding, (self.alpha.flatten(1, 2) @ norm[..., None]).view_as(rounding))
        return torch.addcmul(grad_alpha - mean[..., None], share[..., None], norm[:, None, None], value=-1.0)

    def _times(self, x: Tensor, matrix: Tensor) -> Tensor:
        """(x, y, n, k) times (x, k, l), in the dtype of the matrix."""
        product = x.flatten(1, 2).to(matrix.dtype) @ matrix
        return product.view(*x.shape[:3], -1).to(self.contexts.dtype)

    def _outer(self, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        """(x, k, l) from (x, y, n, k) and (x, y, n, l)."""
        return a.flatten(1, 2).mT.to(dtype) @ b.flatten(1, 2).to(dtype)

    def _zero_where_empty(self, similarity: Tensor) -> Tensor:
        if self.contexts.filled is not None:
            similarity = torch.where(self.contexts.filled[:, None], similarity, 0.0)
        return similarity if self.filled is None else torch.where(self.filled, similarity, 0.0)


def _normalize(inputs: _Inputs, score: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Normalises each context's column over the queries (axis 2): the result and the norm. Scores of padding are 0 and add
    nothing to a norm."""
    clips, kind = split_norm(inputs.first_norm)
    if kind == "softmax":
        return torch.softmax(_mask_padding(score, mask, -torch.inf), dim=2), None
    if clips:
        score = F.leaky_relu(score, 0.1)
    if kind is None:
        return score, None
    norm = torch.linalg.vector_norm(score, ord=2 if kind == "l2norm" else 1, dim=2, keepdim=True)
    return score / (norm + EPS), norm


def _normalize_backward(inputs: _Inputs, grad: Tensor, score: Tensor, normal: Tensor, norm: Tensor | None) -> Tensor:
    clips, kind = split_norm(inputs.first_norm)
    if kind == "softmax":
        return normal * (grad - (normal * grad).sum(2, keepdim=True))
    if norm is not None:
        slope = normal.sign() if kind == "l1norm" else _ratio(normal * (norm + EPS), norm)  # of the norm
        grad = (grad - (grad * normal).sum(2, keepdim=True) * slope) / (norm + EPS)
    return torch.where(score > 0.0, grad, 0.1 * grad) if clips else grad


def _aggregate(inputs: _Inputs, cosine: Tensor, mask: Tensor | None) -> Tensor:
    """(x, y, n) to (x, y)."""
    if inputs.aggregation == "logsumexp":
        return torch.logsumexp(inputs.lambda_lse * _mask_padding(cosine, mask, -torch.inf), dim=-1) / inputs.lambda_lse
    if inputs.aggregation == "max":
        return _mask_padding(cosine, mask, -torch.inf).amax(-1)
    return (cosine * _aggregate_backward(inputs, cosine, mask)).sum(-1)


def _aggregate_backward(inputs: _Inputs, cosine: Tensor, mask: Tensor | None) -> Tensor:
    """The derivative of the aggregate by each cosine, (x, y, n)."""
    if inputs.aggregation == "logsumexp":
        return torch.softmax(inputs.lambda_lse * _mask_padding(cosine, mask, -torch.inf), dim=-1)
    if inputs.aggregation == "max":
        cosine = _mask_padding(cosine, mask, -torch.inf)
        ones = (cosine == cosine.amax(-1, keepdim=True)).to(cosine.dtype)
    else:
        ones = _mask_padding(torch.ones_like(cosine), mask, 0.0)
    return ones if inputs.aggregation == "sum" else ones / ones.sum(-1, keepdim=True)


def _mask_padding(x: Tensor, mask: Tensor | None, value: float) -> Tensor:
    """(x, y, n) or (x, y, n, m) with `value` at padding of the query sets, mask (y, n)."""
    if mask is None:
        return x
    return x.masked_fill(~(mask if x.dim() == 3 else mask[..., None]), value)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b for b >= 0, and 0 where b is 0: the gradient of a norm at 0."""
    return torch.where(b > 0.0, a / torch.where(b > 0.0, b, 1.0), 0.0)
