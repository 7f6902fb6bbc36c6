"""The formulas of operators on a tile: some query rows with all their keys and heads, in plain PyTorch that torch.func
differentiates. `_derivatives` takes them.

A tile is the inputs of an operator cut to it: its tensors in the dtype of sums, with attn_mask and is_causal in one mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlattn_fast._ground.score_kinds import KINDS
from vlattn_fast._ground.tensors import compute_dtype, expand_heads, over_sums, unit_vectors
from vlattn_fast.backends.reference._softmax import attend, pair_bias_of
from vlattn_fast.backends.streaming._dropout import keep_factor

_PER_QUERY = (
    "query",
    "grad_output",
    "lse",
    "row_bias",
    "relevancy",
    "row_weight",
)  # fields with the queries in the third dimension


def place(name: str, b: slice, i: slice) -> Any:
    """The index of the tile in the field of this name."""
    if name == "vector":  # of all samples
        return ...
    return (b, slice(None), i) if name in _PER_QUERY else b


def mask_of(inputs: Any, b: slice, i: slice) -> Tensor | None:
    """attn_mask and is_causal of a tile as one mask, bool or float."""
    (batch, heads, queries, _), keys = inputs.query.shape, inputs.key.shape[2]
    mask = None if inputs.attn_mask is None else inputs.attn_mask.expand(batch, heads, queries, keys)[b, :, i]
    if not inputs.is_causal:
        return mask
    o_q, o_kv = (torch.arange(size, device=inputs.query.device) for size in (queries, keys))
    visible = o_kv <= o_q[i, None]
    if mask is None:
        return visible
    return mask & visible if mask.dtype == torch.bool else torch.where(visible, mask, -torch.inf)


def probabilities(x: Any) -> tuple[Tensor, Tensor]:
    """A (b, H, i, M) and the log-sum-exp (b, H, i) of a tile."""
    key = expand_heads(x.key, x.query.shape[1])
    queries = torch.arange(x.query.shape[2], device=x.query.device)
    bias = pair_bias_of(x.row_bias, queries, x.key_groups if x.row_bias is not None else None)
    score = x.scale * score_of(x.score, x.query, key, getattr(x, "vector", None), x.parameter)
    prob, lse = attend(score, x.attn_mask, x.key_mask, pair_bias=bias)
    return prob.to(x.query.dtype), lse


def score_of(kind: str, q: Tensor, k: Tensor, vector: Tensor | None, p: float) -> Tensor:
    """The core score of each pair, (b, h, i, M), from features q (b, h, i, A) and k (b, h, M, A); sums over hidden units run unit
    by unit."""
    if kind == "cosine":
        (unit_q, norm_q), (unit_k, norm_k) = unit_vectors(q, p), unit_vectors(k, p)
        cosine = unit_q @ unit_k.mT
        free = norm_q[..., :, None] * norm_k[..., None, :] >= p
        return cosine if p == 0.0 else torch.where(free, cosine, q @ k.mT / p)
    if KINDS[kind].of == "product":
        return _OF_PRODUCT[kind](q @ k.mT, p)
    assert vector is not None
    score = q.new_zeros(*q.shape[:3], k.shape[2])
    for a in range(q.shape[-1]):
        x, y = q[..., :, None, a], k[..., None, :, a]
        unit = torch.sigmoid(x * y) if kind == "hadamard_sigmoid" else torch.tanh(x + y if kind == "additive" else x * y)
        score = score + vector[:, None, None, a] * unit
    return score


_OF_PRODUCT: dict[str, Callable[[Tensor, float], Tensor]] = {
    "dot": lambda x, p: x,
    "dot_relu": lambda x, p: torch.relu(x),
    "dot_leaky_relu": lambda x, p: torch.where(x > 0, x, p * x),
    "dot_tanh": lambda x, p: torch.tanh(x),
    "dot_sigmoid": lambda x, p: torch.sigmoid(x),
    "dot_softcap": lambda x, p: torch.tanh(p * x),
}


def score_attention(x: Any, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """out (b, H, i, Dv) and lse (b, H, i); `kept`: the dropout factors of the tile."""
    prob, lse = probabilities(x)
    value = expand_heads(x.value, x.query.shape[1])
    return (prob if kept is None else prob * kept) @ value, lse


def dropout_factors(inputs: Any, b: slice, i: slice) -> Tensor | None:
    """The factors of a tile, 0 or 1 / (1 - dropout_p)."""
    if inputs.dropout_p == 0.0:
        return None
    (heads, queries), dtype = inputs.query.shape[1:3], compute_dtype(inputs.query)
    return keep_factor(inputs.seed, inputs.dropout_p, (heads, queries), inputs.key.shape[2], (b, slice(0, heads), i), dtype)


def abar_of_heads(x: Any, lse_varies: bool) -> Tensor:
    """A, or relu(A * dA), of each head, (b, H, i, M), before the heads are reduced.

    An lse that varies is an input: A = exp(logit - lse). Else it counts as computed from query and key, with a constant sink.
    """
    prob, lse = probabilities(x)
    if x.lse is not None:
        empty = torch.isinf(x.lse) | torch.isneginf(lse)
        lse, given = (torch.where(empty, 0.0, each) for each in (lse, x.lse))
        if not lse_varies:  # e^given = e^lse + e^sink
            sink = (given + torch.log((1 - torch.exp(lse - given)).clamp(min=0.0))).detach()
            largest = torch.maximum(lse, sink).detach()
            given = largest + torch.log(torch.exp(lse - largest) + torch.exp(sink - largest))
        prob = torch.where(empty[..., None], 0.0, prob * torch.exp(lse - given)[..., None])
    if x.rule != "gradient":
        return prob
    return torch.relu(prob * (x.grad_output @ expand_heads(x.value, x.query.shape[1]).mT))


def attention_map(x: Any, lse_varies: bool) -> tuple[Tensor]:
    """Abar (b, i, M)."""
    reductions: dict[str, Callable[..., Tensor]] = {"mean": torch.mean, "max": torch.amax, "min": torch.amin}
    abar = reductions[x.head_reduction](abar_of_heads(x, lse_varies), 1)
    return (over_sums(abar) if x.row_normalize else abar,)


def relevancy_step(x: Any, lse_varies: bool) -> tuple[Tensor]:
    """The part of relevancy @ Abar from these queries, (b, T, M)."""
    each = abar_of_heads(x, lse_varies)
    abar = each.sum(1) / max(1, each.shape[1])
    return (x.relevancy @ (over_sums(abar) if x.row_normalize else abar),)


def attention_statistics(x: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mass (b, H, i, G), entropy, maximum (b, H, i), and the part of received (b, H, M) from these queries. The maximum is the
    weight at the first of the largest."""
    prob, _ = probabilities(x)
    groups = torch.arange(x.num_groups, device=prob.device)
    member = prob.new_zeros(x.key.shape[2], x.num_groups) if x.key_groups is None else (x.key_groups[..., None] == groups)
    mass = prob @ (member if member.dim() == 2 else member[:, None]).to(prob.dtype)
    entropy = -(prob * torch.where(prob > 0, prob, 1.0).log()).sum(-1)
    if prob.shape[-1]:
        maximum = prob.gather(-1, prob.detach().argmax(-1, keepdim=True))[..., 0]
    else:
        maximum = prob.sum(-1)
    received = prob.sum(2) if x.row_weight is None else (x.row_weight[..., None] * prob).sum(2)
    return mass, entropy, maximum, received
