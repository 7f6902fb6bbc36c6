"""Tangents of score_attention: a backend's `jvp` as a function of tensors, and torch.func.jvp of the formula."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.helpers.compare import as_dtype, assert_all_close_to
from vlattn_fast._ground.tensors import compute_dtype, expand_heads, mask_padding
from vlattn_fast.backends.inputs import ScoreAttentionInputs, schema_of
from vlattn_fast.backends.reference._softmax import logits
from vlattn_fast.backends.streaming._dropout import keep_factor
from vlattn_fast.backends.streaming._scores import score_tile
from vlattn_fast.checking.cases import Example
from vlattn_fast.checking.tolerance import settle
from vlattn_fast.ops.score_attention import DERIVATIVES

F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TANGENT = "_tangent"
OPTIONS: dict[str, Any] = {
    "attn_mask": None, "key_mask": None, "key_groups": None, "seed": None,
    "score": "dot", "parameter": 0.5, "scale": 0.3, "dropout_p": 0.0, "is_causal": False,
}  # fmt: skip


def tensors(
    n: int,
    m: int,
    *,
    b: int = 1,
    h: int = 2,
    kv: int | None = None,
    d: int = 5,
    dv: int = 7,
    groups: int = 0,
    dtype: torch.dtype = F32,
) -> dict[str, Tensor]:
    """query, key, value and, of so many groups, row_bias, in float32 and without -inf; and their tangents."""
    kv = h if kv is None else kv
    made = {"query": torch.randn(b, h, n, d), "key": torch.randn(b, kv, m, d), "value": torch.randn(b, kv, m, dv)}
    made = {name: x.to(dtype) for name, x in made.items()}
    if groups:
        made["row_bias"] = torch.randn(b, h, n, groups)
    return made | {name + TANGENT: torch.randn_like(x) for name, x in made.items()}


def with_tangents(case: Example, kernels: Any) -> Example:
    """A call of score_attention, with the tangents by a backend's module in place of its outputs."""
    tangents = {name + TANGENT: x.roll(1, -1) for name, x in case.tensors.items()}

    def tangents_of_call(*, backend: str, scale: float = 0.25, enable_gqa: bool = False, **given: Any) -> Any:
        options = {name: given.pop(name) for name in [*given] if name.removesuffix(TANGENT) not in case.tensors}
        return ours(kernels, given, scale=scale, **options)

    return replace(case, tensors=case.tensors | tangents, call=tangents_of_call, differentiable=False)


def ours(kernels: Any, given: Mapping[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """The tangents of out and lse by a backend's module, which computes these two as well."""
    options = {"vector": None, "row_bias": None, **OPTIONS, **options, "backend": ""}
    primals = {name: x.contiguous() if name == "row_bias" else x for name, x in given.items() if not name.endswith(TANGENT)}
    out, lse = kernels.forward(schema_of(ScoreAttentionInputs).from_named({"sink": None, **options, **primals}))
    tangents = {name: None for name in DERIVATIVES.jvp_type._fields if name.endswith(TANGENT)}
    tangents |= {name: x for name, x in given.items() if name.endswith(TANGENT)}
    arguments = {"out": out, "lse": lse, **tangents, **options, **primals}
    made: tuple[Tensor, Tensor] = kernels.jvp(schema_of(DERIVATIVES.jvp_type).from_named(arguments))
    return made


def by_formula(given: Mapping[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """The same by torch.func.jvp."""
    names = [name for name in given if not name.endswith(TANGENT)]

    def call(*primals: Tensor) -> tuple[Tensor, Tensor]:
        return formula(**dict(zip(names, primals, strict=True)), **OPTIONS | options)

    primals = tuple(given[name] for name in names)
    tangents = tuple(given.get(name + TANGENT, torch.zeros_like(given[name])) for name in names)
    _, made = torch.func.jvp(call, primals, tangents)
    return made


def formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_bias: Tensor | None = None,
    *,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    key_groups: Tensor | None,
    seed: Tensor | None,
    score: str,
    parameter: float,
    scale: float,
    dropout_p: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """out and lse, whose tangents are 0 in rows without keys."""
    (b, h, n, _), m = query.shape, key.shape[2]
    padded = *mask_padding(key_mask, key), *mask_padding(key_mask, value)
    key, value = (expand_heads(x, h) for x in padded)
    bias = None
    if row_bias is not None and key_groups is not None:
        groups = key_groups[:, None, None].expand(b, h, n, m)
        has_group = (groups >= 0) & (groups < row_bias.shape[3])
        bias = torch.where(has_group, row_bias.gather(3, groups.clamp(0, row_bias.shape[3] - 1)), 0.0)
    logit = logits(scale * score_tile(score, query, key, None, parameter), attn_mask, key_mask, is_causal, None, bias)
    visible = ~torch.isneginf(logit)
    empty = ~visible.any(-1, keepdim=True)
    largest = torch.where(empty, 0.0, logit.amax(-1, keepdim=True)).detach()
    power = torch.where(visible, torch.exp(torch.where(visible, logit - largest, 0.0)), 0.0)
    total = torch.where(empty, 1.0, power.sum(-1, keepdim=True))
    prob = power / total
    if dropout_p > 0.0:
        tile = slice(0, b), slice(0, h), slice(0, n)
        prob = prob * keep_factor(seed, dropout_p, (h, n), m, tile, prob.dtype)
    lse = torch.where(empty, 0.0, largest + total.log())[..., 0]
    return prob.to(query.dtype) @ value, lse.to(compute_dtype(query))


def check(kernels: Any, given: Mapping[str, Tensor], *, what: str = "", **options: Any) -> dict[str, Tensor]:
    """Both tangents against the formula by the tolerance rule, held to tangents around 1: of one key x - m is zero."""
    return assert_all_close_to(
        lambda **drawn: ours(kernels, drawn, **options),
        lambda **drawn: by_formula(drawn, **options),
        given,
        what=what,
        grads=False,
        scales={"out0": 0.1, "out1": 0.1},
    )


def ratios(kernels: Any, dtype: torch.dtype) -> dict[str, float]:
    """The worst error of a few calls, as a multiple of the allowed one, in one draw."""
    calls: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "tangents": ({}, {}),
        "tangents, causal": ({"kv": 1}, {"is_causal": True, "dropout_p": 0.3, "seed": torch.tensor(5)}),
        "tangents, groups": (
            {"groups": 3},
            {"key_groups": torch.arange(140)[None] // 50, "key_mask": torch.arange(140)[None] > 9},
        ),
        "tangents, float mask": ({"groups": 3}, {"key_groups": torch.arange(140)[None] // 50, "attn_mask": torch.randn(40, 140)}),
    }
    worst = {}
    for name, (sizes, options) in calls.items():
        given = tensors(40, 140, d=16, dv=24, dtype=dtype, **sizes)
        made = (
            ours(kernels, given, **options),
            by_formula(as_dtype(given, torch.float64), **options),
            by_formula(given, **options),
        )
        named = tuple(dict(zip(("out", "lse"), each, strict=True)) for each in made)
        worst[name] = max(one.ratio() for one in settle([named], enough=lambda: 1).values())  # type: ignore[list-item]
    return worst
