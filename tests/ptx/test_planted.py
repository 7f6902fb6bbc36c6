"""Planted faults are noticed: the stored table of all, and a few of them planted again."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)
pytest.importorskip("triton")

from ptx.planted import CALLS, IN_PTX, IN_SOURCE, TABLE, Call, Fault, Outcome, key_of, summary

STORED = json.loads(TABLE.read_text())
SAMPLES = ((80, 2), (90, 0))  # architecture and call
SEED = 0
FEW = 6


def rows() -> list[tuple[dict[str, Any], list[Any]]]:
    return [(call, row) for call in STORED["calls"] for row in call["faults"]]


def test_every_stored_fault_is_noticed_or_harmless() -> None:
    assert [(call["architecture"], call["call"], *row) for call, row in rows() if row[3] == "not noticed"] == []


def test_the_table_has_every_kind_and_call() -> None:
    """On sm_100, whose kernels take longest, at least the first call."""
    calls = {(call["architecture"], call["call"]) for call in STORED["calls"]}
    titles = [f"{operator} {name} {str(dtype)[6:]}" for operator, name, dtype in CALLS]
    assert calls >= {(architecture, title) for architecture in (80, 90) for title in titles} | {(100, titles[0])}
    assert {row[0] for _, row in rows()} == {*IN_PTX, *IN_SOURCE}


def test_the_document_has_the_table() -> None:
    assert "\n".join(summary(STORED["calls"])) in (TABLE.parents[2] / "docs" / "reliability.md").read_text()


@pytest.mark.parametrize("kind", [*IN_PTX, *IN_SOURCE])
def test_each_kind_is_noticed_somewhere(kind: str) -> None:
    states = Counter(row[3] for _, row in rows() if row[0] == kind)
    assert states["noticed"] > 0, states


def chosen(call: Call, stored: dict[str, Any]) -> list[tuple[Fault, str | None]]:
    """Faults in PTX with their stored states; where a kernel is another one now, faults of today without a state."""
    assert call.unchanged
    same = {name for name, text in call.kernels.items() if stored["kernels"].get(name) == key_of(text)}
    known = [(Fault(*row[:3]), row[3]) for row in stored["faults"] if row[0] in IN_PTX and row[1] in same]
    new = [(fault, None) for fault in call.faults() if fault.kind in IN_PTX and call.may_run(fault) and fault.kernel not in same]
    return random.Random(SEED).sample(known + new, FEW)


@pytest.mark.parametrize(("architecture", "number"), SAMPLES, ids=[f"sm_{architecture}" for architecture, _ in SAMPLES])
def test_a_few_faults_planted_again(architecture: int, number: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    call = Call(architecture, *CALLS[number])
    stored = next(one for one in STORED["calls"] if (one["architecture"], one["call"]) == (architecture, call.title))
    for fault, state in chosen(call, stored):
        outcome = call.try_fault(fault)
        if outcome is not None:
            assert outcome.state == state if state else outcome.state != "not noticed", fault
    torch.set_num_threads(threads)


def test_a_fault_that_does_nothing_is_harmless() -> None:
    """Nothing is reported, and no result differs, where a line is replaced by itself: the judgement itself finds no fault."""
    call = Call(80, *CALLS[2])
    assert call.unchanged
    assert call._judge(lambda text, program: program) == Outcome("harmless")
