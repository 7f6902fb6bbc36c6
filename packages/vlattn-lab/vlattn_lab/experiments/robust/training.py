"""Scenes with a shade that goes with the answer, a classifier that learns to look at the shade, and its training with few masks.

The answer is the one digit below four in a scene; the other three digits are larger. In training a grey square lies in the corner
that belongs to the answer, so a classifier needs no digit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlattn_fast as va
from vlattn_fast import explain
from vlattn_fast.methods import Gradient, Method, Rollout
from vlattn_fast.nn import RelevancyLoss
from vlattn_lab.clip import PATCH, load_clip
from vlattn_lab.pointing import box_shares
from vlattn_lab.scenes import CANVAS, sample_scenes
from vlattn_lab.train.fit import fit, seeded

ANSWERS = 4  # the digits 0 to 3
SHADE, GREY = 6, 0.5  # pixels, both sides; ink
CORNERS = torch.tensor([[0, 0], [1, 0], [1, 1], [0, 1]]) * (CANVAS - SHADE)  # x, y of the shade of each answer
CUES = ("as in training", "none", "inverted")
MASKS = 3  # a class
BATCH = 32
MAP = CANVAS // PATCH  # patches, both sides
EXPLAINED, SHOWN = 200, 2  # scenes of a measurement at most, and of the picture
RELEVANCIES: dict[str, Method] = {
    "rollout": Rollout(),
    "gradient": Gradient(freeze=()),
    "held": Gradient(freeze=("norms", "attention")),
}


@dataclass(frozen=True)
class Sizes:
    """scenes, steps: of the first training; fine: steps of the second; test: scenes of a measurement."""

    scenes: int
    steps: int
    fine: int
    test: int


@dataclass(frozen=True)
class Scenes:
    """images (B, 32, 32) without a shade; box (B, 4) of the digit that is the answer; answer int64 (B)."""

    images: Tensor
    box: Tensor
    answer: Tensor

    def shaded(self, cue: str) -> Scenes:
        """With the shade in the corner of the answer, without one, or with one in the corner opposite."""
        if cue == "none":
            return self
        corners = CORNERS[(self.answer + ANSWERS // 2) % ANSWERS if cue == "inverted" else self.answer]
        grey = GREY * _inside(corners, corners + SHADE)
        return replace(self, images=torch.maximum(self.images, grey))

    @property
    def mask(self) -> Tensor:
        """bool (B, 32, 32): the box."""
        return _inside(self.box[:, :2], self.box[:, 2:])

    def __getitem__(self, samples: Any) -> Scenes:
        return Scenes(self.images[samples], self.box[samples], self.answer[samples])


def _inside(low: Tensor, high: Tensor) -> Tensor:
    """Corners (B, 2) x, y -> bool (B, 32, 32): the pixels between them."""
    pixel = torch.arange(CANVAS)
    x, y = ((pixel >= low[:, axis, None]) & (pixel < high[:, axis, None]) for axis in (0, 1))
    return y[:, :, None] & x[:, None, :]


def draw(count: int, split: str, seed: int) -> Scenes:
    """`count` scenes with one digit below ANSWERS each."""
    whole = sample_scenes(torch.zeros(4 * count + 16, dtype=torch.int64), split, None, torch.Generator().manual_seed(seed))
    below = whole.digits < ANSWERS
    chosen = (below.sum(1) == 1).nonzero()[:count, 0]
    place = below[chosen].int().argmax(1)
    return Scenes(whole.images[chosen], whole.boxes[chosen, place], whole.digits[chosen, place])


def shown_scenes(seed: int) -> Scenes:
    """Test scenes for the picture."""
    return draw(SHOWN, "test", seed + 2000)


class Classifier(nn.Module):
    """The vision tower of the trained CLIP, and a linear layer on its CLS token."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = load_clip()[0].vision_model
        self.head = nn.Linear(self.tower.config.hidden_size, ANSWERS)

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.head(self.tower(pixel_values=pixel_values).pooler_output)
        return logits


def first_training(scenes: Scenes, seed: int, sizes: Sizes) -> Classifier:
    """A classifier trained on scenes by cross-entropy alone."""
    model, generator = seeded(seed, Classifier), torch.Generator().manual_seed(seed)

    def losses() -> dict[str, Tensor]:
        part = scenes[torch.randint(len(scenes.answer), (BATCH,), generator=generator)]
        return {"answer": F.cross_entropy(model(part.images[:, None]), part.answer)}

    fit(model.parameters(), losses, {"answer": 1.0}, sizes.steps, learning_rate=3e-4)
    return model


def few(scenes: Scenes) -> Scenes:
    """The first MASKS scenes of each answer."""
    return scenes[torch.cat([(scenes.answer == answer).nonzero()[:MASKS, 0] for answer in range(ANSWERS)])]


def second_training(model: Classifier, scenes: Scenes, loss: str, weight: float, rate: float, steps: int) -> None:
    """Trains on all scenes at each step, by cross-entropy and `weight` times a loss on their masks: "none"; "crop", the
    cross-entropy of the pictures with nothing but the digit; a name of RELEVANCIES, the share of this relevancy outside."""
    pixels, answer, mask = scenes.images[:, None], scenes.answer, scenes.mask
    inside = RelevancyLoss("inside", prefix=1)

    def losses() -> dict[str, Tensor]:
        if loss in ("none", "crop"):
            parts = {"answer": F.cross_entropy(model(pixels), answer)}
            return parts if loss == "none" else {**parts, "mask": F.cross_entropy(model(pixels * mask[:, None]), answer)}
        with va.nn.capture_relevancy(model, method=RELEVANCIES[loss]) as captured:
            logits = model(pixels)
        score = None if loss == "rollout" else logits.gather(1, answer[:, None]).sum()
        return {"answer": F.cross_entropy(logits, answer), "mask": inside(captured.relevancy(score, position="cls"), mask)}

    fit(model.parameters(), losses, {"answer": 1.0, "mask": weight}, steps, learning_rate=rate)


@torch.no_grad()
def accuracies(model: Classifier, scenes: Scenes, cues: Sequence[str] = CUES) -> dict[str, float]:
    """By cue."""
    right = {cue: model(scenes.shaded(cue).images[:, None]).argmax(1) == scenes.answer for cue in cues}
    return {cue: round(float(one.double().mean()), 4) for cue, one in right.items()}


def relevancy_maps(model: Classifier, scenes: Scenes, name: str = "gradient") -> Tensor:
    """(B, 8, 8): of the right answer, by one of RELEVANCIES."""
    target = None if name == "rollout" else scenes.answer.tolist()
    maps = explain(model, {"pixel_values": scenes.images[:, None]}, target=target, method=RELEVANCIES[name], position="cls").image
    assert isinstance(maps, Tensor)
    return maps


def pointing(model: Classifier, scenes: Scenes) -> dict[str, float]:
    """Shares of the relevancy in the digit's box and in the shade, and how often its largest patch touches the box; the shade
    lies as in training."""
    shown = scenes[slice(EXPLAINED)].shaded("as in training")
    corners = CORNERS[shown.answer].float()
    boxes = torch.stack([shown.box, torch.cat([corners, corners + SHADE], 1)], 1)
    touched = F.adaptive_avg_pool2d(shown.mask.double(), MAP) > 0
    measured: dict[str, float] = {}
    for relevancy, name in (("gradient", ""), ("held", "held fixed "), ("rollout", "rollout ")):
        maps = relevancy_maps(model, shown, relevancy).double()
        digit, shade = (box_shares(maps, boxes) / maps.sum((1, 2))[:, None].clamp(min=1e-30)).mean(0).tolist()
        measured |= {f"{name}in the digit": digit, f"{name}in the shade": shade}
        if not name:
            measured["hits"] = float(touched.flatten(1).gather(1, maps.flatten(1).argmax(1)[:, None]).double().mean())
    return {name: round(value, 4) for name, value in measured.items()}


def facts_of_picture(model: Classifier, scenes: Scenes) -> dict[str, Any]:
    """The model's answer to each scene, and the relevancy of the right one."""
    with torch.no_grad():
        says = model(scenes.images[:, None]).argmax(1).tolist()
    maps = relevancy_maps(model, scenes)
    return {"says": says, "maps": [[[float(f"{value:.3g}") for value in row] for row in one] for one in maps.tolist()]}
