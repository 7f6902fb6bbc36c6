"""Calls whose kernels are compiled into an archive and then launched from it, in a process whose Triton kernels are compiled."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction

import vlattn_fast as va
from tests.helpers import launching
from vlattn_fast.benchmarks._launches import watching
from vlattn_fast.checking import verify
from vlattn_fast.checking.cases import Example
from vlattn_fast.checking.tolerance import Errors, settle
from vlattn_native.compiling import launches_in, write

DTYPES = {80: torch.float16, 90: torch.bfloat16}


def compile_calls(folder: Path, architecture: int, *calls: Callable[[], Any]) -> None:
    """An archive of what these calls launch, as PTX."""
    compiled = [one for call in calls for one in launches_in(call, architecture, as_ptx=True)]
    write(folder / f"sm_{architecture}.zip", compiled, "ptx")


def case_of(operator: str, name: str, differentiable: bool) -> Example:
    case = next(case for case in verify.cases(operators=[operator]) if case.name == name)
    return replace(case, differentiable=case.differentiable and differentiable)


def ratio(folder: Path, architecture: int, operator: str, name: str, differentiable: bool) -> tuple[float, set[str]]:
    """The worst error of a call of `vlattn verify` as a multiple of the allowed one, and the kernels that ran, all of an archive.
    A finding of the emulator raises."""
    torch.set_num_threads(1)
    case, dtype = case_of(operator, name, differentiable), DTYPES[architecture]
    compile_calls(folder, architecture, lambda: verify._run_with_tangents(case, case.in_dtype(dtype), "triton"))
    with launching.emulated(folder, architecture) as launches:
        errors = settle(verify._Problem(case, dtype, "cpu").runs("triton"), enough=lambda: 1)
    return max(one.ratio() for one in errors.values()), {launch.name for launch in launches}


def attend(
    queries: int = 20, keys: int = 20, heads: int = 3, dtype: torch.dtype = torch.float16, is_causal: bool = False
) -> Tensor:
    query, key, value = (torch.randn(2, heads, rows, 16, dtype=dtype) for rows in (queries, keys, keys))
    return va.score_attention(query, key, value, backend="triton", is_causal=is_causal)


def compile_one_call(folder: Path) -> None:
    compile_calls(folder, 80, attend)


def repeated(folder: Path) -> tuple[dict[str, float], dict[str, list[str]], list[str]]:
    """Calls, one after another, whose launches are planned, or repeated from an earlier call: by name the worst error as a
    multiple of the allowed one, and what was planned; and the kernels that a watcher of launches saw in the last one."""
    from vlattn_fast.kernels import score_attention

    torch.set_num_threads(1)
    errors, planned, seen = {}, {}, list[str]()

    def call(query: Tensor, key: Tensor, value: Tensor, by: Any = va.score_attention, **options: Any) -> list[Tensor]:
        out = by(query, key, value, **options)
        return [out, *torch.autograd.grad(out, [query, key, value], torch.linspace(-1, 1, out.numel()).view(out.shape).to(out))]

    def sides(dtype: torch.dtype = torch.float16) -> list[Tensor]:
        return [torch.randn(2, 3, 20, 16, dtype=dtype).requires_grad_() for _ in range(3)]

    def shared() -> list[Tensor]:
        one = torch.randn(2, 3, 20, 16, dtype=torch.float16).requires_grad_()
        return [one, one.view_as(one), one.view_as(one)]

    def packed() -> list[Tensor]:
        return [x.detach().requires_grad_() for x in torch.randn(2, 3, 20, 48, dtype=torch.float16).chunk(3, dim=-1)]

    compile_calls(folder, 80, lambda: call(*sides(), backend="triton"))
    calls = {"one tensor": shared, "first": sides, "second": sides, "packed": packed, "packed again": packed, "third": sides}
    with launching.emulated(folder, 80), ExitStack() as stack:
        for name in ("forward", "backward"):
            function = getattr(score_attention, name).__wrapped__
            stack.callback(replace_launcher, getattr(score_attention, name), function)

            def counted(inputs: Any, name: str = name, function: Any = function) -> Any:
                planned[now].append(name)
                return function(inputs)

            replace_launcher(getattr(score_attention, name), counted)
        for now, make in calls.items():
            planned[now] = []
            tensors = make()
            ours = call(*tensors, backend="triton")
            exact = call(*[x.detach().double().requires_grad_() for x in tensors], by=va.reference.score_attention)
            formula = call(*[x.detach().requires_grad_() for x in tensors], by=va.reference.score_attention)
            pool = Errors()
            if now != "one tensor":
                for each in zip(ours, exact, formula, strict=True):
                    pool.add(*each)
            else:
                pool.add(ours[0], exact[0], formula[0])
            errors[now] = pool.ratio()
        with watching(lambda kernel, named, launch: (seen.append(kernel.fn.__name__), launch())):
            planned["watched"], now = [], "watched"
            call(*sides(), backend="triton")
    return errors, planned, seen


def replace_launcher(guarded: Any, function: Any) -> None:
    """Puts a function in place of the one that `on_device` guards."""
    place = guarded.__code__.co_freevars.index("launcher")
    guarded.__closure__[place].cell_contents = function


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
    compile_one_call(folder)
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
    compile_one_call(folder)
    loaded: list[str] = []
    with launching.planned(folder, 80) as made:
        library = made.library

        def load(image: bytes, symbol: str, shared: int, device: int) -> Any:
            loaded.append(symbol)
            return library.load(image, symbol, shared, device)

        made.library = SimpleNamespace(**{**vars(library), "load": load})  # type: ignore[assignment]
        together = threading.Barrier(threads)

        def launch() -> None:
            together.wait()
            attend()

        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(launch) for _ in range(threads)]:
                done.result()
    return loaded


def of_a_b300(folder: Path) -> tuple[bool, bool]:
    """Whether an archive for sm_100 is that of a device of 10.3, and whether ptxas compiles its kernels for that."""
    compile_calls(folder, 100, attend)
    with launching.planned(folder, 103) as made:
        archive = made.archive(0)
        assert archive is not None
        (entry,) = next(iter(archive.entries.values()))
        ptx = folder / "kernel.ptx"
        ptx.write_bytes(archive.image(entry))
    command = [knobs.nvidia.ptxas_blackwell.path, "-arch=sm_103a", ptx, "-o", folder / "kernel.cubin"]
    return archive.path.name == "sm_100.zip", subprocess.run(command).returncode == 0
