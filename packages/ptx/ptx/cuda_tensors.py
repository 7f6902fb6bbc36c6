"""Code that asks for "cuda" gets CPU tensors: for tests of Triton kernels, which put their tensors on a GPU.

    with ptx.cuda_tensors.on_cpu(90), ptx.emulated(90):
        x = torch.randn(300, device="cuda")

`x.is_cuda` is true, `x.device` is the CPU. Of torch.cuda there is what tests ask before they launch; streams order nothing, since
each launch has ended when it returns. Events and graphs are not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ptx.architectures import properties

STREAM = SimpleNamespace(cuda_stream=0, synchronize=lambda: None, wait_stream=lambda other: None)
IS_CUDA = Tensor.is_cuda.__get__  # type: ignore[attr-defined]


def _cpu(value: Any) -> Any:
    """The CPU in place of a GPU's name; anything else is as it was."""
    named = isinstance(value, torch.device) or (isinstance(value, str) and value.partition(":")[0] == "cuda")
    return torch.device("cpu") if named and torch.device(value).type == "cuda" else value


class _OnCpu(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: dict[str, Any] | None = None) -> Any:
        named = named or {}
        if function == IS_CUDA:
            return True
        if function is Tensor.cuda:
            return arguments[0]
        if "device" in named:
            named = {**named, "device": _cpu(named["device"])}
            if named.get("pin_memory"):
                named["pin_memory"] = False
        if function in (Tensor.to, Tensor.new_empty, Tensor.new_zeros, torch.set_default_device):
            arguments = tuple(map(_cpu, arguments))
        return function(*arguments, **named)


@contextmanager
def on_cpu(architecture: int) -> Iterator[None]:
    """Within it tensors of "cuda" lie on the CPU, and torch.cuda describes the GPU sm_`architecture`."""
    shared, processors = properties(architecture)
    capability = divmod(architecture, 10)
    described = SimpleNamespace(name=f"ptx sm_{architecture}", major=capability[0], minor=capability[1], warp_size=32)
    described.multi_processor_count, described.shared_memory_per_block_optin = processors, shared
    described.total_memory = 80 << 30
    answers: dict[str, Callable[..., Any]] = dict(
        is_available=lambda: True,
        is_bf16_supported=lambda *_, **__: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=lambda device: None,
        synchronize=lambda device=None: None,
        empty_cache=lambda: None,
        get_device_name=lambda device=None: described.name,
        get_device_capability=lambda device=None: capability,
        get_device_properties=lambda device=None: described,
        current_stream=lambda device=None: STREAM,
        device=lambda device=None: nullcontext(),
        stream=lambda stream=None: nullcontext(),
        is_current_stream_capturing=lambda: False,
        manual_seed=torch.manual_seed,
        manual_seed_all=torch.manual_seed,
    )
    before = {name: getattr(torch.cuda, name) for name in answers}
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    try:
        with _OnCpu():
            yield
    finally:
        for name, function in before.items():
            setattr(torch.cuda, name, function)
