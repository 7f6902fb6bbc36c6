"""Runs a kernel of a PTX file on arrays of an .npz file:

    nvcc --ptx -arch=sm_90 -lineinfo kernel.cu
    python -m ptx kernel.ptx arguments.npz --grid 4 --block 128 --results results.npz

Arguments are the file's arrays in their order (numpy.savez keeps it): one without dimensions is a number, another one a tensor. A
bfloat16 has its bits in uint16. The status is 1 if anything was found, with each finding on the output.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
import torch

import ptx


def sizes(text: str) -> tuple[int, ...]:
    """`4` or `4,2,1`."""
    if not re.fullmatch(r"\d+(,\d+){0,2}", text):
        raise argparse.ArgumentTypeError(f"must be one to three numbers, such as 4 or 4,2; got {text}")
    return tuple(map(int, text.split(",")))


def parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    made = argparse.ArgumentParser("python -m ptx", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("kernel", type=Path, help="PTX text, as nvcc --ptx writes it")
    made.add_argument("arguments", type=Path, help="an .npz file")
    made.add_argument("--grid", type=sizes, required=True, help="blocks")
    made.add_argument("--block", type=sizes, required=True, help="threads of a block")
    made.add_argument("--cluster", type=sizes, default=(), help="blocks of a cluster, if the text does not say")
    made.add_argument("--shared", type=int, default=0, help="bytes of dynamic shared memory")
    made.add_argument("--name", default="", help="the kernel, if the text has several")
    made.add_argument("--seed", type=int, default=0, help="draws the order of blocks and warps")
    made.add_argument("--results", type=Path, help="where the arrays go after the launch")
    return made


def main() -> int:
    asked = parser().parse_args()
    with np.load(asked.arguments) as file:
        arrays = dict(file)
    values = [array.item() if array.ndim == 0 else torch.from_numpy(array) for array in arrays.values()]
    shape = dict(block=asked.block, cluster=asked.cluster, shared=asked.shared, name=asked.name)
    try:
        launch = ptx.run(
            asked.kernel.read_text(), asked.grid, *values, options=ptx.Options(seed=asked.seed), strict=False, **shape
        )
    except ptx.EmulationError as error:
        print(error)
        return 1
    print(f"{launch.name}: {launch.executed} instructions of a warp, {len(launch.findings)} findings")
    for finding in launch.findings:
        print(finding)
    if asked.results:
        np.savez(asked.results, **arrays)
    return int(bool(launch.findings))


if __name__ == "__main__":
    raise SystemExit(main())
