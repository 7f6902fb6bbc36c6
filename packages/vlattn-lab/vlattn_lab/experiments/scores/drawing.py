"""Pictures from captions in which attention is the only way from a word to a pixel: given the boxes of the two named digits, each
pixel of a box attends to the words and is painted. A word's value is its embedding, so equal weights tell which digits to draw,
and not where. As in layout-to-image generation, the loss is that of the pixels."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlattn_lab.clip import words_of
from vlattn_lab.experiments.experiment import spearman
from vlattn_lab.experiments.scores.attend import PLAIN, UNIFORM, Attend, perturbation, points, weights_and_relevancy
from vlattn_lab.experiments.scores.matching import said_regions
from vlattn_lab.experiments.scores.material import Sizes, TextEncoder, reader, text_ids
from vlattn_lab.processor import POSITION_DIM, REGION_DIM, DigitProcessor
from vlattn_lab.scenes import DIGIT, digit_scenes, paint
from vlattn_lab.texts import SceneProcessor
from vlattn_lab.train.fit import fit, seeded

ARMS = (*PLAIN, UNIFORM)
WORDS, SIZE = 5, 32
DIGIT_PLACES = torch.tensor([0, 4])  # among a caption's words
BATCH = 64
RATES = (5e-3,)  # one learning rate for all scores
SHOWN = 6  # pictures that the records of the first seed keep
SIZES, SMOKE = Sizes(400, 8192, 1000), Sizes(3, 64, 40)


class Painter(nn.Module):
    def __init__(self, arm: str, backend: str = "auto") -> None:
        super().__init__()
        self.text = TextEncoder(WORDS, SIZE)
        self.place = nn.Sequential(nn.Linear(2 * POSITION_DIM + SIZE, 2 * SIZE), nn.ReLU(), nn.Linear(2 * SIZE, SIZE))
        self.pixel = nn.Parameter(torch.randn(REGION_DIM, SIZE))
        self.ink = nn.Sequential(nn.Linear(2 * SIZE, 3 * SIZE), nn.ReLU(), nn.Linear(3 * SIZE, 1))
        self.attend = Attend(arm, SIZE, backend)

    def forward(self, ids: Tensor, positions: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Captions (B, WORDS), positions (B, 2, POSITION_DIM) of two boxes -> ink (B, 2, 64) of their pixels in [0, 1]."""
        words, sentence = self.text(ids)
        place = self.place(torch.cat([positions, positions.flip(1), sentence[:, None].expand(-1, 2, -1)], dim=-1))
        pixels = (place[:, :, None] + self.pixel).flatten(1, 2)
        attended = self.attend(pixels, words, self.text.embedding(ids), key_mask)
        seen = torch.cat([attended.unflatten(1, (2, -1)), self.pixel.expand(*place.shape[:2], -1, -1)], dim=-1)
        ink: Tensor = self.ink(seen)[..., 0]
        return ink.sigmoid()


class Drawn(NamedTuple):
    """Captions int64 (T, WORDS), and of the two digits that each names, (T, 2, ...): the positions of their boxes, their pixels,
    the digits, their places among the words, and the corners of the boxes."""

    ids: Tensor
    positions: Tensor
    pixels: Tensor
    digits: Tensor
    said: Tensor
    corners: Tensor


@functools.lru_cache(maxsize=4)  # of one seed
def scenes_of(count: int, seed: int, split: str, pairs: str) -> Drawn:
    scenes = digit_scenes(count, split=split, seed=seed, pairs=pairs)
    # either box may be the first
    order = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)).argsort(1)
    chosen = said_regions(scenes).gather(1, order)[..., None]
    boxes = scenes.boxes.gather(1, chosen.expand(-1, -1, 4))
    regions = DigitProcessor().regions(scenes.images, boxes)
    digits = words_of(scenes)[:, ::2].gather(1, order)
    ids = text_ids(scenes.captions, WORDS)
    corners = boxes[..., :2].long()
    return Drawn(ids, regions["region_positions"], regions["region_features"], digits, DIGIT_PLACES[order], corners)


def train(arm: str, seed: int, sizes: Sizes, rate: float) -> tuple[Painter, Painter]:
    """The trained model and its copy from before training."""
    first, model = (seeded(seed, lambda: Painter(arm)) for _ in range(2))
    known, generator = scenes_of(sizes.samples, 1000 + seed, sizes.learn, "seen"), torch.Generator().manual_seed(seed)

    def losses() -> dict[str, Tensor]:
        chosen = torch.randint(len(known.ids), (BATCH,), generator=generator)
        return {"ink": F.mse_loss(model(known.ids[chosen], known.positions[chosen]), known.pixels[chosen])}

    fit(model.parameters(), losses, {"ink": 1.0}, sizes.steps, learning_rate=rate, fused=True)
    return model.eval(), first.eval()


def read(pixels: Tensor, seed: int, sizes: Sizes) -> Tensor:
    """int64 (T, 2): the digit that the classifier of another seed finds in each box."""
    digits: Tensor = reader(seed + 1, sizes.learn)(pixels).argmax(-1)
    return digits


def found(pixels: Tensor, test: Drawn, seed: int, sizes: Sizes) -> dict[str, float]:
    """accuracy: boxes with the digit that the caption places there. drawn: boxes with either of the named digits."""
    digits = read(pixels, seed, sizes)
    right, other = digits == test.digits, digits == test.digits.flip(1)
    return {
        "accuracy": float(right.double().mean()),
        "drawn": float((right | other).double().mean()),
        "error": float((pixels - test.pixels).square().mean()),
    }


def held_out(seed: int, sizes: Sizes) -> Drawn:
    return scenes_of(sizes.tested, seed, sizes.test, "held_out")


def measure_real(seed: int, sizes: Sizes) -> dict[str, float]:
    """What the classifier finds in the scenes themselves."""
    test = held_out(seed, sizes)
    return found(test.pixels, test, seed, sizes)


def measure(model: Painter, seed: int, sizes: Sizes) -> dict[str, float]:
    """Figures on captions of pairs of digits that training does not name."""
    test = held_out(seed, sizes)
    with torch.no_grad():
        pixels = model(test.ids, test.positions)
    figures = found(pixels, test, seed, sizes)

    def score() -> Tensor:
        return -(model(test.ids, test.positions) - test.pixels).square().flatten(1).mean(1)

    [(each, relevancy)] = weights_and_relevancy(model.attend, score)
    weights, relevancy = (x[:, 0].unflatten(1, (2, -1)) for x in (each, relevancy))  # (T, 2, pixels, WORDS)
    said = test.said[..., None, None].expand(-1, -1, REGION_DIM, 1)
    figures["share"] = float(weights.gather(-1, said).double().mean())
    figures["chance"] = 1 / WORDS
    figures["pointing"] = float(points(weights, F.one_hot(said[..., 0], WORDS).bool()).mean())
    figures["agreement"] = float(spearman(weights, relevancy).mean())

    @torch.no_grad()
    def accuracy(mask: Tensor) -> float:
        return found(model(test.ids, test.positions, mask), test, seed, sizes)["accuracy"]

    return figures | perturbation(weights.mean((1, 2)), accuracy, seed)


@torch.no_grad()
def samples(model: Painter | None, seed: int, sizes: Sizes) -> dict[str, list[str]]:
    """The first SHOWN captions and their pictures as hexadecimal numbers, two digits a pixel; without a model the scenes."""
    test = held_out(seed, sizes)
    pixels = (test.pixels if model is None else model(test.ids, test.positions))[:SHOWN]
    images = paint(pixels.unflatten(-1, (DIGIT, DIGIT)), test.corners[:SHOWN])
    said = [" ".join(SceneProcessor().convert_ids_to_tokens(ids)) for ids in test.ids[:SHOWN]]
    return {"captions": said, "pictures": [bytes(ink).hex() for ink in (255 * images).round().int().flatten(1).tolist()]}
