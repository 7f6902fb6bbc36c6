"""A process of `make gpu` that reads items, a line of JSON each, and answers each by a row.

Each item runs in a process of its own, forked from this one, which has imported everything and touched no GPU: one that hangs,
crashes or runs out of memory costs its row. Launches whose tiles are timed run in this process, which takes seconds to begin on
a device. So do benchmarks, of which the first one takes 15 s to load torch.compile.

usage: python -m tools.gpu.worker DEVICE
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch

from tools.gpu import archives, full, launches, lengths, production, tiles
from tools.gpu.session import ROW, Item, Row, emulate, hung
from vlattn_fast.benchmarks._choice import choose
from vlattn_fast.benchmarks._formula import OURS, WRONG
from vlattn_fast.benchmarks._gpu import GRAPH
from vlattn_fast.benchmarks._launches import recording
from vlattn_fast.benchmarks._measure import QUICK_ROUNDS, Measurement
from vlattn_fast.benchmarks._records import device_name
from vlattn_fast.checking import verify
from vlattn_fast.checking.tolerance import MOST, settle
from vlattn_fast.ops import OPERATORS

SAME_KERNEL = 3  # profiled calls


def main(device: str) -> None:
    emulate()  # once, for all processes
    for line in sys.stdin:
        start, item = time.monotonic(), json.loads(line)
        shared = item["part"] in ("tiles", "benchmarks", "cudnn")
        if item.get("sizes") in production.SIZES:
            production.cases(item["sizes"])  # made once, for all processes
        row = answered(item, device) if shared else apart(item, device)
        # begins a new line, whatever was printed before
        print("\n" + ROW + json.dumps({**row, "seconds": round(time.monotonic() - start, 2)}), flush=True)
        if row.get("last"):
            sys.exit(1)  # after an illegal access nothing runs in this process any more


def answered(item: Item, device: str) -> Row:
    parts = {"verify": verified, "ncu": kernels, "ncu compiled": compiled, "benchmarks": benchmarked}
    parts |= {"benchmarks compiled": compiled_variants, "tiles": tiles.tried, "tiles compiled": tiles.compiled}
    parts |= {"cudnn": lengths.measured, "launcher compiled": archives.compiled, "launcher": archives.measured}
    try:
        return parts[item["part"]](item, device)
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        return {"passed": False, "problem": f"{type(error).__name__}: {error}"[:500], "last": device == "cuda"}


def apart(item: Item, device: str) -> Row:
    """The row of an item from a process of its own, which is ended after the item's seconds."""
    assert not torch.cuda.is_initialized()  # no process that is forked could use a GPU
    sys.stdout.flush()
    reads, writes = os.pipe()
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            try:
                for stream in (1, 2):
                    os.dup2(said.fileno(), stream)
                row = answered(item, device)
                sys.stdout.flush()
                with os.fdopen(writes, "w") as pipe:
                    json.dump({**row, "last": False}, pipe)
            finally:
                os._exit(0)
        os.close(writes)
        ended = threading.Event()
        seconds = min(item["seconds"], threading.TIMEOUT_MAX)
        timer = threading.Timer(seconds, lambda: (ended.set(), os.kill(child, 9)))
        timer.start()
        with os.fdopen(reads) as pipe:
            text = pipe.read()  # ends with the child
        timer.cancel()
        _, status = os.waitpid(child, 0)
        if text:
            return json.loads(text)
        said.seek(0)
        last_words = said.read().decode(errors="replace")[-1500:]
    if ended.is_set():
        return hung(item["seconds"], last_words)
    return {"passed": False, "problem": f"the process ended with {os.waitstatus_to_exitcode(status)}: {last_words}"}


def verified(item: Item, device: str) -> Row:
    """The worst output of a backend, in units of the tolerance rule's bound."""
    # outputs are filled with NaN, so that a gap in an output is seen
    warnings.filterwarnings("ignore", ".*deterministic")
    torch.use_deterministic_algorithms(True, warn_only=True)
    name, _, backend = item["item"].rpartition("/")
    check = next(check for check in production.checks() if check.item == name)
    case = check.example(device)
    tensors = case.in_dtype(check.dtype, device)
    refused = OPERATORS[case.operator].refusals(backend, case.arguments(tensors))
    if refused:
        return {"passed": None, "refused": refused}  # nothing is compared
    problem = verify._Problem(case, check.dtype, device, truth_on=device)
    in_one_draw = check.is_full and check.operator not in full.CASES
    row = _compared(problem, backend, 1 if check.is_full or device == "cpu" else 4, 1 if in_one_draw else MOST)
    return {**row, "passed": row["ratio"] <= 1.0, "problem": "" if row["ratio"] <= 1.0 else row["says"]}


def _compared(problem: verify._Problem, backend: str, enough: int, most: int) -> dict[str, Any]:
    """So many numbers as calls of attention of models have settle the rule in one draw."""
    with recording() as tiles:
        pools = settle(problem.runs(backend), enough=lambda: enough, most=most)
    names = sorted({tile["kernel"] for tile in tiles})
    ratios = {name: production.ratio_of(pool) for name, pool in pools.items()}
    worst = max(ratios, key=lambda name: ratios[name])
    return {"ratio": ratios[worst], "worst": worst, "says": str(pools[worst]), "kernels": names, "tiles": tiles}


def compiled(item: Item, device: str) -> Row:
    """Compiles the kernels of one call of a benchmark, for later processes."""
    call = production.call_of(item["call"], item["backend"], device)
    if call is not None:
        call()
    return {"passed": True}


def kernels(item: Item, device: str) -> Row:
    """Microseconds of each kernel of this package in one call of a benchmark."""
    call = production.call_of(item["call"], item["backend"], device)
    if call is None:
        return {"passed": None, "kernels": {}, "not_run": "the backend does not take the call"}
    with recording() as tiles:
        call()
    times = _emulated(call) if device == "cpu" else _profiled(call, item["backend"])
    if not times:
        return {"passed": False, "problem": "the profiler saw no kernel of this package"}
    return {"passed": True, "kernels": {name: round(us, 3) for name, us in times.items()}, "tiles": tiles}


def _emulated(call: Callable[[], Any]) -> dict[str, float]:
    """Microseconds by kernel that the emulator took."""
    from triton.runtime.driver import driver

    from ptx.cuda import Device

    seen: list[Any] = []
    for emulated in (driver.active, Device.active):
        emulated.launches, emulated.keep = seen, True
    call()
    times: dict[str, float] = {}
    for launch in seen:
        name = production.function_name(launch.name)
        times[name] = times.get(name, 0.0) + launch.seconds * 1e6
    return times


def _profiled(call: Callable[[], Any], backend: str) -> dict[str, float]:
    """Microseconds by kernel from torch's profiler, without torch's kernels."""
    ours = {name for name, _, _ in launches.launched(call)} if backend == "triton" else None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(SAME_KERNEL):
            call()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in profile.events():
        name = production.function_name(event.name)
        if event.device_type == torch.autograd.DeviceType.CUDA and (
            name in ours if ours is not None else "vlattn::" in event.name
        ):
            times[name] = times.get(name, 0.0) + event.time_range.elapsed_us() / SAME_KERNEL
    return times


def compiled_variants(item: Item, device: str) -> Row:
    """Compiles the variants of a benchmark that need it, for later processes, at full size."""
    if device == "cuda":
        problem = measurement(item, device, only=[]).problem
        names = [name for name, variant in problem.variants.items() if variant.compiled or name in OURS]
        measurement(item, device, only=[name for name in names if name in item.get("variants", names)])
    return {"passed": True}


def measurement(item: Item, device: str, only: list[str] | None = None) -> Measurement:
    """The benchmark with few rounds and, where the item names them, few variants; with `only`, these variants, without comparing
    anything."""
    (benchmark,) = choose([item.get("benchmark", item["item"])])
    quick = {"quick": True, "rounds": 1, "compiled": False} if device == "cpu" else {"rounds": QUICK_ROUNDS["cuda"]}
    known = {"only": item.get("variants")} if only is None else {"only": only, "truth": {}}
    with production.emulated_too():
        return Measurement(benchmark, torch.device(device), dtype=benchmark.cuda_dtype, **quick, **known)


def problem_of(row: Row) -> str:
    """Why a row of this package is no result; empty where it is one. Graphs of torch's own kernels may fail."""
    name = row["variant"].removesuffix(GRAPH)
    if name not in OURS:
        return ""
    if why := row.get("not_run", ""):
        return why if name == row["variant"] or name in production.BACKENDS or WRONG in why else ""
    is_task = row["benchmark"].startswith("task_")  # formulas of whole models may need too much memory
    return "" if row["error"] is not None or is_task else "there is nothing to compare it with"


def benchmarked(item: Item, device: str) -> Row:
    """The rows of a benchmark, for the device's file of rows."""
    if item["item"] == "host":
        from tools.host import measure

        return {"passed": True, "rows": measure(device, rounds=QUICK_ROUNDS[device])}
    rows = measurement(item, device).run()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()  # the next benchmark asks how much memory is free
    failed = [f"{row['variant']}: {problem}" for row in rows if (problem := problem_of(row))]
    placed = [{**row, "device": device_name(torch.device(device))} for row in rows]
    return {"passed": not failed, "problem": "; ".join(failed), "rows": placed}


if __name__ == "__main__":
    main(*sys.argv[1:])
