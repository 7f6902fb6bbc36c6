"""The CUDA C++ kernels built for the host and run on CPU tensors (csrc/host/emulation.h), through the public calls.

build/host is made by CMake and kept. VLATTN_CUDA_LIBRARY names another library: a sanitized build, a broken one, or with
VLATTN_TEST_DEVICE=cuda (`make gpu`) that for the GPU. The tests name no device: what they make lies on the default one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.utils.deterministic

from vlattn_fast.cuda import _shared_library

ROOT = Path(__file__).parents[2]
HOST, SANITIZED = ("-DVLATTN_HOST=ON",), ("-DVLATTN_HOST=ON", "-DVLATTN_SANITIZE=ON")
CUDA = ("-UVLATTN_TARGETS",)  # the targets of CMakeLists.txt, not those of the last build
LATE = {"test_build.py": ("cuda", *CUDA), "test_sanitized.py": ("asan", *SANITIZED)}
LOCKS: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
DEVICE = os.environ.get("VLATTN_TEST_DEVICE", "cpu")


def build(name: str, *options: str, target: str = "all") -> Path:
    """The folder build/`name` with the library, built where something changed; skips where a tool is missing."""
    with LOCKS[name]:
        return _build(name, options, target)


def _build(name: str, options: tuple[str, ...], target: str) -> Path:
    folder = ROOT / "build" / name
    for tool in ("cmake", "ninja", "c++"):
        if shutil.which(tool, path=tools()["PATH"]) is None:
            pytest.skip(f"the CUDA C++ kernels are not tested: {tool} is not installed")
    torch_folder = f"-DVLATTN_TORCH={Path(torch.__file__).parent}"
    configured = _run("cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, torch_folder, *options)
    if configured.returncode != 0 and "CUDAToolkit" in configured.stdout:
        pytest.skip("the CUDA C++ kernels are not tested: the CUDA toolkit, whose headers they need, is not installed")
    assert configured.returncode == 0, configured.stdout
    built = _run("cmake", "--build", folder, "--target", target)
    assert built.returncode == 0, built.stdout
    return folder


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=tools(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def tools() -> dict[str, str]:
    """The environment with ninja, which the tests' own brings along, on the path."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of what takes minutes to build come last: until then it is built beside the others."""
    late = {item.path.name for item in items} & LATE.keys()
    if not late or len(late) == len({item.path.name for item in items}):
        return
    items.sort(key=lambda item: item.path.name in late)
    threading.Thread(target=_build_early, args=(sorted(late),), daemon=True).start()


def _build_early(late: list[str]) -> None:
    for name in late:
        try:
            build(*LATE[name])
        except (pytest.skip.Exception, AssertionError):
            pass  # the test that needs it says so


def sanitizing() -> dict[str, str]:
    """The environment in which Python loads a sanitized library."""
    libraries = [
        subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return {**os.environ, "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}


@pytest.fixture(scope="session")
def library() -> Path:
    if given := os.environ.get("VLATTN_CUDA_LIBRARY"):
        return Path(given)
    return build("host", *HOST) / "libvlattn_host.so"


@pytest.fixture(autouse=True)
def _on_device(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_shared_library, "library", _shared_library.find(library))
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def _poison_in_the_binding() -> Iterator[None]:
    """What the binding allocates, outputs and workspaces, comes full of NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
