"""The list of benchmarks, and the choice among them by name."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.metadata import entry_points

import torch

from vlattn_fast.benchmarks._measure import Benchmark
from vlattn_fast.benchmarks._records import HERE
from vlattn_fast.ops import OPERATORS

# Whole tasks, which are benchmarks of installed packages: their entry points name a module as each file here is one.
OF_PACKAGES = {entry.name: entry.value for entry in entry_points(group="vlattn_fast.benchmarks")}
MODULES = *(name for name in OPERATORS if (HERE / f"{name}.py").exists()), *sorted(OF_PACKAGES)


def declared(device_type: str = "cpu") -> list[Benchmark]:
    """A GPU has no second number type."""
    modules = (importlib.import_module(OF_PACKAGES.get(name, f"{__package__}.{name}")) for name in MODULES)
    everything = [benchmark for module in modules for benchmark in module.BENCHMARKS]
    return [one for one in everything if device_type == "cpu" or one.cpu_dtype == torch.float32]


def choose(names: Sequence[str], device_type: str = "cpu") -> list[Benchmark]:
    """Returns the benchmarks named by file, file/workload or in full; all by default. Raises ValueError for an unknown name."""
    everything = declared(device_type)
    for name in names:
        if not any(_answers(benchmark, name) for benchmark in everything):
            known = "\n  ".join([*MODULES, *(benchmark.name for benchmark in everything)])
            raise ValueError(f"names must be of benchmarks; got {name!r}. There are\n  {known}")
    return [benchmark for benchmark in everything if not names or any(_answers(benchmark, name) for name in names)]


def _answers(benchmark: Benchmark, name: str) -> bool:
    return f"{benchmark.name}/".startswith(f"{name}/")
