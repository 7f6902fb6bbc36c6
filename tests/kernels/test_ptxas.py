"""The ptxas that compiles this package's kernels, on stand-ins for Triton's tools."""

import functools
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.backends.nvidia import compiler
from triton.runtime import _async_compile
from triton.runtime.jit import JITFunction

from vlattn_fast.kernels import _ptxas


def tools(ptxas: str, blackwell: str | None) -> Any:
    made = {"ptxas": ptxas, **({} if blackwell is None else {"ptxas_blackwell": blackwell})}
    return SimpleNamespace(**{name: SimpleNamespace(path=f"bin/{name}", version=version) for name, version in made.items()})


@pytest.mark.parametrize(
    "blackwell, cuda, taken",
    [
        ("12.9", "13.0", True),  # Triton 3.6, torch 2.11
        ("12.9", "12.6", True),
        ("13.1", "13.0", True),  # Triton 3.7
        ("13.1", "12.6", False),  # the driver may be too old
        ("13.1", None, True),  # torch for the CPU: nothing runs
        ("12.8", "13.0", False),
        ("12.6", "13.0", False),
        (None, "13.0", False),
    ],
)
def test_which_ptxas(monkeypatch: pytest.MonkeyPatch, blackwell: str | None, cuda: str | None, taken: bool) -> None:
    monkeypatch.setattr(triton.knobs, "nvidia", tools("12.8", blackwell))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert _ptxas.is_faulty() and _ptxas.newer_ptxas() == ("bin/ptxas_blackwell" if taken else None)


def test_a_triton_without_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nvidia:
        ptxas = SimpleNamespace(path="bin/ptxas", version="12.9")

        @property
        def ptxas_blackwell(self) -> Any:
            raise RuntimeError("Cannot find ptxas-blackwell")

    monkeypatch.setattr(triton.knobs, "nvidia", Nvidia())
    assert not _ptxas.is_faulty() and _ptxas.newer_ptxas() is None


@pytest.fixture
def compiled_by(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The ptxas that is set while a kernel of a module compiles; None for Triton's own."""
    monkeypatch.setattr(JITFunction, "_do_compile", lambda self, *_: triton.knobs.nvidia.__dict__.get("ptxas"))
    monkeypatch.setattr(_ptxas, "is_faulty", lambda: True)
    _ptxas.install()
    return lambda module: JITFunction._do_compile(SimpleNamespace(fn=SimpleNamespace(__module__=module)), "key")


def test_only_kernels_of_this_package(monkeypatch: pytest.MonkeyPatch, compiled_by: Any) -> None:
    before = triton.knobs.nvidia.ptxas.path
    monkeypatch.setattr(_ptxas, "newer_ptxas", lambda: before)
    assert compiled_by("vlattn_fast.kernels.score_attention") is not None
    assert compiled_by("somebody_else.kernels") is None and compiled_by(None) is None
    assert "ptxas" not in triton.knobs.nvidia.__dict__


def test_a_compilation_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    version, mode, before = functools.cache(lambda: 12), object(), triton.knobs.nvidia.ptxas.path

    def compile_it(self: Any, *_: Any) -> None:
        assert _async_compile.active_mode.get() is None and version() == 12
        raise KeyError

    monkeypatch.setattr(compiler, "get_ptxas_version", version)
    monkeypatch.setattr(JITFunction, "_do_compile", compile_it)
    for name, value in (("is_faulty", True), ("newer_ptxas", before)):
        monkeypatch.setattr(_ptxas, name, lambda value=value: value)
    _ptxas.install()
    token = _async_compile.active_mode.set(mode)
    with pytest.raises(KeyError):
        JITFunction._do_compile(SimpleNamespace(fn=SimpleNamespace(__module__="vlattn_fast.kernels.maxsim")), "key")
    assert _async_compile.active_mode.get() is mode and version.cache_info().currsize == 0
    assert "ptxas" not in triton.knobs.nvidia.__dict__
    _async_compile.active_mode.reset(token)


@pytest.mark.parametrize("capability", [(9, 0), (8, 0)])
def test_where_nothing_newer_is_there_hopper_is_warned(
    monkeypatch: pytest.MonkeyPatch, compiled_by: Any, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(_ptxas, "newer_ptxas", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    _ptxas.warn.cache_clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert compiled_by("vlattn_fast.kernels.maxsim") is None and compiled_by("vlattn_fast.kernels.maxsim") is None
    _ptxas.warn.cache_clear()
    assert [("Install triton 3.8" in str(one.message)) for one in seen] == [True] * (capability == (9, 0))
