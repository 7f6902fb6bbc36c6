"""Kernels that are not ours, emulated. pip installs their libraries into build/others/, without what these ask for.

`python -m pytest tests/others` runs this suite, in the folder of pyproject.toml. The package's own tests leave it out: it needs a
network the first time.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / "build" / "others"
LIBRARIES = ("liger-kernel==0.8.5", "flash-linear-attention==0.6.0", "fla-core==0.6.0", "einops==0.8.2")


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    return True if config.rootpath != HERE else None


def pytest_configure(config: pytest.Config) -> None:
    if config.rootpath != HERE:
        return
    installed = FOLDER / "installed.txt"
    if not installed.exists() or installed.read_text() != repr(LIBRARIES):
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--upgrade"]
        done = subprocess.run([*command, "--target", str(FOLDER), *LIBRARIES], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.exit(f"{', '.join(LIBRARIES)} could not be installed:\n{done.stdout}{done.stderr}", returncode=3)
        installed.write_text(repr(LIBRARIES))
    sys.path.append(str(FOLDER))
