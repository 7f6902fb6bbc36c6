"""The kernels that a call launches, and launches again, to be timed by themselves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch

from vlattn_fast.benchmarks._launches import Launch, watching

GRAPH_SECONDS, ROUNDS = 2e-3, 30  # the least time of a replay, and their number
TIMED_BY = {"cuda": f"CUDA graphs in turns, median of {ROUNDS}", "cpu": "one emulated launch"}


def launched(call: Callable[[], Any]) -> list[tuple[str, Launch, Any]]:
    """The launches of a call, and the compiled kernel of each."""
    seen = []

    def see(kernel: Any, named: Mapping[str, Any], launch: Launch) -> None:
        seen.append((kernel.fn.__name__, launch, launch()))

    with watching(see):
        call()
    return seen


def in_turns(every: Sequence[Sequence[Launch]], device: str) -> list[float]:
    """Seconds of each list of launches, one after another, without the host's part: medians over rounds in which each is replayed
    once, so that a change of the clock meets all alike."""
    replays = [_replay(each, device) for each in every]
    rounds = [[replay() for replay in replays] for _ in range(ROUNDS if device == "cuda" else 1)]
    return [median(times) for times in zip(*rounds, strict=True)]


def _replay(each: Sequence[Launch], device: str) -> Callable[[], float]:
    """A function that returns the seconds of these launches, on a device from a CUDA graph of many."""

    def once() -> None:
        for launch in each:
            launch()

    if device == "cpu":

        def emulated() -> float:
            start = time.perf_counter()
            once()
            return time.perf_counter() - start

        return emulated
    once()
    repeats = max(1, round(GRAPH_SECONDS / max(_timed(once), 1e-6)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            once()
    graph.replay()
    return lambda: _timed(graph.replay) / repeats


def _timed(run: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
