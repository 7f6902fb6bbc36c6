"""Tensors that calls of several operators have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vlattn_fast.checking.cases._example import Sizes, Tensors, normal


def plain(sizes: Sizes, randn: Callable[..., torch.Tensor] = torch.randn) -> Tensors:
    """query, key and value, by `randn(*shape)`."""
    b, h, n, m = sizes.batch, sizes.heads, sizes.queries, sizes.keys
    shapes = {"query": (n, sizes.head_dim), "key": (m, sizes.head_dim), "value": (m, sizes.value_dim)}
    return {name: randn(b, h, *shape) for name, shape in shapes.items()}


def carried(sizes: Sizes) -> torch.Tensor:
    """(B, T, N), a carrier or relevancy."""
    return torch.rand(sizes.batch, sizes.rows, sizes.queries)


def grad_output(sizes: Sizes) -> torch.Tensor:
    return torch.randn(sizes.batch, sizes.heads, sizes.queries, sizes.value_dim)


def verified(generator: torch.Generator, sizes: Sizes) -> tuple[Tensors, torch.Tensor]:
    """query, key and value in float64, and a key_mask."""
    tensors = plain(sizes, normal(generator))
    return tensors, torch.rand(sizes.batch, sizes.keys, generator=generator) > 0.3


def grouped(generator: torch.Generator, sizes: Sizes) -> tuple[Tensors, dict[str, torch.Tensor]]:
    """The bias of two groups of queries and three of keys, which masks one pair of them in one head, and the groups."""
    bias = normal(generator)(sizes.heads, 2, 3)
    bias[0, 1, 2] = -torch.inf
    lengths = {"query_groups": (2, sizes.queries), "key_groups": (3, sizes.keys)}
    groups = {
        name: torch.randint(-1, count, (sizes.batch, length), generator=generator) for name, (count, length) in lengths.items()
    }
    return {"group_bias": bias}, groups


def without_second_sample(key_mask: torch.Tensor) -> torch.Tensor:
    masked = key_mask.clone()
    masked[1] = False
    return masked
