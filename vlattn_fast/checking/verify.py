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
from vlattn_fast.dispatch import call as calls
from vlattn_fast.dispatch.call import Call
from vlattn_fast.dispatch.table import BACKEND_NAMES, Table

OPERATORS = tuple(ops.OPERATORS)
BACKENDS = tuple(name for name in BACKEND_NAMES if name != "auto")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KEEP_FLOAT32 = ("carrier",)  # as the operator asks for with 16-bit inputs

Tensors = dict[str, Tensor]


def call_of(operator: str) -> Callable[..., Any]:
    """The public call of the operator."""
    return ops.OPERATORS[operator].call


def backends_of(operator: str) -> Table:
    return ops.OPERATORS[operator].backends


def facts_of(operator: str, arguments: Mapping[str, Any]) -> Call:
    """The `Call` that the operator asks its backends about, from a call's arguments."""
    return ops.OPERATORS[operator].describe(**arguments)


def command(backend: str) -> str:
    """The `vlattn` command whose process runs the backend's kernels as this one does."""
    return calls.on_cpu.command if calls.on_cpu and backend in ("triton", "cuda") else "vlattn"


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


def cases(seed: int = 0, sizes: Sizes | None = None) -> list[Case]:
    """Calls of every operator that together use each score, rule and mask; small ones by default."""
    n, m, size, value_size, regions, words, features = Sizes() if sizes is None else sizes
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    q, k, v = randn(2, 2, n, size), randn(2, 2, m, size), randn(2, 2, m, value_size)
    key_mask = torch.rand(2, m, generator=g) > 0.3
    masked_out = key_mask.clone()
    masked_out[1] = False
    qkv = {"query": q, "key": k, "value": v}
    made = [
        _case("score_attention", "scaled_dot causal", qkv, {"is_causal": True}),
        _case("score_attention", "cosine", qkv, {"score": "cosine", "scale": 4.0}),
    ]
    for kind in scores.SCORES.values():
        for name, fixed in kind.examples().items() if kind.parameters else ():
            parameters = {  # one for all heads where it is a matrix, otherwise one for each
                key: parameter.random(randn(*parameter.shape(size, (2,) * (parameter.rank < 2))), size)
                for key, parameter in kind.parameters.items()
            }
            make = partial(kind, **fixed)
            returns_lse = make(**parameters).is_dot_product and name != "general"  # which is so left to SDPA, that returns none
            options = {"key_mask": masked_out, "return_lse": returns_lse}
            made.append(_case("score_attention", name, {**qkv, **parameters}, options, partial(_with_score, make)))
    shared = {"query": q, "key": k[:, :1], "value": v[:, :1]}
    sink = {"sink": randn(2)}
    made.append(_case("score_attention", "softcap and sink", {**qkv, **sink}, {"softcap": 1.5, "return_lse": True}))
    made.append(_case("score_attention", "grouped heads", shared, {"enable_gqa": True, "key_mask": key_mask}))

    square_qkv = {"query": q, "key": k[:, :, :n], "value": v[:, :, :n], "carrier": randn(2, 3, n)}
    weight = torch.rand(2, n, generator=g)
    rollout = {"rule": "attention", "residual_weight": 0.5, "attention_weight": 0.5, "key_mask": key_mask[:, :n]}
    weighted = {"row_normalize": True, "residual_weight": weight, "attention_weight": 1 - weight, "is_causal": True}
    for_gradient = {**qkv, "grad_output": randn(2, 2, n, value_size)}
    groups = {"key_groups": torch.randint(-1, 3, (2, m), generator=g), "num_groups": 3, "key_mask": key_mask}
    weighted_rows = {"query": q, "key": k, "row_weight": randn(2, n)}
    blocks = {"text_query": q, "text_key": k[:, :, :n], "image_query": randn(2, 2, m, size), "image_key": k}
    masks = {"text_mask": weight > 0.2, "image_mask": key_mask}
    normalise = torch.nn.functional.normalize
    pairs = {"images": normalise(randn(4, regions, features), dim=-1), "captions": normalise(randn(4, words, features), dim=-1)}
    lengths = {"caption_lengths": torch.tensor([words, words // 2 + 1, 3, words * 3 // 4])}
    return [
        *made,
        _case("relevancy_attention", "gradient", square_qkv, {}),
        _case("relevancy_attention", "rollout", square_qkv, rollout),
        _case("relevancy_attention", "row-normalised", square_qkv, weighted),
        _case("relevancy_attention", "softcap and sink", {**square_qkv, **sink}, {"softcap": 1.5, "key_mask": key_mask[:, :n]}),
        _case("attention_map", "attention", {"query": q, "key": k}, {"key_mask": masked_out}),
        _case("attention_map", "gradient", for_gradient, {"rule": "gradient"}),
        _case("attention_map", "softcap and sink", {**for_gradient, **sink}, {"rule": "gradient", "softcap": 1.5}),
        _case("attention_map", "gradient of the largest head", for_gradient, {"rule": "gradient", "head_reduction": "max"}),
        _case("attention_statistics", "three groups", weighted_rows, groups),
        _case("attention_statistics", "softcap and sink", {**weighted_rows, **sink}, {**groups, "softcap": 1.5}),
        *(
            _case("congruence_loss", kind, blocks, {"kind": kind, "reduction": "none", **masks}, _in_pairs)
            for kind in ("cacr", "iais_singular", "iais_distributed")
        ),
        _case("stacked_cross_attention", "SCAN t2i", pairs, lengths),
        _case("stacked_cross_attention", "SCAN i2t", pairs, {**lengths, "direction": "i2t", "aggregation": "mean"}),
        _case("stacked_cross_attention", "DAMSM", pairs, {**lengths, "first_norm": "softmax", "smooth": 4.0}),
    ]


def _case(
    operator: str, name: str, tensors: Tensors, options: dict[str, Any], arrange: Callable[[Tensors], dict[str, Any]] = dict
) -> Case:
    """A case with the arguments that `arrange` makes of its tensors, and with options, whose tensors lie beside the others."""

    def arguments(tensors: Tensors) -> dict[str, Any]:
        first = next(iter(tensors.values()))
        dtype = torch.promote_types(first.dtype, torch.float32)

        def placed(x: Any) -> Any:
            return x.to(first.device, dtype if x.is_floating_point() else x.dtype) if isinstance(x, Tensor) else x

        return {**arrange(tensors), **{name: placed(x) for name, x in options.items()}}

    return Case(operator, name, tensors, arguments)


def _with_score(score: Callable[..., scores.Score], tensors: Tensors) -> dict[str, Any]:
    names = ("query", "key", "value")
    parameters = {name: x for name, x in tensors.items() if name not in names}
    return {**{name: tensors[name] for name in names}, "score": score(**parameters)}


def _in_pairs(tensors: Tensors) -> dict[str, Any]:
    return {side: (tensors[f"{side}_query"], tensors[f"{side}_key"]) for side in ("text", "image")}


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
