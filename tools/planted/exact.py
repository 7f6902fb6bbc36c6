"""Faults that stay within the tolerance, planted in the source again, under FpSan: `python -m tools.planted.exact` stores who saw them.

FpSan knows no tolerance. A call runs with the fault and without it, in the same tiles, and a fault is seen where the integers in place
of the results differ in their lower 16 bits. A fault in PTX has no place in the PTX of FpSan, whose products are those of integers:
it is planted where its line of the source has its like.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import NamedTuple

import torch

import ptx.sanitizers
from tools.planted.calls import _changed_source
from tools.planted.faults import IN_SOURCE, Change, Fault
from vlattn_fast.checking import verify
from vlattn_fast.checking.cases import Sizes

TABLE = Path(__file__).parents[2] / "tests" / "ptx" / "planted_exact.json"
SCALE = "source: scale forgotten"
SIZES = Sizes(queries=72, keys=104)


class Again(NamedTuple):
    reason: str  # by which the fault keeps the tolerance
    operator: str
    case: str
    differentiable: bool
    fault: Fault
    change: Change


def _without_factor(node: ast.AST) -> ast.AST | None:
    return IN_SOURCE[SCALE](node)


FAULTS = (
    Again(
        "a softmax subtracts it, and may subtract another number",
        "score_attention",
        "scaled_dot causal",
        False,
        Fault(SCALE, "score_attention._softmax_of_tile", 1),
        _without_factor,
    ),
    Again(
        "its value is so small that 0 keeps the tolerance as well",
        "attention_map",
        "gradient",
        False,
        Fault(SCALE, "attention_map._rows_kernel", 1),
        _without_factor,
    ),
)


def seen(again: Again, architecture: int = 90) -> bool:
    """Whether FpSan tells the fault."""
    torch.set_num_threads(1)
    case = next(one for one in verify.cases(sizes=SIZES, operators=[again.operator]) if one.name == again.case)
    tensors = case.in_dtype(torch.bfloat16)
    if not again.differentiable:
        from dataclasses import replace

        case = replace(case, differentiable=False)
    with ptx.sanitizers.fpsan(architecture, rounding=False):
        right = verify._run(case, tensors, "triton")
        with _changed_source(again.fault, again.change):
            wrong = verify._run(case, tensors, "triton")
    payloads = ((ptx.sanitizers.payload(x), ptx.sanitizers.payload(wrong[name])) for name, x in right.items())
    return any(bool(((x - y) & 0xFFFF).any()) for x, y in payloads)
