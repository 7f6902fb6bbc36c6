"""Rows of 8 features that begin anywhere: kernels load them in vectors, which needs a copy first."""

from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from vlattn_fast.kernels._tiles import aligned

H, N, D = 2, 5, 8


def anywhere(x: Tensor, how: str) -> Tensor:
    """The values of x, with rows 9 apart or from an odd address on."""
    if how == "stride":
        return torch.cat([torch.full_like(x[..., :1], torch.nan), x], -1)[..., 1:]
    return torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view_as(x)


@pytest.mark.parametrize("how", ("stride", "address"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_operators_give_the_same(how: str, dtype: torch.dtype) -> None:
    q, k, v, grad = (torch.randn(1, H, N, D).to(dtype) for _ in range(4))

    def results(*tensors: Tensor) -> list[Any]:
        query, key, value, cotangent = tensors
        inputs = [x.detach().requires_grad_() for x in (query, key, value)]
        out = va.score_attention(*inputs, score="cosine", backend="triton")
        statistics = va.attention_statistics(query, key, backend="triton")
        return [
            out,
            *torch.autograd.grad(out, inputs, cotangent),
            va.attention_map(query, key, value, cotangent, rule="gradient", backend="triton"),
            va.relevancy_step(torch.ones(1, 1, N), query, key, value, cotangent, rule="gradient", backend="triton"),
            statistics.entropy,
        ]

    for one, two in zip(results(q, k, v, grad), results(*(anywhere(x, how) for x in (q, k, v, grad))), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_only_what_must_be_is_copied() -> None:
    x = torch.randn(1, H, N, D)
    for kept in (x, x.transpose(1, 2), x.expand(3, -1, -1, -1), x[:, :, 1:], torch.randn(1, H, N, 7), x[:, :, :1, :][:, :1]):
        assert aligned(kept) is kept
    for how in ("stride", "address"):
        copy = aligned(anywhere(x, how))
        assert copy.data_ptr() % 16 == 0 and copy.is_contiguous() and torch.equal(copy, x)
