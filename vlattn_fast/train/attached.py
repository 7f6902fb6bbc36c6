"""The base of everything that is attached to a model while it trains, and that logs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vlattn_fast._ground.checks import check_integer
from vlattn_fast.attach.session import unwrapped
from vlattn_fast.attach.training import TrainingContext


class Attached(TrainingContext):
    """Provides the context around training. `every`: optimizer steps from one log to the next."""

    _trainer: Any = None  # of transformers

    def __init__(self, model: nn.Module, every: int) -> None:
        check_integer("every", every, low=1)
        self.model, self.every = unwrapped(model), every

    def trainer_callback(self, trainer: Any) -> Any:
        """Returns a callback for this Trainer of transformers: `trainer.add_callback(x.trainer_callback(trainer))`.

        It enters the context when training begins, and logs with `trainer.log`, so to whatever `report_to` names.
        """
        self._trainer = trainer
        return self._callback_of_trainer(trainer.log)

    def _no_pass(self) -> ValueError:
        return ValueError(
            f"model must be the module that a training step calls, e.g. `self.model` of a LightningModule; {type(self).__name__} "
            f"traced no forward pass of {type(self.model).__name__} in training mode with gradients. A RelevancyTerm of the same "
            "model hides its attention from everything else"
        )


class Mean:
    """Computes the mean of scalars that come one by one, without waiting for a device."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._count = 0

    def add(self, x: Tensor) -> None:
        x = x.detach().float()
        self._total = x if self._total is None else self._total + x
        self._count += 1

    def take(self) -> float | None:
        """Returns the mean since the last call, None without a scalar."""
        mean = None if self._total is None else float(self._total) / self._count
        self._total, self._count = None, 0
        return mean
