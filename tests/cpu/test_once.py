"""Sanitizers, counts of tiles and emulated ARM (tools/once.py), where the sources are not those that passed."""

from __future__ import annotations

import pytest

from tools import once
from tools.building import Missing


@pytest.mark.parametrize("name", once.CHECKS)
def test_the_sources_pass(name: str) -> None:
    if once.stored().get(name) == once.sources(name):
        return
    try:
        assert once.CHECKS[name]() == ""
    except Missing as missing:
        pytest.skip(str(missing))


def test_what_is_stored_is_of_these_checks_and_their_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    assert once.stored().keys() <= once.CHECKS.keys()
    before = {name: once.sources(name) for name in once.CHECKS}
    monkeypatch.setattr(once, "rows_of_page", lambda: ["| another row |"])
    assert {name for name in once.CHECKS if once.sources(name) != before[name]} == {"tiles"}
    monkeypatch.setattr(once, "SOURCES", once.SOURCES[1:])
    assert all(once.sources(name) != before[name] for name in once.CHECKS)


def test_the_command_stores_what_passed_alone(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys) -> None:
    def missing() -> str:
        raise Missing("qemu is not installed")

    monkeypatch.setattr(once, "PASSED", tmp_path / "passed.json")
    monkeypatch.setattr(once, "CHECKS", {"thread": lambda: "", "address": lambda: "a byte too far", "aarch64": missing})
    monkeypatch.setattr("sys.argv", ["once"])
    assert once.main() == 1 and once.stored() == {"thread": once.sources("thread")}
    assert capsys.readouterr().out.splitlines() == ["thread: passed", "address: a byte too far", "aarch64: qemu is not installed"]
    monkeypatch.setattr("sys.argv", ["once", "thread"])
    assert once.main() == 0 and "passed before" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["once", "tread"])
    with pytest.raises(SystemExit):
        once.main()
    assert "CHECK must be one of thread, address, aarch64; got tread" in capsys.readouterr().err
