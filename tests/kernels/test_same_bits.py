"""The bits of the Triton kernels' results: the same in a second launch, and for a sample alone and in a batch of three.

A table's `shared_sums` name what may differ: the kernels add without atomics, so no launch changes anything else.
"""

import pytest
import torch

from tests.helpers.ops.same_bits import Run, calls
from vlattn_fast.checking.cases import Sizes
from vlattn_fast.ops import OPERATORS

BATCH = 3
SIZES = Sizes(17, 17, 16, 16, regions=5, words=4, features=16, images=BATCH, captions=2, batch=BATCH, heads=4)


@pytest.mark.slow("attention_divergence", "attention_map", "congruence_loss", "indexer_divergence")  # the longest
@pytest.mark.parametrize("name", [name for name, operator in OPERATORS.items() if "triton" in operator.backends])
def test_same_bits(name: str) -> None:
    run = Run(next(iter(calls(name, SIZES))), "triton", torch.float32, BATCH)
    whole = run.results()
    assert not run.differing(whole, 0, BATCH)
    assert run.differing(whole, 1, 2) <= set(OPERATORS[name].backends["triton"].shared_sums)
