"""What Python spends on a call: the benchmark runs where there is no GPU, in Triton's interpreter and without it."""

import json
import os
import subprocess
import sys

import pytest

from tools.pages import report
from vlattn_fast.benchmarks import __main__ as command


def test_the_host_is_timed_without_launches(monkeypatch, tmp_path, capsys):
    """Every operator, forward and backward; what is launched does nothing, and afterwards launches are launches again. A second
    run is compared with the first."""
    pytest.importorskip("triton")
    pytest.importorskip("pytest_benchmark")
    from triton.runtime.jit import KernelInterface

    from vlattn_fast.benchmarks import host
    from vlattn_fast.dispatch import call as calls
    from vlattn_fast.ops import OPERATORS

    before = KernelInterface.__getitem__, calls.on_cpu
    monkeypatch.setattr(host, "STORAGE", tmp_path / "storage")
    assert command.main(["host", "--rounds", "2", "--out", str(tmp_path / "first"), "--benchmark-autosave"]) == 0
    assert command.main(["host", "--rounds", "2", "--out", str(tmp_path), "-k", "maxsim", "--benchmark-compare"]) == 0
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
    command = [sys.executable, "-m", "vlattn_fast.benchmarks", "host", "--rounds", "1", "--out", str(tmp_path)]
    subprocess.run(command, check=True, env=plain)
    assert "triton" in {row["backend"] for row in json.loads((tmp_path / "host-cpu.json").read_text())}
