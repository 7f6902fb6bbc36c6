"""A benchmark with each variant in a separate process: no variant sees memory that another variant left behind.

The processes take turns, so that a busy moment of the machine affects all of them alike. The formula in float64 runs once, in a
process that ends before the variants begin.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

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
    """The rows of `variants` (None = all but those under torch.compile) of the benchmark `name` on the CPU; the variants must
    include the bound, which the ratios refer to."""
    rounds = rounds or 3
    with contextlib.ExitStack() as stack:
        stack.enter_context(_idle_threads_sleep())
        with _worker() as first:
            truth, known = first.submit(_truth, name, overrides).result()
        workers = [stack.enter_context(_worker()) for _ in variants or known]
        for worker, variant in zip(workers, variants or known, strict=True):
            worker.submit(_start, name, variant, rounds, overrides, truth).result()
        for number in range(rounds):
            for worker in workers:
                worker.submit(_round, number).result()
        rows = [row for worker in workers for row in worker.submit(_rows).result()]
    (bound,) = (row for row in rows if row["is_bound"])
    return [{**row, "ratio_to_bound": row["p50_us"] / bound["p50_us"]} if "p50_us" in row else row for row in rows]


def _worker() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"))


@contextlib.contextmanager
def _idle_threads_sleep() -> Iterator[None]:
    """OpenMP's threads in waiting workers must not spin on the cores of the measured worker."""
    before = os.environ.get("OMP_WAIT_POLICY")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_WAIT_POLICY"]


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


def _rows() -> list[dict[str, Any]]:
    return _measurements[0].rows()
