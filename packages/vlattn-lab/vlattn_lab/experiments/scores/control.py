"""Question answering with MAC's control unit, beside the same model whose steps read the question each on its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_lab.experiments.scores import answering
from vlattn_lab.experiments.scores.answering import SIZE
from vlattn_lab.experiments.scores.material import Sizes

RATES = answering.RATES[1:]  # which validation chose for these scores
SIZES, SMOKE, measure = answering.SIZES, answering.SMOKE, answering.measure
SHOWN = ("scaled_dot", "hadamard")  # the most accurate score, and MAC's


class ControlUnit(answering.Mac):
    """The words to attend to depend on those of the step before: their weights are a learned sum of the features of word * step,
    where a step is a linear map of the earlier control and of the question (Hudson and Manning, ICLR 2018, section 3.2.1)."""

    def __init__(self, arm: str, backend: str = "auto") -> None:
        super().__init__(arm, backend)
        self.first = nn.Parameter(torch.zeros(SIZE))
        self.step, self.weigh = nn.Linear(2 * SIZE, SIZE), nn.Linear(SIZE, 1)

    def controls(self, words: Tensor, sentence: Tensor, hidden: Tensor) -> Iterator[Tensor]:
        control = self.first.expand(len(words), -1)
        for ask in self.ask:
            step = self.step(torch.cat([control, ask(sentence)], dim=-1))
            attention = (self.weigh(step[:, None] * words)[..., 0] + hidden).softmax(-1)
            control = (attention[:, None] @ words)[:, 0]
            yield control


OPTIONS: dict[str, tuple[str, Any]] = {
    score + name: (score, make) for score in SHOWN for name, make in (("", answering.Mac), (", control unit", ControlUnit))
}
ARMS = tuple(OPTIONS)


def train(arm: str, seed: int, sizes: Sizes, rate: float) -> tuple[Any, Any]:
    """As in `answering`."""
    score, make = OPTIONS[arm]
    return answering.train(score, seed, sizes, rate, make)
