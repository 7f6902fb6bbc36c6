"""Random calls of every operator on every backend: right by the tolerance rule, or an error that names why they are not
supported.

`vlattn verify --fuzz N --seed S` runs the configurations S, S + 1, ..., S + N - 1. A configuration is drawn from its number
alone. `vlattn verify OPERATOR --backend BACKEND --fuzz 1 --seed NUMBER` repeats one.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from vlattn_fast.checking.cases import Example, Tensors, cases_of
from vlattn_fast.checking.cases._dice import FEW_PAIRS, LAYOUTS, PAIRS, VECTOR_LAYOUTS, Dice, lay_out
from vlattn_fast.checking.roundings import OtherRoundings, unluckiest
from vlattn_fast.checking.tolerance import draws, settle
from vlattn_fast.checking.verify import command, floating_outputs, outputs_and_gradients
from vlattn_fast.dispatch import call as calls
from vlattn_fast.ops import OPERATORS

# How often each backend is drawn. Without a GPU the Triton and CUDA C++ kernels are interpreted and emulated, which is slow.
BACKENDS = ("streaming",) * 7 + ("cpu",) * 7 + ("auto",) * 2 + ("sdpa", "triton", "cuda", "reference")
TANGENTS = 0.25  # of the calls with gradients: those of outputs and gradients, which are products with second derivatives
ROUNDINGS = 12  # of the formula; the unluckiest one counts
BY_TIES = ("attention_statistics", "maxsim", "paged_attention_statistics")  # which of equal numbers is the largest is a result
DTYPES = (torch.float32,) * 4 + (torch.bfloat16, torch.float16) * 2 + (torch.float64,)


@dataclass(frozen=True)
class Outcome:
    """The result of one configuration: `ratio` is the worst error over the allowed one, `failure` says what is wrong."""

    seed: int
    operator: str
    backend: str
    dtype: torch.dtype
    ratio: float = 0.0
    worst: str = ""
    refused: str = ""
    failure: str = ""
    drawn: str = ""
    score: str | None = None  # of all calls

    @property
    def passed(self) -> bool:
        return not self.failure and self.ratio <= 1.0

    def repro(self) -> str:
        """Returns the command that runs only this configuration."""
        score = f" --score {self.score}" if self.score else ""
        return f"{command(self.backend)} verify {self.operator} --backend {self.backend} --fuzz 1 --seed {self.seed}{score}"


def fuzz(
    count: int,
    seed: int = 0,
    *,
    operators: Iterable[str] | None = None,
    backends: tuple[str, ...] = BACKENDS,
    score: str | None = None,
) -> Iterator[Outcome]:
    """`count` configurations from number `seed` on, of these backends and these operators, by default all; with `score`, of
    score_attention with this score function."""
    for number in range(seed, seed + count):
        yield run(number, operators=("score_attention",) if score else operators, backends=backends, score=score)


def run(
    seed: int, *, operators: Iterable[str] | None = None, backends: tuple[str, ...] = BACKENDS, score: str | None = None
) -> Outcome:
    """Draws configuration number `seed`, runs it and compares every output and gradient with the formula in float64."""
    if calls.on_cpu:
        calls.on_cpu.reseed()  # so that the configuration by itself is what it is among others
    operator, backend, dtype = drawn(seed, operators, backends)
    # As a backend, the formula also gets these layouts, and torch's product in bfloat16 reads between rows on some CPUs.
    nan = backend != "reference" or dtype.itemsize > 2
    dice = Dice(f"{operator} {backend} {seed}", FEW_PAIRS if backend in ("triton", "cuda") else PAIRS, nan, score)
    example: Example = cases_of(operator).draw(dice, dtype)
    example = _with_other_layouts(example, dice, seed)
    # which gradients are NaN depends on the order of the sums, and autograd leaves NaN out of those of a relu
    if dice.drawn.get("mask") == "float, NaN" or dice.drawn.get("group_bias") == "NaN":
        example = replace(example, differentiable=False)
    if example.differentiable and backend != "sdpa" and random.Random(f"tangents {seed}").random() < TANGENTS:
        # those of gradients not in 16 bits, in which the formula jumps at kinks
        dice.drawn["tangents"] = "outputs" if dtype.itemsize == 2 else "outputs and gradients"
    try:
        with np.errstate(all="ignore"):  # Triton's interpreter computes in NumPy, which warns if float16 overflows
            ratio, worst, refused = _judge(example, dtype, backend, dice)
        failure = ""
    except Exception as error:  # of any kind: the message must name the configuration
        ratio, worst, refused, failure = float("inf"), "", "", f"{type(error).__name__}: {error}"
    choices = ", ".join(f"{name}={value}" for name, value in dice.drawn.items())
    return Outcome(seed, operator, backend, dtype, ratio, worst, refused, failure, choices, score)


def drawn(
    seed: int, operators: Iterable[str] | None = None, backends: tuple[str, ...] = BACKENDS
) -> tuple[str, str, torch.dtype]:
    """Operator, backend and dtype of a configuration, each from its own generator: a shorter list of one changes no other."""
    operator = random.Random(f"operator {seed}").choice(tuple(OPERATORS if operators is None else operators))
    backend = random.Random(f"backend {seed}").choice(backends)
    return operator, backend, random.Random(f"dtype {seed}").choice(DTYPES)


def _with_other_layouts(example: Example, dice: Dice, seed: int) -> Example:
    """The call with half of its tensors that are contiguous, masks, groups and parameters among them, in another layout."""
    chance = random.Random(f"layouts {seed}")

    def placed(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.dim() or not x.is_contiguous() or chance.random() < 0.5:
            return x
        layouts = LAYOUTS[1 if x.dim() == 4 else 2 : -3] if x.dim() > 1 else VECTOR_LAYOUTS  # without those that repeat a part
        dice.drawn[f"layout of {name}"] = layout = chance.choice(layouts)
        return lay_out(x, layout, dice.gap)

    tensors, options = ({name: placed(name, x) for name, x in named.items()} for named in (example.tensors, example.options))
    return replace(example, tensors=tensors, options=options)


def _judge(example: Example, dtype: torch.dtype, backend: str, dice: Dice) -> tuple[float, str, str]:
    """Returns (ratio, the output or gradient with that ratio, why the backend does not support the call).

    A call that passes with its first draw is right. Any other call is judged with as many draws as the rule takes, against the
    formula with other roundings: the plain formula may be exact by luck.
    """
    try:
        errors = settle(islice(_runs(example, dtype, backend, dice, other_roundings=False), 1))
        if any(pool.ratio() > 1.0 for pool in errors.values()):
            errors = settle(_runs(example, dtype, backend, dice, other_roundings=True), enough=lambda: 1)
    except ValueError as refusal:
        if backend not in ("auto", "streaming", "reference") and f"backend={backend!r} cannot run" in str(refusal):
            return 0.0, "", str(refusal)
        raise
    worst = max(errors, key=lambda name: errors[name].ratio())
    return errors[worst].ratio(), f"{worst}: {errors[worst]}", ""


def _runs(
    example: Example, dtype: torch.dtype, backend: str, dice: Dice, other_roundings: bool
) -> Iterator[tuple[Tensors, Tensors, Tensors]]:
    """Draw after draw: ours, the formula in float64, and the formula in the dtype of the call."""
    for number, (tensors,) in enumerate(draws(example.tensors)):
        name = f"{example.operator} {dice.drawn} {number}"
        cotangents = _cotangents(name, dice.gap)
        results = partial(_results, cotangents=cotangents, tangents=dice.drawn.get("tangents", ""))
        before = {name: x._version for name, x in tensors.items()}
        got = results(example, tensors, backend)
        if before != {name: x._version for name, x in tensors.items()}:
            raise AssertionError("an input was written to")
        in_float64 = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
        exact = results(example, in_float64, "")
        if got.keys() != exact.keys():
            raise AssertionError(f"outputs must be {list(exact)}; got {list(got)}")
        formula = results(example, tensors, "")
        for found, x in formula.items():  # derivatives of rows with a tiny sum divide by its powers, beyond the dtype's range
            if not found.startswith("output") and bool((x.isfinite() < exact[found].isfinite()).any()):
                got[found], exact[found] = torch.zeros_like(got[found]), torch.zeros_like(exact[found])
        if other_roundings:
            compares = dice.drawn.get("kind") in ("cacr", "iais_distributed")  # for a maximum, without the index of it
            in_reverse = results(example, in_float64, "", forward_mode=False)  # of a carrier, a rule and no derivative
            alike = [n for n, x in in_reverse.items() if torch.allclose(x, exact[n], rtol=1e-2, atol=1e-6, equal_nan=True)]
            formulas = [formula]
            for n in range(ROUNDINGS):
                keeps_ties = example.operator in BY_TIES or (n % 2 == 0 and not compares)
                with OtherRoundings(f"{name} {n}", dtype, keeps_ties):
                    formulas.append(results(example, tensors, "", forward_mode=False))
            formula |= unluckiest(formulas, {name: exact[name] for name in alike})
        if dtype == torch.float16:
            wide = {name: x.float() if x.is_floating_point() else x for name, x in tensors.items()}
            _drop_doubtful_overflow(got, exact, partial(results, example, wide, ""))
        yield got, exact, formula


def _drop_doubtful_overflow(got: Tensors, exact: Tensors, in_float32: Callable[[], Tensors]) -> None:
    """Sets to 0, in both, the entries at which float16 overflows on one side and the formula in float32 does not say which is
    right.

    For a zero vector, cosine's gradients are sums times 1 / eps = 1e8. Where such a sum cancels, or float32 has lost the scores
    beside a mask of -1e9, only rounding is left, above 65504 or not. A place stays where the formulas in float32 and in float64
    are both above twice that limit, of one sign, or both below half of it; NaN stays everywhere.
    """
    limit = torch.finfo(torch.float16).max
    over = {name: x.isinf() | (exact[name].abs() > limit) for name, x in got.items() if x.dtype == torch.float16}
    if not any(bool(x.any()) for x in over.values()):
        return
    for name, formula in in_float32().items():
        if name in over:
            truth, single = exact[name], formula.double()
            above = (truth.sign() == single.sign()) & (truth.abs() > 2 * limit) & (single.abs() > 2 * limit)
            below = (truth.abs() < limit / 2) & (single.abs() < limit / 2)
            doubtful = over[name] & ~above & ~below & ~got[name].isnan()
            got[name], exact[name] = got[name].masked_fill(doubtful, 0.0), truth.masked_fill(doubtful, 0.0)


def _cotangents(seed: str, gap: float) -> Callable[[list[Tensor]], list[Tensor]]:
    """The same random gradients for every backend and dtype, each in a random layout; made once per dtype of the outputs."""
    by_dtypes: dict[tuple[torch.dtype, ...], list[Tensor]] = {}

    def cotangents(outputs: list[Tensor]) -> list[Tensor]:
        dtypes = tuple(x.dtype for x in outputs)
        if dtypes not in by_dtypes:
            dice = Dice(seed)
            by_dtypes[dtypes] = []
            for x in outputs:
                numbers = dice.randn(*x.shape).bfloat16().to(x.dtype)  # rounded once, so that every dtype gets the same
                if dice.chance(0.2):
                    numbers = torch.ones((), dtype=x.dtype).expand(x.shape)  # the gradient of .sum()
                else:
                    layout = dice.choice.choice(LAYOUTS)
                    numbers = lay_out(numbers, layout, gap) if x.dim() >= 2 else numbers
                by_dtypes[dtypes].append(numbers)
        return by_dtypes[dtypes]

    return cotangents


def _results(
    example: Example,
    tensors: Tensors,
    backend: str,
    *,
    cotangents: Callable[[list[Tensor]], list[Tensor]],
    tangents: str,
    forward_mode: bool = True,
) -> Tensors:
    """Floating outputs and gradients by name, on `backend`; without a backend, of the formula on contiguous tensors. (torch's
    product in bfloat16 reads the gaps between rows of odd size on some CPUs: docs/developers/bugs.md.) `tangents`: of what.
    """
    call = partial(example.call, backend=backend) if backend else OPERATORS[example.operator].formula
    if not backend:
        tensors = {name: x.contiguous() for name, x in tensors.items()}

    def run(leaves: Tensors) -> Any:
        return call(**example.arguments(leaves))

    def gradients(outputs: list[Tensor]) -> list[Tensor]:
        return cotangents(outputs) if backend else [x.contiguous() for x in cotangents(outputs)]

    results = outputs_and_gradients(run, tensors, gradients, example.differentiable)
    tangents_of = _tangents if forward_mode else _tangents_in_reverse
    return results | tangents_of(run, tensors, gradients if "gradients" in tangents else None) if tangents else results


def _tangents(
    call: Callable[[Tensors], Any], tensors: Tensors, cotangents: Callable[[list[Tensor]], list[Tensor]] | None
) -> Tensors:
    """The tangents of the outputs and, with `cotangents`, of the gradients."""
    duals, tangents = {}, _drawn_tangents(tensors)
    with forward_ad.dual_level():
        for name, x in tensors.items():
            plain = x.contiguous() if 0 in x.stride() else x  # a tangent has memory for each of its elements
            duals[name] = forward_ad.make_dual(plain.detach().requires_grad_(), tangents[name])
        outputs = _outputs_and_gradients(call, duals, cotangents, create_graph=False)
        pairs = {name: forward_ad.unpack_dual(x) for name, x in outputs.items()}
        return {f"tangent of {n}": torch.zeros_like(x) if u is None else u.detach() for n, (x, u) in pairs.items()}


def _tangents_in_reverse(
    call: Callable[[Tensors], Any], tensors: Tensors, cotangents: Callable[[list[Tensor]], list[Tensor]] | None
) -> Tensors:
    """The same without forward mode, which torch does not have within a dispatch mode: J u is the gradient of (w^T J) u by w."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    found, tangents = {}, list(_drawn_tangents(tensors).values())
    for name, x in _outputs_and_gradients(call, leaves, cotangents, create_graph=True).items():
        found[f"tangent of {name}"] = torch.zeros_like(x)
        if x.requires_grad:
            w = torch.zeros_like(x).requires_grad_()
            products = torch.autograd.grad(x, list(leaves.values()), w, create_graph=True, materialize_grads=True)
            terms = [(y, u) for y, u in zip(products, tangents, strict=True) if y.requires_grad]
            if terms:
                ys, us = zip(*terms, strict=True)
                (found[f"tangent of {name}"],) = torch.autograd.grad(ys, w, us, retain_graph=True, materialize_grads=True)
    return found


def _drawn_tangents(tensors: Tensors) -> Tensors:
    """Rounded once, like the gradients of outputs."""
    dice = Dice("tangents")
    return {name: dice.randn(*x.shape).bfloat16().to(x.dtype) for name, x in tensors.items()}


def _outputs_and_gradients(
    call: Callable[[Tensors], Any], leaves: Tensors, cotangents: Callable[[list[Tensor]], list[Tensor]] | None, create_graph: bool
) -> Tensors:
    """Floating outputs and, with `cotangents`, gradients, by name, which themselves have derivatives."""
    outputs = floating_outputs(call(leaves))
    used = [x for x in outputs.values() if x.requires_grad]
    if used and cotangents is not None:
        inputs = list(leaves.values())
        grads = torch.autograd.grad(used, inputs, cotangents(used), create_graph=create_graph, materialize_grads=True)
        outputs |= {f"gradient of {name}": x for name, x in zip(leaves, grads, strict=True)}
    return outputs


@dataclass
class Summary:
    """Counts of many outcomes, and the worst outcome that passed."""

    compared: Counter[str] = field(default_factory=Counter)  # by backend
    refused: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)  # the command that repeats the call, and what is wrong
    worst: Outcome | None = None

    def add(self, outcome: Outcome) -> None:
        (self.refused if outcome.refused else self.compared)[outcome.backend] += 1
        if not outcome.passed:
            self.failures.append(f"{outcome.repro()}  # {outcome.failure or outcome.worst} [{outcome.dtype}; {outcome.drawn}]")
        elif self.worst is None or outcome.ratio > self.worst.ratio:
            self.worst = outcome

    def record(self) -> dict[str, Any]:
        """The stored record of a run."""
        return {
            "configurations": self.compared.total() + self.refused.total(),
            "compared": dict(sorted(self.compared.items())),
            "refused": dict(sorted(self.refused.items())),
            "failures": self.failures,
            "worst_ratio": None if self.worst is None else round(self.worst.ratio, 3),
            "worst": None if self.worst is None else self.worst.repro(),
        }

    def lines(self) -> list[str]:
        """The record as lines for the screen."""
        record = self.record()
        counts = ", ".join(f"{name} {count}" for name, count in record["compared"].items())
        return [
            f"{record['configurations']} calls: {self.compared.total()} compared ({counts}), "
            f"{self.refused.total()} not supported, {len(self.failures)} failed",
            f"the worst error that passed is {record['worst_ratio']} of what is allowed: {record['worst']}",
        ]
