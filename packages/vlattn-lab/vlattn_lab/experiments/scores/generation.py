"""Pictures from captions as in AttnGAN (Xu et al., CVPR 2018), without its discriminators: noise and the sentence make a coarse
grid, each cell of the grid attends to the words, and a decoder draws the result. The loss is DAMSM's alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlattn_fast import damsm_similarity
from vlattn_lab.clip import caption_pixels, words_of
from vlattn_lab.experiments.experiment import spearman
from vlattn_lab.experiments.scores import encoders
from vlattn_lab.experiments.scores.attend import PLAIN, UNIFORM, Attend, perturbation, points, weights_and_relevancy
from vlattn_lab.experiments.scores.encoders import BATCH, CELLS, GAMMA1, GAMMA2, SIZE, WORDS, Pair, PairSizes, captioned, pair
from vlattn_lab.experiments.scores.material import text_ids
from vlattn_lab.texts import SceneProcessor
from vlattn_lab.train.fit import fit, seeded

ARMS = (*PLAIN, UNIFORM)
NOISE = 16
RATES = (3e-3,)  # one learning rate for all scores
WRONG = 29  # captions beside the right one
SHOWN = 6  # pictures that the records of the first seed keep
DIGIT_PLACES = torch.tensor([0, 4])  # among a caption's words


class Sizes(NamedTuple):
    """steps: of the training. tested: held-out captions, of which pictures are made. pair: of the encoders."""

    steps: int = 300
    tested: int = 240
    pair: PairSizes = PairSizes()


SIZES, SMOKE = Sizes(), Sizes(2, 40, PairSizes(2, 2, 64))


class Generator(nn.Module):
    def __init__(self, arm: str, backend: str = "auto") -> None:
        super().__init__()
        self.start = nn.Linear(SIZE + NOISE, 32 * 16)
        self.coarse = nn.Conv2d(32, SIZE, 3, 1, 1)
        self.words = nn.Linear(SIZE, SIZE, bias=False)
        self.joint = nn.Conv2d(2 * SIZE, SIZE, 3, 1, 1)
        self.fine = nn.Conv2d(SIZE, 16, 3, 1, 1)
        self.last = nn.Conv2d(16, 1, 3, 1, 1)
        self.attend = Attend(arm, SIZE, backend)

    def forward(self, words: Tensor, sentence: Tensor, noise: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Words (B, WORDS, SIZE), sentence (B, SIZE) and noise (B, NOISE) -> pictures (B, 32, 32) with ink in [0, 1]."""
        start = self.start(torch.cat([sentence, noise], dim=-1)).unflatten(1, (32, 4, 4)).relu()
        grid = self.coarse(F.interpolate(start, scale_factor=2)).relu()
        attended = self.attend(grid.flatten(2).mT, self.words(words), None, key_mask).mT.unflatten(2, (CELLS, CELLS))
        grid = grid + self.joint(torch.cat([grid, attended], dim=1)).relu()
        grid = self.fine(F.interpolate(grid, scale_factor=2)).relu()
        picture: Tensor = self.last(F.interpolate(grid, scale_factor=2))[:, 0]
        return (picture - 2).sigmoid()  # most of a scene is blank


def train(arm: str, seed: int, sizes: Sizes, rate: float) -> tuple[Generator, Generator]:
    """The trained model and its copy from before training, with the encoders of the same seed."""
    first, model = (seeded(seed, lambda: Generator(arm)) for _ in range(2))
    net, generator = pair(seed, sizes.pair), torch.Generator().manual_seed(seed)
    ids = text_ids(captioned(sizes.pair.scenes, 1000 + seed, "train").captions, WORDS)
    keys = encoders.caption_keys(ids)

    def losses() -> dict[str, Tensor]:
        chosen = torch.randint(len(ids), (BATCH,), generator=generator)
        words, sentence = net.text(ids[chosen])
        images = model(words, sentence, torch.randn(BATCH, NOISE, generator=generator))
        return {"match": encoders.damsm_loss(*net.picture(images), words, sentence, keys[chosen])}

    fit(model.parameters(), losses, {"match": 1.0}, sizes.steps, learning_rate=rate, warmup=0.1, fused=True)
    return model.eval(), first.eval()


class Captions(NamedTuple):
    """T captions. wrong: int64 (T, WRONG), captions that are not true of the scene of each."""

    ids: Tensor
    noise: Tensor
    wrong: Tensor
    images: Tensor
    digits: Tensor  # int64 (T, 2), the named digits


def held_out(seed: int, count: int) -> Captions:
    """Captions that no training contains, and their scenes."""
    scenes, generator = captioned(count, seed, "test", "held_out"), torch.Generator().manual_seed(seed)
    ids = text_ids(scenes.captions, WORDS)
    false = caption_pixels(scenes, words_of(scenes)) <= 0
    wrong = torch.multinomial(false.double(), WRONG, generator=generator)
    noise = torch.randn(count, NOISE, generator=generator)
    return Captions(ids, noise, wrong, scenes.images, words_of(scenes)[:, ::2])


def precision(judge: Pair, images: Tensor, captions: Captions) -> float:
    """R-precision: how often the caption of a picture fits better than WRONG false captions."""
    fit_of = encoders.similarity(judge, images, captions.ids)
    true_fit = fit_of.diagonal()
    return float((true_fit > fit_of.gather(1, captions.wrong).amax(1)).double().mean())


def measure_real(seed: int, sizes: Sizes) -> dict[str, float]:
    """R-precision of the captions' real scenes in the place of pictures."""
    captions = held_out(seed, sizes.tested)
    figures = {name: precision(pair(number, sizes.pair), captions.images, captions) for name, number in judges(seed).items()}
    return {**figures, "ink": float(captions.images.mean())}


def judges(seed: int) -> dict[str, int]:
    """Seeds of the judging encoders: encoders that the generator never met, and the encoders it trained with."""
    return {"accuracy": seed + 1, "own_encoders": seed}


def measure(model: Generator, seed: int, sizes: Sizes) -> dict[str, float]:
    """Figures on held-out captions. accuracy: R-precision, judged by encoders that the generator never met."""
    judge, net = (pair(number, sizes.pair) for number in judges(seed).values())
    captions = held_out(seed, sizes.tested)
    words, sentence = net.text(captions.ids)
    with torch.no_grad():
        images = model(words, sentence, captions.noise)
    seen = judge.digits(images)  # (T, cells)
    figures = {
        "accuracy": precision(judge, images, captions),
        "own_encoders": precision(net, images, captions),
        "ink": float(images.mean()),
    }

    def score() -> Tensor:
        """How well each word fits the picture."""
        parts = zip(net.picture(model(words, sentence, captions.noise))[0].split(20), words.split(20), strict=True)
        return torch.cat([damsm_similarity(cells, said, gamma1=GAMMA1, gamma2=GAMMA2).diagonal() for cells, said in parts])

    [(each, relevancy)] = weights_and_relevancy(model.attend, score)
    each, relevancy = each[:, 0], relevancy[:, 0]  # (T, cells, WORDS)
    weights, relevancy = (x.mT[:, DIGIT_PLACES] for x in (each, relevancy))  # (T, 2, cells)
    inside = seen[:, None] == captions.digits[..., None]
    there, mass = inside.any(-1), (weights * inside).sum(-1) / weights.sum(-1)
    figures["drawn"] = float(there.double().mean())
    figures["share"] = _mean(mass[there])
    figures["chance"] = _mean(inside[there].double().mean(-1))
    figures["pointing"] = _mean(points(weights, inside)[there])
    figures["agreement"] = float(spearman(weights, relevancy).mean())

    @torch.no_grad()
    def accuracy(mask: Tensor) -> float:
        return precision(judge, model(words, sentence, captions.noise, mask), captions)

    return figures | perturbation(each.mean(1), accuracy, seed)


@torch.no_grad()
def samples(model: Generator | None, seed: int, sizes: Sizes) -> dict[str, list[str]]:
    """The first SHOWN captions and their pictures as hexadecimal numbers, two digits a pixel; without a model the scenes."""
    captions = held_out(seed, sizes.tested)
    words, sentence = pair(seed, sizes.pair).text(captions.ids[:SHOWN])
    images = captions.images[:SHOWN] if model is None else model(words, sentence, captions.noise[:SHOWN])
    said = [" ".join(SceneProcessor().convert_ids_to_tokens(ids)) for ids in captions.ids[:SHOWN]]
    return {"captions": said, "pictures": [bytes(ink).hex() for ink in (255 * images).round().int().flatten(1).tolist()]}


def _mean(x: Tensor) -> float:
    return float(x.double().mean()) if x.numel() else 0.0
