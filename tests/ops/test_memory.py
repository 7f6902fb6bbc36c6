"""No per-head N x M map: second derivatives, relevancy at high resolution, and the recorder itself."""

import pytest
import torch

import vlattn_fast as va
from tests.helpers.compare import LargestAllocation, bytes_of
from vlattn_fast.backends.streaming import _tiles

MB = 1 << 20


def test_a_second_derivative_holds_one_tile_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tangents and graphs of a tile must not keep one another alive until the pass is over."""
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", 1 << 12)
    peaks = []
    for n in (128, 256):
        q, k, v = (torch.randn(1, 1, n, 4, requires_grad=True) for _ in range(3))
        (grad,) = torch.autograd.grad(va.score_attention(q, k, v, backend="streaming").sum(), q, create_graph=True)
        with LargestAllocation() as seen:
            torch.autograd.grad(grad.sum(), q)
        peaks.append(seen.peak)
    assert peaks[1] <= 1.3 * peaks[0]


@pytest.mark.slow
def test_working_set_of_relevancy_at_high_resolution() -> None:
    """H = 16, N = 4096, D = 64: one map of one head is 64 MB, all of them 1 GB. Everything beyond inputs, outputs and
    gradients stays under 64 MB."""
    q, k, v = (torch.randn(1, 16, 4096, 64, requires_grad=True) for _ in range(3))
    start = torch.zeros(1, 1, 4096, requires_grad=True)
    with LargestAllocation() as seen:
        out, carrier = va.relevancy_attention(q, k, v, start)
        grads = torch.autograd.grad([out, carrier], [q, k, v, start], [torch.ones_like(out), torch.ones_like(carrier)])
    assert seen.peak - bytes_of(out, carrier, *grads) < 64 * MB, f"{seen.peak / MB:.0f} MB"
    assert seen.bytes <= bytes_of(q), seen.by
    del grads


def test_the_recorder_sees_maps_and_not_views() -> None:
    """Its purpose: the formula's maps are seen, forward and backward; a view is no allocation; freed memory is free."""
    q = torch.randn(1, 1, 512, 4, requires_grad=True)
    with LargestAllocation() as seen:
        va.reference.score_attention(q, q, q).sum().backward()
    assert seen.bytes == 512 * 512 * 4 and seen.peak > 3 * seen.bytes
    with LargestAllocation() as seen:
        q.transpose(2, 3)[..., 1:].expand(5, 1, 4, 511)
    assert seen.bytes == 0
    with LargestAllocation() as seen:
        for _ in range(5):
            torch.zeros(1000)
    assert (seen.bytes, seen.peak, seen.live) == (4000, 4000, 0)
