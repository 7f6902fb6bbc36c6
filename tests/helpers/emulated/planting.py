"""Faults planted again in a process of its own, whose kernels are compiled."""

import random
from typing import Any

import torch

from ptx.planting.faults import IN_PTX, Fault
from tools.planted.calls import CALLS, Call, Outcome
from tools.planted.reasons import judged
from tools.planted.table import key_of


def again(architecture: int, number: int, stored: dict[str, Any], few: int) -> list[tuple[Fault, str, str]]:
    """Some faults in PTX, with the state stored and the state now; faults of a kernel that has changed have no stored state."""
    torch.set_num_threads(1)
    call = Call(architecture, CALLS[number])
    assert call.unchanged
    same = {name for name, program in call.programs.items() if stored["kernels"].get(name) == key_of(program)}
    known = [(Fault(*row[:3]), row[3]) for row in stored["faults"] if row[0] in IN_PTX and row[1] in same]
    new = [(fault, "") for fault in call.faults() if fault.kind in IN_PTX and call.may_run(fault) and fault.kernel not in same]
    drawn = random.Random(0).sample(known + new, few)
    return [(fault, state, outcome[0]) for fault, state in drawn if (outcome := judged(call, fault))]


def without_fault(architecture: int, number: int) -> Outcome | None:
    call = Call(architecture, CALLS[number])
    assert call.unchanged
    return call._judge(lambda title, program: program)
