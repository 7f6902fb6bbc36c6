"""The benchmarks under pytest-benchmark, which drives the rounds; each round runs every variant once.

    pytest benchmarks/test_benchmarks.py [-k scan]

VLATTN_BENCH_DEVICE (cpu), VLATTN_BENCH_QUICK (unset) and VLATTN_BENCH_OUT (a JSON file; unset: no records are stored) choose.
"""

import itertools
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from vlattn_fast._ground.origin import device_name
from vlattn_fast.benchmarks._choice import declared
from vlattn_fast.benchmarks._measure import Benchmark, Measurement
from vlattn_fast.benchmarks._records import append, provenance
from vlattn_fast.benchmarks._run import check_device, show

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.filterwarnings("default")  # torch.compile's warnings are not about this package
DEVICE = check_device(os.environ.get("VLATTN_BENCH_DEVICE", "cpu"))
OUT = os.environ.get("VLATTN_BENCH_OUT")


@pytest.mark.parametrize("declaration", declared(), ids=lambda declaration: declaration.name)
def test_benchmark(benchmark: Any, declaration: Benchmark) -> None:
    measurement, number = Measurement(declaration, DEVICE, quick="VLATTN_BENCH_QUICK" in os.environ), itertools.count()
    benchmark.pedantic(lambda: measurement.round(next(number)), rounds=measurement.rounds, iterations=1)
    origin = {"device": device_name(DEVICE), **provenance(shlex.join(["pytest", *sys.argv[1:]]))}
    records = [{**record, **origin} for record in measurement.records()]
    benchmark.extra_info["records"] = records
    show(records)
    if OUT:
        append(records, Path(OUT))
