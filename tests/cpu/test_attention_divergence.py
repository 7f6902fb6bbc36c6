"""attention_divergence and indexer_divergence by the CPU kernels: chosen keys, and extreme differences."""

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import as_dtype, assert_all_close_to
from tests.helpers.ops import tile_edges
from tests.helpers.ops.backends import LOW

OPERATORS = "attention_divergence", "indexer_divergence"


def tensors(
    n: int, m: int, d: int = 6, other_d: int = 5, b: int = 1, heads: int = 2, shared: int = 1, operator: str = OPERATORS[0]
) -> dict[str, Tensor]:
    """The other side has as many heads of keys as queries, an indexer one for three of queries."""
    shapes: dict[str, tuple[int, ...]] = {"query": (heads, n, d), "key": (heads // shared, m, d)}
    if operator == "attention_divergence":
        shapes |= {"other_query": (heads, n, other_d), "other_key": (heads, m, other_d)}
    else:
        shapes |= {"index_query": (3, n, other_d), "index_key": (m, other_d), "index_weights": (3, n)}
    return {name: torch.randn(b, *shape, dtype=torch.float64) for name, shape in shapes.items()}


def chosen(inputs: dict[str, Tensor], count: int) -> Tensor:
    """Indices of keys, a tenth of which are none; each key several times where there are few."""
    (b, _, n, _), m = inputs["query"].shape, inputs["key"].shape[2]
    return torch.where(torch.rand(b, n, count) < 0.1, -1, torch.randint(m, (b, n, count)))


def check(inputs: dict[str, Tensor], **options: Any) -> None:
    operator = OPERATORS["index_query" in inputs]
    b, heads, n, _ = inputs["query"].shape
    shape = (b, n) if operator == "indexer_divergence" else (b, 1 if options.get("head_mean") else heads, n)
    ours = partial(getattr(va, operator), **options, backend="cpu")
    assert_all_close_to(ours, partial(getattr(va.reference, operator), **options), inputs, [torch.randn(shape)])


@pytest.mark.parametrize("operator, head_mean", [(OPERATORS[0], False), (OPERATORS[0], True), (OPERATORS[1], None)])
def test_masks_of_float64(operator: str, head_mean: bool | None) -> None:
    mask = 1e6 * torch.randn(2, 1, 20, 1, dtype=torch.float64) + torch.randn(2, 1, 20, 70, dtype=torch.float64)
    inputs = as_dtype(tensors(20, 70, b=2, operator=operator), torch.float32)
    options = {"head_mean": head_mean, "kind": "hellinger"} if head_mean is not None else {}
    check(inputs, **options, attn_mask=mask)
    if head_mean is None:
        check(inputs, attn_mask=mask, topk_indices=chosen(inputs, 30))


@pytest.mark.parametrize("beta", [1e-6, 0.3, 1 - 1e-3])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_mixtures_of_any_weights(beta: float, size: float) -> None:
    """The weights of two keys differ by factors from 1.001 to e^60."""
    x = as_dtype(tensors(20, 33, heads=1), torch.float32)
    x |= {name: size * x[name] for name in ("query", "other_query")}
    check(x, kind="js", beta=beta)


@pytest.mark.parametrize("dtype, count, d", tile_edges.covering(LOW, (1, 3, 4, 33, 300), (1, 16, 17, 65, 130)))
def test_chosen_keys(dtype: torch.dtype, count: int, d: int) -> None:
    """Keys of any number and size, of heads that share them; a row has fewer, and none."""
    inputs = as_dtype(tensors(19, 200, d, d + 1, b=2, heads=4, shared=2, operator=OPERATORS[1]), dtype)
    indices = chosen(inputs, count)
    indices[0, 7] = -1
    check(inputs, topk_indices=indices, enable_gqa=True)
    visible = {"is_causal": True, "key_mask": torch.rand(2, 200) > 0.3}
    check(inputs, topk_indices=indices, enable_gqa=True, **visible, attn_mask=torch.rand(2, 1, 19, 200) > 0.2)


CALLS: list[tuple[str, dict[str, Any]]] = [
    (OPERATORS[0], {"is_causal": True}),
    (OPERATORS[0], {"kind": "js", "head_mean": True}),
    (OPERATORS[1], {"is_causal": True}),
    (OPERATORS[1], {"topk_indices": torch.randint(60, (1, 700, 20))}),
]


@pytest.mark.parametrize("operator, options", [*itertools.product(OPERATORS, [{}]), CALLS[-1]])
def test_nan_stays_in_its_row(operator: str, options: dict[str, Any]) -> None:
    options = {name: x[:, :20] % 33 for name, x in options.items()}
    x = as_dtype(tensors(20, 33, operator=operator), torch.float32)
    run = partial(getattr(va, operator), **options, backend="cpu")
    clean = run(**x)
    x["other_query" if "other_query" in x else "index_query"][0, 1, 3, 2] = torch.nan
    got, row = run(**x), (0, 1, 3) if operator == "attention_divergence" else (0, 3)
    assert got[row].isnan() and got.isnan().sum() == 1
    assert torch.equal(got[~got.isnan()], clean[~got.isnan()])
