"""The training of the small CLIP model of DigitScenes.

The contrastive loss matches captions and images in a batch (Radford et al., ICML 2021). This loss alone teaches which digits a
caption names, and hardly their relation: captions are read as bags of words. Further losses teach a relation's parts: from each
patch, its digit and the digit's centre; from the pooled image state, which digits are there, and where; from the pooled caption,
its words in order. The losses of patches come first and alone, on images crowded with digits: until the encoder tells digits
apart, the remaining losses have nothing to learn from.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlattn_lab import scenes as data
from vlattn_lab.clip import CONFIG, PATCH, build_clip, caption_accuracy, caption_ids, caption_pixels, retrieval, words_of
from vlattn_lab.processor import RELATIONS
from vlattn_lab.scenes import CANVAS, DIGIT, NEGATIVES, Scenes, caption_words, paint, sample_scenes, sayable_captions
from vlattn_lab.train.fit import check_steps, fit, seeded

if TYPE_CHECKING:
    from transformers import CLIPModel

CROWDS, BATCH = 16, 64  # images a step in the first part of the training, and in the second
WEIGHTS = {"contrast": 1.0, "present": 2.0, "places": 10.0, "words": 1.0, "digit": 2.0, "centre": 10.0}
FIRST = 0.4  # the first part of all steps
SIDE = 3  # digits in a row and in a column of a crowded image
NOISE = 0.2  # largest standard deviation added to the pixels of an image; without it the scans are memorised
BACKGROUND = 10  # the class of a patch without ink
UNSURE = -100  # a patch that a digit covers by less than half: no class
MOST_SCALE = math.log(100)  # of the logits, as published


class TrainingHeads(nn.Module):
    """The heads that only training uses, on patches, pooled images and pooled captions (see above)."""

    def __init__(self, vision_size: int, text_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(vision_size)
        self.digit = nn.Linear(vision_size, BACKGROUND + 1)
        self.centre = nn.Linear(vision_size, 2)
        self.present = nn.Linear(vision_size, 10)
        self.places = nn.Linear(vision_size, 20)
        self.words = nn.ModuleList(nn.Linear(text_size, size) for size in (10, len(RELATIONS), 10))


def place(model: CLIPModel) -> None:
    """Starts position embeddings of the patches as sines of row and column, so that the model need not learn the grid, and makes
    patch embeddings large enough beside them."""
    embeddings = model.vision_model.embeddings
    side, size = CANVAS // PATCH, embeddings.position_embedding.embedding_dim // 4
    angles = torch.arange(side)[:, None] * math.pi / 2 * torch.arange(1, size + 1) / size
    along = torch.cat([angles.sin(), angles.cos()], dim=1)
    grid = torch.cat([along[:, None].expand(-1, side, -1), along[None].expand(side, -1, -1)], dim=-1)
    with torch.no_grad():
        embeddings.position_embedding.weight[1:] = grid.flatten(0, 1) / 2
        nn.init.normal_(embeddings.patch_embedding.weight, std=1 / PATCH)


def noisy(images: Tensor, generator: torch.Generator) -> Tensor:
    """images (B, H, W) with noise of a random strength up to NOISE each -> pixel values (B, 1, H, W)."""
    strength = NOISE * torch.rand(len(images), 1, 1, generator=generator)
    return (images + strength * torch.randn(images.shape, generator=generator))[:, None]


def crowd(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """`count` images full of training scans, each scan some pixels off a grid: (images (B, 32, 32), digits (B, 9), boxes
    (B, 9, 4))."""
    scans, labels, _ = data.digit_scans("train")
    drawn = torch.randint(0, len(scans), (count, SIDE, SIDE), generator=generator)
    room = CANVAS - SIDE * DIGIT

    def starts(lines: int) -> Tensor:
        """(B, lines, SIDE): where the digits of a line begin, in order, with gaps of whole pixels that `room` has in all."""
        gaps = torch.rand(count, lines, SIDE + 1, generator=generator)
        gaps = room * (gaps.cumsum(-1) / gaps.sum(-1, keepdim=True))[..., :-1]
        return gaps.round().long() + DIGIT * torch.arange(SIDE)

    corners = torch.stack([starts(SIDE), starts(1).transpose(1, 2).expand(-1, -1, SIDE)], dim=-1).flatten(1, 2)
    drawn = drawn.flatten(1)
    return paint(scans[drawn], corners), labels[drawn], torch.cat([corners, corners + DIGIT], dim=-1).float()


def patch_truth(digits: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """(digit int64 (B, P), BACKGROUND or UNSURE; centre (B, P, 2) in 0 to 1 of the digit) for the patches, row by row."""
    edge = PATCH * torch.arange(CANVAS // PATCH)
    low, high = boxes[..., None, :2], boxes[..., None, 2:]
    overlap = (torch.minimum(high, edge[:, None] + PATCH) - torch.maximum(low, edge[:, None])).clamp(min=0)  # (B, R, side, 2)
    area = (overlap[..., 1][..., :, None] * overlap[..., 0][..., None, :]).flatten(2)  # (B, R, P)
    most, region = area.max(1)
    digit = digits.gather(1, region)
    digit = torch.where(most >= PATCH * PATCH / 2, digit, torch.where(most == 0, BACKGROUND, UNSURE))
    centre = ((boxes[..., :2] + DIGIT / 2) / CANVAS).gather(1, region[..., None].expand(-1, -1, 2))
    return digit, centre


def patch_losses(heads: TrainingHeads, states: Tensor, digits: Tensor, boxes: Tensor) -> dict[str, Tensor]:
    """The losses of patches from the vision encoder's states (B, 1 + P, C)."""
    digit, centre = patch_truth(digits, boxes)
    states = heads.norm(states[:, 1:])
    shows = (digit != BACKGROUND) & (digit != UNSURE)
    return {
        "digit": F.cross_entropy(heads.digit(states).flatten(0, 1), digit.flatten(), ignore_index=UNSURE),
        "centre": F.smooth_l1_loss(heads.centre(states)[shows], centre[shows], beta=0.1),
    }


def crowd_losses(model: CLIPModel, heads: TrainingHeads, generator: torch.Generator) -> dict[str, Tensor]:
    """The two losses of the first part."""
    images, digits, boxes = crowd(CROWDS, generator)
    states = model.vision_model(pixel_values=noisy(images, generator)).last_hidden_state
    return patch_losses(heads, states, digits, boxes)


def losses(model: CLIPModel, heads: TrainingHeads, scenes: Scenes, generator: torch.Generator) -> dict[str, Tensor]:
    """All losses on scenes with true captions. Each scene has three false captions, one of each kind. A caption of another scene
    that is true of an image, or nearly true, does not count as wrong for this image."""
    true = words_of(scenes)
    first, second = ((scenes.digits == true[:, i, None]).int().argmax(1) for i in (0, 2))
    corners, sayable = scenes.boxes[..., :2].long(), sayable_captions("train", None)
    words = [true]
    for kind in range(1, 1 + len(NEGATIVES)):
        kinds = torch.full((len(scenes),), kind)
        words.append(caption_words(kinds, scenes.digits, corners, (first, second, true[:, 1]), sayable, generator)[0])
    said = torch.cat(words)
    image = model.vision_model(pixel_values=noisy(scenes.images, generator))
    text = model.text_model(input_ids=caption_ids(said))
    image_embeds = F.normalize(model.visual_projection(image.pooler_output), dim=-1)
    text_embeds = F.normalize(model.text_projection(text.pooler_output), dim=-1)
    count = len(scenes)
    logits = model.logit_scale.clamp(max=MOST_SCALE).exp() * image_embeds @ text_embeds.T
    rival = caption_pixels(scenes, said) <= 0
    rival[:, :count] |= torch.eye(count, dtype=torch.bool)
    logits = logits.masked_fill(~rival, -torch.inf)
    target = torch.arange(count)
    contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :count].T, target)) / 2

    present = torch.zeros(count, 10).scatter_(1, scenes.digits, 1.0)
    places = heads.places(image.pooler_output).unflatten(1, (10, 2)).gather(1, scenes.digits[..., None].expand(-1, -1, 2))
    return {
        "contrast": contrast,
        "present": F.binary_cross_entropy_with_logits(heads.present(image.pooler_output), present),
        "places": F.smooth_l1_loss(places, (scenes.boxes[..., :2] + DIGIT / 2) / CANVAS, beta=0.1),
        "words": torch.stack(
            [F.cross_entropy(head(text.pooler_output), said[:, i]) for i, head in enumerate(heads.words)]
        ).mean(),
        **patch_losses(heads, image.last_hidden_state, scenes.digits, scenes.boxes),
    }


def train(steps: int, *, seed: int = 0, log_every: int = 100) -> CLIPModel:
    """A model trained with AdamW for `steps` steps, first on crowded images, then on scenes, with one learning-rate cycle for
    each part; eval mode."""
    check_steps(steps)
    generator = torch.Generator().manual_seed(seed)

    def make() -> tuple[CLIPModel, TrainingHeads]:
        model = build_clip(CONFIG)
        place(model)
        return model, TrainingHeads(CONFIG["vision_config"]["hidden_size"], CONFIG["text_config"]["hidden_size"])

    model, heads = seeded(seed, make)
    kinds = torch.zeros(BATCH, dtype=torch.int64)

    def drawn() -> dict[str, Tensor]:
        return losses(model, heads, sample_scenes(kinds, "train", None, generator), generator)

    first, fit_parts = round(FIRST * steps), functools.partial(fit, weights=WEIGHTS, log_every=log_every, warmup=0.1)
    if first:
        alone = functools.partial(crowd_losses, model, heads, generator)
        fit_parts([*model.vision_model.parameters(), *heads.parameters()], alone, steps=first, learning_rate=3e-3)
    fit_parts([*model.parameters(), *heads.parameters()], drawn, steps=steps - first, learning_rate=2e-3)
    return model.eval()


def evaluate(model: CLIPModel, *, count: int, seed: int = 0) -> dict[str, object]:
    """Retrieval on test scenes, and accuracies per kind of wrong caption for all captions, for captions seen in training and for
    held-out captions."""
    pairs = ("all", "seen", "held_out")
    return {
        "retrieval": retrieval(model, count=count, seed=seed),
        "caption_accuracy": {name: caption_accuracy(model, count=count, seed=seed, pairs=name) for name in pairs},
    }
