"""`streaming` has other tiles on a GPU than on a CPU; its numbers do not depend on them."""

from __future__ import annotations

import pytest
import torch

import vlattn_fast as va
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
    assert _tiles.tile_elements(torch.empty(0, device="meta")) == 64 * _tiles.TILE_ELEMENTS


@pytest.mark.parametrize("elements", [1000, 1 << 24])
@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers(case: Example, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = case.in_dtype(torch.float64)
    wanted = verify._run(case, tensors, "streaming")
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", elements)
    got = verify._run(case, tensors, "streaming")
    for name, x in wanted.items():
        torch.testing.assert_close(got[name], x, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_gradients_of_keys_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the tiles of queries, and rounded once: so nearly all have the bits that one tile gives."""
    tensors = [torch.randn(1, 1, n, 16).bfloat16().requires_grad_() for n in (256, 32, 32)]
    found = []
    for elements in (1 << 19, 64):
        monkeypatch.setattr(_tiles, "TILE_ELEMENTS", elements)
        out = va.score_attention(*tensors, softcap=5.0, backend="streaming")
        found.append(torch.autograd.grad(out.square().sum(), tensors[1:]))
    for one, many in zip(*found, strict=True):
        assert (one != many).double().mean() < 0.05
