"""Trains LXMERT on DigitScenes: the losses of UNITER's training, taken at the states of two streams.

Regions learn their digit after the layer of their own stream, and keep it to the end, as no other loss reaches the last layer of
their stream. Words learn where their digit is after the first layer in which the streams attend to one another, and [CLS] answers
after the second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlattn_lab.lxmert import CONFIG, build, inputs, matching
from vlattn_lab.train import uniter
from vlattn_lab.train.uniter import Observed

if TYPE_CHECKING:
    from transformers import LxmertForQuestionAnswering


def observe(model: LxmertForQuestionAnswering, of_uniter: dict[str, Tensor]) -> Observed:
    """The states that the losses need; `of_uniter`: the inputs under UNITER's names."""
    output = model(**inputs(of_uniter), output_hidden_states=True)
    words, regions = output.language_hidden_states, output.vision_hidden_states
    first_and_last = torch.cat([regions[-CONFIG["x_layers"] - 1], regions[-1]], 1)
    return Observed(output.question_answering_score, first_and_last, words[-2], words[-1], regions[-1])


def train(
    steps: int = 2000, *, seed: int = 0, split: str = "train", log_every: int = 100, recipe: str = "located"
) -> LxmertForQuestionAnswering:
    """A model trained as `uniter.train` trains UNITER; eval mode."""
    return uniter.train_matching(lambda: build(CONFIG), observe, steps, seed, split, log_every, recipe)


def evaluate(model: LxmertForQuestionAnswering, **options: Any) -> dict[str, dict[str, dict[str, float]]]:
    """See `uniter.evaluate`."""
    return uniter.evaluate(matching(model), **options)
