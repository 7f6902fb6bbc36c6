"""Plants faults in the core's source one at a time, and tells whether a test that reaches the place sees each.

    python -m tools.planted --core --record     # which tests reach which functions: make test's choice once, twice as long
    python -m tools.planted --core 200 --seed 1 # so many faults of all kinds; goes on where the last call ended
    python -m tools.planted --core --equivalent NAME WHY # remembers that a fault changes nothing, and why

Outcomes are stored in core.json beside this file, by place and change, and survive edits elsewhere. Faults are planted in a
copy of the tree, build/planted/tree. One in C++ rebuilds what it touches. If the choice does not see a fault, every case of the
same tests runs; `make test` runs each test that is stored as the one that sees a fault. If that case is gone, the fault is
planted again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Set
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tools.planted.mutants import Mutant, mutants

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "planted"
TREE, REACHED, TABLE = FOLDER / "tree", FOLDER / "reached", ROOT / "tools" / "planted" / "core.json"
CORE = "vlattn_fast", "kernels", "csrc/cpu"
CPP = 5  # one in so many faults is in C++, whose library is compiled for each
SECONDS, TESTS = 60.0, 300  # of the tests that reach a fault: so long, and so many, at most
FIRST = 20  # so many of them run before the others: most faults are seen by these
STATES = "seen", "not seen", "not reached", "equivalent"


def key_of(mutant: Mutant) -> str:
    """The name of a fault without its line."""
    return re.sub(r":\d+ ", f":{mutant.function} ", mutant.name, count=1)


def copy_tree() -> None:
    """Copies the files and the installed libraries with their records. Folders that an editable install maps are links."""
    backends = ROOT / "vlattn_fast" / "backends"
    built = [str(file.relative_to(ROOT)) for kind in ("*.so", "build.json") for file in backends.glob(f"*/{kind}")]
    for file in (*_files("--cached", "--others", "--exclude-standard"), *built):
        if (ROOT / file).is_file():
            (TREE / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, TREE / file)
    for name in ("kernels", "benchmarks"):
        if not (link := TREE / "vlattn_fast" / name).exists():
            link.symlink_to(Path("..") / name)


def _files(*options: str) -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z", *options], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.split("\0")[:-1]


def record(workers: str) -> None:
    shutil.rmtree(REACHED, ignore_errors=True)
    REACHED.mkdir(parents=True)
    options = ["-q", "-p", "tests.helpers.chosen", "-p", "tools.planted.reached", "--numprocesses", workers]
    _run([*options, "--dist", "worksteal"], {"VLATTN_REACHED": str(REACHED)}, timeout=None)


def tests_by_function(there: Set[str]) -> dict[str, list[tuple[float, str]]]:
    """Time and test, the quickest first, by function and by file. Tests that are gone since the recording are left out."""
    found = defaultdict[str, set[tuple[float, str]]](set)
    for file in REACHED.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            one = json.loads(line)
            if one["test"] not in there:
                continue
            for function in one["functions"]:
                for name in (function, function.partition(":")[0]):
                    found[name].add((one["seconds"], one["test"]))
    if not found:
        raise SystemExit("nothing is recorded: python -m tools.planted --core --record")
    return {name: sorted(tests) for name, tests in found.items()}


def drawn(count: int, seed: int) -> list[Mutant]:
    """Of each kind about as many, and one of CPP in C++; an edit of the source changes no other place's turn."""
    groups = defaultdict[tuple[bool, str], list[Mutant]](list)
    for file in _files(*CORE):
        if file.endswith((".py", ".cpp")):  # a header would rebuild every object
            for mutant in mutants(ROOT, file):
                groups[not file.endswith(".py"), mutant.kind].append(mutant)
    for group in groups.values():
        group.sort(key=lambda mutant: sha256(f"{seed} {key_of(mutant)}".encode()).digest())
    chosen = list[Mutant]()
    for in_cpp, number in ((False, count - count // CPP), (True, count // CPP)):
        kinds = [groups[kind] for kind in sorted(groups) if kind[0] == in_cpp]
        some = [mutant for turn in zip_longest(*kinds) for mutant in turn if mutant][:number]
        chosen += sorted(some, key=lambda one: one.file) if in_cpp else some  # two faults in a row in one object: one build
    return chosen


def outcome(mutant: Mutant, tests: dict[str, list[tuple[float, str]]]) -> dict[str, Any]:
    in_cpp = not mutant.file.endswith(".py")
    if in_cpp:
        callers, stem = (ROOT / "vlattn_fast/backends/cpu").glob("*.py"), Path(mutant.file).stem
        named = [str(each.relative_to(ROOT)) for each in callers if re.search(rf"\b{stem}\b", each.read_text())]
        reaching = sorted({one for name in named for one in tests.get(name, [])})
    else:
        # what runs when its module is imported is of no test, and so of all that reach the module
        reaching = tests.get(f"{mutant.file}:{mutant.function}") or tests.get(mutant.file, [])
    chosen, seconds = _quickest(reaching)
    if not chosen:
        return {"state": "not reached"}
    place = TREE / mutant.file
    text = place.read_text()
    place.write_text(mutant.planted(text))
    try:
        environment = _built() if in_cpp else {}
        if environment is None:
            return {"state": "seen", "by": "the compiler"}
        every_case = [*dict.fromkeys(test.partition("[")[0] for _, test in reaching)][:TESTS]
        for some in (chosen[:FIRST], chosen[FIRST:], every_case):
            status, said = _run(["-x", "-q", *some], environment, timeout=10 * seconds + 300) if some else (0, "")
            if status == 124 and some is every_case:  # what had no time
                status = 0
            if status != 0:
                break
    finally:
        place.write_text(text)
    if status == 0:
        return {"state": "not seen", "tests": len(chosen)}
    if status in (4, 5):  # pytest's, for tests that it does not find
        raise SystemExit(f"{mutant.name}: the tests that reach it do not run\n{said}")
    first = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", said, re.MULTILINE)
    if first and _run(["-q", first[1]], {}, timeout=None)[0] != 0:
        raise SystemExit(f"{first[1]} fails without a fault")
    return {"state": "seen", "by": first[1] if first else f"status {status}"}


def _quickest(reaching: list[tuple[float, str]]) -> tuple[list[str], float]:
    """Tests to run and their time: the quickest case of each test before the second of any."""
    cases = Counter[str]()
    ordered = list[tuple[int, float, str]]()
    for seconds, test in reaching:
        function = test.partition("[")[0]
        ordered.append((cases[function], seconds, test))
        cases[function] += 1
    chosen, total = list[str](), 0.0
    for _, seconds, test in sorted(ordered)[:TESTS]:
        if total < SECONDS:
            chosen, total = [*chosen, test], total + seconds
    return chosen, total


def _built() -> dict[str, str] | None:
    build = TREE / "build" / "cpu"
    configure = ["cmake", "-G", "Ninja", "-S", str(TREE), "-B", str(build), "-DVLATTN_CPU=ON", "-DVLATTN_ISA=native"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in (configure, ["cmake", "--build", str(build)]):
        if subprocess.run(command, capture_output=True, env={**os.environ, "PATH": path}).returncode != 0:
            return None
    return {"VLATTN_CPU_LIBRARY": str(build / "libvlattn_cpu.so")}


def _run(arguments: list[str], environment: dict[str, str], timeout: float | None) -> tuple[int, str]:
    command = [sys.executable, "-m", "tests.helpers.process", "-p", "no:cacheprovider", *arguments]
    settings = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONDONTWRITEBYTECODE": "", **environment}
    try:
        done = subprocess.run(command, cwd=TREE, env={**os.environ, **settings}, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return 124, ""
    return done.returncode, done.stdout


def summary(rows: dict[str, dict[str, Any]]) -> list[str]:
    """By folder and by kind: how many faults, and how many in each state. In Markdown."""
    counts = defaultdict[str, Counter[str]](Counter)
    for key, row in rows.items():
        folder = str(Path(key.partition(":")[0]).parent)
        for name in (folder, re.sub(r"^.*?:\w* ([a-z ]+): .*$", r"\1", key), "all"):
            counts[name][row["state"]] += 1
    lines = [["", "planted", *STATES]] + [["---"] + ["---:"] * (1 + len(STATES))]
    lines += [[name, str(states.total()), *(str(states[state]) for state in STATES)] for name, states in sorted(counts.items())]
    return [f"| {' | '.join(line)} |" for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.planted")
    parser.add_argument("--core", type=int, nargs="?", default=0, metavar="N", help="how many faults are drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--workers", default="2", metavar="N", help="of --record")
    parser.add_argument("--equivalent", nargs=2, metavar=("NAME", "WHY"))
    options = parser.parse_args()
    rows: dict[str, dict[str, Any]] = json.loads(TABLE.read_text()) if TABLE.exists() else {}

    def store() -> None:
        lines = (f"{json.dumps(key)}: {json.dumps(row)}" for key, row in sorted(rows.items()))
        TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")

    if options.equivalent:
        name, why = options.equivalent
        if name not in rows:
            raise SystemExit(f"NAME must be a fault of {TABLE}; got {name!r}")
        rows[name] = {"state": "equivalent", "why": why}
        store()
    if options.record or options.core:
        copy_tree()
    if options.record:
        record(options.workers)
    if options.core:
        there = {*_run(["--collect-only", "-q"], {}, timeout=None)[1].splitlines()}
        tests = tests_by_function(there)
        for mutant in drawn(options.core, options.seed):
            key = key_of(mutant)
            by = rows.get(key, {}).get("by", "")
            if key not in rows or ("::" in by and by not in there):
                rows[key] = outcome(mutant, tests)
                store()
                print(rows[key]["state"], mutant.name, rows[key].get("by", ""), sep=" | ", flush=True)
    print("\n".join(summary(rows)))
