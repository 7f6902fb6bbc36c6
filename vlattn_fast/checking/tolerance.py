"""How much a result may differ from the float64 one: the one rule of the tests and of `vlattn verify`.

The rule compares two sets of errors against the float64 result, ours and those of the plain formula in the same dtype, pooled
over draws of the inputs:

    rms(ours)     <= 2 * rms(formula) + eps * rms(exact)
    largest(ours) <= max(4 * largest(formula), 16 * rms(formula)) + 2 * eps * largest(exact)

Another order of summation gives other errors, number by number, but over a few thousand numbers their root mean square hardly
changes. The largest error of few numbers does change, so its bound is wide: the bound catches one wrong number among many right
ones. An ulp stands for the rounding of the result itself, if the formula has no error. For the root mean square the ulp is eps
* rms(exact), as if every element had an error of one ulp.

Before pooling, the numbers of a draw are divided by its level of error: the root mean square of our errors, the formula's and the
ulp together. If a draw nearly cancels (a tiny norm, two logits that tie), one number in it can by luck be off by more than all
other draws. After the division such a draw counts as one among many.

No better formula exists for a float64 result. Its largest error may be 1e-10 of the largest magnitude, and four times the error
of the formula in float64 under other roundings, if a caller passes those (roundings.py).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count

import torch
from torch import Tensor

NUMBERS = 3000  # as many errors on each side settle the rule
ENOUGH = 16  # draws that settle it for an output with few numbers
MOST = 64  # draws before the rule is called broken
FLOAT64 = 1e-10


class Errors:
    """The errors of one output, ours and the formula's, pooled over draws.

    `scale` is a lower bound for rms(exact) and largest(exact): the size of the summands if the exact result cancels to zero.
    """

    def __init__(self, scale: float = 0.0) -> None:
        self.scale = scale
        self.draws = self.numbers = 0
        self.dtype: torch.dtype | None = None
        self.mismatch = ""  # why no number was compared: another shape, or NaN and Inf in other entries
        self._statistics: list[tuple[float, ...]] = []

    def add(self, got: Tensor, exact: Tensor, formula: Tensor | None) -> None:
        """One draw: `exact` in float64, `formula` in the dtype of `got` (None for a float64 result)."""
        got, exact = got.detach().to(exact.device), exact.detach()
        self.draws += 1
        self.dtype = got.dtype
        self.mismatch = self.mismatch or _mismatch(got, exact)
        if self.mismatch:
            return
        finite = torch.isfinite(exact.to(got.dtype))  # a number beyond float16 is Inf
        exact = exact[finite]
        if exact.numel() == 0:
            return
        if formula is None:
            if got.dtype != torch.float64:
                raise TypeError(f"formula must be the plain formula in {got.dtype}; got None")
            error = torch.zeros_like(exact)
        else:
            error = formula.detach().to(exact.device)[finite].double() - exact
            error = torch.where(torch.isfinite(error), error, 0.0)
        self.numbers += exact.numel()
        sides = torch.stack([got[finite].double() - exact, error, exact])
        squares, largest = sides.square().mean(1), sides.abs().amax(1)
        self._statistics.append((exact.numel(), *squares.tolist(), *largest.tolist()))

    def ratio(self) -> float:
        """The worse of both errors over its bound: above 1 the rule is broken."""
        if self.mismatch:
            return math.inf
        if self.dtype is None or not self._statistics:
            return 0.0
        return float(worst_ratio(torch.tensor(self._statistics, dtype=torch.float64), self.dtype, self.scale))

    def __str__(self) -> str:
        if self.mismatch or not self._statistics:
            return self.mismatch or "no finite numbers"
        statistics = torch.tensor(self._statistics, dtype=torch.float64)
        rms = (statistics[:, :1] * statistics[:, 1:4]).sum(0).div(self.numbers).sqrt().tolist()
        largest = statistics[:, 4:].amax(0).tolist()
        return (
            f"{self.ratio():.2f} of what is allowed, {self.numbers} numbers of {self.draws} draws in {self.dtype}: the root mean "
            f"square of the errors is {rms[0]:.3e}, the formula's {rms[1]:.3e}, the largest {largest[0]:.3e} and "
            f"{largest[1]:.3e}; the exact numbers have {rms[2]:.3e} and {largest[2]:.3e}"
        )


def worst_ratio(statistics: Tensor, dtype: torch.dtype, scale: float = 0.0) -> Tensor:
    """The rule. Statistics (..., draws, 7) to (...): the number of errors, the mean squares of ours, the formula's and of the
    exact numbers, and the largest of each."""
    count, ours, formula, exact, most_ours, most_formula, most_exact = statistics.unbind(-1)
    scale = max(scale, torch.finfo(dtype).smallest_normal)  # numbers below it, of float16 6e-5, are as far apart as there
    exact, most_exact = exact.clamp(min=scale**2), most_exact.clamp(min=scale)
    if dtype == torch.float64:
        return _over(most_ours.amax(-1), FLOAT64 * most_exact.amax(-1) + 4 * most_formula.amax(-1))
    eps = torch.finfo(dtype).eps
    ulp = eps * exact.sqrt()
    level = ((ours + formula) / 2 + ulp.square()).sqrt()
    level = torch.where(level > 0, level, 1.0)

    def pooled(squares: Tensor) -> Tensor:
        return ((count * squares / level.square()).sum(-1) / count.sum(-1)).sqrt()

    def largest(x: Tensor) -> Tensor:
        return (x / level).amax(-1)

    rms = 2 * pooled(formula) + pooled(ulp.square())
    most = torch.maximum(4 * largest(most_formula), 16 * pooled(formula)) + 2 * eps * largest(most_exact)
    return torch.maximum(_over(pooled(ours), rms), _over(largest(most_ours), most))


def _over(error: Tensor, allowed: Tensor) -> Tensor:
    return torch.where(error == 0, 0.0, error / allowed)


def settle(
    runs: Iterable[tuple[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Tensor]]],
    scales: Mapping[str, float] | float = 0.0,
    enough: Callable[[], int] = lambda: ENOUGH,
    most: int = MOST,
) -> dict[str, Errors]:
    """The errors of each output by name, pooled over `runs`: ours, exact and the formula's results of one draw. `scales`: one for
    all, or by name.

    The loop draws until each output has NUMBERS errors, or for `enough()` draws. Where the rule does not hold by then, the loop
    goes on to at most `most` draws. Results only in float64 need one draw.
    """
    pools: dict[str, Errors] = {}
    for n, (ours, exact, formula) in enumerate(runs, 1):
        for name, got in ours.items():
            scale = scales if isinstance(scales, float) else scales.get(name, 0.0)
            pool = pools.setdefault(name, Errors(scale))
            pool.add(got, exact[name], formula.get(name))
        if n >= most or any(pool.mismatch for pool in pools.values()):
            break
        settled = n >= enough() or all(
            pool.numbers == 0 or pool.numbers >= NUMBERS or pool.dtype == torch.float64 for pool in pools.values()
        )
        if settled and all(pool.ratio() <= 1.0 for pool in pools.values()):
            break
    return pools


def _mismatch(got: Tensor, exact: Tensor) -> str:
    if got.shape != exact.shape:
        return f"shape must be {tuple(exact.shape)}; got {tuple(got.shape)}"
    pattern = exact.to(got.dtype)
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        ours, expected = kind(got), kind(pattern)
        if not torch.equal(ours, expected):
            index = (ours != expected).nonzero()[0].tolist()
            return f"{kind.__name__} must hold in {int(expected.sum())} entries; got {int(ours.sum())}, first another at {index}"
    return ""


def draws(*tensors: Mapping[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], ...]]:
    """The tensors as they are, then again and again with other numbers, without end.

    Each draw multiplies every floating number by a factor between 0.75 and 1 that varies wildly with its magnitude, so equal
    numbers stay equal. Ties, constants, zeros, NaN, Inf, strides and the gaps between elements stay, and errors are drawn
    anew. The factors are the same in every run, and the global generators stay unchanged.
    """
    yield tuple(dict(x) for x in tensors)
    for n in count(1):
        chance = random.Random(n)
        yield tuple({name: _drawn(x, chance.uniform(300.0, 3000.0)) for name, x in group.items()} for group in tensors)


def _drawn(x: Tensor, frequency: float) -> Tensor:
    if not x.is_floating_point() or x.numel() == 0:
        return x
    whole = x.detach().new_empty(0).set_(x.untyped_storage()).double()  # the whole storage: elements may overlap
    factor = 0.875 + 0.125 * torch.sin(frequency * whole.abs().log())
    whole = torch.where(torch.isfinite(factor), factor * whole, whole).to(x.dtype)
    return whole.as_strided(x.shape, x.stride(), x.storage_offset())
