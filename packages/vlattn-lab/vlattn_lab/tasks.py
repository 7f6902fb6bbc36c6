"""The tasks of DigitScenes as `va.evaluate` takes them: a model, its test scenes with ground-truth boxes, and methods.

The ground truth is the boxes of the digits that a caption, question or answer names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast.interpret.relevancy.methods.registry import published
from vlattn_fast.methods import Glimpse, GradCam, Gradient, InputGradient, IntegratedGradients, Method, Weighted
from vlattn_lab.clip import load_clip
from vlattn_lab.mapper import load_captioner, load_vqa
from vlattn_lab.processor import DIGIT_WORDS
from vlattn_lab.questions import digit_questions
from vlattn_lab.scenes import CANVAS, batches, digit_scenes
from vlattn_lab.texts import ANSWERS, START, TEXT_VOCABULARY, SceneProcessor
from vlattn_lab.uniter import load_uniter, log_odds

Item = tuple[dict[str, Tensor], Any, list[Tensor]]
Measure = Callable[[Any], Tensor]

_Methods = tuple[str | Method, ...]
_WEIGHTED: _Methods = (
    *(published("weighted", weighting=weighting) for weighting in ("contribution", "norm", "equal")),
    *(published("weighted:no_normalization", weighting=weighting) for weighting in ("contribution", "norm")),
)
_BASELINES = ("rollout", "attention", "gradcam", "input_gradient", "integrated_gradients", "random")


def _with_constants(*kinds: Callable[..., Method]) -> dict[str, Method]:
    made = (kind(freeze=freeze) for kind in kinds for freeze in (("norms",), ("norms", "attention")))
    return {method.label: method for method in made}


FROZEN = _with_constants(Gradient, Weighted, InputGradient, GradCam, IntegratedGradients)
FROZEN_TOWERS = FROZEN | _with_constants(Glimpse)
PLAIN = published("gradient").label
TOWERS: _Methods = ("gradient", "gradient:no_aggregation", *_WEIGHTED, "glimpse", *_BASELINES)
LINKED: _Methods = (*TOWERS[:2], "gradient:no_normalization", "gradient:no_self_attention", *_WEIGHTED, *_BASELINES)


@dataclass(frozen=True)
class Task:
    """A task: a model, its samples, and the methods that explain it."""

    load: Callable[..., nn.Module]  # gives the shipped model, or that of a folder
    items: Callable[[Any, int, int, int], Iterator[Item]]  # (model, samples, seed, batch) -> a dataset of `evaluate`
    methods: tuple[str | Method, ...]  # of `evaluate`; each name is measured in its published form
    frozen: Mapping[str, Method] = field(default_factory=lambda: FROZEN)  # methods with constants, by their labels
    rivals: tuple[str, ...] = ("CAPTUM",)  # sets of `vlattn_lab.rivals`
    batch: int = 50  # samples of an item
    accuracy: Measure | None = None  # see `evaluate`
    probability: Measure | None = None


def _named(boxes: Tensor, named: Tensor) -> list[Tensor]:
    """boxes (B, R, 4) in pixels, named bool (B, R) -> boxes (K, 4) of each sample, relative to the picture."""
    return [corners[numbers] / CANVAS for corners, numbers in zip(boxes, named, strict=True)]


# --- image-text matching with UNITER ---


def matching(model: nn.Module, samples: int, seed: int, batch: int = 50) -> Iterator[Item]:
    """True captions; a caption is accepted where its log odds are above 0."""
    for scenes in batches(digit_scenes(samples, seed=seed), batch):
        yield scenes.inputs(), log_odds, _named(scenes.boxes, scenes.named)


# --- retrieval with the dual encoder ---


def retrieval(model: nn.Module, samples: int, seed: int, batch: int = 50) -> Iterator[Item]:
    """Scenes with their captions; each caption is retrieved among those of its item, and the first of equal captions counts."""
    for scenes in batches(digit_scenes(samples, seed=seed), batch):
        positives = [scenes.captions.index(caption) for caption in scenes.captions]
        yield SceneProcessor()(scenes.images, scenes.captions), positives, _named(scenes.boxes, scenes.named)


# --- answers and captions with CLIPMapper ---


def answering(model: nn.Module, samples: int, seed: int, batch: int = 50) -> Iterator[Item]:
    """Questions of all kinds in equal parts, each with its only answer."""
    for asked in batches(digit_questions(samples, seed=seed), batch):
        right = [ANSWERS.index(answer) for answer in asked.answers]
        yield SceneProcessor()(asked.images, asked.questions), right, _named(asked.boxes, asked.named)


def captioning(model: Any, samples: int, seed: int, batch: int = 50) -> Iterator[Item]:
    """The model's captions: first the first digit that a caption names, then the second digit, which follows four of its words.

    The ground truth is the box of this digit alone, and empty where the picture lacks the digit. Captions in which these words
    are no digits are left out.
    """
    digit_ids = torch.tensor([TEXT_VOCABULARY.index(word) for word in DIGIT_WORDS])
    places = (1, 5)  # [START] digit relation relation "a" digit
    for scenes in batches(digit_scenes(samples, seed=seed), batch):
        pixels = SceneProcessor(end=False).pixels(scenes.images)
        start = torch.full((len(pixels), 1), START)
        said = torch.cat([start, model.generate(pixels, start, max_new_tokens=max(places))], 1)
        if said.shape[1] <= max(places):
            continue
        kept = torch.isin(said[:, list(places)], digit_ids).all(1)
        for place in places:
            word, ids = said[kept, place], said[kept, :place]
            named = digit_ids[scenes.digits[kept]] == word[:, None]
            mask = torch.ones_like(ids, dtype=torch.bool)
            inputs = {"pixel_values": pixels[kept], "input_ids": ids, "attention_mask": mask}
            yield inputs, word.tolist(), _named(scenes.boxes[kept], named)


TASKS: Mapping[str, Task] = {
    "matching": Task(
        lambda *folder: load_uniter(*folder)[0],
        matching,
        TOWERS,
        FROZEN_TOWERS,
        accuracy=lambda outputs: (log_odds(outputs) > 0).float(),
        probability=lambda outputs: log_odds(outputs).sigmoid(),
    ),
    "clip": Task(lambda *folder: load_clip(*folder)[0], retrieval, TOWERS, FROZEN_TOWERS, rivals=("CLIP", "CAPTUM"), batch=10),
    "vqa": Task(lambda *folder: load_vqa(*folder)[0], answering, LINKED),
    "captions": Task(lambda *folder: load_captioner(*folder)[0], captioning, LINKED),
}
