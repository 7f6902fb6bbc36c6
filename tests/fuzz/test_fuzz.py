"""2,000 random calls, each right by the rule or refused by name; 20,000 ran once, see results.json."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ops.backends import cuda_library, ready  # noqa: F401 (a fixture)
from vlattn_fast import _fuzz
from vlattn_fast._fuzz_cases import LAYOUTS, lay_out

CONFIGURATIONS, PART = 2000, 50


@pytest.fixture
def every_backend(cuda_library: Path) -> Iterator[None]:  # noqa: F811
    with ready("triton"), ready("cuda", cuda_library):
        yield


@pytest.mark.usefixtures("every_backend")
@pytest.mark.parametrize("first", range(0, CONFIGURATIONS, PART))
def test_right_or_refused(first: int) -> None:
    summary = _fuzz.Summary()
    for outcome in _fuzz.fuzz(PART, first):
        summary.add(outcome)
    assert not summary.failures, "\n".join(summary.failures)
    assert summary.configurations == PART and summary.refused < PART / 2


def test_every_operator_and_backend_is_drawn() -> None:
    drawn = [_fuzz.drawn(number) for number in range(CONFIGURATIONS)]
    assert {operator for operator, _, _ in drawn} == set(_fuzz.OPERATORS)
    assert {backend for _, backend, _ in drawn} == set(_fuzz.BACKENDS)
    assert {dtype for _, _, dtype in drawn} == set(_fuzz.DTYPES)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_the_numbers(layout: str) -> None:
    x = torch.randn(2, 3, 4, 5)
    placed = lay_out(x, layout)
    assert placed.shape == x.shape
    if layout.endswith("for all"):
        assert 0 in placed.stride()
    else:
        assert torch.equal(placed, x)
        assert layout == "contiguous" or placed.stride() != x.stride() or placed.storage_offset() > 0


FLAWS: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "a map a thousandth too large": (
        "vlattn_fast.streaming.attention_map",
        "forward",
        lambda right: lambda *inputs: right(*inputs) * 1.001,
    ),
    "a log-sum-exp a thousandth too large": (
        "vlattn_fast.streaming.score_attention",
        "logsumexp",
        lambda right: lambda logits: right(logits) + 1e-3,
    ),
    "all groups of keys taken for one": (
        "vlattn_fast.streaming.attention_statistics",
        "forward",
        lambda right: lambda q, k, groups, *rest: right(q, k, None if groups is None else groups.clamp(max=0), *rest),
    ),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_planted_flaw_is_caught_and_repeated_by_its_number(flaw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, plant = FLAWS[flaw]
    target = importlib.import_module(module)
    monkeypatch.setattr(target, name, plant(getattr(target, name)))
    failed = [outcome for outcome in _fuzz.fuzz(150, 0, backends=("streaming",)) if not outcome.passed]
    assert failed, f"{flaw}: not caught"
    first = failed[0]
    again = _fuzz.run(first.seed, operators=(first.operator,), backends=("streaming",))
    assert (again.ratio, again.facts) == (first.ratio, first.facts)
    assert first.repro() == f"vlattn verify {first.operator} --backend streaming --fuzz 1 --seed {first.seed}"


def test_stored_results() -> None:
    stored = json.loads((Path(__file__).parent / "results.json").read_text())
    assert stored["configurations"] >= 20000 and stored["failures"] == []
    assert stored["worst_ratio"] <= 1.0 and stored["commit"] and stored["versions"]["torch"]
