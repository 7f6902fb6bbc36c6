"""attention_map by the CPU kernels: keys that are copied, masks, threads. The rest stands in
tests/ops/test_attention_map.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vlattn_fast as va
from tests.helpers.compare import as_dtype
from tests.helpers.ops import tile_edges
from tests.helpers.ops.backends import LOW, assert_refused
from tests.helpers.ops.map_cases import bool_mask, check_map, finite_rows, float_mask, key_mask, map_inputs
from vlattn_fast.ops.attention_map import HEAD_REDUCTIONS, RULES


@pytest.mark.parametrize("rule, dtype, n", tile_edges.covering(RULES, LOW, tile_edges.CPU_COPIED))
def test_keys_that_are_copied(rule: str, dtype: torch.dtype, n: int) -> None:
    """Halves and padding, under the causal mask: each tile of a head sees more keys than the one before."""
    tensors = as_dtype(map_inputs(rule, n, n, h=4, kv=2), dtype)
    check_map("cpu", tensors, rule=rule, is_causal=True, enable_gqa=True, key_mask=key_mask(n))


@pytest.mark.parametrize(
    "mask, rule, size",
    tile_edges.covering(
        ("bool", "float", "finite rows", "key", "causal", "joined"), RULES, ((5, 40), (8, 600), (9, 40), (20, 900))
    ),
)
def test_masks_of_few_and_of_many_queries(mask: str, rule: str, size: tuple[int, int]) -> None:
    """Up to eight queries have vectors along the keys; more are tiles, here of one and of two blocks of keys."""
    n, m = size
    masks: dict[str, dict[str, Any]] = {
        "bool": {"attn_mask": bool_mask(n, m)},
        "float": {"attn_mask": float_mask(m).double()},
        "finite rows": {"attn_mask": finite_rows(n, m)},
        "key": {"key_mask": key_mask(m)},
        "causal": {"is_causal": True},
        "joined": {"attn_mask": float_mask(m), "key_mask": key_mask(m), "is_causal": True, "softcap": 3.0},
    }
    tensors = as_dtype(map_inputs(rule, n, m, 17, 5), torch.float32)
    for reduction in HEAD_REDUCTIONS:
        check_map("cpu", tensors, rule=rule, head_reduction=reduction, row_normalize=mask == "key", **masks[mask])


@pytest.mark.parametrize("d, dv", [(1, 1), (15, 17), (64, 128), (257, 255)])
def test_head_sizes(d: int, dv: int) -> None:
    for reduction in HEAD_REDUCTIONS:
        check_map(
            "cpu", as_dtype(map_inputs("gradient", 20, 33, d, dv), torch.float32), rule="gradient", head_reduction=reduction
        )


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    "reduction, size, count", tile_edges.covering(HEAD_REDUCTIONS, ((1, 900), (20, 33), (200, 900)), (1, 7, 30, 2, 3))
)
def test_heads_that_threads_share(size: tuple[int, int], reduction: str, count: int) -> None:
    """Five heads, in two to ten tiles: each number of threads is right, and gives the same bits again."""
    n, m = size
    tensors = as_dtype(map_inputs("gradient", n, m, h=5, kv=1), torch.float32)
    options = {"rule": "gradient", "head_reduction": reduction, "enable_gqa": True, "is_causal": n > 1, "row_normalize": m > 33}
    options["key_mask"] = key_mask(m)
    torch.set_num_threads(count)
    found = check_map("cpu", tensors, **options)
    assert torch.equal(found, va.attention_map(**tensors, **options, backend="cpu"))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("reduction", HEAD_REDUCTIONS)
def test_nan_in_a_head_of_another_thread(reduction: str) -> None:
    query, key = (torch.randn(1, 6, length, 8) for length in (3, 40))
    for head in (0, 5):
        broken = query.clone()
        broken[0, head, 1] = torch.nan
        torch.set_num_threads(4)
        found = va.attention_map(broken, key, head_reduction=reduction, backend="cpu")
        assert found[0, 1].isnan().all() and not found[0, (0, 2)].isnan().any()


def test_what_is_refused() -> None:
    words = "the CPU kernels take float16, bfloat16 and float32"
    assert_refused("cpu", words, lambda: va.attention_map(**map_inputs("attention"), backend="cpu"))
