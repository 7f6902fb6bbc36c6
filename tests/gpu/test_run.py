"""`make gpu` rehearsed without one: the parts run in Triton's interpreter, and a failure is seen and stored."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from vlattn_fast.benchmarks import _rows

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("gpu", ROOT / "tests" / "gpu" / "run.py")
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)

SANITIZER = """#!/bin/sh
echo "$@" >> "{log}"
test "$1" = --tool || exit 5
shift 4
"$@" || exit $?
exit {status}
"""


@pytest.fixture
def rehearse(tmp_path):
    """Runs parts with --device cpu: exit status, what was printed, the stored rows."""

    def run(*arguments: str, status: int | None = None) -> tuple[int, str, list[dict]]:
        tools = tmp_path / "tools"
        tools.mkdir(exist_ok=True)
        if status is not None:
            program = tools / "compute-sanitizer"
            program.write_text(SANITIZER.format(log=tmp_path / "log", status=status))
            program.chmod(0o755)
        environment = {**os.environ, "PATH": f"{tools}:/usr/bin:/bin", "VLATTN_COMMIT": "abc123"}
        command = [sys.executable, ROOT / "tests" / "gpu" / "run.py", *arguments, "--device", "cpu", "--out", tmp_path]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        checks = tmp_path / "checks.json"
        return done.returncode, done.stdout + done.stderr, json.loads(checks.read_text()) if checks.exists() else []

    return run


def test_correctness_runs_the_chosen_tests(rehearse):
    status, said, (row,) = rehearse("correctness", "--select", "test_attention_map and empty", "--shards", "2")
    assert status == 0 and row["passed"], said
    assert int(row["summary"].split()[0]) > 0 and row["part"] == "correctness" and row["commit"] == "abc123"
    assert {"device", "torch", "triton", "time", "command", "seconds"} <= row.keys()


def test_without_a_compiler_it_says_so(rehearse):
    status, said, (row,) = rehearse("build")
    assert status == 0 and row["summary"].startswith("not run: nvcc"), said


def test_it_builds_by_cmake_and_says_what_went_wrong(tmp_path, monkeypatch):
    log = tmp_path / "log"
    for tool, status in (("nvcc", 0), ("ninja", 0), ("cmake", 3)):
        (tmp_path / tool).write_text(f"#!/bin/sh\necho {tool} $@ >> {log}\necho what it said\nexit {status}\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    library = tmp_path / "build/cuda/libvlattn_cuda.so"
    library.parent.mkdir(parents=True)
    monkeypatch.setattr(gpu, "TREE", tmp_path)
    library.write_text("old")
    found = gpu.build(argparse.Namespace(device="cuda"))
    assert not found["passed"] and found["summary"] == "cmake -G ended with 3" and found["failures"] == ["what it said\n"]
    assert not library.exists()
    (tmp_path / "cmake").write_text(f"#!/bin/sh\necho cmake $@ >> {log}\necho new > {library}\n")
    assert gpu.build(argparse.Namespace(device="cuda")) == {"passed": True, "summary": "libvlattn_cuda.so, 0.0 MiB"}
    configure, make = log.read_text().splitlines()[-2:]
    assert configure.endswith(f"-S {tmp_path} -B {library.parent}") and make == f"cmake --build {library.parent}"


def test_no_test_is_no_success(rehearse):
    status, said, (row,) = rehearse("correctness", "--select", "no_such_test", "--shards", "1")
    assert status == 1 and not row["passed"], said


def test_without_a_sanitizer_it_says_so(rehearse):
    status, said, (row,) = rehearse("sanitizer")
    assert status == 0 and row["summary"] == "not run: compute-sanitizer is not installed", said


def test_the_sanitizer_runs_an_operator_under_both_tools(rehearse, tmp_path):
    status, said, (row,) = rehearse("sanitizer", "--operators", "attention_map", status=0)
    assert status == 0 and row["passed"] and row["summary"] == "2 runs, 0 failed", said
    calls = (tmp_path / "log").read_text().splitlines()
    assert sorted(call.split()[1] for call in calls) == ["memcheck", "racecheck"]
    assert all(call.endswith("cpu triton attention_map") for call in calls)


def test_what_the_sanitizer_finds_is_a_failure(rehearse):
    status, said, (row,) = rehearse("sanitizer", "--operators", "attention_map", status=9)
    assert status == 1 and not row["passed"] and len(row["failures"]) == 2, said
    assert "FAILED" in said and "ended with 9" in said


def test_an_unknown_part_is_refused(rehearse):
    status, said, rows = rehearse("measure")
    assert status == 2 and "PART must be one of build, correctness, sanitizer, benchmarks; got measure" in said and rows == []


def test_who_runs_out_of_time_is_stopped():
    assert gpu.run([["sleep", "60"], ["true"]], [dict(os.environ)] * 2, 0.5) == [(None, ""), (0, "")]


def test_rows_are_added_and_none_is_lost(tmp_path):
    for number in range(3):
        _rows.append([{"number": number}], tmp_path / "checks.json")
    assert json.loads((tmp_path / "checks.json").read_text()) == [{"number": number} for number in range(3)]


def test_the_parts_fit_in_eight_minutes():
    assert gpu.SECONDS.keys() == gpu.PARTS.keys()
    assert sum(gpu.SECONDS.values()) <= 8 * 60 - 10
