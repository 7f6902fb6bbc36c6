"""Gradients of relevancy_step and attention_map in Triton: numbers of carried rows and of heads, small gradients."""

from functools import partial

import pytest
import torch

import vlattn_fast as va
from tests.helpers.ops.abar_cases import check, inputs
from tests.helpers.ops.masks import masks_of
from vlattn_fast.kernels import relevancy_attention as kernels

BF16, FP32 = torch.bfloat16, torch.float32


def made(n: int, m: int, seed: int, **sizes: int) -> dict[str, torch.Tensor]:
    return inputs(n, m, seed=seed, **({"b": 1, "h": 1, "kv": 1, "rows": 1} | sizes))


@pytest.mark.parametrize("rows", [16, 17, 64, 65])
@pytest.mark.parametrize("row_normalize", [False, True])
def test_number_of_carried_rows(rows: int, row_normalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond 64 in two products, as where a sample's map is too large to be stored."""
    monkeypatch.setattr(kernels, "_stored_maps", lambda *_: 0)
    dtype = FP32 if rows % 2 else BF16
    check("triton", "step", partial(made, 20, 33, rows=rows), dtype, rule="gradient", row_normalize=row_normalize)


@pytest.mark.parametrize("mask", ["bool of each H", "keys"])
def test_many_carried_rows_by_stored_maps(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample at a time, with masks that are a sample's own or shared."""
    monkeypatch.setattr(kernels, "_stored_maps", lambda *_: 1)
    make = partial(made, 9, 20, b=2, h=2, rows=65)
    check("triton", "step", make, rule="gradient", row_normalize=mask == "keys", **masks_of(mask, 9, 20))


@pytest.mark.parametrize("reduction", ["max", "min"])
def test_heads_of_more_than_one_word(reduction: str) -> None:
    samples = 2 if reduction == "min" else 1  # each has words of its own
    make = partial(made, 3, 5, b=samples, h=34, kv=2, rows=1)
    check("triton", "map", make, rule="attention", head_reduction=reduction, row_normalize=reduction == "max")


def test_small_gradients_in_float16() -> None:
    """Of each pair they lie below the numbers that float16 holds with all its digits; their sums do not."""
    tensors = {name: x.half() for name, x in made(40, 33, 0).items()}
    tensors["relevancy"] = 1e-4 * tensors["relevancy"].float()
    ours, exact = (
        torch.autograd.grad(va.relevancy_step(**leaves, backend=backend).sum(), list(leaves.values()))
        for backend, wide in (("triton", torch.float16), ("reference", torch.float64))
        for leaves in [{name: x.to(torch.promote_types(x.dtype, wide)).requires_grad_() for name, x in tensors.items()}]
    )
    for one, truth in zip(ours, exact, strict=True):
        assert (one.double() - truth).norm() < 2e-3 * truth.norm()
