"""Removes the barriers of each source line of the CUDA C++ kernels in turn, from the compiled code; the emulator must report it.

    python -m tools.barriers                       all barriers
    python -m tools.barriers congruence_loss       those of one operator

A barrier whose removal is not reported is needless, or lacks a test.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys

from tools.building import ROOT

SOURCES = ROOT / "csrc" / "cuda"
BARRIER = re.compile(r"\b__sync(threads|warp)\(\);")
COMPILED = re.compile(r"\s*(bar|barrier)(\.cta|\.warp)?\.sync\b")
TESTS = {
    "score_attention": "feature_sizes or blocks_of_keys or every_score or grouped",
    "relevancy_attention": "number_of_carried_rows or warps or grouped or head_dims or layouts or taken_as_it_is",
    "congruence_loss": "either_side or ragged or kinds_and_directions or head_dims or layouts",
}


def without(text: str, place: str) -> str:
    """The PTX without the barriers of a source line, "mma.h:12"."""
    file, line = place.split(":")
    numbers = re.findall(rf'^\s*\.file\s+(\d+)\s+"[^"]*/{re.escape(file)}"', text, re.M)
    lines, here = text.splitlines(), False
    for n, one in enumerate(lines):
        if location := re.match(r"\s*\.loc\s+(\d+ \d+)\b(?:.*inlined_at (\d+ \d+))?", one):  # __syncwarp() is inlined
            here = any(f"{number} {line}" in location.groups() for number in numbers)
        elif here and COMPILED.match(one):
            lines[n] = ""
    return "\n".join(lines)


def pytest_configure() -> None:
    """As a plugin of pytest: the kernels lack the barriers of VLATTN_WITHOUT."""
    from ptx import cuda

    whole = cuda.text_at
    cuda.text_at = lambda address: without(whole(address), os.environ["VLATTN_WITHOUT"])


def places(operator: str) -> list[str]:
    """Each barrier in the source, and in the headers of this package that it includes, as "file:line"."""
    names = [f"{operator}.cu"]
    for file in names:
        included = re.findall(r'^#include "([\w.]+)"', (SOURCES / file).read_text(), re.M)
        names += [header for header in included if header not in names]
    texts = {file: (SOURCES / file).read_text() for file in names}
    return [f"{file}:{text.count(chr(10), 0, one.start()) + 1}" for file, text in texts.items() for one in BARRIER.finditer(text)]


def outcome(operator: str, place: str) -> str:
    files = [f"tests/{folder}/test_{operator}.py" for folder in ("cuda", "ops")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "tools.barriers", *files]
    environment = {**os.environ, "VLATTN_WITHOUT": place, "OMP_NUM_THREADS": "1"}
    words = f"cuda and ({TESTS[operator]})"
    done = subprocess.run([*command, "-k", words], cwd=ROOT, env=environment, capture_output=True, text=True)
    if "ptx.reports.FindingsError: " in done.stdout or "ptx.reports.EmulationError: " in done.stdout:
        return "reported"
    return "NOTHING" if done.returncode == 0 else f"another failure: {done.stdout[-2000:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operators", nargs="*", metavar="operator", help=f"of {', '.join(TESTS)}; default: all")
    operators = parser.parse_args().operators or list(TESTS)
    if unknown := sorted(set(operators) - set(TESTS)):
        parser.error(f"operator must be one of {', '.join(TESTS)}; got {', '.join(unknown)}")
    missed = 0
    for operator in operators:
        for place in places(operator):
            what = outcome(operator, place)
            missed += what != "reported"
            print(f"{operator}: {place}: {what}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
