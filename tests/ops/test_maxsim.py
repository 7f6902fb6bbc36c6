"""maxsim: the formula by hand, every backend against it, and what it refuses."""

from functools import partial

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import as_dtype, assert_all_close_to, outputs_and_grads
from tests.helpers.ops.backends import F64, finest, on

FAST = ("streaming", "cpu", "triton")
TILE_ELEMENTS = 200  # streaming crosses several tiles on both sides


def tensors(a: int = 3, n: int = 7, b: int = 4, m: int = 11, d: int = 12) -> dict[str, Tensor]:
    shapes = {"queries": (a, n, d), "documents": (b, m, d)}
    return {name: torch.nn.functional.normalize(torch.randn(*shape, dtype=F64), dim=-1) for name, shape in shapes.items()}


@on("reference", *FAST)
def test_by_hand(backend: str) -> None:
    """Two query tokens choose the second and the first document token: 3 + 2."""
    queries = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], requires_grad=True)
    documents = torch.tensor([[[1.0, 2.0], [3.0, -1.0], [3.0, 0.0]]], requires_grad=True)
    similarity = va.maxsim(queries, documents, backend=backend)
    assert similarity.tolist() == [[5.0]]
    grad_q, grad_d = torch.autograd.grad(similarity, (queries, documents), torch.tensor([[2.0]]))
    assert grad_q.tolist() == [[[6.0, -2.0], [2.0, 4.0]]]  # of two that tie, the first
    assert grad_d.tolist() == [[[0.0, 2.0], [2.0, 0.0], [0.0, 0.0]]]


@on("reference", *FAST)
def test_products_that_are_all_infinite(backend: str) -> None:
    """And below 0: so is their sum, which is not that of a document without tokens."""
    inputs = as_dtype(tensors(), torch.float32)
    inputs["queries"][1, 2].fill_(0.0)[3], inputs["documents"][2, :, 3] = 1.0, -torch.inf
    inputs["queries"][:, :, 3].abs_()
    similarity = va.maxsim(**inputs, backend=backend)
    assert similarity[:, 2].eq(-torch.inf).all() and similarity[:, [0, 1, 3]].isfinite().all()


@on("reference", *FAST)
@pytest.mark.parametrize("first, second", [(3, 5), (3, 67), (3, 68)])
def test_of_tokens_with_nan_the_first_is_chosen(first: int, second: int, backend: str) -> None:
    inputs = as_dtype(tensors(m=70), torch.float32)
    inputs["documents"][1, [first, second], 2] = torch.nan
    grad = outputs_and_grads(partial(va.maxsim, backend=backend), inputs)["grad documents"]
    assert grad[1].any(-1).nonzero().flatten().tolist() == [first]


@on(*FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_query_token_reaches_the_gradient_of_what_it_chose_alone(value: float, dtype: torch.dtype, backend: str) -> None:
    """One number of one token is not finite: so is one number of the gradient of each document."""
    inputs, weight = as_dtype(tensors(m=70), dtype), torch.rand(3, 4) + 0.5
    real = torch.ones(3, 7, dtype=torch.bool)
    real[1, 2] = False
    without = outputs_and_grads(partial(va.maxsim, query_mask=real, backend=backend), inputs, [weight])["grad documents"]
    inputs["queries"][1, 2, 3] = value
    got = outputs_and_grads(partial(va.maxsim, backend=backend), inputs, [weight])["grad documents"]
    reached = ~got.isfinite()
    assert (reached.sum((1, 2)) == 1).all() and reached[..., 3].any(1).all()
    others = ~reached.any(-1)
    torch.testing.assert_close(got[others], without[others])


@on(*FAST)
def test_large_numbers(backend: str) -> None:
    """All products lie far below 0."""
    inputs = as_dtype(tensors(), finest(backend))
    inputs["queries"], inputs["documents"] = 1e3 * inputs["queries"].abs(), -1e3 * inputs["documents"].abs()
    got = assert_all_close_to(partial(va.maxsim, backend=backend), va.reference.maxsim, inputs, [torch.randn(3, 4)])
    assert (got["out0"] < 0).all()


@on("reference", *FAST)
def test_weights_keep_more_digits_than_bfloat16_has(backend: str) -> None:
    """Three tokens of a query chose the document's token, each with the weight 1 + 2^-9: float16 holds three times that."""
    queries, documents = (torch.ones(1, size, 16, dtype=torch.float16, requires_grad=True) for size in (3, 1))
    similarity = va.maxsim(queries, documents, backend=backend)
    (grad,) = torch.autograd.grad(similarity, documents, torch.tensor([[1 + 2.0**-9]]).to(similarity.dtype))
    assert torch.equal(grad, torch.full((1, 1, 16), 3 + 3 * 2.0**-9, dtype=torch.float16))


def test_places_are_kept_for_a_gradient_alone() -> None:
    arguments = *as_dtype(tensors(), torch.float32).values(), None, None
    for saves in (False, True):
        for backend in ("streaming", "cpu"):
            assert torch.ops.vlattn.maxsim(*arguments, saves, backend)[1].numel() == (3 * 4 * 7 if saves else 0)
