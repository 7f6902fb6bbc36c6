"""Calls whose kernels are compiled into an archive and then launched from it, in a process whose Triton kernels are compiled."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

import vlattn_fast as va
from tools.compiled.cubins import launches_in, write
from tools.emulated import launching
from tools.emulated.package import options_of_process
from vlattn_fast.checking import verify
from vlattn_fast.checking.cases import Example
from vlattn_fast.checking.tolerance import settle
from vlattn_fast.dispatch.call import OnCpu, run_gpu_kernels_on_cpu

DTYPES = {80: torch.float16, 90: torch.bfloat16}


def compile_calls(folder: Path, architecture: int, calls: Iterable[Any], title: str) -> None:
    """An archive of what these calls launch, as PTX."""
    before = run_gpu_kernels_on_cpu(OnCpu(divmod(architecture, 10)))
    try:
        compiled = [one for call in calls for one in launches_in(call, title, architecture, as_ptx=True)]
    finally:
        run_gpu_kernels_on_cpu(before)
    write(folder / f"sm_{architecture}.zip", compiled, "ptx")


def case_of(operator: str, name: str, differentiable: bool) -> Example:
    case = next(case for case in verify.cases(operators=[operator]) if case.name == name)
    return replace(case, differentiable=case.differentiable and differentiable)


def ratio(folder: Path, architecture: int, operator: str, name: str, differentiable: bool) -> tuple[float, set[str]]:
    """The worst error of a call of `vlattn verify` as a multiple of the allowed one, and the kernels that ran, all of an archive.
    A finding of the emulator raises."""
    torch.set_num_threads(1)
    case, dtype = case_of(operator, name, differentiable), DTYPES[architecture]
    compile_calls(folder, architecture, [lambda: verify._run(case, case.in_dtype(dtype), "triton")], case.name)
    with launching.emulated(folder, architecture, options_of_process()) as launches:
        errors = settle(verify._Problem(case, dtype, "cpu").runs("triton"), enough=lambda: 1)
    return max(one.ratio() for one in errors.values()), {launch.name for launch in launches}


def attend(
    queries: int = 20, keys: int = 20, heads: int = 3, dtype: torch.dtype = torch.float16, is_causal: bool = False
) -> Tensor:
    query, key, value = (torch.randn(2, heads, rows, 16, dtype=dtype) for rows in (queries, keys, keys))
    return va.score_attention(query, key, value, backend="triton", is_causal=is_causal)


def coverage(folder: Path) -> dict[str, bool]:
    """Which calls an archive covers that has a call of 20 tokens and 3 heads in float16. The driver ignores launches."""
    calls = {
        "the same": {},
        "as many tokens as a multiple of 16": {"queries": 32, "keys": 32},
        "one query": {"queries": 1},
        "one head": {"heads": 1},
        "16 heads": {"heads": 16},
        "another dtype": {"dtype": torch.bfloat16},
        "causal": {"is_causal": True},
    }
    compile_calls(folder, 80, [attend], "one call")
    left = list[str]()
    with patch.object(JITFunction, "run", lambda kernel, **named: left.append(kernel.fn.__name__)), launching.planned(folder, 80):
        covered = {}
        for name, change in calls.items():
            attend(**change)
            covered[name] = not left
            left.clear()
    return covered


def loads_of_threads(folder: Path, threads: int) -> list[str]:
    """What the driver loaded when several threads launched one kernel for the first time."""
    compile_calls(folder, 80, [attend], "one call")
    loaded: list[str] = []
    with launching.planned(folder, 80) as made:
        library = made.library

        def load(image: bytes, symbol: str, shared: int, device: int) -> Any:
            loaded.append(symbol)
            return library.load(image, symbol, shared, device)

        made.library = SimpleNamespace(load=load)  # type: ignore[assignment]
        together = threading.Barrier(threads)

        def launch() -> None:
            together.wait()
            attend()

        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(launch) for _ in range(threads)]:
                done.result()
    return loaded
