"""A picture of what one fixed input's answer comes from, every few steps of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlattn_fast._ground.checks import check_writable
from vlattn_fast.attach.session import is_sharded
from vlattn_fast.interpret.explaining.explain import explain
from vlattn_fast.train.attached import Attached


class PictureLog(Attached):
    """Explains one input every few steps of a training, and stores the picture as FOLDER/step_000100.png.

        pictures = va.train.PictureLog(model, inputs, "pictures", every=100, image=photo)
        trainer.add_callback(pictures.trainer_callback(trainer))

    The first picture is that of the model in front of its first step. `vlattn_fast.explain` runs the model in eval mode, and
    leaves its parameters, their gradients and its mode as they are. The first of several processes stores the picture; with
    weights in shards all of them run the model. In a loop of one's own, `pictures.draw(step)`.

    Args:
        model: a model that `explain` takes; wrappers are allowed.
        inputs: its inputs, a dict of tensors or what a processor gives, of a sample or a few.
        folder: where the pictures lie; it is made.
        every: steps from one picture to the next.
        image: the photo under the map, as in `Explanation.plot`.
        options: those of `explain`, as target and method.

    Raises:
        ValueError: an argument is wrong (it is named); what `explain` refuses.
    """

    def __init__(
        self, model: nn.Module, inputs: Any, folder: str | Path, *, every: int = 100, image: Any = None, **options: Any
    ) -> None:
        super().__init__(model, every)
        check_writable("folder", Path(folder), folder=True)
        self.inputs, self.folder, self.image, self._options = inputs, Path(folder), image, options

    def draw(self, step: int) -> Path:
        """Stores the picture of the model as it is now."""
        return self._draw(step, True)

    def _draw(self, step: int, is_stored: bool) -> Path:
        path = self.folder / f"step_{step:06d}.png"
        with torch.enable_grad():
            explanation = explain(self.model, self.inputs, **self._options)
        if is_stored:
            explanation.plot(self.image).savefig(path)
        return path

    def _begin_step(self, step: int) -> None:
        if step == 0:
            several = torch.distributed.is_available() and torch.distributed.is_initialized()
            self._draw_if_due(0, not several or torch.distributed.get_rank() == 0)

    def _end_step(self, step: int, is_first_process: bool) -> dict[str, float]:
        if step % self.every == 0:
            self._draw_if_due(step, is_first_process)
        return {}

    def _draw_if_due(self, step: int, is_first_process: bool) -> None:
        if is_first_process or is_sharded(self.model):
            self._draw(step, is_first_process)
