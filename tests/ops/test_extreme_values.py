"""Values at the ends of a dtype's range: as the formula has them, in every backend."""

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import assert_all_close_to
from tests.helpers.ops.backends import each, on
from vlattn_fast import scores as S
from vlattn_fast._ground.tensors import unit_vectors
from vlattn_fast.scores import cosine

# the interpreter's numpy warns of Inf in numbers that no result takes
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered in:RuntimeWarning")
BACKENDS = ("reference", "streaming", "cpu", "triton")


def cosine_inputs(dtype: torch.dtype, size: float) -> dict[str, Tensor]:
    """query and key with entries of about `size`, rounded to `dtype`."""
    tensors = {name: torch.randn(1, 2, 9 + 4 * n, 16).double() for n, name in enumerate(("query", "key", "value"))}
    tensors["value"] = tensors["value"][:, :, :13]
    return {name: (x if name == "value" else size * x.clamp(-3, 3)).to(dtype) for name, x in tensors.items()}


def check_cosine(backend: str, dtype: torch.dtype, size: float, eps: float) -> None:
    """Output and gradients are those of the same vectors with entries of at most 1."""
    tensors, score = cosine_inputs(dtype, size), S.Cosine(eps)
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    out = va.score_attention(**leaves, score=score, scale=3.0, backend=backend)
    unit = {name: (x.double() / x.double().abs().amax(-1, keepdim=True)).requires_grad_() for name, x in tensors.items()}
    unit["value"] = tensors["value"].double().requires_grad_()
    exact = va.reference.score_attention(**unit, score=score, scale=3.0)
    tolerance = 16 * torch.finfo(dtype).eps
    assert (out.double() - exact).abs().max() < tolerance
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, list(leaves.values()), grad)
    wanted = torch.autograd.grad(exact, list(unit.values()), grad.double())
    for name, x, y in zip(tensors, got, wanted, strict=True):
        y = y if name == "value" else y / tensors[name].double().abs().amax(-1, keepdim=True)
        largest = y.abs().max()
        if largest > torch.finfo(dtype).tiny and largest < torch.finfo(dtype).max:
            assert (x.double() - y).abs().max() <= tolerance * largest, name


@pytest.mark.parametrize(
    "dtype, size",
    [
        (torch.float16, 9000.0),
        (torch.float16, 1e-4),
        (torch.bfloat16, 1e20),
        (torch.bfloat16, 1e-20),
        (torch.float32, 1e20),
        (torch.float32, 1e-20),
        (torch.float64, 1e160),
        (torch.float64, 1e-170),
    ],
    ids=str,
)
@pytest.mark.parametrize("eager", (True, False), ids=("features", "tiles"))
@on("reference", "streaming")
def test_cosine_does_not_depend_on_lengths(
    backend: str, eager: bool, dtype: torch.dtype, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a norm nor a product of norms overflows or underflows; eps = 0 lets even the smallest vectors have a direction."""
    if not eager:  # as on a GPU or under torch.compile, where nobody looks at the data
        monkeypatch.setattr(S.Cosine, "core", lambda self, q, k: S.Core("cosine", q, k, parameter=self.eps))
    check_cosine(backend, dtype, size, eps=0.0)


@each(
    "case",
    **{
        name: ((torch.float16, 9000.0), (torch.bfloat16, 1e20), (torch.float32, 1e20), (torch.float32, 1e30)) for name in BACKENDS
    },
)
@pytest.mark.parametrize("eager", (True, False), ids=("features", "tiles"))
def test_cosine_of_large_entries(
    backend: str, eager: bool, case: tuple[torch.dtype, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU and under torch.compile nobody looks at the data: a kernel has the clamp, and bounded vectors."""
    if not eager:  # as if a product of norms were below eps
        monkeypatch.setattr(cosine, "_unit_vectors_of_data", lambda x, eps: (x, torch.zeros(())))
    check_cosine(backend, *case, eps=1e-8)


@pytest.mark.parametrize(
    ("size", "short"), ((1e-25, False), (1e-5, True), (1.0, True), (1e5, True), (1e25, False), (torch.nan, False))
)
def test_vectors_whose_squares_fit_take_the_short_way_to_unit_vectors(
    size: float, short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    monkeypatch.setattr(cosine, "unit_vectors", lambda x, eps: taken.append(x) or unit_vectors(x, eps))
    x = torch.randn(1, 2, 5, 8) * size
    for found, expected in zip(cosine._unit_vectors_of_data(x, 1e-8), unit_vectors(x, 1e-8), strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True)
    assert len(taken) == (not short)


@on("cpu", "streaming")
def test_cosine_of_one_entry_has_no_gradient(backend: str) -> None:
    inputs = [(torch.rand(2, 3, 9, 1) + 0.1).requires_grad_() for _ in range(2)]
    out = va.score_attention(*inputs, torch.randn(2, 3, 9, 4), score="cosine", backend=backend)
    grads = torch.autograd.grad((out * torch.randn_like(out)).sum(), inputs)
    assert not any(bool(grad.any()) for grad in grads)


@on(*BACKENDS)
def test_cosine_without_a_clamp_beside_padding(backend: str) -> None:
    """With eps = 0 a zero key has no score, and what the formula writes into padding is no zero."""
    tensors = cosine_inputs(torch.float32, 1.0)
    inputs = [x.requires_grad_() for x in tensors.values()]
    key_mask = torch.ones(1, 13, dtype=torch.bool)
    key_mask[:, 9:] = False
    out = va.score_attention(*inputs, score=S.Cosine(0.0), key_mask=key_mask, backend=backend)
    real = [inputs[0], *(x[:, :, :9] for x in inputs[1:])]
    want = va.reference.score_attention(*real, score=S.Cosine(0.0))
    for got, right in zip(torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(want.sum(), inputs), strict=True):
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize("size", (1e-5, 1e-4, 3e-4, 1.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@on(*BACKENDS)
def test_the_clamp_of_cosine_is_on_the_product_of_norms(backend: str, dtype: torch.dtype, size: float) -> None:
    """Vectors around the root of eps, some zero: below eps the score is q . k / eps."""
    tensors = cosine_inputs(dtype, size)
    tensors["query"][:, :, 2] = 0.0
    tensors["key"][:, :, 5] = 0.0
    tensors["key"][:, :, 6] *= 1e3
    assert_all_close_to(
        lambda query, key, value: va.score_attention(query, key, value, score=S.Cosine(1e-6), scale=2.0, backend=backend),
        lambda query, key, value: va.reference.score_attention(query, key, value, score=S.Cosine(1e-6), scale=2.0),
        tensors,
        [torch.randn(1, 2, 9, 16)],
        what=f"{backend}, {dtype}, {size}",
    )


def test_cosine_below_eps_is_the_product_over_eps() -> None:
    """float64 by hand, forward and backward, at zero too."""
    query = torch.tensor([[[[3e-6, 4e-6], [0.0, 0.0]]]], dtype=torch.float64)
    key = torch.tensor([[[[1e-6, 0.0], [0.0, 2e-6]]]], dtype=torch.float64)
    for backend in ("reference", "streaming"):
        q, k = query.clone().requires_grad_(), key.clone().requires_grad_()
        _, lse = va.score_attention(q, k, torch.zeros_like(k), score=S.Cosine(1e-8), return_lse=True, backend=backend)
        q2, k2 = query.clone().requires_grad_(), key.clone().requires_grad_()
        by_hand = torch.logsumexp(q2 @ k2.mT / 1e-8, dim=-1)
        torch.testing.assert_close(lse, by_hand)
        for got, wanted in zip(torch.autograd.grad(lse.sum(), (q, k)), torch.autograd.grad(by_hand.sum(), (q2, k2)), strict=True):
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    "size, center", ((1e-9, 0.0), (1e-3, 0.0), (0.3, 0.0), (3.0, 0.0), (30.0, 0.0), (1e3, 0.0), (0.1, 5.0), (0.1, -5.0))
)
@on("streaming", "cpu")
def test_hidden_units_of_any_size(size: float, center: float, backend: str) -> None:
    """In float64 tanh(x + y) is taken from exponentials of 2 x and 2 y where that has its digits. Small units lose them, of
    saturated ones too little is left, and large ones overflow, also where x + y is small."""
    for dtype in (torch.float64, torch.float32) if backend == "streaming" else (torch.float32,):
        query, key = center + size * torch.randn(1, 2, 9, 6), center + size * torch.randn(1, 2, 13, 6)
        if center == 0.0:
            query[..., 1], key[..., 1] = query[..., 1] + 200 * size, key[..., 1] - 200 * size
        inputs = {"query": query, "key": key, "value": torch.randn(1, 2, 13, 4), "vector": torch.randn(2, 6)}
        assert_all_close_to(
            lambda vector, **x: va.score_attention(**x, score=S.Additive(vector), return_lse=True, backend=backend),
            lambda vector, **x: va.reference.score_attention(**x, score=S.Additive(vector), return_lse=True),
            {name: x.to(dtype) for name, x in inputs.items()},
            [torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9)],
        )


@on("streaming", "cpu")
def test_small_hidden_units_keep_their_digits_in_float32(backend: str) -> None:
    """From exponentials, tanh of a thousandth would be right to five digits only."""
    query, key, vector = 1e-3 * torch.randn(1, 2, 64, 4), 1e-3 * torch.randn(1, 2, 1, 4), torch.rand(2, 4)
    if backend == "streaming":  # where all are small, it takes tanh in float64, too; the CPU's kernel chooses tile by tile
        query[:, :, 0] = 0.5
    _, scores = va.score_attention(query, key, key, score=S.Additive(vector), return_lse=True, backend=backend)
    expected = (vector.double()[:, None] * (query.double() + key.double()).tanh()).sum(-1)
    assert (scores - expected)[:, :, 1:].abs().max() < 2e-6 * expected[:, :, 1:].abs().max()


@on("auto", *BACKENDS)
def test_an_overflow_is_no_relevancy_of_zero(backend: str) -> None:
    """dA beyond what float16 holds: its relevancy is large or not a number, never 0."""
    query, key = torch.zeros(1, 1, 4, 8, dtype=torch.float16), torch.zeros(1, 1, 4, 8, dtype=torch.float16)
    value = torch.full((1, 1, 4, 8), 3e4, dtype=torch.float16)
    step = va.relevancy_step(torch.ones(1, 1, 4), query, key, value, value, backend=backend)
    assert not (step < 1e4).any(), step
    abar = va.attention_map(query, key, value, value, rule="gradient", backend=backend)
    assert not (abar < 1e4).any(), abar
