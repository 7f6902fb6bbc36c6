"""Questions and prompts about the scenes of DigitScenes, with true answers.

A relation holds from CLEARANCE pixels between two centres on, and fails from 0 pixels down. A question whose answer depends on a
distance in between is not asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_integer
from vlattn_lab.processor import DIGIT_WORDS, RELATIONS
from vlattn_lab.scenes import CLEARANCE, Scenes, displacement, joined, sample_scenes, sayable_captions, select

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

QUESTIONS = ("what", "is", "there", "many")
PROMPTS = ("caption", "where", "what", "which")
WHICH = "which digits are there"
EXAMPLE = 4  # the seed of a scene whose digits are easy to read; the model also names those of seeds 1 to 3


@dataclass(frozen=True)
class Questions:
    """A batch of B scenes with a question or prompt each.

    images, boxes, digits: as in `Scenes`.
    kinds: B of QUESTIONS or PROMPTS.
    questions: B strings, such as "what is left of a seven"; "" where a caption is asked for.
    answers: B strings: the only answer of a question, or one true answer of a prompt.
    named: bool (B, R), the digits that the question or the answer names.
    """

    images: Tensor
    boxes: Tensor
    digits: Tensor
    kinds: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    named: Tensor

    def __len__(self) -> int:
        return len(self.questions)

    def photo(self, index: int = 0, *, scale: int = 10) -> Picture:
        """Returns scene `index` as a PIL image, dark ink on white, each pixel drawn as scale x scale."""
        from PIL import Image

        ink = self.images[index].repeat_interleave(scale, 0).repeat_interleave(scale, 1)
        return Image.fromarray(((1 - ink) * 255).round().to(torch.uint8).numpy()).convert("RGB")


@dataclass(frozen=True)
class _Facts:
    """Relations in B scenes; [b, i, j, r] is about digit i left of, right of, above, below digit j."""

    true: Tensor  # bool (B, R, R, 4): surely holds, and sayable
    false: Tensor  # bool (B, R, R, 4): surely fails, and sayable
    single: Tensor  # bool (B, R, R, 4): true of i alone
    clear: Tensor  # bool (B, R, 4): every digit but j surely is or is not on that side of digit j
    beside: Tensor  # bool (B, R, R, 4): surely holds

    @classmethod
    def of(cls, scenes: Scenes, sayable: Tensor) -> _Facts:
        pixels = displacement(scenes.boxes[..., :2].long())
        distinct = ~torch.eye(pixels.shape[1], dtype=torch.bool)[..., None]
        said = sayable[scenes.digits[:, :, None], scenes.digits[:, None, :]] & distinct
        holds, fails = (pixels >= CLEARANCE) & distinct, (pixels <= 0) & distinct
        others_fail = fails.sum(1, keepdim=True) == pixels.shape[1] - 2
        clear = (holds | fails | ~distinct).all(1)
        return cls(holds & said, fails & said, holds & said & others_fail, clear, holds)


def digit_questions(
    count: int, *, split: str = "test", seed: int = 0, kind: str | None = None, pairs: str | None = None
) -> Questions:
    """`count` questions, each with its only answer; the same arguments give the same questions.

    Args:
        count, split, seed: as in `digit_scenes`.
        kind: "what" is left of a six: the only digit on that side; "is" a three left of a six, both in the scene: yes or no;
            "there": is there a three; "many": how many are left of a six. None = each kind in equal parts.
        pairs: which pairs of digits "what" and "is" relate (see `held_out_captions`); None = as in `digit_scenes`.
    """
    return _sample(QUESTIONS, count, split, seed, kind, pairs)


def digit_prompts(
    count: int, *, split: str = "test", seed: int = 0, kind: str | None = None, pairs: str | None = None
) -> Questions:
    """`count` prompts, each with a true answer of several words; further answers may be true, too (see `is_true`).

    Args:
        count, split, seed, pairs: as in `digit_questions`.
        kind: "caption": no words, "three left of a six"; "where" is a three: "left of a six"; "what" is left of a six: "a three";
            "which" digits are there: the four, smallest first. None = each kind in equal parts.
    """
    return _sample(PROMPTS, count, split, seed, kind, pairs)


def example_question() -> tuple[Picture, str]:
    """Returns a photo of four digits and the question "which digits are there", which the model of `load_captioner` answers."""
    asked = digit_prompts(1, seed=EXAMPLE, kind="which")
    return asked.photo(), asked.questions[0]


def _sample(kinds: Sequence[str], count: int, split: str, seed: int, kind: str | None, pairs: str | None) -> Questions:
    check_integer("count", count, low=1)
    check_integer("seed", seed, high=2**64 - 1)  # the range of torch's generators
    if kind is not None and kind not in kinds:
        raise ValueError(f"kind must be None or one of {tuple(kinds)}; got {kind!r}")
    chosen = tuple(kinds) if kind is None else (kind,)
    generator = torch.Generator().manual_seed(seed)
    kept: list[Questions] = []
    for i, name in enumerate(chosen):
        share = count // len(chosen) + (i < count % len(chosen))
        while share:
            scenes = sample_scenes(torch.zeros(2 * share + 8, dtype=torch.int64), split, pairs, generator)
            asked, _ = ask(scenes, [name], prompts=kinds is PROMPTS, split=split, pairs=pairs, generator=generator)
            kept.append(select(asked, range(min(share, len(asked)))))
            share -= len(kept[-1])
    return joined(kept)


def ask(
    scenes: Scenes,
    kinds: Sequence[str],
    *,
    prompts: bool = False,
    split: str = "train",
    pairs: str | None = None,
    generator: torch.Generator,
) -> tuple[Questions, Tensor]:
    """A question (or prompt) of each kind about each scene, in this order, and the scene of each, int64. A kind leaves out the
    scenes about which it has nothing to ask."""
    facts = _Facts.of(scenes, sayable_captions(split, pairs))
    parts = [_ask(scenes, facts, kind, prompts, generator) for kind in kinds]
    return joined([part for part, _ in parts]), torch.cat([samples for _, samples in parts])


def _ask(scenes: Scenes, facts: _Facts, kind: str, prompts: bool, generator: torch.Generator) -> tuple[Questions, Tensor]:
    count = len(scenes)
    yes = torch.rand(count, generator=generator) < 0.5
    present = torch.zeros(count, 10, dtype=torch.bool).scatter_(1, scenes.digits, True)
    if kind == "is":
        candidates = torch.where(yes[:, None, None, None], facts.true, facts.false)
    elif kind == "there":
        candidates = torch.where(yes[:, None], present, ~present)
    elif kind == "many":
        candidates = facts.clear
    elif kind == "which":
        candidates = torch.ones(count, 1, dtype=torch.bool)
    else:
        candidates = facts.true if prompts else facts.single
    samples = torch.nonzero(candidates.flatten(1).any(1)).squeeze(1)
    candidates = candidates[samples]
    flat = torch.multinomial(candidates.flatten(1).float(), 1, generator=generator).squeeze(1)
    index = torch.stack(torch.unravel_index(flat, candidates.shape[1:]), dim=1)
    texts, named = [], torch.zeros(len(samples), scenes.digits.shape[1], dtype=torch.bool)
    for n, (sample, indices) in enumerate(zip(samples.tolist(), index.tolist(), strict=True)):
        digits = scenes.digits[sample].tolist()
        if kind == "there":
            texts.append((f"is there a {DIGIT_WORDS[indices[0]]}", "yes" if yes[sample] else "no"))
            names = [digits.index(indices[0])] if yes[sample] else []
        elif kind == "which":
            texts.append((WHICH, " ".join(DIGIT_WORDS[digit] for digit in sorted(digits))))
            names = list(range(len(digits)))
        elif kind == "many":
            beside = facts.beside[sample, :, indices[0], indices[1]]
            question = f"how many are {RELATIONS[indices[1]]} a {DIGIT_WORDS[digits[indices[0]]]}"
            texts.append((question, DIGIT_WORDS[int(beside.sum())]))
            names = [indices[0], *torch.nonzero(beside).flatten().tolist()]
        else:
            first, second, relation = DIGIT_WORDS[digits[indices[0]]], DIGIT_WORDS[digits[indices[1]]], RELATIONS[indices[2]]
            names = indices[:2]
            by_kind = {
                "caption": ("", f"{first} {relation} a {second}"),
                "where": (f"where is a {first}", f"{relation} a {second}"),
                "what": (f"what is {relation} a {second}", f"a {first}" if prompts else first),
                "is": (f"is a {first} {relation} a {second}", "yes" if yes[sample] else "no"),
            }
            texts.append(by_kind[kind])
        named[n, names] = True
    questions, answers = zip(*texts, strict=True) if texts else ((), ())
    about = select(scenes, samples.tolist())
    return Questions(about.images, about.boxes, about.digits, (kind,) * len(samples), questions, answers, named), samples


def are_true(prompts: Questions, answers: Sequence[str]) -> list[bool]:
    """`is_true` of an answer to each prompt."""
    return [is_true(*one) for one in zip(prompts.questions, answers, prompts.digits, prompts.boxes, strict=True)]


def is_true(question: str, answer: str, digits: Tensor, boxes: Tensor) -> bool:
    """Whether an answer to one of `digit_prompts` is well formed, and true of the scene with digits (R) and boxes (R, 4)."""
    if question == WHICH:
        return answer.split() == [DIGIT_WORDS[digit] for digit in sorted(digits.tolist())]
    if question.startswith("where is a "):
        sentence = f"{question.removeprefix('where is a ')} {answer}"
    elif question.startswith("what is "):
        sentence = f"{answer.removeprefix('a ')} {question.removeprefix('what is ')}" if answer.startswith("a ") else ""
    elif not question:
        sentence = answer
    else:
        raise ValueError(f"question must be one of digit_prompts; got {question!r}")
    regions = {DIGIT_WORDS[digit]: region for region, digit in enumerate(digits.tolist())}
    words = sentence.split()
    relation = " ".join(words[1:3])
    if len(words) != 5 or words[3] != "a" or relation not in RELATIONS or not {words[0], words[4]} <= regions.keys():
        return False
    pixels = displacement(boxes[None, :, :2])[0, regions[words[0]], regions[words[4]], RELATIONS.index(relation)]
    return bool(pixels >= CLEARANCE)
