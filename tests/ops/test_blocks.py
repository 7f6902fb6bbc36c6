"""Formulas in blocks of samples and queries are the formulas, hold no larger map, and drop what the kernels drop."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import vlattn_fast as va
from vlattn_fast.backends.streaming import _tiles
from vlattn_fast.checking import blocks, verify
from vlattn_fast.checking.cases import Example
from vlattn_fast.ops import OPERATORS

IN_BLOCKS = (
    "score_attention",
    "relevancy_attention",
    "relevancy_step",
    "attention_map",
    "attention_statistics",
    "attention_divergence",
    "indexer_divergence",
)
CASES = [case for case in verify.cases(operators=IN_BLOCKS) if "attn_mask" not in case.options]


def outputs(case: Example, formula: Callable[..., Any]) -> verify.Tensors:
    """Outputs and gradients in float64."""
    run = functools.wraps(formula)(lambda *, backend, **arguments: formula(**arguments))
    return verify._run(replace(case, call=run), case.in_dtype(torch.float64), "reference", torch.float64)


close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_they_are_the_formulas(case: Example) -> None:
    expected = outputs(case, OPERATORS[case.operator].formula)
    for numbers in (800, 2 * 2 * 33 * 47):  # blocks of a few queries, and of a sample with all its queries
        got = outputs(case, blocks.formula(case.operator, numbers))
        close(got, expected)


def test_statistics_that_were_not_asked_for() -> None:
    arguments = {"query": torch.randn(2, 2, 9, 4), "key": torch.randn(2, 2, 9, 4), "statistics": ["received"], "is_causal": True}
    got = blocks.formula("attention_statistics", 100)(**arguments)
    assert got.entropy is None
    close(got.received, OPERATORS["attention_statistics"].formula(**arguments).received, rtol=1e-5)


class Largest(TorchFunctionMode):
    """The most numbers that a function of torch has returned."""

    numbers = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result


@pytest.mark.parametrize("operator", ("score_attention", "relevancy_attention"))
def test_they_hold_a_block_of_a_map_at_a_time(operator: str) -> None:
    query = torch.randn(2, 2, 300, 4, requires_grad=True)
    arguments = {"query": query, "key": query, "value": query, "is_causal": True}
    arguments |= {"carrier": torch.zeros(2, 1, 300, requires_grad=True)} if operator == "relevancy_attention" else {}
    with Largest() as largest:
        result = blocks.formula(operator, 6000)(**arguments)
        sum(x.sum() for x in (result if isinstance(result, tuple) else (result,))).backward()
    assert 300 * 8 <= largest.numbers <= 6000 < 300 * 300 and query.grad is not None


def test_a_benchmark_is_compared_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """At any size: the formula of the longest sequence, which fits no memory, has a result."""
    from vlattn_fast.benchmarks import _choice, _measure

    monkeypatch.setattr(_measure, "_free_memory", lambda device: 1000)
    (benchmark,) = _choice.choose(["relevancy_attention/gradient, forward+backward/highres"])
    small = {"N": 40, "H": 2}
    measurement = _measure.Measurement(benchmark, torch.device("cpu"), overrides=small, rounds=1, compiled=False)
    assert measurement.truth is not None and measurement.standing["streaming"].error is not None


@pytest.mark.parametrize("what", ("dropout", "causal grouped dropout"))
def test_they_drop_what_the_backends_drop(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of a few queries."""
    from tools.gpu.full import Full

    monkeypatch.setattr(blocks, "formula", functools.partial(blocks.formula, numbers=300))
    case = Full("score_attention", what, "clip").example(rehearsed=True)
    tensors = {name: x[:1, :, :20].contiguous() for name, x in case.in_dtype(torch.float64).items()}
    close(verify._run(case, tensors, "streaming"), verify._run(case, tensors, "reference"))
    undropped = replace(case, options={**case.options, "dropout_p": 0.0})
    assert not torch.allclose(
        verify._run(undropped, tensors, "reference")["output 0"], verify._run(case, tensors, "reference")["output 0"]
    )


def test_a_gpu_has_larger_tiles() -> None:
    assert _tiles.tile_elements(torch.empty(0)) == _tiles.TILE_ELEMENTS
    assert _tiles.tile_elements(torch.empty(0, device="meta")) == 64 * _tiles.TILE_ELEMENTS


def test_gradients_of_keys_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the tiles of queries, and rounded once: so nearly all have the bits that one tile gives."""
    tensors = [torch.randn(1, 1, n, 16).bfloat16().requires_grad_() for n in (256, 32, 32)]
    found = []
    for elements in (1 << 19, 64):
        monkeypatch.setattr(_tiles, "TILE_ELEMENTS", elements)
        out = va.score_attention(*tensors, softcap=5.0, backend="streaming")
        found.append(torch.autograd.grad(out.square().sum(), tensors[1:]))
    for one, many in zip(*found, strict=True):
        assert (one != many).double().mean() < 0.05
