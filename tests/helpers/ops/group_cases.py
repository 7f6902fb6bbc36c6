"""Groups, biases and calls of the tests of group_bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.helpers.ops.backends import finest

B, H, N, M, D, DV, GQ, GK = 2, 4, 21, 37, 8, 6, 3, 2
ON_GROUPS = ("score_attention", "relevancy_attention", "relevancy_step", "attention_map", "attention_statistics")


def tensors(backend: str = "streaming", *, heads: int = H, n: int = N, m: int = M, batch: int = B) -> dict[str, Tensor]:
    """query, key, value and the bias, whose first pair of groups is masked in the second head."""
    torch.manual_seed(0)
    shapes = {"query": (batch, H, n, D), "key": (batch, heads, m, D), "value": (batch, heads, m, DV)}
    made = {name: torch.randn(*shape, dtype=finest(backend)) for name, shape in shapes.items()}
    bias = torch.randn(H, GQ, GK, dtype=finest(backend))
    bias[1, 0, 0] = -torch.inf
    return {**made, "group_bias": bias}


def groups(n: int = N, m: int = M, batch: int = B) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    of_queries = torch.randint(-1, GQ, (batch, n), generator=generator)
    return {"query_groups": of_queries, "key_groups": torch.randint(-1, GK, (batch, m), generator=generator)}


def operator_calls(backend: str) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
    """Tensors and options of calls of the operators but score_attention."""
    dtype = finest(backend)
    x, square = tensors(backend), tensors(backend, m=N)
    maps = {name: each for name, each in x.items() if name != "value"}
    by_gradient = {**x, "grad_output": torch.randn(B, H, N, DV, dtype=dtype)}
    carried, gate = torch.rand(B, 2, N, dtype=dtype), torch.linspace(0.5, 1.5, H, dtype=dtype)
    weighted, sink = {**maps, "row_weight": torch.rand(B, N, dtype=dtype)}, {"sink": torch.linspace(-1, 1, H, dtype=dtype)}
    of_tokens, rollout = groups(m=N), {"rule": "attention", "softcap": 1.5}
    return {
        "relevancy_attention": ({**square, "head_gate": gate, "carrier": carried}, of_tokens),
        "relevancy_attention, rollout": ({**square, "carrier": carried}, {**of_tokens, **rollout}),
        "relevancy_step": ({**by_gradient, "relevancy": carried}, groups()),
        "relevancy_step, attention": (maps | {"relevancy": carried}, {**groups(), "rule": "attention", "row_normalize": True}),
        "attention_map": (by_gradient, {**groups(), "rule": "gradient", "row_normalize": True}),
        "attention_map, max": (maps, {**groups(), "head_reduction": "max", "is_causal": True}),
        "attention_statistics": (weighted, groups()),
        "attention_statistics, sink": (maps | sink, {**groups(), "statistics": ("mass", "lse", "received")}),
    }


TITLES = tuple(operator_calls("streaming"))
