"""A process of `make gpu` that keeps data shared by its items: it reads items, a line of JSON each, and answers each by a row.

usage: python -m tools.gpu.worker DEVICE
"""

from __future__ import annotations

import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch

from tools.gpu import launches, production
from vlattn_fast.benchmarks._choice import OURS, choose
from vlattn_fast.benchmarks._measure import Measurement
from vlattn_fast.benchmarks._records import device_name
from vlattn_fast.checking import verify
from vlattn_fast.checking.tolerance import settle

ROW = "ROW "  # begins a row; run.py keeps all other output for its error messages
Item = dict[str, Any]
Row = dict[str, Any]
SAME_KERNEL = 3  # profiled calls


def main(device: str) -> None:
    parts = {"verify": verified, "sweep": _sweep, "compile": compiled, "ncu": kernels, "benchmarks": benchmarked}
    for line in sys.stdin:
        start = time.monotonic()
        try:
            item = json.loads(line)
            row = parts[item["part"]](item, device)
        except Exception as error:
            row = {"passed": False, "problem": f"{type(error).__name__}: {error}"[:500], "last": device == "cuda"}
            traceback.print_exc(file=sys.stdout)
        # begins a new line, whatever was printed before
        print("\n" + ROW + json.dumps({**row, "seconds": round(time.monotonic() - start, 2)}), flush=True)
        if row.get("last"):
            sys.exit(1)  # after an illegal access nothing runs in this process any more


def verified(item: Item, device: str) -> Row:
    """The worst output of each backend that takes the case, in units of the tolerance rule's bound."""
    # outputs are filled with NaN, so that a gap in an output is seen
    warnings.filterwarnings("ignore", ".*deterministic")
    torch.use_deterministic_algorithms(True, warn_only=True)
    check = next(check for check in production.checks(device) if check.item == item["item"])
    case = check.case
    problem = verify._Problem(case, check.dtype, device, truth_on=device)
    compared: dict[str, Any] = {}
    for backend in production.BACKENDS:
        tensors = case.in_dtype(check.dtype, device)
        refused = verify.backends_of(case.operator)[backend].refusals(verify.facts_of(case.operator, case.arguments(tensors)))
        if refused:
            compared[backend] = {"refused": refused}
            continue
        try:
            compared[backend] = _compared(problem, backend, device)
        except Exception as error:
            compared[backend] = {"problem": f"{type(error).__name__}: {error}"[:500]}
            if device == "cuda":
                break  # after an illegal access nothing runs in this process any more
    failed = {name: str(x) for name, x in compared.items() if "problem" in x or x.get("ratio", 0.0) > 1.0}
    last = device == "cuda" and any("problem" in x for x in compared.values())
    if not last:
        torch.cuda.empty_cache()
    facts = {"operator": case.operator, "case": case.name, "sizes": check.sizes, "dtype": str(check.dtype)}
    problem_of = "; ".join(f"{name}: {said}" for name, said in failed.items())
    return {**facts, "passed": not failed, "problem": problem_of, "backends": compared, "last": last}


def _compared(problem: verify._Problem, backend: str, device: str) -> dict[str, Any]:
    names = set()

    def see(name: str, launch: launches.Launch) -> Any:
        names.add(name)
        return launch()

    with launches.watching(see):
        pools = settle(problem.runs(backend), enough=lambda: 1 if device == "cpu" else 4)
    ratios = {name: production.ratio_of(pool) for name, pool in pools.items()}
    worst = max(ratios, key=lambda name: ratios[name])
    return {"ratio": ratios[worst], "worst": worst, "says": str(pools[worst]), "kernels": sorted(names)}


def _sweep(item: Item, device: str) -> Row:
    from tools.gpu import sweep

    return sweep.tried(item, device)


def compiled(item: Item, device: str) -> Row:
    """Compiles the kernels of one call of a benchmark, for later processes."""
    call = production.call_of(item["call"], item["backend"], device)
    if call is not None:
        call()
    torch.cuda.empty_cache()
    return {"passed": True}


def kernels(item: Item, device: str) -> Row:
    """Microseconds of each kernel of this package in one call of a benchmark."""
    call = production.call_of(item["call"], item["backend"], device)
    if call is None:
        return {"passed": True, "kernels": {}, "not_run": "the backend does not take the call"}
    call()
    times = _on_cpu(call) if device == "cpu" else _profiled(call, item["backend"])
    torch.cuda.empty_cache()
    if device == "cuda" and not times:
        return {"passed": False, "problem": "torch's profiler saw no kernel of this package"}
    return {"passed": True, "kernels": {name: round(us, 3) for name, us in times.items()}}


def _on_cpu(call: Callable[[], Any]) -> dict[str, float]:
    times: dict[str, float] = {}

    def see(name: str, launch: launches.Launch) -> Any:
        start = time.perf_counter()
        done = launch()
        times[name] = times.get(name, 0.0) + (time.perf_counter() - start) * 1e6
        return done

    with launches.watching(see):
        call()
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


def benchmarked(item: Item, device: str) -> Row:
    """The rows of a benchmark, for the device's file of rows. `left_out` says why a variant is not timed."""
    place = torch.device(device)
    if item["item"] == "host":
        from vlattn_fast.benchmarks.host import measure

        return {"passed": True, "rows": measure(device, quick=device == "cpu")}
    (benchmark,) = choose([item["item"]])
    tiny: dict[str, Any] = {"quick": True, "rounds": 1, "overrides": production.TINY_WORKLOAD, "compiled": False}
    rows = Measurement(benchmark, place, left_out=item["left_out"], **(tiny if device == "cpu" else {})).run()
    torch.cuda.empty_cache()
    failed = [
        row["variant"] for row in rows if "not_run" in row and row["variant"] in OURS and row["variant"] not in item["left_out"]
    ]
    problem = f"not run: {', '.join(failed)}" if failed else ""
    placed = [{**row, "device": device_name(place)} for row in rows]
    return {"passed": not failed, "problem": problem, "rows": placed, "last": bool(failed) and device == "cuda"}


if __name__ == "__main__":
    main(*sys.argv[1:])
