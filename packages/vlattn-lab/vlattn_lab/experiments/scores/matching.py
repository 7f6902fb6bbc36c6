"""Image-text matching as in SCAN (Lee et al., ECCV 2018), from texts to images: each word of a caption attends to the regions of
an image; the similarity is the mean cosine of a word and its attended regions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlattn_lab.clip import caption_pixels, words_of
from vlattn_lab.experiments.experiment import spearman
from vlattn_lab.experiments.scores.attend import SCORES, UNIFORM, Attend, perturbation, points, weights_and_relevancy
from vlattn_lab.experiments.scores.material import Sizes, TextEncoder, reader, region_encoder, regions, text_ids
from vlattn_lab.scenes import CLEARANCE, NEGATIVES, REGIONS, Scenes, digit_scenes, joined, select, swapped_pairs
from vlattn_lab.train.fit import fit, seeded

ARMS = (*SCORES, UNIFORM)
WORDS, SIZE = 5, 32
FIRST, SECOND = 0, 4  # the places of the two digits in a caption
BATCH = 32
RATES = (2.5e-3, 4e-3)  # learning rates; validation scans choose one for each score
GROUP = 100  # captions and images that recall is measured among
SIZES, SMOKE = Sizes(2400, 4096, 10 * GROUP), Sizes(3, 32, GROUP)


class Matcher(nn.Module):
    """depth: how often words attend to regions. Before each time but the first, what they have seen is added to them."""

    attention: type[Attend] = Attend

    def __init__(self, arm: str, backend: str = "auto", depth: int = 1, **options: Any) -> None:
        super().__init__()
        self.text, self.region = TextEncoder(WORDS, SIZE), region_encoder(SIZE)
        self.attend = self.attention(arm, SIZE, backend, **options)
        self.deeper = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(depth - 1))

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """Regions (Bi, R, FEATURES) and captions (Bc, WORDS) -> similarity (Bi, Bc), in one call of attention a layer."""
        regions, words = self.sides(images, ids)
        words = words.flatten(0, 1)
        return self._cosines(words.expand(len(images), -1, -1), regions).unflatten(1, (len(ids), WORDS)).mean(-1)

    def pairs(self, images: Tensor, ids: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """As many images as captions -> similarity (B) of each pair."""
        regions, words = self.sides(images, ids)
        return self._cosines(words, regions, key_mask).mean(-1)

    def sides(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Encoded regions (Bi, R, SIZE) and words (Bc, WORDS, SIZE)."""
        return self.region(images), self.text(ids)[0]

    def _cosines(self, words: Tensor, regions: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """(B, N): the cosine of each word and the regions that it attends to."""
        attended = self.attend(words, regions, key_mask=key_mask)
        for deeper in self.deeper:
            attended = self.attend(words + deeper(attended), regions, key_mask=key_mask)
        return _cosine(words, attended)


def _cosine(words: Tensor, attended: Tensor) -> Tensor:
    """The cosine of words (..., D) and attended regions; 0 where all regions are masked."""
    return (attended * F.normalize(words, dim=-1)).sum(-1) / torch.linalg.vector_norm(attended, dim=-1).clamp(min=1e-8)


@functools.lru_cache(maxsize=4)  # of one seed
def scenes_of(count: int, seed: int, split: str, negative: str | None = None) -> Scenes:
    return digit_scenes(count, split=split, seed=seed, negative=negative)


@functools.lru_cache(maxsize=1)
def swapped_scenes(count: int, seed: int, split: str) -> Scenes:
    """Training scenes, then the same scenes with their two named digits exchanged, whose captions are false of the first."""
    return joined(swapped_pairs(count, split=split, seed=seed))


def triplets(similarity: Tensor, same: Tensor, margin: float = 0.2) -> Tensor:
    """The sum of `ScanLoss(hardest=False)` over similarities (B, B); same: bool (B, B), the pairs that are not false."""
    true = similarity.diagonal()
    captions_of = (margin + similarity - true[:, None]).clamp(min=0).masked_fill(same, 0.0)
    images_of = (margin + similarity - true[None, :]).clamp(min=0).masked_fill(same, 0.0)
    return captions_of.sum() + images_of.sum()


def train(arm: str, seed: int, sizes: Sizes, rate: float, make: Callable[[str], Matcher] = Matcher) -> tuple[Matcher, Matcher]:
    """The trained model and its copy from before training."""
    first, model = (seeded(seed, lambda: make(arm)) for _ in range(2))
    scenes, generator = swapped_scenes(sizes.samples, 1000 + seed, sizes.learn), torch.Generator().manual_seed(seed)
    seen = regions(reader(seed, sizes.learn), scenes.images, scenes.boxes)
    ids, words = text_ids(scenes.captions, WORDS), words_of(scenes)

    def losses() -> dict[str, Tensor]:
        half = torch.randint(sizes.samples, (BATCH // 2,), generator=generator)
        chosen = torch.cat([half, half + sizes.samples])
        # a caption that is true, or nearly true, of an image is not wrong for this image
        holds = caption_pixels(select(scenes, chosen.tolist()), words[chosen]) > 0
        holds |= torch.eye(len(chosen), dtype=torch.bool)
        return {"triplets": triplets(model(seen[chosen], ids[chosen]), holds) / BATCH}

    fit(model.parameters(), losses, {"triplets": 1.0}, sizes.steps, learning_rate=rate, fused=True)
    return model.eval(), first.eval()


def said_regions(scenes: Scenes) -> Tensor:
    """int64 (B, 2): the region of each of the two digits that a true caption names."""
    named = words_of(scenes)[:, ::2]
    return (scenes.digits[:, None] == named[..., None]).int().argmax(-1)


def measure(model: Matcher, seed: int, sizes: Sizes) -> dict[str, float]:
    """Figures on test scenes. accuracy: the mean of two shares: images whose most similar caption among GROUP is true of the
    image, and captions that are true of their most similar image among GROUP. Weights are those of the last layer, and the mean
    over heads; pointing_head: the mean over heads of each head's pointing."""
    net, scenes = reader(seed, sizes.learn), scenes_of(sizes.tested, seed, sizes.test)
    images, ids, words = regions(net, scenes.images, scenes.boxes), text_ids(scenes.captions, WORDS), words_of(scenes)
    figures: dict[str, float] = {}
    hits: dict[str, list[Tensor]] = {"caption": [], "image": [], "chance": []}
    with torch.no_grad():
        for start in range(0, sizes.tested, GROUP):
            group, each = slice(start, start + GROUP), torch.arange(GROUP)
            true = caption_pixels(select(scenes, range(start, start + GROUP)), words[group]) >= CLEARANCE
            similarity = model(images[group], ids[group])
            hits["caption"].append(true[each, similarity.argmax(1)])
            hits["image"].append(true[similarity.argmax(0), each])
            hits["chance"].append(true.double().mean(1))
        for name, hit in hits.items():
            figures[f"recall_{name}"] = float(torch.cat(hit).double().mean())
        figures["accuracy"] = (figures["recall_caption"] + figures["recall_image"]) / 2
        true_scores = model.pairs(images, ids)
        wrong = {}
        for negative in NEGATIVES:
            wrong[negative] = text_ids(scenes_of(sizes.tested, seed, sizes.test, negative).captions, WORDS)
            figures[negative] = float((true_scores > model.pairs(images, wrong[negative])).double().mean())

    each, relevancy = weights_and_relevancy(model.attend, lambda: model.pairs(images, ids))[-1]
    places, target = torch.tensor([FIRST, SECOND]), said_regions(scenes)
    each, relevancy = each[:, :, places], relevancy[:, :, places].mean(1)
    weights, there = each.mean(1), F.one_hot(target, REGIONS).bool()
    figures["pointing_head"] = float(points(each, there[:, None]).mean())
    figures["share"] = float(weights.gather(2, target[..., None]).mean())
    figures["chance"] = 1 / REGIONS
    figures["pointing"] = float(points(weights, there).mean())
    figures["agreement"] = float(spearman(weights, relevancy).mean())

    @torch.no_grad()
    def accuracy(mask: Tensor) -> float:
        """True captions against those with a wrong digit; a tie is half."""
        one, two = (model.pairs(images, captions, mask) for captions in (ids, wrong["digit"]))
        return float((one > two).double().mean() + (one == two).double().mean() / 2)

    return figures | perturbation(weights.amax(1), accuracy, seed)
