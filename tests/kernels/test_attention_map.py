"""attention_map in Triton: sizes around its tiles, and what it refuses. The rest stands in tests/ops/test_attention_map.py."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import vlattn_fast as va
from tests.helpers.compare import as_dtype
from tests.helpers.ops import tile_edges
from tests.helpers.ops.backends import assert_refused
from tests.helpers.ops.map_cases import check_map, key_mask, map_inputs
from vlattn_fast.ops.attention_map import RULES


@pytest.mark.parametrize("n, m", tile_edges.TRITON)
def test_sizes_either_side_of_a_tile(n: int, m: int) -> None:
    check_map("triton", as_dtype(map_inputs("attention", n, m, b=1), torch.float32))
    tensors = as_dtype(map_inputs("gradient", n, m, b=1), torch.float32)
    found = check_map("triton", tensors, rule="gradient", is_causal=True, row_normalize=True)
    assert (found[0].triu(1) == 0).all()


@pytest.mark.parametrize("n, m", tile_edges.TRITON_16_BIT)
def test_sizes_either_side_of_a_tile_in_half_precision(n: int, m: int) -> None:
    options = {"row_normalize": True, "head_reduction": "max", "enable_gqa": True}
    for rule in RULES:
        check_map("triton", as_dtype(map_inputs(rule, n, m, b=1, kv=1), torch.bfloat16), rule=rule, **options)
    masks = {"attn_mask": torch.rand(n, m) > 0.2, "key_mask": key_mask(m)}  # tiles of their own
    check_map("triton", as_dtype(map_inputs("gradient", n, m, kv=1), torch.bfloat16), rule="gradient", **options, **masks)


@pytest.mark.parametrize(
    "d, dv, dtype",
    [
        (1, 1, torch.float32),
        (16, 17, torch.float32),
        (256, 256, torch.float32),
        (65, 40, torch.bfloat16),
        (64, 129, torch.bfloat16),
        (256, 200, torch.bfloat16),
    ],
)
def test_head_dims(d: int, dv: int, dtype: torch.dtype) -> None:
    check_map("triton", as_dtype(map_inputs("gradient", 20, 70, d, dv, b=1), dtype), rule="gradient")


def test_what_it_cannot_run_is_refused() -> None:
    q, wide = torch.randn(1, 1, 3, 8), torch.randn(1, 1, 3, 257)
    run = partial(va.attention_map, q.double(), q.double(), backend="triton")
    assert_refused("triton", "float16, bfloat16 and float32", run)
    for query, value in ((wide, q), (q, wide)):
        run = partial(va.attention_map, query, query, value, value, rule="gradient", backend="triton")
        assert_refused("triton", "head_dim of at most 256", run)
