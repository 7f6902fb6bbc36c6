"""The base of all that is attached to a model while it trains: a context, entered by hand or by a callback."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Self

from torch import Tensor, nn

from vlattn_fast._ground.checks import check_integer
from vlattn_fast.attach.session import unwrapped
from vlattn_fast.attach.training import TrainingContext


class Attached(TrainingContext):
    """A context around training. `every`: the steps of the optimizer from one log to the next."""

    def __init__(self, model: nn.Module, every: int) -> None:
        check_integer("every", every, low=1)
        self.model, self.every = unwrapped(model), every
        self.step: int | None = None  # of the optimizer, where a callback tells it
        self._trainer: Any = None  # of transformers

    # --- what a subclass does ---

    def _enter(self, stack: ExitStack) -> None:
        """Attaches it; `stack` gets the ways back."""

    def _begin_step(self, step: int) -> None:
        """In front of a step of the optimizer."""

    def _end_step(self, step: int, is_first_process: bool) -> dict[str, float]:
        """Behind a step of the optimizer, which is its `step`-th, from 1 on: the numbers to log now."""
        return {}

    def _saw_nothing(self) -> ValueError:
        return ValueError(
            f"model must be the module that a training step calls, as `self.model` of a LightningModule; {type(self).__name__} "
            f"saw no forward pass of {type(self.model).__name__} in training mode with gradients. Beside a RelevancyTerm of the "
            "same model nothing else sees its attention"
        )

    def _check_trainer(self, trainer: Any) -> None:
        """ValueError where this Trainer of transformers would pass it over."""

    # --- the context ---

    def __enter__(self) -> Self:
        if self._ways_back is not None:
            raise RuntimeError(f"this {type(self).__name__} is entered already; make another one")
        with ExitStack() as stack:
            self._enter(stack)
            self._ways_back = stack.pop_all()
        return self

    def _end_training(self) -> None:
        self.step = None
        super()._end_training()

    def trainer_callback(self, trainer: Any) -> Any:
        """A callback for this Trainer of transformers: `trainer.add_callback(x.trainer_callback(trainer))`. It enters the context
        when training begins, and logs by `trainer.log`, so to whatever `report_to` names."""
        from transformers import TrainerCallback

        attached, self._trainer = self, trainer

        class Callback(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
                attached._check_trainer(trainer)
                attached._begin_training()

            def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
                attached.step = state.global_step
                attached._begin_step(state.global_step)

            def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
                if values := attached._end_step(state.global_step, state.is_world_process_zero):
                    trainer.log(values)

            def on_train_end(self, *_: Any, **__: Any) -> None:
                attached._end_training()

        return Callback()

    def lightning_callback(self) -> Any:
        """A callback for Lightning's Trainer, `callbacks=[x.lightning_callback()]`. It enters the context when training begins,
        and logs by the module's `log_dict`, so to the Trainer's logger."""
        from lightning import Callback as Base

        attached = self

        class Callback(Base):
            begun = -1

            def on_train_start(self, trainer: Any, module: Any) -> None:
                self.begun = -1
                attached._begin_training()

            def on_train_batch_start(self, trainer: Any, *_: Any, **__: Any) -> None:
                if trainer.global_step != self.begun:  # else the batch is accumulated
                    self.begun = attached.step = trainer.global_step
                    attached._begin_step(self.begun)

            def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any, **__: Any) -> None:
                if trainer.global_step != self.begun and (
                    values := attached._end_step(trainer.global_step, trainer.is_global_zero)
                ):
                    pl_module.log_dict(values)

            def on_train_end(self, *_: Any) -> None:
                attached._end_training()

            def on_exception(self, *_: Any) -> None:
                self.on_train_end()

        return Callback()


class Mean:
    """The mean of scalars that come one by one, which waits for no device."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._count = 0

    def add(self, x: Tensor) -> None:
        x = x.detach().float()
        self._total = x if self._total is None else self._total + x
        self._count += 1

    def take(self) -> float | None:
        """The mean since the last call, None without a scalar."""
        mean = None if self._total is None else float(self._total) / self._count
        self._total, self._count = None, 0
        return mean
