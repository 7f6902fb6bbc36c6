"""For every test: fixed seeds, one thread, and no luck with uninitialised memory."""

import tests.helpers.process  # isort: skip  (first; until all is collected, what modules make is not garbage)
import atexit
import gc
import importlib
import os
import pkgutil
import random
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

import vlattn_fast.kernels  # before the variable below is set, which vlattn_fast.dispatch reads
from tools import part

collect_ignore = [] if find_spec("ptx") else ["helpers/emulated"]  # which imports it, and has no doctest

if "VLATTN_PTX" in os.environ:
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton 3.9 takes if it is unset, with a warning
    from tools.emulated import package  # of ptx, whose plugin of pytest is there where it is installed

    def pytest_ptx_emulated(arch: int, options: Any) -> Any:
        """The plugin's context, in which the package's backends for GPUs run on CPU tensors, too."""
        return package.emulated(arch, options)


if os.environ.get("VLATTN_TEST_DEVICE", "cpu") == "cpu" and not {"VLATTN_PTX", "VLATTN_TEST_SANITIZED"} & {*os.environ}:
    # triton.jit asks when it decorates: Triton's own functions at its import, which other packages do, too, and the kernels at
    # theirs, whichever test module is collected first. The variable must not reach what tests start. Under a sanitizer the CPU's
    # kernels run alone.
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton.language  # noqa: F401
        from triton.runtime import interpreter

        # to see whether each sum of integers overflows takes a sixth of the time; tests/kernels/test_wide_strides.py shows it
        interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
        for module in pkgutil.iter_modules(vlattn_fast.kernels.__path__):
            importlib.import_module(f"vlattn_fast.kernels.{module.name}")
    except ModuleNotFoundError as missing:
        if missing.name != "triton":
            raise
    del os.environ["TRITON_INTERPRET"]

with torch.device("cpu"):  # torch keeps which functions obey a default device at the first use: its own, not those of `_poison`
    torch.empty(0)


@pytest.hookimpl(tryfirst=True)  # before the plugin reads its options
def pytest_configure(config: pytest.Config) -> None:
    """VLATTN_PTX=90 is --ptx-arch 90. A process of pytest-xdist, whose status nobody asks for, ends at once; the first process
    would wait 10 seconds for it."""
    if "VLATTN_PTX" in os.environ:
        config.option.ptx_arch = package.architecture_of(os.environ["VLATTN_PTX"])
        options = package.options_of_process()
        config.option.ptx_seed, config.option.ptx_fences = options.seed, options.fences
    if hasattr(config, "workerinput"):
        tests.helpers.process.status = 0


@pytest.hookimpl(tryfirst=True)  # before `-m` selects by the marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what compares with the formula, and keeps a shard: `make gpu` runs several processes side by side, and a part of
    `make test-all` is one."""
    from tests.helpers.accuracy import compares

    for item in items:
        if isinstance(item, pytest.Function) and compares(item.function):
            item.add_marker("accuracy")
    part.pytest_collection_modifyitems(items)


pytest_runtest_setup = part.pytest_runtest_setup


def pytest_collection_finish() -> None:
    """Modules and tests stay to the end, and the garbage collector takes a second to go through them."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def _garbage() -> Iterator[None]:
    """So do the modules that tests import, and what these remember."""
    yield
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """All is collected once, for errors in finalizers; pytest would then go through it twice more."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)


# torch.manual_seed keeps a stack for each kind of GPU that is not there, and with it half of what pytest costs per test
SEED = torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed


@pytest.fixture(autouse=True)
def _seeds() -> None:
    SEED(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods without options are the published forms: the formulas of the test hold nothing fixed. That constants change nothing
    else is what tests/interpret/methods/test_freeze.py compares."""
    from vlattn_fast.interpret.relevancy.methods.registry import METHODS

    for kind in METHODS.values():
        monkeypatch.setattr(kind, "default_freeze", ())


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def threads() -> Iterator[None]:
    """The test may set the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def double() -> Iterator[None]:
    """Models are made and run in float64."""
    from tools.tiny_models.stored import in_double

    with in_double():
        yield


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """What the package allocates uninitialised comes full of NaN, or of the largest integer. Emulated kernels may not read it.

    An output that is not written everywhere then fails the comparison instead of passing on fresh, zeroed pages. The patch is not
    that of the fixture `monkeypatch`, which would then be undone after all other fixtures, and bring back what they had set.
    """
    if "VLATTN_PTX" in os.environ:  # the plugin's context does it
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch, "empty_permuted"),
            (torch.Tensor, "new_empty"),
            (torch.Tensor, "new_empty_strided"),
        ):
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield


def _poisoned(allocate: Callable[..., Any]) -> Callable[..., Any]:
    def poisoned(*args: Any, **kwargs: Any) -> Any:
        made = allocate(*args, **kwargs)
        if torch.compiler.is_compiling() or not _ours(sys._getframe(1)):
            return made
        if made.dtype == torch.bool:
            return made.fill_(True)
        if made.is_floating_point() or made.is_complex():
            return made.fill_(torch.nan)
        return made.fill_(torch.iinfo(made.dtype).max)

    return poisoned


def _ours(frame: Any) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith("vlattn_fast")
