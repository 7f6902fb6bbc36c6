"""How far a result may be from the float64 one: the one rule of the tests and of `vlattn verify`.

The rule compares two sets of errors against the float64 result, ours and those of the plain formula in the same dtype, pooled
over draws of the inputs:

    rms(ours)     <= 2 * rms(formula) + eps * rms(exact)
    largest(ours) <= max(4 * largest(formula), 16 * rms(formula)) + 2 * eps * largest(exact)

A sum taken in another order has other errors, number by number, but over a few thousand numbers their root mean square hardly
moves. The largest error of few numbers does move, so its bound is wide: it is there for one wrong number among many right ones.
An ulp stands for what any rounding of the result itself costs, where the formula has no error at all. For the root mean
square it is eps * rms(exact): the number that an error of one ulp in every element would give. A float64 result has no better
formula to be held to; its largest error may be 1e-10 of the largest magnitude.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count

import torch
from torch import Tensor

NUMBERS = 3000  # so many errors on each side settle the rule where it holds
ENOUGH = 16  # so do the draws of an output with few numbers
MOST = 128  # draws, before a rule that does not hold is called broken: one pair of numbers that nearly cancel can rule a draw
FLOAT64 = 1e-10


class Errors:
    """The errors of one output, ours and the formula's, pooled over draws.

    `scale` is the least that rms(exact) and largest(exact) are taken for: the size of what was summed, where the result cancels
    (a gradient that is zero in exact arithmetic).
    """

    def __init__(self, scale: float = 0.0) -> None:
        self.scale = scale
        self.draws = self.numbers = 0
        self.dtype: torch.dtype | None = None
        self.mismatch = ""  # why no number was compared: another shape, or NaN and Inf in other places
        self._squares, self._largest = dict.fromkeys(_SIDES, 0.0), dict.fromkeys(_SIDES, 0.0)
        self._counts = dict.fromkeys(_SIDES, 0)

    def add(self, got: Tensor, exact: Tensor, formula: Tensor | None) -> None:
        """One draw: `exact` in float64, `formula` in the dtype of `got` (None for a float64 result)."""
        got, exact = got.detach().to(exact.device), exact.detach()
        self.draws += 1
        self.dtype = got.dtype
        self.mismatch = self.mismatch or _mismatch(got, exact)
        if self.mismatch:
            return
        finite = torch.isfinite(exact.to(got.dtype))  # what float16 cannot hold is Inf
        exact = exact[finite]
        self.numbers += exact.numel()
        self._add("exact", exact)
        self._add("ours", got[finite].double() - exact)
        if got.dtype != torch.float64:
            if formula is None:
                raise TypeError(f"formula must be the plain formula in {got.dtype}; got None")
            error = formula.detach().to(exact.device)[finite].double() - exact
            self._add("formula", error[torch.isfinite(error)])

    def _add(self, side: str, x: Tensor) -> None:
        if x.numel() > 0:
            self._squares[side] += float(x.square().sum())
            self._counts[side] += x.numel()
            self._largest[side] = max(self._largest[side], float(x.abs().max()))

    def rms(self, side: str) -> float:
        """The root mean square of `side`: "ours", "formula" or "exact"."""
        return math.sqrt(self._squares[side] / max(1, self._counts[side]))

    def allowed(self) -> tuple[float, float]:
        """What the root mean square and the largest of our errors may be."""
        largest = max(self._largest["exact"], self.scale)
        if self.dtype == torch.float64:
            return FLOAT64 * largest, FLOAT64 * largest
        eps = 0.0 if self.dtype is None else torch.finfo(self.dtype).eps
        rms = 2 * self.rms("formula") + eps * max(self.rms("exact"), self.scale)
        return rms, max(4 * self._largest["formula"], 16 * self.rms("formula")) + 2 * eps * largest

    def ratio(self) -> float:
        """The worse of both errors over what is allowed: above 1 the rule is broken."""
        if self.mismatch:
            return math.inf
        pairs = zip((self.rms("ours"), self._largest["ours"]), self.allowed(), strict=True)
        return max(error / bound if bound > 0 else (math.inf if error > 0 else 0.0) for error, bound in pairs)

    def __str__(self) -> str:
        if self.mismatch:
            return self.mismatch
        rms, largest = self.allowed()
        return (
            f"{self.numbers} numbers of {self.draws} draws in {self.dtype}: the root mean square of the errors is "
            f"{self.rms('ours'):.3e} where {rms:.3e} is allowed, the largest {self._largest['ours']:.3e} where {largest:.3e} is "
            f"allowed (the formula has {self.rms('formula'):.3e} and {self._largest['formula']:.3e}, the exact numbers "
            f"{self.rms('exact'):.3e} and {self._largest['exact']:.3e})"
        )


_SIDES = ("ours", "formula", "exact")


def settle(
    runs: Iterable[tuple[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Tensor]]],
    scales: Mapping[str, float] | None = None,
    enough: Callable[[], int] = lambda: ENOUGH,
) -> dict[str, Errors]:
    """The errors of each output by name, pooled over `runs`: ours, exact and the formula's results of one draw.

    It draws until each output has NUMBERS errors, or for `enough()` draws. Where the rule does not hold by then it goes on for
    MOST draws at the most. Results in float64 alone need one draw.
    """
    pools: dict[str, Errors] = {}
    for n, (ours, exact, formula) in enumerate(runs, 1):
        for name, got in ours.items():
            pool = pools.setdefault(name, Errors(0.0 if scales is None else scales.get(name, 0.0)))
            pool.add(got, exact[name], formula.get(name))
        if n >= MOST or any(pool.mismatch for pool in pools.values()):
            break
        settled = n >= enough() or all(pool.numbers == 0 or pool.numbers >= NUMBERS for pool in pools.values())
        if all(pool.dtype == torch.float64 for pool in pools.values()):
            break
        if settled and all(pool.ratio() <= 1.0 for pool in pools.values()):
            break
    return pools


def _mismatch(got: Tensor, exact: Tensor) -> str:
    if got.shape != exact.shape:
        return f"shape must be {tuple(exact.shape)}; got {tuple(got.shape)}"
    pattern = exact.to(got.dtype)
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        ours, wanted = kind(got), kind(pattern)
        if not torch.equal(ours, wanted):
            place = (ours != wanted).nonzero()[0].tolist()
            return f"{kind.__name__} must hold in {int(wanted.sum())} places; got {int(ours.sum())}, first another at {place}"
    return ""


def draws(*tensors: Mapping[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], ...]]:
    """The tensors as they are, then again and again with other numbers, without end.

    Each draw multiplies every floating number by a factor between 0.75 and 1 that jumps about with its magnitude, so equal
    numbers stay equal: ties, constants, zeros, NaN, Inf, strides and what lies between the elements are kept, and errors are
    drawn anew. The factors are the same in every run, and the global generators are not touched.
    """
    yield tuple(dict(x) for x in tensors)
    for n in count(1):
        chance = random.Random(n)
        yield tuple({name: _drawn(x, chance.uniform(300.0, 3000.0)) for name, x in group.items()} for group in tensors)


def _drawn(x: Tensor, frequency: float) -> Tensor:
    if not x.is_floating_point() or x.numel() == 0:
        return x
    whole = x.detach().new_empty(0).set_(x.untyped_storage()).double()  # all of it: an element may stand in several places
    factor = 0.875 + 0.125 * torch.sin(frequency * whole.abs().log())
    whole = torch.where(torch.isfinite(factor), factor * whole, whole).to(x.dtype)
    return whole.as_strided(x.shape, x.stride(), x.storage_offset())
