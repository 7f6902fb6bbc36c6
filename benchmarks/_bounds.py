"""Parts that operators' benchmarks share: plain SDPA of the same shape as the bound, the plain map, the floors of attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlattn_fast.benchmarks._measure import Pass, Tensors
from vlattn_fast.benchmarks._workloads import Sizes


def sdpa(tensors: Tensors, is_causal: bool = False) -> Tensor:
    return F.scaled_dot_product_attention(tensors["query"], tensors["key"], tensors["value"], is_causal=is_causal)


def softmax_map(query: Tensor, key: Tensor, is_causal: bool = False) -> Tensor:
    """A (B, H, N, M) as models compute A in eager mode."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1), -torch.inf)
    return torch.softmax(scores, dim=-1)


def pairs(sizes: Sizes) -> int:
    """B H N N; N is text and image together where a workload has both."""
    n = tokens(sizes)
    return sizes["B"] * sizes["H"] * n * n


def tokens(sizes: Sizes) -> int:
    return sizes.get("N") or sizes["L"] + sizes["V"]


def passes(sizes: Sizes, dtype: torch.dtype, *terms: tuple[float, float, float], extra_bytes: float = 0.0) -> tuple[Pass, ...]:
    """One pass for each (matrix products over the pairs, tensors of B H N D read or written, exponentials a pair)."""
    per_tensor = sizes["B"] * sizes["H"] * tokens(sizes) * sizes["D"] * dtype.itemsize
    seen = pairs(sizes) / (2 if sizes.get("causal") else 1)
    return tuple(
        Pass(2 * products * seen * sizes["D"], count * per_tensor + extra_bytes, exps * seen) for products, count, exps in terms
    )


SDPA_FORWARD, SDPA_BACKWARD = (2, 4, 1), (5, 8, 1)
