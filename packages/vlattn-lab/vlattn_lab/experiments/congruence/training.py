"""The model, its scenes and its training: image-text matching alone, or with a loss on attention or on relevancy.

A training has few scenes, which it repeats: with new scenes at each step the model learns the task wholly, and no loss could
gain anything. The model is smaller than the UNITER of `vlattn_lab.train`, so that a training takes a quarter of a minute of
one core. Regions come as from a detector, with scores of the ten digits and a place, and the model begins where a first
training would end: a region has the embedding of the word for its digit, and words attend to the regions they name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlattn_fast as va
from vlattn_fast.models import UNITER, UNITERConfig, UNITEROutput
from vlattn_fast.nn import CapturedLayer, CongruenceLoss, RelevancyLoss, training_signal_annealing
from vlattn_lab import scenes as data
from vlattn_lab import uniter, winoground
from vlattn_lab.processor import DIGIT_WORDS, VOCABULARY
from vlattn_lab.scenes import CANVAS, DIGIT, NEGATIVES, Scenes, by_digit, digit_scans, paint, sample_scenes
from vlattn_lab.train.fit import seeded

KINDS: dict[str, dict[str, Any]] = {  # congruence losses, and their arguments
    "cacr": {"kind": "cacr"},
    "cacr_as_is": {"kind": "cacr", "normalize": "none"},
    "iais_singular": {"kind": "iais_singular"},
    "iais_distributed": {"kind": "iais_distributed"},
}
CONFIG = UNITERConfig(
    vocab_size=len(VOCABULARY),
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=256,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    max_position_embeddings=16,
    initializer_range=0.1,
    region_dim=len(DIGIT_WORDS),
    position_dim=3,
    masked_words=True,
)
MATCHED = 24  # scenes of a batch; true captions come first
FALSE = torch.tensor([1, 2, 3, 3])  # the kinds of false captions that scenes have in turn, see `batches`
REGIONS = 3  # digits a scene
LEARNING_RATE, WARMUP = 1e-3, 100
NOISE = 0.15  # standard deviation added to the pixels in training
RELATION, MASK_ID = slice(2, 4), VOCABULARY.index("[MASK]")
WORDS, CAPTION = slice(1, 6), 7  # the five words without [CLS] and [SEP]; regions follow the caption
SEEDS = {"validation": 1, "test": 2}  # of the scenes that measure a model

Curve = dict[str, list[float]]  # "step", scores and values of losses
Inputs = dict[str, Tensor]
Run = Callable[[UNITER, Inputs, Tensor, int], tuple[UNITEROutput, Tensor | float]]  # model, batch, named, step -> output, a loss


@dataclass(frozen=True)
class Sizes:
    """scenes: that a training has; steps: of a training; every: steps between two evaluations; validation, test: scenes of each
    kind."""

    scenes: int
    steps: int
    every: int
    validation: int
    test: int


@dataclass(frozen=True)
class Setting:
    """loss: "none", one of KINDS, "relevancy", "told" (`told`) or "hard" (`hard_negatives`). schedule: of its weight, see
    `training_signal_annealing`. layer and direction: of a congruence loss."""

    loss: str = "none"
    weight: float = 0.0
    schedule: str = "const"
    layer: int = 0
    direction: str = "both"


@cache
def _scans(part: str) -> tuple[Tensor, Tensor, Tensor]:
    """(scans (S, 8, 8) by digit, start of each digit, count of each digit)."""
    order, start, count = by_digit(part)
    return digit_scans(part)[0][order], start, count


@cache
def _detector() -> tuple[Tensor, Tensor]:
    """Weights (64, 10) and bias (10) of a ridge regression from the scans to fit to their digits."""
    scans, _, count = _scans("fit")
    pixels = F.pad(scans.flatten(1).double(), (0, 1), value=1.0)
    digits = F.one_hot(torch.arange(10).repeat_interleave(count), 10).double()
    solved = torch.linalg.solve(pixels.mT @ pixels + torch.eye(65, dtype=torch.float64), pixels.mT @ digits).float()
    return solved[:-1], solved[-1]


def training_scenes(captions: Tensor, part: str, generator: torch.Generator) -> tuple[Scenes, Tensor]:
    """(scenes with true captions and digits of one part of the training scans, ids (B, 7) of the false captions of the kinds in
    `captions`, as in `sample_scenes`)."""
    state = generator.get_state()
    false_ids = sample_scenes(captions, "train", None, generator).input_ids
    generator.set_state(state)  # the same scenes again
    scenes = sample_scenes(torch.zeros_like(captions), "train", None, generator)
    scans, start, count = _scans(part)
    pick = (torch.rand(scenes.digits.shape, generator=generator) * count[scenes.digits]).long()
    return fewer(replace(scenes, images=paint(scans[start[scenes.digits] + pick], scenes.boxes[..., :2].long()))), false_ids


def fewer(scenes: Scenes) -> Scenes:
    """Scenes with REGIONS digits each, the named digits among them; the model sees no ink outside the boxes."""
    place = torch.arange(scenes.named.shape[1])
    kept = torch.where(scenes.named, -1, place).argsort(dim=1, stable=True)[:, :REGIONS].sort(1).values
    return replace(
        scenes,
        boxes=scenes.boxes.gather(1, kept[..., None].expand(-1, -1, 4)),
        digits=scenes.digits.gather(1, kept),
        named=scenes.named.gather(1, kept),
    )


def model_inputs(scenes: Scenes, *, noise: Tensor | None = None) -> Inputs:
    """A region has ten scores, and 1, x and y of its centre, from about -1 to 1. Nothing is padded, so there are no masks."""
    pixels = scenes.inputs()["region_features"]
    weight, bias = _detector()
    centres = 3.0 * ((scenes.boxes[..., :2] + DIGIT / 2) / CANVAS - 0.5)
    return {
        "input_ids": scenes.input_ids,
        "region_features": (pixels if noise is None else pixels + noise) @ weight + bias,
        "region_positions": F.pad(centres, (1, 0), value=1.0),
    }


def batches(count: int, generator: torch.Generator) -> Iterator[tuple[Inputs, Tensor, Tensor]]:
    """(inputs with noise, labels, named), without end: `count` scenes in one order after another. Each of MATCHED scenes comes
    with its true caption, with its false caption, of the kind in FALSE, and with the true caption without its relation; labels
    (2 MATCHED) belong to the first two thirds; named (MATCHED, R): the regions that the true captions name."""
    scenes, false_ids = training_scenes(FALSE.repeat(count // len(FALSE) + 1)[:count], "fit", generator)
    asked = scenes.input_ids.clone()
    asked[:, RELATION] = MASK_ID
    label = torch.tensor([1, 0]).repeat_interleave(MATCHED)
    while True:
        inputs = model_inputs(scenes, noise=NOISE * torch.randn(*scenes.digits.shape, 64, generator=generator))
        for samples in torch.randperm(count, generator=generator).split(MATCHED):
            batch = {name: x[samples].repeat(3, *[1] * (x.ndim - 1)) for name, x in inputs.items()}
            ids = torch.cat([x[samples] for x in (inputs["input_ids"], false_ids, asked)])
            yield batch | {"input_ids": ids}, label, scenes.named[samples]


def congruence(loss: CongruenceLoss, layer: CapturedLayer, matched: int, *, step: int = 0) -> Tensor:
    """The loss between words and regions over the first `matched` samples."""
    assert layer.joint is not None
    query, key = (x[:matched] for x in layer.joint)
    return loss((query[:, :, WORDS], key[:, :, WORDS]), (query[:, :, CAPTION:], key[:, :, CAPTION:]), step=step)


def losses(model: UNITER, output: UNITEROutput, inputs: Inputs, label: Tensor) -> Tensor:
    """Matching, and the masked relations of the last third of the batch."""
    words = inputs["input_ids"][:MATCHED, RELATION]
    said = model.word_logits(output.last_hidden_state[2 * MATCHED :, RELATION])
    return F.cross_entropy(output.logits[: 2 * MATCHED], label) + F.cross_entropy(said.flatten(0, 1), words.flatten())


def told(output: UNITEROutput, named: Tensor) -> Tensor:
    """The share of a map of the regions that lies on those which the captions do not name, as the loss on relevancy has it. This
    map is the softmax of the dot products of the regions' last states with that of [CLS]: no attention, and no relevancy."""
    states = output.last_hidden_state[:MATCHED]
    share = torch.softmax((states[:, CAPTION:] @ states[:, 0, :, None])[..., 0] * states.shape[2] ** -0.5, dim=1)
    return (share * ~named).sum(1).mean()


def hard_negatives(model: UNITER, output: UNITEROutput, inputs: Inputs) -> Tensor:
    """The loss with which IAIS trains: each scene takes the caption, and each caption the scene, that the model finds the most
    likely of those of the batch that do not belong to it; the true pair is to have a probability larger by 0.2."""
    scenes = {name: x[:MATCHED] for name, x in inputs.items()}
    first, second = torch.cartesian_prod(torch.arange(MATCHED), torch.arange(MATCHED)).unbind(1)

    def pairs(scene: Tensor, caption: Tensor) -> Inputs:
        return {name: x[caption if name == "input_ids" else scene] for name, x in scenes.items()}

    ids = scenes["input_ids"]
    with torch.no_grad():
        odds = log_odds(model, pairs(first, second)).view(MATCHED, MATCHED)
        odds = odds.masked_fill((ids[:, None] == ids).all(2), -torch.inf)  # also of another scene with the same caption
    every = torch.arange(MATCHED)
    chosen = pairs(torch.cat([every, odds.argmax(0)]), torch.cat([odds.argmax(1), every]))
    true = torch.sigmoid(uniter.log_odds(output)[:MATCHED]).repeat(2)
    return (0.2 + torch.sigmoid(log_odds(model, chosen)) - true).clamp(min=0).mean()


class Regulariser:
    """Runs a model with the loss of a setting: (its output, the loss with its weight)."""

    def __init__(self, setting: Setting, steps: int) -> None:
        self.setting, self.steps = setting, steps
        self._outside = RelevancyLoss("inside", prefix=CAPTION)
        self._congruence: CongruenceLoss | None = None
        if setting.loss in KINDS:
            schedule: dict[str, Any] = {"schedule": setting.schedule, "num_steps": steps, "weight": setting.weight}
            self._congruence = CongruenceLoss(**KINDS[setting.loss], direction=setting.direction, **schedule)

    def __call__(self, model: UNITER, inputs: Inputs, named: Tensor, step: int) -> tuple[UNITEROutput, Tensor | float]:
        if self._congruence is not None:
            with va.nn.capture_attention(model, layers=self.setting.layer) as attention:
                output = model(**inputs)
            return output, congruence(self._congruence, attention.layer, MATCHED, step=step)
        weight = self.setting.weight * training_signal_annealing(step, self.steps, self.setting.schedule)
        if self.setting.loss != "relevancy":
            output = model(**inputs)
            if self.setting.loss == "told":
                return output, weight * told(output, named)
            return output, weight * hard_negatives(model, output, inputs) if self.setting.loss == "hard" else 0.0
        with va.nn.capture_relevancy(model) as captured:
            output = model(**inputs)
        relevancy = captured.relevancy(output.logits[:MATCHED, 1].sum())
        assert isinstance(relevancy, Tensor)  # a model of one tower
        return output, weight * self._outside(relevancy[:MATCHED], named[:, None])  # regions are a grid of one line


def new_model(seed: int, config: UNITERConfig = CONFIG) -> UNITER:
    """A model whose regions begin with the embedding of the word for the detected digit, and whose first layer projects keys as
    it projects queries."""
    model = seeded(seed, lambda: UNITER(config))
    zero = VOCABULARY.index(DIGIT_WORDS[0])
    words = model.uniter.embeddings.word_embeddings.weight[zero : zero + len(DIGIT_WORDS)]
    with torch.no_grad():
        model.uniter.img_embeddings.img_linear.weight.copy_(words.T)
        first = model.uniter.encoder.get_submodule("layer.0.attention.self")
        first.get_submodule("key").load_state_dict(first.get_submodule("query").state_dict())
    return model


def train(seed: int, setting: Setting, sizes: Sizes) -> tuple[UNITER, Curve]:
    """A trained model, and its scores on validation scenes every `sizes.every` steps.

    Seeds pair the runs: the seed alone gives initial weights, scenes, captions and noise, whatever the loss.
    """
    return train_with(Regulariser(setting, sizes.steps), new_model(seed), seed, sizes)


def train_with(run: Run, model: UNITER, seed: int, sizes: Sizes) -> tuple[UNITER, Curve]:
    """The same for any model and any loss that `run` gives with the output."""
    drawn, curve = batches(sizes.scenes, torch.Generator().manual_seed(seed)), Curve()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 1.0, 3.0 * (sizes.steps - step) / max(sizes.steps, 1))
    )
    for step in range(sizes.steps):
        inputs, label, named = next(drawn)
        output, extra = run(model, inputs, named, step)
        optimizer.zero_grad(set_to_none=True)
        (losses(model, output, inputs, label) + extra).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        if (step + 1) % sizes.every == 0:
            for name, value in {"step": step + 1, **scores(model, sizes.validation, "validation", "seen")}.items():
                curve.setdefault(name, []).append(float(f"{value:.4g}"))
    return model, curve


@torch.no_grad()
def scores(model: UNITER, count: int, split: str, pairs: str) -> dict[str, float]:
    """On `count` scenes of a split: accuracies by kind of false caption, Winoground's three scores on swapped pairs, and the
    congruence losses of true captions."""
    drawn: dict[str, Any] = {"split": split, "seed": SEEDS[split], "pairs": pairs}
    true = model_inputs(fewer(data.digit_scenes(count, **drawn)))
    odds, values = congruences(model, true)
    accepted, found = float((odds > 0).double().mean()), {}
    for name in NEGATIVES:
        false = log_odds(model, true | {"input_ids": data.digit_scenes(count, **drawn, negative=name).input_ids})
        found[name] = (accepted + float((false <= 0).double().mean())) / 2
    sides = [model_inputs(fewer(side)) for side in data.swapped_pairs(count, **drawn)]
    table = [[log_odds(model, scene | {"input_ids": text["input_ids"]}).tolist() for text in sides] for scene in sides]
    examples = ((((0, number), (1, number)), (0, 1)) for number in range(count))
    swapped = winoground.evaluate(lambda image, caption: table[image[0]][caption][image[1]], examples)
    return {**found, **swapped, **values}


def log_odds(model: UNITER, inputs: Inputs) -> Tensor:
    """(B): that the captions are true."""
    return uniter.log_odds(model(**inputs))


@torch.no_grad()
def congruences(model: UNITER, inputs: Inputs) -> tuple[Tensor, dict[str, float]]:
    """(the log odds of true captions; the losses in each layer, in both directions, by `value_name`)."""
    layers = range(CONFIG.num_hidden_layers)
    with va.nn.capture_attention(model, layers=layers) as captured:
        odds = log_odds(model, inputs)
    return odds, {
        value_name(kind, layer): float(congruence(CongruenceLoss(**KINDS[kind]), captured[layer], len(odds)))
        for kind in KINDS
        for layer in layers
    }


def value_name(kind: str, layer: int) -> str:
    return f"{kind} in layer {layer}"
