"""`make gpu`: checks and timings that need a GPU, in five parts of at most ten minutes each, without downloading anything.

    python -m tools.gpu.run [PART ...] [--device cuda] [--out benchmarks/results] [--quick]        make gpu PARTS=verify

verify:     every Triton and CUDA kernel against the formula, by the tolerance rule: outputs and gradients. Each case once at the
            smallest size first, Triton's while nvcc compiles the others, then at the sizes of models.
ncu:        the time of each kernel, and stalls and pipes of the eight slowest by Nsight Compute, where it is installed.
tests:      tests that need a device, the tests of tests/ops/, tests/kernels/ and tests/cuda/, then the tools of
            compute-sanitizer, where it is installed, one after another.
benchmarks: all of `python -m vlattn_fast.benchmarks`, the dozen with the hottest launches first: calls and CUDA graphs, beside
            each of SDPA's kernels; the host's time.
sweep:      tiles, warps and stages of the hottest launches; the fastest right ones go to kernels/configurations.json.

A kernel is not timed in a dtype in which an error is beyond four times the rule's bound, or which is not verified at all. Each
item runs in a process of its own, for 90 s: one that hangs, crashes or runs out of memory costs its own row. --quick: 10 rounds,
without the compiled formula, lengths and compute-sanitizer.

A part writes each row to OUT/gpu-PART.json at once. A new call on the same sources continues a part that was cut, after --minutes
or otherwise; rows in benchmarks/results/ count as well. The CUDA C++ kernels are built first, where nvcc is installed; after a
failed build the rest runs without these kernels. Compiled kernels are kept in build/ from call to call.

make gpu needs torch >= 2.9, triton >= 3.6, numpy and pytest, and ends with status 1 where something failed or is left to do.
With --device cpu it is a rehearsal: the compiled kernels are emulated (ptx/), as on sm_90 or on the architecture that VLATTN_PTX
names. The cases are those of a device; benchmarks have the sizes of a quick run on a CPU, and times say nothing.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import re
import shutil
import sys
import sysconfig
import time
import xml.etree.ElementTree
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from ptx import building
from tools.gpu import ncu, session
from tools.gpu.gate import UNVERIFIED, Gate
from tools.gpu.session import LONG, ROOT, TREE, Item, Row, Session, hung

SLOWEST = 8
CPU_TRIES = 2  # configurations of a launch in a rehearsal
BYTES_AN_ITEM = 5000  # characters of test files in an item
NO_TESTS = 5  # pytest's status: a file may have fewer tests than items, or no test of a device
SIDE_BY_SIDE = 4  # operators under one tool of compute-sanitizer
# A process that loads torch calls CUDA late, and compute-sanitizer's default wait is 10 s. A failed query of torch to the driver
# is no error; errors of kernels count.
SANITIZE = ("--launch-timeout", "300", "--error-exitcode", "9")
TOOLS = {"memcheck": ("--report-api-errors", "no"), "racecheck": (), "initcheck": (), "synccheck": ()}

# tests that compile kernels, or that run on a CPU alone
LEFT_OUT = ("cuda/test_build", "_properties")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument(
        "--out", type=Path, help="folder that rows are added to; default: benchmarks/results/, in a rehearsal build/rehearsal/"
    )
    parser.add_argument(
        "--table", type=Path, help="table that the sweep writes; default: kernels/configurations.json, in a rehearsal in OUT"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="of each part; the next call does the rest")
    parser.add_argument("--seconds", type=float, default=session.OF_AN_ITEM, help="of an item; a rehearsal may need more")
    parser.add_argument("--select", default="", help="a regular expression: only items whose names contain a match")
    parser.add_argument("--quick", action="store_true", help="10 rounds, without compiled formula, lengths and compute-sanitizer")
    parser.add_argument("--again", action="store_true", help="run failed items again")
    parser.add_argument(
        "--workers", type=int, default=min(12, os.cpu_count() or 1), help="processes side by side in parts without timings"
    )
    options = parser.parse_args()
    if unknown := sorted(set(options.parts) - set(PARTS)):
        parser.error(f"PART must be one of {', '.join(PARTS)}; got {', '.join(unknown)}")
    options.out = options.out or (session.STORED if options.device == "cuda" else ROOT / "build" / "rehearsal")
    options.out.mkdir(parents=True, exist_ok=True)
    options.table = options.table or (ROOT / "kernels" if options.device == "cuda" else options.out) / "configurations.json"
    os.environ["PATH"] = with_tools(os.environ.get("PATH", ""))
    lay_out_tree()
    run, failed = Session(options), False
    write_table(run)
    run.built = ThreadPoolExecutor(1).submit(build, run)
    for part in options.parts or PARTS:
        start, before = time.monotonic(), set(run.known(part))
        run.begin()
        if part != "verify":
            run.built.result()
        done = PARTS[part](run)
        rows = run.known(part)
        wrong = [row for row in rows.values() if not row["passed"]]
        said = "passed" if done and not wrong else "FAILED" if wrong else "NOT FINISHED: call it again"
        new = len(rows.keys() - before)
        seconds = time.monotonic() - start
        print(f"{part}: {said}, {len(rows)} rows ({new} new), {len(wrong)} failed, in {seconds:.0f} s", flush=True)
        for row in wrong[:40]:
            print(f"  {row['item']}: {row.get('problem', '')[:300]}")
        failed |= not done or bool(wrong)
    run.close()
    sys.exit(1 if failed or not run.built.result() else 0)


def with_tools(path: str, profilers: str = "/opt/nvidia/nsight-compute") -> str:
    """PATH with the scripts beside this Python (cmake, ninja), the CUDA toolkit and the newest Nsight Compute added, which PATH
    may lack."""
    places = [Path(sysconfig.get_path("scripts")), Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda", "bin")]
    places += sorted(Path(profilers).glob("*"), reverse=True)
    return os.pathsep.join([path, *(str(place) for place in places if place.is_dir())])


def lay_out_tree() -> None:
    """Lays the package out like an installation, with kernels/ and benchmarks/ inside, since nothing may be installed here.
    Unchanged files and their bytecode are kept."""
    places = {
        "vlattn_fast": "vlattn_fast",
        "kernels": "vlattn_fast/kernels",
        "benchmarks": "vlattn_fast/benchmarks",
        "tests": "tests",
        "tools": "tools",
    }
    sources = {Path("pyproject.toml"): ROOT / "pyproject.toml"}
    for folder, place in places.items():
        for path in (ROOT / folder).rglob("*"):
            below = path.relative_to(ROOT / folder)
            linked = folder == "vlattn_fast" and below.parts[0] in ("kernels", "benchmarks")
            if path.is_file() and not linked and not {"__pycache__", "results"} & set(below.parts):
                sources[place / below] = path
    if TREE.exists():
        for path in [path for path in TREE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]:
            if path.relative_to(TREE) not in sources:
                path.unlink()
    for place, path in sources.items():
        target = TREE / place
        if not target.exists() or not filecmp.cmp(path, target):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)


def selected(run: Session, items: list[Item]) -> list[Item]:
    return [item for item in items if re.search(run.options.select, item["item"])]


def build(run: Session) -> bool:
    """Builds the library of the CUDA C++ kernels for this GPU alone, where its tools are installed; False after a failure."""
    library, start = run.library, time.monotonic()
    before = library.stat().st_mtime if library.exists() else None
    try:
        building.build(library.parent.name, run.option)
    except building.Missing as error:
        there = "; the library that is there is taken" if library.exists() else ""
        print(f"CUDA C++ is not built: {error}{there}", flush=True)
        return True
    except Exception as error:  # else the call would end
        library.unlink(missing_ok=True)  # an older library would pass for this commit's
        problem = str(error)[-2000:]
        run.store("verify", {"item": "build", "passed": False, "problem": problem})
        print(f"CUDA C++ is not built: {problem}", flush=True)
        return False
    if library.stat().st_mtime != before:
        facts = {"bytes": library.stat().st_size, "seconds": round(time.monotonic() - start, 1)}
        run.store("verify", {"item": "build", "passed": True, **facts})
    return True


# --- verify ---


def verify(run: Session) -> bool:
    from tools.gpu import production

    checks = [(check, backend) for check in production.checks() for backend in production.BACKENDS]
    items = selected(run, [{"item": f"{one.item}/{backend}", "sizes": one.sizes, "backend": backend} for one, backend in checks])
    triton = [item for item in items if item["backend"] == "triton"]
    first = [item for item in triton if item["sizes"] == checks[0][0].sizes]
    without = not run.library.exists()
    run.run("verify", first, run.worker, run.options.workers)
    built = run.built.result()
    if without and run.library.exists():
        run.close()  # the workers know no library
    return run.run("verify", items if built else triton, run.worker, run.options.workers) and built


# --- ncu ---


def profile(run: Session) -> bool:
    from tools.gpu import production

    gate, items, verified = Gate(run), [], True
    for item in selected(
        run, [{"item": f"{name} {backend}", "call": name, "backend": backend} for name, backend in production.calls()]
    ):
        operator, what, _ = item["call"].split("/")
        if doubt := gate.doubt([operator], what, item["backend"]):
            print(f"{item['item']}: {doubt}", flush=True)
            verified &= UNVERIFIED not in doubt
        else:
            items.append(item)
    # each call once: all cores compile before a kernel is timed by itself
    run.run("ncu", [{**item, "part": "compile"} for item in items], run.worker, run.options.workers, stored=False)
    done = run.run("ncu", items, run.worker) and verified
    known, times = run.known("ncu"), {}
    for item in items:
        for kernel, us in known.get(item["item"], {}).get("kernels", {}).items():
            task = {**item, "item": f"ncu {item['call'].split('/')[0]} {kernel} {item['backend']}", "kernel": kernel, "us": us}
            times[task["item"]] = max(times.get(task["item"], task), task, key=lambda one: one["us"])
    program = shutil.which("ncu")
    if program is None:
        run.store("ncu", {"item": "ncu", "passed": True, "not_run": "ncu is not installed"})
        print("ncu is not installed: times of kernels alone", flush=True)
        return done
    slowest = sorted(times.values(), key=lambda task: -task["us"])[:SLOWEST]
    return done and run.run("ncu", slowest, lambda: lambda item, seconds: _stalls(run, program, item, seconds))


def _stalls(run: Session, program: str, item: Item, seconds: float) -> Row:
    child = [sys.executable, "-m", "tools.gpu.launch", run.device, item["backend"], item["call"]]
    status, said = run.command(ncu.command(program, item["kernel"], 1, child), seconds)
    if status is None:
        return hung(seconds, said)
    facts = ncu.table(said)
    problem = "" if facts else f"ended with {status} and no table: {said[-1500:]}"
    return {**item, **facts, "passed": bool(facts), "problem": problem}


# --- tests ---


def tests(run: Session) -> bool:
    from tools.gpu.production import BACKENDS
    from vlattn_fast.ops import OPERATORS

    files = [
        f"tests/{folder}/{path.name}" for folder in _folders(run) for path in sorted((TREE / "tests" / folder).glob("test_*.py"))
    ]
    files = [file for file in files if not file.removeprefix("tests/").removesuffix(".py").endswith(LEFT_OUT)]
    files = ["tests/gpu/device_only.py", *files] if run.device == "cuda" else files
    files = [file for file in files if re.search(run.options.select, file)]
    done = run.run("tests", _shards(files), lambda: lambda item, seconds: _pytest(run, item, seconds), run.options.workers)
    if run.options.quick:
        return done
    program = shutil.which("compute-sanitizer")
    if program is None:
        run.store("tests", {"item": "sanitizer", "passed": True, "not_run": "compute-sanitizer is not installed"})
        print("compute-sanitizer is not installed", flush=True)
        return done
    kernels = [(backend, operator) for backend in BACKENDS for operator in OPERATORS if backend != "cuda" or run.library.exists()]
    kernels = [(backend, operator) for backend, operator in kernels if find_spec(OPERATORS[operator].backends[backend].module)]
    for tool, more in TOOLS.items():
        items = [
            {
                "item": f"{tool} {backend} {operator}",
                "words": [program, "--tool", tool, *SANITIZE, *more],
                "child": [backend, operator],
                "limit": LONG,
            }
            for backend, operator in kernels
        ]
        done &= run.run("tests", selected(run, items), lambda: lambda item, seconds: _sanitized(run, item, seconds), SIDE_BY_SIDE)
    return done


def _folders(run: Session) -> list[str]:
    return ["ops", "kernels", *(["cuda"] if run.library.exists() else [])]


def _shards(files: list[str]) -> list[Item]:
    """Items of about BYTES_AN_ITEM of each file, among which the tests of the file are dealt out."""
    shards = {file: -(-(TREE / file).stat().st_size // BYTES_AN_ITEM) for file in files}
    return [
        {"item": f"{file} {i + 1} of {n}", "file": file, "shard": f"{i}/{n}", "limit": LONG}
        for file, n in shards.items()
        for i in range(n)
    ]


PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "minversion=1", "-o", "filterwarnings=default"]


def _pytest(run: Session, item: Item, seconds: float) -> Row:
    report = TREE / f"{re.sub(r'[^a-z0-9]+', '-', item['item'])}.xml"
    status, said = run.command([*PYTEST, f"--junitxml={report}", item["file"]], seconds, VLATTN_SHARD=item["shard"])
    if status is None:
        return hung(seconds, said)
    if not report.exists():
        return {"passed": False, "problem": f"ended with {status}: {said[-1500:]}"}
    ran, failures = 0, []
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        ran += 1
        problem = next((child for child in case if child.tag in ("failure", "error")), None)
        if problem is not None:
            failures.append(f"{case.get('classname')}::{case.get('name')}: {(problem.get('message') or '')[:300]}")
    nothing = not ran and status != NO_TESTS
    problem = f"no test ran: {said[-500:]}" if nothing else "; ".join(failures)
    return {"passed": not problem, "tests": ran, "failures": failures, "problem": problem[:1500]}


def _sanitized(run: Session, item: Item, seconds: float) -> Row:
    backend, operator = item["child"]
    child = [sys.executable, "-m", "tools.gpu.launch", run.device, backend, operator]
    # memcheck sees an access beyond a tensor only where each tensor has its allocation
    status, said = run.command([*item["words"], *child], seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if status is None:
        return hung(seconds, said)
    return {"passed": status == 0, "problem": "" if status == 0 else f"ended with {status}: {said[-1500:]}"}


# --- benchmarks ---


def benchmarks(run: Session) -> bool:
    from tools.gpu.production import BACKENDS, NAMED
    from vlattn_fast.benchmarks._choice import choose
    from vlattn_fast.benchmarks._formula import OURS
    from vlattn_fast.ops import OPERATORS

    gate, items, verified, quick = Gate(run), [], True, run.options.quick
    dtypes = {benchmark.name: str(benchmark.cuda_dtype).removeprefix("torch.") for benchmark in choose([], "cuda")}
    ordered = sorted(dtypes, key=lambda name: (name not in NAMED, name.split("/")[0] not in OPERATORS))
    ordered = [*ordered[: len(NAMED)], "host", *ordered[len(NAMED) :]]
    for item in selected(run, [{"item": name} for name in ordered if not (quick and name.startswith("scaling/"))]):
        module, _, what = item["item"].partition("/")
        if module == "scaling":
            module, _, what = what.partition(", ")
        concerned = [module] if module in OPERATORS else list(OPERATORS)
        doubts = {}
        if module != "host":
            doubts = {name: gate.doubt(concerned, what, name, dtypes[item["item"]]) for name in BACKENDS}
        if any(UNVERIFIED in doubt for doubt in doubts.values()):
            print(f"{item['item']}: {doubts['triton']}", flush=True)
            verified = False
            continue
        item |= {"left_out": {name: doubt for name, doubt in doubts.items() if doubt}, "quick": quick}
        item |= {} if quick else {"limit": LONG}
        if module.startswith("task_") and doubts["triton"]:  # a task chooses the backend call by call
            item["left_out"] = dict.fromkeys(OURS, doubts["triton"])
        items.append(item)
    return run.run("benchmarks", items, run.worker) and verified


# --- sweep ---


def sweep(run: Session) -> bool:
    from tools.gpu import production
    from tools.gpu.sweep import candidates, label, winner

    gate, worker, compiler, done = Gate(run), run.worker(), run.worker(), True

    def attempt(item: Item, seconds: float) -> Row:
        config = item["config"]
        return {"launch": item["launch"], "config": config, "is_default": config is None, **worker(item, seconds)}

    for number, hot in enumerate(production.HOTTEST):
        if not re.search(run.options.select, hot.name):
            continue
        if doubt := gate.doubt([hot.operator], hot.check[0], "triton"):
            print(f"{hot.name}: {doubt}", flush=True)
            done &= UNVERIFIED not in doubt
            continue
        if not run.run("sweep", [tile(hot.name, number, None)], lambda: attempt):
            return False
        while True:
            rows = [row for row in run.known("sweep").values() if row.get("launch") == hot.name and "config" in row]
            default = next((row["config"] for row in rows if row["is_default"]), None)
            if default is None:
                break  # the default configuration failed
            ahead = candidates(default, hot.most, rows, hot.stages)
            if not ahead or (run.device == "cpu" and len(rows) >= CPU_TRIES):
                break
            ahead = ahead[: CPU_TRIES - len(rows)] if run.device == "cpu" else ahead
            if (processes := run.options.workers) > 1:
                facts = {"hot": number, "batch": ahead, "architecture": int(run.architecture), "processes": processes}
                facts["limit"] = 2 * run.options.seconds  # each is compiled for two calls
                run.run("sweep", [{"item": f"{hot.name}: ahead", "part": "ahead", **facts}], lambda: compiler, stored=False)
            if not run.run("sweep", [tile(hot.name, number, config) for config in ahead], lambda: attempt):
                return False
        if default is not None:
            timed = {label(row["config"]): row.get("us") for row in rows}
            best = winner(default, rows)
            key = next(row["key"] for row in rows if row["is_default"])
            won = {"launch": hot.name, "key": key, "winner": best, "us": timed[label(best)], "us_before": timed[label(default)]}
            if run.known("sweep").get(f"{hot.name}: winner", {}).get("winner") != best:
                run.store("sweep", {"item": f"{hot.name}: winner", "passed": True, "changed": best != default, **won})
            print(f"{hot.name}: {label(best)}, {won['us']} us, before {won['us_before']} us", flush=True)
            write_table(run)
    run.close()  # the worker holds memory of the device, and a table without the winners
    return done


def tile(name: str, number: int, config: dict[str, int] | None) -> Item:
    from tools.gpu.sweep import label

    return {"item": f"{name}: {label(config)}", "launch": name, "hot": number, "config": config}


def write_table(run: Session) -> None:
    """Writes the winners of the stored rows into the table, here and in the tree, which later parts read."""
    winners = {row["key"]: row["winner"] for row in run.known("sweep").values() if row.get("changed")}
    if not winners:
        return
    table = json.loads(run.options.table.read_text()) if run.options.table.exists() else {}
    architecture = f"sm_{run.architecture}"
    table[architecture] = dict(sorted({**table.get(architecture, {}), **winners}.items()))
    parts = []
    for name, one in table.items():
        lines = (f"{json.dumps(key)}: {json.dumps(config)}" for key, config in one.items())
        parts.append(f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}")
    text = "{\n" + ",\n".join(parts) + "\n}\n"
    (TREE / "vlattn_fast" / "kernels" / "configurations.json").write_text(text)
    run.options.table.write_text(text)
    if run.options.out.resolve() != session.STORED:  # the table goes along with the rows
        (run.options.out / "configurations.json").write_text(text)


PARTS: dict[str, Callable[[Session], bool]] = {
    "verify": verify,
    "ncu": profile,
    "tests": tests,
    "benchmarks": benchmarks,
    "sweep": sweep,
}


if __name__ == "__main__":
    main()
