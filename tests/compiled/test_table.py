"""A stored table is written and read, and shows what differs from it."""

from pathlib import Path

import pytest

from tools.compiled.table import differences, read, write

ROW = {"registers": 100, "spills": 0, "shared": 1024, "tensor_cores": "wgmma"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spills": 8}, ["k: spills 0 -> 8"]),
        ({"registers": 101}, ["k: registers 100 -> 101"]),
        ({"tensor_cores": ""}, ["k: tensor_cores wgmma -> "]),
        ({"shared": 200_000}, ["k: 200000 bytes of shared memory, more than 101376", "k: shared 1024 -> 200000"]),
    ],
)
def test_a_changed_row_is_seen(change: dict[str, object], words: list[str]) -> None:
    assert differences({"k": ROW}, {"k": ROW}) == []
    assert differences({"k": {**ROW, **change}}, {"k": ROW}) == words


def test_shared_memory_is_that_of_the_architecture() -> None:
    row = {**ROW, "shared": 114_688}
    assert differences({"k sm_90": row}, {"k sm_90": row}) == []
    assert differences({"k sm_80": row}, {"k sm_80": row}) == ["k sm_80: 114688 bytes of shared memory, more than 101376"]


def test_a_missing_row_is_seen() -> None:
    assert differences({"new": ROW}, {"old": ROW}) == ["new: not in the table", "old: in the table, but not compiled"]


def test_it_is_written_and_read(tmp_path: Path) -> None:
    table = {"3.6.0": {"a": ROW, "b": {**ROW, "spills": 4}}, "3.9.0": {}}
    assert read(tmp_path / "table.json") == {}
    write(tmp_path / "table.json", table)
    assert read(tmp_path / "table.json") == table
