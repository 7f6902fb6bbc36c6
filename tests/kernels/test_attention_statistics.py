"""attention_statistics in Triton: tiles in 16 bits, groups around its blocks."""

import pytest
import torch

from tests.helpers.compare import as_dtype
from tests.helpers.ops.map_cases import B, check_statistics, groups, statistics_inputs
from vlattn_fast.backends.inputs import Attention, AttentionStatisticsBackwardInputs, AttentionStatisticsInputs
from vlattn_fast.backends.reference.attention_statistics import AttentionStatistics
from vlattn_fast.kernels import attention_statistics as kernels

F32, BF16 = torch.float32, torch.bfloat16


# a tile has 64 queries and 64 keys, beyond 512 of them 128; rows of 577 keys are CLIP ViT-L/14@336's
@pytest.mark.parametrize(
    "n, m, num_groups, causal",
    [
        (64, 63, 2, False),
        (65, 129, 20, False),
        (129, 70, 40, False),
        (20, 577, 3, False),
        (577, 20, 3, False),
        (513, 520, 2, True),
    ],
)
def test_sizes_either_side_of_a_tile_in_half_precision(n: int, m: int, num_groups: int, causal: bool) -> None:
    inputs = as_dtype(statistics_inputs(n, m, 16, b=1, h=1, kv=1), torch.bfloat16)
    check_statistics("triton", inputs, is_causal=causal, **groups(m, num_groups))


# one by one up to four groups, as a product beyond, in more than one program above 64
@pytest.mark.parametrize("num_groups, dtype", [(1, F32), (4, BF16), (5, F32), (17, BF16), (70, F32)])
def test_any_number_of_groups(num_groups: int, dtype: torch.dtype) -> None:
    inputs = as_dtype(statistics_inputs(9, 40, h=1, kv=1), dtype)
    check_statistics("triton", inputs, key_groups=torch.randint(-1, num_groups, (B, 40)), num_groups=num_groups)
    index = torch.arange(40) % (num_groups + 1) - 1
    check_statistics("triton", inputs, only="mass", key_groups=index, num_groups=num_groups)


def test_a_group_out_of_range_is_none() -> None:
    """torch.compile and the capture of a CUDA graph leave the values of key_groups unread."""
    query, key, weight = as_dtype(statistics_inputs(7, 12), torch.float32).values()
    index = torch.tensor([0, 1, 2, 3, -1, -7, 2**32, 2**32 + 1, 1 - 2**32, 1, 0, 2]).expand(B, -1)
    clean = torch.where((index >= 0) & (index < 3), index, -1)
    rows = weight[:, None].expand(query.shape[:3])
    options = {"row_weight": rows, "num_groups": 3, "backend": "triton"}
    unknown, known = (Attention(query, key, key_groups=x, scale=0.5) for x in (index, clean))
    statistics = " ".join(AttentionStatistics._fields)
    got, want = (kernels.forward(AttentionStatisticsInputs(x, statistics=statistics, **options)) for x in (unknown, known))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    mass, _, maximum, argmax, *_, row_max, mean_x = want
    options |= {"mass": mass, "maximum": maximum, "argmax": argmax, "row_max": row_max, "mean_x": mean_x}
    options |= {
        "statistics": statistics,
        "grad_mass": torch.randn_like(mass),
        "grad_entropy": None,
        "grad_maximum": None,
        "grad_received": None,
    }
    got, want = (kernels.backward(AttentionStatisticsBackwardInputs(attention=x, **options)) for x in (unknown, known))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and not got[2].any()
