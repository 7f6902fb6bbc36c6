"""Every backend gives the formula, with all masks and grouped heads at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vlattn_fast as va
from vlattn_fast import scores as S


@pytest.mark.parametrize("backend", ("reference", "streaming", "auto"))
def test_each_backend_gives_the_formula(backend: str) -> None:
    q, k, v, c = torch.randn(2, 4, 3, 6), torch.randn(2, 2, 3, 6), torch.randn(2, 2, 3, 5), torch.rand(2, 1, 3)
    options: dict[str, Any] = {"is_causal": True, "enable_gqa": True, "scale": 0.3, "key_mask": torch.rand(2, 3) > 0.2}
    for score in ("dot", S.General(torch.randn(6, 6), activation="tanh")):
        got = va.score_attention(q, k, v, score=score, return_lse=True, backend=backend, **options)
        torch.testing.assert_close(got, va.reference.score_attention(q, k, v, score=score, return_lse=True, **options))
    torch.testing.assert_close(
        va.relevancy_attention(q, k, v, c, backend=backend, **options)[0],
        va.reference.relevancy_attention(q, k, v, c, **options)[0],
    )
    grad = torch.randn(2, 4, 3, 5)
    torch.testing.assert_close(
        va.relevancy_step(c, q, k, v, grad, backend=backend, **options), va.reference.relevancy_step(c, q, k, v, grad, **options)
    )
