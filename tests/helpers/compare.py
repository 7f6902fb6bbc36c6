"""How tests compare: one tolerance rule, gradients by name, and what an operator allocates.

The rule is that of vlattn_fast/checking/tolerance.py: errors against float64, as a root mean square and at most, are held to
those of the plain formula in the same dtype, pooled over draws of the inputs.

- `assert_all_close_to(fn, reference, inputs, cotangents)` compares all outputs and gradients. It draws again by itself, which
  calls both functions again with every number of inputs and cotangents multiplied by a factor between 0.75 and 1 (equal numbers
  stay equal). `grads=False` compares outputs alone.
- `assert_close_to(got, exact64, formula)` compares tensors that the test made. Where they hold few numbers, give lists: one
  tensor a draw, made with the inputs of `draws(inputs)`.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlattn_fast.backends.cuda import _shared_library
from vlattn_fast.checking.tolerance import ENOUGH, Errors, settle
from vlattn_fast.checking.tolerance import draws as _endless

# draws, if the rule holds by then: ENOUGH for `make cpus`, else two, which see every flaw of tests/power/
SETTLED = ENOUGH if os.environ.get("VLATTN_DRAWS") == "enough" else 2
SLOW = 1  # in Triton's interpreter, in emulations and under sanitizers, if the rule holds by then


def assert_close_to(
    got: Tensor | Sequence[Tensor],
    exact64: Tensor | Sequence[Tensor],
    formula_same_dtype: Tensor | Sequence[Tensor] | None,
    *,
    what: str,
    scale: float = 0.0,
) -> None:
    """`got` is as close to the float64 result as the plain formula in its own dtype allows; NaN and Inf stand in the same places.

    Each is a tensor or a list of tensors, one a draw. `scale` is the least that the output's scale is taken for: the size of
    what was summed, where a result cancels (a gradient that is zero in exact arithmetic).
    """
    errors = Errors(scale)
    ours, exact = _listed(got), _listed(exact64)
    formulas = [None] * len(ours) if formula_same_dtype is None else _listed(formula_same_dtype)
    for x, truth, formula in zip(ours, exact, formulas, strict=True):
        _check_dtypes(x, truth, formula, what)
        errors.add(x, truth, formula)
    assert errors.ratio() <= 1.0, f"{what}: {errors}"


def _listed(x: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [x] if isinstance(x, Tensor) else x


def _check_dtypes(got: Tensor, exact: Tensor, formula: Tensor | None, what: str) -> None:
    assert exact.dtype == torch.float64, f"{what}: the exact result must be float64; got {exact.dtype}"
    if formula is not None:
        assert got.dtype == formula.dtype, f"{what}: dtype must be {formula.dtype}; got {got.dtype}"


def draws(*tensors: Mapping[str, Tensor], most: int = ENOUGH) -> list[tuple[dict[str, Tensor], ...]]:
    """`most` draws of these dicts of tensors: the tensors themselves first."""
    return [group for group, _ in zip(_endless(*tensors), range(most), strict=False)]


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
    scales: Mapping[str, float] | float = 0.0,
    grads: bool = True,
) -> dict[str, Tensor]:
    """Every output and every gradient of `fn` against `reference` in float64 and in the inputs' own dtype.

    Returns what fn gave for `inputs` themselves. Draws follow until each compared output has a few thousand numbers, or the rule
    holds after SETTLED of them (SLOW where these take long). What `fn` and `reference` close over stays as it is.
    `scales`: the least scale by the name of an output or gradient. `grads=False`: the outputs alone, for what has no gradients.
    """
    first: dict[str, Tensor] = {}
    sent = {} if cotangents is None else {str(n): x for n, x in enumerate(cotangents) if x is not None}
    run = outputs_and_grads if grads else _outputs

    def runs() -> Iterator[tuple[dict[str, Tensor], ...]]:
        for drawn, drawn_sent in _endless(inputs, sent):
            by_output = None if cotangents is None else [drawn_sent.get(str(n)) for n in range(len(cotangents))]
            got = run(fn, drawn, by_output)
            first.update({} if first else got)
            exact = run(reference, as_dtype(drawn, torch.float64), by_output)
            formula = run(reference, drawn, by_output) if any(x.dtype != torch.float64 for x in got.values()) else {}
            assert got.keys() == exact.keys(), f"{what}: outputs and gradients must be {list(exact)}; got {list(got)}"
            for name, x in got.items():
                _check_dtypes(x, exact[name], formula.get(name), f"{what} {name}".strip())
            yield got, exact, formula

    with _KernelsOnTheCpu() as slow:
        pools = settle(runs(), scales, lambda: SLOW if slow.ran else SETTLED)
    for name, errors in pools.items():
        assert errors.ratio() <= 1.0, f"{what} {name}: {errors}".strip()
    return first


def _outputs(fn: Callable[..., Any], inputs: Mapping[str, Tensor], cotangents: object) -> dict[str, Tensor]:
    outputs = fn(**inputs)
    return {f"out{n}": out.detach() for n, out in enumerate(outputs if isinstance(outputs, (tuple, list)) else (outputs,))}


class _KernelsOnTheCpu:
    """Within it: `ran`, whether a kernel ran in Triton's interpreter or in an emulation.

    tools/sanitize.py sets VLATTN_TEST_SANITIZED, which counts as one: more numbers are not more addresses.
    """

    def __enter__(self) -> _KernelsOnTheCpu:
        self.ran, self._patch = "VLATTN_TEST_SANITIZED" in os.environ, pytest.MonkeyPatch()
        try:
            from triton.runtime.interpreter import GridExecutor
        except ModuleNotFoundError:
            pass
        else:
            self._watch(GridExecutor, "__call__")
        if "VLATTN_PTX" in os.environ:
            import ptx.triton

            self._watch(ptx.triton.Driver, "launch")
        if os.environ.get("VLATTN_TEST_DEVICE", "cpu") == "cpu":
            self._watch(_shared_library, "_function")  # each call of a kernel asks for the library
        return self

    def _watch(self, owner: Any, name: str) -> None:
        watched = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.ran = True
            return watched(*args, **kwargs)

        self._patch.setattr(owner, name, call)

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


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
