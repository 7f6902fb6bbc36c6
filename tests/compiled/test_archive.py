"""Kernels that were compiled ahead: an archive, and its launcher in C++ over a stand-in for CUDA's driver, which emulates PTX.

The kernels of this process are those of Triton's interpreter (tests/conftest.py): calls run in another one.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.packaging import LAUNCHER, ROOT, build, copied, installed
from tests.helpers.releases import WITHOUT_PTX

pytest.importorskip("triton")
pytest.importorskip("ptx", reason=WITHOUT_PTX)
from ptx.testing import compiling, needs_fences
from tests.helpers.emulated import pairs

pytestmark = needs_fences  # archives are made by a Triton that sets them
AHEAD = "tests.helpers.emulated.ahead."
# launched by one call each, forward and backward; of three calls these are the kernels that tests/helpers/emulated/pairs.py lists
LISTED = (("score_attention", "additive"), ("attention_statistics", "three groups"), ("congruence_loss", "iais_singular"))
CALLS = {
    **{call: pairs.CALLS[call] for call in LISTED},
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_passes_that_are_repeated_are_counted() -> None:
    """Every forward pass of attention only allocates and launches; torch pads r in every backward pass of relevancy."""
    counts = compiling("tools.gpu.repeats.counts")
    repeated, forward, sequences = counts["score_attention.forward"]
    assert repeated == forward > sequences > 1
    assert counts["relevancy_attention.backward"][0] == 0 < counts["relevancy_attention.backward"][1]


@pytest.mark.slow
def test_the_host_is_timed_without_a_device() -> None:
    passes = "forward", "forward+backward"
    least = compiling("tools.gpu.host.times", ["score_attention"], 2)
    assert set(least) == {(name, what) for name in ("SDPA", "score_attention") for what in passes}
    assert all(0.0 < us < float("inf") for us in least.values())


def test_a_kernel_is_loaded_once(tmp_path: Path) -> None:
    assert compiling(AHEAD + "loads_of_threads", tmp_path, 8) == ["_forward_kernel"]


INSTALLED = """
import sys, torch, vlattn_fast as va
from tools import building
from tools.emulated import launching
from vlattn_fast.checking.tolerance import Errors
from vlattn_fast.kernels import _archive, score_attention  # whose launches are emulated from here on
assert _archive.LIBRARY.is_relative_to(sys.prefix), _archive.LIBRARY
building.launcher = lambda: _archive.LIBRARY
query, key, value = torch.randn(3, 2, 3, 20, 16, dtype=torch.float16)
with launching.emulated(_archive.LIBRARY.parent, 80) as launches:
    out = va.score_attention(query, key, value, backend="triton")
assert [one.name for one in launches] == ["_forward_kernel"], launches
errors, reference = Errors(), va.reference.score_attention
errors.add(out, reference(query.double(), key.double(), value.double()), reference(query, key, value))
assert errors.ratio() <= 1, errors.ratio()
"""


@pytest.mark.slow
def test_an_installed_wheel_launches_them(tmp_path: Path) -> None:
    """Its archive and its launcher, compiled by setup.py, in an environment with torch and this tree's tools by their paths."""
    source = copied(tmp_path / "source")
    compiling(AHEAD + "compile_one_call", (source / LAUNCHER).parent)
    others = {name: value for name, value in os.environ.items() if not name.startswith(("VLATTN_", "PYTHONPATH"))}
    done = build(source, tmp_path, others | {"VLATTN_BUILD_CPU": "0", "VLATTN_BUILD_LAUNCH": "1"})
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheel").iterdir()
    python = installed(wheel, tmp_path / "empty", ROOT / "packages" / "ptx", ROOT)
    subprocess.run([python, "-c", INSTALLED], check=True, cwd=tmp_path, env=others)
