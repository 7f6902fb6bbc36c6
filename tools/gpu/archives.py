"""Kernels that were compiled ahead, by the launcher in C++ out of an archive, beside the same calls through Triton's loader.

In a rehearsal the launcher has the stand-in for CUDA's driver of the tests of packages/vlattn-native.
"""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from tools.gpu import launches, production
from tools.gpu.session import ROOT, Row
from vlattn_fast.checking import verify
from vlattn_fast.checking.cases import Example
from vlattn_fast.checking.tolerance import settle
from vlattn_fast.kernels import _device

NATIVE = ROOT / "packages" / "vlattn-native"
# which launch ten kernels, forward and backward
CALLS = (("score_attention", "scaled_dot causal"), ("relevancy_attention", "gradient"), ("attention_statistics", "three groups"))
SIZES, DTYPE = "uniter", torch.bfloat16
TIMED = {"cuda": 200, "cpu": 1}  # calls


def cases() -> list[Example]:
    return [production.case_named(operator, name, SIZES) for operator, name in CALLS]


def compiled(item: dict[str, Any], device: str) -> Row:
    """Writes the archive of the calls, and the launcher, into the item's folder. This process launches nothing after it."""
    from vlattn_native import archive, building
    from vlattn_native.compiling import launches_in, write

    folder, architecture = Path(item["folder"]), item["architecture"]
    path = folder / f"sm_{architecture}.zip"
    if not path.exists() or archive.Archive(path).sources != archive.sources():
        as_ptx = device == "cpu" or architecture == 100
        calls = [lambda one=one: verify._run_with_tangents(one, one.in_dtype(DTYPE), "triton") for one in cases()]
        write(path, [one for call in calls for one in launches_in(call, architecture, as_ptx)], "ptx" if as_ptx else "cubin")
    if not (library := folder / archive.LIBRARY.name).exists():
        shutil.copy(building.launcher(), library)
    return {"passed": True}


def measured(item: dict[str, Any], device: str) -> Row:
    """Whether the archive's launches give the formula's results and the bits of Triton's, and the host's microseconds a call."""
    folder, architecture = Path(item["folder"]), item["architecture"]
    ways = {"Triton": _by_triton(device, architecture), "archive": _by_archive(folder, device, architecture)}
    outputs: dict[str, list[dict[str, Tensor]]] = {}
    times, launched, ratios = dict[str, list[float]](), dict[str, list[str]](), list[float]()
    for name, way in ways.items():
        with way:
            runs = [_run(case, device) for case in cases()]
            outputs[name] = [run() for run in runs]
            times[name] = [_host_us(run, device) for run in runs]
            launched[name] = [kernel for run in runs for kernel, _, _ in launches.launched(run)]
            if name == "archive":
                problems = [verify._Problem(case, DTYPE, device, truth_on=device) for case in cases()]
                pools = [pool for each in problems for pool in settle(each.runs("triton"), enough=lambda: 1).values()]
                ratios = [production.ratio_of(pool) for pool in pools]
    pairs = zip(*outputs.values(), strict=True)
    differ = [name for (name, _), (x, y) in zip(CALLS, pairs, strict=True) if not all(torch.equal(x[key], y[key]) for key in x)]
    wrong = f"other bits than Triton's loader: {', '.join(differ)}" if differ else ""
    wrong = wrong or ("" if max(ratios) <= 1.0 else f"{max(ratios)} of the allowed error")
    facts = {
        "kernels": launched["archive"],
        "ratio": max(ratios),
        "host_us": {n: [round(t, 2) for t in x] for n, x in times.items()},
    }
    return {"passed": not wrong, "problem": wrong, **facts}


def _run(case: Example, device: str) -> Callable[[], dict[str, Tensor]]:
    tensors = case.in_dtype(DTYPE, device)
    return lambda: verify._run(case, tensors, "triton")


def _host_us(run: Callable[[], Any], device: str) -> float:
    """Without waiting for the device, which has less to do than the host."""
    start = time.perf_counter()
    for _ in range(TIMED[device]):
        run()
    return (time.perf_counter() - start) / TIMED[device] * 1e6


@contextmanager
def _by_triton(device: str, architecture: int) -> Iterator[None]:
    if device == "cuda":
        yield
        return
    from tools.emulated import triton

    with triton.emulated(architecture):
        yield


@contextmanager
def _by_archive(folder: Path, device: str, architecture: int) -> Iterator[None]:
    """Within it a launch that the archive does not cover raises an error."""
    from vlattn_native import archive

    def uncovered(kernel: Any, **named: Any) -> None:
        raise RuntimeError(f"no archive has this launch of {kernel.fn.__name__}")

    with patch.object(JITFunction, "run", uncovered), patch.object(_device, "_hook", lambda: archive.of):
        with _emulated(folder, architecture) if device == "cpu" else _launching(folder):
            yield


@contextmanager
def _launching(folder: Path) -> Iterator[None]:
    from vlattn_native import archive

    with patch.multiple(archive, FOLDER=folder, LIBRARY=folder / archive.LIBRARY.name):
        made = archive.launching()
    assert made is not None, f"the launcher in {folder} cannot be loaded"
    made.take()
    try:
        yield
    finally:
        made.end()


def _emulated(folder: Path, architecture: int) -> AbstractContextManager[Any]:
    spec = importlib.util.spec_from_file_location("launching", NATIVE / "tests" / "helpers" / "launching.py")
    assert spec is not None and spec.loader is not None
    stand_in = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stand_in)
    made: AbstractContextManager[Any] = stand_in.emulated(folder, architecture)
    return made
