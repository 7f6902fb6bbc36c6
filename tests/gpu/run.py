"""`make gpu`: what only a machine with a GPU can say, in at most eight minutes and without downloading anything.

    python tests/gpu/run.py [PART ...] [--device cuda] [--out benchmarks/results]

build:       the CUDA C++ kernels by CMake into build/cuda, where nvcc is installed; the parts below take what lies there.
correctness: the tests of tests/ops/ that take a backend, and those of tests/kernels/ and tests/cuda/, with the kernels compiled
             and run on the device, and those that need one (tests/gpu/device_only.py), in as many processes as there are
             cores.
sanitizer:   compute-sanitizer over every operator's cases of `vlattn verify`, where it is installed: memcheck and racecheck,
             and for CUDA C++ initcheck and synccheck.
benchmarks:  `python -m vlattn_fast.benchmarks --quick`.

It needs torch >= 2.11, triton >= 3.6, numpy and pytest. What was found is added to OUT/checks.json, a row per part with commit,
versions and device; benchmarks add their own rows beside it. Ends with status 1 where a part failed or ran out of time. With
--device cpu all of it runs in Triton's interpreter: a rehearsal.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / "build" / "gpu"
SECONDS = {"build": 90, "correctness": 160, "sanitizer": 70, "benchmarks": 150}  # together with starting, eight minutes
TOOLS = {"triton": ("memcheck", "racecheck"), "cuda": ("memcheck", "racecheck", "initcheck", "synccheck")}

# what compiles kernels, or runs them on a CPU alone
LEFT_OUT = ("cuda/test_build", "cuda/test_emulation", "cuda/test_sanitized", "cuda/test_broken")

Found = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="where rows are added")
    parser.add_argument("--select", default="", help="correctness: pytest's -k")
    parser.add_argument("--shards", type=int, default=os.cpu_count() or 1, help="correctness: processes side by side")
    parser.add_argument("--operators", nargs="*", default=[], help="sanitizer and benchmarks: only these")
    options = parser.parse_args()
    if unknown := sorted(set(options.parts) - set(PARTS)):
        parser.error(f"PART must be one of {', '.join(PARTS)}; got {', '.join(unknown)}")
    options.out.mkdir(parents=True, exist_ok=True)
    lay_out_tree()
    measure, failed = measuring(), False
    for part in options.parts or PARTS:
        start = time.monotonic()
        found = PARTS[part](options)
        found["seconds"] = round(time.monotonic() - start, 1)
        measure.append([{"part": part, **found, **facts(measure, options.device)}], options.out / "checks.json")
        failed |= not found["passed"]
        print(f"{part}: {'passed' if found['passed'] else 'FAILED'} in {found['seconds']} s: {found['summary']}", flush=True)
        for line in found.get("failures", [])[:40]:
            print(f"  {line}")
    sys.exit(1 if failed else 0)


def lay_out_tree() -> None:
    """The package as an installation has it, with kernels/ and benchmarks/ inside, since nothing may be installed here."""
    shutil.rmtree(TREE, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__", "results")
    shutil.copytree(ROOT / "vlattn_fast", TREE / "vlattn_fast", ignore=ignore)
    for inside in ("kernels", "benchmarks"):
        shutil.copytree(ROOT / inside, TREE / "vlattn_fast" / inside, ignore=ignore)
    shutil.copytree(ROOT / "tests", TREE / "tests", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", TREE)


def environment(device: str, **more: str) -> dict[str, str]:
    interpret = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    library = cuda_library(device)
    return {
        **os.environ,
        "PYTHONPATH": str(TREE),
        "VLATTN_TEST_DEVICE": device,
        **({"VLATTN_CUDA_LIBRARY": str(library)} if library.exists() else {}),
        "OMP_NUM_THREADS": "1",
        **interpret,
        **more,
    }


def cuda_library(device: str) -> Path:
    return ROOT / "build" / ("host/libvlattn_host.so" if device == "cpu" else "cuda/libvlattn_cuda.so")


def run(commands: list[list[str]], environments: list[dict[str, str]], seconds: float) -> list[tuple[int | None, str]]:
    """All at once: the exit status of each (None: out of time) and what it printed."""
    end = time.monotonic() + seconds
    started = [
        subprocess.Popen(command, cwd=TREE, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command, env in zip(commands, environments, strict=True)
    ]
    done: list[tuple[int | None, str]] = []
    for process in started:
        try:
            said, _ = process.communicate(timeout=max(0.1, end - time.monotonic()))
            done.append((process.returncode, said))
        except subprocess.TimeoutExpired:
            process.kill()
            done.append((None, process.communicate()[0]))
    return done


def build(options: argparse.Namespace) -> Found:
    library = cuda_library(options.device)
    if missing := [tool for tool in ("nvcc", "cmake", "ninja") if shutil.which(tool) is None]:
        there = "; the library that is there is taken" if library.exists() else ""
        return {"passed": True, "summary": f"not run: {', '.join(missing)} not installed{there}"}
    folder = str(library.parent)
    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", folder]
    if options.device == "cpu":
        configure.append("-DVLATTN_HOST=ON")
    for command in (configure, ["cmake", "--build", folder]):
        ((status, said),) = run([command], [dict(os.environ)], SECONDS["build"])
        if status != 0:
            library.unlink(missing_ok=True)  # an older one would be taken for this commit's
            return {"passed": False, "summary": f"{' '.join(command[:2])} ended with {status}", "failures": [said[-2000:]]}
    return {"passed": True, "summary": f"{library.name}, {library.stat().st_size / 2**20:.1f} MiB"}


def correctness(options: argparse.Namespace) -> Found:
    shards = options.shards
    reports = [TREE / f"report{i}.xml" for i in range(shards)]
    folders = ["tests/ops", "tests/kernels", *(["tests/cuda"] if cuda_library(options.device).exists() else [])]
    device_only = ["tests/gpu/device_only.py"] if options.device == "cuda" else []
    commands = [
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-o",
            "minversion=1",
            "-o",
            "filterwarnings=default",
            f"--junitxml={report}",
            "-k",
            options.select,
            *(f"--ignore=tests/{name}.py" for name in LEFT_OUT),
            *folders,
            *device_only,
        ]
        for report in reports
    ]
    environments = [environment(options.device, VLATTN_SHARD=f"{i}/{shards}") for i in range(shards)]
    done = run(commands, environments, SECONDS["correctness"])
    ran, failures = 0, []
    for i, ((status, said), report) in enumerate(zip(done, reports, strict=True)):
        if status is None or not report.exists():
            failures.append(f"shard {i} {'ran out of time' if status is None else f'ended with {status}'}: {said[-2000:]}")
            continue
        for case in xml.etree.ElementTree.parse(report).iter("testcase"):
            ran += 1
            problem = next((child for child in case if child.tag in ("failure", "error")), None)
            if problem is not None:
                failures.append(f"{case.get('classname')}::{case.get('name')}: {(problem.get('message') or '')[:300]}")
    return {"passed": ran > 0 and not failures, "summary": f"{ran} tests, {len(failures)} failed", "failures": failures}


def sanitizer(options: argparse.Namespace) -> Found:
    program = shutil.which("compute-sanitizer")
    if program is None:
        return {"passed": True, "summary": "not run: compute-sanitizer is not installed"}
    names = options.operators or operators()
    child = [sys.executable, str(TREE / "tests" / "gpu" / "launch.py"), options.device]
    written = {"triton": "kernels", "cuda": "cuda"} if cuda_library(options.device).exists() else {"triton": "kernels"}
    tasks = [
        (tool, backend, name)
        for backend, folder in written.items()
        for name in names
        if name in operators(folder)
        for tool in TOOLS[backend]
    ]
    commands = [[program, "--tool", tool, "--error-exitcode", "9", *child, backend, name] for tool, backend, name in tasks]
    # memcheck sees an access beyond a tensor only where tensors do not share one allocation
    environments = [environment(options.device, PYTORCH_NO_CUDA_MEMORY_CACHING="1")] * len(tasks)
    done = run(commands, environments, SECONDS["sanitizer"])
    failures = [
        f"{tool} {backend} {name} {'ran out of time' if status is None else f'ended with {status}'}: {said[-1500:]}"
        for (tool, backend, name), (status, said) in zip(tasks, done, strict=True)
        if status != 0
    ]
    return {"passed": not failures, "summary": f"{len(tasks)} runs, {len(failures)} failed", "failures": failures}


def benchmarks(options: argparse.Namespace) -> Found:
    command = [
        sys.executable,
        "-m",
        "vlattn_fast.benchmarks",
        *options.operators,
        "--device",
        options.device,
        "--quick",
        "--out",
        str(options.out.resolve()),
    ]
    interpreted = {"TRITON_INTERPRET": "0"}  # nobody times the interpreter
    ((status, said),) = run([command], [environment(options.device, **interpreted)], SECONDS["benchmarks"])
    print(said, flush=True)
    outcome = "ran out of time" if status is None else f"ended with {status}"
    return {"passed": status == 0, "summary": outcome, "failures": [] if status == 0 else [said[-2000:]]}


PARTS: dict[str, Callable[[argparse.Namespace], Found]] = {
    "build": build,
    "correctness": correctness,
    "sanitizer": sanitizer,
    "benchmarks": benchmarks,
}


def operators(folder: str = "kernels") -> list[str]:
    return sorted(file.stem for file in (TREE / "vlattn_fast" / folder).glob("[a-z]*.py"))


def measuring() -> Any:
    """The module of benchmarks that knows where a row comes from and how it is stored; it lies in the tree."""
    sys.path.insert(0, str(TREE))
    return importlib.import_module("vlattn_fast.benchmarks._rows")


def facts(measure: Any, device: str) -> Found:
    """Where and with what this was found."""
    import torch

    name = measure.device_name(torch.device(device)) + (", Triton's interpreter" if device == "cpu" else "")
    origin = measure.provenance(" ".join(["python", "tests/gpu/run.py", *sys.argv[1:]]))
    return {"device": name, **origin.pop("versions"), **origin}


if __name__ == "__main__":
    main()
