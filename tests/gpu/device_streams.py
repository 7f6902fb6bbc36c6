"""Streams and devices other than the first: a launch on the wrong one reads what is not there yet. `make gpu` runs it.

Inputs are written late: on their stream a wait of the device comes first. A launch on another stream reads the NaN before them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vlattn_fast.checking import verify
from vlattn_fast.checking.cases import Example
from vlattn_fast.ops import OPERATORS

CYCLES = 50_000_000  # of a device's clock, tens of milliseconds
NAMES = ("score_attention", "relevancy_attention", "attention_map", "attention_statistics", "maxsim", "congruence_loss")
CASES = [next(case for case in verify.cases() if case.operator == name) for name in NAMES]


def late_run(case: Example, backend: str, device: torch.device) -> Callable[[], dict[str, Tensor]]:
    """A call, forward and backward, on the current stream, whose inputs are written after a wait."""
    tensors = case.in_dtype(torch.bfloat16, device)
    late = {name: torch.full_like(x, torch.nan) if x.is_floating_point() else x.clone() for name, x in tensors.items()}

    def run() -> dict[str, Tensor]:
        torch.cuda._sleep(CYCLES)
        for name, x in late.items():
            x.copy_(tensors[name])
        return verify._run(case, late, backend)

    return run


@pytest.mark.parametrize("backend", ("triton", "cuda"))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.operator)
def test_a_side_stream(case: Example, backend: str) -> None:
    torch.set_default_device(None)
    device = torch.device("cuda", 0)
    tensors = case.in_dtype(torch.bfloat16, device)
    if OPERATORS[case.operator].refusals(backend, case.arguments(tensors)):
        pytest.skip(f"{backend} does not run it")
    expected, run = verify._run(case, tensors, backend), late_run(case, backend, device)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        got = run()
    torch.cuda.synchronize()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one device")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.operator)
def test_a_device_that_is_not_the_current_one(case: Example) -> None:
    torch.set_default_device(None)
    first, second = (verify._run(case, case.in_dtype(torch.bfloat16, f"cuda:{n}"), "triton") for n in range(2))
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(first[name].cpu(), second[name].cpu()) for name in first)
