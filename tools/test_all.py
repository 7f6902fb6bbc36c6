"""Every case of every test, in parts: `make test-all`.

    python -m tools.test_all                   all parts that have not passed with these files; hours on two cores
    python -m tools.test_all bits "ptx sm_90"  parts whose names begin so
    python -m tools.test_all --list            the parts, and which have passed
    python -m tools.test_all --changed         the tests of the folders in which something is not committed or not pushed
    python -m tools.test_all --changed 20      or is of the last 20 commits
    python -m tools.test_all --turn            the parts of one turn of TURNS, by the number of commits
    python -m tools.test_all --packages        some tests of each package, seconds each, as `make test` runs them

With --minutes, as .ci/run takes the last two, tests that no time is left for are skipped and counted, and parts are named.

A part that passed is stored in build/test-all.json, and runs again when a file of the repository has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from tools.cpus import SETTINGS

ROOT = Path(__file__).parents[1]
PASSED = ROOT / "build" / "test-all.json"
TURNS = 60  # a turn is about three parts, as many as the minutes of CI allow
SUITE = ("-m", "tests.helpers.process", "-q", "--tb=short", "--dist", "worksteal", "--numprocesses", "WORKERS")
PACKAGE = ("-m", "pytest", "-q", "--tb=short", "-p", "tools.part")
# of each package the tests that neither compile kernels nor train
PACKAGES = {
    "ptx": [
        f"--ignore=tests/test_{name}.py"
        for name in "run cuda descriptors driver plugin installed sanitizers clusters corpus readme".split()
    ],
    "vlattn-native": ["tests/test_hub.py", "tests/test_packaging.py", "-k", "not formulas and not launches"],
    "vlattn-vllm": [],
    "vlattn-lab": [
        f"tests/test_{name}.py"
        for name in "scenes questions winoground core_on_scenes measures pointing prompt_words prompts_published".split()
    ],
}
START, LAST = 20, 60  # seconds: without the former a part does not begin; the latter a test or a build has at the end
NO_TESTS = 5  # pytest's status if none was selected


@dataclass(frozen=True)
class Part:
    name: str
    command: tuple[str, ...]  # of this Python
    folder: str = "."  # in which it runs
    variables: dict[str, str] = field(default_factory=dict)
    needs: str = ""  # a program without which it cannot run

    def shards(self, count: int) -> list[Part]:
        """`count` parts, each with every count-th test (tools/part.py)."""
        named = [(f"{self.name} {n + 1}/{count}", {**self.variables, "VLATTN_SHARD": f"{n}/{count}"}) for n in range(count)]
        return [replace(self, name=name, variables=variables) for name, variables in named]


def parts() -> list[Part]:
    suite = Part("suite", SUITE).shards(20)
    bits = Part(
        "bits", (*SUITE, "-p", "tests.helpers.bits", *(f"tests/{name}" for name in ("cpu", "interpret", "nn", "ops")))
    ).shards(20)
    cpus = [part for name in SETTINGS for part in Part(f"cpus {name}", ("-m", "tools.cpus", name)).shards(5)]
    cpus.append(Part("cpus library", ("-m", "tools.cpus", "library")))
    sanitizers = [Part(kind, ("-m", "tools.sanitize", "--only", kind), needs="c++") for kind in ("address", "thread")]
    sanitized = [part for each in sanitizers for part in each.shards(10)]
    arm = Part("aarch64", ("-m", "tools.aarch64"), needs="qemu-aarch64").shards(10)
    packages = [
        part
        for tests in sorted((ROOT / "packages").glob("*/tests"))
        for name in [tests.parent.name]
        for part in Part(name, PACKAGE, folder=f"packages/{name}").shards(5)
    ]
    ptx = [
        part
        for architecture in ("80", "90", "100")
        for command in [(*SUITE, "tests/ops", "tests/kernels")]
        for part in Part(f"ptx sm_{architecture}", command, variables={"VLATTN_PTX": architecture}).shards(20)
    ]
    exact = Part("exact", (*SUITE, "tests/compiled/test_exact.py"), variables={"VLATTN_EXACT": "80 90"}).shards(5)
    ptx.append(Part("the lowest Triton", ("-m", "tools.environments", "triton", "--parse")))
    emulated = [*ptx, *exact] if (ROOT / "packages" / "ptx").exists() else []
    return [*suite, *bits, *cpus, *packages, *sanitized, *arm, *emulated]


def packages() -> list[Part]:
    there = {name: words for name, words in PACKAGES.items() if (ROOT / "packages" / name / "tests").is_dir()}
    return [Part(f"some of {name}", (*PACKAGE, *words), folder=f"packages/{name}") for name, words in there.items()]


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def tree() -> str:
    """A hash of what git tracks, as it lies here."""
    digest = hashlib.sha256()
    for path in (ROOT / name for name in git("ls-files", "-z").split("\0") if name):
        digest.update(str(path).encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()[:16]


def passed() -> set[str]:
    """The parts that passed with these files."""
    stored = json.loads(PASSED.read_text()) if PASSED.exists() else {}
    return set(stored["parts"]) if stored.get("tree") == tree() else set()


def turn(every: list[Part]) -> list[Part]:
    """Those whose turn it is; after TURNS commits each has had one. A later round begins with another of them."""
    count = int(git("rev-list", "--count", "HEAD"))
    chosen = every[count % TURNS :: TURNS]
    first = count // TURNS % len(chosen)
    return chosen[first:] + chosen[:first]


def changed(commits: int) -> list[Part]:
    """The tests of what is not committed and of the last commits (0: of those that no remote has), the latest first, as one
    part; those of each package as another."""
    lately = [f"-{commits}"] if commits else ["HEAD", "--not", "--remotes"]
    paths = git("diff", "HEAD", "--name-only") + git("ls-files", "--others", "--exclude-standard")
    paths += git("log", *lately, "--format=", "--name-only")
    found = dict.fromkeys(tests for path in dict.fromkeys(paths.split()) for tests in tests_of(Path(path)))
    own = [tests for tests in found if tests.startswith("tests/")]
    packages = [tests for tests in found if not tests.startswith("tests/")]
    core = [Part("changed", (*SUITE, *own))] if own else []
    return core + [Part(f"changed {folder}", PACKAGE, folder=folder) for folder in packages]


BESIDE = {
    "attach": "interpret",
    "backends": "ops",
    "csrc": "ops",
    "dispatch": "ops",
    "kernels": "ops",
    "scores": "ops",
    "_ground": "ops",
}


def tests_of(path: Path) -> list[str]:
    """What tests a file: the package that it is in, itself, or the folders of tests/ that have a name of its folders; else the
    files that have its name, or that of benchmarks/, docs/, examples/. BESIDE are tests of what rests on it."""
    top, *_ = path.parts
    if top == "packages":
        return [f"packages/{path.parts[1]}"] if (ROOT / "packages" / path.parts[1] / "tests").is_dir() else []
    if top == "tests" and path.name.startswith("test_"):
        return [path.as_posix()] if (ROOT / path).exists() else []
    inner = [part for part in path.parts[:-1] if part not in ("vlattn_fast", "csrc", "tools", "backends", "tests", "helpers")]
    folders = ["/".join(("tests", *inner[:length])) for length in range(len(inner), 0, -1)]
    found = [folder for folder in folders if any((ROOT / folder).rglob("test_*.py"))][:1]
    found += [f"tests/{tests}" for part, tests in BESIDE.items() if part in path.parts]
    names = path.stem, "doc" if path.suffix == ".md" else top.rstrip("s")
    files = {file for name in names for file in (ROOT / "tests").rglob(f"test_{name}*.py")}
    return found or [file.relative_to(ROOT).as_posix() for file in sorted(files)]


def run(part: Part, workers: int, end: float) -> str:
    """ "passed", "failed", or why it did not run to its end."""
    if part.needs and shutil.which(part.needs) is None:
        return f"not run: {part.needs} is not installed"
    command = [sys.executable, *(str(workers) if word == "WORKERS" else word for word in part.command)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "VLATTN_UNTIL": str(end), **part.variables}
    start, before = time.time(), sum(os.times()[2:4])
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=ROOT / part.folder, env=environment, start_new_session=True, **streams)
    try:
        said, _ = process.communicate(timeout=None if end == float("inf") else end - start + LAST)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with what it builds
        process.communicate()
        return "not finished, as no time was left"
    lines, well = said.strip().splitlines(), process.returncode in (0, NO_TESTS)
    took = f"  {part.name}: {time.time() - start:.0f} s, {sum(os.times()[2:4]) - before:.0f} s of a processor"
    print(*(lines[-1:] if well else lines), took, sep="\n", flush=True)
    return "failed" if not well else "passed" if time.time() < end else "not finished, as no time was left"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="PART", help="parts whose names begin so; default: all")
    parser.add_argument("--list", action="store_true", help="name the parts, and run none")
    parser.add_argument(
        "--changed",
        type=int,
        nargs="?",
        const=0,
        metavar="COMMITS",
        help="instead the tests of what changed in the last commits, by default those that are not pushed, and after them",
    )
    parser.add_argument("--packages", action="store_true", help="instead some tests of each package")
    parser.add_argument("--turn", action="store_true", help="the parts of one turn, by the number of commits")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no test begins after these")
    parser.add_argument("--workers", type=int, default=2, help="processes that run side by side")
    options = parser.parse_args()
    every = packages() if options.packages else parts() if options.changed is None else changed(options.changed)
    chosen = [part for part in every if not options.names or part.name.startswith(tuple(options.names))]
    if not chosen and options.changed is not None:
        print("no test belongs to what changed")
        return 0
    if not chosen:
        parser.error(f"no part begins with {', '.join(options.names)}; --list names them")
    if options.turn:
        chosen = turn(chosen)
    before, today = passed(), tree()
    outcomes = {part.name: "passed before" for part in chosen if part.name in before}
    if options.list:
        print(*(f"{part.name}: {outcomes.get(part.name, 'open')}" for part in chosen), sep="\n")
        return 0
    end = time.time() + 60 * options.minutes
    waiting = [part for part in chosen if part.name not in outcomes]
    for number, part in enumerate(waiting):
        # a turn's first part may have all the time, and another is the first in the next round; what changed shares it
        share = (end - time.time()) / (1 if options.changed is None else len(waiting) - number)
        outcomes[part.name] = "not begun" if share < START else run(part, options.workers, time.time() + share)
        if outcomes[part.name] == "passed":
            before.add(part.name)
            PASSED.parent.mkdir(exist_ok=True)
            PASSED.write_text(json.dumps({"tree": today, "parts": sorted(before)}, indent=1) + "\n")
    for outcome in sorted({*outcomes.values()}):
        print(f"{outcome}: {', '.join(name for name, each in outcomes.items() if each == outcome)}")
    if options.turn:
        print(f"{len(every) - len(chosen)} parts of `make test-all` have their turn at other commits")
    return 1 if "failed" in outcomes.values() else 0


if __name__ == "__main__":
    sys.exit(main())
