"""Counts the passes of the operators with archives that only allocate and launch, which the launcher repeats.

    python -m tools.gpu.repeats

The calls are those of tools/compiled/calls/, planned for sm_90. No kernel runs, and no GPU is needed. In the other passes torch
computes something between two launches.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from tools.compiled.triton import calls_of
from tools.gpu.cubins import OPERATORS
from vlattn_fast.benchmarks.host import without_launches
from vlattn_fast.dispatch.call import OnCpu, run_gpu_kernels_on_cpu
from vlattn_fast.kernels import _archive, _configurations


class Passes:
    """Stands for the launcher, and notes of each pass whether it only allocates and launches, and what it launches."""

    def __init__(self, launched: list[str]) -> None:
        self.launched, self.is_within = launched, False
        self.repeated: Counter[str] = Counter()
        self.all: Counter[str] = Counter()
        self.sequences: defaultdict[str, set[tuple[str, ...]]] = defaultdict(set)

    def of(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def run(inputs: Any) -> Any:
            if self.is_within:  # a part of another pass
                return function(inputs)
            self.is_within, title = True, f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
            self.launched.clear()
            try:
                with _archive._Allocations() as seen:
                    outputs = function(inputs)
            finally:
                self.is_within = False
            self.all[title] += 1
            self.repeated[title] += seen.is_all
            self.sequences[title].add(tuple(self.launched))
            return outputs

        return run


def counts() -> dict[str, tuple[int, int, int]]:
    """By function: passes that only allocate and launch, all passes, sequences of launches."""
    launched: list[str] = []
    passes = Passes(launched)
    with without_launches(launched), patch.multiple(_archive, on_cpu=passes), patch.object(_configurations, "TARGET", "sm_90"):
        run_gpu_kernels_on_cpu(OnCpu((9, 0)))
        for operator in OPERATORS:
            for call in calls_of(operator).values():
                call()
    return {title: (passes.repeated[title], count, len(passes.sequences[title])) for title, count in sorted(passes.all.items())}


def main() -> None:
    found = counts()
    for title, (repeated, count, sequences) in found.items():
        print(f"{title}: {repeated} of {count}, {sequences} sequences of launches")
    repeated, count, sequences = map(sum, zip(*found.values(), strict=True))
    print(f"{repeated} of {count} passes only allocate and launch; {sequences} sequences of launches")


if __name__ == "__main__":
    main()
