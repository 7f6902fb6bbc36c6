"""Relevancy steps and maps behind any score of score_attention, on every backend that has them, against whole maps by the score's
formula."""

import math
from typing import Any

import pytest
import torch

from tests.helpers.ops.backends import F64, HALVES, assert_refused, each, finest, on
from tests.helpers.ops.core_cases import FEW, check, core_of, made
from tests.helpers.ops.masks import COMMON, masks_of, real_keys
from tests.helpers.ops.relevancy_cases import RULES
from tests.helpers.ops.score_cases import KINDS, of_kernels
from vlattn_fast.dispatch import choice
from vlattn_fast.ops.core_scores import core_lse, core_map, core_step

BACKENDS = ("streaming", "cpu", "triton", "cuda")
CHOSEN = dict.fromkeys(BACKENDS[:3], FEW) | {"cuda": ("additive", "hadamard-tanh-key")}
PLAIN: dict[str, Any] = {"attn_mask": None, "key_mask": None, "is_causal": False, "scale": 1.0}


@each("score", **{backend: of_kernels(backend, (*KINDS, "general-tanh-per_head")) for backend in BACKENDS})
def test_every_kind(backend: str, score: str) -> None:
    """Heads that share keys, or with weights of their own values alone; more keys than a tile has, and padding."""
    for rule, row_normalize in RULES:
        inputs, make = made(score, 7, 37, kv=1, dtype=finest(backend))
        check(backend, inputs, make, rule=rule, row_normalize=row_normalize, key_mask=real_keys(2, 37))


@each("score", **CHOSEN)
def test_one_row_and_more_than_one_product_takes(backend: str, score: str) -> None:
    """More than 64 rows pass maps, which are stored."""
    for rows in (1, 3, 17, 66):
        inputs, make = made(score, 35, 19, b=1, rows=rows, dtype=finest(backend))
        check(backend, inputs, make, maps=False)


@pytest.mark.slow("triton")
@each("dtype", streaming=HALVES, cpu=HALVES, triton=HALVES, cuda=HALVES)
def test_half_precision(backend: str, dtype: torch.dtype) -> None:
    for score in of_kernels(backend, KINDS) if dtype == torch.bfloat16 else CHOSEN[backend][1:]:
        for rows in (1, 2):
            inputs, make = made(score, 9, 20, b=1, rows=rows, dtype=dtype)
            check(backend, inputs, make, maps=rows == 1)


def groups(n: int, m: int) -> dict[str, Any]:
    bias = torch.randn(2, 2, 2).masked_fill(torch.rand(2, 2, 2) < 0.2, -torch.inf)
    return {"group_bias": bias, "query_groups": torch.arange(n) % 3 - 1, "key_groups": torch.arange(m) % 3 - 1}


@each("score", **CHOSEN)
@pytest.mark.parametrize("mask", (*COMMON, "bool of each H", "no pair", "groups"))
def test_masks(mask: str, backend: str, score: str) -> None:
    inputs, make = made(score, 19, 21, dtype=finest(backend))
    if backend == "cuda" and mask == "groups":
        assert_refused(backend, "no group_bias", lambda: check(backend, inputs, make, **groups(19, 21)))
        return
    options = groups(19, 21) if mask == "groups" else masks_of(mask, 19, 21)
    check(backend, inputs, make, rule="attention" if "finite" in mask else "gradient", **options)


@each("score", **CHOSEN | dict.fromkeys(BACKENDS[:3], ("general-key-bias", *FEW[1:])))
def test_sinks(backend: str, score: str) -> None:
    """The bias of a score cancels in a softmax, but not beside a sink."""
    inputs, make = made(score, 6, 9, dtype=finest(backend))
    check(backend, inputs, make, sink=torch.randn(2), key_mask=real_keys(2, 9))


@each("score", **CHOSEN)
def test_the_attentions_own_lse(backend: str, score: str) -> None:
    """It is taken in 16 bits; where its rounding would show another one is computed."""
    for dtype, share in ((torch.bfloat16, 0.5), (torch.float32, 1.0)):
        inputs, make = made(score, 6, 9, dtype=dtype)
        core = core_of(inputs, make)
        options: dict[str, Any] = {**PLAIN, "key_mask": real_keys(2, 9), "backend": backend}
        of_map = core, inputs["value"], inputs["grad_output"]
        lse = core_lse(core, **options)
        expected = core_step(inputs["relevancy"], *of_map, rule="gradient", row_normalize=False, **options)
        for more, factor in ((0.0, 1.0), (math.log(2), share)):
            got = core_step(inputs["relevancy"], *of_map, rule="gradient", row_normalize=False, lse=lse + more, **options)
            torch.testing.assert_close(got, factor * expected, rtol=1e-4, atol=1e-6)
            if backend == "cuda":
                continue
            got = core_map(*of_map, rule="attention", lse=lse + more, **options)
            torch.testing.assert_close(got, factor * core_map(*of_map, rule="attention", **options), rtol=1e-4, atol=1e-6)


@each("score", **CHOSEN)
def test_what_stands_in_padding_shows_nowhere(backend: str, score: str) -> None:
    inputs, make = made(score, 6, 9, dtype=finest(backend))
    real, found = real_keys(2, 9), []
    for filler in (torch.nan, 0.5):
        core = core_of(inputs, make)
        core = core._replace(key=core.key.masked_fill(~real[:, None, :, None], filler))
        value = inputs["value"].masked_fill(~real[:, None, :, None], filler)
        options = {**PLAIN, "key_mask": real, "backend": backend}
        of_map = core, value, inputs["grad_output"]
        found.append(core_step(inputs["relevancy"], *of_map, rule="gradient", row_normalize=True, **options))
        if backend != "cuda":
            found.append(core_map(*of_map, rule="gradient", **options))
    half = len(found) // 2
    for with_nan, without in zip(found[:half], found[half:], strict=True):
        assert torch.equal(with_nan, without) and without[0].any()
        assert not with_nan.masked_select(~real[:, None]).any()


@on(*BACKENDS)
@pytest.mark.parametrize("n, m", [(0, 4), (4, 0)])
def test_empty_sizes(n: int, m: int, backend: str) -> None:
    for score in CHOSEN[backend]:
        inputs, make = made(score, n, m, dtype=finest(backend))
        check(backend, inputs, make)


def test_which_backend_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's kernels for what they take; a call that torch transforms runs in plain PyTorch."""
    chosen: list[str] = []
    load = choice.load
    monkeypatch.setattr("vlattn_fast.ops.core_scores.load", lambda backends, name: (chosen.append(name), load(backends, name))[1])
    for dtype in (torch.float32, F64):
        inputs, make = made("additive", 3, 4, dtype=dtype)
        core = core_of(inputs, make)
        core_lse(core, **PLAIN)
        torch.func.vmap(lambda scale, core=core: core_lse(core, **PLAIN) * scale)(torch.ones(2))
    assert chosen == ["cpu", "streaming", "streaming", "streaming"]
    with pytest.raises(ValueError, match="backend='triton' cannot run step of a core score.*float16, bfloat16 and float32"):
        core_step(inputs["relevancy"], core, None, None, rule="attention", row_normalize=False, backend="triton", **PLAIN)
