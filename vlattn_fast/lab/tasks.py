"""The tasks of DigitScenes as `va.evaluate` takes them: a model, its test scenes with ground-truth boxes, and methods.

The ground truth is the boxes of the digits that a caption, question or answer names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast.lab.clip import load_clip
from vlattn_fast.lab.mapper import load_captioner, load_vqa
from vlattn_fast.lab.processor import DIGIT_WORDS
from vlattn_fast.lab.questions import digit_questions
from vlattn_fast.lab.scenes import CANVAS, digit_scenes
from vlattn_fast.lab.texts import START, TEXT_VOCABULARY, SceneProcessor
from vlattn_fast.lab.uniter import load_uniter

Item = tuple[dict[str, Tensor], Any, list[Tensor]]
Measure = Callable[[Any], Tensor]

_WEIGHTED = ("weighted", "weighted:norm", "weighted:equal", "weighted:no_normalization", "weighted:norm:no_normalization")
_BASELINES = ("rollout", "attention", "gradcam", "random")
TOWERS = ("gradient", "gradient:no_aggregation", *_WEIGHTED, *_BASELINES)
LINKED = (*TOWERS[:2], "gradient:no_normalization", "gradient:no_self_attention", *_WEIGHTED, *_BASELINES)


@dataclass(frozen=True)
class Task:
    """A task: a model, its samples, and the methods that explain it.

    Args:
        load: gives the shipped model.
        items: (model, samples, seed, rows of an item) -> a dataset of `evaluate`.
        methods: names of `evaluate`.
        rivals: sets of `vlattn_fast.lab.rivals`: "CLIP", "CAPTUM".
        batch: rows of an item.
        accuracy, probability: see `evaluate`.
    """

    load: Callable[[], nn.Module]
    items: Callable[[Any, int, int, int], Iterator[Item]]
    methods: tuple[str, ...]
    rivals: tuple[str, ...] = ("CAPTUM",)
    batch: int = 50
    accuracy: Measure | None = None
    probability: Measure | None = None


def _batches(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))


def _named(boxes: Tensor, named: Tensor) -> list[Tensor]:
    """boxes (B, R, 4) in pixels, named bool (B, R) -> boxes (K, 4) of each row, relative to the picture."""
    return [corners[of_row] / CANVAS for corners, of_row in zip(boxes, named, strict=True)]


# --- image-text matching with UNITER ---


def log_odds(outputs: Any) -> Tensor:
    """(B): log odds that the caption is true of the picture."""
    logits: Tensor = outputs.logits
    return logits[:, 1] - logits[:, 0]


def matching(model: nn.Module, samples: int, seed: int, batch: int = 50) -> Iterator[Item]:
    """True captions; a caption is accepted where its log odds are above 0."""
    scenes = digit_scenes(samples, seed=seed)
    for rows in _batches(samples, batch):
        inputs = {name: value[rows] for name, value in scenes.inputs().items()}
        yield inputs, log_odds, _named(scenes.boxes[rows], scenes.named[rows])


# --- retrieval with the dual encoder ---


def retrieval(model: nn.Module, samples: int, seed: int, batch: int = 50) -> Iterator[Item]:
    """Scenes with their captions; each caption is retrieved among those of its item, and the first of equal captions counts."""
    scenes = digit_scenes(samples, seed=seed)
    for rows in _batches(samples, batch):
        captions = scenes.captions[rows]
        positives = [captions.index(caption) for caption in captions]
        yield SceneProcessor()(scenes.images[rows], captions), positives, _named(scenes.boxes[rows], scenes.named[rows])


# --- answers and captions with CLIPMapper ---


def answering(model: nn.Module, samples: int, seed: int, batch: int = 50) -> Iterator[Item]:
    """Questions of all kinds in equal parts, each with its only answer."""
    asked = digit_questions(samples, seed=seed)
    processor = SceneProcessor()
    for rows in _batches(samples, batch):
        right = [processor.answers.index(answer) for answer in asked.answers[rows]]
        inputs = processor(asked.images[rows], asked.questions[rows])
        yield inputs, right, _named(asked.boxes[rows], asked.named[rows])


def captioning(model: Any, samples: int, seed: int, batch: int = 50) -> Iterator[Item]:
    """The model's captions: first the first digit that a caption names, then the second digit, which follows four of its words.

    The ground truth is the box of this digit alone, and empty where the picture lacks the digit. Captions in which these words
    are no digits are left out.
    """
    scenes = digit_scenes(samples, seed=seed)
    digit_ids = torch.tensor([TEXT_VOCABULARY.index(word) for word in DIGIT_WORDS])
    places = (1, 5)  # [START] digit relation relation "a" digit
    for rows in _batches(samples, batch):
        pixels = SceneProcessor(end=False).pixels(scenes.images[rows])
        start = torch.full((len(pixels), 1), START)
        said = torch.cat([start, model.generate(pixels, start, max_new_tokens=max(places))], 1)
        if said.shape[1] <= max(places):
            continue
        kept = torch.isin(said[:, list(places)], digit_ids).all(1)
        for place in places:
            word = said[kept, place]
            here = digit_ids[scenes.digits[rows][kept]] == word[:, None]
            inputs = {"pixel_values": pixels[kept], "input_ids": said[kept, :place]}
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
            yield inputs, word.tolist(), _named(scenes.boxes[rows][kept], here)


TASKS: Mapping[str, Task] = {
    "matching": Task(
        lambda: load_uniter()[0],
        matching,
        TOWERS,
        accuracy=lambda outputs: (log_odds(outputs) > 0).float(),
        probability=lambda outputs: log_odds(outputs).sigmoid(),
    ),
    "clip": Task(lambda: load_clip()[0], retrieval, TOWERS, rivals=("CLIP", "CAPTUM"), batch=10),
    "vqa": Task(lambda: load_vqa()[0], answering, LINKED),
    "captions": Task(lambda: load_captioner()[0], captioning, LINKED),
}
