"""Counts what the compiled GPU kernels do at the sizes of the models: a few programs of a grid stand for all.

    python -m tools.compiled.counts [OPERATOR ...] [--architectures 80 90] [--programs 2] [--only PATTERN] [--missing]

The calls are those of tools/compiled/calls/, with random numbers for inputs. Names of calls of CUDA C++ kernels, which nvcc
compiles, begin with "cuda", and with "cuda sm_90" if only sm_90 runs them. A row of build/compiled/ptx_counts.json is a kernel of
a call: instructions of threads by kind, wavefronts of shared memory and sectors of global memory of the programs that ran, and
the least of both that could be: without bank conflicts, and with all bytes of a sector in use. Each call is stored when it ends,
in place of its old rows. Races and reads of what was never written are looked for meanwhile, and make the command fail.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from ptx.architectures import ARCHITECTURES
from ptx.running.launch import Launch
from ptx.running.reports import Options
from tools.compiled.cuda import nvcc_version
from tools.compiled.triton import TABLE, calls_module, calls_of, operators
from tools.emulated import cuda
from tools.emulated.triton import emulated

# the others branch on what they write
WHOLE = ("score_attention._prepare_kernel", "_group_bias._group_bias_kernel")
COUNTS = TABLE.with_name("ptx_counts.json")
MOST_CONFLICTS, LEAST_USED = 0.05, 0.8

Row = dict[str, Any]


def read(file: Path = COUNTS) -> list[Row]:
    rows: list[Row] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    return rows


def write(file: Path, rows: list[Row]) -> None:
    """A line for each row."""
    lines = [json.dumps(row) for row in sorted(rows, key=lambda row: (row["call"], row["architecture"], row["kernel"]))]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def conflicts(row: Row) -> float:
    """The share of the shared memory's wavefronts that bank conflicts add."""
    counted, least = row["wavefronts"]
    return 1 - least / counted if counted else 0.0


def used(row: Row) -> float:
    """The share of the global memory's sectors that would hold the bytes in use."""
    counted, least = row["sectors"]
    return least / counted if counted else 1.0


def used_once(row: Row) -> float:
    """The same if a program had each of its sectors once."""
    counted, least = row["once"]
    return least / counted if counted else 1.0


def beyond(row: Row) -> list[str]:
    """Its numbers beyond the limits: "conflicts", "sectors", or both."""
    limits = {"conflicts": conflicts(row) > MOST_CONFLICTS, "sectors": used(row) < LEAST_USED}
    return [number for number, holds in limits.items() if holds]


def counted_calls(operator: str, programs: int = 0) -> dict[str, tuple[Callable[[], None], int]]:
    """Calls, each with how many programs of a grid run; 0: all."""
    causal, compared = (getattr(calls_module(operator), name, list)() for name in ("causal_calls", "compared_calls"))
    some = calls_of(operator) | dict(compared)
    return {name: (call, programs) for name, call in some.items()} | {name: (call, 0) for name, call in causal}


def in_cuda(name: str) -> bool:
    """Whether a call is one of CUDA C++ kernels."""
    return name.startswith("cuda ")


def rows_of(operator: str, name: str, architecture: int, programs: int) -> tuple[list[Row], list[str]]:
    """The rows of one call, each of a Triton kernel's first launch or of a launch of a CUDA C++ kernel, and lines to print."""
    call, programs = counted_calls(operator, programs)[name]
    options = Options(counts=True, sample=programs, whole=WHOLE)
    emulator = cuda.emulated if in_cuda(name) else emulated
    with pytest.MonkeyPatch.context() as patch, emulator(architecture, options, strict=False) as launches:
        patch.setattr(torch, "empty", _random(torch.empty))
        patch.setattr(torch.Tensor, "new_empty", _random(torch.Tensor.new_empty))  # as programs that do not run leave it
        call()
    for launch in launches:
        launch.name = launch.name.split("<")[0]
    # a kernel may compile to several; a launch in CUDA C++ may be another pass by the same kernel
    firsts = {(launch.name, n if in_cuda(name) else id(launch.program)): launch for n, launch in reversed([*enumerate(launches)])}
    pairs = next((sizes for launch in launches if launch.name not in WHOLE and (sizes := _pairs(launch))), None)
    rows: list[Row] = []
    lines: list[str] = []
    numbers: dict[str, int] = {}
    for launch in reversed(firsts.values()):
        number = numbers[launch.name] = numbers.get(launch.name, 0) + 1
        kernel = launch.name if number == 1 else f"{launch.name} launch {number}"
        call_facts = {"call": f"{operator} {name}", "architecture": f"sm_{architecture}", "kernel": kernel, "pairs": pairs}
        row = call_facts | _row(launch, 0 if launch.name in WHOLE else programs)
        rows.append(row)
        if beyond(row):
            lines += [f"  {kernel}: conflicts {conflicts(row):.1%}, sectors used {used(row):.1%}", *_places(launch)]
    for launch in launches:
        lines += [f"  {launch.name}: {finding}" for finding in launch.findings]
        row = next(row for row in rows if row["kernel"].split()[0] == launch.name)
        row["findings"] += len(launch.findings)
    return rows, lines


def _random(empty: Any) -> Any:
    generator = torch.Generator().manual_seed(0)

    def random(*size: Any, **options: Any) -> torch.Tensor:
        made = empty(*size, **options)
        return made.normal_(generator=generator) if made.is_floating_point() else made

    return random


def _pairs(launch: Launch) -> tuple[int, int, int] | None:
    """Heads, queries and keys: the first two tensors (B, H, N, D) are queries and keys, but for what prepares either."""
    heads = [shape for shape in launch.shapes.values() if len(shape) == 4]
    return (heads[0][0] * heads[0][1], heads[0][2], heads[1][2]) if len(heads) > 1 else None


def _row(launch: Launch, programs: int) -> Row:
    grid = launch.grid[0] * launch.grid[1] * launch.grid[2]
    a = launch.accesses
    return {
        "programs": min(programs or grid, grid),
        "grid": grid,
        "instructions": {kind: number for kind, number in launch.lanes.items() if number},
        "flop": launch.flop,
        "wavefronts": [a.wavefronts, a.least_wavefronts],
        "sectors": [a.sectors, a.least_sectors],
        "once": launch.once,
        "findings": 0,
    }


def _places(launch: Launch) -> Iterator[str]:
    """The three instructions that add most wavefronts, and those that add most sectors."""
    assert launch.program is not None
    for what, extra, least in (("wavefronts", 0, 1), ("sectors", 2, 3)):
        all_accesses = launch.accesses[extra] or 1
        worst = sorted(launch.by_instruction.items(), key=lambda one: one[1][least] - one[1][extra])[:3]
        for number, counts in worst:
            if counts[extra] > counts[least]:
                share = (counts[extra] - counts[least]) / all_accesses
                yield f"    {share:.1%} more {what} ({counts[extra]} for {counts[least]}): {launch.program.at(number)}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.compiled.counts", description=__doc__.splitlines()[0])
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help=f"of {', '.join(operators())}; default: all")
    parser.add_argument("--architectures", nargs="*", type=int, choices=ARCHITECTURES, default=[80, 90])
    parser.add_argument("--programs", type=int, default=2, help="how many of a grid run")
    parser.add_argument("--only", default="", metavar="PATTERN", help="only calls whose names, with the operator's, this finds")
    parser.add_argument("--missing", action="store_true", help="only calls without rows, or with findings")
    parser.add_argument("--out", type=Path, default=COUNTS)
    options = parser.parse_args()
    chosen = [
        (operator, name, architecture)
        for operator in options.operators or operators()
        for name in counted_calls(operator)
        for architecture in options.architectures
        if re.search(options.only, f"{operator} {name}") and (architecture == 90 or not name.startswith("cuda sm_90"))
    ]
    findings = 0
    for operator, name, architecture in chosen:
        call_facts = f"{operator} {name}", f"sm_{architecture}"
        stored = read(options.out)
        old = [row for row in stored if (row["call"], row["architecture"]) == call_facts]
        if options.missing and old and not any(row["findings"] for row in old):
            continue
        rows, lines = rows_of(operator, name, architecture, options.programs)
        findings += sum(row["findings"] for row in rows)
        compiler = {"nvcc": nvcc_version()} if in_cuda(name) else {"triton": triton.__version__}
        rows = [compiler | row for row in rows]
        write(options.out, [row for row in stored if row not in old] + rows)
        print("\n".join([" ".join(call_facts), *lines]), flush=True)
    sys.exit(f"{findings} findings" if findings else 0)


if __name__ == "__main__":
    main()
