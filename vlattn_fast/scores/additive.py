"""Additive scores, exact or as a sine series."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_choice, check_number, check_tensor, describe
from vlattn_fast._ground.series import sine_series
from vlattn_fast.scores.projections import affine, per_head, projected
from vlattn_fast.scores.score import BIAS, MATRIX, VECTOR, Core, Score, check_parameter


@dataclass(frozen=True, eq=False)
class Additive(Score):
    """Computes the additive score s = u . tanh(Wq q + Wk k + b).

    Exact scores cost A units per pair of query and key, without an (N, M, A) block in memory. method="series" replaces tanh by a
    sine series, which makes the score a dot product of features with an absolute error of at most `tolerance`.

    Examples:
        >>> import torch, vlattn_fast as va
        >>> query, key, value = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
        >>> additive = va.scores.Additive(torch.randn(16), torch.randn(16, 8), torch.randn(16, 8))
        >>> va.score_attention(query, key, value, score=additive).shape
        torch.Size([1, 2, 5, 8])

    Args:
        vector: u, (A) or (H, A).
        query_weight, key_weight: (A, Dq) and (A, Dk), or with a leading (H, ...). None means that query or key already has size
            A.
        bias: b, (A) or (H, A).
        method: "exact" or "series". The series depends on the range of Wq q + Wk k + b in the data.
        tolerance: largest error of a series. Raises ValueError if no series of at most 64 terms reaches it; the message
            names the smallest possible one.

    Reference: Bahdanau et al. 2015.
    """

    vector: Tensor
    query_weight: Tensor | None = None
    key_weight: Tensor | None = None
    bias: Tensor | None = None
    method: str = field(default="exact", kw_only=True)
    tolerance: float | None = field(default=None, kw_only=True)

    name: ClassVar[str] = "additive"
    parameters: ClassVar = {"vector": VECTOR, "query_weight": MATRIX, "key_weight": MATRIX, "bias": BIAS}

    @classmethod
    def concat(
        cls, vector: Tensor, weight: Tensor, bias: Tensor | None = None, *, query_size: int | None = None, **options: Any
    ) -> Additive:
        """Returns the score s = u . tanh(W [q; k] + b), weight (A, Dq + Dk) or (H, A, Dq + Dk): the same family of functions.

        query_size is Dq. Default: half of the weight's columns.
        """
        check_tensor("weight", weight, shape="(A, D_q + D_k) or (H, A, D_q + D_k)")
        if weight.dim() not in (2, 3):
            raise ValueError(f"weight must have shape (A, D_q + D_k) or (H, A, D_q + D_k); got {describe(weight)}")
        columns = weight.shape[-1]
        if query_size is None and columns % 2 != 0:
            raise ValueError(f"query_size must be given if weight has an odd number of columns; got {describe(weight)}")
        size = columns // 2 if query_size is None else query_size
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= columns:
            raise ValueError(f"query_size must be an integer in [0, {columns}]; got {query_size!r}")
        return cls(vector, weight[..., :size], weight[..., size:], bias, **options)

    @property
    def kind(self) -> str:
        return "dot" if self.method == "series" else "additive"

    def features(self, query_dim: int, key_dim: int) -> int | None:
        """Returns the number of units; None for a series, which has as many terms as the range of the data needs."""
        return None if self.method == "series" else self.vector.shape[-1]

    def check(self, query: Tensor, key: Tensor) -> None:
        check_choice("method", self.method, ("exact", "series"))
        if self.method == "series":
            if self.tolerance is None:
                raise ValueError("tolerance must be given with method='series': the allowed error of the score; got None")
            check_number("tolerance", self.tolerance, low=0.0)
        elif self.tolerance is not None:
            raise ValueError(f"tolerance must be None unless method is 'series'; got {self.tolerance!r} for {self.method!r}")
        check_tensor("vector", self.vector, shape="(A) or (H, A)")
        if self.vector.dim() not in (1, 2):
            raise ValueError(f"vector must have shape (A), or (H, A) for one per head; got {describe(self.vector)}")
        size = self.vector.shape[-1]
        check_parameter("vector", self.vector, (size,), query)
        for name, weight, x in (("query", self.query_weight, query), ("key", self.key_weight, key)):
            if weight is not None:
                check_parameter(f"{name}_weight", weight, (size, x.shape[-1]), query)
            elif x.shape[-1] != size:
                raise ValueError(f"{name} must have vector's size {size} if {name}_weight is None; got {describe(x)}")
        if self.bias is not None:
            check_parameter("bias", self.bias, (size,), query)

    def formula(self, query: Tensor, key: Tensor) -> Tensor:
        a, b = projected(query, self.query_weight, None), projected(key, self.key_weight, None)
        units = a[..., :, None, :] + b[..., None, :, :]
        if self.bias is not None:
            units = units + self.bias[..., None, None, :]
        return (torch.tanh(units) * self.vector[..., None, None, :]).sum(-1)

    def core(self, query: Tensor, key: Tensor) -> Core:
        if self.query_weight is not None or self.bias is not None:
            query = affine(query, self.query_weight, self.bias)
        if self.key_weight is not None:
            key = affine(per_head(key, query, self.key_weight, None), self.key_weight, None)
        vector = self.vector.expand(query.shape[1], -1)
        if self.method == "exact":
            return Core("additive", query, key, vector)
        assert self.tolerance is not None  # checked by check()
        return Core("dot", *sine_series(query, key, vector, self.tolerance), keeps_dtype=True)
