"""Times operators and tasks."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from vlattn_fast.benchmarks._choice import choose
from vlattn_fast.benchmarks._run import run


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m vlattn_fast.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help="Benchmarks or files of them (see --list). Default: all.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="Device. Default: cpu.")
    parser.add_argument("--quick", action="store_true", help="Use small sizes and few rounds; store results only with --out.")
    parser.add_argument("--no-compile", dest="compiled", action="store_false", help="Leave out variants under torch.compile.")
    parser.add_argument(
        "--variants", nargs="+", metavar="VARIANT", help="Only these variants, such as `triton SDPA FlexAttention`. Default: all."
    )
    parser.add_argument("--rounds", type=int, help="Number of timed calls of each variant. Default: the benchmark's.")
    parser.add_argument("--out", type=Path, help="File to which results are added, .json, or a folder for <device>.json.")
    parser.add_argument("--list", action="store_true", help="Print the names of the benchmarks, and run none.")
    options = vars(parser.parse_args(words))
    try:
        if options.pop("list"):
            print("\n".join(benchmark.name for benchmark in choose(options["names"])))
            return 0
        passed = run(**options, command=shlex.join(["python", "-m", "vlattn_fast.benchmarks", *words]))
    except ValueError as error:
        parser.error(str(error))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
