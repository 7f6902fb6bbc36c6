"""Gradients of relevancy_step by the CPU kernel: key heads that are taken some at a time."""

import pytest
import torch

from tests.helpers.ops.abar_cases import check, inputs


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("row_normalize", (False, True))
@pytest.mark.slow
def test_more_key_heads_than_the_sums_of_the_threads_may_take(row_normalize: bool) -> None:
    """A head has 2^16 sums, of which seven threads take 2^24: 36 heads, then 4."""
    torch.set_num_threads(7)
    make = lambda seed: inputs(112, 512, b=1, h=40, kv=40, d=64, dv=64, rows=30, seed=seed)  # noqa: E731
    check("cpu", "step", make, rule="gradient", row_normalize=row_normalize)
