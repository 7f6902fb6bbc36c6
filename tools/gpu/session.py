"""Runs the items of `make gpu` and stores each row at once, so that a call that was cut can continue, on another machine too."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / "build" / "gpu"
STORED = ROOT / "benchmarks" / "results"  # rows of earlier calls, wherever this call writes
ROWS, KERNELS = "gpu.json", "kernels.tar.xz"  # what a call leaves in its folder, beside the device's file of measurements
SOURCES = ("vlattn_fast/**/*.py", "kernels/*.py", "benchmarks/*.py", "csrc/**/*", "CMakeLists.txt")
SOURCES += ("tools/gpu/production.py", "tools/gpu/full.py")  # the calls, and not what goes over them
EMULATED = "90"  # the architecture of a rehearsal, where VLATTN_PTX names none
LEAST_LEFT = 15.0  # seconds; with fewer left no item begins
# Seconds of an item in the first steps, and in the last ones, where it comes again if those did not suffice. A worker ends after
# GRACE more.
FIRST, LAST, GRACE = 30.0, 90.0, 10.0
MOST_BYTES = 15 * 2**20  # of an archive: a machine that is lent gives back files of 16 MiB
# Files of compiled kernels that go along: the library of CUDA C++, the launcher's archive, candidates, Triton's, torch.compile's
KEPT = ("cuda/*.so", "cuda/sources", "archives/*", "tiles/*.json")
KEPT += ("triton-cache/*/*.json", "triton-cache/*/*.cubin", "inductor-cache/**/*")
ROW = "ROW "  # begins a worker's row; all other output is kept for error messages
# an ended process must take its children along
GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
PIPES: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace", **GROUP}

Item = dict[str, Any]  # "item" is its name
Row = dict[str, Any]
Execute = Callable[[Item, float], Row]  # (item, seconds) -> its row, with "hung" where the seconds did not suffice


def failed(row: Row) -> bool:
    """Whether a row is of a failure. Its `passed` is None where nothing was compared, timed or run: the row says why."""
    return row["passed"] is False


def hung(seconds: float, said: str) -> Row:
    """The row of an item that was ended."""
    return {"passed": False, "hung": True, "problem": f"hung: ended after {seconds:.0f} s: {said[-1500:]}"}


def sources() -> str:
    """A hash of the tree's files, since a copy has no commits; the table of the fastest tiles is left out."""
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def of_devices(part: str) -> list[Row]:
    """The stored rows of a part on any GPU, of whatever sources."""
    rows: list[Row] = json.loads((STORED / ROWS).read_text()) if (STORED / ROWS).exists() else []
    return [row for row in rows if row["part"] == part and not row["device"].startswith("CPU")]


def import_from_tree() -> None:
    """From here on `vlattn_fast` is that of the laid-out tree."""
    sys.path.insert(0, str(TREE))


def emulate() -> None:
    """In a rehearsal this process runs the kernels of a GPU on CPU tensors."""
    if architecture := os.environ.get("VLATTN_PTX"):
        from tools.emulated.package import install  # a machine with a GPU gets no emulator

        install(architecture)


def pack(compiled: Path, archive: Path, most: int) -> None:
    """Writes the compiled kernels of the folder `compiled` into an archive of about `most` bytes."""
    with open(archive, "wb") as file, tarfile.open(fileobj=file, mode="w:xz", preset=1) as kernels:
        for path in (path for pattern in KEPT for path in sorted(compiled.glob(pattern)) if path.is_file()):
            kernels.add(path, path.relative_to(compiled))
            if file.tell() > most:
                break


class Session:
    """A call of run.py: its options, its known rows, and the time left of a part by `clock`, in seconds."""

    def __init__(self, options: argparse.Namespace, clock: Callable[[], float] = time.monotonic) -> None:
        import_from_tree()
        self._rows = importlib.import_module("vlattn_fast.benchmarks._records")
        import torch

        self.options, self.device, self.sources = options, options.device, sources()
        place = torch.device(self.device)
        self.slug = self._rows.slug(place)
        if self.device == "cuda":
            configurations = importlib.import_module("vlattn_fast.kernels._configurations")
            self.architecture = configurations.architecture(torch.cuda.current_device()).removeprefix("sm_")
        else:
            self.architecture = os.environ.get("VLATTN_PTX", EMULATED)
        emulated = f", sm_{self.architecture} emulated" if self.device == "cpu" else ""
        self.origin = {"device": self._rows.device_name(place) + emulated}
        self.origin |= self._rows.provenance(" ".join(["python", "-m", "tools.gpu.run", *sys.argv[1:]]))
        target = self.architecture + ("a" if self.architecture == "90" else "")
        # the CUDA C++ kernels: a library, and CMake's option for this GPU or for the emulated one
        folder, name, self.option = {
            "cuda": ("cuda", "libvlattn_cuda.so", f"-DVLATTN_TARGETS={target}-real"),
            "cpu": (f"ptx{target}", "libvlattn_ptx.so", f"-DVLATTN_PTX={target}"),
        }[self.device]
        self.compiled = ROOT / "build"
        self.library = self.compiled / folder / name
        self.built: Future[bool]  # whether its build has not failed
        self._clock = clock
        self._call_ends = clock() + 60 * options.minutes
        self._end, self._limit, self._is_last, self._lock = 0.0, LAST, True, threading.Lock()
        self._workers: list[Worker] = []
        self._idle: list[Worker] = []

    def begin(self, seconds: float = math.inf) -> None:
        """A step that may take a share of the call, or, as the last ones, all that is left of it."""
        self._end = min(self._call_ends, self._clock() + seconds)
        self._is_last = math.isinf(seconds)
        self._limit = LAST if self._is_last else FIRST

    def left(self) -> float:
        return self._end - self._clock()

    def known(self, part: str) -> dict[str, Row]:
        """The rows of a part by item, of this tree on this device."""
        latest: dict[str, Row] = {}
        for folder in dict.fromkeys((STORED, self.options.out.resolve())):
            path = folder / ROWS
            for row in json.loads(path.read_text()) if path.exists() else []:
                if (row["part"], row["sources"], row["device"]) == (part, self.sources, self.origin["device"]):
                    latest[row["item"]] = row
        return latest

    def store(self, part: str, row: Row) -> None:
        """Stores a row of a part. The `rows` of a benchmark go to the file of the device first."""
        with self._lock:
            if rows := row.pop("rows", None):
                self._append([{**one, **self.origin} for one in rows], f"{self.slug}.json")
            stamp = {"sources": self.sources, **self.origin, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
            self._append([{"part": part, **row, **stamp}], ROWS)

    def _append(self, rows: list[Row], name: str) -> None:
        """Adds rows to those of earlier calls. On a device the stored file is kept the same: a folder that is taken away may be
        empty in the next call."""
        path, stored = self.options.out / name, STORED / name
        elsewhere = self.device == "cuda" and path.resolve() != stored
        if elsewhere and not path.exists() and stored.exists():
            shutil.copy(stored, path)
        self._rows.append(rows, path)
        if elsewhere:
            shutil.copy(path, stored)

    def selected(self, items: list[Item]) -> list[Item]:
        return [item for item in items if re.search(self.options.select, item["item"])]

    def with_library(self) -> bool:
        """Waits for the build of the CUDA C++ kernels, and ends workers that know no library; False after a failure."""
        if not self.built.done():
            self.built.result()
            self.close()
        return self.built.result()

    def lacks(self, part: str, program: str) -> None:
        """Stores and says that a program is not installed."""
        if program not in self.known(part):
            self.store(part, {"item": program, "passed": None, "not_run": f"{program} is not installed"})
        print(f"{program} is not installed", flush=True)

    def unpack_kernels(self) -> None:
        """Takes the compiled kernels of an earlier machine out of build/kernels.tar.xz."""
        if (self.compiled / KERNELS).exists() and not (self.compiled / "triton-cache").exists():
            with tarfile.open(self.compiled / KERNELS) as archive:
                archive.extractall(self.compiled, filter="data")
            for path in self.compiled.glob("triton-cache/*/__grp__*.json"):  # names its files by the folder of the other machine
                files = {name: path.with_name(name) for name in json.loads(path.read_text())["child_paths"]}
                path.write_text(json.dumps({"child_paths": {name: str(file) for name, file in files.items() if file.exists()}}))

    def pack_kernels(self) -> None:
        """Adds an archive of compiled kernels, as many as it may hold, to the folder of a device's rows."""
        if self.device != "cpu" and self.options.out.resolve() != STORED:
            pack(self.compiled, self.options.out / KERNELS, MOST_BYTES)

    def run(
        self, part: str, items: Sequence[Item], executor: Callable[[], Execute], side_by_side: int = 1, stored: bool = True
    ) -> bool:
        """Runs the items without a known row, in this order, on `side_by_side` threads with an executor each; returns whether
        all are known now. stored False: the items' files count, and rows are not stored."""
        known, again = self.known(part), self.options.again
        waiting = [item for item in items if item["item"] not in known or (again and failed(known[item["item"]]))]
        total, lock, cut, begun = len(waiting), threading.Lock(), [], time.monotonic()

        def serve() -> None:
            execute = executor()
            while True:
                with lock:
                    if not waiting or self.left() < LEAST_LEFT:
                        return
                    item = waiting.pop(0)
                limit = self.options.seconds or item.get("limit", self._limit)
                seconds = min(limit, self.left())
                start = time.monotonic()
                try:
                    row = execute({"part": part, **item}, seconds)
                except Exception as error:  # else the thread would end, and its item would have no row
                    row = {"passed": False, "problem": f"{type(error).__name__}: {error}"[:500]}
                if row.get("hung") and (seconds < limit or not self._is_last):  # it comes again
                    cut.append(item)
                elif stored:
                    self.store(part, {"item": item["item"], "seconds": round(time.monotonic() - start, 2), **row})
                if total > 1:
                    done = total - len(waiting)
                    problem = f"  FAILED: {row.get('problem', '')}"[:300] if failed(row) else ""
                    outcome = "  CUT" if item in cut else problem
                    print(f"[{done} of {total}, {time.monotonic() - begun:.0f} s] {item['item']}{outcome}", flush=True)

        threads = [threading.Thread(target=serve, daemon=True) for _ in range(min(side_by_side, total))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._idle = list(self._workers)
        return not waiting and not cut

    def worker(self) -> Worker:
        """A worker process that nobody else uses before the end of a `run`. It executes items until `close`."""
        with self._lock:
            if not self._idle:
                self._workers.append(Worker(self))
                return self._workers[-1]
            return self._idle.pop()

    def close(self) -> None:
        self._idle.clear()
        while self._workers:
            self._workers.pop().close()

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of processes in the tree. Compiled kernels are kept in build/ from call to call."""
        caches = {"TRITON_CACHE_DIR": "triton-cache", "TORCHINDUCTOR_CACHE_DIR": "inductor-cache"}
        return {
            **{name: str(self.compiled / folder) for name, folder in caches.items()},
            **{name: value for name, value in os.environ.items() if name not in ("VLATTN_PTX", "TRITON_INTERPRET")},
            "PYTHONPATH": os.pathsep.join(filter(None, (str(TREE), os.environ.get("PYTHONPATH")))),
            "VLATTN_TEST_DEVICE": self.device,
            **({"VLATTN_CUDA_LIBRARY": str(self.library)} if self.library.exists() else {}),
            "OMP_NUM_THREADS": "1",
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # a worker that asks for a GPU can still be forked
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            **({"VLATTN_PTX": self.architecture} if self.device == "cpu" else {}),
            **more,
        }

    def command(self, words: list[str], seconds: float, **more: str) -> tuple[int | None, str]:
        """(exit status, output) of a command; (None, output) where it was ended after the seconds."""
        process = subprocess.Popen(words, cwd=TREE, env=self.environment(**more), **PIPES)
        try:
            said, _ = process.communicate(timeout=None if math.isinf(seconds) else seconds)
            return process.returncode, said
        except subprocess.TimeoutExpired:
            end(process)
            return None, process.communicate()[0]


def end(process: subprocess.Popen[str]) -> None:
    """Ends a process and its children."""
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        pass


class Worker:
    """A process of worker.py, started at its first item, and again after its death. `more`: of its environment."""

    def __init__(self, session: Session, **more: str) -> None:
        self._session, self._more = session, more
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, item: Item, seconds: float) -> Row:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = self._started()
        process, out_of_time = self._process, threading.Event()

        def stop() -> None:
            out_of_time.set()
            end(process)

        timer, said = threading.Timer(min(seconds + GRACE, threading.TIMEOUT_MAX), stop), [""]
        timer.start()
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps({**item, "seconds": seconds}) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                if line.startswith(ROW):
                    row = json.loads(line.removeprefix(ROW))
                    if row.pop("last", False):
                        process.wait()
                    return row
                said.append(line)
        except BrokenPipeError:
            pass
        finally:
            timer.cancel()
        status = process.wait()
        if out_of_time.is_set():
            return hung(seconds, "".join(said))
        return {"passed": False, "problem": f"the process ended with {status}: {''.join(said)[-1500:]}"}

    def _started(self) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "tools.gpu.worker", self._session.device]
        return subprocess.Popen(words, cwd=TREE, env=self._session.environment(**self._more), stdin=subprocess.PIPE, **PIPES)

    def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.close()
            process.wait(10)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            end(process)
            process.wait()
        process.stdout.close()
