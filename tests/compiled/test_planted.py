"""Planted faults are noticed: the stored table of all, and a few of them planted again."""

import ast
import json
from collections import Counter
from typing import Any

import pytest

from tests.helpers.releases import WITHOUT_PTX

pytest.importorskip("triton")
pytest.importorskip("ptx", reason=WITHOUT_PTX)
from ptx.planting.faults import IN_PTX, IN_SOURCE, Fault
from ptx.testing import compiling, needs_fences
from tools.planted import reasons as reasons_of
from tools.planted.calls import CALLS, Outcome
from tools.planted.table import TABLE

STORED = json.loads(TABLE.read_text())
SAMPLES = ((90, 0, 6), (90, 7, 2), (90, 11, 2), (80, 1, 6), (90, 8, 2), (90, 9, 2))  # architecture, call, number of faults


def rows() -> list[tuple[dict[str, Any], list[Any]]]:
    return [(call, row) for call in STORED["calls"] for row in call["faults"]]


def test_every_stored_fault_is_noticed_or_has_a_decided_reason() -> None:
    left = [(call["architecture"], call["call"], *row) for call, row in rows() if row[3] == "unexplained" or not row[4]]
    assert left == []


def test_the_table_has_every_kind_and_call() -> None:
    calls = [(call["architecture"], call["call"]) for call in STORED["calls"]]
    assert sorted(calls) == sorted((architecture, called.title) for called in CALLS for architecture in called.architectures)
    assert {row[0] for _, row in rows()} == {*IN_PTX, *IN_SOURCE}


@pytest.mark.parametrize("kind", [*IN_PTX, *IN_SOURCE])
def test_each_kind_is_noticed_somewhere(kind: str) -> None:
    states = Counter(row[3] for _, row in rows() if row[0] == kind)
    assert states["noticed"] > 0, states


@pytest.mark.slow
@needs_fences
@pytest.mark.parametrize(("architecture", "number", "few"), SAMPLES)
def test_a_few_faults_planted_again(architecture: int, number: int, few: int) -> None:
    stored = next(one for one in STORED["calls"] if (one["architecture"], one["call"]) == (architecture, CALLS[number].title))
    states = compiling("tests.helpers.emulated.planting.again", architecture, number, stored, few)
    assert len(states) > few // 2
    for fault, before, now in states:
        assert now == before if before else now != "unexplained", fault


@pytest.mark.slow
@needs_fences
def test_a_kernel_without_a_fault_is_harmless() -> None:
    """The judgement itself finds no fault."""
    assert compiling("tests.helpers.emulated.planting.without_fault", 90, 0) == Outcome("harmless")


class Checked:
    """A call whose results keep the tolerance with whatever a check puts in the place of a fault; it notes what that is."""

    def __init__(self, line: str = "") -> None:
        self._line, self.instead = line, list[Any]()

    def line(self, fault: Fault) -> str:
        return self._line

    def keeps_tolerance(self, fault: Fault, instead: Any) -> bool:
        self.instead.append(instead)
        return True


@pytest.mark.parametrize(
    ("kind", "line", "instead"),
    [
        ("offset off by one element", "st.shared.b32 [%r45+1536], %r1826;", "st.shared.b32 [%r45+1536], 0;"),
        ("predicate inverted", "@%p10 ld.global.b16 { %rs21 }, [ %rd78 + 0 ];", "{line}\nmov.b16 %rs21, 0;"),
    ],
)
def test_zeros_stand_for_what_is_small(monkeypatch: pytest.MonkeyPatch, kind: str, line: str, instead: str) -> None:
    monkeypatch.setattr(reasons_of, "_written", lambda call, fault: {"%rs21": 2})
    call: Any = Checked(line)
    assert reasons_of.small(call, Fault(kind, "a kernel", 1)) == reasons_of.SMALL
    assert call.instead == [instead.format(line=line)]


def test_a_value_that_a_condition_keeps_out_may_be_larger() -> None:
    call: Any = Checked()
    assert "2 more" in reasons_of.small(call, Fault("source: condition dropped", "a function", 0))
    (change,) = call.instead
    assert ast.unparse(change(ast.parse("tl.where(m, x, y)", mode="eval").body)) == "tl.where(m, x, x + 2.0)"
