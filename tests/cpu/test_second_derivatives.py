"""Second derivatives of score_attention by the CPU kernel: sizes around tiles of queries and blocks of keys, masks, dtypes,
layouts and threads. The rest stands in tests/ops/test_second_derivatives.py."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.compare import outputs_and_grads
from tests.helpers.ops import tile_edges
from tests.helpers.ops.backends import LOW
from tests.helpers.ops.score_cases import MASKS, padding
from tests.helpers.ops.second_cases import check, gradients, inputs
from vlattn_fast import score_attention

LAYOUTS = ("contiguous", "transposed", "sliced", "offset", "expanded")
ODD = ((4, 4), (5, 3), (16, 33), (31, 16), (64, 65), (1, 257))  # numbers of a query and of a value


@pytest.mark.parametrize("n, m", tile_edges.CPU)
def test_sizes_either_side_of_a_tile(n: int, m: int) -> None:
    check(inputs(n, m), return_lse=True)


@pytest.mark.parametrize("mask, size, dtype", tile_edges.covering(tuple(MASKS), tile_edges.CPU_SEVERAL, LOW))
def test_masks_across_tiles_and_blocks(mask: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    n, m = size
    found = check(inputs(n, m, b=2, dtype=dtype), score="dot", scale=0.3, **MASKS[mask](n, m))
    assert not any(x.isnan().any() for x in found.values())


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("n", tile_edges.CPU_COPIED)
def test_keys_that_are_copied(n: int, dtype: torch.dtype) -> None:
    """Halves and padding, under the causal mask and with key heads that are shared: later tiles see more of a block."""
    check(inputs(n, n, b=2, h=4, dtype=dtype), key_mask=padding(n), is_causal=True)


@pytest.mark.parametrize("sizes, layout, dtype, n", tile_edges.covering(ODD, LAYOUTS, LOW, (1, 2, 35)))
def test_head_sizes_and_layouts(sizes: tuple[int, int], layout: str, dtype: torch.dtype, n: int) -> None:
    d, dv = sizes
    check(inputs(n, 33, b=2, d=d, dv=dv, dtype=dtype), layout=layout, return_lse=True)


@pytest.mark.usefixtures("threads")
@pytest.mark.slow
def test_threads_that_share_a_head() -> None:
    """Each number of threads is right, and gives the same bits again."""
    for h, kv, n, m in ((1, 1, 200, 300), (3, 1, 100, 900), (6, 3, 20, 20)):
        tensors = inputs(n, m, h=h, kv=kv)
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            check(tensors, return_lse=True)
            run = gradients(score_attention, backend="cpu", return_lse=True)
            first, again = outputs_and_grads(run, tensors), outputs_and_grads(run, tensors)
            assert all(torch.equal(x, again[name]) for name, x in first.items())
