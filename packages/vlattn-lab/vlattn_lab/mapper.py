"""The two `CLIPMapper` of DigitScenes, one that answers questions and one that writes captions: their sizes, their shipped
weights, how they are measured."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vlattn_fast.measuring.records import grouped
from vlattn_fast.models import CLIPMapper
from vlattn_lab.clip import build_clip
from vlattn_lab.questions import PROMPTS, QUESTIONS, Questions, are_true, digit_prompts, digit_questions
from vlattn_lab.texts import ANSWERS, END, TEXT_VOCABULARY, SceneProcessor
from vlattn_lab.weights import DATA, load_model

WEIGHTS = {"vqa": "vqa_digitscenes.safetensors", "captions": "captions_digitscenes.safetensors"}
_SIZES = {"hidden_size": 64, "num_layers": 3, "num_heads": 4}
CONFIG: dict[str, dict[str, int]] = {
    "vqa": {**_SIZES, "num_answers": len(ANSWERS)},
    "captions": {**_SIZES, "vocab_size": len(TEXT_VOCABULARY)},
}
LONGEST = 10  # tokens of an answer, [END] among them


def load_vqa(directory: str | Path = DATA) -> tuple[CLIPMapper, SceneProcessor]:
    """The CLIPMapper that answers `digit_questions`, in eval mode, and its processor, whose `answers` are the classes. A folder
    holds the weights that `python -m vlattn_lab.train vqa --output DIR` writes; the default holds the shipped weights."""
    return _load("vqa", directory), SceneProcessor()


def load_captioner(directory: str | Path = DATA) -> tuple[CLIPMapper, SceneProcessor]:
    """The CLIPMapper that continues `digit_prompts`, in eval mode, and its processor; weights as in `load_vqa`, from
    `python -m vlattn_lab.train captions`."""
    return _load("captions", directory), SceneProcessor(end=False)


def _load(task: str, directory: str | Path) -> CLIPMapper:
    def build(config: dict[str, Any]) -> CLIPMapper:
        clip = build_clip(config["clip"])
        return CLIPMapper(clip.vision_model, clip.text_model, **config["mapper"])

    return load_model(directory, WEIGHTS[task], task, build)


@torch.no_grad()
def answer(model: CLIPMapper, questions: Questions) -> tuple[str, ...]:
    """The model's answers."""
    logits = model(**SceneProcessor()(questions.images, questions.questions)).logits
    return tuple(ANSWERS[i] for i in logits.argmax(1).tolist())


def question_accuracy(model: CLIPMapper, *, count: int = 1000, seed: int = 0, pairs: str | None = None) -> dict[str, float]:
    """Share of right answers to `count` test questions of each kind; pairs as in `digit_scenes`."""
    accuracy = {}
    for kind in QUESTIONS:
        asked = digit_questions(count, seed=seed, kind=kind, pairs=pairs)
        accuracy[kind] = _share(answer(model, asked), asked.answers)
    return accuracy


def blind_accuracy(*, count: int = 1000, learned: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """`question_accuracy` without images: "kind" always gives the most frequent answer to the kind of question, "text" the most
    frequent answer to the same question, both counted over `learned` training questions of each kind."""
    accuracy: dict[str, dict[str, float]] = {"kind": {}, "text": {}}
    for kind in QUESTIONS:
        asked = digit_questions(count, seed=seed, kind=kind)
        known = digit_questions(learned, split="train", seed=seed, kind=kind)
        frequent = Counter(known.answers).most_common(1)[0][0]
        counted = grouped(zip(known.questions, known.answers, strict=True), lambda sample: sample[0])
        best = {question: Counter(samples).most_common(1)[0][0][1] for question, samples in counted.items()}
        accuracy["kind"][kind] = _share([frequent] * count, asked.answers)
        accuracy["text"][kind] = _share([best.get(question, frequent) for question in asked.questions], asked.answers)
    return accuracy


def complete(model: CLIPMapper, prompts: Questions, *, images: Any = None) -> list[str]:
    """The model's answers to prompts; `images` replaces the images of the prompts."""
    inputs = SceneProcessor(end=False)(prompts.images if images is None else images, prompts.questions)
    return SceneProcessor().decode(model.generate(**inputs, max_new_tokens=LONGEST, stop_token=END))


def prompt_accuracy(
    model: CLIPMapper, *, count: int = 1000, seed: int = 0, pairs: str | None = None
) -> dict[str, dict[str, float]]:
    """Share of answers to `count` test prompts of each kind that are true of the scene, when the model sees the image of this
    scene, and when it sees the image of another scene; pairs as in `digit_scenes`."""
    accuracy: dict[str, dict[str, float]] = {"true": {}, "other_image": {}}
    for kind in PROMPTS:
        asked = digit_prompts(count, seed=seed, kind=kind, pairs=pairs)
        for name, images in (("true", None), ("other_image", asked.images.roll(1, 0))):
            said = complete(model, asked, images=images)
            accuracy[name][kind] = _share(are_true(asked, said), [True] * count)
    return accuracy


def _share(said: Sequence[Any], right: Sequence[Any]) -> float:
    return round(sum(map(operator.eq, said, right)) / len(right), 4)
