"""Products of 16-bit numbers on a CPU take nothing from outside of a row, as torch's do with AMX (docs/developers/bugs.md)."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.ops.amx import TILE, AmxProducts
from tests.helpers.ops.backends import F64, HALVES
from tests.helpers.ops.every_call import CALLS, every_call, outputs_of
from tests.helpers.ops.score_cases import DOT_PRODUCTS, FEW, SCORES, Params, attention_inputs
from vlattn_fast._ground import tensors as ground
from vlattn_fast.nn.score_attention import ScoreAttention

BACKENDS = ("reference", "streaming", "sdpa")
OF_THIS_CPU, IN_FLOAT32 = ground._TILE, ground._IN_FLOAT32


@pytest.fixture(autouse=True)
def pads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within these tests every CPU pads as one with AMX does, also the few numbers that are multiplied in float32 elsewhere."""
    monkeypatch.setattr(ground, "_TILE", TILE)
    monkeypatch.setattr(ground, "_IN_FLOAT32", range(0))


def sliced(x: Tensor) -> Tensor:
    """The values of x in a wider tensor, whose rest is NaN."""
    return torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., : x.shape[-1]] if x.dim() else x


def transposed(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def attend(tensors: Params, make: Any, backend: str, cotangent: Tensor) -> dict[str, Tensor]:
    """Output and gradients."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    params = {name: x for name, x in leaves.items() if name not in ("query", "key", "value")}
    with AmxProducts():
        out = va.score_attention(leaves["query"], leaves["key"], leaves["value"], score=make(params), backend=backend)
        grads = torch.autograd.grad(out, list(leaves.values()), cotangent, materialize_grads=True, allow_unused=True)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gaps_between_rows(backend: str, dtype: torch.dtype) -> None:
    """Inputs, parameters and cotangents are slices of wider tensors, whose rest is NaN."""
    wrong = {}
    for score in DOT_PRODUCTS if backend == "sdpa" else SCORES:
        tensors, make = attention_inputs(SCORES[score])
        shape = (*tensors["query"].shape[:3], tensors["value"].shape[3])
        tensors = {name: sliced(x.to(dtype)) for name, x in tensors.items()}
        got = attend(tensors, make, backend, sliced(torch.randn(shape, dtype=dtype)))
        spoiled = [name for name, x in got.items() if not x.isfinite().all()]
        wrong |= {score: spoiled} if spoiled else {}
    assert not wrong


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("layout", (torch.clone, transposed))
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_rows_and_heads(backend: str, layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """A NaN in a query, a key or a value spoils what it spoils in float64, and no row or head beside it in memory."""
    wrong = {}
    for score in ("dot", "general-query") if backend == "sdpa" else FEW["streaming"]:
        for place in ("query", "key", "value"):
            tensors, make = attention_inputs(SCORES[score], b=1)
            tensors[place][0, 1, 2, 0] = torch.nan
            cotangent = torch.randn(*tensors["query"].shape[:3], tensors["value"].shape[3], dtype=F64)
            exact = attend(tensors, make, "reference", cotangent)
            low = {name: layout(x.to(dtype)) if x.dim() == 4 else x.to(dtype) for name, x in tensors.items()}
            got = attend(low, make, backend, layout(cotangent.to(dtype)))
            spoiled = [name for name, x in got.items() if not torch.equal(x.isnan(), exact[name].isnan())]
            wrong |= {(score, place): spoiled} if spoiled else {}
    assert not wrong


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("name", CALLS)
def test_every_operator(name: str, backend: str) -> None:
    every = every_call(name, 5)
    low = {n: sliced(x).requires_grad_(every.differentiable) for n, x in every.in_dtype(torch.bfloat16).items()}
    with AmxProducts():
        outputs = [x for x in outputs_of(every.run(low, backend=backend)) if x is not None]
        used = [x for x in outputs if x.requires_grad]
        cotangents = [sliced(torch.randn_like(x)) if x.dim() else torch.ones_like(x) for x in used]
        grads = torch.autograd.grad(used, [*low.values()], cotangents, materialize_grads=True, allow_unused=True) if used else ()
    finite = [x[x != -torch.inf].isfinite().all() for x in (*outputs, *grads)]  # -inf: the logits of a row without keys
    assert all(finite), (
        "a product of 16-bit numbers is one of vlattn_fast/_ground/tensors.py: product(x, y), linear(x, weight, bias)"
    )


def test_under_autocast() -> None:
    """Parameters and features in float32 are multiplied in bfloat16."""
    query, key, value = (torch.randn(1, 2, 5, 6) for _ in range(3))
    query[0, 0, 3] = torch.nan
    score = va.scores.General(torch.randn(6, 6), projects="query")
    with torch.autocast("cpu", torch.bfloat16), AmxProducts() as products:
        out = va.score_attention(query, key, value, score=score, backend="streaming")
    assert products.products
    assert torch.equal(out.isnan().any(-1), query.isnan().any(-1))


def test_the_weights_of_a_layer() -> None:
    layer = ScoreAttention(12, 2, "general", bias=False).bfloat16()
    states = torch.randn(1, 5, 12, dtype=torch.bfloat16)
    with AmxProducts():
        out, weights = layer(states, need_weights=True)
    assert out.isfinite().all() and weights.isfinite().all()


@pytest.mark.parametrize("dtype", HALVES)
def test_few_numbers_are_projected_in_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ground, "_IN_FLOAT32", IN_FLOAT32)
    weight = sliced(torch.randn(1, 1, 20, 20, dtype=dtype))[0, 0].requires_grad_()
    bias = torch.randn(20, dtype=dtype, requires_grad=True)
    for rows, padded in ((50, False), (4000, True)):
        x = sliced(torch.randn(1, 1, rows, 20, dtype=dtype)).requires_grad_()
        with AmxProducts() as products:
            out = ground.linear(x, weight, bias)
            grads = torch.autograd.grad(out, (x, weight, bias), sliced(torch.randn(out.shape, dtype=dtype)))
        assert out.dtype == dtype and all(y.isfinite().all() for y in (out, *grads))
        assert bool(products.products) == padded


@pytest.mark.parametrize("dtype", HALVES)
def test_this_processor_needs_no_more_padding(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own products of slices with gaps of NaN, padded as they are on this processor."""
    monkeypatch.setattr(ground, "_TILE", OF_THIS_CPU)
    wrong = []
    for size, rows, columns in itertools.product((1, 7, 16, 31, 33, 68, 88, 100), (1, 17, 65), (3, 16, 33)):
        x, weight = (sliced(torch.ones(1, 2, n, size, dtype=dtype)) for n in (rows, columns))
        results = ground.linear(x, weight[0, 0]), ground.linear(x, weight[0]), ground.product(x, weight.mT)
        wrong += [(size, rows, columns, n) for n, y in enumerate(results) if not torch.equal(y, torch.full_like(y, size))]
    assert not wrong
