"""Variants for a GPU alone: a variant as a CUDA graph, and SDPA by each of torch's fused kernels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlattn_fast.benchmarks._formula import Run, Tensors
from vlattn_fast.dispatch.table import BACKEND_NAMES

GRAPH = ", graph"  # ends the name of a variant that is replayed
CALLS_BEFORE_CAPTURE = 3  # the last of these calls may not synchronise
SDPA_KERNELS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def more(runs: Mapping[str, Run]) -> dict[str, Run]:
    """Further variants: the bound SDPA by each of its kernels, and SDPA and our backends as CUDA graphs."""
    fused = {f"SDPA {name}": by_kernel(runs["SDPA"], kernel) for name, kernel in SDPA_KERNELS.items() if "SDPA" in runs}
    captured = {name: run for name, run in runs.items() if name in BACKEND_NAMES and name != "reference"}
    captured |= {name: run for name, run in {**runs, **fused}.items() if name.startswith("SDPA")}
    return fused | {f"{name}{GRAPH}": graphed(run) for name, run in captured.items()}


def by_kernel(run: Run, kernel: SDPBackend) -> Run:
    return sdpa_kernel(kernel)(run)


@contextmanager
def without_synchronising() -> Iterator[None]:
    """Inside, torch refuses to wait for the device. A capture in which torch waits fails, and before torch 2.12 the allocator
    then takes the capture for unfinished."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def graphed(run: Run) -> Run:
    """A run captured at its first call, and replayed: the cost of a call without the host. Inputs must stay where they are, and
    the next call overwrites the outputs."""
    made: list[tuple[Any, Tensors]] = []

    def replayed(tensors: Tensors) -> Tensors:
        if not made:
            stream, now = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(now)
            with torch.cuda.stream(stream):
                for _ in range(CALLS_BEFORE_CAPTURE - 1):
                    run(tensors)
                with without_synchronising():
                    run(tensors)
            now.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                outputs = run(tensors)
            made.append((graph, outputs))
        graph, outputs = made[0]
        graph.replay()
        return outputs

    return replayed
