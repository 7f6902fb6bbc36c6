"""The model, its scenes and its training: image-text matching alone, with or without a congruence loss beside it.

The model is smaller than the UNITER of `vlattn_lab.train`, so that a training takes under a minute of one core, and no loss
tells the model where a digit is. Such a model stays at chance on order and relation for a while, and then jumps.

To shorten the wait, regions come as from a detector, with scores of the ten digits and a place, and the model begins where a
first training would end: a region has the embedding of the word for its digit, and words attend to the regions they name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlattn_fast as va
from vlattn_fast.models import UNITER, UNITERConfig, UNITEROutput
from vlattn_fast.nn import CapturedLayer, CongruenceLoss
from vlattn_lab import scenes as data
from vlattn_lab import uniter, winoground
from vlattn_lab.processor import DIGIT_WORDS, VOCABULARY
from vlattn_lab.scenes import CANVAS, DIGIT, NEGATIVES, Scenes, by_digit, digit_scans, paint, sample_scenes
from vlattn_lab.train.fit import seeded

KINDS = ("cacr", "iais_singular", "iais_distributed")  # of the loss
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
FALSE = torch.tensor([1] * 12 + [2] * 12 + [3] * 24)  # one entry a scene of a batch, see `batches`
MATCHED = len(FALSE)  # true captions come first
REGIONS = 2  # digits a scene
LEARNING_RATE, WARMUP = 1e-3, 100  # constant after warm-up: the jump must not depend on the run's length
NOISE = 0.15  # standard deviation added to the pixels in training
AHEAD = 16  # batches drawn at once, which is cheaper
RELATION, MASK_ID = slice(2, 4), VOCABULARY.index("[MASK]")
WORDS, CAPTION = slice(1, 6), 7  # the five words without [CLS] and [SEP]; regions follow the caption
JUMP = 0.75  # accuracy of order and of relation at which a model has passed the jump
VALIDATION_SEED, TEST_SEED = 1, 2
RELATIONAL = ("relation", "order")

Curve = dict[str, list[float]]  # "step", accuracies by kind of caption, values of losses
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """steps: of a training; every: steps between two evaluations; validation, test: scenes of each kind."""

    steps: int
    every: int
    validation: int
    test: int


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


def batches(generator: torch.Generator) -> Iterator[tuple[Inputs, Tensor]]:
    """(inputs with noise, labels), without end. Each of MATCHED scenes comes with its true caption, with a false caption of the
    kind in FALSE, and with the true caption without its relation; labels (2 MATCHED) belong to the first two thirds."""
    label = torch.cat([torch.ones_like(FALSE), torch.zeros_like(FALSE)])
    while True:
        scenes, false_ids = training_scenes(FALSE.repeat(AHEAD), "fit", generator)
        inputs = model_inputs(scenes, noise=NOISE * torch.randn(*scenes.digits.shape, 64, generator=generator))
        asked = inputs["input_ids"].clone()
        asked[:, RELATION] = MASK_ID
        for samples in torch.arange(len(false_ids)).split(MATCHED):
            batch = {name: x[samples].repeat(3, *[1] * (x.ndim - 1)) for name, x in inputs.items()}
            yield batch | {"input_ids": torch.cat([x[samples] for x in (inputs["input_ids"], false_ids, asked)])}, label


def congruence(loss: CongruenceLoss, layer: CapturedLayer, matched: int) -> Tensor:
    """The loss between words and regions over the first `matched` samples."""
    assert layer.joint is not None
    query, key = (x[:matched] for x in layer.joint)
    return loss((query[:, :, WORDS], key[:, :, WORDS]), (query[:, :, CAPTION:], key[:, :, CAPTION:]))


def losses(model: UNITER, output: UNITEROutput, inputs: Inputs, label: Tensor) -> Tensor:
    """Matching, and the masked relations of the last third of the batch."""
    words = inputs["input_ids"][:MATCHED, RELATION]
    said = model.word_logits(output.last_hidden_state[2 * MATCHED :, RELATION])
    return F.cross_entropy(output.logits[: 2 * MATCHED], label) + F.cross_entropy(said.flatten(0, 1), words.flatten())


def new_model(seed: int) -> UNITER:
    """A model whose regions begin with the embedding of the word for the detected digit, and whose first layer projects keys as
    it projects queries."""
    model = seeded(seed, lambda: UNITER(CONFIG))
    zero = VOCABULARY.index(DIGIT_WORDS[0])
    words = model.uniter.embeddings.word_embeddings.weight[zero : zero + len(DIGIT_WORDS)]
    with torch.no_grad():
        model.uniter.img_embeddings.img_linear.weight.copy_(words.T)
        first = model.uniter.encoder.get_submodule("layer.0.attention.self")
        first.get_submodule("key").load_state_dict(first.get_submodule("query").state_dict())
    return model


def train(seed: int, loss: str, weight: float, layer: int, sizes: Sizes, *, stop_at_jump: bool = False) -> tuple[UNITER, Curve]:
    """A trained model, and its accuracies and losses on validation scenes every `sizes.every` steps.

    Seeds pair the runs: the seed alone gives initial weights, scenes, captions and noise, whatever the loss.

    Args:
        loss: a kind of `CongruenceLoss`, or "none".
        stop_at_jump: stop at the first evaluation where order and relation have passed the jump.
    """
    model, drawn, watch = new_model(seed), batches(torch.Generator().manual_seed(seed)), Watch(sizes.validation)
    extra = None if loss == "none" else CongruenceLoss(loss, direction="alternate", weight=weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    for step in range(1, sizes.steps + 1):
        inputs, label = next(drawn)
        if extra is None:
            total = losses(model, model(**inputs), inputs, label)
        else:
            with va.nn.capture_attention(model, layers=layer) as captured:
                output = model(**inputs)
            total = losses(model, output, inputs, label) + congruence(extra, captured.layer, MATCHED)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        if step % sizes.every == 0:
            watch.look(model, step)
            if stop_at_jump and None not in [jump(watch.curve, name) for name in RELATIONAL]:
                break
    return model, watch.curve


def jump(curve: Curve, name: str) -> int | None:
    """The first step at which the accuracy of a kind of caption has passed the jump; None where no step has."""
    return next((int(step) for step, value in zip(curve["step"], curve[name], strict=True) if value >= JUMP), None)


class Watch:
    """Measures a model while it trains: accuracies on validation scenes as in `matching_accuracy`, and the congruence of its
    attention by each loss and in each layer."""

    def __init__(self, count: int) -> None:
        self._false: dict[str, Inputs] = {}
        for kind, name in enumerate(NEGATIVES, 1):
            generator = torch.Generator().manual_seed(VALIDATION_SEED)  # the same scenes for each kind of caption
            scenes, false_ids = training_scenes(torch.full((count,), kind), "validation", generator)
            self._true = model_inputs(scenes)
            self._false[name] = self._true | {"input_ids": false_ids}
        self.curve: Curve = {}

    @torch.no_grad()
    def look(self, model: UNITER, step: int) -> None:
        values, odds = congruences(model, self._true)
        for name, value in ({"step": step} | accuracies(model, odds, self._false) | values).items():
            self.curve.setdefault(name, []).append(float(f"{value:.4g}"))


def accuracies(model: UNITER, odds: Tensor, false: Mapping[str, Inputs]) -> dict[str, float]:
    """By kind of false caption, from the log odds of true captions and the inputs with false ones."""
    accepted = float((odds > 0).double().mean())
    return {name: (accepted + float((log_odds(model, x) <= 0).double().mean())) / 2 for name, x in false.items()}


def log_odds(model: UNITER, inputs: Inputs) -> Tensor:
    """(B): that the captions are true."""
    return uniter.log_odds(model(**inputs))


@torch.no_grad()
def congruences(model: UNITER, inputs: Inputs) -> tuple[dict[str, float], Tensor]:
    """(the losses in each layer, in both directions, by `value_name`; the log odds) of true captions."""
    with va.nn.capture_attention(model, layers=range(CONFIG.num_hidden_layers)) as captured:
        odds = log_odds(model, inputs)
    return {
        value_name(kind, layer): float(congruence(CongruenceLoss(kind), captured[layer], len(odds)))
        for kind in KINDS
        for layer in range(CONFIG.num_hidden_layers)
    }, odds


def value_name(kind: str, layer: int) -> str:
    return f"{kind} in layer {layer}"


@torch.no_grad()
def final_scores(model: UNITER, count: int, pairs: str) -> dict[str, float]:
    """Scores on scenes with test scans: accuracies by kind of wrong caption, Winoground's three scores on swapped pairs, and
    the congruence losses of true captions."""
    true = model_inputs(fewer(data.digit_scenes(count, seed=TEST_SEED, pairs=pairs)))
    said = {name: data.digit_scenes(count, seed=TEST_SEED, pairs=pairs, negative=name).input_ids for name in NEGATIVES}
    false = {name: true | {"input_ids": ids} for name, ids in said.items()}
    scores = accuracies(model, log_odds(model, true), false)
    sides = [model_inputs(fewer(side)) for side in data.swapped_pairs(count, seed=TEST_SEED, pairs=pairs)]
    table = [[log_odds(model, scene | {"input_ids": text["input_ids"]}).tolist() for text in sides] for scene in sides]
    examples = ((((0, number), (1, number)), (0, 1)) for number in range(count))
    scores |= winoground.evaluate(lambda image, caption: table[image[0]][caption][image[1]], examples)
    return scores | congruences(model, true)[0]
