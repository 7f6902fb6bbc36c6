"""Score functions of attention on three tasks (Cao et al., "Understanding Attention for Vision-and-Language Tasks", COLING 2022).

The same small models are trained with each score function: matching of images and texts, question answering, pictures from
captions. Does a score that is more accurate have attention that can be interpreted better?

In: options of the experiment.
Out: its records.
Imports: vlattn_lab, vlattn_lab.experiments, vlattn_lab.train.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from vlattn_lab.experiments.experiment import Cell, Experiment, Record, Settings, Stage
from vlattn_lab.experiments.scores import answering, conditions, control, drawing, generation, matching, reading, scan, timing
from vlattn_lab.experiments.scores.attend import FORMS, PLAIN, SCORES
from vlattn_lab.experiments.scores.page import accuracy_and_gap, effects, of_conditions, pictures, tables

TASKS: dict[str, Any] = {
    "matching": matching,
    "SCAN": scan,
    "answering": answering,
    "reading": reading,
    "generation": generation,
    "drawing": drawing,
    "conditions": conditions,
    "control": control,
}
REFERENCES = {"answering": "frequent", "generation": "real", "drawing": "real"}  # arms without a model
CHOICE_SEED = 100  # of the trainings that choose the learning rates; no measured training has it


@contextlib.contextmanager
def _without_denormals() -> Iterator[None]:
    """Gradients of a saturated sigmoid are denormal numbers, and CPUs are slow on them."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def choices(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    """A cell for each learning rate of the tasks that have several; forms of general have the rate of another arm."""
    return [
        {"task": task, "arm": arm, "rate": rate, "seed": CHOICE_SEED}
        for task, module in TASKS.items()
        for arm in module.ARMS
        if arm not in FORMS
        for rate in (module.RATES if len(module.RATES) > 1 else ())
    ]


@_without_denormals()
def choose(cell: Cell, settings: Settings) -> dict[str, Any]:
    """Accuracy on a fifth of the training scans, after training on the rest."""
    module, seed = TASKS[cell["task"]], cell["seed"]
    sizes = _sizes(module, settings)._replace(learn="fit", test="validation")
    model, _ = module.train(cell["arm"], seed, sizes, cell["rate"])
    return {"validation": _rounded(module.measure(model, seed, sizes))}


def rate_of(task: str, arm: str, records: Sequence[Record]) -> float:
    """The learning rate with the best accuracy on validation scenes, of the arm itself, or of `general` or `activated_general`
    for a form of general."""
    chosen = task, SCORES[arm][0] if arm in FORMS else arm
    tried = [record for record in records if "validation" in record and (record["task"], record["arm"]) == chosen]
    return float(max(tried, key=lambda record: record["validation"]["accuracy"])["rate"] if tried else TASKS[task].RATES[0])


def trainings(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    """Cells of one seed follow one another, since a process keeps the scenes and encoders of a seed."""
    cells: list[Cell] = []
    for seed in range(settings.seeds):
        for task, module in TASKS.items():
            cells += [{"task": task, "arm": arm, "rate": rate_of(task, arm, records), "seed": seed} for arm in module.ARMS]
            cells += [{"task": task, "arm": REFERENCES[task], "seed": seed}] if task in REFERENCES else []
    return cells


def _sizes(module: Any, settings: Settings) -> Any:
    return module.SMOKE if settings.smoke else module.SIZES


@_without_denormals()
def train(cell: Cell, settings: Settings) -> dict[str, Any]:
    module, arm, seed = TASKS[cell["task"]], cell["arm"], cell["seed"]
    sizes = _sizes(module, settings)
    if arm == "frequent":
        return {"trained": _rounded(answering.blind(sizes, seed))}
    if arm == "real":
        shown = module.samples(None, seed, sizes) if seed == 0 else {}
        return {"trained": _rounded(module.measure_real(seed, sizes)), **shown}
    if module is generation:
        for number in generation.judges(seed).values():  # the training has no part in their time
            generation.pair(number, sizes.pair)
    began = time.process_time()
    model, first = module.train(arm, seed, sizes, cell["rate"])
    figures: dict[str, Any] = {"training_seconds": round(time.process_time() - began, 2)}
    for name, one in (("trained", model), ("untrained", first)):
        figures[name] = _rounded(module.measure(one, seed, sizes))
    return figures | (module.samples(model, seed, sizes) if REFERENCES.get(cell["task"]) == "real" and seed == 0 else {})


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in figures.items()}


def timings(settings: Settings, records: Sequence[Record]) -> list[Cell]:
    arms = list(PLAIN)[:1] if settings.smoke else list(PLAIN)
    return [{"what": what, "arm": arm, "seed": 0} for what in timing.MADE for arm in arms]


def time_steps(cell: Cell, settings: Settings) -> dict[str, Any]:
    if settings.smoke:
        return timing.measure(cell["what"], cell["arm"], rounds=1, least=0.0, variants=("ours", "formula"))
    return timing.measure(cell["what"], cell["arm"], rounds=5, least=0.03)


EXPERIMENT = Experiment(
    stages=[Stage(choices, choose), Stage(trainings, train), Stage(timings, time_steps, alone=True)],
    tables=tables,
    figures={
        "scores": accuracy_and_gap,
        "scores-conditions": of_conditions,
        "scores-pictures": functools.partial(pictures, task="generation"),
        "scores-drawing": functools.partial(pictures, task="drawing"),
    },
    effects=effects,
)
