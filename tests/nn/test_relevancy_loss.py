"""`RelevancyLoss` against its formulas, RobustViT's own among them, and what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from vlattn_fast.nn import RelevancyLoss

GENERATOR = torch.Generator().manual_seed(0)
ROW = torch.rand(2, 17, generator=GENERATOR, dtype=torch.float64)
MASK = torch.rand(2, 4, 4, generator=GENERATOR, dtype=torch.float64) > 0.4


def test_inside_is_the_share_outside_of_the_mask() -> None:
    loss = RelevancyLoss("inside")(ROW, MASK)
    want = torch.stack([row[1:][~mask.flatten()].sum() / row[1:].sum() for row, mask in zip(ROW, MASK, strict=True)]).mean()
    torch.testing.assert_close(loss, want)
    everywhere = torch.cat([torch.zeros(2, 1, dtype=torch.bool), MASK.flatten(1)], 1)
    torch.testing.assert_close(RelevancyLoss(prefix=1)(ROW, everywhere), want)
    soft = everywhere.double() * 0.5
    torch.testing.assert_close(RelevancyLoss()(ROW, soft), (ROW * (1 - soft)).sum(1).div(ROW.sum(1)).mean())


def test_mse_with_weights_is_the_loss_of_robust_vit() -> None:
    """background * mse(r * (1 - m), 0) + foreground * mse(r * m, m) of rows from 0 to 1."""
    mask = MASK.double().flatten(1)
    patches = ROW[:, 1:]
    least, largest = patches.amin(1, keepdim=True), patches.amax(1, keepdim=True)
    scaled = (patches - least) / (largest - least)
    want = 2 * functional.mse_loss(scaled * (1 - mask), torch.zeros_like(mask)) + 0.3 * functional.mse_loss(scaled * mask, mask)
    torch.testing.assert_close(RelevancyLoss("mse", foreground=0.3, background=2)(ROW, MASK), want)
    torch.testing.assert_close(RelevancyLoss("mse", scaled=False)(ROW, 3 * ROW), (2 * ROW).square().mean())


def test_cosine_of_another_row() -> None:
    other = torch.rand(2, 17, generator=GENERATOR, dtype=torch.float64)
    want = 1 - ((ROW * other).sum(1) / (ROW.norm(dim=1) * other.norm(dim=1))).mean()
    torch.testing.assert_close(RelevancyLoss("cosine")(ROW, other), want)
    torch.testing.assert_close(RelevancyLoss("cosine")(ROW, 5 * ROW), torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize("kind", ["inside", "mse", "cosine"])
def test_gradients(kind: str) -> None:
    row = ROW.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda r: RelevancyLoss(kind)(r, MASK), row)


@pytest.mark.parametrize(
    ("tokens", "size", "prefix", "taken", "grid"),
    [
        (17, (8, 8), None, 1, (4, 4)),
        (17, (2, 2), None, 1, (4, 4)),
        (16, (4, 4), None, 0, (4, 4)),
        (197, (224, 224), None, 1, (14, 14)),
        (201, (14, 14), None, 5, (14, 14)),
        (13, (6, 8), None, 1, (3, 4)),
        (17, (5, 5), 8, 8, (3, 3)),
    ],
)
def test_masks_of_other_grids(tokens: int, size: tuple[int, int], prefix: int | None, taken: int, grid: tuple[int, int]) -> None:
    row, mask = (torch.rand(2, *shape, generator=GENERATOR) for shape in ((tokens,), size))
    resized = functional.interpolate(mask[:, None], grid, mode="area").flatten(1)
    want = RelevancyLoss()(row[:, taken:], resized)
    torch.testing.assert_close(RelevancyLoss(prefix=prefix)(row, mask), want)


def test_rows_without_relevancy_and_with_nan() -> None:
    row = torch.zeros(2, 16, requires_grad=True)
    for kind in ("inside", "mse", "cosine"):
        (grad,) = torch.autograd.grad(RelevancyLoss(kind)(row, MASK), row)
        assert bool(grad.isfinite().all())
        assert bool(RelevancyLoss(kind)(torch.full((2, 16), torch.nan), MASK).isnan())
    assert RelevancyLoss()(row, MASK) == 0


@pytest.mark.parametrize(
    ("row", "target", "error", "says"),
    [
        (ROW, torch.rand(2, 16), ValueError, r"target must have shape \(B, N\) = \(2, 17\), or \(B, h, w\)"),
        (ROW, torch.rand(1, 4, 4), ValueError, "with B=2"),
        (ROW, torch.rand(2, 4, 4, 1), ValueError, "target must have shape"),
        (ROW, torch.rand(2, 3, 6), ValueError, "must fit the patches"),
        (ROW[:, :9], torch.rand(2, 8, 8), ValueError, "got 3 x 3 after 0 or 2 x 2 after 5"),
        (ROW, torch.rand(2, 0, 4), ValueError, "must fit the patches"),
        (ROW, 2 * torch.ones(2, 17), ValueError, "target must be from 0 to 1"),
        (ROW, torch.ones(2, 17, dtype=torch.int64), TypeError, "target must be bool or floating"),
        ({"vision": ROW}, ROW, TypeError, "relevancy must be a torch.Tensor"),
        (ROW[0], ROW, ValueError, "relevancy must have 2 dimensions"),
        (ROW, None, TypeError, "target must be a torch.Tensor"),
    ],
)
def test_wrong_rows_and_masks(row: Any, target: Tensor, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        RelevancyLoss()(row, target)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "max"}, "kind must be one of"),
        ({"background": 2.0}, "options of 'mse'"),
        ({"kind": "mse", "foreground": -1.0}, "foreground must be"),
        ({"kind": "mse", "scaled": 1}, "scaled must be"),
        ({"prefix": -1}, "prefix must be"),
        ({"prefix": 0.5}, "prefix must be"),
    ],
)
def test_wrong_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        RelevancyLoss(**options)
    with pytest.raises(ValueError, match="prefix must be less than"):
        RelevancyLoss(prefix=17)(ROW, ROW)


@pytest.mark.parametrize("kind", ["inside", "mse", "cosine"])
def test_a_batch_without_a_sample_has_a_loss_of_zero(kind: str) -> None:
    row = torch.rand(3, 17, requires_grad=True)
    loss = RelevancyLoss(kind)(row[:0], torch.ones(0, 17))
    loss.backward()
    assert loss == 0 and not row.grad.any()
