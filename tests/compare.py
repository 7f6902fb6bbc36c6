"""How tests compare: one tolerance rule, gradients by name, and what an operator allocates.

Import with `from compare import ...`; tests/conftest.py puts this folder on the path.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def assert_close_to(
    got: Tensor, exact64: Tensor, formula_same_dtype: Tensor | None, *, what: str, scale: float = 0.0, times: float = 2.0
) -> None:
    """`got` is as close to the float64 result as the plain formula in its own dtype allows.

    Its largest error may be twice that of `formula_same_dtype` plus one ulp of the output's scale (the largest magnitude of
    exact64); a float64 result, which has no better formula to be held to, may be off by 1e-10 of that scale. NaN and Inf must
    stand in the same places, both ways. `scale` is the least that the output's scale is taken for: the size of what was
    summed, where a result cancels (a gradient that is zero in exact arithmetic). `times` other than 2 wants a reason.
    """
    assert got.shape == exact64.shape, f"{what}: shape {tuple(got.shape)}, wanted {tuple(exact64.shape)}"
    assert exact64.dtype == torch.float64, f"{what}: the exact result must be float64, got {exact64.dtype}"
    if formula_same_dtype is not None:
        assert got.dtype == formula_same_dtype.dtype, f"{what}: dtype {got.dtype}, wanted {formula_same_dtype.dtype}"
    got, exact64 = got.detach(), exact64.detach()
    pattern = exact64.to(got.dtype)  # what float16 cannot hold is Inf
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        here, there = kind(got), kind(pattern)
        assert torch.equal(here, there), (
            f"{what}: {kind.__name__} in {int(here.sum())} places, wanted in {int(there.sum())}; "
            f"first difference at {(here != there).nonzero()[0].tolist()}"
        )
    finite = torch.isfinite(pattern)
    if not finite.any():
        return
    wanted = exact64[finite]
    size = max(float(wanted.abs().max()), scale)
    error = float((got[finite].double() - wanted).abs().max())
    if got.dtype == torch.float64:
        of_formula, bound = 0.0, 1e-10 * size
    else:
        assert formula_same_dtype is not None, f"{what}: {got.dtype} needs the formula in the same dtype"
        formula = formula_same_dtype.detach()[finite].double()
        difference = (formula - wanted)[torch.isfinite(formula)].abs()
        of_formula = float(difference.max()) if difference.numel() else 0.0
        bound = times * of_formula + torch.finfo(got.dtype).eps * size
    assert error <= bound, (
        f"{what}: error {error:.3e} is over the bound {bound:.3e} (error of the same-dtype formula {of_formula:.3e}, "
        f"output scale {size:.3e}, {got.dtype})"
    )


def outputs_and_grads(
    fn: Callable[..., Any], inputs: Mapping[str, Tensor], cotangents: Sequence[Tensor | None] | None = None
) -> dict[str, Tensor]:
    """Runs fn(**inputs) and its backward pass: {"out0": ..., "grad query": ...}, detached.

    Inputs keep their strides; every floating one requires a gradient. `cotangents` has one tensor (or None: not used) for
    each output, in any floating dtype; without it the outputs are summed, which sends gradients of stride 0. A gradient
    that autograd leaves out is given as zeros.
    """
    leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    outputs = fn(**leaves)
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    found = {f"out{n}": out.detach() for n, out in enumerate(outputs)}
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    if cotangents is None:
        used = [out.sum() for out in outputs if out.requires_grad]
        sent: list[Tensor] = [torch.ones_like(x) for x in used]
    else:
        pairs = [(out, c) for out, c in zip(outputs, cotangents, strict=True) if c is not None and out.requires_grad]
        used, sent = [out for out, _ in pairs], [_as(c, out.dtype) for out, c in pairs]
    grads = torch.autograd.grad(used, list(wanted.values()), sent, allow_unused=True) if used else [None] * len(wanted)
    for (name, x), grad in zip(wanted.items(), grads, strict=True):
        found[f"grad {name}"] = torch.zeros_like(x) if grad is None else grad.detach()
    return found


def as_dtype(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The floating inputs in another dtype with the same strides; the others as they are."""
    return {name: _as(x, dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def assert_all_close_to(
    fn: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Mapping[str, Tensor],
    cotangents: Sequence[Tensor | None] | None = None,
    *,
    what: str = "",
    scales: Mapping[str, float] | None = None,
    times: float = 2.0,
) -> dict[str, Tensor]:
    """Every output and every gradient of `fn` against `reference` in float64 and in the inputs' own dtype; returns fn's.

    scales: the least scale by the name of an output or gradient.
    """
    got = outputs_and_grads(fn, inputs, cotangents)
    exact = outputs_and_grads(reference, as_dtype(inputs, torch.float64), cotangents)
    formula = outputs_and_grads(reference, inputs, cotangents)
    assert got.keys() == exact.keys(), f"{what}: {list(got)} wanted {list(exact)}"
    for name, x in got.items():
        scale = 0.0 if scales is None else scales.get(name, 0.0)
        assert_close_to(x, exact[name], formula[name], what=f"{what} {name}".strip(), scale=scale, times=times)
    return got


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`; an expanded tensor stays expanded."""
    if x.dtype == dtype:
        return x
    small = x
    for axis, stride in enumerate(x.stride()):
        if stride == 0 and x.shape[axis] > 1:
            small = small.narrow(axis, 0, 1)
    return small.to(dtype).expand(x.shape)


class LargestAllocation(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it: `bytes`, the largest storage that any op created, and `by`, that op; views create none.

    `peak` is the largest sum, at any time, of the storages that were created inside and are still alive (what an op allocates
    and frees within its own C++ code is not seen).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.live = self.peak = 0
        self.by = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        if func.namespace == "vlattn":
            # an operator of ours is Python: what it calls inside is counted, its outputs were counted there
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        result = func(*args, **kwargs)
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and (key := _storage(x)) not in given:
                given.add(key)
                self._created(x.untyped_storage(), str(func))
        return result

    def _created(self, storage: torch.UntypedStorage, by: str) -> None:
        size = storage.nbytes()
        if size > self.bytes:
            self.bytes, self.by = size, by
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.live -= size


def _storage(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def bytes_of(*tensors: Tensor) -> int:
    """The bytes of the tensors' elements."""
    return sum(x.numel() * x.element_size() for x in tensors)
