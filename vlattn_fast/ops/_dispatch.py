"""Which backend runs a call, and why each other backend does not: one table per operator, read without a tensor or a GPU."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from vlattn_fast import scores
from vlattn_fast._ground import extras
from vlattn_fast._ground.checks import check_choice
from vlattn_fast._ground.tensors import compute_dtype, mask_padding
from vlattn_fast.backends import native
from vlattn_fast.backends.cuda import _shared_library
from vlattn_fast.ops._registration import as_outputs

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKEND_NAMES = ("auto", "reference", "streaming", "sdpa", "cpu", "triton", "cuda")
AUTO = os.environ.get("VLATTN_BACKEND", "auto")  # the backend that "auto" stands for, in calls of models, too


class Call(NamedTuple):
    """The facts of a call that backends' limits read. It holds no tensor, so a laptop can ask what a backend refuses on a GPU."""

    operator: str
    dtype: torch.dtype
    device_type: str
    sizes: dict[str, int]
    flags: dict[str, Any]
    capability: tuple[int, int] | None = None  # of the CUDA device; None for other or unknown devices, and AMD's

    def __str__(self) -> str:
        architecture = "" if self.capability is None else " (sm_{}{})".format(*self.capability)
        facts = {"dtype": self.dtype, "device": self.device_type + architecture, **self.sizes, **self.flags}
        return f"{self.operator}({', '.join(f'{name}={value}' for name, value in facts.items())})"


def make_call(operator: str, first: Tensor, sizes: dict[str, int], flags: dict[str, Any]) -> Call:
    """The call of `operator` with dtype and device of its first tensor, `first`."""
    device = first.device
    if _PTX and not torch.compiler.is_compiling():
        emulate(_PTX)
    return Call(operator, first.dtype, device.type, sizes, flags, capability(device))


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a CUDA device, and of the CPU where it emulates one. None for other devices and absent ones, and
    for AMD's, whose numbers are others."""
    if device.type == "cpu" and ON_CPU:
        return ON_CPU.capability
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    if not torch.compiler.is_compiling():  # in traced code the capability is a constant, the cache needs guards
        if device.index not in _CAPABILITIES:
            _CAPABILITIES[device.index] = _capability(device)
        return _CAPABILITIES[device.index]
    return _capability(device)


_CAPABILITIES: dict[int | None, tuple[int, int] | None] = {}


def _capability(device: torch.device) -> tuple[int, int] | None:
    if not torch.cuda.is_available():  # tensors without memory may name an absent device
        return None
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor


class Backend(NamedTuple):
    """`refusals(call)` lists all reasons why the backend does not run it, in constant words: a size in the words would cost
    torch.compile a graph per size. `module` is imported at first use. It has `forward` and `backward`, which take the operator's
    inputs (vlattn_fast.backends.inputs), or the operator itself where torch differentiates it (reference, sdpa).

    masks_padding: whether the kernels keep padding, which may be NaN, out of outputs and gradients. For other backends the public
    call copies what is padded with zeros at padding. lse_dtype: that of the log-sum-exp which the backward pass gets; None for
    the dtype of sums. saves: the outputs that the backward pass reads, where not every backend's does.
    """

    refusals: Callable[[Call], list[str]]
    module: str
    masks_padding: bool = False
    lse_dtype: torch.dtype | None = None
    saves: tuple[str, ...] = ()


Table = dict[str, Backend]
Limits = Callable[[Call], list[tuple[str, bool]]]  # of one operator's kernels: reasons, and whether each holds


def accept(call: Call) -> list[Any]:
    """No limits."""
    return []


def limited(call: Call, limits: Limits) -> list[str]:
    """The reasons among `limits` that hold."""
    return [reason for reason, holds in limits(call) if holds]


class OnCpu(NamedTuple):
    """Triton kernels take CPU tensors: in Triton's interpreter, or compiled for a GPU of this capability and emulated by ptx/."""

    capability: tuple[int, int] | None = None


_PTX = os.environ.get("VLATTN_PTX")
ON_CPU = OnCpu() if _PTX or os.environ.get("TRITON_INTERPRET") == "1" else None  # triton reads the second once as well


@functools.cache
def emulate(architecture: str) -> Any:
    """From here on ptx/, a folder beside the package, runs the kernels of GPUs: it sets ON_CPU."""
    root = str(Path(__file__).parents[2])
    if root not in sys.path:
        sys.path.append(root)
    if importlib.util.find_spec("ptx") is None:
        raise ValueError(f"VLATTN_PTX={architecture} needs the folder ptx/ of a clone of the repository; there is none in {root}")
    emulator = importlib.import_module("ptx.package")
    emulator.install(architecture)
    return emulator


_TRITON_MISSING = extras.missing("triton", 3, 6)


def triton_refusals(call: Call, limits: Limits = accept) -> list[str]:
    """Why a Triton kernel with these `limits` does not run the call."""
    reasons = []
    if _TRITON_MISSING:
        reasons.append(_TRITON_MISSING)
    if call.device_type != "cuda" and not (ON_CPU and call.device_type == "cpu"):
        reasons.append("Triton kernels run on CUDA devices (on CPU tensors in Triton's interpreter, TRITON_INTERPRET=1)")
    if call.device_type == "cuda" and torch.version.hip is not None:
        reasons.append("our Triton kernels hold PTX, which AMD GPUs do not run")
    if call.capability is not None and call.capability < (8, 0):
        reasons.append("Triton kernels need a compute capability of 8.0 (Ampere) or more")
    if call.dtype not in KERNEL_DTYPES:
        reasons.append("Triton kernels take float16, bfloat16 and float32")
    if max(call.sizes.get("head_dim", 0), call.sizes.get("value_dim", 0)) > 256:
        reasons.append("Triton kernels take a head_dim of at most 256")
    return reasons + limited(call, limits)


def cpu_refusals(call: Call) -> list[str]:
    """Why the CPU kernels do not run the call."""
    reasons = []
    if not native.library.exists:
        reasons.append("the CPU kernels are not built (`vlattn info` says why)")
    if call.device_type != "cpu":
        reasons.append("the CPU kernels run on CPU tensors")
    if call.dtype not in KERNEL_DTYPES:
        reasons.append("the CPU kernels take float16, bfloat16 and float32")
    return reasons


def cuda_refusals(call: Call, limits: Limits) -> list[str]:
    """Why a CUDA C++ kernel with these `limits` does not run the call."""
    reasons = []
    if not _shared_library.library.exists:
        reasons.append("the CUDA C++ kernels are not built (`vlattn info` says why)")
    if call.device_type != _shared_library.library.device_type:
        reasons.append("the CUDA C++ kernels run on CUDA devices (emulated on CPU tensors, VLATTN_PTX=80)")
    if call.dtype not in KERNEL_DTYPES:
        reasons.append("the CUDA C++ kernels take float16, bfloat16 and float32")
    if call.capability is not None and call.capability < (8, 0):
        reasons.append("the CUDA C++ kernels need a compute capability of 8.0 (Ampere) or more")
    if reasons and torch.compiler.is_compiling():
        return reasons  # comparing sizes would cost a graph for each outcome
    return reasons + limited(call, limits)


def no_cuda_kernel(call: Call) -> list[str]:
    return ["there is no CUDA C++ kernel for this operator"]


def not_in_sdpa(call: Call) -> list[str]:
    return ["torch's scaled_dot_product_attention does not compute this operator"]


def table(
    stem: str,
    *,
    sdpa: Limits | None = None,
    triton: Limits = accept,
    cuda: Limits | None = None,
    masks_padding: tuple[str, ...] = ("cpu", "triton"),
    saves: dict[str, tuple[str, ...]] | None = None,
) -> Table:
    """The backends of the operator `stem` in the order in which "auto" takes them.

    `sdpa`, `triton` and `cuda` are the limits of the operator's own kernels, beside those of all operators; None where there is
    no such kernel. `masks_padding` names the backends whose kernels do, `saves` what backends save; see `Backend`.

    On the CPU our kernels come before torch's own attention, which is slower in stored rows; on a GPU torch's comes first. CUDA
    C++ comes after Triton until it has been measured. "auto" never takes the reference.
    """
    refusals: dict[str, tuple[Callable[[Call], list[str]], str]] = {
        "cpu": (cpu_refusals, "vlattn_fast.backends.cpu"),
        "sdpa": (not_in_sdpa if sdpa is None else partial(limited, limits=sdpa), "vlattn_fast.backends.sdpa"),
        "triton": (partial(triton_refusals, limits=triton), "vlattn_fast.kernels"),
        "cuda": (no_cuda_kernel if cuda is None else partial(cuda_refusals, limits=cuda), "vlattn_fast.backends.cuda"),
        "streaming": (accept, "vlattn_fast.backends.streaming"),
        "reference": (accept, "vlattn_fast.backends.reference"),
    }
    return {
        name: Backend(
            refuses,
            f"{folder}.{stem}",
            masks_padding=name in masks_padding,
            lse_dtype=torch.float64 if name == "cpu" else None,  # P = exp(logit - lse) is no more exact than the lse is
            saves=(saves or {}).get(name, ()),
        )
        for name, (refuses, folder) in refusals.items()
    }


def select(backends: Table, call: Call, backend: Any) -> str:
    """The name of the backend that runs `call`: `backend`, or for "auto" the first without refusals.

    On the CPU "auto" takes no GPU kernel: Triton's interpreter and the host build of CUDA C++ are there for tests, by name. Where
    the environment has VLATTN_BACKEND, its value takes the place of "auto".
    Raises ValueError with all reasons where the named backend refuses the call, and where a variable of the environment names a
    library that is not there.
    """
    check_choice("backend", backend, BACKEND_NAMES)
    if backend == "auto" and AUTO != "auto":
        check_choice("VLATTN_BACKEND in the environment", AUTO, BACKEND_NAMES)
        backend = AUTO
    for name, library in (("cpu", native.library), ("cuda", _shared_library.library)):
        if library.error and (backend == name or (backend == "auto" and call.device_type == library.device_type)):
            raise ValueError(library.error)
    if backend == "auto":
        for name, candidate in backends.items():
            if not candidate.refusals(call) and not (name in ("triton", "cuda") and call.device_type == "cpu"):
                return name
    reasons = backends[backend].refusals(call)
    if reasons:
        raise ValueError(f"backend={backend!r} cannot run {call}: {'; '.join(reasons)}")
    return str(backend)


def choose(
    describe: Callable[..., Call], backends: Table, backend: Any, tensors: tuple[Any, ...], options: tuple[Any, ...]
) -> str:
    """select(backends, describe(*tensors, *options), backend) with a cache, where `describe` checks the arguments of the public
    call. A call with the key of an earlier one skips both. Errors are not cached. stacked_cross_attention, whose checks read
    values, and congruence_loss, whose arguments nest, call `select` directly.
    """
    key = None if torch.compiler.is_compiling() else _cache_key(describe, tensors, (*options, backend))
    chosen = None if key is None else _CHOSEN.get(key)
    if chosen is None:
        chosen = select(backends, describe(*tensors, *options), backend)
        if key is not None:
            if len(_CHOSEN) >= 4096:
                _CHOSEN.clear()
            _CHOSEN[key] = chosen
    return chosen


_CHOSEN: dict[tuple[Any, ...], str] = {}
_PLAIN = {str, bool, int, float, type(None)}
_SCORES = {scores.Dot, scores.ScaledDot, scores.Cosine, scores.General, scores.Additive, scores.Hadamard}


def _cache_key(describe: Callable[..., Call], tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """All that checks and refusals read, which is no tensor's values. None, so that nothing is cached, where they may read more:
    subclasses of tensors, forward-mode tangents, options that are neither plain values nor score functions."""
    kinds = tuple(map(type, options))  # since 1 is equal to True
    if not _PLAIN.issuperset(kinds):
        tensors, options = _unpack_scores(tensors, options)
        kinds = tuple(map(type, options))
    if not _PLAIN.issuperset(kinds) or getattr(forward_ad, "_current_level", -1) >= 0:
        return None
    properties: list[Any] = []
    for x in tensors:
        kind = type(x)
        if kind is Tensor or kind is Parameter:
            properties.append((x.is_nested or x.shape, x.dtype, x.device, x.layout, x.requires_grad))
        elif x is None:
            properties.append(x)
        else:
            return None
    return (
        describe,
        options,
        kinds,
        *properties,
        torch.is_grad_enabled(),
        torch._C._is_any_autocast_enabled() and (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
        ON_CPU,
        native.library.exists,
        _shared_library.library.exists,
        _shared_library.library.device_type,
    )


def _unpack_scores(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Replaces a score function among the options by the name of its class and its fields. Fields that are tensors move to the
    tensors; their names stay among the options."""
    parameters: list[Any] = []
    plain: list[Any] = []
    for x in options:
        if type(x) not in _SCORES:  # a subclass may check more than its fields
            plain.append(x)
            continue
        plain.append(type(x).__name__)
        for name, value in vars(x).items():
            if isinstance(value, Tensor):
                parameters.append(value)
                plain.append(name)
            else:
                plain.append(value)
    return (*tensors, *parameters), tuple(plain)


def lse_dtype(backend: Backend, query: Tensor) -> torch.dtype:
    """The dtype of the log-sum-exp that the backend's backward pass gets."""
    return compute_dtype(query) if backend.lse_dtype is None else backend.lse_dtype


def load(backends: Table, name: str) -> ModuleType:
    """The backend's module, from sys.modules where possible: torch.compile cannot trace an import."""
    module = sys.modules.get(backends[name].module)
    if module is None and _PTX:
        emulate(_PTX)
    return importlib.import_module(backends[name].module) if module is None else module


def launcher(backends: Table, name: str) -> Callable[..., Any]:
    """The function `name` ("forward", ...) of the backend that the inputs name."""
    return lambda inputs: getattr(load(backends, inputs.backend), name)(inputs)


def gradients(backends: Table, name: str) -> Callable[..., tuple[Tensor, ...]]:
    """As `launcher`, of "streaming" where the backend has no such function. The inputs have key, value and key_mask. Gradients
    come as `as_outputs` lays them out."""

    def run(inputs: Any) -> tuple[Tensor, ...]:
        chosen = inputs.backend if hasattr(load(backends, inputs.backend), name) else "streaming"
        if not backends[chosen].masks_padding:
            key, value = mask_padding(inputs.key_mask, inputs.key, inputs.value)
            inputs = inputs._replace(key=key, value=value)
        return as_outputs(inputs.query, getattr(load(backends, chosen), name)(inputs))

    return run
