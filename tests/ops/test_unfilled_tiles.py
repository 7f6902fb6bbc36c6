"""Inf and NaN where the rows or keys of a call do not fill a tile: the rows, keys and features that pad it reach no result."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.ops.backends import each, on
from tests.helpers.ops.tile_edges import covering

INF, NAN = float("inf"), float("nan")
SIZES = ((1, 18), (2, 20), (5, 17), (17, 19), (33, 15), (3, 800))
FEW = ((1, 18), (17, 34), (33, 15))  # one tile, two of keys, two of queries
FAST, KERNELS = {"streaming": SIZES, "cpu": SIZES, "triton": FEW}, {"cpu": SIZES, "triton": FEW}
UNITS = torch.linspace(-1.0, 1.0, 6)
HADAMARD = {name: va.scores.Hadamard(UNITS, torch.eye(6), activation=name) for name in ("tanh", "sigmoid")}
SLOPES = {**HADAMARD, "relu": va.scores.General(torch.eye(6), activation="relu")}


def inputs(n: int, m: int, heads: int = 2) -> list[Tensor]:
    """query, key, value and the cotangent of the output. The first feature of each query is positive."""
    query, key, value, grad = (torch.randn(1, heads, length, 6) for length in (n, m, m, n))
    query[..., 0] = query[..., 0].abs() + 0.1
    return [query, key, value, grad]


def assert_no_less_finite(backend: str, run: Any) -> None:
    for i, (got, formula) in enumerate(zip(run(backend), run("reference"), strict=True)):
        lost = formula.isfinite() & ~got.isfinite()
        assert not lost.any(), f"result {i} is not finite at {lost.nonzero()[:5].tolist()}"


@pytest.mark.parametrize("rule", ("gradient", "attention"))
@each("size", **FAST)
def test_relevancy_beside_an_infinite_key_or_value(backend: str, size: tuple[int, int], rule: str) -> None:
    """A key of -Inf, which no query attends to, and a value of Inf, which leaves the relevancy of the other keys finite."""
    combine = covering if backend == "triton" else itertools.product
    for (place, number), carried, row_normalize in combine(((1, -INF), (2, INF)), (1, 3), (False, True)):
        tensors = inputs(*size)
        tensors[place][0, 0, 3, 0] = number
        rows, found = torch.rand(1, carried, size[0]), []

        def run(name: str, t: Any = (rows, *tensors), normalize: bool = row_normalize, found: Any = found) -> list[Tensor]:
            found.append(va.relevancy_step(*t, rule=rule, row_normalize=normalize, backend=name))
            return found[-1:]

        assert_no_less_finite(backend, run)
        if place == 1:
            torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def gradients(backend: str, tensors: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    query, key, value, grad = tensors
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    out, lse = va.score_attention(*leaves, **options, return_lse=True, backend=backend)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("is_causal", (False, True), ids=("", "causal"))
@each("size", **FAST)
def test_gradients_and_statistics_beside_an_infinite_key(backend: str, size: tuple[int, int], is_causal: bool) -> None:
    """A key of -Inf, which no query attends to, receives nothing."""
    tensors = inputs(*size)
    tensors[1][0, 0, 3, 0] = -INF
    assert_no_less_finite(backend, lambda name: gradients(name, tensors, {"is_causal": is_causal}))

    def statistics(name: str) -> list[Tensor]:
        query, key = (x.clone().requires_grad_() for x in tensors[:2])
        found = va.attention_statistics(query, key, is_causal=is_causal, backend=name)
        total = found.entropy.sum() + found.received.square().sum()
        return [found.entropy.detach(), found.received.detach(), *torch.autograd.grad(total, (query, key))]

    assert_no_less_finite(backend, statistics)


@pytest.mark.parametrize(
    "score", (va.scores.Additive(UNITS, torch.eye(6), torch.eye(6)), HADAMARD["tanh"]), ids=("additive", "hadamard")
)
@on("streaming", "cpu", "triton")
def test_a_masked_pair_of_hidden_units_is_not_there(backend: str, score: Any) -> None:
    visible = torch.arange(18) != 3
    tensors = inputs(17, 18)
    tensors[1][0, :, 3] = torch.tensor([[INF], [NAN]])
    for mask in (visible, torch.where(visible, 0.5, -INF)):
        assert_no_less_finite(
            backend, lambda name, m=mask: gradients(name, tensors, {"score": score, "attn_mask": m.expand(17, 18)})
        )


@pytest.mark.parametrize("score", SLOPES)
@each("size", **KERNELS)
def test_gradients_beside_infinity(backend: str, size: tuple[int, int], score: str) -> None:
    """Where ReLU is zero its gradient is, too. A query, key, value or cotangent has it, each in a head of its own."""
    tensors = inputs(*size, heads=4)
    for head, x in enumerate(tensors):
        x[0, head, 0, 2] = INF
    assert_no_less_finite(backend, lambda name: gradients(name, tensors, {"score": SLOPES[score]}))


@pytest.mark.parametrize("score", ("scaled_dot", va.scores.Cosine(0.0), HADAMARD["tanh"]), ids=("dot", "cosine", "hadamard"))
@on("streaming", "cpu", "triton")
def test_padding_has_no_gradient_beside_nan(backend: str, score: Any) -> None:
    """A query, or a cotangent, that is not finite reaches the gradients of keys, but not of padding; and its own row of the
    query's gradient alone. Each of four heads has one, the fifth none."""
    key_mask = torch.ones(1, 20, dtype=torch.bool)
    key_mask[:, 5] = key_mask[:, 18:] = False
    tensors = inputs(17, 20, heads=5)
    for head, (place, number) in enumerate(itertools.product((0, 3), (INF, NAN))):
        tensors[place][0, head, 3, 2] = number
    _, _, grad_query, *others = gradients(backend, tensors, {"score": score, "key_mask": key_mask})
    assert all(not grad[:, :, [5, 18, 19]].any() for grad in others)
    rest = torch.arange(17) != 3
    assert grad_query[:, :, rest].isfinite().all() and grad_query[:, 4].isfinite().all()


@on("streaming", "cpu", "triton")
def test_padding_has_no_gradient_of_statistics_beside_nan(backend: str) -> None:
    query, key, _, _ = inputs(17, 20)
    query[0, 0, 3, 2] = NAN
    key_mask = torch.arange(20)[None] % 5 > 0
    key.requires_grad_()
    found = va.attention_statistics(query, key, key_mask=key_mask, backend=backend)
    (grad,) = torch.autograd.grad(found.entropy.sum() + found.received.sum(), key)
    assert not grad[:, :, ::5].any() and grad[0, 0, 1].isnan().any()


@on("streaming", "cpu", "triton")
def test_singular_congruence_with_a_head_that_cannot_see_a_key(backend: str) -> None:
    """A score of -Inf in one head: the sum of the heads is that of the others."""
    query, key = (torch.rand(1, 2, 5, 4) + 0.1 for _ in range(2))
    key[0, 0, 2, 1] = -INF
    image = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4)
    pairs = [
        va.congruence_loss((query, key), image, kind="iais_singular", direction="text", backend=b) for b in (backend, "reference")
    ]
    assert pairs[1].isfinite() and pairs[0].isfinite()
    torch.testing.assert_close(*pairs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ("cacr", "iais_distributed", "iais_singular"))
@each("sizes", cpu=((5, 9, 4), (18, 20, 4), (5, 140, 4)), triton=((5, 9, 4), (18, 20, 4), (5, 35, 65)))
def test_gradients_of_congruence_beside_an_infinite_key(backend: str, sizes: tuple[int, int, int], kind: str) -> None:
    """A key of -Inf in one head, which no query attends to. With 65 features a tile of Triton's no longer holds whole rows."""
    text, image = ([torch.rand(1, 2, n, sizes[2]) + 0.1 for _ in range(2)] for n in sizes[:2])
    for _, key in (text, image):
        key[0, 0, 2, 1] = -INF

    def run(name: str) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (*text, *image)]
        loss = va.congruence_loss(tuple(leaves[:2]), tuple(leaves[2:]), kind=kind, backend=name)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    assert_no_less_finite(backend, run)
