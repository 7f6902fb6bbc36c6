"""Float masks keep their digits and their meaning: they are added in the dtype of sums or their own, whichever is wider; only
-inf masks, and NaN goes through."""

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.compare import assert_all_close_to
from tests.helpers.ops.backends import core, each, on

BACKENDS = ("reference", "streaming")
ALL = (*BACKENDS, "cpu", "triton")
HALF = (torch.bfloat16, torch.float16)
FLOATS = (*HALF, torch.float32, torch.float64)
ROWS, KEYS, SIZE = 33, 47, 16


# the interpreter's numpy warns of Inf in numbers that no result takes
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in:RuntimeWarning")
TILE_ELEMENTS = 64  # so small that streaming takes torch's fused CPU kernel in every dtype, where it may


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "query": torch.randn(2, 2, ROWS, SIZE, dtype=dtype),
        "key": torch.randn(2, 2, KEYS, SIZE, dtype=dtype),
        "value": torch.randn(2, 2, KEYS, SIZE, dtype=dtype),
    }


def in_float64(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() for name, x in tensors.items()}


@each("dtype", reference=HALF, streaming=HALF, cpu=HALF[:1], triton=HALF[:1])
def test_a_float32_bias_keeps_its_digits(backend: str, dtype: torch.dtype) -> None:
    """A bias around 40 has a spacing of 1/4 in bfloat16."""
    tensors, mask = inputs(dtype), 40.0 + torch.randn(ROWS, KEYS)
    out, lse = va.score_attention(**tensors, attn_mask=mask, return_lse=True, backend=backend)
    exact, exact_lse = va.reference.score_attention(**in_float64(tensors), attn_mask=mask, return_lse=True)
    assert (out.double() - exact).abs().max() < 4 * torch.finfo(dtype).eps
    assert (lse.double() - exact_lse).abs().max() < 2 * torch.finfo(dtype).eps
    assert_all_close_to(
        lambda query, key, value: va.score_attention(query, key, value, attn_mask=mask, backend=backend),
        lambda query, key, value: va.reference.score_attention(query, key, value, attn_mask=mask),
        tensors,
        [torch.randn(2, 2, ROWS, SIZE)],
        what=f"{backend}, {dtype}",
    )


@each("dtype", reference=HALF, streaming=HALF, cpu=HALF[:1], triton=HALF[:1])
def test_the_lse_of_a_float32_bias_serves_relevancy_step(backend: str, dtype: torch.dtype) -> None:
    tensors, mask = inputs(dtype), 40.0 + torch.randn(ROWS, KEYS)
    _, lse = va.score_attention(**tensors, attn_mask=mask, return_lse=True, backend=backend)
    rows = torch.eye(ROWS).expand(2, -1, -1)
    abar = va.relevancy_step(rows, tensors["query"], tensors["key"], rule="attention", lse=lse, attn_mask=mask, backend=backend)
    torch.testing.assert_close(abar.sum(-1), torch.ones(2, ROWS), rtol=0.0, atol=8 * torch.finfo(dtype).eps)


@each("dtype", **{backend: core(backend) for backend in ALL})
def test_the_smallest_finite_value_masks_nothing(backend: str, dtype: torch.dtype) -> None:
    tensors = inputs(dtype)
    for mask_dtype in FLOATS:
        mask = torch.zeros(ROWS, KEYS, dtype=mask_dtype)
        mask[3] = torch.finfo(mask_dtype).min
        mask[4] = -torch.inf
        out, lse = va.score_attention(**tensors, attn_mask=mask, return_lse=True, backend=backend)
        if torch.finfo(mask_dtype).min < -1e30:  # what the scores add to -65504 stays visible
            mean = tensors["value"].double().mean(2)
            torch.testing.assert_close(out[:, :, 3].double(), mean, rtol=0.0, atol=4 * torch.finfo(dtype).eps)
        assert out[:, :, 3].abs().min() > 0.0 and torch.isfinite(out).all()
        assert torch.equal(out[:, :, 4], torch.zeros_like(out[:, :, 4])) and torch.isneginf(lse[:, :, 4]).all()


@pytest.mark.parametrize("bad", (torch.nan, torch.inf), ids=str)
@on(*ALL)
def test_nan_goes_through(backend: str, bad: float) -> None:
    """NaN, and a mask of +inf, for which the formula has none but NaN."""
    tensors, mask = inputs(torch.float32), torch.randn(ROWS, KEYS)
    mask[5, 7] = bad
    out, lse = va.score_attention(**tensors, attn_mask=mask, return_lse=True, backend=backend)
    wrong = torch.isnan(out).any(-1).all((0, 1))
    assert wrong.nonzero().flatten().tolist() == [5] and not torch.isfinite(lse[:, :, 5]).any()
    abar = va.attention_map(tensors["query"], tensors["key"], attn_mask=mask, backend=backend)
    assert torch.isnan(abar).any(-1).all(0).nonzero().flatten().tolist() == [5]
    statistics = va.attention_statistics(tensors["query"], tensors["key"], attn_mask=mask, backend=backend)
    assert torch.isnan(statistics.entropy[:, :, 5]).all() and torch.isnan(statistics.maximum[:, :, 5]).all()
    for row_normalize in (False, True):
        moved = va.relevancy_step(
            torch.ones(2, 1, ROWS),
            *tensors.values(),
            torch.randn(2, 2, ROWS, SIZE),
            row_normalize=row_normalize,
            attn_mask=mask,
            backend=backend,
        )
        assert torch.isnan(moved).any()


MIN, MAX = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max


@pytest.mark.parametrize("rest", (0.0, MIN, MAX, -torch.inf), ids=str)
@on("streaming", "cpu", "cuda", "triton")
def test_nan_in_a_mask_is_not_dropped(backend: str, rest: float) -> None:
    """Whatever the other values of its row are; where another mask hides its pair it is not there."""
    tensors = {name: x[:1, :1] for name, x in inputs(torch.float32).items()}  # all heads have this mask
    mask = torch.zeros(ROWS, KEYS)
    mask[5] = mask[6] = mask[7] = rest
    mask[5, 7], mask[6, 45], mask[7, 46] = torch.nan, torch.nan, 0.0
    mask[8, 46] = torch.nan
    key_mask = torch.ones(1, KEYS, dtype=torch.bool)
    key_mask[:, 46] = False
    options = {"score": va.scores.Additive(torch.linspace(-1.0, 1.0, SIZE)), "attn_mask": mask, "key_mask": key_mask}
    for causal, rows in ((False, [5, 6]), (True, [])):
        ours, formula = (
            va.score_attention(**tensors, **options, is_causal=causal, return_lse=True, backend=b) for b in (backend, "reference")
        )
        for got, right in zip(ours, formula, strict=True):
            got, right = (x.flatten(3).isnan().any(-1) if x.dim() == 4 else x.isnan() for x in (got, right))
            assert right.all((0, 1)).nonzero().flatten().tolist() == rows
            assert torch.equal(got, right)


@on("streaming", "cpu", "triton")
def test_nan_in_a_mask_reaches_relevancy(backend: str) -> None:
    query, key, value, grad = (torch.randn(1, 2, ROWS, SIZE) for _ in range(4))
    for rest in (0.0, MIN, -torch.inf):
        mask = torch.zeros(ROWS, ROWS)
        mask[5] = rest
        mask[5, 3] = torch.nan
        start = torch.zeros(1, 1, ROWS, requires_grad=True)
        out, carrier = va.relevancy_attention(query, key, value.requires_grad_(), start, attn_mask=mask, backend=backend)
        assert out.isnan().any(-1).all((0, 1)).nonzero().flatten().tolist() == [5]
        of_start, of_value = torch.autograd.grad([out, carrier], [start, value], [grad, torch.eye(ROWS)[5][None, None]])
        assert of_start.isnan().any() and of_value.isnan().any()


@pytest.mark.parametrize("bad", (torch.nan, torch.inf, 3e38), ids=str)
@on("reference", "streaming", "cpu", "triton")
def test_minus_infinity_masks_what_is_not_finite(backend: str, bad: float) -> None:
    """A masked pair is not there, whatever its score is: Inf, NaN, or too large for float32."""
    tensors = {name: x[:1].clone() for name, x in inputs(torch.float32).items()}
    visible = torch.ones(ROWS, KEYS, dtype=torch.bool)
    visible[:, 7] = False
    tensors["key"][0, 0, 7] = bad
    mask = torch.where(visible, 0.5, -torch.inf)
    without = torch.arange(KEYS) != 7
    rest = {name: x if name == "query" else x[:, :, without] for name, x in tensors.items()}
    query, key = tensors["query"], tensors["key"]
    want = va.reference.score_attention(**rest)
    for each_mask in (mask, visible):
        options = {"attn_mask": each_mask, "backend": backend}
        leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        out = va.score_attention(**leaves, **options, return_lse=True)[0]
        torch.testing.assert_close(out.detach(), want)
        (grad,) = torch.autograd.grad(out.sum(), leaves["value"])
        torch.testing.assert_close(grad.sum(2), torch.full((1, 2, SIZE), float(ROWS)))
        torch.testing.assert_close(va.attention_map(query, key, **options).sum(-1), torch.ones(1, ROWS))
        statistics = va.attention_statistics(query, key, **options)
        assert all(torch.isfinite(x).all() for x in statistics if x is not None)
