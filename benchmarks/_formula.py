"""Results beside the formula's: the error in a row, and the tolerance rule, which variants of this package must keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor

from vlattn_fast.checking.tolerance import draws, settle
from vlattn_fast.dispatch.table import BACKEND_NAMES

Tensors = dict[str, Tensor]
Run = Callable[[Tensors], Tensors]  # inputs by name -> comparable results by name

EXPLAIN = "va.explain"  # the variant of tasks on whole models, where the backend is chosen call by call
CAPTURE = "va.nn.capture_relevancy"
EDGES = "va.attribute_edges"
OURS = (*(name for name in BACKEND_NAMES if name not in ("auto", "reference")), EXPLAIN, CAPTURE, EDGES)
WRONG = "the tolerance rule is broken"
ENOUGH, MOST = 4, 16  # draws that settle the rule, and most draws


def ends(x: Tensor, axes: int = 1) -> Tensor:
    """The first and the last entry along the first axes: offsets that are wrong are wrong at the end."""
    for axis in range(axes):
        x = x[(slice(None),) * axis + (slice(None, None, max(1, x.shape[axis] - 1)),)]
    return x


def end(name: str, x: Tensor) -> Tensor:
    """The part that is compared, of a tensor whose first axis is of samples: all heads, since maps are means over them."""
    return ends(x)


def whole(name: str, x: Tensor) -> Tensor:
    return x


class Formula:
    """The formula's results on a part of the inputs, draw by draw: by `truth` in float64, by `plain` in the inputs' dtype."""

    def __init__(self, tensors: Tensors, part: Callable[[str, Tensor], Tensor], truth: Run, plain: Run) -> None:
        self._tensors, self._part, self._truth, self._plain = tensors, part, truth, plain
        self._results = [self._computed()]

    @property
    def exact(self) -> Tensors:
        return self._results[0][0]

    def wrong(self, run: Run, first: Tensors) -> str:
        """Why the results of a variant, whose `first` results are those of the present inputs, break the rule; empty where they
        keep it. Further draws lie in the storage of the inputs, where a CUDA graph reads them."""
        storages = {name: x.detach().untyped_storage() for name, x in self._tensors.items()}
        before: dict[str, torch.UntypedStorage] = {}

        def runs() -> Iterator[tuple[Tensors, Tensors, Tensors]]:
            yield self._compared(first), *self._results[0]
            before.update({name: storage.clone() for name, storage in storages.items()})
            inputs = {name: _over(before[name], x) for name, x in self._tensors.items()}
            for number, (drawn,) in enumerate(islice(draws(inputs), 1, None), 1):
                for name, x in drawn.items():
                    storages[name].copy_(x.untyped_storage())
                if number == len(self._results):
                    self._results.append(self._computed())
                yield self._compared(run(self._tensors)), *self._results[number]

        pools = settle(runs(), enough=lambda: ENOUGH, most=MOST)
        for name, storage in before.items():
            storages[name].copy_(storage)
        return "; ".join(f"{name}: {pool}" for name, pool in pools.items() if not pool.ratio() <= 1.0)

    def _compared(self, results: Tensors) -> Tensors:
        return {name: self._part(name, x.detach()) for name, x in results.items() if name in self.exact}

    def _computed(self) -> tuple[Tensors, Tensors]:
        exact = self._in(self._truth, wide=True)
        return {name: x.double() for name, x in exact.items()}, self._in(self._plain, wide=False)

    def _in(self, call: Run, wide: bool) -> Tensors:
        inputs = {}
        for name, x in self._tensors.items():
            small = self._part(name, x.detach())
            small = small.double() if wide and small.is_floating_point() else small
            inputs[name] = small.requires_grad_(x.requires_grad)
        return {name: x.detach() for name, x in call(inputs).items() if x.is_floating_point()}


def _over(storage: torch.UntypedStorage, x: Tensor) -> Tensor:
    """A tensor like x over another storage."""
    return x.detach().new_empty(0).set_(storage, x.storage_offset(), x.shape, x.stride())


def largest_error(got: Tensors, exact: Tensors | None) -> float | None:
    """The largest error of any output over that output's largest magnitude; None where nothing can be compared. ArithmeticError
    for a NaN or infinite error, which JSON cannot hold: times of wrong numbers are no result."""
    errors = []
    for name, x in got.items():
        if exact is not None and name in exact:
            size = float(exact[name].abs().max())
            errors.append(float((x.detach().double() - exact[name]).abs().max()) / (size or 1.0))
            if not math.isfinite(errors[-1]):
                raise ArithmeticError(f"{name} must be finite as the formula's is; got an error of {errors[-1]}")
    return max(errors) if errors else None
