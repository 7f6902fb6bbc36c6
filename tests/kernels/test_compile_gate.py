"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 with the registers, shared memory and spills of the stored table."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.compile_gate import complaints, operators

GATE = Path(__file__).with_name("compile_gate.py")
ROW = {"registers": 100, "spills": 0, "shared": 1024, "tensor_cores": "wgmma"}


@pytest.mark.parametrize("operator", operators())
def test_kernels_compile_as_stored(operator: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, GATE, operator], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize("change, words", [
    ({"spills": 8}, ["k: spills 0 -> 8"]),
    ({"registers": 101}, ["k: registers 100 -> 101"]),
    ({"tensor_cores": ""}, ["k: tensor_cores wgmma -> "]),
    ({"shared": 200_000}, ["k: 200000 bytes of shared memory, more than 101376", "k: shared 1024 -> 200000"]),
])  # fmt: skip
def test_the_gate_sees_changes(change: dict[str, object], words: list[str]) -> None:
    assert complaints({"k": ROW}, {"k": ROW}) == []
    assert complaints({"k": {**ROW, **change}}, {"k": ROW}) == words


def test_the_gate_sees_missing_rows() -> None:
    assert complaints({"new": ROW}, {"old": ROW}) == ["new: not in the table", "old: in the table, but no call compiles it"]
