"""The backends of an operator, in the order in which "auto" takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import compute_dtype
from vlattn_fast.backends import reference
from vlattn_fast.dispatch.call import CallShape
from vlattn_fast.dispatch.limits import Limits, accept, cpu_refusals, cuda_refusals, limited, triton_refusals

Refusals = Callable[[CallShape], list[str]]
BACKEND_NAMES = ("auto", "reference", "streaming", "sdpa", "cpu", "triton", "cuda")
Module = ModuleType | Callable[[], ModuleType]


class Backend(NamedTuple):
    """`refusals(call)` lists all reasons why the backend does not support it, in constant words: a size in the words would cost
    torch.compile a graph per size. `module` has `forward` and `backward`, which take the operator's inputs
    (vlattn_fast.backends.inputs), or the operator itself if torch differentiates it (reference, sdpa). One that needs an optional
    package is a function that imports it.

    masks_padding: whether the kernels keep padding, which may be NaN, out of outputs and gradients. For other backends the public
    call copies padded tensors with zeros at padding. lse_dtype: that of the log-sum-exp which the backward pass gets; None for
    the dtype of sums. saves: the outputs that the backward pass uses, if not every backend's does.

    leads: the calls for which "auto" tries the backend before the others, if measurements say so.

    shared_sums: the results of an operator, "gradient of ..." for gradients, whose sums are split by the number of threads or
    processors, and of samples. A call repeats its bits; the bits of these results may differ in another batch or on another
    number of threads. All other results of a sample keep theirs.
    """

    refusals: Refusals
    module: Module
    masks_padding: bool = False
    lse_dtype: torch.dtype | None = None
    saves: tuple[str, ...] = ()
    shared_sums: tuple[str, ...] = ()
    leads: Callable[[CallShape], bool] | None = None


Table = dict[str, Backend]  # without backends that have no kernel of the operator


def table(
    streaming: Module,
    *,
    sdpa: Module | None = None,
    cpu: Module | None = None,
    triton: Module | None = None,
    cuda: Module | None = None,
    limits: Mapping[str, Limits] | None = None,
    masks_padding: tuple[str, ...] = ("cpu", "triton"),
    saves: Mapping[str, tuple[str, ...]] | None = None,
    shared_sums: Mapping[str, tuple[str, ...]] | None = None,
    leads: Mapping[str, Callable[[CallShape], bool]] | None = None,
) -> Table:
    """Returns an operator's backends, of these modules, in the order in which "auto" takes them. `leads` names calls with another
    order.

    `limits` are those of the operator's own kernels, in addition to those of all operators. `masks_padding` names the backends
    whose kernels do, `saves` what backends save, `shared_sums` what tasks share the sums of, `leads` what comes first; see
    `Backend`.

    On the CPU our kernels come before torch's own attention, which is slower in stored rows; on a GPU torch's comes first. CUDA
    C++ comes after Triton: on an H100 it took 3.3 times as long for the congruence loss. "auto" never takes the reference.
    """
    modules: dict[str, tuple[Callable[..., list[str]], Module | None]] = {
        "cpu": (cpu_refusals, cpu),
        "sdpa": (limited, sdpa),
        "triton": (triton_refusals, triton),
        "cuda": (cuda_refusals, cuda),
        "streaming": (limited, streaming),
        "reference": (limited, reference),
    }
    return {
        name: Backend(
            partial(refuses, limits=(limits or {}).get(name, accept)),
            module,
            masks_padding=name in masks_padding,
            lse_dtype=torch.float64 if name == "cpu" else None,  # P = exp(logit - lse) is no more exact than the lse is
            saves=(saves or {}).get(name, ()),
            shared_sums=(shared_sums or {}).get(name, ()),
            leads=(leads or {}).get(name),
        )
        for name, (refuses, module) in modules.items()
        if module is not None
    }


def refusals(backends: Table, name: str, call: CallShape) -> list[str]:
    """Returns all reasons why the backend `name` does not support the call."""
    return backends[name].refusals(call) if name in backends else [f"the operator has no backend {name!r}"]


def lse_dtype(backend: Backend, query: Tensor) -> torch.dtype:
    """Returns the dtype of the log-sum-exp that the backend's backward pass gets."""
    return compute_dtype(query) if backend.lse_dtype is None else backend.lse_dtype
