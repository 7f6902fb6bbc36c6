"""Question answering as in MAC (Hudson and Manning, ICLR 2018): in each of a few steps a query from the question attends to the
regions, which are combined with the memory of earlier steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlattn_lab.experiments.experiment import spearman
from vlattn_lab.experiments.scores.attend import SCORES, UNIFORM, Attend, perturbation, points, weights_and_relevancy
from vlattn_lab.experiments.scores.material import Sizes, TextEncoder, reader, region_encoder, regions, text_ids
from vlattn_lab.processor import DIGIT_WORDS
from vlattn_lab.questions import QUESTIONS, Questions, digit_questions
from vlattn_lab.scenes import REGIONS
from vlattn_lab.texts import ANSWERS, PAD
from vlattn_lab.train.fit import fit, seeded

ARMS = (*SCORES, UNIFORM)
WORDS, SIZE, STEPS = 7, 48, 3
BATCH = 128
RATES = (8e-4, 2e-3)  # learning rates; validation scans choose one for each score
SIZES, SMOKE = Sizes(1700, 16384, 500), Sizes(3, 64, 20)


class Mac(nn.Module):
    see = staticmethod(regions)  # what the model sees of a reader, images and boxes

    def __init__(self, arm: str, backend: str = "auto") -> None:
        super().__init__()
        self.text, self.region = TextEncoder(WORDS, SIZE), region_encoder(SIZE)
        self.ask = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(STEPS))
        self.start = nn.Parameter(torch.ones(SIZE))
        self.remembered, self.met = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.key = nn.Linear(2 * SIZE, SIZE)
        self.write = nn.Linear(3 * SIZE, SIZE)
        self.answer = nn.Sequential(nn.Linear(2 * SIZE, 2 * SIZE), nn.ReLU(), nn.Linear(2 * SIZE, len(ANSWERS)))
        self.attend = Attend(arm, SIZE, backend)

    def forward(self, images: Tensor, ids: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Regions (B, R, FEATURES) and questions (B, WORDS) -> logits (B, answers)."""
        words, sentence = self.text(ids)
        hidden = torch.where(ids == PAD, -torch.inf, 0.0)
        regions = self.region(images)
        met, memory = self.met(regions), self.start.expand(len(ids), -1)
        for control in self.controls(words, sentence, hidden):
            key = self.key(torch.cat([met * self.remembered(memory)[:, None], regions], dim=-1))
            read = self.attend(control[:, None], key, regions, key_mask)[:, 0]
            memory = self.write(torch.cat([read, memory, read * control], dim=-1))
        logits: Tensor = self.answer(torch.cat([memory, sentence], dim=-1))
        return logits

    def controls(self, words: Tensor, sentence: Tensor, hidden: Tensor) -> Iterator[Tensor]:
        """For each step (B, SIZE), the words that it attends to. hidden: (B, WORDS), -inf at padding and 0 elsewhere."""
        for ask in self.ask:
            attention = ((words @ ask(sentence)[..., None])[..., 0] / SIZE**0.5 + hidden).softmax(-1)
            yield (attention[:, None] @ words)[:, 0]


class Asked(NamedTuple):
    images: Tensor
    ids: Tensor
    answers: Tensor


@functools.lru_cache(maxsize=12)  # of one seed
def questions_of(count: int, seed: int, split: str, kind: str | None = None) -> Questions:
    return digit_questions(count, split=split, seed=seed, kind=kind)


def asked(questions: Questions, net: nn.Sequential, see: Callable[..., Tensor]) -> Asked:
    answers = torch.tensor([ANSWERS.index(answer) for answer in questions.answers])
    return Asked(see(net, questions.images, questions.boxes), text_ids(questions.questions, WORDS), answers)


def train(arm: str, seed: int, sizes: Sizes, rate: float, make: Callable[[str], Any] = Mac) -> tuple[Any, Any]:
    """The trained model and its copy from before training."""
    first, model = (seeded(seed, lambda: make(arm)) for _ in range(2))
    known = asked(questions_of(sizes.samples, 1000 + seed, sizes.learn), reader(seed, sizes.learn), model.see)
    generator = torch.Generator().manual_seed(seed)

    def losses() -> dict[str, Tensor]:
        chosen = torch.randint(len(known.ids), (BATCH,), generator=generator)
        return {"answer": F.cross_entropy(model(known.images[chosen], known.ids[chosen]), known.answers[chosen])}

    fit(model.parameters(), losses, {"answer": 1.0}, sizes.steps, learning_rate=rate, fused=True)
    return model.eval(), first.eval()


def aims(questions: Questions) -> Tensor:
    """bool (B, R): the region that answers a question. "what" has the region of the answer's digit, "there" with a yes the
    region of the digit asked for, and every remaining question no region."""
    aimed = []
    for kind, question, answer in zip(questions.kinds, questions.questions, questions.answers, strict=True):
        word = answer if kind == "what" else question.split()[-1] if (kind, answer) == ("there", "yes") else ""
        aimed.append(DIGIT_WORDS.index(word) if word else -1)
    return questions.digits == torch.tensor(aimed)[:, None]


def measure(model: Mac, seed: int, sizes: Sizes) -> dict[str, float]:
    """Figures on test questions, equally many of each kind. accuracy: mean over the kinds."""
    net = reader(seed, sizes.learn)
    parts = {kind: questions_of(sizes.tested, seed, sizes.test, kind) for kind in QUESTIONS}
    every = [asked(questions, net, model.see) for questions in parts.values()]
    figures: dict[str, float] = {}
    with torch.no_grad():
        for kind, part in zip(parts, every, strict=True):
            figures[kind] = float((model(part.images, part.ids).argmax(1) == part.answers).double().mean())
    figures["accuracy"] = sum(figures[kind] for kind in QUESTIONS) / len(QUESTIONS)
    whole = Asked(*map(torch.cat, zip(*every, strict=True)))
    calls = weights_and_relevancy(model.attend, lambda: _right_logit(model, whole))
    last = calls[-1][0][:, 0, 0]
    target = torch.cat([aims(questions) for questions in parts.values()])
    aimed = target.any(1)
    figures["share"] = float(last[target].double().mean())
    figures["chance"] = 1 / REGIONS
    figures["pointing"] = float(points(last[aimed], target[aimed]).mean())
    for number, (weights, _) in enumerate(calls, 1):
        figures[f"share_step_{number}"] = float(weights[:, 0, 0][target].double().mean())
    weights, relevancy = (torch.stack([call[i][:, 0, 0] for call in calls]).mean(0) for i in (0, 1))
    figures["agreement"] = float(spearman(weights, relevancy).mean())

    @torch.no_grad()
    def accuracy(mask: Tensor) -> float:
        return float((model(whole.images, whole.ids, mask).argmax(1) == whole.answers).double().mean())

    return figures | perturbation(weights, accuracy, seed)


def _right_logit(model: Mac, part: Asked) -> Tensor:
    """(B): the logit of the right answer less the mean of all."""
    logits = model(part.images, part.ids)
    return logits.gather(1, part.answers[:, None])[:, 0] - logits.mean(1)


def blind(sizes: Sizes, seed: int) -> dict[str, float]:
    """Accuracy of the most frequent answer to each kind of question."""
    accuracy = {}
    for kind in QUESTIONS:
        known, test = (questions_of(sizes.tested, seed, split, kind).answers for split in (sizes.learn, sizes.test))
        frequent = max(sorted(set(known)), key=known.count)
        accuracy[kind] = test.count(frequent) / len(test)
    return {**accuracy, "accuracy": sum(accuracy.values()) / len(accuracy)}
