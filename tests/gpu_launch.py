"""Runs an operator's cases of `vlattn verify` on its Triton kernels, forward and backward: what `make gpu` sanitizes.

usage: python tests/gpu_launch.py DEVICE OPERATOR
"""

import sys

import torch

from vlattn_fast import verify


def main(device: str, operator: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for case in verify.cases():
            if case.operator == operator:
                verify._run(case, case.in_dtype(dtype, device), "triton")
                print(f"{operator} {dtype} {case.name}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
