"""Kernels that were compiled ahead: an archive, and its launcher in C++ over a stand-in for CUDA's driver, which emulates PTX.

The kernels of this process are those of Triton's interpreter (tests/conftest.py): calls run in another one.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("ptx", reason="ptx, which emulates compiled kernels, is not installed: pip install packages/ptx")
from ptx.testing import compiling, needs_fences

pytestmark = needs_fences  # archives are made by a Triton that sets them
AHEAD = "tests.helpers.ahead."
# launched by one call each, forward and backward
CALLS = {
    ("score_attention", "additive"): """score_attention._prepare_kernel score_attention._forward_kernel
        _units_backward._units_rows_kernel _units_backward._units_backward_kernel""",
    ("attention_statistics", "three groups"): """_key_groups._members_kernel attention_statistics._rows_kernel
        attention_statistics._received_kernel _statistics_backward._backward_q_kernel _statistics_backward._backward_kv_kernel""",
    ("congruence_loss", "iais_singular"): """congruence_maps.map_kernel congruence_maps.gradient_kernel
        congruence_loss._divergence_kernel congruence_loss._target_backward_kernel""",
    ("relevancy_attention", "gradient"): """score_attention._whole_forward_kernel _products_backward._backward_q_kernel
        _products_backward._backward_kv_kernel _products_jvp._jvp_kernel""",
    ("attention_map", "gradient of the largest head"): """attention_map._map_kernel score_attention._rows_kernel
        _map_backward._map_backward_rows_kernel _map_backward._map_backward_q_kernel _map_backward._map_backward_kv_kernel
        _map_backward._map_taken_kernel""",
}


def test_a_call_is_right(tmp_path: Path) -> None:
    ratio, kernels = compiling(AHEAD + "ratio", tmp_path, 90, "score_attention", "scaled_dot causal", False)
    assert 0.0 < ratio <= 1.0
    assert kernels == {"_whole_forward_kernel"}


@pytest.mark.parametrize("architecture", (90, 80))
@pytest.mark.parametrize("operator, name", CALLS)
def test_each_operator_is_right(tmp_path: Path, operator: str, name: str, architecture: int) -> None:
    ratio, kernels = compiling(AHEAD + "ratio", tmp_path, architecture, operator, name, True)
    assert 0.0 < ratio <= 1.0
    if architecture == 90:
        assert kernels == {one.rpartition(".")[2] for one in CALLS[operator, name].split()}


def test_sizes_do_not_choose_the_kernel(tmp_path: Path) -> None:
    covered = compiling(AHEAD + "coverage", tmp_path)
    assert [name for name, is_covered in covered.items() if not is_covered] == ["another dtype", "causal"]


def test_launches_are_repeated_on_other_tensors(tmp_path: Path) -> None:
    errors, planned, seen = compiling(AHEAD + "repeated", tmp_path)
    assert {name: ratio for name, ratio in errors.items() if not ratio <= 1.0} == {}
    both = ["forward", "backward"]
    # which of two arguments an address belongs to is uncertain if they are one tensor
    expected = {"one tensor": both, "first": both, "second": [], "packed": both, "packed again": [], "third": [], "watched": both}
    assert planned == expected
    assert seen == ["_forward_kernel", "_backward_q_kernel", "_backward_kv_kernel"]


def test_the_host_is_timed_without_a_device() -> None:
    passes = "forward", "forward+backward"
    least = compiling("tests.helpers.host_time.times", ["score_attention"], 2)
    assert set(least) == {(name, what) for name in ("SDPA", "score_attention") for what in passes}
    assert all(0.0 < us < float("inf") for us in least.values())


def test_a_kernel_is_loaded_once(tmp_path: Path) -> None:
    assert compiling(AHEAD + "loads_of_threads", tmp_path, 8) == ["_forward_kernel"]
