"""Runs an operator's cases of `vlattn verify` on its kernels of one backend, forward and backward: what `make gpu` sanitizes.

usage: python tests/gpu/launch.py DEVICE BACKEND OPERATOR
"""

import sys

import torch

from vlattn_fast import verify


def main(device: str, backend: str, operator: str) -> None:
    refusals = verify.backends_of(operator)[backend].refusals
    for dtype in (torch.bfloat16, torch.float32):
        for case in verify.cases():
            tensors = case.in_dtype(dtype, device)
            if case.operator == operator and not refusals(verify.facts_of(operator, case.arguments(tensors))):
                verify._run(case, tensors, backend)
                print(f"{operator} {dtype} {case.name}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
