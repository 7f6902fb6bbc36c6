"""attention_divergence in Triton: strips of rows of a mean, small gradients, and what it refuses."""

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


def make(n: int, m: int, d: int, other_d: int, *, heads: int = 2, others: int = 2, keys: int = 1) -> dict[str, Tensor]:
    shapes = {"query": (heads, n, d), "key": (keys, m, d), "other_query": (others, n, other_d), "other_key": (others, m, other_d)}
    return {name: torch.randn(1, *shape, dtype=torch.float64) for name, shape in shapes.items()}


def check(inputs: dict[str, Tensor], **options: Any) -> None:
    options = {"enable_gqa": True, **options}
    heads = 1 if options.get("head_mean") else inputs["query"].shape[1]
    calls = (partial(va.attention_divergence, **options, backend="triton"), partial(va.reference.attention_divergence, **options))
    assert_all_close_to(*calls, inputs, [torch.randn(1, heads, inputs["query"].shape[2])])


def test_a_mean_of_rows_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64, 64 and 12 rows, whose gradients of keys are added."""
    kernels = importlib.import_module("vlattn_fast.kernels.attention_divergence")
    monkeypatch.setattr(kernels, "_STRIP_BYTES", 8 * 70 * 64)
    rows: list[int] = []
    monkeypatch.setattr(kernels, "_terms_kernel", _Watched(kernels._terms_kernel, rows))
    inputs = as_dtype(make(140, 70, 8, 8, others=3), F32)
    mask = torch.rand(1, 1, 140, 70) < 0.7
    check(inputs, kind="kl", head_mean=True, attn_mask=mask)
    assert rows[:7] == [140, 64, 64, 12, 64, 64, 12]


class _Watched:
    """A kernel of which each launch adds its number of rows to a list."""

    def __init__(self, kernel: Any, rows: list[int]) -> None:
        self.kernel, self.rows = kernel, rows

    def __getitem__(self, grid: Any) -> Any:
        def launch(**named: Any) -> None:
            self.rows.append(named["rows"])
            self.kernel[grid](**named)

        return launch


def test_small_gradients_of_float16() -> None:
    """Gradients of logits times the scale are below 6e-8, which is the least float16: products take them relative to the largest
    of a row."""
    x = as_dtype(make(20, 70, 16, 16), F16)
    x |= {name: 1024 * x[name] for name in ("query", "other_query")}
    options: dict[str, Any] = {"kind": "js", "enable_gqa": True, "scale": 2.0**-12, "other_scale": 2.0**-12}
    cotangents = [torch.full((1, 2, 20), 2.0**-4)]
    got = outputs_and_grads(partial(va.attention_divergence, **options, backend="triton"), x, cotangents)
    exact = outputs_and_grads(partial(va.reference.attention_divergence, **options), as_dtype(x, torch.float64), cotangents)
    for name in ("grad key", "grad other_key"):
        assert float((got[name] - exact[name]).abs().max()) < 5e-3 * float(exact[name].abs().max())


@pytest.mark.parametrize("d, other_d", [(257, 8), (8, 257)])
def test_rows_of_many_features_are_refused(d: int, other_d: int) -> None:
    x = as_dtype(make(3, 4, d, other_d), F32)
    assert_refused("triton", "at most 256", partial(va.attention_divergence, **x, enable_gqa=True, backend="triton"))
