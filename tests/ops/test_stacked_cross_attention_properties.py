"""stacked_cross_attention against loops over every pair, and streaming against the formula whatever the shape."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.compare import outputs_and_grads
from tests.helpers.ops.stacked_cross_attention_cases import random_lengths, tensors
from vlattn_fast import stacked_cross_attention
from vlattn_fast.backends import reference
from vlattn_fast.ops.stacked_cross_attention import AGGREGATIONS, DIRECTIONS, FIRST_NORMS


def naive(images, captions, words, regions, direction, first_norm, smooth, aggregation, lambda_lse):
    """SCAN eq. 1-8 number by number."""
    out = np.zeros((len(images), len(captions)))
    for i, j in np.ndindex(*out.shape):
        image, caption = images[i][: regions[i]], captions[j][: words[j]]
        q, c = (caption, image) if direction == "t2i" else (image, caption)
        x = np.array([[np.dot(a, b) for b in c] for a in q])
        for k in range(len(c)):
            column = x[:, k].copy()
            if first_norm and "clipped" in first_norm:
                column = np.array([v if v >= 0 else 0.1 * v for v in column])
            if first_norm == "softmax":
                column = np.exp(column) / sum(np.exp(column))
            elif first_norm and "l2" in first_norm:
                column = column / (math.sqrt(sum(column**2)) + 1e-8)
            elif first_norm and "l1" in first_norm:
                column = column / (sum(abs(column)) + 1e-8)
            x[:, k] = column
        r = []
        for k in range(len(q)):
            weight = np.exp(smooth * x[k]) / sum(np.exp(smooth * x[k]))
            a = sum(weight[p] * c[p] for p in range(len(c)))
            r.append(np.dot(q[k], a) / max(math.sqrt(np.dot(q[k], q[k])) * math.sqrt(np.dot(a, a)), 1e-8))
        out[i, j] = {
            "logsumexp": math.log(sum(math.exp(lambda_lse * v) for v in r)) / lambda_lse,
            "max": max(r),
            "sum": sum(r),
            "mean": sum(r) / len(r),
        }[aggregation]
    return out


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("first_norm", FIRST_NORMS)
def test_reference_matches_loops(first_norm: str | None, direction: str) -> None:
    images, captions = torch.randn(3, 5, 7, dtype=torch.float64), torch.randn(4, 6, 7, dtype=torch.float64)
    words, regions = torch.tensor([6, 1, 3, 5]), torch.tensor([5, 1, 4])
    for aggregation in AGGREGATIONS:
        options = dict(direction=direction, first_norm=first_norm, smooth=1.7, aggregation=aggregation, lambda_lse=3.0)
        got = reference.stacked_cross_attention(images, captions, words, regions, **options)
        want = naive(images.numpy(), captions.numpy(), words.tolist(), regions.tolist(), **options)
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-12)


def test_damsm_is_a_stacked_cross_attention() -> None:
    images, captions = torch.randn(3, 9, 5, dtype=torch.float64), torch.randn(4, 6, 5, dtype=torch.float64)
    words, regions = torch.tensor([6, 2, 1, 4]), torch.tensor([9, 3, 5])
    got = reference.damsm_similarity(images, captions, words, regions, gamma1=3.0, gamma2=2.0)
    want = naive(images.numpy(), captions.numpy(), words, regions, "t2i", "softmax", 3.0, "logsumexp", 2.0)
    np.testing.assert_allclose(got.numpy(), 2.0 * want, rtol=1e-12)


@given(
    sizes=st.tuples(*(st.integers(0, 3),) * 2, *(st.integers(0, 5),) * 3),
    seed=st.integers(0, 99),
    direction=st.sampled_from(DIRECTIONS),
    first_norm=st.sampled_from(FIRST_NORMS),
    aggregation=st.sampled_from(AGGREGATIONS),
    use_lengths=st.booleans(),
)
def test_any_shape(
    sizes: tuple[int, ...], seed: int, direction: str, first_norm: str | None, aggregation: str, use_lengths: bool
) -> None:
    torch.manual_seed(seed)
    inputs = tensors(sizes[:2], *sizes[2:])
    lengths = {f"{side}_lengths": random_lengths(inputs[f"{side}s"], 0) for side in ("caption", "image")} if use_lengths else {}
    options = dict(direction=direction, first_norm=first_norm, aggregation=aggregation)
    got, want = (
        outputs_and_grads(partial(f, **lengths, **options), inputs)
        for f in (stacked_cross_attention, reference.stacked_cross_attention)
    )
    for name, x in want.items():
        assert x.isfinite().all()
        torch.testing.assert_close(got[name], x, rtol=1e-9, atol=1e-9)
