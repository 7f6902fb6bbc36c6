"""The order of the programs of causal calls: every block of every head once, the longest of many heads first."""

import pytest
import torch
import triton
import triton.language as tl

from vlattn_fast.kernels._tiles import CACHED, heads_in_turn


def _numbers(p_numbers, num_blocks, H, GROUP, elements):
    i_block, i_bh, i_b, i_h, i_hk = heads_in_turn(num_blocks, H, GROUP, elements)
    p = p_numbers + tl.program_id(0) * 5
    tl.store(p, i_block)
    tl.store(p + 1, i_bh)
    tl.store(p + 2, i_b)
    tl.store(p + 3, i_h)
    tl.store(p + 4, i_hk)


@pytest.mark.parametrize("share, together", [(1 / 6, [6]), (1 / 5, [3, 3]), (1 / 3, [3, 3]), (1 / 2, [2, 2, 2]), (2.0, [1] * 6)])
def test_heads_that_fit_in_the_cache_take_turns(share: float, together: list[int]) -> None:
    """share: of the cache, which a head takes."""
    num_blocks, batch, heads, group = 3, 1, 6, 2
    order(num_blocks, batch, heads, group, int(share * CACHED.value), together)


def test_the_last_part_has_fewer_heads_and_samples_are_told_apart() -> None:
    order(2, 5, 2, 1, CACHED.value // 4, [4, 4, 2])


def order(num_blocks: int, batch: int, heads: int, group: int, elements: int, together: list[int]) -> None:
    numbers = torch.full((num_blocks * batch * heads, 5), -1, dtype=torch.int64)
    triton.jit(_numbers)[(len(numbers),)](numbers, num_blocks, heads, group, elements)
    expected, first = [], 0
    for width in together:
        for block in range(num_blocks):
            for bh in range(first, first + width):
                expected.append([block, bh, bh // heads, bh % heads, bh % heads // group])
        first += width
    assert numbers.tolist() == expected
