"""The origin of measured rows, and the file that keeps them."""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vlattn_fast._ground.checks import check_writable
from vlattn_fast.backends import native

HERE = Path(__file__).parent
# In a checkout the rows lie beside this file; an installed package is no place to write to.
RESULTS = (HERE if (HERE.parent / "pyproject.toml").exists() else Path("benchmarks")) / "results"
PACKAGES = ("vlattn_fast", "torch", "triton")


@functools.cache
def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.+)", info.read_text(), re.M) if info.exists() else None
    return f"CPU: {model.group(1).strip() if model else platform.machine()}"


def slug(device: torch.device) -> str:
    """cpu, h200, ...: the name of the device's file of rows."""
    if device.type == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower().replace("nvidia", "")).strip("-")


def provenance(command: str) -> dict[str, Any]:
    """The origin that every row of a run names. VLATTN_COMMIT names the commit of a copy without git."""
    return {
        "commit": os.environ.get("VLATTN_COMMIT") or _commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "threads": torch.get_num_threads(),
        "instructions": instructions(),
        "command": command,
        "time": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def instructions() -> str:
    """The instruction set of torch's and torch.compile's kernels, and of this package's, where they are built."""
    ours = f", kernels for {native.instruction_set()}" if native.library.exists else ""
    return torch.backends.cpu.get_cpu_capability() + ours


def _commit() -> str:
    """The commit of the checkout that holds this file; "+dirty" where the checkout differs from it in more than results."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=HERE, check=True, capture_output=True, text=True).stdout.strip()

    try:
        top = git("rev-parse", "--show-toplevel")
        if not (Path(top) / "benchmarks" / Path(__file__).name).exists():
            return "unknown"  # the package is installed inside another repository
        changes = git("-C", top, "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!benchmarks/REPORT.md")
        return git("rev-parse", "--short=12", "HEAD") + ("+dirty" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(name: str) -> str | None:
    if name == "torch":
        return torch.__version__  # with the build, such as +cu130, which the metadata may leave out
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_path(path: Path) -> None:
    """ValueError where `append` could not add rows to `path`; a run checks this before its first benchmark."""
    check_writable("out", path.parent, folder=True)
    try:
        known = json.loads(path.read_text()) if path.exists() else []
    except (OSError, ValueError):
        known = None
    if not isinstance(known, list):
        raise ValueError(f"out must be a JSON file of rows; got {path}, which holds something else")


def append(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Adds rows to the JSON list in `path`. A new file replaces the old one at once, so that a stopped run leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else []
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text("[\n" + ",\n".join(json.dumps(row) for row in [*known, *rows]) + "\n]\n")
    os.replace(new, path)
