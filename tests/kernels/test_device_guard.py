"""Every launcher runs with the device of its tensors as the current one, and obeys torch's switches for tf32."""

import contextlib
import importlib
import pkgutil
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import vlattn_fast.kernels
from vlattn_fast.backends.inputs import Attention
from vlattn_fast.kernels import _device
from vlattn_fast.kernels._device import on_device
from vlattn_fast.kernels._tiles import input_precision

MODULES = [module.name for module in pkgutil.iter_modules(vlattn_fast.kernels.__path__)]
LAUNCHERS = [
    (module, name)
    for module in MODULES
    for name in ("forward", "backward", "step", "step_backward")
    if hasattr(importlib.import_module(f"vlattn_fast.kernels.{module}"), name)
]


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The devices that were made the current one; without a guard that is cuda:0."""
    devices: list[torch.device] = []

    @contextlib.contextmanager
    def guard(device: torch.device) -> Iterator[None]:
        devices.append(device)
        yield
        devices.append(torch.device("cuda", 0))

    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: devices[-1].index if devices else 0)
    return devices


def on(device: str) -> torch.Tensor:
    if torch.cuda.is_available() and (torch.device(device).index or 0) >= torch.cuda.device_count():
        pytest.skip("torch makes no fake tensor on a device that is not there, where there is another")
    with FakeTensorMode():
        return torch.empty(1, 1, 1, 1, device=device)


def test_the_launcher_runs_on_the_device_of_its_tensors(entered: list[torch.device]) -> None:
    @on_device
    def launch(inputs: tuple[Any, ...]) -> int:
        return torch.cuda.current_device()

    assert launch((None, on("cuda:1"), 0.5)) == 1
    assert entered == [torch.device("cuda:1"), torch.device("cuda:0")]
    assert launch(([on("cuda:2")], None)) == 2
    assert launch((Attention(on("cuda:3"), on("cuda:3")), None)) == 3


def test_one_device_has_no_guard(entered: list[torch.device]) -> None:
    assert on_device(lambda inputs: "ran")((on("cuda:0"),)) == "ran"
    assert on_device(lambda inputs: "ran")((torch.empty(1, device="cpu"),)) == "ran"
    assert entered == []


def test_a_package_may_launch_in_place_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """By an entry point of this name; other copies of the kernels, as on the kernel hub, have other names."""
    hook = SimpleNamespace(load=lambda: lambda launch, device: lambda inputs: f"on {device}")
    found = {"vlattn_fast.kernels": [hook]}
    monkeypatch.setattr(_device, "entry_points", lambda group: found[group])
    monkeypatch.setattr(_device, "_hook", _device._hook.__wrapped__)  # uncached
    launch = on_device(lambda inputs: "by Triton")
    assert launch((torch.empty(1),)) == "on cpu"
    found["vlattn_fast.kernels"] = []
    assert launch((torch.empty(1),)) == "by Triton"


@pytest.mark.parametrize("module, name", LAUNCHERS)
def test_every_launcher_is_guarded(module: str, name: str, entered: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs with a first tensor on cuda:1 and nothing else: the guard is entered before the launcher misses the others."""
    launcher = getattr(importlib.import_module(f"vlattn_fast.kernels.{module}"), name)
    inputs_type = get_type_hints(launcher)["inputs"]
    with contextlib.suppress(Exception):
        launcher(inputs_type._make([on("cuda:1"), *[None] * (len(inputs_type._fields) - 1)]))
    assert entered[:1] == [torch.device("cuda:1")]


def test_there_are_launchers_of_every_operator() -> None:
    public = [module for module in MODULES if not module.startswith("_") and module != "congruence_maps"]
    assert {module for module, _ in LAUNCHERS} == set(public)


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As compiled: the interpreter has a precision of its own."""
    monkeypatch.setattr("vlattn_fast.kernels._tiles.INTERPRETED", False)
    before = torch.get_float32_matmul_precision()
    yield
    torch.backends.fp32_precision = "none"
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("settings")
def test_tf32_is_allowed_by_every_switch_of_torch() -> None:
    matmul = torch.backends.cuda.matmul
    assert input_precision() == "bf16x6"
    matmul.allow_tf32 = True
    assert input_precision() == "tf32" and input_precision(torch.bfloat16) == "ieee"  # which says nothing there
    matmul.allow_tf32 = False
    assert input_precision() == "bf16x6"
    torch.set_float32_matmul_precision("high")
    assert input_precision() == "tf32"
    torch.set_float32_matmul_precision("highest")
    matmul.fp32_precision = "tf32"  # torch refuses to say whether allow_tf32 is set from here on
    assert input_precision() == "tf32"
    matmul.fp32_precision = "ieee"
    torch.backends.fp32_precision = "tf32"
    assert input_precision() == "bf16x6"
    matmul.fp32_precision = "none"
    assert input_precision() == "tf32"
