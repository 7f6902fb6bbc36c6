"""The kernels that a call launches, and one launch again, to be timed by itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from vlattn_fast.benchmarks._launches import Launch, watching

GRAPH_SECONDS, REPLAYS = 2e-3, 30  # the least time of a replay, and their number


def launched(call: Callable[[], Any]) -> list[tuple[str, Launch, Any]]:
    """The launches of a call, and the compiled kernel of each."""
    seen = []

    def see(kernel: Any, named: Mapping[str, Any], launch: Launch) -> None:
        seen.append((kernel.fn.__name__, launch, launch()))

    with watching(see):
        call()
    return seen


def seconds(launches: list[Launch], device: str) -> float:
    """Seconds of all launches, one after another: the median of replays, on a device of a CUDA graph, without the host's part."""

    def once() -> None:
        for launch in launches:
            launch()

    if device == "cpu":
        start = time.perf_counter()
        once()
        return time.perf_counter() - start
    once()
    repeats = max(1, round(GRAPH_SECONDS / max(_timed(once), 1e-6)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            once()
    graph.replay()
    return sorted(_timed(graph.replay) for _ in range(REPLAYS))[REPLAYS // 2] / repeats


def _timed(run: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
