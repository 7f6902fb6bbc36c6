"""Launches kernels of one backend and ends, for the sanitizer and the profiler of `make gpu`.

usage: python -m tools.gpu.launch DEVICE BACKEND OPERATOR [SIZES [REGEX]]    its cases in bfloat16, forward and backward: of 200
                                                                     queries and keys, or of these sizes of production.py; with
                                                                     REGEX those whose names match
       python -m tools.gpu.launch DEVICE BACKEND BENCHMARK   three calls of a benchmark
"""

import re
import sys
from collections.abc import Sequence

import torch

from tools.gpu import production
from tools.gpu.session import emulate
from vlattn_fast.checking import verify
from vlattn_fast.ops import OPERATORS

CALLS = 3


def main(device: str, backend: str, name: str, sizes: str = "", matching: str = "") -> None:
    emulate()
    if "/" in name:
        call = production.call_of(name, backend, device)
        assert call is not None, f"{name} does not run on {backend}"
        for _ in range(CALLS):
            call()
    else:
        cases(device, backend, name, (sizes,) if sizes else ("N200", "uniter"), matching)
    if device == "cuda":
        torch.cuda.synchronize()


def cases(device: str, backend: str, operator: str, choices: Sequence[str], matching: str = "") -> None:
    """Runs the operator's cases, at the first of the sizes at which the backend takes some."""
    ran = 0
    for sizes in choices:
        for case in (one for one in production.cases(sizes) if re.search(matching, one.name)):
            tensors = case.in_dtype(torch.bfloat16, device)
            if case.operator == operator and not OPERATORS[operator].refusals(backend, case.arguments(tensors)):
                verify._run(case, tensors, backend)
                ran += 1
                print(f"{operator} {case.name}", flush=True)
        if ran:
            return
    raise SystemExit(f"{backend} runs no case of {operator}")


if __name__ == "__main__":
    main(*sys.argv[1:])
