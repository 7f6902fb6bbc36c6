"""Derivatives of every operator, of every mode and up to the second, against the operators written out a second time."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp
from torch.utils._pytree import tree_leaves

import vlattn_fast as va
from tests.helpers.compare import LargestAllocation, bytes_of
from tests.helpers.ops.backends import each, finest, on
from tests.helpers.ops.derivative_cases import PRODUCTS, Function
from tests.helpers.ops.every_call import CALLS, WITH_CPU, every_call, small
from tests.helpers.ops.properties import supported
from tests.helpers.ops.score_cases import TORCH_JIT
from vlattn_fast.backends.streaming import _forward_mode, _tiles
from vlattn_fast.checking.cases import Example, cases_of
from vlattn_fast.checking.tolerance import draws, settle
from vlattn_fast.dispatch.choice import load
from vlattn_fast.ops import OPERATORS

pytestmark = TORCH_JIT  # torch.func uses torch.jit


TITLES = [title for title in CALLS if every_call(title, 2).differentiable]
OF_OPERATORS = [title for title in TITLES if title != "relevancy_residual"]
# of the others, the CPU's calls have the derivatives of streaming: test_options asks each
OWN = [name for name, each in OPERATORS.items() if "cpu" in each.backends and hasattr(load(each.backends, "cpu"), "jvp")]
OF_CPU = [title for title in TITLES if title in WITH_CPU and every_call(title, 2).operator in OWN]


def check(example: Example, backend: str, products: tuple[str, ...] = tuple(PRODUCTS), **kept: Any) -> None:
    """`kept`: what the formula is told of dropout."""
    dtype = finest(backend)
    x = {name: y.detach().to(dtype) for name, y in example.tensors.items()}
    u = {name: torch.randn(y.shape).to(y) for name, y in x.items()}
    ours, formula = Function(example, backend), Function(example, "", **kept)
    for product in products:
        run = PRODUCTS[product]

        def runs(run: Any = run) -> Iterator[tuple[dict[str, Tensor], ...]]:
            for drawn, tangents in draws(x, u):
                narrow = [tuple(drawn.values()), tuple(tangents.values())]
                wide = [tuple(y.double() for y in side) for side in narrow]
                of_formula = tree_leaves(run(formula, *narrow))
                got = [y.to(dtype) for y in tree_leaves(run(ours, *narrow))]
                made = got, tree_leaves(run(formula, *wide)), [y.to(dtype) for y in of_formula]
                yield tuple({str(n): y for n, y in enumerate(each)} for each in made)

        pools = settle(runs(), 1.0, lambda: 1 if backend == "triton" else 2)
        for n, errors in pools.items():
            assert errors.ratio() <= 1.0, f"{example.title} {product} {n}: {errors}"


@pytest.mark.slow("reference")
@each("title", streaming=TITLES, reference=TITLES, cpu=OF_CPU)
def test_every_call(backend: str, title: str) -> None:
    check(every_call(title, 4), backend)


@each("title", streaming=("relevancy_step", "attention_map"), cpu=("relevancy_step", "attention_map"))
def test_of_a_log_sum_exp_with_a_gradient(backend: str, title: str) -> None:
    """It is a variable of its own in each product with a derivative by it: queries and keys have no gradient through it."""
    example = every_call(title, 4)
    lse = va.score_attention(*(example.tensors[name] for name in ("query", "key", "value")), return_lse=True)[1]
    products = ("forward", "forward_over_reverse", "reverse_over_forward", "reverse_over_reverse", "each_alone")
    check(replace(example, tensors={**example.tensors, "lse": lse}), backend, products)


@on("triton")
def test_in_triton(backend: str) -> None:
    check(every_call("score_attention, lse", 4), backend, ("forward", "forward_over_reverse", "reverse_over_forward"))


def options_of_every_operator() -> dict[str, Example]:
    """What `vlattn verify` calls: masks, groups, gates, shared heads, scores with parameters for each head."""
    operators = {every_call(title, 2).operator for title in TITLES} & {*OPERATORS}
    made = [
        example for name in sorted(operators) for example in cases_of(name).verify(torch.Generator().manual_seed(0), small(5))
    ]
    return {example.title: example for example in made}


OPTIONS = options_of_every_operator()
OPTIONS_OF_CPU = {call.title: call for call in supported([*OPTIONS.values()], "cpu")}


@pytest.mark.slow("streaming")  # test_every_call is quick
@each("title", streaming=OPTIONS, cpu=OPTIONS_OF_CPU)
def test_options(backend: str, title: str) -> None:
    check(OPTIONS[title], backend, ("forward", "forward_over_reverse", "reverse_over_forward", "batched"))


def attended(shared: int = 1, **options: Any) -> Example:
    shapes = {"query": (2, 4, 5, 6), "key": (2, 4 // shared, 7, 6), "value": (2, 4 // shared, 7, 3)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    options = {"return_lse": True, "enable_gqa": shared > 1, **options}
    return Example(va.score_attention, "", tensors, options)


def visible() -> Tensor:
    """One row sees no key."""
    mask = torch.rand(2, 1, 5, 7) < 0.7
    mask[..., 0] = True
    mask[0, :, 2] = False
    return mask


@on("reference", "streaming", "cpu")
@pytest.mark.parametrize("added", (False, True), ids=("bool", "float"))
def test_a_row_without_a_key(added: bool, backend: str) -> None:
    """Its tangents are zero, and NaN in their cotangents reaches no gradient; of the formula any other number."""
    mask = visible()
    example = attended(attn_mask=torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) if added else mask)
    empty = ~mask.any(-1).expand(2, 4, 5)
    x = tuple(y.to(finest(backend)) for y in example.tensors.values())
    u = tuple(y.cos() for y in x)
    f = Function(example, backend)
    (out, lse), back = torch.func.vjp(lambda *x: jvp(f, x, u)[1], *x)
    assert not out[empty].any() and not lse[empty].any()
    results = []
    for fill in (1.0, 2.0 if backend == "reference" else torch.nan):
        results.append(back((torch.where(empty[..., None], fill, out.sin()), torch.where(empty, fill, lse))))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@on("streaming", "cpu")
def test_dropout(backend: str) -> None:
    """All derivatives drop what the forward pass with the same seed drops."""
    example = attended(dropout_p=0.4)
    ones = {"value": torch.eye(7).expand(2, 4, 7, 7)}
    torch.manual_seed(3)
    prob = va.score_attention(**{**example.tensors, **ones}, dropout_p=0.4, backend=backend)
    plain = Example(va.score_attention, "", example.tensors, {"return_lse": True})
    ours, formula = Function(example, backend), Function(plain, "", kept=(prob != 0).double() / 0.6)
    x = [tuple(y.to(dtype) for y in example.tensors.values()) for dtype in (finest(backend), torch.float64)]
    u = [tuple(y.cos() for y in side) for side in x]
    for name in ("forward", "forward_over_reverse", "reverse_over_forward", "reverse_over_reverse"):
        got, expected = PRODUCTS[name](ours, x[0], u[0]), PRODUCTS[name](formula, x[1], u[1])
        for one, two in zip(tree_leaves(got), tree_leaves(expected), strict=True):
            torch.testing.assert_close(one.double(), two, rtol=1e-4, atol=1e-4)


@on("streaming", "cpu")
def test_a_large_offset_in_the_tangents_of_scores(backend: str) -> None:
    """One number for all keys changes no weight, and costs few digits. A plain sum in float32 is wrong by 2e-4 to 7e-4."""
    shapes = {"query": (2, 4, 50, 6), "key": (2, 4, 70, 6), "value": (2, 4, 70, 3)}
    x = {name: torch.randn(shape) for name, shape in shapes.items()}
    q, k = torch.cat([x["query"], torch.ones(2, 4, 50, 1)], -1), torch.cat([x["key"], torch.ones(2, 4, 70, 1)], -1)
    u = torch.cat([x["query"].cos(), torch.full((2, 4, 50, 1), 1000.0)], -1)

    def call(q: Tensor, name: str) -> Tensor:
        out: Tensor = va.score_attention(q, k.to(q), x["value"].to(q), scale=1.0, backend=name)
        return out

    runs = ((backend, torch.float32), ("reference", torch.float64))
    tangents = [jvp(partial(call, name=name), (q.to(dtype),), (u.to(dtype),))[1] for name, dtype in runs]
    assert (tangents[0] - tangents[1]).abs().max() < 1e-4


@on("streaming", "cpu")
def test_tangents_where_the_largest_logit_is_of_the_first_block(backend: str) -> None:
    """Beyond 2^24 a log-sum-exp is no shift of a row; of 900 keys a block has 512."""
    query, key, value = torch.ones(1, 1, 3, 1), torch.zeros(1, 1, 900, 1), torch.randn(1, 1, 900, 2)
    key[:, :, 7] = 128.0
    run = partial(va.score_attention, attn_mask=torch.full((3, 900), 2.0**25), scale=1.0, backend=backend)
    tangents = torch.zeros_like(query), torch.zeros_like(key), value.cos()
    torch.testing.assert_close(jvp(run, (query, key, value), tangents)[1], value[:, :, 7:8].cos().expand(-1, -1, 3, -1))


@on("streaming", "cpu", "reference")
@pytest.mark.parametrize("name", ("relevancy_step", "attention_map"))
def test_a_log_sum_exp_that_is_given_counts_as_computed_in_both_modes(backend: str, name: str) -> None:
    x = [torch.randn(1, 2, 6, 4, dtype=finest(backend)) for _ in range(4)]
    _, lse = va.score_attention(*x[:3], return_lse=True, backend=backend)
    r = torch.rand(1, 1, 6).to(x[0])

    def run(query: Tensor, key: Tensor) -> Tensor:
        given = {"rule": "gradient", "lse": lse.to(query.dtype), "backend": backend}
        if name == "attention_map":
            return va.attention_map(query, key, x[2], x[3], **given)
        return va.relevancy_step(r, query, key, x[2], x[3], **given)

    u = [torch.randn_like(y) for y in x[:2]]
    out, tangent = jvp(run, (x[0], x[1]), tuple(u))
    h = torch.randn_like(out)
    grads = torch.func.vjp(run, x[0], x[1])[1](h)
    total = sum((y * g).sum() for y, g in zip(u, grads, strict=True))
    torch.testing.assert_close((tangent * h).sum(), total, rtol=1e-4, atol=1e-5)


@on("streaming", "reference")
@pytest.mark.parametrize("direction", ("t2i", "i2t"))
def test_similarities_of_a_zero_vector_in_float32(backend: str, direction: str) -> None:
    """A single zero context: its norm has no slope. The formula's tangents stay in float32."""
    x = [torch.randn(2, 1, 8), torch.randn(2, 1, 8)]
    x[0 if direction == "t2i" else 1][0] = 0.0
    u = tuple(y.cos() for y in x)

    def hvp(backend: str, *tensors: Tensor) -> Any:
        def loss(images: Tensor, captions: Tensor) -> Tensor:
            return va.stacked_cross_attention(images, captions, direction=direction, backend=backend).sin().sum()

        return jvp(grad(loss, (0, 1)), tensors, tuple(y.to(tensors[0]) for y in u))[1]

    for ours, exact in zip(hvp(backend, *x), hvp("reference", *(y.double() for y in x)), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours[1], exact[1].float(), rtol=1e-4, atol=1e-4)
        assert ours.isfinite().all()


def clamped_cosine(query: Tensor, key: Tensor, value: Tensor, eps: float) -> Tensor:
    """With lengths of zero vectors that torch can differentiate."""
    lengths = [torch.where((x == 0).all(-1, keepdim=True), eps**2, x).norm(dim=-1) for x in (query, key)]
    products = lengths[0][..., :, None] * lengths[1][..., None, :]
    return torch.softmax(query @ key.mT / torch.where(products < eps, eps, products), -1) @ value


@on("streaming", "reference")
def test_cosine_at_its_clamp(backend: str) -> None:
    """Vectors above and below it, and zeros, which have no direction but a derivative."""
    sizes = torch.tensor([0.0, 1e-3, 1.0, 1e-6, 1e-2]).double()[:, None]
    lengths = sizes, sizes.flip(0), torch.ones_like(sizes)
    x, u = (tuple(torch.randn(1, 2, 5, 3).double() * length for length in lengths) for _ in range(2))
    u = tuple(torch.where(one == 0, 1e-3, two) for one, two in zip(x, u, strict=True))
    ours = partial(va.score_attention, score=va.scores.Cosine(1e-4), scale=1.0, backend=backend)
    results = []
    for f in (ours, partial(clamped_cosine, eps=1e-4)):
        gradient = grad(lambda *y, f=f: f(*y).sin().sum(), (0, 1, 2))
        results.append((jvp(f, x, u)[1], *jvp(gradient, x, u)[1]))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)


@pytest.mark.slow  # properties/test_memory.py asks every operator
@pytest.mark.parametrize("title", ("score_attention, softcap and sink", "relevancy_step", "attention_statistics"))
def test_no_map_is_in_memory(title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is larger than a tile or an input."""
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", 1 << 12)
    f = Function(every_call(title, 128), "streaming")
    x = tuple(y.detach() for y in f.example.tensors.values())
    for product in (PRODUCTS["forward"], PRODUCTS["forward_over_reverse"]):
        with LargestAllocation() as seen:
            product(f, x, tuple(y.cos() for y in x))
        assert seen.bytes <= max(4 << 12, *(bytes_of(y) for y in x)), seen.by


# torch.compile leaves out the backward pass of relevancy_residual's Function within torch.func.grad
@each("title", streaming=OF_OPERATORS, cpu=[title for title in OF_OPERATORS if title in WITH_CPU])
@pytest.mark.slow("cpu", "token_scores", "damsm_similarity", *({*OPERATORS} - {"score_attention"}))
def test_compiled(backend: str, title: str) -> None:
    f = Function(every_call(title, 4), backend)
    x = tuple(y.detach().to(finest(backend)) for y in f.example.tensors.values())
    u = tuple(y.cos() for y in x)
    for run in (PRODUCTS[name] for name in ("forward", "reverse_over_forward", "forward_over_reverse")):
        torch._dynamo.reset()
        compiled = torch.compile(lambda x, u, run=run: run(f, x, u), fullgraph=True, backend="aot_eager")
        for got, expected in zip(tree_leaves(compiled(x, u)), tree_leaves(run(f, x, u)), strict=True):
            torch.testing.assert_close(got, expected)


def compiled_and_not(title: str, product: str, backend: str) -> Any:
    f = Function(every_call(title, 4), "streaming")
    x = tuple(y.detach().double() for y in f.example.tensors.values())
    u, run = tuple(y.cos() for y in x), PRODUCTS[product]
    torch._dynamo.reset()
    return torch.compile(lambda x, u: run(f, x, u), fullgraph=True, backend=backend), lambda x, u: run(f, x, u), x, u


@pytest.mark.parametrize("title, product", [("recurrent_step", "forward"), ("congruence_loss", "forward_over_reverse")])
def test_compiled_code_opens_levels_without_python(title: str, product: str) -> None:
    compiled, run, x, u = compiled_and_not(title, product, "eager")
    torch.testing.assert_close(compiled(x, u), run(x, u))


@pytest.mark.slow
def test_compiled_hessian_products_of_leaves() -> None:
    """AOT autograd asks for the third derivative of inputs that require grad."""
    compiled, run, x, u = compiled_and_not("score_attention", "forward_over_reverse", "aot_eager")
    x = tuple(y.requires_grad_() for y in x)
    with pytest.raises(Exception, match="call what it compiles under torch.no_grad"):
        compiled(x, u)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, u), run(x, u))


def twice(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return jvp(lambda y: jvp(f, (y,), (x,))[1], (x,), (x,))[1]


def test_third_derivatives_and_forward_mode_of_it_are_refused_by_name() -> None:
    x = torch.randn(1, 2, 3, 4)

    def total(q: Tensor) -> Tensor:
        return va.score_attention(q, x, x, backend="streaming").sin().sum()

    with pytest.raises(RuntimeError, match="score_attention has no third derivative; it is twice differentiable"):
        grad(lambda q: (grad(lambda y: (grad(total)(y) * x).sum())(q) * x).sum())(x)
    with pytest.raises(RuntimeError, match="has no forward mode of forward mode; use reverse mode inside"):
        twice(lambda q: va.score_attention(q, x, x, backend="streaming"), x)


def test_an_error_ends_forward_mode() -> None:
    """Else every later call of the thread would keep what only tangents need."""
    with pytest.raises(KeyError), _forward_mode.forward_mode():
        raise KeyError
    assert not _forward_mode.differentiates() and not _forward_mode.has_forward_mode()
