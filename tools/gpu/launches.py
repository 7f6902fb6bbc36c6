"""Watches Triton's launches: the kernels that a call launches, and one launch again, to be timed by itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.runtime.jit import KernelInterface

Launch = Callable[[], Any]  # a launch with its arguments, which stay alive
GRAPH_SECONDS, REPLAYS = 2e-3, 30  # the least time of a replay, and their number


@contextmanager
def watching(see: Callable[[str, Launch], Any]) -> Iterator[None]:
    """`see(name, launch)` in place of each launch."""
    before = KernelInterface.__getitem__

    def watched(kernel: Any, grid: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: see(kernel.fn.__name__, lambda: before(kernel, grid)(*args, **kwargs))

    KernelInterface.__getitem__ = watched
    try:
        yield
    finally:
        KernelInterface.__getitem__ = before


def launched(call: Callable[[], Any]) -> list[tuple[str, Launch, Any]]:
    """The launches of a call, and the compiled kernel of each."""
    seen = []

    def see(name: str, launch: Launch) -> None:
        seen.append((name, launch, launch()))

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
