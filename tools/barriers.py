"""Removes each barrier of the CUDA C++ kernels in turn; ThreadSanitizer must report each removal.

    python -m tools.barriers                       all barriers, about a minute each
    python -m tools.barriers relevancy_attention   the barriers of one operator

A barrier whose removal is not reported is needless, or lacks a test. `make test` removes one barrier (test_sanitized.py).
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

from tests.cuda.test_sanitized import run
from tests.helpers.cuda.building import EVERY_THREADS, ROOT, rewritten

SOURCES = ROOT / "csrc" / "cuda"
BARRIER = re.compile(r"\b__sync(threads|warp)\(\);")
TESTS = {
    "score_attention": "feature_sizes or blocks_of_keys or every_score or grouped",
    "relevancy_attention": "number_of_carried_rows or warps or grouped or head_dims or layouts or taken_as_it_is",
    "congruence_loss": "either_side or ragged or kinds_and_directions or head_dims or layouts",
}


def files(name: str) -> list[str]:
    """The source and this package's headers that it includes, each once."""
    names = [name]
    for file in names:
        included = re.findall(r'^#include "([\w.]+)"', (SOURCES / file).read_text(), re.M)
        names += [header for header in included if header not in names]
    return names


def outcome(operator: str, file: str, text: str) -> str:
    """The outcome of an operator's tests with `text` in the place of a file."""
    with tempfile.TemporaryDirectory() as folder:
        library = rewritten(f"{operator}.cu", file, text, Path(folder), *EVERY_THREADS)
        status, written = run("thread", library, {operator: TESTS[operator]})
    if "WARNING: ThreadSanitizer: data race" in written:
        return "reported"
    return "NOTHING" if status == 0 else f"another failure: {written[-2000:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operators", nargs="*", metavar="operator", help=f"of {', '.join(TESTS)}; default: all")
    operators = parser.parse_args().operators or list(TESTS)
    if unknown := sorted(set(operators) - set(TESTS)):
        parser.error(f"operator must be one of {', '.join(TESTS)}; got {', '.join(unknown)}")
    missed = 0
    for operator in operators:
        for file in files(f"{operator}.cu"):
            text = (SOURCES / file).read_text()
            for barrier in BARRIER.finditer(text):
                what = outcome(operator, file, text[: barrier.start()] + ";" + text[barrier.end() :])
                missed += what != "reported"
                print(f"{operator}: {file}:{text.count(chr(10), 0, barrier.start()) + 1}: {what}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
