"""The origin of measured records, and the file that keeps them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from vlattn_fast._ground.checks import check_writable
from vlattn_fast._ground.origin import device_name
from vlattn_fast.backends import native
from vlattn_fast.measuring.provenance import commit, versions
from vlattn_fast.measuring.records import read_json, write_records

__all__ = ["RESULTS", "append", "check_path", "device_name", "provenance", "slug"]

HERE = Path(__file__).parent
# In a checkout the records lie beside this file; an installed package is no place to write to.
RESULTS = (HERE if (HERE.parent / "pyproject.toml").exists() else Path("benchmarks")) / "results"


def slug(device: torch.device) -> str:
    """cpu, h200, ...: the name of the device's file of records."""
    if device.type == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower().replace("nvidia", "")).strip("-")


def provenance(command: str) -> dict[str, Any]:
    """The origin that every record of a run names. VLATTN_COMMIT names the commit of a copy without git."""
    # the instruction set of torch's and torch.compile's kernels, and of this package's, where they are built
    ours = f", kernels for {native.instruction_set()}" if native.library.exists else ""
    return {
        "commit": os.environ.get("VLATTN_COMMIT") or commit(),
        "versions": versions("vlattn_fast", "torch", "triton"),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability() + ours,
        "command": command,
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _stored(path: Path) -> list[Any]:
    stored: list[Any] = read_json(path, lambda content: isinstance(content, list), "out must be a JSON file of records")
    return stored


def check_path(path: Path) -> None:
    """Raises ValueError if `append` could not add results to `path`; a run checks this before its first benchmark."""
    check_writable("out", path.parent, folder=True)
    _stored(path)


def append(records: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Adds records to the JSON list in `path`."""
    write_records(path, [*_stored(path), *records])
