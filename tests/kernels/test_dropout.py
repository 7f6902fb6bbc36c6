"""The hash of dropout in the kernels and in PyTorch, for rows whose number exceeds 32 bits: no test computes so many."""

import pytest
import torch
import triton
import triton.language as tl

from vlattn_fast.backends.streaming import _dropout
from vlattn_fast.kernels._tiles import Dropout, keep_factor

HEADS, QUERIES, KEYS, PROBABILITY = 4, 16, 16, 0.4


def _factors(p_out, dropout, i_bh, N):  # without annotations, which Triton 3.6 looks up when it compiles
    """The factors of the first 16 rows and keys of a head."""
    o = tl.arange(0, 16)
    i_bh = tl.full([], i_bh, tl.int64)
    tl.store(p_out + o[:, None] * 16 + o[None, :], keep_factor(dropout, i_bh, o, o, N))


@pytest.mark.parametrize("sample", (0, 1, 2**24, 2**26, 2**26 + 1, 2**31 - 5))
@pytest.mark.parametrize("seed", (7, 2**32 + 7, 2**62 + 5))
def test_rows_of_any_number(seed: int, sample: int) -> None:
    """2^26 samples of 4 heads of 16 queries have 2^32 rows."""
    out, number = torch.empty(QUERIES, KEYS), torch.tensor([seed])
    dropout = Dropout(number, PROBABILITY, int(PROBABILITY * 2**32))
    triton.jit(_factors)[(1,)](out, dropout, sample * HEADS + 3, QUERIES)
    tile = slice(sample, sample + 1), slice(3, 4), slice(0, QUERIES)
    wanted = _dropout.keep_factor(number, PROBABILITY, (HEADS, QUERIES), KEYS, tile, torch.float32)
    torch.testing.assert_close(out, wanted[0, 0])
