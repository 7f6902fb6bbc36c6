"""Batches, heads, queries, keys, features and carried rows of size 0: every operator, forward and backward, as the formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.ops.backends import each, on
from tests.helpers.ops.every_call import gradients, leaves, outputs_of
from vlattn_fast import scores as S

Tensors = dict[str, Tensor]
SIZES = {"B": 2, "H": 2, "N": 3, "M": 4, "D": 8, "T": 2}
EMPTY = ["B", "H", "N", "M", "D", "T", "BH", "NM", "BHNMDT"]


def randn(sizes: dict[str, int], **shapes: str) -> Tensors:
    return {name: torch.randn([sizes[letter] for letter in shape]) for name, shape in shapes.items()}


def attention(sizes: dict[str, int]) -> Tensors:
    return randn(sizes, query="BHND", key="BHMD", value="BHMD")


def self_attention(sizes: dict[str, int]) -> Tensors:
    return randn(sizes, query="BHND", key="BHND", value="BHND", carrier="BTN")


def congruence(x: Tensors, **options: Any) -> Any:
    text, image = (x["text_query"], x["text_key"]), (x["image_query"], x["image_key"])
    return va.congruence_loss(text, image, reduction="none", **options)


def additive(x: Tensors, **options: Any) -> Any:
    vector = torch.linspace(-1, 1, x["query"].shape[3])
    return va.score_attention(**x, score=S.Additive(vector), return_lse=True, **options)


CALLS: dict[str, tuple[Callable[[dict[str, int]], Tensors], Callable[..., Any]]] = {
    "dot": (attention, lambda x, **options: va.score_attention(**x, **options)),
    "dot, lse": (attention, lambda x, **options: va.score_attention(**x, return_lse=True, **options)),
    "cosine": (attention, lambda x, **options: va.score_attention(**x, score="cosine", **options)),
    "additive": (attention, additive),
    "relevancy": (self_attention, lambda x, **options: va.relevancy_attention(**x, **options)),
    "rollout": (
        self_attention,
        lambda x, **options: va.relevancy_attention(**x, rule="attention", row_normalize=True, **options),
    ),
    "step": (
        lambda sizes: attention(sizes) | randn(sizes, relevancy="BTN", grad_output="BHND"),
        lambda x, **options: va.relevancy_step(**x, **options),
    ),
    "map": (
        lambda sizes: attention(sizes) | randn(sizes, grad_output="BHND"),
        lambda x, **options: va.attention_map(**x, rule="gradient", **options),
    ),
    "statistics": (
        lambda sizes: randn(sizes, query="BHND", key="BHMD", row_weight="BN"),
        lambda x, **options: va.attention_statistics(
            **x, key_groups=torch.arange(x["key"].shape[2]) % 2, num_groups=2, **options
        ),
    ),
    **{
        kind: (
            lambda sizes: randn(sizes, text_query="BHND", text_key="BHND", image_query="BHMD", image_key="BHMD"),
            lambda x, kind=kind, **options: congruence(x, kind=kind, **options),
        )
        for kind in ("cacr", "iais_singular", "iais_distributed")
    },
    "t2i": (
        lambda sizes: randn(sizes, images="BND", captions="HMD"),
        lambda x, **options: va.stacked_cross_attention(**x, **options),
    ),
    "i2t": (
        lambda sizes: randn(sizes, images="BND", captions="HMD"),
        lambda x, **options: va.stacked_cross_attention(**x, direction="i2t", aggregation="mean", **options),
    ),
}


def run(name: str, x: Tensors, backend: str) -> list[Tensor]:
    """Outputs and gradients."""
    x = leaves(x)
    outputs = outputs_of(CALLS[name][1](x, backend=backend))
    return [*outputs, *(gradients(outputs, x) if any(y.requires_grad for y in outputs) else [])]


@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("name", CALLS)
def test_as_the_formula(name: str, empty: str) -> None:
    torch.manual_seed(0)
    x = CALLS[name][0](SIZES | dict.fromkeys(empty, 0))
    if name == "map" and "H" in empty:  # there is no maximum of no heads
        with pytest.raises(ValueError, match="query must have at least one head to reduce; got"):
            run(name, x, "auto")
        return
    want = run(name, x, "reference")
    for backend in ("auto", "streaming"):
        got = run(name, x, backend)
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            assert not a.isnan().any()


@on("streaming", "cpu")
@pytest.mark.parametrize("empty", ("D", "V", "DV"))
def test_no_features_beside_padding(backend: str, empty: str) -> None:
    """Rows of size 0 have no pointer, which `make sanitize` sees where zeros are written to one."""
    x = leaves(randn({**SIZES, "V": 5, **dict.fromkeys(empty, 0)}, query="BHND", key="BHMD", value="BHMV"))
    padding = torch.tensor([[True, False, True, False]] * SIZES["B"])
    results = []
    for name in (backend, "reference"):
        outputs = outputs_of(va.score_attention(**x, key_mask=padding, return_lse=True, backend=name))
        results.append([*outputs, *gradients(outputs, x)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


WITHOUT_HEADS: dict[str, tuple[str, Callable[..., Any]]] = {
    "additive": ("query key value", additive),
    "relevancy": ("query key value carrier", CALLS["relevancy"][1]),
    "statistics": ("query key", lambda x, **options: va.attention_statistics(**x, **options)),
}


@each("name", streaming=WITHOUT_HEADS, cpu=WITHOUT_HEADS, triton=WITHOUT_HEADS, cuda=("additive", "relevancy"))
def test_keys_that_no_query_head_shares(backend: str, name: str) -> None:
    """0 query heads share 2 key heads: the gradients of keys and values are zero."""
    names, call = WITHOUT_HEADS[name]
    made = randn({**SIZES, "H": 0, "G": 2}, query="BHND", key="BGND", value="BGND", carrier="BTN")
    x = leaves({each_name: made[each_name] for each_name in names.split()})
    outputs = outputs_of(call(x, enable_gqa=True, backend=backend))
    for grad in gradients(outputs, x)[:3]:
        assert not grad.any()
