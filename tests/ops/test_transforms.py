"""torch.func and forward mode of every operator, against the same of its formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jvp, vjp, vmap

import vlattn_fast as va
from tests.helpers.ops.backends import each
from tests.helpers.ops.every_call import CALLS, WITH_CPU, every_call

Tensors = tuple[Tensor, ...]
TWICE = [name for name in CALLS if every_call(name, 4).differentiable and not name.startswith("token_scores")]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")


class Function:
    """A call on a backend as a function of its floating tensors, in float64 or the backend's dtype."""

    def __init__(self, title: str, backend: str, dtype: torch.dtype) -> None:
        torch.manual_seed(1)
        self.every, self.backend = every_call(title, 4), backend
        tensors = {name: x.to(dtype) if x.is_floating_point() else x for name, x in self.every.tensors.items()}
        constants = ("attn_mask", "residual_weight", "attention_weight")
        self.names = [name for name, x in tensors.items() if x.is_floating_point() and name not in constants]
        self.constants = {name: x for name, x in tensors.items() if name not in self.names}
        self.x = tuple([tensors[name] for name in self.names])
        self.u = tuple([torch.cos(3 * x + n) for n, x in enumerate(self.x)])

    def __call__(self, *x: Tensor) -> Tensors:
        torch.manual_seed(0)  # of dropout
        made = self.every.run(self.constants | dict(zip(self.names, x, strict=True)), backend=self.backend)
        outputs = [made] if isinstance(made, Tensor) else list(made)
        return tuple([torch.where(y.isinf(), 0.0, y) for y in outputs if y is not None and y.is_floating_point()])

    def loss(self, *x: Tensor) -> Tensor:
        return sum(y.sin().sum() for y in self(*x))  # type: ignore[return-value]

    def of_jvp(self, *xu: Tensor) -> Tensor:
        outputs, tangents, *_ = jvp(self, xu[: len(self.x)], xu[len(self.x) :])
        carries = self.every.operator == "relevancy_attention"  # a carrier's backward pass is a rule, and no transpose
        pairs = list(zip(outputs, tangents, strict=True))[: 1 if carries else None]
        return sum((y * t.sin()).sum() for y, t in pairs)  # type: ignore[return-value]


def dual(f: Function) -> Tensors:
    """A backward pass through the tangents of a dual level."""
    leaves = [x.clone().requires_grad_() for x in f.x]
    carries = f.every.operator == "relevancy_attention"
    with forward_ad.dual_level():
        made = [forward_ad.unpack_dual(y) for y in f(*map(forward_ad.make_dual, leaves, f.u))][: 1 if carries else None]
        loss = sum((y.primal * y.tangent.sin()).sum() for y in made if y.tangent is not None)
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def numbers(f: Function) -> tuple[int, ...]:
    return tuple(range(len(f.x)))


PRODUCTS: dict[str, Callable[[Function], Any]] = {
    "jvp": lambda f: jvp(f, f.x, f.u),
    "hvp": lambda f: jvp(grad(f.loss, numbers(f)), f.x, f.u),
    "reverse over forward": lambda f: grad(f.of_jvp, tuple(range(2 * len(f.x))))(*f.x, *f.u),
    "reverse over reverse": lambda f: grad(
        lambda *x: sum((g * u).sum() for g, u in zip(grad(f.loss, numbers(f))(*x), f.u, strict=True)), numbers(f)
    )(*f.x),
    "dual level": dual,
    "jacfwd": lambda f: jacfwd(lambda x: f(x, *f.x[1:])[0])(f.x[0]),
    "hessian": lambda f: hessian(lambda x: f.loss(x, *f.x[1:]))(f.x[0]),
    "vmap of grad": lambda f: vmap(grad(f.loss, numbers(f)), (0, *[None] * (len(f.x) - 1)), randomness="same")(
        torch.stack([f.x[0], 2 * f.x[0]]), *f.x[1:]
    ),
}
BIG = ("jacfwd", "hessian")
CASES = [(title, product) for title in TWICE for product in PRODUCTS if product not in BIG]
CASES += [(title, product) for title in ("score_attention", "relevancy_step", "attention_map") for product in BIG]


def compare(backend: str, title: str, product: str) -> None:
    f, formula = Function(title, backend, DTYPES[backend]), Function(title, "reference", torch.float64)
    got, want = (torch.utils._pytree.tree_leaves(PRODUCTS[product](each)) for each in (f, formula))
    for one, exact in zip(got, want, strict=True):
        scale = float(exact.abs().amax()) if exact.numel() else 0.0
        bound = {torch.float64: 1e-10, torch.float32: 1e-3}[one.dtype] * max(scale, 1e-2)
        torch.testing.assert_close(one.double(), exact, rtol=0, atol=bound)


DTYPES = {"streaming": torch.float64, "cpu": torch.float32, "reference": torch.float64}


@pytest.mark.parametrize("title, product", CASES)
def test_streaming(title: str, product: str) -> None:
    compare("streaming", title, product)


@pytest.mark.parametrize("title, product", [case for case in CASES if case[0] in WITH_CPU])
def test_cpu(title: str, product: str) -> None:
    compare("cpu", title, product)


@each("product", streaming=("jvp", "hvp"), cpu=("jvp", "hvp"))
def test_compiled(product: str, backend: str) -> None:
    torch._dynamo.reset()
    query, key, value, tangent = (torch.randn(1, 2, 9, 4) for _ in range(4))

    def output(q: Tensor) -> Tensor:
        out: Tensor = va.score_attention(q, key, value, is_causal=True, backend=backend)
        return out

    def run(q: Tensor, u: Tensor) -> Any:
        return jvp(output if product == "jvp" else grad(lambda q: output(q).sin().sum()), (q,), (u,))[1]

    made = torch.compile(run, fullgraph=True, backend="aot_eager")(query, tangent)
    torch.testing.assert_close(made, run(query, tangent))


def test_rows_without_a_key_have_zero_tangents() -> None:
    """Even for cotangents of NaN."""
    x = tuple(torch.randn(1, 2, 5, 4, dtype=torch.float64) for _ in range(3))
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    for backend in ("streaming", "cpu"):
        dtype = DTYPES[backend]

        def call(*qkv: Tensor, backend: str = backend) -> Tensor:
            out: Tensor = va.score_attention(*qkv, attn_mask=mask, backend=backend)
            return out

        y, u = ([each.to(dtype) for each in tensors] for tensors in (x, reversed(x)))
        assert not jvp(call, tuple(y), tuple(u))[1][:, :, 2].any()
        cotangent = torch.ones(1, 2, 5, 4, dtype=dtype)
        cotangent[:, :, 2] = torch.nan
        _, pulled = vjp(lambda *y: jvp(call, y, tuple(u))[1], *y)  # noqa: B023
        made = pulled(cotangent)
        assert not any(each.isnan().any() for each in made) and not made[0][:, :, 2].any()


def test_third_derivatives_are_refused_by_name() -> None:
    x = torch.randn(1, 1, 3, 4)

    def loss(q: Tensor) -> Tensor:
        out: Tensor = va.score_attention(q, x, x).sin().sum()
        return out

    with pytest.raises(RuntimeError, match="score_attention has no third derivative"):
        grad(lambda q: hessian(loss)(q).sum())(x)
    with pytest.raises(RuntimeError, match="score_attention has no forward mode of forward mode"):
        jacfwd(jacfwd(loss))(x)
