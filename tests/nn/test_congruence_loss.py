"""CongruenceLoss is the operator with its options kept; training_signal_annealing against the paper's schedules."""

from __future__ import annotations

import math

import pytest
import torch

from tests.ops.congruence_loss_cases import call, make, masks
from vlattn_fast.nn.congruence_loss import CongruenceLoss, training_signal_annealing
from vlattn_fast.ops.congruence_loss import KINDS, congruence_loss


@pytest.mark.parametrize("kind", KINDS)
def test_module(kind: str) -> None:
    x, options = make(6, 9, b=3, cross=True), masks("scattered")
    module = CongruenceLoss(kind, direction="image", scale=0.3, reduction="none")
    got = call(lambda *args, reduction, **masks: module(*args, **masks), **options)(**x)
    want = call(congruence_loss, kind=kind, direction="image", scale=0.3, **options)(**x)
    assert torch.equal(got, want)
    assert kind in repr(module) and "image" in repr(module)
    for wrong in ({"kind": "soft"}, {"direction": "up"}, {"reduction": "sum"}, {"scale": math.inf}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            CongruenceLoss(**wrong)  # type: ignore[arg-type]


def test_training_signal_annealing() -> None:
    # x = 1/4
    want = {"linear": 0.25, "exp": math.exp(-3.75), "log": 1 - math.exp(-1.25), "const": 1.0}
    for schedule, weight in want.items():
        assert training_signal_annealing(25, 100, schedule) == pytest.approx(weight)
    assert training_signal_annealing(100, 100) == training_signal_annealing(300, 100) == 1.0
    assert training_signal_annealing(0, 100, "log") == training_signal_annealing(0, 100, "linear") == 0.0
    for arguments, words in (((-1, 10), "step"), ((1, 0), "num_steps"), ((1, 10, "cosine"), "schedule")):
        with pytest.raises(ValueError, match=f"{words} must be"):
            training_signal_annealing(*arguments)
