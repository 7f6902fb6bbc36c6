"""Parts that the models of the three tasks share: regions read by a frozen network, an encoder of texts, seeded models."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlattn_lab.processor import POSITION_DIM, REGION_DIM, DigitProcessor
from vlattn_lab.scenes import digit_scans
from vlattn_lab.texts import TEXT_VOCABULARY, SceneProcessor
from vlattn_lab.train.fit import fit, seeded

READ = 32  # features of a scan
FEATURES = READ + POSITION_DIM  # features of a region
READER_STEPS = 400
NOISE = 0.2  # standard deviation added to the scans that the reader learns from


class Sizes(NamedTuple):
    """steps: of the training. samples: trained with; matching adds as many swapped scenes. tested: test samples; in matching a
    multiple of its GROUP, in answering of each kind of question. learn, test: splits."""

    steps: int
    samples: int
    tested: int
    learn: str = "train"
    test: str = "test"


@functools.cache
def reader(seed: int, split: str) -> nn.Sequential:
    """A frozen network that classifies the digits of a split's scans; all but its last layer give features, as the detectors
    and convolutional networks in front of the published models do."""

    def make() -> nn.Sequential:
        return nn.Sequential(nn.Linear(REGION_DIM, 64), nn.ReLU(), nn.Linear(64, READ), nn.ReLU(), nn.Linear(READ, 10))

    net, generator = seeded(seed, make), torch.Generator().manual_seed(seed)
    scans, digits, _ = digit_scans(split)

    def losses() -> dict[str, Tensor]:
        chosen = torch.randint(len(scans), (128,), generator=generator)
        pixels = scans[chosen].flatten(1)
        pixels = pixels + NOISE * torch.randn(pixels.shape, generator=generator)
        return {"digit": F.cross_entropy(net(pixels), digits[chosen])}

    fit(net.parameters(), losses, {"digit": 1.0}, READER_STEPS, learning_rate=5e-3, fused=True)
    return net.requires_grad_(False).eval()


@torch.no_grad()
def regions(net: nn.Sequential, images: Tensor, boxes: Tensor) -> Tensor:
    """(B, R, FEATURES): the reader's features of each box, and the place of the box."""
    boxed = DigitProcessor().regions(images, boxes)
    read = net[:-1](boxed["region_features"])
    return torch.cat([F.normalize(read, dim=-1) * READ**0.5, boxed["region_positions"]], dim=-1)


def text_ids(texts: Sequence[str], length: int) -> Tensor:
    """int64 (B, length): the words alone, padded on the right."""
    ids = SceneProcessor(end=False).words(texts)["input_ids"][:, 1:]
    return F.pad(ids, (0, length - ids.shape[1]))


class TextEncoder(nn.Module):
    """ids (B, length) -> words (B, length, D), each with the sentence in it, and the sentence (B, D)."""

    def __init__(self, length: int, size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(TEXT_VOCABULARY), size)
        self.position = nn.Parameter(0.1 * torch.randn(length, size))
        self.sentence = nn.Sequential(nn.Linear(length * size, 2 * size), nn.ReLU(), nn.Linear(2 * size, size))
        self.context = nn.Linear(size, size)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        words = self.embedding(ids) + self.position
        sentence = self.sentence(words.flatten(1))
        return words + self.context(sentence)[:, None], sentence


def region_encoder(size: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, 2 * size), nn.ReLU(), nn.Linear(2 * size, size))
