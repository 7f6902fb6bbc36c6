"""Do maps of a captioner with recurrences show as much as those of a transformer?

Two captioners a seed, alike but for three of four layers: a gated delta rule in one, attention in the other. Both write captions
of test scenes; the two digits of each caption are explained, by every method, and the maps measured.

In: options of the experiment.
Out: its records.
Imports: vlattn_lab, vlattn_lab.experiments, vlattn_lab.train.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlattn_fast import Explanation, evaluate, explain
from vlattn_fast.interpret.evaluating.plan import RANDOM, CustomMethod
from vlattn_fast.interpret.relevancy.methods.registry import published
from vlattn_fast.measuring.provenance import fingerprint
from vlattn_fast.methods import Method
from vlattn_lab.experiments.experiment import Cell, Experiment, Record, Settings, Stage
from vlattn_lab.experiments.hybrid.report import LAST, METHODS, TESTS, effects, figure, tables
from vlattn_lab.hybrid import WEIGHTS, caption_truth, captions, inputs, load
from vlattn_lab.processor import DIGIT_WORDS
from vlattn_lab.questions import Questions, digit_prompts
from vlattn_lab.scenes import CANVAS
from vlattn_lab.texts import TEXT_VOCABULARY, SceneProcessor
from vlattn_lab.train.hybrid import STEPS, train

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

SCENES, BATCH = 20, 20  # scenes whose captions are explained
STEPS_OF_CURVES = tuple(step / 10 for step in range(11))  # shares of patches
ASKED = 400  # captions that tell how often a model is right
PLACES = (1, 5)  # of the digits in [START] three left of a six


def cells(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    return [{"seed": seed, "kind": kind} for seed in range(settings.seeds) for kind in WEIGHTS]


def measure(cell: Cell, settings: Settings) -> dict[str, Any]:
    kind, seed = cell["kind"], cell["seed"]
    model = trained(kind, seed, settings)
    scenes = digit_prompts(2 if settings.smoke else SCENES, seed=seed, kind="caption")
    others: dict[str, str | CustomMethod] = {LAST: last_layer, RANDOM: RANDOM}
    methods: dict[str, str | Method | CustomMethod] = {name: others.get(name) or published(name) for name in METHODS}
    steps = (0.0, 0.5, 1.0) if settings.smoke else STEPS_OF_CURVES
    # a model of a smoke run says no digits, so that the true captions stand in
    said = SceneProcessor(end=False).words(scenes.answers)["input_ids"] if settings.smoke else captions(model, scenes.images)
    report = evaluate(model, items(scenes, said), methods=methods, tests=TESTS, steps=steps, seed=seed, words=no_word)
    kept = [record for record in report.table if record["part"] == "image"]
    return {
        "weights": fingerprint(model),
        "truth": caption_truth(model, count=4 if settings.smoke else ASKED, seed=seed),
        "table": [{key: record[key] for key in ("method", "test", "value", "samples", "left_out")} for record in kept],
        "curves": [
            {"method": curve["method"], "test": curve["test"], "steps": curve["steps"], "mean": _rounded(curve["mean"])}
            for curve in report.curves
        ],
    }


def trained(kind: str, seed: int, settings: Settings) -> LlavaForConditionalGeneration:
    if settings.models is not None:
        return load(kind, Path(settings.models) / str(seed))
    return train(kind, 2 if settings.smoke else STEPS, seed=seed, log_every=0)


def items(scenes: Questions, said: Tensor) -> Iterator[tuple[dict[str, Tensor], list[int], list[Tensor]]]:
    """The digits of captions `said` (B, 1 + words), first and second, as `evaluate` takes them. The ground truth is the box of
    the digit that the word names, and empty where the scene lacks it. Captions in which these words are no digits are left
    out."""
    digits = torch.tensor([TEXT_VOCABULARY.index(word) for word in DIGIT_WORDS])
    fits = torch.isin(said[:, list(PLACES)], digits).all(1).nonzero()[:, 0]
    for samples in fits.split(BATCH):
        for place in PLACES:
            word = said[samples, place]
            named = digits[scenes.digits[samples]] == word[:, None]
            boxes = [corners[word] / CANVAS for corners, word in zip(scenes.boxes[samples], named, strict=True)]
            yield inputs(scenes.images[samples], said[samples, :place]), word.tolist(), boxes


def no_word(inputs: Mapping[str, Any]) -> Tensor:
    """The words that tests may remove: none, since the image is measured."""
    return torch.zeros_like(inputs["input_ids"], dtype=torch.bool)


def last_layer(model: nn.Module, inputs: Mapping[str, Any], target: Any) -> Explanation:
    """Method "gradient" in the last layer alone, which is attention in both kinds."""
    return explain(model, inputs, target=target, method=published("gradient", start_layer=-1))


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


EXPERIMENT = Experiment((Stage(cells, measure),), tables, {"hybrid": figure}, effects)
