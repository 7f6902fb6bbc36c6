"""Offsets in kernels have 64 bits: samples, heads, rows and keys that lie more than 2^31 elements apart.

Kernels write what they allocate themselves, and so without gaps: whether products of sizes fit there, tools/compiled/triton.py
reads in what the kernels compile to.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from vlattn_fast import scores as S

N, D = 3, 8
APART = 2**30 + 8  # elements; twice that does not fit into 32 bits
AXES = {"samples": 0, "heads": 1, "rows": 2, "keys": 3}  # of a mask (B, H, N, M)


class Room:
    """Memory of a dtype, in which tensors lie side by side. Untouched memory costs nothing.

    An offset that 32 bits do not hold is negative there. It leads to the first half, where no tensor lies.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.memory, self.used = torch.empty(4 * APART + 2**16, dtype=dtype), 0

    def spread(self, x: Tensor, axis: int) -> Tensor:
        """The values of x, with APART elements from one to the next along an axis of 3."""
        rest = [size for n, size in enumerate(x.shape) if n != axis]
        strides = [math.prod(rest[n + 1 :]) for n in range(len(rest))]
        strides.insert(axis, APART)
        begin, self.used = 2 * APART + self.used, self.used + -(-math.prod(rest) // 8) * 8
        # `.data`: each tensor counts its own changes, as autograd asks for
        return self.memory.data.as_strided(x.shape, strides, begin).copy_(x)


@pytest.fixture(scope="module")
def rooms() -> dict[torch.dtype, Room]:
    return {dtype: Room(dtype) for dtype in (torch.bfloat16, torch.bool)}


def score(make: Callable[[], Any]) -> Callable[..., Any]:
    def run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Any:
        return va.score_attention(query, key, value, score=make(), attn_mask=mask, return_lse=True, backend="triton")

    return run


def relevancy_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Any:
    carrier = torch.ones(len(query), 2, N)
    return va.relevancy_attention(query, key, value, carrier, attn_mask=mask, is_causal=True, backend="triton")


def relevancy_step(query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, mask: Tensor) -> Any:
    relevancy = torch.ones(len(query), 2, N)
    return va.relevancy_step(relevancy, query, key, value, grad_output, attn_mask=mask, row_normalize=True, backend="triton")


def attention_map(query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, mask: Tensor) -> Any:
    options = {"rule": "gradient", "head_reduction": "max", "backend": "triton"}
    return va.attention_map(query, key, value, grad_output, attn_mask=mask, **options)


def attention_statistics(query: Tensor, key: Tensor, mask: Tensor) -> Any:
    groups = {"key_groups": torch.tensor([0, 1, 0]), "num_groups": 2}
    found = va.attention_statistics(query, key, attn_mask=mask, **groups, backend="triton")
    return found.mass, found.entropy, found.maximum, found.received


def attention_divergence(query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, mask: Tensor) -> Any:
    return va.attention_divergence(query, key, grad_output, value, attn_mask=mask, backend="triton")


def indexer_divergence(query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, mask: Tensor) -> Any:
    indexer = grad_output, value[:, 0], torch.ones(query.shape[:3], dtype=query.dtype)
    return va.indexer_divergence(query, key, *indexer, attn_mask=mask[:, :1], backend="triton")


def congruence_loss(query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor) -> Any:
    return va.congruence_loss((query, key), (value, grad_output), backend="triton")


def stacked_cross_attention(images: Tensor, captions: Tensor) -> Any:
    return va.stacked_cross_attention(images, captions, backend="triton")


CALLS: dict[str, Callable[..., Any]] = {
    "dot": score(lambda: "dot"),
    "cosine": score(lambda: "cosine"),
    "additive": score(lambda: S.Additive(torch.linspace(-1, 1, D).bfloat16())),
    **{
        operator.__name__: operator
        for operator in (
            relevancy_attention,
            relevancy_step,
            attention_map,
            attention_statistics,
            attention_divergence,
            indexer_divergence,
            congruence_loss,
            stacked_cross_attention,
        )
    },
}


def cases() -> list[tuple[str, str]]:
    """Sets of rows have no heads, and only an attn_mask has keys."""
    with_mask = [name for name, call in CALLS.items() if "mask" in arguments(call)]
    return [
        *itertools.product(with_mask, AXES),
        *itertools.product(("congruence_loss",), ("samples", "heads", "rows")),
        ("stacked_cross_attention", "samples"),
    ]


def arguments(call: Callable[..., Any]) -> list[str]:
    return [name for name in call.__annotations__ if name != "return"]


@pytest.mark.parametrize(("name", "axis"), cases())
def test_wide_strides(name: str, axis: str, rooms: dict[torch.dtype, Room]) -> None:
    """Outputs and gradients have the bits that they have without gaps."""
    call = CALLS[name]
    b, h = 3 if axis == "samples" else 1, 3 if axis == "heads" else 1  # the interpreter takes its time for each program
    shape = (b, N, D) if name == "stacked_cross_attention" else (b, h, N, D)
    tensors = {one: torch.randn(shape).bfloat16() for one in arguments(call) if one != "mask"}
    if "mask" in arguments(call):
        tensors["mask"] = torch.rand(b, h, N, N) > 0.2
    for room in rooms.values():
        room.used = 0

    def spread(x: Tensor) -> Tensor:
        """Features, which lie side by side, are no axis of these."""
        n = AXES[axis]
        return rooms[x.dtype].spread(x, n) if x.dtype in rooms and x.dim() >= 3 and (n < 3 or x.dtype == torch.bool) else x

    def run(lay_out: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = {one: lay_out(x) for one, x in tensors.items()}
        inputs = [x.requires_grad_() for x in leaves.values() if x.is_floating_point()]
        results = call(**leaves)
        results = list(results) if isinstance(results, tuple) else [results]
        torch.manual_seed(1)
        grads = [lay_out(torch.randn(x.shape).to(x.dtype)) for x in results]
        return [x.detach() for x in (*results, *torch.autograd.grad(results, inputs, grads))]

    for wide, close in zip(run(spread), run(torch.clone), strict=True):
        assert torch.equal(wide, close)
