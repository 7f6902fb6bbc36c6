"""W x + b and an activation, for scores with weights: once written out for formulas, once for features."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast._ground.checks import check_choice, check_number
from vlattn_fast._ground.tensors import compute_dtype, expand_heads, linear, product
from vlattn_fast.scores.score import ACTIVATIONS

# --- for formulas ---


def projected(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """W x + b for each row of (B, H, N, D)."""
    y = x if weight is None else product(x, weight.mT)
    return y if bias is None else y + bias[..., None, :]


def activated(x: Tensor, activation: str | None, negative_slope: float) -> Tensor:
    match activation:
        case "relu":
            return torch.relu(x)
        case "leaky_relu":
            return F.leaky_relu(x, negative_slope)
        case "tanh":
            return torch.tanh(x)
        case "sigmoid":
            return torch.sigmoid(x)
    return x


# --- for features ---


def sides(score: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Checks the options; returns the side that the score projects and the one that the projection meets."""
    check_choice("projects", score.projects, ("key", "query"))
    check_choice("activation", score.activation, ACTIVATIONS)
    check_number("negative_slope", score.negative_slope)
    return (key, query) if score.projects == "key" else (query, key)


def per_head(key: Tensor, query: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Returns the key, with as many heads as the query if key heads are shared and a parameter is per query head."""
    has_heads = (weight is not None and weight.dim() == 3) or (bias is not None and bias.dim() == 2)
    return expand_heads(key, query.shape[1]) if has_heads else key


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """W x + b on the last axis of (B, H, N, D); weight (A, D) or (H, A, D), bias (A) or (H, A)."""
    if weight is None:
        return x if bias is None else x + _for_rows(bias)
    if bias is None or (weight.dim() == 2 and bias.dim() == 1):
        return linear(x, weight, bias)
    return linear(x, weight) + _for_rows(bias)


def project(weight: Tensor | None, bias: Tensor | None, query: Tensor, key: Tensor, projects: str) -> tuple[Tensor, Tensor]:
    """Returns query and key, with W x + b in place of the one that `projects` names."""
    if weight is None and bias is None:
        return query, key
    if projects == "query":
        return affine(query, weight, bias), key
    return query, affine(per_head(key, query, weight, bias), weight, bias)


def row_dot(x: Tensor, bias: Tensor) -> Tensor:
    """x . b for each row of (B, H, N, D); bias (D) or (H, D)."""
    dtype = compute_dtype(x)
    return (x.to(dtype) * _for_rows(bias).to(dtype)).sum(-1)


def _for_rows(bias: Tensor) -> Tensor:
    """(A) or (H, A) as it broadcasts to (B, H, N, A)."""
    return bias if bias.dim() == 1 else bias[:, None]
