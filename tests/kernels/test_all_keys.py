"""Kernels whose programs have all keys of a head: the forward pass, and the backward pass in one kernel. Beside them the kernels
that take keys tile by tile, which other calls of 16 bits have."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import vlattn_fast as va
from tests.helpers.compare import as_dtype
from tests.helpers.ops import relevancy_cases, score_cases
from tests.helpers.ops.score_cases import PRODUCTS
from vlattn_fast.kernels import _products_backward
from vlattn_fast.kernels._products_backward import whole_config

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(params=[True, False], ids=["all keys", "tiles"], autouse=True)
def taken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every pass, forward and backward, takes the kernel of all keys; and the same with the kernels of tiles, which other
    architectures than sm_90 have for all calls."""
    of_all: set[tuple[str, bool]] = set()

    def noted(kernel: str, *others: Any) -> Any:
        config = whole_config(kernel, *others)
        of_all.add((kernel, config is not None))
        return config if request.param else None

    monkeypatch.setattr(_products_backward, "whole_config", noted)
    yield
    has_them = os.environ.get("VLATTN_PTX", "90") == "90"
    assert of_all == {("forward_whole", has_them), ("backward_whole", has_them)}


def masks(n: int, m: int) -> dict[str, Any]:
    """Padding among the keys, and rows that see no key."""
    key_mask = torch.rand(2, m) > 0.3
    key_mask[1, m // 2 :] = False
    mask = torch.rand(n, m) > 0.4
    mask[0] = False
    return {"key_mask": key_mask, "attn_mask": mask}


@pytest.mark.parametrize(
    "n, m, d, options",
    [
        (5, 16, 8, ()),
        (33, 64, 40, ("key_mask",)),
        (70, 77, 64, ("is_causal",)),
        (40, 129, 16, ("key_mask", "attn_mask")),
        (65, 256, 16, ("attn_mask", "is_causal")),
        (32, 100, 128, ("key_mask", "is_causal")),
        (66, 160, 64, ()),
    ],
)
@pytest.mark.parametrize("dtype", (BF16, FP16), ids=str)
def test_score_attention(n: int, m: int, d: int, options: tuple[str, ...], dtype: torch.dtype) -> None:
    found = masks(n, m) | {"is_causal": True}
    shapes = {"query": (2, 4, n, d), "key": (2, 2, m, d), "value": (2, 2, m, d)}
    inputs = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    score_cases.check("triton", inputs, lambda _: "dot", enable_gqa=True, **{name: found[name] for name in options})


@pytest.mark.parametrize("score", [score for score in PRODUCTS if not score.startswith("cosine")])
def test_scores(score: str) -> None:
    inputs, make = score_cases.tensors("triton", score, b=2, n=37, m=70)
    score_cases.check("triton", as_dtype(inputs, BF16), make, cancels=True, key_mask=masks(37, 70)["key_mask"])


@pytest.mark.parametrize("rule", ("gradient", "attention"))
@pytest.mark.parametrize("n, options", [(33, ()), (70, ("key_mask", "attn_mask")), (130, ("key_mask", "is_causal"))])
def test_relevancy_attention(rule: str, n: int, options: tuple[str, ...]) -> None:
    """With a row of the carrier."""
    found = masks(n, n) | {"is_causal": True}
    inputs = relevancy_cases.tensors(n, b=2, h=4, d=16, dv=16, rows=1, dtype=BF16)
    relevancy_cases.check("triton", inputs, rule=rule, **{name: found[name] for name in options})


@pytest.mark.parametrize("m", (50, 100, 200))
def test_padding_is_not_read_into_gradients(m: int) -> None:
    """Keys and values of padding hold NaN and infinite numbers, and P of a zero key, 2^-lse, would be infinite."""
    query, key, value = (torch.randn(2, 2, n, 16) for n in (34, m, m))
    query[..., 0], key[..., 0] = 20.0, -20.0  # logits around -400
    key_mask = torch.ones(2, m, dtype=torch.bool)
    key_mask[0, 5:9], key_mask[1, 17:] = False, False
    low = [x.to(BF16) for x in (query, key, value)]
    bad = [x.masked_fill(~key_mask[:, None, :, None], number) for x, number in zip(low[1:], (torch.nan, torch.inf), strict=True)]
    found = _gradients("triton", [low[0], *bad], key_mask=key_mask, scale=1.0)
    exact = _gradients("reference", [x.double() for x in low], key_mask=key_mask, scale=1.0)
    _assert_close(found, exact, slice(1, None))  # the sum of equal numbers cancels


def test_dropout() -> None:
    """The pairs that the forward pass dropped, and no others."""
    inputs = [torch.randn(2, 4, n, 16, dtype=BF16) for n in (70, 77, 77)]
    exact = [x.double() for x in inputs]
    options = {"dropout_p": 0.4, "is_causal": True}
    _assert_close(_gradients("triton", inputs, **options), _gradients("streaming", exact, **options))


def test_values_have_heads_of_their_own() -> None:
    """Two heads share a value, and none a key: weights for each head make such calls."""
    inputs, make = score_cases.tensors("triton", "general-tanh-per_head", b=2, h=4, kv=2, n=37, m=70)
    score_cases.check("triton", as_dtype(inputs, BF16), make, cancels=True, enable_gqa=True)


def _gradients(backend: str, inputs: list[torch.Tensor], **options: Any) -> tuple[torch.Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    torch.manual_seed(1)
    out = va.score_attention(*leaves, score="dot", backend=backend, **options)
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    return torch.autograd.grad(out, leaves, cotangent.to(out.dtype))


def _assert_close(found: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...], features: slice = slice(None)) -> None:
    for one, other in zip(found, exact, strict=True):
        one, other = one[..., features].double(), other[..., features]
        assert (one - other).abs().max() <= 0.02 * other.abs().max()  # NaN is not
