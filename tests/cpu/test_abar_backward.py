"""Gradients of relevancy_step and attention_map by the CPU kernel: sizes around tiles of queries and blocks of keys, carried
rows, threads, and key heads that are taken some at a time. The rest stands in tests/ops/test_abar_gradients.py."""

from __future__ import annotations

import pytest
import torch

import vlattn_fast as va
from tests.helpers.ops import tile_edges
from tests.helpers.ops.abar_cases import MASKS, check, inputs
from tests.helpers.ops.backends import LOW
from tests.helpers.ops.relevancy_cases import padding

ZEROS = {"query": 1.0, "key": 1.0}  # of a row with one key the gradient is zero: errors are held to what is subtracted


@pytest.mark.parametrize("n, m", tile_edges.CPU)
def test_sizes_either_side_of_a_tile(n: int, m: int) -> None:
    make = lambda seed: inputs(n, m, b=1, d=17, seed=seed)  # noqa: E731
    check("cpu", "step", make, rule="gradient", scales=ZEROS)
    check("cpu", "map", make, rule="gradient", is_causal=True, row_normalize=True, scales=ZEROS)
    if n * m < 2000:  # with many pairs some always nearly tie
        check("cpu", "map", make, rule="attention", head_reduction="max", scales=ZEROS)


@pytest.mark.parametrize(
    "rule, row_normalize, mask, n", tile_edges.covering(("gradient", "attention"), (False, True), tuple(MASKS), (60, 800))
)
def test_masks_across_tiles_and_blocks(rule: str, row_normalize: bool, mask: str, n: int) -> None:
    make = lambda seed: inputs(20, n, seed=seed)  # noqa: E731
    check("cpu", "step", make, rule=rule, row_normalize=row_normalize, **MASKS[mask](20, n))


@pytest.mark.parametrize("rows", (1, 2, 3, 16, 17, 130))
def test_carried_rows(rows: int) -> None:
    for n in (2, 70):
        check("cpu", "step", lambda seed, n=n: inputs(n, 40, h=4, rows=rows, seed=seed), rule="gradient", row_normalize=rows > 2)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.slow
def test_keys_that_are_copied(dtype: torch.dtype) -> None:
    """Halves and padding, under the causal mask: later tiles see more of a block."""
    for n in tile_edges.CPU_COPIED:
        make = lambda seed, n=n: inputs(n, n, h=4, seed=seed)  # noqa: E731
        check("cpu", "step", make, dtype, rule="gradient", key_mask=padding(n), is_causal=True)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("count", (1, 2, 3, 7))
@pytest.mark.slow
def test_threads_that_share_a_sample(count: int) -> None:
    """Each number of threads is right, and gives the same bits again."""
    torch.set_num_threads(count)
    for b, n, row_normalize in ((1, 200, False), (3, 100, True), (1, 900, False)):
        make = lambda seed, b=b, n=n: inputs(n, n, b=b, h=4, seed=seed)  # noqa: E731
        check("cpu", "step", make, rule="gradient", row_normalize=row_normalize)
        leaves = [x.float().requires_grad_() for x in make(0).values()]
        twice = []
        for _ in range(2):
            result = va.relevancy_step(*leaves, row_normalize=row_normalize, enable_gqa=True, backend="cpu")
            twice.append(torch.autograd.grad(result, leaves, torch.ones_like(result).cumsum(-1)))
        assert all(torch.equal(x, y) for x, y in zip(*twice, strict=True))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("row_normalize", (False, True))
@pytest.mark.slow
def test_more_key_heads_than_the_sums_of_the_threads_may_take(row_normalize: bool) -> None:
    """A head has 2^16 sums, of which seven threads take 2^24: 36 heads, then 4."""
    torch.set_num_threads(7)
    make = lambda seed: inputs(112, 512, b=1, h=40, kv=40, d=64, dv=64, rows=30, seed=seed)  # noqa: E731
    check("cpu", "step", make, rule="gradient", row_normalize=row_normalize)
