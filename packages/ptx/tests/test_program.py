"""What reading a kernel makes is kept for later processes: it runs the same, and is made anew where it does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ptx.running import program
from ptx.running.launch import launch
from ptx.running.memory import Memory
from ptx.running.program import Program
from ptx.running.reports import EmulationError, Options

TEXT = """.version 8.7
.target sm_90a
.address_size 64
.global .align 4 .b32 table[2] = {7, 8};
.visible .entry first(.param .u64 out)
{
    .reg .b32 %r<4>; .reg .b64 %rd<4>;
    .loc 1 30 4
    ld.param.u64 %rd1, [out]; mov.u64 %rd2, table;
    ld.global.b32 %r1, [%rd2+4]; st.global.b32 [%rd1], %r1;
    st.global.b32 [%rd2+4], 9;
    ret;
}
.visible .entry second(.param .u64 out)
{
    .reg .b64 %rd<4>;
    .loc 1 60 4
    ld.param.u64 %rd1, [out];
    st.global.b32 [%rd1+8], 5;
    ret;
}
.file 1 "kernels.cu"
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(program, "KEPT", tmp_path / "programs")
    monkeypatch.setattr(program, "KEPT_FROM", 0)
    program._forget.cache_clear()
    yield tmp_path / "programs"
    program._forget.cache_clear()


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch):
    """Call it: from then on nothing is read."""
    return lambda: monkeypatch.delattr(program, "encode")


def launched(name: str = "first", text: str = TEXT) -> int:
    out, memory = torch.zeros(1, dtype=torch.int32), Memory()
    launch(Program(text, name), [memory.place(out, "out")], (1,), (1,), 0, memory, Options()).check()
    memory.back()
    return int(out)


def test_a_kept_kernel_runs_without_being_read(folder: Path, no_reading):
    assert launched() == 8
    assert len(list(folder.iterdir())) == 1
    no_reading()
    assert launched() == 8  # with variables of its own: the first launch changed the table


def test_a_kept_kernel_says_the_same(no_reading):
    with pytest.raises(EmulationError) as new:
        launched("second")
    no_reading()
    with pytest.raises(EmulationError) as kept:
        launched("second")
    for error in (new, kept):
        assert str(error.value).endswith("PTX line 19, kernels.cu:60: st.global.b32 [%rd1+8], 5;")


def test_kernels_of_other_names_and_texts_are_read(folder: Path):
    assert launched() == 8
    assert launched(text=TEXT.replace("{7, 8}", "{7, 6}")) == 6
    with pytest.raises(EmulationError):
        launched("second")
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("damage", [lambda data: data[:-5], lambda data: data[:40] + b"x" + data[41:], lambda data: b""])
def test_a_broken_file_is_made_anew(folder: Path, damage):
    assert launched() == 8
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert launched() == 8
    assert path.read_bytes() == whole


def test_files_of_other_sources_go(folder: Path, monkeypatch: pytest.MonkeyPatch):
    assert launched() == 8
    (old,) = folder.iterdir()
    monkeypatch.setattr(program, "_SOURCES", "0123456789abcdef")
    program._forget.cache_clear()
    assert launched() == 8
    (new,) = folder.iterdir()
    assert new != old


def test_the_newest_stay(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(program, "MOST_KEPT", 1)
    for value in range(3):
        assert launched(text=TEXT.replace("{7, 8}", f"{{7, {value}}}")) == value
    program._forget.cache_clear()
    launched(text=TEXT.replace("{7, 8}", "{7, 3}"))
    assert len(list(folder.iterdir())) == 2  # one from before and the one that was just written


def test_short_texts_are_read_each_time(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(program, "KEPT_FROM", len(TEXT) + 1)
    assert launched() == 8
    assert not folder.exists()
