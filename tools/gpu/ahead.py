"""Compiles what `make gpu` launches on a machine without a GPU, so that a lent one spends its minutes on running.

    python -m tools.gpu.ahead [--architecture 90] [--processes 2] [--tiles REGEX]

Triton finds a compiled kernel by its source and by Triton's own files. So the Python of this process needs the minor version of
the other machine's, and the same wheels of torch and Triton. build/kernels.tar.xz then holds the kernels of the first steps of a
call: the launcher with its archive, a call of each kernel, the lengths beside cuDNN, the named benchmarks, and the candidates of
`tiles`.
`make gpu` unpacks it there. With --tiles it compiles only candidates of the hot launches whose names match, and prints them, the
best by the estimate (tools/compiled/tile_times.py) first.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from typing import Any

from tools.gpu.run import lay_out_tree
from tools.gpu.session import KERNELS, ROOT, import_from_tree, of_devices, pack

MOST_BYTES = 36 * 2**20  # beside the tree a lent machine may take 64 MiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", type=int, default=90)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--tiles", metavar="REGEX", help="only candidates of launches whose names match; writes no archive")
    options = parser.parse_args()
    lay_out_tree()
    import_from_tree()
    os.environ["TRITON_CACHE_DIR"] = str(ROOT / "build" / "triton-cache")
    from tools.compiled.tile_times import label
    from tools.gpu import archives, lengths, production, tiles

    made_of = tiles.made_of(options.architecture)
    for number, hot in enumerate(production.HOTTEST):
        if re.search(options.tiles or "", hot.name):
            made = tiles.plan(number, options.architecture, options.processes)
            tiles.keep(number, made_of, made)
            print(f"{hot.name}: {made['of']} compiled for", flush=True)
            for row in made["candidates"]:
                estimate = f"{row['estimate']:.3f} cycles a pair, " if "estimate" in row else ""
                print(f"  {label(row['config'])}: {estimate}{row['programs']} programs an SM, {row['spills']} bytes spilled")
    if options.tiles is not None:
        return
    tasks: list[tuple[Callable[..., str], Any]] = [(benchmark, name) for name in production.NAMED]
    tasks += [(check, one.item) for one in production.of_each_kernel(of_devices("verify"))]
    tasks += [(check, f"{operator}/{name}/{archives.SIZES}/bfloat16") for operator, name in archives.CALLS]
    tasks += [(of_length, length) for length in lengths.EVERY]
    with tiles.new_pool(options.processes) as pool:
        for done in [pool.submit(task, what, options.architecture) for task, what in tasks]:
            print(done.result(), flush=True)
    with tiles.new_pool(1) as pool:  # a process that compiles for archives launches nothing any more
        pool.submit(
            archives.compiled, {"folder": ROOT / "build" / "archives", "architecture": options.architecture}, "cuda"
        ).result()
    archive = ROOT / "build" / KERNELS
    pack(ROOT / "build", archive, MOST_BYTES)
    print(f"{archive}: {archive.stat().st_size / 2**20:.0f} MiB")


def benchmark(name: str, architecture: int) -> str:
    from tools.gpu import production
    from tools.gpu.tiles import for_a_gpu

    with for_a_gpu(architecture):
        call = production.call_of(name, "triton", "cpu", batch=16)
        if call is not None:
            call()
    return name


def of_length(length: Any, architecture: int) -> str:
    from tools.gpu import lengths
    from tools.gpu.tiles import for_a_gpu

    with for_a_gpu(architecture):
        for name, call in lengths.calls(length, "cpu").items():
            if not name.startswith("cuDNN"):
                call()
    return str(length.item)


def check(item: str, architecture: int) -> str:
    from tools.gpu import full, production
    from tools.gpu.tiles import for_a_gpu
    from vlattn_fast.checking import verify
    from vlattn_fast.ops import OPERATORS

    (one,) = [each for each in production.checks() if each.item == item]
    # a launch of fewer samples compiles alike; the lengths say what Triton specialises for
    few = {name: sizes._replace(batch=min(sizes.batch, 4)) for name, sizes in full.SIZES.items()}
    full.SIZES.update(few)
    case = one.example("cuda")
    tensors = case.in_dtype(one.dtype)
    with for_a_gpu(architecture):
        if OPERATORS[case.operator].refusals("triton", case.arguments(tensors)):
            return f"{item}: not on triton"
        verify._run(case, tensors, "triton")
    return item


if __name__ == "__main__":
    main()
