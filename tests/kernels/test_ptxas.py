"""The ptxas that compiles this package's kernels, on stand-ins for Triton's tools."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.runtime.jit import JITFunction

from vlattn_fast.kernels import _ptxas


def tools(ptxas: str, blackwell: str | None) -> Any:
    made = {"ptxas": ptxas, **({} if blackwell is None else {"ptxas_blackwell": blackwell})}
    return SimpleNamespace(**{name: SimpleNamespace(path=f"bin/{name}", version=version) for name, version in made.items()})


@pytest.mark.parametrize(
    "ptxas, blackwell, cuda, taken",
    [
        ("12.8", "12.9", "13.0", True),  # Triton 3.6, torch 2.11
        ("12.8", "12.9", "12.6", True),
        ("12.8", "13.1", "13.0", True),  # Triton 3.7
        ("12.8", "13.1", "12.6", False),  # the driver may be too old
        ("12.8", "13.1", None, True),  # torch for the CPU: nothing runs
        ("12.8", "12.8", "13.0", False),
        ("12.8", None, "13.0", False),
        ("12.9", "13.1", "13.0", False),  # Triton 3.8, or another ptxas that the user names
    ],
)
def test_which_ptxas(monkeypatch: pytest.MonkeyPatch, ptxas: str, blackwell: str | None, cuda: str | None, taken: bool) -> None:
    monkeypatch.setattr(triton.knobs, "nvidia", tools(ptxas, blackwell))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert _ptxas.newer_ptxas() == ("bin/ptxas_blackwell" if taken else None)


def test_only_kernels_of_this_package(monkeypatch: pytest.MonkeyPatch) -> None:
    before = triton.knobs.nvidia.ptxas.path
    monkeypatch.setattr(JITFunction, "_do_compile", lambda self, *_: triton.knobs.nvidia.__dict__.get("ptxas"))
    monkeypatch.setattr(_ptxas, "newer_ptxas", lambda: before)
    _ptxas.install()

    def by_kernel_of(module: str) -> Any:
        kernel = SimpleNamespace(fn=SimpleNamespace(__module__=module))
        return JITFunction._do_compile(kernel, "key")

    assert by_kernel_of("vlattn_fast.kernels.score_attention") is not None
    assert by_kernel_of("somebody_else.kernels") is None
    assert "ptxas" not in triton.knobs.nvidia.__dict__
