"""A benchmark with each variant in a process of its own: no variant sees memory that another one left behind.

The processes take turns, so that a busy moment of the machine affects all of them alike.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from vlattn_fast.benchmarks._measure import Measurement
from vlattn_fast.benchmarks._run import choose
from vlattn_fast.benchmarks._workloads import Sizes

_measurements: list[Measurement] = []  # of a worker: its one


def measure(name: str, variants: Sequence[str], *, rounds: int = 3, overrides: Sizes | None = None) -> list[dict[str, Any]]:
    """The rows of `variants` of the benchmark `name` on the CPU; one of them must be the bound, which the ratios refer to."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_idle_threads_sleep())
        workers = [stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for _ in variants]
        for worker, variant in zip(workers, variants, strict=True):
            worker.submit(_start, name, variant, rounds, overrides).result()
        for number in range(rounds):
            for worker in workers:
                worker.submit(_round, number).result()
        rows = [row for worker in workers for row in worker.submit(_rows).result()]
    (bound,) = (row for row in rows if row["is_bound"])
    return [{**row, "ratio_to_bound": row["p50_us"] / bound["p50_us"]} if "p50_us" in row else row for row in rows]


@contextlib.contextmanager
def _idle_threads_sleep() -> Iterator[None]:
    """OpenMP's threads in workers that wait must not spin on the cores of the one that is measured."""
    before = os.environ.get("OMP_WAIT_POLICY")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_WAIT_POLICY"]


def _start(name: str, variant: str, rounds: int, overrides: Sizes | None) -> None:
    (benchmark,) = choose([name])
    cpu = torch.device("cpu")
    _measurements.append(Measurement(benchmark, cpu, rounds=rounds, overrides=overrides, compiled=False, only=[variant]))


def _round(number: int) -> None:
    _measurements[0].round(number)


def _rows() -> list[dict[str, Any]]:
    return _measurements[0].rows()
