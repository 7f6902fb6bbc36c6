"""Functions of Liger-Kernel and flash-linear-attention, forward and backward, beside formulas in float64 (sweep.py).

The libraries are imported outside of the emulation: some ask torch for the GPU that Triton names.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

import ptx
from ptx.architectures import ARCHITECTURES
from tests.others import sweep

STORED = list(csv.DictReader(sweep.ROWS.open()))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", sweep.FUNCTIONS)
def test_numbers_and_findings(name: str, arch: int) -> None:
    """Numbers are right, and findings are those that were judged (sweep.JUDGED)."""
    ratio, launches = sweep.outcome(name, arch)
    assert ratio <= 1
    stored = {one["kernel"] for one in STORED if one["function"] == name and one[str(arch)] != "passed"}
    assert {one.name for one in launches if one.findings} == stored
    assert bool(stored) == (name in sweep.JUDGED)


def test_the_page_has_the_table_of_the_rows() -> None:
    assert sweep.table() in Path(__file__).with_name("README.md").read_text()


@pytest.mark.parametrize("classes, race", [(300, True), (1000, False)])
def test_a_row_that_fewer_threads_could_hold_is_a_race(classes: int, race: bool) -> None:
    """The kernel has 1024 threads. With 300 classes several of them load one element, and one stores it, in place. Of the loaded
    values none but that one's is stored, so the results are right."""
    logits = sweep.x(6, classes)
    with ptx.emulated(90, strict=False) as launches:
        (2 * sweep.liger_cross_entropy(logits, sweep.target(classes))).backward()
    findings = [one for launch in launches for one in launch.findings]
    assert {one.kind.partition(":")[0] for one in findings} == ({"race in global memory"} if race else set())
    assert {one.source.partition(":")[0] for one in findings} == ({"cross_entropy.py", "utils.py"} if race else set())
