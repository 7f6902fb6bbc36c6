"""`make test` runs a draw of the cases of each test (tests/helpers/cases.py)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tools.once import SOME_CASES

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
"""


def test_the_first_case_of_an_operator_on_a_backend_and_an_eighth_of_the_others(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    for folder in ("ops", "command"):
        (tmp_path / "tests" / folder).mkdir(parents=True)
        (tmp_path / "tests" / folder / f"test_{folder}.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *SOME_CASES, "tests"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    kept = [line.removeprefix("tests/") for line in done.stdout.splitlines() if "::" in line]
    assert sum(name.startswith("command/") for name in kept) == 84  # a case is a thing of its own there
    assert {f"ops/test_ops.py::{name}" for name in ("test_once", "test_calls[score_attention, dot]", "test_calls[maxsim]")} <= {
        *kept
    }
    for backend in ("cpu", "triton"):
        cases = [int(size) for size in re.findall(rf"ops/test_ops.py::test_sizes\[{backend}-(\d+)\]", "\n".join(kept))]
        assert cases[0] == 0 and 1 < len(cases) < 11
    assert "deselected" in done.stdout
