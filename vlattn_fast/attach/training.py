"""A context around training, entered by hand or by a callback of a Trainer."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Self


class TrainingContext:
    """The base of what is attached to a model while it trains. A callback does nothing if the context is entered by hand."""

    _ways_back: ExitStack | None = None  # while it is entered
    _by_callback = False

    # --- what a subclass does ---

    def _enter(self, stack: ExitStack) -> None:
        """Attaches it; `stack` gets the functions that undo it."""

    def _begin_step(self, step: int) -> None:
        """Before a step of the optimizer."""

    def _end_step(self, step: int, is_first_process: bool) -> dict[str, float]:
        """After a step of the optimizer, its `step`-th, from 1: returns the numbers to log now."""
        return {}

    def _begin_evaluation(self) -> None:
        """Before an evaluation. transformers' Trainer, which evaluates between two steps, has no event for it."""

    def _end_evaluation(self) -> None:
        """After an evaluation."""

    # --- the context ---

    def __enter__(self) -> Self:
        if self._ways_back is not None:
            raise RuntimeError(f"{type(self).__name__} must be entered once at a time; got one that is. Make another one")
        with ExitStack() as stack:
            self._enter(stack)
            self._ways_back = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        ways_back, self._ways_back, self._by_callback = self._ways_back, None, False
        if ways_back is not None:
            ways_back.close()

    def _begin_training(self) -> None:
        self._end_training()  # an error ended the training before: transformers' Trainer has no event for that
        if self._ways_back is None:
            self.__enter__()
            self._by_callback = True

    def _end_training(self) -> None:
        if self._by_callback:
            self.__exit__()

    # --- the callbacks ---

    def _callback_of_trainer(self, log: Any = None) -> Any:
        """A callback of transformers' Trainer; `log` takes the numbers to log."""
        from transformers import TrainerCallback

        context = self

        class Callback(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                context._begin_training()

            def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
                context._begin_step(state.global_step)

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if values := context._end_step(state.global_step, state.is_world_process_zero):
                    due = control.should_log
                    log(values)
                    control.should_log = due  # which a log clears; the loss of this step is yet to come

            def on_evaluate(self, *_: Any, **__: Any) -> None:
                context._end_evaluation()

            on_predict = on_evaluate

            def on_train_end(self, *_: Any, **__: Any) -> None:
                context._end_training()

        return Callback()

    def lightning_callback(self) -> Any:
        """Returns a callback for Lightning's Trainer, `callbacks=[x.lightning_callback()]`. It enters the context when training
        begins, and logs with the module's `log_dict`."""
        from lightning import Callback as Base

        context = self

        class Callback(Base):
            begun = -1

            def on_train_start(self, *_: Any) -> None:
                self.begun = -1
                context._begin_training()

            def on_train_batch_start(self, trainer: Any, *_: Any, **__: Any) -> None:
                if trainer.global_step != self.begun:  # else the batch is accumulated
                    self.begun = trainer.global_step
                    context._begin_step(self.begun)

            def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any, **__: Any) -> None:
                if trainer.global_step != self.begun and (
                    values := context._end_step(trainer.global_step, trainer.is_global_zero)
                ):
                    pl_module.log_dict(values)

            def on_validation_start(self, *_: Any) -> None:  # may come while batches accumulate
                context._begin_evaluation()

            def on_validation_end(self, *_: Any) -> None:
                context._end_evaluation()

            def on_train_end(self, *_: Any) -> None:
                context._end_training()

            def on_exception(self, *_: Any) -> None:
                self.on_train_end()

        return Callback()
