"""A small call of every public operator, for tests that ask the same of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import vlattn_fast as va
from vlattn_fast import scores as S

Outputs = tuple[Tensor, ...]


class Every(NamedTuple):
    """`make(n)`: its tensors by name, with n tokens. `call(tensors, **options)`: its outputs. `floats`: options that are numbers,
    and values they may take."""

    make: Callable[[int], dict[str, Tensor]]
    call: Callable[..., Any]
    floats: dict[str, Sequence[float]] = {}


def attention_inputs(n: int, *, carrier: bool = False) -> dict[str, Tensor]:
    x = {"query": torch.randn(2, 2, n, 8), "key": torch.randn(2, 2, n, 8), "value": torch.randn(2, 2, n, 6)}
    return {**x, "carrier": torch.randn(2, 3, n)} if carrier else x


def scored(kind: type[S.Score], **fixed: Any) -> Every:
    def inputs(n: int) -> dict[str, Tensor]:
        parameters = {name: each.random(torch.randn(each.shape(8)), 8) for name, each in kind.parameters.items()}
        return attention_inputs(n) | parameters

    def call(x: dict[str, Tensor], scale: float = 0.5, **options: Any) -> Tensor:
        score = kind(**{name: x[name] for name in kind.parameters}, **fixed)
        return va.score_attention(x["query"], x["key"], x["value"], score=score, scale=scale, **options)

    return Every(inputs, call, {"scale": VALUES})


def maps(n: int) -> dict[str, Tensor]:
    x = attention_inputs(n)
    return x | {"grad_output": torch.randn(2, 2, n, 6)}


def congruence_inputs(n: int) -> dict[str, Tensor]:
    return {name: torch.randn(2, 2, n if "text" in name else 5, 8) for name in ("text_q", "text_k", "image_q", "image_k")}


def congruence(x: dict[str, Tensor], **options: Any) -> Tensor:
    return va.congruence_loss((x["text_q"], x["text_k"]), (x["image_q"], x["image_k"]), **options)


def residual_inputs(n: int) -> dict[str, Tensor]:
    stream, carrier = torch.randn(2, n, 6), torch.randn(2, 3, n)
    return {"residual": stream, "branch": stream + 1, "residual_carrier": carrier, "branch_carrier": carrier - 1}


def residual(x: dict[str, Tensor], backend: str = "auto") -> Outputs:
    return va.relevancy_residual(**x)


def pairs(n: int) -> dict[str, Tensor]:
    return {"images": torch.randn(2, n, 8), "captions": torch.randn(3, 5, 8)}


def statistics(x: dict[str, Tensor], **options: Any) -> Outputs:
    like = x["key"] if x["query"].is_nested else x["query"]
    groups = torch.arange(like.shape[2], device=like.device) % 2
    return va.attention_statistics(**x, key_groups=groups, num_groups=2, **options)


def with_sink(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return x | {"sink": torch.randn(2)}


VALUES = (0.3, 0.45, 0.6, 0.7, 0.85)
CALLS = {
    "score_attention": Every(
        attention_inputs, lambda x, **options: va.score_attention(**x, **options), {"scale": VALUES, "dropout_p": VALUES}
    ),
    "score_attention, lse": Every(
        attention_inputs, lambda x, **options: va.score_attention(**x, return_lse=True, **options), {"scale": VALUES}
    ),
    "score_attention, softcap and sink": Every(
        lambda n: with_sink(attention_inputs(n)),
        lambda x, softcap=1.5, **options: va.score_attention(**x, return_lse=True, softcap=softcap, **options),
        {"scale": VALUES, "softcap": VALUES},
    ),
    **{kind.name: scored(kind, **next(iter(kind.examples().values()))) for kind in S.SCORES.values() if not kind.is_plain},
    "relevancy_attention": Every(
        lambda n: attention_inputs(n, carrier=True),
        lambda x, **options: va.relevancy_attention(**x, **options),
        {"scale": VALUES, "residual_weight": VALUES, "attention_weight": VALUES},
    ),
    "relevancy_attention, softcap and sink": Every(
        lambda n: with_sink(attention_inputs(n, carrier=True)),
        lambda x, softcap=1.5, **options: va.relevancy_attention(**x, rule="attention", softcap=softcap, **options),
        {"scale": VALUES, "softcap": VALUES, "residual_weight": VALUES},
    ),
    "relevancy_step": Every(
        lambda n: maps(n) | {"relevancy": torch.randn(2, 3, n)},
        lambda x, **options: va.relevancy_step(**x, **options),
        {"scale": VALUES},
    ),
    "relevancy_residual": Every(residual_inputs, residual),
    "attention_map": Every(maps, lambda x, **options: va.attention_map(**x, rule="gradient", **options), {"scale": VALUES}),
    "attention_map, softcap and sink": Every(
        lambda n: with_sink(maps(n)),
        lambda x, softcap=1.5, **options: va.attention_map(**x, rule="gradient", softcap=softcap, **options),
        {"scale": VALUES, "softcap": VALUES},
    ),
    "attention_statistics": Every(
        lambda n: {"query": torch.randn(2, 2, n, 8), "key": torch.randn(2, 2, n, 8), "row_weight": torch.rand(2, n)},
        statistics,
        {"scale": VALUES},
    ),
    "attention_statistics, softcap and sink": Every(
        lambda n: with_sink({"query": torch.randn(2, 2, n, 8), "key": torch.randn(2, 2, n, 8)}),
        lambda x, softcap=1.5, **options: statistics(x, softcap=softcap, **options),
        {"scale": VALUES, "softcap": VALUES},
    ),
    "congruence_loss": Every(congruence_inputs, congruence, {"scale": VALUES}),
    "congruence_loss, distributed": Every(
        congruence_inputs,
        lambda x, **options: congruence(x, kind="iais_distributed", reduction="none", **options),
        {"scale": VALUES},
    ),
    "stacked_cross_attention": Every(
        pairs, lambda x, **options: va.stacked_cross_attention(**x, **options), {"smooth": VALUES, "lambda_lse": VALUES}
    ),
    "damsm_similarity": Every(
        pairs, lambda x, **options: va.damsm_similarity(**x, **options), {"gamma1": VALUES, "gamma2": VALUES}
    ),
}


def outputs_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def gradients(outputs: list[Tensor], inputs: dict[str, Tensor]) -> list[Tensor]:
    """Of the sum of all floating outputs, zeros where there is none."""
    total = [x.sum() for x in outputs if x.requires_grad]
    return list(torch.autograd.grad(total, list(inputs.values()), materialize_grads=True, allow_unused=True))


def leaves(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone().requires_grad_(t.is_floating_point()) for name, t in x.items()}
