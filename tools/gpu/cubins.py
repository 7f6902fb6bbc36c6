"""Compiles kernels ahead of their first call, into the archives sm_80.zip, sm_90.zip and sm_100.zip of packages/vlattn-native.

    python -m tools.gpu.cubins [OPERATOR ...] [--architecture 90 ...] [--out FOLDER] [--ptx]

The launches are those of the calls in tools/compiled/calls/, and of the calls of models in full.py. sm_100 has PTX; with --ptx
all have, for a stand-in of the driver. The package's launcher is built as well. An editable install of the package uses all of
it, and a wheel that is built then has the archives.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tools.compiled.triton import ARCHITECTURES, calls_of, check, operators
from tools.gpu import full
from vlattn_fast.checking import verify
from vlattn_native import archive, building
from vlattn_native.compiling import Compiled, launches_in, write

OPERATORS = ("score_attention", "relevancy_attention", "attention_statistics", "attention_map", "congruence_loss")
AS_PTX = (100,)


def calls(operator: str) -> dict[str, Callable[[], Any]]:
    """Those of tools/compiled/calls/, and those of models in 16 bits, of one sample, with and without a log-sum-exp."""

    def run(one: full.Full) -> None:
        case = one.example(rehearsed=False)
        for dtype in (torch.bfloat16, torch.float16):
            for asked in ({}, {"return_lse": False})[: 2 if "return_lse" in case.options else 1]:
                with_lse = replace(case, options=case.options | asked)
                verify._run(with_lse, case.in_dtype(dtype), "triton")

    single = patch.dict(full.SIZES, {name: sizes._replace(batch=1) for name, sizes in full.SIZES.items()})
    models = [one for one in full.FULL if one.operator == operator]
    return calls_of(operator) | {f"{one.name} {one.sizes}": functools.partial(single(run), one) for one in models}


def of_call(operator: str, name: str, architecture: int, as_ptx: bool) -> list[Compiled]:
    """The launches of such a call, each form once."""
    return launches_in(calls(operator)[name], architecture, as_ptx, check)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.cubins", description=__doc__.splitlines()[0])
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help=f"default: {' '.join(OPERATORS)}")
    parser.add_argument("--architecture", type=int, nargs="*", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--out", type=Path, default=archive.FOLDER)
    parser.add_argument("--ptx", action="store_true", help="PTX for every architecture")
    parser.add_argument("--workers", type=int, metavar="N", default=os.cpu_count())
    options = parser.parse_args()
    chosen = options.operators or OPERATORS
    if unknown := sorted(set(chosen) - set(operators())):
        parser.error(f"OPERATOR must be one of {', '.join(operators())}; got {', '.join(unknown)}")
    every = [(operator, name) for operator in chosen for name in calls(operator)]
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        for architecture in options.architecture:
            as_ptx = options.ptx or architecture in AS_PTX
            of_one: Callable[..., list[Compiled]] = functools.partial(of_call, architecture=architecture, as_ptx=as_ptx)
            compiled = []
            for (operator, name), made in zip(every, pool.map(of_one, *zip(*every, strict=True)), strict=True):
                compiled += made
                print(f"sm_{architecture} {operator} {name}: {len(made)} launches", flush=True)
            path = options.out / f"sm_{architecture}.zip"
            write(path, compiled, "ptx" if as_ptx else "cubin")
            print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    shutil.copy(building.launcher(), options.out)


if __name__ == "__main__":
    main()
