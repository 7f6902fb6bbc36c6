"""Groups, biases and calls of the tests of group_bias."""

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
