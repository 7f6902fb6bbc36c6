"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 with the registers, shared memory and spills of the stored table."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.compile_gate import TABLE, complaints, operators

GATE = Path(__file__).with_name("compile_gate.py")
STORED = [
    (key, row) for rows in json.loads(TABLE.read_text()).values() for key, row in rows.items()
]  # of every version of Triton
# none of their work is a matrix product of 16-bit numbers
NO_PRODUCTS = ("_prepare_kernel", "_divergence_kernel", "_aggregate_kernel", "_weights_kernel", "_maps_kernel")
BACKWARD = r"(backward|gradient)\w*_kernel|_divergence_kernel launch"  # that one's first launch is the forward pass's
ROW = {"registers": 100, "spills": 0, "shared": 1024, "tensor_cores": "wgmma"}


@pytest.mark.parametrize("operator", operators())
def test_kernels_compile_as_stored(operator: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, GATE, operator], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_forward_kernels_do_not_spill_on_sm_90() -> None:
    forward = [(key, row) for key, row in STORED if key.endswith("sm_90") and not re.search(BACKWARD, key)]
    assert len(forward) > 50
    assert [key for key, row in forward if row["spills"] > 0] == []


def test_16_bit_products_run_on_tensor_cores() -> None:
    products = [
        (key, row) for key, row in STORED if ("bf16" in key or "fp16" in key) and not any(name in key for name in NO_PRODUCTS)
    ]
    assert len(products) > 200
    assert [key for key, row in products if not row["tensor_cores"]] == []


@pytest.mark.parametrize(
    "change, words",
    [
        ({"spills": 8}, ["k: spills 0 -> 8"]),
        ({"registers": 101}, ["k: registers 100 -> 101"]),
        ({"tensor_cores": ""}, ["k: tensor_cores wgmma -> "]),
        ({"shared": 200_000}, ["k: 200000 bytes of shared memory, more than 101376", "k: shared 1024 -> 200000"]),
    ],
)
def test_the_gate_sees_changes(change: dict[str, object], words: list[str]) -> None:
    assert complaints({"k": ROW}, {"k": ROW}) == []
    assert complaints({"k": {**ROW, **change}}, {"k": ROW}) == words


def test_the_gate_sees_missing_rows() -> None:
    assert complaints({"new": ROW}, {"old": ROW}) == ["new: not in the table", "old: in the table, but no call compiles it"]
