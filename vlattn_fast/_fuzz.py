"""Random calls of every operator on every backend: right by the rule of _tolerance, or refused by name.

`vlattn verify --fuzz N --seed S` runs the configurations S, S + 1, ..., S + N - 1. Each is drawn from its number alone, and is
repeated by its number with its operator and backend: `vlattn verify OPERATOR --backend BACKEND --fuzz 1 --seed NUMBER`.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlattn_fast import reference
from vlattn_fast._fuzz_cases import DRAWS, FEW_PAIRS, LAYOUTS, PAIRS, Dice, Draw, Tensors, lay_out
from vlattn_fast._tolerance import FLOAT64, draws, settle
from vlattn_fast.cuda import _shared_library
from vlattn_fast.ops import OPERATORS as MODULES
from vlattn_fast.verify import outputs_and_gradients

OPERATORS = tuple(DRAWS)
PUBLIC = {name: getattr(module, name) for module in MODULES.values() for name in OPERATORS if hasattr(module, name)}
# How often each is drawn. The Triton and CUDA C++ kernels are interpreted and emulated where there is no GPU, which is slow.
BACKENDS = ("streaming",) * 7 + ("cpu",) * 7 + ("auto",) * 2 + ("sdpa", "triton", "cuda", "reference")
DTYPES = (torch.float32,) * 4 + (torch.bfloat16, torch.float16) * 2 + (torch.float64,)


@dataclass(frozen=True)
class Outcome:
    """What came of one configuration: `ratio` is the worst error over what is allowed, `failure` says what is wrong."""

    seed: int
    operator: str
    backend: str
    dtype: torch.dtype
    ratio: float = 0.0
    worst: str = ""
    refused: str = ""
    failure: str = ""
    facts: str = ""

    @property
    def passed(self) -> bool:
        return not self.failure and self.ratio <= 1.0

    def repro(self) -> str:
        """The command that runs this configuration alone."""
        emulated = {"triton": "TRITON_INTERPRET=1 ", "cuda": f"VLATTN_CUDA_LIBRARY={_shared_library.library.path} "}
        prefix = emulated.get(self.backend, "")
        return f"{prefix}vlattn verify {self.operator} --backend {self.backend} --fuzz 1 --seed {self.seed}"


def fuzz(
    count: int, seed: int = 0, *, operators: tuple[str, ...] = OPERATORS, backends: tuple[str, ...] = BACKENDS
) -> Iterator[Outcome]:
    """`count` configurations from number `seed` on, of these operators and backends."""
    for number in range(seed, seed + count):
        yield run(number, operators=operators, backends=backends)


def run(seed: int, *, operators: tuple[str, ...] = OPERATORS, backends: tuple[str, ...] = BACKENDS) -> Outcome:
    """Draws configuration number `seed`, runs it and compares every output and gradient with the formula in float64."""
    operator, backend, dtype = drawn(seed, operators, backends)
    # torch's product in bfloat16 reads what lies beside a row of odd size (docs/bugs.md), on some CPUs, and so does the formula
    nan = backend != "reference" or dtype.itemsize > 2
    dice = Dice(f"{operator} {backend} {seed}", FEW_PAIRS if backend in ("triton", "cuda") else PAIRS, nan)
    draw = DRAWS[operator](dice, dtype)
    if dice.facts.get("mask") == "float, NaN":
        draw.differentiable = False  # which gradients are NaN depends on the order of the sums
    try:
        with np.errstate(all="ignore"):  # Triton's interpreter computes in NumPy, which warns where float16 overflows
            ratio, worst, refused = _judge(draw, backend, dice)
        failure = ""
    except Exception as error:  # whatever it is, the configuration is to be named
        ratio, worst, refused, failure = float("inf"), "", "", f"{type(error).__name__}: {error}"
    facts = ", ".join(f"{name}={value}" for name, value in dice.facts.items())
    return Outcome(seed, operator, backend, dtype, ratio, worst, refused, failure, facts)


def drawn(
    seed: int, operators: tuple[str, ...] = OPERATORS, backends: tuple[str, ...] = BACKENDS
) -> tuple[str, str, torch.dtype]:
    """Operator, backend and dtype of a configuration; each has a generator of its own, so fewer of one leave the others."""
    operator = random.Random(f"operator {seed}").choice(operators)
    backend = random.Random(f"backend {seed}").choice(backends)
    return operator, backend, random.Random(f"dtype {seed}").choice(DTYPES)


def _judge(draw: Draw, backend: str, dice: Dice) -> tuple[float, str, str]:
    """(ratio, what has it, why the backend refuses the call).

    One draw that passes by itself is enough here. One that does not is judged with as many others as the rule takes.
    """
    scales: dict[str, float] = {}

    def runs() -> Iterator[tuple[Tensors, Tensors, Tensors]]:
        for number, (tensors,) in enumerate(draws(draw.tensors)):
            cotangents = partial(_cotangents, f"{draw.operator} {dice.facts} {number}", dice.gap)
            before = {name: x._version for name, x in tensors.items()}
            got = _results(draw, tensors, backend, cotangents)
            if before != {name: x._version for name, x in tensors.items()}:
                raise AssertionError("an input was written to")
            in_float64 = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
            exact = _results(draw, in_float64, "", cotangents)
            formula = {} if draw.dtype == torch.float64 else _results(draw, tensors, "", cotangents)
            if got.keys() != exact.keys():
                raise AssertionError(f"outputs must be {list(exact)}; got {list(got)}")
            if draw.dtype == torch.float16:
                wide = {name: x.float() if x.is_floating_point() else x for name, x in tensors.items()}
                _drop_doubtful_overflow(got, exact, partial(_results, draw, wide, "", cotangents))
            if not scales:
                scales.update(_least_scales(got, exact, draw, tensors, backend, dice.facts))
            yield got, exact, formula

    try:
        errors = settle(runs(), scales, enough=lambda: 1)
    except ValueError as refusal:
        if backend not in ("auto", "streaming", "reference") and f"backend={backend!r} cannot run" in str(refusal):
            return 0.0, "", str(refusal)
        raise
    worst = max(errors, key=lambda name: errors[name].ratio())
    return errors[worst].ratio(), f"{worst}: {errors[worst]}", ""


def _drop_doubtful_overflow(got: Tensors, exact: Tensors, in_float32: Callable[[], Tensors]) -> None:
    """Sets to 0, in both, the places where float16 overflows on one side and the formula in float32 does not say which is right.

    Behind a zero vector cosine's gradients are sums times 1 / eps = 1e8. Where such a sum cancels, or float32 has lost the scores
    beside a mask of -1e9, what is left is rounding, and it is above 65504 or not. A place stays where the formulas in float32 and
    in float64 are both above twice that limit, of one sign, or both below half of it; NaN stays everywhere.
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


def _least_scales(
    got: Tensors, exact: Tensors, draw: Draw, tensors: Tensors, backend: str, facts: dict[str, Any]
) -> dict[str, float]:
    """What the scale of each output is at least taken for, where the formula happens to make no error at all.

    - A gradient may be zero in exact arithmetic: a softmax over one key has none, and P (dP - sum P dP) is then exactly 0 in the
      formula, while other ways to the same difference leave a rounding error of what was summed. That is the scale.
    - Attention kernels in 16 bits take delta = sum(dO * O) from the 16-bit output, as FlashAttention does. Where a row has one
      key, dP - delta is then an ulp of 16 bits and not 0. (With delta from a float32 output the worst seed seen, 20077 of
      score_attention in Triton, fell from 2.4 to 0.4 of what is allowed.) The gradient of the value takes no delta.
      PyTorch's fused CPU kernel, behind streaming, does so, too; one-hot keys give one of them all of a row's weight (32023 of
      relevancy_attention: 1.08).
    - Of 16-bit calls they multiply r with Abar in tf32, which has float16's digits. The formula has a single key's Abar over its
      row sum as exactly 1, and the carrier's gradient is float32 (30348 of relevancy_attention in Triton: 5e-4 of it).
    - The float32 log-sum-exp of 16-bit calls may be off by an ulp of 16 bits: cosine multiplies unit vectors rounded to 16 bits,
      and PyTorch's fused CPU kernel takes a coarser exponential of 16-bit calls (1.7e-5 seen, 1e-7 where tiles compute it).
    - Float64 results have no formula to be held to, and the truth is rounded, too: to an ulp of what was summed. The slope of a
      saturated tanh is what is left of 1 - tanh^2 (15884 of score_attention in streaming: 3e-15, largest gradient 7e-6).
    - Kernels take tanh(x) as 2 / (1 + e^-2x) - 1, to an ulp of 1. Where q and k are small, tanh is the bias's but for a
      thousandth, and the vector's gradient, whose weights sum to 0, keeps only that (14047 of score_attention in CUDA C++: 1.03).
    - Equal scores give the formula P = 1 / M exactly, however large they are. Kernels take P = exp(logit - lse) with both rounded
      to their ulp (9756 of attention_statistics in Triton: 1.07).
    - One-hot keys that share their entry have one logit, and the gradient at that entry is a sum of P (dP - sum P dP), which is 0
      in exact arithmetic: what the CPU's kernels leave is the rounding of what was summed, 2.5 times the formula's (412 of
      relevancy_attention: 1.15).
    - Base-2 logits near -1e4 are rounded to their own ulp. Those of the formula, where the scores are round numbers, are exact.
    """
    sizes = [float(x.double().nan_to_num(0.0, 0.0, 0.0).square().mean().sqrt()) for x in tensors.values() if x.numel()]
    size = max(sizes, default=0.0) * math.sqrt(max(x.shape[-1] for x in tensors.values()))  # of a product over the features
    rows = max((x.shape[-2] for x in tensors.values() if x.dim() > 1), default=1)
    single_kernel = draw.dtype == torch.float32 and backend in ("triton", "cuda")
    flash = backend in ("triton", "cuda") or (backend in ("auto", "streaming") and facts.get("values") == "one-hot")
    delta_in_16_bits = draw.operator in ("score_attention", "relevancy_attention") and flash
    scales = {}
    for name, x in got.items():
        finite = exact[name][exact[name].isfinite()]
        largest = float(finite.abs().max()) if finite.numel() else 0.0
        scale = size if largest < 1e-9 * size else 0.0
        if delta_in_16_bits and x.dtype.itemsize == 2 and name.startswith("gradient") and name != "gradient of value":
            scale = size
        if backend == "triton" and draw.dtype.itemsize == 2 and name == "gradient of carrier" and facts["M"] == 1:
            scale = max(scale, largest * torch.finfo(draw.dtype).eps / torch.finfo(x.dtype).eps)
        if draw.dtype == torch.float64 and name.startswith("gradient"):
            scale = max(scale, size * math.sqrt(rows) * torch.finfo(torch.float64).eps / FLOAT64)
        if backend in ("auto", "cpu") and facts.get("values") == "one-hot" and name in ("gradient of query", "gradient of key"):
            scale = max(scale, size)
        if single_kernel and facts.get("values") == "small" and name == "gradient of vector":
            scale = max(scale, size)
        if single_kernel and facts.get("values") == "constant" and draw.operator == "attention_statistics":
            dim = facts["D"]
            scale = max(scale, largest * (dim**-0.5 if facts["scale"] is None else abs(facts["scale"])) * dim * 0.75**2)
        if draw.operator == "score_attention" and name == "output 1" and draw.dtype.itemsize == 2:
            scale = max(scale, largest * torch.finfo(draw.dtype).eps / torch.finfo(x.dtype).eps)
        if facts.get("finite") == "-1e4" and backend in ("triton", "cuda"):
            scale = max(scale, 1e4 * largest)
        scales[name] = scale
    return scales


def _cotangents(seed: str, gap: float, outputs: list[Tensor]) -> list[Tensor]:
    """The same random gradients for every backend and dtype, in layouts of their own."""
    dice = Dice(seed)
    dice.gap = gap
    return [_cotangent(dice, x) for x in outputs]


def _cotangent(dice: Dice, x: Tensor) -> Tensor:
    numbers = dice.randn(*x.shape).bfloat16().to(x.dtype)  # rounded once, so that every dtype gets the same
    if dice.chance(0.2):
        return torch.ones((), dtype=x.dtype).expand(x.shape)  # what .sum() sends
    layout = dice.choice.choice(LAYOUTS)
    return lay_out(numbers, layout, dice.gap) if x.dim() >= 2 else numbers


def _results(draw: Draw, tensors: Tensors, backend: str, cotangents: Callable[[list[Tensor]], list[Tensor]]) -> Tensors:
    """Floating outputs and gradients by name, on `backend` or, without one, of the formula."""
    call = partial(PUBLIC[draw.operator], backend=backend) if backend else getattr(reference, draw.operator)
    return outputs_and_gradients(lambda leaves: call(**draw.arguments(leaves)), tensors, cotangents, draw.differentiable)


@dataclass
class Summary:
    """Counts of many outcomes, and the worst of those that passed."""

    compared: Counter[str] = field(default_factory=Counter)  # by backend
    refused: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)  # the command that repeats each, and what is wrong
    worst: Outcome | None = None

    def add(self, outcome: Outcome) -> None:
        (self.refused if outcome.refused else self.compared)[outcome.backend] += 1
        if not outcome.passed:
            self.failures.append(f"{outcome.repro()}  # {outcome.failure or outcome.worst} [{outcome.dtype}; {outcome.facts}]")
        elif self.worst is None or outcome.ratio > self.worst.ratio:
            self.worst = outcome

    def record(self) -> dict[str, Any]:
        """What is stored of a run."""
        return {
            "configurations": self.compared.total() + self.refused.total(),
            "compared": dict(sorted(self.compared.items())),
            "refused": dict(sorted(self.refused.items())),
            "failures": self.failures,
            "worst_ratio": None if self.worst is None else round(self.worst.ratio, 3),
            "worst": None if self.worst is None else self.worst.repro(),
        }

    def lines(self) -> list[str]:
        """The same for the screen."""
        found = self.record()
        counts = ", ".join(f"{name} {count}" for name, count in found["compared"].items())
        return [
            f"{found['configurations']} calls: {self.compared.total()} compared ({counts}), {self.refused.total()} refused, "
            f"{len(self.failures)} failed",
            f"the worst error that passed is {found['worst_ratio']} of what is allowed: {found['worst']}",
        ]
