"""The part `tests` of `make gpu`: pytest on the files that need a device, and compute-sanitizer on calls of each operator."""

from __future__ import annotations

import re
import shutil
import sys
import xml.etree.ElementTree
from collections.abc import Sequence
from functools import partial

from tools.gpu.session import LAST, TREE, Item, Row, Session, hung

BYTES_AN_ITEM = 5000  # characters of test files in an item
DEVICE_ONLY, DEVICE_ONLY_SHARDS, STREAMS = "tests/gpu/device_only.py", 12, "tests/gpu/device_streams.py"
NO_TESTS = 5  # pytest's status: a file may have fewer tests than items, or no test of a device
# backend, operator, sizes, names of cases
FIRST_SANITIZED = [("triton", "paged_attention_statistics", "uniter"), ("triton", "score_attention", "uniter", "groups")]
SIDE_BY_SIDE = 4  # operators under one tool of compute-sanitizer
# A process that loads torch calls CUDA late, and compute-sanitizer's default wait is 10 s. A failed query of torch to the driver
# is no error; errors of kernels count.
SANITIZE = ("--launch-timeout", "300", "--error-exitcode", "9")
TOOLS = {"memcheck": ("--report-api-errors", "no"), "racecheck": (), "initcheck": (), "synccheck": ()}

# tests that compile kernels
LEFT_OUT = "cuda/test_build"


def streams(run: Session) -> bool:
    return pytests(run, [_shard(STREAMS, 0, 1)])


def device_only(run: Session) -> bool:
    return pytests(run, [_shard(DEVICE_ONLY, i, DEVICE_ONLY_SHARDS) for i in range(DEVICE_ONLY_SHARDS)])


def memcheck(run: Session) -> bool:
    """What reads addresses from a table, and what no device has run, at the size whose kernels `verify` has compiled."""
    return sanitize(run, ["memcheck"], FIRST_SANITIZED)


def everything(run: Session) -> bool:
    from tools.gpu.production import BACKENDS
    from vlattn_fast.ops import OPERATORS

    run.with_library()
    done = streams(run) and device_only(run)
    folders = ["ops", "kernels", *(["cuda"] if run.library.exists() else [])]
    files = [f"tests/{folder}/{path.name}" for folder in folders for path in sorted((TREE / "tests" / folder).glob("test_*.py"))]
    files = [file for file in files if not file.removeprefix("tests/").removesuffix(".py").endswith(LEFT_OUT)]
    counts = {file: -(-(TREE / file).stat().st_size // BYTES_AN_ITEM) for file in files}
    done &= pytests(run, [_shard(file, i, n) for file, n in counts.items() for i in range(n)])
    kernels = [(backend, operator) for backend in BACKENDS for operator, one in OPERATORS.items() if backend in one.backends]
    kernels = [(backend, operator) for backend, operator in kernels if backend != "cuda" or run.library.exists()]
    return memcheck(run) and sanitize(run, list(TOOLS), kernels) and done


def pytests(run: Session, items: list[Item]) -> bool:
    execute = partial(_pytest, run)
    return run.run("tests", run.selected(items), lambda: execute, run.options.workers)


def _shard(file: str, i: int, count: int) -> Item:
    """One of `count` items among which the tests of a file are dealt out."""
    return {"item": f"{file} {i + 1} of {count}", "file": file, "shard": f"{i}/{count}", "limit": LAST}


def sanitize(run: Session, tools: list[str], kernels: Sequence[tuple[str, ...]]) -> bool:
    program = shutil.which("compute-sanitizer")
    if program is None:
        run.lacks("tests", "compute-sanitizer")
        return True
    execute, done = partial(_sanitized, run), True
    for tool in tools:
        words = [program, "--tool", tool, *SANITIZE, *TOOLS[tool]]
        items = [{"item": f"{tool} {' '.join(one)}", "words": words, "child": [*one], "limit": LAST} for one in kernels]
        done &= run.run("tests", run.selected(items), lambda: execute, SIDE_BY_SIDE)
    return done


PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "minversion=1", "-o", "filterwarnings=default"]


def _pytest(run: Session, item: Item, seconds: float) -> Row:
    report = TREE / f"{re.sub(r'[^a-z0-9]+', '-', item['item'])}.xml"
    report.unlink(missing_ok=True)
    # a rehearsal has no device, but the file's imports
    collects = ["--collect-only"] if run.device == "cpu" and item["file"] in (DEVICE_ONLY, STREAMS) else []
    words = [*PYTEST, *collects, f"--junitxml={report}", item["file"]]
    status, said = run.command(words, seconds, VLATTN_SHARD=item["shard"])
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
    nothing = not ran and not collects and status != NO_TESTS
    problem = f"no test ran: {said[-500:]}" if nothing else "; ".join(failures)
    passed = False if problem else True if ran else None  # a shard may be empty, and a rehearsal collects without a device
    return {"passed": passed, "tests": ran, "failures": failures, "problem": problem[:1500]}


def _sanitized(run: Session, item: Item, seconds: float) -> Row:
    child = [sys.executable, "-m", "tools.gpu.launch", run.device, *item["child"]]
    # memcheck sees an access beyond a tensor only where each tensor has its allocation
    status, said = run.command([*item["words"], *child], seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if status is None:
        return hung(seconds, said)
    return {"passed": status == 0, "problem": "" if status == 0 else f"ended with {status}: {said[-1500:]}"}
