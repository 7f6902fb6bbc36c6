"""The trainings of the two CLIPMapper of DigitScenes, for questions and for captions, on the trained CLIP model.

The vision encoder is frozen. The text encoder trains further, since CLIP's captions have few words of questions. Beside the
answer, the state of each digit word learns the centre of the digit. The state that answers a question learns which digits the
question is about, and the distance of two compared digits: yes and no alone teach these very slowly. The state in front of a
text's last digit learns all digits that would make the text true.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlattn_fast.models import CLIPMapper
from vlattn_lab.clip import caption_pixels, load_clip
from vlattn_lab.mapper import CONFIG, blind_accuracy, prompt_accuracy, question_accuracy
from vlattn_lab.processor import DIGIT_WORDS
from vlattn_lab.questions import PROMPTS, QUESTIONS, Questions, ask
from vlattn_lab.scenes import CANVAS, CLEARANCE, DIGIT, sample_scenes, sayable_captions, select
from vlattn_lab.texts import ANSWERS, PAD, TEXT_VOCABULARY, SceneProcessor
from vlattn_lab.train.clip import noisy
from vlattn_lab.train.fit import check_steps, fit, seeded
from vlattn_lab.weights import DATA

SCENES = 16  # a step, with a question of each kind about each
LEARNED = 10000  # training questions of each kind that the blind baselines count
ZERO_ID, LEFT_ID = TEXT_VOCABULARY.index("zero"), TEXT_VOCABULARY.index("left")  # of ten digits, and of four relations
LR = 2e-3
WEIGHTS = {"answer": 1.0, "centre": 5.0, "about": 5.0, "apart": 5.0}
FIRST, SECOND = 3, 7  # where "[START] is a three left of a seven [END]" has its digits


class TrainingHeads(nn.Module):
    """The heads that only training uses: the place of a word's digit; the digits that a question is about, or that make a text
    true; the distance of two digits."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.centre = nn.Linear(hidden_size, 2)
        self.about = nn.Linear(hidden_size, 10)
        self.apart = nn.Linear(hidden_size, 2)


def centre_loss(heads: TrainingHeads, states: Tensor, named: Tensor, digits: Tensor, boxes: Tensor) -> Tensor:
    """Loss of the centres read from states (B, T, C) that stand for a digit, 0 to 9 in named (B, T), in scenes with digits (B, R)
    and boxes (B, R, 4)."""
    centres, present = centres_of(named, digits, boxes)
    return F.smooth_l1_loss(heads.centre(states[present]), centres[present], beta=0.1)


def centres_of(named: Tensor, digits: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, 2) in 0 to 1, and bool (B, T), whether there is such a digit."""
    names = named[..., None] == digits[:, None]
    return names.float() @ ((boxes[..., :2] + DIGIT / 2) / CANVAS), names.any(-1)


def question_losses(model: CLIPMapper, heads: TrainingHeads, asked: Questions, image_states: Tensor) -> dict[str, Tensor]:
    """The losses of questions. A question names few of a scene's digits, so each scene also has a list of its four digits, as a
    text without an answer, from which words learn digits early."""
    count = len(asked)
    listed = torch.tensor([i for i, kind in enumerate(asked.kinds) if kind == "there"])  # each scene has one such question
    about_scenes = torch.cat([torch.arange(count), listed])
    lists = [" ".join(DIGIT_WORDS[digit] for digit in digits) for digits in asked.digits[listed].tolist()]
    words = SceneProcessor().words([*asked.questions, *lists])
    ids, mask = words["input_ids"], words["attention_mask"]
    output = model(input_ids=ids, attention_mask=mask, image_states=image_states[about_scenes])
    target = torch.tensor([ANSWERS.index(text) for text in asked.answers])
    # the state that answers stands for the digit of the answer, unless the answer is no digit
    kinds = torch.tensor([QUESTIONS.index(kind) for kind in asked.kinds])
    stands = torch.where(kinds == QUESTIONS.index("what"), target, -1)
    stands = torch.cat([stands, torch.full((len(listed),), -1)])
    end = mask.sum(1) - 1
    named = (ids - ZERO_ID).scatter(1, end[:, None], stands[:, None])
    read = output.last_hidden_state[torch.arange(count), end[:count]]
    about = torch.zeros(count, 10).scatter_(1, asked.digits, asked.named.float())
    compares = kinds == QUESTIONS.index("is")
    centres, _ = centres_of(named[:count][compares], asked.digits[compares], asked.boxes[compares])
    apart = centres[:, FIRST] - centres[:, SECOND]
    return {
        "answer": F.cross_entropy(output.logits[:count], target),
        "centre": centre_loss(heads, output.last_hidden_state, named, asked.digits[about_scenes], asked.boxes[about_scenes]),
        "about": F.binary_cross_entropy_with_logits(heads.about(read), about),
        "apart": F.smooth_l1_loss(heads.apart(read[compares]), apart, beta=0.1),
    }


def prompt_losses(model: CLIPMapper, heads: TrainingHeads, asked: Questions, image_states: Tensor) -> dict[str, Tensor]:
    texts = [f"{question} {text}" for question, text in zip(asked.questions, asked.answers, strict=True)]
    words = SceneProcessor().words(texts)
    ids = words["input_ids"]
    output = model(input_ids=ids, attention_mask=words["attention_mask"], image_states=image_states)
    asks = torch.tensor([len(question.split()) for question in asked.questions])
    later = ids[:, 1:]
    learned = (torch.arange(later.shape[1]) >= asks[:, None]) & (later != PAD)  # the words of the answer, and its end
    related = torch.tensor([kind != "which" for kind in asked.kinds])
    last = words["attention_mask"].sum(1)[related] - 2
    before = output.last_hidden_state[related, last - 1]
    fitting, sayable = fitting_digits(asked, ids, related, last)
    return {
        "answer": F.cross_entropy(output.logits[:, :-1][learned], later[learned]),
        "centre": centre_loss(heads, output.last_hidden_state, ids - ZERO_ID, asked.digits, asked.boxes),
        "about": F.binary_cross_entropy_with_logits(heads.about(before), fitting.float(), sayable.float()),
    }


def fitting_digits(asked: Questions, ids: Tensor, texts: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """(bool (N, 10), bool (N, 10)) for some `texts`, bool (B): digits that make a text true as its token `last`, and digits
    that a training text may have there."""
    ids, related = ids[texts], select(asked, texts.nonzero().flatten().tolist())
    asks = torch.tensor([kind == "what" for kind in related.kinds])  # left of a six a [three]; else: three left of a [six]
    each = torch.arange(len(ids))
    known = ids[each, torch.where(asks, last - 2, last - 4)] - ZERO_ID
    relation = ids[each, torch.where(asks, last - 5, last - 3)] - LEFT_ID
    digit = torch.arange(10).expand(len(ids), -1)
    known, relation, asks = (x[:, None].expand_as(digit) for x in (known, relation, asks))
    said = torch.stack([torch.where(asks, digit, known), relation, torch.where(asks, known, digit)], dim=-1)  # (N, 10, 3)
    fitting = caption_pixels(related, said.flatten(0, 1)).unflatten(1, (-1, 10))[each, each] >= CLEARANCE
    return fitting, sayable_captions("train", None)[said[..., 0], said[..., 2], relation]


def train(task: str, steps: int, *, seed: int = 0, log_every: int = 100, clip: str | Path = DATA, **options: bool) -> CLIPMapper:
    """A model of task "vqa" or "captions", trained for `steps` steps of SCENES scenes with AdamW, one learning-rate cycle; eval
    mode. clip: the directory of the CLIP weights. options: further ones of the CLIPMapper, such as its kind of layers."""
    check_steps(steps)
    generator = torch.Generator().manual_seed(seed)
    encoders, _ = load_clip(clip)

    def make() -> tuple[CLIPMapper, TrainingHeads]:
        config: dict[str, Any] = CONFIG[task] | options
        model = CLIPMapper(encoders.vision_model, encoders.text_model, **config, freeze_encoders=False)
        return model, TrainingHeads(CONFIG[task]["hidden_size"])

    model, heads = seeded(seed, make)
    model.vision.requires_grad_(False)
    parameters = [parameter for part in (model, heads) for parameter in part.parameters() if parameter.requires_grad]
    prompts = task == "captions"
    task_losses, kinds = (prompt_losses, PROMPTS) if prompts else (question_losses, QUESTIONS)

    def drawn() -> dict[str, Tensor]:
        scenes = sample_scenes(torch.zeros(SCENES, dtype=torch.int64), "train", None, generator)
        with torch.no_grad():
            states = model.encode_image(noisy(scenes.images, generator))
        asked, samples = ask(scenes, kinds, prompts=prompts, generator=generator)
        return task_losses(model, heads, asked, states[samples])

    fit(parameters, drawn, WEIGHTS, steps, learning_rate=LR, log_every=log_every, warmup=0.1)
    return model.eval()


def evaluate(task: str, model: CLIPMapper, *, count: int, seed: int = 0) -> dict[str, Any]:
    """Accuracies on test scenes, for all captions and for captions whose pairs of digits no training text relates."""
    measure = prompt_accuracy if task == "captions" else question_accuracy
    report: dict[str, Any] = {
        measure.__name__: {pairs: measure(model, count=count, seed=seed, pairs=pairs) for pairs in ("all", "seen", "held_out")}
    }
    if task == "vqa":
        report["blind_accuracy"] = blind_accuracy(count=count, seed=seed, learned=LEARNED)
    return report
