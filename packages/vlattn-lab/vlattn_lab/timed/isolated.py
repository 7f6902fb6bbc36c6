"""A benchmark with each variant in a separate process: no variant sees memory that another variant left behind.

The processes take turns, so that a busy moment of the machine affects all of them alike. The formula in float64 runs once, in a
process that ends before the variants begin.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from vlattn_fast.benchmarks._choice import choose
from vlattn_fast.benchmarks._measure import Measurement
from vlattn_fast.benchmarks._workloads import Sizes

_CPU = torch.device("cpu")
_measurements: list[Measurement] = []  # a worker has one

Truth = dict[str, np.ndarray]


def measure(
    name: str, variants: Sequence[str] | None = None, *, rounds: int | None = None, overrides: Sizes | None = None
) -> list[dict[str, Any]]:
    """The records of `variants` (None = all but those under torch.compile) of the benchmark `name` on the CPU; ratios
    need the bound among them."""
    rounds = rounds or 3
    with contextlib.ExitStack() as stack:
        # OpenMP's threads in waiting workers must not spin on the cores of the measured worker
        stack.enter_context(patch.dict(os.environ, {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")}))
        with _worker() as first:
            truth, known = first.submit(_truth, name, overrides).result()
        workers = [stack.enter_context(_worker()) for _ in variants or known]
        for worker, variant in zip(workers, variants or known, strict=True):
            worker.submit(_start, name, variant, rounds, overrides, truth).result()
        for number in range(rounds):
            for worker in workers:
                worker.submit(_round, number).result()
        records = [record for worker in workers for record in worker.submit(_records).result()]
    bound = next((record for record in records if record["is_bound"]), {})
    for record in records:
        if "p50_us" in record and "p50_us" in bound:
            record["ratio_to_bound"] = record["p50_us"] / bound["p50_us"]
    return records


def _worker() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=_begin)


def _begin() -> None:
    """A worker ends with the process that it works for, also where that is killed."""
    threading.Thread(target=_end_behind, args=(parent_process(),), daemon=True).start()


def _end_behind(process: Any) -> None:
    process.join()
    os._exit(1)


def _measurement(name: str, overrides: Sizes | None, **options: Any) -> Measurement:
    (benchmark,) = choose([name])
    return Measurement(benchmark, _CPU, overrides=overrides, compiled=False, **options)


def _truth(name: str, overrides: Sizes | None) -> tuple[Truth, list[str]]:
    """The formula's result in float64 (empty where the formula needs too much memory), and the names of the variants."""
    measurement = _measurement(name, overrides, only=[])
    names = [name for name, variant in measurement.problem.variants.items() if not variant.compiled]
    return {name: x.numpy() for name, x in (measurement.truth or {}).items()}, names


def _start(name: str, variant: str, rounds: int, overrides: Sizes | None, truth: Truth) -> None:
    known = {name: torch.from_numpy(x) for name, x in truth.items()}
    _measurements.append(_measurement(name, overrides, rounds=rounds, only=[variant], truth=known))


def _round(number: int) -> None:
    _measurements[0].round(number)


def _records() -> list[dict[str, Any]]:
    return _measurements[0].records()
