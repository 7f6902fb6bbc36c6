"""500 random calls, each right by the rule or refused by name; more ran once: results.json, on emulated GPUs emulated.json."""

import importlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.helpers.ops.backends import cuda_library, ready  # noqa: F401 (a fixture)
from vlattn_fast.backends.streaming._scores import _Units
from vlattn_fast.checking import fuzz
from vlattn_fast.checking.cases._dice import LAYOUTS, lay_out
from vlattn_fast.cli import app
from vlattn_fast.dispatch import call as calls
from vlattn_fast.ops import OPERATORS

CONFIGURATIONS, PART = 500, 50


def first_number() -> int:
    """0; in CI others with each commit, the same again for the same one. Names of tests and failures show it."""
    if "CI" not in os.environ:
        return 0
    command = ["git", "rev-list", "--count", "HEAD"]
    return CONFIGURATIONS * int(subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, check=True).stdout)


FIRST = first_number()


@pytest.fixture
def every_backend(cuda_library: Path) -> Iterator[None]:  # noqa: F811
    with ready("triton"), ready("cuda", cuda_library):
        yield


@pytest.mark.usefixtures("every_backend")
@pytest.mark.parametrize("first", range(FIRST, FIRST + CONFIGURATIONS, PART))
@pytest.mark.slow
def test_right_or_refused(first: int) -> None:
    summary = fuzz.Summary()
    for outcome in fuzz.fuzz(PART, first):
        summary.add(outcome)
    assert not summary.failures, "\n".join(summary.failures)
    assert summary.compared.total() > PART / 2


def test_stored_results() -> None:
    """Of the long runs: nothing is left out, and nothing failed."""
    run = json.loads((Path(__file__).parent / "results.json").read_text())
    emulated = json.loads((Path(__file__).parent / "emulated.json").read_text())
    assert run["configurations"] >= 20_000
    assert {(one["architecture"], one["backend"]) for one in emulated} == set(product(("sm_80", "sm_90"), ("triton", "cuda")))
    for one in (run, *emulated):
        assert one["commit"] and sum(one["compared"].values()) + sum(one["refused"].values()) == one["configurations"]
        assert one["failures"] == [] and one["worst_ratio"] <= 1.0


def test_every_operator_and_backend_is_drawn() -> None:
    drawn = [fuzz.drawn(number) for number in range(CONFIGURATIONS)]
    assert {operator for operator, _, _ in drawn} == set(OPERATORS)
    assert {backend for _, backend, _ in drawn} == set(fuzz.BACKENDS)
    assert {dtype for _, _, dtype in drawn} == set(fuzz.DTYPES)


def test_one_score_is_drawn_in_every_call() -> None:
    (outcome,) = fuzz.fuzz(1, 7, backends=("streaming",), score="distance")
    assert outcome.passed and outcome.operator == "score_attention" and "score=distance" in outcome.drawn
    assert outcome.repro().endswith("--fuzz 1 --seed 7 --score distance")


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_call_of_each_operator(operator: str) -> None:
    assert all(outcome.passed for outcome in fuzz.fuzz(2, 4, operators=(operator,), backends=("streaming",)))


def test_a_configuration_is_emulated_alone_as_it_is_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of warps, too, is that of the command which repeats it."""
    reseeded = []
    monkeypatch.setattr(calls, "on_cpu", calls.OnCpu((9, 0), reseed=lambda: reseeded.append("90")))
    assert all(outcome.passed for outcome in fuzz.fuzz(2, operators=("attention_map",), backends=("streaming",)))
    assert reseeded == ["90", "90"]


@pytest.mark.slow
def test_tangents_are_drawn_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    right, made = fuzz._tangents, set[str]()

    def noted(*arguments: Any) -> Any:
        tangents = right(*arguments)
        made.update(tangents)
        return tangents

    monkeypatch.setattr(fuzz, "_tangents", noted)
    outcomes = list(fuzz.fuzz(20, operators=("relevancy_step",), backends=("streaming",)))
    assert all(outcome.passed for outcome in outcomes) and {"tangent of output 0", "tangent of gradient of query"} <= made
    factors = cycle((2.0, 1.0, 1.0))  # ours, the formula in float64, and in the call's dtype

    def flawed(*arguments: Any) -> Any:
        factor = next(factors)
        return {name: factor * y for name, y in right(*arguments).items()}

    monkeypatch.setattr(fuzz, "_tangents", flawed)
    assert not all(outcome.passed for outcome in fuzz.fuzz(20, operators=("relevancy_step",), backends=("streaming",)))


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


FLAWS: dict[str, tuple[str, str, Callable[[Any], Any]]] = {  # by operator: the function of its streaming code, and its flaw
    "attention_map": ("a map a thousandth too large", "forward", lambda right: lambda *inputs: right(*inputs) * 1.001),
    "score_attention": ("a log-sum-exp a thousandth too large", "log_of_sum", lambda right: lambda *x: right(*x) + 1e-3),
    "attention_statistics": (
        "all groups of keys taken for one",
        "forward",
        lambda right: (
            lambda inputs: right(
                inputs._replace(key_groups=None if inputs.key_groups is None else inputs.key_groups.clamp(max=0))
            )
        ),
    ),
}


def caught(operator: str, monkeypatch: pytest.MonkeyPatch) -> fuzz.Outcome:
    """The first call from number 7 on that shows the flaw: these are small."""
    flaw, name, plant = FLAWS[operator]
    target = importlib.import_module(f"vlattn_fast.backends.streaming.{operator}")
    monkeypatch.setattr(target, name, plant(getattr(target, name)))
    outcomes = fuzz.fuzz(20, 7, operators=(operator,), backends=("streaming",))
    first = next((outcome for outcome in outcomes if not outcome.passed), None)
    assert first is not None, f"{flaw}: not caught"
    return first


@pytest.mark.parametrize("operator", list(FLAWS)[1:])
@pytest.mark.slow
def test_a_planted_flaw_is_caught(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    caught(operator, monkeypatch)


@pytest.mark.slow  # it judges a wrong call twice, with all its other draws
def test_a_planted_flaw_is_repeated_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    first = caught("attention_map", monkeypatch)
    command = f"verify {first.operator} --backend streaming --fuzz 1 --seed {first.seed}"
    assert first.repro() == f"vlattn {command}"
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 1 and first.drawn in result.output and "1 failed" in result.output
    assert first.worst in result.output  # with its errors


def test_a_formula_that_is_exact_by_luck_of_ties() -> None:
    """A row of two equal weights, divided by its sum: the plain gradient of the query cancels to its last bit."""
    outcome = fuzz.run(954710, operators=("attention_map",), backends=("streaming",))
    assert "values=constant" in outcome.drawn and outcome.passed, outcome


@pytest.mark.slow
def test_digits_that_small_numbers_lose_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tanh from an exponential, as the Triton and CUDA C++ kernels had it in additive scores."""
    call = partial(fuzz.run, 1502, operators=("score_attention",), backends=("streaming",))
    right = call()
    assert all(fact in right.drawn for fact in ("score=additive", "values=small", "bias=False")) and right.passed
    tanh = _Units.activation
    # rounded as 2 / (1 + e) is: to a part of 1, not of tanh
    monkeypatch.setattr(_Units, "activation", lambda self, a, out: tanh(self, a, out).add_(1.0).sub_(1.0))
    wrong = call()
    assert wrong.worst.startswith("gradient of vector") and not wrong.passed


def test_the_command_stores_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "on_cpu", calls.OnCpu())
    out = tmp_path / "results.json"
    words = ["verify", "attention_map", "--backend", "streaming", "--fuzz", "20", "--out", str(out)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    stored = json.loads(out.read_text())
    assert stored["configurations"] == stored["compared"]["streaming"] == 20 and stored["failures"] == []
    assert 0 <= stored["worst_ratio"] <= 1 and stored["commit"]
    assert stored["command"].startswith("TRITON_INTERPRET=1 vlattn")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fuzz", "1", "--dtype", "float32"], "--dtype and --device must be left out with --fuzz"),
        (["--out", "x.json"], "--out must be given with --fuzz"),
        (["no_operator", "--fuzz", "1"], "OPERATOR must be one of"),
        (["--fuzz", "0"], "--fuzz"),
    ],
)
def test_options_that_do_not_fit_are_refused(words: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["verify", *words])
    assert result.exit_code == 2 and message in result.output.replace("\n", " ")
