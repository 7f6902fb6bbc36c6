"""Every operator on every backend and dtype against its formula in float64: `vlattn verify`, and the demo's table of checks.

Errors are multiples of what tolerance.py allows, pooled over draws of the inputs. A ratio above 1 is a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlattn_fast import ops, scores
from vlattn_fast.checking.tolerance import draws, settle
from vlattn_fast.ops._dispatch import BACKEND_NAMES, Call, Table

OPERATORS = tuple(ops.OPERATORS)
BACKENDS = tuple(name for name in BACKEND_NAMES if name != "auto")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KEEP_FLOAT32 = ("carrier",)  # as the operator asks for with 16-bit inputs

Tensors = dict[str, Tensor]


def call_of(operator: str) -> Callable[..., Any]:
    """The public call of the operator."""
    return getattr(ops.OPERATORS[operator], operator)


def backends_of(operator: str) -> Table:
    return ops.OPERATORS[operator].BACKENDS


def facts_of(operator: str, arguments: Mapping[str, Any]) -> Call:
    """The `Call` that the operator asks its backends about, from a call's arguments."""
    return ops.OPERATORS[operator].describe_call(**arguments)


@dataclass(frozen=True)
class Case:
    """A call: its float64 tensors, and a function from tensors to the call's keyword arguments."""

    operator: str
    name: str
    tensors: Tensors
    arguments: Callable[[Tensors], dict[str, Any]] = dict
    differentiable: bool = True

    def in_dtype(self, dtype: torch.dtype, device: str = "cpu") -> Tensors:
        kept = {name: torch.float32 if name in KEEP_FLOAT32 and dtype != torch.float64 else dtype for name in self.tensors}
        return {name: x.to(device, kept[name]) for name, x in self.tensors.items()}


class Sizes(NamedTuple):
    """Sizes of the checked calls, which have two samples, two heads, and at least as many keys as queries."""

    queries: int = 33
    keys: int = 47
    head_dim: int = 16
    value_dim: int = 24
    regions: int = 36
    words: int = 12
    features: int = 32


SMALL = Sizes()


def cases(seed: int = 0, sizes: Sizes = SMALL) -> list[Case]:
    """Calls of every operator that together use each score, rule and mask; small ones by default."""
    n, m, size, value_size, regions, words, features = sizes
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    q, k, v = randn(2, 2, n, size), randn(2, 2, m, size), randn(2, 2, m, value_size)
    key_mask = torch.rand(2, m, generator=g) > 0.3
    masked_out = key_mask.clone()
    masked_out[1] = False
    qkv = {"query": q, "key": k, "value": v}
    root = size**0.5
    square, vector = {"weight": randn(size, size) / root, "bias": randn(2, size) / root}, {"vector": randn(2, size) / root}
    additive = {**vector, "query_weight": randn(2, size, size) / root, "key_weight": randn(size, size) / root}
    made = [
        Case("score_attention", "scaled_dot causal", qkv, lambda t: {**t, "is_causal": True}),
        Case("score_attention", "cosine", qkv, lambda t: {**t, "score": "cosine", "scale": 4.0}),
        *(
            _scored(name, qkv, parameters, make, masked_out)
            for name, parameters, make in (
                ("general", square, lambda p: scores.General(**p)),
                ("general sigmoid", square, lambda p: scores.General(**p, activation="sigmoid", projects="query")),
                ("additive", additive, lambda p: scores.Additive(**p)),
                ("hadamard relu", vector, lambda p: scores.Hadamard(**p, activation="relu")),
                ("hadamard tanh", {**vector, **square}, lambda p: scores.Hadamard(**p, activation="tanh")),
            )
        ),
    ]
    shared = {"query": q, "key": k[:, :1], "value": v[:, :1]}
    made.append(_optioned("score_attention", "grouped heads", shared, {"enable_gqa": True, "key_mask": key_mask}))

    square_qkv = {"query": q, "key": k[:, :, :n], "value": v[:, :, :n], "carrier": randn(2, 3, n)}
    weight = torch.rand(2, n, generator=g)
    options: dict[str, dict[str, Any]] = {
        "gradient": {},
        "rollout": {"rule": "attention", "residual_weight": 0.5, "attention_weight": 0.5, "key_mask": key_mask[:, :n]},
        "row-normalised": {"row_normalize": True, "residual_weight": weight, "attention_weight": 1 - weight, "is_causal": True},
    }
    made += [_optioned("relevancy_attention", name, square_qkv, chosen) for name, chosen in options.items()]
    made += [
        _optioned("attention_map", "attention", {"query": q, "key": k}, {"key_mask": masked_out}, differentiable=False),
        _optioned(
            "attention_map",
            "gradient",
            {**qkv, "grad_output": randn(2, 2, n, value_size)},
            {"rule": "gradient"},
            differentiable=False,
        ),
    ]
    groups = torch.randint(-1, 3, (2, m), generator=g)
    made.append(
        _optioned(
            "attention_statistics",
            "three groups",
            {"query": q, "key": k, "row_weight": randn(2, n)},
            {"key_groups": groups, "num_groups": 3, "key_mask": key_mask},
        )
    )
    blocks = {"text_query": q, "text_key": k[:, :, :n], "image_query": randn(2, 2, m, size), "image_key": k}
    masks = {"text_mask": weight > 0.2, "image_mask": key_mask}
    made += [_congruence(kind, blocks, masks) for kind in ("cacr", "iais_singular", "iais_distributed")]
    normalise = torch.nn.functional.normalize
    pairs = {"images": normalise(randn(4, regions, features), dim=-1), "captions": normalise(randn(4, words, features), dim=-1)}
    lengths = {"caption_lengths": torch.tensor([words, words // 2 + 1, 3, words * 3 // 4])}
    made += [
        _optioned("stacked_cross_attention", "SCAN t2i", pairs, lengths),
        _optioned("stacked_cross_attention", "SCAN i2t", pairs, {**lengths, "direction": "i2t", "aggregation": "mean"}),
        _optioned("stacked_cross_attention", "DAMSM", pairs, {**lengths, "first_norm": "softmax", "smooth": 4.0}),
    ]
    return made


def _optioned(operator: str, name: str, tensors: Tensors, options: dict[str, Any], differentiable: bool = True) -> Case:
    def arguments(tensors: Tensors) -> dict[str, Any]:
        first = next(iter(tensors.values()))
        dtype = torch.promote_types(first.dtype, torch.float32)
        return {
            **tensors,
            **{
                name: x.to(first.device, dtype if x.is_floating_point() else x.dtype) if isinstance(x, Tensor) else x
                for name, x in options.items()
            },
        }

    return Case(operator, name, tensors, arguments, differentiable)


def _scored(name: str, qkv: Tensors, parameters: Tensors, make: Callable[[Tensors], scores.Score], key_mask: Tensor) -> Case:
    def arguments(tensors: Tensors) -> dict[str, Any]:
        score = make({parameter: tensors[parameter] for parameter in parameters})
        return {**{n: tensors[n] for n in qkv}, "score": score, "key_mask": key_mask.to(tensors["query"].device)}

    return Case("score_attention", name, {**qkv, **parameters}, arguments)


def _congruence(kind: str, blocks: Tensors, masks: Tensors) -> Case:
    def arguments(tensors: Tensors) -> dict[str, Any]:
        text, image = (tensors["text_query"], tensors["text_key"]), (tensors["image_query"], tensors["image_key"])
        placed = {name: mask.to(text[0].device) for name, mask in masks.items()}
        return {"text": text, "image": image, "kind": kind, "reduction": "none", **placed}

    return Case("congruence_loss", kind, blocks, arguments)


@dataclass(frozen=True)
class Result:
    """One operator on one backend in one dtype over all its cases. `ratio`: the worst error as a multiple of the allowed one;
    `worst`: its place; `reasons`: why the backend runs no case."""

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
    operators: tuple[str, ...] = OPERATORS,
) -> Iterator[Result]:
    """Runs every case on every backend that takes it: outputs and the gradient of every tensor."""
    everything = cases(seed)
    for operator in operators:
        mine = [case for case in everything if case.operator == operator]
        for dtype in dtypes:
            problems = [_Problem(case, dtype, device) for case in mine]
            for backend in backends:
                yield _result(operator, backend, dtype, device, problems)


class _Problem:
    """A case in one dtype: its draws, each with the exact results and the formula's, made once for all backends."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str, truth_on: str = "cpu") -> None:
        self.case, self._dtype, self._device, self._truth_on = case, dtype, device, truth_on
        self._fresh = draws(case.tensors)
        self._known: list[tuple[Tensors, Tensors, Tensors]] = []

    def draw(self, number: int) -> tuple[Tensors, Tensors, Tensors]:
        while len(self._known) <= number:
            (tensors,) = next(self._fresh)
            case = replace(self.case, tensors=tensors)
            here = case.in_dtype(self._dtype, self._device)
            truth = _run(case, case.in_dtype(self._dtype, self._truth_on), "reference", torch.float64)
            self._known.append((here, truth, _run(case, here, "reference")))
        return self._known[number]

    def runs(self, backend: str) -> Iterator[tuple[Tensors, Tensors, Tensors]]:
        for number in count():
            tensors, truth, formula = self.draw(number)
            yield _run(self.case, tensors, backend), truth, formula


def _result(operator: str, backend: str, dtype: torch.dtype, device: str, problems: list[_Problem]) -> Result:
    checks, ratio, worst = 0, 0.0, ""
    reasons: dict[str, None] = {}
    enough = 1 if device == "cpu" and backend in ("triton", "cuda") else 4  # kernels on the CPU are interpreted or emulated
    for problem in problems:
        tensors = problem.case.in_dtype(dtype, device)
        refused = backends_of(operator)[backend].refusals(facts_of(operator, problem.case.arguments(tensors)))
        reasons |= dict.fromkeys(refused)
        if refused:
            continue
        for name, errors in settle(problem.runs(backend), enough=lambda: enough).items():
            checks += 1
            if errors.ratio() > ratio or not worst:
                ratio, worst = max(ratio, errors.ratio()), f"{problem.case.name}: {name}"
    return Result(operator, backend, dtype, checks, ratio, worst, () if checks else tuple(reasons))


def _run(case: Case, tensors: Tensors, backend: str, dtype: torch.dtype | None = None) -> Tensors:
    """Floating outputs and gradients by name; with `dtype`, of the same numbers computed in it."""

    def cotangents(outputs: list[Tensor]) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        # rounded once, to the coarsest dtype, so that every dtype gets the same cotangents
        return [torch.randn(x.shape, generator=generator).bfloat16().to(x.device, x.dtype) for x in outputs]

    inputs = {name: x.to(dtype or x.dtype) for name, x in tensors.items()}
    call = partial(call_of(case.operator), backend=backend)
    return outputs_and_gradients(lambda leaves: call(**case.arguments(leaves)), inputs, cotangents, case.differentiable)


def outputs_and_gradients(
    call: Callable[[Tensors], Any],
    tensors: Tensors,
    cotangents: Callable[[list[Tensor]], list[Tensor]],
    differentiable: bool = True,
) -> Tensors:
    """Floating outputs of call(tensors) by number, and the gradient of every tensor by name; inputs keep their strides.

    `cotangents` gives a gradient for each output that has one.
    """
    leaves = {name: x.detach().requires_grad_(differentiable) for name, x in tensors.items()}
    out = call(leaves)
    outputs = {f"output {i}": x for i, x in enumerate(out if isinstance(out, tuple) else (out,)) if x.is_floating_point()}
    results = {name: x.detach() for name, x in outputs.items()}
    if used := [x for x in outputs.values() if x.requires_grad]:
        grads = torch.autograd.grad(used, list(leaves.values()), cotangents(used), materialize_grads=True)
        results |= {f"gradient of {name}": x for name, x in zip(leaves, grads, strict=True)}
    return results
