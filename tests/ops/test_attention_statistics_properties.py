"""attention_statistics against loops over every entry, whatever the shape."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.ops.map_cases import STATISTICS
from vlattn_fast.ops.attention_statistics import attention_statistics


def by_loops(
    query: Any, key: Any, visible: Any, bias: Any, groups: Any, num_groups: int, weight: Any, scale: float
) -> dict[str, Any]:
    """The definitions, entry by entry: query (B,H,N,D), key (B,H,M,D), visible and bias (B,H,N,M), groups (B,M)."""
    (b, h, n, _), m = query.shape, key.shape[2]
    found = {
        "mass": np.zeros((b, h, n, num_groups)),
        "entropy": np.zeros((b, h, n)),
        "maximum": np.zeros((b, h, n)),
        "argmax": np.full((b, h, n), -1),
        "received": np.zeros((b, h, m)),
    }
    for row in np.ndindex(b, h, n):
        keys = [j for j in range(m) if visible[row][j]]
        score = {j: scale * float(query[row] @ key[row[0], row[1], j]) + bias[row][j] for j in keys}
        total = sum(math.exp(s - max(score.values())) for s in score.values())
        for j in keys:
            a = math.exp(score[j] - max(score.values())) / total
            if groups[row[0]][j] >= 0:
                found["mass"][row][groups[row[0]][j]] += a
            found["entropy"][row] -= a * math.log(a) if a > 0 else 0.0
            if a > found["maximum"][row]:
                found["maximum"][row], found["argmax"][row] = a, j
            found["received"][row[:2]][j] += weight[row[0]][row[2]] * a
    return found


@given(
    shape=st.tuples(st.integers(0, 2), *[st.integers(0, n) for n in (2, 4, 4)], st.integers(0, 3), st.integers(0, 4)),
    seed=st.integers(0, 2**31),
    masked=st.sampled_from(["none", "bool", "float", "key", "causal", "all"]),
    backend=st.sampled_from(("reference", "streaming")),
)
def test_against_loops_whatever_the_shape(shape: tuple[int, ...], seed: int, masked: str, backend: str) -> None:
    b, h, n, m, d, num_groups = shape
    random = torch.Generator().manual_seed(seed)
    query, key, weight = (
        torch.randn(*s, generator=random, dtype=torch.float64).requires_grad_() for s in ((b, h, n, d), (b, h, m, d), (b, n))
    )
    groups = torch.randint(-1, num_groups, (b, m), generator=random)
    visible, bias = torch.ones(b, h, n, m, dtype=torch.bool), torch.zeros(b, h, n, m, dtype=torch.float64)
    given_masks: dict[str, Any] = {"is_causal": masked in ("causal", "all")}
    if masked == "bool":
        given_masks["attn_mask"] = visible = torch.rand(b, h, n, m, generator=random) > 0.5
    if masked in ("float", "all"):
        visible = torch.rand(b, h, n, m, generator=random) > 0.4
        bias = torch.randn(b, h, n, m, generator=random, dtype=torch.float64)
        given_masks["attn_mask"] = bias.masked_fill(~visible, -torch.inf)
    if masked in ("key", "all"):
        given_masks["key_mask"] = torch.rand(b, m, generator=random) > 0.5
        visible = visible & given_masks["key_mask"][:, None, None]
    if given_masks["is_causal"]:
        visible = visible & torch.ones(n, m, dtype=torch.bool).tril()
    found = attention_statistics(
        query, key, key_groups=groups, num_groups=num_groups, row_weight=weight, scale=0.8, backend=backend, **given_masks
    )
    want = by_loops(
        *(x.detach().numpy() for x in (query, key)),
        visible.numpy(),
        bias.numpy(),
        groups.numpy(),
        num_groups,
        weight.detach().numpy(),
        0.8,
    )
    for name, got in found._asdict().items():
        np.testing.assert_allclose(got.detach().numpy(), want[name], rtol=0, atol=1e-12, err_msg=name)
    sum(getattr(found, name).sum() for name in STATISTICS).backward()
    for x in (query, key, weight):
        assert x.grad is not None and x.grad.isfinite().all()
