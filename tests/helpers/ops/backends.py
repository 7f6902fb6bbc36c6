"""The backends that the suites of tests/ops/ run over, and what each of them needs to run here.

A test takes `backend` and names those it runs on: `@on("streaming", "triton")`, or `@each("dtype", streaming=(F64,), triton=LOW)`
where each has choices of its own. `backend` is then the name, ready to be passed to the operator. Nothing is skipped because a
backend refuses it: what a backend takes stands in the suite, and what it does not take is a test with assert_refused.

On the CPU the Triton kernels run in Triton's interpreter, and the CUDA C++ kernels emulated, as nvcc compiles them, where the
package ptx is installed. With VLATTN_PTX=90 the Triton kernels are compiled for that architecture and emulated, too;
a finding raises.
With VLATTN_TEST_DEVICE=cuda (`make gpu`) every backend runs on that device; VLATTN_CUDA_LIBRARY names the library then. The tests
name no device: what they make lies on the default one. The CPU kernels are those that the install has built; they are not tested
on a device.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.deterministic

from tests.helpers.cuda import building
from tests.helpers.ops import interpreter
from vlattn_fast.backends import native
from vlattn_fast.backends.cuda import _shared_library
from vlattn_fast.backends.inputs import Attention, schema_of
from vlattn_fast.dispatch import call as calls

F64 = torch.float64
HALVES = (torch.bfloat16, torch.float16)
LOW = (torch.float32, *HALVES)
DEVICE = os.environ.get("VLATTN_TEST_DEVICE", "cpu")
PTX = os.environ.get("VLATTN_PTX", "")
ROOT = Path(__file__).parents[3]
INTERPRET = DEVICE == "cpu" and not PTX
DTYPES = {
    "reference": (F64, *LOW),
    "streaming": (F64, *LOW),
    "sdpa": (F64, *LOW) if DEVICE == "cpu" else LOW,
    "cpu": LOW,
    "triton": LOW,
    "cuda": LOW,
}


def finest(backend: str) -> torch.dtype:
    """The dtype in which a difference from the formula shows best: float64 where the backend takes it."""
    return DTYPES[backend][0]


def core(backend: str) -> tuple[torch.dtype, ...]:
    """The dtypes of an operator's core case: all of the backend's, but float16 not in the interpreter, where bfloat16 takes the
    same way."""
    return LOW[:2] if backend == "triton" and INTERPRET else DTYPES[backend]


def on(*names: str) -> pytest.MarkDecorator:
    """The test runs once on each of these backends."""
    return pytest.mark.parametrize("backend", names, indirect=True)


def each(argument: str, **choices: Iterable[Any]) -> pytest.MarkDecorator:
    """The test runs on each backend with each of its choices of `argument` (a dtype, or the key of a table of cases)."""
    rows = [pytest.param(name, choice, id=f"{name}-{_label(choice)}") for name in choices for choice in choices[name]]
    return pytest.mark.parametrize(("backend", argument), rows, indirect=["backend"])


def _label(choice: Any) -> str:
    """Of dtypes, names, and tuples of them."""
    parts = map(_label, choice) if isinstance(choice, tuple) else (str(choice).removeprefix("torch."),)
    return " ".join(parts)


def assert_refused(backend: str, words: str, run: Callable[[], Any]) -> None:
    """run() raises ValueError with what the table of backends says of `backend`, and `words` are part of it."""
    with pytest.raises(ValueError, match=rf"backend='{backend}' cannot run .*{re.escape(words)}"):
        run()


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a backend, which is ready while the test runs."""
    with ready(request.param, request.getfixturevalue("cuda_library") if request.param == "cuda" else None):
        yield request.param


@pytest.fixture(scope="session")
def cuda_library() -> Path:
    if named := os.environ.get("VLATTN_CUDA_LIBRARY"):
        return Path(named)
    if DEVICE != "cpu" or not (ROOT / "CMakeLists.txt").exists():
        pytest.skip("the CUDA C++ kernels are not tested: `make gpu` found no nvcc to build them with")
    return building.build(*building.PTX) / "libvlattn_ptx.so"


@contextmanager
def ready(backend: str, library: Path | None = None) -> Iterator[None]:
    """Within it the backend runs on the device, which is the default one; `library` holds the CUDA C++ kernels."""
    # use_deterministic_algorithms imports Inductor, which takes a sanitizer four seconds
    deterministic = torch.get_deterministic_debug_mode()
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        if backend == "triton" and INTERPRET:
            patch.setenv("TRITON_INTERPRET", "1")
            interpreter.make_faster(patch)
            patch.setattr(calls, "on_cpu", calls.OnCpu())
            # what overflows in a kernel overflows without a word, as on a GPU
            stack.enter_context(np.errstate(over="ignore", invalid="ignore"))
        if backend == "triton" and PTX:
            calls.on_cpu.reseed()  # so that a test alone is what it is among others
        if backend == "cpu" and not native.library.exists:
            if not any(map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))):
                pytest.skip("the CPU kernels are not tested: there is no C++ compiler to build them with")
            pytest.fail(f"{native.library.path} is not there: `make venv` builds it, and `vlattn info` says why it did not")
        if backend == "cuda":
            assert library is not None
            if DEVICE == "cpu":
                from ptx.running.reports import Options
                from tools.emulated import cuda

                # exp2, reciprocals and their like are as wrong as documented
                stack.enter_context(cuda.emulated(int(PTX or 90), Options(noise=1), library=library))
            else:
                patch.setattr(_shared_library, "library", _shared_library.find(library))
            # what is allocated for a kernel, outputs and workspaces, comes full of NaN
            torch.set_deterministic_debug_mode("warn")
            patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        if DEVICE != "cpu":  # a default device is a mode, and in a mode every call goes through torch's dispatcher
            torch.set_default_device(DEVICE)
        try:
            yield
        finally:
            if DEVICE != "cpu":
                torch.set_default_device(None)
            torch.set_deterministic_debug_mode(deterministic)


def arguments_of(kind: type[Any], **given: Any) -> tuple[Any, ...]:
    """The arguments of an operator, of whose inputs these are given; others have the defaults of an attention, or are None."""
    absent = Attention._field_defaults
    return tuple([given.get(name, absent.get(name)) for name in schema_of(kind).types])
