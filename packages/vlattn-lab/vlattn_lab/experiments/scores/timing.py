"""Time of a step, forward and backward: this package's attention, the formula, and the formula under torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_lab.experiments.experiment import least_seconds
from vlattn_lab.experiments.scores import answering, encoders, generation, matching
from vlattn_lab.experiments.scores.attend import Attend
from vlattn_lab.experiments.scores.material import FEATURES
from vlattn_lab.scenes import REGIONS
from vlattn_lab.texts import TEXT_VOCABULARY
from vlattn_lab.train.fit import seeded

VARIANTS = ("ours", "formula", "compiled")
IMAGES, CAPTION_WORDS, BOXES, WIDTH = 32, 32 * 12, 36, 64  # SCAN's batch is 128 images of 36 regions, 1024 features wide


class Alone(nn.Module):
    """The words of 32 captions attend to the 36 regions of 32 images."""

    def __init__(self, arm: str, backend: str) -> None:
        super().__init__()
        self.words = nn.Parameter(torch.randn(CAPTION_WORDS, WIDTH))
        self.regions = nn.Parameter(torch.randn(IMAGES, BOXES, WIDTH))
        self.attend = Attend(arm, WIDTH, backend)

    def forward(self) -> Tensor:
        attended: Tensor = self.attend(self.words.expand(IMAGES, -1, -1), self.regions)
        return attended


def _generation(arm: str, backend: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    words = torch.randn(encoders.BATCH, encoders.WORDS, encoders.SIZE)
    return generation.Generator(arm, backend), (words, words[:, 0], torch.randn(encoders.BATCH, generation.NOISE))


def _of_regions(model: Any, module: Any, arm: str, backend: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    made, ids = model(arm, backend), (module.BATCH, module.WORDS)
    return made, (torch.randn(module.BATCH, REGIONS, FEATURES), torch.randint(1, len(TEXT_VOCABULARY), ids))


MADE: dict[str, Callable[[str, str], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "matching": functools.partial(_of_regions, matching.Matcher, matching),
    "answering": functools.partial(_of_regions, answering.Mac, answering),
    "generation": _generation,
    "SCAN": lambda arm, backend: (Alone(arm, backend), ()),
}


def step_of(what: str, arm: str, variant: str) -> Callable[[], None]:
    """A step of a model with random inputs, or of attention alone at a size near SCAN's."""
    model, inputs = seeded(0, lambda: MADE[what](arm, "auto" if variant == "ours" else "reference"))
    if variant == "compiled":
        next(part for part in model.modules() if isinstance(part, Attend)).compile()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(*inputs).square().sum().backward()

    return step


def measure(what: str, arm: str, *, rounds: int, least: float, variants: tuple[str, ...] = VARIANTS) -> dict[str, float]:
    """Milliseconds of one thread: the least of `rounds`, in which the variants take turns, `least` seconds each."""
    torch.set_num_threads(1)
    torch._dynamo.reset()  # torch.compile stops compiling a function after eight shapes
    steps = {variant: step_of(what, arm, variant) for variant in variants}
    for step in steps.values():
        step()
        step()
    times = least_seconds(steps, rounds, least)
    return {f"{variant}_ms": round(1e3 * seconds, 4) for variant, seconds in times.items()}
