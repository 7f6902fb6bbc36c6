"""A pre-norm transformer tower in plain torch, with its attention as an argument and its weights as a dict of tensors.

One tower serves every variant of a task, in float64 too, without a model library. Weights are random, normal by fan-in, so that
attention is uneven as in a trained model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import vlattn_fast as va
from vlattn_fast.benchmarks._bounds import softmax_map, tokens
from vlattn_fast.benchmarks._measure import Pass, Tensors, randoms
from vlattn_fast.benchmarks._workloads import Sizes

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def weights(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Tensors:
    randn, c = randoms(device, dtype), sizes["C"]
    shapes = {"qkv": (3 * c, c), "out": (c, c), "up": (4 * c, c), "down": (c, 4 * c)}
    return {f"{n}.{name}": randn(*s, std=s[1] ** -0.5) for n in range(sizes["layers"]) for name, s in shapes.items()}


def project(t: Tensors, n: int, x: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Query, key and value (B, H, N, D) of layer n from its input."""
    packed = F.linear(F.layer_norm(x, x.shape[-1:]), t[f"{n}.qkv"])
    return tuple(packed.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4))


def layer(t: Tensors, n: int, x: Tensor, heads: int, attend: Attend) -> Tensor:
    x = x + F.linear(attend(*project(t, n, x, heads)).transpose(1, 2).flatten(2), t[f"{n}.out"])
    return x + F.linear(F.gelu(F.linear(F.layer_norm(x, x.shape[-1:]), t[f"{n}.up"])), t[f"{n}.down"])


class Plain:
    def __init__(self, causal: bool) -> None:
        self.causal = causal

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)


class Carried(Plain):
    """Attention that passes a carrier on from layer to layer."""

    def __init__(self, causal: bool, carrier: Tensor, backend: str) -> None:
        super().__init__(causal)
        self.carrier, self.backend = carrier, backend

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output, self.carrier = va.relevancy_attention(
            query, key, value, self.carrier, is_causal=self.causal, backend=self.backend
        )
        return output


class Stored(Plain):
    """Eager attention that keeps every map."""

    def __init__(self, causal: bool) -> None:
        super().__init__(causal)
        self.maps: list[Tensor] = []

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.maps.append(softmax_map(query, key, self.causal))
        return self.maps[-1] @ value


def flops(sizes: Sizes) -> Pass:
    """The matrix products of one forward pass: 12 C C weights a token and layer, and attention."""
    n = tokens(sizes)
    attention = 4 * n * sizes["C"] / (2 if sizes.get("causal") else 1)
    return Pass(sizes["layers"] * sizes["B"] * n * (24 * sizes["C"] ** 2 + attention))
