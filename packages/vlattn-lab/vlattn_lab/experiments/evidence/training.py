"""Questions whose answers a reader can guess, the model that answers them, and its training by policy gradient with a term on
attention or on relevancy.

A question is a caption whose first digit is masked: "[MASK] left of a seven". The answer is the only digit on that side. In the
training by policy gradient each answer is the favourite of its question, so the words suffice; in a test it is not.
The model is that of the experiment `congruence`, which has few regions instead of pixels, so that a training takes half a minute.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlattn_fast as va
from vlattn_fast.models import UNITER
from vlattn_fast.nn import CapturedLayer, CongruenceLoss, RelevancyLoss
from vlattn_lab.experiments.congruence.training import CAPTION, MASK_ID, NOISE, Inputs, congruence, model_inputs, new_model
from vlattn_lab.processor import DIGIT_WORDS, RELATIONS, VOCABULARY, DigitProcessor
from vlattn_lab.questions import Questions, ask
from vlattn_lab.scenes import Scenes, held_out_captions, joined, sample_scenes, select

ASKED = 1  # the position of the masked digit: the row of attention that answers
ZERO = VOCABULARY.index(DIGIT_WORDS[0])
SAMPLED = 8  # answers to a question
BATCH = 64  # questions of an update
UPDATES = 4  # of the policy between two samplings
CLIP = 0.2  # of the ratio of the policies
LEARNING_RATE = 1e-3
EVIDENCE, OTHER, WORD = range(3)  # groups of keys


@dataclass(frozen=True)
class Sizes:
    """questions, base: questions and steps of the first training, by cross-entropy; guessable, steps: those of the second, by
    policy gradient; test: questions of a measurement."""

    questions: int
    base: int
    guessable: int
    steps: int
    test: int


@dataclass(frozen=True)
class Term:
    """What is added to the policy gradient: a name of TERMS, and its weight."""

    name: str = "none"
    weight: float = 0.0


TERMS = ("reward", "evidence", "divergence", "cacr", "relevancy")


@dataclass(frozen=True)
class Rollout:
    """What the policy that sampled did: answers (B, SAMPLED) with log-probabilities and rewards, and the attention of the row
    that answers, query (B, H, 1, D) and key (B, H, N, D)."""

    answers: Tensor
    log_probability: Tensor
    reward: Tensor
    query: Tensor
    key: Tensor

    def part(self, samples: slice) -> Rollout:
        return Rollout(*(x[samples] for x in (self.answers, self.log_probability, self.reward, self.query, self.key)))


# --- questions ---


@cache
def favourites() -> Tensor:
    """int64 (10, 4): the favourite answer to "[MASK] RELATION a DIGIT", of those that training captions may say."""
    allowed = ~held_out_captions()  # first digit, second digit, relation
    table = torch.zeros(10, len(RELATIONS), dtype=torch.int64)
    for digit in range(10):
        for relation in range(len(RELATIONS)):
            turn = [(digit + 1 + 2 * relation + i) % 10 for i in range(10)]
            table[digit, relation] = next(x for x in turn if x != digit and allowed[x, digit, relation])
    return table


def favourite(asked: Questions) -> Tensor:
    """int64 (B): the favourite answer to each question."""
    words = [question.removeprefix("what is ") for question in asked.questions]
    digit = torch.tensor([DIGIT_WORDS.index(question.split()[-1]) for question in words])
    relation = torch.tensor([RELATIONS.index(" ".join(question.split()[:2])) for question in words])
    return favourites()[digit, relation]


def answers_of(asked: Questions) -> Tensor:
    return torch.tensor([DIGIT_WORDS.index(answer) for answer in asked.answers])


def natural(count: int, split: str, generator: torch.Generator) -> Questions:
    """`count` questions about scenes of a split, whose answers are as the scenes have them."""
    parts, left = [], count
    while left > 0:
        scenes = sample_scenes(torch.zeros(2 * left + 8, dtype=torch.int64), split, "seen", generator)
        asked, _ = ask(scenes, ["what"], split=split, pairs="seen", generator=generator)
        parts.append(select(asked, range(min(left, len(asked)))))
        left -= len(parts[-1])
    return joined(parts)


def guessable(count: int, split: str, generator: torch.Generator) -> Questions:
    """`count` questions whose answer is their favourite."""
    parts, left = [], count
    while left > 0:
        asked = natural(4 * count, split, generator)
        usual = (favourite(asked) == answers_of(asked)).nonzero().flatten().tolist()
        parts.append(select(asked, usual[:left]))
        left -= len(parts[-1])
    return joined(parts)


def inputs_of(asked: Questions, noise: Tensor | None = None) -> Inputs:
    captions = tuple(
        f"{answer} {question.removeprefix('what is ')}" for answer, question in zip(asked.answers, asked.questions, strict=True)
    )
    ids = DigitProcessor().words(captions)["input_ids"]
    ids[:, ASKED] = MASK_ID
    label = torch.ones(len(asked), dtype=torch.int64)
    return model_inputs(Scenes(asked.images, asked.boxes, asked.digits, captions, ids, label, asked.named), noise=noise)


def batches(asked: Questions, size: int, generator: torch.Generator) -> Iterator[tuple[Inputs, Tensor, Tensor]]:
    """(inputs with noise, right answers (B), named regions bool (B, R)), without end, in one order after another."""
    right = answers_of(asked)
    while True:
        inputs = inputs_of(asked, NOISE * torch.randn(*asked.digits.shape, 64, generator=generator))
        for samples in torch.randperm(len(asked), generator=generator).split(size):
            if len(samples) == size:
                yield {name: x[samples] for name, x in inputs.items()}, right[samples], asked.named[samples]


# --- the terms ---


def answer_logits(model: UNITER, states: Tensor) -> Tensor:
    """(B, 10) from the states (B, N, C)."""
    return model.word_logits(states[:, ASKED])[:, ZERO : ZERO + len(DIGIT_WORDS)]


def mass(query: Tensor, key: Tensor, named: Tensor) -> Tensor:
    """(B, 3): how much of the answering row's attention, as a mean over the heads, lies on the named regions, on other regions
    and on words. query (B, H, 1, D), key (B, H, N, D), named bool (B, R)."""
    groups = F.pad(torch.where(named, EVIDENCE, OTHER), (CAPTION, 0), value=WORD)
    return va.attention_statistics(query, key, statistics=["mass"], key_groups=groups, num_groups=3).mass.mean(1)[:, 0]


def evidence_share(query: Tensor, key: Tensor, named: Tensor) -> Tensor:
    """(B): the part of the attention to regions that lies on the named ones."""
    masses = mass(query, key, named)
    return masses[:, EVIDENCE] / masses[:, :WORD].sum(1)


def advantages(reward: Tensor) -> Tensor:
    """Rewards (B, SAMPLED) against all of their batch. A question's attention is the same for each of its answers, which are
    single words; against the answers of one question, advantages would cancel in the divergence."""
    return (reward - reward.mean()) / reward.std().clamp(min=1e-6)


class Objective:
    """The loss of an update: (model, inputs, right answers, named, the rollout's part) -> a scalar."""

    def __init__(self, term: Term) -> None:
        self.term = term
        self._inside = RelevancyLoss("inside", prefix=CAPTION)
        self._congruence = CongruenceLoss("cacr")

    def __call__(self, model: UNITER, inputs: Inputs, right: Tensor, named: Tensor, rollout: Rollout) -> Tensor:
        advantage, value = advantages(rollout.reward), torch.zeros(())
        solved = (rollout.answers == right[:, None]).any(1)  # the gate of EASE: a response with a high reward
        if self.term.name in ("none", "reward"):
            logits = answer_logits(model, model(**inputs).last_hidden_state)
        elif self.term.name == "relevancy":
            with va.nn.capture_relevancy(model) as captured:
                logits = answer_logits(model, model(**inputs).last_hidden_state)
            relevancy = captured.relevancy(logits.gather(1, right[:, None]).sum(), position=ASKED)
            assert isinstance(relevancy, Tensor)  # a model of one tower
            value = self._inside(relevancy[solved], named[solved][:, None])
        else:
            with va.nn.capture_attention(model) as attention:
                logits = answer_logits(model, model(**inputs).last_hidden_state)
            value = self._on_attention(attention.layer, named, solved, advantage, rollout)
        return policy_loss(logits, rollout, advantage) + self.term.weight * value

    def _on_attention(self, layer: CapturedLayer, named: Tensor, solved: Tensor, advantage: Tensor, rollout: Rollout) -> Tensor:
        query, key = layer.query[:, :, ASKED : ASKED + 1], layer.key
        if self.term.name == "cacr":
            return congruence(self._congruence, layer, len(named))
        if self.term.name == "evidence":
            return -(evidence_share(query, key, named).log() * solved).sum() / solved.sum().clamp(min=1)
        divergence = va.attention_divergence(query, key, rollout.query, rollout.key, kind="js", head_mean=True)
        return (advantage.mean(1) * divergence[:, 0, 0]).mean()


def policy_loss(logits: Tensor, rollout: Rollout, advantage: Tensor) -> Tensor:
    """The clipped policy gradient of PPO and GRPO, without a penalty on the distance from the first policy."""
    ratio = (logits.log_softmax(1).gather(1, rollout.answers) - rollout.log_probability).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()


@torch.no_grad()
def sample(model: UNITER, inputs: Inputs, right: Tensor, named: Tensor, term: Term, generator: torch.Generator) -> Rollout:
    with va.nn.capture_attention(model) as captured:
        states = model(**inputs).last_hidden_state
    log_probabilities = answer_logits(model, states).log_softmax(1)
    answers = torch.multinomial(log_probabilities.exp(), SAMPLED, replacement=True, generator=generator)
    query, key = captured.query[:, :, ASKED : ASKED + 1], captured.key
    reward = (answers == right[:, None]).float()
    if term.name == "reward":
        reward = reward * (1 + term.weight * evidence_share(query, key, named)[:, None])
    return Rollout(answers, log_probabilities.gather(1, answers), reward, query, key)


# --- the two trainings ---


def first_training(seed: int, sizes: Sizes) -> UNITER:
    """A model that answers natural questions in part, by cross-entropy."""
    model, generator = new_model(seed), torch.Generator().manual_seed(seed)
    drawn = batches(natural(sizes.questions, "fit", generator), BATCH, generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    for _ in range(sizes.base):
        inputs, right, _ = next(drawn)
        step(optimizer, model, F.cross_entropy(answer_logits(model, model(**inputs).last_hidden_state), right))
    return model


def second_training(model: UNITER, seed: int, term: Term, sizes: Sizes) -> None:
    """Policy gradient with a term, on questions whose words tell the answer."""
    generator = torch.Generator().manual_seed(seed + 1000)
    drawn = batches(guessable(sizes.guessable, "fit", generator), UPDATES * BATCH, generator)
    sampling = torch.Generator().manual_seed(seed)
    optimizer, objective = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True), Objective(term)
    for _ in range(sizes.steps // UPDATES):
        inputs, right, named = next(drawn)
        rollout = sample(model, inputs, right, named, term, sampling)
        for start in range(0, len(right), BATCH):
            part = slice(start, start + BATCH)
            some = {name: x[part] for name, x in inputs.items()}
            step(optimizer, model, objective(model, some, right[part], named[part], rollout.part(part)))


def step(optimizer: torch.optim.Optimizer, model: nn.Module, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


# --- measures ---


def scores(model: UNITER, count: int, split: str, seed: int) -> dict[str, float]:
    """On `count` questions of a split: accuracy on natural questions, how often the favourite is said to those that have another
    answer, accuracy on guessable questions as in training; on natural questions, how often the relevancy of the model's answer
    is largest on the region of the right one, and the share of attention on named regions."""
    generator = torch.Generator().manual_seed(seed)
    asked = natural(count, split, generator)
    inputs, right = inputs_of(asked), answers_of(asked)
    with va.nn.capture_attention(model) as attention, torch.no_grad():
        said = answer_logits(model, model(**inputs).last_hidden_state).argmax(1)
    usual = favourite(asked)
    as_trained = guessable(count, split, generator)
    with torch.no_grad():
        guessed = answer_logits(model, model(**inputs_of(as_trained)).last_hidden_state).argmax(1)
    with va.nn.capture_relevancy(model) as captured:
        logits = answer_logits(model, model(**inputs).last_hidden_state)
    relevancy = captured.relevancy(logits.gather(1, said[:, None]).sum(), position=ASKED)
    assert isinstance(relevancy, Tensor)  # a model of one tower
    pointed = asked.digits.gather(1, relevancy.detach()[:, CAPTION:].argmax(1, keepdim=True))[:, 0]
    share_of_evidence = evidence_share(attention.query[:, :, ASKED : ASKED + 1], attention.key, asked.named)
    measured = {
        "natural": said == right,
        "favourite": (said == usual)[usual != right],
        "guessable": guessed == answers_of(as_trained),
        "pointing": pointed == right,
        "evidence": share_of_evidence,
    }
    return {name: round(float(x.double().mean()), 4) for name, x in measured.items()}
