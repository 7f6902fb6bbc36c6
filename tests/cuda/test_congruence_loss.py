"""csrc/cuda/congruence_loss.cu: sizes around its strips and chunks, and what it refuses.

The rest stands in tests/ops/test_congruence_loss.py.
"""

from functools import partial

import pytest
import torch

import vlattn_fast as va
from tests.helpers.compare import as_dtype
from tests.helpers.ops.backends import assert_refused
from tests.helpers.ops.congruence_loss_cases import check, make

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    "kind, L, V",
    [
        ("cacr", 17, 63),
        ("cacr", 65, 1),
        ("cacr", 112, 111),
        ("cacr", 1, 15),
        ("cacr", 64, 16),
        ("iais_distributed", 111, 17),
        ("iais_distributed", 63, 65),
        ("iais_distributed", 1, 16),
        ("iais_distributed", 3, 112),
    ],
)
def test_sizes_either_side_of_a_strip(kind: str, L: int, V: int) -> None:
    check("cuda", as_dtype(make(L, V, h=1, d=5), F32), kind=kind)


@pytest.mark.parametrize(
    "kind, d, dtype",
    [
        ("cacr", 17, F32),
        ("iais_distributed", 65, F32),
        ("cacr", 128, F32),
        ("iais_distributed", 64, F16),
        ("iais_distributed", 65, BF16),
        ("cacr", 128, F16),
    ],
)
def test_head_dims(kind: str, d: int, dtype: torch.dtype) -> None:
    check("cuda", as_dtype(make(9, 20, d=d), dtype), kind=kind, scale=0.1)


@pytest.mark.parametrize(
    "dtype, d, L, words",
    [
        (torch.float64, 4, 3, "float16, bfloat16 and float32"),
        (F32, 130, 3, "a head_dim of at most 128"),
        (F32, 1, 129, "at most 128 tokens"),
    ],
)
def test_what_it_cannot_run_is_refused(dtype: torch.dtype, d: int, L: int, words: str) -> None:
    text, image = torch.zeros(1, 1, L, d, dtype=dtype), torch.zeros(1, 1, 2, d, dtype=dtype)
    assert_refused("cuda", words, partial(va.congruence_loss, (text, text), (image, image), backend="cuda"))


@pytest.mark.parametrize(
    "options, words", [({"kind": "iais_singular"}, "the kinds cacr and"), ({"normalize": "none"}, '"softmax"')]
)
def test_what_it_does_not_compute_is_refused(options: dict[str, str], words: str) -> None:
    x = torch.zeros(1, 1, 2, 4)
    assert_refused("cuda", words, partial(va.congruence_loss, (x, x), (x, x), backend="cuda", **options))
