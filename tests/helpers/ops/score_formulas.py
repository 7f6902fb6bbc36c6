"""The score functions written out a second time, pair by pair, as tests of operators, layers and methods compare with them.

`pair_scores(score, q, k)` takes a name or an object of vlattn_fast.scores, and q (B, H, N, D) and k (B, H, M, D). Of the object
it reads the parameters and no code.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def dot(score: Any, q: Tensor, k: Tensor) -> Tensor:
    """Of scaled_dot, too, whose factor is the call's `scale`."""
    return torch.einsum("bhnd,bhmd->bhnm", q, k)


def cosine(score: Any, q: Tensor, k: Tensor) -> Tensor:
    """A vector of zeros, as padding is, has the length 1."""
    squares = [x.square().sum(-1, keepdim=True) for x in (q, k)]
    return dot(score, *(x / torch.where(s == 0, 1.0, s).sqrt() for x, s in zip((q, k), squares, strict=True)))


def distance(score: Any, q: Tensor, k: Tensor) -> Tensor:
    square = (q[..., :, None, :] - k[..., None, :, :]).square().sum(-1)
    return -square / (2 * torch.as_tensor(score.sigma, dtype=q.dtype).square()[..., None, None])


def additive(score: Any, q: Tensor, k: Tensor) -> Tensor:
    q = q if score.query_weight is None else q @ score.query_weight.mT
    k = k if score.key_weight is None else k @ score.key_weight.mT
    units = q[..., :, None, :] + k[..., None, :, :]
    units = units if score.bias is None else units + score.bias[..., None, None, :]
    return torch.einsum("bhnma,ha->bhnm", torch.tanh(units), score.vector.expand(q.shape[1], -1))


def general(score: Any, q: Tensor, k: Tensor) -> Tensor:
    return activated(score, dot(score, *projected(score, q, k)))


def hadamard(score: Any, q: Tensor, k: Tensor) -> Tensor:
    q, k = projected(score, q, k)
    units = activated(score, q[..., :, None, :] * k[..., None, :, :])
    return torch.einsum("bhnma,ha->bhnm", units, score.vector.expand(q.shape[1], -1)) + score.offset


def projected(score: Any, q: Tensor, k: Tensor) -> list[Tensor]:
    return [affine(score, x) if score.projects == side else x for side, x in (("query", q), ("key", k))]


def affine(score: Any, x: Tensor) -> Tensor:
    x = x if score.weight is None else x @ score.weight.mT
    return x if score.bias is None else x + score.bias[..., None, :]


def activated(score: Any, x: Tensor) -> Tensor:
    functions = {"relu": F.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}
    functions["leaky_relu"] = lambda x: torch.where(x > 0, x, score.negative_slope * x)
    return x if score.activation is None else functions[score.activation](x)


FORMULAS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    each.__name__: each for each in (dot, cosine, distance, additive, general, hadamard)
} | {"scaled_dot": dot}


def pair_scores(score: Any, q: Tensor, k: Tensor) -> Tensor:
    """(B, H, N, M)"""
    name = score if isinstance(score, str) else score.name
    assert name in FORMULAS, (
        f"score {name!r} has no second formula: write `def {name}(score, q, k)` in tests/helpers/ops/score_formulas.py in "
        "plain torch, without the class's code, and name it in FORMULAS there"
    )
    return FORMULAS[name](score, q, k)


def of_layer(layer: Any, q: Tensor, k: Tensor) -> Tensor:
    """Of an nn.ScoreAttention, by its own parameters."""
    score = layer.score if isinstance(layer.score, str) else layer.score()
    return pair_scores(score, q, k) * (q.shape[-1] ** -0.5 if score == "scaled_dot" else 1.0)
