"""Bilinear scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from vlattn_fast._ground.tensors import product
from vlattn_fast.scores.projections import activated, affine, per_head, project, projected, row_dot, sides
from vlattn_fast.scores.score import ACTIVATIONS, BIAS, MATRIX, Core, Layer, Score, check_parameter


@dataclass(frozen=True, eq=False)
class General(Score):
    """Computes the bilinear score s = q . (W k + b), or s = k . (W q + b): general, biased general and activated general.

    It costs one projection of keys or queries in addition to a dot product.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> query, key, value = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
        >>> general = va.scores.General(torch.randn(8, 8), activation="sigmoid")
        >>> va.score_attention(query, key, value, score=general).shape
        torch.Size([1, 2, 5, 8])

    projects="key":   s = act(q . (W k + b)), weight (Dq, Dk) or (H, Dq, Dk), bias (Dq) or (H, Dq)   [*_qwk]
    projects="query": s = act(k . (W q + b)), weight (Dk, Dq) or (H, Dk, Dq), bias (Dk) or (H, Dk)   [*_kwq]

    activation in {None, "relu", "leaky_relu", "tanh", "sigmoid"} acts on the finished score, before scale and masks.
    Without an activation, the bias of projects="key" cancels in the softmax: its gradient is zero.

    Reference: Cao et al., COLING 2022, Table 1.
    """

    weight: Tensor
    bias: Tensor | None = None
    projects: str = field(default="key", kw_only=True)
    activation: str | None = field(default=None, kw_only=True)
    negative_slope: float = field(default=0.01, kw_only=True)

    name: ClassVar[str] = "general"
    parameters: ClassVar = {"weight": MATRIX, "bias": BIAS}
    options: ClassVar = {"activation": ACTIVATIONS, "projects": ("key", "query")}

    @property
    def kind(self) -> str:
        return "dot" if self.activation is None else f"dot_{self.activation}"

    def features(self, query_dim: int, key_dim: int) -> int:
        return query_dim if self.projects == "key" else key_dim

    def check(self, query: Tensor, key: Tensor) -> None:
        source, target = sides(self, query, key)
        check_parameter("weight", self.weight, (target.shape[-1], source.shape[-1]), query)
        if self.bias is not None:
            check_parameter("bias", self.bias, (target.shape[-1],), query)

    def formula(self, query: Tensor, key: Tensor) -> Tensor:
        if self.projects == "key":
            score = product(query, projected(key, self.weight, self.bias).mT)
        else:
            score = product(projected(query, self.weight, self.bias), key.mT)
        return activated(score, self.activation, self.negative_slope)

    def core(self, query: Tensor, key: Tensor) -> Core:
        if self.activation is None and self.projects == "key" and self.bias is not None:
            offset = row_dot(query, self.bias)  # q . b, the same for every key
            return Core("dot", *project(self.weight, None, query, key, self.projects), offset=offset)
        if self.projects == "query":
            query = affine(query, self.weight, self.bias)
        else:
            key = affine(per_head(key, query, self.weight, self.bias), self.weight, self.bias)
        return Core(self.kind, query, key, None, self.negative_slope)

    @classmethod
    def layers(cls) -> dict[str, Layer]:
        """Returns the names of Cao et al., COLING 2022."""
        return {
            "general": Layer(cls, ("weight",)),
            "biased_general": Layer(cls, ("weight", "bias")),
            "activated_general": Layer(cls, ("weight", "bias"), {"activation": "sigmoid"}),
        }

    @classmethod
    def examples(cls) -> dict[str, dict[str, Any]]:
        return {"general": {}, "general sigmoid": {"activation": "sigmoid", "projects": "query"}}
