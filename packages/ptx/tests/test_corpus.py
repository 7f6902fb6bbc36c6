"""The corpus of faults (tests/corpus/): its stored rows are those of its faults, and some of them are measured again."""

from __future__ import annotations

import csv

import pytest

from ptx.testing import compiling
from tests.corpus.faults import faults

pytest.importorskip("triton")
from tests.corpus.measure import ROWS, WAYS, table

PAGE = ROWS.with_name("README.md")


def rows() -> list[dict[str, str]]:
    with ROWS.open() as file:
        return list(csv.DictReader(file))


def test_each_fault_has_its_row() -> None:
    stored = [(one["kernel"], one["kind"], one["place"]) for one in rows() if one["kind"] != "none"]
    assert stored == [fault[:3] for fault in faults()] and len(stored) >= 60


def test_the_page_has_the_table_of_the_rows() -> None:
    assert table(rows()) in PAGE.read_text()


def test_right_kernels_are_not_accused() -> None:
    right = [one for one in rows() if one["kind"] == "none"]
    assert len(right) == 12 and all(one[way] in ("0", "") for one in right for way in WAYS)


@pytest.mark.parametrize("number", range(0, 132, 44))
def test_a_row_again(number: int) -> None:
    fault = list(faults())[number]
    (stored,) = (one for one in rows() if (one["kernel"], one["kind"], one["place"]) == fault[:3])
    assert compiling("tests.corpus.measure.again", number) == stored
