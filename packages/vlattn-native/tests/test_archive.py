"""Kernels that were compiled ahead: an archive, and its launcher in C++ over a stand-in for CUDA's driver, which emulates PTX.

The kernels of this process are those of Triton's interpreter (tests/conftest.py): calls run in another one.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("ptx", reason="ptx, which emulates compiled kernels, is not installed: pip install packages/ptx")
import ptx.cuda
from ptx.testing import compiling, needs_fences
from tests.helpers import launching
from vlattn_native import building

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


def test_a_b300_takes_the_archive_of_a_b200(tmp_path: Path) -> None:
    assert compiling(AHEAD + "of_a_b300", tmp_path) == (True, True)


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


# out[0] = added
TEXT = b"""
.version 8.0
.target sm_80
.address_size 64
.visible .entry number(.param .u64 out, .param .u32 added)
{
    .reg .b32 %r<2>;
    .reg .b64 %rd<2>;
    ld.param.u64 %rd1, [out];
    ld.param.u32 %r1, [added];
    st.global.b32 [%rd1], %r1;
    ret;
}
"""


class Number:
    """The kernel `number` behind the launcher, over the stand-in for the driver, on device 0."""

    def __init__(self) -> None:
        loader = importlib.machinery.ExtensionFileLoader("vlattn_launch", str(building.launcher()))
        spec = importlib.util.spec_from_file_location("vlattn_launch", loader.path, loader=loader)
        assert spec is not None
        self.library = importlib.util.module_from_spec(spec)
        self.before_stream: Callable[[], Any] = lambda: None
        self.library.connect(str(launching.driver()), torch.Tensor, lambda: 0, self.stream, repr)
        self.driver = ctypes.CDLL(str(launching.driver()))
        self.launcher = self.library.Launcher((("out", False), ("added", False)), self.resolve, None)

    def stream(self, device: int) -> int:
        self.before_stream()
        return 0

    def resolve(self, named: Any, device: int) -> tuple[Any, ...]:
        function = self.library.load(TEXT, "number", 1024, device)
        return function, "number", 1, 1024, ((0, "q"), (1, "i"))

    def launch(self, out: torch.Tensor, added: int, grid: tuple[int, ...] = (1,)) -> None:
        self.launcher(out=out, added=added, grid=grid, warmup=False)


@pytest.fixture(scope="module")
def number() -> Number:
    return Number()


def test_plans_are_bounded_and_the_last_used_are_kept(number: Number) -> None:
    planned, x, allocation = [], torch.ones(1), ((1,), (1,), torch.float32)

    def plan(function: Any, inputs: Any) -> Any:
        planned.append(len(inputs[0]))
        return None, ((allocation,), (), (0,), True)

    call = number.library.Planned(lambda inputs: None, plan, lambda: 0, lambda *_: x)
    references = sys.getrefcount(allocation)
    for size in range(1, 5001):
        call((x.expand(size),))
        call((x.expand(1),))
    for _ in range(100):
        call((x.expand(5000),))
    assert planned == [*range(1, 5001)]
    call((x.expand(2),))
    assert planned[5000:] == [2]
    assert sys.getrefcount(allocation) - references <= 4096


def test_another_context_is_neither_used_nor_lost(number: Number) -> None:
    context = ctypes.c_void_p()
    number.driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 1)
    try:
        for other in (None, context):
            number.driver.cuCtxSetCurrent(other)
            number.launch(torch.zeros(1), 16)
        now = ctypes.c_void_p()
        number.driver.cuCtxGetCurrent(ctypes.byref(now))
        assert now.value == context.value
    finally:
        number.driver.cuCtxSetCurrent(None)


@pytest.mark.parametrize("size", (2**32, 2**64, -1))
def test_a_grid_that_no_launch_has_is_an_error(number: Number, size: int) -> None:
    with pytest.raises(ValueError, match=f"programs; got {size}"):
        number.launch(torch.zeros(1), 16, (1, size))


def test_a_launch_keeps_its_arguments_and_gets_the_shared_memory(number: Number) -> None:
    first, second = torch.zeros(2, 1, dtype=torch.int32)

    def other() -> None:  # as another thread does when this one is in Python
        number.before_stream = lambda: None
        number.launch(second, 16)

    number.before_stream = other
    with ptx.cuda.emulated(80) as launches, ptx.cuda.Device.active.using(ptx.cuda.lent({"first": first, "second": second})):
        ptx.cuda.connected(number.driver)
        try:
            number.launcher = number.library.Launcher((("out", False), ("added", False)), number.resolve, None)
            number.launch(first, 32)
        finally:
            number.driver.ptx_connect(None)
    assert (first.item(), second.item()) == (32, 16)
    assert [launch.carveout for launch in launches] == [100, 100]
