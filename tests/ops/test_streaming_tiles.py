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
    assert _tiles.tile_elements(torch.empty(0)) == _tiles.TILE_ELEMENTS
    assert _tiles.tile_elements(torch.empty(0, device="meta")) == 32 * _tiles.TILE_ELEMENTS


@pytest.mark.parametrize("elements", [1000, 1 << 24])
@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers(case: Example, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = case.in_dtype(torch.float64)
    wanted = verify._run(case, tensors, "streaming")
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", elements)
    got = verify._run(case, tensors, "streaming")
    for name, x in wanted.items():
        torch.testing.assert_close(got[name], x, rtol=1e-9, atol=1e-12, equal_nan=True)
