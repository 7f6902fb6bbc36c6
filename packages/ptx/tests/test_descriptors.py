"""Kernels of tests/helpers/descriptors.py: tensor descriptors that the host makes, as Triton compiles them.

Kernels are compiled in a process of their own (ptx/testing.py).
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from ptx.testing import compiling

CALLS = ["copy float16", "copy wide", "copy narrow", "copy narrower", "copy float32", "copy bytes", "transposed"]
CALLS += ["matmul float16", "matmul bfloat16 shallow", "heads", "ragged", "padded"]


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("call", CALLS)
def test_results_are_right_and_nothing_is_found(call: str, arch: int) -> None:
    """Triton compiles no copies of boxes for sm_80."""
    error, findings, boxes = compiling("tests.helpers.descriptors.outcome", call, arch)
    assert error <= (2e-3 if call == "matmul float16" else 1e-2 if "matmul" in call else 0) and findings == []
    assert boxes == (arch >= 90)


def test_these_are_all_calls() -> None:
    assert compiling("tests.helpers.descriptors.names") == CALLS


@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("fault", ["wait for a load", "proxy fence", "wait for a store", "commit of a store", "barriers"])
def test_what_is_left_out_is_found(fault: str, arch: int) -> None:
    count, found = compiling("tests.helpers.descriptors.planted", "matmul float16", arch, fault)
    assert count and all(found), found


def test_what_the_emulator_does_not_do_is_refused() -> None:
    words = "x: the emulator has no descriptors that round to tf32, of 4 bits, or for convolutions"
    assert compiling("tests.helpers.descriptors.refused") == ("NotImplementedError", words)
