"""The score functions, masks and layouts that the tests of score_attention run over."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import as_dtype, assert_all_close_to
from tests.helpers.ops.backends import F64, finest
from vlattn_fast import scores as S
from vlattn_fast._ground.score_kinds import kind_of

TORCH_JIT = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own use of it
Params = dict[str, Tensor]
Build = Callable[..., tuple[Params, Callable[[Params], Any]]]


def leaf(*shape: int) -> Tensor:
    return 0.5 * torch.randn(shape, dtype=F64)


def general(
    H: int, Dq: int, Dk: int, *, per_head: bool = False, bias: bool = True, projects: str = "key", **options: Any
) -> tuple[Params, Callable[[Params], Any]]:
    rows, columns = (Dq, Dk) if projects == "key" else (Dk, Dq)
    head = (H,) if per_head else ()
    params = {"weight": leaf(*head, rows, columns)}
    if bias:
        params["bias"] = leaf(*head, rows)
    return params, lambda p: S.General(p["weight"], p.get("bias"), projects=projects, **options)


def additive(
    H: int, Dq: int, Dk: int, *, per_head: bool = False, weights: str = "qk", bias: bool = True, **options: Any
) -> tuple[Params, Callable[[Params], Any]]:
    head = (H,) if per_head else ()
    A = 5 if weights == "qk" else Dq if weights == "k" else Dk
    params = {"vector": leaf(*head, A)}
    if "q" in weights:
        params["query_weight"] = leaf(*head, A, Dq)
    if "k" in weights:
        params["key_weight"] = leaf(*head, A, Dk)
    if bias:
        params["bias"] = leaf(*head, A)
    return params, lambda p: S.Additive(p["vector"], p.get("query_weight"), p.get("key_weight"), p.get("bias"), **options)


def concat(H: int, Dq: int, Dk: int) -> tuple[Params, Callable[[Params], Any]]:
    params = {"vector": leaf(5), "weight": leaf(H, 5, Dq + Dk), "bias": leaf(5)}
    return params, lambda p: S.Additive.concat(p["vector"], p["weight"], p["bias"], query_size=Dq)


def hadamard(
    H: int,
    Dq: int,
    Dk: int,
    *,
    per_head: bool = False,
    weight: bool = True,
    bias: bool = True,
    projects: str = "key",
    offset: Any = 0.7,
    **options: Any,
) -> tuple[Params, Callable[[Params], Any]]:
    size, source = (Dq, Dk) if projects == "key" else (Dk, Dq)
    head = (H,) if per_head else ()
    params = {"vector": leaf(*head, size)}
    if weight:
        params["weight"] = leaf(*head, size, source)
    if bias:
        params["bias"] = leaf(*head, size)
    if offset == "tensor":
        params["offset"] = leaf(1)
    return params, lambda p: S.Hadamard(
        p["vector"], p.get("weight"), p.get("bias"), projects=projects, offset=p.get("offset", offset), **options
    )


def found(
    kind: type[S.Score], H: int, D: int, *, per_head: bool = False, **options: Any
) -> tuple[Params, Callable[[Params], Any]]:
    """Any score function, by what its class says of its parameters."""
    heads = (H,) if per_head else ()
    params = {name: each.random(2 * leaf(*each.shape(D, heads)), D) for name, each in kind.parameters.items()}
    return params, lambda p: kind(**{name: p[name] for name in params}, **options)


@dataclass(frozen=True)
class Case:
    build: Build
    options: dict[str, Any] = field(default_factory=dict)
    same_size: bool = False  # Dq == Dk is required


def made(case: Case) -> S.Score:
    params, make = case.build(2, 4, 4, **case.options)
    return S.resolve(make(params))


SCORES: dict[str, Case] = {
    "dot": Case(lambda *_: ({}, lambda p: "dot"), same_size=True),
    "scaled_dot": Case(lambda *_: ({}, lambda p: S.ScaledDot()), same_size=True),
    "cosine": Case(lambda *_: ({}, lambda p: "cosine"), same_size=True),
    # the clamp acts on most pairs, on some only
    "cosine-eps=5": Case(lambda *_: ({}, lambda p: S.Cosine(eps=5.0)), same_size=True),
    "general-key": Case(general, {"bias": False}),
    "general-query": Case(general, {"bias": False, "projects": "query"}),
    # q . b cancels in the softmax, stays in the lse
    "general-key-bias": Case(general),
    "general-key-bias-per_head": Case(general, {"per_head": True}),
    "general-query-bias": Case(general, {"projects": "query"}),
    "general-query-bias-per_head": Case(general, {"per_head": True, "projects": "query"}),
    **{
        f"general-{activation}-{projects}": Case(general, {"activation": activation, "projects": projects})
        for activation in ("relu", "leaky_relu", "tanh", "sigmoid")
        for projects in ("key", "query")
    },
    "general-tanh-per_head": Case(general, {"activation": "tanh", "per_head": True}),
    # a slope other than the default, negative too
    "general-leaky=0.3": Case(general, {"activation": "leaky_relu", "negative_slope": 0.3}),
    "general-leaky=-0.5": Case(general, {"activation": "leaky_relu", "negative_slope": -0.5}),
    "additive": Case(additive),
    "additive-per_head": Case(additive, {"per_head": True}),
    # query or key already has size A
    "additive-weights=none": Case(additive, {"weights": "", "bias": False}, same_size=True),
    "additive-weights=q": Case(additive, {"weights": "q"}),
    "additive-weights=k": Case(additive, {"weights": "k"}),
    "additive-bias_per_head-weights=none": Case(additive, {"weights": "", "per_head": True}, same_size=True),
    "concat-unequal": Case(concat),
    **{
        f"hadamard-{activation}-{projects}": Case(hadamard, {"activation": activation, "projects": projects})
        for activation in (None, "relu", "leaky_relu", "tanh", "sigmoid")
        for projects in ("key", "query")
    },
    **{
        f"hadamard-{activation}-per_head": Case(hadamard, {"activation": activation, "per_head": True})
        for activation in (None, "leaky_relu", "tanh")
    },
    "hadamard-weight=none": Case(hadamard, {"weight": False, "bias": False, "activation": "relu"}, same_size=True),
    "hadamard-offset=tensor": Case(hadamard, {"offset": "tensor", "activation": "sigmoid"}),
    "hadamard-none-offset=tensor": Case(hadamard, {"offset": "tensor"}),
    "hadamard-leaky=0.5": Case(hadamard, {"activation": "leaky_relu", "negative_slope": 0.5}),
}
FOUND = {  # those without cases of their own
    f"{kind.name}-{'per_head' if per_head else 'shared'}": Case(
        lambda H, Dq, Dk, kind=kind, **options: found(kind, H, Dq, **options), {"per_head": per_head}, same_size=True
    )
    for kind in S.SCORES.values()
    if not any(name.startswith(kind.name) for name in SCORES)
    for per_head in (False, True)
}
SCORES |= FOUND
CORES = {name: made(case).kind for name, case in SCORES.items()}
# One for each kind of core score: a clamp that acts on some pairs, a slope that is not the default, else the first that there is
KINDS = tuple(
    {"cosine": "cosine-eps=5", "dot_leaky_relu": "general-leaky=0.3"}.get(kind) or next(x for x in CORES if CORES[x] == kind)
    for kind in dict.fromkeys(CORES.values())
)


def of_kernels(backend: str, names: Iterable[str]) -> tuple[str, ...]:
    """Those whose kind the backend has: its kernels, by the table of kinds."""
    return tuple(name for name in names if backend == "streaming" or backend in kind_of(CORES[name]).kernels)


PRODUCTS = tuple(name for name in of_kernels("triton", KINDS) if kind_of(CORES[name]).of != "units")  # functions of a product
# What stands between a public score and its kernel: features, weights per head, biases, offsets.
PUBLIC = (
    "scaled_dot",
    "cosine",
    "general-key-bias",
    "general-leaky=-0.5",
    "general-tanh-per_head",
    "additive-per_head",
    "concat-unequal",
    "hadamard-None-per_head",
    "hadamard-relu-key",
    "hadamard-tanh-query",
    "hadamard-offset=tensor",
    *FOUND,
)
# Dot products of features, whatever the data are: what SDPA takes.
DOT_PRODUCTS = tuple(name for name, case in SCORES.items() if made(case).is_dot_product)

PLAIN = {  # the score of a test that is not about scores
    "reference": "general-tanh-key",
    "streaming": "general-tanh-key",
    "sdpa": "dot",
    "cpu": "general-tanh-key",
    "triton": "general-tanh-key",
    "cuda": "additive",
}
FEW = {  # one score for each way that a call takes through a backend
    "streaming": ("dot", "cosine-eps=5", "general-tanh-key", "additive", "hadamard-sigmoid-key"),
    "sdpa": ("dot", "general-key-bias"),
    "cpu": ("dot", "cosine-eps=5", "general-tanh-key", "additive", "hadamard-sigmoid-key"),
    "triton": ("cosine-eps=5", "additive"),
    "cuda": ("additive", "hadamard-sigmoid-key"),
}

B, H, N, M, D, DV = 2, 2, 5, 7, 6, 3


def attention_inputs(
    case: Case, *, b: int = B, h: int = H, kv: int | None = None, n: int = N, m: int = M, dv: int = DV
) -> tuple[Params, Callable[..., Any]]:
    """query, key, value and the score's parameters in float64; and the score as a function of them."""
    dk = D if case.same_size else 4
    params, make = case.build(h, D, dk, **case.options)
    kv = h if kv is None else kv
    inputs = {
        "query": torch.randn(b, h, n, D, dtype=F64),
        "key": torch.randn(b, kv, m, dk, dtype=F64),
        "value": torch.randn(b, kv, m, dv, dtype=F64),
    }
    return {**inputs, **params}, make


def tensors(backend: str, score: str, dtype: torch.dtype | None = None, **sizes: int) -> tuple[Params, Any]:
    """Inputs in `dtype`, by default the finest that the backend takes, and the score as a function of them."""
    inputs, make = attention_inputs(SCORES[score], **sizes)
    return as_dtype(inputs, finest(backend) if dtype is None else dtype), make


def sizes_of(backend: str, score: str) -> dict[str, int]:
    """More than one tile in either direction where tiles are fixed; of keys alone where the interpreter takes long."""
    if backend == "triton" and score.startswith(("additive", "hadamard")):
        return {"n": N, "m": 19}
    if backend == "sdpa":
        return {"n": 23, "m": 18}  # under the causal flag it takes 16 keys and more
    return {"n": 34, "m": 37} if backend in ("cpu", "triton", "cuda") else {"n": N, "m": M}


def call(operator: Callable[..., Any], make: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """The operator as a function of named tensors alone."""
    return lambda query, key, value, **params: operator(query, key, value, score=make(params), **options)


def check(
    backend: str, inputs: Params, make: Callable[..., Any], *, what: str = "", cancels: bool = False, **options: Any
) -> dict[str, Tensor]:
    """Outputs, the log-sum-exp where the backend gives it, and every gradient against the formula.

    Gradients of a bias, a vector or an offset may cancel to zero, and with `cancels` all of them: they are held to what was
    summed, numbers around 1.
    """
    b, h, n, _ = inputs["query"].shape
    options = {"return_lse": backend != "sdpa", **options}
    cotangents = [torch.randn(b, h, n, inputs["value"].shape[3]), torch.randn(b, h, n)]
    return assert_all_close_to(
        call(va.score_attention, make, backend=backend, **options),
        call(va.reference.score_attention, make, **options),
        inputs,
        cotangents[: 1 + options["return_lse"]],
        what=f"{backend} {what}".strip(),
        scales={f"grad {name}": 1.0 for name in inputs if cancels or name in ("bias", "vector", "offset")},
    )
