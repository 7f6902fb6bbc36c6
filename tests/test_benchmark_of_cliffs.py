"""`python -m vlattn_fast.benchmarks cliffs`: random calls, of which the worst are printed and stored."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vlattn_fast.backends.native import library
from vlattn_fast.benchmarks import __main__, cliffs
from vlattn_fast.checking.cases import Example
from vlattn_fast.ops import OPERATORS

CPU = torch.device("cpu")


@pytest.mark.parametrize("operator", OPERATORS)
def test_drawn_calls_run_on_auto_and_its_baselines(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cliffs, "WORK", 1 << 18)
    for seed in range(6):
        example, facts = cliffs.draw(operator, random.Random(seed), CPU)
        assert facts["B"] * facts["H"] * facts["N"] * facts["M"] * facts["D"] <= 1 << 18
        variants = cliffs.runs(example, both=seed % 2 == 0)
        baselines = {"streaming"} if "cpu" in OPERATORS[operator].backends and library.exists else set()
        assert {"auto", "reference"} | baselines <= set(variants) and "cpu" not in variants
        for run in variants.values():
            run()


def test_a_slow_call_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = iter(range(100))

    def runs(*_: object) -> dict[str, object]:
        behind = next(calls) == 1
        return {"auto": lambda: passed.append(0.02 if behind else 0.004), "streaming": lambda: passed.append(0.008)}

    passed: list[float] = []
    clock = SimpleNamespace(perf_counter=lambda: sum(passed), monotonic=lambda: sum(passed))
    monkeypatch.setattr(cliffs, "time", clock)
    monkeypatch.setattr(cliffs, "runs", runs)
    monkeypatch.setattr(cliffs, "WORK", 1 << 18)
    monkeypatch.setattr(cliffs, "MODELS", ())
    assert __main__.main(["cliffs", "--minutes", "0.01", "--out", str(tmp_path)]) == 0
    records = json.loads((tmp_path / "cliffs-cpu.json").read_text())
    assert records[0]["ratio"] > 2 and records[0]["baseline"] == "streaming" and records[0]["behind"] == 1
    assert all(record["ratio"] < 1 for record in records[1:])
    assert "more than 1.3 times the time of its best baseline in 1\n" in capsys.readouterr().out


def test_bfloat16_is_timed_beside_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes: list[torch.dtype] = []

    def runs(example: Example, both: bool) -> dict[str, Callable[[], None]]:
        dtype = example.tensors["query"].dtype
        return {"auto": lambda: dtypes.append(dtype)}

    clock = SimpleNamespace(perf_counter=lambda: sum(3.0 if dtype == torch.bfloat16 else 2.0 for dtype in dtypes))
    monkeypatch.setattr(cliffs, "time", clock)
    monkeypatch.setattr(cliffs, "runs", runs)
    monkeypatch.setattr(cliffs, "MODELS", ((1, 2, 5, 8),))
    records = cliffs.beside_float32(CPU)
    assert [(record["cliff"], record["pass"]) for record in records] == [
        ("score_attention", "forward"),
        ("score_attention", "forward+backward"),
        ("relevancy_attention", "forward+backward"),
    ]
    assert all(record["ratio"] == 1.5 and record["baseline"] == cliffs.IN_FLOAT32 and record["N"] == 5 for record in records)
