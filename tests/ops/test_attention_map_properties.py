"""attention_map against loops over every entry, whatever the shape."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlattn_fast.ops.attention_map import HEAD_REDUCTIONS, RULES, attention_map


def by_loops(
    query: Any,
    key: Any,
    value: Any,
    grad_output: Any,
    visible: Any,
    scale: float,
    rule: str,
    head_reduction: str,
    row_normalize: bool,
) -> Any:
    """The definition, entry by entry: query (B,H,N,D), key (B,H,M,D), visible (B,H,N,M)."""
    (b, h, n, _), m = query.shape, key.shape[2]
    abar = np.zeros((b, n, m))
    for sample, i in np.ndindex(b, n):
        for j in range(m):
            heads = []
            for head in range(h):
                row = visible[sample, head, i]
                score = [scale * float(query[sample, head, i] @ key[sample, head, x]) for x in range(m)]
                largest = max((s for s, seen in zip(score, row, strict=True) if seen), default=0.0)
                total = sum(math.exp(s - largest) for s, seen in zip(score, row, strict=True) if seen)
                a = math.exp(score[j] - largest) / total if row[j] else 0.0
                if rule == "gradient":
                    a = max(a * float(grad_output[sample, head, i] @ value[sample, head, j]), 0.0)
                heads.append(a)
            abar[sample, i, j] = {"mean": sum(heads) / h, "max": max(heads), "min": min(heads)}[head_reduction]
        total = abar[sample, i].sum()
        if row_normalize and total > 0:
            abar[sample, i] /= total
    return abar


sizes = st.integers(0, 4)


@given(
    shape=st.tuples(st.integers(0, 2), st.integers(1, 3), sizes, sizes, st.integers(0, 3), st.integers(0, 3)),
    seed=st.integers(0, 2**31),
    rule=st.sampled_from(RULES),
    head_reduction=st.sampled_from(HEAD_REDUCTIONS),
    row_normalize=st.booleans(),
    is_causal=st.booleans(),
    masks=st.sets(st.sampled_from(["attn_mask", "key_mask"])),
    backend=st.sampled_from(("reference", "streaming")),
)
def test_against_loops_whatever_the_shape(
    shape: tuple[int, ...],
    seed: int,
    rule: str,
    head_reduction: str,
    row_normalize: bool,
    is_causal: bool,
    masks: set[str],
    backend: str,
) -> None:
    b, h, n, m, d, dv = shape
    random = torch.Generator().manual_seed(seed)
    query, key, value, grad_output = (
        torch.randn(*s, generator=random, dtype=torch.float64) for s in ((b, h, n, d), (b, h, m, d), (b, h, m, dv), (b, h, n, dv))
    )
    visible = torch.ones(b, h, n, m, dtype=torch.bool)
    fixed: dict[str, Any] = {"rule": rule, "head_reduction": head_reduction, "row_normalize": row_normalize, "scale": 0.8}
    if "attn_mask" in masks:
        fixed["attn_mask"] = torch.rand(b, h, n, m, generator=random) > 0.5
        visible &= fixed["attn_mask"]
    if "key_mask" in masks:
        fixed["key_mask"] = torch.rand(b, m, generator=random) > 0.5
        visible &= fixed["key_mask"][:, None, None]
    if is_causal:
        visible &= torch.ones(n, m, dtype=torch.bool).tril()
    also = (value, grad_output) if rule == "gradient" else ()
    got = attention_map(query, key, *also, **fixed, is_causal=is_causal, backend=backend)
    arrays = [x.numpy() for x in (query, key, value, grad_output, visible)]
    np.testing.assert_allclose(got.numpy(), by_loops(*arrays, 0.8, rule, head_reduction, row_normalize), rtol=1e-9, atol=1e-12)
