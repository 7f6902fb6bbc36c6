"""What backends do not support: all reasons at once, in constant words, without a tensor or a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vlattn_fast._ground import extras
from vlattn_fast.backends import native
from vlattn_fast.backends.cuda import _shared_library
from vlattn_fast.dispatch import call as calls
from vlattn_fast.dispatch.call import CallShape

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Limits = Callable[[CallShape], list[tuple[str, bool]]]  # of one operator's kernels: reasons, and whether each holds


def accept(call: CallShape) -> list[Any]:
    """No limits."""
    return []


def limited(call: CallShape, limits: Limits) -> list[str]:
    """Returns the reasons among `limits` that hold."""
    return [reason for reason, holds in limits(call) if holds]


_TRITON_MISSING = extras.missing("triton", 3, 6)
_FAULTY_ON_SM_100 = bool(extras.missing("triton", 3, 9))  # in tensor memory, as the emulator ptx found


def triton_refusals(call: CallShape, limits: Limits = accept) -> list[str]:
    """Returns why a Triton kernel with these `limits` does not run the call."""
    reasons = []
    if _TRITON_MISSING:
        reasons.append(_TRITON_MISSING)
    if call.device_type != "cuda" and not (calls.on_cpu and call.device_type == "cpu"):
        reasons.append("Triton kernels run on CUDA devices (on CPU tensors in Triton's interpreter, TRITON_INTERPRET=1)")
    if call.device_type == "cuda" and torch.version.hip is not None:
        reasons.append("our Triton kernels hold PTX, which AMD GPUs do not run")
    if call.capability is not None and call.capability < (8, 0):
        reasons.append("Triton kernels need a compute capability of 8.0 (Ampere) or more")
    if call.capability is not None and call.capability[0] in (10, 11) and _FAULTY_ON_SM_100:
        reasons.append("Triton before 3.9 compiles races and wrong addresses for sm_100: install triton 3.9")
    if call.dtype not in KERNEL_DTYPES:
        reasons.append("Triton kernels take float16, bfloat16 and float32")
    if max(call.sizes.get("head_dim", 0), call.sizes.get("value_dim", 0)) > 256:
        reasons.append("Triton kernels take a head_dim of at most 256")
    return reasons + limited(call, limits)


def cpu_refusals(call: CallShape, limits: Limits = accept) -> list[str]:
    """Returns why a CPU kernel with these `limits` does not run the call."""
    reasons = []
    if not native.library.exists:
        reasons.append("the CPU kernels are not built (`vlattn info` says why)")
    if call.device_type != "cpu":
        reasons.append("the CPU kernels run on CPU tensors")
    if call.dtype not in KERNEL_DTYPES:
        reasons.append("the CPU kernels take float16, bfloat16 and float32")
    return reasons + limited(call, limits)


def cuda_refusals(call: CallShape, limits: Limits) -> list[str]:
    """Returns why a CUDA C++ kernel with these `limits` does not run the call."""
    reasons = []
    if not _shared_library.library.exists:
        reasons.append("the CUDA C++ kernels are not built (`vlattn info` says why)")
    if call.device_type != _shared_library.library.device_type:
        reasons.append("the CUDA C++ kernels run on CUDA devices (emulated on CPU tensors in a clone of the repository)")
    if call.dtype not in KERNEL_DTYPES:
        reasons.append("the CUDA C++ kernels take float16, bfloat16 and float32")
    if call.capability is not None and call.capability < (8, 0):
        reasons.append("the CUDA C++ kernels need a compute capability of 8.0 (Ampere) or more")
    if call.flags.get("group_bias"):
        reasons.append("the CUDA C++ kernels have no group_bias")
    if reasons and torch.compiler.is_compiling():
        return reasons  # comparing sizes would cost a graph for each outcome
    return reasons + limited(call, limits)
