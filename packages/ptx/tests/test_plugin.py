"""The plugin of pytest (ptx/plugin.py) in other processes, with small suites of the kernels of tests/helpers/kernels.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]
SUITE = """
import pytest, torch
from tests.helpers.kernels import add, everyone_writes_the_first

@pytest.fixture
def sums():
    x, y, out = torch.ones(300), torch.ones(300), torch.zeros(300)
    add[(3,)](x, y, out, 300, BLOCK=128)  # a fixture's launches are emulated, too
    return out

@pytest.mark.ptx(arch=80)
def test_right(sums, ptx_launches):
    assert (sums == 2).all() and [launch.name for launch in ptx_launches] == ["kernels.add"]

@pytest.mark.ptx
def test_race():
    everyone_writes_the_first[(3,)](torch.zeros(1, dtype=torch.int32))

@pytest.mark.ptx(90, seed=5)
def test_race_that_the_code_swallows():
    try:
        everyone_writes_the_first[(3,)](torch.zeros(1, dtype=torch.int32))
    except AssertionError as error:
        assert "sm_90, seed 5" in str(error)

@pytest.mark.ptx
def test_never_written():
    add[(1,)](torch.empty(8), torch.ones(8), torch.zeros(8), 8, BLOCK=128)

def test_without_a_mark(sums):
    pass

@pytest.mark.ptx(arch=75)
def test_unknown():
    pass

def test_no_launches(ptx_launches):
    assert ptx_launches == []
"""
EVERYWHERE = """
import torch
from tests.helpers.kernels import add, everyone_writes_the_first

def sums():
    x, y, out = torch.ones(300), torch.ones(300), torch.zeros(300)
    add[(3,)](x, y, out, 300, BLOCK=128)
    return out

AT_IMPORT = sums()

def test_right(ptx_launches):
    assert ptx_launches == [] and (AT_IMPORT == 2).all()
    assert (sums() == 2).all() and len(ptx_launches) == 1

def test_alone(ptx_launches):
    assert ptx_launches == []

def test_race():
    everyone_writes_the_first[(3,)](torch.zeros(1, dtype=torch.int32))  # seed 7, as in a process of its own
"""
ON_CUDA = """
import pytest, torch, triton
from tests.helpers.kernels import add, everyone_writes_the_first

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
ACTIVE = triton.runtime.driver.active.get_active_torch_device()

@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda", 0), ACTIVE])
def test_right(device):
    x, y = torch.ones(300, device=device), torch.ones(300).to(device=device)
    out = torch.empty_like(x).cuda()
    assert x.is_cuda and out.is_cuda and torch.cuda.get_device_capability() == (10, 0)
    with torch.cuda.device(0):
        add[(3,)](x, y, out, 300, BLOCK=128)
    torch.cuda.synchronize()
    assert (out.cpu() == 2).all() and torch.nn.Linear(2, 2).cuda().to(device).weight.is_cuda

def test_race():
    everyone_writes_the_first[(3,)](torch.zeros(1, dtype=torch.int32, device="cuda"))
"""
CONFTEST = """
import contextlib, ptx

@contextlib.contextmanager
def context(arch, options):
    print("conftest: sm", arch, "seed", options.seed, "fences", options.fences)
    with ptx.emulated(arch, options) as launches:
        yield launches

def pytest_ptx_emulated(arch, options):
    return context(arch, options)
"""


def outcomes(folder: Path, suite: str, *options: str) -> tuple[dict[str, str], str]:
    """How each test ended, and what the process said."""
    (folder / "test_suite.py").write_text(suite)
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", "--strict-markers", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "test_suite.py"], cwd=folder, env=environment, capture_output=True, text=True)
    ended = re.findall(r"^test_suite\.py::(?:test_)?(\w+)(?:\[.*\])? (PASSED|FAILED|ERROR)", done.stdout, re.M)
    assert ended, done.stdout + done.stderr
    return dict(ended), done.stdout


def test_a_marked_test_runs_emulated_and_fails_by_what_is_found(tmp_path: Path) -> None:
    ended, said = outcomes(tmp_path, SUITE)
    assert ended == {
        "right": "PASSED",
        "race": "FAILED",
        "race_that_the_code_swallows": "FAILED",
        "never_written": "FAILED",
        "without_a_mark": "ERROR",  # Triton finds no GPU
        "unknown": "ERROR",
        "no_launches": "ERROR",
    }, said
    assert len(re.findall(r"race in global memory: write after write(?:.|\n)*?kernels\.py:\d+: .*st\.global", said)) >= 2
    assert "an architecture that is emulated is one of 80, 90, 100 (sm_90 is 90); got 75" in said
    assert "ptx_launches is for tests with @pytest.mark.ptx, or for pytest --ptx-arch 90" in said
    assert "never written" in said and "0 active drivers" in said


def test_the_option_takes_all_tests_and_a_conftest_may_add_to_it(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    ended, said = outcomes(tmp_path, EVERYWHERE, "--ptx-arch", "80", "--ptx-seed", "7", "--ptx-without-fences", "-s")
    assert ended == {"right": "PASSED", "alone": "PASSED", "race": "FAILED"}, said
    assert "ptx: Triton's launches are emulated, as on sm_80" in said
    assert said.count("conftest: sm 80 seed 7 fences False") == 1 and "sm_80, seed 7" in said


def test_what_asks_for_cuda_lies_on_the_cpu(tmp_path: Path) -> None:
    ended, said = outcomes(tmp_path, ON_CUDA, "--ptx-arch", "100")
    assert ended == {"right": "PASSED", "race": "FAILED"} and said.count("PASSED") == 4, said
    assert "race in global memory: write after write" in said


def test_a_conftest_that_emulates_tells_of_the_gpu_itself(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    suite = "import torch\n\ndef test_plain():\n    assert not torch.ones(2).is_cuda and not torch.cuda.is_available()\n"
    assert outcomes(tmp_path, suite, "--ptx-arch", "100")[0] == {"plain": "PASSED"}
