"""CongruenceLoss is the operator with its options kept; training_signal_annealing against the paper's schedules."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests.helpers.ops.congruence_loss_cases import call, make, masks
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


def test_schedule_weight_and_state() -> None:
    x = make(6, 9, b=3)
    parts = (x["text_query"], x["text_key"]), (x["image_query"], x["image_key"])
    loss = CongruenceLoss("iais_distributed", schedule="linear", num_steps=4, weight=2.0)
    whole = CongruenceLoss("iais_distributed")(*parts)
    for step in range(6):
        torch.testing.assert_close(loss(*parts), 2.0 * min(step / 4, 1.0) * whole)
    again = CongruenceLoss("iais_distributed", schedule="linear", num_steps=4, weight=2.0)
    again.load_state_dict(loss.state_dict())
    assert again.calls == loss.calls == 6
    loss.eval()
    loss(*parts)
    with torch.no_grad():
        loss.train()(*parts)
    assert loss.calls == 6  # counted in training alone, and with gradients
    for step in (-1, 1.5, True):
        with pytest.raises(ValueError, match=f"step must be an int from 0 on; got {step}"):
            CongruenceLoss()(*parts, step=step)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_steps must be the number of training steps"):
        CongruenceLoss(schedule="exp")
    for wrong in ({"schedule": "cosine", "num_steps": 3}, {"weight": -1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            CongruenceLoss(**wrong)  # type: ignore[arg-type]


def test_alternating_directions() -> None:
    """As the official training: the image's loss first, then the text's."""
    x, got = make(6, 9, b=3), []
    loss = CongruenceLoss("iais_singular", direction="alternate")
    parts = (x["text_query"], x["text_key"]), (x["image_query"], x["image_key"])
    for _ in range(3):
        got.append(loss(*parts))
    got.append(loss(*parts, step=4))
    for value, direction in zip(got, ("image", "text", "image", "image"), strict=True):
        assert torch.equal(value, congruence_loss(*parts, kind="iais_singular", direction=direction))


def test_one_graph_serves_all_calls() -> None:
    """A loss that no step decides counts no steps: torch.compile takes a number on a module for a constant of the graph."""
    x = make(6, 9, b=3)
    parts = (x["text_query"], x["text_key"]), (x["image_query"], x["image_key"])
    loss, graphs = CongruenceLoss("iais_distributed"), CompileCounter()
    compiled = torch.compile(loss, backend=graphs, fullgraph=True)
    for _ in range(12):  # torch gives up after eight
        torch.testing.assert_close(compiled(*parts), loss(*parts))
    assert graphs.frame_count == 1
