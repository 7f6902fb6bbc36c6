"""Benchmarks beside those of operators: random calls, whose worst are stored, paged statistics, the host."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tools import cliffs
from tools.pages import report
from vlattn_fast.backends.native import library
from vlattn_fast.benchmarks import _choice
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
    cliffs.main(["--minutes", "0.01", "--out", str(tmp_path)])
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


SIZES = {"R": 3, "Hkv": 2, "shared": 4, "M": 40, "D": 8}


@pytest.mark.parametrize("name, tokens", [("paged-answers", 1), ("paged-prompt", 5)])
def test_the_bound_reads_each_key_once(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The query heads of a key head are rows of one block: repeated keys are four times the bytes."""
    (benchmark,) = _choice.choose([f"paged_attention_statistics/forward/{name}"])
    problem = benchmark.build({**SIZES, "N": tokens}, torch.device("cpu"), torch.float32)
    calls: list[dict[str, Any]] = []
    whole = F.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        calls.append({"query": query, "key": key, "out": whole(query, key, value, attn_mask=attn_mask)})
        return calls[-1]["out"]

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    problem.variants["SDPA"].run(problem.tensors)
    (call,) = calls
    assert call["key"].shape == (3, 2, 40, 8) and call["query"].shape == (3, 2, 4 * tokens, 8)
    # the same attention, a head at a time
    query = problem.tensors["tokens"].view(3, tokens, 8, 8).transpose(1, 2)  # (R, H, N, D)
    key = call["key"].repeat_interleave(4, 1)
    seen = torch.ones(tokens, 40, dtype=torch.bool).tril(40 - tokens)
    want = whole(query, key, key, attn_mask=seen)
    torch.testing.assert_close(call["out"].unflatten(2, (4, tokens)).flatten(1, 2), want)


def test_the_host_is_timed_without_launches(monkeypatch, tmp_path, capsys):
    """Every operator, forward and backward; what is launched does nothing, and afterwards launches are launches again. A second
    run is compared with the first."""
    pytest.importorskip("triton")
    pytest.importorskip("pytest_benchmark")
    from triton.runtime.jit import KernelInterface

    from tools import host
    from vlattn_fast.dispatch import call as calls
    from vlattn_fast.ops import OPERATORS

    before = KernelInterface.__getitem__, calls.on_cpu
    monkeypatch.setattr(host, "STORAGE", tmp_path / "storage")
    host.main(["--rounds", "2", "--out", str(tmp_path / "first"), "--benchmark-autosave"])
    host.main(["--rounds", "2", "--out", str(tmp_path), "-k", "maxsim", "--benchmark-compare"])
    compared = capsys.readouterr().out
    assert "maxsim, forward] (NOW)" in compared and "maxsim, forward] (0001" in compared
    chosen = json.loads((tmp_path / "host-cpu.json").read_text())
    assert {row["host"] for row in chosen} == {"SDPA", "maxsim"}  # which maxsim is compared with
    (tmp_path / "first" / "host-cpu.json").replace(tmp_path / "host-cpu.json")
    assert (KernelInterface.__getitem__, calls.on_cpu) == before
    rows = json.loads((tmp_path / "host-cpu.json").read_text())
    if not host.library.exists:
        pytest.skip("the CPU kernels are not built")
    timed = {name: host.timed_backends(name) for name in OPERATORS}
    assert {row["backend"] for row in rows} == {backend for backends in timed.values() for backend in backends}
    for backend, goals in (("triton", [25, 25, 60, None, None]), ("cpu", [30, 30, 30, 30, None])):
        found = [row for row in rows if row["backend"] == backend]
        assert {row["host"].split(",")[0] for row in found} == {
            host.SDPA,
            *(name for name in OPERATORS if backend in timed[name]),
        }
        both = {row["host"] for row in found if row["pass"] == "forward+backward"}
        assert {row["host"] for row in found} - both == {"attention_map", "relevancy_step", "paged_attention_statistics"}
        p50 = {(row["host"], row["pass"]): row["p50_us"] for row in found}
        for row in found:
            assert row["rounds"] == 2 and 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"] and row["commit"]
            without = row["host"] == host.SDPA or (row["host"], row["pass"]) == ("relevancy_residual", "forward")
            assert (row["launches"] > 0) == (backend == "triton" and not without)
            assert row["above_sdpa_us"] == pytest.approx(row["p50_us"] - p50["SDPA", row["pass"]], abs=0.02)
        goal = {row["host"]: row["goal_us"] for row in found if row["pass"] == "forward"}
        names = ("score_attention", "relevancy_attention", "congruence_loss", "attention_map", "SDPA")
        assert [goal[name] for name in names] == goals
    report.write(tmp_path, tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert "| call | triton, forward | triton, forward+backward | cpu, forward | cpu, forward+backward |" in text
    map_rows = {row["backend"]: row["above_sdpa_us"] for row in rows if row["host"] == "attention_map"}
    assert f"| attention_map | {map_rows['triton']:.1f} |  | {map_rows['cpu']:.1f} (30) |  |" in text
    assert "On a CPU: not measured." in text  # by the other benchmarks


@pytest.mark.slow
def test_the_host_is_timed_without_the_interpreter(tmp_path):
    """As a user does: no GPU is there, and no launch may ask for one."""
    pytest.importorskip("triton")
    pytest.importorskip("pytest_benchmark")
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.host", "--rounds", "1", "--out", str(tmp_path)]
    subprocess.run(command, check=True, env=plain)
    assert "triton" in {row["backend"] for row in json.loads((tmp_path / "host-cpu.json").read_text())}
