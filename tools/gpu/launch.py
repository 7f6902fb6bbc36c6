"""Launches kernels of one backend and ends, for the sanitizer and the profiler of `make gpu`.

usage: python -m tools.gpu.launch DEVICE BACKEND OPERATOR    its cases of 200 queries and keys, in bfloat16, forward and backward
       python -m tools.gpu.launch DEVICE BACKEND BENCHMARK   three calls of a benchmark
"""

import sys

import torch

from tools.gpu import production
from tools.gpu.session import emulate
from vlattn_fast.checking import verify
from vlattn_fast.ops import OPERATORS

CALLS = 3


def main(device: str, backend: str, name: str) -> None:
    emulate()
    if "/" in name:
        call = production.call_of(name, backend, device)
        assert call is not None, f"{name} does not run on {backend}"
        for _ in range(CALLS):
            call()
    else:
        cases(device, backend, name)
    if device == "cuda":
        torch.cuda.synchronize()


def cases(device: str, backend: str, operator: str) -> None:
    """Runs the operator's cases, at a shorter size where the backend takes no case of 200."""
    ran = 0
    for sizes in ("N200", "uniter"):
        for case in production.cases(sizes):
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
