"""python -m vlattn_fast.benchmarks: measure, measure the host alone, look for cliffs, or draw the report."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from vlattn_fast.benchmarks._choice import choose
from vlattn_fast.benchmarks._records import HERE, RESULTS
from vlattn_fast.benchmarks._run import run


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["report"]:
        return _report(words[1:])
    if words[:1] == ["host"]:
        from vlattn_fast.benchmarks import host

        return host.main(words[1:])
    if words[:1] == ["cliffs"]:
        from vlattn_fast.benchmarks import cliffs

        return cliffs.main(words[1:])
    parser = argparse.ArgumentParser(prog="python -m vlattn_fast.benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", help="files or single benchmarks (--list); all by default; or `report`, `host` or `cliffs`"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds; stores records only with --out")
    parser.add_argument("--no-compile", dest="compiled", action="store_false", help="nothing under torch.compile")
    parser.add_argument("--rounds", type=int, help="calls of each variant")
    parser.add_argument("--out", type=Path, help="JSON file that records are added to, or a folder for <device>.json")
    parser.add_argument("--list", action="store_true", help="only name the benchmarks")
    options = vars(parser.parse_args(words))
    try:
        if options.pop("list"):
            print("\n".join(benchmark.name for benchmark in choose(options["names"])))
            return 0
        passed = run(**options, command=shlex.join(["python", "-m", "vlattn_fast.benchmarks", *words]))
    except ValueError as error:
        parser.error(str(error))
    return 0 if passed else 1


def _report(arguments: list[str]) -> int:
    from vlattn_fast.benchmarks._report import write

    parser = argparse.ArgumentParser(prog="python -m vlattn_fast.benchmarks report")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    in_a_clone = RESULTS.parent == HERE
    parser.add_argument("--out", type=Path, default=HERE.parent / "build" / "report.md" if in_a_clone else Path("report.md"))
    options = parser.parse_args(arguments)
    for path in write(options.results, options.out):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
