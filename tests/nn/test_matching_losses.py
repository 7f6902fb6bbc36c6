"""ScanLoss and DamsmLoss against the papers' sums, written out pair by pair."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vlattn_fast.backends.reference.stacked_cross_attention import stacked_cross_attention
from vlattn_fast.nn import DamsmLoss, ScanLoss

LENGTHS = torch.tensor([4, 6, 2, 5])


def pairs() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 5, 8, dtype=torch.float64), torch.randn(4, 6, 8, dtype=torch.float64)


def scan(similarity: Tensor, margin: float, hardest: bool, same: Any) -> Tensor:
    """Equations 8 to 10, one term at a time."""
    total = similarity.new_zeros(())
    for i in range(len(similarity)):
        false = [j for j in range(len(similarity)) if not same(i, j)]
        for row in (similarity[i], similarity[:, i]):
            terms = [(margin - similarity[i, i] + row[j]).clamp(min=0) for j in false]
            if terms:
                total = total + (max(terms) if hardest else sum(terms))
    return total


@pytest.mark.parametrize("ids", [None, [0, 1, 0, 2], [3, 3, 3, 3]])
@pytest.mark.parametrize("hardest", [True, False])
@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_scan(direction: str, hardest: bool, ids: list[int] | None) -> None:
    images, captions = (x.requires_grad_() for x in pairs())
    options: dict[str, Any] = {"direction": direction, "first_norm": "clipped_l2norm", "aggregation": "mean"}
    loss = ScanLoss(0.3, hardest, backend="streaming", **options)
    got = loss(images, captions, LENGTHS, ids=None if ids is None else torch.tensor(ids))
    similarity = stacked_cross_attention(images, captions, LENGTHS, None, smooth=9.0, lambda_lse=6.0, **options)
    want = scan(similarity, 0.3, hardest, lambda i, j: i == j or (ids is not None and ids[i] == ids[j]))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    if want.requires_grad:
        grads = [torch.autograd.grad(x, (images, captions), retain_graph=True) for x in (got, want)]
        torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("ids", [None, [0, 1, 0, 2]])
def test_damsm(ids: list[int] | None) -> None:
    """Equations 10 to 12: the posteriors of a caption given its image and of an image given its caption."""
    images, captions = (x.requires_grad_() for x in pairs())
    got = DamsmLoss(4.0, 5.0, 3.0, backend="streaming")(images, captions, LENGTHS, ids=None if ids is None else torch.tensor(ids))
    scores = 5.0 * stacked_cross_attention(
        *(images, captions, LENGTHS, None),
        **{"direction": "t2i", "first_norm": "softmax", "smooth": 4.0, "aggregation": "logsumexp", "lambda_lse": 5.0},
    )
    total: Any = 0.0
    for i in range(4):
        others = [j for j in range(4) if j == i or ids is None or ids[i] != ids[j]]
        for row in (scores[i], scores[:, i]):
            total = total - (math.e ** (3.0 * row[i]) / sum(math.e ** (3.0 * row[j]) for j in others)).log() / 4
    torch.testing.assert_close(got, total, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(x, (images, captions), retain_graph=True) for x in (got, total)]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("loss", [ScanLoss(), ScanLoss(hardest=False), DamsmLoss()])
def test_an_empty_batch_has_loss_0(loss: Any) -> None:
    empty = loss(torch.randn(0, 5, 8), torch.randn(0, 6, 8))
    assert empty.shape == () and float(empty) == 0.0


def test_defaults() -> None:
    """SCAN's margin over the hardest pairs with its own similarity; gamma as in AttnGAN's released configs."""
    images, captions = pairs()
    got = ScanLoss(backend="streaming")(images, captions, LENGTHS), DamsmLoss(backend="streaming")(images, captions, LENGTHS)
    scan_options: dict[str, Any] = {"direction": "t2i", "first_norm": "clipped_l2norm", "smooth": 9.0}
    options: dict[str, Any] = {**scan_options, "aggregation": "logsumexp", "lambda_lse": 6.0, "backend": "streaming"}
    torch.testing.assert_close(got[0], ScanLoss(0.2, True, **options)(images, captions, LENGTHS))
    torch.testing.assert_close(got[1], DamsmLoss(4.0, 5.0, 10.0, backend="streaming")(images, captions, LENGTHS))


def test_refusals() -> None:
    images, captions = pairs()
    for loss in (ScanLoss(), DamsmLoss()):
        with pytest.raises(ValueError, match="captions must be as many as images, pair by pair; got 4 for 3 images"):
            loss(images[:3].float(), captions.float())
        with pytest.raises(ValueError, match="ids must be an integer tensor"):
            loss(images.float(), captions.float(), ids=torch.ones(4))
        assert repr(loss)
    for wrong in (lambda: ScanLoss(-0.1), lambda: DamsmLoss(gamma3=-1.0)):
        with pytest.raises(ValueError, match="must be"):
            wrong()
    with pytest.raises(TypeError, match="hardest must be"):
        ScanLoss(hardest="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["direction", "first_norm", "smooth", "aggregation", "lambda_lse", "backend", "foo"])
def test_options_are_refused_where_the_loss_is_made(name: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"{name} must be|unexpected keyword argument '{name}'"):
        ScanLoss(**{name: "garbage"})
    if name == "lambda_lse":
        with pytest.raises(ValueError, match="lambda_lse must be greater than 0"):
            ScanLoss(lambda_lse=0.0)
        with pytest.raises(ValueError, match="gamma2 must be greater than 0"):
            DamsmLoss(gamma2=0.0)
        assert ScanLoss(aggregation="mean", lambda_lse=0.0)  # which no logarithm divides by
