"""max_logit and lse of attention_statistics: every backend against the formula in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import as_dtype
from tests.helpers.ops.backends import F64, core, each, on
from tests.helpers.ops.map_cases import M, N, groups, statistics_inputs
from tests.helpers.ops.masks import COMMON, masks_of

FAST = ("streaming", "cpu", "triton")
NAMES = ("max_logit", "lse")
LOWEST = -1e38  # masks of finfo.min: Triton has logits in base 2, the lowest of which is -2.36e38
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in:RuntimeWarning")


def logits_of(backend: str, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    found = va.attention_statistics(**inputs, statistics=NAMES, **options, backend=backend)
    assert found.mass is None and found.received is None
    assert not found.max_logit.requires_grad and not found.lse.requires_grad
    return found.max_logit, found.lse


def assert_right(backend: str, inputs: dict[str, Tensor], **options: Any) -> None:
    wide = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in options.items()}
    plain = va.reference.attention_statistics(**as_dtype(inputs, F64), statistics=NAMES, **wide)
    exact = inputs["query"].dtype == F64
    size = 1 + float(plain.lse[plain.lse > LOWEST].abs().max())
    for got, wanted in zip(logits_of(backend, inputs, **options), (plain.max_logit, plain.lse), strict=True):
        assert got.dtype == (F64 if exact else torch.float32)
        low = (wanted <= LOWEST) & ~torch.isneginf(wanted)
        assert (got[low] <= LOWEST).all() and not torch.isneginf(got[low]).any()
        torch.testing.assert_close(got[~low].double(), wanted[~low], rtol=0, atol=(1e-13 if exact else 2e-6) * size)


@pytest.mark.parametrize("mask", ("none", *COMMON))
@each("dtype", **{name: core(name) for name in FAST})
def test_against_the_formula(backend: str, dtype: torch.dtype, mask: str) -> None:
    assert_right(backend, as_dtype(statistics_inputs(), dtype), **masks_of(mask, N, M))


def wide_mask(heads: int, m: int) -> Tensor:
    """(heads, N, m) float64, as torch.from_numpy gives it: rows with offsets, one of -1e300 throughout, one of it and of a larger
    number, and one that sees no key."""
    mask = torch.randn(heads, N, m, dtype=F64) + torch.linspace(-37.0, 37.0, N, dtype=F64)[:, None]
    mask[torch.rand(heads, N, m) > 0.8] = -torch.inf
    mask[:, 1:3], mask[:, 2, 3], mask[:, 3] = -1e300, -1e299, -torch.inf
    return mask


@pytest.mark.parametrize("n", [N, 50])  # few queries, and tiles of them
@each("dtype", reference=(F64, torch.float32), **{name: core(name) for name in FAST})
def test_a_float64_mask(backend: str, dtype: torch.dtype, n: int) -> None:
    """Whatever the dtype of the query is. A finite logit stays finite: only a row that sees no key has -inf."""
    inputs = as_dtype(statistics_inputs(n), dtype)
    heads, m = inputs["query"].shape[1], inputs["key"].shape[2]
    mask = wide_mask(heads, m).repeat_interleave(-(-n // N), 1)[:, :n]
    assert_right(backend, inputs, attn_mask=mask)
    options = {"key_mask": torch.rand(len(inputs["key"]), m) > 0.3, "is_causal": True, "sink": torch.randn(heads), "softcap": 2.5}
    options |= {"query_groups": torch.arange(n) % 3 - 1, "key_groups": torch.arange(m) % 4 - 1}
    assert_right(backend, inputs, attn_mask=mask, group_bias=torch.randn(heads, 2, 3), **options)


@on(*FAST)
@pytest.mark.parametrize("scale", [1.7, -0.4, 0.0])
def test_softcap_and_sink(backend: str, scale: float) -> None:
    inputs = as_dtype(statistics_inputs(), torch.float32)
    heads = inputs["query"].shape[1]
    sink = torch.linspace(-200.0, 200.0, heads)
    assert_right(backend, inputs, scale=scale, sink=sink)
    assert_right(backend, inputs, scale=scale, softcap=2.5, sink=torch.randn(heads), is_causal=True)


@on("reference", *FAST)
def test_a_row_without_a_key(backend: str) -> None:
    inputs = as_dtype(statistics_inputs(), torch.float32)
    mask = torch.ones(N, inputs["key"].shape[2], dtype=torch.bool)
    mask[1] = False
    sink = torch.randn(inputs["query"].shape[1])
    largest, lse = logits_of(backend, inputs, attn_mask=mask)
    assert torch.isneginf(largest[:, :, 1]).all() and torch.isneginf(lse[:, :, 1]).all() and lse[:, :, 0].isfinite().all()
    largest, lse = logits_of(backend, inputs, attn_mask=mask, sink=sink)
    assert torch.isneginf(largest[:, :, 1]).all()
    torch.testing.assert_close(lse[:, :, 1], sink.expand(len(lse), -1))
    empty = {"query": inputs["query"], "key": inputs["key"][:, :, :0]}
    assert all(torch.isneginf(x).all() for x in logits_of(backend, empty))


@on("reference", *FAST)
def test_nan_and_infinity_stay(backend: str) -> None:
    query, key = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 20, 8)
    query[0, 0, 1, 3] = torch.nan
    key[0, 0, 5], query[0, 0, 2] = 1e25, 1e25
    largest, lse = logits_of(backend, {"query": query, "key": key})
    assert largest[0, 0, 1].isnan() and lse[0, 0, 1].isnan()
    assert torch.isposinf(largest[0, 0, 2]) and largest[0, 0, [0, 3]].isfinite().all()


@on("reference", *FAST)
def test_beside_the_other_statistics(backend: str) -> None:
    """Nothing that they give changes, nor their gradients."""
    inputs = as_dtype(statistics_inputs(), torch.float32)
    query = inputs.pop("query").requires_grad_()
    options = {**inputs, **groups(), "backend": backend}
    alone = va.attention_statistics(query, statistics=["mass", "maximum"], **options)
    beside = va.attention_statistics(query, statistics=["lse", "maximum", "mass", "max_logit"], **options)
    assert torch.equal(alone.mass, beside.mass) and torch.equal(alone.maximum, beside.maximum)
    grads = [torch.autograd.grad((x.mass.square().sum() + x.maximum.sum()), query)[0] for x in (alone, beside)]
    assert torch.equal(*grads)
    by_default = va.attention_statistics(query, **options)
    assert type(by_default) is va.AttentionStatistics and type(beside) is va.LogitStatistics


def test_of_heads() -> None:
    query = torch.randn(2, 3, 5, 4)
    found = va.attention_statistics(query, query, statistics=["max_logit"])
    torch.testing.assert_close(found.max_logit_of_heads(), (query @ query.mT / 2).amax((0, 2, 3)))
    assert torch.isneginf(va.attention_statistics(query[:0], query[:0], statistics=["max_logit"]).max_logit_of_heads()).all()
    with pytest.raises(ValueError, match="max_logit was not computed; name it in statistics"):
        va.attention_statistics(query, query, statistics=["lse"]).max_logit_of_heads()


@pytest.mark.parametrize("backend", ["streaming", "cpu"])
def test_compiled(backend: str) -> None:
    query = torch.randn(2, 3, 5, 4)

    def run(x: Tensor) -> Tensor:
        found = va.attention_statistics(x, x, statistics=NAMES, backend=backend)
        return found.lse - found.max_logit

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(query), run(query))
