"""Scenes about which a model says a digit, and the groups of tokens in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlattn_fast.models import CLIPMapper
from vlattn_lab.clip import PATCH
from vlattn_lab.mapper import answer, complete
from vlattn_lab.processor import DIGIT_WORDS
from vlattn_lab.questions import Questions, are_true, digit_prompts, digit_questions
from vlattn_lab.scenes import CANVAS, Scenes, select
from vlattn_lab.texts import SceneProcessor

PAIRS = {"vision": ("vision", "vision"), "text": ("text", "text"), "cross": ("text", "vision")}  # towers of queries and keys
GRID = CANVAS // PATCH  # patches, both sides


@dataclass(frozen=True)
class Asked:
    """Inputs of a model whose answer is a digit of the scene.

    text: bool (B, T) by name. "start": [START]; "last": the token that gives the answer; "words": those between.
    image: bool (B, 1 + patches) by name. "answer" and "asked": patches of the digits that the answer and the text name; "others"
    of the scene's other digits; "empty": of none; "class": [CLS].
    """

    inputs: dict[str, Tensor]
    text: dict[str, Tensor]
    image: dict[str, Tensor]

    def groups(self, pair: str) -> dict[str, Tensor]:
        """Those of the towers of a pair of `PAIRS`."""
        return {**(self.text if "text" in PAIRS[pair] else {}), **(self.image if "vision" in PAIRS[pair] else {})}

    def read(self, logits: Tensor) -> Tensor:
        """(B, classes), or (B, T, words) -> (B, words) of the last real token."""
        return logits if logits.ndim == 2 else logits[torch.arange(len(logits)), self.inputs["attention_mask"].sum(1) - 1]


def draw(task: str, model: CLIPMapper, count: int, samples: int, seed: int, every: bool = False) -> tuple[Asked, float]:
    """The first `samples` of `count` test scenes that are answered right, and the share of right answers. every: or wrong."""
    if task == "vqa":
        drawn = digit_questions(count, seed=seed, kind="what")
        said = answer(model, drawn)
        right = [one == true for one, true in zip(said, drawn.answers, strict=True)]
        texts, asked = list(drawn.questions), [question.split()[-1] for question in drawn.questions]
        answers = drawn.answers if every else said
    else:
        drawn = digit_prompts(count, seed=seed, kind="caption")
        said = tuple(drawn.answers) if every else tuple(complete(model, drawn))
        right = are_true(drawn, said)
        texts, asked = [caption.rpartition(" ")[0] for caption in said], [caption.split(" ")[0] for caption in said]
        answers = tuple(caption.rpartition(" ")[2] for caption in said)
    accuracy = sum(right) / count
    chosen = [place for place in range(count) if right[place] or every][:samples]
    if len(chosen) < samples:
        raise ValueError(f"model must answer {samples} of {count} scenes right to be measured; got {len(chosen)}")
    inputs = SceneProcessor(end=task == "vqa")(drawn.images[chosen], [texts[place] for place in chosen])
    named = [torch.tensor([DIGIT_WORDS.index(words[place]) for place in chosen]) for words in (answers, asked)]
    return Asked(inputs, text_groups(inputs["attention_mask"]), image_groups(select(drawn, chosen), *named)), round(accuracy, 4)


def text_groups(real: Tensor) -> dict[str, Tensor]:
    """The groups of a text with a mask (B, T) of real tokens, which come first."""
    place, last = torch.arange(real.shape[1]).expand(real.shape), real.sum(1, keepdim=True) - 1
    return {"start": place == 0, "words": (place > 0) & (place < last), "last": place == last}


def image_groups(scenes: Questions | Scenes, answers: Tensor, asked: Tensor) -> dict[str, Tensor]:
    """The groups of the scenes' patches, by the digits (B) of the answer and of the text. A patch belongs to a digit if its
    centre lies in the digit's box."""
    y, x = (PATCH * (torch.arange(GRID) + 0.5)).repeat_interleave(GRID), (PATCH * (torch.arange(GRID) + 0.5)).repeat(GRID)
    left, top, right, bottom = (side[..., None] for side in scenes.boxes.unbind(-1))
    inside = (left <= x) & (x < right) & (top <= y) & (y < bottom)  # (B, R, patches)
    of = {"answer": scenes.digits == answers[:, None], "asked": scenes.digits == asked[:, None]}
    of["others"] = ~(of["answer"] | of["asked"])
    groups = {name: (inside & regions[..., None]).any(1) for name, regions in of.items()}
    groups["empty"] = ~inside.any(1)
    masks = {name: torch.nn.functional.pad(mask, (1, 0)) for name, mask in groups.items()}  # [CLS] is none of them
    masks["class"] = torch.arange(1 + GRID**2).expand(len(answers), -1) == 0
    return masks
