"""How often explanations of the two CLIPMapper of DigitScenes point at the digit that a question or a word is about.

A map points at the digit whose box has the largest share of the map. All boxes have one size, so chance is one in four.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlattn_fast import Explanation, explain
from vlattn_fast.models import CLIPMapper
from vlattn_lab.mapper import LONGEST, load_captioner, load_vqa
from vlattn_lab.processor import DIGIT_WORDS
from vlattn_lab.questions import Questions, digit_prompts, digit_questions
from vlattn_lab.scenes import CANVAS, batches
from vlattn_lab.texts import END, SceneProcessor

METHODS = ("gradient", "rollout", "attention", "gradcam")  # methods for towers that attend to one another
CHANCE = {"answer": 1 / 4, "there": 1 / 4, "is": 1 / 2, "word": 1 / 4}


def box_shares(image: Tensor, boxes: Tensor) -> Tensor:
    """Maps (B, ..., h, w) of scenes with boxes (B, R, 4) in pixels -> (B, ..., R): the sum over each box; a patch counts by
    the part of the patch inside the box."""
    height, width = image.shape[-2:]
    inside = []
    for axis, cells in ((0, width), (1, height)):
        edges = torch.linspace(0, CANVAS, cells + 1, dtype=image.dtype)
        low, high = boxes[..., axis, None].to(image), boxes[..., axis + 2, None].to(image)
        inside.append((torch.minimum(edges[1:], high) - torch.maximum(edges[:-1], low)).clamp(min=0) * cells / CANVAS)
    return torch.einsum("b...hw,brh,brw->b...r", image, inside[1], inside[0])


def question_pointing(method: str = "gradient", *, count: int = 200, seed: int = 0) -> dict[str, float]:
    """Share of `count` test questions of each kind, explained for the model's answer, whose map points right:

    - "answer": "what is left of a six" points at the digit that is the right answer,
    - "there": "is there a three" with the answer yes points at the three (at most `count` out of 2 `count` questions),
    - "is": "is a three left of a six" points at one of the two digits.
    """
    model, processor = load_vqa()
    shares = {}
    for name, kind in (("answer", "what"), ("there", "there"), ("is", "is")):
        asked = digit_questions(2 * count if name == "there" else count, seed=seed, kind=kind)
        aims = asked.named
        if name == "answer":
            aims = asked.digits == torch.tensor([DIGIT_WORDS.index(answer) for answer in asked.answers])[:, None]
        kept = aims.any(1).nonzero()[:count, 0]
        maps = explain(model, processor(asked.images, asked.questions), method=method).image
        assert isinstance(maps, Tensor)
        top = box_shares(maps, asked.boxes).argmax(-1)
        shares[name] = float(aims.gather(1, top[:, None])[kept].double().mean())
    return shares


def word_pointing(method: str = "gradient", *, count: int = 200, seed: int = 0) -> dict[str, float]:
    """Pointing of the words for digits in the model's answers to `count` test prompts: "words", the number of words for a digit
    of the scene, and "word", the share of these whose map points at the digit."""
    model, processor = load_captioner()
    asked = digit_prompts(count, seed=seed)
    hits, words = 0, 0
    for part in batches(asked, 50):
        explanation, answers = explain_answers(model, processor, part, method)
        assert isinstance(explanation.image, Tensor)
        top = box_shares(explanation.image, part.boxes).argmax(-1)
        for digits, places, answer in zip(part.digits, top, answers, strict=True):
            for place, word in zip(places, answer, strict=False):  # a shorter answer is padded
                aim = digits == (DIGIT_WORDS.index(word) if word in DIGIT_WORDS else -1)
                if bool(aim.any()):
                    words += 1
                    hits += int(aim[place])
    return {"word": hits / max(words, 1), "words": words}


def explain_answers(
    model: CLIPMapper, processor: SceneProcessor, prompts: Questions, method: str = "gradient"
) -> tuple[Explanation, list[list[str]]]:
    """The explanation of the model's answers to prompts, word by word, and the words; an empty answer counts as [END]."""
    inputs = processor(prompts.images, prompts.questions)
    generated = model.generate(**inputs, max_new_tokens=LONGEST, stop_token=END).tolist()
    ids = [(said[: said.index(END)] or [END]) if END in said else said for said in generated]
    explanation = explain(model, inputs, answer=ids, method=method).with_tokens(processor)
    return explanation, [processor.convert_ids_to_tokens(said) for said in ids]
