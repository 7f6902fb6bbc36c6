"""Checks of the CPU's C++ kernels that pass once for their sources: `make once`.

    python -m tools.once                 runs those whose sources have changed since they passed, and stores that they pass
    python -m tools.once thread tiles    these of them

They are parts of `make sanitize` and of `make aarch64`, which take minutes to compile. `make test` runs a check where the stored
hash in PASSED is not that of today's sources, and stores nothing.

address, thread: edges of tiles, layouts and empty sizes under the sanitizers. Under `address` products by tiles have a stand-in
                 for the instructions; tiles are laid out by the processor; other kernels have the set that runs here.
tiles:           the counts of that stand-in are those of docs/reliability.md, but for the larger call, which takes minutes.
aarch64:         every operator with its masks, dtypes and layouts, on emulated ARM.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess

from tools import aarch64, sanitize, tiles
from tools.building import ROOT, Missing

PASSED = ROOT / "tests" / "cpu" / "passed.json"
PAGE = ROOT / "docs" / "reliability.md"
# what runs in these checks, and what it runs; a change elsewhere reaches no kernel, or other tests see it
SOURCES = ("CMakeLists.txt", "csrc/layout.h", "csrc/cpu/*", "tests/cpu/*", "tests/ops/*.py")
SOURCES += tuple(f"vlattn_fast/{name}/**/*.py" for name in ("_ground", "backends", "dispatch", "ops"))
SOURCES += ("tests/helpers/cpu/*.py", *(f"tools/{name}.py" for name in ("aarch64", "once", "sanitize", "tiles")))

CHOSEN = {
    "address": "layouts or empty or grouped or test_pairs or panels",
    "thread": "layouts or grouped",
    "aarch64": "masks or grouped or layouts or precision or dtypes or every_score or directions or matches",
}
SOME_CASES = ("-p", "tests.helpers.cases")  # as `make test` has it
SETS = {"address": ("amx",), "thread": ()}  # beside the one that runs here
# Threads divide a call by its sizes: one layout that is read where it lies, and one that is copied, have each size.
LEFT_OUT = {"address": "", "thread": " and not (sliced or offset or expanded)"}


def sanitized(kind: str) -> Path:
    """The folder of the library with the widest set that runs here, `address` with `amx`, too."""
    return sanitize.sanitized(kind, sanitize.others_than_amx()[0], *SETS[kind])


def under_sanitizer(kind: str) -> str:
    chosen = f"{sanitize.CHOSEN} and ({CHOSEN[kind]}){LEFT_OUT[kind]}"
    instruction_set = [sanitize.others_than_amx()[0], *SETS[kind]][-1]
    # the files that have such tests: to collect all, too, takes a sanitizer longer than these tests
    named = re.compile(rf"test_\w*({CHOSEN[kind].replace(' or ', '|')})")
    files = [path for folder in sanitize.PATHS for path in sorted((ROOT / folder).glob("test_*.py"))]
    names = [str(path) for path in files if named.search(path.stem + path.read_text(encoding="utf-8"))]
    return _problem(sanitize.run(kind, sanitized(kind), instruction_set, *SOME_CASES, "-x", *names, "-k", chosen))


def on_arm() -> str:
    widest = aarch64.SETS[0]  # its sources are those of the other set, but for products of bfloat16
    operators = {path.stem.split("_")[0] for path in (ROOT / "vlattn_fast/backends/cpu").glob("[!_]*.py")}
    files = [str(path) for name in sorted(operators) for path in (ROOT / "tests/ops").glob(f"test_{name}*.py")]
    options = (*SOME_CASES, "-x", *files, "-k", f"{aarch64.CHOSEN} and ({CHOSEN['aarch64']})")
    return _problem(aarch64.run(aarch64.build(widest), widest, *options))


def counted_tiles() -> str:
    sanitized("address")
    _, *smaller = tiles.SIZES
    counted, page = tiles.lines(*smaller), rows_of_page()
    if not sanitize.others_than_amx()[0].startswith("v4"):  # the stand-in has the vectors of this processor: fewer rows a tile
        counted = [line for line in counted if tiles.TILES not in line]
    missing = [line for line in counted if line not in page]
    return "\n".join([f"{PAGE.name} lacks, or counts nothing:", *missing]) if missing or not counted else ""


def rows_of_page() -> list[str]:
    """The table of tiles in docs/reliability.md."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = lines[lines.index(tiles.HEADER) + 2 :]
    return rows[: next(n for n, line in enumerate(rows) if not line.startswith("|"))]


def _problem(done: CompletedProcess[str]) -> str:
    """The output of pytest where a test failed, else nothing."""
    return done.stdout[-10000:] if done.returncode else ""


# by its name; each gives what is wrong, or ""
CHECKS: dict[str, Callable[[], str]] = {
    "address": partial(under_sanitizer, "address"),
    "thread": partial(under_sanitizer, "thread"),
    "tiles": counted_tiles,
    "aarch64": on_arm,
}


def sources(name: str) -> str:
    """A hash of SOURCES, for `tiles` with the table of the page."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file() and path != PASSED}):
        digest.update(f"\n{path.relative_to(ROOT).as_posix()}\n".encode() + path.read_bytes())
    if name == "tiles":
        digest.update("\n".join(rows_of_page()).encode())
    return digest.hexdigest()[:16]


def stored() -> dict[str, str]:
    """By the names of the checks the hash of the sources that passed."""
    return json.loads(PASSED.read_text()) if PASSED.exists() else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"of {', '.join(CHECKS)}; default: all")
    chosen = parser.parse_args().checks or list(CHECKS)
    if unknown := sorted(set(chosen) - set(CHECKS)):
        parser.error(f"CHECK must be one of {', '.join(CHECKS)}; got {', '.join(unknown)}")
    failed = 0
    for name in chosen:
        today = sources(name)
        if stored().get(name) == today:
            print(f"{name}: passed before, and its sources are the same", flush=True)
            continue
        try:
            problem = CHECKS[name]()
        except Missing as missing:
            problem = str(missing)
        print(f"{name}: {problem or 'passed'}", flush=True)
        failed += bool(problem)
        if not problem and today == sources(name):  # else they changed meanwhile
            PASSED.write_text(json.dumps({**stored(), name: today}, indent=1, sort_keys=True) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
