"""Counts what the compiled Triton kernels do at the sizes of the models: a few programs of each grid stand for all.

    python -m ptx.counts [OPERATOR ...] [--architectures 80 90] [--programs 4] [--only "dot bf16"] [--out FILE]

The calls are those of tools/compiled/calls/, with random numbers for inputs. A row of benchmarks/results/ptx_counts.json is a
launch: instructions of threads by kind, for each pair of query and key where the kernel has these, else for each program; the
share of shared memory's wavefronts that bank conflicts add; the share of global memory's sectors that the accesses need at least.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ptx.package import ARCHITECTURES
from ptx.reports import Launch, Options
from ptx.triton import emulated
from tools.compiled.triton import calls_of, operators
from vlattn_fast.benchmarks._records import RESULTS, provenance
from vlattn_fast.lab.records import write_records

MOST_CONFLICTS, LEAST_USED = 0.05, 0.8  # what is listed is beyond these

Row = dict[str, Any]


def rows_of(operator: str, name: str, architecture: int, programs: int) -> Iterator[Row]:
    """The launches of one call, of which the first of each kernel counts."""
    options = Options(races=False, counts=True, sample=programs)
    with pytest.MonkeyPatch.context() as patch, emulated(architecture, options, strict=False) as launches:
        patch.setattr(torch, "empty", _random(torch.empty))
        calls_of(operator)[name]()
    pairs = next((number for launch in launches if (number := _pairs(launch))), 0)
    for launch in {launch.name: launch for launch in reversed(launches)}.values():
        yield {"call": f"{operator} {name}", "architecture": f"sm_{architecture}", **_row(launch, programs, pairs)}


def _random(empty: Any) -> Any:
    generator = torch.Generator().manual_seed(0)

    def random(*size: Any, **options: Any) -> torch.Tensor:
        made = empty(*size, **options)
        return made.normal_(generator=generator) if made.is_floating_point() else made

    return random


def _pairs(launch: Launch) -> int:
    """Pairs of query and key: the first two tensors (B, H, N, D) are queries and keys."""
    heads = [shape for shape in launch.shapes.values() if len(shape) == 4]
    return heads[0][0] * heads[0][1] * heads[0][2] * heads[1][2] if len(heads) > 1 else 0


def _row(launch: Launch, programs: int, pairs: int) -> Row:
    grid = launch.grid[0] * launch.grid[1] * launch.grid[2]
    ran = min(programs, grid)
    units = ran / grid * pairs if pairs else ran
    a = launch.accesses
    return {
        "kernel": launch.name,
        "programs": f"{ran} of {grid}",
        "instructions_of": "a pair" if pairs else "a program",
        "instructions": round(sum(launch.lanes.values()) / units, 3),
        "by_kind": {kind: round(number / units, 3) for kind, number in launch.lanes.items() if number},
        "shared_conflicts": round(1 - a.least_wavefronts / a.wavefronts, 4) if a.wavefronts else None,
        "sectors_used": round(a.least_sectors / a.sectors, 4) if a.sectors else None,
    }


def beyond(rows: list[Row]) -> Iterator[str]:
    """A line for each launch with many bank conflicts, or many sectors that it does not use."""
    for row in rows:
        conflicts, used = row["shared_conflicts"] or 0.0, row["sectors_used"]
        if conflicts > MOST_CONFLICTS or (used is not None and used < LEAST_USED):
            shares = f"conflicts {conflicts:.1%}, sectors used {used or 0.0:.1%}"
            yield f"{row['call']}, {row['kernel']} on {row['architecture']}: {shares}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ptx.counts", description=__doc__.splitlines()[0])
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help=f"of {', '.join(operators())}; default: all")
    parser.add_argument("--architectures", nargs="*", type=int, choices=ARCHITECTURES, default=[80, 90])
    parser.add_argument("--programs", type=int, default=4, help="how many of a grid run")
    parser.add_argument("--only", default="", metavar="PATTERN", help="only calls whose names, with the operator's, this finds")
    parser.add_argument("--out", type=Path, default=RESULTS / "ptx_counts.json")
    options = parser.parse_args()
    rows: list[Row] = []
    for operator in options.operators or operators():
        for name in calls_of(operator):
            for architecture in options.architectures if re.search(options.only, f"{operator} {name}") else ():
                rows += rows_of(operator, name, architecture, options.programs)
                print(f"{operator} {name} sm_{architecture}", flush=True)
    origin = provenance(" ".join(["python -m ptx.counts", *sys.argv[1:]]))
    write_records(options.out, rows, origin)
    print("\n".join(beyond(rows)))


if __name__ == "__main__":
    main()
