"""The congruence losses as a module, and the schedule that their authors weight them with in training."""

from __future__ import annotations

import math

from torch import Tensor, nn

from vlattn_fast._checks import check_choice, check_number
from vlattn_fast.ops.congruence_loss import DIRECTIONS, KINDS, REDUCTIONS, congruence_loss

SCHEDULES = ("linear", "exp", "log", "const")


class CongruenceLoss(nn.Module):
    """vlattn_fast.congruence_loss with its options held. The arguments are explained there.

    >>> import torch
    >>> loss = CongruenceLoss("iais_singular", direction="text")
    >>> words, regions = (torch.randn(2, 4, 6, 8),) * 2, (torch.randn(2, 4, 9, 8),) * 2
    >>> loss(words, regions).shape
    torch.Size([])
    """

    def __init__(
        self,
        kind: str = "cacr",
        direction: str = "both",
        scale: float | None = None,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_choice("kind", kind, KINDS)
        check_choice("direction", direction, DIRECTIONS)
        check_choice("reduction", reduction, REDUCTIONS)
        if scale is not None:
            check_number("scale", scale)
        self.kind, self.direction, self.scale, self.reduction, self.backend = kind, direction, scale, reduction, backend

    def forward(
        self,
        text: tuple[Tensor, Tensor],
        image: tuple[Tensor, Tensor],
        cross: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        text_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
    ) -> Tensor:
        return congruence_loss(
            text,
            image,
            cross,
            kind=self.kind,
            direction=self.direction,
            text_mask=text_mask,
            image_mask=image_mask,
            scale=self.scale,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"{self.kind!r}, direction={self.direction!r}, scale={self.scale}, reduction={self.reduction!r}"


def training_signal_annealing(step: int, num_steps: int, schedule: str = "exp") -> float:
    """The weight of the congruence loss at training step `step` of `num_steps`, beside the task's own loss.

    With x = step / num_steps (1 from there on): "linear" x, "exp" e^(5(x-1)), "log" 1 - e^(-5x), "const" 1
    (utils/training_signal_annealing.py of KhoomeiK/CACR; "exp" is the authors' choice).

    Raises:
        ValueError, TypeError: a step below 0, no steps, or an unknown schedule.

    >>> training_signal_annealing(500, 1000, "linear")
    0.5
    """
    check_choice("schedule", schedule, SCHEDULES)
    check_number("step", step, low=0)
    check_number("num_steps", num_steps, low=1)
    x = min(step / num_steps, 1.0)
    return {"linear": x, "exp": math.exp(5 * (x - 1)), "log": 1 - math.exp(-5 * x), "const": 1.0}[schedule]
