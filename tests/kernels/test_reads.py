"""Kernels read nothing in front of queries, keys, values and gradients, nor behind them, whatever they would make of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.ops.interpreter import reads_outside
from vlattn_fast import scores as S

N, M, D = 35, 41, 3


def score(make: Callable[[], Any], **options: Any) -> Callable[..., Any]:
    return lambda q, k, v, g: va.score_attention(q, k, v, score=make(), backend="triton", **options)


CALLS: dict[str, Callable[..., Any]] = {
    "dot": score(lambda: "dot"),
    "causal": score(lambda: "dot", is_causal=True),
    "cosine": score(lambda: S.Cosine(eps=5.0)),
    "additive": score(lambda: S.Additive(torch.linspace(-1, 1, D))),
    "step": lambda q, k, v, g: va.relevancy_step(torch.ones(1, 1, N), q, k, v, g, backend="triton"),
    "map": lambda q, k, v, g: va.attention_map(q, k, v, g, rule="gradient", head_reduction="max", backend="triton"),
    "statistics": lambda q, k, v, g: torch.cat(
        [x.flatten() for x in va.attention_statistics(q, k, backend="triton") if x.is_floating_point()]
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_kernel_reads_behind_the_last_row(name: str) -> None:
    """64 rows of NaN stand around each tensor."""
    rows, sizes = 64, (N, M, M, N)
    room = torch.full((rows * 5 + sum(sizes), D), torch.nan)
    tensors, begin = list[Tensor](), rows
    for size in sizes:
        tensors.append(room[begin : begin + size].normal_()[None, None])
        begin += size + rows
    leaves = [x.data.requires_grad_() for x in tensors]
    with reads_outside(room, *leaves) as found:
        result = CALLS[name](*leaves)
        grads = torch.autograd.grad(result, leaves, torch.ones_like(result), allow_unused=True)
    assert found == []
    assert all(x.isfinite().all() for x in (result, *grads) if x is not None)
