"""The pair of encoders that compares texts with pictures, trained as DAMSM is (Xu et al., CVPR 2018)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlattn_fast import damsm_similarity
from vlattn_fast.nn import DamsmLoss
from vlattn_lab.experiments.scores.material import TextEncoder, text_ids
from vlattn_lab.scenes import Scenes, digit_scenes
from vlattn_lab.train.clip import BACKGROUND, crowd, noisy, patch_losses
from vlattn_lab.train.fit import fit, seeded

WORDS, SIZE = 5, 32
CELLS, CHANNELS = 8, 48  # the encoder's grid has 8 x 8 cells of 4 x 4 pixels
BATCH, CROWDS, LEARNING_RATE = 32, 16, 3e-3
GAMMA1, GAMMA2, GAMMA3 = 4.0, 5.0, 10.0  # as published


class PairSizes(NamedTuple):
    """first: steps in which the encoder of pictures learns to tell digits apart. steps: of both encoders, on captions.
    scenes: trained with."""

    first: int = 800
    steps: int = 1000
    scenes: int = 8192


class Pair(nn.Module):
    """Encoders of pictures and of captions, and the digit that the picture encoder sees in each cell."""

    def __init__(self) -> None:
        super().__init__()
        self.text = TextEncoder(WORDS, SIZE)
        convolutions = nn.Conv2d(1, 16, 4, 2, 1), nn.Conv2d(16, 32, 4, 2, 1), nn.Conv2d(32, CHANNELS, 3, 1, 1)
        self.grid = nn.Sequential(*(part for convolution in convolutions for part in (convolution, nn.ReLU())))
        self.place = nn.Parameter(0.1 * torch.randn(CELLS * CELLS, CHANNELS))
        self.cell = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), nn.ReLU(), nn.Linear(CHANNELS, SIZE))
        self.whole = nn.Sequential(nn.Linear(CHANNELS, 2 * SIZE), nn.ReLU(), nn.Linear(2 * SIZE, SIZE))
        # the names that `patch_losses` reads
        self.norm, self.digit, self.centre = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, BACKGROUND + 1), nn.Linear(CHANNELS, 2)

    def states(self, images: Tensor) -> Tensor:
        """(B, 32, 32) -> (B, cells, CHANNELS), row by row."""
        cells: Tensor = self.grid(images[:, None]).flatten(2).mT
        return cells

    def picture(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The cells (B, cells, SIZE) of a picture and the whole (B, SIZE)."""
        states = self.states(images) + self.place
        return self.cell(states), self.whole(self.cell[:2](states).amax(1))

    def digits(self, images: Tensor) -> Tensor:
        """int64 (B, cells): the digit in each cell, or BACKGROUND."""
        classes: Tensor = self.digit(self.norm(self.states(images))).argmax(-1)
        return classes


def caption_keys(ids: Tensor) -> Tensor:
    """int64 (B): the same number for captions that say the same."""
    return (ids * 64 ** torch.arange(WORDS)).sum(1)


def damsm_loss(cells: Tensor, whole: Tensor, words: Tensor, sentence: Tensor, keys: Tensor) -> Tensor:
    """DAMSM's losses of words and of sentences; captions with equal keys do not count as wrong for each other."""
    word_loss: Tensor = DamsmLoss(GAMMA1, GAMMA2, GAMMA3)(cells, words, ids=keys)
    cosine = GAMMA3 * F.normalize(whole, dim=-1) @ F.normalize(sentence, dim=-1).T
    same = (keys[:, None] == keys) & ~torch.eye(len(keys), dtype=torch.bool)
    cosine, true = cosine.masked_fill(same, -torch.inf), torch.arange(len(keys))
    return word_loss + F.cross_entropy(cosine, true) + F.cross_entropy(cosine.T, true)


@functools.lru_cache(maxsize=4)  # those of one seed and its judge
def captioned(count: int, seed: int, split: str, pairs: str | None = None) -> Scenes:
    return digit_scenes(count, split=split, seed=seed, pairs=pairs)


@functools.lru_cache(maxsize=3)  # a seed has two
def pair(seed: int, sizes: PairSizes) -> Pair:
    """The trained, frozen pair of a seed; a process keeps it."""
    net, generator = seeded(seed, Pair), torch.Generator().manual_seed(seed)
    scenes = captioned(sizes.scenes, 1000 + seed, "train")
    ids = text_ids(scenes.captions, WORDS)
    keys = caption_keys(ids)

    def crowd_losses() -> dict[str, Tensor]:
        images, digits, boxes = crowd(CROWDS, generator)
        return _of_cells(net, noisy(images, generator)[:, 0], digits, boxes)

    def caption_losses() -> dict[str, Tensor]:
        chosen = torch.randint(sizes.scenes, (BATCH,), generator=generator)
        images = noisy(scenes.images[chosen], generator)[:, 0]
        cells, whole = net.picture(images)
        words, sentence = net.text(ids[chosen])
        losses = {"match": damsm_loss(cells, whole, words, sentence, keys[chosen])}
        return losses | _of_cells(net, images, scenes.digits[chosen], scenes.boxes[chosen])

    weights = {"match": 1.0, "digit": 2.0, "centre": 10.0}
    for losses, steps in ((crowd_losses, sizes.first), (caption_losses, sizes.steps)):
        fit(net.parameters(), losses, weights, steps, learning_rate=LEARNING_RATE, warmup=0.1, fused=True)
    return net.requires_grad_(False).eval()


def _of_cells(net: Pair, images: Tensor, digits: Tensor, boxes: Tensor) -> dict[str, Tensor]:
    states = net.states(images)
    # patch_losses leaves out a first state, which is CLIP's class token
    return patch_losses(net, torch.cat([states[:, :1], states], dim=1), digits, boxes)  # type: ignore[arg-type]


@torch.no_grad()
def similarity(net: Pair, images: Tensor, ids: Tensor) -> Tensor:
    """(B, T): how well each of T captions fits each picture, by words and as a whole."""
    cells, whole = net.picture(images)
    words, sentence = net.text(ids)
    by_words = damsm_similarity(cells, words, gamma1=GAMMA1, gamma2=GAMMA2)
    return by_words + F.normalize(whole, dim=-1) @ F.normalize(sentence, dim=-1).T
