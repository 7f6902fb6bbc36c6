"""attention_divergence and indexer_divergence in Triton: strips of rows, small gradients, and what they refuse."""

import importlib
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import as_dtype, assert_all_close_to, outputs_and_grads
from tests.helpers.ops.backends import assert_refused

ATTENTION, INDEXER = "attention_divergence", "indexer_divergence"


def make(operator: str, n: int, m: int, d: int, other_d: int, *, others: int = 2, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of two query heads and one of keys."""
    shapes: dict[str, tuple[int, ...]] = {"query": (2, n, d), "key": (1, m, d)}
    if operator == ATTENTION:
        shapes |= {"other_query": (others, n, other_d), "other_key": (others, m, other_d)}
    else:
        shapes |= {"index_query": (2, n, other_d), "index_key": (m, other_d), "index_weights": (2, n)}
    return {name: torch.randn(1, *shape, dtype=dtype) for name, shape in shapes.items()}


def run(operator: str, **options: Any) -> tuple[Any, Any]:
    """By the kernels, and by the formula."""
    of_kernels = partial(getattr(va, operator), enable_gqa=True, backend="triton", **options)
    return of_kernels, partial(getattr(va.reference, operator), enable_gqa=True, **options)


@pytest.mark.parametrize("operator", [ATTENTION, INDEXER])
def test_rows_in_strips(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64, 64 and 12 rows, whose gradients of keys are added."""
    divergence = importlib.import_module("vlattn_fast.kernels.attention_divergence")
    monkeypatch.setattr(divergence, "_STRIP_BYTES", 8 * 70 * 64)
    rows: list[int] = []
    if operator == ATTENTION:
        monkeypatch.setattr(divergence, "_terms_kernel", _Watched(divergence._terms_kernel, rows))
    else:
        kernels = importlib.import_module("vlattn_fast.kernels.indexer_divergence")
        fill_strip = kernels.fill_strip
        monkeypatch.setattr(kernels, "fill_strip", lambda *given: (rows.append(given[-1]), fill_strip(*given)))
    options: dict[str, Any] = {"kind": "kl", "head_mean": True} if operator == ATTENTION else {}
    calls = run(operator, attn_mask=torch.rand(1, 1, 140, 70) < 0.7, **options)
    inputs = make(operator, 140, 70, 8, 8, others=3, dtype=torch.float32)
    assert_all_close_to(*calls, inputs, [torch.randn(1, *[1] * (operator == ATTENTION), 140)])
    assert rows[:7] == ([140, 64, 64, 12, 64, 64, 12] if operator == ATTENTION else [64, 64, 12])


class _Watched:
    """A kernel of which each launch adds its number of rows to a list."""

    def __init__(self, kernel: Any, rows: list[int]) -> None:
        self.kernel, self.rows = kernel, rows

    def __getitem__(self, grid: Any) -> Any:
        def launch(**named: Any) -> None:
            self.rows.append(named["rows"])
            self.kernel[grid](**named)

        return launch


@pytest.mark.parametrize("operator", [ATTENTION, INDEXER])
def test_small_gradients_of_float16(operator: str) -> None:
    """Below 6e-8, which is the least float16: products take gradients of logits relative to the largest of a row."""
    x = make(operator, 20, 70, 16, 16, dtype=torch.float16)
    if operator == ATTENTION:
        options: dict[str, Any] = {"kind": "js", "scale": 2.0**-12, "other_scale": 2.0**-12}
        x |= {name: 1024 * x[name] for name in ("query", "other_query")}
        cotangent, names = torch.full((1, 2, 20), 2.0**-4), ("key", "other_key")
    else:
        options = {}
        x |= {"index_query": 1024 * x["index_query"], "index_weights": x["index_weights"] / 4096}
        cotangent, names = torch.full((1, 20), 2.0**-6), ("index_key",)
    ours, formula = run(operator, **options)
    got, exact = outputs_and_grads(ours, x, [cotangent]), outputs_and_grads(formula, as_dtype(x, torch.float64), [cotangent])
    for name in names:
        error = (got[f"grad {name}"] - exact[f"grad {name}"]).abs().max()
        assert error < 5e-3 * exact[f"grad {name}"].abs().max()


@pytest.mark.parametrize("operator", [ATTENTION, INDEXER])
def test_rows_of_many_features_on_the_other_side_are_refused(operator: str) -> None:
    x = make(operator, 3, 4, 8, 257, dtype=torch.float32)
    assert_refused("triton", "at most 256", partial(run(operator)[0], **x))


def test_chosen_keys_of_many_heads() -> None:
    """More heads than a block of 16 has share a key head, beside another; more indexer heads, too, and more keys than a step."""
    shapes = {"query": (40, 5, 8), "key": (2, 90, 8), "index_query": (18, 5, 12), "index_key": (90, 12), "index_weights": (18, 5)}
    x = {name: torch.randn(1, *shape) for name, shape in shapes.items()}
    chosen = torch.randint(-1, 90, (1, 5, 140))  # some twice
    calls = run(INDEXER, topk_indices=chosen, attn_mask=torch.rand(1, 1, 5, 90) < 0.8)
    assert_all_close_to(*calls, x, [torch.randn(1, 5)])


def test_chosen_keys_alone_are_read() -> None:
    """NaN in the others does not show."""
    x = make(INDEXER, 3, 40, 8, 8, dtype=torch.float32)
    chosen = torch.tensor([[[3, 8, 30], [30, 9, 3], [8, -1, 9]]])
    ours, _ = run(INDEXER, topk_indices=chosen)
    want = ours(**x)
    hidden = torch.ones(40, dtype=torch.bool).index_fill(0, torch.tensor([3, 8, 9, 30]), False)
    filled = {name: y.masked_fill(hidden[:, None], torch.nan) if name.endswith("key") else y for name, y in x.items()}
    assert torch.equal(ours(**filled), want)
