"""Tile edges and limits of the Triton kernels of relevancy_attention and relevancy_step; what they compute otherwise:
tests/ops/test_relevancy_attention.py.

Tiles are 32 x 32 in float32, up to 64 rows and 64 keys in 16 bit, beyond 512 keys 128; carried rows come 16, 64 at a time.
"""

from functools import partial
from typing import Any

import pytest
import torch

import vlattn_fast as va
from tests.helpers.compare import LargestAllocation, assert_all_close_to
from tests.helpers.ops.masks import COMMON, masks_of
from tests.helpers.ops.relevancy_cases import check, tensors
from vlattn_fast.backends.inputs import Attention, RelevancyStepInputs
from vlattn_fast.kernels import _configurations
from vlattn_fast.kernels import relevancy_attention as kernels


@pytest.mark.parametrize("n, rows, causal", [(520, 1, False), (577, 2, True), (513, 17, False)])
def test_tiles_of_128_keys(n: int, rows: int, causal: bool) -> None:
    check("triton", tensors(n, h=1, kv=1, d=8, dv=8, rows=rows, dtype=torch.bfloat16), is_causal=causal)


class OneRow(dict[str, Any]):
    """Tiles of 16 x 32 in r Abar of one row."""

    def get(self, key: str, default: Any = None) -> Any:
        return {**default, "BLOCK_Q": 16, "BLOCK_KV": 32} if key.startswith("relevancy_attention step ") else default


@pytest.mark.parametrize(
    "n, m, options",
    [
        (15, 40, {}),
        (16, 40, {"rule": "attention"}),
        (33, 64, {"row_normalize": True}),
        (49, 50, {"key_mask": True}),
        (64, 33, {"attn_mask": True}),
        (70, 70, {"is_causal": True}),
        (112, 40, {"is_causal": True}),
        (50, 40, {"softcap": 2.0}),
    ],
    ids=str,
)
def test_one_row_without_gradients(n: int, m: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_configurations, "OVERRIDES", OneRow(unused={}))
    heads = {"query": (4, n, 8), "key": (2, m, 8), "value": (2, m, 6), "grad_output": (4, n, 6)}
    inputs = {"relevancy": torch.randn(2, 1, n), **{name: torch.randn(2, *shape) for name, shape in heads.items()}}
    masks = {"key_mask": torch.rand(2, m) > 0.3, "attn_mask": torch.rand(4, n, m) > 0.3}
    options = {name: masks[name] if name in masks else option for name, option in options.items()}
    made, formula = (
        partial(operator, enable_gqa=True, **options, **more)
        for operator, more in ((va.relevancy_step, {"backend": "triton"}), (va.reference.relevancy_step, {}))
    )
    assert_all_close_to(made, formula, inputs, scales={"out0": 1e-3}, grads=False)


def test_infinite_values_and_gradients_of_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last tile of queries has padding, whose products with them are NaN."""
    monkeypatch.setattr(_configurations, "OVERRIDES", OneRow(unused={}))
    relevancy, query, key, value = torch.rand(1, 1, 50), *(torch.randn(1, 1, 50, 8) for _ in range(3))
    value[:, :, 3] = -torch.inf
    grad_output = torch.rand(1, 1, 50, 8) + 0.1
    got, expected = (
        function(relevancy, query, key, value, grad_output, **options)
        for function, options in ((va.relevancy_step, {"backend": "triton"}), (va.reference.relevancy_step, {}))
    )
    assert got[0, 0, 3] == expected[0, 0, 3] == 0.0
    torch.testing.assert_close(got, expected)


@pytest.fixture
def _without_stored_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a sample's map is too large for `step` to store it."""
    monkeypatch.setattr(kernels, "_stored_maps", lambda *_: 0)


@pytest.mark.parametrize("rows", (16, 17, 64, 70, 130))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.usefixtures("_without_stored_maps")
def test_number_of_carried_rows(dtype: torch.dtype, rows: int) -> None:
    inputs = tensors(40, h=1, kv=1, rows=rows, dtype=dtype)
    if rows % 2:
        check("triton", inputs, rule="attention", row_normalize=True, is_causal=True)
    else:
        check("triton", inputs, residual_weight=torch.rand(1, 40), attention_weight=torch.randn(1, 40))


@pytest.mark.usefixtures("_without_stored_maps")
def test_grouped_heads_with_many_carried_rows() -> None:
    check("triton", tensors(40, h=4, kv=2, rows=70), row_normalize=True)


@pytest.mark.parametrize("mask", (*COMMON, "bool of each H", "float, transposed", "no pair"))
def test_many_carried_rows_by_stored_maps(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample at a time, with masks that are a sample's own or shared, and all at once."""
    for samples in (1, 5) if mask in ("bool of each H", "all") else (1,):
        monkeypatch.setattr(kernels, "_stored_maps", lambda r, *_, samples=samples: samples if r.shape[1] > kernels.MAX_T else 0)
        inputs = tensors(20, b=2, h=2, kv=1, rows=65, dtype=torch.bfloat16 if samples == 1 else torch.float32)
        options = {"rule": "attention" if samples == 1 else "gradient", "row_normalize": samples == 5}
        check("triton", inputs, **options, **masks_of(mask, 20, 20))


def test_maps_are_stored_where_they_are_small() -> None:
    """No more elements than the queries, the result or 2^22, and none for few rows."""

    def samples(batch: int, heads: int, n: int, rows: int, size: int = 64) -> int:
        query = torch.empty(batch, heads, n, size, device="meta")
        return kernels._stored_maps(torch.empty(batch, rows, n, device="meta"), query, query)

    assert samples(64, 16, 577, 577) == 64 * 16 * 64 // 577  # CLIP ViT-L/14@336
    assert samples(64, 16, 577, 64) == 0
    assert samples(1, 2, 577, 65) == (1 << 22) // 577**2
    assert samples(1, 32, 16384, 128, 128) == 0 and samples(1, 32, 16384, 16384, 128) == 1
    assert samples(1, 16, 577, 577, 0) == samples(0, 16, 577, 577) == 0


@pytest.mark.parametrize("rows", (1, 3))
def test_an_infinite_value_beside_rows_that_are_not_there(rows: int) -> None:
    """It is infinite in its own key's relevancy; times the zeros behind the last row it would be NaN."""
    query, key, value, _ = tensors(35, h=1, kv=1, dv=1).values()
    value[0, 0, 20] = torch.inf
    step = va.relevancy_step(torch.ones(1, rows, 35), query, key, value, torch.ones(1, 1, 35, 1), backend="triton")
    assert torch.equal(step.isfinite(), (torch.arange(35) != 20).expand(1, rows, 35)) and step[0, 0, 20] == torch.inf


@pytest.mark.parametrize("mask", ("bool of each H", "keys and causal"))
def test_float32_rows_that_are_multiplied_in_parts(mask: str) -> None:
    """Of more than 128 features, 64 at a time; query heads that share a key, over several tiles of 64."""
    check("triton", tensors(70, b=2, kv=1, d=192, dv=136, rows=1), row_normalize=True, **masks_of(mask, 70, 70))


def test_no_partial_sum_is_larger_than_the_output_where_there_are_many_rows() -> None:
    rows, n, h = 130, 64, 8
    query, key, value, _ = tensors(n, h=h, kv=h, d=3, dv=3).values()
    inputs = RelevancyStepInputs(
        relevancy=torch.rand(1, rows, n),
        attention=Attention(query=query, key=key),
        value=value,
        grad_output=value,
        lse=None,
        rule="gradient",
        row_normalize=False,
        backend="triton",
    )
    with LargestAllocation() as largest:
        kernels.step(inputs)
    assert largest.bytes <= 4 * rows * n
