"""attention_map by the CPU kernels: NaN among heads that threads share."""

import pytest
import torch

import vlattn_fast as va
from vlattn_fast.ops.attention_map import HEAD_REDUCTIONS


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
