"""`streaming` has other tiles on a GPU than on a CPU; its numbers do not depend on them."""

import pytest
import torch

import vlattn_fast as va
from vlattn_fast.backends.streaming import _tiles


def test_a_gpu_has_larger_tiles() -> None:
    assert _tiles.tile_elements(torch.empty(0)) == _tiles.TILE_ELEMENTS
    assert _tiles.tile_elements(torch.empty(0, device="meta")) == 64 * _tiles.TILE_ELEMENTS


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
