"""The models, and scenes whose upper left patch shows no digit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_lab.clip import load_clip, words_of
from vlattn_lab.experiments import flow
from vlattn_lab.experiments.experiment import Settings
from vlattn_lab.experiments.flow.samples import draw as draw_answers
from vlattn_lab.experiments.flow.samples import image_groups
from vlattn_lab.experiments.sinks.planted import TOKEN
from vlattn_lab.scenes import digit_scenes
from vlattn_lab.texts import SceneProcessor

TASKS = {"clip": "captions with CLIP", "vqa": "questions", "captions": "captions"}


@dataclass(frozen=True)
class Samples:
    """Inputs, the target of each, and bool (B, 1 + patches), the patches of the digits that it is about."""

    inputs: dict[str, Tensor]
    target: list[int]
    named: Tensor

    def __len__(self) -> int:
        return len(self.target)

    def right(self, model: nn.Module) -> Tensor:
        """(B,) the text, answer or word that the model chooses."""
        with torch.no_grad():
            return chosen(model(**self.inputs), self.inputs)


def chosen(outputs: Any, inputs: dict[str, Tensor]) -> Tensor:
    logits: Tensor = outputs.logits_per_image if hasattr(outputs, "logits_per_image") else outputs.logits
    if logits.ndim == 3:
        logits = logits[torch.arange(len(logits)), inputs["attention_mask"].sum(1) - 1]
    return logits.argmax(-1)


def draw(task: str, seed: int, count: int, settings: Settings) -> tuple[nn.Module, Samples]:
    """The model, and at most `count` samples: CLIP and scenes with their captions, or the model of a seed and scenes that it
    answers right."""
    if task == "clip":
        model: nn.Module = load_clip()[0]
        scenes = digit_scenes(count, seed=seed)
        words = words_of(scenes)
        inputs = SceneProcessor()(scenes.images, scenes.captions)
        groups = image_groups(scenes, words[:, 0], words[:, 2])
        named, target = groups["answer"] | groups["asked"], torch.arange(count)
    else:
        model = flow.trained(task, seed, settings)
        asked, _ = draw_answers(task, model, 3 * count, count, seed, every=settings.smoke)
        inputs, groups, named = asked.inputs, asked.image, asked.image["answer"]
        with torch.no_grad():
            target = chosen(model(**inputs), inputs)
    free = groups["empty"][:, TOKEN]
    kept = {name: value[free] for name, value in inputs.items()}
    return model, Samples(kept, target[: int(free.sum())].tolist() if task == "clip" else target[free].tolist(), named[free])
