"""No per-head N x M map, forward or backward: what score_attention and the relevancy operators allocate."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vlattn_fast as va
from tests.helpers.compare import LargestAllocation, bytes_of
from vlattn_fast import scores as S
from vlattn_fast.backends.streaming import _tiles

MB = 1 << 20
KINDS: dict[str, Any] = {
    "dot": "dot",
    "dot-lse": "dot",
    "cosine": S.Cosine(eps=1e9),
    "dot_tanh": S.General(torch.eye(4), activation="tanh"),
    "additive": S.Additive(torch.ones(1)),
    "hadamard_sigmoid": S.Hadamard(torch.ones(1), activation="sigmoid"),
    "hadamard_relu": S.Hadamard(torch.ones(4), activation="relu"),
}


def of_score(kind: str, n: int) -> LargestAllocation:
    size = 1 if kind in ("additive", "hadamard_sigmoid") else 4
    q, k, v = (torch.randn(1, 1, n, size, requires_grad=True) for _ in range(3))
    with LargestAllocation() as seen:
        out = va.score_attention(q, k, v, score=KINDS[kind], return_lse=kind == "dot-lse")
        (out[0] if kind == "dot-lse" else out).sum().backward()
    return seen


def of_relevancy(rule: str, n: int) -> LargestAllocation:
    q, k, v = (torch.randn(1, 1, n, 4, requires_grad=True) for _ in range(3))
    carrier = torch.zeros(1, 1, n, requires_grad=True)
    with LargestAllocation() as seen:
        out, moved = va.relevancy_attention(q, k, v, carrier, rule=rule)
        torch.autograd.grad([out, moved], [q, k, v, carrier], [torch.ones_like(out), torch.ones_like(moved)])
    return seen


@pytest.mark.parametrize("kind", (*KINDS, "gradient", "attention"))
def test_largest_allocation_grows_at_most_linearly(kind: str) -> None:
    small, large = ((of_score if kind in KINDS else of_relevancy)(kind, n) for n in (4096, 8192))
    assert large.bytes <= 2.2 * small.bytes, f"{small.bytes} by {small.by}, {large.bytes} by {large.by}"
    assert large.peak <= 2.2 * small.peak
    assert large.bytes <= 4 * MB < 8192 * 8192 * 4


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
