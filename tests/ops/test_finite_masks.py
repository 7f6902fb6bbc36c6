"""A finite mask value is data, however large: a row with finfo.min or -1e9 in every place attends to all its keys, forward and
backward, in every backend that takes float masks."""

import itertools

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.ops.backends import core, each, on

BACKENDS = ("reference", "streaming", "cpu", "triton")
ROWS, SIZE = 40, 8
MASKED = (0, 17, 39)  # rows with one value throughout
VALUES = (torch.finfo(torch.float32).min, -1e9, -1e4, 1e9)

# the interpreter's numpy warns of Inf in numbers that no result takes
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in:RuntimeWarning")
TILE_ELEMENTS = 64  # so small that streaming takes torch's fused CPU kernel, too; the backward pass must not


def mask_of(value: float) -> Tensor:
    """(N, N) float32."""
    mask = torch.randn(ROWS, ROWS)
    mask[list(MASKED)] = value
    return mask


def inputs(dtype: torch.dtype, b: int = 2, h: int = 2) -> dict[str, Tensor]:
    return {name: torch.randn(b, h, ROWS, SIZE, dtype=dtype) for name in ("query", "key", "value")}


@each("dtype", **{backend: core(backend) for backend in BACKENDS})
def test_each_row_of_probabilities_sums_to_one_in_the_backward_pass(backend: str, dtype: torch.dtype) -> None:
    """The gradient of value, summed over the keys, is the cotangent, summed over the rows."""
    tanh = va.scores.General(torch.eye(SIZE, dtype=dtype), activation="tanh")
    for value, score in itertools.product(VALUES, ("scaled_dot", tanh)):
        leaves = {name: x.requires_grad_() for name, x in inputs(dtype, 1, 1).items()}  # every head has this mask
        out = va.score_attention(**leaves, score=score, attn_mask=mask_of(value), backend=backend)
        grad = torch.zeros_like(out)
        grad[:, :, list(MASKED)] = torch.rand(1, 1, 3, SIZE).to(dtype)
        (grad_value,) = torch.autograd.grad(out, leaves["value"], grad)
        tolerance = 8 * torch.finfo(dtype).eps + 1e-3  # 1e4 in float32 has three digits behind the point
        torch.testing.assert_close(grad_value.float().sum(2), grad.float().sum(2), rtol=tolerance, atol=tolerance)


@on(*BACKENDS)
def test_relevancy_step_keeps_the_sum_of_each_row(backend: str) -> None:
    """rule="attention": the rows of Abar sum to 1, without the attention's lse and with it."""
    rows = torch.eye(ROWS).expand(2, -1, -1)
    for value in VALUES:
        (query, key, v), mask = inputs(torch.float32).values(), mask_of(value)
        for lse in (None, va.score_attention(query, key, v, attn_mask=mask, return_lse=True)[1]):
            abar = va.relevancy_step(rows, query, key, rule="attention", lse=lse, attn_mask=mask, backend=backend)
            torch.testing.assert_close(abar.sum(-1), torch.ones(2, ROWS), rtol=0.0, atol=1e-3)


@on(*BACKENDS[1:])
def test_an_lse_that_counts_more_keys_is_taken_as_it_is(backend: str) -> None:
    """Two halves of the keys with the lse of all of them give the whole map. (The reference recomputes the lse.)"""
    tensors, mask = inputs(torch.float32), mask_of(-1e3)
    _, lse = va.score_attention(**tensors, attn_mask=mask, return_lse=True)
    rows, (query, key) = torch.eye(ROWS).expand(2, -1, -1), (tensors["query"], tensors["key"])
    halves = [
        va.relevancy_step(rows, query, key[:, :, part], rule="attention", lse=lse, attn_mask=mask[:, part], backend=backend)
        for part in (slice(0, 20), slice(20, None))
    ]
    whole = va.reference.relevancy_step(rows, query, key, rule="attention", attn_mask=mask)
    torch.testing.assert_close(torch.cat(halves, dim=-1), whole, rtol=1e-3, atol=1e-6)


@each("dtype", cpu=core("cpu"), triton=core("triton"), cuda=core("cuda"))
@pytest.mark.slow("cuda", "triton")
def test_additive_scores_and_their_lse(backend: str, dtype: torch.dtype) -> None:
    """The score that CUDA C++ has, with rows whose values differ or that are fully masked beside the others, at either end."""
    for value in (*VALUES, torch.finfo(torch.float32).max):
        mask = mask_of(value)
        mask[17, :5] = 0.5 * value
        mask[5] = -torch.inf
        leaves = {name: x.requires_grad_() for name, x in inputs(dtype, 1, 1).items()}
        score = va.scores.Additive(torch.linspace(-1.0, 1.0, SIZE, dtype=dtype))
        out, lse = va.score_attention(**leaves, score=score, attn_mask=mask, return_lse=True, backend=backend)
        torch.testing.assert_close(lse[..., 0], torch.full_like(lse[..., 0], value), rtol=1e-3, atol=10.0)
        assert torch.isneginf(lse[..., 5]).all()
        grad = torch.zeros_like(out)
        grad[:, :, [5, *MASKED]] = torch.rand(1, 1, 4, SIZE).to(dtype)
        (grad_value,) = torch.autograd.grad(out, leaves["value"], grad)
        grad[:, :, 5] = 0.0
        tolerance = 8 * torch.finfo(dtype).eps + 1e-3
        torch.testing.assert_close(grad_value.float().sum(2), grad.float().sum(2), rtol=tolerance, atol=tolerance)


@each("dtype", cpu=core("cpu"), triton=core("triton"))
def test_a_normalized_step_with_the_lse_of_another_attention(backend: str, dtype: torch.dtype) -> None:
    for value in VALUES:
        tensors, mask = inputs(dtype), mask_of(value)
        lse = va.reference.score_attention(**tensors, attn_mask=mask, return_lse=True)[1]
        options = {"rule": "attention", "lse": lse, "attn_mask": mask, "row_normalize": True}
        abar = va.relevancy_step(torch.eye(ROWS).expand(2, -1, -1), tensors["query"], tensors["key"], backend=backend, **options)
        torch.testing.assert_close(abar.sum(-1), torch.ones(2, ROWS), rtol=0.0, atol=4e-3)
