"""attention_map in Triton: what it refuses."""

from __future__ import annotations

from functools import partial

import torch

import vlattn_fast as va
from tests.helpers.ops.backends import assert_refused


def test_what_it_cannot_run_is_refused() -> None:
    q, wide = torch.randn(1, 1, 3, 8), torch.randn(1, 1, 3, 257)
    run = partial(va.attention_map, q.double(), q.double(), backend="triton")
    assert_refused("triton", "float16, bfloat16 and float32", run)
    for query, value in ((wide, q), (q, wide)):
        run = partial(va.attention_map, query, query, value, value, rule="gradient", backend="triton")
        assert_refused("triton", "head_dim of at most 256", run)
