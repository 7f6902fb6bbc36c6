"""`streaming` has other tiles on a GPU than on a CPU; its numbers do not depend on them."""

from __future__ import annotations

import pytest
import torch

from vlattn_fast.backends.streaming import _tiles
from vlattn_fast.checking import verify
from vlattn_fast.checking.cases import Example
from vlattn_fast.ops import OPERATORS


def streams(case: Example) -> bool:
    call = OPERATORS[case.operator].describe(**case.arguments(case.in_dtype(torch.float64)))
    return not OPERATORS[case.operator].backends["streaming"].refusals(call)


CASES = [pytest.param(case, id=f"{case.operator}, {case.name}") for case in verify.cases() if streams(case)]


def test_a_gpu_has_larger_tiles() -> None:
    assert _tiles.tile_elements(torch.empty(0)) == _tiles.ON_A_CPU
    assert _tiles.tile_elements(torch.empty(0, device="meta")) == _tiles.ON_A_GPU > _tiles.ON_A_CPU


@pytest.mark.parametrize("elements", [50, _tiles.ON_A_GPU])
@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers(case: Example, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = case.in_dtype(torch.float64)
    wanted = verify._run(case, tensors, "streaming")
    monkeypatch.setattr(_tiles, "ON_A_CPU", elements)
    got = verify._run(case, tensors, "streaming")
    for name, x in wanted.items():
        torch.testing.assert_close(got[name], x, rtol=1e-9, atol=1e-12, equal_nan=True)
