"""indexer_divergence in Triton: strips of rows, small gradients, and what it refuses."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import as_dtype, assert_all_close_to, outputs_and_grads
from tests.helpers.ops.backends import assert_refused

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def make(n: int, m: int, d: int, index_d: int, *, heads: int = 2, index_heads: int = 2) -> dict[str, Tensor]:
    shapes = {"query": (heads, n, d), "key": (1, m, d), "index_query": (index_heads, n, index_d)}
    shapes |= {"index_key": (m, index_d), "index_weights": (index_heads, n)}
    return {name: torch.randn(1, *shape, dtype=torch.float64) for name, shape in shapes.items()}


def check(inputs: dict[str, Tensor], **options: Any) -> None:
    options = {"enable_gqa": True, **options}
    calls = (partial(va.indexer_divergence, **options, backend="triton"), partial(va.reference.indexer_divergence, **options))
    assert_all_close_to(*calls, inputs, [torch.randn(1, inputs["query"].shape[2])])


def test_rows_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64, 64 and 12 rows, whose gradients of keys are added."""
    divergence = importlib.import_module("vlattn_fast.kernels.attention_divergence")
    kernels = importlib.import_module("vlattn_fast.kernels.indexer_divergence")
    monkeypatch.setattr(divergence, "_STRIP_BYTES", 8 * 70 * 64)
    rows: list[int] = []
    fill_strip = kernels.fill_strip
    monkeypatch.setattr(kernels, "fill_strip", lambda *given: (rows.append(given[-1]), fill_strip(*given)))
    check(as_dtype(make(140, 70, 8, 8), F32), attn_mask=torch.rand(1, 1, 140, 70) < 0.7)
    assert rows == [64, 64, 12]


def test_small_gradients_of_float16() -> None:
    """Those of products are below 6e-8, which is the least float16: they are multiplied relative to the largest of a row."""
    x = as_dtype(make(20, 70, 16, 16), F16)
    x |= {"index_query": 1024 * x["index_query"], "index_weights": x["index_weights"] / 4096}
    cotangents = [torch.full((1, 20), 2.0**-6)]
    got = outputs_and_grads(partial(va.indexer_divergence, enable_gqa=True, backend="triton"), x, cotangents)
    given = as_dtype(x, torch.float64)
    exact = outputs_and_grads(partial(va.reference.indexer_divergence, enable_gqa=True), given, cotangents)["grad index_key"]
    assert float((got["grad index_key"] - exact).abs().max()) < 5e-3 * float(exact.abs().max())


@pytest.mark.parametrize("d, index_d", [(257, 8), (8, 257)])
def test_rows_of_many_features_are_refused(d: int, index_d: int) -> None:
    x = as_dtype(make(3, 4, d, index_d), F32)
    assert_refused("triton", "at most 256", partial(va.indexer_divergence, **x, enable_gqa=True, backend="triton"))


def test_chosen_keys_are_refused() -> None:
    x = as_dtype(make(3, 4, 8, 8), F32)
    chosen = {"topk_indices": torch.zeros(1, 3, 2, dtype=torch.int64), "enable_gqa": True}
    assert_refused("triton", "take no topk_indices", partial(va.indexer_divergence, **x, **chosen, backend="triton"))
