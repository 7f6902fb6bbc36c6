"""Stores a figure of what one fixed input's answer comes from, every few steps of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlattn_fast._ground.checks import check_writable, is_distributed
from vlattn_fast.attach.session import is_sharded
from vlattn_fast.interpret.explaining.explain import explain
from vlattn_fast.train.attached import Attached


class PictureLog(Attached):
    """Explains one input every few steps of a training, and stores the figure as FOLDER/step_000100.png.

    Each figure costs one call of `vlattn_fast.explain`, which runs the model in eval mode and restores its parameters, their
    gradients and its mode. The first figure shows the model before its first step.

        figures = va.train.PictureLog(model, inputs, "figures", every=100, image=photo)
        trainer.add_callback(figures.trainer_callback(trainer))

    In your own loop, call `draw(step)`.

    Examples:
        >>> import tempfile, torch, vlattn_fast as va
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8)
        >>> model = ViTForImageClassification(ViTConfig(**sizes))
        >>> log = va.train.PictureLog(model, {"pixel_values": torch.rand(1, 3, 16, 16)}, tempfile.mkdtemp())
        >>> log.draw(0).name
        'step_000000.png'

    Of several processes, the first one stores the figure; with sharded weights all of them run the model.

    Args:
        model: a model that `explain` supports; wrappers are supported.
        inputs: its inputs, a dict of tensors or the output of a processor, of a sample or a few.
        folder: folder for the figures; it is created.
        every: steps from one figure to the next.
        image: the photo under the map, see `Explanation.plot`.
        options: those of `explain`, such as target and method.

    Raises:
        ValueError: if an argument is wrong (the message names it); if `explain` does not support the call.
    """

    def __init__(
        self, model: nn.Module, inputs: Any, folder: str | Path, *, every: int = 100, image: Any = None, **options: Any
    ) -> None:
        super().__init__(model, every)
        check_writable("folder", Path(folder), folder=True)
        self.inputs, self.folder, self.image, self._options = inputs, Path(folder), image, options

    def draw(self, step: int) -> Path:
        """Stores the figure of the model in its current state, and returns its path."""
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
            self._draw_if_due(0, not is_distributed() or torch.distributed.get_rank() == 0)

    def _end_step(self, step: int, is_first_process: bool) -> dict[str, float]:
        if step % self.every == 0:
            self._draw_if_due(step, is_first_process)
        return {}

    def _draw_if_due(self, step: int, is_first_process: bool) -> None:
        if is_first_process or is_sharded(self.model):
            self._draw(step, is_first_process)
