"""Second derivatives of score_attention as first derivatives of a function: of its gradients, by all that they depend on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import assert_all_close_to
from tests.helpers.ops.score_cases import lay_out


def inputs(
    n: int, m: int, *, b: int = 1, h: int = 2, kv: int = 2, d: int = 17, dv: int = 9, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    shapes = {"query": (b, h, n, d), "key": (b, kv, m, d), "value": (b, kv, m, dv), "grad_out": (b, h, n, dv)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()} | {"grad_lse": torch.randn(b, h, n).to(dtype)}


def gradients(operator: Callable[..., Any], **options: Any) -> Callable[..., tuple[Tensor, ...]]:
    """Gradients of query, key and value as a function of the inputs; of `grad_lse` where the options ask for the log-sum-exp."""

    def call(query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.requires_grad_() for x in (query, key, value)]
        made = operator(*leaves, enable_gqa=key.shape[1] != query.shape[1], **options)
        outputs = made if isinstance(made, tuple) else (made,)
        cotangents = [x.to(y.dtype) for x, y in zip((grad_out, grad_lse), outputs, strict=False)]
        return torch.autograd.grad(outputs, leaves, cotangents, create_graph=True)

    return call


def check(
    tensors: Mapping[str, Tensor], *, layout: str = "contiguous", backend: str = "cpu", **options: Any
) -> dict[str, Tensor]:
    """All first and second derivatives against the formula by the tolerance rule. Those of a row with one key are zero: errors
    are held to what is subtracted."""
    made = gradients(va.score_attention, backend=backend, **options)
    formula = gradients(va.reference.score_attention, **options)
    cotangents = [lay_out(torch.randn(tensors[name].shape), layout) for name in ("query", "key", "value")]
    laid_out = {name: x if name == "grad_lse" else lay_out(x, layout) for name, x in tensors.items()}
    scales = {name: 1.0 for name in ("out0", "out1", *(f"grad {name}" for name in tensors))}
    return assert_all_close_to(made, formula, laid_out, cotangents, scales=scales)
