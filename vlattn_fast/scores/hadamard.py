"""Scores of the product of query and key, number by number."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_floating, check_number, check_tensor, describe
from vlattn_fast._ground.tensors import without_autocast
from vlattn_fast.scores.projections import activated, project, projected, row_dot, sides
from vlattn_fast.scores.score import ACTIVATIONS, BIAS, MATRIX, VECTOR, Core, Score, check_parameter


@dataclass(frozen=True, eq=False)
class Hadamard(Score):
    """Computes the score of the elementwise product, s = u . act(q * (W k + b)) + c, or u . act((W q + b) * k) + c.

    Without an activation, and with relu or leaky relu, it is a dot product of at most 2 A features; with tanh and sigmoid it
    costs A units per pair of query and key.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> query, key, value = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
        >>> hadamard = va.scores.Hadamard(torch.randn(8), activation="relu")
        >>> va.score_attention(query, key, value, score=hadamard).shape
        torch.Size([1, 2, 5, 8])

    Args:
        vector: u, (A) or (H, A).
        weight: (A, D) or (H, A, D), or None for the identity.
        bias: (A) or (H, A).
        projects: "key" (MAC), or "query".
        activation: acts on the product vector: None, "relu", "leaky_relu", "tanh" or "sigmoid".
        offset: c, a number or a tensor of one element. It cancels in the softmax.

    Reference: Hudson and Manning, "MAC", ICLR 2018; Cao et al., COLING 2022.
    """

    vector: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    projects: str = field(default="key", kw_only=True)
    activation: str | None = field(default=None, kw_only=True)
    negative_slope: float = field(default=0.01, kw_only=True)
    offset: float | Tensor = field(default=0.0, kw_only=True)

    name: ClassVar[str] = "hadamard"
    parameters: ClassVar = {"vector": VECTOR, "weight": MATRIX, "bias": BIAS}
    options: ClassVar = {"activation": ACTIVATIONS, "projects": ("key", "query")}

    @property
    def kind(self) -> str:
        return f"hadamard_{self.activation}" if self.activation in ("tanh", "sigmoid") else "dot"

    def features(self, query_dim: int, key_dim: int) -> int:
        """Returns two per unit, since relu and leaky relu split it by its sign. Other activations have the same limits."""
        return 2 * self.vector.shape[-1]

    def check(self, query: Tensor, key: Tensor) -> None:
        source, target = sides(self, query, key)
        size = target.shape[-1]
        check_parameter("vector", self.vector, (size,), query)
        if self.weight is not None:
            check_parameter("weight", self.weight, (size, source.shape[-1]), query)
        elif source.shape[-1] != size:
            raise ValueError(f"query and key must have one size if weight is None; got {describe(query)} and {describe(key)}")
        if self.bias is not None:
            check_parameter("bias", self.bias, (size,), query)
        if isinstance(self.offset, Tensor):
            check_tensor("offset", self.offset)
            check_floating(query=query, offset=self.offset)
            if self.offset.numel() != 1:
                raise ValueError(f"offset must be a number or a tensor of one element; got {describe(self.offset)}")
        else:
            check_number("offset", self.offset)

    def formula(self, query: Tensor, key: Tensor) -> Tensor:
        if self.projects == "key":
            key = projected(key, self.weight, self.bias)
        else:
            query = projected(query, self.weight, self.bias)
        units = activated(query[..., :, None, :] * key[..., None, :, :], self.activation, self.negative_slope)
        return (units * self.vector[..., None, None, :]).sum(-1) + self._offset

    def core(self, query: Tensor, key: Tensor) -> Core:
        vector = self.vector.expand(query.shape[1], -1)
        offset = self._offset
        if self.activation is None:
            if self.projects == "key" and self.bias is not None:
                weighted = query * vector[:, None]
                offset = offset + row_dot(weighted, self.bias)
                return Core("dot", *project(self.weight, None, weighted, key, self.projects), offset=offset)
            query, key = project(self.weight, self.bias, query, key, self.projects)
            return Core("dot", query * vector[:, None], key, offset=offset)
        query, key = project(self.weight, self.bias, query, key, self.projects)
        if self.kind != "dot":
            return Core(self.kind, query, key, vector, offset=offset)
        # relu(qk) = relu(q) relu(k) + relu(-q) relu(-k); leaky: q+ (k+ - a k-) + q- (k- - a k+), a = 0 gives relu.
        slope = self.negative_slope if self.activation == "leaky_relu" else 0.0
        query_pos, query_neg = _parts(query, slope)
        key_pos, key_neg = _parts(key, slope)
        weight = vector[:, None]  # multiplied part by part: torch sums over rows and a last dimension one number after the other
        with without_autocast(query):  # torch.stack under autocast to float16 does not support bfloat16
            phi = torch.stack([query_pos * weight, query_neg * weight], dim=-1)
            psi = torch.stack([key_pos - slope * key_neg, key_neg - slope * key_pos], dim=-1)
        return Core("dot", phi.flatten(-2), psi.flatten(-2), offset=offset)

    @property
    def _offset(self) -> float | Tensor:
        return self.offset.reshape(()) if isinstance(self.offset, Tensor) else self.offset

    @classmethod
    def examples(cls) -> dict[str, dict[str, Any]]:
        return {"hadamard tanh": {"activation": "tanh"}, "hadamard relu": {"activation": "relu"}}


def _parts(x: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """relu(x) and relu(-x), with derivatives c and -c at zero that give the score the derivative of leaky_relu there.

    leaky_relu(q k) has the derivative slope * k at q = 0. From c (k+ - slope k-) - c (k- - slope k+) = slope * k follows
    c = slope / (1 + slope).
    """
    if slope in (0.0, -1.0):  # relu has 0 there; |q k| has no derivative that two features could give
        return x.relu(), (-x).relu()
    at_zero = torch.where(x == 0, x, 0.0) * (slope / (1.0 + slope))  # zero, with a derivative
    return x.relu() + at_zero, (-x).relu() - at_zero
