"""Every operator on every backend and dtype against its formula in float64: `vlattn verify`, and the demo's table of checks.

Errors are multiples of what tolerance.py allows, pooled over draws of the inputs. A ratio above 1 is a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vlattn_fast.checking.cases import Example, Sizes, Tensors, cases_of
from vlattn_fast.checking.tolerance import draws, settle
from vlattn_fast.dispatch import call as calls
from vlattn_fast.dispatch.table import BACKEND_NAMES
from vlattn_fast.ops import OPERATORS

BACKENDS = tuple(name for name in BACKEND_NAMES if name != "auto")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def command(backend: str) -> str:
    """The `vlattn` command whose process runs the backend's kernels as this one does."""
    return calls.on_cpu.command if calls.on_cpu and backend in ("triton", "cuda") else "vlattn"


def cases(seed: int = 0, sizes: Sizes | None = None, operators: Iterable[str] | None = None) -> list[Example]:
    """Calls of these operators, by default of all, that together use each score, rule and mask; small ones by default."""
    sizes = Sizes() if sizes is None else sizes
    chosen = OPERATORS if operators is None else operators
    return [case for name in chosen for case in cases_of(name).verify(torch.Generator().manual_seed(seed), sizes)]


@dataclass(frozen=True)
class Result:
    """One operator on one backend in one dtype over all its cases. `ratio`: the worst error as a multiple of the allowed one;
    `worst`: its name; `reasons`: why the backend supports no case."""

    operator: str
    backend: str
    dtype: torch.dtype
    checks: int = 0
    ratio: float = 0.0
    worst: str = ""
    reasons: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.ratio <= 1.0


def verify(
    backends: tuple[str, ...] = BACKENDS,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    device: str = "cpu",
    seed: int = 0,
    operators: Iterable[str] | None = None,
) -> Iterator[Result]:
    """Runs every case of these operators, by default of all, on every backend that takes it: outputs, the gradient of every
    tensor, and the tangents of the outputs."""
    for operator in OPERATORS if operators is None else operators:
        made = cases(seed, operators=[operator])
        for dtype in dtypes:
            problems = [_Problem(case, dtype, device) for case in made]
            for backend in backends:
                yield _result(operator, backend, dtype, device, problems)


class _Problem:
    """A case in one dtype: its draws, each with the exact results and the formula's, made once for all backends."""

    def __init__(self, case: Example, dtype: torch.dtype, device: str, truth_on: str = "cpu") -> None:
        self.case, self._dtype, self._device, self._truth_on = case, dtype, device, truth_on
        self._fresh = draws(case.tensors)
        self._known: list[tuple[Tensors, Tensors, Tensors]] = []

    def draw(self, number: int) -> tuple[Tensors, Tensors, Tensors]:
        while len(self._known) <= number:
            (tensors,) = next(self._fresh)
            case = replace(self.case, tensors=tensors)
            here = case.in_dtype(self._dtype, self._device)
            truth = _run_with_tangents(case, case.in_dtype(self._dtype, self._truth_on), "reference", torch.float64)
            self._known.append((here, truth, _run_with_tangents(case, here, "reference")))
        return self._known[number]

    def runs(self, backend: str) -> Iterator[tuple[Tensors, Tensors, Tensors]]:
        for number in count():
            tensors, truth, formula = self.draw(number)
            yield _run_with_tangents(self.case, tensors, backend), truth, formula


def _result(operator: str, backend: str, dtype: torch.dtype, device: str, problems: list[_Problem]) -> Result:
    checks, ratio, worst = 0, 0.0, ""
    reasons: dict[str, None] = {}
    enough = 1 if device == "cpu" and backend in ("triton", "cuda") else 4  # kernels on the CPU are interpreted or emulated
    for problem in problems:
        tensors = problem.case.in_dtype(dtype, device)
        unsupported = OPERATORS[operator].refusals(backend, problem.case.arguments(tensors))
        reasons |= dict.fromkeys(unsupported)
        if unsupported:
            continue
        for name, errors in settle(problem.runs(backend), enough=lambda: enough).items():
            checks += 1
            if errors.ratio() > ratio or not worst:
                ratio, worst = max(ratio, errors.ratio()), f"{problem.case.name}: {name}"
    return Result(operator, backend, dtype, checks, ratio, worst, () if checks else tuple(reasons))


def _run(case: Example, tensors: Tensors, backend: str, dtype: torch.dtype | None = None) -> Tensors:
    """Floating outputs and gradients by name; with `dtype`, of the same numbers computed in it."""
    inputs = {name: x.to(dtype or x.dtype) for name, x in tensors.items()}
    return outputs_and_gradients(partial(case.run, backend=backend), inputs, partial(_random_like, seed=1), case.differentiable)


def _run_with_tangents(case: Example, tensors: Tensors, backend: str, dtype: torch.dtype | None = None) -> Tensors:
    """Those of `_run`, and the tangents of the outputs."""
    results = _run(case, tensors, backend, dtype)
    if case.differentiable:
        inputs = {name: x.to(dtype or x.dtype) for name, x in tensors.items()}
        results |= _tangents_of_outputs(case, partial(case.run, backend=backend), inputs, backend)
    return results


def _random_like(tensors: Iterable[Tensor], seed: int) -> list[Tensor]:
    """Rounded once, to the coarsest dtype, so that every dtype gets the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=generator).bfloat16().to(x.device, x.dtype) for x in tensors]


def _tangents_of_outputs(case: Example, run: Callable[[Tensors], Any], tensors: Tensors, backend: str) -> Tensors:
    """The tangent of each floating output, by number, for random tangents of all tensors; none if the backend has no forward
    mode."""
    with forward_ad.dual_level():
        if case.operator in OPERATORS and OPERATORS[case.operator].refusals(backend, case.arguments(tensors)):
            return {}
        duals = [forward_ad.make_dual(x, u) for x, u in zip(tensors.values(), _random_like(tensors.values(), 2), strict=True)]
        out = run(dict(zip(tensors, duals, strict=True)))
        pairs = {name: forward_ad.unpack_dual(x) for name, x in floating_outputs(out).items()}
        return {f"tangent of {name}": torch.zeros_like(x) if u is None else u.detach() for name, (x, u) in pairs.items()}


def floating_outputs(out: Any) -> Tensors:
    """The floating tensors of a result, by number; a statistic that is not asked for is None."""
    outputs = enumerate(out if isinstance(out, tuple) else (out,))
    return {f"output {i}": x for i, x in outputs if x is not None and x.is_floating_point()}


def outputs_and_gradients(
    call: Callable[[Tensors], Any], tensors: Tensors, cotangents: Callable[[list[Tensor]], list[Tensor]], differentiable: bool
) -> Tensors:
    """Floating outputs of call(tensors) by number, and the gradient of every tensor by name; inputs keep their strides.

    `cotangents` gives a gradient for each output that has one.
    """
    leaves = {name: x.detach().requires_grad_(differentiable) for name, x in tensors.items()}
    out = call(leaves)
    outputs = floating_outputs(out)
    results = {name: x.detach() for name, x in outputs.items()}
    if used := [x for x in outputs.values() if x.requires_grad]:
        grads = torch.autograd.grad(used, list(leaves.values()), cotangents(used), materialize_grads=True)
        results |= {f"gradient of {name}": x for name, x in zip(leaves, grads, strict=True)}
    return results
