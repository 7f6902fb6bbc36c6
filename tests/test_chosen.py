"""`make test` runs a choice of the cases (tests/helpers/chosen.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = """
import pytest

@pytest.mark.parametrize("size", range(40))
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_sizes(backend, size):
    pass

@pytest.mark.parametrize("call", ["score_attention, dot", "score_attention, additive", "maxsim"])
def test_calls(call):
    pass

def test_once():
    pass

@pytest.mark.slow
def test_slow():
    pass

@pytest.mark.slow("triton")
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_slow_on_triton(backend):
    pass
"""


@pytest.mark.slow
def test_the_first_case_of_an_operator_on_a_backend(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow: takes seconds\n")
    for folder in ("ops", "command"):
        (tmp_path / "tests" / folder).mkdir(parents=True)
        (tmp_path / "tests" / folder / f"test_{folder}.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "tests.helpers.chosen", "tests"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    kept = [line.removeprefix("tests/") for line in done.stdout.splitlines() if "::" in line]
    assert sum(name.startswith("command/") for name in kept) == 85  # a case is a thing of its own there
    cases = ["sizes[cpu-0]", "sizes[triton-0]", "calls[score_attention, dot]", "calls[maxsim]", "once", "slow_on_triton[cpu]"]
    assert {name for name in kept if name.startswith("ops/")} == {f"ops/test_ops.py::test_{case}" for case in cases}
    assert "deselected" in done.stdout
