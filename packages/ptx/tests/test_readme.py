"""What README says at its top, and its commands, run as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.test_run import TEXT

README = Path(__file__).resolve().parents[1] / "README.md"


def python(folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)


def test_the_first_ten_lines_of_code_find_a_race(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    first = "\n".join(README.read_text().splitlines()[:14])
    code = re.search(r"```python\n(.*?)```", first, re.S)
    assert code and code[1].count("\n") <= 10
    (tmp_path / "reverse.py").write_text(code[1])
    done = python(tmp_path, "reverse.py")
    assert done.returncode == 1 and "FindingsError" in done.stderr
    assert "race in global memory: read after write" in done.stderr and "reverse.py:7: ld" in done.stderr
    (tmp_path / "reverse.py").write_text(code[1].replace("tl.store(x + n", "tl.store(x + n + n"))  # behind what is read
    assert "x has 2048 bytes" in python(tmp_path, "reverse.py").stderr


@pytest.mark.parametrize(
    "grid, status, said", [(2, 0, "22 instructions of a warp, 0 findings"), (3, 1, "argument 0 has 256 bytes")]
)
def test_a_file_of_ptx_with_arguments(tmp_path: Path, grid: int, status: int, said: str) -> None:
    (tmp_path / "kernel.ptx").write_text(TEXT)
    np.savez(tmp_path / "arguments.npz", x=np.arange(64, dtype=np.float32), factor=np.float32(2))
    command = ["kernel.ptx", "arguments.npz", f"--grid={grid}", "--block=32", "--results=results.npz"]
    done = python(tmp_path, "-m", "ptx", *command)
    assert done.returncode == status and said in done.stdout, done.stdout + done.stderr
    if not status:
        assert (np.load(tmp_path / "results.npz")["x"] == 2 * np.arange(64)).all()


def test_findings_of_a_file_are_printed(tmp_path: Path) -> None:
    (tmp_path / "kernel.ptx").write_text(TEXT.replace("mov.u32 %r1, %ctaid.x;", "mov.u32 %r1, 0;"))  # blocks do the same in place
    np.savez(tmp_path / "arguments.npz", x=np.arange(1, 33, dtype=np.float32), factor=np.float32(2))
    done = python(tmp_path, "-m", "ptx", "kernel.ptx", "arguments.npz", "--grid=2", "--block=32", "--seed=3")
    assert done.returncode == 1 and "race in global memory: read after write" in done.stdout
    assert "must be one to three numbers" in python(tmp_path, "-m", "ptx", "k", "a", "--grid=x", "--block=1").stderr
