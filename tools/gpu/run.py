"""`make gpu`: checks and timings that need a GPU, the most telling first, without downloading anything.

    python -m tools.gpu.run [PART ...] [--device cuda] [--out benchmarks/results] [--minutes 9]        make gpu PARTS=verify

launcher:   ten launches of kernels that were compiled ahead, by the launcher of packages/vlattn-native (archives.py).
verify:     every Triton and CUDA kernel against the formula, by the tolerance rule: outputs and gradients. First a call of each
            kernel, those before that no stored row of a device has, then calls of the sizes of models, then each case at several
            sizes. Operators without a kernel run on `streaming`.
cudnn:      by length, our attention and tiles of its forward pass beside cuDNN's, and relevancy on Triton and in CUDA C++; from
            how many tokens on cuDNN is faster goes to kernels/configurations.json.
benchmarks: first ours beside SDPA and FlexAttention, then all of `python -m vlattn_fast.benchmarks`: calls and CUDA graphs, and
            the host's time. A variant of this package that breaks the rule has no time, and fails.
tiles:      tiles, warps and stages of the hottest launches by themselves (tiles.py); the fastest right ones go to
            kernels/configurations.json.
tests:      tests that need a device, the tests of tests/ops/, tests/kernels/ and tests/cuda/, and the tools of
            compute-sanitizer, where it is installed.
ncu:        the time of each kernel, and stalls and pipes of the eight slowest by Nsight Compute, where it is installed.

A call goes through ORDER, step by step, for --minutes. The first steps take items of each part, each step for its share of the
call; the last ones take all the other items. Each check runs in a process of its own: one that hangs, crashes or runs out of
memory costs its own row. Timed launches share a process, and so do benchmarks. An item that takes more than 30 s in the first
steps comes again in the last ones, for 90 s.

Each row goes to OUT/gpu.json at once, on a device to benchmarks/results/ as well, with the tiles of its launches. A row
"nvidia-smi" of each step has the clock, the power and what throttles, seen while the step ran. A row's `passed` is
null where nothing was compared, timed or run, as where a backend refuses the call. A new call on the same sources continues where
the last one stopped. The CUDA C++ kernels are built first, where nvcc is installed; after a failed build the rest runs without
these kernels. Compiled kernels are kept in build/ from call to call. OUT/kernels.tar.xz holds them for another machine, which
takes them from build/kernels.tar.xz.

make gpu needs torch >= 2.9, triton >= 3.6, numpy and pytest, and ends with status 1 where something failed or is left to do.
With --device cpu it is a rehearsal: the compiled kernels are emulated (ptx), as on sm_90 or on the architecture that VLATTN_PTX
names. The cases are those of a device, those of models with fewer samples, heads and tokens; benchmarks have the sizes of a
quick run on a CPU, and times say nothing.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import math
import os
import shutil
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tools import building
from tools.gpu import ncu, session, suite
from tools.gpu.session import LAST, ROOT, TREE, Item, Row, Session, Worker, failed, hung

SLOWEST = 8
BESIDE = ", beside SDPA"  # ends the name of a benchmark with few variants
MINUTES = 9.5  # of a call; a lent machine runs a command for ten
WATCHED = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "watts": "power.draw",
    "celsius": "temperature.gpu",
    "throttled_by": "clocks_event_reasons.active",  # a mask of bits
}
REHEARSED = 600.0  # seconds of an item in a rehearsal
CPU_TRIES = 2  # candidates of a launch in a rehearsal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument(
        "--out", type=Path, help="folder that rows are added to; default: benchmarks/results/, in a rehearsal build/rehearsal/"
    )
    parser.add_argument(
        "--table", type=Path, help="table of the fastest tiles; default: kernels/configurations.json, in a rehearsal in OUT"
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of the call; the next call does the rest; inf = no limit")
    parser.add_argument("--seconds", type=float, help="of an item; a rehearsal may need more; inf = no limit")
    parser.add_argument("--select", default="", help="a regular expression: only items whose names contain a match")
    parser.add_argument("--again", action="store_true", help="run failed items again")
    parser.add_argument(
        "--workers", type=int, default=min(12, os.cpu_count() or 1), help="processes side by side in parts without timings"
    )
    options = parser.parse_args()
    if unknown := sorted(set(options.parts) - set(PARTS)):
        parser.error(f"PART must be one of {', '.join(PARTS)}; got {', '.join(unknown)}")
    options.seconds = options.seconds or (REHEARSED if options.device == "cpu" else None)
    options.out = options.out or (session.STORED if options.device == "cuda" else ROOT / "build" / "rehearsal")
    options.out.mkdir(parents=True, exist_ok=True)
    options.table = options.table or (ROOT / "kernels" if options.device == "cuda" else options.out) / "configurations.json"
    os.environ["PATH"] = with_tools(os.environ.get("PATH", ""))
    lay_out_tree()
    run, all_passed = Session(options), True
    run.unpack_kernels()
    write_table(run)
    run.built = ThreadPoolExecutor(1).submit(build, run)
    try:
        for step in ORDER:
            if not options.parts or step.part in options.parts:
                all_passed &= taken(run, step)
    finally:
        run.close()
        run.pack_kernels()
    sys.exit(0 if all_passed and run.built.result() else 1)


def taken(run: Session, step: Step) -> bool:
    """Whether nothing failed in a step and, in one of the last steps, nothing is left to do."""
    start, before = time.monotonic(), set(run.known(step.part))
    run.begin(step.seconds * run.options.minutes / MINUTES)
    with watched(run, step):
        done = step.run(run)
    rows = run.known(step.part)
    wrong = [row for row in rows.values() if failed(row)]
    without = sum(row["passed"] is None for row in rows.values())
    is_last = math.isinf(step.seconds)
    said = "FAILED" if wrong else "passed" if done else "NOT FINISHED: call it again" if is_last else "the rest comes later"
    new, seconds = len(rows.keys() - before), time.monotonic() - start
    counts = f"{len(rows)} rows ({new} new), {len(wrong)} failed, {without} without a result"
    print(f"{step.part}, {step.what}: {said}, {counts}, in {seconds:.0f} s", flush=True)
    for row in wrong[:40]:
        if row["item"] not in before or is_last:
            print(f"  {row['item']}: {row.get('problem', '')[:300]}")
    return not wrong and (done or not is_last)


@contextmanager
def watched(run: Session, step: Step) -> Iterator[None]:
    """Asks nvidia-smi once how the device is, when a third of the step's time is over or, before that, at its end."""
    end, program = threading.Event(), shutil.which("nvidia-smi")

    def ask() -> None:
        assert program is not None
        end.wait(min(step.seconds, 90.0) / 3)
        words = [program, f"--query-gpu={','.join(WATCHED.values())}", "--format=csv,noheader,nounits"]
        status, said = run.command(words, 10.0)
        seen = [text.strip() for text in said.partition("\n")[0].split(",")]
        row: Row = {"item": f"nvidia-smi, {step.what}", "passed": None}
        if status != 0 or len(seen) != len(WATCHED):
            row |= {"not_run": said[-300:]}
        run.store(step.part, row | dict(zip(WATCHED, seen, strict=False)))

    thread = threading.Thread(target=ask, daemon=True)
    if program is not None:
        thread.start()
    try:
        yield
    finally:
        end.set()
        if program is not None:
            thread.join()


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
        "packages/vlattn-native": "packages/vlattn-native",
    }
    sources = {Path("pyproject.toml"): ROOT / "pyproject.toml"}
    for folder, place in places.items():
        for path in (ROOT / folder).rglob("*"):
            below = path.relative_to(ROOT / folder)
            linked = folder == "vlattn_fast" and below.parts[0] in ("kernels", "benchmarks")
            if path.is_file() and not linked and not {"__pycache__", "results", "build"} & set(below.parts):
                sources[place / below] = path
    if TREE.exists():
        kept = {"__pycache__", "build"}
        for path in [path for path in TREE.rglob("*") if path.is_file() and not kept & set(path.relative_to(TREE).parts)]:
            if path.relative_to(TREE) not in sources:
                path.unlink()
    for place, path in sources.items():
        target = TREE / place
        if not target.exists() or not filecmp.cmp(path, target):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)


def build(run: Session) -> bool:
    """Builds the library of the CUDA C++ kernels for this GPU alone, where its tools are installed; False after a failure."""
    library, start = run.library, time.monotonic()
    before = library.stat().st_mtime if library.exists() else None
    made_of = library.with_name("sources")
    if before and made_of.exists() and made_of.read_text() == run.sources + run.option:
        return True
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
    made_of.write_text(run.sources + run.option)
    if library.stat().st_mtime != before:
        facts = {"bytes": library.stat().st_size, "seconds": round(time.monotonic() - start, 1)}
        run.store("verify", {"item": "build", "passed": True, **facts})
    return True


# --- the launcher ---


def launcher(run: Session) -> bool:
    """Its archive is compiled before; in a rehearsal by a process whose kernels are not emulated by themselves."""
    facts = {"folder": str(run.compiled / "archives"), "architecture": int(run.architecture)}
    items = run.selected([{"item": "launcher", **facts}])
    path = os.pathsep.join(map(str, (TREE, TREE / "packages" / "vlattn-native")))
    worker = Worker(run, VLATTN_PTX="", PYTHONPATH=path)
    ahead = [{**item, "part": "launcher compiled", "limit": LAST} for item in items]
    done = run.run("launcher", ahead, lambda: worker, stored=False) and run.run("launcher", items, lambda: worker)
    worker.close()
    return done


# --- verify ---


def verify(run: Session, first: bool = False) -> bool:
    """`first`: a call of each kernel."""
    from tools.gpu import production

    chosen = production.of_each_kernel(session.of_devices("verify")) if first else production.checks()
    checks = [(check, backend) for check in chosen for backend in production.backends_of(check.operator)]
    items = [
        {"item": f"{one.item}/{backend}", "sizes": one.sizes, "backend": backend, **({"limit": LAST} if one.is_full else {})}
        for one, backend in checks
    ]
    items = run.selected(items)
    if first:  # nvcc compiles the CUDA C++ kernels meanwhile
        items.sort(key=lambda item: item["backend"] == "cuda")
        run.run("verify", [item for item in items if item["backend"] != "cuda"], run.worker, run.options.workers)
    built = run.with_library()
    items = [item for item in items if built or item["backend"] != "cuda"]
    done = run.run("verify", items, run.worker, run.options.workers)
    return done and built


# --- ncu ---


def profile(run: Session) -> bool:
    """Times of all kernels, and what Nsight Compute says of the slowest."""
    from tools.gpu import production

    run.with_library()
    items = [{"item": f"{name} {backend}", "call": name, "backend": backend} for name, backend in production.calls()]
    items = run.selected(items)
    prepare(run, "ncu", items)
    done = run.run("ncu", items, run.worker)
    known, times = run.known("ncu"), {}
    for item in items:
        for kernel, us in known.get(item["item"], {}).get("kernels", {}).items():
            task = {**item, "item": f"ncu {item['call'].split('/')[0]} {kernel} {item['backend']}", "kernel": kernel, "us": us}
            times[task["item"]] = max(times.get(task["item"], task), task, key=lambda one: one["us"])
    program = shutil.which("ncu")
    if program is None:
        run.lacks("ncu", "ncu")  # times of kernels alone
        return done
    slowest = sorted(times.values(), key=lambda task: -task["us"])[:SLOWEST]
    return done and run.run("ncu", slowest, lambda: lambda item, seconds: _stalls(run, program, item, seconds))


def prepare(run: Session, part: str, items: list[Item]) -> None:
    """Each item once: all cores compile before one of them is timed by itself."""
    items = [{**item, "part": f"{part} compiled", "limit": LAST} for item in items]
    run.run(part, items, run.worker, run.options.workers, stored=False)


def _stalls(run: Session, program: str, item: Item, seconds: float) -> Row:
    child = [sys.executable, "-m", "tools.gpu.launch", run.device, item["backend"], item["call"]]
    status, said = run.command(ncu.command(program, item["kernel"], 1, child), seconds)
    if status is None:
        return hung(seconds, said)
    facts = ncu.table(said)
    problem = "" if facts else f"ended with {status} and no table: {said[-1500:]}"
    return {**item, **facts, "passed": bool(facts), "problem": problem}


# --- benchmarks ---


def benchmarks(run: Session, first: bool = False) -> bool:
    """`first`: the named ones, ours beside SDPA and FlexAttention alone. Then all variants of all: operators, tasks."""
    from tools.gpu.production import NAMED, VARIANTS
    from vlattn_fast.benchmarks._choice import choose

    run.with_library()
    names = [benchmark.name for benchmark in choose([], "cuda")]
    rank = {name: NAMED.index(name) if name in NAMED else len(NAMED) for name in names}
    items: list[Item] = [{"item": name} for name in (*sorted(names, key=rank.__getitem__), "host")]
    if first:
        items = [{"item": f"{name}{BESIDE}", "benchmark": name, "variants": VARIANTS} for name in NAMED]
    items = run.selected(items)
    prepare(run, "benchmarks", [item for item in items if first or item["item"] in NAMED])
    done = run.run("benchmarks", items, run.worker)
    run.close()  # the worker has touched the device, and cannot be forked any more
    return done


# --- cuDNN by length ---


def cudnn(run: Session) -> bool:
    """Both passes at each length; the table of lengths when all are known."""
    from tools.gpu.lengths import EVERY

    run.with_library()
    items = run.selected([{"item": one.item, **one._asdict()} for one in EVERY])
    try:
        return run.run("cudnn", items, run.worker)
    finally:
        run.close()
        write_table(run)


# --- tiles ---


def tiles(run: Session, first: bool = False) -> bool:
    """`first`: launches that had one program an SM, or no time yet."""
    try:
        return _tuned(run, first)
    finally:
        run.close()  # the worker holds memory of the device, and a table without the winners


def _tuned(run: Session, first: bool) -> bool:
    """Compiles the candidates of all launches that no file has, then times them, launch by launch."""
    from tools.gpu import production
    from tools.gpu.tiles import keep, kept, made_of

    run.with_library()
    hot = dict(enumerate(production.TELLING if first else production.HOTTEST))
    names = {hot[item["hot"]].name: item for item in run.selected([{"item": one.name, "hot": n} for n, one in hot.items()])}
    facts, of = {"architecture": int(run.architecture), "processes": run.options.workers}, made_of(int(run.architecture))
    if run.device == "cpu":
        facts["most"] = CPU_TRIES
    compiler = Worker(run, VLATTN_PTX="")  # ptxas says what a kernel takes of an SM; the emulator has no ptxas

    def compiled(item: Item, seconds: float) -> Row:
        row = compiler({**item, **facts}, seconds)
        if "candidates" in row:
            keep(item["hot"], of, row)
        else:
            print(f"{item['item']} does not compile: {row.get('problem', '')}", flush=True)
        return row

    ahead = [{**item, "part": "tiles compiled", "limit": LAST} for item in names.values() if kept(item["hot"], of) is None]
    run.run("tiles", ahead, lambda: compiled, stored=False)
    compiler.close()
    worker = run.worker()

    def timed(item: Item, seconds: float) -> Row:
        row = worker(item, seconds)
        for one in row.pop("candidates", ()):
            run.store("tiles", one)
        return row

    for name, item in names.items():
        made = kept(item["hot"], of)
        if made is None or not run.run("tiles", [{**item, "candidates": made["candidates"], "limit": LAST}], lambda: timed):
            return False
        row = run.known("tiles").get(name, {})
        if "winner" in row:
            print(f"{name}: {row['winner']}, {row['best_us']} us, before {row['present_us']} us", flush=True)
    write_table(run)
    return True


def write_table(run: Session) -> None:
    """Writes the fastest right tiles, and the lengths from which cuDNN is faster, into the table, here and in the tree, which
    later parts read."""
    from tools.gpu.lengths import chosen

    winners = {row["key"]: row["winner"] for row in run.known("tiles").values() if row.get("changed") and row["passed"]}
    winners |= chosen([row for row in run.known("cudnn").values() if "us" in row])
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


class Step(NamedTuple):
    """Items of a part, and the seconds of a call of MINUTES that they may take; the last steps take what is left."""

    part: str
    what: str
    seconds: float
    run: Callable[[Session], bool]


REST = math.inf
ORDER = (
    Step("launcher", "ten launches out of an archive", 20, launcher),
    Step("verify", "a call of each kernel, first those that never ran", 90, partial(verify, first=True)),
    Step("cudnn", "tiles and long relevancy beside cuDNN by length", 120, cudnn),
    Step("benchmarks", "the named ones, beside SDPA and FlexAttention", 180, partial(benchmarks, first=True)),
    Step("tiles", "launches that had one program an SM, or no time", 90, partial(tiles, first=True)),
    Step("tests", "a side stream and a second device", 20, suite.streams),
    Step("tests", "memcheck of paged keys and of a bias of groups", 40, suite.memcheck),
    Step("launcher", "all", REST, launcher),
    Step("verify", "all", REST, verify),
    Step("tiles", "all", REST, tiles),
    Step("cudnn", "all", REST, cudnn),
    Step("benchmarks", "all", REST, benchmarks),
    Step("tests", "all", REST, suite.everything),
    Step("ncu", "all", REST, profile),
)
PARTS = tuple(dict.fromkeys(step.part for step in ORDER))


if __name__ == "__main__":
    main()
